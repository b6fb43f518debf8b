"""Batch entries with padding on the GPU: on either side or both, with every feature, poisoned where nothing counts."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from test_gpu_truth import attention, check_all, compile_registered, register, same_bits, tensors

import flashmoe_cupy
from flashmoe_cupy.testing import AttentionCase

torch = pytest.importorskip("torch")
pytestmark = [pytest.mark.gpu, pytest.mark.torch]

DTYPES = ("bfloat16", "float16", "float32")
BATCH = 7
SIZES = ((1, 300), (150, 203), (512, 256), (700, 1100))
FEATURES: tuple[dict[str, Any], ...] = (
    {"causal": True},
    {"heads_q": 16, "sinks": "float32"},
    {"window_size": (60, 9), "causal": True},
    {"window_size": (0, 0)},
    {"softcap": 15.0, "causal": True},
    {"alibi": "bh", "causal": True},
    {"bias": "b11k", "bias_dtype": "bool"},
    {"bias": "hqk", "bias_dtype": "float32", "causal": True},
    {"bias": "b1qk", "softcap": 9.0, "alibi": "h"},
)
DIMS = ((64, 64), (128, 128), (40, 72), (192, 128), (256, 256), (64, 512))


def spans(rng: np.random.Generator, n: int, how: str) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The first row and the end of what counts: padding on the left, the right, both sides, or none; some are empty."""
    ends = np.sort(rng.integers(0, n + 1, (BATCH, 2)), 1)
    ends[0], ends[1] = (0, n), (n // 2, n // 2)
    left, used = (tuple(int(x) for x in side) for side in ends.T)
    return {"left": (left, ()), "right": ((), used), "both": (left, used), "none": ((), ())}[how]


def cases(dtype: str) -> list[AttentionCase]:
    rng, found = np.random.default_rng(11), []
    kinds = [(a, b) for a in ("left", "right", "both", "none") for b in ("left", "right", "both", "none")][:-1]
    for i, (q, k) in enumerate(SIZES):
        for j, features in enumerate(FEATURES):
            d, dv = DIMS[(i + j) % len(DIMS)]
            how = kinds[(5 * i + 7 * j) % len(kinds)]
            (left_q, used_q), (left_k, used_k) = spans(rng, q, how[0]), spans(rng, k, how[1])
            padding: dict[str, Any] = {"left_q": left_q, "used_q": used_q, "left_k": left_k, "used_k": used_k}
            sizes: dict[str, Any] = {"batch": BATCH, "heads_q": 4, "heads_k": 2, "head_dim": d, "head_dim_v": dv}
            found.append(AttentionCase(q, k, dtype=dtype, **(sizes | features), **padding))
    return found


for _dtype in DTYPES:
    register(cases(_dtype))


@pytest.fixture(scope="module", autouse=True)
def _compiled() -> None:
    compile_registered()


@pytest.mark.parametrize("dtype", DTYPES)
def test_padding(dtype: str) -> None:
    check_all(cases(dtype), "cuda")


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_rows_that_do_not_count(dtype: str) -> None:
    """0 and -inf in new arrays, also where their memory held NaN before; left alone in a given one."""
    case = AttentionCase(
        300, 300, 3, left_q=(0, 299, 40), used_q=(300, 300, 77), used_k=(9, 300, 0), dtype=dtype, causal=True
    )
    t = tensors(case, "cuda")
    for _ in range(3):
        torch.full(t["q"].shape, math.nan, device="cuda", dtype=t["q"].dtype)  # freed at once
        out, lse = attention(case, t)
        for b, (start, stop) in enumerate(case.spans("q")):
            rest = torch.ones(300, dtype=torch.bool)
            rest[start:stop] = False
            assert bool((out[b][rest] == 0).all()) and bool((lse[b][:, rest] == -math.inf).all())


def test_numbers_that_are_no_rows_are_the_nearest_row() -> None:
    case = AttentionCase(130, 140, 4, left_k=(0, 0, 140, 5), used_k=(140, 0, 140, 140), heads_q=4, causal=True)
    t = tensors(case, "cuda")
    want = attention(case, t)
    for left, used in (((-7, -(2**31), 141, 5), (141, -1, 2**31 - 1, 1000)), ((0, 0, 2**31 - 1, 5), (140, 0, 3, 140))):
        lengths = {"leftpad_k": left, "seqused_k": used}
        odd = t | {name: torch.tensor(n, dtype=torch.int32, device="cuda") for name, n in lengths.items()}
        for mine, theirs in zip(attention(case, odd), want, strict=True):
            assert same_bits(mine, theirs)


def test_lengths_may_change_under_a_graph() -> None:
    case = AttentionCase(200, 300, 3, used_k=(300, 20, 150), heads_q=4)
    t = tensors(case._replace(used_k=(300, 300, 300)), "cuda")
    t["seqused_k"] = torch.tensor(case.used_k, dtype=torch.int32, device="cuda")
    attention(case, t)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out, lse = attention(case, t)
    for used in ((300, 20, 150), (0, 300, 299)):
        t["seqused_k"].copy_(torch.tensor(used, dtype=torch.int32))
        graph.replay()
        want, want_lse = flashmoe_cupy.flash_attention(**t, **case.options(), return_lse=True)
        assert same_bits(out, want) and same_bits(lse, want_lse)
