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
from tests.helpers import ATTACK, EVALUATE, checkpoint, execute
from utils.checkpoints import load_model, locked, write_atomically

TINY = (
    "--dataset=digits", "--width=4", "--limit-train=24", "--limit-test=8", "--batch-size=8", "--num-steps=1",
    "--epochs=2", "--warmup-epochs=0", "--log-interval=1", "--save-freq=2", "--device=cpu",
)  # fmt: skip
KILLS, QUICK = 50, 10
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


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("at, call", [("save", 1), ("write", 300), ("flush", 1), ("rename", 1)])
def test_a_second_signal_while_saving_corrupts_nothing(nursery, straight, tmp_path, signum, at, call):
    """The first waits for the end of the step and saves; the second finds it saving."""
    faults = [{"at": "attack", "call": 5, "signal": signum}, {"at": at, "call": call, "signal": signum}]
    status, errors, _ = nursery.run([*TINY, "--model-dir", tmp_path / "run"], faults, tmp_path / "log")
    assert status == (130 if signum == signal.SIGINT else -signum)
    assert len(errors) == (signum == signal.SIGINT)
    assert assert_continues(nursery, tmp_path, straight)


def test_kills_one_after_the_other_leave_no_temporary_files(nursery, straight, tmp_path):
    """Each resumed run is killed in the middle of a write; what they leave does not pile up."""
    command = [*TINY, "--model-dir", tmp_path / "run"]
    for i in range(4):
        at = {"at": "write", "call": 900 + 10 * i, "signal": signal.SIGKILL}
        assert nursery.run(command + ["--resume"] * (i > 0), [at], tmp_path / "log")[0] == -signal.SIGKILL
        assert len(list(folder(tmp_path).glob(".*.part"))) == 1
    assert assert_continues(nursery, tmp_path, straight)


def test_a_run_killed_before_it_saved_anything_starts_anew(nursery, straight, tmp_path):
    at = {"at": "write", "call": 100, "signal": signal.SIGKILL}
    assert nursery.run([*TINY, "--model-dir", tmp_path / "run"], [at], tmp_path / "log")[0] == -signal.SIGKILL
    assert {file.suffix for file in folder(tmp_path).iterdir()} == {".part", ""}
    assert not assert_continues(nursery, tmp_path, straight)


def test_one_process_at_a_time_writes_to_a_run_folder(nursery, straight, tmp_path):
    run = Path(shutil.copytree(straight[0], tmp_path / straight[0].name))
    before = {file: file.read_bytes() for file in run.iterdir()}
    for command in (["--resume", run], [*TINY, "--model-dir", tmp_path / "run"]):
        with locked(run / ".lock", wait=False):
            status, errors, _ = nursery.run(command, out=tmp_path / "log")
        assert status == 2 and len(errors) == 1
        assert ("another process writes to" if "--resume" in command else "holds a run already") in errors[0]
        assert {file: file.read_bytes() for file in run.iterdir()} == before


# disks


def assert_failed(status, errors, run, cause, names=""):
    """Exit status 1 and one line that names a file of the run and the cause; the last good state is whole."""
    assert status == 1 and len(errors) == 1, errors
    assert errors[0].startswith(f"train_CIFAR10_ResNet.py: failed: {run}/{names}")
    assert errors[0].endswith(f": {os.strerror(cause)}; what was saved before is intact")


@pytest.mark.parametrize("index", [0, *(pytest.param(i, marks=pytest.mark.slow) for i in range(1, 8))])
@pytest.mark.parametrize("at", ["save", "write", "flush", "rename", "table", "curves"])
def test_a_full_disk_fails_clearly_and_the_run_continues(nursery, straight, tmp_path, at, index):
    call = 1 + random.Random(f"{at} {index}").randrange(straight[1][at])
    first = {"save": 1, "write": 720, "flush": 2, "rename": 1}.get(at, 0)
    fault = {"at": at, "call": call, "errno": errno.ENOSPC}
    status, errors, _ = nursery.run([*TINY, "--model-dir", tmp_path / "run"], [fault], tmp_path / "log")
    if call <= first:  # nothing had been saved: as with any folder that cannot be written
        assert status == 2 and len(errors) == 1 and "cannot be written (No space left on device)" in errors[0]
    elif status == 0:  # a flush of the folder, which not every file system allows
        assert at == "flush"
    else:
        assert_failed(status, errors, folder(tmp_path), errno.ENOSPC)
        load_model(folder(tmp_path) / "last_state.pt")
    assert_continues(nursery, tmp_path, straight) if status else None


@pytest.mark.parametrize("largest", [3_000, 20_000, 50_000, 150_000, 250_000])
def test_a_file_that_the_system_cuts_short_is_never_left(nursery, straight, tmp_path, largest):
    """A limit of the system, so that real writes fail in the middle of a file, wherever that is."""
    fault = {"at": "attack", "call": 2, "largest": largest}
    status, errors, _ = nursery.run([*TINY, "--model-dir", tmp_path / "run"], [fault], tmp_path / "log")
    assert_failed(status, errors, folder(tmp_path), errno.EFBIG)
    assert not list(folder(tmp_path).glob(".*"))
    assert assert_continues(nursery, tmp_path, straight)


@pytest.fixture
def public():
    """A folder that another user can reach."""
    with tempfile.TemporaryDirectory() as made:
        os.chmod(made, 0o777)
        yield Path(made)


NOBODY = 65534 if hasattr(os, "geteuid") and os.geteuid() == 0 else None  # a folder's permissions do not bind root


def test_a_folder_that_becomes_read_only_is_named_and_the_run_continues(nursery, straight, public):
    command = [*TINY, "--model-dir", public / "run"]
    run = public / straight[0].name
    fault = {"at": "attack", "call": 4, "lock": str(run)}
    status, errors, _ = nursery.run(command, [fault], public / "log", user=NOBODY)
    assert_failed(status, errors, run, errno.EACCES, "metrics.csv")
    load_model(run)
    before = {file: file.read_bytes() for file in run.glob("[!t.]*")}
    status, errors, _ = nursery.run([*command, "--resume"], out=public / "log", user=NOBODY)
    assert_failed(status, errors, run, errno.EACCES, "run.json")
    assert {file: file.read_bytes() for file in run.glob("[!t.]*")} == before
    run.chmod(0o755)
    assert assert_continues(nursery, public, straight)


def test_a_folder_that_vanishes_is_named(nursery, straight, tmp_path):
    run = tmp_path / straight[0].name
    fault = {"at": "attack", "call": 5, "remove": str(run)}
    status, errors, _ = nursery.run([*TINY, "--model-dir", tmp_path / "run"], [fault], tmp_path / "log")
    assert_failed(status, errors, run, errno.ENOENT)
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
    with subprocess.Popen(
        [sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as other:
        assert other.stdout.readline() == "held\n"
        with pytest.raises(TimeoutError, match="held by another process"), locked(file, wait=False):
            pass
        other.kill()
    assert file.exists()
    with locked(file, wait=False):
        assert file.exists()
    assert not file.exists()
