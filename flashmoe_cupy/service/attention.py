"""Which kernel and configuration would run an attention. Needs no GPU and no CuPy."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from flashmoe_cupy.errors import UnsupportedProblem
from flashmoe_cupy.service.choices import Explanation, absent_arrays, check_sizes, choice
from flashmoe_cupy.service.machine import backend
from flashmoe_cupy.service.names import named_dtype, target_archs


def explain_attention(
    arch: str | Sequence[str] | None = None,
    *,
    batch: int = 1,
    seqlen_q: int = 4096,
    seqlen_k: int | None = None,
    heads_q: int = 32,
    heads_k: int | None = None,
    head_dim: int = 128,
    head_dim_v: int | None = None,
    dtype: str = "bfloat16",
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softmax_scale: float | None = None,
    softcap: float = 0.0,
    alibi: bool = False,
    bias: str | None = None,
    sinks: bool = False,
    varlen: bool = False,
) -> Explanation:
    """`explain` for attention.

    seqlen_k, heads_k, head_dim_v: None = as seqlen_q, heads_q, head_dim. bias: None, "same" (q's dtype), "float32" or
    "bool", of shape (batch, heads_q, seqlen_q, seqlen_k). varlen: `batch` packed sequences of exactly these lengths.
    """
    problem = problem_of(
        batch, seqlen_q, seqlen_k, heads_q, heads_k, head_dim, head_dim_v, dtype, causal, window_size,
        softmax_scale, softcap, alibi, bias, sinks, varlen,
    )  # fmt: skip
    choices = [choice("attention_fwd", problem, name) for name in target_archs(arch)]
    pairs = visible_pairs(problem.seqlen_q, problem.seqlen_k, problem.window_left, problem.window_right)
    size = problem.dtype.itemsize
    rows_q, rows_k = problem.batch * problem.seqlen_q, problem.batch * problem.seqlen_k
    dims = problem.head_dim + problem.head_dim_v
    flops = 2 * problem.batch * problem.heads_q * pairs * dims
    moved = size * dims * (rows_q * problem.heads_q + rows_k * problem.heads_k)
    return Explanation(problem.describe(), backend()[1], flops, moved, tuple(choices))


def visible_pairs(seqlen_q: int, seqlen_k: int, left: int = -1, right: int = -1) -> int:
    """How many (query, key) pairs the causal rule and the window leave; left, right as in `window_size`, -1 = open."""

    def before(shift: int) -> int:
        """The sum over all queries of the keys before position `query + shift`, query 0 at seqlen_k - seqlen_q."""
        first = seqlen_k - seqlen_q + shift
        low, high = max(first, 1), min(first + seqlen_q - 1, seqlen_k - 1)  # where the count is the position itself
        inside = (low + high) * (high - low + 1) // 2 if high >= low else 0
        return inside + seqlen_k * min(max(first + seqlen_q - max(seqlen_k, first), 0), seqlen_q)

    visible = before(right + 1) if right >= 0 else seqlen_q * seqlen_k
    return visible - (before(-left) if left >= 0 else 0)


def problem_of(
    batch: int, seqlen_q: int, seqlen_k: int | None, heads_q: int, heads_k: int | None, head_dim: int,
    head_dim_v: int | None, dtype: str, causal: bool, window_size: tuple[int, int], softmax_scale: float | None,
    softcap: float, alibi: bool, bias: str | None, sinks: bool, varlen: bool,
) -> Any:  # fmt: skip
    """The problem that a call with contiguous arrays of these sizes would make; the arrays do not exist."""
    from flashmoe_cupy import dtypes
    from flashmoe_cupy.plan.attention import problem

    check_sizes(
        {"batch": batch, "seqlen_q": seqlen_q, "seqlen_k": seqlen_k, "heads_q": heads_q, "heads_k": heads_k,
         "head_dim": head_dim, "head_dim_v": head_dim_v},
        {"alibi": alibi, "sinks": sinks, "varlen": varlen}, ("seqlen_k", "heads_k", "head_dim_v"),
    )  # fmt: skip
    seqlen_k = seqlen_q if seqlen_k is None else seqlen_k
    heads_k = heads_q if heads_k is None else heads_k
    dim_v = head_dim if head_dim_v is None else head_dim_v
    kind = named_dtype(dtype)
    array = absent_arrays()
    options: dict[str, Any] = {"causal": causal, "window_size": window_size, "softmax_scale": softmax_scale}
    options["softcap"] = softcap
    options["sinks"] = array(dtypes.FP32, heads_q) if sinks else None
    options["alibi_slopes"] = array(dtypes.FP32, heads_q) if alibi else None
    if varlen:
        if bias is not None:
            raise UnsupportedProblem("flash_attention_varlen", ["bias is not an argument of packed attention"])
        return problem.varlen_problem(
            array(kind, batch * seqlen_q, heads_q, head_dim),
            array(kind, batch * seqlen_k, heads_k, head_dim),
            array(kind, batch * seqlen_k, heads_k, dim_v),
            cu_seqlens_q=array(dtypes.INT32, batch + 1),
            cu_seqlens_k=array(dtypes.INT32, batch + 1),
            max_seqlen_q=seqlen_q,
            max_seqlen_k=seqlen_k,
            **options,
        )
    if bias is not None:
        of = kind if bias == "same" else named_dtype(bias)
        options["bias"] = array(of, batch, heads_q, seqlen_q, seqlen_k)
    return problem.attention_problem(
        array(kind, batch, seqlen_q, heads_q, head_dim),
        array(kind, batch, seqlen_k, heads_k, head_dim),
        array(kind, batch, seqlen_k, heads_k, dim_v),
        **options,
    )
