"""One adapter per library for the mixture of experts: what it needs, what it cannot do, and the call that is timed.

All get the same inputs and the same routing, each with the layout of weights that it wants, made outside of the time.
Only our own call contains a router, where the case asks for it: weights and ids are given to the others. As in
library.py, what is not installed is reported as missing with its reason, and the run goes on.
"""

from __future__ import annotations

import importlib
import importlib.util
from typing import TYPE_CHECKING, Any

from benchmarks.cases import OURS
from benchmarks.library import Prepared, Setup, first_reason, from_torch, to_torch
from benchmarks.moe_inputs import ALPHA, LIMIT, MoEInputs, activate

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch

    from benchmarks.moe_cases import MoECase


class MoELibrary:
    """An adapter, as library.Library is one. `waits` says why its calls cannot be captured in a CUDA graph, or ""."""

    name = ""
    waits = ""

    def missing(self, setup: Setup) -> str:
        return "" if setup.cuda else "needs a CUDA device"

    def why_not(self, case: MoECase, setup: Setup) -> str:  # noqa: ARG002
        return first_reason(
            (case.arrays != "torch", f"takes torch tensors, not {case.arrays} arrays"),
            (case.graph and self.waits, f"cannot be captured: {self.waits}"),
        )

    def prepare(self, case: MoECase, sets: Sequence[MoEInputs], setup: Setup) -> Prepared:
        raise NotImplementedError

    def unsupported(self, error: Exception) -> str:  # noqa: ARG002
        """The reason when `error`, raised by the first call, means "this library cannot", else ""."""
        return ""


def concatenated(case: MoECase, tensor: torch.Tensor | None) -> torch.Tensor | None:
    """Rows (dimension 1) in the order gate..., up...; the tensor itself where they are."""
    if tensor is None or not case.interleaved:
        return tensor
    return tensor.unflatten(1, (-1, 2)).transpose(1, 2).flatten(1, 2).contiguous()


def interleaved(case: MoECase, tensor: torch.Tensor) -> torch.Tensor:
    """Rows (dimension 1) in the order g0, u0, g1, u1, ...; the tensor itself where they are."""
    if case.interleaved:
        return tensor
    return tensor.unflatten(1, (2, -1)).transpose(1, 2).flatten(1, 2).contiguous()


class OursMoE(MoELibrary):
    """flashmoe_cupy: moe_route and fused_moe, on the case's own array library; the NumPy back end for CPU arrays."""

    name = OURS

    def missing(self, setup: Setup) -> str:
        try:
            package = importlib.import_module("flashmoe_cupy")
            _ = package.fused_moe, package.moe_route
        except (ImportError, AttributeError) as error:
            return f"{type(error).__name__}: {error}"
        if setup.cuda and importlib.util.find_spec("cupy") is None:
            return "CuPy is not installed"
        return ""

    def why_not(self, case: MoECase, setup: Setup) -> str:
        return first_reason(
            (case.arrays == ("numpy" if setup.cuda else "cupy"), f"{case.arrays} arrays do not live on {setup.device}"),
            (importlib.util.find_spec(case.arrays) is None, f"{case.arrays} is not installed"),
        )

    def unsupported(self, error: Exception) -> str:
        return str(error) if type(error).__name__ == "UnsupportedProblem" else ""

    def prepare(self, case: MoECase, sets: Sequence[MoEInputs], setup: Setup) -> Prepared:  # noqa: ARG002
        package = importlib.import_module("flashmoe_cupy")
        native = [MoEInputs(*(None if t is None else from_torch(t, case.arrays) for t in one)) for one in sets]
        options: dict[str, Any] = {"activation": case.activation}
        if case.interleaved:
            options["interleaved"] = True
        if case.activation == "swigluoai":
            options |= {"swiglu_alpha": ALPHA, "swiglu_limit": LIMIT}
        routing: dict[str, Any] = {"top_k": case.top_k, "scoring_func": case.scoring_func}
        routing |= {"renormalize": case.renormalize, "routed_scaling_factor": case.routed_scaling_factor}
        routing |= {"num_expert_group": case.num_expert_group, "topk_group": case.topk_group}
        extra = [
            options | ({} if one.b_gate_up is None else {"b_gate_up": one.b_gate_up, "b_down": one.b_down})
            for one in native
        ]
        bias = [routing | {"e_score_correction_bias": one.correction_bias} for one in native]
        route, experts = package.moe_route, package.fused_moe

        def run(i: int, **out: Any) -> Any:
            one = native[i % len(native)]
            if case.routing:
                weights, ids = route(one.logits, **bias[i % len(native)])
            else:
                weights, ids = one.topk_weights, one.topk_ids
            return experts(one.x, one.w_gate_up, one.w_down, weights, ids, **extra[i % len(native)], **out)

        def into(i: int, out: torch.Tensor) -> Any:
            return run(i, out=from_torch(out, case.arrays))

        return Prepared(run, lambda out: to_torch(out, case.arrays), into)


class GroupedMM(MoELibrary):
    """torch.nn.functional.grouped_mm: sort, gather, two grouped products with the activation between, combination.

    combine: "gather_sum" brings the rows back into the order of tokens and adds them, "index_add" adds them in place.
    """

    def __init__(self, name: str, combine: str) -> None:
        self.name = name
        self.combine = combine

    def missing(self, setup: Setup) -> str:  # noqa: ARG002
        functional = importlib.import_module("torch.nn.functional")
        return "" if hasattr(functional, "grouped_mm") else "this torch has no torch.nn.functional.grouped_mm"

    def why_not(self, case: MoECase, setup: Setup) -> str:
        on_gpu = setup.cuda and case.dtype != "bfloat16"
        return super().why_not(case, setup) or first_reason((on_gpu, "grouped_mm takes bfloat16 on a GPU"))

    def prepare(self, case: MoECase, sets: Sequence[MoEInputs], setup: Setup) -> Prepared:  # noqa: ARG002
        import torch

        grouped_mm = torch.nn.functional.grouped_mm
        experts = torch.arange(case.experts, dtype=torch.int32, device=sets[0].x.device)
        calls = [_torch_layout(case, one) for one in sets]
        assignments = case.tokens * case.top_k

        def run(i: int) -> torch.Tensor:
            x, w_gate_up, w_down, b_gate_up, b_down, weights, ids = calls[i % len(calls)]
            sorted_ids, order = ids.flatten().sort(stable=True)
            ends = torch.searchsorted(sorted_ids, experts, right=True, out_int32=True)
            rows = order // case.top_k
            h = grouped_mm(x[rows], w_gate_up.transpose(1, 2), offs=ends)
            if b_gate_up is not None:
                h += b_gate_up[sorted_ids]
            y = grouped_mm(activate(case, h, interleaved=False), w_down.transpose(1, 2), offs=ends)
            if b_down is not None:
                y += b_down[sorted_ids]
            if self.combine == "index_add":
                return torch.zeros_like(x).index_add_(0, rows, y * weights.flatten()[order, None])
            place = torch.empty_like(order)
            place[order] = torch.arange(assignments, device=x.device)
            return (y[place].view(case.tokens, case.top_k, -1) * weights[..., None]).sum(1)

        return Prepared(run, lambda out: out)


class TorchLoop(MoELibrary):
    """The loop over experts that models are first written with: find an expert's tokens, compute them, add them."""

    name = "torch_loop"
    waits = "the number of an expert's tokens is read by the host"

    def missing(self, setup: Setup) -> str:  # noqa: ARG002
        return ""

    def prepare(self, case: MoECase, sets: Sequence[MoEInputs], setup: Setup) -> Prepared:  # noqa: ARG002
        import torch

        linear = torch.nn.functional.linear
        calls = [_torch_layout(case, one) for one in sets]

        def run(i: int) -> torch.Tensor:
            x, w_gate_up, w_down, b_gate_up, b_down, weights, ids = calls[i % len(calls)]
            out = torch.zeros_like(x)
            for e in range(case.experts):
                rows, places = torch.where(ids == e)
                if rows.numel() == 0:
                    continue
                h = linear(x[rows], w_gate_up[e], None if b_gate_up is None else b_gate_up[e])
                y = linear(activate(case, h, interleaved=False), w_down[e], None if b_down is None else b_down[e])
                out.index_add_(0, rows, y * weights[rows, places, None])
            return out

        return Prepared(run, lambda out: out)


def _torch_layout(case: MoECase, one: MoEInputs) -> tuple[Any, ...]:
    """x, weights with gate rows first, biases, topk_weights in x's dtype, topk_ids."""
    gate_up, bias = concatenated(case, one.w_gate_up), concatenated(case, one.b_gate_up)
    return one.x, gate_up, one.w_down, bias, one.b_down, one.topk_weights.to(one.x.dtype), one.topk_ids


def _swiglu_only(case: MoECase) -> str:
    return first_reason(
        (case.activation != "swiglu", f"takes swiglu, not {case.activation}"),
        (case.biases, "has no expert biases"),
        (case.dtype == "float32", "takes bf16 and fp16"),
    )


def _import(module: str) -> str:
    """Why `module` cannot be imported, or ""."""
    try:
        importlib.import_module(module)
    except Exception as error:  # a package whose own imports fail for want of a compiler, say
        return f"{type(error).__name__}: {error}"
    return ""


class Liger(MoELibrary):
    """Liger's fused MoE (Triton): indices, two grouped products with the activation inside, gather-sum."""

    name = "liger"
    waits = "the number of tiles is read by the host"
    module = "liger_kernel.ops.fused_moe"

    def missing(self, setup: Setup) -> str:
        return super().missing(setup) or _import(self.module)

    def why_not(self, case: MoECase, setup: Setup) -> str:
        return super().why_not(case, setup) or _swiglu_only(case)

    def prepare(self, case: MoECase, sets: Sequence[MoEInputs], setup: Setup) -> Prepared:  # noqa: ARG002
        import torch

        apply = importlib.import_module(self.module).LigerFusedMoEFunction.apply
        calls = [(one.x, concatenated(case, one.w_gate_up), one.w_down, one.topk_ids, one.topk_weights) for one in sets]
        return Prepared(lambda i: apply(*calls[i % len(calls)]), lambda out: out, scope=torch.no_grad)


class SonicMoE(MoELibrary):
    """SonicMoE's layer behind its router: metadata, gathering product with the activation, product, gather-sum.

    These are the steps of its moe_TC_softmax_topk_layer with routing given, and like that function's forward pass they
    store the first product. Its kernels are compiled and tuned at the first call of a shape, which takes minutes.
    """

    name = "sonicmoe"

    def missing(self, setup: Setup) -> str:
        return super().missing(setup) or _import("sonicmoe.functional")

    def why_not(self, case: MoECase, setup: Setup) -> str:
        return (
            super().why_not(case, setup)
            or _swiglu_only(case)
            or first_reason(
                (case.hidden < 512 or case.hidden % 64, "takes hidden sizes from 512 that are multiples of 64"),
                (case.intermediate % 64, "takes intermediate sizes that are multiples of 64"),
            )
        )

    def prepare(self, case: MoECase, sets: Sequence[MoEInputs], setup: Setup) -> Prepared:
        import torch

        sonic = importlib.import_module("sonicmoe.functional")
        swiglu = importlib.import_module("sonicmoe.enums").ActivationType.SWIGLU
        assignments, experts = case.tokens * case.top_k, case.experts
        calls = [(interleaved(case, one.w_gate_up).permute(1, 2, 0), one.w_down.permute(1, 2, 0), one) for one in sets]

        def numbers(count: int) -> torch.Tensor:
            return torch.empty(count, dtype=torch.int32, device=setup.device)

        def run(i: int) -> torch.Tensor:
            w1, w2, one = calls[i % len(calls)]
            counts, offsets = numbers(experts), numbers(experts + 1)
            gather, scatter, back = (numbers(assignments) for _ in range(3))
            sonic.TC_topk_router_metadata_triton(one.topk_ids, experts, counts, offsets, gather, scatter, back)
            up = (offsets, assignments, case.top_k, gather, scatter, back, None, False, swiglu, False, False)
            a, h = sonic._UpProjection.apply(one.x, w1, None, *up)
            down = (offsets, case.tokens, case.top_k, gather, scatter, back, None, False, swiglu)
            out: torch.Tensor = sonic._DownProjection.apply(a, h, w2, None, one.topk_weights, *down)
            return out

        return Prepared(run, lambda out: out, scope=torch.no_grad)
