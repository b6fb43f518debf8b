"""The Hopper kernel a thousand times over beside other work, and in graphs: the same bits each time.

A race between its warps would show as a run that differs, and rarely; so the comparison stays on the device, and the
host never waits between two runs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any

import pytest
from test_gpu_truth import (
    Arrays,
    Tensor,
    attention,
    compile_registered,
    judge,
    kernel_names,
    register,
    same_bits,
    tensors,
)

from flashmoe_cupy.plan.kernels import only
from flashmoe_cupy.testing import AttentionCase, Case, VarlenCase

torch = pytest.importorskip("torch")
pytestmark = [pytest.mark.gpu, pytest.mark.sm90, pytest.mark.torch]

HOPPER = "attention_fwd_sm90"
REPEATS = 1000
CASES: dict[str, Case] = {
    "d 64, causal": AttentionCase(1000, 1000, 2, 8, 8, 64, causal=True),
    "d 64, full, GQA": AttentionCase(900, 1111, 2, 8, 2, 64, dtype="float16"),
    "d 64, many short": AttentionCase(100, 130, 32, 16, 4, 64, causal=True),
    "d 128, causal, GQA": AttentionCase(1000, 1000, 2, 8, 2, 128, causal=True),
    "d 128, many keys": AttentionCase(300, 2500, 2, 8, 8, 128, dtype="float16"),
    "d 128, window, sinks": AttentionCase(1500, 1500, 1, 8, 1, 128, window_size=(200, 30), sinks="float32"),
    "d 256, causal": AttentionCase(700, 900, 1, 8, 8, 256, causal=True),
    "d 64/256, full": AttentionCase(700, 900, 1, 8, 4, 64, 256),
    "changed scores": AttentionCase(500, 600, 2, 8, 2, 128, softcap=15.0, alibi="bh", causal=True),
    "bias": AttentionCase(500, 600, 2, 8, 2, 64, bias="1hqk"),
    "packed": VarlenCase((700, 0, 77, 1, 1000), (710, 5, 70, 300, 1000), heads_q=8, head_dim=128, causal=True),
    "packed, four consumers, bounded softcap": VarlenCase(
        (256, 60, 250, 256), (201, 70, 250, 230), heads_q=8, causal=True, softcap=30.0
    ),
    "packed, used": VarlenCase((300, 90, 400), (310, 99, 500), (300, 0, 333), (250, 99, 400), 7, 9, heads_q=8),
}

register(CASES.values())


@pytest.fixture(scope="module", autouse=True)
def _compiled() -> None:
    compile_registered()


@pytest.fixture(autouse=True)
def _hopper_kernel() -> Iterator[None]:
    with only(HOPPER):
        yield


class Disturbance:
    """A second stream with matrix products of many sizes, so that blocks start at other times and in other places."""

    def __init__(self) -> None:
        self.stream = torch.cuda.Stream()
        sizes = (512, 4096, 1536, 4096)
        self.factors = [torch.randn((n, n), device="cuda", dtype=torch.bfloat16) for n in sizes]
        self.products = [torch.empty_like(x) for x in self.factors]
        torch.cuda.synchronize()

    def __call__(self, i: int) -> None:
        n = i % len(self.factors)
        with torch.cuda.stream(self.stream):
            torch.mm(self.factors[n], self.factors[n], out=self.products[n])


def words(x: Tensor) -> Tensor:
    """The bits of out (2 bytes a number) or lse (4)."""
    return x.view(torch.int16 if x.element_size() == 2 else torch.int32)


def differing_runs(case: Case, t: Arrays, want: Tensor, want_lse: Tensor, disturb: Callable[[int], Any], n: int) -> int:
    """How many of n runs gave other bits than `want` and `want_lse`. Waits for the device only at its end."""
    out, wrong = torch.empty_like(want), torch.zeros((), dtype=torch.int64, device=want.device)
    out_words, want_words, want_lse_words = words(out), words(want), words(want_lse)
    for i in range(n):
        disturb(i)
        out.fill_(math.nan)
        torch.full_like(want_lse, math.nan)  # freed at once: the library's lse then likely gets this memory
        _, lse = attention(case, t, out=out)
        wrong += (out_words != want_words).any() | (words(lse) != want_lse_words).any()
    return int(wrong)


def first_run(case: Case, t: Arrays) -> tuple[Tensor, Tensor]:
    """The result that the others must equal; right, and with NaN where nothing is written."""
    shape = (*t["q"].shape[:-1], case.dim_v)
    want = torch.full(shape, math.nan, dtype=t["q"].dtype, device=t["q"].device)
    _, want_lse = attention(case, t, out=want)
    assert judge(case, t, want, want_lse) == []
    return want, want_lse


@pytest.fixture(scope="module")
def disturbance() -> Disturbance:
    return Disturbance()


@pytest.mark.parametrize("name", CASES)
def test_same_bits_beside_other_work(name: str, disturbance: Disturbance) -> None:
    case = CASES[name]
    assert HOPPER in kernel_names(case)
    t = tensors(case, "cuda")
    want, want_lse = first_run(case, t)
    torch.cuda.synchronize()  # the products must not begin before the arrays are there to be compared
    assert differing_runs(case, t, want, want_lse, disturbance, REPEATS) == 0


def test_the_comparison_sees_one_bit() -> None:
    case = CASES["d 64, many short"]
    t = tensors(case, "cuda")
    want, want_lse = first_run(case, t)
    for x in (want, want_lse):
        flat = words(x).view(-1)
        flat[-1] ^= 1
        assert differing_runs(case, t, want, want_lse, lambda i: nullcontext(), 3) == 3
        flat[-1] ^= 1
    assert differing_runs(case, t, want, want_lse, lambda i: nullcontext(), 3) == 0


@pytest.mark.parametrize("name", CASES)
def test_graph_with_other_contents(name: str, disturbance: Disturbance) -> None:
    """Captured once; each replay gives what a call gives on what the arrays hold then. Maps must not age."""
    case = CASES[name]
    t = tensors(case, "cuda")
    out, _ = first_run(case, t)
    graph = torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        _, lse = attention(case, t, out=out)
    for seed in (1, 2, 3):
        for key, x in tensors(case, "cuda", seed).items():
            t[key].copy_(x)
        out.fill_(math.nan)
        lse.fill_(math.nan)
        torch.cuda.synchronize()
        disturbance(seed)
        graph.replay()
        torch.cuda.synchronize()
        replayed, replayed_lse = out.clone(), lse.clone()
        want, want_lse = first_run(case, t)
        assert same_bits(replayed, want) and same_bits(replayed_lse, want_lse), seed
