"""Signs of gradient masking (arXiv 1802.00420, Athalye et al.; 1902.06705, Carlini et al.)."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor, nn

from utils.attacks import NOISE_DRAWS, Attack, margins, noise
from utils.data.datasets import Split, as_input
from utils.data.subject import Work, over_images, percent
from utils.evaluation.adaptive import View, cross_entropies, plain, view_pgd
from utils.evaluation.autoattack import square
from utils.system.devices import computing
from utils.system.values import eps_text

RADII = (0.25, 0.5, 0.75, 1.0, 1.5, 2.0, 3.0, 5.0)  # times eps; 0 and the whole range are added
STEPS = (1, 2, 5, 10, 20, 40, 100, 200)
RESTARTS = 10
QUERIES = 5000
CHECKED = 64  # images that `sanity_warnings` looks at


class Sign(NamedTuple):
    """One sign of masking: its name, whether it is there, and the figure that says so."""

    name: str
    raised: bool
    figure: str


Curve = list[tuple[float, float, float]]  # eps or steps, PGD on the final view, PGD on every view


class Diagnosis(NamedTuple):
    """All signs, and two curves of robust accuracy in percent."""

    signs: list[Sign]
    by_eps: Curve
    by_steps: Curve


def zero_gradient(net: nn.Module, x: Tensor, labels: Tensor) -> Tensor:
    """Return at which images the cross-entropy's gradient is exactly zero, (N,) bool."""
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        (gradient,) = torch.autograd.grad(cross_entropies(net(x), labels).sum(), x)
    return gradient.flatten(1).abs().amax(1) == 0


@computing("fp32")
def sanity_warnings(net: nn.Module, split: Split, by_gradient: bool) -> list[str]:
    """Look for what leads every attack astray, on the first images of a split.

    by_gradient: whether any of the attacks follows the gradient.
    """
    x = as_input(split.images[:CHECKED])
    labels = split.labels[:CHECKED]
    with torch.no_grad():
        logits = net(x)
        repeated = net(x)
        alone = torch.cat([net(image[None]) for image in x[:16]])
    together = logits[: len(alone)]
    scale = logits.abs().amax().clamp(min=1e-12)
    change_by_repeating = (repeated - logits).abs().amax() / scale
    change_by_batch = (alone - together).abs().amax() / scale
    hint = "where a part of it is in training mode, call eval()"
    warnings = []

    if change_by_repeating > 1e-5:
        warnings.append(f"two calls answer differently, which leads attacks astray; {hint}")

    if change_by_batch > max(1e-3, 3 * change_by_repeating):
        flips = int((alone.argmax(1) != together.argmax(1)).sum())
        warnings.append(
            f"an image alone is answered otherwise than in a batch ({flips} of {len(alone)} by "
            f"another class), which leads attacks astray; {hint}"
        )

    if logits.amin() >= 0 and (logits.sum(1) - 1).abs().amax() < 1e-3:
        warnings.append("answers are probabilities, whose gradients vanish; return logits")

    right = logits.argmax(1) == labels
    if by_gradient and right.any():
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

    natural: (N,) bool, the images to attack: those that are right without an attack. take_fooling:
    is called with rows, adversarial images and margins of images that an attack fools within eps.
    progress: is called with the name of each attack before it begins.
    """

    net: nn.Module
    split: Split
    natural: Tensor
    eps: float
    step_size: float
    seed: int
    batch_size: int
    take_fooling: Callable[[Tensor, Tensor, Tensor], None] = lambda rows, images, margins: None
    progress: Callable[[str], None] = lambda name: None

    def run(self, name: str, work: Work, eps: float) -> tuple[Tensor, ...]:
        """Attack the images and judge the result.

        work: (images, labels, numbers) -> adversarial images, and anything else of each image.
        Returns which images the network gets wrong, (n,) bool, then whatever else `work` returned.
        """
        self.progress(name)

        def judged(x: Tensor, labels: Tensor, numbers: Tensor) -> tuple[Tensor, ...]:
            images, *others = work(x, labels, numbers)
            with torch.no_grad():
                logits = self.net(images)
            return images, margins(logits, labels), logits.argmax(1) != labels, *others

        rows = self.natural.nonzero().squeeze(1)
        images, over, wrong, *others = over_images(self.split, rows, self.batch_size, judged)
        if eps <= self.eps:
            self.take_fooling(rows[wrong], images[wrong], over[wrong])
        return wrong, *others

    def attack(self, name: str, attack: Attack) -> Tensor:
        """Return which images an attack within eps fools, (n,) bool."""
        wrong, *_ = self.run(name, lambda *batch: (attack(self.net, *batch),), self.eps)
        return wrong

    def pgd(
        self,
        name: str,
        view: View = plain,
        eps: float | None = None,
        steps: int = 40,
        draw: int = 0,
    ) -> Tensor:
        """Return which iterates of PGD on a view fool the network, (n, steps) bool.

        Steps grow with the ball; a single step is as large as the ball.
        """
        eps = self.eps if eps is None else eps
        step_size = eps if steps == 1 else self.step_size * eps / self.eps
        work = partial(
            view_pgd,
            self.net,
            view,
            criterion=cross_entropies,
            eps=eps,
            step_size=step_size,
            steps=steps,
            seed=self.seed,
            draw=draw,
        )
        _, wrong = self.run(name, work, eps)
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

    final, every = on_views("steps", probe.eps, STEPS[-1])
    by_steps = []
    for steps in STEPS:
        last = steps - 1
        by_steps.append((steps, probe.accuracy(final[:, last]), probe.accuracy(every[:, last])))

    natural = percent(probe.natural)
    by_eps = [(0.0, natural, natural), (probe.eps, *by_steps[STEPS.index(40)][1:])]
    radii = {min(probe.eps * factor, 1.0) for factor in RADII} | {1.0}
    for radius in sorted(radii - {probe.eps}):
        of_radius, every_of_radius = on_views(f"eps {eps_text(radius)}", radius, 40)
        accuracy = probe.accuracy(of_radius[:, -1])
        by_eps.append((radius, accuracy, probe.accuracy(every_of_radius[:, -1])))
    by_eps.sort()
    return Diagnosis(_signs(probe, final, by_eps, by_steps), by_eps, by_steps)


def _signs(probe: Probe, final: Tensor, by_eps: Curve, by_steps: Curve) -> list[Sign]:
    """Run further attacks, and return all signs.

    final: which iterates of PGD on the final view fool the images, (n, steps) bool.
    """
    by_pgd = final[:, 39]
    by_restarts = by_pgd.clone()
    for draw in range(1, RESTARTS):
        by_restarts |= probe.pgd(f"restart {draw + 1}", draw=draw)[:, -1]
    by_square = probe.attack("Square", square(probe.eps, probe.seed, QUERIES))
    pgd = probe.accuracy(by_pgd)
    pgd_longest = by_steps[-1][1]
    restarts = probe.accuracy(by_restarts)
    black_box = probe.accuracy(by_square)
    missed = pgd - probe.accuracy(by_pgd | by_square)
    noisy = probe.accuracy(probe.attack("noise", noise(probe.eps, probe.seed)))
    fgsm = probe.accuracy(probe.pgd("FGSM", steps=1)[:, 0])
    iterates = probe.accuracy(final[:, :40].any(1))  # any iterate counts, as for the views
    every_view = by_steps[STEPS.index(40)][2]
    full_ball = by_eps[-1][1]
    rise = max(0.0, *(after[1] - before[1] for before, after in pairwise(by_eps)))

    def gradients(x: Tensor, labels: Tensor, numbers: Tensor) -> tuple[Tensor, Tensor]:
        return x, zero_gradient(probe.net, x, labels)

    _, vanishing = probe.run("gradients", gradients, probe.eps)
    wrong = int((~probe.natural).sum())
    turned_right = 0
    if wrong:
        others = replace(probe, natural=~probe.natural, take_fooling=lambda *images: None)
        turned_right = int((~others.pgd("wrong images")[:, -1]).sum())

    left = f"PGD-40 leaves {pgd:.1f} % right"
    return [
        Sign(
            "the answer hides what the views show",
            iterates - every_view > 2,
            f"iterates of PGD-40 on the answer leave {iterates:.1f} % right, "
            f"on every view {every_view:.1f} %",
        ),
        Sign("eps 1 leaves images right", full_ball > 1, f"accuracy at eps 1 is {full_ball:.1f} %"),
        Sign(
            "a larger eps raises accuracy",
            rise > 1,
            f"accuracy rises with eps by {rise:.1f} points at most",
        ),
        Sign(
            "more steps still help",
            pgd - pgd_longest > 1,
            f"{left}, PGD-{STEPS[-1]} {pgd_longest:.1f} %",
        ),
        Sign("one step beats many", fgsm < pgd, f"{left}, FGSM {fgsm:.1f} %"),
        Sign(
            "restarts still help",
            pgd - restarts > 3,
            f"{left} from one start, {restarts:.1f} % from {RESTARTS}",
        ),
        Sign(
            "random noise beats PGD",
            noisy < pgd,
            f"{left}, {NOISE_DRAWS} draws of noise {noisy:.1f} %",
        ),
        Sign(
            "black-box finds what white-box misses",
            missed > 1,
            f"Square alone leaves {black_box:.1f} % right and fools {missed:.1f} % of all images "
            "that PGD-40 does not",
        ),
        Sign(
            "gradients vanish",
            bool(vanishing.any()),
            f"gradients are zero at {vanishing.sum()} of {len(vanishing)} right images",
        ),
        Sign(
            "attacks mend wrong images",
            turned_right > 0.05 * max(wrong, 20),
            f"PGD-40 turns {turned_right} of {wrong} wrong images right",
        ),
    ]
