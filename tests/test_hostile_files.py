"""Files of a stranger, or broken ones: each is read, or refused by one line; no other error, hang, memory or file.

Bytes are mutated with fixed seeds: MUTATIONS of each kind here. A longer search by hand:

    FUZZ=50 python -m pytest tests/test_hostile_files.py        fifty times as many, from other seeds

Where readers are C++, mutations run in a forked child with bounded memory and time, so that a crash is a failure.
"""

import contextlib
import errno
import hashlib
import io
import json
import os
import pickle
import resource
import shutil
import signal
import struct
import sys
import tarfile
import traceback
import warnings
import zipfile
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from PIL import Image

from models import build_model
from tests.helpers import ANCRA, ATTACK, DIGITS, EVALUATE, RunsCode, checkpoint, execute, image_folder
from utils import data, training
from utils.checkpoints import load_model, locked, read
from utils.data import load_split
from utils.options import RunError, UsageError, parse_training

TIMES = int(os.environ.get("FUZZ", "1"))
SEED = 0 if TIMES == 1 else 1000 + TIMES
MEMORY = 3 * 2**30  # more than a reader of any file here needs


def mutated(content, rng):
    """Bytes flipped, set, cut, doubled, moved or replaced by numbers that readers trip over."""
    out = bytearray(content)
    for _ in range(int(rng.integers(1, 4))):
        if not out:
            break
        at, length = int(rng.integers(len(out))), int(rng.integers(1, 9))
        kind = int(rng.integers(7))
        if kind == 0:
            out[at] ^= 1 << int(rng.integers(8))
        elif kind == 1:
            out[at : at + length] = rng.integers(0, 256, length, dtype=np.uint8).tobytes()
        elif kind == 2:
            del out[at : at + length * int(rng.integers(1, 50))]
        elif kind == 3:
            out[at:at] = out[at : at + 16 * length]
        elif kind == 4:
            out[at : at + 4] = struct.pack("<i", int(rng.choice([0, -1, 2**31 - 1, -(2**31), 10**6])))
        elif kind == 5:
            out[at : at + 8] = struct.pack("<q", int(rng.choice([0, -1, 2**62, 10**12])))
        else:
            del out[at:]
    return bytes(out)


def in_child(job, seconds=120):
    """Run `job` in a forked child with bounded memory -> what it returns, by JSON. A crash or a hang fails the test."""
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        answer = {"error": "no answer"}
        try:
            signal.alarm(seconds)
            torch.set_num_threads(1)
            used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
            resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, used + MEMORY))
            warnings.simplefilter("ignore")
            with contextlib.redirect_stdout(io.StringIO()):
                answer = {"result": job()}
        except BaseException:
            answer = {"error": traceback.format_exc()}
        finally:
            os.write(writing, json.dumps(answer).encode()[-60000:])
            os._exit(0)
    os.close(writing)
    with open(reading, "rb") as pipe:
        said = pipe.read()
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    assert status == 0, f"the child died of {status}"
    answer = json.loads(said)
    assert "error" not in answer, answer["error"]
    return answer["result"]


def try_all(names, write, use):
    """Call `use` after each `write(i)` -> how many were refused. Anything but a result or one line is an error."""
    refused = 0
    for i in range(names * TIMES):
        rng = np.random.default_rng((SEED, i))
        write(rng)
        try:
            use()
        except (UsageError, RunError) as error:
            line = str(error)
            assert line.isprintable() and len(line) < 1500, (i, line)
            refused += 1
        except BaseException:
            print(f"mutation {i}", file=sys.stderr)
            raise
    return refused


def tree(folder):
    """Paths under a folder."""
    return sorted(str(f.relative_to(folder)) for f in folder.rglob("*"))


# checkpoints


@pytest.fixture(scope="module")
def kinds(tmp_path_factory):
    """Bytes of a checkpoint of each kind: as published, in the format before torch 1.6, ours, and a run's state."""
    parent = tmp_path_factory.mktemp("kinds")
    assert execute(ANCRA, *DIGITS, "--model-dir", parent / "run") == 0
    ours = checkpoint(parent / "ours.pt")
    torch.manual_seed(0)
    state = build_model("ResNet18", 10, width=1, image_size=16).state_dict()
    torch.save(state, parent / "bare.pt")
    torch.save(state, parent / "legacy.pt", _use_new_zipfile_serialization=False)
    (run,) = parent.glob("run*")
    files = {"ours": ours, "bare": parent / "bare.pt", "legacy": parent / "legacy.pt", "state": run / "last_state.pt"}
    return {name: file.read_bytes() for name, file in files.items()}


def repacked(content, change):
    """A zip file with its entries changed by change(name, bytes) and checksums that fit."""
    out = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(content)) as old, zipfile.ZipFile(out, "w") as new:
        for entry in old.infolist():
            new.writestr(entry.filename, change(entry.filename, old.read(entry)))
    return out.getvalue()


@pytest.mark.parametrize("inside", [False, True])
@pytest.mark.parametrize("kind", ["ours", "bare", "legacy", "state"])
def test_mutated_checkpoints_load_or_are_refused(kinds, tmp_path, kind, inside):
    """inside: the pickle in the zip is mutated, and all checksums fit, so that only its content can be refused."""
    if inside and kind == "legacy":
        inside = 3000  # there is no zip: its pickles, at the beginning
    whole, file = kinds[kind], tmp_path / "weights.pt"

    def write(rng):
        if inside is True:
            content = repacked(whole, lambda name, b: mutated(b, rng) if name.endswith("data.pkl") else b)
        elif inside:
            content = mutated(whole[:inside], rng) + whole[inside:]
        else:
            content = mutated(whole, rng)
        file.write_bytes(content)

    def use():
        if kind == "state":
            options = parse_training("", {"arch": "ResNet18"}, ["--resume", str(file)])
            state, path = training.prepare_resume(options)
            training.Run(options, torch.device("cpu"), split).restore(state, path)
        else:
            load_model(file)[0](torch.rand(1, 3, 16, 16))

    split = load_split("digits", "train", "", 16).take(torch.arange(5))
    file.write_bytes(whole)
    use()
    refused = in_child(lambda: try_all(100, write, use))
    assert refused >= 20 * TIMES
    assert tree(tmp_path) == ["weights.pt"]


def test_every_flipped_bit_of_the_tensors_is_found(kinds, tmp_path):
    """torch itself does not look at the checksums in its files."""
    rng, file = np.random.default_rng(0), tmp_path / "weights.pt"
    content = kinds["ours"]
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        tensors = [entry for entry in archive.infolist() if "/data/" in entry.filename and entry.file_size > 500]
    for entry in tensors[::5]:
        name = len(entry.filename)
        start = entry.header_offset + 30 + name
        extra = struct.unpack("<H", content[start - name - 2 : start - name])[0]
        place = start + extra + int(rng.integers(entry.file_size))
        file.write_bytes(content[:place] + bytes([content[place] ^ 4]) + content[place + 1 :])
        with pytest.raises(UsageError, match="fails its checksum"):
            read(file)
