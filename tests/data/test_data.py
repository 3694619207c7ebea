"""Data sets against small files written here in the published formats; augmentation; splits of the training data."""

import io
import os
import pickle
import shutil

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from sklearn.datasets import load_digits
from torchvision.datasets import CIFAR10

from tests.helpers import (
    CIFARS,
    RunsCode,
    md5,
    pack_cifar,
    pixels,
    png,
    settings,
    write_cifar,
    write_tiny_imagenet,
)
from utils.data import datasets as data
from utils.data.datasets import Split, as_input, augment, load_split, subset
from utils.system.errors import UsageError
from utils.training import loop as training

pytestmark = pytest.mark.usefixtures("no_network")


@pytest.fixture
def decodes(monkeypatch):
    """The files decoded so far."""
    decoded, original = [], data._decode

    def count(file, size):
        decoded.append(file)
        return original(file, size)

    monkeypatch.setattr(data, "_decode", count)
    return decoded


@pytest.mark.parametrize("dataset", ["svhn", "CIFAR10", "cifar-10", ""])
def test_an_unknown_data_set_is_an_error(tmp_path, dataset):
    with pytest.raises(UsageError, match="unknown data set") as caught:
        load_split(dataset, "train", str(tmp_path), 32)
    assert repr(dataset) in str(caught.value) and "cifar10" in str(caught.value)
    assert not list(tmp_path.iterdir())


# CIFAR


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("part", ["train", "test"])
@pytest.mark.parametrize("dataset", CIFARS)
def test_cifar_is_what_was_written(monkeypatch, tmp_path, dataset, part, packed):
    images, labels = write_cifar(monkeypatch, tmp_path, dataset)[0][part]
    if packed:
        pack_cifar(monkeypatch, tmp_path, dataset)
    split = load_split(dataset, part, str(tmp_path), 32)
    assert split.images.dtype == torch.uint8 and split.labels.dtype == torch.int64
    assert split.images.shape == (len(images), 3, 32, 32)
    for image, tensor in zip(images, split.images, strict=True):
        for channel in range(3):
            assert np.array_equal(tensor[channel].numpy(), image[:, :, channel])
    assert split.labels.tolist() == labels
    assert split.classes == tuple(f"name{i}" for i in range(CIFARS[dataset][-1]))


@pytest.mark.parametrize("dataset", [*CIFARS, "tiny-imagenet"])
def test_data_dir_may_point_into_the_folder_itself(monkeypatch, tmp_path, dataset):
    if dataset == "tiny-imagenet":
        expected, size = write_tiny_imagenet(monkeypatch, tmp_path)[1], 64
    else:
        expected, size = write_cifar(monkeypatch, tmp_path, dataset)[0], 32
    inner = {"tiny-imagenet": "tiny-imagenet-200", "cifar10": "cifar-10-batches-py", "cifar100": "cifar-100-python"}
    (tmp_path / "link").symlink_to(tmp_path / inner[dataset])
    for named in (inner[dataset], f"{inner[dataset]}/", "link"):
        assert load_split(dataset, "test", f"{tmp_path}/{named}", size).labels.tolist() == expected["test"][1]
    monkeypatch.chdir(tmp_path / inner[dataset])
    assert load_split(dataset, "train", ".", size).labels.tolist() == expected["train"][1]


@pytest.mark.parametrize("name", ["data_batch_2", "test_batch", "batches.meta"])
def test_a_cifar_file_of_another_md5_is_never_unpickled(monkeypatch, tmp_path, name):
    write_cifar(monkeypatch, tmp_path, "cifar10")
    marker = tmp_path / "executed"
    payload = pickle.dumps(RunsCode(marker))
    pickle.loads(payload)
    marker.rmdir()  # raises unless the payload works
    file = tmp_path / CIFAR10.base_folder / name
    file.write_bytes(payload)
    with pytest.raises(UsageError) as caught:
        load_split("cifar10", "train", str(tmp_path), 32)
    assert not marker.exists()
    assert file.read_bytes() == payload
    assert "cifar-10-python.tar.gz" in str(caught.value) and CIFAR10.tgz_md5 in str(caught.value)


@pytest.mark.parametrize("length", [0, 30, 0.5, -1])
@pytest.mark.parametrize("dataset", ["cifar10", "tiny-imagenet"])
def test_a_truncated_archive_is_named_with_what_was_expected_and_kept(monkeypatch, tmp_path, dataset, length):
    if dataset == "cifar10":
        write_cifar(monkeypatch, tmp_path)
        archive = pack_cifar(monkeypatch, tmp_path)
    else:
        archive, _ = write_tiny_imagenet(monkeypatch, tmp_path)
    whole = archive.read_bytes()
    part = whole[: int(len(whole) * length) if isinstance(length, float) else length]
    archive.write_bytes(part)
    with pytest.raises(UsageError, match=md5(whole)) as caught:
        load_split(dataset, "train", str(tmp_path), 32 if dataset == "cifar10" else 64)
    assert archive.name in str(caught.value) and "\n" not in str(caught.value)
    assert archive.read_bytes() == part and [f.name for f in tmp_path.iterdir()] == [archive.name]


@pytest.mark.parametrize("dataset, size", [("cifar10", 16), ("cifar100", 64), ("tiny-imagenet", 32)])
def test_a_data_set_with_a_size_of_its_own_takes_no_other(tmp_path, dataset, size):
    with pytest.raises(UsageError) as caught:
        load_split(dataset, "train", str(tmp_path), size)
    for word in (dataset, str(size), "--image-size"):
        assert word in str(caught.value)


# Tiny-ImageNet


@pytest.mark.parametrize("part", ["train", "test"])
def test_tiny_imagenet_is_unpacked_and_labelled_by_sorted_wnid(monkeypatch, tmp_path, part):
    _, expected = write_tiny_imagenet(monkeypatch, tmp_path)
    images, labels = expected[part]
    split = load_split("tiny-imagenet", part, str(tmp_path), 64)
    assert split.classes == ("n01", "n02", "n03")
    assert split.labels.tolist() == labels and split.labels.dtype == torch.int64
    assert split.images.dtype == torch.uint8
    assert np.array_equal(split.images.permute(0, 2, 3, 1).numpy(), np.stack(images))
    assert sorted(f.name for f in tmp_path.iterdir()) == ["tiny-imagenet-200", "tiny-imagenet-200.zip"]


@pytest.mark.parametrize("inner", ["", "images"])
def test_tiny_imagenet_may_be_rearranged(monkeypatch, tmp_path, inner):
    """Every image in the folder of its wnid: the same images, labels and order."""
    write_tiny_imagenet(monkeypatch, tmp_path)
    before = [load_split("tiny-imagenet", part, str(tmp_path), 64) for part in ("train", "test")]
    root = tmp_path / "tiny-imagenet-200"
    for line in (root / "val" / "val_annotations.txt").read_text().splitlines():
        name, wnid, *_ = line.split()
        (root / "val" / wnid / inner).mkdir(parents=True, exist_ok=True)
        (root / "val" / "images" / name).rename(root / "val" / wnid / inner / name)
    (root / "val" / "images").rmdir()
    for file in () if inner else [*root.glob("train/*/images/*")]:
        file.rename(file.parent.parent / file.name)
    for part, split in zip(("train", "test"), before, strict=True):
        again = load_split("tiny-imagenet", part, str(tmp_path), 64)
        assert torch.equal(again.images, split.images) and torch.equal(again.labels, split.labels)


def test_tiny_imagenet_is_decoded_once(monkeypatch, tmp_path, decodes):
    archive, _ = write_tiny_imagenet(monkeypatch, tmp_path)
    first = load_split("tiny-imagenet", "train", str(tmp_path), 64)
    assert len(decodes) == 6
    archive.unlink()
    second = load_split("tiny-imagenet", "train", str(tmp_path), 64)
    assert len(decodes) == 6
    assert torch.equal(first.images, second.images) and torch.equal(first.labels, second.labels)


def test_tiny_imagenet_is_unpacked_whole_or_not_at_all(monkeypatch, tmp_path):
    write_tiny_imagenet(monkeypatch, tmp_path)

    def cut_off(archive, folder):
        os.makedirs(os.path.join(folder, "tiny-imagenet-200", "train"))
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("zipfile.ZipFile.extractall", cut_off)
        with pytest.raises(UsageError, match="No space left"):
            load_split("tiny-imagenet", "test", str(tmp_path), 64)
    assert [f.name for f in tmp_path.iterdir()] == ["tiny-imagenet-200.zip"]
    assert len(load_split("tiny-imagenet", "test", str(tmp_path), 64).labels) == 4


NEEDED = ("wnids.txt", "train/n02", "train/n02/images", "train/n01/images/n01_0.JPEG")
NEEDED += ("val/val_annotations.txt", "val/images/val_2.JPEG")


@pytest.mark.parametrize("missing", NEEDED)
def test_an_incomplete_tiny_imagenet_is_named_and_unpacked_anew_once_it_is_removed(monkeypatch, tmp_path, missing):
    _, expected = write_tiny_imagenet(monkeypatch, tmp_path)
    part = "test" if missing.startswith("val") else "train"
    load_split("tiny-imagenet", part, str(tmp_path), 64)
    root = tmp_path / "tiny-imagenet-200"
    gone = root / missing
    shutil.rmtree(gone) if gone.is_dir() else gone.unlink()
    with pytest.raises(UsageError) as caught:
        load_split("tiny-imagenet", part, str(tmp_path), 64)
    line = str(caught.value)
    assert str(root) in line and "\n" not in line
    assert str(gone) in line or "5 images" in line
    assert "remove it, and it is unpacked anew" in line or "listed as an image" in line
    shutil.rmtree(root)
    assert load_split("tiny-imagenet", part, str(tmp_path), 64).labels.tolist() == expected[part][1]


# digits


@pytest.mark.parametrize("size", [16, 32])
@pytest.mark.parametrize("part, count", [("train", 1437), ("test", 360)])
def test_digits_have_their_shape_and_their_labels(tmp_path, part, count, size):
    split = load_split("digits", part, str(tmp_path), size)
    assert split.images.shape == (count, 3, size, size) and split.images.dtype == torch.uint8
    assert split.labels.dtype == torch.int64 and split.classes == tuple("0123456789")
    assert split.images.min() == 0 and split.images.max() > 240
    assert torch.equal(split.images[:, 0], split.images[:, 1]) and torch.equal(split.images[:, 0], split.images[:, 2])
    whole = load_digits()
    small = F.avg_pool2d(split.images[:, :1].float(), size // 8).flatten(1) / 255
    nearest = torch.cdist(small, torch.from_numpy(whole.data).float() / 16).argmin(1)
    agree = torch.from_numpy(whole.target)[nearest] == split.labels
    assert agree.float().mean() > 0.97
    assert not list(tmp_path.iterdir())


def test_digits_are_split_evenly_disjointly_and_always_alike(tmp_path):
    train, test = (load_split("digits", part, str(tmp_path), 16) for part in ("train", "test"))
    counts = [torch.bincount(split.labels, minlength=10) for split in (train, test)]
    whole = torch.bincount(torch.from_numpy(load_digits().target).long())
    assert torch.equal(counts[0] + counts[1], whole)
    assert ((counts[1] - whole * 360 / 1797).abs() <= 1).all()
    digits = torch.from_numpy(load_digits().images).float()[:, None] / 16
    digits = F.interpolate(digits, size=(16, 16), mode="bilinear").mul(255).round().byte()[:, 0]
    found = sorted(image.numpy().tobytes() for split in (train, test) for image in split.images[:, 0])
    assert found == sorted(image.numpy().tobytes() for image in digits)
    torch.manual_seed(5)
    np.random.seed(5)
    again = load_split("digits", "train", str(tmp_path), 16)
    assert torch.equal(again.images, train.images) and torch.equal(again.labels, train.labels)


# folders


def write_folder(root, parts=("train", "test"), ending="png"):
    """Two classes of two 16x16 images each -> {(part, class, i): array HWC}."""
    written = {}
    for p, part in enumerate(parts):
        for c, name in enumerate(("cat", "dog")):
            for i in range(2):
                array = pixels(100 * p + 10 * c + i, 16, 16, 3)
                png(root / part / name / f"{i}.{ending}", array)
                written[part, name, i] = array
    return written


def load_folder(root, part="train", size=16):
    return load_split("folder", part, str(root), size)


@pytest.mark.parametrize("held_out", ["test", "val"])
def test_a_folder_is_what_was_written(tmp_path, held_out):
    written = write_folder(tmp_path, ("train", held_out))
    (tmp_path / "train" / "cat" / "notes.txt").write_text("no image")
    for part, folder in (("train", "train"), ("test", held_out)):
        split = load_folder(tmp_path, part)
        assert split.classes == ("cat", "dog") and split.labels.tolist() == [0, 0, 1, 1]
        assert split.labels.dtype == torch.int64 and split.images.dtype == torch.uint8
        arrays = [written[folder, name, i] for name in ("cat", "dog") for i in range(2)]
        assert np.array_equal(split.images.permute(0, 2, 3, 1).numpy(), np.stack(arrays))


def test_of_test_and_val_the_test_part_is_read(tmp_path):
    written = write_folder(tmp_path, ("train", "val", "test"))
    assert np.array_equal(load_folder(tmp_path, "test").images[0].permute(1, 2, 0), written["test", "cat", 0])


@pytest.mark.parametrize(
    "names", ["Train Test", "TRAINING testing", "training VALIDATION", "train valid", "training_set Test set"]
)
def test_parts_are_named_in_any_usual_spelling(tmp_path, names):
    train, held_out = names.split(maxsplit=1)
    written = write_folder(tmp_path, (train, held_out))
    for part, name in (("train", train), ("test", held_out)):
        assert np.array_equal(load_folder(tmp_path, part).images[3].permute(1, 2, 0), written[name, "dog", 1])


def of_folder(root, *flags):
    return training.load_training_data(settings("--dataset", "folder", "--data-dir", root, "--image-size", 16, *flags))


def test_the_val_part_selects_where_there_is_one_and_the_test_part_reports(tmp_path, capsys):
    write_folder(tmp_path, ("train", "val", "test"))
    val, test = (load_folder(tmp_path, part).images for part in ("val", "test"))
    both = of_folder(tmp_path)
    assert torch.equal(both.selection.images, val) and torch.equal(both.test.images, test)
    assert (both.selected, both.tested) == ("the val part", "the test set")
    held_out = of_folder(tmp_path, "--val-size", 1)
    assert len(held_out.selection.labels) == 1 and torch.equal(held_out.test.images, test)
    (tmp_path / "test").rename(tmp_path / "elsewhere")
    alone = of_folder(tmp_path)
    assert torch.equal(alone.selection.images, val) and alone.test is None and alone.selected == "the val part"
    assert of_folder(tmp_path, "--val-size", 1).tested == "the val part"
    (tmp_path / "val").rename(tmp_path / "away")
    assert of_folder(tmp_path, "--val-size", 1).test is None
    with pytest.raises(UsageError, match=r"no folder test or val.*--val-size"):
        of_folder(tmp_path)


def test_copies_of_training_images_are_counted_pixel_by_pixel(tmp_path):
    written = write_folder(tmp_path, ("train", "val", "test"))
    png(tmp_path / "test" / "cat" / "copy.png", written["train", "cat", 1])
    png(tmp_path / "test" / "dog" / "1.png", written["train", "cat", 0])  # whatever it is labelled
    almost = written["train", "dog", 0].copy()
    almost[3, 4, 1] ^= 1
    png(tmp_path / "test" / "dog" / "almost.png", almost)
    data = of_folder(tmp_path)
    assert data.test.note == "2 of 6 images of the test part are copies of training images"
    assert data.train.note == data.selection.note == ""


def test_images_to_look_at_need_no_training_images(tmp_path):
    written = write_folder(tmp_path, ("val",))
    split = load_folder(tmp_path, "test")
    assert split.classes == ("cat", "dog") and split.note == f"{tmp_path / 'val'} taken as test part"
    assert np.array_equal(split.images[0].permute(1, 2, 0), written["val", "cat", 0])


def test_folders_inside_a_class_are_read_what_is_hidden_is_not_and_what_is_left_out_is_said(tmp_path):
    write_folder(tmp_path)
    train = tmp_path / "train"
    inner = pixels(7, 16, 16, 3)
    png(train / "cat" / "a-session" / "9.png", inner)
    for name in (".hidden/1.png", "__MACOSX/cat/1.png", "cat/._0.png", "cat/.cache/1.png", "dog/__MACOSX/1.png"):
        (train / name).parent.mkdir(parents=True, exist_ok=True)
        (train / name).write_bytes(b"no image")
    for name in ("cat/1.heic", "cat/2.HEIC", "dog/notes.txt", "dog/a/b/deep.png", "dog/README"):
        (train / name).parent.mkdir(parents=True, exist_ok=True)
        (train / name).write_bytes(b"no image")
    split = load_folder(tmp_path)
    assert split.classes == ("cat", "dog") and split.labels.tolist() == [0, 0, 0, 1, 1]
    assert np.array_equal(split.images[2].permute(1, 2, 0), inner)
    assert split.note == f"left out 2 .heic, 1 without ending, 1 folder, 1 .txt in {train}"
    assert not load_folder(tmp_path, "test").note


def test_only_images_within_a_limit_are_decoded_and_their_memory_is_said_before(tmp_path, decodes, capsys):
    write_folder(tmp_path)
    limited = load_split("folder", "train", str(tmp_path), 16, 3)
    assert len(decodes) == 3 and "3 images of side 16 take 0.0 MB of memory" in capsys.readouterr().out
    whole = subset(load_folder(tmp_path), 3)
    assert torch.equal(limited.images, whole.images) and torch.equal(limited.labels, whole.labels)
    assert torch.equal(limited.numbers, whole.numbers) and limited.whole == whole.whole == 4
    decodes.clear()
    one, selection, test = of_folder(tmp_path, "--limit-train", 2, "--val-size", 1, "--limit-test", 2)[:3]
    assert [len(split.labels) for split in (one, selection, test)] == [2, 1, 2] and len(decodes) == 2  # of test alone
    every = load_folder(tmp_path).take(data.shuffled(4, 0)).images
    assert torch.equal(selection.images, every[:1]) and torch.equal(one.images, every[1:3])
    assert one.numbers is None and selection.numbers is None  # noise of PGD is drawn by them


@pytest.mark.parametrize("ending", ["tif", "TIFF", "gif", "pgm", "jfif"])
def test_other_usual_formats_are_read_their_first_frame(tmp_path, ending):
    write_folder(tmp_path)
    grey = pixels(7, 8, 8).repeat(2, 0).repeat(2, 1)
    frames = [Image.fromarray(255 - grey)] if ending.lower() in ("tif", "tiff", "gif") else None
    more = {"save_all": True, "append_images": frames} if frames else {}
    kind = {"pgm": "PPM", "gif": "GIF", "jfif": "JPEG"}.get(ending, "TIFF")
    Image.fromarray(grey).save(tmp_path / "train" / "cat" / f"2.{ending}", kind, **more)
    images = load_folder(tmp_path).images
    assert len(images) == 5
    for channel in images[2].int().numpy():
        assert np.abs(channel - grey.astype(int)).max() <= (40 if ending == "jfif" else 0)


@pytest.mark.parametrize("kind", ["RGBA", "LA", "P"])
def test_what_is_transparent_lies_over_black(tmp_path, kind):
    write_folder(tmp_path)
    colour, alpha = np.full((16, 16, 3), 200, np.uint8), np.full((16, 16), 255, np.uint8)
    alpha[:8], alpha[8:12] = 0, 128 if kind != "P" else 0
    image = Image.fromarray(np.dstack([colour, alpha])).convert(kind)
    if kind == "P":
        image = Image.fromarray(np.where(alpha > 0, 1, 0).astype(np.uint8), "P")
        image.putpalette([250, 250, 250, 200, 200, 200])
        image.info["transparency"] = 0
    image.save(tmp_path / "train" / "cat" / "2.png")
    found = load_folder(tmp_path).images[2]
    assert (found[:, :8] == 0).all() and (found[:, 12:] == 200).all()
    assert kind == "P" or ((found[:, 8:12] >= 99) & (found[:, 8:12] <= 101)).all()


def test_images_of_every_mode_and_shape_are_converted(tmp_path):
    write_folder(tmp_path)
    cat = tmp_path / "train" / "cat"
    grey, colour = pixels(7, 16, 16), pixels(8, 16, 16, 3)
    png(cat / "2-grey.png", grey)
    png(cat / "3-rgba.png", np.dstack([colour, np.full((16, 16), 255, np.uint8)]))
    png(cat / "4-palette.png", colour // 64 * 64, "P")
    tall = np.zeros((40, 20, 3), np.uint8)
    tall[:20], tall[20:] = (200, 0, 10), (0, 100, 30)
    png(cat / "5-tall.png", tall)
    wide = np.zeros((20, 40, 3), np.uint8)
    wide[:, :20], wide[:, 20:] = (200, 0, 10), (0, 100, 30)
    png(cat / "6-wide.png", wide)
    images = load_folder(tmp_path).images
    assert images.shape == (9, 3, 16, 16)
    for channel in range(3):
        assert np.array_equal(images[2, channel], grey)
    assert np.array_equal(images[3].permute(1, 2, 0), colour)
    with Image.open(cat / "4-palette.png") as palette:
        assert np.array_equal(images[4].permute(1, 2, 0), np.array(palette.convert("RGB")))
    for halves in (images[5].split((7, 2, 7), dim=1), images[6].split((7, 2, 7), dim=2)):
        for channel, (first, last) in enumerate(((200, 0), (0, 100), (10, 30))):
            assert (halves[0][channel] == first).all() and (halves[2][channel] == last).all()


def test_sixteen_bit_grey_is_scaled_not_clipped_to_white(tmp_path):
    write_folder(tmp_path)
    grey = np.arange(256).reshape(16, 16)
    Image.fromarray((grey * 257).astype(np.uint16)).save(tmp_path / "train" / "cat" / "2.png")
    for channel in load_folder(tmp_path).images[2].int().numpy():
        assert np.abs(channel - grey).max() <= 1
    Image.fromarray((grey * 2**20).astype(np.int32)).save(tmp_path / "train" / "cat" / "3.tif")
    with pytest.raises(UsageError, match=r"3.tif: .*more than 16 bits"):
        load_folder(tmp_path)


def test_each_size_has_a_cache_of_its_own(tmp_path, decodes):
    write_folder(tmp_path)
    for _ in range(2):
        assert load_folder(tmp_path, size=16).images.shape[-1] == 16
        assert load_folder(tmp_path, size=24).images.shape[-1] == 24
    assert len(decodes) == 8


@pytest.mark.parametrize("change", ["rewritten", "added", "removed"])
def test_the_cache_follows_the_files(tmp_path, decodes, change):
    written = write_folder(tmp_path)
    load_folder(tmp_path)
    load_folder(tmp_path)
    assert len(decodes) == 4
    arrays = [written["train", name, i] for name in ("cat", "dog") for i in range(2)]
    file, other = tmp_path / "train" / "dog" / "1.png", pixels(77, 16, 16, 3)
    if change == "rewritten":
        stamp = file.stat().st_mtime_ns
        png(file, other)
        os.utime(file, ns=(stamp + 10**9, stamp + 10**9))
        arrays[3] = other
    elif change == "added":
        png(file.with_name("2.png"), other)
        arrays.append(other)
    else:
        file.unlink()
        arrays.pop()
    split = load_folder(tmp_path)
    assert np.array_equal(split.images.permute(0, 2, 3, 1).numpy(), np.stack(arrays))
    assert len(split.labels) == len(arrays)


def test_the_cache_tells_equal_names_of_two_classes_apart(tmp_path):
    """Files of equal names, sizes and times, as archives leave them, whose class folders are swapped."""
    written = write_folder(tmp_path, ending="bmp")
    for file in tmp_path.rglob("*.bmp"):
        os.utime(file, ns=(10**18, 10**18))
    load_folder(tmp_path)
    train = tmp_path / "train"
    (train / "cat").rename(train / "x")
    (train / "dog").rename(train / "cat")
    (train / "x").rename(train / "dog")
    assert np.array_equal(load_folder(tmp_path).images[0].permute(1, 2, 0), written["train", "dog", 0])


def test_a_cache_that_is_cut_off_or_something_else_is_decoded_anew(tmp_path, decodes):
    write_folder(tmp_path)
    images = load_folder(tmp_path).images
    (cache,) = tmp_path.glob("*.pt")
    whole, code = cache.read_bytes(), io.BytesIO()
    torch.save(RunsCode(tmp_path / "executed"), code)
    cut_off = (whole[:n] for n in (0, 1, 10, 100, len(whole) // 2, len(whole) * 9 // 10, -1))
    others = (b"garbage", b"\x80\x02]q\x00.", b"PK\x03\x04 and no zip", bytes(5000), code.getvalue())
    for content in (*cut_off, *others):
        cache.write_bytes(content)
        decodes.clear()
        for _ in range(2):  # the second time the cache is whole again
            assert torch.equal(load_folder(tmp_path).images, images)
            assert len(decodes) == 4
    assert not (tmp_path / "executed").exists()


def test_images_are_read_though_the_cache_cannot_be_written(tmp_path, capsys):
    written = write_folder(tmp_path)
    (tmp_path / "decoded-train-16.pt").mkdir()
    assert np.array_equal(load_folder(tmp_path).images[0].permute(1, 2, 0), written["train", "cat", 0])
    assert "decoded-train-16.pt cannot be written" in capsys.readouterr().out
    assert not list(tmp_path.glob("*.part")) and not list(tmp_path.glob(".*.part"))


# augmentation


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def windows(image, pad):
    """Every crop of the zero-padded image (3, S, S), as bytes by shift."""
    size = image.shape[-1]
    padded = np.pad(image, ((0, 0), (pad, pad), (pad, pad)))
    shifts = range(2 * pad + 1)
    return {(t, w): padded[:, t : t + size, w : w + size] for t in shifts for w in shifts}


@pytest.mark.parametrize("how", ["crop", "crop-flip"])
@pytest.mark.parametrize("size, count", [(16, 400), (32, 60)])
def test_a_crop_is_a_window_of_the_padded_image(how, size, count):
    images = torch.from_numpy(pixels(3, count, 3, size, size)).clamp(min=1)
    before = images.clone()
    out = augment(images, how, generator())
    assert out.shape == images.shape and out.dtype == torch.uint8
    assert torch.equal(images, before)
    shifts, flips = [], 0
    for image, result in zip(images.numpy(), out.numpy(), strict=True):
        known = windows(image, size // 8)
        plain = [s for s, window in known.items() if np.array_equal(window, result)]
        mirrored = [s for s, window in known.items() if np.array_equal(window[:, :, ::-1], result)]
        assert len(plain) + len(mirrored) == 1
        assert how == "crop-flip" or plain
        shifts += plain + mirrored
        flips += len(mirrored)
    if size == 16:  # all 25 shifts, each on its axis about equally often
        assert len(set(shifts)) == 25
        for axis in zip(*shifts, strict=True):
            assert np.bincount(axis).min() > 40
    assert flips == 0 if how == "crop" else 0.3 * count < flips < 0.7 * count


@pytest.mark.parametrize("how", ["crop", "crop-flip"])
def test_augmentation_depends_on_its_generator_alone(how):
    images = torch.from_numpy(pixels(0, 40, 3, 16, 16))
    state = torch.get_rng_state()
    first = augment(images, how, generator(1))
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(99)
    assert torch.equal(augment(images, how, generator(1)), first)
    assert not torch.equal(augment(images, how, generator(2)), first)
    running = generator(1)
    augment(images, how, running)
    assert not torch.equal(augment(images, how, running), first)


def test_one_image_is_augmented_and_without_augmentation_none_is():
    images = torch.from_numpy(pixels(0, 5, 3, 16, 16))
    assert augment(images[:1], "crop-flip", generator()).shape == (1, 3, 16, 16)
    assert torch.equal(augment(images, "none", generator()), images)


def test_input_is_float_in_zero_to_one():
    x = as_input(torch.arange(256, dtype=torch.uint8))
    assert x.dtype == torch.float32 and x[0] == 0 and x[-1] == 1
    assert torch.equal((x * 255).round().byte(), torch.arange(256, dtype=torch.uint8))
    assert (x.diff() > 0).all()


# splits of the training data


@pytest.fixture
def numbered(monkeypatch):
    """A data set of 200 training and 60 test images that carry their number, as pixel and as label."""

    def load(dataset, part, data_dir, image_size):
        numbers = torch.arange(200) if part == "train" else torch.arange(200, 260)
        images = numbers.byte()[:, None, None, None].expand(-1, 3, 16, 16)
        return Split(images, numbers, tuple(map(str, range(260))))

    monkeypatch.setitem(data.LOADERS, "digits", load)


def parts(*flags):
    """(training, selection, test) numbers as lists, after a check that images and labels still belong together."""
    splits = training.load_training_data(settings("--dataset", "digits", *flags))[:3]
    for split in splits:
        assert torch.equal(split.images[:, 0, 0, 0], split.labels.byte())
    return [split.labels.tolist() for split in splits]


def test_all_images_are_used_unless_limited(numbered):
    train, selection, test = parts()
    assert sorted(train) == list(range(200)) and sorted(test) == list(range(200, 260))
    assert selection == test


@pytest.mark.parametrize("limit", [None, 30, 1000])
@pytest.mark.parametrize("size", [1, 50, 198])
def test_held_out_images_are_never_trained_on(numbered, size, limit):
    flags = ["--val-size", str(size)] + (["--limit-train", str(limit)] if limit else [])
    train, selection, test = parts(*flags)
    assert len(set(selection)) == len(selection) == size
    assert len(set(train)) == len(train) == min(200 - size, limit or 200)
    assert not set(train) & set(selection)
    assert set(train) | set(selection) <= set(range(200))
    assert sorted(test) == list(range(200, 260))


def test_the_held_out_images_depend_on_their_number_alone(numbered):
    selection = parts("--val-size", "50")[1]
    others = (["--seed", "7"], ["--limit-train", "20"], ["--limit-test", "5"], ["--method", "pgd"])
    for flags in others:
        torch.manual_seed(3)
        assert parts("--val-size", "50", *flags)[1] == selection
    assert selection != list(range(50))  # drawn, not the first ones of a file sorted by class


def test_limits_are_deterministic_and_nested(numbered):
    small, large = parts("--limit-train", "10", "--limit-test", "5"), parts("--limit-train", "40", "--limit-test", "20")
    assert small == parts("--limit-train", "10", "--limit-test", "5", "--seed", "9")
    assert large[0][:10] == small[0] and large[2][:5] == small[2]
    assert len(small[0]) == 10 and len(small[2]) == 5
    assert small[0] != list(range(10))


@pytest.mark.parametrize("limit, count", [(None, 20), (20, 20), (99, 20), (7, 7), (1, 1)])
def test_a_subset_is_drawn_once_and_for_all(limit, count):
    split = Split(torch.arange(20).byte()[:, None, None, None], torch.arange(20), ("a",))
    taken = subset(split, limit)
    assert len(set(taken.labels.tolist())) == len(taken.labels) == count
    assert torch.equal(taken.images.flatten(), taken.labels.byte())
    torch.manual_seed(8)
    assert torch.equal(subset(split, limit).labels, taken.labels)
