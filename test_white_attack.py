"""Attacks trained networks by standard attacks and by those that know the defence; prints a table.

    python test_white_attack.py --ckpt_url PATH
        a checkpoint file or a run folder
    python test_white_attack.py --ckpt_url PATH --attacks all --diagnostics
        what to run before a figure is believed
    python test_white_attack.py --ckpt_url FILE --dataset cifar10 --no-ra
        a published bare state dict of a plain network
    python test_white_attack.py --ckpt_url FILE --dataset cifar10 --mean cifar10 --std cifar10
        one that takes normalised images
    python test_white_attack.py --model package.module:function --dataset cifar10
        any classifier of images in [0, 1], also FILE.py:function; writes to ./evaluated
    python test_white_attack.py --ckpt_url RUN RUN RUN
        several runs, also side by side

Attacks on the final logits alone overestimate the robustness of a network with reverse attention:
add `adaptive`. `python -m tests.tools.study digits --commands` prints the commands behind the
README's first table.
"""

import sys

from utils.system.command import guarded
from utils.system.options import parse
from utils.system.settings import Evaluation


def main() -> None:
    """Attack the networks that the command line names."""
    settings = parse(Evaluation, __doc__, sys.argv[1:])

    from utils.evaluation.robustness import white_attack  # loads PyTorch; --help does not

    guarded(lambda: white_attack(settings))


if __name__ == "__main__":
    main()
