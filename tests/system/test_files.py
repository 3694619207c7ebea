"""Files that are whole or absent, and locks between processes."""

import errno
import subprocess
import sys

import pytest

from tests.helpers import environment
from utils.system.files import locked, write_atomically


def test_a_failed_write_leaves_what_was_there(tmp_path):
    file = tmp_path / "figures.json"
    file.write_text("old")

    def write(temporary):
        temporary.write_text("ne")
        raise OSError(errno.EIO, "Input/output error")

    with pytest.raises(OSError, match="figures.json"):
        write_atomically(file, write)
    assert file.read_text() == "old"
    assert list(tmp_path.iterdir()) == [file]


def test_a_lock_is_released_by_death(tmp_path):
    file = tmp_path / ".lock"
    script = f"""
import sys
from pathlib import Path
from utils.system.files import locked
with locked(Path({str(file)!r}), wait=False):
    print("held", flush=True)
    sys.stdin.read()
"""
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "env": environment()}
    with subprocess.Popen([sys.executable, "-c", script], **pipes, text=True) as other:
        assert other.stdout.readline() == "held\n"
        with pytest.raises(TimeoutError), locked(file, wait=False):
            pass
        other.kill()
    with locked(file, wait=False):
        assert file.exists()
