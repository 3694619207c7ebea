"""The log of a run or an evaluation: lines on the terminal and in a file."""

from collections.abc import Callable
from pathlib import Path

from tqdm import tqdm

from utils.system import distributed


def open_log(file: Path) -> Callable[[str], None]:
    """A function that prints a line above any progress bar and appends it to the log, on the first rank only."""
    if not distributed.first():
        return lambda line: None

    def log(line: str) -> None:
        tqdm.write(line)
        try:
            with open(file, "a", encoding="utf-8") as out:
                out.write(line + "\n")
        except OSError as error:  # a full disk, which Python reports without the file's name
            raise OSError(error.errno, error.strerror, str(file)) from error

    return log
