"""Forks processes from one that has loaded PyTorch, and strikes runs with faults.

Loading PyTorch takes seconds. The process that forks has computed nothing: the threads of the
tests' own process would not be there in a fork.
"""

import csv
import json
import multiprocessing
import os
import random
import signal
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

from tests.conftest import shorten_runs
from tests.helpers import ANCRA, execute
from utils import attacks
from utils.training import job, loop, records

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["tests.system.test_distributed", "tests.forks"])


def forked(out, work, *args):
    """Start `work(*args)` in a forked process, with its output in OUT.out and OUT.err."""
    process = CONTEXT.Process(target=with_output, args=(out, work, *args), daemon=True)
    process.start()
    return process


def with_output(out, work, *args):
    """Do some work with standard output and standard error in files."""
    for stream, ending in ((1, "out"), (2, "err")):
        file = os.open(f"{out}.{ending}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
        os.dup2(file, stream)
    work(*args)


def ended(process):
    """Wait for a process, and return its exit status: minus the signal that ended it."""
    process.join(120)
    process.kill()
    process.join()
    return process.exitcode


def run_script(*argv):
    """Run a script, and end the process as it does."""
    sys.exit(execute(*argv))


# Faults

PIECES = 300  # in which a checkpoint is written
# Where faults can strike; `write` is a piece of a file
POINTS = {
    "attack": (loop, "attack_batch"),
    "loss": (job, "training_loss"),
    "update": (torch.optim.SGD, "step"),
    "evaluation": (loop, "verdicts"),
    "evaluation attack": (attacks, "projected_ascent"),
    "table": (csv.DictWriter, "writeheader"),
    "curves": (records, "save_or_note"),
    "save": (torch, "save"),
    "flush": (os, "fsync"),
    "rename": (Path, "replace"),
}


class Fault(NamedTuple):
    """A function that is called at a point, before or after a call that is counted from 1."""

    at: str
    call: int
    strike: Callable
    when: str = "before"


class Faults:
    """Counts the calls of every point, and strikes with one fault after the other.

    The second fault's call is counted from the first fault on.
    """

    def __init__(self, faults):
        self.pending = list(faults)
        self.calls = Counter()
        self.since = Counter()  # the calls since the last fault

    def passing(self, name, when="before"):
        """Count a call of a point, and strike where it is time."""
        if when == "before":
            self.calls[name] += 1
            self.since[name] += 1
        if not self.pending:
            return
        fault = self.pending[0]
        if (fault.at, fault.call, fault.when) == (name, self.since[name], when):
            self.pending.pop(0)
            self.since.clear()
            fault.strike()

    def watched(self, name, function):
        """Return a function whose calls pass here."""

        def calling(*args, **kwargs):
            self.passing(name)
            result = function(*args, **kwargs)
            self.passing(name, "after")
            return result

        return calling

    def write_bytes(self, path, content):
        """Write a file piece by piece, instead of `Path.write_bytes`; faults strike in between."""
        size = -(-len(content) // PIECES)
        with open(path, "wb", buffering=0) as file:
            for start in range(0, len(content), size):
                self.passing("write")
                file.write(content[start : start + size])


def run_with_faults(pending, calls, *argv):
    """Train with faults to come, and end the process; the file `calls` counts those of points."""
    faults = Faults(pending)
    patch = pytest.MonkeyPatch()
    shorten_runs(patch)
    for name, (holder, attribute) in POINTS.items():
        patch.setattr(holder, attribute, faults.watched(name, getattr(holder, attribute)))
    patch.setattr(Path, "write_bytes", lambda path, content: faults.write_bytes(path, content))
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        run_script(ANCRA, *argv)
    finally:
        calls.write_text(json.dumps(faults.calls))


def draw_moments(calls, count, seed):
    """Draw moments, (point, call, when), evenly over the points of an undisturbed run's calls."""
    rng = random.Random(seed)
    names = sorted(calls)
    drawn = []
    for i in range(count):
        name = names[i % len(names)]
        when = rng.choice(("before", "after")) if name != "write" else "before"
        drawn.append((name, rng.randint(1, calls[name]), when))
    return drawn
