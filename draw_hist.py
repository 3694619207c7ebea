"""Histograms of feature distances over methods: PP and NP by cosine similarity and L2 distance, of all classes together
and of each.

    python draw_hist.py                                                  everything in ./distances
    python draw_hist.py --distances A-0.npz B-0.npz --labels TRADES ANCRA

Draws what feature_distance.py saved into ./plots, as PNG and PDF at the width of a column.
The paper's four figures are `hist-DATASET-all-*`. `python draw_hist.py`, of two runs on digits with ten classes each:
44 figures.
"""

from utils.system.command import main
from utils.system.settings import Histograms

if __name__ == "__main__":
    main("utils.figures.features:draw_hist", Histograms, __doc__)
