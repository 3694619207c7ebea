"""Reverse attention (ANCRA, arXiv 2310.03358) and the forward pass that every network here shares."""

from collections.abc import Sequence
from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor, nn

Gate = Tensor | None | tuple[Tensor | None, Tensor | None]


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


def pool(z: Tensor, window: int | None = None) -> Tensor:
    """Average-pool a map (N, D, h, w) and flatten it to (N, F); window None, or larger than the map, pools globally."""
    if window is None or window >= z.shape[-1]:
        return z.mean((2, 3))
    return F.avg_pool2d(z, window).flatten(1)


def reverse_attention(
    z: Tensor, classifier: nn.Linear, gate: Tensor | None = None, window: int | None = None
) -> tuple[Tensor, Tensor]:
    """Weight a feature map by the classifier's own row of one class: z' = z * W[c], broadcast over space.

    z: (N, D, h, w), after its last ReLU. classifier: the network's one linear layer, (C, F).
    gate: which class c: None the most probable one, labels (N,) of int64, or weights over classes (N, C) of float,
    which mix the rows of W. window: side of the pooling window, None for global pooling.
    Returns z' and the auxiliary logits (N, C) of the unweighted map. W learns through both uses; there is no gradient
    through the argmax.
    """
    auxiliary = classifier(pool(z, window))
    if gate is None:
        gate = auxiliary.argmax(1)
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
    """

    pool_window: int | None = None
    reverse_attention: bool

    def trunk(self, x: Tensor) -> Tensor:
        raise NotImplementedError

    def last_blocks(self) -> Sequence[nn.Module]:
        raise NotImplementedError

    def activate(self, z: Tensor) -> Tensor:
        return z

    @property
    def classifier(self) -> nn.Linear:
        return self.fc

    def forward(self, x: Tensor, gate: Gate = None, heads: bool = False) -> Tensor | Heads:
        """Classify images x (N, 3, H, W), in [0, 1] and not normalised, into logits (N, C), or `Heads`.

        gate: the class whose row of W weights the maps: None by prediction (attacks, evaluation), labels (N,) (training
        forwards), weights over classes (N, C), or a pair of these, one for each block. A plain network ignores it.
        Whether the network is in train or eval mode is left as it is.
        """
        z = self.trunk(x)
        first, last = self.last_blocks()
        auxiliary = []
        if self.reverse_attention:
            for block, block_gate in zip((first, last), gate if isinstance(gate, tuple) else (gate, gate), strict=True):
                before = self.activate(block(z))
                z, logits = reverse_attention(before, self.classifier, block_gate, self.pool_window)
                auxiliary.append(logits)
        else:
            before = z = self.activate(last(first(z)))
        features = pool(z, self.pool_window)
        final = self.classifier(features)
        if not heads:
            return final
        unweighted = features if before is z else pool(before, self.pool_window)
        return Heads(final, tuple(auxiliary), features, unweighted)
