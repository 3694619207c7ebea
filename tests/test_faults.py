"""Runs that are killed, interrupted or find no disk: nothing is lost, and what continues ends as if undisturbed."""

import csv
import signal

import pytest
import torch

from tests.forks import Nursery, draw_moments

TINY = (
    "--dataset=digits", "--width=4", "--limit-train=24", "--limit-test=8", "--batch-size=8", "--num-steps=1",
    "--epochs=2", "--warmup-epochs=0", "--log-interval=1", "--save-freq=2", "--device=cpu",
)  # fmt: skip
KILLS, QUICK = 50, 15
SIGNALS = 10


@pytest.fixture(scope="module")
def nursery():
    with Nursery() as nursery:
        yield nursery


@pytest.fixture(scope="module")
def straight(nursery, tmp_path_factory):
    """An undisturbed run -> (its folder, its calls by point)."""
    parent = tmp_path_factory.mktemp("straight")
    status, errors, calls = nursery.run([*TINY, "--model-dir", parent / "run"], out=parent / "log")
    assert (status, errors) == (0, [])
    return folder(parent), calls


def folder(parent):
    (found,) = parent.glob("run*")
    return found


def comparable(run):
    """What a run folder holds, without times and what else says when and how it was made."""
    found = {"files": sorted(file.name for file in run.iterdir())}
    with open(run / "metrics.csv", newline="") as file:
        found["rows"] = [{k: v for k, v in row.items() if "second" not in k} for row in csv.DictReader(file)]
    for file in run.glob("*.pt"):
        content = torch.load(file, weights_only=True)
        del content["provenance"], content["recipe"]["model_dir"]
        for row in content.get("progress", {}).get("rows", ()):
            del row["seconds"], row["train_images_per_second"]
        found[file.name] = content
    return found


def assert_equal(a, b, where=""):
    assert type(a) is type(b), where
    if isinstance(a, dict):
        assert a.keys() == b.keys(), where
        for key in a:
            assert_equal(a[key], b[key], f"{where}.{key}")
    elif isinstance(a, list):
        assert len(a) == len(b), where
        for i, (left, right) in enumerate(zip(a, b, strict=True)):
            assert_equal(left, right, f"{where}[{i}]")
    elif isinstance(a, torch.Tensor):
        assert a.dtype == b.dtype and torch.equal(a, b), where
    else:
        assert a == b, where


def assert_continues(nursery, parent, straight):
    """Resume what was stopped in `parent`, or start it anew where it had saved nothing yet -> whether it had."""
    command = [*TINY, "--model-dir", parent / "run"]
    states = list(parent.glob("run*/last_state.pt"))
    if not states:
        status, errors, _ = nursery.run([*command, "--resume"], out=parent / "log")
        assert status == 2 and len(errors) == 1 and "start the run without --resume" in errors[0]
    status, errors, _ = nursery.run(command + ["--resume"] * len(states), out=parent / "log")
    assert (status, errors) == (0, [])
    assert_equal(comparable(folder(parent)), comparable(straight[0]))
    return bool(states)


def moments(count, seed, first=0):
    """Indices of moments: the moments are drawn from the calls of the undisturbed run, which only fixtures know."""
    return [pytest.param(count, seed, i, id=f"{i}") for i in range(first, count)]


def strike(nursery, straight, parent, count, seed, index, signum):
    """Send a signal at one of the moments drawn -> (the moment, exit status, lines on standard error)."""
    at, call, when = draw_moments(straight[1], count, seed)[index]
    fault = {"at": at, "call": call, "when": when, "signal": signum}
    status, errors, _ = nursery.run([*TINY, "--model-dir", parent / "run"], [fault], parent / "log")
    return (at, call, when), status, errors


def check_kill(nursery, straight, parent, count, seed, index):
    moment, status, errors = strike(nursery, straight, parent, count, seed, index, signal.SIGKILL)
    assert (status, errors) == (-signal.SIGKILL, []), moment
    assert_continues(nursery, parent, straight)


def check_signal(nursery, straight, parent, seed, index, signum):
    moment, status, errors = strike(nursery, straight, parent, SIGNALS, seed, index, signum)
    run = folder(parent)
    said = (run / "train.log").read_text().splitlines() if (run / "train.log").exists() else []
    if status == 128 + signum and any("continue by:" in line for line in errors):
        word = {signal.SIGINT: "interrupted", signal.SIGTERM: "terminated"}[signum]
        assert said[-1] == f"{word}; continue by: python train_CIFAR10_ResNet.py --resume {run}"
        assert len(errors) == 1 and errors[0].endswith(said[-1])
    elif status == 0:  # it came behind the last image of the last epoch
        assert moment[1] >= straight[1][moment[0]] - 12 and said[-1].startswith("evaluate by")
    else:  # it came before the loop: as any program ends, with nothing to save yet but the start
        assert status == (130 if signum == signal.SIGINT else -signum) and not (run / "metrics.csv").exists(), moment
    assert_continues(nursery, parent, straight)


@pytest.mark.parametrize("count, seed, index", moments(QUICK, 0))
def test_a_killed_run_continues_exactly(nursery, straight, tmp_path, count, seed, index):
    check_kill(nursery, straight, tmp_path, count, seed, index)


@pytest.mark.slow
@pytest.mark.parametrize("count, seed, index", moments(KILLS, 1))
def test_a_killed_run_continues_exactly_fifty_times(nursery, straight, tmp_path, count, seed, index):
    check_kill(nursery, straight, tmp_path, count, seed, index)


@pytest.mark.slow
@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("index", range(SIGNALS))
def test_a_signal_stops_a_run_that_continues_exactly(nursery, straight, tmp_path, index, signum):
    check_signal(nursery, straight, tmp_path, 2, index, signum)
