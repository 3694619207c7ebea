"""How robust is a network? The standard attacks, and those of somebody who knows the defence, in one table.

    python test_white_attack.py --ckpt_url PATH                    a checkpoint file or a run folder
    python test_white_attack.py --ckpt_url PATH --attacks all --diagnostics      before a figure is believed
    python test_white_attack.py --ckpt_url F --dataset cifar10 --no-ra     a published bare state dict, plain network
    python test_white_attack.py --model package.module:function --dataset cifar10      any classifier of [0, 1] images

Attacks on the final logits alone overestimate the robustness of a network with reverse attention: add `adaptive`.
"""

import sys

from utils.options import guarded, parse_evaluation

if __name__ == "__main__":
    options = parse_evaluation(__doc__, sys.argv[1:])

    def job() -> None:
        from utils.robustness import white_attack

        white_attack(options)

    guarded(job)
