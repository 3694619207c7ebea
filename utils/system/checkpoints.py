"""Checkpoints: files that say which network they hold, read without running code."""

import io
import warnings
from collections import OrderedDict
from contextlib import suppress
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.serialization import get_unsafe_globals_in_checkpoint, safe_globals

from models import build_model
from models.normalise import Normalise
from models.published import named_as, normalisation_in, shape_of
from utils.system import distributed
from utils.system.errors import UsageError
from utils.system.files import write_atomically
from utils.system.foreign import build_own, source_of
from utils.system.settings import ARCHS, Training, arch_name, dataset_defaults, is_code

BEST = "best_adv_model.pt"
LAST = "model-wrn-last.pt"
STATE = "last_state.pt"

# What a checkpoint says of its network.
DESCRIPTION = (
    "arch",
    "source",
    "classes",
    "num_classes",
    "reverse_attention",
    "width",
    "image_size",
    "dataset",
    "recipe",
    "epoch",
    "gate",
    "classifier",
    "ra_blocks",
    "averaged",
    "mean",
    "std",
)


def save(path: Path, content: dict) -> None:
    """Write a checkpoint, or leave the file as it was. content: tensors and plain Python values."""
    buffer = io.BytesIO()
    torch.save(content, buffer)
    write_atomically(path, lambda temporary: temporary.write_bytes(buffer.getbuffer()))


# Reading


class UnreadDict:
    """Makes a plain dictionary in place of an object whose class is not torch's."""

    def __new__(cls, *args: object) -> OrderedDict:
        """Ignore what the object would have been made of; the file fills the dictionary."""
        return OrderedDict()


class Unread:
    """Stands for a number or an array of numpy, or for a function of functools."""

    def __init__(self, *args: object) -> None:
        """Ignore what it would have been made of."""

    def __setstate__(self, state: object) -> None:
        """Ignore what it would have been restored from."""


def read(path: Path) -> dict:
    """Read a checkpoint file as tensors and plain values on the CPU, without running code from it.

    Something else takes the place of objects whose class is not torch's: the entries of such a
    dictionary are there, and the attributes of an object in its `__dict__`. A safetensors file is
    read where that package is installed.
    Errors: UsageError where the file is missing, truncated or no checkpoint, or would run code.
    """
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            content = load_file(path)
        else:
            content = _read_pickle(path)
    except ImportError as error:
        raise UsageError(f"{path} needs `pip install safetensors`") from error
    except OSError as error:
        raise UsageError(
            f"{path} cannot be read ({error.strerror}); name a whole checkpoint or a run folder"
        ) from error
    except Exception as error:  # torch and pickle raise nearly anything
        raise UsageError(
            f"{path} is no state dict of torch.save, or would run code: perhaps an archive, a "
            "TorchScript module, a failed download or truncated; it begins with "
            f"{path.read_bytes()[:40]}"
        ) from error
    if not isinstance(content, dict):
        raise UsageError(f"{path} holds no state dict; save .state_dict()")
    return content


def _read_pickle(path: Path) -> object:
    unread = []
    with suppress(ValueError):  # a file of torch before 1.6, which may hold no such objects
        unread = get_unsafe_globals_in_checkpoint(path)
    stand_ins = [
        (Unread if name.startswith(("numpy", "functools")) else UnreadDict, name) for name in unread
    ]
    with safe_globals(stand_ins), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.load(path, map_location="cpu", weights_only=True)


# Files of a run


def checkpoint_file(path: str | Path, epoch: int | None = None) -> Path:
    """Return `path` itself, or of a run folder the best checkpoint, or else its last one.

    epoch: the one that the weights have to be of, where they are looked for in a run folder.
    Errors: UsageError where a folder holds none.
    """
    path = Path(path).expanduser()
    if not path.is_dir():
        return path
    names = (BEST, LAST) if epoch is None else (f"model-{epoch}.pt", LAST, BEST)
    for name in names:
        file = path / name
        if file.is_file() and (epoch is None or read(file).get("epoch") == epoch):
            return file
    which = "weights" if epoch is None else f"weights of epoch {epoch}"
    raise UsageError(
        f"{path} holds no {which} in {', '.join(names)}; name a checkpoint or another run folder"
    )


# Networks


def load_model(
    path: str | Path,
    device: str | torch.device = "cpu",
    *,
    key: str | None = None,
    predict: str = "final",
    **overrides: object,
) -> tuple[nn.Module, dict]:
    """Load a checkpoint file, or a run folder's best checkpoint.

    Returns the network in eval mode and what it is: the entries of `DESCRIPTION`; mean and std
    that images are normalised by, or None; notes, what was assumed, which the first rank prints.
    Arch, width, number of classes and perhaps image size of a published state dict are read off its
    tensors; its reverse_attention is True unless overridden, since no tensor tells.

    key: which of several state dicts in a published file. predict: the head that answers.
    overrides: values for entries that the file leaves open, None for unknown; arch, the
    FILE.py:function of a network of the user's own, which is not run unless it is named here.
    Errors: UsageError where the file is no checkpoint or does not fit its description.
    """
    path = checkpoint_file(path)
    content = read(path)
    state, info, notes = _describe(content, path, key, overrides)
    names = ("reverse_attention", "width", "image_size", "gate", "classifier", "ra_blocks")
    options = {name: info[name] for name in names if info[name] is not None}
    if is_code(info["arch"]):
        model = build_own(info["arch"], info["num_classes"], **options)
        info["file"] = info["arch"].rpartition(":")[0]
        if info["source"] != source_of(info["arch"]):
            notes.append(f"{info['file']} has changed since the training")
    else:
        try:
            with torch.device("meta"):  # which draws no weights
                model = build_model(info["arch"], info["num_classes"], **options)
        except (ValueError, TypeError) as error:
            raise UsageError(f"{path} describes a network that cannot be built: {error}") from error
        model = model.to_empty(device="cpu")
    if info["mean"]:
        model.normalise = Normalise(info["mean"], info["std"])
    gated_blocks = model.ra_blocks if model.reverse_attention else 0
    heads = ("final", "auxiliary1", "auxiliary2")[: 1 + gated_blocks]
    if predict not in heads:
        raise UsageError(f"--predict {predict}: {path} has {', '.join(heads)} alone")
    model.predict = predict
    state = named_as(model, state)
    load_state(model, state, path)
    info["notes"] = print_notes(path, notes)
    return model.to(device).eval(), info


def _describe(
    content: dict, path: Path, key: str | None, overrides: dict[str, object]
) -> tuple[dict[str, Tensor], dict, list[str]]:
    """Return the state dict in a file, what its network is, and notes, as `load_model` says."""
    given = {name: value for name, value in overrides.items() if value is not None}
    is_run = "reverse_attention" in content and isinstance(content.get("model"), dict)
    if is_run:
        state = content["model"]
        notes = []
        known = {name: content.get(name) for name in DESCRIPTION}
        if is_code(known["arch"]):
            known["arch"] = named_code(known["arch"], given.get("arch"), path)
        elif is_code(given.get("arch")):
            del given["arch"]  # which is of other files of the same command
    else:
        state, known, notes = find_weights(content, path, key)
        try:
            known |= shape_of(state)
        except (LookupError, ValueError) as error:
            raise UsageError(f"{path} is of no network known here: {', '.join(ARCHS)}") from error

    for name, value in given.items():
        recorded = known.get(name)
        is_left_open = recorded is None and not (is_run and name in ("mean", "std"))
        if recorded != value and name != "dataset" and not is_left_open:
            raise UsageError(
                f"{path} is a checkpoint with {name} {recorded}, not {value}; leave the flag out"
            )
    assumed = {"reverse_attention": True, "dataset": Training.dataset}
    info = dict.fromkeys(DESCRIPTION) | assumed | known | given
    if info["image_size"] is None:
        info["image_size"] = dataset_defaults(info["dataset"]).image_size

    if not is_run:
        taken = ", ".join(
            f"{name} {info[name]}"
            for name in ("arch", "width", "reverse_attention", "mean", "std", "dataset")
        )
        notes.append(f"taken for {taken}; tensors tell not all, see --no-ra, --gate, --mean")
    return state, info, notes


def named_code(recorded: str, named: str | None, file: Path) -> str:
    """Return the FILE.py:function that a command names for a file's network of the user's own.

    Errors: UsageError where it names no such function: no code is run because a file names it.
    """
    if is_code(named) and arch_name(named) == arch_name(recorded):
        return named
    raise UsageError(
        f"{file} holds a network of your own code, run only if you name it: --arch {recorded}"
    )


def load_weights(model: nn.Module, path: Path) -> None:
    """Start a network from the weights in a file, whatever they are wrapped in.

    Errors: UsageError where they do not fit, or belong to a network of normalised images.
    """
    first = next(iter(model.state_dict()))
    state, normalisation, notes = distributed.from_first(
        lambda: find_weights(read(path), path, first=first)
    )
    if normalisation:
        raise UsageError(
            f"{path} is of a network of normalised images; training does not normalise"
        )
    print_notes(path, notes)
    state = named_as(model, state)
    load_state(model, state, path)


def load_state(model: nn.Module, state: dict[str, Tensor], path: Path) -> None:
    """Copy a state dict into a network; UsageError where it does not fit or is not finite."""
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        problem = " ".join(str(error).split())
        raise UsageError(f"{path} does not fit this network: {problem:.300}") from error
    for name, value in state.items():
        if not value.isfinite().all():
            raise UsageError(f"{path}: {name} is not finite; the training that wrote it had failed")


def print_notes(path: Path, notes: list[str]) -> list[str]:
    """Print on the first rank what a reader must know of a file; return it with the file's name."""
    lines = [f"{path.name}: {note}" for note in notes]
    if distributed.first():
        for line in lines:
            print(f"note: {line}")
    return lines


# State dicts of other programs


def find_weights(
    content: dict, path: Path, key: str | None = None, first: str = "conv1.weight"
) -> tuple[dict[str, Tensor], dict[str, tuple[float, ...]], list[str]]:
    """Find a network's state dict in a file, whatever dictionaries and prefixes it is wrapped in.

    key: the name of one of several networks. Without it the first counts; averages over training
    (EMA) come last. first: the network's first tensor; what stands before it is the prefix.
    Returns the state dict, mean and std of images as far as the file holds them, and notes.
    Errors: UsageError where there is no such network.
    """
    tensors = _tensors(content)
    prefixes = [name.removesuffix(first) for name in tensors if f".{name}".endswith(f".{first}")]
    prefixes.sort(key=lambda name: "ema" in name.lower())
    networks = [
        prefix
        for prefix in prefixes
        if not any(prefix != other and prefix.startswith(other) for other in prefixes)
    ]
    chosen = [prefix for prefix in networks if key is None or f".{key}." in f".{prefix}"]
    if not chosen:
        wanted = f"{', '.join(ARCHS)} called {key}" if key else ", ".join(ARCHS)
        held = ", ".join(networks or map(str, content)) or "nothing"
        raise UsageError(f"{path} holds no weights of {wanted}; it holds {held:.400}")

    prefix = chosen[0]
    others = [other for other in networks if other != prefix]
    tensors = {name: value for name, value in tensors.items() if not name.startswith(tuple(others))}
    buffers, normalisation = normalisation_in(tensors)
    unused = f"{prefix}sub_block1."  # which the forward of the official WRN leaves out
    state = {
        name.removeprefix(prefix): value
        for name, value in tensors.items()
        if name.startswith(prefix) and not name.startswith(unused) and name not in buffers
    }
    notes = []
    if prefix:
        notes.append(f"weights: {prefix[:-1]}")
    if others:
        notes.append(f"other weights, which --key takes: {', '.join(others)}")
    return state, normalisation, notes


def _tensors(content: dict, prefix: str = "") -> dict[str, Tensor]:
    """Return the tensors in nested dictionaries, and in modules that were saved whole, by path."""
    attributes = getattr(content, "__dict__", {})
    entries = {**content}
    for part in ("_parameters", "_buffers", "_modules"):
        entries |= attributes.get(part, {})
    tensors = {}
    for name, value in entries.items():
        if isinstance(value, dict):
            tensors |= _tensors(value, f"{prefix}{name}.")
        elif isinstance(value, Tensor):
            tensors[f"{prefix}{name}"] = value
    return tensors
