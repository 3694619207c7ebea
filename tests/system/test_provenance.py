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
    record = provenance(torch.device("cpu"), 7)
    assert json.loads(json.dumps(record)) == record
    assert type(record["versions"]["torch"]) is str  # pickles as one, too
    assert record["command"].endswith("train_CIFAR10_ResNet.py --model-dir 'my runs'")
    assert record["device"] == "cpu"
    assert record["seed"] == 7
    assert {"python", "torchvision"} <= record["versions"].keys()
    line = in_one_line(record)
    assert torch.__version__ in line
    assert f"threads {torch.get_num_threads()}, seed 7" in line


# Prints what the environment says of waiting threads, where PyTorch has not been loaded yet.
PRINT_WAITING = """
import json, os, sys
assert not hasattr(sys.modules.get("torch"), "__version__")
names = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")
print(json.dumps({name: os.environ[name] for name in names if name in os.environ}))
"""
BRIEFLY = {"GOMP_SPINCOUNT": "1000"}
TORCH_IS_LOADED = "import sys; sys.modules['torch'] = sys; import utils"


@pytest.mark.parametrize(
    ("first", "given", "expected"),
    [
        ("import utils", {}, BRIEFLY),
        ("import tests", {}, BRIEFLY),  # as `python -m tests.tools.study` does
        ("import utils", {"OMP_WAIT_POLICY": "ACTIVE"}, {"OMP_WAIT_POLICY": "ACTIVE"}),
        (TORCH_IS_LOADED, {}, {}),  # too late
    ],
)
def test_threads_spin_for_a_moment_unless_the_user_says_how(first, given, expected):
    env = {key: value for key, value in os.environ.items() if key[:4] not in ("OMP_", "GOMP")}
    done = subprocess.run(
        [sys.executable, "-c", f"{first}\n{PRINT_WAITING}"],
        cwd=ROOT,
        env=env | given,
        capture_output=True,
        check=True,
    )
    assert json.loads(done.stdout) == expected


def test_the_commit_is_that_of_the_code_not_of_a_repository_around_it(monkeypatch, tmp_path):
    def git(*args):
        identity = ("-c", "user.name=t", "-c", "user.email=t@localhost")
        command = ["git", *identity, "-c", "commit.gpgsign=false", *args]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
        return done.stdout.strip()

    code = tmp_path / "provenance.py"
    code.write_text("first\n")
    monkeypatch.setattr("utils.system.provenance.__file__", str(code))
    assert commit() is None
    git("init", "-q")
    git("commit", "-q", "--allow-empty", "-m", "something else")
    assert commit() is None
    git("add", ".")
    git("commit", "-q", "-m", "the code")
    assert commit() == git("rev-parse", "HEAD")
    code.write_text("second\n")
    assert commit() == git("rev-parse", "HEAD") + "+"
