"""Dense attention on the GPU: sizes, heads, head dimensions, causal, windows, softcap, fp32, by FlashAttention's rule.

Each test runs many problems and lists all that failed. The truth and the rules are in test_gpu_truth.py.
"""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from test_gpu_truth import attention, check_all, compile_registered, register, tensors

from flashmoe_cupy.testing import AttentionCase

torch = pytest.importorskip("torch")
pytestmark = [pytest.mark.gpu, pytest.mark.torch]

SIZES = (
    (1, 1), (64, 128), (128, 192), (256, 256), (239, 1), (799, 3), (113, 203), (113, 128), (128, 217), (113, 211),
    (108, 256), (256, 512), (384, 256), (640, 128), (512, 256), (1024, 1024), (1023, 1024), (1024, 1023), (4096, 4096),
    (4224, 4224),
)  # fmt: skip
SHORT = tuple(s for s in SIZES if max(s) <= 1024)
HALVES = ("bfloat16", "float16")
HEADS = ((6, 6), (6, 2), (6, 1))
DIMS = (64, 96, 128, 192, 256)
ODD_DIMS = (8, 16, 24, 32, 40, 72, 80, 104, 136, 160, 224, 248)
DIM_PAIRS = ((192, 128), (64, 256), (64, 512), (128, 64), (128, 96))


def batch(seqlen_q: int, seqlen_k: int) -> int:
    return 9 if max(seqlen_q, seqlen_k) <= 2048 else 2


def dense(dtype: str, heads: tuple[int, int], causal: bool, head_dim: int) -> list[AttentionCase]:
    return [AttentionCase(q, k, batch(q, k), *heads, head_dim, dtype=dtype, causal=causal) for q, k in SIZES]


def odd_dims(dtype: str, head_dim: int) -> list[AttentionCase]:
    sizes = ((1, 1), (113, 203), (239, 1), (128, 217), (256, 512), (1023, 1024))
    grid = itertools.product(sizes, (False, True))
    return [AttentionCase(*s, 3, 6, 2, head_dim, dtype=dtype, causal=causal) for s, causal in grid]


def split_dims(dtype: str, dims: tuple[int, int]) -> list[AttentionCase]:
    sizes = ((1, 1), (113, 203), (799, 3), (256, 512), (640, 128), (1024, 1024))
    grid = itertools.product(sizes, ((6, 6), (6, 1)), (False, True))
    return [AttentionCase(*s, 3, *heads, *dims, dtype=dtype, causal=causal) for s, heads, causal in grid]


def windows(dtype: str, head_dim: int) -> list[AttentionCase]:
    """Two random windows for each size, some far wider and some far narrower than it, and the corner cases."""
    rng = np.random.default_rng(head_dim)
    cases = []
    for q, k in SIZES:
        drawn = [tuple(int(x) for x in rng.integers(-1, (k // 4 + 2, 2 * k + 2)[i], 2)) for i in range(2)]
        corners = [(-1, 0), (0, -1), (0, 0), (k + q, k + q)] if max(q, k) <= 1024 else [(1024, 0)]
        for i, (left, right) in enumerate((*drawn, *corners)):
            heads, causal = (6, (6, 2, 1)[i % 3]), bool(i % 2)
            case = AttentionCase(q, k, 3, *heads, head_dim, dtype=dtype, causal=causal, window_size=(left, right))
            cases.append(case)
    return cases


def bottom_right(dtype: str) -> list[AttentionCase]:
    sizes = ((512, 256), (799, 3), (1, 339), (3, 799))
    return [AttentionCase(*s, 3, 6, 2, d, dtype=dtype, causal=True) for s in sizes for d in DIMS]


def softcaps(dtype: str) -> list[AttentionCase]:
    grid = itertools.product(((113, 203), (799, 3), (1024, 1023), (4096, 4096)), (15.0, 30.0, 50.0, 90.0), (64, 128))
    cases = [AttentionCase(*s, 2, 4, 2, d, dtype=dtype, softcap=cap) for s, cap, d in grid]
    cases = [c._replace(causal=bool(i % 2), softmax_scale=(None, 1.0)[i // 2 % 2]) for i, c in enumerate(cases)]
    for d, scale in itertools.product((96, 128), (None, 1.0)):  # many keys; arguments of tanh that are small, or not
        cases.append(AttentionCase(130, 4200, 1, 2, 1, d, dtype=dtype, softcap=30.0, softmax_scale=scale))
    dims = ((64, 64), (96, 96), (128, 128), (192, 128), (192, 192), (256, 256), (64, 256))
    for (d, dv), cap in itertools.product(dims, (30.0, 90.0)):
        sizes = ((130, 4200), (300, 700), (120, 500), (250, 1300))  # for every tile
        cases += [AttentionCase(*s, 1, 2, 1, d, dv, dtype=dtype, softcap=cap, causal=s[0] < 130) for s in sizes]
    return [*cases, AttentionCase(33001, 33001, 1, 2, 1, 64, dtype=dtype, softcap=30.0, causal=True)]


def singles() -> list[AttentionCase]:
    """fp32 problems. Softcap, window, GQA and head dimensions that do not fill a tile are among them."""
    sizes = ((1, 1), (113, 203), (799, 3), (256, 512), (1023, 1024))
    grid = itertools.product(sizes, ((6, 6), (6, 2)), (False, True), (64, 128))
    cases = [AttentionCase(*s, 2, *h, d, dtype="float32", causal=causal) for s, h, causal, d in grid]
    for d, dv in ((8, 8), (40, 40), (80, 80), (192, 128), (256, 256), (64, 256), (64, 512)):
        cases += [AttentionCase(*s, 2, 4, 2, d, dv, "float32", causal=c) for s in sizes[1:] for c in (False, True)]
    cases.append(AttentionCase(300, 500, head_dim=64, dtype="float32", window_size=(70, 31), softcap=15.0))
    return [*cases, AttentionCase(4096, 4096, 1, 2, 2, 128, dtype="float32", causal=True)]


for _dtype in HALVES:
    for _d, _causal in itertools.product(DIMS, (False, True)):
        register(dense(_dtype, (6, 2), _causal, _d))
    for _d in ODD_DIMS:
        register(odd_dims(_dtype, _d))
    for _pair in DIM_PAIRS:
        register(split_dims(_dtype, _pair))
    register([*windows(_dtype, 64), *windows(_dtype, 128), *bottom_right(_dtype), *softcaps(_dtype)])
register([*windows("bfloat16", 256), *singles()])


@pytest.fixture(scope="module", autouse=True)
def _compiled() -> None:
    compile_registered()


@pytest.mark.parametrize("head_dim", DIMS)
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("heads", HEADS, ids=str)
@pytest.mark.parametrize("dtype", HALVES)
def test_dense(dtype: str, heads: tuple[int, int], causal: bool, head_dim: int) -> None:
    check_all(dense(dtype, heads, causal, head_dim), "cuda")


@pytest.mark.parametrize("head_dim", ODD_DIMS)
@pytest.mark.parametrize("dtype", HALVES)
def test_head_dims_that_do_not_fill_a_tile(dtype: str, head_dim: int) -> None:
    check_all(odd_dims(dtype, head_dim), "cuda")


@pytest.mark.parametrize("dims", DIM_PAIRS, ids=str)
@pytest.mark.parametrize("dtype", HALVES)
def test_head_dim_of_v_differs(dtype: str, dims: tuple[int, int]) -> None:
    check_all(split_dims(dtype, dims), "cuda")


@pytest.mark.parametrize(
    ("dtype", "head_dim"), [("bfloat16", 64), ("float16", 64), ("bfloat16", 128), ("float16", 128), ("bfloat16", 256)]
)
def test_sliding_window(dtype: str, head_dim: int) -> None:
    check_all(windows(dtype, head_dim), "cuda")


@pytest.mark.parametrize("dtype", HALVES)
def test_causal_is_aligned_bottom_right(dtype: str) -> None:
    check_all(bottom_right(dtype), "cuda")


@pytest.mark.usefixtures("kernel")
def test_rows_without_keys_are_exact_zeros() -> None:
    """Queries that stand before the first key: out 0 and lse -inf, as bits, also from inputs that are huge."""
    for case in bottom_right("bfloat16"):
        t = tensors(case, "cuda")
        hidden = max(case.seqlen_q - case.seqlen_k, 0)
        out, lse = attention(case, t | {"v": t["v"] * 1e30})
        assert not bool(out[:, :hidden].any()), case
        assert bool((lse[:, :, :hidden] == -math.inf).all()), case
        assert bool(lse[:, :, hidden:].isfinite().all()), case


@pytest.mark.parametrize("dtype", HALVES)
def test_softcap(dtype: str) -> None:
    check_all(softcaps(dtype), "cuda")


def test_float32_is_float32() -> None:
    """Relative error to float64 of at most 1e-5: one pass of tf32 would give about 3e-4."""
    check_all(singles(), "cuda")


def test_many_heads_and_batches() -> None:
    """More than 65535 heads, batches and tiles: no grid dimension may overflow."""
    sizes = [(70000, 1), (1, 70000), (300, 300)]
    cases = [AttentionCase(3, 5, b, h, h, 32, causal=True) for b, h in sizes]
    cases.append(AttentionCase(1, 7, 2, 70000, 1, 32))
    cases.append(AttentionCase((1 << 22) + 3, 33, 1, 1, 1, 8, dtype="float16"))
    check_all(cases, "cuda")


def test_softmax_scale_of_any_sign_and_zero() -> None:
    scales = (0.0, -0.125, 1e-3, 3.0, 1e-30)
    check_all([AttentionCase(150, 200, 2, 4, 2, 64, causal=True, softmax_scale=s) for s in scales], "cuda")
