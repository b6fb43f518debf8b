"""The gradient on the NumPy back end against the float64 reference, over sizes, features, dtypes and hostile values."""

from __future__ import annotations

import itertools
import tracemalloc
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from flashmoe_cupy import reference
from flashmoe_cupy.arrays import view
from flashmoe_cupy.cpu import attention as forward
from flashmoe_cupy.cpu import attention_backward as module
from flashmoe_cupy.cpu import threads, tile
from flashmoe_cupy.cpu.attention_backward import attention_backward
from flashmoe_cupy.errors import UnsupportedProblem
from flashmoe_cupy.plan.attention.problem import attention_problem, varlen_problem
from flashmoe_cupy.testing import AttentionCase, Case, VarlenCase, error_rule

Array = Any  # NumPy arrays; Any, so that dicts of arguments may be unpacked

SPECIAL = 77.0  # what gradients hold before the call in rows that do not count; the others hold NaN
NAMES = {"dq": "q", "dk": "k", "dv": "v", "dsinks": "sinks", "dbias": "bias"}  # each gradient, and of what it is one


class Call(NamedTuple):
    """The arguments of a call of attention_backward, but for the gradients."""

    problem: Any
    positional: tuple[Array, Array, Array, Array, Array, Array]  # dout, q, k, v, out, lse
    optional: dict[str, Array]
    dlse: Array | None

    def run(self, grads: dict[str, Array]) -> dict[str, Array]:
        function: Any = attention_backward
        function(self.problem, *self.positional, dlse=self.dlse, **grads, **self.optional)
        return grads


def prepared(case: Case, arrays: dict[str, Array], dout: Array | None = None) -> Call:
    """Run the forward. Rows that do not count are NaN in everything but the gradients."""
    rng = np.random.default_rng(7)
    packed = isinstance(case, VarlenCase)
    make: Any = varlen_problem if packed else attention_problem
    problem = make(**{name: view(a, name) for name, a in arrays.items()}, **case.options())
    inputs = dict(arrays)
    q, k, v = (inputs.pop(name) for name in "qkv")
    out: Array = np.full((*q.shape[:-1], v.shape[-1]), np.nan, q.dtype)
    lse: Array = np.full((q.shape[1::-1] if packed else (q.shape[0], q.shape[2], q.shape[1])), np.nan, np.float32)
    forward.attention(problem, q, k, v, out, lse, **inputs)
    if dout is None:
        dout = rng.standard_normal(out.shape).astype(q.dtype)
        dout[~counted(case, "q")] = np.nan
    dlse: Array = rng.standard_normal(lse.shape, np.float32)
    dlse.swapaxes(-1, -2)[~counted(case, "q")] = np.nan
    return Call(problem, (dout, q, k, v, out, lse), inputs, dlse)


def counted(case: Case, which: str) -> Array:
    """Which rows of q, or of k, count: (batch, seqlen) or (total,)."""
    if isinstance(case, VarlenCase):
        lengths, tail = (case.lengths_q, case.tail_q) if which == "q" else (case.lengths_k, case.tail_k)
        rows = np.zeros(sum(lengths) + tail, bool)
        for start, stop in case.spans(which):
            rows[start:stop] = True
        return rows
    rows = np.zeros((case.batch, case.seqlen_q if which == "q" else case.seqlen_k), bool)
    for one, (start, stop) in zip(rows, case.spans(which), strict=True):
        one[start:stop] = True
    return rows


def blank(case: Case, arrays: dict[str, Array]) -> dict[str, Array]:
    """Arrays for all gradients: NaN, and SPECIAL in rows that do not count."""
    grads = {name: np.full_like(arrays[of], np.nan) for name, of in NAMES.items() if of in arrays and
             arrays[of].dtype != np.bool_}  # fmt: skip
    for name in ("dq", "dk", "dv"):
        grads[name][~counted(case, "q" if name == "dq" else "k")] = SPECIAL
    return grads


def truth(case: Case, arrays: dict[str, Array], call: Call, own: bool = False) -> dict[str, Array]:
    """The gradients in float64, with out and lse of its own or, if `own`, with those of the call."""
    function: Any = reference.flash_attention_backward
    if isinstance(case, VarlenCase):
        function = reference.flash_attention_varlen_backward
    dout, _, _, _, out, lse = call.positional
    given = {"out": out, "lse": lse} if own else {}
    grads: dict[str, Array] = function(dout, **arrays, **case.options(), dlse=call.dlse, **given)._asdict()
    return grads


def naive(case: Case, arrays: dict[str, Array], call: Call) -> dict[str, Array]:
    """The gradients by the same formulas with every matrix rounded to the dtype of q, as a plain framework has them."""
    dtype, options = arrays["q"].dtype, case.options()

    def low(x: Array) -> Array:
        return x.astype(dtype).astype(np.float32)

    packed = isinstance(case, VarlenCase)
    given = {n: np.asarray(a, np.float32) for n, a in arrays.items() if n in ("q", "k", "v", "sinks", "alibi_slopes")}
    dout, dlse = call.positional[0].astype(np.float32), call.dlse
    q, k, v, dout = (a[None] if packed else a for a in (given["q"], given["k"], given["v"], dout))
    dlse = dlse[None] if packed and dlse is not None else dlse
    heads, group = q.shape[2], q.shape[2] // k.shape[2]
    full: Array = (q.shape[0], heads, q.shape[1], k.shape[1])
    bias = np.broadcast_to(arrays["bias"], full) if "bias" in arrays else None
    dq, dk, dv, dsinks = np.zeros_like(q), np.zeros_like(k), np.zeros_like(v), np.zeros(heads, np.float32)
    dbias = np.zeros(full if bias is not None else 0, np.float32)
    scale = q.shape[3] ** -0.5 if options["softmax_scale"] is None else options["softmax_scale"]
    left, right = options["window_size"]
    right = 0 if options["causal"] else right
    for n, spans in enumerate(zip(case.spans("q"), case.spans("k"), strict=True)):
        b, rows, keys = 0 if packed else n, slice(*spans[0]), slice(*spans[1])
        x = np.arange(rows.stop - rows.start)[:, None] + (keys.stop - keys.start) - (rows.stop - rows.start)
        x = x - np.arange(keys.stop - keys.start)
        seen = ((right < 0) | (-x <= right)) & ((left < 0) | (x <= left))
        for h in range(heads):
            own_q, own_k, own_v = q[b, rows, h], k[b, keys, h // group], v[b, keys, h // group]
            s, slope, keep = low(low(own_q @ own_k.T) * scale), np.float32(1.0), seen
            if options["softcap"]:
                s = low(np.tanh(low(s / options["softcap"])))
                s, slope = low(options["softcap"] * s), low(1 - low(s * s))
            if "alibi_slopes" in given:
                s = low(s - np.broadcast_to(given["alibi_slopes"], (len(case.spans("q")), heads))[n, h] * np.abs(x))
            if bias is not None:
                one = bias[b, h, rows, keys]
                keep = seen & one if one.dtype == np.bool_ else seen
                s = s if one.dtype == np.bool_ else low(s + one.astype(np.float32))
            s = np.where(keep, s, -np.inf)
            sink = given["sinks"][h] if "sinks" in given else -np.inf
            m = np.maximum(s.max(axis=1, initial=-np.inf), sink)[:, None]
            m = np.where(m == -np.inf, 0.0, m)
            total = np.exp(s - m).sum(axis=1, keepdims=True) + np.exp(sink - m)
            total[total == 0] = 1
            p, p_sink = low(np.exp(s - m) / total), low(np.exp(sink - m) / total)[:, 0]
            own = dout[b, rows, h]
            delta = low((own * low(p @ own_v)).sum(axis=1)) - (0 if dlse is None else dlse[b, h, rows])
            ds = low(p * (low(own @ own_v.T) - delta[:, None]))
            if bias is not None:
                dbias[b, h, rows, keys] = ds
            ds = low(ds * slope)
            dq[b, rows, h] = scale * (ds @ own_k)
            dk[b, keys, h // group] += low(scale * (ds.T @ own_q))
            dv[b, keys, h // group] += low(p.T @ own)
            dsinks[h] -= (p_sink * delta).sum()
    grads = {"dq": dq[0] if packed else dq, "dk": dk[0] if packed else dk, "dv": dv[0] if packed else dv}
    if bias is not None:
        shape = arrays["bias"].shape
        dbias = dbias.sum(axis=tuple(range(4 - len(shape))))
        dbias = dbias.sum(axis=tuple(a for a, n in enumerate(shape) if n == 1), keepdims=True)
    grads |= {"dsinks": dsinks, "dbias": dbias}
    return {name: grads[name].astype(arrays[of].dtype) for name, of in NAMES.items() if of in arrays}


def check(case: Case, arrays: dict[str, Array], call: Call, grads: dict[str, Array]) -> None:
    """float32: rtol 1e-4, and beside the largest value 1e-5, as products cancel. 16 bits: FlashAttention's rule.

    dsinks and dbias may have few elements, so that the naive evaluation comes near by luck. They are held to the truth
    of the out and lse that the call was given, whose rounding then is not theirs.
    """
    ref = truth(case, arrays, call)
    own = truth(case, arrays, call, own=True) if "dsinks" in grads or "dbias" in grads else ref
    rough: dict[str, Array] = {} if case.dtype == "float32" else naive(case, arrays, call)
    for name, grad in grads.items():
        want = ref[name] if name in ("dq", "dk", "dv") else own[name]
        if name in ("dq", "dk", "dv"):
            rows = counted(case, "q" if name == "dq" else "k")
            assert np.all(grad[~rows] == SPECIAL)
            grad, want = grad[rows], want[rows]
            rough = rough | ({name: rough[name][rows]} if rough else {})
        assert grad.shape == want.shape, name
        if grad.dtype == np.float32:
            atol = 1e-5 * max(1.0, np.abs(want).max(initial=0.0))
            np.testing.assert_allclose(grad, want, rtol=1e-4, atol=atol, err_msg=name)
        else:
            verdict = error_rule(grad, want, rough[name], softcap=case.softcap)
            assert verdict, (name, verdict.text)


def check_case(case: Case, seed: int = 0) -> None:
    arrays: dict[str, Array] = case.random(seed)
    call = prepared(case, arrays)
    check(case, arrays, call, call.run(blank(case, arrays)))


def same(a: dict[str, Array], b: dict[str, Array]) -> None:
    for name in a:
        assert a[name].tobytes() == b[name].tobytes(), name


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
