"""Runs that are killed, interrupted or find no disk: nothing is lost, and what continues ends as if undisturbed."""

import csv
import errno
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch

from tests.forks import Nursery, draw_moments
from tests.helpers import ANCRA, ATTACK, EVALUATE, assert_equal, checkpoint, execute, files, folder
from utils.system.checkpoints import load_model
from utils.system.files import locked, write_atomically

FLAGS = (
    "--dataset=digits", "--width=4", "--limit-train=24", "--limit-test=8", "--batch-size=8", "--num-steps=1",
    "--epochs=2", "--warmup-epochs=0", "--log-interval=1", "--save-freq=2", "--device=cpu",
)  # fmt: skip
slow = pytest.mark.slow


def some_of(values, quick):
    """Parameters of which the first few belong to the quick part."""
    return [pytest.param(value, marks=[slow] * (i >= quick)) for i, value in enumerate(values)]


@pytest.fixture(scope="module")
def nursery():
    with Nursery() as nursery:
        yield nursery


@pytest.fixture(scope="module")
def straight(nursery, tmp_path_factory):
    """An undisturbed run -> (its folder, its calls by point)."""
    parent = tmp_path_factory.mktemp("straight")
    status, errors, calls = nursery.run([*FLAGS, "--model-dir", parent / "run"], out=parent / "log")
    assert (status, errors) == (0, [])
    return folder(parent), calls


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


@pytest.fixture
def stopped(nursery, straight, tmp_path):
    """Run with faults -> exit status, lines on standard error."""

    def run(*faults, flags=(*FLAGS, "--model-dir", tmp_path / "run"), parent=tmp_path, user=None):
        return nursery.run(flags, faults, parent / "log", user)[:2]

    return run


@pytest.fixture
def continues(nursery, straight, tmp_path):
    """Resume what was stopped, or start it anew where it had saved nothing yet, and compare -> whether it had."""

    def check(parent=tmp_path):
        command = [*FLAGS, "--model-dir", parent / "run"]
        states = list(parent.glob("run*/last_state.pt"))
        if not states:
            status, errors, _ = nursery.run([*command, "--resume"], out=parent / "log")
            assert status == 2 and len(errors) == 1 and "start the run without --resume" in errors[0]
        status, errors, _ = nursery.run(command + ["--resume"] * len(states), out=parent / "log")
        assert (status, errors) == (0, [])
        assert_equal(comparable(folder(parent)), comparable(straight[0]))
        return bool(states)

    return check


# kills and signals


@pytest.mark.parametrize("index", some_of(range(50), quick=3))
def test_a_killed_run_continues_exactly(straight, stopped, continues, index):
    at, call, when = draw_moments(straight[1], 50, 1)[index]
    assert stopped({"at": at, "call": call, "when": when, "signal": signal.SIGKILL}) == (-signal.SIGKILL, []), at
    continues()


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("index", some_of(range(10), quick=1))
def test_a_signal_stops_a_run_that_continues_exactly(straight, stopped, continues, tmp_path, index, signum):
    at, call, when = draw_moments(straight[1], 10, 2)[index]
    status, errors = stopped({"at": at, "call": call, "when": when, "signal": signum})
    run = folder(tmp_path)
    said = (run / "train.log").read_text().splitlines() if (run / "train.log").exists() else []
    if status == 128 + signum and any("continue by:" in line for line in errors):
        word = {signal.SIGINT: "interrupted", signal.SIGTERM: "terminated"}[signum]
        assert said[-1] == f"{word}; continue by: python {ANCRA} --resume {run}"
        assert len(errors) == 1 and errors[0].endswith(said[-1])
    elif status == 0:  # it came behind the last image of the last epoch
        assert call >= straight[1][at] - 12 and said[-1].startswith("evaluate by")
    else:  # it came before the loop: as any program ends, with nothing to save yet but the start
        assert status == (130 if signum == signal.SIGINT else -signum) and not (run / "metrics.csv").exists(), at
    continues()


STRIKES = [(signal.SIGTERM, "save", 1), (signal.SIGINT, "write", 300), (signal.SIGTERM, "write", 300)]
STRIKES += [(signal.SIGINT, "save", 1)] + [(s, at, 1) for s in (15, 2) for at in ("flush", "rename")]


@pytest.mark.parametrize("strike", some_of(STRIKES, quick=2))
def test_a_second_signal_while_saving_corrupts_nothing(stopped, continues, strike):
    """The first waits for the end of the step and saves; the second finds it saving."""
    signum, at, call = strike
    first, second = {"at": "attack", "call": 5, "signal": signum}, {"at": at, "call": call, "signal": signum}
    status, errors = stopped(first, second)
    assert status == (130 if signum == signal.SIGINT else -signum)
    assert len(errors) == (signum == signal.SIGINT)
    assert continues()


def test_kills_one_after_the_other_leave_no_temporary_files(stopped, continues, tmp_path):
    """Each resumed run is killed in the middle of a write; what they leave does not pile up."""
    command = [*FLAGS, "--model-dir", tmp_path / "run"]
    for i in range(2):
        fault = {"at": "write", "call": 900 + 10 * i, "signal": signal.SIGKILL}
        assert stopped(fault, flags=command + ["--resume"] * (i > 0))[0] == -signal.SIGKILL
        assert len(list(folder(tmp_path).glob(".*.part"))) == 1
    assert continues()


def test_a_run_killed_before_it_saved_anything_starts_anew(stopped, continues, tmp_path):
    assert stopped({"at": "write", "call": 100, "signal": signal.SIGKILL})[0] == -signal.SIGKILL
    assert {file.suffix for file in folder(tmp_path).iterdir()} == {".part", ""}
    assert not continues()


def test_one_process_at_a_time_writes_to_a_run_folder(straight, stopped, tmp_path):
    run = Path(shutil.copytree(straight[0], tmp_path / straight[0].name))
    before = files(run)
    for command in (["--resume", run], [*FLAGS, "--model-dir", tmp_path / "run"]):
        with locked(run / ".lock", wait=False):
            status, errors = stopped(flags=command)
        assert status == 2 and len(errors) == 1
        assert ("another process writes to" if "--resume" in command else "holds a run already") in errors[0]
        assert files(run) == before


# disks


def assert_failed(status, errors, run, cause, names=""):
    """Exit status 1 and one line that names a file of the run and the cause; the last good state is whole."""
    assert status == 1 and len(errors) == 1, errors
    assert errors[0].startswith(f"{ANCRA}: failed: {run}/{names}")
    assert errors[0].endswith(f": {os.strerror(cause)}; what was saved before is intact")


MOMENTS = [(at, index) for index in range(8) for at in ("write", "table", "save", "flush", "rename")]


@pytest.mark.parametrize("moment", some_of(MOMENTS, quick=2))
def test_a_full_disk_fails_clearly_and_the_run_continues(straight, stopped, continues, tmp_path, moment):
    at, index = moment
    call = 1 + random.Random(f"{at} {index}").randrange(straight[1][at])
    status, errors = stopped({"at": at, "call": call, "errno": errno.ENOSPC})
    if not list(tmp_path.glob("run*/last_state.pt")):  # as with any folder that cannot be written
        assert status == 2 and len(errors) == 1 and "cannot be written (No space left on device)" in errors[0]
    elif status == 0:  # a flush of the folder, which not every file system allows
        assert at == "flush"
        return
    else:
        assert_failed(status, errors, folder(tmp_path), errno.ENOSPC)
        load_model(folder(tmp_path) / "last_state.pt")
    continues()


@pytest.mark.parametrize("largest", some_of([150_000, 3_000, 20_000, 50_000, 250_000], quick=1))
def test_a_file_that_the_system_cuts_short_is_never_left(stopped, continues, tmp_path, largest):
    """A limit of the system, so that real writes fail in the middle of a file, wherever that is."""
    status, errors = stopped({"at": "attack", "call": 2, "largest": largest})
    assert_failed(status, errors, folder(tmp_path), errno.EFBIG)
    assert not list(folder(tmp_path).glob(".*"))
    assert continues()


NOBODY = 65534 if hasattr(os, "geteuid") and os.geteuid() == 0 else None  # a folder's permissions do not bind root


def test_a_folder_that_becomes_read_only_is_named_and_the_run_continues(straight, stopped, continues):
    with tempfile.TemporaryDirectory() as made:  # in a place that another user can reach
        os.chmod(made, 0o777)
        public = Path(made)
        command, run = [*FLAGS, "--model-dir", public / "run"], public / straight[0].name
        status, errors = stopped({"at": "attack", "call": 4, "lock": str(run)}, flags=command, parent=public, user=NOBODY)
        assert_failed(status, errors, run, errno.EACCES, "metrics.csv")
        load_model(run)
        before = {file: file.read_bytes() for file in run.glob("[!t.]*")}
        status, errors = stopped(flags=[*command, "--resume"], parent=public, user=NOBODY)
        assert status == 2 and len(errors) == 1 and f"{run} cannot be written (Permission denied)" in errors[0]
        assert {file: file.read_bytes() for file in run.glob("[!t.]*")} == before
        run.chmod(0o755)
        assert continues(public)


def test_a_folder_that_vanishes_is_named(straight, stopped, tmp_path):
    run = tmp_path / straight[0].name
    assert_failed(*stopped({"at": "attack", "call": 5, "remove": str(run)}), run, errno.ENOENT)
    assert not run.exists()


def test_a_log_on_a_full_disk_is_named(tmp_path, capsys):
    file = checkpoint(tmp_path / "weights.pt")
    assert execute(ATTACK, "--ckpt_url", file, *EVALUATE, "--log_path", "/dev/full") == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"{ATTACK}: failed: /dev/full: No space left on device")


def test_a_failed_write_leaves_what_was_there(tmp_path):
    file = tmp_path / "figures.json"
    file.write_text("old")

    def write(temporary):
        temporary.write_text("ne")
        raise OSError(errno.EIO, "Input/output error")

    with pytest.raises(OSError, match=r"Input/output error: '.*figures.json'"):
        write_atomically(file, write)
    assert [f.name for f in tmp_path.iterdir()] == ["figures.json"] and file.read_text() == "old"


def test_a_lock_is_released_by_death(tmp_path):
    file = tmp_path / ".lock"
    script = (
        "import fcntl, os, sys\n"
        f"opened = os.open({str(file)!r}, os.O_RDWR | os.O_CREAT)\n"
        "fcntl.flock(opened, fcntl.LOCK_EX)\nprint('held', flush=True)\nsys.stdin.read()\n"
    )
    with subprocess.Popen([sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout.readline() == "held\n"
        with pytest.raises(TimeoutError), locked(file, wait=False):
            pass
        other.kill()
    assert file.exists()
    with locked(file, wait=False):
        assert file.exists()
    assert not file.exists()
