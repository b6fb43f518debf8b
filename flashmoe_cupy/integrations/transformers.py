"""Hugging Face transformers models on `flash_attention`. Tested with transformers 5.17.0 and 5.24.0.

    from flashmoe_cupy.integrations.transformers import register
    model = AutoModelForCausalLM.from_pretrained(path, attn_implementation=register())

or `model.set_attn_implementation(register())`. GQA, windows, softcaps, sinks, position biases, padding, packing and KV
caches are served, and models train. Nothing here waits for a device.

A purely causal batch needs no mask. For padding on either side, holes in it, windows and static caches, our mask
function hands over lengths, found on the device, and at most one boolean per key (`transformers_masks`); so it does for
encoders and cross attention. Rows of padding are 0 under a causal rule, and cost nothing; an encoder computes them, for
a mask function is not told whether the queries are the keys. A full boolean (batch, 1, seqlen_q, seqlen_k) mask is
built for what lengths cannot say: packed sequences in one row by `position_ids` alone or beside a mask, chunks, blocks
(images in Gemma 3), rules of a model's own; while a compiler traces or a CUDA graph is recorded; and for code that
touches the mask.

A model whose class declares neither support of `sdpa` nor that it dispatches all its attention (Bloom, RemBERT, MPT),
or that takes its attention from a table of its own (Falcon), raises UnsupportedProblem when it is built. transformers'
`set_attn_implementation` leaves most of these as they are, with a warning; the rest raise at their first forward pass.
"""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, Any

from ..errors import DependencyError, UnsupportedProblem
from ..ops.attention import flash_attention, flash_attention_varlen
from . import transformers_models

if TYPE_CHECKING:
    import torch

NAME, TESTED = "fmc_attention", "5.17.0"


def register(name: Any = NAME) -> str:
    """Register the attention and its mask in transformers under `name` and return `name`. May be called again.

    Models built with it are checked from then on (`transformers_models`). Raises ValueError for a name that is taken or
    means something else to transformers, DependencyError if transformers is missing or too old.
    """
    reserved = [part for part in ("flash", "flex_attention", "sdpa", "eager", "|", "/") if part in str(name)]
    if not isinstance(name, str) or reserved or not name.replace("_", "").isalnum():
        raise ValueError(
            f"name={name!r}: to transformers a name with 'flash' means the flash-attn package, one with 'sdpa', "
            "'eager' or 'flex_attention' its own attention, one with '/' a kernel on the hub, one with '|' paged "
            f"attention; use letters, digits and '_', such as {NAME!r}"
        )
    try:
        from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, AttentionMaskInterface, sdpa_mask
        from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, AttentionInterface

        sdpa_mask(1, q_length=1, kv_length=1, q_offset=0)
    except (ImportError, TypeError) as error:  # not installed, or from before this mask interface
        raise DependencyError(f"transformers does not fit ({error}): pip install 'transformers>={TESTED}'") from error
    attend = _uncompiled()
    masks = ALL_MASK_ATTENTION_FUNCTIONS
    if ALL_ATTENTION_FUNCTIONS.get(name, attend) is not attend or masks.get(name, mask) is not mask:
        raise ValueError(f"name={name!r}: transformers has an attention of this name already; use another one")
    transformers_models.watch(attention=name)
    AttentionInterface.register(name, attend)
    AttentionMaskInterface.register(name, mask)  # without it a padding mask is dropped in silence
    return name


@cache
def _uncompiled() -> Any:
    """`attention`, opaque to torch.compile: generate() compiles the decoding step of a static cache."""
    import torch

    return torch.compiler.disable(attention)


def mask(
    *, q_length: int, kv_length: int, q_offset: int | torch.Tensor = 0, kv_offset: int = 0,
    mask_function: Any = None, attention_mask: torch.Tensor | None = None, local_size: int | None = None,
    allow_is_causal_skip: bool = True, allow_is_bidirectional_skip: bool = False, **kwargs: Any,
) -> torch.Tensor | None:  # fmt: skip
    """Mask (batch, 1, q_length, kv_length), boolean to all who look at it, True = attend; or None.

    Arguments: transformers.masking_utils.sdpa_mask. Where lengths say it, a `PaddedMask`, which holds no elements: for
    causal, windowed and bidirectional rules with a 2-D mask. Else the boolean mask itself: for other rules, under a
    compiler or tracer, and for the single query of a step that transformers may compile. None only where bottom-right
    causal, or no mask at all, says the same. Its own None can also mean top-left causal (a static cache's first forward
    pass), and the attention function cannot tell the two apart. Nothing waits for a device. Raises UnsupportedProblem
    for a `config` whose models would read the mask with attention code of their own.
    """
    import torch
    from transformers.masking_utils import sdpa_mask
    from transformers.utils.import_utils import is_tracing

    if "config" in kwargs and not torch.compiler.is_compiling():
        transformers_models.check_config(kwargs["config"])
    if attention_mask is None and isinstance(q_offset, int):  # a static cache has a tensor, and room behind its tokens
        ends = kv_offset + kv_length - q_offset - q_length  # keys behind the last query's own place
        near = local_size is None or kv_length < local_size  # no window ends among the keys
        if (allow_is_causal_skip and near and ends == 0) or (
            allow_is_bidirectional_skip and (local_size is None or (near and 0 <= ends <= kv_length - q_length))
        ):
            return None
    arguments: dict[str, Any] = kwargs | {"q_length": q_length, "kv_length": kv_length, "q_offset": q_offset}
    arguments |= {"kv_offset": kv_offset, "attention_mask": attention_mask, "local_size": local_size}
    arguments |= {} if mask_function is None else {"mask_function": mask_function}
    if not (is_tracing(attention_mask) or is_tracing(q_offset) or (q_length == 1 and not allow_is_causal_skip)):
        from .transformers_masks import padded, rule_of

        rule = rule_of(mask_function, local_size)
        found = None if rule is None else padded(rule, **arguments)
        if found is not None:
            return found
    # With leave to skip, transformers would look at the elements of attention_mask, and wait for them.
    built: torch.Tensor = sdpa_mask(**arguments, allow_is_causal_skip=False, allow_is_bidirectional_skip=False)
    return built


def attention(
    module: torch.nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor,
    attention_mask: torch.Tensor | None, dropout: float = 0.0, scaling: float | None = None,
    is_causal: bool | None = None, sliding_window: int | None = None, softcap: float | None = None,
    s_aux: torch.Tensor | None = None, position_bias: torch.Tensor | None = None,
    cu_seq_lens_q: torch.Tensor | None = None, cu_seq_lens_k: torch.Tensor | None = None,
    max_length_q: int = 0, max_length_k: int = 0, **kwargs: Any,
) -> tuple[torch.Tensor, None]:  # fmt: skip
    """Query (B, Hq, L, D), key (B, Hkv, S, D), value (B, Hkv, S, Dv) -> (new contiguous out (B, L, Hq, Dv), None).

    attention_mask: boolean (True = attend) or additive, 4-D, broadcastable to (B, Hq, L, S), or a `PaddedMask`;
    causality and window are in it. Without one: causal, bottom-right, unless `is_causal` or else `module.is_causal` is
    false. cu_seq_lens part packed sequences in both cases. Raises UnsupportedProblem for dropout, returned weights,
    sparse attention.
    """
    from .transformers_masks import PaddedMask

    transformers_models.check_config(getattr(module, "config", None))
    reasons = _why_not(attention_mask, dropout, kwargs)
    if cu_seq_lens_q is not None and (query.shape[0] != 1 or position_bias is not None or cu_seq_lens_k is None):
        reasons.append("cu_seq_lens_q: packed sequences need cu_seq_lens_k, batch 1 and no position_bias")
    if reasons:
        raise UnsupportedProblem("transformers attention", reasons, 'attn_implementation="eager" runs every case')
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    reach = sliding_window - 1 if sliding_window and attention_mask is None else -1
    options: dict[str, Any] = {
        "causal": bool(causal) and attention_mask is None,
        "window_size": (reach, reach),
        "softmax_scale": scaling,
        "softcap": softcap or 0.0,
        "sinks": s_aux if s_aux is None or s_aux.dtype == query.dtype else s_aux.float(),
    }
    if isinstance(attention_mask, PaddedMask):
        fits = attention_mask.shape == (query.shape[0], 1, query.shape[2], key.shape[2])
        if not fits or attention_mask.padding.exposed or cu_seq_lens_q is not None:
            attention_mask = attention_mask.padding.whole()
        else:
            options |= attention_mask.padding.rule._asdict() | attention_mask.padding.lengths
            attention_mask = attention_mask.padding.row
    # as (B, L, H, D) views, so that the new output has the layout that transformers wants
    q, k, v = query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)
    if cu_seq_lens_q is not None and attention_mask is None:  # as the model called us, for a PaddedMask is whole here
        options |= {"cu_seqlens_q": cu_seq_lens_q, "cu_seqlens_k": cu_seq_lens_k}
        options |= {"max_seqlen_q": int(max_length_q or q.shape[1]), "max_seqlen_k": int(max_length_k or k.shape[1])}
        return flash_attention_varlen(q[0], k[0], v[0], **options)[None], None
    if cu_seq_lens_q is not None and cu_seq_lens_k is not None and attention_mask is not None:
        # A mask may let tokens see other packed sequences: not every model hides them.
        elsewhere = _sequence(cu_seq_lens_q, q.shape[1])[:, None] != _sequence(cu_seq_lens_k, k.shape[1])
        attention_mask = attention_mask.masked_fill(elsewhere, False if _boolean(attention_mask) else float("-inf"))
    bias = attention_mask if position_bias is None else position_bias
    if position_bias is not None and attention_mask is not None:
        add = not _boolean(attention_mask)
        bias = position_bias + attention_mask if add else position_bias.masked_fill(~attention_mask, float("-inf"))
    if bias is not None and not _boolean(bias) and bias.dtype != query.dtype:
        bias = bias.float()
    return flash_attention(q, k, v, bias=bias, **options), None


def _why_not(mask: torch.Tensor | None, dropout: float, kwargs: dict[str, Any]) -> list[str]:
    reasons: list[str] = []
    if dropout:
        reasons.append(f"dropout={dropout}: there is no dropout; model.eval() or attention_dropout=0.0 turns it off")
    if kwargs.get("output_attentions"):
        reasons.append("output_attentions=True: the weights are never formed")
    if mask is not None and (mask.ndim != 4 or not (_boolean(mask) or mask.is_floating_point())):
        reasons.append(f"attention_mask: {mask.ndim}-D, {mask.dtype}; it must be 4-D and boolean or floating")
    for name in ("indices", "block_indices"):  # a model that passes one has left its choice of keys out of the mask
        reasons += [f"{name}: sparse attention is not supported"] if kwargs.get(name) is not None else []
    if kwargs.get("sinks") is not None:
        reasons.append("sinks: one per query is not supported; s_aux is one per head")
    return reasons


def _sequence(cu_seq_lens: torch.Tensor, length: int) -> torch.Tensor:
    """The packed sequence that each of `length` places belongs to."""
    return (cu_seq_lens.new_ones(length).cumsum(0)[:, None] > cu_seq_lens[1:]).sum(-1)


def _boolean(tensor: torch.Tensor) -> bool:
    return str(tensor.dtype) == "torch.bool"
