"""What several tests use: scripts run in this process, and files for them."""

import os
import runpy
import signal
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from models import build_model

ROOT = Path(__file__).parent.parent
SCRIPTS = sorted(file.name for file in ROOT.glob("*.py"))
ANCRA, BASELINE, ATTACK = "train_CIFAR10_ResNet.py", "train_ResNet18_baseline.py", "test_white_attack.py"
TINY = ("--width", "4", "--epochs", "1", "--num-steps", "1", "--limit-test", "4", "--device", "cpu")
DIGITS = ("--dataset", "digits", *TINY, "--limit-train", "5", "--batch-size", "4")
EVALUATE = ("--dataset", "digits", "--limit-test", "4", "--num-steps", "1", "--device", "cpu", "--attacks", "pgd")


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


def files(folder):
    """Every file under a folder with its content, but for the caches of decoded images."""
    found = (file for file in folder.rglob("*") if file.is_file())
    return {file: file.read_bytes() for file in found if not file.name.startswith("decoded-")}


class RunsCode:
    """Pickles to something that makes a folder when it is unpickled."""

    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.mkdir, (str(self.marker),)


def image_folder(root, counts=None):
    """A data set of 16x16 PNG images, counts[part][class] of them, by default 3 in each of 2 classes."""
    counts = counts or {part: {"cat": 3, "dog": 3} for part in ("train", "test")}
    for part, classes in counts.items():
        for seed, (name, count) in enumerate(classes.items()):
            (root / part / name).mkdir(parents=True)
            for i in range(count):
                array = np.random.default_rng(10 * seed + i).integers(0, 256, (16, 16, 3), dtype=np.uint8)
                Image.fromarray(array).save(root / part / name / f"{i}.png")
    return root


def folder_flags(root):
    return ("--dataset", "folder", "--data-dir", root, "--image-size", 16, *TINY, "--batch-size", 4)


def checkpoint(path, arch="ResNet18", num_classes=10, **changes):
    """Write a checkpoint of a small network for digits, some of its entries changed."""
    torch.manual_seed(0)
    content = {
        "model": build_model(arch, num_classes, width=1 if arch[0] == "W" else 4, image_size=16).state_dict(),
        "arch": arch,
        "classes": [str(i) for i in range(num_classes)],
        "num_classes": num_classes,
        "reverse_attention": True,
        "width": 1 if arch[0] == "W" else 4,
        "image_size": 16,
        "dataset": "digits",
        "recipe": {},
        "epoch": 1,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(content | changes, path)
    return path
