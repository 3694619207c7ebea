"""Distances of features: an image to its adversarial example (PP) and to a negative (NP), for one class or all.

    python feature_distance.py --model_dir RUN --target_label 0          a run folder or a checkpoint file
    python feature_distance.py --model_dir RUN --target_label all        every class in one pass
    python feature_distance.py --model_dir F --dataset cifar10 --no-ra --target_label cat      a bare state dict

Prints max, min, mean and variance of cosine similarity and L2 distance, of the features that reverse attention weights
and of those before it, and saves them to distances/{name}-{K}.npz, from which draw_hist.py draws.
For `model/ANCRA-*digits --target_label all` the first release found a mean PP cosine of 0.95 and NP cosine of 0.02.
"""

from utils.system.command import main
from utils.system.settings import Distances

if __name__ == "__main__":
    main("utils.figures.features:feature_distance", Distances, __doc__)
