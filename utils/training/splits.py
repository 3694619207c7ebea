"""Which images of a data set train, which choose the best epoch, and which report on it."""

from pathlib import Path
from typing import NamedTuple

import torch

from utils.data.datasets import (
    Split,
    checksum_of,
    load_extra,
    load_split,
    require_same_on_ranks,
    shuffled,
)
from utils.data.folders import find_parts
from utils.system.errors import UsageError
from utils.system.settings import Training

# Of the parts of a data set those that evaluate, and what the log calls them
NAMES = {"val": "the val part", "test": "the test set"}


class Data(NamedTuple):
    """The images of a run.

    selection: chooses the best epoch. test: reports on it; the same images where `tested` equals
    `selected`, their names in the log. extra: the images of --extra-data, on the host. checksums:
    of each of these, by name.
    """

    train: Split
    selection: Split
    test: Split
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
    The last of these reports. Errors: UsageError where images are missing, or too few are left to
    train, or ranks have different ones.
    """
    held_out = settings.val_size
    parts = ["test"]
    if settings.dataset == "folder":
        present = find_parts(Path(settings.data_dir))
        parts = [part for part in NAMES if part in present]
        if not parts and not held_out:
            parts = ["test"]  # loading it says what is missing

    def load(part: str, limit: int | None) -> Split:
        return load_split(settings.dataset, part, settings.data_dir, settings.image_size, limit)

    evaluated = [(load(part, settings.limit_test), NAMES[part]) for part in parts]
    limit = settings.limit_train
    train = load("train", None if limit is None else held_out + limit)
    if settings.dataset == "folder":
        evaluated = [(with_copies_noted(split, train), name) for split, name in evaluated]
    is_whole = len(train.labels) == train.total  # else it is shuffled already
    if is_whole and (held_out or limit):
        train = train.take(shuffled(len(train.labels), 0))
    train = train._replace(numbers=None)
    if held_out:
        rows = torch.arange(len(train.labels))
        if held_out > len(rows) - 2:
            raise UsageError(f"--val-size {held_out} leaves too few of {len(rows)} images")
        name = f"{held_out} held-out training images"
        selection = train.take(rows[:held_out])._replace(numbers=torch.arange(held_out))
        evaluated.insert(0, (selection, name))
        train = train.take(rows[held_out:])
    selection, selected = evaluated[0]
    test, tested = evaluated[-1]

    used = {"training": train, "selection": selection, "test": test}
    extra = None
    if settings.extra_data is not None:
        extra = load_extra(settings.extra_data, train)
        used["extra"] = extra
    checksums = require_same_on_ranks(settings.data_dir, used)
    return Data(train, selection, test, selected, tested, extra, checksums)


def with_copies_noted(split: Split, train: Split) -> Split:
    """Return a split whose note says how many of its images are copies of training images."""
    known = {checksum_of([image]) for image in train.images}
    copies = sum(checksum_of([image]) in known for image in split.images)
    if not copies:
        return split
    note = f"{copies} images that evaluate are copies of training images"
    return split._replace(note="; ".join(filter(None, [split.note, note])))
