"""Named cases of training: a language model that is fine-tuned, and a stack of layers whose steps are timed.

FLOP of a step: six for each weight of a product and each token, and 3.5 times those of attention's forward, which is
2 * heads_q * pairs * 2 * head_dim with half of seqlen² as `pairs`. A language model's head is such a product, too.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from benchmarks.cases import OURS, Suite

EAGER, SDPA = "eager", "sdpa"  # attention of transformers


class Shape(NamedTuple):
    """A decoder of Llama's kind."""

    layers: int
    hidden: int
    heads_q: int
    heads_k: int
    head_dim: int
    intermediate: int
    vocab: int = 0
    rope_theta: float = 500000.0

    def weights(self) -> int:
        """Weights of all products: those of the layers, and of the head."""
        heads = 2 * (self.heads_q + self.heads_k) * self.head_dim
        return self.layers * self.hidden * (heads + 3 * self.intermediate) + self.hidden * self.vocab

    def flops(self, batch: int, seqlen: int) -> int:
        """Floating-point operations of a forward and a backward pass."""
        attention = 2 * batch * seqlen**2 * self.heads_q * self.head_dim  # causal
        return 6 * batch * seqlen * self.weights() + 7 * self.layers * attention // 2


class TrainingCase(NamedTuple):
    """A model of transformers, trained `steps` steps of `batch` sequences; means of the loss are of `window` steps.

    pretrained: from weights that are found (training.find_model), else from random ones and a tokenizer made of the
    text.
    """

    name: str
    suite: str
    source: str
    model: Shape
    steps: int = 200
    window: int = 25
    batch: int = 4
    seqlen: int = 2048
    learning_rate: float = 1e-4
    warmup: int = 20
    pretrained: bool = True

    def flops(self) -> int:
        """Of one step."""
        return self.model.flops(self.batch, self.seqlen)

    def shape(self) -> dict[str, Any]:
        """The fields that say what was computed, for a row of results."""
        skip = ("name", "suite", "model")
        return {key: value for key, value in self._asdict().items() if key not in skip} | self.model._asdict()

    def made_small(self) -> TrainingCase:
        """For a processor, under another name. Weights that are found are of one shape, random ones of any."""
        few = self._replace(name=f"{self.name}_small", steps=2, window=1, warmup=2, batch=1, seqlen=32)
        if self.pretrained:
            return few
        return few._replace(steps=6, window=3, batch=2, seqlen=64, model=Shape(2, 64, 4, 2, 16, 128, 512, 10000.0))


class LayersCase(NamedTuple):
    """Forward and backward of a stack of layers on `batch` sequences of `seqlen` tokens, in bfloat16."""

    name: str
    suite: str
    source: str
    model: Shape
    batch: int
    seqlen: int
    dtype: str = "bfloat16"

    @property
    def tokens(self) -> int:
        return self.batch * self.seqlen

    def flops(self) -> int:
        return self.model.flops(self.batch, self.seqlen)

    def shape(self) -> dict[str, Any]:
        """The fields that say what was computed, for a row of results."""
        skip = ("name", "suite", "model")
        return {key: value for key, value in self._asdict().items() if key not in skip} | self.model._asdict()

    def made_small(self) -> LayersCase:
        """For a processor, under another name."""
        model = Shape(2, 128, 4, 2, 32, 256)
        return self._replace(name=f"{self.name}_small", model=model, batch=2, seqlen=self.seqlen // 64)


SMOLLM2 = Shape(30, 576, 9, 3, 64, 1536, 49152, 100000.0)
LLAMA = Shape(4, 4096, 32, 8, 128, 14336)
_TOKENS = 8192


def _training(suite: str, source: str, **options: Any) -> Suite[TrainingCase]:
    case = TrainingCase("smollm2_135m", suite, source, SMOLLM2, **options)
    return Suite(suite, source, (case,), (OURS, EAGER, SDPA), (EAGER, SDPA))


FINE_TUNING: dict[str, Suite[TrainingCase]] = {
    suite.name: suite
    for suite in (
        _training("training", "SmolLM2-135M fine-tuned on the sources and documents of Python's library"),
        _training(
            "training_random",
            "SmolLM2-135M's architecture from random weights, with a tokenizer made of the text",
            pretrained=False,
        ),
    )
}
_LLAMA = "llama_training"
LAYER_STACKS: dict[str, Suite[LayersCase]] = {
    _LLAMA: Suite(
        _LLAMA,
        "forward and backward of four layers of Llama-3.1-8B's shape, 8,192 tokens",
        tuple(
            LayersCase(f"llama3.1_8b_4_layers_s{seqlen}", _LLAMA, "Llama-3.1-8B", LLAMA, _TOKENS // seqlen, seqlen)
            for seqlen in (4096, 8192)
        ),
        (OURS, "torch_cudnn", "fa3", "fa4", "torch_sdpa"),
        ("torch_cudnn", "fa3", "fa4"),
    )
}
