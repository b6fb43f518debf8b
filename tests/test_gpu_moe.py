"""`fused_moe` on a GPU, on each kernel that takes a problem, judged by float32 or float64 computed beside it.

Every problem runs with poisoned scratch memory, into an `out` full of NaN between two rows that must stay as they are.
The checks take the device, so that test_moe_checks.py runs some of them on the CPU.
"""

from __future__ import annotations

import contextlib
import itertools
import math
from collections.abc import Callable, Iterable
from typing import Any

import pytest
from gpu_moe_kit import (
    Arrays,
    Guarded,
    Known,
    Tensor,
    experts,
    judge,
    known_experts,
    local_ids,
    poison,
    same_bits,
    tensors,
)
from moe_plans import compile_everything, kernel_names, memories, planned_for, register, steps

from flashmoe_cupy import fused_moe
from flashmoe_cupy.errors import FlashMoEError, UnsupportedProblem
from flashmoe_cupy.plan.kernels import only
from flashmoe_cupy.plan.moe import steps as moe_steps_module
from flashmoe_cupy.testing_moe import ROUTINGS, MoECase

torch: Any = pytest.importorskip("torch")
pytestmark = [pytest.mark.gpu, pytest.mark.torch]

HALVES = ("bfloat16", "float16")
GATED = ("swiglu", "geglu", "geglu_tanh", "swigluoai")
PLAIN = ("gelu", "gelu_tanh", "relu", "relu2")
ROWS = (5, 90, 150, 450)  # tokens that give each of 3 experts, with K = 2, few or many rows: tiles of every height
CHOICES = (
    *((1, 1), (3, 1), (3, 3), (5, 1), (5, 2), (5, 3), (5, 4), (5, 5)), *((8, 8), (160, 1), (160, 8), (384, 8)),
)  # fmt: skip
DIMS = ((8, 8), (24, 264), (72, 40), (136, 200), (520, 104), (264, 1000))


@pytest.fixture(scope="module", autouse=True)
def _compiled() -> None:
    compile_everything()


# ---------------------------------------------------------------------------------------------------------------------
# running and judging


def on_kernels(case: MoECase, device: str) -> Iterable[tuple[str, Any]]:
    """(name, context) of each kernel of products that takes the problem; on the CPU there is one back end."""
    names = kernel_names(case) if device == "cuda" else [""]
    return [(name, only(name) if name else contextlib.nullcontext()) for name in names]


def run(case: MoECase, t: Arrays, known: Known) -> list[str]:
    """One call, and what is wrong with it."""
    x = t["x"]
    guarded = Guarded.like(x.shape, x.dtype, str(x.device))
    poison(steps(case)[1].bytes, str(x.device))
    try:
        out = fused_moe(**t, **case.options(), out=guarded.out)
    except FlashMoEError as e:
        return [f"{type(e).__name__}: {e}"]
    wrong = [] if out is guarded.out else ["out= was not handed back"]
    wrong += [] if guarded.intact() else ["wrote outside out"]
    return wrong + judge(out, known, x.dtype)


def check(case: MoECase, device: str, seed: int = 0, change: Callable[[Arrays], None] | None = None) -> list[str]:
    """What is wrong with one problem, each line naming the case and the kernel."""
    t = tensors(case, device, seed)
    if change is not None:
        change(t)
    known, found = known_experts(t, **case.options()), []
    for name, chosen in on_kernels(case, device):
        with chosen:
            found += [f"{case} {name}: {line}" for line in run(case, t, known)]
    return found


def check_all(cases: Iterable[MoECase], device: str) -> None:
    """Every problem, then one assertion that lists all that failed."""
    wrong = [line for seed, case in enumerate(cases) for line in check(case, device, seed)]
    assert not wrong, f"{len(wrong)} wrong:\n" + "\n".join(wrong)


# ---------------------------------------------------------------------------------------------------------------------
# problems


def sizes(dtype: str) -> list[MoECase]:
    """Tokens, experts and choices, at dimensions that fill no tile."""
    kinds = itertools.product((1, 7, 127, 129), CHOICES)
    found = [MoECase(tokens, 72, 40, *choice, dtype) for tokens, choice in kinds]
    return [*found, MoECase(0, 72, 40, dtype=dtype), MoECase(7, 72, 40, 160, 160, dtype)]


def dims(dtype: str) -> list[MoECase]:
    kinds = itertools.product(ROWS, DIMS, ("swiglu", "gelu"))
    found = [MoECase(tokens, *dim, 3, 2, dtype, activation) for tokens, dim, activation in kinds]
    many = (MoECase(129, 264, 200, 160, 8, dtype, activation) for activation in ("swiglu", "relu"))
    return [*found, *many]


def activations(dtype: str) -> list[MoECase]:
    forms = [*itertools.product(GATED, (False, True)), *((name, False) for name in PLAIN)]
    kinds = itertools.product((33, 450), forms, ("", "same", "float32"))
    return [MoECase(t, 136, 72, 3, 2, dtype, *form, biases=biases) for t, form, biases in kinds]


def clamps(dtype: str) -> list[MoECase]:
    """swiglu within a limit, which has kernels of its own, in the shared expert too."""
    kinds = itertools.product((2, 5, 20, 90, 130, 150, 450), (0.5, 2.0), (False, True))
    return [MoECase(t, 136, 72, 3, 2, dtype, "swiglu", turns, None, limit, shared=40) for t, limit, turns in kinds]


def routings(dtype: str) -> list[MoECase]:
    """Spread over experts in every way, some of them elsewhere, some of the assignments to nobody."""
    kinds = itertools.product((50, 700), ROUTINGS, (0.0, 0.3), (0, 24))
    return [
        MoECase(
            t, 72, 40, 6, 3, dtype, routing=routing, sentinels=sentinels, global_experts=known,
            ids_dtype=("int32", "int64")[i // 3 % 2], weights_dtype=("float32", "same")[i // 5 % 2],
            biases=("", "same")[i // 7 % 2],
        )
        for i, (t, routing, sentinels, known) in enumerate(kinds)
    ]  # fmt: skip


def shared(dtype: str) -> list[MoECase]:
    kinds = itertools.product(
        ROWS, (8, 200), ("", "same", "float32"), (("swiglu", False), ("geglu", True), ("relu2", False))
    )
    found = [
        MoECase(t, 72, 40, 5, 2, dtype, *form, shared=s, shared_gate=gate, sentinels=0.2)
        for t, s, gate, form in kinds
    ]  # fmt: skip
    wide = (MoECase(40, 8, 8, 3, 2, dtype, shared=34000, shared_gate="float32"),)  # many tiles of few rows
    some = (MoECase(t, 72, 40, 5, 2, dtype, shared=200, shared_gate="same") for t in (20, 21, 130, 131))
    return [*found, *wide, *some, MoECase(1, 72, 40, 1, 1, dtype, shared=64, sentinels=1.0)]


def on_input(dtype: str) -> list[MoECase]:
    kinds = itertools.product(ROWS, ("", "float32"), ("float32", "same"), (("swiglu", True), ("relu2", False)))
    some: dict[str, Any] = {"weight_on_input": True, "sentinels": 0.1, "shared": 24}
    return [MoECase(t, 72, 40, 5, 3, dtype, *f, biases=b, weights_dtype=w, **some) for t, b, w, f in kinds]


def invariants(dtype: str) -> list[MoECase]:
    kinds = itertools.product((1, 90, 700), ("swiglu", "gelu"), (0, 40))
    return [MoECase(t, 136, 72, 5, 2, dtype, a, shared=s, batch_invariant=True) for t, a, s in kinds]


GRIDS = (sizes, dims, activations, clamps, routings, shared, on_input, invariants)
SINGLES = [  # float32, which only the portable kernel takes
    *(case for case in sizes("float32") if case.experts < 160 or case.tokens == 7),
    *(case for grid in GRIDS[1:] for case in grid("float32")[::3]),
]
RUNS: dict[Any, list[MoECase]] = {
    (grid, dtype): register(grid(dtype)[:: 1 + i]) for grid in GRIDS for i, dtype in enumerate(HALVES)
}
register(SINGLES)


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("grid", GRIDS, ids=lambda f: f.__name__)
def test_grid(grid: Callable[[str], list[MoECase]], dtype: str) -> None:
    for every, memory in zip((1, 3), memories(), strict=True):
        with planned_for(memory):
            check_all(RUNS[grid, dtype][::every], "cuda")


def test_grids_in_float32() -> None:
    check_all(SINGLES, "cuda")


# ---------------------------------------------------------------------------------------------------------------------
# what other libraries test, with their tolerances beside ours


def check_peer(case: MoECase, device: str, scale: float, atol: float, rtol: float) -> None:
    """x times `scale` as the peers draw it; our rules, and max|out - ref| <= atol + rtol * |ref|."""
    t = tensors(case, device)
    t["x"] *= scale
    known = known_experts(t, **case.options())
    for name, chosen in on_kernels(case, device):
        with chosen:
            assert run(case, t, known) == [], f"{case} {name}"
            out = fused_moe(**t, **case.options())
            torch.testing.assert_close(out.to(known.exact.dtype), known.exact, atol=atol, rtol=rtol)


# SonicMoE's layers, (d, n, E, K) at 8192 tokens
SONIC = (
    *((d, *rest) for d in (768, 1536) for rest in ((256, 128, 8), (512, 64, 4), (1024, 32, 2))),
    *((4096, *rest) for rest in ((256, 256, 16), (512, 128, 8), (1024, 64, 4))),
    *((4096, *rest) for rest in ((512, 256, 16), (1024, 128, 8), (2048, 64, 4))),
)  # fmt: skip
VLLM = ((1, 128, 128), (1, 128, 2048), (33, 128, 2048), (32768, 512, 2048), (40000, 1024, 1024))


@pytest.mark.parametrize("biases", ["", "same"])
@pytest.mark.parametrize(("d", "n", "e", "k"), SONIC)
def test_layers_of_sonic_moe(d: int, n: int, e: int, k: int, biases: str) -> None:
    check_peer(MoECase(8192, d, n, e, k, biases=biases), "cuda", 0.02, 1.4e-2, 2e-2)


@pytest.mark.parametrize("k", [2, 6])
@pytest.mark.parametrize("e", [8, 64, 192])
def test_layers_of_vllm(e: int, k: int) -> None:
    for tokens, d, n in VLLM:
        check_peer(MoECase(tokens, d, n, e, k), "cuda", 0.3, 2e-2, 0.0)


def check_odd_dimensions(device: str) -> None:
    """Dimensions that are no multiples of 8 are refused by name, with the size to pad them to."""
    for d, n in ((511, 128), (128, 100), (600, 20)):
        t = tensors(MoECase(4, d, n), device)
        bad = d if d % 8 else n
        with pytest.raises(UnsupportedProblem, match=rf"{bad}.*{-(-bad // 8) * 8}"):
            fused_moe(**t)


def test_odd_dimensions_are_refused() -> None:
    check_odd_dimensions("cuda")


SCATTER = [
    MoECase(tokens, d, n, 8, k, "float32", biases=biases)
    for (tokens, k), (d, n), biases in itertools.product(
        ((1, 2), (256, 3), (512, 4)), ((128, 256), (512, 600), (600, 104)), ("", "same")
    )
]


@pytest.mark.parametrize("case", SCATTER, ids=str)
def test_layers_of_scatter_moe(case: MoECase) -> None:
    check_peer(case, "cuda", 1.0, 1e-4, 0.0)


def check_decode(device: str, dtype: str = "bfloat16") -> None:
    """One to eight tokens, tiny values; every call on the scratch memory of the one before, with the same bits."""
    tiny = 0.25 if dtype == "float16" else 2.0**-7  # float16 has few digits of numbers much smaller
    for tokens, k in itertools.product(range(1, 9), (1, 8)):
        case = MoECase(tokens, 256, 64, 16, k, dtype)
        t = tensors(case, device, tokens)
        t["x"] *= tiny
        t["w_down"] *= tiny
        known = known_experts(t, **case.options())
        for name, chosen in on_kernels(case, device):
            with chosen:
                assert run(case, t, known) == [], f"{case} {name}"
                outs = [fused_moe(**t) for _ in range(3)]
                assert all(same_bits(out, outs[0]) for out in outs), f"{case} {name}"
                a, b = outs[0].double().flatten(), known.exact.double().flatten()
                assert float(a @ b / (a.norm() * b.norm())) > 0.9999, f"{case} {name}"


@pytest.mark.parametrize("dtype", HALVES)
def test_decode(dtype: str) -> None:
    check_decode("cuda", dtype)


@pytest.mark.parametrize("dtype", HALVES)
def test_few_assignments_that_a_launch_permutes(dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As for large experts on fast memory: small ones are told to be large."""
    monkeypatch.setattr(moe_steps_module, "permutes_few", lambda *_: True)
    cases = [MoECase(t, 136, 72, e, k, dtype, routing=r) for t, e, k in ((1, 8, 2), (4, 8, 2), (16, 8, 2), (4, 60, 8))
             for r in ("uniform", "one", "zipf")]  # fmt: skip
    for memory in memories():
        with planned_for(memory):
            check_all(cases, "cuda")


def check_idle_ends(device: str, dtype: str = "bfloat16") -> None:
    """No token for the first expert, for the last, for both, or for all but one of them; their weights are NaN."""
    case = MoECase(40, 72, 40, 6, 2, dtype, routing="duplicates")
    for first, last in ((1, 5), (0, 4), (1, 4), (5, 5), (0, 0)):

        def change(t: Arrays, first: int = first, last: int = last) -> None:
            fresh = tensors(case._replace(tokens=400), device)  # all experts in use: no NaN
            t |= {name: fresh[name] for name in ("w_gate_up", "w_down")}
            t["topk_ids"] = t["topk_ids"].clamp(first, last)
            for name in ("w_gate_up", "w_down"):
                t[name][:first] = math.nan
                t[name][last + 1 :] = math.nan

        assert check(case, device, 0, change) == [], (first, last)


@pytest.mark.parametrize("dtype", [*HALVES, "float32"])
def test_idle_ends(dtype: str) -> None:
    check_idle_ends("cuda", dtype)


def check_ranks(device: str, dtype: str = "bfloat16") -> None:
    """32 experts on 4 machines: each adds its own, what is elsewhere counts 0, and the four add up to the whole."""
    case = MoECase(130, 72, 40, 32, 4, dtype)
    t = tensors(case, device)
    whole = experts(**t, dtype=torch.float64, rounded=True)
    total, table = torch.zeros_like(whole), torch.arange(32, device=device, dtype=torch.int32)
    for first in range(0, 32, 8):
        here = (table >= first) & (table < first + 8)
        mine = t | {name: t[name][first : first + 8] for name in ("w_gate_up", "w_down")}
        mine["expert_map"] = torch.where(here, table - first, -1).to(torch.int32)
        local = MoECase(130, 72, 40, 8, 4, dtype, global_experts=32)
        for name, chosen in on_kernels(local, device):
            with chosen:
                assert run(local, mine, known_experts(mine)) == [], f"{first} {name}"
        idle = (local_ids(t["topk_ids"], 8, mine["expert_map"]) == 8).all(1)
        out = fused_moe(**mine)
        assert bool(idle.any()) and not bool(out[idle].any())
        total += out.double()
    step = {"bfloat16": 2.0**-8, "float16": 2.0**-11, "float32": 1e-6}[dtype]
    assert float((total - whole).norm() / whole.norm()) < 2 * step


@pytest.mark.parametrize("dtype", [*HALVES, "float32"])
def test_ranks(dtype: str) -> None:
    check_ranks("cuda", dtype)


def check_invariance(device: str, tokens: int, dtype: str = "bfloat16") -> None:
    """A token alone, in some of the batch and in another order: the same bits, on each kernel."""
    for activation, biases in (("swiglu", "same"), ("gelu", "")):
        case = MoECase(tokens, 264, 200, 8, 2, dtype, activation, biases=biases, shared=40, batch_invariant=True)
        t = tensors(case, device)
        rows = {name: x for name, x in t.items() if name in ("x", "topk_weights", "topk_ids")}
        parts: list[Any] = [slice(i, i + 1) for i in (0, 1, tokens // 2, tokens - 1)]
        parts += [slice(3, 80), slice(0, 1000), torch.randperm(tokens, device=device)]
        for name, chosen in on_kernels(case, device):
            with chosen:
                whole = fused_moe(**t, **case.options())
                for part in parts:
                    some = fused_moe(**t | {n: x[part] for n, x in rows.items()}, **case.options())
                    assert same_bits(some, whole[part]), f"{case} {name} {part}"


@pytest.mark.parametrize("dtype", [*HALVES, "float32"])
def test_other_tokens_do_not_matter(dtype: str) -> None:
    check_invariance("cuda", 4096, dtype)


def check_clamp(case: MoECase, device: str) -> None:
    """gpt-oss: biases, interleaved rows, many values beyond the limit, which must matter."""
    t = tensors(case, device)
    t["x"] *= 5
    known = known_experts(t, **case.options())
    free = experts(**t, **case.options() | {"swiglu_limit": math.inf}, dtype=known.exact.dtype)
    assert float((free - known.exact).norm() / known.exact.norm()) > 0.1
    for name, chosen in on_kernels(case, device):
        with chosen:
            assert run(case, t, known) == [], f"{case} {name}"


OSS: dict[str, Any] = {"activation": "swigluoai", "interleaved": True, "biases": "same"}


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("tokens", [1, 64, 600])
def test_layers_of_gpt_oss(tokens: int, dtype: str) -> None:
    check_clamp(MoECase(tokens, 2880, 2880, 32, 4, dtype, **OSS), "cuda")
    if tokens == 600:
        check_peer(MoECase(tokens, 2880, 2880, 32, 4, dtype, **OSS), "cuda", 0.3, 2e-2, 2e-2)


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("tokens", [1, 64, 600, 4096])
def test_layers_with_a_clamped_swiglu(tokens: int, dtype: str) -> None:
    check_clamp(MoECase(tokens, 2048, 1536, 32, 4, dtype, swiglu_limit=1.5), "cuda")


def check_limits(device: str, dtype: str = "bfloat16") -> None:
    for limit in (0.5, 7.0, math.inf):
        assert check(MoECase(33, 72, 40, dtype=dtype, swiglu_limit=limit, shared=24), device) == []
    for limit, alpha in itertools.product((0.5, 7.0, math.inf), (1.702, 0.7, -1.0)):
        case = MoECase(33, 72, 40, dtype=dtype, swiglu_alpha=alpha, swiglu_limit=limit, **OSS)
        assert check(case, device) == []


@pytest.mark.parametrize("dtype", [*HALVES, "float32"])
def test_limits(dtype: str) -> None:
    check_limits("cuda", dtype)


def check_extremes(device: str, dtype: str = "bfloat16") -> None:
    """Gates far out on both sides: 0 and the gate itself, never NaN; a NaN in one token stays there."""
    for activation in (*GATED, *PLAIN):
        limit = math.inf if activation == "swigluoai" else None
        case = MoECase(40, 64, 64, 3, 2, dtype, activation, swiglu_limit=limit)
        t = tensors(case, device)
        t["x"] *= 8 if dtype == "float16" else 300
        known = known_experts(t, **case.options())
        assert bool(known.exact.isfinite().all())
        t["x"][7] = math.nan
        keep = torch.arange(40, device=device) != 7
        for name, chosen in on_kernels(case, device):
            with chosen:
                out = fused_moe(**t, **case.options())
                assert bool(out[7].isnan().all()), f"{case} {name}"
                some = Known(*(None if x is None else x[keep] for x in known))
                assert judge(out[keep], some, out.dtype) == [], f"{case} {name}"


@pytest.mark.parametrize("dtype", [*HALVES, "float32"])
def test_extremes(dtype: str) -> None:
    check_extremes("cuda", dtype)


def check_empty(device: str, dtype: str = "bfloat16") -> None:
    """No token, or tokens that go nowhere: an empty result, zeros, or the shared expert alone."""
    some: tuple[dict[str, Any], ...] = ({}, {"shared": 24}, {"biases": "same"})
    for tokens, features in itertools.product((0, 5), some):
        case = MoECase(tokens, 72, 40, 4, 2, dtype, sentinels=1.0, **features)
        assert check(case, device) == [], case
        out: Tensor = fused_moe(**tensors(case, device), **case.options())
        assert tuple(out.shape) == (tokens, 72) and (bool(features.get("shared")) or not bool(out.any()))


@pytest.mark.parametrize("dtype", [*HALVES, "float32"])
def test_empty(dtype: str) -> None:
    check_empty("cuda", dtype)
