"""The way of every call: options in exact types, the plan of an earlier call or validation, outputs, kernels or NumPy.

`run(call, ...)` is the one function that the public functions share. A call like an earlier one takes its fast way: one
look at its arrays, their addresses, new outputs, the launches.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from flashmoe_cupy import _env, arrays
from flashmoe_cupy.arrays import View, row_major, view
from flashmoe_cupy.dtypes import DType, to_numpy
from flashmoe_cupy.errors import UnsupportedProblem
from flashmoe_cupy.ops.access import ArrayAccess, find
from flashmoe_cupy.ops.adapters import adapter
from flashmoe_cupy.ops.compiled import compiled, run_traced, unknown
from flashmoe_cupy.ops.memory import GuardedPlans, PlanMemory
from flashmoe_cupy.ops.workspace import Workspaces, may_stay
from flashmoe_cupy.plan.operation import Operation
from flashmoe_cupy.plan.options import is_window

if TYPE_CHECKING:
    from flashmoe_cupy.ops.overlap import Overlap

Views = tuple[View | None, ...]  # in the order of the operation's arguments
FastCall = Callable[[tuple[Any, ...]], Any]  # given arrays -> the result; None: the long way, this time


class Call:
    """An operation, and what its earlier calls have left."""

    __slots__ = ("exact_types", "guarded", "guards", "operation", "pair", "plans")

    def __init__(self, operation: Operation) -> None:
        self.operation = operation
        self.exact_types, self.pair = operation.exact_types, operation.pair
        self.plans: PlanMemory[Plan] = PlanMemory()
        self.guarded = GuardedPlans()
        self.guards = self.guarded.entries  # quicker to read
        operation.call = self


@compiled(run_traced)
def run(
    call: Call,
    required: tuple[Any, ...],
    options: tuple[Any, ...],
    optional: tuple[Any, ...] | None = None,
    out: Any = None,
) -> Any:
    """The result of a call. required, optional: its arrays in the operation's order, None where one is absent.

    options: in the order of the function's signature. optional: None = all absent, and so is out.
    """
    # What is remembered is found by options of exact types only, for 1 == True == 1.0.
    known = tuple(map(type, options)) in call.exact_types and (call.pair < 0 or is_window(options[call.pair]))
    if not known:
        read = call.operation.exact(options)
        if read is not None:
            known, options = True, read
    given, wanted, key, access = required, options, None, None
    if optional is not None:
        others = (*optional, out)
        given += tuple([x for x in others if x is not None])
        wanted = (*options, tuple([x is not None for x in others]))
    if known:
        for guard, fast in call.guards.get(wanted, ()):
            if guard(*given):
                found = fast(given)
                if found is not None:
                    return found
                break
        access = find(type(required[0]))
        if access is not None:
            key = access.key(given)
            if key is not None:
                key = key, wanted
                plan = call.plans.find(key)
                if plan is not None:
                    fast = plan.fast_call(access, given)
                    if fast is not None:
                        found = fast(given)
                        if found is not None:
                            call.guarded.note(access, given, wanted, plan)
                            return found
    absent = (None,) * (len(call.operation.arguments) - len(required))
    return _run(call, (*required, *(optional or absent)), options, out, known, key, access)


@compiled(unknown)
def known(call: Call, required: tuple[Any, ...], options: tuple[Any, ...]) -> Any:
    """The result of a call without optional arrays that a guard knows, as `run` gives it; None: it knows none.

    A guard knows arrays that have run as they are, so whoever changes arrays for `run` may ask before.
    """
    if tuple(map(type, options)) in call.exact_types and (call.pair < 0 or is_window(options[call.pair])):
        for guard, fast in call.guards.get(options, ()):
            if guard(*required):
                return fast(required)
    return None


def _run(
    call: Call, given: tuple[Any, ...], options: tuple[Any, ...], out: Any, known: bool, key: Any,
    access: ArrayAccess | None,
) -> Any:  # fmt: skip
    """The way of a call that is new, or unusual. key: by which `run` looks for the plan of the next one like it."""
    operation = call.operation
    named = dict(zip(operation.arguments, given, strict=True))
    chosen = dict(zip(operation.options, options, strict=True))
    other = adapter(given[0])
    if other is not None:
        return other.call(operation, named, chosen, out)
    outs = {"out": out} if operation.has_out else {}
    try:
        needed = operation.arguments[: operation.required]
        views = tuple([view(x, name) if x is not None or name in needed else None for name, x in named.items()])
        out_view = None if out is None else view(out, "out")
    except (UnsupportedProblem, TypeError) as error:
        from flashmoe_cupy.ops.unreadable import unreadable

        raise unreadable(operation, named | chosen | outs, error) from None
    # With those that it writes goes whether they are read-only.
    ends = [7 if name in operation.written else 6 for name in named]
    full = tuple([v and v[1:end] for v, end in zip(views, ends, strict=True)]), options, out_view and out_view[1:7]
    plan = call.plans.find(full) if known else None
    if plan is None:
        there = {name: v for name, v in zip(operation.arguments, views, strict=True) if v is not None}
        result = {"out": out_view} if operation.has_out else {}
        problem = operation.make(**there, **chosen, **result)
        plan = Plan(operation, problem, views, chosen, out_view)
        if known:
            call.plans.keep(full, plan)
    if out_view is not None and plan.overlap is not None:
        plan.overlap.check(out_view, views)
    for i, overlap in plan.written:
        written = views[i]
        assert written is not None
        overlap.check(written, views)
    first = views[0]
    assert first is not None
    if key is not None and access is not None and (access.host or (first.device >= 0 and access.reads)):
        call.plans.keep(key, plan)
    try:
        return plan.run(views, out_view, out)
    except UnsupportedProblem as error:
        if first.device >= 0:
            raise
        from flashmoe_cupy.ops.unreadable import told

        # What lists hold, which only the NumPy back end reads: the call is told as for what is seen before.
        raise UnsupportedProblem(told(operation, named | chosen | outs), error.reasons, error.hint) from None


class Form:
    """An output: its name, shape, dtype, row-major strides, and what it holds where nothing is written."""

    __slots__ = ("dtype", "fill", "name", "shape", "strides")

    def __init__(
        self, name: str, shape: tuple[int, ...], dtype: DType, strides: tuple[int, ...], fill: float
    ) -> None:  # fmt: skip
        self.name, self.shape, self.dtype, self.strides, self.fill = name, shape, dtype, strides, fill


def forms(
    operation: Operation, views: Mapping[str, View], options: dict[str, Any]
) -> list[Form]:  # fmt: skip
    """The outputs of a call. views: its arguments, by name."""
    shapes = {name: v.shape for name, v in views.items()}
    dtypes = {name: v.dtype for name, v in views.items()}
    return [
        Form(name, shape, operation.dtype_of(name, dtypes), row_major(shape), operation.outputs[name].fill)
        for name, shape in operation.shapes(shapes, options).items()
    ]


class Plan:
    """What all calls with the same shapes, strides, dtypes and options need."""

    __slots__ = ("_fast", "_loaded", "_nothing", "forms", "operation", "overlap", "places", "problem", "written")

    def __init__(
        self, operation: Operation, problem: Any, views: Views, options: dict[str, Any], out: View | None
    ) -> None:  # fmt: skip
        self.operation, self.problem = operation, problem
        there = {name: v for name, v in zip(operation.arguments, views, strict=True) if v is not None}
        self.forms = forms(operation, there, options)
        # Of the arrays that are given, in the table of addresses of a call.
        self.places = [i for i, v in enumerate((*views, out), 1) if v is not None]
        self.overlap: Overlap | None = None
        self.written: list[tuple[int, Overlap]] = []  # given arrays that become results, by their place
        if out is not None:
            from flashmoe_cupy.ops.overlap import Overlap

            self.overlap = Overlap(operation.name, operation.arguments, views, out)
        for i, (name, v) in enumerate(zip(operation.arguments, views, strict=True)):
            if name in operation.written and v is not None:
                from flashmoe_cupy.ops.overlap import Overlap

                self.written.append((i, Overlap(operation.name, operation.arguments, views, v, name)))
        useful = self.written or any(0 not in form.shape for form in self.forms)
        self._nothing = operation.empty(problem) or not useful
        self._loaded: Any = None  # the launches of the last call, if they serve others on aligned arrays
        self._fast: FastCall | None = None

    def run(self, views: Views, out_view: View | None, out: Any) -> Any:
        """The call: outputs in the caller's library, then the kernels or the NumPy back end."""
        first = views[0]
        assert first is not None
        if first.device < 0:
            return self._run_on_host(first, views, out_view, out)
        made = [] if out_view is None else [out]
        new = [arrays.empty(first, form.shape, form.dtype) for form in self.forms[len(made) :]]
        if self._nothing:
            for array, form in zip(new, self.forms[len(made) :], strict=True):
                if 0 not in form.shape:
                    arrays.fill(first, array, form.fill)
            return self.operation.wrap(made + new)
        from flashmoe_cupy.ops import gpu  # the compiler and the driver, which NumPy arrays do without

        pointers = [*([] if out_view is None else [out_view.ptr]), *[gpu.address(first, x) for x in new]]
        named = dict(zip([form.name for form in self.forms], pointers, strict=True))
        self._loaded = gpu.run(self.operation, self.problem, views, named)
        arrays.keep_until_done([v for v in views if v is not None])
        return self.operation.wrap(made + new)

    def fast_call(self, access: ArrayAccess, given: tuple[Any, ...]) -> FastCall | None:
        """`run` for plain arrays like these. None: there is none, as far as is known."""
        if not (access.reads or access.host):
            return None
        if self._fast is None and not self._nothing and not self.written:
            if access.host:
                self._fast = self._on_numpy() if self.overlap is None else None
            elif self._loaded is not None:
                self._fast = self._on_device(access, given)
        return self._fast

    def _on_numpy(self) -> FastCall:
        operation, problem = self.operation, self.problem
        absent: dict[str, Any] = dict.fromkeys(operation.arguments)
        names = [operation.arguments[place - 1] for place in self.places]
        new = [(form.name, form.shape, to_numpy(form.dtype)) for form in self.forms]

        def call(given: tuple[Any, ...]) -> Any:
            named = absent | dict(zip(names, given, strict=True))
            if _env.get().check:
                return None
            made = {name: np.empty(shape, dtype) for name, shape, dtype in new}
            try:
                operation.host(problem, named, made)
            except UnsupportedProblem:  # what lists hold: the long way says which call it was
                return None
            return operation.wrap([*made.values()])

        return call

    def _run_on_host(self, first: View, views: Views, out_view: View | None, out: Any) -> Any:
        given = [None if v is None else arrays.as_numpy(v) for v in views]
        named = dict(zip(self.operation.arguments, given, strict=True))
        made = {form.name: np.empty(form.shape, to_numpy(form.dtype)) for form in self.forms[out_view is not None :]}
        if self._nothing:
            for form in self.forms[out_view is not None :]:
                made[form.name][...] = form.fill
        else:
            if _env.get().check:
                self.operation.check(self.problem, named.__getitem__)
            target = {} if out_view is None else {self.forms[0].name: arrays.as_numpy(out_view)}
            self.operation.host(self.problem, named, target | made)
        result = [*([] if out_view is None else [out]), *[arrays.from_numpy(first, x) for x in made.values()]]
        return self.operation.wrap(result)

    def _on_device(self, access: ArrayAccess, given: tuple[Any, ...]) -> FastCall:
        """Calls on plain arrays of torch or CuPy that find addresses, make outputs and launch; nothing else."""
        operation, loaded, overlap, wrap = self.operation, self._loaded, self.overlap, self.operation.wrap
        pointer, current_stream = access.pointer, access.stream
        device, size = loaded.sequence.device, loaded.workspace
        new = self.forms[overlap is not None :]
        makers = [
            access.maker(device, form.shape, form.strides, access.dtypes.get(form.dtype.name) or given[0].dtype)
            for form in new
        ]
        single = len(self.forms) == 1 and operation.gives_one_array
        make = makers[0] if makers else None
        capturing = access.recorder(device)
        first = 1 + len(operation.arguments)
        # The table of a call: given arrays, new outputs, workspace.
        behind = range(first + (overlap is not None), first + len(self.forms) + 1)
        run = loaded.sequence.for_places((*self.places, *behind)).run
        aligned = [i for i, place in enumerate(self.places) if place in loaded.rows]
        first_three = aligned == [0, 1, 2]  # without a loop, which takes longer
        large = not may_stay(device, size)
        kept_by = _workspaces

        def call(given: tuple[Any, ...]) -> Any:
            addresses = [*map(pointer, given)]
            if first_three:
                bits = addresses[0] | addresses[1] | addresses[2]
            else:
                bits = 0
                for i in aligned:
                    bits |= addresses[i]
            if bits & 15 or (overlap is not None and overlap.possible(addresses[-1], addresses[:-1])):
                return None
            stream = current_stream(device)
            if single:
                if make is None:
                    result = given[-1]
                else:
                    result = make()
                    addresses.append(pointer(result))
            else:
                made = [other() for other in makers]
                addresses += map(pointer, made)
                result = made if overlap is None else [given[-1], *made]
            recorded = True
            if size:
                recorded = capturing(stream)
                kept = None if recorded or large else kept_by.kept.get((device, stream))
                if kept is None or kept.size < size:  # a look of our own, because a call of find takes longer
                    kept = kept_by.find(access, device, stream, size, recorded or large)
                addresses.append(kept.address)  # and nobody else gets it until all is queued
            run(tuple(addresses), stream, recorded)
            return result if single else wrap(result)

        return call


_workspaces = Workspaces()
