"""Compiling many kernels at once, ahead of the tests that launch them."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any


def compile_all(kernels: Iterable[Any], arch: str) -> int:
    """Compile every configuration of these kernels, on all cores; how many there are."""
    jobs = [(kernel, config) for kernel in kernels for config in kernel.configs(arch)]
    jobs.sort(key=lambda job: -job[1].threads)  # the long ones first
    return compile_sources({kernel.source(config): f"{kernel.name} {config.name}" for kernel, config in jobs}, arch)


def compile_sources(names: Mapping[str, str], arch: str) -> int:
    """Compile these sources, on all cores; how many there are. names: of the kernels, by source."""
    from flashmoe_cupy.jit import cache

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(lambda source: cache.get(source, names[source], arch), names))
    return len(names)
