"""Choosing negatives: for each anchor of a batch, images of other classes of the same batch."""

import torch
from torch import Tensor

STRATEGIES = ("random", "soft", "hard", "easy")


def choose_negatives(
    logits: Tensor | None,
    labels: Tensor,
    strategy: str,
    generator: torch.Generator,
    classes: int = 1,
    per_class: int = 1,
) -> Tensor | None:
    """Choose K = classes * per_class negatives for each anchor, never of the anchor's class.

    `random` draws `classes` other classes and `per_class` images of each. The others prefer images
    j of another class that are predicted, c(.), in a certain way for an anchor n: `soft` c(j) =
    c(n), `hard` c(j) = y_n, `easy` c(j) neither. Of these they take the K with the largest logit of
    class y_n; where there are fewer, random ones, perhaps of the same images, fill up.

    `random` prefers classes with at least `per_class` images, if there are `classes` of them. Where
    a batch has too few classes or images, some are drawn again.

    logits: (N, C) of the eval-mode network on natural images, not needed for `random`.
    labels: (N,), preferably on the CPU, since counting them on a device waits for it.
    generator: on the device of the logits and of the result.
    Returns (N, K) indices into the batch, or None where it holds one class only. Errors:
    ValueError for an unknown strategy. Source: arXiv 2310.03358; the rules for too few candidates
    are ours.
    """
    if strategy not in STRATEGIES:
        raise ValueError(f"unknown strategy {strategy!r}; known: {', '.join(STRATEGIES)}")
    chosen = _random_negatives(labels, generator, classes, per_class)
    if chosen is None or strategy == "random":
        return chosen

    labels = labels.to(chosen.device, non_blocking=True)
    prediction = logits.argmax(1)
    candidates = labels != labels[:, None]  # (N, N), anchors by images
    if strategy == "soft":
        candidates &= prediction == prediction[:, None]
    elif strategy == "hard":
        candidates &= prediction == labels[:, None]
    elif strategy == "easy":
        candidates &= (prediction != prediction[:, None]) & (prediction != labels[:, None])

    scores = logits.T[labels].masked_fill(~candidates, -torch.inf)  # logits of class y_n
    count = min(chosen.shape[1], len(labels))
    values, best = scores.topk(count, dim=1)
    chosen[:, :count] = torch.where(values > -torch.inf, best, chosen[:, :count])
    return chosen


def _random_negatives(
    labels: Tensor, generator: torch.Generator, classes: int, per_class: int
) -> Tensor | None:
    """Draw distinct other classes for each anchor, and distinct images of each.

    Returns (N, classes * per_class) indices into the batch, or None where it holds one class only.
    """
    present, sizes = labels.unique(return_counts=True)  # the classes in the batch, sorted
    if len(present) < 2:
        return None
    largest = int(sizes.max())
    device = generator.device
    labels = labels.to(device, non_blocking=True)
    present = present.to(device, non_blocking=True)
    sizes = sizes.to(device, non_blocking=True)

    other = labels[:, None] != present
    large = other & (sizes >= per_class)
    enough = large.sum(1, keepdim=True) >= classes
    chosen = _draw(torch.where(enough, large, other), classes, generator)  # of `present`

    by_class = labels.argsort(stable=True)  # the images of one class in a row
    first = sizes.cumsum(0) - sizes
    valid = torch.arange(largest, device=device) < sizes[chosen][..., None]
    images = _draw(valid, per_class, generator) + first[chosen][..., None]
    return by_class[images].flatten(1)


def _draw(valid: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """Draw `count` true positions of each row of valid (..., M), evenly.

    They are distinct where a row has enough. Where it has fewer, each comes once, and the rest is
    drawn with replacement. Returns (..., count) indices.
    """
    keys = torch.rand(valid.shape, generator=generator, device=valid.device)
    keys.masked_fill_(~valid, -1)
    shuffled = keys.topk(min(count, valid.shape[-1]), -1).indices  # valid positions come first
    available = valid.sum(-1, keepdim=True)
    slots = torch.arange(count, device=valid.device).expand(*valid.shape[:-1], count)
    draws = torch.rand(slots.shape, generator=generator, device=valid.device)
    again = (draws * available).long()
    return shuffled.gather(-1, torch.where(slots < available, slots, again))
