"""Data sets as uint8 tensors: decoded once, held on the device, augmented there by tensor code."""

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from utils.data.augmentation import augment as augment
from utils.data.folders import LAYOUT, decode, find_parts, list_images, visible_folders
from utils.system import distributed
from utils.system.errors import UsageError, first_line
from utils.system.files import locked

TINY_IMAGENET = (
    "http://cs231n.stanford.edu/tiny-imagenet-200.zip",
    "90528d7ca1a48142e341f4ef8d21d0de",
)
TINY_FOLDER = "tiny-imagenet-200"
FASHION_FOLDER = "FashionMNIST/raw"  # as torchvision has it

# By part: beginning of the names of Fashion-MNIST's files, and checksum of what they hold.
FASHION = {
    "train": ("train", "16d82e2b505296aa2b78bd5ea0992634f30419a4c97def7c907d154a35ac6157"),
    "test": ("t10k", "9f1ec356a747bfe4ebab3cfb722d3694c9ca737e2570f6f90cf31d7b6fd689d4"),
}

# (images (n, 3, S, S) in [0, 1], labels (n,), numbers (n,)) -> answers, n rows each
Work = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, ...]]
Progress = Callable[[int], None]  # gets the number of images of each batch that is done


class Split(NamedTuple):
    """A part of a data set: train, val or test.

    images: (N, 3, S, S) uint8. labels: (N,) int64, indices into classes.
    classes: names of the classes. words: where those are codes (wnids), what people call the
    classes, synonyms between commas; otherwise empty.
    numbers: (N,) places of the images in the whole part, which do not depend on a limit; None of
    training images. total: how many images that part has.
    note: what to know of the images: files left out, another part taken, other files.
    files: image files that `load_split` decodes; until then images holds places among them.
    """

    images: Tensor
    labels: Tensor
    classes: tuple[str, ...]
    words: tuple[str, ...] = ()
    numbers: Tensor | None = None
    total: int = 0
    note: str = ""
    files: tuple[str, ...] = ()

    def to(self, device: torch.device) -> "Split":
        """Move images and labels to a device."""
        return self._replace(images=self.images.to(device), labels=self.labels.to(device))

    def take(self, indices: Tensor) -> "Split":
        """Take the images at `indices` (n,) int64, each tensor on its own device."""

        def select(values: Tensor) -> Tensor:
            return values.index_select(0, indices.to(values.device, non_blocking=True))

        numbers = None if self.numbers is None else select(self.numbers)
        return self._replace(
            images=select(self.images), labels=select(self.labels), numbers=numbers
        )


def load_split(
    dataset: str, part: str, data_dir: str, image_size: int, limit: int | None = None
) -> Split:
    """Load a part of a data set (a name of `LOADERS`) from data_dir; download it where it can be.

    part: `train` or `test`; of a `folder` also `val`, which is its test part where it has no other.
    limit: how many images of `subset` to take; no other image is decoded.
    Errors: UsageError that says what is missing, damaged or of another size, and how to get it.
    """
    if dataset not in LOADERS:
        raise UsageError(f"--dataset {dataset} is unknown; name one of {', '.join(LOADERS)}")
    split = LOADERS[dataset](dataset, part, Path(data_dir).expanduser(), image_size)
    split = subset(split, limit)
    if split.files:
        images = decode([split.files[place] for place in split.images], image_size)
        split = split._replace(images=images, files=())
    return split


def checksum_of(tensors: Iterable[Tensor]) -> str:
    """Return a checksum of tensors, in hexadecimal digits."""
    digest = hashlib.sha256()
    for tensor in tensors:
        flat = tensor.detach().cpu().contiguous().reshape(-1)
        digest.update(flat.view(torch.uint8).numpy())
    return digest.hexdigest()


def require_same_on_ranks(data_dir: str, splits: Mapping[str, Split]) -> dict[str, str]:
    """Return a checksum of the images, labels and classes of each split, by its name.

    Errors: UsageError on every rank where ranks have other data.
    """
    checksums = {}
    for name, split in splits.items():
        values = checksum_of([split.images, split.labels])
        checksums[name] = hashlib.sha256(f"{split.classes} {values}".encode()).hexdigest()
    if any(others != checksums for others in distributed.gathered(checksums)):
        raise UsageError(f"{data_dir} differs between ranks; give each node the same files")
    return checksums


def shuffled(count: int, seed: int) -> Tensor:
    """Return a permutation of `count` numbers that depends on the seed alone."""
    return torch.from_numpy(np.random.default_rng(seed).permutation(count))


def subset(split: Split, limit: int | None) -> Split:
    """Take the first `limit` images after a fixed shuffle; all, in order, of no more than that."""
    total = len(split.labels)
    numbers = torch.arange(total)
    if limit is not None and limit < total:
        numbers = shuffled(total, 0)[:limit]
        split = split.take(numbers)
    return split._replace(numbers=numbers, total=total)


def load_extra(path: str, like: Split) -> Split:
    """Load additional training images of an npz, for the classes of `like`, onto the host.

    The format is that of published generated data: `image` (M, S, S, 3) uint8, `label` (M,) int.
    Errors: UsageError where the file has another format or other classes.
    """
    side = like.images.shape[-1]
    classes = len(like.classes)
    try:
        with np.load(path) as file:
            images = file["image"]
            labels = file["label"]
        if images.dtype != np.uint8 or images.shape != (*labels.shape, side, side, 3):
            raise ValueError(f"image is {images.dtype} {images.shape}, label {labels.shape}")
        if not np.array_equal(np.unique(labels), np.arange(classes)):
            raise ValueError("label has other classes")
    except Exception as error:  # damaged archives make numpy raise nearly anything
        raise UsageError(
            f"--extra-data {path} must be an npz of image, uint8 (M, {side}, {side}, 3), and "
            f"label, (M,), of all {classes} classes ({first_line(error)})"
        ) from error
    return like._replace(
        images=torch.from_numpy(images).permute(0, 3, 1, 2),
        labels=torch.from_numpy(labels.astype(np.int64)),
        numbers=None,
    )


def with_extra(batch: Split, extra: Split, count: int, seeds: tuple[int, ...]) -> Split:
    """Shuffle `count` images of `extra`, drawn with replacement, into a batch.

    Which images and in which order depends on `seeds` alone.
    """
    generator = np.random.default_rng(seeds)
    drawn = extra.take(torch.from_numpy(generator.integers(len(extra.labels), size=count)))
    images = drawn.images.to(batch.images.device, non_blocking=True)
    labels = drawn.labels.to(batch.labels.device)
    both = batch._replace(
        images=torch.cat([batch.images, images]),
        labels=torch.cat([batch.labels, labels]),
        numbers=None,
    )
    return both.take(torch.from_numpy(generator.permutation(len(both.labels))))


def batches(order: Tensor, batch_size: int) -> Sequence[Tensor]:
    """Return the indices of one batch after the other; the last one may be smaller."""
    return order.split(batch_size) if len(order) else ()


def as_input(images: Tensor) -> Tensor:
    """Convert uint8 images to float32 in [0, 1], which every network here takes."""
    return images.to(torch.float32, copy=True).div_(255)  # never in place


def over_images(
    split: Split,
    batch_size: int,
    work: Work,
    progress: Progress | None = None,
    shared: bool = True,
) -> tuple[Tensor, ...]:
    """Call `work` on the images of a split, of which there are some, batch by batch.

    Returns each of its answers for all N images, (N, ...), in their order, on the CPU.
    shared: ranks share the images, `batch_size` at a time for each of them, and all return all
    answers; otherwise this process goes over all images alone.
    """
    ranks = distributed.world() if shared else 1
    answers = []
    for positions in batches(torch.arange(len(split.labels)), batch_size * ranks):
        share = positions[distributed.rank() :: ranks] if shared else positions
        if len(share):
            batch = split.take(share)
            answer = work(as_input(batch.images), batch.labels, batch.numbers)
            answers.append((share, *(values.cpu() for values in answer)))
        if progress is not None:
            progress(len(positions))

    if shared:
        answers = list(chain.from_iterable(distributed.gathered(answers)))
    positions, *results = (torch.cat(parts) for parts in zip(*answers, strict=True))
    order = positions.argsort()
    return tuple(result[order] for result in results)


def _digits(dataset: str, part: str, data_dir: Path, size: int) -> Split:
    """Load the 1,797 digits of scikit-learn, in a fixed stratified split of 1,437 and 360."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    digits = load_digits()
    labels = torch.from_numpy(digits.target).long()
    images = torch.from_numpy(digits.images).float()[:, None] / 16
    images = F.interpolate(images, size=(size, size), mode="bilinear")
    images = images.mul(255).round().byte().repeat(1, 3, 1, 1)
    train, test = train_test_split(
        np.arange(len(images)), test_size=360, stratify=digits.target, random_state=0
    )
    chosen = torch.from_numpy(train if part == "train" else test)
    return Split(images[chosen], labels[chosen], tuple("0123456789"))


@contextmanager
def _downloading(dataset: str, data_dir: Path, needed: str) -> Iterator[Path]:
    """Download a data set in the context, where no other process does.

    Yields a folder in data_dir for what is not whole yet; it is removed in the end.
    Errors: UsageError that says which files are `needed` in data_dir, and where to get them.
    """
    try:
        data_dir.mkdir(parents=True, exist_ok=True)
        lock = locked(data_dir / f".{dataset}.lock", wait=True)
        with lock, TemporaryDirectory(dir=data_dir) as scratch:
            yield Path(scratch)
    except Exception as error:  # networks and archives raise nearly anything
        raise UsageError(
            f"{dataset}: no intact copy in {data_dir} and none could be downloaded "
            f"({first_line(error)}); put {needed} into {data_dir}"
        ) from error


def _cifar(dataset: str, part: str, data_dir: Path, size: int) -> Split:
    """Load CIFAR-10 or -100 by torchvision, which unpickles files after their MD5 has matched."""
    from torchvision.datasets import CIFAR10, CIFAR100

    if size != 32:
        raise UsageError(
            f"{dataset} has images of side 32, not {size}; leave --image-size out, "
            "or name the data set that the checkpoint was trained on"
        )
    source = CIFAR10 if dataset == "cifar10" else CIFAR100
    is_train = part == "train"
    try:
        data = source(data_dir, train=is_train)
    except RuntimeError:  # it is missing or damaged
        needed = f"{source.filename} (MD5 {source.tgz_md5}) from {source.url}"
        with _downloading(dataset, data_dir, needed):
            data = source(data_dir, train=is_train, download=True)
    images = torch.from_numpy(data.data).permute(0, 3, 1, 2).contiguous()
    return Split(images, torch.tensor(data.targets), tuple(data.classes))


def _fashion_mnist(dataset: str, part: str, data_dir: Path, size: int) -> Split:
    """Load Fashion-MNIST; its 28x28 pixels are padded to 32x32, or scaled to any other side."""
    from torchvision.datasets import FashionMNIST

    prefix, published = FASHION[part]
    names = [f"{prefix}-images-idx3-ubyte", f"{prefix}-labels-idx1-ubyte"]
    files = _find_idx(data_dir, names) or _get_fashion_mnist(data_dir, names)
    try:
        pixels, labels = _read_idx(files)
    except Exception as error:  # gzip and torchvision raise nearly anything
        raise UsageError(
            f"{' or '.join(map(str, files))} is damaged ({first_line(error)}); remove them, "
            "and they are downloaded anew"
        ) from error
    note = ""
    if checksum_of([pixels, labels.byte()]) != published:
        note = f"{files[0].parent} has other images than the published ones of {dataset}"

    images = pixels[:, None]
    if size == 32:
        images = F.pad(images, (2, 2, 2, 2))
    else:
        images = F.interpolate(images.float(), (size, size), mode="bilinear", antialias=True)
        images = images.round().byte()
    return Split(images.repeat(1, 3, 1, 1), labels, tuple(FashionMNIST.classes), note=note)


def _find_idx(data_dir: Path, names: list[str]) -> list[Path]:
    """Find files, with or without .gz, in a folder or where torchvision keeps Fashion-MNIST.

    Returns no file where one of them is missing.
    """
    files = []
    for name in names:
        places = [data_dir / name, data_dir / FASHION_FOLDER / name]
        places += [place.with_suffix(".gz") for place in places]
        files += [place for place in places if place.is_file()][:1]
    return files if len(files) == len(names) else []


def _get_fashion_mnist(data_dir: Path, names: list[str]) -> list[Path]:
    """Download Fashion-MNIST to where torchvision keeps it; half a file is never left."""
    from torchvision.datasets import FashionMNIST

    source = f"{FashionMNIST.mirrors[0]} or Debian's package dataset-fashion-mnist"
    needed = f"{'.gz and '.join(names)}.gz from {source}"
    with _downloading("fashion-mnist", data_dir, needed) as scratch:
        if not _find_idx(data_dir, names):  # no other process was faster
            FashionMNIST(scratch, download=True)
            folder = data_dir / FASHION_FOLDER
            folder.mkdir(parents=True, exist_ok=True)
            for file in (scratch / FASHION_FOLDER).glob("*-ubyte"):
                file.replace(folder / file.name)
    return _find_idx(data_dir, names)


def _read_idx(files: list[Path]) -> tuple[Tensor, Tensor]:
    """Read two idx files, with or without .gz -> (N, 28, 28) uint8, (N,) int64 from 0 to 9."""
    from torchvision.datasets.mnist import read_image_file, read_label_file
    from torchvision.datasets.utils import extract_archive

    with TemporaryDirectory() as scratch:
        files = [extract_archive(file, scratch) if file.suffix == ".gz" else file for file in files]
        images = read_image_file(files[0])
        labels = read_label_file(files[1])
    if images.shape != (len(labels), 28, 28) or labels.max() > 9:
        raise ValueError(f"images {tuple(images.shape)}, {len(labels)} labels up to {labels.max()}")
    return images, labels


def _of_files(files: list[tuple[str, int]], classes: list[str], words: Sequence[str] = ()) -> Split:
    """Make a split of files and their labels."""
    names, labels = zip(*files, strict=True)
    places = torch.arange(len(names))
    return Split(places, torch.tensor(labels), tuple(classes), tuple(words), files=names)


def _tiny_imagenet(dataset: str, part: str, data_dir: Path, size: int) -> Split:
    """List Tiny-ImageNet: 200 classes by sorted wnid; its validation part is the test part."""
    root = data_dir / TINY_FOLDER
    if not root.is_dir():
        _get_tiny_imagenet(data_dir)
    try:
        wnids = sorted((root / "wnids.txt").read_text().split())
        if part == "train":
            files, _ = list_images(root / "train", wnids)
        else:
            files = _list_tiny_validation(root / "val", wnids)
        lines = (root / "words.txt").read_text(encoding="utf-8").splitlines()
        words = dict(line.split("\t", 1) for line in lines)
        return _of_files(files, wnids, [words[wnid] for wnid in wnids])
    except (OSError, ValueError, LookupError, UsageError) as error:
        raise UsageError(
            f"{root} is incomplete ({first_line(error)}); remove it, "
            "and it is unpacked anew from the zip"
        ) from error


def _list_tiny_validation(folder: Path, wnids: list[str]) -> list[tuple[str, int]]:
    """List the validation images by their annotations.

    Many people move the images into a folder for each class; they are found there, too.
    """
    paths = {path.name: str(path) for path in folder.rglob("*.JPEG")}
    files = []
    for line in (folder / "val_annotations.txt").read_text().splitlines():
        name, wnid = line.split()[:2]
        files.append((paths[name], wnids.index(wnid)))
    return files


def _get_tiny_imagenet(data_dir: Path) -> None:
    """Download the zip where it is missing, and unpack it; half a folder is never left."""
    from torchvision.datasets.utils import download_and_extract_archive

    url, md5 = TINY_IMAGENET
    archive = f"{TINY_FOLDER}.zip"
    needed = f"{archive} (MD5 {md5}) from {url}"
    with _downloading("tiny-imagenet", data_dir, needed) as scratch:
        if not (data_dir / TINY_FOLDER).is_dir():  # no other process or rank was faster
            download_and_extract_archive(url, data_dir, scratch, archive, md5=md5)
            (scratch / TINY_FOLDER).rename(data_dir / TINY_FOLDER)


def _folder(dataset: str, part: str, data_dir: Path, size: int) -> Split:
    """List the images of DIR/train/<class>/, DIR/val/<class>/ or DIR/test/<class>/."""
    parts = find_parts(data_dir)
    notes = []
    if part == "test" and "test" not in parts and "val" in parts:
        part = "val"
        notes.append(f"{parts[part]} taken as test part")
    if part not in parts:
        raise UsageError(f"{data_dir} has no {part} part; {LAYOUT}")

    root = parts[part]
    train = parts.get("train", root)
    classes = visible_folders(train)
    different = sorted(set(classes) ^ set(visible_folders(root)))
    if len(classes) < 2 or different:
        raise UsageError(
            f"{train} and {root} need the same folders, at least 2, one for each class; in one "
            f"only: {', '.join(different[:5]) or 'none'}"
        )
    files, skipped = list_images(root, classes)
    if skipped:
        notes.append(f"skipped {len(skipped)} non-image files in {root}, such as {skipped[0]}")
    return _of_files(files, classes)._replace(note="; ".join(notes))


LOADERS = {
    "cifar10": _cifar,
    "cifar100": _cifar,
    "tiny-imagenet": _tiny_imagenet,
    "digits": _digits,
    "fashion-mnist": _fashion_mnist,
    "folder": _folder,
}
