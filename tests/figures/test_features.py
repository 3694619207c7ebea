"""Features, distances, negatives, clusters, and feature_distance.py."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.metrics import silhouette_score
from sklearn.metrics.pairwise import paired_cosine_distances, paired_euclidean_distances

from models import build_model
from tests.helpers import checkpoint, digits_checkpoint, execute
from utils.attacks import image_noise
from utils.data.datasets import Split, as_input
from utils.figures.features import (
    BLOCK,
    choose_in_blocks,
    class_names,
    compare,
    extract,
    find_classes,
    measure_clusters,
)
from utils.system.attack_copy import frozen
from utils.system.errors import RunError, UsageError
from utils.system.files import read_arrays

SCRIPT = "feature_distance.py"


@pytest.fixture
def run(here):
    """A trained network's checkpoint in the current folder."""
    return digits_checkpoint(here / "run.pt")


def measured(run, target, *flags):
    """Run the script for one class -> settings and arrays of the file it wrote."""
    argv = ("--model_dir", run, "--target_label", target, "--name=measured", *flags)
    assert execute(SCRIPT, *argv) == 0
    return read_arrays(run.parent / "distances" / f"measured-{target}.npz")


# Features


@pytest.mark.parametrize(
    ("arch", "width", "size"),
    [
        ("ResNet18", 4, 16),
        ("WRN-34-10", 1, 16),
        ("WRN-28-10", 1, 16),
        ("PreActResNet18", 4, 64),  # a last map of 2x2 cells
    ],
)
def test_weighted_features_are_the_unweighted_ones_times_the_predicted_row(arch, width, size):
    model = build_model(arch, 5, width=width, image_size=size).double().train()
    with torch.no_grad():  # in train mode, where the map of a fresh network does not fade
        heads = model(torch.rand(3, 3, size, size, dtype=torch.float64), heads=True)
    last = heads.auxiliary[-1]
    assert torch.allclose(model.classifier(heads.unweighted), last)
    rows = model.classifier.weight[last.argmax(1)]
    assert torch.allclose(heads.features, heads.unweighted * rows)
    assert heads.unweighted.max() > 0.1


def test_features_do_not_depend_on_the_batch_size_and_must_be_finite(trained):
    model, split, _ = trained
    with frozen(model) as net:
        whole = extract(net, split, 360)
        parts = extract(net, split, 7)
        for a, b in zip(whole, parts, strict=True):
            assert len(a) == len(split.labels)
            assert torch.allclose(a, b, rtol=1e-4, atol=1e-5)
        net.conv1.weight[0] = torch.nan
        with pytest.raises(RunError):
            extract(net, split, 100)


# Negatives


@pytest.mark.parametrize("strategy", ["random", "soft", "hard", "easy"])
def test_negatives_are_of_another_class_and_of_the_same_block(strategy):
    labels = torch.randint(4, (450,))
    logits = torch.randn(450, 4)
    chosen = choose_in_blocks(labels, logits, strategy, 3)
    assert (labels[chosen] != labels).all()
    assert torch.equal(chosen, choose_in_blocks(labels, logits, strategy, 3))
    assert not torch.equal(chosen, choose_in_blocks(labels, logits, strategy, 4))
    order = np.random.default_rng(3).permutation(450)
    block = np.argsort(order) // BLOCK
    assert np.array_equal(block[chosen], block)


@pytest.mark.parametrize("strategy", ["random", "hard"])
def test_a_block_without_another_class_takes_negatives_from_the_rest(strategy):
    labels = torch.zeros(401, dtype=torch.long)
    labels[17] = 1  # two blocks at least hold class 0 alone
    chosen = choose_in_blocks(labels, torch.zeros(401, 2), strategy, 0)
    assert (chosen[labels == 0] == 17).all()
    assert labels[chosen[17]] == 0
    with pytest.raises(UsageError):
        choose_in_blocks(labels[:10], None, strategy, 0)


# Distances


def test_distances_are_those_of_scikit_learn():
    a = torch.randn(5, 7)
    b = torch.randn(5, 7)
    distances = compare(a, b)
    assert np.allclose(distances["L2"], paired_euclidean_distances(a, b))
    assert np.allclose(1 - distances["cosine"], paired_cosine_distances(a, b), atol=1e-6)
    tiny = 1e-9 * a
    assert compare(tiny, tiny)["cosine"] == pytest.approx(1)


def test_distances_of_a_class_are_those_of_its_images(trained, run):
    """Compute them anew, by the network itself and a PGD loop of this test."""
    model, split, _ = trained
    settings, values = measured(run, 0, "--num-steps=3")
    assert settings["target"] == 0
    assert settings["epsilon"] == 0.1
    indices = torch.from_numpy(values["indices"])
    negatives = torch.from_numpy(values["negatives"])
    assert torch.equal(indices.sort().values, (split.labels == 0).nonzero().squeeze(1))
    assert (split.labels[negatives] != 0).all()

    x = as_input(split.images[indices])
    attacked = x + 0.001 * image_noise(x, indices, 1, "normal")
    for _ in range(3):
        attacked.requires_grad_()
        loss = F.cross_entropy(model(attacked), split.labels[indices], reduction="sum")
        (gradient,) = torch.autograd.grad(loss, attacked)
        attacked = attacked.detach() + 0.02 * gradient.sign()
        attacked = attacked.clamp(x - 0.1, x + 0.1).clamp(0, 1)

    # The sign of a gradient near 0 may differ, so a few PGD examples do.
    others = {"PP": (attacked, 0.9), "NP": (as_input(split.images[negatives]), 1)}
    for pair, (images, share) in others.items():
        with torch.no_grad():
            natural, other = (model(batch, heads=True) for batch in (x, images))
        for layer, name in (("weighted", "features"), ("unweighted", "unweighted")):
            expected = compare(getattr(natural, name), getattr(other, name))
            for metric, distances in expected.items():
                actual = values[f"{layer}_{pair}_{metric}"]
                close = np.isclose(actual, distances, rtol=1e-2, atol=1e-3)
                assert close.mean() >= share


def test_one_class_or_all_at_any_batch_size_is_the_same(run, here, capsys):
    flags = ("--n-examples=120", "--num-steps=2", "--strategy=hard")
    _, alone = measured(run, 3, *flags, "--test-batch-size=9")
    settings, together = measured(run, "all", *flags)
    _, of_class = read_arrays(here / "distances" / "measured-3.npz")
    chosen = np.isin(together["indices"], alone["indices"])
    for key, array in alone.items():
        assert np.isclose(array, of_class[key], rtol=1e-2, atol=1e-3).mean() > 0.9, key
        assert np.array_equal(of_class[key], together[key][chosen])
    assert "unweighted" in capsys.readouterr().out

    # --n-examples takes the same images everywhere; numbers count in the whole test set.
    assert settings["test_images"] == 120
    first = np.random.default_rng(0).permutation(360)[:120]
    assert np.array_equal(together["indices"], first)


def test_adversarial_negatives_look_more_like_the_class(run):
    _, natural = measured(run, 5, "--epsilon=0.3", "--strategy=random")
    _, pushed = measured(run, 5, "--epsilon=0.3", "--strategy=random_adv")
    assert np.array_equal(natural["negatives"], pushed["negatives"])
    cosine = "unweighted_NP_cosine"
    assert pushed[cosine].mean() > natural[cosine].mean() + 0.05


def test_a_plain_network_has_one_kind_of_features(here, capsys):
    run = digits_checkpoint(here / "plain.pt", reverse_attention=False)
    _, values = measured(run, 3, "--n-examples=60", "--num-steps=1")
    assert "weighted" not in capsys.readouterr().out
    assert np.array_equal(values["weighted_NP_L2"], values["unweighted_NP_L2"])


def test_pgd_attacks_the_head_that_answers(run):
    flags = ("--n-examples=80", "--num-steps=3")
    _, final = measured(run, 3, *flags)
    settings, auxiliary = measured(run, 3, *flags, "--predict=auxiliary1")
    assert settings["predict"] == "auxiliary1"
    assert "auxiliary1" in settings["method"]
    assert not np.allclose(final["weighted_PP_cosine"], auxiliary["weighted_PP_cosine"])
    assert np.array_equal(final["weighted_NP_cosine"], auxiliary["weighted_NP_cosine"])


# Clusters


def test_cluster_numbers_against_their_definitions():
    labels = torch.arange(60) % 3
    features = torch.randn(60, 8) + 2 * torch.randn(3, 8)[labels]
    distance = 1 - np.corrcoef(features.double().numpy())
    np.fill_diagonal(distance, 0)
    labels_of_nearest = labels[distance.argsort(1)[:, 1:13]]  # the first is the image itself

    silhouette, agreement = measure_clusters(features, labels)
    expected = silhouette_score(distance, labels.numpy(), metric="precomputed")
    assert silhouette == pytest.approx(expected, abs=1e-4)
    expected = (labels_of_nearest == labels[:, None]).double().mean()
    assert agreement == pytest.approx(expected.item(), abs=1e-6)


# Classes


def test_classes_by_name_synonym_and_number():
    words = ("goldfish, Carassius auratus", "crane", "crane, wading bird")
    split = Split(torch.zeros(3), torch.tensor([0, 1, 1]), ("n1", "n2", "n3"), words)
    assert class_names(split) == ["goldfish", "crane", "crane"]
    for wanted in ("n1", "Goldfish", "carassius auratus", "0"):
        assert find_classes(wanted, split) == [0]
    assert find_classes("all", split) == [0, 1]
    for wanted in ("goldfis", "3", "n3"):  # of n3 there is no image
        with pytest.raises(UsageError):
            find_classes(wanted, split)
    numbered = Split(torch.zeros(2), torch.tensor([0, 1]), ("1", "2"))
    assert find_classes("1", numbered) == [0]  # a name wins over a number


# Wrong use


@pytest.mark.parametrize(
    ("flags", "word"),
    [
        (("--target_label=cat",), "'cat'"),
        (("--target_label=all", "--n-examples=1"), "single class"),
        (("--target_label=3", "--out=run.pt"), "--out"),
    ],
)
def test_bad_input_of_feature_distance(here, refused, flags, word):
    checkpoint(here / "run.pt")
    refused(SCRIPT, "--model_dir", "run.pt", *flags, mentions=[word])


def test_another_run_s_distances_are_not_overwritten(here, refused):
    quick = ("--target_label=3", "--num-steps=1", "--name=same")
    for name in ("a.pt", "b.pt"):
        checkpoint(here / name)
    for path in ("a.pt", here / "a.pt"):  # a run's own may be
        assert execute(SCRIPT, "--model_dir", path, *quick) == 0
    refused(SCRIPT, "--model_dir", "b.pt", *quick, mentions=["same-3.npz", "--name"])
