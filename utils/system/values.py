"""How the values of settings are written on a command line.

Each function and constant here describes one kind of value to tyro: how a command line writes it,
which values are allowed, and what --help shows. A wrong value raises a ValueError, which tyro
reports together with the flag.
"""

import math
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any, Literal

import tyro
from tyro.constructors import PrimitiveConstructorSpec

FORBIDDEN_IN_FILE_NAMES = set('/\\:*?"<>|')


def eps_text(eps: float) -> str:
    """Format an eps or a step size as papers do: 8/255 or 0.5/255, but 0.1 and 0.007."""
    quarters = round(1020 * eps)
    is_fraction = abs(1020 * eps - quarters) < 1e-4
    is_short = abs(float(f"{eps:.3g}") - eps) <= 1e-9
    if is_fraction and not is_short:
        return f"{quarters / 4:g}/255"
    return f"{eps:.4g}"


def as_given(value: object) -> str:
    """Format the value of a setting as a command line gives it: 75,90,100 or 8/255."""
    if isinstance(value, tuple | list):
        return ",".join(map(str, value)) or "none"
    if isinstance(value, float) and 0 < value < 1:
        text = eps_text(value)
        if text.endswith("/255") and float(text.removesuffix("/255")) / 255 == value:
            return text
    return str(value)


def also(*flags: str) -> object:
    """Further spellings of a flag."""
    return tyro.conf.arg(aliases=flags)


def _values(
    metavar: str, read: Callable[..., Any], words: int | tuple[int, ...] | Literal["*"] = 1
) -> PrimitiveConstructorSpec:
    """A kind of value. words: how many words follow the flag; `read` takes them as arguments."""

    def read_words(texts: list[str]) -> Any:
        if words != "*" and len(texts) > 1:  # tyro gives an optional word all that follow
            raise ValueError(f"the flag takes one value, not {len(texts)}: {' '.join(texts)}")
        return read(*texts)

    return PrimitiveConstructorSpec(
        nargs=words,
        metavar=metavar,
        instance_from_str=read_words,
        is_instance=lambda value: True,
        str_from_instance=lambda value: ["unset" if value is None else as_given(value)],
    )


def number(interval: str) -> PrimitiveConstructorSpec:
    """Real numbers in an interval such as "(0, 1]", which may be written as fractions, 8/255."""
    low, high = (float(end) for end in interval[1:-1].split(","))

    def read(text: str) -> float:
        numerator, _, denominator = text.partition("/")
        try:
            value = float(numerator) / float(denominator or 1)
        except (ValueError, ZeroDivisionError):
            value = math.nan
        above = value >= low if interval.startswith("[") else value > low
        below = value <= high if interval.endswith("]") else value < high
        if not (above and below):
            raise ValueError(f"{text!r} is not a number in {interval}, such as 0.5 or 8/255")
        return value

    return _values("X", read)


def whole(low: int = 0, high: int = 2**31 - 1, multiple_of: int = 1) -> PrimitiveConstructorSpec:
    """Whole numbers from low to high, written as int() reads them."""
    allowed = f"whole number from {low} to {high}"
    if multiple_of > 1:
        allowed = f"multiple of {multiple_of} from {low} to {high}"

    def read(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            raise ValueError(f"{text!r} is no {allowed}") from None
        if not low <= value <= high or value % multiple_of:
            raise ValueError(f"{text!r} is no {allowed}")
        return value

    return _values("N", read)


def names_of(known: Sequence[str], all_of_them: Sequence[str]) -> PrimitiveConstructorSpec:
    """Some of the known names, separated by commas; `all` for all_of_them."""

    def read(text: str) -> tuple[str, ...]:
        chosen = [part.strip() for part in text.split(",")]
        if chosen == ["all"]:
            chosen = all_of_them
        for name in chosen:
            if name not in known:
                raise ValueError(f"{name!r} is none of {', '.join(known)}, all")
        return tuple(dict.fromkeys(chosen))

    return _values("A,A", read)


def channels(known: Mapping[str, tuple[float, ...]], interval: str) -> PrimitiveConstructorSpec:
    """A number for each of red, green and blue, or the name of known ones."""
    read_number = number(interval).instance_from_str

    def read(text: str) -> tuple[float, ...]:
        if text.strip() in known:
            return known[text.strip()]
        parts = text.strip("()[] ").split(",")
        if len(parts) != 3:
            names = ", ".join(known)
            raise ValueError(f"{text!r} is no R,G,B such as 0.49,0.48,0.45, and none of {names}")
        return tuple(read_number([part]) for part in parts)

    return _values("R,G,B", read)


def _read_epochs(text: str) -> tuple[int, ...]:
    if text.strip() == "none":
        return ()
    try:
        numbers = [int(part) for part in text.split(",")]
    except ValueError:
        raise ValueError(f"{text!r} is no list of epochs, such as 75,90,100 or none") from None
    if min(numbers) < 1 or numbers != sorted(set(numbers)):
        raise ValueError(f"{text!r} is no list of rising epochs, such as 75,90,100")
    return tuple(numbers)


def _read_truth(text: str = "true") -> bool:
    if text.lower() in ("true", "yes", "1"):
        return True
    if text.lower() in ("false", "no", "0"):
        return False
    raise ValueError(f"{text!r} is neither True nor False")


def _read_name(text: str) -> str:
    if not text.strip():
        raise ValueError("the value is empty")
    return text


def _read_path(text: str) -> str:
    return os.path.expanduser(_read_name(text))


def _read_path_or_flag_alone(text: str | None = None) -> str | bool:
    return True if text is None else _read_path(text)


def _read_file_name(text: str) -> str:
    forbidden = text.startswith(".") or set(text) & FORBIDDEN_IN_FILE_NAMES
    if forbidden or not text.strip() or not text.isprintable():
        raise ValueError(f"{text!r} is no file name; folders belong into --out or --model-dir")
    return text


def _one_or_more(read: Callable[[str], str]) -> Callable[..., tuple[str, ...]]:
    def read_all(*texts: str) -> tuple[str, ...]:
        if not texts:
            raise ValueError("a value is missing")
        return tuple(read(text) for text in texts)

    return read_all


PATH = _values("PATH", _read_path)  # ~ is the user's home
NAME = _values("NAME", _read_name)
FILE_NAME = _values("NAME", _read_file_name)  # without folders and what some system forbids
PATHS = _values("PATH [PATH ...]", _one_or_more(_read_path), words="*")
NAMES = _values("NAME [NAME ...]", _one_or_more(_read_name), words="*")

# What --help says of a choice that is None if the command does not make it.
UNSET = tyro.conf.arg(help_behavior_hint="(default: unset)")

# The most frequent types of settings
Whole = Annotated[int, whole(0)]
Count = Annotated[int, whole(1)]
NotNegative = Annotated[float, number("[0, inf)")]
Positive = Annotated[float, number("(0, inf)")]
Share = Annotated[float, number("[0, 1]")]
PositiveShare = Annotated[float, number("(0, 1]")]
ShareBelowOne = Annotated[float, number("[0, 1)")]
Epochs = Annotated[tuple[int, ...], _values("E,E", _read_epochs)]
Truth = tyro.conf.FlagConversionOff[Annotated[bool, _values("[BOOL]", _read_truth, words=(0, 1))]]
# A flag alone, which switches something on whatever the default is
Switch = tyro.conf.FlagConversionOff[Annotated[bool, _values("", lambda: True, words=0)]]
Path = Annotated[str, PATH]
PathOrFlagAlone = Annotated[
    str | bool | None, _values("[PATH]", _read_path_or_flag_alone, words=(0, 1))
]
Name = Annotated[str, NAME]
