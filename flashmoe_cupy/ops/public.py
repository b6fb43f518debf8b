"""Every public function that runs an operation; what imports this module knows all operations."""

from __future__ import annotations

from flashmoe_cupy.ops.attention import flash_attention, flash_attention_varlen
from flashmoe_cupy.ops.attention_backward import flash_attention_backward, flash_attention_varlen_backward
from flashmoe_cupy.ops.attention_lse import attention_lse
from flashmoe_cupy.ops.grouped_gemm import grouped_gemm
from flashmoe_cupy.ops.moe import fused_moe
from flashmoe_cupy.ops.permute import moe_permute
from flashmoe_cupy.ops.route import moe_route

__all__ = [
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
