"""Which calls do not read memory here and now: those on JAX arrays, and on torch tensors that are traced."""

from __future__ import annotations

import sys
from typing import Any

import numpy as np

from flashmoe_cupy import _late
from flashmoe_cupy.ops.access import is_traced
from flashmoe_cupy.ops.compiled import compiled, torch_adapter

_kinds: dict[type, str] = {np.ndarray: ""}  # "jax", "torch", "torch subclass" or "", by array type


@compiled(torch_adapter)
def adapter(x: Any) -> Any:
    """The module whose `call` takes a call on x, or None: its memory may be read here and now.

    It is `flashmoe_cupy.jax` for arrays and tracers of JAX, and `flashmoe_cupy.torch`, which has operators, for tensors
    while torch traces and for those that are not plain memory, such as fake ones. Imports neither library.
    """
    kind = _kinds.get(type(x))
    if kind is None:
        kind = _kinds[type(x)] = _kind(x)
    if kind == "jax":
        return _late.load("jax")
    if kind == "torch subclass" or (kind and is_traced()):
        return _late.load("torch")
    return None


def _kind(x: Any) -> str:
    jax: Any = sys.modules.get("jax")
    torch: Any = sys.modules.get("torch")
    if hasattr(jax, "Array") and isinstance(x, jax.Array):
        return "jax"
    if hasattr(torch, "Tensor") and isinstance(x, torch.Tensor):
        return "torch" if type(x).__torch_dispatch__ is torch.Tensor.__torch_dispatch__ else "torch subclass"
    return ""
