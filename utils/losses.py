"""Training objectives on logits, and how they extend to a network with auxiliary heads.

Each objective takes (N, C) logits and (N,) labels and returns a scalar, a mean over examples. None
knows this repository's networks, so each can be carried into other code as it is.
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
    """Return criterion(final) + auxiliary_weight * mean over auxiliary heads i of criterion(i).

    criterion is called once for each head, with that head's logits of each of `heads` as positional
    arguments. The second term is 0 for a network without auxiliary heads.
    """
    total = criterion(*(h.final for h in heads))
    by_head = zip(*(h.auxiliary for h in heads), strict=True)
    auxiliary = [criterion(*logits) for logits in by_head]
    if auxiliary:
        total = total + auxiliary_weight * torch.stack(auxiliary).mean()
    return total


def kl_divergence(natural: Tensor, adversarial: Tensor) -> Tensor:
    """Return the batch mean of KL(softmax(natural) || softmax(adversarial)).

    Gradients flow into both. Both sides are logarithms: where a natural probability underflows to
    0, the gradient of its own logarithm is NaN.
    """
    log_natural = F.log_softmax(natural, 1)
    log_adversarial = F.log_softmax(adversarial, 1)
    return F.kl_div(log_adversarial, log_natural, reduction="batchmean", log_target=True)


def pgd_loss(adversarial: Tensor, labels: Tensor, label_smoothing: float = 0.0) -> Tensor:
    """Return CE(adversarial, labels) (Madry et al., arXiv 1706.06083, eq. 2.1)."""
    return F.cross_entropy(adversarial, labels, label_smoothing=label_smoothing)


def trades_loss(
    natural: Tensor,
    adversarial: Tensor,
    labels: Tensor,
    beta: float,
    label_smoothing: float = 0.0,
) -> Tensor:
    """Return CE(natural, labels) + beta * KL(natural || adversarial).

    Source: TRADES, Zhang et al., arXiv 1901.08573, eq. 5.
    """
    accuracy_term = F.cross_entropy(natural, labels, label_smoothing=label_smoothing)
    return accuracy_term + beta * kl_divergence(natural, adversarial)


def mart_loss(natural: Tensor, adversarial: Tensor, labels: Tensor, beta: float) -> Tensor:
    """Return boosted CE(adversarial, labels) + beta * weighted KL(natural || adversarial).

    The KL of each example is weighted by 1 - its natural probability of the label. Source: MART,
    Wang et al., ICLR 2020, eq. 11, with the small constants of its official release.
    """
    columns = labels[:, None]
    q_natural = F.softmax(natural, 1)
    q_adversarial = F.softmax(adversarial, 1)

    rivals = q_adversarial.scatter(1, columns, -1).argmax(1)  # most probable class but the label
    margin = F.nll_loss(torch.log(1.0001 - q_adversarial + 1e-12), rivals)
    boosted = F.cross_entropy(adversarial, labels) + margin

    log_natural = F.log_softmax(natural, 1)
    log_adversarial = torch.log(q_adversarial + 1e-12)
    kl = F.kl_div(log_adversarial, log_natural, reduction="none", log_target=True).sum(1)
    weight = 1.0000001 - q_natural.gather(1, columns).squeeze(1)
    return boosted + beta * (kl * weight).mean()


def asymmetric_negative_contrast(natural: Tensor, negative: Tensor, alpha: float) -> Tensor:
    """Return the mean similarity of natural examples and their negatives (ANC: arXiv 2310.03358).

    A pair with the same predicted class has similarity sqrt(max softmax(natural) * max
    softmax(negative)), any other pair 0.

    natural: (N, C) anchors. negative: (N * K, C), the K negatives of each anchor in a row.
    alpha: in [0, 1], weight of the part that moves negatives only; 1 - alpha is that of the part
    that moves natural examples only.
    """
    natural = natural.repeat_interleave(len(negative) // len(natural), 0)
    confidence, prediction = F.softmax(natural, 1).max(1)
    negative_confidence, negative_prediction = F.softmax(negative, 1).max(1)
    pushed_negative = torch.sqrt(confidence.detach() * negative_confidence)
    pushed_natural = torch.sqrt(confidence * negative_confidence.detach())
    similarity = alpha * pushed_negative + (1 - alpha) * pushed_natural
    return torch.where(prediction == negative_prediction, similarity, 0).mean()
