"""Choosing negatives: for each anchor of a batch, images of other classes of the same batch, as tensor code."""

import torch
from torch import Tensor

STRATEGIES = ("random", "soft", "hard", "easy")


def _draw(valid: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """Draw `count` true positions of each row of valid (..., M), evenly -> (..., count) indices.

    Distinct where a row has enough; where it has fewer, all of them come once and the rest is drawn with replacement.
    """
    keys = torch.rand(valid.shape, generator=generator, device=valid.device)
    first = keys.masked_fill_(~valid, -1).topk(min(count, valid.shape[-1]), -1).indices  # valid ones, in random order
    available = valid.sum(-1, keepdim=True)
    slots = torch.arange(count, device=valid.device).expand(*valid.shape[:-1], count)
    again = (torch.rand(slots.shape, generator=generator, device=valid.device) * available).long()
    return first.gather(-1, torch.where(slots < available, slots, again.clamp(max=available - 1)))


def _random_negatives(
    labels: Tensor,
    present: Tensor,
    sizes: Tensor,
    largest: int,
    generator: torch.Generator,
    classes: int,
    per_class: int,
) -> Tensor:
    """(N, classes * per_class) indices: distinct other classes first, then distinct images of each.

    present, sizes: the classes in the batch, sorted, and how many images each has, `largest` at most.
    """
    other = labels[:, None] != present
    rich = other & (sizes >= per_class)
    eligible = torch.where(rich.sum(1, keepdim=True) >= classes, rich, other)
    chosen = _draw(eligible, classes, generator)  # (N, classes), indices into present
    by_class = labels.argsort(stable=True)  # images of one class in a row
    first = sizes.cumsum(0) - sizes
    member = torch.arange(largest, device=labels.device) < sizes[chosen][..., None]
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
    filled up at random where there are fewer. generator: on the device of the logits and of the answer; where
    that is not the host but labels are, nothing here waits for it.
    Random draws `classes` other classes with at least `per_class` images each and `per_class` images of each; where the
    batch has too few such classes every other class will do, and where it still has too few classes or images, some are
    drawn again. What fills up may repeat an image that was already taken.
    Returns (N, K) indices into the batch, or None where it holds one class only. Errors: ValueError for an unknown
    strategy. Source: arXiv 2310.03358; the rules for too few candidates are ours.
    """
    if strategy not in STRATEGIES:
        raise ValueError(f"unknown strategy {strategy!r}; known: {', '.join(STRATEGIES)}")
    present, sizes = labels.unique(return_counts=True)
    if len(present) < 2:
        return None
    largest = int(sizes.max())
    labels, present, sizes = (t.to(generator.device, non_blocking=True) for t in (labels, present, sizes))
    chosen = _random_negatives(labels, present, sizes, largest, generator, classes, per_class)
    if strategy == "random":
        return chosen
    predictions = logits.argmax(1)
    as_anchor, taken_for_anchor = predictions[:, None], labels[:, None]  # against each candidate's: (N, N)
    fits = {
        "soft": lambda: predictions == as_anchor,
        "hard": lambda: predictions == taken_for_anchor,
        "easy": lambda: (predictions != as_anchor) & (predictions != taken_for_anchor),
    }[strategy]() & (labels != labels[:, None])
    scores = torch.where(fits, logits.T[labels], -torch.inf)  # logit of class y_n for each candidate
    values, best = scores.topk(min(chosen.shape[1], len(labels)), dim=1)
    chosen[:, : best.shape[1]] = torch.where(values > -torch.inf, best, chosen[:, : best.shape[1]])
    return chosen
