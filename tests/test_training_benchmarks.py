"""The suites about training: fine-tuning, a stack of layers, the host side of forward and backward; no GPU."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from benchmarks import bars, report
from benchmarks.backward_cases import AUTOGRAD_SUITES, BackwardCase
from benchmarks.bars import BARS, HOST, LOSS, LOSS_SHARE
from benchmarks.cases import OURS, OURS_FLASH_ATTN, OURS_SDPA
from benchmarks.training_cases import FINE_TUNING, LAYER_STACKS, SMOLLM2, LayersCase, Shape, TrainingCase

HOST_SUITE = AUTOGRAD_SUITES["attention_backward_host"]
TRAINING, RANDOM = FINE_TUNING["training"].cases[0], FINE_TUNING["training_random"].cases[0]
STACKS = LAYER_STACKS["llama_training"]
TINY = LayersCase("x", "llama_training", "", Shape(2, 64, 4, 2, 16, 96), 2, 24, "float32")


def bench_of(kind: Any, **setup: Any) -> tuple[Any, list[dict[str, Any]]]:
    """A bench on the processor, and the rows that it writes."""
    from benchmarks.bench import QUICK, Run
    from benchmarks.library import Setup
    from benchmarks.timing import CpuTimer

    written: list[dict[str, Any]] = []
    effort = QUICK._replace(rounds=1, host_calls=5)
    return kind(Run(Setup("cpu", **setup), CpuTimer(), effort, written.append)), written


def row(case: Any, library: str, **values: Any) -> dict[str, Any]:
    made = {"suite": case.suite, "case": case.name, "library": library, "status": "ok", "reason": "", "run": "1"}
    return made | {"device": "Device A", "versions": {}, "shape": case.shape(), "device_us": 100.0} | values


# ---- cases -----------------------------------------------------------------------------------------------------------


def test_the_cases() -> None:
    assert [case.name for case in HOST_SUITE.cases] == [
        "torch_bshd_d64", "torch_bhsd_d64_fp16", "torch_gqa_32_8_d128_causal", "torch_varlen_d64_causal",
    ]  # fmt: skip
    assert HOST_SUITE.measure == "host_us" and HOST_SUITE.rivals == ("torch_sdpa",)
    assert (TRAINING.steps, TRAINING.window, TRAINING.model) == (200, 25, SMOLLM2) and TRAINING.pretrained
    assert SMOLLM2.weights() == 134_515_008 - (2 * 30 + 1) * 576  # all but the norms; the head is the embedding
    assert RANDOM.model == SMOLLM2 and not RANDOM.pretrained
    assert [(case.batch, case.seqlen, case.tokens) for case in STACKS.cases] == [(2, 4096, 8192), (1, 8192, 8192)]
    one = 4096 * (4096 * 2 + 1024 * 2 + 3 * 14336)
    assert STACKS.cases[1].flops() == 4 * (6 * 8192 * one + 7 * 8192**2 * 32 * 128)
    every: tuple[Any, ...] = (TRAINING, RANDOM, *STACKS.cases)
    for case in every:  # no bar is judged from what a processor does
        assert case.made_small().name == f"{case.name}_small"
    assert TRAINING.made_small().model == SMOLLM2


@pytest.mark.torch
def test_the_command_line_knows_the_suites(capsys: pytest.CaptureFixture[str]) -> None:
    from benchmarks.run import chosen, main, parse

    found = chosen(parse(["--suite", "h200_training"]))
    every: tuple[Any, ...] = (*HOST_SUITE.cases, *STACKS.cases, TRAINING)
    assert [case.name for case, _ in found] == [case.name for case in every]
    assert main(["--suite", "training", "training_random", "llama_training", "--list"]) == 0
    assert capsys.readouterr().out.count("smollm2_135m") == 2
    assert parse(["--suite", "training", "--models", "a"]).models == "a"


# ---- the host side of forward and backward ---------------------------------------------------------------------------


@pytest.mark.torch
@pytest.mark.parametrize("case", HOST_SUITE.cases, ids=lambda case: case.name)
def test_forward_and_backward_of_every_library(case: BackwardCase) -> None:
    from benchmarks.autograd_bench import AutogradBench

    bench, written = bench_of(AutogradBench)
    rows = {row["library"]: row for row in bench.measure(case, HOST_SUITE.libraries, 0, math.inf)}
    assert [*rows.values()] == written and bench.measures_host(case)
    lacking = {OURS_FLASH_ATTN} if case.layout == "bhsd" else {OURS_SDPA, "torch_sdpa"} if case.varlen else set()
    for name, one in rows.items():
        assert one["status"] == ("unsupported" if name in lacking else "ok"), one["reason"]
        assert name in lacking or (one["error"] <= one["error_limit"] and one["same_bits"])
    held = [bar for bar in BARS if (bar.suite, bar.case) == (case.suite, case.name)]
    assert {bar.ours for bar in held} == set(rows) - lacking - {"torch_sdpa"}
    assert {(bar.kind, bar.limit) for bar in held} == {(HOST, 60.0)}


def test_the_host_side_is_reported(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    times = {OURS: 50.0, OURS_FLASH_ATTN: 55.0, OURS_SDPA: 61.0, "torch_sdpa": 45.0}
    rows = [row(case, name, host_us=us) for case in HOST_SUITE.cases for name, us in times.items()]
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps(one) + "\n" for one in rows), encoding="utf-8")
    assert report.main([str(path), "--ratio", HOST_SUITE.name, "--markdown"]) == 0
    text = capsys.readouterr().out
    assert "bars: 7 of 10 hold" in text and text.count("flashmoe_cupy as SDPA: host µs of a call | ≤ 60 | 61.0") == 3
    assert text.rstrip().splitlines()[-1] == "geomean 0.900 min 0.900 rows 4"
    assert report.main([str(path)]) == 0 and "host µs of a call" in capsys.readouterr().out


# ---- a stack of layers -----------------------------------------------------------------------------------------------


@pytest.mark.torch
def test_a_stack_is_checked() -> None:
    from benchmarks.llama_training import LayersBench, forward, joined, make_stack, plain, sizes, step

    stack = make_stack(TINY, "cpu", 1)
    made = step(TINY, stack, plain)
    assert len(made) == 2 + 2 * 9 and made[0].shape == (2, 24, 64)
    assert [x.numel() for x in made[:6]] == sizes(TINY) and joined(made).numel() == sum(sizes(TINY))
    assert made[0].equal(forward(TINY, stack, plain))
    bench, _ = bench_of(LayersBench)
    assert bench.check(TINY, stack, joined(made)).error == 0
    shifted = joined(step(TINY, stack, lambda q, k, v: plain(q, k.roll(1, 1), v)))
    assert bench.check(TINY, stack, shifted).error > 0.5
    torn = joined(made)
    torn[-1] = math.nan
    assert not bench.check(TINY, stack, torn).passed


@pytest.mark.torch
def test_layers_run_small(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from benchmarks import run

    out = tmp_path / "a.jsonl"
    arguments = ["--suite", "llama_training", "--device", "cpu", "--quick", "--rounds", "1", "--cases", "s4096"]
    assert run.main([*arguments, "--out", str(out)]) == 0
    assert "tokens/s" in capsys.readouterr().out
    rows = {row["library"]: row for row in map(json.loads, out.read_text(encoding="utf-8").splitlines())}
    assert set(rows) == set(STACKS.libraries)
    for name in (OURS, "torch_sdpa"):
        one = rows[name]
        assert one["status"] == "ok" and one["error"] < 0.02 < one["error_limit"], one
        assert one["case"].endswith("_small") and one["tokens_per_s"] > 0 and one["shape"]["hidden"] == 128
    assert {rows[name]["status"] for name in ("torch_cudnn", "fa3", "fa4")} == {"missing"}
    assert report.main([str(out)]) == 0 and "tokens/s" in capsys.readouterr().out


@pytest.mark.torch
def test_fa3_is_differentiated(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its two operators, as stand-ins that compute what they should, give the gradients of plain attention."""
    from types import SimpleNamespace

    import torch

    from benchmarks import llama_training
    from flashmoe_cupy import flash_attention, flash_attention_backward

    def fwd(q: Any, k: Any, v: Any, is_causal: bool) -> Any:
        return (*flash_attention(q, k, v, causal=is_causal, return_lse=True), None, None)

    def bwd(dout: Any, q: Any, k: Any, v: Any, out: Any, lse: Any, *made: Any, is_causal: bool, **_: Any) -> None:
        flash_attention_backward(dout, q, k, v, out, lse, causal=is_causal, dq=made[0], dk=made[1], dv=made[2])

    operators = SimpleNamespace(fwd=SimpleNamespace(default=fwd), bwd=SimpleNamespace(default=bwd))
    monkeypatch.setattr(torch.ops, "flash_attn_3", operators, raising=False)
    attention = llama_training._fa3.__wrapped__()
    stack = llama_training.make_stack(TINY, "cpu", 1)
    bench, _ = bench_of(llama_training.LayersBench)
    made = llama_training.joined(llama_training.step(TINY, stack, attention))
    assert bench.check(TINY, stack, made).error < 1e-4


# ---- fine-tuning -----------------------------------------------------------------------------------------------------


@pytest.mark.torch
def test_fine_tuning_runs_small(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("transformers")
    from benchmarks import run

    out = tmp_path / "a.jsonl"
    arguments = ["--suite", "training_random", "--device", "cpu", "--quick", "--out", str(out)]
    assert run.main(arguments) == 0
    assert "from eager" in capsys.readouterr().out
    rows = {row["library"]: row for row in map(json.loads, out.read_text(encoding="utf-8").splitlines())}
    assert set(rows) == {OURS, "eager", "sdpa"}
    few = RANDOM.made_small()
    for one in rows.values():
        assert one["status"] == "ok" and one["weights"].startswith("random") and one["versions"]["transformers"]
        assert len(one["losses"]) == few.steps and len(one["means"]) == few.steps // few.window
        assert one["means"][0] == pytest.approx(sum(one["losses"][:3]) / 3, abs=1e-5)
        assert 5.5 < one["losses"][0] < 7 and one["tokens_per_s"] > 0 and one["passes"] > 0
        assert one["text_sha256"] == rows[OURS]["text_sha256"]
    mine = rows[OURS]
    assert mine["loss_apart"] < 0.02 and mine["loss_apart_sdpa"] < 0.02 and mine["loss_apart_rivals"] < 0.02
    far = max(abs(a - b) for a, b in zip(mine["means"], rows["eager"]["means"], strict=True))
    assert mine["loss_apart"] == pytest.approx(far, rel=1e-3) and "loss_apart" not in rows["eager"]
    assert report.main([str(out)]) == 0 and "transformers eager" in capsys.readouterr().out
    assert {item.word() for item in bars.judge([*rows.values()], few.suite)} == {"not measured"}


@pytest.mark.torch
def test_weights_that_are_nowhere_are_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("transformers")
    from benchmarks.training import TrainingBench, find_model

    bench, written = bench_of(TrainingBench, models=str(tmp_path))
    rows = bench.measure(TRAINING, (OURS, "eager", "sdpa"), 0, math.inf)
    assert rows == written and {one["status"] for one in rows} == {"missing"}
    assert str(tmp_path) in rows[0]["reason"] and rows[0]["loss_apart"] is None
    assert find_model(str(tmp_path)) is None
    file = tmp_path / "a.gguf"
    file.touch()
    assert find_model(str(tmp_path)) == find_model(str(file)) == file
    folder = tmp_path / "SmolLM2-135M"
    folder.mkdir()
    (folder / "config.json").touch()
    assert find_model(str(tmp_path)) == find_model(str(folder)) == folder
    monkeypatch.setenv("FLASHMOE_SMOLLM2_GGUF", "b.gguf")
    assert find_model() == Path("b.gguf")


@pytest.mark.torch
def test_a_python_without_sources_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One whose library is compiled or in an archive, say; one that has topics alone reads them several times."""
    pytest.importorskip("transformers")
    from benchmarks import training

    monkeypatch.setattr("sysconfig.get_path", lambda _: str(tmp_path))
    monkeypatch.setattr(training, "topics", lambda: {"a": "some text ", "b": "more of it"})
    assert sorted(training.documents()) == ["more of it", "some text "]
    tokenizer = training.made_tokenizer(training.documents(), 300)
    ids, passes = training.token_ids(tokenizer, training.documents(), 500)
    assert len(ids) == 500 and passes > 2
    monkeypatch.setattr(training, "topics", dict)
    with pytest.raises(ValueError, match="no text"):
        training.token_ids(tokenizer, training.documents(), 500)
    bench, _ = bench_of(training.TrainingBench)
    rows = bench.measure(RANDOM, (OURS,), 0, math.inf)
    assert rows[0]["status"] == "missing" and "no sources" in rows[0]["reason"]
    monkeypatch.setattr(training, "END", "<|none|>")
    with pytest.raises(ValueError, match="tokenizer has no"):
        training.token_ids(tokenizer, ["text"], 5)


@pytest.mark.torch
def test_a_folder_in_the_layout_of_the_hub(tmp_path: Path) -> None:
    """Weights and tokenizer are read from it, and a model of another shape is refused."""
    transformers = pytest.importorskip("transformers")
    from benchmarks import training

    texts = training.documents(0, 30)
    assert texts == training.documents(0, 30) != training.documents(1, 30) and all(texts)
    small = RANDOM.made_small()
    first = training.start(small, "cpu", "", texts, 0)
    assert isinstance(first, training.Start)
    first.model.save_pretrained(tmp_path)
    transformers.PreTrainedTokenizerFast(tokenizer_object=first.tokenizer).save_pretrained(tmp_path)
    found = training.start(small._replace(pretrained=True), "cpu", str(tmp_path), texts, 0)
    assert isinstance(found, training.Start) and found.weights == tmp_path.name
    ids, passes = training.token_ids(found.tokenizer, texts[:2], 40_000)
    assert (ids, passes) == training.token_ids(first.tokenizer, texts[:2], 40_000) and len(ids) == 40_000 and passes > 0
    assert first.tokenizer.decode(ids[:50]) in texts[0] and first.tokenizer.token_to_id(training.END) in ids
    for mine, saved in zip(first.model.parameters(), found.model.parameters(), strict=True):
        assert mine.equal(saved)
    refused = training.start(small._replace(pretrained=True, model=SMOLLM2), "cpu", str(tmp_path), texts, 0)
    assert isinstance(refused, str) and "(2, 64, 4, 2)" in refused


@pytest.mark.torch
def test_a_run_that_is_out_of_time_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("transformers")
    from benchmarks import training

    bench, _ = bench_of(training.TrainingBench)
    rows = bench.measure(RANDOM, (OURS,), 0, 0.0)
    assert rows[0]["status"] == "error" and rows[0]["reason"] == "out of time after 0 of 6 steps"
    monkeypatch.setattr(training, "train", lambda *_: iter([(pytest.importorskip("torch").full((6,), math.nan), 1.0)]))
    rows = bench.measure(RANDOM, (OURS,), 0, math.inf)
    assert rows[0]["status"] == "wrong" and rows[0]["losses"] == [] and rows[0]["loss_apart"] is None


def test_the_bars_of_fine_tuning() -> None:
    def judged(**values: Any) -> list[str]:
        found = bars.judge([row(TRAINING, OURS, weights="some weights", **values)], TRAINING.suite)
        assert [(item.bar.kind, item.bar.limit) for item in found] == [(LOSS, 0.02), (LOSS_SHARE, 2.0)]
        assert all(item.note == "some weights" for item in found if item.word() != "not measured")
        return [item.word() for item in found]

    assert judged(loss_apart=0.019, loss_apart_ratio=1.9) == ["pass", "pass"]
    assert judged(loss_apart=0.021, loss_apart_ratio=2.1) == ["FAIL", "FAIL"]
    assert judged(loss_apart=0.0, loss_apart_ratio=0.0) == ["pass", "pass"]
    assert judged(loss_apart=None, loss_apart_ratio=None) == ["not measured", "not measured"]
    assert isinstance(TRAINING, TrainingCase)
