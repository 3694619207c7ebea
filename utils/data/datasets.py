"""Data sets as uint8 tensors: decoded once, held on the device, augmented there by tensor code."""

import hashlib
import os
import re
import shutil
import warnings
import zipfile
from collections import Counter
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from utils.system import distributed
from utils.system.checkpoints import ordinary, read, save
from utils.system.errors import UsageError, first_line
from utils.system.files import locked

TINY_IMAGENET = ("http://cs231n.stanford.edu/tiny-imagenet-200.zip", "90528d7ca1a48142e341f4ef8d21d0de")
TINY_IMAGES = {"train": 100_000, "test": 10_000}
MOST_PIXELS = 2**26  # of an image file; larger than any camera's
IMAGE_ENDINGS = {".jpg", ".jpeg", ".jfif", ".png", ".bmp", ".webp", ".tif", ".tiff", ".gif"}
IMAGE_ENDINGS |= {".ppm", ".pgm", ".pbm", ".pnm"}
IMAGE_FORMATS = ("JPEG", "PNG", "BMP", "WEBP", "PPM", "TIFF", "GIF")  # Pillow would take others, whatever the name says
DECODING = 2  # raised when image files become other tensors, so that caches from before are not taken
PARTS = {"train": "train(ing)?", "val": "val(id|idation)?", "test": "test(ing)?"}  # how people name a folder's parts
LAYOUT = "--data-dir needs train/<class>/ and test/<class>/ (or val/<class>/, or to train with --val-size)"


class Split(NamedTuple):
    """images: (N, 3, S, S) uint8. labels: (N,) int64, indices into classes, the names of the classes.

    words: what people call the classes, synonyms between commas, where the names are codes (wnids); otherwise empty.
    numbers: (N,) the images' places in the whole part, where this is a subset of it; otherwise None. whole: how many
    images that part has, then. note: what to know of a folder: files left out, another part taken.
    """

    images: Tensor
    labels: Tensor
    classes: tuple[str, ...]
    words: tuple[str, ...] = ()
    numbers: Tensor | None = None
    whole: int = 0
    note: str = ""

    def to(self, device: torch.device) -> "Split":
        return self._replace(images=self.images.to(device), labels=self.labels.to(device))

    def take(self, indices: Tensor) -> "Split":
        """The images at `indices` (n,), int64, and what belongs to them, each on its own device."""

        def taken(values: Tensor) -> Tensor:
            return values.index_select(0, indices.to(values.device, non_blocking=True))

        numbers = None if self.numbers is None else taken(self.numbers)
        return self._replace(images=taken(self.images), labels=taken(self.labels), numbers=numbers)


class Listed(NamedTuple):
    """A split whose images, (N, 0) so far, are still files. cache: where they are kept once decoded."""

    split: Split
    files: list[Path]
    cache: Path


def load_split(dataset: str, part: str, data_dir: str, image_size: int, limit: int | None = None) -> Split:
    """Load a part of a data set (a name of `recipes.DATASETS`) from, or into, data_dir; what `subset` takes of it.

    part: `train` or `test`; of a `folder` also `val`, which is its test part where it has no other.
    Errors: UsageError that names what is missing, corrupt or of another size, and how to get it.
    """
    return load_splits(dataset, {part: limit}, data_dir, image_size)[part]


def load_splits(dataset: str, limits: Mapping[str, int | None], data_dir: str, image_size: int) -> dict[str, Split]:
    """`load_split` of each part that `limits` names; images that cannot be read are named once, for all parts."""
    sizes = {"cifar10": 32, "cifar100": 32, "tiny-imagenet": 64}
    if image_size != sizes.get(dataset, image_size):
        mend = "leave --image-size out, or name the data set that the checkpoint was trained on"
        raise UsageError(f"{dataset} has images of side {sizes[dataset]}, not {image_size}; {mend}")
    if dataset not in LOADERS:
        raise UsageError(f"unknown data set {dataset!r}; known: {', '.join(LOADERS)}")
    whole = [LOADERS[dataset](dataset, part, Path(os.path.expanduser(data_dir)), image_size) for part in limits]
    found = [subset(part, limit) for part, limit in zip(whole, limits.values(), strict=True)]
    count, unreadable = sum(len(part.files) for part in found if isinstance(part, Listed)), []
    if count and distributed.first():
        print(f"{count:,} images of side {image_size} take {count * 3 * image_size**2 / 1e6:,.1f} MB of memory")
    loaded = [_decoded(part, image_size, unreadable) if isinstance(part, Listed) else part for part in found]
    if unreadable:
        named = sorted(unreadable)[:10] + [f"and {len(unreadable) - 10} more"] * (len(unreadable) > 10)
        raise UsageError(f"replace or remove {len(unreadable)} of {count} images: {'; '.join(named)}")
    splits = dict(zip(limits, loaded, strict=True))
    if dataset == "folder" and "train" in splits:
        splits |= {part: noted(split, splits["train"], part) for part, split in splits.items() if part != "train"}
    for part, split in splits.items():
        if (wrong := _flaw(split, image_size)) is not None:
            raise UsageError(f"{dataset}, {part} part, in {data_dir}: {wrong}; get the data set anew")
    return splits


def noted(split: Split, train: Split, part: str) -> Split:
    """A split whose note says how many of its images are copies of training images, pixel by pixel."""

    def checksums(images: Tensor) -> list[bytes]:
        return [hashlib.blake2b(image.numpy(), digest_size=16).digest() for image in images]

    known = set(checksums(train.images))
    copies = sum(checksum in known for checksum in checksums(split.images))
    if copies == 0:
        return split
    note = f"{copies} of {len(split.images)} images of the {part} part are copies of training images"
    return split._replace(note="; ".join(filter(None, [split.note, note])))


def _flaw(split: Split, size: int) -> str | None:
    """What in a split is not as `Split` says, None where all is. Checked once here, so that no step needs to."""
    images, labels, classes = split[:3]
    if images.dtype != torch.uint8 or images.shape[1:] != (3, size, size):
        return f"images are {images.dtype} of shape {tuple(images.shape)}, not uint8 of (N, 3, {size}, {size})"
    if labels.dtype != torch.int64 or labels.shape != images.shape[:1] or not len(labels):
        return f"labels are {labels.dtype} of shape {tuple(labels.shape)}, not int64, one for each of {len(images)}"
    outside = ((labels < 0) | (labels >= len(classes))).nonzero()
    if len(outside):
        return f"image {int(outside[0])} has label {int(labels[outside[0]])}, of {len(classes)} classes"
    return None


def require_same_on_ranks(where: str, *splits: Split) -> tuple[str, ...]:
    """A checksum of each split's images, labels and classes; UsageError on every rank where nodes have others."""
    sums = ()
    for split in splits:
        digest = hashlib.sha256(repr(split.classes).encode())
        for tensor in (split.images, split.labels):
            for part in tensor.split(10_000):  # of --extra-data a copy in another order
                digest.update(part.contiguous().numpy())
        sums += (digest.hexdigest()[:32],)
    if len(set(distributed.gathered(sums))) > 1:
        raise UsageError(f"{where} holds other data for one rank than for another; give each node the same files")
    return sums


def numbers_of(split: Split) -> Tensor:
    """The images' numbers in the whole part, which --n-examples does not change -> (N,) on the CPU."""
    return torch.arange(len(split.labels)) if split.numbers is None else split.numbers


def shuffled(count: int, seed: int) -> Tensor:
    """A permutation of `count` that depends on the seed alone."""
    return torch.from_numpy(np.random.default_rng(seed).permutation(count))


def subset(part: Split | Listed, limit: int | None) -> Split | Listed:
    """The first `limit` images after a fixed shuffle, all of them where limit is None or larger."""
    split = part.split if isinstance(part, Listed) else part
    if limit is None or limit >= len(split.labels):
        return part
    numbers = shuffled(len(split.labels), 0)[:limit]
    split = split.take(numbers)._replace(numbers=numbers, whole=len(split.labels))
    if isinstance(part, Listed):
        return Listed(split, [part.files[i] for i in numbers], part.cache.with_stem(f"{part.cache.stem}-{limit}"))
    return split


def load_extra(path: str, like: Split) -> Split:
    """Additional training images of an npz, for the classes of `like`, held on the host as they are stored.

    The format is that of the releases of generated data: `image` uint8 (M, S, S, 3), `label` int (M,).
    Errors: UsageError where it is another, or other images.
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            held = {name: file[name] for name in ("image", "label") if name in file}
    except Exception as error:  # an archive may be damaged in any way
        raise UsageError(f"--extra-data {path} is no npz of plain arrays ({first_line(error)})") from error
    if missing := [name for name in ("image", "label") if name not in held]:
        raise UsageError(f"--extra-data {path} has no array {missing[0]!r}; it needs `image` and `label`")
    images, labels = held["image"], held["label"]
    side, classes = like.images.shape[-1], len(like.classes)
    if images.dtype != np.uint8 or images.shape[1:] != (side, side, 3) or not len(images):
        got = f"{images.dtype} {images.shape}"
        raise UsageError(f"--extra-data {path}: image is {got}, not uint8 (M, {side}, {side}, 3)")
    if labels.dtype.kind not in "iu" or labels.shape != images.shape[:1]:
        raise UsageError(f"--extra-data {path}: label is {labels.dtype} {labels.shape}, not int ({len(images)},)")
    if sorted(set(labels.tolist())) != list(range(classes)):
        some = f"{len(set(labels.tolist()))} classes from {labels.min()} to {labels.max()}"
        raise UsageError(f"--extra-data {path} has labels of {some}, and the data set {classes} classes from 0")
    images = torch.from_numpy(images).permute(0, 3, 1, 2)  # a view
    return like._replace(images=images, labels=torch.from_numpy(labels.astype(np.int64)), numbers=None)


def with_extra(batch: Split, extra: Split, count: int, seeds: tuple[int, ...]) -> Split:
    """A batch and `count` images of `extra`, drawn with replacement and shuffled together, as `seeds` alone say."""
    draw = np.random.default_rng(seeds)
    more = extra.take(torch.from_numpy(draw.integers(len(extra.labels), size=count)))
    images = torch.cat([batch.images, more.images.to(batch.images.device, non_blocking=True)])
    both = batch._replace(images=images, labels=torch.cat([batch.labels, more.labels.to(batch.labels.device)]))
    return both.take(torch.from_numpy(draw.permutation(len(both.labels))))


def batches(order: Tensor, batch_size: int) -> Iterator[Tensor]:
    """Indices of one batch after the other; the last, smaller one is kept. No indices, no batch."""
    if len(order):
        yield from order.split(batch_size)


def as_input(images: Tensor) -> Tensor:
    """uint8 images -> float32 in [0, 1], what every network here takes."""
    return images.to(torch.float32, copy=True).div_(255)  # a copy of what was float32 before, too


def augment(images: Tensor, how: str, generator: torch.Generator) -> Tensor:
    """Augment a batch of uint8 images (N, 3, S, S) on its device.

    how: `crop` shifts each image by up to S / 8 pixels each way, zeros moving in (4 pixels at 32, as published);
    `crop-flip` also mirrors half of them; `none` returns them as they are.
    """
    if how == "none":
        return images
    count, size, pad = len(images), images.shape[-1], images.shape[-1] // 8
    padded, rows = F.pad(images, (pad,) * 4), torch.arange(count, device=images.device)
    top, left = torch.randint(2 * pad + 1, (2, count), generator=generator, device=images.device)
    if how == "crop-flip":  # a mirrored crop is a crop of the mirrored image
        mirrored = torch.rand(count, generator=generator, device=images.device) < 0.5
        padded = torch.cat([padded, padded.flip(3)])
        rows, left = rows + count * mirrored, torch.where(mirrored, 2 * pad - left, left)
    windows = padded.unfold(2, size, 1).unfold(3, size, 1)  # (., 3, shifts, shifts, S, S), a view
    return windows[rows, :, top, left]


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


def _above(data_dir: Path, inner: str) -> Path:
    """The folder that holds `inner`, where data_dir is `inner` itself; otherwise data_dir."""
    above = (path.parent for path in (data_dir.absolute(), data_dir.resolve()) if path.name == inner)
    return data_dir if (data_dir / inner).is_dir() else next(above, data_dir)


def _cifar(dataset: str, part: str, data_dir: Path, size: int) -> Split:
    """CIFAR-10 or -100 through torchvision, which reads the pickles inside only after their MD5 matched."""
    from torchvision.datasets import CIFAR10, CIFAR100

    source = {"cifar10": CIFAR10, "cifar100": CIFAR100}[dataset]
    data_dir = _above(data_dir, source.base_folder)
    try:
        try:
            data = source(str(data_dir), train=part == "train")
        except RuntimeError:  # not there, or not intact
            data_dir.mkdir(parents=True, exist_ok=True)
            with locked(data_dir / f".{dataset}.lock", wait=True):
                data = source(str(data_dir), train=part == "train", download=True)  # unless another process just did
        images = torch.from_numpy(data.data).permute(0, 3, 1, 2).contiguous()
        return Split(images, torch.tensor(data.targets), tuple(data.classes))
    except Exception as error:  # networks, archives and pickles make their readers raise nearly anything
        raise UsageError(
            f"{dataset}: no intact copy in {data_dir} and none could be downloaded ({first_line(error)}); put "
            f"{source.filename} (MD5 {source.tgz_md5}) from {source.url} into {data_dir}"
        ) from error


def _tiny_imagenet(dataset: str, part: str, data_dir: Path, size: int) -> Listed:
    """Tiny-ImageNet: 200 classes of 64x64, labels by sorted wnid; its published validation part is the test part."""
    data_dir = _above(data_dir, "tiny-imagenet-200")
    root = data_dir if (data_dir / "wnids.txt").is_file() else data_dir / "tiny-imagenet-200"
    if not root.is_dir():
        _get_tiny_imagenet(data_dir)
    try:
        wnids = sorted(set((root / "wnids.txt").read_text(encoding="utf-8").split()))
        if part == "train":
            pairs = [(f, wnid) for wnid in wnids for f in _of_class(root / "train" / wnid)]
        elif (root / "val" / wnids[0]).is_dir():  # rearranged, as many do; the order stays
            pairs = [(f, wnid) for wnid in wnids for f in _of_class(root / "val" / wnid)]
            pairs.sort(key=lambda pair: (len(pair[0].name), pair[0].name))  # val_9 before val_10, as in the annotations
        else:
            lines = (root / "val" / "val_annotations.txt").read_text(encoding="utf-8").splitlines()
            pairs = [(root / "val" / "images" / name, wnid) for name, wnid, *_ in map(str.split, filter(None, lines))]
            strange = [f.name for f, _ in pairs if f.parent.name != "images"]  # a name with slashes leads elsewhere
            if strange:
                raise ValueError(f"an image named {strange[0]!r}")
        labels = torch.tensor([wnids.index(wnid) for _, wnid in pairs])
        if len(pairs) != TINY_IMAGES[part]:
            raise ValueError(f"{len(pairs):,} images in its {part} part, not {TINY_IMAGES[part]:,}")
        words = root / "words.txt"  # of names for people alone, so it may be missing
        lines = words.read_text(encoding="utf-8").splitlines() if words.is_file() else []
        named = dict(line.split("\t", 1) for line in lines if "\t" in line)
    except (OSError, ValueError, IndexError) as error:
        mend = "remove it, and it is unpacked anew from the zip"
        raise UsageError(f"{root} is incomplete ({first_line(error)}); {mend}") from error
    split = Split(torch.empty(len(pairs), 0), labels, tuple(wnids), tuple(named.get(w, "").strip() or w for w in wnids))
    return Listed(split, [f for f, _ in pairs], root / f"decoded-{part}.pt")


def _of_class(folder: Path) -> list[Path]:
    """The images of a class of Tiny-ImageNet, sorted: those in its folder, else those in `images` inside."""
    here = [f for f in _visible(folder) if f.suffix.lower() in IMAGE_ENDINGS]
    return here or _visible(folder / "images")


def _get_tiny_imagenet(data_dir: Path) -> None:
    """Download the zip where it is missing, check it, unpack it beside its place and move it there whole."""
    from torchvision.datasets.utils import check_integrity, download_url

    url, md5 = TINY_IMAGENET
    archive, scratch = data_dir / "tiny-imagenet-200.zip", data_dir / ".tiny-imagenet-200.part"
    try:
        data_dir.mkdir(parents=True, exist_ok=True)
        with locked(data_dir / ".tiny-imagenet.lock", wait=True):
            if (data_dir / "tiny-imagenet-200").is_dir():
                return  # another process was faster
            if not check_integrity(str(archive), md5):
                download_url(url, str(data_dir), archive.name, md5)
            shutil.rmtree(scratch, ignore_errors=True)  # of a process that was killed
            try:
                with zipfile.ZipFile(archive) as content:  # whose MD5 is the published one
                    content.extractall(scratch)
                (scratch / "tiny-imagenet-200").rename(data_dir / "tiny-imagenet-200")
            finally:
                shutil.rmtree(scratch, ignore_errors=True)
    except Exception as error:  # as above
        raise UsageError(
            f"tiny-imagenet: no intact copy in {data_dir} and none could be downloaded ({first_line(error)}); put "
            f"{archive.name} (248,100,043 bytes, MD5 {md5}) from {url} into {data_dir}"
        ) from error


def _visible(folder: Path) -> list[Path]:
    """What a folder holds, sorted, but for what systems put there: hidden files and those of macOS."""
    return sorted(f for f in folder.iterdir() if f.name[0] != "." and f.name != "__MACOSX")


def parts_of(dataset: str, data_dir: Path) -> dict[str, Path]:
    """The parts that a data set has: train and test, of a `folder` those of train, val and test that are there."""
    if dataset != "folder":
        return dict.fromkeys(("train", "test"), data_dir)
    if not data_dir.is_dir():
        raise UsageError(f"{data_dir} is no folder; {LAYOUT}")
    found: dict[str, Path] = {}
    for folder in filter(Path.is_dir, _visible(data_dir)):
        for part, names in PARTS.items():
            if re.fullmatch(f"({names})([ _-]?set)?", folder.name, re.I) and found.setdefault(part, folder) != folder:
                raise UsageError(f"{found[part]} and {folder.name} are both a {part} part; leave one of them there")
    return found


def _folder(dataset: str, part: str, data_dir: Path, size: int) -> Listed:
    """DIR/train/<class>/*, DIR/val/<class>/* and DIR/test/<class>/*, images or folders of images.

    They are squashed to size x size, whatever their proportions, bilinear; EXIF rotation is not applied. Transparency
    is blended over black, grey becomes three equal channels, 16 bits become 8; of several frames the first is taken.
    """
    parts = parts_of(dataset, data_dir)
    root = parts.get(part) or (parts.get("val") if part == "test" else None)
    if root is None:
        raise UsageError(f"{data_dir} has no folder {'test or val' if part == 'test' else part}; {LAYOUT}")
    first = parts.get("train", root)
    known, own = ({d.name for d in _visible(folder) if d.is_dir()} for folder in (first, root))
    if len(known) < 2:
        raise UsageError(f"{first} holds {len(known)} class folder; at least 2 are needed")
    if known != own:
        odd = ", ".join(sorted(known ^ own)[:5])
        raise UsageError(f"classes of {first} and {root} differ: {odd} is in one only")
    classes, files, labels, left = sorted(own), [], [], Counter()
    for label, name in enumerate(classes):
        inside = [f for here in _visible(root / name) for f in (_visible(here) if here.is_dir() else [here])]
        images = [f for f in inside if f.suffix.lower() in IMAGE_ENDINGS]
        if not images:
            raise UsageError(f"{root / name} holds no image ({', '.join(sorted(IMAGE_ENDINGS))})")
        others = sorted({*inside} - {*images})
        left.update("folder" if f.is_dir() else f.suffix.lower() or "without ending" for f in others)
        files += images
        labels += [label] * len(images)
    out = ", ".join(f"{count} {ending}" for ending, count in left.most_common())
    notes = [f"left out {out} in {root}"] * bool(left) + [f"{root} taken as test part"] * (root != parts.get(part))
    split = Split(torch.empty(len(files), 0), torch.tensor(labels), tuple(classes), note="; ".join(notes))
    return Listed(split, files, data_dir / f"decoded-{root.name}-{size}.pt")


def _decoded(part: Listed, size: int, unreadable: list[str]) -> Split:
    """Decode image files, or read an earlier run's cache of the same; unreadable: gets a line for each that is none."""
    split, files, cache = part
    stats = []
    for file in files:
        status = file.stat() if os.path.isfile(file) else None  # `_decode` refuses it
        known = status and (status.st_size, status.st_mtime_ns, status.st_ino)
        stats.append((file.relative_to(cache.parent).as_posix(), known))
    key, shape = hashlib.sha256(repr((DECODING, size, stats)).encode()).hexdigest(), (len(files), 3, size, size)
    images = _cached(cache, key, shape)
    if images is not None:
        return split._replace(images=images)

    def fill(row: int) -> None:
        try:
            images[row] = _decode(files[row], size)
        except UsageError as error:
            unreadable.append(str(error))

    with ExitStack() as held:
        with suppress(OSError):  # where the folder cannot be written there is nothing to wait for either
            held.enter_context(locked(cache.with_name(f".{cache.name}.lock"), wait=True))
        images = _cached(cache, key, shape)  # another process may have been faster
        if images is None:
            images = torch.empty(shape, dtype=torch.uint8)
            with ThreadPoolExecutor(4) as pool, warnings.catch_warnings():
                warnings.filterwarnings("ignore", module="PIL")  # of files that `_decode` refuses, and of odd ones
                decoded = pool.map(fill, range(len(files)))
                for _ in tqdm(decoded, "decoding", len(files), unit="img", disable=None):
                    pass
            try:
                for left in cache.parent.glob(f".{cache.name}.*.part"):  # of a killed process
                    left.unlink()
                if not unreadable:
                    save(cache, {"key": key, "images": images})
            except OSError as error:
                print(f"images are decoded anew next time: {cache} cannot be written ({error.strerror})")
    return split._replace(images=images)


def _cached(cache: Path, key: str, shape: tuple[int, ...]) -> Tensor | None:
    """What an earlier run decoded; None where there is nothing, or nothing that can be relied on."""
    try:
        stored = read(cache)
    except UsageError:
        return None
    images = stored.get("images")
    usable = stored.get("key") == key and ordinary(images) and images.dtype == torch.uint8 and images.shape == shape
    return images if usable else None


def _decode(file: Path, size: int) -> Tensor:
    if not os.path.isfile(file):  # to open a pipe would wait for ever
        raise UsageError(f"{file}: not a file that can be read, though it is listed as an image of this data set")
    try:
        with Image.open(file, formats=IMAGE_FORMATS) as image:
            if image.width * image.height > MOST_PIXELS:
                raise ValueError(f"{image.width}x{image.height} pixels, more than any photograph has")
            if image.mode == "F":
                raise ValueError("its pixels are floating-point numbers")
            if image.mode.startswith("I"):  # 16-bit grey, which convert() would clip at 255
                pixels = np.asarray(image)
                if pixels.min() < 0 or pixels.max() >= 2**16:
                    raise ValueError("its pixels have more than 16 bits")
                image = Image.fromarray((pixels >> 8).astype(np.uint8))
            if image.mode[-1] in "Aa" or "transparency" in image.info:
                image = image.convert("RGBA")
                image = Image.alpha_composite(Image.new("RGBA", image.size, "black"), image)
            image = image.convert("RGB")
            if image.size != (size, size):
                image = image.resize((size, size), Image.Resampling.BILINEAR)
            return torch.from_numpy(np.array(image)).permute(2, 0, 1)
    except Exception as error:  # bytes of a stranger make Pillow raise nearly anything
        said = first_line(error).replace(f" {str(file)!r}", "")
        raise UsageError(f"{file}: not a readable image ({said})") from error


LOADERS = {"cifar10": _cifar, "cifar100": _cifar, "tiny-imagenet": _tiny_imagenet, "digits": _digits}
LOADERS |= {"folder": _folder}
