"""Command lines, made from `recipes`, and what a wrong use says. Imports nothing slow: --help answers at once."""

import argparse
import math
import os
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from difflib import get_close_matches
from functools import partial
from typing import Any, NamedTuple, NoReturn

from utils.system import settings as recipes
from utils.system.errors import GRACE, first_process
from utils.system.settings import (
    ALL_ATTACKS,
    ATTACKS,
    SWITCH,
    TRUTH,
    Evaluation,
    Kind,
    S,
    Setting,
    Training,
    Umap,
    described,
    idle,
    resolve,
)


class Command(NamedTuple):
    """What a training command asks for. given: what the command itself says; script: the script's own defaults."""

    settings: Training
    given: dict[str, Any]
    script: dict[str, Any]


def _wrong(message: str) -> NoReturn:
    raise argparse.ArgumentTypeError(message)


def near(text: str, known: Iterable[str]) -> str:
    """`; did you mean A or B?`, of the names that begin with a text or resemble it; nothing where none does."""
    names = {name.lower().replace("_", "-").strip("-"): name for name in reversed([*known])}  # the first spelling
    text = text.lower().replace("_", "-").strip("-")
    same = [name for name in names if name.replace("-", "") == text.replace("-", "")]
    begin = sorted((name for name in names if text and name.startswith(text)), key=len)
    found = same or begin[:3] or get_close_matches(text, names, 2)
    return f"; did you mean {' or '.join(names[name] for name in found)}?" if found else ""


def _choice(known: tuple[str, ...], text: str) -> str:
    return text if text in known else _wrong(f"invalid choice: {text!r} (of {', '.join(known)}){near(text, known)}")


def _number(kind: Kind, text: str) -> float:
    """A real number; fractions such as 8/255 will do."""
    value = math.nan
    with suppress(ValueError, ZeroDivisionError):
        over, _, under = text.partition("/")
        value = float(over) / float(under) if under else float(over)
        excluded = [kind.low] * kind.above + [kind.high] * kind.below
        if kind.low <= value <= kind.high and math.isfinite(value) and value not in excluded:
            return value
    high = "" if kind.high == math.inf else f" and {'below' if kind.below else 'at most'} {kind.high:g}"
    meant = f"; did you mean {value:g}/{kind.of}?" if kind.of and kind.high < value <= kind.of else ""
    _wrong(f"{text!r} is not a number {'above' if kind.above else 'of at least'} {kind.low:g}{high}{meant}")


def _whole(kind: Kind, text: str) -> int:
    with suppress(ValueError):
        if kind.low <= int(text) <= kind.high:
            return int(text)
    bound = f"of at least {kind.low}" if kind.high == 2**31 - 1 else f"from {kind.low} to {kind.high}"
    _wrong(f"{text!r} is not a whole number {bound}")


def _side(kind: Kind, text: str) -> int:
    """Side of an image: a multiple of 8, so that every stage's map has at least 2x2 cells."""
    value = _whole(kind, text)
    return value if value % 8 == 0 else _wrong(f"{text!r} is not a multiple of 8")


def _epochs(kind: Kind, text: str) -> tuple[int, ...]:
    """Epochs, rising, separated by commas; `none` for none."""
    epochs = [] if text == "none" else [_whole(Kind("whole", 1, 2**31 - 1), part) for part in text.split(",")]
    if epochs != sorted(set(epochs)):
        _wrong(f"{text!r} does not rise; write epochs such as 75,90,100")
    return tuple(epochs)


def _attacks(kind: Kind, text: str) -> tuple[str, ...]:
    names = ALL_ATTACKS if text == "all" else [name.strip() for name in text.split(",")]
    for name in names:
        if name not in ATTACKS:
            _wrong(f"{name!r} is none of {', '.join(ATTACKS)}, all{near(name, (*ATTACKS, 'all'))}")
    return tuple(dict.fromkeys(names))


def _channels(kind: Kind, text: str) -> tuple[float, ...]:
    """A number for each of red, green and blue, or published ones by name."""
    known = recipes.NORMALISATIONS
    if text in known:
        return known[text][kind.name]
    parts = text.strip("()[] ").split(",")
    if len(parts) != 3:
        _wrong(f"{text!r} is neither three numbers, such as 0.49,0.48,0.45, nor one of {', '.join(known)}")
    return tuple(_number(kind, part) for part in parts)


def _truth(kind: Kind, text: str) -> bool:
    """True or False, in the usual spellings."""
    known = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}
    return known[text.lower()] if text.lower() in known else _wrong(f"{text!r} is neither True nor False")


def _path(kind: Kind, text: str) -> str:
    """Any path that the system takes, even where the console cannot show it."""
    return os.path.expanduser(text) if text.strip() else _wrong("an empty path")


def _file_name(kind: Kind, text: str) -> str:
    """Part of a file's name, without folders and what some system forbids there."""
    if not text.strip() or text.startswith(".") or not text.isprintable() or set(text) & set('/\\:*?"<>|'):
        _wrong(f"{text!r} is not a file name; folders go into --out or --model-dir")
    return text


READERS: dict[str, Callable[[Kind, str], Any]] = {
    "word": lambda kind, text: text if text.strip() else _wrong("an empty name"),
    "number": _number, "whole": _whole, "side": _side, "epochs": _epochs, "attacks": _attacks, "truth": _truth,
    "path": _path, "path or own": _path, "file name": _file_name, "mean": _channels, "std": _channels,
}  # fmt: skip
METAVARS = {"number": "X", "epochs": "E,E", "attacks": "A,A", "truth": "BOOL", "path": "PATH", "path or own": "PATH"}
METAVARS |= {"mean": "R,G,B", "std": "R,G,B", "word": "NAME"}


class OneLineParser(argparse.ArgumentParser):
    """What is wrong is said in one line, without the usage."""

    def error(self, message: str) -> NoReturn:
        if not first_process():
            time.sleep(GRACE)
            sys.exit(2)
        self.exit(2, f"{self.prog}: error: {message}\n")


class Parser(OneLineParser):
    """Flags of a class of settings in both spellings (--model-dir, --model_dir)."""

    def __init__(self, cls: type[S], doc: str, script: dict[str, Any] | None = None) -> None:
        super().__init__(
            description=doc,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
            argument_default=argparse.SUPPRESS,
        )
        defaults, group = resolve(cls, {}, script or {}), self
        for name, about in described(cls).items():
            group = self.add_argument_group(about.group) if about.group else group
            self._flag(group.add_argument, name, about, getattr(defaults, name))

    def _flag(self, add: Callable, name: str, about: Setting, default: object) -> None:
        first = [f"--{name.replace('_', '-')}", *about.also]
        others = [f"--{flag[2:].replace(old, new)}" for flag in first if flag[:2] == "--" for old, new in ("_-", "-_")]
        spellings = dict.fromkeys([*first, *others])
        text, how = about.help + "; required" * about.required, {"nargs": "+"} if about.several else {}
        if isinstance(about.kind, tuple):
            how |= {"type": partial(_choice, about.kind), "metavar": f"{{{','.join(about.kind)}}}"}
        elif about.kind.name == "switch":
            how["action"] = "store_true"
        else:
            how["type"] = partial(READERS[about.kind.name], about.kind)
            how["metavar"] = METAVARS.get(about.kind.name, "N" if about.kind.name in ("whole", "side") else "NAME")
            if about.kind.name in ("truth", "path or own"):
                how |= {"nargs": "?", "const": True}
        others = [f"{as_given(names)}: {as_given(v)}" for names, v in about.by.items() if v != default]
        if (default is not None or others) and "action" not in how:
            usual = "as published" if default is None else as_given(default)
            text += f" (default: {'; '.join([usual, *others])})"
        add(*spellings, dest=name, help=text.replace("%", "%%"), **how)

    def read(self, argv: list[str]) -> dict[str, Any]:
        """What a command line gives, by setting. Exits with status 2 where it is wrong."""
        for arg in argv:
            flag, _, value = arg.partition("=")
            if value == "--" and flag.startswith("-"):  # argparse takes it for no value at all and says nothing
                self.error(f"argument {flag}: expected a value, not '--'")
        given, unknown = self.parse_known_args(argv)
        if unknown:
            flag = next((arg for arg in unknown if arg.startswith("-")), "").partition("=")[0]
            words = flag.strip("-").replace("_", " ").replace("-", " ").lower()  # of a help, such as learning rate
            said = [a.option_strings[0] for a in self._actions if words and f"{words} " in f"{a.help} "]
            meant = near(flag, self._option_string_actions) or near(said[0] if said else "", said)
            meant = meant if flag else "; a value follows its flag, such as --dataset digits, several A,B by commas"
            self.error(f"unrecognized arguments: {' '.join(unknown)}{meant}")
        return {name: tuple(value) if isinstance(value, list) else value for name, value in vars(given).items()}

    def say_idle(self, names: tuple[str, ...], given: dict[str, Any]) -> None:
        """One line on standard error that names the flags given without an effect."""
        idle = ", ".join(f"--{name}" for name in names if name in given)
        if idle and first_process():
            print(f"{self.prog}: {idle} accepted, no effect here", file=sys.stderr)


def flag(name: str) -> str:
    """A setting as a command line names it."""
    return f"--{name.replace('_', '-')}"


def as_given(value: object) -> str:
    """A setting's value as a command line says it: 75,90,100 and 8/255."""
    if isinstance(value, tuple | list):
        return ",".join(map(str, value)) or "none"
    short = eps_text(value) if isinstance(value, float) and 0 < value < 1 else ""
    return short if short.endswith("/255") and float(short[:-4]) / 255 == value else str(value)


def eps_text(eps: float) -> str:
    """An eps or a step as the field writes it: 8/255, 0.5/255, but 0.1 and 0.007, which are short as they are."""
    quarters = round(1020 * eps)
    fraction = abs(1020 * eps - quarters) < 1e-4 and abs(float(f"{eps:.3g}") - eps) > 1e-9
    return f"{quarters / 4:g}/255" if fraction else f"{eps:.4g}"


def fits(name: str, value: object) -> bool:
    """Whether a training command can have given a setting this stored value; a file's values may be anything."""
    kind = described(Training)[name].kind
    if value is None:
        return getattr(Training, name) is None
    if kind in (SWITCH, TRUTH):
        return type(value) is bool
    if type(value) is list and all(type(part) is int for part in value):
        value = tuple(value)
    if type(value) not in (int, float, str, tuple):
        return False
    try:
        return value in kind if isinstance(kind, tuple) else READERS[kind.name](kind, as_given(value)) == value
    except (argparse.ArgumentTypeError, ValueError, KeyError):
        return False


# Settings that act only beside another, and that one
BELONGS = {"awp_warmup": "--awp", "extra_fraction": "--extra-data"}
BELONGS |= {"gate": "reverse attention", "ra_blocks": "reverse attention"}


def fitting(recipe: Mapping[str, Any]) -> dict[str, Any]:
    """What a file says of a training's settings, without what no training can have had."""
    return {name: value for name, value in recipe.items() if name in described(Training) and fits(name, value)}


def parse_training(doc: str, script: dict[str, Any], argv: list[str]) -> Command:
    """Parse a training script's command line. script: its own defaults. Exits with status 2 where it is wrong."""
    parser = Parser(Training, doc, script)
    given = parser.read(argv)
    settings = resolve(Training, given, script)
    if bool(settings.restart_epoch) != bool(settings.ckpt_url):
        parser.error("--restart_epoch N and --ckpt_url PATH, the weights of epoch N, need each other")
    if settings.restart_epoch and settings.resume is not None:
        parser.error("--restart_epoch starts a run from weights, --resume continues one; give one of them")
    if settings.restart_epoch >= settings.epochs:
        parser.error(f"--restart_epoch {settings.restart_epoch} leaves nothing to train; --epochs is {settings.epochs}")
    if settings.label_smoothing and settings.method == "mart":
        parser.error("--label-smoothing is of the cross-entropy of pgd and trades; mart has another, leave it out")
    if settings.resume is None:  # else the run's own settings count
        for name, owner in BELONGS.items():
            asked = given.get(name, getattr(Training, name)) != getattr(Training, name)
            if asked and name in idle(settings) and owner.lstrip("-") not in given:
                parser.error(f"--{name.replace('_', '-')} is of {owner}, which is off; leave it out")
        if settings.awp and settings.awp_warmup >= settings.epochs:
            parser.error(f"--awp never acts: all {settings.epochs} epochs are its warm-up; lower --awp-warmup")
    if settings.warmup_lr >= settings.epochs:
        parser.error(f"--warmup-lr {settings.warmup_lr} leaves no epoch after it; --epochs is {settings.epochs}")
    extra, whole = settings.extra_images, settings.batch_size
    if settings.extra_data and not 0 < extra < whole:
        parser.error(f"--extra-fraction {settings.extra_fraction} takes {extra} of {whole} images a batch")
    if settings.overwrite and settings.resume is not None:
        parser.error("--overwrite replaces a run, --resume continues it; give one of them")
    parser.say_idle(idle(settings) + ("other_data",) * (settings.resume is None), given)
    return Command(settings, given, script)


def parse(cls: type[S], doc: str, argv: list[str]) -> S:
    """Parse the command line of a script of another class of settings. Exits with status 2 where it is wrong."""
    parser = Parser(cls, doc)
    given = parser.read(argv)
    for name, about in described(cls).items():
        if about.required and name not in given:
            parser.error(f"--{name} is required: {about.help}")
    settings = resolve(cls, given)
    without = [flag for flag in ("--no-ra", "--model") if getattr(settings, flag[2:].replace("-", "_"), None)]
    weighed = [name for name in ("gate", "ra_blocks", "predict") if given.get(name) not in (None, "label", 2, "final")]
    if without and weighed:
        parser.error(f"--{weighed[0].replace('_', '-')} and {without[0]} contradict each other; leave one of them out")
    if ("mean" in given) != ("std" in given):
        parser.error("--mean and --std need each other, such as --mean cifar10 --std cifar10")
    if cls is Evaluation:
        if (settings.ckpt_url is None) == (settings.model is None):
            parser.error("one of --ckpt_url PATH, a checkpoint file or a run folder, and --model M:F is required")
        runs, side = settings.ckpt_url or (), settings.image_size
        if len(set(runs)) < len(runs) or (len(runs) > 1 and (settings.save_adversarial or settings.log_path)):
            parser.error("--ckpt_url takes several runs, each once, and not with --save-adversarial or --log_path")
        if runs and side is not None and (side < 16 or side % 8):
            parser.error(f"--image-size {side} is not a multiple of 8, at least 16")
        adaptive, transfer = (name in settings.attacks for name in ("adaptive", "transfer"))
        if transfer and settings.attacks != ALL_ATTACKS and settings.surrogate is None:
            parser.error("--attacks transfer needs --surrogate, a checkpoint that gives the gradients")
        unused = () if adaptive else ("restarts", "apgd_steps")
        unused += () if adaptive or settings.diagnostics or transfer else ("surrogate",)
        of_files = ("arch", "width", "no_ra", "key", "mean", "std", "gate", "ra_blocks", "predict")
        parser.say_idle(unused + of_files * bool(settings.model), given)
    if cls is Umap and settings.labels is not None:
        if len(set(settings.labels)) < len(settings.labels):
            parser.error("--labels names two panels alike")
        if len(settings.labels) != len(settings.model_dir):
            parser.error(f"--labels names {len(settings.labels)} panels and --model_dir {len(settings.model_dir)}")
    return settings
