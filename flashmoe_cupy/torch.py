"""The operations for torch tensors, eager and under `torch.compile`, as the operators of `torch.ops.flashmoe_cupy`.

The functions here are those of `flashmoe_cupy`, so either may be called. Eager calls run on torch's current stream.
Compiled and traced code sees one operator with a schema and a shape rule, which the compiler neither looks into nor
splits. The operators have no in-place form: while torch compiles, `out` is refused. Shapes may be dynamic. What is no
tensor runs uncompiled: torch.compile's translation of NumPy code loses what is written to `out=`.

Where the declaration of an operation names the one that gives its gradients, autograd differentiates it once, in eager
and compiled code. Other operations refuse tensors that require a gradient while grad mode is on, with
UnsupportedProblem; the compiler reports it when it traces.

Operators and what surrounds them follow from the declarations of the operations (`plan.operation`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch._dynamo import trace_rules

from flashmoe_cupy.errors import UnsupportedProblem
from flashmoe_cupy.ops import public
from flashmoe_cupy.ops.call import Call, run
from flashmoe_cupy.ops.public import *  # noqa: F403
from flashmoe_cupy.plan.checks import show
from flashmoe_cupy.plan.operation import Operation, each, operations, registered
from flashmoe_cupy.torch_reasons import instead, no_strides

# Where a call cannot be traced, as with `out`, torch.compile goes on with the functions inside. These read memory that
# it does not see and write what its translation of NumPy loses: they run as they are.
for _module in ("cpu", "arrays", "jit", "ops.access", "ops.call"):
    trace_rules.add(f"flashmoe_cupy.{_module}")

__all__ = public.__all__

# The compiler keeps the strides that the tensors had in eager code: no hidden copies, and the same kernel.
_TAGS = (torch.Tag.pt2_compliant_tag, torch.Tag.needs_fixed_stride_order)
_SYMBOLS = (torch.SymInt, torch.SymFloat, torch.SymBool)


def __getattr__(name: str) -> Any:
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


def call(operation: Operation, arrays: dict[str, Any], options: dict[str, Any], out: Any) -> Any:
    """Run an operation's operator. arrays, options: all of them by name, None for an absent array."""
    given = _read(operation, {**arrays, **options}, out)  # torch 2.6 cannot trace |
    if torch.is_grad_enabled() and any([x is not None and x.requires_grad for x in arrays.values()]):
        if not torch.compiler.is_dynamo_compiling() and torch._C._functorch.peek_interpreter_stack() is not None:
            return _transformed(operation, dict(zip(operation.parameters, given, strict=True)))
        if operation.gradient is not None:  # whatever its backward reads is made
            more = operation.gradient.options
            given = [more.get(name, one) for name, one in zip(operation.parameters, given, strict=True)]
    made = getattr(torch.ops.flashmoe_cupy, operation.name)(*given)
    return _chosen(operation, options, (made,) if len(operation.outputs) == 1 else made)


def _chosen(operation: Operation, options: Mapping[str, Any], made: Sequence[Any]) -> Any:
    """What a call of these options returns, of all outputs."""
    wanted = operation.wanted(options)
    return operation.wrap([x for name, x in zip(operation.outputs, made, strict=True) if name in wanted])


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
# gradients


class Formula:
    """How a call is differentiated: by the operation that the declaration of its own one names.

    names: of the arrays that are there. options: all, by name. operators: backward runs an operator, which can be
    traced, and not a function.
    """

    def __init__(
        self, operation: Operation, names: Iterable[str], options: dict[str, Any], *, operators: bool = False
    ) -> None:  # fmt: skip
        assert operation.gradient is not None
        self.operation, self.names, self.options = operation, tuple(names), options
        self.backward = registered(operation.gradient.operation)
        self._operators = operators
        # Places of arrays that may require a gradient and have none.
        self._without = [i for i, name in enumerate(self.names) if f"d{name}" not in self.backward.outputs]

    def look(self, given: Iterable[Any]) -> None:
        """Raise UnsupportedProblem if an array requires a gradient that there is not. given: in the order of names."""
        given = tuple(given)
        if names := [self.names[i] for i in self._without if given[i].requires_grad]:
            raise _refusal(self.operation, names)

    def forward(self, given: Sequence[Any]) -> tuple[Any, ...]:
        """All outputs that the backward reads."""
        assert self.operation.gradient is not None
        options = self.options | self.operation.gradient.options
        return tuple(_flat(self.operation.function(**dict(zip(self.names, given, strict=True)), **options)))

    def gradients(self, need: Sequence[str], saved: Sequence[Any], arrived: Sequence[Any]) -> dict[str, Any]:
        """The gradients of the arguments `need`, by their names.

        saved: the arrays, then all outputs. arrived: the gradient of each output, None = 0.
        """
        backward, outputs = self.backward, self.operation.outputs
        given = {**self.options, **dict(zip((*self.names, *outputs), saved, strict=True))}
        for name, x in zip(outputs, arrived, strict=True):
            mine = f"d{name}"
            if x is None:
                x = torch.zeros_like(given[name]) if mine in backward.arguments[: backward.required] else None
            elif x.dim() and x.stride(-1) != 1:  # as the gradient of a sum
                x = x.contiguous()
            given[mine] = x
        given["need"], given["deterministic"] = " ".join(need), torch.are_deterministic_algorithms_enabled()
        values = {name: given.get(name) for name in backward.parameters}
        if self._operators:
            made = getattr(torch.ops.flashmoe_cupy, backward.name)(*values.values())
        else:
            made = backward.function(**values)
        found = dict(zip(backward.outputs, made, strict=True))
        return {name: found[f"d{name}"] for name in need}


class _Call(torch.autograd.Function):  # type: ignore[misc, name-defined, unused-ignore]
    """A call in eager code. Its results are all outputs."""

    @staticmethod
    def forward(formula: Formula, *given: Any) -> tuple[Any, ...]:
        return formula.forward(given)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
        ctx.formula = inputs[0]
        ctx.save_for_backward(*inputs[1:], *output)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, *arrived: Any) -> tuple[Any, ...]:
        formula, saved = ctx.formula, ctx.saved_tensors
        need = [name for name, needs in zip(formula.names, ctx.needs_input_grad[1:], strict=True) if needs]
        if not need:
            return (None,) * (1 + len(formula.names))
        if torch.is_grad_enabled():  # create_graph=True, torch.func
            found = dict(zip(need, _Gradients.apply(formula, need, len(saved), *saved, *arrived), strict=True))
            return None, *map(found.get, formula.names)
        return None, *map(formula.gradients(need, saved, arrived).get, formula.names)


class _Gradients(torch.autograd.Function):  # type: ignore[misc, name-defined, unused-ignore]
    """Gradients of which somebody may want gradients."""

    @staticmethod
    def forward(formula: Formula, need: Sequence[str], count: int, *given: Any) -> tuple[Any, ...]:
        return tuple(formula.gradients(need, given[:count], given[count:]).values())

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:  # noqa: ARG004
        ctx.name = inputs[0].operation.name

    @staticmethod
    def backward(ctx: Any, *_: Any) -> Any:
        raise _once(ctx.name)


# Function.apply without what it does for torch.func, which takes longer than all else.
_apply = super(torch.autograd.Function, _Call).apply


class Differentiated(Formula):
    """In place of the plan of a call on plain tensors of which some require a gradient, whatever their shapes.

    wanted: the options, and which other arrays are given, as `ops.call.run` looks for plans.
    """

    def __init__(self, call: Call, wanted: tuple[Any, ...]) -> None:
        operation = call.operation
        count, self._call = len(operation.options), call
        options, there = dict(zip(operation.options, wanted, strict=False)), (*wanted[count:], None)[0]
        others = operation.arguments[operation.required :]
        self._others, self._has_out = there and there[:-1], bool(there and there[-1])
        names = [name for name, given in zip(others, self._others or (), strict=False) if given]
        super().__init__(operation, (*operation.arguments[: operation.required], *names), options)
        assert operation.gradient is not None
        self._saved = tuple((options | operation.gradient.options).values())
        self._single = operation.gives_one_array and len(operation.wanted(options)) == 1

    def fast_call(self, access: Any, given: Any) -> Callable[[tuple[Any, ...]], Any]:  # noqa: ARG002
        """As `ops.call.Plan` has it."""
        return self._run

    def _run(self, given: tuple[Any, ...]) -> Any:
        if self._has_out:
            names = [name for name, x in zip((*self.names, "out"), given, strict=True) if x.requires_grad]
            why = f"out is given, but {', '.join(names)} require{'s' * (len(names) == 1)} grad and grad mode is on"
            raise UnsupportedProblem(f"the gradient of {self.operation.name}", [why], "out=None, or torch.no_grad()")
        if self._without:
            self.look(given)
        made = _apply(self, *given)
        return made[0] if self._single else _chosen(self.operation, self.options, made)

    def forward(self, given: Sequence[Any]) -> tuple[Any, ...]:
        needed = self.operation.required
        if self._others is None:
            made = run(self._call, tuple(given), self._saved)
        else:
            rest = iter(given[needed:])
            others = tuple([next(rest) if there else None for there in self._others])
            made = run(self._call, tuple(given[:needed]), self._saved, others)
        return made if type(made) is tuple else tuple(_flat(made))


def _transformed(operation: Operation, given: Mapping[str, Any]) -> Any:
    """A call inside of torch.func.grad or vjp. given: all parameters by name."""
    names = [name for name in operation.arguments if given.get(name) is not None]
    arrays, options = [given[name] for name in names], {name: given[name] for name in operation.options}
    if operation.gradient is None:
        raise _refusal(operation, [name for name, x in zip(names, arrays, strict=True) if x.requires_grad])
    formula = Formula(operation, names, options)
    formula.look(arrays)
    return _chosen(operation, options, _Call.apply(formula, *arrays))


def _derivatives() -> dict[str, str]:
    """The name of each operation that gives gradients, and of which one."""
    return {its.gradient.operation: its.name for its in operations() if its.gradient is not None}


def _refusal(operation: Operation, names: Sequence[str]) -> UnsupportedProblem:
    why = "there is no backward yet" if operation.gradient is None else "there is no gradient of it"
    return UnsupportedProblem(
        f"the gradient of {operation.name}",
        [f"{name} requires grad and grad mode is on, but {why}" for name in names],
        "use torch.no_grad() or .detach() where gradients are not needed",
    )


def _once(name: str) -> UnsupportedProblem:
    reason = "its gradient has no gradient; only first derivatives can be had"
    return UnsupportedProblem(f"the second derivative of {_derivatives().get(name, name)}", [reason])


# ---------------------------------------------------------------------------------------------------------------------
# the operators: schema, body, shape rule, gradient


def _named(operation: Operation, values: Sequence[Any]) -> dict[str, Any]:
    return dict(zip(operation.parameters, values, strict=True))


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
            for (name, kind), value in zip(operation.parameters.items(), values, strict=True)
        }
        made = _flat(operation.function(**given))
        return _results(operation, dict(zip(_made(operation, given), made, strict=True)), given)

    return body


def _flat(made: Any) -> list[torch.Tensor]:
    """The outputs in what a function returns."""
    if made is None:
        return []
    return [made] if isinstance(made, torch.Tensor) else [x for one in made for x in _flat(one)]


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
        named = _named(operation, inputs)
        arrays = {name: named[name] for name in operation.arguments if named.get(name) is not None}
        if operation.gradient is None:
            if operation.name not in _derivatives():
                raise _refusal(operation, [name for name, x in arrays.items() if x.requires_grad])
            return
        formula = Formula(operation, arrays, {name: named[name] for name in operation.options}, operators=True)
        formula.look(arrays.values())
        ctx.formula = formula
        ctx.save_for_backward(*arrays.values(), *(output if isinstance(output, tuple) else (output,)))
        ctx.set_materialize_grads(False)

    def backward(ctx: Any, *arrived: Any) -> Any:
        if operation.gradient is None:
            raise _once(operation.name)
        formula, saved = ctx.formula, ctx.saved_tensors
        needs = dict(zip(operation.parameters, ctx.needs_input_grad, strict=True))
        need = [name for name in formula.names if needs[name]]
        if len(operation.wanted(formula.options)) < len(operation.outputs):  # called without what backward reads
            again = formula.options | operation.gradient.options | dict(zip(formula.names, saved, strict=False))
            made = getattr(torch.ops.flashmoe_cupy, operation.name)(*map(again.get, operation.parameters))
            asked = operation.wanted(formula.options)
            saved = (*saved[: len(formula.names)], *made)
            arrived = tuple([x if name in asked else None for name, x in zip(operation.outputs, arrived, strict=True)])
        found = formula.gradients(need, saved, arrived) if need else {}
        return tuple(map(found.get, operation.parameters))

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
