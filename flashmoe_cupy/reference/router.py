"""The router in float64 NumPy: which experts a token goes to, and with which weights.

T tokens, E experts, K experts a token. Row t of the logits is x:

    p = softmax(x), sigmoid(x) or sqrt(log(1 + exp(x)))     scores, by scoring_func
    c = p + bias, or x itself without bias                  choice: what the experts are ranked by
    ids = the K largest c in the topk_group best groups     ties: the lower expert, the lower group
    w = p[ids] [/ sum(p[ids])] * routed_scaling_factor      weights

Ranking by x and not by p, where there is no bias, is the same order, since every score rises with x, and stays exact
where p underflows. Sigmoid scores, a bias and groups: DeepSeek-V3 (arXiv 2412.19437, section 2.1.2); groups without a
bias: DeepSeek-V2 (arXiv 2405.04434, section 2.2.2). Load balancing: Switch Transformer (arXiv 2101.03961, eq. 4-6);
z-loss: ST-MoE (arXiv 2202.08906, eq. 5).
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
Ids = NDArray[np.int32]
AnyArray = NDArray[Any]

SCORING_FUNCTIONS = ("softmax", "sigmoid", "sqrtsoftplus")

_HIGHEST = float(np.finfo(np.float32).max)  # logits are clamped to the finite range of float32, whatever their dtype


class RouterStats(NamedTuple):
    """What a training loop wants to know of a routing: counts int32 (E,), losses float64 of shape ().

    expert_counts: assignments that each expert keeps. dropped: those beyond its capacity.
    """

    expert_counts: Ids
    dropped: Ids
    load_balancing_loss: Array
    z_loss: Array


def f64(array: AnyArray) -> Array:
    """The array in float64."""
    return np.asarray(array).astype(np.float64)


def need(condition: bool, text: str) -> None:
    """Raise ValueError with this text unless the condition holds."""
    if not condition:
        raise ValueError(text)


def sigmoid(x: Array) -> Array:
    """1 / (1 + exp(-x)), also where exp(-x) is beyond float64."""
    with np.errstate(over="ignore"):
        y: Array = 1.0 / (1.0 + np.exp(-x))
    return y


# -------------------------------------------------------------------------------------------------------------- routing


def _clamped(logits: AnyArray) -> Array:
    """Finite logits: infinities become the largest and lowest float32, NaN the lowest."""
    x = f64(logits)
    return np.clip(np.where(np.isnan(x), -_HIGHEST, x), -_HIGHEST, _HIGHEST)


def _log_sum_exp(x: Array) -> Array:
    """log(sum_j exp(x_tj)) by the largest term, (T,)."""
    m = np.max(x, axis=1)
    total: Array = m + np.log(np.sum(np.exp(x - m[:, None]), axis=1))
    return total


def _softmax(x: Array) -> Array:
    e = np.exp(x - np.max(x, axis=1, keepdims=True))
    total: Array = e / np.sum(e, axis=1, keepdims=True)
    return total


def _scores(x: Array, scoring_func: str) -> Array:
    """p, (T, E)."""
    if scoring_func == "softmax":
        return _softmax(x)
    if scoring_func == "sigmoid":
        return sigmoid(x)
    root: Array = np.sqrt(np.logaddexp(0.0, x))
    return root


def _largest(values: Array, count: int) -> NDArray[np.intp]:
    """Indices of the `count` largest values, in descending order; equal values by their index."""
    return np.argsort(-values, kind="stable")[:count]


def _choose(c: Array, top_k: int, num_expert_group: int, topk_group: int, biased: bool) -> NDArray[np.intp]:
    """The top_k experts of one token by its choice c (E,), from the best groups only."""
    groups = c.reshape(num_expert_group, -1)
    size = groups.shape[1]
    two = np.sort(groups, axis=1)[:, -2:]  # the two largest of each group; one where a group has one expert
    group_scores = np.sum(two, axis=1) if biased else np.max(groups, axis=1)
    best = _largest(group_scores, topk_group)
    candidates = np.flatnonzero(np.isin(np.arange(len(c)) // size, best))
    return candidates[_largest(c[candidates], top_k)]


def _drop(ids: NDArray[np.intp], experts: int, capacity_factor: float) -> NDArray[np.bool_]:
    """(T, K), True where an assignment is beyond its expert's capacity; earlier tokens come first."""
    tokens, top_k = ids.shape
    capacity = math.ceil(capacity_factor * tokens * top_k / experts)  # from left to right: one ulp can move the ceiling
    taken = [0] * experts
    dropped = np.zeros(ids.shape, np.bool_)
    for t, k in np.ndindex(ids.shape):
        dropped[t, k] = taken[ids[t, k]] >= capacity
        taken[ids[t, k]] += 1
    return dropped


def _balance(x: Array, p: Array, ids: NDArray[np.intp], scoring_func: str) -> float:
    """E * sum_e f_e P_e: f_e the share of tokens that chose expert e, P_e its mean probability."""
    tokens, experts = x.shape
    if tokens == 0:
        return 0.0
    probabilities = p if scoring_func == "softmax" else p / (np.sum(p, axis=1, keepdims=True) + 1e-20)
    f = np.bincount(ids.ravel(), minlength=experts) / tokens
    return float(experts * np.sum(f * np.mean(probabilities, axis=0)))


# --------------------------------------------------------------------------------------------------------------- public


def moe_route(
    logits: AnyArray,
    *,
    top_k: int,
    scoring_func: str = "softmax",
    renormalize: bool = False,
    routed_scaling_factor: float = 1.0,
    e_score_correction_bias: AnyArray | None = None,
    num_expert_group: int = 1,
    topk_group: int = 1,
    capacity_factor: float | None = None,
    return_stats: bool = False,
) -> Any:
    """The top_k experts of each token and their weights, from logits (T, E) of any NumPy float dtype.

    Returns topk_weights (T, K) float64 and topk_ids (T, K) int32, in descending order of choice; with return_stats also
    RouterStats. e_score_correction_bias (E,) takes part in the choice, not in the weights. num_expert_group groups of
    neighbouring experts, of which the topk_group best stay: by their largest choice, with bias by the sum of their two
    largest. capacity_factor drops what is beyond ceil(capacity_factor * T * K / E) assignments of an expert, in the
    order of tokens: id -1, weight 0. Raises ValueError for shapes or options that do not fit.
    """
    need(np.ndim(logits) == 2 and np.shape(logits)[1] > 0, f"logits must be (T, E), got {np.shape(logits)}")
    need(scoring_func in SCORING_FUNCTIONS, f"scoring_func must be one of {SCORING_FUNCTIONS}, got {scoring_func!r}")
    x = _clamped(logits)
    tokens, experts = x.shape
    need(num_expert_group >= 1 and experts % num_expert_group == 0, f"{num_expert_group} groups of {experts} experts")
    need(1 <= topk_group <= num_expert_group, f"topk_group = {topk_group} of {num_expert_group} groups")
    remaining = topk_group * (experts // num_expert_group)
    need(1 <= top_k <= remaining, f"top_k = {top_k} of {remaining} experts")
    p = _scores(x, scoring_func)
    c, biased = x, e_score_correction_bias is not None
    if e_score_correction_bias is not None:
        need(np.shape(e_score_correction_bias) == (experts,), f"e_score_correction_bias must be ({experts},)")
        c = p + f64(e_score_correction_bias)

    ids = np.zeros((tokens, top_k), np.intp)
    for t in range(tokens):
        ids[t] = _choose(c[t], top_k, num_expert_group, topk_group, biased)
    if scoring_func == "softmax" and renormalize:
        weights = _softmax(np.take_along_axis(x, ids, axis=1))  # p / sum(p), where p itself may underflow to 0 / 0
    else:
        weights = np.take_along_axis(p, ids, axis=1)
        if renormalize:
            weights = weights / (np.sum(weights, axis=1, keepdims=True) + 1e-20)
    weights = weights * routed_scaling_factor

    dropped = np.zeros(ids.shape, np.bool_)
    if capacity_factor is not None:
        need(0.0 <= capacity_factor < math.inf, f"capacity_factor must be finite and >= 0, got {capacity_factor}")
        dropped = _drop(ids, experts, capacity_factor)
    topk_ids = np.where(dropped, -1, ids).astype(np.int32)
    topk_weights = np.where(dropped, 0.0, weights)
    if not return_stats:
        return topk_weights, topk_ids
    stats = RouterStats(
        expert_counts=np.bincount(ids[~dropped], minlength=experts).astype(np.int32),
        dropped=np.bincount(ids[dropped], minlength=experts).astype(np.int32),
        load_balancing_loss=np.array(_balance(x, p, ids, scoring_func)),
        z_loss=np.array(np.mean(_log_sum_exp(x) ** 2) if tokens else 0.0),
    )
    return topk_weights, topk_ids, stats
