"""Small attention on the CPU: all scores at once, in as few calls of NumPy as possible."""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from flashmoe_cupy.cpu.convert import widened
from flashmoe_cupy.cpu.threads import SINGLE, SINGLE_VECTOR

if TYPE_CHECKING:
    from flashmoe_cupy.plan.attention.problem import AttentionProblem

Array = NDArray[Any]
F32 = NDArray[np.float32]

_SCORES = 1 << 14  # scores of a small problem, at most
_KEYS = 512  # keys of one, at most: BLAS adds key after key, and its error grows with their number


def attend_small(p: AttentionProblem, q: Array, k: Array, v: Array, out: Array, lse: F32 | None) -> bool:
    """Write out and lse, or return False: the problem is large, or a row sees no key or a NaN. Axes as in `attention`.

    The problem has no bias, slopes or sinks and is not packed.
    """
    rows, keys = p.heads_q // p.heads_k * p.seqlen_q, p.seqlen_k
    if p.batch * p.heads_k * rows * keys > _SCORES or not 0 < keys <= _KEYS:
        return False
    most = SINGLE if rows > 1 and keys > 1 else SINGLE_VECTOR
    if rows * keys * max(p.head_dim, p.head_dim_v) > most:
        return False
    hidden, empty = _hidden(p.seqlen_q, keys, p.window_left, p.window_right)
    if empty:
        return False
    a, b, c = (x.transpose(0, 2, 1, 3) for x in (q, k, v))
    if a.dtype != np.float32:
        a, b, c = widened(a), widened(b), widened(c)
    with np.errstate(all="ignore"):
        if p.heads_q != p.heads_k:
            a = a.reshape(p.batch, p.heads_k, rows, p.head_dim)
        x: F32 = np.matmul(a, b.swapaxes(2, 3))
        x *= np.float32(p.softmax_scale / p.softcap if p.softcap else p.softmax_scale)
        if p.softcap:
            np.tanh(x, out=x)
            x *= np.float32(p.softcap)
        if hidden is not None:
            np.copyto(x.reshape(p.batch, -1, p.seqlen_q, keys), -np.inf, where=hidden)
        m = np.maximum.reduce(x, axis=3, keepdims=True)
        x -= m
        np.exp(x, out=x)
        total = np.add.reduce(x, axis=3, keepdims=True)
        values = np.matmul(x, c)
        values /= total
        if not np.logical_and.reduce(np.isfinite(values), axis=None):
            return False
        if lse is not None:
            np.log(total, out=total)
            total += m
            lse[...] = total.reshape(lse.shape)
        out[...] = values.reshape(p.batch, p.heads_q, p.seqlen_q, p.head_dim_v).transpose(0, 2, 1, 3)
    return True


@lru_cache(maxsize=64)
def _hidden(seqlen_q: int, seqlen_k: int, left: int, right: int) -> tuple[NDArray[np.bool_] | None, bool]:
    """The pairs that a window hides (None: it hides none), and whether a query sees no key at all."""
    i, j = np.arange(seqlen_q)[:, None] + (seqlen_k - seqlen_q), np.arange(seqlen_k)
    hidden = np.zeros((seqlen_q, seqlen_k), np.bool_)
    if right >= 0:
        hidden |= j > i + right
    if left >= 0:
        hidden |= j < i - left
    return hidden if hidden.any() else None, bool(hidden.all(axis=1).any())
