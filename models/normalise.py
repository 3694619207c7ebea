"""Normalisation of images as part of a network, so that attacks stay on [0, 1] images."""

import torch
from torch import Tensor, nn


class Normalise(nn.Module):
    """(x - mean) / std of images x (N, 3, H, W), by channel, without entries in a state dict."""

    def __init__(self, mean: tuple[float, ...], std: tuple[float, ...]) -> None:
        super().__init__()
        self.register_buffer("mean", torch.tensor(mean)[:, None, None], persistent=False)
        self.register_buffer("std", torch.tensor(std)[:, None, None], persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return (x - self.mean) / self.std
