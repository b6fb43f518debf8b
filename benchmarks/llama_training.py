"""Forward and backward of a stack of Llama layers, in torch, with the attention of each library.

All else is the same code: RMSNorm, rotary positions, the projections and a gated MLP. A call computes the output of the
stack and the gradients of its input and of all weights. Each library is first held to attention in float32 inside of
the same layers: the output, the gradient of the input, and those of the first layer's four projections.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import math
from functools import cache
from typing import TYPE_CHECKING, Any, NamedTuple

from benchmarks.attention_inputs import Check
from benchmarks.backward_rivals import BACKWARD_LIBRARIES
from benchmarks.bench import Bench
from benchmarks.cases import OURS
from benchmarks.library import Library, Prepared, Setup
from benchmarks.training_cases import LayersCase

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    import torch

    Attention = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]  # (batch, seq, heads, dim), causal

ERROR_LIMIT = 0.05  # relative, of each part of the answer; attention without its mask is a hundred times that apart
CHECKED = 4  # of the first layer's weights: q, k, v, o


class Stack(NamedTuple):
    """What a step reads. weights: of each layer q, k, v, o, gate, up, down and its two norms."""

    x: torch.Tensor
    weights: list[list[torch.Tensor]]
    cos: torch.Tensor
    sin: torch.Tensor
    dout: torch.Tensor


def make_stack(case: LayersCase, device: str, seed: int) -> Stack:
    """Random normal inputs and weights; the same seed and device kind give the same ones."""
    import torch

    model, dtype = case.model, getattr(torch, case.dtype)
    draw = torch.Generator(device=device).manual_seed(seed)

    def normal(*shape: int, scale: float = 1.0) -> torch.Tensor:
        return (scale * torch.randn(shape, generator=draw, device=device)).to(dtype).requires_grad_()

    wide, narrow = model.heads_q * model.head_dim, model.heads_k * model.head_dim
    ends = ((wide, model.hidden), (narrow, model.hidden), (narrow, model.hidden), (model.hidden, wide))
    mlp = ((model.intermediate, model.hidden), (model.intermediate, model.hidden), (model.hidden, model.intermediate))
    weights = []
    for _ in range(model.layers):
        products = [normal(*shape, scale=shape[1] ** -0.5) for shape in (*ends, *mlp)]
        norms = [torch.ones(model.hidden, dtype=dtype, device=device, requires_grad=True) for _ in range(2)]
        weights.append(products + norms)
    half = torch.arange(0, model.head_dim, 2, device=device) / model.head_dim
    angles = torch.outer(torch.arange(case.seqlen, device=device), model.rope_theta**-half).repeat(1, 2)[:, None]
    shape = (case.batch, case.seqlen, model.hidden)
    x, dout = normal(*shape), normal(*shape).detach()
    return Stack(x, weights, angles.cos().to(dtype), angles.sin().to(dtype), dout)


def forward(case: LayersCase, stack: Stack, attention: Attention) -> torch.Tensor:
    """The output of the stack."""
    import torch
    from torch.nn.functional import linear, rms_norm, silu

    model, x = case.model, stack.x

    def turned(t: torch.Tensor) -> torch.Tensor:
        first, second = t.chunk(2, dim=-1)
        return t * stack.cos + torch.cat((-second, first), dim=-1) * stack.sin

    for q, k, v, o, gate, up, down, norm, mlp_norm in stack.weights:
        h = rms_norm(x, (model.hidden,), norm, 1e-5)
        heads = [linear(h, w).unflatten(-1, (-1, model.head_dim)) for w in (q, k, v)]
        x = x + linear(attention(turned(heads[0]), turned(heads[1]), heads[2]).flatten(-2), o)
        h = rms_norm(x, (model.hidden,), mlp_norm, 1e-5)
        x = x + linear(silu(linear(h, gate)) * linear(h, up), down)
    return x


def step(case: LayersCase, stack: Stack, attention: Attention) -> tuple[torch.Tensor, ...]:
    """The output, and the gradients of x and of all weights, layer by layer."""
    import torch

    out = forward(case, stack, attention)
    leaves = [stack.x, *[w for layer in stack.weights for w in layer]]
    return (out.detach(), *torch.autograd.grad(out, leaves, stack.dout))


def plain(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Causal attention in float32 with a matrix of scores, one sequence and key head after the other."""
    import torch
    from torch.utils.checkpoint import checkpoint

    group = q.shape[2] // k.shape[2]
    rows = torch.arange(q.shape[1], device=q.device)
    hidden = rows[:, None] < rows

    def one(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        scores = (q.float().transpose(0, 1) @ k.float().T) * q.shape[-1] ** -0.5
        return (torch.softmax(scores.masked_fill(hidden, -math.inf), -1) @ v.float()).transpose(0, 1)

    made = []
    for b in range(q.shape[0]):
        each = [
            checkpoint(one, q[b, :, h * group : (h + 1) * group], k[b, :, h], v[b, :, h], use_reentrant=False)
            for h in range(k.shape[2])
        ]
        made.append(torch.cat(each, dim=1))
    return torch.stack(made).to(q.dtype)


# ---- the attention of each library -----------------------------------------------------------------------------------


def _ours() -> Attention:
    attention = importlib.import_module("flashmoe_cupy").flash_attention
    return lambda q, k, v: attention(q, k, v, causal=True)


def _sdpa() -> Attention:
    from torch.nn.functional import scaled_dot_product_attention

    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        turned = [x.transpose(1, 2) for x in (q, k, v)]
        return scaled_dot_product_attention(*turned, is_causal=True, enable_gqa=True).transpose(1, 2)

    return attend


@cache
def _fa3() -> Attention:
    """FA3's two operators as one function that torch differentiates."""
    import torch

    operators = torch.ops.flash_attn_3

    class Function(torch.autograd.Function):  # type: ignore[misc, name-defined, unused-ignore]
        @staticmethod
        def forward(ctx: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
            out, lse = operators.fwd.default(q, k, v, is_causal=True)[:2]
            ctx.save_for_backward(q, k, v, out, lse)
            return out

        @staticmethod
        def backward(ctx: Any, dout: torch.Tensor) -> Any:
            saved = ctx.saved_tensors
            made = tuple(torch.empty_like(x) for x in saved[:3])
            operators.bwd.default(dout, *saved, *made, is_causal=True, deterministic=False)
            return made

    function: Attention = Function.apply
    return function


def _fa4() -> Attention:
    attention = importlib.import_module("flash_attn.cute.interface").flash_attn_func
    return lambda q, k, v: attention(q, k, v, causal=True)[0]


class InLayers(Library):
    """A library's attention inside of the layers. What it needs, and how its back end is chosen, its adapter says."""

    def __init__(self, name: str, attention: Callable[[], Attention]) -> None:
        self.name, self.attention, self.adapter = name, attention, BACKWARD_LIBRARIES[name]

    def missing(self, setup: Setup) -> str:
        return self.adapter.missing(setup)

    def why_not(self, case: Any, setup: Setup) -> str:  # noqa: ARG002
        return ""

    def unsupported(self, error: Exception) -> str:
        return self.adapter.unsupported(error)

    def prepare(self, case: Any, sets: Sequence[Any], setup: Setup) -> Prepared:  # noqa: ARG002
        attention = self.attention()
        scope = getattr(self.adapter, "scope", contextlib.nullcontext)
        return Prepared(lambda i: step(case, sets[i % len(sets)], attention), joined, scope=scope)


LAYER_LIBRARIES = {
    name: InLayers(name, attention)
    for name, attention in (
        (OURS, _ours),
        ("torch_cudnn", _sdpa),
        ("fa3", _fa3),
        ("fa4", _fa4),
        ("torch_sdpa", _sdpa),
    )
}


# ---- measuring -------------------------------------------------------------------------------------------------------


def joined(made: Sequence[torch.Tensor]) -> torch.Tensor:
    """The part of an answer that is checked, as one flat tensor."""
    import torch

    return torch.cat([x.flatten() for x in made[: 2 + CHECKED]])


def sizes(case: LayersCase) -> list[int]:
    """Elements of its parts: the output, the gradients of x and of q's, k's, v's and o's weights."""
    model = case.model
    wide, narrow = (heads * model.head_dim * model.hidden for heads in (model.heads_q, model.heads_k))
    return [*[case.tokens * model.hidden] * 2, wide, narrow, narrow, wide]


class LayersBench(Bench[LayersCase, Stack]):
    """The cases of LAYER_STACKS; on a processor smaller ones."""

    _truth: torch.Tensor | None = None  # of the case at hand

    def libraries(self) -> Mapping[str, Any]:
        return LAYER_LIBRARIES

    def inputs(self, case: LayersCase, seed: int) -> list[Stack]:
        return [make_stack(case, self.setup.device, seed)]

    def check(self, case: LayersCase, inputs: Stack, out: torch.Tensor) -> Check:
        import torch

        if self._truth is None:
            self._truth = joined(step(case, inputs, plain))
            self.timer.release()
        parts = zip(out.split(sizes(case)), self._truth.split(sizes(case)), strict=True)
        errors = [float((mine.float() - true.float()).norm() / true.float().norm()) for mine, true in parts]
        finite = bool(torch.isfinite(out).all())
        worst = max(errors) if finite else math.inf
        return Check(worst, worst, ERROR_LIMIT, finite)

    def poison(self, case: LayersCase) -> torch.Tensor:
        import torch

        return torch.full((sum(sizes(case)),), math.nan, dtype=getattr(torch, case.dtype), device=self.setup.device)

    def work(self, case: LayersCase, sets: Sequence[Stack]) -> dict[str, Any]:  # noqa: ARG002
        return {"tokens": case.tokens}

    def numbers(self, row: dict[str, Any], samples: list[float], middle: float) -> dict[str, Any]:
        made = super().numbers(row, samples, middle)
        return made | {"tokens_per_s": round(1e6 * row["tokens"] / made["device_us"], 1)}

    def measure(self, case: LayersCase, libraries: Sequence[str], seed: int, deadline: float) -> list[dict[str, Any]]:
        case = case if self.setup.cuda else case.made_small()
        rows = super().measure(case, libraries, seed, deadline)
        self._truth = None
        gc.collect()
        self.timer.release()
        return rows
