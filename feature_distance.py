"""Measures distances of features: of an image to its adversarial example (PP), to a negative (NP).

    python feature_distance.py --model_dir RUN --target_label 0
        one class, of a run folder or a checkpoint file
    python feature_distance.py --model_dir RUN --target_label all
        every class in one pass
    python feature_distance.py --model_dir FILE --dataset cifar10 --no-ra --target_label cat
        a published bare state dict of a plain network

Prints maximum, minimum, mean and variance of cosine similarity and L2 distance, of the features
that reverse attention weights and of those before it. Saves them to distances/{name}-{K}.npz, and
those of several classes together to {name}-all.npz, from which draw_hist.py draws.
"""

import sys

from utils.system.command import guarded
from utils.system.options import parse
from utils.system.settings import Distances


def main() -> None:
    """Measure the distances that the command line asks for."""
    settings = parse(Distances, __doc__, sys.argv[1:])

    from utils.figures.features import feature_distance  # loads PyTorch; --help does not

    guarded(lambda: feature_distance(settings))


if __name__ == "__main__":
    main()
