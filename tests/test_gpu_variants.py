"""Scores that are changed on the way: sinks, ALiBi, bias and mixtures; values that are extreme, infinite or NaN."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
from test_gpu_truth import (
    Arrays,
    attend,
    attention,
    check_all,
    compile_registered,
    judge,
    kernel_names,
    one_key,
    register,
    same_bits,
    tensors,
    truth,
)

from flashmoe_cupy import flash_attention
from flashmoe_cupy.plan.kernels import only
from flashmoe_cupy.testing import TOLERANCES, AttentionCase, Case, VarlenCase, relative_error, row_error

torch = pytest.importorskip("torch")
pytestmark = [pytest.mark.gpu, pytest.mark.torch]

HALVES = ("bfloat16", "float16")
SIZES = ((1, 1), (113, 203), (239, 1), (799, 3), (256, 512), (1023, 1024))
BIAS_SHAPES = ("bhqk", "hqk", "qk", "1k", "b11k", "bhq1", "1h1k", "b1qk", "11", "h11", "1hqk", "b1q1")


def sinks(dtype: str) -> list[AttentionCase]:
    kinds = itertools.product(("float32", "same"), ((-1, -1), (128, 0), (17, 40)), ((6, 2), (6, 6)))
    cases = [
        AttentionCase(*s, 2, *heads, 64, dtype=dtype, sinks=sink, window_size=window, causal=window[1] == 0)
        for s in SIZES
        for sink, window, heads in kinds
    ]
    return [*cases, AttentionCase(256, 512, 2, 64, 8, 64, dtype=dtype, sinks="same", window_size=(128, 0), causal=True)]


def alibis(dtype: str) -> list[AttentionCase]:
    kinds = itertools.product(SIZES, ("h", "bh"), (False, True), (64, 128))
    return [AttentionCase(*s, 3, 6, 2, d, dtype=dtype, alibi=a, causal=c) for s, a, c, d in kinds]


def biases(dtype: str) -> list[AttentionCase]:
    kinds = itertools.product(BIAS_SHAPES, ("same", "float32", "bool"), ((113, 203), (256, 512)))
    return [
        AttentionCase(*s, 3, 6, 2, 64, dtype=dtype, bias=shape, bias_dtype=t, causal=bool(i % 2))
        for i, (shape, t, s) in enumerate(kinds)
    ]


def mixtures(dtype: str) -> list[AttentionCase]:
    """Everything with everything, one or two sizes each; the last ones use all features at once."""
    base = AttentionCase(113, 203, 2, 6, 2, 64, dtype=dtype)
    flags: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
        "softcap": ({}, {"softcap": 15.0}),
        "sinks": ({}, {"sinks": "same"}),
        "alibi": ({}, {"alibi": "bh"}),
        "bias": ({}, {"bias": "b1qk"}),
        "window": ({}, {"window_size": (60, 20)}),
    }
    mixes = [dict(itertools.chain.from_iterable(d.items() for d in mix)) for mix in itertools.product(*flags.values())]
    cases = [base._replace(**mix, causal=bool(i % 2)) for i, mix in enumerate(mixes)]
    every = mixes[-1] | {"bias_dtype": "float32", "sinks": "float32"}
    return [*cases, *(base._replace(seqlen_q=q, seqlen_k=k, **every) for q, k in SIZES)]


def wide(dtype: str) -> list[AttentionCase]:
    """The features at other head dimensions, with and without a bias, because that may take another kernel."""
    some: dict[str, Any] = {"softcap": 15.0, "sinks": "same", "alibi": "h", "window_size": (60, 20)}
    dims = ((128, 128), (256, 256), (40, 40), (96, 96), (192, 128), (192, 192), (64, 256), (64, 512), (80, 24))
    grid = itertools.product(SIZES[1:], dims, ("", "bhqk"))
    return [AttentionCase(q, k, 2, 6, 2, d, dv, dtype, bias=bias, **some) for (q, k), (d, dv), bias in grid]


def biased(dtype: str) -> list[AttentionCase]:
    """A bias of each kind at each head dimension, alone and beside other changes of the scores; rows of every tile."""
    dims = ((64, 64), (128, 128), (256, 256), (40, 40), (96, 96), (192, 128), (192, 192), (64, 256), (64, 512))
    features: tuple[dict[str, Any], ...] = ({}, {"softcap": 15.0, "alibi": "h"})
    kinds = itertools.product(dims, ("same", "float32", "bool"), features)
    found = []
    for i, ((d, dv), kind, more) in enumerate(kinds):
        shape = ("bhqk", "1hqk", "b1qk", "h1k", "b11k")[i % 5]
        q, k = ((113, 203), (70, 512), (300, 136))[i % 3]
        found.append(AttentionCase(q, k, 2, 8, 2, d, dv, dtype, bias=shape, bias_dtype=kind, causal=i % 4 == 0, **more))
    masked = AttentionCase(0, 450, 2, 4, 4, 64, dtype=dtype, bias="1hqk", bias_dtype="bool", causal=True)
    for alibi in ("", "bh"):
        found += [masked._replace(seqlen_q=rows, alibi=alibi) for rows in (120, 190, 250, 400)]
    for kind in ("same", "float32"):  # a value for each key alone
        shared = AttentionCase(113, 203, 2, 8, 2, dtype=dtype, bias="b11k", bias_dtype=kind)
        found += [shared._replace(head_dim=d, head_dim_v=dv, causal=d > 96) for d, dv in dims]
        found += [shared._replace(seqlen_q=rows, seqlen_k=450, causal=True) for rows in (120, 190, 250, 400)]
        found += [shared._replace(seqlen_k=4200, head_dim=d, head_dim_v=d) for d in (96, 128)]
    return found


def singles() -> list[AttentionCase]:
    base = AttentionCase(113, 203, 2, 6, 2, 64, dtype="float32")
    more: tuple[dict[str, Any], ...] = (
        {"sinks": "float32"},
        {"alibi": "bh"},
        {"bias": "bhqk"},
        {"bias": "b11k", "bias_dtype": "bool"},
        {"softcap": 15.0, "sinks": "float32", "alibi": "h", "bias": "1hqk", "window_size": (60, 20)},
    )
    return [base._replace(causal=c, **m) for m in more for c in (False, True)]


def few_keys(dtype: str) -> list[Case]:
    """Rows that see one to eight keys, where every rounded weight shows: all keys, or a window over many.

    A tile of keys may end inside of a window. Softcaps on both sides of what the Hopper kernel bounds in bf16.
    """
    features: tuple[dict[str, Any], ...] = (
        {}, {"softcap": 15.0}, {"softcap": 50.0, "softmax_scale": 1.5}, {"softcap": 90.0}, {"softmax_scale": 3.0},
        {"sinks": "float32"}, {"softcap": 30.0, "sinks": "same"}, {"alibi": "bh"}, {"softcap": 15.0, "alibi": "h"},
    )  # fmt: skip
    dims = ((64, 64), (128, 128), (64, 256))
    found: list[Case] = []
    for i, (more, (d, dv)) in enumerate(itertools.product(features, dims)):
        base = AttentionCase(130, 0, 2, 4, 2, d, dv, dtype, **more)
        found += [base._replace(seqlen_k=n) for n in (1, 2, 3, 5, 8)]
        windows = ((0, 0), (1, 0), (4, 3))
        found += [base._replace(seqlen_k=200, window_size=window) for window in windows]
        found += [base._replace(seqlen_q=q, seqlen_k=k, causal=True) for q, k in ((8, 8), (3, 5), (20, 8))]
        found.append(VarlenCase((511, 60), (1, 1), head_dim=d, head_dim_v=dv, dtype=dtype, **more))
        found.append(VarlenCase((511, 3, 8), (1, 2, 8), (), (), 3, 2, 4, 2, d, dv, dtype, causal=bool(i % 2), **more))
    for shape, kind, n in itertools.product(("bhqk", "1h1k"), ("same", "float32", "bool"), (1, 2, 8)):
        found.append(AttentionCase(130, n, 2, 4, 2, 64, dtype=dtype, bias=shape, bias_dtype=kind))
    return found


SINK_ALONE = [
    AttentionCase(40, 9, 1, 4, 4, 64, dtype=dtype, softcap=softcap, causal=True, sinks="float32")
    for dtype in HALVES
    for softcap in (0.0, 15.0, 50.0, 56.0, 90.0)
]

register(SINK_ALONE)
for _dtype in HALVES:
    register(few_keys(_dtype))
    register([*sinks(_dtype), *alibis(_dtype), *biases(_dtype), *mixtures(_dtype), *wide(_dtype)])
    register(biased(_dtype))
register(singles())


@pytest.fixture(scope="module", autouse=True)
def _compiled() -> None:
    compile_registered()


@pytest.mark.parametrize("dtype", HALVES)
def test_sinks(dtype: str) -> None:
    check_all(sinks(dtype), "cuda")


@pytest.mark.parametrize("dtype", HALVES)
def test_alibi(dtype: str) -> None:
    check_all(alibis(dtype), "cuda")


@pytest.mark.parametrize("dtype", HALVES)
def test_bias_of_any_broadcast_and_dtype(dtype: str) -> None:
    check_all(biases(dtype), "cuda")


@pytest.mark.parametrize("dtype", HALVES)
def test_biases_of_every_configuration(dtype: str) -> None:
    check_all(biased(dtype), "cuda")


@pytest.mark.parametrize("dtype", HALVES)
def test_mixtures(dtype: str) -> None:
    check_all([*mixtures(dtype), *wide(dtype)], "cuda")


@pytest.mark.parametrize("dtype", HALVES)
def test_few_keys(dtype: str) -> None:
    check_all(few_keys(dtype), "cuda")


@pytest.mark.parametrize("dtype", HALVES)
def test_a_row_with_one_key_has_its_value(dtype: str) -> None:
    wrong = []
    for case in filter(one_key, few_keys(dtype)):
        t = tensors(case, "cuda")
        known = truth(case, t)
        for name in kernel_names(case):
            with only(name):
                out, _ = attention(case, t)
            if not same_bits(out, known.out.to(out.dtype)):
                wrong.append(f"{case} {name}")
    assert not wrong


@pytest.mark.parametrize("case", SINK_ALONE, ids=str)
def test_a_sink_alone_is_the_lse_of_a_row_without_keys(case: AttentionCase) -> None:
    sinks = torch.tensor([-70.0, -200.0, 30.0, -math.inf], device="cuda")
    t = tensors(case, "cuda") | {"sinks": sinks}
    known = truth(case, t)
    for name in kernel_names(case):
        with only(name):
            out, lse = attention(case, t)
        assert judge(case, t, out, lse, known) == []
        assert bool((lse[0, :, :31] == sinks[:, None]).all())


def test_variants_in_float32() -> None:
    check_all(singles(), "cuda")


# ---------------------------------------------------------------------------------------------------------------------
# the case functions below take the device, so that test_attention.py runs them on the CPU too


def check_bias_strides(device: str, dtype: str = "bfloat16") -> None:
    """A bias with padded, transposed, expanded or unaligned memory gives the bits of the same bias in order."""
    case = AttentionCase(33, 77, 2, 4, 2, 32, dtype=dtype, bias="bhqk")
    t = tensors(case, device)
    for bias in (t["bias"], t["bias"].float(), t["bias"] > 0):
        b, h, q, k = bias.shape
        padded = torch.zeros((b, h, q + 1, k + 3), dtype=bias.dtype, device=device)
        padded[:, :, :q, 1 : k + 1] = bias
        shapes = {
            "padded and unaligned": padded[:, :, :q, 1 : k + 1],
            "transposed": bias.transpose(2, 3).contiguous().transpose(2, 3),
            "heads last": bias.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2),
        }
        want, want_lse = attention(case, t | {"bias": bias})
        for name, view in shapes.items():
            out, lse = attention(case, t | {"bias": view})
            assert same_bits(out, want) and same_bits(lse, want_lse), f"{name} {bias.dtype}"
        row = bias[:, :1, :1]
        expanded, _ = attention(case, t | {"bias": row.expand(b, h, q, k)})
        assert same_bits(expanded, attention(case, t | {"bias": row})[0]), f"expanded {bias.dtype}"
        copied = t | {"bias": row.expand(b, h, q, k).contiguous()}  # which all queries share no more: other tiles
        out, lse = attention(case, copied)
        assert judge(case, copied, out, lse) == [] and judge(case, copied, expanded, lse) == [], "copied"


def check_masked_rows(device: str, dtype: str = "bfloat16") -> None:
    """Rows whose bias is -inf or False everywhere: zeros and -inf, or the sink; their neighbours do not notice."""
    case = AttentionCase(70, 130, 2, 4, 2, 64, dtype=dtype, bias="bhqk", bias_dtype="float32", sinks="float32")
    t = tensors(case, device)
    sink = t.pop("sinks")
    t["bias"][:, 1, 3] = t["bias"][0, :, 64:] = -math.inf
    t["bias"][1, 2, :, :100] = -math.inf  # whole key tiles hidden, the tail seen
    hidden = (t["bias"] == -math.inf).all(-1)
    for bias in (t["bias"], t["bias"] != -math.inf, t["bias"].to(t["q"].dtype)):
        out, lse = attention(case, t | {"bias": bias})
        assert judge(case, t | {"bias": bias}, out, lse) == []
        assert not bool(out.transpose(1, 2)[hidden].any()) and bool((lse[hidden] == -math.inf).all())
        out, lse = attention(case, t | {"bias": bias, "sinks": sink})
        assert judge(case, t | {"bias": bias, "sinks": sink}, out, lse) == []
        assert not bool(out.transpose(1, 2)[hidden].any())


def check_extreme_values(device: str, dtype: str) -> None:
    """Huge, equal, tiny and infinite scores, and values at the edge of the dtype: finite and right."""
    case = AttentionCase(100, 150, 2, 4, 2, 64, dtype=dtype)
    # sums of 150 values are kept in float32 before they are divided: leave them room
    top = float(torch.finfo(getattr(torch, dtype)).max) / (1 if dtype == "float16" else 256)
    t = tensors(case, device)
    q, k, v = t["q"], t["k"], t["v"]

    def near(label: str, arrays: Arrays, limit: float, **options: Any) -> None:
        out, lse = flash_attention(**arrays, return_lse=True, **options)
        ref, ref_lse = attend(**arrays, dtype=torch.float64, **options)
        assert bool(out.isfinite().all()) and bool(lse.isfinite().all()), f"{label}: not finite"
        # by rows, and relative to the largest value that a row can mix: a row may cancel to nearly nothing
        scale = float(arrays["v"].double().abs().max())
        error = float((out.double() - ref).abs().max()) / scale
        assert error <= limit, f"{label}: error {error:.3g}, allowed {limit:.3g}"
        off = float(((lse.double() - ref_lse).abs() / ref_lse.abs().clamp(min=1.0)).max())
        assert off <= 2e-5, f"{label}: lse is off by {off:.3g}"

    fine, coarse = 1e-5 if dtype == "float32" else 2.0**-8, 2e-2  # coarse: a rounding of 1e4 decides between two keys
    near("scores of 1e4", {"q": q * 100, "k": k * 100, "v": v}, coarse, softmax_scale=1.0 / 8)
    near("equal scores", {"q": q, "k": k[:, :1].expand(k.shape), "v": v}, fine)
    near("subnormal inputs", {"q": q * 1e-7, "k": k * 1e-7, "v": v}, fine)
    near("values at the top of the dtype", {"q": q, "k": k, "v": torch.full_like(v, top)}, fine)
    near("both signs at the top", {"q": q, "k": k, "v": torch.where(v > 0, top / 2, -top / 2).to(v.dtype)}, fine)
    near("products above the dtype", {"q": q.abs() * 120, "k": k.abs() * 120, "v": v}, coarse, softmax_scale=1e-4)
    near("subnormal values", {"q": q, "k": k, "v": v * 1e-7}, 2.0**-3 if dtype == "float16" else fine)
    want: Any = flash_attention(q, k, v)
    found: Any
    for sink in (-1e4, -math.inf):
        found = flash_attention(q, k, v, sinks=torch.full((4,), sink, device=device), return_lse=True)
        out, lse = found
        assert relative_error(out.double(), want.double()) < fine and bool(lse.isfinite().all()), f"a sink of {sink}"
    out, lse = flash_attention(q, k, v, sinks=torch.full((4,), 1e4, device=device), return_lse=True)
    assert not bool(out.any()) and bool((lse == 1e4).all()), "a sink of 1e4 takes everything"


def check_nan_stays_in_its_row(device: str, dtype: str = "bfloat16") -> None:
    """A NaN query spoils its own row; a NaN key the rows that see it; NaN in another batch or head spoils nothing."""
    case = AttentionCase(70, 90, 3, 4, 2, 64, dtype=dtype, causal=True)
    t = tensors(case, device)
    want, want_lse = attention(case, t)

    def spoiled(name: str, where: Any, rows: Any) -> None:
        bad = t | {name: t[name].clone()}
        bad[name][where] = math.nan
        out, lse = attention(case, bad)
        hit = torch.zeros(want.shape[:3], dtype=torch.bool, device=device)
        hit[rows] = True
        assert bool(out[hit].isnan().all()), f"NaN in {name}{where} did not reach its rows"
        assert same_bits(out[~hit], want[~hit]), f"NaN in {name}{where} reached other rows"
        assert same_bits(lse.transpose(1, 2)[~hit], want_lse.transpose(1, 2)[~hit])

    everything = slice(None)
    spoiled("q", (1, 17, 2), (1, 17, 2))
    spoiled("q", (0, 69, 0, 5), (0, 69, 0))
    # key 40 is seen from query 40 - (90 - 70) = 20 on, by the two query heads of key head 1
    spoiled("k", (1, 40, 1, 3), (1, slice(20, None), slice(2, None)))
    # the last tile of batch 0 reaches into batch 1, and that of a head into the next one
    spoiled("v", (1,), (1,))
    spoiled("k", (2,), (2,))
    spoiled("v", (everything, everything, 1), (everything, everything, slice(2, None)))
    if device == "cpu":  # matrix units multiply hidden values by 0, and 0 * NaN is NaN: only the host promises this
        spoiled("v", (1, 40, 1), (1, slice(20, None), slice(2, None)))


def check_lowest_bias(device: str, dtype: str = "bfloat16") -> None:
    """The lowest finite number as a mask, as many libraries use it: hidden where another key is seen, never NaN."""
    for bias_dtype in {"float32", dtype}:
        case = AttentionCase(64, 150, 1, 2, 2, 64, dtype=dtype, bias="qk", bias_dtype=bias_dtype)
        t = tensors(case, device)
        t["bias"] = torch.zeros_like(t["bias"])
        t["bias"][:, 40:] = t["bias"][5] = torch.finfo(t["bias"].dtype).min
        out, lse = attention(case, t)
        ref, _ = attend(t["q"], t["k"][:, :40], t["v"][:, :40], dtype=torch.float64)
        others = torch.arange(64, device=device) != 5
        assert row_error(out[:, others], ref[:, others]) <= TOLERANCES[dtype].row, bias_dtype
        assert bool(out.isfinite().all()) and not bool(lse.isnan().any()), bias_dtype


@pytest.mark.usefixtures("kernel")
@pytest.mark.parametrize("dtype", HALVES)
def test_bias_strides(dtype: str) -> None:
    check_bias_strides("cuda", dtype)


@pytest.mark.usefixtures("kernel")
@pytest.mark.parametrize("dtype", [*HALVES, "float32"])
def test_masked_rows(dtype: str) -> None:
    check_masked_rows("cuda", dtype)


@pytest.mark.usefixtures("kernel")
@pytest.mark.parametrize("dtype", [*HALVES, "float32"])
def test_extreme_values(dtype: str) -> None:
    check_extreme_values("cuda", dtype)


@pytest.mark.usefixtures("kernel")
@pytest.mark.parametrize("dtype", [*HALVES, "float32"])
def test_nan_stays_in_its_row(dtype: str) -> None:
    check_nan_stays_in_its_row("cuda", dtype)


@pytest.mark.usefixtures("kernel")
@pytest.mark.parametrize("dtype", [*HALVES, "float32"])
def test_lowest_bias(dtype: str) -> None:
    check_lowest_bias("cuda", dtype)
