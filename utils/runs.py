"""Run folders: their names, who may write to them, and what a resumed run takes from them."""

import argparse
import math
import shlex
import sys
from contextlib import ExitStack
from pathlib import Path

import torch
from torch import Tensor

from utils import distributed
from utils.checkpoints import STATE, check_state, described, locked, ordinary, outline, read, remove_leftovers
from utils.options import FREE_ON_RESUME, TRAINING, UsageError, impossible_setting

COLUMNS = (
    "epoch",
    "lr",
    "loss",
    "contrast",
    "train_natural_accuracy_first_head",
    "train_robust_accuracy_first_head",
    "natural_accuracy",
    "pgd40_heads_accuracy",
    "train_images_per_second",
    "seconds",
)

SUMS = ("loss", "contrast", "natural", "natural_images", "robust", "seconds")


def settings(options: argparse.Namespace) -> dict:
    """The settings that define a run, as plain values."""
    return {key: getattr(options, key) for key in TRAINING if key != "resume"}


def run_folder(options: argparse.Namespace) -> Path:
    """{model_dir}-strategy-..-seed-.., followed by whatever else differs from the script's own defaults."""
    o = options
    name = f"{o.model_dir.rstrip('/')}-strategy-{o.strategy}-alpha-{o.alpha}-beta-{o.beta}-zeta-{o.zeta}-seed-{o.seed}"
    name += "".join(f"-{getattr(o, key)}" for key in ("method", "dataset", "arch") if getattr(o, key) != o.own[key])
    name += "".join(f"-{key.replace('_', '-')}" for key in ("no_ra", "no_anc") if getattr(o, key) != o.own[key])
    elsewhere = {"model_dir", "strategy", "alpha", "beta", "zeta", "seed", "ckpt_url", *o.own, *FREE_ON_RESUME}
    for key, value in settings(o).items():
        if key not in elsewhere and value != o.defaults[key]:
            name += f"-{key}-{','.join(map(str, value)) if isinstance(value, list) else value}"
    return Path(name)


def refuse_existing(folder: Path) -> None:
    """UsageError where a folder holds a run already."""
    if (folder / STATE).exists():
        raise UsageError(f"{folder} holds a run already; continue it by --resume, or name another --model-dir")
    if any(folder.glob("*.pt")) or (folder / "metrics.csv").exists():
        raise UsageError(f"{folder} holds a run that cannot be resumed; remove it, or name another --model-dir")


def take_folder(folder: Path, held: ExitStack) -> None:
    """Keep every other process out of a run folder until `held` closes; clear what a killed one left half-written.

    Of a distributed run the first process alone writes, so it alone holds the folder.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        held.enter_context(locked(folder / ".lock", wait=False))
        remove_leftovers(folder)
    except TimeoutError:
        raise UsageError(f"another process writes to {folder}; wait for it, or name another --model-dir") from None
    except OSError as error:
        raise UsageError(f"{folder} cannot be written ({error.strerror}); name another --model-dir") from error


def prepare(options: argparse.Namespace, held: ExitStack) -> tuple[dict | None, Path | None, dict]:
    """The state to continue from and its path, None for a new run, and the options as the run has them."""
    own = run_folder(options) / STATE
    again = options.resume is None and distributed.restarted() and own.is_file()
    if again and read(own).get("launch") == distributed.launch():  # not a run that this job was refused to overwrite
        print("started anew by torchrun, as if --resume had been given")
        options.resume = True
    if options.resume is not None:
        return *prepare_resume(options, held), vars(options)
    options.folder = str(run_folder(options))
    refuse_existing(Path(options.folder))
    return None, None, vars(options)


def prepare_resume(options: argparse.Namespace, held: ExitStack) -> tuple[dict, Path]:
    """Take the run's folder, read its state and put its settings into `options`; says which flags lose or win."""
    path = run_folder(options) if options.resume is True else Path(options.resume)
    path = path if path.is_file() else path / STATE
    if not path.is_file():
        raise UsageError(f"--resume: {path} does not exist; start the run without --resume, or name its folder")
    take_folder(path.parent, held)  # before reading, so that no other process writes a newer state in between
    state = read(path)
    described(state, path)
    needed = {
        "model": dict,
        "recipe": dict,
        "progress": dict,
        "optimizer": dict,
        "generator": Tensor,
        "classes": list,
        "training_images": int,
        "ranks": int,
    }
    wrong = sorted(key for key, kind in needed.items() if not isinstance(state.get(key), kind))
    if not wrong and not {"epoch", "order", "done", "sums", "rows"} <= state["progress"].keys():
        wrong = ["progress"]
    if wrong:
        raise UsageError(f"{path} cannot be resumed, it has no usable {', '.join(wrong)}; name a run's {STATE}")
    own = set(settings(options))
    if state["recipe"].keys() != own:
        raise UsageError(f"{path} was written by another version of this code; its settings do not match")
    odd = impossible_setting(state["recipe"])
    if odd:
        raise UsageError(f"{path} cannot be resumed, no command can have given its {odd}; name a run's {STATE}")
    devices = {"device", "no_cuda"}
    given = {*options.given, *(devices if devices & set(options.given) else ())}  # a device is said by both together
    for key, value in state["recipe"].items():
        asked = getattr(options, key)
        if key not in FREE_ON_RESUME or key not in given:
            setattr(options, key, value)
        if key in options.given and asked != value:
            wins = "the command's wins" if key in FREE_ON_RESUME else "the run's wins"
            print(f"--{key.replace('_', '-')}: the run has {value}, the command {asked}; {wins}")
    options.folder = str(path.parent)
    recipe = {key: getattr(options, key) for key in ("arch", "width", "image_size")}
    network = recipe | {"num_classes": len(state["classes"]), "reverse_attention": not options.no_ra}
    check_state(outline(network, path), state["model"], path)
    return state, path


def resume_command(folder: Path) -> str:
    return f"{distributed.launcher()} {shlex.quote(sys.argv[0])} --resume {shlex.quote(str(folder))}"


def usable_memory(memory: object, parameters: list[Tensor]) -> bool:
    """Whether this is what SGD remembers of these parameters."""
    if not isinstance(memory, dict):
        return False
    for index, entry in memory.items():
        if type(index) is not int or not 0 <= index < len(parameters) or not isinstance(entry, dict):
            return False
        if entry.keys() != {"momentum_buffer"}:
            return False
        value = entry["momentum_buffer"]
        if value is None:
            continue
        if not ordinary(value) or value.shape != parameters[index].shape or value.dtype != parameters[index].dtype:
            return False
        if not value.isfinite().all():
            return False
    return True


def usable_progress(progress: dict, images: int) -> bool:
    """Whether this is how far a run over so many training images can be."""
    order, done, sums, rows = (progress[key] for key in ("order", "done", "sums", "rows"))

    def numbers(record: object, keys: tuple[str, ...]) -> bool:
        if not isinstance(record, dict) or record.keys() != set(keys):
            return False
        return all(
            v is None or (type(v) is float and math.isfinite(v)) or (type(v) is int and abs(v) < 2**63)
            for v in record.values()
        )

    if type(progress["epoch"]) is not int or type(done) is not int or not isinstance(rows, list):
        return False
    if not all(numbers(row, COLUMNS) and type(row["epoch"]) is int for row in rows):
        return False
    epochs = [row["epoch"] for row in rows]
    if (
        epochs != sorted(set(epochs))
        or not 1 <= progress["epoch"] < 2**31
        or (epochs and epochs[-1] != progress["epoch"] - 1)
    ):
        return False
    if order is None:
        return done == 0 and sums == {}
    if (
        not ordinary(order)
        or order.dtype is not torch.int64
        or not torch.equal(order.sort().values, torch.arange(images))
    ):
        return False
    return (
        0 <= done <= images and numbers(sums, SUMS) and None not in sums.values() and (not done or sums["seconds"] > 0)
    )
