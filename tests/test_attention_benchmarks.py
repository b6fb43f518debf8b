"""Biases, masks, padded batches and few keys in the benchmarks: cases, inputs, the check and the adapters; no GPU."""

from __future__ import annotations

import math
import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest

from benchmarks.cases import MASK_TILE, OURS, OURS_PACKED, OURS_PLAIN, SUITES, Case

NEW = ("attention_bias", "attention_mask", "attention_padding", "attention_few_keys")
CASES = [case for name in NEW for case in SUITES[name].cases]
SHAPES = {  # batch, seqlen, heads, head_dim, bias
    "padding": (8, 1024, 12, 64, (8, 1, 1, 1024)),
    "per_head": (2, 2048, 16, 64, (1, 16, 2048, 2048)),
    "per_batch": (2, 4096, 32, 128, (2, 1, 4096, 4096)),
    "pair": (64, 384, 4, 32, (64, 4, 384, 384)),
}


def case_of(suite: str, name: str) -> Case:
    return next(case for case in SUITES[suite].cases if case.name == name)


def small(case: Case, by: int = 16) -> Case:
    """The case with `by` times shorter sequences, at most three batch entries and two key heads; masks of all kinds."""
    batch, heads = min(case.batch, 3), 2 * (case.heads_q // case.heads_k)
    sq, sk = max(3, case.seqlen_q // by), max(3, case.seqlen_k // by)
    sizes = zip(case.bias_shape, (batch, heads, sq, sk), strict=False)
    return case._replace(
        batch=batch, seqlen_q=sq, seqlen_k=sk, heads_q=heads, heads_k=2, head_dim=32, head_dim_v=32,
        bias_shape=tuple(1 if size == 1 else new for size, new in sizes),
        used=tuple(max(1, n // by) for n in case.used[:batch]),
        window_size=(case.window_size[0] // by if case.window_size[0] > 0 else -1, case.window_size[1]),
    )  # fmt: skip


def named(case: Case) -> str:
    return f"{case.suite}-{case.name}"


def test_the_cases_are_those_to_show() -> None:
    bias = {case.name: case for case in SUITES["attention_bias"].cases}
    mask = {case.name: case for case in SUITES["attention_mask"].cases}
    for shape, (b, s, heads, d, bias_shape) in SHAPES.items():
        kinds = {"bf16": ("bfloat16", "same"), "fp32": ("bfloat16", "float32"), "fp16": ("float16", "same")}
        for kind, (dtype, of_bias) in kinds.items():
            case = bias.pop(f"{shape}_{kind}")
            assert (case.dtype, case.bias, case.bias_shape) == (dtype, of_bias, bias_shape)
            assert (case.batch, case.seqlen_q, case.seqlen_k, case.heads_q, case.head_dim) == (b, s, s, heads, d)
            plain = 2 * 4 * b * s * heads * d
            assert case.bytes() == plain + (4 if kind == "fp32" else 2) * math.prod(bias_shape)
        for pattern in ("lengths",) if shape == "padding" else ("tiles", "random"):
            case = mask.pop(f"{shape}_{pattern}")
            assert (case.bias, case.pattern, case.bias_shape) == ("bool", pattern.replace("random", ""), bias_shape)
            assert case.bytes() == plain + math.prod(bias_shape)
    assert not bias and not mask
    padded = SUITES["attention_padding"].cases
    assert len(padded) == 2 * 3 * 2 * 2 and {case.padding for case in padded} == {"left", "right"}
    assert {case.band() for case in padded} == {(-1, -1), (-1, 0), (511, 0)}
    assert len({case.used for case in padded}) == 2
    for case in padded:
        assert (case.batch, case.seqlen_q, case.heads_q) == (8, 4096, 2048 // case.head_dim) and len(case.used) == 8
        assert all(410 <= n <= 4096 for n in case.used)
    few = [(c.batch, c.seqlen_q, c.seqlen_k, c.heads_q, c.heads_k, c.head_dim, c.causal)
           for c in SUITES["attention_few_keys"].cases]  # fmt: skip
    assert few == [
        (2, 5121, 33, 8, 8, 128, True), (8, 448, 1500, 20, 20, 64, False), (8, 33, 5121, 32, 8, 128, False),
    ]  # fmt: skip


def test_work_of_a_padded_batch_is_that_of_its_rows() -> None:
    case = Case("x", "smoke", "", 3, 10, 10, 2, 2, 8, 8, padding="left", used=(4, 10, 1))
    assert case.flops() == 4 * 2 * 8 * (16 + 100 + 1) and case.tokens_q == case.tokens_k == 15
    assert case.bytes() == 2 * 4 * 15 * 2 * 8
    packed = case._replace(padding="", used=(), seqlens=case.used)
    assert (packed.flops(), packed.bytes()) == (case.flops(), case.bytes())
    assert [case.first_row(b) for b in range(3)] == [6, 0, 9]
    assert [case._replace(padding="right").first_row(b) for b in range(3)] == [0, 0, 0]
    assert case.shape()["used"] == (4, 10, 1) and case.shape()["tokens"] == 15


@pytest.mark.torch
@pytest.mark.parametrize("case", CASES, ids=named)
def test_every_case_runs_small(case: Case) -> None:
    from benchmarks.bench import QUICK, AttentionBench, Run
    from benchmarks.library import Setup
    from benchmarks.timing import CpuTimer

    suite = SUITES[case.suite]
    libraries = [*suite.libraries, "torch_sdpa"]
    run = Run(Setup("cpu"), CpuTimer(), QUICK._replace(rounds=1, host_calls=5), lambda _: None)
    rows = {row["library"]: row for row in AttentionBench(run).measure(small(case), libraries, 0, math.inf)}
    right = {OURS, *({OURS_PLAIN, OURS_PACKED} & set(suite.libraries))}
    right |= {"torch_sdpa"} if case.bias else set()
    for name in right:
        row = rows[name]
        assert row["status"] == "ok", row["reason"]
        assert row["same_bits"] and row["error"] <= row["error_limit"] and row["device_us"] > 0
    rest = {rows[name]["reason"] for name in suite.libraries if name not in right}
    assert rest <= {"needs a CUDA device"} and bool(rest) == (case.suite != "attention_padding")
    if case.padding:
        assert "padded batches" in rows["torch_sdpa"]["reason"] or "no window" in rows["torch_sdpa"]["reason"]


@pytest.mark.torch
def test_masks_have_their_patterns() -> None:
    from benchmarks.attention_inputs import make_inputs

    case = case_of("attention_mask", "per_head_tiles")._replace(heads_q=3, heads_k=3, bias_shape=(1, 3, 2048, 2048))
    mask = make_inputs(case._replace(batch=1), "cpu", seed=0).bias
    assert mask is not None and tuple(mask.shape) == case.bias_shape
    assert mask.diagonal(dim1=-2, dim2=-1).all()
    tiles = mask.unflatten(-1, (-1, MASK_TILE)).unflatten(-3, (-1, MASK_TILE)).transpose(-3, -2)
    share = tiles.float().mean((-1, -2)).flatten()
    hidden, seen = float((share <= 1 / MASK_TILE).float().mean()), float((share == 1).float().mean())
    assert 0.33 < hidden < 0.47 and 0.23 < seen < 0.37
    mixed = share[(share > 1 / MASK_TILE) & (share < 1)]
    assert float((mixed - 0.5).abs().max()) < 0.05
    other = make_inputs(case._replace(batch=1), "cpu", seed=1).bias
    assert other is not None and not mask.equal(other)

    case = case_of("attention_mask", "padding_lengths")._replace(heads_q=1, heads_k=1)
    mask = make_inputs(case, "cpu", seed=0).bias
    assert mask is not None and tuple(mask.shape) == (8, 1, 1, 1024)
    lengths = mask.sum(-1).flatten().tolist()
    assert all(103 <= n <= 1024 for n in lengths) and len(set(lengths)) > 4
    assert all(mask[b, 0, 0, :n].all() for b, n in enumerate(lengths))


@pytest.mark.torch
@pytest.mark.parametrize("side", ["left", "right"])
def test_the_check_of_a_padded_batch(side: str) -> None:
    import torch

    from benchmarks.attention_inputs import check, make_inputs
    from flashmoe_cupy import reference

    case = Case("x", "smoke", "", 3, 24, 24, 4, 2, 16, 16, "float32", causal=True, padding=side, used=(24, 5, 11))
    inputs = make_inputs(case, "cpu", seed=1)
    assert (inputs.leftpad is None) == (side == "right") and (inputs.seqused is None) == (side == "left")
    out = torch.zeros(3, 24, 4, 16)
    for b, n in enumerate(case.used):
        first = 24 - n if side == "left" else 0
        q, k, v = (x[b : b + 1, first : first + n].double().numpy() for x in inputs[:3])
        out[b, first : first + n] = torch.from_numpy(np.asarray(reference.flash_attention(q, k, v, causal=True)[0]))
    assert check(case, inputs, out).passed
    outside, inside = (1, 0 if side == "left" else 23, 0, 0), (1, 23 if side == "left" else 0, 0, 0)
    out[outside] = math.nan  # poison that was left alone
    assert check(case, inputs, out).passed
    for place, value in ((outside, 1.0), (inside, math.nan), (inside, 3.0)):
        wrong = out.clone()
        wrong[place] = value
        assert not check(case, inputs, wrong, heads=100).passed
    aligned = case._replace(padding="right" if side == "left" else "left")
    assert not check(aligned, inputs, out, heads=100).passed


@pytest.mark.torch
def test_the_packed_call_gets_the_rows_that_count(monkeypatch: pytest.MonkeyPatch) -> None:
    import flashmoe_cupy
    from benchmarks.attention_inputs import make_inputs
    from benchmarks.library import Setup
    from benchmarks.rivals import LIBRARIES

    calls: list[dict[str, Any]] = []
    real = flashmoe_cupy.flash_attention_varlen

    def counted(q: Any, k: Any, v: Any, **options: Any) -> Any:
        calls.append(options | {"q": q})
        return real(q, k, v, **options)

    monkeypatch.setattr(flashmoe_cupy, "flash_attention_varlen", counted)
    case = Case("x", "smoke", "", 2, 8, 8, 2, 2, 16, 16, padding="left", used=(3, 8))
    inputs = make_inputs(case, "cpu", seed=1)
    made = LIBRARIES[OURS_PACKED].prepare(case, [inputs], Setup("cpu"))
    out = made.as_torch(made.run(0))
    (call,) = calls
    assert tuple(call["q"].shape) == (11, 2, 16) and call["q"][:3].equal(inputs.q[0, 5:])
    assert call["cu_seqlens_q"].tolist() == call["cu_seqlens_k"].tolist() == [0, 3, 11]
    assert (call["max_seqlen_q"], call["max_seqlen_k"]) == (8, 8) and "seqused_q" not in call
    assert tuple(out.shape) == (2, 8, 2, 16) and not out[0, :5].any() and out[0, 5:].any()


@pytest.mark.torch
def test_a_cast_of_the_bias_is_part_of_the_call(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    from benchmarks.attention_inputs import make_inputs
    from benchmarks.library import Setup
    from benchmarks.rivals import LIBRARIES

    seen: list[Any] = []

    def attention(q: Any, *_: Any, **options: Any) -> Any:
        seen.append(options)
        return q

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", attention)
    for kind, cast in (("fp32", True), ("bf16", False), ("fp16", False)):
        case = small(case_of("attention_bias", f"per_head_{kind}"))
        inputs = make_inputs(case, "cpu", seed=1)
        made = LIBRARIES["torch_sdpa"].prepare(case, [inputs], Setup("cpu"))
        assert inputs.bias is not None and not seen  # nothing is prepared
        made.run(0)
        made.run(1)
        masks = [options["attn_mask"] for options in seen]
        assert all(mask.dtype == inputs.q.dtype and mask.shape == inputs.bias.shape for mask in masks)
        assert (masks[0].data_ptr() != masks[1].data_ptr()) == cast
        assert (masks[0].data_ptr() == inputs.bias.data_ptr()) != cast
        seen.clear()


# ---- adapters of what is not here ------------------------------------------------------------------------------------


def stand_in(monkeypatch: pytest.MonkeyPatch, name: str, **members: Any) -> None:
    """A module of that name, its parents included."""
    parts = name.split(".")
    for end in range(1, len(parts) + 1):
        module = ModuleType(".".join(parts[:end]))
        monkeypatch.setitem(sys.modules, module.__name__, module)
    module.__dict__.update(members)


@pytest.mark.torch
def test_fa4_is_called_as_it_reads(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    from benchmarks.attention_inputs import make_inputs
    from benchmarks.flash_rivals import FA4
    from benchmarks.library import Setup, why_not_imported

    why_not_imported.cache_clear()
    assert "ModuleNotFoundError" in FA4().missing(Setup("cuda"))
    assert FA4().missing(Setup("cpu")) == "needs a CUDA device"
    calls: list[tuple[str, list[tuple[int, ...]], dict[str, Any]]] = []

    def function(name: str) -> Any:
        def call(*arrays: Any, **keywords: Any) -> Any:
            assert not torch.is_grad_enabled()
            calls.append((name, [tuple(t.shape) for t in arrays], keywords))
            return arrays[0], None

        return call

    names = ("flash_attn_func", "flash_attn_varlen_func")
    stand_in(monkeypatch, "flash_attn.cute.interface", **{name: function(name) for name in names})
    why_not_imported.cache_clear()
    assert FA4().missing(Setup("cuda")) == ""
    why_not_imported.cache_clear()

    def called(case: Case) -> tuple[str, list[tuple[int, ...]], dict[str, Any]]:
        made = FA4().prepare(case, [make_inputs(case, "cpu", seed=1)], Setup("cpu"))
        with made.scope():
            made.as_torch(made.run(0))
        return calls[-1]

    plain = Case("x", "smoke", "", 2, 9, 9, 4, 2, 16, 16, causal=True)
    queries_first = [(2, 9, 4, 16), (2, 9, 2, 16), (2, 9, 2, 16)]
    assert called(plain) == ("flash_attn_func", queries_first, {"causal": True})
    assert called(plain._replace(layout="bhsd")) == ("flash_attn_func", queries_first, {"causal": True})
    assert called(plain._replace(window_size=(3, 0)))[2] == {"causal": False, "window_size": (3, 0)}
    assert called(plain._replace(window_size=(3, -1), causal=False))[2] == {"causal": False, "window_size": (3, None)}
    assert called(plain._replace(softcap=30.0))[2] == {"causal": True, "softcap": 30.0}
    assert tuple(called(plain._replace(sinks=True))[2]["learnable_sink"].shape) == (4,)
    name, shapes, keywords = called(plain._replace(seqlens=(4, 9)))
    assert name == "flash_attn_varlen_func" and shapes == [(13, 4, 16), (13, 2, 16), (13, 2, 16)]
    assert keywords["cu_seqlens_q"].tolist() == keywords["cu_seqlens_k"].tolist() == [0, 4, 13]
    assert (keywords["max_seqlen_q"], keywords["max_seqlen_k"], keywords["causal"]) == (9, 9, True)
    cuda = Setup("cuda")
    for suite in ("attention_forward", "attention_forward_features", "attention_few_keys", "models"):
        assert {case.name for case in SUITES[suite].cases if FA4().why_not(case, cuda)} <= {"alibi_d128_8k_causal"}
    assert "padded" in FA4().why_not(plain._replace(padding="left", used=(4, 9)), cuda)
    assert FA4().unsupported(AssertionError("not on this chip")) == "it refuses this case: not on this chip"
    assert FA4().unsupported(RuntimeError("a fault")) == ""


@pytest.mark.torch
@pytest.mark.parametrize("name", ["pair_bf16", "per_head_fp32", "pair_fp16"])
def test_triangle_attention_gets_its_axes(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    from benchmarks.attention_inputs import check, make_inputs
    from benchmarks.library import Setup
    from benchmarks.rivals import CuEquivariance

    def triangle_attention(q: Any, k: Any, v: Any, bias: Any) -> Any:
        batch, _, heads, rows, _ = q.shape
        assert bias.shape == (batch, 1, heads, rows, k.shape[3])  # what it asks for
        scores = q.float() @ k.float().mT * q.shape[-1] ** -0.5 + bias.float()
        return (torch.softmax(scores, -1) @ v.float()).to(q.dtype)

    stand_in(monkeypatch, "cuequivariance_torch", triangle_attention=triangle_attention)
    case = small(case_of("attention_bias", name))
    sets = [make_inputs(case, "cpu", seed) for seed in (1, 2)]
    made = CuEquivariance().prepare(case, sets, Setup("cpu"))
    for i in range(2):
        assert check(case, sets[i], made.as_torch(made.run(i))).passed
    cuda = Setup("cuda")
    found = {c.name for c in SUITES["attention_bias"].cases if not CuEquivariance().why_not(c, cuda)}
    assert found == {f"{shape}_{kind}" for shape in ("pair", "per_head") for kind in ("bf16", "fp32", "fp16")}


@pytest.mark.torch
def test_flex_attention_takes_a_bias_that_broadcasts(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch
    from torch.nn.attention import flex_attention as module

    from benchmarks.attention_inputs import make_inputs
    from benchmarks.library import Setup
    from benchmarks.rivals import LIBRARIES

    def attention(q: Any, k: Any, v: Any, score_mod: Any, **_: Any) -> Any:
        return score_mod(torch.tensor(0.0), 1, 1, 2, 1)

    monkeypatch.setattr(module, "flex_attention", attention)
    monkeypatch.setattr(torch, "compile", lambda f, **_: f)
    monkeypatch.setattr(torch, "_dynamo", SimpleNamespace(reset=lambda: None), raising=False)
    case = small(case_of("attention_bias", "padding_bf16"))
    inputs = make_inputs(case, "cpu", seed=1)
    made = LIBRARIES["flex_attention"].prepare(case, [inputs], Setup("cpu"))
    assert inputs.bias is not None and made.run(0) == inputs.bias[1, 0, 0, 1]
