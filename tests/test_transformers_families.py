"""Families of transformers models against their own eager attention: small, random, float32 on the CPU.

Decoders: without padding, padded left and right, greedy generation with a dynamic and a static cache. Encoders,
encoder-decoders and models of images and sound: without padding and padded, where they know padding.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers", minversion="5.0")

from transformers_kit import VOCAB, both, build, close, left_padding, tokens, use  # noqa: E402

from flashmoe_cupy.integrations import transformers as integration  # noqa: E402

pytestmark = [
    pytest.mark.torch,
    # what transformers deprecates of its own or of torch is not for these tests to judge
    pytest.mark.filterwarnings("default::DeprecationWarning", "default::FutureWarning"),
]

SIZES: dict[str, Any] = {
    "vocab_size": VOCAB, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "max_position_embeddings": 128, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "attention_dropout": 0.0,
}  # fmt: skip
GROUPED: dict[str, Any] = SIZES | {"num_key_value_heads": 2, "head_dim": 16}
IDS: dict[str, Any] = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
GPT2: dict[str, Any] = {"vocab_size": VOCAB, "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 128}
GPT2 |= dict.fromkeys(("attn_pdrop", "embd_pdrop", "resid_pdrop"), 0.0)
OPT: dict[str, Any] = {key: value for key, value in SIZES.items() if key != "intermediate_size"}
OPT |= {"ffn_dim": 96, "dropout": 0.0, "word_embed_proj_dim": 64}
WINDOWS = {"sliding_window": 5, "layer_types": ["sliding_attention", "full_attention"]}
IMAGE: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
IMAGE |= {"image_size": 16, "patch_size": 4}
SEEKER: dict[str, Any] = {
    "num_key_value_heads": 4, "first_k_dense_replace": 2, "q_lora_rank": 24, "kv_lora_rank": 16, "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8, "v_head_dim": 16, "head_dim": 8,
}  # fmt: skip
DECODERS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", GROUPED),
    "qwen2": ("Qwen2Config", GROUPED),
    "qwen3": ("Qwen3Config", GROUPED),  # norms of q and k
    "mistral": ("MistralConfig", GROUPED | {"sliding_window": 5}),
    "gemma2": (  # softcap, windows in turn
        "Gemma2Config",
        GROUPED | {"sliding_window": 5, "attn_logit_softcapping": 2.0, "query_pre_attn_scalar": 20},
    ),
    "gemma3": ("Gemma3TextConfig", GROUPED | WINDOWS),
    "vaultgemma": (
        "VaultGemmaConfig",
        GROUPED | {"sliding_window": 5, "attn_logit_softcapping": 2.0, "query_pre_attn_scalar": 20},
    ),
    "phi3": ("Phi3Config", GROUPED | {"sliding_window": 6}),
    "cohere2": ("Cohere2Config", GROUPED | {"sliding_window": 5}),
    "gpt2": ("GPT2Config", GPT2 | IDS),
    "gpt_neox": ("GPTNeoXConfig", SIZES),
    "opt": ("OPTConfig", OPT),
    "gpt_oss": (  # sinks
        "GptOssConfig", GROUPED | {"sliding_window": 5, "num_local_experts": 2, "num_experts_per_tok": 1}
    ),
    "deepseek_v3": ("DeepseekV3Config", SIZES | SEEKER),  # head dimensions 24 and 16
}  # fmt: skip


@pytest.fixture(autouse=True)
def _inference() -> Iterator[None]:
    integration.register()
    with torch.inference_mode():
        yield


@pytest.fixture(scope="module", params=DECODERS)
def decoder(request: pytest.FixtureRequest) -> Any:
    name, sizes = DECODERS[request.param]
    return build(getattr(transformers, name)(**sizes))


def test_decoder(decoder: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    ids, left = tokens(3, 13), left_padding(3, 13)
    expected, got = both(decoder, monkeypatch, input_ids=ids)
    close(got.logits, expected.logits)
    for mask in (left, left.flip(1)):
        expected, got = both(decoder, monkeypatch, input_ids=ids, attention_mask=mask)
        close(got.logits, expected.logits, mask)


@pytest.mark.parametrize("kind", ["dynamic", "static"])
def test_decoder_generates(decoder: Any, kind: str) -> None:
    ids, mask = tokens(2, 9), left_padding(2, 9)
    options: dict[str, Any] = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False, "disable_compile": True}
    runs = []
    for name in ("eager", integration.NAME):
        use(decoder, name)
        runs.append(decoder.generate(input_ids=ids, attention_mask=mask, cache_implementation=kind, **options))
    assert runs[0].shape == (2, 14)
    assert torch.equal(*runs)


ENCODERS: dict[str, tuple[str, dict[str, Any]]] = {
    "bert": ("BertConfig", SIZES),
    "roberta": ("RobertaConfig", SIZES),
    "modernbert": (  # windows around each token, in turn
        "ModernBertConfig",
        SIZES | {"local_attention": 6, "global_attn_every_n_layers": 2, "cls_token_id": 1, "sep_token_id": 2},
    ),
    "gemma_both_ways": ("Gemma3TextConfig", GROUPED | {"sliding_window": 5, "use_bidirectional_attention": True}),
}  # fmt: skip


@pytest.mark.parametrize("family", ENCODERS)
def test_encoder(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    name, sizes = ENCODERS[family]
    model = build(getattr(transformers, name)(**sizes), "AutoModel")
    ids, left = tokens(3, 13), left_padding(3, 13)
    for mask in (None, left, left.flip(1)):
        expected, got = both(model, monkeypatch, input_ids=ids, attention_mask=mask)
        close(got.last_hidden_state, expected.last_hidden_state, mask)
    changed = ids.clone()
    changed[:, 3] = (ids[:, 3] + 7) % VOCAB  # near enough for the windows
    assert float((model(input_ids=changed)[0] - model(input_ids=ids)[0])[:, 1].abs().max()) > 0.001


PAIRS: dict[str, tuple[str, dict[str, Any]]] = {
    "t5": ("T5Config", {"vocab_size": VOCAB, "d_model": 64, "d_kv": 16, "d_ff": 96, "num_layers": 2, "num_heads": 4,
                        "dropout_rate": 0.0, "decoder_start_token_id": 0}),
    "bart": ("BartConfig", {"vocab_size": VOCAB, "d_model": 64, "encoder_layers": 2, "decoder_layers": 2,
                            "encoder_attention_heads": 4, "decoder_attention_heads": 4, "encoder_ffn_dim": 96,
                            "dropout": 0.0,
                            "decoder_ffn_dim": 96, "max_position_embeddings": 64, "decoder_start_token_id": 2,
                            "forced_eos_token_id": None} | IDS),
}  # fmt: skip


@pytest.mark.parametrize("family", PAIRS)
def test_encoder_decoder(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    name, sizes = PAIRS[family]
    model = build(getattr(transformers, name)(**sizes), "AutoModelForSeq2SeqLM")
    ids, answer = tokens(3, 13), tokens(3, 6, seed=1)
    for mask in (None, left_padding(3, 13), left_padding(3, 13).flip(1)):
        expected, got = both(model, monkeypatch, input_ids=ids, attention_mask=mask, decoder_input_ids=answer)
        close(got.logits, expected.logits)
    for kind in ("dynamic", "static"):
        options: dict[str, Any] = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False, "num_beams": 1}
        options |= {"cache_implementation": kind, "disable_compile": True}
        runs = []
        for implementation in ("eager", integration.NAME):
            use(model, implementation)
            runs.append(model.generate(ids, attention_mask=mask, **options))
        assert torch.equal(*runs)


def test_whisper(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sound in, text out; the decoder starts with a cache of keys of the sound."""
    cfg = transformers.WhisperConfig(
        vocab_size=VOCAB, d_model=64, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4, num_mel_bins=8,
        decoder_attention_heads=4, encoder_ffn_dim=96, decoder_ffn_dim=96, max_source_positions=15,
        suppress_tokens=None, max_target_positions=32, decoder_start_token_id=1, begin_suppress_tokens=None,
        dropout=0.0, **IDS,
    )  # fmt: skip
    model = build(cfg, "AutoModelForSpeechSeq2Seq")
    sound, ids = torch.randn(2, 8, 30), tokens(2, 7)
    for mask in (None, left_padding(2, 7).flip(1)):
        inputs = {"input_features": sound, "decoder_input_ids": ids, "decoder_attention_mask": mask}
        expected, got = both(model, monkeypatch, **inputs)
        close(got.logits, expected.logits, mask)
    runs = []
    for name in ("eager", integration.NAME):
        use(model, name)
        runs.append(model.generate(sound, max_new_tokens=4, min_new_tokens=4, do_sample=False))
    assert torch.equal(*runs)


def test_vit(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build(transformers.ViTConfig(**IMAGE), "AutoModel")
    expected, got = both(model, monkeypatch, pixel_values=torch.randn(2, 3, 16, 16))
    close(got.last_hidden_state, expected.last_hidden_state)


@pytest.mark.parametrize("family", ["CLIP", "Siglip"])
def test_image_and_text(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two models under one configuration; the text half of CLIP is causal."""
    text = SIZES | {"max_position_embeddings": 16, "projection_dim": 32}
    cfg = getattr(transformers, f"{family}Config")(text_config=text, vision_config=IMAGE)
    cfg.num_hidden_layers = 4  # what `both` counts
    model = build(cfg, "AutoModel")
    for mask in (None, left_padding(2, 8).flip(1)):
        inputs = {"input_ids": tokens(2, 8), "pixel_values": torch.randn(2, 3, 16, 16), "attention_mask": mask}
        expected, got = both(model, monkeypatch, **inputs)
        close(got.text_model_output.last_hidden_state, expected.text_model_output.last_hidden_state, mask)
        close(got.vision_model_output.last_hidden_state, expected.vision_model_output.last_hidden_state)
