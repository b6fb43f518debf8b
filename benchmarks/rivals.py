"""Adapters of what torch brings, and the register of all libraries for attention."""

from __future__ import annotations

import contextlib
import importlib
import warnings
from typing import TYPE_CHECKING, Any

from benchmarks.cases import OURS_SM80
from benchmarks.flash_rivals import FA3, FA4
from benchmarks.library import Library, Prepared, Setup, bhsd, bshd, first_reason, no_rival, why_not_imported
from benchmarks.ours import Ours, OursForced, OursPacked, OursPlain

if TYPE_CHECKING:
    from collections.abc import Sequence

    from benchmarks.attention_inputs import Inputs
    from benchmarks.cases import Case


class Sdpa(Library):
    """torch.nn.functional.scaled_dot_product_attention: one back end of it, or the one that torch picks.

    Its back ends want an additive bias in q's dtype: a cast is part of the call, as it is for a user with another one.
    """

    def __init__(self, name: str, backend: str = "") -> None:
        self.name = name
        self.backend = backend

    def missing(self, setup: Setup) -> str:
        return "needs a CUDA device" if self.backend and not setup.cuda else ""

    def why_not(self, case: Case, setup: Setup) -> str:  # noqa: ARG002
        return first_reason(
            *no_rival(case),
            (case.varlen, "SDPA has no packed sequences"),
            (case.window_size != (-1, -1), "SDPA has no window"),
            (case.softcap, "SDPA has no softcap"),
            (case.sinks, "SDPA has no sinks"),
            (case.alibi, "SDPA has no ALiBi slopes"),
            (case.causal and case.seqlen_q != case.seqlen_k, "SDPA's causal mask is aligned top-left"),
            (case.padding, "SDPA has no lengths of padded batches"),
        )

    def unsupported(self, error: Exception) -> str:
        return f"the back end refuses this case: {error}" if "No available kernel" in str(error) else ""

    def prepare(self, case: Case, sets: Sequence[Inputs], setup: Setup) -> Prepared:  # noqa: ARG002
        from torch.nn.functional import scaled_dot_product_attention

        options = self.options(case)
        calls = [(tuple(bhsd(case, t) for t in one[:3]), one.bias) for one in sets]
        cast = case.bias == "float32" and case.dtype != "float32"

        def run(i: int) -> Any:
            arrays, bias = calls[i % len(calls)]
            mask = bias.to(arrays[0].dtype) if cast and bias is not None else bias
            return scaled_dot_product_attention(*arrays, attn_mask=mask, **options)

        return Prepared(run, lambda out: bhsd(case, out), scope=self.scope)

    def options(self, case: Case) -> dict[str, Any]:
        """Arguments of the call, beside arrays."""
        causal = {"is_causal": True} if case.causal else {}
        return causal | ({"enable_gqa": True} if case.heads_q != case.heads_k else {})

    @contextlib.contextmanager
    def scope(self) -> Any:
        """Around the calls: the choice of the back end."""
        from torch.nn.attention import SDPBackend, sdpa_kernel

        with warnings.catch_warnings():  # a back end that refuses warns once per reason, then raises
            warnings.simplefilter("ignore")
            with sdpa_kernel([getattr(SDPBackend, self.backend)]) if self.backend else contextlib.nullcontext():
                yield


class TorchFA2(Sdpa):
    """FA2 as torch carries it: through SDPA where SDPA can say the case, else through the operator beneath it."""

    def __init__(self) -> None:
        super().__init__("torch_fa2", "FLASH_ATTENTION")

    def why_not(self, case: Case, setup: Setup) -> str:  # noqa: ARG002
        return first_reason(
            *no_rival(case),
            (case.dtype == "float32", "FA2 takes bf16 and fp16"),
            (case.head_dim != case.head_dim_v, "torch's FA2 wants head_dim_v == head_dim"),
            (case.softcap, "torch's FA2 has no softcap"),
            (case.sinks, "FA2 has no sinks"),
            (case.alibi, "torch's FA2 has no ALiBi slopes"),
            (case.bias, "FA2 has no dense bias"),
            (case.padding, "padded batches are not adapted for FA2 here"),
        )

    def prepare(self, case: Case, sets: Sequence[Inputs], setup: Setup) -> Prepared:
        plain = not case.varlen and case.window_size == (-1, -1)
        if plain and (not case.causal or case.seqlen_q == case.seqlen_k):
            return super().prepare(case, sets, setup)
        import torch

        operator = torch.ops.aten._flash_attention_forward.default
        left, right = case.band()
        options: dict[str, Any] = {}
        if case.window_size != (-1, -1):
            options = {"window_size_left": left, "window_size_right": right}
        longest_q, longest_k = (max(spans) for spans in zip(*case.spans(), strict=True))
        packed = [one[:3] if case.varlen else tuple(bshd(case, t) for t in one[:3]) for one in sets]
        # The operator takes "causal" only without a window; a window with right = 0 says the same.
        causal = case.causal and not options

        def run(i: int) -> Any:
            q, k, v = packed[i % len(packed)]
            cu = sets[i % len(packed)].cu_seqlens
            return operator(q, k, v, cu, cu, longest_q, longest_k, 0.0, causal, False, **options)[0]

        return Prepared(run, lambda out: out if case.varlen else bshd(case, out))


class Flex(Library):
    """FlexAttention under torch.compile, with a block mask; compiled anew for every case (seconds each)."""

    name = "flex_attention"

    def missing(self, setup: Setup) -> str:
        try:
            importlib.import_module("torch.nn.attention.flex_attention")
        except ImportError as error:
            return str(error)
        return super().missing(setup)

    def why_not(self, case: Case, setup: Setup) -> str:  # noqa: ARG002
        return first_reason(
            *no_rival(case),
            (case.varlen, "packed sequences are not adapted for FlexAttention here"),
            (case.padding, "padded batches are not adapted for FlexAttention here"),
        )

    def prepare(self, case: Case, sets: Sequence[Inputs], setup: Setup) -> Prepared:
        import torch
        from torch.nn.attention.flex_attention import AuxRequest, create_block_mask, flex_attention

        torch._dynamo.reset()  # past its recompile limit Dynamo would run the eager version, which makes all scores
        left, right = case.band()
        offset = case.seqlen_k - case.seqlen_q

        def visible(b: Any, h: Any, i: Any, j: Any) -> Any:  # noqa: ARG001 - FlexAttention's signature
            seen = j <= i + offset + right if right >= 0 else j >= 0
            return seen & (j >= i + offset - left) if left >= 0 else seen

        mask = None
        if right >= 0 or left >= 0:
            mask = create_block_mask(visible, None, None, case.seqlen_q, case.seqlen_k, device=setup.device)

        # One compile for all input sets: q, k and v rotate, the small extras are those of the first set.
        slopes, bias, sinks = sets[0].alibi_slopes, sets[0].bias, sets[0].sinks
        if bias is not None:
            bias = bias.expand(case.batch, case.heads_q, case.seqlen_q, case.seqlen_k)

        def score(s: Any, b: Any, h: Any, i: Any, j: Any) -> Any:
            if case.softcap:
                s = case.softcap * torch.tanh(s / case.softcap)
            if slopes is not None:
                s = s - slopes[h] * torch.abs(i + offset - j)
            if bias is not None:
                s = torch.where(bias[b, h, i, j], s, -float("inf")) if case.bias == "bool" else s + bias[b, h, i, j]
            return s

        plain = not case.softcap and slopes is None and bias is None
        options: dict[str, Any] = {"score_mod": None if plain else score, "block_mask": mask}
        options["enable_gqa"] = case.heads_q != case.heads_k

        def attend(q: Any, k: Any, v: Any) -> Any:
            if sinks is None:
                return flex_attention(q, k, v, **options)
            out, aux = flex_attention(q, k, v, **options, return_aux=AuxRequest(lse=True))
            return out * torch.sigmoid(aux.lse - sinks[None, :, None])[..., None].to(out.dtype)

        compiled = torch.compile(attend, dynamic=False)
        arrays = [tuple(bhsd(case, t) for t in one[:3]) for one in sets]
        return Prepared(lambda i: compiled(*arrays[i % len(arrays)]), lambda out: bhsd(case, out))


class CuEquivariance(Library):
    """cuEquivariance's triangle attention: n batches of one bias, (B, n, heads, seq, head_dim) and (B, 1, heads, ...).

    It casts the bias to what its kernel reads, float32 on Hopper, inside its call.
    """

    name = "cuequivariance"

    def missing(self, setup: Setup) -> str:
        # The first is what the second computes with.
        return super().missing(setup) or why_not_imported("cuequivariance_ops_torch", "cuequivariance_torch")

    def why_not(self, case: Case, setup: Setup) -> str:  # noqa: ARG002
        rows = (case.heads_q, case.seqlen_q, case.seqlen_k)
        return first_reason(
            *no_rival(case),
            (case.bias not in ("same", "float32"), "triangle attention wants an additive bias"),
            (case.varlen or case.padding, "triangle attention has no sequences of lengths of their own"),
            (case.causal or case.window_size != (-1, -1), "triangle attention has no causal mask and no window"),
            (case.softcap or case.sinks or case.alibi, "triangle attention has no softcap, sinks or ALiBi slopes"),
            (case.heads_q != case.heads_k, "triangle attention wants as many key heads as query heads"),
            (case.head_dim != case.head_dim_v, "triangle attention wants head_dim_v == head_dim"),
            (case.whole_bias()[1:] != rows, "triangle attention wants a bias for every head, query and key"),
        )

    def prepare(self, case: Case, sets: Sequence[Inputs], setup: Setup) -> Prepared:  # noqa: ARG002
        triangle_attention = importlib.import_module("cuequivariance_torch").triangle_attention
        apart = 1 if case.whole_bias()[0] == case.batch else 0  # where n is: a bias of each entry has one, else all
        calls = [
            (*(bhsd(case, t).unsqueeze(apart) for t in one[:3]), one.bias.unsqueeze(1))
            for one in sets
            if one.bias is not None
        ]

        def run(i: int) -> Any:
            return triangle_attention(*calls[i % len(calls)])

        return Prepared(run, lambda out: bhsd(case, out.squeeze(apart)))


LIBRARIES: dict[str, Library] = {
    library.name: library
    for library in (
        Ours(),
        OursForced(OURS_SM80, "attention_fwd_sm80"),
        OursPlain(),
        OursPacked(),
        TorchFA2(),
        Sdpa("torch_cudnn", "CUDNN_ATTENTION"),
        Sdpa("torch_efficient", "EFFICIENT_ATTENTION"),
        Sdpa("torch_sdpa"),
        Flex(),
        FA3(),
        FA4(),
        CuEquivariance(),
    )
}
