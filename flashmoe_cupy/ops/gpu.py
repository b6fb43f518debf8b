"""Operations on a GPU: steps become launches, and addresses are found by name.

What a problem needs is prepared once for a device and then found; a call allocates one workspace and fills in
addresses. The table of addresses of a call is 0, arguments, outputs, workspace; what is absent is 0.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from flashmoe_cupy import _env, arrays
from flashmoe_cupy.arrays import View
from flashmoe_cupy.dtypes import BF16, FP32, UINT8, to_numpy
from flashmoe_cupy.errors import UnsupportedProblem
from flashmoe_cupy.jit import launch as driver
from flashmoe_cupy.jit.launch import Launch
from flashmoe_cupy.jit.sequence import NULL, Fill, LaunchSequence, Place
from flashmoe_cupy.ops.workspace import keep_if_recorded
from flashmoe_cupy.plan import kernels
from flashmoe_cupy.plan.archs import arch_for
from flashmoe_cupy.plan.forget import forget
from flashmoe_cupy.plan.kernel import EMPTY
from flashmoe_cupy.plan.operation import Operation
from flashmoe_cupy.plan.step import Step

_MOST_LOADED = 4096


class LoadedOperation:
    """The launches of a problem on a device.

    workspace: its size in bytes; 0: it has no place in the table. aligned: rows must start at multiples of 16 bytes.
    rows: the places in the table of the arrays that this is about.
    """

    __slots__ = ("aligned", "rows", "sequence", "workspace")

    def __init__(self, sequence: LaunchSequence, workspace: int, aligned: bool, rows: tuple[int, ...]) -> None:
        self.sequence, self.workspace, self.aligned, self.rows = sequence, workspace, aligned, rows


_loaded: dict[Any, LoadedOperation] = {}
_warned: set[str] = set()  # reasons whose slowness was mentioned
forget.append(_loaded.clear)


def run(
    operation: Operation, problem: Any, views: Sequence[View | None], outputs: Mapping[str, int]
) -> LoadedOperation | None:  # fmt: skip
    """Queue all launches on the current stream of views[0]'s library.

    views: the arguments in the operation's order; outputs: the address of each result, by name. Returns what a later
    call on such arrays may run by itself; None where addresses decide, and while every call is checked.
    """
    like = views[0]
    assert like is not None
    check = _env.get().check
    if check:
        given = dict(zip(operation.arguments, views, strict=True))
        operation.check(problem, lambda name: _fetched(given[name]))
    stream = arrays.stream(like)
    table = [0, *[0 if v is None else v.ptr for v in views], *outputs.values()]
    loaded = loaded_for(operation, problem, like.device, stream, table, tuple(outputs))
    if loaded.workspace:
        workspace = arrays.empty(like, (loaded.workspace,), UINT8)
        table.append(address(like, workspace))
        if like.library != "torch":  # torch has a pool of its own for graphs
            keep_if_recorded(workspace, stream)
    loaded.sequence.run(tuple(table), stream)
    return loaded if loaded.aligned and not check else None


def loaded_for(
    operation: Operation, problem: Any, device: int, stream: int | None, table: Sequence[int],
    made: tuple[str, ...],
) -> LoadedOperation:  # fmt: skip
    """The launches of a problem for such addresses, prepared now or found.

    stream: where a graph may be recorded, in which nothing can be compiled; None: nowhere. made: the outputs.
    """
    places = operation.places(made)
    bits = 0
    for name in operation.rows:
        bits |= table[places.get(name, 0)]
    odd = tuple([name for name in operation.tiles if table[places[name]] & 15])
    key = (operation, problem, made, device, bits & 15 == 0, odd)
    loaded = _loaded.get(key)
    if loaded is None:
        loaded = _load(operation, problem, device, stream, bits & 15 == 0, odd, made)
        if len(_loaded) >= _MOST_LOADED:
            _loaded.clear()
        _loaded[key] = loaded
    return loaded


def _load(
    operation: Operation, problem: Any, device: int, stream: int | None, aligned: bool, odd: tuple[str, ...],
    made: tuple[str, ...],
) -> LoadedOperation:  # fmt: skip
    """Choose, compile (or find) and load all kernels of a problem.

    aligned: rows start at multiples of 16 bytes. odd: arrays that are brought in tiles and do not start at one.
    """
    arch, properties = arch_for(driver.compute_capability(device)), driver.properties(device)
    steps, work = operation.steps_on(problem, properties)
    steps, sizes = kernels.prepared(steps, arch, aligned, properties, odd)
    for name, size in sizes.items():
        if name not in work.offsets:
            work.add(name, size)
    places = operation.places(made)
    place: dict[str, Place] = {"": NULL} | {name: (i, 0) for name, i in places.items()}
    behind = 1 + len(operation.arguments) + len(made)  # an output may have the name of an argument
    place |= {name: (behind, offset) for name, offset in work.offsets.items()}
    launches, fills = [], []
    for step in steps:
        ready, pointers, clears = launch_of(step, device, stream, aligned)
        launches.append((ready, tuple([place.get(step.arguments.get(name, ""), NULL) for name in pointers])))
        if not clears:
            fills += [
                Fill(places[name], size, _word(operation.outputs[name].fill)) for name, size in step.clears.items()
            ]
    rows = tuple([places[name] for name in (*operation.rows, *operation.tiles) if name in places])
    return LoadedOperation(LaunchSequence(launches, fills), work.bytes, aligned and not odd, rows)


def launch_of(
    step: Step, device: int, stream: int | None, aligned: bool
) -> tuple[Launch, tuple[str, ...], bool]:  # fmt: skip
    """The launch of a step, the names of the pointers that it takes, and whether it clears rows by itself."""
    arch, properties = arch_for(driver.compute_capability(device)), driver.properties(device)
    problem, sms = step.problem, properties.multiprocessors
    aligned = aligned and problem.rows_aligned
    kernel = kernels.choose(step.task, problem, arch, aligned)
    config = kernel.choose(problem, arch, aligned, properties)
    why = "; ".join(kernel.reasons(problem, config, properties))
    _env.log.debug("%s: %s, %s%s", problem.describe(), kernel.name, config.name, f"; {why}" if why else "")
    slow = kernel.slow(problem, aligned)
    passed_over = [] if problem.dtype is FP32 else kernels.passed_over(kernel, problem, arch, aligned)
    if not slow and passed_over and EMPTY not in passed_over:
        slow = f"runs on the slower {kernel.name}: {'; '.join(passed_over)}"
    if slow and slow not in _warned:
        _warned.add(slow)
        _env.log.warning("%s: %s", problem.describe(), slow)
    loaded = driver.load_for(kernel.source(config), kernel.title(config), arch, device, config.smem_bytes, stream)
    params = kernel.params
    known = {name: value for name, value in step.values.items() if name in params.fields}
    tail = params.pack(kernel.values(problem, config, aligned, sms) | known)
    ready = Launch(
        device, loaded.function, kernel.grid(problem, config, sms), config.threads, config.smem_bytes,
        len(params.pointers), tail, _env.get().check, counter=kernel.counter_at(problem) // 8,
        early=kernel.waits and _may_be_early(arch), at_once=kernel.at_once(problem, config, sms),
    )  # fmt: skip
    maps = kernel.map_arguments(problem, config)
    return driver.with_maps(ready, params.maps_at, maps, params.size, params.mapped), params.pointers, kernel.clears


def _may_be_early(arch: str) -> bool:
    """Whether a launch may begin while the one in front of it runs.

    Hopper was the first that can; graphs record such launches since the driver of CUDA 12.3.
    """
    return int(arch[3:].rstrip("a")) >= 90 and driver.driver_version() >= 12030


def _word(value: float) -> int:
    """The 4 bytes of a float32; of 0, those of every type."""
    return int(np.float32(value).view(np.uint32))


def address(like: View, made: Any) -> int:
    """Of an array that `arrays.empty` has made, like `like`."""
    return made.data_ptr() if like.library == "torch" else made.data.ptr  # type: ignore[no-any-return]


def workspace_bytes(operation: Operation, problem: Any) -> int:
    """How large a workspace `launch` needs; the same on every device."""
    return operation.steps(problem)[1].bytes


def load(operation: Operation, problem: Any, device: int, made: tuple[str, ...]) -> None:
    """Compile and load the kernels that `launch` will use for 16-byte aligned buffers; launches nothing."""
    loaded_for(operation, problem, device, None, [0] * (1 + len(operation.arguments) + len(made)), made)


def launch(
    operation: Operation, problem: Any, device: int, stream: int, inputs: Sequence[int], outputs: Mapping[str, int],
    workspace: int,
) -> None:  # fmt: skip
    """Queue the operation for a caller that owns every buffer: XLA. All arrays are dense; an absent one's address is 0.

    workspace: the address of `workspace_bytes` bytes, or 0 for none. Raises UnsupportedProblem where the launches want
    more, which is so for an array of `operation.tiles` at an odd address.
    """
    table = [0, *inputs, *outputs.values()]
    loaded = loaded_for(operation, problem, device, stream, table, tuple(outputs))
    if not loaded.aligned and loaded.workspace > workspace_bytes(operation, problem):
        places = operation.places(tuple(outputs))
        names = " and ".join(name for name in operation.tiles if table[places[name]] & 15)
        reason = f"{names} does not start at a multiple of 16 bytes, and the caller has made no room for a copy"
        raise UnsupportedProblem(problem.describe(), [reason])
    loaded.sequence.run((*table, workspace) if loaded.workspace else tuple(table), stream)


def _fetched(x: View | None) -> Any:
    """A copy in host memory, for checks; None while a graph is recorded, when nothing can be fetched."""
    if x is None or driver.is_capturing(arrays.stream(x)):
        return None
    strides = tuple([t * x.dtype.itemsize for t in x.strides])
    kind = to_numpy(x.dtype)
    bits = np.uint16 if x.dtype is BF16 else kind  # which not every CuPy knows
    return driver.fetch(x.ptr, bits, x.shape, strides, x.device).view(kind)
