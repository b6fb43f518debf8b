"""The backward of attention with a bias in the benchmarks: cases, the check, the adapters and the bars; no GPU."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, ClassVar

import numpy as np
import pytest
from calls_kit import options_of_calls

from benchmarks import bars, report
from benchmarks.backward_cases import BACKWARD_SUITES, BackwardCase
from benchmarks.bars import BARS, TIME
from benchmarks.cases import OURS, OURS_DETERMINISTIC, SUITES
from flashmoe_cupy import reference
from flashmoe_cupy.arrays.views import View, row_major
from flashmoe_cupy.dtypes import BF16, FP32, DType
from flashmoe_cupy.plan.attention.backward import backward_steps
from flashmoe_cupy.plan.attention.gradient import backward_problem

SUITE = BACKWARD_SUITES["attention_backward_bias"]
SHAPES = {  # batch, seqlen, heads, head_dim, bias
    "padding": (8, 1024, 12, 64, (8, 1, 1, 1024)),
    "per_head": (2, 2048, 16, 64, (1, 16, 2048, 2048)),
    "per_batch": (2, 4096, 32, 128, (2, 1, 4096, 4096)),
    "pair": (64, 384, 4, 32, (64, 4, 384, 384)),
}
TINY = BackwardCase("x", SUITE.name, "", 2, 9, 9, 4, 2, 16, 16, "float32", bias="same", layout="bhsd")
KINDS: dict[str, BackwardCase] = {
    "whole": TINY,
    "padding": TINY._replace(bias_shape=(2, 1, 1, 9)),
    "per_head": TINY._replace(bias_shape=(1, 4, 9, 9), layout="bshd"),
    "per_batch": TINY._replace(bias_shape=(2, 1, 9, 9), causal=True),
    "one": TINY._replace(bias_shape=(1, 1, 9, 9)),
    "of_queries": TINY._replace(bias_shape=(1, 4, 9, 1), sinks=True),
    "of_heads": TINY._replace(bias_shape=(1, 4, 1, 1), sinks=True),  # without sinks this gradient is 0
    "wide": TINY._replace(bias_shape=(1, 1, 1, 21), seqlen_k=21, head_dim_v=24),
    "bf16": TINY._replace(bias_shape=(1, 4, 9, 9), dtype="bfloat16"),
    "bf16_fp32": TINY._replace(bias_shape=(2, 1, 1, 9), dtype="bfloat16", bias="float32"),
}
CAST = "its bias was cast to bfloat16 before the clock started"


def small(case: BackwardCase, by: int = 64) -> BackwardCase:
    """The case with `by` times shorter sequences, at most three batch entries, two heads of 32; a bias of all kinds."""
    batch, seqlen = min(case.batch, 3), case.seqlen_q // by
    sizes = zip(case.bias_shape, (batch, 2, seqlen, seqlen), strict=True)
    return case._replace(
        batch=batch, seqlen_q=seqlen, seqlen_k=seqlen, heads_q=2, heads_k=2, head_dim=32, head_dim_v=32,
        bias_shape=tuple(1 if size == 1 else new for size, new in sizes),
    )  # fmt: skip


def inputs_of(case: BackwardCase, seed: int = 1) -> Any:
    from benchmarks.attention_inputs import make_inputs
    from benchmarks.backward_inputs import with_dout

    return with_dout(case, make_inputs(case, "cpu", seed), seed)


def true_gradients(case: BackwardCase, inputs: Any) -> list[Any]:
    """dq, dk, dv, with sinks dsinks, and dbias of the float64 reference."""
    import torch

    dout, q, k, v, bias = (t.double().numpy() for t in (inputs.dout, *inputs[:3], inputs.bias))
    options: dict[str, Any] = {"causal": case.causal, "layout": case.layout, "bias": bias}
    if case.sinks:
        options["sinks"] = inputs.sinks.double().numpy()
    out, lse = reference.flash_attention(q, k, v, return_lse=True, **options)
    made = reference.flash_attention_backward(dout, q, k, v, out, lse, **options)
    return [torch.from_numpy(np.asarray(x).copy()) for x in made if x is not None]


def case_of(name: str) -> BackwardCase:
    return next(case for case in SUITE.cases if case.name == name)


# ---- the cases -------------------------------------------------------------------------------------------------------


def test_the_cases_are_those_to_show() -> None:
    cases = {case.name: case for case in SUITE.cases}
    forward = {case.name: case for case in SUITES["attention_bias"].cases}
    for shape, (b, s, heads, d, bias_shape) in SHAPES.items():
        for kind, of_bias, size in (("bf16", "same", 2), ("fp32", "float32", 4)):
            case = cases.pop(f"{shape}_{kind}")
            one = forward[case.name]
            assert tuple(case) == tuple(one._replace(suite=SUITE.name, source=case.source))
            assert (case.batch, case.seqlen_q, case.seqlen_k, case.heads_q, case.heads_k) == (b, s, s, heads, heads)
            assert (case.head_dim, case.head_dim_v, case.bias, case.bias_shape) == (d, d, of_bias, bias_shape)
            assert (case.dtype, case.layout, case.band()) == ("bfloat16", "bhsd", (-1, -1))
            assert case.flops() == 2.5 * one.flops() == 10 * b * heads * s * s * d
            # Eight arrays like q, the log-sum-exp, the bias and its gradient.
            assert case.bytes() == b * heads * s * (8 * 2 * d + 4) + 2 * size * math.prod(bias_shape)
    assert not cases
    assert SUITE.libraries == (OURS, "torch_efficient", "cudnn_frontend") and SUITE.rivals == SUITE.libraries[1:]


@pytest.mark.parametrize("case", SUITE.cases, ids=lambda case: case.name)
def test_a_deterministic_call_has_the_same_launches(case: BackwardCase) -> None:
    """So the suite has no row of its own for it. A kernel that adds dq up beside a bias would change that."""
    assert OURS_DETERMINISTIC not in SUITE.libraries

    def array(dtype: DType, *shape: int) -> View:
        return View(4096, shape, row_major(shape), dtype, 0, "torch", False, None)

    rows = array(BF16, case.batch, case.heads_q, case.seqlen_q, case.head_dim)
    bias = array(FP32 if case.bias == "float32" else BF16, *case.bias_shape)
    arrays = (*[rows] * 5, array(FP32, *rows.shape[:3]))
    options: dict[str, Any] = {"bias": bias, "layout": "bhsd", "need": "q k v bias"}
    made = [backward_steps(backward_problem(*arrays, **options, deterministic=each))[0] for each in (False, True)]
    plain, ordered = ([(step.task, step.problem.part, *step.arguments) for step in steps] for steps in made)
    assert plain == ordered and sum("dbias" in step for step in plain) == 1


# ---- the check of an answer ------------------------------------------------------------------------------------------


@pytest.mark.torch
@pytest.mark.parametrize("kind", KINDS)
def test_check_takes_the_reference_and_no_other(kind: str) -> None:
    from benchmarks.backward_inputs import check, joined, parts, shapes

    case = KINDS[kind]
    inputs = inputs_of(case)
    flat = joined(case, true_gradients(case, inputs))
    assert shapes(case)[-1] == case.whole_bias() == tuple(inputs.bias.shape)
    for few in (2, 100):
        good = check(case, inputs, flat, heads=few, rows=few)
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
    unwritten[-1] = math.nan
    assert not check(case, inputs, unwritten, heads=2, rows=2).finite
    assert not check(case, inputs._replace(bias=-inputs.bias), flat).passed


@pytest.mark.torch
@pytest.mark.parametrize("kind", ["padding", "per_head", "per_batch", "one"])
def test_a_gradient_of_one_share_is_wrong(kind: str) -> None:
    """Of a bias that is spread over heads, sequences or queries, the gradient is a sum; one term of it will not do."""
    from benchmarks.backward_inputs import check, joined

    case = KINDS[kind]
    inputs = inputs_of(case)
    gradients = true_gradients(case, inputs)
    whole = true_gradients(case, inputs._replace(bias=inputs.bias.expand(2, 4, 9, 9)))[3]
    spread = [axis for axis, size in enumerate(case.bias_shape) if size == 1]
    assert gradients[3].allclose(whole.sum(spread, keepdim=True))
    for axis in spread:
        share = whole.narrow(axis, 0, 1).sum(spread, keepdim=True)
        assert not check(case, inputs, joined(case, [*gradients[:3], share])).passed


@pytest.mark.torch
@pytest.mark.parametrize("kind", ["whole", "padding", "of_queries", "of_heads"])
def test_blocks_of_queries_give_the_whole(kind: str) -> None:
    import torch

    from benchmarks.backward_inputs import truth_of

    case = KINDS[kind]
    inputs = inputs_of(case)
    rows, columns = torch.tensor([0, 4, 8]), torch.tensor([1, 8])
    whole, apart = (truth_of(case, inputs, 1, 2, rows, columns, block).dbias for block in (1 << 20, 20))
    assert whole is not None and apart is not None
    assert torch.allclose(whole.truth, apart.truth, rtol=1e-12, atol=1e-14)
    assert torch.allclose(whole.size, apart.size, rtol=1e-12) and bool((whole.size > 0).all())
    expected = {"whole": (3, 9), "padding": (2, 1), "of_queries": (3, 1), "of_heads": (1, 1)}
    assert tuple(whole.truth.shape) == expected[kind]


# ---- the adapters ----------------------------------------------------------------------------------------------------


@pytest.mark.torch
@pytest.mark.parametrize("case", SUITE.cases, ids=lambda case: case.name)
def test_every_case_runs_small(case: BackwardCase) -> None:
    from benchmarks.backward_bench import BackwardBench
    from benchmarks.bench import QUICK, Run
    from benchmarks.library import Setup
    from benchmarks.timing import CpuTimer

    run = Run(Setup("cpu"), CpuTimer(), QUICK._replace(rounds=1, host_calls=5), lambda _: None)
    libraries = [*SUITE.libraries, OURS_DETERMINISTIC, "torch_sdpa"]
    tiny = small(case)
    rows = {row["library"]: row for row in BackwardBench(run).measure(tiny, libraries, 0, math.inf)}
    for name in (OURS, OURS_DETERMINISTIC, "torch_sdpa"):
        row = rows[name]
        assert row["status"] == "ok", row["reason"]
        assert row["same_bits"] and row["error"] <= row["error_limit"] and row["device_us"] > 0
        assert (row["flops"], row["bytes"]) == (tiny.flops(), tiny.bytes())
        assert row.get("note") == (CAST if name == "torch_sdpa" and case.name.endswith("_fp32") else None)
    for name in SUITE.rivals:
        assert (rows[name]["status"], rows[name]["reason"]) == ("missing", "needs a CUDA device")


@pytest.mark.torch
def test_ours_is_asked_for_the_gradient_of_the_bias(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    import flashmoe_cupy
    from benchmarks import backward_rivals
    from benchmarks.backward_inputs import check, poison
    from benchmarks.library import Setup

    seen = options_of_calls(monkeypatch, flashmoe_cupy, "flash_attention_backward")
    for kind in ("bf16_fp32", "of_queries"):
        case, seen[:] = KINDS[kind], []
        inputs = inputs_of(case)
        made = backward_rivals.BACKWARD_LIBRARIES[OURS].prepare(case, [inputs], Setup("cpu"))
        assert check(case, inputs, made.as_torch(made.run(0))).passed and made.into is not None
        for places, found in ((set(), True), ({-1}, False)):
            monkeypatch.setattr(backward_rivals, "_left_behind", lambda _, places=places: places)
            flat = poison(case, "cpu")
            assert made.into(0, flat) == found and check(case, inputs, flat).passed
        sinks = ("sinks",) if case.sinks else ()
        assert all(options["need"] == ("q", "k", "v", *sinks, "bias") for options in seen)
        assert all(options["bias"].equal(inputs.bias) and options["layout"] == "bhsd" for options in seen)
    assert not made.note
    monkeypatch.undo()
    assert backward_rivals._left_behind(None) == set() and len(backward_rivals._left_behind(torch.ones(3))) == 2


@pytest.mark.torch
@pytest.mark.parametrize("name", ["padding_fp32", "per_head_bf16", "per_batch_fp32", "pair_bf16"])
def test_sdpa_gives_the_gradient_of_the_bias_as_it_is(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    from benchmarks.backward_inputs import check
    from benchmarks.backward_rivals import SdpaBackward
    from benchmarks.library import Setup

    masks: list[Any] = []
    real = torch.nn.functional.scaled_dot_product_attention

    def attention(*arrays: Any, attn_mask: Any, **options: Any) -> Any:
        masks.append(attn_mask)
        return real(*arrays, attn_mask=attn_mask, **options)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", attention)
    case = small(case_of(name))
    sets = [inputs_of(case, seed) for seed in (1, 2)]
    made = SdpaBackward("torch_efficient", "MATH").prepare(case, sets, Setup("cpu"))
    whole = (case.batch, case.heads_q, case.seqlen_q, case.seqlen_k)
    for i, mask in enumerate(masks):
        assert tuple(mask.shape) == whole and mask.dtype == torch.bfloat16 and mask.requires_grad
        assert mask.stride() == sets[i].bias.expand(whole).stride()  # a view
    with made.scope():
        for i in (0, 1, 2):
            gradients = made.run(i)
            assert tuple(gradients[3].shape) == case.bias_shape and gradients[3].dtype == torch.bfloat16
            assert check(case, sets[i % 2], made.as_torch(gradients)).passed
    assert len(masks) == 2  # the forward is not part of a call
    assert not sets[0].bias.requires_grad and sets[0].bias.grad is None
    cast = name.endswith("_fp32")
    assert made.note == (CAST if cast else "") and (made.check is not None) == cast
    if made.check:
        answer = made.as_torch(made.run(0))
        assert made.check(answer).passed and made.check(answer) != check(case, sets[0], answer)


@pytest.mark.torch
def test_torch_says_which_back_ends_lack_it() -> None:
    from benchmarks.backward_rivals import BACKWARD_LIBRARIES
    from benchmarks.library import Setup

    cuda = Setup("cuda")
    for case in SUITE.cases:
        reasons = {name: BACKWARD_LIBRARIES[name].why_not(case, cuda) for name in BACKWARD_LIBRARIES}
        assert not reasons["torch_efficient"] and not reasons["cudnn_frontend"] and not reasons[OURS]
        assert "gradient of a bias" in reasons["torch_cudnn"]
        assert all("dense bias" in reasons[name] for name in ("torch_flash", "fa3", "fa4"))
    refused = RuntimeError("No available kernel. Aborting execution.")
    assert "refuses this case" in BACKWARD_LIBRARIES["torch_efficient"].unsupported(refused)


class FakeGraph:
    """What cuDNN's front end has of a graph: tensors have dims, strides and a type, and one node computes."""

    made: ClassVar[list[FakeGraph]] = []
    refuses = ""

    def __init__(self, **options: Any) -> None:
        assert options["handle"] == "handle" and options["compute_data_type"] == "FLOAT"
        self.options, self.node, self.outputs = options, {}, ()  # type: dict[str, Any], dict[str, Any], tuple[Any, ...]
        self.built = False
        FakeGraph.made.append(self)

    def tensor(self, **fields: Any) -> FakeTensor:
        return FakeTensor(fields)

    def sdpa(self, **node: Any) -> Any:
        assert node["generate_stats"] is True
        self.node, self.outputs = node, (FakeTensor({}), FakeTensor({}))
        return self.outputs

    def sdpa_backward(self, **node: Any) -> Any:
        self.node, self.outputs = node, (FakeTensor({}), FakeTensor({}), FakeTensor({}))
        return self.outputs

    def build(self, modes: Any) -> None:
        if FakeGraph.refuses and "dBias" in self.node:
            raise LookupError(FakeGraph.refuses)
        assert modes == ["A", "FALLBACK"] and all(x.fields["output"] for x in self.outputs)
        self.built = True

    def get_workspace_size(self) -> int:
        return 0

    def execute(self, pack: dict[Any, Any], workspace: Any, handle: Any) -> None:
        import torch

        assert self.built and handle == "handle" and workspace.numel() == 1
        for tensor, x in pack.items():
            fields = (list(x.shape), list(x.stride()), {"bfloat16": "BFLOAT16", "float32": "FLOAT"}[str(x.dtype)[6:]])
            assert (tensor.fields["dim"], tensor.fields["stride"], tensor.fields["data_type"]) == fields
        names = ("q", "k", "v", "bias")
        q, k, v, bias = leaves = [pack[self.node[name]].float().requires_grad_() for name in names]
        scores = q @ k.mT * self.node["attn_scale"] + bias
        out = torch.softmax(scores, -1) @ v
        if "dBias" not in self.node:
            assert self.node.keys() == {*names, "name", "generate_stats", "attn_scale"}
            results = (out, torch.logsumexp(scores, -1, keepdim=True))
            places = self.outputs
        else:
            assert self.node.keys() == {*names, "name", "attn_scale", "o", "stats", "dO", "dBias"}
            assert pack[self.node["o"]].float().allclose(out, atol=0.05) and pack[self.node["stats"]].isfinite().all()
            results = torch.autograd.grad(out, leaves, pack[self.node["dO"]].float())
            places = (*self.outputs, self.node["dBias"])
        for tensor, x in zip(places, results, strict=True):
            pack[tensor].copy_(x.detach())


class FakeTensor:
    def __init__(self, fields: dict[str, Any]) -> None:
        self.fields = {"output": False} | fields

    def __getattr__(self, name: str) -> Any:
        def put(value: Any) -> FakeTensor:
            self.fields[name.removeprefix("set_")] = value
            return self

        return put


@pytest.fixture
def fake_cudnn(monkeypatch: pytest.MonkeyPatch) -> None:
    kinds = {name: name for name in ("BFLOAT16", "HALF", "FLOAT")}
    module = ModuleType("cudnn")
    module.__dict__.update(
        pygraph=FakeGraph, data_type=SimpleNamespace(**kinds), heur_mode=SimpleNamespace(A="A", FALLBACK="FALLBACK"),
        create_handle=lambda: "handle", cudnnGraphNotSupportedError=LookupError,
    )  # fmt: skip
    monkeypatch.setitem(sys.modules, "cudnn", module)
    monkeypatch.setattr(FakeGraph, "made", [])


@pytest.mark.torch
@pytest.mark.usefixtures("fake_cudnn")
@pytest.mark.parametrize(
    ("name", "layout"),
    [("padding_bf16", "bhsd"), ("per_head_fp32", "bshd"), ("per_batch_bf16", "bhsd"), ("pair_fp32", "bhsd")],
)
def test_cudnn_gets_a_graph_of_the_backward(name: str, layout: str) -> None:
    from benchmarks.backward_inputs import check, poison
    from benchmarks.backward_rivals import BACKWARD_LIBRARIES
    from benchmarks.library import Setup

    case = small(case_of(name))._replace(layout=layout)
    sets = [inputs_of(case, seed) for seed in (1, 2)]
    made = BACKWARD_LIBRARIES["cudnn_frontend"].prepare(case, sets, Setup("cpu"))
    assert made.into is not None and len(FakeGraph.made) == 2
    for i in (0, 1, 2):
        flat = poison(case, "cpu")
        made.into(i, flat)
        for answer in (flat, made.as_torch(made.run(i))):
            assert check(case, sets[i % 2], answer).passed
    assert made.note == (CAST if name.endswith("_fp32") else "")


@pytest.mark.torch
@pytest.mark.usefixtures("fake_cudnn")
def test_cudnn_may_refuse(monkeypatch: pytest.MonkeyPatch) -> None:
    from benchmarks.backward_rivals import BACKWARD_LIBRARIES
    from benchmarks.library import Setup, why_not_imported

    library, case = BACKWARD_LIBRARIES["cudnn_frontend"], small(case_of("padding_bf16"))
    monkeypatch.setattr(FakeGraph, "refuses", "no plan for\nthis bias")
    with pytest.raises(Exception, match="no plan") as caught:
        library.prepare(case, [inputs_of(case)], Setup("cpu"))
    assert library.unsupported(caught.value) == "cuDNN refuses this case: no plan for this bias"
    assert library.unsupported(RuntimeError("CUDA error: an illegal address")) == ""
    monkeypatch.setitem(sys.modules, "cudnn", None)
    why_not_imported.cache_clear()
    assert "ModuleNotFoundError" in library.missing(Setup("cuda"))
    why_not_imported.cache_clear()
    lacking = (
        case._replace(bias="", bias_shape=()), case._replace(causal=True), case._replace(softcap=1.0),
        case._replace(dtype="float32"), case._replace(seqlens=(3, 4)),
    )  # fmt: skip
    assert all(library.why_not(one, Setup("cuda")) for one in lacking)


# ---- the bars --------------------------------------------------------------------------------------------------------


def made_up(case: BackwardCase, library: str, us: float | None, **fields: Any) -> dict[str, Any]:
    row: dict[str, Any] = {
        "suite": case.suite, "case": case.name, "library": library, "status": "ok" if us else "missing",
        "reason": "" if us else "not here", "run": "2026-01-01T00:00:00Z-1", "device": "Device A", "versions": {},
        "commit": "0123456789abcdef", "shape": case.shape(), "error": 1e-3,
    }  # fmt: skip
    return row | ({"device_us": us, "host_us": us / 10} if us else {}) | fields


def rows_of(**times: float | None) -> list[dict[str, Any]]:
    """Ours takes 100 µs, the others what `times` says."""
    every = {OURS: 100.0} | times
    cast = {"note": CAST}
    return [
        made_up(case, name, us, **(cast if name != OURS and case.bias == "float32" else {}))
        for case in SUITE.cases
        for name, us in every.items()
    ]


def shown(tmp_path: Path, capsys: pytest.CaptureFixture[str], rows: list[dict[str, Any]]) -> str:
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    assert report.main([str(path), "--ratio", SUITE.name, "--markdown"]) == 0
    return capsys.readouterr().out


def test_the_bars_are_the_ones_to_show() -> None:
    mine = [bar for bar in BARS if bar.suite == SUITE.name]
    assert [(bar.case, bar.kind, bar.limit, bar.rivals, bar.cases, bar.ours) for bar in mine] == [
        (f"{shape}_bf16", TIME, 0.6, ("torch_efficient",), (), OURS) for shape in SHAPES
    ]


def test_a_bias_is_held_to_the_efficient_back_end(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = rows_of(torch_efficient=170.0, cudnn_frontend=150.0)
    text = shown(tmp_path, capsys, rows)
    assert "bars: 4 of 4 hold" in text and "| time over that of torch efficient | ≤ 0.6 | 0.588 | pass |" in text
    assert text.count("| cuDNN's own front end |") == 8  # the ratios are against the best
    fp32 = ", ".join(case.name for case in SUITE.cases if case.bias == "float32")
    for label in ("torch efficient", "cuDNN's own front end"):
        assert f"note: {label} in {fp32}: {CAST}" in text
    assert text.rstrip().splitlines()[-1] == "geomean 1.500 min 1.500 rows 8"
    for row in rows:
        if (row["library"], row["case"]) == ("torch_efficient", "pair_bf16"):
            row["device_us"] = 160.0
    assert [item.word() for item in bars.judge(rows, SUITE.name)] == ["pass", "pass", "pass", "FAIL"]
    text = shown(tmp_path, capsys, rows_of(torch_efficient=170.0, cudnn_frontend=None))
    assert "not compared: cuDNN's own front end: missing: not here" in text and "bars: 4 of 4 hold" in text
    found = bars.judge(rows_of(torch_efficient=None, cudnn_frontend=150.0), SUITE.name)
    assert {item.word() for item in found} == {"not measured"}


@pytest.mark.torch
def test_a_run_writes_rows_that_a_report_reads(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from benchmarks import run
    from benchmarks.moe_cases import ALL_SUITES

    suite = SUITE._replace(cases=(small(case_of("per_head_fp32")),))
    monkeypatch.setitem(ALL_SUITES, suite.name, suite)
    out = tmp_path / "a.jsonl"
    arguments = ["--suite", suite.name, "--device", "cpu", "--quick", "--rounds", "1", "--out", str(out)]
    assert run.main([*arguments, "--libraries", OURS, "torch_sdpa", "torch_efficient", "cudnn_frontend"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.endswith(CAST) for line in lines if " torch_sdpa " in line] == [True]
    rows = {row["library"]: row for row in map(json.loads, out.read_text(encoding="utf-8").splitlines())}
    assert {name: (row["status"], row.get("note")) for name, row in rows.items()} == {
        OURS: ("ok", None), "torch_sdpa": ("ok", CAST), "torch_efficient": ("missing", None),
        "cudnn_frontend": ("missing", None),
    }  # fmt: skip
    assert report.main([str(out)]) == 0 and "torch efficient" in capsys.readouterr().out
