"""Files that are either whole or absent, locks between processes, and arrays on disk."""

import errno
import json
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TextIO

import numpy as np

from utils.system.errors import UsageError

try:
    import fcntl
except ImportError:  # no POSIX: files stay whole, but nothing keeps two processes apart
    fcntl = None


def write_atomically(path: Path, write: Callable[[Path], None]) -> None:
    """Let `write` fill a temporary file beside `path`, flush it to disk and rename it: no reader sees half a file.

    Errors: OSError naming `path` and the cause; what stood there before is intact then.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        write(temporary)
        _flush(temporary, os.O_RDWR)  # Windows flushes nothing that is opened for reading
        os.replace(temporary, path)
        with suppress(OSError):  # not every platform and file system lets a folder be flushed
            _flush(path.parent, os.O_RDONLY)
    except OSError as error:
        raise type(error)(error.errno, error.strerror or str(error), str(path)) from error
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)


def _flush(path: Path, how: int) -> None:
    opened = os.open(path, how)
    try:
        os.fsync(opened)
    finally:
        os.close(opened)


def remove_leftovers(folder: Path) -> None:
    """Remove the temporary files of `write_atomically` that a killed run left; for the folder's only writer."""
    for file in folder.glob(".*.part"):
        file.unlink(missing_ok=True)


@contextmanager
def locked(file: Path, wait: bool) -> Iterator[None]:
    """Hold an advisory lock, which the process's death releases too. The lock file is there only meanwhile.

    wait: until no other process holds it, saying so. Errors: TimeoutError where one does and wait is False; OSError
    where the file cannot be made.
    """
    said = False
    while True:
        with open(file, "a", encoding="utf-8") as opened:  # closing it releases the lock
            if _lock(opened, file):
                try:
                    yield
                    return
                finally:
                    with suppress(OSError):
                        os.unlink(file)
        if not wait:
            raise TimeoutError(f"{file} is held by another process")
        if not said:
            print(f"waiting for another process ({file})")
        said = True
        time.sleep(0.1)  # asked anew, not waited for: a forked process holds its parent's locks too


def _lock(opened: TextIO, file: Path) -> bool:
    """Lock an open file; False where another process holds it, or removed it between our open and our lock."""
    try:
        if fcntl is not None:
            fcntl.flock(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return os.path.samestat(os.fstat(opened.fileno()), os.stat(file))
    except (BlockingIOError, FileNotFoundError):
        return False
    except OSError as error:
        if error.errno not in (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP):
            raise
        print(f"{file.parent}: this file system knows no locks; let one process at a time write there")
        return True


def require_writable(folder: Path, mend: str) -> Path:
    """Make a folder where it is missing, and return it; UsageError, ending with `mend`, where it cannot be written."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise UsageError(f"{folder} cannot be written ({error.strerror}); {mend}") from error
    return folder


def write_record(file: Path, record: dict) -> None:
    """Write a record as JSON; what the file held before is kept in it, under `earlier`."""
    try:
        before = json.loads(file.read_text(encoding="utf-8"))
        earlier = [*before.pop("earlier", []), before]
    except (OSError, ValueError, AttributeError, TypeError, RecursionError):  # none yet, or none of ours
        earlier = []
    text = json.dumps(record | {"earlier": earlier}, indent=1) + "\n"
    write_atomically(file, lambda part: part.write_text(text, encoding="utf-8"))


def write_arrays(file: Path, settings: dict, **arrays: np.ndarray) -> None:
    """Save arrays and settings, the latter as a JSON string, as one npz file, whole or not at all."""

    def write(temporary: Path) -> None:
        with open(temporary, "wb") as out:
            np.savez_compressed(out, settings=json.dumps(settings), **arrays)

    write_atomically(file, write)


def read_arrays(file: Path) -> tuple[dict, dict[str, np.ndarray]]:
    """Settings and arrays of a file of `write_arrays`, without ever running code from it; UsageError naming it."""
    try:
        with np.load(file, allow_pickle=False) as content:
            arrays = {key: content[key] for key in content.files}
        settings = json.loads(str(arrays.pop("settings")))
        if not isinstance(settings, dict):
            raise ValueError("settings are no dictionary")
    except FileNotFoundError:
        raise UsageError(f"{file} does not exist; write it by feature_distance.py") from None
    except OSError as error:
        raise UsageError(f"{file} cannot be read ({error.strerror or error})") from error
    except Exception as error:  # bytes of a stranger make numpy and zipfile raise nearly anything
        raise UsageError(f"{file} is none of this repository's npz files, or a truncated one; remove it") from error
    return settings, arrays
