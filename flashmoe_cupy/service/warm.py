"""Compile and load ahead of use, count what was compiled, forget it."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

from flashmoe_cupy import _cupy, _env
from flashmoe_cupy.errors import UnsupportedProblem
from flashmoe_cupy.service.families import DEFAULT_OP, family_of, given
from flashmoe_cupy.service.machine import backend, devices
from flashmoe_cupy.service.names import target_archs
from flashmoe_cupy.service.plans import specialisations


class Warmed(NamedTuple):
    """One specialisation that need not be compiled any more."""

    kernel: str
    config: str
    arch: str
    source: str  # "compiled": just now; "cache": before
    milliseconds: float  # to compile or find it, and to load it
    registers: int  # of a thread
    spills: int  # bytes that a thread stores and loads because it lacks registers
    devices: tuple[int, ...]  # where it is loaded; (): nowhere


_made: set[str] = set()  # keys of kernels on disk, or made by earlier warm-ups of this process, which may have no disk
_compiled_when_warm: int | None = None  # compiles of this process at the end of the last warm-up; None: there was none


def warmup(
    op: str = DEFAULT_OP,
    *,
    arch: str | Sequence[str] | None = None,
    workers: int | None = None,
    progress: Callable[[Warmed], None] | None = None,
    **filters: Any,
) -> list[Warmed]:
    """Compile, and load on the devices here, every specialisation that a call of the op can ask for.

    op: "attention", "attention_backward" for its gradients, or "moe" for moe_route, moe_permute, grouped_gemm and
        fused_moe. Nothing of it compiles after that.
    arch: None = those of the devices here, compiled and loaded; given = compiled only, where no device has that arch.
    workers: None = one per core. progress is called once for each, from the calling thread.
    filters: only what calls with these need; None = not given. "attention" and "attention_backward" have dtype,
        head_dim and head_dim_v (not given: as head_dim), "moe" has dtype. CUDA graphs can be captured after it.
    Raises CompileError, DependencyError, UnsupportedProblem when nothing matches or there is no device and no arch, and
    ValueError or TypeError for an op, arch or filter that there is not.
    """
    global _compiled_when_warm
    from flashmoe_cupy.jit import cache, disk

    family_of(op)
    wanted = given(filters)
    here = devices()
    if arch is None and _env.get().arch is None and not any(device.arch for device in here):
        reason = f"there is no device to warm up: {backend()[1]}"
        need = "" if _cupy.installed() else f", which needs CuPy and its compiler NVRTC but no GPU: {_cupy.repair()}"
        raise UnsupportedProblem("warmup", [reason], f"give an arch, for example sm_90a, to compile only{need}")
    jobs = []
    for name in target_archs(arch):
        ordinals = tuple(device.ordinal for device in here if device.arch == name)
        found = specialisations(name, op=op, **wanted)
        jobs += [(kernel, config, name, ordinals) for kernel, config in found]
    _made.update(stored.key for stored in disk.entries())

    def make(job: tuple[Any, Any, str, tuple[int, ...]]) -> Warmed:
        kernel, config, name, ordinals = job
        start = time.perf_counter()
        text = kernel.source(config)
        title = kernel.title(config)
        entry = cache.get(text, title, name)
        source = "cache" if entry.key in _made else "compiled"
        _made.add(entry.key)
        if ordinals:
            from flashmoe_cupy.jit import launch

            for ordinal in ordinals:
                launch.load_for(text, title, name, ordinal, config.smem_bytes, 0)
        took = (time.perf_counter() - start) * 1e3
        registers = int(entry.info.get("registers", 0))
        spills = int(entry.info.get("spill_stores", 0)) + int(entry.info.get("spill_loads", 0))
        return Warmed(kernel.name, config.name, name, source, took, registers, spills, ordinals)

    done = []
    with ThreadPoolExecutor(workers or os.cpu_count() or 1) as pool:
        for warmed in pool.map(make, jobs):
            done.append(warmed)
            if progress is not None:
                progress(warmed)
    _compiled_when_warm = cache.stats().compiled
    return done


class Stats(NamedTuple):
    """Counts of this process."""

    hits_memory: int  # kernels that were found in memory
    hits_disk: int  # that were found on disk
    compiled: int
    milliseconds: float  # in the compiler
    compiled_after_warmup: int  # compiles since the last `warmup`, 0 if there was none; a server wants 0


def stats() -> Stats:
    """What this process has found and compiled so far."""
    from flashmoe_cupy.jit import cache

    now = cache.stats()
    since = 0 if _compiled_when_warm is None else now.compiled - _compiled_when_warm
    return Stats(now.hits_memory, now.hits_disk, now.compiled, now.milliseconds, since)


def clear_cache() -> int:
    """Forget every compiled kernel, in memory and on disk; returns how many were on disk. Running work is not hurt."""
    from flashmoe_cupy.jit import cache

    _made.clear()
    return cache.clear()
