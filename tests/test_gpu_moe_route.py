"""`moe_route` and `moe_permute` on a GPU: every choice exact, ties and infinities included; weights and losses close.

With a bias, choices follow from rounded scores: tokens for which float64 sees two choices closer than float32 can tell
apart are left out of the comparison of ids, and they must be few. The checks take the device, so that
test_moe_checks.py runs some of them on the CPU.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable
from typing import Any

import pytest
from gpu_moe_kit import (
    Arrays,
    Routing,
    Sorted,
    Tensor,
    load_balancing,
    permutation,
    poison,
    route,
    same_bits,
    torch_dtype,
)
from moe_plans import compile_everything, register, steps

from flashmoe_cupy import moe_permute, moe_route
from flashmoe_cupy.testing_moe import LOGITS, RouteCase

torch: Any = pytest.importorskip("torch")
pytestmark = [pytest.mark.gpu, pytest.mark.torch]

DTYPES = ("float32", "bfloat16", "float16")
SCORING = ("softmax", "sigmoid", "sqrtsoftplus")
NEAR = 0.3  # share of tokens whose choice rounding may change, at most
EXPERTS = (1, 3, 5, 31, 32, 33, 64, 65, 128, 129, 160, 256, 257, 384, 512, 513, 1000, 1024)


@pytest.fixture(scope="module", autouse=True)
def _compiled() -> None:
    compile_everything()


# ---------------------------------------------------------------------------------------------------------------------
# running and judging


def drawn(case: RouteCase, device: str) -> Arrays:
    """Arrays of `moe_route`; large ones are drawn on the device, where they need not be clear."""
    if case.tokens * case.experts <= 1 << 16:
        from_numpy = {n: torch.from_numpy(a.astype("f4")).to(device) for n, a in case.random().items()}
        bias = case.dtype if case.bias == "same" else "float32"
        return {n: a.to(torch_dtype(case.dtype if n == "logits" else bias)) for n, a in from_numpy.items()}
    g = torch.Generator(device).manual_seed(case.seed)
    t = {"logits": torch.randn((case.tokens, case.experts), generator=g, device=device).to(torch_dtype(case.dtype))}
    if case.bias:
        spread = {"softmax": 1 / case.experts, "sigmoid": 0.2, "sqrtsoftplus": 0.4}[case.scoring_func]
        t["e_score_correction_bias"] = spread * torch.randn(case.experts, generator=g, device=device)
    return t


def drop(case: RouteCase, truth: Routing) -> Tensor:
    """(T, K) bool: assignments that their expert has no room for."""
    if case.capacity_factor is None:
        return torch.zeros_like(truth.ids, dtype=torch.bool)
    room = math.ceil(case.capacity_factor * case.tokens * case.top_k / case.experts)
    found = permutation(truth.ids, num_experts=case.experts)
    return found.inverse_indices - found.offsets[truth.ids] >= room


def judge(case: RouteCase, truth: Routing, weights: Tensor, ids: Tensor) -> list[str]:
    """What is wrong with a router's choice."""
    shape = (case.tokens, case.top_k)
    if tuple(weights.shape) != shape or tuple(ids.shape) != shape:
        return [f"shapes {tuple(weights.shape)} and {tuple(ids.shape)} instead of {shape}"]
    if weights.dtype != torch.float32 or ids.dtype != torch.int32:
        return [f"dtypes {weights.dtype} and {ids.dtype}"]
    dropped, clear, wrong = drop(case, truth), truth.clear, []
    if not bool(clear.all()):
        share = 1 - float(clear.double().mean())
        wrong += [] if share <= NEAR and case.capacity_factor is None else [f"{share:.0%} of the tokens are not clear"]
        outside = bool(((ids < 0) | (ids >= case.experts)).any())
        if outside or bool((ids.sort(1).values.diff(dim=1) == 0).any()):
            return [*wrong, "ids that are not distinct experts"]
        c, most = (truth.choice.gather(1, i.long())[~clear].sum(1) for i in (ids, truth.ids))
        if case.num_expert_group == 1 and not bool(torch.isclose(c, most, rtol=1e-5).all()):
            wrong.append("chose experts that are not the best")
    if not torch.equal(ids[clear], torch.where(dropped, -1, truth.ids)[clear].to(torch.int32)):
        wrong.append(f"{int((ids[clear] != truth.ids[clear]).any(1).sum())} tokens go to other experts")
    if not bool(weights.isfinite().all()):
        wrong.append("weights are not finite")
    want = torch.where(dropped, 0.0, truth.weights)[clear]
    # exp(-x) vanishes in float32 from x = 104 on: its square root is off by less than 1e-22, which a sum may divide
    small = torch.full_like(want[:, :1], 1e-22)
    if case.renormalize and case.scoring_func != "softmax":
        small /= truth.p.gather(1, truth.ids).sum(1, True)[clear] + 1e-20
    far = (weights[clear] - want).abs() > 1e-5 * want.abs() + abs(case.routed_scaling_factor) * small
    return wrong + [f"{int(far.sum())} weights differ"] * bool(far.any())


def judge_stats(case: RouteCase, truth: Routing, ids: Tensor, stats: Any) -> list[str]:
    """What is wrong with RouterStats."""
    dropped, wrong = drop(case, truth), []
    routed = torch.where(dropped, truth.ids, ids) if bool(dropped.any()) else ids  # of unclear tokens as they chose
    kept = torch.bincount(ids[ids >= 0].long(), minlength=case.experts)
    counts = kept, torch.bincount(truth.ids[dropped], minlength=case.experts)
    for name, want in zip(("expert_counts", "dropped"), counts, strict=True):
        mine = getattr(stats, name)
        wrong += [] if mine.dtype == torch.int32 and torch.equal(mine.long(), want) else [name]
    lse = truth.lse.square().sum() / max(case.tokens, 1)
    losses = load_balancing(truth.p, routed, case.experts), lse
    for name, want in zip(("load_balancing_loss", "z_loss"), losses, strict=True):
        mine = getattr(stats, name)
        good = (
            mine.dtype == torch.float32 and mine.shape == () and torch.isclose(mine, want.float(), rtol=1e-5, atol=1e-7)
        )
        wrong += [] if bool(good) else [f"{name} is {float(mine)}, not {float(want)}"]
    return wrong


def check(case: RouteCase, device: str) -> list[str]:
    """What is wrong with one problem, with and without statistics, each line naming the case."""
    t = drawn(case, device)
    options = case.options()
    truth = route(**t, **{n: o for n, o in options.items() if n != "capacity_factor"})
    for stats in (False, True):
        poison(max(steps(case, stats)[1].bytes, 8 * case.tokens * case.top_k), device)
    weights, ids = moe_route(**t, **options)
    more = moe_route(**t, **options, return_stats=True)
    wrong = judge(case, truth, weights, ids)
    if not wrong:
        wrong += [] if same_bits(weights, more[0]) and same_bits(ids, more[1]) else ["other choices with statistics"]
        wrong += judge_stats(case, truth, ids, more[2])
    return [f"{case}: {line}" for line in wrong]


def check_all(cases: Iterable[RouteCase], device: str) -> None:
    """Every problem, then one assertion that lists all that failed."""
    wrong = [line for case in cases for line in check(case, device)]
    assert not wrong, f"{len(wrong)} wrong:\n" + "\n".join(wrong)


# ---------------------------------------------------------------------------------------------------------------------
# the router


def kinds(tokens: int = 61) -> list[RouteCase]:
    """Each sort of logits with each scoring function, with and without bias, groups, renormalisation and capacity."""
    grid = itertools.product(LOGITS, SCORING, ("", "float32", "same"), ((1, 1), (4, 2), (8, 3)))
    return [
        RouteCase(
            tokens, 40, (1, 4, 6, 5)[i % 4], DTYPES[i // 2 % 3], scoring, i % 3 == 0, (1.0, 2.5)[i % 2], bias, *groups,
            (None, None, 0.7, 1.25, 0.0)[i % 5], logits,
        )
        for i, (logits, scoring, bias, groups) in enumerate(grid)
        if not (logits == "wild" and bias)
    ]  # fmt: skip


def sizes() -> list[RouteCase]:
    """Every compiled number of experts, full and not; few and many choices; fewer tokens than warps."""
    some = itertools.product(EXPERTS, (1, 4, 32))
    found = [
        RouteCase((1, 2, 7, 67, 300)[i % 5], e, min(k, e), DTYPES[i % 3], SCORING[i // 3 % 3], i % 2 == 0, seed=i)
        for i, (e, k) in enumerate(some)
    ]
    return [*found, RouteCase(0), RouteCase(0, capacity_factor=1.0)]


def peers() -> list[RouteCase]:
    """Transformer Engine's grid: tokens x experts x choices, with the features taking turns."""
    features = itertools.product(SCORING, ("", "float32"), ((1, 1), (8, 4)), (1.0, 1.2), (False, True))
    turns = itertools.cycle(list(features)[::5])  # in another order than the sizes
    return [
        RouteCase(t, e, k, "float32", scoring, renormalize, scale, bias, *(groups if k <= e // 2 else (1, 1)))
        for t, e, k in itertools.product((2048, 7168, 8992, 14234), (32, 128, 256, 1024), (1, 4, 8, 16, 32))
        for scoring, bias, groups, scale, renormalize in [next(turns)]
    ]


def blocks() -> list[RouteCase]:
    """MegaBlocks' sizes, K = E included."""
    return [RouteCase(65, e, k, renormalize=True) for e in (1, 2, 4, 8, 1024) for k in (1, 2, 4, 8) if k <= e]


for _cases in (kinds, sizes, peers, blocks):
    register(_cases())


@pytest.mark.parametrize("cases", [kinds, sizes, peers, blocks], ids=lambda f: f.__name__)
def test_router(cases: Any) -> None:
    check_all(cases(), "cuda")


def check_many_groups(device: str) -> None:
    """As many groups as experts, and more than a warp has lanes."""
    check_all([RouteCase(50, e, 3, num_expert_group=g, topk_group=g // 2) for e, g in ((32, 32), (64, 64))], device)
    check_all(
        [
            RouteCase(50, 128, 4, "float32", "sigmoid", bias=b, num_expert_group=64, topk_group=5)
            for b in ("", "float32")
        ],
        device,
    )
    check_all(
        [RouteCase(50, 1000, 4, num_expert_group=500, topk_group=499, bias="float32", scoring_func="sigmoid")], device
    )


def test_many_groups() -> None:
    check_many_groups("cuda")


def check_deep_seek(device: str, tokens: int) -> None:
    """The routers of DeepSeek-V2, V3 and Kimi K2."""
    v3: dict[str, Any] = {"scoring_func": "sigmoid", "renormalize": True, "bias": "float32"}
    check_all([
        RouteCase(tokens, 160, 6, routed_scaling_factor=16.0, num_expert_group=8, topk_group=3),
        RouteCase(tokens, 256, 8, "bfloat16", routed_scaling_factor=2.5, num_expert_group=8, topk_group=4, **v3),
        RouteCase(tokens, 384, 8, "float32", routed_scaling_factor=2.827, **v3),
    ], device)  # fmt: skip


def test_deep_seek() -> None:
    check_deep_seek("cuda", 4096)


def check_ties(device: str) -> None:
    """The lower expert and the lower group win, 20 times with the same bits; tokens of NaN and infinities too."""
    for case in (
        RouteCase(100, 64, 8, logits="ties", num_expert_group=8, topk_group=3),
        RouteCase(100, 256, 8, "bfloat16", "sigmoid", True, 1.0, "float32", 8, 4, logits="ties"),
        RouteCase(40, 100, 32, logits="equal"),
        RouteCase(40, 384, 8, "float16", "sqrtsoftplus", logits="wild"),
    ):  # fmt: skip
        assert check(case, device) == []
        t = drawn(case, device)
        first = moe_route(**t, **case.options(), return_stats=True)
        for _ in range(20):
            again = moe_route(**t, **case.options(), return_stats=True)
            assert all(same_bits(a, b) for a, b in zip((*first[:2], *first[2]), (*again[:2], *again[2]), strict=True))
    same = torch.zeros((5, 40), device=device)
    assert moe_route(same, top_k=6)[1].tolist() == [[0, 1, 2, 3, 4, 5]] * 5
    bias = torch.zeros(40, device=device)
    out = moe_route(
        same, top_k=6, num_expert_group=4, topk_group=2, e_score_correction_bias=bias, scoring_func="sigmoid"
    )
    assert out[1].tolist() == [[0, 1, 2, 3, 4, 5]] * 5


def test_ties() -> None:
    check_ties("cuda")


def check_strange_values(device: str) -> None:
    """Rows of NaN, of both infinities and of the largest numbers: K different experts, finite weights, no fault."""
    values = (math.nan, math.inf, -math.inf, 3.4e38, -3.4e38, 0.0, -0.0, 1e-45)
    logits = torch.tensor([[v] * 7 for v in values], device=device)
    mixed = torch.tensor(values, device=device)[torch.randint(0, 8, (100, 7), device=device)]
    scoring: Any
    for dtype, scoring, renormalize in itertools.product(DTYPES, SCORING, (False, True)):
        x = torch.cat([logits, mixed]).to(torch_dtype(dtype))
        weights, ids, stats = moe_route(x, top_k=5, scoring_func=scoring, renormalize=renormalize, return_stats=True)
        assert bool(((ids >= 0) & (ids < 7)).all()) and bool((ids.sort(1).values.diff(dim=1) > 0).all())
        assert bool(weights.isfinite().all()) and int(stats.expert_counts.sum()) == 5 * len(x)
        truth = route(x, top_k=5, scoring_func=scoring, renormalize=renormalize)
        assert torch.equal(ids, truth.ids.to(torch.int32)), (dtype, scoring)


def test_strange_values() -> None:
    check_strange_values("cuda")


# ---------------------------------------------------------------------------------------------------------------------
# the permutation


def check_permute(device: str, shapes: Iterable[tuple[int, int, int]], outside: float = 0.2) -> None:
    """(tokens, top_k, experts): three arrays, exact; ids from nowhere, int64, and a map with experts elsewhere."""
    for i, (tokens, k, e) in enumerate(shapes):
        g = torch.Generator(device).manual_seed(i)
        ids = torch.randint(0, e, (tokens, k), generator=g, device=device)
        strange = torch.tensor([-1, e, -(2**31), 2**31 - 1], device=device)[ids % 4]
        ids = torch.where(torch.rand((tokens, k), generator=g, device=device) < outside, strange, ids)
        poison(max(steps((tokens, k, e))[1].bytes, 8 * tokens * k + 4 * e), device)
        table = torch.arange(-e // 2, e + 3, device=device, dtype=torch.int32).roll(i)
        for kind, expert_map in ((torch.int32, None), (torch.int64, None), (torch.int32, table)):
            topk_ids = (ids + (2**33 if kind == torch.int64 else 0) * (ids == e)).to(kind)
            found = moe_permute(topk_ids, num_experts=e, expert_map=expert_map)
            want = permutation(topk_ids, num_experts=e, expert_map=expert_map)
            for name in Sorted._fields:
                assert same_bits(getattr(found, name), getattr(want, name)), (tokens, k, e, kind, name)


def shapes() -> list[tuple[int, int, int]]:
    """SonicMoE's counts, on both sides of a warp, of a block and of all blocks, and Transformer Engine's odd ones."""
    many = (1, 2, 31, 33, 500, 512, 4095, 4096, 4097, 8191, 16384, 2**14 + 9)
    counts = (1, 4, 8, 72, 256, 511, 512, 513, 1920, 2048, 4097, 16384, 50000)
    found = [
        (-(-n // k), k, e) for i, n in enumerate(many) for j, e in enumerate(counts) for k in [(1, 3, 8)[(i + j) % 3]]
    ]
    return [*found, (0, 2, 5), (3, 300, 7), (700000, 1, 3)]


register(shapes())


def test_permute() -> None:
    check_permute("cuda", shapes())


@pytest.mark.parametrize("experts", [8, 256, 2048, 50000])
def test_permute_two_million(experts: int) -> None:
    check_permute("cuda", [(2_097_152, 1, experts), (262_144, 8, experts)])
    check_permute("cuda", [(262_144, 8, experts)], outside=0.0)


def check_one_expert(device: str, size: int) -> None:
    """All to one, all to nobody, one expert after the other."""
    for ids in (torch.full((size, 2), 5), torch.full((size, 2), -1), torch.arange(2 * size).view(size, 2) % 9):
        topk_ids = ids.to(device)
        found, want = moe_permute(topk_ids, num_experts=9), permutation(topk_ids, num_experts=9)
        assert all(map(same_bits, found, want))


def test_permute_to_one_expert() -> None:
    for size in (3, 3000, 100_000):
        check_one_expert("cuda", size)
