"""Which images of a data set train, which choose the best epoch, and which report on it."""

from pathlib import Path
from typing import NamedTuple

import torch

from utils.data.datasets import (
    Split,
    load_extra,
    load_splits,
    parts_of,
    require_same_on_ranks,
    shuffled,
)
from utils.system.errors import UsageError
from utils.system.settings import Training

NAMES = {"val": "the val part", "test": "the test set"}  # in the log


class Data(NamedTuple):
    """The images of a run.

    selection: chooses the best epoch. test: reports on it, None where there are no such images; the
    same images as selection where `tested` equals `selected`, their names in the log. extra: the
    images of --extra-data, on the host. checksums: of each of these, by name.
    """

    train: Split
    selection: Split
    test: Split | None
    selected: str
    tested: str
    extra: Split | None
    checksums: dict[str, str]

    def to(self, device: torch.device) -> "Data":
        """Move what each epoch reads to a device; training labels are counted on the host."""
        train = self.train.to(device)._replace(labels=self.train.labels)
        return self._replace(train=train, selection=self.selection.to(device))


def load_training_data(settings: Training) -> Data:
    """Load the images of a run, on the CPU.

    Held-out training images (--val-size) select, else the val part of a folder, else the test part.
    Errors: UsageError where images are missing, or too few are left to train, or ranks have
    different ones.
    """
    held_out = settings.val_size
    present = parts_of(settings.dataset, Path(settings.data_dir))
    parts = [part for part in NAMES if part in present]
    if not parts and not held_out:
        parts = ["test"]  # loading it says what is missing
    limits = dict.fromkeys(parts, settings.limit_test)
    limits["train"] = None
    if settings.limit_train is not None:
        limits["train"] = held_out + settings.limit_train
    splits = load_splits(settings.dataset, limits, settings.data_dir, settings.image_size)

    train = splits["train"]
    if (held_out or settings.limit_train) and train.numbers is None:  # else it is shuffled already
        train = train.take(shuffled(len(train.labels), 0))
    train = train._replace(numbers=None)
    if held_out:
        rows = torch.arange(len(train.labels))
        if held_out > len(rows) - 2:
            raise UsageError(f"--val-size {held_out} leaves too few of {len(rows)} images")
        selection = train.take(rows[:held_out])
        selected = f"{held_out} held-out training images"
        train = train.take(rows[held_out:])
        test = splits[parts[-1]] if parts else None
    else:
        selection = splits[parts[0]]
        selected = NAMES[parts[0]]
        test = splits.get("test")
    tested = NAMES[parts[-1]] if parts else ""

    used = {"training": train, "selection": selection}
    if test is not None:
        used["test"] = test
    extra = None
    if settings.extra_data is not None:
        extra = load_extra(settings.extra_data, train)
        used["extra"] = extra
    checksums = require_same_on_ranks(settings.data_dir, used)
    return Data(train, selection, test, selected, tested, extra, checksums)
