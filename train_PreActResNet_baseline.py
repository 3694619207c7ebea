"""Trains the baseline on Tiny-ImageNet: TRADES with a plain PreActResNet-18.

    python train_PreActResNet_baseline.py                    as published
    python train_PreActResNet_baseline.py --dataset digits   small real data, no download
    python train_PreActResNet_baseline.py --method mart      another objective: pgd, trades, mart
    python train_PreActResNet_baseline.py --resume           continue where the run stopped

Writes checkpoints, a log, metrics.csv and curves into a folder whose name begins with --model-dir.
"""

import sys

from utils.system.command import guarded
from utils.system.options import parse_training

RECIPE = {
    "arch": "PreActResNet18",
    "dataset": "tiny-imagenet",
    "lr": 0.1,
    "weight_decay": 5e-4,
    "model_dir": "./model/TRADES-PreAct",
    "no_ra": True,
    "no_anc": True,
}


def main() -> None:
    """Train as the command line says."""
    command = parse_training(__doc__, RECIPE, sys.argv[1:])

    from utils.training.loop import run  # loads PyTorch; --help does not

    guarded(lambda: run(command))


if __name__ == "__main__":
    main()
