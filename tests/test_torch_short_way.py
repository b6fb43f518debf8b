"""Calls like earlier ones that torch differentiates or casts: what is kept of them never serves other ones.

A build of torch with CUDA is played here; the arrays stay in host memory.
"""

from __future__ import annotations

from typing import Any

import pytest

from flashmoe_cupy import flash_attention
from flashmoe_cupy.arrays import view
from flashmoe_cupy.ops import access as accesses
from flashmoe_cupy.ops.call import Plan
from flashmoe_cupy.plan.forget import forget

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.torch


def test_what_a_guard_knows_runs_its_plan_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU: forward keeps a plan for the arrays that a guard knows. It is never that of other ones."""
    for name in ("_cuda_getDevice", "_cuda_getCurrentRawStream", "_cuda_isCurrentStreamCapturing"):
        monkeypatch.setattr(torch._C, name, lambda *_: 0, raising=False)
    access, ran = accesses._torch(torch), []
    fast_calls: dict[Plan, Any] = {}

    def fast_call(plan: Plan, _: Any, given: Any) -> Any:
        def fast(given: Any) -> Any:
            ran.append((plan.operation.name, tuple(given[0].shape), given[0].dtype, len(plan.forms)))
            views = [view(x, "") for x in given]
            return plan.run((*views, *[None] * (len(plan.operation.arguments) - len(views))), None, None)

        return fast_calls.setdefault(plan, fast)

    def call(scale: int, half: bool, mode: bool, options: dict[str, Any]) -> list[Any]:
        sizes = (2, 5 * scale, 4, 16), (2, 7 * scale, 2, 16), (2, 7 * scale, 2, 16)
        torch.manual_seed(0)
        q, k, v = given = [torch.randn(size).requires_grad_() for size in sizes]
        dtype = torch.bfloat16 if half else torch.float32
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=mode):
            made = flash_attention(q.to(dtype), k.to(dtype), v.to(dtype), **options)
            with torch.no_grad():
                plain = flash_attention(q.to(dtype), k.to(dtype), v.to(dtype), **options)
        made, plain = (x if options else (x,) for x in (made, plain))
        return [*made, *plain, *torch.autograd.grad(made, given, [torch.ones_like(x) for x in made])]

    ways = [(scale, half, mode, options) for scale in (1, 2) for half in (False, True) for mode in (False, True)
            for options in ({}, {"return_lse": True})]  # fmt: skip
    want = [call(*way) for way in ways]
    for clear in forget:
        clear()
    monkeypatch.setattr(access, "host", True)
    monkeypatch.setattr(Plan, "fast_call", fast_call)
    monkeypatch.setitem(accesses._known, torch.Tensor, access)
    try:
        for _ in range(4):
            ran.clear()
            for way, expect in zip(ways, want, strict=True):
                found = call(*way)
                assert len(found) == len(expect) and all(map(torch.equal, found, expect))
    finally:
        for clear in forget:
            clear()
    # By now nothing takes the long way: two forward passes and a backward for each call.
    assert len(ran) == 3 * len(ways) and {one[0] for one in ran} == {"flash_attention", "flash_attention_backward"}
