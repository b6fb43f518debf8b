"""The benchmark's candidates for grouped products: each is what runs within its scope, fits, and is right."""

from __future__ import annotations

from typing import Any

import emulate
import pytest
from emulated_moe import Machine

from benchmarks import attention_inputs, moe_cases, moe_inputs
from benchmarks.moe_candidates import (
    EXPERIMENTS,
    ROWS_8,
    TODAY,
    configuration,
    line_of,
    main,
    measure,
    named,
    products_of,
    taken,
)
from benchmarks.timing import CpuTimer
from flashmoe_cupy import reference
from flashmoe_cupy.jit import source
from flashmoe_cupy.jit.device import DeviceProperties
from flashmoe_cupy.plan.archs import MAX_SMEM, RESERVED_SMEM, SM90_SMEM_PER_SM
from flashmoe_cupy.plan.kernels import KERNELS
from flashmoe_cupy.plan.moe import few_rows
from flashmoe_cupy.testing import TOLERANCES, relative_error
from flashmoe_cupy.testing_moe import MoECase

ALL = {one.name: one for of in EXPERIMENTS.values() for one in of.candidates}
KERNEL: Any = KERNELS["grouped_gemm_sm90"]
H200 = DeviceProperties(132, 4_916_736_000_000)


def drawn(name: str = "qwen3_30b_a3b_t64") -> list[Any]:
    """What the two products of a case are on the device, and what the host tells them."""
    found: list[Any] = []
    for product in products_of(named(name)):
        config = KERNEL.choose(product, "sm_90a", True, H200)
        text = KERNEL.source(config)
        found += [text, source.headers_for(text), KERNEL.values(product, config, True), config.smem_bytes]
        found += [KERNEL.map_arguments(product, config), few_rows.NEXT_BYTES]
    return found


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_cases_and_candidates_exist(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    of = EXPERIMENTS[name]
    assert [named(case).name for case in of.cases] == list(of.cases)
    assert len({one.name for one in (TODAY, *of.candidates)}) == 1 + len(of.candidates)
    assert main([name, "--list"]) == 0
    listed = capsys.readouterr().out
    assert all(text in listed for text in (*of.cases, *[one.name for one in of.candidates]))
    with pytest.raises(KeyError, match="it has"):
        named("no such case")


def test_a_name_is_one_candidate() -> None:
    assert all(ALL[one.name] == one for of in EXPERIMENTS.values() for one in of.candidates)


@pytest.mark.parametrize("name", ALL)
def test_a_scope_changes_something_and_leaves_nothing_behind(name: str) -> None:
    before, one = drawn(), ALL[name]
    with taken(one):
        within = [drawn(case) for of in EXPERIMENTS.values() if one in of.candidates for case in of.cases]
        assert all(smem <= MAX_SMEM["sm_90a"] for found in within for smem in found[3::6])
    today = [drawn(case) for of in EXPERIMENTS.values() if one in of.candidates for case in of.cases]
    assert any(a != b for a, b in zip(within, today, strict=True))
    assert drawn() == before


def test_tiles_are_each_products_own() -> None:
    first, second = products_of(named("mixtral_8x7b_t4"))
    with taken(ALL["8 rows, 96 x 16 and 64 x 128 x 12"]):
        assert configuration(first) == "bf16 8x96x64x16 gather gated"
        assert configuration(second) == "bf16 8x64x128x12"
        assert KERNEL.grid(second, KERNEL.choose(second, "sm_90a")) == 132
    with taken(ALL["8 rows, 128 x 6 and 64 x 64 x 8"]):
        assert configuration(first) == "bf16 8x128x64x6 gather gated"
        assert KERNEL.grid(second, KERNEL.choose(second, "sm_90a")) == 264


def test_few_assignments_are_permuted() -> None:
    for name, launches in ((ROWS_8.name, True), ("permuted", False)):
        with taken(ALL[name]):
            found = products_of(named("mixtral_8x7b_t4"))
            assert all((product.self_sorted is not None) == launches for product in found)


def test_counters() -> None:
    for one, expected in ((TODAY, [1, 2]), (ALL["no counter"], [0, 0]), (ALL["64 rows"], [1, 2])):
        with taken(one):
            found = products_of(named("qwen3_30b_a3b_t16"))
            assert [
                KERNEL.values(p, KERNEL.choose(p, "sm_90a", True, H200), True)["tile_counter"] for p in found
            ] == expected


def test_blocks_on_a_multiprocessor() -> None:
    """One that fills it, two alike, or one of each product."""
    for name, per_block in (("128 x 13 and 64 x 128 x 12", [1, 1]), ("128 x 6 and 64 x 64 x 8", [2, 2])):
        with taken(ALL[f"8 rows, {name}"]):
            found = [KERNEL.choose(product, "sm_90a") for product in products_of(named("qwen3_30b_a3b_t64"))]
        assert [config.blocks_per_sm for config in found] == per_block
    with taken(ALL["8 rows, 96 x 10 and 64 x 64 x 8"]):
        both = [KERNEL.choose(product, "sm_90a") for product in products_of(named("qwen3_30b_a3b_t1"))]
    assert all(config.min_blocks == 2 for config in both)
    assert sum(config.smem_bytes + RESERVED_SMEM for config in both) <= SM90_SMEM_PER_SM


def test_a_case_is_measured() -> None:
    """On the processor, where all candidates are the same NumPy back end: what rows say."""
    case = moe_cases.MoECase("tiny", "moe_decode", "", 3, 64, 32, 8, 2, graph=True, routing=False)
    sets: list[Any] = []

    class Recorded(CpuTimer):
        def sample(self, run: Any, launches: int, host_us: float = 0.0, lead: int = 1) -> float:
            sets.append(run)
            return super().sample(run, launches, host_us, lead)

    rows = measure(case, (TODAY, ALL[ROWS_8.name]), Recorded(), "cpu")
    assert [row["candidate"] for row in rows] == ["today", ROWS_8.name]
    for row in rows:
        assert row["status"] == "ok" and row["device_us"] > 0 and row["read_share"] > 0 and row["sets"] >= 2
        assert row["calls"] % row["sets"] == 0, "no call has the weights of the one before"
        assert row["case"] in line_of(row) and "of today" in line_of(row)
    assert rows[0]["ratio"] == 1.0 and rows[1]["configs"][0].startswith("bf16 8x96x64x10")
    assert len(sets) == 1 + 9 * 3


def test_wrong_answers_are_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    case = moe_cases.MoECase("tiny", "moe_decode", "", 3, 64, 32, 8, 2, graph=True, routing=False)
    monkeypatch.setattr(moe_inputs, "check", lambda *_: attention_inputs.Check(0.5, 0.5, 0.01, True))
    rows = measure(case, (TODAY,), CpuTimer(), "cpu")
    assert rows[0]["status"] == "wrong" and "device_us" not in rows[0] and "wrong" in line_of(rows[0])


SHOWN = ["64 rows", "8 rows, 96 x 10 and 64 x 64 x 8", "8 rows, 96 x 16 and 64 x 128 x 12",
         "8 rows, 128 x 6 and 128 x 64 x 13", "8 rows, permuted"]  # fmt: skip


@pytest.mark.slow
@pytest.mark.skipif(emulate.missing() is not None, reason=str(emulate.missing()))
@pytest.mark.parametrize("name", SHOWN)
@pytest.mark.parametrize(
    "case",
    [MoECase(3, 1000, 200, 8, 2), MoECase(45, 200, 904, 3, 2), MoECase(70, 136, 264, 9, 3, routing="zipf")],
    ids=["sorted by the product", "several tiles of rows", "uneven"],
)
def test_they_are_right(case: MoECase, name: str) -> None:
    arrays = case.random()
    truth = reference.fused_moe(**arrays, **case.options())
    for seed in range(3):
        with taken(ALL[name]):
            here = Machine(seed=seed)
            got = here.fused_moe(arrays, **case.options())
        assert sum("grouped_gemm_sm90" in used for used in here.used) == 2
        assert relative_error(got.astype("float64"), truth) <= TOLERANCES["bfloat16"].norm
