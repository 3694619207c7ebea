"""Choosing negatives: for each anchor of a batch, images of other classes of the same batch, as tensor code."""

import torch
from torch import Tensor

from utils.options import STRATEGIES


def _draw(valid: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """Draw `count` true positions of each row of valid (..., M), evenly -> (..., count) indices.

    Distinct where a row has enough; where it has fewer, all of them come once and the rest is drawn with replacement.
    """
    keys = torch.rand(valid.shape, generator=generator, device=valid.device)
    shuffled = keys.masked_fill(~valid, -1).argsort(-1, descending=True)  # the valid ones first, in random order
    available = valid.sum(-1, keepdim=True)
    slots = torch.arange(count, device=valid.device).expand(*valid.shape[:-1], count)
    again = (torch.rand(slots.shape, generator=generator, device=valid.device) * available).long()
    return shuffled.gather(-1, torch.where(slots < available, slots, again.clamp(max=available - 1)))


def _random_negatives(
    labels: Tensor, present: Tensor, generator: torch.Generator, classes: int, per_class: int
) -> Tensor:
    """(N, classes * per_class) indices: distinct other classes first, then distinct images of each."""
    sizes = (labels == present[:, None]).sum(1)  # images of each present class
    other = labels[:, None] != present
    rich = other & (sizes >= per_class)
    eligible = torch.where(rich.sum(1, keepdim=True) >= classes, rich, other)
    chosen = _draw(eligible, classes, generator)  # (N, classes), indices into present
    by_class = labels.argsort(stable=True)  # images of one class in a row
    first = sizes.cumsum(0) - sizes
    member = torch.arange(int(sizes.max()), device=labels.device) < sizes[chosen][..., None]
    images = _draw(member, per_class, generator) + first[chosen][..., None]
    return by_class[images].flatten(1)


def choose_negatives(
    logits: Tensor | None,
    labels: Tensor,
    strategy: str,
    generator: torch.Generator,
    classes: int = 1,
    per_class: int = 1,
) -> Tensor | None:
    """Choose K = classes * per_class negatives for each anchor, never of the anchor's class.

    logits: (N, C) of the eval-mode network on natural images; None will do for the random strategy. labels: (N,).
    strategy: `random`, or for predictions c(.) those images j of another class with
    `soft` c(j) = c(n), `hard` c(j) = y_n, `easy` c(j) neither; of these the K with the largest logit of class y_n,
    filled up at random where there are fewer. generator: on the labels' device.
    Random draws `classes` other classes with at least `per_class` images each and `per_class` images of each; where the
    batch has too few such classes every other class will do, and where it still has too few classes or images, some are
    drawn again. What fills up may repeat an image that was already taken.
    Returns (N, K) indices into the batch, or None where it holds one class only. Errors: ValueError for an unknown
    strategy. Source: arXiv 2310.03358; the rules for too few candidates are ours.
    """
    if strategy not in STRATEGIES:
        raise ValueError(f"unknown strategy {strategy!r}; known: {', '.join(STRATEGIES)}")
    present = labels.unique()
    if len(present) < 2:
        return None
    chosen = _random_negatives(labels, present, generator, classes, per_class)
    if strategy == "random":
        return chosen
    predictions = logits.argmax(1)
    same_as_anchor = predictions[None] == predictions[:, None]  # (N, N): anchor, candidate
    taken_for_anchor = predictions[None] == labels[:, None]
    fits = {
        "soft": same_as_anchor,
        "hard": taken_for_anchor,
        "easy": ~same_as_anchor & ~taken_for_anchor,
    }[strategy] & (labels[None] != labels[:, None])
    scores = logits[:, labels].T.masked_fill(~fits, -torch.inf)  # logit of class y_n for each candidate
    best = scores.topk(min(chosen.shape[1], len(labels)), dim=1).indices
    filled = torch.arange(best.shape[1], device=labels.device) < fits.sum(1, keepdim=True)
    chosen[:, : best.shape[1]] = torch.where(filled, best, chosen[:, : best.shape[1]])
    return chosen
