"""The operations for JAX arrays and tracers: eager, under `jit`, inside `scan` and `shard_map`, on CPU and CUDA.

The functions here take JAX arrays only; those of `flashmoe_cupy` come here with them. Arguments, results and errors are
the same. Options are Python values: under `jit` make them static, max_seqlen_q and max_seqlen_k too. `out` must be
None, for JAX arrays are immutable. `vmap` joins the mapped axis to the batch where an operation has one, and runs one
call after the other elsewhere (packed sequences, routers, experts, mapped sinks). A multi-device program should call
these inside `jax.shard_map`: XLA cannot split a call of a foreign function and would gather the arguments on each
device. FLASHMOE_CHECK=1 looks at values on the CPU only.

`flash_attention` and `flash_attention_varlen` have gradients, of out and of lse: `jax.grad` and all that is made of it.
Only those are computed that are asked for: q, k, v, sinks and a bias of numbers. That of alibi_slopes is refused, and
so are those of the other operations and second ones (UnsupportedProblem); for forward mode (`jvp`, `jacfwd`) JAX raises
TypeError. A call that nobody differentiates makes no lse. One that somebody does keeps its arguments, out and lse, or
what `jax.checkpoint` leaves of them. JAX 0.6.0 does not say what is asked for, and all gradients are computed there.

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
from flashmoe_cupy.plan.operation import Operation, each, operations, registered

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
    if out is None:
        out = next((arrays[name] for name in operation.written if arrays[name] is not None), None)
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
    made = forms(operation, views, options)
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

    ranks = _ranks(operation, views)
    if ranks:
        plain = _batched(operation, ranks, options, [*views], made, plain)
    if operation.gradient is not None:
        whole = _differentiable(operation, problem, options, views, plain)
    else:
        whole = _refusing(problem, f"there is no backward pass of {operation.name} for JAX arrays yet", plain)

    def function(*given: Any) -> Any:
        return whole(*given)

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
# gradients

_Zero = jax.custom_derivatives.SymbolicZero
_TELLS_WHAT_IS_ASKED = hasattr(jax, "shard_map")  # JAX 0.6.0 refuses to, inside of its older shard_map


def _refusing(problem: Any, reason: str, function: Callable[..., Any], name: str = "") -> Callable[..., Any]:
    """`function`, which refuses to be differentiated. name: of its argument, where that alone has no gradient."""
    refusing = jax.custom_jvp(function)

    def jvp(_primals: Any, _tangents: Any) -> Any:
        raise UnsupportedProblem(
            f"the gradient of {problem.describe()}",
            [reason],
            f"wrap {name or 'the arguments'} in jax.lax.stop_gradient if no gradient is needed through "
            + ("it" if name else "them"),
        )

    refusing.defjvp(jvp)
    return refusing  # type: ignore[no-any-return]


def _differentiable(
    operation: Operation, problem: Any, options: dict[str, Any], views: dict[str, View], plain: Callable[..., Any]
) -> Callable[..., Any]:  # fmt: skip
    """`plain`, whose gradients are those of another operation (plan.operation.Gradient)."""
    its = operation.gradient
    assert its is not None
    backward = registered(its.operation)
    rest = {name: value for name, value in options.items() if name in backward.options}
    names, outputs = [*views], operation.wanted(options)
    possible = [name for name in views if f"d{name}" in backward.outputs]
    numbers = [name for name, v in views.items() if jnp.issubdtype(dtypes.to_numpy(v.dtype), jnp.inexact)]
    guards = {
        name: _refusing(problem, f"{name} has no gradient", lambda x: x, name)
        for name in numbers
        if name not in possible
    }
    differentiable = jax.custom_vjp(plain)

    def forward(*given: Any) -> tuple[Any, Any]:
        asked = numbers
        if _TELLS_WHAT_IS_ASKED:
            asked = [name for name, x in zip(names, given, strict=True) if x.perturbed]
            given = tuple([x.value for x in given])
        arrays = dict(zip(names, given, strict=True))
        made = call(operation, dict.fromkeys(operation.arguments) | arrays, options | its.options, None)
        arrays |= dict(zip(operation.wanted(options | its.options), made, strict=True))
        # What is asked for becomes the shape of an array without elements. JAX may differentiate what it has traced
        # once several times, each time by other arguments, and only the arrays that are saved belong to one of these.
        code = jnp.zeros((0, sum([1 << i for i, name in enumerate(possible) if name in asked])), bool)
        return tuple([arrays[name] for name in outputs]), (arrays, code)

    def pull(saved: tuple[dict[str, Any], Any], arriving: Sequence[Any]) -> tuple[Any, ...]:
        arrays, code = saved
        need = tuple([name for i, name in enumerate(possible) if code.shape[1] >> i & 1])
        given = {f"d{name}": x for name, x in zip(outputs, arriving, strict=True) if not isinstance(x, _Zero)}
        zeros = [jax.custom_derivatives.zero_from_primal(arrays[name], symbolic_zeros=True) for name in names]
        if not need or not given:
            return tuple(zeros)
        for name in backward.arguments[: backward.required]:
            if name not in arrays and name not in given:  # nothing arrives at that output
                given[name] = jnp.zeros_like(arrays[name.removeprefix("d")])
        made = backward.function(**arrays, **given, **rest, need=need)
        found = dict(zip(backward.outputs, made, strict=True))
        return tuple([
            _shared(arrays[name], found[f"d{name}"]) if name in need else zero
            for name, zero in zip(names, zeros, strict=True)
        ])  # fmt: skip

    differentiable.defvjp(forward, pull, symbolic_zeros=_TELLS_WHAT_IS_ASKED)

    def function(*given: Any) -> Any:
        return differentiable(*[guards[name](x) if name in guards else x for name, x in zip(names, given, strict=True)])

    return function if guards else differentiable


def _shared(x: Any, gradient: Any) -> Any:
    """The gradient of x, summed over the axes of a mesh over which it varies and x does not (`jax.shard_map`).

    JAX derives that from an operation of its own whose operands vary as these two do.
    """
    nothing = jax.lax.slice(gradient, (0,) * x.ndim, (0,) * x.ndim).sum()
    return jax.vjp(lambda own: own + nothing, x)[1](gradient)[0]


# ---------------------------------------------------------------------------------------------------------------------
# vmap


def _ranks(operation: Operation, views: dict[str, View]) -> dict[str, int]:
    """The number of dimensions that arguments have if the batch is their first one (Operation.batched)."""
    of = next((one for one in operations() if one.gradient and one.gradient.operation == operation.name), None)
    if of is None or operation.batched or not of.batched:
        return operation.batched
    return of.batched | {name: len(v.shape) for name, v in views.items() if name.removeprefix("d") in of.outputs}


def _batched(
    operation: Operation, ranks: dict[str, int], options: dict[str, Any], names: Sequence[str], made: Sequence[Form],
    function: Callable[..., Any],
) -> Callable[..., Any]:  # fmt: skip
    """`function`, whose vmap is one call with a larger batch where arrays that are mapped have a batch axis.

    An output that is like an argument has to have one too: a gradient is summed over the batch otherwise.
    """
    whole = [operation.outputs[form.name].like for form in made]
    batched = jax.custom_batching.custom_vmap(function)

    def rule(size: int, mapped: Sequence[bool], *given: Any) -> tuple[tuple[Any, ...], tuple[bool, ...]]:
        by_name = dict(zip(names, zip(given, mapped, strict=True), strict=True))
        first, there = by_name[operation.arguments[0]]
        batch = first.shape[there]
        if all(
            name in ranks and (batch == 1 or (x.ndim - m == ranks[name] and x.shape[m] == batch))
            if name in whole
            else name in ranks or not m
            for name, (x, m) in by_name.items()
        ):
            found = _joined(operation, ranks, options, size, batch, whole, by_name)
            return tuple(x.reshape(size, *form.shape) for x, form in zip(found, made, strict=True)), (True,) * len(made)
        return _one_by_one(batched, mapped, given), (True,) * len(made)

    batched.def_vmap(rule)
    return batched  # type: ignore[no-any-return]


def _one_by_one(function: Callable[..., Any], mapped: Sequence[bool], arrays: Sequence[Any]) -> tuple[Any, ...]:
    """vmap as a loop."""

    def step(slices: Sequence[Any]) -> Any:
        left = iter(slices)
        return function(*(next(left) if m else x for x, m in zip(arrays, mapped, strict=True)))

    return tuple(jax.lax.map(step, [x for x, m in zip(arrays, mapped, strict=True) if m]))


def _joined(
    operation: Operation, ranks: dict[str, int], options: dict[str, Any], size: int, batch: int, whole: Sequence[str],
    by_name: dict[str, tuple[Any, bool]],
) -> tuple[Any, ...]:  # fmt: skip
    """The outputs of one call whose batch is size * batch. whole: arguments that must have all of it."""
    arrays: dict[str, Any] = dict.fromkeys(operation.arguments)
    for name, (x, m) in by_name.items():
        rank, shape = ranks.get(name, 0), x.shape[m:]
        own = len(shape) == rank  # it has a batch axis
        if not m and name not in whole and (not own or (shape[0] == 1 and batch != 1)):
            arrays[name] = x  # the same for all
        else:
            inner = shape[1:] if own else (1,) * (rank - 1 - len(shape)) + shape
            x = x.reshape(size if m else 1, shape[0] if own else 1, *inner)
            arrays[name] = jnp.broadcast_to(x, (size, batch, *inner)).reshape(size * batch, *inner)
    made = call(operation, arrays, options, None)
    return made if isinstance(made, tuple) else (made,)
