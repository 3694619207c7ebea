"""What several test files use, once. Nothing here trains a network and hopes.

scripts     ROOT SCRIPTS ANCRA BASELINE ATTACK; execute(script, *argv) in this process; python(*argv) in another;
            environment(**extra) for other processes; free_port() for their meetings; made_once(factory, name, make),
            a folder for all processes of a session; end_forked(work), the end of a forked child
flags       TINY, DIGITS, EVALUATE, folder_flags(root) for scripts; RUN for `train`; recipes RA and PLAIN
settings    settings(*flags, recipe=RA) -> Training
runs        train(parent, *flags, recipe=RA), resume(run, *flags) in this process -> its folder; folder(parent);
            metrics(run); state(run)
compare     assert_equal(a, b), whatever they hold; assert_same_run(one, other); files(folder) -> {path: bytes};
            tree(folder)
networks    digits_network(reverse_attention=True), trained, of golden weights; digits_content(...), as a checkpoint
            holds it; digits_checkpoint(path, ...), as a file (tiny_networks.py has smaller ones);
            checkpoint(path, arch, num_classes, **changes), untrained; some_batch(); a_few_steps(model, x, labels)
data        pixels(seed, *shape); png(file, array); md5(content); image_folder(root, counts); digits_split(part, count);
            write_cifar, announce_cifar, pack_cifar; write_tiny_imagenet, announce_tiny_imagenet
strangers   RunsCode(marker)
Fixtures (conftest.py): no_network, here, refused, trained, short_evaluation.
"""

import csv
import hashlib
import io
import itertools
import json
import os
import pickle
import runpy
import shutil
import signal
import socket
import subprocess
import sys
import tarfile
import traceback
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from models import build_model
from utils.data.datasets import load_split
from utils.system.files import locked
from utils.system.options import parse_training

ROOT = Path(__file__).parent.parent
GOLDEN = Path(__file__).parent / "golden"

# scripts

SCRIPTS = sorted(file.name for file in ROOT.glob("*.py"))
ANCRA, BASELINE, ATTACK = "train_CIFAR10_ResNet.py", "train_ResNet18_baseline.py", "test_white_attack.py"


def execute(script, *argv):
    """Run a script in this process -> its exit status. Signal handlers and sys.argv are put back."""
    handlers = {s: signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)}
    before = sys.argv
    sys.argv = [script, *map(str, argv)]
    try:
        with pytest.raises(SystemExit) as stop:
            runpy.run_path(str(ROOT / script), run_name="__main__")
    finally:
        sys.argv = before
        for signum, handler in handlers.items():
            signal.signal(signum, handler)
    return stop.value.code or 0


def environment(**extra):
    """Of a process that a test starts: one thread; gloo by the loopback device."""
    return os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", "PYTHONPATH": str(ROOT)} | extra


def python(*argv, cwd=ROOT, **extra):
    """Run `python argv` and wait for it. extra: further environment."""
    command = [sys.executable, *map(str, argv)]
    return subprocess.run(command, cwd=cwd, env=environment(**extra), capture_output=True, text=True)


_ports = itertools.count(os.getpid())  # of two sessions beside each other, too


def free_port():
    """A port that no test running beside this one is given, below those that systems hand out by themselves."""
    worker = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0")[2:])
    while True:
        port = 20000 + 400 * (worker % 30) + next(_ports) % 400
        with socket.socket() as free:
            try:
                free.bind(("127.0.0.1", port))
            except OSError:
                continue
        return port


def made_once(tmp_path_factory, name, make):
    """A folder that make(folder) fills, once in a session: whichever of its processes needs it first."""
    parent = tmp_path_factory.getbasetemp()
    parent = parent.parent if "PYTEST_XDIST_WORKER" in os.environ else parent
    with locked(parent / f"{name}.lock", wait=True):
        if not (parent / name / "made").exists():
            (parent / name).mkdir(exist_ok=True)
            make(parent / name)
            (parent / name / "made").touch()
    return parent / name


def end_forked(work, out, err):
    """Do `work` in a forked child, its streams in two files, and end the child as a script ends; never returns."""
    status = 70
    try:
        for stream, file in ((1, out), (2, err)):
            os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644), stream)
        work()
        status = 0
    except SystemExit as stop:
        status = stop.code or 0
    except BaseException:  # what it is stands in `err`, and the status says that it was none of a script's
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


# flags and settings

TINY = ("--width", "4", "--epochs", "1", "--num-steps", "1", "--limit-test", "4", "--device", "cpu")
DIGITS = ("--dataset", "digits", *TINY, "--limit-train", "5", "--batch-size", "4")
EVALUATE = ("--dataset", "digits", "--limit-test", "4", "--num-steps", "1", "--device", "cpu", "--attacks", "pgd")
RUN = (
    "--dataset=digits", "--width=4", "--limit-train=24", "--limit-test=12", "--batch-size=10", "--num-steps=2",
    "--epochs=2", "--warmup-epochs=0",
)  # fmt: skip
RA = {"arch": "ResNet18", "dataset": "cifar10", "model_dir": "./model/ANCRA"}
PLAIN = RA | {"no_ra": True, "no_anc": True}


def folder_flags(root):
    return ("--dataset", "folder", "--data-dir", root, "--image-size", 16, *TINY, "--batch-size", 4)


def settings(*flags, recipe=RA):
    """The settings of a training command."""
    return parse_training("", recipe, list(map(str, flags))).settings


# runs


def train(parent, *flags, recipe=RA):
    """A short run on digits in this process -> its folder. Flags come behind those of RUN."""
    from utils.training import loop as training

    training.run(parse_training("", recipe, [*RUN, "--model-dir", str(parent / "run"), *map(str, flags)]))
    return folder(parent)


def resume(run, *flags):
    """Continue a run by its folder, with these flags and no others, in this process -> its folder."""
    from utils.training import loop as training

    training.run(parse_training("", RA, ["--resume", str(run), *map(str, flags)]))
    return run


def folder(parent):
    """The one run folder of a parent."""
    (found,) = parent.glob("run*")
    return found


def metrics(run):
    """Rows of metrics.csv without times."""
    with open(run / "metrics.csv", newline="") as file:
        return [{key: value for key, value in row.items() if "second" not in key} for row in csv.DictReader(file)]


def state(run):
    return torch.load(run / "last_state.pt", weights_only=True)


# comparisons


def assert_equal(a, b, where=""):
    """Equal in types, keys and every number, to the last bit."""
    assert type(a) is type(b), where
    if isinstance(a, dict):
        assert a.keys() == b.keys(), where
        for key in a:
            assert_equal(a[key], b[key], f"{where}.{key}")
    elif isinstance(a, list | tuple):
        assert len(a) == len(b), where
        for i, (left, right) in enumerate(zip(a, b, strict=True)):
            assert_equal(left, right, f"{where}[{i}]")
    elif isinstance(a, torch.Tensor):
        assert a.dtype == b.dtype and torch.equal(a, b), where
    else:
        assert a == b, where


def assert_same_run(one, other):
    """Two run folders hold the same weights, optimiser, generators and figures."""
    states = [state(run) for run in (one, other)]
    for key in ("model", "optimizer", "generator"):
        assert_equal(states[0][key], states[1][key], key)
    assert metrics(one) == metrics(other)
    for name in ("model-wrn-last.pt", "best_adv_model.pt"):
        assert_equal(*(torch.load(run / name, weights_only=True)["model"] for run in (one, other)), name)


def files(folder):
    """Every file under a folder with its content, but for the caches of decoded images."""
    found = (file for file in folder.rglob("*") if file.is_file())
    return {file: file.read_bytes() for file in found if not file.name.startswith("decoded-")}


def tree(folder):
    """Paths under a folder."""
    return sorted(str(f.relative_to(folder)) for f in folder.rglob("*"))


# networks


def _stored(name):
    """Golden weights -> (state dict, what they are)."""
    with np.load(GOLDEN / f"{name}.npz") as content:
        arrays = {key: torch.from_numpy(content[key]) for key in content.files if key != "description"}
        return arrays, json.loads(str(content["description"]))


def digits_content(reverse_attention=True):
    """A trained digits network as a checkpoint holds it: of ANCRA-TRADES with reverse attention, or of TRADES."""
    weights, description = _stored("digits_ancra" if reverse_attention else "digits_trades")
    return {"model": weights, **description}


def digits_network(reverse_attention=True):
    """A trained ResNet18 of width 4 for digits of 16x16, in eval mode (tests/golden/README.md says what it attains)."""
    content = digits_content(reverse_attention)
    model = build_model("ResNet18", 10, reverse_attention=reverse_attention, width=4, image_size=16)
    model.load_state_dict(content["model"])
    return model.eval()


def digits_checkpoint(path, reverse_attention=True, **changes):
    """Write `digits_network` as a checkpoint, some of its entries changed -> its file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(digits_content(reverse_attention) | changes, path)
    return path


def checkpoint(path, arch="ResNet18", num_classes=10, **changes):
    """Write a checkpoint of a small untrained network for digits, some of its entries changed -> its file."""
    torch.manual_seed(0)
    width = 1 if arch[0] == "W" else 4
    content = {
        "model": build_model(arch, num_classes, width=width, image_size=16).state_dict(),
        "arch": arch,
        "classes": [str(i) for i in range(num_classes)],
        "num_classes": num_classes,
        "reverse_attention": True,
        "width": width,
        "image_size": 16,
        "dataset": "digits",
        "recipe": {},
        "epoch": 1,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(content | changes, path)
    return path


def some_batch(count=12, size=16, classes=4):
    """Random images and labels of each class in turn."""
    generator = torch.Generator().manual_seed(0)
    return torch.rand(count, 3, size, size, generator=generator), torch.arange(count) % classes


def a_few_steps(model, x, labels, steps=4):
    """Train a little, so that BatchNorm's scales, shifts and statistics are no longer those of a new network."""
    optimizer = torch.optim.SGD(model.train().parameters(), 0.05, momentum=0.9)
    for _ in range(steps):
        heads = model(x, labels, heads=True)
        loss = sum(F.cross_entropy(logits, labels) for logits in (heads.final, *heads.auxiliary))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model


# data


def digits_split(part="test", count=None):
    """Digits of 16x16, the first `count` of them, as a `Split`."""
    split = load_split("digits", part, "", 16)
    return split if count is None else split.take(torch.arange(count))


def pixels(seed, *shape):
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def png(file, array, mode=None):
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).convert(mode).save(file) if mode else Image.fromarray(array).save(file)


def md5(content):
    return hashlib.md5(content).hexdigest()


def image_folder(root, counts=None):
    """A data set of 16x16 PNG images, counts[part][class] of them, by default 3 in each of 2 classes."""
    counts = counts or {part: {"cat": 3, "dog": 3} for part in ("train", "test")}
    for part, classes in counts.items():
        for seed, (name, count) in enumerate(classes.items()):
            (root / part / name).mkdir(parents=True)
            for i in range(count):
                png(root / part / name / f"{i}.png", pixels(10 * seed + i, 16, 16, 3))
    return root


# dataset: name of its class in torchvision, key of the labels, train files, test file, number of classes
CIFARS = {
    "cifar10": ("CIFAR10", "labels", [f"data_batch_{i}" for i in range(1, 6)], "test_batch", 10),
    "cifar100": ("CIFAR100", "fine_labels", ["train"], "test", 100),
}


def cifar_source(dataset):
    """Torchvision's class of a CIFAR."""
    import torchvision.datasets

    return getattr(torchvision.datasets, CIFARS[dataset][0])


def write_cifar(monkeypatch, folder, dataset="cifar10", train_files=None):
    """Write a CIFAR of 3 images a file, and let torchvision expect it.

    train_files: how many, all where None. -> {part: (images NHWC, labels)}, {name of a file: what it pickles}
    """
    source, (_, key, train, test, classes) = cifar_source(dataset), CIFARS[dataset]
    train = train[:train_files]
    contents, written = {}, {"train": ([], []), "test": ([], [])}
    for seed, name in enumerate([*train, test]):
        images = pixels(seed, 3, 32, 32, 3)
        labels = [(7 * seed + i) % classes for i in range(3)]
        contents[name] = {"data": images.transpose(0, 3, 1, 2).reshape(3, 3072), key: labels}
        part = written["test" if name == test else "train"]
        part[0].extend(images)
        part[1].extend(labels)
    contents[source.meta["filename"]] = {source.meta["key"]: [f"name{i}" for i in range(classes)]}
    announce_cifar(monkeypatch, folder, contents, dataset)
    return written, contents


def announce_cifar(monkeypatch, folder, contents, dataset="cifar10"):
    """Write the files of a CIFAR and let torchvision expect their MD5s, whatever they pickle."""
    source, test = cifar_source(dataset), CIFARS[dataset][3]
    root, meta = folder / source.base_folder, source.meta["filename"]
    root.mkdir(parents=True, exist_ok=True)
    sums = {}
    for name, content in contents.items():
        (root / name).write_bytes(pickle.dumps(content, protocol=2))
        sums[name] = md5((root / name).read_bytes())
    monkeypatch.setattr(source, "train_list", [[name, sums[name]] for name in contents if name not in (test, meta)])
    monkeypatch.setattr(source, "test_list", [[test, sums[test]]])
    monkeypatch.setattr(source, "meta", source.meta | {"md5": sums[meta]})


def pack_cifar(monkeypatch, folder, dataset="cifar10"):
    """Replace the unpacked folder by the archive that torchvision downloads -> its file."""
    source = cifar_source(dataset)
    archive = folder / source.filename
    with tarfile.open(archive, "w:gz") as tar:
        tar.add(folder / source.base_folder, source.base_folder)
    shutil.rmtree(folder / source.base_folder)
    monkeypatch.setattr(source, "tgz_md5", md5(archive.read_bytes()))
    return archive


WNIDS = ("n03", "n01", "n02")  # as in the file, unsorted
TINY_IMAGENET_COUNTS = {"train": 6, "test": 4}


def write_tiny_imagenet(monkeypatch, folder, extra=()):
    """Write the zip of a Tiny-ImageNet of 3 classes, and let `data` expect it.

    extra: further entries, (name or ZipInfo, bytes). -> the zip, {part: (decoded images NHWC, labels)} in order
    """
    expected = {"train": ([], []), "test": ([], [])}

    def jpeg(seed):
        array = pixels(seed, 64, 64) if seed == 1 else pixels(seed, 8, 8, 3).repeat(8, 0).repeat(8, 1)
        out = io.BytesIO()
        Image.fromarray(array).save(out, "JPEG")  # one of them greyscale, as some of the published ones are
        return out.getvalue()

    def note(part, content, label):
        expected[part][0].append(np.array(Image.open(io.BytesIO(content)).convert("RGB")))
        expected[part][1].append(label)

    folder.mkdir(parents=True, exist_ok=True)
    archive = folder / "tiny-imagenet-200.zip"
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as out:

        def write(name, content):
            out.writestr(f"tiny-imagenet-200/{name}", content)

        write("wnids.txt", "".join(f"{wnid}\n" for wnid in WNIDS))
        write("words.txt", "".join(f"{wnid}\tthing {wnid}\n" for wnid in WNIDS))
        for label, wnid in enumerate(sorted(WNIDS)):
            boxes = ""
            for i in range(2):
                content = jpeg(10 * label + i)
                write(f"train/{wnid}/images/{wnid}_{i}.JPEG", content)
                boxes += f"{wnid}_{i}.JPEG\t0\t0\t63\t63\n"
                note("train", content, label)
            write(f"train/{wnid}/{wnid}_boxes.txt", boxes)
        lines = ""
        for i, wnid in enumerate(("n02", "n03", "n01", "n03")):
            content = jpeg(100 + i)
            write(f"val/images/val_{i}.JPEG", content)
            lines += f"val_{i}.JPEG\t{wnid}\t0\t32\t44\t62\n"
            note("test", content, sorted(WNIDS).index(wnid))
        write("val/val_annotations.txt", lines)
        for entry, content in extra:
            out.writestr(entry, content)
    announce_tiny_imagenet(monkeypatch, archive)
    return archive, expected


def announce_tiny_imagenet(monkeypatch, archive):
    """Let `data` expect a zip as it is."""
    from utils.data import datasets as data

    monkeypatch.setattr(data, "TINY_IMAGENET", ("http://localhost/tiny.zip", md5(archive.read_bytes())))
    monkeypatch.setattr(data, "TINY_IMAGES", TINY_IMAGENET_COUNTS)


# strangers


class RunsCode:
    """Pickles to something that makes a folder when it is unpickled."""

    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.mkdir, (str(self.marker),)
