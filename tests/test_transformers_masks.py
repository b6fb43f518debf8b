"""The masks of the transformers integration: what they let through, that they hold no elements, that nothing waits.

The small random models are compared with their own eager attention, padded left, right and with holes, while building
a whole mask and waiting for a device both fail.
"""

from __future__ import annotations

import contextlib
import copy
import itertools
import warnings
from collections.abc import Iterator
from typing import Any

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers", minversion="5.0")

from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402
from transformers import DynamicCache, StaticCache, masking_utils  # noqa: E402
from transformers.masking_utils import sdpa_mask  # noqa: E402
from transformers_kit import VOCAB, Tensor, build, close, left_padding, tokens, use  # noqa: E402

from flashmoe_cupy.integrations import transformers as integration  # noqa: E402
from flashmoe_cupy.integrations.transformers_masks import PaddedMask  # noqa: E402
from flashmoe_cupy.ops.attention import flash_attention  # noqa: E402

pytestmark = [
    pytest.mark.torch,
    # what transformers deprecates of its own or of torch is not for these tests to judge
    pytest.mark.filterwarnings("default::DeprecationWarning", "default::FutureWarning"),
]


@pytest.fixture(autouse=True)
def _inference() -> Iterator[None]:
    integration.register()
    with torch.inference_mode():
        yield


# ---------------------------------------------------------------------------------------------------------------------
# the pairs that a mask lets through

RULES = {
    "causal": (masking_utils.causal_mask_function, None),
    "window": (masking_utils.sliding_window_causal_mask_function(3), 3),
    "both_ways": (masking_utils.bidirectional_mask_function, None),
    "window_both_ways": (masking_utils.sliding_window_bidirectional_mask_function(2), 2),
}


def arguments_of(rule: str, batch: int, q: int, kv: int, q_offset: Any, kv_offset: int, mask: Tensor) -> dict[str, Any]:
    function, local_size = RULES[rule]
    skip = "both_ways" in rule
    return {
        "batch_size": batch, "q_length": q, "kv_length": kv, "q_offset": q_offset, "kv_offset": kv_offset,
        "mask_function": function, "local_size": local_size, "attention_mask": mask, "allow_is_causal_skip": not skip,
        "allow_is_bidirectional_skip": skip,
    }  # fmt: skip


def whole(arguments: dict[str, Any]) -> Tensor:
    never = {"allow_is_causal_skip": False, "allow_is_bidirectional_skip": False}
    return sdpa_mask(**arguments | never).expand(-1, -1, arguments["q_length"], -1)


def lengths_of(arguments: dict[str, Any]) -> Any:
    mask = integration.mask(**arguments)
    assert isinstance(mask, PaddedMask)
    return mask


class Layer(torch.nn.Module):  # type: ignore[misc, name-defined]
    """Stands for a model's attention module."""

    def __init__(self, is_causal: bool) -> None:
        super().__init__()
        self.is_causal = is_causal


def seen(mask: Tensor | None, batch: int, q: int, kv: int, is_causal: bool) -> Tensor:
    """The pairs (batch, q, kv) that our attention lets through: all scores are equal, and value j is unit vector j."""
    width = -(-kv // 8) * 8
    values = torch.eye(kv, width).expand(batch, 1, kv, width)
    out, _ = integration.attention(
        Layer(is_causal), torch.zeros(batch, 1, q, 8), torch.zeros(batch, 1, kv, 8), values, mask
    )
    return out[:, :, 0, :kv] > 0


def rows(length: int) -> Tensor:
    """All boolean rows of a length, as a batch."""
    return torch.tensor(list(itertools.product((False, True), repeat=length)))


@pytest.mark.parametrize("static", [False, True], ids=["int_offset", "tensor_offset"])
@pytest.mark.parametrize("rule", RULES)
def test_pairs(rule: str, static: bool) -> None:
    """Over small shapes and every row of padding and holes: transformers' own pairs for all tokens.

    A row of padding sees what it sees there, or nothing, which only a causal rule allows; it sees nothing less in an
    entry none of whose queries is a token, as in a step for which the caller's mask is one too short.
    """
    lengths_said = cut = 0
    for q, kv, q_offset, kv_offset in itertools.product((1, 2, 3), (1, 3, 4), (0, 1, 2), (0, 1)):
        if static and (q_offset + q > kv_offset + kv or q_offset < kv_offset):
            continue  # a static cache has room for the queries
        for mask in (None, *(rows(n) for n in {kv + kv_offset, q_offset + q, 2})):
            batch = 2 if mask is None else len(mask)
            offset = torch.tensor(q_offset) if static else q_offset
            arguments = arguments_of(rule, batch, q, kv, offset, kv_offset, mask)
            full = whole(arguments)[:, 0]
            given = integration.mask(**arguments)
            lengths_said += isinstance(given, PaddedMask)
            got = seen(given, batch, q, kv, not rule.endswith("both_ways"))
            if mask is None or rule.endswith("both_ways"):
                assert torch.equal(got, full)
                continue
            places = torch.arange(q) + q_offset
            real = torch.zeros(batch, q, dtype=torch.bool)
            inside = places < mask.shape[1]
            real[:, inside] = mask[:, places[inside]]
            counts = real | ~real.any(1, keepdim=True)
            assert torch.equal(got[counts], full[counts])
            assert bool((got[~counts] == full[~counts]).all(-1).logical_or(~got[~counts].any(-1)).all())
            cut += int((full[~counts].any(-1) & ~got[~counts].any(-1)).sum())
    if rule == "window_both_ways":  # aligned at both ends, so only where queries and keys end at the same place
        assert (lengths_said == 0) == static
    else:
        assert lengths_said > 30
    assert (cut > 100) == (not rule.endswith("both_ways"))


@pytest.mark.parametrize("rule", RULES)
def test_none_only_where_causal_or_nothing_says_the_same(rule: str) -> None:
    """None asks for the module's own rule. No 2-D mask is looked at, so one without padding is handed over, too."""
    nones = 0
    for q, kv, q_offset, kv_offset in itertools.product((1, 2, 4), (1, 2, 4, 6), (0, 2, 3), (0, 2)):
        arguments = arguments_of(rule, 2, q, kv, q_offset, kv_offset, None)
        if integration.mask(**arguments) is None:
            nones += 1
            everything = torch.ones(q, kv, dtype=torch.bool)
            meant = everything if "both_ways" in rule else everything.tril(kv - q)
            assert bool((whole(arguments) == meant).all())
        elif rule in ("causal", "both_ways"):
            assert rule == "causal" and q_offset + q != kv + kv_offset
        full = torch.ones(2, kv + kv_offset, dtype=torch.bool)
        assert integration.mask(**arguments | {"attention_mask": full}) is not None
        never = {"allow_is_causal_skip": False, "allow_is_bidirectional_skip": False}
        assert integration.mask(**arguments | never) is not None
    assert nones > 0


@pytest.mark.parametrize(
    "function",
    [
        masking_utils.chunked_causal_mask_function(3, torch.zeros(2, dtype=torch.int64)),
        masking_utils.and_masks(masking_utils.causal_mask_function, lambda b, h, q, k: k != 1),
        masking_utils.or_masks(masking_utils.sliding_window_overlay(3), masking_utils.causal_mask_function),
        masking_utils.sliding_window_causal_mask_function(2),  # not the window that goes with it
        masking_utils.sliding_window_overlay(3),
        masking_utils.packed_sequence_mask_function(torch.tensor([[0, 0, 1, 1]] * 2)),
    ],
    ids=["chunks", "and", "or", "window", "overlay", "packed"],
)
def test_other_rules_have_a_whole_mask(function: Any) -> None:
    arguments = arguments_of("window", 2, 4, 4, 0, 0, left_padding(2, 4).bool()) | {"mask_function": function}
    got = integration.mask(**arguments)
    assert type(got) is torch.Tensor
    assert torch.equal(got, whole(arguments))


def test_tracing_has_a_whole_mask() -> None:
    arguments = arguments_of("causal", 2, 4, 4, 0, 0, left_padding(2, 4).bool())
    made = torch.compile(lambda: integration.mask(**arguments), backend="eager", fullgraph=True)()
    assert type(made) is torch.Tensor
    assert torch.equal(made, whole(arguments))
    torch.compiler.reset()


def test_padding_costs_nothing() -> None:
    """The lengths themselves, for padding on both sides: of a first pass, and of a chunk behind a cache of 3."""
    mask = torch.tensor([[0, 1, 1, 1, 0, 0], [1, 1, 1, 1, 1, 1], [0, 0, 0, 0, 0, 0], [0, 0, 0, 0, 1, 1]]).bool()
    first = lengths_of(arguments_of("causal", 4, 6, 6, 0, 0, mask))
    lengths = {name: x.tolist() for name, x in first.padding.lengths.items()}
    assert lengths["seqused_k"] == lengths["seqused_q"] == [4, 6, 6, 6]
    assert lengths["leftpad_k"] == lengths["leftpad_q"] == [1, 0, 6, 4]
    assert {x.dtype for x in first.padding.lengths.values()} == {torch.int32}
    later = lengths_of(arguments_of("causal", 4, 3, 6, 3, 0, mask))
    lengths = {name: x.tolist() for name, x in later.padding.lengths.items()}
    assert lengths == {"leftpad_k": [1, 0, 6, 4], "seqused_k": [4, 6, 6, 6], "leftpad_q": [0, 0, 3, 1],
                       "seqused_q": [1, 3, 3, 3]}  # fmt: skip
    step = lengths_of(arguments_of("causal", 4, 1, 6, 5, 0, mask))
    assert {name: x.tolist() for name, x in step.padding.lengths.items()} == {"leftpad_k": [1, 0, 6, 4]}


# ---------------------------------------------------------------------------------------------------------------------
# a PaddedMask looks like the whole mask


def padded() -> tuple[Any, Tensor]:
    arguments = arguments_of("window", 3, 5, 7, torch.tensor(2), 0, left_padding(3, 7).bool())
    return lengths_of(arguments), whole(arguments)


def test_looks_like_the_whole_mask() -> None:
    unchanged: tuple[Any, ...] = (
        lambda m: m, lambda m: m.to("cpu"), lambda m: m.bool(), lambda m: m.to(torch.bool), lambda m: m.clone(),
        lambda m: m.contiguous(), lambda m: m.detach(), lambda m: m[:, :, :, :7], copy.deepcopy,
    )  # fmt: skip
    for same_of in unchanged:
        mask, full = padded()
        assert (mask.shape, mask.ndim, mask.dtype, mask.device) == (full.shape, 4, torch.bool, full.device)
        same = same_of(mask)
        assert isinstance(same, PaddedMask)
        assert same.padding.built is None
        assert torch.equal(same & True, full)
    assert "PaddedMask((3, 1, 5, 7)" in repr(mask)
    mask, full = padded()
    for got, expected in (
        (~mask, ~full),
        (mask & full.flip(-1), full & full.flip(-1)),
        (full.flip(-1) | mask, full | full.flip(-1)),
        (mask[:, :, -1:, 2:], full[:, :, -1:, 2:]),
        (mask[1], full[1]),
        (mask.float(), full.float()),
        (torch.where(mask, 0.0, -1.0), torch.where(full, 0.0, -1.0)),
        (torch.cat([mask, full], -1), torch.cat([full, full], -1)),
        (mask.expand(3, 2, 5, 7), full.expand(3, 2, 5, 7)),
        (mask.to(torch.float64), full.double()),
        (mask.sum(-1), full.sum(-1)),
    ):
        assert type(got) is torch.Tensor
        assert torch.equal(got, expected)


def test_reading_keeps_the_lengths_and_writing_does_not() -> None:
    changes: tuple[tuple[Any, bool], ...] = (
        (lambda m: m.any(), True),
        (lambda m: torch.where(m, 0.0, -1.0), True),
        (lambda m: m.float(), True),
        (lambda m: m[:, :, 1:].logical_not_(), False),
        (lambda m: m.__setitem__((0, 0, 2), False), False),
        (lambda m: m.masked_fill_(torch.tensor(True), False), False),
        (lambda m: m.detach()[1].fill_(False), False),
    )
    for change, kept in changes:
        mask, full = padded()
        full = full.clone()
        change(mask)
        change(full)
        assert torch.equal(mask & True, full)
        assert torch.equal(seen(mask, 3, 5, 7, True) & full[:, 0], full[:, 0] & seen(full, 3, 5, 7, True))
        if not kept:
            assert torch.equal(seen(mask, 3, 5, 7, True), full[:, 0])
        assert mask.padding.exposed is not kept


def test_another_shape_is_the_whole_mask() -> None:
    """A mask that was made for other keys is refused as such, and never taken for its lengths."""
    for padding in (left_padding(3, 7).bool(), None):
        mask = lengths_of(arguments_of("window", 3, 5, 7, 2, 0, padding))
        with pytest.raises(ValueError, match="bias"):
            seen(mask, 3, 5, 6, True)


def test_a_cache_that_goes_on_counting() -> None:
    """A static cache adds to the tensor that it gave as q_offset."""
    offset = torch.tensor(2)
    arguments = arguments_of("causal", 2, 3, 8, offset, 0, None)
    full, mask = whole(arguments), lengths_of(arguments)
    offset.add_(3)
    assert torch.equal(seen(mask, 2, 3, 8, True), full[:, 0])
    assert torch.equal(mask & True, full)


# ---------------------------------------------------------------------------------------------------------------------
# whole models


class NoWait(TorchDispatchMode):  # type: ignore[misc]
    """What needs the elements of a tensor on the host fails."""

    WAITS = ("_local_scalar_dense", "item", "is_nonzero", "nonzero", "masked_select", "equal", "repeat_interleave")

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        indices = args[1] if name.startswith("index") and len(args) > 1 else ()
        boolean = isinstance(indices, (tuple, list)) and any(x is not None and x.dtype == torch.bool for x in indices)
        assert name not in self.WAITS and not boolean, f"{func} waits for the device"
        return func(*args, **kwargs or {})


@contextlib.contextmanager
def lengths_only(monkeypatch: pytest.MonkeyPatch, waits: bool = False) -> Iterator[list[dict[str, Any]]]:
    """No whole mask is built, and nothing waits unless `waits`. Gives the arguments of every call of the op."""
    calls: list[dict[str, Any]] = []

    def counted(q: Any, k: Any, v: Any, **given: Any) -> Any:
        calls.append(given)
        return flash_attention(q, k, v, **given)

    def refused(*_: Any, **__: Any) -> None:
        raise AssertionError("a whole mask, or a wait")

    with monkeypatch.context() as patch:
        patch.setattr(masking_utils, "sdpa_mask", refused)
        patch.setattr(integration, "flash_attention", counted)
        for name in ("tolist", "cpu") if not waits else ():
            patch.setattr(torch.Tensor, name, refused)
        with contextlib.nullcontext() if waits else NoWait():
            yield calls
    assert calls
    for call in calls:
        bias = call["bias"]
        assert bias is None or bias.is_floating_point() or bias.shape[1:3] == (1, 1)


def test_a_wait_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.ones(3)
    for wait in (lambda: bool(x.all()), lambda: x.sum().item(), lambda: x[x > 0], lambda: x.tolist(), lambda: x.cpu(),
                 lambda: x.nonzero(), lambda: sdpa_mask(1, 2, 2, attention_mask=x[None, :2].bool())):  # fmt: skip
        with pytest.raises(AssertionError, match="wait"), lengths_only(monkeypatch):
            wait()


SIZES: dict[str, Any] = {
    "vocab_size": VOCAB, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "max_position_embeddings": 128, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "attention_dropout": 0.0,
}  # fmt: skip
GROUPED: dict[str, Any] = SIZES | {"num_key_value_heads": 2, "head_dim": 16}
GEMMA2: dict[str, Any] = {"sliding_window": 5, "attn_logit_softcapping": 2.0, "query_pre_attn_scalar": 20}
DECODERS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", {}),
    "mistral": ("MistralConfig", {"sliding_window": 5}),
    "gemma2": ("Gemma2Config", GEMMA2),
    "gemma3": ("Gemma3TextConfig", {"sliding_window": 5, "layer_types": ["sliding_attention", "full_attention"]}),
    "gpt_oss": ("GptOssConfig", {"sliding_window": 5, "num_local_experts": 2, "num_experts_per_tok": 1}),
}  # fmt: skip
EXPERTS = ("gpt_oss",)  # eager experts wait
PADDED = {
    "left": [[0] * 4 + [1] * 10, [1] * 14, [0] * 9 + [1] * 5],
    "right": [[1] * 6 + [0] * 8, [1] * 14, [1] * 1 + [0] * 13],
    "both": [[0] * 3 + [1] * 6 + [0] * 5, [1] * 14, [0] + [1] * 13],
    "holes": [[1, 1, 1, 0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1], [1] * 14, [0, 1, 1, 0, 1, 0, 0, 1, 1, 1, 0, 1, 1, 0]],
}


@pytest.fixture(scope="module", params=DECODERS)
def decoder(request: pytest.FixtureRequest) -> Any:
    name, extra = DECODERS[request.param]
    return build(getattr(transformers, name)(**GROUPED | extra))


@pytest.mark.parametrize("side", PADDED)
def test_decoder(decoder: Any, monkeypatch: pytest.MonkeyPatch, side: str) -> None:
    """One pass; then in chunks of 6, 5, 1, 1 and 1 through both caches, which leaves some entries chunks of padding."""
    ids, mask = tokens(3, 14), torch.tensor(PADDED[side])
    places = (mask.cumsum(1) - 1).clamp(0)
    waits = decoder.config.model_type in EXPERTS
    use(decoder, "eager")
    expected = decoder(input_ids=ids, attention_mask=mask, position_ids=places).logits
    use(decoder, integration.NAME)
    with lengths_only(monkeypatch, waits) as calls:
        got = decoder(input_ids=ids, attention_mask=mask, position_ids=places).logits
    assert all("seqused_q" in call and "leftpad_k" in call for call in calls)
    close(got, expected, mask)
    for cache in (DynamicCache(config=decoder.config), StaticCache(config=decoder.config, max_cache_len=20)):
        parts = []
        for start, stop in itertools.pairwise((0, 6, 11, 12, 13, 14)):
            inputs = {"input_ids": ids[:, start:stop], "position_ids": places[:, start:stop]}
            single = stop - start == 1 and isinstance(cache, StaticCache)  # may be compiled: a boolean row
            unwatched = contextlib.nullcontext() if waits else NoWait()
            with unwatched if single else lengths_only(monkeypatch, waits):
                parts.append(decoder(**inputs, attention_mask=mask[:, :stop], past_key_values=cache).logits)
        close(torch.cat(parts, 1), expected, mask)


@pytest.mark.parametrize("kind", ["dynamic", "static"])
def test_generate_goes_on_behind_padding(decoder: Any, kind: str) -> None:
    """Greedy tokens behind prompts that are padded left, and that have holes, equal eager's."""
    for side in PADDED:
        mask = torch.tensor(PADDED[side])
        mask[:, -1] = 1  # whose logits are the next token's: padding would have none
        options: dict[str, Any] = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}
        options |= {"cache_implementation": kind, "disable_compile": True}
        runs = []
        for name in ("eager", integration.NAME):
            use(decoder, name)
            runs.append(decoder.generate(input_ids=tokens(3, 14), attention_mask=mask, **options))
        assert runs[0].shape == (3, 20)
        assert torch.equal(*runs)


@pytest.mark.filterwarnings("default")  # tracing has warnings of its own
def test_generate_compiles_its_steps() -> None:
    """generate() makes the masks of a static cache outside of what it compiles, which is every step but the first."""
    llama = build(transformers.LlamaConfig(**GROUPED))
    options: dict[str, Any] = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False}
    runs = []
    for name in ("eager", integration.NAME):
        use(llama, name)
        settings = transformers.CompileConfig(backend="eager", fullgraph=False)
        settings._compile_all_devices = True
        extra = {"cache_implementation": "static", "compile_config": settings} if name != "eager" else {}
        runs.append(llama.generate(input_ids=tokens(2, 9), attention_mask=left_padding(2, 9), **options, **extra))
    assert torch.equal(*runs)
    torch.compiler.reset()


def test_a_mask_enters_compiled_code() -> None:
    """The compiler hands a PaddedMask to the attention, which it leaves alone."""
    mask, full = padded()
    q, k, layer, attend = torch.randn(3, 1, 5, 8), torch.randn(3, 1, 7, 8), Layer(True), integration._uncompiled()
    step = torch.compile(lambda x, m: attend(layer, x + 1, k, k, m)[0] * 2, backend="eager")
    close(step(q, mask), step(q, full))
    assert mask.padding.built is None
    torch.compiler.reset()


@pytest.mark.parametrize("family", ["BertConfig", "ModernBertConfig"])
@pytest.mark.parametrize("side", PADDED)
def test_encoder(monkeypatch: pytest.MonkeyPatch, family: str, side: str) -> None:
    """Without a window, and with windows to both sides."""
    extra: dict[str, Any] = {}
    if family == "ModernBertConfig":
        extra = {"local_attention": 6, "global_attn_every_n_layers": 2, "cls_token_id": 1, "sep_token_id": 2}
    model = build(getattr(transformers, family)(**SIZES | extra), "AutoModel")
    ids, mask = tokens(3, 14), torch.tensor(PADDED[side])
    use(model, "eager")
    expected = model(input_ids=ids, attention_mask=mask).last_hidden_state
    use(model, integration.NAME)
    with lengths_only(monkeypatch) as calls:
        got = model(input_ids=ids, attention_mask=mask).last_hidden_state
    assert all("leftpad_k" in call for call in calls)
    close(got, expected, mask)


@pytest.mark.parametrize("side", PADDED)
def test_t5(monkeypatch: pytest.MonkeyPatch, side: str) -> None:
    """A bias by position beside the lengths; cross attention as long as the decoder, whose queries have no padding."""
    cfg = transformers.T5Config(
        vocab_size=VOCAB, d_model=64, d_kv=16, d_ff=96, num_layers=2, num_heads=4, dropout_rate=0.0,
        decoder_start_token_id=0,
    )  # fmt: skip
    t5 = build(cfg, "AutoModelForSeq2SeqLM")
    mask = torch.tensor(PADDED[side])
    inputs: dict[str, Any] = {"input_ids": tokens(3, 14), "decoder_input_ids": tokens(3, 14, seed=1)}
    for answer in (None, mask.flip(0)):
        given = inputs | {"attention_mask": mask, "decoder_attention_mask": answer}
        use(t5, "eager")
        expected = t5(**given).logits
        use(t5, integration.NAME)
        with lengths_only(monkeypatch) as calls:
            got = t5(**given).logits
        assert len(calls) == 6
        close(got, expected, answer)


@pytest.mark.parametrize("side", PADDED)
def test_whisper(monkeypatch: pytest.MonkeyPatch, side: str) -> None:
    cfg = transformers.WhisperConfig(
        vocab_size=VOCAB, d_model=64, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4, num_mel_bins=8,
        decoder_attention_heads=4, encoder_ffn_dim=96, decoder_ffn_dim=96, max_source_positions=15,
        suppress_tokens=None, max_target_positions=32, decoder_start_token_id=1, begin_suppress_tokens=None,
        dropout=0.0, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    whisper = build(cfg, "AutoModelForSpeechSeq2Seq")
    mask = torch.tensor(PADDED[side])
    inputs = {"input_features": torch.randn(3, 8, 30), "decoder_input_ids": tokens(3, 14)}
    use(whisper, "eager")
    expected = whisper(**inputs, decoder_attention_mask=mask).logits
    use(whisper, integration.NAME)
    with lengths_only(monkeypatch):
        got = whisper(**inputs, decoder_attention_mask=mask).logits
    close(got, expected, mask)


@pytest.mark.gpu
def test_gpu_never_waits() -> None:
    """torch itself watches for waits: a padded batch in one pass, and a chunk and a step behind a cache."""
    llama = build(transformers.LlamaConfig(**GROUPED))
    ids, mask = tokens(3, 14), torch.tensor(PADDED["both"])
    places = (mask.cumsum(1) - 1).clamp(0)
    expected = llama(input_ids=ids, attention_mask=mask, position_ids=places).logits
    use(llama.cuda(), integration.NAME)
    ids, seen_by, places = ids.cuda(), mask.cuda(), places.cuda()

    def run(*stops: int) -> Tensor:
        cache, parts = DynamicCache(config=llama.config), []
        for start, stop in itertools.pairwise((0, *stops)):
            inputs = {"input_ids": ids[:, start:stop], "position_ids": places[:, start:stop]}
            parts.append(llama(**inputs, attention_mask=seen_by[:, :stop], past_key_values=cache).logits)
        return torch.cat(parts, 1)

    for stops in ((14,), (6, 13, 14)):
        run(*stops)  # compiles
        torch.cuda.synchronize()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that the mode is a prototype, which does not see all waits
            torch.cuda.set_sync_debug_mode("error")
        try:
            got = run(*stops)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        close(got.cpu(), expected, mask)
