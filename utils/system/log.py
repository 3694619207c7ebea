"""The log of a run or an evaluation: lines on the terminal and in a file."""

from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from tqdm import tqdm

from utils.system import distributed


def open_log(file: Path) -> Callable[[str], None]:
    """A function that prints a line above any progress bar and appends it to the log, on the first rank only.

    Nothing ends because nobody can read the line any more, as in a terminal that was closed.
    """
    if not distributed.first():
        return lambda line: None

    def log(line: str) -> None:
        with suppress(OSError):
            tqdm.write(line)
        try:
            with open(
                file, "a", encoding="utf-8", errors="backslashreplace"
            ) as out:  # a path may hold any bytes
                out.write(line + "\n")
        except OSError as error:  # a full disk, which Python reports without the file's name
            raise OSError(error.errno, error.strerror, str(file)) from error

    return log
