"""What the GPU tests for mixtures of experts launch: planned without a GPU, compiled ahead, chosen kernel by kernel.

Modules `register` the problems that they run. `compile_everything` then compiles all kernels of the device here on all
cores, and test_moe_checks.py sees that the registered problems use every one of them.
"""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

from compile_kit import compile_all

from flashmoe_cupy import dtypes
from flashmoe_cupy.arrays import View
from flashmoe_cupy.jit.device import H100, DeviceProperties
from flashmoe_cupy.plan.archs import arch_for
from flashmoe_cupy.plan.kernel import Kernel
from flashmoe_cupy.plan.kernels import of_op, of_task
from flashmoe_cupy.plan.moe import steps as moe
from flashmoe_cupy.plan.moe.few_rows import tiles_for
from flashmoe_cupy.plan.moe.problem import grouped_gemm_problem, moe_problem
from flashmoe_cupy.plan.moe.products import Product
from flashmoe_cupy.plan.moe.routing import permute_problem, route_problem
from flashmoe_cupy.plan.operation import Workspace
from flashmoe_cupy.plan.step import Step
from flashmoe_cupy.testing import case_text
from flashmoe_cupy.testing_moe import MoECase, RouteCase


class ProductCase(NamedTuple):
    """One problem for `grouped_gemm`. sizes: rows of each group.

    head, tail: rows of out in front of the first group and behind the last, which are nobody's. x_rows: with a gather,
    rows of x; one index in eight names none of them. max_rows: the masked layout. bias: "", "same" or "float32".
    """

    sizes: tuple[int, ...]
    n: int = 64
    d: int = 64
    dtype: str = "bfloat16"
    bias: str = ""
    x_rows: int = 0
    head: int = 0
    tail: int = 0
    max_rows: int = 0

    def __str__(self) -> str:
        return case_text(self)

    @property
    def rows(self) -> int:
        """Rows of out, where groups lie one behind the other."""
        return self.head + sum(self.sizes) + self.tail

    def shapes(self) -> Iterator[tuple[str, tuple[int, ...], str]]:
        """(argument, shape, dtype name) of each array."""
        e, x_rows = len(self.sizes), self.x_rows or self.rows
        yield "x", (e, self.max_rows, self.d) if self.max_rows else (x_rows, self.d), self.dtype
        yield "w", (e, self.n, self.d), self.dtype
        if self.bias:
            yield "bias", (e, self.n), self.dtype if self.bias == "same" else self.bias
        if self.max_rows:
            yield "group_sizes", (e,), "int32"
        else:
            yield "offsets", (e + 1,), "int32"
            if self.x_rows:
                yield "gather_indices", (self.rows,), "int32"


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
            yield "e_score_correction_bias", (case.experts,), case.dtype if case.bias == "same" else case.bias
    elif not isinstance(case, ProductCase):
        yield "topk_ids", case[:2], "int32"


def views(case: Case) -> dict[str, View]:
    """The arrays as contiguous GPU memory, which need not exist; far apart, so that no two seem to overlap."""
    address = iter(range(1 << 40, 1 << 50, 1 << 40))

    def view(shape: tuple[int, ...], dtype: str) -> View:
        strides = tuple(math.prod(shape[i + 1 :]) for i in range(len(shape)))
        return View(next(address), shape, strides, dtypes.from_name(dtype), 0, "torch", False, None)

    return {name: view(shape, dtype) for name, shape, dtype in shapes(case)}


def steps(case: Case, stats: bool = False) -> tuple[list[Step], Workspace]:
    """The launches of a problem and its workspace, as the library plans them; nothing is launched for no token."""
    v, work = views(case), Workspace()
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
    return [step.problem for step in steps(case)[0] if step.task == "grouped_gemm"]


def takes(kernel: Kernel[Any, Any], products: Iterable[Product], arch: str, aligned: bool = True) -> bool:
    """Whether the kernel runs all of these products."""
    return not any(kernel.why_not(p, arch, aligned and p.rows_aligned) for p in products)


def configurations(
    case: Case, arch: str, aligned: bool = True, device: DeviceProperties = H100
) -> set[tuple[str, str]]:  # fmt: skip
    """(kernel, configuration) of all launches, of products on every kernel that takes the problem."""
    every = [step for stats in (False, True) for step in steps(case, stats)[0]]
    found = {(step.task, step.problem.config.name) for step in every if step.task != "grouped_gemm"}
    problems = product_problems(case)
    for kernel in of_task("grouped_gemm").values():
        if takes(kernel, problems, arch, aligned):
            chosen = [kernel.choose(p, arch, aligned and p.rows_aligned, device) for p in problems]
            found |= {(kernel.name, config.name) for config in chosen}
    return found


def every_configuration(arch: str) -> set[tuple[str, str]]:
    kernels: list[Any] = list(of_op("moe").values())
    return {(kernel.name, config.name) for kernel in kernels for config in kernel.configs(arch)}


# ---------------------------------------------------------------------------------------------------------------------
# on the device here


@functools.cache
def arch_here() -> str:
    import cupy

    digits = str(cupy.cuda.Device().compute_capability)
    return arch_for((int(digits[:-1]), int(digits[-1])))


def memories() -> list[DeviceProperties]:
    """The device here, and one that differs in its memory alone: slow where it is fast, fast where it is slow."""
    from flashmoe_cupy.jit import launch

    here = launch.properties(0)
    others = (here._replace(memory_rate=rate) for rate in (H100.memory_rate // 2, 2 * H100.memory_rate))
    return [here, next(other for other in others if tiles_for(other) != tiles_for(here))]


@contextlib.contextmanager
def planned_for(device: DeviceProperties) -> Iterator[None]:
    """Within it plans are those for such a device, whatever the one here is. For one thread: the setting is global."""
    from flashmoe_cupy.jit import launch
    from flashmoe_cupy.plan.forget import forget_all

    module: Any = launch
    before = module.properties
    module.properties = lambda number: device
    forget_all()
    try:
        yield
    finally:
        module.properties = before
        forget_all()


@functools.cache
def kernel_names(case: Case, aligned: bool = True) -> list[str]:
    """The product kernels that take a problem on the device here; the library would choose the first."""
    problems = product_problems(case)
    return [name for name, kernel in of_task("grouped_gemm").items() if takes(kernel, problems, arch_here(), aligned)]


@functools.cache
def compile_everything() -> int:
    """Compile every kernel of mixtures of experts, on all cores, for the device here; how many there are."""
    return compile_all(list(of_op("moe").values()), arch_here())
