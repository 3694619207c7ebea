"""Runs that are killed, interrupted or find no disk: nothing is lost, and they continue exactly."""

import errno
import os
import shutil
import signal
import tempfile
from pathlib import Path

import pytest

from tests.forks import Nursery, draw_moments
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


@pytest.fixture(scope="module")
def nursery():
    """Start a process that runs training commands in forked children."""
    with Nursery() as nursery:
        yield nursery


@pytest.fixture(scope="module")
def straight(nursery, tmp_path_factory):
    """Run without faults; return the run's folder, and how often each point was passed."""
    parent = tmp_path_factory.mktemp("straight")
    command = [*FLAGS, "--model-dir", parent / "run"]
    status, errors, calls = nursery.run(command, out=parent / "log")
    assert (status, errors) == (0, [])
    return folder(parent), calls


@pytest.fixture
def start(nursery, straight, tmp_path):
    """Return a function that runs with faults, to exit status and lines of standard error."""

    def run(*faults, more=(), parent=tmp_path, user=None):
        command = [*FLAGS, "--model-dir", parent / "run", *more]
        return nursery.run(command, faults, parent / "log", user)[:2]

    return run


@pytest.fixture
def assert_continues(start, straight, tmp_path):
    """Return a function that resumes a stopped run and compares it with the undisturbed one.

    A run that had saved nothing yet is started anew. The function returns whether it had.
    """

    def check(parent=tmp_path):
        saved = bool(list(parent.glob("run*/last_state.pt")))
        if not saved:
            status, errors = start(more=["--resume"], parent=parent)
            assert status == 2
            assert "without --resume" in errors[0]
        resume = ["--resume"] if saved else []
        assert start(more=resume, parent=parent) == (0, [])
        assert_same_run(folder(parent), straight[0])
        assert set(os.listdir(folder(parent))) == set(os.listdir(straight[0]))
        return saved

    return check


# Kills and signals


@pytest.mark.parametrize("index", quick_first(range(30), 3))
def test_a_killed_run_continues_exactly(straight, start, assert_continues, index):
    at, call, when = draw_moments(straight[1], 30, 1)[index]
    fault = {"at": at, "call": call, "when": when, "signal": signal.SIGKILL}
    assert start(fault) == (-signal.SIGKILL, []), at
    assert_continues()


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("index", quick_first(range(10), 1))
def test_a_signal_stops_a_run_that_continues_exactly(
    straight, start, assert_continues, tmp_path, index, signum
):
    at, call, when = draw_moments(straight[1], 10, 2)[index]
    status, errors = start({"at": at, "call": call, "when": when, "signal": signum})
    log = folder(tmp_path) / "train.log"
    if status == 128 + signum and "continue by" in errors[-1]:
        assert errors[-1].endswith(f"python {ANCRA} --resume {folder(tmp_path)}")
        assert log.read_text().splitlines()[-1].startswith("stopped")
    elif status == 0:  # it came after the last image of the last epoch
        assert "evaluate by" in log.read_text()
    else:  # it came before the first step: nothing but the start is saved
        assert status == (130 if signum == signal.SIGINT else -signum), at
        assert not (folder(tmp_path) / "metrics.csv").exists()
    assert_continues()


STRIKES = [
    (signal.SIGTERM, "save", 1),
    (signal.SIGINT, "write", 300),
    (signal.SIGTERM, "flush", 1),
    (signal.SIGINT, "rename", 1),
]


@pytest.mark.parametrize("strike", quick_first(STRIKES, 2))
def test_a_second_signal_while_saving_corrupts_nothing(start, assert_continues, strike):
    """The first waits for the end of the step and saves; the second finds it saving."""
    signum, at, call = strike
    first = {"at": "attack", "call": 5, "signal": signum}
    second = {"at": at, "call": call, "signal": signum}
    status, _ = start(first, second)
    assert status == -signum
    assert assert_continues()


def test_kills_one_after_the_other_leave_no_temporary_files(start, assert_continues, tmp_path):
    for more in ([], ["--resume"]):
        fault = {"at": "write", "call": 900, "signal": signal.SIGKILL}
        assert start(fault, more=more) == (-signal.SIGKILL, [])
        assert len(list(folder(tmp_path).glob(".*.part"))) == 1
    assert assert_continues()


def test_one_process_at_a_time_writes_to_a_run_folder(straight, start, tmp_path):
    run = Path(shutil.copytree(straight[0], tmp_path / straight[0].name))
    before = files(run)
    with locked(run / ".lock", wait=False):
        status, errors = start(more=["--resume"])
    assert status == 2
    assert "another process" in errors[0]
    assert files(run) == before


# Disks


def assert_failed(status, errors, cause):
    """Require exit status 1, and one line that names the cause."""
    assert status == 1
    (line,) = errors
    assert os.strerror(cause) in line


MOMENTS = [("write", 500), ("table", 1), ("rename", 3), ("write", 1), ("flush", 2)]


@pytest.mark.parametrize("moment", quick_first(MOMENTS, 2))
def test_a_full_disk_fails_clearly_and_the_run_continues(start, assert_continues, tmp_path, moment):
    at, call = moment
    status, errors = start({"at": at, "call": call, "errno": errno.ENOSPC})
    assert_failed(status, errors, errno.ENOSPC)
    assert_continues()


NOBODY = 65534 if os.geteuid() == 0 else None  # permissions do not bind root


def test_a_folder_that_becomes_read_only_is_named_and_the_run_continues(
    straight, start, assert_continues
):
    with tempfile.TemporaryDirectory() as made:  # in a place that another user can reach
        os.chmod(made, 0o777)
        parent = Path(made)
        run = parent / straight[0].name
        fault = {"at": "attack", "call": 4, "lock": str(run)}
        status, errors = start(fault, parent=parent, user=NOBODY)
        assert_failed(status, errors, errno.EACCES)
        status, errors = start(more=["--resume"], parent=parent, user=NOBODY)
        assert status == 2
        assert f"{run} cannot be written" in errors[0]
        run.chmod(0o755)
        assert assert_continues(parent)
