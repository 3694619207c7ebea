"""What a user is told when something goes wrong, and which process says it."""

import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager

TOLD = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")  # what torchrun tells a process of several
GRACE = 5  # seconds that a rank waits for the launcher to end it after another rank has said why the job ends


class UsageError(Exception):
    """Something the user can mend; one line on standard error, exit status 2."""


class RunError(Exception):
    """The run failed; one line on standard error, exit status 1."""


class Stopped(BaseException):
    """Interrupted or terminated, resumable. args: the signal's number and a line; exit status 128 + signal."""


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
    """Ctrl-C and SIGTERM call handler(signum, frame) inside the context; whatever they did before, they do after it."""
    before = {signum: signal.signal(signum, handler) for signum in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for signum, earlier in before.items():
            signal.signal(signum, earlier)
