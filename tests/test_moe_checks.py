"""The GPU tests of mixtures of experts as far as they go without one: their checks on the CPU, what they launch."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import sanitize_moe
import test_gpu_moe as experts
import test_gpu_moe_arrays as memory
import test_gpu_moe_products as products
import test_gpu_moe_random as drawn
import test_gpu_moe_route as routes
import test_gpu_moe_streams as streams
from hypothesis import given, settings
from moe_plans import ProductCase, configurations, every_configuration, kernel_names, registered
from test_gpu_arrays import Dlpack, to_jax, to_numpy

from flashmoe_cupy.jit.device import H100, DeviceProperties
from flashmoe_cupy.plan.archs import ARCHS
from flashmoe_cupy.testing_moe import MoECase, RouteCase

torch: Any = pytest.importorskip("torch")
pytestmark = pytest.mark.torch

DTYPES = ("bfloat16", "float16", "float32")
checked = streams.checked  # a fixture


# ---------------------------------------------------------------------------------------------------------------------
# what would be launched


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("sms", [108, 132])
def test_problems_use_every_configuration(arch: str, sms: int) -> None:
    """Of each kernel, on devices of each size, with slow and with fast memory; the sanitizer's few problems too."""
    every, used, few = every_configuration(arch), set(), set()
    for rate in (H100.memory_rate // 2, 2 * H100.memory_rate):
        device = DeviceProperties(sms, rate)
        for case, aligned in registered():
            used |= configurations(case, arch, aligned, device)
        for problem in sanitize_moe.cases():
            few |= configurations(problem, arch, True, device)
    assert sorted(every - used) == [] and sorted(every - few) == []
    assert used <= every and few <= every


def test_both_kernels_run_on_hopper(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("moe_plans.arch_here", lambda: "sm_90a")
    kernel_names.cache_clear()
    assert kernel_names(MoECase(5)) == ["grouped_gemm_sm90", "grouped_gemm_sm80"]
    assert kernel_names(MoECase(5, dtype="float32")) == kernel_names(MoECase(5), False) == ["grouped_gemm_sm80"]
    kernel_names.cache_clear()


def test_sanitizer_problems_run_on_the_cpu() -> None:
    """Their arrays fit the calls, and the results are finite."""
    rng = np.random.default_rng(0)
    for case in sanitize_moe.cases():
        if not (isinstance(case, MoECase) and case.shared > 1000):
            for out in sanitize_moe.call(case, sanitize_moe.arrays_of(case, rng)):
                assert np.isfinite(out.astype(np.float64)).all(), case


# ---------------------------------------------------------------------------------------------------------------------
# the same checks on the CPU


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("grid", experts.GRIDS, ids=lambda f: f.__name__)
def test_grids_of_experts(grid: Any, dtype: str) -> None:
    some = [case for case in grid(dtype) if case.tokens <= 150 and case.experts < 100 and case.shared < 1000]
    experts.check_all(some[::5], "cpu")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("grid", products.GRIDS, ids=lambda f: f.__name__)
def test_grids_of_products(grid: Any, dtype: str) -> None:
    products.check_all(grid(dtype)[::7], "cpu")


@pytest.mark.parametrize("cases", [routes.kinds, routes.sizes, routes.blocks], ids=lambda f: f.__name__)
def test_grids_of_routers(cases: Any) -> None:
    routes.check_all(cases()[::3], "cpu")


def test_large_routers() -> None:
    some = [case for case in routes.peers() if case.tokens == 2048 and case.experts == 128]
    routes.check_all([case for case in some if case.bias][:2] + some[:1], "cpu")


BY_DTYPE = (
    experts.check_decode, experts.check_idle_ends, experts.check_ranks, experts.check_limits, experts.check_extremes,
    experts.check_empty, products.check_rows_alone, streams.check_wild_ids, *memory.CHECKS,
)  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("check", BY_DTYPE, ids=lambda f: f.__name__)
def test_same_checks_as_on_the_gpu(check: Any, dtype: str) -> None:
    check("cpu", dtype)


ONCE = (experts.check_odd_dimensions, routes.check_many_groups, routes.check_ties, routes.check_strange_values)


@pytest.mark.parametrize("check", ONCE, ids=lambda f: f.__name__)
def test_same_checks_once(check: Any) -> None:
    check("cpu")


def test_same_checks_with_sizes() -> None:
    experts.check_invariance("cpu", 120)
    experts.check_clamp(MoECase(20, 96, 96, 4, 4, **experts.OSS), "cpu")
    experts.check_peer(experts.SCATTER[0], "cpu", 1.0, 1e-4, 0.0)
    experts.check_peer(MoECase(*experts.VLLM[0], 8, 2), "cpu", 0.3, 2e-2, 0.0)
    for more in ({"bias": "same", "x_rows": 50}, {"max_rows": 99}):
        products.check_peer(ProductCase(products.around(3, 35, 1), 104, 736, **more), "cpu")
    routes.check_deep_seek("cpu", 100)
    routes.check_one_expert("cpu", 300)
    routes.check_permute("cpu", [s for s in routes.shapes() if s[0] * s[1] < 5000 and s[2] < 5000][::3])


def test_wrong_ids(checked: None) -> None:
    streams.check_wrong_ids("cpu")


def test_nan_logits(checked: None) -> None:
    streams.check_nan_logits("cpu")


@pytest.mark.parametrize("name", [n for n in streams.WORKS if n != "large router"])
def test_works(name: str) -> None:
    """What the tests of streams run is right, its arrays keep their shapes, and its results come twice the same."""
    work = streams.WORKS[name]
    for seed in (0, 3):
        t = work.arrays("cpu", seed)
        out = work.call(**t)
        assert work.wrong(t, out) == [] and all(bool(x.isfinite().all()) for x in out)
        assert streams.equal(work.call(**t), out)
        assert {n: (x.shape, x.dtype) for n, x in t.items()} == {
            n: (x.shape, x.dtype) for n, x in work.arrays("cpu", 0).items()
        }
        other = [torch.zeros_like(x) for x in out]
        assert work.wrong(t, other) != []


LIBRARIES = [(to_numpy, "numpy"), pytest.param(to_jax, "jax", marks=pytest.mark.jax), (Dlpack, "numpy")]


@pytest.mark.parametrize(("convert", "owner"), LIBRARIES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_libraries(convert: Any, owner: str, dtype: str) -> None:
    memory.check_library("cpu", convert, owner, dtype)
    if owner == "numpy":
        memory.check_backward("cpu", to_numpy, dtype)


@pytest.mark.parametrize("convert", [to_numpy, pytest.param(to_jax, marks=pytest.mark.jax), lambda x: x])
def test_no_tokens(convert: Any) -> None:
    memory.check_no_tokens("cpu", convert)


@settings(max_examples=40)
@given(drawn.moe_problems())
def test_random_experts(problem: drawn.Drawn) -> None:
    drawn.check_moe(problem, "cpu")


@settings(max_examples=40)
@given(drawn.product_problems())
def test_random_products(problem: drawn.Drawn) -> None:
    drawn.check_product(problem, "cpu")


@settings(max_examples=30)
@given(drawn.route_problems())
def test_random_routers(case: RouteCase) -> None:
    routes.check_all([case], "cpu")
