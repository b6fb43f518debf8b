"""From a step to a launch: the kernel is chosen, compiled or found, loaded, and its Params packed."""

from __future__ import annotations

from flashmoe_cupy import _env
from flashmoe_cupy.dtypes import FP32
from flashmoe_cupy.jit import launch as gpu
from flashmoe_cupy.jit.launch import Launch
from flashmoe_cupy.plan import kernels
from flashmoe_cupy.plan.archs import arch_for
from flashmoe_cupy.plan.kernel import EMPTY, Step

_warned: set[str] = set()  # reasons whose slowness was mentioned


def prepare(step: Step, device: int, stream: int | None, aligned: bool) -> tuple[Launch, tuple[str, ...]]:
    """The launch of a step, and the names of the pointers that it takes, in their order.

    stream: where a graph may be recorded, in which nothing can be compiled; None: nowhere. aligned: the arrays that go
    by rows start at multiples of 16 bytes.
    """
    arch, sms = arch_for(gpu.compute_capability(device)), gpu.multiprocessors(device)
    problem = step.problem
    aligned = aligned and problem.rows_aligned
    kernel = kernels.choose(step.task, problem, arch, aligned)
    config = kernel.choose(problem, arch, aligned, sms)
    why = "; ".join(kernel.reasons(problem, config))
    _env.log.debug("%s: %s, %s%s", problem.describe(), kernel.name, config.name, f"; {why}" if why else "")
    slow = kernel.slow(problem, aligned)
    passed_over = [] if problem.dtype is FP32 else kernels.passed_over(kernel, problem, arch, aligned)
    if not slow and passed_over and EMPTY not in passed_over:
        slow = f"runs on the slower {kernel.name}: {'; '.join(passed_over)}"
    if slow and slow not in _warned:
        _warned.add(slow)
        _env.log.warning("%s: %s", problem.describe(), slow)
    loaded = gpu.load_for(kernel.source(config), kernel.title(config), arch, device, config.smem_bytes, stream)
    params = kernel.params
    known = {name: value for name, value in (step.values or {}).items() if name in params.fields}
    tail = params.pack(kernel.values(problem, config, aligned, sms) | known)
    ready = Launch(
        device, loaded.function, kernel.grid(problem, config, sms), config.threads, config.smem_bytes,
        params.pack_pointers, tail, _env.get().check, (), kernel.counter_at(problem) // 8, kernel.clears,
        kernel.waits and _may_be_early(arch),
    )  # fmt: skip
    return gpu.with_maps(ready, params.maps_at, kernel.map_arguments(problem, config)), params.pointers


def _may_be_early(arch: str) -> bool:
    """Whether a launch may begin while the one in front of it runs.

    Hopper was the first that can; graphs record such launches since the driver of CUDA 12.3.
    """
    return int(arch[3:].rstrip("a")) >= 90 and gpu.driver_version() >= 12030
