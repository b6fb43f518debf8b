"""A Triton kernel that stands beside vLLM's in its pipeline. Importing this file needs Triton."""

from __future__ import annotations

import importlib

triton = importlib.import_module("triton")
tl = importlib.import_module("triton.language")


# Triton reads the annotations itself and knows no others.
def _gated(h, a, n, alpha, limit, CLAMPED: tl.constexpr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def, name-defined]
    """Row by row: a (rows, n) from h (rows, 2n), gates first; silu(g) * u, or gpt-oss's form where CLAMPED."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < n
    gate = tl.load(h + row * 2 * n + column, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(h + row * 2 * n + n + column, mask=inside, other=0.0).to(tl.float32)
    if CLAMPED:
        gate = tl.minimum(gate, limit)
        up = tl.minimum(tl.maximum(up, -limit), limit)
        value = (up + 1.0) * gate * tl.sigmoid(alpha * gate)
    else:
        value = gate * tl.sigmoid(gate) * up
    tl.store(a + row * n + column, value.to(a.dtype.element_ty), mask=inside)


gated = triton.jit(_gated)
