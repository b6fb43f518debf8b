"""The benchmarks' arithmetic, their measuring loop on the CPU and their reports; no GPU."""

from __future__ import annotations

import json
import math
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks import report
from benchmarks.cases import ITEMSIZE, OURS, OURS_PACKED, OURS_PLAIN, OURS_SM80, PLAIN_TWIN, SUITES, Case
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
        # Products of queries and keys alone.
        ("attention_lse", "d128_s8192_causal", 2 * 2 * 16 * 8192 * 8192 * 128 // 2),
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
    assert case_of("attention_lse", "d128_s8192_full").bytes() == 2 * 16384 * 128 * (16 + 16) + 4 * 16384 * 16


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
    without_values = [case._replace(suite="attention_forward", head_dim_v=case.head_dim) for case in
                      SUITES["attention_lse"].cases]  # fmt: skip
    assert len(without_values) == 6 and set(without_values) < {
        case._replace(source=without_values[0].source) for case in SUITES["attention_forward"].cases
    }
    for suite in SUITES.values():
        names = [case.name for case in suite.cases]
        assert len(set(names)) == len(names)
        assert all(case.suite == suite.name for case in suite.cases)
        assert suite.ours in suite.libraries and set(suite.rivals) <= set(suite.libraries)
    for case in ALL_CASES:
        assert case.dtype in ITEMSIZE and case.heads_q % case.heads_k == 0
        assert case.head_dim % 8 == 0 and case.head_dim_v % 8 == 0
        assert not case.seqlens or (case.batch, case.seqlen_q) == (len(case.seqlens), max(case.seqlens))


def test_the_feature_suite_has_its_rows() -> None:
    suite = SUITES["attention_forward_features"]
    assert (suite.libraries, suite.rivals) == ((OURS, "fa3", "fa4"), ("fa3", "fa4"))
    found = {case.name: case for case in suite.cases}
    assert list(found) == [
        "d128_8k_causal", "gqa_32_4_d128_8k_causal", "gqa_64_8_d128_8k_full", "window1024_d128_16k",
        "window128_gqa_64_8_d64_8k", "d96_8k_causal", "d192_128_8k_causal", "d64_256_8k_causal", "fp16_d128_8k_causal",
        "bhsd_d128_8k_causal", "odd_s4097_gqa_12_4_d128_causal", "odd_s3000_d80_causal", "varlen_64_d128_causal",
        "softcap_d128_8k_causal", "alibi_d128_8k_causal", "sinks_window128_gqa_64_8_d64_8k",
    ]  # fmt: skip
    lengths = found["varlen_64_d128_causal"].seqlens
    assert len(lengths) == 64 and lengths[-1] == 8192 and all(16 <= n <= 769 for n in lengths[:-1])
    assert {found[name].seqlen_q for name in ("odd_s4097_gqa_12_4_d128_causal", "odd_s3000_d80_causal")} == {4097, 3000}


def test_a_twin_differs_by_its_feature_only() -> None:
    found = {case.name: case for case in SUITES["attention_forward_features"].cases}
    with_feature = {name for name, case in found.items() if case.softcap or case.sinks or case.alibi}
    assert set(PLAIN_TWIN) == with_feature
    for name, twin in PLAIN_TWIN.items():
        assert found[name]._replace(name=twin, softcap=0.0, sinks=False, alibi=False) == found[twin]
        assert twin not in PLAIN_TWIN


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
        if case.lse:
            return torch.from_numpy(reference.attention_lse(q, k, layout=case.layout, **options)).float()
        if bias is not None:
            options["bias"] = bias.numpy() if bias.dtype == torch.bool else bias.double().numpy()
        out = reference.flash_attention(q, k, v, layout=case.layout, **options)
    return torch.from_numpy(np.asarray(out).copy()).to(getattr(torch, case.dtype))


@pytest.mark.torch
@pytest.mark.parametrize("name", [case.name for case in SUITES["smoke"].cases])
def test_check_takes_the_reference_and_no_other(name: str) -> None:
    from benchmarks.attention_inputs import check, make_inputs, out_shape

    case = case_of("smoke", name)
    inputs = make_inputs(case, "cpu", seed=1)
    out = truth(case, inputs)
    assert tuple(out.shape) == out_shape(case)
    good = check(case, inputs, out)
    assert good.passed and good.error < good.limit / 2

    # Every head and row of these small cases is sampled: one wrong row of one head must show.
    wrong = out.clone()
    heads_first = case.layout == "bhsd" or case.lse
    row: tuple[Any, ...] = (-1, 0) if case.varlen else (1 % case.batch, 0, -1) if heads_first else (0, -1, 0)
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

    from benchmarks.attention_inputs import make_inputs

    case = case_of("smoke", "sinks")
    first, again, other = (make_inputs(case, "cpu", seed) for seed in (3, 3, 4))
    assert torch.equal(first.q, again.q) and not torch.equal(first.q, other.q)
    assert float(first.k.std()) > 0.9 and not torch.equal(first.k, first.v)


# ---- the measuring loop ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("script", ["run.py", "report.py", "llama_prefill.py"])
def test_command_lines_run_from_anywhere(script: str, tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "benchmarks" / script), "--help"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert "usage: benchmarks/" in done.stdout


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
        assert row["same_bits"]
        # attention_lse has no out: whether its result lies where poison was left is the allocator's choice.
        assert row["poisoned"] or row["shape"]["head_dim_v"] == 0
        assert 0 <= row["error"] <= row["error_limit"] and row["error_row"] <= 3 * row["error_limit"]
        assert row["device_us"] > 0 and row["rounds"] == 2 and row["ceiling_tflops"] > 0
        assert row["tflops"] == pytest.approx(row["flops"] / row["device_us"] / 1e6, rel=1e-3)
        assert row["versions"]["torch"] and row["versions"][OURS] and row["device"] and row["commit"]
    rivals = {row["case"]: row for row in rows if row["library"] == "torch_sdpa"}
    assert {name for name, row in rivals.items() if row["status"] == "ok"} >= {"full_fp32", "causal_bf16", "bias"}
    assert rivals["window"]["status"] == "unsupported" and rivals["window"]["reason"] == "SDPA has no window"
    capsys.readouterr()
    assert report.main([str(out), "--ratio", "smoke"]) == 0
    assert capsys.readouterr().out.rstrip().endswith(f"rows {sum(row['status'] == 'ok' for row in rivals.values())}")


@pytest.mark.torch
def test_one_library_that_fails_does_not_end_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from benchmarks import bench, library, rivals, run

    class Failing(rivals.Sdpa):
        def prepare(self, *_: Any) -> library.Prepared:
            raise RuntimeError("it broke\nbadly")

    class Late(rivals.Sdpa):
        def prepare(self, case: Case, sets: Any, setup: library.Setup) -> library.Prepared:
            made = super().prepare(case, sets, setup)
            calls = iter(range(1000))

            def once(i: int) -> Any:
                if next(calls) > 3:
                    raise RuntimeError("the fifth call breaks")
                return made.run(i)

            return made._replace(run=once)

    class Wrong(rivals.Sdpa):
        def prepare(self, case: Case, sets: Any, setup: library.Setup) -> library.Prepared:
            made = super().prepare(case, sets, setup)
            return made._replace(run=lambda i: made.run(i) * 1.1)

    libraries = {
        OURS: Wrong(OURS),
        "torch_fa2": Failing("torch_fa2"),
        "flex_attention": Late("flex_attention"),
        "torch_sdpa": rivals.Sdpa("torch_sdpa"),
    }
    monkeypatch.setattr(bench, "LIBRARIES", libraries)
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
    from benchmarks.library import Setup
    from benchmarks.rivals import LIBRARIES

    cpu = Setup("cpu")
    for name in ("torch_fa2", "torch_cudnn", "torch_efficient", "flex_attention", "fa3", "fa4", OURS_SM80):
        assert LIBRARIES[name].missing(cpu) == "needs a CUDA device"
    assert LIBRARIES["torch_sdpa"].missing(cpu) == "" and LIBRARIES[OURS].missing(cpu) == ""
    assert "--peers" in LIBRARIES["fa3"].missing(Setup("cuda"))
    plain = case_of("attention_forward", "d128_s512_full")
    refused = {name: library.why_not(plain, Setup("cuda")) for name, library in LIBRARIES.items()}
    assert {name: reason for name, reason in refused.items() if reason} == {
        OURS_PLAIN: "the case has no bias",
        OURS_PACKED: "the case has no padding",
        "cuequivariance": "triangle attention wants an additive bias",
    }
    softcap = case_of("attention_forward_features", "softcap_d128_8k_causal")
    assert "softcap" in LIBRARIES["fa3"].why_not(softcap, Setup("cuda"))
    lse, ours = case_of("attention_lse", "d128_s8192_full"), (OURS, OURS_SM80)
    assert {name for name, one in LIBRARIES.items() if not one.why_not(lse, Setup("cuda"))} == set(ours)
    assert "softcap" in LIBRARIES["torch_fa2"].why_not(softcap, Setup("cuda"))
    assert LIBRARIES["flex_attention"].why_not(softcap, Setup("cuda")) == ""


def test_the_commit_may_be_given(monkeypatch: pytest.MonkeyPatch) -> None:
    from benchmarks.timing import commit

    monkeypatch.setenv("FLASHMOE_COMMIT", "abc123")
    assert commit() == ("abc123", False)
    monkeypatch.setenv("FLASHMOE_COMMIT", "abc123-dirty")
    assert commit() == ("abc123", True)


@pytest.mark.torch
@pytest.mark.alone
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

    lowest, median = host_microseconds(Spy(), call, calls=9, batch=4)
    assert 2000 <= lowest <= median < 20000
    assert calls == list(range(9)) and drained == [0, 4, 8, 9]
    calls.clear()
    begin = time.perf_counter()
    host_microseconds(Spy(), call, calls=9, batch=4, seconds=0.1)
    assert time.perf_counter() - begin >= 0.1 and calls == list(range(len(calls))) and len(calls) > 9


def test_a_short_call_is_held_even_when_its_first_calls_waited_for_the_host() -> None:
    from benchmarks.bench import held
    from benchmarks.timing import GpuTimer

    class Slow(GpuTimer):
        """Without a hold a call takes as long as a host that is late; with one as long as the device needs."""

        def __init__(self, device_us: float) -> None:
            self.device_us = device_us

        def sample(self, run: Any, launches: int, host_us: float = 0.0, lead: int = 1) -> float:  # noqa: ARG002
            return self.device_us if host_us else max(self.device_us, 49.0)

    assert held(Slow(11.0), print, 49.0, 15.0) == (11.0, 15.0)
    assert held(Slow(40.0), print, 49.0, 15.0) == (40.0, 0.0)
    assert held(Slow(400.0), print, 400.0, 15.0) == (400.0, 0.0)


def test_a_clock_that_changes_between_rounds_does_not_change_ratios() -> None:
    from benchmarks.bench import at_one_pace

    # Half the rounds at one clock, half at a slower one: each median alone comes from another half.
    paces = [1.0, 1.0, 1.0, 1.01, 1.1, 1.1, 1.1]
    one, other = [200.0 * p for p in paces], [190.0 * p for p in paces]
    one[3], other[3] = 200.0 * 1.1, 190.0
    steady = at_one_pace({"one": one, "other": other})
    ratio = statistics.median(steady["one"]) / statistics.median(steady["other"])
    assert statistics.median(one) / statistics.median(other) > 1.15 and abs(ratio - 200 / 190) < 1e-9
    assert at_one_pace({"alone": [3.0, 5.0, 4.0]}) == {"alone": [4.0, 4.0, 4.0]}
    assert at_one_pace({"one": [1.0, 2.0], "late": []}) == {"one": [1.5, 1.5]}


@pytest.mark.torch
def test_the_forced_kernel_is_forced_around_every_call(monkeypatch: pytest.MonkeyPatch) -> None:
    import contextlib

    from benchmarks import library, rivals
    from benchmarks.attention_inputs import check, make_inputs
    from flashmoe_cupy.plan import kernels

    forcing = rivals.LIBRARIES[OURS_SM80]
    forced: list[str] = []

    @contextlib.contextmanager
    def only(name: str) -> Any:
        forced.append(name)
        yield
        forced.append("free")

    monkeypatch.setattr(kernels, "only", only, raising=False)
    case = case_of("smoke", "causal_bf16")
    inputs = make_inputs(case, "cpu", seed=1)
    made = forcing.prepare(case, [inputs], library.Setup("cpu"))
    assert forced == []  # nothing is held between the loops of calls
    for _ in range(2):
        with made.scope():
            assert forced[-1] == "attention_fwd_sm80"
            out = made.as_torch(made.run(0))
        assert forced[-1] == "free"
        assert check(case, inputs, out).passed


@pytest.mark.torch
def test_fa3_is_called_as_its_operator_reads(monkeypatch: pytest.MonkeyPatch) -> None:
    from types import SimpleNamespace

    import torch

    from benchmarks import library, rivals
    from benchmarks.attention_inputs import make_inputs

    calls: list[tuple[list[tuple[int, ...]], dict[str, Any]]] = []

    def operator(*arrays: Any, **keywords: Any) -> Any:
        calls.append(([tuple(t.shape) for t in arrays], keywords))
        return arrays[0], None, None, None

    fake = SimpleNamespace(fwd=SimpleNamespace(default=operator))
    monkeypatch.setattr(torch.ops, "flash_attn_3", fake, raising=False)
    fa3, setup = rivals.LIBRARIES["fa3"], library.Setup("cpu")

    def called(case: Case) -> tuple[list[tuple[int, ...]], dict[str, Any]]:
        made = fa3.prepare(case, [make_inputs(case, "cpu", seed=1)], setup)
        made.as_torch(made.run(0))
        return calls[-1]

    plain = Case("x", "smoke", "", 2, 9, 9, 4, 2, 16, 16, dtype="float16", causal=True)
    queries_first = [(2, 9, 4, 16), (2, 9, 2, 16), (2, 9, 2, 16)]
    assert called(plain) == (queries_first, {"is_causal": True})
    assert called(plain._replace(layout="bhsd")) == (queries_first, {"is_causal": True})
    band = {"is_causal": False, "window_size_left": 3, "window_size_right": 0}
    assert called(plain._replace(window_size=(3, 0))) == (queries_first, band)
    shapes, keywords = called(plain._replace(batch=2, seqlens=(4, 9)))
    assert shapes == [(13, 4, 16), (13, 2, 16), (13, 2, 16)]
    assert keywords["cu_seqlens_q"].tolist() == keywords["cu_seqlens_k"].tolist() == [0, 4, 13]
    assert (keywords["max_seqlen_q"], keywords["max_seqlen_k"], keywords["is_causal"]) == (9, 9, True)
    for case in SUITES["attention_forward_features"].cases:
        assert bool(fa3.why_not(case, setup)) == (case.name in PLAIN_TWIN)
    assert "head_dim_v" in fa3.why_not(plain._replace(head_dim=128, head_dim_v=64), setup)
