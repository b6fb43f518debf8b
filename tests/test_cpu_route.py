"""The router on the NumPy back end, against each token computed by hand in float64: sorted lists and sums."""

from __future__ import annotations

import math
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from flashmoe_cupy import _env, moe_route, reference
from flashmoe_cupy.cpu import moe as module
from flashmoe_cupy.errors import FlashMoEError

Array = Any
SCORING = ("softmax", "sigmoid", "sqrtsoftplus")
DTYPES = {"float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}
HIGHEST = float(np.finfo(np.float32).max)


# ---------------------------------------------------------------------------------------------------------------------
# one token by hand


def clamped(value: float) -> float:
    return -HIGHEST if math.isnan(value) else min(max(value, -HIGHEST), HIGHEST)


def score(name: str, x: list[float]) -> list[float]:
    if name == "softmax":
        exps = [math.exp(max(v - max(x), -745.0)) if v - max(x) > -745 else 0.0 for v in x]
        return [e / sum(exps) for e in exps]
    if name == "sigmoid":
        return [1 / (1 + math.exp(-v)) if v > -700 else 0.0 for v in x]
    return [math.sqrt(max(v, 0) + math.log1p(math.exp(-min(abs(v), 745)))) for v in x]


def token_by_hand(
    logits: Array, *, top_k: int, scoring_func: Any = "softmax", renormalize: bool = False, scale: float = 1.0,
    bias: Array | None = None, groups: int = 1, kept: int = 1,
) -> tuple[list[float], list[int]]:  # fmt: skip
    x = [clamped(float(v)) for v in logits]
    p = score(scoring_func, x)
    choice = x if bias is None else [a + float(b) for a, b in zip(p, bias, strict=True)]
    size = len(x) // groups
    members = [range(g * size, (g + 1) * size) for g in range(groups)]
    best = [sum(sorted((choice[e] for e in m), reverse=True)[: 1 if bias is None else 2]) for m in members]
    chosen = sorted(range(groups), key=lambda g: (-best[g], g))[:kept]
    ids = sorted((e for g in chosen for e in members[g]), key=lambda e: (-choice[e], e))[:top_k]
    weights = [p[e] for e in ids]
    if renormalize:
        weights = score("softmax", [x[e] for e in ids]) if scoring_func == "softmax" else [
            w / (sum(weights) + 1e-20) for w in weights
        ]  # fmt: skip
    return [w * scale for w in weights], ids


def check(logits: Array, **options: Any) -> None:
    names = {"scale": "routed_scaling_factor", "bias": "e_score_correction_bias", "groups": "num_expert_group"}
    names["kept"] = "topk_group"
    weights, ids = moe_route(logits, **{names.get(n, n): v for n, v in options.items()})
    assert weights.dtype == np.float32 and ids.dtype == np.int32
    assert weights.shape == ids.shape == (len(logits), options["top_k"])
    for t, row in enumerate(logits):
        expected, experts = token_by_hand(row, **options)
        assert ids[t].tolist() == experts
        np.testing.assert_allclose(weights[t], expected, rtol=2e-6, atol=1e-37)


def random(tokens: int, experts: int, seed: int = 0, dtype: str = "float32", spread: float = 2.0) -> Array:
    r = np.random.default_rng(seed)
    return (spread * r.standard_normal((tokens, experts))).astype(DTYPES[dtype])


# ---------------------------------------------------------------------------------------------------------------------
# experts and weights


@pytest.mark.parametrize("renormalize", [False, True])
@pytest.mark.parametrize("scoring_func", SCORING)
@pytest.mark.parametrize(("experts", "k"), [(1, 1), (3, 3), (5, 2), (8, 1), (64, 32), (160, 6), (1024, 8)], ids=str)
def test_sizes(experts: int, k: int, scoring_func: Any, renormalize: bool) -> None:
    for tokens in (0, 1, 7, 33):
        check(random(tokens, experts), top_k=k, scoring_func=scoring_func, renormalize=renormalize, scale=2.5)


@pytest.mark.parametrize("scoring_func", SCORING)
@pytest.mark.parametrize("dtype", DTYPES)
def test_dtypes_and_ties(dtype: str, scoring_func: Any) -> None:
    """16-bit logits are full of ties, which go to the lower expert; a bias moves the choice, not the weights."""
    logits = random(60, 32, dtype=dtype)
    few = np.round(logits.astype(np.float32)).astype(logits.dtype)
    bias = np.random.default_rng(3).integers(-2, 3, 32).astype(np.float32) / 4
    for x in (logits, few):
        check(x, top_k=5, scoring_func=scoring_func)
        check(x, top_k=5, scoring_func=scoring_func, bias=bias, renormalize=True)
        check(x, top_k=5, scoring_func=scoring_func, bias=bias.astype(logits.dtype))
    plain, moved = (moe_route(few, top_k=5, e_score_correction_bias=b)[1] for b in (None, bias))
    assert (plain != moved).any()


@pytest.mark.parametrize("scoring_func", SCORING)
@pytest.mark.parametrize(("experts", "groups", "kept", "k"), [
    (256, 8, 4, 8), (160, 8, 3, 6), (12, 12, 5, 3), (12, 12, 3, 3), (12, 1, 1, 4), (12, 3, 3, 12), (24, 4, 1, 6),
    (6, 2, 1, 1),
], ids=str)  # fmt: skip
def test_groups(experts: int, groups: int, kept: int, k: int, scoring_func: Any) -> None:
    """DeepSeek's two routers among them, and groups of one expert."""
    bias = np.random.default_rng(1).standard_normal(experts).astype(np.float32) / 4
    for logits in (random(40, experts), np.round(random(40, experts, 1))):
        for b in (None, bias, np.zeros(experts, np.float32)):
            check(logits, top_k=k, scoring_func=scoring_func, bias=b, groups=groups, kept=kept, renormalize=True)


def test_groups_are_told_apart_by_their_two_best() -> None:
    """With a bias two good experts beat one very good one; without, the best alone decides."""
    logits = np.array([[3.0, -9, -9, 2, 2, -9]], np.float32)
    options: Any = {"top_k": 1, "num_expert_group": 2, "scoring_func": "sigmoid"}
    assert moe_route(logits, **options)[1].tolist() == [[0]]
    assert moe_route(logits, **options, e_score_correction_bias=np.zeros(6, np.float32))[1].tolist() == [[3]]


def test_experts_with_a_bias_of_minus_infinity() -> None:
    """They come last, each once, and experts of groups that were not kept do not come at all."""
    bias = np.full(8, -np.inf, np.float32)
    bias[6] = 0.0
    _, ids = moe_route(random(5, 8), top_k=4, e_score_correction_bias=bias)
    assert (ids == [6, 0, 1, 2]).all()
    bias[4:] = 0.0
    _, ids = moe_route(random(5, 8), top_k=4, e_score_correction_bias=bias, num_expert_group=2)
    assert (np.sort(ids) == [4, 5, 6, 7]).all()
    _, ids = moe_route(random(5, 8), top_k=4, e_score_correction_bias=np.full(8, -np.inf, "f"), num_expert_group=2)
    assert (ids == [0, 1, 2, 3]).all()


@given(
    st.integers(0, 20), st.sampled_from([(1, 1), (4, 2), (6, 3), (16, 4), (16, 16)]), st.integers(1, 8), st.data(),
    st.sampled_from(SCORING), st.booleans(), st.booleans(), st.sampled_from([1, 40, 1 << 20]), st.integers(0, 2**16),
)  # fmt: skip
def test_any_mix_in_any_blocks(
    tokens: int, shape: tuple[int, int], k: int, data: st.DataObject, scoring_func: Any, renormalize: bool,
    biased: bool, block: int, seed: int,
) -> None:  # fmt: skip
    experts, groups = shape
    kept = data.draw(st.integers(1, groups))
    r = np.random.default_rng(seed)
    bias = (r.integers(-4, 5, experts) / 8).astype(np.float32) if biased else None
    logits = (r.integers(-8, 9, (tokens, experts)) / 4).astype(np.float32)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_SCORES", block)
        check(
            logits, top_k=min(k, kept * experts // groups), scoring_func=scoring_func, renormalize=renormalize,
            bias=bias, groups=groups, kept=kept, scale=-0.5,
        )  # fmt: skip


# ---------------------------------------------------------------------------------------------------------------------
# hostile logits

HOSTILE = np.array([
    [0, -200, -300, -400, -500, -600], [1e30, -1e30, 3e38, -3e38, 0, 1], [np.nan] * 6, [np.inf] * 6, [-np.inf] * 6,
    [np.nan, np.inf, -np.inf, 0, np.nan, 5], [np.inf, np.inf, 1, 2, 3, np.nan], [-np.inf, -np.inf, -1e38, 0, 0, 0],
    [7] * 6, [-0.0, 0.0, -0.0, 0.0, 0, 0], [-100, -90, -110, -200, -1000, -95], [1e-40, 0, -1e-40, 2e-40, 0, 0],
], np.float32)  # fmt: skip


@pytest.mark.parametrize("renormalize", [False, True])
@pytest.mark.parametrize("scoring_func", SCORING)
def test_hostile_logits(scoring_func: Any, renormalize: bool) -> None:
    """Different experts and finite weights whatever comes; the order is that of the logits where scores underflow."""
    for groups, kept in ((1, 1), (3, 2)):
        weights, ids = moe_route(
            HOSTILE, top_k=4, scoring_func=scoring_func, renormalize=renormalize, num_expert_group=groups,
            topk_group=kept,
        )  # fmt: skip
        assert all(len(set(row)) == 4 for row in ids.tolist()) and ids.min() >= 0 and ids.max() < 6
        assert np.isfinite(weights).all() and (weights >= 0).all()
    check(HOSTILE[:10], top_k=4, scoring_func=scoring_func)
    check(HOSTILE[:10], top_k=4, scoring_func=scoring_func, renormalize=renormalize and scoring_func == "softmax")
    assert moe_route(HOSTILE[:1], top_k=6, scoring_func=scoring_func)[1].tolist() == [[0, 1, 2, 3, 4, 5]]


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("groups", [(1, 1), (4, 2)])
@pytest.mark.parametrize("renormalize", [False, True])
@pytest.mark.parametrize("scoring_func", SCORING)
def test_a_nan_counts_as_the_lowest_number(
    scoring_func: Any, renormalize: bool, groups: tuple[int, int], bias: bool
) -> None:
    """One of a row, several and a row of them; the reference says the same."""
    r = np.random.default_rng(3)
    logits = r.standard_normal((6, 8)).astype(np.float32)
    shift = r.standard_normal(8).astype(np.float32) if bias else None
    logits[1, logits[1].argmax()] = logits[2, 3:] = logits[4] = np.nan
    options: dict[str, Any] = {
        "top_k": 3, "scoring_func": scoring_func, "renormalize": renormalize, "e_score_correction_bias": shift,
        "num_expert_group": groups[0], "topk_group": groups[1], "return_stats": True,
    }  # fmt: skip
    weights, ids, stats = moe_route(logits, **options)
    lowest = np.where(np.isnan(logits), np.float32(-HIGHEST), logits)
    for mine, theirs in zip((weights, ids, *stats), flat(moe_route(lowest, **options)), strict=True):
        np.testing.assert_array_equal(mine, theirs)
    for mine, theirs in zip((weights, ids), reference.moe_route(logits, **options), strict=False):
        np.testing.assert_allclose(mine, theirs, rtol=2e-6)


def flat(routed: Any) -> list[Any]:
    return [*routed[:2], *routed[2]]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scoring_func", SCORING)
def test_the_first_nan_is_named_under_the_check(
    scoring_func: Any, dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    logits = np.zeros((5, 8), DTYPES[dtype])
    logits[2, 6] = logits[2, 7] = logits[4, 0] = np.nan
    assert moe_route(logits, top_k=2, scoring_func=scoring_func)[1][2].tolist() == [0, 1]
    monkeypatch.setattr("flashmoe_cupy._env.get", lambda: _env.Env(check=True))
    with pytest.raises(FlashMoEError, match=r"^logits\[2, 6\] is NaN, one of 2 rows of 5 with NaN$"):
        moe_route(logits, top_k=2, scoring_func=scoring_func)
    logits = np.where(np.isnan(logits), DTYPES[dtype](np.inf), logits)
    moe_route(logits, top_k=2, scoring_func=scoring_func)
    bias = np.zeros(8, np.float32)
    bias[5] = np.nan
    with pytest.raises(FlashMoEError, match=r"^e_score_correction_bias\[5\] is NaN$"):
        moe_route(logits, top_k=2, scoring_func=scoring_func, e_score_correction_bias=bias)


def test_renormalized_softmax_is_never_zero_over_zero() -> None:
    """All chosen experts underflow in the softmax over all, because the best one is in a group that was not kept."""
    logits = np.array([[0.0, 0.0, -300.0, -301.0]], np.float32)
    bias = np.array([-9.0, -9.0, 9.0, 9.0], np.float32)
    weights, ids = moe_route(logits, top_k=2, renormalize=True, e_score_correction_bias=bias)
    assert ids.tolist() == [[2, 3]]
    np.testing.assert_allclose(weights[0], [1 / (1 + math.exp(-1)), 1 / (1 + math.e)], rtol=1e-6)


def test_the_logits_are_not_written() -> None:
    logits = HOSTILE.copy()
    moe_route(logits, top_k=2, return_stats=True)
    np.testing.assert_array_equal(logits, HOSTILE)


def test_strided_logits() -> None:
    wide = random(20, 24)
    for part in (wide[::2, 3:11], wide[::-1, :8], np.broadcast_to(wide[:1], (9, 24))):
        for a, b in zip(moe_route(part, top_k=3), moe_route(part.copy(), top_k=3), strict=True):
            np.testing.assert_array_equal(a, b)


# ---------------------------------------------------------------------------------------------------------------------
# capacity and statistics


@pytest.mark.parametrize("factor", [0.0, 0.3, 1.0, 1.25, 100.0])
def test_capacity_drops_the_last(factor: float) -> None:
    logits = random(50, 6)
    logits[:, 2] += 2.0  # one expert that many want
    weights, ids = moe_route(logits, top_k=3)
    capacity = math.ceil(factor * 50 * 3 / 6)
    taken, lost = [0] * 6, [0] * 6
    for t in range(50):
        for k in range(3):
            e = int(ids[t, k])
            if taken[e] < capacity:
                taken[e] += 1
            else:
                lost[e] += 1
                ids[t, k], weights[t, k] = -1, 0.0
    cut, left, stats = moe_route(logits, top_k=3, capacity_factor=factor, return_stats=True)
    np.testing.assert_array_equal(left, ids)
    np.testing.assert_array_equal(cut, weights)
    assert stats.expert_counts.tolist() == taken and stats.dropped.tolist() == lost
    assert stats.expert_counts.dtype == stats.dropped.dtype == np.int32
    assert bool(sum(lost)) is (factor < 2)


@pytest.mark.parametrize("capacity", [None, 0.5])
@pytest.mark.parametrize("scoring_func", SCORING)
@pytest.mark.parametrize("block", [7, 1 << 20])
def test_statistics(scoring_func: Any, capacity: float | None, block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_SCORES", block)
    for k in (1, 3):
        logits = random(50, 6, seed=k)
        _, ids = moe_route(logits, top_k=k, scoring_func=scoring_func)
        _, _, stats = moe_route(
            logits, top_k=k, scoring_func=scoring_func, capacity_factor=capacity, return_stats=True, renormalize=True,
            routed_scaling_factor=3.0,
        )  # fmt: skip
        x = logits.astype(np.float64)
        p = np.array([score(scoring_func, row.tolist()) for row in x])
        p /= p.sum(1, keepdims=True)
        routed = np.array([(ids == e).sum() for e in range(6)])  # before drops
        for name, expected in (
            ("load_balancing_loss", 6 * sum(routed[e] / 50 * p[:, e].mean() for e in range(6))),
            ("z_loss", np.mean([math.log(sum(map(math.exp, row))) ** 2 for row in x.tolist()])),
        ):
            value = getattr(stats, name)
            assert value.shape == () and value.dtype == np.float32
            np.testing.assert_allclose(value, expected, rtol=2e-6)
        assert (stats.expert_counts + stats.dropped).tolist() == routed.tolist()
        assert bool(stats.dropped.sum()) is (capacity is not None)


def test_a_balanced_router_has_loss_k() -> None:
    """Its minimum for K = 1 is 1 (Switch): all experts equally often, all probabilities equal."""
    _, _, stats = moe_route(1e-4 * np.eye(8, dtype=np.float32), top_k=1, return_stats=True)
    np.testing.assert_allclose(stats.load_balancing_loss, 1.0, rtol=1e-6)
    assert stats.expert_counts.tolist() == [1] * 8
    _, _, stats = moe_route(np.eye(8, dtype=np.float32)[[3] * 8] * 100, top_k=1, return_stats=True)
    np.testing.assert_allclose(stats.load_balancing_loss, 8.0, rtol=1e-6)


def test_no_tokens() -> None:
    for scoring_func in SCORING:
        options: Any = {"top_k": 2, "scoring_func": scoring_func, "capacity_factor": 1.0, "return_stats": True}
        weights, ids, stats = moe_route(np.empty((0, 4), np.float32), **options)
        assert weights.shape == ids.shape == (0, 2)
        assert stats.expert_counts.tolist() == stats.dropped.tolist() == [0] * 4
        assert stats.load_balancing_loss == 0 and stats.z_loss == 0


def test_losses_of_hostile_logits_are_no_nan() -> None:
    """The clamp holds for the losses too; a square that float32 cannot hold is infinite."""
    for row, z in zip(HOSTILE, (0.0, math.inf, math.inf, math.inf, math.inf), strict=False):
        _, _, stats = moe_route(row[None], top_k=2, return_stats=True)
        assert not np.isnan(stats.load_balancing_loss) and stats.z_loss == np.float32(z)


# ---------------------------------------------------------------------------------------------------------------------
# libraries


@pytest.mark.torch
@pytest.mark.parametrize("dtype", DTYPES)
def test_torch_tensors(dtype: str) -> None:
    torch = pytest.importorskip("torch")
    logits = random(9, 8)
    given = torch.from_numpy(logits).to(getattr(torch, dtype))
    bias = torch.linspace(0, 0.1, 8)
    results = moe_route(given, top_k=2, e_score_correction_bias=bias, return_stats=True, scoring_func="sigmoid")
    expected = moe_route(
        given.float().numpy(), top_k=2, e_score_correction_bias=bias.numpy(), return_stats=True, scoring_func="sigmoid"
    )
    for a, b in zip((*results[:2], *results[2]), (*expected[:2], *expected[2]), strict=True):
        assert type(a) is torch.Tensor and a.shape == b.shape
        np.testing.assert_array_equal(a.numpy(), b)


@pytest.mark.jax
def test_jax_arrays() -> None:
    jax = pytest.importorskip("jax")
    logits = random(9, 8, dtype="bfloat16")
    results = moe_route(jax.device_put(logits, jax.devices("cpu")[0]), top_k=2, return_stats=True)
    expected = moe_route(logits, top_k=2, return_stats=True)
    for a, b in zip((*results[:2], *results[2]), (*expected[:2], *expected[2]), strict=True):
        assert isinstance(a, jax.Array) and a.shape == b.shape and a.dtype == b.dtype
        np.testing.assert_array_equal(np.asarray(a), b)


def test_two_runs_give_the_same_bits() -> None:
    logits = random(500, 64)
    for a, b in zip(*(moe_route(logits, top_k=4) for _ in range(2)), strict=True):
        np.testing.assert_array_equal(a, b)
