"""Mixture of experts on the CPU: routing without loops over tokens, matrix products by BLAS in float32.

Sources: softmax, top-k and losses as in Switch (Fedus et al., arXiv 2101.03961) and ST-MoE (Zoph et al., arXiv
2202.08906); sigmoid scores, bias and groups as in DeepSeek-V3 (arXiv 2412.19437). Tokens go in blocks and weights are
widened to float32 in blocks, so memory beyond the arguments is some tens of MB whatever the sizes. The weights of an
expert without tokens are never read. The router's blocks of tokens go to threads; the products have those of BLAS.
"""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from flashmoe_cupy.cpu import threads
from flashmoe_cupy.cpu.activation import activate
from flashmoe_cupy.cpu.convert import widened
from flashmoe_cupy.cpu.offsets import repair, warn
from flashmoe_cupy.errors import FlashMoEError, UnsupportedProblem

if TYPE_CHECKING:
    from flashmoe_cupy.plan.moe.problem import GroupedGemmProblem, MoEProblem
    from flashmoe_cupy.plan.moe.routing import RouteProblem

Array = NDArray[Any]
F32 = NDArray[np.float32]
I32 = NDArray[np.int32]

# Elements of arrays that exist at one time.
_SCORES = 1 << 16  # of the router, for a block of tokens: 256 KB; with smaller blocks threads wait for each other
_ROWS = 1 << 22  # of the widest intermediate result, for some rows of an expert: 16 MB
_WEIGHTS = 1 << 20  # of weights in float32: 4 MB
_RESULTS = 1 << 24  # of the experts' results before they are summed, for a block of tokens

_ONE_THREAD = 1 << 16  # scores of a router, up to which one thread is done before a second one is awake
_FLOAT_MAX = np.finfo(np.float32).max


# ------------------------------------------------------------------------------------------------------------- routing


def route(
    problem: RouteProblem, logits: Array, bias: Array | None, topk_weights: F32, topk_ids: I32
) -> tuple[I32, I32, F32, F32] | None:
    """Write the experts of each token and their weights; returns the statistics if the problem asks for them.

    logits (T, E) in any float dtype with any strides; bias (E,). topk_weights, topk_ids: (T, K), both overwritten.
    The statistics: expert_counts (E,), dropped (E,), load_balancing_loss (), z_loss ().
    """
    p = problem
    shift = None if bias is None else bias.astype(np.float32)
    tokens_at_once = max(1, _SCORES // p.num_experts)
    parts: list[tuple[NDArray[np.float64], float]] = [(np.zeros(p.num_experts), 0.0)] * -(-p.tokens // tokens_at_once)

    def block(place: int) -> None:
        rows = slice(place * tokens_at_once, min((place + 1) * tokens_at_once, p.tokens))
        found = _route_block(p, widened(logits[rows]), shift, topk_weights[rows], topk_ids[rows])
        if found is not None:
            parts[place] = found

    threads.each(lambda: block, range(len(parts)), one_thread=p.tokens * p.num_experts < _ONE_THREAD)
    probabilities, squares = np.zeros(p.num_experts), 0.0
    for part in parts if p.return_stats else ():  # in one order, whichever thread was first
        probabilities += part[0]
        squares += part[1]
    routed = np.bincount(topk_ids.ravel(), minlength=p.num_experts)
    if p.capacity >= 0:
        _drop(p.capacity, routed, topk_weights, topk_ids)
    if not p.return_stats:
        return None
    kept = routed if p.capacity < 0 else np.minimum(routed, p.capacity)
    tokens = max(p.tokens, 1)
    balance = p.num_experts * float((routed / tokens * (probabilities / tokens)).sum())
    counts = kept.astype(np.int32), (routed - kept).astype(np.int32)
    with np.errstate(over="ignore"):  # the square of a logit beyond 1e19 is infinite in float32
        return *counts, np.array(balance, np.float32), np.array(squares / tokens).astype(np.float32)


def _route_block(
    p: RouteProblem, x: F32, shift: F32 | None, topk_weights: F32, topk_ids: I32
) -> tuple[NDArray[np.float64], float] | None:
    """Write experts and weights of some tokens, whose logits x are overwritten; for statistics, the two sums."""
    np.copyto(x, -_FLOAT_MAX, where=np.isnan(x))
    np.clip(x, -_FLOAT_MAX, _FLOAT_MAX, out=x)
    # Weights that are a softmax of the chosen logits need no scores of the others.
    chosen_only = p.renormalize and p.scoring_func == "softmax" and shift is None and not p.return_stats
    scores = x if chosen_only else _scores(p.scoring_func, x)
    # The scores rise with the logits, and where they underflow to one value only the logits tell the order.
    choice = x if shift is None else scores + shift
    ids = _choose(p, choice, with_bias=shift is not None)
    topk_ids[...] = ids
    topk_weights[...] = _weights(p, x, scores, ids)
    if not p.return_stats:
        return None
    share = scores if p.scoring_func == "softmax" else scores / (scores.sum(1, keepdims=True) + _TINY)
    top = x.max(axis=1)
    squares = np.square(top + np.log(np.exp(x - top[:, None]).sum(axis=1))).sum(dtype=np.float64)
    return share.sum(axis=0, dtype=np.float64), float(squares)


_TINY = np.float32(1e-20)  # is added to a sum of weights, which may underflow to 0, as in DeepSeek-V3's own code


def _scores(name: str, x: F32) -> F32:
    """p of finite logits, without overflow."""
    if name == "softmax":
        return _softmax(x)
    e = np.exp(-np.abs(x))
    if name == "sigmoid":
        scores: F32 = np.where(x >= 0, np.float32(1.0), e) / (e + 1)
    else:
        scores = np.sqrt(np.maximum(x, 0) + np.log1p(e))
    return scores


def _softmax(x: F32) -> F32:
    e: F32 = x - x.max(axis=1, keepdims=True)
    np.exp(e, out=e)
    e /= e.sum(axis=1, keepdims=True)
    return e


def _best(choice: F32, k: int) -> NDArray[np.intp]:
    """(rows, k) places of the largest in each row, best first, among equals the first; a NaN is smaller than all.

    A number and its place make one integer, so that NumPy's fast ways, which are not stable, give the stable order.
    """
    bits = np.subtract(np.float32(0.0), choice).view(np.int32)  # ascending; 0 - 0 and 0 - -0 are both +0
    np.copyto(bits, _NAN, where=np.isnan(choice))  # the sign of a NaN says nothing
    bits ^= (bits >> 31) & 0x7FFFFFFF  # negative floats fall as their bits rise
    keys = bits.astype(np.int64)
    keys <<= 32
    keys |= np.arange(choice.shape[1])
    if k < choice.shape[1]:
        keys = np.partition(keys, k - 1, axis=1)[:, :k]
    return np.sort(keys, axis=1) & 0xFFFFFFFF


_NAN = 0x7FC00000  # the bits of a NaN; as an integer larger than those of infinity


def _choose(p: RouteProblem, choice: F32, with_bias: bool) -> NDArray[np.intp]:
    """(rows, K) experts with the largest choice, best first; a stable sort gives ties to the lower one."""
    if p.topk_group == p.num_expert_group:
        return _best(choice, p.top_k)
    size = p.num_experts // p.num_expert_group
    grouped = choice.reshape(len(choice), p.num_expert_group, size)
    if with_bias and size > 1:
        best = np.partition(grouped, size - 2, axis=2)[:, :, -2:].sum(axis=2)
    else:
        best = grouped.max(axis=2)
    groups = np.sort(_best(best, p.topk_group), axis=1)
    # Only the kept groups are sorted: a mask of -inf would tie with experts whose own bias is -inf.
    members = (groups[:, :, None] * size + np.arange(size)).reshape(len(choice), -1)
    order = _best(np.take_along_axis(choice, members, axis=1), p.top_k)
    return np.take_along_axis(members, order, axis=1)


def _weights(p: RouteProblem, x: F32, scores: F32, ids: NDArray[np.intp]) -> F32:
    if p.renormalize and p.scoring_func == "softmax":
        weights = _softmax(np.take_along_axis(x, ids, axis=1))
    else:
        weights = np.take_along_axis(scores, ids, axis=1)
        if p.renormalize:
            weights /= weights.sum(axis=1, keepdims=True) + _TINY
    weights *= np.float32(p.routed_scaling_factor)
    return weights


def _drop(capacity: int, routed: NDArray[np.intp], topk_weights: F32, topk_ids: I32) -> None:
    """Take the assignments beyond `capacity` of each expert away, the last ones first."""
    flat = topk_ids.reshape(-1)  # a view: the results are contiguous
    order = np.argsort(flat, kind="stable")
    rank = np.arange(flat.size) - np.repeat(np.cumsum(routed) - routed, routed)  # place among those of the same expert
    beyond = order[rank >= capacity]
    topk_weights.reshape(-1)[beyond] = 0.0
    flat[beyond] = -1


def check_ids(ids: Array, limit: int) -> None:
    """Raises FlashMoEError for the first id that is neither an expert nor a mark of an empty place, -1 or `limit`."""
    wrong = np.argwhere((ids < -1) | (ids > limit))
    if len(wrong):
        t, k = wrong[0].tolist()
        where = f"topk_ids[{t}, {k}] is {int(ids[t, k])}"
        raise FlashMoEError(f"{where}: ids go from 0 to {limit - 1}, and -1 or {limit} mark an empty place")


def check_no_nan(name: str, values: Array) -> None:
    """Raises FlashMoEError that names the first NaN of what the router is given."""
    wrong = np.argwhere(np.isnan(values))
    if len(wrong):
        place = wrong[0].tolist()
        row = f", one of {len(np.unique(wrong[:, 0]))} rows of {len(values)} with NaN" if len(place) == 2 else ""
        raise FlashMoEError(f"{name}[{', '.join(map(str, place))}] is NaN{row}")


def permute(topk_ids: Array, num_experts: int, expert_map: Array | None) -> tuple[I32, I32, I32]:
    """offsets (E + 1,), sorted_indices (T * K,) and inverse_indices (T, K) of ids (T, K) of any values."""
    flat = topk_ids.reshape(-1)
    limit = num_experts if expert_map is None else len(expert_map)
    inside = (flat >= 0) & (flat < limit)
    place = np.where(inside, flat, 0)
    if expert_map is not None and limit:
        place = expert_map[place]
        inside &= (place >= 0) & (place < num_experts)
    # Skipped assignments come last. NumPy sorts 16-bit integers by their digits, which is ten times faster.
    place = np.where(inside, place, num_experts).astype(np.uint16 if num_experts < 1 << 16 else np.int64)
    order = np.argsort(place, kind="stable")
    counts = np.bincount(place, minlength=num_experts + 1)
    offsets = np.zeros(num_experts + 1, np.int32)
    np.cumsum(counts[:num_experts], out=offsets[1:])
    kept = int(offsets[-1])
    sorted_indices = np.full(flat.size, -1, np.int32)
    sorted_indices[:kept] = order[:kept]
    inverse = np.full(flat.size, -1, np.int32)
    inverse[order[:kept]] = np.arange(kept)
    return offsets, sorted_indices, inverse.reshape(topk_ids.shape)


# ------------------------------------------------------------------------------------------------------------ products


def grouped_gemm(
    problem: GroupedGemmProblem,
    x: Array,
    w: Array,
    out: Array,
    offsets: Array | None = None,
    group_sizes: Array | None = None,
    gather_indices: Array | None = None,
    bias: Array | None = None,
) -> None:
    """Write x @ w[e]^T (+ bias[e]) of each group into out; rows of no group are not touched.

    Axes as in the public function. Raises UnsupportedProblem for offsets or sizes that do not fit the arrays.
    """
    p = problem
    spans = _spans(p, offsets, group_sizes)
    with np.errstate(all="ignore"):
        rows_at_once = max(1, _ROWS // max(p.d, p.n))
        for e, (first, last) in enumerate(spans):
            source, target = (x[e], out[e]) if p.masked else (x, out)
            for i in range(first, last, rows_at_once):
                rows = slice(i, min(i + rows_at_once, last))
                if gather_indices is None:
                    block = widened(source[rows])
                else:
                    index = gather_indices[rows]
                    there = (index >= 0) & (index < p.x_rows)
                    block = np.zeros((len(index), p.d), np.float32)
                    block[there] = source[index[there]]
                target[rows] = _linear(block, w[e], None if bias is None else bias[e])


def _spans(p: GroupedGemmProblem, offsets: Array | None, group_sizes: Array | None) -> list[tuple[int, int]]:
    """First and last + 1 row of each group. The lists are in host memory here, so they are checked."""
    if group_sizes is not None:
        sizes: list[int] = group_sizes.tolist()
        if not all(0 <= size <= p.rows for size in sizes):
            reason = f"group_sizes must lie between 0 and {p.rows}, the rows that each expert has"
            raise UnsupportedProblem(p.describe(), [reason], "group_sizes counts the first rows of each expert")
        return [(0, size) for size in sizes]
    ends: list[int] = [] if offsets is None else offsets.tolist()
    if not ends or ends[0] < 0 or ends[-1] > p.rows or any(a > b for a, b in itertools.pairwise(ends)):
        reason = f"offsets must not fall and must lie between 0 and {p.rows}, the rows of out"
        said = f"offsets are the running sums of the groups' rows, from 0{repair(ends, p.rows)}"
        raise UnsupportedProblem(p.describe(), [reason], said)
    warn("offsets", ends, p.rows)
    return list(itertools.pairwise(ends))


def _linear(x: F32, w: Array, bias: Array | None, row_by_row: bool = False) -> F32:
    """x @ w^T + bias in float32, w in blocks. row_by_row: BLAS never sees how many rows there are."""
    rows, depth = x.shape
    out = np.empty((rows, len(w)), np.float32)
    columns_at_once = max(1, _WEIGHTS // depth)
    for j in range(0, len(w), columns_at_once):
        block = w[j : j + columns_at_once]
        if block.dtype != np.float32 or block.strides[1] != 4 or block.strides[0] < 4 * depth:
            block = widened(block)  # also what BLAS would not read in place
        if row_by_row:
            for i in range(rows):
                out[i, j : j + columns_at_once] = block @ x[i]
        else:
            out[:, j : j + columns_at_once] = x @ block.T
    if bias is not None:
        out += bias.astype(np.float32)
    return out


# ------------------------------------------------------------------------------------------------------------- experts


class _Expert(NamedTuple):
    """The weights of one expert: (2n or n, d) and (d, n), with their biases."""

    w_gate_up: Array
    w_down: Array
    b_gate_up: Array | None = None
    b_down: Array | None = None


def fused_moe(
    problem: MoEProblem,
    x: Array,
    w_gate_up: Array,
    w_down: Array,
    topk_weights: Array,
    topk_ids: Array,
    out: Array,
    b_gate_up: Array | None = None,
    b_down: Array | None = None,
    expert_map: Array | None = None,
    shared_w_gate_up: Array | None = None,
    shared_w_down: Array | None = None,
    shared_gate: Array | None = None,
) -> None:
    """Write the weighted sum of each token's experts, and of the shared expert, into out (T, d).

    Axes as in the public function. Rounding: products in float32; the activation, the result of an expert and the sum
    are rounded to x's dtype. Nothing of a token depends on the others when problem.batch_invariant.
    """
    p = problem
    shared = None
    if shared_w_gate_up is not None and shared_w_down is not None:
        shared = _Expert(shared_w_gate_up, shared_w_down)
    tokens_at_once = max(1, _RESULTS // (p.top_k * p.hidden))
    with np.errstate(all="ignore"):
        for i in range(0, p.tokens, tokens_at_once):
            rows = slice(i, min(i + tokens_at_once, p.tokens))
            offsets, order, inverse = permute(topk_ids[rows], p.num_experts, expert_map)
            weights = np.where(inverse >= 0, topk_weights[rows].astype(np.float32), np.float32(0.0))
            y = np.zeros((weights.size, p.hidden), x.dtype)
            for e in np.flatnonzero(np.diff(offsets)).tolist():
                parts = [None if b is None else b[e] for b in (b_gate_up, b_down)]
                expert, mine = _Expert(w_gate_up[e], w_down[e], *parts), order[offsets[e] : offsets[e + 1]]
                factors = weights.reshape(-1)[mine] if p.weight_on_input else None
                _pass(p, expert, x[rows], mine // p.top_k, factors, y, mine)
            y = y.reshape(*weights.shape, p.hidden)
            total = np.zeros((len(weights), p.hidden), np.float32)
            for k in range(p.top_k):
                part = y[:, k].astype(np.float32)
                total += part if p.weight_on_input else weights[:, k, None] * part
            if shared is not None:
                total += _shared(p, shared, x[rows], None if shared_gate is None else shared_gate[rows])
            out[rows] = total


def _shared(p: MoEProblem, expert: _Expert, x: Array, gate: Array | None) -> F32:
    every = np.arange(len(x))
    y = np.empty((len(x), p.hidden), x.dtype)
    _pass(p, expert, x, every, None, y, every)
    wide = y.astype(np.float32)
    if gate is not None:
        wide *= gate.reshape(-1, 1).astype(np.float32)
    return wide


def _pass(
    p: MoEProblem, expert: _Expert, x: Array, tokens: Array, factors: F32 | None, y: Array, places: Array
) -> None:
    """Send x[tokens], times factors if given, through an expert and write the results to y[places]."""
    rows_at_once = max(1, _ROWS // max(len(expert.w_gate_up), p.hidden))
    for i in range(0, len(tokens), rows_at_once):
        part = slice(i, i + rows_at_once)
        rows = widened(x[tokens[part]])
        if factors is not None:
            rows *= factors[part, None]
        h = _linear(rows, expert.w_gate_up, expert.b_gate_up, p.batch_invariant)
        a = widened(activate(p.activation, h, p.interleaved, p.swiglu_alpha, p.swiglu_limit).astype(x.dtype))
        y[places[part]] = _linear(a, expert.w_down, expert.b_down, p.batch_invariant)
