"""How the values of settings are written on a command line.

Each type and function here describes one kind of value to tyro: how a command line writes it, which
values are allowed, and what --help shows. A wrong value raises a ValueError, which tyro reports
together with the flag.
"""

import math
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any

import tyro
from tyro.constructors import PrimitiveConstructorSpec

CODE = "FILE.py:function"


def eps_text(eps: float) -> str:
    """Format an eps or a step size as papers do: 8/255 or 0.5/255, but 0.1 and 0.007."""
    short = f"{eps:.3g}"
    if math.isclose(float(short), eps):
        return short
    quarters = round(1020 * eps)
    if eps <= 1 and math.isclose(quarters / 1020, eps, rel_tol=1e-5):
        return f"{quarters / 4:g}/255"
    return f"{eps:.4g}"


def _number(text: str) -> float:
    numerator, _, denominator = text.partition("/")
    if denominator == "0":
        raise ValueError(f"{text} divides by 0")
    return float(numerator) / float(denominator or 1)


def as_given(value: object) -> str:
    """Format the value of a setting as a command line gives it: 75,90,100 or 8/255."""
    if isinstance(value, tuple | list):
        return ",".join(map(str, value)) or "none"
    if isinstance(value, float) and _number(eps_text(value)) == value:
        return eps_text(value)
    return str(value)


def also(*flags: str) -> object:
    """Further spellings of a flag."""
    return tyro.conf.arg(aliases=flags)


def _values(
    metavar: str, read: Callable[[str], Any], words: int | tuple[int, ...] | str = 1
) -> PrimitiveConstructorSpec:
    """Return a kind of value that `read` makes of text.

    words: how many may follow the flag, "*" for any number; several are joined by commas.
    """
    return PrimitiveConstructorSpec(
        nargs=words,
        metavar=metavar,
        instance_from_str=lambda texts: read(",".join(texts)),
        is_instance=lambda value: True,
        str_from_instance=lambda value: [as_given(value)],
    )


def number(
    interval: str, kind: Callable[[str], float] = _number, metavar: str = "X"
) -> PrimitiveConstructorSpec:
    """Numbers in an interval such as "(0, 1]"; real ones may be written as fractions, 8/255."""
    low, high = (float(end) for end in interval[1:-1].split(","))
    if interval[0] == "(":
        low = math.nextafter(low, math.inf)
    if interval[-1] == ")":
        high = math.nextafter(high, -math.inf)

    def read(text):
        value = kind(text)
        if not low <= value <= high:
            raise ValueError(f"{text} is not in {interval}")
        return value

    return _values(metavar, read)


def whole(low: int = 0, high: int = 2**31) -> PrimitiveConstructorSpec:
    """Whole numbers from low to high."""
    return number(f"[{low}, {high}]", int, "N")


def one_of(names: Sequence[str]) -> PrimitiveConstructorSpec:
    """One of several names."""

    def read(text):
        if text not in names:
            raise ValueError(f"{text!r} is none of {', '.join(names)}")
        return text

    return _values("A", read)


def network(names: Sequence[str]) -> PrimitiveConstructorSpec:
    """One of several names, or FILE.py:function, whose path becomes an absolute one."""

    def read(text):
        if ".py:" in text:
            return os.path.abspath(os.path.expanduser(text))
        return one_of(names).instance_from_str([text])

    return _values(f"{{{','.join(names)},{CODE}}}", read)


def listed(
    item: PrimitiveConstructorSpec, words: Mapping[str, tuple[Any, ...]]
) -> PrimitiveConstructorSpec:
    """Items separated by commas or spaces, or a word that stands for a list of them."""

    def read(text):
        if text in words:
            return words[text]
        return tuple(item.instance_from_str([part.strip()]) for part in text.split(","))

    return _values(f"{item.metavar},{item.metavar}", read, words="*")


def _read_switch(text: str) -> bool:
    if text.lower() in ("", "true", "yes", "1"):  # nothing: the flag alone
        return True
    if text.lower() in ("false", "no", "0"):
        return False
    raise ValueError(f"{text!r} is neither True nor False")


def _read_path(text: str) -> str:
    if not text:
        raise ValueError("the path is empty")
    return os.path.expanduser(text)  # shells leave ~ alone behind =


def _read_path_or_flag_alone(text: str) -> str | bool:
    return _read_path(text) if text else True


def _read_file_name(text: str) -> str:
    if os.path.basename(text) != text:
        raise ValueError(f"{text!r} is no file name; folders belong into --out or --model-dir")
    return text


PATH = _values("PATH", _read_path)

# The most frequent types of settings
Whole = Annotated[int, whole(0)]
Count = Annotated[int, whole(1)]
CountOrNone = Annotated[int | None, whole(1)]
NotNegative = Annotated[float, number("[0, inf)")]
Positive = Annotated[float, number("(0, inf)")]
Share = Annotated[float, number("[0, 1]")]
ShareBelowOne = Annotated[float, number("[0, 1)")]
Seeds = Annotated[int | tuple[int, ...], listed(whole(), {})]  # a run has one of them
Epochs = Annotated[tuple[int, ...], listed(whole(1), {"none": (), "": ()})]
# A flag alone switches something on, whatever the default is.
Switch = Annotated[bool, _values("[BOOL]", _read_switch, words=(0, 1))]
FileNameOrNone = Annotated[str | None, _values("NAME", _read_file_name)]
Path = Annotated[str, PATH]
PathOrNone = Annotated[str | None, PATH]
PathOrFlagAlone = Annotated[
    str | bool | None, _values("[PATH]", _read_path_or_flag_alone, words=(0, 1))
]
