"""Runs that are killed, interrupted or find no disk: nothing is lost, and they continue exactly."""

import errno
import json
import os
import shutil
import signal
from functools import partial
from pathlib import Path

import pytest

from tests.forks import Fault, draw_moments, ended, forked, run_with_faults
from tests.helpers import ANCRA, assert_same_run, files, folder
from utils.system.files import locked

FLAGS = (
    "--dataset=digits",
    "--width=4",
    "--limit-train=24",
    "--limit-test=8",
    "--batch-size=8",
    "--num-steps=1",
    "--epochs=2",
    "--warmup-epochs=0",
    "--log-interval=1",
    "--save-freq=2",
    "--device=cpu",
)


def quick_first(values, quick):
    """Mark all values but the first few as slow."""
    slow = [pytest.param(value, marks=pytest.mark.slow) for value in values[quick:]]
    return [*values[:quick], *slow]


def run_forked(parent, *more, faults=()):
    """Run with faults in a forked process -> exit status, and lines of standard error."""
    argv = (*FLAGS, "--model-dir", parent / "run", *more)
    process = forked(parent / "log", run_with_faults, faults, parent / "calls.json", *argv)
    return ended(process), (parent / "log.err").read_text().splitlines()


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    """Run without faults; return the run's folder, and how often each point was passed."""
    parent = tmp_path_factory.mktemp("straight")
    assert run_forked(parent) == (0, [])
    return folder(parent), json.loads((parent / "calls.json").read_text())


def assert_continues(parent, straight):
    """Resume a stopped run, compare it with the undisturbed one, and return whether it had a state.

    A run that had saved nothing yet is started anew.
    """
    saved = bool(list(parent.glob("run*/last_state.pt")))
    if not saved:
        status, errors = run_forked(parent, "--resume")
        assert status == 2
        assert "without --resume" in errors[0]
    more = ["--resume"] if saved else []
    assert run_forked(parent, *more) == (0, [])
    assert_same_run(folder(parent), straight[0])
    assert set(os.listdir(folder(parent))) == set(os.listdir(straight[0]))
    return saved


def raising(signum):
    """Return what sends a signal to its own process."""
    return partial(signal.raise_signal, signum)


# Kills and signals


@pytest.mark.parametrize("index", quick_first(range(30), 3))
def test_a_killed_run_continues_exactly(straight, tmp_path, index):
    at, call, when = draw_moments(straight[1], 30, 1)[index]
    fault = Fault(at, call, raising(signal.SIGKILL), when)
    assert run_forked(tmp_path, faults=[fault]) == (-signal.SIGKILL, []), at
    assert_continues(tmp_path, straight)


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("index", quick_first(range(10), 1))
def test_a_signal_stops_a_run_that_continues_exactly(straight, tmp_path, index, signum):
    at, call, when = draw_moments(straight[1], 10, 2)[index]
    status, errors = run_forked(tmp_path, faults=[Fault(at, call, raising(signum), when)])
    log = folder(tmp_path) / "train.log"
    if status == 128 + signum and "continue by" in errors[-1]:
        assert errors[-1].endswith(f"{ANCRA} --resume {folder(tmp_path)}")
        assert log.read_text().splitlines()[-1].startswith("stopped")
    elif status == 0:  # it came after the last image of the last epoch
        assert "evaluate by" in log.read_text()
    else:  # it came before the first step: nothing but the start is saved
        assert status == (130 if signum == signal.SIGINT else -signum), at
        assert not (folder(tmp_path) / "metrics.csv").exists()
    assert_continues(tmp_path, straight)


STRIKES = [
    (signal.SIGTERM, "save", 1),
    (signal.SIGINT, "write", 300),
    (signal.SIGTERM, "flush", 1),
    (signal.SIGINT, "rename", 1),
]


@pytest.mark.parametrize("strike", quick_first(STRIKES, 2))
def test_a_second_signal_while_saving_corrupts_nothing(straight, tmp_path, strike):
    """The first waits for the end of the step and saves; the second finds it saving."""
    signum, at, call = strike
    faults = [Fault("attack", 5, raising(signum)), Fault(at, call, raising(signum))]
    status, _ = run_forked(tmp_path, faults=faults)
    assert status == -signum
    assert assert_continues(tmp_path, straight)


def test_kills_one_after_the_other_leave_no_temporary_files(straight, tmp_path):
    fault = Fault("write", 900, raising(signal.SIGKILL))
    for more in ([], ["--resume"]):
        assert run_forked(tmp_path, *more, faults=[fault]) == (-signal.SIGKILL, [])
        assert len(list(folder(tmp_path).glob(".*.part"))) == 1
    assert assert_continues(tmp_path, straight)


def test_one_process_at_a_time_writes_to_a_run_folder(straight, tmp_path):
    run = Path(shutil.copytree(straight[0], tmp_path / straight[0].name))
    before = files(run)
    with locked(run / ".lock", wait=False):
        status, errors = run_forked(tmp_path, "--resume")
    assert status == 2
    assert "another process" in errors[0]
    assert files(run) == before


# Disks

DISKS = [
    ("write", 500, errno.ENOSPC),
    ("table", 1, errno.ENOSPC),
    ("rename", 3, errno.EACCES),
    ("write", 1, errno.EIO),
    ("flush", 2, errno.ENOSPC),
]


def fail(cause):
    """Fail as the operating system does."""
    raise OSError(cause, os.strerror(cause))


@pytest.mark.parametrize("disk", quick_first(DISKS, 3))
def test_a_disk_that_fails_is_named_and_the_run_continues(straight, tmp_path, disk):
    at, call, cause = disk
    status, errors = run_forked(tmp_path, faults=[Fault(at, call, partial(fail, cause))])
    assert status == 1
    (line,) = errors
    assert os.strerror(cause) in line
    assert_continues(tmp_path, straight)
