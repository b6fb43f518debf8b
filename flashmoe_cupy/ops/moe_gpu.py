"""Mixture of experts on a GPU: the launches that an operation is made of.

Each function gets the validated problem, the views of the arguments in the order given below, None where one is absent,
and the addresses of outputs that are already allocated. It queues its work on the current stream of views[0]'s library
and writes every element of the outputs; problems with no token or no row never arrive here. What a problem needs is
prepared once per device and then found; a call allocates one workspace and fills in addresses.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from flashmoe_cupy import _env, arrays
from flashmoe_cupy.arrays import View
from flashmoe_cupy.dtypes import BF16, UINT8, to_numpy
from flashmoe_cupy.errors import UnsupportedProblem
from flashmoe_cupy.jit import launch as gpu
from flashmoe_cupy.jit.series import NULL, Place, Series
from flashmoe_cupy.ops import plans
from flashmoe_cupy.ops.launches import prepare
from flashmoe_cupy.plan import kernels, moe
from flashmoe_cupy.plan.kernel import Step
from flashmoe_cupy.plan.moe_problem import GroupedGemmProblem, MoEProblem, PermuteProblem, RouteProblem

Views = tuple[View | None, ...]
Pointers = tuple[int, ...]
Problem = RouteProblem | PermuteProblem | GroupedGemmProblem | MoEProblem


class _Arrays(NamedTuple):
    """What an operation is given, by name: arguments and outputs in the order of the table of addresses."""

    arguments: tuple[str, ...]
    outputs: tuple[str, ...]
    rows: tuple[int, ...]  # places in the table of what is read or written by 16 bytes, if it starts so


_ARRAYS: dict[type, _Arrays] = {
    RouteProblem: _Arrays(
        ("logits", "bias"),
        ("topk_weights", "topk_ids", "expert_counts", "dropped", "load_balancing_loss", "z_loss"), (),
    ),
    PermuteProblem: _Arrays(("topk_ids", "expert_map"), ("offsets", "sorted_indices", "inverse_indices"), ()),
    GroupedGemmProblem: _Arrays(
        ("x", "w", "offsets", "group_sizes", "gather_indices", "bias"), ("out",), (1, 2, 7)
    ),
    MoEProblem: _Arrays(
        ("x", "w_gate_up", "w_down", "topk_weights", "topk_ids", "b_gate_up", "b_down", "expert_map",
         "shared_w_gate_up", "shared_w_down", "shared_gate"), ("out",), (1, 2, 3, 9, 10, 12),
    ),
}  # fmt: skip


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


def route(problem: RouteProblem, views: Views, outputs: Pointers) -> Ready | None:
    """views: logits, e_score_correction_bias.

    outputs: topk_weights, topk_ids; with problem.return_stats also expert_counts, dropped, load_balancing_loss, z_loss.
    """
    if _env.get().check:
        plans.check_no_nan(*map(_fetched, views))
    return _run(problem, views, outputs)


def permute(problem: PermuteProblem, views: Views, outputs: Pointers) -> None:
    """views: topk_ids, expert_map. outputs: offsets, sorted_indices, inverse_indices."""
    if _env.get().check:
        _check_ids(views[0], problem.num_experts, problem.num_global)
    _run(problem, views, outputs)


def grouped_gemm(problem: GroupedGemmProblem, views: Views, outputs: Pointers) -> None:
    """views: x, w, offsets, group_sizes, gather_indices, bias. outputs: out.

    Rows of no group are not written, unless problem.new_out: then they become 0.
    """
    _run(problem, views, outputs)


def fused_moe(problem: MoEProblem, views: Views, outputs: Pointers) -> Ready | None:
    """views: x, w_gate_up, w_down, topk_weights, topk_ids, b_gate_up, b_down, expert_map, shared_w_gate_up,
    shared_w_down, shared_gate. outputs: out.
    """
    if _env.get().check:
        _check_ids(views[4], problem.num_experts, problem.num_global)
    return _run(problem, views, outputs)


def _run(problem: Problem, views: Views, outputs: Pointers) -> Ready | None:
    """Queue everything. Returns what a later call with such arrays may run by itself; None where addresses decide."""
    like = views[0]
    assert like is not None
    stream = arrays.stream(like)
    table = [0, *[0 if v is None else v.ptr for v in views], *outputs]
    ready = ready_for(problem, like.device, stream, table)
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


def ready_for(problem: Problem, device: int, stream: int | None, table: Sequence[int]) -> Ready:
    """The launches of a problem for such addresses, prepared now or found. stream: None where no graph is recorded."""
    bits = 0
    for i in _ARRAYS[type(problem)].rows:
        bits |= table[i]
    key = (problem, device, bits & 15 == 0)
    ready = _ready.get(key)
    if ready is None:
        ready = _prepare(problem, device, stream, bits & 15 == 0)
        if len(_ready) >= _MAX_READY:
            _ready.clear()
        _ready[key] = ready
    return ready


def _prepare(problem: Problem, device: int, stream: int | None, aligned: bool) -> Ready:
    """Choose, compile (or find) and load all kernels of a problem. aligned: rows start at multiples of 16."""
    steps: list[Step]
    if isinstance(problem, RouteProblem):
        routed, work = moe.route_steps(problem)
        steps = [*routed]
    elif isinstance(problem, PermuteProblem):
        work = moe.Workspace()
        steps = [*moe.permute_steps(problem, work, own=False)]
    elif isinstance(problem, GroupedGemmProblem):
        if why := moe.rows_apart(problem):
            raise UnsupportedProblem(problem.describe(), why, "contiguous x and out")
        work = moe.Workspace()
        steps = moe.grouped_gemm_steps(problem)
    else:
        steps, work = moe.moe_steps(problem)
    place: dict[str, Place] = {"": NULL}
    of = _ARRAYS[type(problem)]
    outputs = of.outputs[:2] if isinstance(problem, RouteProblem) and not problem.return_stats else of.outputs
    for name in (*of.arguments, *outputs):
        place[name] = len(place), 0
    place |= {name: (len(place), offset) for name, offset in work.offsets.items()}
    arch, sms = kernels.arch_for(gpu.compute_capability(device)), gpu.multiprocessors(device)
    launches = []
    for step in kernels.linked(steps, arch, aligned, sms):
        ready, pointers = prepare(step, device, stream, aligned)
        launches.append((ready, tuple(place[step.arguments.get(name, "")] for name in pointers)))
    return Ready(Series(launches), work.bytes, aligned, of.rows, 1 + len(of.arguments))


def _check_ids(ids: View | None, num_experts: int, num_global: int) -> None:
    """FLASHMOE_CHECK=1: wait, fetch the ids and raise FlashMoEError for the first that names nothing."""
    host = _fetched(ids)
    if host is not None:
        plans.check_ids(host, num_experts, num_global)


def _fetched(x: View | None) -> Any:
    """A copy in host memory, for checks; None while a graph is recorded, when nothing can be fetched."""
    if x is None or gpu.is_capturing(arrays.stream(x)):
        return None
    strides = tuple([t * x.dtype.itemsize for t in x.strides])
    kind = to_numpy(x.dtype)
    bits = np.uint16 if x.dtype is BF16 else kind  # which not every CuPy knows
    return gpu.fetch(x.ptr, bits, x.shape, strides, x.device).view(kind)
