"""torch: the operations of mixture of experts: operators, opcheck, torch.compile, export, fake tensors, gradients."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from flashmoe_cupy import reference
from flashmoe_cupy.errors import UnsupportedProblem
from flashmoe_cupy.testing import within_tolerance
from flashmoe_cupy.testing_moe import MoECase, RouteCase

torch = pytest.importorskip("torch")

from flashmoe_cupy import torch as fm  # noqa: E402

pytestmark = [
    pytest.mark.torch,
    # torch's own modules warn about themselves when the compiler is imported
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning:torch"),
]
DEVICES = ["cpu", pytest.param("cuda", marks=[pytest.mark.gpu, pytest.mark.sm80])]
Case = MoECase | RouteCase
MOE = [
    MoECase(19, 64, 32, 6, 3, "bfloat16", swiglu_limit=0.75, shared=24, shared_gate="float32", sentinels=0.2),
    MoECase(
        7, 32, 40, 5, 2, "float32", "swigluoai", True, 1.25, 3.0, biases="same", global_experts=9, ids_dtype="int64",
        weight_on_input=True, batch_invariant=True,
    ),
    MoECase(11, 24, 16, 4, 2, "float16", "relu2", weights_dtype="same", routing="duplicates"),
]  # fmt: skip
ROUTES = [
    RouteCase(23, 16, 4, "bfloat16", renormalize=True, capacity_factor=0.75),
    RouteCase(12, 24, 5, "float32", "sigmoid", True, 2.5, "float32", 4, 2),
    RouteCase(9, 12, 2, "float16", "sqrtsoftplus", bias="same"),
]


@pytest.fixture(autouse=True)
def _fresh_compiler() -> None:
    torch.compiler.reset()


def put(arrays: dict[str, Any], device: str) -> dict[str, Any]:
    """NumPy arrays, ml_dtypes included, as tensors."""
    tensors = {}
    for name, x in arrays.items():
        half = x.dtype.name == "bfloat16"
        t = torch.from_numpy(x.view(np.int16) if half else x).to(device)
        tensors[name] = t.view(torch.bfloat16) if half else t
    return tensors


def call(op: str, given: dict[str, Any]) -> Any:
    """The operator itself, with all arguments in the schema's order; what is not given is None."""
    operator = getattr(torch.ops.flashmoe_cupy, op).default
    return operator(*arguments(op, given))


def arguments(op: str, given: dict[str, Any]) -> tuple[Any, ...]:
    names = [argument.name for argument in getattr(torch.ops.flashmoe_cupy, op).default._schema.arguments]
    assert set(given) <= set(names)
    return tuple(given.get(name) for name in names)


def grouped(device: str = "cpu") -> dict[str, dict[str, Any]]:
    """Three calls of grouped_gemm: plain, gathering with a bias, masked."""
    rng = np.random.default_rng(0)
    x, w = rng.standard_normal((13, 24), np.float32), rng.standard_normal((4, 16, 24), np.float32)
    offsets = np.array([0, 5, 5, 9, 12], np.int32)
    gather = rng.integers(-1, 13, 12, np.int32)
    masked = rng.standard_normal((4, 6, 24), np.float32)
    sizes, bias = np.array([6, 0, 3, 1], np.int32), rng.standard_normal((4, 16), np.float32)
    calls = {
        "offsets": {"x": x, "w": w, "offsets": offsets},
        "gather": {"x": x, "w": w, "offsets": offsets, "gather_indices": gather, "bias": bias},
        "masked": {"x": masked, "w": w, "group_sizes": sizes, "bias": bias},
    }
    return {name: put(arrays, device) for name, arrays in calls.items()}


def same(mine: Any, theirs: Any) -> None:
    """Equal tensors, of equal strides and dtypes, in tuples of equal types."""
    if isinstance(theirs, tuple):
        assert type(mine) is type(theirs) and len(mine) == len(theirs)
        for a, b in zip(mine, theirs, strict=True):
            same(a, b)
        return
    assert type(mine) is torch.Tensor and mine.dtype == theirs.dtype and mine.stride() == theirs.stride()
    assert torch.equal(mine, theirs)


# ------------------------------------------------------------------------------------------------ results and operators


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("case", MOE, ids=str)
def test_fused_moe(case: MoECase, device: str) -> None:
    arrays, options = case.random(), case.options()
    given = put(arrays, device) | options
    eager = fm.fused_moe(**given)
    verdict = within_tolerance(eager.double().cpu().numpy(), reference.fused_moe(**arrays, **options), case.dtype)
    assert verdict, verdict.text
    same(call("fused_moe", given), eager)
    same(torch.compile(fm.fused_moe, fullgraph=True, backend="aot_eager")(**given), eager)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("case", ROUTES, ids=str)
def test_moe_route(case: RouteCase, device: str) -> None:
    arrays, options = case.random(), case.options()
    given = put(arrays, device) | options
    compiled = torch.compile(fm.moe_route, fullgraph=True, backend="aot_eager")
    want = reference.moe_route(**arrays, **options, return_stats=True)
    for stats in (True, False):
        eager: Any = fm.moe_route(**given, return_stats=stats)
        assert np.array_equal(eager[1].cpu().numpy(), want[1])
        np.testing.assert_allclose(eager[0].cpu().numpy(), want[0], rtol=2e-5, atol=1e-7)
        same(compiled(**given, return_stats=stats), eager)
        flat = call("moe_route", given | {"return_stats": stats})
        same(flat[:2], eager[:2])
        assert len(flat) == 6
        if stats:
            same(flat[2:], tuple(eager[2]))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("kind", ["offsets", "gather", "masked"])
def test_grouped_gemm(kind: str, device: str) -> None:
    given = grouped(device)[kind]
    eager = fm.grouped_gemm(**given)
    x, w = given["x"].double(), given["w"].double()
    rows = x if "gather_indices" not in given else torch.cat((x, 0 * x[:1]))[given["gather_indices"].long()]
    every = torch.einsum("rd,end->ern", rows, w) if kind != "masked" else torch.einsum("erd,end->ern", x, w)
    every = every + given["bias"].double()[:, None] if "bias" in given else every
    want = torch.zeros(eager.shape, dtype=torch.float64, device=device)
    for e in range(4):
        if kind == "masked":
            size = int(given["group_sizes"][e])
            want[e, :size] = every[e, :size]
        else:
            begin, end = given["offsets"][e : e + 2].tolist()
            want[begin:end] = every[e, begin:end]
    torch.testing.assert_close(eager.double(), want, rtol=1e-5, atol=1e-5)
    same(call("grouped_gemm", given), eager)
    same(torch.compile(fm.grouped_gemm, fullgraph=True, backend="aot_eager")(**given), eager)


@pytest.mark.parametrize("device", DEVICES)
def test_opcheck(device: str) -> None:
    """torch's own tests: schema, fake tensors against real ones (strides too), autograd key, dynamic AOT tracing."""
    operators = torch.ops.flashmoe_cupy
    calls = [("fused_moe", put(case.random(), device) | case.options()) for case in MOE]
    for case, stats in zip(ROUTES, (True, False, True), strict=True):
        calls.append(("moe_route", put(case.random(), device) | case.options() | {"return_stats": stats}))
    calls += [("grouped_gemm", given) for given in grouped(device).values()]
    mapped = put(MOE[1].random(), device)
    calls.append(
        ("moe_permute", {"topk_ids": mapped["topk_ids"], "num_experts": 5, "expert_map": mapped["expert_map"]})
    )
    x = calls[0][1]["x"]
    calls.append(("fused_moe", calls[0][1] | {"x": torch.cat((x, x), 1)[:, 64:]}))  # strided memory
    for name, given in calls:
        operator = getattr(operators, name).default
        torch.library.opcheck(operator, arguments(name, given))
        assert {torch.Tag.pt2_compliant_tag, torch.Tag.needs_fixed_stride_order} <= set(operator.tags)


# -------------------------------------------------------------------------------------------------------------- tracing


def layer(x: Any, router: Any, w1: Any, w2: Any) -> Any:
    """Router and experts; the same once more from the parts; statistics."""
    weights, ids, stats = fm.moe_route(x @ router.T, top_k=2, renormalize=True, return_stats=True)
    out = fm.fused_moe(x, w1, w2, weights, ids, activation="relu")
    order: Any = fm.moe_permute(ids, num_experts=w1.shape[0])
    h = fm.grouped_gemm(x, w1, offsets=order.offsets, gather_indices=order.sorted_indices // 2)
    y = fm.grouped_gemm(h.relu(), w2, offsets=order.offsets)
    parts = (y[order.inverse_indices.long()] * weights[..., None]).sum(1)
    return out * 1, parts, stats.expert_counts + 0, stats.z_loss * 2


def weights_of(tokens: int, device: str, seed: int = 0) -> tuple[Any, ...]:
    g = torch.Generator().manual_seed(seed)
    shapes = ((tokens, 24), (6, 24), (6, 40, 24), (6, 24, 40))
    return tuple((torch.randn(shape, generator=g) / shape[-1] ** 0.5).to(device) for shape in shapes)


@pytest.mark.parametrize("device", DEVICES)
def test_compile_once_for_all_token_counts(device: str) -> None:
    """One graph without breaks for every number of tokens; values and strides as in eager."""
    from torch._dynamo.testing import CompileCounterWithBackend

    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend=counter)
    for i, tokens in enumerate((17, 3, 64, 9)):
        given = weights_of(tokens, device, i)
        want = layer(*given)
        torch.testing.assert_close(want[0], want[1], rtol=1e-5, atol=1e-5)
        for mine, theirs in zip(compiled(*given), want, strict=True):
            assert mine.stride() == theirs.stride()
            torch.testing.assert_close(mine, theirs, rtol=1e-6, atol=1e-6)
        assert int(want[2].sum()) == 2 * tokens
    assert counter.frame_count == 1


@pytest.mark.parametrize("device", DEVICES)
def test_compile_with_inductor(device: str) -> None:
    given = list(weights_of(12, device))
    given[3] = given[3].transpose(0, 1).contiguous().transpose(0, 1)  # strided experts, which must stay so
    compiled = torch.compile(layer, fullgraph=True)
    for mine, theirs in zip(compiled(*given), layer(*given), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-5)


def test_export_and_fake_tensors() -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    class Model(torch.nn.Module):  # type: ignore[misc, name-defined]
        def forward(self, x: Any, router: Any, w1: Any, w2: Any) -> Any:
            return layer(x, router, w1, w2)

    tokens = torch.export.Dim("tokens", min=2, max=1000)
    program = torch.export.export(Model(), weights_of(8, "cpu"), dynamic_shapes=({0: tokens}, None, None, None))
    other = weights_of(21, "cpu", 1)
    for mine, theirs in zip(program.module()(*other), layer(*other), strict=True):
        assert torch.equal(mine, theirs)
    nodes = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
    for name in ("moe_route", "moe_permute", "grouped_gemm", "fused_moe"):
        assert f"flashmoe_cupy.{name}.default" in nodes
    with FakeTensorMode():  # of a device that need not exist
        x = torch.empty(10, 64, dtype=torch.bfloat16, device="cuda")
        logits = torch.empty(10, 8, device="cuda")
        w1 = torch.empty(8, 96, 64, dtype=torch.bfloat16, device="cuda")
        w2 = torch.empty(8, 64, 48, dtype=torch.bfloat16, device="cuda")
        weights, ids, stats = fm.moe_route(logits, top_k=2, return_stats=True)
        assert (weights.shape, weights.dtype, ids.shape, ids.dtype) == ((10, 2), torch.float32, (10, 2), torch.int32)
        assert (stats.dropped.shape, stats.z_loss.shape, stats.z_loss.device.type) == ((8,), (), "cuda")
        out = fm.fused_moe(x, w1, w2, weights, ids)
        assert (out.shape, out.dtype, out.device.type) == ((10, 64), torch.bfloat16, "cuda")
        order: Any = fm.moe_permute(ids, num_experts=8)
        assert [t.shape for t in order] == [(9,), (20,), (10, 2)]
        h = fm.grouped_gemm(x, w1, offsets=order.offsets, gather_indices=order.sorted_indices)
        assert (h.shape, h.dtype) == ((20, 96), torch.bfloat16)
        sizes = torch.empty(8, dtype=torch.int32, device="cuda")
        assert fm.grouped_gemm(torch.empty_like(w1), w1, group_sizes=sizes).shape == (8, 96, 96)


# --------------------------------------------------------------------------------------------------------------- errors


def test_gradients_are_refused() -> None:
    given = put(MOE[1].random(), "cpu") | MOE[1].options()
    w = torch.nn.Parameter(given["w_down"])
    want = fm.fused_moe(**given)
    with pytest.raises(UnsupportedProblem, match="requires grad"):
        fm.fused_moe(**given | {"w_down": w})
    with pytest.raises(UnsupportedProblem, match="w_down requires grad and grad mode is on") as info:
        call("fused_moe", given | {"w_down": w})
    assert "no_grad" in info.value.hint
    compiled = torch.compile(fm.fused_moe, fullgraph=True, backend="aot_eager")
    with pytest.raises(Exception, match="w_down requires grad and grad mode is on"):  # the compiler's own type
        compiled(**given | {"w_down": w})
    logits = torch.randn(3, 8, requires_grad=True)
    with pytest.raises(UnsupportedProblem, match="logits requires grad"):
        call("moe_route", {"top_k": 2, "logits": logits, "return_stats": False} | ROUTES[1].options() | {"top_k": 2})
    with torch.no_grad():
        same(fm.fused_moe(**given | {"w_down": w}), want)
        same(compiled(**given | {"w_down": w}), want)


def test_errors_reach_the_caller() -> None:
    given = put(MOE[1].random(), "cpu") | MOE[1].options()
    compiled = torch.compile(fm.fused_moe, fullgraph=True, backend="aot_eager")
    for function in (fm.fused_moe, compiled):
        with pytest.raises(UnsupportedProblem, match="w_down"):
            function(**given | {"w_down": given["w_down"].mT.contiguous()})
        with pytest.raises(UnsupportedProblem, match="known are swiglu"):
            function(**given | {"activation": "swish"})
    for name, broken in (
        ("fused_moe", given | {"x": given["x"][0]}),
        ("moe_route", {"logits": torch.randn(5), "top_k": 1}),
        ("moe_permute", {"topk_ids": torch.zeros(5, dtype=torch.int32), "num_experts": 4}),
        ("grouped_gemm", {"x": torch.randn(2, 3, 8), "w": torch.randn(2, 8, 8), "offsets": torch.zeros(3).int()}),
    ):
        with pytest.raises(Exception, match=r"must have [23] dimensions, but has [13]"):  # the compiler's own type
            torch.compile(getattr(fm, name), fullgraph=True, backend="aot_eager")(**broken)
        with pytest.raises(UnsupportedProblem, match=r"dimensions"):
            getattr(fm, name)(**broken)
    with pytest.raises(UnsupportedProblem, match="out shares memory with x"):
        fm.fused_moe(**given, out=given["x"])
