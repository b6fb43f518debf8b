"""torch's `scaled_dot_product_attention`, with its arguments and its meaning of them."""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor

from ..ops.attention import flash_attention
from ..ops.call import known
from ..plan.operation import registered
from .torch_rows import NO_DROPOUT, need_tensors, no_dropout, refuse, rows

__all__ = ["scaled_dot_product_attention"]

_DENSE = registered("flash_attention").call
_NAME = "scaled_dot_product_attention"
_SHAPES = "query (..., heads, L, E), key (..., heads, S, E), value (..., heads, S, Ev), whose leading axes broadcast"


def scaled_dot_product_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """softmax(scale * query key^T, masked) value, as `torch.nn.functional.scaled_dot_product_attention` has it.

    query: (..., heads, L, E), key: (..., heads, S, E), value: (..., heads, S, Ev), bfloat16, float16 or float32 of one
        dtype, with any number of leading axes, which broadcast; (L, E) alone is one head. E up to 256, Ev up to 512.
    attn_mask: what broadcasts to (..., heads, L, S). A boolean True takes part; numbers, in query's dtype or float32,
        are added to the scores, and have a gradient.
    dropout_p: 0. is_causal: query i sees key j only if j <= i, aligned at the **top left**; not beside attn_mask. No
        mask is built for it: with L < S later keys are left out, with L > S it is a window.
    scale: None = E ** -0.5. enable_gqa: fewer heads of key and value, as many in both, of which each serves the next
        ones of query. Without it, heads broadcast as the other leading axes do.

    Returns a new tensor (..., heads, L, Ev), differentiable once with respect to query, key, value and a float mask. A
    query that sees no key gives 0, as torch gives it from version 2.5 on; before, it gave NaN.

    Copies on the device: of query, key and value where a head dim is no multiple of 8 (filled up with zeros), where
    their last dimension is not contiguous, or where several leading axes that broadcast do not merge to one. Masks are
    read as `flashmoe_cupy.flash_attention` reads a bias.

    Raises UnsupportedProblem (a ValueError) with all reasons for what torch refuses, for dropout, and for what
    `flash_attention` refuses, such as float64; TypeError for what is no tensor.
    """
    if attn_mask is None and type(dropout_p) is float and dropout_p == 0 and isinstance(query, Tensor):
        made = _known(query, key, value, is_causal, scale, enable_gqa)
        if made is not None:
            return made
    need_tensors(_NAME, query=query, key=key, value=value, **({} if attn_mask is None else {"attn_mask": attn_mask}))
    why, hint = [], []
    if no := no_dropout(dropout_p):
        why, hint = no, [NO_DROPOUT]
    for name, flag in (("is_causal", is_causal), ("enable_gqa", enable_gqa)):
        if not isinstance(flag, bool):
            why.append(f"{name} must be a bool, but is {flag!r}")
            hint.append(f"{name}=True or False")
    if is_causal is True and attn_mask is not None:
        why.append("is_causal is True beside an attn_mask")
        hint.append("one of the two: a mask can say both")
    lead = _leading(query, key, value, enable_gqa is True, why, hint)
    if lead is not None and key.shape[-2] != value.shape[-2]:
        why.append(f"key and value differ in length: key has {key.shape[-2]} rows, value has {value.shape[-2]}")
        hint.append(_SHAPES)
    if why or lead is None:
        refuse(_NAME, why, "; ".join(hint))
    length, keys, width = query.shape[-2], key.shape[-2], value.shape[-1]
    bias = None if attn_mask is None else _bias(attn_mask, lead, (length, keys))
    batch, heads = lead[:-1], lead[-1] if lead else 1
    few = enable_gqa or all(x.ndim < 3 or x.shape[-3] == 1 for x in (key, value))  # heads that stay as they are
    q, (k, v) = _rows(query, batch, heads), [_rows(x, batch, None if few else heads) for x in (key, value)]
    window, causal = (-1, -1), is_causal and length <= keys
    if is_causal and length < keys:  # what lies behind is seen by no query
        k, v = k[:, :, :length], v[:, :, :length]
    elif is_causal and length > keys:  # a window is aligned at the bottom right: length - keys further up
        window = -1, length - keys
    q, k, v, factor = rows(q, k, v, scale)
    out = flash_attention(q, k, v, causal=causal, window_size=window, softmax_scale=factor, bias=bias, layout="bhsd")
    out = out if out.shape[-1] == width else out[..., :width]
    return out if len(lead) == 2 else out.reshape(*lead, length, width)


def _known(query: Tensor, key: Any, value: Any, is_causal: Any, scale: Any, gqa: Any) -> Any:
    """The result of a call that is one of ours as it is, where a guard knows its arrays; None: that is not known."""
    if type(gqa) is not bool or not isinstance(key, Tensor) or query.is_nested or key.is_nested:
        return None
    own, other = query.shape, key.shape
    if len(own) != 4 or len(other) != 4 or not (gqa or own[1] == other[1]):
        return None
    if is_causal is not False and own[2] != other[2]:  # top left is bottom right only in a square
        return None
    return known(_DENSE, (query, key, value), (is_causal, (-1, -1), scale, 0, "bhsd", False))


def _leading(
    query: Tensor, key: Tensor, value: Tensor, gqa: bool, why: list[str], hint: list[str]
) -> tuple[int, ...] | None:
    """The leading axes of the result, the last of which are query's heads; adds to why and hint if there are none."""
    given = {"query": query, "key": key, "value": value}
    if nested := [name for name, x in given.items() if x.is_nested]:
        why += [f"{name} is a nested tensor" for name in nested]
        hint.append("flash_attention_varlen takes rows of different lengths")
        return None
    least = 3 if gqa else 2
    if short := [name for name, x in given.items() if x.ndim < least]:
        why += [f"{name} must have at least {least} dimensions, but has {given[name].ndim}" for name in short]
        hint.append(_SHAPES)
        return None
    shapes = [tuple(x.shape[: -3 if gqa else -2]) for x in given.values()]
    found = _spread(shapes)
    if found is None:
        what = "before the heads" if gqa else "before the last two"
        why.append(f"the axes {what} do not broadcast: query has {shapes[0]}, key {shapes[1]}, value {shapes[2]}")
        hint.append(_SHAPES if gqa else f"{_SHAPES}; enable_gqa=True for fewer heads of key and value")
        return None
    return (*found, query.shape[-3]) if gqa else found


def _spread(shapes: list[tuple[int, ...]]) -> tuple[int, ...] | None:
    """The shape to which all of these broadcast; None if there is none."""
    if shapes[0] == shapes[1] == shapes[2]:
        return shapes[0]
    most = max(map(len, shapes))
    found = []
    for sizes in zip(*[(1,) * (most - len(shape)) + shape for shape in shapes], strict=True):
        wide = [size for size in sizes if size != 1]
        if any(size != wide[0] for size in wide):
            return None
        found.append(wide[0] if wide else 1)
    return tuple(found)


def _rows(x: Tensor, batch: tuple[int, ...], heads: int | None) -> Tensor:
    """x as (batch, heads, rows, dim), with all axes of the batch in one. heads: None = its own."""
    if x.ndim == 4 and len(batch) == 1 and x.shape[0] == batch[0] and heads in (None, x.shape[1]):
        return x
    return _merged(x, batch).expand(math.prod(batch), -1 if heads is None else heads, -1, -1)


def _bias(mask: Tensor, lead: tuple[int, ...], scores: tuple[int, int]) -> Tensor:
    """The mask in four dimensions that broadcast to (batch, heads, L, S)."""
    wanted = (*(lead or (1,)), *scores)
    pairs = zip(reversed(mask.shape), reversed(wanted), strict=False)
    if mask.ndim > len(wanted) or any(size not in (1, want) for size, want in pairs):
        why = f"attn_mask must broadcast to {wanted}, the shape of the scores, but has {tuple(mask.shape)}"
        refuse(_NAME, [why], "an attn_mask whose axes are 1 or those of the scores, with missing ones in front")
    return _merged(mask, lead[:-1])


def _merged(x: Tensor, batch: tuple[int, ...]) -> Tensor:
    """x in four dimensions: all axes before the last three, which broadcast to `batch`, become one.

    That has 1 entry where none of them is longer.
    """
    own, rest = tuple(x.shape[:-3]), ((1,) * (3 - x.ndim) + tuple(x.shape))[-3:]
    if math.prod(own) == 1:
        return x.reshape(1, *rest)
    return x.expand(*batch, *rest).reshape(math.prod(batch), *rest)
