"""A process that imports torch once and runs training commands, with faults, in forked children.

`Nursery` starts it: a job is a line of JSON on standard input, and its answer one on standard
output. Forking saves the seconds that importing torch takes. It is done from here, where nothing
has computed yet, since a fork does not carry over the threads of the tests' own process.
"""

import io
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path

from tests.helpers import ANCRA, RA, digits_split, end_forked, environment


class Nursery:
    """Runs jobs in children of one process. A context; `run` answers when the child has ended."""

    def __enter__(self):
        alone = environment()
        alone.pop("RANK", None)
        command = [sys.executable, "-m", "tests.forks"]
        self.process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=alone,
            cwd=Path(__file__).parents[1],
        )
        return self

    def __exit__(self, *error):
        self.process.stdin.close()
        self.process.wait(20)

    def run(self, argv, faults=(), out=None, user=None):
        """Run a command and return its exit status, its lines of standard error, calls by point.

        The status is minus the signal that ended the command. faults: dictionaries, each waiting
        for those before it. {"at": a key of `points`, "call": n} says where, counted from 1 on, or
        from the fault before; "when": before or after that call; and one of: "signal" its number,
        "errno" what to raise, "remove" or "lock" (against writing) a folder, "largest" file size.
        user: id to become.
        """
        job = {"argv": list(map(str, argv)), "faults": list(faults), "out": str(out), "user": user}
        self.process.stdin.write(json.dumps(job) + "\n")
        self.process.stdin.flush()
        answer = json.loads(self.process.stdout.readline())
        errors = Path(f"{out}.err").read_text().splitlines()
        return answer["status"], errors, answer["calls"]


def points():
    """Return where faults can strike, (object, attribute) by name; another is "write"."""
    import csv

    import torch

    from utils import attacks
    from utils.training import job, records
    from utils.training import loop as training

    return {
        "attack": (training, "attack_batch"),
        "loss": (job, "training_loss"),
        "update": (torch.optim.SGD, "step"),
        "evaluation": (training, "verdicts"),
        "evaluation attack": (attacks, "linf_pgd"),
        "table": (csv.DictWriter, "writerows"),
        "curves": (records, "save_or_note"),
        "save": (torch, "save"),
        "flush": (os, "fsync"),
        "rename": (os, "replace"),
    }


class Faults:
    """Counts the calls of every point and strikes at the one that comes next."""

    def __init__(self, faults):
        self.pending, self.calls, self.since = list(faults), {}, {}

    def passing(self, name, when):
        if when == "before":
            self.calls[name] = self.calls.get(name, 0) + 1
            self.since[name] = self.since.get(name, 0) + 1
        if not self.pending:
            return
        fault = self.pending[0]
        if (fault["at"], fault["call"], fault.get("when", "before")) == (
            name,
            self.since.get(name),
            when,
        ):
            self.pending.pop(0)
            self.since = {}
            self.strike(fault)

    def strike(self, fault):
        if "signal" in fault:
            os.kill(os.getpid(), fault["signal"])
        elif "errno" in fault:
            raise OSError(fault["errno"], os.strerror(fault["errno"]))
        elif "remove" in fault:
            shutil.rmtree(fault["remove"])
        elif "lock" in fault:
            os.chmod(fault["lock"], 0o555)
        elif "largest" in fault:
            resource.setrlimit(resource.RLIMIT_FSIZE, (fault["largest"], resource.RLIM_INFINITY))

    def patch(self, holder, attribute, name):
        real = getattr(holder, attribute)

        def patched(*args, **kwargs):
            self.passing(name, "before")
            result = real(*args, **kwargs)
            self.passing(name, "after")
            return result

        setattr(holder, attribute, patched)

    def open(self, path, mode="r", **kwargs):
        """Open a file for `checkpoints`: a fault at a "write" leaves half of its bytes on disk."""
        file = open(path, mode, **kwargs)  # noqa: SIM115
        return Writer(file, self) if "w" in mode else file


class Writer:
    """A file that writes in halves and tells the faults between them."""

    def __init__(self, file, faults):
        self.file, self.faults = file, faults

    def write(self, content):
        half = len(content) // 2
        self.file.write(memoryview(content)[:half])
        self.file.flush()
        self.faults.passing("write", "before")
        return half + self.file.write(memoryview(content)[half:])

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.file.close()

    def __getattr__(self, name):
        return getattr(self.file, name)


def child(job):
    """Run the job's command with its faults, in a forked child that ends with it."""
    sys.stdin.close()
    from utils.system import checkpoints
    from utils.system.command import guarded
    from utils.system.options import parse_training
    from utils.training import loop as training
    from utils.training import records

    quick = training.pgd40_heads
    training.pgd40_heads = lambda *args, **kwargs: quick(*args, **kwargs | {"steps": 2})
    records.save_or_note = lambda draw, file: file.write_bytes(b"\x89PNG" + bytes(2000)) and ""
    faults = Faults(job["faults"])
    for name, (holder, attribute) in points().items():
        faults.patch(holder, attribute, name)
    checkpoints.open = faults.open
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if job["user"] is not None:
        os.setuid(job["user"])
    sys.argv = [ANCRA, *job["argv"]]
    try:
        guarded(lambda: training.run(parse_training("", RA, job["argv"])))
    finally:
        if job["user"] is None:
            resource.setrlimit(
                resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY)
            )
        Path(f"{job['out']}.calls").write_text(json.dumps(faults.calls))


def main():
    import sklearn.datasets
    import torch

    from utils.system.options import parse_training
    from utils.training import loop  # noqa: F401

    digits = sklearn.datasets.load_digits()
    sklearn.datasets.load_digits = lambda: digits  # its file may be out of reach of another user
    digits_split("train")  # what is imported only now is imported once, here
    parse_training("", RA, [])
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
    """Draw moments, (point, call, when), evenly over the points of an undisturbed run."""
    rng, names, drawn = random.Random(seed), sorted(calls), []
    for i in range(count):
        name = names[i % len(names)]
        when = rng.choice(("before", "after")) if name != "write" else "before"
        drawn.append((name, rng.randint(1, calls[name]), when))
    return drawn


if __name__ == "__main__":
    main()
