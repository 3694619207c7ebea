"""Reverse attention (ANCRA, arXiv 2310.03358) and the forward pass that every network here shares."""

from collections.abc import Sequence
from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor, nn

Gate = Tensor | str | None | tuple[Tensor | str | None, Tensor | str | None]


class Heads(NamedTuple):
    """What `model(x, gate, heads=True)` returns.

    final: (N, C) logits the network answers with.
    auxiliary: one (N, C) of logits per reverse-attention block, in order; empty for a plain network.
    features: (N, F) pooled input of the classifier behind `final`.
    unweighted: (N, F) the last map pooled before reverse attention weights it; a plain network's are its `features`.
    """

    final: Tensor
    auxiliary: tuple[Tensor, ...]
    features: Tensor
    unweighted: Tensor | None = None

    def rows(self, rows: slice) -> "Heads":
        """The heads of some images of the batch."""
        return Heads(self.final[rows], tuple(logits[rows] for logits in self.auxiliary), self.features[rows])

    def of(self, name: str) -> Tensor:
        """The logits of a head by its name: `final`, `auxiliary1`, `auxiliary2`."""
        return self.final if name == "final" else self.auxiliary[int(name.removeprefix("auxiliary")) - 1]


def pool(z: Tensor, window: int | None = None) -> Tensor:
    """Average-pool a map (N, D, h, w) and flatten it to (N, F); window None, or larger than the map, pools globally."""
    if window is None or window >= z.shape[-1]:
        return z.mean((2, 3))
    return F.avg_pool2d(z, window).flatten(1)


def reverse_attention(
    z: Tensor, classifier: nn.Linear, gate: Tensor | str | None = None, window: int | None = None
) -> tuple[Tensor, Tensor]:
    """Weight a feature map by the classifier's own row of one class: z' = z * W[c], broadcast over space.

    z: (N, D, h, w), after its last ReLU. classifier: the network's one linear layer, (C, F).
    gate: which class c: None the most probable one, labels (N,) of int64, or weights over classes (N, C) of float,
    which mix the rows of W; `soft`: the probabilities are these weights; `none`: z' is z.
    window: side of the pooling window, None for global pooling.
    Returns z' and the auxiliary logits (N, C) of the unweighted map. W learns through both uses; there is no gradient
    through an argmax.
    """
    auxiliary = classifier(pool(z, window))
    if isinstance(gate, str) and gate == "none":
        return z, auxiliary
    if not isinstance(gate, Tensor):
        gate = auxiliary.argmax(1) if gate is None else auxiliary.softmax(1)
    rows = gate @ classifier.weight if gate.is_floating_point() else classifier.weight[gate]
    side = int((rows.shape[1] // z.shape[1]) ** 0.5)  # of the pooled map
    weights = rows.view(*z.shape[:2], side, side)
    if side > 1:
        weights = F.interpolate(weights, size=z.shape[2:])
    return z * weights, auxiliary


class ReverseAttentionNetwork(nn.Module):
    """Base of the three networks: `trunk`, two last blocks with or without reverse attention, pooling, classifier.

    A network says what its blocks are by four hooks: `trunk(x)` (all before the last two blocks), `last_blocks()`,
    `activate(z)` (what a pre-activation network applies to the map of a last block) and `classifier`.
    normalise: what is done to images first, None for nothing; of published networks that were trained so.
    """

    pool_window: int | None = None
    reverse_attention: bool
    gate = "label"  # how maps are weighted, see `gate_of`
    ra_blocks = 2  # of the last two blocks; 1: the last one alone
    predict = "final"  # the head that answers: `final`, `auxiliary1`, `auxiliary2`

    def __init__(self) -> None:
        super().__init__()
        self.normalise: nn.Module | None = None

    def trunk(self, x: Tensor) -> Tensor:
        raise NotImplementedError

    def last_blocks(self) -> Sequence[nn.Module]:
        raise NotImplementedError

    def activate(self, z: Tensor) -> Tensor:
        return z

    @property
    def classifier(self) -> nn.Linear:
        return self.fc

    def gate_of(self, gate: Tensor | None) -> Tensor | str | None:
        """The gate of a forward that was given labels or None: as it was, or the network's own rule.

        `label`: labels where there are some, else by prediction, as published. `predicted`: by prediction, in training
        too. `soft`: rows mixed by softmax. `none`: auxiliary heads without any weighting.
        """
        if self.gate == "label" or (gate is not None and gate.is_floating_point()):
            return gate
        return None if self.gate == "predicted" else self.gate

    def forward(self, x: Tensor, gate: Gate = None, heads: bool = False) -> Tensor | Heads:
        """Classify images x (N, 3, H, W), in [0, 1] whatever `normalise` is, into logits (N, C), or `Heads`.

        gate: the class whose row of W weights the maps: None by prediction (attacks, evaluation), labels (N,) (training
        forwards), weights over classes (N, C), or a pair of these, one for each block. A plain network ignores it.
        A network whose own `gate` is another takes that one instead of a prediction or labels. Whether the network is
        in train or eval mode is left as it is.
        """
        z = self.trunk(x if self.normalise is None else self.normalise(x))
        first, last = self.last_blocks()
        auxiliary = []
        if self.reverse_attention:
            blocks, gates = (first, last), gate if isinstance(gate, tuple) else (self.gate_of(gate),) * 2
            if self.ra_blocks == 1:
                z, blocks, gates = first(z), (last,), gates[-1:]
            for block, block_gate in zip(blocks, gates, strict=True):
                before = self.activate(block(z))
                z, logits = reverse_attention(before, self.classifier, block_gate, self.pool_window)
                auxiliary.append(logits)
        else:
            before = z = self.activate(last(first(z)))
        features = pool(z, self.pool_window)
        final = self.classifier(features)
        if not heads:
            return Heads(final, tuple(auxiliary), features).of(self.predict)
        unweighted = features if before is z else pool(before, self.pool_window)
        return Heads(final, tuple(auxiliary), features, unweighted)
