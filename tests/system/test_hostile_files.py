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
import shutil
import signal
import struct
import sys
import tarfile
import traceback
import warnings
import zipfile
import zlib
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
    TINY_IMAGENET_COUNTS,
    RunsCode,
    announce_cifar,
    announce_tiny_imagenet,
    checkpoint,
    digits_split,
    execute,
    folder,
    folder_flags,
    image_folder,
    pixels,
    png,
    tree,
    write_cifar,
    write_tiny_imagenet,
)
from utils.data import datasets as data
from utils.data.datasets import load_split
from utils.system.checkpoints import Unread, load_model, read
from utils.system.errors import RunError, UsageError
from utils.system.files import locked, write_record
from utils.system.options import parse_training
from utils.system.provenance import provenance
from utils.system.settings import stored
from utils.training import loop as training
from utils.training.runs import run_folder, run_to_resume

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


# data sets


@some_mutations
def test_mutated_cifar_files_are_never_read(monkeypatch, no_network, tmp_path, numbers):
    written, contents = write_cifar(monkeypatch, tmp_path, train_files=1)
    file = tmp_path / "cifar-10-batches-py" / next(iter(contents))
    whole = file.read_bytes()

    def load():
        return load_split("cifar10", "train", str(tmp_path), 32)

    assert load().labels.tolist() == written["train"][1]
    refused = in_child(lambda: try_all(numbers, lambda rng: file.write_bytes(mutated(whole, rng)), load))
    assert refused > 0.9 * len(numbers)


@pytest.mark.parametrize(
    "change, said",
    [
        ({"labels": [0, 1, 10]}, "image 2 has label 10, of 10 classes"),
        ({"labels": [0, -1, 2]}, "image 1 has label -1"),
        ({"labels": [0, 1]}, "one for each of 3"),
        ({"labels": [0.5, 1, 2]}, "labels are torch.float32"),
        ({"labels": None}, "no intact copy"),
        ({"data": np.full((3, 3072), np.nan)}, "images are torch.float64"),
        ({"data": np.zeros((0, 3072), np.uint8), "labels": []}, "one for each of 0"),
        ({"data": np.zeros((3, 100), np.uint8)}, "no intact copy"),
    ],
)
def test_numbers_that_are_no_images_or_labels_are_named(monkeypatch, no_network, tmp_path, change, said):
    """Even in files whose MD5 is the expected one."""
    _, contents = write_cifar(monkeypatch, tmp_path, train_files=1)
    name = next(iter(contents))
    announce_cifar(monkeypatch, tmp_path, contents | {name: contents[name] | change})
    with pytest.raises(UsageError, match=said) as caught:
        load_split("cifar10", "train", str(tmp_path), 32)
    assert "cifar10" in str(caught.value)


def tiny(root, part="train"):
    return load_split("tiny-imagenet", part, str(root), 64)


@some_mutations
def test_mutated_zips_whose_checksum_fits_are_unpacked_or_refused(monkeypatch, no_network, tmp_path, numbers):
    archive, _ = write_tiny_imagenet(monkeypatch, tmp_path / "data")
    whole = archive.read_bytes()

    def write(rng):
        shutil.rmtree(tmp_path / "data" / "tiny-imagenet-200", ignore_errors=True)
        archive.write_bytes(mutated(whole, rng))
        announce_tiny_imagenet(monkeypatch, archive)

    assert in_child(lambda: try_all(numbers, write, lambda: tiny(tmp_path / "data"))) > len(numbers) // 2
    found = {path for path in tree(tmp_path) if "tiny-imagenet-200/" not in path}
    assert found <= {"data", "data/tiny-imagenet-200.zip", "data/tiny-imagenet-200"}


def test_a_zip_never_leaves_its_folder(monkeypatch, no_network, tmp_path):
    """Not even one of the expected checksum, whatever its entries are called."""
    link = zipfile.ZipInfo("tiny-imagenet-200/train")
    link.external_attr = 0o120777 << 16
    names = ("../outside.txt", "tiny-imagenet-200/../../outside.txt", str(tmp_path / "outside.txt"), link)
    for i, name in enumerate(names):
        root = tmp_path / f"{i}" / "data"
        write_tiny_imagenet(monkeypatch, root, [(name, str(tmp_path).encode())])
        with contextlib.suppress(UsageError):
            tiny(root)
        paths = tree(tmp_path / f"{i}")
        assert all(path == "data" or path.startswith("data/tiny-imagenet-200") for path in paths), name
        assert not any(path.is_symlink() for path in root.rglob("*")), name
        assert not (tmp_path / "outside.txt").exists(), name


def test_a_tar_of_another_checksum_is_not_unpacked(no_network, tmp_path):
    with tarfile.open(tmp_path / "cifar-10-python.tar.gz", "w:gz") as out:
        for name in ("../outside", "/tmp/outside", "cifar-10-batches-py/data_batch_1"):
            out.addfile(tarfile.TarInfo(name), io.BytesIO(b""))
    with pytest.raises(UsageError, match="no intact copy"):
        load_split("cifar10", "train", str(tmp_path), 32)
    assert tree(tmp_path) == ["cifar-10-python.tar.gz"]


def test_annotations_do_not_lead_out_of_their_folder(monkeypatch, no_network, tmp_path):
    write_tiny_imagenet(monkeypatch, tmp_path)
    tiny(tmp_path)
    notes = tmp_path / "tiny-imagenet-200" / "val" / "val_annotations.txt"
    for name in ("../../../secret.JPEG", "/etc/passwd", "a\0b"):
        notes.write_text(f"{name}\tn01\t0\t0\t63\t63\n")
        with pytest.raises(UsageError):
            tiny(tmp_path, "test")


def forked(job):
    """Run `job` in a child, in silence -> its process id; its status is 1 where `job` fails."""
    pid = os.fork()
    if pid == 0:
        status = 1
        signal.alarm(120)  # a hang is a failure
        with contextlib.suppress(BaseException), contextlib.redirect_stdout(io.StringIO()):
            job()
            status = 0
        os._exit(status)
    return pid


def status_of(pid):
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


@pytest.mark.parametrize("at", ["before", "download", "unpack"])
def test_data_cut_off_by_death_are_got_anew(monkeypatch, no_network, tmp_path, at):
    """A process killed while it downloads or unpacks leaves nothing that the next one trips over."""
    source, _ = write_tiny_imagenet(monkeypatch, tmp_path / "server")
    root = tmp_path / "data"
    root.mkdir()
    whole, dies_at = source.read_bytes(), [at]

    def download(url, folder, name, md5):
        with open(Path(folder) / name, "wb") as out:
            out.write(whole[:500])
            if "download" in dies_at:
                os.kill(os.getpid(), signal.SIGKILL)
            out.write(whole[500:])

    def unpack(archive, folder, original=zipfile.ZipFile.extractall):
        if "unpack" in dies_at:
            (Path(folder) / "half").mkdir(parents=True)
            os.kill(os.getpid(), signal.SIGKILL)
        original(archive, folder)

    monkeypatch.setattr("torchvision.datasets.utils.download_url", download)
    monkeypatch.setattr(zipfile.ZipFile, "extractall", unpack)
    if at == "before":
        (root / ".tiny-imagenet.lock").touch()
    else:
        assert status_of(forked(lambda: tiny(root))) == -signal.SIGKILL
        assert (root / ".tiny-imagenet-200.part").exists() == (at == "unpack")
    dies_at.clear()
    assert len(tiny(root).labels) == TINY_IMAGENET_COUNTS["train"]
    assert [f.name for f in sorted(root.iterdir())] == ["tiny-imagenet-200", "tiny-imagenet-200.zip"]


def test_two_processes_at_once_unpack_and_decode_once(monkeypatch, no_network, tmp_path):
    """One waits for the other, and both end with the whole data set."""
    _, expected = write_tiny_imagenet(monkeypatch, tmp_path / "data")

    def counting(kind, original):
        def call(*args):
            (tmp_path / f"{kind}-by-{os.getpid()}").touch()
            return original(*args)

        return call

    def use():
        assert tiny(tmp_path / "data").labels.tolist() == expected["train"][1]

    monkeypatch.setattr(zipfile.ZipFile, "extractall", counting("unpacked", zipfile.ZipFile.extractall))
    monkeypatch.setattr(data, "_decode", counting("decoded", data._decode))
    with locked(tmp_path / "data" / ".tiny-imagenet.lock", wait=False):  # held until both stand before it
        children = [forked(use) for _ in range(2)]
    assert [status_of(child) for child in children] == [0, 0]
    assert [len(list(tmp_path.glob(f"{kind}-by-*"))) for kind in ("unpacked", "decoded")] == [1, 1]
    assert not [f for f in tmp_path.rglob("*") if f.name.startswith(".")]


# images and their caches


@pytest.mark.filterwarnings("ignore::UserWarning:PIL", "ignore::PIL.Image.DecompressionBombWarning")
@some_mutations
@pytest.mark.parametrize("ending", ["png", "jpg", "bmp", "webp", "ppm", "tif", "gif"])
def test_mutated_images_are_read_or_named(tmp_path, ending, numbers):
    """Anywhere, or some bytes of the beginning, where formats keep their sizes."""
    file = tmp_path / f"picture.{ending}"
    png(file, pixels(0, 24, 24, 3))
    whole = file.read_bytes()

    def write(rng):
        damaged = bytearray(whole)
        for place in rng.integers(0, min(len(whole), 120), 3):
            damaged[place] = rng.integers(0, 256)
        file.write_bytes(damaged if rng.integers(2) else mutated(whole, rng))

    def use():
        try:
            assert data._decode(file, 16).shape == (3, 16, 16)
        except UsageError as error:
            assert str(file) in str(error)
            raise

    assert in_child(lambda: try_all(numbers, write, use))


def png_of(width, height):
    """A PNG of this size that holds nearly nothing: a bomb."""

    def chunk(kind, content):
        checksum = zlib.crc32(kind + content)
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", checksum)

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    end = chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + end


@pytest.mark.parametrize("side", [8193, 9500, 12000, 2**31 - 1])
def test_an_image_bomb_is_refused_before_it_is_decoded(refused, tmp_path, side):
    """Pillow itself only warns, or says nothing, between 67 and 179 million pixels."""
    root = image_folder(tmp_path / "pictures")
    file = root / "train" / "cat" / "bomb.png"
    file.write_bytes(png_of(side, side))
    refused(ANCRA, *folder_flags(root), "--model-dir", tmp_path / "run", mentions=(file, "pixel"))


def test_an_image_of_another_format_than_those_listed_is_refused(tmp_path):
    """Pillow goes by content: for an EPS file under a PNG's name it would start Ghostscript."""
    file = tmp_path / "picture.png"
    for content in (
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 16 16\n%%EndComments\nshowpage\n",
        b"PF\n2 2\n-1.0\n" + struct.pack("<12f", *[float("nan")] * 12),
        b"Pf\n2 2\n-1.0\n" + struct.pack("<4f", *[float("nan")] * 4),
    ):
        file.write_bytes(content)
        with pytest.raises(UsageError, match="not a readable image"):
            data._decode(file, 16)


def test_a_pipe_with_an_images_name_is_refused_and_not_waited_for(refused, tmp_path):
    root = image_folder(tmp_path / "pictures")
    pipe = root / "train" / "cat" / "pipe.png"
    os.mkfifo(pipe)
    refused(ANCRA, *folder_flags(root), "--model-dir", tmp_path / "run", mentions=(pipe, "not a file"))


@some_mutations
def test_mutated_caches_are_read_or_made_anew(tmp_path, numbers):
    root = image_folder(tmp_path / "pictures")
    expected = load_split("folder", "train", str(root), 16).images
    cache = root / "decoded-train-16.pt"
    whole = cache.read_bytes()

    def use():
        assert torch.equal(load_split("folder", "train", str(root), 16).images, expected)

    in_child(lambda: try_all(numbers, lambda rng: cache.write_bytes(mutated(whole, rng)), use))
    key = torch.load(io.BytesIO(whole), weights_only=True)["key"]
    for images in (expected.float(), expected.long(), expected[:, :1].expand(-1, 3, -1, -1)[..., :8], None, [1]):
        torch.save({"key": key, "images": images}, cache)
        use()


# a run's record


@some_mutations
def test_mutated_records_of_a_run_never_stop_it(tmp_path, numbers):
    """run.json is copied into the next one, and says which run a bare --resume means; the others are never read."""
    file, command = tmp_path / "run-1" / "run.json", parse_training("", RA, ["--model-dir", str(tmp_path / "run")])
    file.parent.mkdir()
    (file.parent / "last_state.pt").touch()
    known = stored(command.settings)
    whole = json.dumps({"command": "python", "earlier": [{"seed": 1}], "settings": known}).encode()

    def use():
        with contextlib.suppress(UsageError):  # a run of other settings
            assert run_to_resume(command) in (file.parent, run_folder(command))
        write_record(file, {"seed": 2})
        assert isinstance(json.loads(file.read_text())["earlier"], list)

    in_child(lambda: try_all(numbers, lambda rng: file.write_bytes(mutated(whole, rng)), use))
    for content in (b'{"earlier": 3}', b"[" * 10**5, b"null", b"\xff\xfe", b'{"a": 1e999}', b"9" * 5000, b'"\\ud800"'):
        file.write_bytes(content)
        use()
