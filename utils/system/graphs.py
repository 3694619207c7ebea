"""CUDA graphs: a function's kernels recorded once and launched as one, since launching takes longer than small ones."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_map

WARM_UP = 3  # calls before the recording, in which libraries choose their kernels and take their memory


class Graphed:
    """A function of nested tuples of tensors, replayed as a CUDA graph wherever it is called as it was when recorded.

    That means: with tensors of the same shapes, and everything else equal. It is recorded at the second call in a row
    that is like the one before; other calls, such as an epoch's last and smaller batch, run as they are. What the
    function reads besides its arguments, a network's weights, has to stay where it is in memory; new values there
    count. It may neither draw random numbers nor wait for the device.
    """

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function, self.graph, self.kind, self.inputs, self.outputs = function, None, None, [], None

    def __call__(self, *args: Any) -> Any:
        leaves, structure = tree_flatten(args)
        kind = structure, [(leaf.shape, leaf.dtype) if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        if kind != self.kind:
            self.kind = kind if self.graph is None else self.kind
            return self.function(*args)
        if self.graph is None:
            self._record(args)
        torch._foreach_copy_(self.inputs, [leaf for leaf in leaves if isinstance(leaf, Tensor)])
        self.graph.replay()
        return tree_map(torch.clone, self.outputs)

    def _record(self, args: Any) -> None:
        own = tree_map(lambda leaf: leaf.clone() if isinstance(leaf, Tensor) else leaf, args)
        aside = torch.cuda.Stream()
        aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(aside):
            for _ in range(WARM_UP):
                self.function(*own)
        torch.cuda.current_stream().wait_stream(aside)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self.outputs = self.function(*own)
        self.inputs = [leaf for leaf in tree_flatten(own)[0] if isinstance(leaf, Tensor)]
        self.graph = graph
