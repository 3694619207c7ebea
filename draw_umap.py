"""UMAP of the features of test images, coloured by class; several runs are panels on the same images.

    python draw_umap.py --model_dir RUN [RUN ...] [--adversarial] [--n-examples N]
    python draw_umap.py --model_dir F --dataset cifar10 --no-ra          a published bare state dict, plain network

Draws PNG and PDF at the width of a column and saves the embedding as npz. Titles carry the silhouette of the classes
and the share of nearest neighbours of the same class, both in feature space, weighted and unweighted.
"""

import sys

from utils.options import guarded, parse_umap

if __name__ == "__main__":
    options = parse_umap(__doc__, sys.argv[1:])

    def job() -> None:
        from utils.features import draw_umap

        draw_umap(options)

    guarded(job)
