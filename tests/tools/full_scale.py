"""What the paper's rows cost to train: commands, operations, and estimated hours on a card.

python -m tests.tools.full_scale                 ANCRA's rows of README's last table, and the
                                                 operations of other gates
python -m tests.tools.full_scale --gate none     the same with other flags of the method

Operations are those of convolutions and matrix products, a multiplication and an addition each, by
PyTorch's formulas: both attacks, training forwards and backwards, and the natural and PGD-40
accuracy of each epoch, as if every test image were right without an attack (others are not
attacked). No card is needed.

Hours and epochs an hour are ESTIMATES, of training and of the evaluation after each epoch:
operations by the share of a card's bfloat16 rate that they were measured to use on one H200
(`tests.tools.card`: 717 TFLOP/s; an H100 computes as fast). The share of an evaluation is that of
PGD-40 at a batch of 1,000. With --precision bf16 it searches in bfloat16, not compiled, which was
never timed on a card: it is taken to use the share of such a step. The shares of WRN-28-10 are
taken to be those of WRN-34-10, and those of PreActResNet-18 those of ResNet-18. Eight cards need
an eighth of that at best, a bound that is out of reach with 16 images a card. Nobody has run these
rows here.
"""

import argparse
import math
import runpy
import shlex
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from models import build_model
from utils.losses import over_heads
from utils.step import away_from_labels
from utils.system.options import parse_training
from utils.system.settings import Training, dataset_defaults

ROOT = Path(__file__).parents[2]
RATE = 717e12  # bfloat16 products, operations a second
SHARES = {
    "no flag": {"ResNet18": 0.16, "WRN": 0.26},
    "--precision bf16 --compile": {"ResNet18": 0.28, "WRN": 0.56},
}
EVALUATION_SHARES = {
    "no flag": {"ResNet18": 0.18, "WRN": 0.21},
    "--precision bf16 --compile": {"ResNet18": 0.21, "WRN": 0.47},
}
# By data set: training images, test images and classes
DATASETS = {
    "cifar10": (50_000, 10_000, 10),
    "cifar100": (50_000, 10_000, 100),
    "tiny-imagenet": (100_000, 10_000, 200),
    "fashion-mnist": (60_000, 10_000, 10),
}
UNCOUNTED = (
    "limit_train",
    "limit_test",
    "val_size",
    "extra_data",
    "image_size",
    "restart_epoch",
    "resume",
)
UNCOUNTED += ("compile", "precision")
RESNET = "train_CIFAR10_ResNet.py"
WRN = "train_CIFAR10_WideResNet.py"
PREACT = "train_Tiny_ImageNet_PreActResNet.py"
ROWS = [
    *([RESNET, "--method", method] for method in ("pgd", "trades", "mart")),
    *(
        [RESNET, "--dataset", "cifar100", "--method", method]
        for method in ("pgd", "trades", "mart")
    ),
    [WRN, "--method", "trades"],
    [WRN, "--arch", "WRN-28-10", "--method", "trades"],
    *([PREACT, "--method", method] for method in ("pgd", "trades", "mart")),
]


def settings_of(script: str, *flags: str) -> Training:
    """The settings of a training command: the script's own recipe and its flags."""
    recipe = runpy.run_path(str(ROOT / script))["RECIPE"]
    return parse_training("", recipe, list(flags)).settings


class Passes(NamedTuple):
    """Operations an image: of a forward pass, with the image's gradient, and in training."""

    look: float
    attack: float
    train: float


class Counter(TorchDispatchMode):
    """Adds up operations; PyTorch's own FlopCounterMode cannot follow gradients of an input."""

    total = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        """Count an operation by PyTorch's formula for it, and do it."""
        out = func(*args, **(kwargs or {}))
        if (formula := flop_registry.get(func._overloadpacket)) is not None:
            self.total += formula(*args, **(kwargs or {}), out_val=out)
        return out


def counted(work: Callable[[], object]) -> int:
    """Count the operations of what `work` does."""
    with Counter() as counter:
        work()
    return counter.total


def passes(settings: Training, classes: int) -> Passes:
    """Count what one image costs a network, on the meta device, where nothing is computed."""
    side = settings.image_size
    count = 2
    with torch.device("meta"):
        net = build_model(
            settings.arch,
            classes,
            reverse_attention=not settings.no_ra,
            width=settings.width,
            image_size=side,
            gate=settings.gate,
            classifier=settings.classifier,
            ra_blocks=settings.ra_blocks,
        )
        x = torch.rand(count, 3, side, side)
        labels = torch.zeros(count, dtype=torch.long)

    def train() -> None:
        heads = net.train()(x, labels, heads=True)
        over_heads(torch.Tensor.sum, heads, auxiliary_weight=settings.cr_beta).backward()

    def attack() -> None:
        heads = net(x.requires_grad_(), heads=True)
        torch.autograd.grad(away_from_labels(heads, labels, settings.cr_beta), x)

    trained = counted(train)
    net.eval().requires_grad_(False)
    looked = counted(lambda: net(x))
    attacked = counted(attack)
    return Passes(looked / count, attacked / count, trained / count)


def step_of(settings: Training, costs: Passes, epoch: int) -> float:
    """Return the operations of a training image in an epoch, from 1: attacks and training."""
    strategy, _, pushed = settings.strategy.partition("_")
    negatives = 0
    if not settings.no_anc:
        negatives = settings.sample_class_number * settings.sample_number

    attacked = 1 + negatives if pushed else 1
    attacks = settings.num_steps * costs.attack * attacked
    by_logits = negatives and epoch > settings.warmup_epochs and strategy != "random"
    if settings.inner == "kl" or by_logits:
        attacks += costs.look

    forwards = costs.train * (1 + negatives)  # adversarial, negative
    if settings.method != "pgd" or negatives:
        forwards += costs.train  # natural
    if settings.awp and epoch > settings.awp_warmup:
        forwards *= 2
    return attacks + forwards


def run_of(settings: Training) -> tuple[float, float]:
    """Return the operations of a whole run: of its training, and of its evaluations."""
    images, tests, classes = DATASETS[settings.dataset]
    costs = passes(settings, classes)
    epochs = range(1, settings.epochs + 1)
    training = images * sum(step_of(settings, costs, epoch) for epoch in epochs)
    evaluations = math.ceil(settings.epochs / settings.eval_interval)
    # Images are classified before and after the attack.
    return training, evaluations * tests * (2 * costs.look + 40 * costs.attack)


def hours_of(operations: float, share: float) -> float:
    """Return the hours of a card that computes at a share of its bfloat16 rate."""
    return operations / (share * RATE) / 3600


def main(argv: list[str]) -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.tools.full_scale",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    _, flags = parser.parse_known_args(argv)
    gates = () if "--gate" in flags else ("soft", "none")
    heads = ["command", "EFLOP", "of these evaluation", *(f"EFLOP, gate {gate}" for gate in gates)]
    rows = [(row, settings_of(*row, *flags)) for row in ROWS]
    for _, settings in rows:
        defaults = dataset_defaults(settings.dataset)
        changed = [name for name in UNCOUNTED if getattr(settings, name) != getattr(defaults, name)]
        if settings.dataset not in DATASETS:
            changed = [settings.dataset]
        if changed:
            parser.error(f"nothing is counted here for {', '.join(changed)}; leave it out")
    for_cards = "hours with evaluation, 1 and 8 cards; epochs an hour"
    heads += [f"{for_cards}, {step_flags}" for step_flags in SHARES]
    print(f"| {' | '.join(heads)} |")
    print("|" + "".join("---|" for _ in heads))

    for row, settings in rows:
        training, evaluation = run_of(settings)
        cells = [
            f"`python {shlex.join([*row, *flags])}`",
            f"{1e-18 * (training + evaluation):.2f}",
            f"{1e-18 * evaluation:.2f}",
        ]
        for gate in gates:
            operations = sum(run_of(replace(settings, gate=gate)))
            cells.append(f"{1e-18 * operations:.2f}")
        network = "WRN" if settings.arch.startswith("WRN") else "ResNet18"
        for step_flags, shares in SHARES.items():
            hours = hours_of(training, shares[network])
            hours += hours_of(evaluation, EVALUATION_SHARES[step_flags][network])
            cells.append(f"{hours:.1f}, {hours / 8:.2f}; {settings.epochs / hours:.1f}")
        print(f"| {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
