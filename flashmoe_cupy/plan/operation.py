"""An operation as every room knows it: what it reads and makes, how it is checked, and of which launches it consists.

Here alone stands the order of an operation's arrays. The functions of `ops` declare theirs; `ops.call` runs them, and
the adapters of torch and JAX serve all of them by these declarations. No GPU, no CuPy.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import product
from typing import Any

from flashmoe_cupy.dtypes import DType
from flashmoe_cupy.jit.device import DeviceProperties
from flashmoe_cupy.plan.options import Kind, kind_of
from flashmoe_cupy.plan.step import Step

Named = Mapping[str, Any]  # arrays, shapes or options by name
Shapes = dict[str, tuple[Any, ...]]  # of outputs


class Output:
    """An array that an operation makes. dtype: None is that of the first argument.

    fill: what a new one holds where the operation writes nothing: in rows that no sequence owns, and where there is
    nothing to compute.
    """

    __slots__ = ("dtype", "fill")

    def __init__(self, dtype: DType | None = None, fill: float = 0.0) -> None:
        self.dtype, self.fill = dtype, fill


class Workspace:
    """Arrays that live as long as a call, one behind the other in one allocation."""

    def __init__(self) -> None:
        self.offsets: dict[str, int] = {}
        self.bytes = 0

    def add(self, name: str, size: int) -> None:
        """Room for `size` bytes at a multiple of 256."""
        self.offsets[name] = self.bytes
        self.bytes += -(-size // 256) * 256


def _alone(made: Sequence[Any]) -> Any:
    return made[0] if len(made) == 1 else tuple(made)


def _never(problem: Any) -> bool:  # noqa: ARG001
    return False


def _nothing(problem: Any, fetch: Callable[[str], Any]) -> None:
    """Nothing can be wrong, or the NumPy back end looks by itself."""


class Operation:
    """One public function, declared once.

    function: its signature says the order of its options and their kinds; `out`, if it has that, replaces the first
        output. arguments: the arrays that it reads, by name, in the order in which launches find their addresses; the
        first `required` are always there.
    outputs: every array that it may make, by name, in order.
    shapes(shapes, options): the shape of each output that is wanted: the first ones of `outputs`, or all. shapes: of
        the arguments that are there, by name. Its numbers may be symbols of torch, so it compares none of them. Raises
        UnsupportedProblem for a wrong number of dimensions.
    count(options): how many outputs are wanted; None: all.
    make(**views, **options, out=...): the validated problem. problem: its type.
    steps(problem): the launches, which find arrays by name, and the workspace that they share. steps_on(problem,
        device): the same where launches depend on the device; the workspace does not.
    host(problem, arguments, outputs): the same on NumPy arrays; None where an argument is absent. New outputs are not
        filled.
    rows: those arrays that kernels read or write by 16 bytes if they start at such addresses.
    tiles: those that a kernel may have brought in tiles; where they do not start at such an address, it wants a copy.
    empty(problem): there is nothing to compute, and new outputs are filled.
    wrap(outputs): what the function returns.
    check(problem, fetch): under FLASHMOE_CHECK=1, raises for wrong values; fetch(name) is an argument in host memory.
    batched: the number of dimensions that an argument has if the batch is its first one. Calls that `jax.vmap` maps
        over such arguments are joined to one with a larger batch; without it, and for others, they run one by one.
    """

    def __init__(
        self,
        function: Callable[..., Any],
        arguments: Sequence[str],
        required: int,
        outputs: Mapping[str, Output],
        shapes: Callable[[Named, Named], Shapes],
        problem: type[Any],
        make: Callable[..., Any],
        steps: Callable[[Any], tuple[list[Step], Workspace]],
        host: Callable[[Any, Named, Named], None],
        *,
        rows: Sequence[str] = (),
        tiles: Sequence[str] = (),
        count: Callable[[Named], int] | None = None,
        empty: Callable[[Any], bool] = _never,
        wrap: Callable[[Sequence[Any]], Any] = _alone,
        check: Callable[[Any, Callable[[str], Any]], None] = _nothing,
        batched: Mapping[str, int] | None = None,
        steps_on: Callable[[Any, DeviceProperties], tuple[list[Step], Workspace]] | None = None,
    ) -> None:
        self.name, self.function = function.__name__, function
        self.arguments, self.required, self.outputs = tuple(arguments), required, dict(outputs)
        self.shapes, self.problem, self.make, self.steps, self.host = shapes, problem, make, steps, host
        self.rows, self.tiles, self.empty, self.wrap, self.check = tuple(rows), tuple(tiles), empty, wrap, check
        self.steps_on = steps_on or (lambda problem, device: steps(problem))  # noqa: ARG005
        self.count = count or (lambda options: len(outputs))  # noqa: ARG005
        self.batched = dict(batched or {})
        parameters = inspect.signature(function).parameters.values()
        # Every parameter but `out`, in order: the kind of an option, None for an array.
        self.parameters: dict[str, Kind | None] = {
            one.name: None if one.name in self.arguments else kind_of(one.name, str(one.annotation))
            for one in parameters
            if one.name != "out" and one.kind is not inspect.Parameter.VAR_KEYWORD
        }
        self.options = {name: kind for name, kind in self.parameters.items() if kind is not None}
        self.has_out = any(one.name == "out" for one in parameters)
        # All tuples of types that the options have when nothing has to be read. A dict, for torch.compile of torch 2.6
        # cannot look into a frozenset.
        self.exact_types = dict.fromkeys(product(*[kind.types for kind in self.options.values()]))
        # Where a tuple stands among the options, whose elements have types, too; -1: nowhere.
        self.pair = next((i for i, kind in enumerate(self.options.values()) if tuple in kind.types), -1)

    def places(self, made: int) -> dict[str, int]:
        """Where the table of addresses of a call has each argument and the first `made` outputs; 0 is no array's."""
        return {name: i for i, name in enumerate((*self.arguments, *[*self.outputs][:made]), 1)}

    def exact(self, options: Sequence[Any]) -> tuple[Any, ...] | None:
        """The options, given in order, in their exact types; None if one of them is of a wrong type."""
        found = []
        for value, kind in zip(options, self.options.values(), strict=True):
            one = None if value is None else kind.read(value)
            if one is None and not kind.accepts_none(value):
                return None
            found.append(one)
        return tuple(found)


_operations: dict[str, Operation] = {}
_listeners: list[Callable[[Operation], None]] = []


def register(operation: Operation) -> Operation:
    """Make an operation known to the adapters."""
    _operations[operation.name] = operation
    for tell in _listeners:
        tell(operation)
    return operation


def registered(name: str) -> Operation:
    """The operation of that name. Raises KeyError."""
    return _operations[name]


def operations() -> Iterator[Operation]:
    """All that are known now."""
    return iter([*_operations.values()])


def each(tell: Callable[[Operation], None]) -> None:
    """Call tell(operation) for every operation, now or when it becomes known."""
    _listeners.append(tell)
    for operation in operations():
        tell(operation)
