"""The registry of kernels: which there are, for which architectures, and which of them a problem gets.

A contributor adds a kernel as a class beside those of plan/attention.py, and here. No GPU and no CuPy.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from flashmoe_cupy.errors import UnsupportedProblem
from flashmoe_cupy.plan.attention import AttentionFwd, AttentionFwdSm80, AttentionFwdSm90
from flashmoe_cupy.plan.moe import SMALL_KERNELS, SmallKernel, rows_aligned
from flashmoe_cupy.plan.problem import AttentionProblem
from flashmoe_cupy.plan.product import GroupedGemm, GroupedGemmSm80, GroupedGemmSm90, Product

# Every kernel compiles for these, or has no configuration there, without a spill; the test suite checks it.
ARCHS = ("sm_80", "sm_86", "sm_89", "sm_90a", "sm_100", "sm_120")

# The first that takes a problem runs it: special ones come before general ones.
KERNELS: dict[str, AttentionFwd] = {kernel.name: kernel for kernel in (AttentionFwdSm90(), AttentionFwdSm80())}

PRODUCTS: dict[str, GroupedGemm] = {kernel.name: kernel for kernel in (GroupedGemmSm90(), GroupedGemmSm80())}
SMALL: dict[str, SmallKernel] = {kernel.name: kernel for kernel in SMALL_KERNELS}

forget: list[Callable[[], None]] = []  # called when the choice changes, by whoever remembers one
_considered = tuple(KERNELS.values())
_products = tuple(PRODUCTS.values())


def arch_for(compute_capability: tuple[int, int]) -> str:
    """The compilation target of a device. Only 9.0 has an `a` target here: its own kernels use wgmma."""
    major, minor = compute_capability
    return "sm_90a" if (major, minor) == (9, 0) else f"sm_{major}{minor}"


def choose_kernel(problem: AttentionProblem, arch: str, aligned: bool) -> AttentionFwd:
    """The first kernel that runs the problem. `aligned`: every row of q, k, v and out starts at a multiple of 16 bytes.

    Raises UnsupportedProblem with the reasons of the last one, the most general.
    """
    why: list[str] = []
    for kernel in _considered:
        why = kernel.why_not(problem, arch, aligned)
        if not why:
            return kernel
    raise UnsupportedProblem(problem.describe(), why, "a GPU of compute capability 8.0 or newer, or NumPy arrays")


def choose_product(product: Product, arch: str, aligned: bool) -> GroupedGemm:
    """As `choose_kernel`, for a grouped product."""
    why: list[str] = []
    for kernel in _products:
        why = kernel.why_not(product, arch, aligned)
        if not why:
            return kernel
    raise UnsupportedProblem(product.describe(), why, "a GPU of compute capability 8.0 or newer, or NumPy arrays")


def announced(pair: Sequence[Product], arch: str, aligned: bool, sms: int) -> int:
    """How often the first of two products counts a row that the second waits for; 0: it waits for the whole grid."""
    chosen = []
    for product in pair:
        fits = aligned and rows_aligned(product)
        kernel = choose_product(product, arch, fits)
        chosen.append((kernel, product, kernel.choose(product, arch, fits, sms)))
    if len(chosen) != 2 or not chosen[1][0].awaits(*chosen[1][1:]):
        return 0
    return chosen[0][0].announces(*chosen[0][1:])


def product_passed_over(kernel: GroupedGemm, product: Product, arch: str, aligned: bool) -> list[str]:
    """Why faster kernels that `arch` has did not take the product."""
    before = _products[: _products.index(kernel)]
    return [why for other in before if other.configs(arch) for why in other.why_not(product, arch, aligned)]


def passed_over(kernel: AttentionFwd, problem: AttentionProblem, arch: str, aligned: bool) -> list[str]:
    """Why faster kernels that `arch` has did not take the problem."""
    before = _considered[: _considered.index(kernel)]
    return [why for other in before if other.configs(arch) for why in other.why_not(problem, arch, aligned)]


@contextmanager
def only(name: str) -> Iterator[None]:
    """Within it one kernel is known for its task. For tests and benchmarks, in one thread: the setting is global."""
    global _considered, _products
    before = _considered, _products
    if name in KERNELS:
        _considered = (KERNELS[name],)
    else:
        _products = (PRODUCTS[name],)
    try:
        _forget()
        yield
    finally:
        _considered, _products = before
        _forget()


def _forget() -> None:
    for call in forget:
        call()
