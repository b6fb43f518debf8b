"""torch.compile and tracing of the functions of `flashmoe_cupy` itself: the results of eager code, in one graph."""

from __future__ import annotations

import subprocess
import sys
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from flashmoe_cupy import (
    FlashMoELayer,
    flash_attention,
    flash_attention_varlen,
    fused_moe,
    grouped_gemm,
    moe_permute,
    moe_route,
)
from flashmoe_cupy.errors import UnsupportedProblem

torch = pytest.importorskip("torch")

from flashmoe_cupy import torch as fm  # noqa: E402

pytestmark = [
    pytest.mark.torch,
    # torch's own modules warn about themselves when the compiler is imported
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning:torch"),
]
DEVICES = ["cpu", pytest.param("cuda", marks=[pytest.mark.gpu, pytest.mark.sm80])]
# torch 2.6: the compiler hides what the code that it traces raises.
SAYS_WHY = tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 7)
T, D, N, E, K = 9, 32, 24, 6, 2
Call = tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any]]


@pytest.fixture(autouse=True)
def _fresh_compiler() -> None:
    torch.compiler.reset()


def random(device: str, *shape: int, dtype: str = "float32", seed: int = 0) -> Any:
    made = torch.randn(shape, generator=torch.Generator().manual_seed(seed)) / shape[-1] ** 0.25
    return made.to(device=device, dtype=getattr(torch, dtype))


def qkv(device: str, dtype: str = "float32") -> tuple[Any, ...]:
    return tuple(random(device, 2, 11, heads, 16, dtype=dtype, seed=heads) for heads in (4, 2, 2))


def experts(device: str, dtype: str = "float32", rows: int = 2 * N) -> tuple[Any, ...]:
    ids = torch.arange(T * K, dtype=torch.int32, device=device).reshape(T, K) % (E + 1)  # one of them is nobody's
    x, w1, w2 = (random(device, *shape, dtype=dtype) for shape in ((T, D), (E, rows, D), (E, D, N)))
    return x, w1, w2, random(device, T, K).abs(), ids


def attention_calls(device: str) -> dict[str, Call]:
    q, k, v = qkv(device)
    half = qkv(device, "bfloat16")
    packed = tuple(x.flatten(0, 1) for x in (q, k, v))
    cu = torch.tensor([0, 5, 5, 20], dtype=torch.int32, device=device)  # two rows belong to no sequence
    used = torch.tensor([4, 0, 15], dtype=torch.int32, device=device)
    lengths: dict[str, Any] = {"cu_seqlens_q": cu, "cu_seqlens_k": cu, "max_seqlen_q": 15, "max_seqlen_k": 15}
    keep = random(device, 1, 4, 11, 11) > 0
    extra = {"sinks": random(device, 4), "alibi_slopes": random(device, 4).abs(), "bias": random(device, 2, 1, 11, 11)}
    turned = tuple(x.transpose(1, 2) for x in half)
    return {
        "plain": (flash_attention, (q, k, v), {}),
        "causal": (flash_attention, (q, k, v), {"causal": True, "return_lse": True}),
        "window": (flash_attention, half, {"causal": True, "window_size": (3, 0), "softcap": 5.0}),
        "all": (flash_attention, (q, k, v), extra | {"softmax_scale": 0.3, "return_lse": True}),
        "mask": (flash_attention, turned, {"layout": "bhsd", "bias": keep}),
        "packed": (flash_attention_varlen, packed, lengths | {"causal": True, "return_lse": True}),
        "used": (flash_attention_varlen, packed, lengths | {"seqused_q": used, "seqused_k": used, "softcap": 3.0}),
    }  # fmt: skip


def moe_calls(device: str) -> dict[str, Call]:
    given, logits = experts(device), random(device, T, E)
    x, w1, w2, _, ids = given
    table = torch.tensor([5, 4, 3, -1, 1, 0, 2], dtype=torch.int32, device=device)
    order = moe_permute(ids, num_experts=E)
    shared = {
        "shared_w_gate_up": random(device, 2 * N, D), "shared_w_down": random(device, D, N),
        "shared_gate": random(device, T).abs(),
    }  # fmt: skip
    biases = {"b_gate_up": random(device, E, 2 * N), "b_down": random(device, E, D), "expert_map": table}
    oai = {"activation": "swigluoai", "interleaved": True, "swiglu_alpha": 1.25, "swiglu_limit": 0.5}
    groups: dict[str, Any] = {"num_expert_group": 3, "topk_group": 2, "e_score_correction_bias": random(device, E)}
    sigmoid: dict[str, Any] = {"scoring_func": "sigmoid", "renormalize": True, "capacity_factor": 0.75}
    sigmoid["routed_scaling_factor"] = 2.5
    rows = {"gather_indices": order.sorted_indices // K, "bias": random(device, E, 2 * N)}
    sizes = torch.tensor([3, 0, 1, 4, 2, 4], dtype=torch.int32, device=device)
    router = {"router_weight": random(device, E, D), "router_bias": random(device, E)}
    layer = FlashMoELayer(D, E, K, N, w_gate_up=w1, w_down=w2, renormalize=True, **router)
    whole = FlashMoELayer(
        D, E, K, N, w_gate_up=w1, w_down=w2, shared_w_gate_up=shared["shared_w_gate_up"],
        shared_w_down=shared["shared_w_down"], shared_gate_weight=random(device, D), **router, **sigmoid, **groups,
    )  # fmt: skip
    return {
        "moe": (fused_moe, given, {}),
        "moe bf16": (fused_moe, experts(device, "bfloat16", N), {"activation": "relu2", "batch_invariant": True}),
        "moe all": (fused_moe, given, biases | oai | shared | {"apply_router_weight_on_input": True}),
        "route": (moe_route, (logits,), {"top_k": K}),
        "route all": (moe_route, (logits,), {"top_k": K, "return_stats": True} | sigmoid | groups),
        "permute": (moe_permute, (ids,), {"num_experts": 4, "expert_map": table}),
        "gemm": (grouped_gemm, (x, w1), {"offsets": order.offsets} | rows),
        "gemm masked": (grouped_gemm, (random(device, E, 4, D), w1), {"group_sizes": sizes}),
        "layer": (layer, (x.reshape(3, 3, D),), {}),
        "layer all": (whole, (x,), {"return_stats": True}),
        "layer logits": (layer, (x,), {"router_logits": logits}),
    }


def calls(device: str) -> dict[str, Call]:
    return attention_calls(device) | moe_calls(device)


NAMES = ["plain", "causal", "window", "all", "mask", "packed", "used", "moe", "moe bf16", "moe all", "route",
         "route all", "permute", "gemm", "gemm masked", "layer", "layer all", "layer logits"]  # fmt: skip


def same(mine: Any, theirs: Any) -> None:
    """Equal tensors, of equal strides and dtypes, in tuples of equal types."""
    if isinstance(theirs, tuple):
        assert type(mine) is type(theirs) and len(mine) == len(theirs)
        for a, b in zip(mine, theirs, strict=True):
            same(a, b)
        return
    assert type(mine) is torch.Tensor and mine.dtype == theirs.dtype and mine.stride() == theirs.stride()
    assert torch.equal(mine, theirs)


def test_all_cases_are_named() -> None:
    assert list(calls("cpu")) == NAMES


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", NAMES)
def test_compiled_is_eager(name: str, device: str) -> None:
    function, arrays, options = calls(device)[name]
    want = function(*arrays, **options)
    for _ in range(2):
        function(*arrays, **options)  # a GPU's short way is there
    inside = torch.compile(lambda *given: function(*given, **options), backend="aot_eager", fullgraph=True)
    same(inside(*arrays), want)
    same(inside(*arrays), want)
    directly = torch.compile(function, backend="eager", fullgraph=True)
    same(directly(*arrays, **options), want)
    same(function(*arrays, **options), want)  # and eager code stays as it was


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", ["causal", "window", "packed", "moe", "layer"])
def test_graphs_that_may_break_have_the_numbers_too(name: str, device: str) -> None:
    """As most users compile. Dynamo has nothing to warn of, either."""
    function, (first, *others), options = calls(device)[name]
    want = function(first, *others, **options)
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        same(torch.compile(lambda x: function(x, *others, **options), backend="eager")(first), want)
    assert not [str(one.message) for one in seen if "ynamo" in str(one.message)]


@pytest.mark.parametrize("device", DEVICES)
def test_one_graph_for_all_sizes(device: str) -> None:
    from torch._dynamo.testing import CompileCounterWithBackend

    q, k, v = qkv(device)
    _, w1, w2, _, _ = experts(device)
    router = random(device, E, D)

    def model(q: Any, k: Any, v: Any, x: Any) -> Any:
        weights, ids = moe_route(x @ router.T, top_k=K)
        return flash_attention(q, k, v, causal=True), fused_moe(x, w1, w2, weights, ids)

    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    for length, tokens in ((11, 9), (7, 20), (3, 5)):
        given = (q[:, :length].clone(), k, v, random(device, tokens, D))
        torch._dynamo.mark_dynamic(given[0], 1)
        torch._dynamo.mark_dynamic(given[3], 0)
        same(compiled(*given), model(*given))
    assert counter.frame_count == 1


@pytest.mark.parametrize("device", DEVICES)
def test_inductor(device: str) -> None:
    q, k, v = qkv(device)
    x, w1, w2, weights, ids = experts(device)
    compiled = torch.compile(
        lambda q, x: (flash_attention(q * 2, k, v, causal=True) + 1, fused_moe(x + 1, w1, w2, weights, ids) * 2),
        fullgraph=True,
    )
    for _ in range(2):
        torch.testing.assert_close(
            compiled(q, x),
            (flash_attention(q * 2, k, v, causal=True) + 1, fused_moe(x + 1, w1, w2, weights, ids) * 2),
            rtol=1e-6, atol=1e-6,
        )  # fmt: skip


def test_the_first_call_of_a_process() -> None:
    """Nothing is known of torch, which comes after this package; and functions are reached as its attributes."""
    code = """
import sys, flashmoe_cupy
from flashmoe_cupy import fused_moe
assert "torch" not in sys.modules and "flashmoe_cupy.torch" not in sys.modules
import torch
x, w1, w2 = torch.randn(8, 16), torch.randn(4, 32, 16), torch.randn(4, 16, 16)
logits = torch.randn(8, 4)
def model(x, logits):
    weights, ids = flashmoe_cupy.moe_route(logits, top_k=2)
    return fused_moe(x, w1, w2, weights, ids), flashmoe_cupy.flash_attention(*[x[None, :, None]] * 3, causal=True)
got = torch.compile(model, backend="eager", fullgraph=True)(x, logits)
assert all(map(torch.equal, got, model(x, logits)))
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=300)


# ---------------------------------------------------------------------------------------- what else looks at the calls


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", ["causal", "used", "moe all", "route", "permute", "gemm", "layer"])
def test_traced_once_and_run_on_other_values(name: str, device: str) -> None:
    """A trace that had read the values would give the first result again."""
    from torch.fx.experimental.proxy_tensor import make_fx

    function, (first, *others), options = calls(device)[name]
    other = first.flip(0).contiguous()
    for _ in range(3):
        before, want = function(first, *others, **options), function(other, *others, **options)

    def call(a: Any) -> Any:
        result = function(a, *others, **options)
        return tuple(result) if isinstance(result, tuple) else result

    want = tuple(want) if isinstance(want, tuple) else want
    assert not all(map(torch.equal, *((x if isinstance(x, tuple) else (x,)) for x in (before, want))))
    ways: list[dict[str, Any]] = [{}, {"tracing_mode": "fake"}, {"tracing_mode": "symbolic"}, {"pre_dispatch": True}]
    for how in ways:
        same(make_fx(call, _allow_non_fake_inputs=True, **how)(first)(other), want)
    with torch.no_grad():
        same(torch.jit.trace(call, (first,), check_trace=False)(other), want)


@pytest.mark.parametrize("strict", [True, False])
def test_export(strict: bool) -> None:
    if strict and not SAYS_WHY:
        pytest.skip("torch 2.6 exports no tensors from outside of the module when strict")
    all_of_them = calls("cpu")

    class Model(torch.nn.Module):  # type: ignore[misc, name-defined]
        def forward(self, q: Any, x: Any) -> Any:
            function, (_, *others), options = all_of_them["window"]
            layer, _, more = all_of_them["layer all"]
            out, stats = layer(x, **more)
            return function(q, *others, **options), out, *stats

    given = qkv("cpu", "bfloat16")[0], experts("cpu")[0]
    program = torch.export.export(Model(), given, strict=strict)
    same(tuple(program.module()(*given)), Model()(*given))
    nodes = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
    for name in ("flash_attention", "moe_route", "fused_moe"):
        assert f"flashmoe_cupy.{name}.default" in nodes


class Used(torch.nn.Module):  # type: ignore[misc, name-defined, unused-ignore]
    def forward(self, q: Any, cu: Any) -> Any:
        n = q.shape[0]
        one = flash_attention(q[None], q[None], q[None], window_size=(n // 2, 0), softmax_scale=0.25)
        lengths: dict[str, Any] = {"cu_seqlens_q": cu, "cu_seqlens_k": cu, "max_seqlen_q": n, "max_seqlen_k": n}
        return one, flash_attention_varlen(q, q, q, **lengths)


@pytest.mark.parametrize("strict", [True, False])
def test_lengths_from_shapes_that_change(strict: bool) -> None:
    def given(n: int) -> tuple[Any, Any]:
        return random("cpu", n, 2, 16), torch.tensor([0, n], dtype=torch.int32)

    sizes = ({0: torch.export.Dim("n", min=4, max=4096)}, None)
    try:
        program = torch.export.export(Used(), given(20), dynamic_shapes=sizes, strict=strict).module()
    except torch._dynamo.exc.Unsupported as error:
        if "builtin operator `is_`" in str(error):
            pytest.skip("this torch cannot trace whether a tuple of sizes is another one")
        raise
    same(tuple(program(*given(31))), Used()(*given(31)))


def test_fake_tensors_of_a_device_that_need_not_exist() -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        q = torch.empty(2, 8, 4, 16, dtype=torch.bfloat16, device="cuda")
        out, lse = flash_attention(q, q, q, causal=True, return_lse=True)
        assert (out.shape, out.dtype, lse.shape, out.device.type) == (q.shape, q.dtype, (2, 4, 8), "cuda")
        half = {"dtype": torch.bfloat16, "device": "cuda"}
        w1, w2, router = torch.empty(E, 2 * N, D, **half), torch.empty(E, D, N, **half), torch.empty(E, D, **half)
        layer = FlashMoELayer(D, E, K, N, w_gate_up=w1, w_down=w2, router_weight=router)
        y = layer(torch.empty(5, 3, D, **half))
        assert (y.shape, y.dtype, y.device.type) == ((5, 3, D), torch.bfloat16, "cuda")


# ------------------------------------------------------------------------------------------------- NumPy, out, refusals


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_out_is_written_where_a_graph_may_break(dtype: str, backend: str) -> None:
    """Without fullgraph a call that has no operator runs uncompiled, with everything inside of it."""
    x, *others = experts("cpu", dtype)
    q, k, v = (a.to(getattr(torch, dtype)) for a in qkv("cpu"))
    for function, first, more in ((fused_moe, x, others), (flash_attention, q, [k, v])):
        want = function(first, *more)
        for call in (function, lambda *given, **options: function(*given, **options)):  # noqa: B023
            torch.compiler.reset()
            out = torch.full_like(want, 7.0)
            torch.compile(call, backend=backend)(first, *more, out=out)
            assert torch.equal(out, want)


def test_numpy_in_compiled_code() -> None:
    """It runs uncompiled: torch's translation of NumPy code loses what is written to `out=`."""
    q = np.random.default_rng(0).standard_normal((1, 8, 2, 16), np.float32)
    x, w1, w2, weights, ids = (a.numpy() for a in experts("cpu"))

    def attend(q: Any) -> Any:
        return flash_attention(q, q, q, causal=True)

    def mix(x: Any) -> Any:
        return fused_moe(x, w1, w2, weights, ids)

    for function, given in ((attend, q), (mix, x)):
        got = torch.compile(function, backend="eager")(given)
        assert type(got) is np.ndarray
        np.testing.assert_array_equal(got, function(given))
    got = torch.compile(flash_attention, backend="eager")(q, q, q)
    np.testing.assert_array_equal(got, flash_attention(q, q, q))
    torch.compiler.reset()
    with pytest.raises(Exception, match=r"compiler\.disable|_dynamo\.disable"):  # the compiler's own type
        torch.compile(attend, backend="eager", fullgraph=True)(q)


WRONG: list[tuple[str, dict[str, Any], str]] = [
    ("plain", {"causal": 1}, "causal must be a bool, but is 1"),
    ("plain", {"softcap": True}, "softcap must be a number, but is True"),
    ("plain", {"softmax_scale": False}, "softmax_scale must be a number or None, but is False"),
    ("plain", {"window_size": (1.0, 0)}, r"window_size must be two ints \(left, right\), .*but is \(1.0, 0\)"),
    ("plain", {"return_lse": 1}, "return_lse must be a bool, but is 1"),
    ("packed", {"max_seqlen_q": True}, "max_seqlen_q must be an int, but is True"),
    ("packed", {"max_seqlen_k": 15.0}, "max_seqlen_k must be an int, but is 15.0"),
    ("route", {"top_k": 2.0}, "top_k must be an int, but is 2.0"),
    ("route", {"renormalize": 1}, "renormalize must be a bool, but is 1"),
    ("route", {"capacity_factor": True}, "capacity_factor must be a number or None, but is True"),
    ("permute", {"num_experts": True}, "num_experts must be an int, but is True"),
    ("moe", {"interleaved": 0}, "interleaved must be a bool, but is 0"),
    ("moe", {"activation": 5}, "activation must be a string, but is 5"),
]


@pytest.mark.parametrize(("name", "wrong", "why"), WRONG, ids=[f"{name} {wrong}" for name, wrong, _ in WRONG])
def test_options_are_not_turned_into_their_type(name: str, wrong: dict[str, Any], why: str) -> None:
    """The schema of an operator would take 1 for True and True for 1.0."""
    function, arrays, options = calls("cpu")[name]
    wrong = options | wrong
    for call in (function, getattr(fm, function.__name__)):
        with pytest.raises(ValueError, match=next(iter(why.split()))):
            call(*arrays, **wrong)
        with pytest.raises(Exception, match=why if SAYS_WHY else "Observed exception"):
            torch.compile(call, backend="eager", fullgraph=True)(*arrays, **wrong)
        with pytest.raises(UnsupportedProblem, match=why), torch.no_grad():
            torch.jit.trace(lambda first, call=call: call(first, *arrays[1:], **wrong), arrays[:1])


def test_numbers_of_numpy_are_options_of_the_operators() -> None:
    q, k, v = qkv("cpu")
    want = flash_attention(q, k, v, causal=True, window_size=(3, 0), softcap=2.0)
    options: dict[str, Any] = {"causal": np.True_, "window_size": np.array([3, 0]), "softcap": np.float32(2)}
    traced = torch.jit.trace(lambda q: fm.flash_attention(q, k, v, **options), (q,), check_trace=False)
    same(traced(q), want)


def test_the_module_that_will_be() -> None:
    with pytest.raises(AttributeError, match=r"'FlashMoE'; .*comes with training, .*FlashMoELayer serves inference"):
        _ = fm.FlashMoE
    with pytest.raises(AttributeError, match=r"has no attribute 'nothing'$"):
        _ = fm.nothing


def test_what_is_refused() -> None:
    q, k, v = qkv("cpu")
    out = torch.empty_like(q)
    same(fm.flash_attention(q, k, v, out=out), flash_attention(q, k, v))
    compiled = torch.compile(flash_attention, backend="eager", fullgraph=True)
    why = r"out is given, but .* no in-place form.*out=None"
    with pytest.raises(Exception, match=why if SAYS_WHY else "Observed exception"):
        compiled(q, k, v, out=out)
    why = "k is no tensor; all arrays of a call must be of one library"
    with pytest.raises(Exception, match=why if SAYS_WHY else "Observed exception"):
        compiled(q, k.numpy(), v)
    x, w1, w2, weights, ids = experts("cpu")
    with pytest.raises(UnsupportedProblem, match="out is given"):
        torch.jit.trace(lambda x: fused_moe(x, w1, w2, weights, ids, out=torch.empty_like(x)), (x,))
    with pytest.raises(UnsupportedProblem, match="activation is 'silu'; known are"):
        torch.compile(fused_moe, backend="eager", fullgraph=True)(x, w1, w2, weights, ids, activation="silu")
    gemm, biases = torch.ops.flashmoe_cupy.grouped_gemm, random("cpu", 2, E, 2 * N)
    with pytest.raises(UnsupportedProblem, match="vmap is not supported"):
        torch.vmap(lambda bias: gemm(x, w1, ids[0], None, None, bias))(biases)
    over = torch.compile(torch.vmap(lambda q: flash_attention(q, k, v)), backend="eager", fullgraph=True)
    with pytest.raises(Exception, match="vmap is not supported"):
        over(torch.stack((q, q)))
    with pytest.raises(UnsupportedProblem, match=r"torch.func transforms"):
        torch.vmap(lambda q: flash_attention(q, k, v))(torch.stack((q, q)))
