"""The NumPy back end against the float64 reference, over sizes, features, dtypes, strides and hostile values."""

from __future__ import annotations

import itertools
import tracemalloc
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from flashmoe_cupy import reference
from flashmoe_cupy.arrays import view
from flashmoe_cupy.cpu import attention as module
from flashmoe_cupy.cpu import small, tile
from flashmoe_cupy.cpu.attention import attention
from flashmoe_cupy.errors import UnsupportedProblem
from flashmoe_cupy.plan.attention.problem import attention_problem, varlen_problem
from flashmoe_cupy.testing import AttentionCase, VarlenCase

Array = Any  # NumPy arrays; Any, so that dicts of arguments may be unpacked

EXACT = 1e-6  # relative Frobenius error that float32 arithmetic may add
ROW = 5e-6  # the same for the worst row: an output may be small beside the values that it averages
TINY = {"float32": 1e-40, "float16": 2.0**-25, "bfloat16": 1e-40}  # half a step of the smallest numbers
EPS = {"float32": 2.0**-24, "float16": 2.0**-11, "bfloat16": 2.0**-8}  # half a step of the output's own dtype
SPECIAL = 77.0  # what out and lse hold before the call


def run(arrays: dict[str, Array], options: dict[str, Any], layout: str = "bshd") -> tuple[Array, Array]:
    """out and lse of the back end for arguments of flash_attention; q, k and v in `layout`."""
    views = {name: view(a, name) for name, a in arrays.items()}
    problem = attention_problem(**views, **options, layout=layout)
    inputs = dict(arrays)
    if layout == "bhsd":
        inputs |= {name: arrays[name].swapaxes(1, 2) for name in "qkv"}
    q, v = inputs["q"], inputs["v"]
    out = np.full((*q.shape[:3], v.shape[3]), SPECIAL, q.dtype)
    lse = np.full((q.shape[0], q.shape[2], q.shape[1]), SPECIAL, np.float32)
    attention(problem, inputs.pop("q"), inputs.pop("k"), inputs.pop("v"), out, lse, **inputs)
    return out, lse


def run_varlen(arrays: dict[str, Array], options: dict[str, Any]) -> tuple[Array, Array]:
    problem = varlen_problem(**{name: view(a, name) for name, a in arrays.items()}, **options)
    inputs = dict(arrays)
    q, k, v = (inputs.pop(name) for name in "qkv")
    out, lse = np.full((*q.shape[:2], v.shape[2]), SPECIAL, q.dtype), np.full(q.shape[1::-1], SPECIAL, np.float32)
    attention(problem, q, k, v, out, lse, **inputs)
    return out, lse


def check(out: Array, lse: Array, ref: Array, ref_lse: Array) -> None:
    """out is the float64 result rounded to its dtype, up to the error of float32 arithmetic; lse likewise."""
    name, value = out.dtype.name, out.astype(np.float64)
    eps = 0.0 if name == "float32" else EPS[name]  # the allowance for arithmetic has room for float32's own rounding
    norm, row = np.linalg.norm(ref), np.linalg.norm(ref, axis=-1)
    assert np.isfinite(value).all()
    assert np.linalg.norm(value - ref) <= (EXACT + eps) * norm + TINY[name] * ref.size**0.5
    assert np.all(np.linalg.norm(value - ref, axis=-1) <= (ROW + eps) * row + TINY[name] * ref.shape[-1] ** 0.5)
    np.testing.assert_array_equal(lse == -np.inf, ref_lse == -np.inf)
    np.testing.assert_allclose(lse, ref_lse, rtol=1e-6, atol=2e-6)


def check_case(case: AttentionCase, seed: int = 0) -> None:
    arrays: dict[str, Array] = case.random(seed)
    ref = reference.flash_attention(**arrays, **case.options(), return_lse=True)
    check(*run(arrays, case.options()), *ref)
    with pytest.MonkeyPatch.context() as patch:  # what is small goes another way: send it through the tiles as well
        patch.setattr(small, "_SCORES", -1)
        check(*run(arrays, case.options()), *ref)


# ------------------------------------------------------------------------------------------------------------ the grid

LENGTHS = [(0, 5), (5, 0), (1, 1), (1, 700), (3, 17), (64, 64), (129, 257), (300, 45), (45, 1300), (540, 520)]
MASKS: list[dict[str, Any]] = [
    {},
    {"causal": True},
    {"window_size": (20, 30)},
    {"window_size": (0, 0)},
    {"window_size": (100, -1), "causal": True},
    {"window_size": (-1, 7)},
]


@pytest.mark.parametrize("mask", MASKS, ids=str)
@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
def test_lengths_and_masks(lengths: tuple[int, int], mask: dict[str, Any]) -> None:
    check_case(AttentionCase(*lengths, heads_q=2, heads_k=1, head_dim=32, dtype="float32", **mask))


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("dims", [(8, 8), (64, 64), (128, 40), (256, 512), (72, 256)], ids=str)
@pytest.mark.parametrize("heads", [(1, 1), (9, 3), (8, 1)], ids=str)
def test_dtypes_dims_and_heads(dtype: str, dims: tuple[int, int], heads: tuple[int, int]) -> None:
    for lengths in ((1, 150), (60, 90)):
        case = AttentionCase(
            *lengths, heads_q=heads[0], heads_k=heads[1], head_dim=dims[0], head_dim_v=dims[1], dtype=dtype, causal=True
        )
        check_case(case)


@pytest.mark.parametrize("features", [
    {"softcap": 0.5}, {"softcap": 30.0, "causal": True}, {"softmax_scale": -0.05}, {"softmax_scale": 0.0},
    {"sinks": "float32"}, {"sinks": "same", "causal": True, "window_size": (5, 5)},
    {"alibi": "h", "causal": True}, {"alibi": "bh"},
    {"bias": "bhqk"}, {"bias": "qk", "bias_dtype": "float32"}, {"bias": "h1k"}, {"bias": "11qk"}, {"bias": "b11k"},
    {"bias": "b1qk", "bias_dtype": "bool"}, {"bias": "1k", "bias_dtype": "bool", "sinks": "float32"},
    {"bias": "bh1k", "alibi": "bh", "sinks": "same", "causal": True, "window_size": (40, -1), "softcap": 2.0},
], ids=str)  # fmt: skip
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_features(features: dict[str, Any], dtype: str) -> None:
    for lengths in ((1, 70), (90, 50), (200, 230)):
        check_case(AttentionCase(*lengths, heads_q=4, heads_k=2, head_dim=32, dtype=dtype, **features))


@given(
    st.integers(0, 40), st.integers(0, 60), st.integers(1, 3), st.sampled_from([(1, 1), (4, 4), (6, 2), (5, 1)]),
    st.integers(-1, 45), st.integers(-1, 45), st.booleans(), st.sampled_from(["", "b1qk", "h1k", "1k"]),
    st.sampled_from(["", "float32"]), st.sampled_from([4, 16, 512]), st.sampled_from([3, 16, 512]),
    st.integers(0, 2**16),
)  # fmt: skip
def test_any_mix_in_any_tiling(
    seqlen_q: int, seqlen_k: int, batch: int, heads: tuple[int, int], left: int, right: int, causal: bool, bias: str,
    sinks: str, rows: int, keys: int, seed: int,
) -> None:  # fmt: skip
    case = AttentionCase(
        seqlen_q, seqlen_k, batch=batch, heads_q=heads[0], heads_k=heads[1], head_dim=8, dtype="float32", causal=causal,
        window_size=(left, right), bias=bias, bias_dtype="bool" if seed % 2 else "float32", sinks=sinks,
    )  # fmt: skip
    sizes = {"_QUERIES": max(2, rows // 4), "_KEYS": keys, "_SCORES": rows * keys, "_VALUES": 8 * keys}
    sizes["_TRANSPOSED_ROWS"] = 2
    with pytest.MonkeyPatch.context() as patch:  # small tiles, so that small problems cross their edges
        for name, value in sizes.items():
            patch.setattr(tile, name, value)
        for name, value in {"_ROWS": rows, "_MIN_ROWS": 2, "_VALUES": 8 * keys, "_ONE_THREAD": seed % 3 * 1000}.items():
            patch.setattr(module, name, value)
        check_case(case, seed)


def test_many_blocks_and_tiles() -> None:
    check_case(AttentionCase(1100, 1500, batch=1, heads_q=3, heads_k=1, head_dim=16, dtype="float32", causal=True))
    check_case(AttentionCase(1, 70000, batch=1, heads_q=4, heads_k=2, head_dim=8, dtype="float32"))
    check_case(AttentionCase(2, 40, batch=300, heads_q=2, heads_k=2, head_dim=8, dtype="bfloat16", causal=True))
    check_case(AttentionCase(3, 20, batch=1, heads_q=1200, heads_k=600, head_dim=8, dtype="float32", sinks="float32"))


@pytest.mark.parametrize("heads", [(1, 1), (2, 1), (9, 3)], ids=str)
def test_error_does_not_grow_with_the_keys(heads: tuple[int, int]) -> None:
    for seqlen_k in (4096, 30001):
        check_case(AttentionCase(1, seqlen_k, batch=1, heads_q=heads[0], heads_k=heads[1], dtype="float32"))


def test_heads_none() -> None:
    check_case(AttentionCase(3, 4, heads_q=0, heads_k=0, dtype="float32"))
    check_case(AttentionCase(3, 4, heads_q=0, heads_k=2, dtype="float32"))
    check_case(AttentionCase(3, 4, batch=0, dtype="bfloat16", sinks="same", bias="bhqk"))


# ------------------------------------------------------------------------------------------------ layouts and strides


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_strides(dtype: str, rng: np.random.Generator) -> None:
    case = AttentionCase(33, 47, heads_q=4, heads_k=2, head_dim=16, dtype=dtype, causal=True)
    arrays: dict[str, Array] = case.random()
    expected = run(arrays, case.options())
    swapped = arrays | {name: arrays[name].swapaxes(1, 2) for name in "qkv"}
    padded, reversed_, readonly = dict(arrays), dict(arrays), dict(arrays)
    for name in "qkv":
        a = arrays[name]
        wide = np.full((a.shape[0], a.shape[1], a.shape[2] + 1, a.shape[3] + 3), np.nan, a.dtype)
        wide[:, :, :-1, :-3] = a
        padded[name] = wide[:, :, :-1, :-3]
        reversed_[name] = a[::-1, ::-1, ::-1].copy()[::-1, ::-1, ::-1]
        readonly[name] = a.copy()
        readonly[name].flags.writeable = False
    for other, layout in ((swapped, "bhsd"), (padded, "bshd"), (reversed_, "bshd"), (readonly, "bshd")):
        out, lse = run(other, case.options(), layout)
        wide_out, wide_expected = (x.astype(np.float64) for x in (out, expected[0]))
        np.testing.assert_allclose(wide_out, wide_expected, rtol=2 * EPS[dtype], atol=1e-6)
        np.testing.assert_allclose(lse, expected[1], rtol=1e-6)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("axes", [(0,), (1,), (2,), (0, 1), (1, 2), (0, 1, 2)], ids=str)
def test_broadcast_keys_and_values(dtype: str, axes: tuple[int, ...]) -> None:
    case = AttentionCase(9, 30, heads_q=4, heads_k=2, head_dim=16, dtype=dtype, causal=True)
    arrays: dict[str, Array] = case.random()
    for name in "kv":
        one = arrays[name][tuple(slice(0, 1) if axis in axes else slice(None) for axis in range(4))]
        arrays[name] = np.broadcast_to(one, arrays[name].shape)
    for q in (arrays["q"], np.broadcast_to(arrays["q"][:, :1], arrays["q"].shape)):
        ref = reference.flash_attention(**arrays | {"q": q}, causal=True, return_lse=True)
        check(*run(arrays | {"q": q}, case.options()), *ref)


def test_out_may_be_any_view(rng: np.random.Generator) -> None:
    case = AttentionCase(20, 30, heads_q=4, heads_k=2, head_dim=16, dtype="bfloat16")
    arrays: dict[str, Array] = case.random()
    expected, expected_lse = run(arrays, {})
    problem = attention_problem(**{name: view(a, name) for name, a in arrays.items()})
    block = np.full((2, 4, 20, 20), SPECIAL, ml_dtypes.bfloat16)
    out = block[..., 2:18].swapaxes(1, 2)
    attention(problem, arrays["q"], arrays["k"], arrays["v"], out, None)  # no lse asked for
    np.testing.assert_array_equal(out, expected)
    assert np.all(block[..., :2] == SPECIAL) and np.all(block[..., 18:] == SPECIAL)
    assert expected_lse.dtype == np.float32


@pytest.mark.parametrize("bias_dtype", ["bfloat16", "float32", "bool"])
def test_bias_may_be_any_view(bias_dtype: str) -> None:
    case = AttentionCase(20, 30, heads_q=4, heads_k=2, head_dim=16, bias="bhqk", bias_dtype=bias_dtype)
    arrays: dict[str, Array] = case.random()
    full = arrays["bias"]
    moved = full.swapaxes(0, 1).copy().swapaxes(0, 1)
    for bias in (full[..., ::-1, :], moved, np.broadcast_to(full[:1, :, :1], full.shape)):
        ref = reference.flash_attention(**arrays | {"bias": bias}, return_lse=True)
        check(*run(arrays | {"bias": bias}, {}), *ref)


# ---------------------------------------------------------------------------------------------------- packed sequences


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
        case = VarlenCase(**shape, heads_q=4, heads_k=2, head_dim=16, head_dim_v=24, dtype=dtype, **features)
        arrays: dict[str, Array] = case.random()  # rows that do not count are NaN
        out, lse = run_varlen(arrays, case.options())
        ref, ref_lse = reference.flash_attention_varlen(**arrays, **case.options(), return_lse=True)
        counts = np.zeros(len(out), bool)
        for start, stop in case.spans("q"):
            counts[start:stop] = True
        check(out[counts], lse[:, counts], ref[counts], ref_lse[:, counts])
        assert np.all(out[~counts] == SPECIAL) and np.all(lse[:, ~counts] == SPECIAL)  # not touched


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"cu_seqlens_q": np.array([0, 6, 5], np.int32)}, "cu_seqlens_q"),
        ({"cu_seqlens_k": np.array([0, 5, 99], np.int32)}, "cu_seqlens_k"),
        ({"cu_seqlens_k": np.array([-1, 5, 9], np.int32)}, "cu_seqlens_k"),
        ({"seqused_q": np.array([5, 4], np.int32)}, "seqused_q"),
        ({"seqused_k": np.array([-1, 4], np.int32)}, "seqused_k"),
        ({"max_seqlen_q": 4}, "max_seqlen_q"),
        ({"max_seqlen_k": 3}, "max_seqlen_k"),
    ],
)
def test_wrong_offsets_are_refused(change: dict[str, Any], word: str) -> None:
    case = VarlenCase((5, 3), (5, 4), dtype="float32", head_dim=8)
    arguments = case.random() | case.options() | change
    options = {name: value for name, value in arguments.items() if not isinstance(value, np.ndarray)}
    arrays = {name: value for name, value in arguments.items() if isinstance(value, np.ndarray)}
    with pytest.raises(UnsupportedProblem, match=word):
        run_varlen(arrays, options)


# ------------------------------------------------------------------------------------------------------- hostile values


@pytest.mark.parametrize("size", [1e4, -1e4])
def test_huge_logits(size: float, rng: np.random.Generator) -> None:
    # multiples of 1/16 are exact in float32 at this size, so the result must be as exact as ever
    for softcap in (0.0, 50.0):
        logits = size + rng.integers(-40, 40, (2, 30, 600)) / 16
        logits[:, :5] *= rng.choice([-1.0, 0.0, 1.0], (2, 5, 600))
        q, k = np.zeros((2, 30, 1, 8), np.float32), np.zeros((2, 600, 1, 8), np.float32)
        q[..., 0], k[..., 0] = 100.0, size / 100
        bias = (logits - size)[:, None].astype(np.float32)
        v = rng.standard_normal((2, 600, 1, 8)).astype(np.float32)
        arrays: dict[str, Array] = {"q": q, "k": k, "v": v, "bias": bias}
        options: dict[str, Any] = {"softmax_scale": 1.0, "softcap": softcap}
        out, lse = run(arrays, options)
        ref, ref_lse = reference.flash_attention(**arrays, **options, return_lse=True)
        check(out, lse, ref, ref_lse)


def test_scores_that_grow_and_fall_over_the_blocks(rng: np.random.Generator) -> None:
    for slope in (1e4, -1e4):
        k = np.zeros((1, 2000, 1, 8), np.float32)
        k[0, :, 0, 0] = slope * np.floor(np.linspace(0, 8, 2000)) / 8  # steps, so that the winners are many
        v = rng.standard_normal((1, 2000, 1, 8)).astype(np.float32)
        arrays: dict[str, Array] = {"q": np.ones((1, 40, 1, 8), np.float32), "k": k, "v": v}
        options: dict[str, Any] = {"softmax_scale": 1.0, "causal": True}
        check(*run(arrays, options), *reference.flash_attention(**arrays, **options, return_lse=True))


def test_rows_hidden_by_the_bias(rng: np.random.Generator) -> None:
    case = AttentionCase(40, 700, batch=1, heads_q=2, heads_k=1, head_dim=8, dtype="float32", bias="bhqk")
    arrays: dict[str, Array] = case.random()
    bias = arrays["bias"]
    bias[0, 0, 3] = bias[0, 1, 7, :600] = bias[0, 1, 8, 600:] = -np.inf
    for sinks in (None, np.array([0.5, -np.inf], np.float32)):
        given = arrays if sinks is None else arrays | {"sinks": sinks}
        out, lse = run(given, {})
        check(out, lse, *reference.flash_attention(**given, return_lse=True))
        assert not out[0, 3, 0].any()
        assert lse[0, 0, 3] == (-np.inf if sinks is None else sinks[0])
    mask = bias > -np.inf
    out, lse = run(arrays | {"bias": mask}, {})
    check(out, lse, *reference.flash_attention(**arrays | {"bias": mask}, return_lse=True))


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("name", ["q", "k", "v"])
@pytest.mark.parametrize("options", [{"causal": True}, {"window_size": (30, 10)}], ids=str)
def test_nan_stays_where_it_is_seen(name: str, options: dict[str, Any], value: float) -> None:
    case = AttentionCase(700, 700, batch=1, heads_q=4, heads_k=2, head_dim=8, dtype="float32", **options)
    arrays: dict[str, Array] = case.random()
    clean, clean_lse = run(arrays, case.options())
    row, head = 345, 1
    arrays[name][0, row, head] = value
    out, lse = run(arrays, case.options())
    i = np.arange(700)
    hit = np.zeros((700, 4), bool)
    if name == "q":
        hit[row, head] = True
    else:
        seen = i >= row if options.get("causal") else (i >= row - 10) & (i <= row + 30)
        hit[:, 2 * head : 2 * head + 2] = seen[:, None]
    np.testing.assert_array_equal(out[0][~hit], clean[0][~hit])
    np.testing.assert_array_equal(lse[0].T[~hit], clean_lse[0].T[~hit])
    if np.isnan(value):
        assert np.isnan(out[0][hit]).all()
        assert np.isnan(lse[0].T[hit]).all() == (name != "v")


def test_nan_in_padding_that_a_mask_hides() -> None:
    case = AttentionCase(5, 64, heads_q=4, heads_k=2, head_dim=8, dtype="bfloat16", bias="b11k", bias_dtype="bool")
    arrays: dict[str, Array] = case.random()
    arrays["bias"][:] = np.arange(64) >= 20
    expected = run(arrays, {})
    for name in "kv":
        arrays[name][:, :20] = np.nan
    for got, want in zip(run(arrays, {}), expected, strict=True):
        np.testing.assert_array_equal(got, want)


def test_every_float16_is_read_exactly() -> None:
    patterns = np.arange(2**16, dtype=np.uint16)
    finite = patterns[(patterns & 0x7C00) != 0x7C00]
    for bits in (patterns, finite):
        values = bits.view(np.float16).reshape(1, -1, 1, 8)
        got = tile._float32(values)
        np.testing.assert_array_equal(got[:, 0], values[:, :, 0].astype(np.float32))
        np.testing.assert_array_equal(np.signbit(got[:, 0]), np.signbit(values[:, :, 0]))


# ----------------------------------------------------------------------------------------------------------- properties


@given(st.integers(1, 40), st.integers(2, 90), st.floats(0, 1), st.sampled_from([(2, 2), (6, 2)]), st.integers(0, 999))
def test_parts_join_by_lse(seqlen_q: int, seqlen_k: int, where: float, heads: tuple[int, int], seed: int) -> None:
    case = AttentionCase(seqlen_q, seqlen_k, heads_q=heads[0], heads_k=heads[1], head_dim=16, dtype="float32")
    arrays: dict[str, Array] = case.random(seed)
    cut = int(where * seqlen_k)
    out, lse = run(arrays, {})
    parts = [
        run({"q": arrays["q"], "k": arrays["k"][:, keys], "v": arrays["v"][:, keys]}, {})
        for keys in (slice(0, cut), slice(cut, None))
    ]
    joined = np.logaddexp(parts[0][1], parts[1][1])
    total = sum(np.exp(part[1] - joined).transpose(0, 2, 1)[..., None] * part[0] for part in parts)
    np.testing.assert_allclose(joined, lse, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(total, out, rtol=1e-4, atol=1e-5)


def test_a_sequence_alone_equals_itself_in_a_batch() -> None:
    case = AttentionCase(150, 300, batch=3, heads_q=4, heads_k=2, head_dim=32, dtype="float32", causal=True)
    arrays: dict[str, Array] = case.random()
    out, lse = run(arrays, case.options())
    for b in range(3):
        alone, alone_lse = run({name: a[b : b + 1] for name, a in arrays.items()}, case.options())
        np.testing.assert_allclose(alone[0], out[b], rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(alone_lse[0], lse[b], rtol=1e-6)


WINDOW = st.integers(-1, 40)


@given(st.integers(0, 30), st.integers(1, 20), st.integers(-30, 30), WINDOW, WINDOW, st.integers(0, 60))
def test_key_range_is_exact(start: int, count: int, offset: int, left: int, right: int, seqlen_k: int) -> None:
    first, last = tile.key_range(slice(start, start + count), offset, left, right, seqlen_k)
    pairs = itertools.product(range(start, start + count), range(seqlen_k))
    seen = [j for i, j in pairs if (left < 0 or j >= i + offset - left) and (right < 0 or j <= i + offset + right)]
    assert (first, last) == (min(seen), max(seen) + 1) if seen else last <= first


def test_memory_does_not_grow_with_the_product_of_lengths() -> None:
    case = AttentionCase(2500, 2500, batch=1, heads_q=4, heads_k=4, head_dim=16, dtype="float32", causal=True)
    arrays: dict[str, Array] = case.random()
    problem = attention_problem(**{name: view(a, name) for name, a in arrays.items()}, causal=True)
    out, lse = np.empty_like(arrays["q"]), np.empty((1, 4, 2500), np.float32)
    tracemalloc.start()
    attention(problem, arrays["q"], arrays["k"], arrays["v"], out, lse)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 8e6  # the scores of one head alone are 25 MB
