"""How calls on torch tensors are differentiated, once, and what torch.autocast makes of them.

Everything follows from the declarations of the operations (`plan.operation`), which name the one that gives gradients.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from operator import itemgetter
from typing import Any

import torch

from flashmoe_cupy.errors import UnsupportedProblem
from flashmoe_cupy.ops.call import Call, run
from flashmoe_cupy.plan.operation import Operation, operations, registered

Forward = Callable[[tuple[Any, ...]], Any]  # arrays -> results
_Picker = Callable[[Sequence[Any]], tuple[Any, ...]]


def _picker(places: Sequence[int]) -> _Picker:
    """What takes the elements at these places."""
    return itemgetter(*places) if len(places) > 1 else lambda given: tuple([given[i] for i in places])


class Formula:
    """How a call is differentiated: by the operation that the declaration of its own one names.

    names: of the arrays that are there. options: all, by name. forward: gives all outputs; None: where operators run,
    which can be traced, and backward runs one, too. deterministic: whether gradients must have the same bits in every
    run; None: as torch.use_deterministic_algorithms says at the backward.
    """

    def __init__(
        self, operation: Operation, names: Iterable[str], options: dict[str, Any], forward: Forward | None = None,
        deterministic: bool | None = None,
    ) -> None:  # fmt: skip
        assert operation.gradient is not None
        self.operation, self.names, self.options, self.forward = operation, tuple(names), options, forward
        self.deterministic = deterministic
        self.backward = backward = registered(operation.gradient.operation)
        self.more = operation.gradient.options
        # Where the arrays that backward reads stand among those that are saved, those that arrive, and a None.
        order = *self.names, *operation.outputs, *[f"d{name}" for name in operation.outputs]
        places = [order.index(name) if name in order else -1 for name in backward.arguments]
        needed, others = places[: backward.required], places[backward.required :]
        self._required, self._optional, self._needed = _picker(needed), _picker(others), needed
        self._perhaps = [i for i in others if i >= 0]
        self._first = len(self.names) + len(operation.outputs)  # the place of what arrives first
        # Places of arrays that may require a gradient and have none.
        self._without = [i for i, name in enumerate(self.names) if f"d{name}" not in backward.outputs]
        self._ways: dict[tuple[Any, bool], tuple[tuple[Any, ...], _Picker]] = {}

    def look(self, given: Sequence[Any]) -> None:
        """Raise UnsupportedProblem if an array requires a gradient that there is not. given: in the order of names."""
        if names := [self.names[i] for i in self._without if getattr(given[i], "requires_grad", False)]:
            raise _refusal(self.operation, names, "there is no gradient of it")

    def gradients(self, needs: tuple[bool, ...], saved: Sequence[Any], arrived: Sequence[Any]) -> tuple[Any, ...]:
        """The gradient of each array, None for one that is not needed. needs: whether it is, for each.

        saved: the arrays, then all outputs. arrived: the gradient of each output, None = 0.
        """
        asked = self.deterministic
        way = needs, torch.are_deterministic_algorithms_enabled() if asked is None else asked
        options, results = self._ways.get(way) or self._way(*way)
        given, i = [*saved, *arrived, None], self._first
        for x in arrived:
            if x is None:
                if i in self._needed:
                    given[i] = torch.zeros_like(saved[i - len(arrived)])
            elif not x.is_contiguous() and x.stride(-1) != 1:  # the gradient of a sum has strides of 0
                given[i] = x.contiguous()
            i += 1
        required, optional = self._required(given), None
        for i in self._perhaps:
            if given[i] is not None:
                optional = self._optional(given)
                break
        run_it = self._operator if self.forward is None else run
        return results((*run_it(self.backward.call, required, options, optional), None))

    def _operator(
        self, call: Call, required: tuple[Any, ...], options: tuple[Any, ...], optional: tuple[Any, ...] | None
    ) -> Any:
        """`run` where that can be traced, giving every output."""
        its = call.operation
        named = dict(zip(its.arguments, (*required, *(optional or ())), strict=False))
        named |= dict(zip(its.options, options, strict=True))
        return getattr(torch.ops.flashmoe_cupy, its.name)(*map(named.get, its.parameters))

    def _way(self, needs: tuple[bool, ...], deterministic: bool) -> tuple[tuple[Any, ...], _Picker]:
        """The options of backward, and what takes the gradient of each array from its results and a None."""
        need = [name for name, needed in zip(self.names, needs, strict=True) if needed]
        known = self.options | {"need": " ".join(need), "deterministic": deterministic}
        options = {name: known[name] for name in self.backward.options}
        made = [*(self.backward.outputs if self.forward is None else self.backward.wanted(options))]
        places = [made.index(f"d{name}") if name in need else -1 for name in self.names]
        self._ways[needs, deterministic] = way = tuple(options.values()), _picker(places)
        return way


class _FlashMoE(torch.autograd.Function):  # type: ignore[misc, name-defined, unused-ignore]
    """A call in eager code. Its results are all outputs. fast: gives them for such arrays, if that is known."""

    @staticmethod
    def forward(ctx: Any, formula: Formula, fast: Forward | None, *given: Any) -> tuple[Any, ...]:
        made = fast(given) if fast is not None else None
        if made is None:
            made = tuple(flat(formula.forward(given)))  # type: ignore[misc]
        ctx.formula = formula
        ctx.save_for_backward(*given, *made)
        ctx.set_materialize_grads(False)
        return made

    @staticmethod
    def backward(ctx: Any, *arrived: Any) -> tuple[Any, ...]:
        formula, saved, needs = ctx.formula, ctx.saved_tensors, ctx.needs_input_grad[2:]
        if torch.is_grad_enabled():  # create_graph=True, torch.func
            made = iter(_Gradients.apply(formula, needs, len(saved), *saved, *arrived))
            return None, None, *[next(made) if needed else None for needed in needs]
        return None, None, *formula.gradients(needs, saved, arrived)


class _Transformed(torch.autograd.Function):  # type: ignore[misc, name-defined, unused-ignore]
    """The same for torch.func.grad and vjp, which want forward in two steps. It takes longer that way."""

    @staticmethod
    def forward(formula: Formula, fast: None, *given: Any) -> tuple[Any, ...]:  # noqa: ARG004
        return tuple(flat(formula.forward(given)))  # type: ignore[misc]

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
        ctx.formula = inputs[0]
        ctx.save_for_backward(*inputs[2:], *output)
        ctx.set_materialize_grads(False)

    backward = _FlashMoE.backward


class _Gradients(torch.autograd.Function):  # type: ignore[misc, name-defined, unused-ignore]
    """Gradients of which somebody may want gradients: those that are needed."""

    @staticmethod
    def forward(formula: Formula, needs: tuple[bool, ...], count: int, *given: Any) -> tuple[Any, ...]:
        return tuple([x for x in formula.gradients(needs, given[:count], given[count:]) if x is not None])

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:  # noqa: ARG004
        ctx.name = inputs[0].operation.name

    @staticmethod
    def backward(ctx: Any, *_: Any) -> Any:
        raise once(ctx.name)


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
        asked = len(its.wanted(self._options))
        self._single = its.gives_one_array and asked == 1
        # Whether a plan's fast call gives all outputs, and whether they are the result.
        self._flat = its.gives_one_array and len(its.outputs) > 1
        self._whole = self._flat and asked == len(its.outputs)

    def fast_call(self, access: Any, given: tuple[Any, ...]) -> Forward | None:
        """As `ops.call.Plan` has it. None: nothing has to be changed. Raises UnsupportedProblem for a gradient that
        there is not: arrays like these, which a guard knows, need not be asked again.
        """
        if not wants_gradient(given):
            return self._run_cast if self._cast(given) is not given else None
        if self._has_out:
            names = [name for name, x in zip(self._names, given, strict=True) if getattr(x, "requires_grad", False)]
            raise _refusal(self.operation, names, "out is given, and only a new result has a gradient")
        self._formula.look(given)
        return partial(self._differentiate, self._plan(access, given))

    def _plan(self, access: Any, given: tuple[Any, ...]) -> Forward | None:
        """The fast call that gives all outputs for such arrays, if there is one by now."""
        if not (access.guards and self._flat):
            return None
        with torch.no_grad():
            key = access.key(given)
        wanted = self._saved if self._others is None else (*self._saved, self._others)
        plan = None if key is None else self._call.plans.find((key, wanted))
        if plan is None or isinstance(plan, Changed):  # new, or arrays that have to be cast
            return None
        return plan.fast_call(access, given)

    def _run_cast(self, given: tuple[Any, ...]) -> Any:
        return self._run(self._cast(given), self._given)

    def _differentiate(self, fast: Forward | None, given: tuple[Any, ...]) -> Any:
        try:
            made = _apply(self._formula, fast, *(self._cast(given) if torch._C._is_any_autocast_enabled() else given))
        except UnsupportedProblem:
            with torch.no_grad():
                self._run(given, self._given)  # its error tells of the options as they were given
            raise
        if self._single:
            return made[0]
        return made if self._whole else chosen(self.operation, self._options, made)

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


def wants_gradient(given: Iterable[Any]) -> bool:
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


def make_formula(
    operation: Operation, named: Mapping[str, Any], forward: Forward | None = None, deterministic: bool | None = None
) -> tuple[Formula, Any]:  # fmt: skip
    """How a call is differentiated, and its arrays. named: all parameters. Raises UnsupportedProblem if it is not."""
    arrays = {name: named[name] for name in operation.arguments if named.get(name) is not None}
    if operation.gradient is None:
        names = [name for name, x in arrays.items() if x.requires_grad]
        raise _refusal(operation, names, "there is no backward yet")
    options = {name: named[name] for name in operation.options}
    formula = Formula(operation, arrays, options, forward, deterministic)
    formula.look([*arrays.values()])
    return formula, arrays.values()


def differentiate(operation: Operation, named: Mapping[str, Any], deterministic: bool | None = None) -> Any:
    """A call whose gradient somebody wants, also inside of torch.func.grad or vjp. named: all parameters."""

    def forward(given: tuple[Any, ...]) -> Any:
        return operation.function(**{**named, **formula.more, **dict(zip(formula.names, given, strict=True))})

    formula, arrays = make_formula(operation, named, forward, deterministic)
    return chosen(operation, formula.options, _Transformed.apply(formula, None, *arrays))


def derivatives() -> dict[str, str]:
    """The name of each operation that gives gradients, and of which one."""
    return {its.gradient.operation: its.name for its in operations() if its.gradient is not None}


def _refusal(operation: Operation, names: Sequence[str], why: str) -> UnsupportedProblem:
    return UnsupportedProblem(
        f"the gradient of {operation.name}",
        [f"{name} requires grad and grad mode is on, but {why}" for name in names],
        "use torch.no_grad() or .detach() where gradients are not needed",
    )


def once(name: str) -> UnsupportedProblem:
    return UnsupportedProblem(f"the second derivative of {derivatives().get(name, name)}", ["only the first is known"])


def chosen(operation: Operation, options: Mapping[str, Any], made: Sequence[Any]) -> Any:
    """What a call of these options returns, of all outputs."""
    wanted = operation.wanted(options)
    return operation.wrap([x for name, x in zip(operation.outputs, made, strict=True) if name in wanted])


def flat(made: Any) -> list[torch.Tensor]:
    """The outputs in what a function returns."""
    if made is None:
        return []
    return [made] if isinstance(made, torch.Tensor) else [x for one in made for x in flat(one)]
