"""The gradient on the NumPy back end against the float64 reference, over sizes, features, dtypes and hostile values."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
from cpu_backward_kit import (
    Array,
    blank,
    check,
    check_case,
    prepared,
)
from hypothesis import given
from hypothesis import strategies as st

from flashmoe_cupy.cpu import attention as forward
from flashmoe_cupy.cpu import attention_backward as module
from flashmoe_cupy.cpu import tile
from flashmoe_cupy.errors import UnsupportedProblem
from flashmoe_cupy.testing import AttentionCase, VarlenCase

# ------------------------------------------------------------------------------------------------------------ the grid

LENGTHS = [(0, 5), (5, 0), (1, 1), (5, 1), (1, 600), (33, 5), (33, 33), (33, 257), (257, 33), (600, 257), (257, 600)]
MASKS: list[dict[str, Any]] = [
    {},
    {"causal": True},
    {"window_size": (20, -1)},
    {"window_size": (-1, 7)},
    {"window_size": (20, 150)},
    {"window_size": (0, 0)},
    {"window_size": (100, -1), "causal": True},
]


@pytest.mark.parametrize("mask", MASKS, ids=str)
def test_lengths_and_masks(mask: dict[str, Any]) -> None:
    for lengths in LENGTHS:
        check_case(AttentionCase(*lengths, batch=1, heads_q=2, heads_k=1, head_dim=16, dtype="float32", **mask))


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("dims", [(8, 8), (40, 40), (64, 64), (128, 40), (40, 128)], ids=str)
def test_dtypes_dims_and_heads(dtype: str, dims: tuple[int, int]) -> None:
    for lengths, heads in itertools.product(((1, 40), (33, 70), (90, 50)), ((1, 1), (4, 2), (4, 1))):
        check_case(AttentionCase(
            *lengths, batch=1, heads_q=heads[0], heads_k=heads[1], head_dim=dims[0], head_dim_v=dims[1], dtype=dtype,
            causal=True,
        ))  # fmt: skip


@pytest.mark.parametrize("features", [
    {"softcap": 0.5}, {"softcap": 30.0, "causal": True}, {"softmax_scale": -0.05}, {"softmax_scale": 0.0},
    {"sinks": "float32"}, {"sinks": "same", "causal": True, "window_size": (5, 5)},
    {"alibi": "h", "causal": True}, {"alibi": "bh"}, {"bias": "b1qk", "bias_dtype": "bool"},
    {"bias": "1k", "bias_dtype": "bool", "sinks": "float32"},
    {"bias": "bh1k", "alibi": "bh", "sinks": "same", "causal": True, "window_size": (40, -1), "softcap": 2.0},
], ids=str)  # fmt: skip
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_features(features: dict[str, Any], dtype: str) -> None:
    for lengths in ((1, 70), (90, 50), (100, 150)):
        check_case(AttentionCase(*lengths, heads_q=4, heads_k=2, head_dim=16, dtype=dtype, **features))


@pytest.mark.parametrize("bias", ["qk", "1k", "q1", "11", "hqk", "h1k", "b11k", "11qk", "1hqk", "b1qk", "bhqk", "bhq1"])
@pytest.mark.parametrize("kind", [("float32", "same"), ("bfloat16", "same"), ("bfloat16", "float32")], ids=str)
def test_bias(bias: str, kind: tuple[str, str]) -> None:
    for lengths, mask in (((90, 50), {}), ((70, 140), {"causal": True, "softcap": 3.0}), ((1, 9), {}), ((9, 1), {})):
        more: dict[str, Any] = mask
        check_case(AttentionCase(
            *lengths, heads_q=4, heads_k=2, head_dim=16, dtype=kind[0], bias=bias, bias_dtype=kind[1], **more
        ))  # fmt: skip


@given(
    st.integers(0, 40), st.integers(0, 60), st.integers(1, 3), st.sampled_from([(1, 1), (4, 4), (6, 2), (5, 1)]),
    st.integers(-1, 45), st.integers(-1, 45), st.booleans(), st.sampled_from(["", "b1qk", "h1k", "1k", "qk", "bhqk"]),
    st.sampled_from(["", "float32"]), st.sampled_from([4, 16, 512]), st.sampled_from([3, 16, 512]),
    st.integers(0, 2**16),
)  # fmt: skip
def test_any_mix_in_any_tiling(
    seqlen_q: int, seqlen_k: int, batch: int, heads: tuple[int, int], left: int, right: int, causal: bool, bias: str,
    sinks: str, rows: int, keys: int, seed: int,
) -> None:  # fmt: skip
    case = AttentionCase(
        seqlen_q, seqlen_k, batch=batch, heads_q=heads[0], heads_k=heads[1], head_dim=8, dtype="float32", causal=causal,
        window_size=(left, right), bias=bias, bias_dtype="bool" if seed % 4 == 1 else "float32", sinks=sinks,
        softcap=seed % 3 * 1.5,
    )  # fmt: skip
    if seed % 2:
        rng = np.random.default_rng(seed)
        spans = {side: np.sort(rng.integers(0, n + 1, (2, batch)), axis=0).tolist() for side, n in
                 (("q", seqlen_q), ("k", seqlen_k))}  # fmt: skip
        case = case._replace(
            left_q=tuple(spans["q"][0]), used_q=tuple(spans["q"][1]),
            left_k=tuple(spans["k"][0]), used_k=tuple(spans["k"][1]),
        )  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:  # small tiles, so that small problems cross their edges
        sizes = {"_QUERIES": max(2, rows // 4), "_KEYS": keys, "_SCORES": rows * keys, "_VALUES": 8 * keys}
        for name, value in (sizes | {"_TRANSPOSED_ROWS": 2}).items():
            patch.setattr(tile, name, value)
        for name, value in {"_ROWS": rows, "_MIN_ROWS": 2, "_VALUES": 8 * keys, "_ONE_THREAD": seed % 3 * 1000}.items():
            patch.setattr(forward, name, value)
        patch.setattr(module, "_PAIRS", 1)
        patch.setattr(module, "_ROWS", rows)
        check_case(case, seed)


def test_many_blocks_and_pieces() -> None:
    check_case(AttentionCase(700, 900, batch=1, heads_q=3, heads_k=1, head_dim=16, dtype="float32", causal=True))
    check_case(AttentionCase(1, 20000, batch=1, heads_q=4, heads_k=2, head_dim=8, dtype="float32"))
    check_case(AttentionCase(2, 40, batch=100, heads_q=2, heads_k=2, head_dim=8, dtype="bfloat16", causal=True))
    check_case(AttentionCase(3, 20, batch=1, heads_q=600, heads_k=300, head_dim=8, dtype="float32", sinks="float32"))


def test_heads_and_batches_none() -> None:
    check_case(AttentionCase(3, 4, heads_q=0, heads_k=0, dtype="float32", bias="qk"))
    check_case(AttentionCase(3, 4, heads_q=0, heads_k=2, dtype="float32"))
    check_case(AttentionCase(3, 4, batch=0, dtype="bfloat16", sinks="same", bias="bhqk"))
    case = AttentionCase(3, 4, batch=0, dtype="float32", bias="1hqk")
    check_case(case)
    arrays = case.random() | {"seqused_k": np.zeros(0, np.int32)}
    call = prepared(case, arrays)
    check(case, arrays, call, call.run(blank(case, arrays)))


# ------------------------------------------------------------------------------------------ padding, packed sequences


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("features", [
    {}, {"causal": True, "sinks": "same"}, {"window_size": (6, 3), "alibi": "bh"}, {"bias": "bhqk"}, {"bias": "1hqk"},
    {"bias": "b11k", "causal": True}, {"bias": "qk", "softcap": 3.0}, {"bias": "1k", "bias_dtype": "bool"},
], ids=str)  # fmt: skip
def test_padding(dtype: str, features: dict[str, Any]) -> None:
    shapes: list[dict[str, Any]] = [
        {"used_k": (80, 0, 33)},
        {"left_q": (0, 7, 40), "used_q": (70, 7, 41)},
        {"left_q": (5, 0, 0), "left_k": (0, 79, 20), "used_k": (10, 80, 64)},
        {"left_q": (0, 30, 69), "used_q": (30, 60, 70), "left_k": (0, 5, 10), "used_k": (80, 75, 10)},
    ]
    for shape in shapes:
        check_case(AttentionCase(
            70, 80, batch=3, heads_q=4, heads_k=2, head_dim=16, head_dim_v=24, dtype=dtype, **shape, **features
        ))  # fmt: skip


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("features", [
    {}, {"causal": True}, {"causal": True, "window_size": (6, -1), "softcap": 3.0}, {"window_size": (2, 2)},
    {"sinks": "same", "alibi": "bh"}, {"sinks": "float32", "alibi": "h", "causal": True},
], ids=str)  # fmt: skip
def test_varlen(dtype: str, features: dict[str, Any]) -> None:
    shapes: list[dict[str, Any]] = [
        {"lengths_q": (5, 0, 1, 130, 9, 0), "lengths_k": (9, 4, 0, 70, 9, 0), "tail_q": 3, "tail_k": 2},
        {"lengths_q": (5, 8, 1, 33), "lengths_k": (9, 4, 6, 70), "used_q": (5, 3, 0, 33), "used_k": (0, 4, 5, 9)},
        {"lengths_q": (1,) * 20, "lengths_k": tuple(range(20)), "used_k": tuple(range(20))},
        {"lengths_q": (), "lengths_k": (), "tail_q": 2},
    ]
    for shape in shapes:
        check_case(VarlenCase(**shape, heads_q=4, heads_k=2, head_dim=16, head_dim_v=24, dtype=dtype, **features))


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"cu_seqlens_q": np.array([0, 6, 5], np.int32)}, "cu_seqlens_q"),
        ({"cu_seqlens_k": np.array([0, 5, 99], np.int32)}, "cu_seqlens_k"),
        ({"seqused_q": np.array([5, 4], np.int32)}, "seqused_q"),
        ({"seqused_k": np.array([-1, 4], np.int32)}, "seqused_k"),
    ],
)
def test_wrong_offsets_are_refused(change: dict[str, Any], word: str) -> None:
    case = VarlenCase((5, 3), (5, 4), dtype="float32", head_dim=8)
    arrays: dict[str, Array] = case.random()
    call = prepared(case, arrays)
    grads = blank(case, arrays)
    with pytest.raises(UnsupportedProblem, match=word):
        call._replace(optional=call.optional | change).run(grads)
    assert all(np.isnan(grad).all() for grad in grads.values())


def test_wrong_lengths_are_refused() -> None:
    case = AttentionCase(5, 6, dtype="float32", head_dim=8, used_k=(3, 6))
    arrays: dict[str, Array] = case.random()
    call = prepared(case, arrays)
    with pytest.raises(UnsupportedProblem, match="seqused_k must lie between 0 and 6"):
        call._replace(optional={"seqused_k": np.array([3, 7], np.int32)}).run(blank(case, arrays))
