"""AutoAttack as the literature runs it: the standard version of the official code, packaged as pyautoattack."""

import logging
import re
from collections.abc import Callable
from functools import partial

import torch
from pyautoattack.square import SquareAttack
from torch import Tensor, nn

from utils.attacks import Attack

VERSION = 1  # raise it when results change, so that kept ones are not reused
Says = Callable[[str], None]  # takes a line
# (name of a part, its attack of images and labels, the images, their labels) -> the part's images, kept or attacked now
Keep = Callable[[str, Callable[[Tensor, Tensor], Tensor], Tensor, Tensor], Tensor]
BLOCK = 250  # images a call, whatever --test-batch-size: the start noise of a block is drawn for all of it at once


class Listener(logging.Handler):
    """Hands the library's warnings to one function and its other lines to another."""

    def __init__(self, warned: Says, says: Says = lambda line: None) -> None:
        super().__init__()
        self.warned, self.says = warned, says

    def emit(self, record: logging.LogRecord) -> None:
        line = record.getMessage().removesuffix(" See flags_doc.md for details.")
        line = line.replace(' Please use version="rand".', "")  # not offered here
        (self.warned if record.levelno >= logging.WARNING else self.says)(line)


def keep_nothing(name: str, attack: Callable[[Tensor, Tensor], Tensor], x: Tensor, labels: Tensor) -> Tensor:
    """A `Keep` that always attacks."""
    return attack(x, labels)


def autoattack(eps: float, seed: int, warned: Says, says: Says, keep: Keep = keep_nothing) -> Attack:
    """AutoAttack, standard version, L-infinity (Croce & Hein, arXiv 2003.01690): an attack for `evaluation.verdicts`.

    Standard is APGD-CE, targeted APGD-DLR, targeted FAB and Square with 5,000 queries. It targets 9 classes; with fewer
    than 10 classes it targets all others, and below 4 its targeted DLR loss does not exist and is left out: `warned`
    is told, as it is of each warning of the library. says: sees the library's progress lines.

    keep: may answer for a part that an earlier process has finished. Each part seeds its own draws, so the parts that
    follow find what they would have found. The library's own state file cannot do that: it may count a finished part as
    not run, which is then repeated on fewer images and with other noise, and it forgets the images of earlier parts.
    """

    def attack(net: nn.Module, x: Tensor, labels: Tensor, numbers: Tensor) -> Tensor:
        from pyautoattack import AutoAttack

        with torch.no_grad():
            classes = net(x[:1]).shape[1]
        library = AutoAttack(net, norm="Linf", eps=eps, seed=seed, version="standard", device=x.device)
        if classes < 10:
            library.apgd_targeted.n_target_classes = library.fab.n_target_classes = classes - 1
            warned(f"{classes} classes: APGD-T and FAB-T target {classes - 1} of them, not 9")
        if classes < 4:
            library.attacks_to_run = [name for name in library.attacks_to_run if name != "apgd-t"]
            warned(f"{classes} classes: no targeted DLR loss, APGD-T left out")
        logger = logging.Logger("AutoAttack")
        logger.addHandler(Listener(warned, says))
        library.logger = library.apgd.logger = library.apgd_targeted.logger = logger
        parts = {
            "APGD-CE": library.apgd,
            "APGD-T": library.apgd_targeted,
            "FAB-T": library.fab,
            "SQUARE": library.square,
        }
        for name, part in parts.items():
            part.perturb = partial(keep, name, part.perturb)
        return library.run_standard_evaluation(x, labels, batch_size=BLOCK)[0]

    return attack


def square(eps: float, seed: int, queries: int = 5000, **_: Says) -> Attack:
    """Black-box Square alone (Andriushchenko et al., arXiv 1912.00049), as in AutoAttack: it needs no gradient."""

    def attack(net: nn.Module, x: Tensor, labels: Tensor, numbers: Tensor) -> Tensor:
        how = dict(p_init=0.8, n_queries=queries, n_restarts=1, resc_schedule=False)
        library = SquareAttack(net, norm="Linf", eps=eps, seed=seed, device=x.device, **how)
        with torch.no_grad():
            return library.perturb(x, labels)

    return attack


def take_part(line: str, images: int, parts: dict[str, tuple[int, float]]) -> None:
    """Add a part of AutoAttack where its progress line says how many of the images stand after it, and its seconds."""
    said = re.fullmatch(r"robust accuracy after (\S+): ([\d.]+)% \(total time ([\d.]+) s\)", line)
    if said:
        seconds = float(said[3]) - sum(seconds for _, seconds in parts.values())
        parts[said[1]] = round(images * float(said[2]) / 100), seconds
