"""One piece of the gradient of attention on the CPU: tiles of queries walk over blocks of keys, all sums in float32.

Source: FlashAttention-2 (Dao, arXiv 2307.08691), Algorithm 2. Tiles, blocks, strips and products are those of the
forward (cpu/tile.py): a block has some hundred queries and some hundred keys and goes to BLAS in products so small that
BLAS does them on the calling thread. Each block of weights exp(score - lse) is computed once more, from which follow
its parts of all gradients. Memory beyond the arguments is a few MB per thread, and the sums of dk and dv.

-lse is one more column of q and -delta one more column of dout, and 1 one more column of k and v, so the products
subtract them. A weight of 0 does not keep a NaN or infinity out of a product. So when a sum is not finite the piece is
done again with products that leave out the pairs of weight 0.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from flashmoe_cupy.cpu.convert import widened
from flashmoe_cupy.cpu.tile import Sequences, Space, Tile, _blocks, _Cut, _cut, _modify, _scores, _strips

Array = NDArray[Any]
F32 = NDArray[np.float32]


class Piece(NamedTuple):
    """Tiles of the same batch entries and heads, and what their gradient reads and writes.

    of: the problem of these sequences has softcap 0. The derivative of a softcap is taken before slopes and bias are
    added, so the softcap is applied here and not by the functions of cpu/tile.py.
    """

    of: Sequences  # out and lse hold what the forward wrote
    tiles: tuple[Tile, ...]
    softcap: float
    dout: Array  # (batch, seqlen_q, heads_q, head_dim_v)
    dlse: F32 | None  # (batch, heads_q, seqlen_q); None: 0
    dq: Array | None  # written, in the axes of q; None: not wanted
    dk: bool  # whether the sum for dk is wanted
    dv: bool
    dsinks: bool
    dbias: Array | None = None  # (batch, heads_q, seqlen_q, seqlen_k), written; hidden pairs keep what it holds

    def pairs(self) -> int:
        """Scores of the piece, those that are hidden from some queries among them."""
        return sum(t.pairs() for t in self.tiles)


class Sums(NamedTuple):
    """Sums over the queries of a piece, of its batch entries and heads. None: not wanted."""

    first: int  # the first key of dk and dv; keys outside of them are not seen
    dk: F32 | None  # (batch, heads_k, keys, head_dim)
    dv: F32 | None  # (batch, heads_k, keys, head_dim_v)
    dsinks: F32 | None  # (heads_q,)


class _Rows(NamedTuple):
    """Values of the rows of a tile. Rows without keys and those beyond the last query have q, dout and delta 0."""

    q: F32  # (*_Cut.rows, head_dim), times scale, with one more column if _Cut.column
    dout: F32
    lse: F32  # (*_Cut.rows,); inf in rows without keys, so that exp(score - lse) is 0
    delta: F32  # rowsum(dout * out) - dlse


def gradient(space: Space, piece: Piece) -> Sums:
    """Write dq and dbias of a piece and return the sums for dk, dv and dsinks."""
    sums, finite = _attempt(space, piece, False)
    return sums if finite else _attempt(space, piece, True)[0]


def add_bias_gradient(space: Space, piece: Piece, total: F32, careful: bool) -> None:
    """Add the gradient of the bias, of the one tile of a piece, to total, summed along axes of which total has size 1.

    total: (batch, heads_q, rows of the tile, seqlen_k). careful: leave out pairs of weight 0 also where they are NaN.
    """
    t = piece.tiles[0]
    c = _cut(t)
    _walk(space, piece, t, c, _rows(piece, t, c, True), Sums(0, None, None, None), total, careful)


def _attempt(space: Space, piece: Piece, careful: bool) -> tuple[Sums, bool]:
    """Do all tiles of a piece. Returns the sums, and whether all values are finite."""
    s, t = piece.of, piece.tiles[0]
    ranges = [tile.keys() for tile in piece.tiles]
    first = min(begin for begin, _ in ranges)
    shape = t.batch.stop - t.batch.start, t.heads_k.stop - t.heads_k.start, max(0, max(e for _, e in ranges) - first)
    sums = Sums(
        first,
        np.zeros((*shape, s.k.shape[3]), np.float32) if piece.dk else None,
        np.zeros((*shape, s.v.shape[3]), np.float32) if piece.dv else None,
        np.zeros(t.heads_q.stop - t.heads_q.start, np.float32) if piece.dsinks else None,
    )
    finite = [_tile(space, piece, t, sums, careful) for t in piece.tiles]
    if sums.dk is not None and piece.softcap:
        sums.dk[...] *= np.float32(piece.softcap)
    return sums, all(finite) and all(np.isfinite(a).all() for a in (sums.dk, sums.dv) if a is not None)


def _tile(space: Space, piece: Piece, t: Tile, sums: Sums, careful: bool) -> bool:
    """Write dq and dbias of a tile and add to the sums. Returns whether what was written is finite."""
    s, c = piece.of, _cut(t)
    scored = piece.dq is not None or piece.dk or piece.dbias is not None
    rows = _rows(piece, t, c, scored or piece.dsinks)
    if sums.dsinks is not None and s.sink is not None:
        shape = c.batch, len(sums.dsinks), c.strips * c.queries
        weights = np.exp(s.sink[t.heads_q, None] - rows.lse.reshape(shape))
        sums.dsinks[...] -= (weights * rows.delta.reshape(shape)).sum(axis=2).sum(axis=0)
    if not scored and not piece.dv:
        return True
    dbias = None if piece.dbias is None else piece.dbias[t.batch, t.heads_q, t.rows]
    dq, finite = _walk(space, piece, t, c, rows, sums, dbias, careful)
    if dq is None or piece.dq is None:
        return finite
    finite = finite and bool(np.isfinite(dq).all())
    dq *= np.float32(s.problem.softmax_scale)
    heads_q = t.heads_q.stop - t.heads_q.start
    values = dq.reshape(c.batch, heads_q, c.strips * c.queries, -1)[:, :, : t.rows.stop - t.rows.start]
    piece.dq[t.batch, t.rows, t.heads_q] = values.transpose(0, 2, 1, 3)
    return finite


def _rows(piece: Piece, t: Tile, c: _Cut, with_delta: bool) -> _Rows:
    """Read the rows of a tile. Without with_delta out and dlse are not read, and delta is 0."""
    s, p = piece.of, piece.of.problem
    dim, dim_v = s.q.shape[3], s.v.shape[3]
    queries = t.rows.stop - t.rows.start
    shape = c.batch, t.heads_q.stop - t.heads_q.start, c.strips * c.queries
    lse = np.full(shape, np.inf, np.float32)
    if s.lse is not None:
        lse[:, :, :queries] = s.lse[t.batch, t.heads_q, t.rows]
    lse[lse == -np.inf] = np.inf
    empty = lse == np.inf
    q = np.zeros((*shape, dim + c.column), np.float32)
    dout = np.zeros((*shape, dim_v + c.column), np.float32)
    delta = np.zeros(shape, np.float32)
    scale = p.softmax_scale / piece.softcap if piece.softcap else p.softmax_scale
    np.multiply(_wide(s.q, t), np.float32(scale), out=q[:, :, :queries, :dim])
    dout[:, :, :queries, :dim_v] = _wide(piece.dout, t)
    if with_delta:
        np.add.reduce(dout[:, :, :queries, :dim_v] * _wide(s.out, t), axis=3, out=delta[:, :, :queries])
        if piece.dlse is not None:
            delta[:, :, :queries] -= piece.dlse[t.batch, t.heads_q, t.rows]
    if empty[:, :, :queries].any():
        q[empty], dout[empty], delta[empty] = 0.0, 0.0, 0.0
    if c.column:
        if not piece.softcap:
            np.negative(lse, out=q[..., dim])
        np.negative(delta, out=dout[..., dim_v])
    return _Rows(q.reshape(*c.rows, -1), dout.reshape(*c.rows, -1), lse.reshape(c.rows), delta.reshape(c.rows))


def _wide(a: Array, t: Tile) -> F32:
    """The rows of a tile as (batch, heads, rows, dim) in float32."""
    own = a[t.batch, t.rows, t.heads_q].transpose(0, 2, 1, 3)
    return own if own.dtype == np.float32 else widened(own)


# ------------------------------------------------------------------------------------------------------ blocks of keys


def _walk(
    space: Space, piece: Piece, t: Tile, c: _Cut, rows: _Rows, sums: Sums, dbias: Array | None, careful: bool
) -> tuple[F32 | None, bool]:
    """Add to the sums of dk and dv and to dbias. Returns dq / scale, and whether what goes to dbias is finite.

    dbias: (batch, heads_q, rows, seqlen_k) of the tile. If it is piece.dbias pairs are written, else they are added,
    and along axes of size 1 they are summed.
    """
    dim, dim_v = t.of.q.shape[3], t.of.v.shape[3]
    dq = None if piece.dq is None else np.zeros((*c.rows, dim), np.float32)
    finite = True
    for first, k, v, keys in _blocks(space, t, c):
        last = first + k.shape[2] * keys
        strips = here, end, _, _ = _strips(t, c, first, last)
        if here >= end:
            continue
        shape = (*c.rows[:3], end - here, k.shape[2], c.rows[4], keys)
        span = slice(first - sums.first, last - sums.first)
        q, dout, lse, delta = (a[:, :, :, here:end, None] for a in rows)
        k, v = k[:, :, None, None], v[:, :, None, None]
        x, slope = space.take("x", shape), None
        _scores(q, k, x)
        if piece.softcap:
            np.tanh(x, out=x)
            slope = np.multiply(x, x, out=space.take("slope", shape))
            np.subtract(np.float32(1.0), slope, out=slope)
            x *= np.float32(piece.softcap)
        if piece.softcap or not c.column:
            x -= lse[..., None]
        _modify(x, t, c, first, strips)
        np.exp(x, out=x)
        if careful:
            np.copyto(x, 0.0, where=(lse == np.inf)[..., None])
        if sums.dv is not None:
            _add(sums.dv[:, :, span], _product(space, x.swapaxes(5, 6), dout[..., :dim_v], careful))
        if dq is None and sums.dk is None and dbias is None:
            continue
        y = space.take("y", shape)
        _scores(dout, v, y)
        if not c.column:
            y -= delta[..., None]
        y *= x
        if careful:
            np.copyto(y, 0.0, where=x == 0.0)
        if dbias is not None:
            own = slice(here * c.queries, min(end * c.queries, t.rows.stop - t.rows.start))
            finite &= _to_bias(dbias, y, c, own, slice(first, last), piece.dbias is None)
        if slope is not None:
            y *= slope
            if careful:
                np.copyto(y, 0.0, where=x == 0.0)
        if sums.dk is not None:
            _add(sums.dk[:, :, span], _product(space, y.swapaxes(5, 6), q[..., :dim], careful))
        if dq is not None:
            part = _product(space, y, k[..., :dim], careful)
            dq[:, :, :, here:end] += part[:, :, :, :, 0] if part.shape[4] == 1 else part.sum(axis=4)
    return dq, finite


def _add(total: F32, part: F32) -> None:
    """Add (batch, heads_k, heads, strips, parts, keys, dim) to (batch, heads_k, parts * keys, dim)."""
    alone = part.shape[2] == part.shape[3] == 1
    total += (part[:, :, 0, 0] if alone else np.add.reduce(part, axis=(2, 3))).reshape(total.shape)


def _to_bias(dbias: Array, y: F32, c: _Cut, rows: slice, keys: slice, add: bool) -> bool:
    """Write the gradient y of a block of scores into dbias, or add it. Returns whether it is finite.

    rows: queries of y that there are, counted from the first of the tile.
    """
    y = y.reshape(*y.shape[:5], c.stack, c.queries, y.shape[6]).transpose(0, 1, 2, 5, 3, 6, 4, 7)
    batch, heads = c.batch, c.heads_k * c.heads * c.stack
    y = y.reshape(batch, heads, y.shape[4] * c.queries, -1)[:, :, : rows.stop - rows.start]
    own = dbias[:, :, rows if dbias.shape[2] > 1 else slice(None), keys if dbias.shape[3] > 1 else slice(None)]
    if add:
        own += y.sum(axis=tuple(a for a in range(4) if own.shape[a] == 1), keepdims=True)
        return True  # the caller looks at the whole sum
    own[...] = y
    return bool(np.isfinite(y).all())


def _product(space: Space, a: F32, b: F32, careful: bool) -> F32:
    """a @ b. careful: a NaN or infinity in b counts only where the element of a is not 0."""
    lead = tuple(max(m, n) for m, n in zip(a.shape[:5], b.shape[:5], strict=True))
    out = space.take("part", (*lead, a.shape[5], b.shape[6]))
    np.matmul(a, b, out=out)
    if careful and not np.isfinite(out).all():
        a, b = np.broadcast_to(a, (*lead, *a.shape[5:])), np.broadcast_to(b, (*lead, *b.shape[5:]))
        for place in np.ndindex(*lead):
            weights, values = a[place], b[place]
            bad: NDArray[np.bool_] = ~np.all(np.isfinite(values), axis=1)
            np.matmul(weights, np.where(bad[:, None], np.float32(0.0), values), out=out[place])
            for j in np.flatnonzero(bad):
                there = weights[:, j] != 0.0
                out[place][there] += weights[there, j, None] * values[j]
    return out
