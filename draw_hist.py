"""Histograms of feature distances over methods: PP and NP by cosine similarity and L2 distance, for each class.

    python draw_hist.py                                                  everything in ./distances
    python draw_hist.py --distances A-0.npz B-0.npz --labels TRADES ANCRA

Draws what feature_distance.py saved, as PNG and PDF at the width of a column.
"""

import sys

from utils.options import guarded, parse_histogram

if __name__ == "__main__":
    options = parse_histogram(__doc__, sys.argv[1:])

    def job() -> None:
        from utils.features import draw_hist

        draw_hist(options)

    guarded(job)
