"""What a user is told when something goes wrong, and which process says it."""

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

TOLD = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")  # what torchrun tells a process of several
GRACE = 5  # seconds that a rank waits for the launcher to end it after another rank has said why the job ends


class UsageError(Exception):
    """Something the user can mend; one line on standard error, exit status 2."""


class RunError(Exception):
    """The run failed; one line on standard error, exit status 1."""


class Stopped(BaseException):
    """Stopped by a signal, resumable. args: the signal's number and a line; exit status 128 + signal."""


def several_processes() -> bool:
    """Whether torchrun has started this process as one of several ranks."""
    return os.environ.keys() >= set(TOLD) and os.environ["WORLD_SIZE"] != "1"


def first_process() -> bool:
    """Whether this process speaks: the first rank under torchrun, or the only process."""
    return not several_processes() or os.environ["RANK"] == "0"


def first_line(error: BaseException) -> str:
    """What an exception says, its first line; its type where it says nothing."""
    return (str(error) or type(error).__name__).splitlines()[0]


@contextmanager
def stop_signals(handler: Callable[[int, object], None]) -> Iterator[None]:
    """Inside the context signals that ask for a stop call handler(signum, frame); then they do as before.

    They are Ctrl-C, SIGTERM, SIGHUP (a closed terminal) and SIGUSR1 (Slurm's warning), as far as the system has them.
    One that is ignored stays ignored, as SIGHUP under nohup; but a shell ignores Ctrl-C for all that it starts in the
    background, which nobody has asked for. Outside the main thread Python allows no handlers, and nothing changes.
    """
    before = {}
    if threading.current_thread() is threading.main_thread():
        for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1"):
            signum = getattr(signal, name, None)
            if signum is None:  # Windows
                continue
            earlier = signal.getsignal(signum)
            if earlier is None or (earlier == signal.SIG_IGN and name != "SIGINT"):  # None: not set from Python
                continue
            before[signum] = signal.signal(signum, handler)
    try:
        yield
    finally:
        for signum, earlier in before.items():
            signal.signal(signum, earlier)


def stop_word(signum: int) -> str:
    """What a signal has done to a run, in words."""
    words = {signal.SIGINT: "interrupted", signal.SIGTERM: "terminated"}
    return words.get(signum) or f"stopped by {signal.Signals(signum).name}"
