"""The gradient of attention on the CPU: the arguments of a call, cut into pieces for threads (cpu/backward_tile.py).

A piece takes tiles of queries of some heads of some batch entries, in their order, and owns their rows of dq. The
pieces of a head share its dk and dv: each adds up its own, and these sums are added in the order of the pieces. The
gradient of a bias that is spread over an axis is computed apart, in regions of queries. Pieces and regions are cut by
shapes alone, so the same inputs give the same bits, with any number of threads.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from flashmoe_cupy.cpu import attention as forward
from flashmoe_cupy.cpu import threads
from flashmoe_cupy.cpu.backward_tile import Piece, Sums, add_bias_gradient, gradient
from flashmoe_cupy.cpu.tile import Sequences, Space, Tile
from flashmoe_cupy.errors import UnsupportedProblem

if TYPE_CHECKING:
    from flashmoe_cupy.plan.attention.problem import AttentionProblem

Array = NDArray[Any]
F32 = NDArray[np.float32]

_PIECES = 16  # pieces that a call is cut into at least, if they still have _PAIRS: so that threads have work
_PAIRS = 1 << 16  # scores of a piece at least, if its heads have so many
_ROWS = 128  # queries of a region at most: its sums are as many times seqlen_k


def attention_backward(
    p: AttentionProblem,
    dout: Array,
    q: Array,
    k: Array,
    v: Array,
    out: Array,
    lse: F32,
    *,
    dlse: F32 | None = None,
    dq: Array | None = None,
    dk: Array | None = None,
    dv: Array | None = None,
    dsinks: Array | None = None,
    dbias: Array | None = None,
    sinks: Array | None = None,
    alibi_slopes: Array | None = None,
    bias: Array | None = None,
    cu_seqlens_q: Array | None = None,
    cu_seqlens_k: Array | None = None,
    seqused_q: Array | None = None,
    seqused_k: Array | None = None,
    leftpad_q: Array | None = None,
    leftpad_k: Array | None = None,
) -> None:
    """Write the gradients of sum(dout * out) + sum(dlse * lse) that are not None, for a validated problem.

    q, k, v, out and dout (batch, seqlen, heads, dim), or packed (total, heads, dim) when p.varlen; bfloat16, float16 or
    float32 with any strides. out, and lse (batch, heads_q, seqlen_q) or (heads_q, total_q) float32, are what the
    forward wrote; dlse is None (0) or has lse's axes. dq, dk, dv: axes and dtype of q, k, v. dsinks (heads_q,): dtype
    of sinks. dbias: shape and dtype of bias, a float one. Rows with lse -inf, and keys that no query sees, get 0. Rows
    that do not count are neither read nor written, and get 0 in dbias. Raises UnsupportedProblem as the forward does.
    """
    if p.varlen:
        q, k, v, out, lse, dout = q[None], k[None], v[None], out[None], lse[None], dout[None]
        dlse, dq, dk, dv = (None if a is None else a[None] for a in (dlse, dq, dk, dv))
    slopes = sink = None
    if alibi_slopes is not None:
        slopes = np.broadcast_to(alibi_slopes.astype(np.float32), (p.batch, p.heads_q))
    if sinks is not None:
        sink = sinks.astype(np.float32)
    lengths = cu_seqlens_q, cu_seqlens_k, seqused_q, seqused_k, leftpad_q, leftpad_k
    places = list(_places(p, *lengths))
    bias, dbias = forward._four(bias), forward._four(dbias)
    total = (p.batch, p.heads_q, p.seqlen_q, p.seqlen_k)
    direct = None if dbias is None or dbias.shape != total else dbias
    problem = p._replace(softcap=0.0)  # backward_tile.Piece says why
    wholes = [
        Piece(
            Sequences(
                problem, q[b, i], k[b, j], v[b, j], out[b, i], lse[b, :, i], forward._part(bias, b, i, j),
                slopes if slopes is None or p.even else slopes[n : n + 1], sink,
            ),
            (), p.softcap, dout[b, i], None if dlse is None else dlse[b, :, i], None if dq is None else dq[b, i],
            dk is not None, dv is not None, dsinks is not None, forward._part(direct, b, i, j),
        )
        for n, (b, i, j) in enumerate(places)
    ]  # fmt: skip
    with np.errstate(all="ignore"):
        if dbias is not None:
            dbias[...] = 0.0
        if not all(a is None for a in (dq, dk, dv, dsinks, direct)):
            _run_pieces(p, _shares(p, places, wholes, dk, dv), dsinks)
        if dbias is not None and direct is None and p.heads_q:
            _run_regions(p, places, [w._replace(dq=None) for w in wholes], dbias)


class _Place(NamedTuple):
    """Where a call has some sequences of equal lengths, in arrays with an axis for the batch."""

    batch: slice
    rows: slice
    keys: slice


def _places(
    p: AttentionProblem,
    cu_seqlens_q: Array | None,
    cu_seqlens_k: Array | None,
    seqused_q: Array | None,
    seqused_k: Array | None,
    leftpad_q: Array | None,
    leftpad_k: Array | None,
) -> Iterator[_Place]:
    """All sequences of a call: at once if all rows count, else one by one. Raises UnsupportedProblem as the forward."""
    if p.even:
        yield _Place(slice(0, p.batch), slice(0, p.seqlen_q), slice(0, p.seqlen_k))
        return
    why: dict[str, str] = {}
    if p.varlen:
        queries = forward._spans(p, "q", cu_seqlens_q, seqused_q, why)
        keys = forward._spans(p, "k", cu_seqlens_k, seqused_k, why)
    else:
        queries = forward._counted(p.seqlen_q, "q", p.batch, leftpad_q, seqused_q, why)
        keys = forward._counted(p.seqlen_k, "k", p.batch, leftpad_k, seqused_k, why)
    if why:
        raise UnsupportedProblem(p.describe(), [*why], "; ".join(why.values()))
    for b, (i, j) in enumerate(zip(queries, keys, strict=True)):
        yield _Place(slice(0, 1) if p.varlen else slice(b, b + 1), i, j)


def _cuts(n: int, size: int) -> list[slice]:
    return [slice(i, min(i + size, n)) for i in range(0, n, size)]


# ------------------------------------------------------------------------------------------------------------- pieces


class _Share(NamedTuple):
    """Batch entries and key heads whose dk and dv belong to the same pieces."""

    dk: Array | None  # (batch, seqlen_k, heads_k, head_dim), written
    dv: Array | None
    heads_q: slice
    pieces: list[Piece]

    def write(self, sums: list[Sums]) -> None:
        """Write dk and dv, the sums of all pieces, added in their order."""
        for to, parts in ((self.dk, [one.dk for one in sums]), (self.dv, [one.dv for one in sums])):
            if to is None:
                continue
            total = parts[0] if len(parts) == 1 else None
            if total is None or total.shape[2] < to.shape[1]:
                total = np.zeros((to.shape[0], to.shape[2], to.shape[1], to.shape[3]), np.float32)
                for one, part in zip(sums, parts, strict=True):
                    if part is not None:
                        total[:, :, one.first : one.first + part.shape[2]] += part
            to[...] = total.transpose(0, 2, 1, 3)


def _shares(
    p: AttentionProblem, places: list[_Place], wholes: list[Piece], dk: Array | None, dv: Array | None
) -> list[_Share]:
    """All batch entries and heads of a call, with their tiles in pieces of about equal work."""
    found: list[tuple[_Share, list[Tile], Piece]] = []
    for place, whole in zip(places, wholes, strict=True):
        s = whole.of
        own = [None if a is None else a[place.batch, place.keys] for a in (dk, dv)]
        if not s.q.shape[1] or not p.heads_q:
            found.append((_Share(own[0], own[1], slice(0, 0), []), [], whole))
            continue
        group = p.heads_q // p.heads_k
        size_b, size_h, size_q = forward._tile_sizes(s)
        for b in _cuts(len(s.q), size_b):
            for h in _cuts(p.heads_k, size_h):
                heads_q = slice(h.start * group, h.stop * group)
                to = [None if a is None else a[b, :, h] for a in own]
                tiles = [Tile(s, b, h, heads_q, rows) for rows in _cuts(s.q.shape[1], size_q)]
                found.append((_Share(to[0], to[1], heads_q, []), tiles, whole))
    enough = max(_PAIRS, sum(t.pairs() for _, tiles, _ in found for t in tiles) // _PIECES)
    for share, tiles, whole in found:
        run: list[Tile] = []
        pairs = 0
        for n, t in enumerate(tiles):
            run.append(t)
            pairs += t.pairs()
            if pairs >= enough or n == len(tiles) - 1:
                share.pieces.append(whole._replace(tiles=tuple(run)))
                run, pairs = [], 0
    return [share for share, _, _ in found]


def _run_pieces(p: AttentionProblem, shares: list[_Share], dsinks: Array | None) -> None:
    """Compute all pieces, and write dq, dk, dv, dsinks and dbias."""
    sums: list[list[Sums | None]] = [[None] * len(share.pieces) for share in shares]
    work = [(n, m) for n, share in enumerate(shares) for m in range(len(share.pieces))]
    work.sort(key=lambda place: -shares[place[0]].pieces[place[1]].pairs())  # the longest first

    def worker() -> Callable[[tuple[int, int]], None]:
        space = Space()

        def compute(place: tuple[int, int]) -> None:
            n, m = place
            own = gradient(space, shares[n].pieces[m])
            if len(shares[n].pieces) == 1:
                shares[n].write([own])
                own = own._replace(dk=None, dv=None)
            sums[n][m] = own

        return compute

    pairs = sum(piece.pairs() for share in shares for piece in share.pieces)
    one_thread = pairs * (p.head_dim + p.head_dim_v) * 2 < forward._ONE_THREAD
    threads.each(worker, work, one_thread)
    done = [[one for one in own if one is not None] for own in sums]
    rest = [n for n, share in enumerate(shares) if len(share.pieces) != 1]

    def finisher() -> Callable[[int], None]:
        return lambda n: shares[n].write(done[n])

    threads.each(finisher, rest, one_thread)
    if dsinks is not None:
        total = np.zeros(p.heads_q, np.float32)
        for share, own in zip(shares, done, strict=True):
            for one in own:
                total[share.heads_q] += one.dsinks if one.dsinks is not None else 0.0
        dsinks[...] = total


# ------------------------------------------------------------------------------------------------------------ regions


class _Region(NamedTuple):
    """A part of dbias, with the queries of one tile, and all that its gradient sums."""

    to: Array  # (batch, heads_q, rows, seqlen_k), 1 along axes that the bias is spread over
    parts: list[tuple[Piece, slice, slice]]  # pieces of one tile, whose rows and keys are these of the region

    def total(self, space: Space) -> F32:
        """The gradient in the shape of `to`."""
        for careful in (False, True):
            total: F32 = np.zeros(self.to.shape, np.float32)
            for piece, rows, keys in self.parts:
                own = total[:, :, rows] if total.shape[2] > 1 else total
                add_bias_gradient(space, piece, own[..., keys] if own.shape[3] > 1 else own, careful)
            if np.isfinite(total).all():
                break
        return total


def _run_regions(p: AttentionProblem, places: list[_Place], wholes: list[Piece], dbias: Array) -> None:
    """Write the gradient of a bias that is spread over some axes. dbias holds 0."""
    if not wholes:
        return
    batch, heads, rows, _ = dbias.shape
    group = p.heads_q // p.heads_k
    size_b, size_h, size_q = forward._tile_sizes(max((w.of for w in wholes), key=lambda s: s.q.shape[1]))
    regions: dict[tuple[int, int, int], _Region] = {}
    for b in _cuts(p.batch, size_b):
        n, own_b = (0, b) if p.even else (b.start, slice(0, 1))
        place, whole = places[n], wholes[n]
        for h in _cuts(p.heads_k, size_h):
            heads_q = slice(h.start * group, h.stop * group)
            for i in _cuts(p.seqlen_q, min(size_q, _ROWS)):
                cuts = [cut if m > 1 else slice(None) for cut, m in zip((b, heads_q, i), dbias.shape, strict=False)]
                key = b.start if batch > 1 else 0, h.start if heads > 1 else 0, i.start
                region = regions.setdefault(key, _Region(dbias[tuple(cuts)], []))
                begin, end = max(i.start, place.rows.start), min(i.stop, place.rows.stop)
                if begin < end:
                    own_i = slice(begin - place.rows.start, end - place.rows.start)
                    piece = whole._replace(tiles=(Tile(whole.of, own_b, h, heads_q, own_i),))
                    region.parts.append((piece, slice(begin - i.start, end - i.start), place.keys))
    totals: dict[tuple[int, int, int], F32] = {}

    def worker() -> Callable[[tuple[int, int, int]], None]:
        space = Space()

        def compute(key: tuple[int, int, int]) -> None:
            total = regions[key].total(space)
            if rows > 1:
                regions[key].to[...] = total
            else:
                totals[key] = total

        return compute

    pairs = sum(piece.pairs() for region in regions.values() for piece, _, _ in region.parts)
    threads.each(worker, reversed(regions), pairs * (p.head_dim + p.head_dim_v) < forward._ONE_THREAD)
    merged: dict[tuple[int, int], F32] = {}
    for key in regions:  # where the bias is spread over queries, regions share their part of it
        if key in totals:
            merged[key[:2]] = merged.get(key[:2], np.float32(0.0)) + totals[key]
    for (of_b, of_h), total in merged.items():
        regions[of_b, of_h, 0].to[...] = total
