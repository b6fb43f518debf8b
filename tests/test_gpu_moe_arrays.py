"""What goes into a mixture of experts comes out: strides, unaligned memory, libraries, several devices, huge arrays.

The checks take the device, so that test_moe_checks.py runs them on the CPU as well.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from gpu_moe_kit import (
    Arrays,
    Known,
    Tensor,
    agree,
    experts,
    judge,
    known_experts,
    known_products,
    permutation,
    product_tensors,
    products,
    route,
    same_bits,
    tensors,
)
from moe_plans import ProductCase, compile_everything, register
from test_gpu_arrays import Dlpack, Interface, as_torch, room, to_cupy, to_jax

from flashmoe_cupy import fused_moe, grouped_gemm, moe_permute, moe_route
from flashmoe_cupy.errors import UnsupportedProblem
from flashmoe_cupy.testing import relative_error
from flashmoe_cupy.testing_moe import MoECase

torch: Any = pytest.importorskip("torch")
pytestmark = [pytest.mark.gpu, pytest.mark.torch]
__all__ = ["room"]  # a fixture

HALVES = ("bfloat16", "float16")
DTYPES = (*HALVES, "float32")
BASE = MoECase(90, 72, 40, 5, 3, biases="same", shared=24, shared_gate="float32", sentinels=0.1, global_experts=9)
PLAIN = BASE._replace(activation="relu2", biases="float32", weight_on_input=True, interleaved=False)
TURNS = BASE._replace(activation="geglu", interleaved=True, tokens=300)
PACKED = ProductCase((70, 0, 130), 72, 40, bias="same", tail=3)
MASKED = ProductCase((70, 0, 130), 72, 40, bias="float32", max_rows=131)
CASES = (BASE, PLAIN, TURNS)

for _dtype in DTYPES:
    register([case._replace(dtype=_dtype) for case in (*CASES, PACKED, MASKED)])
    register([case._replace(dtype=_dtype) for case in (*CASES, PACKED, MASKED)], aligned=False)


@pytest.fixture(scope="module", autouse=True)
def _compiled() -> None:
    compile_everything()


# ---------------------------------------------------------------------------------------------------------------------
# strides


def whole_array(shape: tuple[int, ...], like: Tensor) -> Tensor:
    """Memory around a view: NaN, or for numbers of experts something far away."""
    odd = math.nan if like.dtype.is_floating_point else 123_456_789
    return torch.full(shape, odd, dtype=like.dtype, device=like.device)


def layouts(x: Tensor) -> Iterator[tuple[str, Tensor, Tensor]]:
    """(label, memory, view) with x's values, last dimension contiguous and 16-byte aligned."""
    if x.ndim == 1:
        memory = whole_array((x.shape[0] + 24,), x)
        yield "inside", memory, memory[8 : 8 + x.shape[0]]
    else:
        *lead, last = x.shape
        memory = whole_array((*(n + 3 for n in lead), -(-last // 8) * 8 + 24), x)
        yield "padded", memory, memory[(*(slice(1, n + 1) for n in lead), slice(16, last + 16))]
        memory = whole_array((*lead[:-1], 2 * lead[-1], last), x)
        if last % 8 == 0:
            yield "every second row", memory, memory[..., ::2, :]
    if x.ndim == 3:
        memory = whole_array((x.shape[1], x.shape[0], x.shape[2]), x)
        yield "experts inside of rows", memory, memory.transpose(0, 1)


def check_layouts(device: str, dtype: str = "bfloat16") -> None:
    """Each argument of `fused_moe` in other memory, and out: the same bits; nothing around out is written."""
    for case in (c._replace(dtype=dtype) for c in CASES):
        t = tensors(case, device)
        want = fused_moe(**t, **case.options())
        assert judge(want, known_experts(t, **case.options()), want.dtype) == []
        for name, x in t.items():
            for label, _, view in layouts(x):
                view.copy_(x)
                assert agree(fused_moe(**t | {name: view}, **case.options()), want), f"{case} {name}: {label}"
        column = whole_array((case.tokens, 3), t["shared_gate"])[:, :1]
        column.copy_(t["shared_gate"][:, None])
        assert agree(fused_moe(**t | {"shared_gate": column}, **case.options()), want), f"{case}: a column of gates"
        odd = whole_array((case.tokens, case.hidden + 1), want)  # starts at a multiple of 16 bytes, as few rows do
        for label, memory, view in (*layouts(want), ("odd rows", odd, odd[:, : case.hidden])):
            assert fused_moe(**t, **case.options(), out=view) is view
            assert agree(view, want), f"{case} out: {label}"
            assert int(memory.isnan().sum()) == memory.numel() - want.numel(), f"{case} out: {label}: wrote around it"


def check_product_layouts(device: str, dtype: str = "bfloat16") -> None:
    """The same for `grouped_gemm`; experts of the masked layout lie whole rows apart, or the error says so."""
    for case in (PACKED._replace(dtype=dtype), PACKED._replace(dtype=dtype, x_rows=50), MASKED._replace(dtype=dtype)):
        t = product_tensors(case, device)
        _, mine = known_products(t)
        want = grouped_gemm(**t)
        for name, x in t.items():
            for label, _, view in layouts(x):
                view.copy_(x)
                try:
                    assert agree(grouped_gemm(**t | {name: view}), want), f"{case} {name}: {label}"
                except UnsupportedProblem as e:
                    assert name == "x" and label == "experts inside of rows" and "apart" in str(e)
        for label, memory, view in layouts(want):
            try:
                assert grouped_gemm(**t, out=view) is view
            except UnsupportedProblem as e:
                assert label == "experts inside of rows" and "apart" in str(e)
                continue
            assert agree(view[mine], want[mine]), f"{case} out: {label}"
            assert int(memory.isnan().sum()) == memory.numel() - want[mine].numel(), f"{case} out: {label}"


def check_broadcast(device: str, dtype: str = "bfloat16") -> None:
    """Stride 0: experts that share their weights or biases, one token for all."""
    for case in (c._replace(dtype=dtype, sentinels=0.0, global_experts=0) for c in CASES):
        t = tensors(case, device)
        for names in (("w_gate_up", "w_down"), ("b_gate_up", "b_down"), ("x",), ("topk_weights",)):
            shared = {name: t[name][:1].expand(t[name].shape) for name in names}
            copies = {name: x.contiguous() for name, x in shared.items()}
            out, want = (fused_moe(**t | some, **case.options()) for some in (shared, copies))
            assert agree(out, want), f"{case}: {names}"


def moved_off(x: Tensor, extra: int, at: int) -> Tensor:
    """x in rows that are `extra` longer and start at element `at`."""
    view = whole_array((*x.shape[:-1], x.shape[-1] + extra), x)[..., at : at + x.shape[-1]]
    view.copy_(x)
    return view


def check_unaligned(device: str, dtype: str = "bfloat16") -> None:
    """Pointers and rows that are aligned to one element only: slower, and right."""
    for case in (c._replace(dtype=dtype) for c in CASES):
        t = tensors(case, device)
        known = known_experts(t, **case.options())
        for name, x in t.items():
            for extra, at in ((16, 1), (7, 0), (1, 1)):
                out = fused_moe(**t | {name: moved_off(x, extra, at)}, **case.options())
                assert judge(out, known, out.dtype) == [], f"{case}: {name}, row + {extra}, from element {at}"
        memory = whole_array((case.tokens, 74), t["x"])
        out = fused_moe(**t, **case.options(), out=memory[:, 1:73])
        assert judge(out, known, out.dtype) == [], f"{case}: out"
        assert bool(memory[:, [0, 73]].isnan().all())
    for product in (
        PACKED._replace(dtype=dtype),
        PACKED._replace(dtype=dtype, x_rows=50),
        MASKED._replace(dtype=dtype),
    ):
        t = product_tensors(product, device)
        known, mine = known_products(t)
        for name, x in t.items():
            for extra, at in ((1, 1), (7, 0)):
                out = grouped_gemm(**t | {name: moved_off(x, extra, at)})[mine]
                assert judge(out, known, out.dtype) == [], f"{product}: {name}, row + {extra}, from element {at}"
        view = moved_off(whole_array((*mine.shape, 72), t["x"]), 1, 1)
        assert judge(grouped_gemm(**t, out=view)[mine], known, view.dtype) == [], f"{product}: out"


def check_lists(device: str, dtype: str = "bfloat16") -> None:
    """Logits, bias and ids inside of other memory, one element off: exactly the same choices."""
    logits = torch.randn((300, 40), device=device).to(getattr(torch, dtype))
    bias = torch.randn(40, device=device).to(getattr(torch, dtype))
    options: dict[str, Any] = {"top_k": 5, "scoring_func": "sigmoid", "return_stats": True}
    weights, ids, stats = moe_route(logits, **options, e_score_correction_bias=bias)
    for extra, at in ((24, 8), (1, 1), (7, 3)):
        views = {"e_score_correction_bias": moved_off(bias, extra, at)}
        again = moe_route(moved_off(logits, extra, at), **options, **views)
        pairs = zip((weights, ids, *stats), (*again[:2], *again[2]), strict=True)
        assert all(same_bits(a, b) for a, b in pairs), (extra, at)
    for kind in (torch.int32, torch.int64):
        want = permutation(ids, num_experts=40)
        for extra, at in ((0, 0), (1, 1), (7, 3)):
            found = moe_permute(moved_off(ids.to(kind), extra, at), num_experts=40)
            assert all(map(same_bits, found, want)), (kind, extra, at)


def check_again(device: str, dtype: str = "bfloat16") -> None:
    """The second call of a kind takes a shorter way: it reads the arrays that it is given. With and without biases."""
    for biases in ("same", "float32", ""):
        case = PLAIN._replace(dtype=dtype, biases=biases, shared=0, shared_gate="", global_experts=0)
        for t in (tensors(case, device, seed) for seed in range(3)):
            out = fused_moe(**t, **case.options())
            assert judge(out, known_experts(t, **case.options()), out.dtype) == [], f"{case}"


CHECKS = (check_layouts, check_product_layouts, check_broadcast, check_unaligned, check_lists, check_again)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("check", CHECKS, ids=lambda f: f.__name__)
@pytest.mark.usefixtures("product_kernel")
def test_memory(check: Any, dtype: str) -> None:
    check("cuda", dtype)


def check_backward(device: str, convert: Callable[[Tensor], Any], dtype: str = "bfloat16") -> None:
    """Negative strides, which CuPy and NumPy have: tokens and rows of weights last to first."""
    case = MoECase(90, 72, 40, 5, 3, dtype)
    t = tensors(case, device)
    known = known_experts(t)
    for name, axis in (("x", 0), ("w_gate_up", 0), ("w_gate_up", 1), ("w_down", 0), ("w_down", 1), ("topk_ids", 0)):
        arrays = {n: convert(x) for n, x in t.items()}
        back = (slice(None),) * axis + (slice(None, None, -1),)
        arrays[name] = convert(t[name].flip(axis).contiguous())[back]
        out = as_torch(fused_moe(**arrays))
        assert judge(out, known, t["x"].dtype) == [], (name, axis)


@pytest.mark.parametrize("dtype", DTYPES)
def test_backward(dtype: str) -> None:
    check_backward("cuda", to_cupy, dtype)


# ---------------------------------------------------------------------------------------------------------------------
# libraries


def check_library(device: str, convert: Callable[[Tensor], Any], owner: str, dtype: str = "bfloat16") -> None:
    """The same data from another library: its own type comes out, on the same device, with the bits torch gets."""
    for case in (c._replace(dtype=dtype) for c in CASES):
        t = tensors(case, device)
        want = fused_moe(**t, **case.options())
        same(convert, owner, [fused_moe(**{n: convert(x) for n, x in t.items()}, **case.options())], [want])
    for product in (
        PACKED._replace(dtype=dtype),
        PACKED._replace(x_rows=50, dtype=dtype),
        MASKED._replace(dtype=dtype),
    ):
        t = product_tensors(product, device)
        same(convert, owner, [grouped_gemm(**{n: convert(x) for n, x in t.items()})], [grouped_gemm(**t)])
    logits, bias = torch.randn((99, 40), device=device), torch.rand(40, device=device)
    found, want = (
        moe_route(turn(logits), top_k=4, e_score_correction_bias=turn(bias), capacity_factor=1.1, return_stats=True)
        for turn in (convert, lambda x: x)
    )
    same(convert, owner, [*found[:2], *found[2]], [*want[:2], *want[2]])
    ids, table = want[1], torch.arange(40, device=device, dtype=torch.int32).flip(0) - 9
    places = (moe_permute(turn(ids), num_experts=20, expert_map=turn(table)) for turn in (convert, lambda x: x))
    same(convert, owner, *map(list, places))


def check_no_tokens(device: str, convert: Callable[[Tensor], Any]) -> None:
    """Empty arrays of a library, whose addresses may be 0."""
    t = tensors(MoECase(0, 72, 40, dtype="float16"), device)
    out = fused_moe(**{n: convert(x) for n, x in t.items()})
    assert tuple(out.shape) == (0, 72) and "16" in str(out.dtype)
    weights, ids, stats = moe_route(convert(torch.zeros((0, 40), device=device)), top_k=3, return_stats=True)
    assert tuple(weights.shape) == tuple(ids.shape) == (0, 3)
    assert all(not as_torch(x).any() for x in stats)
    offsets, places, inverse = moe_permute(convert(t["topk_ids"]), num_experts=4)
    assert as_torch(offsets).tolist() == [0] * 5 and tuple(places.shape) == (0,) and tuple(inverse.shape) == (0, 2)


def same(convert: Callable[[Tensor], Any], owner: str, found: list[Any], want: list[Tensor]) -> None:
    for out, ref in zip(found, want, strict=True):
        assert type(out).__module__.partition(".")[0].removesuffix("lib") == owner, type(out)
        got = as_torch(out)
        assert got.device == ref.device
        # on the CPU BLAS decides, and the addresses of its operands
        assert same_bits(got, ref) if got.is_cuda else torch.allclose(got, ref, rtol=4e-3, atol=1e-3), owner


@pytest.mark.parametrize("dtype", DTYPES)
def test_cupy(dtype: str) -> None:
    check_library("cuda", to_cupy, "cupy", dtype)
    check_no_tokens("cuda", to_cupy)


@pytest.mark.jax
@pytest.mark.parametrize("dtype", DTYPES)
def test_jax(dtype: str) -> None:
    check_library("cuda", to_jax, "jax", dtype)
    check_no_tokens("cuda", to_jax)


@pytest.mark.parametrize("dtype", DTYPES)
def test_dlpack_stranger(dtype: str) -> None:
    check_library("cuda", Dlpack, "cupy", dtype)


def test_cuda_array_interface_stranger() -> None:
    check_library("cuda", lambda x: Interface(x, readonly=True), "cupy", "float16")


def test_cupy_out() -> None:
    """A CuPy `out` that lies inside of a larger array."""
    t = tensors(BASE, "cuda")
    want = fused_moe(**t, **BASE.options())
    memory = whole_array((90, 88), want)
    mine = to_cupy(memory)[:, 8:80]
    assert fused_moe(**{n: to_cupy(x) for n, x in t.items()}, **BASE.options(), out=mine) is mine
    torch.cuda.synchronize()  # CuPy's current stream need not be torch's
    assert same_bits(memory[:, 8:80], want) and int(memory.isnan().sum()) == memory.numel() - want.numel()


@pytest.mark.parametrize("library", ["torch", "cupy"])
def test_fast_way(library: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Calls on arrays like earlier ones are found without a look at each: the same bits, and the same errors."""
    from flashmoe_cupy.ops import call, moe

    convert: Callable[[Tensor], Any] = to_cupy if library == "cupy" else lambda x: x
    options = BASE.options()
    sets = [{n: convert(x) for n, x in tensors(BASE, "cuda", seed).items()} for seed in (1, 2)]
    biases, shared = ("b_gate_up", "b_down"), ("shared_w_gate_up", "shared_w_down")
    for leave, out in itertools.product(
        itertools.product(((), biases), ((), ("expert_map",)), ((), ("shared_gate",), (*shared, "shared_gate"))),
        (None, convert(torch.empty((90, 72), device="cuda", dtype=torch.bfloat16))),
    ):
        some = [{n: x for n, x in t.items() if n not in sum(leave, ())} for t in sets]
        with monkeypatch.context() as long:
            long.setattr(call, "find", lambda kind: None)
            long.setattr(moe._CALL, "guards", {})
            wants = [as_torch(fused_moe(**t, **options)) for t in some]
        for i in range(8):
            fused_moe(**some[i % 2], **options, out=out)
        with monkeypatch.context() as short:
            short.setattr(call, "view", None)
            for t, want in zip(some, wants, strict=True):
                found = fused_moe(**t, **options, out=out)
                torch.cuda.synchronize()
                assert same_bits(as_torch(found), want) and (out is None or found is out), leave
        if out is not None:
            moved = whole_array((90 * 72 + 1,), wants[0])
            fused_moe(**some[0], **options, out=convert(moved)[1:].reshape(90, 72))
            torch.cuda.synchronize()
            assert agree(moved[1:].view(90, 72), wants[0]), leave
            with pytest.raises(UnsupportedProblem, match="out shares memory with x"):
                fused_moe(**some[0], **options, out=some[0]["x"])


@pytest.mark.multi_gpu
def test_second_device() -> None:
    """Arrays on a device that is not the current one: the work and the result are there."""
    t = tensors(BASE, "cuda:1")
    with torch.cuda.device(0):
        out = fused_moe(**t, **BASE.options())
        assert torch.cuda.current_device() == 0
    assert out.device == t["x"].device
    assert judge(out, known_experts(t, **BASE.options()), out.dtype) == []


# ---------------------------------------------------------------------------------------------------------------------
# more than 2**31 elements


def some_rows(rows: int) -> Tensor:
    """Both ends, the middle, and some in between."""
    g = torch.Generator().manual_seed(0)
    ends = torch.tensor([0, 1, rows // 2 - 1, rows // 2, rows - 2, rows - 1])
    return torch.cat([ends, torch.randint(0, rows, (40,), generator=g)]).to("cuda")


def check_some_rows(case: MoECase, t: Arrays) -> None:
    out, at = fused_moe(**t, **case.options()), some_rows(case.tokens)
    assert bool(out.isfinite().all())
    some = t | {name: t[name][at] for name in ("x", "topk_weights", "topk_ids")}
    assert judge(out[at], known_experts(some, **case.options()), out.dtype) == [], case


@pytest.mark.parametrize(
    "case",
    [
        MoECase(131072, 64, 2056, 8, 8),  # the activation has 2.2e9 elements
        MoECase(131072, 2056, 64, 8, 8),  # and the results of the experts
        MoECase(270000, 8192, 64, 4, 1),  # x and out
    ],
    ids=str,
)
@pytest.mark.alone
def test_tokens_beyond_32_bits(case: MoECase, room: None) -> None:
    check_some_rows(case, tensors(case, "cuda"))


@pytest.mark.parametrize("tokens", [40, 700])
@pytest.mark.alone
def test_weights_beyond_32_bits(tokens: int, room: None) -> None:
    """Kimi K2: 384 experts whose first weights have 1.1e10 elements, the second ones 5.6e9."""
    case = MoECase(tokens, 7168, 2048, 384, 8)
    t = tensors(case, "cuda")
    t["topk_ids"][:, 0] = 383 - torch.arange(tokens, device="cuda") % 20
    for name in ("w_gate_up", "w_down"):
        t[name][-20:].normal_(std=case.scale(name))
    check_some_rows(case, t)


@pytest.mark.alone
def test_products_beyond_32_bits(room: None) -> None:
    """out of 2.3e9 elements; x of 2.6e9 elements in the masked layout, of which few count."""
    case = ProductCase((500_000, 1, 650_000), 2000, 64, tail=5)
    t = product_tensors(case, "cuda")
    out, at = grouped_gemm(**t), some_rows(1_150_001)
    ends = torch.tensor([0, int((at < 500_000).sum()), int((at <= 500_000).sum()), len(at)])
    at = at.sort().values
    some = t | {"x": t["x"][at], "offsets": ends}
    ref, low = (products(**some, dtype=dtype)[0] for dtype in (torch.float32, out.dtype))
    assert judge(out[at], Known(ref, ref, low), out.dtype) == [] and not bool(out[-5:].any())
    del out, t
    case = ProductCase((3, 0, 40, 1, 0, 0, 129, 70), 64, 8192, max_rows=40_000)
    t = product_tensors(case, "cuda")
    known, mine = known_products(t)
    assert judge(grouped_gemm(**t)[mine], known, torch.bfloat16) == []


def test_libraries_take_turns() -> None:
    """Calls with the same shapes and options, of two libraries one after the other, several times."""
    case = MoECase(20, 64, 64, 4, 2)
    t = tensors(case, "cuda")
    there = {name: to_cupy(x) for name, x in t.items()}
    logits = torch.randn(20, 4, device="cuda")
    want, routed = fused_moe(**t), moe_route(logits, top_k=2)
    for given, arrays in ((to_cupy(logits), there), (logits, t)) * 3:
        assert same_bits(as_torch(fused_moe(**arrays)), want)
        assert all(map(same_bits, map(as_torch, moe_route(given, top_k=2)), routed))


@pytest.mark.alone
def test_router_beyond_32_bits(room: None) -> None:
    logits = torch.randn((2_100_001, 1024), device="cuda", dtype=torch.bfloat16)
    weights, ids, stats = moe_route(logits, top_k=8, return_stats=True)
    at = some_rows(len(logits))
    truth = route(logits[at], top_k=8)
    assert torch.equal(ids[at].long(), truth.ids) and relative_error(weights[at], truth.weights) < 1e-5
    assert torch.equal(stats.expert_counts.long(), torch.bincount(ids.flatten(), minlength=1024))
    found = moe_permute(ids, num_experts=1024)
    assert all(map(same_bits, found, permutation(ids, num_experts=1024)))


@pytest.mark.alone
def test_ids_far_apart(room: None) -> None:
    """Rows of ids that lie 20,001 elements apart, the last ones behind element 2**31."""
    memory = torch.empty((110_000, 20_001), dtype=torch.int32, device="cuda")
    ids = memory[:, 7:9]
    ids.copy_(torch.randint(-1, 9, ids.shape, device="cuda"))
    assert all(map(same_bits, moe_permute(ids, num_experts=8), permutation(ids.contiguous(), num_experts=8)))
    case = MoECase(110_000, 8, 8, 8, 2)
    t = tensors(case, "cuda") | {"topk_ids": ids}
    at = some_rows(case.tokens)
    ref = experts(**t | {n: t[n][at] for n in ("x", "topk_weights", "topk_ids")}, dtype=torch.float32, rounded=True)
    assert relative_error(fused_moe(**t)[at], ref) < 2.0**-8
