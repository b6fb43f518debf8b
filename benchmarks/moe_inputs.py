"""Inputs of a mixture-of-experts case, its routing, and the check of an answer in float64."""

from __future__ import annotations

import math
import random
from typing import TYPE_CHECKING, NamedTuple

from benchmarks.attention_inputs import Check
from benchmarks.cases import ERROR_LIMIT

if TYPE_CHECKING:
    import torch

    from benchmarks.moe_cases import MoECase
    from benchmarks.timing import Timer

ALPHA, LIMIT = 1.702, 7.0  # of "swigluoai"
SETS_BYTES = 20 << 30  # rotating sets of weights take no more memory than this


class MoEInputs(NamedTuple):
    """Torch tensors of one case. topk_weights (float32) and topk_ids (int32), both (T, K), follow from the logits."""

    x: torch.Tensor
    logits: torch.Tensor
    correction_bias: torch.Tensor | None
    w_gate_up: torch.Tensor
    w_down: torch.Tensor
    b_gate_up: torch.Tensor | None
    b_down: torch.Tensor | None
    topk_weights: torch.Tensor
    topk_ids: torch.Tensor


def make_inputs(case: MoECase, device: str, seed: int) -> MoEInputs:
    """Random normal inputs; the same case, device kind and seed give the same bits for every library.

    Weights are scaled so that both products have elements of about 1.
    """
    import torch

    draw = torch.Generator(device=device).manual_seed(seed)
    dtype: torch.dtype = getattr(torch, case.dtype)

    def normal(*shape: int, std: float = 1.0, dtype: torch.dtype = dtype) -> torch.Tensor:
        return torch.empty(shape, device=device, dtype=dtype).normal_(0.0, std, generator=draw)

    def weights(rows: int, columns: int) -> torch.Tensor:
        made = torch.empty(case.experts, rows, columns, device=device, dtype=dtype)
        for expert in made:  # a whole layer drawn at once would need it a second time in float32
            expert.normal_(0.0, columns**-0.5, generator=draw)
        return made

    logits = normal(case.tokens, case.experts, dtype=torch.float32)
    # A trained model's bias evens the load of experts; with 0.1 in place of 0.01 a sixth of them would get no token.
    bias = normal(case.experts, std=0.01, dtype=torch.float32) if case.correction_bias else None
    return MoEInputs(
        normal(case.tokens, case.hidden),
        logits,
        bias,
        weights(case.up_rows, case.hidden),
        weights(case.hidden, case.intermediate),
        normal(case.experts, case.up_rows) if case.biases else None,
        normal(case.experts, case.hidden) if case.biases else None,
        *route(case, logits, bias),
    )


def route(case: MoECase, logits: torch.Tensor, bias: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    """(topk_weights (T, K) float32, topk_ids (T, K) int32) of the case's router, computed in float64."""
    import torch

    x = logits.double()
    scores = torch.softmax(x, -1) if case.scoring_func == "softmax" else torch.sigmoid(x)
    choice = x if bias is None else scores + bias.double()
    if case.num_expert_group > 1:
        members = choice.view(case.tokens, case.num_expert_group, -1)
        best = members.topk(1 if bias is None else min(2, members.shape[-1]), -1).values.sum(-1)
        kept = best.sort(dim=-1, descending=True, stable=True).indices[:, : case.topk_group]
        mask = torch.ones_like(best, dtype=torch.bool).scatter_(1, kept, value=False)
        choice = members.masked_fill(mask[..., None], -math.inf).flatten(1)
    ids = choice.sort(dim=-1, descending=True, stable=True).indices[:, : case.top_k]
    weights = scores.gather(1, ids)
    if case.renormalize:
        weights = weights / weights.sum(-1, keepdim=True)
    return (weights * case.routed_scaling_factor).float(), ids.int()


def touched(inputs: MoEInputs) -> int:
    """How many experts get a token."""
    return int(inputs.topk_ids.unique().numel())


def input_sets(case: MoECase, timer: Timer, device: str, seed: int) -> list[MoEInputs]:
    """One set of inputs, or several with weights of their own whose experts together are far larger than the cache.

    A case that is measured as a graph, or for its host side, has at least two.
    """
    first = make_inputs(case, device, seed)
    used = touched(first) * case.expert_bytes()
    count = 2 if case.graph or case.for_host else 1
    if used <= 4 * timer.cache_bytes:
        count = max(count, min(32, 1 + -(-4 * timer.cache_bytes // used)))
    count = max(1, min(count, SETS_BYTES // (case.experts * case.expert_bytes())))
    return [first, *(make_inputs(case, device, seed + i) for i in range(1, count))]


def poison(case: MoECase, device: str) -> torch.Tensor:
    """An output full of NaN."""
    import torch

    shape = (case.tokens, case.hidden)
    return torch.full(shape, float("nan"), dtype=getattr(torch, case.dtype), device=device)


def activate(case: MoECase, h: torch.Tensor, interleaved: bool) -> torch.Tensor:
    """The activation of rows (..., 2n), or (..., n) where it is not gated, in the dtype of h."""
    import torch

    if case.activation == "relu2":
        return torch.relu(h).square()
    gate, up = (h[..., ::2], h[..., 1::2]) if interleaved else h.chunk(2, -1)
    if case.activation == "swiglu":
        return torch.nn.functional.silu(gate) * up
    if case.activation == "swigluoai":
        gate, up = gate.clamp(max=LIMIT), up.clamp(-LIMIT, LIMIT)
        return (up + 1) * gate * torch.sigmoid(ALPHA * gate)
    raise ValueError(f"no activation {case.activation}")


def sample(inputs: MoEInputs, count: int, seed: int) -> list[int]:
    """Tokens to check: first, last, some at random, and of three experts' tokens the first and the last.

    Those experts are the one with most tokens, the one with fewest and the last one that has any.
    """
    tokens = inputs.topk_ids.shape[0]
    picked = {0, tokens - 1, *random.Random(seed).sample(range(tokens), min(count, tokens))}
    ids, counts = inputs.topk_ids.unique(return_counts=True)
    for expert in (ids[counts.argmax()], ids[counts.argmin()], ids[-1]):
        mine = (inputs.topk_ids == expert).any(-1).nonzero()
        picked |= {int(mine[0]), int(mine[-1])}
    return sorted(picked)


def check(case: MoECase, inputs: MoEInputs, out: torch.Tensor, seed: int = 0, tokens: int = 32) -> Check:
    """Compare `out` (T, d) with float64 maths for sampled tokens.

    Every element of `out` must be finite, sampled or not: an unwritten element of a poisoned output is NaN.
    """
    import torch

    index = torch.tensor(sample(inputs, tokens, seed), device=out.device)
    ids, weights = inputs.topk_ids[index], inputs.topk_weights[index].double()
    truth = torch.zeros(len(index), case.hidden, dtype=torch.float64, device=out.device)
    for expert in ids.unique().tolist():
        row, place = (ids == expert).nonzero(as_tuple=True)
        h = inputs.x[index[row]].double() @ inputs.w_gate_up[expert].double().T
        if inputs.b_gate_up is not None:
            h = h + inputs.b_gate_up[expert].double()
        y = activate(case, h, case.interleaved) @ inputs.w_down[expert].double().T
        if inputs.b_down is not None:
            y = y + inputs.b_down[expert].double()
        truth.index_add_(0, row, weights[row, place, None] * y)
    difference, size = (out[index].double() - truth).norm(dim=-1), truth.norm(dim=-1)
    worst = (difference / size.clamp_min(torch.finfo(torch.float64).tiny)).nan_to_num(nan=math.inf).max()
    error = float(difference.norm() / size.norm())
    finite = bool(torch.isfinite(out).all())
    return Check(error if error == error else math.inf, float(worst), ERROR_LIMIT[case.dtype], finite)
