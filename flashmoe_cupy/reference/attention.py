"""Attention in float64 NumPy: forward and backward, fixed length and packed sequences, all heads one by one.

attention_head.py has the formulas. Query head h uses key head h // (heads_q // heads_k).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from flashmoe_cupy.reference.attention_head import AnyArray, Array, Head, Rules, backward, forward


class AttentionGradients(NamedTuple):
    """Gradients of a scalar loss, float64, each in the shape and layout of its argument; None if that was not given."""

    dq: Array
    dk: Array
    dv: Array
    dsinks: Array | None
    dbias: Array | None


# ------------------------------------------------------------------------------------------- all heads, all sequences


class _Cuts(NamedTuple):
    """How an array is cut into one view per sequence: rows of q and out, rows of k and v, and lse."""

    q: Callable[[Array], list[Array]]
    k: Callable[[Array], list[Array]]
    lse: Callable[[Array], list[Array]]
    bias: Callable[[Array], list[Array]]  # of (batch, heads, seqlen_q, seqlen_k), in all heads




class _Padding(NamedTuple):
    """Which rows of a batch entry count: leftpad .. seqused - 1; None: from the first row, or to the last."""

    seqused_q: AnyArray | None
    seqused_k: AnyArray | None
    leftpad_q: AnyArray | None
    leftpad_k: AnyArray | None


class _Call:
    """The arguments of a call in float64; q, k, v are (batch, seqlen, heads, dim) or packed (total, heads, dim)."""

    def __init__(
        self,
        cuts: _Cuts,
        arrays: tuple[AnyArray, AnyArray, AnyArray],
        causal: bool,
        window_size: tuple[int, int],
        softmax_scale: float | None,
        softcap: float,
        sinks: AnyArray | None,
        alibi_slopes: AnyArray | None,
        bias: AnyArray | None,
    ) -> None:
        self.cuts = cuts
        self.q, self.k, self.v = (_f64(a) for a in arrays)
        self.rules = _rules(self.q.shape[-1], causal, window_size, softmax_scale, softcap)
        self.heads = self.q.shape[-2]
        self.group = self.heads // max(self.k.shape[-2], 1)
        self.batch = len(cuts.q(self.q))
        self.lse_shape = (*self.q.shape[:-3], self.heads, self.q.shape[-3])
        self.sinks = None if sinks is None else _f64(sinks)
        self.slopes = alibi_slopes
        if alibi_slopes is not None:
            self.slopes = np.broadcast_to(_f64(alibi_slopes), (self.batch, self.heads))
        self.bias = bias
        if bias is not None:
            if bias.ndim not in (2, 3, 4):
                raise ValueError(f"bias must have 2, 3 or 4 dimensions, got {bias.shape}")
            bias = bias if bias.dtype == np.bool_ else _f64(bias)
            self.bias = np.broadcast_to(bias, (*self.lse_shape, self.k.shape[1]))

    def head(self, b: int, h: int) -> Head:
        g = h // self.group
        return Head(
            q=self.cuts.q(self.q)[b][:, h],
            k=self.cuts.k(self.k)[b][:, g],
            v=self.cuts.k(self.v)[b][:, g],
            sink=None if self.sinks is None else float(self.sinks[h]),
            slope=None if self.slopes is None else float(self.slopes[b, h]),
            bias=None if self.bias is None else self.cuts.bias(self.bias)[b][h],
        )

    def forward(self) -> tuple[Array, Array]:
        """out and lse; rows of no sequence hold 0 and -inf."""
        out = np.zeros((*self.q.shape[:-1], self.v.shape[-1]))
        lse = np.full(self.lse_shape, -np.inf)
        outs, lses = self.cuts.q(out), self.cuts.lse(lse)
        for b in range(self.batch):
            for h in range(self.heads):
                with np.errstate(all="ignore"):
                    outs[b][:, h], lses[b][h] = forward(self.head(b, h), self.rules)
        return out, lse

    def backward(
        self, dout: AnyArray, dlse: AnyArray | None, out: AnyArray | None, lse: AnyArray | None
    ) -> tuple[Array, Array, Array, Array | None, Array | None]:
        """dq, dk, dv, dsinks and the gradient of the whole (batch, heads_q, seqlen_q, seqlen_k) float bias."""
        if out is None:
            out = self.forward()[0]
        dlse = np.zeros(self.lse_shape) if dlse is None else dlse
        douts, outs = self.cuts.q(_f64(dout)), self.cuts.q(_f64(out))
        dlses, lses = self.cuts.lse(_f64(dlse)), None if lse is None else self.cuts.lse(_f64(lse))
        dq, dk, dv = np.zeros_like(self.q), np.zeros_like(self.k), np.zeros_like(self.v)
        dqs, dks, dvs = self.cuts.q(dq), self.cuts.k(dk), self.cuts.k(dv)
        dsinks = None if self.sinks is None else np.zeros_like(self.sinks)
        dbias = None if self.bias is None or self.bias.dtype == np.bool_ else np.zeros(self.bias.shape)
        for b in range(self.batch):
            for h in range(self.heads):
                with np.errstate(all="ignore"):
                    grad = backward(
                        self.head(b, h), self.rules, douts[b][:, h], dlses[b][h], outs[b][:, h],
                        None if lses is None else lses[b][h],
                    )  # fmt: skip
                dqs[b][:, h] = grad.dq
                dks[b][:, h // self.group] += grad.dk  # all query heads of a group share the key head
                dvs[b][:, h // self.group] += grad.dv
                if dsinks is not None:
                    dsinks[h] += grad.dsink
                if dbias is not None:
                    self.cuts.bias(dbias)[b][h] = grad.ds
        return dq, dk, dv, dsinks, dbias


# ---------------------------------------------------------------------------------------------------------- arguments


def _f64(array: AnyArray) -> Array:
    return np.asarray(array).astype(np.float64)


def _rules(
    head_dim: int, causal: bool, window_size: tuple[int, int], softmax_scale: float | None, softcap: float
) -> Rules:
    left, right = window_size
    if left < -1 or right < -1:
        raise ValueError(f"window_size must hold two integers >= -1, got {window_size}")
    if not (softcap >= 0.0 and math.isfinite(softcap)):
        raise ValueError(f"softcap must be finite and >= 0, got {softcap}")
    scale = head_dim**-0.5 if softmax_scale is None else float(softmax_scale)
    if not math.isfinite(scale):
        raise ValueError(f"softmax_scale must be finite, got {softmax_scale}")
    return Rules(bool(causal), (int(left), int(right)), scale, float(softcap))


def _check_shapes(q: AnyArray, k: AnyArray, v: AnyArray, ndim: int) -> None:
    shapes = f"q {q.shape}, k {k.shape}, v {v.shape}"
    if not q.ndim == k.ndim == v.ndim == ndim:
        raise ValueError(f"q, k and v must have {ndim} dimensions: {shapes}")
    if k.shape[:-1] != v.shape[:-1] or q.shape[-1] != k.shape[-1] or (ndim == 4 and q.shape[0] != k.shape[0]):
        raise ValueError(f"q, k and v do not fit together: {shapes}")
    if q.shape[-2] != 0 and (k.shape[-2] == 0 or q.shape[-2] % k.shape[-2] != 0):
        raise ValueError(f"the heads of q must be a multiple of the heads of k: {shapes}")


def _bshd(array: AnyArray, layout: str) -> AnyArray:
    """To and from (batch, seqlen, heads, dim): the same swap serves both ways."""
    if layout not in ("bshd", "bhsd"):
        raise ValueError(f'layout must be "bshd" or "bhsd", got {layout!r}')
    return array if layout == "bshd" else np.swapaxes(array, 1, 2)


def _sum_to(array: Array, shape: tuple[int, ...]) -> Array:
    """The gradient of broadcasting: sum over the axes that were spread."""
    array = np.sum(array, axis=tuple(range(array.ndim - len(shape))))
    spread = tuple(axis for axis, n in enumerate(shape) if n == 1 and array.shape[axis] != 1)
    total: Array = np.sum(array, axis=spread, keepdims=True)
    return total


def _spans(cu_seqlens: AnyArray, seqused: AnyArray | None, total: int, max_seqlen: int, name: str) -> list[slice]:
    """The used rows of each sequence in the packed array."""
    ends = [int(n) for n in np.asarray(cu_seqlens)]
    used = lengths = [b - a for a, b in itertools.pairwise(ends)]
    if not ends or ends[0] < 0 or ends[-1] > total or any(n < 0 for n in lengths):
        raise ValueError(f"cu_seqlens_{name} must rise from >= 0 to <= {total}, got {ends}")
    if seqused is not None:
        used = [int(n) for n in np.asarray(seqused)]
        if len(used) != len(lengths) or any(not 0 <= n <= m for n, m in zip(used, lengths, strict=True)):
            raise ValueError(f"seqused_{name} must lie between 0 and the sequence lengths {lengths}, got {used}")
    if any(n > max_seqlen for n in used):
        raise ValueError(f"max_seqlen_{name} = {max_seqlen} is less than the longest sequence, {max(used)}")
    return [slice(start, start + n) for start, n in zip(ends, used, strict=False)]


def _packed(spans_q: list[slice], spans_k: list[slice]) -> _Cuts:
    if len(spans_q) != len(spans_k):
        raise ValueError(f"cu_seqlens_q has {len(spans_q)} sequences and cu_seqlens_k {len(spans_k)}")
    return _Cuts(
        q=lambda a: [a[rows] for rows in spans_q],
        k=lambda a: [a[rows] for rows in spans_k],
        lse=lambda a: [a[:, rows] for rows in spans_q],
        bias=list,
    )


def _padded(lengths: _Padding, seqlen_q: int, seqlen_k: int, batch: int) -> _Cuts:
    rows = _counted(lengths.leftpad_q, lengths.seqused_q, seqlen_q, batch, "q")
    keys = _counted(lengths.leftpad_k, lengths.seqused_k, seqlen_k, batch, "k")
    return _Cuts(
        q=lambda a: [one[own] for one, own in zip(a, rows, strict=True)],
        k=lambda a: [one[own] for one, own in zip(a, keys, strict=True)],
        lse=lambda a: [one[:, own] for one, own in zip(a, rows, strict=True)],
        bias=lambda a: [one[:, own, its] for one, own, its in zip(a, rows, keys, strict=True)],
    )


def _counted(
    leftpad: AnyArray | None, seqused: AnyArray | None, seqlen: int, batch: int, name: str
) -> list[slice]:  # fmt: skip
    """The rows of each batch entry that count."""
    begins = [0] * batch if leftpad is None else [int(n) for n in np.asarray(leftpad)]
    ends = [seqlen] * batch if seqused is None else [int(n) for n in np.asarray(seqused)]
    if len(begins) != batch or len(ends) != batch:
        raise ValueError(f"leftpad_{name} and seqused_{name} must have shape ({batch},)")
    if any(not 0 <= begin <= end <= seqlen for begin, end in zip(begins, ends, strict=True)):
        raise ValueError(f"0 <= leftpad_{name} <= seqused_{name} <= {seqlen} must hold, got {begins} and {ends}")
    return [slice(begin, end) for begin, end in zip(begins, ends, strict=True)]


# ------------------------------------------------------------------------------------------------------------- public


def flash_attention(
    q: AnyArray,
    k: AnyArray,
    v: AnyArray,
    *,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softmax_scale: float | None = None,
    softcap: float = 0.0,
    sinks: AnyArray | None = None,
    alibi_slopes: AnyArray | None = None,
    bias: AnyArray | None = None,
    seqused_q: AnyArray | None = None,
    seqused_k: AnyArray | None = None,
    leftpad_q: AnyArray | None = None,
    leftpad_k: AnyArray | None = None,
    layout: str = "bshd",
    return_lse: bool = False,
) -> Any:
    """Attention of q (batch, seqlen_q, heads_q, head_dim) over k and v, in float64.

    k is (batch, seqlen_k, heads_k, head_dim), v (batch, seqlen_k, heads_k, head_dim_v); layout "bhsd" swaps axes 1 and
    2 of all. Any NumPy float dtype. bias broadcasts to (batch, heads_q, seqlen_q, seqlen_k); bool means True = attend.
    Of batch entry b only rows leftpad[b] .. seqused[b] - 1 count, all four (batch,); causal, window and slopes are
    aligned at the ends of what counts, and rows that do not count hold 0 and -inf.
    Returns out (batch, seqlen_q, heads_q, head_dim_v) in the same layout, or (out, lse) with lse (batch, heads_q,
    seqlen_q), natural logarithm. Raises ValueError for shapes or options that do not fit.
    """
    q, k, v = (_bshd(np.asarray(a), layout) for a in (q, k, v))
    _check_shapes(q, k, v, 4)
    cuts = _padded(_Padding(seqused_q, seqused_k, leftpad_q, leftpad_k), q.shape[1], k.shape[1], len(q))
    call = _Call(cuts, (q, k, v), causal, window_size, softmax_scale, softcap, sinks, alibi_slopes, bias)
    out, lse = call.forward()
    return (_bshd(out, layout), lse) if return_lse else _bshd(out, layout)


def attention_lse(q: AnyArray, k: AnyArray, **options: Any) -> Any:
    """The log-sum-exp of the scores alone, (batch, heads_q, seqlen_q); arguments as in `flash_attention`."""
    return flash_attention(q, k, k, return_lse=True, **options)[1]


def flash_attention_backward(
    dout: AnyArray,
    q: AnyArray,
    k: AnyArray,
    v: AnyArray,
    out: AnyArray | None = None,
    lse: AnyArray | None = None,
    *,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softmax_scale: float | None = None,
    softcap: float = 0.0,
    sinks: AnyArray | None = None,
    alibi_slopes: AnyArray | None = None,
    bias: AnyArray | None = None,
    seqused_q: AnyArray | None = None,
    seqused_k: AnyArray | None = None,
    leftpad_q: AnyArray | None = None,
    leftpad_k: AnyArray | None = None,
    layout: str = "bshd",
    dlse: AnyArray | None = None,
) -> AttentionGradients:
    """Gradients of sum(dout * out) + sum(dlse * lse), float64. FlashAttention-2, Algorithm 2.

    dout has the shape of out; dlse (batch, heads_q, seqlen_q) is the gradient that arrives at lse, None = 0. out and
    lse are used as given; None computes them here in float64, which is the truth free of their rounding. dsinks is
    (heads_q,), dbias has the shape of bias (None for a bool bias). Raises ValueError for what does not fit.
    """
    q, k, v, dout = (_bshd(np.asarray(a), layout) for a in (q, k, v, dout))
    _check_shapes(q, k, v, 4)
    cuts = _padded(_Padding(seqused_q, seqused_k, leftpad_q, leftpad_k), q.shape[1], k.shape[1], len(q))
    call = _Call(cuts, (q, k, v), causal, window_size, softmax_scale, softcap, sinks, alibi_slopes, bias)
    out = None if out is None else _bshd(np.asarray(out), layout)
    dq, dk, dv, dsinks, dbias = call.backward(dout, dlse, out, lse)
    if dbias is not None and bias is not None:
        dbias = _sum_to(dbias, bias.shape)
    return AttentionGradients(_bshd(dq, layout), _bshd(dk, layout), _bshd(dv, layout), dsinks, dbias)


def flash_attention_varlen(
    q: AnyArray,
    k: AnyArray,
    v: AnyArray,
    *,
    cu_seqlens_q: AnyArray,
    cu_seqlens_k: AnyArray,
    max_seqlen_q: int,
    max_seqlen_k: int,
    seqused_q: AnyArray | None = None,
    seqused_k: AnyArray | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softmax_scale: float | None = None,
    softcap: float = 0.0,
    sinks: AnyArray | None = None,
    alibi_slopes: AnyArray | None = None,
    return_lse: bool = False,
) -> Any:
    """Attention inside each of the packed sequences, in float64.

    q (total_q, heads_q, head_dim), k (total_k, heads_k, head_dim), v (total_k, heads_k, head_dim_v). Sequence b owns
    the rows cu_seqlens[b]:cu_seqlens[b + 1], of which the first seqused[b] count (all without seqused). Returns out
    (total_q, heads_q, head_dim_v), or (out, lse) with lse (heads_q, total_q); rows of no sequence hold 0 and -inf.
    Raises ValueError for lengths, shapes or options that do not fit.
    """
    q, k, v = (np.asarray(a) for a in (q, k, v))
    _check_shapes(q, k, v, 3)
    spans_q = _spans(cu_seqlens_q, seqused_q, len(q), max_seqlen_q, "q")
    spans_k = _spans(cu_seqlens_k, seqused_k, len(k), max_seqlen_k, "k")
    cuts = _packed(spans_q, spans_k)
    call = _Call(cuts, (q, k, v), causal, window_size, softmax_scale, softcap, sinks, alibi_slopes, None)
    out, lse = call.forward()
    return (out, lse) if return_lse else out


def flash_attention_varlen_backward(
    dout: AnyArray,
    q: AnyArray,
    k: AnyArray,
    v: AnyArray,
    out: AnyArray | None = None,
    lse: AnyArray | None = None,
    *,
    cu_seqlens_q: AnyArray,
    cu_seqlens_k: AnyArray,
    max_seqlen_q: int,
    max_seqlen_k: int,
    seqused_q: AnyArray | None = None,
    seqused_k: AnyArray | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softmax_scale: float | None = None,
    softcap: float = 0.0,
    sinks: AnyArray | None = None,
    alibi_slopes: AnyArray | None = None,
    dlse: AnyArray | None = None,
) -> AttentionGradients:
    """The gradients of flash_attention_varlen, with the conventions of flash_attention_backward; dbias is None."""
    q, k, v = (np.asarray(a) for a in (q, k, v))
    _check_shapes(q, k, v, 3)
    spans_q = _spans(cu_seqlens_q, seqused_q, len(q), max_seqlen_q, "q")
    spans_k = _spans(cu_seqlens_k, seqused_k, len(k), max_seqlen_k, "k")
    cuts = _packed(spans_q, spans_k)
    call = _Call(cuts, (q, k, v), causal, window_size, softmax_scale, softcap, sinks, alibi_slopes, None)
    dq, dk, dv, dsinks, _ = call.backward(dout, dlse, out, lse)
    return AttentionGradients(dq, dk, dv, dsinks, None)
