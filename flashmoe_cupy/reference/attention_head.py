"""Attention of one head of one sequence in float64 NumPy: forward and backward.

The formulas are those of FlashAttention-2 (Dao, arXiv 2307.08691): section 2.2 for the attention of one head and its
gradient, Algorithm 1 for the log-sum-exp L, Algorithm 2 for the backward pass that uses L and D = rowsum(dO o O).
One head has Q (seqlen_q, head_dim), K (seqlen_k, head_dim), V (seqlen_k, head_dim_v), S and P (seqlen_q, seqlen_k):

    X = softmax_scale * Q K^T                                   scaled dot products
    S = softcap * tanh(X / softcap)            if softcap > 0    (Gemma 2, arXiv 2408.00118)
    S = S - slope * |i + offset - j|           if ALiBi          (arXiv 2108.12409)
    S = S + bias                               if a float bias
    S = -inf                                   where key j is hidden from query i
    L = log(sum_j exp(S_ij) [+ exp(sink)])     P = exp(S - L)     O = P V

offset = seqlen_k - seqlen_q, so the last query stands at the last key. A query that sees no key has O = 0 and L = -inf
(L = sink with sinks). A hidden pair (i, j) takes part in no sum, so a NaN in a key or value that a query does not see
never reaches that query. (The GPU kernels promise this only of keys in other sequences and beyond the end: hidden keys
among visible ones must be finite there.)
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
AnyArray = NDArray[Any]


class Rules(NamedTuple):
    """What is the same for all heads and sequences of a call."""

    causal: bool
    window_size: tuple[int, int]  # keys that a query sees left and right of its own place; -1: all
    softmax_scale: float
    softcap: float  # 0: none


class Head(NamedTuple):
    """The arrays of one query head of one sequence; None: the call has no such argument."""

    q: Array  # (seqlen_q, head_dim)
    k: Array  # (seqlen_k, head_dim)
    v: Array  # (seqlen_k, head_dim_v)
    sink: float | None
    slope: float | None  # of ALiBi
    bias: AnyArray | None  # (seqlen_q, seqlen_k), float64 to add, or bool: True attends


# ------------------------------------------------------------------------------------------------------------- forward


def _visible(seqlen_q: int, seqlen_k: int, rules: Rules) -> NDArray[np.bool_]:
    """(seqlen_q, seqlen_k), True where query i sees key j by the causal rule and the window."""
    left, right = rules.window_size
    if rules.causal:
        right = 0  # a causal mask closes the right side whatever the window allows
    i = np.arange(seqlen_q)[:, None] + (seqlen_k - seqlen_q)
    j = np.arange(seqlen_k)[None, :]
    visible = np.ones((seqlen_q, seqlen_k), dtype=np.bool_)
    if right >= 0:
        visible &= j <= i + right
    if left >= 0:
        visible &= j >= i - left
    return visible


def _scores(head: Head, rules: Rules) -> tuple[Array, Array]:
    """S, and dS/dX, which is 1 without softcap and 1 - tanh^2 with it; both (seqlen_q, seqlen_k)."""
    seqlen_q, seqlen_k = len(head.q), len(head.k)
    s = rules.softmax_scale * (head.q @ head.k.T)
    ds_dx = np.ones_like(s)
    if rules.softcap > 0.0:
        t = np.tanh(s / rules.softcap)
        s = rules.softcap * t
        ds_dx = 1.0 - t * t
    if head.slope is not None:
        i = np.arange(seqlen_q)[:, None] + (seqlen_k - seqlen_q)
        s = s - head.slope * np.abs(i - np.arange(seqlen_k)[None, :])
    visible = _visible(seqlen_q, seqlen_k, rules)
    if head.bias is not None and head.bias.dtype == np.bool_:
        visible &= head.bias
    elif head.bias is not None:
        s = s + head.bias
    return np.where(visible, s, -np.inf), ds_dx


class _Softmax(NamedTuple):
    p: Array  # (seqlen_q, seqlen_k), 0 for hidden pairs
    sink: Array  # (seqlen_q,), the sink's share of each row; 0 without a sink
    lse: Array  # (seqlen_q,)


def _softmax(s: Array, sink: float | None) -> _Softmax:
    """P, the sink's part and L_i = log(sum_j exp(S_ij) + exp(sink)), by the largest term. Algorithm 1, line 13.

    P is divided by the sum of its row and not taken from L: beside a score of 1e15 float64 has no room for log(sum).
    """
    terms = s if sink is None else np.concatenate([s, np.full((len(s), 1), sink)], axis=1)
    m = np.max(terms, axis=1, initial=-np.inf)
    m = np.where(m == -np.inf, 0.0, m)  # no term at all: log(0) = -inf below, not -inf - (-inf)
    e = np.exp(terms - m[:, None])
    total = np.sum(e, axis=1)
    p = e / np.where(total == 0.0, 1.0, total)[:, None]
    return _Softmax(p[:, : s.shape[1]], p[:, s.shape[1] :].sum(axis=1), m + np.log(total))


def _softmax_of(s: Array, sink: float | None, lse: Array) -> _Softmax:
    """The same for a log-sum-exp that is given: P = exp(S - L), 0 in rows with no visible key. Algorithm 2, line 11."""
    safe = np.where(lse == -np.inf, 0.0, lse)
    p_sink = np.zeros_like(lse) if sink is None else np.exp(sink - lse)
    return _Softmax(np.exp(s - safe[:, None]), p_sink, lse)


def _weighted_sum(weights: Array, values: Array, counts: NDArray[np.bool_]) -> Array:
    """weights @ values over the pairs that count; 0 * NaN of a pair that does not count is left out."""
    clean = np.isfinite(values).all(axis=1)
    total: Array = np.where(counts, weights, 0.0)[:, clean] @ values[clean]
    for j in np.flatnonzero(~clean):
        rows = counts[:, j]
        total[rows] += weights[rows, j, None] * values[j]
    return total


def forward(head: Head, rules: Rules) -> tuple[Array, Array]:
    """O (seqlen_q, head_dim_v) and L (seqlen_q,) of one head. Section 2.2, and Algorithm 1 for L."""
    s, _ = _scores(head, rules)
    softmax = _softmax(s, head.sink)
    return _weighted_sum(softmax.p, head.v, s != -np.inf), softmax.lse


# ------------------------------------------------------------------------------------------------------------ backward


class HeadGradients(NamedTuple):
    dq: Array
    dk: Array
    dv: Array
    dsink: float
    ds: Array


def backward(
    head: Head, rules: Rules, dout: Array, dlse: Array, out: Array, lse: Array | None
) -> HeadGradients:
    """Algorithm 2 without its tiles. dS = P o (dP - D) is the gradient of S, hence of the bias. lse None: the true one.

    A gradient that arrives at L adds P o dL to dS, since dL/dS = P: it is subtracted from D. The sink is a score
    without a value, so its dP is 0 and its gradient is -P_sink * D summed over the queries.
    """
    s, ds_dx = _scores(head, rules)
    counts = s != -np.inf
    p, p_sink, _ = _softmax(s, head.sink) if lse is None else _softmax_of(s, head.sink, lse)
    dv = _weighted_sum(p.T, dout, counts.T)  # dV = P^T dO, line 12
    dp = dout @ head.v.T  # dP = dO V^T, line 13
    d = np.sum(dout * out, axis=1) - dlse  # D = rowsum(dO o O), line 4
    ds = np.where(counts, p * (dp - d[:, None]), 0.0)  # dS = P o (dP - D), line 14
    dx = ds * ds_dx
    dq = rules.softmax_scale * _weighted_sum(dx, head.k, counts)  # dQ = dS K, line 15
    dk = rules.softmax_scale * _weighted_sum(dx.T, head.q, counts.T)  # dK = dS^T Q, line 16
    dsink = 0.0
    if head.sink is not None and head.sink != -np.inf:
        dsink = float(-np.sum(p_sink * d))
    return HeadGradients(dq, dk, dv, dsink, ds)
