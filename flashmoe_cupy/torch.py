"""Attention for torch tensors, eager and under `torch.compile`, as the operators of `torch.ops.flashmoe_cupy`.

Eager calls go straight to `flashmoe_cupy.ops.attention`, on torch's current stream. Compiled and traced code sees one
operator with a schema and a shape rule, which the compiler neither looks into nor splits. The operators have no
in-place form: `out` cannot be given here; `flashmoe_cupy.flash_attention` takes it in eager code.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from flashmoe_cupy.errors import UnsupportedProblem

__all__ = ["flash_attention", "flash_attention_varlen"]

# Arguments behind q, k and v, in order, without defaults: the functions below always give all of them.
_DENSE = (
    ("bool", "causal"), ("SymInt[]", "window_size"), ("float?", "softmax_scale"), ("float", "softcap"),
    ("Tensor?", "sinks"), ("Tensor?", "alibi_slopes"), ("Tensor?", "bias"), ("str", "layout"), ("bool", "return_lse"),
)  # fmt: skip
_VARLEN = (
    ("Tensor", "cu_seqlens_q"), ("Tensor", "cu_seqlens_k"), ("SymInt", "max_seqlen_q"), ("SymInt", "max_seqlen_k"),
    ("Tensor?", "seqused_q"), ("Tensor?", "seqused_k"), ("bool", "causal"), ("SymInt[]", "window_size"),
    ("float?", "softmax_scale"), ("float", "softcap"), ("Tensor?", "sinks"), ("Tensor?", "alibi_slopes"),
    ("bool", "return_lse"),
)  # fmt: skip
_Pair = tuple[torch.Tensor, torch.Tensor]  # out, lse
# The compiler keeps the strides that the tensors had in eager code: no hidden copies, and the same kernel.
_TAGS = (torch.Tag.pt2_compliant_tag, torch.Tag.needs_fixed_stride_order)


def flash_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softmax_scale: float | None = None,
    softcap: float = 0,  # an int: Dynamo would make a graph input of a default 0.0
    sinks: torch.Tensor | None = None,
    alibi_slopes: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    layout: str = "bshd",
    return_lse: bool = False,
) -> Any:
    """`flashmoe_cupy.flash_attention` for torch tensors, in eager, compiled and exported code (`fullgraph=True`).

    Arguments, results and errors are the same. Shapes may be dynamic. Raises UnsupportedProblem for tensors that
    require a gradient while grad mode is on; the compiler reports it when it traces.
    """
    if not _traced(q):
        from flashmoe_cupy.ops import attention as op

        return op.flash_attention(
            q, k, v, causal=causal, window_size=window_size, softmax_scale=softmax_scale, softcap=softcap, sinks=sinks,
            alibi_slopes=alibi_slopes, bias=bias, layout=layout, return_lse=return_lse,
        )  # fmt: skip
    result = torch.ops.flashmoe_cupy.flash_attention(
        q, k, v, causal, window_size, softmax_scale, softcap, sinks, alibi_slopes, bias, layout, return_lse
    )
    return result if return_lse else result[0]


def flash_attention_varlen(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    seqused_q: torch.Tensor | None = None,
    seqused_k: torch.Tensor | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softmax_scale: float | None = None,
    softcap: float = 0,  # an int: Dynamo would make a graph input of a default 0.0
    sinks: torch.Tensor | None = None,
    alibi_slopes: torch.Tensor | None = None,
    return_lse: bool = False,
) -> Any:
    """`flashmoe_cupy.flash_attention_varlen` for torch tensors, also inside `torch.compile` and `torch.export`.

    Arguments, results and errors are the same; gradients as in `flash_attention` of this module.
    """
    if not _traced(q):
        from flashmoe_cupy.ops import attention as op

        return op.flash_attention_varlen(
            q, k, v, cu_seqlens_q=cu_seqlens_q, cu_seqlens_k=cu_seqlens_k, max_seqlen_q=max_seqlen_q,
            max_seqlen_k=max_seqlen_k, seqused_q=seqused_q, seqused_k=seqused_k, causal=causal, window_size=window_size,
            softmax_scale=softmax_scale, softcap=softcap, sinks=sinks, alibi_slopes=alibi_slopes, return_lse=return_lse,
        )  # fmt: skip
    result = torch.ops.flashmoe_cupy.flash_attention_varlen(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, seqused_q, seqused_k, causal, window_size,
        softmax_scale, softcap, sinks, alibi_slopes, return_lse,
    )  # fmt: skip
    return result if return_lse else result[0]


def _traced(q: torch.Tensor) -> bool:
    """True where the operator must be called: while compiling, for tensor subclasses and under dispatch modes."""
    if torch.compiler.is_compiling():
        return True
    plain = type(q) is torch.Tensor or type(q) is torch.nn.Parameter or not isinstance(q, torch.Tensor)
    return not plain or torch._C._len_torch_dispatch_stack() > 0


# ---------------------------------------------------------------------------------------------------------------------
# the operators: schema, body, shape rule, gradient


def _body(name: str, options: tuple[tuple[str, str], ...]) -> Callable[..., _Pair]:
    """The operator itself, for real tensors of any device."""

    def body(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *values: Any) -> _Pair:
        from flashmoe_cupy.ops import attention as op

        given = dict(zip((option for _, option in options), values, strict=True))
        given["window_size"] = tuple(given["window_size"])
        result = getattr(op, name)(q, k, v, **given)
        return result if given["return_lse"] else (result, _no_lse(q))

    return body


def _no_lse(q: torch.Tensor) -> torch.Tensor:
    """What stands in the operator's second result when the log-sum-exp was not asked for."""
    return q.new_empty((0,), dtype=torch.float32)


def _dense_shapes(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *values: Any) -> _Pair:
    layout, return_lse = values[-2:]
    _check_ranks("flash_attention", 4, q, k, v)
    s, h = (2, 1) if layout == "bhsd" else (1, 2)
    lse = q.new_empty((q.shape[0], q.shape[h], q.shape[s]), dtype=torch.float32) if return_lse else _no_lse(q)
    return q.new_empty((*q.shape[:3], v.shape[3])), lse


def _varlen_shapes(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *values: Any) -> _Pair:
    _check_ranks("flash_attention_varlen", 3, q, k, v)
    lse = q.new_empty((q.shape[1], q.shape[0]), dtype=torch.float32) if values[-1] else _no_lse(q)
    return q.new_empty((*q.shape[:2], v.shape[2])), lse


def _check_ranks(op: str, rank: int, *tensors: torch.Tensor) -> None:
    """The one thing that the shape rules rely on; all else is checked when the operator runs."""
    named = zip(("q", "k", "v"), tensors, strict=True)
    reasons = [f"{name} must have {rank} dimensions, but has {x.dim()}" for name, x in named if x.dim() != rank]
    if reasons:
        raise UnsupportedProblem(op, reasons)


def _no_gradient(name: str, options: tuple[tuple[str, str], ...]) -> Callable[..., None]:
    """What runs when an input requires a gradient and grad mode is on, also on the compiler's fake tensors."""

    def refuse(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        del ctx, output
        named = zip(("q", "k", "v", *(option for _, option in options)), inputs, strict=True)
        names = [option for option, x in named if isinstance(x, torch.Tensor) and x.requires_grad]
        raise UnsupportedProblem(
            f"the gradient of {name}",
            [f"{option} requires grad and grad mode is on, but there is no backward yet" for option in names],
            "use torch.no_grad() or .detach() where gradients are not needed",
        )

    return refuse


def _backward(ctx: Any, *gradients: Any) -> None:
    raise NotImplementedError("flashmoe_cupy has no backward for torch tensors yet")  # the forward has refused before


def _define(name: str, options: tuple[tuple[str, str], ...], shapes: Callable[..., Any]) -> None:
    arguments = ", ".join(f"{kind} {option}" for kind, option in (*(("Tensor", x) for x in "qkv"), *options))
    _library.define(f"{name}({arguments}) -> (Tensor, Tensor)", tags=_TAGS)
    _library.impl(name, _body(name, options), "CompositeExplicitAutograd")
    qualified = f"flashmoe_cupy::{name}"
    torch.library.register_fake(qualified, shapes, lib=_library)
    torch.library.register_autograd(qualified, _backward, setup_context=_no_gradient(name, options), lib=_library)


_library = torch.library.Library("flashmoe_cupy", "FRAGMENT")
_define("flash_attention", _DENSE, _dense_shapes)
_define("flash_attention_varlen", _VARLEN, _varlen_shapes)
