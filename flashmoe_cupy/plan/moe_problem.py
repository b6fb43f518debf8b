"""Problems of mixture of experts: all that decides how an operation runs, except the pointers. No GPU, no CuPy.

As in plan/problem.py, each check that fails adds one reason, and strides count elements. Sizes: T tokens, d hidden,
n intermediate size per expert, E experts, K = top_k.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple, NoReturn

from flashmoe_cupy.dtypes import FP32, INT32, INT64, DType
from flashmoe_cupy.errors import UnsupportedProblem
from flashmoe_cupy.plan.checks import (
    FLOAT_MAX,
    INT_MAX,
    SHORT,
    Option,
    asked,
    cast,
    check_dtypes,
    check_eights,
    check_last,
    check_list,
    check_out,
    check_places,
    check_ranks,
    check_small,
    clamp_alpha,
    clamp_limit,
    count,
    flag,
    have,
    or_else,
    show,
)
from flashmoe_cupy.plan.hints import GROUPED_GEMM, MAX_EXPERTS, MAX_TOP_K, PERMUTE, ROUTE, Topics, hint, moe
from flashmoe_cupy.plan.layouts import check_shared, check_w, check_weights
from flashmoe_cupy.plan.options import real, text

if TYPE_CHECKING:
    from flashmoe_cupy.arrays import View

SCORING = ("softmax", "sigmoid", "sqrtsoftplus")
GATED = ("swiglu", "geglu", "geglu_tanh", "swigluoai")
ACTIVATIONS = (*GATED, "gelu", "gelu_tanh", "relu", "relu2")


class RouteProblem(NamedTuple):
    """Everything but the pointers of `moe_route`. The results are contiguous."""

    dtype: DType
    tokens: int
    num_experts: int
    top_k: int
    logits_stride: int  # from token to token
    scoring_func: str
    renormalize: bool
    routed_scaling_factor: float
    bias_dtype: DType | None
    num_expert_group: int
    topk_group: int
    capacity: int  # assignments that an expert keeps, -1 = all
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
    ids_stride: int  # from token to token
    num_experts: int
    num_global: int  # length of expert_map, -1 without one

    @property
    def ids(self) -> int:
        """Ids from 0 on that name an expert, or an entry of the map."""
        return self.num_experts if self.num_global < 0 else self.num_global

    def describe(self) -> str:
        """One line, for example "permute int32 t4096 k8 e128"."""
        words = ["permute", self.ids_dtype.name, f"t{self.tokens}", f"k{self.top_k}", f"e{self.num_experts}"]
        if self.num_global >= 0:
            words.append(f"map{self.num_global}")
        return " ".join(words)


class GroupedGemmProblem(NamedTuple):
    """Everything but the pointers of `grouped_gemm`.

    masked: x and out are (E, rows, ·) and group_sizes tells how many rows count; else they are (x_rows, d) and
    (rows, n) and offsets tells whose they are.
    """

    dtype: DType
    num_experts: int
    rows: int  # of out, per expert when masked
    x_rows: int  # of x, per expert when masked
    n: int
    d: int
    masked: bool
    gather: bool
    new_out: bool  # rows of no group become 0; in a given out they stay
    x_strides: tuple[int, int]  # (expert or 0, row), like out's
    w_strides: tuple[int, int]  # (expert, row)
    out_strides: tuple[int, int]
    bias_dtype: DType | None
    bias_stride: int

    def describe(self) -> str:
        """One line, for example "grouped gemm bf16 e8 rows4096 n1024 d2048 gather bias"."""
        words = ["grouped gemm", SHORT[self.dtype], f"e{self.num_experts}", f"rows{self.rows}", f"n{self.n}"]
        words.append(f"d{self.d}")
        words += [word for word in ("masked", "gather") if getattr(self, word)]
        if self.bias_dtype is not None:
            words.append("bias")
        return " ".join(words)


class MoEProblem(NamedTuple):
    """Everything but the pointers of `fused_moe`."""

    dtype: DType
    tokens: int
    hidden: int  # d
    intermediate: int  # n
    num_experts: int  # whose weights are here
    top_k: int
    x_stride: int  # from token to token, like out's
    w_gate_up_strides: tuple[int, int]  # (expert, row)
    w_down_strides: tuple[int, int]
    out_stride: int
    topk_weights_dtype: DType
    topk_weights_stride: int
    topk_ids_dtype: DType
    topk_ids_stride: int
    activation: str
    interleaved: bool
    swiglu_alpha: float  # of swigluoai; else 0
    swiglu_limit: float  # of swigluoai, and of swiglu where it clamps; else 0
    b_gate_up_dtype: DType | None
    b_gate_up_stride: int  # from expert to expert
    b_down_dtype: DType | None
    b_down_stride: int
    num_global: int  # length of expert_map, -1 without one
    weight_on_input: bool
    shared: int  # s, intermediate size of the shared expert; 0 = there is none
    shared_w_gate_up_stride: int  # from row to row
    shared_w_down_stride: int
    shared_gate_dtype: DType | None
    shared_gate_stride: int
    batch_invariant: bool

    @property
    def gated(self) -> bool:
        """Whether w_gate_up has two rows for each element of the activation."""
        return self.activation in GATED

    def describe(self) -> str:
        """One line, for example "moe bf16 t128 d2048 n768 e128 k8 swiglu shared768"."""
        words = ["moe", SHORT[self.dtype], f"t{self.tokens}", f"d{self.hidden}", f"n{self.intermediate}"]
        words += [f"e{self.num_experts}", f"k{self.top_k}", self.activation]
        clamped = self.activation == "swiglu" and self.swiglu_limit
        optional = (
            (f"limit{clamped:g}", clamped), ("interleaved", self.interleaved), ("b_gate_up", self.b_gate_up_dtype),
            ("b_down", self.b_down_dtype),
            (f"map{self.num_global}", self.num_global >= 0), ("weight-on-input", self.weight_on_input),
            (f"shared{self.shared}", self.shared), ("shared_gate", self.shared_gate_dtype),
            ("batch-invariant", self.batch_invariant),
        )  # fmt: skip
        return " ".join(words + [word for word, on in optional if on])


# ---------------------------------------------------------------------------------------------------------------------
# the four validations


def route_problem(
    logits: View,
    bias: View | None = None,
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

    logits: (T, E). bias: (E,), the e_score_correction_bias.
    """
    why: list[str] = []
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
        _check_assignments(why, tokens, k)
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
        options: list[Option] = [
            ("top_k", top_k, None), ("scoring_func", scoring_func, "softmax"), ("renormalize", renormalize, False),
            ("routed_scaling_factor", routed_scaling_factor, 1.0), ("num_expert_group", num_expert_group, 1),
            ("topk_group", topk_group, 1), ("capacity_factor", capacity_factor, None),
            ("return_stats", return_stats, False),
        ]  # fmt: skip
        _refuse("moe_route", named, options, why, ROUTE)
    capacity = -1 if factor is None else min(math.ceil(min(factor * tokens * k / experts, INT_MAX)), INT_MAX)
    return RouteProblem(
        logits.dtype, tokens, experts, k, logits.strides[0], str(scoring), normed, scale or 0.0,
        None if bias is None else bias.dtype, groups, kept, capacity, stats,
    )  # fmt: skip


def permute_problem(topk_ids: View, expert_map: View | None = None, *, num_experts: object) -> PermuteProblem:
    """Validate the arguments of `moe_permute`. Raises one UnsupportedProblem that holds every reason.

    topk_ids: (T, K). expert_map: (num_global,). What they hold is not looked at.
    """
    why: list[str] = []
    named = [("topk_ids", topk_ids)] if expert_map is None else [("topk_ids", topk_ids), ("expert_map", expert_map)]
    tokens, k = _check_ids(why, topk_ids)
    check_places(why, named)
    experts = count(why, "num_experts", num_experts)
    num_global = _check_map(why, expert_map)
    if why:
        _refuse("moe_permute", named, [("num_experts", num_experts, None)], why, PERMUTE)
    return PermuteProblem(topk_ids.dtype, tokens, k, topk_ids.strides[0], experts, num_global)


def grouped_gemm_problem(
    x: View,
    w: View,
    *,
    offsets: View | None = None,
    group_sizes: View | None = None,
    gather_indices: View | None = None,
    bias: View | None = None,
    out: View | None = None,
) -> GroupedGemmProblem:
    """Validate the arguments of `grouped_gemm`. Raises one UnsupportedProblem that holds every reason.

    x: (rows, d) with offsets (E + 1,), or (E, rows, d) with group_sizes (E,). w: (E, n, d). What the int32 arrays
    hold is not looked at.
    """
    why: list[str] = []
    lists = (("offsets", offsets), ("group_sizes", group_sizes), ("gather_indices", gather_indices))
    optional = (*lists, ("bias", bias), ("out", out))
    named = [("x", x), ("w", w), *((name, v) for name, v in optional if v is not None)]
    masked = group_sizes is not None
    if (offsets is None) is (group_sizes is None):
        why.append(f"give either offsets or group_sizes, not {'neither' if offsets is None else 'both'}")
    if masked and gather_indices is not None:
        why.append("gather_indices goes with offsets; with group_sizes each expert has rows of its own")
    known = len(x.shape) == (3 if masked else 2) and len(w.shape) == 3
    check_ranks(why, 3 if masked else 2, named[:1])
    check_ranks(why, 3, named[1:2])
    check_dtypes(why, named[:2])
    check_last(why, "x", x)
    check_last(why, "w", w)
    check_places(why, named)
    for name, v in lists:
        if v is not None:
            check_list(why, name, v)
    rows = x_rows = n = d = experts = 0
    if known:
        x_rows, d = x.shape[-2:]
        rows = gather_indices.shape[0] if gather_indices is not None and len(gather_indices.shape) == 1 else x_rows
        experts, n = check_w(why, x, w, offsets, group_sizes)
        if w.shape[2] == d:
            check_eights(why, ("n", n, "the rows of w (and bias) and cut the result"), ("d", d, "x and w"))
        if max(x_rows, rows) > INT_MAX or experts * rows > INT_MAX:
            why.append("there are more than 2**31 - 1 rows")
    if bias is not None:
        check_small(why, "bias", bias, x.dtype, "x", (experts, n) if known else None)
    want = (experts, rows, n) if masked else (rows, n)
    if out is not None:
        check_out(why, out, "x", x.dtype, want if known else None)
    if why:
        _refuse("grouped_gemm", named, [], why, GROUPED_GEMM)
    contiguous = (rows * n, n) if masked else (0, n)
    return GroupedGemmProblem(
        x.dtype, experts, rows, x_rows, n, d, masked, gather_indices is not None, out is None,
        _two(x), (w.strides[0], w.strides[1]), contiguous if out is None else _two(out),
        None if bias is None else bias.dtype, 0 if bias is None else bias.strides[0],
    )  # fmt: skip


def moe_problem(
    x: View,
    w_gate_up: View,
    w_down: View,
    topk_weights: View,
    topk_ids: View,
    *,
    activation: object = "swiglu",
    b_gate_up: View | None = None,
    b_down: View | None = None,
    interleaved: object = False,
    swiglu_alpha: object = None,
    swiglu_limit: object = None,
    expert_map: View | None = None,
    apply_router_weight_on_input: object = False,
    shared_w_gate_up: View | None = None,
    shared_w_down: View | None = None,
    shared_gate: View | None = None,
    batch_invariant: object = False,
    out: View | None = None,
) -> MoEProblem:
    """Validate the arguments of `fused_moe`. Raises one UnsupportedProblem that holds every reason.

    x: (T, d). w_gate_up: (E, 2n, d), or (E, n, d) when not gated. w_down: (E, d, n). topk_weights, topk_ids: (T, K).
    What topk_ids and expert_map hold is not looked at.
    """
    why: list[str] = []
    shared = [(n, v) for n, v in (("shared_w_gate_up", shared_w_gate_up), ("shared_w_down", shared_w_down)) if v]
    optional = (("b_gate_up", b_gate_up), ("b_down", b_down), ("expert_map", expert_map), *shared)
    optional += (("shared_gate", shared_gate), ("out", out))
    named = [
        ("x", x), ("w_gate_up", w_gate_up), ("w_down", w_down), ("topk_weights", topk_weights), ("topk_ids", topk_ids),
        *((one, v) for one, v in optional if v is not None),
    ]  # fmt: skip
    name = text(activation)
    if name not in ACTIVATIONS:
        why.append(f"activation is {show(activation)}; known are {', '.join(ACTIVATIONS)}")
    factor = 1 if name in ACTIVATIONS and name not in GATED else 2
    is_interleaved = flag(why, "interleaved", interleaved)
    if is_interleaved and factor == 1:
        why.append(f"interleaved is for gated activations, and {activation!r} is not gated")
    weights = [*named[:3], *shared]
    check_dtypes(why, weights)
    for array, v in weights:
        check_last(why, array, v)
    check_places(why, named)
    check_ranks(why, 2, named[:1])
    check_ranks(why, 3, named[1:3])
    hidden = x.shape[1] if len(x.shape) == 2 else None
    experts = n = 0
    known = hidden is not None and len(w_gate_up.shape) == len(w_down.shape) == 3
    if hidden is not None and known:
        experts, n = check_weights(why, w_gate_up, w_down, hidden, factor, activation)
        known = n > 0
    if topk_ids.dtype.name.startswith(("float", "bfloat")) and topk_weights.dtype in (INT32, INT64):
        swapped = f"topk_weights is {topk_weights.dtype} and topk_ids is {topk_ids.dtype}"
        why.append(f"{swapped}: they look swapped; topk_weights comes first")
        topk_weights, topk_ids = topk_ids, topk_weights  # all else is told of them in their places
    tokens, k = _check_ids(why, topk_ids)
    if hidden is not None and len(topk_ids.shape) == 2 and x.shape[0] != tokens:
        why.append(f"x has {x.shape[0]} tokens, but topk_ids has {tokens}")
    if topk_weights.dtype is not FP32 and topk_weights.dtype is not x.dtype:
        why.append(f"topk_weights has dtype {topk_weights.dtype}, which must be float32{or_else(x.dtype, 'x')}; "
                   f"{cast('topk_weights', topk_weights)}")  # fmt: skip
    if topk_weights.shape != topk_ids.shape:
        why.append(f"topk_weights has shape {topk_weights.shape}, but topk_ids has {topk_ids.shape}")
    check_last(why, "topk_weights", topk_weights)
    if b_gate_up is not None:
        check_small(why, "b_gate_up", b_gate_up, x.dtype, "x", (experts, factor * n) if known else None)
    if b_down is not None:
        check_small(why, "b_down", b_down, x.dtype, "x", (experts, hidden or 0) if known else None)
    num_global = _check_map(why, expert_map)
    s = check_shared(why, x, shared_w_gate_up, shared_w_down, shared_gate, hidden, factor)
    ours = name in ACTIVATIONS
    alpha, limit = clamp_alpha(why, activation, ours, swiglu_alpha), clamp_limit(why, activation, ours, swiglu_limit)
    on_input = flag(why, "apply_router_weight_on_input", apply_router_weight_on_input)
    invariant = flag(why, "batch_invariant", batch_invariant)
    if out is not None:
        check_out(why, out, "x", x.dtype, x.shape if hidden is not None else None)
    if why:
        options: list[Option] = [
            ("activation", activation, "swiglu"), ("interleaved", interleaved, False),
            ("swiglu_alpha", swiglu_alpha, None), ("swiglu_limit", swiglu_limit, None),
            ("apply_router_weight_on_input", apply_router_weight_on_input, False),
            ("batch_invariant", batch_invariant, False),
        ]  # fmt: skip
        _refuse("fused_moe", named, options, why, moe(factor))
    return MoEProblem(
        x.dtype, tokens, hidden or 0, n, experts, k, x.strides[0], (w_gate_up.strides[0], w_gate_up.strides[1]),
        (w_down.strides[0], w_down.strides[1]), (hidden or 0) if out is None else out.strides[0],
        topk_weights.dtype, topk_weights.strides[0], topk_ids.dtype, topk_ids.strides[0], str(name),
        is_interleaved, alpha, limit, *_bias(b_gate_up),
        *_bias(b_down), num_global, on_input, s, shared_w_gate_up.strides[0] if shared_w_gate_up else 0,
        shared_w_down.strides[0] if shared_w_down else 0, *_bias(shared_gate), invariant,
    )  # fmt: skip


# ---------------------------------------------------------------------------------------------------------------------
# checks


def _refuse(
    op: str, named: Sequence[tuple[str, View]], options: list[Option], why: list[str], topics: Topics
) -> NoReturn:
    raise UnsupportedProblem(asked(op, named, options), why, hint(why, topics))


def _two(x: View) -> tuple[int, int]:
    return (0, x.strides[0]) if len(x.shape) == 2 else (x.strides[0], x.strides[1])


def _bias(x: View | None) -> tuple[DType | None, int]:
    return (None, 0) if x is None else (x.dtype, x.strides[0])


def _check_map(why: list[str], expert_map: View | None) -> int:
    if expert_map is None:
        return -1
    check_list(why, "expert_map", expert_map)
    return expert_map.shape[0] if len(expert_map.shape) == 1 else 0


def _check_ids(why: list[str], topk_ids: View) -> tuple[int, int]:
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
    _check_assignments(why, tokens, k)
    return tokens, k


def _check_assignments(why: list[str], tokens: int, k: int) -> None:
    if tokens * max(k, 1) > INT_MAX:
        why.append(f"{tokens} tokens with {k} experts each make more than 2**31 - 1 assignments; split the tokens")
