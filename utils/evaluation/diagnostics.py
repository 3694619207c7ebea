"""Signs of gradient masking, each with its figure (arXiv 1802.00420, Athalye et al.; 1902.06705, Carlini et al.)."""

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from utils.attacks import NOISE_DRAWS, margins, noise
from utils.data.datasets import Split
from utils.data.subject import Work, over_images, percent
from utils.evaluation.adaptive import View, cross_entropies, plain, view_pgd
from utils.evaluation.autoattack import Says, square
from utils.system.values import eps_text

RADII = (0.25, 0.5, 0.75, 1.0, 1.5, 2.0, 3.0, 5.0)  # in units of the evaluation's eps; 0 and the whole range are added
STEPS = (1, 2, 5, 10, 20, 40, 100, 200)
RESTARTS = 10
QUERIES = 5000


class Sign(NamedTuple):
    """One sign. name: of what it is where it is raised. raised: whether it speaks of masking. figure: what holds."""

    name: str
    raised: bool
    figure: str


class Diagnosis(NamedTuple):
    """signs, and two curves of robust accuracy in percent: (eps or steps, PGD on the final view, adaptive PGD)."""

    signs: list[Sign]
    by_eps: list[tuple[float, float, float]]
    by_steps: list[tuple[int, float, float]]


def no_gradient(net: nn.Module, x: Tensor, labels: Tensor) -> Tensor:
    """The images at which the gradient of the cross-entropy is exactly zero -> (N,) bool."""
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        (gradient,) = torch.autograd.grad(cross_entropies(net(x), labels).sum(), x)
    return gradient.flatten(1).abs().amax(1) == 0


def doubts(net: nn.Module, x: Tensor, labels: Tensor, by_gradient: bool) -> list[str]:
    """What leads every attack astray, as some images (n, 3, S, S) show. by_gradient: whether an attack uses it."""
    with torch.no_grad():
        once, again, alone = net(x), net(x), torch.cat([net(image[None]) for image in x[:16]])
    unit, few, flat = once.abs().amax().clamp(min=1e-12), once[: len(alone)], torch.zeros(0)
    random, apart = (again - once).abs().amax() / unit, (alone - few).abs().amax() / unit
    if by_gradient and (right := once.argmax(1) == labels).any():
        flat = no_gradient(net, x[right], labels[right])
    flips, mend = int((alone.argmax(1) != few.argmax(1)).sum()), "where a part of it is in training mode, call eval()"
    summed, zeros = (once.sum(1) - 1).abs().amax(), f"{int(flat.sum())} of {len(flat)} right images"
    found = {
        f"two calls answer differently, which leads attacks astray; {mend}": random > 1e-5,
        f"an image alone is answered otherwise than in a batch ({flips} of {len(few)} by another class), which leads "
        f"attacks astray; {mend}": apart > max(1e-3, 3 * random),
        "answers are probabilities, whose gradients vanish; return logits": once.amin() >= 0 and summed < 1e-3,
        f"gradients are exactly zero at {zeros}; square, noise and transfer need none": flat.any(),
    }
    return [said for said, holds in found.items() if holds]


@dataclass(frozen=True)
class Probe:
    """A network, the images that are right without an attack, and how they are attacked."""

    net: nn.Module
    split: Split
    natural: Tensor  # (N,) bool
    eps: float
    step_size: float
    seed: int
    batch_size: int
    found: Callable[..., None] = lambda *found: None  # is told of rows, images, margins that fool in the ball of eps
    progress: Says = lambda what: None  # is told of each part before it begins

    def each(self, what: str, attack: Work, eps: float, rows: Tensor | None = None) -> Tensor:
        """Which of the right images, or of those at `rows`, an attack makes wrong -> (n,) bool, or what it answers.

        attack: (images, labels, numbers) -> images in the ball of eps and, if it answers more than that, its answers.
        """
        self.progress(what)
        own = self.natural.nonzero().squeeze(1) if rows is None else rows

        def work(x: Tensor, labels: Tensor, numbers: Tensor) -> tuple[Tensor, ...]:
            images, *answers = attack(x, labels, numbers)
            with torch.no_grad():
                logits = self.net(images)
            return images, margins(logits, labels), logits.argmax(1) != labels, *answers

        images, over, wrong, *answers = over_images(self.split, own, self.batch_size, work)
        if rows is None and eps <= self.eps:
            self.found(own[wrong], images[wrong], over[wrong])
        return answers[0] if answers else wrong

    def pgd(self, what: str, view: View, eps: float, steps: int, rows: Tensor | None = None, **how: object) -> Tensor:
        """Which iterates of PGD on a view fool the network -> (n, steps) bool. Steps grow with the ball."""
        how = dict(eps=eps, step_size=self.step_size * eps / self.eps, steps=steps, seed=self.seed) | how
        return self.each(what, lambda *batch: view_pgd(self.net, view, *batch, cross_entropies, **how), eps, rows)

    def accuracy(self, fooled: Tensor) -> float:
        """Robust accuracy on the whole split in percent. fooled: of the right images."""
        return 100 * (len(fooled) - fooled.sum().item()) / len(self.natural)


def diagnose(net: nn.Module, split: Split, natural: Tensor, views: dict[str, View], **how: object) -> Diagnosis:
    """Look for the signs on a split. natural: (N,) bool, the images that are right without an attack. how: the rest of
    `Probe`: eps, step_size, seed, batch_size, found, progress.

    Figures are shares of the whole split. The adaptive curves are the worst case, image by image, over the iterates of
    PGD on every view, one start each: cheaper, and so weaker, than `--attacks adaptive`.
    """
    if not natural.any():
        return Diagnosis([Sign("there is nothing to attack", True, "no image is right without an attack")], [], [])
    probe = Probe(net, split, natural, **how)
    eps = probe.eps
    # robust accuracy against the number of steps, every iterate judged
    fooled = {name: probe.pgd(f"steps, {name}", view, eps, STEPS[-1]) for name, view in views.items()}
    final, so_far = fooled["final"], torch.stack([f.cummax(1).values for f in fooled.values()]).any(0)
    by_steps = [(s, probe.accuracy(final[:, s - 1]), probe.accuracy(so_far[:, s - 1])) for s in STEPS]
    by_eps = [(0.0, percent(natural), percent(natural)), (eps, *by_steps[STEPS.index(40)][1:])]
    for radius in sorted({min(eps * factor, 1.0) for factor in RADII} | {1.0}):
        if radius != eps:
            found = {name: probe.pgd(f"eps {eps_text(radius)}, {name}", way, radius, 40) for name, way in views.items()}
            worst = torch.stack([f.any(1) for f in found.values()]).any(0)
            by_eps.append((radius, probe.accuracy(found["final"][:, -1]), probe.accuracy(worst)))
    by_eps.sort()
    return Diagnosis(_signs(probe, final, by_eps, by_steps), by_eps, by_steps)


def _signs(probe: Probe, final: Tensor, by_eps: list[tuple], by_steps: list[tuple]) -> list[Sign]:
    """The signs in the curves and in other attacks. final: which iterates of PGD fool the right images, (n, steps)."""
    net, eps, seed, pgd = probe.net, probe.eps, probe.seed, final[:, 39]
    restarts = pgd.clone()
    for draw in range(1, RESTARTS):
        restarts |= probe.pgd(f"restart {draw + 1}", plain, eps, 40, draw=draw)[:, -1]
    draws, box = noise(eps, seed), square(eps, seed, QUERIES)
    noisy = probe.each("noise", lambda *batch: (draws(net, *batch),), eps)
    boxed = probe.each("Square", lambda *batch: (box(net, *batch),), eps)
    step = probe.pgd("FGSM", plain, eps, 1, step_size=eps)[:, 0]
    flat = probe.each("gradients", lambda x, labels, _: (x, no_gradient(net, x, labels)), eps)
    wrong, mended = (~probe.natural).nonzero().squeeze(1), 0
    if len(wrong):
        mended = int((~probe.pgd("wrong images", plain, eps, 40, wrong)[:, -1]).sum())
    once, many, fgsm, by_noise, by_box = map(probe.accuracy, (pgd, restarts, step, noisy, boxed))
    best = probe.accuracy(final[:, :40].any(1))  # any iterate counts, as it does for the views
    of_views, pgd200, full = by_steps[STEPS.index(40)][2], by_steps[-1][1], by_eps[-1][1]
    rise = max(0.0, *(after[1] - before[1] for before, after in itertools.pairwise(by_eps)))
    missed = once - probe.accuracy(pgd | boxed)
    of_iterates = f"iterates of PGD-40 on the answer leave {best:.1f} % right, on every view {of_views:.1f} %"
    of_square = f"Square alone leaves {by_box:.1f} % right and fools {missed:.1f} % of all images that PGD-40 does not"
    left, turned = f"PGD-40 leaves {once:.1f} % right", f"PGD-40 turns {mended} of {len(wrong)} wrong images right"
    return [
        Sign("the answer hides what the views show", best - of_views > 2, of_iterates),
        Sign("eps 1 leaves images right", full > 1, f"accuracy at eps 1 is {full:.1f} %"),
        Sign("a larger eps raises accuracy", rise > 1, f"accuracy rises with eps by {rise:.1f} points at most"),
        Sign("more steps still help", once - pgd200 > 1, f"{left}, PGD-{STEPS[-1]} {pgd200:.1f} %"),
        Sign("one step beats many", fgsm < once, f"{left}, FGSM {fgsm:.1f} %"),
        Sign("restarts still help", once - many > 3, f"{left} from one start, {many:.1f} % from {RESTARTS}"),
        Sign("random noise beats PGD", by_noise < once, f"{left}, {NOISE_DRAWS} draws of noise {by_noise:.1f} %"),
        Sign("black-box finds what white-box misses", missed > 1, of_square),
        Sign("gradients vanish", bool(flat.any()), f"gradients are zero at {flat.sum()} of {len(flat)} right images"),
        Sign("attacks mend wrong images", mended > 0.05 * max(len(wrong), 20), turned),
    ]
