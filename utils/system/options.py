"""Reads command lines into settings and refuses contradictions.

Nothing here loads PyTorch, so that --help and wrong flags are answered at once.
"""

import os
import sys
from collections.abc import Iterator
from typing import Any, NamedTuple, TypedDict, TypeVar, get_type_hints

import tyro

from utils.system.settings import (
    ALL_ATTACKS,
    DEFAULTS_OF,
    Checkpoint,
    Evaluation,
    Training,
    Umap,
    training_settings,
)
from utils.system.values import as_given

T = TypeVar("T")

# The settings of a training that a command gives, whatever their defaults
Given = TypedDict("Given", get_type_hints(Training, include_extras=True), total=False)


class Command(NamedTuple):
    """What a training command asks for.

    given: the settings that the command itself names; script: the script's own recipe.
    """

    settings: Training
    given: dict[str, Any]
    script: dict[str, Any]


def parse_training(doc: str, script: dict[str, Any], argv: list[str]) -> Command:
    """Parse the command line of a training script; a wrong one ends the program with status 2.

    doc: description for --help; script: the script's own recipe.
    """
    _parsed(Training, doc + _other_defaults(), argv, default=training_settings({}, script))
    given = _parsed(Given, doc, argv)
    settings = training_settings(given, script)
    _refuse_any(_contradictions_in_training(settings))
    return Command(settings, given, script)


def parse(cls: type[T], doc: str, argv: list[str]) -> T:
    """Parse the command line of another script; a wrong one ends the program with status 2."""
    settings = _parsed(cls, doc, argv)
    _refuse_any(_contradictions(settings))
    return settings


def flag(name: str) -> str:
    """A setting as a command line names it."""
    return f"--{name.replace('_', '-')}"


def _parsed(cls: type[T], doc: str, argv: list[str], default: Any = tyro.MISSING_NONPROP) -> T:
    """What tyro reads from a command line; settings that it does not name are those of default."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # whatever the console's own encoding is
            stream.reconfigure(encoding="utf-8", errors="backslashreplace")
    return tyro.cli(
        cls,
        prog=os.path.basename(sys.argv[0]),
        description=doc,
        args=argv,
        default=default,
        config=(tyro.conf.DisallowNone,),
    )


def _other_defaults() -> str:
    """What --help says of the defaults by data set, method and network."""
    lines = ["\n\nOther defaults:"]
    for owners, defaults in DEFAULTS_OF.items():
        flags = [f"{flag(name)} {as_given(value)}" for name, value in defaults.items()]
        lines.append(f"    {' and '.join(owners)}: {' '.join(flags)}")
    return "\n".join(lines)


def _refuse_any(contradictions: Iterator[str]) -> None:
    """End the program with status 2 and the first of the contradictions, if there is one."""
    for message in contradictions:
        print(f"{os.path.basename(sys.argv[0])}: error: {message}", file=sys.stderr)
        sys.exit(2)


def _contradictions_in_training(settings: Training) -> Iterator[str]:
    if bool(settings.restart_epoch) != bool(settings.ckpt_url):
        yield "--restart_epoch N and --ckpt_url PATH, the weights of epoch N, need each other"
    if settings.restart_epoch >= settings.epochs:
        yield f"--restart_epoch leaves nothing to train; --epochs is {settings.epochs}"
    if settings.label_smoothing and settings.method == "mart":
        yield "--label-smoothing is of the cross-entropy of pgd and trades, not of mart's"
    if settings.extra_data and not 0 < settings.extra_images < settings.batch_size:
        yield "--extra-fraction leaves no image of one kind in a batch of --batch-size"
    if settings.resume is not None:
        if settings.restart_epoch or settings.overwrite:
            yield "--resume continues a run, --restart_epoch and --overwrite start one"
    elif settings.awp and settings.awp_warmup >= settings.epochs:
        yield "--awp never acts within --epochs; lower --awp-warmup"


def _contradictions(settings: object) -> Iterator[str]:
    if isinstance(settings, Checkpoint) and len(settings.mean or ()) != len(settings.std or ()):
        yield "--mean and --std need each other, such as --mean cifar10 --std cifar10"
    if isinstance(settings, Evaluation):
        runs = settings.ckpt_url or ()
        if bool(runs) == bool(settings.model):
            yield "give either --ckpt_url PATH, a checkpoint file or a run folder, or --model M:F"
        if len(runs) > 1 and (settings.save_adversarial or settings.log_path):
            yield "--save-adversarial and --log_path are of one run, and --ckpt_url names several"
        asked_for_transfer = "transfer" in settings.attacks and settings.attacks != ALL_ATTACKS
        if asked_for_transfer and settings.surrogate is None:
            yield "--attacks transfer needs --surrogate, a checkpoint that gives the gradients"
    if isinstance(settings, Umap):
        panels = len(settings.model_dir)
        if len(settings.labels or settings.model_dir) != panels or panels == 0:
            yield "--model_dir needs a path for each panel, and --labels, if given, a name for each"
