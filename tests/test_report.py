"""Ratios, tables and plots made from rows: made-up ones, and the committed ones; no GPU, nothing is measured."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks import report
from benchmarks.cases import OURS, OURS_SM80, PLAIN_TWIN, SUITES, Case
from benchmarks.rows import ReportError

ROOT = Path(__file__).resolve().parent.parent


def case_of(suite: str, name: str) -> Case:
    return next(case for case in SUITES[suite].cases if case.name == name)


def made_up(suite: str, case: Case, library: str, us: float | None, **fields: Any) -> dict[str, Any]:
    row: dict[str, Any] = {
        "suite": suite,
        "case": case.name,
        "library": library,
        "status": "ok",
        "reason": "",
        "run": "2026-01-01T00:00:00Z-1",
        "device": "Device A",
        "commit": "0123456789abcdef",
        "versions": {"torch": "2.11"},
        "shape": case.shape(),
        "ceiling_tflops": 700.0,
        "error": 1e-3,
    }
    if us is not None:
        tflops = case.flops() / us / 1e6
        row |= {"device_us": us, "host_us": us / 10, "tflops": tflops, "share": tflops / 700}
    return row | fields


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def portable_rows(ours: float = 200.0, fa2: float = 100.0, **fields: Any) -> list[dict[str, Any]]:
    rows = []
    for case in SUITES["attention_forward_portable"].cases:
        rows.append(made_up(case.suite, case, OURS_SM80, ours, **fields))
        rows.append(made_up(case.suite, case, "torch_fa2", fa2, **fields))
    return rows


def last_line(text: str) -> str:
    return text.rstrip("\n").split("\n")[-1]


def test_ratio_is_speed_over_the_rival(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = portable_rows(ours=100.0, fa2=90.0)
    rows[0]["device_us"] = 125.0  # 90 / 125 = 0.72, the slowest row
    path = write(tmp_path / "a.jsonl", rows)
    assert report.main([str(path), "--ratio", "attention_forward_portable"]) == 0
    text = capsys.readouterr().out
    assert last_line(text) == f"geomean {math.exp((23 * math.log(0.9) + math.log(0.72)) / 24):.3f} min 0.720 rows 24"
    assert last_line(text) == "geomean 0.892 min 0.720 rows 24"
    for case in SUITES["attention_forward_portable"].cases:
        assert case.name in text


def test_portable_suite_has_one_rival_others_take_the_best() -> None:
    rows = portable_rows()
    rows += [made_up(c.suite, c, "torch_cudnn", 1.0) for c in SUITES["attention_forward_portable"].cases]
    made = report.compare(rows, SUITES["attention_forward_portable"])
    assert {item.ratio for item in made} == {0.5}
    suite = SUITES["attention_forward"]
    rows = []
    for place, case in enumerate(suite.cases):
        times = {OURS: 100.0, "torch_cudnn": 80.0, "fa3": 50.0 if place % 2 else 120.0}
        rows += [made_up(suite.name, case, name, us) for name, us in times.items()]
    best = [(item.rival["library"], item.ratio) for item in report.compare(rows, suite) if item.rival]
    assert best == [("fa3", 0.5) if place % 2 else ("torch_cudnn", 0.8) for place in range(36)]


def test_a_rival_that_was_not_measured_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    suite = SUITES["attention_forward"]
    rows = []
    for case in suite.cases:
        rows += [made_up(suite.name, case, OURS, 100.0), made_up(suite.name, case, "torch_cudnn", 80.0)]
        rows.append(made_up(suite.name, case, "fa3", None, status="missing", reason="no folder given"))
    path = write(tmp_path / "a.jsonl", rows)
    assert report.main([str(path), "--ratio", "attention_forward"]) == 0
    text = capsys.readouterr().out
    assert "not compared: FA3: missing: no folder given" in text
    assert last_line(text) == "geomean 0.800 min 0.800 rows 36"
    block = report.readme_block(rows, suite, "x.svg")
    assert "the speed over torch cuDNN in the same process" in block and "FA3" not in block


def test_one_lost_row_of_a_rival_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    suite = SUITES["attention_forward"]
    rows = []
    for case in suite.cases:
        rows += [made_up(suite.name, case, OURS, 100.0), made_up(suite.name, case, "torch_cudnn", 80.0)]
        lost = case.name == "d64_s512_full"
        state = {"status": "error", "reason": "it broke"} if lost else {}
        rows.append(made_up(suite.name, case, "fa3", None if lost else 70.0, **state))
    path = write(tmp_path / "a.jsonl", rows)
    assert report.main([str(path), "--ratio", suite.name]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line for line in lines if line.startswith("not compared")] == [
        "not compared: FA4: not measured",
        "not compared: FA3 in d64_s512_full: error: it broke",
    ]
    assert lines[-1].endswith("min 0.700 rows 36")


def feature_rows(**times: float) -> list[dict[str, Any]]:
    """Ours at 100 µs unless `times` says otherwise, FA3 at 90 where it can."""
    suite = SUITES["attention_forward_features"]
    rows = []
    for case in suite.cases:
        rows.append(made_up(suite.name, case, OURS, times.get(case.name, 100.0)))
        state = {"status": "unsupported", "reason": "no"} if case.name in PLAIN_TWIN else {}
        rows.append(made_up(suite.name, case, "fa3", None if state else 90.0, **state))
    return rows


def test_features_are_held_against_fa3_and_the_rest_against_our_plain_kernel(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = feature_rows(d96_8k_causal=120.0, softcap_d128_8k_causal=125.0, d128_8k_causal=98.0)
    path = write(tmp_path / "a.jsonl", rows)
    assert report.main([str(path), "--ratio", "attention_forward_features", "--markdown"]) == 0
    text = capsys.readouterr().out
    first, second = text.split("against our own plain kernel**")
    with_fa3 = [line for line in first.splitlines() if "| FA3 |" in line]
    assert len(with_fa3) == 13 and "| none |" not in first and "softcap" not in first
    assert next(line for line in with_fa3 if line.startswith("| d96_8k_causal")).split(" | ")[4] == "0.750"
    expected = {
        "softcap_d128_8k_causal": ("d128_8k_causal", "98.0", "0.784"),
        "alibi_d128_8k_causal": ("d128_8k_causal", "98.0", "0.980"),
        "sinks_window128_gqa_64_8_d64_8k": ("window128_gqa_64_8_d64_8k", "100.0", "1.000"),
    }
    for name, (twin, us, ratio) in expected.items():
        assert f"| {name} | {rows_us(rows, name):.1f} | {twin} | {us} | {ratio} | 0.900 |" in second
    geomean = math.exp(math.fsum(map(math.log, (98 / 125, 0.98, 1.0))) / 3)
    assert (
        f"against our own plain kernel: geomean {geomean:.3f} min 0.784 rows 3, below 0.9: softcap_d128_8k_causal\n"
    ) in second
    geomean = math.exp(math.fsum(map(math.log, [90 / 98, 0.75, *[0.9] * 11])) / 13)
    assert last_line(text) == f"geomean {geomean:.3f} min 0.750 rows 13"
    assert report.twin_summary(report.twins(feature_rows(), SUITES["attention_forward_features"])) == (
        "against our own plain kernel: geomean 1.000 min 1.000 rows 3, none below 0.9"
    )


def rows_us(rows: list[dict[str, Any]], name: str) -> float:
    return float(next(row["device_us"] for row in rows if (row["case"], row["library"]) == (name, OURS)))


def test_a_feature_and_its_plain_twin_are_of_one_run() -> None:
    suite = SUITES["attention_forward_features"]
    rows = feature_rows()
    later = [row | {"run": "2026-02-01T00:00:00Z-1"} for row in feature_rows(softcap_d128_8k_causal=10.0)]
    alone = [row for row in later if row["case"] == "softcap_d128_8k_causal"]
    assert {item.case: item.ratio for item in report.twins(rows + alone, suite)} == dict.fromkeys(PLAIN_TWIN, 1.0)
    assert report.twins(rows + later, suite)[0].ratio == 10.0
    no_twin = [row for row in rows if row["case"] != "d128_8k_causal"]
    with pytest.raises(ReportError, match="softcap_d128_8k_causal: no run timed it and d128_8k_causal"):
        report.twins(no_twin + alone, suite)
    assert report.twins(portable_rows(), SUITES["attention_forward_portable"]) == []


def test_portable_rows_from_before_the_other_kernel_count(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    committed = ROOT / "benchmarks" / "results" / "h100_portable.jsonl"
    assert report.main([str(committed), "--ratio", "attention_forward_portable"]) == 0
    assert last_line(capsys.readouterr().out).endswith(" rows 24")
    assert report.main([str(committed), "--ratio", "attention_host"]) == 0  # other suites keep the name
    capsys.readouterr()
    # Today that name means the kernel that the library chooses, which is another one on some devices.
    rows = [row | {"library": OURS} if row["library"] == OURS_SM80 else row for row in portable_rows(schema=2)]
    path = write(tmp_path / "a.jsonl", rows)
    assert report.main([str(path), "--ratio", "attention_forward_portable"]) == 1
    assert "flashmoe_cupy_sm80 not measured" in capsys.readouterr().err
    path = write(tmp_path / "a.jsonl", [row | {"schema": 1} for row in rows])
    assert report.main([str(path), "--ratio", "attention_forward_portable"]) == 0


def test_host_suite_compares_host_time() -> None:
    suite = SUITES["attention_host"]
    rows = []
    for case in suite.cases:
        rows.append(made_up(suite.name, case, OURS, 50.0, host_us=10.0))
        unsupported = case.arrays == "cupy" or case.varlen
        state = {"status": "unsupported", "reason": "no", "host_us": None} if unsupported else {"host_us": 25.0}
        rows.append(made_up(suite.name, case, "torch_sdpa", 5.0, **state))
    made = report.compare(rows, suite)
    assert report.summary(made) == "geomean 2.500 min 2.500 rows 3"
    assert sum(item.rival is None for item in made) == 5


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"drop": (OURS_SM80, 3)}, "d64_s2048_causal: flashmoe_cupy_sm80 not measured"),
        ({"drop": ("torch_fa2", 0)}, "d64_s512_full: no rival to compare with (torch_fa2 not measured)"),
        ({"state": (OURS_SM80, "wrong")}, "flashmoe_cupy_sm80 wrong: because"),
        ({"state": ("torch_fa2", "missing")}, "torch_fa2 missing: because"),
        ({"state": ("torch_fa2", "error")}, "torch_fa2 error: because"),
        ({"state": ("torch_fa2", "wrong")}, "torch_fa2 wrong: because"),
    ],
)
def test_missing_rows_are_an_error(
    change: dict[str, Any], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = portable_rows()
    if "drop" in change:
        library, place = change["drop"]
        name = SUITES["attention_forward_portable"].cases[place].name
        rows = [row for row in rows if (row["library"], row["case"]) != (library, name)]
    else:
        library, status = change["state"]
        next(row for row in rows if row["library"] == library).update(status=status, reason="because")
    path = write(tmp_path / "a.jsonl", rows)
    assert report.main([str(path), "--ratio", "attention_forward_portable"]) == 1
    captured = capsys.readouterr()
    assert "1 of 24 rows of attention_forward_portable are missing" in captured.err
    assert message in captured.err
    assert "geomean" not in captured.out


def test_no_rows_at_all_and_broken_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert report.main(["--results", str(tmp_path)]) == 1
    assert "no results" in capsys.readouterr().err
    path = write(tmp_path / "a.jsonl", portable_rows())
    assert report.main([str(path), "--ratio", "attention_forward"]) == 1
    assert "36 of 36 rows of attention_forward are missing" in capsys.readouterr().err
    path.write_text(path.read_text(encoding="utf-8") + "{half a row\n", encoding="utf-8")
    assert report.main([str(path)]) == 1
    assert "a.jsonl:49: not JSON" in capsys.readouterr().err
    path.write_text('{"suite": "smoke"}\n', encoding="utf-8")
    assert report.main([str(path)]) == 1
    assert "a row without case, library" in capsys.readouterr().err


def test_only_rows_of_one_run_and_one_device_are_compared(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    old, new = {"run": "2026-01-01T00:00:00Z-1"}, {"run": "2026-02-01T00:00:00Z-1"}
    write(tmp_path / "a.jsonl", portable_rows(200.0, 100.0, **old))
    write(tmp_path / "b.jsonl", portable_rows(100.0, 100.0, **new))
    arguments = ["--results", str(tmp_path), "--ratio", "attention_forward_portable"]
    assert report.main(arguments) == 0
    assert last_line(capsys.readouterr().out) == "geomean 1.000 min 1.000 rows 24"  # the newest run's
    # A later run that timed only ours has nothing beside it: the last complete comparison stands.
    alone = [row for row in portable_rows(10.0, 100.0, run="2026-03-01T00:00:00Z-1") if row["library"] == OURS_SM80]
    write(tmp_path / "c.jsonl", alone)
    assert report.main(arguments) == 0
    assert last_line(capsys.readouterr().out) == "geomean 1.000 min 1.000 rows 24"
    # Another machine's newer rows are that machine's.
    write(tmp_path / "d.jsonl", portable_rows(100.0, 50.0, run="2026-04-01T00:00:00Z-1", device="Device B"))
    assert report.main(arguments) == 0
    assert last_line(capsys.readouterr().out) == "geomean 0.500 min 0.500 rows 24"
    assert report.main([*arguments, "--device", "Device A"]) == 0
    assert last_line(capsys.readouterr().out) == "geomean 1.000 min 1.000 rows 24"


def test_tables_say_why_a_cell_is_empty(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = portable_rows()
    rows[1] |= {"status": "missing", "reason": "needs a CUDA device"}
    path = write(tmp_path / "a.jsonl", rows)
    assert report.main([str(path), "--markdown"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "| case | flashmoe_cupy (sm_80 kernel) | torch FA2 |" in lines
    assert any(line.startswith("| d64_s512_full | ") and line.endswith("| missing |") for line in lines)
    full = next(line for line in lines if line.startswith("| d128_s512_full"))
    assert f"{case_of('attention_forward_portable', 'd128_s512_full').flops() / 200e6:.3g} (200, " in full


def test_readme_block_and_plots(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    results = tmp_path / "results"
    results.mkdir()
    write(results / "a.jsonl", portable_rows(100.0, 95.0))
    readme = tmp_path / "README.md"
    readme.write_text("above\n<!-- results -->\nold\n<!-- /results -->\nbelow\n", encoding="utf-8")
    arguments = ["--results", str(results), "--readme", str(readme)]
    assert report.main(arguments) == 0
    text = readme.read_text(encoding="utf-8")
    assert text.startswith("above\n<!-- results -->\n") and text.endswith("\n<!-- /results -->\nbelow\n")
    assert "old" not in text and "geomean 0.950 min 0.950 rows 24" in text
    assert "](results/attention_forward_portable.svg)" in text
    shown = case_of("attention_forward_portable", "d64_s512_full").flops() / 100 / 1e6
    assert next(line for line in text.splitlines() if line.startswith("| 64, full")).startswith(
        f"| 64, full | {shown:.0f} (0.95) |"
    )
    images = [results / f"attention_forward_portable.{kind}" for kind in ("png", "svg")]
    assert images[0].read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    before = images[1].read_bytes()
    assert b"<svg" in before
    assert report.main(arguments) == 0  # again: nothing changes
    assert readme.read_text(encoding="utf-8") == text and images[1].read_bytes() == before
    readme.write_text("no markers\n", encoding="utf-8")
    assert report.main(arguments) == 1
    assert "has no <!-- results -->" in capsys.readouterr().err


def test_the_report_needs_no_framework(tmp_path: Path) -> None:
    write(tmp_path / "a.jsonl", portable_rows())
    code = (
        "import sys; from benchmarks import report; "
        f"assert report.main(['--results', {str(tmp_path)!r}, '--ratio', 'attention_forward_portable']) == 0; "
        "assert not {'torch', 'cupy', 'jax'} & set(sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
