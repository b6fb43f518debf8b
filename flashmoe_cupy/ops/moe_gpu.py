"""The kernels of mixture of experts for arrays on a GPU: what the operations call with arrays that lie on a device.

Each function gets the validated problem (hashable, so that what is ready for launch can be kept per problem and
device), the views of the arguments in the order given below, None where one is absent, and the addresses of outputs
that are already allocated. It queues its work on `arrays.stream(views[0])` and writes every element of the outputs. The
device is `views[0].device`; problems with no token or no row never arrive here. Workspaces are its own, and so is the
check of topk_ids under FLASHMOE_CHECK=1 (`cpu.moe.check_ids` tells which id is wrong).
"""

from __future__ import annotations

from typing import NoReturn

from flashmoe_cupy.arrays import View
from flashmoe_cupy.errors import UnsupportedProblem
from flashmoe_cupy.plan.moe_problem import GroupedGemmProblem, MoEProblem, PermuteProblem, RouteProblem

Views = tuple[View | None, ...]
Pointers = tuple[int, ...]


def route(problem: RouteProblem, views: Views, outputs: Pointers) -> None:  # noqa: ARG001
    """views: logits, e_score_correction_bias.

    outputs: topk_weights, topk_ids; with problem.return_stats also expert_counts, dropped, load_balancing_loss, z_loss.
    """
    _refuse(problem)


def permute(problem: PermuteProblem, views: Views, outputs: Pointers) -> None:  # noqa: ARG001
    """views: topk_ids, expert_map. outputs: offsets, sorted_indices, inverse_indices."""
    _refuse(problem)


def grouped_gemm(problem: GroupedGemmProblem, views: Views, outputs: Pointers) -> None:  # noqa: ARG001
    """views: x, w, offsets, group_sizes, gather_indices, bias. outputs: out.

    Rows of no group are not written, unless problem.new_out: then they become 0.
    """
    _refuse(problem)


def fused_moe(problem: MoEProblem, views: Views, outputs: Pointers) -> None:  # noqa: ARG001
    """views: x, w_gate_up, w_down, topk_weights, topk_ids, b_gate_up, b_down, expert_map, shared_w_gate_up,
    shared_w_down, shared_gate. outputs: out.
    """
    _refuse(problem)


def _refuse(problem: RouteProblem | PermuteProblem | GroupedGemmProblem | MoEProblem) -> NoReturn:
    reason = "GPU kernels for mixture of experts are not there yet"
    raise UnsupportedProblem(problem.describe(), [reason], "arrays in host memory run the NumPy back end")
