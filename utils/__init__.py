"""What the scripts share; `load_model` and `frozen` may be imported from here.

Import it before PyTorch, since it settles how OpenMP's threads wait for work. By default they spin,
which costs a step many times its own time as soon as another process needs a core. OpenMP reads its
environment while PyTorch is loaded; later a value would change nothing.
"""

import os
import sys
from typing import Any

if "torch" not in sys.modules and "GOMP_SPINCOUNT" not in os.environ:
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


def __getattr__(name: str) -> Any:
    """Import `load_model` and `frozen` when they are asked for, since they load PyTorch."""
    if name == "load_model":
        from utils.system.checkpoints import load_model

        return load_model
    if name == "frozen":
        from utils.attacks import frozen

        return frozen
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
