"""Draws features of test images by UMAP, coloured by class; a panel for each run, the same images.

    python draw_umap.py --model_dir RUN [RUN ...] [--adversarial] [--n-examples N]
    python draw_umap.py --model_dir FILE --dataset cifar10 --no-ra
        a published bare state dict of a plain network

Draws PNG and PDF at the width of a column into ./plots, and saves the embedding there as npz.
Titles give the silhouette of the classes and the share of nearest neighbours of the same class
(label agreement), both in feature space, weighted and unweighted.
"""

import sys

from utils.system.command import guarded
from utils.system.options import parse
from utils.system.settings import Umap


def main() -> None:
    """Draw the embeddings that the command line asks for."""
    settings = parse(Umap, __doc__, sys.argv[1:])

    from utils.figures.features import draw_umap  # loads PyTorch; --help does not

    guarded(lambda: draw_umap(settings))


if __name__ == "__main__":
    main()
