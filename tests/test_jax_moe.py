"""JAX: the operations of mixture of experts, eager and under transforms; what XLA hands over on a GPU, emulated."""

from __future__ import annotations

import inspect
import itertools
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

import flashmoe_cupy
from flashmoe_cupy import FlashMoELayer, _env, _xla_ffi, reference
from flashmoe_cupy.dtypes import UINT8, to_numpy
from flashmoe_cupy.errors import UnsupportedProblem
from flashmoe_cupy.jit.sequence import LaunchSequence
from flashmoe_cupy.ops import gpu
from flashmoe_cupy.ops.call import forms
from flashmoe_cupy.plan.operation import registered
from flashmoe_cupy.testing import within_tolerance
from flashmoe_cupy.testing_moe import MoECase, RouteCase

jax = pytest.importorskip("jax")
jnp = jax.numpy

from flashmoe_cupy import _xla  # noqa: E402
from flashmoe_cupy.jax import _view, flash_attention  # noqa: E402

pytestmark = pytest.mark.jax
GPU = pytest.param("gpu", marks=[pytest.mark.gpu, pytest.mark.sm80])
MOE = [
    MoECase(19, 64, 32, 6, 3, "bfloat16", swiglu_limit=0.75, shared=24, shared_gate="float32", sentinels=0.2),
    MoECase(
        7, 32, 40, 5, 2, "float32", "swigluoai", True, 1.25, float("inf"), biases="same", global_experts=9,
        weight_on_input=True, batch_invariant=True,
    ),
    MoECase(11, 24, 16, 4, 2, "float16", "relu2", weights_dtype="same", routing="duplicates"),
]  # fmt: skip
ROUTES = [
    RouteCase(23, 16, 4, "bfloat16", renormalize=True, capacity_factor=0.75),
    RouteCase(12, 24, 5, "float32", "sigmoid", True, 2.5, "float32", 4, 2),
    RouteCase(9, 12, 2, "float16", "sqrtsoftplus", bias="same"),
]


@pytest.fixture(params=["cpu", GPU], autouse=True)
def device(request: pytest.FixtureRequest) -> Iterator[Any]:
    """JAX's default device for the test: the CPU, and on a machine with a GPU that too."""
    with jax.default_device(jax.devices(request.param)[0]):
        yield jax.devices(request.param)[0]


def put(arrays: dict[str, Any]) -> dict[str, Any]:
    return {name: jnp.asarray(x) for name, x in arrays.items()}


def same(mine: Any, theirs: Any) -> None:
    """Equal trees of arrays, bit for bit."""
    assert jax.tree.structure(mine) == jax.tree.structure(theirs)
    for a, b in zip(jax.tree.leaves(mine), jax.tree.leaves(theirs), strict=True):
        assert isinstance(a, jax.Array) and a.dtype == b.dtype
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


def grouped(rng: np.random.Generator) -> tuple[dict[str, Any], Any]:
    """Arguments of grouped_gemm with a gather and a bias, and a function that gives the result for other offsets."""
    x, w = rng.standard_normal((13, 24), np.float32), rng.standard_normal((4, 16, 24), np.float32)
    gather, bias = rng.integers(-1, 14, 20, np.int32), rng.standard_normal((4, 16), np.float32)
    rows = np.where(((gather >= 0) & (gather < 13))[:, None], x[gather.clip(0, 12)], 0)

    def want(offsets: Any) -> Any:
        out = np.zeros((20, 16))
        for e, (first, last) in enumerate(itertools.pairwise(offsets)):
            out[first:last] = rows[first:last].astype(np.float64) @ w[e].T + bias[e]
        return out

    offsets = np.array([1, 5, 5, 9, 17], np.int32)
    return {"x": x, "w": w, "offsets": offsets, "gather_indices": gather, "bias": bias}, want


# ------------------------------------------------------------------------------------------------------------- results


@pytest.mark.parametrize("case", MOE, ids=str)
def test_fused_moe(case: MoECase, device: Any) -> None:
    arrays, options = case.random(), case.options()
    given = put(arrays)
    eager = flashmoe_cupy.fused_moe(**given, **options)
    assert isinstance(eager, jax.Array) and eager.dtype == case.dtype and eager.devices() == {device}
    verdict = within_tolerance(
        np.asarray(eager).astype(np.float64), reference.fused_moe(**arrays, **options), case.dtype
    )
    assert verdict, verdict.text
    # inside a larger program, where XLA decides on all buffers
    inside = jax.jit(lambda a: flashmoe_cupy.fused_moe(**(a | {"x": a["x"] * 1}), **options) * 1)
    for _ in range(2):
        same(inside(given), eager)


@pytest.mark.parametrize("case", ROUTES, ids=str)
def test_moe_route_and_permute(case: RouteCase) -> None:
    arrays, options = case.random(), case.options() | {"return_stats": True}
    given = put(arrays)
    eager = flashmoe_cupy.moe_route(**given, **options)
    want = reference.moe_route(**arrays, **options)
    np.testing.assert_array_equal(np.asarray(eager[1]), want[1])
    np.testing.assert_allclose(np.asarray(eager[0]), want[0], rtol=2e-5, atol=1e-7)
    for name in eager[2]._fields:
        np.testing.assert_allclose(np.asarray(getattr(eager[2], name)), getattr(want[2], name), rtol=1e-5)
    same(jax.jit(lambda a: flashmoe_cupy.moe_route(**a, **options))(given), eager)
    same(flashmoe_cupy.moe_route(**given, **(options | {"return_stats": False})), eager[:2])
    order = flashmoe_cupy.moe_permute(eager[1], num_experts=case.experts)
    for mine, theirs in zip(order, reference.moe_permute(want[1], num_experts=case.experts), strict=True):
        np.testing.assert_array_equal(np.asarray(mine), theirs)
    same(jax.jit(lambda ids: flashmoe_cupy.moe_permute(ids, num_experts=case.experts))(eager[1]), order)


def test_grouped_gemm(rng: np.random.Generator) -> None:
    """The offsets are data: one program for all of them, and rows of no group are 0 whatever the buffer held."""
    arrays, want = grouped(rng)
    given = put(arrays)
    function = jax.jit(lambda a: flashmoe_cupy.grouped_gemm(**a))
    for offsets in ([1, 5, 5, 9, 17], [0, 20, 20, 20, 20], [20, 20, 20, 20, 20], [3, 4, 5, 6, 7]):
        out = function(given | {"offsets": jnp.asarray(offsets, jnp.int32)})
        np.testing.assert_allclose(np.asarray(out), want(offsets), rtol=1e-5, atol=1e-5)
    assert function._cache_size() == 1
    x = rng.standard_normal((4, 6, 24)).astype(np.float32)
    sizes = np.array([6, 0, 3, 1], np.int32)
    out = np.asarray(
        jax.jit(flashmoe_cupy.grouped_gemm)(x=jnp.asarray(x), w=given["w"], group_sizes=jnp.asarray(sizes))
    )
    masked = np.where((np.arange(6) < sizes[:, None])[..., None], x @ arrays["w"].swapaxes(1, 2), 0)
    np.testing.assert_allclose(out, masked, rtol=1e-5, atol=1e-5)


def test_nothing() -> None:
    case = MoECase(0, 64, 32, 6, 3, "float32")
    assert flashmoe_cupy.fused_moe(**put(case.random()), **case.options()).shape == (0, 64)
    weights, ids, stats = flashmoe_cupy.moe_route(jnp.zeros((0, 8)), top_k=2, return_stats=True)
    assert weights.shape == ids.shape == (0, 2) and ids.dtype == jnp.int32 and float(stats.z_loss) == 0
    np.testing.assert_array_equal(flashmoe_cupy.moe_permute(ids, num_experts=3).offsets, np.zeros(4))


def test_options_of_another_type_are_another_call() -> None:
    """2 == 2.0 and True == 1, and yet only one of each is right."""
    logits = jnp.asarray(RouteCase(3, 8).random()["logits"])
    flashmoe_cupy.moe_route(logits, top_k=2, renormalize=True)
    with pytest.raises(UnsupportedProblem, match="top_k"):
        flashmoe_cupy.moe_route(logits, top_k=2.0, renormalize=True)  # type: ignore[call-overload]


# ---------------------------------------------------------------------------------------------------------- transforms


def test_layer_whose_weights_are_traced() -> None:
    rng = np.random.default_rng(0)
    x, r = rng.standard_normal((2, 9, 16), np.float32), rng.standard_normal((6, 16), np.float32)
    w1, w2 = rng.standard_normal((6, 48, 16), np.float32), rng.standard_normal((6, 16, 24), np.float32)

    def layer(x: Any, r: Any, w1: Any, w2: Any) -> Any:
        return FlashMoELayer(16, 6, 2, 24, router_weight=r, w_gate_up=w1, w_down=w2, shared_gate_weight=None)(x)

    want = layer(x, r, w1, w2)
    with jax.default_matmul_precision("highest"):  # the router's logits are JAX's own product
        got = jax.jit(layer)(x, r, w1, w2)
    np.testing.assert_allclose(np.asarray(got), want, rtol=2e-4, atol=2e-4)


def test_scan_and_vmap() -> None:
    case = MOE[2]
    given, options = put(case.random()), case.options()

    def step(x: Any, _: Any) -> tuple[Any, Any]:
        out = flashmoe_cupy.fused_moe(**(given | {"x": x}), **options)
        return out, out

    last, every = jax.lax.scan(step, given["x"], length=3)
    by_hand = given["x"]
    for i in range(3):
        by_hand = step(by_hand, None)[0]
        same(every[i], by_hand)
    same(last, by_hand)
    xs = jnp.stack([given["x"], given["x"][::-1]])
    mapped = jax.vmap(lambda x: step(x, None)[0])(xs)
    for i in range(2):
        same(mapped[i], step(xs[i], None)[0])


def test_shard_map(device: Any) -> None:
    """Tokens over a mesh, weights on every device: inside, each device has its own call."""
    if not hasattr(jax, "shard_map"):
        pytest.skip("this JAX has no jax.shard_map")
    case = MOE[2]._replace(tokens=12)
    given, options = put(case.random()), case.options()
    mesh = jax.sharding.Mesh(np.array([device]), ("tokens",))
    spec = jax.sharding.PartitionSpec
    split = {name: spec("tokens") if name in ("x", "topk_weights", "topk_ids") else spec() for name in given}
    function = jax.shard_map(
        lambda a: flashmoe_cupy.fused_moe(**a, **options), mesh=mesh, in_specs=(split,), out_specs=spec("tokens")
    )
    same(jax.jit(function)(given), flashmoe_cupy.fused_moe(**given, **options))


def test_gradients_are_refused() -> None:
    given, options = put(MOE[1].random()), MOE[1].options()

    def loss(x: Any) -> Any:
        return flashmoe_cupy.fused_moe(**(given | {"x": x}), **options).sum()

    with pytest.raises(UnsupportedProblem, match="the gradient of moe fp32") as info:
        jax.grad(loss)(given["x"])
    assert "stop_gradient" in info.value.hint
    with pytest.raises(UnsupportedProblem, match="the gradient of route"):
        jax.grad(lambda x: flashmoe_cupy.moe_route(x, top_k=2)[0].sum())(jnp.ones((3, 8)))


# --------------------------------------------------------------------------------------------------------------- errors


def test_errors(monkeypatch: pytest.MonkeyPatch) -> None:
    given, options = put(MOE[2].random()), MOE[2].options()
    traced = jax.jit(lambda a: flashmoe_cupy.fused_moe(**a, **options))
    with pytest.raises(UnsupportedProblem, match=r"looks like \(E, n, hidden\)|w_down"):
        traced(given | {"w_down": given["w_down"].swapaxes(1, 2)})
    with pytest.raises(UnsupportedProblem, match=r"topk_ids is a numpy\.ndarray, not a JAX array"):
        flashmoe_cupy.fused_moe(**(given | {"topk_ids": np.zeros((11, 2), np.int32)}), **options)
    with pytest.raises(UnsupportedProblem, match="immutable"):
        flashmoe_cupy.fused_moe(**given, **options, out=given["x"])
    with pytest.raises(AttributeError, match="no attribute 'softmax'"):
        flashmoe_cupy.jax.softmax  # type: ignore[attr-defined]  # noqa: B018
    assert flash_attention.__module__ == flashmoe_cupy.jax.fused_moe.__module__ == "flashmoe_cupy.jax"


def test_errors_from_inside_a_program(device: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    if device.platform != "cpu":
        pytest.skip("on a GPU nobody looks at the ids")
    monkeypatch.setenv("FLASHMOE_CHECK", "1")
    _env.reload()
    try:
        with pytest.raises(Exception, match=r"topk_ids\[1, 0\] is -7"):
            jax.jit(lambda i: flashmoe_cupy.moe_permute(i, num_experts=4))(
                jnp.asarray([[0, 1], [-7, 2]], jnp.int32)
            ).offsets.block_until_ready()
        with pytest.raises(Exception, match=r"logits\[1, 2\] is NaN"):
            jax.jit(lambda x: flashmoe_cupy.moe_route(x, top_k=1))(
                jnp.asarray([[0.0, 1.0, 2.0], [0.0, 1.0, jnp.nan]])
            )[0].block_until_ready()
    finally:
        monkeypatch.undo()
        _env.reload()


def test_a_program_of_another_process() -> None:
    """A program whose problem this process does not know reads it from the text; of another version, it says so."""
    case = MOE[1]
    given, options = put(case.random()), case.options()
    program = jax.jit(lambda a: flashmoe_cupy.fused_moe(**a, **options)).lower(given).compile()
    want, known = program(given), dict(_xla._known)
    _xla._known.clear()
    same(program(given), want)
    (key,) = _xla._known
    assert _xla._known[key] == known[key]
    text = '{"operation": "fused_moe", "problem": {"dtype": "bfloat16"}, "inputs": [], "results": []}'
    call = SimpleCall(_xla_ffi.CALL, 1, text, [], [])
    with pytest.raises(_xla_ffi.FfiError, match="another version"):
        _xla.run_cpu(call)  # type: ignore[arg-type]
    _xla._known.update(known)


def test_ends_with_work_in_flight() -> None:
    text = (
        "import jax, jax.numpy as jnp\n"
        "from flashmoe_cupy import moe_route\n"
        "f = jax.jit(lambda x: moe_route(x, top_k=4))\n"
        "for i in range(20): f(jnp.ones((2000, 64)) * i)\n"
    )
    subprocess.run([sys.executable, "-c", text], check=True, timeout=120)


# --------------------------------------------------------------------------------- what XLA asks for on a GPU, emulated


class SimpleCall:
    """A call of XLA's with buffers of ours."""

    def __init__(self, stage: int, key: int, text: str, inputs: list[Any], outputs: list[Any]) -> None:
        self.stage, self.key, self._text, self._in, self._out = stage, key, text, inputs, outputs

    def text(self) -> str:
        return self._text

    def inputs(self) -> list[int]:
        return [int(x.ctypes.data) for x in self._in]

    def outputs(self) -> list[int]:
        return [int(x.ctypes.data) for x in self._out]

    def stream(self) -> int:
        return 5

    def device(self) -> int:
        return 0


def on_machine(machine: Any, op: str, arrays: dict[str, Any], options: dict[str, Any]) -> list[Any]:
    """The results of the CUDA handler, first at LOAD and then at CALL, in buffers of garbage."""
    given = {name: jnp.asarray(x) for name, x in arrays.items()}
    operation = registered(op)
    names = [name for name in operation.arguments if name in arrays]
    views = {n: _view(op, n, given[n]) for n in names}
    defaults = {n: its.default for n, its in inspect.signature(operation.function).parameters.items()}
    options = {n: options.get(n, defaults[n]) for n in operation.options}
    problem = operation.make(**views, **options)
    made = forms(operation, views, options)
    inputs = [(n, v.shape, v.dtype.name) for n, v in views.items()]
    key, text = _xla.register(operation, problem, inputs, [(form.name, form.shape, form.dtype.name) for form in made])
    sizes = [(form.shape, form.dtype) for form in made]
    sizes += [((size,), UINT8)] if (size := gpu.workspace_bytes(operation, problem)) else []
    outputs = [np.full(shape, 0x7B, np.uint8).astype(to_numpy(dtype)) for shape, dtype in sizes]
    buffers = [np.ascontiguousarray(arrays[n]) for n in names]
    loaded = []
    for stage in (_xla_ffi.LOAD, _xla_ffi.CALL):
        _xla.run_cuda(SimpleCall(stage, key, text, buffers, outputs))  # type: ignore[arg-type]
        loaded.append(len(machine.kernels))
    assert loaded[0] == loaded[1] > 1  # LOAD has made all that CALL wants
    return outputs[: len(made)]


@pytest.fixture(params=[(9, 0), (8, 0)], ids=["hopper", "ampere"])
def machine(request: pytest.FixtureRequest, device: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    emulate = pytest.importorskip("emulate")
    if emulate.missing():
        pytest.skip(emulate.missing())
    from test_emulated_ops import Machine

    fake = Machine(request.param)
    monkeypatch.setattr(gpu, "driver", fake)
    monkeypatch.setattr(LaunchSequence, "run", fake.run)
    gpu._loaded.clear()
    yield fake
    gpu._loaded.clear()


@pytest.mark.parametrize("device", ["cpu"], indirect=True)
def test_emulated_fused_moe(machine: Any) -> None:
    case = MoECase(20, 64, 40, 4, 2, shared=24, shared_gate="same", global_experts=7, biases="float32")
    arrays = case.random()
    (out,) = on_machine(machine, "fused_moe", arrays, case.options())
    verdict = within_tolerance(out.astype(np.float64), reference.fused_moe(**arrays, **case.options()), case.dtype)
    assert verdict, verdict.text


@pytest.mark.parametrize("device", ["cpu"], indirect=True)
def test_emulated_route_permute_and_product(machine: Any, rng: np.random.Generator) -> None:
    case = RouteCase(40, 24, 3, "float16", "sigmoid", True, 2.0, "float32", 4, 2, 0.9)
    arrays, options = case.random(), case.options()
    want = reference.moe_route(**arrays, **options, return_stats=True)
    weights, ids, *stats = on_machine(machine, "moe_route", arrays, options | {"return_stats": True})
    np.testing.assert_array_equal(ids, want[1])
    np.testing.assert_allclose(weights, want[0], rtol=2e-6)
    for mine, theirs in zip(stats, want[2], strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=1e-5)
    found = on_machine(machine, "moe_permute", {"topk_ids": ids}, {"num_experts": 24})
    for mine, theirs in zip(found, reference.moe_permute(want[1], num_experts=24), strict=True):
        np.testing.assert_array_equal(mine, theirs)
    given, product = grouped(rng)
    (out,) = on_machine(machine, "grouped_gemm", given, {})
    np.testing.assert_allclose(out, product(given["offsets"]), rtol=1e-5, atol=1e-5)
