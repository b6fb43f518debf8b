"""Types of the public functions, for those who check theirs. Nothing here does anything at run time."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal, Required, SupportsIndex, TypedDict, TypeVar

import numpy as np

Array = TypeVar("Array")  # of NumPy, CuPy, torch or JAX; results have the type of the first argument
Shape = TypeVar("Shape", bound=tuple[Any, ...])  # and
Kind = TypeVar("Kind", bound=np.dtype[Any])  # of a NumPy array, whose float32 results have another type than it

Layout = Literal["bshd", "bhsd"]
Scoring = Literal["softmax", "sigmoid", "sqrtsoftplus"]
Activation = Literal["swiglu", "geglu", "geglu_tanh", "swigluoai", "gelu", "gelu_tanh", "relu", "relu2"]
Window = Sequence[SupportsIndex]
Need = Sequence[str]  # names of arguments whose gradients are wanted

if TYPE_CHECKING:

    class Scores(TypedDict, total=False):
        causal: bool
        window_size: Window
        softmax_scale: float | None
        softcap: float
        sinks: Any
        alibi_slopes: Any

    class Dense(Scores, total=False):
        """Options of flash_attention, without return_lse and out."""

        bias: Any
        seqused_q: Any
        seqused_k: Any
        leftpad_q: Any
        leftpad_k: Any
        layout: Layout

    class Packed(Scores, total=False):
        """Options of flash_attention_varlen, without return_lse and out."""

        cu_seqlens_q: Required[Any]
        cu_seqlens_k: Required[Any]
        max_seqlen_q: Required[SupportsIndex]
        max_seqlen_k: Required[SupportsIndex]
        seqused_q: Any
        seqused_k: Any

    class Route(TypedDict, total=False):
        """Options of moe_route, without return_stats."""

        top_k: Required[SupportsIndex]
        scoring_func: Scoring
        renormalize: bool
        routed_scaling_factor: float
        e_score_correction_bias: Any
        num_expert_group: SupportsIndex
        topk_group: SupportsIndex
        capacity_factor: float | None

    class Gemm(TypedDict, total=False):
        """Options of grouped_gemm, without out."""

        offsets: Any
        group_sizes: Any
        gather_indices: Any
        bias: Any

    class Experts(TypedDict, total=False):
        """Options of fused_moe, without out."""

        activation: Activation
        b_gate_up: Any
        b_down: Any
        interleaved: bool
        swiglu_alpha: float | None
        swiglu_limit: float | None
        expert_map: Any
        apply_router_weight_on_input: bool
        shared_w_gate_up: Any
        shared_w_down: Any
        shared_gate: Any
        batch_invariant: bool

else:  # making them takes longer than importing the rest
    Dense = Packed = Route = Gemm = Experts = dict[str, Any]


if TYPE_CHECKING:
    from typing import Generic as Generic
else:

    class _Nothing:
        def __mro_entries__(self, _):
            return ()

    class Generic:
        """Base of named tuples that only type checkers see: torch knows those by their only base, tuple."""

        def __class_getitem__(cls, _):
            return _Nothing()
