"""How robust is a network? The standard attacks, and those of somebody who knows the defence, in one table.

    python test_white_attack.py --ckpt_url PATH                    a checkpoint file or a run folder
    python test_white_attack.py --ckpt_url PATH --attacks all --diagnostics      before a figure is believed
    python test_white_attack.py --ckpt_url F --dataset cifar10 --no-ra     a published bare state dict, plain network
    python test_white_attack.py --ckpt_url F --dataset cifar10 --no-ra --mean cifar10 --std cifar10    normalised images
    python test_white_attack.py --model package.module:function --dataset cifar10      any classifier of [0, 1] images,
                                                                   also FILE.py:function; written to ./evaluated
    python test_white_attack.py --ckpt_url RUN RUN RUN             of several runs, also side by side

Attacks on the final logits alone overestimate the robustness of a network with reverse attention: add `adaptive`.
README's first table says what it finds for digits, `python -m tests.tools.study --commands` by which commands.
"""

from utils.system.command import main
from utils.system.settings import Evaluation

if __name__ == "__main__":
    main("utils.evaluation.robustness:white_attack", Evaluation, __doc__)
