"""The study's command runs, stops, goes on and counts as it says."""

import shlex
import signal
import subprocess
import sys
import time

import pytest
import torch

from tests.helpers import ROOT, environment, python
from tests.tools import study
from utils.evaluation import results
from utils.system.options import parse, parse_training
from utils.system.settings import Distances, Evaluation

GOLDEN = ROOT / "tests/golden"


def first_cells(text, count=1):
    """The first cells of each row of a table."""
    lines = [line for line in text.splitlines() if line.startswith("| ")]
    return [line.strip("| ").split(" | ")[:count] for line in lines[1:]]


def test_every_command_of_the_study_is_understood(capsys):
    study.main(["--commands"])
    lines = capsys.readouterr().out.splitlines()
    assert len(set(lines)) > 70
    for line in lines:
        train, evaluate, measure = (command.split()[2:] for command in line.split(" && "))
        settings = parse_training("", {}, train).settings
        assert (settings.width, settings.epochs) == (8, 6)
        assert parse(Evaluation, "", evaluate).attacks[-1] in ("adaptive", "autoattack")
        assert parse(Distances, "", measure).target_label == "all"


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["nothing"], "unknown: nothing"),
        (["--seeds", "x"], "--seeds"),
        (["--print", "--out", "nowhere"], "nowhere"),
        (["--print", "--out", str(GOLDEN / "ResNet18.keys.json")], "study.json"),
        (["--out", "study.json"], "--print"),
    ],
)
def test_wrong_use_of_the_study_is_refused(argv, words, capsys):
    with pytest.raises(SystemExit) as end:
        study.main(argv)
    assert end.value.code == 2
    assert words in capsys.readouterr().err


SMALL = (
    "--width=4 --epochs=2 --milestones=none --limit-train=24 --limit-test=6 --num-steps=1 "
    "--device=cpu"
)
QUICK = "--n-examples=4 --num-steps=2 --apgd-steps=5 --device=cpu"


def study_of(tmp_path):
    """The arguments of a study of four quick runs."""
    out = str(tmp_path / "study")
    return ["best", "--seeds", "1", "--out", out, "--flags", SMALL, "--evaluation", QUICK]


@pytest.mark.slow
def test_a_study_that_was_stopped_goes_on_and_a_run_is_that_of_its_command(tmp_path, capfd):
    argv = study_of(tmp_path)
    began = [sys.executable, "-m", "tests.tools.study", *argv]
    with subprocess.Popen(began, cwd=ROOT, env=environment(), stderr=subprocess.PIPE) as process:
        while not list(tmp_path.rglob("last_state.pt")):
            assert process.poll() is None, process.stderr.read()
            time.sleep(0.1)
        process.terminate()
        assert b"goes on" in process.stderr.read()
    assert process.returncode == 128 + signal.SIGTERM

    capfd.readouterr()
    study.main(argv)
    rows = first_cells(capfd.readouterr().out)
    assert [name for (name,) in rows[: len(study.best())]] == list(study.best())
    times = {file: file.stat().st_mtime_ns for file in tmp_path.rglob(results.FILE)}
    assert len(times) == 4
    study.main(argv)
    assert times == {file: file.stat().st_mtime_ns for file in tmp_path.rglob(results.FILE)}

    capfd.readouterr()
    with pytest.raises(SystemExit):
        study.main([*argv[:-1], f"{QUICK} --num-steps=3", "--print"])
    assert "num_steps" in capfd.readouterr().err

    study.main(["--commands", *argv])
    train = shlex.split(capfd.readouterr().out.splitlines()[-1].split(" && ")[0])
    done = python(*train[1:-1], f"--model-dir={tmp_path / 'alone' / 'run'}")
    assert done.returncode == 0, done.stderr
    (alone,) = tmp_path.glob("alone/run*/model-wrn-last.pt")
    (of_study,) = tmp_path.glob(f"study/*awp*ema*/{alone.parent.name}/{alone.name}")
    weights = torch.load(alone, weights_only=True)["model"]
    for key, value in torch.load(of_study, weights_only=True)["model"].items():
        assert torch.equal(weights[key], value)
