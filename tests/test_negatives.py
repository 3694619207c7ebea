"""Choosing negatives: the official choices where they are defined, our rules where they are not."""

import pytest
import torch

from tests.golden_numbers import golden_tensors
from utils.negatives import choose_negatives


def chosen(
    labels,
    strategy="random",
    logits=None,
    seed=0,
    classes=1,
    per_class=1,
):
    """Return the negatives that are chosen with a seed."""
    generator = torch.Generator().manual_seed(seed)
    return choose_negatives(logits, labels, strategy, generator, classes, per_class)


@pytest.mark.parametrize("strategy", ["soft", "hard", "easy"])
@pytest.mark.parametrize("tag", ["c10", "c200"])
def test_choices_are_the_official_ones(tag, strategy):
    golden = golden_tensors("negatives", tag)
    labels = golden["labels"]
    official = golden[strategy]
    is_defined = official >= 0
    ours = chosen(labels, strategy, golden["logits"]).squeeze(1)
    assert is_defined.any()
    assert torch.equal(ours[is_defined], official[is_defined])
    assert (labels[ours] != labels).all()


@pytest.mark.parametrize("strategy", ["random", "soft", "hard", "easy"])
@pytest.mark.parametrize(("classes", "per_class"), [(1, 1), (2, 3), (9, 9)])
def test_negatives_are_of_another_class_whatever_is_asked(strategy, classes, per_class):
    for seed in range(20):
        labels = torch.randint(0, 4, (13,))
        logits = torch.randn(13, 4)
        rows = chosen(labels, strategy, logits, seed, classes, per_class)
        assert rows.shape == (13, classes * per_class)
        assert (labels[rows] != labels[:, None]).all()


def test_random_takes_distinct_classes_and_distinct_images():
    labels = torch.arange(5).repeat_interleave(4)
    for row in chosen(labels, classes=3, per_class=4):
        _, counts = labels[row].unique(return_counts=True)
        assert counts.tolist() == [4, 4, 4]
        assert len(row.unique()) == 12


def test_random_prefers_classes_with_enough_images():
    labels = torch.tensor([0, 0, 0, 1, 2, 2, 2])
    for seed in range(20):
        rows = chosen(labels, seed=seed, per_class=3)
        assert 3 not in rows[labels != 1]  # class 1 has one image; another class has three


def test_random_is_even_over_classes_and_over_their_images():
    labels = torch.tensor([0, 1, 1, 1, 2])
    of_first = [chosen(labels, seed=seed)[0] for seed in range(4000)]
    shares = torch.cat(of_first).bincount(minlength=5) / 4000
    expected = [0, 1 / 6, 1 / 6, 1 / 6, 1 / 2]
    assert shares.tolist() == pytest.approx(expected, abs=0.03)


def test_guided_takes_the_largest_logits_in_order_and_fills_up():
    labels = torch.tensor([0, 1, 1, 2, 2])
    logits = torch.tensor(
        [
            [3.0, 0.0, 0.0],
            [2.0, 1.0, 0.0],
            [5.0, 1.0, 0.0],
            [4.0, 1.0, 0.0],
            [0.0, 1.0, 2.0],
        ]
    )
    row = chosen(labels, "hard", logits, classes=2, per_class=2)[0]
    assert row[:3].tolist() == [2, 3, 1]  # predicted as class 0, by logit of class 0
    assert labels[row[3]] != 0


def test_a_batch_of_one_class_has_no_negatives():
    assert chosen(torch.zeros(4, dtype=torch.long)) is None


def test_unknown_strategies_list_the_known_ones():
    with pytest.raises(ValueError, match="easy"):
        chosen(torch.tensor([0, 1]), "hardest")
