"""The measured mixtures of experts of `demo`, `bench` and `info`: moe_route of random logits, then fused_moe."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any, NamedTuple

import numpy as np

from flashmoe_cupy.cli.clocks import timed, to_gpu
from flashmoe_cupy.cli.measured import Bench, BenchSize, Measured, Result
from flashmoe_cupy.service import Size
from flashmoe_cupy.service.moe import activations
from flashmoe_cupy.testing_moe import MoECase

CHECKED_TOKENS = 32  # the float64 reference runs on the last tokens only; they go to experts all over the layer


class Layer(NamedTuple):
    """One layer to show: its title, and the sizes, dtype and features that its random arrays come from."""

    title: str
    case: MoECase

    @property
    def flops(self) -> int:
        c, products = self.case, 3 if self.case.gated else 2
        return 2 * products * c.tokens * c.hidden * (c.top_k * c.intermediate + c.shared)

    def text(self) -> str:
        c = self.case
        shared = f" shared{c.shared}" if c.shared else ""
        return f"t{c.tokens} d{c.hidden} n{c.intermediate} e{c.experts} k{c.top_k}{shared}"


def cases(gpu: bool) -> list[Layer]:
    """The demo's layers: small ones that a laptop's CPU does in a second each, or ones that fill a GPU."""
    if gpu:
        return [
            Layer("4 of 32 experts", MoECase(4096, 2048, 768, 32, 4, "bfloat16")),
            Layer("few tokens", MoECase(16, 2048, 768, 32, 4, "bfloat16")),
            Layer("gpt-oss's swigluoai, biases",
                  MoECase(4096, 1024, 1024, 16, 4, "bfloat16", "swigluoai", interleaved=True, biases="same")),
            Layer("a shared expert", MoECase(4096, 1024, 512, 16, 4, "float16", shared=1024)),
            Layer("at fp32 accuracy", MoECase(1024, 1024, 512, 16, 4, "float32")),
        ]  # fmt: skip
    return [
        Layer("4 of 16 experts", MoECase(256, 512, 256, 16, 4, "float32")),
        Layer("gpt-oss's swigluoai, biases",
              MoECase(128, 256, 256, 8, 4, "bfloat16", "swigluoai", interleaved=True, biases="same")),
        Layer("a shared expert", MoECase(128, 256, 128, 8, 2, "float16", shared=256)),
        Layer("one token", MoECase(1, 1024, 512, 16, 4, "bfloat16")),
    ]  # fmt: skip


def inputs(layer: Layer) -> dict[str, Any]:
    """NumPy arrays of a layer, the same in every run: those of `fused_moe` but its routing, and float32 logits."""
    arrays = layer.case.random()
    del arrays["topk_weights"], arrays["topk_ids"]
    rng = np.random.default_rng(1)
    return {**arrays, "logits": rng.standard_normal((layer.case.tokens, layer.case.experts), np.float32)}


def run(layer: Layer, gpu: bool, arrays: dict[str, Any] | None = None) -> Result:
    """Run one layer, check the routing and the results of its last tokens against float64, and time it."""
    import flashmoe_cupy
    from flashmoe_cupy.testing import within_tolerance

    case = layer.case
    arrays = inputs(layer) if arrays is None else arrays
    given = {name: to_gpu(array) for name, array in arrays.items()} if gpu else dict(arrays)
    logits, options = given.pop("logits"), case.options()

    def call() -> Any:
        weights, ids = flashmoe_cupy.moe_route(logits, top_k=case.top_k, renormalize=True)
        return flashmoe_cupy.fused_moe(topk_weights=weights, topk_ids=ids, **given, **options), ids

    (out, ids), took, first, compiled = timed(call, gpu)
    tail = min(CHECKED_TOKENS, case.tokens)
    got, chosen = ((array.get() if gpu else array) for array in (out[-tail:], ids[-tail:]))
    expected, right = _truth(arrays, case, tail)
    verdict = within_tolerance(got.astype(np.float64), expected, case.dtype)
    return Result(
        layer.title, layer.text(), case.dtype, "cuda" if gpu else "numpy", verdict.error, verdict.allowed,
        verdict.passed and np.array_equal(chosen, right), took, first, compiled, layer.flops / (took * 1e-3), "moe",
    )  # fmt: skip


def _truth(arrays: dict[str, Any], case: MoECase, tail: int) -> tuple[Any, Any]:
    """(out, topk_ids) of the last tokens in float64. Token by token, so that only its own experts become float64."""
    from flashmoe_cupy import reference

    weights, ids = reference.moe_route(arrays["logits"][-tail:], top_k=case.top_k, renormalize=True)
    names = ("w_gate_up", "w_down", "b_gate_up", "b_down")
    of_experts = {name: arrays[name] for name in names if name in arrays}
    common = {name: array for name, array in arrays.items() if name not in (*names, "x", "logits")}
    order = np.arange(case.top_k, dtype=np.int32)[None]
    rows = [
        reference.fused_moe(
            x=arrays["x"][[t - tail]], topk_weights=weights[[t]], topk_ids=order, **common, **case.options(),
            **{name: array[ids[t]] for name, array in of_experts.items()},
        )
        for t in range(tail)
    ]  # fmt: skip
    return np.concatenate(rows), ids


def demo(gpu: bool) -> Iterator[tuple[str, partial[Result]]]:
    """(title, run) of each layer of the demo."""
    for layer in cases(gpu):
        yield layer.title, partial(run, layer, gpu)


def self_test(gpu: bool) -> Result:
    """A small layer."""
    return run(Layer("self-test", MoECase(40, 64, 32, 8, 2, "bfloat16" if gpu else "float32")), gpu)


def bench(gpu: bool, dtype: str, longest: int, **sizes: Any) -> Iterator[Result]:
    """`sweep` up to `longest` tokens; sizes: of MoECase. Raises ValueError for a top_k of more than the experts."""
    case = MoECase(longest, dtype=dtype, **sizes)
    if case.top_k > case.experts:
        raise ValueError(f"--top-k {case.top_k} is more than the {case.experts} experts")
    return sweep(gpu, case)


def sweep(gpu: bool, case: MoECase) -> Iterator[Result]:
    """One result per number of tokens, four times as many each time, up to those of `case`; with the same weights."""
    whole = inputs(Layer("", case))
    tokens = 1
    while tokens <= case.tokens:
        arrays = {name: array[:tokens] if name in ("x", "logits") else array for name, array in whole.items()}
        yield run(Layer(case.activation, case._replace(tokens=tokens)), gpu, arrays)
        tokens *= 4


def _count(name: str, text: str, on_gpu: int, on_cpu: int) -> BenchSize:
    return BenchSize(Size(name, f"--{name.replace('_', '-')}", "positive", text), on_gpu, on_cpu)


MOE = Measured(
    "mixtures of experts",
    "sum of weight * expert(x) over a router's choice",
    demo,
    self_test,
    Bench(
        bench,
        (
            _count("hidden", "hidden size (default 2048 on a GPU, 512 without)", 2048, 512),
            _count("intermediate", "intermediate size of an expert (default 768 or 256)", 768, 256),
            _count("experts", "experts (default 64 or 16)", 64, 16),
            _count("top_k", "experts of a token (default 8 or 4)", 8, 4),
            BenchSize(
                Size("activation", "--activation", "word", "default swiglu", words=activations), "swiglu", "swiglu"
            ),
        ),
        counted="tokens",
        longest=(4096, 256),
        column="activation",
        title="a mixture of experts over tokens",
        text="a layer of experts over numbers of tokens",
    ),
)
