"""Crops and mirrored crops, image by image."""

import numpy as np
import pytest
import torch

from tests.helpers import pixels
from utils.data.augmentation import augment


def generator(seed=0):
    """A generator of random numbers."""
    return torch.Generator().manual_seed(seed)


def windows(image, pad):
    """Every crop of the zero-padded image (3, S, S), by its shift."""
    size = image.shape[-1]
    padded = np.pad(image, ((0, 0), (pad, pad), (pad, pad)))
    crops = {}
    for top in range(2 * pad + 1):
        for left in range(2 * pad + 1):
            crops[top, left] = padded[:, top : top + size, left : left + size]
    return crops


@pytest.mark.parametrize("kind", ["crop", "crop-flip"])
@pytest.mark.parametrize("size, count", [(16, 400), (32, 60)])
def test_a_crop_is_a_window_of_the_padded_image(kind, size, count):
    images = torch.from_numpy(pixels(3, count, 3, size, size)).clamp(min=1)
    before = images.clone()
    augmented = augment(images, kind, generator())
    assert augmented.shape == images.shape
    assert augmented.dtype == torch.uint8
    assert torch.equal(images, before)

    shifts = []
    mirrored = 0
    for image, crop in zip(images.numpy(), augmented.numpy(), strict=True):
        matches = []
        for shift, window in windows(image, size // 8).items():
            if np.array_equal(window, crop):
                matches.append(shift)
            elif kind == "crop-flip" and np.array_equal(window[:, :, ::-1], crop):
                matches.append(shift)
                mirrored += 1
        assert len(matches) == 1
        shifts += matches
    if size == 16:  # all 25 shifts, each on its axis about equally often
        assert len(set(shifts)) == 25
        for axis in zip(*shifts, strict=True):
            assert np.bincount(axis).min() > 40
    if kind == "crop-flip":
        assert 0.3 * count < mirrored < 0.7 * count


@pytest.mark.parametrize("kind", ["crop", "crop-flip"])
def test_augmentation_depends_on_its_generator_alone(kind):
    images = torch.from_numpy(pixels(0, 40, 3, 16, 16))
    state = torch.get_rng_state()
    first = augment(images, kind, generator(1))
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(99)
    assert torch.equal(augment(images, kind, generator(1)), first)
    assert not torch.equal(augment(images, kind, generator(2)), first)


def test_without_augmentation_images_stay_as_they_are():
    images = torch.from_numpy(pixels(0, 5, 3, 16, 16))
    assert torch.equal(augment(images, "none", generator()), images)
