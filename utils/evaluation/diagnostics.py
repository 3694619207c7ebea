"""Signs of gradient masking (arXiv 1802.00420, Athalye et al.; 1902.06705, Carlini et al.)."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor, nn

from utils.attacks import ONE_STEP, Attack, noise
from utils.data.datasets import Split, as_input
from utils.data.subject import over_images, percent, right_or_not
from utils.evaluation.adaptive import View, cross_entropies, plain, view_pgd
from utils.evaluation.autoattack import square
from utils.evaluation.cache import WorstImages
from utils.system.devices import computing
from utils.system.settings import largest_radius
from utils.system.values import eps_text

RADII = (0.25, 0.5, 0.75, 1.0, 1.5, 2.0, 3.0, 5.0)  # times eps; 0 and `largest` are added
STEPS = (1, 2, 5, 10, 20, 40, 100, 200)
RESTARTS = 10
QUERIES = 5000
CHECKED = 64  # images that `sanity_warnings` looks at
NOISE = 8 / 255  # that it adds to some of them


class Sign(NamedTuple):
    """One sign of masking: its name, whether it is there, and the figures that say so, in words."""

    name: str
    raised: bool
    figure: str


Curve = list[tuple[float, float, float]]  # eps or steps, PGD on the final view, PGD on every view


class Diagnosis(NamedTuple):
    """All signs, and two curves of robust accuracy in percent."""

    signs: list[Sign]
    by_eps: Curve
    by_steps: Curve


def input_gradient(net: nn.Module, x: Tensor, labels: Tensor) -> Tensor:
    """Return the gradient of each image's cross-entropy, (N, 3, H, W)."""
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        (gradient,) = torch.autograd.grad(cross_entropies(net(x), labels).sum(), x)
    return gradient


def zero_gradient(net: nn.Module, x: Tensor, labels: Tensor) -> Tensor:
    """Return at which images the cross-entropy's gradient is exactly zero, (N,) bool."""
    return input_gradient(net, x, labels).flatten(1).abs().amax(1) == 0


def repeatable(function: Callable[[], Tensor], tolerance: float) -> bool:
    """Whether two calls return the same. tolerance: a share of the largest magnitude."""
    first = function().detach()
    scale = first.nan_to_num(0, 0, 0).abs().amax().item()
    again = function().detach()
    return torch.allclose(again, first, rtol=0, atol=tolerance * scale, equal_nan=True)


@computing("fp32")
def sanity_warnings(net: nn.Module, split: Split) -> list[str]:
    """Look for what leads every attack astray, on the first images of a split."""
    x = as_input(split.images[:CHECKED]).requires_grad_()
    labels = split.labels[:CHECKED]
    logits = net(x)
    differentiable = logits.requires_grad
    logits = logits.detach()
    if not logits.isfinite().all():  # which is an error as soon as images are judged
        return []
    # Images that are as unlike the data as those of attacks.
    uniform = torch.rand(x[:16].shape, generator=torch.Generator().manual_seed(0)).to(x.device)
    noisy = (x.detach()[:16] + NOISE * (2 * uniform - 1)).clamp(0, 1)
    slopes = partial(input_gradient, net, noisy, labels[:16])
    with torch.no_grad():
        alone = torch.cat([net(image[None]) for image in x[:16]])
    scale = logits.abs().amax().item()
    hint = "which leads attacks astray; where a part of it is in training mode, call eval()"
    warnings = []
    if not repeatable(lambda: net(x), 1e-5):
        warnings.append(f"two calls answer differently, {hint}")
    elif not repeatable(lambda: net(noisy), 1e-5):
        warnings.append("two calls answer differently on noisy images, which leads attacks astray")
    elif differentiable and not repeatable(slopes, 1e-2):
        warnings.append("two calls have other gradients on noisy images, which mislead attacks")
    elif not torch.allclose(alone, logits[: len(alone)], rtol=0, atol=1e-3 * scale):
        warnings.append(f"an image alone is answered otherwise than in a batch, {hint}")
    if logits.amin() >= 0 and (logits.sum(1) - 1).abs().amax() < 1e-3:
        warnings.append("answers are probabilities, whose gradients vanish; return logits")

    right = logits.argmax(1) == labels
    if differentiable and right.any():
        zero = zero_gradient(net, x[right], labels[right])
        if zero.any():
            warnings.append(
                f"gradients are exactly zero at {int(zero.sum())} of {len(zero)} right images; "
                "square, noise and transfer need none"
            )
    return warnings


@dataclass(frozen=True)
class Probe:
    """A network, images to attack, and the attacks' settings.

    natural: (N,) bool, the images to attack: those that are right without an attack. fooling: takes
    the adversarial images of attacks within eps. progress: is called with the name of each attack.
    """

    net: nn.Module
    split: Split
    natural: Tensor
    eps: float
    step_size: float
    seed: int
    batch_size: int
    fooling: WorstImages
    progress: Callable[[str], None]
    norm: str = "Linf"

    @property
    def largest(self) -> float:
        """The eps at which every image may become every other."""
        return largest_radius(self.norm, self.split.images.shape[-1])

    def attack(self, name: str, attack: Attack) -> Tensor:
        """Return which images an attack within eps fools, (n,) bool."""
        self.progress(name)
        rows = self.natural.nonzero().squeeze(1)
        work = partial(right_or_not, self.net, attack)
        right, images, logits = over_images(self.split, rows, self.batch_size, work)
        self.fooling.take(rows[~right], images[~right], logits[~right])
        return ~right

    def pgd(self, name: str, view: View, eps: float, steps: int = 40, draw: int = 0) -> Tensor:
        """Return which iterates of PGD on a view fool the network, (n, steps) bool.

        Steps grow with the ball; a single step is as large as the ball.
        """
        self.progress(name)
        step_size = eps if steps == 1 else self.step_size * eps / self.eps
        sizes = {"norm": self.norm, "eps": eps, "step_size": step_size, "steps": steps}

        def work(*batch: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            images, wrong = view_pgd(
                self.net, view, *batch, cross_entropies, **sizes, seed=self.seed, draw=draw
            )
            with torch.no_grad():
                return images, self.net(images), wrong

        rows = self.natural.nonzero().squeeze(1)
        images, logits, wrong = over_images(self.split, rows, self.batch_size, work)
        fooled = wrong.any(1)
        if eps <= self.eps:
            self.fooling.take(rows[fooled], images[fooled], logits[fooled])
        return wrong

    def accuracy(self, fooled: Tensor) -> float:
        """Return robust accuracy on the whole split in percent. fooled: (n,) bool."""
        return 100 * (len(fooled) - fooled.sum().item()) / len(self.natural)


def diagnose(probe: Probe, view_by_name: dict[str, View]) -> Diagnosis:
    """Look for the signs on a split.

    Figures are shares of the whole split. The curves over all views are the worst case, image by
    image, over the iterates of PGD on every view with one start each: cheaper, and so weaker, than
    `--attacks adaptive`.
    """
    if not probe.natural.any():
        figure = "no image is right without an attack"
        return Diagnosis([Sign("there is nothing to attack", True, figure)], [], [])

    def on_views(name: str, eps: float, steps: int) -> tuple[Tensor, Tensor]:
        """Attack each view -> which iterates fool, on the final view; so far, on every view."""
        fooled = {
            view_name: probe.pgd(f"{name}, {view_name}", view, eps, steps)
            for view_name, view in view_by_name.items()
        }
        so_far = torch.stack([wrong.cummax(1).values for wrong in fooled.values()]).any(0)
        return fooled["final"], so_far

    def accuracies(final: Tensor, every: Tensor, steps: int) -> tuple[float, float]:
        return probe.accuracy(final[:, steps - 1]), probe.accuracy(every[:, steps - 1])

    final, every = on_views("steps", probe.eps, STEPS[-1])
    by_steps = [(steps, *accuracies(final, every, steps)) for steps in STEPS]

    natural = percent(probe.natural)
    by_eps = [(0.0, natural, natural), (probe.eps, *accuracies(final, every, 40))]
    largest = probe.largest
    radii = {min(probe.eps * factor, largest) for factor in RADII} | {largest}
    for radius in radii - {probe.eps}:
        of_radius = on_views(f"eps {eps_text(radius)}", radius, 40)
        by_eps.append((radius, *accuracies(*of_radius, 40)))
    by_eps.sort()
    return Diagnosis(_signs(probe, final, by_eps, by_steps), by_eps, by_steps)


def _signs(probe: Probe, final: Tensor, by_eps: Curve, by_steps: Curve) -> list[Sign]:
    """Run further attacks, and return all signs.

    final: which iterates of PGD on the final view fool the images, (n, steps) bool.
    """
    by_pgd = final[:, 39]
    by_restarts = by_pgd.clone()
    for draw in range(1, RESTARTS):
        name = f"restart {draw + 1}"
        by_restarts |= probe.pgd(name, plain, probe.eps, draw=draw)[:, -1]
    by_square = probe.attack("Square", square(probe.eps, probe.seed, QUERIES, probe.norm))

    pgd = probe.accuracy(by_pgd)
    longest = by_steps[-1][1]
    restarts = probe.accuracy(by_restarts)
    both = probe.accuracy(by_pgd | by_square)
    noisy = probe.accuracy(probe.attack("noise", noise(probe.eps, probe.seed, norm=probe.norm)))
    fgsm = probe.accuracy(probe.pgd("FGSM", plain, probe.eps, steps=1)[:, 0])
    iterates = probe.accuracy(final[:, :40].any(1))  # any iterate counts, as for the views
    every = by_steps[STEPS.index(40)][2]
    full_ball = by_eps[-1][1]
    rise = max(0.0, *(after[1] - before[1] for before, after in pairwise(by_eps)))

    def gradients(x: Tensor, labels: Tensor, numbers: Tensor) -> tuple[Tensor]:
        return (zero_gradient(probe.net, x, labels),)

    rows = probe.natural.nonzero().squeeze(1)
    (vanishing,) = over_images(probe.split, rows, probe.batch_size, gradients)
    wrong = int((~probe.natural).sum())
    turned_right = 0
    if wrong:
        others = replace(probe, natural=~probe.natural)
        turned_right = int((~others.pgd("wrong images", plain, probe.eps)[:, -1]).sum())

    compared = [  # each with PGD-40: the sign, whether it is there, the other attack, its accuracy
        ("more steps still help", pgd - longest > 1, f"PGD-{STEPS[-1]}", longest),
        ("one step beats many", fgsm < pgd, ONE_STEP[probe.norm], fgsm),
        ("restarts still help", pgd - restarts > 3, f"the worst of {RESTARTS} starts", restarts),
        ("random noise beats PGD", noisy < pgd, "random noise", noisy),
        ("black-box finds what white-box misses", pgd - both > 1, "PGD-40 and Square", both),
    ]
    signs = [
        Sign(name, raised, f"PGD-40 leaves {pgd:.1f} % right, {attack} {accuracy:.1f} %")
        for name, raised, attack, accuracy in compared
    ]
    figure = (
        f"iterates of PGD-40 on the answer leave {iterates:.1f} % right, on all views {every:.1f} %"
    )
    signs.append(Sign("the answer hides what the views show", iterates - every > 2, figure))
    largest = eps_text(probe.largest)
    figure = f"accuracy at eps {largest} is {full_ball:.1f} %"
    signs.append(Sign(f"eps {largest} leaves images right", full_ball > 1, figure))
    figure = f"accuracy rises with eps by {rise:.1f} points at most"
    signs.append(Sign("a larger eps raises accuracy", rise > 1, figure))
    figure = f"gradients are zero at {vanishing.sum()} of {len(vanishing)} right images"
    signs.append(Sign("gradients vanish", bool(vanishing.any()), figure))
    figure = f"PGD-40 turns {turned_right} of {wrong} wrong images right"
    signs.append(Sign("attacks mend wrong images", turned_right > 0.05 * max(wrong, 20), figure))
    return signs
