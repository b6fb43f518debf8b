"""The float64 truth: every operation in plain NumPy, slow and obvious, to be read beside the formulas."""

from __future__ import annotations

from flashmoe_cupy.reference.attention import (
    AttentionGradients,
    flash_attention,
    flash_attention_backward,
    flash_attention_varlen,
    flash_attention_varlen_backward,
)

__all__ = [
    "AttentionGradients",
    "flash_attention",
    "flash_attention_backward",
    "flash_attention_varlen",
    "flash_attention_varlen_backward",
]
