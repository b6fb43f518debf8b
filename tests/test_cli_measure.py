"""demo, bench and info with mixtures of experts: the same manners as with attention."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
from test_cli import NO_GPU, run, run_json

import flashmoe_cupy
from flashmoe_cupy import service
from flashmoe_cupy.cli import measure_attention, measure_attention_backward, measure_moe
from flashmoe_cupy.testing_moe import MoECase

Capture = pytest.CaptureFixture[str]
SMALL = measure_moe.Layer(
    "small", MoECase(40, 64, 32, 8, 2, "float16", "swigluoai", interleaved=True, biases="same", shared=16)
)


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure_moe, "cases", lambda gpu: [SMALL])


def test_demo_on_numpy(capsys: Capture) -> None:
    data = run_json(capsys, "demo", "--backend", "numpy", "--op", "moe")
    assert data["passed"] and data["backend"] == "numpy" and len(data["results"]) >= 3
    for row in data["results"]:
        assert row["op"] == "moe" and 0 < row["error"] <= row["allowed"] and row["milliseconds"] > 0


@pytest.mark.usefixtures("small")
def test_demo_shows_all_operations(capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    case = measure_attention.Case("tiny", (1, 100, 130, 4, 2, 32, 16), "float32", {"causal": True})
    monkeypatch.setattr(measure_attention, "cases", lambda gpu: [case])
    monkeypatch.setattr(measure_attention_backward, "cases", lambda gpu: [case])
    code, out, _ = run(capsys, "demo", "--backend", "numpy")
    assert code == 0 and "all exact within tolerance" in out
    rows = "attention           tiny", "attention_backward  tiny", "moe                 small"
    for word in (*rows, SMALL.text(), case.text(), "softmax", "router"):
        assert word in out
    results = run_json(capsys, "demo", "--backend", "numpy")["results"]
    assert [row["op"] for row in results] == ["attention", "attention_backward", "moe"]
    code, out, _ = run(capsys, "demo", "--backend", "numpy", "--op", "attention")
    assert code == 0 and "small" not in out and "router" not in out


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("what", ["expert", "route"])
def test_demo_notices_wrong_results(capsys: Capture, monkeypatch: pytest.MonkeyPatch, what: str) -> None:
    name = {"expert": "fused_moe", "route": "moe_route"}[what]
    right = getattr(flashmoe_cupy, name)

    def wrong(*args: Any, **options: Any) -> Any:
        out = right(*args, **options)
        if what == "expert":
            out[-1] *= np.float16(1.05)  # one token of many
            return out
        return out[0], (out[1] + 1) % 8  # every token goes to the neighbour of its expert

    monkeypatch.setattr(flashmoe_cupy, name, wrong, raising=False)
    code, out, _ = run(capsys, "demo", "--backend", "numpy", "--op", "moe")
    assert code == 1 and "WRONG" in out
    argv = ("bench", "--backend", "numpy", "--op", "moe", "--longest", "1", "--hidden", "64", "--experts", "8")
    code, out, _ = run(capsys, *argv, "--json")
    assert code == 1 and json.loads(out)[0]["passed"] is False
    code, out, _ = run(capsys, *argv)
    assert code == 1 and "WRONG" in out


def test_bench(capsys: Capture) -> None:
    argv = ["bench", "--backend", "numpy", "--op", "moe", "--longest", "2e1", "--hidden", "64", "--intermediate", "32"]
    rows = run_json(capsys, *argv, "--experts", "8", "--top-k", "2", "--activation", "relu2", "--dtype", "bf16")
    assert [row["sizes"] for row in rows] == [f"t{tokens} d64 n32 e8 k2" for tokens in (1, 4, 16)]
    assert all(row["passed"] and row["dtype"] == "bfloat16" and row["case"] == "relu2" for row in rows)
    code, out, _ = run(capsys, *argv)
    assert code == 0 and "GFLOP/s" in out and "t16 d64 n32 e16 k4" in out


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["bench", "--op", "moe", "--heads", "4", "--causal"], "--op moe has no --causal, --heads"),
        (["bench", "--experts", "4"], "--op attention has no --experts"),
        (["bench", "--op", "moe", "--activation", "silu"], "swigluoai"),
        (["bench", "--d", "64", "--", "--suite", "x"], "arguments after --"),
        (["bench", "--op", "moe", "--", "--suite", "x"], "arguments after --"),
        (["bench", "--op", "moe", "--experts", "2", "--top-k", "4"], "--top-k 4 is more than the 2 experts"),
        (["bench", "--json", "--", "--suite", "x"], "arguments after --"),
    ],
)
def test_wrong_use(capsys: Capture, argv: list[str], message: str) -> None:
    code, out, err = run(capsys, *argv)
    assert code == 2 and message in err
    assert bool(out) == ("--json" in argv)


def test_a_size_that_nothing_runs_is_an_error(capsys: Capture) -> None:
    argv = ("bench", "--backend", "numpy", "--op", "moe", "--longest", "1", "--hidden", "20")
    code, out, err = run(capsys, *argv, "--json")
    assert code == 1 and "multiple of 8" in err and json.loads(out)["error"] == "UnsupportedProblem"


def test_flops_are_those_of_explain() -> None:
    for case in (SMALL.case, MoECase(7, 64, 32, 8, 2, activation="gelu")):
        answer = service.explain(
            "moe", arch="sm_80", tokens=case.tokens, hidden=case.hidden, intermediate=case.intermediate,
            experts=case.experts, top_k=case.top_k, shared=case.shared, activation=case.activation,
        )  # fmt: skip
        assert measure_moe.Layer("", case).flops == answer.flops


def test_info_tests_the_experts(capsys: Capture) -> None:
    tests = {test["name"]: test for test in run_json(capsys, "info")["self_test"]}
    assert tests["NumPy mixture of experts"]["passed"]


@pytest.mark.skipif(not NO_GPU, reason="there is a GPU")
def test_a_missing_gpu(capsys: Capture) -> None:
    for command in ("demo", "bench"):
        code, out, _ = run(capsys, command, "--op", "moe", "--backend", "cuda", "--json")
        assert code == 1 and json.loads(out)["error"] == "UnsupportedProblem"


@pytest.mark.gpu
def test_on_the_gpu(capsys: Capture) -> None:
    data = run_json(capsys, "demo", "--backend", "cuda", "--op", "moe")
    assert data["passed"] and data["backend"] == "cuda" and all(row["op"] == "moe" for row in data["results"])
    argv = ("bench", "--backend", "cuda", "--op", "moe", "--longest", "16", "--hidden", "512", "--intermediate", "256")
    assert [row["sizes"][:4] for row in run_json(capsys, *argv)] == ["t1 d", "t4 d", "t16 "]
