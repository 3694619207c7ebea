"""The folders of runs: their names, who may write to them, and what a resumed run takes over."""

import glob
import json
import os
import zlib
from collections.abc import Iterable, Sequence
from contextlib import ExitStack, suppress
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from utils.system.checkpoints import BEST, LAST, STATE, read
from utils.system.errors import UsageError
from utils.system.files import locked, remove_leftovers, require_writable
from utils.system.options import Command, flag
from utils.system.settings import (
    ARCHS,
    DATASETS,
    FREE,
    GATES,
    METHODS,
    Training,
    idle,
    resolve,
    restored,
    stored,
)
from utils.system.values import as_given

VERSION = 2  # of last_state.pt; other versions are not resumed

# What tells runs apart before any number does
KIND = ("method", "dataset", "arch", "no_ra", "no_anc")
# What the name of a published folder says
PUBLISHED = ("strategy", "alpha", "beta", "zeta", "seed")
LONGEST_NAME = 200  # bytes; file systems allow 255

# What a run and its evaluation write into the folder: what --overwrite removes
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


class Start(NamedTuple):
    """How a run starts: its settings and folder.

    state: what a resumed run goes on from, the content of `file`; None for a new run. changes: the
    settings that a resumed run has other than before, a line each.
    """

    settings: Training
    folder: Path
    state: dict | None = None
    file: Path | None = None
    changes: Sequence[str] = ()


def prepare(command: Command, lock: ExitStack) -> Start:
    """Return how the run of a command starts.

    The folder of a resumed run is locked until `lock` closes.
    """
    settings = command.settings
    if settings.resume is None:
        folder = run_folder(command)
        if not settings.overwrite:
            refuse_existing(folder)
        return Start(settings, folder)

    file = run_to_resume(command) if settings.resume is True else Path(settings.resume)
    if not file.is_file():
        file = file / STATE
    if not file.is_file():
        hint = "start the run without --resume, or name its folder"
        raise UsageError(f"--resume: {file} does not exist; {hint}")
    take_folder(file.parent, lock)  # before reading, since another process may write
    state = read(file)
    if state.get("version") != VERSION:
        hint = "name a run's folder, or use the version that wrote it"
        raise UsageError(f"{file} cannot be resumed: it is no {STATE} of this version; {hint}")
    refuse_unknown(state["recipe"], file)
    settings, changes = resumed_settings(command, state["recipe"])
    return Start(settings, file.parent, state, file, changes)


def refuse_unknown(recipe: dict, file: Path) -> None:
    """Raise UsageError where a run has settings, methods or the like that this code does not know.

    They are those of a copy of this code that was changed for an idea.
    """
    known = stored(Training())
    registries = {"method": METHODS, "dataset": DATASETS, "arch": ARCHS, "gate": GATES}
    unknown = sorted(recipe.keys() - known.keys())
    unknown += [
        f"{key} {recipe[key]}" for key, names in registries.items() if recipe[key] not in names
    ]
    if unknown:
        hint = "resume it by the code that wrote it"
        raise UsageError(f"{file} has settings unknown here: {', '.join(unknown)}; {hint}")


def defining_settings(settings: Training) -> dict:
    """Return the settings on which a run's results depend, as they are stored."""
    excluded = {"model_dir", "ckpt_url", *FREE, *idle(settings)}
    chosen = {name: value for name, value in stored(settings).items() if name not in excluded}
    if settings.lr_schedule != "milestones":  # the rate of each step depends on their number
        chosen["epochs"] = settings.epochs
    if settings.dataset == "folder":
        chosen["data_dir"] = os.path.realpath(settings.data_dir)
    return chosen


def run_folder(command: Command) -> Path:
    """Return the folder of a command's run.

    Its name is {model_dir}-strategy-..-seed-.., as published, and what differs from the script's
    own recipe.
    """
    settings = command.settings
    script = resolve({}, command.script)
    chosen = defining_settings(settings)
    published = [name for name in PUBLISHED if name in chosen or not settings.no_anc]
    parts = [settings.model_dir.rstrip("/\\")]
    parts += [f"{name}-{getattr(settings, name)}" for name in published]

    method_in_model_dir = (
        "model_dir" not in command.given and settings.model_dir != script.model_dir
    )
    for name in KIND:
        value = getattr(settings, name)
        if value == getattr(script, name) or (name == "method" and method_in_model_dir):
            continue
        parts.append(name.replace("_", "-") if value is True else str(value))

    if "data_dir" in chosen:
        path = os.fsencode(chosen["data_dir"])
        parts.append(f"{Path(chosen['data_dir']).name}-{zlib.crc32(path) % 16**4:04x}")

    kind = {name: getattr(settings, name) for name in ("dataset", "method", "arch")}
    usual = stored(resolve(kind, command.script))
    for name, value in chosen.items():
        if name in (*PUBLISHED, *KIND, "data_dir", "tag") or value == usual[name]:
            continue
        if isinstance(value, list):
            value = ",".join(map(str, value))
        if name == "extra_data":
            value = Path(value).stem
        parts.append(f"{name}-{value}")
    if settings.tag:
        parts.append(f"tag-{settings.tag}")
    return shortened(Path("-".join(parts)))


def shortened(folder: Path) -> Path:
    """Cut a name that is too long for a file; a checksum of the whole name ends it then."""
    name = os.fsencode(folder.name)
    if len(name) <= LONGEST_NAME:
        return folder
    return folder.with_name(f"{os.fsdecode(name[: LONGEST_NAME - 9])}-{zlib.crc32(name):08x}")


def run_to_resume(command: Command) -> Path:
    """Return the folder of the run that --resume alone means, which is the command's own.

    Errors: UsageError where it does not exist, which names the runs that there are.
    """
    folder = run_folder(command)
    if (folder / STATE).is_file():
        return folder
    hint = "start the run without --resume, or name its folder"
    if runs := known_runs(command):
        hint = f"name a run by --resume PATH: {', '.join(runs)}"
    raise UsageError(f"--resume: {folder / STATE} does not exist; {hint}")


def known_runs(command: Command) -> list[str]:
    """List the runs of a command's --model-dir, and what each has other than the command.

    The most similar come first.
    """
    wanted = defining_settings(command.settings)
    pattern = f"{glob.escape(Path(command.settings.model_dir).name)}-*/{STATE}"
    runs = []
    for file in run_folder(command).parent.glob(pattern):
        changes = ["unknown settings"]
        with suppress(OSError, ValueError, LookupError, TypeError):  # of another version
            record = json.loads((file.parent / "run.json").read_text(encoding="utf-8"))
            present = defining_settings(restored(record["settings"]))
            changes = differences(wanted, present, wanted.keys() & present.keys())
        text = "; ".join(changes) or "the same settings"
        runs.append((len(changes), f"{file.parent} ({text})"))
    return [run for _, run in sorted(runs)[:5]]


def differences(now: dict, before: dict, names: Iterable[str]) -> list[str]:
    """Say which of these settings a command gives other than a run had them."""
    return [
        f"{flag(name)} {as_given(now[name])}, the run has {as_given(before[name])}"
        for name in sorted(names)
        if now[name] != before[name]
    ]


def resumed_settings(command: Command, recipe: dict) -> tuple[Training, list[str]]:
    """Return a run's settings, with the free ones that a command gives, and what these change.

    Errors: UsageError where the command gives any other setting than the run has, or, with --resume
    alone, which means the command's own run, where any setting differs.
    """
    run = restored(recipe)
    free = set(FREE)
    if run.lr_schedule != "milestones":
        free.remove("epochs")
    if run.extra_data:
        free.add("extra_data")  # the file may have moved, and its content has a checksum
    given = set(command.given)
    if given & {"device", "no_cuda"}:  # which say the device together
        given |= {"device", "no_cuda"}

    now = stored(command.settings)
    before = stored(run)
    acting = now.keys() - {"model_dir", *idle(run)}
    compared = acting if command.settings.resume is True else acting & given
    if refused := differences(now, before, compared - free):
        runs = ", ".join(known_runs(command)) or "none"
        hint = "name the run by --resume PATH alone, or start one of its own without --resume"
        message = f"--resume: {'; '.join(refused)}; {hint}"
        raise UsageError(f"{message}; runs of this --model-dir: {runs}")

    changed = acting & given & free
    values = {name: getattr(command.settings, name) for name in changed}
    settings = replace(run, other_data=command.settings.other_data, **values)
    return settings, differences(now, before, changed)


def refuse_existing(folder: Path) -> None:
    """Raise UsageError where a folder holds a run, unless it ended before its first step."""
    files = [*folder.glob("*.pt"), *folder.glob("metrics.csv")]
    if files == [folder / STATE]:
        with suppress(UsageError):  # a truncated state is somebody's, too
            progress = read(folder / STATE).get("progress", {})
            if progress.get("order", 0) is None:
                return
    if files:
        hint = "continue it by --resume, or name another --model-dir or a --tag"
        raise UsageError(f"{folder} holds a run already; {hint}; --overwrite replaces it")


def remove_existing(folder: Path) -> None:
    """Remove the files of a folder's run, and say so; other files stay."""
    files = sorted({file for pattern in WRITTEN for file in folder.glob(pattern)})
    if not files:
        return
    names = dict.fromkeys(file.relative_to(folder).parts[0] for file in files)
    print(f"--overwrite: the run in {folder} is lost: {', '.join(names)}")
    for file in files:
        file.unlink()
    for subfolder in {file.parent for file in files} - {folder}:
        with suppress(OSError):  # other files lie in it
            subfolder.rmdir()


def take_folder(folder: Path, lock: ExitStack) -> None:
    """Keep other processes out of a run folder until `lock` closes, and clear half-written files.

    Of a distributed run the first rank alone writes, and it alone locks the folder.
    """
    require_writable(folder, "name another --model-dir")
    try:
        lock.enter_context(locked(folder / ".lock", wait=False))
    except TimeoutError:
        hint = "wait for it, or name another --model-dir"
        raise UsageError(f"another process writes to {folder}; {hint}") from None
    remove_leftovers(folder)
