"""torch: eager, opcheck, torch.compile, export, fake tensors; streams and CUDA graphs on a GPU."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from flashmoe_cupy import reference
from flashmoe_cupy._types import Layout
from flashmoe_cupy.errors import UnsupportedProblem
from flashmoe_cupy.plan.attention.problem import PADDING
from flashmoe_cupy.testing import TOLERANCES, AttentionCase, VarlenCase, compare_lse, within_tolerance

torch = pytest.importorskip("torch")

from flashmoe_cupy import torch as fm  # noqa: E402

pytestmark = [
    pytest.mark.torch,
    # torch's own modules warn about themselves when the compiler is imported
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning:torch"),
]
DEVICES = ["cpu", pytest.param("cuda", marks=[pytest.mark.gpu, pytest.mark.sm80])]
SMALL = AttentionCase(9, 11, heads_q=4, heads_k=2, head_dim=16, head_dim_v=8, dtype="float32", causal=True)
CASES = [
    AttentionCase(33, 70, heads_q=4, heads_k=2, head_dim=64, head_dim_v=32, dtype="bfloat16", causal=True),
    AttentionCase(24, 40, dtype="float32", softcap=5.0, softmax_scale=0.3, bias="h1k", alibi="h", sinks="float32"),
    AttentionCase(17, 19, dtype="float16", bias="b1qk", bias_dtype="bool", window_size=(9, 2)),
    AttentionCase(33, 40, used_q=(33, 9), used_k=(40, 12), left_q=(5, 0), left_k=(2, 10), causal=True, heads_q=4),
]
VARLEN = VarlenCase(
    (5, 0, 13, 7), (9, 3, 0, 21), used_q=(4, 0, 13, 7), used_k=(9, 2, 0, 17), tail_q=3, tail_k=2, heads_q=4,
    dtype="float16", causal=True, sinks="float32", alibi="bh",
)  # fmt: skip


@pytest.fixture(autouse=True)
def _fresh_compiler() -> None:
    torch.compiler.reset()


def _random(case: AttentionCase | VarlenCase, seed: int = 0) -> dict[str, Any]:
    return dict(case.random(seed))


def _put(arrays: dict[str, Any], device: str) -> dict[str, Any]:
    """NumPy arrays, ml_dtypes included, as tensors."""
    tensors = {}
    for name, x in arrays.items():
        half = x.dtype.name == "bfloat16"
        t = torch.from_numpy(x.view(np.int16) if half else x).to(device)
        tensors[name] = t.view(torch.bfloat16) if half else t
    return tensors


def _check(result: Any, want: Any, case: Any) -> None:
    """(out, lse) against the float64 reference."""
    out, lse = result
    assert type(out) is torch.Tensor and str(out.dtype) == f"torch.{case.dtype}" and lse.dtype == torch.float32
    verdict = within_tolerance(out.double().cpu().numpy(), want[0], case.dtype, softcap=case.softcap)
    assert verdict, verdict.text
    verdict = compare_lse(lse.cpu().numpy(), want[1], atol=TOLERANCES[case.dtype].lse)
    assert verdict, verdict.text


def _dense_arguments(
    given: dict[str, Any], case: AttentionCase, layout: str = "bshd", lse: bool = True
) -> tuple[Any, ...]:
    """All arguments of the operator, in the schema's order."""
    extra = [given.get(name) for name in ("sinks", "alibi_slopes", "bias", *PADDING)]
    scalars = (case.causal, case.window_size, case.softmax_scale, case.softcap)
    return (given["q"], given["k"], given["v"], *scalars, *extra, layout, lse)


def _varlen_arguments(given: dict[str, Any], case: VarlenCase) -> tuple[Any, ...]:
    o = case.options()
    lengths = (given["cu_seqlens_q"], given["cu_seqlens_k"], o["max_seqlen_q"], o["max_seqlen_k"])
    used = (given["seqused_q"], given["seqused_k"])
    scalars = (case.causal, case.window_size, case.softmax_scale, case.softcap)
    return (*(given[x] for x in "qkv"), *lengths, *used, *scalars, given["sinks"], given["alibi_slopes"], True)


# ------------------------------------------------------------------------------------------------ results and operators


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_eager_and_operator(case: AttentionCase, device: str) -> None:
    arrays, options = _random(case), case.options() | {"return_lse": True}
    given = _put(arrays, device)
    eager = fm.flash_attention(**given, **options)
    _check(eager, reference.flash_attention(**arrays, **options), case)
    operator = torch.ops.flashmoe_cupy.flash_attention(*_dense_arguments(given, case))
    for mine, theirs in zip(operator, eager, strict=True):
        assert torch.equal(mine, theirs)
    alone = fm.flash_attention(**given, **case.options())
    assert torch.equal(alone, eager[0])


@pytest.mark.parametrize("device", DEVICES)
def test_varlen(device: str) -> None:
    arrays, options = _random(VARLEN), VARLEN.options() | {"return_lse": True}
    want = reference.flash_attention_varlen(**arrays, **options)
    given = _put(arrays, device)
    _check(fm.flash_attention_varlen(**given, **options), want, VARLEN)
    _check(torch.ops.flashmoe_cupy.flash_attention_varlen(*_varlen_arguments(given, VARLEN)), want, VARLEN)
    compiled = torch.compile(fm.flash_attention_varlen, fullgraph=True, backend="aot_eager")
    _check(compiled(**given, **options), want, VARLEN)


@pytest.mark.parametrize("device", DEVICES)
def test_opcheck(device: str) -> None:
    """torch's own tests: schema, fake tensors against real ones (strides too), autograd key, dynamic AOT tracing."""
    operators = torch.ops.flashmoe_cupy
    for case in CASES:
        torch.library.opcheck(operators.flash_attention.default, _dense_arguments(_put(_random(case), device), case))
    given = _put(_random(SMALL), device)
    turned = {name: x.transpose(1, 2) for name, x in given.items()}  # strided memory
    torch.library.opcheck(operators.flash_attention.default, _dense_arguments(turned, SMALL, "bhsd", lse=False))
    torch.library.opcheck(
        operators.flash_attention_varlen.default, _varlen_arguments(_put(_random(VARLEN), device), VARLEN)
    )
    for operator in (operators.flash_attention, operators.flash_attention_varlen):
        assert {torch.Tag.pt2_compliant_tag, torch.Tag.needs_fixed_stride_order} <= set(operator.default.tags)


# -------------------------------------------------------------------------------------------------------------- tracing


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("layout", ["bshd", "bhsd"])
def test_compile_once_for_all_shapes(layout: Layout, device: str) -> None:
    """One graph without breaks, also when sizes and window change; values and strides as in eager."""
    from torch._dynamo.testing import CompileCounterWithBackend

    counter = CompileCounterWithBackend("aot_eager")

    def model(q: Any, k: Any, v: Any, window: int) -> Any:
        out, lse = fm.flash_attention(
            q * 2, k, v, causal=True, window_size=(window, -1), softmax_scale=0.5, layout=layout, return_lse=True
        )
        return out + 1, lse * 2

    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend=counter)
    for i in range(4):
        case = SMALL._replace(batch=3 + i, seqlen_q=7 + i, seqlen_k=20 - 2 * i)  # no two sizes alike at first
        given = _put(_random(case, i), device)
        if layout == "bhsd":
            given = {name: x.transpose(1, 2) for name, x in given.items()}
        q, k, v = given.values()
        for x, y in zip(compiled(q, k, v, 5 + i), model(q, k, v, 5 + i), strict=True):
            assert x.stride() == y.stride()
            torch.testing.assert_close(x, y, rtol=1e-6, atol=1e-6)
    assert counter.frame_count == 1


@pytest.mark.parametrize("device", DEVICES)
def test_compile_with_inductor(device: str) -> None:
    """The default compiler, with an expanded bias and a strided value tensor that it must hand over as they are."""
    case = SMALL._replace(bias="bhqk", head_dim_v=16)
    arrays = _random(case)
    arrays["bias"] = arrays["bias"][:1, :1]
    given = _put(arrays, device)
    given["bias"] = given["bias"].expand(2, 4, -1, -1)
    given["v"] = given["k"].flip(0).transpose(1, 2).contiguous().transpose(1, 2)
    arrays["v"] = arrays["k"][::-1].copy()
    compiled = torch.compile(lambda a: fm.flash_attention(**a, causal=True, return_lse=True), fullgraph=True)
    want = reference.flash_attention(**arrays, causal=True, return_lse=True)
    for _ in range(2):
        _check(compiled(given), want, case)


def test_export_and_fake_tensors() -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    class Model(torch.nn.Module):  # type: ignore[misc, name-defined]
        def forward(self, q: Any, k: Any, v: Any) -> Any:
            return fm.flash_attention(q, k, v, causal=True, return_lse=True)

    given = _put(_random(SMALL), "cpu")
    program = torch.export.export(Model(), tuple(given.values()))
    want = Model()(*given.values())
    for mine, theirs in zip(program.module()(*given.values()), want, strict=True):
        assert torch.equal(mine, theirs)
    nodes = [str(node.target) for node in program.graph.nodes if node.op == "call_function"]
    assert "flashmoe_cupy.flash_attention.default" in nodes
    with FakeTensorMode():  # of a device that need not exist
        q = torch.empty(2, 4, 64, 128, dtype=torch.bfloat16, device="cuda")
        v = torch.empty(2, 4, 64, 64, dtype=torch.bfloat16, device="cuda")
        out, lse = fm.flash_attention(q, q, v, layout="bhsd", return_lse=True)
        assert (out.shape, out.dtype, out.device.type) == ((2, 4, 64, 64), torch.bfloat16, "cuda")
        assert (lse.shape, lse.dtype) == ((2, 4, 64), torch.float32)
        x = torch.empty(10, 6, 128, dtype=torch.bfloat16, device="cuda")
        cu = torch.empty(3, dtype=torch.int32, device="cuda")
        packed = fm.flash_attention_varlen(x, x, x, cu_seqlens_q=cu, cu_seqlens_k=cu, max_seqlen_q=4, max_seqlen_k=4)
        assert (packed.shape, packed.device.type) == ((10, 6, 128), "cuda")


# --------------------------------------------------------------------------------------------------------------- errors


def test_gradients_are_recorded_in_grad_mode_alone() -> None:
    """test_torch_gradient.py says which ones."""
    given = _put(_random(SMALL), "cpu")
    k, v = given["k"], given["v"]
    q = torch.nn.Parameter(given["q"])
    want = fm.flash_attention(given["q"], k, v)
    compiled = torch.compile(lambda q: fm.flash_attention(q * 1, k, v), fullgraph=True, backend="aot_eager")
    for call in (lambda q: fm.flash_attention(q, k, v), compiled):
        out = call(q)
        assert out.requires_grad and torch.equal(out, want)
        with torch.no_grad():
            assert torch.equal(call(q), want) and not call(q).requires_grad
        assert not call(q.detach()).requires_grad
    arguments = _dense_arguments(given | {"alibi_slopes": torch.rand(4, requires_grad=True)}, SMALL)
    with pytest.raises(UnsupportedProblem, match="alibi_slopes requires grad and grad mode is on") as info:
        torch.ops.flashmoe_cupy.flash_attention(*arguments)
    assert "no_grad" in info.value.hint
    slopes = arguments[8]
    compiled = torch.compile(
        lambda s: fm.flash_attention(q, k, v, alibi_slopes=s * 1), fullgraph=True, backend="aot_eager"
    )
    with pytest.raises(Exception, match="alibi_slopes requires grad and grad mode is on"):  # the compiler's own type
        compiled(slopes)


def test_errors_reach_the_caller() -> None:
    given = _put(_random(SMALL), "cpu")
    q, k, v = given["q"], given["k"], given["v"]
    compiled = torch.compile(fm.flash_attention, fullgraph=True, backend="aot_eager")
    with pytest.raises(UnsupportedProblem, match="multiple of the 2 heads"):
        compiled(q[:, :, :3], k, v)
    with pytest.raises(Exception, match="q must have 4 dimensions, but has 3"):
        compiled(q[0], k, v)
    with pytest.raises(UnsupportedProblem, match="q must have 4 dimensions"):
        fm.flash_attention(q[0], k, v)
    with pytest.raises(UnsupportedProblem, match="one library"):
        fm.flash_attention(q, k.numpy(), v)
    with pytest.raises(UnsupportedProblem, match="out must have shape"):
        fm.flash_attention(q, k, v, out=q)


# ------------------------------------------------------------------------------------------------------------ on a GPU


@pytest.mark.gpu
@pytest.mark.sm80
def test_gpu_side_stream() -> None:
    """The kernel is queued on torch's current stream, behind a long computation of its inputs."""
    case = AttentionCase(300, 300, heads_q=4, heads_k=2, dtype="bfloat16", causal=True)
    arrays = _random(case)
    given = _put(arrays, "cuda")
    want = reference.flash_attention(**arrays, causal=True, return_lse=True)
    fm.flash_attention(**given, causal=True)  # compiled and loaded
    busy = torch.full((4096, 4096), 1e-4, device="cuda")
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    q = torch.full_like(given["q"], torch.nan)
    with torch.cuda.stream(stream):
        for _ in range(20):
            busy = torch.tanh(busy @ busy)
        q.copy_(given["q"] + busy[0, 0].to(q.dtype) * 0)
        result = fm.flash_attention(q, given["k"], given["v"], causal=True, return_lse=True)
    assert not stream.query()  # nothing has waited for the GPU
    stream.synchronize()
    _check(result, want, case)


@pytest.mark.gpu
@pytest.mark.sm80
def test_gpu_graph_capture_and_replay() -> None:
    case = AttentionCase(130, 200, heads_q=4, heads_k=2, dtype="float16", causal=True)
    given = _put(_random(case), "cuda")
    for _ in range(2):
        fm.flash_attention(**given, causal=True, return_lse=True)  # warm-up: compile and load
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = fm.flash_attention(**given, causal=True, return_lse=True)
    for seed in (1, 2):
        arrays = _random(case, seed)
        for name, x in _put(arrays, "cuda").items():
            given[name].copy_(x)
        graph.replay()
        torch.cuda.synchronize()
        _check(result, reference.flash_attention(**arrays, causal=True, return_lse=True), case)


@pytest.mark.gpu
@pytest.mark.sm80
def test_gpu_compile_with_cuda_graphs() -> None:
    """mode="reduce-overhead" records the operator into CUDA graphs after its own warm-up."""
    case = AttentionCase(64, 64, heads_q=4, heads_k=2, dtype="bfloat16", causal=True)

    def model(q: Any, k: Any, v: Any) -> Any:
        out, lse = fm.flash_attention(q * 2, k, v, causal=True, return_lse=True)
        return out + 0, lse + 0

    compiled = torch.compile(model, fullgraph=True, mode="reduce-overhead")
    for seed in range(4):
        arrays = _random(case, seed)
        with torch.no_grad():
            result = compiled(**_put(arrays, "cuda"))
        doubled = arrays | {"q": arrays["q"] * 2}
        _check(result, reference.flash_attention(**doubled, causal=True, return_lse=True), case)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("layout", [torch.jagged, torch.strided], ids=str)
def test_nested_tensors_are_sent_to_packed_sequences(layout: Any) -> None:
    import flashmoe_cupy

    plain = torch.rand(2, 3, 4, 16)
    nested = torch.nested.nested_tensor([plain[0], plain[1, :2]], layout=layout)
    said = "is a nested tensor, whose rows have different lengths"
    for _ in range(2):
        for given in ((nested, nested, nested), (nested, plain, plain), (plain, nested, plain), (plain, plain, nested)):
            with pytest.raises(UnsupportedProblem, match=said) as caught:
                flashmoe_cupy.flash_attention(*given)
            assert "while torch compiles" not in str(caught.value)
            assert caught.value.hint.startswith("flash_attention_varlen with values() of jagged tensors as q, k, v")
        with pytest.raises(UnsupportedProblem, match=said):
            flashmoe_cupy.flash_attention(plain, plain, plain, bias=nested)
        with pytest.raises(UnsupportedProblem, match=said):
            flashmoe_cupy.moe_route(nested, top_k=1)
        flashmoe_cupy.flash_attention(plain, plain, plain)
    if layout is torch.jagged:
        q, cu = nested.values(), nested.offsets().int()
        lengths: dict[str, Any] = {"cu_seqlens_q": cu, "cu_seqlens_k": cu, "max_seqlen_q": 3, "max_seqlen_k": 3}
        out = flashmoe_cupy.flash_attention_varlen(q, q, q, **lengths)
        torch.testing.assert_close(out[:3], flashmoe_cupy.flash_attention(plain[:1], plain[:1], plain[:1])[0])
