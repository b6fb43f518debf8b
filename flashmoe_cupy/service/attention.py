"""Attention: its sizes, which kernel and configuration would run it, what calls can ask for. Needs no GPU, no CuPy."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import product
from typing import Any

from flashmoe_cupy.errors import UnsupportedProblem
from flashmoe_cupy.plan.step import Step, same
from flashmoe_cupy.service.choices import Explanation, absent_arrays, check_sizes, prepared_choices
from flashmoe_cupy.service.family import DTYPE, SIZE_DTYPE, Family, Filter, Size, elements_of, of_dtype
from flashmoe_cupy.service.machine import backend
from flashmoe_cupy.service.names import DTYPES, named_dtype, target_archs

SIZES = (
    SIZE_DTYPE,
    Size("batch", "--batch", "count", "batch size (default 1)"),
    Size("seqlen_q", "--q", "count", "query length (default 4096)"),
    Size("seqlen_k", "--k", "count", "key length (default: as --q)"),
    Size("heads_q", "--heads", "count", "query heads (default 32)"),
    Size("heads_k", "--kv-heads", "count", "key and value heads (default: as --heads)"),
    Size("head_dim", "--d", "count", "head dimension of q and k (default 128)"),
    Size("head_dim_v", "--dv", "count", "head dimension of v (default: as --d)"),
    Size("causal", "--causal", "flag", "causal mask, aligned bottom-right"),
    Size("window_size", "--window", "window", "sliding window; -1 = unlimited"),
    Size("softmax_scale", "--scale", "number", "softmax scale (default d ** -0.5)"),
    Size("softcap", "--softcap", "number", "softcap; 0 = off"),
    Size("alibi", "--alibi", "flag", "ALiBi slopes"),
    Size("bias", "--bias", "word",
         "additive bias of this dtype: same (default), float32 or fp32, bool, which hides where it is False",
         metavar="DTYPE", const="same"),
    Size("sinks", "--sinks", "flag", "attention sinks"),
    Size("varlen", "--varlen", "flag", "packed sequences (cu_seqlens)"),
    Size("padded", "--padded", "flag", "batch entries with padding (seqused_q, seqused_k)"),
)  # fmt: skip
HEAD_DIM = Filter(
    "head_dim", "--head-dim", "positive", "only what calls with this head dimension need",
    "only configurations for this head dimension", "head dimension {}",
)  # fmt: skip
HEAD_DIM_V = Filter(
    "head_dim_v", "--head-dim-v", "positive", "head dimension of v; default: as --head-dim", needs="head_dim"
)


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
    padded: bool = False,
) -> Explanation:
    """`explain` for attention.

    seqlen_k, heads_k, head_dim_v: None = as seqlen_q, heads_q, head_dim. bias: None, "same" (q's dtype), "float32" or
    "bool", of shape (batch, heads_q, seqlen_q, seqlen_k). varlen: `batch` packed sequences of exactly these lengths.
    padded: seqused_q and seqused_k come with the call; flops and bytes are those of no padding.
    """
    problem = problem_of(
        batch, seqlen_q, seqlen_k, heads_q, heads_k, head_dim, head_dim_v, dtype, causal, window_size,
        softmax_scale, softcap, alibi, bias, sinks, varlen, padded,
    )  # fmt: skip
    step = Step("attention_fwd", problem, same("bias"))
    choices = [one for name in target_archs(arch) for one in prepared_choices(step, name)]
    pairs = visible_pairs(problem.seqlen_q, problem.seqlen_k, problem.window_left, problem.window_right)
    size = problem.dtype.itemsize
    rows_q, rows_k = problem.batch * problem.seqlen_q, problem.batch * problem.seqlen_k
    dims = problem.head_dim + problem.head_dim_v
    flops = 2 * problem.batch * problem.heads_q * pairs * dims
    moved = size * dims * (rows_q * problem.heads_q + rows_k * problem.heads_k)
    if problem.bias_dtype is not None:
        moved += problem.bias_dtype.itemsize * rows_q * problem.heads_q * problem.seqlen_k
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
    softcap: float, alibi: bool, bias: str | None, sinks: bool, varlen: bool, padded: bool = False,
) -> Any:  # fmt: skip
    """The problem that a call with contiguous arrays of these sizes would make; the arrays do not exist."""
    from flashmoe_cupy import dtypes
    from flashmoe_cupy.plan.attention import problem

    check_sizes(
        {"batch": batch, "seqlen_q": seqlen_q, "seqlen_k": seqlen_k, "heads_q": heads_q, "heads_k": heads_k,
         "head_dim": head_dim, "head_dim_v": head_dim_v},
        {"alibi": alibi, "sinks": sinks, "varlen": varlen, "padded": padded}, ("seqlen_k", "heads_k", "head_dim_v"),
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
    used = {name: array(dtypes.INT32, batch) for name in ("seqused_q", "seqused_k")} if padded else {}
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
            **used,
        )
    if bias is not None:
        of = kind if bias == "same" else dtypes.BOOL if bias == "bool" else named_dtype(bias, "same, bool")
        options["bias"] = array(of, batch, heads_q, seqlen_q, seqlen_k)
    return problem.attention_problem(
        array(kind, batch, seqlen_q, heads_q, head_dim),
        array(kind, batch, seqlen_k, heads_k, head_dim),
        array(kind, batch, seqlen_k, heads_k, dim_v),
        **options,
        **used,
    )


def _matching(
    arch: str,
    kernels: Iterable[Any],
    *,
    dtype: str | None = None,
    head_dim: int | None = None,
    head_dim_v: int | None = None,
) -> Iterator[tuple[Any, Any]]:
    """(kernel, config) of what calls with these can ask for, whatever their masks and features."""
    elements_of(dtype)
    for kernel in kernels:
        dims = None
        if head_dim is not None and kernel.task == "attention_fwd":  # what prepares a bias serves all head dims
            dims = _compiled_dims(kernel, arch, dtype, head_dim, head_dim_v)
        for _, config in of_dtype(arch, [kernel], dtype=dtype):
            if dims is None or (config.head_dim, config.head_dim_v) in dims:
                yield kernel, config


def _compiled_dims(
    kernel: Any, arch: str, dtype: str | None, head_dim: int, head_dim_v: int | None
) -> set[tuple[int, int]]:
    """The compiled sizes in which `kernel` runs these head dimensions, asked of the kernel itself."""
    found = set()
    for name in DTYPES.values() if dtype is None else (dtype,):
        for length, softcap, bias in product((1, 4096), (0.0, 1.0), (None, "same", "bool")):
            problem = problem_of(
                1, length, length, 1, 1, head_dim, head_dim_v, name, True, (-1, -1), None, softcap, False, bias, False,
                False,
            )  # fmt: skip
            if not kernel.why_not(problem, arch):
                config = kernel.choose(problem, arch)
                found.add((config.head_dim, config.head_dim_v))
    return found


ATTENTION = Family("attention", "attention", SIZES, explain_attention, (DTYPE, HEAD_DIM, HEAD_DIM_V), _matching)
