"""What the paper's rows cost to train: for each the command, its operations, and estimated hours on a card.

python -m tests.tools.full_scale                 ANCRA's rows of README's last table, and the operations of other gates
python -m tests.tools.full_scale --gate none     the same with other flags of the method

Operations are those of convolutions and matrix products, a multiplication and an addition each, by PyTorch's formulas:
both attacks, training forwards and backwards, and each epoch's natural and PGD-40 accuracy, as if every test image were
right without an attack (others are not attacked). No card is needed.

Hours and epochs an hour are ESTIMATES, of training and of the evaluation after each epoch: operations by the share of a
card's bfloat16 rate that they were measured to use on one H200 (`tests.tools.card`: 717 TFLOP/s; an H100 computes as fast).
The share of an evaluation is that of PGD-40 at a batch of 1,000. With --precision bf16 it searches in bfloat16, not
compiled, which was never timed on a card: it is taken to use the share of such a step. WRN-28-10's shares are taken to
be WRN-34-10's, PreActResNet-18's to be ResNet-18's. Eight cards: an eighth of that, a bound that nothing of 16 images a
card attains. Nobody has run these rows here.
"""

import argparse
import runpy
import shlex
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from models import Heads, build_model
from utils.losses import over_heads
from utils.step import away_from_labels
from utils.system.options import parse_training
from utils.system.settings import CLASSES, Training, dataset_defaults

ROOT = Path(__file__).parents[2]
RATE = 717e12  # bfloat16 products, operations a second
SHARES = {"no flag": {"ResNet18": 0.16, "WRN": 0.26}, "--precision bf16 --compile": {"ResNet18": 0.28, "WRN": 0.56}}
EVALUATION_SHARES = {
    "no flag": {"ResNet18": 0.18, "WRN": 0.21},
    "--precision bf16 --compile": {"ResNet18": 0.21, "WRN": 0.47},
}
IMAGES = {"cifar10": (50_000, 10_000), "cifar100": (50_000, 10_000), "tiny-imagenet": (100_000, 10_000)}
UNCOUNTED = ("limit_train", "limit_test", "val_size", "extra_data", "image_size", "restart_epoch", "resume")
UNCOUNTED += ("compile", "precision")
RESNET, WRN = "train_CIFAR10_ResNet.py", "train_CIFAR10_WideResNet.py"
PREACT = "train_Tiny_ImageNet_PreActResNet.py"
ROWS = [
    *([RESNET, "--method", method] for method in ("pgd", "trades", "mart")),
    *([RESNET, "--dataset", "cifar100", "--method", method] for method in ("pgd", "trades", "mart")),
    [WRN, "--method", "trades"],
    [WRN, "--arch", "WRN-28-10", "--method", "trades"],
    *([PREACT, "--method", method] for method in ("pgd", "trades", "mart")),
]


def settings_of(script: str, *flags: str) -> Training:
    """The settings of a training command: the script's own recipe and its flags."""
    recipe = runpy.run_path(str(ROOT / script))["RECIPE"]
    return parse_training("", recipe, list(flags)).settings


class Passes(NamedTuple):
    """Operations an image: a forward; one with the gradient of the image; a training forward and backward."""

    look: float
    attack: float
    train: float


class Counter(TorchDispatchMode):
    """Adds up operations by PyTorch's formulas; its own FlopCounterMode cannot follow gradients of an input."""

    total = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if (formula := flop_registry.get(func._overloadpacket)) is not None:
            self.total += formula(*args, **(kwargs or {}), out_val=out)
        return out


def counted(work: Callable[[], object]) -> int:
    """Operations of what `work` does."""
    with Counter() as counter:
        work()
    return counter.total


def passes(settings: Training, classes: int) -> Passes:
    """What one image costs a network, counted on the meta device, where nothing is computed."""
    side, count = settings.image_size, 2
    with torch.device("meta"):
        how = {"reverse_attention": not settings.no_ra, "gate": settings.gate, "ra_blocks": settings.ra_blocks}
        net = build_model(settings.arch, classes, width=settings.width, image_size=side, **how)
        x, labels = torch.rand(count, 3, side, side), torch.zeros(count, dtype=torch.long)

    def gradient(x: Tensor) -> Tensor:
        return torch.autograd.grad(away_from_labels(net(x, heads=True), labels, settings.cr_beta), x)[0]

    def backward(heads: Heads) -> None:
        over_heads(torch.Tensor.sum, heads, auxiliary_weight=settings.cr_beta).backward()

    train = counted(lambda: backward(net.train()(x, labels, heads=True)))
    net.eval().requires_grad_(False)
    look, attack = counted(lambda: net(x)), counted(lambda: gradient(x.requires_grad_()))
    return Passes(look / count, attack / count, train / count)


def step_of(settings: Training, of: Passes, epoch: int) -> float:
    """Operations a training image in an epoch, from 1: attacks, training forwards and backwards."""
    strategy, _, pushed = settings.strategy.partition("_")
    negatives = 0 if settings.no_anc else settings.sample_class_number * settings.sample_number
    attacks = settings.num_steps * of.attack * (1 + negatives * bool(pushed))
    if settings.inner == "kl" or (negatives and epoch > settings.warmup_epochs and strategy != "random"):
        attacks += of.look
    forwards = of.train * (1 + negatives)  # adversarial, negative
    if settings.method != "pgd" or negatives:
        forwards += of.train  # natural
    return attacks + forwards * (2 if settings.awp and epoch > settings.awp_warmup else 1)


def run_of(settings: Training) -> tuple[float, float]:
    """Operations of a whole run: training, and its evaluations."""
    of, (images, tests) = passes(settings, CLASSES[settings.dataset]), IMAGES[settings.dataset]
    training = images * sum(step_of(settings, of, epoch) for epoch in range(1, settings.epochs + 1))
    evaluations = -(-settings.epochs // settings.eval_interval)
    return training, evaluations * tests * (2 * of.look + 40 * of.attack)  # looked at before and behind the attack


def hours_of(operations: float, share: float) -> float:
    """Hours of a card that computes at a share of its bfloat16 rate."""
    return operations / (share * RATE) / 3600


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m tests.tools.full_scale", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    _, flags = parser.parse_known_args(argv)
    gates = () if "--gate" in flags else ("soft", "none")
    heads = ["command", "EFLOP", "of these evaluation", *(f"EFLOP, gate {gate}" for gate in gates)]
    rows = [(row, settings_of(*row, *flags)) for row in ROWS]
    for _, settings in rows:
        own = dataset_defaults(settings.dataset)
        changed = [name for name in UNCOUNTED if getattr(settings, name) != getattr(own, name)]
        if changed or settings.dataset not in IMAGES:
            parser.error(f"nothing is counted here for {', '.join(changed) or settings.dataset}; leave it out")
    for flags_of_step in SHARES:
        heads.append(f"hours with evaluation, 1 and 8 cards; epochs an hour, {flags_of_step}")
    print(f"| {' | '.join(heads)} |")
    print("|" + "---|" * len(heads))
    for row, settings in rows:
        training, evaluation = run_of(settings)
        cells = [f"`python {shlex.join([*row, *flags])}`"]
        cells += [f"{1e-18 * operations:.2f}" for operations in (training + evaluation, evaluation)]
        cells += [f"{1e-18 * sum(run_of(replace(settings, gate=gate))):.2f}" for gate in gates]
        network = "WRN" if settings.arch.startswith("WRN") else "ResNet18"
        for flags_of_step, shares in SHARES.items():
            hours = hours_of(training, shares[network])
            hours += hours_of(evaluation, EVALUATION_SHARES[flags_of_step][network])
            cells.append(f"{hours:.1f}, {hours / 8:.2f}; {settings.epochs / hours:.1f}")
        print(f"| {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
