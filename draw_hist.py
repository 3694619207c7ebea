"""Draws histograms of feature distances, PP and NP, of all classes together and of each.

    python draw_hist.py
        everything in ./distances
    python draw_hist.py --distances A-0.npz B-0.npz --labels TRADES ANCRA

Draws what feature_distance.py saved into ./plots, by cosine similarity and by L2 distance, as PNG
and PDF at the width of a column. The paper's four figures are `hist-DATASET-all-*`.
"""

import sys

from utils.system.command import guarded
from utils.system.options import parse
from utils.system.settings import Histograms


def main() -> None:
    """Draw the histograms that the command line asks for."""
    settings = parse(Histograms, __doc__, sys.argv[1:])

    from utils.figures.features import draw_hist  # loads PyTorch; --help does not

    guarded(lambda: draw_hist(settings))


if __name__ == "__main__":
    main()
