"""Which transformers models are refused: those that transformers' own `sdpa` refuses, by what their classes declare.

`test_every_model_class` goes through all classes that the installed transformers has.
"""

from __future__ import annotations

import copy
import importlib
import warnings
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers", minversion="5.0")

from transformers_kit import VOCAB, left_padding, tokens  # noqa: E402

from flashmoe_cupy.errors import UnsupportedProblem  # noqa: E402
from flashmoe_cupy.integrations import transformers as integration  # noqa: E402
from flashmoe_cupy.integrations import transformers_models as models  # noqa: E402
from flashmoe_cupy.integrations import transformers_moe as experts  # noqa: E402

pytestmark = [
    pytest.mark.torch,
    # what transformers deprecates of its own or of torch is not for these tests to judge
    pytest.mark.filterwarnings("default::DeprecationWarning", "default::FutureWarning"),
]

NAME, EXPERTS = integration.NAME, experts.NAME
SIZES: dict[str, Any] = {
    "vocab_size": VOCAB, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "max_position_embeddings": 64, "pad_token_id": 0,
}  # fmt: skip
OTHER: dict[str, Any] = {"vocab_size": VOCAB, "hidden_size": 64, "n_layer": 2, "n_head": 4}
REFUSED: dict[str, tuple[str, dict[str, Any], str]] = {
    "bloom": ("BloomConfig", OTHER, "_supports_sdpa"),
    "rembert": ("RemBertConfig", SIZES | {"input_embedding_size": 32, "output_embedding_size": 32}, "_supports_sdpa"),
    "mpt": ("MptConfig", {"vocab_size": VOCAB, "d_model": 64, "n_layers": 2, "n_heads": 4}, "_supports_sdpa"),
    "falcon": ("FalconConfig", OTHER | {"num_hidden_layers": 2, "num_attention_heads": 4}, "FALCON_ATTENTION_CLASSES"),
    "splinter": ("SplinterConfig", SIZES, "_supports_sdpa"),
}


@pytest.fixture(autouse=True)
def _inference() -> Iterator[None]:
    integration.register()
    experts.register()
    with torch.inference_mode():
        yield


def config(family: str) -> Any:
    name, sizes, _ = REFUSED[family]
    return getattr(transformers, name)(**sizes)


def eager(cfg: Any) -> Any:
    torch.manual_seed(0)
    return transformers.AutoModel.from_config(cfg, attn_implementation="eager").eval()


# ---------------------------------------------------------------------------------------------------------------------
# single models


@pytest.mark.parametrize("family", REFUSED)
def test_refused_when_built(family: str) -> None:
    """For each registered name; the error says what was asked, why not, and what runs."""
    for name in (NAME, integration.register("fmc_other")):
        with pytest.raises(UnsupportedProblem) as info:
            transformers.AutoModel.from_config(config(family), attn_implementation=name)
        assert info.value.asked.startswith(f"attn_implementation={name!r} in ")
        assert REFUSED[family][2] in info.value.reasons[0]
        assert 'attn_implementation="eager" runs it' in info.value.hint
    assert eager(config(family))(input_ids=tokens(2, 7))[0].shape == (2, 7, 64)
    if family != "falcon":
        with pytest.raises(ValueError, match="scaled_dot_product_attention"):
            transformers.AutoModel.from_config(config(family), attn_implementation="sdpa")


def test_refused_when_loaded(tmp_path: Path) -> None:
    eager(config("bloom")).save_pretrained(tmp_path)
    with pytest.raises(UnsupportedProblem, match="BloomModel"):
        transformers.AutoModel.from_pretrained(tmp_path, attn_implementation=NAME)


@pytest.mark.parametrize("family", REFUSED)
def test_set_later_it_is_refused_or_stays_eager(family: str) -> None:
    """transformers warns, and sets nothing, where its heuristic finds attention of the model's own."""
    model = eager(config(family))
    inputs = {"input_ids": tokens(3, 9), "attention_mask": left_padding(3, 9)}
    want = model(**inputs)[0]
    model.set_attn_implementation(NAME)
    if model.config._attn_implementation == "eager":
        assert torch.equal(model(**inputs)[0], want)
    else:
        with pytest.raises(UnsupportedProblem, match="_supports_sdpa"):
            model(**inputs)


@pytest.mark.parametrize("family", ["bloom", "rembert", "falcon"])
def test_no_mask_for_code_that_would_misread_it(family: str) -> None:
    """Bloom took None for non-causal, RemBERT added a boolean: even by force, no such model gets a mask of ours."""
    model = eager(config(family))
    model.config._attn_implementation = NAME
    for mask in (None, left_padding(3, 9)):
        with pytest.raises(UnsupportedProblem, match=type(model).__name__[:4]):
            model(input_ids=tokens(3, 9), attention_mask=mask)


def test_attention_that_is_reached_all_the_same() -> None:
    """A model that sdpa refuses may still dispatch, without asking for a mask."""
    layer = torch.nn.Identity()
    layer.config = config("splinter")
    q = torch.randn(1, 4, 3, 16)
    with pytest.raises(UnsupportedProblem, match="Splinter"):
        integration.attention(layer, q, q, q, None)
    layer.config = transformers.BertConfig(**SIZES)
    assert integration.attention(layer, q, q, q, None)[0].shape == (1, 3, 4, 16)


def test_a_mask_that_the_model_changes() -> None:
    """DeepSeek-V4 adds compressed keys and a float bias for them to its mask: -inf turns to True in a boolean one."""
    module = pytest.importorskip("transformers.models.deepseek_v4.modeling_deepseek_v4")
    kind = module.DeepseekV4Model
    if kind._supports_sdpa:
        pytest.skip("it declares support of sdpa")
    assert "DeepseekV4Attention changes its mask" in models.why_no_attention(kind)[0]
    with pytest.raises(UnsupportedProblem, match="changes its mask"):
        models.check_config(kind.config_class())
    # gpt-oss, refused by sdpa for its sinks, hands its mask on as it is
    assert models.why_no_attention(transformers.GptOssModel) == ()
    assert not transformers.GptOssModel._supports_sdpa


def test_a_class_of_ones_own() -> None:
    """What counts is what the class and its bases say and build, wherever it is written."""

    class Own(transformers.LlamaForCausalLM):  # type: ignore[misc, name-defined]
        pass

    class Deaf(transformers.LlamaModel):  # type: ignore[misc, name-defined]
        _supports_sdpa = _supports_attention_backend = False

    cfg = transformers.LlamaConfig(**SIZES, attn_implementation=NAME)
    assert Own(copy.deepcopy(cfg)).eval()(input_ids=tokens(1, 5)).logits.shape == (1, 5, VOCAB)
    with pytest.raises(UnsupportedProblem, match="Deaf"):
        Deaf(cfg)


def test_others_are_left_alone() -> None:
    """The hook says nothing of other implementations, nor of modules that are no models."""
    for name in (None, "eager"):
        assert transformers.AutoModel.from_config(config("bloom"), attn_implementation=name) is not None
    assert len(torch.nn.Sequential(torch.nn.Linear(2, 2))) == 1
    assert models._hook() is models._hook()


# ---------------------------------------------------------------------------------------------------------------------
# models of several parts


def test_a_part_that_cannot() -> None:
    """An encoder of images that can, a decoder that cannot; each may have its own attention, equal to eager."""
    image = {key: SIZES[key] for key in SIZES if key in ("hidden_size", "intermediate_size", "num_hidden_layers")}
    encoder = transformers.ViTConfig(**image, num_attention_heads=4, image_size=16, patch_size=4)
    decoder = config("rembert")
    decoder.is_decoder = decoder.add_cross_attention = True

    def build(implementation: str | dict[str, str]) -> Any:
        cfg = transformers.VisionEncoderDecoderConfig.from_encoder_decoder_configs(encoder, decoder)
        torch.manual_seed(0)
        return transformers.VisionEncoderDecoderModel._from_config(cfg, attn_implementation=implementation).eval()

    with pytest.raises(UnsupportedProblem, match="RemBert") as info:
        build(NAME)
    assert f"attn_implementation={{\"text_config\": '{NAME}'}}" in info.value.hint
    inputs = {"pixel_values": torch.randn(2, 3, 16, 16), "decoder_input_ids": tokens(2, 5)}
    made, want = build({"": "eager", "encoder": NAME, "decoder": "eager"}), build("eager")(**inputs)
    assert made.encoder.config._attn_implementation == NAME
    torch.testing.assert_close(made(**inputs).logits, want.logits, rtol=1e-4, atol=1e-4)


# ---------------------------------------------------------------------------------------------------------------------
# experts


def test_a_model_without_experts() -> None:
    with pytest.raises(UnsupportedProblem, match="has no experts that transformers dispatches"):
        transformers.AutoModel.from_config(transformers.LlamaConfig(**SIZES), experts_implementation=EXPERTS)
    with pytest.raises(ValueError, match="experts"):  # as with transformers' own
        transformers.AutoModel.from_config(transformers.LlamaConfig(**SIZES), experts_implementation="grouped_mm")


def test_experts_that_are_not_dispatched() -> None:
    cfg = transformers.JetMoeConfig(**SIZES | {"num_key_value_heads": 2, "kv_channels": 16, "num_local_experts": 2})
    with pytest.raises(UnsupportedProblem, match="JetMoe"):
        transformers.AutoModel.from_config(cfg, experts_implementation=EXPERTS)


# ---------------------------------------------------------------------------------------------------------------------
# transformers' own list


@cache
def every_class() -> list[Any]:
    """All model classes of transformers, less those whose packages are missing here."""
    folder = Path(transformers.models.__file__).parent
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for path in sorted(folder.glob("*/modeling_*.py")):
            try:
                importlib.import_module(f"transformers.models.{path.parent.name}.{path.stem}")
            except ImportError:
                continue
    found = {m for m in models._below(transformers.PreTrainedModel) if m.__module__.startswith("transformers.models.")}
    return sorted(found, key=lambda m: (m.__module__, m.__name__))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_every_model_class() -> None:
    """All that sdpa refuses is refused, but for models that declare that all their attention is dispatched.

    These lack sdpa for a feature that it does not have (softcap, sinks). All that sdpa takes is taken, but for models
    that look their attention up in a table of their own.
    """
    classes = every_class()
    assert len(classes) > 1000
    count = dict.fromkeys(("refused", "taken", "more than sdpa", "table"), 0)
    for kind in classes:
        reasons = models.why_no_attention(kind)
        try:
            kind.get_correct_attn_implementation(kind.__new__(kind), "sdpa")
            sdpa = True
        except ValueError:
            sdpa = False
        if not sdpa and not reasons:
            assert kind._supports_attention_backend and kind._can_set_attn_implementation(), kind
            count["more than sdpa"] += 1
        elif not sdpa:
            assert "_supports_sdpa" in reasons[0], kind
            count["refused"] += 1
        elif reasons:
            table = reasons[0].split(" takes its attention from ")[1].split(",")[0]
            owner = importlib.import_module(kind.__module__)
            assert "sdpa" in getattr(owner, table) and NAME not in getattr(owner, table), kind
            count["table"] += 1
        else:
            count["taken"] += 1
    assert count["refused"] > 400 and count["taken"] > 1000 and 0 < count["table"] < 40
    assert 0 < count["more than sdpa"] < 100


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_every_refused_class_raises_when_built() -> None:
    """With the configuration that the class itself brings; those that need arguments are left out."""
    built = 0
    for kind in every_class():
        reasons = models.why_no_attention(kind)
        if not reasons or "__init__" not in vars(kind):
            continue
        try:
            cfg = kind.config_class()
        except Exception:
            continue
        cfg._attn_implementation = NAME
        try:
            with torch.device("meta"):  # none of its weights is made before
                kind(cfg)
        except UnsupportedProblem:
            built += 1
        except Exception:  # of its own: it cannot be built so
            continue
        else:
            raise AssertionError(f"{kind} was built")
    assert built > 200
