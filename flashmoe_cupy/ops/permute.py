"""The dispatch of mixture of experts as a building block: assignments sorted by expert."""

from __future__ import annotations

from typing import Any, NamedTuple, SupportsIndex, overload

import numpy as np
from numpy.typing import NDArray

from flashmoe_cupy import arrays
from flashmoe_cupy._types import Array, Generic
from flashmoe_cupy.arrays import View, view
from flashmoe_cupy.errors import UnsupportedProblem
from flashmoe_cupy.ops import plans
from flashmoe_cupy.ops.names import no_argument, strict
from flashmoe_cupy.ops.operations import PERMUTE
from flashmoe_cupy.ops.unreadable import unreadable
from flashmoe_cupy.plan.moe.routing import PermuteProblem, permute_problem
from flashmoe_cupy.plan.options import integer


class MoEPermutation(NamedTuple, Generic[Array]):
    """The assignments of T tokens to K experts each, sorted by expert; int32 arrays of the caller's library."""

    offsets: Array  # (E + 1,): expert e has the sorted places offsets[e]:offsets[e + 1]
    sorted_indices: Array  # (T * K,): t * K + k of the assignment at each place, -1 behind offsets[-1]
    inverse_indices: Array  # (T, K): the sorted place of each assignment, -1 for a skipped one


@overload
def moe_permute(
    topk_ids: np.ndarray[Any, Any], *, num_experts: SupportsIndex, expert_map: Any = None
) -> MoEPermutation[NDArray[np.int32]]: ...
@overload
def moe_permute(topk_ids: Array, *, num_experts: SupportsIndex, expert_map: Any = None) -> MoEPermutation[Array]: ...
@strict
def moe_permute(
    topk_ids: Any, *, num_experts: SupportsIndex, expert_map: Any = None, **unknown: object
) -> MoEPermutation[Any]:
    """Sort assignments by expert; those of one expert stay in order.

    Arrays are NumPy, CuPy, torch or JAX (or have `__dlpack__`), all of one library on one device; the results are too.
    Nothing is copied between host and device, and nothing waits.

    topk_ids: (T, K), int32 or int64, last dimension contiguous; T from 0. Ids outside of [0, num_experts), such as -1
        and num_experts, are skipped.
    num_experts: E, the experts that are here.
    expert_map: (num_global,) int32: topk_ids are global ids, and this is the local id of each, -1 = not here. Ids
        outside of [0, num_global) are skipped, and so are entries outside of [0, num_experts).

    Returns MoEPermutation: offsets (E + 1,), sorted_indices (T * K,) and inverse_indices (T, K), all int32. The rows of
    an expert are gathered by sorted_indices // K. The same inputs give the same bits in every run.

    Raises UnsupportedProblem (a ValueError) with every reason, DependencyError when CuPy or a driver is missing; with
    FLASHMOE_CHECK=1 FlashMoEError for the first id below -1 or above the number of (global) experts.
    """
    if unknown:
        raise no_argument(moe_permute, unknown)
    other = plans.adapter(topk_ids)
    if other is not None:
        found: MoEPermutation[Any] = other.moe_permute(topk_ids, num_experts=num_experts, expert_map=expert_map)
        return found
    try:
        vi = view(topk_ids, "topk_ids")
        vm = None if expert_map is None else view(expert_map, "expert_map")
    except (UnsupportedProblem, TypeError) as error:
        raise unreadable("moe_permute", locals(), error) from None
    if type(num_experts) is not int and (read := integer(num_experts)) is not None:
        num_experts = read
    key = vi[1:6], vm and vm[1:6], num_experts
    plan = _plans.find(key) if type(num_experts) is int else None  # 2.0 == 2 and True == 1
    if plan is None:
        plan = _plans.keep(key, _Plan(permute_problem(vi, vm, num_experts=num_experts)))
    return plan.run((vi, vm))


class _Plan:
    """What one combination of shapes and options needs; made once, then found by its key."""

    __slots__ = ("problem", "specs")

    def __init__(self, problem: PermuteProblem) -> None:
        self.problem = problem
        self.specs: list[plans.Spec] = [*PERMUTE.results(problem).values()]

    def run(self, views: tuple[View, View | None]) -> MoEPermutation[Any]:
        """The call: outputs from the caller's library, then the kernels or the NumPy back end."""
        p, ids = self.problem, views[0]
        if ids.device < 0:
            return self._run_on_host(views)
        made, pointers = plans.allocate(ids, self.specs)
        if p.tokens:
            plans.gpu().run(PERMUTE, p, views, pointers)
            plans.queued(views)
        else:
            arrays.fill(ids, made[0], 0)
        return MoEPermutation(*made)

    def _run_on_host(self, views: tuple[View, View | None]) -> MoEPermutation[Any]:
        from flashmoe_cupy.cpu.moe import permute

        p = self.problem
        ids, expert_map = plans.on_host(views)
        plans.check_ids(ids, p.num_experts, p.num_global)
        return MoEPermutation(*[arrays.from_numpy(views[0], a) for a in permute(ids, p.num_experts, expert_map)])


_plans: plans.Memory[_Plan] = plans.Memory()
