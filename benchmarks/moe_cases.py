"""Named cases of the mixture of experts: shapes, the models they come from, their work and the suites.

Conventions. FLOP of the forward pass: 6 * T * n * d * K with a gated activation, 4 * T * n * d * K without; router and
combination are not counted. `weight_bytes`: weights and biases of the experts that get a token, once each. Making the
inputs and checking an answer are in moe_inputs.py.
"""

from __future__ import annotations

import random
from typing import TYPE_CHECKING, Any, NamedTuple

from benchmarks.backward_cases import AUTOGRAD_SUITES, BACKWARD_SUITES
from benchmarks.cases import ITEMSIZE, OURS, SUITES, Suite
from benchmarks.numpy_backend import HOST_SUITES
from benchmarks.training_cases import FINE_TUNING, LAYER_STACKS

if TYPE_CHECKING:
    from collections.abc import Iterator

GATED = ("swiglu", "swigluoai")


class MoECase(NamedTuple):
    """One layer of experts: T tokens of d elements, E experts of n intermediate elements, the best K for each token.

    biases: both products have one (E, 2n) and (E, d). interleaved: rows of w_gate_up are g0, u0, g1, u1, ...
    correction_bias: the router's choice has a bias per expert. routing: our time includes the router (moe_route);
    other libraries always get weights and ids. graph: measured as a CUDA graph of calls with rotating weights.
    arrays: the array library that holds the inputs ("torch", "cupy" or "numpy").
    """

    name: str
    suite: str
    source: str
    tokens: int
    hidden: int
    intermediate: int
    experts: int
    top_k: int
    dtype: str = "bfloat16"
    activation: str = "swiglu"
    biases: bool = False
    interleaved: bool = False
    scoring_func: str = "softmax"
    renormalize: bool = True
    routed_scaling_factor: float = 1.0
    correction_bias: bool = False
    num_expert_group: int = 1
    topk_group: int = 1
    routing: bool = True
    graph: bool = False
    arrays: str = "torch"

    @property
    def gated(self) -> bool:
        return self.activation in GATED

    @property
    def up_rows(self) -> int:
        """Rows of an expert's first matrix."""
        return self.intermediate * (2 if self.gated else 1)

    @property
    def for_host(self) -> bool:
        """Whether it is there for its host side, however long the device takes."""
        return MOE_SUITES[self.suite].measure == "host_us"

    def flops(self) -> int:
        """Floating-point operations of the forward pass by this module's conventions."""
        return 2 * self.tokens * self.top_k * self.hidden * (self.up_rows + self.intermediate)

    def expert_bytes(self) -> int:
        """Bytes of one expert's weights and biases."""
        elements = self.hidden * (self.up_rows + self.intermediate)
        elements += (self.up_rows + self.hidden) if self.biases else 0
        return ITEMSIZE[self.dtype] * elements

    def bytes(self, touched: int) -> int:
        """Fewest bytes through device memory: `touched` experts' weights and the tokens read, the output written."""
        return touched * self.expert_bytes() + 2 * ITEMSIZE[self.dtype] * self.tokens * self.hidden

    def shape(self) -> dict[str, Any]:
        """The fields that say what was computed, for a row of results."""
        return {key: value for key, value in self._asdict().items() if key not in ("name", "suite")}


class Model(NamedTuple):
    """(d, n, E, K) of a published model and how it routes; shared experts are left out."""

    name: str
    source: str
    sizes: tuple[int, int, int, int]
    options: dict[str, Any]

    def case(self, suite: str, tokens: int, **options: Any) -> MoECase:
        name = f"{self.name}_t{tokens}"
        return MoECase(name, suite, self.source, tokens, *self.sizes, **(self.options | options))


_DEEPSEEK = {"scoring_func": "sigmoid", "correction_bias": True}
_GPT_OSS = {"activation": "swigluoai", "biases": True, "interleaved": True}
MODELS = {
    model.name: model
    for model in (
        Model("mixtral_8x7b", "Mixtral-8x7B", (4096, 14336, 8, 2), {}),
        Model("qwen3_30b_a3b", "Qwen3-30B-A3B", (2048, 768, 128, 8), {}),
        Model("qwen3_235b_a22b", "Qwen3-235B-A22B", (4096, 1536, 128, 8), {}),
        Model("qwen3_next_80b_a3b", "Qwen3-Next-80B-A3B", (2048, 512, 512, 10), {}),
        Model(
            "deepseek_v3",
            "DeepSeek-V3",
            (7168, 2048, 256, 8),
            {**_DEEPSEEK, "num_expert_group": 8, "topk_group": 4, "routed_scaling_factor": 2.5},
        ),
        Model("kimi_k2", "Kimi-K2", (7168, 2048, 384, 8), {**_DEEPSEEK, "routed_scaling_factor": 2.827}),
        Model("gpt_oss_20b", "gpt-oss-20b", (2880, 2880, 32, 4), _GPT_OSS),
        Model("olmoe", "OLMoE-1B-7B-0924", (2048, 1024, 64, 8), {"renormalize": False}),
    )
}

# The rows of SonicMoE's published table for one H100: (T, d, n, E, K).
SONIC_TABLE = (
    *((40960, 768, n, e, k) for n, e, k in ((256, 128, 8), (512, 64, 4), (1024, 32, 2))),
    *((24576, 1536, n, e, k) for n, e, k in ((256, 128, 8), (512, 64, 4), (1024, 32, 2))),
    *((32768, 4096, n, e, k) for n, e, k in ((256, 256, 16), (512, 128, 8), (1024, 64, 4))),
    *((32768, 4096, n, e, k) for n, e, k in ((512, 256, 16), (1024, 128, 8), (2048, 64, 4))),
)
DECODE_TOKENS = (1, 4, 16, 64, 256)
DRAWN_SEED = 20  # of the shapes of moe_decode that are of no model
DRAWN = "shapes drawn at random"
CURVE_TOKENS = tuple(2**i for i in range(16))


def shape_name(tokens: int, sizes: tuple[int, int, int, int]) -> str:
    """The name of a case that is of no model."""
    return "t{}_d{}_n{}_e{}_k{}".format(tokens, *sizes)


def _forward() -> Iterator[MoECase]:
    suite = "moe_forward"
    yield MODELS["mixtral_8x7b"].case(suite, 8192)
    yield MODELS["qwen3_30b_a3b"].case(suite, 16384)
    yield MODELS["qwen3_235b_a22b"].case(suite, 8192)
    yield MODELS["qwen3_next_80b_a3b"].case(suite, 16384)
    yield MODELS["deepseek_v3"].case(suite, 4096)
    yield MODELS["kimi_k2"].case(suite, 4096)
    yield MODELS["gpt_oss_20b"].case(suite, 8192)
    yield MODELS["olmoe"].case(suite, 16384)
    sizes = (2048, 512, 256, 8)
    yield MoECase(shape_name(4096, sizes), suite, "many small experts: a loop over them starves the GPU", 4096, *sizes)
    for tokens, *rest in SONIC_TABLE:
        row = (rest[0], rest[1], rest[2], rest[3])
        yield MoECase(shape_name(tokens, row), suite, "SonicMoE's table, one H100", tokens, *row)


def _decode() -> Iterator[MoECase]:
    suite, options = "moe_decode", {"graph": True, "routing": False}
    for tokens in DECODE_TOKENS:
        yield MODELS["qwen3_30b_a3b"].case(suite, tokens, **options)
    sizes = (2048, 512, 512, 10)
    for tokens in DECODE_TOKENS:
        source = "Qwen3-Next-80B-A3B's experts"
        yield MoECase(shape_name(tokens, sizes), suite, source, tokens, *sizes, graph=True, routing=False)
    for tokens in DECODE_TOKENS:
        yield MODELS["mixtral_8x7b"].case(suite, tokens, **options)
    draw = random.Random(DRAWN_SEED)
    for _ in range(12):
        n, experts, k = draw.randrange(1024, 1537, 64), draw.randint(60, 160), draw.randint(4, 8)
        tokens, sizes = draw.randint(20, 250), (draw.choice((2048, 2880, 4096)), n, experts, k)
        yield MoECase(shape_name(tokens, sizes), suite, DRAWN, tokens, *sizes, graph=True, routing=False)


def _host() -> Iterator[MoECase]:
    def case(name: str, tokens: int, sizes: tuple[int, int, int, int], **options: Any) -> MoECase:
        return MoECase(name, "moe_host", "tiny arrays: the host side is all there is", tokens, *sizes, **options)

    for arrays in ("torch", "cupy"):
        yield case(f"{arrays}_t16_e8_k2", 16, (256, 128, 8, 2), arrays=arrays, routing=False)
        yield case(f"{arrays}_t1_e128_k8", 1, (256, 128, 128, 8), arrays=arrays, routing=False)
        name = f"{arrays}_t128_e32_k4_biases_fp16"
        yield case(name, 128, (256, 128, 32, 4), arrays=arrays, dtype="float16", routing=False, **_GPT_OSS)
    model = MODELS["qwen3_30b_a3b"]
    for arrays, sizes in (("torch", (1, 16, 256, 4096)), ("cupy", (16, 4096))):
        for tokens in sizes:
            name = f"{arrays}_{model.name}_t{tokens}"
            yield model.case("moe_host", tokens, arrays=arrays, routing=False)._replace(name=name)


def _smoke() -> Iterator[MoECase]:
    def case(name: str, tokens: int, sizes: tuple[int, int, int, int], **options: Any) -> MoECase:
        return MoECase(name, "moe_smoke", "every feature, tiny", tokens, *sizes, **options)

    yield case("fp32", 33, (32, 24, 8, 2), dtype="float32")
    yield case("bf16", 33, (32, 24, 8, 2))
    yield case("fp16_no_renorm", 17, (32, 24, 8, 3), dtype="float16", renormalize=False)
    yield case("one_token", 1, (32, 24, 8, 2), dtype="float32")
    groups = {"num_expert_group": 4, "topk_group": 2, "routed_scaling_factor": 2.5}
    yield case("sigmoid_groups", 40, (32, 24, 16, 4), dtype="float32", **_DEEPSEEK, **groups)
    yield case("gpt_oss", 20, (32, 24, 8, 4), dtype="float32", **_GPT_OSS)
    yield case("not_gated", 20, (32, 24, 8, 2), dtype="float32", activation="relu2")
    yield case("graph", 5, (32, 24, 16, 2), dtype="float32", graph=True, routing=False)
    yield case("numpy", 9, (32, 24, 8, 2), dtype="float32", arrays="numpy")


TORCH_LIBRARIES = ("torch_grouped_mm", "torch_index_add", "torch_loop")
_RIVALS = (*TORCH_LIBRARIES, "liger", "vllm_triton", "sonicmoe")
_IN_GRAPHS = ("torch_grouped_mm", "vllm_triton")

MOE_SUITES: dict[str, Suite[MoECase]] = {
    suite.name: suite
    for suite in (
        Suite(
            "moe_forward",
            "prefill and training shapes of published models, and of SonicMoE's table; our router included",
            tuple(_forward()),
            (OURS, *_RIVALS),
            _RIVALS,
        ),
        Suite(
            "moe_decode",
            "few tokens, as a CUDA graph with rotating weights; routing given",
            tuple(_decode()),
            (OURS, *_IN_GRAPHS),
            _IN_GRAPHS,
        ),
        Suite(
            "moe_curve",
            "Qwen3-30B-A3B from 1 to 32,768 tokens, as a CUDA graph with rotating weights; our router included",
            tuple(MODELS["qwen3_30b_a3b"].case("moe_curve", tokens, graph=True) for tokens in CURVE_TOKENS),
            (OURS, *_IN_GRAPHS),
            _IN_GRAPHS,
        ),
        Suite(
            "moe_host",
            "host microseconds of one fused_moe, on tiny arrays and on a published layer",
            tuple(_host()),
            (OURS, "torch_grouped_mm"),
            ("torch_grouped_mm",),
            "host_us",
        ),
        Suite("moe_smoke", "every feature, tiny", tuple(_smoke()), (OURS, *TORCH_LIBRARIES), TORCH_LIBRARIES),
    )
}

ALL_SUITES: dict[str, Suite[Any]] = {
    **SUITES,
    **BACKWARD_SUITES,
    **AUTOGRAD_SUITES,
    **FINE_TUNING,
    **LAYER_STACKS,
    **MOE_SUITES,
    **HOST_SUITES,
}
