"""L-infinity attacks: one loop, and the one context in which attacks see a network."""

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from itertools import accumulate
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models import Heads, ReverseAttentionNetwork
from models.reverse_attention import Gate
from utils.losses import over_heads
from utils.system.graphs import Graphed

Objective = Callable[[Tensor], Tensor]
ObjectiveOf = Callable[[nn.Module, Tensor], Objective]  # of a network and labels
# An attack of an evaluation: (network, images (N, 3, H, W) in [0, 1], labels (N,), numbers (N,) in the test set) ->
# adversarial images
Attack = Callable[[nn.Module, Tensor, Tensor, Tensor], Tensor]

NOISE_DRAWS = 100
VERSION = 1  # of what is here; raise it when results change, so that no kept verdict is reused

# Parameters times pixels, a rough measure of a pass's work, up to which a CPU attacks several batches as one. Below it
# that is 7 to 43 % faster, far above it 1 or 2 %: `python -m tests.tools.benchmarks together`, 2 CPU cores, float32.
SMALL = 2.5e11


class Bfloat16(nn.Module):
    """A network under bfloat16 autocast. What it returns is float32, so that softmax and losses are computed in it."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor, gate: Gate = None, heads: bool = False) -> Tensor | Heads:
        with torch.autocast(x.device.type, torch.bfloat16):
            out = self.network(x, gate, heads)
        if not heads:
            return out.float()
        auxiliary = tuple(logits.float() for logits in out.auxiliary)
        return Heads(out.final.float(), auxiliary, out.features.float(), out.unweighted.float())


class Affine(nn.Module):
    """A BatchNorm in eval mode as what it is then. On CUDA PyTorch's own gives gradients in another memory format."""

    def __init__(self, channels: Tensor) -> None:
        super().__init__()
        self.weight, self.bias = (nn.Parameter(torch.zeros_like(channels)[:, None, None], False) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        return torch.addcmul(self.bias, x, self.weight)


class Standing:
    """The network that attacks see, kept: a copy in eval mode whose weights `refresh` takes from `model`, in place.

    The copy's parameters want no gradients, and `model` itself, its mode, its statistics and its gradients stay
    untouched. In the copy of a network of `models` each BatchNorm that follows a convolution is folded into it and the
    memory format is channels-last; logits agree with the unfolded network's up to rounding.
    precision: `bf16` for convolutions and classifier in bfloat16, anything else is `model`'s own; images and logits are
    float32 either way. compiled: through torch.compile. graph: attacks are replayed as one CUDA graph; warned: gets a
    line where that does not work.
    """

    def __init__(
        self,
        model: nn.Module,
        precision: str = "default",
        compiled: bool = False,
        graph: bool = False,
        warned: Callable[[str], None] = print,
    ) -> None:
        net = copy.deepcopy(model).eval().requires_grad_(False)
        self._folds = []  # (convolution of `model` or None, BatchNorm behind it, the layer that both become)
        for name, module in [*net.named_modules()]:
            for conv_name, bn_name in getattr(module, "conv_bn", ()):
                self._fold(model.get_submodule(name), module, conv_name, bn_name)
        if isinstance(net, ReverseAttentionNetwork):  # a foreign network may use `view` on its maps
            if affine_norms(net):
                for name, module in [*net.named_modules()]:
                    if isinstance(module, nn.modules.batchnorm._BatchNorm):  # SyncBatchNorm is one, too
                        net.set_submodule(name, Affine(module.running_mean))
                        self._folds.append((None, model.get_submodule(name), net.get_submodule(name)))
            _to_channels_last(net)
        for module in net.modules():
            if precision == "bf16" and isinstance(module, nn.Conv2d | Affine):  # cast here, not in every pass
                module.to(torch.bfloat16)
        folded = {id(tensor) for *_, into in self._folds for tensor in (into.weight, into.bias)}
        own = model.state_dict(keep_vars=True)
        kept = [(t, own[key]) for key, t in net.state_dict(keep_vars=True).items() if id(t) not in folded]
        self._copies = [list(tensors) for tensors in zip(*kept, strict=True)]
        self._refold()
        if compiled:
            net.compile(dynamic=False, options={"layout_optimization": next(net.parameters()).is_cuda})
        self.net = Bfloat16(net) if precision == "bf16" else net
        self.linf_pgd_together = Graphed(linf_pgd_together, warned) if graph else linf_pgd_together

    def _fold(self, source: nn.Module, block: nn.Module, conv_name: str, bn_name: str) -> None:
        """Make one convolution of two layers; nothing to do where the block has no such pair."""
        try:
            conv, bn = source.get_submodule(conv_name), source.get_submodule(bn_name)
        except AttributeError:  # a block whose shortcut is the identity
            return
        into = block.get_submodule(conv_name)
        into.bias = nn.Parameter(torch.zeros_like(bn.bias), requires_grad=False)
        block.set_submodule(bn_name, nn.Identity())
        self._folds.append((conv, bn, into))

    @torch.no_grad()
    def _refold(self) -> None:
        """Write every BatchNorm in eval mode, with the convolution before it if any, into the layer that it became."""
        if not self._folds:
            return
        convs, norms, into = zip(*self._folds, strict=True)
        factors = [bn.weight for bn in norms]
        inverse = torch._foreach_add([bn.running_var for bn in norms], [bn.eps for bn in norms])
        torch._foreach_rsqrt_(inverse)
        scales = torch._foreach_mul(factors, inverse)
        shifts = torch._foreach_neg([bn.running_mean for bn in norms])
        torch._foreach_mul_(shifts, inverse)
        torch._foreach_mul_(shifts, factors)
        torch._foreach_add_(shifts, [bn.bias for bn in norms])
        weights = [
            scale if conv is None else conv.weight * scale[:, None, None, None] for conv, scale in zip(convs, scales, strict=True)
        ]
        for name, values in (("weight", weights), ("bias", shifts)):
            own = [getattr(layer, name) for layer in into]
            torch._foreach_copy_(own, [value.view_as(target) for value, target in zip(values, own, strict=True)])

    @torch.no_grad()
    def refresh(self) -> nn.Module:
        """The network to attack, with `model`'s present weights and statistics."""
        self._refold()
        torch._foreach_copy_(*self._copies)
        return self.net


def affine_norms(net: ReverseAttentionNetwork) -> bool:
    """Whether a BatchNorm that no convolution absorbs becomes an `Affine`."""
    return net.classifier.weight.is_cuda


def _to_channels_last(net: ReverseAttentionNetwork) -> None:
    net.to(memory_format=torch.channels_last)
    if net.classifier.weight.device.type == "cpu":
        # Where maps are 4x4, channels-last convolutions on a CPU reach half to two thirds of the default's rate.
        for block in net.last_blocks():
            block.to(memory_format=torch.contiguous_format)
        net.last_blocks()[0].register_forward_pre_hook(lambda block, inputs: (inputs[0].contiguous(),))


@contextmanager
def frozen(model: nn.Module, precision: str = "default", compiled: bool = False) -> Iterator[nn.Module]:
    """Yield the network that attacks call, that of a `Standing`: a copy of `model` with its weights at entry."""
    yield Standing(model, precision, compiled).net


def linf_pgd(
    x: Tensor,
    objective: Objective,
    eps: float,
    step_size: float,
    steps: int,
    start: Tensor,
    on_step: Callable[[int, Tensor], None] | None = None,
) -> Tensor:
    """Ascend `objective` inside the L-infinity ball of radius eps around x, by signs of gradients.

    x: (N, 3, H, W) in [0, 1], the centre. objective: images -> scalar; where it is a sum over images, each image is
    attacked by itself. eps, step_size: in units of [0, 1]. start: x_0, used as it is, which may leave ball and [0, 1].
    Then `steps` times x_{t+1} = clip_[0,1](clip_{x +- eps}(x_t + step_size * sign(gradient at x_t))).
    on_step(t, x_t), t from 1, sees every iterate. Returns x_steps, (N, 3, H, W), detached, in ball and [0, 1].
    Source: PGD, Madry et al., arXiv 1706.06083.
    """
    low, high = (x - eps).clamp(min=0), (x + eps).clamp(max=1)
    adversarial = start.detach()
    for step in range(1, steps + 1):
        with torch.enable_grad():
            adversarial.requires_grad_()
            (gradient,) = torch.autograd.grad(objective(adversarial), adversarial)
        adversarial = torch.clamp(adversarial.detach() + step_size * gradient.sign(), low, high)
        if on_step is not None:
            on_step(step, adversarial)
    return adversarial


class ToAttack(NamedTuple):
    """Images to attack, and what to ascend there: objective(the network's heads on them, target, auxiliary_weight).

    x: (N, 3, H, W). start: where to start, like x. target: labels (N,), or the heads of other images.
    """

    x: Tensor
    start: Tensor
    objective: Callable[[Heads, Tensor | Heads, float], Tensor]
    target: Tensor | Heads


def linf_pgd_together(
    net: nn.Module, batches: list[ToAttack], auxiliary_weight: float, eps: float, step_size: float, steps: int
) -> list[Tensor]:
    """`linf_pgd` on several batches of images, each with its own objective -> the adversarial images of each.

    As one batch on CUDA, where it takes less memory than the training forwards that follow, and elsewhere while there
    is so little work that a step costs the calling of its operators. The objectives are added, and no image's gradient
    knows of another's, so that only rounding can differ.
    """

    def ascended(batch: ToAttack, heads: Heads) -> Tensor:
        return batch.objective(heads, batch.target, auxiliary_weight)

    small = sum(batch.x[:, 0].numel() for batch in batches) * sum(p.numel() for p in net.parameters()) <= SMALL
    if len(batches) == 1 or not (small or batches[0].x.is_cuda):
        return [
            linf_pgd(batch.x, lambda x, of=batch: ascended(of, net(x, heads=True)), eps, step_size, steps, batch.start)
            for batch in batches
        ]
    sizes = [len(batch.x) for batch in batches]
    parts = [slice(end - size, end) for size, end in zip(sizes, accumulate(sizes), strict=True)]

    def added(x: Tensor) -> Tensor:
        final, auxiliary, features, _ = net(x, heads=True)
        own = [Heads(final[part], tuple(logits[part] for logits in auxiliary), features[part]) for part in parts]
        return torch.stack([ascended(batch, heads) for batch, heads in zip(batches, own, strict=True)]).sum()

    x, start = torch.cat([batch.x for batch in batches]), torch.cat([batch.start for batch in batches])
    return list(linf_pgd(x, added, eps, step_size, steps, start).split(sizes))


def summed_cross_entropy(labels: Tensor) -> Callable[[Tensor], Tensor]:
    """Cross-entropy of logits (N, C), as a criterion for `over_heads`.

    A sum over images, not the mean, so that no image's gradient depends on the size of its batch; signs are the same.
    """
    return lambda logits: F.cross_entropy(logits, labels, reduction="sum")


def margins(logits: Tensor, labels: Tensor) -> Tensor:
    """Largest other logit less the label's: above 0 where the prediction is wrong. logits: (N, C) -> (N,)."""
    own = labels[:, None]
    return logits.scatter(1, own, -torch.inf).amax(1) - logits.gather(1, own).squeeze(1)


def cross_entropy(net: nn.Module, labels: Tensor) -> Objective:
    """Objective of FGSM and PGD in evaluation: cross-entropy of the final logits, summed over images."""
    return lambda x: summed_cross_entropy(labels)(net(x))


def margin(net: nn.Module, labels: Tensor) -> Objective:
    """Objective of CW: the margin of the final logits, summed over images (arXiv 1608.04644, f_6, no cut-off)."""
    return lambda x: margins(net(x), labels).sum()


def cross_entropy_over_heads(net: nn.Module, labels: Tensor, auxiliary_weight: float) -> Objective:
    """Objective of `pgd40_heads`, and the untargeted training attack's: cross-entropy over heads, a sum over images."""
    return lambda x: over_heads(summed_cross_entropy(labels), net(x, heads=True), auxiliary_weight=auxiliary_weight)


def gaussian_start(x: Tensor, generator: torch.Generator) -> Tensor:
    """x + 0.001 * N(0, 1), not clipped: where the attacks of training start."""
    return x + 0.001 * torch.randn(x.shape, generator=generator, device=x.device)


def image_noise(x: Tensor, numbers: Tensor, seed: int, kind: str, draw: int = 0) -> Tensor:
    """Noise like x (N, 3, H, W) for evaluation: `normal` N(0, 1) or `uniform` in [-1, 1).

    Each image's depends on the seed, on its number in the test set and on the draw alone, not on batch or device.
    """
    noise = np.empty(x.shape, np.float32)
    for row, number in zip(noise, numbers.tolist(), strict=True):
        rng = np.random.default_rng((seed, number, draw) if draw else (seed, number))
        row[:] = rng.standard_normal(row.shape, np.float32) if kind == "normal" else rng.random(row.shape, np.float32)
    noise = torch.from_numpy(noise).to(x.device)
    return noise if kind == "normal" else 2 * noise - 1


def pgd(objective: ObjectiveOf, eps: float, step_size: float, steps: int, *, start: str, seed: int, draw: int = 0) -> Attack:
    """`linf_pgd` on objective(net, labels), for evaluation: the last iterate counts.

    start: `uniform` in the ball, `normal` at x + 0.001 N(0, 1), both unclipped, or `image`, at the image itself.
    seed, draw: of `image_noise`. One step of eps from the image is the textbook FGSM.
    """

    def attack(net: nn.Module, x: Tensor, labels: Tensor, numbers: Tensor) -> Tensor:
        x_0 = x
        if start != "image":
            x_0 = x + (eps if start == "uniform" else 0.001) * image_noise(x, numbers, seed, start, draw)
        return linf_pgd(x, objective(net, labels), eps, step_size, steps, x_0)

    return attack


def pgd40_heads(eps: float, step_size: float, auxiliary_weight: float, seed: int, steps: int = 40) -> Attack:
    """The PGD-40 that selects epochs: cross-entropy over heads, from x + 0.001 N(0, 1)."""
    objective = partial(cross_entropy_over_heads, auxiliary_weight=auxiliary_weight)
    return pgd(objective, eps, step_size, steps, start="normal", seed=seed)


def noise(eps: float, seed: int, draws: int = NOISE_DRAWS) -> Attack:
    """Uniform noise in the ball, clipped to [0, 1]: of each image the last draw that fools the network, if any does."""

    def attack(net: nn.Module, x: Tensor, labels: Tensor, numbers: Tensor) -> Tensor:
        found = x
        for draw in range(draws):
            noisy = (x + eps * image_noise(x, numbers, seed, "uniform", draw)).clamp(0, 1)
            with torch.no_grad():
                wrong = net(noisy).argmax(1) != labels
            found = torch.where(wrong[:, None, None, None], noisy, found)
        return found

    return attack
