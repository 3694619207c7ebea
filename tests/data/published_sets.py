"""CIFAR and Tiny-ImageNet as they are published, with a few made images."""

import hashlib
import io
import pickle
import shutil
import tarfile
import zipfile

import numpy as np
from PIL import Image
from torchvision.datasets import CIFAR10, CIFAR100

from tests.helpers import pixels
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
            sums.append(write(name, {"data": images[rows].reshape(3, 3072), key: labels[rows]}))
        monkeypatch.setattr(source, f"{part}_list", sums)
        written[part] = (images.transpose(0, 2, 3, 1), labels)

    meta = source.meta
    _, checksum = write(meta["filename"], {meta["key"]: [f"name{i}" for i in range(classes)]})
    monkeypatch.setattr(source, "meta", meta | {"md5": checksum})
    return written


def pack_cifar(monkeypatch, folder, dataset="cifar10"):
    """Replace the unpacked folder by the archive that torchvision downloads, and return that."""
    source, *_ = CIFARS[dataset]
    archive = folder / source.filename
    with tarfile.open(archive, "w:gz") as tar:
        tar.add(folder / source.base_folder, source.base_folder)
    shutil.rmtree(folder / source.base_folder)
    monkeypatch.setattr(source, "tgz_md5", md5(archive.read_bytes()))
    return archive


def write_tiny_imagenet(monkeypatch, folder):
    """Write the zip of a Tiny-ImageNet of 3 classes, and let `datasets` expect it.

    Returns the zip, and {part: (decoded images NHWC, labels)} in order.
    """
    wnids = ("n01", "n02", "n03")
    of_test = ("n02", "n03", "n01", "n03")
    annotations = [f"val_{i}.JPEG\t{wnid}\t0\t32\t44\t62\n" for i, wnid in enumerate(of_test)]
    texts = {
        "wnids.txt": "n03\nn01\nn02\n",  # not sorted, as in the published file
        "words.txt": "".join(f"{wnid}\tthing {wnid}\n" for wnid in wnids),
        "val/val_annotations.txt": "".join(annotations),
        "train/n01/n01_boxes.txt": "n01_0.JPEG\t0\t0\t63\t63\n",
    }
    train = [(f"train/{wnid}/images/{wnid}_{i}.JPEG", wnid) for wnid in wnids for i in range(2)]
    test = [(f"val/images/val_{i}.JPEG", wnid) for i, wnid in enumerate(of_test)]

    folder.mkdir(parents=True, exist_ok=True)
    archive = folder / "tiny-imagenet-200.zip"
    expected = {"train": ([], []), "test": ([], [])}
    with zipfile.ZipFile(archive, "w") as out:
        for name, text in texts.items():
            out.writestr(f"tiny-imagenet-200/{name}", text)
        for seed, (name, wnid) in enumerate(train + test):
            content = jpeg(seed)
            out.writestr(f"tiny-imagenet-200/{name}", content)
            images, labels = expected["train" if seed < len(train) else "test"]
            images.append(np.array(Image.open(io.BytesIO(content)).convert("RGB")))
            labels.append(wnids.index(wnid))
    url = "http://localhost/tiny.zip"
    monkeypatch.setattr(datasets, "TINY_IMAGENET", (url, md5(archive.read_bytes())))
    return archive, expected


def jpeg(seed):
    """Return the bytes of a JPEG of 64x64; one is grey, as some of the published ones are."""
    array = pixels(seed, 64, 64) if seed == 1 else pixels(seed, 64, 64, 3)
    out = io.BytesIO()
    Image.fromarray(array).save(out, "JPEG")
    return out.getvalue()
