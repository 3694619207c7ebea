"""Runs of several seeds: a process for each, and what they have attained together."""

import os
import signal
import subprocess
import sys
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
from utils.system.settings import Training
from utils.training.records import best_row
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
    commands = {}
    for seed in command.seeds:
        folder = run_folder(command._replace(settings=replace(settings, seed=seed)))
        folders[seed] = folder
        argv = child_command(settings, seed, folder)
        if argv:
            commands[seed] = argv

    failed = []
    for seed, status in train_processes(settings, commands).items():
        if status:
            failed.append(f"seed {seed} with status {status}")
            del folders[seed]
    print_summary(folders)
    if failed:
        hint = "the same command tries again and leaves finished runs alone"
        raise RunError(f"{', '.join(failed)}; {hint}")


def child_command(settings: Training, seed: int, folder: Path) -> list[str]:
    """Return the command that trains one seed of this one, or goes on with it; [] if it is done."""
    argv = [sys.executable, *sys.argv, f"--seed={seed}", "--jobs=1"]
    file = folder / STATE
    if settings.overwrite or not file.exists():
        return argv
    with suppress(UsageError):  # the seed's own process names a damaged file
        if read(file)["epoch"] >= settings.epochs:
            return []
    return [*argv, f"--resume={folder}"]


def train_processes(settings: Training, commands: dict[int, list[str]]) -> dict[int, int]:
    """Run the commands of seeds, --jobs at once, and return their exit statuses by seed.

    Their lines are printed behind their seeds. Processes share the threads, and each has the next
    CUDA device. Errors: Stopped, after all of them have ended.
    """
    environment = os.environ | {"PYTHONUNBUFFERED": "1"}
    if settings.jobs > 1:
        threads = torch.get_num_threads() // settings.jobs
        environment["OMP_NUM_THREADS"] = str(max(1, threads))
        environment.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # waiting threads take no core
        cards = torch.cuda.device_count()
        if cards > 1 and settings.device in ("auto", "cuda") and not settings.no_cuda:
            for i, argv in enumerate(commands.values()):
                argv.append(f"--device=cuda:{i % cards}")
    children = []
    signals = []

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


def print_summary(folders: dict[int, Path]) -> None:
    """Print a table of the best epochs of the runs of seeds, with mean ± deviation and range."""
    naturals = []
    robusts = []
    print("| seed | best epoch | natural | pgd40_heads |")
    print("|---|---|---|---|")
    for seed, folder in folders.items():
        best = best_row(read(folder / STATE)["progress"]["rows"])
        if best is None:
            print(f"| {seed} | not evaluated | | |")
            continue
        naturals.append(best["natural_accuracy"])
        robusts.append(best["pgd40_heads_accuracy"])
        print(f"| {seed} | {best['epoch']} | {naturals[-1]:.2f} | {robusts[-1]:.2f} |")
    if naturals:
        ranges = [f"{min(values):.2f} to {max(values):.2f}" for values in (naturals, robusts)]
        print(f"| mean ± sd | | {mean_and_deviation(naturals)} | {mean_and_deviation(robusts)} |")
        print(f"| range | | {' | '.join(ranges)} |")
