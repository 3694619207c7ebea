"""AutoAttack as the literature runs it: the standard version of the official code, pyautoattack."""

import logging
from collections.abc import Callable
from functools import partial

import torch
from pyautoattack import AutoAttack
from pyautoattack.square import SquareAttack
from torch import Tensor, nn

from utils.attacks import Attack

VERSION = 1  # raise it when results change, so that no cached verdict of before is used
BLOCK = 250  # images in a call; the library draws the start noise of all of them at once


class Monitor:
    """Watches an attack of several parts on one block of images; this one only runs the parts.

    Each part draws its noise from its own seed. So a part finds the same images, whether the parts
    before it were run or read from a cache. (The library's own state file cannot do that: it
    forgets the images of earlier parts, and may repeat a finished part on fewer images.)
    """

    def warn(self, line: str) -> None:
        """Take a warning, which the table shows."""

    def progress(self, line: str) -> None:
        """Take a line about what is done at the moment."""

    def run_part(
        self, name: str, attack: Callable[[Tensor, Tensor], Tensor], x: Tensor, labels: Tensor
    ) -> Tensor:
        """Return attack(x, labels), which a subclass may have cached."""
        return attack(x, labels)


class MonitorHandler(logging.Handler):
    """Hands what the library logs to a monitor."""

    def __init__(self, monitor: Monitor) -> None:
        """Take lines of any level."""
        super().__init__()
        self.monitor = monitor

    def emit(self, record: logging.LogRecord) -> None:
        """Shorten a line by the advice that does not apply here, and pass it on."""
        line = record.getMessage().removesuffix(" See flags_doc.md for details.")
        line = line.replace(' Please use version="rand".', "")
        if record.levelno >= logging.WARNING:
            self.monitor.warn(line)
        else:
            self.monitor.progress(line)


def logger_to(monitor: Monitor) -> logging.Logger:
    """Make a logger for the library whose lines reach a monitor."""
    logger = logging.Logger("attack")
    logger.addHandler(MonitorHandler(monitor))
    return logger


def autoattack(eps: float, seed: int, monitor: Monitor | None = None) -> Attack:
    """Make AutoAttack, standard version, L-infinity (Croce & Hein, arXiv 2003.01690).

    Its parts are APGD-CE, targeted APGD-DLR, targeted FAB and Square with 5,000 queries. The
    targeted ones take 9 classes, or all other classes where there are fewer than 10. Below 4
    classes the targeted DLR loss does not exist, and the part is left out. The monitor is warned
    of both.
    """
    monitor = monitor or Monitor()

    def attack(net: nn.Module, x: Tensor, labels: Tensor, numbers: Tensor) -> Tensor:
        library = AutoAttack(
            net, norm="Linf", eps=eps, seed=seed, version="standard", device=x.device
        )

        with torch.no_grad():
            classes = net(x[:1]).shape[1]
        if classes < 10:
            library.apgd_targeted.n_target_classes = classes - 1
            library.fab.n_target_classes = classes - 1
            monitor.warn(f"{classes} classes: APGD-T and FAB-T target {classes - 1} of them, not 9")
        if classes < 4:
            library.attacks_to_run.remove("apgd-t")
            monitor.warn(f"{classes} classes: no targeted DLR loss, APGD-T left out")

        logger = logger_to(monitor)
        library.logger = logger
        library.apgd.logger = logger
        library.apgd_targeted.logger = logger

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


def square(eps: float, seed: int, queries: int = 5000, monitor: Monitor | None = None) -> Attack:
    """Make black-box Square alone (Andriushchenko et al., arXiv 1912.00049), as in AutoAttack."""

    def attack(net: nn.Module, x: Tensor, labels: Tensor, numbers: Tensor) -> Tensor:
        library = SquareAttack(
            net,
            norm="Linf",
            eps=eps,
            seed=seed,
            device=x.device,
            p_init=0.8,
            n_queries=queries,
            n_restarts=1,
            resc_schedule=False,
        )
        with torch.no_grad():
            return library.perturb(x, labels)

    return attack
