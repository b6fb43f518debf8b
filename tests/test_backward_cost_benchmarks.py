"""What a feature costs attention's backward, in the benchmarks: both calls are ours and take turns; no GPU."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from calls_kit import options_of_calls
from test_backward_benchmarks import TINY, inputs_of, made_up, small

from benchmarks import bars, report
from benchmarks.backward_cases import BACKWARD_SUITES, BackwardCase
from benchmarks.bars import BARS, TIME
from benchmarks.cases import OUR_LIBRARIES, OURS, OURS_WITHOUT

SUITE = BACKWARD_SUITES["attention_backward_cost"]
SHAPES: dict[str, tuple[Any, ...]] = {  # batch, seqlen, heads, heads_k, head_dim, what is left when the feature is gone
    "softcap_d128_8k_causal": (2, 8192, 16, 16, 128, {"causal": True}),
    "softcap_d64_8k_causal": (2, 8192, 16, 16, 64, {"causal": True}),
    "alibi_d128_8k_causal": (2, 8192, 16, 16, 128, {"causal": True}),
    "alibi_d64_8k_causal": (2, 8192, 16, 16, 64, {"causal": True}),
    "sinks_window128_gqa_64_8_d64_8k": (2, 8192, 64, 8, 64, {"causal": True, "window_size": (127, 0)}),
    "packed_d128_8_of_2k_causal": (8, 2048, 16, 16, 128, {"causal": True}),
    "packed_d64_8_of_2k_causal": (8, 2048, 32, 32, 64, {"causal": True}),
}
FEATURES: dict[str, dict[str, Any]] = {
    "softcap": {"softcap": 30.0},
    "alibi": {"alibi": True},
    "sinks": {"sinks": True},
    "packed": {"seqlens": 8 * (2048,)},
}


def feature_of(case: BackwardCase) -> dict[str, Any]:
    return FEATURES[case.name.partition("_")[0]]


def tiny(case: BackwardCase) -> BackwardCase:
    """`small`, whose softcap of 30 shows in scores of this size only with less of it."""
    return small(case)._replace(softcap=1.0 if case.softcap else 0.0)


def test_each_case_is_a_pair() -> None:
    assert [case.name for case in SUITE.cases] == list(SHAPES)
    for case in SUITE.cases:
        b, s, heads, heads_k, d, rest = SHAPES[case.name]
        plain = BackwardCase(case.name, SUITE.name, case.source, b, s, s, heads, heads_k, d, d, **rest)
        assert case.without() == plain and case == plain._replace(**feature_of(case))
        assert (case.flops(), case.tokens_q) == (plain.flops(), plain.tokens_q) and isinstance(case, BackwardCase)
    assert (SUITE.libraries, SUITE.rivals, SUITE.ours) == ((OURS, OURS_WITHOUT), (OURS_WITHOUT,), OURS)
    assert OURS_WITHOUT in OUR_LIBRARIES  # a wrong answer of it makes a run fail


@pytest.mark.torch
@pytest.mark.parametrize("case", SUITE.cases, ids=lambda case: case.name)
def test_cases_run_small(case: BackwardCase, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each side has its own call, on the same arrays, and an answer that is checked as its own."""
    import flashmoe_cupy
    from benchmarks.backward_bench import BackwardBench
    from benchmarks.bench import QUICK, Run
    from benchmarks.library import Setup
    from benchmarks.timing import CpuTimer

    dense, packed = (
        options_of_calls(monkeypatch, flashmoe_cupy, f"flash_attention{name}_backward") for name in ("", "_varlen")
    )
    run = Run(Setup("cpu"), CpuTimer(), QUICK._replace(rounds=2, host_calls=5), lambda _: None)
    here = tiny(case)
    rows = {row["library"]: row for row in BackwardBench(run).measure(here, SUITE.libraries, 0, math.inf)}
    for name in SUITE.libraries:
        row = rows[name]
        assert row["status"] == "ok", row["reason"]
        assert row["same_bits"] and 0 < row["error"] <= row["error_limit"] and row["device_us"] > 0
        assert row["rounds"] == 2 and row["flops"] == here.flops() == here.without().flops()
    assert (rows[OURS]["error"] == rows[OURS_WITHOUT]["error"]) == case.varlen  # packing changes no number
    plain = {**SHAPES[case.name][5]}
    if "window_size" in plain:
        plain["window_size"] = here.window_size
    added = {"softcap": "softcap", "alibi": "alibi_slopes", "sinks": "sinks"}.get(case.name.partition("_")[0])
    assert bool(packed) == (added is None) and all("cu_seqlens_q" in options for options in packed)
    bare = [options for options in dense if options == plain]
    assert bare and len(bare) < len(dense) + len(packed)
    assert all(options == plain or added in options for options in dense)


@pytest.mark.torch
def test_the_side_without_is_a_batch_of_the_same_rows() -> None:
    from benchmarks.backward_inputs import check, parts
    from benchmarks.backward_rivals import BACKWARD_LIBRARIES
    from benchmarks.library import Setup

    library, cpu = BACKWARD_LIBRARIES[OURS_WITHOUT], Setup("cpu")
    packed = TINY._replace(batch=3, seqlens=(9, 9, 9))
    sets = [inputs_of(packed, seed) for seed in (1, 2)]
    made = library.prepare(packed, sets, cpu)
    assert made.into is None and made.check is not None
    answer = made.as_torch(made.run(0))
    assert made.check(answer).passed and check(packed, sets[0], answer).passed
    assert not made.check(made.as_torch(made.run(1))).passed  # of other inputs
    assert sets[0].q.shape == (27, 4, 16) and parts(packed.without(), answer)[0].shape == (3, 9, 4, 16)
    for feature in ({"softcap": 0.7}, {"alibi": True}, {"sinks": True}):
        case = TINY._replace(**feature)
        inputs = inputs_of(case)
        made = library.prepare(case, [inputs], cpu)
        answer = made.as_torch(made.run(0))
        assert made.check is not None and made.check(answer).passed
        assert case.sinks or not check(case, inputs, answer).passed  # the feature is really gone
        assert len(answer) == sum(x.numel() for x in inputs[:3])  # no gradient of sinks
    assert library.why_not(TINY, cpu) == "the case has no feature to leave out"
    assert "several lengths" in library.why_not(TINY._replace(seqlens=(3, 8)), cpu)
    assert not any(library.why_not(case, Setup("cuda")) for case in SUITE.cases)


# ---- the bars --------------------------------------------------------------------------------------------------------


def rows_of(**times: float | None) -> list[dict[str, Any]]:
    """The side without takes 100 µs, the other what `times` says of its feature."""
    rows = []
    for case in SUITE.cases:
        rows.append(made_up(case, OURS, times.get(case.name.partition("_")[0], 120.0)))
        rows.append(made_up(case, OURS_WITHOUT, 100.0))
    return rows


def shown(tmp_path: Path, capsys: pytest.CaptureFixture[str], rows: list[dict[str, Any]]) -> str:
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    assert report.main([str(path), "--ratio", SUITE.name, "--markdown"]) == 0
    return capsys.readouterr().out


def test_the_bars_are_the_ones_to_show() -> None:
    mine = [bar for bar in BARS if bar.suite == SUITE.name]
    assert [(bar.case, bar.kind, bar.limit, bar.rivals, bar.cases, bar.ours) for bar in mine] == [
        (name, TIME, 1.25, (OURS_WITHOUT,), (), OURS) for name in SHAPES
    ]


def test_a_feature_costs_a_quarter_at_most(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = shown(tmp_path, capsys, rows_of())
    assert "bars: 7 of 7 hold" in text
    assert text.count("| time over that of flashmoe_cupy without the feature | ≤ 1.25 | 1.200 | pass |") == 7
    assert text.rstrip().splitlines()[-1] == "geomean 0.833 min 0.833 rows 7" and "without the bias" not in text
    text = shown(tmp_path, capsys, rows_of(alibi=126.0))
    assert "bars: 5 of 7 hold; FAIL: alibi_d128_8k_causal" in text and text.count("| 1.260 | FAIL |") == 2
    found = bars.judge(rows_of(sinks=None), SUITE.name)
    assert [item.word() for item in found] == [*4 * ["pass"], "not measured", *2 * ["pass"]]


@pytest.mark.torch
def test_a_run_writes_rows_that_a_report_reads(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from benchmarks import run
    from benchmarks.moe_cases import ALL_SUITES

    suite = SUITE._replace(cases=tuple(tiny(case) for case in SUITE.cases[-3:]))
    monkeypatch.setitem(ALL_SUITES, suite.name, suite)
    out = tmp_path / "a.jsonl"
    arguments = ["--suite", suite.name, "--device", "cpu", "--quick", "--rounds", "1", "--out", str(out)]
    assert run.main(arguments) == 0
    rows = [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()]
    assert [(row["library"], row["status"]) for row in rows] == 3 * [(OURS, "ok"), (OURS_WITHOUT, "ok")]
    assert report.main([str(out), "--ratio", suite.name]) == 0
    text = capsys.readouterr().out
    assert "flashmoe_cupy without the feature" in text and text.rstrip().endswith("rows 3")
