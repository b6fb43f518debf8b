"""The float64 truth: every operation in plain NumPy, slow and obvious, to be read beside the formulas."""

from __future__ import annotations

from flashmoe_cupy.reference.attention import (
    AttentionGradients,
    attention_lse,
    flash_attention,
    flash_attention_backward,
    flash_attention_varlen,
    flash_attention_varlen_backward,
)
from flashmoe_cupy.reference.moe import (
    MoEPermutation,
    fused_moe,
    grouped_gemm,
    moe_permute,
)
from flashmoe_cupy.reference.router import RouterStats, moe_route

__all__ = [
    "AttentionGradients",
    "MoEPermutation",
    "RouterStats",
    "attention_lse",
    "flash_attention",
    "flash_attention_backward",
    "flash_attention_varlen",
    "flash_attention_varlen_backward",
    "fused_moe",
    "grouped_gemm",
    "moe_permute",
    "moe_route",
]
