"""The registry of kernels: which there are, for which architectures, and which of them a problem gets.

A contributor adds a kernel as a subclass of plan/kernel.py's Kernel, and here. No GPU and no CuPy.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from flashmoe_cupy.errors import UnsupportedProblem
from flashmoe_cupy.jit.device import DeviceProperties
from flashmoe_cupy.plan.forget import forget, forget_all
from flashmoe_cupy.plan.kernel import Kernel
from flashmoe_cupy.plan.step import Step

__all__ = ["KERNELS", "choose", "forget", "linked", "of_op", "of_task", "only", "passed_over", "register"]

_Kernels = tuple[Kernel[Any, Any], ...]


# Of the kernels of one task, the first that takes a problem runs it: special ones come before general ones.
def _attention() -> _Kernels:
    from flashmoe_cupy.plan.attention.bias import AttentionBiasRows, AttentionMask
    from flashmoe_cupy.plan.attention.forward import AttentionFwdSm80, AttentionFwdSm90

    return AttentionFwdSm90(), AttentionFwdSm80(), AttentionMask(), AttentionBiasRows()


def _attention_backward() -> _Kernels:
    from flashmoe_cupy.plan.attention.backward import (
        AttentionBwdBiasSm80,
        AttentionBwdDot,
        AttentionBwdSinks,
        AttentionBwdSm80,
    )
    from flashmoe_cupy.plan.attention.backward_bias_sm90 import AttentionBwdBiasedSm90, AttentionBwdBiasSm90
    from flashmoe_cupy.plan.attention.backward_sm90 import AttentionBwdConvert, AttentionBwdSm90
    from flashmoe_cupy.plan.attention.backward_wide_sm90 import AttentionBwdWidePairSm90, AttentionBwdWideSm90

    general = AttentionBwdSm80(), AttentionBwdBiasSm80(), AttentionBwdDot(), AttentionBwdSinks(), AttentionBwdConvert()
    fast = AttentionBwdSm90(), AttentionBwdBiasedSm90(), AttentionBwdWidePairSm90(), AttentionBwdWideSm90()
    return *fast, AttentionBwdBiasSm90(), *general


def _moe() -> _Kernels:
    from flashmoe_cupy.plan.moe.products import GroupedGemmSm80, GroupedGemmSm90
    from flashmoe_cupy.plan.moe.small import SMALL_KERNELS

    return GroupedGemmSm90(), GroupedGemmSm80(), *SMALL_KERNELS


# Families are loaded one after the other until one has the task, so that a first call loads no more than it needs.
_unloaded: list[Callable[[], _Kernels]] = [_attention, _moe, _attention_backward]
_known: dict[str, Kernel[Any, Any]] = {}  # by name
_alone: dict[str, Kernel[Any, Any]] = {}  # by task: the only one, within `only`
_lock = threading.RLock()

KERNELS: dict[str, Kernel[Any, Any]]  # all of them by name


def __getattr__(name: str) -> Any:
    if name != "KERNELS":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    while _load_more():
        pass
    return _known


def _load_more() -> bool:
    """Load one more family; False: there is none."""
    with _lock:
        if not _unloaded:
            return False
        _known.update({kernel.name: kernel for kernel in _unloaded[0]()})
        del _unloaded[0]
    return True


def register(kernel: Kernel[Any, Any]) -> None:
    """Make a kernel known that is declared elsewhere: the last choice of its task."""
    while _load_more():
        pass
    _known[kernel.name] = kernel
    forget_all()


def of_task(task: str) -> dict[str, Kernel[Any, Any]]:
    """The kernels of a task by name, in the order of preference."""
    if task in _alone:
        return {_alone[task].name: _alone[task]}
    while True:
        found = {name: kernel for name, kernel in [*_known.items()] if kernel.task == task}
        if found or not _load_more():
            return found


def of_op(op: str) -> dict[str, Kernel[Any, Any]]:
    """The kernels of a family, "attention" or "moe", by name."""
    while _load_more():
        pass
    return {name: kernel for name, kernel in _known.items() if kernel.op == op}


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


EVERY_ARCH = "sm_80"  # a kernel for it is one for every architecture


def passed_over(kernel: Kernel[Any, Any], problem: Any, arch: str, aligned: bool) -> list[str]:
    """Why faster kernels that `arch` has did not take the problem; those of one architecture are all fast."""
    why: list[str] = []
    if not kernel.configs(EVERY_ARCH):
        return why
    for other in of_task(kernel.task).values():
        if other is kernel:
            break
        if other.configs(arch):
            why += other.why_not(problem, arch, aligned)
    return [*dict.fromkeys(why)]  # some have the same reasons


def linked(steps: Sequence[Step], arch: str, aligned: bool, device: DeviceProperties) -> list[Step]:
    """The steps, where the first of two products helps the second begin, if that pays.

    It counts its rows, and the second waits for the counts; or it asks L2 for weights of the second.
    """
    products = [i for i, step in enumerate(steps) if step.task == "grouped_gemm"]
    pair = [i for i in products if steps[i].problem.tile_counter or steps[i].problem.self_sorted is not None]
    found = list(steps)
    if len(pair) != 2:
        return found
    chosen = []
    for i in pair:
        product = steps[i].problem
        fits = aligned and product.rows_aligned
        kernel: Any = choose("grouped_gemm", product, arch, fits)
        chosen.append((kernel, product, kernel.choose(product, arch, fits, device)))
    (first, counting, config), (second, waiting, its_config) = chosen
    counts = first.counts_per_row(counting, config)
    if counts and second.waits_for_counts(waiting, its_config):
        found[pair[0]] = steps[pair[0]].with_problem(counting._replace(counts_rows=True))
        found[pair[1]] = steps[pair[1]].with_problem(waiting._replace(counts_of_x=counts))
    weights = first.next_weights(counting, config, waiting, its_config, device.multiprocessors)
    if weights is not None:
        found[pair[0]] = found[pair[0]].with_problem(found[pair[0]].problem._replace(next_weights=weights))
    return found


def prepared(
    steps: Sequence[Step], arch: str, aligned: bool, device: DeviceProperties, odd: Sequence[str]
) -> tuple[list[Step], dict[str, int]]:  # fmt: skip
    """The steps as the kernels that run them on `arch` want them, and what these add to the workspace: `Kernel.before`.
    """
    found: list[Step] = []
    sizes: dict[str, int] = {}
    for step in linked(steps, arch, aligned, device):
        fits = aligned and step.problem.rows_aligned
        kernel = choose(step.task, step.problem, arch, fits)
        more, room = kernel.before(step, kernel.choose(step.problem, arch, fits, device), odd)
        made = room and room.keys() <= sizes.keys()  # what is prepared is prepared once, for all steps
        found += more[-1:] if made else more
        sizes |= room
    return found, sizes


@contextmanager
def only(name: str) -> Iterator[None]:
    """Within it one kernel is known for its task. For tests and benchmarks, in one thread: the setting is global."""
    while _load_more():
        pass
    one = _known[name]
    before = _alone.get(one.task)
    _alone[one.task] = one
    try:
        forget_all()
        yield
    finally:
        del _alone[one.task]
        if before is not None:
            _alone[one.task] = before
        forget_all()
