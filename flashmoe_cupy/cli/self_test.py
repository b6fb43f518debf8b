"""The self-test of `info`: small proofs that each installed part works."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from flashmoe_cupy import _cupy
from flashmoe_cupy.cli import measure, measure_moe
from flashmoe_cupy.errors import FlashMoEError
from flashmoe_cupy.jit import compiler
from flashmoe_cupy.testing_moe import MoECase


def self_test(gpu: bool) -> list[dict[str, Any]]:
    """Small proofs that each installed part works: name, passed, what was seen."""
    rows = []

    def check(name: str, work: Callable[[], str]) -> None:
        try:
            rows.append({"name": name, "passed": True, "detail": work()})
        except Exception as error:  # any error belongs into the report
            rows.append({"name": name, "passed": False, "detail": f"{type(error).__name__}: {error}"})

    def attention(on_gpu: bool) -> str:
        kind = "bfloat16" if on_gpu else "float32"
        return shown(measure.run(measure.Case("self-test", (2, 65, 129, 4, 2, 64, 64), kind, {"causal": True}), on_gpu))

    def shown(result: measure.Result) -> str:
        if not result.passed:
            raise FlashMoEError(f"wrong result: error {result.error:.3g}, allowed {result.allowed:.3g}")
        return f"error {result.error:.2g} to float64, first call {result.first_ms:.0f} ms"

    def experts(on_gpu: bool) -> str:
        kind = "bfloat16" if on_gpu else "float32"
        layer = measure_moe.Layer("self-test", MoECase(40, 64, 32, 8, 2, kind))
        return shown(measure_moe.run(layer, on_gpu))

    def nvrtc() -> str:
        made = compiler.compile_cubin('extern "C" __global__ void fm_entry(int* p) { *p = 1; }', {}, "sm_80")
        return f"{len(made.cubin)} bytes for sm_80 in {made.milliseconds:.0f} ms"

    check("NumPy attention", lambda: attention(False))
    check("NumPy mixture of experts", lambda: experts(False))
    if _cupy.installed():
        check("NVRTC compiles", nvrtc)
    if gpu:
        check("CUDA attention", lambda: attention(True))
        check("CUDA mixture of experts", lambda: experts(True))
    return rows
