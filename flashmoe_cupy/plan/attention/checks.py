"""Checks of the arguments of attention: each one that fails adds a reason to a list."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from flashmoe_cupy.dtypes import BOOL, FP32, INT32, DType
from flashmoe_cupy.plan.checks import (
    FLOAT_MAX,
    FLOAT_TINY,
    INT_MAX,
    MAX_HEAD_DIM,
    MAX_HEAD_DIM_V,
    cast,
    cast_bias,
    check_dtypes,
    check_last,
    check_places,
    flag,
    have,
    or_else,
    show,
)
from flashmoe_cupy.plan.options import integer, real, window

if TYPE_CHECKING:
    from flashmoe_cupy.arrays import View


def check_heads(why: list[str], heads_q: int, heads_k: int, heads_v: int, dim: int, dim_k: int, dim_v: int) -> None:
    """Numbers of heads of q, k and v, and their widths."""
    if heads_v != heads_k:
        why.append(f"k and v differ in heads: k has {heads_k}, v has {heads_v}")
    if heads_q % heads_k if heads_k else heads_q:
        why.append(f"q has {heads_q} heads, which is not a multiple of the {heads_k} heads of k")
    if dim_k != dim:
        why.append(f"q and k differ in head_dim: q has {dim}, k has {dim_k}")
    for name, n, limit in (("head_dim", dim, MAX_HEAD_DIM), ("head_dim_v", dim_v, MAX_HEAD_DIM_V)):
        if n % 8 or not 8 <= n <= limit:
            why.append(f"{name} is {n}; it must be a multiple of 8 from 8 to {limit}{pad(name, n, limit)}")
    if heads_q > INT_MAX or heads_k > INT_MAX:
        why.append("the number of heads is larger than 2**31 - 1")


def other_layout(
    why: Sequence[str], order: str, q: tuple[int, ...], k: tuple[int, ...], v: tuple[int, ...]
) -> str:
    """A question, where heads or lengths do not fit and would in the other layout, with more keys than heads."""
    heads, length = (1, 2) if order == "bshd" else (2, 1)
    fits = k[heads] == v[heads] > 0 and q[heads] % k[heads] == 0 and k[length] == v[length]
    if not fits or k[length] <= k[heads] or not any("heads" in reason or "sequence length" in reason for reason in why):
        return ""
    return f"did you mean layout='{'bhsd' if order == 'bshd' else 'bshd'}'?"


def pad(name: str, n: int, limit: int) -> str:
    """How to repair a head dimension; empty when padding does not help."""
    if not 0 < n < limit:
        return ""
    if name == "head_dim":
        return f" (pad q and k with zeros to {-(-n // 8) * 8} and give softmax_scale={n} ** -0.5)"
    return f" (pad v with zeros to {-(-n // 8) * 8} and cut the result)"


def check_arrays(why: list[str], q: View, k: View, v: View, others: Sequence[tuple[str, View]]) -> None:
    """dtype of q, k, v; stride of the last dimension; one library and one device for all."""
    main = (("q", q), ("k", k), ("v", v))
    check_dtypes(why, main)
    if q.strides[-1:] != (1,) or k.strides[-1:] != (1,) or v.strides[-1:] != (1,):
        for name, x in main:
            check_last(why, name, x)
    check_places(why, (*main, *others))


def check_alibi(why: list[str], x: View, batch: int, heads: int, known: bool) -> tuple[int, int]:
    """(alibi, alibi_stride_b) of AttentionProblem: 1 for slopes (heads_q,), 2 for (batch, heads_q)."""
    if x.dtype is not FP32:
        why.append(f"alibi_slopes has dtype {x.dtype}, which must be float32; {cast('alibi_slopes', x)}")
    rank = len(x.shape)
    if rank not in (1, 2) or (known and x.shape != ((heads,) if rank == 1 else (batch, heads))):
        want = f"({heads},) or ({batch}, {heads})" if known else "(heads_q,) or (batch, heads_q)"
        why.append(f"alibi_slopes must have shape {want}, but has {x.shape}")
    check_last(why, "alibi_slopes", x)
    return (2, x.strides[0]) if rank == 2 else (1, 0)


def check_sinks(why: list[str], x: View, dtype: DType, heads: int, known: bool) -> None:
    """known: `heads` is the number of query heads."""
    if x.dtype is not FP32 and x.dtype is not dtype:
        why.append(f"sinks has dtype {x.dtype}, which must be float32{or_else(dtype, 'q')}; {cast('sinks', x)}")
    if len(x.shape) != 1 or (known and x.shape[0] != heads):
        want = f"({heads},)" if known else "(heads_q,)"
        why.append(f"sinks must have shape {want}, but has {x.shape}")
    check_last(why, "sinks", x)


def check_bias(why: list[str], x: View, dtype: DType, full: tuple[int, ...] | None) -> tuple[int, int, int, int]:
    """The four strides of bias after broadcasting, in elements."""
    if x.dtype is not dtype and x.dtype is not FP32 and x.dtype is not BOOL:
        must = f"bool, float32{third}" if (third := or_else(dtype, "q")) else "bool or float32"
        why.append(f"bias has dtype {x.dtype}, which must be {must}; {cast_bias(x)}")
    rank = len(x.shape)
    wrong = not 2 <= rank <= 4
    if not wrong and full is not None:
        wrong = any(n not in (1, m) for n, m in zip(x.shape, full[-rank:], strict=True))
    if wrong:
        want = str(full) if full is not None else "(batch, heads_q, seqlen_q, seqlen_k)"
        repair = "; for one number per key give bias[None]" if rank == 1 else ""
        if full is not None and x.shape == (full[0], full[3]):
            repair = "; for one per key of each batch entry give bias[:, None, None, :]"
        elif full is not None and x.shape == (full[0], full[2], full[3]):
            repair = "; for the same in all heads give bias[:, None]"
        why.append(f"bias must have 2 to 4 dimensions and broadcast to {want}, but has shape {x.shape}{repair}")
        return 0, 0, 0, 0
    t = [0 if n == 1 else stride for n, stride in zip(x.shape, x.strides, strict=True)]
    t[:0] = [0] * (4 - rank)
    return t[0], t[1], t[2], t[3]


def check_offsets(why: list[str], cu_q: View, cu_k: View) -> int:
    """The batch size, or -1 when the offsets do not tell it."""
    if cu_q.shape != cu_k.shape or len(cu_q.shape) != 1 or cu_q.shape[0] < 1:
        have = f"{cu_q.shape} and {cu_k.shape}"
        why.append(f"cu_seqlens_q and cu_seqlens_k must both have shape (batch + 1,), but have {have}")
        batch = -1
    else:
        batch = cu_q.shape[0] - 1
    for name, x in (("cu_seqlens_q", cu_q), ("cu_seqlens_k", cu_k)):
        if x.dtype is not INT32:
            why.append(f"{name} has dtype {x.dtype}, which must be int32; {cast(name, x, 'int32')}")
        check_last(why, name, x)
    return batch


def check_lengths(why: list[str], named: Sequence[tuple[str, View]], batch: int) -> None:
    """Arrays with one int32 for each batch entry or sequence. batch: -1 where it is not known."""
    for name, x in named:
        if x.dtype is not INT32:
            why.append(f"{name} has dtype {x.dtype}, which must be int32; {cast(name, x, 'int32')}")
        if len(x.shape) != 1 or batch not in (-1, x.shape[0]):
            want = f"({batch},)" if batch >= 0 else "(batch,)"
            why.append(f"{name} must have shape {want}, but has {x.shape}")
        check_last(why, name, x)


def longest(why: list[str], name: str, value: object) -> int:
    """max_seqlen as int."""
    n = integer(value)
    if n is None or not 0 <= n <= INT_MAX:
        why.append(f"{name} must be an int from 0 to 2**31 - 1 on the host, but is {show(value)}")
        return 0
    return n


def check_scalars(
    why: list[str], causal: object, window_size: object, softmax_scale: object, softcap: object, head_dim: int
) -> tuple[bool, int, int, float, float]:
    """(causal, window_left, window_right folded with causal, softmax_scale, softcap)."""
    is_causal = flag(why, "causal", causal)
    left, right = window(window_size) or (-2, -2)
    if not (-1 <= left <= INT_MAX and -1 <= right <= INT_MAX):
        why.append(f"window_size must be two ints (left, right), -1 (unlimited) or more, but is {show(window_size)}")
        left = right = -1
    scale: float | None = head_dim**-0.5 if head_dim else 1.0
    if softmax_scale is not None:
        scale = real(softmax_scale)
        if scale is None or not -FLOAT_MAX <= scale <= FLOAT_MAX:
            why.append(f"softmax_scale must be None or a number finite in float32, but is {have(softmax_scale)}")
    cap = real(softcap)
    if cap is None or not (cap == 0.0 or FLOAT_TINY <= cap <= FLOAT_MAX):
        why.append(f"softcap must be 0 (off) or a positive number, normal in float32, but is {have(softcap)}")
    return is_causal, left, 0 if is_causal else right, scale or 0.0, cap or 0.0
