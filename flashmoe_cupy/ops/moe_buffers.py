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
    moe_gpu.ready_for(problem, device, None, [0] * 20)


def launch(
    problem: moe_gpu.Problem, device: int, stream: int, inputs: Pointers, outputs: Pointers, workspace: int
) -> None:
    """Queue the operation on `stream` of `device`. workspace: the address of `workspace_bytes` bytes, or 0 for none."""
    table = [0, *inputs, *outputs]
    ready = moe_gpu.ready_for(problem, device, stream, table)
    ready.series.run((*table, workspace), stream)
