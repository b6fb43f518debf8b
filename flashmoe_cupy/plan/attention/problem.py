"""Problems: all that decides how an attention runs, except the pointers. Validation lives here, without a GPU.

Each check that fails adds one reason; text is made only then, because these functions run for every new shape.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

from flashmoe_cupy.dtypes import BOOL, FP32, INT32, DType
from flashmoe_cupy.errors import UnsupportedProblem
from flashmoe_cupy.plan.checks import (
    FLOAT_MAX,
    FLOAT_TINY,
    INT_MAX,
    SHORT,
    Option,
    asked,
    cast,
    cast_bias,
    check_dtypes,
    check_last,
    check_out,
    check_places,
    check_ranks,
    flag,
    have,
    or_else,
    show,
)
from flashmoe_cupy.plan.hints import ATTENTION, MAX_HEAD_DIM, MAX_HEAD_DIM_V, hint
from flashmoe_cupy.plan.options import integer, real, text, window

if TYPE_CHECKING:
    from flashmoe_cupy.arrays import View


class AttentionProblem(NamedTuple):
    """Everything but the pointers. Strides count elements; sizes are Python ints; hashable.

    varlen: seqlen_q and seqlen_k are the maxima, batch strides are 0, rows are counted by total_q and total_k.
    """

    dtype: DType
    batch: int
    heads_q: int
    heads_k: int
    seqlen_q: int
    seqlen_k: int
    head_dim: int
    head_dim_v: int
    q_strides: tuple[int, int, int]  # (batch, seq, head), like the next three
    k_strides: tuple[int, int, int]
    v_strides: tuple[int, int, int]
    out_strides: tuple[int, int, int]
    lse_strides: tuple[int, int]  # (batch, head)
    causal: bool
    window_left: int  # -1 is unlimited; so is window_right, which is 0 when causal
    window_right: int
    softmax_scale: float
    softcap: float  # 0 is off
    alibi: int  # 0 none, 1 one slope per head, 2 one per batch and head
    alibi_stride_b: int
    bias_dtype: DType | None
    bias_strides: tuple[int, int, int, int]  # (batch, head, query, key), 0 where it is broadcast
    sinks_dtype: DType | None
    varlen: bool
    total_q: int
    total_k: int
    has_seqused_q: bool
    has_seqused_k: bool

    @property
    def rows_aligned(self) -> bool:
        """Whether strides keep every row of q, k, v, out at a multiple of 16 bytes, and tiles within 4 GiB."""
        size = self.dtype.itemsize
        queries = self.batch, self.total_q or self.seqlen_q, self.heads_q
        keys = self.batch, self.total_k or self.seqlen_k, self.heads_k
        for shape, strides in (
            (queries, self.q_strides), (keys, self.k_strides), (keys, self.v_strides), (queries, self.out_strides)
        ):  # fmt: skip
            if any(n > 1 and stride * size % 16 for n, stride in zip(shape, strides, strict=True)):
                return False
            if shape[1] > 1 and not 0 <= strides[1] * size * 256 < 2**32:
                return False
        return True

    def describe(self) -> str:
        """One line, for example "attention bf16 b2 q4096 k4096 h32/8 d128 causal"."""
        heads = f"h{self.heads_q}" + (f"/{self.heads_k}" if self.heads_k != self.heads_q else "")
        dims = f"d{self.head_dim}" + (f"/{self.head_dim_v}" if self.head_dim_v != self.head_dim else "")
        words = ["attention"]
        if self.varlen:
            words.append("varlen")
        words += [SHORT[self.dtype], f"b{self.batch}", f"q{self.seqlen_q}", f"k{self.seqlen_k}", heads, dims]
        if self.varlen:
            words.append(f"total{self.total_q}/{self.total_k}")
        if self.causal:
            words.append("causal")
        if self.window_left >= 0 or (self.window_right >= 0 and not self.causal):
            words.append(f"window({self.window_left},{self.window_right})")
        if self.softcap:
            words.append(f"softcap{self.softcap:g}")
        if self.alibi:
            words.append("alibi" if self.alibi == 1 else "alibi-per-batch")
        if self.bias_dtype is not None:
            words.append(f"bias-{self.bias_dtype.name}")
        if self.sinks_dtype is not None:
            words.append("sinks")
        if self.has_seqused_q or self.has_seqused_k:
            words.append("seqused")
        return " ".join(words)


def attention_problem(
    q: View,
    k: View,
    v: View,
    *,
    causal: object = False,
    window_size: object = (-1, -1),
    softmax_scale: object = None,
    softcap: object = 0.0,
    sinks: View | None = None,
    alibi_slopes: View | None = None,
    bias: View | None = None,
    layout: object = "bshd",
    return_lse: object = False,
    out: View | None = None,
) -> AttentionProblem:
    """Validate the arguments of `flash_attention`. Raises one UnsupportedProblem that holds every reason.

    q, k, v, out: rank 4 in the order of `layout`. bias: broadcastable to (batch, heads_q, seqlen_q, seqlen_k).
    Without `out` the strides are those of a fresh contiguous array in the same layout.
    """
    why: list[str] = []
    order = text(layout)
    s, h = (2, 1) if order == "bhsd" else (1, 2)
    if h == 2 and order != "bshd":
        why.append(f"layout is {show(layout)}; it must be 'bshd' or 'bhsd'")
    qs, ks, vs = q.shape, k.shape, v.shape
    known = len(qs) == len(ks) == len(vs) == 4
    batch = heads_q = heads_k = seqlen_q = seqlen_k = head_dim = head_dim_v = 0
    if known:
        batch, seqlen_q, heads_q, head_dim = qs[0], qs[s], qs[h], qs[3]
        seqlen_k, heads_k, head_dim_v = ks[s], ks[h], vs[3]
        if ks[0] != batch or vs[0] != batch:
            why.append(f"batch sizes differ: q has {batch}, k has {ks[0]}, v has {vs[0]}")
        if vs[s] != seqlen_k:
            why.append(f"k and v differ in sequence length: k has {seqlen_k}, v has {vs[s]}")
        _check_heads(why, heads_q, heads_k, vs[h], head_dim, ks[3], head_dim_v)
        if seqlen_q > INT_MAX or seqlen_k > INT_MAX or batch > INT_MAX:
            why.append("a dimension is larger than 2**31 - 1")
    else:
        check_ranks(why, 4, (("q", q), ("k", k), ("v", v)))
    optional = (("sinks", sinks), ("alibi_slopes", alibi_slopes), ("bias", bias))
    others = [(name, x) for name, x in optional if x is not None]
    if out is not None:
        others.append(("out", out))
        qt = out.strides
        want = (batch, seqlen_q, heads_q, head_dim_v) if s == 1 else (batch, heads_q, seqlen_q, head_dim_v)
        _check_out(why, out, q, k, v, want if known else None)
        out_strides = (qt[0], qt[s], qt[h]) if len(qt) == 4 else (0, 0, 0)
    else:
        d, row, column = head_dim_v, heads_q * head_dim_v, seqlen_q * head_dim_v
        out_strides = (seqlen_q * row, row, d) if s == 1 else (seqlen_q * row, d, column)
    _check_arrays(why, q, k, v, others)
    alibi = alibi_stride_b = 0
    if alibi_slopes is not None:
        alibi, alibi_stride_b = _check_alibi(why, alibi_slopes, batch, heads_q, known)
    if sinks is not None:
        _check_sinks(why, sinks, q.dtype, heads_q, known)
    bias_strides = (0, 0, 0, 0)
    if bias is not None:
        bias_strides = _check_bias(why, bias, q.dtype, (batch, heads_q, seqlen_q, seqlen_k) if known else None)
    is_causal, left, right, scale, cap = _check_scalars(why, causal, window_size, softmax_scale, softcap, head_dim)
    flag(why, "return_lse", return_lse)
    if why:
        named = (("q", q), ("k", k), ("v", v), *others)
        options = _options(causal, window_size, softmax_scale, softcap, return_lse)
        call = asked("flash_attention", named, (*options, ("layout", layout, "bshd")))
        said = [hint(why, ATTENTION["bhsd" if s == 2 else "bshd"])]
        if known and order in ("bshd", "bhsd"):
            said.append(_other_layout(why, order, qs, ks, vs))
        raise UnsupportedProblem(call, why, "; ".join(filter(None, said)))
    qt, kt, vt = q.strides, k.strides, v.strides
    return AttentionProblem(
        q.dtype, batch, heads_q, heads_k, seqlen_q, seqlen_k, head_dim, head_dim_v,
        (qt[0], qt[s], qt[h]), (kt[0], kt[s], kt[h]), (vt[0], vt[s], vt[h]), out_strides,
        (heads_q * seqlen_q, seqlen_q), is_causal, left, right, scale, cap, alibi, alibi_stride_b,
        None if bias is None else bias.dtype, bias_strides, None if sinks is None else sinks.dtype,
        False, batch * seqlen_q, batch * seqlen_k, False, False,
    )  # fmt: skip


def varlen_problem(
    q: View,
    k: View,
    v: View,
    *,
    cu_seqlens_q: View,
    cu_seqlens_k: View,
    max_seqlen_q: object,
    max_seqlen_k: object,
    seqused_q: View | None = None,
    seqused_k: View | None = None,
    causal: object = False,
    window_size: object = (-1, -1),
    softmax_scale: object = None,
    softcap: object = 0.0,
    sinks: View | None = None,
    alibi_slopes: View | None = None,
    return_lse: object = False,
    out: View | None = None,
) -> AttentionProblem:
    """Validate the arguments of `flash_attention_varlen`. Raises one UnsupportedProblem that holds every reason.

    q, k, v, out: packed (total, heads, dim). cu_seqlens_*: (batch + 1,) int32. seqused_*: (batch,) int32.
    What the offsets hold stays on the device and is not looked at.
    """
    why: list[str] = []
    qs, ks, vs = q.shape, k.shape, v.shape
    known = len(qs) == len(ks) == len(vs) == 3
    total_q = total_k = heads_q = heads_k = head_dim = head_dim_v = 0
    if known:
        total_q, heads_q, head_dim = qs
        total_k, heads_k, head_dim_v = ks[0], ks[1], vs[2]
        if vs[0] != total_k:
            why.append(f"k and v differ in their number of rows: k has {total_k}, v has {vs[0]}")
        _check_heads(why, heads_q, heads_k, vs[1], head_dim, ks[2], head_dim_v)
        if total_q > INT_MAX or total_k > INT_MAX:
            why.append("a dimension is larger than 2**31 - 1")
    else:
        check_ranks(why, 3, (("q", q), ("k", k), ("v", v)))
    batch = _check_lengths(why, cu_seqlens_q, cu_seqlens_k, seqused_q, seqused_k)
    optional = (("seqused_q", seqused_q), ("seqused_k", seqused_k), ("sinks", sinks), ("alibi_slopes", alibi_slopes))
    others = [("cu_seqlens_q", cu_seqlens_q), ("cu_seqlens_k", cu_seqlens_k)]
    others += [(name, x) for name, x in optional if x is not None]
    if out is not None:
        others.append(("out", out))
        _check_out(why, out, q, k, v, (total_q, heads_q, head_dim_v) if known else None)
        out_strides = (0, out.strides[0], out.strides[1]) if len(out.shape) == 3 else (0, 0, 0)
    else:
        out_strides = (0, heads_q * head_dim_v, head_dim_v)
    _check_arrays(why, q, k, v, others)
    alibi = alibi_stride_b = 0
    if alibi_slopes is not None:
        alibi, alibi_stride_b = _check_alibi(why, alibi_slopes, max(batch, 0), heads_q, known and batch >= 0)
    if sinks is not None:
        _check_sinks(why, sinks, q.dtype, heads_q, known)
    longest_q = _length(why, "max_seqlen_q", max_seqlen_q)
    longest_k = _length(why, "max_seqlen_k", max_seqlen_k)
    is_causal, left, right, scale, cap = _check_scalars(why, causal, window_size, softmax_scale, softcap, head_dim)
    flag(why, "return_lse", return_lse)
    if why:
        named = (("q", q), ("k", k), ("v", v), *others)
        call = asked_varlen(
            named, (max_seqlen_q, max_seqlen_k), causal, window_size, softmax_scale, softcap, return_lse
        )
        raise UnsupportedProblem(call, why, hint(why, ATTENTION["packed"]))
    qt, kt, vt = q.strides, k.strides, v.strides
    return AttentionProblem(
        q.dtype, batch, heads_q, heads_k, longest_q, longest_k, head_dim, head_dim_v,
        (0, qt[0], qt[1]), (0, kt[0], kt[1]), (0, vt[0], vt[1]), out_strides,
        (0, total_q), is_causal, left, right, scale, cap, alibi, alibi_stride_b,
        None, (0, 0, 0, 0), None if sinks is None else sinks.dtype,
        True, total_q, total_k, seqused_q is not None, seqused_k is not None,
    )  # fmt: skip


def _check_heads(why: list[str], heads_q: int, heads_k: int, heads_v: int, dim: int, dim_k: int, dim_v: int) -> None:
    if heads_v != heads_k:
        why.append(f"k and v differ in heads: k has {heads_k}, v has {heads_v}")
    if heads_q % heads_k if heads_k else heads_q:
        why.append(f"q has {heads_q} heads, which is not a multiple of the {heads_k} heads of k")
    if dim_k != dim:
        why.append(f"q and k differ in head_dim: q has {dim}, k has {dim_k}")
    for name, n, limit in (("head_dim", dim, MAX_HEAD_DIM), ("head_dim_v", dim_v, MAX_HEAD_DIM_V)):
        if n % 8 or not 8 <= n <= limit:
            why.append(f"{name} is {n}; it must be a multiple of 8 from 8 to {limit}{_pad(name, n, limit)}")
    if heads_q > INT_MAX or heads_k > INT_MAX:
        why.append("the number of heads is larger than 2**31 - 1")


def _other_layout(
    why: Sequence[str], order: str, q: tuple[int, ...], k: tuple[int, ...], v: tuple[int, ...]
) -> str:
    """A question, where heads or lengths do not fit and would in the other layout, with more keys than heads."""
    heads, length = (1, 2) if order == "bshd" else (2, 1)
    fits = k[heads] == v[heads] > 0 and q[heads] % k[heads] == 0 and k[length] == v[length]
    if not fits or k[length] <= k[heads] or not any("heads" in reason or "sequence length" in reason for reason in why):
        return ""
    return f"did you mean layout='{'bhsd' if order == 'bshd' else 'bshd'}'?"


def _pad(name: str, n: int, limit: int) -> str:
    """How to repair a head dimension; empty when padding does not help."""
    if not 0 < n < limit:
        return ""
    if name == "head_dim":
        return f" (pad q and k with zeros to {-(-n // 8) * 8} and give softmax_scale={n} ** -0.5)"
    return f" (pad v with zeros to {-(-n // 8) * 8} and cut the result)"


def _check_arrays(why: list[str], q: View, k: View, v: View, others: Sequence[tuple[str, View]]) -> None:
    """dtype of q, k, v; stride of the last dimension; one library and one device for all."""
    main = (("q", q), ("k", k), ("v", v))
    check_dtypes(why, main)
    if q.strides[-1:] != (1,) or k.strides[-1:] != (1,) or v.strides[-1:] != (1,):
        for name, x in main:
            check_last(why, name, x)
    check_places(why, (*main, *others))


def _check_out(why: list[str], out: View, q: View, k: View, v: View, want: tuple[int, ...] | None) -> None:
    check_out(why, out, "q", q.dtype, want)
    if 0 in out.shape:
        return
    for name, x in (("q", q), ("k", k), ("v", v)):
        if out.ptr == x.ptr and out.device == x.device and 0 not in x.shape:
            why.append(f"out starts at the same address as {name}; other rows would read it after it was written")


def _check_alibi(why: list[str], x: View, batch: int, heads: int, known: bool) -> tuple[int, int]:
    """(kind, batch stride): 1 for (heads_q,), 2 for (batch, heads_q)."""
    if x.dtype is not FP32:
        why.append(f"alibi_slopes has dtype {x.dtype}, which must be float32; {cast('alibi_slopes', x)}")
    rank = len(x.shape)
    if rank not in (1, 2) or (known and x.shape != ((heads,) if rank == 1 else (batch, heads))):
        want = f"({heads},) or ({batch}, {heads})" if known else "(heads_q,) or (batch, heads_q)"
        why.append(f"alibi_slopes must have shape {want}, but has {x.shape}")
    check_last(why, "alibi_slopes", x)
    return (2, x.strides[0]) if rank == 2 else (1, 0)


def _check_sinks(why: list[str], x: View, dtype: DType, heads: int, known: bool) -> None:
    if x.dtype is not FP32 and x.dtype is not dtype:
        why.append(f"sinks has dtype {x.dtype}, which must be float32{or_else(dtype, 'q')}; {cast('sinks', x)}")
    if len(x.shape) != 1 or (known and x.shape[0] != heads):
        want = f"({heads},)" if known else "(heads_q,)"
        why.append(f"sinks must have shape {want}, but has {x.shape}")
    check_last(why, "sinks", x)


def _check_bias(why: list[str], x: View, dtype: DType, full: tuple[int, ...] | None) -> tuple[int, int, int, int]:
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


def _check_lengths(why: list[str], cu_q: View, cu_k: View, used_q: View | None, used_k: View | None) -> int:
    """The batch size, or -1 when the offsets do not tell it."""
    if cu_q.shape != cu_k.shape or len(cu_q.shape) != 1 or cu_q.shape[0] < 1:
        have = f"{cu_q.shape} and {cu_k.shape}"
        why.append(f"cu_seqlens_q and cu_seqlens_k must both have shape (batch + 1,), but have {have}")
        batch = -1
    else:
        batch = cu_q.shape[0] - 1
    for name, x in (("cu_seqlens_q", cu_q), ("cu_seqlens_k", cu_k), ("seqused_q", used_q), ("seqused_k", used_k)):
        if x is None:
            continue
        if x.dtype is not INT32:
            why.append(f"{name} has dtype {x.dtype}, which must be int32; {cast(name, x, 'int32')}")
        if name[0] == "s" and (len(x.shape) != 1 or batch not in (-1, x.shape[0])):
            want = f"({batch},)" if batch >= 0 else "(batch,)"
            why.append(f"{name} must have shape {want}, but has {x.shape}")
        check_last(why, name, x)
    return batch


def _length(why: list[str], name: str, value: object) -> int:
    n = integer(value)
    if n is None or not 0 <= n <= INT_MAX:
        why.append(f"{name} must be an int from 0 to 2**31 - 1 on the host, but is {show(value)}")
        return 0
    return n


def _check_scalars(
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


def asked_varlen(
    named: Sequence[tuple[str, View]], longest: tuple[object, object], causal: object, window_size: object,
    softmax_scale: object, softcap: object, return_lse: object,
) -> str:  # fmt: skip
    """A call of `flash_attention_varlen` in one line. longest: max_seqlen_q and max_seqlen_k."""
    options = _options(causal, window_size, softmax_scale, softcap, return_lse)
    lengths = (("max_seqlen_q", longest[0], None), ("max_seqlen_k", longest[1], None))
    return asked("flash_attention_varlen", named, (*lengths, *options))


def _options(
    causal: object, window_size: object, softmax_scale: object, softcap: object, return_lse: object
) -> tuple[Option, ...]:
    return (
        ("causal", causal, False), ("window_size", window_size, (-1, -1)), ("softmax_scale", softmax_scale, None),
        ("softcap", softcap, 0.0), ("return_lse", return_lse, False),
    )  # fmt: skip
