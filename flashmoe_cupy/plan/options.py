"""Options of calls in one exact type each.

`1 == True == 1.0`, and an array may change after it was given. What remembers calls by their options therefore keeps
them as they are read here: bool, int, float, str or None, each option always the same. A value of a wrong type is
never asked for in such a memory; validation names it.
"""

from __future__ import annotations

import math
import numbers
import operator
from collections.abc import Callable, Mapping, Sequence
from itertools import product
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


# Those of all public functions; a name means the same in each.
READ: dict[str, Read] = {
    "causal": boolean, "window_size": window, "softmax_scale": real, "softcap": real, "layout": text,
    "return_lse": boolean, "max_seqlen_q": integer, "max_seqlen_k": integer, "top_k": integer, "scoring_func": text,
    "renormalize": boolean, "routed_scaling_factor": real, "num_expert_group": integer, "topk_group": integer,
    "capacity_factor": real, "return_stats": boolean, "num_experts": integer, "activation": text,
    "interleaved": boolean, "swiglu_alpha": real, "swiglu_limit": real, "apply_router_weight_on_input": boolean,
    "batch_invariant": boolean,
}  # fmt: skip
_OPTIONAL = ("softmax_scale", "capacity_factor", "swiglu_alpha", "swiglu_limit")  # None is a value of these
_TYPES: dict[Read, tuple[type, ...]] = {boolean: (bool,), integer: (int,), real: (float, int), text: (str,)}


def exact(options: Mapping[str, object]) -> dict[str, Any] | None:
    """The options in their exact types; None if one of them is of a wrong type."""
    found = {}
    for name, value in options.items():
        one = None if value is None else READ[name](value)
        if one is None and not (value is None and name in _OPTIONAL):
            return None
        found[name] = one
    return found


def exact_types(*names: str) -> dict[tuple[type, ...], None]:
    """All tuples of types that the options `names` have when nothing has to be read.

    A dict, for torch.compile of torch 2.6 cannot look into a frozenset.
    """
    each = [(*_TYPES[READ[name]], *((type(None),) if name in _OPTIONAL else ())) for name in names]
    return dict.fromkeys(product(*each))
