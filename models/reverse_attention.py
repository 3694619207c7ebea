"""Reverse attention (ANCRA, arXiv 2310.03358) and the forward pass that all networks here share."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor, nn

# A gate says which rows of the classifier weight a map. It takes the auxiliary logits (N, C) and
# labels (N,) or None, and returns classes (N,), weights of classes (N, C) of float, or None for a
# map that is not weighted.
Gate = Callable[[Tensor, Tensor | None], Tensor | None]
# What the argument `gate` of a forward may be: labels (N,); None, for no labels; or a pair, one
# entry for each of the last two blocks, which is labels, weights of classes (N, C), or None for the
# predicted class.
GateInput = Tensor | None | tuple[Tensor | None, Tensor | None]


class Heads(NamedTuple):
    """What `model(x, gate, heads=True)` returns.

    final: (N, C) logits the network answers with.
    auxiliary: (N, C) logits of each reverse-attention block, in order; empty for a plain network.
    features: (N, F) pooled input of the classifier behind `final`.
    unweighted: (N, F) the last map pooled before reverse attention weights it; `features` in a
    plain network.
    """

    final: Tensor
    auxiliary: tuple[Tensor, ...]
    features: Tensor
    unweighted: Tensor | None = None

    def logits(self, name: str) -> Tensor:
        """Return the logits of a head: `final`, `auxiliary1`, `auxiliary2`."""
        if name == "final":
            return self.final
        return self.auxiliary[int(name.removeprefix("auxiliary")) - 1]

    def rows(self, rows: slice) -> "Heads":
        """Return the heads of some images of the batch, without `unweighted`."""
        auxiliary = tuple(logits[rows] for logits in self.auxiliary)
        return Heads(self.final[rows], auxiliary, self.features[rows])


def label_gate(auxiliary: Tensor, labels: Tensor | None) -> Tensor:
    """Gate by the labels in training, and by the prediction where there are none, as published."""
    return auxiliary.argmax(1) if labels is None else labels


def predicted_gate(auxiliary: Tensor, labels: Tensor | None) -> Tensor:
    """Gate by the prediction, in training too."""
    return auxiliary.argmax(1)


def soft_gate(auxiliary: Tensor, labels: Tensor | None) -> Tensor:
    """Gate by all classes, weighted by their probabilities."""
    return auxiliary.softmax(1)


def no_gate(auxiliary: Tensor, labels: Tensor | None) -> None:
    """Leave the map as it is: auxiliary heads without weighting."""


# Each takes the auxiliary logits and labels or None.
GATES: dict[str, Gate] = {
    "label": label_gate,
    "predicted": predicted_gate,
    "soft": soft_gate,
    "none": no_gate,
}

# Whose rows weight maps and give auxiliary logits: those of the network's classifier, or of a
# classifier of each gated block's own, as in CAS (Bai et al., arXiv 2103.08307).
CLASSIFIERS = ("shared", "own")


def pool(z: Tensor, window: int | None = None) -> Tensor:
    """Average-pool a map (N, D, h, w) and flatten it to (N, F).

    window: side of the pooling window; None, or one larger than the map, pools globally.
    """
    if window is None or window >= z.shape[-1]:
        return z.mean((2, 3))
    return F.avg_pool2d(z, window).flatten(1)


def reverse_attention(
    z: Tensor,
    classifier: nn.Linear,
    labels: Tensor | None = None,
    window: int | None = None,
    gate: Gate = label_gate,
) -> tuple[Tensor, Tensor]:
    """Weight a map by the classifier's row of one class: z' = z * W[c], broadcast over space.

    z: (N, D, h, w), after its last ReLU. classifier: the network's linear layer (C, F), or the
    block's own (C, D). labels: (N,), for training forwards. window: of `pool`. gate: a value of
    `GATES`, which chooses the class c.
    Returns z' and the auxiliary logits (N, C) of the map before it is weighted. W learns through
    both uses; there is no gradient through an argmax.
    """
    auxiliary = classifier(pool(z, window))
    classes = gate(auxiliary, labels)
    if classes is None:
        return z, auxiliary
    if classes.is_floating_point():
        rows = classes @ classifier.weight
    else:
        rows = classifier.weight[classes]
    side = int((rows.shape[1] // z.shape[1]) ** 0.5)  # of the pooled map
    weights = rows.view(*z.shape[:2], side, side)
    if side > 1:
        weights = F.interpolate(weights, size=z.shape[2:])
    return z * weights, auxiliary


class ReverseAttentionNetwork(nn.Module):
    """Base of all networks: a trunk, two last blocks that may carry reverse attention, pooling.

    A network defines `trunk(x)` (all before the last two blocks), `last_blocks()`, the linear
    classifier `fc`, and where it needs to `activate(z)`, which is applied to the map of a last
    block. gate: a name of `GATES`. ra_blocks: how many of the last two blocks carry reverse
    attention. block_classifiers: the own classifiers of these blocks; empty where they share the
    network's. predict: the head that answers. normalise: what is done to images first.
    """

    pool_window: int | None = None
    pooled_cells = 1  # of the last map, for each of which the classifier has its own weights
    reverse_attention: bool
    gate = "label"
    ra_blocks = 2
    predict = "final"

    def __init__(self) -> None:
        super().__init__()
        self.normalise: nn.Module | None = None
        self.block_classifiers: Sequence[nn.Linear] = ()

    def trunk(self, x: Tensor) -> Tensor:
        """Return the map before the last two blocks."""
        raise NotImplementedError

    def last_blocks(self) -> Sequence[nn.Module]:
        """Return the last two blocks."""
        raise NotImplementedError

    def activate(self, z: Tensor) -> Tensor:
        """Return the map of a last block with what a pre-activation network applies to it."""
        return z

    @property
    def classifier(self) -> nn.Linear:
        """The linear layer of the final head, and of all heads that share it."""
        return self.fc

    def add_block_classifiers(self) -> None:
        """Give each gated block a linear classifier of its own, (C, D) for maps of D channels."""
        channels = self.classifier.in_features // self.pooled_cells
        classes = self.classifier.out_features
        self.block_classifiers = nn.ModuleList(
            nn.Linear(channels, classes) for _ in range(self.ra_blocks)
        )

    def forward(self, x: Tensor, gate: GateInput = None, heads: bool = False) -> Tensor | Heads:
        """Classify images x (N, 3, H, W) in [0, 1] into logits (N, C), or return `Heads`.

        gate: labels (N,) in training forwards, None in attacks and evaluation; the network's own
        gate decides what becomes of them. A pair gives each block its labels, weights of classes
        (N, C) or None for its prediction, whatever the network's own gate is. A plain network
        ignores it. Whether the network is in train or eval mode is left as it is.
        """
        network_gate = GATES[self.gate]
        labels_by_block = (gate, gate)
        if isinstance(gate, tuple):
            network_gate = label_gate
            labels_by_block = gate

        if self.normalise is not None:
            x = self.normalise(x)
        z = self.trunk(x)
        blocks = list(self.last_blocks())
        plain = 2 - self.ra_blocks if self.reverse_attention else 2
        for block in blocks[:plain]:
            z = block(z)
        if not self.reverse_attention:
            z = self.activate(z)

        gated = blocks[plain:]
        classifiers = self.block_classifiers or [self.classifier] * len(gated)
        # An own classifier has one weight for each channel, so its map is pooled globally.
        window = None if self.block_classifiers else self.pool_window
        unweighted = z
        auxiliary = []
        for block, labels, classifier in zip(
            gated, labels_by_block[plain:], classifiers, strict=True
        ):
            unweighted = self.activate(block(z))
            z, logits = reverse_attention(unweighted, classifier, labels, window, network_gate)
            auxiliary.append(logits)

        features = pool(z, self.pool_window)
        final = self.classifier(features)
        out = Heads(final, tuple(auxiliary), features, pool(unweighted, self.pool_window))
        return out if heads else out.logits(self.predict)
