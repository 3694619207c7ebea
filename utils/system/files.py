"""Files that are either whole or absent, locks between processes, and arrays on disk."""

import json
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np
from filelock import FileLock

from utils.system.errors import UsageError


def write_atomically(path: Path, write: Callable[[Path], None]) -> None:
    """Write a file so that no reader and no crash ever leaves half of it.

    `write` fills a temporary file beside `path`, which is flushed to disk and then renamed.
    Errors: OSError; what stood there before is intact then.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        write(temporary)
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def remove_leftovers(folder: Path) -> None:
    """Remove the temporary files that a killed process has left; only for the folder's writer."""
    for file in folder.glob(".*.part"):
        file.unlink(missing_ok=True)


@contextmanager
def locked(file: Path, wait: bool) -> Iterator[None]:
    """Hold a lock between processes, which the death of a process releases, too.

    wait: whether to wait while another process holds it. The lock file is there only meanwhile.
    Errors: TimeoutError where another process holds it and wait is False; OSError where the file
    cannot be made.
    """
    with FileLock(file, timeout=-1 if wait else 0):
        try:
            yield
        finally:
            with suppress(OSError):  # the folder may be gone or read-only by now
                file.unlink()


def require_writable(folder: Path, hint: str) -> Path:
    """Make a folder where it is missing, and return it.

    Errors: UsageError, which ends with `hint`, where it cannot be made or written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise UsageError(f"{folder} cannot be written ({error.strerror}); {hint}") from error
    return folder


def write_record(file: Path, record: dict) -> None:
    """Write a record as JSON, and keep what the file held before under `earlier`."""
    earlier = []
    with suppress(FileNotFoundError, ValueError):
        before = json.loads(file.read_text(encoding="utf-8"))
        earlier = [*before.pop("earlier", []), before]
    text = json.dumps(record | {"earlier": earlier}, indent=1) + "\n"
    write_atomically(file, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def write_arrays(file: Path, settings: dict, **arrays: np.ndarray) -> None:
    """Write arrays, and settings as a JSON string, to one npz file; make its folder if need be."""

    def write(temporary: Path) -> None:
        with open(temporary, "wb") as out:
            np.savez_compressed(out, settings=json.dumps(settings), **arrays)

    file.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(file, write)


def read_arrays(file: Path) -> tuple[dict, dict[str, np.ndarray]]:
    """Read settings and arrays from a file of `write_arrays`, without running code from it.

    Errors: UsageError where the file is missing, damaged or another program's.
    """
    try:
        with np.load(file, allow_pickle=False) as content:
            arrays = {key: content[key] for key in content.files}
        settings = json.loads(str(arrays.pop("settings")))
    except Exception as error:  # damaged archives make numpy raise nearly anything
        raise UsageError(
            f"{file} is missing, damaged, or not an npz file of feature_distance.py"
        ) from error
    return settings, arrays
