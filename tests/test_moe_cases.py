"""The random problems of testing_moe: scale, routing, reproducibility, and choices that float32 makes like float64."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from flashmoe_cupy import reference
from flashmoe_cupy.testing_moe import LOGITS, ROUTINGS, MoECase, RouteCase

Array = Any  # NumPy arrays; Any, so that dicts of arguments may be unpacked

BASE = MoECase(64, 48, 40, experts=6, top_k=3)
ACTIVATIONS = ("swiglu", "geglu", "geglu_tanh", "swigluoai", "gelu", "gelu_tanh", "relu", "relu2")
MOE_CASES = [
    *(BASE._replace(activation=name) for name in ACTIVATIONS),
    *(BASE._replace(routing=name) for name in ROUTINGS),
    BASE._replace(dtype="float16", weights_dtype="same", ids_dtype="int64", interleaved=True),
    BASE._replace(dtype="float32", biases="same"),
    BASE._replace(biases="float32", activation="swigluoai", interleaved=True, swiglu_limit=1.0, swiglu_alpha=1.5),
    BASE._replace(weight_on_input=True, dtype="float32"),
    BASE._replace(weight_on_input=True, routing="one"),
    BASE._replace(weight_on_input=True, activation="relu"),
    BASE._replace(global_experts=9),
    BASE._replace(shared=24, shared_gate="float32", sentinels=0.2),
    BASE._replace(shared=24, batch_invariant=True, activation="gelu", seed=5),
    BASE._replace(tokens=64, experts=1, top_k=1),
]
ROUTE_CASES = [
    *(RouteCase(50, logits=kind, dtype=dtype) for kind in LOGITS for dtype in ("bfloat16", "float16", "float32")),
    *(
        RouteCase(50, logits=kind, scoring_func=function, bias="float32", num_expert_group=4, topk_group=2)
        for kind in LOGITS
        for function in ("softmax", "sigmoid", "sqrtsoftplus")
    ),
    RouteCase(50, 256, 8, "bfloat16", "sigmoid", True, 2.5, "float32", 8, 4),
    RouteCase(50, 12, 3, "float16", bias="same", num_expert_group=12, topk_group=5),
    RouteCase(50, 160, 6, num_expert_group=8, topk_group=3, routed_scaling_factor=16.0),
    RouteCase(50, 8, 2, logits="skewed", capacity_factor=1.0, renormalize=True),
    RouteCase(0, bias="float32"),
]


def same(a: dict[str, Array], b: dict[str, Array]) -> bool:
    return a.keys() == b.keys() and all(a[n].dtype == b[n].dtype and a[n].tobytes() == b[n].tobytes() for n in a)


def root_mean_square(a: Array) -> float:
    return float(np.sqrt(np.mean(np.square(a, dtype=np.float64))))


@pytest.mark.parametrize("case", MOE_CASES, ids=str)
def test_experts_give_outputs_of_unit_scale(case: MoECase) -> None:
    arrays = case.random()
    for name, shape, dtype in case.shapes():
        assert arrays[name].shape == shape and arrays[name].dtype.name == dtype
    assert arrays["topk_ids"].shape == (case.tokens, case.top_k) and arrays["topk_ids"].dtype == case.ids_dtype
    here = case.experts / case.known_experts  # the share of the assignments that a map leaves
    out = reference.fused_moe(**arrays, **case.options())
    assert 0.6 * here <= root_mean_square(out) <= 1.8


@pytest.mark.parametrize("case", [*MOE_CASES, *ROUTE_CASES], ids=str)
def test_a_case_prints_as_the_call_that_makes_it(case: MoECase | RouteCase) -> None:
    again = eval(str(case))
    assert again == case and hash(again) == hash(case)
    assert same(case.random(), again.random())
    if case.tokens and getattr(case, "logits", "") != "equal":
        assert not same(case.random(), case._replace(seed=case.seed + 1).random())


@pytest.mark.parametrize("routing", ROUTINGS)
def test_routing(routing: str) -> None:
    case = MoECase(500, experts=16, top_k=4, routing=routing)
    ids = case.indices()["topk_ids"]
    counts = np.sort(np.bincount(ids.ravel(), minlength=16))
    distinct = all(len({*row}) == 4 for row in ids)
    assert ids.min() >= 0 and ids.max() < 16 and counts.sum() == 2000
    assert distinct == (routing in ("uniform", "zipf", "balanced"))
    if routing == "one":
        assert counts[-1] == 2000
    elif routing == "balanced":
        assert counts[-1] - counts[0] <= 1
        assert len(np.unique(ids[:, 0])) == 4 and (ids[4:] != ids[:-4]).any()  # four patterns, in no order
    elif routing == "zipf":
        assert counts[-1] > 4 * counts[0] and counts[0] > 0
    else:
        assert counts[-1] < 2 * counts[0]


def test_sentinels_and_expert_maps() -> None:
    case = MoECase(500, experts=4, global_experts=7, top_k=4, sentinels=0.4)
    ids, expert_map = case.indices()["topk_ids"], case.indices()["expert_map"]
    assert 0.15 < np.mean(ids == -1) < 0.25 and 0.15 < np.mean(ids == 7) < 0.25
    assert expert_map.dtype == np.int32 and sorted(expert_map) == [-1, -1, -1, 0, 1, 2, 3]
    nobody = MoECase(9, sentinels=1.0).random()
    assert {*nobody["topk_ids"].ravel()} == {-1, 8} and (nobody["topk_weights"] > 0).all()


def test_the_clamp_and_the_biases_are_felt() -> None:
    case = MoECase(32, activation="swigluoai", swiglu_limit=1.0, biases="same")
    arrays = case.random()
    out = reference.fused_moe(**arrays, **case.options())
    for change in ({"swiglu_limit": 7.0}, {"swiglu_alpha": 1.0}, {"b_gate_up": None}, {"b_down": None}):
        other = reference.fused_moe(**(arrays | case.options() | change))
        assert root_mean_square(other - out) > 0.05


# -------------------------------------------------------------------------------------------------------------- routing


def in_float32(x: Array, bias: Array | None, case: RouteCase) -> list[list[int]]:
    """The chosen experts, in float32 throughout and in another order of operations than the reference."""
    highest = float(np.finfo(np.float32).max)
    x = np.nan_to_num(x.astype(np.float32), nan=-highest, posinf=highest, neginf=-highest)
    with np.errstate(all="ignore"):
        if case.scoring_func == "softmax":
            p = np.exp(x - x.max(1, keepdims=True))
            p *= np.float32(1) / np.cumsum(p, axis=1)[:, -1:]
        elif case.scoring_func == "sigmoid":
            p = np.float32(0.5) * np.tanh(np.float32(0.5) * x) + np.float32(0.5)
        else:
            p = np.sqrt(np.maximum(x, 0) + np.log1p(np.exp(-np.abs(x))))
    choice = x if bias is None else p + bias.astype(np.float32)
    assert choice.dtype == np.float32
    groups, size, ids = case.num_expert_group, case.experts // case.num_expert_group, []
    for c in choice:
        tops = [sorted(c[g * size : (g + 1) * size])[::-1][:2] for g in range(groups)]
        scores = [top[0] if bias is None else sum(top[1:], top[0]) for top in tops]
        kept = sorted(range(groups), key=lambda g: (-scores[g], g))[: case.topk_group]
        members = [e for e in range(case.experts) if e // size in kept]
        ids.append(sorted(members, key=lambda e: (-c[e], e))[: case.top_k])
    return ids


@pytest.mark.parametrize("case", ROUTE_CASES, ids=str)
def test_float32_chooses_like_float64(case: RouteCase) -> None:
    arrays = case.random()
    logits, bias = arrays["logits"], arrays.get("e_score_correction_bias")
    assert logits.shape == (case.tokens, case.experts) and logits.dtype.name == case.dtype
    assert (bias is not None) == bool(case.bias)
    assert bias is None or bias.dtype.name == (case.dtype if case.bias == "same" else case.bias)
    free = case._replace(capacity_factor=None)
    assert reference.moe_route(**arrays, **free.options())[1].tolist() == in_float32(logits, bias, case)
    _, ids, stats = reference.moe_route(**arrays, **case.options(), return_stats=True)
    assert stats.dropped.any() == (ids == -1).any() == (case.capacity_factor is not None)


def test_close_choices_are_drawn_again() -> None:
    """Without the margin, some of these rows hang on less; with one that no row keeps, the case says so."""
    case = RouteCase(300, 64, 8, bias="float32", scoring_func="sigmoid", num_expert_group=8, topk_group=4)
    loose, strict = case._replace(margin=0.0).random(), case._replace(margin=1e-3).random()
    moved = np.any(loose["logits"] != strict["logits"], axis=1)
    assert 10 < moved.sum() < 290
    smallest = []
    for arrays in (loose, strict):
        c = 1 / (1 + np.exp(-arrays["logits"].astype(np.float64))) + arrays["e_score_correction_bias"]
        ids = reference.moe_route(**arrays, **case.options())[1]
        smallest.append(-np.diff(np.take_along_axis(c, ids.astype(np.intp), axis=1)).max())
    assert smallest[0] < 1e-4 and smallest[1] > 5e-4
    with pytest.raises(ValueError, match="apart"):
        RouteCase(20, 256, 8, bias="float32", margin=0.5).random()


def test_kinds_of_logits() -> None:
    kinds = {kind: RouteCase(60, 32, logits=kind).random()["logits"] for kind in LOGITS}
    assert {*kinds["ties"].ravel()} == {-1.0, 0.0, 1.0}
    assert (kinds["equal"] == kinds["equal"][:, :1]).all() and len({*kinds["equal"][:, 0]}) == 60
    wild = kinds["wild"]
    assert np.isnan(wild[0]).all() and (wild[1] == -np.inf).all() and (wild[2] == np.inf).all()
    assert 0.7 < np.isfinite(wild[3:]).mean() < 0.9
    spread = kinds["peaked"].max(1) - kinds["peaked"].min(1)
    assert (spread > 110).all()  # exp(-110) is 0 in float32
    counts = reference.moe_route(kinds["skewed"], top_k=4, return_stats=True)[2].expert_counts
    assert counts[16:].sum() > 3 * counts[:16].sum()


def test_impossible_routings_are_refused() -> None:
    for case in (MoECase(4, routing="zip"), MoECase(4, experts=2, top_k=3)):
        with pytest.raises(ValueError, match="routing"):
            case.random()
