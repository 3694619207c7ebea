"""Baseline: TRADES (or --method pgd, mart) on a plain WideResNet-34-10, CIFAR-10.

    python train_WideResNet_baseline.py                       the published recipe
    python train_WideResNet_baseline.py --dataset digits      small real data, nothing to download
    python train_WideResNet_baseline.py --method mart         another objective: pgd, trades, mart
    python train_WideResNet_baseline.py --resume              continue where the run stopped

What the second attains has not been measured with this version.
"""

from utils.command import train

if __name__ == "__main__":
    train(
        __doc__,
        arch="WRN-34-10",
        dataset="cifar10",
        lr=0.01,
        weight_decay=2e-4,
        model_dir="./model/TRADES-WideResNet",
        no_ra=True,
        no_anc=True,
    )
