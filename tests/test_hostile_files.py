"""Files of a stranger, or broken ones: each is read, or refused by one line; no other error, hang, memory or file.

Bytes are mutated with fixed seeds: MUTATIONS of each kind here. A longer search by hand:

    FUZZ=50 python -m pytest tests/test_hostile_files.py        fifty times as many, from other seeds

Where readers are C++, mutations run in a forked child with bounded memory and time, so that a crash is a failure.
"""

import contextlib
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
from utils import data, runs, training
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
            with contextlib.ExitStack() as held:
                state, path = runs.prepare_resume(options, held)
                training.Run(options, torch.device("cpu"), split).restore(state, path)
        else:
            load_model(file)[0](torch.rand(1, 3, 16, 16))

    split = load_split("digits", "train", "", 16).take(torch.arange(5))
    file.write_bytes(whole)
    use()
    refused = in_child(lambda: try_all(150, write, use))
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
        assert in_child(lambda: try_all(1, lambda rng: None, lambda: read(file))) == TIMES


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("numbers", [2**40, 2**34, 10**5])
def test_a_tensor_that_claims_more_than_the_file_holds_is_refused(tmp_path, legacy, numbers):
    file = tmp_path / "weights.pt"
    torch.save({"w": torch.zeros(1000)}, file, _use_new_zipfile_serialization=not legacy)
    told, claim = b"M\xe8\x03", b"\x8a\x06" + numbers.to_bytes(6, "little")
    if legacy:
        file.write_bytes(file.read_bytes().replace(told, claim))
    else:
        file.write_bytes(repacked(file.read_bytes(), lambda name, b: b.replace(told, claim)))
    assert in_child(lambda: try_all(1, lambda rng: None, lambda: read(file))) == TIMES


DESCRIBED = {"arch", "classes", "num_classes", "reverse_attention", "width", "image_size", "dataset", "recipe", "epoch"}


@pytest.mark.parametrize(
    "key, value",
    [
        ("width", 100_000), ("width", -4), ("width", 10**30), ("width", "4"), ("width", 4.0), ("width", True),
        ("image_size", 10**9), ("image_size", 0), ("image_size", 10**5000), ("image_size", 24.0),
        ("num_classes", 10**12), ("num_classes", 2**31 - 1), ("num_classes", 0), ("num_classes", None),
        ("arch", "ResNet50\n"), ("arch", ["ResNet18"]), ("arch", "x" * 10**6), ("arch", "WRN-34-10"),
        ("dataset", ["digits"]), ("dataset", {}), ("recipe", [1]), ("classes", "0123456789"), ("classes", [1] * 10),
        ("reverse_attention", "no"), ("epoch", "last"), ("model", [1]), ("model", {1: 2}),
    ],
    ids=lambda value: value if isinstance(value, str) and len(value) < 20 else type(value).__name__,
)  # fmt: skip
def test_a_description_that_cannot_be_is_refused_before_anything_is_built(tmp_path, key, value):
    file = checkpoint(tmp_path / "weights.pt")
    torch.save(torch.load(file, weights_only=True) | {key: value}, file)

    def refused():
        with pytest.raises(UsageError) as caught:
            load_model(file)
        return str(caught.value)

    line = in_child(refused)
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


@settings(
    max_examples=100 * TIMES, deadline=None, derandomize=TIMES == 1, database=None,
    suppress_health_check=list(HealthCheck),
)  # fmt: skip
@given(
    key=st.sampled_from(sorted(DESCRIBED)) | st.text(max_size=5),
    value=plain | tensors,
    tensor=st.sampled_from(["fc.weight", "conv1.weight", "bn1.running_var", "bn1.num_batches_tracked", "new"]),
    other=plain | tensors,
    bare=st.booleans(),
)
@example(key="a", value=1, tensor="conv1.weight", other=torch.zeros(1).expand(10**5, 3, 3, 3), bare=True)
@example(key="a", value=1, tensor="fc.weight", other=torch.zeros(1).expand(2**30, 2**30), bare=False)
def test_any_value_in_any_place_is_read_or_refused(kinds, tmp_path_factory, key, value, tensor, other, bare):
    file = tmp_path_factory.getbasetemp() / "any.pt"
    content = torch.load(io.BytesIO(kinds["bare" if bare else "ours"]), weights_only=True)
    (content if bare else content["model"])[tensor] = other
    content[key] = value
    torch.save(content, file)
    try:
        load_model(file)
    except UsageError as error:
        assert str(error).isprintable() and len(str(error)) < 1000


PROGRESS = {"epoch", "order", "done", "sums", "rows"}


@settings(
    max_examples=60 * TIMES, deadline=None, derandomize=TIMES == 1, database=None,
    suppress_health_check=list(HealthCheck),
)  # fmt: skip
@given(
    where=st.sampled_from(["progress", "recipe", "optimizer", "state"]),
    number=st.integers(0, 50),
    value=plain | tensors,
)
def test_any_value_in_a_state_is_taken_or_refused(kinds, tmp_path_factory, where, number, value):
    """In its progress, settings or optimiser, each of their entries in turn."""
    file = tmp_path_factory.getbasetemp() / "last_state.pt"
    state = torch.load(io.BytesIO(kinds["state"]), weights_only=True)
    inside = state["optimizer"]["state"][0] if where == "state" else state[where]
    inside[sorted(inside)[number % len(inside)]] = value
    torch.save(state, file)
    split = load_split("digits", "train", "", 16).take(torch.arange(5))
    with contextlib.redirect_stdout(io.StringIO()):
        try:
            options = parse_training("", {"arch": "ResNet18"}, ["--resume", str(file)])
            with contextlib.ExitStack() as held:
                state, path = runs.prepare_resume(options, held)
                training.Run(options, torch.device("cpu"), split).restore(state, path)
        except UsageError as error:
            assert str(error).isprintable() and len(str(error)) < 1000


@pytest.mark.parametrize(
    "key, change, said",
    [
        ("conv1.weight", lambda t: t.fill_(2e6), "reaches 2e+06"),
        ("bn1.running_var", lambda t: t.fill_(-1), "is a variance of -1"),
        ("bn1.num_batches_tracked", lambda t: t.fill_(-1), "is negative"),
        ("fc.weight", lambda t: t.long(), "is of torch.int64"),
        ("fc.bias", lambda t: t.to(torch.complex64), "is of torch.complex64"),
        ("fc.bias", lambda t: t.to_sparse(), "is no ordinary tensor"),
    ],
)
def test_weights_that_cannot_be_right_are_named(refused, tmp_path, key, change, said):
    state = build_model("ResNet18", 10, width=4, image_size=16).state_dict()
    file = checkpoint(tmp_path / "weights.pt", model=state | {key: change(state[key])})
    refused(ATTACK, "--ckpt_url", file, *EVALUATE, mentions=(file, key, said))


def test_weights_of_other_precisions_load(tmp_path):
    for kind in (torch.float64, torch.float16, torch.bfloat16):
        state = build_model("ResNet18", 10, width=4, image_size=16).to(kind).state_dict()
        model, _ = load_model(checkpoint(tmp_path / "weights.pt", model=state))
        assert model.conv1.weight.dtype == torch.float32


# data sets


def write_cifar(monkeypatch, root):
    """A small CIFAR-10 -> {name: bytes}; `announce` lets torchvision expect the files as they are."""
    from torchvision.datasets import CIFAR10

    rng, folder = np.random.default_rng(0), root / CIFAR10.base_folder
    folder.mkdir(parents=True)
    names = [name for name, _ in CIFAR10.train_list[:1] + CIFAR10.test_list]
    contents = {
        name: {"data": rng.integers(0, 256, (3, 3072), np.uint8), "labels": [0, 1, 9], "filenames": ["a", "b", "c"]}
        for name in names
    } | {"batches.meta": {"label_names": [f"name{i}" for i in range(10)]}}
    written = {name: pickle.dumps(content, protocol=2) for name, content in contents.items()}

    def announce(changed):
        sums = {name: hashlib.md5(content).hexdigest() for name, content in (written | changed).items()}
        monkeypatch.setattr(CIFAR10, "train_list", [[names[0], sums[names[0]]]])
        monkeypatch.setattr(CIFAR10, "test_list", [[names[1], sums[names[1]]]])
        monkeypatch.setattr(CIFAR10, "meta", CIFAR10.meta | {"md5": sums["batches.meta"]})
        for name, content in (written | changed).items():
            (folder / name).write_bytes(content)

    announce({})
    return names[0], contents[names[0]], announce


def test_mutated_cifar_files_are_never_read(monkeypatch, no_network, tmp_path):
    name, content, _ = write_cifar(monkeypatch, tmp_path)
    file = tmp_path / "cifar-10-batches-py" / name
    whole = file.read_bytes()
    load = lambda: load_split("cifar10", "train", str(tmp_path), 32)  # noqa: E731
    assert load().labels.tolist() == content["labels"]
    assert in_child(lambda: try_all(150, lambda rng: file.write_bytes(mutated(whole, rng)), load)) > 140 * TIMES


@pytest.mark.parametrize(
    "change, said",
    [
        ({"labels": [0, 1, 10]}, "image 2 has label 10, of 10 classes"),
        ({"labels": [0, -1, 2]}, "image 1 has label -1"),
        ({"labels": [0, 1]}, "one for each of 3 images"),
        ({"labels": [0.5, 1, 2]}, "labels are torch.float32"),
        ({"labels": None}, "no intact copy"),
        ({"data": np.full((3, 3072), np.nan)}, "images are torch.float64"),
        ({"data": np.zeros((0, 3072), np.uint8), "labels": []}, "for each of 0 images"),
        ({"data": np.zeros((3, 100), np.uint8)}, "no intact copy"),
    ],
)
def test_numbers_that_are_no_images_or_labels_are_named(monkeypatch, no_network, tmp_path, change, said):
    """Even in files whose MD5 is the expected one."""
    name, content, announce = write_cifar(monkeypatch, tmp_path)
    announce({name: pickle.dumps(content | change, protocol=2)})
    with pytest.raises(UsageError, match=said) as caught:
        load_split("cifar10", "train", str(tmp_path), 32)
    assert "cifar10" in str(caught.value)


def write_zip(root, extra=()):
    """The zip of a small Tiny-ImageNet, with further entries (name or ZipInfo, bytes) -> its file."""
    root.mkdir(exist_ok=True)
    picture = io.BytesIO()
    Image.fromarray(np.zeros((64, 64, 3), np.uint8)).save(picture, "JPEG")
    archive = root / "tiny-imagenet-200.zip"
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as out:
        for wnid in ("n01", "n02"):
            for i in range(2):
                out.writestr(f"tiny-imagenet-200/train/{wnid}/images/{i}.JPEG", picture.getvalue())
        out.writestr("tiny-imagenet-200/val/images/a.JPEG", picture.getvalue())
        out.writestr("tiny-imagenet-200/val/val_annotations.txt", "a.JPEG\tn01\t0\t0\t63\t63\n")
        out.writestr("tiny-imagenet-200/wnids.txt", "n01\nn02\n")
        for entry, content in extra:
            out.writestr(entry, content)
    return archive


def announce_zip(monkeypatch, archive):
    monkeypatch.setattr(data, "TINY_IMAGENET", ("http://localhost/x", hashlib.md5(archive.read_bytes()).hexdigest()))
    monkeypatch.setattr(data, "TINY_IMAGES", {"train": 4, "test": 1})


def tiny(root, part="train"):
    return load_split("tiny-imagenet", part, str(root), 64)


def test_mutated_zips_whose_checksum_fits_are_unpacked_or_refused(monkeypatch, no_network, tmp_path):
    archive = write_zip(tmp_path / "data")
    whole = archive.read_bytes()

    def write(rng):
        shutil.rmtree(tmp_path / "data" / "tiny-imagenet-200", ignore_errors=True)
        archive.write_bytes(mutated(whole, rng))
        announce_zip(monkeypatch, archive)

    assert in_child(lambda: try_all(150, write, lambda: tiny(tmp_path / "data"))) > 75 * TIMES
    assert {path for path in tree(tmp_path) if "tiny-imagenet-200/" not in path} <= {
        "data", "data/tiny-imagenet-200.zip", "data/tiny-imagenet-200"
    }  # fmt: skip


def link(name):
    entry = zipfile.ZipInfo(name)
    entry.external_attr = 0o120777 << 16
    return entry


@pytest.mark.parametrize(
    "entry, content, said",
    [
        ("../outside.txt", b"x", "leads elsewhere"),
        ("tiny-imagenet-200/../../outside.txt", b"x", "leads elsewhere"),
        ("/tmp/outside.txt", b"x", "leads elsewhere"),
        (link("tiny-imagenet-200/train"), b"/tmp", "leads elsewhere"),
        ("tiny-imagenet-200/zeros", bytes(2**20), "holds more than"),
    ],
)
def test_a_zip_that_leaves_its_folder_or_is_a_bomb_is_refused(monkeypatch, no_network, tmp_path, entry, content, said):
    announce_zip(monkeypatch, write_zip(tmp_path / "data", [(entry, content)]))
    monkeypatch.setattr(data, "MOST_UNPACKED", 2**19)
    with pytest.raises(UsageError, match=said):
        tiny(tmp_path / "data")
    assert tree(tmp_path) == ["data", "data/tiny-imagenet-200.zip"]


def test_a_tar_of_another_checksum_is_not_unpacked(no_network, tmp_path):
    with tarfile.open(tmp_path / "cifar-10-python.tar.gz", "w:gz") as out:
        for name in ("../outside", "/tmp/outside", "cifar-10-batches-py/data_batch_1"):
            out.addfile(tarfile.TarInfo(name), io.BytesIO(b""))
    with pytest.raises(UsageError, match="no intact copy"):
        load_split("cifar10", "train", str(tmp_path), 32)
    assert tree(tmp_path) == ["cifar-10-python.tar.gz"]


@pytest.mark.parametrize(
    "gone", ["train/n01/images/0.JPEG", "train/n02/images", "val/val_annotations.txt", "wnids.txt"]
)
def test_a_partly_deleted_tiny_imagenet_is_found(monkeypatch, no_network, tmp_path, gone):
    announce_zip(monkeypatch, write_zip(tmp_path))
    part = "test" if gone.startswith("val") else "train"
    tiny(tmp_path, part)
    lost = tmp_path / "tiny-imagenet-200" / gone
    shutil.rmtree(lost) if lost.is_dir() else lost.unlink()
    with pytest.raises(UsageError, match=r"is incomplete .*; remove it, and it is unpacked anew"):
        tiny(tmp_path, part)
    shutil.rmtree(tmp_path / "tiny-imagenet-200")
    assert len(tiny(tmp_path, part).labels)


def test_annotations_do_not_lead_out_of_their_folder(monkeypatch, no_network, tmp_path):
    announce_zip(monkeypatch, write_zip(tmp_path))
    tiny(tmp_path)
    notes = tmp_path / "tiny-imagenet-200" / "val" / "val_annotations.txt"
    for name in ("../../../secret.JPEG", "/etc/passwd", "a\0b"):
        notes.write_text(f"{name}\tn01\t0\t0\t63\t63\n")
        with pytest.raises(UsageError):
            tiny(tmp_path, "test")


@pytest.mark.parametrize("at", ["before", "download", "unpack"])
def test_data_cut_off_by_death_are_got_anew(monkeypatch, no_network, tmp_path, at):
    """A process killed while it downloads or unpacks leaves nothing that the next one trips over."""
    source = write_zip(tmp_path / "server")
    announce_zip(monkeypatch, source)
    root = tmp_path / "data"
    root.mkdir()

    def download(url, folder, name, md5, die=False):
        whole = source.read_bytes()
        with open(Path(folder) / name, "wb") as out:
            out.write(whole[:500])
            if die:
                os.kill(os.getpid(), signal.SIGKILL)
            out.write(whole[500:])

    monkeypatch.setattr("torchvision.datasets.utils.download_url", download)
    pid = os.fork()
    if pid == 0:
        if at == "download":
            monkeypatch.setattr("torchvision.datasets.utils.download_url", lambda *args: download(*args, die=True))
        elif at == "unpack":
            monkeypatch.setattr(zipfile.ZipFile, "_extract_member", extract_member_and_die)
        else:
            os.open(root / ".tiny-imagenet.lock", os.O_CREAT)
        try:
            tiny(root)
        finally:
            os._exit(0)
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    assert status == (0 if at == "before" else -signal.SIGKILL)
    if at == "unpack":
        assert (root / ".tiny-imagenet-200.part").exists()
    assert len(tiny(root).labels) == 4
    assert [f.name for f in sorted(root.iterdir())] == ["tiny-imagenet-200", "tiny-imagenet-200.zip"]


def extract_member_and_die(self, member, path, pwd):
    (Path(path) / "half").mkdir(parents=True)
    os.kill(os.getpid(), signal.SIGKILL)


def test_two_processes_at_once_unpack_and_decode_once(monkeypatch, no_network, tmp_path):
    """One waits for the other, and both end with the whole data set."""
    announce_zip(monkeypatch, write_zip(tmp_path))
    counted, original = tmp_path.parent / f"{tmp_path.name}-counted", data._unpack
    counted.mkdir()

    def unpack(archive, folder):
        (counted / f"unpacked-{os.getpid()}").touch()
        original(archive, folder)

    monkeypatch.setattr(data, "_unpack", unpack)
    decode = data._decode
    monkeypatch.setattr(
        data, "_decode", lambda file, size: ((counted / f"{os.getpid()}").touch(), decode(file, size))[1]
    )
    children = []
    with locked(tmp_path / ".tiny-imagenet.lock", wait=False):  # held until both stand before it
        for _ in range(2):
            pid = os.fork()
            if pid == 0:
                status = 1
                silent = contextlib.redirect_stdout(io.StringIO())
                with contextlib.suppress(BaseException), silent:
                    status = 0 if tiny(tmp_path).labels.tolist() == [0, 0, 1, 1] else 2
                os._exit(status)
            children.append(pid)
    statuses = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in children]
    assert statuses == [0, 0]
    assert len(list(counted.glob("unpacked-*"))) == 1 and len(list(counted.iterdir())) == 2
    assert not [f for f in tmp_path.rglob("*") if f.name.startswith(".")]


# images and their caches


ENDINGS = ("png", "jpg", "bmp", "webp", "ppm")


@pytest.mark.parametrize("ending", ENDINGS)
def test_mutated_images_are_read_or_refused(tmp_path, ending):
    file = tmp_path / f"picture.{ending}"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (24, 24, 3), dtype=np.uint8)).save(file)
    whole = file.read_bytes()

    def use():
        assert data._decode(file, 16).shape == (3, 16, 16)

    assert in_child(lambda: try_all(150, lambda rng: file.write_bytes(mutated(whole, rng)), use))


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
    flags = ("--dataset", "folder", "--data-dir", root, "--image-size", 16, "--device", "cpu")
    refused(ANCRA, *flags, "--model-dir", tmp_path / "run", mentions=(file, "pixel"))


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
    flags = ("--dataset", "folder", "--data-dir", root, "--image-size", 16, "--device", "cpu")
    refused(ANCRA, *flags, "--model-dir", tmp_path / "run", mentions=(pipe, "not a file"))


def test_mutated_caches_are_read_or_made_anew(tmp_path):
    root = image_folder(tmp_path / "pictures")
    expected = load_split("folder", "train", str(root), 16).images
    cache = root / "decoded-train-16.pt"
    whole = cache.read_bytes()

    def use():
        assert torch.equal(load_split("folder", "train", str(root), 16).images, expected)

    in_child(lambda: try_all(100, lambda rng: cache.write_bytes(mutated(whole, rng)), use))
    key = torch.load(io.BytesIO(whole), weights_only=True)["key"]
    for images in (expected.float(), expected.long(), expected[:, :1].expand(-1, 3, -1, -1)[..., :8], None, [1]):
        torch.save({"key": key, "images": images}, cache)
        use()


# a run's record


def test_mutated_records_of_a_run_never_stop_it(tmp_path, monkeypatch):
    """run.json is only copied into the next one; train.log and metrics.csv are never read."""
    file = tmp_path / "run.json"
    whole = json.dumps({"command": "python", "earlier": [{"seed": 1}], "settings": {"lr": 0.1}}).encode()
    split = load_split("digits", "train", "", 16).take(torch.arange(5))
    options = parse_training("", {"arch": "ResNet18"}, ["--dataset", "digits", "--width", "1"])
    options.folder = str(tmp_path)
    run = training.Run(options, torch.device("cpu"), split)

    def use():
        training.write_run_json(run, split, split, resumed=True)
        assert isinstance(json.loads(file.read_text())["earlier"], list)

    in_child(lambda: try_all(150, lambda rng: file.write_bytes(mutated(whole, rng)), use))
    for content in (b'{"earlier": 3}', b"[" * 10**5, b"null", b"\xff\xfe", b'{"a": 1e999}', b"9" * 5000, b'"\\ud800"'):
        file.write_bytes(content)
        use()


# nothing is executed


@pytest.mark.parametrize("name", ["last_state.pt", "best_adv_model.pt", "decoded-train-16.pt"])
def test_no_file_of_ours_runs_code(tmp_path, name):
    marker, file = tmp_path / "executed", tmp_path / name
    torch.save({"model": RunsCode(marker)}, file)
    torch.load(file, weights_only=False)
    marker.rmdir()  # raises unless the payload works
    with pytest.raises(UsageError, match="would run code"):
        read(file)
    assert tree(tmp_path) == [name]
