"""CIFAR and Tiny-ImageNet as they are published, with a few made images."""

import hashlib
import pickle
import shutil
import tarfile
from pathlib import Path

import numpy as np
from PIL import Image
from torchvision.datasets import CIFAR10, CIFAR100

from tests.helpers import pixels, png
from utils.data import datasets

# By data set: torchvision's class, the key of the labels, number of classes
CIFARS = {"cifar10": (CIFAR10, "labels", 10), "cifar100": (CIFAR100, "fine_labels", 100)}


def md5(content):
    """Return the MD5 of bytes."""
    return hashlib.md5(content).hexdigest()


def write_cifar(monkeypatch, folder, dataset="cifar10"):
    """Write a CIFAR of 3 images a file, and let torchvision expect its MD5s.

    Returns {part: (images NHWC, labels)}.
    """
    source, key, classes = CIFARS[dataset]
    root = folder / source.base_folder
    root.mkdir(parents=True)

    def write(name, content):
        data = pickle.dumps(content, protocol=2)
        (root / name).write_bytes(data)
        return [name, md5(data)]

    written = {}
    for seed, part in enumerate(("train", "test")):
        names = [name for name, _ in getattr(source, f"{part}_list")]
        images = pixels(seed, 3 * len(names), 3, 32, 32)
        labels = [(7 * i + seed) % classes for i in range(len(images))]
        sums = []
        for i, name in enumerate(names):
            rows = slice(3 * i, 3 * i + 3)
            content = {"data": images[rows].reshape(3, 3072), key: labels[rows]}
            sums.append(write(name, content))
        monkeypatch.setattr(source, f"{part}_list", sums)
        written[part] = (images.transpose(0, 2, 3, 1), labels)

    meta = source.meta
    class_names = [f"name{i}" for i in range(classes)]
    _, checksum = write(meta["filename"], {meta["key"]: class_names})
    monkeypatch.setattr(source, "meta", meta | {"md5": checksum})
    return written


def pack_cifar(monkeypatch, folder, dataset="cifar10"):
    """Replace the unpacked folder by the archive that torchvision downloads."""
    source, *_ = CIFARS[dataset]
    archive = folder / source.filename
    with tarfile.open(archive, "w:gz") as tar:
        tar.add(folder / source.base_folder, source.base_folder)
    shutil.rmtree(folder / source.base_folder)
    monkeypatch.setattr(source, "tgz_md5", md5(archive.read_bytes()))


def write_tiny_imagenet(monkeypatch, folder):
    """Write the zip of a Tiny-ImageNet of 3 classes, and let `datasets` expect it.

    Returns {part: (decoded images NHWC, labels)} in order. One image is grey, as some of the
    published ones are.
    """
    root = folder / "tiny-imagenet-200"
    wnids = ("n01", "n02", "n03")
    labels = {"train": [0, 0, 1, 1, 2, 2], "test": [1, 2, 0, 2]}
    written = {}
    for part in labels:
        images = []
        for i, label in enumerate(labels[part]):
            wnid = wnids[label]
            place = "val/images/val"
            if part == "train":
                place = f"train/{wnid}/images/{wnid}"
            file = root / f"{place}_{i}.JPEG"
            png(file, pixels(i + len(part), 64, 64, 3), "L" if i == 1 else None)
            images.append(np.array(Image.open(file).convert("RGB")))
        written[part] = (images, labels[part])

    annotations = ""
    for i, label in enumerate(labels["test"]):
        annotations += f"val_{i}.JPEG\t{wnids[label]}\t0\t32\t44\t62\n"
    texts = {
        "wnids.txt": "n03\nn01\nn02\n",  # not sorted, as in the published file
        "words.txt": "n01\tthing\nn02\tother thing\nn03\tlast, thing\n",
        "val/val_annotations.txt": annotations,
        "train/n01/n01_boxes.txt": "n01_0.JPEG\t0\t0\t63\t63\n",
    }
    for name, text in texts.items():
        (root / name).write_text(text)
    archive = Path(shutil.make_archive(root, "zip", folder, root.name))
    shutil.rmtree(root)
    url = "http://localhost/tiny.zip"
    monkeypatch.setattr(datasets, "TINY_IMAGENET", (url, md5(archive.read_bytes())))
    return written
