"""Attention on the CPU: online softmax over blocks of queries and keys, matrix products by BLAS in float32.

Source: FlashAttention-2 (Dao, arXiv 2307.08691), Algorithm 1. A tile takes some queries of some heads of some batch
entries, walks over the keys they see and keeps a running maximum m, sum l and output per row, so memory beyond the
arguments is a few MB whatever the lengths. The query heads of a group are stacked as rows of one matrix, so each key is
read once per group. Key blocks that causal or window rules hide from a whole tile are never touched. bfloat16 and
float16 become float32 block by block. Threads are those of the BLAS library.
"""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from flashmoe_cupy.cpu.convert import widened
from flashmoe_cupy.errors import UnsupportedProblem

if TYPE_CHECKING:
    from flashmoe_cupy.plan.problem import AttentionProblem

Array = NDArray[Any]
F32 = NDArray[np.float32]

_ROWS = 512  # query rows of a tile, all heads and batch entries together
_KEYS = 512  # keys of a block, more when a tile has few rows
_SCORES = _ROWS * _KEYS  # elements of a block of scores: 1 MB, which stays in a core's second-level cache
_VALUES = 1 << 20  # elements of a block of keys or values in float32: 4 MB
_FEW = 16  # up to so many rows, BLAS computes k @ q^T faster than q @ k^T
_NARROW = 64  # fewest queries of a tile that a narrow window may ask for


def attention(
    problem: AttentionProblem,
    q: Array,
    k: Array,
    v: Array,
    out: Array,
    lse: F32 | None,
    bias: Array | None = None,
    alibi_slopes: Array | None = None,
    sinks: Array | None = None,
    cu_seqlens_q: Array | None = None,
    cu_seqlens_k: Array | None = None,
    seqused_q: Array | None = None,
    seqused_k: Array | None = None,
) -> None:
    """Write the attention of a validated problem into out and, unless None, lse.

    q (batch, seqlen_q, heads_q, head_dim), k, v and out in the same axis order, or packed (total, heads, dim) when
    problem.varlen; bfloat16, float16 or float32 with any strides. lse (batch, heads_q, seqlen_q) or (heads_q, total_q),
    float32. bias broadcasts to (batch, heads_q, seqlen_q, seqlen_k). Rows with no visible key get 0 and -inf (the sink
    with sinks); rows outside the sequences are not written. Raises UnsupportedProblem for offsets that do not fit the
    arrays or the given maxima.
    """
    if problem.heads_q == 0:
        return
    slopes = sink = None
    if alibi_slopes is not None:
        slopes = np.broadcast_to(alibi_slopes.astype(np.float32), (problem.batch, problem.heads_q))
    if sinks is not None:
        sink = sinks.astype(np.float32)
    with np.errstate(all="ignore"):
        if not problem.varlen:
            _attend(_Sequences(problem, q, k, v, out, lse, _four(bias), slopes, sink))
            return
        spans_q = _spans(problem, "q", cu_seqlens_q, seqused_q)
        spans_k = _spans(problem, "k", cu_seqlens_k, seqused_k)
        for b, (rows, keys) in enumerate(zip(spans_q, spans_k, strict=True)):
            own = (q[None, rows], k[None, keys], v[None, keys], out[None, rows])
            own_lse = None if lse is None else lse[None, :, rows]
            own_slopes = None if slopes is None else slopes[b : b + 1]
            _attend(_Sequences(problem, *own, own_lse, None, own_slopes, sink))


def _four(bias: Array | None) -> Array | None:
    """bias with all four axes; those it is spread over have size 1."""
    return None if bias is None else bias.reshape((1,) * (4 - bias.ndim) + bias.shape)


def _spans(problem: AttentionProblem, side: str, cu_seqlens: Array | None, seqused: Array | None) -> list[slice]:
    """The used rows of each sequence. The offsets are in host memory here, so they are checked."""
    total, longest = (problem.total_q, problem.seqlen_q) if side == "q" else (problem.total_k, problem.seqlen_k)
    ends: list[int] = [] if cu_seqlens is None else cu_seqlens.tolist()
    lengths = [b - a for a, b in itertools.pairwise(ends)]
    used: list[int] = lengths if seqused is None else seqused.tolist()
    reasons = []
    if not ends or ends[0] < 0 or ends[-1] > total or min(lengths, default=0) < 0:
        reasons.append(f"cu_seqlens_{side} must not fall and must lie between 0 and {total}, the rows of {side}")
    if any(not 0 <= n <= m for n, m in zip(used, lengths, strict=True)):
        reasons.append(f"seqused_{side} must lie between 0 and the length of each sequence")
    if max(used, default=0) > longest:
        reasons.append(f"max_seqlen_{side} is {longest}, but the longest sequence has {max(used)} rows")
    if reasons:
        raise UnsupportedProblem(problem.describe(), reasons, "cu_seqlens are the running sums of the lengths, from 0")
    return [slice(start, start + n) for start, n in zip(ends, used, strict=False)]


# ------------------------------------------------------------------------------------------------------------- tiling


class _Sequences(NamedTuple):
    """Sequences of equal lengths: q, k, v, out (batch, seqlen, heads, dim), lse (batch, heads, seqlen)."""

    problem: AttentionProblem
    q: Array
    k: Array
    v: Array
    out: Array
    lse: F32 | None
    bias: Array | None  # 4-D
    slopes: F32 | None  # (batch, heads_q)
    sink: F32 | None  # (heads_q,)


class _Tile(NamedTuple):
    """Batch entries, key heads (with all their query heads) and queries that are computed together."""

    batch: slice
    heads_k: slice
    heads_q: slice
    rows: slice


def _steps(s: _Sequences) -> tuple[int, int, int, int]:
    """Batch entries, key heads, queries of a tile and keys of a block: full tiles, few of them."""
    batch, seqlen_q, heads_q, dim = s.q.shape
    heads_k, dim_v = s.v.shape[2:]
    group = heads_q // heads_k
    left, right = s.problem.window_left, s.problem.window_right
    rows = max(1, min(seqlen_q, _ROWS // group))
    if left >= 0 and right >= 0:
        rows = min(rows, max(_NARROW, left + right + 1))  # a tall tile would compute mostly hidden pairs
    heads = max(1, min(heads_k, _ROWS // (rows * group)))
    entries = 1
    if heads == heads_k:
        most = min(_ROWS // (rows * heads_q), _VALUES // (_KEYS * heads_k * max(dim, dim_v)))
        entries = max(1, min(batch, most))
    matrices = entries * heads
    keys = max(_KEYS, min(_SCORES // (matrices * group * rows), _VALUES // (matrices * max(dim, dim_v))))
    return entries, heads, rows, keys


def _attend(s: _Sequences) -> None:
    """All tiles of some sequences of equal lengths."""
    batch, seqlen_q, heads_q, _ = s.q.shape
    heads_k = s.v.shape[2]
    group = heads_q // heads_k
    step_b, step_h, step_q, step_k = _steps(s)
    for b in range(0, batch, step_b):
        for h in range(0, heads_k, step_h):
            heads_k_tile = slice(h, min(h + step_h, heads_k))
            heads_q_tile = slice(h * group, heads_k_tile.stop * group)
            for i in range(0, seqlen_q, step_q):
                rows = slice(i, min(i + step_q, seqlen_q))
                _attend_tile(s, _Tile(slice(b, min(b + step_b, batch)), heads_k_tile, heads_q_tile, rows), step_k)


def _key_range(rows: slice, offset: int, left: int, right: int, seqlen_k: int) -> tuple[int, int]:
    """First and last + 1 key that some query of rows may see; empty when last <= first."""
    first = max(0, rows.start + offset - left) if left >= 0 else 0
    last = min(seqlen_k, rows.stop + offset + right) if right >= 0 else seqlen_k
    return first, last


# ------------------------------------------------------------------------------------------------------------ one tile


def _attend_tile(s: _Sequences, t: _Tile, step_k: int) -> None:
    """Algorithm 1 for one tile. Rows of its matrices are (query head of the group, query), heads outermost."""
    p = s.problem
    q = s.q[t.batch, t.rows, t.heads_q].transpose(0, 2, 1, 3).astype(np.float32, order="C")  # always a copy
    q *= p.softmax_scale / p.softcap if p.softcap else p.softmax_scale
    batch, heads_q, queries, dim = q.shape
    heads_k = t.heads_k.stop - t.heads_k.start
    q = q.reshape(batch, heads_k, -1, dim)
    offset = s.k.shape[1] - s.q.shape[1]
    m: Any = -np.inf
    l: Any = 0.0  # noqa: E741 - the letter of the paper
    acc: Any = None
    if s.sink is not None:  # the sink is a key that came first, with a value of zero
        m = np.repeat(s.sink[t.heads_q].reshape(1, heads_k, -1), queries, axis=2)[..., None]
        l = 1.0  # noqa: E741 - exp(sink - m)
    first, last = _key_range(t.rows, offset, p.window_left, p.window_right, s.k.shape[1])
    for j in range(first, last, step_k):
        keys = slice(j, min(j + step_k, last))
        x = _scores(q, _float32(s.k[t.batch, keys, t.heads_k]))
        hides = _modify(x.reshape(batch, heads_q, queries, -1), s, t, keys, offset)
        m_new = np.maximum(m, x.max(axis=3, keepdims=True))
        shift = np.where(m_new == -np.inf, np.float32(0.0), m_new)  # no key yet: exp(-inf - 0), not exp(-inf + inf)
        x -= shift
        np.exp(x, out=x)
        row_sum = x.sum(axis=3, keepdims=True)
        pv = _product(x, _float32(s.v[t.batch, keys, t.heads_k]), hides)
        if acc is None and s.sink is None:
            l, acc = row_sum, pv  # noqa: E741
        else:
            keep = np.exp(m - shift)
            l = l * keep + row_sum  # noqa: E741
            acc = pv if acc is None else np.add(np.multiply(acc, keep, out=acc), pv, out=acc)
        m = m_new
    if s.lse is not None:
        s.lse[t.batch, t.heads_q, t.rows] = _rows_of(m + np.log(l), heads_q, queries)
    target = s.out[t.batch, t.rows, t.heads_q]
    if acc is None:
        target[...] = 0
        return
    acc /= np.where(l == 0.0, np.float32(1.0), l)
    target[...] = acc.reshape(batch, heads_q, queries, -1).transpose(0, 2, 1, 3)


def _rows_of(x: Any, heads_q: int, queries: int) -> Any:
    """(batch, heads_k, group * queries, 1) as (batch, heads_q, queries); a scalar stays one."""
    return x.reshape(-1, heads_q, queries) if isinstance(x, np.ndarray) and x.ndim else x


def _float32(block: Array) -> F32:
    """(batch, keys, heads, dim) as (batch, heads, keys, dim) in float32, in a form that BLAS takes without a copy."""
    moved = block.transpose(0, 2, 1, 3)
    if moved.dtype == np.float32 and moved.strides[3] == 4 and moved.strides[2] >= 4 * moved.shape[3]:
        return moved
    return widened(moved)


def _scores(q: F32, k: F32) -> F32:
    """q @ k^T per matrix, contiguous."""
    few = q.shape[2] <= _FEW
    x: F32 = np.matmul(k, q.swapaxes(2, 3)).swapaxes(2, 3) if few else np.matmul(q, k.swapaxes(2, 3))
    return np.ascontiguousarray(x)


def _modify(x: F32, s: _Sequences, t: _Tile, keys: slice, offset: int) -> bool:
    """Softcap, ALiBi, bias and masks on scores (batch, heads_q, queries, keys), in place. True if it may hide pairs."""
    p = s.problem
    if p.softcap:
        np.tanh(x, out=x)
        x *= np.float32(p.softcap)
    i = np.arange(t.rows.start + offset, t.rows.stop + offset)[:, None]
    j = np.arange(keys.start, keys.stop)
    if s.slopes is not None:
        distance = np.abs(i - j).astype(np.float32)
        x -= s.slopes[t.batch, t.heads_q, None, None] * distance
    hides = s.bias is not None
    if s.bias is not None:
        cut = (t.batch, t.heads_q, t.rows, keys)
        bias = s.bias[tuple(c if n > 1 else slice(None) for c, n in zip(cut, s.bias.shape, strict=True))]
        if bias.dtype == np.bool_:
            np.copyto(x, -np.inf, where=~bias)
        else:
            x += bias.astype(np.float32, copy=False)
    if p.window_right >= 0:
        c = max(0, int(i[0, 0]) + p.window_right + 1 - keys.start)  # columns before c are seen by the first query
        if c < len(j):
            np.copyto(x[..., c:], -np.inf, where=j[c:] > i + p.window_right)
            hides = True
    if p.window_left >= 0:
        c = min(len(j), int(i[-1, 0]) - p.window_left - keys.start)  # columns from c on are seen by the last query
        if c > 0:
            np.copyto(x[..., :c], -np.inf, where=j[:c] < i - p.window_left)
            hides = True
    return hides


def _product(weights: F32, values: F32, hides: bool) -> F32:
    """weights @ values; a weight of 0 keeps a NaN or infinity in values out when some pairs are hidden."""
    total = _sum_over_keys(weights, values)
    if not hides or np.isfinite(total).all():
        return total
    bad: NDArray[np.bool_] = ~np.all(np.isfinite(values), axis=3)
    total = _sum_over_keys(weights, np.where(bad[..., None], np.float32(0.0), values))
    for b, h, j in np.argwhere(bad & np.any(weights != 0.0, axis=2)):
        rows = weights[b, h, :, j] != 0.0
        total[b, h, rows] += weights[b, h, rows, j, None] * values[b, h, j]
    return total


def _sum_over_keys(weights: F32, values: F32) -> F32:
    """weights @ values in parts of _KEYS keys: BLAS adds key after key, and its error grows with their number."""
    batch, heads, rows, keys = weights.shape
    parts = keys // _KEYS
    if parts < 2:
        product: F32 = np.matmul(weights, values)
        return product
    whole = parts * _KEYS
    w = weights[..., :whole].reshape(batch, heads, rows, parts, _KEYS).swapaxes(2, 3)
    total: F32 = np.matmul(w, values[:, :, :whole].reshape(batch, heads, parts, _KEYS, -1)).sum(axis=2)
    if whole < keys:
        total += np.matmul(weights[..., whole:], values[:, :, whole:])
    return total
