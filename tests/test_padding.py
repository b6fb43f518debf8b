"""Batch entries with padding: seqused and leftpad, in the reference, on NumPy and JAX, and wrong ones."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from test_attention import DTYPES, wrong
from test_errors import LIBRARIES, Row, dense, ids, moved, refused, with_out
from test_reference import Rng, close

import flashmoe_cupy
from flashmoe_cupy import flash_attention, reference
from flashmoe_cupy.plan.operation import registered
from flashmoe_cupy.testing import AttentionCase


@pytest.mark.parametrize("layout", ["bshd", "bhsd"])
@pytest.mark.parametrize("options", [{}, {"causal": True, "softcap": 1.0}, {"window_size": (2, 1)}], ids=str)
def test_padding_equals_each_entry_alone(options: dict[str, Any], layout: str, rng: Rng) -> None:
    """Gradients too; what padding holds never counts."""
    left_q, used_q, left_k, used_k = (2, 0, 4, 0), (9, 5, 4, 9), (0, 3, 1, 11), (11, 10, 1, 11)
    arrays = {"q": (4, 9, 4, 8), "k": (4, 11, 2, 8), "v": (4, 11, 2, 16), "bias": (4, 1, 9, 11)}
    given: dict[str, Any] = {name: rng.standard_normal(shape) for name, shape in arrays.items()}
    given |= {"sinks": rng.standard_normal(4), "alibi_slopes": rng.random((4, 4))}
    spans = [(slice(a, b), slice(c, d)) for a, b, c, d in zip(left_q, used_q, left_k, used_k, strict=True)]
    for b, (rows, keys) in enumerate(spans):
        for name, span in (("q", rows), ("k", keys), ("v", keys)):
            idle = np.ones(len(given[name][b]), bool)
            idle[span] = False
            given[name][b, idle] = np.nan
    lengths = {"leftpad_q": left_q, "seqused_q": used_q, "leftpad_k": left_k, "seqused_k": used_k}
    padding: dict[str, Any] = {name: np.array(n, np.int32) for name, n in lengths.items()}

    def turned(x: Any) -> Any:
        return x.swapaxes(1, 2) if layout == "bhsd" else x

    call: dict[str, Any] = {name: turned(x) if name in "qkv" else x for name, x in given.items()}
    call |= options | {"layout": layout}
    out, lse = reference.flash_attention(**call, **padding, return_lse=True)
    out = turned(out)
    dout, dlse = rng.standard_normal(out.shape), rng.standard_normal(lse.shape)
    found = reference.flash_attention_backward(turned(dout), **call, **padding, dlse=dlse)
    want_out, want_lse = np.zeros_like(out), np.full_like(lse, -np.inf)
    dq, dk, dv = (np.zeros_like(given[name]) for name in "qkv")
    dsinks, dbias = np.zeros(4), np.zeros(arrays["bias"])
    for b, (rows, keys) in enumerate(spans):
        part_of = {"q": rows, "k": keys, "v": keys}
        one: dict[str, Any] = {name: given[name][b : b + 1, span] for name, span in part_of.items()}
        one |= {"sinks": given["sinks"], "alibi_slopes": given["alibi_slopes"][b]} | options
        one |= {"bias": given["bias"][b : b + 1, :, rows, keys]}
        want_out[b : b + 1, rows], want_lse[b : b + 1, :, rows] = reference.flash_attention(**one, return_lse=True)
        part: Any = reference.flash_attention_backward(dout[b : b + 1, rows], **one, dlse=dlse[b : b + 1, :, rows])
        dq[b, rows], dk[b, keys], dv[b, keys] = part.dq[0], part.dk[0], part.dv[0]
        dbias[b, :, rows, keys] = part.dbias[0]
        dsinks += part.dsinks
    mine = (out, lse, turned(found.dq), turned(found.dk), turned(found.dv), found.dsinks, found.dbias)
    for a, b in zip(mine, (want_out, want_lse, dq, dk, dv, dsinks, dbias), strict=True):
        close(a, b)


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"leftpad_q": [3, 0], "seqused_q": [2, 5]}, "leftpad_q"), ({"seqused_k": [1, 8]}, "seqused_k"),
        ({"leftpad_k": [-1, 0]}, "leftpad_k"), ({"leftpad_k": [0]}, r"\(2,\)"),
    ],
)  # fmt: skip
def test_padding_refuses_wrong_lengths(change: dict[str, Any], word: str, rng: Rng) -> None:
    q, k = rng.standard_normal((2, 5, 1, 8)), rng.standard_normal((2, 7, 1, 8))
    with pytest.raises(ValueError, match=word):
        reference.flash_attention(q, k, k, **change)


PADDED = (
    AttentionCase(9, 12, 3, used_q=(9, 0, 4), used_k=(12, 5, 0), left_k=(3, 5, 0), causal=True),
    AttentionCase(70, 90, 3, left_q=(0, 69, 70), left_k=(10, 0, 89), causal=True, heads_q=6, sinks="float32"),
    AttentionCase(70, 90, 3, used_k=(1, 90, 40), bias="b11k", bias_dtype="bool", window_size=(20, 3)),
    AttentionCase(70, 90, 3, used_q=(70, 33, 5), left_q=(2, 33, 4), left_k=(80, 1, 0), bias="1hqk", alibi="bh"),
    AttentionCase(20, 30, 2, used_q=(20, 3), used_k=(30, 7), softcap=4.0, bias="q1", bias_dtype="float32"),
    AttentionCase(4, 0, 2, used_q=(3, 0), left_k=(0, 0)),
)


@pytest.mark.parametrize("dtype", DTYPES)
def test_numpy_with_padding_against_the_reference(dtype: str) -> None:
    failures = []
    for seed, case in enumerate(c._replace(dtype=dtype) for c in PADDED):
        given = case.random(seed)
        out, lse = flashmoe_cupy.flash_attention(**given, **case.options(), return_lse=True)
        failures += wrong(case, out, lse, given)
        alone = flashmoe_cupy.attention_lse(**{n: a for n, a in given.items() if n != "v"}, **case.options())
        np.testing.assert_allclose(alone, lse, rtol=1e-5, atol=1e-5)
        mine, idle = np.full_like(out, 7.0), np.ones(out.shape[:2], bool)
        for b, (start, stop) in enumerate(case.spans("q")):
            idle[b, start:stop] = False
        flashmoe_cupy.flash_attention(**given, **case.options(), out=mine)
        assert np.array_equal(mine[~idle], out[~idle]) and (mine[idle] == 7.0).all(), "others are left alone"
        turned = {n: a.swapaxes(1, 2) if n in "qkv" else a for n, a in given.items()}
        heads_first = flashmoe_cupy.flash_attention(**turned, **case.options(), layout="bhsd")
        assert np.array_equal(heads_first.swapaxes(1, 2), out)
    assert not failures, "\n".join(failures)


# ---------------------------------------------------------------------------------------------------------------------
# errors

WRONG: list[Row] = [
    ("seqused_k int64", {"seqused_k": np.array([5, 7])}, ("seqused_k has dtype int64", "int32", "cast")),
    ("leftpad_q length", {"leftpad_q": np.zeros(5, np.int32)}, ("leftpad_q must have shape", r"\(2,\)", r"\(5,\)")),
    ("leftpad_k of rank 2", {"leftpad_k": np.zeros((2, 1), np.int32)}, ("leftpad_k must have shape", r"\(2,\)")),
    ("seqused_q strided", {"seqused_q": np.zeros(4, np.int32)[::2]}, ("dimension of seqused_q", "contiguous")),
]
# Only the NumPy back end can look into the lengths without waiting for a device.
LENGTHS: list[Row] = [
    ("longer than there is", {"seqused_k": np.array([8, 2], np.int32)}, ("seqused_k must lie between 0 and 7",)),
    ("below 0", {"leftpad_q": np.array([0, -1], np.int32)}, ("leftpad_q must lie between 0 and 5",)),
    (
        "the end before the start",
        {"leftpad_k": np.array([3, 0], np.int32), "seqused_k": np.array([2, 7], np.int32)},
        ("leftpad_k and seqused_k must lie between 0 and 7", "leftpad must not be larger than seqused"),
    ),
]


@pytest.mark.parametrize("convert", LIBRARIES)
@pytest.mark.parametrize("row", WRONG, ids=ids(WRONG))
def test_wrong_arrays_are_refused(row: Row, convert: Callable[[Any], Any]) -> None:
    _, change, patterns = row
    refused(flash_attention, moved(with_out(dense()) | change, convert), patterns)


@pytest.mark.parametrize("convert", LIBRARIES[:2])
@pytest.mark.parametrize("row", LENGTHS, ids=ids(LENGTHS))
def test_lengths_in_host_memory_are_checked(row: Row, convert: Callable[[Any], Any]) -> None:
    _, change, patterns = row
    refused(flash_attention, moved(with_out(dense()) | change, convert), patterns)


# ---------------------------------------------------------------------------------------------------------------------
# vmap


@pytest.mark.jax
@pytest.mark.parametrize("axes", [{"seqused_k": 0}, {"seqused_k": 0, "leftpad_q": 0}, {}], ids=str)
def test_vmap(axes: dict[str, int], rng: Rng, monkeypatch: pytest.MonkeyPatch) -> None:
    """Lengths that are mapped, and lengths that are the same for all, join to one call."""
    jax = pytest.importorskip("jax")
    case = AttentionCase(9, 11, heads_q=4, heads_k=2, head_dim=16, dtype="float32")
    arrays = {name: np.stack([x, 2 * x, -x]) for name, x in case.random().items()}
    for name, high in (("seqused_k", 11), ("leftpad_q", 5)):
        arrays[name] = rng.integers(0, high + 1, (3, 2) if name in axes else (2,)).astype(np.int32)
    mapped = {name: axes.get(name, 0 if name in "qkv" else None) for name in arrays}
    options: Any = {"causal": True, "return_lse": True}
    calls: list[int] = []
    operation = registered("flash_attention")
    host = operation.host

    def counted(*args: Any) -> None:
        calls.append(1)
        host(*args)

    monkeypatch.setattr(operation, "host", counted)
    with jax.default_device(jax.devices("cpu")[0]):
        given = {name: jax.numpy.asarray(x) for name, x in arrays.items()}
        made = jax.jit(jax.vmap(lambda a: flash_attention(**a, **options), in_axes=(mapped,)))(given)
        made = [np.asarray(x) for x in made]
    for i in range(3):
        one: dict[str, Any] = {name: x if mapped[name] is None else x[i] for name, x in arrays.items()}
        for mine, want in zip(made, reference.flash_attention(**one, **options), strict=True):
            np.testing.assert_allclose(mine[i], want, rtol=2e-4, atol=2e-5)
    assert len(calls) == 1
