"""UMAP of the features of test images, coloured by class; several runs are panels on the same images.

    python draw_umap.py --model_dir RUN [RUN ...] [--adversarial] [--n-examples N]
    python draw_umap.py --model_dir F --dataset cifar10 --no-ra          a published bare state dict, plain network

Draws PNG and PDF at the width of a column into ./plots, and saves the embedding there as npz. Titles carry the
silhouette of the classes and the share of nearest neighbours of the same class (label agreement), both in feature
space, weighted and unweighted.
`python draw_umap.py --model_dir model/TRADES-ResNet18-*digits model/ANCRA-*digits`, of 360 images each:
silhouettes of 0.60 (TRADES) and 0.90 (ANCRA-TRADES) with the first release.
"""

from utils.system.command import main
from utils.system.settings import Umap

if __name__ == "__main__":
    main("utils.figures.features:draw_umap", Umap, __doc__)
