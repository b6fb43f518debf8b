"""Dispatch, grouped matrix product and the experts of a layer in float64 NumPy.

T tokens, d hidden size, n intermediate size of an expert, E experts, K experts a token, e = topk_ids[t, k]:

    h[t,k] = W_gate_up[e] x[t] + b_gate_up[e]
    y[t,k] = W_down[e] activation(h[t,k]) + b_down[e]
    out[t] = sum_k topk_weights[t,k] y[t,k]  +  shared_gate[t] * (shared expert of x[t])

An assignment that is skipped (a sentinel, an expert that lives elsewhere) takes part in no sum: what an unused expert's
weights hold does not matter, NaN included.
"""

from __future__ import annotations

import itertools
import math
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from flashmoe_cupy.reference.router import AnyArray, Array, Ids, f64, need, sigmoid

GATED = ("swiglu", "geglu", "geglu_tanh", "swigluoai")
PLAIN = ("gelu", "gelu_tanh", "relu", "relu2")


class MoEPermutation(NamedTuple):
    """Assignments sorted by expert, int32: offsets (E + 1,), sorted_indices (T * K,), inverse_indices (T, K)."""

    offsets: Ids
    sorted_indices: Ids
    inverse_indices: Ids


# -------------------------------------------------------------------------------------------------------------- experts


def _gelu(x: Array) -> Array:
    """x * Phi(x), arXiv 1606.08415; Phi by erfc, so that the far negative side keeps its digits."""
    phi = np.array([0.5 * math.erfc(-v / math.sqrt(2.0)) for v in x.ravel()]).reshape(x.shape)
    y: Array = x * phi
    return y


def _gelu_tanh(x: Array) -> Array:
    """The usual approximation of x * Phi(x), arXiv 1606.08415."""
    y: Array = 0.5 * x * (1.0 + np.tanh(math.sqrt(2.0 / math.pi) * (x + 0.044715 * x**3)))
    return y


class _Rules(NamedTuple):
    """What is the same for all experts of a call."""

    activation: str
    interleaved: bool
    alpha: float | None
    limit: float | None


class _Expert(NamedTuple):
    """One expert in float64: w_gate_up (2n, d), or (n, d) without gate, w_down (d, n), and biases of their rows."""

    w_gate_up: Array
    w_down: Array
    b_gate_up: Array | None
    b_down: Array | None


def _gate_and_up(h: Array, rules: _Rules) -> tuple[Array, Array]:
    """The two halves of h (rows, 2n), each (rows, n)."""
    if rules.interleaved:
        return h[:, 0::2], h[:, 1::2]
    n = h.shape[1] // 2
    return h[:, :n], h[:, n:]


def _activate(h: Array, rules: _Rules) -> Array:
    """a (rows, n) of h (rows, 2n) where gated, else of h (rows, n)."""
    if rules.activation == "gelu":
        return _gelu(h)
    if rules.activation == "gelu_tanh":
        return _gelu_tanh(h)
    if rules.activation == "relu":
        return np.maximum(h, 0.0)
    if rules.activation == "relu2":
        return np.maximum(h, 0.0) ** 2
    gate, up = _gate_and_up(h, rules)
    if rules.activation == "geglu":
        return _gelu(gate) * up
    if rules.activation == "geglu_tanh":
        return _gelu_tanh(gate) * up
    if rules.limit is not None:
        gate = np.minimum(gate, rules.limit)  # the gate has no lower limit
        up = np.clip(up, -rules.limit, rules.limit)
    if rules.alpha is None:
        return gate * sigmoid(gate) * up
    return (up + 1.0) * gate * sigmoid(rules.alpha * gate)


def _expert_forward(x: Array, expert: _Expert, rules: _Rules) -> Array:
    """y (rows, d) of x (rows, d) through one expert."""
    h = x @ expert.w_gate_up.T
    if expert.b_gate_up is not None:
        h = h + expert.b_gate_up
    y = _activate(h, rules) @ expert.w_down.T
    return y if expert.b_down is None else y + expert.b_down


# ------------------------------------------------------------------------------------------------------------ arguments


def _local(topk_ids: AnyArray, num_experts: int, expert_map: AnyArray | None) -> NDArray[np.int64]:
    """(T, K): the local expert of each assignment, -1 where it is skipped."""
    ids = np.asarray(topk_ids).astype(np.int64)
    need(ids.ndim == 2, f"topk_ids must be (T, K), got {ids.shape}")
    if expert_map is not None:
        need(np.ndim(expert_map) == 1, f"expert_map must be (num_global,), got {np.shape(expert_map)}")
        table = np.append(np.asarray(expert_map).astype(np.int64), -1)  # ids outside of the map read its last entry, -1
        ids = table[np.where((ids >= 0) & (ids < len(table) - 1), ids, -1)]
    return np.where((ids >= 0) & (ids < num_experts), ids, -1)


def _check_expert(w_gate_up: AnyArray, w_down: AnyArray, d: int, rules: _Rules, lead: tuple[int, ...]) -> None:
    """The weights of the experts (lead = (E,)) or of the shared one (lead = ()) fit x (T, d)."""
    n = w_down.shape[-1]
    rows = 2 * n if rules.activation in GATED else n
    text = f"weights of shape {w_gate_up.shape} and {w_down.shape}; {rules.activation} with d = {d} and n = {n} needs "
    text += f"{(*lead, rows, d)} and {(*lead, d, n)}"
    need(w_gate_up.shape == (*lead, rows, d) and w_down.shape == (*lead, d, n), text)


# --------------------------------------------------------------------------------------------------------------- public


def moe_permute(topk_ids: AnyArray, *, num_experts: int, expert_map: AnyArray | None = None) -> MoEPermutation:
    """The assignments of topk_ids (T, K), flat index t * K + k, sorted by expert; those of one expert keep their order.

    Ids outside of [0, num_experts) are skipped. expert_map (num_global,) turns the ids, then global ones, into local
    ones, -1 for an expert that is not here. Expert e owns sorted_indices[offsets[e]:offsets[e + 1]]; the tail behind
    offsets[-1] holds -1. inverse_indices holds each assignment's position in sorted_indices, -1 if it is skipped.
    """
    local = _local(topk_ids, num_experts, expert_map)
    members = [np.flatnonzero(local.ravel() == e) for e in range(num_experts)]
    offsets = np.cumsum([0, *(len(m) for m in members)])
    sorted_indices = np.full(local.size, -1)
    inverse = np.full(local.size, -1)
    for e, flat in enumerate(members):
        sorted_indices[offsets[e] : offsets[e + 1]] = flat
        inverse[flat] = np.arange(offsets[e], offsets[e + 1])
    return MoEPermutation(*(a.astype(np.int32) for a in (offsets, sorted_indices, inverse.reshape(local.shape))))


@np.errstate(all="ignore")
def grouped_gemm(
    x: AnyArray,
    w: AnyArray,
    *,
    offsets: AnyArray | None = None,
    group_sizes: AnyArray | None = None,
    gather_indices: AnyArray | None = None,
    bias: AnyArray | None = None,
    out: AnyArray | None = None,
) -> Any:
    """One matrix product for each group of rows, out[r] = x[r] @ w[e].T + bias[e], with w (E, n, d) and bias (E, n).

    Either x (rows, d) and offsets (E + 1,): group e has the rows offsets[e]:offsets[e + 1] of out (rows, n), and with
    gather_indices (rows,) row r reads x[gather_indices[r]], zeros where that is no row of x. Or x (E, max_rows, d) and
    group_sizes (E,): group e has the first group_sizes[e] rows of x[e]. Rows of no group are 0, or untouched in a
    given out. Returns float64, or out in its dtype. Raises ValueError for what does not fit.
    """
    x, w = np.asarray(x), f64(w)
    need((offsets is None) != (group_sizes is None), "give either offsets or group_sizes")
    need(w.ndim == 3 and x.ndim in (2, 3) and x.shape[-1] == w.shape[2], f"x {x.shape} and w {w.shape} do not fit")
    experts, n, d = w.shape
    need(bias is None or np.shape(bias) == (experts, n), f"bias must be ({experts}, {n})")
    if offsets is not None:
        need(x.ndim == 2, f"offsets are for x (rows, d), got {x.shape}")
        rows = np.arange(len(x)) if gather_indices is None else np.asarray(gather_indices).astype(np.int64)
        ends = [int(end) for end in np.asarray(offsets)]
        rising = all(a <= b for a, b in itertools.pairwise([0, *ends, len(rows)]))
        need(len(ends) == experts + 1 and rising, f"offsets must be {experts + 1} that rise to <= {len(rows)}: {ends}")
        groups: list[Any] = [slice(a, b) for a, b in itertools.pairwise(ends)]
        source = np.append(f64(x), np.zeros((1, d)), axis=0)[np.where((rows >= 0) & (rows < len(x)), rows, -1)]
    else:
        sizes = [int(size) for size in np.asarray(group_sizes)]
        need(gather_indices is None, "gather_indices go with offsets")
        need(x.ndim == 3 and len(x) == len(sizes) == experts, f"group_sizes are for x ({experts}, max_rows, d)")
        need(all(0 <= size <= x.shape[1] for size in sizes), f"group_sizes must lie in [0, {x.shape[1]}]: {sizes}")
        groups = [(e, slice(size)) for e, size in enumerate(sizes)]
        source = f64(x)
    out = np.zeros((*source.shape[:-1], n)) if out is None else out
    need(out.shape == (*source.shape[:-1], n), f"out must be {(*source.shape[:-1], n)}, got {out.shape}")
    for e, group in enumerate(groups):
        product = source[group] @ w[e].T
        out[group] = product if bias is None else product + f64(bias[e])
    return out


@np.errstate(all="ignore")
def fused_moe(
    x: AnyArray,
    w_gate_up: AnyArray,
    w_down: AnyArray,
    topk_weights: AnyArray,
    topk_ids: AnyArray,
    *,
    activation: str = "swiglu",
    b_gate_up: AnyArray | None = None,
    b_down: AnyArray | None = None,
    interleaved: bool = False,
    swiglu_alpha: float | None = None,
    swiglu_limit: float | None = None,
    expert_map: AnyArray | None = None,
    apply_router_weight_on_input: bool = False,
    shared_w_gate_up: AnyArray | None = None,
    shared_w_down: AnyArray | None = None,
    shared_gate: AnyArray | None = None,
    batch_invariant: bool = False,  # noqa: ARG001
    out: AnyArray | None = None,
) -> Any:
    """The experts' part of a layer on x (T, d), with no rounding between the steps; out (T, d) float64.

    w_gate_up (E, 2n, d), rows gate then up, or g0, u0, g1, u1, ... if interleaved; (E, n, d) for an activation that is
    not gated. With swiglu_limit, gates of "swiglu" and "swigluoai" are at most the limit and up values within +-limit;
    swiglu_alpha is of "swigluoai" only. w_down (E, d, n), b_gate_up (E, 2n) or (E, n), b_down (E, d). topk_weights and
    topk_ids (T, K); an id outside of [0, E), after expert_map where given, contributes 0; one expert twice counts
    twice. The router's weight multiplies the expert's result, or its input with apply_router_weight_on_input. The
    shared expert, shared_w_gate_up (2s, d) and shared_w_down (d, s), sees every token with weight 1 or shared_gate (T,)
    or (T, 1). batch_invariant is a matter of rounding and changes nothing here. A given out is overwritten and returned
    in its dtype. Raises ValueError for what does not fit.
    """
    need(activation in (*GATED, *PLAIN), f"activation must be one of {(*GATED, *PLAIN)}, got {activation!r}")
    need(activation in GATED or not interleaved, f"interleaved needs a gate, which {activation} has not")
    oai = activation == "swigluoai"
    need(oai or swiglu_alpha is None, f"swiglu_alpha is of swigluoai, not of {activation}")
    need(oai or activation == "swiglu" or swiglu_limit is None, f"swiglu_limit clamps nothing in {activation}")
    if oai:
        swiglu_alpha = 1.702 if swiglu_alpha is None else swiglu_alpha
        swiglu_limit = 7.0 if swiglu_limit is None else swiglu_limit
    rules = _Rules(activation, interleaved, swiglu_alpha, swiglu_limit)
    x = f64(x)
    need(x.ndim == 2, f"x must be (T, d), got {x.shape}")
    experts, (tokens, d) = len(w_gate_up), x.shape
    _check_expert(w_gate_up, w_down, d, rules, (experts,))
    need(b_gate_up is None or b_gate_up.shape == w_gate_up.shape[:2], f"b_gate_up must be {w_gate_up.shape[:2]}")
    need(b_down is None or b_down.shape == (experts, d), f"b_down must be {(experts, d)}")
    ids, weights = _local(topk_ids, experts, expert_map), f64(topk_weights)
    fits = ids.shape == weights.shape and len(ids) == tokens
    need(fits, f"topk_weights {weights.shape} and topk_ids {ids.shape} must be (T, K) with T = {tokens}")

    result = np.zeros_like(x)
    for e in range(experts):
        token, slot = np.nonzero(ids == e)
        if not len(token):
            continue
        expert = _Expert(
            w_gate_up=f64(w_gate_up[e]),
            w_down=f64(w_down[e]),
            b_gate_up=None if b_gate_up is None else f64(b_gate_up[e]),
            b_down=None if b_down is None else f64(b_down[e]),
        )
        weight = weights[token, slot, None]
        if apply_router_weight_on_input:
            y = _expert_forward(weight * x[token], expert, rules)
        else:
            y = weight * _expert_forward(x[token], expert, rules)
        np.add.at(result, token, y)  # not +=: the token may be there more than once

    need((shared_w_gate_up is None) == (shared_w_down is None), "shared_w_gate_up and shared_w_down go together")
    need(shared_gate is None or shared_w_down is not None, "shared_gate goes with a shared expert")
    if shared_w_gate_up is not None and shared_w_down is not None:
        _check_expert(shared_w_gate_up, shared_w_down, d, rules, ())
        y = _expert_forward(x, _Expert(f64(shared_w_gate_up), f64(shared_w_down), None, None), rules)
        gate = np.ones((tokens, 1)) if shared_gate is None else f64(shared_gate)
        need(gate.shape in ((tokens,), (tokens, 1)), f"shared_gate must be ({tokens},) or ({tokens}, 1)")
        result += gate.reshape(tokens, 1) * y
    if out is None:
        return result
    need(out.shape == x.shape, f"out must be {x.shape}, got {out.shape}")
    out[...] = result
    return out
