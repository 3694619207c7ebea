"""One loop of projected gradient ascent, in L-infinity or L2 balls, and the attacks made of it."""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models import Heads
from utils.losses import over_heads

Objective = Callable[[Tensor], Tensor]  # images -> scalar to ascend
Step = Callable[[Tensor, Tensor], Tensor]  # adversarial images, gradient -> adversarial images
# An attack of an evaluation: (network, images (N, 3, H, W) in [0, 1], labels (N,), numbers (N,) of
# the images in the test set) -> adversarial images
Attack = Callable[[nn.Module, Tensor, Tensor, Tensor], Tensor]

NOISE_DRAWS = 100
TINY = torch.finfo(torch.float32).tiny  # in the place of 0 in a denominator
VERSION = 1  # of these attacks; raise it when results change, so that no stored verdict is reused


def linf_step(x: Tensor, eps: float, step_size: float) -> Step:
    """Return the step clip_[0,1](clip_{x +- eps}(adversarial + step_size * sign(gradient)))."""
    low = (x - eps).clamp(min=0)
    high = (x + eps).clamp(max=1)

    def step(adversarial, gradient):
        return torch.clamp(adversarial + step_size * gradient.sign(), low, high)

    return step


def l2_norm(x: Tensor) -> Tensor:
    """Return the L2 norm of each image of (N, 3, H, W), (N, 1, 1, 1), and for 0 a tiny number."""
    return torch.linalg.vector_norm(x, dim=(1, 2, 3), keepdim=True).clamp(min=TINY)


def l2_step(x: Tensor, eps: float, step_size: float) -> Step:
    """Return the step clip_[0,1](project(adversarial + step_size * gradient / |gradient|_2)).

    `project` moves what is further than eps from x to that distance. A zero gradient is no step.
    """

    def step(adversarial, gradient):
        # The squares of small gradients would vanish, so the largest entry becomes 1 first.
        gradient = gradient / gradient.abs().amax((1, 2, 3), keepdim=True).clamp(min=TINY)
        change = adversarial + step_size * gradient / l2_norm(gradient) - x
        shortened = (eps / l2_norm(change)).clamp(max=1)
        return (x + shortened * change).clamp(0, 1)

    return step


STEPS = {"Linf": linf_step, "L2": l2_step}  # by norm
ONE_STEP = {"Linf": "FGSM", "L2": "FGM"}  # what an attack of one step is called


def projected_ascent(
    norm: str,
    x: Tensor,
    objective: Objective,
    eps: float,
    step_size: float,
    steps: int,
    start: Tensor,
    on_step: Callable[[int, Tensor], None] | None = None,
) -> Tensor:
    """Ascend an objective inside a ball around x (PGD: Madry et al., arXiv 1706.06083).

    `steps` times x_{t+1} = STEPS[norm](x, eps, step_size)(x_t, gradient at x_t) from x_0 = start.

    x: (N, 3, H, W) in [0, 1], the centre. objective: a sum over images, so that each image is
    attacked by itself. eps, the radius, and step_size: in units of [0, 1]. start: like x, used as
    it is, which may leave the ball and [0, 1]. on_step(t, x_t), t from 1, sees every iterate.
    Returns x_steps, (N, 3, H, W), detached, in the ball and in [0, 1].
    """
    step = STEPS[norm](x, eps, step_size)
    adversarial = start.detach()
    for t in range(1, steps + 1):
        with torch.enable_grad():
            adversarial.requires_grad_()
            (gradient,) = torch.autograd.grad(objective(adversarial), adversarial)
        adversarial = step(adversarial.detach(), gradient)
        if on_step is not None:
            on_step(t, adversarial)
    return adversarial


# (x, objective, eps, step_size, steps, start, on_step=None) -> adversarial images
linf_pgd = partial(projected_ascent, "Linf")


class ToAttack(NamedTuple):
    """Images to attack, and what to ascend: objective(heads of x, target, auxiliary_weight).

    x: (N, 3, H, W). start: like x. target: labels (N,), or the heads of other images.
    """

    x: Tensor
    start: Tensor
    objective: Callable[[Heads, Tensor | Heads, float], Tensor]
    target: Tensor | Heads


def pgd_together(
    net: nn.Module,
    batches: list[ToAttack],
    auxiliary_weight: float,
    eps: float,
    step_size: float,
    steps: int,
    norm: str = "Linf",
) -> list[Tensor]:
    """Run `projected_ascent` on several batches as one, each with its own objective.

    No image's gradient depends on another image, so they end where each would by itself, up to
    rounding. Returns the adversarial images of each batch.
    """
    x = torch.cat([batch.x for batch in batches])

    def objective(x):
        heads = net(x, heads=True)
        total = 0
        first = 0
        for batch in batches:
            rows = slice(first, first + len(batch.x))
            total = total + batch.objective(heads.rows(rows), batch.target, auxiliary_weight)
            first = rows.stop
        return total

    start = torch.cat([batch.start for batch in batches])
    attacked = projected_ascent(norm, x, objective, eps, step_size, steps, start)
    return list(attacked.split([len(batch.x) for batch in batches]))


def summed_cross_entropy(labels: Tensor) -> Callable[[Tensor], Tensor]:
    """Return the cross-entropy of logits (N, C), summed over images, as a criterion of logits.

    In a sum, unlike a mean, no image's gradient depends on the size of its batch.
    """
    return lambda logits: F.cross_entropy(logits, labels, reduction="sum")


def margins(logits: Tensor, labels: Tensor) -> Tensor:
    """Return the largest other logit less the label's: above 0 where the prediction is wrong.

    logits: (N, C), labels: (N,). Returns (N,).
    """
    columns = labels[:, None]
    largest_other = logits.scatter(1, columns, -torch.inf).amax(1)
    return largest_other - logits.gather(1, columns).squeeze(1)


def cross_entropy(net: nn.Module, labels: Tensor) -> Objective:
    """Return the objective of FGSM and PGD in evaluation: cross-entropy of the final logits."""
    return lambda x: summed_cross_entropy(labels)(net(x))


def margin(net: nn.Module, labels: Tensor) -> Objective:
    """Return the objective of CW: the final logits' margin (arXiv 1608.04644, f_6, no cut-off)."""
    return lambda x: margins(net(x), labels).sum()


def cross_entropy_over_heads(net: nn.Module, labels: Tensor, auxiliary_weight: float) -> Objective:
    """Return the objective of `pgd40_heads`: cross-entropy over heads."""
    criterion = summed_cross_entropy(labels)
    return lambda x: over_heads(criterion, net(x, heads=True), auxiliary_weight=auxiliary_weight)


def gaussian_start(x: Tensor, generator: torch.Generator) -> Tensor:
    """Return x + 0.001 * N(0, 1), not clipped: where the attacks of training start."""
    return x + 0.001 * torch.randn(x.shape, generator=generator, device=x.device)


def image_noise(x: Tensor, numbers: Tensor, seed: int, kind: str, draw: int = 0) -> Tensor:
    """Return noise like x (N, 3, H, W) for evaluation.

    kind: `normal` for N(0, 1), or a norm, `Linf` or `L2`, for uniform noise in its unit ball. The
    noise of an image depends on the seed, on its number in the test set and on the draw, not on
    the batch or the device.
    """
    noise = torch.empty(x.shape)
    for image, number in zip(noise, numbers.tolist(), strict=True):
        rng = np.random.default_rng((seed, number, draw) if draw else (seed, number))
        if kind == "Linf":
            values = 2 * rng.random(image.shape, np.float32) - 1
        else:
            values = rng.standard_normal(image.shape, np.float32)
        if kind == "L2":
            values *= rng.random() ** (1 / values.size) / np.linalg.norm(values)
        image.copy_(torch.from_numpy(values))
    return noise.to(x.device)


def pgd(
    objective: Callable[[nn.Module, Tensor], Objective],
    eps: float,
    step_size: float,
    steps: int,
    *,
    start: str,
    seed: int,
    draw: int = 0,
    norm: str = "Linf",
) -> Attack:
    """Return `projected_ascent` on objective(net, labels) as an attack of an evaluation.

    start: `uniform` in the ball, `normal` at x + 0.001 N(0, 1), both unclipped, or `image`, at the
    image itself. seed, draw: of `image_noise`. One step of eps from the image is FGSM, or for L2
    FGM.
    """

    def attack(net, x, labels, numbers):
        x_0 = x
        if start == "uniform":
            x_0 = x + eps * image_noise(x, numbers, seed, norm, draw)
        if start == "normal":
            x_0 = x + 0.001 * image_noise(x, numbers, seed, "normal", draw)
        return projected_ascent(norm, x, objective(net, labels), eps, step_size, steps, x_0)

    return attack


def pgd40_heads(
    eps: float,
    step_size: float,
    auxiliary_weight: float,
    seed: int,
    steps: int = 40,
    norm: str = "Linf",
) -> Attack:
    """Return the PGD-40 that selects epochs: cross-entropy over heads, from x + 0.001 N(0, 1)."""
    objective = partial(cross_entropy_over_heads, auxiliary_weight=auxiliary_weight)
    return pgd(objective, eps, step_size, steps, start="normal", seed=seed, norm=norm)


def noise(eps: float, seed: int, draws: int = NOISE_DRAWS, norm: str = "Linf") -> Attack:
    """Return uniform noise in the ball, clipped to [0, 1], as an attack of an evaluation.

    Of each image it returns the last draw that fools the network, or the image where none does.
    """

    def attack(net, x, labels, numbers):
        fooling = x
        for draw in range(draws):
            noisy = (x + eps * image_noise(x, numbers, seed, norm, draw)).clamp(0, 1)
            with torch.no_grad():
                wrong = net(noisy).argmax(1) != labels
            fooling = torch.where(wrong[:, None, None, None], noisy, fooling)
        return fooling

    return attack
