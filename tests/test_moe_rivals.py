"""Adapters of the mixture of experts on the CPU: their maths, their layouts, and how foreign functions are called."""

from __future__ import annotations

import math
import sys
import zipfile
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from calls_kit import options_of_calls
from moe_kit import SMOKE, TINY, case_of, dense, named

import flashmoe_cupy
from benchmarks.cases import OURS
from benchmarks.moe_cases import TORCH_LIBRARIES, MoECase


@pytest.mark.torch
@pytest.mark.parametrize("name", [OURS, *TORCH_LIBRARIES])
@pytest.mark.parametrize("case", SMOKE, ids=named)
def test_adapters_compute_the_dense_formula(case: MoECase, name: str) -> None:
    from benchmarks.library import Setup
    from benchmarks.moe_bench import MOE_LIBRARIES
    from benchmarks.moe_inputs import check, make_inputs

    library, setup = MOE_LIBRARIES[name], Setup("cpu")
    assert library.missing(setup) == ""
    sets = [make_inputs(case, "cpu", seed) for seed in (1, 2)]
    if case.graph and name == "torch_loop":
        assert "read by the host" in library.why_not(case, setup)
        case = case._replace(graph=False)
    assert library.why_not(case, setup) == ""
    made = library.prepare(case, sets, setup)
    for i in (0, 1, 2):
        assert check(case, sets[i % 2], made.as_torch(made.run(i))).passed
    if made.into is not None:
        out = sets[0].x * math.nan
        made.into(0, out)
        assert check(case, sets[0], out).passed


@pytest.mark.torch
@pytest.mark.parametrize("arrays", ["torch", "numpy"])
def test_our_adapter_times_the_router_only_where_asked(monkeypatch: pytest.MonkeyPatch, arrays: str) -> None:
    from benchmarks.library import Setup
    from benchmarks.moe_inputs import check, make_inputs
    from benchmarks.moe_rivals import OursMoE

    calls = options_of_calls(monkeypatch, flashmoe_cupy, "moe_route")
    case = case_of("moe_smoke", "sigmoid_groups")._replace(arrays=arrays)
    inputs = make_inputs(case, "cpu", seed=1)
    for routing in (False, True):
        made = OursMoE().prepare(case._replace(routing=routing), [inputs], Setup("cpu"))
        assert check(case, inputs, made.as_torch(made.run(0))).passed
        assert len(calls) == routing
    assert calls[0]["top_k"] == 4 and calls[0]["topk_group"] == 2 and calls[0]["routed_scaling_factor"] == 2.5


def stand_in(monkeypatch: pytest.MonkeyPatch, name: str, **members: Any) -> None:
    """A module of that name, its parents included."""
    parts = name.split(".")
    for end in range(1, len(parts)):
        monkeypatch.setitem(sys.modules, ".".join(parts[:end]), ModuleType(".".join(parts[:end])))
    module = ModuleType(name)
    module.__dict__.update(members)
    monkeypatch.setitem(sys.modules, name, module)


@pytest.mark.torch
@pytest.mark.parametrize("interleaved", [False, True])
def test_liger_is_called_as_it_reads(monkeypatch: pytest.MonkeyPatch, interleaved: bool) -> None:
    import torch

    from benchmarks.library import Setup
    from benchmarks.moe_inputs import check, make_inputs
    from benchmarks.moe_rivals import Liger

    class Function:
        @staticmethod
        def apply(x: Any, gate_up: Any, down: Any, ids: Any, weights: Any) -> Any:
            assert ids.dtype == torch.int32 and weights.dtype == torch.float32 and not torch.is_grad_enabled()
            one = inputs._replace(x=x, w_gate_up=gate_up, w_down=down, topk_ids=ids, topk_weights=weights)
            return dense(case._replace(interleaved=False), one)

    case = TINY._replace(interleaved=interleaved)
    inputs = make_inputs(case, "cpu", seed=1)
    assert "ModuleNotFoundError" in Liger().missing(Setup("cuda"))
    stand_in(monkeypatch, "liger_kernel.ops.fused_moe", LigerFusedMoEFunction=Function)
    assert Liger().missing(Setup("cuda")) == "" and Liger().missing(Setup("cpu")) == "needs a CUDA device"
    made = Liger().prepare(case, [inputs], Setup("cpu"))
    with made.scope():
        assert check(case, inputs, made.run(0)).passed
    assert "has no expert biases" in Liger().why_not(case._replace(biases=True), Setup("cuda"))
    assert "cannot be captured" in Liger().why_not(case._replace(graph=True), Setup("cuda"))
    assert "swigluoai" in Liger().why_not(case._replace(activation="swigluoai"), Setup("cuda"))


@pytest.mark.torch
@pytest.mark.parametrize("interleaved", [False, True])
def test_sonicmoe_is_called_as_it_reads(monkeypatch: pytest.MonkeyPatch, interleaved: bool) -> None:
    import torch

    from benchmarks.library import Setup
    from benchmarks.moe_inputs import activate, check, make_inputs
    from benchmarks.moe_rivals import SonicMoE

    def metadata(ids: Any, experts: int, counts: Any, offsets: Any, gather: Any, scatter: Any, back: Any) -> None:
        order = ids.flatten().sort(stable=True).indices
        counts.copy_(torch.bincount(ids.flatten().long(), minlength=experts))
        offsets.copy_(torch.tensor([0, *counts.cumsum(0)]))
        gather.copy_(order // ids.shape[1])
        scatter.copy_(order)
        back[order] = torch.arange(len(order), dtype=torch.int32)

    def products(rows: Any, weights: Any, offsets: Any) -> Any:
        """rows of expert e times weights[:, :, e].T"""
        ends = offsets.tolist()
        return torch.cat([rows[a:b] @ weights[..., e].T for e, (a, b) in enumerate(pairwise(ends))])

    def up(
        x: Any, w1: Any, b1: Any, offsets: Any, total: int, k: int, gather: Any, scatter: Any, back: Any, each: Any,
        varying: bool, activation: str, inference: bool, concat: bool,
    ) -> Any:  # fmt: skip
        assert b1 is None and each is None and (varying, inference, concat) == (False, False, False)
        assert (total, k, activation) == (case.tokens * case.top_k, case.top_k, "the gated one")
        h = products(x[gather], w1, offsets)
        return activate(case, h, interleaved=True), h

    def down(
        a: Any, h: Any, w2: Any, b2: Any, scores: Any, offsets: Any, tokens: int, k: int, gather: Any, scatter: Any,
        back: Any, each: Any, varying: bool, activation: str,
    ) -> Any:  # fmt: skip
        assert b2 is None and h.shape[1] == 2 * a.shape[1] and (tokens, k) == (case.tokens, case.top_k)
        y = products(a, w2, offsets)[back].view(tokens, k, -1)
        return (y * scores[..., None]).sum(1).to(a.dtype)

    case = TINY._replace(hidden=512, intermediate=64, interleaved=interleaved)
    inputs = make_inputs(case, "cpu", seed=1)
    apply = {"_UpProjection": SimpleNamespace(apply=up), "_DownProjection": SimpleNamespace(apply=down)}
    stand_in(monkeypatch, "sonicmoe.functional", TC_topk_router_metadata_triton=metadata, **apply)
    stand_in(monkeypatch, "sonicmoe.enums", ActivationType=SimpleNamespace(SWIGLU="the gated one"))
    made = SonicMoE().prepare(case, [inputs], Setup("cpu"))
    with made.scope():
        assert check(case, inputs, made.run(0)).passed
    assert SonicMoE().why_not(case, Setup("cuda")) == ""
    assert "hidden sizes" in SonicMoE().why_not(case._replace(hidden=520), Setup("cuda"))
    assert "intermediate sizes" in SonicMoE().why_not(case._replace(intermediate=72), Setup("cuda"))


# ---- vLLM's Triton kernel --------------------------------------------------------------------------------------------

FOREIGN = '''"""A file of a package that is not here."""
import not_a_module_of_this_machine
from nowhere import everything


@triton.jit
def write_zeros_to_output(c_ptr):
    return 0


def between():
    raise RuntimeError


@triton.jit
def fused_moe_kernel(
    a_ptr,
    BLOCK: tl.constexpr,
):
    return write_zeros_to_output, tl.word
'''


def test_two_functions_are_taken_out_of_the_file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from benchmarks import moe_triton
    from benchmarks.library import Setup

    stand_in(monkeypatch, "triton.language", word="read", constexpr=int)
    triton = sys.modules["triton"]
    monkeypatch.setattr(triton, "jit", lambda function: function, raising=False)
    monkeypatch.setattr(triton, "language", sys.modules["triton.language"], raising=False)
    monkeypatch.setattr(triton, "__spec__", object())
    inner = tmp_path / moe_triton.INSIDE
    inner.parent.mkdir(parents=True)
    inner.write_text(FOREIGN, encoding="utf-8")
    wheel = tmp_path / "vllm.whl"
    with zipfile.ZipFile(wheel, "w") as file:
        file.write(inner, moe_triton.INSIDE)
    for path in (wheel, inner, tmp_path, inner.parent):
        kernel = moe_triton.load(str(path))
        zeros, word = kernel(None, 16)
        assert zeros(None) == 0 and word == "read" and kernel.__name__ == "fused_moe_kernel"
    library = moe_triton.VllmTriton()
    monkeypatch.delenv(moe_triton.VARIABLE, raising=False)
    assert moe_triton.VARIABLE in library.missing(Setup("cuda"))
    monkeypatch.setenv(moe_triton.VARIABLE, str(wheel))
    assert library.missing(Setup("cuda")) == "" and library.missing(Setup("cpu")) == "needs a CUDA device"
    other = tmp_path / "other.py"
    other.write_text("def write_zeros_to_output(): ...\n", encoding="utf-8")
    monkeypatch.setenv(moe_triton.VARIABLE, str(other))
    assert "has no function fused_moe_kernel" in library.missing(Setup("cuda"))


@pytest.mark.torch
@pytest.mark.parametrize(("experts", "block"), [(6, 4), (6, 16), (88, 4), (89, 4)])
def test_blocks_hold_every_assignment_once(experts: int, block: int) -> None:
    import torch

    from benchmarks.moe_triton import align

    ids = torch.randint(0, experts, (11, 2), generator=torch.Generator().manual_seed(1), dtype=torch.int32)
    blocks = align(ids, experts, block)
    assert blocks.padded.tolist() == [blocks.length] and blocks.length == block * len(blocks.experts)
    assert (blocks.rows is None) == (experts >= 88)  # few assignments beside the experts: a block each
    if blocks.rows is None:
        assert blocks.experts.tolist() == ids.flatten().tolist()
        return
    rows = blocks.rows.view(-1, block)
    real = rows < 22
    assert sorted(rows[real].tolist()) == list(range(22)) and set(rows[~real].tolist()) <= {22}
    owner = blocks.experts[:, None].expand_as(rows)[real]
    assert owner.tolist() == ids.flatten()[rows[real].long()].tolist()
    assert blocks.experts.tolist() == sorted(blocks.experts.tolist()) and bool(real[:, 0].all())


def kernel_in_torch(calls: list[dict[str, Any]]) -> Any:
    """What vLLM's kernel computes from its arguments, block by block."""
    import torch

    def launch(grid: tuple[int, ...], **g: Any) -> None:
        calls.append(g)
        m, a, b, c = g["BLOCK_SIZE_M"], g["a_ptr"], g["b_ptr"], g["c_ptr"]
        assert grid == (-(-g["EM"] // m) * -(-g["N"] // g["BLOCK_SIZE_N"]),)
        assert (g["N"], g["K"]) == (b.shape[1], b.shape[2]) == (c.shape[1], a.shape[1])
        assert (g["stride_be"], g["stride_bn"], g["stride_bk"]) == b.stride()
        assert (g["stride_am"], g["stride_ak"], g["stride_cm"], g["stride_cn"]) == (*a.stride(), *c.stride())
        for block in range(g["num_tokens_post_padded_ptr"].item() // m):
            if g["naive_block_assignment"]:
                rows = torch.tensor([block])
            else:
                rows = g["sorted_token_ids_ptr"][block * m : block * m + m].long()
                rows = rows[rows < g["num_valid_tokens"]]
            expert = int(g["expert_ids_ptr"][block])
            made = a[rows // g["top_k"]].float() @ b[expert].float().T
            if g["HAS_BIAS"]:
                made += g["b_bias_ptr"][expert].float()
            if g["MUL_ROUTED_WEIGHT"]:
                made *= g["topk_weights_ptr"][rows, None]
            c[rows] = made.to(c.dtype)

    class Kernel:
        def __getitem__(self, grid: tuple[int, ...]) -> Any:
            return lambda **arguments: launch(grid, **arguments)

    return Kernel()


@pytest.mark.torch
@pytest.mark.parametrize("experts", [6, 128])
@pytest.mark.parametrize("options", [{}, {"activation": "swigluoai", "biases": True, "interleaved": True}])
def test_vllm_is_called_as_it_reads(monkeypatch: pytest.MonkeyPatch, options: dict[str, Any], experts: int) -> None:
    from benchmarks import moe_triton
    from benchmarks.library import Setup
    from benchmarks.moe_inputs import activate, check, make_inputs

    calls: list[dict[str, Any]] = []
    kernel = kernel_in_torch(calls)
    monkeypatch.setattr(moe_triton, "load", lambda path: kernel)
    monkeypatch.setattr(moe_triton, "activate", lambda case, h, a: a.copy_(activate(case, h, interleaved=False)))
    monkeypatch.setenv(moe_triton.VARIABLE, "anything")
    stand_in(monkeypatch, "triton.language", bfloat16="the type")
    case = TINY._replace(experts=experts, graph=True, **options)
    sets = [make_inputs(case, "cpu", seed) for seed in (1, 2)]
    made = moe_triton.VllmTriton().prepare(case, sets, Setup("cpu"))
    for i in (0, 1, 2):
        assert check(case, sets[i % 2], made.run(i)).passed
    assert len({(g["BLOCK_SIZE_M"], g["BLOCK_SIZE_N"], g["num_warps"]) for g in calls}) > 3  # several were tried
    assert {g["compute_type"] for g in calls} == {"the type"}
    assert str(moe_triton.tiles(case)[0])[:4] == moe_triton.CHOSEN["tiny"][:4] == "Tile"
    assert "float32" not in moe_triton.VllmTriton().why_not(case, Setup("cuda"))
    assert "bf16" in moe_triton.VllmTriton().why_not(case._replace(dtype="float32"), Setup("cuda"))


@pytest.mark.torch
def test_the_fastest_configuration_is_taken_and_a_failing_one_is_not() -> None:
    import time

    from benchmarks.timing import fastest

    def fails(i: int) -> None:
        raise RuntimeError("out of shared memory")

    runs: list[Callable[[int], Any]] = [fails, lambda i: time.sleep(0.004), lambda i: time.sleep(0.001), fails]
    assert fastest(runs, 2, cuda=False) == 2
    with pytest.raises(RuntimeError, match="no configuration runs"):
        fastest([fails], 2, cuda=False)
