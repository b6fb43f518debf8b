"""What the tests of the transformers integration share: small random models, inputs, eager and ours side by side."""

from __future__ import annotations

import copy
from typing import Any

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers", minversion="5.0")

from flashmoe_cupy.integrations import transformers as integration  # noqa: E402
from flashmoe_cupy.ops.attention import flash_attention  # noqa: E402

Tensor = Any  # torch.Tensor; mypy does not follow torch
TOLERANCE = 2e-4  # of logits whose size is about one; float32 rounding through two layers is near 1e-5
VOCAB = 64


def build(cfg: Any, kind: str = "AutoModelForCausalLM") -> Any:
    """The model with weights of about unit gain."""
    torch.manual_seed(0)
    made = getattr(transformers, kind).from_config(cfg, attn_implementation="eager").eval()
    with torch.no_grad():
        for name, weight in made.named_parameters():
            if name.endswith("sinks"):
                weight.copy_(torch.randn(weight.shape) + 1)
            elif weight.ndim > 1:
                weight.copy_(torch.randn(weight.shape) * 1.3 * weight.shape[-1] ** -0.5)
    return made


def tokens(*shape: int, seed: int = 0) -> Tensor:
    return torch.randint(3, VOCAB, shape, generator=torch.Generator().manual_seed(seed))


def left_padding(batch: int, length: int) -> Tensor:
    """(batch, length) int64: row i has 3 * i padded places in front."""
    return (torch.arange(length) >= 3 * torch.arange(batch)[:, None]).long()


def use(model: Any, name: str) -> None:
    """Switch the attention; in an encoder-decoder model each half has its own setting."""
    for part in model.modules():
        if isinstance(part, transformers.PreTrainedModel):
            part.set_attn_implementation(name)


def both(model: Any, monkeypatch: pytest.MonkeyPatch, **inputs: Any) -> tuple[Any, Any]:
    """The outputs of eager and of ours, after checking that ours ran in each layer."""
    use(model, "eager")
    expected = model(**copy.deepcopy(inputs))
    calls = []

    def counted(*args: Any, **kwargs: Any) -> Any:
        calls.append(kwargs)
        return flash_attention(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(integration, "flash_attention", counted)
        use(model, integration.NAME)
        got = model(**inputs)
    assert len(calls) >= model.config.num_hidden_layers * (3 if model.config.is_encoder_decoder else 1)
    return expected, got


def close(got: Tensor, expected: Tensor, keep: Tensor | None = None) -> None:
    """Equal within TOLERANCE where `keep` (batch, seq) is true; finite everywhere."""
    assert bool(torch.isfinite(got).all())
    error = (got - expected).abs().amax(-1)
    if keep is not None:
        error = error[keep.bool()]
    assert float(error.max()) <= TOLERANCE * max(1.0, float(expected.abs().max()) / 4)
