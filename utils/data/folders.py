"""Folders of image files: which images they hold, and decoding those into one uint8 tensor."""

import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision.datasets.folder import IMG_EXTENSIONS, make_dataset
from tqdm.contrib.concurrent import thread_map

from utils.system import distributed
from utils.system.errors import UsageError, first_line

# Pillow goes by content and would start Ghostscript for an EPS file that is named .png.
FORMATS = ("JPEG", "PNG", "BMP", "WEBP", "PPM", "TIFF")
PART_NAMES = {
    "train": "train(ing)?([ _-]?set)?",
    "val": "val(id|idation)?([ _-]?set)?",
    "test": "test(ing)?([ _-]?set)?",
}
LAYOUT = "--data-dir needs train/<class>/ and test/<class>/ (or val/<class>/, or --val-size)"


def find_parts(data_dir: Path) -> dict[str, Path]:
    """Find the folders of the train, val and test parts, in any usual spelling.

    Errors: UsageError where data_dir is not a folder, or where two folders are the same part.
    """
    if not data_dir.is_dir():
        raise UsageError(f"{data_dir} is not a folder; {LAYOUT}")
    parts = {}
    for name in visible_folders(data_dir):
        for part, pattern in PART_NAMES.items():
            if not re.fullmatch(pattern, name, re.IGNORECASE):
                continue
            if part in parts:
                raise UsageError(f"{data_dir} has two {part} parts: {parts[part].name}, {name}")
            parts[part] = data_dir / name
    return parts


def visible_folders(folder: Path) -> list[str]:
    """Return the names of the folders in a folder, sorted, without hidden ones."""
    return sorted(path.name for path in folder.iterdir() if path.is_dir() and _visible(path.name))


def _visible(name: str) -> bool:
    return not name.startswith(".") and name != "__MACOSX"


def list_images(root: Path, classes: Sequence[str]) -> tuple[list[tuple[str, int]], list[str]]:
    """List the images in and below the folder of each class, by class and then by name.

    Returns (file, label) of each image, and the names of other files, which are skipped.
    Errors: UsageError that names the classes without an image.
    """
    skipped = []

    def is_image(file: str) -> bool:
        path = Path(file).relative_to(root)
        if not all(_visible(name) for name in path.parts):
            return False
        if path.suffix.lower() not in IMG_EXTENSIONS:
            skipped.append(path.name)
            return False
        return True

    labels = {name: label for label, name in enumerate(classes)}
    try:
        files = make_dataset(str(root), labels, is_valid_file=is_image)
    except FileNotFoundError as error:
        raise UsageError(f"{root}: {first_line(error)}") from error
    return files, skipped


def decode(files: Sequence[str], size: int) -> Tensor:
    """Decode image files -> (N, 3, size, size) uint8.

    Errors: UsageError that names the files that are not images.
    """
    if distributed.first():
        megabytes = len(files) * 3 * size**2 / 1e6
        print(f"{len(files):,} images of side {size} take {megabytes:,.1f} MB of memory")
    images = torch.empty(len(files), 3, size, size, dtype=torch.uint8)
    unreadable = []

    def decode_row(row: int) -> None:
        try:
            images[row] = decode_image(files[row], size)
        except Exception as error:  # Pillow raises nearly anything on damaged files
            unreadable.append(f"{files[row]} ({first_line(error)})")

    thread_map(
        decode_row,
        range(len(files)),
        max_workers=4,
        desc="decoding",
        unit="img",
        disable=distributed.quiet(),
    )
    if unreadable:
        first = "; ".join(sorted(unreadable)[:10])
        raise UsageError(f"replace or remove {len(unreadable)} unreadable images: {first}")
    return images


def decode_image(file: str, size: int) -> Tensor:
    """Decode an image file -> (3, size, size) uint8.

    It is scaled to size x size, whatever its proportions, bilinear; EXIF rotation is not applied.
    Transparency is blended over black, grey becomes three equal channels, 16 bits become 8, and of
    several frames the first is taken.
    """
    with Image.open(file, formats=FORMATS) as image:
        if image.mode[0] in "IF":  # 16-bit grey, which convert() would clip at 255
            pixels = np.asarray(image) / 256
            if pixels.min() < 0 or pixels.max() >= 256:
                raise ValueError("pixels of more than 16 bits")
            image = Image.fromarray(pixels.astype(np.uint8))
        if image.mode[-1] in "Aa" or "transparency" in image.info:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "black"), image)
        image = image.convert("RGB").resize((size, size), Image.Resampling.BILINEAR)
        return torch.from_numpy(np.array(image)).permute(2, 0, 1)
