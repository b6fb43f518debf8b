"""The suite that puts the NumPy back end beside PyTorch: right answers, rows, and bars with the right sense."""

from __future__ import annotations

from typing import Any

import pytest

from benchmarks.bars import HOST, TIME, bars_summary, judge
from benchmarks.numpy_backend import HOST_SUITES, NAME, TORCH, HostBench, HostCase, prepare

CASES = HOST_SUITES[NAME].cases
SMALL = {"attention": (1, 40, 2, 16), "route": (50, 8, 3), "moe": (40, 16, 24, 4, 2)}


def small(case: HostCase) -> HostCase:
    return case._replace(sizes=SMALL[case.kind])


@pytest.mark.torch
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_a_case_is_measured(case: HostCase) -> None:
    from benchmarks.bench import QUICK, Run
    from benchmarks.library import Setup
    from benchmarks.timing import CpuTimer

    written: list[dict[str, Any]] = []
    run = Run(Setup("cpu"), CpuTimer(), QUICK._replace(rounds=2, sample_us=200.0, host_calls=4), written.append)
    rows = HostBench(run).measure(small(case), HOST_SUITES[NAME].libraries, 0, float("inf"))
    assert rows == written and [row["library"] for row in rows] == list(HOST_SUITES[NAME].libraries)
    for row in rows:
        assert row["status"] == "ok" and row["error"] <= row["error_limit"] and row["rounds"] == 2
        assert 0 < row["lowest_us"] <= row["device_us"] and row["threads"] == 2 and row["versions"]["numpy"]
    verdict = next(v for v in judge(rows, NAME) if v.bar.case == case.name)
    expected = rows[0]["host_us"] if verdict.bar.kind == HOST else rows[0]["device_us"] / rows[1]["device_us"]
    assert verdict.value == pytest.approx(expected)


@pytest.mark.torch
def test_a_wrong_answer_is_no_time(monkeypatch: pytest.MonkeyPatch) -> None:
    from benchmarks import numpy_backend
    from benchmarks.bench import QUICK, Run
    from benchmarks.library import Setup
    from benchmarks.timing import CpuTimer

    case = small(CASES[0])
    calls = prepare(case, 0)
    other = calls._replace(truth=calls.truth + 1e-3)
    monkeypatch.setattr(numpy_backend, "prepare", lambda *_: other)
    run = Run(Setup("cpu"), CpuTimer(), QUICK._replace(rounds=1), lambda _: None)
    rows = HostBench(run).measure(case, HOST_SUITES[NAME].libraries, 0, float("inf"))
    assert [row["status"] for row in rows] == ["wrong", "wrong"] and "device_us" not in rows[0]
    assert "not measured" in bars_summary(judge(rows, NAME))


def row(case: str, library: str, **values: Any) -> dict[str, Any]:
    return {"suite": NAME, "case": case, "library": library, "status": "ok", "run": "1", "device": "a", **values}


def test_the_five_bars() -> None:
    verdicts = judge([], NAME)
    assert {v.bar.case for v in verdicts} == {case.name for case in CASES} and len(verdicts) == 5
    assert [v.bar.limit for v in verdicts] == [2.0, 2.0, 2.0, 1.3, 70.0]
    assert [v.bar.kind for v in verdicts] == [TIME] * 4 + [HOST]
    ours, theirs = HOST_SUITES[NAME].libraries
    for factor, word in ((1.29, "pass"), (1.31, "FAIL")):
        name = "fused_moe_t1024"
        found = judge([row(name, ours, device_us=factor * 100.0), row(name, theirs, device_us=100.0)], NAME)
        assert next(v for v in found if v.bar.case == name).word() == word
    for time, word in ((69.0, "pass"), (71.0, "FAIL")):
        found = judge([row("attention_8_tokens", ours, host_us=time, device_us=time)], NAME)
        assert next(v for v in found if v.bar.case == "attention_8_tokens").word() == word
    assert theirs == TORCH
