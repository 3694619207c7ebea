"""Objectives against the numbers of the official losses: totals, terms and gradients."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from models import Heads
from tests.golden_numbers import FOLDER, assert_near
from utils.losses import (
    asymmetric_negative_contrast,
    kl_divergence,
    mart_loss,
    over_heads,
    pgd_loss,
    trades_loss,
)

LOSSES = np.load(FOLDER / "losses.npz")
ANCRA = ["trades_ancra_c10", "trades_ancra_alpha05_c10", "trades_ancra_c200"]


def array(tag, name):
    return torch.from_numpy(LOSSES[f"{tag}/{name}"])


def leaves(tag, side):
    final, auxiliary = array(tag, side).requires_grad_(), array(tag, f"{side}_aux").requires_grad_()
    return Heads(final, tuple(auxiliary), torch.empty(0)), (final, auxiliary)


@pytest.mark.parametrize("tag", ANCRA)
def test_ancra_trades_terms_total_and_gradients(tag):
    labels = array(tag, "labels")
    alpha, beta, zeta, weight = (float(value) for value in LOSSES[f"{tag}/hparams"])
    (natural, nat), (adversarial, adv), (negative, neg) = (leaves(tag, side) for side in ("nat", "adv", "neg"))

    def over(criterion, *heads):
        return over_heads(criterion, *heads, auxiliary_weight=weight)

    terms = [
        over(lambda n: F.cross_entropy(n, labels), natural),
        over(kl_divergence, natural, adversarial),
        over(lambda a, g: asymmetric_negative_contrast(a, g, alpha), natural, negative),
    ]
    total = over(lambda n, a: trades_loss(n, a, labels, beta), natural, adversarial) + zeta * terms[2]
    for value, expected in zip([total, *terms], LOSSES[f"{tag}/loss"], strict=True):
        assert float(value.detach()) == pytest.approx(expected, rel=1e-4, abs=1e-7)
    total.backward()
    for side, (final, auxiliary) in (("nat", nat), ("adv", adv), ("neg", neg)):
        assert_near(final.grad, array(tag, f"grad_{side}"))
        assert_near(auxiliary.grad, array(tag, f"grad_{side}_aux"))


@pytest.mark.parametrize(("tag", "loss"), [("trades_c10", trades_loss), ("mart_c10", mart_loss)])
def test_trades_and_mart_as_released(tag, loss):
    natural, adversarial = array(tag, "nat").requires_grad_(), array(tag, "adv").requires_grad_()
    value = loss(natural, adversarial, array(tag, "labels"), float(LOSSES[f"{tag}/hparams"][0]))
    assert float(value.detach()) == pytest.approx(float(LOSSES[f"{tag}/loss"][0]), rel=1e-4)
    value.backward()
    assert_near(natural.grad, array(tag, "grad_nat"))
    assert_near(adversarial.grad, array(tag, "grad_adv"))


@pytest.mark.parametrize("scale", [0.0, 1.0, 104.0, 1e4, 1e20])
def test_values_and_gradients_are_finite_whatever_the_logits(scale):
    """Also where a probability underflows to 0, and where logits are larger than float16 can say."""
    labels, generator = torch.tensor([0, 1, 2, 0]), torch.Generator().manual_seed(0)
    for loss in (
        lambda one, other: trades_loss(one, other, labels, 6.0),
        lambda one, other: mart_loss(one, other, labels, 5.0),
        lambda one, other: pgd_loss(one, labels) + pgd_loss(other, labels),
        lambda one, other: asymmetric_negative_contrast(one, other, 0.5),
    ):
        one, other = ((scale * torch.randn(4, 10, generator=generator)).requires_grad_() for _ in range(2))
        value = loss(one, other)
        value.backward()
        assert value.isfinite() and one.grad.isfinite().all() and other.grad.isfinite().all()


def test_alpha_one_moves_negatives_only_and_alpha_zero_anchors_only():
    for alpha, moved in ((1, "negative"), (0, "natural")):
        natural, negative = (torch.tensor([[2.0, 0, 1]], requires_grad=True) for _ in range(2))
        asymmetric_negative_contrast(natural, negative, alpha).backward()
        still, moving = (natural, negative) if moved == "negative" else (negative, natural)
        assert moving.grad.abs().sum() > 0 and still.grad.abs().sum() == 0


def test_contrast_repeats_anchors_anchor_major_and_ignores_other_predictions():
    natural = torch.tensor([[5.0, 0, 0], [0, 5.0, 0]])
    same = float(F.softmax(natural[0], 0).max())
    negative = torch.tensor([[5.0, 0, 0], [0, 5.0, 0], [5.0, 0, 0], [0, 0, 5.0]])  # of anchors 0, 0, 1, 1
    assert float(asymmetric_negative_contrast(natural, negative, 1)) == pytest.approx(same / 4)


def test_heads_are_weighted_and_a_plain_network_has_one_term():
    logits, labels = torch.randn(4, 3), torch.tensor([0, 1, 2, 0])
    one = pgd_loss(logits, labels)
    plain, both = Heads(logits, (), logits), Heads(logits, (logits, 2 * logits), logits)

    def over(heads):
        return over_heads(lambda x: pgd_loss(x, labels), heads, auxiliary_weight=2)

    assert over(plain) == one
    assert float(over(both)) == pytest.approx(float(2 * one + pgd_loss(2 * logits, labels)))
