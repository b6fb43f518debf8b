"""The gradient on the NumPy back end: subsets, strides, hostile values, threads and memory."""

from __future__ import annotations

import itertools
import tracemalloc
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from cpu_backward_kit import (
    NAMES,
    SPECIAL,
    Array,
    blank,
    check,
    prepared,
    same,
    truth,
)

from flashmoe_cupy.cpu import attention as forward
from flashmoe_cupy.cpu import attention_backward as module
from flashmoe_cupy.cpu import threads
from flashmoe_cupy.testing import AttentionCase, Case, VarlenCase

# ------------------------------------------------------------------------------------------------- outputs and strides


@pytest.mark.parametrize("bias", ["bhqk", "1hqk"])
def test_each_subset_is_the_same(bias: str) -> None:
    case = AttentionCase(70, 90, heads_q=4, heads_k=2, head_dim=16, dtype="float32", bias=bias, sinks="float32")
    arrays: dict[str, Array] = case.random()
    call = prepared(case, arrays)
    whole = call.run(blank(case, arrays))
    for count in range(len(NAMES)):
        for names in itertools.combinations(NAMES, count):
            grads = {name: grad for name, grad in blank(case, arrays).items() if name in names}
            same(call.run(grads), {name: whole[name] for name in names})
    dout, q, k, v, out, lse = call.positional
    alone = call._replace(positional=(dout, q, k, v, np.full_like(out, np.nan), lse), dlse=np.full_like(lse, np.nan))
    same(alone.run({"dv": blank(case, arrays)["dv"]}), {"dv": whole["dv"]})  # it needs neither out nor dlse


def test_without_dlse() -> None:
    case = AttentionCase(70, 90, heads_q=4, heads_k=2, head_dim=16, dtype="float32", sinks="float32")
    arrays: dict[str, Array] = case.random()
    call = prepared(case, arrays)._replace(dlse=None)
    check(case, arrays, call, call.run(blank(case, arrays)))


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_strides(dtype: str) -> None:
    case = AttentionCase(33, 47, heads_q=4, heads_k=2, head_dim=16, dtype=dtype, causal=True, bias="1hqk")
    arrays: dict[str, Array] = case.random()
    call = prepared(case, arrays)
    expected = call.run(blank(case, arrays))

    def spaced(a: Array) -> Array:
        wide = np.full((a.shape[0], a.shape[1], a.shape[2] + 1, a.shape[3] + 3), np.nan, a.dtype)
        wide[:, :, :-1, :-3] = a
        return wide[:, :, :-1, :-3]

    def swapped(a: Array) -> Array:
        return a.swapaxes(1, 2).copy().swapaxes(1, 2)

    def turned(a: Array) -> Array:
        return a[::-1, ::-1, ::-1].copy()[::-1, ::-1, ::-1]

    def columns(a: Array) -> Array:
        return a.T.copy().T

    for form in (spaced, swapped, turned, columns):
        *big, lse = call.positional
        other = call._replace(positional=(*(form(a) for a in big), columns(lse)), dlse=columns(call.dlse))
        grads = other.run({name: form(grad) for name, grad in blank(case, arrays).items()})
        for name, want in expected.items():
            got, want = grads[name].astype(np.float64), want.astype(np.float64)
            # products may be summed in another order: one step of the dtype, or of float32 beside the largest value
            rtol = {"float32": 1e-5, "float16": 2.0**-10, "bfloat16": 2.0**-7}[dtype]
            np.testing.assert_allclose(got, want, rtol=rtol, atol=2e-6 * max(1.0, np.abs(want).max()))


def test_outputs_beside_others_stay_inside() -> None:
    case = AttentionCase(20, 30, heads_q=4, heads_k=2, head_dim=16, dtype="bfloat16", causal=True)
    arrays: dict[str, Array] = case.random()
    call = prepared(case, arrays)
    expected = call.run(blank(case, arrays))
    blocks = {name: np.full((2, a.shape[2], a.shape[1], 20), SPECIAL, ml_dtypes.bfloat16) for name, a in
              expected.items()}  # fmt: skip
    call.run({name: block[..., 2:18].swapaxes(1, 2) for name, block in blocks.items()})
    for name, block in blocks.items():
        np.testing.assert_array_equal(block[..., 2:18].swapaxes(1, 2), expected[name])
        assert np.all(block[..., :2] == SPECIAL) and np.all(block[..., 18:] == SPECIAL)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("axes", [(0,), (1,), (2,), (0, 1, 2), (2, 3), (0, 1, 2, 3)], ids=str)
def test_arrays_that_are_spread(dtype: str, axes: tuple[int, ...]) -> None:
    """As NumPy's broadcast_to gives them, and as a sum's gradient comes: one element for all."""
    case = AttentionCase(40, 50, heads_q=4, heads_k=2, head_dim=16, dtype=dtype, causal=True)
    arrays: dict[str, Array] = case.random()

    def spread(a: Array) -> Array:
        return np.broadcast_to(a[tuple(slice(0, 1) if n in axes else slice(None) for n in range(4))], a.shape)

    call = prepared(case, arrays, spread(np.random.default_rng(3).standard_normal((2, 40, 4, 16)).astype(dtype)))
    check(case, arrays, call, call.run(blank(case, arrays)))
    if 3 not in axes:  # rows of q, k and v are contiguous
        grads = blank(case, arrays)
        arrays = {name: spread(a) if name in "kv" else a for name, a in arrays.items()}
        call = prepared(case, arrays)
        check(case, arrays, call, call.run(grads))


# ------------------------------------------------------------------------------------------------------- hostile values


@pytest.mark.parametrize("size", [1e4, -1e4])
def test_huge_logits(size: float, rng: np.random.Generator) -> None:
    # multiples of 1/16 are exact in float32 at this size; lse is rounded to 1/1024
    q, k = np.zeros((2, 30, 1, 8), np.float32), np.zeros((2, 300, 1, 8), np.float32)
    q[..., 0], k[..., 0] = 100.0, size / 100
    bias = (rng.integers(-40, 40, (2, 1, 30, 300)) / 16).astype(np.float32)
    case = AttentionCase(30, 300, heads_q=1, heads_k=1, head_dim=8, dtype="float32", softmax_scale=1.0, bias="b1qk")
    v = rng.standard_normal((2, 300, 1, 8)).astype(np.float32)
    arrays: dict[str, Array] = {"q": q, "k": k, "v": v, "bias": bias}
    call = prepared(case, arrays)
    ref = truth(case, arrays, call)
    for name, grad in call.run(blank(case, arrays)).items():
        np.testing.assert_allclose(grad, ref[name], rtol=5e-3, atol=5e-3 * np.abs(ref[name]).max(), err_msg=name)


@pytest.mark.parametrize(
    ("name", "value"), [*itertools.product(["k", "v", "dout"], [np.nan, np.inf]), ("q", np.nan)], ids=str
)
@pytest.mark.parametrize("options", [
    {"causal": True}, {"window_size": (30, 10), "softcap": 2.0}, {"bias": "1hqk", "bias_dtype": "bool"},
    {"causal": True, "bias": "qk"}, {"causal": True, "bias": "1hqk"},
], ids=str)  # fmt: skip
def test_nan_stays_where_it_is_seen(name: str, options: dict[str, Any], value: float) -> None:
    for seqlen_q in (200, 8):
        case = AttentionCase(seqlen_q, 300, batch=1, heads_q=4, heads_k=2, head_dim=8, dtype="float32", **options)
        arrays: dict[str, Array] = case.random()
        if name in arrays:
            arrays[name][0, seqlen_q // 2 if name == "q" else 295, 1] = value
        call = prepared(case, arrays)
        if name == "dout":
            call.positional[0][0, seqlen_q // 2, 1] = value
        ref = truth(case, arrays, call, own=True)
        grads = call.run(blank(case, arrays))
        for of, got in grads.items():
            want = np.where(np.isfinite(ref[of]), ref[of], np.nan)
            got = np.where(np.isfinite(got), got, np.nan)
            np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5 * np.nanmax(np.abs(want), initial=1.0))
        if "dbias" in grads:
            same(call.run({"dbias": blank(case, arrays)["dbias"]}), {"dbias": grads["dbias"]})


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_nan_that_a_mask_hides_changes_nothing(dtype: str) -> None:
    case = AttentionCase(70, 64, heads_q=4, heads_k=2, head_dim=8, dtype=dtype, bias="b11k", bias_dtype="bool")
    arrays: dict[str, Array] = case.random()
    arrays["bias"][:] = np.arange(64) >= 20
    expected = prepared(case, arrays).run(blank(case, arrays))
    for value in (np.nan, np.inf):
        for name in "kv":
            arrays[name][:, :20] = value
        grads = prepared(case, arrays).run(blank(case, arrays))
        assert not grads["dk"][:, :20].any() and not grads["dv"][:, :20].any()
        same(grads, expected)


@pytest.mark.parametrize("options", [{}, {"softcap": 2.0}, {"sinks": "float32"}], ids=str)
def test_rows_without_keys_are_zero_whatever_they_hold(options: dict[str, Any]) -> None:
    case = AttentionCase(90, 40, heads_q=4, heads_k=2, head_dim=8, dtype="float32", causal=True, **options)
    arrays: dict[str, Array] = case.random()
    if "sinks" in arrays:
        arrays["sinks"][:] = -np.inf
    call = prepared(case, arrays)
    expected = call.run(blank(case, arrays))
    assert not expected["dq"][:, :50].any() and not expected.get("dsinks", np.zeros(1)).any()
    dout, q, k, _, out, lse = call.positional
    assert np.all(lse[:, :, :50] == -np.inf) and call.dlse is not None
    for a in (dout, q, out):
        a[:, :50] = np.nan
    call.dlse[:, :, :50] = np.nan
    same(call.run(blank(case, arrays)), expected)
    lse[:, :, 60] = -np.inf  # a row that sees keys, but is not to count
    grads = call.run(blank(case, arrays))
    assert not grads["dq"][:, 60].any() and all(np.isfinite(grad).all() for grad in grads.values())
    k[:, 5] = np.nan
    assert not call.run(blank(case, arrays))["dq"][:, 60].any()


def test_rows_hidden_by_the_bias() -> None:
    case = AttentionCase(40, 300, batch=1, heads_q=2, heads_k=1, head_dim=8, dtype="float32", bias="bhqk")
    arrays: dict[str, Array] = case.random()
    bias = arrays["bias"]
    bias[0, 0, 3] = bias[0, 1, 7, :200] = bias[0, 1, 8, 200:] = -np.inf
    for sinks in (None, np.array([0.5, -np.inf], np.float32)):
        given = arrays if sinks is None else arrays | {"sinks": sinks}
        call = prepared(case, given)
        grads = call.run(blank(case, given))
        check(case, given, call, grads)
        assert not grads["dq"][0, 3, 0].any() and not grads["dbias"][0, 0, 3].any()
        if sinks is not None:
            assert grads["dsinks"][1] == 0.0


# ----------------------------------------------------------------------------------------------------------- properties


@pytest.mark.parametrize("case", [
    AttentionCase(300, 280, heads_q=4, heads_k=2, head_dim=16, causal=True, sinks="float32", bias="1hqk"),
    AttentionCase(300, 280, heads_q=4, heads_k=2, head_dim=16, dtype="float32", bias="1k"),
    AttentionCase(300, 280, batch=1, heads_q=1, heads_k=1, head_dim=16, dtype="float32", sinks="float32"),
    VarlenCase((40, 0, 260), (50, 7, 250), heads_q=4, heads_k=2, head_dim=16, dtype="float16", sinks="same"),
], ids=str)  # fmt: skip
def test_the_same_bits_with_any_threads(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(forward, "_ONE_THREAD", 0)
    monkeypatch.setattr(module, "_PAIRS", 1)
    arrays: dict[str, Array] = case.random()
    call = prepared(case, arrays)
    results = []
    for count in (1, 2, 2, 5):
        monkeypatch.setattr(threads, "count", lambda count=count: count)
        results.append(call.run(blank(case, arrays)))
    for other in results[1:]:
        same(other, results[0])


def test_a_sequence_alone_equals_itself_in_a_batch() -> None:
    case = AttentionCase(100, 150, batch=3, heads_q=4, heads_k=2, head_dim=32, dtype="float32", causal=True)
    arrays: dict[str, Array] = case.random()
    call = prepared(case, arrays)
    together = call.run(blank(case, arrays))
    for b in range(3):
        one = case._replace(batch=1)
        own = {name: a[b : b + 1] for name, a in arrays.items()}
        alone = prepared(one, own, call.positional[0][b : b + 1])
        assert call.dlse is not None
        grads = alone._replace(dlse=call.dlse[b : b + 1]).run(blank(one, own))
        for name, grad in grads.items():
            np.testing.assert_allclose(grad[0], together[name][b], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("bias", ["", "1hqk"])
def test_memory_does_not_grow_with_the_product_of_lengths(bias: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(threads, "count", lambda: 2)
    n = 1600 if bias else 2500
    case = AttentionCase(n, n, batch=1 + bool(bias), heads_q=4, heads_k=4, head_dim=8, dtype="float32", bias=bias)
    arrays: dict[str, Array] = case.random()
    call, grads = prepared(case, arrays), blank(case, arrays)
    tracemalloc.start()
    call.run(grads)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 9e6  # the scores of one head alone are 25 MB, and 10 MB with the bias
