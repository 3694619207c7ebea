"""Weights and inputs of the golden numbers, rebuilt from their rules (tests/golden/README.md)."""

import json
import zlib
from pathlib import Path

import numpy as np
import torch

from models import build_model
from utils.attacks import ToAttack
from utils.step import away_from_labels, towards_labels

FOLDER = Path(__file__).parent / "golden"
ARCHS = {
    "ResNet18": "ResNet18",
    "PreActResNet18": "PreActResNet18",
    "WRN34_10": "WRN-34-10",
    "WRN28_10": "WRN-28-10",
}


def assert_near(value, expected, tolerance=1e-4):
    """Compare tensors, relative to the largest expected entry."""
    assert value.shape == expected.shape
    assert (value - expected).abs().max() <= tolerance * expected.abs().max()


def golden_tensors(file, tag):
    """Return the arrays `tag/name` of a golden file as tensors, by name."""
    with np.load(FOLDER / f"{file}.npz") as arrays:
        names = [key.removeprefix(f"{tag}/") for key in arrays if key.startswith(f"{tag}/")]
        return {name: torch.from_numpy(arrays[f"{tag}/{name}"]) for name in names}


def both_attacks(x, start, labels, target_labels):
    """Return the two attacks of training on the same images."""
    return [
        ToAttack(x, start, away_from_labels, labels),
        ToAttack(x, start, towards_labels, target_labels),
    ]


def published_shapes(name):
    """Return the shapes of a published state dict by key."""
    shapes = json.loads((FOLDER / f"{name}.keys.json").read_text())
    return {key: tuple(shape) for key, shape in shapes.items() if "sub_block1" not in key}


def golden_value(key, shape):
    """Return the values of a tensor of a state dict, which depend on its key alone."""
    random = np.random.RandomState(zlib.crc32(key.encode()))
    values = random.standard_normal(shape).astype(np.float32)
    if key.endswith("running_mean"):
        return 0.1 * values
    if key.endswith("running_var"):
        return 1 + 0.5 * np.abs(values)
    if len(shape) > 1:
        fan_in = np.prod(shape[1:])
        return values * np.float32(np.sqrt(2 / fan_in))
    if key.endswith("weight"):
        return 1 + 0.1 * values
    return 0.1 * values


class GoldenNetwork:
    """A network of the golden files: `arrays`, the filled `model`, inputs `x`, `y`, `start`."""

    def __init__(self, name):
        self.arrays = np.load(FOLDER / f"{name}.npz")
        self.meta = json.loads(str(self.arrays["meta"]))
        self.model = self.outline(name).eval()
        for key, tensor in self.model.state_dict().items():
            if not key.endswith("num_batches_tracked"):
                tensor.copy_(torch.from_numpy(golden_value(key, tensor.shape)))
        count = self.meta["n"]
        side = self.meta["size"]
        seed = self.meta["x_seed"]
        random = np.random.RandomState(seed)
        self.x = torch.from_numpy(random.rand(count, 3, side, side)).float()
        self.y = torch.from_numpy(random.randint(0, self.meta["classes"], count))
        self.target_labels = (self.y + 1) % self.meta["classes"]
        noise = np.random.RandomState(seed + 1).standard_normal(self.x.shape)
        self.start = self.x + 0.001 * torch.from_numpy(noise).float()

    @staticmethod
    def outline(name):
        """Build the network of a golden file before it is filled."""
        with np.load(FOLDER / f"{name}.npz") as arrays:
            meta = json.loads(str(arrays["meta"]))
        return build_model(
            ARCHS[name.removesuffix("_RA")],
            meta["classes"],
            reverse_attention=name.endswith("_RA"),
            image_size=meta["size"],
        )

    def __getitem__(self, key):
        return torch.from_numpy(self.arrays[key])
