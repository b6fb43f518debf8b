"""The measured attentions of `demo` and `bench`, and the clocks."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np

from flashmoe_cupy import service

CHECKED_QUERIES = 64  # the float64 reference runs on the last queries only; under the band masks they see all keys


class Case(NamedTuple):
    """One attention to show."""

    title: str
    sizes: tuple[int, int, int, int, int, int, int]  # batch, seqlen_q, seqlen_k, heads_q, heads_k, head_dim, head_dim_v
    dtype: str
    options: dict[str, Any]  # of `flash_attention`
    sinks: bool = False  # the call has sinks

    @property
    def flops(self) -> int:
        batch, seqlen_q, seqlen_k, heads_q, _, head_dim, head_dim_v = self.sizes
        left, right = self.options.get("window_size", (-1, -1))
        pairs = service.visible_pairs(seqlen_q, seqlen_k, left, 0 if self.options.get("causal") else right)
        return 2 * batch * heads_q * pairs * (head_dim + head_dim_v)

    def text(self) -> str:
        batch, seqlen_q, seqlen_k, heads_q, heads_k, head_dim, head_dim_v = self.sizes
        heads = f"{heads_q}/{heads_k}" if heads_k != heads_q else f"{heads_q}"
        dims = f"{head_dim}/{head_dim_v}" if head_dim_v != head_dim else f"{head_dim}"
        return f"b{batch} q{seqlen_q} k{seqlen_k} h{heads} d{dims}"


class Result(NamedTuple):
    """What one case gave."""

    case: str  # its title
    sizes: str  # for people
    dtype: str
    backend: str  # "cuda" or "numpy"
    error: float  # of the norm, against float64
    allowed: float
    passed: bool
    milliseconds: float  # of a call
    first_ms: float  # of the first call
    compile_ms: float  # in the compiler during the first call
    flops_per_second: float
    op: str = "attention"


def cases(gpu: bool) -> list[Case]:
    """The demo's cases: small ones that a laptop's CPU does in a second each, or ones that fill a GPU."""
    if gpu:
        return [
            Case("full", (4, 4096, 4096, 16, 16, 128, 128), "bfloat16", {}),
            Case("causal, grouped heads", (4, 4096, 4096, 32, 8, 128, 128), "bfloat16", {"causal": True}),
            Case("causal, window 512, softcap, sinks", (2, 8192, 8192, 16, 4, 64, 64), "bfloat16",
                 {"causal": True, "window_size": (511, 0), "softcap": 30.0}, True),
            Case("causal, values of another width", (2, 4096, 4096, 16, 16, 192, 128), "float16", {"causal": True}),
            Case("causal at fp32 accuracy", (1, 2048, 2048, 8, 8, 64, 64), "float32", {"causal": True}),
        ]  # fmt: skip
    return [
        Case("full", (1, 1024, 1024, 8, 8, 64, 64), "float32", {}),
        Case("causal, grouped heads", (1, 1024, 1024, 8, 2, 64, 64), "float32", {"causal": True}),
        Case("causal, window 256, softcap, sinks", (1, 2048, 2048, 4, 1, 64, 64), "bfloat16",
             {"causal": True, "window_size": (255, 0), "softcap": 30.0}, True),
        Case("causal, values of another width", (1, 1024, 1024, 4, 4, 192, 128), "float16", {"causal": True}),
        Case("one query, long cache", (1, 1, 8192, 8, 2, 128, 128), "bfloat16", {"causal": True}),
    ]  # fmt: skip


def inputs(case: Case) -> dict[str, Any]:
    """NumPy arrays of a case: standard normal, the same in every run."""
    from flashmoe_cupy import dtypes

    batch, seqlen_q, seqlen_k, heads_q, heads_k, head_dim, head_dim_v = case.sizes
    rng = np.random.default_rng(1)
    kind = dtypes.to_numpy(dtypes.from_name(case.dtype))

    def normal(*shape: int) -> Any:
        return rng.standard_normal(shape, np.float32).astype(kind)

    arrays = {
        "q": normal(batch, seqlen_q, heads_q, head_dim),
        "k": normal(batch, seqlen_k, heads_k, head_dim),
        "v": normal(batch, seqlen_k, heads_k, head_dim_v),
    }
    if case.sinks:
        arrays["sinks"] = rng.standard_normal(heads_q, np.float32)
    return arrays


def run(case: Case, gpu: bool, repeats: int = 5) -> Result:
    """Run one case, check its last rows against the float64 reference and time it."""
    import flashmoe_cupy
    from flashmoe_cupy.testing import within_tolerance

    arrays = inputs(case)
    given = {name: to_gpu(array) for name, array in arrays.items()} if gpu else arrays

    def call() -> Any:
        return flashmoe_cupy.flash_attention(**given, **case.options)

    out, took, first, compiled = timed(call, gpu, repeats)
    tail = min(CHECKED_QUERIES, case.sizes[1])
    heads = max(1, case.sizes[3] // case.sizes[4])  # the query heads of the first key head
    part = {"q": arrays["q"][:1, -tail:, :heads], "k": arrays["k"][:1, :, :1], "v": arrays["v"][:1, :, :1]}
    if case.sinks:
        part["sinks"] = arrays["sinks"][:heads]
    expected = flashmoe_cupy.reference.flash_attention(**part, **case.options)
    got = out[:1, -tail:, :heads]
    got = (got.get() if gpu else got).astype(np.float64)
    verdict = within_tolerance(got, expected, case.dtype, softcap=case.options.get("softcap", 0.0))
    return Result(
        case.title, case.text(), case.dtype, "cuda" if gpu else "numpy", verdict.error, verdict.allowed, verdict.passed,
        took, first, compiled, case.flops / (took * 1e-3),
    )  # fmt: skip


# ------------------------------------------------------------------------------------------------------------- clocks


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
    return statistics.median(times) * 1e3


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
    return float(statistics.median(times))


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


# -------------------------------------------------------------------------------------------------------------- bench


def sweep(gpu: bool, dtype: str, head_dim: int, heads: int, causal: bool, longest: int) -> Iterator[Result]:
    """One result per length, doubling up to `longest`, with about the same number of tokens in each."""
    length = min(longest, 1024 if gpu else 256)
    tokens = 16384 if gpu else 1024
    while length <= longest:
        sizes = (max(1, tokens // length), length, length, heads, heads, head_dim, head_dim)
        yield run(Case("causal" if causal else "full", sizes, dtype, {"causal": causal}), gpu)
        length *= 2
