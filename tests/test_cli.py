"""The command line and the service functions behind it, on machines with and without a GPU."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import flashmoe_cupy
from flashmoe_cupy import _env, service
from flashmoe_cupy.cli import commands, main, measure_attention, show
from flashmoe_cupy.errors import UnsupportedProblem
from flashmoe_cupy.plan.archs import ARCHS
from flashmoe_cupy.plan.kernels import KERNELS, of_op, of_task

ATTENTION = of_op("attention")
NO_GPU = service.backend()[0] == "numpy"


@pytest.fixture
def cache_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty cache folder of the test's own; kernels in memory are forgotten too."""
    monkeypatch.setenv("FLASHMOE_CACHE_DIR", str(tmp_path))
    _env.reload()
    service.clear_cache()
    yield tmp_path
    service.clear_cache()
    monkeypatch.undo()
    _env.reload()


def run(capsys: pytest.CaptureFixture[str], *argv: str) -> tuple[int, str, str]:
    """(exit code, standard output, standard error) of one command in this process."""
    capsys.readouterr()
    try:
        code = main(argv)
    except SystemExit as end:
        code = int(end.code or 0)
    seen = capsys.readouterr()
    return code, seen.out, seen.err


def run_json(capsys: pytest.CaptureFixture[str], *argv: str) -> Any:
    code, out, err = run(capsys, *argv, "--json")
    assert code == 0, err
    return json.loads(out)


# ---------------------------------------------------------------------------------------------------------------- usage


def test_no_command_prints_help(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys)
    assert code == 2
    for name in commands.COMMANDS:
        assert f"\n    {name}" in out


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["no-such-command"], "invalid choice"),
        (["explain", "--d", "x"], "--d"),
        (["explain", "--q", "-1"], "negative"),
        (["explain", "--window", "a,b"], "LEFT,RIGHT"),
        (["explain", "--arch", "sm_70"], "sm_80"),
        (["explain", "--dtype", "int7"], "bfloat16"),
        (["explain", "--op", "moe", "--q", "8", "--causal"], "--op moe has no --causal, --q"),
        (["explain", "--top-k", "8", "--interleaved"], "--op attention has no --interleaved, --top-k"),
        (["explain", "--tokens", "8"], "--op attention has no --tokens"),
        (["warmup", "--op", "moe", "--arch", "sm_80", "--head-dim", "64"], "--op moe has no --head-dim and no"),
        (["kernels", "--op", "moe", "--head-dim", "64"], "--op moe has no --head-dim"),
        (["kernels", "--arch", "sm_70"], "sm_80"),
        (["warmup", "--arch", "sm_70"], "sm_80"),
        (["warmup", "--all", "--dtype", "float16"], "--all"),
        (["warmup", "--workers", "0"], "at least 1"),
        (["warmup", "--arch", "sm_80", "--head-dim-v", "64"], "--head-dim-v needs --head-dim"),
        (["cache", "prune", "--max-size", "many"], "200M"),
        (["cache", "eat"], "invalid choice"),
    ],
)
def test_wrong_use_is_exit_code_2(capsys: pytest.CaptureFixture[str], argv: list[str], message: str) -> None:
    code, out, err = run(capsys, *argv)
    assert (code, out) == (2, "")
    assert message in err and "Traceback" not in err
    code, out, err = run(capsys, *argv, "--json")
    document = json.loads(out)
    assert code == 2 and document["error"] == "usage" and message in document["message"]
    assert message in err


def test_a_bad_variable_is_named(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_env, "_env", None)
    monkeypatch.setenv("FLASHMOE_JIT", "perhaps")
    code, _, err = run(capsys, "kernels")
    assert code == 2 and "FLASHMOE_JIT" in err


def test_runs_as_a_module() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "flashmoe_cupy", "--version"], capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stdout.strip() == f"flashmoe-cupy {flashmoe_cupy.__version__}"


# --------------------------------------------------------------------------------------------------------------- output


def test_plain_output_has_no_decoration(capsys: pytest.CaptureFixture[str]) -> None:
    show.Output().table(("name", "ms"), [("a", 1.5), ("long name", 12.0)], title="T")
    assert capsys.readouterr().out == "T\nname        ms\na          1.5\nlong name   12\n"


def test_terminal_output_is_rich(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    monkeypatch.setenv("TERM", "xterm")
    show.Output().table(("name", "ms"), [("[bold]", 1.5)])
    out = capsys.readouterr().out
    assert "─" in out or "━" in out, "rich draws rules"
    assert "[bold]" in out, "values are text, not markup"


@pytest.mark.parametrize(("text", "count"), [("4096", 4096), ("200M", 200_000_000), ("1.5 GB", 1_500_000_000)])
def test_sizes(text: str, count: int) -> None:
    assert show.parse_size(text) == count


@pytest.mark.parametrize("text", ["", "M", "-1", "nan", "inf", "1e30"])
def test_wrong_sizes(text: str) -> None:
    with pytest.raises(ValueError):
        show.parse_size(text)


# -------------------------------------------------------------------------------------------------------------- explain


def test_explain_needs_no_gpu(capsys: pytest.CaptureFixture[str]) -> None:
    archs = [word for arch in ARCHS for word in ("--arch", arch)]
    data = run_json(capsys, "explain", "--q", "4096", "--heads", "32", "--kv-heads", "8", "--causal", *archs)
    assert [choice["arch"] for choice in data["choices"]] == list(ARCHS)
    for choice in data["choices"]:
        config = next(c for c in ATTENTION[choice["kernel"]].configs(choice["arch"]) if c.name == choice["config"])
        assert config.smem_bytes > 0 and set(choice["fields"]) > set(config._asdict())
    assert data["flops"] == 2 * 32 * (4096 * 4097 // 2) * 256
    assert data["bytes"] == 2 * 256 * 4096 * (32 + 8)
    assert "causal" in data["problem"] and "32/8" in data["problem"]


def test_explain_in_words(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, "explain", "--d", "64", "--arch", "sm_90a")
    assert code == 0
    for word in ("sm_90a", "GFLOP", service.backend()[1], *of_task("attention_fwd")):
        assert word in out
    code, out, _ = run(capsys, "explain", "--d", "64", "--arch", "sm_90a", "--bias", "bool")
    assert code == 0 and out.index("mask: attention_mask_words") < out.index("fwd: attention_fwd_sm90")
    text = str(service.explain(head_dim=64, arch="sm_90a"))
    assert "sm_90a" in text and "GFLOP" in text


def test_explain_says_why_not_the_other_kernel() -> None:
    def rejected(arch: str, **options: Any) -> tuple[str, str, str]:
        (choice,) = service.explain(arch=arch, **options).choices
        ((name, reason),) = choice.rejected
        return choice.kernel, name, reason

    special, general = of_task("attention_fwd")
    assert rejected("sm_90a") == (special, general, f"{special} comes first")
    for arch, options, word in (("sm_90a", {"dtype": "float32"}, "float32"), ("sm_80", {}, "sm_90a")):
        kernel, name, reason = rejected(arch, **options)
        assert (kernel, name) == (general, special) and word in reason


def test_explain_gives_the_reasons(capsys: pytest.CaptureFixture[str]) -> None:
    argv = ("explain", "--d", "20", "--heads", "6", "--kv-heads", "4", "--softcap", "-1", "--arch", "sm_80")
    code, out, err = run(capsys, *argv)
    assert (code, out) == (1, "")
    for word in ("head_dim", "20", "multiple", "softcap", "hint"):
        assert word in err
    code, out, _ = run(capsys, *argv, "--json")
    assert code == 1 and len(json.loads(out)["reasons"]) >= 3


def test_explain_takes_every_feature(capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["explain", "--arch", "sm_80", "--window", "128,0", "--softcap", "30", "--alibi", "--sinks", "--dv", "64"]
    assert "softcap" in run_json(capsys, *argv, "--bias", "float32")["problem"]
    assert "varlen" in run_json(capsys, *argv, "--varlen", "--batch", "3")["problem"]
    code, _, err = run(capsys, *argv, "--varlen", "--bias")
    assert code == 1 and "bias" in err


def test_explain_counts_the_bias(capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["explain", "--arch", "sm_90a", "--batch", "2", "--q", "256", "--k", "512", "--heads", "4", "--d", "64"]
    plain = run_json(capsys, *argv)["bytes"]
    for dtype, size in (("bool", 1), ("same", 2), ("float32", 4)):
        assert run_json(capsys, *argv, "--bias", dtype)["bytes"] - plain == 2 * 4 * 256 * 512 * size
    code, _, err = run(capsys, *argv, "--bias", "int4")
    assert code == 2 and "known: same, bool, bfloat16" in err


def test_explain_follows_the_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLASHMOE_ARCH", "sm_89")
    _env.reload()
    try:
        assert [choice.arch for choice in service.explain().choices] == ["sm_89"]
    finally:
        monkeypatch.undo()
        _env.reload()


@pytest.mark.parametrize("window", [(-1, -1), (-1, 0), (0, 0), (3, 0), (2, 5), (0, -1), (100, 100)])
@pytest.mark.parametrize("lengths", [(7, 7), (1, 9), (9, 4), (0, 5), (5, 0), (6, 20)])
def test_visible_pairs(lengths: tuple[int, int], window: tuple[int, int]) -> None:
    seqlen_q, seqlen_k = lengths
    i = np.arange(seqlen_q)[:, None] + seqlen_k - seqlen_q
    j = np.arange(seqlen_k)[None, :]
    seen = np.ones((seqlen_q, seqlen_k), bool)
    if window[0] >= 0:
        seen &= j >= i - window[0]
    if window[1] >= 0:
        seen &= j <= i + window[1]
    assert service.visible_pairs(seqlen_q, seqlen_k, *window) == seen.sum()


# ----------------------------------------------------------------------------------------------------- kernels, warm-up


def test_kernels_lists_all(capsys: pytest.CaptureFixture[str]) -> None:
    data = run_json(capsys, "kernels")
    assert sorted(data) == sorted(KERNELS)
    for name, kernel in KERNELS.items():
        listed = {(c["name"], arch) for c in data[name]["configs"] for arch in c["archs"]}
        assert listed == {(c.name, arch) for arch in ARCHS for c in kernel.configs(arch)}
    code, out, _ = run(capsys, "kernels", "--arch", "sm_80")
    assert code == 0 and all(name in out for name in KERNELS)
    assert list(run_json(capsys, "kernels", "--op", "attention")) == list(ATTENTION)
    assert list(run_json(capsys, "kernels", "--head-dim", "64")) == [*ATTENTION, *of_op("attention_backward")]


@pytest.mark.parametrize("arch", ARCHS)
def test_the_warm_up_set_is_complete(arch: str) -> None:
    """Whatever problem is chosen for, its configuration is in what `warmup` makes for its dtype and dims."""
    rng = np.random.default_rng(0)
    everything = {(k.name, c.name) for k, c in service.specialisations(arch)}
    for _ in range(150):
        dtype = str(rng.choice(["bfloat16", "float16", "float32"]))
        dim, dim_v = 8 * int(rng.integers(1, 33)), 8 * int(rng.integers(1, 65))
        answer = service.explain(
            arch=arch,
            batch=int(rng.integers(1, 4)),
            seqlen_q=int(rng.choice([1, 63, 4096, 100_000])),
            seqlen_k=int(rng.choice([1, 63, 4096, 100_000])),
            head_dim=dim,
            head_dim_v=dim_v,
            dtype=dtype,
            causal=bool(rng.integers(2)),
            window_size=(int(rng.integers(-1, 2)), int(rng.integers(-1, 2))),
            softcap=float(rng.choice([0.0, 20.0])),
            alibi=bool(rng.integers(2)),
            sinks=bool(rng.integers(2)),
            bias=str(rng.choice(["same", "float32", "bool"])) if rng.integers(2) else None,
        )
        *before, choice = answer.choices
        assert all((one.kernel, one.config) in everything for one in before)
        assert choice.config, f"nothing runs {answer.problem}"
        chosen = (choice.kernel, choice.config)
        part = {(k.name, c.name) for k, c in service.specialisations(arch, dtype=dtype, head_dim=dim, head_dim_v=dim_v)}
        assert chosen in part, answer.problem
        assert part <= everything


@pytest.mark.compile
def test_warmup_compiles_once(capsys: pytest.CaptureFixture[str], cache_dir: Path) -> None:
    argv = ("warmup", "--arch", "sm_80", "--dtype", "float16", "--head-dim", "64")
    wanted = {(k.name, c.name) for k, c in service.specialisations("sm_80", dtype="float16", head_dim=64)}
    first = run_json(capsys, *argv)["kernels"]
    assert {(w["kernel"], w["config"]) for w in first} == wanted and len(first) == len(wanted)
    assert {w["source"] for w in first} == {"compiled"}
    assert all(w["spills"] == 0 and 0 < w["registers"] <= 255 for w in first)
    assert service.stats().compiled_after_warmup == 0
    assert len(list(cache_dir.rglob("*.cubin"))) == len(wanted)
    again = run_json(capsys, *argv)["kernels"]
    assert {w["source"] for w in again} == {"cache"}
    code, out, _ = run(capsys, *argv)
    assert code == 0 and f"{len(wanted)} configurations ready, 0 compiled now" in out

    code, out, _ = run(capsys, "cache")
    assert code == 0 and f"{len(wanted)} configurations" in out and str(cache_dir) in out
    head = next(line for line in out.splitlines() if "registers" in line)
    assert head.startswith("config "), "a kernel has several"
    assert len(run_json(capsys, "cache", "list")) == len(wanted)
    assert run_json(capsys, "cache", "prune", "--max-size", "1G")["removed"] == 0
    assert run_json(capsys, "cache", "clear")["removed"] == len(wanted)
    assert run_json(capsys, "cache", "list") == []


def test_warmup_of_nothing(capsys: pytest.CaptureFixture[str], cache_dir: Path) -> None:
    code, _, err = run(capsys, "warmup", "--arch", "sm_80", "--head-dim", "1000")
    assert code == 1 and "head_dim is 1000" in err
    assert not list(cache_dir.rglob("*.cubin"))


@pytest.mark.skipif(not NO_GPU, reason="there is a GPU")
def test_warmup_without_a_device_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    code, _, err = run(capsys, "warmup")
    assert code == 1 and "no device" in err and "sm_90a" in err


def test_cache_path(capsys: pytest.CaptureFixture[str], cache_dir: Path) -> None:
    code, out, _ = run(capsys, "cache", "path")
    assert (code, out.strip()) == (0, str(cache_dir))


@pytest.mark.gpu
def test_warmup_loads_on_the_device(capsys: pytest.CaptureFixture[str], cache_dir: Path) -> None:
    data = run_json(capsys, "warmup", "--dtype", "bfloat16", "--head-dim", "128")
    assert all(w["devices"] for w in data["kernels"])
    import cupy

    q = cupy.ones((1, 128, 2, 128), dtype="bfloat16")
    before = service.stats()
    flashmoe_cupy.flash_attention(q, q, q, causal=True)
    assert service.stats().compiled == before.compiled and service.stats().compiled_after_warmup == 0


# ---------------------------------------------------------------------------------------------------- demo, info, bench


def test_demo_on_numpy(capsys: pytest.CaptureFixture[str]) -> None:
    data = run_json(capsys, "demo", "--backend", "numpy")
    assert data["passed"] and data["backend"] == "numpy" and data["seconds"] < 60
    assert len(data["results"]) >= 3
    for row in data["results"]:
        assert 0 < row["error"] <= row["allowed"] and row["milliseconds"] > 0


def test_demo_in_words(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    small = measure_attention.Case("small", (1, 100, 130, 4, 2, 32, 16), "float32", {"causal": True}, sinks=True)
    monkeypatch.setattr(measure_attention, "cases", lambda gpu: [small])
    code, out, _ = run(capsys, "demo", "--backend", "numpy")
    assert code == 0
    for word in ("NumPy back end", "float64", "GFLOP/s", small.text(), "exact within tolerance"):
        assert word in out


def test_demo_notices_wrong_results(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    right = flashmoe_cupy.flash_attention

    def wrong(q: Any, k: Any, v: Any, **options: Any) -> Any:
        made = right(q, k, v, **options)
        out = made[0] if options.get("return_lse") else made
        out[:, -1] *= 1.05  # one query of many
        return made

    monkeypatch.setattr(flashmoe_cupy, "flash_attention", wrong, raising=False)
    small = measure_attention.Case("small", (1, 100, 100, 2, 2, 32, 32), "float32", {"causal": True})
    monkeypatch.setattr(measure_attention, "cases", lambda gpu: [small])
    code, out, _ = run(capsys, "demo", "--backend", "numpy")
    assert code == 1 and "WRONG" in out


@pytest.mark.skipif(not NO_GPU, reason="there is a GPU")
def test_demo_of_a_missing_gpu(capsys: pytest.CaptureFixture[str]) -> None:
    code, _, err = run(capsys, "demo", "--backend", "cuda")
    assert code == 1 and "NumPy back end" in err


@pytest.mark.gpu
def test_demo_on_the_gpu(capsys: pytest.CaptureFixture[str]) -> None:
    data = run_json(capsys, "demo", "--backend", "cuda")
    assert data["passed"] and data["backend"] == "cuda"
    assert {"flops_per_second", "by"} == set(data["ceiling"])


def test_info(capsys: pytest.CaptureFixture[str]) -> None:
    data = run_json(capsys, "info")
    assert data["flashmoe_cupy"]["version"] == flashmoe_cupy.__version__
    assert data["packages"]["numpy"] == np.__version__
    assert set(_env.VARIABLES) <= set(data["environment"])
    assert data["self_test"] and all(test["passed"] for test in data["self_test"])
    assert data["cache"]["path"] == str(_env.get().cache_dir)
    assert bool(data["devices"]) or data["driver"]["error"]
    assert list(data["kernels"]) == list(KERNELS)
    code, out, _ = run(capsys, "info", "--no-test")
    assert code == 0 and "Self-test" not in out
    for word in ("driver", "CuPy", "NVRTC", "torch", "jax", "Cache", *ATTENTION):
        assert word in out


def test_info_shows_a_failing_part(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any, **__: Any) -> Any:
        raise RuntimeError("no BLAS today")

    monkeypatch.setattr(flashmoe_cupy, "flash_attention", broken, raising=False)
    code, out, _ = run(capsys, "info")
    assert code == 1 and "FAILED" in out and "no BLAS today" in out


def test_bench(capsys: pytest.CaptureFixture[str]) -> None:
    argv = ("bench", "--backend", "numpy", "--d", "32", "--heads", "2", "--longest", "256", "--causal")
    rows = run_json(capsys, *argv)
    assert [row["sizes"] for row in rows] == ["b4 q256 k256 h2 d32"]
    code, out, _ = run(capsys, *argv)
    assert code == 0 and "GFLOP/s" in out


@pytest.mark.parametrize(
    ("op", "sizes"),
    [
        ("attention", {"sinks": "no", "alibi": 2, "varlen": "no"}), ("attention", {"batch": 1.5, "seqlen_q": "5"}),
        ("attention", {"heads_q": 2.0, "heads_k": -1}), ("attention", {"head_dim": True, "seqlen_k": -1}),
        ("moe", {"tokens": 2.5, "hidden": -8}), ("moe", {"shared": "no", "experts": "x", "top_k": 2.0}),
    ],
)  # fmt: skip
def test_explain_takes_no_values_of_a_wrong_kind(op: str, sizes: dict[str, Any]) -> None:
    with pytest.raises(UnsupportedProblem) as caught:
        service.explain(op, arch="sm_80", **sizes)
    assert sorted(reason.split()[0] for reason in caught.value.reasons) == sorted(sizes)
    with pytest.raises(ValueError, match="unknown arch '90x'"):
        service.explain(op, arch="90x")
    with pytest.raises(UnsupportedProblem, match=r"larger than 2\*\*31 - 1|2\*\*31 - 1 assignments"):
        service.explain(op, **{"seqlen_q" if op == "attention" else "tokens": 2**40}, arch="sm_80")
    assert service.explain(arch="sm_80", batch=np.int64(2), sinks=np.True_).problem.split()[2] == "b2"


def test_service_errors() -> None:
    with pytest.raises(ValueError, match="unknown op"):
        service.explain("convolution")
    with pytest.raises(ValueError, match="unknown arch"):
        service.warmup(arch="sm_1")
    with pytest.raises(UnsupportedProblem, match="heads"):
        service.explain(heads_q=5, heads_k=2, arch="sm_80")
