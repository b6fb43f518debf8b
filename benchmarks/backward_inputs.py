"""Inputs of attention's backward, its answer as one array, and the check of it against float64 maths.

An answer is one flat tensor of the case's dtype: dq, dk, dv and, of a case that has them, dsinks and dbias, each in the
case's layout, one behind the other. So all that the measuring loop does with an output it does with them together.
"""

from __future__ import annotations

import math
import random
from typing import TYPE_CHECKING, Any, NamedTuple

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
    """Shapes of dq, dk, dv and, of a case that has them, dsinks and dbias in the case's layout."""
    found: list[tuple[int, ...]] = []
    dims = (case.heads_q, case.head_dim), (case.heads_k, case.head_dim), (case.heads_k, case.head_dim_v)
    for (heads, dim), seqlen in zip(dims, (case.seqlen_q, case.seqlen_k, case.seqlen_k), strict=True):
        if case.varlen:
            found.append((case.tokens_q, heads, dim))
        else:
            rows = (heads, seqlen) if case.layout == "bhsd" else (seqlen, heads)
            found.append((case.batch, *rows, dim))
    found += [(case.heads_q,)] if case.sinks else []
    return [*found, case.whole_bias()] if case.bias else found


def parts(case: BackwardCase, flat: torch.Tensor) -> list[torch.Tensor]:
    """Views of a flat answer: dq, dk, dv and, of a case that has them, dsinks and dbias."""
    wanted = shapes(case)
    pieces = flat.split([math.prod(shape) for shape in wanted])
    return [piece.view(shape) for piece, shape in zip(pieces, wanted, strict=True)]


def joined(case: BackwardCase, gradients: Sequence[torch.Tensor]) -> torch.Tensor:
    """The flat answer of gradients in the case's layout; dsinks and dbias are rounded to the case's dtype."""
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
    """Gradients of one query head: sampled rows of dq, sampled rows of its share of dk and dv, all of its dsinks.

    dbias: its share of the sampled queries' rows of dbias; of a bias that is one row for all queries the sampled keys,
    (keys, 1). Where all keys have one value, it is (rows, 1).
    """

    dq: Part
    dk: Part
    dv: Part
    dsinks: Part
    dbias: Part | None


def truth_of(
    case: BackwardCase, inputs: Inputs, b: int, h: int, rows: torch.Tensor, columns: torch.Tensor, block: int = BLOCK
) -> Truth:
    """Gradients of head h of sequence b at the query rows `rows` and the key rows `columns` (both sorted, int64).

    Queries go by in blocks of `block` pairs at most: the softmax of a query needs all keys, a key row all queries.
    """
    import torch

    assert inputs.dout is not None and not case.padding and case.bias != "bool"
    assert not case.softcap or not (case.bias or case.alibi)
    shared = h // (case.heads_q // case.heads_k)
    q, dout = one_head(case, inputs.q, b, h).double(), one_head(case, inputs.dout, b, h).double()
    k, v = one_head(case, inputs.k, b, shared).double(), one_head(case, inputs.v, b, shared).double()
    zero = torch.zeros((), dtype=torch.float64, device=q.device)
    dk, dk2, dv, dv2, dsink, dsink2 = zero, zero, zero, zero, zero, zero
    dq: list[torch.Tensor] = []
    dq2: list[torch.Tensor] = []
    dbias: list[torch.Tensor] = []
    dbias2: list[torch.Tensor] = []
    rows_of_bias, columns_of_bias = case.whole_bias()[2:]
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
        here = rows[(rows >= first) & (rows < first + step)] - first
        for whole, change in (
            ((dbias, p * (dp - total)), (dbias2, (p * (dp_size + total_size)).square())) if case.bias else ()
        ):
            one = change.sum(-1, keepdim=True) if columns_of_bias == 1 else change
            whole.append(one.sum(0, keepdim=True) if rows_of_bias == 1 else one[here])
        slope = p * scale
        if case.softcap:
            slope = slope * torch.where(s.isfinite(), 1 - (s / case.softcap).square(), 0.0)
        ds, ds2 = slope * (dp - total), (slope * (dp_size + total_size)).square()
        dq.append(ds[here] @ k)
        dq2.append(ds2[here] @ k.square().sum(-1))
        dk, dk2 = dk + ds[:, columns].T @ query, dk2 + ds2[:, columns].T @ query.square().sum(-1)
        dv, dv2 = dv + p[:, columns].T @ gradient, dv2 + p[:, columns].square().T @ gradient.square().sum(-1)
        dsink = dsink - of_sink @ total[:, 0]
        dsink2 = dsink2 + (of_sink * total_size[:, 0]).square().sum()
    of_bias = None
    if case.bias:
        share, share2 = torch.cat(dbias), torch.cat(dbias2)
        if rows_of_bias == 1:
            share, share2 = (of_bias_row(case, x.sum(0), columns) for x in (share, share2))
        of_bias = Part(share, share2.sum(-1).sqrt())
    return Truth(
        Part(torch.cat(dq), torch.cat(dq2).sqrt()),
        Part(dk, dk2.sqrt()),
        Part(dv, dv2.sqrt()),
        Part(dsink[None, None], dsink2.sqrt()[None]),
        of_bias,
    )


def of_bias_row(case: BackwardCase, row: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
    """(keys, 1): the values of a bias's only row that stand for the key rows `columns`."""
    return (row if case.whole_bias()[3] == 1 else row[columns])[:, None]


def check(
    case: BackwardCase, inputs: Inputs, flat: torch.Tensor, seed: int = 0, heads: int = 2, rows: int = 64
) -> Check:
    """Compare a flat answer with float64 maths: sampled rows of dq, dk, dv and dbias of sampled heads, their dsinks.

    `heads` key heads, each of one sequence, with all query heads that share them; of each `rows` rows (both at least
    2). dsinks sums over the batch, dbias over the axes along which the bias is spread: such a case takes all sequences
    of these heads, or all heads of these sequences, and the same rows of all. The error is the largest of the
    gradients', each against the size of its terms (Part). Every element must be finite, sampled or not.
    """
    import torch

    draw = random.Random(seed)
    found = parts(case, flat)
    group = case.heads_q // case.heads_k
    differences: dict[str, list[torch.Tensor]] = {"dq": [], "dk": [], "dv": [], "dsinks": [], "dbias": []}
    sizes: dict[str, list[torch.Tensor]] = {name: [] for name in differences}
    sinks: dict[int, list[Part]] = {}
    biases: dict[tuple[int, int], list[Part]] = {}
    same: list[torch.Tensor] = []  # a bias's sampled rows of queries and keys

    def compare(name: str, answer: torch.Tensor, truth: torch.Tensor, size: torch.Tensor) -> None:
        differences[name].append((answer.double() - truth).norm(dim=-1))
        sizes[name].append(size)

    for b, shared in _sampled(case, heads, draw):
        picked, keys = same or [torch.tensor(some(range(n), rows, draw), device=flat.device) for n in case.spans()[b]]
        same = [picked, keys] if case.bias else []
        every = [truth_of(case, inputs, b, h, picked, keys) for h in range(shared * group, shared * group + group)]
        for h, one in enumerate(every, shared * group):
            compare("dq", one_head(case, found[0], b, h)[picked], *one.dq)
            sinks.setdefault(h, []).append(one.dsinks)
            if one.dbias is not None:
                at = b % case.whole_bias()[0], h % case.whole_bias()[1]  # 0 of an axis along which it is spread
                biases.setdefault(at, []).append(one.dbias)
        for name, answer, shares in (
            ("dk", found[1], [one.dk for one in every]),
            ("dv", found[2], [one.dv for one in every]),
        ):
            truth = torch.stack([share.truth for share in shares]).sum(0)
            compare(name, one_head(case, answer, b, shared)[keys], truth, _root(shares))
    for h, shares in sinks.items() if case.sinks else ():
        truth = torch.stack([share.truth for share in shares]).sum(0)
        compare("dsinks", found[3][h : h + 1, None], truth, _root(shares))
    for at, shares in biases.items():
        answer = of_bias_row(case, found[-1][at][0], keys) if case.whole_bias()[2] == 1 else found[-1][at][picked]
        compare("dbias", answer, torch.stack([share.truth for share in shares]).sum(0), _root(shares))
    errors, worst = [], []
    for name in (name for name in differences if differences[name]):
        difference, size = torch.cat(differences[name]), torch.cat(sizes[name])
        each = difference / size.clamp_min(torch.finfo(torch.float64).tiny)
        errors.append(float((difference.norm() / size.norm()).nan_to_num(nan=math.inf)))
        worst.append(float(each.nan_to_num(nan=math.inf).max()))
    return Check(max(errors), max(worst), ERROR_LIMIT[case.dtype], bool(torch.isfinite(flat).all()))


def _sampled(case: BackwardCase, heads: int, draw: random.Random) -> list[tuple[int, int]]:
    """Sequences and key heads to compare, and with each all that a gradient sums over."""
    sequences, shared = range(case.batch), range(case.heads_k)
    of_bias = case.whole_bias() if case.bias else (case.batch, case.heads_q)
    if of_bias[1] == 1 < case.heads_q:
        whole = case.sinks or of_bias[0] == 1
        return [(b, h) for b in (sequences if whole else some(sequences, heads, draw)) for h in shared]
    if case.sinks or of_bias[0] == 1 < case.batch:
        return [(b, h) for h in some(shared, heads, draw) for b in sequences]
    return some([(b, h) for b in sequences for h in shared], heads, draw)


def cast_bias(case: BackwardCase, sets: Sequence[Inputs]) -> tuple[list[Inputs], dict[str, Any]]:
    """For libraries that want a bias in q's dtype: inputs with such a one, and what their Prepared says of a cast.

    Its answer is checked against the gradients of the bias that it was given.
    """
    given = [one if one.bias is None else one._replace(bias=one.bias.to(one.q.dtype)) for one in sets]
    if case.bias in ("", "same"):
        return given, {}
    return given, {
        "check": lambda out: check(case, given[0], out),
        "note": f"its bias was cast to {case.dtype} before the clock started",
    }


def _root(shares: Sequence[Part]) -> torch.Tensor:
    """The size of a sum of parts."""
    import torch

    return torch.stack([share.size for share in shares]).norm(dim=0)
