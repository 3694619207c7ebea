"""Choosing negatives: the official choices where they are defined, our rules where they are not."""

import numpy as np
import pytest
import torch

from tests.golden_numbers import FOLDER
from utils.negatives import choose_negatives

GOLDEN = np.load(FOLDER / "negatives.npz")


def generator(seed=0):
    """Return a generator of random numbers."""
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("strategy", ["soft", "hard", "easy"])
@pytest.mark.parametrize("tag", ["c10", "c200"])
def test_choices_are_the_official_ones(tag, strategy):
    logits = torch.from_numpy(GOLDEN[f"{tag}/logits"])
    labels = torch.from_numpy(GOLDEN[f"{tag}/labels"])
    expected = torch.from_numpy(GOLDEN[f"{tag}/{strategy}"])
    chosen = choose_negatives(logits, labels, strategy, generator()).squeeze(1)
    defined = expected >= 0
    assert defined.any()
    assert torch.equal(chosen[defined], expected[defined])
    assert (labels[chosen] != labels).all()


@pytest.mark.parametrize("strategy", ["random", "soft", "hard", "easy"])
@pytest.mark.parametrize(("classes", "per_class"), [(1, 1), (2, 3), (9, 9)])
def test_negatives_are_of_another_class_whatever_is_asked(strategy, classes, per_class):
    for seed in range(20):
        g = generator(seed)
        labels = torch.randint(0, 4, (13,), generator=g)
        logits = torch.randn(13, 4, generator=g)
        chosen = choose_negatives(logits, labels, strategy, g, classes, per_class)
        assert chosen.shape == (13, classes * per_class)
        assert (labels[chosen] != labels[:, None]).all()


def test_random_takes_distinct_classes_and_distinct_images():
    labels = torch.arange(5).repeat_interleave(4)
    chosen = choose_negatives(None, labels, "random", generator(), 3, 4)
    for row in chosen:
        assert len(row.unique()) == 12
        assert labels[row].unique(return_counts=True)[1].tolist() == [4, 4, 4]


def test_random_prefers_classes_with_enough_images():
    labels = torch.tensor([0, 0, 0, 1, 2, 2, 2])
    for seed in range(20):
        chosen = choose_negatives(None, labels, "random", generator(seed), 1, 3)
        assert 3 not in chosen[labels != 1]  # class 1 has one image; another class has three


def test_random_is_even_over_classes_and_over_their_images():
    labels = torch.tensor([0, 1, 1, 1, 2])
    draws = [choose_negatives(None, labels, "random", generator(s))[0] for s in range(4000)]
    shares = torch.bincount(torch.cat(draws), minlength=5) / len(draws)
    assert shares.tolist() == pytest.approx([0, 1 / 6, 1 / 6, 1 / 6, 1 / 2], abs=0.03)


def test_guided_takes_the_largest_logits_in_order_and_fills_up():
    labels = torch.tensor([0, 1, 1, 2, 2])
    logits = torch.tensor([[3.0, 0, 0], [2.0, 1, 0], [5.0, 1, 0], [4.0, 1, 0], [0, 1.0, 2]])
    chosen = choose_negatives(logits, labels, "hard", generator(), 2, 2)[0]
    assert chosen[:3].tolist() == [2, 3, 1]  # predicted as class 0, by logit of class 0
    assert labels[chosen[3]] != 0


def test_a_batch_of_one_class_has_no_negatives():
    assert choose_negatives(None, torch.zeros(4).long(), "random", generator()) is None


def test_unknown_strategies_list_the_known_ones():
    with pytest.raises(ValueError, match="easy"):
        choose_negatives(None, torch.tensor([0, 1]), "hardest", generator())
