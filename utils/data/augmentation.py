"""Augmentation of a batch of images, on the device that holds it."""

import torch
import torch.nn.functional as F
from torch import Tensor


def augment(images: Tensor, kind: str, generator: torch.Generator) -> Tensor:
    """Augment a batch of uint8 images (N, 3, S, S) on its device.

    kind: `crop` shifts each image by up to S / 8 pixels each way and fills with zeros (4 pixels at
    S = 32, as published); `crop-flip` also mirrors each image with probability 1/2; `none` returns
    the images as they are.
    """
    if kind == "none":
        return images

    count = len(images)
    size = images.shape[-1]
    pad = size // 8
    padded = F.pad(images, (pad, pad, pad, pad))
    rows = torch.arange(count, device=images.device)
    top, left = torch.randint(2 * pad + 1, (2, count), generator=generator, device=images.device)

    if kind == "crop-flip":
        # The mirrored image of a crop is a crop of the mirrored image.
        mirrored = torch.rand(count, generator=generator, device=images.device) < 0.5
        padded = torch.cat([padded, padded.flip(3)])
        rows = rows + count * mirrored
        left = torch.where(mirrored, 2 * pad - left, left)

    # (images, 3, shifts, shifts, S, S), a view
    windows = padded.unfold(2, size, 1).unfold(3, size, 1)
    return windows[rows, :, top, left]
