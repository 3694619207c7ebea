"""What the scripts share; `load_model` and `frozen` may be imported from here."""

from typing import Any


def __getattr__(name: str) -> Any:
    """Import `load_model` and `frozen` when they are asked for, since they load PyTorch."""
    if name == "load_model":
        from utils.system.checkpoints import load_model

        return load_model
    if name == "frozen":
        from utils.attacks import frozen

        return frozen
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
