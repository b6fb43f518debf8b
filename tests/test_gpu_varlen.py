"""Packed sequences on the GPU: lengths of every kind, unused and poisoned rows, and every feature that varlen has."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pytest
from test_gpu_truth import attend_varlen, attention, check_all, compile_registered, register, same_bits, tensors

import flashmoe_cupy
from flashmoe_cupy.testing import TOLERANCES, AttentionCase, VarlenCase, compare_lse, relative_error

torch = pytest.importorskip("torch")
pytestmark = [pytest.mark.gpu, pytest.mark.torch]

HALVES = ("bfloat16", "float16")
LONGEST = ((1, 3), (2, 1), (511, 1), (3, 513), (307, 256), (512, 256), (2048, 2048))


def lengths(longest: int, how: str, rng: np.random.Generator, batch: int = 9) -> tuple[int, ...]:
    """As in FlashAttention's tests: nearly full at random, from a third on, or full; "zeros" empties every third."""
    if how == "full":
        return (longest,) * batch
    low = {"random": max(1, longest - 20), "third": max(1, longest // 3), "zeros": 1}[how]
    drawn = [int(x) for x in rng.integers(low, longest + 1, batch)]
    return tuple(0 if how == "zeros" and i % 3 == 1 else n for i, n in enumerate(drawn))


def grid(dtype: str, head_dim: int, used: bool) -> list[VarlenCase]:
    """Every size and kind of length; with `used`, each sequence owns rows that do not count, and tails are poisoned."""
    rng = np.random.default_rng(head_dim + used)
    cases = []
    for i, ((q, k), how) in enumerate(itertools.product(LONGEST, ("random", "third", "full", "zeros"))):
        nq, nk = lengths(q, how, rng), lengths(k, how, rng)
        if i % 4 == 3:
            nk = nk[1:] + nk[:1]  # sequences that have queries but no keys, and keys but no queries
        more: dict[str, Any] = {"causal": bool(i % 2), "heads_q": 6, "heads_k": (6, 2, 1)[i % 3]}
        case = VarlenCase(nq, nk, head_dim=head_dim, dtype=dtype, **more)
        if used:
            spare_q, spare_k = rng.integers(0, 20, (2, len(nq)))
            case = case._replace(
                lengths_q=tuple(int(a + b) for a, b in zip(nq, spare_q, strict=True)), used_q=nq, tail_q=17,
                lengths_k=tuple(int(a + b) for a, b in zip(nk, spare_k, strict=True)), used_k=nk, tail_k=300,
            )  # fmt: skip
        cases.append(case)
    return cases


def variants(dtype: str) -> list[VarlenCase]:
    rng = np.random.default_rng(7)
    features: tuple[dict[str, Any], ...] = (
        {"window_size": (30, 10)},
        {"window_size": (0, 0)},
        {"window_size": (128, 0), "causal": True, "sinks": "same"},
        {"sinks": "float32"},
        {"softcap": 15.0},
        {"alibi": "h", "causal": True},
        {"alibi": "bh"},
        {"softcap": 15.0, "alibi": "bh", "sinks": "same", "window_size": (60, 20)},
    )
    sizes = [(lengths(q, "zeros", rng, 5), lengths(k, "random", rng, 5)) for q, k in ((3, 513), (307, 256), (512, 600))]
    return [VarlenCase(*n, heads_q=4, heads_k=2, dtype=dtype, **f) for n in sizes for f in features]


def dims(dtype: str) -> list[VarlenCase]:
    rng = np.random.default_rng(8)
    pairs = ((40, 40), (80, 80), (96, 96), (192, 128), (256, 256), (64, 256), (64, 512))
    sizes = lengths(150, "third", rng), lengths(200, "zeros", rng)
    return [
        VarlenCase(*sizes, heads_q=4, heads_k=2, head_dim=d, head_dim_v=dv, dtype=dtype, causal=causal)
        for d, dv in pairs
        for causal in (False, True)
    ]


def singles() -> list[VarlenCase]:
    return [*grid("float32", 64, True)[:16], *dims("float32"), *variants("float32")]


for _dtype in HALVES:
    register([*grid(_dtype, 64, True), *grid(_dtype, 128, False), *variants(_dtype), *dims(_dtype)])
register(singles())


@pytest.fixture(scope="module", autouse=True)
def _compiled() -> None:
    compile_registered()


@pytest.mark.parametrize("used", [False, True])
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("dtype", HALVES)
def test_lengths(dtype: str, head_dim: int, used: bool) -> None:
    check_all(grid(dtype, head_dim, used), "cuda")


@pytest.mark.parametrize("dtype", HALVES)
def test_variants(dtype: str) -> None:
    check_all(variants(dtype), "cuda")


@pytest.mark.parametrize("dtype", HALVES)
def test_head_dims(dtype: str) -> None:
    check_all(dims(dtype), "cuda")


def test_float32() -> None:
    check_all(singles(), "cuda")


# ---------------------------------------------------------------------------------------------------------------------
# case functions that take the device


def check_same_as_dense(device: str, dtype: str = "bfloat16") -> None:
    """Equal lengths packed give what the dense function gives."""
    dense = AttentionCase(70, 90, 3, 4, 2, 64, dtype=dtype, causal=True, sinks="float32", alibi="bh")
    packed = VarlenCase((70,) * 3, (90,) * 3, heads_q=4, heads_k=2, dtype=dtype, causal=True)
    packed = packed._replace(sinks="float32", alibi="bh")
    t = tensors(dense, device)
    flat = {n: x.flatten(0, 1) if n in "qkv" else x for n, x in t.items()}
    flat |= {n: torch.from_numpy(x).to(device) for n, x in packed.indices().items()}
    (out, lse), (want, want_lse) = attention(packed, flat), attention(dense, t)
    want, want_lse = want.flatten(0, 1), want_lse.transpose(0, 1).flatten(1)
    assert relative_error(out.double(), want.double()) <= TOLERANCES[dtype].norm
    assert compare_lse(lse, want_lse, atol=TOLERANCES[dtype].lse)


def check_rows_of_nobody(device: str, dtype: str = "bfloat16") -> None:
    """Rows that no sequence covers: 0 and -inf where the library allocates, as they were in a caller's out."""
    case = VarlenCase((5, 0, 70), (9, 4, 80), (3, 0, 70), (9, 0, 66), tail_q=8, tail_k=5, heads_q=4, dtype=dtype)
    t = tensors(case, device)
    ref, _, counts = attend_varlen(case, t, torch.float64)
    out, lse = attention(case, t)
    assert not bool(out[~counts].any()) and bool((lse[:, ~counts] == -math.inf).all())
    assert bool(out[counts].isfinite().all())
    mine = torch.full_like(out, 7.0)
    again, lse_again = attention(case, t, out=mine)
    assert again is mine and bool((mine[~counts] == 7.0).all())
    assert same_bits(mine[counts], out[counts]) and same_bits(lse, lse_again)
    assert relative_error(mine[counts], ref[counts]) <= TOLERANCES[dtype].norm


def check_loose_maxima(device: str, dtype: str = "bfloat16") -> None:
    """max_seqlen_q and max_seqlen_k may be larger than any sequence: the same bits."""
    case = VarlenCase((70, 3, 0), (33, 90, 12), heads_q=4, dtype=dtype, causal=True)
    t = tensors(case, device)
    options = case.options()
    want = flashmoe_cupy.flash_attention_varlen(**t, **options)
    for more in ({"max_seqlen_q": 1000}, {"max_seqlen_k": 1000}, {"max_seqlen_q": 300, "max_seqlen_k": 5000}):
        assert same_bits(flashmoe_cupy.flash_attention_varlen(**t, **(options | more)), want), more


def check_no_sequences(device: str, dtype: str = "bfloat16") -> None:
    """No sequence, only empty sequences, no query, no key: shapes are right, nothing is NaN."""
    for case in (
        VarlenCase((), (), heads_q=4, dtype=dtype),
        VarlenCase((), (), heads_q=4, dtype=dtype, tail_q=3, tail_k=2),
        VarlenCase((0, 0), (0, 0), heads_q=4, dtype=dtype),
        VarlenCase((0, 0), (5, 3), heads_q=4, dtype=dtype),
        VarlenCase((4, 3), (0, 0), heads_q=4, dtype=dtype),
        VarlenCase((4, 3), (2, 3), (0, 0), (0, 0), heads_q=4, dtype=dtype),
    ):
        out, lse = attention(case, tensors(case, device))
        rows = sum(case.lengths_q) + case.tail_q
        assert tuple(out.shape) == (rows, 4, 64) and tuple(lse.shape) == (4, rows), case
        assert not bool(out.any()) and bool((lse == -math.inf).all()), case


def check_short_way(device: str, dtype: str = "bfloat16") -> None:
    """Calls on arrays like earlier ones go a short way, with the same bits; so do those that it is not for."""
    case = VarlenCase((5, 0, 70), (9, 4, 66), tail_q=8, tail_k=5, heads_q=4, heads_k=2, dtype=dtype)
    alike = VarlenCase((5, 0, 70), (5, 0, 70), tail_q=8, tail_k=8, heads_q=4, heads_k=4, dtype=dtype)
    t, same = tensors(case, device), tensors(alike, device)
    same |= {"cu_seqlens_k": same["cu_seqlens_q"], "k": same["q"]}
    odd = t | {"q": torch.cat([t["q"].flatten()[:1], t["q"].flatten()])[1:].view_as(t["q"])}  # 16 bytes do not fit
    for shape, arrays in ((case, t), (alike, same), (case, odd)):
        out, lse = attention(shape, arrays)
        counts = attend_varlen(shape, arrays, torch.float32)[2]
        for _ in range(3):
            other = {n: x if n == "q" and arrays is odd else x.clone() for n, x in arrays.items()}
            if arrays is same:
                other |= {"cu_seqlens_k": other["cu_seqlens_q"], "k": other["q"]}
            torch.full_like(out, math.nan)  # freed at once: what new arrays are likely to lie on
            again, lse_again = attention(shape, other)
            assert same_bits(again, out) and same_bits(lse_again, lse)
            assert not bool(again[~counts].any()) and bool((lse_again[:, ~counts] == -math.inf).all())
            plain = flashmoe_cupy.flash_attention_varlen(**other, **shape.options())
            assert same_bits(plain, out)
    assert attention(case, t | {"q": t["q"].clone().requires_grad_()})[0].requires_grad


CHECKS = (check_same_as_dense, check_rows_of_nobody, check_loose_maxima, check_no_sequences, check_short_way)


@pytest.mark.usefixtures("kernel")
@pytest.mark.parametrize("dtype", [*HALVES, "float32"])
@pytest.mark.parametrize("check", CHECKS, ids=lambda f: f.__name__)
def test_packing(check: Any, dtype: str) -> None:
    check("cuda", dtype)


@pytest.mark.usefixtures("kernel")
def test_offsets_are_read_on_the_device_when_the_kernel_runs() -> None:
    """New lengths written into the same cu_seqlens take effect: nothing about them is kept from the call before."""
    case = VarlenCase((40, 60), (40, 60), heads_q=4)
    other = case._replace(lengths_q=(70, 30), lengths_k=(10, 90))
    t = tensors(case, "cuda")
    attention(case, t)
    for name, x in other.indices().items():
        t[name].copy_(torch.from_numpy(x))
    out = flashmoe_cupy.flash_attention_varlen(**t, max_seqlen_q=90, max_seqlen_k=90)
    ref, _, _ = attend_varlen(other, t, torch.float32)
    assert relative_error(out, ref) <= TOLERANCES["bfloat16"].norm
