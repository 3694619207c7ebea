"""The copy of a network that attacks see, and everything that makes attacks on it fast."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn

from models import Heads, ReverseAttentionNetwork
from models.reverse_attention import GateInput
from utils.attacks import pgd_together
from utils.system.foreign import OwnNetwork, ToFloat32
from utils.system.graphs import Graphed

# SyncBatchNorm is not a subclass of BatchNorm2d.
BATCH_NORMS = (nn.BatchNorm2d, nn.SyncBatchNorm)


class Bfloat16(ToFloat32):
    """A network under bfloat16 autocast; it returns float32, so that losses are float32."""

    def forward(self, x: Tensor, *args: GateInput, **kwargs: bool) -> Tensor | Heads:
        with torch.autocast(x.device.type, torch.bfloat16):
            return super().forward(x, *args, **kwargs)


def in_precision(model: nn.Module, precision: str) -> nn.Module:
    """Return the network as it computes with `--precision`: in bfloat16, or as it is."""
    return Bfloat16(model) if precision == "bf16" else model


class SearchedInBfloat16(nn.Module):
    """A network for attacks: with gradients it computes in bfloat16, without them in float32.

    So attacks search in bfloat16, and what they ask or find without a gradient is judged in
    float32.
    """

    def __init__(self, judge: nn.Module, searched: nn.Module) -> None:
        """Take a network in float32, and the same in bfloat16."""
        super().__init__()
        self.judge = judge
        self.searched = searched

    def forward(self, x: Tensor, *args: GateInput, **kwargs: bool) -> Tensor | Heads:
        net = self.searched if torch.is_grad_enabled() else self.judge
        return net(x, *args, **kwargs)


class Affine(nn.Module):
    """A BatchNorm in eval mode: x * weight + bias, by channel.

    On CUDA, PyTorch's own BatchNorm returns gradients in another memory format.
    """

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.weight = norm.weight
        self.bias = norm.bias

    def forward(self, x: Tensor) -> Tensor:
        return torch.addcmul(self.bias[:, None, None], x, self.weight[:, None, None])


class Folded(NamedTuple):
    """A BatchNorm of a network, the convolution before it or None, and the layer for both."""

    conv: nn.Module | None
    norm: nn.Module
    layer: nn.Module


class AttackCopy:
    """A copy of a network in eval mode, without gradients of parameters, that attacks call.

    `net` is the copy, and `sync_weights` updates it in place. The network itself, its mode,
    statistics and gradients stay untouched. In copies of networks of `models`, each BatchNorm
    behind a convolution is folded into it, and the memory format is channels-last; logits agree
    with the network's up to rounding. Other networks are copied as they are.

    precision: `bf16` for bfloat16 convolutions. compiled: whether torch.compile compiles the copy.
    graph: whether `pgd` is replayed as a CUDA graph.
    """

    def __init__(
        self,
        model: nn.Module,
        precision: str = "default",
        compiled: bool = False,
        graph: bool = False,
    ) -> None:
        net = copy.deepcopy(model).eval().requires_grad_(False)
        self._folded: list[Folded] = []
        self._fold_batch_norms(model, net)
        if isinstance(net, ReverseAttentionNetwork) and not isinstance(net, OwnNetwork):
            net.to(memory_format=torch.channels_last)
            if needs_affine(net):
                self._replace_batch_norms(model, net)
            else:
                _make_last_blocks_contiguous(net)
        if precision == "bf16":  # cast once, not in every forward
            for module in net.modules():
                if isinstance(module, nn.Conv2d | Affine):
                    module.to(torch.bfloat16)

        originals = model.state_dict(keep_vars=True)
        copies = net.state_dict(keep_vars=True)
        names = [name for name in copies if name in originals]
        self._copies = [copies[name] for name in names]
        self._originals = [originals[name] for name in names]

        if compiled:
            net.compile(
                dynamic=False, options={"layout_optimization": next(net.parameters()).is_cuda}
            )
        self.net = in_precision(net, precision)
        self.sync_weights()
        pgd = partial(pgd_together, self.net)
        self.pgd = Graphed(pgd) if graph else pgd

    def _fold_batch_norms(self, model: nn.Module, net: nn.Module) -> None:
        """Make one convolution of each pair of layers that a block lists in `conv_bn`."""
        for name, block in list(net.named_modules()):
            originals = dict(model.get_submodule(name).named_modules())
            for conv_name, norm_name in getattr(block, "conv_bn", ()):
                if norm_name not in originals:  # the shortcut of this block is the identity
                    continue
                conv = block.get_submodule(conv_name)
                conv.bias = block.get_submodule(norm_name).bias
                block.set_submodule(norm_name, nn.Identity())
                self._folded.append(Folded(originals[conv_name], originals[norm_name], conv))

    def _replace_batch_norms(self, model: nn.Module, net: nn.Module) -> None:
        """Make each BatchNorm that is left an `Affine` layer."""
        for name, module in list(net.named_modules()):
            if isinstance(module, BATCH_NORMS):
                affine = Affine(module)
                net.set_submodule(name, affine)
                self._folded.append(Folded(None, model.get_submodule(name), affine))

    @torch.no_grad()
    def sync_weights(self) -> nn.Module:
        """Take over the network's present weights and statistics, and return the copy."""
        torch._foreach_copy_(self._copies, self._originals)
        for conv, norm, layer in self._folded:
            inverse = torch.rsqrt(norm.running_var + norm.eps)
            scale = norm.weight * inverse
            layer.weight.copy_(scale if conv is None else conv.weight * scale[:, None, None, None])
            layer.bias.copy_(norm.bias - norm.running_mean * inverse * norm.weight)
        return self.net


def needs_affine(net: ReverseAttentionNetwork) -> bool:
    """Return whether each BatchNorm that no convolution absorbs becomes an `Affine`: on CUDA."""
    return net.classifier.weight.is_cuda


def _make_last_blocks_contiguous(net: ReverseAttentionNetwork) -> None:
    """Undo channels-last where maps are small: there, a CPU's convolutions are slow in it."""
    blocks = net.last_blocks()
    for block in blocks:
        block.to(memory_format=torch.contiguous_format)
    blocks[0].register_forward_pre_hook(lambda block, inputs: (inputs[0].contiguous(),))


@contextmanager
def frozen(model: nn.Module, precision: str = "default") -> Iterator[nn.Module]:
    """Yield the network that attacks call: a copy of the network with its present weights."""
    yield AttackCopy(model, precision).net


def attack_copy(model: nn.Module, precision: str = "default") -> nn.Module:
    """Return what evaluations attack: a fast copy of one of our networks, else the network itself.

    Networks of others cannot always be copied. Nothing is compiled or recorded as a CUDA graph.
    """
    if isinstance(model, ReverseAttentionNetwork):
        return AttackCopy(model, precision).net
    return in_precision(model, precision)
