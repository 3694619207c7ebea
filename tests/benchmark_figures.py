"""CPU seconds of what the figures compute: 10,000 random images of CIFAR-10's shape, a random ResNet-18, one core.

    OMP_NUM_THREADS=1 python -m tests.benchmark_figures [IMAGES]

Passes through the network are measured on IMAGES (default 500) and scaled; cluster numbers and UMAP see all 10,000
features. CPU time, since other processes do not change it much.
"""

import sys
import time

import torch

from models import build_model
from utils.attacks import cross_entropy, frozen, pgd
from utils.data import Split
from utils.features import clusters, embed, extract

WHOLE = 10_000


def seconds(what, scale, job):
    began, cpu = time.perf_counter(), time.process_time()
    answer = job()
    wall, cpu = time.perf_counter() - began, time.process_time() - cpu
    print(
        f"{what:<44} {cpu * scale / 60:7.1f} min (measured {cpu:.1f} s of CPU, {wall:.1f} s by the clock)", flush=True
    )
    return answer


if __name__ == "__main__":
    count = int(sys.argv[1]) if len(sys.argv) > 1 else 500
    torch.manual_seed(0)
    labels = torch.arange(WHOLE) % 10
    images = torch.randint(256, (count, 3, 32, 32), dtype=torch.uint8)
    split, numbers, scale = Split(images, labels[:count], tuple("0123456789")), torch.arange(count), WHOLE / count
    attack = pgd(cross_entropy, 8 / 255, 0.007, 10, start="normal", seed=1)
    with frozen(build_model("ResNet18", 10).eval()) as net:
        seconds("features of 10,000 images", scale, lambda: extract(net, split, numbers, 200))
        seconds("PGD-10 and features of 10,000 images", scale, lambda: extract(net, split, numbers, 200, attack))
    features = torch.randn(WHOLE, 512) + 2 * torch.randn(10, 512)[labels]
    seconds("silhouette and neighbours, of 10,000", 1, lambda: clusters(features, labels))
    seconds("UMAP's compilation, on 100", 1, lambda: embed(features[:100], 42))
    seconds("UMAP of 10,000", 1, lambda: embed(features, 42))
