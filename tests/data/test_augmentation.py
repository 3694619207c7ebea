"""Crops and mirrored crops, image by image."""

import numpy as np
import pytest
import torch
from numpy.lib.stride_tricks import sliding_window_view

from tests.helpers import pixels
from utils.data.augmentation import augment


def generator(seed=0):
    """A generator of random numbers."""
    return torch.Generator().manual_seed(seed)


def places_of(crop, image):
    """Where a crop lies in the zero-padded image (3, S, S), as rows of mirrored, top, left."""
    size = image.shape[-1]
    pad = size // 8
    padded = np.pad(image, ((0, 0), (pad, pad), (pad, pad)))
    windows = sliding_window_view(padded, (size, size), (1, 2))
    both = np.stack([crop, crop[:, :, ::-1]])[:, :, None, None]
    return np.argwhere((windows == both).all((1, 4, 5)))


@pytest.mark.parametrize("kind", ["crop", "crop-flip"])
@pytest.mark.parametrize("size", [16, 32])
def test_a_crop_is_a_window_of_the_padded_image(kind, size):
    images = torch.from_numpy(pixels(3, 300, 3, size, size)).clamp(min=1)
    before = images.clone()
    augmented = augment(images, kind, generator())
    assert augmented.dtype == torch.uint8
    assert torch.equal(images, before)

    found = [places_of(*pair) for pair in zip(augmented.numpy(), images.numpy(), strict=True)]
    assert {len(places) for places in found} == {1}
    mirrored, *shifts = np.concatenate(found).T
    for shift in shifts:  # all shifts, each about equally often
        counts = np.bincount(shift, minlength=size // 4 + 1)
        assert counts.min() > 0.4 * counts.mean()
    if kind == "crop":
        assert sum(mirrored) == 0
    else:
        assert 90 < sum(mirrored) < 210


def test_augmentation_depends_on_its_generator_alone():
    images = torch.from_numpy(pixels(0, 40, 3, 16, 16))
    state = torch.get_rng_state()
    first = augment(images, "crop-flip", generator(1))
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(99)
    assert torch.equal(augment(images, "crop-flip", generator(1)), first)
    assert not torch.equal(augment(images, "crop-flip", generator(2)), first)


def test_without_augmentation_images_stay_as_they_are():
    images = torch.from_numpy(pixels(0, 5, 3, 16, 16))
    assert torch.equal(augment(images, "none", generator()), images)
