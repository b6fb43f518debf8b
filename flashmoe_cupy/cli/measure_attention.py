"""The measured attentions of `demo`, `bench` and `info`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import numpy as np

from flashmoe_cupy import service
from flashmoe_cupy.cli.clocks import timed, to_gpu
from flashmoe_cupy.cli.measured import Bench, BenchSize, Measured, Result

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
        took, first, compiled, case.flops / (took * 1e-3), "attention",
    )  # fmt: skip


def demo(gpu: bool) -> Iterator[tuple[str, partial[Result]]]:
    """(title, run) of each case of the demo."""
    for case in cases(gpu):
        yield case.title, partial(run, case, gpu)


def self_test(gpu: bool) -> Result:
    """A small case with a causal mask and grouped heads."""
    kind = "bfloat16" if gpu else "float32"
    return run(Case("self-test", (2, 65, 129, 4, 2, 64, 64), kind, {"causal": True}), gpu)


def sweep(
    run: Callable[[Case, bool], Result], gpu: bool, dtype: str, longest: int, *, head_dim: int, heads: int, causal: bool
) -> Iterator[Result]:
    """run(case, gpu) for each length, doubling up to `longest`, with about the same number of tokens in each."""
    length = min(longest, 1024 if gpu else 256)
    tokens = 16384 if gpu else 1024
    while length <= longest:
        sizes = (max(1, tokens // length), length, length, heads, heads, head_dim, head_dim)
        yield run(Case("causal" if causal else "full", sizes, dtype, {"causal": causal}), gpu)
        length *= 2


ATTENTION = Measured(
    "attentions",
    "softmax(scale * q k^T + masks) v",
    demo,
    self_test,
    Bench(
        partial(sweep, run),
        (
            BenchSize(service.Size("head_dim", "--d", "positive", "head dimension (default 128)"), 128, 128),
            BenchSize(service.Size("heads", "--heads", "positive", "query and key heads (default 16)"), 16, 16),
            BenchSize(service.Size("causal", "--causal", "flag", "causal mask"), False, False),
        ),
        counted="queries",
        longest=(16384, 1024),
        column="mask",
        title="attention over sequence lengths",
        text="attention over sequence lengths",
    ),
)
