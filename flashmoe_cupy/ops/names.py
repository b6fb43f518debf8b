"""Keyword names of other libraries: what an unknown one is called here. Text alone, for a call that cannot run."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeVar

from flashmoe_cupy import _late
from flashmoe_cupy.plan.operation import registered

Function = TypeVar("Function", bound=Callable[..., Any])

_LEAVE = "leave it out: "
_ATTENTION = {
    "is_causal": "causal, aligned at the bottom right: the last query sees the last key",
    "scale": "softmax_scale", "sm_scale": "softmax_scale", "scaling": "softmax_scale",
    "attn_mask": "bias: numbers are added, in a boolean one True attends", "mask": "bias, where True attends",
    "attention_mask": "bias: numbers are added, in a boolean one True attends", "attn_bias": "bias",
    "sliding_window": "window_size=(sliding_window - 1, 0)", "window": "window_size=(left, right)",
    "local_window_size": "window_size=(left, right), with -1 for no bound",
    "return_attn_probs": "return_lse", "return_residual": "return_lse", "return_softmax_lse": "return_lse",
    "s_aux": "sinks", "sink": "sinks", "learnable_sink": "sinks",
    "logits_soft_cap": "softcap", "logit_softcap": "softcap", "soft_cap": "softcap", "logit_cap": "softcap",
    "query_seq_lengths": "seqused_q", "key_value_seq_lengths": "seqused_k", "cache_leftpad": "leftpad_k",
    "cache_seqlens": "seqused_k", "key_padding_mask": "seqused_k, or leftpad_k for padding in front",
    "qkv_layout": "layout='bshd' or 'bhsd'",
}  # fmt: skip
_ATTENTION_ELSE = {
    "enable_gqa": f"{_LEAVE}fewer key heads follow from the shapes", "dropout_p": f"{_LEAVE}there is no dropout",
    "dropout": f"{_LEAVE}there is no dropout", "dropout_rate": f"{_LEAVE}there is no dropout",
    "deterministic": f"{_LEAVE}the same inputs give the same bits in every run",
    "num_splits": f"{_LEAVE}the library chooses", "block_table": "there are no paged caches yet",
    "page_table": "there are no paged caches yet",
}  # fmt: skip
_MIXTURE = {
    "hidden_states": "x", "w1": "w_gate_up", "w13": "w_gate_up", "w2": "w_down", "gating_output": "logits",
    "router_logits": "logits", "topk": "top_k", "num_experts_per_tok": "top_k", "norm_topk_prob": "renormalize",
    "scoring": "scoring_func", "score_func": "scoring_func", "correction_bias": "e_score_correction_bias",
    "n_group": "num_expert_group", "w1_bias": "b_gate_up", "w2_bias": "b_down", "bias1": "b_gate_up",
    "bias2": "b_down", "offs": "offsets, with a 0 in front", "batch_sizes": "group_sizes, or offsets for packed rows",
    "alpha": "swiglu_alpha", "limit": "swiglu_limit", "moe_intermediate_size": "intermediate_size",
}  # fmt: skip
_MIXTURE_ELSE = {
    "inplace": f"{_LEAVE}the result is a new array, or out", "num_experts": f"{_LEAVE}the weights tell it",
    "global_num_experts": f"{_LEAVE}the weights and expert_map tell it",
    "use_grouped_topk": f"{_LEAVE}num_expert_group and topk_group say it", "indices_type": f"{_LEAVE}ids are int32",
}  # fmt: skip
# Of each function: what its names are called elsewhere, what is no argument of it, and whose argument it may be.
_ATTENTIONS = _ATTENTION, _ATTENTION_ELSE, ("flash_attention", "flash_attention_varlen")
_MIXTURES = _MIXTURE, _MIXTURE_ELSE, ("moe_route", "fused_moe", "grouped_gemm")


def strict(function: Function) -> Function:
    """Decorator: help and inspect do not show the last parameter, which is there to name what is unknown."""
    shown = inspect.signature(function)
    known = [its for its in shown.parameters.values() if its.kind is not inspect.Parameter.VAR_KEYWORD]
    function.__signature__ = shown.replace(parameters=known)  # type: ignore[attr-defined]
    return function


def no_argument(function: Callable[..., Any], unknown: Mapping[str, object], name: str = "") -> TypeError:
    """The error for keyword arguments that a `strict` function does not have. name: how it is called, if otherwise."""
    name, known = name or function.__name__, [*inspect.signature(function).parameters]
    family = _ATTENTIONS if "attention" in name.lower() else _MIXTURES
    said = [f"{one!r}: {_instead(one, name, known, *family)}" for one in unknown]
    return TypeError(f"{name}() has no argument {'; nor '.join(said)}")


def _instead(
    one: str, name: str, known: list[str], names: Mapping[str, str], others: Mapping[str, str], places: Iterable[str]
) -> str:
    mine = names.get(one, "")
    if mine.partition(":")[0].partition("=")[0].partition(",")[0].partition(" ")[0] in known:
        return f"it is called {mine} here" if mine in known else f"here it is {mine}"
    wanted = mine.partition(":")[0] or one
    _late.load("operations")
    for function in places:
        if function != name and wanted in inspect.signature(registered(function).function).parameters:
            return f"{wanted} is an argument of {function}"
    if one in others:
        return others[one]
    import difflib  # which takes longer to import than this package

    near = difflib.get_close_matches(one, [each for each in known if each != "self"], n=1)
    if near:
        return f"did you mean {near[0]}?"
    return f"it has {', '.join(each for each in known if each != 'self')}"
