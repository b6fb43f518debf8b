"""The self-test of `info`: small proofs that each installed part works."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from flashmoe_cupy import _cupy
from flashmoe_cupy.cli.measure import MEASURED
from flashmoe_cupy.cli.measured import Result
from flashmoe_cupy.errors import FlashMoEError
from flashmoe_cupy.jit import compiler
from flashmoe_cupy.service import FAMILIES


def self_test(gpu: bool) -> list[dict[str, Any]]:
    """Small proofs that each installed part works: name, passed, what was seen."""
    rows = []

    def check(name: str, work: Callable[[], str]) -> None:
        try:
            rows.append({"name": name, "passed": True, "detail": work()})
        except Exception as error:  # any error belongs into the report
            rows.append({"name": name, "passed": False, "detail": f"{type(error).__name__}: {error}"})

    def shown(run: Callable[[bool], Result], on_gpu: bool) -> str:
        result = run(on_gpu)
        if not result.passed:
            raise FlashMoEError(f"wrong result: error {result.error:.3g}, allowed {result.allowed:.3g}")
        return f"error {result.error:.2g} to float64, first call {result.first_ms:.0f} ms"

    def operations(title: str, on_gpu: bool) -> None:
        for op, measured in MEASURED.items():
            check(f"{title} {FAMILIES[op].title}", partial(shown, measured.self_test, on_gpu))

    def nvrtc() -> str:
        made = compiler.compile_cubin('extern "C" __global__ void fm_entry(int* p) { *p = 1; }', {}, "sm_80")
        return f"{len(made.cubin)} bytes for sm_80 in {made.milliseconds:.0f} ms"

    operations("NumPy", False)
    if _cupy.installed():
        check("NVRTC compiles", nvrtc)
    if gpu:
        operations("CUDA", True)
    return rows
