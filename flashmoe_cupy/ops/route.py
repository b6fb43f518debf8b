"""The router: which experts a token goes to, and with what weights."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal, NamedTuple, SupportsIndex, Unpack, overload

import numpy as np
from numpy.typing import NDArray

from flashmoe_cupy import arrays
from flashmoe_cupy._types import Array, Generic, Route, Scoring
from flashmoe_cupy.arrays import View, view
from flashmoe_cupy.errors import UnsupportedProblem
from flashmoe_cupy.ops import plans
from flashmoe_cupy.ops.names import no_argument, strict
from flashmoe_cupy.ops.operations import ROUTE
from flashmoe_cupy.ops.unreadable import unreadable
from flashmoe_cupy.plan.moe.routing import RouteProblem, route_problem
from flashmoe_cupy.plan.options import exact, exact_types

if TYPE_CHECKING:
    from flashmoe_cupy.ops.moe_gpu import Ready
    from flashmoe_cupy.ops.quick import Quick


_OPTIONS = (
    "top_k", "scoring_func", "renormalize", "routed_scaling_factor", "num_expert_group", "topk_group",
    "capacity_factor", "return_stats",
)  # fmt: skip
_EXACT = exact_types(*_OPTIONS)


class RouterStats(NamedTuple, Generic[Array]):
    """How evenly the experts are used; arrays of the caller's library, nothing waits for them."""

    expert_counts: Array  # (E,) int32: assignments that each expert keeps
    dropped: Array  # (E,) int32: assignments taken away for capacity
    load_balancing_loss: Array  # () float32
    z_loss: Array  # () float32


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
    routed_scaling_factor: float = 1.0,
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
    right = tuple(map(type, options)) in _EXACT  # what is remembered is found by exact types only: 1 == True == 1.0
    if not right:
        read: Any = exact(dict(zip(_OPTIONS, options, strict=True)))
        if read is not None:
            right, options = True, tuple(read.values())
            (
                top_k, scoring_func, renormalize, routed_scaling_factor, num_expert_group, topk_group, capacity_factor,
                return_stats,
            ) = options  # fmt: skip
    short = None
    if right and not return_stats:
        given = (logits,) if e_score_correction_bias is None else (logits, e_score_correction_bias)
        short, found = plans.seen(_plans, given, options)
        if found is not None:
            return found
    other = plans.adapter(logits)
    if other is not None:
        return other.moe_route(
            logits, top_k=top_k, scoring_func=scoring_func, renormalize=renormalize,
            routed_scaling_factor=routed_scaling_factor, e_score_correction_bias=e_score_correction_bias,
            num_expert_group=num_expert_group, topk_group=topk_group, capacity_factor=capacity_factor,
            return_stats=return_stats,
        )  # fmt: skip
    try:
        vl = view(logits, "logits")
        vb = None if e_score_correction_bias is None else view(e_score_correction_bias, "e_score_correction_bias")
    except (UnsupportedProblem, TypeError) as error:
        raise unreadable("moe_route", locals(), error) from None
    key = vl[1:6], vb and vb[1:6], options
    plan = _plans.find(key) if right else None
    if plan is None:
        problem = route_problem(
            vl, vb, top_k=top_k, scoring_func=scoring_func, renormalize=renormalize,
            routed_scaling_factor=routed_scaling_factor, num_expert_group=num_expert_group, topk_group=topk_group,
            capacity_factor=capacity_factor, return_stats=return_stats,
        )  # fmt: skip
        plan = _plans.keep(key, _Plan(problem))
    if short is not None and vl.device >= 0:
        _plans.keep(short, plan)
    return plan.run((vl, vb))


class _Plan:
    """What one combination of shapes and options needs; made once, then found by its key."""

    __slots__ = ("problem", "ready", "short", "specs")

    def __init__(self, problem: RouteProblem) -> None:
        self.problem = problem
        self.ready: Ready | None = None  # of the last call
        self.short: plans.ShortWay | None = None  # made of it
        self.specs: list[plans.Spec] = [*ROUTE.results(problem).values()]

    def run(self, views: tuple[View, View | None]) -> Any:
        """The call: outputs from the caller's library, then the kernels or the NumPy back end."""
        logits = views[0]
        if logits.device < 0:
            return self._run_on_host(views)
        made, pointers = plans.allocate(logits, self.specs)
        if self.problem.tokens:
            self.ready = plans.gpu().run(ROUTE, self.problem, views, pointers)
            plans.queued(views)
        else:
            for array in made[2:]:
                arrays.fill(logits, array, 0)
        return _results(made)

    def short_way(self, quick: Quick, given: tuple[Any, ...]) -> plans.ShortWay | None:
        """`run` for plain arrays on a GPU like these, without statistics; None: there is none, as far as is known."""
        if self.short is None and self.ready is not None:
            shape = self.specs[0][0]
            specs = [(shape, (shape[1], 1), dtype) for dtype in (quick.float32, quick.int32)]
            self.short = plans.short_way(quick, self.ready, range(1, len(given) + 1), specs)
        return self.short

    def _run_on_host(self, views: tuple[View, View | None]) -> Any:
        from flashmoe_cupy.cpu.moe import route

        p = self.problem
        weights, ids = np.empty((p.tokens, p.top_k), np.float32), np.empty((p.tokens, p.top_k), np.int32)
        logits, bias = plans.on_host(views)
        plans.check_no_nan(logits, bias)
        stats = route(p, logits, bias, weights, ids)
        return _results([arrays.from_numpy(views[0], a) for a in (weights, ids, *(stats or ()))])


def _results(made: list[Any]) -> Any:
    return (made[0], made[1], RouterStats(*made[2:])) if len(made) > 2 else (made[0], made[1])


_plans: plans.Memory[_Plan] = plans.Memory()
