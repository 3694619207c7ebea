"""Data sets, from small files in the published formats, and parts of the training data."""

import gzip
import hashlib
import json
import os
import pickle
import shutil
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits
from torchvision.datasets import CIFAR10, FashionMNIST

from tests.data.published_sets import CIFARS, pack_cifar, write_cifar, write_tiny_imagenet
from tests.helpers import (
    ANCRA,
    ATTACK,
    RunsCode,
    execute,
    files,
    pixels,
    png,
    settings,
    train,
)
from utils.data import datasets
from utils.data.datasets import Split, load_split, subset
from utils.system.errors import UsageError
from utils.training import loop as training

pytestmark = pytest.mark.usefixtures("no_network")


def as_array(split):
    """Images as an array (N, S, S, 3)."""
    return split.images.permute(0, 2, 3, 1).numpy()


def assert_holds(split, images, labels):
    """Require these images (N, S, S, 3) and labels of a split."""
    assert split.images.dtype == torch.uint8
    assert split.labels.dtype == torch.int64
    assert np.array_equal(as_array(split), images)
    assert np.array_equal(split.labels, labels)


# CIFAR


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("dataset", CIFARS)
def test_cifar_is_what_was_written(monkeypatch, tmp_path, dataset, packed):
    written = write_cifar(monkeypatch, tmp_path, dataset)
    if packed:
        pack_cifar(monkeypatch, tmp_path, dataset)
    for part, (images, labels) in written.items():
        split = load_split(dataset, part, str(tmp_path), 32)
        assert_holds(split, images, labels)
        *_, count = CIFARS[dataset]
        assert list(split.classes) == [f"name{i}" for i in range(count)]


def test_a_cifar_file_of_another_md5_is_never_unpickled(monkeypatch, tmp_path):
    write_cifar(monkeypatch, tmp_path)
    payload = pickle.dumps(RunsCode(tmp_path / "executed"))
    file = tmp_path / CIFAR10.base_folder / "data_batch_2"
    file.write_bytes(payload)
    with pytest.raises(UsageError, match=f"cifar-10-python.tar.gz.*{CIFAR10.tgz_md5}"):
        load_split("cifar10", "train", str(tmp_path), 32)
    assert not (tmp_path / "executed").exists()
    assert file.read_bytes() == payload


# Tiny-ImageNet


def load_tiny(root, part):
    """Load a part of Tiny-ImageNet."""
    return load_split("tiny-imagenet", part, str(root), 64)


def test_tiny_imagenet_is_unpacked_and_labelled_by_sorted_wnid(monkeypatch, tmp_path):
    expected = write_tiny_imagenet(monkeypatch, tmp_path)
    for part, (images, labels) in expected.items():
        split = load_tiny(tmp_path, part)
        assert split.classes == ("n01", "n02", "n03")
        assert_holds(split, images, labels)
    names = sorted(file.name for file in tmp_path.iterdir())
    assert names == ["tiny-imagenet-200", "tiny-imagenet-200.zip"]

    # Many people move the validation images into a folder for each class.
    folder = tmp_path / "tiny-imagenet-200/val"
    (folder / "n02").mkdir()
    (folder / "images/val_0.JPEG").rename(folder / "n02/val_0.JPEG")
    assert_holds(load_tiny(tmp_path, "test"), *expected["test"])


def test_tiny_imagenet_is_unpacked_whole_or_not_at_all(monkeypatch, tmp_path):
    write_tiny_imagenet(monkeypatch, tmp_path)

    def cut_off(archive, folder):
        os.makedirs(os.path.join(folder, "tiny-imagenet-200", "train"))
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("zipfile.ZipFile.extractall", cut_off)
        with pytest.raises(UsageError, match="No space left"):
            load_tiny(tmp_path, "test")
    assert [file.name for file in tmp_path.iterdir()] == ["tiny-imagenet-200.zip"]
    assert len(load_tiny(tmp_path, "test").labels) == 4


@pytest.mark.parametrize("missing", ["wnids.txt", "train/n02", "val/images/val_2.JPEG"])
def test_an_incomplete_tiny_imagenet_is_named(monkeypatch, tmp_path, missing):
    expected = write_tiny_imagenet(monkeypatch, tmp_path)
    part = "test" if missing.startswith("val") else "train"
    load_tiny(tmp_path, part)
    root = tmp_path / "tiny-imagenet-200"
    file = root / missing
    file.rename(tmp_path / "moved away")
    with pytest.raises(UsageError, match=f"{root}.*{file.name}"):
        load_tiny(tmp_path, part)
    shutil.rmtree(root)
    assert_holds(load_tiny(tmp_path, part), *expected[part])


# digits


def test_digits_are_those_of_scikit_learn_split_evenly():
    whole = load_digits()
    train = load_split("digits", "train", "", 8)
    test = load_split("digits", "test", "", 8)
    assert (len(train.labels), len(test.labels)) == (1437, 360)

    def rows(images, labels):
        """Return a row of label and pixels for each image, in one order."""
        pixels = images.reshape(len(labels), -1)
        return np.unique(np.column_stack([labels, pixels]), axis=0)

    grey = (whole.images * 255 / 16).round()
    images = np.stack([grey, grey, grey], axis=3)
    loaded = np.concatenate([as_array(train), as_array(test)])
    labels = torch.cat([train.labels, test.labels])
    assert np.array_equal(rows(loaded, labels), rows(images, whole.target))
    shares = np.bincount(test.labels) / np.bincount(whole.target)
    assert shares == pytest.approx(360 / 1797, abs=0.01)


# Fashion-MNIST


def idx(*shape):
    """The header of an idx file of bytes."""
    numbers = (0x800 + len(shape), *shape)
    return struct.pack(f">{len(numbers)}I", *numbers)


def write_fashion(root, ending=""):
    """Write the four idx files, of 10 images each -> {part: (images (10, 28, 28), labels)}."""
    root.mkdir(parents=True, exist_ok=True)
    written = {}
    for part, prefix in (("train", "train"), ("test", "t10k")):
        images = pixels(len(part), 10, 28, 28)
        labels = pixels(len(part), 10) % 10
        written[part] = (images, labels)
        for kind, array in (("images-idx3", images), ("labels-idx1", labels)):
            content = idx(*array.shape) + array.tobytes()
            if ending == ".gz":
                content = gzip.compress(content)
            file = root / f"{prefix}-{kind}-ubyte{ending}"
            file.write_bytes(content)
    return written


def load_fashion(root, part="train", size=32):
    """Load a part of Fashion-MNIST."""
    return load_split("fashion-mnist", part, str(root), size)


@pytest.mark.parametrize("ending", ["", ".gz"])
@pytest.mark.parametrize("folder", ["", "FashionMNIST/raw"])
def test_fashion_mnist_is_what_was_written_padded_by_zeros(tmp_path, folder, ending):
    written = write_fashion(tmp_path / folder, ending)
    for part, (images, labels) in written.items():
        split = load_fashion(tmp_path, part)
        grey = np.pad(images, ((0, 0), (2, 2), (2, 2)))
        assert_holds(split, np.stack([grey, grey, grey], axis=3), labels)
        assert split.classes == tuple(FashionMNIST.classes)


@pytest.mark.parametrize("size", [24, 64])
def test_fashion_mnist_of_other_sides_is_scaled_as_pillow_scales(tmp_path, size):
    images, _ = write_fashion(tmp_path)["test"]
    split = load_fashion(tmp_path, "test", size)
    for image, scaled in zip(images, split.images.int(), strict=True):
        theirs = Image.fromarray(image)
        theirs = theirs.resize((size, size), Image.Resampling.BILINEAR)
        assert abs(scaled.numpy() - theirs).max() <= 1


def test_other_images_than_those_of_fashion_mnist_are_noted(monkeypatch, tmp_path):
    images, labels = write_fashion(tmp_path)["train"]
    assert load_fashion(tmp_path).note == (
        f"{tmp_path} has other images than the published ones of fashion-mnist"
    )
    digest = hashlib.sha256(images.tobytes() + labels.tobytes()).hexdigest()
    monkeypatch.setitem(datasets.FASHION, "train", ("train", digest))
    assert load_fashion(tmp_path).note == ""


@pytest.mark.parametrize(
    "name, content",
    [
        ("train-images-idx3-ubyte", idx(10, 28, 28) + bytes(7839)),
        ("train-images-idx3-ubyte", idx(10, 14, 56) + bytes(7840)),
        ("train-labels-idx1-ubyte", idx(9) + bytes(9)),
        ("train-labels-idx1-ubyte", idx(10) + bytes(range(1, 11))),
        ("train-labels-idx1-ubyte.gz", b"no gzip"),
        ("train-labels-idx1-ubyte.gz", gzip.compress(bytes(99))[:-9]),
    ],
    ids=["short", "other side", "fewer labels", "label 10", "no gzip", "cut gzip"],
)
def test_a_damaged_file_of_fashion_mnist_is_named(tmp_path, refused, name, content):
    write_fashion(tmp_path)
    file = tmp_path / name
    file.with_suffix("").unlink()
    file.write_bytes(content)
    refused(ANCRA, "--dataset=fashion-mnist", f"--data-dir={tmp_path}", mentions=[file])


def test_missing_files_of_fashion_mnist_are_named_with_their_source(tmp_path):
    write_fashion(tmp_path)
    missing = tmp_path / "t10k-labels-idx1-ubyte"
    missing.unlink()
    before = files(tmp_path)
    load_fashion(tmp_path)
    with pytest.raises(UsageError, match=f"{missing.name}.gz from http.*{tmp_path}"):
        load_fashion(tmp_path, "test")
    assert files(tmp_path) == before


def test_fashion_mnist_is_downloaded_whole_or_not_at_all(monkeypatch, tmp_path):
    errors = [RuntimeError("File not found or corrupted.")]

    def download(url, download_root, filename, md5):
        write_fashion(Path(download_root))
        if errors:
            raise errors.pop()

    monkeypatch.setattr("torchvision.datasets.mnist.download_and_extract_archive", download)
    with pytest.raises(UsageError, match="could be downloaded"):
        load_fashion(tmp_path)
    assert list(tmp_path.iterdir()) == []
    assert len(load_fashion(tmp_path).labels) == 10
    assert [file.name for file in tmp_path.iterdir()] == ["FashionMNIST"]


@pytest.mark.usefixtures("short_runs")
def test_fashion_mnist_is_trained_on_and_evaluated(tmp_path):
    write_fashion(tmp_path / "data")
    data = ("--dataset=fashion-mnist", "--data-dir", tmp_path / "data", "--image-size=16")
    run = train(tmp_path, *data, "--epochs=1")
    assert "-fashion-mnist-" in run.name
    assert execute(ATTACK, "--ckpt_url", run, "--attacks=natural", "--device=cpu") == 0
    record = json.loads((run / "white_attack.json").read_text())
    assert record["dataset"] == "fashion-mnist"
    assert record["settings"]["eps"] == 0.1


# folders


LABELS = [0, 0, 1, 1]


def write_folder(root, *parts):
    """Write two classes of two 16x16 images for each part -> {part: images NHWC}."""
    written = {}
    for seed, part in enumerate(parts):
        images = pixels(seed, 4, 16, 16, 3)
        for i, name in enumerate(("cat/0", "cat/1", "dog/0", "dog/1")):
            png(root / part / f"{name}.png", images[i])
        written[part] = images
    return written


def load_folder(root, part="train", size=16, limit=None):
    """Load a part of a folder of images."""
    return load_split("folder", part, str(root), size, limit)


@pytest.mark.parametrize(
    "train, held_out",
    [
        ("train", "test"),
        ("train", "val"),
        ("TRAINING", "valid"),
        ("training_set", "Test set"),
    ],
)
def test_a_folder_is_what_was_written_in_parts_of_any_usual_spelling(tmp_path, train, held_out):
    written = write_folder(tmp_path, train, held_out)
    for part, folder in (("train", train), ("test", held_out)):
        split = load_folder(tmp_path, part)
        assert split.classes == ("cat", "dog")
        assert_holds(split, written[folder], LABELS)


def training_data(root, *flags):
    """What a run on a folder of images loads."""
    flags = ("--dataset", "folder", "--data-dir", root, "--image-size", 16, *flags)
    return training.load_training_data(settings(*flags))


@pytest.mark.parametrize(
    "parts, selected, tested",
    [
        (["val", "test"], "the val part", "the test set"),
        (["val"], "the val part", "the val part"),
        (["test"], "the test set", "the test set"),
    ],
)
def test_the_val_part_selects_and_the_test_part_reports(tmp_path, parts, selected, tested):
    written = write_folder(tmp_path, "train", *parts)
    data = training_data(tmp_path)
    assert_holds(data.selection, written[parts[0]], LABELS)
    assert_holds(data.test, written[parts[-1]], LABELS)
    assert (data.selected, data.tested) == (selected, tested)
    held_out = training_data(tmp_path, "--val-size", 1)
    assert held_out.selected == "1 held-out training images"
    assert held_out.selection.numbers.tolist() == [0]  # noise of PGD is drawn by them
    assert held_out.tested == tested
    assert torch.equal(held_out.test.images, data.test.images)


def test_without_a_part_to_test_images_must_be_held_out(tmp_path):
    write_folder(tmp_path, "train")
    held_out = training_data(tmp_path, "--val-size", 1)
    assert held_out.tested == held_out.selected
    with pytest.raises(UsageError, match="--val-size"):
        training_data(tmp_path)


def test_images_to_look_at_need_no_training_images(tmp_path):
    write_folder(tmp_path, "val")
    assert load_folder(tmp_path, "test").note == f"{tmp_path / 'val'} taken as test part"


@pytest.mark.parametrize(
    "folders, names",
    [
        ("train/cat test/cat", "at least 2"),
        ("train/cat train/dog/.hidden test/cat test/dog", "train.*dog"),
        ("train/cat train/dog test/cat test/emu", "train.*test.*dog, emu"),
        ("test/cat test/dog", "train"),
        ("train/cat train/dog val/cat Valid/cat", "Valid, val"),
    ],
)
def test_a_folder_of_another_layout_is_named(tmp_path, folders, names):
    for folder in folders.split():
        png(tmp_path / folder / "0.png", pixels(0, 16, 16, 3))
    with pytest.raises(UsageError, match=f"{tmp_path}.*{names}"):
        for part in ("train", "test"):
            load_folder(tmp_path, part)


@pytest.mark.parametrize(
    "dataset, size",
    [
        ("cifar10", 32),
        ("tiny-imagenet", 64),
        ("fashion-mnist", 32),
        ("folder", 16),
    ],
)
def test_a_data_folder_that_is_a_file_is_named(tmp_path, dataset, size):
    file = tmp_path / "file"
    file.write_text("no folder")
    with pytest.raises(UsageError, match=str(file)):
        load_split(dataset, "train", str(file), size)


def test_folders_inside_a_class_are_read_and_hidden_files_are_not(tmp_path):
    train = tmp_path / "train"
    written = write_folder(tmp_path, "train")["train"]
    inner = pixels(7, 16, 16, 3)
    png(train / "cat/a-session/9.png", inner)
    hidden = (".hidden/1.png", "__MACOSX/cat/1.png", "cat/._0.png", "cat/.cache/1.png")
    others = ("cat/1.heic", "cat/2.HEIC", "dog/notes.txt", "dog/README")
    for name in (*hidden, *others):
        file = train / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(b"no image")
    split = load_folder(tmp_path)
    assert split.classes == ("cat", "dog")
    assert_holds(split, np.insert(written, 2, inner, axis=0), [0, 0, 0, 1, 1])
    assert f"skipped 4 non-image files in {train}" in split.note


def test_only_images_within_a_limit_are_decoded(tmp_path):
    write_folder(tmp_path, "train")
    expected = subset(load_folder(tmp_path), 3)
    (left_out,) = {0, 1, 2, 3} - set(expected.numbers.tolist())
    sorted(tmp_path.rglob("*.png"))[left_out].write_bytes(b"damaged")
    limited = load_folder(tmp_path, limit=3)
    assert torch.equal(limited.images, expected.images)
    assert torch.equal(limited.numbers, expected.numbers)
    assert limited.total == 4


def test_all_unreadable_images_are_named_at_once(tmp_path):
    write_folder(tmp_path, "train")
    truncated = tmp_path / "train/cat/0.png"
    empty = tmp_path / "train/dog/0.png"
    truncated.write_bytes(truncated.read_bytes()[:200])
    empty.write_bytes(b"")
    with pytest.raises(UsageError, match=f"2 unreadable .*{truncated}.*{empty}"):
        load_folder(tmp_path)


# image files


def load_first(root, image, name="0.png", **options):
    """Load an image of PIL, saved as the first of its class, as an array (16, 16, 3) of int."""
    write_folder(root, "train")
    folder = root / "train/cat"
    (folder / "0.png").unlink()
    image.save(folder / name, **options)
    return as_array(load_folder(root))[0].astype(int)


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_what_is_transparent_lies_over_black(tmp_path, mode):
    array = np.full((16, 16, 4), 200, np.uint8)
    array[:8, :, 3] = 0
    array[8:12, :, 3] = 128
    array[12:, :, 3] = 255
    image = load_first(tmp_path, Image.fromarray(array).convert(mode))
    assert (image[:8] == 0).all()
    assert (abs(image[8:12] - 100) <= 1).all()
    assert (image[12:] == 200).all()


def test_a_palette_gives_its_colours_and_a_transparent_one_black(tmp_path):
    palette = Image.new("P", (16, 16))
    palette.paste(1, (0, 8, 16, 16))
    palette.putpalette([250, 250, 250, 200, 190, 180])
    image = load_first(tmp_path, palette, transparency=0)
    assert (image[:8] == 0).all()
    assert (image[8:] == [200, 190, 180]).all()


def test_an_image_of_other_proportions_is_squashed(tmp_path):
    image = Image.new("RGB", (20, 40), (200, 0, 10))
    image.paste((0, 100, 30), (0, 20, 20, 40))
    squashed = load_first(tmp_path, image)
    assert (squashed[:7] == (200, 0, 10)).all()
    assert (squashed[9:] == (0, 100, 30)).all()


def test_sixteen_bit_grey_is_scaled_and_not_clipped(tmp_path):
    grey = np.arange(256).reshape(16, 16)
    sixteen_bits = Image.fromarray((257 * grey).astype(np.uint16))
    image = load_first(tmp_path, sixteen_bits)
    assert (abs(image - grey[:, :, None]) <= 1).all()


def test_pixels_of_more_bits_are_refused(tmp_path):
    image = Image.new("I", (16, 16), 2**20)
    with pytest.raises(UsageError, match=r"0\.tif .*16 bits"):
        load_first(tmp_path, image, "0.tif")


def test_an_image_of_another_format_than_those_listed_is_refused(tmp_path):
    """Pillow goes by content: for an EPS file under a PNG's name it would start Ghostscript."""
    write_folder(tmp_path, "train")
    eps = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 16 16\n%%EndComments\nshowpage\n"
    (tmp_path / "train/cat/0.png").write_bytes(eps)
    with pytest.raises(UsageError, match=r"0\.png"):
        load_folder(tmp_path)


# parts of the training data


@pytest.fixture
def numbered(monkeypatch):
    """A data set of 200 training and 60 test images that carry their number as pixel and label."""

    def load(dataset, part, data_dir, image_size):
        whole = torch.arange(260)
        numbers = whole[:200] if part == "train" else whole[200:]
        images = numbers.byte()[:, None, None, None]
        classes = tuple(map(str, range(260)))
        return Split(images.expand(-1, 3, 16, 16), numbers, classes)

    monkeypatch.setitem(datasets.LOADERS, "digits", load)


def parts(*flags):
    """(training, selection, test) numbers as lists; images and labels still belong together."""
    data = training.load_training_data(settings("--dataset=digits", *flags))
    splits = (data.train, data.selection, data.test)
    for split in splits:
        assert torch.equal(split.images[:, 0, 0, 0], split.labels.byte())
    return [split.labels.tolist() for split in splits]


def test_all_images_are_used_unless_limited(numbered):
    train, selection, test = parts()
    assert train == list(range(200))
    assert selection == test == list(range(200, 260))


@pytest.mark.parametrize(
    "size, limit",
    [
        (1, 1000),
        (50, 30),
        (198, 2),
    ],
)
def test_held_out_images_are_never_trained_on(numbered, size, limit):
    train, selection, test = parts("--val-size", size, "--limit-train", limit)
    assert len(selection) == size
    assert len(train) == min(200 - size, limit)
    used = set(train + selection)
    assert len(used) == len(train) + size
    assert used <= set(range(200))
    assert sorted(test) == list(range(200, 260))


def test_the_held_out_images_depend_on_their_number_alone(numbered):
    _, selection, _ = parts("--val-size=50")
    assert selection != list(range(50))  # drawn, not the first ones of a file sorted by class
    for flag in ("--seed=7", "--limit-train=20", "--method=pgd"):
        torch.manual_seed(3)
        _, again, _ = parts("--val-size=50", flag)
        assert again == selection


def test_limits_are_deterministic_and_nested(numbered):
    small = parts("--limit-train=10", "--limit-test=5")
    large = parts("--limit-train=40", "--limit-test=20")
    assert small == parts("--limit-train=10", "--limit-test=5", "--seed=9")
    train, _, test = small
    assert train != list(range(10))
    assert train == large[0][:10]
    assert test == large[2][:5]


def test_copies_of_training_images_are_counted(tmp_path):
    images = write_folder(tmp_path, "train", "val", "test")["train"]
    png(tmp_path / "test/cat/copy.png", images[1])
    png(tmp_path / "test/dog/1.png", images[0])  # whatever it is labelled
    images[2, 3, 4, 1] ^= 1
    png(tmp_path / "test/dog/almost.png", images[2])
    data = training_data(tmp_path)
    assert data.test.note == "2 images that evaluate are copies of training images"
    assert data.train.note == data.selection.note == ""
