"""Several seeds by one command: their processes, stops, resumes and figures."""

import os
import signal
import sys
import threading
import time
from dataclasses import replace

import pytest
import torch

from tests.helpers import ANCRA, RA, RUN, assert_same_run, python, settings
from utils.system.checkpoints import STATE
from utils.system.errors import RunError, Stopped
from utils.system.options import parse_training
from utils.training import seeds
from utils.training.runs import run_folder

# A child that says it is there, and saves when it is told to stop, as a training does.
SAVES = """
import pathlib, signal, sys, time
def save(signum, frame):
    pathlib.Path(sys.argv[1] + ".saved").touch()
    sys.exit(128 + signum)
signal.signal(signal.SIGUSR1, save)
print("ready", flush=True)
pathlib.Path(sys.argv[1]).touch()
time.sleep(60)
"""


def child(code, *argv):
    """Return the command of a process that needs no PyTorch."""
    return [sys.executable, "-c", code, *map(str, argv)]


def test_one_seed_is_a_number_and_names_the_folder_as_before(tmp_path):
    command = parse_training("", RA, ["--seed", "7"])
    assert command.seeds == (7,)
    assert command.settings.seed == command.given["seed"] == 7
    assert run_folder(command).name.endswith("-seed-7")
    assert parse_training("", RA, []).settings.seed == 1
    (tmp_path / "a.json").write_text('{"seed": [3, 4]}')
    command = parse_training("", RA, [f"--config={tmp_path / 'a.json'}"])
    assert command.seeds == (3, 4)
    assert command.settings.seed == 3


def test_every_seed_has_its_lines_and_its_status_and_a_share_of_the_threads(capsys, monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 8)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    show = "import os, sys; print('threads', os.environ['OMP_NUM_THREADS']); "
    commands = {
        3: child(show + "sys.exit(1)"),
        4: child(show),
        5: child(show + "print(sys.argv)"),
    }
    statuses = seeds.train_processes(settings("--seed=3,4,5", "--jobs=2"), commands)
    assert statuses == {3: 1, 4: 0, 5: 0}
    lines = capsys.readouterr().out.splitlines()
    assert {f"seed {seed}: threads 4" for seed in statuses} < set(lines)
    assert "seed 5: ['-c', '--device=cuda:0']" in lines


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_a_stop_lets_all_processes_save_and_starts_no_other(tmp_path, signum):
    files = [tmp_path / name for name in "abc"]

    def stop_when_ready():
        while not (files[0].exists() and files[1].exists()):
            time.sleep(0.02)
        os.kill(os.getpid(), signum)

    threading.Thread(target=stop_when_ready, daemon=True).start()
    commands = {seed: child(SAVES, file) for seed, file in enumerate(files)}
    line = f"stopped by {signum.name}; the same command goes on"
    with pytest.raises(Stopped, match=line) as stopped:
        seeds.train_processes(settings("--seed=1,2,3", "--jobs=2"), commands)
    assert stopped.value.args[0] == signum
    assert {file.name for file in tmp_path.iterdir()} == {"a", "b", "a.saved", "b.saved"}


def test_a_run_is_resumed_where_there_is_a_state_and_started_otherwise(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["train.py", "--seed", "1,2"])
    new = [sys.executable, "train.py", "--seed", "1,2", "--seed=2", "--jobs=1"]
    resumed = [*new, f"--resume={tmp_path}"]
    run = settings("--seed=1,2", "--epochs=4")
    assert seeds.child_command(run, 2, tmp_path) == new
    torch.save({"epoch": 3}, tmp_path / STATE)
    assert seeds.child_command(run, 2, tmp_path) == resumed
    torch.save({"epoch": 4}, tmp_path / STATE)
    assert seeds.child_command(run, 2, tmp_path) == []
    assert seeds.child_command(replace(run, overwrite=True), 2, tmp_path) == new
    (tmp_path / STATE).write_bytes(b"damaged")
    assert seeds.child_command(run, 2, tmp_path) == resumed


def test_a_failed_run_is_named_after_the_figures_of_the_others(tmp_path, monkeypatch, capsys):
    flags = ["--seed=1,2,3", "--model-dir", str(tmp_path / "run")]
    command = parse_training("", RA, flags)
    for seed, natural, robust in ((1, 80, 50), (2, 90, 0), (3, 83, 53)):
        folder = run_folder(parse_training("", RA, [*flags, f"--seed={seed}"]))
        folder.mkdir()
        figures = [(1, natural, robust), (2, 99, 1)]
        columns = ("epoch", "natural_accuracy", "pgd40_heads_accuracy")
        rows = [dict(zip(columns, row, strict=True)) for row in figures]
        torch.save({"epoch": 2, "progress": {"rows": rows}}, folder / STATE)
    monkeypatch.setattr(seeds, "train_processes", lambda settings, pending: {1: 0, 2: 1, 3: 0})
    with pytest.raises(RunError, match="^seed 2 with status 1; the same command"):
        seeds.train_seeds(command)
    assert capsys.readouterr().out.splitlines()[2:] == [
        "| 1 | 1 | 80.00 | 50.00 |",
        "| 3 | 1 | 83.00 | 53.00 |",
        "| mean ± sd | | 81.50 ± 2.12 | 51.50 ± 2.12 |",
        "| range | | 80.00 to 83.00 | 50.00 to 53.00 |",
    ]


@pytest.mark.slow
def test_a_run_of_several_seeds_is_that_of_its_seed_alone(tmp_path):
    alone = (ANCRA, *RUN, "--seed=2", f"--model-dir={tmp_path / 'alone'}")
    several = (ANCRA, *RUN, "--seed=1,2", f"--model-dir={tmp_path / 'both'}")
    for command in (alone, (*several, "--epochs=1"), several):
        done = python(*command)
        assert done.returncode == 0, done.stderr
    (run,) = tmp_path.glob("alone*")
    (other,) = tmp_path.glob("both*-seed-2-*")
    assert_same_run(run, other)
