"""The measured gradients of attention of `demo`, `bench` and `info`."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import numpy as np

from flashmoe_cupy.cli.clocks import timed, to_gpu
from flashmoe_cupy.cli.measure_attention import ATTENTION, CHECKED_QUERIES, Case, inputs, sweep
from flashmoe_cupy.cli.measured import Bench, Measured, Result

_CHECKED_WHOLE = 2048  # queries up to which dk and dv are checked, too: they need all of them


def cases(gpu: bool) -> list[Case]:
    """The demo's cases: small ones that a laptop's CPU does in a second each, or ones that fill a GPU."""
    if gpu:
        return [
            Case("full", (4, 4096, 4096, 16, 16, 128, 128), "bfloat16", {}),
            Case("causal, grouped heads", (8, 2048, 2048, 32, 8, 128, 128), "bfloat16", {"causal": True}),
            Case("causal, window 512, softcap, sinks", (4, 2048, 2048, 16, 4, 64, 64), "bfloat16",
                 {"causal": True, "window_size": (511, 0), "softcap": 30.0}, True),
            Case("causal at fp32 accuracy", (1, 1024, 1024, 8, 8, 64, 64), "float32", {"causal": True}),
        ]  # fmt: skip
    return [
        Case("full", (1, 512, 512, 8, 8, 64, 64), "float32", {}),
        Case("causal, grouped heads", (1, 512, 512, 8, 2, 64, 64), "float32", {"causal": True}),
        Case("causal, window 256, softcap, sinks", (1, 1024, 1024, 4, 1, 64, 64), "bfloat16",
             {"causal": True, "window_size": (255, 0), "softcap": 30.0}, True),
    ]  # fmt: skip


def run(case: Case, gpu: bool, repeats: int = 5) -> Result:
    """Run one case, check gradients against the float64 reference and time it. The forward is not timed."""
    import flashmoe_cupy
    from flashmoe_cupy.testing import TOLERANCES, relative_error

    arrays = inputs(case)
    given = {name: to_gpu(array) for name, array in arrays.items()} if gpu else arrays
    out, lse = flashmoe_cupy.flash_attention(**given, **case.options, return_lse=True)
    host = np.random.default_rng(2).standard_normal(out.shape, np.float32).astype(arrays["q"].dtype)
    dout = to_gpu(host) if gpu else host

    def call() -> Any:
        return flashmoe_cupy.flash_attention_backward(dout, out=out, lse=lse, **given, **case.options)

    made, took, first, compiled = timed(call, gpu, repeats)
    whole = case.sizes[1] <= _CHECKED_WHOLE
    tail = case.sizes[1] if whole else CHECKED_QUERIES
    heads = max(1, case.sizes[3] // case.sizes[4])  # the query heads of the first key head

    def queries(x: Any) -> Any:
        return (x.get() if hasattr(x, "get") else x)[:1, -tail:, :heads]

    of_lse = (lse.get() if gpu else lse)[:1, :heads, -tail:]
    rest = {"k": arrays["k"][:1, :, :1], "v": arrays["v"][:1, :, :1]}
    if case.sinks:
        rest["sinks"] = arrays["sinks"][:heads]
    want = flashmoe_cupy.reference.flash_attention_backward(
        queries(host), queries(arrays["q"]), out=queries(out), lse=of_lse, **rest, **case.options
    )
    found = {"dq": queries(made.dq)}
    if whole:
        found |= {name: (x.get() if gpu else x)[:1, :, :1] for name, x in (("dk", made.dk), ("dv", made.dv))}
    # Twice that of the forward: weights and their gradients are both rounded. Rows may be zeros, so none is alone.
    allowed = 2 * TOLERANCES[case.dtype].norm * (3 if case.options.get("softcap") else 1)
    worst = max(relative_error(x.astype(np.float64), getattr(want, name)) for name, x in found.items())
    flops = case.flops // (case.sizes[5] + case.sizes[6]) * (3 * case.sizes[5] + 2 * case.sizes[6])
    return Result(
        case.title, case.text(), case.dtype, "cuda" if gpu else "numpy", worst, allowed, worst <= allowed,
        took, first, compiled, flops / (took * 1e-3), "attention_backward",
    )  # fmt: skip


def demo(gpu: bool) -> Iterator[tuple[str, partial[Result]]]:
    """(title, run) of each case of the demo."""
    for case in cases(gpu):
        yield f"gradients, {case.title}", partial(run, case, gpu)


def self_test(gpu: bool) -> Result:
    """A small case with a causal mask and grouped heads."""
    kind = "bfloat16" if gpu else "float32"
    return run(Case("self-test", (2, 65, 129, 4, 2, 64, 64), kind, {"causal": True}), gpu)


ATTENTION_BACKWARD = Measured(
    "gradients of attention",
    "dq, dk and dv of softmax(scale * q k^T + masks) v",
    demo,
    self_test,
    Bench(
        partial(sweep, run),
        ATTENTION.bench.sizes,
        counted="queries",
        longest=ATTENTION.bench.longest,
        column="mask",
        title="gradients of attention over sequence lengths",
        text="gradients of attention over sequence lengths",
    ),
)
