"""Runs training commands in forked children, with faults to come, after importing torch once.

Started by `Nursery`; by hand: one job, a line of JSON, on standard input, one answer on standard
output. Forking saves the seconds that importing torch takes. The process that forks has computed
nothing yet: the threads of the tests' own process would not be there in a fork.
"""

import io
import json
import os
import random
import signal
import subprocess
import sys
from collections import Counter
from functools import partial
from pathlib import Path

from tests.helpers import ANCRA, RA, digits_split, end_forked, environment, settings

PIECES = 300  # in which a checkpoint is written


class Nursery:
    """Runs jobs in children of one process. A context; `run` answers when the child has ended."""

    def __enter__(self):
        """Start the process."""
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.forks"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment(),
            cwd=Path(__file__).parents[1],
        )
        return self

    def __exit__(self, *error):
        """End the process."""
        self.process.stdin.close()
        self.process.wait(20)

    def run(self, argv, faults=(), out=None, user=None):
        """Run a command -> (exit status, standard error's lines, calls by point).

        The exit status is minus the signal that ended the child. faults: dictionaries, each of
        which waits for those before it. {"at": a key of `points`, "call": n} says where, counted
        from 1, for a later one from the fault before; "when": before or after that call; and one
        of: "signal" its number, "errno" what to raise, "lock" a folder against writing. user: id to
        become.
        """
        job = {"argv": list(map(str, argv)), "faults": list(faults), "out": str(out), "user": user}
        self.process.stdin.write(json.dumps(job) + "\n")
        self.process.stdin.flush()
        answer = json.loads(self.process.stdout.readline())
        errors = Path(f"{out}.err").read_text().splitlines()
        return answer["status"], errors, answer["calls"]


def points():
    """Return where faults can strike: name -> (object, attribute). `write` is a piece of a file."""
    import csv

    import torch

    from utils import attacks
    from utils.training import job, loop, records

    return {
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


class Faults:
    """Counts the calls of every point and strikes at the one that comes next."""

    def __init__(self, faults):
        """Wait for the first fault."""
        self.pending = list(faults)
        self.calls = Counter()
        self.since = Counter()  # the calls since the last fault

    def passing(self, name, when):
        """Count a call of a point, and strike where it is time."""
        if when == "before":
            self.calls[name] += 1
            self.since[name] += 1
        if not self.pending:
            return
        fault = self.pending[0]
        moment = fault["at"], fault["call"], fault.get("when", "before")
        if moment == (name, self.since[name], when):
            self.pending.pop(0)
            self.since.clear()
            self.strike(fault)

    def strike(self, fault):
        """Do what a fault says."""
        if "signal" in fault:
            os.kill(os.getpid(), fault["signal"])
        elif "errno" in fault:
            raise OSError(fault["errno"], os.strerror(fault["errno"]))
        elif "lock" in fault:
            os.chmod(fault["lock"], 0o555)

    def patch(self, holder, attribute, name):
        """Let every call of a point pass here."""
        real = getattr(holder, attribute)

        def patched(*args, **kwargs):
            self.passing(name, "before")
            result = real(*args, **kwargs)
            self.passing(name, "after")
            return result

        setattr(holder, attribute, patched)

    def write_bytes(self, path, content):
        """Write a file piece by piece, instead of `Path.write_bytes`; faults strike in between."""
        size = -(-len(content) // PIECES)
        with open(path, "wb", buffering=0) as file:
            for start in range(0, len(content), size):
                self.passing("write", "before")
                file.write(content[start : start + size])


def child(job):
    """Run the job's command with its faults, in a forked child that ends with it."""
    sys.stdin.close()
    from utils.system.command import guarded
    from utils.system.options import parse_training
    from utils.training import loop, records

    quick = loop.pgd40_heads
    loop.pgd40_heads = lambda *args, **kwargs: quick(*args, **kwargs | {"steps": 2})
    records.save_or_note = lambda draw, file: file.write_text("a picture") and ""
    faults = Faults(job["faults"])
    for name, (holder, attribute) in points().items():
        faults.patch(holder, attribute, name)
    Path.write_bytes = lambda path, content: faults.write_bytes(path, content)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if job["user"] is not None:
        os.setuid(job["user"])
    sys.argv = [ANCRA, *job["argv"]]
    try:
        guarded(lambda: loop.run(parse_training("", RA, job["argv"])))
    finally:
        Path(f"{job['out']}.calls").write_text(json.dumps(faults.calls))


def main():
    """Answer jobs until standard input ends."""
    import sklearn.datasets
    import torch

    from utils.training import loop  # noqa: F401

    digits = sklearn.datasets.load_digits()
    sklearn.datasets.load_digits = lambda: digits  # its file may be out of reach of another user
    # What is imported only when it is needed may be out of reach of another user, too.
    digits_split("train")
    settings()
    saved = io.BytesIO()
    torch.save({}, saved)
    torch.load(io.BytesIO(saved.getvalue()), weights_only=True)
    torch.optim.SGD([torch.zeros(1, requires_grad=True)], 0.1).zero_grad()
    for line in sys.stdin:
        job = json.loads(line)
        calls = Path(f"{job['out']}.calls")
        calls.unlink(missing_ok=True)
        pid = os.fork()
        if pid == 0:
            end_forked(partial(child, job), os.devnull, f"{job['out']}.err")
        status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        counted = json.loads(calls.read_text()) if calls.exists() else {}
        print(json.dumps({"status": status, "calls": counted}), flush=True)


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


if __name__ == "__main__":
    main()
