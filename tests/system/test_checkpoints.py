"""Checkpoint files: ours, published ones, and those that hold something else."""

import argparse
import collections
import enum
import functools
import os
import pathlib
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from models import build_model
from tests.helpers import checkpoint
from utils.data.subject import load_subject
from utils.system.checkpoints import load_model, read
from utils.system.errors import UsageError
from utils.system.options import parse
from utils.system.settings import Evaluation


def assert_loads(file, net):
    """Assert that a file gives a network of 16x16 images that computes as `net` does."""
    x = torch.rand(2, 3, 16, 16)
    assert torch.equal(load_model(file, image_size=16)[0](x), net(x))


def small_network():
    """Build an untrained network for images of 16x16."""
    torch.manual_seed(0)
    return build_model("ResNet18", 10, width=1, image_size=16).eval()


class Config(dict):
    """A dictionary with attributes, as configurations of yacs or easydict are."""

    def __init__(self, **entries):
        super().__init__(entries)
        self.__dict__.update(entries)


class Colour(enum.Enum):
    """An enumeration of the user's own code."""

    RED = 1


class OfAnotherSystem:
    """Pickles to a path of another system."""

    def __reduce__(self):
        return pathlib.WindowsPath if os.name == "posix" else pathlib.PosixPath, ("C:", "runs")


def test_objects_beside_the_weights_do_not_stop_them_from_loading(tmp_path):
    net = small_network()
    file = tmp_path / "weights.pt"
    content = {
        "args": argparse.Namespace(lr=0.1, out=Path("/tmp"), seen={"a": np.int64(3)}),
        "elsewhere": OfAnotherSystem(),
        "config": Config(lr=0.1, nested=Config(depth=2)),
        "colour": Colour.RED,
        "optimizer": torch.optim.SGD(net.parameters(), 0.1),
        "log": collections.defaultdict(list, loss=[1.0]),
        "best": np.float64(3.5),
        "hyper_parameters": {"optimizer": functools.partial(torch.optim.SGD, lr=0.1)},
        "net": net.state_dict(),
    }
    torch.save(content, file)
    assert_loads(file, net)
    assert read(file)["config"] == {"lr": 0.1, "nested": {"depth": 2}}


def test_a_module_that_was_saved_whole_gives_its_weights(tmp_path):
    net = small_network()
    file = tmp_path / "weights.pt"
    for content in (torch.nn.DataParallel(net), {"model": net, "epoch": 3}):
        torch.save(content, file)
        assert_loads(file, net)


def test_safetensors_are_read_where_the_package_is_installed(monkeypatch, tmp_path):
    net = small_network()
    file = tmp_path / "weights.safetensors"
    file.write_bytes(b"a header and tensors")
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    with pytest.raises(UsageError, match="pip install safetensors"):
        read(file)
    stand_in = SimpleNamespace(load_file=lambda path: net.state_dict())
    monkeypatch.setitem(sys.modules, "safetensors", SimpleNamespace(torch=stand_in))
    monkeypatch.setitem(sys.modules, "safetensors.torch", stand_in)
    assert_loads(file, net)


@pytest.mark.parametrize("kind", [torch.float64, torch.float16, torch.bfloat16])
def test_weights_of_other_precisions_load(tmp_path, kind):
    state = build_model("ResNet18", 10, width=4, image_size=16).to(kind).state_dict()
    model, _ = load_model(checkpoint(tmp_path / "weights.pt", model=state))
    assert model.conv1.weight.dtype == torch.float32


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"arch": "ResNet50"}, "ResNet50"),
        ({"width": 8}, "size mismatch"),
        ({"model": {}}, "Missing key"),
    ],
)
def test_a_description_that_does_not_fit_is_refused(tmp_path, change, word):
    file = checkpoint(tmp_path / "weights.pt")
    torch.save(torch.load(file, weights_only=True) | change, file)
    with pytest.raises(UsageError, match=word) as refusal:
        load_model(file)
    assert str(file) in str(refusal.value)


def test_a_published_file_without_the_network_asked_for_is_refused(tmp_path):
    file = tmp_path / "weights.pt"
    torch.save({"epoch": 3, "generator": {"weight": torch.ones(3)}}, file)
    with pytest.raises(UsageError, match="generator"):
        load_model(file)
    torch.save({"state_dict": small_network().state_dict()}, file)
    with pytest.raises(UsageError, match="called ema"):
        load_model(file, key="ema")


FOREIGN = """
import os
import torch
from torch import nn

def weighted():
    torch.manual_seed(int(os.environ["SEED"]))
    return nn.Sequential(nn.Flatten(), nn.Linear(768, 10))

def function():
    net = weighted()
    return lambda x: net(x)
"""


@pytest.mark.parametrize("function", ["weighted", "function"])
def test_a_network_of_one_s_own_is_known_by_its_file_and_its_weights(here, function):
    """A function that holds its weights somewhere else is known by its logits."""

    def fingerprint(source):
        (here / "foreign_net.py").write_text(source)
        flags = ["--model", f"foreign_net.py:{function}", "--dataset", "digits"]
        flags += ["--n-examples", "4", "--device", "cpu"]
        sys.modules.pop("foreign_net", None)
        return load_subject(parse(Evaluation, "", flags)).identity()["network"]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "dont_write_bytecode", True)
        patch.setenv("SEED", "1")
        first = fingerprint(FOREIGN)
        assert fingerprint(FOREIGN) == first
        assert fingerprint(FOREIGN + "\n# edited\n") != first
        patch.setenv("SEED", "2")
        assert fingerprint(FOREIGN) != first
    sys.modules.pop("foreign_net", None)
