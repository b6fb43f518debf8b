"""The clocks of `demo` and `bench`, and the speed of a matrix product to compare with."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from flashmoe_cupy import service


def timed(call: Callable[[], Any], gpu: bool, repeats: int = 5) -> tuple[Any, float, float, float]:
    """(first result, milliseconds of a call, of the first one, of the compiler in it)."""
    before = service.stats().milliseconds
    start = time.perf_counter()
    out = call()
    if gpu:
        synchronize()
    first = (time.perf_counter() - start) * 1e3
    compiled = service.stats().milliseconds - before
    return out, gpu_ms(call) if gpu else cpu_ms(call, repeats), first, compiled


def cpu_ms(call: Callable[[], Any], repeats: int) -> float:
    """Median wall milliseconds; stops early after two seconds."""
    times: list[float] = []
    begin = time.perf_counter()
    while len(times) < repeats and (not times or time.perf_counter() - begin < 2.0):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return float(np.median(times)) * 1e3


def gpu_ms(call: Callable[[], Any], rounds: int = 7, seconds: float = 0.02) -> float:
    """Median device milliseconds of one call, over rounds of back-to-back calls between two events."""
    import cupy

    for _ in range(3):
        call()
    start, stop = cupy.cuda.Event(), cupy.cuda.Event()
    start.record()
    call()
    stop.record()
    stop.synchronize()
    count = max(1, min(200, math.ceil(seconds * 1e3 / max(cupy.cuda.get_elapsed_time(start, stop), 1e-3))))
    times = []
    for _ in range(rounds):
        start.record()
        for _ in range(count):
            call()
        stop.record()
        stop.synchronize()
        times.append(cupy.cuda.get_elapsed_time(start, stop) / count)
    return float(np.median(times))


def to_gpu(array: Any) -> Any:
    from flashmoe_cupy import _cupy

    return _cupy.load().asarray(array)


def synchronize() -> None:
    import cupy

    cupy.cuda.get_current_stream().synchronize()


def matmul_ceiling(size: int = 8192) -> tuple[float, str]:
    """(FLOP/s of a bf16 matrix product here, by what), or (0.0, why it was not measured)."""
    flops = 2.0 * size**3
    why = []
    try:
        import torch

        if torch.cuda.is_available():
            a = torch.randn(size, size, device="cuda", dtype=torch.bfloat16)
            with torch.cuda.stream(torch.cuda.ExternalStream(_stream())):
                return flops / (gpu_ms(lambda: a @ a, seconds=0.2) * 1e-3), f"torch bf16 matmul {size}"
        why.append("torch sees no GPU")
    except Exception as error:  # the ceiling is an extra: an error of another library must not stop the demo
        why.append(f"torch: {type(error).__name__}")
    try:
        import cupy

        b = cupy.asarray(np.random.default_rng(0).standard_normal((size, size), np.float32)).astype(cupy.float16)
        return flops / (gpu_ms(lambda: b @ b, seconds=0.2) * 1e-3), f"CuPy fp16 matmul {size}"
    except Exception as error:  # no cuBLAS, most likely
        why.append(f"CuPy: {type(error).__name__}")
    return 0.0, f"not measured ({'; '.join(why)})"


def _stream() -> int:
    import cupy

    return int(cupy.cuda.get_current_stream().ptr)
