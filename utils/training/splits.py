"""Which images of a data set train, which choose the best epoch, and which report on it."""

from pathlib import Path
from typing import NamedTuple

import torch

from utils.data.datasets import Split, load_extra, load_splits, parts_of, shuffled
from utils.system.errors import UsageError
from utils.system.settings import Training


class Data(NamedTuple):
    """The images of a run.

    selection: chooses the best epoch. test: reports on it, None where there are no such images; the
    same images as selection where `tested` equals `selected`, their names in the log. extra: the
    images of --extra-data, on the host.
    """

    train: Split
    selection: Split
    test: Split | None
    selected: str = "the test set"
    tested: str = "the test set"
    extra: Split | None = None

    def to(self, device: torch.device) -> "Data":
        """Move what each epoch reads to a device; training labels are counted on the host."""
        train = self.train.to(device)._replace(labels=self.train.labels)
        return self._replace(train=train, selection=self.selection.to(device))


def load_training_data(settings: Training) -> Data:
    """Load the images of a run, on the CPU.

    Held-out training images (--val-size) select, else the val part of a folder, else the test part.
    Errors: UsageError where images are missing, or too few are left to train.
    """
    held_out = settings.val_size
    parts = parts_of(settings.dataset, Path(settings.data_dir))
    tested = "test" if "test" in parts else "val"
    selecting = "val" if "val" in parts else "test"

    limits = {}
    if not held_out:
        limits[selecting] = settings.limit_test
    if not held_out or tested in parts:
        limits[tested] = settings.limit_test
    limits["train"] = None
    if settings.limit_train is not None:
        limits["train"] = held_out + settings.limit_train
    splits = load_splits(settings.dataset, limits, settings.data_dir, settings.image_size)

    train = splits["train"]
    order = torch.arange(len(train.labels))
    if train.numbers is None:  # not a limited part, which is shuffled already
        order = shuffled(len(train.labels), 0)
    train = train._replace(numbers=None)
    names = {"val": "the val part", "test": "the test set"}
    if held_out:
        if held_out > len(order) - 2:
            raise UsageError(f"--val-size {held_out} leaves too few of {len(order)} images")
        selection = train.take(order[:held_out])
        selected = f"{held_out} held-out training images"
        test = splits.get(tested)
    else:
        selection = splits[selecting]
        selected = names[selecting]
        test = splits["test"] if tested == "test" else None
    if held_out or settings.limit_train is not None:
        train = train.take(order[held_out:][: settings.limit_train])

    extra = None
    if settings.extra_data is not None:
        extra = load_extra(settings.extra_data, train)
    return Data(train, selection, test, selected, names[tested], extra)
