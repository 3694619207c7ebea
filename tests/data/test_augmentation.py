"""Crops and mirrored crops, image by image."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from tests.helpers import pixels
from utils.data.augmentation import augment


def generator(seed=0):
    """A generator of random numbers."""
    return torch.Generator().manual_seed(seed)


def random_images(count, size=16):
    """Images (N, 3, S, S) without a black pixel."""
    images = pixels(0, count, 3, size, size)
    return torch.from_numpy(images).clamp(min=1)


def places_of(crop, image):
    """Where a crop lies in the zero-padded image (3, S, S): a list of (mirrored, top, left)."""
    size = image.shape[-1]
    pad = size // 8
    padded = F.pad(image, (pad, pad, pad, pad))
    windows = padded.unfold(1, size, 1).unfold(2, size, 1)
    places = []
    for mirrored, window in enumerate((crop, crop.flip(2))):
        is_here = (windows == window[:, None, None]).all((0, 3, 4))
        for top, left in is_here.nonzero().tolist():
            places.append((mirrored, top, left))
    return places


@pytest.mark.parametrize("kind", ["crop", "crop-flip"])
@pytest.mark.parametrize("size", [16, 32])
def test_a_crop_is_a_window_of_the_padded_image(kind, size):
    images = random_images(300, size)
    before = images.clone()
    augmented = augment(images, kind, generator())
    assert augmented.dtype == torch.uint8
    assert torch.equal(images, before)

    places = []
    for crop, image in zip(augmented, images, strict=True):
        (place,) = places_of(crop, image)
        places.append(place)
    mirrored, tops, lefts = np.transpose(places)
    for shifts in (tops, lefts):  # all shifts, each about equally often
        counts = np.bincount(shifts, minlength=size // 4 + 1)
        assert counts.min() > 0.4 * counts.mean()
    if kind == "crop":
        assert sum(mirrored) == 0
    else:
        assert 90 < sum(mirrored) < 210


def test_augmentation_depends_on_its_generator_alone():
    images = random_images(40)
    state = torch.get_rng_state()
    first = augment(images, "crop-flip", generator(1))
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(99)
    again = augment(images, "crop-flip", generator(1))
    assert torch.equal(again, first)
    other = augment(images, "crop-flip", generator(2))
    assert not torch.equal(other, first)


def test_without_augmentation_images_stay_as_they_are():
    images = random_images(5)
    augmented = augment(images, "none", generator())
    assert torch.equal(augmented, images)
