"""The operations for torch tensors, eager and under `torch.compile`, as the operators of `torch.ops.flashmoe_cupy`.

The functions here are those of `flashmoe_cupy`, so either may be called. Eager calls run on torch's current stream.
Compiled and traced code sees one operator with a schema and a shape rule, which the compiler neither looks into nor
splits. The operators have no in-place form: while torch compiles, `out` is refused. Shapes may be dynamic. What is no
tensor runs uncompiled: torch.compile's translation of NumPy code loses what is written to `out=`.

autograd differentiates, once, the operations whose declarations name another one that gives their gradients. All others
refuse tensors that require a gradient while grad mode is on, with UnsupportedProblem; the compiler reports it.

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
Forward = Callable[[tuple[Any, ...]], Any]  # arrays -> results


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
    arrays = cast(operation, arrays) or arrays
    given = _read(operation, {**arrays, **options}, out)  # torch 2.6 cannot trace |
    if _wants_gradient(arrays.values()):
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

    names: of the arrays that are there. options: all, by name. forward: gives all outputs; None: where operators run,
    which can be traced, and backward runs one, too.
    """

    def __init__(
        self, operation: Operation, names: Iterable[str], options: dict[str, Any], forward: Forward | None = None
    ) -> None:  # fmt: skip
        assert operation.gradient is not None
        self.operation, self.names, self.options, self.forward = operation, tuple(names), options, forward
        self.backward, self.more = registered(operation.gradient.operation), operation.gradient.options
        saved = enumerate((*self.names, *operation.outputs))
        self._saved = [(i, name) for i, name in saved if name in self.backward.arguments]
        self._fixed = {name: options[name] for name in self.backward.options if name in options}
        # Places of arrays that may require a gradient and have none.
        self._without = [i for i, name in enumerate(self.names) if f"d{name}" not in self.backward.outputs]

    def look(self, given: Sequence[Any]) -> None:
        """Raise UnsupportedProblem if an array requires a gradient that there is not. given: in the order of names."""
        if names := [self.names[i] for i in self._without if getattr(given[i], "requires_grad", False)]:
            raise _refusal(self.operation, names, "there is no gradient of it")

    def gradients(self, need: Sequence[str], saved: Sequence[Any], arrived: Sequence[Any]) -> dict[str, Any]:
        """The gradients of the arguments `need`, by their names.

        saved: the arrays, then all outputs. arrived: the gradient of each output, None = 0.
        """
        given, backward = dict(self._fixed), self.backward
        given["need"], given["deterministic"] = " ".join(need), torch.are_deterministic_algorithms_enabled()
        for i, name in self._saved:
            given[name] = saved[i]
        for name, x in zip(self.operation.outputs, arrived, strict=True):
            if x is None and f"d{name}" in backward.arguments[: backward.required]:
                x = torch.zeros_like(given[name])
            if x is not None:  # the gradient of a sum has strides of 0
                given[f"d{name}"] = x if x.stride()[-1:] in ((1,), ()) else x.contiguous()
        if self.forward is None:
            made = getattr(torch.ops.flashmoe_cupy, backward.name)(*map(given.get, backward.parameters))
        else:
            made = backward.function(**given)
        found = dict(zip(backward.outputs, made, strict=True))
        return {name: found[f"d{name}"] for name in need}


class _FlashMoE(torch.autograd.Function):  # type: ignore[misc, name-defined, unused-ignore]
    """A call in eager code. Its results are all outputs."""

    @staticmethod
    def forward(formula: Formula, *given: Any) -> tuple[Any, ...]:
        return tuple(_flat(formula.forward(given)))  # type: ignore[misc]

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
        ctx.formula = inputs[0]
        ctx.save_for_backward(*inputs[1:], *output)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, *arrived: Any) -> tuple[Any, ...]:
        formula, saved = ctx.formula, ctx.saved_tensors
        need = [name for name, needs in zip(formula.names, ctx.needs_input_grad[1:], strict=True) if needs]
        if torch.is_grad_enabled():  # create_graph=True, torch.func
            found = dict(zip(need, _Gradients.apply(formula, need, len(saved), *saved, *arrived), strict=True))
        else:
            found = formula.gradients(need, saved, arrived)
        return None, *map(found.get, formula.names)


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
_apply = super(torch.autograd.Function, _FlashMoE).apply


class Changed:
    """Calls of the same options with the same arrays there that torch differentiates or casts. Runs as a plan does.

    wanted: the options, and which other arrays are given, as `ops.call.run` looks for plans.
    """

    def __init__(self, call: Call, wanted: tuple[Any, ...]) -> None:
        self.operation = its = call.operation
        count, self._needed, self._call = len(its.options), its.required, call
        self._given, self._others = wanted[:count], (*wanted[count:], None)[0]
        others = zip([*its.arguments[self._needed :], "out"], self._others or (), strict=False)
        self._names = [*its.arguments[: self._needed], *[name for name, there in others if there]]
        self._has_out = self._names[-1] == "out"
        self._options = dict(zip(its.options, self._given, strict=True))
        self._formula = Formula(its, self._names, self._options, lambda given: self._run(given, self._saved))
        self._saved = tuple((self._options | self._formula.more).values())
        self._single = its.gives_one_array and len(its.wanted(self._options)) == 1

    def fast_call(self, access: Any, given: tuple[Any, ...]) -> Forward | None:  # noqa: ARG002
        """As `ops.call.Plan` has it. None: nothing has to be changed."""
        if _wants_gradient(given):
            return self._differentiate
        return self._run_cast if self._cast(given) is not given else None

    def _run_cast(self, given: tuple[Any, ...]) -> Any:
        return self._run(self._cast(given), self._given)

    def _differentiate(self, given: tuple[Any, ...]) -> Any:
        if self._has_out:
            names = [name for name, x in zip(self._names, given, strict=True) if getattr(x, "requires_grad", False)]
            raise _refusal(self.operation, names, "out is given, and only a new result has a gradient")
        self._formula.look(given)
        try:
            made = _apply(self._formula, *(self._cast(given) if torch._C._is_any_autocast_enabled() else given))
        except UnsupportedProblem:
            with torch.no_grad():
                self._run(given, self._given)  # its error tells of the options as they were given
            raise
        return made[0] if self._single else _chosen(self.operation, self._options, made)

    def _run(self, given: tuple[Any, ...], options: tuple[Any, ...]) -> Any:
        if self._others is None:
            return run(self._call, given, options)
        rest = iter(given[self._needed :])
        *others, out = [next(rest) if there else None for there in self._others]
        return run(self._call, given[: self._needed], options, tuple(others), out)

    def _cast(self, given: tuple[Any, ...]) -> tuple[Any, ...]:
        """The arrays as torch.autocast wants them; the same tuple where nothing changes."""
        found = cast(self.operation, dict(zip(self._names, given, strict=True)))
        return tuple(found.values()) if found else given


def _wants_gradient(given: Iterable[Any]) -> bool:
    return torch.is_grad_enabled() and any(getattr(x, "requires_grad", False) for x in given)


def cast(operation: Operation, arrays: dict[str, Any]) -> dict[str, Any]:
    """The arrays by name as torch.autocast wants them; empty where nothing changes."""
    device = arrays[operation.arguments[0]].device.type
    if device not in ("cpu", "cuda") or not torch.is_autocast_enabled(device):
        return {}
    dtype, dtypes = torch.get_autocast_dtype(device), (torch.float32, torch.bfloat16, torch.float16)
    odd = [name for name in operation.autocast if getattr(arrays[name], "dtype", dtype) is not dtype]
    new = {name: arrays[name].to(dtype) for name in odd if arrays[name].dtype in dtypes}
    return {**arrays, **new} if new else {}


def _formula(operation: Operation, named: Mapping[str, Any], forward: Forward | None = None) -> tuple[Formula, Any]:
    """How a call is differentiated, and its arrays. named: all parameters. Raises UnsupportedProblem if it is not."""
    arrays = {name: named[name] for name in operation.arguments if named.get(name) is not None}
    if operation.gradient is None:
        names = [name for name, x in arrays.items() if x.requires_grad]
        raise _refusal(operation, names, "there is no backward yet")
    formula = Formula(operation, arrays, {name: named[name] for name in operation.options}, forward)
    formula.look([*arrays.values()])
    return formula, arrays.values()


def _transformed(operation: Operation, named: Mapping[str, Any]) -> Any:
    """A call inside of torch.func.grad or vjp."""

    def forward(given: tuple[Any, ...]) -> Any:
        return operation.function(**{**named, **formula.more, **dict(zip(formula.names, given, strict=True))})

    formula, arrays = _formula(operation, named, forward)
    return _chosen(operation, formula.options, _FlashMoE.apply(formula, *arrays))


def _derivatives() -> dict[str, str]:
    """The name of each operation that gives gradients, and of which one."""
    return {its.gradient.operation: its.name for its in operations() if its.gradient is not None}


def _refusal(operation: Operation, names: Sequence[str], why: str) -> UnsupportedProblem:
    return UnsupportedProblem(
        f"the gradient of {operation.name}",
        [f"{name} requires grad and grad mode is on, but {why}" for name in names],
        "use torch.no_grad() or .detach() where gradients are not needed",
    )


def _once(name: str) -> UnsupportedProblem:
    return UnsupportedProblem(f"the second derivative of {_derivatives().get(name, name)}", ["only the first is known"])


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
        if operation.name not in _derivatives():
            ctx.formula, arrays = _formula(operation, _named(operation, inputs))
            ctx.save_for_backward(*arrays, *output)
            ctx.set_materialize_grads(False)

    def backward(ctx: Any, *arrived: Any) -> Any:
        if operation.gradient is None:
            raise _once(operation.name)
        formula, saved = ctx.formula, ctx.saved_tensors
        needs = dict(zip(operation.parameters, ctx.needs_input_grad, strict=True))
        need = [name for name in formula.names if needs[name]]
        asked = operation.wanted(formula.options)
        if len(asked) < len(operation.outputs):  # called without what backward reads
            again = formula.options | formula.more | dict(zip(formula.names, saved, strict=False))
            made = getattr(torch.ops.flashmoe_cupy, operation.name)(*map(again.get, operation.parameters))
            saved = (*saved[: len(formula.names)], *made)
            arrived = tuple([x if name in asked else None for name, x in zip(operation.outputs, arrived, strict=True)])
        return tuple(map(formula.gradients(need, saved, arrived).get, operation.parameters))

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
