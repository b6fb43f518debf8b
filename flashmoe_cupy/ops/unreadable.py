"""Calls with arguments that no view can show: one error with all of them. Runs only after a view has failed."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from flashmoe_cupy import dtypes
from flashmoe_cupy.arrays import View, row_major, view
from flashmoe_cupy.errors import UnsupportedProblem
from flashmoe_cupy.plan.checks import show
from flashmoe_cupy.plan.operation import Operation


def unreadable(operation: Operation, given: Mapping[str, Any], first: Exception) -> Exception:
    """What to raise for a call of an operation when the view of an argument raised `first`.

    given: every argument by name. A TypeError for what is no array; else UnsupportedProblem, with what else is wrong as
    far as the shapes and dtypes of the arrays tell it.
    """
    views: dict[str, View] = {}
    strangers: dict[str, Exception] = {}
    faults: dict[tuple[str, str], list[str]] = {}  # names by the type of the arrays and what is wrong with them
    hints: dict[str, list[str]] = {}
    options: dict[str, Any] = {}
    whole = True  # shape and dtype of every array are known
    needed = operation.arguments[: operation.required]
    for name, value in given.items():
        if name in operation.options:
            options[name] = value
            continue
        if value is None and name not in needed:
            continue
        try:
            views[name] = view(value, name)
        except UnsupportedProblem as error:
            kind = f"{type(value).__module__}.{type(value).__qualname__}"
            for reason in error.reasons:
                faults.setdefault((kind, reason), []).append(name)
            if error.hint:
                hints.setdefault(error.hint.removeprefix(name), []).append(name)
            stand_in = _stand_in(value)
            if stand_in is None:
                whole = False
            else:
                views[name] = stand_in
        except TypeError as error:
            strangers[name] = error
    if strangers:
        return _no_arrays(strangers, given, views)
    if not faults:  # it was another thing that failed, or it is gone
        return first
    why = [f"{', '.join(who)} ({kind}): {_each(reason, who)}" for (kind, reason), who in faults.items()]
    said = [f"{', '.join(who)}{hint}" if hint.startswith(" may be") else hint for hint, who in hints.items()]
    if whole:
        try:
            operation.make(**views, **options)
        except UnsupportedProblem as error:
            why += error.reasons
            said.append(error.hint)
    return UnsupportedProblem(told(operation, given), why, "; ".join(filter(None, said)))


def told(operation: Operation, given: Mapping[str, Any]) -> str:
    """A call in one line, as `plan.checks.asked` tells it of views: arrays, then what is not at its default."""
    arrays, options = [], []
    for name, its in inspect.signature(operation.function).parameters.items():
        value = given[name]
        if name in operation.options:
            default = its.default in (0, 1) and type(value) is float and value == its.default  # 0 stands for 0.0
            options += [f"{name}={text}"] if (text := show(value)) != show(its.default) and not default else []
        elif value is not None or its.default is not None:
            arrays.append(f"{name}={_shown(value)}")
    return f"{operation.name}({', '.join(arrays + options)})"


def _each(reason: str, names: list[str]) -> str:
    return f"each {reason[3:]}" if len(names) > 1 and reason.startswith("it ") else reason


def _shown(x: Any) -> str:
    """dtype and shape, else the type."""
    try:
        name = getattr(x.dtype, "name", str(x.dtype).removeprefix("torch."))
        return show(x) if getattr(x, "is_nested", False) else f"{name}{list(x.shape)}"
    except (AttributeError, RuntimeError, TypeError):
        return show(x)


def _stand_in(x: Any) -> View | None:
    """The shape, strides and dtype of an array that cannot be read; None where they are not known."""
    try:
        dtype = dtypes.from_name(str(getattr(x.dtype, "name", x.dtype)).removeprefix("torch."))
        shape = tuple(x.shape)
    except (AttributeError, RuntimeError, TypeError, ValueError):
        return None
    if getattr(x, "is_nested", False):  # its shape is no tuple of numbers
        return None
    library = type(x).__module__.partition(".")[0]
    strides, device = row_major(shape), -1
    if library == "torch":
        if x.device.type not in ("cpu", "cuda"):
            return None  # nothing true can be said of its place
        device = x.get_device()
        if str(x.layout) == "torch.strided":
            strides = tuple(x.stride())
    elif hasattr(x, "strides"):
        strides = tuple([step // x.dtype.itemsize for step in x.strides])
    return View(0, shape, strides, dtype, device, library, False, x)


_MODULES = {"torch": "torch.tensor", "cupy": "cupy.asarray", "jax": "jnp.asarray"}


def _no_arrays(strangers: dict[str, Exception], given: Mapping[str, Any], views: Mapping[str, View]) -> TypeError:
    """All arguments that are no arrays, and what makes lists and numbers arrays of the library of the others."""
    name, *others = strangers
    text = str(strangers[name])
    text += "".join([f"; {other} is {_kind(given[other])}" for other in others])
    library = next((v.library for v in views.values()), "numpy")
    make = _MODULES.get(library, "np.asarray")
    repairs = []
    for one in strangers:
        if isinstance(given[one], (list, tuple, int, float)):
            wanted = dtypes.accepted(one)
            dtype = f"{make.partition('.')[0]}.{'int32' if wanted.startswith('int32') else 'float32'}"
            repairs.append(f"{make}({one}, dtype={dtype})")
    return TypeError(text + (f"; give {', '.join(repairs)}" if repairs else ""))


def _kind(value: object) -> str:
    return "None" if value is None else f"a {type(value).__module__}.{type(value).__qualname__}"
