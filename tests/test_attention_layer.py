"""FlashAttentionLayer, its KV cache, and FlashMoEScienceAttention: against plain code, step by step, packed, padded."""

from __future__ import annotations

import copy
import pickle
from itertools import pairwise
from typing import Any

import numpy as np
import pytest

import flashmoe_cupy
from flashmoe_cupy import FlashAttentionLayer, KVCache
from flashmoe_cupy.errors import UnsupportedProblem

DIM, HEADS, FEWER, EACH = 32, 4, 2, 16
LIBRARIES = [
    "numpy", pytest.param("torch", marks=pytest.mark.torch), pytest.param("jax", marks=pytest.mark.jax),
    pytest.param("cupy", marks=[pytest.mark.gpu, pytest.mark.sm80]),
]  # fmt: skip
WIDTHS = {"q": HEADS * EACH, "k": FEWER * EACH, "v": FEWER * EACH, "out": DIM}
X = np.random.default_rng(1).standard_normal((2, 9, DIM)).astype(np.float32)


def arrays(everything: bool = True) -> dict[str, Any]:
    r = np.random.default_rng(0)
    shapes: dict[str, tuple[int, ...]] = {
        f"w_{name}": (n, HEADS * EACH if name == "out" else DIM) for name, n in WIDTHS.items()
    }
    if everything:
        shapes |= {f"b_{name}": (n,) for name, n in WIDTHS.items()} | {"q_norm": (EACH,), "k_norm": (EACH,)}
    values = {name: r.standard_normal(shape) / 4 + ("norm" in name) for name, shape in shapes.items()}
    return {name: a.astype(np.float32) for name, a in values.items()}


def put(library: str, a: Any) -> Any:
    if library == "numpy":
        return a
    if library == "torch":
        return pytest.importorskip("torch").from_numpy(a)
    if library == "cupy":
        return pytest.importorskip("cupy").asarray(a)
    return pytest.importorskip("jax").numpy.asarray(a)


def host(x: Any) -> Any:
    return x.get() if hasattr(x, "get") else np.asarray(x)


def made(library: str = "numpy", everything: bool = True, **options: Any) -> FlashAttentionLayer:
    held = {name: put(library, a) for name, a in arrays(everything).items()}
    return FlashAttentionLayer(DIM, HEADS, FEWER, head_dim=EACH, **held, **options)


def plain(x: Any, w: dict[str, Any], positions: Any, **given: Any) -> Any:
    """One sequence (rows, DIM) in float64, a head and a query at a time."""
    w = {name: a.astype(np.float64) for name, a in w.items()}
    theta, cap, left = given.get("rope_theta", 1e4), given.get("softcap"), given.get("window_size", (-1, -1))[0]
    n = len(x)

    def side(name: str, heads: int) -> Any:
        rows = (x.astype(np.float64) @ w[f"w_{name}"].T + w.get(f"b_{name}", 0)).reshape(n, heads, EACH)
        if f"{name}_norm" in w:
            rows = rows / np.sqrt((rows**2).mean(-1, keepdims=True) + 1e-6) * w[f"{name}_norm"]
        if name == "v" or theta is None:
            return rows
        turned = rows.astype(complex)[..., : EACH // 2] + 1j * rows[..., EACH // 2 :]
        turned = turned * np.exp(1j * positions[:, None, None] * theta ** (-2 * np.arange(EACH // 2) / EACH))
        return np.concatenate([turned.real, turned.imag], -1)

    q, k, v = side("q", HEADS), side("k", FEWER), side("v", FEWER)
    out = np.zeros((n, HEADS, EACH))
    for h in range(HEADS):
        for i in range(n):
            last = i + 1 if given.get("causal", True) else n
            seen = slice(max(0, i - left) if left >= 0 else 0, last)
            s = k[seen, h // 2] @ q[i, h] * given.get("softmax_scale", EACH**-0.5)
            s = cap * np.tanh(s / cap) if cap else s
            p = np.exp(s - s.max())
            out[i, h] = p / p.sum() @ v[seen, h // 2]
    return out.reshape(n, -1) @ w["w_out"].T + w.get("b_out", 0)


def close(got: Any, want: Any, allowed: float = 2e-5, library: str = "") -> None:
    if library == "cupy" and allowed:  # a GPU adds up otherwise
        allowed = 5e-4
    np.testing.assert_allclose(host(got), host(want), rtol=0, atol=allowed)


OPTIONS: list[dict[str, Any]] = [
    {}, {"causal": False}, {"window_size": (3, 0)}, {"softcap": 2.0, "softmax_scale": 0.4}, {"rope_theta": None},
    {"rope_theta": 500.0},
]  # fmt: skip


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("library", LIBRARIES)
def test_the_whole_layer(library: str, options: dict[str, Any]) -> None:
    for everything in (True, False):
        layer = made(library, everything, **options)
        x = put(library, X)
        out = layer(x)
        assert type(out) is type(x) and out.shape == x.shape and out.dtype == x.dtype
        want = [plain(row, arrays(everything), np.arange(9), **options) for row in X]
        close(out, np.stack(want), library=library)


def test_other_strides_and_odd_sizes() -> None:
    """Weights as their transposes lie, rows that do not lie side by side, no rows, a dim that is no multiple of 8."""
    w, wide = arrays(), np.repeat(X, 2, -1)
    want = made()(X)
    turned: dict[str, Any] = {name: np.asfortranarray(a) if a.ndim == 2 else a for name, a in w.items()}
    close(FlashAttentionLayer(DIM, HEADS, FEWER, head_dim=EACH, **turned)(X), want, 3e-6)
    close(made()(wide[..., ::2]), want, 0)
    assert made()(X[:, :0]).shape == (2, 0, DIM) and made()(X[:0]).shape == (0, 9, DIM)
    odd: dict[str, Any] = w | {name: w[name][:, :30] for name in ("w_q", "w_k", "w_v")}
    odd |= {name: w[name][:30] for name in ("w_out", "b_out")}
    close(FlashAttentionLayer(30, HEADS, FEWER, head_dim=EACH, **odd)(X[..., :30]),
          np.stack([plain(row[:, :30], odd, np.arange(9)) for row in X]))  # fmt: skip


@pytest.mark.parametrize("library", LIBRARIES)
def test_positions(library: str) -> None:
    layer, ids = made(library), np.array([[3, 1, 4, 1, 5, 9, 2, 6, 5], range(100, 109)])
    want = np.stack([plain(row, arrays(), one) for row, one in zip(X, ids, strict=True)])
    close(layer(put(library, X), position_ids=put(library, ids.astype(np.int32))), want, library=library)
    want = np.stack([plain(row, arrays(), ids[1]) for row in X])
    close(layer(put(library, X), position_ids=put(library, ids[1].astype(np.int32))), want, library=library)


@pytest.mark.parametrize("options", [{}, {"window_size": (3, 0)}], ids=str)
@pytest.mark.parametrize("library", LIBRARIES)
def test_step_by_step(library: str, options: dict[str, Any]) -> None:
    """A cache gives what one call on all tokens gives, also where entries have different lengths."""
    layer, x = made(library, **options), put(library, X)
    whole, cache = host(layer(x)), layer.new_cache(2, 12)
    steps = [layer(x[:, a:b], cache=cache) for a, b in ((0, 4), (4, 5), (5, 6), (6, 9))]
    close(np.concatenate([host(step) for step in steps], 1), whole, 3e-6, library)
    assert cache.length == 9 and host(cache.lengths).tolist() == [9, 9] and cache.max_length == 12
    cache.reset()
    lengths = put(library, np.array([3, 7], np.int32))
    first = host(layer(x[:, :7], cache=cache, lengths=lengths))
    close(first[0, :3], whole[0, :3], 3e-6, library)
    close(first[1], whole[1, :7], 3e-6, library)
    close(first[0, 3:], np.broadcast_to(arrays()["b_out"], (4, DIM)), 0)
    rows = np.stack([X[0, 3:5], X[1, 7:9]])
    for i in range(2):
        step = host(layer(put(library, rows[:, i : i + 1]), cache=cache))
        close(step[:, 0], np.stack([whole[0, 3 + i], whole[1, 7 + i]]), 3e-6, library)
    assert host(cache.lengths).tolist() == [5, 9] and cache.length == 9


@pytest.mark.parametrize("library", LIBRARIES)
def test_packed_and_padded(library: str) -> None:
    layer, x = made(library), put(library, X.reshape(18, DIM))
    cu = np.array([0, 5, 5, 16], np.int32)
    out = host(layer(x, cu_seqlens=put(library, cu), max_seqlen=11))
    for a, b in pairwise(cu):
        if b > a:
            close(out[a:b], plain(X.reshape(18, DIM)[a:b], arrays(), np.arange(b - a)), library=library)
    close(out[16:], np.broadcast_to(arrays()["b_out"], (2, DIM)), 0)
    lengths = put(library, np.array([4, 9], np.int32))
    out = host(layer(put(library, X), lengths=lengths))
    close(out[0, :4], plain(X[0, :4], arrays(), np.arange(4)), library=library)
    close(out[1], plain(X[1], arrays(), np.arange(9)), library=library)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_short_floats_of_numpy(dtype: str) -> None:
    import ml_dtypes

    kind = np.float16 if dtype == "float16" else ml_dtypes.bfloat16
    layer = FlashAttentionLayer(DIM, HEADS, FEWER, head_dim=EACH,
                                **{name: a.astype(kind) for name, a in arrays().items()})  # fmt: skip
    out, cache = layer(X.astype(kind)), layer.new_cache(2, 9)
    assert out.dtype == kind and cache.keys.dtype == kind
    close(out.astype(np.float32), made()(X), 0.02 if dtype == "float16" else 0.15)
    assert np.array_equal(layer(X.astype(kind), cache=cache), out)


# ------------------------------------------------------------------------------------------------------------------ JAX


@pytest.mark.jax
def test_pytrees() -> None:
    jax = pytest.importorskip("jax")
    layer, x = made("jax"), put("jax", X)
    whole = layer(x)
    close(jax.jit(lambda its, x: its(x))(layer, x), whole, 3e-6)
    gradient = jax.grad(lambda its: (its(x) ** 2).sum())(layer)
    assert isinstance(gradient, FlashAttentionLayer) and gradient.w_q.shape == layer.w_q.shape
    moved, step = copy.copy(layer), 1e-5
    moved.w_v = layer.w_v + step * gradient.w_v
    rise = float((moved(x) ** 2).sum() - (whole**2).sum())
    assert abs(rise / step / float((gradient.w_v**2).sum()) - 1) < 0.05

    forward = jax.jit(lambda layer, x, cache: (layer(x, cache=cache), cache))
    cache, found = layer.new_cache(2, 9), []
    for i in range(9):
        out, cache = forward(layer, x[:, i : i + 1], cache)
        found.append(np.asarray(out))
    close(np.concatenate(found, 1), np.asarray(whole), 3e-6)
    assert forward._cache_size() == 1 and cache.length is None and cache.lengths.tolist() == [9, 9]


# --------------------------------------------------------------------------------------------------------------- errors

W = arrays()
WRONG: list[tuple[dict[str, Any], str]] = [
    ({"dim": 33}, "w_q must have shape"), ({"dim": 0}, "dim must be an int from 1 on, but is 0"),
    ({"n_heads": 3}, "n_heads 3 is no multiple of n_kv_heads 2"), ({"n_kv_heads": True}, "n_kv_heads must be an int"),
    ({"head_dim": 12}, "head_dim is 12; it must be a multiple of 8"), ({"head_dim": None}, "w_q must have shape"),
    ({"head_dim": None, "dim": 30}, "dim 30 is no multiple of n_heads 4"), ({"causal": 1}, "causal must be a bool"),
    ({"rope_theta": 0}, "rope_theta must be a positive number or None"), ({"norm_eps": -1.0}, "norm_eps must be"),
    ({"softcap": -1.0, "window_size": 3}, "window_size must be two ints.*\n.*softcap must be"),
    ({"w_k": W["w_k"].astype(np.float16)}, "dtypes differ"), ({"b_q": W["b_q"][:3]}, r"b_q must have shape \(64,\)"),
    ({"q_norm": W["b_q"]}, r"q_norm must have shape \(16,\), but has \(64,\)"),
    ({"w_v": W["w_v"].astype(np.float64)}, "w_v has dtype float64"),
]  # fmt: skip


@pytest.mark.parametrize(("change", "why"), WRONG, ids=[why for _, why in WRONG])
def test_wrong_layers(change: dict[str, Any], why: str) -> None:
    given: dict[str, Any] = {"dim": DIM, "n_heads": HEADS, "n_kv_heads": FEWER, "head_dim": EACH, **W, **change}
    with pytest.raises(UnsupportedProblem, match=why):
        FlashAttentionLayer(given.pop("dim"), given.pop("n_heads"), given.pop("n_kv_heads"), **given)


CU, N = np.array([0, 9, 18], np.int32), np.array([9, 9], np.int32)
CALLS: list[tuple[Any, dict[str, Any], str]] = [
    (X[0], {}, r"x must have shape \(batch, seqlen, dim\), with dim 32, but has \(9, 32\)"),
    (X[..., :8], {}, "with dim 32"), (X.astype(np.float16), {}, "x has dtype float16, but the weights have float32"),
    (X, {"cu_seqlens": CU}, r"x must have shape \(total, dim\) beside cu_seqlens"),
    (X.reshape(18, DIM), {"cu_seqlens": CU}, "cu_seqlens need max_seqlen"),
    (X.reshape(18, DIM), {"cu_seqlens": CU, "max_seqlen": 9, "lengths": N}, "lengths is given beside cu_seqlens"),
    (X.reshape(18, DIM), {"cu_seqlens": CU.astype(np.int64), "max_seqlen": 9}, "cu_seqlens_q has dtype int64"),
    (X, {"max_seqlen": 9}, "max_seqlen is given, but no cu_seqlens"),
    (X, {"lengths": N[:1]}, r"lengths must have shape \(2,\), but has \(1,\)"),
    (X, {"lengths": [9, 9]}, "lengths must be a numpy.ndarray like x"),
    (X, {"lengths": N.astype(np.float32)}, "lengths must be int32, but is float32"),
    (X, {"position_ids": N}, r"position_ids must have shape \(2, 9\) or \(9,\), but has \(2,\)"),
    (X, {"cache": "yes"}, "cache must be a KVCache, but is 'yes'"),
]


@pytest.mark.parametrize(("x", "options", "why"), CALLS, ids=[why for *_, why in CALLS])
def test_wrong_calls(x: Any, options: dict[str, Any], why: str) -> None:
    with pytest.raises(UnsupportedProblem, match=why):
        made()(x, **options)


def test_wrong_calls_of_other_kinds() -> None:
    unknown: dict[str, Any] = {"sliding_window": 3}
    with pytest.raises(TypeError, match=r"FlashAttentionLayer.* has no argument 'sliding_window'.*window_size"):
        FlashAttentionLayer(DIM, HEADS, FEWER, head_dim=EACH, **W, **unknown)
    with pytest.raises(TypeError, match=r"x must be a numpy.ndarray like the layer's weights, but is None"):
        made()(None)
    with pytest.raises(TypeError, match="w_q"):
        FlashAttentionLayer(DIM, HEADS, FEWER, head_dim=EACH, **W | {"w_q": None})
    with pytest.raises(UnsupportedProblem, match="position_ids are given, but rope_theta=None"):
        made(rope_theta=None)(X, position_ids=np.arange(9))


def test_caches_say_what_is_wrong_and_stay_as_they_are() -> None:
    layer = made()
    cache = layer.new_cache(2, 10)
    layer(X, cache=cache)
    before = cache.keys.copy()
    with pytest.raises(UnsupportedProblem, match="room for 10 rows, of which 9 may be in use, and 2 are to come"):
        layer(X[:, :2], cache=cache)
    with pytest.raises(UnsupportedProblem, match="the cache has 2 entries, but x has 1"):
        layer(X[:1, :1], cache=cache)
    with pytest.raises(UnsupportedProblem, match=r"keys of shape \(2, rows, 2, 16\), but they have \(1, 1, 2, 16\)"):
        cache.update(before[:1, :1], before[:1, :1])
    with pytest.raises(UnsupportedProblem, match="the cache has dtype float16, but keys have float32"):
        layer(X, cache=KVCache(np.zeros((2, 9, 2, 16), np.float16), np.zeros((2, 9, 2, 16), np.float16)))
    with pytest.raises(UnsupportedProblem, match="seqused_q"):  # more than there are, which host memory tells
        layer(X[:, :1], cache=cache, lengths=np.array([1, 5], np.int32))
    assert cache.length == 9 and cache.lengths.tolist() == [9, 9]
    with pytest.raises(UnsupportedProblem, match=r"keys must be a numpy.ndarray"):
        cache.update([1], [2])
    assert np.array_equal(cache.keys[:, :9], before[:, :9]) and cache.length == 9
    keys, values = cache.update(before[:, :1], before[:, :1])
    assert keys is cache.keys and values is cache.values and np.array_equal(keys[:, 9], before[:, 0])
    for a, b, why in (
        (before, before[..., :8].astype(np.float16), "must have one dtype"), (before[0], before, "must have shape"),
        (before, [1], "both of one library"), (before.astype(np.float64), before.astype(np.float64), "float64"),
    ):  # fmt: skip
        with pytest.raises(UnsupportedProblem, match=why):
            KVCache(a, b)
    wrong: Any = "2"
    with pytest.raises(UnsupportedProblem, match="max_length must be an int from 0 on, but is '2'"):
        layer.new_cache(2, wrong)


@pytest.mark.parametrize("library", LIBRARIES)
def test_copies(library: str) -> None:
    layer, x = made(library), put(library, X)
    cache = layer.new_cache(2, 9)
    layer(x[:, :8], cache=cache)
    want = host(layer(x)[:, 8:])
    for other, more in (copy.deepcopy((layer, cache)), pickle.loads(pickle.dumps((layer, cache)))):
        close(other(x[:, 8:], cache=more), want, 3e-6, library)
        assert more.length == 9 and cache.length == 8
    close(layer(x[:, 8:], cache=cache), want, 3e-6, library)


def test_names_are_public() -> None:
    assert {"FlashAttentionLayer", "KVCache"} <= {*dir(flashmoe_cupy)}
    shown = "FlashAttentionLayer(32, 4, n_kv_heads=2, head_dim=16, softcap=2.0)"
    assert repr(made(softcap=2)) == shown
    assert repr(made().new_cache(1, 3)) == "KVCache(keys=[1, 3, 2, 16], dtype=float32, length=0)"
