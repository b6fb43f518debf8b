"""The transformers integration: small random models against their own eager attention, in float32 on the CPU.

Every model family brings another feature of the op. The weights are drawn large, so that attention is far from uniform
and a feature that is left out shows in the logits, which `test_features_matter` proves.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers", minversion="5.0")

from transformers import DynamicCache, StaticCache  # noqa: E402
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS  # noqa: E402
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS  # noqa: E402
from transformers_kit import TOLERANCE, VOCAB, Tensor, both, build, close, left_padding, tokens, use  # noqa: E402

from flashmoe_cupy.errors import UnsupportedProblem  # noqa: E402
from flashmoe_cupy.integrations import transformers as integration  # noqa: E402

pytestmark = [
    pytest.mark.torch,
    # what transformers deprecates of its own or of torch is not for these tests to judge
    pytest.mark.filterwarnings("default::DeprecationWarning", "default::FutureWarning"),
]

SIZES: dict[str, Any] = {
    "vocab_size": VOCAB, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 128, "pad_token_id": 0, "bos_token_id": 1,
    "eos_token_id": 2, "attention_dropout": 0.0,
}  # fmt: skip
FAMILIES = ("llama", "mistral", "gemma2", "gpt_oss")


def config(family: str, **changes: Any) -> Any:
    """GQA everywhere; mistral: a window in each layer; gemma2: softcap, windows in turn; gpt_oss: sinks, windows."""
    if family == "llama":
        return transformers.LlamaConfig(**SIZES | changes)
    if family == "mistral":
        return transformers.MistralConfig(**SIZES | {"sliding_window": 5} | changes)
    if family == "gemma2":
        extra = {"sliding_window": 5, "attn_logit_softcapping": 2.0, "query_pre_attn_scalar": 20}
        return transformers.Gemma2Config(**SIZES | extra | changes)
    extra = {"sliding_window": 5, "num_local_experts": 2, "num_experts_per_tok": 1}
    return transformers.GptOssConfig(**SIZES | extra | changes)


@pytest.fixture(scope="module", params=FAMILIES)
def model(request: pytest.FixtureRequest) -> Any:
    return build(config(request.param))


@pytest.fixture(autouse=True)
def _inference() -> Iterator[None]:
    integration.register()
    with torch.inference_mode():
        yield


# ---------------------------------------------------------------------------------------------------------------------
# registration


def test_register_is_repeatable() -> None:
    assert integration.register() == integration.register() == "fmc_attention"
    first = ALL_ATTENTION_FUNCTIONS["fmc_attention"]
    assert integration.register("fmc_other") == "fmc_other"
    assert ALL_ATTENTION_FUNCTIONS["fmc_attention"] is first
    assert ALL_MASK_ATTENTION_FUNCTIONS["fmc_other"] is integration.mask


@pytest.mark.parametrize("name", ["flashmoe_cupy", "user/kernel", "paged|fmc", "my_flex_attention", "my_sdpa", "", 5])
def test_register_refuses_names_with_a_meaning(name: Any) -> None:
    with pytest.raises(ValueError, match="name="):
        integration.register(name)
    assert name not in ALL_ATTENTION_FUNCTIONS and name not in ALL_MASK_ATTENTION_FUNCTIONS


@pytest.mark.parametrize(
    "name", sorted({"eager", *ALL_ATTENTION_FUNCTIONS, *ALL_MASK_ATTENTION_FUNCTIONS} - {"fmc_attention", "fmc_other"})
)
def test_register_leaves_transformers_own_alone(name: str) -> None:
    before = ALL_ATTENTION_FUNCTIONS.get(name), ALL_MASK_ATTENTION_FUNCTIONS.get(name)
    with pytest.raises(ValueError, match="name="):
        integration.register(name)
    assert (ALL_ATTENTION_FUNCTIONS.get(name), ALL_MASK_ATTENTION_FUNCTIONS.get(name)) == before


def test_register_leaves_the_attention_of_others_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    for registry in (type(ALL_ATTENTION_FUNCTIONS), type(ALL_MASK_ATTENTION_FUNCTIONS)):
        with monkeypatch.context() as patch:
            patch.setitem(registry._global_mapping, "somebodys", print)
            with pytest.raises(ValueError, match="already"):
                integration.register("somebodys")


# ---------------------------------------------------------------------------------------------------------------------
# whole models against eager


@pytest.mark.parametrize(("batch", "length"), [(1, 1), (1, 12), (3, 4), (2, 17)])
def test_logits(model: Any, monkeypatch: pytest.MonkeyPatch, batch: int, length: int) -> None:
    expected, got = both(model, monkeypatch, input_ids=tokens(batch, length))
    close(got.logits, expected.logits)


@pytest.mark.parametrize("batch", [2, 4])
def test_left_padding(model: Any, monkeypatch: pytest.MonkeyPatch, batch: int) -> None:
    mask = left_padding(batch, 14)
    expected, got = both(model, monkeypatch, input_ids=tokens(batch, 14), attention_mask=mask)
    close(got.logits, expected.logits, mask)
    # the padding is really masked: the last row alone, without its padding, gives the same
    alone = model(input_ids=tokens(batch, 14)[-1:, 3 * (batch - 1) :])
    close(alone.logits, got.logits[-1:, 3 * (batch - 1) :])


def test_right_padding(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    mask = left_padding(3, 11).flip(1)
    expected, got = both(model, monkeypatch, input_ids=tokens(3, 11), attention_mask=mask)
    close(got.logits, expected.logits, mask)


def make_cache(kind: str, cfg: Any) -> Any:
    return DynamicCache(config=cfg) if kind == "dynamic" else StaticCache(config=cfg, max_cache_len=24)


@pytest.mark.parametrize("padded", [False, True], ids=["full", "padded"])
@pytest.mark.parametrize("kind", ["dynamic", "static"])
def test_cached_steps(model: Any, kind: str, padded: bool) -> None:
    """A prompt in chunks of 7, 4, 1 and 1 tokens through a cache, then single tokens, equals eager without a cache."""
    ids, mask = tokens(2, 16), left_padding(2, 16)
    use(model, "eager")
    expected = model(input_ids=ids, attention_mask=mask if padded else None).logits
    use(model, integration.NAME)
    cache, parts = make_cache(kind, model.config), []
    for start, stop in itertools.pairwise([0, 7, 11, 12, 13, 14, 15, 16]):
        extra = {"attention_mask": mask[:, :stop], "position_ids": (mask.cumsum(1) - 1).clamp(0)[:, start:stop]}
        if not padded:
            extra = {"position_ids": torch.arange(start, stop)[None]}
        parts.append(model(input_ids=ids[:, start:stop], past_key_values=cache, **extra).logits)
    if padded:
        use(model, "eager")
        expected = model(input_ids=ids, attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp(0)).logits
    close(torch.cat(parts, 1), expected, mask if padded else None)


@pytest.mark.parametrize("kind", ["dynamic", "static"])
@pytest.mark.parametrize("batch", [1, 3])
def test_generate(model: Any, kind: str, batch: int) -> None:
    """Greedy tokens of a left-padded batch equal eager's, through generate()'s own masks and caches."""
    ids, mask = tokens(batch, 9), left_padding(batch, 9)
    options: dict[str, Any] = {"max_new_tokens": 12, "min_new_tokens": 12, "do_sample": False, "disable_compile": True}
    options["cache_implementation"] = kind
    runs = []
    for name in ("eager", integration.NAME):
        use(model, name)
        runs.append(model.generate(input_ids=ids, attention_mask=mask, **options))
    assert runs[0].shape == (batch, 21)
    assert torch.equal(*runs)


@pytest.mark.filterwarnings("default")  # tracing has warnings of its own
def test_compiled_steps_of_a_static_cache() -> None:
    """torch.compile leaves the attention alone, as generate() on a GPU needs for a static cache."""
    llama = build(config("llama"))
    expected = llama(input_ids=tokens(2, 12)).logits
    use(llama, integration.NAME)
    cache, start = StaticCache(config=llama.config, max_cache_len=16), 9
    llama(input_ids=tokens(2, 12)[:, :start], past_key_values=cache)
    step = torch.compile(llama.forward, backend="eager")
    parts = []
    for i in range(start, 12):
        positions = torch.full((1, 1), i)
        parts.append(step(input_ids=tokens(2, 12)[:, i : i + 1], past_key_values=cache, position_ids=positions).logits)
    close(torch.cat(parts, 1), expected[:, start:])
    torch.compiler.reset()


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("mistral", {"sliding_window": 128}),
        ("gemma2", {"attn_logit_softcapping": None}),
        ("gemma2", {"query_pre_attn_scalar": 16}),
        ("gemma2", {"sliding_window": 128}),
        ("gpt_oss", {"sliding_window": 128}),
        ("gpt_oss", {"sinks": -50.0}),
    ],
)
def test_features_matter(family: str, changes: dict[str, Any]) -> None:
    """Without the feature eager's logits move far beyond the tolerance: the tests above would see it left out."""
    changes, sinks = dict(changes), changes.get("sinks")
    changes.pop("sinks", None)
    whole, without = build(config(family)), build(config(family, **changes))
    if sinks is not None:
        for layer in without.model.layers:
            layer.self_attn.sinks.fill_(sinks)
    ids = tokens(2, 17)
    assert float((whole(input_ids=ids).logits - without(input_ids=ids).logits).abs().max()) > 100 * TOLERANCE


def test_encoder_is_bidirectional(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = {"vocab_size": VOCAB, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    bert = build(transformers.BertConfig(**sizes, intermediate_size=96, max_position_embeddings=32), "AutoModel")
    mask = left_padding(3, 13).flip(1)
    for extra in ({}, {"attention_mask": mask}):
        expected, got = both(bert, monkeypatch, input_ids=tokens(3, 13), **extra)
        close(got.last_hidden_state, expected.last_hidden_state, extra.get("attention_mask"))
    changed = tokens(3, 13)
    changed[:, -1] = 3
    assert float((bert(input_ids=changed).last_hidden_state - expected.last_hidden_state)[:, 0].abs().max()) > 0.01


@pytest.mark.parametrize("padded", [False, True], ids=["full", "padded"])
def test_position_bias_and_cross_attention(monkeypatch: pytest.MonkeyPatch, padded: bool) -> None:
    """T5: a learned bias in encoder and decoder, scale 1, cross attention over keys of another length."""
    cfg = transformers.T5Config(
        vocab_size=VOCAB, d_model=64, d_kv=16, d_ff=96, num_layers=2, num_heads=4, dropout_rate=0.0,
        decoder_start_token_id=0,
    )  # fmt: skip
    t5 = build(cfg, "AutoModelForSeq2SeqLM")
    inputs: dict[str, Any] = {"input_ids": tokens(3, 13), "decoder_input_ids": tokens(3, 6, seed=1)}
    if padded:
        inputs["attention_mask"] = left_padding(3, 13).flip(1)
        inputs["decoder_attention_mask"] = left_padding(3, 6).flip(1)
        inputs["decoder_attention_mask"][-1, 0] = 1
    expected, got = both(t5, monkeypatch, **inputs)
    close(got.logits, expected.logits, inputs.get("decoder_attention_mask"))
    plain = [t5.generate(inputs["input_ids"], max_new_tokens=8, min_new_tokens=8, do_sample=False)]
    use(t5, "eager")
    plain.append(t5.generate(inputs["input_ids"], max_new_tokens=8, min_new_tokens=8, do_sample=False))
    assert torch.equal(*plain)


def test_packed_sequences(model: Any) -> None:
    """Sequences behind one another in one row, by cu_seq_lens or by position_ids alone, equal each sequence alone."""
    use(model, "eager")
    lengths = [5, 9, 1, 7]
    ids, ends = tokens(1, sum(lengths)), list(itertools.accumulate(lengths, initial=0))
    expected = torch.cat([model(input_ids=ids[:, a:b]).logits for a, b in itertools.pairwise(ends)], 1)
    cu = torch.tensor(ends, dtype=torch.int32)
    packed = {"cu_seq_lens_q": cu, "cu_seq_lens_k": cu, "max_length_q": 9, "max_length_k": 9}
    options: dict[str, Any] = {"position_ids": torch.cat([torch.arange(n) for n in lengths])[None], "use_cache": False}
    use(model, integration.NAME)
    close(model(input_ids=ids, **options, **packed).logits, expected)
    if model.config.model_type != "gpt_oss":  # this model does not show position_ids to its mask
        close(model(input_ids=ids, **options).logits, expected)


def test_masks_made_by_the_caller(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A 4-D mask passes through untouched: boolean, or additive in float32 or float64."""
    allowed = torch.ones(13, 13, dtype=torch.bool).tril()[None, None].repeat(2, 1, 1, 1)
    allowed[1, :, 6:, 2:4] = False
    added = torch.where(allowed, 0.5 * torch.randn(2, 1, 13, 13), torch.finfo(torch.float32).min)
    expected, got = both(model, monkeypatch, input_ids=tokens(2, 13), attention_mask=added)
    close(got.logits, expected.logits)
    close(model(input_ids=tokens(2, 13), attention_mask=added.double()).logits, expected.logits)
    flat = torch.where(allowed, 0.0, torch.finfo(torch.float32).min)
    expected, _ = both(model, monkeypatch, input_ids=tokens(2, 13), attention_mask=flat)
    close(model(input_ids=tokens(2, 13), attention_mask=allowed).logits, expected.logits)


# ---------------------------------------------------------------------------------------------------------------------
# the attention function alone


def heads(batch: int = 2, queries: int = 5, keys: int = 7) -> tuple[Tensor, Tensor, Tensor]:
    """Query (batch, 4, queries, 16), key and value (batch, 2, keys, 16 and 24)."""
    shapes = ((batch, 4, queries, 16), (batch, 2, keys, 16), (batch, 2, keys, 24))
    q, k, v = (torch.randn(shape) for shape in shapes)
    return q, k, v


def plain(q: Tensor, k: Tensor, v: Tensor, allowed: Tensor, scale: float = 0.25) -> Tensor:
    scores = (q @ k.repeat_interleave(2, 1).transpose(2, 3) * scale).masked_fill(~allowed, float("-inf"))
    return (scores.softmax(-1).nan_to_num(0.0) @ v.repeat_interleave(2, 1)).transpose(1, 2)


class Layer(torch.nn.Module):  # type: ignore[misc, name-defined]
    """Stands for a model's attention module."""

    def __init__(self, is_causal: bool) -> None:
        super().__init__()
        self.is_causal = is_causal


@pytest.mark.parametrize("queries", [1, 5, 7])
def test_alignment_and_layout(queries: int) -> None:
    """No mask: bottom-right causal, unless the module or the call says otherwise. The result is contiguous."""
    q, k, v = heads(queries=queries)
    triangle, everything = torch.ones(queries, 7, dtype=torch.bool).tril(7 - queries), torch.tensor(True)
    for layer, keyword, allowed in (
        (Layer(True), None, triangle),
        (Layer(False), None, everything),
        (Layer(True), False, everything),
        (Layer(False), True, triangle),
        (torch.nn.Identity(), None, triangle),
    ):
        out, weights = integration.attention(layer, q, k, v, None, is_causal=keyword)
        assert weights is None
        assert out.is_contiguous()
        close(out, plain(q, k, v, allowed))
    close(integration.attention(Layer(True), q, k, v, None, scaling=0.7)[0], plain(q, k, v, triangle, 0.7))
    window = triangle & ~torch.ones(queries, 7, dtype=torch.bool).tril(7 - queries - 3)
    close(integration.attention(Layer(True), q, k, v, None, sliding_window=3)[0], plain(q, k, v, window))


def test_mask_replaces_causal_and_window() -> None:
    """With a mask nothing else hides keys; a row that sees none is zero."""
    q, k, v = heads()
    allowed = torch.rand(2, 1, 5, 7) < 0.5
    allowed[1, :, 2] = False
    out, _ = integration.attention(Layer(True), q, k, v, allowed, sliding_window=2)
    close(out, plain(q, k, v, allowed))
    assert float(out[1, 2].abs().max()) == 0.0


def test_sinks_of_another_dtype() -> None:
    q, k, v = heads()
    sinks = torch.tensor([0.5, -1.0, 2.0, 0.0])
    expected, _ = integration.attention(Layer(True), q, k, v, None, s_aux=sinks)
    assert float((expected - integration.attention(Layer(True), q, k, v, None)[0]).abs().max()) > 0.01
    close(integration.attention(Layer(True), q, k, v, None, s_aux=sinks.bfloat16())[0], expected)


def test_cu_seq_lens() -> None:
    q, k, v = heads(1, 9, 9)
    cu = torch.tensor([0, 4, 4, 9], dtype=torch.int32)
    packed = {"cu_seq_lens_q": cu, "cu_seq_lens_k": cu, "max_length_q": 5, "max_length_k": 5}
    blocks = torch.block_diag(torch.ones(4, 4), torch.ones(5, 5)).bool()
    close(integration.attention(Layer(True), q, k, v, None, **packed)[0], plain(q, k, v, blocks.tril()))
    close(integration.attention(Layer(False), q, k, v, None, **packed)[0], plain(q, k, v, blocks))
    lengths = {"cu_seq_lens_q": cu, "cu_seq_lens_k": cu}
    close(integration.attention(Layer(True), q, k, v, None, **lengths)[0], plain(q, k, v, blocks.tril()))
    # a mask keeps its say, but nothing is seen across a border
    mask = torch.rand(1, 1, 9, 9) < 0.5
    close(integration.attention(Layer(True), q, k, v, mask, **packed)[0], plain(q, k, v, blocks & mask))
    added = torch.randn(1, 1, 9, 9)
    expected = integration.attention(Layer(True), q, k, v, added.masked_fill(~blocks, float("-inf")))[0]
    close(integration.attention(Layer(True), q, k, v, added, **packed)[0], expected)


@pytest.mark.parametrize(
    ("arguments", "name"),
    [
        ({"dropout": 0.1}, "dropout"),
        ({"output_attentions": True}, "output_attentions"),
        ({"indices": torch.zeros(2, 5, 3)}, "indices"),
        ({"block_indices": torch.zeros(2, 5, 3)}, "block_indices"),
        ({"attention_mask": torch.ones(2, 7, dtype=torch.bool)}, "attention_mask"),
        ({"attention_mask": torch.ones(2, 1, 5, 7, dtype=torch.int64)}, "attention_mask"),
        ({"cu_seq_lens_q": torch.tensor([0, 5]), "cu_seq_lens_k": torch.tensor([0, 7])}, "cu_seq_lens_q"),
    ],
)
def test_errors_name_the_argument(arguments: dict[str, Any], name: str) -> None:
    arguments = {"attention_mask": None} | arguments
    with pytest.raises(UnsupportedProblem, match=name) as caught:
        integration.attention(Layer(True), *heads(), **arguments)
    assert "eager" in caught.value.hint


def test_models_train_and_weights_cannot_be_had() -> None:
    llama = build(config("llama"))
    use(llama, integration.NAME)
    with pytest.raises(UnsupportedProblem, match="output_attentions"):
        llama(input_ids=tokens(1, 5), output_attentions=True)
    with torch.inference_mode(False), torch.enable_grad():
        trained = build(config("llama"))
        found = {}
        for name in (integration.NAME, "eager"):
            use(trained, name)
            trained.zero_grad()
            trained(input_ids=tokens(1, 5)).logits.square().mean().backward()
            found[name] = [x.grad.clone() for x in trained.parameters()]
        for mine, eager in zip(*found.values(), strict=True):
            assert torch.allclose(mine, eager, rtol=1e-3, atol=1e-5 * float(eager.abs().max()) + 1e-9)
