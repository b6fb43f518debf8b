"""Scaled dot-product attention on arrays of any library.

A call runs in three steps: arrays become views, the views' shapes and the options find a plan (validated once, then
remembered), and the plan launches a kernel on the caller's stream or runs the NumPy back end.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Literal, SupportsIndex, Unpack, overload

import numpy as np
from numpy.typing import NDArray

from flashmoe_cupy import arrays, dtypes
from flashmoe_cupy._types import Array, Dense, Kind, Layout, Packed, Shape, Window
from flashmoe_cupy.arrays import View, row_major, view
from flashmoe_cupy.errors import UnsupportedProblem
from flashmoe_cupy.ops.names import no_argument, strict
from flashmoe_cupy.ops.plans import adapter, check_overlap
from flashmoe_cupy.ops.quick import Quick, Recent, find
from flashmoe_cupy.ops.unreadable import told, unreadable
from flashmoe_cupy.plan import kernels
from flashmoe_cupy.plan.attention.problem import AttentionProblem, attention_problem, varlen_problem
from flashmoe_cupy.plan.kernel import Step, same
from flashmoe_cupy.plan.options import exact, is_window

if TYPE_CHECKING:
    from flashmoe_cupy.jit.launch import Launch

_OPTIONAL = ("bias", "alibi_slopes", "sinks", "cu_seqlens_q", "cu_seqlens_k", "seqused_q", "seqused_k")
_MAX_PLANS = 4096  # distinct shapes that are remembered
_UNLIMITED = (-1, -1)
_NumPy = np.ndarray[Shape, Kind]
_Pair = tuple[np.ndarray[Shape, Kind], NDArray[np.float32]]


@overload
def flash_attention(
    q: Array, k: Array, v: Array, *, return_lse: Literal[False] = False, out: Array | None = None,
    **options: Unpack[Dense],
) -> Array: ...  # fmt: skip
@overload
def flash_attention(
    q: _NumPy[Shape, Kind], k: _NumPy[Any, Kind], v: _NumPy[Any, Kind], *, return_lse: Literal[True],
    out: _NumPy[Any, Kind] | None = None, **options: Unpack[Dense],
) -> _Pair[Shape, Kind]: ...  # fmt: skip
@overload
def flash_attention(
    q: Array, k: Array, v: Array, *, return_lse: Literal[True], out: Array | None = None, **options: Unpack[Dense]
) -> tuple[Array, Array]: ...
@overload
def flash_attention(
    q: Array, k: Array, v: Array, *, return_lse: bool, out: Array | None = None, **options: Unpack[Dense]
) -> Array | tuple[Array, Any]: ...
@strict
def flash_attention(
    q: Any,
    k: Any,
    v: Any,
    *,
    causal: bool = False,
    window_size: Window = _UNLIMITED,
    softmax_scale: float | None = None,
    softcap: float = 0.0,
    sinks: Any = None,
    alibi_slopes: Any = None,
    bias: Any = None,
    layout: Layout = "bshd",
    return_lse: bool = False,
    out: Any = None,
    **unknown: object,
) -> Any:
    """softmax(softmax_scale * q k^T, modified and masked) v, exactly, in O(seqlen) memory.

    Arrays are NumPy, CuPy, torch or JAX (or have `__dlpack__`), all of one library on one device; the result is too.
    GPU arrays run a CUDA kernel on the library's current stream, host arrays run the NumPy back end. Nothing is copied
    between host and device, and nothing waits.

    q: (batch, seqlen_q, heads_q, head_dim), bfloat16, float16 or float32, like k and v. layout="bhsd" swaps axes 1, 2.
    k: (batch, seqlen_k, heads_k, head_dim); query head h reads key head h // (heads_q // heads_k), a whole ratio.
    v: (batch, seqlen_k, heads_k, head_dim_v). head_dim is a multiple of 8 up to 256, head_dim_v up to 512. Any strides
        whose last dimension is contiguous, also 0; lengths and batch from 0 on.
    causal: query i sees key j only if j <= i + seqlen_k - seqlen_q (aligned at the bottom right).
    window_size: (left, right), -1 = unlimited; query i sees keys i + seqlen_k - seqlen_q - left ... + right. Beside
        causal both rules hold, so that right > 0 adds no key.
    softmax_scale: factor of q.k; None = head_dim ** -0.5.
    softcap: s -> softcap * tanh(s / softcap) after the scale; 0 = off.
    sinks: (heads_q,), float32 or q's dtype: one more logit per head that takes part in the softmax and adds no value.
    alibi_slopes: (heads_q,) or (batch, heads_q), float32: adds -slope * |i + seqlen_k - seqlen_q - j|.
    bias: 2 to 4 dimensions that broadcast to (batch, heads_q, seqlen_q, seqlen_k), with missing ones in front, as in
        NumPy; one number per key is (1, seqlen_k). q's dtype or float32 is added to the scores, bool keeps the pairs
        that are True. Any strides.
    out: array of q's library for the result, overwritten; None = a new one. Not for JAX, whose arrays are immutable.

    Returns out (batch, seqlen_q, heads_q, head_dim_v) in q's dtype and layout; with return_lse also the float32 natural
    logarithm of the softmax's denominator, (batch, heads_q, seqlen_q), sinks included. A query that sees no key gives
    out 0 and lse -inf (with sinks: the sink). The same inputs give the same bits in every run.

    Hidden keys: k and v of a key that causal, window_size or bias hides from a query must be finite. On GPUs such a key
    may lie in a tile with others that the query sees; it then has weight 0, and 0 * NaN is NaN. NumPy leaves it out.
    What lies beyond the arrays or in another sequence, head or batch never counts, NaN included; only the last bit of a
    result may depend on it.

    Names elsewhere: is_causal is causal; scale and sm_scale are softmax_scale; mask, attn_mask and attn_bias are bias;
    sliding_window and local_window_size are window_size; s_aux is sinks. enable_gqa follows from the shapes, and there
    is no dropout_p.

    Raises UnsupportedProblem (a ValueError) with every reason, DependencyError when CuPy or a driver is missing.
    Nothing is written on error. There is no gradient yet: torch tensors that require one are refused in grad mode.

    Algorithm: FlashAttention-2 (Dao 2023, arXiv:2307.08691), algorithm 1; window as in its code; softcap as in Gemma 2;
    sinks as in gpt-oss; ALiBi as in Press et al. (arXiv:2108.12409).
    """
    if unknown:
        raise no_argument(flash_attention, unknown)
    # What is remembered is found by options of exact types only, for 1 == True == 1.0.
    right = (
        (window_size is _UNLIMITED or is_window(window_size))
        and (softmax_scale is None or type(softmax_scale) is float)
        and type(softcap) is float
        and type(layout) is str
        and type(causal) is type(return_lse) is bool
    )
    if not right:
        read: Any = exact({
            "causal": causal, "window_size": window_size, "softmax_scale": softmax_scale, "softcap": softcap,
            "layout": layout, "return_lse": return_lse,
        })  # fmt: skip
        if read is not None:
            right = True
            causal, window_size, softmax_scale, softcap, layout, return_lse = read.values()
    quick = options = short = None
    if right and sinks is None and alibi_slopes is None and bias is None and out is None:
        quick = find(type(q))
        if quick is not None:
            wanted = (causal, window_size, softmax_scale, softcap, layout, return_lse)
            if quick.guards:
                plan = _recent.find((q, k, v), wanted)
                if plan is not None:
                    return plan.run_quick(quick, q, k, v)
            short = quick.key(q, k, v)
            if short is not None:
                options = (short, wanted)
                plan = _plans.get(options)
                if plan is not None:
                    if quick.host:
                        return plan.run_numpy(q, k, v)
                    _recent.note(quick, (q, k, v), wanted, plan)
                    return plan.run_quick(quick, q, k, v)
    other = adapter(q)
    if other is not None:
        return other.flash_attention(
            q, k, v, causal=causal, window_size=window_size, softmax_scale=softmax_scale, softcap=softcap, sinks=sinks,
            alibi_slopes=alibi_slopes, bias=bias, layout=layout, return_lse=return_lse, out=out,
        )  # fmt: skip
    try:
        vq, vk, vv = view(q, "q"), view(k, "k"), view(v, "v")
        vo = None if out is None else view(out, "out")
        vs = None if sinks is None else view(sinks, "sinks")
        va = None if alibi_slopes is None else view(alibi_slopes, "alibi_slopes")
        vb = None if bias is None else view(bias, "bias")
    except (UnsupportedProblem, TypeError) as error:
        raise unreadable("flash_attention", locals(), error) from None
    key = (
        vq[1:6], vk[1:6], vv[1:6], causal, window_size, softmax_scale, softcap, layout, return_lse,
        vo and vo[1:7], vs and vs[1:6], va and va[1:6], vb and vb[1:6],
    )  # fmt: skip
    plan = _plans.get(key) if right else None
    if plan is None:
        problem = attention_problem(
            vq, vk, vv, causal=causal, window_size=window_size, softmax_scale=softmax_scale, softcap=softcap,
            sinks=vs, alibi_slopes=va, bias=vb, layout=layout, return_lse=return_lse, out=vo,
        )  # fmt: skip
        plan = _remember(key, _Plan(problem, vq, layout, return_lse))
    if short is not None and (vq.device >= 0 or (quick is not None and quick.host)):
        _remember(options, plan)
    return plan.run(vq, vk, vv, vo, (vb, va, vs, None, None, None, None), out)


@overload
def flash_attention_varlen(
    q: Array, k: Array, v: Array, *, return_lse: Literal[False] = False, out: Array | None = None,
    **options: Unpack[Packed],
) -> Array: ...  # fmt: skip
@overload
def flash_attention_varlen(
    q: _NumPy[Shape, Kind], k: _NumPy[Any, Kind], v: _NumPy[Any, Kind], *, return_lse: Literal[True],
    out: _NumPy[Any, Kind] | None = None, **options: Unpack[Packed],
) -> _Pair[Shape, Kind]: ...  # fmt: skip
@overload
def flash_attention_varlen(
    q: Array, k: Array, v: Array, *, return_lse: Literal[True], out: Array | None = None, **options: Unpack[Packed]
) -> tuple[Array, Array]: ...
@overload
def flash_attention_varlen(
    q: Array, k: Array, v: Array, *, return_lse: bool, out: Array | None = None, **options: Unpack[Packed]
) -> Array | tuple[Array, Any]: ...
@strict
def flash_attention_varlen(
    q: Any,
    k: Any,
    v: Any,
    *,
    cu_seqlens_q: Any,
    cu_seqlens_k: Any,
    max_seqlen_q: SupportsIndex,
    max_seqlen_k: SupportsIndex,
    seqused_q: Any = None,
    seqused_k: Any = None,
    causal: bool = False,
    window_size: Window = _UNLIMITED,
    softmax_scale: float | None = None,
    softcap: float = 0.0,
    sinks: Any = None,
    alibi_slopes: Any = None,
    return_lse: bool = False,
    out: Any = None,
    **unknown: object,
) -> Any:
    """Attention inside each of many sequences that lie packed one behind the other. See `flash_attention`.

    q: (total_q, heads_q, head_dim); k: (total_k, heads_k, head_dim); v: (total_k, heads_k, head_dim_v).
    cu_seqlens_q, cu_seqlens_k: (batch + 1,) int32 on q's device; sequence b has rows cu_seqlens[b]:cu_seqlens[b + 1].
        Running sums, usually from 0, not lengths: np.cumsum([0, *lengths], dtype=np.int32). They are read on the
        device, so nothing waits for them; lengths of 0 are fine. In host memory they are checked, and what looks like
        lengths is logged as a warning.
    max_seqlen_q, max_seqlen_k: host ints, at least the longest sequence; they size the launch.
    seqused_q, seqused_k: (batch,) int32: only so many first rows of each sequence count; causal and window are aligned
        to the used lengths.
    All others: as in `flash_attention`.

    Returns out (total_q, heads_q, head_dim_v), with return_lse also lse (heads_q, total_q) float32. Rows that belong to
    no sequence, or lie behind seqused_q, are left alone in a given `out`; in a new one they are 0, and -inf in lse.
    What rows of no sequence hold in q, k and v never counts, NaN included; only a result's last bit may depend on it.
    Raises as `flash_attention` does.
    """
    if unknown:
        raise no_argument(flash_attention_varlen, unknown)
    right = (
        type(max_seqlen_q) is int
        and type(max_seqlen_k) is int
        and (window_size is _UNLIMITED or is_window(window_size))
        and (softmax_scale is None or type(softmax_scale) is float)
        and type(softcap) is float
        and type(causal) is type(return_lse) is bool
    )
    if not right:
        read: Any = exact({
            "max_seqlen_q": max_seqlen_q, "max_seqlen_k": max_seqlen_k, "causal": causal, "window_size": window_size,
            "softmax_scale": softmax_scale, "softcap": softcap, "return_lse": return_lse,
        })  # fmt: skip
        if read is not None:
            right = True
            max_seqlen_q, max_seqlen_k, causal, window_size, softmax_scale, softcap, return_lse = read.values()
    options = short = None
    if (
        right and seqused_q is None and seqused_k is None and sinks is None and alibi_slopes is None and out is None
    ):  # fmt: skip
        quick = find(type(q))
        if quick is not None:
            # A guard wants each array once, and very often the two are one.
            one = cu_seqlens_q is cu_seqlens_k
            given = (q, k, v, cu_seqlens_q) if one else (q, k, v, cu_seqlens_q, cu_seqlens_k)
            wanted = one, max_seqlen_q, max_seqlen_k, causal, window_size, softmax_scale, softcap, return_lse
            plan = _recent.find(given, wanted) if quick.guards else None
            if plan is None:
                short = quick.keys(given)
                if short is not None:
                    options = (short, wanted)
                    plan = _plans.get(options)
                    if plan is not None:
                        _recent.note(quick, given, wanted, plan)
            if plan is not None and plan.last is not None and plan.last.clears:
                found = plan.run_quick(quick, q, k, v, quick.pointer(cu_seqlens_q), quick.pointer(cu_seqlens_k))
                if found is not None:
                    return found
    other = adapter(q)
    if other is not None:
        return other.flash_attention_varlen(
            q, k, v, cu_seqlens_q=cu_seqlens_q, cu_seqlens_k=cu_seqlens_k, max_seqlen_q=max_seqlen_q,
            max_seqlen_k=max_seqlen_k, seqused_q=seqused_q, seqused_k=seqused_k, causal=causal, window_size=window_size,
            softmax_scale=softmax_scale, softcap=softcap, sinks=sinks, alibi_slopes=alibi_slopes, return_lse=return_lse,
            out=out,
        )  # fmt: skip
    try:
        vq, vk, vv = view(q, "q"), view(k, "k"), view(v, "v")
        cq, ck = view(cu_seqlens_q, "cu_seqlens_q"), view(cu_seqlens_k, "cu_seqlens_k")
        uq = None if seqused_q is None else view(seqused_q, "seqused_q")
        uk = None if seqused_k is None else view(seqused_k, "seqused_k")
        vo = None if out is None else view(out, "out")
        vs = None if sinks is None else view(sinks, "sinks")
        va = None if alibi_slopes is None else view(alibi_slopes, "alibi_slopes")
    except (UnsupportedProblem, TypeError) as error:
        raise unreadable("flash_attention_varlen", locals(), error) from None
    key = (
        vq[1:6], vk[1:6], vv[1:6], cq[1:6], ck[1:6], uq and uq[1:6], uk and uk[1:6], max_seqlen_q, max_seqlen_k,
        causal, window_size, softmax_scale, softcap, return_lse, vo and vo[1:7], vs and vs[1:6], va and va[1:6],
    )  # fmt: skip
    plan = _plans.get(key) if right else None
    if plan is None:
        problem = varlen_problem(
            vq, vk, vv, cu_seqlens_q=cq, cu_seqlens_k=ck, max_seqlen_q=max_seqlen_q, max_seqlen_k=max_seqlen_k,
            seqused_q=uq, seqused_k=uk, causal=causal, window_size=window_size, softmax_scale=softmax_scale,
            softcap=softcap, sinks=vs, alibi_slopes=va, return_lse=return_lse, out=vo,
        )  # fmt: skip
        plan = _remember(key, _Plan(problem, vq, "packed", return_lse, vo is None))
    if short is not None and vq.device >= 0:
        _remember(options, plan)
    try:
        return plan.run(vq, vk, vv, vo, (None, va, vs, cq, ck, uq, uk), out)
    except UnsupportedProblem as error:
        if vq.device >= 0:
            raise
        # What the lengths hold, which only the back end reads: the call is told as for what is seen before.
        call = told("flash_attention_varlen", locals())
        raise UnsupportedProblem(call, error.reasons, error.hint) from None


def launch_attention(problem: AttentionProblem, device: int, stream: int, pointers: dict[str, int]) -> None:
    """Queue the kernel for a problem on raw device addresses; for adapters that own their buffers, such as XLA's.

    pointers: q, k, v, out, lse, and bias, alibi_slopes, sinks, cu_seqlens_q, cu_seqlens_k, seqused_q, seqused_k, which
    are 0 when absent, like lse.
    """
    key = (problem, device)
    plan = _plans.get(key)
    if plan is None:
        plan = _remember(key, _Plan(problem, None, "", False))
    if not plan.empty_output:
        plan.launch(device, stream, tuple([pointers[name] for name in _POINTER_ORDER]))


def load_attention(problem: AttentionProblem, device: int) -> None:
    """Compile and load the kernel that `launch_attention` will use for 16-byte aligned buffers; launches nothing."""
    plan = _plans.get((problem, device)) or _remember((problem, device), _Plan(problem, None, "", False))
    if not plan.empty_output and (device, plan.aligned) not in plan.ready:
        plan.ready[device, plan.aligned] = _prepare(problem, device, None, plan.aligned)


_POINTER_ORDER = ("q", "k", "v", "out", "lse", *_OPTIONAL)


class _Plan:
    """What one combination of shapes and options needs; made once, then found by its key."""

    __slots__ = (
        "aligned", "clear_rest", "empty_output", "last", "lse_shape", "lse_strides", "out_shape", "out_strides",
        "problem", "ready", "return_lse", "swap",
    )  # fmt: skip

    def __init__(
        self, problem: AttentionProblem, like: View | None, layout: str, return_lse: bool, new_out: bool = False
    ) -> None:
        p = problem
        self.problem = p
        # Rows outside of every sequence are nobody's work, but what is new starts defined: 1 out, 2 lse.
        self.clear_rest = (int(new_out) | 2 * int(return_lse)) if p.varlen else 0
        self.return_lse = return_lse
        self.swap = layout == "bhsd"
        self.out_shape: tuple[int, ...] = (p.batch, p.seqlen_q, p.heads_q, p.head_dim_v)
        self.lse_shape: tuple[int, ...] = (p.batch, p.heads_q, p.seqlen_q)
        if p.varlen:
            self.out_shape, self.lse_shape = (p.total_q, p.heads_q, p.head_dim_v), (p.heads_q, p.total_q)
        elif self.swap:
            self.out_shape = (p.batch, p.heads_q, p.seqlen_q, p.head_dim_v)
        self.empty_output = 0 in self.out_shape or 0 in (p.batch, p.seqlen_q)
        self.out_strides, self.lse_strides = row_major(self.out_shape), row_major(self.lse_shape)
        self.ready: dict[tuple[int, bool], Launch] = {}
        self.last: Launch | None = None  # the aligned launch of the device that was used last
        self.aligned = False
        if like is None or like.device >= 0:
            self.aligned = p.rows_aligned

    def run(self, q: View, k: View, v: View, out_view: View | None, optional: tuple[View | None, ...], out: Any) -> Any:
        """The call: outputs from the caller's library, then the kernel or the NumPy back end."""
        if out_view is not None:
            check_overlap(out_view, (("q", q), ("k", k), ("v", v), *zip(_OPTIONAL, optional, strict=True)))
        if q.device < 0:
            return self._run_on_host(q, k, v, out_view, optional, out)
        if out_view is None:
            out = arrays.empty(q, self.out_shape, q.dtype)
            out_pointer = view(out, "out").ptr
        else:
            out_pointer = out_view.ptr
        lse, lse_pointer = None, 0
        if self.return_lse:
            lse = arrays.empty(q, self.lse_shape, dtypes.FP32)
            lse_pointer = view(lse, "lse").ptr
        pointers = (q.ptr, k.ptr, v.ptr, out_pointer, lse_pointer, *[0 if x is None else x.ptr for x in optional])
        stream = arrays.stream(q)
        if self.clear_rest and (self.empty_output or not self._launch_for(q.device, stream, pointers).clears):
            if out_view is None:
                arrays.fill(q, out, 0.0)
            if lse is not None:
                arrays.fill(q, lse, -np.inf)
        if not self.empty_output:
            self.launch(q.device, stream, pointers)
            if q.library in _BORROWED:
                arrays.keep_until_done([q, k, v, *[x for x in optional if x is not None]])
        return (out, lse) if self.return_lse else out

    def run_quick(self, quick: Quick, q: Any, k: Any, v: Any, cu_seqlens_q: int = 0, cu_seqlens_k: int = 0) -> Any:
        """`run` for plain GPU arrays whose key was seen before, packed sequences (whose pointers come) among them.

        None: rows of no sequence have to be cleared first, which is for the long way.
        """
        pointer = quick.pointer
        device = quick.device(q)
        out = quick.empty(device, self.out_shape, self.out_strides, q.dtype)
        lse, lse_pointer = None, 0
        if self.return_lse:
            lse = quick.empty(device, self.lse_shape, self.lse_strides, quick.float32)
            lse_pointer = pointer(lse)
        if not self.empty_output:
            pointers = (
                pointer(q), pointer(k), pointer(v), pointer(out), lse_pointer, 0, 0, 0, cu_seqlens_q, cu_seqlens_k, 0, 0
            )  # fmt: skip
            ready = self.last
            if ready is None or ready[0] != device or (pointers[0] | pointers[1] | pointers[2] | pointers[3]) & 15:
                if self.clear_rest:
                    return None
                self.launch(device, quick.stream(device), pointers)
            else:
                _launch(ready, pointers, quick.stream(device))
        return out if lse is None else (out, lse)

    def launch(self, device: int, stream: int, pointers: tuple[int, ...]) -> None:
        """Queue the kernel; compiles and loads it first if this is its first use."""
        ready = self._launch_for(device, stream, pointers)
        _launch(ready, pointers, stream)

    def _launch_for(self, device: int, stream: int, pointers: tuple[int, ...]) -> Launch:
        aligned = self.aligned and not (pointers[0] | pointers[1] | pointers[2] | pointers[3]) & 15
        ready = self.ready.get((device, aligned))
        if ready is None:
            ready = _prepare(self.problem, device, stream, aligned, self.clear_rest)
            self.ready[device, aligned] = ready
        if aligned:
            self.last = ready
        return ready

    def _run_on_host(
        self, q: View, k: View, v: View, out_view: View | None, optional: tuple[View | None, ...], out: Any
    ) -> Any:
        a, b, c, target, *extra = (None if x is None else arrays.as_numpy(x) for x in (q, k, v, out_view, *optional))
        target, lse = self.run_numpy(a, b, c, target, extra, True)
        if out_view is None:
            out = arrays.from_numpy(q, target)
        return (out, arrays.from_numpy(q, lse)) if self.return_lse else out

    def run_numpy(
        self, q: Any, k: Any, v: Any, out: Any = None, optional: Sequence[Any] = (), pair: bool = False
    ) -> Any:
        """The call on NumPy arrays. pair: out and lse, whether or not lse was asked for (it is None then)."""
        global _on_host
        if _on_host is None:
            from flashmoe_cupy.cpu.attention import attention as _on_host
        rest = self.problem.varlen or self.empty_output  # rows that the back end does not write
        if out is None:
            out = np.zeros(self.out_shape, q.dtype) if rest else np.empty(self.out_shape, q.dtype)
        lse = None
        if self.return_lse:
            lse = np.full(self.lse_shape, -np.inf, np.float32) if rest else np.empty(self.lse_shape, np.float32)
        if not self.empty_output:
            # The back end's axes are (batch, seq, heads, dim).
            a, b, c, d = [x.swapaxes(1, 2) for x in (q, k, v, out)] if self.swap else (q, k, v, out)
            _on_host(self.problem, a, b, c, d, lse, *optional)
        return (out, lse) if pair or self.return_lse else out


_BORROWED = ("jax", "dlpack", "cai")  # libraries that may reuse memory before the kernel has read it
_on_host: Any = None  # the NumPy back end, once it is used
_plans: dict[Any, _Plan] = {}
_plans_lock = threading.Lock()
_recent = Recent()
kernels.forget.append(_plans.clear)
_launch: Callable[[Launch, tuple[int, ...], int], None]  # jit.launch.launch, once a kernel is there to be launched


def _remember(key: Any, plan: _Plan) -> _Plan:
    with _plans_lock:
        if len(_plans) >= _MAX_PLANS:
            _plans.clear()
        _plans[key] = plan
    return plan


def _prepare(problem: AttentionProblem, device: int, stream: int | None, aligned: bool, clear_rest: int = 0) -> Launch:
    """Choose, compile (or find) and load a kernel for a problem on a device. stream: as in `prepare`."""
    global _launch
    from flashmoe_cupy.jit import launch
    from flashmoe_cupy.ops.launches import prepare

    _launch = launch.launch
    step = Step("attention_fwd", problem, same(*_POINTER_ORDER), {"clear_rest": clear_rest})
    return prepare(step, device, stream, aligned)[0]
