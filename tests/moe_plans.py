"""What the GPU tests for mixtures of experts launch: planned without a GPU, compiled ahead, chosen kernel by kernel.

Modules `register` the problems that they run. `compile_everything` then compiles all kernels of the device here on all
cores, and test_moe_checks.py sees that the registered problems use every one of them.
"""

from __future__ import annotations

import functools
import math
import os
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from gpu_moe_kit import ProductCase

from flashmoe_cupy import dtypes
from flashmoe_cupy.arrays import View
from flashmoe_cupy.plan import moe
from flashmoe_cupy.plan.kernels import PRODUCTS, SMALL, arch_for
from flashmoe_cupy.plan.moe_problem import grouped_gemm_problem, moe_problem, permute_problem, route_problem
from flashmoe_cupy.plan.product import DEFAULT_SMS, GroupedGemm, Product
from flashmoe_cupy.testing_moe import MoECase, RouteCase

Case = MoECase | RouteCase | ProductCase | tuple[int, int, int]  # the last for moe_permute: tokens, top_k, experts
Shape = tuple[str, tuple[int, ...], str]

_registered: dict[tuple[Case, bool], None] = {}


def register(cases: Iterable[Case], aligned: bool = True) -> list[Any]:
    """Note problems that a module will run, in memory that is aligned to 16 bytes or not; hands them back."""
    kept = list(cases)
    _registered.update(dict.fromkeys((case, aligned) for case in kept))
    return kept


def registered() -> list[tuple[Case, bool]]:
    return list(_registered)


# ---------------------------------------------------------------------------------------------------------------------
# what a problem launches


def shapes(case: Case) -> Iterator[Shape]:
    """All arrays of a problem."""
    if isinstance(case, (MoECase, ProductCase)):
        yield from case.shapes()
    if isinstance(case, MoECase):
        yield "topk_ids", (case.tokens, case.top_k), case.ids_dtype
        if case.global_experts:
            yield "expert_map", (case.global_experts,), "int32"
    elif isinstance(case, RouteCase):
        yield "logits", (case.tokens, case.experts), case.dtype
        if case.bias:
            yield "bias", (case.experts,), case.dtype if case.bias == "same" else case.bias
    elif not isinstance(case, ProductCase):
        yield "topk_ids", case[:2], "int32"


def views(case: Case) -> dict[str, View]:
    """The arrays as contiguous GPU memory, which need not exist; far apart, so that no two seem to overlap."""
    address = iter(range(1 << 40, 1 << 50, 1 << 40))

    def view(shape: tuple[int, ...], dtype: str) -> View:
        strides = tuple(math.prod(shape[i + 1 :]) for i in range(len(shape)))
        return View(next(address), shape, strides, dtypes.from_name(dtype), 0, "torch", False, None)

    return {name: view(shape, dtype) for name, shape, dtype in shapes(case)}


def steps(case: Case, stats: bool = False) -> tuple[list[moe.Step | moe.ProductStep], moe.Workspace]:
    """The launches of a problem and its workspace, as the library plans them; nothing is launched for no token."""
    v, work = views(case), moe.Workspace()
    if (case[0] if not isinstance(case, ProductCase) else case.rows + case.max_rows) == 0:
        return [], work
    if isinstance(case, MoECase):
        return moe.moe_steps(moe_problem(**v, **case.options()))
    if isinstance(case, ProductCase):
        return moe.grouped_gemm_steps(grouped_gemm_problem(**v)), work
    if isinstance(case, RouteCase):
        found, work = moe.route_steps(route_problem(**v, **case.options(), return_stats=stats))
        return [*found], work
    return [*moe.permute_steps(permute_problem(**v, num_experts=case[2]), work, own=False)], work


def product_problems(case: Case) -> list[Product]:
    return [step.product for step in steps(case)[0] if isinstance(step, moe.ProductStep)]


def takes(kernel: GroupedGemm, products: Iterable[Product], arch: str, aligned: bool = True) -> bool:
    """Whether the kernel runs all of these products."""
    return not any(kernel.why_not(p, arch, aligned and moe.rows_aligned(p)) for p in products)


def configurations(case: Case, arch: str, aligned: bool = True, sms: int = DEFAULT_SMS) -> set[tuple[str, str]]:
    """(kernel, configuration) of each launch, of a product on every kernel that takes it."""
    found: set[tuple[str, str]] = set()
    for stats in (False, True):
        for step in steps(case, stats)[0]:
            if isinstance(step, moe.Step):
                found.add((step.kernel.name, step.config.name))
                continue
            even = aligned and moe.rows_aligned(step.product)
            for kernel in PRODUCTS.values():
                if not kernel.why_not(step.product, arch, even):
                    found.add((kernel.name, kernel.choose(step.product, arch, even, sms).name))
    return found


def every_configuration(arch: str) -> set[tuple[str, str]]:
    kernels: list[Any] = [*PRODUCTS.values(), *SMALL.values()]
    return {(kernel.name, config.name) for kernel in kernels for config in kernel.configs(arch)}


# ---------------------------------------------------------------------------------------------------------------------
# on the device here


@functools.cache
def arch_here() -> str:
    import cupy

    digits = str(cupy.cuda.Device().compute_capability)
    return arch_for((int(digits[:-1]), int(digits[-1])))


@functools.cache
def kernel_names(case: Case, aligned: bool = True) -> list[str]:
    """The product kernels that take a problem on the device here; the library would choose the first."""
    problems = product_problems(case)
    return [name for name, kernel in PRODUCTS.items() if takes(kernel, problems, arch_here(), aligned)]


@functools.cache
def compile_everything() -> int:
    """Compile every kernel of mixtures of experts, on all cores, for the device here; how many there are."""
    from flashmoe_cupy.jit import cache

    arch, kernels = arch_here(), list[Any]([*PRODUCTS.values(), *SMALL.values()])
    jobs: list[Any] = [(kernel, config) for kernel in kernels for config in kernel.configs(arch)]
    jobs.sort(key=lambda job: -job[1].threads)  # the long ones first
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(lambda job: cache.get(job[0].source(job[1]), f"{job[0].name} {job[1].name}", arch), jobs))
    return len(jobs)
