"""Inputs of the cases of attention, and the check of an answer against float64 maths on sampled rows."""

from __future__ import annotations

import math
import random
from typing import TYPE_CHECKING, NamedTuple, TypeVar

import numpy as np

from benchmarks.cases import ERROR_LIMIT, LSE_LIMIT, MASK_TILE, Case

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch

T = TypeVar("T")


class Inputs(NamedTuple):
    """Torch tensors of one case in the case's layout (packed cases: (tokens, heads, head_dim))."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    sinks: torch.Tensor | None
    alibi_slopes: torch.Tensor | None
    bias: torch.Tensor | None
    cu_seqlens: torch.Tensor | None
    seqused: torch.Tensor | None = None  # of q and k: where the rows that count end
    leftpad: torch.Tensor | None = None  # of q and k: where they begin
    dout: torch.Tensor | None = None  # of the backward: what arrives at the output


def out_shape(case: Case) -> tuple[int, ...]:
    """Shape of the output in the case's layout."""
    if case.lse:
        return case.batch, case.heads_q, case.seqlen_q
    if case.varlen:
        return case.tokens_q, case.heads_q, case.head_dim_v
    if case.layout == "bhsd":
        return case.batch, case.heads_q, case.seqlen_q, case.head_dim_v
    return case.batch, case.seqlen_q, case.heads_q, case.head_dim_v


def make_inputs(case: Case, device: str, seed: int) -> Inputs:
    """Random normal inputs; the same case, device kind and seed give the same bits for every library."""
    import torch

    draw = torch.Generator(device=device).manual_seed(seed)
    dtype: torch.dtype = getattr(torch, case.dtype)

    def normal(*shape: int, dtype: torch.dtype = dtype) -> torch.Tensor:
        return torch.randn(shape, generator=draw, device=device, dtype=torch.float32).to(dtype)

    def heads(n: int, seqlen: int, tokens: int, dim: int) -> torch.Tensor:
        if case.varlen:
            return normal(tokens, n, dim)
        return normal(case.batch, n, seqlen, dim) if case.layout == "bhsd" else normal(case.batch, seqlen, n, dim)

    q = heads(case.heads_q, case.seqlen_q, case.tokens_q, case.head_dim)
    k = heads(case.heads_k, case.seqlen_k, case.tokens_k, case.head_dim)
    v = heads(case.heads_k, case.seqlen_k, case.tokens_k, case.head_dim_v)
    slopes = [2.0 ** (-8.0 * (h + 1) / case.heads_q) for h in range(case.heads_q)]
    bias = None
    if case.bias == "bool" and case.pattern:
        bias = {"lengths": _prefixes, "tiles": _tiles}[case.pattern](case, draw)
    elif case.bias:
        bias_dtype = torch.float32 if case.bias == "float32" else dtype
        bias = normal(*case.whole_bias(), dtype=bias_dtype)
        bias = bias > -0.5 if case.bias == "bool" else bias
    ends = torch.tensor(case.used, dtype=torch.int32, device=device) if case.used else None
    cu_seqlens = None
    if case.varlen:
        ends = np.concatenate(([0], np.cumsum(case.seqlens)))
        cu_seqlens = torch.tensor(ends.tolist(), dtype=torch.int32, device=device)
    return Inputs(
        q,
        k,
        v,
        normal(case.heads_q, dtype=torch.float32) if case.sinks else None,
        torch.tensor(slopes, dtype=torch.float32, device=device) if case.alibi else None,
        bias,
        cu_seqlens,
        ends if case.padding == "right" else None,
        case.seqlen_q - ends if ends is not None and case.padding == "left" else None,
    )


def _prefixes(case: Case, draw: torch.Generator) -> torch.Tensor:
    """(batch, 1, 1, seqlen_k), True: the keys before a length between a tenth and the whole."""
    import torch

    n = case.seqlen_k
    lengths = torch.randint(-(-n // 10), n + 1, (case.batch, 1), generator=draw, device=draw.device)
    return (torch.arange(n, device=draw.device) < lengths)[:, None, None]


def _tiles(case: Case, draw: torch.Generator) -> torch.Tensor:
    """True: what is seen. Of ten tiles four are hidden, three seen, three half seen; query i sees key i in all."""
    import torch

    *lead, rows, columns = case.whole_bias()
    sizes = *lead, -(-rows // MASK_TILE), -(-columns // MASK_TILE)
    kinds = torch.rand(sizes, generator=draw, device=draw.device)
    kinds = kinds.repeat_interleave(MASK_TILE, -2)[..., :rows, :].repeat_interleave(MASK_TILE, -1)[..., :columns]
    pairs = torch.rand((*lead, rows, columns), generator=draw, device=draw.device) < 0.5
    diagonal = torch.eye(rows, columns, dtype=torch.bool, device=draw.device)
    return (kinds >= 0.7) | (kinds >= 0.4) & pairs | diagonal


class Check(NamedTuple):
    """How far an output is from the truth: over all sampled rows, and the worst row.

    Both are relative 2-norms; of a log-sum-exp the root of the mean square and the largest difference.
    """

    error: float
    error_row: float
    limit: float
    finite: bool

    @property
    def passed(self) -> bool:
        return self.finite and self.error <= self.limit and self.error_row <= 3 * self.limit


def some(population: Sequence[T], count: int, draw: random.Random) -> list[T]:
    """First, last and a random draw between them, `count` in all, which is at least 2."""
    if len(population) <= count:
        return list(population)
    between = range(1, len(population) - 1)
    return [population[0], *(population[i] for i in sorted(draw.sample(between, count - 2))), population[-1]]


def check(case: Case, inputs: Inputs, out: torch.Tensor, seed: int = 0, heads: int = 4, rows: int = 64) -> Check:
    """Compare `out` (case's layout) with float64 maths on sampled query rows of sampled heads.

    The scores of the whole problem never exist. Every element of `out` must be finite, sampled or not: an unwritten
    element of a poisoned output is NaN. Rows that do not count hold that NaN or 0. `heads` and `rows` are at least 2.
    """
    import torch

    draw = random.Random(seed)
    pairs = some([(b, h) for b in range(case.batch) for h in range(case.heads_q)], heads, draw)
    differences, sizes = [], []
    for b, h in pairs:
        shared = h // (case.heads_q // case.heads_k)
        q, o = one_head(case, inputs.q, b, h), out[b, h, :, None] if case.lse else one_head(case, out, b, h)
        k, v = one_head(case, inputs.k, b, shared), one_head(case, inputs.v, b, shared)
        picked = some(range(q.shape[0]), rows, draw)
        index = torch.tensor(picked, device=q.device, dtype=torch.int64)
        truth = _rows(case, inputs, b, h, q[index].double(), k.double(), v.double(), index, q.shape[0])
        differences.append((o[index].double() - truth).norm(dim=-1))
        sizes.append(torch.ones_like(truth[:, 0]) if case.lse else truth.norm(dim=-1))
    difference, size = torch.cat(differences), torch.cat(sizes)
    worst = (difference / size.clamp_min(torch.finfo(torch.float64).tiny)).nan_to_num(nan=math.inf).max()
    error = float(difference.norm() / size.norm())
    right = torch.isfinite(out)
    if case.padding:
        counts = torch.zeros(case.batch, case.seqlen_q, dtype=torch.bool, device=out.device)
        for b, n in enumerate(case.used):
            counts[b, case.first_row(b) : case.first_row(b) + n] = True
        counts = counts[:, None, :, None] if case.layout == "bhsd" else counts[:, :, None, None]
        right = torch.where(counts, right, out.isnan() | (out == 0))
    finite = bool(right.all())
    limit = LSE_LIMIT if case.lse else ERROR_LIMIT[case.dtype]
    return Check(error if error == error else math.inf, float(worst), limit, finite)


def one_head(case: Case, tensor: torch.Tensor, b: int, h: int) -> torch.Tensor:
    """(seqlen, head_dim): a view of one head of one sequence of a tensor in the case's layout."""
    if case.varlen:
        first = sum(case.seqlens[:b])
        return tensor[first : first + case.seqlens[b], h]
    whole = tensor[b, h] if case.layout == "bhsd" else tensor[b, :, h]
    return whole[case.first_row(b) : case.first_row(b) + case.used[b]] if case.padding else whole


def _rows(
    case: Case, inputs: Inputs, b: int, h: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, index: torch.Tensor,
    seqlen_q: int,
) -> torch.Tensor:  # fmt: skip
    import torch

    found = scores(case, inputs, b, h, q, k, index, seqlen_q)
    if inputs.sinks is not None:
        sink = inputs.sinks[h].double().expand(found.shape[0], 1)
        found = torch.cat((found, sink), dim=-1)
    if case.lse:
        return torch.logsumexp(found, dim=-1, keepdim=True)
    if inputs.sinks is not None:
        return torch.softmax(found, dim=-1)[:, :-1] @ v
    return torch.softmax(found, dim=-1).nan_to_num(nan=0.0) @ v  # a row that sees nothing gives 0


def scores(
    case: Case, inputs: Inputs, b: int, h: int, q: torch.Tensor, k: torch.Tensor, index: torch.Tensor, seqlen_q: int
) -> torch.Tensor:
    """(len(index), seqlen_k): what the softmax of head h of sequence b is of, -inf where a pair is hidden.

    q: the rows `index`, which may be any, of seqlen_q; k: all keys.
    """
    import torch

    found = q @ k.T * case.head_dim**-0.5
    if case.softcap:
        found = case.softcap * torch.tanh(found / case.softcap)
    diagonal = (index + (k.shape[0] - seqlen_q))[:, None]
    column = torch.arange(k.shape[0], device=k.device)[None, :]
    if inputs.alibi_slopes is not None:
        found = found - inputs.alibi_slopes[h].double() * (diagonal - column).abs()
    if inputs.bias is not None:
        bias = inputs.bias.expand(case.batch, case.heads_q, case.seqlen_q, case.seqlen_k)[b, h][index]
        found = found.masked_fill(~bias, -math.inf) if bias.dtype == torch.bool else found + bias.double()
    left, right = case.band()
    hidden = torch.zeros_like(found, dtype=torch.bool)
    if right >= 0:
        hidden |= column > diagonal + right
    if left >= 0:
        hidden |= column < diagonal - left
    return found.masked_fill(hidden, -math.inf)
