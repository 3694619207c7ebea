"""Checkpoints: files that say which network they hold, read without running code."""

import io
import os
import pickle
import re
import warnings
import zipfile
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from models import build_model
from models.normalise import Normalise, normalisation_in
from models.published import named_as, shape_of
from utils.system import distributed
from utils.system.errors import UsageError
from utils.system.files import write_atomically
from utils.system.settings import ARCHS, DATASETS, Training, dataset_defaults

BEST = "best_adv_model.pt"
LAST = "model-wrn-last.pt"
STATE = "last_state.pt"

# What a checkpoint says of its network.
DESCRIPTION = (
    "arch",
    "classes",
    "num_classes",
    "reverse_attention",
    "width",
    "image_size",
    "dataset",
    "recipe",
    "epoch",
    "gate",
    "ra_blocks",
    "averaged",
)

# How files of other kinds begin, and what to do about them.
OTHER_KINDS = {
    rb"version https://git-lfs": "a git-lfs pointer; `git lfs pull` fetches the file itself",
    rb"\s*<": "a web page, as of a failed download; fetch the file itself",
    rb"\x1f\x8b|BZh|\xfd7zXZ|7z\xbc\xaf|.{257}ustar": "an archive; unpack it and name the weights",
    rb"\Z": "empty; get it anew",
    rb"[\t-\r -~]{16}": "text, such as a configuration; name the file of the weights",
    rb"\x93NUMPY": "a numpy array; save a state dict of tensors by torch.save",
}


def save(path: Path, content: dict) -> None:
    """Write a checkpoint, or leave the file as it was. content: tensors and plain Python values."""
    buffer = io.BytesIO()
    torch.save(content, buffer)
    write_atomically(path, lambda temporary: temporary.write_bytes(buffer.getbuffer()))


# Reading


class Unread:
    """Stands for an object in a file whose class is not torch's; no code of its class runs.

    state: what the object would have been restored from; of a module a dictionary of attributes.
    """

    state: Any = None

    def __new__(cls, *args: object) -> "Unread":
        """Ignore the arguments that the object would have been made of."""
        return super().__new__(cls)

    def __setstate__(self, state: object) -> None:
        """Keep what the object would have been restored from."""
        self.state = state


class UnreadList(Unread):
    """Stands for an object that the file appends to, such as a deque."""

    def __new__(cls, *args: object) -> list:
        """Return a plain list, which gets the items."""
        return []


class UnreadDict(Unread):
    """Stands for an object of a subclass of dict, such as a configuration."""

    def __new__(cls, *args: object) -> OrderedDict:
        """Return a plain dictionary, which gets the entries."""
        return OrderedDict()


def read(path: Path) -> dict:
    """Read a checkpoint file as tensors and plain values on the CPU, without running code from it.

    An object of a class that is not torch's becomes an `Unread`, and a module that was saved whole
    its state dict. A safetensors file is read where that package is installed.
    Errors: UsageError where the file is missing, truncated or no checkpoint, or would run code.
    """
    if not path.is_file():
        raise UsageError(f"{path} does not exist; name a checkpoint file or a run folder")
    try:
        with open(path, "rb") as file:
            beginning = file.read(1024)
        if beginning[6:9] == b"\0\0{":  # the length of a header in eight bytes, then JSON
            content = _read_safetensors(path)
        else:
            _refuse_other_kinds(path, beginning)
            content = _unpickle(path)
    except UsageError:
        raise
    except OSError as error:
        raise UsageError(f"{path} cannot be read: {error.strerror or error}") from error
    except Exception as error:  # torch and pickle raise nearly anything
        if "GLOBAL" in str(error):
            raise UsageError(
                f"{path} is refused, since reading it would run code; if you trust it, save only "
                "its state dict to a new file by torch.save"
            ) from error
        raise UsageError(f"{path} is no checkpoint, or a truncated one") from error
    if isinstance(content, Unread):
        content = _state_dict(content)
    if not isinstance(content, dict):
        kind = type(content).__name__
        raise UsageError(f"{path} holds a {kind}, not a state dict; save .state_dict()")
    return content


def _refuse_other_kinds(path: Path, beginning: bytes) -> None:
    for pattern, kind in OTHER_KINDS.items():
        if re.match(pattern, beginning, re.DOTALL):
            raise UsageError(f"{path} is no checkpoint: it is {kind}")
    if not zipfile.is_zipfile(path):
        return
    with zipfile.ZipFile(path) as archive:
        names = {Path(name).name for name in archive.namelist()}
    if "constants.pkl" in names:
        raise UsageError(
            f"{path} is a TorchScript module; save its .state_dict(), or write a function that "
            "returns torch.jit.load(FILE) and name it by --model"
        )
    if "data.pkl" not in names:
        raise UsageError(f"{path} is a zip archive; unpack it and name the checkpoint inside")


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    try:
        from safetensors.torch import load
    except ImportError:
        raise UsageError(
            f"{path} is a safetensors file; `pip install safetensors` lets it be read"
        ) from None
    return load(path.read_bytes())


def _unpickle(path: Path) -> object:
    """Read what torch.save wrote, with an `Unread` for each object whose class is not torch's.

    torch's own reader refuses the name of such a class, or the stand-in for a dictionary or a list,
    and says which one. The file is then read again, with a stand-in under that name.
    """
    stand_ins: dict[str, type] = {}
    while True:
        allowed = [(stand_in, name) for name, stand_in in stand_ins.items()]
        try:
            with warnings.catch_warnings(), torch.serialization.safe_globals(allowed):
                warnings.simplefilter("ignore")
                return torch.load(path, map_location="cpu", weights_only=True)
        except pickle.UnpicklingError as error:
            unknown = re.search(r"GLOBAL (\S+) was not an allowed global", str(error))
            wrong_kind = re.search(
                rf"Can only (SETITEM|append).* got <class '{__name__}\.(\S+)'>", str(error)
            )
            if unknown and unknown[1] not in stand_ins:
                name = unknown[1]
                stand_in = type(name, (Unread,), {})
            elif wrong_kind and issubclass(stand_ins[wrong_kind[2]], Unread):
                name = wrong_kind[2]
                stand_in = UnreadDict if wrong_kind[1] == "SETITEM" else UnreadList
            else:
                raise
            stand_ins[name] = stand_in
            stand_ins[f"builtins.{name}"] = stand_in  # the message leaves `builtins` out


def _state_dict(module: Unread, prefix: str = "") -> dict[str, Tensor]:
    """Return the state dict of a module that was saved whole; it is empty for other objects."""
    attributes = module.state if isinstance(module.state, dict) else {}
    entries = attributes.get("_parameters", {}) | attributes.get("_buffers", {})
    tensors = {f"{prefix}{name}": value for name, value in entries.items() if value is not None}
    for name, child in attributes.get("_modules", {}).items():
        if isinstance(child, Unread):
            tensors |= _state_dict(child, f"{prefix}{name}.")
    return tensors


# Files of a run


def checkpoint_file(path: str | Path) -> Path:
    """Return `path` itself, or the best checkpoint of a run folder, or its last one.

    Errors: UsageError where a folder holds neither.
    """
    path = Path(os.path.expanduser(path))
    if not path.is_dir():
        return path
    for name in (BEST, LAST):
        if (path / name).is_file():
            return path / name
    raise UsageError(f"{path} holds neither {BEST} nor {LAST}; name a run folder or a checkpoint")


def weights_after(path: str | Path, epoch: int) -> Path:
    """Return the file with a run's weights after an epoch: in the run folder `path`, or `path`.

    Errors: UsageError where the folder holds none, which names those that it holds.
    """
    path = Path(path)
    if not path.is_dir():
        return path
    numbered = path / f"model-{epoch}.pt"
    if numbered.is_file():
        return numbered
    others = [file.name for file in sorted(path.glob("model-[0-9]*.pt"))]
    for file in (path / LAST, path / BEST):
        if file.is_file():
            its_epoch = read(file).get("epoch")
            if its_epoch == epoch:
                return file
            others.append(f"{file.name} of epoch {its_epoch}")
    held = ", ".join(others) or "no checkpoint"
    raise UsageError(
        f"{path} holds no weights of epoch {epoch}, but {held}; name a file or another "
        "--restart_epoch"
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
    that images are normalised by, or None; notes, what was assumed. Arch, width, number of classes
    and perhaps image size of a published state dict are read off its tensors; its reverse_attention
    is True unless overridden, since no tensor tells.

    key: which of several state dicts in the file. predict: the head that answers. overrides: values
    for entries that the file leaves open, None for unknown.
    Errors: UsageError where the file is no checkpoint or does not fit its description.
    """
    path = checkpoint_file(path)
    content = read(path)
    is_run = isinstance(content.get("model"), dict) and "reverse_attention" in content
    if is_run:
        if key is not None:
            raise UsageError(f"{path} is a run's checkpoint, of one network; leave --key out")
        state = content["model"]
        notes = []
        info = {name: content.get(name) for name in DESCRIPTION} | {"mean": None, "std": None}
        if info["gate"] is None:  # written before there were others
            info |= {"gate": "label", "ra_blocks": 2}
    else:
        state, normalisation, notes = find_weights(content, path, key)
        info = dict.fromkeys((*DESCRIPTION, "mean", "std")) | _read_shape(state, path)
        info |= normalisation

    for name, value in overrides.items():
        if value is None:
            continue
        is_known = info[name] is not None or (is_run and name in ("mean", "std"))
        if is_known and name != "dataset" and info[name] != value:
            raise UsageError(
                f"{path} is a checkpoint with {name} {info[name]}, not {value}; leave the flag out"
            )
        info[name] = value
    if info["reverse_attention"] is None:
        info["reverse_attention"] = True
    if not is_run:
        notes.insert(0, _assumptions(info))
    if info["image_size"] is None:
        known = info["dataset"] in DATASETS
        defaults = dataset_defaults(info["dataset"]) if known else Training
        info["image_size"] = defaults.image_size

    model = empty_network(info, path)
    if not is_run:
        state = named_as(model, state)
    check_state(model, state, path)
    model.to_empty(device="cpu").load_state_dict(state)
    if info["mean"]:
        model.normalise = Normalise(info["mean"], info["std"])
    _answer_by(model, predict, path)
    return model.to(device).eval(), info | {"notes": notes}


def _read_shape(state: dict[str, Tensor], path: Path) -> dict:
    try:
        return shape_of(state)
    except (LookupError, ValueError) as error:
        names = ", ".join([*state][:5])
        known = ", ".join(ARCHS)
        raise UsageError(f"{path} is of no network known here ({known}): {names} ...") from error


def _assumptions(info: dict) -> str:
    """Say what a published state dict is taken for."""
    attention = "with" if info["reverse_attention"] else "without"
    gate = "".join(f", {name} {info[name]}" for name in ("gate", "ra_blocks") if info[name])
    images = f"normalised by {info['mean']}, {info['std']}" if info["mean"] else "not normalised"
    return (
        f"taken for {info['arch']} of width {info['width']}, {attention} reverse attention{gate}, "
        f"images {images}; no tensor tells all of it, see --no-ra, --mean and --std"
    )


def print_notes(path: Path, notes: list[str]) -> tuple[str, ...]:
    """Print on the first rank what a reader must know of a file; return it with the file's name."""
    lines = tuple(f"{path.name}: {note}" for note in notes)
    if distributed.first():
        for line in lines:
            print(f"note: {line}")
    return lines


def find_weights(
    content: dict, path: Path, key: str | None = None, first: str = "conv1.weight"
) -> tuple[dict[str, Tensor], dict[str, tuple[float, ...]], list[str]]:
    """Find a network's state dict in a file, whatever dictionaries and prefixes it is wrapped in.

    key: the name of one of several networks. Without it the first counts; averages over training
    (EMA) come last. first: the network's first tensor; what stands before it is the prefix.
    Returns the state dict, mean and std of images as far as the file holds them, and notes.
    Errors: UsageError where there is no such network, or something beside it that belongs to it.
    """
    networks = {}
    for trail, tensors in _dictionaries(content):
        prefixes = _outermost_prefixes(tensors, first)
        for prefix in prefixes:
            networks[f"{trail}.{prefix}".strip(".")] = tensors, prefix, prefixes
    names = sorted(networks, key=lambda name: "ema" in name.lower())
    chosen = names[:1]
    if key is not None:
        chosen = [name for name in names if key == name or key in name.split(".")]
    if not chosen:
        wanted = f"network called {key}" if key else f"network known here ({', '.join(ARCHS)})"
        held = ", ".join(map(str, names or content)) or "nothing"
        raise UsageError(f"{path} is no checkpoint of a {wanted}; it holds {held[:400]}")

    tensors, prefix, prefixes = networks[chosen[0]]
    state = {}
    beside = {}
    for name, value in tensors.items():
        if name.startswith(prefix):
            state[name.removeprefix(prefix)] = value
        elif not name.startswith(prefixes):
            beside[name] = value
    buffers, normalisation = normalisation_in(state | beside)
    for mean, std in zip(*normalisation.values(), strict=True):
        if not (0 <= mean <= 1 and 0 < std <= 1):
            raise UsageError(f"{path}: {buffers[0]} and {buffers[1]} are not of images in [0, 1]")
    for name, value in beside.items():
        if value.numel() > 1 and name not in buffers:
            raise UsageError(f"{path} holds {name} beside its {chosen[0]}, as no network here does")

    notes = []
    others = [name for name in names if name != chosen[0]]
    if chosen[0]:
        notes.append(f"weights: {chosen[0]}")
    if buffers:
        notes.append(f"mean and std: {', '.join(buffers[:2])}")
    if others:
        taken_by = "other weights, not taken (--key of an evaluation takes them)"
        notes.append(f"{taken_by}: {', '.join(others[:9])}")
    for name in [*state]:
        # The forward of the official WRN leaves out its sub_block1.
        if name in buffers or name.startswith("sub_block1."):
            del state[name]
    return state, normalisation, notes


def _dictionaries(content: dict) -> Iterator[tuple[str, dict[str, Tensor]]]:
    """Yield the tensors of each dictionary in a file, outer ones first, after the keys to it."""
    waiting = [("", content)]
    for trail, dictionary in waiting:
        tensors = {}
        for name, value in dictionary.items():
            if isinstance(value, Unread):
                value = _state_dict(value)
            if isinstance(value, Tensor) and isinstance(name, str):
                tensors[name] = value
            elif isinstance(value, dict) and trail.count(".") < 5:
                waiting.append((f"{trail}.{name}", value))
        yield trail, tensors


def _outermost_prefixes(tensors: dict[str, Tensor], first: str) -> tuple[str, ...]:
    """Return what stands before `first` in names, but for networks inside a network."""
    prefixes = []
    for name in sorted(tensors, key=len):
        prefix = name.removesuffix(first)
        if f".{name}".endswith(f".{first}") and not prefix.startswith(tuple(prefixes)):
            prefixes.append(prefix)
    return tuple(prefixes)


def _answer_by(model: nn.Module, predict: str, path: Path) -> None:
    """Let a network answer with the logits of a head; UsageError where it has none of that name."""
    heads = ["final"]
    if model.reverse_attention:
        heads += ["auxiliary1", "auxiliary2"][: model.ra_blocks]
    if predict not in heads:
        raise UsageError(f"--predict {predict}: {path} has {', '.join(heads)} alone")
    model.predict = predict


def empty_network(info: dict, path: Path) -> nn.Module:
    """Build the network of a description on the meta device, where it draws no weights."""
    options = {}
    for name in ("reverse_attention", "width", "image_size", "gate", "ra_blocks"):
        if info[name] is not None:
            options[name] = info[name]
    try:
        with torch.device("meta"):
            return build_model(info["arch"], info["num_classes"], **options)
    except (ValueError, TypeError) as error:
        raise UsageError(f"{path} describes a network that cannot be built: {error}") from error


def load_state(model: nn.Module, state: dict[str, Tensor], path: Path) -> None:
    """Copy a state dict into a network; UsageError as `check_state`."""
    check_state(model, state, path)
    model.load_state_dict(state)


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
            f"{path} is of a network of normalised images, and training does not normalise; name "
            "another"
        )
    load_state(model, named_as(model, state), path)
    print_notes(path, notes)


def check_state(model: nn.Module, state: dict[str, Tensor], path: Path) -> None:
    """Raise UsageError that names the first tensor which does not fit or is not finite."""
    expected = model.state_dict()
    problem = f"{path} does not fit this network"
    for name in expected:
        if name not in state:
            raise UsageError(f"{problem}: it lacks {name}; is it of another architecture?")
    for name, value in state.items():
        if name not in expected:
            raise UsageError(f"{problem}: unexpected {name}; is it of another architecture?")
        shape = tuple(value.shape)
        expected_shape = tuple(expected[name].shape)
        if shape != expected_shape:
            hint = "is it of another arch or width?"
            if len(shape) == len(expected_shape) == 2 and shape[0] != expected_shape[0]:
                hint = f"it has {shape[0]} classes, not {expected_shape[0]}"
            raise UsageError(f"{problem}: {name} is {shape}, not {expected_shape}; {hint}")
        if not value.isfinite().all():
            raise UsageError(f"{path}: {name} is not finite; the training that wrote it had failed")
