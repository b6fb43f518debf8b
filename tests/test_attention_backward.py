"""Attention's gradient by its public functions, on NumPy arrays and torch tensors of the CPU, against the reference.

The reference itself is held to finite differences. Every refusal is read: one error with every reason, nothing written.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from cpu_backward_kit import counted
from test_errors import Row, f16, moved, strided
from test_reference import Rng

import flashmoe_cupy
from flashmoe_cupy import reference
from flashmoe_cupy.arrays import as_numpy, view
from flashmoe_cupy.errors import UnsupportedProblem
from flashmoe_cupy.testing import AttentionCase, Case, VarlenCase

Array = Any  # NumPy arrays; Any, so that dicts of arguments may be unpacked
Arrays = dict[str, Any]
Convert = Callable[[Array], Any]

NAMES = "q", "k", "v", "sinks", "bias"
ROWS = "dout", "q", "k", "v", "out"  # the arrays whose last dimension is a head's
SPECIAL = 7.25  # what given arrays hold before the call


def to_torch(a: Array) -> Any:
    import torch

    short = a.dtype == ml_dtypes.bfloat16
    x = torch.from_numpy(a.view(np.int16) if short else a)
    return x.view(torch.bfloat16) if short else x


libraries = pytest.mark.parametrize("convert", [
    pytest.param(np.asarray, id="numpy"), pytest.param(to_torch, id="torch", marks=pytest.mark.torch)
])  # fmt: skip


def fetched(x: Any) -> Array:
    return as_numpy(view(x, "x"))


def layouts(given: Arrays) -> list[Arrays]:
    """The call, and where there is one the same call in the other layout."""
    turned = {name: a.swapaxes(1, 2) if name in ROWS else a for name, a in given.items()} | {"layout": "bhsd"}
    return [given] if "cu_seqlens_q" in given else [given, turned]


def function(given: Arrays, suffix: str = "", of: Any = flashmoe_cupy) -> Any:
    """What runs these arguments: flash_attention or flash_attention_varlen, or its backward."""
    return getattr(of, f"flash_attention{'_varlen' if 'cu_seqlens_q' in given else ''}{suffix}")


def prepared(case: Case) -> Arrays:
    """All arguments of the backward but need. Rows that do not count are NaN in every array."""
    given: Arrays = {**case.random(), **case.options()}
    out, lse = function(given)(**given, return_lse=True)
    rng = np.random.default_rng(9)
    dout, dlse = rng.standard_normal(out.shape).astype(out.dtype), rng.standard_normal(lse.shape, np.float32)
    for x in (dout, out, lse.swapaxes(-1, -2), dlse.swapaxes(-1, -2)):
        x[~counted(case, "q")] = np.nan
    return {"dout": dout, "out": out, "lse": lse, "dlse": dlse, **given}


def wanted(given: Arrays) -> tuple[str, ...]:
    """The arguments that have a gradient."""
    return tuple(name for name in NAMES if name in given and given[name].dtype != np.bool_)


def gradients(given: Arrays, **change: Any) -> Any:
    return function(given, "_backward")(**given | change)


def truth(given: Arrays) -> Any:
    """In float64, of the same out and lse."""
    return function(given, "_backward", reference)(**given)


def judge(got: Any, want: Array, name: str = "") -> None:
    """Sums run in float32, whose error goes with the largest value; then one rounding."""
    got = fetched(got)
    assert got.shape == want.shape, name
    atol = 1e-5 * max(1.0, np.abs(want).max(initial=0.0))
    eps = {"bfloat16": 2.0**-8, "float16": 2.0**-11, "float32": 1e-5}[got.dtype.name]
    np.testing.assert_allclose(got.astype(np.float64), want.astype(np.float64), rtol=eps, atol=atol, err_msg=name)


def same(a: Any, b: Any) -> None:
    """The same bits, and None in the same places."""
    for name, one, two in zip(a._fields, a, b, strict=True):
        assert (one is None) == (two is None), name
        assert one is None or fetched(one).tobytes() == fetched(two).tobytes(), name


def refused(given: Arrays, *patterns: str, **change: Any) -> UnsupportedProblem:
    """The call's error, after a look at its parts: what was asked, each reason in order, what would run."""
    with pytest.raises(UnsupportedProblem) as caught:
        gradients(given, **change)
    error, said = caught.value, str(caught.value)
    assert said.startswith(f"cannot run {function(given, '_backward').__name__}(dout="), said
    assert not re.search(r"\bflash_attention(_varlen)?\b", said), f"names the forward:\n{said}"
    assert len(error.reasons) == len(patterns), said
    assert all(re.search(pattern, reason) for pattern, reason in zip(patterns, error.reasons, strict=True)), said
    assert error.hint and error.hint in said and len(set(error.hint.split("; "))) == error.hint.count("; ") + 1, said
    return error


# ---------------------------------------------------------------------------------------------------- the truth is true


SMALL = AttentionCase(3, 4, batch=1, heads_q=2, heads_k=1, head_dim=8, head_dim_v=16, dtype="float32")
PADDING: Arrays = {"batch": 2, "left_q": (1, 0), "used_q": (3, 2), "left_k": (0, 1), "used_k": (2, 4)}
PACKED = VarlenCase((2, 0, 3), (3, 2, 2), (1, 0, 3), (3, 1, 2), 1, 1, 2, 1, 8, dtype="float32")
FEATURES: tuple[Case, ...] = (
    SMALL, SMALL._replace(causal=True), SMALL._replace(window_size=(1, 0)), SMALL._replace(softmax_scale=-0.8),
    SMALL._replace(softcap=0.7), SMALL._replace(alibi="h"), SMALL._replace(sinks="float32"),
    SMALL._replace(seqlen_q=6, causal=True, sinks="float32"), SMALL._replace(seqlen_q=6, causal=True),
    *[SMALL._replace(bias=bias) for bias in ("bhqk", "1hq1", "h1k", "1k", "qk")],
    SMALL._replace(bias="b11k", bias_dtype="bool"), SMALL._replace(**PADDING, bias="1hqk", sinks="float32"),
    PACKED, PACKED._replace(causal=True, softcap=2.0, sinks="float32", alibi="bh"),
)  # fmt: skip


@pytest.mark.parametrize("case", FEATURES, ids=str)
def test_the_reference_equals_finite_differences(case: Case, rng: Rng) -> None:
    """Element by element: (loss(x + h) - loss(x - h)) / 2h."""
    given: Arrays = {**case.random(), **case.options()}
    given |= {name: given[name].astype(np.float64) for name in wanted(given)}
    forward = function(given, of=reference)
    out, lse = forward(**given, return_lse=True)
    dout, dlse = rng.standard_normal(out.shape), rng.standard_normal(lse.shape)
    found = truth(given | {"dout": dout, "dlse": dlse})

    def loss() -> float:
        o, s = forward(**given, return_lse=True)
        return float((o * dout).sum() + (np.where(s == -np.inf, 0.0, s) * dlse).sum())

    for name in wanted(given):
        x = given[name]
        slopes = np.zeros(x.shape)
        for i in np.ndindex(x.shape):
            at, ends = x[i], []
            for step in (1e-5, -1e-5):
                x[i] = at + step
                ends.append(loss())
            x[i], slopes[i] = at, (ends[0] - ends[1]) / 2e-5
        np.testing.assert_allclose(getattr(found, f"d{name}"), slopes, rtol=1e-7, atol=1e-8, err_msg=name)


# ------------------------------------------------------------------------------------------------------------- results


def attention(*sizes: int, **features: Any) -> AttentionCase:
    """sizes: of queries, keys and the batch."""
    base: Arrays = {"heads_q": 4, "heads_k": 2, "head_dim": 16, "dtype": "float32"}
    return AttentionCase(**base | features | dict(zip(AttentionCase._fields, sizes, strict=False)))


LEFT: Arrays = {"left_q": (0, 5, 32), "left_k": (3, 0, 9)}
USED: Arrays = {"used_q": (33, 30, 33), "used_k": (40, 0, 11)}
CASES: tuple[Case, ...] = (
    attention(33, 70, heads_q=6, head_dim_v=40, causal=True, softcap=3.0, sinks="float32", alibi="bh"),
    attention(40, 33, window_size=(7, 3), bias="b1qk", sinks="same", dtype="bfloat16"),
    attention(20, 30, bias="bhqk", bias_dtype="float32", softcap=2.0, causal=True, dtype="float16"),
    attention(33, 40, head_dim=64, head_dim_v=8, bias="h1k", causal=True, window_size=(9, -1), heads_k=1),
    attention(70, 33, bias="1k", alibi="h", causal=True, sinks="float32", dtype="bfloat16"),
    attention(1, 70, bias="bh1k", softcap=1.0, softmax_scale=-0.4, sinks="same", heads_k=4),
    attention(33, 40, 3, **LEFT, **USED, bias="b11k", bias_dtype="bool", sinks="float32", causal=True),
    attention(33, 40, 3, **USED, bias="bhqk", softcap=3.0, dtype="float16"),
    attention(33, 40, 3, **LEFT, bias="q1", alibi="bh", window_size=(4, 8), head_dim_v=24, sinks="same"),
    VarlenCase((20, 0, 33), (31, 4, 9), tail_q=3, tail_k=2, heads_q=6, head_dim=16, causal=True, sinks="float32"),
    VarlenCase((9, 5, 40), (9, 8, 50), (7, 5, 0), (2, 0, 50), 1, 2, 4, 2, 16, 40, "float32", window_size=(6, 2)),
    VarlenCase((9, 12), (20, 8), (9, 7), (15, 8), 0, 4, 4, 2, 8, 16, "float16", softcap=4.0, sinks="same", alibi="bh"),
)


@libraries
@pytest.mark.parametrize("case", CASES, ids=str)
def test_against_the_reference(case: Case, convert: Convert) -> None:
    given = prepared(case)
    need = wanted(given)
    for change in ({}, {"dlse": None}):
        want = truth(given | change)
        for arguments in layouts(given | change):
            found = gradients(moved(arguments, convert), need=need)
            for choice in (False, True, np.True_):  # the same bits in every call
                same(gradients(moved(arguments, convert), need=need, deterministic=choice), found)
            assert found._fields == ("dq", "dk", "dv", "dsinks", "dbias")
            assert [x is not None for x in found] == [name in need for name in NAMES]
            for name in need:
                got = getattr(found, f"d{name}")
                assert type(got) is type(convert(given["q"])) and fetched(got).dtype == given[name].dtype
                if name in ROWS:
                    got = got.swapaxes(1, 2) if "layout" in arguments else got
                    assert not fetched(got)[~counted(case, name.replace("v", "k"))].any(), "new arrays hold 0 there"
                judge(got, getattr(want, f"d{name}"), name)


def test_rows_in_front_of_the_first_sequence() -> None:
    """Offsets need not begin at 0."""
    given = prepared(CASES[-1])
    later = given | {name: given[name] + np.int32(5) for name in ("cu_seqlens_q", "cu_seqlens_k")}
    for name, axis in (*[(name, 0) for name in ROWS], ("lse", 1), ("dlse", 1)):
        later[name] = np.concatenate([np.full_like(given[name].take(range(5), axis), np.nan), given[name]], axis)
    found = gradients(later)
    assert not any(x[:5].any() for x in found[:3])
    same(found._replace(dq=found.dq[5:], dk=found.dk[5:], dv=found.dv[5:]), gradients(given))


# -------------------------------------------------------------------------------------------------- need, dq, dk and dv


@libraries
def test_need_names_what_is_returned(convert: Convert) -> None:
    given = moved(prepared(attention(5, 7, bias="1hqk", sinks="float32")), convert)
    whole = gradients(given, need=NAMES)
    for names in itertools.chain(*[itertools.combinations(NAMES, n) for n in range(1, 6)]):
        mine = whole._replace(**{f"d{name}": None for name in NAMES if name not in names})
        for need in (names, [*reversed(names)], " ".join(names), f"  {'   '.join(names)} "):
            same(gradients(given, need=need), mine)
    same(gradients(given), whole._replace(dsinks=None, dbias=None))
    same(gradients(given, need="q q"), whole._replace(dk=None, dv=None, dsinks=None, dbias=None))
    packed = moved(prepared(PACKED._replace(sinks="float32")), convert)
    same(gradients(packed, need=("sinks", "k")), gradients(packed, need="q k v sinks")._replace(dq=None, dv=None))


def test_wrong_need() -> None:
    must = "^need must name some of q, k, v, sinks, bias, but is "
    for need, *reasons in (
        ("", f"{must}empty$"), ((), f"{must}empty$"), (None, f"{must}None$"), (3, f"{must}3$"), (b"q", f"{must}b'q'$"),
        ("dq", f"{must}'dq'$"), ("q,k", f"{must}'q,k'$"), (("q", 1), rf"{must}\('q', 1\)$"), ({"q"}, f"{must}a .*set$"),
        ("sinks", "^need names sinks, but sinks is not given$"), ("bias sinks", "^need names s", "^need names bias"),
        (("q", "bias", "lse"), f"{must}'q bias lse'$", "^need names bias, but bias is not given$"),
    ):  # fmt: skip
        assert refused(dense(), *reasons, need=need).hint.endswith("names of arguments, as in need='q k v'")


def room(like: Array, order: tuple[int, ...]) -> tuple[Array, Array]:
    """Memory full of SPECIAL, and an array of like's shape and dtype amid it, whose axes lie in that order."""
    memory = np.full([like.shape[i] + 3 for i in order], SPECIAL, like.dtype)
    return memory, memory[tuple(slice(2, 2 + like.shape[i]) for i in order)].transpose(np.argsort(order))


@libraries
@pytest.mark.parametrize("case", [CASES[0], CASES[6], CASES[9], CASES[11]], ids=str)
def test_given_arrays_are_written_in_place(case: Case, convert: Convert) -> None:
    for given in layouts(prepared(case)):
        new, last = gradients(moved(given, convert)), given["q"].ndim - 1
        for order in itertools.permutations(range(last)):
            places = {f"d{name}": room(given[name], (*order, last)) for name in "qkv"}
            targets = {name: convert(inner) for name, (_, inner) in places.items()}
            for names in (["dq", "dk", "dv"], ["dk"]):
                found = gradients(moved(given, convert), **{name: targets[name] for name in names})
                assert all(getattr(found, name) is targets[name] for name in names)
                assert all(x is not None for x in found[:3])
            for name, (memory, inner) in places.items():
                count = counted(case, "q" if name == "dq" else "k")
                want, got = fetched(getattr(new, name)), inner.copy()
                want, got = (x.swapaxes(1, 2) if "layout" in given else x for x in (want, got))
                assert np.array_equal(got[count], want[count]) and (got[~count] == SPECIAL).all(), name
                inner[...] = SPECIAL
                assert (memory == SPECIAL).all(), f"{name} was written outside"


@libraries
def test_given_arrays_that_share_memory(convert: Convert) -> None:
    given = prepared(attention(5, 7, dtype="float16"))
    wide = np.zeros((2, 7, 2, 32), np.float16)
    rows: list[tuple[Arrays, str]] = [
        ({"dq": given["q"]}, "dq shares memory with q"), ({"dv": given["k"]}, "dv shares memory with k"),
        ({"dq": given["dout"]}, "dq shares memory with dout"), ({"dq": given["out"]}, "dq shares memory with out"),
        ({"dk": wide[..., :16], "dv": wide[..., 8:24]}, "dk shares memory with dv"),
    ]  # fmt: skip
    for change, reason in rows:
        before = {name: x.copy() for name, x in (given | change).items() if isinstance(x, np.ndarray)}
        gradients(moved(given | {name: np.empty_like(x) for name, x in change.items()}, convert))  # a good one first
        hint = f"an array of its own for {reason[:2]}, or {reason[:2]}=None"
        assert refused(moved(given | change, convert), f"^{reason}$").hint == hint
        assert all(np.array_equal((given | change)[name], x) for name, x in before.items())
    gradients(moved(given | {"dk": wide[..., :16], "dv": wide[..., 16:]}, convert))  # side by side is fine
    assert wide[..., :16].any() and wide[..., 16:].any()


def test_given_arrays_that_are_read_only() -> None:
    """Also after a call that could write them."""
    dq = f16(2, 5, 4, 16)
    for _ in range(2):
        dq.flags.writeable = False
        refused(dense(), "^dq is read-only$", dq=dq)
        dq.flags.writeable = True
        gradients(dense(), dq=dq)


# ------------------------------------------------------------------------------------------------------------ refusals


def dense() -> Arrays:
    """A call that runs: batch 2, seqlen_q 5, seqlen_k 7, heads 4/2, head_dim 16, head_dim_v 24, float16."""
    return prepared(attention(5, 7, head_dim_v=24, dtype="float16"))


def packed() -> Arrays:
    """The same of sequences of 2, 0 and 3 queries over 4, 1 and 2 keys."""
    return prepared(VarlenCase((2, 0, 3), (4, 1, 2), (), (), 0, 0, 4, 2, 16, 24, "float16"))


LSE = np.zeros((2, 4, 5), np.float32)
TWICE = np.lib.stride_tricks.as_strided(f16(7, 2, 16), (2, 7, 2, 16), (0, 64, 32, 2), writeable=True)
DENSE: list[Row] = [
    ("shape of dq", {"dq": f16(2, 5, 4, 24)}, (r"^dq must have shape \(2, 5, 4, 16\), but has \(2, 5, 4, 24\)$",)),
    ("rank of dk", {"dk": f16(14, 2, 16)}, (r"^dk must have shape \(2, 7, 2, 16\), but has \(14, 2, 16\)$",)),
    ("dtype of dv", {"dv": f16(2, 7, 2, 24).astype("f")}, ("^dv must have v's dtype float16, but has float32$",)),
    ("dq strided", {"dq": strided(2, 5, 4, 16)}, ("^the last dimension of dq must be contiguous.* is 2 elements$",)),
    ("dk itself", {"dk": TWICE}, (r"^elements of dk overlap in memory: shape \(2, 7, 2, 16\), strides ",)),
    ("not needed", {"dk": f16(2, 7, 2, 16), "need": "q v"}, ("^dk is given, but need leaves k out$",)),
    ("mask", {"need": "bias", "bias": np.ones((5, 7), bool)}, ("^need .* a boolean bias has no gradient$",)),
    ("no numbers", {"window_size": np.zeros(3, "i"), "softmax_scale": np.ones(()), "softcap": "no"},
     (r"^window_size must be two ints .* but is a (numpy|torch)\.", "^softmax_scale must .* its .item", "'no'$")),
    ("shapes", {"dout": f16(1, 5, 4, 24), "out": f16(2, 4, 5, 24), "lse": LSE.reshape(2, 5, 4), "dlse": LSE[0]},
     (r"^dout must have shape \(2, 5, 4, 24\), but has \(1, 5, 4, 24\)$", r"^out must have shape .* \(2, 4, 5, 24\)$",
      r"^lse must have shape \(2, 4, 5\), but has \(2, 5, 4\)$", r"^dlse must have shape .*, but has \(4, 5\)$")),
    ("dtypes", {"dout": f16(2, 5, 4, 24).astype("f"), "out": f16(2, 5, 4, 24).astype("i"), "dlse": f16(2, 4, 5)},
     ("^dout must have q's dtype float16, but has float32$", "^out must have q's dtype float16, but has int32$",
      r"^dlse has dtype float16, which must be float32; cast with dlse\.")),
    ("q of float64", {"q": f16(2, 5, 4, 16).astype("d"), "out": f16(2, 5, 4, 24).astype("d")},
     ("^q has dtype float64, which must be bfloat16, float16 or float32", "^out has dtype float64, which must be bf")),
    ("k of float32", {"k": f16(2, 7, 2, 16).astype("f")}, ("^dtypes differ: q is float16, k is float32, v is ",)),
    ("strided", {"dout": strided(2, 5, 4, 24), "out": strided(2, 5, 4, 24)},
     (r"^the last dimension of dout must be contiguous.*copy with", r"^the last dimension of out .* is 2 elements")),
    ("yes", {"deterministic": "yes"}, ("^deterministic must be a bool, but is 'yes'$",)),
    ("ints", {"deterministic": 1, "causal": 0}, ("^causal must be a bool, but is 0$", "^deterministic must .* is 1$")),
    ("scalars", {"softmax_scale": np.float32(0.5), "softcap": "no"}, ("^softcap must be 0 .* but is 'no'$",)),
    ("layout", {"layout": "sbhd", "lse": LSE[0]}, ("^layout is 'sbhd'", "^lse must have 3 dimensions, but its shape")),
    ("options", {"sinks": np.zeros(2, "f"), "bias": np.zeros((5, 8), "f"), "need": "bias sinks"},
     (r"^sinks must have shape \(4,\), but has \(2,\)$", r"^bias must have 2 to 4 dimensions .*\(5, 8\)$")),
    ("one sequence", {"q": f16(5, 4, 16), "k": f16(7, 2, 16), "v": f16(7, 2, 24), "dout": f16(5, 4, 24),
                      "out": f16(5, 4, 24), "lse": LSE[0], "dlse": LSE[0]},
     (*[f"^{name} must have 4 dimensions" for name in ("q", "k", "v", "dout", "out")],
      *[f"^{name} must have 3 dimensions" for name in ("lse", "dlse")])),
    ("everything", {"q": f16(2, 5, 4, 20), "k": f16(2, 7, 2, 20), "causal": "no", "softcap": -1.0, "deterministic": 0,
                    "need": "k z sinks", "dout": f16(1, 5, 4, 24), "out": f16(2, 5, 4, 24).astype("f"),
                    "lse": f16(2, 4, 6), "dlse": LSE[:1], "dq": f16(2), "dk": f16(2)},
     ("^head_dim is 20", "^causal must", "^softcap must", "^need must", "^need names sinks", "^deterministic must",
      "^dout must have shape", "^out must have q's dtype", "^lse has dtype float16", "^lse must have shape",
      "^dlse must have shape", "^dq is given, but need leaves q out", "^dk must have shape")),
]  # fmt: skip
OFFSETS: list[Row] = [
    ("no bias", {"need": "q bias"}, ("^need must name some of q, k, v, sinks, but is 'q bias'$",)),
    ("shapes", {"dout": f16(1, 5, 4, 24), "lse": LSE[0].reshape(5, 4), "dlse": LSE[:1]},
     (r"^dout must have shape \(5, 4, 24\), but has \(1, 5, 4, 24\)$", r"^lse must have shape \(4, 5\), but has ",
      r"^dlse must have shape \(4, 5\), but has \(1, 4, 5\)$")),
    ("q of rank 4", {"q": f16(1, 5, 4, 16)}, (r"^q must have 3 dimensions, but its shape is \(1, 5, 4, 16\)$",)),
    ("used", {"seqused_q": np.zeros(2, np.int32), "max_seqlen_q": 2.5},
     (r"^seqused_q must have shape \(3,\), but has \(2,\)$", "^max_seqlen_q must be an int from 0 .* but is 2.5$")),
    ("all", {"max_seqlen_k": -1, "deterministic": "no", "out": f16(5, 4, 16), "dlse": f16(4, 5), "dv": f16(7)},
     ("^max_seqlen_k must", "^deterministic must", "^out must have sh", "^dlse has dtype", "^dv must have shape")),
]  # fmt: skip
BOTH = [pytest.param(dense, *row[1:], id=row[0]) for row in DENSE]
BOTH += [pytest.param(packed, *row[1:], id=f"packed, {row[0]}") for row in OFFSETS]


@libraries
@pytest.mark.parametrize(("good", "change", "reasons"), BOTH)
def test_wrong(good: Callable[[], Arrays], change: Arrays, reasons: tuple[str, ...], convert: Convert) -> None:
    for _ in range(2):  # nothing about a refused call may be remembered as good
        refused(moved(good(), convert), *reasons, **moved(change, convert))


def test_hints() -> None:
    out = "dout and out are ({}, head_dim_v), in q's dtype"
    for given, axes in zip(layouts(dense()), ("batch, seqlen_q, heads_q", "batch, heads_q, seqlen_q"), strict=True):
        assert refused(given, "^dout", dout=f16(1)).hint == out.format(axes)
    lse = "; lse, which the forward gives with return_lse=True, and dlse are (heads_q, total_q), float32"
    assert refused(packed(), "^out", "^dlse", out=f16(1), dlse=LSE).hint == out.format("total_q, heads_q") + lse
    assert refused(dense(), "^dq", dq=f16(1)).hint.endswith("are writable and share no memory; or None")
    assert "sequences there is flash_attention_varlen_backward" in refused(dense(), "^q must", q=f16(5, 4, 16)).hint
    assert "sequences there is flash_attention_backward" in refused(packed(), "^q must", q=f16(1, 5, 4, 16)).hint


@pytest.mark.torch
def test_mixed_libraries() -> None:
    for given in (dense(), packed()):
        for name in (*ROWS, "lse", "dlse", *[name for name in given if name.startswith("cu_seqlens")]):
            reason = rf"^arguments must be of one library.*\b{name} is torch.Tensor"
            hint = refused(given, reason, **{name: to_torch(given[name])}).hint
            assert hint == "all arrays of a call belong to one library and lie on one device"
    refused(dense(), r"one library.*\bdq is torch.Tensor", dq=to_torch(f16(2, 5, 4, 16)))


def test_nothing_is_written_on_error() -> None:
    for given, wrong in ((dense(), {"leftpad_k": [8, 0]}), (packed(), {"seqused_q": [2, 1, 3]})):
        lists = {name: np.array(x, np.int32) for name, x in wrong.items()}
        for change in ({"softcap": -1.0}, {"need": "q k v x"}, lists):
            mine = {f"d{name}": np.full_like(given[name], SPECIAL) for name in "qkv"}
            with pytest.raises(UnsupportedProblem):
                gradients(given, **mine, **change)
            assert all((x == SPECIAL).all() for x in mine.values())


@pytest.mark.parametrize("name", ["dout", "q", "k", "v", "lse"])
def test_no_array(name: str) -> None:
    for given, thing in itertools.product((dense(), packed()), (None, [1.0], 3.0)):
        with pytest.raises(TypeError, match=rf"\b{name} (must be an array|is (None|a builtins))"):
            gradients(given, **{name: thing})


@pytest.mark.torch
def test_errors_that_ops_call_makes() -> None:
    given = moved(dense(), to_torch)
    with pytest.raises(UnsupportedProblem, match=r"\bk\b.* requires? grad"):
        gradients(given, k=given["k"].clone().requires_grad_())
    with pytest.raises(TypeError, match=r"^dlse must be an array"):
        gradients(dense(), dlse=[1.0])
    wrong = {"seqused_k": np.array([8, 2], np.int32)}
    assert "out=float16[2, 5, 4, 24]" in refused(dense(), "^seqused_k must lie between 0 and 7", **wrong).asked


def test_unknown_arguments() -> None:
    for name, said in (
        ("is_causal", "here it is causal, aligned at the bottom right"), ("scale", "it is called softmax_scale here"),
        ("attn_mask", "here it is bias: numbers are added, in a boolean one True attends"),
        ("determinstic", r"did you mean deterministic\?"), ("dropout_p", "leave it out: there is no dropout"),
    ):  # fmt: skip
        with pytest.raises(TypeError, match=rf"^flash_attention_backward\(\) has no argument '{name}': {said}"):
            gradients(dense(), **{name: 1})


@libraries
@pytest.mark.parametrize("features", [{}, {"sinks": "float32", "bias": "1h1k"}], ids=["plain", "sinks and bias"])
@pytest.mark.parametrize("sizes", [(0, 7), (5, 0), (0, 0), (5, 7, 0)], ids=str)
def test_sizes_of_0(sizes: tuple[int, ...], features: Arrays, convert: Convert) -> None:
    case = attention(*sizes, head_dim_v=24, **features)
    for given in layouts(prepared(case) | ({} if features else {"dlse": None})):
        mine = {f"d{name}": convert(np.full_like(given[name], np.nan)) for name in "qkv"}
        for change in ({}, mine):
            found = gradients(moved(given, convert), need=wanted(given), **change)
            for name in wanted(given):
                alone = name == "sinks" and case.seqlen_k == 0  # then the sink is lse
                want = given["dlse"].sum((0, 2)) if alone else np.zeros(given[name].shape)
                np.testing.assert_allclose(fetched(getattr(found, f"d{name}")), want, rtol=1e-6, err_msg=name)


@pytest.mark.parametrize("tail", [0, 3])
def test_no_sequences(tail: int) -> None:
    given = prepared(VarlenCase((), (), tail_q=tail, tail_k=tail, sinks="float32"))
    for name, got in zip(NAMES[:4], gradients(given, need=NAMES[:4])[:4], strict=True):
        np.testing.assert_array_equal(got, np.zeros(given[name].shape))
    mine = {f"d{name}": np.full_like(given[name], SPECIAL) for name in "qkv"}
    gradients(given, **mine)
    assert all((x == SPECIAL).all() for x in mine.values()), "no row counts"


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_what_sees_nothing_gets_exactly_0(dtype: str) -> None:
    given = prepared(attention(9, 4, causal=True, dtype=dtype))
    found = gradients(given)
    assert not found.dq[:, :5].any() and found.dq[:, 6:].any() and found.dk.any()
    given = prepared(attention(3, 9, window_size=(1, 0), bias="1hqk", dtype=dtype))
    found = gradients(given, need="q k v bias")
    assert not found.dk[:, :5].any() and not found.dv[:, :5].any() and not found.dbias[..., :5].any()
    assert found.dk[:, 5:].any(axis=-1).all() and found.dv[:, 5:].any(axis=-1).all()
    given = prepared(attention(5, 7, bias="b11k", bias_dtype="bool", sinks="float32", dtype=dtype))
    given["bias"][:, :, :, 1::2] = False
    found = gradients(given)
    assert not found.dk[:, 1::2].any() and not found.dv[:, 1::2].any() and found.dk[:, ::2].any()
    given = prepared(VarlenCase((0, 3, 2), (4, 0, 2), heads_q=2, heads_k=1, head_dim=8, dtype=dtype))
    mine = {f"d{name}": np.full_like(given[name], np.nan) for name in "qkv"}
    for found in (gradients(given), gradients(given, **mine)):  # sequences without queries, or without keys
        assert not found.dq[:3].any() and not found.dk[:4].any() and not found.dv[:4].any() and found.dq[3:].any()


def test_one_key_gives_no_gradient_of_scores() -> None:
    """The softmax of one score is 1: dP and D are the same sum of d_v products, perhaps in another order. Each errs by
    at most d_v roundings of the sum of the products' sizes, and by one each for out and the product with k.
    """
    given = prepared(attention(6, 1, heads_k=4, head_dim_v=40)) | {"dlse": None}
    found = gradients(given)
    dout, v, k = (np.abs(given[name].astype(np.float64)) for name in ("dout", "v", "k"))
    bound = 2 * (40 + 2) * 2.0**-24 * (dout * v).sum(-1, keepdims=True) * 16**-0.5 * k
    assert (np.abs(found.dq) <= bound).all()
    judge(found.dv, truth(given).dv)


@pytest.mark.parametrize(("form", "convert"), [
    pytest.param(lambda a: a.swapaxes(0, 1).copy().swapaxes(0, 1), to_torch, marks=pytest.mark.torch, id="torch"),
    pytest.param(lambda a: a.swapaxes(0, 1).copy().swapaxes(0, 1), np.asarray, id="turned"),
    pytest.param(lambda a: a[::-1, ::-1].copy()[::-1, ::-1], np.asarray, id="backwards"),
    pytest.param(lambda a: np.pad(a, 2, constant_values=np.nan)[(slice(2, -2),) * a.ndim], np.asarray, id="apart"),
])  # fmt: skip
@pytest.mark.parametrize("case", [CASES[0], CASES[10]], ids=str)
def test_strides(case: Case, form: Convert, convert: Convert) -> None:
    given = prepared(case)
    other = given | {name: form(given[name]) for name in ROWS}
    other |= {name: form(given[name].T.copy().T) for name in ("lse", "dlse")}
    for got, want in zip(gradients(moved(other, convert))[:3], gradients(given)[:3], strict=True):
        judge(got, want)


@pytest.mark.parametrize("axes", [(0,), (1,), (2,), (0, 1, 2)], ids=str)
def test_arrays_that_are_spread(axes: tuple[int, ...]) -> None:
    """Stride 0, as a sum's gradient has it; in the last dimension it is refused."""
    given = prepared(CASES[0])
    part = given["dout"][tuple(slice(0, 1) if i in axes else slice(None) for i in range(4))]
    spread = given | {"dout": np.broadcast_to(part, given["dout"].shape)}
    spread["dlse"] = np.broadcast_to(given["dlse"][:1, :1, :1], given["dlse"].shape)
    for got, want in zip(gradients(spread)[:3], truth(spread)[:3], strict=True):
        judge(got, want)
    whole = np.broadcast_to(np.float32(1), given["dout"].shape)
    refused(given, r"^the last dimension of dout must be contiguous.* stride is 0 elements; copy with np", dout=whole)
