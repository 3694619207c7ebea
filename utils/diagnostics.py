"""Signs of gradient masking, each with its figure (arXiv 1802.00420, Athalye et al.; 1902.06705, Carlini et al.)."""

import itertools
from collections.abc import Callable
from typing import NamedTuple

import torch
from pyautoattack.square import SquareAttack
from torch import Tensor, nn

from utils import distributed
from utils.adaptive import View, Watched, cross_entropies, plain
from utils.attacks import image_noise, linf_pgd
from utils.data import Split, as_input, batches, numbers_of
from utils.evaluation import NOISE_DRAWS, noise, percent

RADII = (0.25, 0.5, 0.75, 1.0, 1.5, 2.0, 3.0, 5.0)  # in units of the evaluation's eps; 0 and the whole range are added
STEPS = (1, 2, 5, 10, 20, 40, 100, 200)
RESTARTS = 10
QUERIES = 5000


def diagnostic_passes(views: int) -> tuple[int, int]:
    """Gradient and forward passes an image that `diagnose` makes at most."""
    return views * (STEPS[-1] + 40 * len(RADII)) + 40 * RESTARTS, QUERIES + NOISE_DRAWS


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


def trajectory(
    net: nn.Module,
    view: View,
    x: Tensor,
    labels: Tensor,
    indices: Tensor,
    *,
    eps: float,
    step_size: float,
    steps: int,
    seed: int,
    draw: int = 0,
) -> Tensor:
    """Which iterates of PGD on a view, from a uniform start, fool the network -> (N, steps) bool."""
    watched = Watched(net, view)
    fooled: list[Tensor] = []

    def objective(iterate: Tensor) -> Tensor:
        fooled.append(watched(iterate).argmax(1) != labels)
        return watched.loss(lambda logits: cross_entropies(logits, labels)).sum()

    start = x + eps * image_noise(x, indices, seed, "uniform", draw)
    last = linf_pgd(x, objective, eps, step_size, steps, start)
    with torch.no_grad():
        fooled.append(net(last).argmax(1) != labels)
    return torch.stack(fooled[1:], 1)  # without the start


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


def diagnose(
    net: nn.Module,
    split: Split,
    natural: Tensor,
    views: dict[str, View],
    *,
    eps: float,
    step_size: float,
    seed: int,
    batch_size: int,
    progress: Callable[[str], None] = lambda what: None,
) -> Diagnosis:
    """Look for the signs on a split. natural: (N,) bool, the images that are right without an attack.

    Figures are shares of the whole split. Steps grow with the ball. The adaptive curves are the worst case, image by
    image, over the iterates of PGD on every view, one start each: cheaper, and so weaker, than `--attacks adaptive`.
    progress(what) is called before each part.
    """
    right, total = natural.nonzero().squeeze(1), len(natural)

    def each(what: str, chosen: Tensor, attack: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Tensor:
        """What attack(images, labels, numbers) answers, batch by batch, for the chosen images."""
        progress(what)
        shared = len(chosen) >= distributed.world()  # each rank takes its slice; of fewer images, each takes all
        answers, numbers = [], numbers_of(split)
        for indices in batches(chosen[distributed.own_slice(len(chosen))] if shared else chosen, batch_size):
            batch = split.take(indices.to(split.labels.device))
            answers.append(attack(as_input(batch.images), batch.labels, numbers[indices]).cpu())
        whole = torch.cat(answers)
        return distributed.joined(whole.byte(), len(chosen)).bool() if shared else whole

    def pgd(what: str, view: View, radius: float, steps: int, draw: int = 0, chosen: Tensor = right) -> Tensor:
        settings = dict(eps=radius, step_size=step_size * radius / eps, steps=steps, seed=seed, draw=draw)
        return each(what, chosen, lambda x, y, indices: trajectory(net, view, x, y, indices, **settings))

    def accuracy(fooled: Tensor) -> float:
        return 100 * (len(right) - fooled.sum().item()) / total

    whole_step = dict(eps=eps, step_size=eps, seed=seed)
    if not len(right):
        return Diagnosis([Sign("nothing to attack", False, "no image is right without an attack")], [], [])

    # robust accuracy against the number of steps, every iterate judged
    fooled = {name: pgd(f"steps, {name}", view, eps, STEPS[-1]) for name, view in views.items()}
    so_far = torch.stack([f.cummax(1).values for f in fooled.values()]).any(0)
    by_steps = [(s, accuracy(fooled["final"][:, s - 1]), accuracy(so_far[:, s - 1])) for s in STEPS]
    pgd40, adaptive40 = by_steps[STEPS.index(40)][1:]
    final40 = accuracy(fooled["final"][:, :40].any(1))  # any iterate counts, as it does for the views

    # robust accuracy against eps
    by_eps = [(0.0, percent(natural), percent(natural)), (eps, pgd40, adaptive40)]
    for radius in sorted({min(eps * factor, 1.0) for factor in RADII} | {1.0}):
        if radius != eps:
            found = [pgd(f"eps {radius:.3g}, {name}", view, radius, 40) for name, view in views.items()]
            final = list(views).index("final")
            worst = torch.stack([f.any(1) for f in found]).any(0)
            by_eps.append((radius, accuracy(found[final][:, -1]), accuracy(worst)))
    by_eps.sort()

    restarts = fooled["final"][:, 39].clone()
    for draw in range(1, RESTARTS):
        restarts |= pgd(f"restart {draw + 1}", plain, eps, 40, draw)[:, -1]
    random = each("noise", right, lambda x, y, indices: net(noise(eps, seed)(net, x, y, indices)).argmax(1) != y)
    box = each("Square", right, lambda x, y, indices: square(net, x, y, eps, seed))
    large = each("FGSM", right, lambda x, y, indices: trajectory(net, plain, x, y, indices, steps=1, **whole_step))
    one_step = accuracy(large[:, 0])
    flat = each("gradients", right, lambda x, y, indices: no_gradient(net, x, y))
    wrong = (~natural).nonzero().squeeze(1)
    mended = 0
    if len(wrong):
        mended = int((~pgd("wrong images", plain, eps, 40, 0, wrong)[:, -1]).sum())

    curve = [row[1] for row in by_eps]
    rise = max(after - before for before, after in itertools.pairwise(curve))
    box_only = accuracy(fooled["final"][:, 39]) - accuracy(fooled["final"][:, 39] | box)
    signs = [
        Sign(
            "the final logits hide what the views show",
            final40 - adaptive40 > 2,
            f"iterates of PGD-40 on the final logits leave {final40:.1f} %, on every view {adaptive40:.1f} %",
        ),
        Sign("eps 1 leaves images right", curve[-1] > 1, f"PGD-40 at eps 1: {curve[-1]:.1f} %"),
        Sign("a larger eps raises accuracy", rise > 1, f"largest rise along the curve: {max(rise, 0):.1f} points"),
        Sign(
            "more steps still help",
            pgd40 - by_steps[-1][1] > 1,
            f"PGD-40 {pgd40:.1f} %, PGD-200 {by_steps[-1][1]:.1f} %",
        ),
        Sign("one step beats many", one_step < pgd40, f"FGSM {one_step:.1f} %, PGD-40 {pgd40:.1f} %"),
        Sign(
            "restarts still help",
            pgd40 - accuracy(restarts) > 3,
            f"PGD-40 once {pgd40:.1f} %, {RESTARTS} starts {accuracy(restarts):.1f} %",
        ),
        Sign(
            "random noise beats PGD",
            accuracy(random) < pgd40,
            f"noise, {NOISE_DRAWS} draws, {accuracy(random):.1f} %, PGD-40 {pgd40:.1f} %",
        ),
        Sign(
            "black-box finds what white-box misses",
            box_only > 1,
            f"Square alone {accuracy(box):.1f} %; it fools {box_only:.1f} % of images that PGD-40 leaves right",
        ),
        Sign(
            "gradients vanish",
            bool(flat.any()),
            f"exactly zero at {int(flat.sum())} of {len(flat)} images that are right",
        ),
        Sign(
            "attacks mend wrong images",
            mended > 0.05 * max(len(wrong), 20),
            f"PGD-40 turns {mended} of {len(wrong)} wrong images right",
        ),
    ]
    return Diagnosis(signs, by_eps, by_steps)
