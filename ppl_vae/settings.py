"""Settings as fields of a dataclass: their types, ranges and choices, checked wherever the values come from."""

from __future__ import annotations

import difflib
import math
import os
import unicodedata
from collections.abc import Callable, Mapping
from dataclasses import Field, field
from functools import partial
from numbers import Integral, Real
from typing import Any, TypeVar

__all__ = ["check_each", "checked", "escaped", "nearest", "printable", "setting"]

T = TypeVar("T")
SHOWN = 80  # characters of a value in a complaint
TURNING = {"LRE", "RLE", "LRO", "RLO", "PDF", "LRI", "RLI", "FSI", "PDI"}  # what makes text read as another


def setting(group: str, default: Any, text: str, **limits: Any) -> Any:
    """A field with what the command line shows: ``choices`` (a table), or ``least``, ``above`` and ``most``."""
    return field(default=default, metadata={"group": group, "help": text, **limits})


def nearest(name: object, known: Mapping[str, Any]) -> str:
    """The end of a complaint about an unknown name: the one that was meant, perhaps, or all."""
    close = difflib.get_close_matches(str(name)[:SHOWN], list(known), n=1)
    return f"; did you mean {close[0]!r}?" if close else f"; known are {', '.join(known)}"


def check_each(values: Mapping[str, Any], known: Mapping[str, Field[Any]], source: str) -> None:
    """Check names and, one by one, values of settings, each a field; ``source`` stands first in a complaint."""
    for name, value in values.items():
        if name not in known:
            raise ValueError(f"{source}: unknown key {_told(name)}{nearest(name, known)}")
        try:
            checked(known[name], value)
        except ValueError as error:
            raise ValueError(f"{source}: {error}") from error


def checked(f: Field[Any], value: Any) -> Any:
    """A value as its field's type; raises ValueError where it is of another, or outside its range or choices."""
    kind = str(f.type).removesuffix(" | None")
    if value is None and kind != f.type:
        return None
    if f.name == "scale" and type(value) in (int, float):
        value = str(value)
    name, convert = TYPES[kind]
    if (converted := convert(value)) is None:
        raise ValueError(f"{f.name} must be {name}, got {_told(value)}")
    if isinstance(converted, str) and not printable(converted):
        raise ValueError(f"{f.name} must be text without control characters, got {_told(value)}")
    choices = f.metadata.get("choices")
    if choices is not None and converted not in choices:
        raise ValueError(f"{f.name}: unknown choice {_told(value)}{nearest(value, choices)}")
    for number in converted if isinstance(converted, tuple) else (converted,):
        if isinstance(number, int | float) and (limit := _missed(number, **f.metadata)):
            raise ValueError(f"{f.name} must be {limit}, got {_told(value)}")
    return converted


def printable(text: str) -> bool:
    r"""Whether text can be shown as it is: no character moves the cursor, or makes what follows read as another.

    >>> printable("naïve – 数"), printable("\x1b[2J"), printable("two\nlines")
    (True, False, False)
    """
    return all(_harmless(character) for character in text)


def escaped(text: object) -> str:
    r"""Text to show, whatever was in it.

    >>> escaped("red \x1b[31m, naïve")
    'red \\x1b[31m, naïve'
    """
    return "".join(c if _harmless(c) else c.encode("unicode_escape").decode() for c in str(text))


def _harmless(character: str) -> bool:
    return (
        unicodedata.category(character) not in ("Cc", "Zl", "Zp")
        and unicodedata.bidirectional(character) not in TURNING
    )


def _told(value: Any) -> str:
    """A value in a complaint, whatever its size."""
    try:
        text = repr(value)
    except ValueError:  # Python writes no number of that many digits
        text = "a number of thousands of digits"
    return text if len(text) <= SHOWN else f"{text[:SHOWN]}..."


def _missed(
    number: float, least: float = -math.inf, above: float = -math.inf, most: float = math.inf, **_: Any
) -> str:
    """The limit that a number does not keep, in words."""
    if number < least:
        return f"at least {least}"
    if number <= above:
        return f"above {above}"
    if number > most:
        return f"at most {most}"
    return "" if number < 2**63 else "finite" if isinstance(number, float) else "below 2**63"  # NaN is not below


def _whole(value: Any) -> int | None:
    return None if isinstance(value, bool) or not isinstance(value, Integral) else int(value)


def _real(value: Any) -> float | None:
    if isinstance(value, bool) or not isinstance(value, Real):
        return None
    try:
        return float(value)
    except OverflowError:  # a whole number beyond all floats
        return math.inf


def _several(one: Callable[[Any], T | None], value: Any) -> tuple[T, ...] | None:
    numbers = [one(v) for v in value] if isinstance(value, list | tuple) else []
    return tuple(n for n in numbers if n is not None) if numbers and None not in numbers else None


TYPES: dict[str, tuple[str, Callable[[Any], Any]]] = {
    "str": ("text", lambda value: os.fspath(value) if isinstance(value, str | os.PathLike) else None),
    "bool": ("true or false", lambda value: value if isinstance(value, bool) else None),
    "int": ("a whole number", _whole),
    "float": ("a number", _real),
    "tuple[int, ...]": ("a list of one or more whole numbers", partial(_several, _whole)),
    "tuple[float, ...]": ("a list of one or more numbers", partial(_several, _real)),
}
