"""The truth of the GPU tests for mixtures of experts against the float64 reference, and that its rules see faults."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from gpu_moe_kit import (
    Arrays,
    Guarded,
    Known,
    Tensor,
    agree,
    experts,
    judge,
    known_experts,
    known_products,
    load_balancing,
    permutation,
    product_tensors,
    products,
    route,
    same_bits,
    tensors,
)
from moe_plans import ProductCase
from test_gpu_moe_route import drawn, drop, judge_stats
from test_gpu_moe_route import judge as judge_route

from flashmoe_cupy import fused_moe, moe_route, reference
from flashmoe_cupy.testing_moe import LOGITS, ROUTINGS, MoECase, RouteCase

torch: Any = pytest.importorskip("torch")
pytestmark = pytest.mark.torch

GATED = ("swiglu", "geglu", "geglu_tanh", "swigluoai")
EVERYTHING: dict[str, Any] = {"biases": "same", "shared": 24, "shared_gate": "float32", "sentinels": 0.3}
MOE = [
    *(MoECase(20, 24, 16, 5, 2, activation=a, interleaved=i) for a in GATED for i in (False, True)),
    *(MoECase(20, 24, 16, 5, 2, activation=a, biases="float32") for a in ("gelu", "gelu_tanh", "relu", "relu2")),
    *(MoECase(20, 24, 16, 6, 3, routing=r, global_experts=g, **EVERYTHING) for r in ROUTINGS for g in (0, 11)),
    MoECase(9, 24, 16, 3, 3, weight_on_input=True, **EVERYTHING),
    MoECase(9, 24, 16, 3, 1, weight_on_input=True, activation="relu2", weights_dtype="same", ids_dtype="int64"),
    MoECase(0, 24, 16),
    MoECase(1, 8, 8, 1, 1, swiglu_limit=0.3, activation="swigluoai", swiglu_alpha=-1.0),
]


def as_float64(t: Arrays) -> Arrays:
    """NumPy arrays, floats in float64."""
    return {n: (x.double() if x.dtype.is_floating_point else x).numpy() for n, x in t.items()}


@pytest.mark.parametrize("case", MOE, ids=str)
def test_experts_equal_the_reference(case: MoECase) -> None:
    case = case._replace(dtype="float32")
    t = tensors(case, "cpu")
    out = experts(**t, **case.options(), dtype=torch.float64)
    ref = reference.fused_moe(**as_float64(t), **case.options())
    np.testing.assert_allclose(out.numpy(), ref, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_the_same_problem_from_numpy(dtype: str) -> None:
    """Problems as users draw them: float32 is exact for their 16-bit numbers, and what is rounded has their error."""
    case = MoECase(33, 24, 16, 5, 2, dtype, **EVERYTHING)
    arrays = {n: a.astype(np.float64) if a.dtype.kind not in "iu" else a for n, a in case.random().items()}
    kinds = {n: getattr(torch, d) for n, _, d in case.shapes()}
    t = {n: torch.from_numpy(a).to(kinds.get(n, torch.int32)) for n, a in arrays.items()}
    ref = torch.from_numpy(reference.fused_moe(**arrays, **case.options()))
    known = known_experts(t, **case.options())
    assert float((known.exact - ref).norm() / ref.norm()) < 1e-6
    assert known.rounded is not None
    step = torch.finfo(getattr(torch, dtype)).eps / 2
    rounded = float((known.rounded.double() - ref).norm() / ref.norm())
    assert 0.1 * step < rounded < step
    assert judge(known.rounded.to(kinds["x"]), known, kinds["x"]) == []


def test_where_values_are_rounded() -> None:
    """257 is no bfloat16 number: h is not rounded, the activation and the result of an expert are."""
    x, w1, w2 = (torch.zeros(shape, dtype=torch.bfloat16) for shape in ((1, 8), (1, 8, 8), (1, 8, 8)))
    x[0, :2] = torch.tensor([256.0, 1.0])
    w1[0, 0, :2], w2[0, 0, 0] = 1, 1
    call: Arrays = {"x": x, "w_gate_up": w1, "w_down": w2, "topk_weights": torch.ones(1, 1)}
    call |= {"topk_ids": torch.zeros((1, 1), dtype=torch.int32), "activation": "relu", "dtype": torch.float32}
    one = torch.tensor([[1.0] + [0.0] * 7])
    assert float(experts(**call, rounded=True)[0, 0]) == 256.0 and float(experts(**call)[0, 0]) == 257.0
    assert float(experts(**call, rounded=True, b_gate_up=one)[0, 0]) == 258.0
    assert float(experts(**call, rounded=True, b_down=one)[0, 0]) == 256.0
    call["topk_weights"] = torch.full((1, 1), 257.0)
    assert float(experts(**call, rounded=True)[0, 0]) == 257.0 * 256.0


PRODUCTS = [
    ProductCase((5, 0, 3), 16, 24, bias="same", head=2, tail=3),
    ProductCase((5, 0, 30), 16, 24, bias="float32", x_rows=9, tail=1),
    ProductCase((5, 0, 3), 16, 24, bias="same", max_rows=6),
    ProductCase((0,), 8, 8),
]


@pytest.mark.parametrize("case", PRODUCTS, ids=str)
def test_products_equal_the_reference(case: ProductCase) -> None:
    t = product_tensors(case._replace(dtype="float32"), "cpu")
    out, mine = products(**t, dtype=torch.float64)
    ref = reference.grouped_gemm(**as_float64(t))
    np.testing.assert_allclose(out.numpy(), ref, rtol=1e-12, atol=1e-12)
    untouched = reference.grouped_gemm(**as_float64(t), out=np.full(out.shape, np.nan))
    np.testing.assert_array_equal(mine.numpy(), ~np.isnan(untouched).any(-1))
    known, _ = known_products(t)
    assert known.low is None and same_bits(known.exact, out[mine])


ROUTES = [
    RouteCase(60, 24, 5, "float32", scoring, renormalize, 1.5, bias, groups, groups // 2 or 1, capacity, kind, seed=i)
    for i, (scoring, renormalize, bias, groups, capacity) in enumerate(
        (s, r, b, g, c)
        for s in ("softmax", "sigmoid", "sqrtsoftplus")
        for r, b in ((False, ""), (True, ""), (True, "float32"))
        for g, c in ((1, None), (4, 0.8), (8, None))
    )
    for kind in LOGITS[i % 3 :: 3]
    if not (bias and kind == "wild")
]


@pytest.mark.parametrize("case", ROUTES, ids=str)
def test_routes_equal_the_reference(case: RouteCase) -> None:
    t, options = drawn(case, "cpu"), case.options()
    ref = reference.moe_route(**case.random(), **options, return_stats=True)
    truth = route(**t, **{n: o for n, o in options.items() if n != "capacity_factor"})
    assert bool(truth.clear.all()), "the problem is drawn clear"
    gone = drop(case, truth)
    np.testing.assert_array_equal(torch.where(gone, -1, truth.ids).numpy(), ref[1])
    np.testing.assert_allclose(torch.where(gone, 0.0, truth.weights).numpy(), ref[0], rtol=1e-12, atol=1e-300)
    loss = load_balancing(truth.p, truth.ids, case.experts)
    np.testing.assert_allclose(float(loss), ref[2].load_balancing_loss, rtol=1e-12)
    np.testing.assert_allclose(float(truth.lse.square().mean()), ref[2].z_loss, rtol=1e-12)


def test_the_router_knows_what_rounding_may_change() -> None:
    """Two scores 1e-9 apart: not clear for experts, nor for groups; equal ones are, and so is what is not chosen."""
    logits = torch.zeros((1, 8), dtype=torch.float64)
    bias = torch.tensor([3.0, 2.0, 1.0, 0.5, 0.0, -1.0, -2.0, -3.0], dtype=torch.float64)
    options: dict[str, Any] = {"top_k": 2, "scoring_func": "sigmoid"}
    assert bool(route(logits, e_score_correction_bias=bias, **options).clear)
    for at, near, clear in ((1, 1.0 + 1e-9, False), (1, 1.0, True), (4, 0.5 + 1e-9, True), (0, 2.0 + 1e-9, False)):
        other = bias.clone()
        other[at] = near
        assert bool(route(logits, e_score_correction_bias=other, **options).clear) is clear, (at, near)
    groups: dict[str, Any] = {"num_expert_group": 4, "topk_group": 1}
    for sixth, clear in ((4.0, True), (6.0 + 1e-9, False), (6.0, True)):
        other = torch.tensor([3.0, 2.0, 1.0, 0.5, -1.0, sixth, -2.0, -3.0], dtype=torch.float64)
        assert bool(route(logits, e_score_correction_bias=other, **options, **groups).clear) is clear, sixth


@pytest.mark.parametrize("mapped", [False, True])
def test_permutations_equal_the_reference(mapped: bool) -> None:
    for seed, (tokens, k, e) in enumerate(((0, 2, 3), (1, 1, 1), (50, 3, 7), (9, 4, 100))):
        rng = np.random.default_rng(seed)
        ids = rng.integers(-2, e + 3, (tokens, k))
        table = rng.permutation(e + 1).astype(np.int32) - 1 if mapped else None
        ref = reference.moe_permute(ids, num_experts=e, expert_map=table)
        other = None if table is None else torch.from_numpy(table)
        found = permutation(torch.from_numpy(ids), num_experts=e, expert_map=other)
        for mine, want in zip(found, ref, strict=True):
            np.testing.assert_array_equal(mine.numpy(), want)
            assert mine.dtype == torch.int32


# ---------------------------------------------------------------------------------------------------------------------
# faults that the rules must see

CASE = MoECase(200, 128, 128, 8, 2)


def half_of_one_product(t: Arrays, out: Tensor, known: Known) -> None:
    """One token's first product misses its last 16 columns."""
    cut = t | {"x": t["x"].clone()}
    cut["x"][77, -16:] = 0
    out[77] = known_experts(cut).exact[77]


def one_expert_less(t: Arrays, out: Tensor, known: Known) -> None:
    less = t | {"topk_ids": t["topk_ids"].clone()}
    less["topk_ids"][5, 1] = -1
    out[5] = experts(**less, dtype=torch.float32)[5]


def two_rows_swapped(t: Arrays, out: Tensor, known: Known) -> None:
    out[[3, 4]] = out[[4, 3]]


def weights_in_low_precision(t: Arrays, out: Tensor, known: Known) -> None:
    """Sums as bfloat16 would add them."""
    out.copy_(known.low)


def a_missing_nan(t: Arrays, out: Tensor, known: Known) -> None:
    out[9, 3] = math.nan


FAULTS = (half_of_one_product, one_expert_less, two_rows_swapped, weights_in_low_precision, a_missing_nan)


@pytest.mark.parametrize("fault", FAULTS, ids=lambda f: f.__name__)
def test_judge_sees_faults(fault: Callable[[Arrays, Tensor, Known], None]) -> None:
    t = tensors(CASE, "cpu")
    known = known_experts(t)
    out = known.exact.to(torch.bfloat16)
    assert judge(out, known, out.dtype) == []
    fault(t, out, known)
    assert judge(out, known, out.dtype) != []


def test_judge_sees_shapes_and_dtypes() -> None:
    t = tensors(CASE, "cpu")
    known = known_experts(t)
    assert judge(known.exact, known, torch.bfloat16) != []
    assert judge(known.exact.to(torch.bfloat16)[1:], known, torch.bfloat16) != []


def test_judge_sees_low_precision_in_float32() -> None:
    """Products of rounded numbers, as TF32 would give them."""
    t = tensors(CASE._replace(dtype="float32"), "cpu")
    known = known_experts(t)
    assert judge(fused_moe(**t), known, torch.float32) == []
    low = t | {n: t[n].half().float() for n in ("x", "w_gate_up", "w_down")}
    assert judge(fused_moe(**low), known, torch.float32) != []


def test_router_rules_see_faults() -> None:
    case = RouteCase(60, 24, 5, "float32", "sigmoid", bias="float32", capacity_factor=0.8)
    t, options = drawn(case, "cpu"), case.options()
    truth = route(**t, **{n: o for n, o in options.items() if n != "capacity_factor"})
    weights, ids, stats = moe_route(**t, **options, return_stats=True)
    assert judge_route(case, truth, weights, ids) == [] and judge_stats(case, truth, ids, stats) == []
    assert bool((ids == -1).any())
    for n in range(4):
        w, i = weights.clone(), ids.clone()
        if n < 2:
            i[7] = i[7].flip(0) if n else i[7] % 23 + 1
        else:
            w[8, 0] = (w[8, 0] + 1e-6) * (1 + 3e-5) if n == 2 else math.nan
        assert judge_route(case, truth, w, i) != [], n
    for name in stats._fields:
        assert judge_stats(case, truth, ids, stats._replace(**{name: getattr(stats, name) + 1})) != [], name


def test_comparisons_see_one_bit_and_guards_one_row() -> None:
    a = torch.randn(3, 8, dtype=torch.bfloat16)
    b = a.clone()
    assert same_bits(a, b) and agree(a, b)
    b.view(torch.int16)[2, 7] ^= 1
    assert not same_bits(a, b) and not same_bits(a, a.float()) and not agree(a, 1.1 * a)
    guarded = Guarded.like((3, 8), torch.bfloat16, "cpu")
    guarded.out.copy_(a)
    assert guarded.intact()
    guarded.whole[-1, 0] = 0
    assert not guarded.intact()


def test_what_takes_part_in_nothing_is_nan() -> None:
    case = MoECase(60, 24, 16, 12, 2, routing="one", sentinels=0.5, biases="same")
    t = tensors(case, "cpu")
    here = (t["topk_ids"] >= 0) & (t["topk_ids"] < 12)
    assert torch.equal(t["topk_weights"].isnan(), ~here)
    assert torch.equal(t["x"].isnan().all(1), ~here.any(1)) and bool((~here.any(1)).any())
    used = int(t["topk_ids"][here][0])
    for name in ("w_gate_up", "w_down", "b_gate_up", "b_down"):
        assert int(t[name].isnan().flatten(1).all(1).sum()) == 11 and not bool(t[name][used].isnan().any())
