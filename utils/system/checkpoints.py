"""Checkpoints that know what they are: written whole, read without running code, checked against their network."""

import os
import pickle
import re
import warnings
import zipfile
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

from models import build_model
from models.normalise import Normalise, normalisation_in
from models.published import named_as, shape_of
from utils.system import distributed
from utils.system.errors import UsageError
from utils.system.files import write_atomically
from utils.system.settings import ARCHS, DATASETS, LARGEST_SIDE, Training, dataset_defaults

BEST, LAST, STATE = "best_adv_model.pt", "model-wrn-last.pt", "last_state.pt"
LARGEST_WEIGHT = 1e6  # of a trained network none comes near; a variance may be its square
RESAVE = "torch.save(torch.load(FILE, weights_only=False)['state_dict'], NEW), or .state_dict() of a whole module"
FIRST_OF_LEGACY = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."  # how a file of torch.save before torch 1.6 begins
NO_CHECKPOINTS = {  # how other files begin: what they are, and what to do
    rb"\Z": "empty; get it anew",
    rb"version https://git-lfs": "a git-lfs pointer; `git lfs pull` fetches the file itself, or download it",
    rb"(\xef\xbb\xbf)?\s*<": "a web page, as of a failed download; fetch the file itself",
    rb"\s*[{[]": "JSON, as of a configuration; name the file that holds the weights",
    rb"\x1f\x8b|BZh|\xfd7zXZ|7z\xbc\xaf|Rar!|\x28\xb5\x2f\xfd|.{257}ustar": "an archive, or compressed; "
    "unpack it and name the checkpoint inside",
    rb"\x93NUMPY": "a numpy array; save a state dict of tensors by torch.save",
    rb"\x89HDF": "an HDF5 file, as Keras writes; only weights of PyTorch are read",
    rb"\x08[\x01-\x20][\x12:]": "an ONNX model; take the PyTorch weights that it was exported from",
    rb"\x80(?!" + re.escape(FIRST_OF_LEGACY[1:]) + rb")": "a pickle that torch.save did not write; "
    "re-save the state dict in it by torch.save",
    rb"[^\x00-\x08\x0e-\x1f]*\Z": "text; name the file that holds the weights",
}


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


class Unread:
    """Stands for an object in a file whose class is not torch's: nothing is imported or run for it.

    state: what the object was to be restored from, where the file says; of a module a dictionary of its attributes.
    """

    state: object = None

    def __new__(cls, *args: object) -> "Unread":
        return super().__new__(cls)

    def __setstate__(self, state: object) -> None:
        self.state = state


class UnreadDict(Unread):
    """Stands for an object of a class derived from dict, such as a configuration's."""

    def __new__(cls, *args: object) -> OrderedDict:
        return OrderedDict()


class UnreadList(Unread):
    """Stands for an object that the file appends to, such as a deque."""

    def __new__(cls, *args: object) -> list:
        return []


def read(path: Path) -> dict:
    """Read a checkpoint file as plain tensors and values, on the CPU, never running code from it.

    An object of a class that is not torch's becomes an `Unread`, a module that was saved whole its state dict. A
    safetensors file is read where that package is installed.
    Errors: UsageError where it is missing, damaged, no checkpoint, or cannot be read without running code.
    """
    try:
        if path.exists() and not path.is_file():  # to open a pipe would wait for ever
            raise UsageError(f"{path} is no file; name a checkpoint file or a run folder")
        with open(path, "rb") as file:
            head = file.read(1024)
        if head.startswith(b"PK\3\4"):
            _check_archive(path)
        if _is_safetensors(head):
            content = _from_safetensors(path)
        else:
            refuse_other_kinds(path, head)
            content = _unpickled(path)
    except FileNotFoundError:
        raise UsageError(f"{path} does not exist; name a checkpoint file or a run folder") from None
    except pickle.UnpicklingError as error:
        named = re.search(r"GLOBAL (\S+)", str(error))
        reason = "torch does not read it without running code"
        if named:
            reason = f"it would run code, {_shown(named[1])}, when loaded"
        raise UsageError(f"{path} is refused: {reason}; re-save only its weights, if you trust it: {RESAVE}") from error
    except OSError as error:
        raise UsageError(f"{path} cannot be read: {error.strerror or error}") from error
    except UsageError:
        raise
    except Exception as error:  # bytes of a stranger make torch and pickle raise nearly anything
        raise UsageError(f"{path} is no checkpoint, or a truncated one") from error
    if isinstance(content, Unread):
        content = tensors_of(content) or content
    if not isinstance(content, dict):
        raise UsageError(f"{path} holds a {_shown(type(content).__name__)}, not a state dict; save .state_dict()")
    return content


def refuse_other_kinds(path: Path, head: bytes) -> None:
    """UsageError where the first bytes of a file are those of no checkpoint, saying what it is."""
    for begins, kind in NO_CHECKPOINTS.items():
        if re.match(begins, head, re.DOTALL):
            raise UsageError(f"{path} is no checkpoint: it is {kind}")


def _check_archive(path: Path) -> None:
    """UsageError where a zip file is not one of torch.save, or is damaged; torch itself does not look."""
    with zipfile.ZipFile(path) as archive:
        entries = archive.infolist()
        names = {entry.filename.rpartition("/")[2] for entry in entries}
        if "constants.pkl" in names:
            mend = "a function that returns torch.jit.load(FILE) for --model, or save its .state_dict()"
            raise UsageError(f"{path} is a TorchScript module; write {mend}")
        if any(name.endswith(".npy") for name in names):
            raise UsageError(f"{path} holds numpy arrays; save a state dict of tensors by torch.save")
        if "model.weights.h5" in names:
            raise UsageError(f"{path} is a model of Keras; only weights of PyTorch are read")
        compressed = any(entry.compress_type != zipfile.ZIP_STORED for entry in entries)  # torch never does
        if compressed or "data.pkl" not in names:
            kind = "a compressed zip archive" if compressed else "a zip archive"
            raise UsageError(f"{path} is {kind}, no checkpoint; unpack it and name the checkpoint inside")
        if sum(entry.file_size for entry in entries) > path.stat().st_size:
            raise UsageError(f"{path} is damaged: it claims more than it holds; get it anew")
        if (damaged := archive.testzip()) is not None:
            raise UsageError(f"{path} is damaged: {_shown(damaged)} inside fails its checksum; get it anew")


def _is_safetensors(head: bytes) -> bool:
    """Whether a file begins as safetensors do: the length of a header, in eight bytes, and the header, in JSON."""
    return head[6:9] == b"\0\0{"


def _from_safetensors(path: Path) -> dict[str, Tensor]:
    try:
        from safetensors.torch import load
    except ImportError:
        raise UsageError(f"{path} is a safetensors file; `pip install safetensors` lets it be read") from None
    return load(path.read_bytes())


def _unpickled(path: Path) -> object:
    """What torch.save wrote. Each class or function that is not torch's gets a stand-in of `Unread`, by name.

    torch's own reader refuses such a name, or the stand-in where it is of the wrong kind, and says which: it then
    reads again, with that name known to it.
    """
    stand_ins: dict[str, type[Unread]] = {}
    not_alike = re.compile(rf"Can only (SETITEM|append).* got <class '{__name__}\.(\S+)'>")
    while True:
        known = [(stand_in, name) for name, stand_in in stand_ins.items()]
        try:
            with warnings.catch_warnings(), torch.serialization.safe_globals(known):
                warnings.filterwarnings("ignore", "Detected pickle protocol|Loading sparse|.*weights_only")
                with open(path, "rb") as file:
                    return torch.load(file, map_location="cpu", weights_only=True)
        except pickle.UnpicklingError as error:
            if unknown := re.search(r"GLOBAL (\S+) was not an allowed global", str(error)):
                name, base = unknown[1], Unread
            elif other := not_alike.search(str(error)):
                name, base = other[2], UnreadDict if other[1] == "SETITEM" else UnreadList
            else:
                raise
            if issubclass(stand_ins.get(name, object), base):  # of no use
                raise
            stand_ins[name] = type(name, (base,), {})
            stand_ins[f"builtins.{name}"] = stand_ins[name]  # the message leaves that out


def tensors_of(module: Unread) -> dict[str, Tensor]:
    """The state dict of a module that was saved whole, out of the attributes that it was to get; empty for others."""
    tensors = {}
    waiting = [("", module)]
    seen = set()
    for prefix, part in waiting:
        if id(part) in seen or not isinstance(part, Unread) or not isinstance(part.state, dict):
            continue
        seen.add(id(part))
        for attribute in ("_parameters", "_buffers", "_modules"):
            entries = part.state.get(attribute)
            if not isinstance(entries, dict):
                continue
            for name, value in entries.items():
                if attribute == "_modules":
                    waiting.append((f"{prefix}{name}.", value))
                elif isinstance(value, Tensor):
                    tensors[f"{prefix}{name}"] = value
    return tensors


def checkpoint_file(path: str | Path) -> Path:
    """The checkpoint that `path` names: the file itself, or a run folder's best one, else its last."""
    path = Path(os.path.expanduser(path))
    for file in (path / BEST, path / LAST) if path.is_dir() else (path,):
        if file.is_file() or file == path:
            return file
    raise UsageError(f"{path} holds neither {BEST} nor {LAST}; name a run folder or a checkpoint file")


def weights_after(path: str | Path, epoch: int) -> Path:
    """The file with a run's weights after an epoch: `path`, if it is a file, or the one in the run folder `path`."""
    path = Path(path)
    if not path.is_dir():
        return path
    numbered = path / f"model-{epoch}.pt"
    if numbered.is_file():
        return numbered
    held = sorted(file.name for file in path.glob("model-[0-9]*.pt"))
    for file in (path / LAST, path / BEST):
        if file.is_file():
            its_epoch = described(read(file), file)["epoch"]
            if its_epoch == epoch:
                return file
            held.append(f"{file.name} of epoch {its_epoch}")
    there = ", ".join(held) or "no checkpoint"
    raise UsageError(f"{path} holds no weights of epoch {epoch}, but {there}; name a file, or another --restart_epoch")


def load_model(path: str | Path, device: str | torch.device = "cpu", **overrides: object) -> tuple[nn.Module, dict]:
    """Load a checkpoint file, or a run folder's best checkpoint -> (model in eval mode, what it is).

    What it is: arch, classes (names), num_classes, reverse_attention, width, image_size, dataset, recipe, epoch; mean
    and std that images are normalised by, or None; notes, what was assumed. Those of a published state dict are read
    off its tensors, as far as they can be (classes, dataset, recipe and epoch are None then, and reverse_attention True
    unless overridden: no tensor tells). overrides: values that replace these, None meaning unknown; key, which of the
    state dicts in the file; predict, the head that answers. Errors: UsageError where the file is no checkpoint or its
    tensors do not fit.
    """
    path, key, predict = checkpoint_file(path), overrides.pop("key", None), overrides.pop("predict", "final")
    content = read(path)
    ours = isinstance(content.get("model"), dict) and "reverse_attention" in content
    if unknown := overrides.keys() - {*_DESCRIPTION, "mean", "std"}:
        raise TypeError(f"load_model: nothing known as {', '.join(sorted(unknown))}")
    if ours and key is not None:
        raise UsageError(f"{path} is a run's checkpoint, of one network; leave --key out")
    state, normalisation, notes = (content["model"], {}, []) if ours else weights_in(content, path, key)
    info = described(content, path) if ours else dict.fromkeys(_DESCRIPTION)
    info |= {"mean": None, "std": None} | normalisation
    if info["arch"] is None:
        try:
            info |= shape_of(state)
        except Exception as error:  # tensors of a stranger may have any names and shapes
            held = ", ".join(map(_shown, [*state][:5]))
            raise UsageError(f"{path} is of no network known here ({', '.join(ARCHS)}): {held} ...") from error
    if ours:  # written before there were others
        info |= {key: default for key, default in (("gate", "label"), ("ra_blocks", 2)) if info[key] is None}
    for name, value in overrides.items():
        known = info.get(name)
        if value is None:
            continue
        fixed = name != "dataset"
        if (fixed and known not in (None, value)) or (ours and name in ("mean", "std")):
            raise UsageError(f"{path} is a checkpoint with {name} {known}, not {value}; leave the flag out")
        info[name] = value
    if info["image_size"] is None:
        defaults = dataset_defaults(info["dataset"]) if info["dataset"] in DATASETS else Training
        info["image_size"] = defaults.image_size
    if info["reverse_attention"] is None:
        info["reverse_attention"] = True
    model = outline(info, path)
    state = state if ours else named_as(model, state)
    check_state(model, state, path)
    model.to_empty(device="cpu").load_state_dict(state)
    if info["mean"]:
        model.normalise = Normalise(info["mean"], info["std"])
    answer_by(model, predict, path)
    if not ours:
        ra = f"with{'' if info['reverse_attention'] else 'out'} reverse attention"
        ra += "".join(f", {key} {info[key]}" for key in ("gate", "ra_blocks") if info[key])
        images = f"normalised by {info['mean']}, {info['std']}" if info["mean"] else "not normalised"
        taken = f"taken for {info['arch']} of width {info['width']}, {ra}, images {images}"
        notes = [f"{taken}; no tensor tells all of it, see --no-ra, --mean and --std", *notes]
    return model.to(device).eval(), info | {"notes": notes}


def told(path: Path, notes: list[str]) -> tuple[str, ...]:
    """Say what a reader must know of a file, on the first rank -> the same, with the file's name."""
    for note in notes if distributed.first() else ():
        print(f"note: {path.name}: {note}")
    return tuple(f"{path.name}: {note}" for note in notes)


def weights_in(content: dict, path: Path, key: str | None = None, first: str = "conv1.weight") -> tuple[dict, dict, list]:
    """Find a network's state dict in what a file holds, whatever dictionaries, modules and prefixes it is wrapped in.

    first: the network's first tensor. What stands before it, wherever a name ends with it, is the prefix of a network's
    tensors. Of several networks the first counts, averages over training (EMA) last, or the one that key names.
    Returns the state dict, mean and std of images as far as the file holds them, and what a reader must know.
    Errors: UsageError where there is no such network, or more than a network.
    """
    found = {}
    for trail, tensors in _dictionaries(content):
        ends = sorted((k.removesuffix(first) for k in tensors if f".{k}".endswith(f".{first}")), key=len)[:999]
        outermost = tuple(end for i, end in enumerate(ends) if not end.startswith(tuple(ends[:i])))
        found |= {f"{trail}.{prefix}".strip("."): (tensors, prefix, outermost) for prefix in outermost}
    names = sorted(found, key=lambda name: "ema" in name.lower())
    chosen = [name for name in names if key in (None, name, *name.split("."))]
    if not chosen:
        what = f"network known here ({', '.join(ARCHS)})" if key is None else f"network called {_shown(key)}"
        held = ", ".join(map(_shown, names or content))[:400] or "nothing"
        raise UsageError(f"{path} is no checkpoint of a {what}; it holds {held}")
    tensors, prefix, prefixes = found[chosen[0]]
    own = {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
    beside = {k: v for k, v in tensors.items() if not k.startswith(prefixes)}
    buffers, normalisation = normalisation_in({k: v for k, v in (own | beside).items() if ordinary(v)})
    if not all(0 <= m <= 1 and 0 < s <= 1 for m, s in zip(*normalisation.values(), strict=True)):
        raise UsageError(f"{path}: {', '.join(map(_shown, buffers[:2]))} are {normalisation}, not of images in [0, 1]")
    for odd in [k for k, v in beside.items() if v.numel() > 1 and k not in buffers]:
        raise UsageError(f"{path} holds {_shown(odd)} beside its {_shown(chosen[0])}, as no network here does")
    others = [name for name in names if name != chosen[0]][:9]
    said = {
        "weights": chosen[:1],
        "mean and std": buffers[:2],
        "other weights, not taken (--key of an evaluation takes them)": others,
    }
    notes = [f"{what}: {', '.join(map(_shown, where))}" for what, where in said.items() if any(where)]
    state = {k: v for k, v in own.items() if k not in buffers and not k.startswith("sub_block1.")}
    return state, normalisation, notes


def _dictionaries(content: dict) -> Iterator[tuple[str, dict[str, Tensor]]]:
    """The tensors of each dictionary inside, and the keys that lead to it; one may hold itself, or many thousands."""
    waiting, seen = [((), content)], {id(content)}
    for trail, here in waiting:
        yield ".".join(trail), {k: v for k, v in here.items() if isinstance(k, str) and isinstance(v, Tensor)}
        for name, value in here.items():
            if isinstance(value, Unread):
                value = tensors_of(value)
            if isinstance(value, dict) and id(value) not in seen and len(trail) < 5:
                seen.add(id(value))
                waiting.append(((*trail, _shown(name)), value))


def answer_by(model: nn.Module, predict: str, path: Path) -> None:
    """Let a network answer with the logits of one of its heads; UsageError where it has none of that name."""
    names = ["final", "auxiliary1", "auxiliary2"][: 1 + model.ra_blocks * model.reverse_attention]
    if predict not in names:
        raise UsageError(f"--predict {predict}: {path} has {', '.join(names)} alone")
    model.predict = predict


_DESCRIPTION = {"arch": str, "classes": list, "num_classes": int, "reverse_attention": bool, "width": int}
_DESCRIPTION |= {"image_size": int, "dataset": str, "recipe": dict, "epoch": int, "gate": str, "ra_blocks": int}
_DESCRIPTION |= {"averaged": bool}


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
    check_state(model, state, path)
    model.load_state_dict(state)


def load_weights(model: nn.Module, path: Path) -> None:
    """Start a network from the weights in a file, whatever they are wrapped in; UsageError where they do not fit it."""
    first = next(iter(model.state_dict()))
    state, normalisation, notes = distributed.from_first(lambda: weights_in(read(path), path, first=first))
    if normalisation:
        raise UsageError(f"{path} is of a network of normalised images, and training does not normalise; name another")
    load_state(model, named_as(model, state), path)
    told(path, notes)


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
            shapes = f"{tuple(value.shape)}, not {tuple(own[key].shape)}"
            classes = value.ndim == own[key].ndim == 2 and len(value) != len(own[key])
            why = f"it has {len(value)} classes, not {len(own[key])}" if classes else "is it of another arch or width?"
            raise UsageError(f"{path} does not fit this network: {key} is {shapes}; {why}")
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


def _shown(name: object) -> str:
    """A name out of a file, printable and short: it may hold anything."""
    text = repr(name if isinstance(name, str) else type(name).__name__)[1:-1]
    return text if len(text) <= 80 else text[:80] + "..."
