"""Files are whole or absent, and one process at a time holds a lock."""

import errno
import json
import subprocess
import sys

import numpy as np
import pytest

from tests.helpers import ROOT
from utils.system.errors import UsageError
from utils.system.files import locked, read_arrays, write_arrays, write_atomically, write_record


def test_a_failed_write_leaves_what_was_there(tmp_path):
    file = tmp_path / "figures.json"
    file.write_text("old")

    def write(temporary):
        temporary.write_text("ne")
        raise OSError(errno.EIO, "Input/output error")

    with pytest.raises(OSError, match="Input/output error"):
        write_atomically(file, write)
    assert [path.name for path in tmp_path.iterdir()] == ["figures.json"]
    assert file.read_text() == "old"


def test_a_lock_is_released_by_death(tmp_path):
    file = tmp_path / ".lock"
    code = (
        "import sys\n"
        "from pathlib import Path\n"
        "from utils.system.files import locked\n"
        "with locked(Path(sys.argv[1]), wait=False):\n"
        "    print('held', flush=True)\n"
        "    sys.stdin.read()\n"
    )
    command = [sys.executable, "-c", code, str(file)]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, cwd=ROOT, stdin=pipe, stdout=pipe, text=True) as other:
        assert other.stdout.readline() == "held\n"
        with pytest.raises(TimeoutError), locked(file, wait=False):
            pass
        other.kill()
    with locked(file, wait=False):
        assert file.exists()
    assert not file.exists()
    with locked(file, wait=False):
        file.unlink()  # with its folder, perhaps


def test_a_record_keeps_those_before_it(tmp_path):
    file = tmp_path / "run.json"
    for seed in (1, 2, 3):
        write_record(file, {"seed": seed})
    record = json.loads(file.read_text())
    assert record == {"seed": 3, "earlier": [{"seed": 1}, {"seed": 2}]}


def test_arrays_and_settings_are_read_as_they_were_written(tmp_path):
    file = tmp_path / "distances.npz"
    write_arrays(file, {"eps": 0.1}, values=np.arange(3))
    settings, arrays = read_arrays(file)
    assert settings == {"eps": 0.1}
    assert np.array_equal(arrays["values"], np.arange(3))
    file.write_bytes(file.read_bytes()[:-10])
    with pytest.raises(UsageError, match="distances"):
        read_arrays(file)
