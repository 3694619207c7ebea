"""What output files say about their making."""

import json
import os
import subprocess
import sys

import pytest
import torch

from tests.helpers import ROOT
from utils.system.provenance import commit, in_one_line, provenance


def test_a_record_is_plain_and_says_how_to_repeat(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["train_CIFAR10_ResNet.py", "--model-dir", "my runs"])
    record = provenance(torch.device("cpu"), 7, packages=["ruff", "no-such-package"])
    assert json.loads(json.dumps(record)) == record
    assert record["command"].endswith("train_CIFAR10_ResNet.py --model-dir 'my runs'")
    assert (record["device"], record["seed"]) == ("cpu", 7) and record["cpu"] and record["threads"] >= 1
    assert record["versions"]["torch"] == torch.__version__ and record["versions"]["no-such-package"] is None
    assert {"python", "torchvision", "numpy", "ruff"} <= record["versions"].keys()
    assert "\n" not in in_one_line(record) and torch.__version__ in in_one_line(record)
    assert f"{record['threads']} threads ({record['waiting']})" in in_one_line(record)


@pytest.mark.parametrize(
    ("first", "given", "expected"),
    [
        ("import utils", {}, {"OMP_WAIT_POLICY": "PASSIVE"}),
        ("import tests", {}, {"OMP_WAIT_POLICY": "PASSIVE"}),  # as `python -m tests.tools.study` does
        ("import utils.system.command", {}, {"OMP_WAIT_POLICY": "PASSIVE"}),  # as every script does
        ("import utils", {"OMP_WAIT_POLICY": "ACTIVE"}, {"OMP_WAIT_POLICY": "ACTIVE"}),
        ("import utils", {"GOMP_SPINCOUNT": "100"}, {"GOMP_SPINCOUNT": "100"}),
        ("import sys; sys.modules['torch'] = sys; import utils", {}, {}),  # too late
    ],
)
def test_threads_wait_without_spinning_unless_the_user_says_how(first, given, expected):
    names = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")
    alone = {key: value for key, value in os.environ.items() if key not in names}
    code = f"{first}\nimport json, os\nprint(json.dumps({{n: os.environ[n] for n in {names} if n in os.environ}}))"
    code += "\nimport sys; assert getattr(sys.modules.get('torch'), '__version__', None) is None"  # not loaded by then
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=alone | given, capture_output=True, check=True)
    assert json.loads(done.stdout) == expected


def test_the_commit_is_that_of_the_code_not_of_a_repository_around_it(monkeypatch, tmp_path):
    def git(*args):
        identity = ("-c", "user.name=t", "-c", "user.email=t@localhost", "-c", "commit.gpgsign=false")
        return subprocess.run(["git", *identity, *args], cwd=tmp_path, capture_output=True, text=True, check=True).stdout

    code = tmp_path / "provenance.py"
    code.write_text("first\n")
    monkeypatch.setattr("utils.system.provenance.__file__", str(code))
    assert commit() is None
    git("init", "-q")
    git("commit", "-q", "--allow-empty", "-m", "something else")
    assert commit() is None
    git("add", ".")
    git("commit", "-q", "-m", "the code")
    assert commit() == git("rev-parse", "HEAD").strip()
    code.write_text("second\n")
    assert commit() == git("rev-parse", "HEAD").strip() + "+"
