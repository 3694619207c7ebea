"""Run folders: their names, who may write to them, their log, and what a resumed run takes from them."""

import glob
import json
import math
import os
import zlib
from contextlib import ExitStack, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from utils.system import distributed
from utils.system.checkpoints import BEST, LAST, STATE, check_state, described, ordinary, outline, read
from utils.system.errors import UsageError
from utils.system.files import locked, remove_leftovers, require_writable
from utils.system.options import Command, flag
from utils.system.settings import FREE, Training, idle, resolve, restored, stored
from utils.system.values import as_given

VERSION = 1  # of last_state.pt; raised when an older one can no longer be continued. The first release wrote none.

FIGURES = ("lr", "loss", "contrast", "train_natural_accuracy_first_head", "train_robust_accuracy_first_head")
FIGURES += ("natural_accuracy", "pgd40_heads_accuracy", "train_images_per_second", "seconds")
TERMS = ("cross_entropy", "kl", "auxiliary")  # of the loss besides contrast; unknown in rows of the first release
ROW = {"epoch": 1} | dict.fromkeys((*FIGURES, *TERMS), 0.0)  # of metrics.csv, with values of the types that it holds
NO_NATURAL = {"train_natural_accuracy_first_head": None}
NOT_EVALUATED = dict.fromkeys(("natural_accuracy", "pgd40_heads_accuracy"))
ROWS = (ROW, ROW | NO_NATURAL, ROW | NOT_EVALUATED, ROW | NO_NATURAL | NOT_EVALUATED)  # as an epoch may write them
ROWS += tuple(row | dict.fromkeys(TERMS) for row in ROWS)  # and as the first release did
OWN = ("method", "dataset", "arch", "no_ra", "no_anc")  # what tells runs apart before any number does
PUBLISHED = ("strategy", "alpha", "beta", "zeta", "seed")  # what a published folder's name says
# What a run writes into its folder, and its evaluation: all that --overwrite removes
WRITTEN = (
    STATE,
    LAST,
    BEST,
    "model-[0-9]*.pt",
    "metrics.csv",
    "run.json",
    "train.log",
    "training_curves.*",
    "tensorboard/events.out.tfevents.*",
    "test.log",
    "white_attack.json",
    "white_attack.blocks/*",
    "adversarial_examples.*",
    "robust_vs_*.*",
)
LONGEST_NAME = 200  # bytes of a run folder's; longer ones are cut and end in a checksum
# Sums over an epoch
SUMS = dict.fromkeys(("loss", "contrast", *TERMS, "natural", "natural_images", "robust", "seconds"), 0.0)


class Start(NamedTuple):
    """How a run starts: its settings and folder, and where it goes on, what `file` holds; None for a new run.

    changes: the settings that a resumed run has other than before, a line each.
    """

    settings: Training
    folder: Path
    state: dict | None = None
    file: Path | None = None
    changes: tuple[str, ...] = ()


def results(settings: Training) -> dict[str, Any]:
    """The settings on which a run's results depend, by which folders are named."""
    unused = {"model_dir", "ckpt_url", *idle(settings)}
    found = {key: value for key, value in stored(settings).items() if key not in FREE and key not in unused}
    found |= {"epochs": settings.epochs} if settings.lr_schedule != "milestones" else {}
    return found | ({"data_dir": os.path.realpath(settings.data_dir)} if settings.dataset == "folder" else {})


def run_folder(command: Command) -> Path:
    """{model_dir}-strategy-..-seed-.., without ANC what of it acts, and what differs from the script's own defaults."""
    s, script, found = command.settings, resolve(Training, {}, command.script), results(command.settings)
    name = s.model_dir.rstrip("/\\")
    name += "".join(f"-{key}-{getattr(s, key)}" for key in PUBLISHED if key in found or not s.no_anc)
    differs = [key for key in OWN if getattr(s, key) != getattr(script, key)]
    if "model_dir" not in command.given and s.model_dir != script.model_dir:  # which says the method already
        differs.remove("method")
    name += "".join(f"-{key.replace('_', '-') if key.startswith('no') else getattr(s, key)}" for key in differs)
    if "data_dir" in found:
        name += f"-{Path(found['data_dir']).name}-{zlib.crc32(os.fsencode(found['data_dir'])) % 16**4:04x}"
    usual = stored(resolve(Training, {key: getattr(s, key) for key in ("dataset", "method", "arch")}, command.script))
    for key, value in sorted(found.items(), key=lambda item: item[0] == "tag"):
        if key not in (*PUBLISHED, *OWN, "data_dir") and value != usual[key]:
            value = Path(value).stem if key == "extra_data" and value else value
            name += f"-{key}-{','.join(map(str, value)) if isinstance(value, list) else value}"
    folder, own = Path(name), os.fsencode(Path(name).name)
    if len(own) > LONGEST_NAME:  # of a file, 255 bytes on most systems
        folder = folder.with_name(f"{os.fsdecode(own[: LONGEST_NAME - 9])}-{zlib.crc32(own):08x}")
    return folder


def run_to_resume(command: Command) -> Path:
    """The folder of the run that a bare --resume means, which is the command's own.

    Errors: UsageError where it does not exist, which names the runs that there are.
    """
    folder = run_folder(command)
    if (folder / STATE).is_file():
        return folder
    runs = ", ".join(known_runs(command))
    mend = f"name a run by --resume PATH: {runs}" if runs else "start the run without --resume, or name its folder"
    raise UsageError(f"--resume: {folder / STATE} does not exist; {mend}")


def known_runs(command: Command) -> list[str]:
    """The runs of a command's --model-dir, and in which settings each differs from the command: the likest first."""
    wanted = results(command.settings)
    runs = []
    for file in run_folder(command).parent.glob(f"{glob.escape(Path(command.settings.model_dir).name)}-*/{STATE}"):
        differing = ["unknown settings"]
        with suppress(OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError):  # damaged
            its = results(restored(json.loads((file.parent / "run.json").read_text(encoding="utf-8"))["settings"]))
            differing = [
                f"{flag(key)} {as_given(its[key])}, here {as_given(wanted[key])}"
                for key in its.keys() & wanted.keys()
                if its[key] != wanted[key]
            ]
        runs.append((len(differing), f"{file.parent} ({'; '.join(sorted(differing)) or 'the same settings'})"))
    return [run for _, run in sorted(runs)[:5]]


def refuse_existing(folder: Path) -> None:
    """UsageError where a folder holds a run already, unless that one ended before its first step."""
    if (folder / STATE).exists():
        fresh = False
        with suppress(UsageError, LookupError, TypeError, RuntimeError):  # a damaged state is somebody's, too
            progress = read(folder / STATE)["progress"]
            fresh = progress["order"] is None and progress["rows"] == []
        if not fresh:
            mend = "continue it by --resume, or name another --model-dir or a --tag; --overwrite replaces it"
            raise UsageError(f"{folder} holds a run already; {mend}")
    if any(file.name != STATE for file in folder.glob("*.pt")) or (folder / "metrics.csv").exists():
        raise UsageError(f"{folder} holds a run that cannot be resumed; remove it, or name another --model-dir")


def remove_existing(folder: Path) -> None:
    """Say what a folder's run has to lose, and remove its files; others stay."""
    files = sorted({file for pattern in WRITTEN for file in folder.glob(pattern)})
    if not files:
        return
    epochs = ""
    with suppress(UsageError, LookupError, TypeError):
        epochs = f" of {len(read(folder / STATE)['progress']['rows'])} epochs"
    names = dict.fromkeys(file.relative_to(folder).parts[0] for file in files)
    print(f"--overwrite: the run{epochs} in {folder} is lost: {', '.join(names)}")
    for file in files:
        file.unlink()
    for inner in {file.parent for file in files} - {folder}:
        with suppress(OSError):  # something else lies in it
            inner.rmdir()


def take_folder(folder: Path, held: ExitStack) -> None:
    """Keep every other process out of a run folder until `held` closes; clear what a killed one left half-written.

    Of a distributed run the first process alone writes, so it alone holds the folder.
    """
    require_writable(folder, "name another --model-dir")
    try:
        held.enter_context(locked(folder / ".lock", wait=False))
    except TimeoutError:
        raise UsageError(f"another process writes to {folder}; wait for it, or name another --model-dir") from None
    remove_leftovers(folder)


def prepare(command: Command, held: ExitStack) -> Start:
    """How the run that a command asks for starts; a resumed one's folder is taken until `held` closes."""
    folder, resume = run_folder(command), command.settings.resume
    again = resume is None and distributed.restarted() and (folder / STATE).is_file()
    if again and read(folder / STATE).get("launch") == distributed.launch():  # not one that this job may not overwrite
        print("started anew by torchrun, as if --resume had been given")
        resume = True
    if resume is None:
        command.settings.overwrite or refuse_existing(folder)
        return Start(command.settings, folder)
    file = run_to_resume(command) if resume is True else Path(resume)
    file = file if file.is_file() else file / STATE
    if not file.is_file():
        raise UsageError(f"--resume: {file} does not exist; start the run without --resume, or name its folder")
    take_folder(file.parent, held)  # before reading, so that no other process writes a newer state in between
    state = read(file)
    require_state(state, file)
    with suppress(TypeError, AttributeError, KeyError, RuntimeError):  # damaged: `usable` will say so
        state["progress"]["rows"] = [row | {k: row.get(k) for k in TERMS} for row in state["progress"]["rows"]]
        if sums := state["progress"]["sums"]:
            state["progress"]["sums"] = dict.fromkeys(TERMS, 0.0) | sums
    settings, changes = resumed_settings(command, state["recipe"])
    network = {key: getattr(settings, key) for key in ("arch", "width", "image_size", "gate", "ra_blocks")}
    network |= {"num_classes": len(state["classes"]), "reverse_attention": not settings.no_ra}
    check_state(outline(network, file), state["model"], file)
    return Start(settings, file.parent, state, file, changes)


def require_state(state: dict, file: Path) -> None:
    """UsageError where what a file holds is no run's last_state.pt; optimiser and progress: see `usable`."""
    described(state, file)
    version, recipe = state.get("version", VERSION), state.get("recipe")
    unknown = sorted(map(str, recipe.keys() - stored(Training()).keys())) if isinstance(recipe, dict) else []
    if unknown or type(version) is not int or version != VERSION:
        settings = f", with settings unknown here: {', '.join(unknown)}" if unknown else ""
        raise UsageError(f"{file} was written by another version of this code{settings}; resume it by that one")
    needed = {"model": dict, "recipe": dict, "progress": dict, "optimizer": dict, "generator": Tensor, "classes": list}
    needed |= {"training_images": int, "ranks": int}
    if isinstance(recipe, dict) and recipe.get("ema"):
        needed |= {"average": dict, "average_steps": int}
    wrong = [key for key, kind in needed.items() if not isinstance(state.get(key), kind)]
    wrong += ["average_steps"] if "average_steps" in needed and state.get("average_steps", 0) < 0 else []
    wrong += [key for key in ("checksums", "provenance") if not isinstance(state.get(key, {}), dict)]
    if wrong:
        raise UsageError(f"{file} cannot be resumed, it has no usable {', '.join(wrong)}; name a run's {STATE}")


def resumed_settings(command: Command, recipe: dict[str, Any]) -> tuple[Training, tuple[str, ...]]:
    """A run's own settings, but for the free ones that the command gives; and what these change, a line each.

    Errors: UsageError where the command gives any other setting than the run has it; a bare --resume, which means the
    command's own run, where any differs at all.
    """
    run = restored(recipe)
    bare = command.settings.resume is True
    free = set(FREE)
    if run.lr_schedule != "milestones":
        free.remove("epochs")  # the rate of every step depends on them
    if run.extra_data:
        free.add("extra_data")  # it may have moved, and has a checksum
    given = set(command.given)
    if given & {"device", "no_cuda"}:  # which say the device together
        given |= {"device", "no_cuda"}
    before, now = stored(run), stored(command.settings)
    differing = [name for name in before if before[name] != now[name] and name not in ("model_dir", *idle(run))]
    if wrong := [name for name in differing if name not in free and (bare or name in given)]:
        said = ", ".join(f"{flag(name)} {as_given(now[name])}, the run has {as_given(before[name])}" for name in wrong)
        runs = ", ".join(known_runs(command)) or "none"
        mend = "name the run by --resume PATH alone, or start one of its own without --resume"
        raise UsageError(f"--resume: {said}; {mend}; runs of this --model-dir: {runs}")
    changed = [name for name in differing if name in given]
    values = {name: getattr(command.settings, name) for name in changed}
    settings = replace(run, other_data=command.settings.other_data, **values)
    return settings, tuple(f"{flag(name)} {as_given(now[name])}, before {as_given(before[name])}" for name in changed)


def alike(value: object, template: object) -> bool:
    """Whether a value out of a file has the types, keys and shapes of a template, and finite numbers."""
    if isinstance(template, Tensor):
        same = ordinary(value) and value.dtype == template.dtype and value.shape == template.shape
        return same and bool(value.isfinite().all())
    if template is None or type(value) is not type(template):
        return value is template
    if isinstance(template, dict):
        return value.keys() == template.keys() and all(alike(value[key], template[key]) for key in template)
    return abs(value) < 2**63 if isinstance(value, int) else math.isfinite(value)


def usable(state: dict, parameters: list[Tensor], images: int) -> bool:
    """Whether optimiser and progress out of a file are those of a run with these parameters over so many images."""
    momenta = {index: {"momentum_buffer": parameter} for index, parameter in enumerate(parameters)}
    everything = torch.arange(images)
    try:
        for index, entry in state["optimizer"]["state"].items():
            if entry != {"momentum_buffer": None} and not alike(entry, momenta[index]):
                return False
        progress = state["progress"]
        order, done, rows = progress["order"], progress["done"], progress["rows"]
        if type(rows) is not list or not all(any(alike(row, known) for known in ROWS) for row in rows):
            return False
        begun = {"order": None, "sums": {}} if order is None else {"order": everything, "sums": SUMS}
        if not alike(progress | {"rows": None}, {"epoch": 1, "done": 0, "rows": None} | begun):
            return False
        epochs = [row["epoch"] for row in rows] + [progress["epoch"]]
        if epochs[0] < 1 or epochs[-1] >= 2**31 or epochs != list(range(epochs[0], epochs[0] + len(epochs))):
            return False
        if order is None:
            return done == 0
        timed = not done or progress["sums"]["seconds"] > 0
        return timed and 0 <= done <= images and torch.equal(order.sort().values, everything)
    except (AttributeError, KeyError, TypeError, ValueError, RuntimeError):
        return False
