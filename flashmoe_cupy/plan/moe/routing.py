"""Problems of routing: all that decides how moe_route and moe_permute run, except the pointers. No GPU, no CuPy.

As in attention/problem.py, each check that fails adds one reason, and strides count elements. Sizes: T tokens,
d hidden, n intermediate size per expert, E experts, K = top_k.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple, NoReturn

from flashmoe_cupy.dtypes import INT32, INT64, DType
from flashmoe_cupy.errors import UnsupportedProblem
from flashmoe_cupy.plan.checks import (
    FLOAT_MAX,
    INT_MAX,
    MAX_EXPERTS,
    MAX_TOP_K,
    SHORT,
    Option,
    asked,
    cast,
    check_dtypes,
    check_last,
    check_list,
    check_places,
    check_ranks,
    check_small,
    count,
    flag,
    have,
    show,
)
from flashmoe_cupy.plan.options import real, text

if TYPE_CHECKING:
    from flashmoe_cupy.arrays import View
    from flashmoe_cupy.plan.hints import Topics

SCORING = ("softmax", "sigmoid", "sqrtsoftplus")  # in the order of enum ScoringFunc of moe/params.cuh


class RouteProblem(NamedTuple):
    """Everything but the pointers of `moe_route`. The results are contiguous."""

    dtype: DType  # of logits
    tokens: int
    num_experts: int
    top_k: int
    logits_stride: int  # elements from token to token
    scoring_func: str  # one of SCORING
    renormalize: bool
    routed_scaling_factor: float
    bias_dtype: DType | None  # of e_score_correction_bias; None: there is none
    num_expert_group: int  # 1: experts are not grouped
    topk_group: int  # groups that take part
    capacity: int  # assignments that an expert keeps; -1: all
    return_stats: bool

    def describe(self) -> str:
        """One line, for example "route bf16 t4096 e256 k8 sigmoid bias groups4/8"."""
        words = ["route", SHORT[self.dtype], f"t{self.tokens}", f"e{self.num_experts}", f"k{self.top_k}"]
        words.append(self.scoring_func)
        if self.bias_dtype is not None:
            words.append("bias")
        if self.num_expert_group > 1:
            words.append(f"groups{self.topk_group}/{self.num_expert_group}")
        if self.renormalize:
            words.append("renormalize")
        if self.capacity >= 0:
            words.append(f"capacity{self.capacity}")
        if self.return_stats:
            words.append("stats")
        return " ".join(words)


class PermuteProblem(NamedTuple):
    """Everything but the pointers of `moe_permute`. The results are contiguous."""

    ids_dtype: DType
    tokens: int
    top_k: int
    ids_stride: int  # elements from token to token
    num_experts: int  # that are here
    num_global: int  # length of expert_map; -1: there is none

    @property
    def ids(self) -> int:
        """How many ids, from 0 on, name an expert or an entry of expert_map."""
        return self.num_experts if self.num_global < 0 else self.num_global

    def describe(self) -> str:
        """One line, for example "permute int32 t4096 k8 e128"."""
        words = ["permute", self.ids_dtype.name, f"t{self.tokens}", f"k{self.top_k}", f"e{self.num_experts}"]
        if self.num_global >= 0:
            words.append(f"map{self.num_global}")
        return " ".join(words)


def route_problem(
    logits: View,
    e_score_correction_bias: View | None = None,
    *,
    top_k: object,
    scoring_func: object = "softmax",
    renormalize: object = False,
    routed_scaling_factor: object = 1.0,
    num_expert_group: object = 1,
    topk_group: object = 1,
    capacity_factor: object = None,
    return_stats: object = False,
) -> RouteProblem:
    """Validate the arguments of `moe_route`. Raises one UnsupportedProblem that holds every reason.

    logits: (T, E). e_score_correction_bias: (E,).
    """
    why: list[str] = []
    bias = e_score_correction_bias
    named = [("logits", logits)] if bias is None else [("logits", logits), ("e_score_correction_bias", bias)]
    known = len(logits.shape) == 2
    tokens, experts = logits.shape if known else (0, 0)
    check_ranks(why, 2, named[:1])
    check_dtypes(why, named[:1])
    check_last(why, "logits", logits)
    check_places(why, named)
    if known and not 1 <= experts <= MAX_EXPERTS:
        why.append(f"logits has {experts} experts; the router takes 1 to {MAX_EXPERTS}")
    if bias is not None:
        check_small(why, "e_score_correction_bias", bias, logits.dtype, "logits", (experts,) if known else None)
    k = count(why, "top_k", top_k)
    if k > MAX_TOP_K:
        why.append(f"top_k is {k}; the router takes at most {MAX_TOP_K}")
    if known and k > experts:
        why.append(f"top_k is {k}, but there are only {experts} experts")
    if known:
        check_assignments(why, tokens, k)
    groups, kept = count(why, "num_expert_group", num_expert_group), count(why, "topk_group", topk_group)
    if known and groups and experts % groups:
        why.append(f"{experts} experts do not divide into num_expert_group={groups} groups of one size")
    if groups and kept > groups:
        why.append(f"topk_group is {kept}, but there are only {groups} groups (num_expert_group)")
    elif known and groups and experts % groups == 0 and kept and kept * (experts // groups) < k <= experts:
        why.append(f"top_k is {k}, but topk_group={kept} groups of {experts // groups} experts hold fewer")
    scoring = text(scoring_func)
    if scoring not in SCORING:
        why.append(f"scoring_func is {show(scoring_func)}; known are {', '.join(SCORING)}")
    normed, stats = flag(why, "renormalize", renormalize), flag(why, "return_stats", return_stats)
    scale = real(routed_scaling_factor)
    if scale is None or not -FLOAT_MAX <= scale <= FLOAT_MAX:
        why.append(f"routed_scaling_factor must be a number finite in float32, but is {have(routed_scaling_factor)}")
    factor = None if capacity_factor is None else real(capacity_factor)
    if capacity_factor is not None and (factor is None or not 0.0 <= factor < math.inf):
        why.append(f"capacity_factor must be None (drop nothing) or a number from 0 on, but is {have(capacity_factor)}")
    if why:
        from flashmoe_cupy.plan.hints import ROUTE  # words of errors alone

        options: list[Option] = [
            ("top_k", top_k, None), ("scoring_func", scoring_func, "softmax"), ("renormalize", renormalize, False),
            ("routed_scaling_factor", routed_scaling_factor, 1.0), ("num_expert_group", num_expert_group, 1),
            ("topk_group", topk_group, 1), ("capacity_factor", capacity_factor, None),
            ("return_stats", return_stats, False),
        ]  # fmt: skip
        refuse("moe_route", named, options, why, ROUTE)
    capacity = -1 if factor is None else min(math.ceil(min(factor * tokens * k / experts, INT_MAX)), INT_MAX)
    return RouteProblem(
        dtype=logits.dtype, tokens=tokens, num_experts=experts, top_k=k, logits_stride=logits.strides[0],
        scoring_func=str(scoring), renormalize=normed, routed_scaling_factor=scale or 0.0,
        bias_dtype=None if bias is None else bias.dtype, num_expert_group=groups, topk_group=kept, capacity=capacity,
        return_stats=stats,
    )  # fmt: skip


def permute_problem(topk_ids: View, expert_map: View | None = None, *, num_experts: object) -> PermuteProblem:
    """Validate the arguments of `moe_permute`. Raises one UnsupportedProblem that holds every reason.

    topk_ids: (T, K). expert_map: (num_global,). What they hold is not looked at.
    """
    why: list[str] = []
    named = [("topk_ids", topk_ids)] if expert_map is None else [("topk_ids", topk_ids), ("expert_map", expert_map)]
    tokens, k = check_ids(why, topk_ids)
    check_places(why, named)
    experts = count(why, "num_experts", num_experts)
    num_global = check_map(why, expert_map)
    if why:
        from flashmoe_cupy.plan.hints import PERMUTE  # words of errors alone

        refuse("moe_permute", named, [("num_experts", num_experts, None)], why, PERMUTE)
    return PermuteProblem(topk_ids.dtype, tokens, k, topk_ids.strides[0], experts, num_global)


def refuse(
    op: str, named: Sequence[tuple[str, View]], options: list[Option], why: list[str], topics: Topics
) -> NoReturn:
    """Raise the reasons, with the call they are about and what would run."""
    from flashmoe_cupy.plan.hints import hint  # words of errors alone

    raise UnsupportedProblem(asked(op, named, options), why, hint(why, topics))


def check_map(why: list[str], expert_map: View | None) -> int:
    """num_global of the problems: the length of expert_map; -1: there is none."""
    if expert_map is None:
        return -1
    check_list(why, "expert_map", expert_map)
    return expert_map.shape[0] if len(expert_map.shape) == 1 else 0


def check_ids(why: list[str], topk_ids: View) -> tuple[int, int]:
    """(T, K)."""
    if topk_ids.dtype is not INT32 and topk_ids.dtype is not INT64:
        must = f"which must be int32 or int64; {cast('topk_ids', topk_ids, 'int32')}"
        why.append(f"topk_ids has dtype {topk_ids.dtype}, {must}")
    check_last(why, "topk_ids", topk_ids)
    if len(topk_ids.shape) != 2:
        check_ranks(why, 2, (("topk_ids", topk_ids),))
        return 0, 0
    tokens, k = topk_ids.shape
    if k == 0:
        why.append("topk_ids has no column, so no token has an expert")
    check_assignments(why, tokens, k)
    return tokens, k


def check_assignments(why: list[str], tokens: int, k: int) -> None:
    """Kernels count assignments in 32 bits."""
    if tokens * max(k, 1) > INT_MAX:
        why.append(f"{tokens} tokens with {k} experts each make more than 2**31 - 1 assignments; split the tokens")
