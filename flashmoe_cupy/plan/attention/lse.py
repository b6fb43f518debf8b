"""The problem of `attention_lse`: attention whose output nobody wants, so its values are a few columns of the keys."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from flashmoe_cupy.errors import UnsupportedProblem
from flashmoe_cupy.plan.attention.problem import PADDING, AttentionProblem, attention_problem
from flashmoe_cupy.plan.checks import asked

if TYPE_CHECKING:
    from flashmoe_cupy.arrays import View

_HINT = "q is (batch, seqlen_q, heads_q, head_dim), k is (batch, seqlen_k, heads_k, head_dim); 'bhsd' swaps axes 1, 2"
VALUE_COLUMNS = 8  # the narrowest values that the attention kernels take


def lse_problem(
    q: View,
    k: View,
    *,
    causal: object = False,
    window_size: object = (-1, -1),
    softmax_scale: object = None,
    softcap: object = 0.0,
    sinks: View | None = None,
    alibi_slopes: View | None = None,
    bias: View | None = None,
    seqused_q: View | None = None,
    seqused_k: View | None = None,
    leftpad_q: View | None = None,
    leftpad_k: View | None = None,
    layout: object = "bshd",
) -> AttentionProblem:
    """Validate the arguments of `attention_lse`, as `attention_problem` does. Raises UnsupportedProblem."""
    v = k._replace(shape=(*k.shape[:-1], min(VALUE_COLUMNS, k.shape[-1]))) if k.shape else k
    padding = [*zip(PADDING, (seqused_q, seqused_k, leftpad_q, leftpad_k), strict=True)]
    try:
        return attention_problem(
            q, k, v, causal=causal, window_size=window_size, softmax_scale=softmax_scale, softcap=softcap, sinks=sinks,
            alibi_slopes=alibi_slopes, bias=bias, layout=layout, return_lse=True, **dict(padding),
        )._replace(clear_rest=2 if seqused_q is not None or leftpad_q is not None else 0)  # fmt: skip
    except UnsupportedProblem as error:
        # The caller knows of no values.
        why = [re.sub(r", v (has|is) [^,;]+", "", reason) for reason in error.reasons]
        why = [reason for reason in why if not reason.startswith(("v ", "head_dim_v"))]
        optional = (("sinks", sinks), ("alibi_slopes", alibi_slopes), ("bias", bias), *padding)
        named = [("q", q), ("k", k), *[(name, x) for name, x in optional if x is not None]]
        options = (
            ("causal", causal, False), ("window_size", window_size, (-1, -1)), ("softmax_scale", softmax_scale, None),
            ("softcap", softcap, 0.0), ("layout", layout, "bshd"),
        )  # fmt: skip
        raise UnsupportedProblem(asked("attention_lse", named, options), why, _HINT) from None
