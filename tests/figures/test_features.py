"""Features, distances, negatives, clusters, and feature_distance.py."""

import numpy as np
import pytest
import torch
from sklearn.metrics import silhouette_score
from sklearn.metrics.pairwise import paired_cosine_distances, paired_euclidean_distances

from models import build_model
from tests.helpers import checkpoint, digits_checkpoint, execute
from utils.attacks import cross_entropy, pgd
from utils.data.datasets import Split, as_input, shuffled
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
    argv = (f"--model_dir={run}", f"--target_label={target}", "--name=measured")
    assert execute(SCRIPT, *argv, *flags) == 0
    file = run.parent / "distances" / f"measured-{target}.npz"
    return read_arrays(file)


# Features


@pytest.mark.parametrize(
    ("arch", "width", "size"),
    [
        ("ResNet18", 4, 16),
        ("WRN-34-10", 1, 16),
        ("PreActResNet18", 4, 64),  # a last map of 2x2 cells
    ],
)
def test_weighted_features_are_the_unweighted_ones_times_the_predicted_row(arch, width, size):
    model = build_model(arch, 5, width=width, image_size=size)
    model.double()
    shape = (3, 3, size, size)
    x = torch.rand(shape, dtype=torch.float64)
    model.train()  # where the map of a fresh network does not fade
    with torch.no_grad():
        heads = model(x, heads=True)
    last = heads.auxiliary[-1]
    assert torch.allclose(model.classifier(heads.unweighted), last)
    rows = model.classifier.weight[last.argmax(1)]
    weighted = heads.unweighted * rows
    assert torch.allclose(heads.features, weighted)
    assert heads.unweighted.max() > 0.1


def test_features_do_not_depend_on_the_batch_size_and_must_be_finite(trained):
    model, split, _ = trained
    with frozen(model) as net:
        whole = extract(net, split, 360)
        parts = extract(net, split, 7)
        for features, same in zip(whole, parts, strict=True):
            assert len(features) == 360
            assert torch.allclose(features, same, rtol=1e-4, atol=1e-5)
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
    again = choose_in_blocks(labels, logits, strategy, 3)
    assert torch.equal(chosen, again)
    other = choose_in_blocks(labels, logits, strategy, 4)
    assert not torch.equal(chosen, other)
    place = shuffled(450, 3).argsort()
    block = place // BLOCK
    assert torch.equal(block[chosen], block)


@pytest.mark.parametrize("strategy", ["random", "hard"])
def test_a_block_without_another_class_takes_negatives_from_the_rest(strategy):
    labels = torch.zeros(401, dtype=torch.long)
    labels[17] = 1  # two blocks at least hold class 0 alone
    logits = torch.zeros(401, 2)
    chosen = choose_in_blocks(labels, logits, strategy, 0)
    assert (chosen[labels == 0] == 17).all()
    assert labels[chosen[17]] == 0
    with pytest.raises(UsageError):
        choose_in_blocks(labels[:10], None, strategy, 0)


# Distances


def test_distances_are_those_of_scikit_learn():
    a, b = torch.randn(2, 5, 7)
    distances = compare(a, b)
    euclidean = paired_euclidean_distances(a, b)
    assert distances["L2"] == pytest.approx(euclidean)
    cosine = 1 - paired_cosine_distances(a, b)
    assert distances["cosine"] == pytest.approx(cosine, abs=1e-6)
    tiny = 1e-9 * a
    of_equal_ones = compare(tiny, tiny)
    assert of_equal_ones["cosine"] == pytest.approx(1)


def test_distances_of_a_class_are_those_of_its_images(trained, run):
    model, split, _ = trained
    settings, values = measured(run, 0, "--num-steps=3")
    assert settings["epsilon"] == 0.1
    numbers = torch.from_numpy(values["indices"])
    images = split.take(numbers)
    negative_numbers = torch.from_numpy(values["negatives"])
    negatives = split.take(negative_numbers)
    expected = (split.labels == 0).nonzero().squeeze(1)
    assert torch.equal(numbers.sort().values, expected)
    assert (negatives.labels != 0).all()

    def assert_measured(name, features, other_features):
        for metric, distances in compare(features, other_features).items():
            written = values[f"{name}_{metric}"]
            assert np.allclose(written, distances, rtol=1e-4, atol=1e-5)

    x = as_input(images.images)
    attack = pgd(cross_entropy, 0.1, 0.02, 3, start="normal", seed=1)
    with frozen(model) as net:
        natural = net(x, heads=True)
        pairs = {
            "PP": attack(net, x, images.labels, numbers),
            "NP": as_input(negatives.images),
        }
        for pair, batch in pairs.items():
            other = net(batch, heads=True)
            assert_measured(f"weighted_{pair}", natural.features, other.features)
            assert_measured(f"unweighted_{pair}", natural.unweighted, other.unweighted)


def test_one_class_or_all_at_any_batch_size_is_the_same(run, here, capsys):
    flags = ("--n-examples=120", "--num-steps=2", "--strategy=hard")
    _, alone = measured(run, 3, *flags, "--test-batch-size=9")
    settings, together = measured(run, "all", *flags)
    file = here / "distances" / "measured-3.npz"
    _, of_class = read_arrays(file)
    chosen = np.isin(together["indices"], alone["indices"])
    tolerance = {"rtol": 1e-2, "atol": 1e-3}
    for key, array in of_class.items():
        is_close = np.isclose(alone[key], array, **tolerance)
        assert is_close.mean() > 0.9, key
        of_all = together[key]
        assert np.array_equal(array, of_all[chosen])
    assert "unweighted" in capsys.readouterr().out

    # --n-examples takes the same images everywhere; numbers count in the whole test set.
    assert settings["n_examples"] == 120
    shuffle = np.random.default_rng(0).permutation(360)
    assert np.array_equal(together["indices"], shuffle[:120])


def test_adversarial_negatives_look_more_like_the_class(run):
    _, natural = measured(run, 5, "--epsilon=0.3", "--strategy=random")
    _, pushed = measured(run, 5, "--epsilon=0.3", "--strategy=random_adv")
    assert np.array_equal(natural["negatives"], pushed["negatives"])
    cosine = "unweighted_NP_cosine"
    closer = pushed[cosine] - natural[cosine]
    assert closer.mean() > 0.05


def test_a_plain_network_has_one_kind_of_features(here, capsys):
    run = digits_checkpoint(here / "plain.pt", reverse_attention=False)
    _, values = measured(run, 3, "--n-examples=60", "--num-steps=1")
    assert " weighted" not in capsys.readouterr().out.replace("\n", " ")
    weighted = values["weighted_NP_L2"]
    assert np.array_equal(weighted, values["unweighted_NP_L2"])


def test_pgd_attacks_the_head_that_answers(run):
    """So that NP distances, of images that are not attacked, stay."""
    flags = ("--n-examples=80", "--num-steps=3")
    _, final = measured(run, 3, *flags)
    settings, auxiliary = measured(run, 3, *flags, "--predict=auxiliary1")
    assert "auxiliary1" in settings["method"]
    assert not np.allclose(final["weighted_PP_cosine"], auxiliary["weighted_PP_cosine"])
    assert np.array_equal(final["weighted_NP_cosine"], auxiliary["weighted_NP_cosine"])


# Clusters


def test_cluster_numbers_against_their_definitions():
    labels = torch.arange(60) % 3
    centres = 2 * torch.randn(3, 8)
    features = torch.randn(60, 8)
    features += centres[labels]
    correlation = np.corrcoef(features.double())
    distance = 1 - correlation
    np.fill_diagonal(distance, 0)
    nearest = distance.argsort(1)[:, 1:13]  # the first is the image itself
    is_alike = labels[nearest] == labels[:, None]
    expected_silhouette = silhouette_score(distance, labels, metric="precomputed")
    expected_agreement = is_alike.double().mean()

    clusters = measure_clusters(features, labels)
    assert clusters["silhouette"] == pytest.approx(expected_silhouette, abs=1e-4)
    assert clusters["agreement"] == pytest.approx(expected_agreement)


# Classes


def test_classes_by_name_synonym_and_number():
    labels = torch.tensor([0, 1, 1])
    wnids = ("n1", "n2", "n3")
    words = ("goldfish, Carassius auratus", "crane", "crane, wading bird")
    split = Split(torch.zeros(3), labels, wnids, words)
    assert class_names(split) == ["goldfish", "crane", "crane"]
    for wanted in ("n1", "Goldfish", "carassius auratus", "0"):
        assert find_classes(wanted, split) == [0]
    assert find_classes("all", split) == [0, 1]
    for wanted in ("goldfis", "3", "n3"):  # of n3 there is no image
        with pytest.raises(UsageError):
            find_classes(wanted, split)
    numbered = split._replace(classes=("1", "2", "3"), words=())
    assert find_classes("1", numbered) == [0]  # a name wins over a number


# Wrong use


@pytest.mark.parametrize(
    ("flags", "word"),
    [
        ("--target_label=cat", "'cat'"),
        ("--target_label=all --n-examples=1", "single class"),
        ("--target_label=3 --out=run.pt", "--out"),
    ],
)
def test_bad_input_of_feature_distance(here, refused, flags, word):
    checkpoint(here / "run.pt")
    refused(SCRIPT, "--model_dir=run.pt", *flags.split(), mentions=[word])


def test_another_run_s_distances_are_not_overwritten(here, refused):
    quick = ("--target_label=3", "--num-steps=1", "--name=same")
    for name in ("a.pt", "b.pt"):
        checkpoint(here / name)
    for path in ("a.pt", here / "a.pt"):  # a run's own may be
        assert execute(SCRIPT, "--model_dir", path, *quick) == 0
    refused(SCRIPT, "--model_dir=b.pt", *quick, mentions=["same-3.npz", "--name"])
