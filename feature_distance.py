"""Distances of features: an image to its adversarial example (PP) and to a negative (NP), for one class or all.

    python feature_distance.py --model_dir RUN --target_label 0          a run folder or a checkpoint file
    python feature_distance.py --model_dir RUN --target_label all        every class in one pass
    python feature_distance.py --model_dir F --dataset cifar10 --no-ra --target_label cat      a bare state dict

Prints max, min, mean and variance of cosine similarity and L2 distance, of the features that reverse attention weights
and of those before it, and saves them to distances/{name}-{K}.npz, from which draw_hist.py draws.
`python feature_distance.py --model_dir model/ANCRA-*digits --target_label all`, after `python train_CIFAR10_ResNet.py
--dataset digits`, finds for the 360 test images, mean over classes:
DIGITS: PP cosine .., NP cosine .., .. s on 2 cores of ..
"""

from utils.command import main
from utils.recipes import Distances

if __name__ == "__main__":
    main("utils.features:feature_distance", Distances, __doc__)
