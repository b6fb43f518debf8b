"""Why a torch tensor cannot be read as it is. Text alone: the fast checks are in arrays/readers.py."""

from __future__ import annotations

from typing import Any

from flashmoe_cupy.dtypes import DType


def reasons(torch: Any, x: Any, wrapper: bool, dtype: DType | None) -> list[str]:
    """Every reason why a tensor cannot be read as plain memory; slow, runs only after the quick checks failed."""
    why: list[str] = []
    functorch = getattr(getattr(torch._C, "_functorch", None), "is_functorch_wrapped_tensor", None)
    inside = functorch is not None and functorch(x)
    if wrapper and not x.is_nested:
        why.append("this subclass has its own __torch_dispatch__, so it is not plain memory; give a plain tensor")
    if inside:
        why.append("torch.func transforms (vmap, jvp, functionalize) are not supported")
    if x.requires_grad and torch.is_grad_enabled():
        why.append("it requires grad and grad mode is on, but there is no gradient; use torch.no_grad() or .detach()")
    forward_ad = torch.autograd.forward_ad
    dual = not (wrapper or inside) and getattr(forward_ad, "_current_level", -1) >= 0
    if dual and forward_ad.unpack_dual(x).tangent is not None:
        why.append("it has a forward-mode tangent, but there is no derivative; use the primal of unpack_dual")
    if dtype is None:
        why.append(f"dtype {x.dtype} is not supported")
    if scattered := no_strides(torch, x):
        why.append(scattered)
    elif x.is_conj() or x.is_neg():
        why.append("its conjugate or negative bit is set; use .resolve_conj() and .resolve_neg()")
    if not (x.is_cuda or x.is_cpu):
        why.append(f"device {x.device} is neither a CUDA device nor the CPU")
    if not (why or dual):
        why.append("it has no storage")
    return why


def no_strides(torch: Any, x: Any) -> str:
    """Why a tensor is not one block of memory with strides; "" where it is."""
    if x.is_nested:
        return "it is a nested tensor, whose rows have different lengths"
    return "" if x.layout is torch.strided else f"layout {x.layout} is not strided; use .to_dense()"


def instead(x: Any, name: str) -> str:
    """What to give instead of a nested tensor; "" for all others."""
    if not x.is_nested:
        return ""
    if name not in ("q", "k", "v"):
        return "a tensor that is not nested"
    return "flash_attention_varlen with values() of jagged tensors as q, k, v, and offsets().int() as cu_seqlens"
