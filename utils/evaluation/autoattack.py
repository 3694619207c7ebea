"""AutoAttack as the literature runs it: the standard version of the official code, pyautoattack."""

from functools import partial

import torch
from pyautoattack import AutoAttack

from utils.attacks import Attack
from utils.evaluation.cache import Monitor

VERSION = 1  # raise it when results change, so that no cached verdict of before is used
BLOCK = 250  # images in a call; the library draws the start noise of all of them at once


def autoattack(eps: float, seed: int, monitor: Monitor, norm: str = "Linf") -> Attack:
    """Make AutoAttack, standard version (Croce & Hein, arXiv 2003.01690), for `Linf` or `L2`.

    Its parts are APGD-CE, targeted APGD-DLR, targeted FAB and Square with 5,000 queries. The
    targeted ones take 9 classes, or all other classes where there are fewer than 10. Below 4
    classes the targeted DLR loss does not exist, and the part is left out. The monitor is warned
    of both.
    """

    def attack(net, x, labels, numbers):
        library = AutoAttack(net, norm=norm, eps=eps, seed=seed, device=x.device)
        for part in (library, library.apgd, library.apgd_targeted):
            part.logger = monitor.logger

        with torch.no_grad():
            others = net(x[:1]).shape[1] - 1  # classes
        if others < 9:
            library.apgd_targeted.n_target_classes = others
            library.fab.n_target_classes = others
            monitor.warnings.append(f"APGD-T and FAB-T target {others} classes; there are no more")
        if others < 3:
            library.attacks_to_run.remove("apgd-t")
            monitor.warnings.append("APGD-T left out, whose targeted DLR loss takes 4 classes")

        parts = {
            "APGD-CE": library.apgd,
            "APGD-T": library.apgd_targeted,
            "FAB-T": library.fab,
            "SQUARE": library.square,
        }
        for name, part in parts.items():
            part.perturb = partial(monitor.run_part, name, part.perturb)
        return library.run_standard_evaluation(x, labels, batch_size=BLOCK)[0]

    return attack


def square(eps: float, seed: int, queries: int = 5000, norm: str = "Linf") -> Attack:
    """Make AutoAttack's black-box Square alone (Andriushchenko et al., arXiv 1912.00049)."""

    def attack(net, x, labels, numbers):
        part = AutoAttack(net, norm=norm, eps=eps, seed=seed, device=x.device).square
        part.n_queries = queries
        with torch.no_grad():
            return part.perturb(x, labels)

    return attack
