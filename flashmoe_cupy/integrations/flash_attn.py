"""The functions of flash-attn 2 for torch tensors, with its argument order, defaults and results.

    from flashmoe_cupy.integrations.flash_attn import flash_attn_func     # was: from flash_attn import flash_attn_func

Shapes are (batch, seqlen, heads, head_dim), packed ones (total, heads, head_dim); causal and windows are aligned at the
bottom right. What differs from flash-attn:

- There is no dropout: dropout_p must be 0. There are no paged caches: block_table must be None, and
  `flash_attn_with_kvcache` says what runs instead.
- float32 and tensors in host memory run, too. v may have a head dim of its own.
- alibi_slopes that require a gradient are refused; flash-attn leaves them without one and says nothing.
- return_attn_probs gives (out, softmax_lse, None): probabilities are never formed. softmax_lse is differentiable, and
  -inf for a query that sees no key, where flash-attn has +inf.
- deterministic=False, the default, follows torch.use_deterministic_algorithms at the backward. True asks for the same
  bits in every run. The forward pass always gives them.

A head dim that is no multiple of 8 is filled up with zeros, and a last dimension that is not contiguous made so; both
are copies on the device, as in flash-attn. All else is read where it lies, packed tensors included.

Every function raises UnsupportedProblem (a ValueError) with all reasons for what cannot run, TypeError for what is no
tensor. Nothing is copied between host and device, and nothing waits.
"""

from __future__ import annotations

from typing import Any, NoReturn

import torch
from torch import Tensor

from ..ops.access import GRADIENT, find
from ..ops.attention import flash_attention, flash_attention_varlen
from ..ops.attention_backward import flash_attention_backward, flash_attention_varlen_backward
from ..ops.call import known
from ..plan.operation import Operation, registered
from ..torch import call
from .torch_rows import NO_DROPOUT, fit, need_tensors, no_dropout, refuse, rows, scale_of

__all__ = [
    "flash_attn_func",
    "flash_attn_kvpacked_func",
    "flash_attn_qkvpacked_func",
    "flash_attn_varlen_func",
    "flash_attn_varlen_kvpacked_func",
    "flash_attn_varlen_qkvpacked_func",
    "flash_attn_with_kvcache",
]

Window = tuple[int, int]
_UNLIMITED = (-1, -1)
_DENSE, _PACKED = registered("flash_attention").call, registered("flash_attention_varlen").call


def flash_attn_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Window = _UNLIMITED,
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Any:
    """Attention of q (batch, seqlen_q, heads, head_dim) on k and v (batch, seqlen_k, heads_k, head_dim).

    dropout_p: 0. softmax_scale: None = head_dim ** -0.5. causal, window_size (left, right; -1 = unlimited): aligned at
    the bottom right. softcap: 0 or less = off. alibi_slopes: (heads,) or (batch, heads), float32. deterministic: True =
    gradients with the same bits in every run.

    Returns out (batch, seqlen_q, heads, head_dim) in q's dtype; with return_attn_probs (out, softmax_lse, None), where
    softmax_lse is (batch, heads, seqlen_q), float32. Raises as the head of this file says.
    """
    if alibi_slopes is None and _usual(q, dropout_p, deterministic):
        options = causal, window_size, softmax_scale, softcap, "bshd", return_attn_probs
        made = known(_DENSE, (q, k, v), options)
        if made is not None:
            return (*made, None) if return_attn_probs else made
    need_tensors("flash_attn_func", q=q, k=k, v=v)
    more = _options("flash_attn_func", dropout_p, causal, window_size, softcap, deterministic, return_attn_probs)
    others = {"alibi_slopes": alibi_slopes}
    return _attend(q, k, v, others, softmax_scale, more, deterministic, return_attn_probs)


def flash_attn_kvpacked_func(
    q: Tensor,
    kv: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Window = _UNLIMITED,
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Any:
    """`flash_attn_func` with keys and values in kv (batch, seqlen_k, 2, heads_k, head_dim), read where they lie.

    The gradient of kv is one tensor, into which those of keys and values are written.
    """
    need_tensors("flash_attn_kvpacked_func", q=q, kv=kv)
    _need_packed("flash_attn_kvpacked_func", "kv", kv, "batch, seqlen_k, 2, heads_k, head_dim")
    options = _options(
        "flash_attn_kvpacked_func", dropout_p, causal, window_size, softcap, deterministic, return_attn_probs
    )
    others = {"alibi_slopes": alibi_slopes}
    return _attend_packed(q, kv, others, softmax_scale, options, deterministic, return_attn_probs)


def flash_attn_qkvpacked_func(
    qkv: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Window = _UNLIMITED,
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Any:
    """`flash_attn_func` with queries, keys and values in qkv (batch, seqlen, 3, heads, head_dim), read where they lie.

    The gradient of qkv is one tensor, into which those of the three are written.
    """
    need_tensors("flash_attn_qkvpacked_func", qkv=qkv)
    _need_packed("flash_attn_qkvpacked_func", "qkv", qkv, "batch, seqlen, 3, heads, head_dim")
    options = _options(
        "flash_attn_qkvpacked_func", dropout_p, causal, window_size, softcap, deterministic, return_attn_probs
    )
    others = {"alibi_slopes": alibi_slopes}
    return _attend_packed(None, qkv, others, softmax_scale, options, deterministic, return_attn_probs)


def flash_attn_varlen_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Window = _UNLIMITED,
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    block_table: Tensor | None = None,
) -> Any:
    """Attention inside each of many packed sequences. See `flash_attn_func`.

    q: (total_q, heads, head_dim); k, v: (total_k, heads_k, head_dim).
    cu_seqlens_q, cu_seqlens_k: (batch + 1,) int32, the running sums of the lengths from 0, on q's device.
    max_seqlen_q, max_seqlen_k: at least the longest sequence. block_table: None.

    Returns out (total_q, heads, head_dim); with return_attn_probs (out, softmax_lse (heads, total_q), None). Rows that
    belong to no sequence are 0. Raises as the head of this file says.
    """
    if alibi_slopes is None and block_table is None and _usual(q, dropout_p, deterministic):
        options = max_seqlen_q, max_seqlen_k, causal, window_size, softmax_scale, softcap, return_attn_probs
        made = known(_PACKED, (q, k, v, cu_seqlens_q, cu_seqlens_k), options)
        if made is not None:
            return (*made, None) if return_attn_probs else made
    name = "flash_attn_varlen_func"
    need_tensors(name, q=q, k=k, v=v, cu_seqlens_q=cu_seqlens_q, cu_seqlens_k=cu_seqlens_k)
    more = _options(
        name, dropout_p, causal, window_size, softcap, deterministic, return_attn_probs,
        block_table=block_table, max_seqlen_q=max_seqlen_q, max_seqlen_k=max_seqlen_k,
    )  # fmt: skip
    others = {"cu_seqlens_q": cu_seqlens_q, "cu_seqlens_k": cu_seqlens_k, "alibi_slopes": alibi_slopes}
    return _attend(q, k, v, others, softmax_scale, more, deterministic, return_attn_probs)


def flash_attn_varlen_kvpacked_func(
    q: Tensor,
    kv: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Window = _UNLIMITED,
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Any:
    """`flash_attn_varlen_func` with keys and values in kv (total_k, 2, heads_k, head_dim), read where they lie.

    The gradient of kv is one tensor, into which those of keys and values are written.
    """
    name = "flash_attn_varlen_kvpacked_func"
    need_tensors(name, q=q, kv=kv, cu_seqlens_q=cu_seqlens_q, cu_seqlens_k=cu_seqlens_k)
    _need_packed(name, "kv", kv, "total_k, 2, heads_k, head_dim")
    options = _options(
        name, dropout_p, causal, window_size, softcap, deterministic, return_attn_probs,
        max_seqlen_q=max_seqlen_q, max_seqlen_k=max_seqlen_k,
    )  # fmt: skip
    others = {"cu_seqlens_q": cu_seqlens_q, "cu_seqlens_k": cu_seqlens_k, "alibi_slopes": alibi_slopes}
    return _attend_packed(q, kv, others, softmax_scale, options, deterministic, return_attn_probs)


def flash_attn_varlen_qkvpacked_func(
    qkv: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Window = _UNLIMITED,
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Any:
    """`flash_attn_varlen_func` with queries, keys and values in qkv (total, 3, heads, head_dim), read where they lie.

    The gradient of qkv is one tensor, into which those of the three are written.
    """
    name = "flash_attn_varlen_qkvpacked_func"
    need_tensors(name, qkv=qkv, cu_seqlens=cu_seqlens)
    _need_packed(name, "qkv", qkv, "total, 3, heads, head_dim")
    options = _options(
        name, dropout_p, causal, window_size, softcap, deterministic, return_attn_probs,
        max_seqlen_q=max_seqlen, max_seqlen_k=max_seqlen,
    )  # fmt: skip
    others = {"cu_seqlens_q": cu_seqlens, "cu_seqlens_k": cu_seqlens, "alibi_slopes": alibi_slopes}
    return _attend_packed(None, qkv, others, softmax_scale, options, deterministic, return_attn_probs)


def flash_attn_with_kvcache(*_: Any, **__: Any) -> NoReturn:
    """Raises UnsupportedProblem: there is no decoding step that also writes a cache, and there are no paged caches.

    What runs: write the new keys and values into k_cache and v_cache, then
    `flashmoe_cupy.flash_attention(q, k_cache, v_cache, causal=True, seqused_k=lengths, leftpad_k=cache_leftpad)`, with
    lengths (batch,) int32 that count the new ones. `flashmoe_cupy.KVCache` does that.
    """
    refuse(
        "flash_attn_with_kvcache", ["there is no step that writes into a cache, and there are no paged caches"],
        "write the new keys and values into the cache, then flash_attention(q, k_cache, v_cache, causal=True, "
        "seqused_k=lengths, leftpad_k=cache_leftpad); flashmoe_cupy.KVCache holds such a cache",
    )  # fmt: skip


def _usual(q: Any, dropout_p: Any, deterministic: Any) -> bool:
    """Whether a call may be one of ours as it is. What may be remembered is of any library, so q must be a tensor."""
    return deterministic is False and type(dropout_p) is float and dropout_p == 0 and isinstance(q, Tensor)


def _options(
    name: str, dropout_p: Any, causal: Any, window_size: Any, softcap: Any, deterministic: Any,
    return_attn_probs: Any, block_table: Any = None, **lengths: Any,
) -> dict[str, Any]:  # fmt: skip
    """Our options for these. Raises for what only flash-attn has; the call itself looks at all others."""
    flags = type(deterministic) is bool is type(return_attn_probs)
    if not (flags and type(dropout_p) is float and dropout_p == 0 and block_table is None):
        _look(name, dropout_p, deterministic, return_attn_probs, block_table)
    off = isinstance(softcap, (int, float)) and not isinstance(softcap, bool) and softcap < 0
    return {"causal": causal, "window_size": window_size, "softcap": 0.0 if off else softcap, **lengths}


def _look(name: str, dropout_p: Any, deterministic: Any, return_attn_probs: Any, block_table: Any) -> None:
    """Raise for what only flash-attn has."""
    why = no_dropout(dropout_p)
    hint = [NO_DROPOUT] if why else []
    if block_table is not None:
        why.append("block_table is given, but there are no paged caches")
        hint.append("block_table=None, with the keys of each sequence one behind the other")
    for argument, value in (("deterministic", deterministic), ("return_attn_probs", return_attn_probs)):
        if not isinstance(value, bool):
            why.append(f"{argument} must be a bool, but is {value!r}")
            hint.append(f"{argument}=True or False")
    if why:
        refuse(name, why, "; ".join(hint))


def _need_packed(name: str, argument: str, x: Tensor, wanted: str) -> None:
    """Raise for a packed tensor of another shape. wanted: its dimensions."""
    sizes = wanted.split(", ")
    if x.is_nested or x.ndim != len(sizes) or x.shape[-3] != int(sizes[-3]):
        have = "is a nested tensor" if x.is_nested else f"has {tuple(x.shape)}"
        refuse(name, [f"{argument} must have shape ({wanted}), but {have}"], f"{argument} of shape ({wanted})")


def _attend(
    q: Tensor, k: Tensor, v: Tensor, others: dict[str, Any], scale: Any, options: dict[str, Any],
    deterministic: bool, probs: bool,
) -> Any:  # fmt: skip
    """Run a call on q, k, v and other arrays, and give what flash-attn returns."""
    width = v.shape[-1] if v.ndim else 0
    q, k, v, scale = rows(q, k, v, scale)
    function: Any = flash_attention_varlen if "cu_seqlens_q" in others else flash_attention
    if deterministic and torch.is_grad_enabled():
        arrays = {"q": q, "k": k, "v": v, **others}
        if any(x is not None and x.requires_grad for x in arrays.values()):
            options = {**options, "softmax_scale": scale, "return_lse": probs}
            return _results(_deterministic(registered(function.__name__), arrays, options), width, probs)
    made = function(q, k, v, **others, **options, softmax_scale=scale, return_lse=probs)
    return _results(made, width, probs)


def _deterministic(operation: Operation, arrays: dict[str, Any], options: dict[str, Any]) -> Any:
    """Run a call whose gradients have the same bits in every run."""
    options = {"layout": "bshd", **options} if "layout" in operation.options else options
    return call(operation, dict.fromkeys(operation.arguments) | arrays, options, deterministic=True)


def _results(made: Any, width: int, probs: bool) -> Any:
    """What flash-attn returns. made: out, with probs also lse. width: the head dim of v, before it was filled up."""
    out, lse = made if probs else (made, None)
    out = out if out.shape[-1] == width else out[..., :width]
    return (out, lse, None) if probs else out


# ---------------------------------------------------------------------------------------------------------------------
# packed tensors


def _attend_packed(
    q: Tensor | None, packed: Tensor, others: dict[str, Any], scale: Any, options: dict[str, Any],
    deterministic: bool, probs: bool,
) -> Any:  # fmt: skip
    """`_attend` on the parts of a packed tensor: k and v, or all three where q is None."""
    if not _writes_one(q, packed, others):
        query, k, v = (q, *packed.unbind(-3)) if q is not None else packed.unbind(-3)
        return _attend(query, k, v, others, scale, options, deterministic, probs)
    width = packed.shape[-1]
    options = options | {"softmax_scale": scale_of(width, scale)}
    out, lse = _Packed.apply(options, deterministic, others, None if q is None else fit(q), fit(packed))
    return _results((out, lse) if probs else out, width, probs)


def _writes_one(q: Tensor | None, packed: Tensor, others: dict[str, Any]) -> bool:
    """Whether a call is to be differentiated by `_Packed`: with respect to `packed`, in eager code, without a cast."""
    if torch.compiler.is_compiling() or not packed.requires_grad or torch._C._is_any_autocast_enabled():
        return False
    given = [packed, *([] if q is None else [q]), *[x for x in others.values() if x is not None]]
    access = find(torch.Tensor)
    plain = all(type(x) in (torch.Tensor, torch.nn.Parameter) for x in given)
    fits = q is None or (q.ndim == packed.ndim - 1 and q.shape[-1] == packed.shape[-1])
    bad = any(x is not None and x.requires_grad for x in others.values())  # the other way says why there is none
    return plain and fits and not bad and access is not None and access.key(tuple(given)) is GRADIENT


class _Packed(torch.autograd.Function):  # type: ignore[misc, name-defined, unused-ignore]
    """Attention on the parts of a packed tensor. Its backward writes their gradients into one tensor."""

    @staticmethod
    def forward(
        ctx: Any, options: dict[str, Any], deterministic: bool, others: dict[str, Any], q: Any, packed: Any
    ) -> Any:
        parts = packed.unbind(-3) if q is None else (q, *packed.unbind(-3))
        function: Any = flash_attention_varlen if "cu_seqlens_q" in others else flash_attention
        out, lse = function(*parts, **others, **options, return_lse=True)
        ctx.options, ctx.deterministic, ctx.names = options, deterministic, tuple(others)
        ctx.save_for_backward(q, packed, out, lse, *others.values())
        ctx.set_materialize_grads(False)
        return out, lse

    @staticmethod
    @torch.autograd.function.once_differentiable  # type: ignore[untyped-decorator, unused-ignore]
    def backward(ctx: Any, dout: Any, dlse: Any) -> Any:
        q, packed, out, lse, *others = ctx.saved_tensors
        named = dict(zip(ctx.names, others, strict=True))
        varlen = "cu_seqlens_q" in named  # where rows may belong to no sequence, and nothing is written to them
        made = torch.zeros_like(packed) if varlen else torch.empty_like(packed)
        parts, targets = packed.unbind(-3), made.unbind(-3)
        if q is None:
            given, need = dict(zip(("dq", "dk", "dv"), targets, strict=True)), "q k v"
        else:
            given, need = dict(zip(("dk", "dv"), targets, strict=True)), "q k v" if ctx.needs_input_grad[3] else "k v"
            parts = q, *parts
        dout = torch.zeros_like(out) if dout is None else dout if dout.stride(-1) == 1 else dout.contiguous()
        function: Any = flash_attention_varlen_backward if varlen else flash_attention_backward
        found = function(
            dout, *parts, out, lse, dlse=dlse, need=need, **given, **named, **ctx.options,
            deterministic=ctx.deterministic or torch.are_deterministic_algorithms_enabled(),
        )  # fmt: skip
        return None, None, None, None if q is None else found.dq, made
