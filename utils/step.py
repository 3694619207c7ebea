"""One training step of one process: draw, attack, three forwards, a sum of terms.

    draws = draw(x, labels, logits, strategy, settings, generator)
    attacked = attack(pgd, x, labels, draws, natural, settings)
    stats = training_loss(model, x, labels, attacked, settings)
    stats.loss.backward()

`settings` has the fields of `Training` in utils/system/settings.py. The caller, in
utils/training/loop.py, draws for the whole batch in every process, and gives each process its slice
of images and draws.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models import Heads
from utils.attacks import ToAttack, gaussian_start, summed_cross_entropy
from utils.losses import (
    asymmetric_negative_contrast,
    kl_divergence,
    mart_loss,
    over_heads,
    pgd_loss,
    trades_loss,
)
from utils.negatives import choose_negatives

Settings = Any  # utils.system.settings.Training, which the method does not import

# What each method minimises over heads, from the logits of natural and of adversarial images. The
# methods in ADVERSARIAL_ONLY take the logits of adversarial images alone.
OBJECTIVES: dict[str, Callable[..., Tensor]] = {
    "pgd": lambda adv, labels, s: pgd_loss(adv, labels, s.label_smoothing),
    "trades": lambda nat, adv, labels, s: trades_loss(nat, adv, labels, s.beta, s.label_smoothing),
    "mart": lambda nat, adv, labels, s: mart_loss(nat, adv, labels, s.beta),
}
ADVERSARIAL_ONLY = ("pgd",)


class Draws(NamedTuple):
    """What a step draws at random for N images: where attacks start, and K negatives an image.

    start: (N, 3, H, W). negative: (N, K, 3, H, W), and negative_labels: (N, K), their own classes;
    None in a step without negatives. negative_start: like negative, None where negatives are not
    attacked.
    """

    start: Tensor
    negative: Tensor | None = None
    negative_labels: Tensor | None = None
    negative_start: Tensor | None = None


class Attacked(NamedTuple):
    """What a batch of N images is trained on besides itself.

    adversarial: (N, 3, H, W). negative: (N * K, 3, H, W), the K of each image in a row, and
    negative_labels: (N * K,), their own classes; None in a step without negatives.
    """

    adversarial: Tensor
    negative: Tensor | None = None
    negative_labels: Tensor | None = None


class StepStats(NamedTuple):
    """The numbers of a step: scalar tensors, means over a batch. Only `loss` has a gradient.

    contrast: ANC over heads, before zeta; 0 without negatives. cross_entropy (trades: of natural
    images, else of adversarial ones) and kl are of the final logits. auxiliary: what the other
    heads add to the loss, without their ANC. robust, natural: shares of right predictions of the
    first auxiliary head, or of the only head. kl is 0 and natural is NaN where the method needs no
    natural forward.
    """

    loss: Tensor
    contrast: Tensor
    cross_entropy: Tensor
    kl: Tensor
    auxiliary: Tensor
    robust: Tensor
    natural: Tensor


def away_from_labels(heads: Heads, labels: Tensor, auxiliary_weight: float) -> Tensor:
    """Return what `--inner ce` ascends: cross-entropy over heads, summed over images."""
    return over_heads(summed_cross_entropy(labels), heads, auxiliary_weight=auxiliary_weight)


def towards_labels(heads: Heads, labels: Tensor, auxiliary_weight: float) -> Tensor:
    """Return what makes a negative look like its anchor's class."""
    return -away_from_labels(heads, labels, auxiliary_weight)


def away_from_natural(heads: Heads, natural: Heads, auxiliary_weight: float) -> Tensor:
    """Return what `--inner kl`, TRADES' own attack, ascends: KL over heads from natural images."""
    return over_heads(kl_divergence, natural, heads, auxiliary_weight=auxiliary_weight)


def negative_strategy(settings: Settings, epoch: int) -> str | None:
    """Return how an epoch chooses negatives, a name of `STRATEGIES`, or None without ANC."""
    if settings.no_anc:
        return None
    if epoch <= settings.warmup_epochs:
        return "random"
    return settings.strategy.removesuffix("_adv")


def draw(
    x: Tensor,
    labels: Tensor,
    logits: Tensor | None,
    strategy: str | None,
    settings: Settings,
    generator: torch.Generator,
) -> Draws:
    """Draw the negatives of a batch, and where the attacks on both start.

    x: (N, 3, H, W). labels: (N,); on the CPU, since counting them on a device waits for it.
    logits: (N, C) of the attacked network on x, None where the strategy is `random` or None.
    """
    chosen = None
    if strategy is not None:
        counts = settings.sample_class_number, settings.sample_number
        chosen = choose_negatives(logits, labels, strategy, generator, *counts)
    start = gaussian_start(x, generator)
    if chosen is None:
        return Draws(start)
    negative = x[chosen]
    negative_labels = labels.to(x.device, non_blocking=True)[chosen]
    if not settings.strategy.endswith("_adv"):  # which `strategy` never does
        return Draws(start, negative, negative_labels)
    return Draws(start, negative, negative_labels, gaussian_start(negative, generator))


def attack(
    pgd: Callable[..., list[Tensor]],
    x: Tensor,
    labels: Tensor,
    draws: Draws,
    natural: Heads | None,
    settings: Settings,
) -> Attacked:
    """Attack a batch x (N, 3, H, W), labels (N,); push each negative towards its anchor's class.

    pgd: `pgd_together` on the copy of the network that attacks see. natural: that copy's
    heads on x, for `--inner kl`.
    """
    untargeted = {
        "ce": ToAttack(x, draws.start, away_from_labels, labels),
        "kl": ToAttack(x, draws.start, away_from_natural, natural),
    }
    batches = [untargeted[settings.inner]]
    if draws.negative_start is not None:
        negative = draws.negative.flatten(0, 1)
        start = draws.negative_start.flatten(0, 1)
        anchor_labels = labels.repeat_interleave(draws.negative.shape[1])
        batches.append(ToAttack(negative, start, towards_labels, anchor_labels))

    adversarial, *pushed = pgd(
        batches,
        settings.attack_auxiliary_weight,
        settings.epsilon,
        settings.step_size,
        settings.num_steps,
        settings.norm,
    )
    if draws.negative is None:
        return Attacked(adversarial)
    negative = pushed[0] if pushed else draws.negative.flatten(0, 1)
    return Attacked(adversarial, negative, draws.negative_labels.flatten())


def first_head_right(heads: Heads, labels: Tensor) -> Tensor:
    """Return the share of right predictions of the first head, a scalar.

    That is `auxiliary[0]`, the only head that a training forward computes without the labels, or
    the `final` one of a plain network.
    """
    logits = heads.auxiliary[0] if heads.auxiliary else heads.final
    return (logits.argmax(1) == labels).float().mean()


def training_loss(
    model: nn.Module, x: Tensor, labels: Tensor, attacked: Attacked, settings: Settings
) -> StepStats:
    """Compute the loss of a batch: objective + zeta * ANC, each over heads with weight lambda.

    Natural, adversarial and negative images take separate forwards in this order, since each
    updates BatchNorm's statistics. Each forward is gated by its images' own labels.
    """
    auxiliary_weight = settings.cr_beta  # lambda
    adversarial_only = settings.method in ADVERSARIAL_ONLY

    natural = None
    if not adversarial_only or attacked.negative is not None:
        natural = model(x, labels, heads=True)
    adversarial = model(attacked.adversarial, labels, heads=True)

    # For trades this is CE(natural) + beta * KL(natural || adversarial).
    def objective(*logits: Tensor) -> Tensor:
        return OBJECTIVES[settings.method](*logits, labels, settings)

    heads = (adversarial,) if adversarial_only else (natural, adversarial)
    objective_over_heads = over_heads(objective, *heads, auxiliary_weight=auxiliary_weight)

    def anc(natural: Tensor, negative: Tensor) -> Tensor:
        return asymmetric_negative_contrast(natural, negative, settings.alpha)

    loss = objective_over_heads
    contrast = loss.new_zeros(())
    if attacked.negative is not None:
        negative = model(attacked.negative, attacked.negative_labels, heads=True)
        contrast = over_heads(anc, natural, negative, auxiliary_weight=auxiliary_weight)
        loss = loss + settings.zeta * contrast

    with torch.no_grad():  # the other numbers are for the log alone
        shown = natural if settings.method == "trades" else adversarial
        kl = loss.new_zeros(())
        if not adversarial_only:
            kl = kl_divergence(natural.final, adversarial.final)
        natural_right = loss.new_full((), torch.nan)
        if natural is not None:
            natural_right = first_head_right(natural, labels)
        return StepStats(
            loss,
            contrast.detach(),
            F.cross_entropy(shown.final, labels),
            kl,
            objective_over_heads - objective(*(side.final for side in heads)),
            first_head_right(adversarial, labels),
            natural_right,
        )
