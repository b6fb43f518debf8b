"""One tile of attention on the CPU: online softmax over blocks of keys, matrix products by BLAS in float32.

Source: FlashAttention-2 (Dao, arXiv 2307.08691), Algorithm 1. A tile walks over the keys that its queries see and keeps
an exponent m and the sums of the weights exp(score - m) and of the weighted values of each row, so memory beyond the
arguments is a few MB per thread whatever the lengths. The query heads of a group are rows of one matrix, so each key is
read once per group. Blocks that causal or window rules hide from some of the queries are left out for them. bfloat16
and float16 become float32 some thousand keys at a time.

m is the largest score of the first block that a row sees, not the running maximum, as long as nothing overflows: that
spares the later blocks a look for the maximum and a multiplication of the sums. Rows in which something did overflow
are done again with the running maximum. -m is one more column of q, and 1 one more column of k and v, so the products
subtract m and sum the weights. Products are cut so small that BLAS does them on the calling thread.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from flashmoe_cupy.cpu.convert import widened
from flashmoe_cupy.cpu.threads import SINGLE, SINGLE_VECTOR

if TYPE_CHECKING:
    from flashmoe_cupy.plan.attention.problem import AttentionProblem

Array = NDArray[Any]
F32 = NDArray[np.float32]

_QUERIES = 64  # rows of a product, at most
_KEYS = 512  # keys of a product, at most: BLAS adds key after key, and its error grows with their number
_SCORES = 1 << 16  # elements of a block of scores: 256 KB, which stay in a core's second-level cache
_VALUES = 1 << 18  # elements of keys, or of values, that exist in float32 at one time: 1 MB
_TRANSPOSED_ROWS = 16  # rows of a product, up to which BLAS computes k @ q^T faster than q @ k^T


class Sequences(NamedTuple):
    """Sequences of equal lengths. None: the call has no such array."""

    problem: AttentionProblem
    q: Array  # (batch, seqlen_q, heads_q, head_dim), k, v and out in the same order
    k: Array
    v: Array
    out: Array
    lse: F32 | None  # (batch, heads_q, seqlen_q)
    bias: Array | None  # (batch, heads_q, seqlen_q, seqlen_k), or 1 along axes where it is the same
    slopes: F32 | None  # (batch, heads_q)
    sink: F32 | None  # (heads_q,)


class Tile(NamedTuple):
    """Batch entries, key heads (with all their query heads) and queries that are computed together."""

    of: Sequences
    batch: slice
    heads_k: slice
    heads_q: slice
    rows: slice  # queries

    def offset(self) -> int:
        """The key at which the first query of a sequence stands; the last one stands at the last key."""
        return int(self.of.k.shape[1] - self.of.q.shape[1])

    def keys(self) -> tuple[int, int]:
        """First and last + 1 key that some query of the tile may see."""
        p = self.of.problem
        return key_range(self.rows, self.offset(), p.window_left, p.window_right, self.of.k.shape[1])

    def pairs(self) -> int:
        """Scores of the tile, those that are hidden from some of its queries among them."""
        first, last = self.keys()
        batch, heads, rows = (int(x.stop - x.start) for x in (self.batch, self.heads_q, self.rows))
        return batch * heads * rows * max(0, last - first)


def key_range(rows: slice, offset: int, left: int, right: int, seqlen_k: int) -> tuple[int, int]:
    """First and last + 1 key that some query of rows may see; empty when last <= first."""
    first = max(0, rows.start + offset - left) if left >= 0 else 0
    last = min(seqlen_k, rows.stop + offset + right) if right >= 0 else seqlen_k
    return first, last


class _Cut(NamedTuple):
    """How the rows and keys of a tile go to matrix products.

    A row belongs to a batch entry, a key head, one of its query heads and a query. A product takes `stack` query heads
    times `queries` queries, so there are `heads` products side by side for the heads of a group and `strips` for the
    queries. Only one of stack and strips is more than 1, so the rows of all products lie in the order (batch, query
    head, query), with some queries more than there are when the strips do not come out even.
    """

    batch: int
    heads_k: int
    heads: int  # products side by side for the query heads of a key head
    strips: int  # products side by side for the queries
    stack: int  # query heads of a product
    queries: int  # of each of these heads in a product
    keys: int  # of a product
    column: bool  # q, k and v have one more column

    @property
    def rows(self) -> tuple[int, int, int, int, int]:
        """The shape of an array with a value for each row of all products."""
        return self.batch, self.heads_k, self.heads, self.strips, self.stack * self.queries


def _cut(t: Tile) -> _Cut:
    s = t.of
    dim, dim_v = s.q.shape[3], s.v.shape[3]
    queries = t.rows.stop - t.rows.start
    heads_k = t.heads_k.stop - t.heads_k.start
    group = (t.heads_q.stop - t.heads_q.start) // heads_k
    column = group * queries > _QUERIES // 2  # with few rows, a copy of k and v costs more than it spares
    widest = max(dim, dim_v) + column
    strips, stack = -(-queries // _QUERIES), 1
    if strips == 1:
        stack = next(n for n in range(group, 0, -1) if group % n == 0 and (n * queries <= _QUERIES or n == 1))
    queries = -(-queries // strips)
    rows = stack * queries
    most = max(1, (SINGLE if rows > 1 else SINGLE_VECTOR) // (rows * widest))
    keys = min(_KEYS, most if most < 8 else most // 8 * 8)
    return _Cut(t.batch.stop - t.batch.start, heads_k, group // stack, strips, stack, queries, keys, column)


class Space:
    """Memory of one thread that all its tiles use: the system hands out new memory page by page, which takes time."""

    def __init__(self) -> None:
        self._kept: dict[str, F32] = {}

    def take(self, name: str, shape: tuple[int, ...]) -> F32:
        """An array of this shape with any values. It takes the memory of the last array of this name."""
        size = math.prod(shape)
        kept = self._kept.get(name)
        if kept is None or kept.size < size:
            kept = self._kept[name] = np.empty(size, np.float32)
        return kept[:size].reshape(shape)


def worker() -> Callable[[Tile], None]:
    """`attend_tile` with memory of its own, for one thread."""
    return partial(attend_tile, Space())


def attend_tile(space: Space, t: Tile) -> None:
    """Write out and lse of a tile."""
    s, c = t.of, _cut(t)
    p = s.problem
    queries, heads_q = t.rows.stop - t.rows.start, t.heads_q.stop - t.heads_q.start
    dim, dim_v = s.q.shape[3], s.v.shape[3]
    shape = c.batch, heads_q, c.strips * c.queries
    q = np.zeros((*shape, dim + c.column), np.float32)
    scale = p.softmax_scale / p.softcap if p.softcap else p.softmax_scale
    wide = s.q[t.batch, t.rows, t.heads_q].transpose(0, 2, 1, 3)
    np.multiply(widened(wide) if wide.dtype != np.float32 else wide, np.float32(scale), out=q[:, :, :queries, :dim])
    q = q.reshape(*c.rows, -1)
    # A bias or slopes may make scores of one block so small against another's that all rows would be computed twice.
    running_maximum = s.slopes is not None or (s.bias is not None and s.bias.dtype != np.bool_)
    m, sums = _walk(space, t, c, q, running_maximum)
    if not running_maximum and not np.isfinite(sums).all():
        bad = ~np.isfinite(sums).all(axis=5)
        if c.column:
            q[..., dim] = 0.0
        right_m, right_sums = _walk(space, t, c, q, True)
        m[bad], sums[bad] = right_m[bad], right_sums[bad]
    m = m.reshape(shape)[:, :, :queries]
    sums = sums.reshape(*shape, -1)[:, :, :queries]
    total = sums[..., dim_v]
    if s.sink is not None:  # a row without keys has its sink alone
        sink = s.sink[t.heads_q, None]
        m = np.where(m == -np.inf, sink, m)
        total = total + np.exp(sink - _finite(m))
    if s.lse is not None:
        np.add(m, np.log(total), out=s.lse[t.batch, t.heads_q, t.rows])
    values = sums[..., :dim_v]
    values /= np.where(total == 0.0, np.float32(1.0), total)[..., None]
    s.out[t.batch, t.rows, t.heads_q] = values.transpose(0, 2, 1, 3)


def _finite(m: F32) -> F32:
    """m, but 0 in rows without keys: exp(-inf - 0) is 0 there, and exp(-inf + inf) would be NaN."""
    return np.where(m == -np.inf, np.float32(0.0), m)


# ------------------------------------------------------------------------------------------------------ blocks of keys


def _blocks(space: Space, t: Tile, c: _Cut) -> Iterator[tuple[int, F32, F32, int]]:
    """First key, k and v of each block in float32, (batch, heads_k, products, keys, dim)."""
    s = t.of
    first, last = t.keys()
    dims = s.k.shape[3] + c.column, s.v.shape[3] + c.column
    at_once = max(c.keys, _VALUES // (c.batch * c.heads_k * max(dims)) // c.keys * c.keys)
    parts = max(1, _SCORES // (c.batch * c.heads_k * c.heads * c.strips * c.stack * c.queries * c.keys))
    for i in range(first, last, at_once):
        end = min(i + at_once, last)
        k, v = (a[t.batch, i:end, t.heads_k] for a in (s.k, s.v))
        k, v = (_with_ones(space, "k", k), _with_ones(space, "v", v)) if c.column else (_float32(k), _float32(v))
        j = i
        while j < end:
            count = min(parts, (end - j) // c.keys)
            keys = c.keys if count else end - j
            count = max(count, 1)
            cut, shape = slice(j - i, j - i + count * keys), (c.batch, c.heads_k, count, keys)
            yield j, k[:, :, cut].reshape(*shape, dims[0]), v[:, :, cut].reshape(*shape, dims[1]), keys
            j += count * keys


def _float32(block: Array) -> F32:
    """(batch, keys, heads, dim) as (batch, heads, keys, dim) in float32, in a form that BLAS takes without a copy."""
    moved = block.transpose(0, 2, 1, 3)
    if moved.dtype == np.float32 and moved.strides[3] == 4 and moved.strides[2] >= 4 * moved.shape[3]:
        return moved
    return widened(moved)


def _with_ones(space: Space, name: str, block: Array) -> F32:
    """(batch, keys, heads, dim) as (batch, heads, keys, dim + 1) in float32, the last column 1."""
    moved = block.transpose(0, 2, 1, 3)
    wide = space.take(name, (*moved.shape[:3], moved.shape[3] + 1))
    wide[..., :-1] = widened(moved) if moved.dtype == np.float16 else moved
    wide[..., -1] = 1.0
    return wide


def _strips(t: Tile, c: _Cut, first: int, last: int) -> tuple[int, int, int, int]:
    """Strips of queries against the keys first to last - 1, as (here, end, front, behind).

    Strips here to end - 1 see some of these keys. Of strips below front the right edge of the window hides some keys,
    of strips from behind on the left edge.
    """
    p = t.of.problem
    here, end, front, behind = 0, c.strips, 0, c.strips
    start = t.rows.start + t.offset()
    if p.window_right >= 0:
        reach = start + p.window_right  # the last key that the first query sees
        here = max(0, -((reach + c.queries - 1 - first) // c.queries))
        front = min(c.strips, max(0, -((reach - last + 1) // c.queries)))
    if p.window_left >= 0:
        reach = start - p.window_left  # the first key that the first query sees
        end = min(c.strips, (last - 1 - reach) // c.queries + 1)
        behind = max(0, (first - reach - c.queries + 1) // c.queries + 1)
    return here, end, front, behind


def _walk(space: Space, t: Tile, c: _Cut, q: F32, running_maximum: bool) -> tuple[F32, F32]:
    """The exponent m of each row, and the sums of exp(score - m) * v and, in the last column, of exp(score - m).

    q: (*c.rows, dim), whose last column is 0 if c.column. running_maximum: m is the largest score of all blocks so far,
    else of the first block that a row sees.
    """
    s = t.of
    dim_v = s.v.shape[3]
    m = np.full(c.rows, -np.inf, np.float32)
    sums = np.zeros((*c.rows, dim_v + 1), np.float32)
    known = [False] * c.strips  # by strip: m of all its rows will not change any more
    subtract = running_maximum or not c.column or bool(s.problem.softcap)
    sink = None
    if s.sink is not None:
        sink = np.repeat(s.sink[t.heads_q].reshape(c.heads_k, c.heads, 1, c.stack), c.queries, axis=3)
    for first, k, v, keys in _blocks(space, t, c):
        parts = k.shape[2]
        here, end, front, behind = _strips(t, c, first, first + parts * keys)
        if here >= end:
            continue
        shape = (*c.rows[:3], end - here, parts, c.rows[4])
        x = space.take("x", (*shape, keys))
        part = space.take("part", (*shape, dim_v + 1))
        _scores(q[:, :, :, here:end, None], k[:, :, None, None], x)
        hides = _modify(x, t, c, first, (here, end, front, behind))
        old = m[:, :, :, here:end]
        if running_maximum or not all(known[here:end]):
            top = x.max(axis=6).max(axis=4)
            if sink is not None:
                np.maximum(top, sink, out=top)
            new = np.maximum(old, top) if running_maximum else np.where(old == -np.inf, top, old)
            shift = _finite(new)
            if running_maximum:
                sums[:, :, :, here:end] *= np.exp(old - shift)[..., None]
            elif not subtract:
                x -= np.where(old == -np.inf, shift, np.float32(0.0))[..., None, :, None]
                np.negative(shift, out=q[:, :, :, here:end, :, -1])
            m[:, :, :, here:end] = old = new
            if not running_maximum:
                known[here:end] = np.all(new > -np.inf, axis=(0, 1, 2, 4)).tolist()
        if subtract:
            x -= _finite(old)[..., None, :, None]
        np.exp(x, out=x)
        _product(x, v[:, :, None, None], hides, c.column, part)
        sums[:, :, :, here:end] += part[:, :, :, :, 0] if parts == 1 else part.sum(axis=4)
    return m, sums


def _scores(q: F32, k: F32, x: F32) -> None:
    """Write q @ k^T into x."""
    if q.shape[5] <= _TRANSPOSED_ROWS:
        x[...] = np.matmul(k, q.swapaxes(5, 6)).swapaxes(5, 6)
    else:
        np.matmul(q, k.swapaxes(5, 6), out=x)


def _modify(x: F32, t: Tile, c: _Cut, first: int, strips: tuple[int, int, int, int]) -> bool:
    """Softcap, ALiBi, bias and masks on scores of the keys from `first` on, in place. True if it may hide pairs.

    x (batch, heads_k, heads, strips, parts, rows, keys), of the first two of `strips`, which _strips gave.
    """
    s = t.of
    p = s.problem
    here, end, front, behind = strips
    if p.softcap:
        np.tanh(x, out=x)
        x *= np.float32(p.softcap)
    masked = front > here or behind < end
    if not masked and s.slopes is None and s.bias is None:
        return False
    parts, keys = x.shape[4], x.shape[6]
    x = x.reshape(*x.shape[:5], c.stack, c.queries, keys)
    start = t.rows.start + here * c.queries
    i = np.arange(start + t.offset(), start + t.offset() + (end - here) * c.queries, dtype=np.int32)
    i = i.reshape(-1, 1, 1, c.queries, 1)
    j = np.arange(first, first + parts * keys, dtype=np.int32).reshape(parts, 1, 1, keys)
    if s.slopes is not None:
        slopes = s.slopes[t.batch, t.heads_q].reshape(c.batch, c.heads_k, c.heads, 1, 1, c.stack, 1, 1)
        x -= slopes * np.abs(i - j).astype(np.float32)
    if s.bias is not None:
        bias = _bias(s.bias, t, c, slice(start, start + i.size), slice(first, first + j.size), keys)
        if bias.dtype == np.bool_:
            np.copyto(x, -np.inf, where=~bias)
        else:
            x += bias.astype(np.float32, copy=False)
    if front > here:
        hidden = j > i[: front - here] + p.window_right
        np.copyto(x[:, :, :, : front - here], -np.inf, where=hidden)
    if behind < end:
        place = max(0, behind - here)
        np.copyto(x[:, :, :, place:], -np.inf, where=j < i[place:] - p.window_left)
    return masked or s.bias is not None


def _bias(bias: Array, t: Tile, c: _Cut, rows: slice, keys: slice, per_product: int) -> Array:
    """The part of a bias for some rows and keys, in the axes of the scores in _modify; queries beyond the last have 0.

    per_product: keys of a product.
    """
    cut = (t.batch, t.heads_q, slice(rows.start, min(rows.stop, t.rows.stop)), keys)
    part = bias[tuple(r if n > 1 else slice(None) for r, n in zip(cut, bias.shape, strict=True))]
    lacking = rows.stop - t.rows.stop
    if part.shape[2] > 1 and lacking > 0:
        part = np.concatenate((part, np.zeros((*part.shape[:2], lacking, part.shape[3]), part.dtype)), axis=2)
    b, h, i, j = part.shape
    heads = (c.heads_k, c.heads, c.stack) if h > 1 else (1, 1, 1)
    queries = (i // c.queries, c.queries) if i > 1 else (1, 1)
    split = (j // per_product, per_product) if j > 1 else (1, 1)
    # A bias of one head, query or key has size 1 on this axis whether it is spread out or there is no more.
    return part.reshape(b, *heads, *queries, *split).transpose(0, 1, 2, 4, 6, 3, 5, 7)


def _product(weights: F32, values: F32, hides: bool, column: bool, out: F32) -> None:
    """Write weights @ values and, in the last column, the sum of the weights, for which values has ones if `column`.

    A weight of 0 keeps a NaN or infinity in values out when some pairs are hidden.
    """
    _weighted(weights, values, column, out)
    if not hides or np.isfinite(out).all():
        return
    bad: NDArray[np.bool_] = ~np.all(np.isfinite(values), axis=6)
    dim = values.shape[6]
    _weighted(weights, np.where(bad[..., None], np.float32(0.0), values), column, out)
    for b, h, _, _, part, j in np.argwhere(bad):
        factor = weights[b, h, :, :, part, :, j]
        there = factor != 0.0
        if there.any():
            out[b, h, :, :, part, :, :dim][there] += factor[there][:, None] * values[b, h, 0, 0, part, j]


def _weighted(weights: F32, values: F32, column: bool, out: F32) -> None:
    if column:
        np.matmul(weights, values, out=out)
    else:
        np.matmul(weights, values, out=out[..., :-1])
        np.add.reduce(weights, axis=6, out=out[..., -1])
