"""Inputs of attention's backward, its answer as one array, and the check of it against float64 maths.

An answer is one flat tensor of the case's dtype: dq, dk, dv and, of a case with sinks, dsinks, each in the case's
layout, one behind the other. So all that the measuring loop does with an output it does with them together.
"""

from __future__ import annotations

import math
import random
from typing import TYPE_CHECKING, NamedTuple

from benchmarks.attention_inputs import Check, Inputs, one_head, out_shape, scores, some
from benchmarks.cases import ERROR_LIMIT

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch

    from benchmarks.backward_cases import BackwardCase

BLOCK = 1 << 24  # pairs of a query and a key that exist at once in the check


def with_dout(case: BackwardCase, inputs: Inputs, seed: int) -> Inputs:
    """The inputs and a random normal dout in the shape of the output."""
    import torch

    draw = torch.Generator(device=inputs.q.device).manual_seed(seed + 1_000_003)
    dout = torch.randn(out_shape(case), generator=draw, device=inputs.q.device, dtype=torch.float32)
    return inputs._replace(dout=dout.to(inputs.q.dtype))


def shapes(case: BackwardCase) -> list[tuple[int, ...]]:
    """Shapes of dq, dk, dv and, of a case with sinks, dsinks in the case's layout."""
    found: list[tuple[int, ...]] = []
    dims = (case.heads_q, case.head_dim), (case.heads_k, case.head_dim), (case.heads_k, case.head_dim_v)
    for (heads, dim), seqlen in zip(dims, (case.seqlen_q, case.seqlen_k, case.seqlen_k), strict=True):
        if case.varlen:
            found.append((case.tokens_q, heads, dim))
        else:
            rows = (heads, seqlen) if case.layout == "bhsd" else (seqlen, heads)
            found.append((case.batch, *rows, dim))
    return [*found, (case.heads_q,)] if case.sinks else found


def parts(case: BackwardCase, flat: torch.Tensor) -> list[torch.Tensor]:
    """Views of a flat answer: dq, dk, dv and, of a case with sinks, dsinks."""
    wanted = shapes(case)
    pieces = flat.split([math.prod(shape) for shape in wanted])
    return [piece.view(shape) for piece, shape in zip(pieces, wanted, strict=True)]


def joined(case: BackwardCase, gradients: Sequence[torch.Tensor]) -> torch.Tensor:
    """The flat answer of gradients in the case's layout; dsinks is rounded to the case's dtype."""
    import torch

    assert [tuple(x.shape) for x in gradients] == shapes(case)
    return torch.cat([x.to(getattr(torch, case.dtype)).flatten() for x in gradients])


def poison(case: BackwardCase, device: str) -> torch.Tensor:
    """A flat answer full of NaN."""
    import torch

    size = sum(math.prod(shape) for shape in shapes(case))
    return torch.full((size,), float("nan"), dtype=getattr(torch, case.dtype), device=device)


class Part(NamedTuple):
    """Rows of one gradient in float64, (rows, dim), and the size of each: the root of the sum of its terms' squares.

    A gradient is a sum that may cancel: dq of a first causal row is 0, whatever its terms. Rounding is relative to the
    terms, so an error is measured against them. Terms that are sums themselves, products of dout and v and of dout and
    out, count by the size of theirs. Where nothing cancels that is about the norm of the row.
    """

    truth: torch.Tensor
    size: torch.Tensor


class Truth(NamedTuple):
    """Gradients of one query head: sampled rows of dq, sampled rows of its share of dk and dv, all of its dsinks."""

    dq: Part
    dk: Part
    dv: Part
    dsinks: Part


def truth_of(
    case: BackwardCase, inputs: Inputs, b: int, h: int, rows: torch.Tensor, columns: torch.Tensor, block: int = BLOCK
) -> Truth:
    """Gradients of head h of sequence b at the query rows `rows` and the key rows `columns` (both sorted, int64).

    Queries go by in blocks of `block` pairs at most: the softmax of a query needs all keys, a key row all queries.
    """
    import torch

    assert inputs.dout is not None and inputs.alibi_slopes is None and inputs.bias is None and not case.padding
    shared = h // (case.heads_q // case.heads_k)
    q, dout = one_head(case, inputs.q, b, h).double(), one_head(case, inputs.dout, b, h).double()
    k, v = one_head(case, inputs.k, b, shared).double(), one_head(case, inputs.v, b, shared).double()
    zero = torch.zeros((), dtype=torch.float64, device=q.device)
    dk, dk2, dv, dv2, dsink, dsink2 = zero, zero, zero, zero, zero, zero
    dq: list[torch.Tensor] = []
    dq2: list[torch.Tensor] = []
    scale, step = case.head_dim**-0.5, max(1, block // k.shape[0])
    for first in range(0, q.shape[0], step):
        index = torch.arange(first, min(first + step, q.shape[0]), device=q.device)
        query, gradient = q[index], dout[index]
        s = scores(case, inputs, b, h, query, k, index, q.shape[0])
        sink = s.new_full((len(index), 1), -math.inf)
        if inputs.sinks is not None:
            sink = inputs.sinks[h].double().expand(len(index), 1)
        # A query that sees nothing has only -inf, whose softmax is NaN: it takes part in no gradient.
        p = torch.softmax(torch.cat((s, sink), dim=-1), dim=-1).nan_to_num(nan=0.0)
        p, of_sink = p[:, :-1], p[:, -1]
        dp, dp_size = gradient @ v.T, (gradient.square() @ v.square().T).sqrt()
        out = p @ v
        total, total_size = ((gradient * x).sum(-1, keepdim=True) for x in (out, gradient * out.square()))
        total_size = total_size.sqrt()
        slope = p * scale
        if case.softcap:
            slope = slope * torch.where(s.isfinite(), 1 - (s / case.softcap).square(), 0.0)
        ds, ds2 = slope * (dp - total), (slope * (dp_size + total_size)).square()
        here = rows[(rows >= first) & (rows < first + step)] - first
        dq.append(ds[here] @ k)
        dq2.append(ds2[here] @ k.square().sum(-1))
        dk, dk2 = dk + ds[:, columns].T @ query, dk2 + ds2[:, columns].T @ query.square().sum(-1)
        dv, dv2 = dv + p[:, columns].T @ gradient, dv2 + p[:, columns].square().T @ gradient.square().sum(-1)
        dsink = dsink - of_sink @ total[:, 0]
        dsink2 = dsink2 + (of_sink * total_size[:, 0]).square().sum()
    return Truth(
        Part(torch.cat(dq), torch.cat(dq2).sqrt()),
        Part(dk, dk2.sqrt()),
        Part(dv, dv2.sqrt()),
        Part(dsink[None, None], dsink2.sqrt()[None]),
    )


def check(
    case: BackwardCase, inputs: Inputs, flat: torch.Tensor, seed: int = 0, heads: int = 2, rows: int = 64
) -> Check:
    """Compare a flat answer with float64 maths: sampled rows of dq, dk and dv of sampled key heads, and their dsinks.

    `heads` key heads, each of one sequence, with all query heads that share them; of each `rows` rows (both at least
    2). dsinks sums over the batch: a case with sinks takes all sequences of these heads. The error is the largest of
    the gradients', each against the size of its terms (Part). Every element must be finite, sampled or not.
    """
    import torch

    draw = random.Random(seed)
    found = parts(case, flat)
    if case.sinks:
        pairs = [(b, shared) for shared in some(range(case.heads_k), heads, draw) for b in range(case.batch)]
    else:
        pairs = some([(b, shared) for b in range(case.batch) for shared in range(case.heads_k)], heads, draw)
    group = case.heads_q // case.heads_k
    differences: dict[str, list[torch.Tensor]] = {"dq": [], "dk": [], "dv": [], "dsinks": []}
    sizes: dict[str, list[torch.Tensor]] = {name: [] for name in differences}
    sinks: dict[int, list[Part]] = {}

    def compare(name: str, answer: torch.Tensor, truth: torch.Tensor, size: torch.Tensor) -> None:
        differences[name].append((answer.double() - truth).norm(dim=-1))
        sizes[name].append(size)

    for b, shared in pairs:
        sq, sk = case.spans()[b]
        picked, keys = (torch.tensor(some(range(n), rows, draw), device=flat.device) for n in (sq, sk))
        every = [truth_of(case, inputs, b, h, picked, keys) for h in range(shared * group, shared * group + group)]
        for h, one in enumerate(every, shared * group):
            compare("dq", one_head(case, found[0], b, h)[picked], *one.dq)
            sinks.setdefault(h, []).append(one.dsinks)
        for name, answer, shares in (
            ("dk", found[1], [one.dk for one in every]),
            ("dv", found[2], [one.dv for one in every]),
        ):
            truth = torch.stack([share.truth for share in shares]).sum(0)
            compare(name, one_head(case, answer, b, shared)[keys], truth, _root(shares))
    for h, shares in sinks.items() if case.sinks else ():
        truth = torch.stack([share.truth for share in shares]).sum(0)
        compare("dsinks", found[3][h : h + 1, None], truth, _root(shares))
    errors, worst = [], []
    for name in (name for name in differences if differences[name]):
        difference, size = torch.cat(differences[name]), torch.cat(sizes[name])
        each = difference / size.clamp_min(torch.finfo(torch.float64).tiny)
        errors.append(float((difference.norm() / size.norm()).nan_to_num(nan=math.inf)))
        worst.append(float(each.nan_to_num(nan=math.inf).max()))
    return Check(max(errors), max(worst), ERROR_LIMIT[case.dtype], bool(torch.isfinite(flat).all()))


def _root(shares: Sequence[Part]) -> torch.Tensor:
    """The size of a sum of parts."""
    import torch

    return torch.stack([share.size for share in shares]).norm(dim=0)
