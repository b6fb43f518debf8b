"""The router's float64 reference: against PyTorch and transformers' routers, word for word, and by its properties."""

from __future__ import annotations

import math
from importlib import import_module
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from flashmoe_cupy import reference

Array = Any  # NumPy arrays; Any, so that dicts of arguments may be unpacked
Rng = np.random.Generator
HIGHEST = float(np.finfo(np.float32).max)

# name -> (tokens, experts, with a bias, options)
CASES: dict[str, tuple[int, int, bool, dict[str, Any]]] = {
    "switch": (9, 6, False, {"top_k": 1}),
    "softmax": (9, 8, False, {"top_k": 3}),
    "softmax, renormalized": (9, 8, False, {"top_k": 3, "renormalize": True}),
    "softmax, biased": (9, 8, True, {"top_k": 3}),
    "softmax, biased, renormalized": (9, 8, True, {"top_k": 3, "renormalize": True, "routed_scaling_factor": 0.5}),
    "deepseek v2": (9, 12, False, {
        "top_k": 3, "num_expert_group": 4, "topk_group": 2, "routed_scaling_factor": 16.0,
    }),
    "deepseek v3": (9, 16, True, {
        "top_k": 4, "scoring_func": "sigmoid", "renormalize": True, "routed_scaling_factor": 2.5,
        "num_expert_group": 4, "topk_group": 2,
    }),
    "sigmoid": (9, 8, False, {"top_k": 2, "scoring_func": "sigmoid"}),
    "sigmoid, groups of one": (9, 6, True, {
        "top_k": 2, "scoring_func": "sigmoid", "num_expert_group": 6, "topk_group": 3,
    }),
    "sqrtsoftplus": (9, 8, False, {"top_k": 4, "scoring_func": "sqrtsoftplus", "renormalize": True}),
    "sqrtsoftplus, biased": (9, 8, True, {"top_k": 4, "scoring_func": "sqrtsoftplus", "routed_scaling_factor": 3.0}),
    "all experts": (5, 8, True, {"top_k": 8, "scoring_func": "sigmoid", "num_expert_group": 2, "topk_group": 2}),
    "one expert": (5, 1, False, {"top_k": 1}),
    "many": (40, 160, True, {"top_k": 6, "scoring_func": "sigmoid", "num_expert_group": 8, "topk_group": 3}),
}  # fmt: skip


def make(case: str, rng: Rng) -> tuple[Array, dict[str, Any]]:
    """Logits and the options of a case, the bias among them."""
    tokens, experts, biased, options = CASES[case]
    bias = {"e_score_correction_bias": 0.3 * rng.standard_normal(experts)} if biased else {}
    return 2.0 * rng.standard_normal((tokens, experts)), {**options, **bias}


def by_torch(logits: Array, options: dict[str, Any]) -> tuple[Array, Array]:
    """Weights and ids the way models are written in PyTorch, with masks and torch.topk; ties in any order."""
    torch = pytest.importorskip("torch")
    x = torch.tensor(logits)
    scores = {
        "softmax": lambda: torch.softmax(x, -1),
        "sigmoid": lambda: torch.sigmoid(x),
        "sqrtsoftplus": lambda: torch.nn.functional.softplus(x, threshold=1e9).sqrt(),
    }[options.get("scoring_func", "softmax")]()
    bias = options.get("e_score_correction_bias")
    choice = scores if bias is None else scores + torch.tensor(bias)
    groups = choice.view(len(x), options.get("num_expert_group", 1), -1)
    rank = groups.topk(min(2, groups.shape[-1]), -1)[0].sum(-1) if bias is not None else groups.amax(-1)
    kept = torch.zeros_like(rank).scatter_(1, rank.topk(options.get("topk_group", 1), -1)[1], 1.0).bool()
    ids = groups.masked_fill(~kept[..., None], -torch.inf).flatten(1).topk(options["top_k"], -1)[1]
    weights = scores.gather(1, ids)
    if options.get("renormalize"):
        weights = weights / weights.sum(-1, keepdim=True)
    return (weights * options.get("routed_scaling_factor", 1.0)).numpy(), ids.numpy()


def in_words(choice: list[float], top_k: int, groups: int, topk_group: int, biased: bool) -> list[int]:
    """The experts of one token by the rule as one would say it."""
    size = len(choice) // groups
    best = [sorted((choice[e] for e in range(g * size, (g + 1) * size)), reverse=True) for g in range(groups)]
    scores = [sum(b[:2]) if biased else b[0] for b in best]
    kept = sorted(range(groups), key=lambda g: (-scores[g], g))[:topk_group]
    return sorted((e for e in range(len(choice)) if e // size in kept), key=lambda e: (-choice[e], e))[:top_k]


def close(a: Array, b: Array, tol: float = 1e-12) -> None:
    np.testing.assert_allclose(np.asarray(a), np.asarray(b), rtol=tol, atol=tol)


# ---------------------------------------------------------------------------------------------- against other libraries


@pytest.mark.parametrize("case", CASES)
def test_equals_torch(case: str, rng: Rng) -> None:
    logits, options = make(case, rng)
    expected_weights, expected_ids = by_torch(logits, options)
    weights, ids = reference.moe_route(logits, **options)
    assert weights.dtype == np.float64 and ids.dtype == np.int32
    np.testing.assert_array_equal(ids, expected_ids)
    close(weights, expected_weights)


# model -> (router class, configuration class, its arguments, the same as our options); E = 12, K = 4
ROUTERS: dict[str, tuple[str, str, dict[str, Any], dict[str, Any]]] = {
    "mixtral": ("MixtralTopKRouter", "MixtralConfig", {"num_local_experts": 12}, {"renormalize": True}),
    "qwen3_moe": ("Qwen3MoeTopKRouter", "Qwen3MoeConfig", {"num_experts": 12, "norm_topk_prob": True}, {
        "renormalize": True,
    }),
    "olmoe": ("OlmoeTopKRouter", "OlmoeConfig", {"num_experts": 12, "norm_topk_prob": False}, {}),
    "gpt_oss": ("GptOssTopKRouter", "GptOssConfig", {"num_local_experts": 12}, {"renormalize": True}),
    "deepseek_v2": ("DeepseekV2TopkRouter", "DeepseekV2Config", {
        "n_routed_experts": 12, "n_group": 4, "topk_group": 2, "topk_method": "group_limited_greedy",
        "routed_scaling_factor": 16.0, "num_attention_heads": 1,
    }, {"num_expert_group": 4, "topk_group": 2, "routed_scaling_factor": 16.0}),
    "deepseek_v3": ("DeepseekV3TopkRouter", "DeepseekV3Config", {
        "n_routed_experts": 12, "n_group": 4, "topk_group": 2, "routed_scaling_factor": 2.5, "norm_topk_prob": True,
    }, {
        "scoring_func": "sigmoid", "renormalize": True, "num_expert_group": 4, "topk_group": 2,
        "routed_scaling_factor": 2.5,
    }),
    "deepseek_v4": ("DeepseekV4TopKRouter", "DeepseekV4Config", {
        "n_routed_experts": 12, "scoring_func": "sqrtsoftplus", "routed_scaling_factor": 1.5,
    }, {"scoring_func": "sqrtsoftplus", "renormalize": True, "routed_scaling_factor": 1.5}),
}  # fmt: skip


@pytest.mark.parametrize("model", ROUTERS)
def test_equals_the_router_of_transformers(model: str, rng: Rng) -> None:
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    router_class, config_class, arguments, options = ROUTERS[model]
    config = getattr(transformers, config_class)(hidden_size=12, num_experts_per_tok=4, **arguments)
    module = import_module(f"transformers.models.{model}.modeling_{model}")
    router = getattr(module, router_class)(config)
    logits, bias = rng.standard_normal((50, 12)), 0.2 * rng.standard_normal(12)
    with torch.no_grad():
        router.weight.copy_(torch.eye(12))  # so that hidden states are logits
        if model == "gpt_oss":
            router.bias.copy_(torch.tensor(bias))
        elif hasattr(router, "e_score_correction_bias"):
            router.e_score_correction_bias.copy_(torch.tensor(bias))
            options = {**options, "e_score_correction_bias": bias.astype(np.float32)}
        their_logits, their_weights, their_ids = (a.numpy() for a in router(torch.tensor(logits, dtype=torch.float32)))
    order = np.argsort(their_ids, axis=1)  # DeepSeek's come in no order
    weights, ids = reference.moe_route(their_logits, top_k=4, **options)
    mine = np.argsort(ids, axis=1)
    np.testing.assert_array_equal(np.take_along_axis(ids, mine, 1), np.take_along_axis(their_ids, order, 1))
    close(np.take_along_axis(weights, mine, 1), np.take_along_axis(their_weights, order, 1), 2e-6)


@pytest.mark.parametrize(("model", "top_k"), [("mixtral", 2), ("qwen3_moe", 4), ("olmoe", 1)])
def test_load_balancing_equals_transformers(model: str, top_k: int, rng: Rng) -> None:
    torch = pytest.importorskip("torch")
    module = pytest.importorskip(f"transformers.models.{model}.modeling_{model}")
    logits = rng.standard_normal((64, 8)) + np.linspace(0, 1, 8)
    expected = module.load_balancing_loss_func((torch.tensor(logits),), num_experts=8, top_k=top_k)
    stats = reference.moe_route(logits, top_k=top_k, return_stats=True)[2]
    assert stats.load_balancing_loss.shape == stats.z_loss.shape == ()
    close(stats.load_balancing_loss, expected.numpy(), 1e-6)
    close(stats.z_loss, torch.logsumexp(torch.tensor(logits), -1).square().mean().numpy())


@pytest.mark.parametrize("case", CASES)
def test_stats(case: str, rng: Rng) -> None:
    logits, options = make(case, rng)
    _, ids, stats = reference.moe_route(logits, **options, return_stats=True)
    experts = logits.shape[1]
    np.testing.assert_array_equal(stats.expert_counts, [np.sum(ids == e) for e in range(experts)])
    assert stats.expert_counts.dtype == stats.dropped.dtype == np.int32 and not stats.dropped.any()
    everyone = {name: options[name] for name in ("scoring_func",) if name in options}
    p, order = by_torch(logits, {"top_k": experts, "renormalize": True, **everyone})
    probabilities = np.zeros_like(p)
    np.put_along_axis(probabilities, order, p, axis=1)  # all K = E scores, divided by their sum
    loss = sum(float(np.mean(np.any(ids == e, axis=1))) * float(probabilities[:, e].mean()) for e in range(experts))
    close(stats.load_balancing_loss, experts * loss)


def test_balanced_routing_has_loss_top_k() -> None:
    logits = np.log(np.array([[4.0, 3.0, 2.0, 1.0]])) + np.zeros((4, 4))
    logits = np.stack([np.roll(row, i) for i, row in enumerate(logits)])
    close(reference.moe_route(logits, top_k=2, return_stats=True)[2].load_balancing_loss, 2.0)


# ------------------------------------------------------------------------------------------------------------ selection


@st.composite
def ties(draw: st.DrawFn) -> tuple[Array, dict[str, Any]]:
    """Logits of three values and, sometimes, a bias of two, so that almost every choice is a tie."""
    groups, size = draw(st.integers(1, 4)), draw(st.integers(1, 4))
    kept = draw(st.integers(1, groups))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    options: dict[str, Any] = {
        "num_expert_group": groups,
        "topk_group": kept,
        "top_k": draw(st.integers(1, kept * size)),
        "scoring_func": draw(st.sampled_from(["softmax", "sigmoid", "sqrtsoftplus"])),
    }
    if draw(st.booleans()):
        options["e_score_correction_bias"] = rng.integers(0, 2, groups * size) * 0.25
    return rng.integers(-1, 2, (6, groups * size)).astype(np.float64), options


@given(ties())
def test_ties_go_to_the_lower_expert_and_group(problem: tuple[Array, dict[str, Any]]) -> None:
    logits, options = problem
    ids = reference.moe_route(logits, **options)[1]
    bias, biased = options.get("e_score_correction_bias"), "e_score_correction_bias" in options
    for row, mine in zip(logits, ids, strict=True):
        p = np.exp(row) / np.exp(row).sum() if options["scoring_func"] == "softmax" else 1 / (1 + np.exp(-row))
        if options["scoring_func"] == "sqrtsoftplus":
            p = np.sqrt(np.log1p(np.exp(row)))
        # rounded, so that what is equal but for the last bit ties here; all other differences are above 1e-4
        choice = [round(float(c), 9) for c in (p + bias if biased else row)]
        assert in_words(choice, options["top_k"], options["num_expert_group"], options["topk_group"], biased) == [*mine]


def test_equal_logits_choose_the_first_experts() -> None:
    ids = reference.moe_route(np.zeros((3, 12)), top_k=5)[1]
    np.testing.assert_array_equal(ids, [[0, 1, 2, 3, 4]] * 3)
    ids = reference.moe_route(np.zeros((3, 12)), top_k=5, num_expert_group=4, topk_group=2)[1]
    np.testing.assert_array_equal(ids, [[0, 1, 2, 3, 4]] * 3)


def test_negative_zero_is_zero() -> None:
    np.testing.assert_array_equal(reference.moe_route(np.array([[-0.0, 0.0, -0.0]]), top_k=2)[1], [[0, 1]])


def test_bias_chooses_and_does_not_weigh(rng: Rng) -> None:
    logits = rng.standard_normal((8, 6))
    bias = np.array([0.0, 0.0, 0.0, 0.0, 5.0, 9.0])
    for scoring_func in ("softmax", "sigmoid", "sqrtsoftplus"):
        weights, ids = reference.moe_route(logits, top_k=2, scoring_func=scoring_func, e_score_correction_bias=bias)
        every, order = reference.moe_route(logits, top_k=6, scoring_func=scoring_func)
        np.testing.assert_array_equal(ids, [[5, 4]] * 8)
        close(weights, [[w[list(o).index(i)] for i in (5, 4)] for w, o in zip(every, order, strict=True)])


def test_bias_ranks_groups_by_their_two_largest() -> None:
    logits = np.array([[3.0, -3.0, 2.0, 2.0]])
    options: dict[str, Any] = {"top_k": 1, "scoring_func": "sigmoid", "num_expert_group": 2, "topk_group": 1}
    assert reference.moe_route(logits, **options)[1] == [[0]]
    assert reference.moe_route(logits, **options, e_score_correction_bias=np.zeros(4))[1] == [[2]]


def test_logits_decide_where_scores_underflow_or_saturate() -> None:
    logits = np.array([[0.0, -3000.0, -2000.0, -2500.0]])
    for renormalize, expected in ((False, [[1.0, 0.0, 0.0]]), (True, [[1.0, 0.0, 0.0]])):
        weights, ids = reference.moe_route(logits, top_k=3, renormalize=renormalize)
        np.testing.assert_array_equal(ids, [[0, 2, 3]])
        close(weights, expected)
    assert reference.moe_route(np.array([[50.0, 60.0]]), top_k=1, scoring_func="sigmoid")[1] == [[1]]
    assert reference.moe_route(np.array([[-900.0, -800.0]]), top_k=1, scoring_func="sqrtsoftplus")[1] == [[1]]
    # with a bias the scores decide, and they are equal here
    assert reference.moe_route(np.array([[50.0, 60.0]]), top_k=1, e_score_correction_bias=np.zeros(2))[1] == [[1]]
    saturated: dict[str, Any] = {"scoring_func": "sigmoid", "e_score_correction_bias": np.zeros(2)}
    assert reference.moe_route(np.array([[50.0, 60.0]]), top_k=1, **saturated)[1] == [[0]]


def test_renormalized_softmax_of_the_unlikely_is_not_0_over_0() -> None:
    bias = np.array([0.0, 2.0, 2.0])
    weights, ids = reference.moe_route(
        np.array([[0.0, -2000.0, -2001.0]]), top_k=2, renormalize=True, e_score_correction_bias=bias
    )
    np.testing.assert_array_equal(ids, [[1, 2]])
    close(weights, [[1 / (1 + math.exp(-1)), 1 / (1 + math.exp(1))]])


# ------------------------------------------------------------------------------------------------------- strange logits


@given(
    st.lists(st.sampled_from([math.nan, math.inf, -math.inf, 0.0, 1.0, -2.0, 3e38, 6e4]), min_size=8, max_size=8),
    st.integers(1, 8),
    st.sampled_from(["softmax", "sigmoid", "sqrtsoftplus"]),
    st.booleans(),
    st.booleans(),
    st.sampled_from(["bfloat16", "float16", "float32", "float64"]),
)
def test_any_logits_give_distinct_ids_and_finite_weights(
    row: list[float], top_k: int, scoring_func: str, renormalize: bool, biased: bool, dtype: str
) -> None:
    with np.errstate(all="ignore"):
        logits: Array = np.array([row, row[::-1]]).astype(getattr(ml_dtypes, dtype, dtype))
    options: dict[str, Any] = {"top_k": top_k, "scoring_func": scoring_func, "renormalize": renormalize}
    if biased:
        options["e_score_correction_bias"] = np.linspace(0.0, 1.0, 8)
    weights, ids, stats = reference.moe_route(logits, **options, return_stats=True)
    assert all(len({*mine}) == top_k and set(mine) <= {*range(8)} for mine in ids)
    assert np.isfinite(weights).all() and (weights >= 0).all()
    assert np.isfinite(stats.load_balancing_loss) and np.isfinite(stats.z_loss)
    with np.errstate(all="ignore"):
        wide = logits.astype(np.float64)
    finite = np.clip(np.where(np.isnan(wide), -HIGHEST, wide), -HIGHEST, HIGHEST)
    for mine, expected in zip(reference.moe_route(finite, **options), (weights, ids), strict=True):
        np.testing.assert_array_equal(mine, expected)


def test_nan_comes_last_and_infinity_first() -> None:
    ids = reference.moe_route(np.array([[np.nan, 1.0, np.inf, -np.inf, -5.0]], np.float32), top_k=5)[1]
    np.testing.assert_array_equal(ids, [[2, 1, 4, 0, 3]])
    weights = reference.moe_route(np.full((1, 4), np.nan), top_k=2)[0]
    close(weights, [[0.25, 0.25]])


# ------------------------------------------------------------------------------------------------------------- capacity


@pytest.mark.parametrize("capacity_factor", [0.0, 0.3, 1.0, 1.25, 2, 100.0])
@pytest.mark.parametrize("case", ["switch", "deepseek v3", "softmax, renormalized", "one expert"])
def test_capacity_drops_the_later_tokens(case: str, capacity_factor: float, rng: Rng) -> None:
    logits, options = make(case, rng)
    logits[:, 0] += 1.0
    free_weights, free_ids, free = reference.moe_route(logits, **options, return_stats=True)
    weights, ids, stats = reference.moe_route(logits, **options, capacity_factor=capacity_factor, return_stats=True)
    tokens, experts = logits.shape
    capacity = math.ceil(capacity_factor * tokens * options["top_k"] / experts)
    for e in range(experts):
        chosen = [tk for tk in np.ndindex(ids.shape) if free_ids[tk] == e]  # in the order of t * K + k
        assert all(ids[tk] == e and weights[tk] == free_weights[tk] for tk in chosen[:capacity])
        assert all(ids[tk] == -1 and weights[tk] == 0.0 for tk in chosen[capacity:])
        assert stats.expert_counts[e] == min(len(chosen), capacity)
        assert stats.dropped[e] == max(len(chosen) - capacity, 0)
    assert stats.load_balancing_loss == free.load_balancing_loss and stats.z_loss == free.z_loss
    np.testing.assert_array_equal(stats.expert_counts + stats.dropped, free.expert_counts)


def test_capacity_is_rounded_up() -> None:
    ids = reference.moe_route(np.tile([1.0, 0.0], (5, 1)), top_k=1, capacity_factor=0.5)[1]  # ceil(0.5 * 5 / 2) = 2
    np.testing.assert_array_equal(ids[:, 0], [0, 0, -1, -1, -1])


# ----------------------------------------------------------------------------------------------------------- properties


@pytest.mark.parametrize("case", CASES)
def test_tokens_do_not_depend_on_each_other(case: str, rng: Rng) -> None:
    logits, options = make(case, rng)
    weights, ids = reference.moe_route(logits, **options)
    order = rng.permutation(len(logits))
    for mine, expected in zip(reference.moe_route(logits[order], **options), (weights, ids), strict=True):
        np.testing.assert_array_equal(mine, expected[order])
    close(reference.moe_route(logits[3:4], **options)[0], weights[3:4])


@pytest.mark.parametrize("case", CASES)
def test_weights_follow_the_options(case: str, rng: Rng) -> None:
    logits, options = make(case, rng)
    weights, ids = reference.moe_route(logits, **options)
    scale = options.get("routed_scaling_factor", 1.0)
    if options.get("renormalize"):
        close(weights.sum(-1), np.full(len(logits), scale))
    if "e_score_correction_bias" not in options:
        assert (np.diff(weights, axis=1) <= 0).all()
    close(reference.moe_route(logits, **{**options, "routed_scaling_factor": 3.0 * scale})[0], 3.0 * weights)
    if options.get("scoring_func", "softmax") == "softmax":
        shifted = reference.moe_route(logits + rng.standard_normal((len(logits), 1)), **options)
        np.testing.assert_array_equal(shifted[1], ids)
        close(shifted[0], weights)


def test_no_tokens() -> None:
    weights, ids, stats = reference.moe_route(np.zeros((0, 5)), top_k=2, capacity_factor=1.0, return_stats=True)
    assert weights.shape == ids.shape == (0, 2) and ids.dtype == np.int32
    assert stats.load_balancing_loss == stats.z_loss == 0.0
    np.testing.assert_array_equal(stats.expert_counts + stats.dropped, np.zeros(5))


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"logits": np.zeros(4)}, "logits"),
        ({"logits": np.zeros((4, 0))}, "logits"),
        ({"top_k": 0}, "top_k"),
        ({"top_k": 7}, "top_k"),
        ({"top_k": 4, "num_expert_group": 2}, "top_k"),
        ({"num_expert_group": 4}, "4 groups of 6"),
        ({"num_expert_group": 0}, "0 groups"),
        ({"num_expert_group": 2, "topk_group": 3}, "topk_group"),
        ({"scoring_func": "tanh"}, "scoring_func"),
        ({"e_score_correction_bias": np.zeros(5)}, "bias"),
        ({"capacity_factor": -0.5}, "capacity_factor"),
        ({"capacity_factor": math.nan}, "capacity_factor"),
        ({"capacity_factor": math.inf}, "capacity_factor"),
    ],
)
def test_wrong_arguments_are_refused(change: dict[str, Any], word: str) -> None:
    arguments: dict[str, Any] = {"logits": np.zeros((4, 6)), "top_k": 2}
    with pytest.raises(ValueError, match=word):
        reference.moe_route(**(arguments | change))
