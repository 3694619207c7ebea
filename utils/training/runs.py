"""The folders of runs: their names, who may write to them, and what a resumed run takes over."""

import os
import shutil
import zlib
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from utils.system.checkpoints import BEST, LAST, STATE, named_code, read
from utils.system.errors import UsageError
from utils.system.files import locked, remove_leftovers, require_writable
from utils.system.options import Command, flag
from utils.system.settings import (
    DECIDING,
    FREE,
    Training,
    arch_name,
    idle,
    is_code,
    stored,
    training_settings,
)
from utils.system.values import as_given

VERSION = 4  # of last_state.pt; other versions are not resumed

# What tells runs apart before any number does
KIND = ("method", "dataset", "norm", "arch", "no_ra", "no_anc", "optimizer")
# What the name of a published folder says
PUBLISHED = ("strategy", "alpha", "beta", "zeta", "seed")
HOW_TO_RESUME = "name a run by --resume PATH alone, or start one without --resume"
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
    "tensorboard",
    "test.log",
    "white_attack.json",
    "white_attack.blocks",
    "adversarial_examples.*",
    "robust_vs_*.*",
)


class Start(NamedTuple):
    """How a run starts: its settings and folder.

    state: what a resumed run goes on from; None for a new run.
    """

    settings: Training
    folder: Path
    state: dict | None = None


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

    folder = run_folder(command) if settings.resume is True else Path(settings.resume)
    if folder.name == STATE:
        folder = folder.parent
    file = folder / STATE
    if not file.is_file():
        raise UsageError(f"--resume: {file} does not exist; {HOW_TO_RESUME}")
    take_folder(folder, lock)  # before reading, since another process may write
    state = read(file)
    known_settings = stored(Training()).keys()
    if state.get("version") != VERSION or not state["recipe"].keys() <= known_settings:
        raise UsageError(f"{file} is of another version of this code, which can resume it")
    run = Training(**state["recipe"])
    if is_code(run.arch):
        named_code(run.arch, command.given.get("arch"), file)
    return Start(resumed_settings(command, run), folder, state)


def run_folder(command: Command) -> Path:
    """Return the folder of a command's run.

    Its name is {model_dir}-strategy-..-seed-.., as published, and what differs from the script's
    own recipe in settings on which results depend. A name that is too long for a file is cut; a
    checksum of the whole name ends it then.
    """
    folder = Path("-".join(_name_parts(command)))
    name = os.fsencode(folder.name)
    if len(name) <= LONGEST_NAME:
        return folder
    return folder.with_name(f"{os.fsdecode(name[: LONGEST_NAME - 9])}-{zlib.crc32(name):08x}")


def _name_parts(command: Command) -> Iterator[str]:
    """Yield the parts of the name of a command's run."""
    settings = command.settings
    script = training_settings({}, command.script)
    without_effect = idle(settings)
    yield settings.model_dir.rstrip("/\\")
    for name in PUBLISHED:
        if not settings.no_anc or name not in without_effect:
            yield f"{name}-{getattr(settings, name)}"

    told = set()
    if "model_dir" not in command.given and settings.model_dir != script.model_dir:
        told.add("method")  # by model_dir
    for name in KIND:
        value = getattr(settings, name)
        if name not in told and value != getattr(script, name):
            yield name.replace("_", "-") if value is True else arch_name(str(value))
    if settings.dataset == "folder":
        path = os.path.realpath(settings.data_dir)
        yield f"{Path(path).name}-{zlib.crc32(os.fsencode(path)) % 16**4:04x}"

    told.update(PUBLISHED, KIND, FREE, without_effect, ("model_dir", "ckpt_url", "tag"))
    kind = {name: getattr(settings, name) for name in DECIDING}
    usual = stored(training_settings(kind, command.script))
    for name, value in stored(settings).items():
        if name in told or value == usual[name]:
            continue
        if isinstance(value, tuple):
            value = ",".join(map(str, value))
        if name == "extra_data":
            value = Path(value).stem
        yield f"{name}-{value}"
    # Of other schedules the rate of each step depends on the number of epochs.
    if settings.lr_schedule != "milestones" and settings.epochs != usual["epochs"]:
        yield f"epochs-{settings.epochs}"
    if settings.tag:
        yield f"tag-{settings.tag}"


def resumed_settings(command: Command, run: Training) -> Training:
    """Return a run's settings, with the free ones that a command gives.

    Errors: UsageError where the command gives any other setting than the run has.
    """
    free = set(FREE)
    if run.lr_schedule != "milestones":
        free.remove("epochs")
    if is_code(run.arch):
        free.add("arch")  # the file may have moved
    if run.extra_data:
        free.add("extra_data")  # the file may have moved, and its content has a checksum
    given = set(command.given) - {"model_dir", *idle(run)}
    if given & {"device", "no_cuda"}:  # which say the device together
        given |= {"device", "no_cuda"}

    now = stored(command.settings)
    before = stored(run)
    refused = [
        f"{flag(name)} {as_given(now[name])}, the run has {as_given(before[name])}"
        for name in sorted((given - free) & now.keys())
        if now[name] != before[name]
    ]
    if refused:
        raise UsageError(f"--resume: {'; '.join(refused)}; {HOW_TO_RESUME}")
    values = {name: getattr(command.settings, name) for name in given & free}
    return replace(run, other_data=command.settings.other_data, **values)


def refuse_existing(folder: Path) -> None:
    """Raise UsageError where a folder holds a run."""
    if any(folder.glob("*.pt")) or (folder / "metrics.csv").exists():
        hint = "continue it by --resume, or name another --model-dir or a --tag"
        raise UsageError(f"{folder} holds a run already; {hint}; --overwrite replaces it")


def remove_existing(folder: Path) -> None:
    """Remove the files of a folder's run, and say so; other files stay."""
    for pattern in WRITTEN:
        for path in sorted(folder.glob(pattern)):
            print(f"--overwrite: removing {path}")
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink()


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


def take_new_folder(settings: Training, folder: Path, lock: ExitStack) -> None:
    """Take a folder for a new run; with --overwrite, remove the run that it holds."""
    take_folder(folder, lock)
    if settings.overwrite:
        remove_existing(folder)
    refuse_existing(folder)  # another process may have been faster
