"""The benchmarks' arithmetic, their measuring loop on the CPU and their reports; no GPU."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks import report
from benchmarks.cases import ITEMSIZE, OURS, SUITES, Case
from flashmoe_cupy import reference

ROOT = Path(__file__).resolve().parent.parent
ALL_CASES = [case for suite in SUITES.values() for case in suite.cases]


def case_of(suite: str, name: str) -> Case:
    return next(case for case in SUITES[suite].cases if case.name == name)


# ---- cases -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("suite", "name", "flops"),
    [
        ("attention_forward_portable", "d64_s512_full", 4 * 32 * 32 * 512 * 512 * 64),
        ("attention_forward_portable", "d64_s512_causal", 2 * 32 * 32 * 512 * 512 * 64),
        ("attention_forward_portable", "d256_s16384_full", 2199023255552),
        ("attention_forward", "d128_s1024_causal", 2 * 16 * 16 * 1024 * 1024 * 128),
        ("attention_forward_features", "d192_128_8k_causal", 2 * 2 * 16 * 8192 * 8192 * 320 // 2),
        ("attention_forward_features", "odd_s4097_gqa_12_4_d128_causal", 4 * 3 * 12 * 4097 * 4097 * 128 // 2),
        # A row of the window sees 1024 keys, the first 1023 rows fewer.
        ("attention_forward_features", "window1024_d128_16k", 4 * 16 * 128 * (16384 * 1024 - 1024 * 1023 // 2)),
        # Query i of the chunk sees the 7168 keys before it and i + 1 of its own.
        ("models", "llama3.1_8b_chunk", 4 * 4 * 32 * 128 * (1024 * 7168 + 1024 * 1025 // 2)),
        ("models", "deepseek_v3_4k", 2 * 128 * 4096 * 4096 * 320 // 2),
        ("smoke", "varlen", 4 * 4 * 32 * (9 + 289 + 1 + 1600) // 2),
    ],
)
def test_flops_are_the_hand_made_numbers(suite: str, name: str, flops: int) -> None:
    assert case_of(suite, name).flops() == flops


@pytest.mark.parametrize(("sq", "sk"), [(7, 7), (3, 9), (9, 3), (1, 5)])
@pytest.mark.parametrize("window", [(-1, -1), (2, 1), (0, -1), (-1, 3), (40, 40)])
@pytest.mark.parametrize("causal", [False, True])
def test_pairs_of_a_band_are_counted_exactly(sq: int, sk: int, window: tuple[int, int], causal: bool) -> None:
    case = Case("x", "smoke", "", 1, sq, sk, 1, 1, 8, 8, causal=causal, window_size=window)
    left, right = window[0], 0 if causal else window[1]
    pairs: float = sum(
        (right < 0 or j <= i + sk - sq + right) and (left < 0 or j >= i + sk - sq - left)
        for i in range(sq)
        for j in range(sk)
    )
    if causal and window == (-1, -1) and sq == sk:
        pairs = sq * sk / 2  # the field's convention, half of the square
    assert case.flops() == 4 * 8 * pairs


def test_bytes_count_each_array_once() -> None:
    case = case_of("attention_small_systems", "atoms32_systems2048")
    assert case.bytes() == 2 * (4 * 2048 * 32 * 8 * 64 + 2048 * 8 * 32 * 32)
    gqa = case_of("attention_forward_features", "gqa_64_8_d128_8k_full")
    assert gqa.bytes() == 2 * 16384 * 128 * (64 + 8 + 8 + 64)


def test_the_suites_are_the_measured_tables() -> None:
    assert len(SUITES["attention_forward_portable"].cases) == 24
    assert len(SUITES["attention_forward"].cases) == 36
    for name in ("attention_forward_portable", "attention_forward"):
        for case in SUITES[name].cases:
            assert case.batch * case.seqlen_q == 16384
            assert case.heads_q * case.head_dim == 2048
            assert case.dtype == "bfloat16"
    portable = {case.name for case in SUITES["attention_forward_portable"].cases}
    assert portable < {case.name for case in SUITES["attention_forward"].cases}
    for suite in SUITES.values():
        names = [case.name for case in suite.cases]
        assert len(set(names)) == len(names)
        assert all(case.suite == suite.name for case in suite.cases)
        assert OURS in suite.libraries and set(suite.rivals) <= set(suite.libraries)
    for case in ALL_CASES:
        assert case.dtype in ITEMSIZE and case.heads_q % case.heads_k == 0
        assert case.head_dim % 8 == 0 and case.head_dim_v % 8 == 0
        assert not case.seqlens or (case.batch, case.seqlen_q) == (len(case.seqlens), max(case.seqlens))


# ---- the check of an answer ------------------------------------------------------------------------------------------


def truth(case: Case, inputs: Any) -> Any:
    """The output of the float64 reference as a torch tensor of the case's dtype."""
    import torch

    q, k, v = (t.double().numpy() for t in inputs[:3])
    options: dict[str, Any] = {"causal": case.causal, "window_size": case.window_size, "softcap": case.softcap}
    for name in ("sinks", "alibi_slopes"):
        if getattr(inputs, name) is not None:
            options[name] = getattr(inputs, name).double().numpy()
    if case.varlen:
        cu, longest = inputs.cu_seqlens.numpy(), max(case.seqlens)
        out = reference.flash_attention_varlen(
            q, k, v, cu_seqlens_q=cu, cu_seqlens_k=cu, max_seqlen_q=longest, max_seqlen_k=longest, **options
        )
    else:
        bias = inputs.bias
        if bias is not None:
            options["bias"] = bias.numpy() if bias.dtype == torch.bool else bias.double().numpy()
        out = reference.flash_attention(q, k, v, layout=case.layout, **options)
    return torch.from_numpy(np.asarray(out).copy()).to(getattr(torch, case.dtype))


@pytest.mark.torch
@pytest.mark.parametrize("name", [case.name for case in SUITES["smoke"].cases])
def test_check_takes_the_reference_and_no_other(name: str) -> None:
    from benchmarks.cases import check, make_inputs, out_shape

    case = case_of("smoke", name)
    inputs = make_inputs(case, "cpu", seed=1)
    out = truth(case, inputs)
    assert tuple(out.shape) == out_shape(case)
    good = check(case, inputs, out)
    assert good.passed and good.error < good.limit / 2

    # Every head and row of these small cases is sampled: one wrong row of one head must show.
    wrong = out.clone()
    row: tuple[Any, ...] = (-1, 0) if case.varlen else (1 % case.batch, 0, -1) if case.layout == "bhsd" else (0, -1, 0)
    wrong[row] = -wrong[row]
    assert not check(case, inputs, wrong, heads=100, rows=100).passed
    # The neighbour's inputs: right values in the wrong place.
    other = make_inputs(case, "cpu", seed=2)
    assert not check(case, other, out).passed
    unwritten = out.clone()
    unwritten.view(-1)[out.numel() // 2] = math.nan
    found = check(case, inputs, unwritten, heads=2, rows=2)
    assert not found.finite and not found.passed


@pytest.mark.torch
def test_inputs_are_random_and_repeatable() -> None:
    import torch

    from benchmarks.cases import make_inputs

    case = case_of("smoke", "sinks")
    first, again, other = (make_inputs(case, "cpu", seed) for seed in (3, 3, 4))
    assert torch.equal(first.q, again.q) and not torch.equal(first.q, other.q)
    assert float(first.k.std()) > 0.9 and not torch.equal(first.k, first.v)


# ---- ratios and reports on made-up rows ------------------------------------------------------------------------------


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
        rows.append(made_up(case.suite, case, OURS, ours, **fields))
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
        ({"drop": (OURS, 3)}, "d64_s2048_causal: flashmoe_cupy not measured"),
        ({"drop": ("torch_fa2", 0)}, "d64_s512_full: no rival to compare with (torch_fa2 not measured)"),
        ({"state": (OURS, "wrong")}, "flashmoe_cupy wrong: because"),
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
    alone = [row for row in portable_rows(10.0, 100.0, run="2026-03-01T00:00:00Z-1") if row["library"] == OURS]
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
    assert "| case | flashmoe_cupy | torch FA2 |" in lines
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


# ---- the measuring loop ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("script", ["run.py", "report.py"])
def test_command_lines_run_from_anywhere(script: str, tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "benchmarks" / script), "--help"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert "usage: benchmarks/" in done.stdout


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


def rows_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.mark.torch
def test_run_on_the_cpu_end_to_end(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from benchmarks import run

    out = tmp_path / "smoke.jsonl"
    arguments = ["--suite", "smoke", "--device", "cpu", "--quick", "--rounds", "2", "--out", str(out)]
    code = run.main(arguments)
    rows = rows_of(out)
    assert code == 0, [row["reason"] for row in rows if row["status"] in ("error", "wrong")]
    suite = SUITES["smoke"]
    assert [(row["case"], row["library"]) for row in rows] == [
        (c.name, n) for c in suite.cases for n in suite.libraries
    ]
    ours = [row for row in rows if row["library"] == OURS]
    assert {row["status"] for row in ours} == {"ok"}  # every feature, checked against float64
    for row in ours:
        assert row["poisoned"] and row["same_bits"]
        assert 0 <= row["error"] <= row["error_limit"] and row["error_row"] <= 3 * row["error_limit"]
        assert row["device_us"] > 0 and row["rounds"] == 2 and row["ceiling_tflops"] > 0
        assert row["tflops"] == pytest.approx(row["flops"] / row["device_us"] / 1e6, rel=1e-3)
        assert row["versions"]["torch"] and row["versions"][OURS] and row["device"] and row["commit"]
    rivals = {row["case"]: row for row in rows if row["library"] == "torch_sdpa"}
    assert {name for name, row in rivals.items() if row["status"] == "ok"} >= {"full_fp32", "causal_bf16", "bias"}
    assert rivals["window"]["status"] == "unsupported" and rivals["window"]["reason"] == "SDPA has no window"
    capsys.readouterr()
    assert report.main([str(out), "--ratio", "smoke"]) == 0
    assert last_line(capsys.readouterr().out).endswith(f"rows {sum(row['status'] == 'ok' for row in rivals.values())}")


@pytest.mark.torch
def test_one_library_that_fails_does_not_end_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from benchmarks import rivals, run

    class Failing(rivals.Sdpa):
        def prepare(self, *_: Any) -> rivals.Prepared:
            raise RuntimeError("it broke\nbadly")

    class Late(rivals.Sdpa):
        def prepare(self, case: Case, sets: Any, setup: rivals.Setup) -> rivals.Prepared:
            made = super().prepare(case, sets, setup)
            calls = iter(range(1000))

            def once(i: int) -> Any:
                if next(calls) > 3:
                    raise RuntimeError("the fifth call breaks")
                return made.run(i)

            return made._replace(run=once)

    class Wrong(rivals.Sdpa):
        def prepare(self, case: Case, sets: Any, setup: rivals.Setup) -> rivals.Prepared:
            made = super().prepare(case, sets, setup)
            return made._replace(run=lambda i: made.run(i) * 1.1)

    libraries = {
        OURS: Wrong(OURS),
        "torch_fa2": Failing("torch_fa2"),
        "flex_attention": Late("flex_attention"),
        "torch_sdpa": rivals.Sdpa("torch_sdpa"),
    }
    monkeypatch.setattr(run, "LIBRARIES", libraries)
    out = tmp_path / "a.jsonl"
    arguments = ["--suite", "smoke", "--cases", "^full_fp32$", "--device", "cpu", "--quick", "--out", str(out)]
    assert run.main([*arguments, "--libraries", *libraries]) == 1  # ours was wrong
    rows = {row["library"]: row for row in rows_of(out)}
    assert rows[OURS]["status"] == "wrong" and "device_us" not in rows[OURS]
    assert rows[OURS]["error"] == pytest.approx(0.1, rel=1e-3)
    assert (rows["torch_fa2"]["status"], rows["torch_fa2"]["reason"]) == ("error", "RuntimeError: it broke badly")
    assert rows["flex_attention"]["status"] == "error" and "fifth call" in rows["flex_attention"]["reason"]
    assert rows["torch_sdpa"]["status"] == "ok" and rows["torch_sdpa"]["device_us"] > 0


@pytest.mark.torch
def test_a_spent_budget_stops_the_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from benchmarks import run

    out = tmp_path / "a.jsonl"
    arguments = ["--suite", "smoke", "--cases", "full_fp32|window", "--device", "cpu", "--out", str(out)]
    assert run.main([*arguments, "--budget", "0"]) == 0
    captured = capsys.readouterr()
    assert out.read_text(encoding="utf-8") == ""
    assert "0 of 2 cases" in captured.out and "not run (out of budget): full_fp32, window" in captured.err


@pytest.mark.torch
def test_rivals_say_why_they_are_missing() -> None:
    from benchmarks.rivals import LIBRARIES, Setup

    cpu = Setup("cpu")
    for name in ("torch_fa2", "torch_cudnn", "flex_attention", "fa3"):
        assert LIBRARIES[name].missing(cpu) == "needs a CUDA device"
    assert LIBRARIES["torch_sdpa"].missing(cpu) == "" and LIBRARIES[OURS].missing(cpu) == ""
    assert "--peers" in LIBRARIES["fa3"].missing(Setup("cuda"))
    plain = case_of("attention_forward", "d128_s512_full")
    assert all(library.why_not(plain, Setup("cuda")) == "" for library in LIBRARIES.values())
    softcap = case_of("attention_forward_features", "softcap_d128_8k_causal")
    assert "softcap" in LIBRARIES["fa3"].why_not(softcap, Setup("cuda"))
    assert "softcap" in LIBRARIES["torch_fa2"].why_not(softcap, Setup("cuda"))
    assert LIBRARIES["flex_attention"].why_not(softcap, Setup("cuda")) == ""


def test_the_commit_may_be_given(monkeypatch: pytest.MonkeyPatch) -> None:
    from benchmarks.timing import commit

    monkeypatch.setenv("FLASHMOE_COMMIT", "abc123")
    assert commit() == ("abc123", False)
    monkeypatch.setenv("FLASHMOE_COMMIT", "abc123-dirty")
    assert commit() == ("abc123", True)


@pytest.mark.torch
def test_host_time_is_of_one_call_and_drains_the_queue() -> None:
    import time

    from benchmarks.timing import CpuTimer, host_microseconds

    drained: list[int] = []
    calls: list[int] = []

    class Spy(CpuTimer):
        def synchronize(self) -> None:
            drained.append(len(calls))

    def call(i: int) -> None:
        calls.append(i)
        time.sleep(0.002)

    assert 2000 <= host_microseconds(Spy(), call, calls=9, batch=4) < 20000
    assert calls == list(range(9)) and drained == [0, 4, 8, 9]
