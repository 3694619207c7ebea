"""Weights and inputs of the golden numbers, rebuilt from their rules (tests/golden/README.md)."""

import json
import zlib
from pathlib import Path

import numpy as np
import torch

from models import build_model

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
        return values * np.float32(np.sqrt(2 / np.prod(shape[1:])))
    if key.endswith("weight"):
        return 1 + 0.1 * values
    return 0.1 * values


class GoldenNetwork:
    """A network of the golden files: `arrays`, the filled `model`, inputs `x`, `y`, and `start`."""

    def __init__(self, name):
        self.arrays = np.load(FOLDER / f"{name}.npz")
        self.meta = json.loads(str(self.arrays["meta"]))
        self.model = self.outline(name).eval()
        for key, tensor in self.model.state_dict().items():
            if not key.endswith("num_batches_tracked"):
                values = np.asarray(golden_value(key, tuple(tensor.shape)), np.float32)
                tensor.copy_(torch.from_numpy(values))
        shape = (self.meta["n"], 3, self.meta["size"], self.meta["size"])
        random = np.random.RandomState(self.meta["x_seed"])
        self.x = torch.from_numpy(random.rand(*shape).astype(np.float32))
        self.y = torch.from_numpy(random.randint(0, self.meta["classes"], shape[0]))
        noise = np.random.RandomState(self.meta["x_seed"] + 1).standard_normal(shape)
        self.start = self.x + 0.001 * torch.from_numpy(noise.astype(np.float32))

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
        return torch.from_numpy(np.asarray(self.arrays[key]))
