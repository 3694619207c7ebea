"""Objectives against the numbers of the official losses: totals, terms and gradients."""

from functools import partial

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
    trades_loss,
)

LOSSES = np.load(FOLDER / "losses.npz")
ANCRA = ["trades_ancra_c10", "trades_ancra_alpha05_c10", "trades_ancra_c200"]


def array(tag, name):
    """Return an array of the golden file as a tensor."""
    return torch.from_numpy(LOSSES[f"{tag}/{name}"])


@pytest.mark.parametrize("tag", ANCRA)
def test_ancra_trades_terms_total_and_gradients(tag):
    labels = array(tag, "labels")
    alpha, beta, zeta, weight = LOSSES[f"{tag}/hparams"].tolist()
    over = partial(over_heads, auxiliary_weight=weight)
    final, auxiliary, heads = {}, {}, {}
    for side in ("nat", "adv", "neg"):
        final[side] = array(tag, side).requires_grad_()
        auxiliary[side] = array(tag, f"{side}_aux").requires_grad_()
        heads[side] = Heads(final[side], tuple(auxiliary[side]), torch.empty(0))

    accuracy = over(lambda n: F.cross_entropy(n, labels), heads["nat"])
    robustness = over(kl_divergence, heads["nat"], heads["adv"])
    anc = partial(asymmetric_negative_contrast, alpha=alpha)
    contrast = over(anc, heads["nat"], heads["neg"])
    trades = over(lambda n, a: trades_loss(n, a, labels, beta), heads["nat"], heads["adv"])
    total = trades + zeta * contrast
    values = [value.item() for value in (total, accuracy, robustness, contrast)]
    assert values == pytest.approx(LOSSES[f"{tag}/loss"].tolist(), rel=1e-4, abs=1e-7)

    total.backward()
    for side in heads:
        assert_near(final[side].grad, array(tag, f"grad_{side}"))
        assert_near(auxiliary[side].grad, array(tag, f"grad_{side}_aux"))


@pytest.mark.parametrize(("tag", "loss"), [("trades_c10", trades_loss), ("mart_c10", mart_loss)])
def test_trades_and_mart_as_released(tag, loss):
    natural = array(tag, "nat").requires_grad_()
    adversarial = array(tag, "adv").requires_grad_()
    beta = LOSSES[f"{tag}/hparams"][0].item()
    value = loss(natural, adversarial, array(tag, "labels"), beta)
    assert value.item() == pytest.approx(LOSSES[f"{tag}/loss"][0].item(), rel=1e-4)
    value.backward()
    assert_near(natural.grad, array(tag, "grad_nat"))
    assert_near(adversarial.grad, array(tag, "grad_adv"))


@pytest.mark.parametrize("scale", [0.0, 104.0, 1e20])
def test_values_and_gradients_are_finite_whatever_the_logits(scale):
    """Also where a probability underflows to 0, and where float16 would overflow."""
    labels = torch.tensor([0, 1, 2, 0])
    natural = (scale * torch.randn(4, 10)).requires_grad_()
    other = (scale * torch.randn(4, 10)).requires_grad_()
    values = [
        trades_loss(natural, other, labels, 6.0),
        mart_loss(natural, other, labels, 5.0),
        asymmetric_negative_contrast(natural, other, 0.5),
    ]
    for value in values:
        for tensor in (value, *torch.autograd.grad(value, [natural, other])):
            assert tensor.isfinite().all()


def test_contrast_takes_the_negatives_of_each_anchor_in_a_row_and_ignores_other_predictions():
    natural = torch.tensor([[5.0, 0, 0], [0, 5.0, 0]])
    negative = torch.tensor([[5.0, 0, 0], [0, 5.0, 0], [5.0, 0, 0], [0, 0, 5.0]])
    similarity = F.softmax(natural[0], 0).max().item()  # of the first pair, of anchors 0, 0, 1, 1
    contrast = asymmetric_negative_contrast(natural, negative, 1)
    assert contrast.item() == pytest.approx(similarity / 4)


def test_heads_are_weighted_and_a_plain_network_has_one_term():
    logits = torch.ones(1)
    plain = Heads(logits, (), logits)
    with_auxiliary = Heads(logits, (3 * logits, 5 * logits), logits)
    assert over_heads(torch.sum, plain, auxiliary_weight=2) == 1
    assert over_heads(torch.sum, with_auxiliary, auxiliary_weight=2) == 1 + 2 * (3 + 5) / 2
