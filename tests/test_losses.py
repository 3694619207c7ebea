"""Objectives against the numbers of the official losses: totals, terms and gradients."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F

from models import Heads
from tests.golden_numbers import assert_near, golden_tensors
from utils.losses import (
    asymmetric_negative_contrast,
    kl_divergence,
    mart_loss,
    over_heads,
    trades_loss,
)

SIDES = ("nat", "adv", "neg")


def assert_gradients(golden, names):
    """Compare the gradients of golden tensors with the golden ones."""
    for name in names:
        assert_near(golden[name].grad, golden[f"grad_{name}"])


@pytest.mark.parametrize(
    "tag", ["trades_ancra_c10", "trades_ancra_alpha05_c10", "trades_ancra_c200"]
)
def test_ancra_trades_terms_total_and_gradients(tag):
    golden = golden_tensors("losses", tag)
    labels = golden["labels"]
    alpha, beta, zeta, weight = golden["hparams"].tolist()
    over = partial(over_heads, auxiliary_weight=weight)
    heads = {}
    for side in SIDES:
        final = golden[side].requires_grad_()
        auxiliary = golden[f"{side}_aux"].requires_grad_()
        heads[side] = Heads(final, tuple(auxiliary), final)
    natural, adversarial, negative = heads.values()

    accuracy = over(lambda n: F.cross_entropy(n, labels), natural)
    robustness = over(kl_divergence, natural, adversarial)
    contrast = over(partial(asymmetric_negative_contrast, alpha=alpha), natural, negative)
    trades = over(partial(trades_loss, labels=labels, beta=beta), natural, adversarial)
    total = trades + zeta * contrast
    values = [value.item() for value in (total, accuracy, robustness, contrast)]
    assert values == pytest.approx(golden["loss"].tolist(), rel=1e-4, abs=1e-7)

    total.backward()
    assert_gradients(golden, [*SIDES, *(f"{side}_aux" for side in SIDES)])


@pytest.mark.parametrize(("tag", "loss"), [("trades_c10", trades_loss), ("mart_c10", mart_loss)])
def test_trades_and_mart_as_released(tag, loss):
    golden = golden_tensors("losses", tag)
    natural = golden["nat"].requires_grad_()
    adversarial = golden["adv"].requires_grad_()
    value = loss(natural, adversarial, golden["labels"], golden["hparams"][0].item())
    assert value.item() == pytest.approx(golden["loss"][0].item(), rel=1e-4)
    value.backward()
    assert_gradients(golden, ["nat", "adv"])


@pytest.mark.parametrize("scale", [0.0, 104.0, 1e20])
def test_values_and_gradients_are_finite_whatever_the_logits(scale):
    """Also where a probability underflows to 0, and where float16 would overflow."""
    labels = torch.tensor([0, 1, 2, 0])
    natural = (scale * torch.randn(4, 10)).requires_grad_()
    other = (scale * torch.randn(4, 10)).requires_grad_()
    for value in (
        trades_loss(natural, other, labels, 6.0),
        mart_loss(natural, other, labels, 5.0),
        asymmetric_negative_contrast(natural, other, 0.5),
    ):
        assert value.isfinite()
        for gradient in torch.autograd.grad(value, [natural, other]):
            assert gradient.isfinite().all()
