"""Attention on the CPU: the arguments of a call, cut into tiles that threads compute (cpu/tile.py).

A tile takes some queries of some heads of some batch entries. Tiles are cut by shapes alone and write to different
rows, so the same inputs give the same bits, with any number of threads.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from flashmoe_cupy.cpu import offsets, threads
from flashmoe_cupy.cpu.small import attend_small
from flashmoe_cupy.cpu.tile import Sequences, Tile, worker
from flashmoe_cupy.errors import UnsupportedProblem

if TYPE_CHECKING:
    from flashmoe_cupy.plan.attention.problem import AttentionProblem

Array = NDArray[Any]
F32 = NDArray[np.float32]

_ROWS = 512  # query rows of a tile at most, of all its heads and batch entries together
_MIN_ROWS = 64  # query rows of a tile at least, where there are so many
_TILES = 16  # tiles that a problem is cut into at least, if they still have _MIN_ROWS: so that threads have work
_VALUES = 1 << 20  # elements of keys, or of values, in float32 of all heads and batch entries of a tile, at most
_ONE_THREAD = 1 << 24  # multiplications of a call, up to which one thread is done before a second one is awake


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
    leftpad_q: Array | None = None,
    leftpad_k: Array | None = None,
) -> None:
    """Write the attention of a validated problem into out and, unless None, lse.

    q (batch, seqlen_q, heads_q, head_dim), k, v and out in the same axis order, or packed (total, heads, dim) when
    problem.varlen; bfloat16, float16 or float32 with any strides. lse (batch, heads_q, seqlen_q) or (heads_q, total_q),
    float32. bias broadcasts to (batch, heads_q, seqlen_q, seqlen_k). Rows with no visible key get 0 and -inf (the sink
    with sinks); rows that do not count are not written. Raises UnsupportedProblem for offsets and lengths that do not
    fit the arrays or the given maxima.
    """
    if problem.heads_q == 0:
        return
    plain = bias is None and alibi_slopes is None and sinks is None and problem.even
    if plain and attend_small(problem, q, k, v, out, lse):
        return
    slopes = sink = None
    if alibi_slopes is not None:
        slopes = np.broadcast_to(alibi_slopes.astype(np.float32), (problem.batch, problem.heads_q))
    if sinks is not None:
        sink = sinks.astype(np.float32)
    why: dict[str, str] = {}
    if problem.even:
        work = list(_tiles(Sequences(problem, q, k, v, out, lse, _four(bias), slopes, sink)))
    elif not problem.varlen:
        work = []
        counts_q = _counted(problem.seqlen_q, "q", problem.batch, leftpad_q, seqused_q, why)
        counts_k = _counted(problem.seqlen_k, "k", problem.batch, leftpad_k, seqused_k, why)
        if why:
            raise UnsupportedProblem(problem.describe(), [*why], "; ".join(why.values()))
        for b, (rows, keys) in enumerate(zip(counts_q, counts_k, strict=True)):
            one = slice(b, b + 1)
            own = (q[one, rows], k[one, keys], v[one, keys], out[one, rows])
            own_lse = None if lse is None else lse[one, :, rows]
            own_slopes = None if slopes is None else slopes[one]
            work += _tiles(Sequences(problem, *own, own_lse, _part(_four(bias), one, rows, keys), own_slopes, sink))
    else:
        work = []
        spans_q = _spans(problem, "q", cu_seqlens_q, seqused_q, why)
        spans_k = _spans(problem, "k", cu_seqlens_k, seqused_k, why)
        if why:
            raise UnsupportedProblem(problem.describe(), [*why], "; ".join(why.values()))
        for b, (rows, keys) in enumerate(zip(spans_q, spans_k, strict=True)):
            own = (q[None, rows], k[None, keys], v[None, keys], out[None, rows])
            own_lse = None if lse is None else lse[None, :, rows]
            own_slopes = None if slopes is None else slopes[b : b + 1]
            work += _tiles(Sequences(problem, *own, own_lse, None, own_slopes, sink))
    pairs = sum(t.pairs() for t in work)
    work.reverse()  # under a causal mask the last tiles take the longest
    threads.each(worker, work, one_thread=pairs * (problem.head_dim + problem.head_dim_v) < _ONE_THREAD)


def _four(bias: Array | None) -> Array | None:
    """bias with all four axes; along those of size 1 it is the same everywhere."""
    return None if bias is None else bias.reshape((1,) * (4 - bias.ndim) + bias.shape)


def _part(bias: Array | None, batch: slice, rows: slice, keys: slice) -> Array | None:
    """A part of a bias with four axes, which stays 1 along those where it is the same."""
    if bias is None:
        return None
    cuts = batch, slice(None), rows, keys
    return bias[tuple([slice(None) if n == 1 else cut for n, cut in zip(bias.shape, cuts, strict=True)])]


def _counted(
    seqlen: int, side: str, batch: int, leftpad: Array | None, seqused: Array | None, why: dict[str, str]
) -> list[slice]:
    """The rows of each batch entry that count. The lengths are in host memory here, so they are checked."""
    begins: list[int] = [0] * batch if leftpad is None else leftpad.tolist()
    ends: list[int] = [seqlen] * batch if seqused is None else seqused.tolist()
    if any(not 0 <= begin <= end <= seqlen for begin, end in zip(begins, ends, strict=True)):
        names = " and ".join(
            name for name, x in ((f"leftpad_{side}", leftpad), (f"seqused_{side}", seqused)) if x is not None
        )
        reason = f"{names} must lie between 0 and {seqlen}, the rows of {side}"
        if leftpad is not None and seqused is not None:
            reason += ", and leftpad must not be larger than seqused"
        why[reason] = f"rows leftpad_{side} ... seqused_{side} - 1 of an entry count"
    return [slice(begin, end) for begin, end in zip(begins, ends, strict=True)]


def _spans(
    problem: AttentionProblem, side: str, cu_seqlens: Array | None, seqused: Array | None, why: dict[str, str]
) -> list[slice]:
    """The used rows of each sequence. The offsets are in host memory here, so they are checked.

    why: each reason against them is added, with what would run.
    """
    total, longest = (problem.total_q, problem.seqlen_q) if side == "q" else (problem.total_k, problem.seqlen_k)
    ends: list[int] = [] if cu_seqlens is None else cu_seqlens.tolist()
    lengths = [b - a for a, b in itertools.pairwise(ends)]
    if not ends or ends[0] < 0 or ends[-1] > total or min(lengths, default=0) < 0:
        reason = f"cu_seqlens_{side} must not fall and must lie between 0 and {total}, the rows of {side}"
        why[reason] = f"cu_seqlens_{side} are the running sums of the lengths, from 0{offsets.repair(ends, total)}"
        return []  # there are no lengths to compare others with
    offsets.warn(f"cu_seqlens_{side}", ends, total)
    used: list[int] = lengths if seqused is None else seqused.tolist()
    if any(not 0 <= n <= m for n, m in zip(used, lengths, strict=True)):
        reason = f"seqused_{side} must lie between 0 and the length of each sequence"
        why[reason] = f"seqused_{side} are the first rows of each sequence that count"
    if max(used, default=0) > longest:
        reason = f"max_seqlen_{side} is {longest}, but the longest sequence has {max(used)} rows"
        why[reason] = f"max_seqlen_{side} is at least the longest sequence"
    return [slice(start, start + n) for start, n in zip(ends, used, strict=False)]


# ------------------------------------------------------------------------------------------------------------- tiling


def _tile_sizes(s: Sequences) -> tuple[int, int, int]:
    """Batch entries, key heads and queries of a tile: large tiles, but enough of them that every thread has work."""
    batch, seqlen_q, heads_q, dim = s.q.shape
    seqlen_k, heads_k, dim_v = s.v.shape[1:]
    group = heads_q // heads_k
    most = min(_ROWS, max(_MIN_ROWS, batch * heads_q * seqlen_q // _TILES))
    rows = max(1, min(seqlen_q, most // group))
    matrices = max(1, min(most // (rows * group), _VALUES // (max(1, seqlen_k) * max(dim, dim_v))))
    heads = min(heads_k, matrices)
    return (max(1, min(batch, matrices // heads)) if heads == heads_k else 1), heads, rows


def _tiles(s: Sequences) -> Iterator[Tile]:
    """All tiles of some sequences of equal lengths."""
    batch, seqlen_q, heads_q, _ = s.q.shape
    heads_k = s.v.shape[2]
    group = heads_q // heads_k
    size_b, size_h, size_q = _tile_sizes(s)
    for b in range(0, batch, size_b):
        for h in range(0, heads_k, size_h):
            heads_k_tile = slice(h, min(h + size_h, heads_k))
            heads_q_tile = slice(h * group, heads_k_tile.stop * group)
            for i in range(0, seqlen_q, size_q):
                rows = slice(i, min(i + size_q, seqlen_q))
                yield Tile(s, slice(b, min(b + size_b, batch)), heads_k_tile, heads_q_tile, rows)
