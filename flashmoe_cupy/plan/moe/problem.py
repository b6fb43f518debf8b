"""Problems of mixture of experts: all that decides how an operation runs, except the pointers. No GPU, no CuPy.

As in attention/problem.py, each check that fails adds one reason, and strides count elements. Sizes: T tokens,
d hidden, n intermediate size per expert, E experts, K = top_k.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from flashmoe_cupy.dtypes import FP32, INT32, INT64, DType
from flashmoe_cupy.plan.checks import (
    ACTIVATIONS,
    GATED,
    INT_MAX,
    SHORT,
    Option,
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
    flag,
    or_else,
    show,
)
from flashmoe_cupy.plan.moe.layouts import check_shared, check_w, check_weights
from flashmoe_cupy.plan.moe.routing import check_ids, check_map, refuse
from flashmoe_cupy.plan.options import text

if TYPE_CHECKING:
    from flashmoe_cupy.arrays import View


class GroupedGemmProblem(NamedTuple):
    """Everything but the pointers of `grouped_gemm`."""

    dtype: DType  # of x, w and out
    num_experts: int
    rows: int  # of out: of all experts, or of each one when masked
    x_rows: int  # of x, in the same way
    n: int  # columns of out
    d: int  # columns of x
    masked: bool  # x and out are (E, rows, ·) and group_sizes says how many count; else (rows, ·), offsets says whose
    gather: bool  # gather_indices says which row of x a row of out reads
    new_out: bool  # no out was given, so rows of no group become 0; in a given out they stay
    x_strides: tuple[int, int]  # from expert to expert (0 unless masked), from row to row
    w_strides: tuple[int, int]  # from expert to expert, from row to row
    out_strides: tuple[int, int]  # as x_strides
    bias_dtype: DType | None  # None: there is no bias
    bias_stride: int  # from expert to expert

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

    dtype: DType  # of x, the weights and out
    tokens: int
    hidden: int  # d
    intermediate: int  # n of each expert
    num_experts: int  # whose weights are here
    top_k: int
    x_stride: int  # from token to token
    w_gate_up_strides: tuple[int, int]  # from expert to expert, from row to row
    w_down_strides: tuple[int, int]
    out_stride: int  # from token to token
    topk_weights_dtype: DType
    topk_weights_stride: int  # from token to token
    topk_ids_dtype: DType
    topk_ids_stride: int  # from token to token
    activation: str
    interleaved: bool  # gate and up rows of w_gate_up take turns; else all gate rows come first
    swiglu_alpha: float  # of swigluoai; else 0
    swiglu_limit: float  # of swigluoai, and of swiglu where it clamps; else 0
    b_gate_up_dtype: DType | None  # None: there is none
    b_gate_up_stride: int  # from expert to expert
    b_down_dtype: DType | None
    b_down_stride: int
    num_global: int  # length of expert_map; -1: there is none
    weight_on_input: bool  # a token's weight multiplies x, before the first product, instead of the expert's result
    shared: int  # s, the intermediate size of the shared expert; 0: there is none
    shared_w_gate_up_stride: int  # from row to row
    shared_w_down_stride: int
    shared_gate_dtype: DType | None  # None: the shared expert counts with 1
    shared_gate_stride: int  # from token to token
    batch_invariant: bool  # nothing that a token gets may depend on how many there are

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
# the two validations


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
        from flashmoe_cupy.plan.hints import GROUPED_GEMM  # words of errors alone

        refuse("grouped_gemm", named, [], why, GROUPED_GEMM)
    contiguous = (rows * n, n) if masked else (0, n)
    bias_dtype, bias_stride = _bias(bias)
    return GroupedGemmProblem(
        dtype=x.dtype, num_experts=experts, rows=rows, x_rows=x_rows, n=n, d=d, masked=masked,
        gather=gather_indices is not None, new_out=out is None, x_strides=_two(x),
        w_strides=(w.strides[0], w.strides[1]), out_strides=contiguous if out is None else _two(out),
        bias_dtype=bias_dtype, bias_stride=bias_stride,
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
        topk_weights, topk_ids = topk_ids, topk_weights  # further reasons speak of them in their places
    tokens, k = check_ids(why, topk_ids)
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
    num_global = check_map(why, expert_map)
    s = check_shared(why, x, shared_w_gate_up, shared_w_down, shared_gate, hidden, factor)
    ours = name in ACTIVATIONS
    alpha, limit = clamp_alpha(why, activation, ours, swiglu_alpha), clamp_limit(why, activation, ours, swiglu_limit)
    on_input = flag(why, "apply_router_weight_on_input", apply_router_weight_on_input)
    invariant = flag(why, "batch_invariant", batch_invariant)
    if out is not None:
        check_out(why, out, "x", x.dtype, x.shape if hidden is not None else None)
    if why:
        from flashmoe_cupy.plan.hints import moe  # words of errors alone

        options: list[Option] = [
            ("activation", activation, "swiglu"), ("interleaved", interleaved, False),
            ("swiglu_alpha", swiglu_alpha, None), ("swiglu_limit", swiglu_limit, None),
            ("apply_router_weight_on_input", apply_router_weight_on_input, False),
            ("batch_invariant", batch_invariant, False),
        ]  # fmt: skip
        refuse("fused_moe", named, options, why, moe(factor))
    b_gate_up_dtype, b_gate_up_stride = _bias(b_gate_up)
    b_down_dtype, b_down_stride = _bias(b_down)
    shared_gate_dtype, shared_gate_stride = _bias(shared_gate)
    return MoEProblem(
        dtype=x.dtype, tokens=tokens, hidden=hidden or 0, intermediate=n, num_experts=experts, top_k=k,
        x_stride=x.strides[0], w_gate_up_strides=(w_gate_up.strides[0], w_gate_up.strides[1]),
        w_down_strides=(w_down.strides[0], w_down.strides[1]),
        out_stride=(hidden or 0) if out is None else out.strides[0], topk_weights_dtype=topk_weights.dtype,
        topk_weights_stride=topk_weights.strides[0], topk_ids_dtype=topk_ids.dtype,
        topk_ids_stride=topk_ids.strides[0], activation=str(name), interleaved=is_interleaved, swiglu_alpha=alpha,
        swiglu_limit=limit, b_gate_up_dtype=b_gate_up_dtype, b_gate_up_stride=b_gate_up_stride,
        b_down_dtype=b_down_dtype, b_down_stride=b_down_stride, num_global=num_global, weight_on_input=on_input,
        shared=s, shared_w_gate_up_stride=shared_w_gate_up.strides[0] if shared_w_gate_up else 0,
        shared_w_down_stride=shared_w_down.strides[0] if shared_w_down else 0, shared_gate_dtype=shared_gate_dtype,
        shared_gate_stride=shared_gate_stride, batch_invariant=invariant,
    )  # fmt: skip


def _two(x: View) -> tuple[int, int]:
    """Strides from expert to expert (0 without an axis for them) and from row to row."""
    return (0, x.strides[0]) if len(x.shape) == 2 else (x.strides[0], x.strides[1])


def _bias(x: View | None) -> tuple[DType | None, int]:
    """The dtype and first stride of an array that may be missing."""
    return (None, 0) if x is None else (x.dtype, x.strides[0])
