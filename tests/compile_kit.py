"""Compiling many kernels at once, ahead of the tests that launch them."""

from __future__ import annotations

import os
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any


def compile_all(kernels: Iterable[Any], arch: str) -> int:
    """Compile every configuration of these kernels, on all cores; how many there are."""
    from flashmoe_cupy.jit import cache

    jobs = [(kernel, config) for kernel in kernels for config in kernel.configs(arch)]
    jobs.sort(key=lambda job: -job[1].threads)  # the long ones first
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(lambda job: cache.get(job[0].source(job[1]), f"{job[0].name} {job[1].name}", arch), jobs))
    return len(jobs)
