"""The NumPy back end beside PyTorch on the same processor: cases, and the loop that measures them in turns.

Both get the same values and `THREADS` threads. Each answer is checked against float64 first. Microseconds are wall time
of one call: the median of the rounds, each of which takes a sample of both, in turning order. `lowest_us` is the
lowest. `host_us` of a short call is the lowest median of its batches, as for GPU arrays.
"""

from __future__ import annotations

import statistics
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from benchmarks.cases import OURS, Suite

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    import torch

    from benchmarks.bench import Run

THREADS = 2
TORCH = "torch_cpu"
NAME = "numpy_backend"
_SHORT_FLOPS = 1 << 17  # calls below this have a `host_us`, however slow the machine is


class HostCase(NamedTuple):
    """One call on arrays in host memory. sizes: see the function that makes its inputs."""

    name: str
    suite: str
    source: str
    kind: str  # "attention", "route" or "moe"
    sizes: tuple[int, ...]
    dtype: str = "float32"

    def flops(self) -> int:
        if self.kind == "attention":
            batch, seqlen, heads, dim = self.sizes
            return 2 * batch * heads * seqlen * seqlen * dim
        if self.kind == "moe":
            tokens, hidden, intermediate, _, k = self.sizes
            return 6 * tokens * hidden * intermediate * k
        return self.sizes[0] * self.sizes[1]

    def shape(self) -> dict[str, Any]:
        return {key: value for key, value in self._asdict().items() if key not in ("name", "suite")}


HOST_SUITES: dict[str, Suite[HostCase]] = {
    NAME: Suite(
        NAME,
        "the NumPy back end beside PyTorch on the CPU, two threads",
        (
            HostCase("attention_fp32_2k_causal", NAME, "SDPA", "attention", (1, 2048, 8, 64)),
            HostCase("attention_bf16_2k_causal", NAME, "SDPA", "attention", (1, 2048, 8, 64), "bfloat16"),
            HostCase("router_4096_64_k8", NAME, "softmax and topk", "route", (4096, 64, 8)),
            HostCase("fused_moe_t1024", NAME, "a loop over the experts", "moe", (1024, 512, 512, 16, 4)),
            HostCase("attention_8_tokens", NAME, "SDPA", "attention", (1, 8, 8, 64)),
        ),
        (OURS, TORCH),
        (TORCH,),
    )
}


class Calls(NamedTuple):
    """Both calls, each with a function that makes one float64 tensor of its answer, the truth and the allowed error."""

    run: dict[str, Callable[[], Any]]
    answer: Callable[[Any], torch.Tensor]
    truth: torch.Tensor
    limit: float


def prepare(case: HostCase, seed: int) -> Calls:
    """The calls on random normal inputs."""
    return {"attention": _attention, "route": _route, "moe": _moe}[case.kind](case, seed)


def _array(t: torch.Tensor) -> Any:
    """The tensor's memory for NumPy."""
    import ml_dtypes
    import torch

    if t.dtype == torch.bfloat16:
        return t.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
    return t.numpy()


def _wide(a: Any) -> torch.Tensor:
    import torch

    return a.double() if isinstance(a, torch.Tensor) else torch.from_numpy(np.asarray(a, np.float64))


def _normal(seed: int, *shapes: tuple[int, ...]) -> list[torch.Tensor]:
    import torch

    draw = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=draw) for shape in shapes]


def _attention(case: HostCase, seed: int) -> Calls:
    import torch

    from flashmoe_cupy import flash_attention

    sdpa = torch.nn.functional.scaled_dot_product_attention
    q, k, v = (t.to(getattr(torch, case.dtype)) for t in _normal(seed, *[case.sizes] * 3))
    arrays = [_array(t) for t in (q, k, v)]
    turned = [t.transpose(1, 2) for t in (q, k, v)]
    truth = sdpa(*[t.double() for t in turned], is_causal=True).transpose(1, 2)
    run = {
        OURS: lambda: flash_attention(*arrays, causal=True),
        TORCH: lambda: sdpa(*turned, is_causal=True).transpose(1, 2),
    }
    return Calls(run, _wide, truth, 1e-5 if case.dtype == "float32" else 1e-2)


def _route(case: HostCase, seed: int) -> Calls:
    """sizes: tokens, experts, top_k."""
    import torch

    from flashmoe_cupy import moe_route

    tokens, experts, k = case.sizes
    (logits,) = _normal(seed, (tokens, experts))
    array = logits.numpy()

    def answer(found: Any) -> torch.Tensor:
        weights, ids = (_wide(a) for a in found)
        return torch.zeros(tokens, experts, dtype=torch.float64).scatter_(1, ids.long(), weights)

    truth = answer(torch.topk(torch.softmax(logits.double(), -1), k))
    run: dict[str, Callable[[], Any]] = {
        OURS: lambda: moe_route(array, top_k=k),
        TORCH: lambda: torch.topk(torch.softmax(logits, -1), k),
    }
    return Calls(run, answer, truth, 1e-5)


def _moe(case: HostCase, seed: int) -> Calls:
    """sizes: tokens, hidden, intermediate, experts, top_k."""
    import torch
    from torch.nn.functional import linear, silu

    from flashmoe_cupy import fused_moe

    tokens, d, n, experts, k = case.sizes
    x, w1, w2, logits = _normal(seed, (tokens, d), (experts, 2 * n, d), (experts, d, n), (tokens, experts))
    w1, w2 = w1 / d**0.5, w2 / n**0.5
    weights, ids = torch.topk(torch.softmax(logits, -1), k)

    def loop(x: torch.Tensor, w1: torch.Tensor, w2: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        out = torch.zeros_like(x)
        for e in range(experts):
            token, place = torch.where(ids == e)
            gate, up = linear(x[token], w1[e]).chunk(2, dim=-1)
            out.index_add_(0, token, linear(silu(gate) * up, w2[e]) * weights[token, place, None])
        return out

    arrays = [t.numpy() for t in (x, w1, w2, weights, ids)]
    truth = loop(*[t.double() for t in (x, w1, w2, weights)])
    return Calls({OURS: lambda: fused_moe(*arrays), TORCH: lambda: loop(x, w1, w2, weights)}, _wide, truth, 1e-5)


class HostBench:
    """Measures the cases of HOST_SUITES and hands rows to the run as they come."""

    def __init__(self, run: Run) -> None:
        self.common = run

    def measure(self, case: HostCase, libraries: Sequence[str], seed: int, deadline: float) -> list[dict[str, Any]]:  # noqa: ARG002
        """Measure one case on both; returns its rows, which are written too."""
        import torch

        before = torch.get_num_threads()
        torch.set_num_threads(THREADS)
        try:
            with torch.no_grad():
                rows = self._measure(case, libraries, prepare(case, seed))
        finally:
            torch.set_num_threads(before)
        for row in rows:
            self.common.write(row)
        return rows

    def _measure(self, case: HostCase, libraries: Sequence[str], calls: Calls) -> list[dict[str, Any]]:
        from benchmarks.timing import host_microseconds

        effort, timer = self.common.effort, self.common.timer
        rows, plans = {}, {}
        for name in libraries:
            error = float((calls.answer(calls.run[name]()) - calls.truth).norm() / calls.truth.norm())
            right = error <= calls.limit  # a NaN is not
            row: dict[str, Any] = {"suite": case.suite, "case": case.name, "library": name}
            row |= {"status": "ok"} if right else {"status": "wrong"}
            row |= {"reason": "" if right else f"relative error {error:.2g}"}
            row |= {"error": error if error == error else None, "error_limit": calls.limit}
            rows[name] = row | {"flops": case.flops(), "threads": THREADS, "shape": case.shape(), **self.common.facts}
            rows[name]["device"] = f"{processor()}, {THREADS} threads"
            if right:
                plans[name] = (lambda run: lambda _: run())(calls.run[name])
        launches = {name: effort.launches(timer.sample(run, 3)) for name, run in plans.items()}
        samples: dict[str, list[float]] = {name: [] for name in plans}
        for turn in range(effort.rounds):
            order = list(plans)
            for name in order[turn % len(order) :] + order[: turn % len(order)] if order else ():
                samples[name].append(timer.sample(plans[name], launches[name]))
        for name, run in plans.items():
            middle = statistics.median(samples[name])
            rows[name] |= {"device_us": round(middle, 3), "lowest_us": round(min(samples[name]), 3)}
            tflops, ceiling = case.flops() / middle / 1e6, self.common.ceiling
            rows[name] |= {"tflops": float(f"{tflops:.5g}"), "rounds": len(samples[name])}
            rows[name] |= {"share": round(tflops / ceiling, 4), "ceiling_tflops": float(f"{ceiling:.5g}")}
            rows[name] |= {"spread": round((max(samples[name]) - min(samples[name])) / middle, 4)}
            rows[name] |= {"launches": launches[name], "host_us": None, "host_us_median": None}
            if case.flops() < _SHORT_FLOPS:
                lowest, host = host_microseconds(timer, run, effort.host_calls, seconds=effort.host_seconds)
                rows[name] |= {"host_us": round(lowest, 3), "host_us_median": round(host, 3)}
        return list(rows.values())


def processor() -> str:
    """The processor's name."""
    import platform
    from contextlib import suppress
    from pathlib import Path

    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return " ".join(line.partition(":")[2].split())
    return platform.processor() or platform.machine()
