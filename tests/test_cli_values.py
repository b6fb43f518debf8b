"""What the command line takes, prints and answers: numbers, names, blocks, JSON for every outcome."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest
from test_cli import run, run_json

from flashmoe_cupy import _env, service
from flashmoe_cupy.cli import commands, options
from flashmoe_cupy.errors import DependencyError
from flashmoe_cupy.plan.archs import ARCHS
from flashmoe_cupy.plan.checks import ACTIVATIONS
from flashmoe_cupy.plan.kernels import of_task

Capture = pytest.CaptureFixture[str]


# -------------------------------------------------------------------------------------------------------------- numbers


@pytest.mark.parametrize(
    ("argv", "printed"),
    [
        (["--window", "-1,0"], "window(-1,0)"),
        (["--window", "-1,5"], "window(-1,5)"),
        (["--window=-1,5"], "window(-1,5)"),
        (["--window", "1e3,-1"], "window(1000,-1)"),
        (["--window", "1024"], "window(1024,-1)"),
        (["--q", "1e6"], "q1000000"),
        (["--q", "4_096", "--k", "8.192e3"], "q4096 k8192"),
        (["--heads", "1e1"], "h10"),
        (["--scale", "-1e-3"], "attention"),
    ],
)
def test_numbers(capsys: Capture, argv: list[str], printed: str) -> None:
    problem = run_json(capsys, "explain", "--arch", "sm_80", *argv)["problem"]
    assert printed in problem


def test_negative_values_reach_the_check(capsys: Capture) -> None:
    """They are values, not options: the problem itself says what is wrong with them."""
    code, _, err = run(capsys, "explain", "--arch", "sm_80", "--window", "-7,0", "--softcap", "-1e1", "--scale", "-inf")
    assert code == 1 and all(word in err for word in ("window_size", "softcap", "softmax_scale"))
    code, _, err = run(capsys, "explain", "--causal", "-1,0")
    assert code == 2 and "--causal" in err


@pytest.mark.parametrize("text", ["x", "", "1.5", "nan", "inf", "1e30", "1e999999999", "9" * 5000])
def test_no_whole_number(capsys: Capture, text: str) -> None:
    code, out, err = run(capsys, "explain", "--q", text)
    assert (code, out) == (2, "") and "whole number" in err


def test_what_follows_two_dashes_is_left_alone() -> None:
    words = ["bench", "--d", "-1", "--", "--x", "-1,0"]
    assert options.joined(words) == ["bench", "--d=-1", "--", "--x", "-1,0"]


def test_huge_lengths_cost_nothing() -> None:
    n = 2**31 - 1
    assert service.visible_pairs(n, n, -1, 0) == n * (n + 1) // 2
    assert service.visible_pairs(n, n) == n * n
    assert service.visible_pairs(n, n, 0, 0) == n
    assert service.explain(seqlen_q=n, heads_q=1, arch="sm_80").flops == 2 * n * n * 256


# ---------------------------------------------------------------------------------------------------------------- names


def test_printed_dtypes_are_taken(capsys: Capture) -> None:
    forward = of_task("attention_fwd").values()
    printed = {str(getattr(c, "element", "")) for a in ARCHS for k in forward for c in k.configs(a)}
    assert printed == set(service.DTYPES)
    for short, name in service.DTYPES.items():
        answers = [run_json(capsys, "explain", "--arch", "sm_80", "--dtype", each) for each in (short, name)]
        assert answers[0] == answers[1] and short in answers[0]["problem"]
        listed = [run_json(capsys, "kernels", "--arch", "sm_80", "--dtype", each) for each in (short, name)]
        assert listed[0] == listed[1]
        argv = ("explain", "--arch", "sm_80", "--dtype", name, "--bias")
        assert all(f"bias-{name}" in run_json(capsys, *argv, each)["problem"] for each in (short, name, "same"))
    assert service.explain("moe", dtype="fp16", arch="sm_80") == service.explain("moe", dtype="float16", arch="sm_80")
    for command in ("explain", "kernels", "warmup", "bench"):
        code, _, err = run(capsys, command, "--dtype", "half")
        assert code == 2 and all(word in err for word in (*service.DTYPES, *service.DTYPES.values())), command


def test_printed_archs_are_taken(capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    """info prints 9.0 (sm_90a), kernels are called attention_fwd_sm90 and sm80."""
    for arch in ARCHS:
        numbers = arch.removeprefix("sm_").removesuffix("a")
        for written in (arch, arch.upper(), f"sm_{numbers}", f"sm{numbers}", f"{numbers[:-1]}.{numbers[-1]}"):
            (choice,) = service.explain(arch=written).choices
            assert choice.arch == arch
    assert [c.arch for c in service.explain(arch=["sm_90", "9.0", "sm_80", "sm_90a"]).choices] == ["sm_90a", "sm_80"]
    monkeypatch.setenv("FLASHMOE_ARCH", "sm_90")
    _env.reload()
    try:
        assert [c.arch for c in service.explain().choices] == ["sm_90a"]
    finally:
        monkeypatch.undo()
        _env.reload()
    code, _, err = run(capsys, "kernels", "--arch", "sm_999")
    assert code == 2 and "sm_999" in err and all(arch in err for arch in ARCHS)


@pytest.mark.parametrize("word", [*ACTIVATIONS])
def test_printed_activations_are_taken(capsys: Capture, word: str) -> None:
    assert word in run_json(capsys, "explain", "--op", "moe", "--arch", "sm_80", "--activation", word)["problem"]


@pytest.mark.parametrize("word", ["silu", "SwiGLU", ""])
def test_an_unknown_activation_has_one_reason(capsys: Capture, word: str) -> None:
    code, out, _ = run(capsys, "explain", "--op", "moe", "--arch", "sm_80", "--json", "--activation", word)
    (reason,) = json.loads(out)["reasons"]
    assert code == 1 and f"activation is {word!r}" in reason and all(known in reason for known in ACTIVATIONS)


def test_help_names_all_that_is_taken(capsys: Capture) -> None:
    wanted = {
        "explain": (*service.OPS, *ARCHS, *service.DTYPES, *service.DTYPES.values(), *ACTIVATIONS, "same", "bool"),
        "kernels": (*service.OPS, *ARCHS, *service.DTYPES, *service.DTYPES.values()),
        "warmup": (*service.OPS, *ARCHS, *service.DTYPES, *service.DTYPES.values()),
        "bench": ("auto", "numpy", "cuda", *service.OPS, *service.DTYPES, *service.DTYPES.values(), *ACTIVATIONS),
        "demo": ("auto", "numpy", "cuda", *service.OPS),
        "cache": ("list", "path", "clear", "prune"),
        "info": (),
    }
    assert set(wanted) == set(commands.COMMANDS)
    for command, words in wanted.items():
        code, out, _ = run(capsys, command, "--help")
        assert code == 0 and "--json" in out
        known = set(re.findall(r"[\w.]+", out))
        assert set(words) <= known, (command, set(words) - known)


# --------------------------------------------------------------------------------------------------------------- blocks


def test_explain_has_one_block_for_each_answer(capsys: Capture) -> None:
    archs = [word for arch in ARCHS for word in ("--arch", arch)]
    for argv, most in (([], 28), (["--op", "moe"], 36), (["--op", "moe", "--shared", "512"], 55)):
        code, out, _ = run(capsys, "explain", *argv, *archs)
        assert code == 0 and out.count("\n") <= most, out
        _, *blocks = out.split("\n\n")
        titles, bodies = zip(*(block.partition(": ")[::2] for block in blocks), strict=True)
        steps = [title.partition(", ")[2] for title in titles]
        assert len({*zip(steps, bodies, strict=True)}) == len(blocks), "an answer is shown twice"
        heads = [title.split(",")[0].split() for title in titles]
        named = [(arch, step) for head, step in zip(heads, steps, strict=True) for arch in head]
        assert sorted(named) == sorted({*named}) and {arch for arch, _ in named} == set(ARCHS)
        assert len(named) == len(ARCHS) * len({*steps})
        assert steps == sorted(steps, key=steps.index), "the steps are in their order"
        assert "each of 1 experts" not in out
    text = str(service.explain(arch=ARCHS))
    assert text.count("attention_fwd_sm90 comes first") == 1 and "sm_80 sm_86 sm_89: attention_fwd_sm80" in text


def test_kernels_without_a_configuration_say_so(capsys: Capture) -> None:
    code, out, _ = run(capsys, "kernels", "--arch", "sm_80", "--op", "attention", "--dtype", "float16")
    assert code == 0
    special, general = out.split("\n\n")[:2]
    assert special.startswith("attention_fwd_sm90") and special.endswith("no configuration for sm_80, float16")
    assert "fp16 d64" in general and "no configuration" not in general


# ----------------------------------------------------------------------------------------------------------------- JSON


def test_json_for_every_error(capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any, **__: Any) -> Any:
        raise DependencyError("no CuPy today; repair: buy one")

    for name in commands.COMMANDS:
        code, out, err = run(capsys, name, "--json", "--no-such-option")
        document = json.loads(out)
        assert (code, document["error"]) == (2, "usage") and "--no-such-option" in document["message"]
        assert "--no-such-option" in err
    monkeypatch.setitem(commands.COMMANDS, "kernels", broken)
    code, out, err = run(capsys, "kernels", "--json")
    assert code == 1 and json.loads(out) == {"error": "DependencyError", "message": "no CuPy today; repair: buy one"}
    assert "no CuPy today" in err
    for argv in (["--json"], ["--json", "no-such-command"], ["cache", "eat", "--js"]):
        code, out, _ = run(capsys, *argv)
        assert code == 2 and json.loads(out)["error"] == "usage"
    code, out, _ = run(capsys, "bench", "--", "--json", "--nothing")
    assert not out, "what follows -- is for another program"


def test_json_for_a_bad_variable(capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_env, "_env", None)
    monkeypatch.setenv("FLASHMOE_JIT", "perhaps")
    code, out, _ = run(capsys, "kernels", "--json")
    assert code == 2 and "FLASHMOE_JIT" in json.loads(out)["message"]


def test_json_of_an_unsupported_problem(capsys: Capture) -> None:
    code, out, err = run(capsys, "explain", "--d", "20", "--arch", "sm_80", "--json")
    document = json.loads(out)
    assert code == 1 and set(document) == {"error", "message", "asked", "reasons", "hint"}
    assert document["error"] == "UnsupportedProblem" and "head_dim is 20" in document["reasons"][0]
    assert document["message"] in err
