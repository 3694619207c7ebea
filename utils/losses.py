"""Training objectives on logits. Each takes (N, C) logits and (N,) labels and returns a scalar, a mean over examples.

They know nothing of this repository's networks, so each can be carried into other code as it is; `over_heads` extends
any of them to a network with auxiliary heads.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

if TYPE_CHECKING:
    from models import Heads


def over_heads(criterion: Callable[..., Tensor], *heads: Heads, auxiliary_weight: float) -> Tensor:
    """criterion(final, ...) + auxiliary_weight * mean over auxiliary heads i of criterion(auxiliary_i, ...).

    criterion is called once per head, with that head's logits of each of `heads` as positional arguments. A network
    without reverse attention has no auxiliary heads, and the second term is 0.
    """
    total = criterion(*(h.final for h in heads))
    auxiliary = [criterion(*logits) for logits in zip(*(h.auxiliary for h in heads), strict=True)]
    if auxiliary:
        total = total + auxiliary_weight * torch.stack(auxiliary).mean()
    return total


def kl_divergence(natural: Tensor, adversarial: Tensor) -> Tensor:
    """Batch mean of KL(softmax(natural) || softmax(adversarial)); gradients flow into both.

    From logarithms on both sides: where a natural probability underflows to 0, its own logarithm's gradient is NaN.
    """
    log_adversarial, log_natural = F.log_softmax(adversarial, 1), F.log_softmax(natural, 1)
    return F.kl_div(log_adversarial, log_natural, reduction="batchmean", log_target=True)


def pgd_loss(adversarial: Tensor, labels: Tensor, label_smoothing: float = 0.0) -> Tensor:
    """Cross-entropy of adversarial examples (PGD adversarial training: Madry et al., arXiv 1706.06083, eq. 2.1)."""
    return F.cross_entropy(adversarial, labels, label_smoothing=label_smoothing)


def trades_loss(natural: Tensor, adversarial: Tensor, labels: Tensor, beta: float, label_smoothing: float = 0.0) -> Tensor:
    """CE(natural, labels) + beta * KL(natural || adversarial) (TRADES: Zhang et al., arXiv 1901.08573, eq. 5)."""
    accurate = F.cross_entropy(natural, labels, label_smoothing=label_smoothing)
    return accurate + beta * kl_divergence(natural, adversarial)


def mart_loss(natural: Tensor, adversarial: Tensor, labels: Tensor, beta: float) -> Tensor:
    """Boosted cross-entropy plus beta times the KL of each example, weighted by 1 - its natural probability.

    MART: Wang et al., ICLR 2020, eq. 11, with the small constants of its official release.
    """
    q_natural, q_adversarial = F.softmax(natural, 1), F.softmax(adversarial, 1)
    rivals = q_adversarial.scatter(1, labels[:, None], -1).argmax(1)  # most probable class besides the label
    boosted = F.cross_entropy(adversarial, labels) + F.nll_loss(torch.log(1.0001 - q_adversarial + 1e-12), rivals)
    log_natural, log_adversarial = F.log_softmax(natural, 1), torch.log(q_adversarial + 1e-12)
    divergence = F.kl_div(log_adversarial, log_natural, reduction="none", log_target=True).sum(1)
    doubt = 1.0000001 - q_natural.gather(1, labels[:, None]).squeeze(1)
    return boosted + beta * (divergence * doubt).mean()


def asymmetric_negative_contrast(natural: Tensor, negative: Tensor, alpha: float) -> Tensor:
    """Push negatives away from natural examples that share their predicted class (ANC: arXiv 2310.03358).

    natural: (N, C) anchors. negative: (N * K, C), the K negatives of each anchor in a row. A pair with the same
    predicted class has similarity sqrt(max softmax(natural) * max softmax(negative)), any other pair 0.
    alpha in [0, 1] weights the part that moves negatives only; 1 - alpha the part that moves natural examples only.
    """
    natural = natural.repeat_interleave(len(negative) // len(natural), 0)
    confidence, prediction = F.softmax(natural, 1).max(1)
    negative_confidence, negative_prediction = F.softmax(negative, 1).max(1)
    pushed_negative = torch.sqrt(confidence.detach() * negative_confidence)
    pushed_natural = torch.sqrt(confidence * negative_confidence.detach())
    similarity = alpha * pushed_negative + (1 - alpha) * pushed_natural
    return torch.where(prediction == negative_prediction, similarity, 0).mean()
