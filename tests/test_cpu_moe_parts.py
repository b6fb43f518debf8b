"""moe_permute and grouped_gemm on the NumPy back end: the permutation by hand, the products by torch in float64."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_cpu_moe import DTYPES, F, check, problem, torch

from flashmoe_cupy import fused_moe, grouped_gemm, moe_permute
from flashmoe_cupy.cpu import moe as module

pytestmark = pytest.mark.torch


# ---------------------------------------------------------------------------------------------------------------------
# moe_permute


def sorted_by_hand(rows: list[list[int]], experts: int, table: list[int] | None) -> tuple[list[int], ...]:
    mine: dict[int, list[int]] = {e: [] for e in range(experts)}
    for i, e in enumerate(itertools.chain.from_iterable(rows)):
        if table is not None:
            e = table[e] if 0 <= e < len(table) else -1
        if 0 <= e < experts:
            mine[e].append(i)
    order = [i for e in range(experts) for i in mine[e]]
    total = sum(map(len, rows))
    offsets = list(itertools.accumulate((len(mine[e]) for e in range(experts)), initial=0))
    inverse = [order.index(i) if i in order else -1 for i in range(total)]
    return offsets, order + [-1] * (total - len(order)), inverse


@given(
    st.integers(0, 20), st.integers(1, 5), st.sampled_from([1, 2, 5, 300, 70_000]), st.booleans(), st.booleans(),
    st.integers(0, 2**16),
)  # fmt: skip
def test_permute_is_exact(tokens: int, k: int, experts: int, mapped: bool, wide: bool, seed: int) -> None:
    rng = np.random.default_rng(seed)
    ids = rng.integers(-2, min(experts, 8) + 3, (tokens, k)).astype(np.int64 if wide else np.int32)
    if wide and ids.size:
        ids[0, 0] = rng.choice([2**40, -(2**62), 2**32 + 1])
    table = rng.integers(-2, experts + 2, 6).astype(np.int32) if mapped else None
    as_tensor = None if table is None else torch.from_numpy(table)
    found = moe_permute(torch.from_numpy(ids), num_experts=experts, expert_map=as_tensor)
    expected = sorted_by_hand(ids.tolist(), experts, None if table is None else table.tolist())
    for part, want, shape in zip(found, expected, ((experts + 1,), (tokens * k,), (tokens, k)), strict=True):
        assert part.dtype == torch.int32 and tuple(part.shape) == shape
        assert part.reshape(-1).tolist() == want


def test_permute_strided_ids() -> None:
    wide = np.arange(60, dtype=np.int32).reshape(10, 6) % 7
    for part in (wide[::2, :3], wide[::-1, 2:]):
        for a, b in zip(moe_permute(part, num_experts=6), moe_permute(part.copy(), num_experts=6), strict=True):
            np.testing.assert_array_equal(a, b)


# ---------------------------------------------------------------------------------------------------------------------
# grouped_gemm


def product(x: Any, w: Any, bias: Any, e: int) -> Any:
    y = x.double() @ w[e].double().T
    return y if bias is None else y + bias[e].double()


OFFSETS: list[tuple[str, list[int]]] = [
    ("all", [0, 10, 40, 64]), ("empty groups", [0, 0, 64, 64]), ("rows of nobody", [5, 20, 20, 61]), ("none", [0] * 4)
]  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bias", ["", "float32", "same"])
@pytest.mark.parametrize("offsets", [o for _, o in OFFSETS], ids=[name for name, _ in OFFSETS])
def test_gemm_with_offsets(dtype: str, bias: str, offsets: list[int]) -> None:
    kind = DTYPES[dtype]
    x, w = torch.randn(64, 40).to(kind), torch.randn(3, 24, 40).to(kind)
    b = None if not bias else torch.randn(3, 24).to(torch.float32 if bias == "float32" else kind)
    ends = torch.tensor(offsets, dtype=torch.int32)
    ref = torch.zeros(64, 24, dtype=torch.float64)
    for e in range(3):
        ref[offsets[e] : offsets[e + 1]] = product(x[offsets[e] : offsets[e + 1]], w, b, e)
    check(grouped_gemm(x, w, offsets=ends, bias=b), ref, dtype)
    out = torch.full((64, 30), 9.0, dtype=kind)
    assert grouped_gemm(x, w, offsets=ends, bias=b, out=out[:, 3:27]).data_ptr() == out[:, 3:].data_ptr()
    mine = slice(offsets[0], offsets[-1])
    check(out[mine, 3:27], ref[mine], dtype)
    out[mine, 3:27] = 9.0
    assert bool((out == 9.0).all())  # rows of no group, and what lies beside


@pytest.mark.parametrize("dtype", DTYPES)
def test_gemm_with_gather(dtype: str) -> None:
    kind = DTYPES[dtype]
    x, w, b = torch.randn(20, 16).to(kind), torch.randn(4, 8, 16).to(kind), torch.randn(4, 8)
    index = torch.randint(0, 20, (70,), dtype=torch.int32)
    index[::9], index[4] = -1, 20
    index[13], index[40] = -(2**31), 2**31 - 1
    ends = [0, 30, 30, 66, 68]
    rows = torch.where(((index >= 0) & (index < 20))[:, None], x[index.clamp(0, 19).long()], 0)
    ref = torch.zeros(70, 8, dtype=torch.float64)
    for e in range(4):
        ref[ends[e] : ends[e + 1]] = product(rows[ends[e] : ends[e + 1]], w, b, e)
    check(grouped_gemm(x, w, offsets=torch.tensor(ends, dtype=torch.int32), gather_indices=index, bias=b), ref, dtype)
    nothing = grouped_gemm(x[:0], w, offsets=torch.tensor(ends, dtype=torch.int32), gather_indices=index)
    assert bool((nothing == 0).all()) and nothing.shape == (70, 8)


@pytest.mark.parametrize("dtype", DTYPES)
def test_gemm_masked(dtype: str) -> None:
    kind = DTYPES[dtype]
    x, w = torch.randn(3, 9, 48).to(kind)[..., :40], torch.randn(3, 30, 40).to(kind)[:, 3:27]
    sizes = [9, 0, 4]
    counts = torch.tensor(sizes, dtype=torch.int32)
    ref = torch.zeros(3, 9, 24, dtype=torch.float64)
    for e, size in enumerate(sizes):
        ref[e, :size] = product(x[e, :size], w, None, e)
    out = grouped_gemm(x, w, group_sizes=counts)
    check(out.reshape(27, 24), ref.reshape(27, 24), dtype)
    given = torch.full((3, 9, 24), 9.0, dtype=kind)
    assert grouped_gemm(x, w, group_sizes=counts, out=given) is given
    for e, size in enumerate(sizes):
        assert torch.equal(given[e, :size], out[e, :size]) and bool((given[e, size:] == 9).all())


def test_gemm_in_small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    for size in (1, 70, 200):
        monkeypatch.setattr(module, "_ROWS", size)
        monkeypatch.setattr(module, "_WEIGHTS", size)
        test_gemm_with_gather("bfloat16")
        test_gemm_masked("float16")
    test_gemm_with_offsets("float32", "same", [5, 20, 20, 61])


def test_the_building_blocks_make_the_whole() -> None:
    """permute, two products and a sum by hand give what fused_moe gives."""
    a = problem(31, 5, 3, d=24, n=16, ids="any")
    p: Any = moe_permute(a["topk_ids"], num_experts=5)
    token = torch.where(p.sorted_indices >= 0, p.sorted_indices // 3, -1)
    h = grouped_gemm(a["x"], a["w_gate_up"], offsets=p.offsets, gather_indices=token)
    y = grouped_gemm(F.silu(h[:, :16]) * h[:, 16:], a["w_down"], offsets=p.offsets)
    place = p.inverse_indices.long()
    parts = torch.where((place >= 0)[..., None], y[place.clamp(min=0)], 0.0)
    out = (a["topk_weights"][..., None] * parts).sum(1)
    torch.testing.assert_close(out, fused_moe(**a), rtol=1e-5, atol=1e-6)


