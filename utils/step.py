"""One training step, as the method's equations: choose negatives, attack, three forwards, a sum of terms, backward."""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models import Heads
from utils.attacks import Bfloat16, Standing, ToAttack, gaussian_start, summed_cross_entropy
from utils.losses import asymmetric_negative_contrast, kl_divergence, mart_loss, over_heads, pgd_loss, trades_loss
from utils.negatives import choose_negatives
from utils.system.distributed import joined, own_slice, own_weight, total, world
from utils.system.settings import Training


class Attacked(NamedTuple):
    """What a batch is trained on besides itself; negatives are None without ANC, or where one class is all there is.

    adversarial: (N, 3, H, W) examples of the batch. negative: (N * K, 3, H, W), the K of each anchor in a row, pushed
    to look like the anchor's class by the `_adv` strategies. negative_labels: (N * K,), the negatives' own.
    """

    adversarial: Tensor
    negative: Tensor | None = None
    negative_labels: Tensor | None = None


class Terms(NamedTuple):
    """Loss of a batch, its contrast before zeta (0 without negatives), and the heads they were computed from.

    natural is None where the method needs no natural forward. auxiliary: what the auxiliary heads add to the loss,
    contrast aside, detached.
    """

    loss: Tensor
    contrast: Tensor
    natural: Heads | None
    adversarial: Heads
    auxiliary: Tensor


class Figures(NamedTuple):
    """Of a step over the whole batch: the loss and its terms, and the shares of right predictions of the first head.

    cross_entropy (of trades on natural images, else on adversarial ones) and kl are those of the final logits,
    auxiliary is what the other heads add. natural is None where the method needs no natural forward.
    """

    loss: float
    contrast: float
    cross_entropy: float
    kl: float
    auxiliary: float
    robust: float
    natural: float | None = None


def away_from_labels(heads: Heads, labels: Tensor, auxiliary_weight: float) -> Tensor:
    """What PGD, TRADES and MART ascend: cross-entropy over heads, summed over images."""
    return over_heads(summed_cross_entropy(labels), heads, auxiliary_weight=auxiliary_weight)


def towards_labels(heads: Heads, labels: Tensor, auxiliary_weight: float) -> Tensor:
    """What pushes a negative to look like its anchor's class."""
    return -away_from_labels(heads, labels, auxiliary_weight)


def away_from_natural(heads: Heads, natural: Heads, auxiliary_weight: float) -> Tensor:
    """The other attack of TRADES, `--inner kl`: KL from the heads of the natural images."""
    return over_heads(kl_divergence, natural, heads, auxiliary_weight=auxiliary_weight)


def attack_batch(
    standing: Standing, x: Tensor, labels: Tensor, settings: Training, generator: torch.Generator, epoch: int
) -> Attacked:
    """Adversarial examples and negatives of this rank's slice of a batch x (N, 3, H, W), labels (N,), best on the host.

    standing: of the network that is trained. Random draws are those of the whole batch, on every rank the same.
    """
    strategy, _, adversarial_negatives = settings.strategy.partition("_")
    if epoch <= settings.warmup_epochs:
        strategy = "random"
    own, net = own_slice(len(x)), standing.refresh()
    natural, chosen = None, None
    if settings.inner == "kl" or not (settings.no_anc or strategy == "random"):
        with torch.no_grad():
            natural = net(x[own], heads=True)
    if not settings.no_anc:
        logits = None if strategy == "random" else joined(natural.final, len(x))
        count = settings.sample_class_number, settings.sample_number
        chosen = choose_negatives(logits, labels, strategy, generator, *count)

    labels = labels.to(x.device, non_blocking=True)
    untargeted = {"ce": (away_from_labels, labels[own]), "kl": (away_from_natural, natural)}
    attacks = [ToAttack(x[own], gaussian_start(x, generator)[own], *untargeted[settings.inner])]
    negative, negative_labels = None, None
    if chosen is not None:
        count, chosen = chosen.shape[1], chosen.flatten()
        pairs = slice(own.start * count, own.stop * count)  # all those of this rank's anchors
        candidates = x[chosen]
        negative, negative_labels = candidates[pairs], labels[chosen[pairs]]
        if adversarial_negatives:
            start, anchors_class = gaussian_start(candidates, generator)[pairs], labels.repeat_interleave(count)[pairs]
            attacks.append(ToAttack(negative, start, towards_labels, anchors_class))
    how = settings.weight_in_attacks, settings.epsilon, settings.step_size, settings.num_steps
    adversarial, *pushed = standing.linf_pgd_together(net, attacks, *how)
    return Attacked(adversarial, pushed[0] if pushed else negative, negative_labels)


def training_loss(model: nn.Module, x: Tensor, labels: Tensor, attacked: Attacked, settings: Training) -> Terms:
    """Loss of a batch by separate training forwards, gated by labels, in the order natural, adversarial, negative."""
    model = Bfloat16(model) if settings.precision == "bf16" else model
    over = partial(over_heads, auxiliary_weight=settings.cr_beta)
    natural = None
    if settings.method != "pgd" or attacked.negative is not None:
        natural = model(x, labels, heads=True)
    adversarial = model(attacked.adversarial, labels, heads=True)
    smoothing = (settings.label_smoothing,) * bool(settings.label_smoothing)  # never of mart
    if settings.method == "pgd":
        heads, objective = (adversarial,), lambda adv: pgd_loss(adv, labels, *smoothing)
    else:
        loss_of = {"trades": trades_loss, "mart": mart_loss}[settings.method]
        heads, objective = (natural, adversarial), lambda nat, adv: loss_of(nat, adv, labels, settings.beta, *smoothing)
    loss = over(objective, *heads)
    with torch.no_grad():
        auxiliary = loss - objective(*(of.final for of in heads))
    contrast = loss.new_zeros(())
    if attacked.negative is not None:
        negative = model(attacked.negative, attacked.negative_labels, heads=True)
        contrast = over(lambda nat, neg: asymmetric_negative_contrast(nat, neg, settings.alpha), natural, negative)
        loss = loss + settings.zeta * contrast
    return Terms(loss, contrast, natural, adversarial, auxiliary)


def first_head_right(heads: Heads, labels: Tensor) -> Tensor:
    """The share of right predictions of the first head, a scalar.

    The first head is `auxiliary[0]`, the only one a training forward computes without the labels, or a plain network's
    `final`.
    """
    logits = heads.auxiliary[0] if heads.auxiliary else heads.final
    return (logits.argmax(1) == labels).float().mean()


def backward(loss_of: Callable[..., Terms], x: Tensor, labels: Tensor, attacked: Attacked, settings: Training) -> Tensor:
    """Gradients of a batch's loss, computed by each rank on its slice and the same on all of them.

    loss_of: `distributed.parallel` of `training_loss`. x, labels: the whole batch; attacked: of this rank's slice.
    Returns the values of `Figures`, natural only where there is one, as a tensor on the device: nothing waits here.
    """
    own, weight = own_slice(len(x)), own_weight(len(x))
    terms = loss_of(x[own], labels[own], attacked, settings)
    (terms.loss * (weight * world())).backward()  # every term is a mean; gradients are averaged over ranks
    with torch.no_grad():
        adversarial, kl = terms.adversarial.final, torch.zeros_like(terms.loss)
        if settings.method != "pgd":
            kl = kl_divergence(terms.natural.final, adversarial)
        shown = terms.natural.final if settings.method == "trades" else adversarial
        parts = [terms.loss.detach(), terms.contrast.detach(), F.cross_entropy(shown, labels[own]), kl, terms.auxiliary]
        parts += [first_head_right(terms.adversarial, labels[own])]
    parts += [] if terms.natural is None else [first_head_right(terms.natural, labels[own])]
    return total(torch.stack(parts) * weight)
