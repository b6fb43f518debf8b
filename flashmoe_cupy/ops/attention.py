"""Scaled dot-product attention on arrays of any library: dense, and of packed sequences."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal, SupportsIndex, Unpack, overload

import numpy as np

from flashmoe_cupy import _late
from flashmoe_cupy._types import Array, Dense, Kind, Layout, Packed, Shape, Window
from flashmoe_cupy.dtypes import FP32
from flashmoe_cupy.ops.access import AUTOCAST, GRADIENT
from flashmoe_cupy.ops.call import Call, run
from flashmoe_cupy.ops.memory import PlanMemory
from flashmoe_cupy.ops.names import no_argument, strict
from flashmoe_cupy.plan.attention.problem import PADDING, AttentionProblem, attention_problem, varlen_problem
from flashmoe_cupy.plan.checks import need_ranks
from flashmoe_cupy.plan.forget import forget
from flashmoe_cupy.plan.operation import Gradient, Operation, Output, Workspace, register
from flashmoe_cupy.plan.step import Step, same

_UNLIMITED = (-1, -1)
if TYPE_CHECKING:  # numpy.typing takes longer to import than this file
    from numpy.typing import NDArray

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
    softcap: float = 0,  # an int: torch.compile would make an input of its graph of a default 0.0
    sinks: Any = None,
    alibi_slopes: Any = None,
    bias: Any = None,
    seqused_q: Any = None,
    seqused_k: Any = None,
    leftpad_q: Any = None,
    leftpad_k: Any = None,
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
        that are True. Any strides. On Hopper a boolean one is packed first: 16 bytes for 64 keys of each row, and of
        each batch entry where there is padding. There another bias whose rows do not lie side by side from multiples
        of 16 bytes on is copied within the device.
    seqused_q, seqused_k, leftpad_q, leftpad_k: (batch,) int32 on q's device, for batches with padding. Of entry b only
        rows leftpad[b] ... seqused[b] - 1 count; None = from the first row, or to the last. causal, window_size and
        alibi_slopes are aligned at the ends of what counts; bias keeps the places of the arrays. They are read on the
        device, so nothing waits for them, and nothing is computed for what they leave out. Numbers that are no rows are
        taken as the nearest row; in host memory they are refused.
    out: array of q's library for the result, overwritten; None = a new one. Not for JAX, whose arrays are immutable.
        Rows of q that do not count are left alone in it.

    Returns out (batch, seqlen_q, heads_q, head_dim_v) in q's dtype and layout; with return_lse also the float32 natural
    logarithm of the softmax's denominator, (batch, heads_q, seqlen_q), sinks included. A query that sees no key gives
    out 0 and lse -inf (with sinks: the sink); a row of q that does not count 0 and -inf. The same inputs give the same
    bits in every run.

    Hidden keys: k and v of a key that causal, window_size or bias hides from a query must be finite. On GPUs such a key
    may lie in a tile with others that the query sees; it then has weight 0, and 0 * NaN is NaN. NumPy leaves it out.
    What lies beyond the arrays, in padding or in another head or batch entry never counts, NaN included; only the last
    bit of a result may depend on it.

    Names elsewhere: is_causal is causal; scale and sm_scale are softmax_scale; mask, attn_mask and attn_bias are bias;
    sliding_window and local_window_size are window_size; s_aux is sinks; key_value_seq_lengths is seqused_k. enable_gqa
    follows from the shapes, and there is no dropout_p.

    torch differentiates out and lse once, by `flash_attention_backward`, with respect to q, k, v, sinks and a float
    bias; alibi_slopes have no gradient, and `out` is refused then. Under torch.autocast q, k and v become its dtype, as
    for torch's own attention.

    Raises UnsupportedProblem (a ValueError) with every reason, DependencyError when CuPy or a driver is missing.
    Nothing is written on error.

    Algorithm: FlashAttention-2 (Dao 2023, arXiv:2307.08691), algorithm 1; window as in its code; softcap as in Gemma 2;
    sinks as in gpt-oss; ALiBi as in Press et al. (arXiv:2108.12409).
    """
    if unknown:
        raise no_argument(flash_attention, unknown)
    options = causal, window_size, softmax_scale, softcap, layout, return_lse
    plain = sinks is None and alibi_slopes is None and bias is None and out is None
    if plain and seqused_q is None and seqused_k is None and leftpad_q is None and leftpad_k is None:
        return run(_DENSE, (q, k, v), options)
    others = sinks, alibi_slopes, bias, seqused_q, seqused_k, leftpad_q, leftpad_k
    return run(_DENSE, (q, k, v), options, others, out)


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
    softcap: float = 0,  # an int: torch.compile would make an input of its graph of a default 0.0
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
        to the used lengths. Numbers that are no rows are taken as `flash_attention` takes them.
    All others: as in `flash_attention`.

    Returns out (total_q, heads_q, head_dim_v), with return_lse also lse (heads_q, total_q) float32. Rows that belong to
    no sequence, or lie behind seqused_q, are left alone in a given `out`; in a new one they are 0, and -inf in lse.
    What rows of no sequence hold in q, k and v never counts, NaN included; only a result's last bit may depend on it.
    torch differentiates it as it does `flash_attention`. Raises as that does.
    """
    if unknown:
        raise no_argument(flash_attention_varlen, unknown)
    arrays = q, k, v, cu_seqlens_q, cu_seqlens_k
    options = max_seqlen_q, max_seqlen_k, causal, window_size, softmax_scale, softcap, return_lse
    if seqused_q is None and seqused_k is None and sinks is None and alibi_slopes is None and out is None:
        return run(_PACKED, arrays, options)
    return run(_PACKED, arrays, options, (seqused_q, seqused_k, sinks, alibi_slopes), out)


def _dense_shapes(shapes: Mapping[str, Any], options: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    need_ranks("flash_attention", {"q": 4, "k": 4, "v": 4}, shapes)
    q, v = shapes["q"], shapes["v"]
    found = {"out": (*q[:3], v[3])}
    if options["return_lse"]:
        s, h = (2, 1) if options["layout"] == "bhsd" else (1, 2)
        found["lse"] = (q[0], q[h], q[s])
    return found


def _packed_shapes(shapes: Mapping[str, Any], options: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    need_ranks("flash_attention_varlen", {"q": 3, "k": 3, "v": 3}, shapes)
    q, v = shapes["q"], shapes["v"]
    found = {"out": (*q[:2], v[2])}
    if options["return_lse"]:
        found["lse"] = (q[1], q[0])
    return found


def _steps(p: AttentionProblem) -> tuple[list[Step], Workspace]:
    clears = {}
    if p.clear_rest & 1:
        clears["out"] = p.total_q * p.heads_q * p.head_dim_v * p.dtype.itemsize
    if p.clear_rest & 2:
        clears["lse"] = p.heads_q * p.total_q * FP32.itemsize
    step = Step("attention_fwd", p, _POINTERS, {"clear_rest": p.clear_rest}, clears)
    return [step], bias_workspace(p)


def bias_workspace(p: AttentionProblem) -> Workspace:
    """What launches share where there is a bias."""
    work = Workspace()
    if p.bias_dtype is not None:
        from flashmoe_cupy.plan.attention.bias import workspace  # a call without a bias needs no kernels' sizes here

        for name, size in workspace(p).items():
            work.add(name, size)
    return work


def _host(p: AttentionProblem, given: Mapping[str, Any], made: Mapping[str, Any]) -> None:
    from flashmoe_cupy.cpu.attention import attention

    out: Any = made["out"]
    lse: Any = made.get("lse")
    if p.clear_rest & 1:
        out[...] = 0
    if p.clear_rest & 2:
        lse[...] = -np.inf
    main = [given["q"], given["k"], given["v"], out]
    if p.heads_first:  # the back end's axes are (batch, seq, heads, dim)
        main = [x.swapaxes(1, 2) for x in main]
    rest = {name: x for name, x in given.items() if name not in ("q", "k", "v")}
    q, k, v, target = main
    attention(p, q, k, v, target, lse, **rest)


_ROWS = ("q", "k", "v", "out")
_LSE = Output(FP32, fill=-np.inf)
_POINTERS = same(
    *_ROWS, "lse", "bias", "alibi_slopes", "sinks", "cu_seqlens_q", "cu_seqlens_k", "seqused_q", "seqused_k",
    "leftpad_q", "leftpad_k",
)


def _operation(function: Any, arguments: tuple[str, ...], required: int, **differ: Any) -> Operation:
    return register(
        Operation(
            function, arguments, required, {"out": Output(), "lse": _LSE}, problem=AttentionProblem, steps=_steps,
            host=_host, rows=_ROWS, tiles=[name for name in arguments if name == "bias"],
            wanted=lambda options: ("out", "lse")[: 1 + options["return_lse"]], empty=lambda p: p.empty,
            gradient=Gradient(f"{function.__name__}_backward", {"return_lse": True}), autocast=_ROWS[:3], **differ,
        )
    )


class _Plans(dict[Any, Any]):
    """The plans of a call by their keys, and in their place what runs calls that torch differentiates or casts."""

    def __init__(self, call: Call) -> None:
        super().__init__()
        self._call = call

    def __missing__(self, key: Any) -> Any:
        arrays, wanted = key[:2]
        if arrays is GRADIENT:
            self[key] = _late.load("torch").Changed(self._call, wanted)
            return self[key]
        return self[GRADIENT, wanted] if arrays[-1] is AUTOCAST else None


class _PlanMemory(PlanMemory[Any]):
    __slots__ = ()

    def __init__(self, call: Call) -> None:
        super().__init__()
        self._plans = _Plans(call)
        self.find = self._plans.__getitem__  # type: ignore[assignment]
        forget.append(self._plans.clear)


def _call(operation: Operation) -> Call:
    call = Call(operation)
    call.plans = _PlanMemory(call)
    return call


_DENSE = _call(
    _operation(
        flash_attention, ("q", "k", "v", "sinks", "alibi_slopes", "bias", *PADDING), 3, shapes=_dense_shapes,
        make=attention_problem,
        batched={"q": 4, "k": 4, "v": 4, "alibi_slopes": 2, "bias": 4} | dict.fromkeys(PADDING, 1),
    )
)
_PACKED = _call(
    _operation(
        flash_attention_varlen,
        ("q", "k", "v", "cu_seqlens_q", "cu_seqlens_k", "seqused_q", "seqused_k", "sinks", "alibi_slopes"), 5,
        shapes=_packed_shapes, make=varlen_problem,
    )
)
