"""Runs of several seeds: a process for each, and what they have attained together."""

import csv
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import torch

from utils.evaluation.results import mean_and_deviation
from utils.system import distributed
from utils.system.checkpoints import STATE, read
from utils.system.errors import RunError, Stopped, UsageError, stop_signals
from utils.system.options import Command
from utils.system.settings import Training, code_flags
from utils.system.values import counted
from utils.training.runs import run_folder

# Stops a run, however often it comes. A second SIGTERM would end it before its state is saved, and
# the first may have reached all processes of a job.
STOP = getattr(signal, "SIGUSR1", signal.SIGTERM)


def train_seeds(command: Command) -> None:
    """Train a run for each seed of a command, where it is not finished, and print their figures.

    Each is a process of the same script; a run that was stopped before is resumed.
    Errors: RunError where a run has failed, after the others; Stopped.
    """
    settings = command.settings
    if distributed.world() > 1:
        raise UsageError("several seeds start processes of their own; give torchrun one seed")
    folders = {}
    pending = {}
    for seed in command.seeds:
        folder = run_folder(command._replace(settings=replace(settings, seed=seed)))
        folders[seed] = folder
        if settings.overwrite or not is_finished(folder, settings.epochs):
            pending[seed] = child_command(settings, seed, folder)
        else:
            print(f"seed {seed}: {folder} is finished")

    failed = []
    for seed, status in train_processes(settings, pending).items():
        if status:
            failed.append(f"seed {seed} with status {status}")
            del folders[seed]
    print(*summary(folders), sep="\n")
    if failed:
        hint = "the same command tries again and leaves finished runs alone"
        raise RunError(f"{', '.join(failed)}; {hint}")


def is_finished(folder: Path, epochs: int) -> bool:
    """Whether a folder holds a run of that many epochs, in a state that can be read."""
    if (folder / STATE).exists():
        with suppress(UsageError):  # which its own process will say
            return read(folder / STATE).get("epoch", 0) >= epochs
    return False


def child_command(settings: Training, seed: int, folder: Path) -> list[str]:
    """Return the command that trains one seed of this one, or goes on with it."""
    resume = f"--resume={folder}"
    one_run = [sys.executable, *sys.argv, f"--seed={seed}", "--jobs=1"]
    if settings.overwrite or not (folder / STATE).exists():
        return one_run
    if settings.restart_epoch:  # a flag that starts a run
        also = [f"--epochs={settings.epochs}", *code_flags(settings.arch)]
        return [sys.executable, sys.argv[0], resume, *also]
    return [*one_run, resume]


def train_processes(settings: Training, commands: dict[int, list[str]]) -> dict[int, int]:
    """Run the commands of seeds, --jobs at once, and return their exit statuses by seed.

    Their lines are printed behind their seeds. Errors: Stopped, after all of them have ended.
    """
    environment = os.environ | {"PYTHONUNBUFFERED": "1"}
    if settings.jobs > 1:
        threads = max(1, torch.get_num_threads() // settings.jobs)
        environment["OMP_NUM_THREADS"] = str(threads)
        environment.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # waiting threads take no core
        line = f"{settings.jobs} runs at once, each with {counted(threads, 'thread')}"
        cards = torch.cuda.device_count()
        if cards > 1 and settings.device in ("auto", "cuda") and not settings.no_cuda:
            line += f" and the next of {cards} cards"
            for i, argv in enumerate(commands.values()):
                argv.append(f"--device=cuda:{i % cards}")
        print(line)
    children: list[subprocess.Popen] = []
    signals: list[int] = []

    def stop(signum: int, frame: object) -> None:
        for child in children:
            child.send_signal(signal.SIGTERM if signals else STOP)  # the third ends it at once
        signals.append(signum)

    def train(seed: int) -> int:
        if signals:
            return 128 + signals[0]
        # A session of its own: Ctrl-C in a terminal reaches this process alone, which passes it on.
        child = subprocess.Popen(
            commands[seed],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env=environment,
            encoding="utf-8",
            errors="replace",
            start_new_session=True,
        )
        children.append(child)
        if signals:  # which came while it started
            child.send_signal(STOP)
        with child:
            for line in child.stdout:
                with suppress(OSError):  # the terminal may be gone
                    print(f"seed {seed}: {line}", end="", flush=True)
        return child.returncode

    with stop_signals(stop), ThreadPoolExecutor(settings.jobs) as pool:
        statuses = dict(zip(commands, pool.map(train, commands), strict=True))
    if signals:
        cause = signal.Signals(signals[0]).name
        without = " without --overwrite" if settings.overwrite else ""
        raise Stopped(signals[0], f"stopped by {cause}; the same command{without} goes on")
    return statuses


def summary(folders: dict[int, Path]) -> Iterator[str]:
    """Yield a table of the best epochs of runs, with mean ± standard deviation and range."""
    naturals = []
    robusts = []
    yield "| seed | best epoch | natural | pgd40_heads |"
    yield "|---|---|---|---|"
    for seed, folder in folders.items():
        with open(folder / "metrics.csv", newline="", encoding="utf-8") as file:
            (best,) = (row for row in csv.DictReader(file) if row["selected"] == "1")
        naturals.append(float(best["natural_accuracy"]))
        robusts.append(float(best["pgd40_heads_accuracy"]))
        yield f"| {seed} | {best['epoch']} | {naturals[-1]:.2f} | {robusts[-1]:.2f} |"
    if folders:
        yield f"| mean ± sd | | {mean_and_deviation(naturals)} | {mean_and_deviation(robusts)} |"
        ranges = [f"{min(values):.2f} to {max(values):.2f}" for values in (naturals, robusts)]
        yield f"| range | | {' | '.join(ranges)} |"
