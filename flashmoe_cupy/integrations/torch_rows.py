"""What the stand-ins for other libraries' functions on torch tensors share: rows that kernels take, and errors."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NoReturn

import torch

from ..errors import UnsupportedProblem

_SHORTEST = 8  # head dims are multiples of it


def fit(x: torch.Tensor) -> torch.Tensor:
    """x with a contiguous last dimension that is a multiple of 8, filled up with zeros; x itself if it is so already.

    Anything else is a copy on x's device, which torch differentiates.
    """
    if x.is_nested or x.layout is not torch.strided or not x.ndim:
        return x  # which the call itself refuses
    if odd := x.shape[-1] % _SHORTEST:
        return torch.nn.functional.pad(x, (0, _SHORTEST - odd))
    return x if x.is_contiguous() or x.stride(-1) == 1 else x.contiguous()


def rows(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: Any
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, Any]:
    """q, k and v as `fit` makes them, and the scale of their scores, which that must not change."""
    width = q.shape[-1] if q.ndim and k.ndim else 0
    if not (width and k.shape[-1] == width):
        return q, k, v, scale  # which the call itself refuses
    return fit(q), fit(k), fit(v), scale_of(width, scale)


def scale_of(head_dim: int, scale: Any) -> Any:
    """The scale of scores whose head dim `fit` may fill up; None where the call itself finds the same."""
    return 1 / math.sqrt(head_dim) if scale is None and head_dim and head_dim % _SHORTEST else scale


def no_dropout(dropout_p: Any) -> list[str]:
    """Why this probability cannot be served: any but 0."""
    if isinstance(dropout_p, (int, float)) and not isinstance(dropout_p, bool) and dropout_p == 0:
        return []
    return [f"dropout_p={dropout_p!r}, but there is no dropout"]


NO_DROPOUT = "dropout_p=0.0, as in evaluation"


def need_tensors(name: str, **given: Any) -> None:
    """Raise TypeError for what is no tensor. name: of the function."""
    for argument, x in given.items():
        if not isinstance(x, torch.Tensor):
            kind = "None" if x is None else f"a {type(x).__module__.partition('.')[0]}.{type(x).__qualname__}"
            hint = "flashmoe_cupy.flash_attention takes arrays of other libraries"
            raise TypeError(f"{name}: {argument} must be a torch.Tensor, but is {kind}; {hint}")


def refuse(asked: str, why: Sequence[str], hint: str) -> NoReturn:
    """Raise UnsupportedProblem, or its base while torch compiles, which cannot trace the making of a type of ours."""
    if torch.compiler.is_dynamo_compiling():
        raise ValueError(f"cannot run {asked}: {'; '.join(why)}; hint: {hint}")
    raise UnsupportedProblem(asked, why, hint)
