"""Mixture of experts on a GPU: the launches that an operation is made of.

`run` gets the operation, its validated problem, the views of the arguments, None where one is absent, and the addresses
of outputs that are already allocated. It queues the work on the current stream of views[0]'s library and writes every
element of the outputs, but rows of no group; problems with no token or no row never arrive here. What a problem needs
is prepared once per device and then found; a call allocates one workspace and fills in addresses.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from flashmoe_cupy import _env, arrays
from flashmoe_cupy.arrays import View
from flashmoe_cupy.dtypes import BF16, UINT8, to_numpy
from flashmoe_cupy.jit import launch as gpu
from flashmoe_cupy.jit.series import NULL, Place, Series
from flashmoe_cupy.ops.launches import prepare
from flashmoe_cupy.ops.operations import Operation
from flashmoe_cupy.plan import kernels
from flashmoe_cupy.plan.archs import arch_for

Views = Sequence[View | None]


class Ready(NamedTuple):
    """The launches of a problem on a device; the table of addresses of a call is 0, arguments, outputs, workspace.

    What is absent is 0; a problem without a workspace has none in the table.
    """

    series: Series
    workspace: int  # bytes
    aligned: bool  # it needs rows that start at multiples of 16 bytes
    rows: tuple[int, ...]  # the places of these in the table
    outputs: int  # the place of the first output


_ready: dict[Any, Ready] = {}
_MAX_READY = 4096
kernels.forget.append(_ready.clear)


def run(operation: Operation, problem: Any, views: Views, outputs: Sequence[int]) -> Ready | None:
    """Queue everything. views: the arguments in the operation's order; outputs: addresses of the results in theirs.

    Returns what a later call with such arrays may run by itself; None where addresses decide.
    """
    like = views[0]
    assert like is not None
    if _env.get().check:
        given = dict(zip(operation.arguments, views, strict=True))
        operation.check(problem, lambda name: _fetched(given[name]))
    stream = arrays.stream(like)
    table = [0, *[0 if v is None else v.ptr for v in views], *outputs]
    ready = ready_for(operation, problem, like.device, stream, table)
    if ready.workspace:
        workspace = arrays.empty(like, (ready.workspace,), UINT8)
        table.append(workspace.data_ptr() if like.library == "torch" else workspace.data.ptr)
        if like.library != "torch":  # torch has a pool of its own for graphs
            keep_if_recorded(workspace, stream)
    ready.series.run(tuple(table), stream)
    return ready if ready.aligned and ready.series.plain else None


_recorded: list[object] = []  # workspaces whose addresses a graph has; nobody tells when it is gone


def keep_if_recorded(workspace: object, stream: int) -> None:
    """Keep a workspace out of its pool for ever, if the launches that use it are being recorded into a graph."""
    if gpu.is_capturing(stream):
        _recorded.append(workspace)


def ready_for(
    operation: Operation, problem: Any, device: int, stream: int | None, table: Sequence[int]
) -> Ready:
    """The launches of a problem for such addresses, prepared now or found. stream: None where no graph is recorded."""
    places = operation.places(problem)
    bits = 0
    for name in operation.rows:
        bits |= table[places[name]]
    key = (problem, device, bits & 15 == 0)
    ready = _ready.get(key)
    if ready is None:
        ready = _prepare(operation, problem, device, stream, bits & 15 == 0)
        if len(_ready) >= _MAX_READY:
            _ready.clear()
        _ready[key] = ready
    return ready


def _prepare(operation: Operation, problem: Any, device: int, stream: int | None, aligned: bool) -> Ready:
    """Choose, compile (or find) and load all kernels of a problem. aligned: rows start at multiples of 16."""
    steps, work = operation.steps(problem)
    places = operation.places(problem)
    place: dict[str, Place] = {"": NULL} | {name: (i, 0) for name, i in places.items()}
    place |= {name: (1 + len(places), offset) for name, offset in work.offsets.items()}
    arch, sms = arch_for(gpu.compute_capability(device)), gpu.multiprocessors(device)
    launches = []
    for step in kernels.linked(steps, arch, aligned, sms):
        ready, pointers = prepare(step, device, stream, aligned)
        launches.append((ready, tuple(place[step.arguments.get(name, "")] for name in pointers)))
    rows = tuple(places[name] for name in operation.rows)
    return Ready(Series(launches), work.bytes, aligned, rows, 1 + len(operation.arguments))


def workspace_bytes(operation: Operation, problem: Any) -> int:
    """How large a workspace `launch` needs; the same on every device."""
    return operation.steps(problem)[1].bytes


def load(operation: Operation, problem: Any, device: int) -> None:
    """Compile and load the kernels that `launch` will use for 16-byte aligned buffers; launches nothing."""
    ready_for(operation, problem, device, None, [0] * (1 + len(operation.places(problem))))


def launch(
    operation: Operation, problem: Any, device: int, stream: int, inputs: Sequence[int], outputs: Sequence[int],
    workspace: int,
) -> None:  # fmt: skip
    """Queue the operation for a caller that owns every buffer: XLA. All arrays are dense; an absent one's address is 0.

    workspace: the address of `workspace_bytes` bytes, or 0 for none.
    """
    table = [0, *inputs, *outputs]
    ready_for(operation, problem, device, stream, table).series.run((*table, workspace), stream)


def _fetched(x: View | None) -> Any:
    """A copy in host memory, for checks; None while a graph is recorded, when nothing can be fetched."""
    if x is None or gpu.is_capturing(arrays.stream(x)):
        return None
    strides = tuple([t * x.dtype.itemsize for t in x.strides])
    kind = to_numpy(x.dtype)
    bits = np.uint16 if x.dtype is BF16 else kind  # which not every CuPy knows
    return gpu.fetch(x.ptr, bits, x.shape, strides, x.device).view(kind)
