"""Attention and mixture-of-experts kernels for NumPy, CuPy, PyTorch and JAX arrays.

CUDA C compiled at run time through CuPy; NumPy arrays run without a GPU. Importing this package imports neither CuPy,
torch nor JAX and needs no driver: every name below is loaded at its first use.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from flashmoe_cupy import errors, reference
    from flashmoe_cupy._version import __version__
    from flashmoe_cupy.attention_layer import FlashAttentionLayer
    from flashmoe_cupy.errors import CompileError, DependencyError, FlashMoEError, UnsupportedProblem
    from flashmoe_cupy.kv_cache import KVCache
    from flashmoe_cupy.layers import FlashMoELayer
    from flashmoe_cupy.ops.attention import flash_attention, flash_attention_varlen
    from flashmoe_cupy.ops.attention_backward import (
        AttentionGradients,
        flash_attention_backward,
        flash_attention_varlen_backward,
    )
    from flashmoe_cupy.ops.attention_lse import attention_lse
    from flashmoe_cupy.ops.grouped_gemm import grouped_gemm
    from flashmoe_cupy.ops.moe import fused_moe
    from flashmoe_cupy.ops.permute import MoEPermutation, moe_permute
    from flashmoe_cupy.ops.route import RouterStats, moe_route
    from flashmoe_cupy.service import clear_cache, explain, show_config, stats, warmup

_PLACE = {
    "__version__": "_version",
    "flash_attention": "ops.attention",
    "flash_attention_varlen": "ops.attention",
    "flash_attention_backward": "ops.attention_backward",
    "flash_attention_varlen_backward": "ops.attention_backward",
    "AttentionGradients": "ops.attention_backward",
    "attention_lse": "ops.attention_lse",
    "moe_route": "ops.route",
    "RouterStats": "ops.route",
    "moe_permute": "ops.permute",
    "MoEPermutation": "ops.permute",
    "grouped_gemm": "ops.grouped_gemm",
    "fused_moe": "ops.moe",
    "FlashMoELayer": "layers",
    "FlashAttentionLayer": "attention_layer",
    "KVCache": "kv_cache",
    "explain": "service",
    "warmup": "service",
    "stats": "service",
    "show_config": "service",
    "clear_cache": "service",
    "FlashMoEError": "errors",
    "UnsupportedProblem": "errors",
    "CompileError": "errors",
    "DependencyError": "errors",
    "errors": "",
    "reference": "",
}

_OWN = "and flashmoe_cupy.integrations.{} has it with its own arguments"
_ELSEWHERE = {  # functions of flash-attn, torch, JAX and vLLM
    "flash_attn_func": f"flash_attention here, {_OWN.format('flash_attn')}",
    "flash_attn_varlen_func": f"flash_attention_varlen here, {_OWN.format('flash_attn')}",
    "scaled_dot_product_attention": f"flash_attention here, {_OWN.format('sdpa')}",
    "dot_product_attention": "flash_attention here",
    "fused_experts": "fused_moe here",
    "fused_topk": "moe_route here",
    "grouped_topk": "moe_route here",
}

__all__ = [
    "AttentionGradients",
    "CompileError",
    "DependencyError",
    "FlashAttentionLayer",
    "FlashMoEError",
    "FlashMoELayer",
    "KVCache",
    "MoEPermutation",
    "RouterStats",
    "UnsupportedProblem",
    "__version__",
    "attention_lse",
    "clear_cache",
    "errors",
    "explain",
    "flash_attention",
    "flash_attention_backward",
    "flash_attention_varlen",
    "flash_attention_varlen_backward",
    "fused_moe",
    "grouped_gemm",
    "moe_permute",
    "moe_route",
    "reference",
    "show_config",
    "stats",
    "warmup",
]


def _load_jax() -> Any:
    from flashmoe_cupy import jax

    return jax


def _load_torch() -> Any:  # torch.compile can trace an import statement, and no import_module
    from flashmoe_cupy import torch

    return torch


def _load_operations() -> Any:
    from flashmoe_cupy.ops import public

    return public


def __getattr__(name: str) -> Any:
    place = _PLACE.get(name)
    if place is None:
        mine = f"; it is called {_ELSEWHERE[name]}" if name in _ELSEWHERE else ""
        raise AttributeError(f"module 'flashmoe_cupy' has no attribute {name!r}{mine}")
    value = getattr(import_module(f"flashmoe_cupy.{place}"), name) if place else import_module(f"flashmoe_cupy.{name}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
