"""The float64 reference: against PyTorch and JAX in float64, against finite differences, and by its own properties."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from flashmoe_cupy import reference

Array = Any  # NumPy arrays; Any, so that dicts of arguments may be unpacked
Rng = np.random.Generator

# name -> (seqlen_q, seqlen_k, heads_q, heads_k, head_dim, head_dim_v, options); "arrays" lists the optional arguments
CASES: dict[str, tuple[int, int, int, int, int, int, dict[str, Any]]] = {
    "plain": (5, 7, 2, 2, 8, 8, {}),
    "one query": (1, 9, 4, 2, 8, 16, {"causal": True}),
    "causal, more keys": (4, 9, 2, 2, 8, 8, {"causal": True}),
    "causal, more queries": (9, 4, 2, 1, 8, 8, {"causal": True}),
    "window": (8, 8, 2, 2, 8, 8, {"window_size": (2, 1)}),
    "left window": (6, 9, 2, 2, 8, 8, {"window_size": (3, -1)}),
    "right window": (6, 9, 2, 2, 8, 8, {"window_size": (-1, 2)}),
    "causal window": (7, 9, 4, 2, 8, 8, {"window_size": (2, 5), "causal": True}),
    "window outside": (9, 3, 2, 2, 8, 8, {"window_size": (1, 0)}),
    "scale": (5, 7, 2, 2, 8, 8, {"softmax_scale": -0.3}),
    "scale 0": (5, 7, 2, 2, 8, 8, {"softmax_scale": 0.0}),
    "softcap": (5, 7, 2, 2, 8, 8, {"softcap": 0.8}),
    "alibi": (5, 7, 4, 2, 8, 8, {"arrays": ("alibi_h",), "causal": True}),
    "alibi per batch": (7, 5, 2, 2, 8, 8, {"arrays": ("alibi_bh",)}),
    "sinks": (5, 7, 4, 2, 8, 16, {"arrays": ("sinks",)}),
    "sinks, hidden rows": (9, 4, 2, 2, 8, 8, {"arrays": ("sinks",), "causal": True}),
    "bias": (5, 7, 2, 2, 8, 8, {"arrays": ("bias_bhqk",)}),
    "bias per head": (5, 7, 4, 2, 8, 8, {"arrays": ("bias_h1k",)}),
    "bias per key": (5, 7, 4, 2, 8, 8, {"arrays": ("bias_1k",)}),
    "bias, ones": (1, 7, 1, 1, 8, 8, {"arrays": ("bias_bh1k",)}),
    "bool bias": (5, 7, 2, 2, 8, 8, {"arrays": ("mask_b1qk",)}),
    "everything": (6, 9, 4, 2, 8, 16, {
        "arrays": ("sinks", "alibi_bh", "bias_1hqk"), "window_size": (4, 3), "causal": True, "softcap": 1.5,
        "softmax_scale": 0.7,
    }),
}  # fmt: skip
BATCH = 2


def make(case: str, rng: Rng) -> tuple[dict[str, Array], dict[str, Any]]:
    """Arrays (q, k, v and the optional ones by argument name, float64) and the other options of a case."""
    seqlen_q, seqlen_k, heads_q, heads_k, dim, dim_v, options = CASES[case]
    arrays = {
        "q": rng.standard_normal((BATCH, seqlen_q, heads_q, dim)),
        "k": rng.standard_normal((BATCH, seqlen_k, heads_k, dim)),
        "v": rng.standard_normal((BATCH, seqlen_k, heads_k, dim_v)),
    }
    size = {"b": BATCH, "h": heads_q, "q": seqlen_q, "k": seqlen_k, "1": 1}
    for spec in options.get("arrays", ()):
        kind, _, letters = spec.partition("_")
        if kind == "sinks":
            arrays["sinks"] = rng.standard_normal(heads_q)
        elif kind == "alibi":
            arrays["alibi_slopes"] = rng.random([size[c] for c in letters])
        elif kind == "bias":
            arrays["bias"] = rng.standard_normal([size[c] for c in letters])
        else:
            mask: Array = rng.random([size[c] for c in letters]) < 0.6
            arrays["bias"] = mask
    return arrays, {name: value for name, value in options.items() if name != "arrays"}


def visible_by_loop(
    seqlen_q: int, seqlen_k: int, causal: bool = False, window_size: tuple[int, int] = (-1, -1), **_: object
) -> Array:
    """The visibility rule, pair by pair, in the words of its definition."""
    seen: Array = np.zeros((seqlen_q, seqlen_k), bool)
    for i in range(seqlen_q):
        at = i + seqlen_k - seqlen_q  # the key at which query i stands
        for j in range(seqlen_k):
            after, before = j - at, at - j
            hidden = causal and after > 0
            hidden |= window_size[1] != -1 and after > window_size[1]
            hidden |= window_size[0] != -1 and before > window_size[0]
            seen[i, j] = not hidden
    return seen


def formula(xp: Any, arrays: dict[str, Any], options: dict[str, Any]) -> tuple[Any, Any]:
    """out and lse by the whole-matrix formula in torch or jax.numpy; used for their automatic gradients."""
    q, k, v = arrays["q"], arrays["k"], arrays["v"]
    (seqlen_q, heads_q, dim), (seqlen_k, heads_k) = q.shape[1:], k.shape[1:3]
    head_of = xp.arange(heads_q) // (heads_q // heads_k)
    x = xp.einsum("bihd,bjhd->bhij", q, k[:, :, head_of])
    scale = options.get("softmax_scale")
    x = x * (dim**-0.5 if scale is None else scale)
    if options.get("softcap"):
        x = options["softcap"] * xp.tanh(x / options["softcap"])
    if "alibi_slopes" in arrays:
        slopes = arrays["alibi_slopes"]
        slopes = slopes if slopes.ndim == 2 else slopes[None]
        away = xp.abs(xp.arange(seqlen_q)[:, None] + (seqlen_k - seqlen_q) - xp.arange(seqlen_k)[None])
        x = x - slopes[:, :, None, None] * away
    seen = xp.asarray(visible_by_loop(seqlen_q, seqlen_k, **options))
    bias = arrays.get("bias")
    if bias is not None and bias.dtype in (xp.bool, np.dtype(bool)):
        seen = seen & bias
    elif bias is not None:
        x = x + bias
    weights = xp.exp(x) * seen
    total = weights.sum(-1)
    if "sinks" in arrays:
        total = total + xp.exp(arrays["sinks"])[None, :, None]
    safe = xp.where(total > 0, total, xp.ones_like(total))
    out = xp.einsum("bhij,bjhd->bihd", weights / safe[..., None], v[:, :, head_of])
    return out, xp.where(total > 0, xp.log(safe), xp.full_like(total, -xp.inf))


def close(a: Array, b: Array, tol: float = 1e-12) -> None:
    np.testing.assert_allclose(np.asarray(a), np.asarray(b), rtol=tol, atol=tol)


# ---------------------------------------------------------------------------------------------- against other libraries


@pytest.mark.parametrize("case", CASES)
def test_forward_and_gradients_equal_torch(case: str, rng: Rng) -> None:
    torch = pytest.importorskip("torch")
    arrays, options = make(case, rng)
    tensors = {name: torch.tensor(a, requires_grad=a.dtype == np.float64) for name, a in arrays.items()}
    expected, expected_lse = formula(torch, tensors, options)
    out, lse = reference.flash_attention(**arrays, **options, return_lse=True)
    close(out, expected.detach())
    close(lse, expected_lse.detach())

    dout, dlse = rng.standard_normal(out.shape), rng.standard_normal(lse.shape)
    loss = (expected * torch.tensor(dout)).sum()
    loss = loss + (expected_lse * torch.tensor(dlse))[expected_lse > -torch.inf].sum()
    loss.backward()
    grads = reference.flash_attention_backward(dout, **arrays, **options, dlse=dlse)
    for name in ("q", "k", "v", "sinks", "bias"):
        grad = getattr(grads, "d" + name)
        if name in tensors and tensors[name].requires_grad:
            close(grad, tensors[name].grad, 1e-11)
        else:
            assert grad is None


@pytest.mark.parametrize("shape", [(5, 5, 2, 2), (7, 3, 4, 2), (3, 8, 6, 1), (1, 4, 2, 2)])
@pytest.mark.parametrize("kind", ["none", "causal", "mask", "bias"])
def test_forward_equals_torch_sdpa(shape: tuple[int, int, int, int], kind: str, rng: Rng) -> None:
    torch = pytest.importorskip("torch")
    seqlen_q, seqlen_k, heads_q, heads_k = shape
    q, k, v = (rng.standard_normal((2, *hs, 8)) for hs in ((heads_q, seqlen_q), *[(heads_k, seqlen_k)] * 2))
    mask: Array = None
    if kind == "causal":  # SDPA's own is_causal counts from the first key, so its mask is written out
        mask = np.tril(np.ones((seqlen_q, seqlen_k), bool), seqlen_k - seqlen_q)
    elif kind == "mask":
        mask = rng.random((2, 1, seqlen_q, seqlen_k)) < 0.7
    elif kind == "bias":
        mask = rng.standard_normal((heads_q, seqlen_q, seqlen_k))
    t = [torch.tensor(x) for x in (q, k, v)]
    # a mask of float64, since the rows that a bool mask hides whole are NaN in some versions of torch
    spread = None if mask is None else np.where(mask, 0.0, -np.inf) if mask.dtype == bool else mask
    m = None if spread is None else torch.tensor(np.broadcast_to(spread, (2, heads_q, seqlen_q, seqlen_k)).copy())
    expected = torch.nn.functional.scaled_dot_product_attention(*t, attn_mask=m, enable_gqa=True).numpy()
    if mask is not None and mask.dtype == bool:
        expected = np.where(mask.any(-1)[..., None], expected, 0.0)
    bias = None if kind == "causal" else mask
    close(reference.flash_attention(q, k, v, causal=kind == "causal", bias=bias, layout="bhsd"), expected)


@pytest.mark.parametrize("case", ["causal window", "everything", "sinks, hidden rows"])
def test_forward_and_gradients_equal_jax(case: str, rng: Rng) -> None:
    jax = pytest.importorskip("jax")
    arrays, options = make(case, rng)
    with jax.enable_x64(True):
        inputs = {name: jax.numpy.asarray(a) for name, a in arrays.items()}
        out = reference.flash_attention(**arrays, **options)
        dout = rng.standard_normal(out.shape)

        def run(a: Any, cotangent: Any) -> Any:
            out, pullback = jax.vjp(lambda a: formula(jax.numpy, a, options)[0], a)
            return out, *pullback(cotangent)

        expected, expected_grads = jax.jit(run)(inputs, jax.numpy.asarray(dout))
        close(out, expected)
        grads = reference.flash_attention_backward(dout, **arrays, **options)
        for name in arrays.keys() - {"alibi_slopes"}:
            close(getattr(grads, "d" + name), expected_grads[name], 1e-11)


@pytest.mark.parametrize(
    ("options", "theirs"),
    [
        ({}, {}),
        ({"causal": True}, {"is_causal": True}),
        ({"window_size": (2, 1)}, {"local_window_size": (2, 1)}),
        ({"window_size": (2, -1), "causal": True}, {"local_window_size": (2, 0)}),
        ({"softmax_scale": 0.4}, {"scale": 0.4}),
    ],
)
def test_forward_equals_jax_nn(options: dict[str, Any], theirs: dict[str, Any], rng: Rng) -> None:
    jax = pytest.importorskip("jax")
    q, k, v = (rng.standard_normal((2, 6, h, 8)) for h in (4, 2, 2))
    bias, mask = rng.standard_normal((1, 4, 6, 6)), rng.random((2, 1, 6, 6)) < 0.8
    mask |= np.eye(6, dtype=bool)  # every query keeps a key
    with jax.enable_x64(True):
        a = [jax.numpy.asarray(x) for x in (q, k, v)]
        for ours, name in ((bias, "bias"), (mask, "mask")):
            expected = jax.nn.dot_product_attention(*a, **theirs, **{name: jax.numpy.asarray(ours)})
            close(reference.flash_attention(q, k, v, **options, bias=ours), expected, 1e-6)  # JAX's softmax is float32


@pytest.mark.parametrize("case", CASES)
def test_gradients_equal_finite_differences(case: str, rng: Rng) -> None:
    arrays, options = make(case, rng)
    out, lse = reference.flash_attention(**arrays, **options, return_lse=True)
    dout, dlse = rng.standard_normal(out.shape), np.where(lse == -np.inf, 0.0, rng.standard_normal(lse.shape))
    grads = reference.flash_attention_backward(dout, **arrays, **options, out=out, lse=lse, dlse=dlse)

    def loss(changed: dict[str, Array]) -> float:
        o, s = reference.flash_attention(**changed, **options, return_lse=True)
        return float(np.sum(o * dout) + np.sum(np.where(s == -np.inf, 0.0, s) * dlse))

    step = 1e-5
    for name, a in arrays.items():
        grad = getattr(grads, "d" + name, None)
        if grad is None:
            continue
        direction = rng.standard_normal(a.shape)
        slope = (loss(arrays | {name: a + step * direction}) - loss(arrays | {name: a - step * direction})) / (2 * step)
        assert float(np.sum(grad * direction)) == pytest.approx(slope, rel=1e-7, abs=1e-8), name


# ----------------------------------------------------------------------------------------------------------- properties

Sizes = tuple[int, int, tuple[int, int], int]
SIZES = st.tuples(
    st.integers(1, 7), st.integers(1, 9), st.sampled_from([(1, 1), (2, 2), (4, 2), (3, 1)]), st.integers(0, 2**32 - 1)
)


def random_qkv(sizes: Sizes) -> tuple[Rng, Array, Array, Array]:
    seqlen_q, seqlen_k, (heads_q, heads_k), seed = sizes
    rng = np.random.default_rng(seed)
    q, k = rng.standard_normal((2, seqlen_q, heads_q, 8)), rng.standard_normal((2, seqlen_k, heads_k, 8))
    return rng, q, k, rng.standard_normal((2, seqlen_k, heads_k, 16))


@given(SIZES)
def test_order_of_keys_does_not_matter(sizes: Sizes) -> None:
    rng, q, k, v = random_qkv(sizes)
    bias = rng.standard_normal((2, q.shape[2], q.shape[1], k.shape[1]))
    order = rng.permutation(k.shape[1])
    out, lse = reference.flash_attention(q, k, v, bias=bias, softcap=2.0, return_lse=True)
    moved = reference.flash_attention(q, k[:, order], v[:, order], bias=bias[..., order], softcap=2.0, return_lse=True)
    close(moved[0], out)
    close(moved[1], lse)


@given(SIZES, st.floats(-50, 50))
def test_shift_of_all_scores_moves_only_lse(sizes: Sizes, shift: float) -> None:
    rng, q, k, v = random_qkv(sizes)
    out, lse = reference.flash_attention(q, k, v, causal=True, return_lse=True)
    bias = np.full((q.shape[1], k.shape[1]), shift)
    moved, moved_lse = reference.flash_attention(q, k, v, causal=True, bias=bias, return_lse=True)
    close(moved, out, 1e-11)
    close(moved_lse, lse + shift, 1e-11)
    # a vector added to every key shifts row i by softmax_scale * q_i . u
    u = rng.standard_normal(8)
    moved, moved_lse = reference.flash_attention(q, k + u, v, causal=True, return_lse=True)
    close(moved, out, 1e-11)
    close(moved_lse, lse + (8**-0.5 * (q @ u)).transpose(0, 2, 1), 1e-11)


@given(SIZES, st.floats(0, 1))
def test_parts_join_by_lse(sizes: Sizes, where: float) -> None:
    rng, q, k, v = random_qkv(sizes)
    sinks = rng.standard_normal(q.shape[2])
    bias = np.where(rng.random((1, 1, q.shape[1], k.shape[1])) < 0.8, 0.0, -np.inf)
    cut = round(where * k.shape[1])
    out, lse = reference.flash_attention(q, k, v, bias=bias, sinks=sinks, return_lse=True)
    first = reference.flash_attention(q, k[:, :cut], v[:, :cut], bias=bias[..., :cut], sinks=sinks, return_lse=True)
    second = reference.flash_attention(q, k[:, cut:], v[:, cut:], bias=bias[..., cut:], return_lse=True)
    joined = np.logaddexp(first[1], second[1])
    weights = [np.exp(part[1] - joined).transpose(0, 2, 1)[..., None] for part in (first, second)]
    close(weights[0] * first[0] + weights[1] * second[0], out)
    close(joined, lse)


@given(SIZES)
def test_constant_values_give_a_constant(sizes: Sizes) -> None:
    rng, q, k, v = random_qkv(sizes)
    out, lse = reference.flash_attention(q, k, np.full_like(v, 2.5), window_size=(1, 1), return_lse=True)
    rows = (lse > -np.inf).transpose(0, 2, 1)
    close(out, np.repeat(np.where(rows[..., None], 2.5, 0.0), 16, -1))
    sinks = rng.standard_normal(q.shape[2])  # a sink takes its share exp(sink - lse) and gives nothing
    out, lse = reference.flash_attention(q, k, np.ones_like(v), sinks=sinks, return_lse=True)
    close(out + np.exp(sinks - lse.transpose(0, 2, 1))[..., None], np.ones_like(out))


# ---------------------------------------------------------------------------------------------- masks, by hand and loop


def test_masks_by_hand() -> None:
    q, k = np.zeros((1, 2, 1, 8)), np.zeros((1, 4, 1, 8))
    v = np.eye(4, 8)[None, :, None]  # the output shows the weights
    out = reference.flash_attention(q, k, v, causal=True)[0, :, 0, :4]
    close(out, np.array([[1 / 3, 1 / 3, 1 / 3, 0], [1 / 4, 1 / 4, 1 / 4, 1 / 4]]))
    out = reference.flash_attention(q, k, v, window_size=(1, 0))[0, :, 0, :4]
    close(out, np.array([[0, 1, 1, 0], [0, 0, 1, 1]]) / 2)
    out = reference.flash_attention(q, k, v, sinks=np.log([2.0]))[0, :, 0, :4]
    close(out, np.full((2, 4), 1 / 6))
    slope = np.log([2.0])  # each step away halves the weight; query 0 stands at key 2
    out = reference.flash_attention(q, k, v, alibi_slopes=slope)[0, 0, 0, :4]
    close(out, np.array([1, 2, 4, 2]) / 9)


@given(st.integers(0, 9), st.integers(0, 9), st.integers(-1, 11), st.integers(-1, 11), st.booleans())
def test_masks_equal_their_definition(seqlen_q: int, seqlen_k: int, left: int, right: int, causal: bool) -> None:
    q, k = np.zeros((1, seqlen_q, 1, 8)), np.zeros((1, seqlen_k, 1, 8))
    v = np.eye(seqlen_k, 16)[None, :, None]
    out, lse = reference.flash_attention(q, k, v, causal=causal, window_size=(left, right), return_lse=True)
    seen = visible_by_loop(seqlen_q, seqlen_k, causal, (left, right))
    np.testing.assert_array_equal(out[0, :, 0, :seqlen_k] > 0, seen)
    np.testing.assert_array_equal(lse[0, 0] == -np.inf, ~seen.any(-1))


# --------------------------------------------------------------------------------------------------- packed sequences


def packed(rng: Rng) -> tuple[dict[str, Array], dict[str, Any], list[tuple[slice, slice]]]:
    """Packed arrays with idle rows in front, between and behind, their offsets, and the rows that count."""
    arrays = {
        "q": rng.standard_normal((20, 4, 8)),
        "k": rng.standard_normal((25, 2, 8)),
        "v": rng.standard_normal((25, 2, 16)),
        "sinks": rng.standard_normal(4),
        "alibi_slopes": rng.random((5, 4)),
    }
    offsets = {
        "cu_seqlens_q": np.array([1, 6, 6, 9, 16, 18], np.int32),
        "cu_seqlens_k": np.array([0, 8, 12, 12, 19, 23], np.int32),
        "seqused_q": np.array([3, 0, 3, 7, 1], np.int32),
        "seqused_k": np.array([8, 2, 0, 5, 4], np.int32),
        "max_seqlen_q": 7,
        "max_seqlen_k": 8,
    }
    used = [(1, 3, 0, 8), (6, 0, 8, 2), (6, 3, 12, 0), (9, 7, 12, 5), (16, 1, 19, 4)]
    return arrays, offsets, [(slice(a, a + n), slice(b, b + m)) for a, n, b, m in used]


@pytest.mark.parametrize("options", [{}, {"causal": True, "softcap": 1.0}, {"window_size": (2, 1)}], ids=str)
def test_varlen_equals_each_sequence_alone(options: dict[str, Any], rng: Rng) -> None:
    arrays, offsets, spans = packed(rng)
    sinks, slopes = arrays["sinks"], arrays["alibi_slopes"]
    out, lse = reference.flash_attention_varlen(**arrays, **offsets, **options, return_lse=True)
    dout, dlse = rng.standard_normal(out.shape), rng.standard_normal(lse.shape)
    grads = reference.flash_attention_varlen_backward(dout, **arrays, **offsets, **options, dlse=dlse)
    want = [np.zeros_like(out), np.full_like(lse, -np.inf)] + [np.zeros_like(arrays[name]) for name in "qkv"]
    dsinks = np.zeros(4)
    for b, (rows, keys) in enumerate(spans):
        one = {"q": arrays["q"][None, rows], "k": arrays["k"][None, keys], "v": arrays["v"][None, keys]}
        extra = {"sinks": sinks, "alibi_slopes": slopes[b], **options}
        out_b, lse_b = reference.flash_attention(**one, **extra, return_lse=True)
        want[0][rows], want[1][:, rows] = out_b[0], lse_b[0]
        part = reference.flash_attention_backward(dout[None, rows], **one, **extra, dlse=dlse[None, :, rows])
        want[2][rows], want[3][keys], want[4][keys] = part.dq[0], part.dk[0], part.dv[0]
        assert part.dsinks is not None
        dsinks += part.dsinks
    for a, b in zip((out, lse, *grads[:4]), (*want, dsinks), strict=True):
        assert a is not None
        close(a, b)
    assert grads.dbias is None


def test_varlen_ignores_rows_that_do_not_count(rng: Rng) -> None:
    arrays, offsets, spans = packed(rng)
    expected = reference.flash_attention_varlen(**arrays, **offsets, causal=True)
    for side, name in ((0, "q"), (1, "k"), (1, "v")):
        idle = np.ones(len(arrays[name]), bool)
        for span in spans:
            idle[span[side]] = False
        arrays[name][idle] = np.nan
    np.testing.assert_array_equal(reference.flash_attention_varlen(**arrays, **offsets, causal=True), expected)


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"cu_seqlens_q": np.array([0, 4, 3, 9, 16, 18], np.int32)}, "cu_seqlens_q"),
        ({"cu_seqlens_k": np.array([0, 8, 12, 12, 19, 26], np.int32)}, "cu_seqlens_k"),
        ({"seqused_k": np.array([9, 2, 0, 5, 4], np.int32)}, "seqused_k"),
        ({"seqused_q": np.array([3, 0, 3, 7], np.int32)}, "seqused_q"),
        ({"max_seqlen_k": 7}, "max_seqlen_k"),
        ({"cu_seqlens_q": np.array([0, 1], np.int32), "seqused_q": None}, "sequences"),
    ],
)
def test_varlen_refuses_wrong_offsets(change: dict[str, Any], word: str, rng: Rng) -> None:
    arrays, offsets, _ = packed(rng)
    with pytest.raises(ValueError, match=word):
        reference.flash_attention_varlen(**arrays, **(offsets | change))


# --------------------------------------------------------------------------------------------------- dtypes and corners


@pytest.mark.parametrize("dtype", [np.float64, np.float32, np.float16, ml_dtypes.bfloat16])
def test_any_float_dtype_counts_in_float64(dtype: Any, rng: Rng) -> None:
    arrays, options = make("everything", rng)
    low = {name: a.astype(dtype) for name, a in arrays.items()}
    exact = {name: a.astype(np.float64) for name, a in low.items()}
    results = [reference.flash_attention(**a, **options, return_lse=True) for a in (low, exact)]
    for a, b in zip(*results, strict=True):
        assert a.dtype == np.float64
        np.testing.assert_array_equal(a, b)
    dout = rng.standard_normal((BATCH, 6, 4, 16)).astype(dtype)
    for grad in reference.flash_attention_backward(dout, **low, **options):
        assert grad is not None and grad.dtype == np.float64


def test_layouts_agree(rng: Rng) -> None:
    arrays, options = make("everything", rng)
    swapped = arrays | {name: arrays[name].swapaxes(1, 2) for name in "qkv"}
    out, lse = reference.flash_attention(**arrays, **options, return_lse=True)
    out2, lse2 = reference.flash_attention(**swapped, **options, layout="bhsd", return_lse=True)
    np.testing.assert_array_equal(out2, out.swapaxes(1, 2))
    np.testing.assert_array_equal(lse2, lse)
    dout = rng.standard_normal(out.shape)
    grads = reference.flash_attention_backward(dout, **arrays, **options, out=out, lse=lse)
    swapped |= {"dout": dout.swapaxes(1, 2), "out": out2, "lse": lse2}
    grads2 = reference.flash_attention_backward(**swapped, **options, layout="bhsd")
    expected = [*(a.swapaxes(1, 2) for a in grads[:3]), *grads[3:]]
    for x, y in zip(grads2, expected, strict=True):
        assert x is not None and y is not None
        np.testing.assert_array_equal(x, y)


def test_backward_uses_the_given_out_and_lse(rng: Rng) -> None:
    arrays, options = make("plain", rng)
    out, lse = reference.flash_attention(**arrays, **options, return_lse=True)
    dout = rng.standard_normal(out.shape)
    base = reference.flash_attention_backward(dout, **arrays)
    # by Algorithm 2, P = exp(S - L): an L that is larger by log 2 halves P and with it dV
    close(reference.flash_attention_backward(dout, **arrays, out=out, lse=lse + np.log(2)).dv, base.dv / 2)
    assert not np.allclose(reference.flash_attention_backward(dout, **arrays, out=2 * out, lse=lse).dq, base.dq)


@pytest.mark.parametrize("shape", [(0, 3, 4, 2, 2), (2, 0, 4, 2, 2), (2, 3, 0, 2, 2), (2, 3, 4, 0, 0), (2, 0, 0, 2, 1)])
def test_empty_sizes(shape: tuple[int, int, int, int, int]) -> None:
    batch, seqlen_q, seqlen_k, heads_q, heads_k = shape
    q, k, v = np.ones((batch, seqlen_q, heads_q, 8)), *(np.ones((batch, seqlen_k, heads_k, 8)) for _ in "kv")
    out, lse = reference.flash_attention(q, k, v, causal=True, return_lse=True)
    assert out.shape == q.shape and lse.shape == (batch, heads_q, seqlen_q)
    grads = reference.flash_attention_backward(np.ones_like(out), q, k, v, causal=True)
    assert [g.shape for g in grads[:3]] == [q.shape, k.shape, v.shape]
    if seqlen_k == 0:
        assert not out.any() and np.all(lse == -np.inf)


def test_rows_without_keys(rng: Rng) -> None:
    q, k, v = (rng.standard_normal((1, s, 2, 8)) for s in (5, 3, 3))
    sinks = np.array([0.3, -np.inf])
    out, lse = reference.flash_attention(q, k, v, causal=True, sinks=sinks, return_lse=True)
    assert not out[:, :2].any() and np.isfinite(out).all()
    np.testing.assert_array_equal(lse[0, :, :2], np.repeat(sinks[:, None], 2, 1))
    close(out[:, :, 1], reference.flash_attention(q, k, v, causal=True)[:, :, 1])  # a sink of -inf is none
    grads = reference.flash_attention_backward(np.ones_like(out), q, k, v, causal=True, sinks=sinks)
    assert all(np.isfinite(g).all() for g in grads if g is not None)
    assert not grads.dq[:, :2].any()


@pytest.mark.parametrize("name", ["q", "k", "v", "dout"])
def test_nan_stays_where_it_is_seen(name: str, rng: Rng) -> None:
    arrays: dict[str, Array] = {n: rng.standard_normal((1, 6, 1, 8)) for n in ("q", "k", "v", "dout")}
    bias = rng.standard_normal((6, 6))
    clean = reference.flash_attention(*(arrays[n] for n in "qkv"), causal=True, bias=bias)
    arrays[name][0, 3] = np.nan
    out = reference.flash_attention(*(arrays[n] for n in "qkv"), causal=True, bias=bias)
    i = np.arange(6)
    rows = i == 3 if name in ("q", "dout") else i >= 3  # the queries that see it
    keys = i <= 3 if name in ("q", "dout") else i >= 0  # the keys that those queries see
    nan = np.isnan(out)[0, :, 0].any(-1)
    np.testing.assert_array_equal(nan, rows & (name != "dout"))
    np.testing.assert_array_equal(out[0, ~nan], clean[0, ~nan])
    grads = reference.flash_attention_backward(**arrays, causal=True, bias=bias)
    for grad, hit in ((grads.dq, rows), (grads.dk, keys), (grads.dv, keys & (name != "v"))):
        np.testing.assert_array_equal(np.isnan(grad)[0, :, 0].any(-1), hit)
    assert grads.dbias is not None
    np.testing.assert_array_equal(np.isnan(grads.dbias), np.tril(np.ones((6, 6), bool)) & rows[:, None])


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"layout": "bsdh"}, "layout"),
        ({"window_size": (-2, 0)}, "window_size"),
        ({"softcap": -1.0}, "softcap"),
        ({"softmax_scale": np.inf}, "softmax_scale"),
        ({"k": np.ones((2, 4, 3, 8))}, "fit together"),
        ({"q": np.ones((2, 3, 3, 8))}, "multiple"),
        ({"q": np.ones((3, 2, 8))}, "4 dimensions"),
        ({"bias": np.ones(4)}, "bias"),
    ],
)
def test_wrong_arguments_are_refused(change: dict[str, Any], word: str) -> None:
    arguments: dict[str, Any] = {"q": np.ones((2, 3, 4, 8)), "k": np.ones((2, 4, 2, 8)), "v": np.ones((2, 4, 2, 8))}
    with pytest.raises(ValueError, match=word):
        reference.flash_attention(**(arguments | change))
