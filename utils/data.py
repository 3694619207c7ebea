"""Data sets as uint8 tensors: decoded once, held on the device, augmented there by tensor code."""

import hashlib
import http.client
import pickle
import shutil
import tarfile
import tempfile
import zipfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from utils.checkpoints import write_atomically
from utils.options import UsageError

TINY_IMAGENET = ("http://cs231n.stanford.edu/tiny-imagenet-200.zip", "90528d7ca1a48142e341f4ef8d21d0de")
DOWNLOAD_ERRORS = (OSError, RuntimeError, ValueError, http.client.HTTPException)
IMAGE_ENDINGS = {".jpg", ".jpeg", ".png", ".bmp", ".webp", ".ppm"}


class Split(NamedTuple):
    """images: (N, 3, S, S) uint8. labels: (N,) int64, indices into classes, the names of the classes.

    words: what people call the classes, synonyms between commas, where the names are codes (wnids); otherwise empty.
    """

    images: Tensor
    labels: Tensor
    classes: tuple[str, ...]
    words: tuple[str, ...] = ()

    def to(self, device: torch.device) -> "Split":
        return self._replace(images=self.images.to(device), labels=self.labels.to(device))

    def take(self, indices: Tensor) -> "Split":
        return self._replace(images=self.images[indices], labels=self.labels[indices])


def load_split(dataset: str, part: str, data_dir: str, image_size: int) -> Split:
    """Load the `train` or `test` part of a data set (a name of `options.DATASETS`) from, or into, data_dir.

    Errors: UsageError that names what is missing, corrupt or of another size, and how to get it.
    """
    sizes = {"cifar10": 32, "cifar100": 32, "tiny-imagenet": 64}
    if image_size != sizes.get(dataset, image_size):
        raise UsageError(
            f"{dataset} has images of side {sizes[dataset]}, not {image_size}; leave --image-size out, or name the "
            "data set that the checkpoint was trained on"
        )
    loaders = {"digits": _digits, "folder": _folder, "tiny-imagenet": _tiny_imagenet}
    return loaders.get(dataset, _cifar)(dataset, part, Path(data_dir), image_size)


def shuffled(count: int, seed: int) -> Tensor:
    """A permutation of `count` that depends on the seed alone."""
    return torch.from_numpy(np.random.default_rng(seed).permutation(count))


def batches(order: Tensor, batch_size: int) -> Iterator[Tensor]:
    """Indices of one batch after the other; the last, smaller one is kept. No indices, no batch."""
    if len(order):
        yield from order.split(batch_size)


def as_input(images: Tensor) -> Tensor:
    """uint8 images -> float32 in [0, 1], what every network here takes."""
    return images.float() / 255


def augment(images: Tensor, how: str, generator: torch.Generator) -> Tensor:
    """Augment a batch of uint8 images (N, 3, S, S) on its device.

    how: `crop` shifts each image by up to S / 8 pixels each way, zeros moving in (4 pixels at 32, as published);
    `crop-flip` also mirrors half of them; `none` returns them as they are.
    """
    if how == "none":
        return images
    count, size, pad = len(images), images.shape[-1], images.shape[-1] // 8
    windows = F.pad(images, (pad,) * 4).unfold(2, size, 1).unfold(3, size, 1)  # (N, 3, shifts, shifts, S, S), a view
    top, left = torch.randint(2 * pad + 1, (2, count), generator=generator, device=images.device)
    images = windows[torch.arange(count, device=images.device), :, top, left]
    if how == "crop-flip":
        mirrored = torch.rand(count, generator=generator, device=images.device) < 0.5
        images = torch.where(mirrored[:, None, None, None], images.flip(3), images)
    return images


def _digits(dataset: str, part: str, data_dir: Path, size: int) -> Split:
    """The 1,797 handwritten digits inside scikit-learn, in a fixed stratified split of 1,437 and 360."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    digits = load_digits()
    images = torch.from_numpy(digits.images).float()[:, None] / 16
    images = F.interpolate(images, size=(size, size), mode="bilinear").mul(255).round().byte().repeat(1, 3, 1, 1)
    train, test = train_test_split(np.arange(len(images)), test_size=360, stratify=digits.target, random_state=0)
    keep = torch.from_numpy(train if part == "train" else test)
    return Split(images[keep], torch.from_numpy(digits.target).long()[keep], tuple("0123456789"))


def _cifar(dataset: str, part: str, data_dir: Path, size: int) -> Split:
    """CIFAR-10 or -100 through torchvision, which reads the pickles inside only after their MD5 matched."""
    from torchvision.datasets import CIFAR10, CIFAR100

    source = {"cifar10": CIFAR10, "cifar100": CIFAR100}[dataset]
    try:
        data = source(str(data_dir), train=part == "train", download=True)
    except (*DOWNLOAD_ERRORS, tarfile.TarError, EOFError, KeyError, pickle.UnpicklingError) as error:
        raise UsageError(
            f"{dataset}: no intact copy in {data_dir} and none could be downloaded ({_first_line(error)}); put "
            f"{source.filename} (MD5 {source.tgz_md5}) from {source.url} into {data_dir}"
        ) from error
    images = torch.from_numpy(data.data).permute(0, 3, 1, 2).contiguous()
    return Split(images, torch.tensor(data.targets), tuple(data.classes))


def _tiny_imagenet(dataset: str, part: str, data_dir: Path, size: int) -> Split:
    """Tiny-ImageNet: 200 classes of 64x64, labels by sorted wnid; its published validation part is the test part."""
    root = data_dir / "tiny-imagenet-200"
    if not root.is_dir():
        _unpack_tiny_imagenet(data_dir)
    try:
        wnids = sorted(set((root / "wnids.txt").read_text().split()))
        if part == "train":
            pairs = [(f, wnid) for wnid in wnids for f in sorted((root / "train" / wnid / "images").iterdir())]
        else:
            lines = (root / "val" / "val_annotations.txt").read_text().splitlines()
            pairs = [(root / "val" / "images" / name, wnid) for name, wnid, *_ in map(str.split, filter(None, lines))]
        labels = torch.tensor([wnids.index(wnid) for _, wnid in pairs])
        words = root / "words.txt"  # of names for people alone, so it may be missing
        lines = words.read_text().splitlines() if words.is_file() else []
        named = dict(line.split("\t", 1) for line in lines if "\t" in line)
    except (OSError, ValueError) as error:
        raise UsageError(
            f"{root} is incomplete ({_first_line(error)}); remove it, and it is unpacked anew from the zip"
        ) from error
    images = _decoded([f for f, _ in pairs], 64, root / f"decoded-{part}.pt")
    return Split(images, labels, tuple(wnids), tuple(named.get(wnid, "").strip() or wnid for wnid in wnids))


def _unpack_tiny_imagenet(data_dir: Path) -> None:
    """Download the zip where it is missing, check it, unpack it beside its place and move it there whole."""
    from torchvision.datasets.utils import check_integrity, download_url, extract_archive

    url, md5 = TINY_IMAGENET
    archive = data_dir / "tiny-imagenet-200.zip"
    try:
        data_dir.mkdir(parents=True, exist_ok=True)
        if not check_integrity(str(archive), md5):
            download_url(url, str(data_dir), archive.name, md5)
        with tempfile.TemporaryDirectory(dir=data_dir) as scratch:
            extract_archive(str(archive), scratch)
            shutil.move(Path(scratch) / "tiny-imagenet-200", data_dir / "tiny-imagenet-200")
    except (*DOWNLOAD_ERRORS, zipfile.BadZipFile) as error:
        raise UsageError(
            f"tiny-imagenet: no intact copy in {data_dir} and none could be downloaded ({_first_line(error)}); put "
            f"{archive.name} (248,100,043 bytes, MD5 {md5}) from {url} into {data_dir}"
        ) from error


def _folder(dataset: str, part: str, data_dir: Path, size: int) -> Split:
    """DIR/train/<class>/* and DIR/test/<class>/* (or val), resized to size x size."""
    names = {"train": ("train",), "test": ("test", "val")}
    parts = {p: next((data_dir / n for n in names[p] if (data_dir / n).is_dir()), None) for p in names}
    for p, found in parts.items():
        if found is None:
            raise UsageError(
                f"{data_dir} has no folder {' or '.join(names[p])}; --data-dir needs train/<class>/ and "
                "test/<class>/ (or val/<class>/) inside"
            )
    classes = {
        p: sorted(d.name for d in root.iterdir() if d.is_dir() and d.name[0] != ".") for p, root in parts.items()
    }
    if len(classes["train"]) < 2:
        raise UsageError(f"{parts['train']} holds {len(classes['train'])} class folder; at least 2 are needed")
    if classes["train"] != classes["test"]:
        odd = sorted(set(classes["train"]) ^ set(classes["test"]))
        raise UsageError(f"classes of {parts['train']} and {parts['test']} differ: {', '.join(odd[:5])} is in one only")
    files, labels = [], []
    for label, name in enumerate(classes[part]):
        inside = sorted(f for f in (parts[part] / name).iterdir() if f.suffix.lower() in IMAGE_ENDINGS)
        if not inside:
            raise UsageError(f"{parts[part] / name} holds no image ({', '.join(sorted(IMAGE_ENDINGS))})")
        files += inside
        labels += [label] * len(inside)
    images = _decoded(files, size, data_dir / f"decoded-{part}-{size}.pt")
    return Split(images, torch.tensor(labels), tuple(classes[part]))


def _decoded(files: list[Path], size: int, cache: Path) -> Tensor:
    """Decode image files into (N, 3, size, size) uint8, or read an earlier run's cache of the same files."""
    try:
        stats = [
            (f.relative_to(cache.parent).as_posix(), (stat := f.stat()).st_size, stat.st_mtime_ns, stat.st_ino)
            for f in files
        ]
    except OSError as error:
        raise UsageError(f"{error.filename}: {error.strerror}; it is listed as an image of this data set") from error
    key = hashlib.sha256(repr((size, stats)).encode()).hexdigest()
    try:
        stored = torch.load(cache, weights_only=True)
        if stored["key"] == key and stored["images"].shape == (len(files), 3, size, size):
            return stored["images"]
    except (OSError, RuntimeError, EOFError, KeyError, TypeError, AttributeError, pickle.UnpicklingError):
        pass  # no cache yet, or one that was cut off: decode anew
    images = torch.empty(len(files), 3, size, size, dtype=torch.uint8)
    with ThreadPoolExecutor() as pool:
        decoded = pool.map(lambda f: _decode(f, size), files)
        for i, image in enumerate(tqdm(decoded, "decoding", len(files), unit="img", disable=None)):
            images[i] = image
    try:
        write_atomically(cache, lambda f: torch.save({"key": key, "images": images}, f))
    except OSError as error:
        print(f"images are decoded anew next time: {cache} cannot be written ({error.strerror})")
    return images


def _decode(file: Path, size: int) -> Tensor:
    from PIL import Image

    try:
        with Image.open(file) as image:
            if image.mode.startswith("I"):  # 16-bit grey, which convert() would clip at 255
                image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
            image = image.convert("RGB")
            if image.size != (size, size):
                image = image.resize((size, size), Image.Resampling.BILINEAR)
            return torch.from_numpy(np.array(image)).permute(2, 0, 1)
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise UsageError(f"{file}: not a readable image ({_first_line(error)}); replace or remove it") from error


def _first_line(error: BaseException) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]
