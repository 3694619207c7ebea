"""Evaluate a checkpoint: natural accuracy, and robust accuracy under FGSM, PGD and CW on the final logits.

    python test_white_attack.py --ckpt_url PATH             a checkpoint file or a run folder
    python test_white_attack.py --ckpt_url F --dataset cifar10 --no-ra     a published bare state dict, plain network

The table is printed and appended to test.log beside the checkpoint. Attacks on the final logits alone can overestimate
the robustness of a network with reverse attention; see the README.
"""

import sys

from utils.options import guarded, parse_evaluation

if __name__ == "__main__":
    options = parse_evaluation(__doc__, sys.argv[1:])

    def job() -> None:
        from utils.evaluation import white_attack

        white_attack(options)

    guarded(job)
