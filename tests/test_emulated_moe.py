"""The kernels of the mixture of experts, run on the CPU: numbers, bits, edges of memory, waits that are not there."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import moe_plans
import numpy as np
import pytest
from emulate import EmulationError, missing
from emulated_moe import Machine, bf16

from flashmoe_cupy import reference
from flashmoe_cupy.dtypes import INT32
from flashmoe_cupy.jit import source
from flashmoe_cupy.jit.device import H100
from flashmoe_cupy.plan.kernels import linked
from flashmoe_cupy.plan.moe import steps as moe
from flashmoe_cupy.plan.moe.routing import PermuteProblem
from flashmoe_cupy.plan.moe.tiles import (
    TILE_8X64,
    TILE_8X64_TWICE,
    TILE_8X96,
    TILE_64X64,
    TILE_64X128,
    TILE_64X128_SHORT_STEPS,
    TILE_128X192_PING_PONG,
    TILE_128X256,
    TILES_SM80,
    TILES_SM80_FP32,
    GemmSm80Config,
    GemmSm90Config,
)
from flashmoe_cupy.plan.operation import Workspace
from flashmoe_cupy.testing import TOLERANCES, relative_error, row_error
from flashmoe_cupy.testing_moe import MoECase, RouteCase

pytestmark = [pytest.mark.slow, pytest.mark.skipif(missing() is not None, reason=missing() or "")]

SEEDS = (0, 1, 4, 7)
ALONE = (*TILE_128X256[:4], 1, False)  # the same without a cluster
TILES = (TILE_128X256, ALONE, TILE_8X96, TILE_64X128_SHORT_STEPS, TILE_64X128)
HOPPER = [GemmSm90Config("bf16", *tile, gather=True, gated=True) for tile in TILES]
SECOND = [  # of second products only
    GemmSm90Config("bf16", *tile, gather=False, gated=False)
    for tile in (TILE_128X192_PING_PONG, TILE_64X64, TILE_8X64_TWICE, TILE_8X64)
]
PLAIN = SECOND[0]
PORTABLE = [GemmSm80Config("bf16", *tile, gated=True) for tile in TILES_SM80]
PORTABLE += [GemmSm80Config("fp32", *tile, gated=True) for tile in TILES_SM80_FP32]
CLAMPING: list[GemmSm90Config | GemmSm80Config] = [HOPPER[-1], PORTABLE[2], PORTABLE[-1]]  # those that run clamps


def machine(config: GemmSm90Config | GemmSm80Config, seed: int = 0) -> Machine:
    name = "grouped_gemm_sm90" if isinstance(config, GemmSm90Config) else "grouped_gemm_sm80"
    return Machine(name, config, seed)


def judge(got: Any, want: Any, dtype: str) -> None:
    """A dot product's error is that of its rounding to the dtype, twice: the activation and the result."""
    tolerance = TOLERANCES[dtype]
    out = got.astype(np.float64)
    assert relative_error(out, want) <= tolerance.norm
    assert row_error(out, want) <= tolerance.row


EXPERTS = (
    MoECase(150, 72, 136, 3, 2, biases="float32", sentinels=0.2),
    MoECase(70, 200, 264, 5, 3, activation="gelu", routing="zipf", biases="same"),
    MoECase(9, 136, 40, 4, 2, activation="swigluoai", interleaved=True, weight_on_input=True, shared=24),
    MoECase(700, 136, 264, 3, 2, routing="zipf"),  # several tiles of rows of an expert, odd numbers of them too
    MoECase(7, 136, 200, 5, 4, global_experts=9, sentinels=0.2, biases="same"),  # sorted by the products and the sum
    MoECase(16, 72, 136, 2, 2, shared=24),  # the same, and all rows of both experts
)


@pytest.mark.parametrize("config", [*HOPPER, *SECOND, *PORTABLE], ids=lambda c: c.name)
def test_experts(config: GemmSm90Config | GemmSm80Config) -> None:
    """Every tile on problems that do not fill it, in several orders of warps and asynchronous work: the same bits."""
    dtype = {"bf16": "bfloat16", "fp32": "float32"}[config.element]
    for case in EXPERTS:
        case = case._replace(dtype=dtype)
        arrays = case.random()
        want = reference.fused_moe(**arrays, **case.options())
        machines = [machine(config, seed) for seed in SEEDS]
        machines[-1].sms = 7  # three clusters, which take tiles as they come
        results = [here.fused_moe(arrays, **case.options()) for here in machines]
        judge(results[0], want, dtype)
        for other in results[1:]:
            assert np.array_equal(other.view(np.uint8), results[0].view(np.uint8))


@pytest.mark.parametrize("config", [HOPPER[2], SECOND[2], SECOND[3]], ids=lambda c: c.name)
def test_few_assignments_that_a_launch_permutes(config: GemmSm90Config, monkeypatch: pytest.MonkeyPatch) -> None:
    """As for large experts on fast memory; the same bits as where the products sort them."""
    for case in EXPERTS[-2:]:
        arrays = case.random()
        alone = [machine(config, seed).fused_moe(arrays, **case.options()) for seed in SEEDS]
        with monkeypatch.context() as patch:
            patch.setattr(moe, "permutes_few", lambda *_: True)
            permuted = [machine(config, seed).fused_moe(arrays, **case.options()) for seed in SEEDS]
        judge(permuted[0], reference.fused_moe(**arrays, **case.options()), case.dtype)
        for other in (*alone, *permuted):
            assert np.array_equal(other.view(np.uint8), permuted[0].view(np.uint8))


ACTIVATIONS = ("swiglu", "geglu", "geglu_tanh", "swigluoai", "gelu", "gelu_tanh", "relu", "relu2")


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_activations(activation: str, dtype: str) -> None:
    case = MoECase(20, 64, 64, 4, 2, dtype, activation, biases="float32")
    arrays = case.random()
    config = PORTABLE[-1] if dtype == "float32" else HOPPER[-1]
    judge(machine(config).fused_moe(arrays, **case.options()), reference.fused_moe(**arrays, **case.options()), dtype)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations_of_odd_values(activation: str) -> None:
    """One expert whose gate rows are single values of x: huge ones, infinities and NaN stay with the value itself."""
    finite = [-3e38, -1e20, -90.0, -41.5, -40.0, -1e-30, 0.0, 1e-3, 9.0, 88.0, 1e18, 7.0]
    odd = np.array([*finite, np.inf, -np.inf, np.nan, 1.0])
    x = bf16(np.concatenate([odd[:, None], np.ones((16, 1)), np.zeros((16, 14))], 1))
    gated = activation in ("swiglu", "geglu", "geglu_tanh", "swigluoai")
    w1 = np.zeros((1, 32 if gated else 16, 16), np.float32)
    w1[0, :8, 0] = 1  # gates, or all there is: the odd value
    if gated:
        w1[0, 16:, 1] = 1  # up: 1
    w2 = np.zeros((1, 16, 16), np.float32)
    w2[0, 0, 0] = 1
    arrays: dict[str, Any] = {
        "x": x, "w_gate_up": bf16(w1), "w_down": bf16(w2), "topk_weights": np.ones((16, 1), np.float32),
        "topk_ids": np.zeros((16, 1), np.int32),
    }  # fmt: skip
    got = machine(HOPPER[-1]).fused_moe(arrays, activation=activation)[:, 0].astype(np.float64)
    with np.errstate(all="ignore"):
        want = reference.fused_moe(**arrays, activation=activation)[:, 0]
    np.testing.assert_allclose(got[:12], want[:12], rtol=2e-2, atol=1e-10)
    assert not np.isfinite(got[12:14]).all() and np.isnan(got[14]) and np.isclose(got[15], want[15], rtol=2e-2)


@pytest.mark.parametrize("config", CLAMPING, ids=lambda c: c.name)
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("activation", ["swiglu", "swigluoai"])
def test_both_sides_of_every_clamp(
    activation: str, interleaved: bool, config: GemmSm90Config | GemmSm80Config
) -> None:
    """All pairs of gates and up values within the limit and beyond it; experts 1 and 2 make a gate or up value NaN."""
    pairs = [(g, u) for g in (-9.0, -1.5, -0.5, 0.875, 1.5, 6.0) for u in (-5.0, -1.25, -0.75, 0.75, 1.25, 4.0)]
    x = np.zeros((38, 16), np.float32)
    x[:, :2] = [*pairs, (0.5, 0.5), (0.5, 0.5)]
    gate, up = (slice(0, None, 2), slice(1, None, 2)) if interleaved else (slice(16), slice(16, None))
    w1, w2, b1 = np.zeros((3, 32, 16)), np.zeros((3, 16, 16)), np.zeros((3, 32), np.float32)
    w1[:, gate, 0] = w1[:, up, 1] = w2[:, 0, 0] = 1
    b1[1, gate] = b1[2, up] = np.nan
    kind = np.dtype(np.float32) if config.element == "fp32" else bf16(x).dtype
    arrays: dict[str, Any] = {
        "x": x.astype(kind), "w_gate_up": w1.astype(kind), "w_down": w2.astype(kind), "b_gate_up": b1,
        "topk_weights": np.ones((38, 1), np.float32), "topk_ids": np.array([0] * 36 + [1, 2], np.int32)[:, None],
    }  # fmt: skip
    options: dict[str, Any] = {"activation": activation, "swiglu_limit": 1.0, "interleaved": interleaved}
    if activation == "swigluoai":
        options["swiglu_alpha"] = 1.25
    got = machine(config).fused_moe(arrays, **options)[:, 0].astype(np.float64)
    want = reference.fused_moe(**arrays, **options)[:, 0]
    assert np.isnan(want).tolist() == [False] * 36 + [True] * 2
    np.testing.assert_allclose(got, want, rtol=1e-2 if config.element == "bf16" else 2e-6, atol=1e-7)


LAYERS = (
    MoECase(1, experts=160, top_k=8), MoECase(7, experts=1, top_k=1), MoECase(129, experts=5, routing="one"),
    MoECase(40, experts=384, top_k=8, shared=40, shared_gate="float32"), MoECase(33, routing="duplicates", top_k=5),
    MoECase(21, experts=4, global_experts=16, top_k=6, ids_dtype="int64", sentinels=0.3, weights_dtype="same"),
    MoECase(600, 64, 64, 40, 8, routing="zipf"), MoECase(12, sentinels=1.0),
    MoECase(2300, 16, 264, 1, 1),  # more tiles of rows than a section has
    # few assignments, which no kernel sorts
    MoECase(4, 72, 136, 12, 8), MoECase(32, 40, 72, 9, 1, "float16", "gelu", biases="same"),
    MoECase(1, experts=1000, top_k=32), MoECase(7, 64, 64, 2, 4, routing="one"),
    MoECase(5, experts=4, global_experts=16, top_k=6, ids_dtype="int64", sentinels=0.4),
    MoECase(3, top_k=5, routing="duplicates", shared=40, batch_invariant=True), MoECase(4, top_k=2, sentinels=1.0),
)  # fmt: skip


@pytest.mark.parametrize("case", LAYERS, ids=str)
@pytest.mark.parametrize("kernel", ["grouped_gemm_sm90", "grouped_gemm_sm80"])
def test_layers(case: MoECase, kernel: str) -> None:
    """Counts, ids and weights of all kinds, with the configurations that the plan chooses."""
    arrays = case.random()
    got = Machine(kernel, seed=4).fused_moe(arrays, **case.options())
    judge(got, reference.fused_moe(**arrays, **case.options()), case.dtype)


def test_a_token_alone_and_among_others() -> None:
    """batch_invariant: the same bits. The rows of a tile do not see each other, whatever the configuration."""
    case = MoECase(90, 136, 72, 6, 3, batch_invariant=True)
    arrays = case.random()
    for kernel in ("grouped_gemm_sm90", "grouped_gemm_sm80"):
        together = Machine(kernel).fused_moe(arrays, **case.options())
        for t in (0, 41, 89):
            alone = {n: x[t : t + 1] if n in ("x", "topk_ids", "topk_weights") else x for n, x in arrays.items()}
            assert np.array_equal(Machine(kernel).fused_moe(alone, **case.options())[0], together[t])


ROUTES = (
    RouteCase(13, 16, 4), RouteCase(5, 1, 1), RouteCase(2, 2, 1), RouteCase(1, 4, 1, "bfloat16"),
    RouteCase(6, 1000, 32, scoring_func="sqrtsoftplus", logits="ties"),
    RouteCase(9, 160, 6, "bfloat16", num_expert_group=8, topk_group=3),
    RouteCase(11, 256, 8, "float16", "sigmoid", True, 2.5, "float32", 8, 4),
    RouteCase(33, 5, 5, logits="wild"), RouteCase(17, 64, 8, renormalize=True, logits="peaked"),
    RouteCase(40, 8, 2, capacity_factor=0.7), RouteCase(12, 96, 32, bias="same", logits="equal"),
    RouteCase(8, 12, 3, scoring_func="sigmoid", bias="float32", num_expert_group=12, topk_group=5),
    RouteCase(7, 512, 6, num_expert_group=128, topk_group=40, logits="ties"),
    RouteCase(5, 200, 9, scoring_func="sigmoid", bias="float32", num_expert_group=50, topk_group=11),
)  # fmt: skip


@pytest.mark.parametrize("case", ROUTES, ids=str)
def test_router(case: RouteCase) -> None:
    """The reference's choice exactly, weights and losses to rounding; with and without statistics the same."""
    arrays = case.random()
    weights, ids, stats = reference.moe_route(**arrays, **case.options(), return_stats=True)
    with np.errstate(over="ignore"):
        z_loss = np.float32(stats.z_loss)
    for seed in (0, 4):
        for wanted in (False, True):
            got = Machine(seed=seed).route(arrays, **case.options(), return_stats=wanted)
            assert np.array_equal(got["topk_ids"], ids)
            np.testing.assert_allclose(got["topk_weights"], weights, rtol=2e-6, atol=2e-7)
        assert np.array_equal(got["expert_counts"], stats.expert_counts)
        assert np.array_equal(got["dropped"], stats.dropped)
        np.testing.assert_allclose(got["load_balancing_loss"], stats.load_balancing_loss, rtol=1e-5)
        np.testing.assert_allclose(got["z_loss"], z_loss, rtol=1e-5)


@pytest.mark.parametrize("scoring_func", ["softmax", "sigmoid", "sqrtsoftplus"])
@pytest.mark.parametrize("bias", [False, True])
def test_a_nan_among_logits_counts_as_the_lowest_number(
    scoring_func: str, bias: bool, rng: np.random.Generator
) -> None:
    """One of a row, several and a row of them: the bits of -3.4e38 in their place, and the reference's choice."""
    logits = rng.standard_normal((6, 16), np.float32)
    logits[1, logits[1].argmax()] = logits[2, 3:] = logits[4] = np.nan
    lowest = np.where(np.isnan(logits), np.finfo(np.float32).min, logits)
    more: dict[str, Any] = {"e_score_correction_bias": rng.standard_normal(16, np.float32)} if bias else {}
    changes: list[dict[str, Any]] = [{}, {"renormalize": True}, {"num_expert_group": 4, "topk_group": 2}]
    options: dict[str, Any] = {"top_k": 4, "scoring_func": scoring_func}
    for change in changes:
        got = Machine().route({"logits": logits} | more, **options, **change)
        for name, other in Machine().route({"logits": lowest} | more, **options, **change).items():
            assert np.array_equal(got[name], other), name
        weights, ids = reference.moe_route(logits, **options, **change, **more)
        assert np.array_equal(got["topk_ids"], ids)
        np.testing.assert_allclose(got["topk_weights"], weights, rtol=2e-6, atol=1e-30)


IDS = [(7, 2, 5), (1, 8, 128), (1, 1, 1), (1100, 8, 40), (40, 3, 1030)]


@pytest.mark.parametrize(("tokens", "top_k", "experts"), IDS)
@pytest.mark.parametrize("wide", [False, True])
def test_permutation(tokens: int, top_k: int, experts: int, wide: bool, rng: np.random.Generator) -> None:
    ids = rng.integers(-1, experts + 1, (tokens, top_k)).astype(np.int64 if wide else np.int32)
    expert_map = rng.integers(-1, experts, experts).astype(np.int32) if wide else None
    want = reference.moe_permute(ids, num_experts=experts, expert_map=expert_map)
    got = Machine(seed=4).permute(ids, experts, expert_map)
    for name, array in got.items():
        assert np.array_equal(array, getattr(want, name)), name


def test_permutation_of_many_experts(rng: np.random.Generator) -> None:
    """More than the counters of one window hold, in several blocks."""
    ids = rng.integers(0, 9000, (5000, 1)).astype(np.int32)
    want = reference.moe_permute(ids, num_experts=9000)
    got = Machine().permute(ids, 9000)
    for name, array in got.items():
        assert np.array_equal(array, getattr(want, name)), name


@pytest.mark.parametrize("kernel", ["grouped_gemm_sm90", "grouped_gemm_sm80"])
def test_groups_in_buffers_of_one_size(kernel: str, rng: np.random.Generator) -> None:
    """DeepGEMM's masked layout, in larger buffers: rows behind the group's last are neither written nor wanted."""
    groups, most, d, n = 4, 70, 72, 136
    sizes = np.array([70, 0, 13, 65], np.int32)
    x = bf16(rng.standard_normal((groups, most + 5, d), np.float32))[:, :most]
    w = bf16(rng.standard_normal((groups, n, d), np.float32))
    before = bf16(np.full((groups, most + 9, n), 3.0, np.float32))
    out = before[:, :most]
    bias = rng.standard_normal((groups, n)).astype(np.float32)
    given = {"x": x, "w": w, "group_sizes": sizes, "bias": bias}
    got = Machine(kernel, seed=1).grouped_gemm(given, out)
    want = np.asarray(x, np.float64) @ np.asarray(w, np.float64).swapaxes(1, 2) + bias[:, None]
    for e, rows in enumerate(sizes):
        judge(got[e, :rows], want[e, :rows], "bfloat16")
        assert (got[e, rows:] == 3.0).all()


@pytest.mark.parametrize("kernel", ["grouped_gemm_sm90", "grouped_gemm_sm80"])
def test_gathered_rows(kernel: str, rng: np.random.Generator) -> None:
    """Indices outside of x give zeros, rows of no group stay, x has rows of its own stride."""
    d, n, rows = 136, 72, 150
    x = bf16(rng.standard_normal((33, d + 8), np.float32))[:, :d]
    w = bf16(rng.standard_normal((3, n, d), np.float32))
    gather = rng.integers(-2, 35, rows).astype(np.int32)
    offsets = np.array([4, 20, 20, 140], np.int32)
    out = bf16(np.full((rows, n), 3.0, np.float32))
    given = {"x": x, "w": w, "offsets": offsets, "gather_indices": gather}
    got = Machine(kernel, seed=4).grouped_gemm(given, out)
    inside = (gather >= 0) & (gather < 33)
    taken = np.where(inside[:, None], np.asarray(x, np.float64)[np.clip(gather, 0, 32)], 0.0)
    for e in range(3):
        part = slice(offsets[e], offsets[e + 1])
        judge(got[part], taken[part] @ np.asarray(w[e], np.float64).T, "bfloat16")
    assert (got[:4] == 3.0).all() and (got[140:] == 3.0).all()


@pytest.mark.parametrize("step", [1, 3])
def test_rows_that_start_anywhere(step: int, rng: np.random.Generator) -> None:
    """The portable kernel loads elements one by one where rows are not multiples of 16 bytes apart."""
    d, n = 72, 40
    x = bf16(rng.standard_normal((50, d + step), np.float32))[:, :d]
    w = bf16(rng.standard_normal((2, n, d + step), np.float32))[:, :, :d]
    out = bf16(np.zeros((50, n), np.float32))
    got = Machine("grouped_gemm_sm80").grouped_gemm({"x": x, "w": w, "offsets": np.array([0, 17, 50], np.int32)}, out)
    for e, part in enumerate((slice(0, 17), slice(17, 50))):
        judge(got[part], np.asarray(x[part], np.float64) @ np.asarray(w[e], np.float64).T, "bfloat16")


def error_of_groups(machine: Machine, k: int, n: int) -> float:
    """The error of groups of several tiles, of one tile and of no row."""
    rng = np.random.default_rng(k)
    ends = np.array([0, 420, 420, 550, 557], np.int32)
    x, w = (bf16(rng.standard_normal(shape, np.float32)) for shape in ((int(ends[-1]), k), (4, n, k)))
    got = machine.grouped_gemm({"x": x, "w": w, "offsets": ends}, bf16(np.zeros((len(x), n), np.float32)))
    parts = [x[a:b].astype(np.float64) @ w[e].astype(np.float64).T for e, (a, b) in enumerate(pairwise(ends))]
    return relative_error(got.astype(np.float64), np.concatenate(parts))


@pytest.mark.parametrize(("k", "n"), [(40, 200), (128, 384), (200, 264), (256, 776)])
def test_clusters_that_share_rows(k: int, n: int) -> None:
    """The columns are two blocks, or five and then rows are not shared; the last one is not full."""
    for seed in SEEDS:
        here = machine(PLAIN, seed)
        here.sms = 5  # two clusters
        assert error_of_groups(here, k, n) <= TOLERANCES["bfloat16"].norm


def test_half_of_shared_rows_would_be_missed() -> None:
    name = "moe/grouped_gemm_sm90.cuh"
    text = source.headers_for(f'#include "{name}"\n')[name]
    assert text.count("row + half);") == 1
    broken = machine(PLAIN)
    broken.headers = {name: text.replace("row + half);", "row);")}
    assert not error_of_groups(broken, 128, 384) <= TOLERANCES["bfloat16"].norm


@pytest.mark.parametrize("config", HOPPER, ids=lambda c: c.name)
@pytest.mark.parametrize("columns", [40, 264])
def test_rows_are_counted(config: GemmSm90Config, columns: int) -> None:
    """All rows of all experts, once for each tile along the columns: the second product would wait for more."""
    case = MoECase(300, 72, columns, 5, 2, routing="zipf", sentinels=0.2)
    arrays, here = case.random(), machine(config)
    here.fused_moe(arrays, **case.options())
    per_tile = here.counts[0]
    assert per_tile == -(-columns // (config.block_n // 2))
    counts = np.bincount(arrays["topk_ids"].reshape(-1).clip(-1, 5) + 1, minlength=7)[1:6]
    done = here.left["counters"].view(np.uint32)[2:7]
    assert np.array_equal(done, counts * per_tile)


FAULTS = {
    "a step is released before its products are done": ("wait_for_products<1>(r_out);", ""),
    "rows are reported before they have landed": (
        "cp_async_mbarrier_arrive_noinc(rings.steps.full(at.stage));", "mbarrier_arrive(rings.steps.full(at.stage));",
    ),
    "no fence between copies and products": ("if constexpr (kGather) fence_proxy_async();", ""),
    "the last rows of a group are stored whole": ("p.out_stride, 0, rows, p.n - col", "p.out_stride, 16, p.n - col"),
    "the loader does not wait": ("rings.steps.wait_empty(at);\n          mbarrier", "mbarrier"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_faults_are_found(fault: str) -> None:
    """With one wait, fence or bound less, some seed gives wrong numbers or a report."""
    name = "moe/grouped_gemm_sm90.cuh"
    text = source.headers_for(f'#include "{name}"\n')[name]
    old, new = FAULTS[fault]
    assert text.count(old) == 1
    case = MoECase(150, 520, 136, 3, 2)
    arrays = case.random()
    want = reference.fused_moe(**arrays, **case.options())
    for seed in (1, 3, *range(4, 10)):
        try:
            broken = machine(HOPPER[1], seed)
            broken.headers = {name: text.replace(old, new)}
            got = broken.fused_moe(arrays, **case.options())
        except EmulationError:
            return
        if not relative_error(got.astype(np.float64), want) <= TOLERANCES["bfloat16"].norm:
            return
    pytest.fail("nobody noticed")


def test_plan_and_kernels_count_the_same_blocks() -> None:
    """The permutation's grid covers all assignments, and its counts have room for all blocks."""
    for assignments in (1, 4096, 4097, 10_000, 2_097_152, 2**31 - 1):
        work = Workspace()
        problem = PermuteProblem(INT32, assignments, 1, 1, 7, -1)
        steps = moe.permute_steps(problem, work)
        values: Any = steps[-1].values
        per_warp = values["per_warp"]
        grid = steps[-1].problem.blocks
        assert per_warp % 32 == 0 and (grid - 1) * 16 * per_warp < assignments <= grid * 16 * per_warp
        assert len(steps) == (1 if grid == 1 else 2)


@pytest.mark.parametrize(
    ("case", "arch", "aligned", "counts"),
    [
        (MoECase(64, 64, 768, 128, 8), "sm_90a", True, 12), (MoECase(64, 64, 760, 128, 8), "sm_90a", True, 12),
        (MoECase(64, 64, 768, 128, 8), "sm_90a", False, 0),  # the portable kernel does not count
        (MoECase(64, 64, 768, 128, 8), "sm_80", True, 0), (MoECase(64, 64, 768, 128, 8, "float32"), "sm_90a", True, 0),
        (MoECase(4, 64, 768, 128, 8), "sm_90a", True, 0),  # so few that nobody sorts, and nobody clears counters
        (MoECase(4096, 64, 768, 128, 8), "sm_90a", True, 6), (MoECase(4096, 64, 200, 128, 8), "sm_90a", True, 2),
        (MoECase(64, 64, 768, 128, 8, batch_invariant=True), "sm_90a", True, 6),
        (MoECase(4096, 64, 768, 8, 2), "sm_90a", True, 0),  # so few groups that most are not complete before the end
    ],
)  # fmt: skip
def test_groups_are_awaited_where_there_are_many(case: MoECase, arch: str, aligned: bool, counts: int) -> None:
    steps, _ = moe_plans.steps(case)
    products = [s.problem for s in linked(steps, arch, aligned, H100) if s.task == "grouped_gemm"]
    assert [(p.counts_rows, p.counts_of_x) for p in products] == [(counts > 0, 0), (False, counts)]
