"""Attention without a GPU: NumPy arrays, torch and JAX tensors on the CPU, every feature against the float64 reference.

The second half runs the case functions of the GPU tests on the CPU, so that both back ends answer to the same checks.
"""

from __future__ import annotations

import itertools
import tracemalloc
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import test_attention_gpu as dense
import test_gpu_arrays as arrays
import test_gpu_random as drawn
import test_gpu_streams as streams
import test_gpu_variants as variants
import test_gpu_varlen as varlen
from hypothesis import given, settings
from test_gpu_truth import check_all, registered, specialisations, tensors

import flashmoe_cupy
from flashmoe_cupy.testing import TOLERANCES, AttentionCase, Case, VarlenCase, compare_lse, within_tolerance

DTYPES = ("bfloat16", "float16", "float32")
SIZES = ((1, 1), (5, 7), (13, 4), (1, 40), (64, 128), (70, 300), (130, 131))
LONG = ((3, 2100), (600, 1100), (1100, 600))  # several blocks of keys and of queries

FEATURES: tuple[dict[str, Any], ...] = (
    {},
    {"causal": True},
    {"heads_q": 6, "heads_k": 2, "causal": True},
    {"heads_q": 6, "heads_k": 1, "head_dim": 72},
    {"head_dim": 192, "head_dim_v": 128, "causal": True},
    {"head_dim": 64, "head_dim_v": 512},
    {"head_dim": 8, "head_dim_v": 256},
    {"head_dim": 256},
    {"window_size": (3, 5)},
    {"window_size": (0, 0)},
    {"window_size": (20, -1), "causal": True},
    {"window_size": (-1, 2), "causal": True},
    {"window_size": (-1, 2)},
    {"window_size": (10**6, 10**6)},
    {"softcap": 15.0},
    {"softcap": 0.5, "causal": True},
    {"softmax_scale": 0.0},
    {"softmax_scale": -1.0, "causal": True},
    {"sinks": "float32", "window_size": (8, 0), "causal": True},
    {"sinks": "same", "heads_q": 4},
    {"alibi": "h", "causal": True},
    {"alibi": "bh", "window_size": (9, 4)},
    {"bias": "bhqk"},
    {"bias": "qk", "bias_dtype": "float32", "causal": True},
    {"bias": "b11k", "bias_dtype": "bool"},
    {"bias": "hq1", "bias_dtype": "float32"},
    {"bias": "1h1k", "bias_dtype": "bool", "sinks": "float32"},
    {"bias": "bhqk", "bias_dtype": "float32", "alibi": "bh", "softcap": 5.0, "sinks": "same", "window_size": (30, 9)},
)


def wide(a: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    return a if a.dtype in (np.bool_, np.int32) else a.astype(np.float64)


def wrong(case: Case, out: Any, lse: Any, given: dict[str, Any]) -> list[str]:
    """What is wrong with a NumPy result, against the float64 reference."""
    name = "flash_attention_varlen" if isinstance(case, VarlenCase) else "flash_attention"
    reference = getattr(flashmoe_cupy.reference, name)
    ref, ref_lse = reference(**{n: wide(a) for n, a in given.items()}, **case.options(), return_lse=True)
    if type(out) is not np.ndarray or out.dtype != given["q"].dtype or lse.dtype != np.float32:
        return [f"{case}: got {type(out)}, {out.dtype}, {lse.dtype}"]
    found = within_tolerance(out, ref, case.dtype), compare_lse(lse, ref_lse, atol=TOLERANCES[case.dtype].lse)
    return [f"{case}: {verdict.text}" for verdict in found if not verdict]


@pytest.mark.parametrize("features", FEATURES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
def test_numpy_against_the_reference(dtype: str, features: dict[str, Any]) -> None:
    failures = []
    for seed, (q, k) in enumerate((*SIZES, *LONG) if dtype == "float32" else SIZES):
        case = AttentionCase(q, k, dtype=dtype)._replace(**features)
        given = case.random(seed)
        out, lse = flashmoe_cupy.flash_attention(**given, **case.options(), return_lse=True)
        failures += wrong(case, out, lse, given)
    assert not failures, "\n".join(failures)


PACKED = (
    VarlenCase((3, 0, 70), (5, 2, 66)),
    VarlenCase((3, 0, 70), (5, 2, 66), causal=True, heads_q=6),
    VarlenCase((9, 5, 40, 1), (9, 0, 50, 3), (7, 5, 0, 1), (2, 0, 50, 3), 4, 6, causal=True),
    VarlenCase((20, 30), (31, 10), window_size=(6, 2), sinks="float32", alibi="bh", softcap=4.0, heads_q=4),
    VarlenCase((20, 30), (31, 10), head_dim=40, head_dim_v=72, sinks="same", alibi="h", causal=True),
    VarlenCase((), (), tail_q=3, tail_k=1),
    VarlenCase((0, 4), (3, 0)),
)


@pytest.mark.parametrize("dtype", DTYPES)
def test_numpy_varlen_against_the_reference(dtype: str) -> None:
    failures = []
    for seed, case in enumerate(c._replace(dtype=dtype) for c in PACKED):
        given = case.random(seed)
        out, lse = flashmoe_cupy.flash_attention_varlen(**given, **case.options(), return_lse=True)
        failures += wrong(case, out, lse, given)
    assert not failures, "\n".join(failures)


def test_lse_is_optional_and_out_is_used() -> None:
    given = AttentionCase(9, 12, dtype="float32").random()
    out, lse = flashmoe_cupy.flash_attention(**given, return_lse=True)
    alone = flashmoe_cupy.flash_attention(**given)
    assert lse.shape == (2, 2, 9) and np.array_equal(alone, out)
    mine = np.full_like(out, np.nan)
    assert flashmoe_cupy.flash_attention(**given, out=mine) is mine and np.array_equal(mine, out)


def test_inputs_are_not_changed() -> None:
    case = AttentionCase(40, 50, sinks="float32", alibi="bh", bias="bhqk", causal=True)
    given = case.random()
    for a in given.values():
        a.flags.writeable = False  # a read-only array is a legal input, and this catches whoever writes
    flashmoe_cupy.flash_attention(**given, **case.options())


def test_negative_strides() -> None:
    given = AttentionCase(9, 12, dtype="float32").random()
    turned = {n: a[::-1, ::-1, ::-1] for n, a in given.items()}
    out = flashmoe_cupy.flash_attention(**turned)
    copies: dict[str, Any] = {n: np.ascontiguousarray(a) for n, a in turned.items()}
    want = flashmoe_cupy.flash_attention(**copies)
    np.testing.assert_allclose(out, want, rtol=1e-5, atol=1e-6)


def test_last_dimension_of_size_one_may_have_any_stride() -> None:
    """heads of a (1, 1) bias column: a size-1 dimension has no neighbour, so its stride means nothing."""
    case = AttentionCase(9, 12, dtype="float32", bias="bhq1")
    given = case.random()
    given["bias"] = np.broadcast_to(given["bias"], (2, 2, 9, 12))[..., ::12]
    out, lse = flashmoe_cupy.flash_attention(**given, return_lse=True)
    assert wrong(case, out, lse, given) == []


def test_memory_is_linear_in_the_length() -> None:
    """6000 x 6000 scores would take 137 MiB in float32."""
    given = AttentionCase(6000, 6000, batch=1, heads_q=1, heads_k=1, head_dim=8, dtype="float32", causal=True).random()
    tracemalloc.start()
    try:
        flashmoe_cupy.flash_attention(**given, causal=True)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 40 << 20, f"{peak / 2**20:.0f} MiB"


# ---------------------------------------------------------------------------------------------------------------------
# the GPU tests' own functions, on the CPU

torch = pytest.importorskip("torch")


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    """Torch's threads only cost time on problems this small, above all beside other work."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("arch", ["sm_80", "sm_90a", "sm_120"])
def test_gpu_tests_use_every_configuration(arch: str) -> None:
    """Whatever configuration a call can choose is chosen by at least one problem of the GPU tests."""
    from flashmoe_cupy.plan.kernels import of_task

    assert all((dense, variants, varlen, arrays, streams, drawn))  # importing them has registered their problems
    used = set(specialisations(registered(), arch).values())
    kernels = of_task("attention_fwd")
    every = {f"{name} {config.name}" for name, kernel in kernels.items() for config in kernel.configs(arch)}
    assert every - used == set()


def small_grid() -> list[AttentionCase]:
    """One or two of each grid of the GPU tests, cut to sizes that a CPU does at once."""
    grid = itertools.product(((1, 1), (33, 80), (79, 3)), ((6, 6), (6, 1)), (False, True), (64, 72))
    cases = [AttentionCase(*s, 2, *h, d, dtype=DTYPES[i % 3], causal=c) for i, (s, h, c, d) in enumerate(grid)]
    for source in (variants.sinks, variants.alibis, variants.biases, variants.mixtures, variants.wide):
        picked = source("bfloat16")[::9]
        cases += [c._replace(seqlen_q=min(c.seqlen_q, 60), seqlen_k=min(c.seqlen_k, 90)) for c in picked]
    return cases


def test_small_grid() -> None:
    check_all(small_grid(), "cpu")


def test_small_varlen_grid() -> None:
    short = [c for c in varlen.grid("bfloat16", 64, True) if max(*c.lengths_q, *c.lengths_k) < 30]
    check_all([*short, *varlen.variants("float16")[:8:3], *varlen.dims("float32")[::5]], "cpu")


@settings(max_examples=20)
@given(drawn.dense_problems())
def test_random_problems(problem: drawn.Drawn) -> None:
    assert drawn.wrong(problem, "cpu") == []


@settings(max_examples=20)
@given(drawn.packed_problems())
def test_random_packed_problems(problem: drawn.Drawn) -> None:
    assert drawn.wrong(problem, "cpu") == []


DEVICE_CHECKS = (
    *arrays.CHECKS,
    *varlen.CHECKS,
    variants.check_masked_rows,
    variants.check_extreme_values,
    variants.check_nan_stays_in_its_row,
    variants.check_bias_strides,
    variants.check_lowest_bias,
)


@pytest.mark.parametrize("check", DEVICE_CHECKS, ids=lambda f: f.__name__)
@pytest.mark.parametrize("dtype", DTYPES)
def test_same_checks_as_on_the_gpu(check: Any, dtype: str) -> None:
    check("cpu", dtype)


LIBRARIES = {
    "numpy": (arrays.to_numpy, "numpy"),
    "dlpack": (arrays.Dlpack, "numpy"),
    "jax": (arrays.to_jax, "jax"),
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("library", [pytest.param(n, marks=pytest.mark.jax) if n == "jax" else n for n in LIBRARIES])
def test_what_goes_in_comes_out(library: str, dtype: str) -> None:
    if library == "jax":
        pytest.importorskip("jax")
    arrays.check_library("cpu", *LIBRARIES[library], dtype)


@pytest.mark.parametrize("library", ["numpy", pytest.param("jax", marks=pytest.mark.jax)])
def test_empty_arrays_of_every_library(library: str) -> None:
    if library == "jax":
        pytest.importorskip("jax")
    arrays.check_zero_size_library(LIBRARIES[library][0], "cpu")


def test_torch_no_grad_and_detached_tensors_run() -> None:
    t = {n: x.requires_grad_() for n, x in tensors(arrays.BASE, "cpu").items()}
    with torch.no_grad():
        out = flashmoe_cupy.flash_attention(**t, causal=True)
    assert not out.requires_grad
    assert torch.equal(out, flashmoe_cupy.flash_attention(**{n: x.detach() for n, x in t.items()}, causal=True))
