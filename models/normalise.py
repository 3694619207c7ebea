"""Normalisation of images as a part of a network, so that whoever attacks it stays on [0, 1] images."""

import torch
from torch import Tensor, nn

BUFFERS = {"mean": "std", "mu": "sigma", "new_mean": "new_std"}  # what published networks call the two


class Normalise(nn.Module):
    """(x - mean) / std of images x (N, 3, H, W), by channel. It adds nothing to a network's state dict."""

    def __init__(self, mean: tuple[float, ...], std: tuple[float, ...]) -> None:
        super().__init__()
        self.mean, self.std = mean, std
        for name, values in (("shift", mean), ("scale", std)):
            self.register_buffer(name, torch.tensor(values)[:, None, None], persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return (x - self.shift) / self.scale


def normalisation_in(state: dict[str, Tensor]) -> tuple[list[str], dict[str, tuple[float, ...]]]:
    """Names of a state dict's buffers that normalise images, and their `mean` and `std`; nothing where there are none.

    Of several pairs of buffers the outermost counts: others are those of a copy of the network inside.
    """
    names, found = [], {}
    for name in sorted(state, key=len, reverse=True):
        stem, dot, last = name.rpartition(".")
        pair = name, f"{stem}{dot}{BUFFERS.get(last)}"
        held = [state[key].flatten().tolist() for key in pair if key in state and state[key].numel() in (1, 3)]
        if len(held) == 2:
            names = [*pair, *names]
            rounded = [[float(f"{value:.7g}") for value in values * (3 // len(values))] for values in held]
            found = {"mean": tuple(rounded[0]), "std": tuple(rounded[1])}
    return names, found
