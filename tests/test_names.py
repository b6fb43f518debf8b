"""Keyword names of other libraries: the error says what they are called here, and nobody sees how it knows them."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import flashmoe_cupy
from flashmoe_cupy.ops import names

X = np.ones((2, 6, 4, 16), np.float32)
PACKED = {"cu_seqlens_q": X, "cu_seqlens_k": X, "max_seqlen_q": 1, "max_seqlen_k": 1}
# Arguments that each function wants. What they hold is not looked at before the names.
CALLS: dict[str, tuple[tuple[Any, ...], dict[str, Any]]] = {
    "flash_attention": ((X, X, X), {}), "flash_attention_varlen": ((X, X, X), PACKED),
    "moe_route": ((X,), {"top_k": 2}), "moe_permute": ((X,), {"num_experts": 2}),
    "grouped_gemm": ((X, X), {}), "fused_moe": ((X, X, X, X, X), {}),
    "FlashMoELayer": ((8, 2, 1, 8), {"w_gate_up": X, "w_down": X}),
}  # fmt: skip


def said(function: str, **unknown: Any) -> str:
    positional, needed = CALLS[function]
    with pytest.raises(TypeError) as caught:
        getattr(flashmoe_cupy, function)(*positional, **needed, **unknown)
    assert type(caught.value) is TypeError
    return str(caught.value)


TOLD = [
    ("flash_attention", "is_causal", "here it is causal, aligned at the bottom right"),
    ("flash_attention", "scale", "it is called softmax_scale here"),
    ("flash_attention", "sm_scale", "it is called softmax_scale here"),
    ("flash_attention", "attn_mask", "here it is bias: numbers are added, in a boolean one True attends"),
    ("flash_attention", "mask", "here it is bias, where True attends"),
    ("flash_attention", "enable_gqa", "leave it out: fewer key heads follow from the shapes"),
    ("flash_attention", "dropout_p", "leave it out: there is no dropout"),
    ("flash_attention", "sliding_window", "here it is window_size=(sliding_window - 1, 0)"),
    ("flash_attention", "s_aux", "it is called sinks here"),
    ("flash_attention", "return_attn_probs", "it is called return_lse here"),
    ("flash_attention", "logits_soft_cap", "it is called softcap here"),
    ("flash_attention", "casual", "did you mean causal?"),
    ("flash_attention", "cu_seqlens_q", "cu_seqlens_q is an argument of flash_attention_varlen"),
    ("flash_attention", "xyz", "it has q, k, v, causal, window_size, "),
    ("flash_attention_varlen", "attn_mask", "bias is an argument of flash_attention"),
    ("flash_attention_varlen", "logit_softcap", "it is called softcap here"),
    ("moe_route", "topk", "it is called top_k here"),
    ("moe_route", "gating_output", "it is called logits here"),
    ("moe_permute", "expert_maps", "did you mean expert_map?"),
    ("grouped_gemm", "offs", "here it is offsets, with a 0 in front"),
    ("fused_moe", "w1", "it is called w_gate_up here"),
    ("fused_moe", "hidden_states", "it is called x here"),
    ("fused_moe", "inplace", "leave it out: the result is a new array, or out"),
    ("fused_moe", "renormalize", "renormalize is an argument of moe_route"),
    ("fused_moe", "num_experts", "leave it out: the weights tell it"),
    ("FlashMoELayer", "norm_topk_prob", "it is called renormalize here"),
    ("FlashMoELayer", "w13", "it is called w_gate_up here"),
]


@pytest.mark.parametrize(("function", "unknown", "want"), TOLD)
def test_an_unknown_name_is_told_with_ours(function: str, unknown: str, want: str) -> None:
    assert said(function, **{unknown: 1}).startswith(f"{function}() has no argument {unknown!r}: {want}")


def test_every_unknown_name_is_told() -> None:
    text = said("flash_attention", scale=1.0, dropout_p=0.0)
    assert "'scale': it is called softmax_scale here; nor 'dropout_p': leave it out" in text


@pytest.mark.parametrize("function", CALLS)
def test_signatures_and_positional_arguments_are_as_ever(function: str) -> None:
    call: Callable[..., Any] = getattr(flashmoe_cupy, function)
    shown = inspect.signature(call)
    assert all(its.kind is not inspect.Parameter.VAR_KEYWORD for its in shown.parameters.values())
    positional, needed = CALLS[function]
    with pytest.raises(TypeError, match=r"takes \d+ positional arguments? but \d+ "):
        call(*positional, True, **needed)
    with pytest.raises(TypeError, match="missing"):
        call()
    with pytest.raises(TypeError, match="unexpected keyword argument 'is_causal'"):
        shown.bind(*positional, **needed, is_causal=True)


def test_names_are_translated_to_ours() -> None:
    """Each to an argument of one of the functions, and none of them is an argument already."""
    for table, functions in (
        (names._ATTENTION, ("flash_attention", "flash_attention_varlen")),
        (names._MIXTURE, ("moe_route", "grouped_gemm", "fused_moe", "FlashMoELayer")),
    ):
        ours = {one for name in functions for one in inspect.signature(getattr(flashmoe_cupy, name)).parameters}
        for theirs, mine in table.items():
            found = re.match(r"\w+", mine)
            assert found is not None and found[0] in ours and theirs not in ours, theirs


def test_functions_of_other_libraries() -> None:
    for theirs, mine in (
        ("flash_attn_func", "flash_attention"), ("flash_attn_varlen_func", "flash_attention_varlen"),
        ("scaled_dot_product_attention", "flash_attention"), ("fused_experts", "fused_moe"),
    ):  # fmt: skip
        with pytest.raises(AttributeError, match=f"has no attribute '{theirs}'; it is called {mine} here") as raised:
            getattr(flashmoe_cupy, theirs)
        place = re.search(r"flashmoe_cupy\.integrations\.(\w+) has it", str(raised.value))
        assert (place is None) == (theirs == "fused_experts")
        if place is not None:
            source = Path(flashmoe_cupy.__file__).parent / "integrations" / f"{place[1]}.py"
            assert f"def {theirs}(" in source.read_text(encoding="utf-8")
        assert hasattr(flashmoe_cupy, mine) and not hasattr(flashmoe_cupy, theirs)
    with pytest.raises(AttributeError, match=r"has no attribute 'nothing'$"):
        _ = flashmoe_cupy.nothing
