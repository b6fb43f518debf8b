"""The bars of attention, judged from made-up rows; nothing is measured. test_moe_report.py has the mixture's."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from benchmarks import bars, report
from benchmarks.bars import BARS, LEAST, MEAN, SPEED, TIME
from benchmarks.cases import OURS, OURS_PACKED, OURS_PLAIN, SUITES, Case

BEST = ("torch_cudnn", "fa3", "fa4")


def made_up(case: Case, library: str, us: float | None, **fields: Any) -> dict[str, Any]:
    row: dict[str, Any] = {
        "suite": case.suite,
        "case": case.name,
        "library": library,
        "status": "ok" if us else "missing",
        "reason": "" if us else "not installed",
        "run": "2026-01-01T00:00:00Z-1",
        "device": "Device A",
        "commit": "0123456789abcdef",
        "versions": {},
        "shape": case.shape(),
        "error": 1e-3,
    }
    return row | ({"device_us": us, "host_us": us / 10} if us else {}) | fields


def rows_of(suite: str, **times: float | None) -> list[dict[str, Any]]:
    """A row of each library in every case: ours takes 100 µs, the others what `times` says (None: not installed)."""
    every = {OURS: 100.0} | times
    return [made_up(case, name, us) for case in SUITES[suite].cases for name, us in every.items()]


def ratio(tmp_path: Path, capsys: pytest.CaptureFixture[str], suite: str, rows: list[dict[str, Any]]) -> str:
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    assert report.main([str(path), "--ratio", suite, "--markdown"]) == 0
    return capsys.readouterr().out


def bars_line(text: str) -> str:
    return next(line for line in text.splitlines() if line.startswith("bars: "))


def slower(rows: list[dict[str, Any]], place: int, us: float) -> list[dict[str, Any]]:
    """The rows with another time of ours in the case at that place of its suite."""
    mine = [row for row in rows if row["library"] == OURS]
    mine[place]["device_us"] = us
    return rows


def test_the_bars_of_attention_are_the_ones_to_show() -> None:
    mine = [bar for bar in BARS if bar.suite.startswith("attention_") and bar.suite in SUITES]
    assert [(bar.suite, bar.case, bar.kind, bar.limit, bar.rivals) for bar in mine] == [
        ("attention_forward", "36 rows", MEAN, 1.01, BEST),
        ("attention_forward", "36 rows", LEAST, 0.95, BEST),
        *(
            ("attention_bias", f"{name}_{dtype}", TIME, 1.0, ("torch_cudnn",))
            for name in ("padding", "per_head", "per_batch", "pair")
            for dtype in ("bf16", "fp32")
        ),
        ("attention_bias", "pair_bf16", TIME, 1.0, ("cuequivariance",)),
        *(("attention_mask", case.name, TIME, 0.6, ("torch_cudnn",)) for case in SUITES["attention_mask"].cases),
        ("attention_padding", "24 rows", LEAST, 0.92, (OURS_PACKED,)),
        ("attention_few_keys", "q5121_k33_b2_d128_causal", SPEED, 1.0, ("fa3",)),
        ("attention_few_keys", "q448_k1500_b8_d64_full", SPEED, 1.0, ("fa3",)),
        ("attention_few_keys", "q33_k5121_b8_gqa_32_8_d128_full", SPEED, 0.97, ("fa3",)),
    ]
    for bar in mine:
        assert set(bar.cases) in (set(), {case.name for case in SUITES[bar.suite].cases})


def test_the_best_peer_is_the_best_of_three(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = rows_of("attention_forward", torch_cudnn=104.0, fa3=103.0, fa4=102.0)
    text = ratio(tmp_path, capsys, "attention_forward", rows)
    assert bars_line(text) == "bars: 2 of 2 hold" and text.count("| FA4 |") == 36
    assert text.rstrip().splitlines()[-1] == "geomean 1.020 min 1.020 rows 36"
    # One slow row costs the smallest, all a little slower cost the mean.
    text = ratio(tmp_path, capsys, "attention_forward", slower(rows, 3, 108.0))
    assert bars_line(text) == "bars: 1 of 2 hold; FAIL: 36 rows (least speed over torch cuDNN, FA3, FA4)"
    name = SUITES["attention_forward"].cases[3].name
    assert f"| ≥ 0.95 | 0.944 | FAIL | {name}, against FA4 |" in text
    rows = rows_of("attention_forward", torch_cudnn=104.0, fa3=103.0, fa4=100.9)
    assert "bars: 1 of 2 hold; FAIL: 36 rows (geomean" in ratio(tmp_path, capsys, "attention_forward", rows)


def test_a_peer_that_is_nowhere_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = rows_of("attention_forward", torch_cudnn=104.0, fa3=103.0, fa4=None)
    text = ratio(tmp_path, capsys, "attention_forward", rows)
    assert text.count("without FA4 |") == 2 and bars_line(text) == "bars: 2 of 2 hold"
    assert "not compared: FA4: missing: not installed" in text
    found = bars.judge([row for row in rows if row["library"] != "fa3"][4:], "attention_forward")
    assert all(math.isnan(item.value) and item.note.startswith("2 of 36 rows are missing") for item in found)
    assert "36 of 36" in bars.judge(rows_of("attention_forward", fa3=None), "attention_forward")[0].note
    assert "no run has this case" in bars.judge([], "attention_forward")[0].note


def test_a_mask_is_held_to_time(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = rows_of("attention_mask", torch_cudnn=200.0, torch_efficient=150.0, **{OURS_PLAIN: 40.0})
    text = ratio(tmp_path, capsys, "attention_mask", rows)
    assert bars_line(text) == "bars: 7 of 7 hold" and "| time over that of torch cuDNN | ≤ 0.6 | 0.500 | pass |" in text
    assert "against our own kernel without the bias: geomean 0.400 min 0.400 rows 7" in text
    assert text.rstrip().splitlines()[-1] == "geomean 1.500 min 1.500 rows 7"  # efficient is the best rival
    text = ratio(tmp_path, capsys, "attention_mask", slower(rows, 0, 121.0))
    assert bars_line(text) == "bars: 6 of 7 hold; FAIL: padding_lengths (time over that of torch cuDNN)"


def test_a_bias_is_held_to_cudnn(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rivals = {"torch_cudnn": 101.0, "torch_efficient": 150.0, "cuequivariance": None, OURS_PLAIN: 70.0}
    rows = rows_of("attention_bias", **rivals)
    text = ratio(tmp_path, capsys, "attention_bias", rows)
    assert bars_line(text).startswith("bars: 8 of 9 hold") and "| not measured |" in text
    text = ratio(tmp_path, capsys, "attention_bias", slower(rows, 0, 102.0))
    assert "padding_bf16 (time over that of torch cuDNN)" in bars_line(text)


def test_padding_is_held_to_the_packed_call(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = rows_of("attention_padding", **{OURS_PACKED: 93.0})
    text = ratio(tmp_path, capsys, "attention_padding", rows)
    assert bars_line(text) == "bars: 1 of 1 hold" and "without" not in text
    assert text.rstrip().splitlines()[-1] == "geomean 0.930 min 0.930 rows 24"
    text = ratio(tmp_path, capsys, "attention_padding", slower(rows, 23, 102.0))
    assert "bars: 0 of 1 hold; FAIL: 24 rows (least speed over flashmoe_cupy, packed rows)" in text


def test_few_keys_are_held_to_fa3(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = rows_of("attention_few_keys", fa3=98.0, fa4=90.0)
    text = ratio(tmp_path, capsys, "attention_few_keys", rows)
    assert bars_line(text).startswith("bars: 1 of 3 hold; FAIL: q5121_k33_b2_d128_causal (speed over FA3), q448")
    assert text.rstrip().splitlines()[-1] == "geomean 0.900 min 0.900 rows 3"


def test_a_bias_stands_beside_our_plain_kernel(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    times: dict[str, float | None] = {OURS_PLAIN: 30.0, "torch_cudnn": 120.0, "torch_efficient": 300.0}
    rows = rows_of("attention_bias", **times)
    rows += [
        made_up(case, "cuequivariance", 80.0 if case.name == "pair_bf16" else None)
        for case in SUITES["attention_bias"].cases
    ]
    text = ratio(tmp_path, capsys, "attention_bias", rows)
    assert "| pair_bf16 | 100.0 | cuEquivariance | 80.0 | 0.800 |" in text
    assert "| pair_bf16 | 100.0 | 30.0 | 0.300 |" in text and text.count("| 100.0 | 30.0 | 0.300 |") == 12
    assert "against our own kernel without the bias: geomean 0.300 min 0.300 rows 12" in text
    assert "bars: 8 of 9 hold" in text and text.rstrip().splitlines()[-1].endswith("min 0.800 rows 12")


def test_rows_from_before_a_rival_was_known_still_compare(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    suite = SUITES["attention_forward_features"]
    rows = []
    for case in suite.cases:
        lacks = case.softcap or case.sinks or case.alibi
        rows += [made_up(case, OURS, 100.0)]
        rows += [made_up(case, "fa3", None, status="unsupported") if lacks else made_up(case, "fa3", 90.0)]
    text = ratio(tmp_path, capsys, suite.name, rows)
    assert "not compared: FA4: not measured" in text and text.rstrip().endswith("rows 13")
    # Where FA4 has a softcap or sinks, those rows have a rival too.
    rows += [
        made_up(case, "fa4", None, status="unsupported") if case.alibi else made_up(case, "fa4", 95.0)
        for case in suite.cases
    ]
    assert ratio(tmp_path, capsys, suite.name, rows).rstrip().endswith("rows 15")


def test_a_group_is_its_suites() -> None:
    from benchmarks.run import GROUPS, chosen, parse

    options = parse(["--suite", "h200", "attention_bias", "moe_host"])
    assert options.suite == [*GROUPS["h200"], "moe_host"]
    assert len(chosen(parse(["--suite", "h200"]))) == 24 + 7 + 12 + 3 + 36 + 27
    of_groups = {name for names in GROUPS.values() for name in names}
    assert {bar.suite for bar in BARS} - {"moe_forward", "moe_host", "numpy_backend", "training_random"} <= of_groups
    with pytest.raises(SystemExit):
        parse(["--suite", "h201"])
