"""Options of calls in one exact type each.

`1 == True == 1.0`, and an array may change after it was given. What remembers calls by their options therefore keeps
them as they are read here: bool, int, float, str or None, each option always the same. A value of a wrong type is
never asked for in such a memory; validation names it.
"""

from __future__ import annotations

import math
import numbers
import operator
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

Read = Callable[[object], Any]  # a value in its exact type, or None where it is of another kind


def boolean(value: object) -> bool | None:
    """A Python or NumPy bool as bool; None for all else, 1 and arrays included."""
    return bool(value) if isinstance(value, (bool, np.bool_)) else None


def integer(value: object) -> int | None:
    """What `operator.index` takes as int: Python and NumPy integers, integer arrays without dimensions.

    A device array waits for its value, as it always does there. None for all else: bools, floats, traced values.
    """
    if type(value) is int:
        return value
    if isinstance(value, bool) or "bool" in str(getattr(value, "dtype", "")) or getattr(value, "shape", ()) != ():
        return None  # of some libraries bools and arrays of one element are an index, too
    if isinstance(value, float) or type(value).__name__ == "SymInt":
        return None  # torch's export and make_fx: to read it would fix a dimension that may change
    try:
        return operator.index(value)  # type: ignore[arg-type]
    except (TypeError, ValueError, RuntimeError):  # traced, without a value (torch's meta device), not an index
        return None


def real(value: object) -> float | None:
    """A Python or NumPy number as float; None for all else, bools included; infinite when it does not fit."""
    if type(value) is float:
        return value
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        return None
    try:
        return float(value)
    except OverflowError:
        return math.inf


def text(value: object) -> str | None:
    """A string, of NumPy or an enumeration too, as str; None for all else."""
    if type(value) is str:
        return value
    return str.__str__(value) if isinstance(value, str) else None


def needed(value: object) -> str | None:
    """Names of arguments, a sequence of them or a text with spaces, as a text with single spaces; None for all else."""
    if isinstance(value, str):
        return " ".join(value.split())
    if not isinstance(value, Sequence) or not all(isinstance(one, str) for one in value):
        return None
    return " ".join(value)


def is_window(value: object) -> bool:
    """Whether this is a tuple of two Python ints."""
    return type(value) is tuple and len(value) == 2 and type(value[0]) is int and type(value[1]) is int


def window(value: object) -> tuple[int, int] | None:
    """A sequence or an array of two integers as a tuple; None for all else."""
    if type(value) is tuple and len(value) == 2 and type(value[0]) is type(value[1]) is int:
        return value
    pair = isinstance(value, Sequence) and not isinstance(value, bytes)
    if not pair and getattr(value, "shape", None) != (2,):
        return None
    found = [integer(one) for one in value] if len(value) == 2 else []  # type: ignore[arg-type, attr-defined]
    return None if None in found or not found else (found[0], found[1])  # type: ignore[return-value]


class Kind:
    """What an option is: how a value of it is read, and whether None is one.

    types: those of values that need not be read. words: for an error. schema: the type of torch's operators.
    """

    def __init__(self, read: Read, types: tuple[type, ...], words: str, schema: str, optional: bool = False) -> None:
        self.read, self.optional = read, optional
        self.types = (*types, type(None)) if optional else types
        self.words = f"{words} or None" if optional else words
        self.schema = f"{schema}?" if optional else schema

    def accepts_none(self, value: object) -> bool:
        """Whether the value is None, and that is one of the option."""
        return value is None and self.optional


_BOOL = Kind(boolean, (bool,), "a bool", "bool")
_INT = Kind(integer, (int,), "an int", "SymInt")
_FLOAT = Kind(real, (float, int), "a number", "float")
_TEXT = Kind(text, (str,), "a string", "str")
_PAIR = Kind(window, (tuple,), "two ints (left, right)", "SymInt[]")
_NEED = Kind(needed, (str,), "names of arguments", "str")
_MAYBE = Kind(real, (float, int), "a number", "float", optional=True)
# By the annotation of a parameter.
_KINDS = {
    "bool": _BOOL, "int": _INT, "SupportsIndex": _INT, "float": _FLOAT, "float | None": _MAYBE, "str": _TEXT,
    "Need": _NEED, "Layout": _TEXT, "Scoring": _TEXT, "Activation": _TEXT, "Window": _PAIR,
}  # fmt: skip


def kind_of(name: str, annotation: str) -> Kind:
    """The kind of an option by how the parameter of a function is annotated. Raises TypeError for an unknown one."""
    try:
        return _KINDS[annotation]
    except KeyError:
        raise TypeError(f"option {name}: {annotation!r} is none of {', '.join(_KINDS)}") from None
