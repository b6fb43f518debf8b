"""Mixture of experts on a GPU for callers that own every buffer, the workspace too: XLA, by way of jax_moe.py.

All arrays are dense. Inputs are addresses in the order of the `views` of the function of the same name in
`ops.moe_gpu`, 0 where one is absent; outputs likewise.
"""

from __future__ import annotations

from flashmoe_cupy.ops import moe_gpu
from flashmoe_cupy.plan import moe
from flashmoe_cupy.plan.moe_problem import GroupedGemmProblem, PermuteProblem, RouteProblem

Pointers = tuple[int, ...]


def workspace_bytes(problem: moe_gpu.Problem) -> int:
    """How large a workspace `launch` needs; the same on every device."""
    if isinstance(problem, RouteProblem):
        return moe.route_steps(problem)[1].bytes
    if isinstance(problem, PermuteProblem):
        work = moe.Workspace()
        moe.permute_steps(problem, work, own=False)
        return work.bytes
    return 0 if isinstance(problem, GroupedGemmProblem) else moe.moe_steps(problem)[1].bytes


def load(problem: moe_gpu.Problem, device: int) -> None:
    """Compile and load the kernels that `launch` will use for 16-byte aligned buffers; launches nothing."""
    _ready(problem, device, None, True)


def launch(
    problem: moe_gpu.Problem, device: int, stream: int, inputs: Pointers, outputs: Pointers, workspace: int
) -> None:
    """Queue the operation on `stream` of `device`. workspace: the address of `workspace_bytes` bytes, or 0 for none."""
    table = [0, *inputs, *outputs]
    bits = 0
    for pointer in table:
        bits |= pointer
    ready = _ready(problem, device, stream, bits & 15 == 0)
    table += [workspace + offset for offset in ready.offsets]
    ready.series.run(table, stream)


def _ready(problem: moe_gpu.Problem, device: int, stream: int | None, aligned: bool) -> moe_gpu.Ready:
    key = (problem, device, aligned)
    found = moe_gpu._ready.get(key)
    if found is None:
        names: tuple[str, ...] = moe_gpu._MOE
        outputs: tuple[str, ...] = ("out",)
        if isinstance(problem, RouteProblem):
            names, outputs = moe_gpu._ROUTE, moe_gpu._ROUTED[: 6 if problem.return_stats else 2]
        elif isinstance(problem, PermuteProblem):
            names, outputs = moe_gpu._PERMUTE, moe_gpu._PERMUTED
        elif isinstance(problem, GroupedGemmProblem):
            names = moe_gpu._GEMM
        # without a stream nobody is recording a graph
        found = moe_gpu._prepare(problem, device, stream, [*names, *outputs], aligned)  # type: ignore[arg-type]
        if len(moe_gpu._ready) >= moe_gpu._MAX_READY:
            moe_gpu._ready.clear()
        moe_gpu._ready[key] = found
    return found
