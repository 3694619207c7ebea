"""What several test files use: commands, short runs, small networks, made data.

Nothing here trains a network and hopes: networks that must know something are stored in
tests/golden. Fixtures are in conftest.py, smaller networks in tiny_networks.py.
"""

import csv
import json
import os
import runpy
import signal
import subprocess
import sys
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils._pytree import tree_flatten

from models import build_model
from utils.data.datasets import load_split
from utils.system.options import parse_training
from utils.training.loop import run

ROOT = Path(__file__).parent.parent
GOLDEN = Path(__file__).parent / "golden"

# Scripts

SCRIPTS = sorted(file.name for file in ROOT.glob("*.py"))
ANCRA = "train_CIFAR10_ResNet.py"
BASELINE = "train_ResNet18_baseline.py"
ATTACK = "test_white_attack.py"


def execute(script, *argv):
    """Run a script in this process, and return its exit status.

    Signal handlers and sys.argv are put back.
    """
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    command = [script, *map(str, argv)]
    try:
        with mock.patch.object(sys, "argv", command), pytest.raises(SystemExit) as stop:
            runpy.run_path(str(ROOT / script), run_name="__main__")
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    return stop.value.code or 0


def environment(**extra):
    """Return the environment of a process that a test starts: one thread, gloo by loopback."""
    fixed = {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", "PYTHONPATH": str(ROOT)}
    return os.environ | fixed | extra


def python(*argv, cwd=ROOT, **extra):
    """Run `python argv` with further environment variables, and wait for it."""
    command = [sys.executable, *map(str, argv)]
    env = environment(**extra)
    return subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True)


# Flags and settings

TINY = ("--width=4", "--epochs=1", "--num-steps=1", "--limit-test=4", "--device=cpu")
DIGITS = ("--dataset=digits", *TINY, "--limit-train=5", "--batch-size=4")
EVALUATE = (
    "--dataset=digits",
    "--limit-test=4",
    "--num-steps=1",
    "--device=cpu",
    "--attacks=pgd",
)
RUN = (
    "--dataset=digits",
    "--width=4",
    "--limit-train=24",
    "--limit-test=12",
    "--batch-size=10",
    "--num-steps=2",
    "--epochs=2",
    "--warmup-epochs=0",
)
RA = {"arch": "ResNet18", "dataset": "cifar10", "model_dir": "./model/ANCRA"}
PLAIN = RA | {"no_ra": True, "no_anc": True}


def folder_flags(root):
    """Return the flags of a short run on a folder of images."""
    return ("--dataset=folder", f"--data-dir={root}", "--image-size=16", *TINY, "--batch-size=4")


def settings(*flags, recipe=RA):
    """Return the settings of a training command."""
    return parse_training("", recipe, list(map(str, flags))).settings


# Runs


def train(parent, *flags, recipe=RA):
    """Train shortly on digits in this process, and return the folder; flags follow those of RUN."""
    argv = [*RUN, "--model-dir", str(parent / "run"), *map(str, flags)]
    run(parse_training("", recipe, argv))
    return folder(parent)


def resume(run_folder, *flags):
    """Continue a run with these flags and no others in this process, and return its folder."""
    run(parse_training("", RA, ["--resume", str(run_folder), *map(str, flags)]))
    return run_folder


def folder(parent):
    """Return the only run folder of a parent."""
    (run_folder,) = parent.glob("run*")
    return run_folder


def metrics(run_folder):
    """Return the rows of metrics.csv without times."""
    with open(run_folder / "metrics.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    for row in rows:
        for name in [name for name in row if "second" in name]:
            del row[name]
    return rows


def state(run_folder):
    """Return what last_state.pt holds."""
    return torch.load(run_folder / "last_state.pt", weights_only=True)


# Comparisons


def assert_equal(a, b, where=""):
    """Assert that nested values have the same structure and numbers, to the last bit."""
    leaves, structure = tree_flatten(a)
    other_leaves, other_structure = tree_flatten(b)
    assert structure == other_structure, where
    for leaf, other in zip(leaves, other_leaves, strict=True):
        assert type(leaf) is type(other), where
        if isinstance(leaf, torch.Tensor):
            assert leaf.dtype == other.dtype and torch.equal(leaf, other), where
        else:
            assert leaf == other, where


def assert_same_run(one, other):
    """Assert that two runs have the same weights, optimiser, generators and figures."""
    for key in ("model", "optimizer", "generator"):
        assert_equal(state(one)[key], state(other)[key], key)
    assert metrics(one) == metrics(other)
    for name in ("model-wrn-last.pt", "best_adv_model.pt"):
        weights = [torch.load(run / name, weights_only=True)["model"] for run in (one, other)]
        assert_equal(*weights, name)


def files(root):
    """Return every file under a folder with its content."""
    return {file: file.read_bytes() for file in root.rglob("*") if file.is_file()}


# Networks


def digits_content(reverse_attention=True):
    """Return a trained digits network as a checkpoint holds it.

    It is one of ANCRA-TRADES with reverse attention, or one of TRADES; tests/golden/README.md says
    what they attain.
    """
    name = "digits_ancra" if reverse_attention else "digits_trades"
    with np.load(GOLDEN / f"{name}.npz") as content:
        arrays = dict(content)
    description = json.loads(str(arrays.pop("description")))
    return {"model": {key: torch.from_numpy(x) for key, x in arrays.items()}, **description}


def digits_network(reverse_attention=True):
    """Return a trained ResNet18 of width 4 for digits of 16x16, in eval mode."""
    shape = {"width": 4, "image_size": 16}
    model = build_model("ResNet18", 10, reverse_attention=reverse_attention, **shape)
    model.load_state_dict(digits_content(reverse_attention)["model"])
    return model.eval()


def digits_checkpoint(path, reverse_attention=True, **changes):
    """Write `digits_network` as a checkpoint with some entries changed, and return the file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(digits_content(reverse_attention) | changes, path)
    return path


def checkpoint(path, arch="ResNet18", num_classes=10, **changes):
    """Write a checkpoint of a small untrained network for digits, and return the file.

    changes: entries that are others.
    """
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
    """Return random images, and labels of each class in turn."""
    generator = torch.Generator().manual_seed(0)
    return torch.rand(count, 3, size, size, generator=generator), torch.arange(count) % classes


# Data


def digits_split(part="test", count=None):
    """Return the digits of 16x16, or the first `count` of them, as a `Split`."""
    split = load_split("digits", part, "", 16)
    return split if count is None else split.take(torch.arange(count))


def pixels(seed, *shape):
    """Return random uint8 pixels."""
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def png(file, array, mode=None):
    """Write an image, converted to a mode of PIL where one is given."""
    file.parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(array)
    if mode is not None:
        image = image.convert(mode)
    image.save(file)


def image_folder(root, counts=None):
    """Write a folder of 16x16 PNG images, and return it.

    counts[part][class]: how many images, by default 3 in each of 2 classes.
    """
    counts = counts or {part: {"cat": 3, "dog": 3} for part in ("train", "test")}
    for part, classes in counts.items():
        for seed, (name, count) in enumerate(classes.items()):
            (root / part / name).mkdir(parents=True)
            for i in range(count):
                png(root / part / name / f"{i}.png", pixels(10 * seed + i, 16, 16, 3))
    return root


# Code of others


class RunsCode:
    """Pickles to something that makes a folder when it is unpickled."""

    def __init__(self, marker):
        """Name the folder."""
        self.marker = marker

    def __reduce__(self):
        """Return a call instead of a state."""
        return os.mkdir, (str(self.marker),)
