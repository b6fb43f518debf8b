"""Problems: all that decides how an attention runs, except the pointers. No GPU, no CuPy.

Each check that fails adds one reason; text is made only then, because these functions run for every new shape.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

from flashmoe_cupy.dtypes import DType
from flashmoe_cupy.errors import UnsupportedProblem
from flashmoe_cupy.plan.attention.checks import (
    check_alibi,
    check_arrays,
    check_bias,
    check_heads,
    check_lengths,
    check_offsets,
    check_scalars,
    check_sinks,
    longest,
    other_layout,
)
from flashmoe_cupy.plan.checks import INT_MAX, SHORT, Option, asked, check_out, check_ranks, flag, show
from flashmoe_cupy.plan.options import text

if TYPE_CHECKING:
    from flashmoe_cupy.arrays import View


PADDING = "seqused_q", "seqused_k", "leftpad_q", "leftpad_k"  # which rows of a batch entry count
_MAX_TILE_ROWS = 256  # of the tiles of all kernels (plan/attention/tiles.py)


class AttentionProblem(NamedTuple):
    """Everything but the pointers. Strides count elements. Where sequences are packed, strides of the batch are 0."""

    dtype: DType  # of q, k, v and out
    batch: int  # entries, or packed sequences
    heads_q: int
    heads_k: int  # of k and v; each serves heads_q / heads_k query heads
    seqlen_q: int  # queries of an entry, or of the longest packed sequence
    seqlen_k: int
    head_dim: int  # of q and k
    head_dim_v: int  # of v and out
    q_strides: tuple[int, int, int]  # from batch entry to batch entry, from row to row, from head to head
    k_strides: tuple[int, int, int]
    v_strides: tuple[int, int, int]
    out_strides: tuple[int, int, int]
    lse_strides: tuple[int, int]  # from batch entry to batch entry, from head to head
    causal: bool
    window_left: int  # keys that a query sees before its own place; -1: all
    window_right: int  # and behind it; -1: all, 0 when causal
    softmax_scale: float
    softcap: float  # 0: none
    alibi: int  # slopes: 0: none, 1: one of each head, 2: one of each batch entry and head
    alibi_stride_b: int
    bias_dtype: DType | None  # None: there is no bias
    bias_strides: tuple[int, int, int, int]  # by batch entry, head, query, key; 0 along axes that it is spread over
    sinks_dtype: DType | None  # None: there are no sinks
    varlen: bool  # sequences are packed
    total_q: int  # rows of all entries or sequences
    total_k: int
    lengths: tuple[str, ...] = ()  # the arrays that say which rows of an entry or sequence count: seqused_q and so on
    heads_first: bool = False  # arrays come as (batch, heads, seq, dim); strides are in the order above all the same
    clear_rest: int = 0  # rows that no sequence owns become, 1: in out 0, 2: in lse -inf, 3: both

    @property
    def empty(self) -> bool:
        """Whether there is no query to compute."""
        return 0 in (self.batch, self.seqlen_q, self.heads_q, self.head_dim_v) or (self.varlen and not self.total_q)

    @property
    def even(self) -> bool:
        """Whether every row of every entry counts, so that the host knows all lengths."""
        return not self.varlen and not self.lengths

    @property
    def rows_aligned(self) -> bool:
        """Whether strides keep every row of q, k, v, out at a multiple of 16 bytes, and each tile within 4 GiB."""
        size = self.dtype.itemsize
        queries = self.batch, self.total_q or self.seqlen_q, self.heads_q
        keys = self.batch, self.total_k or self.seqlen_k, self.heads_k
        for shape, strides in (
            (queries, self.q_strides), (keys, self.k_strides), (keys, self.v_strides), (queries, self.out_strides)
        ):  # fmt: skip
            if any(n > 1 and stride * size % 16 for n, stride in zip(shape, strides, strict=True)):
                return False
            if shape[1] > 1 and not 0 <= strides[1] * size * _MAX_TILE_ROWS < 2**32:
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
        words += [kind for kind in ("seqused", "leftpad") if any(name.startswith(kind) for name in self.lengths)]
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
    seqused_q: View | None = None,
    seqused_k: View | None = None,
    leftpad_q: View | None = None,
    leftpad_k: View | None = None,
    layout: object = "bshd",
    return_lse: object = False,
    out: View | None = None,
) -> AttentionProblem:
    """Validate the arguments of `flash_attention`. Raises one UnsupportedProblem that holds every reason.

    q, k, v, out: rank 4 in the order of `layout`. bias: broadcastable to (batch, heads_q, seqlen_q, seqlen_k).
    seqused_*, leftpad_*: (batch,) int32; what they hold stays on the device and is not looked at.
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
        check_heads(why, heads_q, heads_k, vs[h], head_dim, ks[3], head_dim_v)
        if seqlen_q > INT_MAX or seqlen_k > INT_MAX or batch > INT_MAX:
            why.append("a dimension is larger than 2**31 - 1")
    else:
        check_ranks(why, 4, (("q", q), ("k", k), ("v", v)))
    optional = (("sinks", sinks), ("alibi_slopes", alibi_slopes), ("bias", bias))
    others = [(name, x) for name, x in optional if x is not None]
    padding: list[tuple[str, View]] = []
    if seqused_q is not None or seqused_k is not None or leftpad_q is not None or leftpad_k is not None:
        given = zip(PADDING, (seqused_q, seqused_k, leftpad_q, leftpad_k), strict=True)
        padding = [(name, x) for name, x in given if x is not None]
        check_lengths(why, padding, batch if known else -1)
        others += padding
    if out is not None:
        others.append(("out", out))
        qt = out.strides
        want = (batch, seqlen_q, heads_q, head_dim_v) if s == 1 else (batch, heads_q, seqlen_q, head_dim_v)
        check_out(why, out, "q", q.dtype, want if known else None)
        out_strides = (qt[0], qt[s], qt[h]) if len(qt) == 4 else (0, 0, 0)
    else:
        d, row, column = head_dim_v, heads_q * head_dim_v, seqlen_q * head_dim_v
        out_strides = (seqlen_q * row, row, d) if s == 1 else (seqlen_q * row, d, column)
    check_arrays(why, q, k, v, others)
    alibi = alibi_stride_b = 0
    if alibi_slopes is not None:
        alibi, alibi_stride_b = check_alibi(why, alibi_slopes, batch, heads_q, known)
    if sinks is not None:
        check_sinks(why, sinks, q.dtype, heads_q, known)
    bias_strides = (0, 0, 0, 0)
    if bias is not None:
        bias_strides = check_bias(why, bias, q.dtype, (batch, heads_q, seqlen_q, seqlen_k) if known else None)
    is_causal, left, right, scale, cap = check_scalars(why, causal, window_size, softmax_scale, softcap, head_dim)
    flag(why, "return_lse", return_lse)
    if why:
        from flashmoe_cupy.plan.hints import ATTENTION, hint  # words of errors alone

        named = (("q", q), ("k", k), ("v", v), *others)
        options = _options(causal, window_size, softmax_scale, softcap, return_lse)
        call = asked("flash_attention", named, (*options, ("layout", layout, "bshd")))
        said = [hint(why, ATTENTION["bhsd" if s == 2 else "bshd"])]
        if known and order in ("bshd", "bhsd"):
            said.append(other_layout(why, order, qs, ks, vs))
        raise UnsupportedProblem(call, why, "; ".join(filter(None, said)))
    qt, kt, vt = q.strides, k.strides, v.strides
    return AttentionProblem(
        dtype=q.dtype, batch=batch, heads_q=heads_q, heads_k=heads_k, seqlen_q=seqlen_q, seqlen_k=seqlen_k,
        head_dim=head_dim, head_dim_v=head_dim_v, q_strides=(qt[0], qt[s], qt[h]), k_strides=(kt[0], kt[s], kt[h]),
        v_strides=(vt[0], vt[s], vt[h]), out_strides=out_strides, lse_strides=(heads_q * seqlen_q, seqlen_q),
        causal=is_causal, window_left=left, window_right=right, softmax_scale=scale, softcap=cap, alibi=alibi,
        alibi_stride_b=alibi_stride_b, bias_dtype=None if bias is None else bias.dtype, bias_strides=bias_strides,
        sinks_dtype=None if sinks is None else sinks.dtype, varlen=False, total_q=batch * seqlen_q,
        total_k=batch * seqlen_k, lengths=tuple([name for name, _ in padding]), heads_first=s == 2,
        clear_rest=(out is None) + 2 * bool(return_lse) if seqused_q is not None or leftpad_q is not None else 0,
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
        check_heads(why, heads_q, heads_k, vs[1], head_dim, ks[2], head_dim_v)
        if total_q > INT_MAX or total_k > INT_MAX:
            why.append("a dimension is larger than 2**31 - 1")
    else:
        check_ranks(why, 3, (("q", q), ("k", k), ("v", v)))
    batch = check_offsets(why, cu_seqlens_q, cu_seqlens_k)
    used = [(name, x) for name, x in (("seqused_q", seqused_q), ("seqused_k", seqused_k)) if x is not None]
    check_lengths(why, used, batch)
    optional = ("sinks", sinks), ("alibi_slopes", alibi_slopes)
    others = [("cu_seqlens_q", cu_seqlens_q), ("cu_seqlens_k", cu_seqlens_k), *used]
    others += [(name, x) for name, x in optional if x is not None]
    if out is not None:
        others.append(("out", out))
        check_out(why, out, "q", q.dtype, (total_q, heads_q, head_dim_v) if known else None)
        out_strides = (0, out.strides[0], out.strides[1]) if len(out.shape) == 3 else (0, 0, 0)
    else:
        out_strides = (0, heads_q * head_dim_v, head_dim_v)
    check_arrays(why, q, k, v, others)
    alibi = alibi_stride_b = 0
    if alibi_slopes is not None:
        alibi, alibi_stride_b = check_alibi(why, alibi_slopes, max(batch, 0), heads_q, known and batch >= 0)
    if sinks is not None:
        check_sinks(why, sinks, q.dtype, heads_q, known)
    longest_q = longest(why, "max_seqlen_q", max_seqlen_q)
    longest_k = longest(why, "max_seqlen_k", max_seqlen_k)
    is_causal, left, right, scale, cap = check_scalars(why, causal, window_size, softmax_scale, softcap, head_dim)
    flag(why, "return_lse", return_lse)
    if why:
        from flashmoe_cupy.plan.hints import ATTENTION, hint  # words of errors alone

        named = (("q", q), ("k", k), ("v", v), *others)
        call = asked_varlen(
            named, (max_seqlen_q, max_seqlen_k), causal, window_size, softmax_scale, softcap, return_lse
        )
        raise UnsupportedProblem(call, why, hint(why, ATTENTION["packed"]))
    qt, kt, vt = q.strides, k.strides, v.strides
    return AttentionProblem(
        dtype=q.dtype, batch=batch, heads_q=heads_q, heads_k=heads_k, seqlen_q=longest_q, seqlen_k=longest_k,
        head_dim=head_dim, head_dim_v=head_dim_v, q_strides=(0, qt[0], qt[1]), k_strides=(0, kt[0], kt[1]),
        v_strides=(0, vt[0], vt[1]), out_strides=out_strides, lse_strides=(0, total_q), causal=is_causal,
        window_left=left, window_right=right, softmax_scale=scale, softcap=cap, alibi=alibi,
        alibi_stride_b=alibi_stride_b, bias_dtype=None, bias_strides=(0, 0, 0, 0),
        sinks_dtype=None if sinks is None else sinks.dtype, varlen=True, total_q=total_q, total_k=total_k,
        lengths=tuple([name for name, _ in used]),
        clear_rest=(out is None) + 2 * bool(return_lse),
    )  # fmt: skip


def asked_varlen(
    named: Sequence[tuple[str, View]], max_seqlens: tuple[object, object], causal: object, window_size: object,
    softmax_scale: object, softcap: object, return_lse: object,
) -> str:  # fmt: skip
    """A call of `flash_attention_varlen` in one line. max_seqlens: max_seqlen_q and max_seqlen_k."""
    options = _options(causal, window_size, softmax_scale, softcap, return_lse)
    lengths = (("max_seqlen_q", max_seqlens[0], None), ("max_seqlen_k", max_seqlens[1], None))
    return asked("flash_attention_varlen", named, (*lengths, *options))


def _options(
    causal: object, window_size: object, softmax_scale: object, softcap: object, return_lse: object
) -> tuple[Option, ...]:
    return (
        ("causal", causal, False), ("window_size", window_size, (-1, -1)), ("softmax_scale", softmax_scale, None),
        ("softcap", softcap, 0.0), ("return_lse", return_lse, False),
    )  # fmt: skip
