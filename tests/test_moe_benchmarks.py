"""The benchmarks of the mixture of experts on the CPU: cases, inputs, the check, the measuring loop; no GPU."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from moe_kit import SMOKE, TINY, case_of, dense, named

import flashmoe_cupy
from benchmarks import report
from benchmarks.cases import ITEMSIZE, OURS
from benchmarks.moe_cases import ALL_SUITES, DRAWN, MODELS, MOE_SUITES, SONIC_TABLE, MoECase

ALL_CASES = [case for suite in MOE_SUITES.values() for case in suite.cases]


# ---- cases -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("suite", "name", "gflop", "expert_mb"),
    [
        ("moe_forward", "mixtral_8x7b_t8192", 6 * 8192 * 4096 * 14336 * 2 / 1e9, 352.3),
        ("moe_forward", "qwen3_30b_a3b_t16384", 6 * 16384 * 2048 * 768 * 8 / 1e9, 9.4),
        ("moe_forward", "deepseek_v3_t4096", 6 * 4096 * 7168 * 2048 * 8 / 1e9, 88.1),
        ("moe_forward", "kimi_k2_t4096", 6 * 4096 * 7168 * 2048 * 8 / 1e9, 88.1),
        ("moe_forward", "t24576_d1536_n256_e128_k8", 6 * 24576 * 1536 * 256 * 8 / 1e9, 2.36),
        ("moe_decode", "qwen3_30b_a3b_t1", 6 * 2048 * 768 * 8 / 1e9, 9.4),
        ("moe_decode", "t4_d2048_n512_e512_k10", 6 * 4 * 2048 * 512 * 10 / 1e9, 6.3),
        ("moe_smoke", "not_gated", 4 * 20 * 32 * 24 * 2 / 1e9, 4 * 2 * 32 * 24 / 1e6),
    ],
)
def test_work_is_the_hand_made_numbers(suite: str, name: str, gflop: float, expert_mb: float) -> None:
    case = case_of(suite, name)
    assert case.flops() == round(gflop * 1e9)
    assert case.expert_bytes() / 1e6 == pytest.approx(expert_mb, rel=6e-3)
    assert case.bytes(3) == 3 * case.expert_bytes() + 2 * case.tokens * case.hidden * ITEMSIZE[case.dtype]


def test_biases_are_bytes_of_an_expert() -> None:
    case = case_of("moe_forward", "gpt_oss_20b_t8192")
    assert (case.activation, case.interleaved, case.biases) == ("swigluoai", True, True)
    assert case.expert_bytes() == 2 * (3 * 2880 * 2880 + 3 * 2880)


def test_the_suites_hold_what_must_be_shown() -> None:
    forward = {case.name: case for case in MOE_SUITES["moe_forward"].cases}
    sizes = {name: (c.tokens, c.hidden, c.intermediate, c.experts, c.top_k) for name, c in forward.items()}
    assert sizes["mixtral_8x7b_t8192"] == (8192, 4096, 14336, 8, 2)
    assert sizes["qwen3_30b_a3b_t16384"] == (16384, 2048, 768, 128, 8)
    assert sizes["olmoe_t16384"] == (16384, 2048, 1024, 64, 8)
    assert sizes["deepseek_v3_t4096"] == (4096, 7168, 2048, 256, 8)
    assert sizes["t4096_d2048_n512_e256_k8"] == (4096, 2048, 512, 256, 8)
    assert set(SONIC_TABLE) <= set(sizes.values()) and len(set(SONIC_TABLE)) == 12
    assert {(24576, 1536, 256, 128, 8), (32768, 4096, 1024, 128, 8)} < set(SONIC_TABLE)
    assert {name.rpartition("_t")[0] for name in forward} >= set(MODELS)
    decode = {(c.hidden, c.intermediate, c.experts, c.top_k, c.tokens) for c in MOE_SUITES["moe_decode"].cases}
    for model in ((2048, 768, 128, 8), (2048, 512, 512, 10), (4096, 14336, 8, 2)):
        assert {tokens for *rest, tokens in decode if tuple(rest) == model} == {1, 4, 16, 64, 256}
    drawn = [case for case in MOE_SUITES["moe_decode"].cases if case.source == DRAWN]
    assert len(drawn) == 12 and drawn[0].name == "t243_d2880_n1152_e93_k4"  # that seed's
    for case in drawn:
        assert 60 <= case.experts <= 160 and 4 <= case.top_k <= 8 and 20 <= case.tokens <= 250
        assert 1024 <= case.intermediate <= 1536 and case.hidden in (2048, 2880, 4096)
    assert [case.tokens for case in MOE_SUITES["moe_curve"].cases] == [2**i for i in range(16)]
    assert MOE_SUITES["moe_host"].measure == "host_us"


def test_every_case_is_legal() -> None:
    for suite in MOE_SUITES.values():
        names = [case.name for case in suite.cases]
        assert len(set(names)) == len(names) and all(case.suite == suite.name for case in suite.cases)
        assert suite.ours in suite.libraries and set(suite.rivals) <= set(suite.libraries)
    for case in ALL_CASES:
        assert case.top_k <= min(32, case.experts * case.topk_group // case.num_expert_group)
        assert case.hidden % 8 == 0 and case.intermediate % 8 == 0 and case.experts % case.num_expert_group == 0
        assert case.experts * case.expert_bytes() < 40e9  # beside what is computed it fits into 80 GB
    graphs = {case.suite for case in ALL_CASES if case.graph}
    assert graphs == {"moe_decode", "moe_curve", "moe_smoke"}
    assert all(case.routing for case in MOE_SUITES["moe_forward"].cases)
    assert set(ALL_SUITES) > set(MOE_SUITES) and len(ALL_SUITES) == 27


# ---- inputs and the check of an answer -------------------------------------------------------------------------------


@pytest.mark.torch
@pytest.mark.parametrize("case", SMOKE, ids=named)
def test_routing_is_that_of_moe_route(case: MoECase) -> None:
    from benchmarks.moe_inputs import make_inputs

    inputs = make_inputs(case, "cpu", seed=3)
    bias = None if inputs.correction_bias is None else inputs.correction_bias.numpy()
    weights, ids = flashmoe_cupy.moe_route(  # type: ignore[call-overload]
        inputs.logits.numpy(), top_k=case.top_k, scoring_func=case.scoring_func, renormalize=case.renormalize,
        routed_scaling_factor=case.routed_scaling_factor, e_score_correction_bias=bias,
        num_expert_group=case.num_expert_group, topk_group=case.topk_group,
    )  # fmt: skip
    np.testing.assert_array_equal(inputs.topk_ids.numpy(), ids)
    np.testing.assert_allclose(inputs.topk_weights.numpy(), weights, rtol=2e-6)


@pytest.mark.torch
@pytest.mark.parametrize("case", SMOKE, ids=named)
def test_check_takes_the_dense_formula_and_no_other(case: MoECase) -> None:
    from benchmarks.moe_inputs import check, make_inputs, poison

    inputs = make_inputs(case, "cpu", seed=1)
    out = dense(case, inputs)
    assert tuple(out.shape) == tuple(poison(case, "cpu").shape)
    good = check(case, inputs, out)
    assert good.passed and good.error < good.limit / 2
    wrong = out.clone()
    wrong[-1] = -wrong[-1]
    assert not check(case, inputs, wrong).passed
    assert not check(case, make_inputs(case, "cpu", seed=2), out).passed
    unwritten = out.clone()
    unwritten.view(-1)[out.numel() // 2] = math.nan
    found = check(case, inputs, unwritten, tokens=1)
    assert not found.finite and not found.passed


@pytest.mark.torch
def test_the_sample_has_tokens_of_the_most_and_the_least_used_experts() -> None:
    import torch

    from benchmarks.moe_inputs import make_inputs, sample

    inputs = make_inputs(TINY._replace(tokens=200), "cpu", seed=1)
    ids = torch.zeros(200, 2, dtype=torch.int32)
    ids[:, 1] = 1
    ids[120, 1], ids[77, 0] = 4, 5
    picked = sample(inputs._replace(topk_ids=ids), count=3, seed=0)
    assert {0, 77, 120, 199} <= set(picked) and len(picked) <= 9
    assert sample(inputs, count=300, seed=0) == list(range(200))


@pytest.mark.torch
def test_sets_of_weights_rotate_past_the_cache() -> None:
    import torch

    from benchmarks import moe_inputs
    from benchmarks.timing import CpuTimer

    class Cached(CpuTimer):
        cache_bytes = 5_000

    case = TINY._replace(graph=True)
    assert len(moe_inputs.input_sets(case, CpuTimer(), "cpu", 0)) == 2
    assert len(moe_inputs.input_sets(TINY, CpuTimer(), "cpu", 0)) == 1
    sets = moe_inputs.input_sets(case, Cached(), "cpu", 0)
    used = [moe_inputs.touched(one) * case.expert_bytes() for one in sets]
    assert sum(used[1:]) >= 4 * Cached.cache_bytes > used[0] > Cached.cache_bytes and len(sets) == 3
    assert not torch.equal(sets[0].w_down, sets[1].w_down) and not torch.equal(sets[0].topk_ids, sets[1].topk_ids)
    again = moe_inputs.make_inputs(case, "cpu", 0)
    assert all(torch.equal(a, b) for a, b in zip(again, sets[0], strict=True) if a is not None)
    assert 0.8 < float((sets[0].x.float() @ sets[0].w_gate_up[0].float().T).std()) < 1.2


# ---- the measuring loop ----------------------------------------------------------------------------------------------


@pytest.mark.torch
def test_run_on_the_cpu_end_to_end(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from benchmarks import run

    out = tmp_path / "smoke.jsonl"
    arguments = ["--suite", "moe_smoke", "--device", "cpu", "--quick", "--rounds", "2", "--out", str(out)]
    code = run.main(arguments)
    rows = [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()]
    assert code == 0, [row["reason"] for row in rows if row["status"] in ("error", "wrong")]
    suite = MOE_SUITES["moe_smoke"]
    assert [(r["case"], r["library"]) for r in rows] == [(c.name, n) for c in suite.cases for n in suite.libraries]
    right = [row for row in rows if row["status"] == "ok"]
    assert {row["case"] for row in right if row["library"] == OURS} == {case.name for case in suite.cases}
    for row in right:
        assert 0 <= row["error"] <= row["error_limit"]
        assert row["tflops"] == pytest.approx(row["flops"] / row["device_us"] / 1e6, rel=1e-3)
        assert row["share"] == pytest.approx(row["tflops"] / row["ceiling_tflops"], rel=1e-2, abs=1e-4)
        assert row["weight_gbps"] == pytest.approx(row["weight_bytes"] / row["device_us"] / 1e3, rel=1e-3)
        assert row["read_share"] == pytest.approx(row["weight_gbps"] / row["read_gbps"], rel=1e-2, abs=1e-4)
        case = case_of("moe_smoke", row["case"])
        assert row["weight_bytes"] == round(row["experts_touched"] * case.expert_bytes()) < row["bytes"]
        assert row["routing"] == ("timed" if row["library"] == OURS and case.routing else "given")
        assert (row["calls"] > 1) == case.graph and row["calls"] % row["input_sets"] == 0
        assert row["input_sets"] == 1 + case.graph
    reasons = {row["reason"] for row in rows if row["status"] == "unsupported"}
    assert len(reasons) == 2 and any("cannot be captured" in reason for reason in reasons)
    capsys.readouterr()
    assert report.main([str(out)]) == 0
    assert "experts" in capsys.readouterr().out
    assert report.main([str(out), "--ratio", "moe_smoke"]) == 0
    assert capsys.readouterr().out.rstrip().endswith(f"rows {len(suite.cases) - 1}")


@pytest.mark.torch
def test_what_a_graph_computes_is_checked_too(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from benchmarks import moe_bench, run
    from benchmarks.moe_rivals import GroupedMM
    from benchmarks.timing import CpuTimer, Replay, capture

    class Stale(CpuTimer):
        """Its replays compute nothing: the output is what the first one left."""

        def capture(self, run: Any, calls: int) -> Replay:
            made = capture(run, calls, cuda=False)
            made.run(0)
            kept = made.output().clone()
            return Replay(lambda i: sum(range(2000)), calls, lambda: kept)

    monkeypatch.setattr(run, "CpuTimer", Stale)
    monkeypatch.setitem(moe_bench.MOE_LIBRARIES, OURS, GroupedMM(OURS, "gather_sum"))
    out = tmp_path / "a.jsonl"
    arguments = ["--suite", "moe_smoke", "--cases", "^graph$", "--device", "cpu", "--quick", "--rounds", "2"]
    assert run.main([*arguments, "--libraries", OURS, "--out", str(out)]) == 1
    (row,) = (json.loads(line) for line in out.read_text(encoding="utf-8").splitlines())
    assert (row["status"], row["reason"]) == ("wrong", "right at first, wrong after the rounds")


@pytest.mark.torch
def test_a_graph_ends_with_the_first_set() -> None:
    from benchmarks.timing import CpuTimer

    seen: list[int] = []

    def call(i: int) -> int:
        seen.append(i % 3)
        return i

    replay = CpuTimer().capture(call, 6)
    replay.run(0)
    assert seen == [1, 2, 0, 1, 2, 0] and replay.output() == 6 and replay.calls == 6


@pytest.mark.torch
def test_references_are_rates_of_the_machine() -> None:
    from benchmarks.timing import CpuTimer

    timer = CpuTimer()
    found = timer.references()
    assert set(found) == {"ceiling_tflops", "read_gbps"}
    rate = found["ceiling_tflops"].work / min(timer.sample(found["ceiling_tflops"].run, 3) for _ in range(5))
    assert 0.1 < rate / timer.ceiling() < 10  # the processors are shared
    speed = found["read_gbps"].work / min(timer.sample(found["read_gbps"].run, 3) for _ in range(3))
    assert 0.2 < speed < 1000


@pytest.mark.torch
def test_libraries_and_references_are_sampled_in_the_same_way(monkeypatch: pytest.MonkeyPatch) -> None:
    from benchmarks import run
    from benchmarks.timing import CpuTimer, Reference

    seen: dict[str, set[tuple[int, int]]] = {"library": set(), "reference": set()}

    class Steady(CpuTimer):
        """Every launch takes 400 us."""

        def sample(self, run: Any, launches: int, host_us: float = 0.0, lead: int = 1) -> float:  # noqa: ARG002
            run(0)
            if launches > 2:
                seen["reference" if run is known else "library"].add((launches, lead))
            return 400.0

        def references(self) -> dict[str, Reference]:
            return {key: Reference(known, 1.0) for key in ("ceiling_tflops", "read_gbps")}

    def known(i: int) -> int:
        return i

    monkeypatch.setattr(run, "CpuTimer", Steady)
    arguments = ["--suite", "moe_smoke", "--device", "cpu", "--rounds", "2", "--libraries", OURS]
    assert run.main(arguments) == 0
    ceiling = {(5, 1), (9, 1)}  # of the process
    assert seen["reference"] == {(12, 50)} and seen["library"] - ceiling <= {(12, 50)} and (12, 50) in seen["library"]


@pytest.mark.torch
def test_a_layer_that_does_not_fit_costs_its_case_only(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from benchmarks import moe_inputs, run

    made = moe_inputs.make_inputs

    def too_big(case: MoECase, device: str, seed: int) -> Any:
        if case.name == "fp32":
            raise MemoryError("34 GB")
        return made(case, device, seed)

    monkeypatch.setattr(moe_inputs, "make_inputs", too_big)
    out = tmp_path / "a.jsonl"
    arguments = ["--suite", "moe_smoke", "--cases", "fp32|one_token", "--device", "cpu", "--quick", "--rounds", "2"]
    assert run.main([*arguments, "--libraries", "torch_grouped_mm", "--out", str(out)]) == 0
    rows = [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()]
    assert [(row["status"], row["weight_bytes"] is None) for row in rows] == [("error", True), ("ok", False)]
    assert rows[0]["reason"] == "inputs: MemoryError: 34 GB"
