"""Trains ANCRA on CIFAR-10 with a WideResNet-34-10, or by --arch WRN-28-10 with that one.

    python train_CIFAR10_WideResNet.py                    as published
    python train_CIFAR10_WideResNet.py --dataset digits   small real data, no download
    python train_CIFAR10_WideResNet.py --method mart      another objective: pgd, trades, mart
    python train_CIFAR10_WideResNet.py --resume           continue where the run stopped

Writes checkpoints, a log, metrics.csv and curves into a folder whose name begins with --model-dir.
"""

import sys

from utils.system.command import guarded
from utils.system.options import parse_training

RECIPE = {
    "arch": "WRN-34-10",
    "dataset": "cifar10",
    "lr": 0.01,
    "weight_decay": 2e-4,
    "model_dir": "./model/ANCRA-WideResNet34-TRADES",
}


def main() -> None:
    """Train as the command line says."""
    command = parse_training(__doc__, RECIPE, sys.argv[1:])

    from utils.training.loop import run  # loads PyTorch; --help does not

    guarded(lambda: run(command))


if __name__ == "__main__":
    main()
