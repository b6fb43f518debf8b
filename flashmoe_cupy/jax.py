"""The operations for JAX arrays and tracers: eager, under `jit`, inside `scan` and `shard_map`, on CPU and CUDA.

The functions here take JAX arrays only; those of `flashmoe_cupy` come here with them. Arguments, results and errors are
the same. Options are Python values: under `jit` make them static, max_seqlen_q and max_seqlen_k too. `out` must be
None, for JAX arrays are immutable. `vmap` joins the mapped axis to the batch where an operation has one, and runs one
call after the other elsewhere (packed sequences, routers, experts, mapped sinks). There is no gradient yet: `jax.grad`
raises UnsupportedProblem. A multi-device program should call these inside `jax.shard_map`: XLA cannot split a call of
a foreign function and would gather the arguments on each device. FLASHMOE_CHECK=1 looks at values on the CPU only.

XLA calls back into Python while a program runs (`_xla`). What is built here follows from the declarations of the
operations (`plan.operation`).
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from flashmoe_cupy import _xla, dtypes
from flashmoe_cupy.arrays import View, row_major
from flashmoe_cupy.errors import UnsupportedProblem
from flashmoe_cupy.ops import gpu, public
from flashmoe_cupy.ops.call import Form, forms
from flashmoe_cupy.ops.names import no_argument
from flashmoe_cupy.plan.operation import Operation, each

if TYPE_CHECKING:
    from flashmoe_cupy.ops.public import *  # noqa: F403

__all__ = public.__all__
_MAX_FUNCTIONS = 4096  # distinct shapes that are remembered
_functions: dict[tuple[Any, ...], Callable[..., Any]] = {}


def _public(operation: Operation) -> None:
    """The function of this module for an operation."""
    parameters = inspect.signature(operation.function).parameters
    positional = [name for name, its in parameters.items() if its.kind is inspect.Parameter.POSITIONAL_OR_KEYWORD]
    defaults = {name: its.default for name, its in parameters.items() if its.default is not inspect.Parameter.empty}

    @functools.wraps(operation.function)
    def function(*given: Any, **named: Any) -> Any:
        if unknown := {name: value for name, value in named.items() if name not in parameters}:
            raise no_argument(operation.function, unknown)
        if len(given) > len(positional) or any(name not in {**defaults, **named} for name in positional[len(given) :]):
            inspect.signature(operation.function).bind(*given, **named)  # raises TypeError
        values = defaults | dict(zip(positional, given, strict=False)) | named
        if missing := [name for name in parameters if name not in values]:
            raise TypeError(f"{operation.name}() lacks {', '.join(missing)}")
        arrays = {name: values[name] for name in operation.arguments}
        return call(operation, arrays, {name: values[name] for name in operation.options}, values.get("out"))

    function.__module__ = __name__
    globals()[operation.name] = function


each(_public)


def call(operation: Operation, arrays: dict[str, Any], options: dict[str, Any], out: Any) -> Any:
    """Find or build the function of these shapes, dtypes and options, and call it.

    arrays, options: all of them by name, None for an absent array.
    """
    needed = operation.arguments[: operation.required]
    given = {name: x for name, x in arrays.items() if x is not None or name in needed}
    read, key, function = operation.exact([*options.values()]), None, None
    if read is not None:  # options of a wrong type are not looked up: 1 == True == 1.0
        options = dict(zip(operation.options, read, strict=True))
        with contextlib.suppress(AttributeError, TypeError):  # not an array
            key = (operation.name, tuple([(name, x.shape, x.dtype) for name, x in given.items()]), *read)
            function = _functions.get(key) if out is None else None
    if function is None:
        _check(operation.name, given, out)
        views = {name: _view(operation.name, name, x) for name, x in given.items()}
        problem = operation.make(**views, **options, **({"out": None} if operation.has_out else {}))
        function = _build(operation, problem, views, options)
        if key is not None:
            if len(_functions) >= _MAX_FUNCTIONS:
                _functions.clear()
            _functions[key] = function
    elif not all(isinstance(x, jax.Array) for x in given.values()):
        _check(operation.name, given, out)
    return operation.wrap(function(*given.values()))


def _check(op: str, given: dict[str, Any], out: Any) -> None:
    reasons = [
        f"{name} is a {type(x).__module__}.{type(x).__qualname__}, not a JAX array"
        + (f"; give jnp.asarray({name})" if isinstance(x, (list, tuple, int, float)) else "")
        for name, x in given.items()
        if not isinstance(x, jax.Array)
    ]
    if out is not None:
        reasons.append("out is given, but JAX arrays are immutable, and the result is a new array")
    if reasons:
        hints = ["all arrays of one call belong to one library"] if len(reasons) > (out is not None) else []
        hints += ["leave out=None: JAX arrays are immutable"] if out is not None else []
        raise UnsupportedProblem(f"{op} with JAX arrays", reasons, "; ".join(hints))


def _view(op: str, name: str, x: Any) -> View:
    """The dense row-major array that XLA will hand over, without an address yet."""
    if not all(isinstance(n, int) for n in x.shape):
        raise UnsupportedProblem(op, [f"{name} has the symbolic shape {x.shape}; shapes must be known"])
    try:
        dtype = dtypes.from_numpy(np.dtype(x.dtype))
    except (TypeError, ValueError) as error:
        raise UnsupportedProblem(op, [f"{name} has dtype {x.dtype}: {error}"]) from None
    return View(0, tuple(x.shape), row_major(tuple(x.shape)), dtype, 0, "jax", True, x)


def _build(
    operation: Operation, problem: Any, views: dict[str, View], options: dict[str, Any]
) -> Callable[..., Sequence[Any]]:  # fmt: skip
    """A jitted function of the arrays, in the operation's order, that gives the outputs."""
    shapes = {name: v.shape for name, v in views.items()}
    made = forms(operation, shapes, options, next(iter(views.values())).dtype)
    inputs = [(name, v.shape, v.dtype.name) for name, v in views.items()]
    key, text = _xla.register(operation, problem, inputs, [(form.name, form.shape, form.dtype.name) for form in made])
    empty = operation.empty(problem) or not any(math.prod(form.shape) for form in made)
    workspace = 0 if empty else gpu.workspace_bytes(operation, problem)
    buffers = made if not workspace else [*made, Form("workspace", (workspace,), dtypes.UINT8, (1,), 0.0)]

    def plain(*given: Any) -> tuple[Any, ...]:
        if empty:
            return tuple(_filled(made, given))
        run = jax.ffi.ffi_call(_xla.TARGET, _types(buffers, given), vmap_method="sequential")
        return tuple(run(*given, key=np.int64(key), text=text)[: len(made)])

    if operation.batched:
        plain = _batched(operation, options, [*views], plain)
    differentiable = jax.custom_jvp(plain)

    def jvp(_primals: Any, _tangents: Any) -> Any:
        raise UnsupportedProblem(
            f"the gradient of {problem.describe()}",
            ["there is no backward pass for JAX arrays yet"],
            "wrap the arguments in jax.lax.stop_gradient if no gradient is needed through them",
        )

    differentiable.defjvp(jvp)

    def function(*given: Any) -> Any:
        return differentiable(*given)

    function.__name__ = function.__qualname__ = operation.name  # the name in jaxprs and profiles
    return jax.jit(function)  # type: ignore[no-any-return]


def _filled(made: Sequence[Form], given: Sequence[Any]) -> list[Any]:
    """Arrays of one value each.

    Inside `shard_map` they vary over each mesh axis over which one of `given` does, for a sum over nothing of each is
    in them: JAX derives that by itself, and the names under which it keeps it change too often to be asked for.
    """
    nothing = [jax.lax.slice(x, (0,) * x.ndim, (0,) * x.ndim).sum().astype(np.float32) for x in given]
    return [
        jnp.broadcast_to(sum(nothing, form.fill), form.shape).astype(dtypes.to_numpy(form.dtype)) for form in made
    ]  # fmt: skip


def _types(made: Sequence[Form], given: Sequence[Any]) -> Any:
    """The types of `_filled`, for `ffi_call`; nothing is computed."""
    return jax.eval_shape(lambda *arrays: _filled(made, arrays), *given)


# ---------------------------------------------------------------------------------------------------------------------
# vmap


def _batched(
    operation: Operation, options: dict[str, Any], names: Sequence[str], function: Callable[..., Any]
) -> Callable[..., Any]:  # fmt: skip
    """`function`, whose vmap is one call with a larger batch where only arrays with a batch axis are mapped."""
    batched = jax.custom_batching.custom_vmap(function)

    def rule(size: int, mapped: Sequence[bool], *given: Any) -> tuple[tuple[Any, ...], tuple[bool, ...]]:
        if any(there and name not in operation.batched for name, there in zip(names, mapped, strict=True)):
            made = _one_by_one(batched, mapped, given)
        else:
            made = _joined(operation, options, size, dict(zip(names, zip(given, mapped, strict=True), strict=True)))
        return made, (True,) * len(made)

    batched.def_vmap(rule)
    return batched  # type: ignore[no-any-return]


def _one_by_one(function: Callable[..., Any], mapped: Sequence[bool], arrays: Sequence[Any]) -> tuple[Any, ...]:
    """vmap as a loop."""

    def step(slices: Sequence[Any]) -> Any:
        left = iter(slices)
        return function(*(next(left) if m else x for x, m in zip(arrays, mapped, strict=True)))

    return tuple(jax.lax.map(step, [x for x, m in zip(arrays, mapped, strict=True) if m]))


def _joined(
    operation: Operation, options: dict[str, Any], size: int, by_name: dict[str, tuple[Any, bool]]
) -> tuple[Any, ...]:  # fmt: skip
    """vmap as one call whose batch is size * batch."""
    first, there = by_name[operation.arguments[0]]
    batch = first.shape[there]
    arrays: dict[str, Any] = dict.fromkeys(operation.arguments)
    for name, (x, m) in by_name.items():
        rank, shape = operation.batched.get(name, 0), x.shape[m:]
        own = len(shape) == rank  # it has a batch axis
        if not m and (not own or (shape[0] == 1 and batch != 1)):
            arrays[name] = x  # the same for all
        else:
            inner = shape[1:] if own else (1,) * (rank - 1 - len(shape)) + shape
            x = x.reshape(size if m else 1, shape[0] if own else 1, *inner)
            arrays[name] = jnp.broadcast_to(x, (size, batch, *inner)).reshape(size * batch, *inner)
    made = call(operation, arrays, options, None)
    return tuple(x.reshape(size, batch, *x.shape[1:]) for x in (made if isinstance(made, tuple) else (made,)))
