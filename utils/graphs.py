"""CUDA graphs: a function's kernels recorded once and launched as one, since launching takes longer than small ones."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_map

WARM_UP = 3  # calls before the recording, in which libraries choose their kernels and take their memory


class Graphed:
    """A function of nested tuples of tensors, replayed as a CUDA graph wherever it is called as it was the first time.

    As the first time means: tensors of the same shapes, and everything else equal. Other calls, such as an epoch's
    last and smaller batch, run as they are. What the function reads besides its arguments, a network's weights, has to
    stay where it is in memory; new values there count. It may neither draw random numbers nor wait for the device.
    """

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function, self.graph, self.kind, self.inputs, self.outputs = function, None, None, [], None

    def __call__(self, *args: Any) -> Any:
        leaves, structure = tree_flatten(args)
        tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        kind = structure, [(leaf.shape, leaf.dtype) if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        if self.graph is None:
            self._record(args, kind)
        elif kind != self.kind:
            return self.function(*args)
        torch._foreach_copy_(self.inputs, tensors)
        self.graph.replay()
        return tree_map(torch.clone, self.outputs)

    def _record(self, args: Any, kind: Any) -> None:
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
        self.graph, self.kind = graph, kind
