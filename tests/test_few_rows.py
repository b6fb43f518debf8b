"""Which tiles products take by the device's memory and multiprocessors, and what is said of it."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from flashmoe_cupy import dtypes, service
from flashmoe_cupy.jit import launch
from flashmoe_cupy.jit.device import H100, DeviceProperties
from flashmoe_cupy.plan.kernels import KERNELS
from flashmoe_cupy.plan.moe import few_rows
from flashmoe_cupy.plan.moe.few_rows import (
    FewRows,
    all_tiles,
    eight_rows,
    permutes_few,
    ring_bytes,
    tiles_for,
    under_way,
)
from flashmoe_cupy.plan.moe.problem import MoEProblem, moe_problem
from flashmoe_cupy.plan.moe.products import Product
from flashmoe_cupy.plan.moe.steps import moe_steps
from flashmoe_cupy.plan.moe.tiles import (
    TILE_8X64,
    TILE_8X64_TWICE,
    TILE_8X96,
    TILE_64X64,
    TILE_64X128,
    TILE_64X128_PAIR,
    TileSm90,
)
from flashmoe_cupy.service import machine
from flashmoe_cupy.service.choices import absent_arrays

KERNEL: Any = KERNELS["grouped_gemm_sm90"]
H200 = DeviceProperties(132, 4_916_736_000_000)
ROWS = Path(__file__).parent.parent / "benchmarks" / "results" / "h100_moe.jsonl"

# The configurations of both products of every case in ROWS, which these rows were measured with on an H100.
MEASURED = {
    ("64x128x128x4 gather gated", "64x128x128x4"): """
        qwen3_30b_a3b_t1 qwen3_30b_a3b_t2 qwen3_30b_a3b_t4 qwen3_30b_a3b_t8 qwen3_30b_a3b_t16 qwen3_30b_a3b_t32
        qwen3_30b_a3b_t64 qwen3_30b_a3b_t128 qwen3_30b_a3b_t256 qwen3_30b_a3b_t512 t1_d2048_n512_e512_k10
        t4_d2048_n512_e512_k10 t16_d2048_n512_e512_k10 t64_d2048_n512_e512_k10 t256_d2048_n512_e512_k10
        mixtral_8x7b_t4 mixtral_8x7b_t16 mixtral_8x7b_t64 torch_t128_e32_k4_biases_fp16
        cupy_t128_e32_k4_biases_fp16 torch_qwen3_30b_a3b_t1 torch_qwen3_30b_a3b_t16 torch_qwen3_30b_a3b_t256
        cupy_qwen3_30b_a3b_t16
    """,
    ("64x128x128x4 cluster2 gather gated", "64x128x128x4 cluster2"): """
        qwen3_30b_a3b_t1024 mixtral_8x7b_t256 kimi_k2_t4096
    """,
    ("128x128x64x6 cluster2 pingpong gather gated", "128x128x64x6 cluster2 pingpong"): """
        qwen3_30b_a3b_t2048 deepseek_v3_t4096 t4096_d2048_n512_e256_k8
    """,
    ("128x256x64x4 cluster2 gather gated", "128x256x64x4 cluster2"): """
        qwen3_30b_a3b_t4096 mixtral_8x7b_t8192 qwen3_235b_a22b_t8192 qwen3_next_80b_a3b_t16384 gpt_oss_20b_t8192
        t32768_d4096_n2048_e64_k4 torch_qwen3_30b_a3b_t4096 cupy_qwen3_30b_a3b_t4096
    """,
    ("128x256x64x4 cluster2 gather gated", "128x192x64x4 cluster2 pingpong"): """
        qwen3_30b_a3b_t8192 qwen3_30b_a3b_t16384 qwen3_30b_a3b_t32768 olmoe_t16384 t24576_d1536_n256_e128_k8
        t24576_d1536_n512_e64_k4 t24576_d1536_n1024_e32_k2 t32768_d4096_n256_e256_k16 t32768_d4096_n512_e128_k8
        t32768_d4096_n1024_e64_k4 t32768_d4096_n512_e256_k16 t32768_d4096_n1024_e128_k8 t40960_d768_n256_e128_k8
        t40960_d768_n512_e64_k4 t40960_d768_n1024_e32_k2
    """,
    ("64x128x128x4 gather gated", "64x64x128x6"): """
        mixtral_8x7b_t1 torch_t16_e8_k2 torch_t1_e128_k8 cupy_t16_e8_k2 cupy_t1_e128_k8
    """,
}


def moe(shape: dict[str, Any]) -> MoEProblem:
    """Of a row's shape."""
    array, kind = absent_arrays(), dtypes.from_name(shape["dtype"])
    tokens, d, n, experts, k = (shape[name] for name in ("tokens", "hidden", "intermediate", "experts", "top_k"))
    halves = 2 if shape["activation"] in ("swiglu", "swigluoai") else 1
    biases = {"b_gate_up": array(kind, experts, halves * n), "b_down": array(kind, experts, d)}
    return moe_problem(
        array(kind, tokens, d), array(kind, experts, halves * n, d), array(kind, experts, d, n),
        array(dtypes.FP32, tokens, k), array(dtypes.INT32, tokens, k), activation=shape["activation"],
        interleaved=shape["interleaved"], **(biases if shape["biases"] else {}),
    )  # fmt: skip


def products(shape: dict[str, Any], device: DeviceProperties = H100) -> list[Product]:
    """Of a row's shape."""
    return [step.problem for step in moe_steps(moe(shape), device)[0] if step.task == "grouped_gemm"]


def chosen(shape: dict[str, Any], device: DeviceProperties = H100) -> tuple[str, ...]:
    """The configurations' names without the element type."""
    names = [KERNEL.choose(product, "sm_90a", True, device).name for product in products(shape, device)]
    return tuple(name.split(" ", 1)[1] for name in names)


def shapes() -> dict[str, dict[str, Any]]:
    """Of all measured cases, by name."""
    rows = [json.loads(line) for line in ROWS.read_text(encoding="utf-8").splitlines()]
    return {row["case"]: row["shape"] for row in rows}


def test_an_h100_takes_what_it_was_measured_with() -> None:
    found = shapes()
    expected = {case: names for names, cases in MEASURED.items() for case in cases.split()}
    assert set(expected) == set(found)
    assert {case: chosen(shape) for case, shape in found.items()} == expected
    assert {case: chosen(shape, DeviceProperties(132, 3_352_320_000_000)) for case, shape in found.items()} == expected


def promotions(shape: dict[str, Any], device: DeviceProperties) -> list[int]:
    """Bytes that L2 fetches at once, of the weights of both products."""
    both = [(p, KERNEL.choose(p, "sm_90a", True, device)) for p in products(shape, device)]
    return [KERNEL.map_arguments(p, config)[1].promotion for p, config in both]


# What an H200 takes for cases whose groups have at most 3.2 rows on average, or 4 of at most 32 assignments.
EIGHT_ROWS = {
    ("8x96x64x10 gather gated", "8x64x64x8"): """
        qwen3_30b_a3b_t1 qwen3_30b_a3b_t2 qwen3_30b_a3b_t4 qwen3_30b_a3b_t8 qwen3_30b_a3b_t16 qwen3_30b_a3b_t32
        t4_d2048_n512_e512_k10 t16_d2048_n512_e512_k10 t64_d2048_n512_e512_k10 torch_qwen3_30b_a3b_t1
        torch_qwen3_30b_a3b_t16 cupy_qwen3_30b_a3b_t16 mixtral_8x7b_t16
    """,
    ("8x96x64x10 gather gated", "8x64x128x12"): """
        t1_d2048_n512_e512_k10 mixtral_8x7b_t1 mixtral_8x7b_t4 torch_t1_e128_k8 cupy_t1_e128_k8
        torch_t16_e8_k2 cupy_t16_e8_k2
    """,
}


def test_an_h200_takes_short_steps_for_few_rows() -> None:
    """As many bytes in twice as many steps, and L2 fetches no more than a step holds; else the choices of an H100."""
    expected = {case: names for names, cases in EIGHT_ROWS.items() for case in cases.split()}
    assert {case: chosen(shape, H200) for case, shape in shapes().items() if case in expected} == expected
    for case, shape in shapes().items():
        for mine, theirs in zip(chosen(shape, H200), chosen(shape), strict=True):
            few = theirs.startswith("64x128x128x4") and "cluster" not in theirs
            if case not in expected:
                assert mine == (theirs.replace("128x128x4", "128x64x8") if few else theirs), case
    some, many = shapes()["qwen3_30b_a3b_t64"], shapes()["mixtral_8x7b_t256"]
    assert chosen(some, H200) == ("64x128x64x8 gather gated", "64x128x64x8")
    assert chosen(many, H200) == chosen(many)
    assert promotions(some, H100) == promotions(many, H100) == promotions(many, H200) == [256, 256]
    assert promotions(some, H200) == promotions(shapes()["qwen3_30b_a3b_t1"], H200) == [128, 128]


def test_eight_rows_where_groups_have_few() -> None:
    few = tiles_for(H200)
    assert few.takes_eight(3.2, 128, 410) and not few.takes_eight(3.3, 128, 420)
    assert few.takes_eight(4.0, 8, 32) and not few.takes_eight(4.1, 8, 33) and not few.takes_eight(5.0, 6, 30)
    assert few.takes_eight(8.0, 1, 8) and not few.takes_eight(9.0, 1, 9)
    assert not tiles_for(H100).takes_eight(0.1, 128, 13) and not tiles_for(H100).takes_eight(1.0, 1, 1)


def test_large_experts_of_few_tokens_are_permuted() -> None:
    """Where reading weights takes long, counters are worth a launch; the workspace is the same on every device."""
    assert permutes_few(H200, 1e9) and not permutes_few(H200, 9e8) and not permutes_few(H100, 1e12)
    for case, launches in (("mixtral_8x7b_t1", 3), ("mixtral_8x7b_t4", 4), ("qwen3_30b_a3b_t4", 3)):
        (slow, work), (fast, same_work) = (moe_steps(moe(shapes()[case]), device) for device in (H100, H200))
        assert (len(slow), len(fast)) == (3, launches), case
        assert work.offsets == same_work.offsets and work.bytes == same_work.bytes
    few = [step.problem for step in moe_steps(moe(shapes()["mixtral_8x7b_t4"]), H200)[0] if step.task == "grouped_gemm"]
    assert [KERNEL.waits_for_counts(p, KERNEL.choose(p, "sm_90a", True, H200)) for p in few] == [False, True]
    assert not KERNEL.waits_for_counts(few[1], KERNEL.choose(few[1], "sm_90a", True, H100))


def test_one_block_or_two_by_what_each_reads() -> None:
    """Tiles of 64 columns: with few of them, two blocks on a multiprocessor would leave others without work."""

    def tile(groups: int, n: int, rows: int, multiprocessors: int = 132) -> TileSm90:
        return eight_rows(True, rows, groups, n, DeviceProperties(multiprocessors, H200.memory_rate))

    assert tile(1, 132 * 64, 1) == TILE_8X64  # 1 or 2 tiles for each multiprocessor
    assert tile(1, 133 * 64, 1) == tile(1, 264 * 64, 1) == TILE_8X64_TWICE  # 2 or 2
    assert tile(1, 265 * 64, 1) == TILE_8X64  # 3 or 4
    assert tile(1, 133 * 64, 1, 133) == TILE_8X64
    assert tile(1, 132 * 64 * 20, 1) == TILE_8X64_TWICE
    assert tile(2, 132 * 32, 1) == tile(2, 132 * 32, 8) == TILE_8X64  # 66 tiles of one group or 132 of both
    assert eight_rows(False, 1, 1, 132 * 64, H200) == TILE_8X96


def test_bytes_under_way() -> None:
    """What a multiprocessor must have asked for: the rate's share times two microseconds."""
    assert 50e3 < under_way(H100) < 52e3 and 74e3 < under_way(H200) < 75e3
    assert under_way(DeviceProperties(66, H100.memory_rate)) == 2 * under_way(H100)
    first = KERNEL.choose(products(shapes()["qwen3_30b_a3b_t1"])[0], "sm_90a")
    assert ring_bytes(first) == 4 * 128 * 128 * 2


def test_rows_go_from_slow_to_fast_memory() -> None:
    limits = [row.under_way for row in few_rows.MEASURED]
    assert limits == sorted(set(limits)) and limits[-1] == float("inf")
    assert tiles_for(H100) is few_rows.MEASURED[0] and tiles_for(H200) is few_rows.MEASURED[1]
    for row in few_rows.MEASURED:
        rows = [rows for rows, _ in row.tiles]
        assert rows == sorted(rows) and KERNEL.tile_by_rows[0][0] > rows[-1]


def test_a_faster_memory_gets_its_own_row(monkeypatch: pytest.MonkeyPatch) -> None:
    """By rows of a group on average, and other tiles where there are few; an H100's choices stay."""
    found = shapes()
    few, some = found["mixtral_8x7b_t1"], found["mixtral_8x7b_t64"]
    before = chosen(few), chosen(some)
    faster = FewRows(float("inf"), ((4, TILE_64X128_PAIR), (32, TILE_64X128)), TILE_64X64._replace(stages=5))
    monkeypatch.setattr(few_rows, "MEASURED", (few_rows.MEASURED[0], faster))
    assert (chosen(few), chosen(some)) == before
    assert chosen(few, H200) == ("64x128x128x4 cluster2 gather gated", "64x64x128x5")
    assert chosen(some, H200) == ("64x128x128x4 gather gated", "64x128x128x4")
    few_tiles = [TILE_64X64, TILE_64X64._replace(stages=5), TILE_8X64_TWICE, TILE_8X64]
    assert all_tiles() == ([TILE_64X128, TILE_64X128_PAIR], [TILE_8X96], few_tiles)
    assert "bf16 64x64x128x5" in [config.name for config in KERNEL.configs("sm_90a")]


def test_explain_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: dict[str, Any] = {"tokens": 4, "hidden": 2048, "intermediate": 768, "experts": 128, "top_k": 8}
    text = "3.35 TB/s to 132 multiprocessors want 51 KB under way on each, its ring holds 131 KB"
    assert str(service.explain(op="moe", arch="sm_90a", **sizes)).count(text) == 2
    many = str(service.explain(op="moe", arch="sm_90a", **(sizes | {"tokens": 8192})))
    assert "under way" not in many
    one = machine.Device(0, "an H200", (9, 0), "sm_90a", 132, 1 << 37, 232448, H200.memory_rate)
    monkeypatch.setattr(machine, "_driver", machine.Driver("13.0", (one,), ""))
    explained = str(service.explain(op="moe", arch="sm_90a", **sizes))
    for ring in ("123 KB", "2 x 66 KB"):
        text = f"4.92 TB/s to 132 multiprocessors want 74 KB under way on each, its ring holds {ring}"
        assert explained.count(text) == 1, explained
    assert machine.properties(one._replace(memory_rate=0)) == H100


class Gone(Exception):
    """What the runtime raises for an attribute that it does not know."""


@pytest.mark.parametrize(
    ("attributes", "expected"),
    [
        ({16: 132, 36: 2_619_000, 37: 5120}, H100),
        ({16: 132, 36: 3_201_000, 37: 6144}, H200),
        ({16: 78, 36: 0, 37: 0}, DeviceProperties(78, H100.memory_rate)),
        ({16: 114}, DeviceProperties(114, H100.memory_rate)),
    ],
    ids=["H100", "H200", "a rate of 0", "no such attribute"],
)
def test_properties_come_from_the_driver(
    attributes: dict[int, int], expected: DeviceProperties, monkeypatch: pytest.MonkeyPatch
) -> None:  # fmt: skip
    asked: list[int] = []

    def attribute(which: int, device: int) -> int:
        assert device == 0
        asked.append(which)
        if which not in attributes:
            raise Gone
        return attributes[which]

    runtime = SimpleNamespace(deviceGetAttribute=attribute, CUDARuntimeError=Gone)
    monkeypatch.setattr(launch, "_runtime", runtime)
    monkeypatch.setattr(launch, "_devices", 1)
    launch.properties.cache_clear()
    try:
        assert launch.properties(0) == expected == launch.properties(0)
        assert len(asked) == 3, "asked once"
    finally:
        launch.properties.cache_clear()
