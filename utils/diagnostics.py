"""Signs of gradient masking, each with its figure (arXiv 1802.00420, Athalye et al.; 1902.06705, Carlini et al.)."""

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from pyautoattack.square import SquareAttack
from torch import Tensor, nn

from utils.adaptive import View, cross_entropies, plain, view_pgd
from utils.attacks import NOISE_DRAWS, noise
from utils.autoattack import Says
from utils.data import Split
from utils.evaluation import over_images, percent
from utils.options import eps_text

RADII = (0.25, 0.5, 0.75, 1.0, 1.5, 2.0, 3.0, 5.0)  # in units of the evaluation's eps; 0 and the whole range are added
STEPS = (1, 2, 5, 10, 20, 40, 100, 200)
RESTARTS = 10
QUERIES = 5000


class Sign(NamedTuple):
    """One sign. raised: whether it speaks of masking. figure: what was measured, in words."""

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


def square(net: nn.Module, x: Tensor, labels: Tensor, eps: float, seed: int) -> Tensor:
    """Which images black-box Square (Andriushchenko et al., arXiv 1912.00049) turns wrong -> (N,) bool."""
    library = SquareAttack(
        net, p_init=0.8, n_queries=QUERIES, eps=eps, norm="Linf", n_restarts=1, seed=seed, device=x.device,
        resc_schedule=False,
    )  # fmt: skip
    with torch.no_grad():
        return net(library.perturb(x, labels)).argmax(1) != labels


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
    progress: Says = lambda what: None  # is told of each part before it begins

    def each(self, what: str, work: Callable[..., Tensor], rows: Tensor | None = None) -> Tensor:
        """What work(images, labels, numbers) answers for the right images, or for those at `rows`."""
        self.progress(what)
        rows = self.natural.nonzero().squeeze(1) if rows is None else rows
        return over_images(self.split, rows, self.batch_size, lambda *batch: (work(*batch),))[0]

    def pgd(self, what: str, view: View, eps: float, steps: int, rows: Tensor | None = None, **how: object) -> Tensor:
        """Which iterates of PGD on a view fool the network -> (n, steps) bool. Steps grow with the ball."""
        how = dict(eps=eps, step_size=self.step_size * eps / self.eps, steps=steps, seed=self.seed) | how
        return self.each(what, lambda *batch: view_pgd(self.net, view, *batch, cross_entropies, **how)[1], rows)

    def accuracy(self, fooled: Tensor) -> float:
        """Robust accuracy on the whole split in percent. fooled: of the right images."""
        return 100 * (len(fooled) - fooled.sum().item()) / len(self.natural)


def diagnose(net: nn.Module, split: Split, natural: Tensor, views: dict[str, View], **how: object) -> Diagnosis:
    """Look for the signs on a split. natural: (N,) bool, the images that are right without an attack. how: the rest of
    `Probe`: eps, step_size, seed, batch_size, progress.

    Figures are shares of the whole split. The adaptive curves are the worst case, image by image, over the iterates of
    PGD on every view, one start each: cheaper, and so weaker, than `--attacks adaptive`.
    """
    if not natural.any():
        return Diagnosis([Sign("nothing to attack", False, "no image is right without an attack")], [], [])
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
    draws = noise(eps, seed)
    noisy = probe.each("noise", lambda x, labels, numbers: net(draws(net, x, labels, numbers)).argmax(1) != labels)
    box = probe.each("Square", lambda x, labels, _: square(net, x, labels, eps, seed))
    step = probe.pgd("FGSM", plain, eps, 1, step_size=eps)[:, 0]
    flat = probe.each("gradients", lambda x, labels, _: no_gradient(net, x, labels))
    wrong, mended = (~probe.natural).nonzero().squeeze(1), 0
    if len(wrong):
        mended = int((~probe.pgd("wrong images", plain, eps, 40, wrong)[:, -1]).sum())
    once, many, fgsm, by_noise, by_box = map(probe.accuracy, (pgd, restarts, step, noisy, box))
    best = probe.accuracy(final[:, :40].any(1))  # any iterate counts, as it does for the views
    of_views, pgd200, full = by_steps[STEPS.index(40)][2], by_steps[-1][1], by_eps[-1][1]
    rise = max(after[1] - before[1] for before, after in itertools.pairwise(by_eps))
    missed = once - probe.accuracy(pgd | box)
    return [
        Sign(
            "the final logits hide what the views show",
            best - of_views > 2,
            f"iterates of PGD-40 on the final logits leave {best:.1f} %, on every view {of_views:.1f} %",
        ),
        Sign("eps 1 leaves images right", full > 1, f"PGD-40 at eps 1: {full:.1f} %"),
        Sign("a larger eps raises accuracy", rise > 1, f"largest rise along the curve: {max(rise, 0):.1f} points"),
        Sign("more steps still help", once - pgd200 > 1, f"PGD-40 {once:.1f} %, PGD-200 {pgd200:.1f} %"),
        Sign("one step beats many", fgsm < once, f"FGSM {fgsm:.1f} %, PGD-40 {once:.1f} %"),
        Sign("restarts still help", once - many > 3, f"PGD-40 once {once:.1f} %, {RESTARTS} starts {many:.1f} %"),
        Sign(
            "random noise beats PGD",
            by_noise < once,
            f"noise, {NOISE_DRAWS} draws, {by_noise:.1f} %, PGD-40 {once:.1f} %",
        ),
        Sign(
            "black-box finds what white-box misses",
            missed > 1,
            f"Square alone {by_box:.1f} %; it fools {missed:.1f} % of images that PGD-40 leaves right",
        ),
        Sign(
            "gradients vanish", bool(flat.any()), f"exactly zero at {flat.sum()} of {len(flat)} images that are right"
        ),
        Sign(
            "attacks mend wrong images",
            mended > 0.05 * max(len(wrong), 20),
            f"PGD-40 turns {mended} of {len(wrong)} wrong images right",
        ),
    ]
