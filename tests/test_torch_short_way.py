"""Calls like earlier ones that torch differentiates or casts: what is kept of them never serves other ones.

A build of torch with CUDA is played here; the arrays stay in host memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest

from flashmoe_cupy import flash_attention, flash_attention_varlen
from flashmoe_cupy.arrays import view
from flashmoe_cupy.errors import UnsupportedProblem
from flashmoe_cupy.ops import access as accesses
from flashmoe_cupy.ops.call import Plan
from flashmoe_cupy.plan.forget import forget

torch = pytest.importorskip("torch")

from flashmoe_cupy.integrations import flash_attn as fa  # noqa: E402
from flashmoe_cupy.integrations.sdpa import scaled_dot_product_attention as sdpa  # noqa: E402

pytestmark = pytest.mark.torch


def _forget() -> None:
    for clear in forget:
        clear()


@pytest.fixture
def short_way(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[], list[str]]]:
    """Call it to begin with short ways. It gives a list, to which each call that takes one adds its operation."""
    ran: list[str] = []
    fast_calls: dict[Plan, Any] = {}

    def fast_call(plan: Plan, _: Any, __: Any) -> Any:
        def fast(given: Any) -> Any:
            ran.append(plan.operation.name)
            views = [view(x, "") for x in given]
            return plan.run((*views, *[None] * (len(plan.operation.arguments) - len(views))), None, None)

        return fast_calls.setdefault(plan, fast)

    def begin() -> list[str]:
        _forget()
        for name in ("_cuda_getDevice", "_cuda_getCurrentRawStream", "_cuda_isCurrentStreamCapturing"):
            monkeypatch.setattr(torch._C, name, lambda *_: 0, raising=False)
        access = accesses._torch(torch)
        monkeypatch.setattr(access, "host", True)
        monkeypatch.setattr(Plan, "fast_call", fast_call)
        monkeypatch.setitem(accesses._known, torch.Tensor, access)
        return ran

    yield begin
    _forget()


def equal(found: Any, expect: Any) -> None:
    assert len(found) == len(expect) and all(map(torch.equal, found, expect))


def test_forward_and_backward(short_way: Callable[[], list[str]]) -> None:
    def call(scale: int, half: bool, mode: bool, options: dict[str, Any]) -> list[Any]:
        torch.manual_seed(0)
        sizes = (2, 5 * scale, 4, 16), (2, 7 * scale, 2, 16), (2, 7 * scale, 2, 16)
        q, k, v = given = [torch.randn(size).requires_grad_() for size in sizes]
        dtype = torch.bfloat16 if half else torch.float32
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=mode):
            made = flash_attention(q.to(dtype), k.to(dtype), v.to(dtype), **options)
            with torch.no_grad():
                plain = flash_attention(q.to(dtype), k.to(dtype), v.to(dtype), **options)
        made, plain = (x if options else (x,) for x in (made, plain))
        return [*made, *plain, *torch.autograd.grad(made, given, [torch.ones_like(x) for x in made])]

    ways = [(scale, half, mode, options) for scale in (1, 2) for half in (True, False) for mode in (True, False)
            for options in ({"return_lse": True}, {})]  # fmt: skip
    want = [call(*way) for way in ways]
    ran = short_way()
    for _ in range(4):
        ran.clear()
        for way, expect in zip(ways, want, strict=True):
            equal(call(*way), expect)
    # By now nothing takes the long way: two forward passes and a backward for each call.
    assert len(ran) == 3 * len(ways) and {*ran} == {"flash_attention", "flash_attention_backward"}


def test_the_stand_ins(short_way: Callable[[], list[str]]) -> None:
    """What `flash_attention` knows serves them only where they mean the same."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 6, heads, 16) for heads in (4, 2, 2))  # for sdpa: 6 heads and lengths 4, 2
    cu = torch.tensor([0, 6, 12], dtype=torch.int32)
    flat: Any = [x.flatten(0, 1) for x in (q, k, v)]
    varlen: Any = partial(fa.flash_attn_varlen_func, max_seqlen_q=6, max_seqlen_k=6)
    packed = {"cu_seqlens_q": cu, "cu_seqlens_k": cu, "max_seqlen_q": 6, "max_seqlen_k": 6}
    ways: list[Callable[[], Any]] = [
        lambda: (fa.flash_attn_func(q, k, v), fa.flash_attn_func(q, k, v, 0, None, True)),
        lambda: (fa.flash_attn_func(q, k, v, softcap=-1.0), fa.flash_attn_func(q, k, v, window_size=(1, 0))),
        lambda: fa.flash_attn_func(q, k, v, return_attn_probs=True)[:2],
        lambda: varlen(*flat, cu, cu, return_attn_probs=True)[:2],
        lambda: (varlen(*flat, cu, cu, causal=True),),
        lambda: (sdpa(q, k, v), sdpa(q, k, v, scale=0.5), sdpa(q, k, v, enable_gqa=True)),
        lambda: (sdpa(q, k, v, is_causal=True), sdpa(k, q, q, is_causal=True), sdpa(q, q, q, is_causal=True)),
    ]
    want = [way() for way in ways]
    ran = short_way()
    for _ in range(3):
        ran.clear()
        for causal in (False, True):
            flash_attention(q, k, v, causal=causal)
            flash_attention(k, q, q, causal=causal, layout="bhsd")
            flash_attention(q, k, v, causal=causal, layout="bhsd")
            flash_attention_varlen(*flat, **packed, causal=causal)
        for way, expect in zip(ways, want, strict=True):
            equal(way(), expect)
    assert len(ran) == 8 + sum(map(len, want)) - 2  # out and lse are of one call
    few = torch.randn(2, 3, 4, 16)
    for _ in range(3):
        flash_attention(q, few, few, layout="bhsd")
        equal([sdpa(q, few, few, enable_gqa=True)], [flash_attention(q, few, few, layout="bhsd")])
    one: Any = 1
    wrong: list[Callable[[], Any]] = [
        lambda: sdpa(q, few, few), lambda: sdpa(q, k, v, dropout_p=0.1), lambda: sdpa(q, k, v, enable_gqa=one),
        lambda: fa.flash_attn_func(q, k, v, 0.1), lambda: fa.flash_attn_func(q, k, v, deterministic=one),
    ]  # fmt: skip
    for call in wrong:
        with pytest.raises(UnsupportedProblem):
            call()
    for call in (lambda: fa.flash_attn_func(q, k.numpy(), v), lambda: sdpa(q, k.numpy(), v)):
        with pytest.raises(TypeError, match=r"must be a torch"):
            call()
