"""Reads command lines, and the files of --config, into settings and refuses contradictions.

Nothing here loads PyTorch, so that --help and wrong flags are answered at once.
"""

import json
import os
import sys
from pathlib import Path
from typing import Any, NamedTuple, NoReturn, TypedDict, TypeVar, get_type_hints

import tyro

from utils.system.command import end
from utils.system.settings import (
    ALL_ATTACKS,
    DEFAULTS_OF,
    OF_A_COMMAND,
    Checkpoint,
    Evaluation,
    FromFile,
    Training,
    Umap,
    Values,
    beyond_all_images,
    training_settings,
)
from utils.system.values import as_given

T = TypeVar("T")


class Command(NamedTuple):
    """What a training command asks for.

    given: the settings that the command itself names; script: the script's own recipe. seeds: those
    that it names; settings have the first.
    """

    settings: Training
    given: Values
    script: Values
    seeds: tuple[int, ...] = ()


def parse_training(doc: str, script: Values, argv: list[str]) -> Command:
    """Parse the command line of a training script; a wrong one ends the program with status 2.

    doc: description for --help; script: the script's own recipe.
    """
    from_file = _from_file(Training, argv)
    default = training_settings(from_file, script)
    _parsed(Training, argv, doc + _other_defaults(), default)
    # A run's file names its --model-dir, whether or not the run's command did.
    others = {name: value for name, value in from_file.items() if name != "model_dir"}
    if training_settings(others, script) == default:
        from_file = others
    given = from_file | _given(Training, argv)
    seeds = given.get("seed", ())
    if len(set(seeds)) < len(seeds):
        _refuse(f"--seed {as_given(seeds)} names a seed twice; name each once")
    if seeds:
        given["seed"] = seeds[0]
    settings = training_settings(given, script)
    _refuse_contradictions_in_training(settings, len(seeds))
    return Command(settings, given, script, seeds)


def parse(cls: type[T], doc: str, argv: list[str]) -> T:
    """Parse the command line of another script; a wrong one ends the program with status 2."""
    settings = _parsed(cls, argv, doc, cls(**_from_file(cls, argv)))
    _refuse_contradictions(settings)
    return settings


def flag(name: str) -> str:
    """A setting as a command line names it."""
    return f"--{name.replace('_', '-')}"


def _from_file(cls: type, argv: list[str]) -> Values:
    """Return the settings of `cls` in the file of --config, if a command line has that flag.

    Each entry counts as the flag of its name, with - or _. Lists stand for several values, and null
    leaves a setting unset.
    """
    known, _ = tyro.cli(FromFile, args=argv, return_unknown_args=True, add_help=False)
    file = known.config
    if file is None:
        return {}
    flags = []
    for name, value in _content(file).items():
        if isinstance(value, dict):
            _refuse(f"--config {file}: {name} takes a number, a word, a list or null")
        if name.replace("-", "_") in OF_A_COMMAND:
            _refuse(f"--config {file}: {name} is of a command line alone")
        if isinstance(value, list):
            flags += [f"--{name}", *map(str, value)]
        elif value is not None:
            flags.append(f"--{name}={as_given(value)}")
    try:
        return _given(cls, flags)
    except SystemExit:
        _refuse(f"--config {file}: its entries count as flags, and one is refused above")


def _content(file: str) -> dict:
    """Return what a file says in JSON, or in YAML where its name ends so; of a run.json `settings`.

    A file that cannot be read, or maps nothing, ends the program with status 2.
    """
    try:
        text = Path(file).read_text(encoding="utf-8")
        if file.endswith((".yaml", ".yml")):
            import yaml  # no requirement of this code

            content = yaml.safe_load(text)
        else:
            content = json.loads(text)
    except Exception as error:  # each reader has its own
        problem = " ".join(str(error).split())
        _refuse(f"--config {file}: {problem}; it is JSON, or YAML by `pip install pyyaml`")
    if isinstance(content, dict):
        content = content.get("settings", content)
    if not isinstance(content, dict):
        _refuse(f"--config {file}: it must map names of settings to values")
    return content


def _given(cls: type, argv: list[str]) -> Values:
    """Return the settings of `cls` that a command line names."""
    kinds = get_type_hints(cls, include_extras=True)
    return _parsed(TypedDict("Given", kinds, total=False), argv)


def _parsed(cls: type[T], argv: list[str], doc: str = "", default: Any = tyro.MISSING_NONPROP) -> T:
    """What tyro reads from a command line; settings that it does not name are those of default."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # whatever the console's own encoding is
            stream.reconfigure(encoding="utf-8", errors="backslashreplace")
    try:
        return tyro.cli(
            cls,
            description=doc,
            args=argv,
            default=default,
            config=(tyro.conf.DisallowNone, tyro.conf.FlagConversionOff),
        )
    except BrokenPipeError:  # of `--help | head`
        os._exit(1)


def _other_defaults() -> str:
    """What --help says of the defaults by data set, method and network."""
    lines = ["\n\nOther defaults, by data set, method, network, optimiser and norm:"]
    for owners, defaults in DEFAULTS_OF.items():
        flags = [
            f"{flag(name)} {as_given(value)}"
            for name, value in defaults.items()
            if value is not None
        ]
        lines.append(f"    {' and '.join(owners)}: {' '.join(flags)}")
    return "\n".join(lines)


def _refuse(message: str) -> NoReturn:
    end(2, f"error: {message}")


def _refuse_contradictions_in_training(settings: Training, seeds: int) -> None:
    side = settings.image_size
    if side < 16 or side % 8:
        _refuse("--image-size takes a multiple of 8, from 16 on")
    if problem := beyond_all_images(settings.norm, settings.epsilon, settings.step_size, side):
        _refuse(problem)
    if bool(settings.restart_epoch) != bool(settings.ckpt_url):
        _refuse("--restart_epoch N and --ckpt_url PATH, the weights of epoch N, need each other")
    if settings.restart_epoch >= settings.epochs:
        _refuse(f"--restart_epoch leaves nothing to train; --epochs is {settings.epochs}")
    if settings.label_smoothing and settings.method not in ("pgd", "trades"):
        _refuse(f"--label-smoothing is of the losses of pgd and trades, not of {settings.method}'s")
    if settings.extra_data and not 0 < settings.extra_images < settings.batch_size:
        _refuse("--extra-fraction leaves no image of one kind in a batch of --batch-size")
    if settings.jobs > 1 and seeds < 2:
        _refuse("--jobs is of several seeds, such as --seed 1,2,3")
    if settings.resume is not None:
        if seeds > 1:
            _refuse("several seeds are resumed by the same command; leave --resume out")
        if settings.overwrite:
            _refuse("--resume continues a run, --overwrite starts one")
    elif settings.awp and settings.awp_warmup >= settings.epochs:
        _refuse("--awp never acts within --epochs; lower --awp-warmup")


def _refuse_contradictions(settings: object) -> None:
    if isinstance(settings, Checkpoint) and len(settings.mean or ()) != len(settings.std or ()):
        _refuse("--mean and --std need each other, such as --mean cifar10 --std cifar10")
    if isinstance(settings, Evaluation):
        runs = settings.ckpt_url
        if bool(runs) == bool(settings.model):
            _refuse(
                "give either --ckpt_url PATH, a checkpoint file or a run folder, or --model M:F"
            )
        if len(runs) > 1 and (settings.save_adversarial or settings.log_path):
            _refuse(
                "--save-adversarial and --log_path are of one run, and --ckpt_url names several"
            )
        if settings.diagnostics and settings.epsilon == 0:
            _refuse("--diagnostics looks at balls around eps; give --epsilon above 0")
        asked_for_transfer = "transfer" in settings.attacks and settings.attacks != ALL_ATTACKS
        if asked_for_transfer and settings.surrogate is None:
            _refuse("--attacks transfer needs --surrogate, a checkpoint that gives the gradients")
    if isinstance(settings, Umap):
        panels = settings.model_dir
        if not panels or len(settings.labels or panels) != len(panels):
            _refuse(
                "--model_dir needs a path for each panel, and --labels, if given, a name for each"
            )
