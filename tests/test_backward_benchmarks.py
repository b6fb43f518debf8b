"""Attention's backward in the benchmarks: cases, work, the check, the adapters and the bars; no GPU."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
from calls_kit import options_of_calls

from benchmarks import bars, report
from benchmarks.backward_cases import BACKWARD_SUITES, BackwardCase
from benchmarks.bars import BARS, LEAST, MEAN
from benchmarks.cases import OURS, OURS_DETERMINISTIC, OURS_SM80, SUITES
from flashmoe_cupy import reference

ROWS, FEATURES, _, PORTABLE, _ = BACKWARD_SUITES.values()
TINY = BackwardCase("x", "attention_backward", "", 2, 9, 9, 4, 2, 16, 16, "float32", causal=True)
KINDS: dict[str, BackwardCase] = {
    "causal": TINY,
    "full_wide": TINY._replace(causal=False, seqlen_k=21, head_dim_v=24),
    "few_keys": TINY._replace(seqlen_k=5),  # the first queries see nothing
    "window": TINY._replace(causal=False, window_size=(3, 1), heads_k=4),
    "softcap": TINY._replace(softcap=0.7),
    "alibi": TINY._replace(alibi=True, seqlen_k=21),
    "sinks": TINY._replace(sinks=True, window_size=(4, 0)),
    "bhsd": TINY._replace(layout="bhsd"),
    "packed": TINY._replace(batch=3, seqlen_q=8, seqlen_k=8, seqlens=(3, 8, 1)),
    "bf16": TINY._replace(dtype="bfloat16"),
}


def feature(name: str) -> BackwardCase:
    return next(case for case in FEATURES.cases if case.name == name)


def small(case: BackwardCase, by: int = 64) -> BackwardCase:
    """The case with `by` times shorter sequences, at most three of them, two key heads and a quarter of the dims."""
    lengths = tuple(max(1, n // by) for n in (*case.seqlens[:2], *case.seqlens[-1:]))
    seqlen = max(lengths) if lengths else max(8, case.seqlen_q // by)
    left, right = case.window_size
    return case._replace(
        batch=len(lengths) or min(case.batch, 2), seqlen_q=seqlen, seqlen_k=seqlen, seqlens=lengths,
        heads_q=2 * (case.heads_q // case.heads_k), heads_k=2, head_dim=case.head_dim // 4,
        head_dim_v=case.head_dim_v // 4, window_size=(left // by if left > 0 else left, right),
    )  # fmt: skip


def inputs_of(case: BackwardCase, seed: int = 1) -> Any:
    from benchmarks.attention_inputs import make_inputs
    from benchmarks.backward_inputs import with_dout

    return with_dout(case, make_inputs(case, "cpu", seed), seed)


# ---- the cases -------------------------------------------------------------------------------------------------------


def test_the_cases_are_those_of_the_forward() -> None:
    forward = SUITES["attention_forward"].cases
    assert len(ROWS.cases) == 36
    for case, one in zip(ROWS.cases, forward, strict=True):
        assert tuple(case) == tuple(one._replace(suite="attention_backward", source=case.source))
        assert case.flops() == 2.5 * one.flops() and (case.batch * case.seqlen_q, case.dtype) == (16384, "bfloat16")
    assert "d64_s512_full" in {case.name for case in ROWS.cases}
    found = {case.name: (case.seqlen_q, case.heads_q, case.heads_k, case.head_dim, case.head_dim_v, case.band())
             for case in FEATURES.cases}  # fmt: skip
    assert found == {
        "gqa_32_4_d128_8k_causal": (8192, 32, 4, 128, 128, (-1, 0)),
        "window1024_d128_16k": (16384, 16, 16, 128, 128, (1023, 0)),
        "varlen_64_d128_causal": (8192, 16, 16, 128, 128, (-1, 0)),
        "d96_8k_causal": (8192, 16, 16, 96, 96, (-1, 0)),
        "sinks_window128_gqa_64_8_d64_8k": (8192, 64, 8, 64, 64, (127, 0)),
        "softcap_d128_8k_causal": (8192, 16, 16, 128, 128, (-1, 0)),
        "d192_128_8k_causal": (8192, 16, 16, 192, 128, (-1, 0)),
    }
    assert feature("sinks_window128_gqa_64_8_d64_8k").sinks and feature("softcap_d128_8k_causal").softcap == 30.0
    assert len(feature("varlen_64_d128_causal").seqlens) == 64
    for suite in (ROWS, FEATURES):
        assert suite.ours == OURS and {OURS, OURS_DETERMINISTIC, *suite.rivals} < set(suite.libraries)
        assert all(case.suite == suite.name and not (case.alibi or case.bias or case.padding) for case in suite.cases)


def test_work_of_the_backward() -> None:
    case = TINY._replace(causal=False, seqlen_k=21, head_dim_v=24)
    assert case.flops() == 2 * 2 * 4 * 9 * 21 * (3 * 16 + 2 * 24)
    assert TINY.flops() == 2 * 2 * 4 * (81 / 2) * 5 * 16
    seen = sum(min(i, 3) + 1 for i in range(9))  # a window of three keys before the query and the query's own
    assert TINY._replace(window_size=(3, 0)).flops() == 2 * 2 * 4 * seen * 5 * 16
    assert TINY._replace(seqlens=(3, 9)).flops() == 4 * (9 + 81) * 5 * 16
    # q, dq, out, dout of four heads, k, dk, v, dv of two, lse of four.
    assert TINY.bytes() == 4 * (2 * 9 * 4 * 4 * 16 + 2 * 9 * 2 * 4 * 16 + 2 * 9 * 4)
    wide = case._replace(dtype="bfloat16")
    assert wide.bytes() == 2 * (2 * 9 * 4 + 2 * 21 * 2) * 2 * (16 + 24) + 4 * 2 * 9 * 4
    assert feature("d192_128_8k_causal").flops() == 2 * 2 * 16 * 8192**2 // 2 * (3 * 192 + 2 * 128)


# ---- the check of an answer ------------------------------------------------------------------------------------------


def true_gradients(case: BackwardCase, inputs: Any) -> list[Any]:
    """dq, dk, dv and, with sinks, dsinks of the float64 reference."""
    import torch

    dout, q, k, v = (t.double().numpy() for t in (inputs.dout, *inputs[:3]))
    options: dict[str, Any] = {"causal": case.causal, "window_size": case.window_size, "softcap": case.softcap}
    if case.sinks:
        options["sinks"] = inputs.sinks.double().numpy()
    if case.alibi:
        options["alibi_slopes"] = inputs.alibi_slopes.double().numpy()
    if case.varlen:
        cu = inputs.cu_seqlens.numpy()
        options |= {
            "cu_seqlens_q": cu,
            "cu_seqlens_k": cu,
            "max_seqlen_q": case.seqlen_q,
            "max_seqlen_k": case.seqlen_k,
        }
        out, lse = reference.flash_attention_varlen(q, k, v, return_lse=True, **options)
        made = reference.flash_attention_varlen_backward(dout, q, k, v, out, lse, **options)
    else:
        options["layout"] = case.layout
        out, lse = reference.flash_attention(q, k, v, return_lse=True, **options)
        made = reference.flash_attention_backward(dout, q, k, v, out, lse, **options)
    return [torch.from_numpy(np.asarray(x).copy()) for x in made[: 4 if case.sinks else 3]]


@pytest.mark.torch
@pytest.mark.parametrize("kind", KINDS)
def test_check_takes_the_reference_and_no_other(kind: str) -> None:
    from benchmarks.backward_inputs import check, joined, parts, shapes

    case = KINDS[kind]
    inputs = inputs_of(case)
    flat = joined(case, true_gradients(case, inputs))
    assert [tuple(part.shape) for part in parts(case, flat)] == shapes(case)
    assert all(part.untyped_storage().data_ptr() == flat.data_ptr() for part in parts(case, flat))
    good = check(case, inputs, flat)
    assert good.passed and good.error < good.limit / 2
    # Every row of these small cases is sampled: one wrong row of any gradient must show.
    for place in range(len(shapes(case))):
        wrong = flat.clone()
        part = parts(case, wrong)[place]
        rows = part.flatten(0, -2) if part.dim() > 1 else part[:, None]
        row = int(rows.double().norm(dim=-1).argmax())
        rows[row] = -rows[row]
        assert not check(case, inputs, wrong, heads=100, rows=100).passed, place
    unwritten = flat.clone()
    unwritten[len(flat) // 2] = math.nan
    found = check(case, inputs, unwritten, heads=2, rows=2)
    assert not found.finite and not found.passed
    assert not check(case, inputs_of(case, seed=2), flat).passed


@pytest.mark.torch
def test_blocks_of_queries_give_the_whole() -> None:
    import torch

    from benchmarks.backward_inputs import truth_of

    case = KINDS["sinks"]._replace(softcap=0.7)
    inputs = inputs_of(case)
    rows, columns = torch.tensor([0, 4, 8]), torch.tensor([1, 8])
    whole, apart = (truth_of(case, inputs, 1, 2, rows, columns, block) for block in (1 << 20, 20))
    assert whole.dbias is None and apart.dbias is None
    for one, other in zip(whole[:4], apart[:4], strict=True):
        assert torch.allclose(one.truth, other.truth, rtol=1e-12, atol=1e-14)
        assert torch.allclose(one.size, other.size, rtol=1e-12)
    assert [tuple(one.truth.shape) for one in whole[:4]] == [(3, 16), (2, 16), (2, 16), (1, 1)]
    assert all(bool((one.size > 0).all()) for one in whole[:4])


@pytest.mark.torch
def test_a_row_that_cancels_is_held_to_its_terms() -> None:
    from benchmarks.backward_inputs import check, joined

    inputs = inputs_of(TINY._replace(dtype="bfloat16"))
    case = KINDS["bf16"]
    dq, dk, dv = true_gradients(case, inputs)
    assert float(dq[:, 0].abs().max()) < 1e-12  # the first query sees one key, whose probability is 1
    noisy = dq.clone()
    noisy[:, 0] += 2e-3
    assert check(case, inputs, joined(case, [noisy, dk, dv]), heads=100).passed
    noisy[:, 0] += 1.0
    assert not check(case, inputs, joined(case, [noisy, dk, dv]), heads=100).passed


# ---- the adapters ----------------------------------------------------------------------------------------------------


@pytest.mark.torch
@pytest.mark.parametrize("case", [*ROWS.cases[:2], *ROWS.cases[12:14], *FEATURES.cases], ids=lambda case: case.name)
def test_cases_run_small(case: BackwardCase) -> None:
    from benchmarks.backward_bench import BackwardBench
    from benchmarks.bench import QUICK, Run
    from benchmarks.library import Setup
    from benchmarks.timing import CpuTimer

    run = Run(Setup("cpu"), CpuTimer(), QUICK._replace(rounds=1, host_calls=5), lambda _: None)
    libraries = [*ROWS.libraries, "torch_sdpa"]
    rows = {row["library"]: row for row in BackwardBench(run).measure(small(case), libraries, 0, math.inf)}
    plain = not case.varlen and case.window_size == (-1, -1) and not case.softcap
    for name in (OURS, OURS_DETERMINISTIC, *(("torch_sdpa",) if plain else ())):
        row = rows[name]
        assert row["status"] == "ok", row["reason"]
        assert row["same_bits"] and row["error"] <= row["error_limit"] and row["device_us"] > 0
        assert row["flops"] == small(case).flops() and (row["poisoned"] or name == "torch_sdpa")
    for name in set(rows) - {OURS, OURS_DETERMINISTIC, "torch_sdpa"}:
        assert (rows[name]["status"], rows[name]["reason"]) == ("missing", "needs a CUDA device")


@pytest.mark.torch
def test_the_command_line_knows_the_suites(capsys: pytest.CaptureFixture[str]) -> None:
    from benchmarks.run import chosen, main, parse

    found = chosen(parse(["--suite", "h200_backward"]))
    assert len(found) == 8 + 7 + 7 + 24 + 36
    assert all(libraries == BACKWARD_SUITES[case.suite].libraries for case, libraries in found)
    assert chosen(parse(["--suite", "attention_backward", "--libraries", "torch_fa2"])) == []
    assert main(["--suite", "attention_backward", "--cases", "^d64_s512_full$", "--list"]) == 0
    assert "171.8 GFLOP" in capsys.readouterr().out  # 10 * 16384 * 512 * 32 * 64


@pytest.mark.torch
def test_a_run_writes_rows_that_a_report_reads(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from benchmarks import run
    from benchmarks.moe_cases import ALL_SUITES

    suite = ROWS._replace(cases=(small(ROWS.cases[0]),))
    monkeypatch.setitem(ALL_SUITES, suite.name, suite)
    out = tmp_path / "a.jsonl"
    arguments = ["--suite", suite.name, "--device", "cpu", "--quick", "--rounds", "1", "--out", str(out)]
    assert run.main([*arguments, "--libraries", OURS, OURS_DETERMINISTIC, "torch_sdpa", "fa3"]) == 0
    rows = {row["library"]: row for row in map(json.loads, out.read_text(encoding="utf-8").splitlines())}
    assert {name: row["status"] for name, row in rows.items()} == {
        OURS: "ok", OURS_DETERMINISTIC: "ok", "torch_sdpa": "ok", "fa3": "missing",
    }  # fmt: skip
    assert report.main([str(out)]) == 0 and "flashmoe_cupy, deterministic" in capsys.readouterr().out


@pytest.mark.torch
def test_deterministic_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    import flashmoe_cupy
    from benchmarks.backward_rivals import BACKWARD_LIBRARIES
    from benchmarks.library import Setup

    seen = options_of_calls(monkeypatch, flashmoe_cupy, "flash_attention_backward")
    case = KINDS["sinks"]
    for name in (OURS, OURS_DETERMINISTIC):
        made = BACKWARD_LIBRARIES[name].prepare(case, [inputs_of(case)], Setup("cpu"))
        assert made.as_torch(made.run(0)).dim() == 1
    assert [options.get("deterministic", False) for options in seen] == [False, True]
    assert all(options["need"] == ("q", "k", "v", "sinks") and "dq" not in options for options in seen)


@pytest.mark.torch
def test_fa3_is_called_as_its_operators_read(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    from benchmarks.backward_inputs import parts, poison
    from benchmarks.backward_rivals import BACKWARD_LIBRARIES
    from benchmarks.library import Setup

    calls: list[tuple[list[tuple[int, ...]], dict[str, Any]]] = []

    def forward(q: Any, k: Any, v: Any, **keywords: Any) -> Any:
        assert "deterministic" not in keywords
        return q.new_zeros(*q.shape[:-1], v.shape[-1]), q.new_zeros(q.shape[-2], 7), None, None

    def backward(dout: Any, q: Any, k: Any, v: Any, out: Any, lse: Any, dq: Any, dk: Any, dv: Any, **keys: Any) -> Any:
        calls.append(([tuple(t.shape) for t in (dout, q, k, v, out, lse, dq, dk, dv)], keys))
        for place, x in enumerate((dq, dk, dv)):
            x.fill_(place + 1)

    operators = {name: SimpleNamespace(default=call) for name, call in (("fwd", forward), ("bwd", backward))}
    monkeypatch.setattr(torch.ops, "flash_attn_3", SimpleNamespace(**operators), raising=False)
    q, k = (2, 9, 4, 16), (2, 9, 2, 16)
    plain = TINY._replace(dtype="float16")
    for name, deterministic in (("fa3", False), ("fa3_deterministic", True)):
        library = BACKWARD_LIBRARIES[name]
        for case in (plain, plain._replace(layout="bhsd")):
            made = library.prepare(case, [inputs_of(case)], Setup("cpu"))
            flat = poison(case, "cpu")
            assert made.into is not None
            made.into(0, flat)
            for answer in (made.as_torch(made.run(0)), flat):
                assert [set(part.flatten().tolist()) for part in parts(case, answer)] == [{1.0}, {2.0}, {3.0}]
            assert calls[-1] == calls[-2]
            assert calls[-1] == ([q, q, k, k, q, (4, 7), q, k, k], {"is_causal": True, "deterministic": deterministic})
    window = plain._replace(window_size=(3, 0))
    made = library.prepare(window, [inputs_of(window)], Setup("cpu"))
    made.run(0)
    band = {"is_causal": False, "window_size_left": 3, "window_size_right": 0, "deterministic": True}
    assert calls[-1][1] == band
    packed = plain._replace(seqlens=(4, 9))
    made = library.prepare(packed, [inputs_of(packed)], Setup("cpu"))
    made.as_torch(made.run(0))
    assert calls[-1][0][0] == (13, 4, 16) and calls[-1][1]["cu_seqlens_k"].tolist() == [0, 4, 13]
    assert (calls[-1][1]["max_seqlen_q"], calls[-1][1]["max_seqlen_k"]) == (9, 9)
    cuda = Setup("cuda")
    assert {case.name for case in FEATURES.cases if library.why_not(case, cuda)} == {
        "sinks_window128_gqa_64_8_d64_8k", "softcap_d128_8k_causal",
    }  # fmt: skip
    assert {case.head_dim for case in ROWS.cases if library.why_not(case, cuda)} == {256}
    assert not any(BACKWARD_LIBRARIES["fa3"].why_not(case, cuda) for case in ROWS.cases)
    refused = RuntimeError("v must have shape (batch_size, seqlen_k, num_heads_k, head_size)\nmore")
    assert library.unsupported(refused).endswith("num_heads_k, head_size)")
    assert library.unsupported(RuntimeError("CUDA error: an illegal address")) == ""


@pytest.mark.torch
def test_fa4_goes_through_autograd(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    from benchmarks.backward_inputs import check
    from benchmarks.backward_rivals import BACKWARD_LIBRARIES
    from benchmarks.library import Setup

    forwards: list[dict[str, Any]] = []

    def flash_attn_func(q: Any, k: Any, v: Any, causal: bool, learnable_sink: Any = None) -> Any:
        forwards.append({"causal": causal})
        kk, vv = (x.repeat_interleave(q.shape[2] // x.shape[2], 2).transpose(1, 2) for x in (k, v))
        scores = q.transpose(1, 2) @ kk.mT * q.shape[-1] ** -0.5
        hidden = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
        scores = scores.masked_fill(hidden, -math.inf)
        if learnable_sink is not None:
            scores = torch.cat((scores, learnable_sink[None, :, None, None].expand(*scores.shape[:3], 1)), -1)
        out = torch.softmax(scores, -1)[..., : k.shape[1]] @ vv
        return out.transpose(1, 2), None

    module = ModuleType("flash_attn.cute.interface")
    module.__dict__["flash_attn_func"] = flash_attn_func
    for name in ("flash_attn", "flash_attn.cute"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    monkeypatch.setitem(sys.modules, module.__name__, module)
    library = BACKWARD_LIBRARIES["fa4"]
    for case in (TINY, TINY._replace(layout="bhsd"), TINY._replace(sinks=True)):
        forwards.clear()
        inputs = inputs_of(case)
        made = library.prepare(case, [inputs], Setup("cpu"))
        for _ in range(2):  # the graph is kept
            assert check(case, inputs, made.as_torch(made.run(0))).passed
        assert forwards == [{"causal": True}]
        assert inputs.q.grad is None and not inputs.q.requires_grad
    none = torch.zeros(())
    with pytest.raises(NotImplementedError, match="gradient of the sinks") as caught:
        made.as_torch((none, none, none, None))
    assert library.unsupported(caught.value)
    assert not any(library.why_not(case, Setup("cuda")) for case in (*ROWS.cases, *FEATURES.cases))


@pytest.mark.torch
def test_sdpa_says_what_it_lacks() -> None:
    from benchmarks.backward_rivals import BACKWARD_LIBRARIES
    from benchmarks.library import Setup

    cuda = Setup("cuda")
    cudnn, flash = (
        {case.name for case in FEATURES.cases if not BACKWARD_LIBRARIES[name].why_not(case, cuda)}
        for name in ("torch_cudnn", "torch_flash")
    )
    assert cudnn == {"gqa_32_4_d128_8k_causal", "d96_8k_causal", "d192_128_8k_causal"}
    assert flash == cudnn - {"d192_128_8k_causal"}
    assert not any(BACKWARD_LIBRARIES["torch_flash"].why_not(case, cuda) for case in ROWS.cases)


# ---- the bars --------------------------------------------------------------------------------------------------------


def made_up(case: BackwardCase, library: str, us: float | None, status: str = "missing") -> dict[str, Any]:
    row = {
        "suite": case.suite, "case": case.name, "library": library, "status": "ok" if us else status,
        "reason": "" if us else "not here", "run": "2026-01-01T00:00:00Z-1", "device": "Device A", "versions": {},
        "commit": "0123456789abcdef", "shape": case.shape(), "error": 1e-3,
    }  # fmt: skip
    return row | ({"device_us": us, "host_us": us / 10} if us else {})


def rows_of(suite: Any, lacking: dict[str, set[str]], **times: float) -> list[dict[str, Any]]:
    """Ours takes 100 µs, the others what `times` says; `lacking` says which cases a library cannot compute."""
    return [
        made_up(case, name, None if case.name in lacking.get(name, ()) else us, "unsupported")
        for case in suite.cases
        for name, us in ({OURS: 100.0} | times).items()
    ]


def test_the_bars_are_the_ones_to_show() -> None:
    mine = [bar for bar in BARS if bar.suite in (ROWS.name, FEATURES.name, PORTABLE.name)]
    best, fa3 = ("fa3", "torch_cudnn", "fa4"), ("fa3",)
    assert [(bar.suite, bar.ours, bar.kind, bar.limit, bar.rivals, len(bar.cases)) for bar in mine] == [
        (ROWS.name, OURS, MEAN, 1.0, best, 36),
        (ROWS.name, OURS, LEAST, 0.92, best, 36),
        (ROWS.name, OURS_DETERMINISTIC, LEAST, 0.88, (OURS,), 6),
        (ROWS.name, OURS_DETERMINISTIC, LEAST, 1.0, ("fa3_deterministic",), 36),
        (FEATURES.name, OURS, MEAN, 1.0, fa3, 7),
        (FEATURES.name, OURS, LEAST, 0.9, fa3, 7),
        (PORTABLE.name, OURS_SM80, MEAN, 1.0, ("torch_flash",), 24),
    ]
    assert mine[2].cases == tuple(f"d{d}_s{s}_causal" for d in (64, 128) for s in (4096, 8192, 16384))


def shown(tmp_path: Path, capsys: pytest.CaptureFixture[str], suite: str, rows: list[dict[str, Any]]) -> str:
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    assert report.main([str(path), "--ratio", suite, "--markdown"]) == 0
    return capsys.readouterr().out


def test_the_backward_is_held_to_the_best(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    wide = {case.name for case in ROWS.cases if case.head_dim == 256}
    times = {OURS_DETERMINISTIC: 110.0, "torch_cudnn": 103.0, "fa3": 102.0, "fa4": 101.0, "fa3_deterministic": 120.0}
    rows = rows_of(ROWS, {"fa3_deterministic": wide}, **times)
    text = shown(tmp_path, capsys, ROWS.name, rows)
    assert "bars: 4 of 4 hold" in text and text.count("| FA4 |") == 36
    line = next(line for line in text.splitlines() if "FA3, deterministic |" in line and "speed over" in line)
    assert "| 36 rows | flashmoe_cupy, deterministic: least speed over FA3, deterministic | ≥ 1 | 1.091 | pass" in line
    assert "24 rows that it has" in line
    assert "flashmoe_cupy, deterministic: least speed over flashmoe_cupy | ≥ 0.88 | 0.909 | pass" in text
    assert text.rstrip().splitlines()[-1] == "geomean 1.010 min 1.010 rows 36"
    for row in rows:  # d 128 at 16k, causal: the deterministic one costs too much
        if (row["library"], row["case"]) == (OURS_DETERMINISTIC, "d128_s16384_causal"):
            row["device_us"] = 121.0
    found = bars.judge(rows, ROWS.name)
    assert [item.word() for item in found] == ["pass", "pass", "FAIL", "FAIL"]
    assert found[3].note.startswith("d128_s16384_causal, against FA3, deterministic")


def test_features_are_held_to_fa3_where_it_has_them(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fa3_lacks = {"sinks_window128_gqa_64_8_d64_8k", "softcap_d128_8k_causal"}
    rows = rows_of(FEATURES, {"fa3": fa3_lacks}, fa3=104.0, fa4=95.0)
    text = shown(tmp_path, capsys, FEATURES.name, rows)
    assert "bars: 2 of 2 hold" in text and text.count("5 rows that it has") == 2
    assert text.rstrip().splitlines()[-1] == "geomean 0.950 min 0.950 rows 7"
    assert "plain kernel" not in text  # the suite has no plain twins
    # A rival that is not installed leaves the bar unmeasured; one that has nothing does too.
    gone = [made_up(case, "fa3", None) for case in FEATURES.cases]
    ours = [made_up(case, OURS, 100.0) for case in FEATURES.cases]
    assert {item.word() for item in bars.judge([*gone, *ours], FEATURES.name)} == {"not measured"}
    refused = [made_up(case, "fa3", None, "unsupported") for case in FEATURES.cases]
    found = bars.judge([*refused, *ours], FEATURES.name)
    assert {item.note for item in found} == {"no rival can compute any of these rows"}
