"""What the scripts share; `load_model` and `frozen` may be imported from here.

Import it before PyTorch, since it settles how OpenMP's threads wait for work. By default they spin
for long, which costs a step many times its own time as soon as another process needs a core. Here
they spin for a moment, and then sleep: to sleep at once would make each step slower. GNU's OpenMP,
which PyTorch brings on Linux, reads its environment while PyTorch is loaded; later a value would
change nothing.
"""

import os
import sys
from typing import Any

if "torch" not in sys.modules and "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")


def __getattr__(name: str) -> Any:
    """Import `load_model` and `frozen` when they are asked for, since they load PyTorch."""
    if name == "load_model":
        from utils.system.checkpoints import load_model

        return load_model
    if name == "frozen":
        from utils.system.attack_copy import frozen

        return frozen
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
