"""An operation as every room knows it: what it reads and makes, how it is checked, and of which launches it consists.

Here alone stands the order of an operation's arrays. The functions of `ops` declare theirs; `ops.call` runs them, and
the adapters of torch and JAX serve all of them by these declarations. No GPU, no CuPy.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import product
from typing import Any, NamedTuple

from flashmoe_cupy.dtypes import DType
from flashmoe_cupy.jit.device import DeviceProperties
from flashmoe_cupy.plan.options import Kind, kind_of
from flashmoe_cupy.plan.step import Step

Named = Mapping[str, Any]  # arrays, shapes or options by name
Shapes = dict[str, tuple[Any, ...]]  # of outputs


class Output:
    """An array that an operation makes. dtype: None is that of the argument `like`, or of the first one.

    fill: what a new one holds where the operation writes nothing: in rows that no sequence owns, and where there is
    nothing to compute.
    """

    __slots__ = ("dtype", "fill", "like")

    def __init__(self, dtype: DType | None = None, fill: float = 0.0, like: str = "") -> None:
        self.dtype, self.fill, self.like = dtype, fill, like


class Gradient(NamedTuple):
    """Which operation gives the gradients of another one.

    It reads the other one's arguments, options and outputs under their names, and as "dx" what arrives at an output x.
    Its option `need` names the arguments whose gradients are wanted, `deterministic` asks for the same bits in every
    run. The gradient of x is its output "dx". Its `wrap` is tuple.
    """

    operation: str  # its name
    options: dict[str, Any]  # of the other one, with which that makes all outputs that are read


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
    wanted(options): the names of the outputs that options ask for, in order; None: all.
    written: optional arguments that it writes. Each takes the place of the output of its name, which is not made then.
        Traced code and JAX have none.
    shapes(shapes, options): the shape of each output that is made, by name, in the order of `outputs`. shapes: of the
        arguments that are there, by name. Its numbers may be symbols of torch, so it compares none of them. Raises
        UnsupportedProblem for a wrong number of dimensions.
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
    gradient: the operation that gives its gradients; None: it has none.
    autocast: the arguments that torch.autocast casts to its dtype.
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
        empty: Callable[[Any], bool] = _never,
        wrap: Callable[[Sequence[Any]], Any] = _alone,
        check: Callable[[Any, Callable[[str], Any]], None] = _nothing,
        batched: Mapping[str, int] | None = None,
        wanted: Callable[[Named], Sequence[str]] | None = None,
        written: Sequence[str] = (),
        steps_on: Callable[[Any, DeviceProperties], tuple[list[Step], Workspace]] | None = None,
        gradient: Gradient | None = None,
        autocast: Sequence[str] = (),
    ) -> None:
        self.name, self.function = function.__name__, function
        self.arguments, self.required, self.outputs = tuple(arguments), required, dict(outputs)
        self.shapes, self.problem, self.make, self.steps, self.host = shapes, problem, make, steps, host
        self.rows, self.tiles, self.empty, self.wrap, self.check = tuple(rows), tuple(tiles), empty, wrap, check
        self.steps_on = steps_on or (lambda problem, device: steps(problem))  # noqa: ARG005
        self.wanted = wanted or (lambda options: tuple(outputs))  # noqa: ARG005
        self.written = tuple(written)
        self.gradient, self.autocast = gradient, tuple(autocast)
        self.gives_one_array = wrap is _alone  # where it makes no more
        self.batched = dict(batched or {})
        self.call: Any = None  # what runs it, of ops.call
        parameters = inspect.signature(function).parameters.values()
        hidden = (*written, *(["out"] if "out" not in arguments else []))
        # Every parameter but `out`, in order: the kind of an option, None for an array.
        self.parameters: dict[str, Kind | None] = {
            one.name: None if one.name in self.arguments else kind_of(one.name, str(one.annotation))
            for one in parameters
            if one.name not in hidden and one.kind is not inspect.Parameter.VAR_KEYWORD
        }
        self.options = {name: kind for name, kind in self.parameters.items() if kind is not None}
        self.has_out = "out" in outputs and any(one.name == "out" for one in parameters)
        # All tuples of types that the options have when nothing has to be read. A dict, for torch.compile of torch 2.6
        # cannot look into a frozenset.
        self.exact_types = dict.fromkeys(product(*[kind.types for kind in self.options.values()]))
        # Where a tuple stands among the options, whose elements have types, too; -1: nowhere.
        self.pair = next((i for i, kind in enumerate(self.options.values()) if tuple in kind.types), -1)

    def places(self, made: Sequence[str]) -> dict[str, int]:
        """Where the table of addresses of a call has each argument and the outputs `made`; 0 is no array's."""
        return {name: i for i, name in enumerate((*self.arguments, *made), 1)}

    def dtype_of(self, output: str, dtypes: Mapping[str, Any]) -> Any:
        """The DType of an output, or what stands for it in `dtypes`, which are those of the arguments, by name."""
        its = self.outputs[output]
        return its.dtype or dtypes[its.like or self.arguments[0]]

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
