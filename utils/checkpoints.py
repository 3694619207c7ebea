"""Checkpoints that know what they are: written whole, read without running code, checked against their network."""

import pickle
import warnings
import zipfile
from pathlib import Path

import torch
from torch import Tensor, nn

from models import build_model
from utils.errors import UsageError
from utils.files import write_atomically
from utils.recipes import ARCHS, DATASETS, LARGEST_SIDE, Training, dataset_defaults

BEST, LAST, STATE = "best_adv_model.pt", "model-wrn-last.pt", "last_state.pt"
LARGEST_WEIGHT = 1e6  # of a trained network none comes near; a variance may be its square


def save(path: Path, content: dict) -> None:
    """Write a checkpoint. content: tensors and plain Python values only, so that it loads with weights_only."""

    def write(temporary: Path) -> None:
        with open(temporary, "wb") as file:
            try:
                torch.save(content, file)
            except RuntimeError as error:  # what torch makes of an exception of `file`
                if isinstance(error.__context__, OSError | KeyboardInterrupt):
                    raise error.__context__ from None
                raise

    write_atomically(path, write)


def read(path: Path) -> dict:
    """Read a checkpoint file as plain tensors and values, on the CPU, never running code from it.

    Errors: UsageError where it is missing, damaged, no checkpoint, or holds anything that would have to be executed.
    """
    try:
        _check_archive(path)
        with warnings.catch_warnings():  # of plain pickles and odd tensors, which are refused below anyway
            warnings.filterwarnings("ignore", "Detected pickle protocol|Loading sparse|.*weights_only")
            content = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise UsageError(f"{path} does not exist; name a checkpoint file or a run folder") from None
    except pickle.UnpicklingError as error:
        why = "no checkpoint, or one that would run code when loaded"
        raise UsageError(f"{path} is refused: {why}; save a state dict instead") from error
    except OSError as error:
        raise UsageError(f"{path} cannot be read: {error.strerror or error}") from error
    except UsageError:
        raise
    except Exception as error:  # bytes of a stranger make torch and pickle raise nearly anything
        raise UsageError(f"{path} is no checkpoint, or a truncated one") from error
    if not isinstance(content, dict):
        raise UsageError(f"{path} is no checkpoint: it holds a {type(content).__name__}, not a state dict")
    return content


def _check_archive(path: Path) -> None:
    """UsageError where a checkpoint, a zip file since torch 1.6, is damaged or larger inside; torch itself is lax."""
    if path.exists() and not path.is_file():  # to open a pipe would wait for ever
        raise UsageError(f"{path} is no file; name a checkpoint file or a run folder")
    with open(path, "rb") as file:
        if file.read(4) != b"PK\3\4":
            return  # of older releases: `torch.load` compares every size with what it reads
    with zipfile.ZipFile(path) as archive:
        if any(entry.compress_type != zipfile.ZIP_STORED for entry in archive.infolist()):  # torch never does: a bomb
            raise UsageError(f"{path} is refused: it is compressed, as no checkpoint is; save a state dict instead")
        if sum(entry.file_size for entry in archive.infolist()) > path.stat().st_size:
            raise UsageError(f"{path} is damaged: it claims more than it holds; get it anew")
        if (damaged := archive.testzip()) is not None:
            raise UsageError(f"{path} is damaged: {_shown(damaged)} inside fails its checksum; get it anew")


def checkpoint_file(path: str | Path) -> Path:
    """The checkpoint that `path` names: the file itself, or a run folder's best one, else its last."""
    path = Path(path)
    for file in (path / BEST, path / LAST) if path.is_dir() else (path,):
        if file.is_file() or file == path:
            return file
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
    ours = isinstance(content.get("model"), dict)
    state = _published(content["model"] if ours else content)
    info = described(content, path) if ours else dict.fromkeys(_DESCRIPTION)
    if info["arch"] is None:
        info |= _shape(path, state)
    for key, value in overrides.items():
        known = info.get(key)
        if value is None:
            continue
        if key != "dataset" and known not in (None, value):
            raise UsageError(f"{path} is a checkpoint with {key} {known}, not {value}; leave the flag out")
        info[key] = value
    if info["image_size"] is None:
        defaults = dataset_defaults(info["dataset"]) if info["dataset"] in DATASETS else Training
        info["image_size"] = defaults.image_size
    if info["reverse_attention"] is None:
        info["reverse_attention"] = True
    model = outline(info, path)
    check_state(model, state, path)
    model.to_empty(device="cpu").load_state_dict(state)
    return model.to(device).eval(), info


_DESCRIPTION = {"arch": str, "classes": list, "num_classes": int, "reverse_attention": bool, "width": int}
_DESCRIPTION |= {"image_size": int, "dataset": str, "recipe": dict, "epoch": int, "gate": str, "ra_blocks": int}


def described(content: dict, path: Path) -> dict:
    """What a checkpoint says it is, None where it says nothing; UsageError where an entry is of another kind."""
    info = {key: content.get(key) for key in _DESCRIPTION}
    for key, value in info.items():
        kind = _DESCRIPTION[key]
        known = value is None or (type(value) is kind and (kind is not int or abs(value) < 2**31))
        if not known or (key == "classes" and not all(isinstance(name, str) for name in value or ())):
            raise UsageError(f"{path} is no checkpoint of this code: its {key} is no usable {kind.__name__}")
    return info


def outline(info: dict, path: Path) -> nn.Module:
    """The network that `info` describes, without memory for its tensors: a description can ask for any size."""
    if type(info["image_size"]) is int and info["image_size"] > LARGEST_SIDE:
        raise UsageError(f"{path} is of images of side {info['image_size']}, more than {LARGEST_SIDE}")
    how = {key: info[key] for key in ("reverse_attention", "width", "image_size")}
    how |= {key: info[key] for key in ("gate", "ra_blocks") if info[key] is not None}
    try:
        with torch.device("meta"):
            return build_model(info["arch"], info["num_classes"], **how)
    except (ValueError, TypeError, RuntimeError, OverflowError) as error:
        raise UsageError(f"{path} describes a network that cannot be built: {_shown(str(error))}") from error


def load_state(model: nn.Module, state: dict[str, Tensor], path: Path) -> None:
    """Copy a state dict into a network; UsageError as `check_state`."""
    if not isinstance(state, dict):
        raise UsageError(f"{path} is no checkpoint: its model is a {type(state).__name__}, not a state dict")
    state = _published(state)
    check_state(model, state, path)
    model.load_state_dict(state)


def check_state(model: nn.Module, state: dict[str, Tensor], path: Path) -> None:
    """UsageError naming the first tensor of a state dict that does not fit a network or cannot be right."""
    own = model.state_dict()
    for key in [k for k in (*own, *state) if (k in own) != (k in state)]:
        where = "lacks" if key in own else "has an unexpected"
        raise UsageError(f"{path} does not fit this network: it {where} {_shown(key)}; is it of another architecture?")
    for key, value in state.items():
        if not ordinary(value):
            raise UsageError(f"{path} does not fit this network: {key} is no ordinary tensor")
        if value.shape != own[key].shape:
            shapes = f"{tuple(value.shape)}, not {tuple(own[key].shape)}; is it of another number of classes or width?"
            raise UsageError(f"{path} does not fit this network: {key} is {shapes}")
        if wrong := flaw(key, value):
            raise UsageError(f"{path}: {key} {wrong}; the training that wrote it had failed, or the file is damaged")


def ordinary(value: object) -> bool:
    """Whether a value out of a file is a dense tensor that holds as many numbers as its shape says."""
    if type(value) not in (Tensor, nn.Parameter) or value.layout is not torch.strided:
        return False
    if value.is_nested or value.is_meta or value.is_quantized:
        return False
    return value.untyped_storage().nbytes() >= value.numel() * value.element_size()


def flaw(key: str, value: Tensor) -> str | None:
    """Why a tensor cannot be one of a trained network, None where it can. key: its name in the state dict."""
    counts = key.endswith("num_batches_tracked")
    if value.dtype not in ((torch.int64,) if counts else (torch.float32, torch.float64, torch.float16, torch.bfloat16)):
        return f"is of {value.dtype}"
    if counts:
        return "is negative" if value.min() < 0 else None
    if not value.isfinite().all():
        return "is not finite"
    variance, largest = key.endswith("running_var"), value.abs().max()
    if variance and value.min() < 0:
        return f"is a variance of {value.min():.3g}"
    return f"reaches {largest:.3g}" if largest > LARGEST_WEIGHT ** (2 if variance else 1) else None


def _published(state: dict) -> dict:
    """A state dict without what published files have besides: the unused `sub_block1`, DataParallel's `module.`."""
    named = {str(key).removeprefix("module."): value for key, value in state.items()}
    return {key: value for key, value in named.items() if not key.startswith("sub_block1.")}


def _shown(name: object) -> str:
    """A name out of a file, printable and short: it may hold anything."""
    text = repr(str(name))[1:-1]
    return text if len(text) <= 80 else text[:80] + "..."


def _shape(path: Path, state: dict) -> dict:
    """Arch, width, number of classes and, where they tell, side of the images of a state dict, read off its tensors."""
    try:
        if "linear.weight" in state:
            width, (classes, features) = len(state["conv1.weight"]), state["linear.weight"].shape
            side = round((features / (8 * width)) ** 0.5)  # cells of the pooled map, 1 up to images of 32
            size = {"image_size": 32 * side} if side > 1 else {}
            return {"arch": "PreActResNet18", "width": width, "num_classes": classes, **size}
        classes, features = state["fc.weight"].shape
        if "layer1.0.conv1.weight" in state:
            return {"arch": "ResNet18", "width": len(state["conv1.weight"]), "num_classes": classes}
        blocks = len({key.split(".")[2] for key in state if key.startswith("block1.layer.")})
        return {"arch": f"WRN-{ {5: 34, 4: 28}[blocks] }-10", "width": features // 64, "num_classes": classes}
    except (LookupError, AttributeError, ValueError, TypeError, ArithmeticError, RuntimeError) as error:
        raise UsageError(f"{path} is no checkpoint of a network known here ({', '.join(ARCHS)})") from error
