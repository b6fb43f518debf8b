"""The operations for torch tensors, eager and under `torch.compile`, as the operators of `torch.ops.flashmoe_cupy`.

The functions here are those of `flashmoe_cupy`, so either may be called. Eager calls run on torch's current stream.
Compiled and traced code sees one operator with a schema and a shape rule, which the compiler neither looks into nor
splits. The operators have no in-place form: while torch compiles, `out` is refused. Shapes may be dynamic. What is no
tensor runs uncompiled: torch.compile's translation of NumPy code loses what is written to `out=`.

autograd differentiates, once, the operations whose declarations name another one that gives their gradients. All others
refuse tensors that require a gradient while grad mode is on, with UnsupportedProblem; the compiler reports it.

The nn.Module `FlashMoEScienceAttention` is here, too.

Operators and what surrounds them follow from the declarations of the operations (`plan.operation`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch._dynamo import trace_rules

from flashmoe_cupy.errors import UnsupportedProblem
from flashmoe_cupy.ops import public
from flashmoe_cupy.ops.call import Call, run
from flashmoe_cupy.ops.public import *  # noqa: F403
from flashmoe_cupy.plan.checks import show
from flashmoe_cupy.plan.operation import Operation, each, registered
from flashmoe_cupy.torch_gradients import (
    Changed,  # noqa: F401, for ops.attention
    cast,
    chosen,
    derivatives,
    differentiate,
    flat,
    make_formula,
    once,
    wants_gradient,
)
from flashmoe_cupy.torch_reasons import instead, no_strides

if TYPE_CHECKING:
    from flashmoe_cupy.torch_modules import FlashMoEScienceAttention as FlashMoEScienceAttention

# Where a call cannot be traced, as with `out`, torch.compile goes on with the functions inside. These read memory that
# it does not see and write what its translation of NumPy loses: they run as they are.
for _module in ("cpu", "arrays", "jit", "ops.access", "ops.call"):
    trace_rules.add(f"flashmoe_cupy.{_module}")

__all__ = [*public.__all__, "FlashMoEScienceAttention"]

# The compiler keeps the strides that the tensors had in eager code: no hidden copies, and the same kernel.
_TAGS = (torch.Tag.pt2_compliant_tag, torch.Tag.needs_fixed_stride_order)
_SYMBOLS = (torch.SymInt, torch.SymFloat, torch.SymBool)


def __getattr__(name: str) -> Any:
    if name == "FlashMoEScienceAttention":
        from flashmoe_cupy.torch_modules import FlashMoEScienceAttention

        return FlashMoEScienceAttention
    try:
        return registered(name).function
    except KeyError:
        text = f"module {__name__!r} has no attribute {name!r}"
        if name == "FlashMoE":
            text += "; this nn.Module comes with training, and flashmoe_cupy.FlashMoELayer serves inference"
        raise AttributeError(text) from None


def run_traced(
    its: Call, required: tuple[Any, ...], options: tuple[Any, ...], optional: tuple[Any, ...] | None, out: Any
) -> Any:
    """`ops.call.run` while torch compiles."""
    if not isinstance(required[0], torch.Tensor):
        return _uncompiled(its, required, options, optional, out)
    operation = its.operation
    others = optional if optional is not None else (None,) * (len(operation.arguments) - len(required))
    arrays = dict(zip(operation.arguments, (*required, *others), strict=True))
    return call(operation, arrays, dict(zip(operation.options, options, strict=True)), out)


@torch.compiler.disable  # type: ignore[untyped-decorator]
def _uncompiled(*given: Any) -> Any:
    return run(*given)


def call(
    operation: Operation, arrays: dict[str, Any], options: dict[str, Any], out: Any = None,
    deterministic: bool | None = None,
) -> Any:  # fmt: skip
    """Run an operation's operator. arrays, options: all of them by name, None for an absent array.

    deterministic: whether its gradients must have the same bits in every run; None: as torch says at the backward.
    """
    arrays = cast(operation, arrays) or arrays
    given = _read(operation, {**arrays, **options}, out)  # torch 2.6 cannot trace |
    if wants_gradient(arrays.values()):
        inside = deterministic is not None or torch._C._functorch.peek_interpreter_stack() is not None
        if not torch.compiler.is_dynamo_compiling() and inside:
            return differentiate(operation, dict(zip(operation.parameters, given, strict=True)), deterministic)
        if operation.gradient is not None:  # whatever its backward reads is made
            more = operation.gradient.options
            given = [more.get(name, one) for name, one in zip(operation.parameters, given, strict=True)]
            given.append(deterministic)
    made = getattr(torch.ops.flashmoe_cupy, operation.name)(*given)
    return chosen(operation, options, (made,) if len(operation.outputs) == 1 else made)


def _read(operation: Operation, values: dict[str, Any], out: Any) -> list[Any]:
    """The operator's arguments. Refuses what it does not take, and what its schema would turn into another type.

    All else is checked when the operator runs.
    """
    why, found, hint, traced = [], [], "", " while torch compiles or traces"
    needed = operation.arguments[: operation.required]
    for name, kind in operation.parameters.items():
        one = value = values[name]
        if kind is None:
            if not (isinstance(value, torch.Tensor) or (value is None and name not in needed)):
                why.append(f"{name} is no tensor; all arrays of a call must be of one library")
                hint = "tensors for all arrays of a call"
            elif value is not None and (scattered := no_strides(torch, value)):
                why.append(f"{name}: {scattered}")
                hint, traced = instead(value, name) or hint, ""  # refused everywhere
        elif not kind.accepts_none(value) and not _is_symbolic(value):
            one = kind.read(value)
            if one is None:
                why.append(f"{name} must be {kind.words}, but is {show(value)}")
        found.append(one)
    for name in [*(["out"] if out is not None else []), *[w for w in operation.written if values[w] is not None]]:
        why.append(f"{name} is given, but the operators that torch compiles and traces have no in-place form")
        hint = f"{name}=None: torch plans the memory of compiled code itself"
    if not why:
        return found
    asked = operation.name + traced
    if torch.compiler.is_dynamo_compiling():  # which cannot trace the making of our own type
        raise ValueError(f"cannot run {asked}: {'; '.join(why)}" + (f"; hint: {hint}" if hint else ""))
    raise UnsupportedProblem(asked, why, hint)


def _is_symbolic(value: Any) -> bool:
    """Whether this is a number that torch traces, or has one."""
    return any(isinstance(one, _SYMBOLS) for one in (value if isinstance(value, tuple) else (value,)))


# ---------------------------------------------------------------------------------------------------------------------
# the operators: schema, body, shape rule, gradient


def _named(operation: Operation, values: Sequence[Any]) -> dict[str, Any]:
    return dict(zip(operation.parameters, values, strict=False))  # without `deterministic`


def _dtype(operation: Operation, name: str, given: Mapping[str, Any]) -> torch.dtype:
    dtypes = {argument: given[argument].dtype for argument in operation.arguments if given.get(argument) is not None}
    its = operation.outputs[name]
    if its.like and its.like not in dtypes:
        return given[operation.arguments[0]].dtype
    dtype = operation.dtype_of(name, dtypes)
    return dtype if isinstance(dtype, torch.dtype) else getattr(torch, dtype.name)


def _results(operation: Operation, made: Mapping[str, torch.Tensor], given: Mapping[str, Any]) -> Any:
    """What the operator gives: every output, an empty tensor in place of one that was not asked for."""
    if len(operation.outputs) == 1:
        return made[next(iter(operation.outputs))]
    first = given[operation.arguments[0]]
    return tuple([
        made[name] if name in made else first.new_empty((0,), dtype=_dtype(operation, name, given))
        for name in operation.outputs
    ])  # fmt: skip


def _made(operation: Operation, given: Mapping[str, Any]) -> dict[str, tuple[Any, ...]]:
    """The shapes of the outputs of a call, by name."""
    shapes = {name: given[name].shape for name in operation.arguments if given.get(name) is not None}
    return operation.shapes(shapes, {name: given[name] for name in operation.options})


def _body(operation: Operation) -> Callable[..., Any]:
    """The operator itself, for real tensors of any device."""

    def body(*values: Any) -> Any:
        given = {  # a schema's list is a tuple here
            name: tuple(value) if kind is not None and tuple in kind.types else value
            for (name, kind), value in zip(operation.parameters.items(), values, strict=False)
        }
        made = flat(operation.function(**given))
        return _results(operation, dict(zip(_made(operation, given), made, strict=True)), given)

    return body


def _shape_rule(operation: Operation) -> Callable[..., Any]:
    def rule(*values: Any) -> Any:
        given = _named(operation, values)
        made = {
            name: values[0].new_empty(shape, dtype=_dtype(operation, name, given))
            for name, shape in _made(operation, given).items()
        }
        return _results(operation, made, given)

    return rule


def _autograd(operation: Operation) -> tuple[Callable[..., None], Callable[..., Any]]:
    """What runs behind an operator of which an input requires a gradient, while grad mode is on, and its backward.

    Both run on the compiler's fake tensors, too.
    """

    def prepare(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        if operation.name not in derivatives():
            deterministic = inputs[-1] if operation.gradient is not None else None
            ctx.formula, arrays = make_formula(operation, _named(operation, inputs), deterministic=deterministic)
            ctx.save_for_backward(*arrays, *output)
            ctx.set_materialize_grads(False)

    def backward(ctx: Any, *arrived: Any) -> Any:
        if operation.gradient is None:
            raise once(operation.name)
        formula, saved = ctx.formula, ctx.saved_tensors
        needs = _named(operation, ctx.needs_input_grad)
        asked = operation.wanted(formula.options)
        if len(asked) < len(operation.outputs):  # called without what backward reads
            again = formula.options | formula.more | dict(zip(formula.names, saved, strict=False))
            made = getattr(torch.ops.flashmoe_cupy, operation.name)(*map(again.get, operation.parameters))
            saved = (*saved[: len(formula.names)], *made)
            arrived = tuple([x if name in asked else None for name, x in zip(operation.outputs, arrived, strict=True)])
        found = formula.gradients(tuple([needs[name] for name in formula.names]), saved, arrived)
        return *map(dict(zip(formula.names, found, strict=True)).get, operation.parameters), None

    return prepare, backward


def _no_vmap(name: str) -> Callable[..., Any]:
    """The batching rule. Without one torch calls the operator in a loop."""

    def refuse(*_: Any) -> Any:
        reason = "torch.func.vmap is not supported"
        raise UnsupportedProblem(f"{name} under vmap", [reason], "give the mapped axis as part of batch or tokens")

    return refuse


def _define(operation: Operation) -> None:
    name, needed, arguments = operation.name, operation.arguments[: operation.required], []
    for parameter, kind in operation.parameters.items():
        array = "Tensor" if parameter in needed else "Tensor?"
        arguments.append(f"{array if kind is None else kind.schema} {parameter}")
    if operation.gradient is not None:
        arguments.append("bool? deterministic=None")
    results = len(operation.outputs)
    returns = "Tensor" if results == 1 else f"({', '.join(['Tensor'] * results)})"
    _library.define(f"{name}({', '.join(arguments)}) -> {returns}", tags=_TAGS)
    _library.impl(name, _body(operation), "CompositeExplicitAutograd")
    qualified = f"flashmoe_cupy::{name}"
    torch.library.register_fake(qualified, _shape_rule(operation), lib=_library)
    torch.library.register_vmap(qualified, _no_vmap(name), lib=_library)
    prepare, backward = _autograd(operation)
    torch.library.register_autograd(qualified, backward, setup_context=prepare, lib=_library)


_library = torch.library.Library("flashmoe_cupy", "FRAGMENT")
each(_define)
