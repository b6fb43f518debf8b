"""Random mixtures of experts on the GPU: sizes, spread, features and memory that nobody chose, on each kernel.

hypothesis draws them, the same ones in every run. The checks take the device, so that test_moe_checks.py runs some of
them on the CPU.
"""

from __future__ import annotations

import random
from typing import Any, NamedTuple

import pytest
import test_gpu_moe as experts
import test_gpu_moe_products as products
import test_gpu_moe_route as routes
from gpu_moe_kit import judge, known_experts, known_products, product_tensors, tensors
from hypothesis import given, settings
from hypothesis import strategies as st
from moe_plans import ProductCase, compile_everything
from test_gpu_moe_arrays import moved_off, whole_array

from flashmoe_cupy import fused_moe, grouped_gemm
from flashmoe_cupy.errors import FlashMoEError, UnsupportedProblem
from flashmoe_cupy.testing_moe import LOGITS, ROUTINGS, MoECase, RouteCase

torch: Any = pytest.importorskip("torch")
pytestmark = [pytest.mark.gpu, pytest.mark.torch]

DTYPES = ("bfloat16", "float16", "bfloat16", "float32")
EDGES = (1, 2, 15, 16, 17, 31, 33, 63, 64, 65, 127, 128, 129, 191, 192, 193, 255, 256, 257, 383, 384, 385, 640)
WIDEST = 520


@pytest.fixture(scope="module", autouse=True)
def _compiled() -> None:
    compile_everything()


# hypothesis draws only the seed of a generator: its own choices, made to be shrunk, are too much alike in few examples.
# A failure prints the whole problem.
Pick = random.Random


class Drawn(NamedTuple):
    """A problem, and how many elements longer the rows of its arrays are, and where they begin: (0, 0) for none."""

    case: Any
    memory: dict[str, tuple[int, int]]


def count(pick: Pick, largest: int = 640) -> int:
    return min(largest, pick.choice((pick.randint(1, largest), pick.randint(1, 40), pick.choice(EDGES))))


def width(pick: Pick) -> int:
    return 8 * pick.choice((pick.randint(1, WIDEST // 8), pick.randint(1, 8), 8, 16, 32))


def memory(pick: Pick, names: tuple[str, ...]) -> dict[str, tuple[int, int]]:
    """Mostly none; else rows that stay aligned to 16 bytes, or not."""
    some = pick.choice(((0, 0), (0, 0), (8, 0), (24, 16), (1, 1), (13, 3)))
    return {name: pick.choice(((0, 0), some)) for name in names}


@st.composite
def moe_problems(draw: st.DrawFn) -> Drawn:
    pick = draw(st.randoms(use_true_random=True))
    e = pick.choice((1, 2, 3, 5, 8, 16, 33, 70))
    activation = pick.choice(
        ("swiglu", "swiglu", "geglu", "geglu_tanh", "swigluoai", "gelu", "gelu_tanh", "relu", "relu2")
    )
    here = pick.choice((0, 0, pick.randint(1, e)))
    shared = pick.choice((0, 0, width(pick)))
    case = MoECase(
        count(pick), width(pick), width(pick), here or e, pick.randint(1, min(e, 9)), pick.choice(DTYPES), activation,
        interleaved=activation in experts.GATED and pick.random() < 0.5,
        biases=pick.choice(("", "same", "float32")), routing=pick.choice(ROUTINGS),
        sentinels=pick.choice((0.0, 0.0, 0.2, 0.9)), global_experts=e if here else 0,
        weights_dtype=pick.choice(("float32", "same")), ids_dtype=pick.choice(("int32", "int64")),
        weight_on_input=pick.random() < 0.2, shared=shared,
        shared_gate=pick.choice(("", "same", "float32")) if shared else "", batch_invariant=pick.random() < 0.2,
        seed=pick.randint(0, 10**6),
    )  # fmt: skip
    names = "x", "w_gate_up", "w_down", "topk_weights", "topk_ids", "b_gate_up", "b_down", "shared_w_down", "out"
    return Drawn(case, memory(pick, names))


@st.composite
def product_problems(draw: st.DrawFn) -> Drawn:
    pick = draw(st.randoms(use_true_random=True))
    sizes = tuple(pick.choice((0, count(pick, 300))) for _ in range(pick.choice((1, 2, 3, 7, 40))))
    case = ProductCase(sizes, width(pick), width(pick), pick.choice(DTYPES), pick.choice(("", "same", "float32")))
    if pick.random() < 0.4:
        case = case._replace(max_rows=max(*sizes, 1) + pick.choice((0, 5)))
    else:
        case = case._replace(head=pick.choice((0, 0, 9)), tail=pick.choice((0, 0, 70)))
        case = case._replace(x_rows=pick.choice((0, count(pick))))
    lists = ("w", "out") if case.max_rows else ("x", "w", "bias", "offsets", "gather_indices", "out")
    return Drawn(case, memory(pick, lists))


@st.composite
def route_problems(draw: st.DrawFn) -> RouteCase:
    pick = draw(st.randoms(use_true_random=True))
    groups = pick.choice((1, 1, 2, 4, 8))
    e = groups * pick.choice((pick.randint(1, 12), pick.randint(1, 1024 // groups)))
    kept, bias = pick.randint(1, groups), pick.choice(("", "", "same", "float32"))
    k = pick.randint(1, min(32, kept * (e // groups)))
    if bias:  # far enough apart for float32
        e, kept, k = groups * pick.randint(1, 6), groups, pick.randint(1, min(6, groups))
    return RouteCase(
        pick.randint(0, 150), e, k, pick.choice(("bfloat16", "float16", "float32")),
        pick.choice(("softmax", "sigmoid", "sqrtsoftplus")), pick.random() < 0.5, pick.choice((1.0, 2.5, -0.5)),
        bias, groups, kept, pick.choice((None, None, 0.0, 0.6, 1.3)), "normal" if bias else pick.choice(LOGITS),
        seed=pick.randint(0, 10**6),
    )  # fmt: skip


def place(arrays: dict[str, Any], where: dict[str, tuple[int, int]]) -> dict[str, Any]:
    return {n: moved_off(x, *where[n]) if any(where.get(n, ())) else x for n, x in arrays.items()}


def cannot(name: str, where: dict[str, tuple[int, int]], error: FlashMoEError) -> bool:
    """Whether the Hopper kernel, asked for by name, says that some rows do not start at multiples of 16 bytes."""
    odd = any(n % 8 for moved in where.values() for n in moved)
    return name == "grouped_gemm_sm90" and odd and isinstance(error, UnsupportedProblem) and "16 bytes" in str(error)


def inside(shape: tuple[int, ...], like: Any, extra: int, at: int) -> tuple[Any, Any]:
    """(memory full of NaN, out): a row in front of out and one behind, and `extra` elements in each row."""
    whole = whole_array((*shape[:-2], shape[-2] + 2, shape[-1] + extra), like)
    return whole, whole[..., 1:-1, at : at + shape[-1]]


def check_moe(problem: Drawn, device: str) -> None:
    case, where = problem
    t = tensors(case, device)
    known, some = known_experts(t, **case.options()), place(t, where)
    for name, chosen in experts.on_kernels(case, device):
        whole, out = inside(t["x"].shape, t["x"], *where["out"])
        with chosen:
            try:
                assert fused_moe(**some, **case.options(), out=out) is out
            except FlashMoEError as e:
                if cannot(name, where, e):
                    continue
                raise AssertionError(f"{case} {name} {where}: {e}") from e
        assert judge(out, known, out.dtype) == [], f"{case} {name} {where}"
        assert int(whole.isnan().sum()) == whole.numel() - out.numel(), f"{case} {name} {where}: wrote around out"


def check_product(problem: Drawn, device: str) -> None:
    case, where = problem
    t = product_tensors(case, device)
    (known, mine), some = known_products(t), place(t, where)
    for name, chosen in products.on_kernels(case, device):
        if case.max_rows:
            whole = out = whole_array((*mine.shape, case.n), t["x"])
        else:
            whole, out = inside((*mine.shape, case.n), t["x"], *where["out"])
        with chosen:
            try:
                assert grouped_gemm(**some, out=out) is out
            except FlashMoEError as e:
                if cannot(name, where, e):
                    continue
                raise AssertionError(f"{case} {name} {where}: {e}") from e
        assert judge(out[mine], known, out.dtype) == [], f"{case} {name} {where}"
        written = int(mine.sum()) * case.n
        assert int(whole.isnan().sum()) == whole.numel() - written, f"{case} {name} {where}: wrote elsewhere"


@settings(max_examples=120)
@given(moe_problems())
def test_random_experts(problem: Drawn) -> None:
    check_moe(problem, "cuda")


@settings(max_examples=100)
@given(product_problems())
def test_random_products(problem: Drawn) -> None:
    check_product(problem, "cuda")


@settings(max_examples=100)
@given(route_problems())
def test_random_routers(case: RouteCase) -> None:
    routes.check_all([case], "cuda")
