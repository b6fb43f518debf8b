"""explain, kernels and warm-up of the mixture of experts: what they say and what calls then ask for are the same."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import test_cli
from test_cli import run, run_json

import flashmoe_cupy
from flashmoe_cupy import dtypes, service
from flashmoe_cupy.errors import UnsupportedProblem
from flashmoe_cupy.jit.device import H100, DeviceProperties
from flashmoe_cupy.jit.sequence import LaunchSequence
from flashmoe_cupy.ops import gpu, public
from flashmoe_cupy.plan.archs import ARCHS
from flashmoe_cupy.plan.attention.problem import attention_problem
from flashmoe_cupy.plan.checks import GATED
from flashmoe_cupy.plan.kernels import of_op, of_task
from flashmoe_cupy.plan.moe import problem as moe_problem
from flashmoe_cupy.plan.moe import routing
from flashmoe_cupy.plan.operation import operations, registered
from flashmoe_cupy.service import warm
from flashmoe_cupy.service.choices import absent_arrays

cache_dir = test_cli.cache_dir  # pytest looks for fixtures among the names of the module
EVERY = of_op("moe")
KINDS = ("bfloat16", "float16", "float32")


def problems(seed: int, count: int) -> list[Any]:
    """Random problems of all four operations: sizes from tiny to large, every feature that could pick a kernel."""
    rng = np.random.default_rng(seed)
    found: list[Any] = []

    def one(*values: Any) -> Any:
        return values[int(rng.integers(len(values)))]

    for _ in range(count):
        array, kind = absent_arrays(), dtypes.from_name(one(*KINDS))
        tokens, experts = one(1, 50, 120, 130, 4096, 100_000), one(1, 8, 60, 120, 500, 1000)
        k, d, n = min(experts, one(1, 2, 8)), one(8, 64, 2048), one(8, 40, 768)
        logits = array(one(kind, dtypes.FP32), tokens, experts)
        found.append(
            routing.route_problem(
                logits, None, top_k=k, return_stats=one(False, True), capacity_factor=one(None, 0.5)
            )
        )
        ids = array(one(dtypes.INT32, dtypes.INT64), tokens, k)
        found.append(routing.permute_problem(ids, None, num_experts=experts))
        w, rows = array(kind, experts, n, d), tokens * k
        if one(False, True):
            lists: dict[str, Any] = {"group_sizes": array(dtypes.INT32, experts)}
            x = array(kind, experts, rows, d)
        else:
            lists = {"offsets": array(dtypes.INT32, experts + 1)}
            lists["gather_indices"] = one(None, array(dtypes.INT32, rows))
            x = array(kind, one(rows, tokens) if lists["gather_indices"] else rows, d)
        if experts * rows < 2**31:
            found.append(moe_problem.grouped_gemm_problem(x, w, **lists))
        activation, limit = one(("swiglu", None), ("swiglu", 7.0), ("relu2", None), ("swigluoai", None), ("gelu", None))
        halves = 2 if activation in GATED else 1
        shared = one(0, 24)
        w1 = array(kind, experts, halves * n, d)
        more: dict[str, Any] = {}
        if shared:
            more["shared_w_gate_up"] = array(kind, halves * shared, d)
            more["shared_w_down"] = array(kind, d, shared)
        if one(False, True):  # rows that the copy engine cannot fetch
            w1 = w1._replace(strides=(w1.strides[0] + 4, *w1.strides[1:]))
        weights = array(dtypes.FP32, tokens, k)
        found.append(
            moe_problem.moe_problem(
                array(kind, tokens, d), w1, array(kind, experts, d, n), weights, ids, activation=activation,
                swiglu_limit=limit, interleaved=halves == 2 and one(False, True),
                batch_invariant=one(False, True), **more,
            )
        )  # fmt: skip
    return found


def loads(patch: pytest.MonkeyPatch, arch: str, properties: DeviceProperties = H100) -> list[tuple[str, str]]:
    """(source, title) of all kernels that calls ask for from now on, on a device that is not there."""
    asked: list[tuple[str, str]] = []

    def load_for(tu: str, name: str, target: str, device: int, smem_bytes: int, stream: int | None) -> Any:
        assert target == arch
        asked.append((tu, name))
        return SimpleNamespace(function=0)

    numbers = arch.removeprefix("sm_").rstrip("a")
    stand_in = SimpleNamespace(
        compute_capability=lambda device: (int(numbers[:-1]), int(numbers[-1])), properties=lambda device: properties,
        driver_version=lambda: 12040,
        load_for=load_for, with_maps=lambda ready, *_: ready,
    )  # fmt: skip
    patch.setattr(gpu, "driver", stand_in)
    return asked


def prepare(problem: Any, aligned: bool = True) -> None:
    """What the first call of a problem does on a device."""
    assert public.__all__
    operation = next(one for one in operations() if type(problem) is one.problem)
    gpu._load(operation, problem, 0, 0, aligned, (), tuple(operation.outputs))


def test_a_caller_that_owns_the_workspace_is_told_of_a_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    """XLA made room for a bias that starts at a multiple of 16 bytes; another would be copied behind the end of it."""
    loads(monkeypatch, "sm_90a")
    operation, array, ran = registered("flash_attention"), absent_arrays(), []
    monkeypatch.setattr(LaunchSequence, "run", lambda *given: ran.append(given))
    q = array(dtypes.BF16, 1, 64, 2, 64)
    for dtype, odd, refused in ((dtypes.BF16, 0, False), (dtypes.BF16, 2, True), (dtypes.BOOL, 1, False)):
        problem = attention_problem(q, q, q, bias=array(dtype, 64, 64))
        given = [4096 * i + odd * (name == "bias") for i, name in enumerate(operation.arguments, 1)]
        before = len(ran)
        if refused:
            with pytest.raises(UnsupportedProblem, match="bias does not start at a multiple of 16 bytes"):
                gpu.launch(operation, problem, 0, 0, given, {"out": 1 << 20}, 0)
        else:
            gpu.launch(operation, problem, 0, 0, given, {"out": 1 << 20}, 1 << 21)
        assert len(ran) - before == (not refused)


# -------------------------------------------------------------------------------------------------------------- explain


def test_explain_needs_no_gpu(capsys: pytest.CaptureFixture[str]) -> None:
    archs = [word for arch in ARCHS for word in ("--arch", arch)]
    argv = ("explain", "--op", "moe", "--tokens", "512", "--hidden", "1024", "--intermediate", "256", "--experts", "64")
    data = run_json(capsys, *argv, "--top-k", "4", "--shared", "512", *archs)
    steps = ["route", "permute", "gate and up", "down", "shared gate and up", "shared down", "sum"]
    assert [(c["arch"], c["step"]) for c in data["choices"]] == [(arch, step) for arch in ARCHS for step in steps]
    for choice in data["choices"]:
        config = next(c for c in EVERY[choice["kernel"]].configs(choice["arch"]) if c.name == choice["config"])
        assert choice["fields"]["smem_bytes"] == config.smem_bytes and choice["fields"]["blocks"] > 0
    assert data["flops"] == 2 * 3 * 1024 * (512 * 4 * 256 + 512 * 512)
    assert data["bytes"] == 2 * (3 * 1024 * (64 * 256 + 512) + 2 * 512 * 1024) + 8 * 512 * 4
    assert "shared512" in data["problem"] and "e64" in data["problem"]


def test_explain_in_words(capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["explain", "--op", "moe", "--arch", "sm_90a", "--arch", "sm_80"]
    code, out, _ = run(capsys, *argv)
    assert code == 0
    for word in (
        "sm_90a sm_80, route: moe_router",
        "sm_90a, down: grouped_gemm_sm90",
        "GFLOP",
        "256 rows for each of 128",
    ):
        assert word in out
    assert "not grouped_gemm_sm80: grouped_gemm_sm90 comes first" in out
    assert "sm_90a gate and up: grouped_gemm_sm90" in str(service.explain("moe", arch="sm_90a"))
    code, out, _ = run(capsys, *argv, "--batch-invariant", "--interleaved", "--activation", "geglu")
    assert code == 0 and "one configuration for any number of tokens" in out and "interleaved" in out
    code, out, _ = run(capsys, *argv, "--dtype", "float32")
    assert code == 0 and "not grouped_gemm_sm90: float32" in out


def test_explain_of_little(capsys: pytest.CaptureFixture[str]) -> None:
    """No token needs no kernel; one token touches eight experts."""
    assert run_json(capsys, "explain", "--op", "moe", "--tokens", "0")["choices"] == []
    data = run_json(capsys, "explain", "--op", "moe", "--tokens", "1")
    assert data["bytes"] == 2 * (8 * 3 * 768 * 2048 + 2 * 2048) + 8 * 8


def test_explain_gives_the_reasons(capsys: pytest.CaptureFixture[str]) -> None:
    argv = ("explain", "--op", "moe", "--hidden", "100", "--activation", "swish", "--arch", "sm_80")
    code, out, err = run(capsys, *argv)
    assert (code, out) == (1, "")
    for word in ("d is 100", "multiple of 8", "swish", "hint"):
        assert word in err
    code, out, _ = run(capsys, *argv, "--json")
    assert code == 1 and len(json.loads(out)["reasons"]) == 2  # none about rows: nobody knows how many swish needs
    with pytest.raises(UnsupportedProblem, match="1 to 1024"):
        service.explain("moe", experts=2000, arch="sm_80")
    with pytest.raises(TypeError, match="seqlen_q"):
        service.explain("moe", seqlen_q=5)


def test_explain_shows_a_product_that_nothing_runs(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for kernel in of_task("grouped_gemm").values():
        monkeypatch.setattr(type(kernel), "why_not", lambda self, product, arch, aligned=True: [f"{self.name} is off"])
    code, out, _ = run(capsys, "explain", "--op", "moe", "--arch", "sm_90a")
    assert code == 1 and "sm_90a, down: no kernel runs this" in out and "grouped_gemm_sm80 is off" in out
    assert "nothing runs" in str(service.explain("moe", arch="sm_90a"))


def test_explain_says_what_calls_do(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = loads(monkeypatch, "sm_90a")
    cases: tuple[tuple[int, dict[str, Any]], ...] = (
        (1, {}), (512, {"shared": 64}), (9000, {"batch_invariant": True, "dtype": "float32"}),
        (64, {"shared": 64, "swiglu_limit": 10.0}),
    )  # fmt: skip
    for tokens, more in cases:
        asked.clear()
        answer = service.explain("moe", arch="sm_90a", tokens=tokens, **more)
        array, kind = absent_arrays(), dtypes.from_name(more.get("dtype", "bfloat16"))
        shared = more.get("shared", 0)
        optional = {"shared_w_gate_up": array(kind, 2 * shared, 2048), "shared_w_down": array(kind, 2048, shared)}
        problem = moe_problem.moe_problem(
            array(kind, tokens, 2048), array(kind, 128, 2 * 768, 2048), array(kind, 128, 2048, 768),
            array(dtypes.FP32, tokens, 8), array(dtypes.INT32, tokens, 8),
            batch_invariant=more.get("batch_invariant", False), swiglu_limit=more.get("swiglu_limit"),
            **(optional if shared else {}),
        )  # fmt: skip
        prepare(routing.route_problem(array(dtypes.FP32, tokens, 128), None, top_k=8))
        prepare(problem)
        said = [
            (EVERY[c.kernel].source(next(x for x in EVERY[c.kernel].configs("sm_90a") if x.name == c.config)))
            for c in answer.choices
        ]
        assert said == [tu for tu, _ in asked]


def test_explain_takes_the_clamp(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, "explain", "--op", "moe", "--arch", "sm_90a", "--swiglu-limit", "10")
    assert code == 0 and "swiglu limit10" in out and "gather gated clamped" in out
    code, _, err = run(capsys, "explain", "--op", "moe", "--activation", "geglu", "--swiglu-limit", "7")
    assert code != 0 and "swiglu_limit is for activation='swiglu' and 'swigluoai'" in err
    code, _, err = run(capsys, "explain", "--op", "moe", "--swiglu-alpha", "1.5")
    assert code != 0 and "swiglu_alpha is for activation='swigluoai'" in err


# ----------------------------------------------------------------------------------------------------- kernels, warm-up


def test_kernels_of_moe(capsys: pytest.CaptureFixture[str]) -> None:
    data = run_json(capsys, "kernels", "--op", "moe", "--arch", "sm_90a", "--dtype", "float32")
    assert list(data) == list(EVERY)
    names = {config["name"] for kernel in data.values() for config in kernel["configs"]}
    assert "fp32" in names and "1024 experts stats" in names and not any("bf16" in name for name in names)
    assert not data["grouped_gemm_sm90"]["configs"]


@pytest.mark.parametrize("op", ["attention", "moe"])
@pytest.mark.parametrize("dtype", ["float64", "int32"])
def test_a_dtype_that_nothing_computes_with(op: str, dtype: str) -> None:
    """Neither an empty table nor a warm-up of the kernels that serve all dtypes."""
    for call in (service.kernels, service.warmup):
        with pytest.raises(ValueError, match=f"unknown dtype '{dtype}'; known: bfloat16, float16, float32"):
            call(op=op, dtype=dtype, arch="sm_80")


@pytest.mark.parametrize("arch", ARCHS)
def test_the_warm_up_set_is_complete(arch: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever calls load, source and title, is in what `warmup` makes for their dtype; and all of it is asked for."""
    fast = H100._replace(memory_rate=2 * H100.memory_rate)

    def made(dtype: str | None = None) -> set[tuple[str, str]]:
        found = service.specialisations(arch, op="moe", dtype=dtype)
        return {(k.source(c), k.title(c)) for k, c in found}

    parts = {dtypes.from_name(kind): made(dtype=kind) for kind in KINDS}
    everything, seen = made(), set()
    for i, problem in enumerate(problems(0, 240)):
        asked = []
        for device in (H100, fast):
            loaded = loads(monkeypatch, arch, device)
            prepare(problem, aligned=i % 3 > 0)
            asked += loaded
        kind = getattr(problem, "dtype", dtypes.BF16)
        assert asked and set(asked) <= parts.get(kind, everything), problem
        seen |= set(asked)
    assert everything == set.union(*parts.values())
    # a set that is too large would be no proof: nearly all of it comes up
    assert seen <= everything and len(seen) > 0.8 * len(everything)


@pytest.mark.compile
def test_warmup_compiles_once(
    capsys: pytest.CaptureFixture[str], cache_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Through the command line, of the kernels that compile in no time; calls then find them in the cache."""
    quick = ("moe_permute_count", "moe_permute_place", "moe_capacity")
    whole = service.specialisations

    def some(*args: Any, **kwargs: Any) -> list[Any]:
        return [(kernel, config) for kernel, config in whole(*args, **kwargs) if kernel.name in quick]

    monkeypatch.setattr(warm, "specialisations", some)
    argv = ("warmup", "--op", "moe", "--arch", "sm_80")
    first = run_json(capsys, *argv)["kernels"]
    assert {w["kernel"] for w in first} == set(quick)
    assert all(w["spills"] == 0 and w["source"] == "compiled" for w in first)
    assert {w["source"] for w in run_json(capsys, *argv)["kernels"]} == {"cache"}
    listed = {entry["name"] for entry in run_json(capsys, "cache", "list")}
    assert listed == {"moe_permute_count count", "moe_permute_place place", "moe_capacity capacity"}
    assert service.stats().compiled_after_warmup == 0 and len(list(cache_dir.rglob("*.cubin"))) == 3


@pytest.mark.gpu
@pytest.mark.sm80
def test_gpu_nothing_compiles_after_the_warm_up() -> None:
    import cupy

    service.warmup("moe", dtype="float16")
    before = service.stats()
    x = cupy.ones((64, 128), "float16")
    w1, w2 = cupy.ones((8, 64, 128), "float16"), cupy.ones((8, 128, 32), "float16")
    for tokens in (1, 64):
        logits = cupy.zeros((tokens, 8), "float32")
        weights, ids, _ = flashmoe_cupy.moe_route(logits, top_k=2, capacity_factor=0.5, return_stats=True)
        flashmoe_cupy.fused_moe(x[:tokens], w1, w2, weights, ids)
        order = flashmoe_cupy.moe_permute(ids, num_experts=8)
        flashmoe_cupy.grouped_gemm(x, w1, offsets=order.offsets, gather_indices=order.sorted_indices)
    assert service.stats().compiled == before.compiled and service.stats().compiled_after_warmup == 0
