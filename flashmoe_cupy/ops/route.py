"""The router: which experts a token goes to, and with what weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, SupportsIndex, Unpack, overload

import numpy as np

from flashmoe_cupy._types import Array, Generic, Route, Scoring
from flashmoe_cupy.dtypes import FP32, INT32
from flashmoe_cupy.ops.call import Call, run
from flashmoe_cupy.ops.names import no_argument, strict
from flashmoe_cupy.plan.checks import need_ranks
from flashmoe_cupy.plan.moe.routing import RouteProblem, route_problem
from flashmoe_cupy.plan.moe.steps import route_steps
from flashmoe_cupy.plan.operation import Operation, Output, register


class RouterStats(NamedTuple, Generic[Array]):
    """How evenly the experts are used; arrays of the caller's library, nothing waits for them."""

    expert_counts: Array  # (E,) int32: assignments that each expert keeps
    dropped: Array  # (E,) int32: assignments taken away for capacity
    load_balancing_loss: Array  # () float32
    z_loss: Array  # () float32


if TYPE_CHECKING:  # numpy.typing takes longer to import than this file
    from numpy.typing import NDArray

    _Routed = tuple[NDArray[np.float32], NDArray[np.int32]]
    _RoutedStats = tuple[NDArray[np.float32], NDArray[np.int32], RouterStats[NDArray[Any]]]


@overload
def moe_route(
    logits: np.ndarray[Any, Any], *, return_stats: Literal[False] = False, **options: Unpack[Route]
) -> _Routed: ...
@overload
def moe_route(
    logits: np.ndarray[Any, Any], *, return_stats: Literal[True], **options: Unpack[Route]
) -> _RoutedStats: ...
@overload
def moe_route(
    logits: Array, *, return_stats: Literal[False] = False, **options: Unpack[Route]
) -> tuple[Array, Array]: ...
@overload
def moe_route(
    logits: Array, *, return_stats: Literal[True], **options: Unpack[Route]
) -> tuple[Array, Array, RouterStats[Array]]: ...
@overload
def moe_route(
    logits: Any, *, return_stats: bool, **options: Unpack[Route]
) -> tuple[Any, Any] | tuple[Any, Any, RouterStats[Any]]: ...
@strict
def moe_route(
    logits: Any,
    *,
    top_k: SupportsIndex,
    scoring_func: Scoring = "softmax",
    renormalize: bool = False,
    routed_scaling_factor: float = 1,  # an int: torch.compile would make an input of its graph of a default 1.0
    e_score_correction_bias: Any = None,
    num_expert_group: SupportsIndex = 1,
    topk_group: SupportsIndex = 1,
    capacity_factor: float | None = None,
    return_stats: bool = False,
    **unknown: object,
) -> Any:
    """The top_k experts of each token, best first, and their weights.

    Arrays are NumPy, CuPy, torch or JAX (or have `__dlpack__`), all of one library on one device; the results are too.
    All arithmetic is float32. Nothing is copied between host and device, and nothing waits.

    logits: (T, E), bfloat16, float16 or float32, last dimension contiguous, any stride between tokens; T from 0, E up
        to 1024. They are clamped to float32's finite range, and each NaN counts as its lowest value, -3.4e38: every
        token gets top_k different experts and finite weights, those of a row with NaN as if it held that number. Such
        a result looks right; FLASHMOE_CHECK=1 finds the row.
    top_k: K, from 1 to 32 and at most E.
    scoring_func: scores p of the logits x: "softmax" over all E, "sigmoid", or "sqrtsoftplus": sqrt(log(1 + exp(x))).
    e_score_correction_bias: (E,), float32 or logits' dtype: added to p for the choice of experts, not to the weights.
        The K largest are taken; ties go to the lower expert. Without it the logits themselves decide. With a NaN in it
        the experts are different ones, but which is not promised.
    num_expert_group, topk_group: E experts in groups of one size, of which the topk_group best take part: by the sum of
        their two largest choices with a bias, by the largest without; ties go to the lower group.
    renormalize: the weights p of the chosen experts are divided by their sum; for softmax this is the softmax over
        the chosen logits, for the others the sum is at least 1e-20.
    routed_scaling_factor: factor of the weights, after that.
    capacity_factor: each expert keeps ceil(capacity_factor * T * K / E) assignments, those of earlier tokens first; of
        one token, better choices first. The others get id -1 and weight 0. None = drop nothing.
    return_stats: a third result, RouterStats.

    Returns topk_weights (T, K) float32 and topk_ids (T, K) int32. RouterStats holds expert_counts (E,) int32, the
    assignments kept; dropped (E,) int32, those dropped; load_balancing_loss = E * sum_e (routed_e / T) * mean_t(P_te),
    with routed_e before drops and P = p divided by its sum over the experts of a token; z_loss = mean of the squared
    logsumexp of the logits. Both losses are 0 for T = 0. The same inputs give the same bits in every run.

    Raises UnsupportedProblem (a ValueError) with every reason, DependencyError when CuPy or a driver is missing; with
    FLASHMOE_CHECK=1 FlashMoEError for the first NaN in logits, by row and expert, or in e_score_correction_bias.
    There is no gradient yet: torch tensors that require one are refused in grad mode, and so is `jax.grad`.

    Names elsewhere: gating_output and router_logits are logits; topk is top_k.

    Sources: Switch (arXiv:2101.03961, equations 4 to 6), ST-MoE (arXiv:2202.08906, equation 5); bias and groups as in
    DeepSeek-V3 (arXiv:2412.19437), without bias as in DeepSeek-V2 (arXiv:2405.04434).
    """
    if unknown:
        raise no_argument(moe_route, unknown)
    options = (
        top_k, scoring_func, renormalize, routed_scaling_factor, num_expert_group, topk_group, capacity_factor,
        return_stats,
    )  # fmt: skip
    if e_score_correction_bias is None:
        return run(_CALL, (logits,), options)
    return run(_CALL, (logits,), options, (e_score_correction_bias,))


def _shapes(shapes: Mapping[str, Any], options: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    need_ranks("moe_route", {"logits": 2}, shapes)
    tokens, experts = shapes["logits"]
    found: dict[str, tuple[int, ...]] = {}
    found |= dict.fromkeys(("topk_weights", "topk_ids"), (tokens, options["top_k"]))
    if options["return_stats"]:
        found |= dict.fromkeys(("expert_counts", "dropped"), (experts,))
        found |= dict.fromkeys(("load_balancing_loss", "z_loss"), ())
    return found


def _host(p: RouteProblem, given: Mapping[str, Any], made: Mapping[str, Any]) -> None:
    from flashmoe_cupy.cpu.moe import route

    weights, ids, *stats = made.values()
    found = route(p, given["logits"], given["e_score_correction_bias"], weights, ids)
    for target, value in zip(stats, found or (), strict=True):
        target[...] = value


def _check(p: RouteProblem, fetch: Callable[[str], Any]) -> None:  # noqa: ARG001
    from flashmoe_cupy.cpu.moe import check_no_nan

    for name in _OPERATION.arguments:
        values = fetch(name)
        if values is not None:
            check_no_nan(name, values)


def _wrap(made: Sequence[Any]) -> Any:
    return (made[0], made[1], RouterStats(*made[2:])) if len(made) > 2 else (made[0], made[1])


_OUTPUTS = {
    "topk_weights": Output(FP32), "topk_ids": Output(INT32), "expert_counts": Output(INT32), "dropped": Output(INT32),
    "load_balancing_loss": Output(FP32), "z_loss": Output(FP32),
}  # fmt: skip
_OPERATION = register(
    Operation(
        moe_route,
        ("logits", "e_score_correction_bias"),
        1,
        _OUTPUTS,
        _shapes,
        RouteProblem,
        route_problem,
        route_steps,
        _host,
        wanted=lambda options: (*_OUTPUTS,) if options["return_stats"] else (*_OUTPUTS,)[:2],
        empty=lambda p: not p.tokens,
        wrap=_wrap,
        check=_check,
    )
)
_CALL = Call(_OPERATION)
