"""What would run, said in an error: only what concerns the reasons that it gives. Loaded when an error is made."""

from __future__ import annotations

import re
from collections.abc import Sequence

from flashmoe_cupy.dtypes import FLOATS
from flashmoe_cupy.plan.checks import MAX_EXPERTS, MAX_HEAD_DIM, MAX_HEAD_DIM_V, MAX_TOP_K

Topics = Sequence[tuple[str, str]]  # a pattern for reasons, and what concerns them

_SHARED: Topics = (
    (r"one library", "all arrays of a call belong to one library and lie on one device"),
    (r"\bcontiguous", "the last dimension of every array has stride 1, the others are free"),
    (r"^out |\bof out\b", "out has the result's shape and dtype, is writable, shares no memory; or out=None"),
    (r"must be a bool", "True or False"),
    (r"traced by JAX", "options are Python values under jit"),
)
_QKV: Topics = (
    (r"^[qkv] has dtype|^dtypes differ", f"q, k and v share one dtype: {FLOATS}"),
    (r"heads", "heads_q is a multiple of heads_k, and v has as many as k"),
    (
        r"^head_dim|in head_dim",
        f"head_dim is a multiple of 8 up to {MAX_HEAD_DIM}, the same in q and k; head_dim_v up to {MAX_HEAD_DIM_V}",
    ),
    (r"^sinks", "sinks is (heads_q,), float32 or q's dtype"),
    (r"^alibi_slopes", "alibi_slopes is (heads_q,) or (batch, heads_q), float32"),
    (r"^window_size", "window_size=(left, right), -1 for no bound"),
    (r"^softmax_scale", "softmax_scale=None is head_dim ** -0.5"),
    (r"^softcap", "softcap=0.0 is off"),
)
_BIAS = "bias has 2 to 4 dimensions, which broadcast to (batch, heads_q, seqlen_q, seqlen_k); "
_BIAS += "bool keeps the pairs that are True"
_THREE, _FOUR = r"\(\d+, \d+, \d+\)$", r"\(\d+, \d+, \d+, \d+\)$"  # shapes at the end of a reason
_ONE: Topics = (
    (rf"^[qkv] must have 4.*{_THREE}", "one sequence is a batch of one: q[None], k[None], v[None], and [0] of the "
     "result; for packed sequences there is flash_attention_varlen"),
)  # fmt: skip
_PADDING: Topics = (
    (r"^(seqused|leftpad)", "seqused and leftpad are (batch,) int32; rows leftpad ... seqused - 1 of an entry count"),
)  # fmt: skip
_SIZES = r"^batch sizes|sequence length|number of rows|^[qkv] must have|^a dimension|number of heads"
ATTENTION: dict[str, Topics] = {
    "bshd": (
        (_SIZES, "q is (batch, seqlen_q, heads_q, head_dim), k and v are (batch, seqlen_k, heads_k, head_dim)"),
        *_ONE,
        (r"^layout", "layout='bshd' is (batch, seqlen, heads, head_dim), 'bhsd' (batch, heads, seqlen, head_dim)"),
        *_QKV,
        (r"^bias", _BIAS),
        *_PADDING,
        *_SHARED,
    ),
    "bhsd": (
        (_SIZES, "q is (batch, heads_q, seqlen_q, head_dim), k and v are (batch, heads_k, seqlen_k, head_dim)"),
        *_ONE,
        *_QKV,
        (r"^bias", _BIAS),
        *_PADDING,
        *_SHARED,
    ),
    "packed": (
        (_SIZES, "q is (total_q, heads_q, head_dim), k and v are (total_k, heads_k, head_dim)"),
        (rf"^[qkv] must have 3.*{_FOUR}", "for padded sequences there is flash_attention"),
        (r"^cu_seqlens", "cu_seqlens are (batch + 1,) int32, the running sums of the lengths, from 0"),
        (r"^seqused", "seqused are (batch,) int32, the first rows of each sequence that count"),
        (r"^max_seqlen", "max_seqlen is a Python int, at least the longest sequence"),
        *_QKV,
        *_SHARED,
    ),
}
ROUTE: Topics = (
    (r"^logits", f"logits is (tokens, experts), {FLOATS}, at most {MAX_EXPERTS} experts"),
    (rf"^logits must have 2.*{_THREE}", "tokens are one axis: logits.reshape(-1, experts)"),
    (r"\btop_k", f"top_k is an int from 1 to {MAX_TOP_K}, at most the number of experts that take part"),
    (r"assignments", "fewer tokens in a call"),
    (r"^e_score", "e_score_correction_bias is (experts,), float32 or logits' dtype"),
    (r"group", "num_expert_group divides the experts, and topk_group of these groups take part"),
    (r"^scoring_func", "scoring_func='softmax' is the default"),
    (r"^routed_scaling", "routed_scaling_factor=1.0 changes nothing"),
    (r"^capacity", "capacity_factor=None drops nothing"),
    *_SHARED,
)
PERMUTE: Topics = (
    (r"^topk_ids|assignments", "topk_ids is (tokens, top_k), int32 or int64"),
    (r"^expert_map", "expert_map is (global experts,), int32"),
    (r"^num_experts", "num_experts is an int, the experts that are here"),
    *_SHARED,
)
GROUPED_GEMM: Topics = (
    (r"either offsets|^(x|offsets|group_sizes|gather_indices) |rows",
     "x is (rows, d) with offsets (experts + 1,), or (experts, rows, d) with group_sizes (experts,); lists are int32"),
    (r"^w |and w\b|^x and w", "w is (experts, n, d)"),
    (r"^[xw] has dtype|^dtypes differ", f"x and w share one dtype: {FLOATS}"),
    (r"multiple of 8", "n and d are multiples of 8"),
    (r"^bias", "bias is (experts, n), float32 or x's dtype"),
    *_SHARED,
)  # fmt: skip


def moe(rows: int) -> Topics:
    """Of fused_moe, whose w_gate_up has `rows` rows for each element of the activation."""
    many = {1: "", 2: "2"}[rows]
    weights = f"x is (tokens, d), w_gate_up (experts, {many}n, d) and w_down (experts, d, n)"
    return (
        (r"^(x|w_gate_up|w_down) (?!has dtype)|and needs", weights),
        (rf"^x must have 2.*{_THREE}", "tokens are one axis: x.reshape(-1, d), and the result back"),
        (r"^\w+ has dtype.*bfloat16, float16 or|^dtypes differ", f"x and all weights share one dtype: {FLOATS}"),
        (r"multiple of 8", "d, n and s are multiples of 8"),
        (r"topk_|assignments", "topk_weights (float32 or x's dtype) and topk_ids (int32 or int64) are (tokens, K)"),
        (r"^b_gate_up", f"b_gate_up is (experts, {many}n), float32 or x's dtype"),
        (r"^b_down", "b_down is (experts, d), float32 or x's dtype"),
        (r"^expert_map", "expert_map is (global experts,), int32"),
        (r"^shared_w", f"shared_w_gate_up is ({many}s, d) and shared_w_down (d, s)"),
        (r"^shared_gate", "shared_gate is (tokens,) or (tokens, 1), float32 or x's dtype"),
        (r"^activation is '(silu|swish|silu_and_mul)'", "what vLLM and transformers call silu is 'swiglu' here"),
        (r"^activation|^interleaved", "gated: 'swiglu', 'geglu', 'geglu_tanh', 'swigluoai'; not gated: 'gelu', "
         "'gelu_tanh', 'relu', 'relu2'"),
        (r"^swiglu_alpha", "swiglu_alpha is for 'swigluoai', where None is 1.702"),
        (r"^swiglu_limit", "swiglu_limit is for 'swiglu' (None: no clamp) and 'swigluoai' (None: 7)"),
        *_SHARED,
    )  # fmt: skip


def layer(rows: int) -> Topics:
    """Of FlashMoELayer, whose router and experts have their own beside these."""
    many = {1: "", 2: "2 * "}[rows]
    weights = f"w_gate_up is (experts, {many}intermediate_size, hidden_size), w_down (experts, hidden_size, "
    own = (
        (r"^(hidden_size|num_experts|intermediate_size) must", "hidden_size, num_experts, top_k and intermediate_size "
         "are ints from 1 on"),
        (r"^router_weight must", "router_weight is (num_experts, hidden_size)"),
        (r"^router_bias", "router_bias is (num_experts,), beside router_weight"),
        (r"^w_(gate_up|down) (?!has dtype)|and needs", f"{weights}intermediate_size)"),
        (r"^shared_gate_weight", "shared_gate_weight is (hidden_size,), beside shared_w_gate_up and shared_w_down"),
        (r"^(router|shared_gate_weight).* has dtype", "the router's arrays are bfloat16, float16, float32 or float64"),
    )  # fmt: skip
    theirs = [topic for topic in moe(rows)[1:] if "topk_ids" not in topic[1] and "shared_gate is" not in topic[1]]
    return tuple(dict.fromkeys((*own, *theirs, *ROUTE)))


def hint(why: Sequence[str], topics: Topics) -> str:
    """What would run, of the topics that a reason is about."""
    return "; ".join(said for pattern, said in topics if any(re.search(pattern, reason) for reason in why))
