"""What training is combined with: the optimiser, AWP, averaged weights, schedules.

Nothing here knows the method: the schedules take numbers, and the others any network.
"""

import copy
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import nn

from utils.system.settings import Training


def make_optimizer(model: nn.Module, settings: Training) -> torch.optim.Optimizer:
    """Return the optimiser of a network's parameters.

    `sgd` decays every parameter, as published. `adamw` (Loshchilov and Hutter, arXiv 1711.05101)
    has betas of 0.9 and 0.999. It does not decay parameters of at most one dimension, such as
    biases and BatchNorm's, nor those with `pos` in their names, which embed positions.
    """
    decay = settings.weight_decay
    if settings.optimizer == "sgd":
        return torch.optim.SGD(
            model.parameters(), settings.lr, settings.momentum, weight_decay=decay
        )
    decayed = []
    exempt = []
    for name, parameter in model.named_parameters():
        group = exempt if parameter.ndim <= 1 or "pos" in name else decayed
        group.append(parameter)
    groups = [{"params": decayed, "weight_decay": decay}, {"params": exempt, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, settings.lr)


@contextmanager
def adversarial_weights(
    model: nn.Module, gradients: Callable[[], object], gamma: float
) -> Iterator[None]:
    """Perturb the weights adversarially for the body: gradients and the optimiser's step.

    Each tensor w of more than one dimension, with gradient v, is moved by
    gamma * ||w|| / (||v|| + 1e-20) * v, and moved back by as much after the body. BatchNorm's
    statistics are those of the body's forwards alone. (Wu et al., arXiv 2004.05884.)

    gradients: leaves the gradients of the training loss in the parameters, the same on each rank.
    """
    buffers = list(model.buffers())
    before = [buffer.clone() for buffer in buffers]
    gradients()
    with torch.no_grad():
        for buffer, value in zip(buffers, before, strict=True):
            buffer.copy_(value)
        weights = [p for p in model.parameters() if p.ndim > 1 and p.grad is not None]
        moves = [gamma * w.norm() / (w.grad.norm() + 1e-20) * w.grad for w in weights]
        model.zero_grad()
        torch._foreach_add_(weights, moves)
    try:
        yield
    finally:
        with torch.no_grad():
            torch._foreach_sub_(weights, moves)


class Average:
    """A copy of a network whose parameters are their exponential moving average over steps.

    The decay of step t, from 0, is min(tau, (1 + t) / (10 + t)), so that early steps do not
    remember the start. BatchNorm's statistics are not averaged: both share these buffers, which are
    to be changed in place. (Izmailov et al., arXiv 1803.05407; constants as in the releases of
    Rade and Wang.)
    """

    def __init__(self, model: nn.Module) -> None:
        """Start from a network's present weights."""
        shared = {id(buffer): buffer for buffer in model.buffers()}
        self.model = copy.deepcopy(model, shared).requires_grad_(False)
        self.steps = 0

    @torch.no_grad()
    def update(self, model: nn.Module, tau: float) -> None:
        """Average over one more step."""
        decay = min(tau, (1 + self.steps) / (10 + self.steps))
        torch._foreach_lerp_(list(self.model.parameters()), list(model.parameters()), 1 - decay)
        self.steps += 1


def learning_rate(settings: Training, done: float) -> float:
    """Return the learning rate of a step after `done` epochs, a fraction within an epoch.

    --lr-schedule: `milestones` divides by 10 at the start of each of these epochs, counted from 1.
    `piecewise` divides by 10 from half of the epochs on, and by 100 from three quarters on (Rice
    et al., arXiv 2002.11569). `cosine` is lr / 2 (1 + cos(pi t)). `cyclic` is linear, from 0 to lr
    over the first quarter and then back to 0. --warmup-lr: epochs of a linear rise from 0 before,
    after which t of `cosine` and `cyclic` begins.
    """
    warmup = settings.warmup_lr
    if done < warmup:
        return settings.lr * done / warmup
    t = (done - warmup) / max(settings.epochs - warmup, 1)
    factors = {
        "milestones": 0.1 ** sum(math.floor(done) + 1 >= epoch for epoch in settings.milestones),
        "piecewise": 0.1 ** sum(done >= part * settings.epochs for part in (0.5, 0.75)),
        "cosine": (1 + math.cos(math.pi * t)) / 2,
        "cyclic": min(4 * t, 4 / 3 * (1 - t)),
    }
    return settings.lr * factors[settings.lr_schedule]
