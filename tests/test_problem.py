"""Problems: what a call means, and every reason why one cannot run."""

from __future__ import annotations

import itertools
import math
import pickle
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from flashmoe_cupy import flash_attention
from flashmoe_cupy.arrays import View
from flashmoe_cupy.dtypes import BF16, BOOL, FP8_E4M3, FP16, FP32, FP64, INT32, INT64, DType
from flashmoe_cupy.errors import UnsupportedProblem
from flashmoe_cupy.plan.attention.problem import AttentionProblem, attention_problem, varlen_problem

_addresses = itertools.count(1 << 30, 1 << 30)


def array(*shape: int, dtype: DType = BF16, strides: tuple[int, ...] | None = None, **fields: Any) -> View:
    """The view of an array that does not exist, each at an address of its own."""
    if strides is None:
        strides = tuple(math.prod(shape[i + 1 :]) for i in range(len(shape)))
    base: dict[str, Any] = {"ptr": next(_addresses), "device": 0, "library": "cupy", "readonly": False, "owner": None}
    return View(shape=shape, strides=strides, dtype=dtype, **(base | fields))


def dense(**change: Any) -> AttentionProblem:
    """batch 2, q 5, k 7, heads 4/2, dims 64/32, with changes."""
    given: dict[str, Any] = {"q": array(2, 5, 4, 64), "k": array(2, 7, 2, 64), "v": array(2, 7, 2, 32)} | change
    return attention_problem(given.pop("q"), given.pop("k"), given.pop("v"), **given)


def packed(**change: Any) -> AttentionProblem:
    """3 sequences, 12 and 20 rows in all, heads 4/2, dims 64/32, with changes."""
    given: dict[str, Any] = {
        "q": array(12, 4, 64), "k": array(20, 2, 64), "v": array(20, 2, 32),
        "cu_seqlens_q": array(4, dtype=INT32), "cu_seqlens_k": array(4, dtype=INT32),
        "max_seqlen_q": 6, "max_seqlen_k": 9,
    } | change  # fmt: skip
    return varlen_problem(given.pop("q"), given.pop("k"), given.pop("v"), **given)


def refused(call: Callable[..., AttentionProblem], **change: Any) -> UnsupportedProblem:
    with pytest.raises(UnsupportedProblem) as caught:
        call(**change)
    return caught.value


# ---------------------------------------------------------------------------------------------------------------------
# what a problem holds


def test_dense_fields() -> None:
    p = dense()
    assert (p.dtype, p.batch, p.heads_q, p.heads_k, p.seqlen_q, p.seqlen_k) == (BF16, 2, 4, 2, 5, 7)
    assert (p.head_dim, p.head_dim_v, p.softmax_scale, p.softcap) == (64, 32, 64**-0.5, 0.0)
    assert (p.q_strides, p.k_strides, p.v_strides) == ((1280, 256, 64), (896, 128, 64), (448, 64, 32))
    assert (p.out_strides, p.lse_strides) == ((640, 128, 32), (20, 5))
    assert (p.causal, p.window_left, p.window_right) == (False, -1, -1)
    assert (p.alibi, p.bias_dtype, p.sinks_dtype) == (0, None, None)
    assert (p.varlen, p.total_q, p.total_k, p.lengths, p.even) == (False, 10, 14, (), True)
    assert p.describe() == "attention bf16 b2 q5 k7 h4/2 d64/32"


def test_heads_first_layout() -> None:
    p = dense(q=array(2, 4, 5, 64), k=array(2, 2, 7, 64), v=array(2, 2, 7, 32), layout="bhsd")
    assert (p.heads_q, p.heads_k, p.seqlen_q, p.seqlen_k) == (4, 2, 5, 7)
    assert (p.q_strides, p.k_strides, p.v_strides) == ((1280, 64, 320), (896, 64, 448), (448, 32, 224))
    assert (p.out_strides, p.lse_strides) == ((640, 32, 160), (20, 5))


def test_out_gives_its_strides() -> None:
    assert dense(out=array(2, 5, 4, 32, strides=(9000, 1000, 40, 1))).out_strides == (9000, 1000, 40)
    q, k, v = array(2, 4, 5, 64), array(2, 2, 7, 64), array(2, 2, 7, 32)
    out = array(2, 4, 5, 32, strides=(9000, 40, 1000, 1))
    assert dense(q=q, k=k, v=v, out=out, layout="bhsd").out_strides == (9000, 1000, 40)
    assert packed(out=array(12, 4, 32, strides=(1000, 40, 1))).out_strides == (0, 1000, 40)


def test_varlen_fields() -> None:
    used = array(3, dtype=INT32)
    p = packed(seqused_k=used, alibi_slopes=array(3, 4, dtype=FP32), sinks=array(4, dtype=BF16), causal=True)
    assert (p.varlen, p.batch, p.total_q, p.total_k, p.seqlen_q, p.seqlen_k) == (True, 3, 12, 20, 6, 9)
    assert (p.q_strides, p.k_strides, p.v_strides) == ((0, 256, 64), (0, 128, 64), (0, 64, 32))
    assert (p.out_strides, p.lse_strides) == ((0, 128, 32), (0, 12))
    assert (p.lengths, p.even, p.alibi, p.alibi_stride_b, p.sinks_dtype) == (("seqused_k",), False, 2, 4, BF16)
    assert p.describe() == "attention varlen bf16 b3 q6 k9 h4/2 d64/32 total12/20 causal alibi-per-batch sinks seqused"
    assert packed(seqused_q=used).lengths == ("seqused_q",)


@pytest.mark.parametrize(
    ("causal", "window", "want"),
    [
        (False, (-1, -1), (-1, -1)),
        (True, (-1, -1), (-1, 0)),
        (True, (3, 5), (3, 0)),
        (False, (3, 5), (3, 5)),
        (False, [0, 0], (0, 0)),
        (np.True_, (np.int64(8), np.int32(-1)), (8, 0)),
    ],
)
def test_window_folds_with_causal(causal: Any, window: Any, want: tuple[int, int]) -> None:
    p = dense(causal=causal, window_size=window)
    assert (p.window_left, p.window_right) == want
    assert p.causal is bool(causal)
    assert type(p.window_left) is int


@pytest.mark.parametrize("value", [np.float32(0.5), np.float16(0.5), 0.5, np.float64(0.5)])
def test_numpy_scalars(value: Any) -> None:
    p = dense(softmax_scale=value, softcap=value)
    assert (p.softmax_scale, p.softcap) == (0.5, 0.5)
    assert type(p.softmax_scale) is float and type(p.softcap) is float
    assert dense(softmax_scale=0).softmax_scale == 0.0
    assert dense(softmax_scale=-2).softmax_scale == -2.0
    assert dense(softcap=np.int64(30)).softcap == 30.0
    assert packed(max_seqlen_q=np.int32(6), max_seqlen_k=np.int64(9)).seqlen_q == 6


def test_key_does_not_know_addresses() -> None:
    """Equal layouts are one problem, so that what was decided for it is found again."""
    assert dense() == dense() and hash(dense()) == hash(dense())
    assert len({dense(), dense(), dense(causal=True), packed(), packed()}) == 3
    assert pickle.loads(pickle.dumps(dense(bias=array(5, 7)))) == dense(bias=array(5, 7))


def test_empty_sizes() -> None:
    for b, sq, sk, hq, hk in ((0, 5, 7, 4, 2), (2, 0, 7, 4, 2), (2, 5, 0, 4, 2), (2, 5, 7, 0, 0), (2, 5, 7, 0, 2)):
        q, k, v, out = array(b, sq, hq, 64), array(b, sk, hk, 64), array(b, sk, hk, 32), array(b, sq, hq, 32)
        p = dense(q=q, k=k, v=v, out=out)
        assert (p.batch, p.seqlen_q, p.seqlen_k, p.heads_q, p.heads_k) == (b, sq, sk, hq, hk)
    none = array(1, dtype=INT32)
    p = packed(q=array(0, 4, 64), cu_seqlens_q=none, cu_seqlens_k=none, max_seqlen_q=0)
    assert (p.batch, p.total_q, p.seqlen_q) == (0, 0, 0)


def test_strides_of_empty_and_single_dimensions_do_not_matter() -> None:
    dense(q=array(0, 5, 4, 64, strides=(0, 0, 0, 0)), k=array(0, 7, 2, 64), v=array(0, 7, 2, 32))
    packed(cu_seqlens_q=array(1, dtype=INT32, strides=(9,)), cu_seqlens_k=array(1, dtype=INT32, strides=(0,)))


def test_describe() -> None:
    base = {"q": array(2, 4096, 32, 128), "k": array(2, 4096, 8, 128), "v": array(2, 4096, 8, 128)}
    assert dense(**base, causal=True).describe() == "attention bf16 b2 q4096 k4096 h32/8 d128 causal"
    p = dense(window_size=(4, 1), softcap=30.0, alibi_slopes=array(4, dtype=FP32), bias=array(5, 7, dtype=BOOL))
    assert p.describe() == "attention bf16 b2 q5 k7 h4/2 d64/32 window(4,1) softcap30 alibi bias-bool"
    assert dense(causal=True, window_size=(4, 9)).describe().endswith("causal window(4,0)")


# ---------------------------------------------------------------------------------------------------------------------
# bias and out against brute force


@given(st.data())
def test_bias_strides_are_numpy_broadcasting(data: st.DataObject) -> None:
    full = (2, 4, 5, 7)
    rank = data.draw(st.integers(2, 4))
    shape = tuple(n if data.draw(st.booleans()) else 1 for n in full[-rank:])
    order = data.draw(st.permutations(range(rank)))
    x = np.zeros([shape[i] for i in order], np.float32).transpose(np.argsort(order))
    assert x.shape == shape
    strides = tuple(t // 4 for t in x.strides)
    p = dense(bias=array(*shape, dtype=FP32, strides=strides))
    assert p.bias_strides == tuple(t // 4 for t in np.broadcast_to(x, full).strides)
    assert p.bias_dtype is FP32


@given(
    st.tuples(*[st.integers(1, 3)] * 3),
    st.tuples(*[st.sampled_from([0, 1, 7, 8, 9, 16, 24, 48, 72, -8, -16, -48])] * 3),
)
def test_out_never_overlaps_itself(sizes: tuple[int, int, int], strides: tuple[int, int, int]) -> None:
    """What is accepted has one address per element; what is a plain permutation of packed memory is accepted."""
    b, s, h = sizes
    shape, steps = (b, s, h, 8), (*strides, 1)
    places = [sum(i * t for i, t in zip(index, steps, strict=True)) for index in np.ndindex(shape)]
    q, kv = array(b, s, h, 64), array(b, 7, h, 64)
    change = {"q": q, "k": kv, "v": array(b, 7, h, 8), "out": array(*shape, strides=steps)}
    if len(set(places)) < len(places):
        assert any("overlap" in reason for reason in refused(dense, **change).reasons)
    elif sorted(places) == list(range(min(places), max(places) + 1)):
        assert dense(**change).out_strides == strides


# ---------------------------------------------------------------------------------------------------------------------
# reasons: (name, changes, what the single reason says)

# fmt: off
CPU: dict[str, Any] = {"device": -1, "library": "numpy"}
ONE_REASON: list[tuple[str, dict[str, Any], tuple[str, ...]]] = [
    ("rank of q", {"q": array(5, 4, 64)}, ("q must have 4 dimensions", "(5, 4, 64)")),
    ("rank zero", {"v": array()}, ("v must have 4 dimensions", "()")),
    ("batch", {"k": array(3, 7, 2, 64)}, ("batch sizes differ", "q has 2", "k has 3", "v has 2")),
    ("lengths", {"v": array(2, 8, 2, 32)}, ("sequence length", "k has 7", "v has 8")),
    ("heads of v", {"v": array(2, 7, 1, 32)}, ("k and v differ in heads", "k has 2", "v has 1")),
    ("heads divide", {"q": array(2, 5, 3, 64)}, ("3 heads", "not a multiple", "2 heads of k")),
    ("no keys' heads", {"k": array(2, 7, 0, 64), "v": array(2, 7, 0, 32)}, ("4 heads", "the 0 heads of k")),
    ("head_dim differs", {"k": array(2, 7, 2, 32)}, ("q and k differ in head_dim", "q has 64", "k has 32")),
    ("head_dim 4", {"q": array(2, 5, 4, 4), "k": array(2, 7, 2, 4)},
     ("head_dim is 4", "8 to 256", "zeros to 8", "4 ** -0.5")),
    ("head_dim 20", {"q": array(2, 5, 4, 20), "k": array(2, 7, 2, 20)}, ("is 20", "zeros to 24", "20 ** -0.5")),
    ("head_dim 264", {"q": array(2, 5, 4, 264), "k": array(2, 7, 2, 264)}, ("head_dim is 264", "8 to 256")),
    ("head_dim 0", {"q": array(2, 5, 4, 0), "k": array(2, 7, 2, 0)}, ("head_dim is 0",)),
    ("head_dim_v 520", {"v": array(2, 7, 2, 520)}, ("head_dim_v is 520", "8 to 512")),
    ("head_dim_v 12", {"v": array(2, 7, 2, 12)}, ("head_dim_v is 12", "pad v with zeros to 16")),
    ("int", {"q": array(2, 5, 4, 64, dtype=INT32)}, ("q has dtype int32", "q.astype(cupy.float32)")),
    ("float64", {"k": array(2, 7, 2, 64, dtype=FP64)}, ("k has dtype float64", "k.astype(cupy.float32)")),
    ("float8", {"v": array(2, 7, 2, 32, dtype=FP8_E4M3)}, ("v has dtype float8_e4m3fn", "float16 or float32")),
    ("dtypes differ", {"k": array(2, 7, 2, 64, dtype=FP16)}, ("dtypes differ", "q is bfloat16", "k is float16")),
    ("q strided", {"q": array(2, 5, 4, 64, strides=(2560, 512, 128, 2))}, ("last dimension of q", "stride is 2")),
    ("k reversed", {"k": array(2, 7, 2, 64, strides=(896, 128, 64, -1))}, ("last dimension of k", "stride is -1")),
    ("device", {"k": array(2, 7, 2, 64, device=1)}, ("one device", "q is", "on cuda:0", "k is", "on cuda:1", "v is")),
    ("library", {"sinks": array(4, library="torch", owner=np.zeros(1))},
     ("one library", "sinks is numpy.ndarray on cuda:0")),
    ("cpu bias", {"bias": array(5, 7, **CPU)}, ("one device", "bias is ", "on the CPU")),
    ("layout", {"layout": "sbhd"}, ("layout is 'sbhd'", "'bshd'", "'bhsd'")),
    ("layout none", {"layout": None}, ("layout is None",)),
    ("window below -1", {"window_size": (-2, 0)}, ("window_size", "(-2, 0)")),
    ("window of floats", {"window_size": (1.0, 0)}, ("window_size", "two ints")),
    ("window of bools", {"window_size": (True, False)}, ("window_size", "(True, False)")),
    ("window int", {"window_size": 3}, ("window_size", "but is 3")),
    ("window of three", {"window_size": (1, 2, 3)}, ("window_size", "(1, 2, 3)")),
    ("window array", {"window_size": np.zeros(2)}, ("window_size", "numpy.ndarray")),
    ("scale nan", {"softmax_scale": math.nan}, ("softmax_scale", "nan")),
    ("scale inf", {"softmax_scale": -math.inf}, ("softmax_scale", "-inf")),
    ("scale beyond float32", {"softmax_scale": 1e39}, ("softmax_scale", "float32", "1e+39")),
    ("scale huge int", {"softmax_scale": 10**400}, ("softmax_scale",)),
    ("scale text", {"softmax_scale": "0.5"}, ("softmax_scale", "'0.5'")),
    ("scale bool", {"softmax_scale": True}, ("softmax_scale", "True")),
    ("scale array", {"softmax_scale": np.ones(())}, ("softmax_scale", "numpy.ndarray")),
    ("softcap negative", {"softcap": -1.0}, ("softcap", "-1.0")),
    ("softcap nan", {"softcap": np.float32("nan")}, ("softcap", "nan")),
    ("softcap inf", {"softcap": math.inf}, ("softcap", "inf")),
    ("softcap none", {"softcap": None}, ("softcap", "None")),
    ("softcap subnormal", {"softcap": 1e-40}, ("softcap", "1e-40")),
    ("causal text", {"causal": "False"}, ("causal must be a bool", "'False'")),
    ("causal int", {"causal": 1}, ("causal must be a bool", "but is 1")),
    ("bias rank", {"bias": array(7)}, ("bias must have 2 to 4 dimensions", "(2, 4, 5, 7)", "(7,)")),
    ("bias shape", {"bias": array(2, 1, 5, 8)}, ("broadcast to (2, 4, 5, 7)", "(2, 1, 5, 8)")),
    ("bias dtype", {"bias": array(5, 7, dtype=FP16)}, ("has dtype float16", "bool, float32 or q's dtype bfloat16")),
    ("alibi dtype", {"alibi_slopes": array(4)}, ("alibi_slopes has dtype bfloat16", "float32")),
    ("alibi shape", {"alibi_slopes": array(2, dtype=FP32)}, ("alibi_slopes", "(4,) or (2, 4)", "(2,)")),
    ("alibi rank", {"alibi_slopes": array(2, 4, 1, dtype=FP32)}, ("alibi_slopes", "(2, 4, 1)")),
    ("alibi batch", {"alibi_slopes": array(1, 4, dtype=FP32)}, ("alibi_slopes", "(2, 4)", "(1, 4)")),
    ("alibi strided", {"alibi_slopes": array(4, dtype=FP32, strides=(2,))}, ("of alibi_slopes", "stride is 2")),
    ("sinks shape", {"sinks": array(2, dtype=FP32)}, ("sinks must have shape (4,)", "(2,)")),
    ("sinks rank", {"sinks": array(4, 1, dtype=FP32)}, ("sinks must have shape (4,)", "(4, 1)")),
    ("sinks dtype", {"sinks": array(4, dtype=FP64)}, ("sinks has dtype float64", "float32 or q's dtype bfloat16")),
    ("sinks strided", {"sinks": array(4, strides=(0,))}, ("last dimension of sinks", "stride is 0")),
    ("out shape", {"out": array(2, 5, 4, 64)}, ("out must have shape (2, 5, 4, 32)", "(2, 5, 4, 64)")),
    ("out rank", {"out": array(5, 4, 32)}, ("out must have shape (2, 5, 4, 32)", "(5, 4, 32)")),
    ("out dtype", {"out": array(2, 5, 4, 32, dtype=FP32)}, ("out must have q's dtype bfloat16", "float32")),
    ("out library", {"out": array(2, 5, 4, 32, library="torch")}, ("one library", "out is ")),
    ("out read-only", {"out": array(2, 5, 4, 32, readonly=True)}, ("out is read-only",)),
    ("out broadcast", {"out": array(2, 5, 4, 32, strides=(0, 128, 32, 1))}, ("out overlap", "(0, 128, 32, 1)")),
    ("out strided", {"out": array(2, 5, 4, 32, strides=(1280, 256, 64, 2))}, ("last dimension of out", "stride is 2")),
]
# fmt: on


@pytest.mark.parametrize(("change", "texts"), [row[1:] for row in ONE_REASON], ids=[row[0] for row in ONE_REASON])
def test_one_reason(change: dict[str, Any], texts: tuple[str, ...]) -> None:
    error = refused(dense, **change)
    assert len(error.reasons) == 1, error.reasons
    assert all(text in error.reasons[0] for text in texts), error.reasons
    assert "flash_attention(q=" in error.asked and error.hint


# fmt: off
VARLEN_REASON: list[tuple[str, dict[str, Any], tuple[str, ...]]] = [
    ("rank", {"q": array(1, 12, 4, 64)}, ("q must have 3 dimensions", "(1, 12, 4, 64)")),
    ("rows", {"v": array(19, 2, 32)}, ("number of rows", "k has 20", "v has 19")),
    ("heads", {"q": array(12, 5, 64)}, ("5 heads", "not a multiple")),
    ("cu int64", {"cu_seqlens_q": array(4, dtype=INT64)}, ("cu_seqlens_q has dtype int64", "astype(cupy.int32)")),
    ("cu device", {"cu_seqlens_k": array(4, dtype=INT32, **CPU)}, ("one device", "cu_seqlens_k is ", "on the CPU")),
    ("cu lengths", {"cu_seqlens_k": array(5, dtype=INT32)}, ("(batch + 1,)", "(4,) and (5,)")),
    ("cu rank", dict.fromkeys(("cu_seqlens_q", "cu_seqlens_k"), array(4, 1, dtype=INT32)), ("(batch + 1,)", "(4, 1)")),
    ("cu empty", dict.fromkeys(("cu_seqlens_q", "cu_seqlens_k"), array(0, dtype=INT32)), ("(batch + 1,)", "(0,)")),
    ("cu strided", {"cu_seqlens_q": array(4, dtype=INT32, strides=(2,))}, ("last dimension of cu_seqlens_q",)),
    ("used shape", {"seqused_q": array(4, dtype=INT32)}, ("seqused_q must have shape (3,)", "(4,)")),
    ("used dtype", {"seqused_k": array(3, dtype=FP32)}, ("seqused_k has dtype float32", "int32")),
    ("used device", {"seqused_k": array(3, dtype=INT32, device=1)}, ("one device", "seqused_k is ")),
    ("max bool", {"max_seqlen_q": True}, ("max_seqlen_q must be an int", "True")),
    ("max float", {"max_seqlen_k": 9.0}, ("max_seqlen_k must be an int", "9.0")),
    ("max negative", {"max_seqlen_k": -1}, ("max_seqlen_k", "-1")),
    ("max array", {"max_seqlen_q": np.array([6])}, ("max_seqlen_q", "on the host", "numpy.ndarray")),
    ("alibi", {"alibi_slopes": array(2, 4, dtype=FP32)}, ("alibi_slopes", "(3, 4)", "(2, 4)")),
    ("out", {"out": array(12, 4, 64)}, ("out must have shape (12, 4, 32)",)),
    ("scale", {"softmax_scale": math.inf}, ("softmax_scale", "inf")),
    ("window", {"window_size": (0, -5)}, ("window_size", "(0, -5)")),
]
# fmt: on


@pytest.mark.parametrize(("change", "texts"), [row[1:] for row in VARLEN_REASON], ids=[row[0] for row in VARLEN_REASON])
def test_one_varlen_reason(change: dict[str, Any], texts: tuple[str, ...]) -> None:
    error = refused(packed, **change)
    assert len(error.reasons) == 1, error.reasons
    assert all(text in error.reasons[0] for text in texts), error.reasons
    assert "flash_attention_varlen(q=" in error.asked and error.hint


def test_out_must_not_be_an_input() -> None:
    """A problem knows no addresses: the call compares them, each time."""
    q, k = np.ones((2, 5, 4, 64), np.float32), np.ones((2, 7, 2, 64), np.float32)
    for _ in range(2):
        with pytest.raises(UnsupportedProblem, match="out shares memory with q") as caught:
            flash_attention(q, k, k, out=q)
        assert len(caught.value.reasons) == 1


def test_jax_out_is_immutable() -> None:
    jax: dict[str, Any] = {"library": "jax", "readonly": True}
    arrays = {"q": array(2, 5, 4, 64, **jax), "k": array(2, 7, 2, 64, **jax), "v": array(2, 7, 2, 32, **jax)}
    error = refused(dense, **arrays, out=array(2, 5, 4, 32, **jax))
    assert error.reasons == ("out is a JAX array; leave out=None: JAX arrays are immutable",)
    assert dense(**arrays).batch == 2  # read-only inputs are fine


def test_casts_are_spelt_for_each_library() -> None:
    calls = {"numpy": "q.astype(np.float32)", "torch": "q.to(torch.float32)", "jax": "q.astype(jnp.float32)"}
    for library, text in calls.items():
        kind: dict[str, Any] = {"library": library, "device": -1}
        q, k, v = array(2, 5, 4, 64, dtype=INT64, **kind), array(2, 7, 2, 64, **kind), array(2, 7, 2, 32, **kind)
        assert text in refused(dense, q=q, k=k, v=v).reasons[0]


def test_all_reasons_at_once() -> None:
    """Every argument is wrong: every one is named, in one error."""
    error = refused(
        dense, q=array(2, 5, 3, 20, dtype=INT32), k=array(2, 6, 2, 20, **CPU),
        v=array(3, 7, 1, 4, strides=(28, 4, 4, 2)), layout="sbhd", bias=array(9, dtype=INT64),
        alibi_slopes=array(9), sinks=array(9, dtype=FP64),
        causal="no", window_size=(-3, 0), softmax_scale=math.nan, softcap=-1,
        out=array(2, 5, 3, 64, dtype=FP32, readonly=True),
    )  # fmt: skip
    wanted = (
        "layout", "batch sizes", "sequence length", "differ in heads", "not a multiple", "head_dim is 20",
        "head_dim_v is 4", "q has dtype", "dimension of v", "one device", "bias has", "bias must", "alibi_slopes has",
        "alibi_slopes must", "sinks has", "sinks must", "causal must", "window_size must", "softmax_scale must",
        "softcap must", "out must have shape", "out must have q's dtype", "out is read-only",
    )  # fmt: skip
    for text in wanted:
        assert sum(text in reason for reason in error.reasons) == 1, (text, error.reasons)
    assert len(error.reasons) == len(wanted)
    assert all(reason in str(error) for reason in error.reasons)
    assert "window_size=(-3, 0)" in error.asked and "q=int32[2, 5, 3, 20]" in error.asked


def test_shapes_unknown_still_checks_the_rest() -> None:
    """With a wrong rank no size is known; dtypes and options are judged all the same, and nothing is judged twice."""
    error = refused(dense, q=array(5, 4, 64), sinks=array(2, 2), alibi_slopes=array(3), bias=array(3), softcap=-1.0)
    assert [r.split()[0] for r in error.reasons] == ["q", "alibi_slopes", "sinks", "bias", "softcap"]
    error = refused(packed, k=array(2, 2, 2, 2), cu_seqlens_q=array(dtype=INT32), seqused_q=array(2, 2, dtype=INT32))
    assert [r.split()[0] for r in error.reasons] == ["k", "cu_seqlens_q", "seqused_q"]


def test_sizes_beyond_32_bits() -> None:
    big = 2**31
    error = refused(dense, q=array(2, big, 4, 64))
    assert len(error.reasons) == 1 and "2**31" in error.reasons[0]
    assert "2**31" in refused(packed, k=array(big, 2, 64), v=array(big, 2, 32)).reasons[0]
    assert "2**31" in refused(packed, max_seqlen_q=big).reasons[0]
