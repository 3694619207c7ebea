"""Reads command lines into settings and refuses contradictions.

Nothing here loads PyTorch, so that --help and wrong flags are answered at once.
"""

import os
import sys
from collections.abc import Iterator, Mapping
from dataclasses import fields
from typing import Any, NamedTuple, get_type_hints

import tyro

from utils.system.settings import (
    ALL_ATTACKS,
    DEFAULTS_OF,
    Checkpoint,
    Evaluation,
    S,
    Training,
    Umap,
    resolve,
)
from utils.system.values import as_given


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
    defaults = resolve(Training, {}, script)
    parsed = _parsed(Training, doc + _other_defaults(), argv, default=defaults)
    given = {name: getattr(parsed, name) for name in _given(Training, argv)}
    settings = resolve(Training, given, script)
    _refuse_any(_contradictions_in_training(settings, given))
    return Command(settings, given, script)


def parse(cls: type[S], doc: str, argv: list[str]) -> S:
    """Parse the command line of another script; a wrong one ends the program with status 2."""
    settings = _parsed(cls, doc, argv)
    if isinstance(settings, Checkpoint):
        _refuse_any(_contradictions_in_checkpoint(settings))
    if isinstance(settings, Evaluation):
        _refuse_any(_contradictions_in_evaluation(settings))
    if isinstance(settings, Umap) and settings.labels is not None:
        _refuse_any(_contradictions_in_labels(settings.labels, settings.model_dir))
    return settings


def flag(name: str) -> str:
    """A setting as a command line names it."""
    return f"--{name.replace('_', '-')}"


def fitting(recipe: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of a stored recipe that a training has here."""
    known = {setting.name for setting in fields(Training)}
    return {name: value for name, value in recipe.items() if name in known}


def _parsed(cls: type[S], doc: str, argv: list[str], default: Any = tyro.MISSING_NONPROP) -> S:
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


def _given(cls: type[S], argv: list[str]) -> list[str]:
    """The names of the settings that a command line gives, which tyro does not tell."""
    setting_of = {}
    for name, hint in get_type_hints(cls, include_extras=True).items():
        setting_of[flag(name)] = name
        for extra in getattr(hint, "__metadata__", ()):
            for alias in getattr(extra, "aliases", None) or ():
                setting_of[alias] = name

    words = [word.partition("=")[0] if word.startswith("--") else word[:2] for word in argv]
    spelled = [word.replace("_", "-") for word in words]
    return [setting_of[word] for word in dict.fromkeys(spelled) if word in setting_of]


def _other_defaults() -> str:
    """What --help says of the defaults by data set, method and network."""
    lines = ["\n\nOther defaults:"]
    for owners, defaults in DEFAULTS_OF.items():
        lines.append(f"    {' and '.join(owners)}:")
        lines += [f"        {flag(name)} {as_given(value)}" for name, value in defaults.items()]
    return "\n".join(lines)


def _refuse_any(contradictions: Iterator[str]) -> None:
    """End the program with status 2 and the first of the contradictions, if there is one."""
    for message in contradictions:
        print(f"{os.path.basename(sys.argv[0])}: error: {message}", file=sys.stderr)
        sys.exit(2)


def _contradictions_in_training(settings: Training, given: Mapping[str, Any]) -> Iterator[str]:
    resumed = settings.resume is not None
    if bool(settings.restart_epoch) != bool(settings.ckpt_url):
        yield "--restart_epoch N and --ckpt_url PATH, the weights of epoch N, need each other"
    if settings.restart_epoch and resumed:
        yield "--restart_epoch starts a run from weights, --resume continues one; give one of them"
    if settings.overwrite and resumed:
        yield "--overwrite replaces a run, --resume continues it; give one of them"
    if settings.restart_epoch >= settings.epochs:
        restart = f"--restart_epoch {settings.restart_epoch}"
        yield f"{restart} leaves nothing to train; --epochs is {settings.epochs}"
    if settings.label_smoothing and settings.method == "mart":
        yield "--label-smoothing is of the cross-entropy of pgd and trades, not of mart's"
    if settings.extra_data and not 0 < settings.extra_images < settings.batch_size:
        share = f"--extra-fraction {settings.extra_fraction}"
        yield f"{share} takes {settings.extra_images} of {settings.batch_size} images of a batch"
    if resumed:  # the run's own settings count
        return
    gate_or_blocks = (settings.gate, settings.ra_blocks)
    if settings.no_ra and gate_or_blocks != (Training.gate, Training.ra_blocks):
        yield "--gate and --ra-blocks are of reverse attention, which is off; leave them out"
    if "extra_fraction" in given and not settings.extra_data:
        yield "--extra-fraction is a share of --extra-data, which is missing; leave it out"
    if "awp_warmup" in given and "awp" not in given and not settings.awp:
        yield "--awp-warmup delays --awp, which is missing; leave it out"
    if settings.warmup_lr >= settings.epochs:
        warmup = f"--warmup-lr {settings.warmup_lr}"
        yield f"{warmup} leaves no epoch after the warm-up; --epochs is {settings.epochs}"
    if settings.awp and settings.awp_warmup >= settings.epochs:
        warmup = f"all {settings.epochs} epochs are its warm-up"
        yield f"--awp never acts: {warmup}; lower --awp-warmup"


def _contradictions_in_checkpoint(settings: Checkpoint) -> Iterator[str]:
    if settings.no_ra and _asks_for_reverse_attention(settings):
        yield "--gate, --ra-blocks and --predict contradict --no-ra; leave them out"
    if (settings.mean is None) != (settings.std is None):
        yield "--mean and --std need each other, such as --mean cifar10 --std cifar10"


def _asks_for_reverse_attention(settings: Checkpoint) -> bool:
    return (
        settings.gate not in (None, Training.gate)
        or settings.ra_blocks not in (None, Training.ra_blocks)
        or settings.predict != Checkpoint.predict
    )


def _contradictions_in_evaluation(settings: Evaluation) -> Iterator[str]:
    runs = settings.ckpt_url or ()
    if bool(runs) == (settings.model is not None):
        yield "give either --ckpt_url PATH, a checkpoint file or a run folder, or --model M:F"
    if settings.model is not None and _asks_for_reverse_attention(settings):
        yield "--gate, --ra-blocks and --predict contradict --model; leave them out"
    if len(set(runs)) < len(runs):
        yield "--ckpt_url names a run twice"
    if len(runs) > 1 and (settings.save_adversarial or settings.log_path):
        yield "--save-adversarial and --log_path are of one run, and --ckpt_url names several"
    size = settings.image_size
    if runs and size is not None and (size < 16 or size % 8):
        yield f"--image-size {size} is not a multiple of 8 of at least 16"
    asked_for_transfer = "transfer" in settings.attacks and settings.attacks != ALL_ATTACKS
    if asked_for_transfer and settings.surrogate is None:
        yield "--attacks transfer needs --surrogate, a checkpoint that gives the gradients"


def _contradictions_in_labels(labels: tuple[str, ...], runs: tuple[str, ...]) -> Iterator[str]:
    if len(set(labels)) < len(labels):
        yield "--labels names two panels alike"
    if len(labels) != len(runs):
        yield f"--labels names {len(labels)} panels and --model_dir {len(runs)}"
