"""The bars of the mixture of experts and its tables, from made-up rows; no GPU, nothing is measured."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from benchmarks import bars, report
from benchmarks.bars import BARS, DENSE, HOST, LEAST, MEAN, READ, SPEED
from benchmarks.cases import OURS
from benchmarks.moe_cases import ALL_SUITES, MOE_SUITES, MoECase
from benchmarks.rows import LABELS

RUN = "2026-01-01T00:00:00Z-1"


def made_up(case: MoECase, library: str, us: float | None, **fields: Any) -> dict[str, Any]:
    """A row as run.py writes it, of a machine with 700 TFLOP/s and 2900 GB/s; every expert gets a token."""
    row: dict[str, Any] = {
        "suite": case.suite,
        "case": case.name,
        "library": library,
        "status": "ok" if us else "missing",
        "reason": "" if us else "no file given",
        "run": RUN,
        "device": "Device A",
        "commit": "0123456789abcdef",
        "versions": {"torch": "2.11"},
        "shape": case.shape(),
        "experts_touched": case.experts,
        "flops": case.flops(),
        "weight_bytes": case.experts * case.expert_bytes(),
        "ceiling_tflops": 700.0,
        "read_gbps": 2900.0,
        "error": 1e-3,
    }
    if us:
        tflops, speed = case.flops() / us / 1e6, row["weight_bytes"] / us / 1e3
        row |= {"device_us": us, "host_us": us / 10, "tflops": tflops, "share": tflops / 700}
        row |= {"weight_gbps": speed, "read_share": speed / 2900}
    return row | fields


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def forward_rows(share: float = 0.9, grouped: float = 2.0, loop: float = 6.0, **fields: Any) -> list[dict[str, Any]]:
    """Ours at that share of 700 TFLOP/s or of the weights' floor, what is slower; rivals slower by those factors."""
    rows = []
    for case in MOE_SUITES["moe_forward"].cases:
        us = max(case.flops() / (share * 700e6), case.experts * case.expert_bytes() / (share * 2900e3))
        rows.append(made_up(case, OURS, us, **fields))
        times = {"torch_grouped_mm": grouped * us, "torch_index_add": 1.1 * grouped * us, "torch_loop": loop * us}
        rows += [made_up(case, name, time, **fields) for name, time in times.items()]
        rows += [made_up(case, name, None, **fields) for name in ("liger", "vllm_triton", "sonicmoe")]
    return rows


def decode_rows(share: float = 0.97, vllm: float = 1.1) -> list[dict[str, Any]]:
    rows = []
    for case in MOE_SUITES["moe_decode"].cases:
        us = case.experts * case.expert_bytes() / (share * 2900e3)
        rows.append(made_up(case, OURS, us))
        rows += [made_up(case, "torch_grouped_mm", 1.5 * us), made_up(case, "vllm_triton", vllm * us)]
    return rows


def slower(rows: list[dict[str, Any]], case: str, factor: float) -> list[dict[str, Any]]:
    """The same rows with ours slower in one case."""
    for row in rows:
        if (row["case"], row["library"]) == (case, OURS):
            for key in ("device_us", "host_us"):
                row[key] *= factor
            for key in ("tflops", "share", "weight_gbps", "read_share"):
                row[key] /= factor
    return rows


def bars_line(text: str) -> str:
    return next(line for line in text.splitlines() if line.startswith("bars: "))


def verdict(text: str, case: str, what: str) -> list[str]:
    """The cells of one bar in a Markdown table."""
    (line,) = (line for line in text.splitlines() if line.startswith(f"| {case} | {what}"))
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_the_bars_are_the_ones_to_show() -> None:
    mine = [bar for bar in BARS if bar.suite in MOE_SUITES]
    found = {(bar.suite, bar.case, bar.kind): bar.limit for bar in mine}
    assert len(found) == len(mine) == 9 + 10 + 12
    forward = {(case, kind): limit for (suite, case, kind), limit in found.items() if suite == "moe_forward"}
    assert forward == {
        ("qwen3_30b_a3b_t16384", DENSE): 0.71,
        ("olmoe_t16384", DENSE): 0.80,
        ("t24576_d1536_n256_e128_k8", DENSE): 0.56,
        ("t32768_d4096_n1024_e128_k8", DENSE): 0.72,
        ("mixtral_8x7b_t8192", DENSE): 0.80,
        ("qwen3_30b_a3b_t16384", SPEED): 1.8,
        ("t4096_d2048_n512_e256_k8", SPEED): 5.0,
        ("deepseek_v3_t4096", SPEED): 4.5,
        ("deepseek_v3_t4096", READ): 0.80,
    }
    decode = {case: limit for (suite, case, kind), limit in found.items() if suite == "moe_decode" and kind == READ}
    qwen = {"t1": 0.70, "t4": 0.85, "t16": 0.94, "t64": 0.94, "t256": 0.94}
    assert decode == {f"qwen3_30b_a3b_{tokens}": limit for tokens, limit in qwen.items()} | {"mixtral_8x7b_t1": 0.90}
    groups = {(bar.case, bar.kind): (bar.limit, len(bar.cases)) for bar in mine if bar.cases}
    assert groups == {
        ("15 rows of models", MEAN): (1.04, 15),
        ("15 rows of models", LEAST): (0.98, 15),
        ("12 shapes drawn at random", MEAN): (1.0, 12),
        ("12 shapes drawn at random", LEAST): (0.97, 12),
    }
    assert {bar.rivals for bar in mine if bar.cases} == {("vllm_triton",)}
    assert {limit for (suite, _, kind), limit in found.items() if suite in MOE_SUITES and kind == HOST} == {30.0}
    for bar in BARS:  # test_numpy_benchmark.py has the limits of the NumPy back end's, test_bars.py those of attention
        suite = ALL_SUITES[bar.suite]
        assert set(bar.cases or [bar.case]) <= {case.name for case in suite.cases}
        assert set(bar.rivals) <= set(suite.libraries) & set(LABELS)


def test_bars_hold_and_ratios_follow(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write(tmp_path / "a.jsonl", forward_rows())
    assert report.main([str(path), "--ratio", "moe_forward", "--markdown"]) == 0
    text = capsys.readouterr().out
    assert bars_line(text) == "bars: 9 of 9 hold"
    assert text.count("| pass |") == 9 and "FAIL" not in text
    qwen = verdict(text, "qwen3_30b_a3b_t16384", SPEED)
    assert qwen[2:] == ["≥ 1.8", "2.000", "pass", "against torch grouped_mm"]
    assert verdict(text, "mixtral_8x7b_t8192", DENSE)[2:5] == ["≥ 0.8", "0.900", "pass"]
    assert verdict(text, "deepseek_v3_t4096", READ)[2:5] == ["≥ 0.8", "0.900", "pass"]
    assert text.rstrip().splitlines()[-1] == "geomean 2.000 min 2.000 rows 21"
    assert "not compared: SonicMoE: missing: no file given" in text


@pytest.mark.parametrize(
    ("case", "factor", "failing"),
    [
        ("qwen3_30b_a3b_t16384", 1.2, {DENSE: "0.750", SPEED: "1.667"}),
        ("qwen3_30b_a3b_t16384", 1.3, {DENSE: "0.692", SPEED: "1.538"}),
        ("olmoe_t16384", 1.2, {DENSE: "0.750"}),
        ("t24576_d1536_n256_e128_k8", 1.7, {DENSE: "0.529"}),
        ("t32768_d4096_n1024_e128_k8", 1.3, {DENSE: "0.692"}),
        ("mixtral_8x7b_t8192", 1.2, {DENSE: "0.750"}),
        ("t4096_d2048_n512_e256_k8", 1.25, {SPEED: "4.800"}),
        ("deepseek_v3_t4096", 1.2, {READ: "0.750", SPEED: "5.000"}),
        ("deepseek_v3_t4096", 1.4, {READ: "0.643", SPEED: "4.286"}),
    ],
)
def test_a_bar_that_does_not_hold_fails(
    case: str, factor: float, failing: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write(tmp_path / "a.jsonl", slower(forward_rows(), case, factor))
    assert report.main([str(path), "--ratio", "moe_forward", "--markdown"]) == 0
    text = capsys.readouterr().out
    limits = {(bar.case, bar.kind): bar.limit for bar in BARS}
    failed = 0
    for what, value in failing.items():
        cells = verdict(text, case, what)
        holds = float(value) >= limits[case, what]
        failed += not holds
        assert cells[3:5] == [value, "pass" if holds else "FAIL"]
    assert failed and bars_line(text).startswith(f"bars: {9 - failed} of 9 hold; FAIL: {case} (")


def test_the_better_of_two_grouped_products_is_the_rival() -> None:
    rows = forward_rows()
    for row in rows:
        if row["library"] == "torch_index_add":
            row["device_us"] /= 2
    found = {(item.bar.case, item.bar.kind): item for item in bars.judge(rows, "moe_forward")}
    item = found["qwen3_30b_a3b_t16384", SPEED]
    assert item.value == pytest.approx(1.1) and item.word() == "FAIL"
    assert item.note == "against torch grouped_mm, index_add"


def test_decode_is_held_to_the_read_rate_and_to_vllm(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write(tmp_path / "a.jsonl", decode_rows())
    assert report.main([str(path), "--ratio", "moe_decode", "--markdown"]) == 0
    text = capsys.readouterr().out
    assert bars_line(text) == "bars: 10 of 10 hold"
    assert text.rstrip().splitlines()[-1] == "geomean 1.100 min 1.100 rows 27"
    rows = slower(decode_rows(share=0.96), "qwen3_30b_a3b_t64", 1.05)
    assert report.main([str(write(path, rows)), "--ratio", "moe_decode"]) == 0
    line = bars_line(capsys.readouterr().out)
    assert line == f"bars: 9 of 10 hold; FAIL: qwen3_30b_a3b_t64 ({READ})"
    rows = slower(decode_rows(), "t16_d2048_n512_e512_k10", 1.2)
    assert report.main([str(write(path, rows)), "--ratio", "moe_decode", "--markdown"]) == 0
    text = capsys.readouterr().out
    assert bars_line(text) == "bars: 9 of 10 hold; FAIL: 15 rows of models (least speed over vLLM's Triton kernel)"
    note = "t16_d2048_n512_e512_k10, against vLLM's Triton kernel"
    assert verdict(text, "15 rows of models", LEAST)[2:] == ["≥ 0.98", "0.917", "FAIL", note]
    geomean = math.exp((14 * math.log(1.1) + math.log(1.1 / 1.2)) / 15)
    assert verdict(text, "15 rows of models", MEAN)[2:5] == ["≥ 1.04", f"{geomean:.3f}", "pass"]
    assert verdict(text, "12 shapes drawn at random", LEAST)[2:5] == ["≥ 0.97", "1.100", "pass"]
    assert text.rstrip().splitlines()[-1].endswith("min 0.917 rows 27")


def test_a_rival_that_is_missing_leaves_its_bars_open(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [row for row in decode_rows() if row["library"] != "vllm_triton"]
    rows += [made_up(case, "vllm_triton", None) for case in MOE_SUITES["moe_decode"].cases]
    path = write(tmp_path / "a.jsonl", rows)
    assert report.main([str(path), "--ratio", "moe_decode", "--markdown"]) == 0
    text = capsys.readouterr().out
    assert bars_line(text).startswith("bars: 6 of 10 hold; not measured: 15 rows of models (geomean of the speed over")
    cells = verdict(text, "15 rows of models", LEAST)
    note = "15 of 15 rows are missing; qwen3_30b_a3b_t1: vLLM's Triton kernel: missing: no file given"
    assert cells[3:] == ["-", "not measured", note]
    assert "not compared: vLLM's Triton kernel: missing: no file given" in text


def test_bars_are_shown_though_cases_are_lacking(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [row for row in forward_rows() if row["case"] == "olmoe_t16384"]
    wrong = made_up(MOE_SUITES["moe_forward"].cases[0], OURS, None, status="wrong", reason="the error is too large")
    path = write(tmp_path / "a.jsonl", [*rows, wrong])
    assert report.main([str(path), "--ratio", "moe_forward", "--markdown"]) == 1
    captured = capsys.readouterr()
    assert bars_line(captured.out).startswith("bars: 1 of 9 hold; not measured: qwen3_30b_a3b_t16384 (share")
    assert verdict(captured.out, "mixtral_8x7b_t8192", DENSE)[4:] == [
        "not measured",
        "flashmoe_cupy: wrong: the error is too large",
    ]
    assert verdict(captured.out, "t24576_d1536_n256_e128_k8", DENSE)[5] == "no run has this case"
    assert "20 of 21 rows of moe_forward are missing" in captured.err


def test_a_bar_takes_the_newest_run_that_can_answer_it() -> None:
    later = "2026-02-01T00:00:00Z-1"
    newer = [row for row in forward_rows(0.5, 3.0, run=later) if row["library"] != "torch_loop"]
    found = {(v.bar.case, v.bar.kind): v for v in bars.judge([*forward_rows(), *newer], "moe_forward")}
    assert found["olmoe_t16384", DENSE].value == pytest.approx(0.5) and not found["olmoe_t16384", DENSE].passed
    assert found["qwen3_30b_a3b_t16384", SPEED].value == pytest.approx(3.0)
    assert found["t4096_d2048_n512_e256_k8", SPEED].value == pytest.approx(6.0)  # only the older run has the loop
    other = [row | {"device": "Device B", "run": "2026-03-01T00:00:00Z-1"} for row in forward_rows(0.3)]
    found = {(v.bar.case, v.bar.kind): v for v in bars.judge([*newer, *other], "moe_forward", "Device A")}
    assert found["olmoe_t16384", DENSE].value == pytest.approx(0.5)


def test_host_time_has_a_bar_from_above(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = []
    for place, case in enumerate(MOE_SUITES["moe_host"].cases):
        rows.append(made_up(case, OURS, 50.0, host_us=31.0 if place == 1 else 30.0))
        rows.append(made_up(case, "torch_grouped_mm", 90.0, host_us=60.0))
    path = write(tmp_path / "a.jsonl", rows)
    assert report.main([str(path), "--ratio", "moe_host", "--markdown"]) == 0
    text = capsys.readouterr().out
    assert bars_line(text) == f"bars: {len(rows) // 2 - 1} of {len(rows) // 2} hold; FAIL: torch_t1_e128_k8 ({HOST})"
    assert verdict(text, "torch_t1_e128_k8", HOST)[2:5] == ["≤ 30", "31.000", "FAIL"]
    assert text.rstrip().splitlines()[-1].endswith(f"min 1.935 rows {len(rows) // 2}")


def test_tables_show_the_references_of_the_same_rounds(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write(tmp_path / "a.jsonl", [*forward_rows(), *decode_rows()])
    assert report.main([str(path), "--markdown"]) == 0
    lines = capsys.readouterr().out.splitlines()
    rivals = "torch grouped_mm | torch grouped_mm, index_add | torch loop over experts | Liger | vLLM's Triton kernel"
    assert f"| case | experts | flashmoe_cupy | {rivals} | SonicMoE | dense TFLOP/s | read GB/s |" in lines
    us = MOE_SUITES["moe_forward"].cases[0].flops() / (0.9 * 700e6)
    line = next(line for line in lines if line.startswith("| mixtral_8x7b_t8192"))
    assert f"| 8 | 630 ({us:.0f}, 90 %) |" in line and line.endswith("| missing | missing | missing | 700 | 2900 |")
    line = next(line for line in lines if line.startswith("| qwen3_30b_a3b_t1 "))
    assert "(2813, 97 %)" in line
    assert report.main([str(path), "--suite", "moe_curve"]) == 1
    assert "no rows of moe_curve" in capsys.readouterr().err


def test_a_suite_without_bars() -> None:
    assert bars.judge([], "attention_host") == []
    assert not bars.Verdict(BARS[0], math.nan).passed and bars.Verdict(BARS[0], BARS[0].limit).passed


def test_the_curve_over_tokens_is_plotted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    rows = [made_up(case, OURS, 30.0 + case.tokens / 8) for case in MOE_SUITES["moe_curve"].cases]
    arguments = ["--results", str(tmp_path), "--plot"]
    write(tmp_path / "a.jsonl", rows)
    assert report.main(arguments) == 0
    assert "moe_curve.png and moe_curve.svg" in capsys.readouterr().out
    before = (tmp_path / "moe_curve.svg").read_bytes()
    assert b"<svg" in before and (tmp_path / "moe_curve.png").read_bytes()[:4] == b"\x89PNG"
    write(tmp_path / "a.jsonl", rows[::-1])
    assert report.main(arguments) == 0 and (tmp_path / "moe_curve.svg").read_bytes() == before  # the same rows
    write(tmp_path / "a.jsonl", rows[1:])
    assert report.main(arguments) == 0 and (tmp_path / "moe_curve.svg").read_bytes() != before
    write(tmp_path / "a.jsonl", [row | {"device_us": None, "status": "wrong"} for row in rows])
    assert report.main(arguments) == 1 and "no measured row" in capsys.readouterr().err
    assert report.main([*arguments[:2], "--readme", str(tmp_path / "README.md")]) == 1
