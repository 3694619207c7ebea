"""What a user is told when something goes wrong, and which signals stop a job."""

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

# Ctrl-C, an order to end, a closed terminal, and the warning of Slurm before it ends a job.
STOP_SIGNALS = ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1")


class UsageError(Exception):
    """A mistake that the user can correct; a line on standard error, exit status 2."""


class RunError(Exception):
    """The run failed; a line on standard error, exit status 1."""


class Stopped(BaseException):
    """Stopped by a signal, resumable; exit status 128 + signal.

    args: the number of the signal, and a line that says how to continue.
    """


def first_line(error: BaseException) -> str:
    """The kind of an exception, and the first line of its message."""
    return f"{type(error).__name__}: {error}".splitlines()[0]


@contextmanager
def stop_signals(handler: Callable[[int, object], None]) -> Iterator[None]:
    """Inside the context, signals that ask for a stop call handler(signum, frame).

    One that is ignored stays ignored, as SIGHUP under nohup, except for Ctrl-C, which shells ignore
    for whatever they start in the background. Outside the main thread nothing changes, since Python
    allows no handlers there.
    """
    before = {}
    if threading.current_thread() is threading.main_thread():
        for name in STOP_SIGNALS:
            signum = getattr(signal, name, None)  # Windows has some of them alone
            if signum and (name == "SIGINT" or signal.getsignal(signum) != signal.SIG_IGN):
                before[signum] = signal.signal(signum, handler)
    try:
        yield
    finally:
        for signum, earlier in before.items():
            signal.signal(signum, earlier)
