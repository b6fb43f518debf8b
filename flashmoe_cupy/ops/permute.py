"""The dispatch of mixture of experts as a building block: assignments sorted by expert."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple, SupportsIndex, overload

from flashmoe_cupy._types import Array, Generic
from flashmoe_cupy.dtypes import INT32
from flashmoe_cupy.ops.call import Call, run
from flashmoe_cupy.ops.names import no_argument, strict
from flashmoe_cupy.plan.checks import need_ranks
from flashmoe_cupy.plan.moe.routing import PermuteProblem, permute_problem
from flashmoe_cupy.plan.moe.steps import permute_steps
from flashmoe_cupy.plan.operation import Operation, Output, Workspace, register
from flashmoe_cupy.plan.step import Step

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


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
    if expert_map is None:
        return run(_CALL, (topk_ids,), (num_experts,))  # type: ignore[no-any-return]
    return run(_CALL, (topk_ids,), (num_experts,), (expert_map,))  # type: ignore[no-any-return]


def _shapes(shapes: Mapping[str, Any], options: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    need_ranks("moe_permute", {"topk_ids": 2}, shapes)
    tokens, k = shapes["topk_ids"]
    return {"offsets": (options["num_experts"] + 1,), "sorted_indices": (tokens * k,), "inverse_indices": (tokens, k)}


def _steps(p: PermuteProblem) -> tuple[list[Step], Workspace]:
    work = Workspace()
    return permute_steps(p, work, own=False), work


def _host(p: PermuteProblem, given: Mapping[str, Any], made: Mapping[str, Any]) -> None:
    from flashmoe_cupy.cpu.moe import permute

    found = permute(given["topk_ids"], p.num_experts, given["expert_map"])
    for target, value in zip(made.values(), found, strict=True):
        target[...] = value


def check_ids(p: Any, fetch: Callable[[str], Any]) -> None:
    """Raises FlashMoEError for ids that name no expert and no empty place. p: a problem with experts and a map."""
    from flashmoe_cupy.cpu.moe import check_ids as check

    ids = fetch("topk_ids")
    if ids is not None:
        check(ids, p.num_experts if p.num_global < 0 else p.num_global)


_CALL = Call(
    register(
        Operation(
            moe_permute,
            ("topk_ids", "expert_map"),
            1,
            dict.fromkeys(("offsets", "sorted_indices", "inverse_indices"), Output(INT32)),
            _shapes,
            PermuteProblem,
            permute_problem,
            _steps,
            _host,
            empty=lambda p: not p.tokens,
            wrap=lambda made: MoEPermutation(*made),
            check=check_ids,
        )
    )
)
