"""Signs of gradient masking (arXiv 1802.00420, Athalye et al.; 1902.06705, Carlini et al.)."""

from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor, nn

from utils.attacks import Attack, image_noise, margins, noise
from utils.data.datasets import Progress, Split, Work, as_input, over_images
from utils.data.subject import percent, right_or_not
from utils.evaluation.adaptive import Criterion, View, Views, cross_entropies, plain, view_pgd
from utils.evaluation.autoattack import square
from utils.evaluation.cache import WorstImages
from utils.evaluation.results import wilson
from utils.system.devices import computing
from utils.system.settings import largest_radius
from utils.system.values import eps_text

RADII = (0.25, 0.5, 0.75, 1.0, 1.5, 2.0, 3.0, 5.0)  # times eps; 0 and `largest` are added
STEPS = (1, 2, 5, 10, 20, 40, 100, 200)
RESTARTS = 10
QUERIES = 5000
ANSWER = "PGD on the answer's logits"
EVERY_VIEW = "PGD on every view"  # image by image, each view from one start
CHECKED = 64  # images that `sanity_warnings` looks at
NOISE = 8 / 255  # that it adds to some of them


class Sign(NamedTuple):
    """One sign of masking: its name, whether it is there, and how many images show it, in words."""

    name: str
    raised: bool
    figure: str


# Points of robust accuracy in percent: `eps` or `steps`, and the accuracy by the attack's name
Curve = list[dict[str, float]]


class Diagnosis(NamedTuple):
    """All signs, and two curves of robust accuracy."""

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


def differ(one: Tensor, other: Tensor, tolerance: float) -> bool:
    """Whether two tensors differ. tolerance: a share of the largest magnitude."""
    scale = one.nan_to_num(0, 0, 0).abs().max().item()
    return not torch.allclose(other, one, rtol=0, atol=tolerance * scale, equal_nan=True)


@computing("fp32")
def sanity_warnings(net: nn.Module, split: Split) -> list[str]:
    """Look for what leads every attack astray, on the first images of a split."""
    x = as_input(split.images[:CHECKED]).requires_grad_()
    labels = split.labels[:CHECKED]
    logits = net(x)
    differentiable = logits.requires_grad
    if not logits.isfinite().all():  # which is an error as soon as images are judged
        return []
    first = x.detach()[:16]
    with torch.no_grad():
        alone = torch.cat([net(image[None]) for image in first])
    # Images that are as unlike the data as those of attacks.
    uniform = image_noise(first, split.numbers[:16], 0, "Linf")
    noisy = (first + NOISE * uniform).clamp(0, 1)
    slopes = partial(input_gradient, net, noisy, labels[:16])
    hint = "which leads attacks astray; where a part of it is in training mode, call eval()"
    warnings = []
    if differ(logits, net(x), 1e-5):
        warnings.append(f"two calls answer differently, {hint}")
    elif differ(net(noisy), net(noisy), 1e-5):
        warnings.append("two calls answer differently on noisy images, which leads attacks astray")
    elif differentiable and differ(slopes(), slopes(), 1e-2):
        warnings.append("two calls have other gradients on noisy images, which mislead attacks")
    elif differ(logits[:16], alone, 1e-3):
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
    the adversarial images of attacks within eps. progress: gets the number of images of each batch.
    """

    net: nn.Module
    split: Split
    natural: Tensor
    eps: float
    step_size: float
    seed: int
    batch_size: int
    fooling: WorstImages
    progress: Progress
    norm: str = "Linf"

    @property
    def rows(self) -> Tensor:
        """The places of the images to attack in the split, (n,)."""
        return self.natural.nonzero().squeeze(1)

    def run(self, work: Work) -> tuple[Tensor, ...]:
        """Call `work` on the images to attack, batch by batch -> its answers, each (n, ...)."""
        return over_images(self.split.take(self.rows), self.batch_size, work, self.progress)

    def keep(self, fooled: Tensor, images: Tensor, logits: Tensor) -> None:
        """Hand adversarial images (n, 3, H, W) within eps on, where they fool: fooled (n,) bool."""
        self.fooling.take(self.rows[fooled], images[fooled], logits[fooled])

    def attack(self, attack: Attack) -> Tensor:
        """Return which images an attack within eps fools, (n,) bool."""
        right, images, logits = self.run(partial(right_or_not, self.net, attack))
        self.keep(~right, images, logits)
        return ~right

    def pgd(
        self,
        view: View = plain,
        eps: float | None = None,
        steps: int = 40,
        draw: int = 0,
        criterion: Criterion = cross_entropies,
    ) -> Tensor:
        """Return which iterates of PGD on a view fool the network, (n, steps) bool.

        eps: of another ball than the usual one, with which steps grow. A single step is as large
        as the ball.
        """
        if eps is None:
            eps = self.eps
        step_size = eps if steps == 1 else self.step_size * eps / self.eps

        def work(*batch):
            images, wrong = view_pgd(
                self.net,
                view,
                *batch,
                criterion,
                eps=eps,
                step_size=step_size,
                steps=steps,
                seed=self.seed,
                draw=draw,
                norm=self.norm,
            )
            with torch.no_grad():
                return images, self.net(images), wrong

        images, logits, wrong = self.run(work)
        if eps <= self.eps:
            self.keep(wrong.any(1), images, logits)
        return wrong


def diagnose(probe: Probe, view_by_name: Views) -> Diagnosis:
    """Look for the signs on a split.

    Figures are shares of the whole split. The curves over all views are the worst case, image by
    image, over the iterates of PGD on every view with one start each: cheaper, and so weaker, than
    `--attacks adaptive`.
    """
    total = len(probe.natural)
    if not probe.natural.any():
        sign = Sign("no image is right without an attack", True, f"{total} of {total} images")
        return Diagnosis([sign], [], [])

    def attacked(eps: float, steps: int) -> dict[str, Tensor]:
        """Attack each view -> which iterates fool: on the final view; so far, on every view."""
        fooled = torch.stack([probe.pgd(view, eps, steps) for view in view_by_name.values()])
        return {ANSWER: fooled[0], EVERY_VIEW: fooled.any(0).cummax(1).values}

    def after(steps: int, fooled: dict[str, Tensor]) -> dict[str, float]:
        """Return the accuracies after so many steps."""
        return {
            name: 100 * int((~iterates[:, steps - 1]).sum()) / total
            for name, iterates in fooled.items()
        }

    fooled = attacked(probe.eps, STEPS[-1])
    by_steps = [{"steps": steps, **after(steps, fooled)} for steps in STEPS]

    by_eps = [{"eps": 0.0, **dict.fromkeys(fooled, percent(probe.natural))}]
    largest = largest_radius(probe.norm, probe.split.images.shape[-1])
    radii = {min(probe.eps * factor, largest) for factor in RADII}
    for eps in sorted(radii | {probe.eps, largest}):
        of_radius = fooled if eps == probe.eps else attacked(eps, 40)
        by_eps.append({"eps": eps, **after(40, of_radius)})
    return Diagnosis(_signs(probe, *fooled.values(), by_eps), by_eps, by_steps)


def _signs(probe: Probe, final: Tensor, every: Tensor, by_eps: Curve) -> list[Sign]:
    """Run further attacks, and return all signs.

    final: which iterates of PGD on the final view fool the images, (n, steps) bool. every: which
    images an iterate so far on any view fools, likewise.
    """
    pgd = final[:, 39]  # the last iterate of PGD-40, as in the table
    restarts = pgd.clone()
    for draw in range(1, RESTARTS):
        restarts |= probe.pgd(draw=draw)[:, -1]
    one_step = probe.pgd(steps=1)[:, 0]
    by_noise = probe.attack(noise(probe.eps, probe.seed, norm=probe.norm))
    by_square = probe.attack(square(probe.eps, probe.seed, QUERIES, probe.norm))
    # The margin still has gradients where the cross-entropy underflows.
    by_margin = probe.pgd(criterion=margins).any(1)
    by_gradients = restarts | every[:, -1] | by_margin

    (vanishing,) = probe.run(lambda x, labels, numbers: (zero_gradient(probe.net, x, labels),))
    wrong = replace(probe, natural=~probe.natural)
    turned_right = 0
    if len(wrong.rows):
        turned_right = (~wrong.pgd()[:, -1]).sum()

    total = len(probe.natural)
    right = [round(point[ANSWER] * total / 100) for point in by_eps]
    rise = max(after - before for before, after in pairwise(right))
    largest = eps_text(by_eps[-1]["eps"])

    def sign(name: str, points: float, images: int | Tensor, count: int = total) -> Sign:
        """Make a sign, raised where more than `points` percent of images show it.

        images, count: how many do, of how many. So few that they may be chance raise no sign.
        """
        images = max(0, int(images))
        raised = images > 0 and wilson(images, count)[0] > points
        return Sign(name, raised, f"{images} of {count} images")

    only_on_views = every[:, 39] & ~final[:, :40].any(1)  # any iterate counts, on both sides
    return [
        sign("more steps still help", 1, final[:, -1].sum() - pgd.sum()),
        sign("one step beats many", 0, one_step.sum() - pgd.sum()),
        sign("restarts still help", 3, restarts.sum() - pgd.sum()),
        sign("random noise beats PGD", 0, by_noise.sum() - pgd.sum()),
        sign("black-box finds what white-box misses", 1, (by_square & ~by_gradients).sum()),
        sign("the answer hides what the views show", 2, only_on_views.sum()),
        sign(f"eps {largest} leaves images right", 1, right[-1]),
        sign("a larger eps raises accuracy", 1, rise),
        sign("gradients vanish", 0, vanishing.sum(), len(vanishing)),
        sign("attacks mend wrong images", 5, turned_right, len(wrong.rows)),
    ]
