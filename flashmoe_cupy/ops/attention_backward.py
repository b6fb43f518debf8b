"""The backward of scaled dot-product attention on arrays of any library: dense, and of packed sequences."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple, SupportsIndex

from flashmoe_cupy._types import Layout, Need, Window
from flashmoe_cupy.ops.call import Call, run
from flashmoe_cupy.ops.names import no_argument, strict
from flashmoe_cupy.plan.attention.gradient import (
    GRADIENTS,
    AttentionBwdProblem,
    backward_problem,
    varlen_backward_problem,
)
from flashmoe_cupy.plan.attention.problem import PADDING
from flashmoe_cupy.plan.checks import need_ranks
from flashmoe_cupy.plan.operation import Operation, Output, Workspace, register
from flashmoe_cupy.plan.options import needed
from flashmoe_cupy.plan.step import Step

_QKV = "q", "k", "v"


class AttentionGradients(NamedTuple):
    """Gradients, each in the shape, layout and dtype of its argument; None where need does not name it."""

    dq: Any
    dk: Any
    dv: Any
    dsinks: Any
    dbias: Any


@strict
def flash_attention_backward(
    dout: Any,
    q: Any,
    k: Any,
    v: Any,
    out: Any,
    lse: Any,
    *,
    dlse: Any = None,
    need: Need = _QKV,
    dq: Any = None,
    dk: Any = None,
    dv: Any = None,
    deterministic: bool = False,
    causal: bool = False,
    window_size: Window = (-1, -1),
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
    **unknown: object,
) -> Any:
    """Gradients of sum(dout * out) + sum(dlse * lse), where `flash_attention` gave out and lse, in O(seqlen) memory.

    dout: what arrives at out, (batch, seqlen_q, heads_q, head_dim_v), in q's dtype. layout="bhsd" swaps axes 1, 2 of
        dout, q, k, v, out, dq, dk and dv.
    q, k, v, and all options of the same names: as `flash_attention` had them.
    out, lse: what it gave with return_lse=True; lse is (batch, heads_q, seqlen_q), float32.
    dlse: what arrives at lse, (batch, heads_q, seqlen_q), float32; None = 0.
    need: names of the arguments whose gradients are wanted, of "q", "k", "v", "sinks" and "bias". Others are not
        computed.
    dq, dk, dv: arrays for these gradients, in the shape and dtype of q, k and v, overwritten; None = new ones. Rows
        that do not count are left alone in them. Not for JAX, whose arrays are immutable.
    deterministic: True = the same bits in every run, on the same kind of device. False lets blocks add up dq in any
        order where that is faster: on GPUs, when dq, dk and dv are all wanted and there is no bias. dk and dv are the
        same in every run even then.
    Strides of every array: any whose last dimension is contiguous, also 0 where it is read; those of lse and dlse any.

    Returns AttentionGradients(dq, dk, dv, dsinks, dbias), None for what need does not name. dk and dv are summed over
    the query heads of a group, dsinks (heads_q,) over batch and queries, dbias over the axes along which bias is
    spread. Sums run in float32 and are rounded once. Rows that do not count, keys that no query sees and queries that
    see no key get 0. On GPUs there is a workspace of 8 bytes for each query and head;
    where dq is added up, in any order or (head dims up to 128) in one, of 4 bytes more for each of its values, head_dim
    filled up to a multiple of 64.

    Hidden keys must be finite, as in `flash_attention`. Raises UnsupportedProblem (a ValueError) with every reason,
    DependencyError when CuPy or a driver is missing. Nothing is written on error.

    Algorithm: FlashAttention-2 (Dao 2023, arXiv:2307.08691), algorithm 2, in one kernel that adds dq up, or in two, one
    that walks over queries for dk and dv and one that walks over keys for dq. The gradient of lse is subtracted from
    rowsum(dout * out).
    """
    if unknown:
        raise no_argument(flash_attention_backward, unknown)
    options = (
        needed(need) or need, deterministic, causal, window_size, softmax_scale, softcap, layout,
    )  # fmt: skip
    others = dlse, sinks, alibi_slopes, bias, seqused_q, seqused_k, leftpad_q, leftpad_k, dq, dk, dv
    made = run(_DENSE, (dout, q, k, v, out, lse), options, others)
    return _gradients(options[0], made, {"dq": dq, "dk": dk, "dv": dv})


@strict
def flash_attention_varlen_backward(
    dout: Any,
    q: Any,
    k: Any,
    v: Any,
    out: Any,
    lse: Any,
    *,
    cu_seqlens_q: Any,
    cu_seqlens_k: Any,
    max_seqlen_q: SupportsIndex,
    max_seqlen_k: SupportsIndex,
    seqused_q: Any = None,
    seqused_k: Any = None,
    dlse: Any = None,
    need: Need = _QKV,
    dq: Any = None,
    dk: Any = None,
    dv: Any = None,
    deterministic: bool = False,
    causal: bool = False,
    window_size: Window = (-1, -1),
    softmax_scale: float | None = None,
    softcap: float = 0,  # an int: torch.compile would make an input of its graph of a default 0.0
    sinks: Any = None,
    alibi_slopes: Any = None,
    **unknown: object,
) -> Any:
    """Gradients of what `flash_attention_varlen` gave, of packed sequences. See `flash_attention_backward`.

    dout, out: (total_q, heads_q, head_dim_v); lse, dlse: (heads_q, total_q), float32. q, k, v, cu_seqlens_q,
    cu_seqlens_k, max_seqlen_q, max_seqlen_k, seqused_q, seqused_k and the options: as `flash_attention_varlen` had
    them. What rows of no sequence hold never counts, NaN included.

    Returns AttentionGradients, whose dbias is None. Rows that belong to no sequence, or lie behind seqused, are left
    alone in given arrays; in new ones they are 0. Raises as `flash_attention_backward` does.
    """
    if unknown:
        raise no_argument(flash_attention_varlen_backward, unknown)
    options = (
        max_seqlen_q, max_seqlen_k, needed(need) or need, deterministic, causal, window_size, softmax_scale, softcap,
    )  # fmt: skip
    arrays = dout, q, k, v, out, lse, cu_seqlens_q, cu_seqlens_k
    others = seqused_q, seqused_k, dlse, sinks, alibi_slopes, dq, dk, dv
    made = run(_PACKED, arrays, options, others)
    return _gradients(options[2], made, {"dq": dq, "dk": dk, "dv": dv})


def _gradients(need: Any, made: Any, given: Mapping[str, Any]) -> AttentionGradients:
    """What was made, in the order of its names, and the arrays that were given for others."""
    names = [name for name in _names(need) if given.get(name) is None]
    found = dict(zip(names, made, strict=True))
    wanted = {name: x for name, x in given.items() if x is not None}
    return AttentionGradients(*[found.get(name, wanted.get(name)) for name in GRADIENTS])


def _names(need: str) -> list[str]:
    return [name for name in GRADIENTS if name[1:] in need.split()]


def _shapes(shapes: Mapping[str, Any], options: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    return {
        name: tuple(shapes[name[1:]])
        for name in _names(needed(options["need"]) or "")
        if name not in shapes and name[1:] in shapes
    }


def _dense_shapes(shapes: Mapping[str, Any], options: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    ranks = {"dout": 4, "q": 4, "k": 4, "v": 4, "out": 4, "lse": 3}
    need_ranks("flash_attention_backward", ranks, shapes)
    return _shapes(shapes, options)


def _packed_shapes(shapes: Mapping[str, Any], options: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    ranks = {"dout": 3, "q": 3, "k": 3, "v": 3, "out": 3, "lse": 2}
    need_ranks("flash_attention_varlen_backward", ranks, shapes)
    return _shapes(shapes, options)


def _steps(p: AttentionBwdProblem) -> tuple[list[Step], Workspace]:
    from flashmoe_cupy.plan.attention.backward import backward_steps

    steps, sizes = backward_steps(p)
    work = Workspace()
    for name, size in sizes.items():
        work.add(name, size)
    return steps, work


def _host(p: AttentionBwdProblem, given: Mapping[str, Any], made: Mapping[str, Any]) -> None:
    from flashmoe_cupy.cpu.attention_backward import attention_backward

    f = p.forward
    for x in made.values() if not f.even else ():
        x[...] = 0
    results = {name: given.get(name) for name in _QKV_GRADIENTS} | dict(made)
    swapped = (*_QKV, "dout", "out", *_QKV_GRADIENTS) if f.heads_first else ()
    named = {name: x for name, x in given.items() if name not in _QKV_GRADIENTS} | results
    main = {name: x.swapaxes(1, 2) if name in swapped and x is not None else x for name, x in named.items()}
    attention_backward(f, *[main.pop(name) for name in ("dout", *_QKV, "out", "lse")], **main)


_QKV_GRADIENTS = "dq", "dk", "dv"
_OUTPUTS = {name: Output(like=name[1:]) for name in GRADIENTS}


def _operation(function: Any, arguments: tuple[str, ...], required: int, **differ: Any) -> Operation:
    return register(
        Operation(
            function, (*arguments, *_QKV_GRADIENTS), required, _OUTPUTS, problem=AttentionBwdProblem, steps=_steps,
            host=_host, rows=("dout", *_QKV, "out", *_QKV_GRADIENTS), written=_QKV_GRADIENTS,
            wanted=lambda options: _names(needed(options["need"]) or ""), empty=lambda p: p.empty, wrap=tuple, **differ,
        )
    )


_MAIN = "dout", *_QKV, "out", "lse"
_DENSE = Call(
    _operation(
        flash_attention_backward, (*_MAIN, "dlse", "sinks", "alibi_slopes", "bias", *PADDING), 6, shapes=_dense_shapes,
        make=backward_problem, tiles=("bias",),
    )
)
_PACKED = Call(
    _operation(
        flash_attention_varlen_backward,
        (*_MAIN, "cu_seqlens_q", "cu_seqlens_k", "seqused_q", "seqused_k", "dlse", "sinks", "alibi_slopes"), 8,
        shapes=_packed_shapes, make=varlen_backward_problem,
    )
)
