"""Normalisation of images as part of a network, so that attacks stay on [0, 1] images."""

import torch
from torch import Tensor, nn

BUFFERS = {"mean": "std", "mu": "sigma", "new_mean": "new_std"}  # names in published networks


class Normalise(nn.Module):
    """(x - mean) / std of images x (N, 3, H, W), by channel, without entries in a state dict."""

    def __init__(self, mean: tuple[float, ...], std: tuple[float, ...]) -> None:
        super().__init__()
        self.register_buffer("mean", torch.tensor(mean)[:, None, None], persistent=False)
        self.register_buffer("std", torch.tensor(std)[:, None, None], persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return (x - self.mean) / self.std


def normalisation_in(
    state: dict[str, Tensor],
) -> tuple[list[str], dict[str, tuple[float, ...]]]:
    """Find the buffers of a state dict that normalise images.

    Returns their names, and `mean` and `std`, or nothing of both. Of several pairs the outermost
    counts; the others belong to copies of the network inside it.
    """
    names: list[str] = []
    normalisation = {}
    for mean_name in sorted(state, key=len, reverse=True):
        prefix, dot, last = mean_name.rpartition(".")
        std_name = f"{prefix}{dot}{BUFFERS.get(last)}"
        if std_name not in state:
            continue
        mean = _by_channel(state[mean_name])
        std = _by_channel(state[std_name])
        if mean and std:
            names = [mean_name, std_name, *names]
            normalisation = {"mean": mean, "std": std}
    return names, normalisation


def _by_channel(values: Tensor) -> tuple[float, ...]:
    """Return three numbers from three or one, or none from a tensor of another size."""
    if values.numel() not in (1, 3):
        return ()
    numbers = [float(f"{value:.7g}") for value in values.flatten().tolist()]
    return tuple(numbers * (3 // len(numbers)))
