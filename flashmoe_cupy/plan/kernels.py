"""The registry of kernels: which there are, for which architectures, and which of them a problem gets.

A contributor adds a kernel as a subclass of plan/kernel.py's Kernel, and here. No GPU and no CuPy.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from flashmoe_cupy.errors import UnsupportedProblem
from flashmoe_cupy.plan.attention.forward import AttentionFwdSm80, AttentionFwdSm90
from flashmoe_cupy.plan.kernel import Kernel, Step
from flashmoe_cupy.plan.moe.products import GroupedGemmSm80, GroupedGemmSm90
from flashmoe_cupy.plan.moe.small import SMALL_KERNELS

# Of the kernels of one task, the first that takes a problem runs it: special ones come before general ones.
KERNELS: dict[str, Kernel[Any, Any]] = {
    kernel.name: kernel
    for kernel in (AttentionFwdSm90(), AttentionFwdSm80(), GroupedGemmSm90(), GroupedGemmSm80(), *SMALL_KERNELS)
}

forget: list[Callable[[], None]] = []  # called when the choice changes, by whoever remembers one
_considered = tuple(KERNELS.values())


def register(kernel: Kernel[Any, Any]) -> None:
    """Make a kernel known that is declared elsewhere: the last choice of its task."""
    global _considered
    KERNELS[kernel.name] = kernel
    _considered = (*_considered, kernel)
    _forget()


def of_task(task: str) -> dict[str, Kernel[Any, Any]]:
    """The kernels of a task by name, in the order of preference."""
    return {kernel.name: kernel for kernel in _considered if kernel.task == task}


def of_op(op: str) -> dict[str, Kernel[Any, Any]]:
    """The kernels of a family, "attention" or "moe", by name."""
    return {name: kernel for name, kernel in KERNELS.items() if kernel.op == op}


def choose(task: str, problem: Any, arch: str, aligned: bool) -> Kernel[Any, Any]:
    """The first kernel that runs the problem. `aligned`: as in `Kernel.choose`.

    Raises UnsupportedProblem with the reasons of the last one, the most general.
    """
    why: list[str] = []
    for kernel in of_task(task).values():
        why = kernel.why_not(problem, arch, aligned)
        if not why:
            return kernel
    raise UnsupportedProblem(problem.describe(), why, "a GPU of compute capability 8.0 or newer, or NumPy arrays")


def passed_over(kernel: Kernel[Any, Any], problem: Any, arch: str, aligned: bool) -> list[str]:
    """Why faster kernels that `arch` has did not take the problem."""
    why: list[str] = []
    for other in of_task(kernel.task).values():
        if other is kernel:
            break
        if other.configs(arch):
            why += other.why_not(problem, arch, aligned)
    return why


def with_counted_rows(steps: Sequence[Step], arch: str, aligned: bool, sms: int) -> list[Step]:
    """The steps, where the first of two products counts its rows and the second waits for the counts, if that pays."""
    pair = [i for i, step in enumerate(steps) if step.task == "grouped_gemm" and step.problem.tile_counter]
    found = list(steps)
    if len(pair) != 2:
        return found
    chosen = []
    for i in pair:
        product = steps[i].problem
        fits = aligned and product.rows_aligned
        kernel: Any = choose("grouped_gemm", product, arch, fits)
        chosen.append((kernel, product, kernel.choose(product, arch, fits, sms)))
    (first, counting, config), (second, waiting, its_config) = chosen
    counts = first.counts_per_row(counting, config)
    if counts and second.waits_for_counts(waiting, its_config):
        found[pair[0]] = steps[pair[0]]._replace(problem=counting._replace(counts_rows=True))
        found[pair[1]] = steps[pair[1]]._replace(problem=waiting._replace(counts_of_x=counts))
    return found


linked = with_counted_rows  # the name that ops/ has for it


@contextmanager
def only(name: str) -> Iterator[None]:
    """Within it one kernel is known for its task. For tests and benchmarks, in one thread: the setting is global."""
    global _considered
    before, one = _considered, KERNELS[name]
    _considered = (*[kernel for kernel in before if kernel.task != one.task], one)
    try:
        _forget()
        yield
    finally:
        _considered = before
        _forget()


def _forget() -> None:
    for call in forget:
        call()
