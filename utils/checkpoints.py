"""Checkpoints that know what they are, and files that are either whole or absent."""

import os
import pickle
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from models import build_model
from utils.options import BY_DATASET, UsageError

BEST, LAST, STATE = "best_adv_model.pt", "model-wrn-last.pt", "last_state.pt"


def write_atomically(path: Path, write: Callable[[Path], None]) -> None:
    """Let `write` fill a temporary file beside `path`, flush it to disk and rename it: no reader sees half a file."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        write(temporary)
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def save(path: Path, content: dict) -> None:
    """Write a checkpoint. content: tensors and plain Python values only, so that it loads with weights_only."""
    write_atomically(path, lambda file: torch.save(content, file))


def read(path: Path) -> dict:
    """Read a checkpoint file as plain tensors and values, on the CPU, never running code from it.

    Errors: UsageError where it is missing, no checkpoint, or holds anything that would have to be executed.
    """
    try:
        with warnings.catch_warnings():  # of a plain pickle, which is refused below anyway
            warnings.filterwarnings("ignore", "Detected pickle protocol")
            content = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise UsageError(f"{path} does not exist; name a checkpoint file or a run folder") from None
    except pickle.UnpicklingError as error:
        raise UsageError(
            f"{path} is refused: no checkpoint, or one that would run code when loaded; save a state dict instead"
        ) from error
    except OSError as error:
        raise UsageError(f"{path} cannot be read: {error.strerror or error}") from error
    except (RuntimeError, EOFError, ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        raise UsageError(f"{path} is no checkpoint, or a truncated one") from error
    if not isinstance(content, dict):
        raise UsageError(f"{path} is no checkpoint: it holds a {type(content).__name__}, not a state dict")
    return content


def checkpoint_file(path: str | Path) -> Path:
    """The checkpoint that `path` names: the file itself, or a run folder's best one, else its last."""
    path = Path(path)
    if not path.is_dir():
        return path
    for name in (BEST, LAST):
        if (path / name).is_file():
            return path / name
    raise UsageError(f"{path} holds neither {BEST} nor {LAST}; name a run folder or a checkpoint file")


def load_model(path: str | Path, device: str | torch.device = "cpu", **overrides: object) -> tuple[nn.Module, dict]:
    """Load a checkpoint file, or a run folder's best checkpoint -> (model in eval mode, what it is).

    What it is: arch, classes (names), num_classes, reverse_attention, width, image_size, dataset, recipe, epoch; those
    of a published bare state dict are read off its tensors, as far as they can be (classes, dataset, recipe and epoch
    are None then, and reverse_attention True unless overridden: no tensor tells). overrides: values that replace these,
    None meaning unknown. Errors: UsageError where the file is no checkpoint or its tensors do not fit.
    """
    path = checkpoint_file(path)
    content = read(path)
    overrides = {key: value for key, value in overrides.items() if value is not None}
    if isinstance(content.get("model"), dict):
        state = content["model"]
        info = {key: content.get(key) for key in _DESCRIPTION}
        if info["arch"] is None:
            info.update(_shape(path, state))
    else:
        state, info = content, dict.fromkeys(_DESCRIPTION) | _shape(path, _published(content))
    state = _published(state)
    for key, value in overrides.items():
        known = info.get(key)
        if key in ("arch", "width", "image_size", "reverse_attention") and known is not None and value != known:
            raise UsageError(f"{path} is a checkpoint with {key} {known}, not {value}; leave the flag out")
        info[key] = value
    if info["image_size"] is None:
        info["image_size"] = BY_DATASET.get(info["dataset"], {}).get("image_size", 32)
    if info["reverse_attention"] is None:
        info["reverse_attention"] = True
    try:
        model = build_model(
            info["arch"],
            info["num_classes"],
            reverse_attention=info["reverse_attention"],
            width=info["width"],
            image_size=info["image_size"],
        )
    except (ValueError, TypeError, RuntimeError) as error:
        raise UsageError(f"{path} describes a network that cannot be built: {str(error).splitlines()[0]}") from error
    load_state(model, state, path)
    return model.to(device).eval(), info


_DESCRIPTION = (
    "arch",
    "classes",
    "num_classes",
    "reverse_attention",
    "width",
    "image_size",
    "dataset",
    "recipe",
    "epoch",
)


def load_state(model: nn.Module, state: dict[str, Tensor], path: Path) -> None:
    """Copy a state dict into a network; UsageError naming the first tensor that does not fit or is not finite."""
    if not isinstance(state, dict):
        raise UsageError(f"{path} is no checkpoint: its model is a {type(state).__name__}, not a state dict")
    state, own = _published(state), model.state_dict()
    for key in [k for k in (*own, *state) if (k in own) != (k in state)]:
        where = "lacks" if key in own else "has an unexpected"
        raise UsageError(f"{path} does not fit this network: it {where} {key}; is it of another architecture?")
    for key, value in state.items():
        if not isinstance(value, Tensor) or value.shape != own[key].shape:
            shape = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
            hint = "; is it of another number of classes or width?"
            raise UsageError(f"{path} does not fit this network: {key} is {shape}, not {tuple(own[key].shape)}{hint}")
        if not value.isfinite().all():
            raise UsageError(f"{path}: {key} is not finite; the training that wrote it had failed")
    model.load_state_dict(state)


def _published(state: dict) -> dict:
    """A state dict without what published files have besides: the unused `sub_block1`, DataParallel's `module.`."""
    named = {str(key).removeprefix("module."): value for key, value in state.items()}
    return {key: value for key, value in named.items() if not key.startswith("sub_block1.")}


def _shape(path: Path, state: dict) -> dict:
    """Arch, classes and sizes of a bare state dict, read off its tensors."""
    try:
        if "linear.weight" in state:
            width, (classes, features) = len(state["conv1.weight"]), state["linear.weight"].shape
            cells = {1: None, 4: 64}[features // (8 * width)]
            return {"arch": "PreActResNet18", "width": width, "num_classes": classes, "image_size": cells}
        classes, features = state["fc.weight"].shape
        if "layer1.0.conv1.weight" in state:
            return {"arch": "ResNet18", "width": len(state["conv1.weight"]), "num_classes": classes}
        blocks = len({key.split(".")[2] for key in state if key.startswith("block1.layer.")})
        return {"arch": f"WRN-{ {5: 34, 4: 28}[blocks] }-10", "width": features // 64, "num_classes": classes}
    except (KeyError, AttributeError, ValueError, TypeError) as error:
        raise UsageError(
            f"{path} is no checkpoint of a network known here (ResNet18, WRN-34-10, WRN-28-10, PreActResNet18)"
        ) from error
