"""Modules of torch.nn, made of the layers for arrays of any library. `flashmoe_cupy.torch` has their names."""

from __future__ import annotations

from typing import Any

import torch

from flashmoe_cupy.attention_layer import CALL, attend, attention_options, rms_norm, why_not_call
from flashmoe_cupy.errors import UnsupportedProblem
from flashmoe_cupy.kv_cache import KVCache, new_cache
from flashmoe_cupy.layer_arrays import library
from flashmoe_cupy.plan.checks import show

_TORCH = library(torch.Tensor)


class FlashMoEScienceAttention(torch.nn.Module):  # type: ignore[misc, unused-ignore]
    """An attention layer as an nn.Module: projections, rotary positions, attention, the way out; it trains.

    dim: of the tokens. n_heads: of queries; n_kv_heads: of keys and values, None = as many. head_dim: None = dim /
        n_heads, a multiple of 8 up to 256.
    bias: whether q_proj, k_proj and v_proj have one; out_bias: whether o_proj has one, None = as bias says.
    causal: a query sees no later key. window_size, softmax_scale, softcap: as in `flash_attention`.
    rope_theta: the base of rotary positions, which turn elements i and i + head_dim / 2 of queries and keys, as in
        Llama; None = there are none.
    qk_norm: an RMS norm of each head of queries and keys before that, with norm_eps, as in Qwen3.
    device, dtype: of the parameters; bfloat16, float16 or float32.

    Parameters: q_proj, k_proj, v_proj and o_proj (torch.nn.Linear), with qk_norm also q_norm and k_norm
    (torch.nn.RMSNorm): the names of Llama's and Qwen3's attention in transformers, so that their state_dict fits.
    `options` holds the sizes and options. `flashmoe_cupy.FlashAttentionLayer` is the same layer without parameters, for
    arrays of any library.

    Raises UnsupportedProblem (a ValueError) with every reason for sizes and options that do not run.
    """

    def __init__(
        self,
        dim: int,
        n_heads: int,
        n_kv_heads: int | None = None,
        *,
        head_dim: int | None = None,
        bias: bool = False,
        out_bias: bool | None = None,
        causal: bool = True,
        window_size: tuple[int, int] = (-1, -1),
        softmax_scale: float | None = None,
        softcap: float = 0.0,
        rope_theta: float | None = 1e4,
        qk_norm: bool = False,
        norm_eps: float = 1e-6,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        name = type(self).__name__
        self.options = its = attention_options(
            name, dim, n_heads, n_kv_heads, head_dim, causal, window_size, softmax_scale, softcap, rope_theta, norm_eps
        )
        flags: dict[str, Any] = {"bias": bias, "out_bias": bias if out_bias is None else out_bias, "qk_norm": qk_norm}
        if why := [f"{flag} must be a bool, but is {show(value)}" for flag, value in flags.items()
                   if not isinstance(value, bool)]:  # fmt: skip
            raise UnsupportedProblem(f"{name}({its})", why, "True or False")
        made: dict[str, Any] = {"device": device, "dtype": dtype}
        queries, keys = its.n_heads * its.head_dim, its.n_kv_heads * its.head_dim
        self.q_proj = torch.nn.Linear(its.dim, queries, bias, **made)
        self.k_proj = torch.nn.Linear(its.dim, keys, bias, **made)
        self.v_proj = torch.nn.Linear(its.dim, keys, bias, **made)
        self.o_proj = torch.nn.Linear(queries, its.dim, flags["out_bias"], **made)
        self.q_norm = torch.nn.RMSNorm(its.head_dim, its.norm_eps, **made) if qk_norm else None
        self.k_norm = torch.nn.RMSNorm(its.head_dim, its.norm_eps, **made) if qk_norm else None

    def forward(
        self, x: torch.Tensor, *, position_ids: torch.Tensor | None = None, cache: KVCache | None = None,
        lengths: torch.Tensor | None = None, cu_seqlens: torch.Tensor | None = None, max_seqlen: int | None = None,
    ) -> torch.Tensor:  # fmt: skip
        """x (batch, seqlen, dim) to the same shape; (total, dim) where sequences are packed.

        position_ids: (batch, seqlen), (seqlen,) or (total,), int32 or int64; None = from 0 on, behind the tokens in
            the cache, or in each packed sequence.
        cache: tokens that came before, to which these are added, for generation: a cache has no gradient, so calls with
            one run under torch.no_grad().
        lengths: (batch,) int32: only so many first rows of each entry count; attention gives 0 for others.
        cu_seqlens: (batch + 1,) int32, max_seqlen: as in `flash_attention_varlen`; not beside cache and lengths.

        Raises UnsupportedProblem with every reason before anything is written, TypeError for what is no tensor.
        """
        if not isinstance(x, torch.Tensor):
            raise TypeError(f"x must be a torch.Tensor, but is {show(x)}")
        its = self.options
        why = why_not_call(its, torch.Tensor, x, position_ids, cache, lengths, cu_seqlens, max_seqlen)
        if why:
            raise UnsupportedProblem(f"{type(self).__name__}({its})", why, CALL)
        q = self.q_proj(x).unflatten(-1, (its.n_heads, its.head_dim))
        k, v = (side(x).unflatten(-1, (its.n_kv_heads, its.head_dim)) for side in (self.k_proj, self.v_proj))
        if self.q_norm is not None and self.k_norm is not None:
            q, k = (rms_norm(_TORCH, x, norm.weight, its.norm_eps) for x, norm in ((q, self.q_norm), (k, self.k_norm)))
        out = attend(_TORCH, its, q, k, v, position_ids, cache, lengths, cu_seqlens, max_seqlen)
        return self.o_proj(out)

    def new_cache(self, batch: int, max_length: int, dtype: torch.dtype | None = None) -> KVCache:
        """An empty `KVCache` for this layer, on its device. dtype: None = that of its parameters; under torch.autocast
        give the one that is cast to.
        """
        its, weight = self.options, self.k_proj.weight
        return new_cache(_TORCH, batch, max_length, its.n_kv_heads, its.head_dim, weight, dtype or weight.dtype)

    def extra_repr(self) -> str:
        """The sizes, and the options that are not at their defaults."""
        return str(self.options)
