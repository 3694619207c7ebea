"""Trains ANCRA on CIFAR-10 with a ResNet-18.

    python train_CIFAR10_ResNet.py                    as published
    python train_CIFAR10_ResNet.py --dataset digits   small real data, no download
    python train_CIFAR10_ResNet.py --method mart      another objective: pgd, trades, mart
    python train_CIFAR10_ResNet.py --resume           continue where the run stopped

Writes checkpoints, a log, metrics.csv and curves into a folder whose name begins with --model-dir.
"""

import sys

from utils.system.command import guarded
from utils.system.options import parse_training

RECIPE = {
    "arch": "ResNet18",
    "dataset": "cifar10",
    "lr": 0.01,
    "weight_decay": 2e-4,
    "model_dir": "./model/ANCRA",
}


def main() -> None:
    """Train as the command line says."""
    command = parse_training(__doc__, RECIPE, sys.argv[1:])

    from utils.training.loop import run  # loads PyTorch; --help does not

    guarded(lambda: run(command))


if __name__ == "__main__":
    main()
