"""Features, distances, negatives, clusters, and feature_distance.py."""

from itertools import product

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from models import ARCHS, build_model
from tests.helpers import checkpoint, digits_checkpoint, digits_split, execute, image_folder, write_tiny_imagenet
from utils.attacks import image_noise
from utils.data.datasets import Split, as_input, load_split
from utils.figures.features import (
    BLOCK,
    METRICS,
    PAIRS,
    choose_in_blocks,
    class_names,
    clusters,
    compare,
    distinct,
    extract,
    file_stem,
    read_distances,
    summary,
    target_classes,
)
from utils.system.attack_copy import frozen
from utils.system.errors import RunError, UsageError
from utils.system.settings import FEATURES

SCRIPT = "feature_distance.py"
KEYS = list(map("_".join, product(FEATURES, PAIRS, METRICS)))


@pytest.fixture
def run(here):
    """A trained network's checkpoint in the current folder."""
    return digits_checkpoint(here / "run.pt")


def measured(run, target, *flags):
    """Run the script for one class -> settings and arrays of the file it wrote."""
    assert execute(SCRIPT, "--model_dir", run, "--target_label", target, "--name", "found", *flags) == 0
    return read_distances(run.parent / "distances" / f"found-{target}.npz")


# features of the networks


@pytest.mark.parametrize("arch", ARCHS)
def test_weighted_features_are_the_unweighted_ones_times_the_predicted_row(arch):
    """Cell by cell for PreActResNet18, whose 64x64 images give 2x2 cells; a plain network has one kind of features."""
    size = 64 if arch == "PreActResNet18" else 16
    torch.manual_seed(0)
    shape = {"width": 1 if arch.startswith("WRN") else 4, "image_size": size}
    model = build_model(arch, 5, **shape).double().train()
    with torch.no_grad():  # in train mode, where the map of a fresh network does not fade
        heads = model(torch.rand(3, 3, size, size, dtype=torch.float64), heads=True)
        assert torch.allclose(model.classifier(heads.unweighted), heads.auxiliary[-1])
        rows = model.classifier.weight[heads.auxiliary[-1].argmax(1)]
    assert torch.allclose(heads.features, heads.unweighted * rows)
    assert heads.unweighted.max() > 0.1
    plain = build_model(arch, 5, reverse_attention=False, **shape).train()
    heads = plain(torch.rand(2, 3, size, size), heads=True)
    assert torch.equal(heads.features, heads.unweighted)


def test_features_do_not_depend_on_the_batch_size_and_must_be_finite(trained):
    model, split, _ = trained
    with frozen(model) as net:
        one, other = (extract(net, split, torch.arange(100, 360), size) for size in (360, 7))
        for a, b in zip(one, other, strict=True):
            assert a.shape == b.shape and len(a) == 260 and torch.allclose(a, b, rtol=1e-4, atol=1e-5)
        net.conv1.weight[0] = torch.nan
        with pytest.raises(RunError, match="not finite"):
            extract(net, split, torch.arange(360), 100)


# negatives


@pytest.mark.parametrize("strategy", ["random", "soft", "hard", "easy"])
def test_negatives_are_of_another_class_and_of_the_same_block(strategy):
    generator = torch.Generator().manual_seed(0)
    labels, logits = torch.randint(4, (450,), generator=generator), torch.randn(450, 4, generator=generator)
    chosen = choose_in_blocks(labels, logits, strategy, 3)
    assert (labels[chosen] != labels).all()
    assert torch.equal(chosen, choose_in_blocks(labels, logits, strategy, 3))
    assert not torch.equal(chosen, choose_in_blocks(labels, logits, strategy, 4))
    place = torch.empty(450, dtype=torch.long)
    place[torch.from_numpy(np.random.default_rng(3).permutation(450))] = torch.arange(450) // BLOCK
    assert torch.equal(place[chosen], place)


def test_a_block_without_another_class_takes_negatives_from_the_rest():
    """One image of class 1 among 401: two blocks at least hold class 0 alone."""
    labels = torch.zeros(401, dtype=torch.long)
    labels[17] = 1
    for strategy in ("random", "hard"):
        chosen = choose_in_blocks(labels, torch.zeros(401, 2), strategy, 0)
        assert (chosen[labels == 0] == 17).all() and labels[chosen[17]] == 0
    with pytest.raises(UsageError, match="single class"):
        choose_in_blocks(labels[:10], None, "random", 0)


# distances


def test_distances_against_numpy():
    a, b = torch.randn(5, 7), torch.randn(5, 7)
    found = compare(a, b)
    x, y = a.double().numpy(), b.double().numpy()
    assert np.allclose(found["L2"], np.sqrt(((x - y) ** 2).sum(1)))
    assert np.allclose(found["cosine"], (x * y).sum(1) / np.sqrt((x**2).sum(1) * (y**2).sum(1)))
    assert compare(1e-9 * a, 1e-9 * a)["cosine"] == pytest.approx(1)
    assert summary(np.array([1.0, 2, 6])) == {"max": 6, "min": 1, "mean": 3, "variance": 7}


def test_an_untouched_image_is_at_distance_0(run):
    settings, values = measured(run, 4, "--epsilon", "0", "--test-batch-size", "11")
    assert settings["epsilon"] == 0
    for layer in FEATURES:
        assert np.abs(values[f"{layer}_PP_L2"]).max() <= 1e-6
        assert np.abs(values[f"{layer}_PP_cosine"] - 1).max() <= 1e-6
        assert values[f"{layer}_NP_L2"].min() > 0


@pytest.mark.parametrize("target", [0, 7])
def test_distances_of_a_class_are_those_of_its_images(trained, run, target):
    """Recomputed by the unfolded network and a loop of its own, whatever the class."""
    model, split, _ = trained
    settings, values = measured(run, target, "--num-steps", "3")
    indices, negatives = (torch.from_numpy(values[key]) for key in ("indices", "negatives"))
    assert (settings["dataset"], settings["target"], settings["epsilon"]) == ("digits", target, 0.1)
    assert torch.equal(indices.sort().values, (split.labels == target).nonzero().squeeze(1))
    assert (split.labels[negatives] != target).all()
    x = as_input(split.images[indices])
    z = x + 0.001 * image_noise(x, indices, 1, "normal")
    for _ in range(3):
        z.requires_grad_()
        (gradient,) = torch.autograd.grad(F.cross_entropy(model(z), split.labels[indices], reduction="sum"), z)
        z = (z.detach() + 0.02 * gradient.sign()).clamp(x - 0.1, x + 0.1).clamp(0, 1)
    with torch.no_grad():
        natural, *others = (model(images, heads=True) for images in (x, z, as_input(split.images[negatives])))
    for pair, other in zip(PAIRS, others, strict=True):
        for layer, name in (("weighted", "features"), ("unweighted", "unweighted")):
            for metric, expected in compare(getattr(natural, name), getattr(other, name)).items():
                close = np.isclose(values[f"{layer}_{pair}_{metric}"], expected, rtol=1e-2, atol=1e-3)
                assert close.mean() > 0.9, (layer, pair, metric)  # a sign of a gradient near 0 may differ
                if pair == "NP":
                    assert close.all()


def test_one_class_or_all_at_any_batch_size_is_the_same(run, here, capsys):
    flags = ("--n-examples", "120", "--num-steps", "2", "--strategy", "hard")
    _, alone = measured(run, 3, *flags, "--test-batch-size", "9")
    assert execute(SCRIPT, "--model_dir", run, "--target_label", "all", "--name", "all", *flags) == 0
    assert len(list(here.glob("distances/all-*.npz"))) == 10
    settings, together = read_distances(here / "distances" / "all-3.npz")
    assert settings["test_images"] == 120
    for key in ("indices", "negatives"):
        assert np.array_equal(alone[key], together[key])
    for key in KEYS:
        assert np.isclose(alone[key], together[key], rtol=1e-2, atol=1e-3).mean() > 0.9, key
    said = capsys.readouterr().out
    assert "alignment" in said and "exclusion" in said and "unweighted" in said
    first = np.random.default_rng(0).permutation(360)[:120]  # the images that --n-examples takes everywhere
    expected = [number for number in first if digits_split().labels[number] == 3]
    assert together["indices"].tolist() == expected  # numbers in the whole test set, not among the 120


def test_adversarial_negatives_look_more_like_the_class(run):
    natural, pushed = (measured(run, 5, "--epsilon", "0.3", "--strategy", s)[1] for s in ("random", "random_adv"))
    assert np.array_equal(natural["negatives"], pushed["negatives"])
    assert pushed["unweighted_NP_cosine"].mean() > natural["unweighted_NP_cosine"].mean() + 0.05


@pytest.mark.parametrize("arch", ARCHS)
def test_bare_state_dicts_of_every_network(here, arch, capsys):
    """Plain ones by --no-ra; features of a plain network are printed once."""
    torch.manual_seed(0)
    width = 1 if arch.startswith("WRN") else 4
    model = build_model(arch, 10, reverse_attention=False, width=width, image_size=16)
    torch.save(model.state_dict(), here / "plain.pt")
    flags = ("--dataset", "digits", "--n-examples", "12", "--num-steps", "1", "--arch", arch)
    target = digits_split().labels[np.random.default_rng(0).permutation(360)[0]].item()
    run = here / "plain.pt"
    _, values = measured(run, target, *flags, "--no-ra")
    said = capsys.readouterr().out
    assert "nothing is weighted" in said and "unweighted" not in said
    assert np.array_equal(values["weighted_NP_L2"], values["unweighted_NP_L2"])
    about, normalised = measured(run, target, *flags, "--no-ra", "--mean", "cifar10", "--std", "cifar10")
    assert not np.array_equal(normalised["weighted_NP_L2"], values["weighted_NP_L2"])
    assert "plain.pt: taken for" in about["notes"][0][0] and "normalised by (0.4914, " in about["notes"][0][0]
    _, values = measured(run, target, *flags)  # the same tensors taken for a network with reverse attention
    assert not np.array_equal(values["weighted_NP_L2"], values["unweighted_NP_L2"])


# clusters


def test_cluster_numbers_against_their_definitions():
    generator = torch.Generator().manual_seed(1)
    labels = torch.arange(60) % 3
    features = torch.randn(60, 8, generator=generator) + 2 * torch.randn(3, 8, generator=generator)[labels]
    distance = 1 - np.corrcoef(features.double().numpy())
    values, agreement = [], []
    for i, label in enumerate(labels.tolist()):
        means = [distance[i, (labels == k).numpy() & (np.arange(60) != i)].mean() for k in range(3)]
        own, nearest = means.pop(label), min(means)
        values.append((nearest - own) / max(nearest, own))
        near = [j for j in np.argsort(distance[i]) if j != i][:12]
        agreement.append(np.mean([labels[j] == label for j in near]))
    silhouette, share = clusters(features, labels)
    assert silhouette == pytest.approx(np.mean(values), abs=1e-4)
    assert share == pytest.approx(np.mean(agreement), abs=1e-6)


# names


def test_names_are_told_apart_and_fit_into_files():
    assert distinct(["a", "a"], ["b", "c"]) == ["b", "c"]
    assert distinct(["a", "a"], ["b", "b"]) == ["a 1", "a 2"]
    assert file_stem("a b/c", "", "../x") == "a_b_c-.._x"


def test_classes_by_name_number_and_word():
    words = ("goldfish, Carassius auratus", "crane", "crane, wading bird")
    split = Split(torch.zeros(3), torch.tensor([0, 1, 1]), ("n1", "n2", "n3"), words)
    assert class_names(split) == ["goldfish", "crane (n2)", "crane (n3)"]
    for wanted in ("carassius auratus", "n1", "0"):
        assert target_classes(wanted, split) == [0]
    assert target_classes("all", split) == [0, 1]
    for wanted, said in (("crane", "1, 2"), ("goldfis", "the first are goldfish"), ("3", "0 to 2"), ("-1", "0 to 2"),
                         ("n3", "no image"), ("٣", "no class")):  # fmt: skip
        with pytest.raises(UsageError, match=said):
            target_classes(wanted, split)
    numbered = Split(torch.zeros(2), torch.tensor([0, 1]), ("1", "2"))
    assert target_classes("1", numbered) == [0]  # a name wins over a number


def test_tiny_imagenet_has_words_where_its_file_has(monkeypatch, tmp_path):
    write_tiny_imagenet(monkeypatch, tmp_path)
    split = load_split("tiny-imagenet", "test", str(tmp_path), 64)
    assert split.classes == ("n01", "n02", "n03") and split.words == ("thing n01", "thing n02", "thing n03")
    assert split.take(torch.tensor([0])).to(torch.device("cpu")).words == split.words
    words = tmp_path / "tiny-imagenet-200" / "words.txt"
    words.write_text("n02\ttabby, tabby cat\n")
    assert class_names(load_split("tiny-imagenet", "test", str(tmp_path), 64)) == ["n01", "tabby", "n03"]
    words.unlink()
    assert class_names(load_split("tiny-imagenet", "test", str(tmp_path), 64)) == ["n01", "n02", "n03"]


def test_names_of_cifar_are_torchvision_s(monkeypatch):
    import torchvision.datasets

    class Stub:
        base_folder = "cifar-10-batches-py"

        def __init__(self, *args, **kwargs):
            self.data, self.targets, self.classes = np.zeros((2, 32, 32, 3), np.uint8), [0, 3], list("abcd")

    monkeypatch.setattr(torchvision.datasets, "CIFAR10", Stub)
    assert class_names(load_split("cifar10", "test", "", 32)) == list("abcd")


def test_pgd_is_on_the_head_that_answers(run):
    flags = ("--n-examples=80", "--num-steps=3")
    one, other = measured(run, 3, *flags), measured(run, 3, *flags, "--predict=auxiliary1")
    assert (one[0]["predict"], other[0]["predict"]) == ("final", "auxiliary1")
    assert other[0]["method"] == f"{one[0]['method']}, auxiliary1"
    assert not np.allclose(one[1]["weighted_PP_cosine"], other[1]["weighted_PP_cosine"])
    assert np.array_equal(one[1]["weighted_NP_cosine"], other[1]["weighted_NP_cosine"])  # natural images


# bad input

RUN_3 = ("--model_dir", "run.pt", "--target_label", "3")


@pytest.mark.parametrize(
    "flags, said",
    [
        ((), "--model_dir is required"),
        (RUN_3[:2], "--target_label is required"),
        ((*RUN_3[:3], "cat"), "no class 'cat'"),
        ((*RUN_3[:3], "10"), "from 0 to 9, a name, or all; the first are 0, 1"),
        ((*RUN_3, "--n-examples", "1"), "no image among the 1"),
        ((*RUN_3[:3], "all", "--n-examples", "1"), "single class"),
        ((*RUN_3, "--dataset", "cifar10"), "16"),
        (("--model_dir", "five.pt", "--target_label", "3"), "5 classes"),
        (("--model_dir", "nowhere", "--target_label", "3"), "nowhere does not exist"),
        ((*RUN_3, "--name", "a/b"), "--out"),
        ((*RUN_3, "--strategy", "near"), "invalid choice"),
        ((*RUN_3, "--out", "run.pt"), "run.pt cannot be written"),
    ],
)
def test_bad_input_of_feature_distance(here, refused, flags, said):
    checkpoint(here / "run.pt")
    checkpoint(here / "five.pt", num_classes=5)
    refused(SCRIPT, *flags, mentions=[said])


def test_another_run_s_distances_are_not_overwritten(here, refused):
    quick = ("--target_label", "3", "--num-steps", "1", "--name", "same")
    for name in ("a.pt", "b.pt"):
        checkpoint(here / name)
    assert execute(SCRIPT, "--model_dir", "a.pt", *quick) == 0
    assert execute(SCRIPT, "--model_dir", here / "a.pt", *quick) == 0  # its own may be
    refused(SCRIPT, "--model_dir", "b.pt", *quick, mentions=["same-3.npz", "--name"])
    (here / "distances" / "same-3.npz").write_bytes(b"mine")
    refused(SCRIPT, "--model_dir", "a.pt", *quick, mentions=["same-3.npz"])


def test_a_folder_sorted_by_class_has_negatives_of_others(here):
    root = image_folder(here / "pictures", {part: {"cat": 3, "dog": 1} for part in ("train", "test")})
    run = checkpoint(here / "run.pt", num_classes=2, classes=["cat", "dog"], dataset="folder")
    flags = ("--data-dir", root, "--num-steps", "1")
    assert execute(SCRIPT, "--model_dir", run, "--target_label", "cat", "--name", "pets", *flags) == 0
    settings, values = read_distances(here / "distances" / "pets-0.npz")  # by numpy without pickles
    assert (settings["target_name"], settings["strategy"]) == ("cat", "random")
    assert values["indices"].tolist() == [0, 1, 2] and values["negatives"].tolist() == [3, 3, 3]
