"""Random problems for mixtures of experts, for our tests and for users' own: NumPy arrays, the same for the same case.

`MoECase` is a call of `fused_moe`, `RouteCase` one of `moe_route`. Both are hashable and print as the call that makes
them. The truth of a case is `reference.fused_moe(**case.random(), **case.options())`, and likewise for `moe_route`.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

from flashmoe_cupy import reference
from flashmoe_cupy.testing import case_text

__all__ = ["LOGITS", "ROUTINGS", "MoECase", "RouteCase"]

Array = np.ndarray[Any, Any]
Rng = np.random.Generator

ROUTINGS = ("uniform", "zipf", "one", "balanced", "duplicates")
LOGITS = ("normal", "skewed", "peaked", "ties", "equal", "wild")

# Activation -> (has a gate, root mean square of its value for standard normal inputs).
_ACTIVATIONS = {
    "swiglu": (True, 0.60), "geglu": (True, 0.65), "geglu_tanh": (True, 0.65), "swigluoai": (True, 0.91),
    "gelu": (False, 0.65), "gelu_tanh": (False, 0.65), "relu": (False, 0.71), "relu2": (False, 1.22),
}  # fmt: skip


class MoECase(NamedTuple):
    """One problem for `fused_moe`: sizes, dtype, features, and how tokens spread over the experts.

    biases: "" none, "same" for x's dtype, or "float32". weights_dtype: "float32" or "same". shared: intermediate size
    of a shared expert, 0 for none; shared_gate: "" none, "same" or "float32". global_experts: number of experts that
    topk_ids speak of, `experts` of which are here by an expert_map; 0 for no map. sentinels: share of the assignments
    that name no expert: -1, and the first id behind the last, in equal parts; their weights are like the others'.

    routing, over the experts or the global ones: "uniform" K distinct experts at random; "zipf" the same, but the r-th
    most popular expert is 1/r as likely; "one" all assignments go to one expert; "balanced" each expert gets the same
    number, or one more; "duplicates" each assignment at random by itself, so that tokens name an expert twice.
    """

    tokens: int
    hidden: int = 64
    intermediate: int = 64
    experts: int = 8
    top_k: int = 2
    dtype: str = "bfloat16"
    activation: str = "swiglu"
    interleaved: bool = False
    swiglu_alpha: float | None = None
    swiglu_limit: float | None = None
    biases: str = ""
    routing: str = "uniform"
    sentinels: float = 0.0
    global_experts: int = 0
    weights_dtype: str = "float32"
    ids_dtype: str = "int32"
    weight_on_input: bool = False
    shared: int = 0
    shared_gate: str = ""
    batch_invariant: bool = False
    seed: int = 0

    def __str__(self) -> str:
        return case_text(self)

    @property
    def gated(self) -> bool:
        """The activation has a gate, so that the experts' first weights have two rows for each of their outputs."""
        return _ACTIVATIONS[self.activation][0]

    @property
    def known_experts(self) -> int:
        """The number of experts that topk_ids speak of."""
        return self.global_experts or self.experts

    def options(self) -> dict[str, Any]:
        """Keyword arguments of `fused_moe` that are not arrays."""
        return {
            "activation": self.activation,
            "interleaved": self.interleaved,
            "swiglu_alpha": self.swiglu_alpha,
            "swiglu_limit": self.swiglu_limit,
            "apply_router_weight_on_input": self.weight_on_input,
            "batch_invariant": self.batch_invariant,
        }

    def shapes(self) -> Iterator[tuple[str, tuple[int, ...], str]]:
        """(argument, shape, dtype name) of each floating-point array."""
        e, d, n, s, rows = self.experts, self.hidden, self.intermediate, self.shared, 2 if self.gated else 1
        yield "x", (self.tokens, d), self.dtype
        yield "w_gate_up", (e, rows * n, d), self.dtype
        yield "w_down", (e, d, n), self.dtype
        yield "topk_weights", (self.tokens, self.top_k), self._dtype(self.weights_dtype)
        if self.biases:
            yield "b_gate_up", (e, rows * n), self._dtype(self.biases)
            yield "b_down", (e, d), self._dtype(self.biases)
        if s:
            yield "shared_w_gate_up", (rows * s, d), self.dtype
            yield "shared_w_down", (d, s), self.dtype
        if self.shared_gate:
            yield "shared_gate", (self.tokens,), self._dtype(self.shared_gate)

    def scale(self, name: str) -> float:
        """Standard deviation of a normal array: products of matrices then have entries of unit scale, biases half."""
        spread = _ACTIVATIONS[self.activation][1]
        scales: dict[str, float] = {
            "x": 1.0,
            "w_gate_up": self.hidden**-0.5,
            "shared_w_gate_up": self.hidden**-0.5,
            "w_down": self.intermediate**-0.5 / spread,
            "shared_w_down": max(self.shared, 1) ** -0.5 / spread,
            "b_gate_up": 0.5,
            "b_down": 0.5,
        }
        return scales[name]

    def indices(self) -> dict[str, Any]:
        """topk_ids and, with global experts, expert_map."""
        rng = np.random.default_rng((self.seed, 1))
        known = self.known_experts
        ids = _assign(self.routing, self.tokens, self.top_k, known, rng)
        outside = np.where(rng.random(ids.shape) < 0.5, -1, known)
        ids = np.where(rng.random(ids.shape) < self.sentinels, outside, ids)
        found: dict[str, Any] = {"topk_ids": ids.astype(self.ids_dtype)}
        if self.global_experts:
            expert_map = np.full(known, -1, np.int32)
            expert_map[rng.permutation(known)[: self.experts]] = np.arange(self.experts)
            found["expert_map"] = expert_map
        return found

    def random(self) -> dict[str, Any]:
        """All arrays by argument name: normal ones, positive weights of unit norm for each token, gates in (0, 1).

        Outputs are of about unit scale for each part of the layer, the experts and the shared one.
        """
        arrays: dict[str, Any] = {}
        for i, (name, shape, dtype) in enumerate(self.shapes()):
            rng = np.random.default_rng((self.seed, 2, i))
            if name == "topk_weights":
                values = self._weights(rng.random(shape, np.float32) + np.float32(0.5))
            elif name == "shared_gate":
                values = rng.random(shape, np.float32)
            else:
                values = rng.standard_normal(shape, np.float32)
                values *= np.float32(self.scale(name))
            arrays[name] = _cast(values, dtype)
        return arrays | self.indices()

    def _dtype(self, name: str) -> str:
        return self.dtype if name == "same" else name

    def _weights(self, values: Array) -> Array:
        """Weights (T, K) such that the sum over a token's experts has about the scale of one expert's output."""
        # results of different experts add like random numbers, those of one expert like equal ones
        power = 1 if self.routing == "one" else 2
        values = values / np.sum(values**power, axis=1, keepdims=True) ** np.float32(1 / power)
        squared = self.weight_on_input and (self.gated or self.activation == "relu2")
        return np.sqrt(values) if squared else values  # the expert squares what its input is multiplied by


class RouteCase(NamedTuple):
    """One problem for `moe_route`: sizes, dtype, options, and the kind of logits.

    bias: "" none, "float32", or "same" for the dtype of the logits. logits: "normal"; "skewed", some experts far more
    popular; "peaked", so far apart that softmax underflows in float32; "ties", three values; "equal", one value in each
    row; "wild", a fifth of NaN and infinities, and rows of nothing else.

    Experts are chosen by logits, exactly, where there is no bias. With one, the choice depends on rounded scores, so
    rows where two different values lie closer than `margin`, relative to their terms, are drawn again: float32 and
    float64 then choose the same experts. Equal values remain; they are equal in every precision.
    """

    tokens: int
    experts: int = 16
    top_k: int = 4
    dtype: str = "float32"
    scoring_func: str = "softmax"
    renormalize: bool = False
    routed_scaling_factor: float = 1.0
    bias: str = ""
    num_expert_group: int = 1
    topk_group: int = 1
    capacity_factor: float | None = None
    logits: str = "normal"
    margin: float = 1e-5
    seed: int = 0

    def __str__(self) -> str:
        return case_text(self)

    def options(self) -> dict[str, Any]:
        """Keyword arguments of `moe_route` that are not arrays, but for return_stats."""
        return {
            "top_k": self.top_k,
            "scoring_func": self.scoring_func,
            "renormalize": self.renormalize,
            "routed_scaling_factor": self.routed_scaling_factor,
            "num_expert_group": self.num_expert_group,
            "topk_group": self.topk_group,
            "capacity_factor": self.capacity_factor,
        }

    def random(self) -> dict[str, Any]:
        """logits (T, E) and, with one, e_score_correction_bias (E,). ValueError if no draw keeps the margin."""
        for attempt in range(10):
            rng = np.random.default_rng((self.seed, attempt))
            logits = self._logits(self.tokens, rng)
            if self.logits == "wild":
                for t, value in enumerate((np.nan, -np.inf, np.inf)[: self.tokens]):
                    logits[t] = value
            if not self.bias:
                return {"logits": logits}
            bias = self._bias(rng)
            rows = self._unclear(logits, bias)
            for _ in range(30):
                if not len(rows):
                    return {"logits": logits, "e_score_correction_bias": bias}
                logits[rows] = self._logits(len(rows), rng)
                rows = rows[self._unclear(logits[rows], bias)]
        raise ValueError(f"{self}: no random problem whose choices are all {self.margin} apart")

    def _logits(self, tokens: int, rng: Rng) -> Array:
        shape = tokens, self.experts
        values: Array = rng.standard_normal(shape, np.float32)
        if self.logits == "skewed":
            values += np.linspace(0.0, 3.0, self.experts, dtype=np.float32)
        elif self.logits == "peaked":
            values *= np.float32(100.0)
        elif self.logits == "ties":
            values = rng.integers(-1, 2, shape).astype(np.float32)
        elif self.logits == "equal":
            values = np.repeat(values[:, :1], self.experts, axis=1)
        elif self.logits == "wild":
            strange = rng.choice(np.array([np.nan, np.inf, -np.inf], np.float32), shape)
            values = np.where(rng.random(shape) < 0.2, strange, values)
        return _cast(values, self.dtype)

    def _bias(self, rng: Rng) -> Array:
        """As far apart as scores are, so that both decide; two values where the logits have three."""
        spread = {"softmax": 1.0 / self.experts, "sigmoid": 0.2, "sqrtsoftplus": 0.4}[self.scoring_func]
        values: Array = spread * rng.standard_normal(self.experts)
        if self.logits == "ties":
            values = rng.integers(0, 2, self.experts) * 0.25
        return _cast(values.astype(np.float32), self.dtype if self.bias == "same" else self.bias)

    def _unclear(self, logits: Array, bias: Array) -> Array:
        """The rows whose choice rounding might change."""
        every: dict[str, Any] = {"scoring_func": self.scoring_func, "top_k": self.experts}
        weights, ids = reference.moe_route(logits, **every)
        p = np.empty_like(weights)
        np.put_along_axis(p, ids.astype(np.intp), weights, axis=1)
        b = bias.astype(np.float64)
        options = self.options() | {"capacity_factor": None, "e_score_correction_bias": b}
        chosen = reference.moe_route(logits, **options)[1]
        rows = zip(p, chosen, strict=True)
        return np.array([t for t, (row, mine) in enumerate(rows) if not self._clear(row, b, mine)], np.intp)

    def _clear(self, p: Array, b: Array, chosen: Array) -> bool:
        """True if no rounding changes the choice of one token: its groups first, then its experts inside them."""
        groups, size = self.num_expert_group, self.experts // self.num_expert_group
        c, terms = p + b, np.abs(p) + np.abs(b)
        two = np.sort(c.reshape(groups, size), axis=1)[:, -2:]
        scores, slack = two.sum(axis=1), 2.0 * self.margin * terms.reshape(groups, size).max(axis=1)
        order = np.argsort(-scores, kind="stable")
        last = order[self.topk_group - 1]
        near = np.abs(scores - scores[last]) < np.maximum(slack, slack[last])
        if self.topk_group < groups and bool(np.any(near & np.any(two != two[last], axis=1))):
            return False
        members = np.flatnonzero(np.isin(np.arange(self.experts) // size, order[: self.topk_group]))
        values, first = np.unique(c[members], return_index=True)  # equal values are no risk: the lower id comes first
        slack = self.margin * terms[members][first]
        gaps = np.diff(values) >= np.maximum(slack[1:], slack[:-1])
        lowest = int(np.searchsorted(values, c[chosen].min()))
        return bool(np.all(gaps[max(lowest - 1, 0) :]))


def _assign(routing: str, tokens: int, top_k: int, experts: int, rng: Rng) -> Array:
    """Expert ids (T, K) without sentinels."""
    shape = tokens, top_k
    if routing == "one":
        return np.full(shape, rng.integers(experts))
    if routing == "duplicates":
        return rng.integers(0, experts, shape)
    if routing not in ROUTINGS or top_k > experts:
        raise ValueError(f"routing must be one of {ROUTINGS}, got {routing!r}; {top_k} of {experts} experts")
    if routing == "balanced":
        rows = np.arange(tokens * top_k).reshape(shape) % experts
        ids: Array = rng.permutation(experts)[rng.permutation(rows)]
        return ids
    # The largest of log-popularity plus Gumbel noise are draws without replacement.
    popularity = -np.log(rng.permutation(experts) + 1.0) if routing == "zipf" else np.zeros(experts)
    noise = rng.gumbel(size=(tokens, experts))
    order: Array = np.argsort(-(popularity + noise), axis=1)
    return order[:, :top_k]


def _cast(values: Array, dtype: str) -> Array:
    if dtype == "bfloat16":
        import ml_dtypes

        return values.astype(ml_dtypes.bfloat16)
    return values.astype(dtype)
