"""Files of a stranger, or broken ones: each is read, or refused by one line; no other error, hang, memory or file.

Bytes are mutated with fixed seeds: 30 mutations of each kind in the quick part, 120 more in the slow one. A longer
search by hand:

    FUZZ=50 python -m pytest -m "slow or not slow" tests/system/test_hostile_files.py    fifty times as many, from other seeds

Where readers are C++, mutations run in a forked child with bounded memory and time, so that a crash is a failure.
"""

import argparse
import collections
import contextlib
import datetime
import enum
import functools
import io
import json
import os
import pathlib
import resource
import signal
import struct
import sys
import traceback
import warnings
import zipfile
from collections import defaultdict
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from models import build_model
from tests.helpers import (
    ANCRA,
    DIGITS,
    RA,
    RunsCode,
    checkpoint,
    digits_split,
    execute,
    folder,
    tree,
)
from utils.system.checkpoints import Unread, load_model, read
from utils.system.errors import RunError, UsageError
from utils.system.options import parse_training
from utils.system.provenance import provenance
from utils.training import loop as training

TIMES = int(os.environ.get("FUZZ", "1"))
SEED = 0 if TIMES == 1 else 1000 + TIMES
MEMORY = 3 * 2**30  # more than a reader of any file here needs
some_mutations = pytest.mark.parametrize(
    "numbers",
    [pytest.param(range(30), id="30"), pytest.param(range(30, 150 * TIMES), id="more", marks=pytest.mark.slow)],
)
some_examples = pytest.mark.parametrize("count", [30, pytest.param(100 * TIMES, marks=pytest.mark.slow)])


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


def try_all(numbers, write, use):
    """Call `use` after each write(generator) -> how many were refused; all but a result or one line is an error."""
    refused = 0
    for i in numbers:
        write(np.random.default_rng((SEED, i)))
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


def refused_in_child(file):
    return in_child(lambda: try_all(range(1), lambda rng: None, lambda: read(file))) == 1


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
    beside = {"args": argparse.Namespace(lr=0.1), "best": np.float64(3.5), "seen": np.arange(3), "out": Path("/tmp")}
    normalise = {"normalize.mean": torch.full((1, 3, 1, 1), 0.5), "normalize.std": torch.full((1, 3, 1, 1), 0.25)}
    net = {f"module.model.{key}": value for key, value in state.items()} | normalise
    torch.save(beside | {"state_dict": net, "log": defaultdict(list, loss=[1.0])}, parent / "published.pt")
    run = folder(parent) / "last_state.pt"
    found = {"ours": ours, "state": run} | {key: parent / f"{key}.pt" for key in ("bare", "legacy", "published")}
    return {name: file.read_bytes() for name, file in found.items()}


class AboutToTrain(Exception):
    """Where a state has been taken."""


@pytest.fixture
def resume(monkeypatch):
    """Continue a run from its state, up to where it would train."""
    split, record = digits_split("train", 5), provenance("cpu", 1)

    def train_epoch(*args):
        raise AboutToTrain

    monkeypatch.setattr(training, "load_training_data", lambda settings: training.Data(split, split, split))
    monkeypatch.setattr(training, "provenance", lambda *args: record)
    monkeypatch.setattr(training, "train_epoch", train_epoch)

    def run(file):
        with contextlib.redirect_stdout(io.StringIO()), contextlib.suppress(AboutToTrain):
            training.run(parse_training("", RA, ["--resume", str(file), "--epochs", "2", "--device", "cpu", "--other-data"]))

    return run


def repacked(content, change):
    """A zip file with its entries changed by change(name, bytes) and checksums that fit."""
    out = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(content)) as old, zipfile.ZipFile(out, "w") as new:
        for entry in old.infolist():
            new.writestr(entry.filename, change(entry.filename, old.read(entry)))
    return out.getvalue()


@some_mutations
@pytest.mark.parametrize("inside", [False, True])
@pytest.mark.parametrize("kind", ["ours", "bare", "legacy", "published", "state"])
def test_mutated_checkpoints_load_or_are_refused(kinds, resume, no_network, tmp_path, kind, inside, numbers):
    """inside: the pickle in the zip is mutated, and all checksums fit, so that only its content can be refused."""
    whole, file = kinds[kind], tmp_path / "weights.pt"

    def write(rng):
        if inside and kind == "legacy":  # there is no zip: its pickles, at the beginning
            content = mutated(whole[:3000], rng) + whole[3000:]
        elif inside:
            content = repacked(whole, lambda name, b: mutated(b, rng) if name.endswith("data.pkl") else b)
        else:
            content = mutated(whole, rng)
        file.write_bytes(content)

    def use():
        if kind == "state":
            resume(file)
        else:
            load_model(file)[0](torch.rand(1, 3, 16, 16))

    file.write_bytes(whole)
    use()
    assert in_child(lambda: try_all(numbers, write, use)) >= len(numbers) // 8
    assert set(tree(tmp_path)) == {"weights.pt"} | ({"run.json", "train.log"} if kind == "state" else set())


class Settings(dict):
    """A configuration as those of yacs or easydict: a dictionary with attributes."""

    def __init__(self, **entries):
        super().__init__(entries)
        self.__dict__.update(entries)


class Colour(enum.Enum):
    RED = 1


def beside_weights():
    """Objects that people save beside their weights."""
    net = torch.nn.Linear(2, 2)
    optimizer = torch.optim.SGD(net.parameters(), 0.1)
    return {
        "args": argparse.Namespace(lr=0.1, out=Path("/tmp"), seen={"a": np.int64(3)}),
        "elsewhere": NotOfThisSystem(),
        "config": Settings(lr=0.1, names=["a"], nested=Settings(depth=2)),
        "attributes": SimpleNamespace(lr=0.1),
        "colour": Colour.RED,
        "schedule": torch.optim.lr_scheduler.StepLR(optimizer, 1),
        "optimizer": optimizer,
        "criterion": functools.partial(torch.nn.functional.cross_entropy, reduction="sum"),
        "losses": collections.deque([1.0, 2.0], 5),
        "log": defaultdict(list, loss=[1.0]),
        "best": np.float64(3.5),
        "confusion": np.eye(3),
        "when": datetime.datetime(2026, 1, 1),
        "code": eval,
        "function": beside_weights,
    }


class NotOfThisSystem:
    """Pickles to a path of another system."""

    def __reduce__(self):
        return pathlib.WindowsPath if os.name == "posix" else pathlib.PosixPath, ("C:", "runs")


@pytest.mark.parametrize("legacy", [False, True])
def test_objects_beside_the_weights_are_never_built(monkeypatch, tmp_path, legacy):
    """Whatever they are, the weights are read; what would run code of the system is refused all the same."""
    net = build_model("ResNet18", 10, width=1, image_size=16).eval()
    file = tmp_path / "weights.pt"
    marker = tmp_path / "executed"
    x = torch.rand(2, 3, 16, 16)
    how = {"_use_new_zipfile_serialization": not legacy}
    torch.save({**beside_weights(), "net": net.state_dict()}, file, **how)
    content, here, away = file.read_bytes(), __name__.encode(), b"not_installed_here"
    assert here in content
    changed = content.replace(here, away) if legacy else repacked(content, lambda _, part: part.replace(here, away))
    file.write_bytes(changed)
    (tmp_path / "not_installed_here.py").write_text("raise SystemExit('was imported')\n")
    monkeypatch.syspath_prepend(tmp_path)
    content = read(file)
    assert torch.equal(load_model(file, image_size=16)[0](x), net(x))
    assert content["log"] == {"loss": [1.0]}
    assert content["config"] == {"lr": 0.1, "names": ["a"], "nested": {"depth": 2}}
    assert content["losses"] == [1.0, 2.0]
    for key in ("args", "elsewhere", "colour", "optimizer", "criterion", "best", "confusion", "when"):
        assert isinstance(content[key], Unread), key
    torch.save({"args": argparse.Namespace(out=RunsCode(marker))}, file, **how)
    with pytest.raises(UsageError, match="run code"):
        read(file)
    assert not marker.exists()


def test_a_module_that_was_saved_whole_gives_its_weights(tmp_path):
    net = build_model("ResNet18", 10, width=1, image_size=16).eval()
    file = tmp_path / "weights.pt"
    x = torch.rand(2, 3, 16, 16)
    for content in (net, torch.nn.DataParallel(net), {"model": net, "epoch": 3}):
        torch.save(content, file)
        assert torch.equal(load_model(file, image_size=16)[0](x), net(x))
    torch.save(net, file, _use_new_zipfile_serialization=False)
    with pytest.raises(UsageError, match="state_dict"):
        load_model(file)


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


def test_a_bomb_of_a_checkpoint_is_refused(kinds, tmp_path):
    """A compressed entry of gigabytes of zeros, and one that only claims to be so large."""
    file = tmp_path / "weights.pt"
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive, archive.open("archive/data/0", "w") as entry:
        for _ in range(64):
            entry.write(bytes(2**20))
    assert file.stat().st_size < 2**18
    with pytest.raises(UsageError, match="compressed"):
        read(file)
    content = kinds["bare"]
    for claimed in (2**31, 2**32 - 2):  # in the directory at the zip's end
        file.write_bytes(content)
        with zipfile.ZipFile(file) as archive:
            place = content.index(b"PK\1\2", archive.start_dir) + 24
        file.write_bytes(content[:place] + struct.pack("<I", claimed) + content[place + 4 :])
        assert refused_in_child(file)


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("numbers", [2**40, 2**34, 10**5])
def test_a_tensor_that_claims_more_than_the_file_holds_is_refused(tmp_path, legacy, numbers):
    file = tmp_path / "weights.pt"
    torch.save({"w": torch.zeros(1000)}, file, _use_new_zipfile_serialization=not legacy)
    told, claim = b"M\xe8\x03", b"\x8a\x06" + numbers.to_bytes(6, "little")
    whole = file.read_bytes()
    changed = whole.replace(told, claim) if legacy else repacked(whole, lambda name, b: b.replace(told, claim))
    file.write_bytes(changed)
    assert refused_in_child(file)


IMPOSSIBLE = {
    "width": (100_000, -4, 10**30, "4", 4.0, True),
    "image_size": (10**9, 0, 10**5000, 24.0),
    "num_classes": (10**12, 2**31 - 1, 0, None),
    "arch": ("ResNet50\n", ["ResNet18"], "x" * 10**6, "WRN-34-10"),
    "dataset": (["digits"], {}),
    "recipe": ([1],),
    "classes": ("0123456789", [1] * 10),
    "reverse_attention": ("no",),
    "epoch": ("last",),
    "model": ([1], {1: 2}),
}


@pytest.mark.parametrize("key", IMPOSSIBLE)
def test_a_description_that_cannot_be_is_refused_before_anything_is_built(tmp_path, key):
    file = checkpoint(tmp_path / "weights.pt")
    content = torch.load(file, weights_only=True)

    def said():
        lines = []
        for value in IMPOSSIBLE[key]:
            torch.save(content | {key: value}, file)
            with pytest.raises(UsageError) as caught:
                load_model(file)
            lines.append(str(caught.value))
        return lines

    for line in in_child(said):
        assert str(file) in line and line.isprintable() and len(line) < 700


plain = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.binary(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=5,
)
tensors = st.builds(
    lambda shape, dtype, kind: {
        "zeros": torch.zeros(shape, dtype=dtype),
        "meta": torch.empty(shape, dtype=dtype, device="meta"),
        "one number": torch.zeros((), dtype=dtype).expand(shape),
        "sparse": torch.zeros(shape).to_sparse(),
        "parameter": torch.nn.Parameter(torch.zeros(shape)),
    }[kind],
    st.lists(st.sampled_from([0, 1, 4, 10, 32, 3]), max_size=4),
    st.sampled_from([torch.float32, torch.float16, torch.int64, torch.uint8, torch.bool, torch.complex64]),
    st.sampled_from(["zeros", "meta", "one number", "sparse", "parameter"]),
)


def hypothetically(count, check, **strategies):
    """Call `check` with so many examples, always the same ones unless FUZZ is set."""
    how = {"deadline": None, "derandomize": TIMES == 1, "database": None, "suppress_health_check": list(HealthCheck)}
    settings(max_examples=count, **how)(given(**strategies)(check))()


@some_examples
def test_any_value_in_any_place_is_read_or_refused(kinds, tmp_path, count):
    file = tmp_path / "any.pt"

    def check(key, value, tensor, other, bare):
        content = torch.load(io.BytesIO(kinds["bare" if bare else "ours"]), weights_only=True)
        (content if bare else content["model"])[tensor] = other
        content[key] = value
        torch.save(content, file)
        try:
            load_model(file)
        except UsageError as error:
            assert str(error).isprintable() and len(str(error)) < 1000

    check("a", 1, "conv1.weight", torch.zeros(1).expand(10**5, 3, 3, 3), True)
    check("a", 1, "fc.weight", torch.zeros(1).expand(2**30, 2**30), False)
    hypothetically(
        count,
        check,
        key=st.sampled_from(sorted(torch.load(io.BytesIO(kinds["ours"]), weights_only=True))) | st.text(max_size=5),
        value=plain | tensors,
        tensor=st.sampled_from(["fc.weight", "conv1.weight", "bn1.running_var", "bn1.num_batches_tracked", "new"]),
        other=plain | tensors,
        bare=st.booleans(),
    )


@some_examples
def test_any_value_in_a_state_is_taken_or_refused(kinds, resume, no_network, tmp_path, count):
    """In itself, its progress, settings or optimiser, each of their entries in turn."""
    file = tmp_path / "last_state.pt"

    def check(where, number, value):
        state = torch.load(io.BytesIO(kinds["state"]), weights_only=True)
        inside = state["optimizer"]["state"][0] if where == "momentum" else state[where] if where else state
        inside[sorted(inside)[number % len(inside)]] = value
        torch.save(state, file)
        try:
            resume(file)
        except UsageError as error:
            assert str(error).isprintable() and len(str(error)) < 1000

    hypothetically(
        count,
        check,
        where=st.sampled_from(["", "progress", "recipe", "optimizer", "momentum"]),
        number=st.integers(0, 50),
        value=plain | tensors,
    )


def test_weights_of_other_precisions_load(tmp_path):
    for kind in (torch.float64, torch.float16, torch.bfloat16):
        state = build_model("ResNet18", 10, width=4, image_size=16).to(kind).state_dict()
        model, _ = load_model(checkpoint(tmp_path / "weights.pt", model=state))
        assert model.conv1.weight.dtype == torch.float32
