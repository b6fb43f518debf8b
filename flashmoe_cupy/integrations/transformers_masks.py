"""Masks that say which pairs count in a few numbers: what transformers' mask function hands to our attention.

`padded` makes one where a causal, windowed or bidirectional rule and a 2-D padding mask are all that a batch asks for.
The numbers are found on the device, and nothing waits for them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch.utils._pytree import tree_map_only

_UNLIMITED = -1, -1
_aten = torch.ops.aten
_COPIES = {_aten.clone.default, _aten._to_copy.default, _aten.to.device, _aten.to.dtype, _aten.to.dtype_layout}
_ALIASES = {_aten.alias.default, _aten.detach.default}


class Rule(NamedTuple):
    """Which keys a query sees beside padding; as arguments of `flash_attention`."""

    causal: bool
    window_size: tuple[int, int]


class Padding:
    """What a `PaddedMask` stands for. Masks that share memory in torch's sense share one of these.

    rule: the Rule. row: boolean (batch, 1, 1, kv_length), True = a key that is no padding, or None.
    lengths: (batch,) int32 tensors by the names of `flash_attention`'s arguments; those left out say nothing.
    arguments: of transformers' `sdpa_mask`, for the whole mask.
    """

    def __init__(
        self, rule: Rule, row: torch.Tensor | None, lengths: dict[str, torch.Tensor], arguments: dict[str, Any]
    ) -> None:
        self.rule, self.row, self.lengths, self.arguments = rule, row, lengths, arguments
        self.built: torch.Tensor | None = None
        self.exposed = False  # somebody else has had the memory of `built`, and may have written to it

    def whole(self) -> torch.Tensor:
        """The boolean (batch, 1, q_length, kv_length) mask, built at the first call."""
        if self.built is None:
            from transformers.masking_utils import sdpa_mask

            self.built = sdpa_mask(**self.arguments, allow_is_causal_skip=False, allow_is_bidirectional_skip=False)
        return self.built

    def copy(self, device: torch.device) -> Padding:
        """The same on a device, in memory of its own."""

        def moved(x: Any) -> Any:
            return x.to(device, non_blocking=True) if isinstance(x, torch.Tensor) else x

        arguments = {name: moved(x) for name, x in self.arguments.items()} | {"device": device}
        lengths = {name: moved(x) for name, x in self.lengths.items()}
        return Padding(self.rule, moved(self.row), lengths, arguments)


class PaddedMask(torch.Tensor):  # type: ignore[misc]
    """Looks like the boolean (batch, 1, q_length, kv_length) mask, True = attend; holds a `Padding`, and no elements.

    Any operation of torch on it computes with the whole mask, which is built then. Moving and copying it builds
    nothing. A mask that was written to, or of which there is a view, is the whole mask from then on.
    """

    padding: Padding

    @staticmethod
    def __new__(cls, padding: Padding) -> PaddedMask:
        batch, q, kv = (padding.arguments[name] for name in ("batch_size", "q_length", "kv_length"))
        device = padding.arguments["device"]
        made: PaddedMask = torch.Tensor._make_wrapper_subclass(cls, (batch, 1, q, kv), dtype=torch.bool, device=device)
        made.padding = padding
        return made

    def __repr__(self) -> str:  # type: ignore[override, unused-ignore]
        rule, names = self.padding.rule, [*self.padding.lengths] + ["row"] * (self.padding.row is not None)
        return f"PaddedMask({tuple(self.shape)}, {rule}, {', '.join(names) or 'no padding'}, device={self.device})"

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        kept = _kept(func, args, kwargs)
        if kept is not None:
            return kept
        schema = func._schema
        views = func not in _COPIES and any(one.alias_info is not None for one in schema.returns)
        if views or schema.is_mutable:
            tree_map_only(PaddedMask, _expose, (args, kwargs))
        args, kwargs = tree_map_only(PaddedMask, lambda mask: mask.padding.whole(), (args, kwargs))
        return func(*args, **kwargs)


def _expose(mask: PaddedMask) -> None:
    mask.padding.exposed = True


def _kept(func: Any, args: Any, kwargs: Any) -> PaddedMask | None:
    """The result where an operation leaves a mask as it is; None where it needs the elements."""
    first = args[0] if args else None
    if not isinstance(first, PaddedMask) or first.padding.exposed:
        return None
    if func in _ALIASES or (func is _aten.slice.Tensor and _all_of(first, *args[1:], **kwargs)):
        return PaddedMask(first.padding)
    if func in _COPIES:  # a tensor without elements knows where its copy belongs, and of which type it is
        probe = func(torch.empty((0, 1, 1, 1), dtype=torch.bool, device=first.device), *args[1:], **kwargs)
        return PaddedMask(first.padding.copy(probe.device)) if probe.dtype == torch.bool else None
    return None


def _all_of(mask: PaddedMask, dim: int = 0, start: int | None = None, end: int | None = None, step: int = 1) -> bool:
    return step == 1 and start in (None, 0) and (end is None or end >= mask.shape[dim])


# ---------------------------------------------------------------------------------------------------------------------
# from the arguments of transformers' mask functions


def rule_of(function: Callable[..., Any] | None, local_size: int | None) -> Rule | None:
    """The rule that a mask function of transformers stands for; None for one that is put together in another way."""
    from transformers import masking_utils as known

    if function is None or function is known.causal_mask_function:
        return Rule(True, _UNLIMITED)
    if function is known.bidirectional_mask_function:
        return Rule(False, _UNLIMITED)
    if local_size is None or local_size < 1:
        return None
    if _same(function, known.sliding_window_causal_mask_function(local_size)):
        return Rule(True, (local_size - 1, 0))
    if _same(function, known.sliding_window_bidirectional_mask_function(local_size)):
        return Rule(False, (local_size, local_size))
    return None


def _same(one: Any, other: Any) -> bool:
    """Whether two functions were made by the same code around the same values."""
    if isinstance(one, tuple) and isinstance(other, tuple):
        return len(one) == len(other) and all(map(_same, one, other))
    code = getattr(one, "__code__", None)
    if code is None or code is not getattr(other, "__code__", None):
        return type(one) is type(other) is int and one == other
    cells = [tuple(cell.cell_contents for cell in function.__closure__ or ()) for function in (one, other)]
    return _same(*cells)


def padded(
    rule: Rule, *, batch_size: int, q_length: int, kv_length: int, q_offset: int | torch.Tensor, kv_offset: int,
    attention_mask: torch.Tensor | None, device: torch.device | str = "cpu", **arguments: Any,
) -> PaddedMask | None:  # fmt: skip
    """The mask, or None where lengths cannot say it. Arguments: transformers.masking_utils.sdpa_mask."""
    if not (batch_size and q_length and kv_length) or (isinstance(q_offset, torch.Tensor) and q_offset.ndim):
        return None
    row = None
    if attention_mask is not None:
        if attention_mask.ndim != 2 or attention_mask.dtype != torch.bool or attention_mask.shape[0] != batch_size:
            return None
        row = attention_mask[:, kv_offset : kv_offset + kv_length]
        if row.shape[1] < kv_length:  # a static cache has room behind the newest token
            row = torch.nn.functional.pad(row, (0, kv_length - row.shape[1]))
    if isinstance(q_offset, torch.Tensor):
        q_offset = q_offset.clone()  # it belongs to the cache, which goes on counting in it
    device = torch.device(device)
    lengths = _lengths(rule, batch_size, q_length, kv_length, q_offset - kv_offset, row, device)
    if lengths is None:
        return None
    arguments |= {"batch_size": batch_size, "q_length": q_length, "kv_length": kv_length, "q_offset": q_offset}
    arguments |= {"kv_offset": kv_offset, "attention_mask": attention_mask, "device": device}
    if rule.window_size[0] >= kv_length - 1:
        rule = Rule(rule.causal, _UNLIMITED)
    return PaddedMask(Padding(rule, None if row is None else row[:, None, None], lengths, arguments))


def _lengths(
    rule: Rule, batch: int, queries: int, keys: int, shift: Any, row: torch.Tensor | None, device: torch.device
) -> dict[str, torch.Tensor] | None:
    """What counts of each batch entry, by the names of `flash_attention`'s arguments; None where that cannot say it.

    shift: int or tensor, the place of the first query among the keys. With a causal rule or a window, the ends of what
    counts in q and in k must lie `shift` apart, since both are aligned there.
    """
    if not rule.causal and rule.window_size == _UNLIMITED:
        if row is None:
            return {}
        # All queries count: this may be cross attention, where the padding of the keys is not theirs.
        last = _last(row)
        return {"leftpad_k": torch.minimum(_first(row), last), "seqused_k": last}
    end = shift + queries  # the keys up to the last query's own
    known = isinstance(end, int)
    if known and (shift < 0 or end > keys):
        return None
    if not rule.causal:
        if not known or end < keys:
            return None
        return {} if row is None else {"leftpad_k": _first(row)}  # the row alone hides padding on the right
    limit = None
    if not known:
        limit = end.to(torch.int32).expand(batch).contiguous()
    elif end < keys:
        limit = torch.full((batch,), end, dtype=torch.int32, device=device)
    if row is None:
        return {} if limit is None else {"seqused_k": limit}
    first = _first(row)
    if queries == 1:  # the newest token counts
        return {"leftpad_k": first} if limit is None else {"leftpad_k": torch.minimum(first, limit), "seqused_k": limit}
    # Where no query of an entry is a token, by the mask, all are computed, as in eager attention.
    last = _last(row)
    none = last <= shift
    used = last.masked_fill(none, end) if limit is None else torch.minimum(last, limit).where(~none, limit)
    start = torch.minimum(first, used)
    found = {"leftpad_k": start, "seqused_k": used}
    if known and shift == 0:
        return found | {"leftpad_q": start, "seqused_q": used}
    return found | {"leftpad_q": (start - shift).clamp(min=0), "seqused_q": used - shift}


def _first(row: torch.Tensor) -> torch.Tensor:
    """Of each row of a boolean (batch, n): the place of the first True, or n; int32."""
    n = row.shape[1]
    return n - (row * torch.arange(n, 0, -1, dtype=torch.int32, device=row.device)).amax(-1)


def _last(row: torch.Tensor) -> torch.Tensor:
    """Of each row of a boolean (batch, n): the place behind the last True, or 0; int32."""
    return (row * torch.arange(1, row.shape[1] + 1, dtype=torch.int32, device=row.device)).amax(-1)
