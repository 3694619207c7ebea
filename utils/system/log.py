"""What a terminal shows: the lines of a log, which a file has, too, and progress bars."""

from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from tqdm import tqdm

from utils.system import distributed


def open_log(file: Path) -> Callable[[str], None]:
    """Return a function that prints a line above any progress bar and appends it to the log.

    Ranks other than the first do neither. A terminal that was closed stops nothing.
    """
    if not distributed.first():
        return lambda line: None

    def log(line):
        with suppress(OSError):
            tqdm.write(line)
        # A line may hold a path of any bytes, which UTF-8 lacks.
        with open(file, "a", encoding="utf-8", errors="backslashreplace") as out:
            out.write(line + "\n")

    return log


def progress_bar(*args: object, **options: object) -> tqdm:
    """Return tqdm's bar, which only the first rank shows, only on a terminal, until it is done."""
    return tqdm(*args, leave=False, disable=distributed.quiet(), **options)
