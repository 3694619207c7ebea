"""What an evaluation keeps in files: verdicts of finished blocks, images of finished parts.

A stopped evaluation goes on from these files, and a later one uses them again.
"""

import hashlib
import json
import logging
import re
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from utils.attacks import margins
from utils.data.datasets import Split, checksum_of
from utils.data.subject import images_checksum
from utils.system.errors import UsageError
from utils.system.files import read_arrays, write_arrays

WORTH_CACHING = 10  # seconds of a part of an attack that are worth a file


class Verdicts(NamedTuple):
    """What an attack finds on a block of n images.

    right: (n,) bool. fooled: (m,), places in the block of the images that the attack turns wrong.
    images: (m, 3, S, S), their adversarial ones. logits: (m, C), the network's answers to them.
    notes: what a reader must know. parts: names of the attack's parts, how many images each was
    given, and seconds. made: when and where, if an earlier evaluation found them.
    """

    right: Tensor
    fooled: Tensor
    images: Tensor
    logits: Tensor
    seconds: float
    notes: list[str]
    parts: list[tuple[str, int, float]]
    made: str = ""


class WorstImages:
    """For each image the adversarial one with the largest margin, or the image if none fools it.

    images: (N, 3, S, S) float32 in [0, 1], all on the CPU. logits: (N, C), the network's answers.
    natural_images, natural_logits: those of the images themselves.
    """

    def __init__(self, images: Tensor, logits: Tensor, labels: Tensor) -> None:
        """Begin with the images themselves."""
        self.natural_images = images
        self.natural_logits = logits
        self.labels = labels
        self.images = images.clone()
        self.logits = logits.clone()
        self.margins = torch.full(labels.shape, -torch.inf)  # of adversarial images

    @property
    def fooled(self) -> Tensor:
        """Which images have an adversarial one, (N,) bool."""
        return self.margins > -torch.inf

    def take(self, rows: Tensor, images: Tensor, logits: Tensor) -> None:
        """Take what is worse than before, for the images at `rows`, which all fool the network."""
        new_margins = margins(logits, self.labels[rows])
        worse = new_margins > self.margins[rows]
        rows = rows[worse]
        self.images[rows] = images[worse]
        self.logits[rows] = logits[worse]
        self.margins[rows] = new_margins[worse]

    def among(self, candidates: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return what `take` takes, of the fooled ones among candidates, (N,) bool."""
        rows = (self.fooled & candidates).nonzero().squeeze(1)
        return rows, self.images[rows], self.logits[rows]


class BlockCache(NamedTuple):
    """Verdicts of finished blocks, an npz file for each attack and block.

    A file is named by the network, the images, the attack, its settings and its version.
    network: its checksum. made: when and where this evaluation makes verdicts.
    """

    folder: Path
    network: str
    made: str

    def file(self, name: str, settings: dict[str, object], block: Split) -> Path:
        """Return the file of an attack's verdicts on a block."""
        about = json.dumps([self.network, name, settings], sort_keys=True)
        digest = hashlib.sha256(f"{about} {images_checksum(block)}".encode())
        readable = re.sub("[^a-z0-9]+", "-", name.lower())
        return self.folder / f"{readable}-{digest.hexdigest()[:24]}.npz"

    def load(self, file: Path) -> Verdicts | None:
        """Read verdicts; None where there are none that can be read."""
        try:
            values, arrays = read_arrays(file)
        except UsageError:
            return None
        tensors = {key: torch.from_numpy(array) for key, array in arrays.items()}
        return Verdicts(**tensors, **values)

    def save(self, file: Path, verdicts: Verdicts) -> None:
        """Write verdicts, so that a later evaluation, or this one after a stop, reads them."""
        values = {**verdicts._asdict(), "made": self.made}
        arrays = {key: values.pop(key).numpy() for key in ("right", "fooled", "images", "logits")}
        write_arrays(file, values, **arrays)


class Monitor(logging.Handler):
    """Watches an attack of several parts on one block of images, and caches finished parts.

    Each part draws its noise from its own seed. So a part finds the same images, whether the parts
    before it were run or read from `file`. (The library's own state file cannot do that: it forgets
    the images of earlier parts, and may repeat a finished part on fewer images.)

    show: takes a line about what is done at the moment. logger: for the library, whose lines come
    here. warnings: lines that the table shows. parts: of each its name, the number of images that
    it was given, and seconds. arrays, seconds: the images of cached parts, and what they took.
    """

    def __init__(self, file: Path, show: Callable[[str], None]) -> None:
        """Read what an earlier process has cached in `file`."""
        super().__init__()
        self.file = file
        self.show = show
        self.logger = logging.Logger("attack")
        self.logger.addHandler(self)
        self.warnings = []
        self.parts = []
        self.seconds = {}
        self.arrays = {}
        with suppress(UsageError):  # nothing is cached
            self.seconds, self.arrays = read_arrays(file)

    def emit(self, record: logging.LogRecord) -> None:
        """Take a line of the library."""
        if record.levelno >= logging.WARNING:
            self.warnings.append(record.getMessage())
        else:
            self.show(record.getMessage())

    def run_part(
        self, name: str, attack: Callable[..., Tensor], x: Tensor, labels: Tensor, *others: Tensor
    ) -> Tensor:
        """Return attack(x, labels, *others), or what an earlier process found for x and labels."""
        key = f"{name} {checksum_of([x, labels])[:24]}"
        if key not in self.arrays:
            began = time.perf_counter()
            self.arrays[key] = attack(x, labels, *others).detach().cpu().numpy()
            self.seconds[key] = time.perf_counter() - began
            if self.seconds[key] >= WORTH_CACHING:
                write_arrays(self.file, self.seconds, **self.arrays)
        self.parts.append((name, len(x), self.seconds[key]))
        return torch.from_numpy(self.arrays[key]).to(x)
