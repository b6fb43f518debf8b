"""JAX: eager, jit, scan, vmap, shard_map; errors from inside XLA; threads, leaks, other processes' programs."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
import tracemalloc
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from flashmoe_cupy import reference
from flashmoe_cupy.errors import UnsupportedProblem
from flashmoe_cupy.ops import gpu
from flashmoe_cupy.plan.attention.problem import attention_problem
from flashmoe_cupy.plan.operation import registered
from flashmoe_cupy.testing import TOLERANCES, AttentionCase, VarlenCase, compare_lse, within_tolerance

jax = pytest.importorskip("jax")
jnp = jax.numpy

from flashmoe_cupy import _xla  # noqa: E402
from flashmoe_cupy import jax as fm  # noqa: E402

pytestmark = pytest.mark.jax
GPU = pytest.param("gpu", marks=[pytest.mark.gpu, pytest.mark.sm80])
SMALL = AttentionCase(9, 11, heads_q=4, heads_k=2, head_dim=16, head_dim_v=8, dtype="float32", causal=True)
CASES = [
    AttentionCase(33, 70, heads_q=4, heads_k=2, head_dim=64, head_dim_v=32, dtype="bfloat16", causal=True),
    AttentionCase(40, 24, dtype="float16", window_size=(7, 3), sinks="same", alibi="bh"),
    AttentionCase(24, 40, dtype="float32", softcap=5.0, softmax_scale=0.3, bias="h1k", alibi="h", sinks="float32"),
    AttentionCase(17, 19, dtype="bfloat16", bias="b1qk", bias_dtype="bool"),
    AttentionCase(17, 19, dtype="float16", bias="qk", bias_dtype="float32", heads_q=6),
    AttentionCase(33, 40, used_q=(33, 9), used_k=(40, 12), left_q=(5, 0), left_k=(2, 10), causal=True, heads_q=4),
    AttentionCase(17, 19, dtype="float16", used_k=(3, 19), bias="b11k"),
]
VARLEN = VarlenCase(
    (5, 0, 13, 7), (9, 3, 0, 21), used_q=(4, 0, 13, 7), used_k=(9, 2, 0, 17), tail_q=3, tail_k=2, heads_q=4,
    dtype="float16", causal=True, sinks="float32", alibi="bh",
)  # fmt: skip


@pytest.fixture(params=["cpu", GPU])
def device(request: pytest.FixtureRequest) -> Iterator[Any]:
    """JAX's default device for the test: the CPU, and on a machine with a GPU that too."""
    with jax.default_device(jax.devices(request.param)[0]) as _:
        yield jax.devices(request.param)[0]


@pytest.fixture
def cpu() -> Iterator[None]:
    with jax.default_device(jax.devices("cpu")[0]):
        yield


def _put(arrays: dict[str, Any]) -> dict[str, Any]:
    return {name: jnp.asarray(x) for name, x in arrays.items()}


def _random(case: AttentionCase | VarlenCase, seed: int = 0) -> dict[str, Any]:
    return dict(case.random(seed))


def _swap(arrays: dict[str, Any]) -> dict[str, Any]:
    """bshd <-> bhsd of q, k and v."""
    return {name: x.swapaxes(1, 2) if name in ("q", "k", "v") else x for name, x in arrays.items()}


def _check(result: Any, want: Any, case: Any) -> None:
    """out against the float64 reference, and lse where both are pairs."""
    pairs = isinstance(want, tuple)
    out, ref = (result[0], want[0]) if pairs else (result, want)
    assert isinstance(out, jax.Array) and out.dtype == case.dtype
    verdict = within_tolerance(np.asarray(out).astype(np.float64), ref, case.dtype, softcap=case.softcap)
    assert verdict, verdict.text
    if pairs:
        assert result[1].dtype == np.float32
        verdict = compare_lse(np.asarray(result[1]), want[1], atol=TOLERANCES[case.dtype].lse)
        assert verdict, verdict.text


# ------------------------------------------------------------------------------------------------------------- results


@pytest.mark.parametrize("layout", ["bshd", "bhsd"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_eager_and_jit(case: AttentionCase, layout: str, device: Any) -> None:
    arrays = _random(case)
    if layout == "bhsd":
        arrays = _swap(arrays)
    options = case.options() | {"layout": layout, "return_lse": True}
    want = reference.flash_attention(**arrays, **options)
    given = _put(arrays)
    eager = fm.flash_attention(**given, **options)
    assert eager[0].devices() == {device}
    _check(eager, want, case)
    # inside a larger program, where XLA decides on all buffers
    jitted = jax.jit(lambda a: jax.tree.map(lambda x: x * 1, fm.flash_attention(**(a | {"q": a["q"] * 1}), **options)))
    for mine, theirs in zip(jitted(given), eager, strict=True):
        np.testing.assert_array_equal(np.asarray(mine), np.asarray(theirs))
    alone = fm.flash_attention(**given, **(options | {"return_lse": False}))
    np.testing.assert_array_equal(np.asarray(alone), np.asarray(eager[0]))


def test_varlen(device: Any) -> None:
    case = VARLEN
    arrays, options = _random(case), case.options() | {"return_lse": True}
    want = reference.flash_attention_varlen(**arrays, **options)
    function = jax.jit(lambda a: fm.flash_attention_varlen(**a, **options))
    for _ in range(2):  # the buffers of the second call hold what the first one left
        result = function(_put(arrays))
        _check(result, want, case)
        np.testing.assert_array_equal(np.asarray(result[0])[-3:], 0)
        np.testing.assert_array_equal(np.asarray(result[1])[:, -3:], -np.inf)
    # other offsets, same program: the offsets are data
    moved = dict(arrays, cu_seqlens_q=np.array([0, 13, 13, 18, 25], np.int32))
    del moved["seqused_q"]
    moved["q"] = np.nan_to_num(moved["q"])
    options["max_seqlen_q"] = 14
    want = reference.flash_attention_varlen(**moved, **options)
    _check(fm.flash_attention_varlen(**_put(moved), **options), want, case)


@pytest.mark.parametrize(("batch", "seqlen_q", "seqlen_k"), [(0, 4, 4), (2, 0, 4), (2, 4, 0)])
def test_empty(batch: int, seqlen_q: int, seqlen_k: int, device: Any) -> None:
    case = SMALL._replace(batch=batch, seqlen_q=seqlen_q, seqlen_k=seqlen_k, sinks="float32")
    arrays, options = _random(case), case.options() | {"return_lse": True}
    out, lse = fm.flash_attention(**_put(arrays), **options)
    want_out, want_lse = reference.flash_attention(**arrays, **options)
    np.testing.assert_array_equal(np.asarray(out), want_out)
    np.testing.assert_allclose(np.asarray(lse), want_lse, rtol=1e-6)


def test_scan(device: Any) -> None:
    arrays = _put(_random(SMALL._replace(head_dim_v=16, seqlen_q=11)))
    k, v = arrays["k"], arrays["v"]

    def layer(x: Any, scale: Any) -> tuple[Any, None]:
        return x + scale * fm.flash_attention(x, k, v, causal=True), None

    scales = jnp.linspace(0.1, 1.0, 6)
    scanned = jax.jit(lambda x: jax.lax.scan(layer, x, scales)[0])(arrays["q"])
    x = arrays["q"]
    for scale in scales:
        x, _ = layer(x, scale)
    np.testing.assert_allclose(np.asarray(scanned), np.asarray(x), rtol=2e-5, atol=2e-5)


# ---------------------------------------------------------------------------------------------------------- transforms


def _vmap_reference(arrays: dict[str, Any], axes: dict[str, int | None], size: int, **options: Any) -> Any:
    """Stacked results of the reference, one call after the other."""

    def one(i: int) -> Any:
        return reference.flash_attention(
            **{n: x if axes[n] is None else np.take(x, i, axes[n]) for n, x in arrays.items()}, **options
        )

    results = [one(i) for i in range(size)]
    return tuple(np.stack([r[part] for r in results]) for part in range(2))


@pytest.mark.parametrize("layout", ["bshd", "bhsd"])
@pytest.mark.parametrize(
    ("extra", "axes", "calls"),
    [
        ({}, {}, 1),
        ({}, {"k": None, "v": None, "q": 2}, 1),
        ({"bias": (2, 4, 9, 11)}, {"bias": None}, 1),
        ({"bias": (1, 1, 9, 11)}, {"bias": None}, 1),
        ({"bias": (3, 9, 11)}, {"bias": 0}, 1),
        ({"bias": (4, 9, 3, 11)}, {"bias": 2, "q": None}, 1),
        ({"alibi_slopes": (4,)}, {"alibi_slopes": None}, 1),
        ({"alibi_slopes": (3, 4)}, {}, 1),
        ({"alibi_slopes": (2, 4)}, {"alibi_slopes": None}, 1),
        ({"sinks": (4,)}, {"sinks": None}, 1),
        ({"sinks": (3, 4)}, {}, 3),
    ],
)
def test_vmap(
    extra: dict[str, Any],
    axes: dict[str, int | None],
    calls: int,
    layout: str,
    device: Any,
    rng: np.random.Generator,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    single = _random(SMALL)
    if layout == "bhsd":
        single = _swap(single)
    all_axes: dict[str, int | None] = {name: axes.get(name, 0) for name in (*single, *extra)}
    shapes = {name: x.shape for name, x in single.items()}
    for name, axis in all_axes.items():
        if name in shapes and axis is not None:
            shapes[name] = (*shapes[name][:axis], 3, *shapes[name][axis:])
    arrays = {name: rng.standard_normal(shape).astype(np.float32) for name, shape in (shapes | extra).items()}
    options = {"causal": True, "layout": layout, "return_lse": True}
    count: list[int] = []
    operation = registered("flash_attention")
    monkeypatch.setattr(operation, "host", _counted(operation.host, count))
    result = jax.jit(jax.vmap(partial(_attention, options), in_axes=(all_axes,)))(_put(arrays))
    want = _vmap_reference(arrays, all_axes, 3, **options)
    assert result[0].shape == want[0].shape and result[1].shape == want[1].shape
    np.testing.assert_allclose(np.asarray(result[0]), want[0], rtol=2e-4, atol=2e-5)
    np.testing.assert_allclose(np.asarray(result[1]), want[1], rtol=2e-4, atol=2e-5)
    if device.platform == "cpu":
        assert len(count) == calls


def _attention(options: dict[str, Any], arrays: dict[str, Any]) -> Any:
    return fm.flash_attention(**arrays, **options)


def _counted(function: Callable[..., Any], calls: list[int]) -> Callable[..., Any]:
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        return function(*args, **kwargs)

    return wrapper


def test_vmap_of_varlen(device: Any) -> None:
    arrays, options = _random(VARLEN), VARLEN.options()
    stacked = {name: np.stack([x, x[::-1]]) if name == "q" else x for name, x in arrays.items()}
    stacked["q"] = np.nan_to_num(stacked["q"])
    axes = {name: 0 if name == "q" else None for name in stacked}
    result = jax.vmap(lambda a: fm.flash_attention_varlen(**a, **options), in_axes=(axes,))(_put(stacked))
    for i in range(2):
        want = reference.flash_attention_varlen(**(arrays | {"q": stacked["q"][i]}), **options)
        _check(result[i], want, VARLEN)


@pytest.mark.skipif(not hasattr(jax, "shard_map"), reason="this JAX has no jax.shard_map")
def test_shard_map(device: Any) -> None:
    """Offsets that are the same on all shards meet queries that are not."""
    mesh = jax.sharding.Mesh(np.array([device]), ("x",))
    split, same = jax.sharding.PartitionSpec(None, "x"), jax.sharding.PartitionSpec()
    arrays, options = _random(VARLEN._replace(alibi="", sinks="")), VARLEN.options()
    specs = {name: split if name in ("q", "k", "v") else same for name in arrays}
    function = jax.shard_map(
        lambda a: fm.flash_attention_varlen(**a, **options), mesh=mesh, in_specs=(specs,), out_specs=split
    )
    want = reference.flash_attention_varlen(**arrays, **options)
    _check(jax.jit(function)(_put(arrays)), want, VARLEN)


@pytest.mark.usefixtures("cpu")
def test_gradients_that_are_refused() -> None:
    """Those of an operation that has none. Those of attention: test_jax_gradient.py."""
    arrays = _put(_random(SMALL))

    def loss(q: Any) -> Any:
        return fm.attention_lse(q, arrays["k"]).sum()

    for attempt in (jax.grad(loss), jax.jit(jax.grad(loss)), lambda q: jax.jvp(loss, (q,), (q,))):
        with pytest.raises(UnsupportedProblem, match="no backward pass") as info:
            attempt(arrays["q"])
        assert "stop_gradient" in info.value.hint
    # no gradient flows through the attention: nothing to refuse
    gradient = jax.grad(lambda q: (q * loss(jax.lax.stop_gradient(q))).sum())(arrays["q"])
    np.testing.assert_allclose(np.asarray(gradient), float(loss(arrays["q"])), rtol=1e-6)


# --------------------------------------------------------------------------------------------------------------- errors


@pytest.mark.usefixtures("cpu")
def test_arguments_are_checked() -> None:
    arrays = _put(_random(SMALL))
    q, k, v = arrays["q"], arrays["k"], arrays["v"]
    with pytest.raises(UnsupportedProblem, match=r"k is a numpy\.ndarray.*\n.*v is a builtins\.list"):
        fm.flash_attention(q, np.asarray(k), [1])
    fm.flash_attention(q, k, v)
    with pytest.raises(UnsupportedProblem, match=r"v is a numpy\.ndarray"):  # the same shapes as a call that worked
        fm.flash_attention(q, k, np.asarray(v))
    with pytest.raises(UnsupportedProblem, match="immutable"):
        fm.flash_attention(q, k, v, out=q)
    with pytest.raises(UnsupportedProblem, match="q has dtype int32"):
        fm.flash_attention(q.astype(jnp.int32), k, v)
    with pytest.raises(UnsupportedProblem, match="k has dtype complex64"):
        fm.flash_attention(q, k.astype(jnp.complex64), v)
    with pytest.raises(UnsupportedProblem, match="heads"):
        fm.flash_attention(q[:, :, :3], k, v)
    with pytest.raises(UnsupportedProblem, match="softmax_scale must be"):
        jax.jit(lambda s: fm.flash_attention(q, k, v, softmax_scale=s))(0.5)
    with pytest.raises(UnsupportedProblem, match="window_size"):
        fm.flash_attention(q, k, v, window_size=3)  # type: ignore[call-overload]
    np.testing.assert_array_equal(
        np.asarray(fm.flash_attention(q, k, v, window_size=[2, 0])),
        np.asarray(fm.flash_attention(q, k, v, window_size=(2, 0))),
    )


@pytest.mark.usefixtures("cpu")
def test_errors_of_the_data_reach_python() -> None:
    arrays, options = _random(VARLEN), VARLEN.options()
    function = jax.jit(lambda a: fm.flash_attention_varlen(**a, **options))
    bad = arrays | {"cu_seqlens_q": np.array([0, 5, 5, 18, 99], np.int32)}
    with pytest.raises(jax.errors.JaxRuntimeError, match=r"(?s)INVALID_ARGUMENT.*cu_seqlens_q must not fall"):
        jax.block_until_ready(function(_put(bad)))
    jax.block_until_ready(function(_put(arrays)))  # the program and the runtime are still whole


def test_errors_of_the_handler_reach_python(device: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing escapes into XLA's threads, not even what is no Exception, and the next call is fine."""
    arrays = _random(SMALL)
    function = jax.jit(lambda a: fm.flash_attention(**a, causal=True))
    want = reference.flash_attention(**arrays, causal=True)

    def broken(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt("stop \0 here é")

    for _ in range(2):
        with monkeypatch.context() as patch:
            if device.platform == "cpu":
                patch.setattr(registered("flash_attention"), "host", broken)
            else:
                patch.setattr(gpu, "launch", broken)
            with pytest.raises(jax.errors.JaxRuntimeError, match=r"INTERNAL.*KeyboardInterrupt: stop \? here é"):
                jax.block_until_ready(function(_put(arrays)))
        _check(function(_put(arrays)), want, SMALL)


def test_inputs_are_not_written(device: Any, rng: np.random.Generator) -> None:
    x = jnp.asarray(rng.standard_normal((2, 8, 2, 16)), jnp.float32)
    before = np.array(x)
    out = fm.flash_attention(x, x, x, causal=True)
    jax.block_until_ready(out)
    np.testing.assert_array_equal(np.asarray(x), before)
    np.testing.assert_allclose(np.asarray(out)[:, 0], before[:, 0], rtol=1e-6)  # the first query sees the first key


# ------------------------------------------------------------------------------------------------------ many calls


def test_no_leak(device: Any) -> None:
    arrays = _put(_random(SMALL))
    q, k, v = arrays["q"], arrays["k"], arrays["v"]
    function = jax.jit(lambda q, k, v: fm.flash_attention(q, k, v, causal=True, return_lse=True))

    def calls(n: int) -> None:
        for _ in range(n):
            jax.block_until_ready((function(q, k, v), fm.flash_attention(q, k, v, causal=True)))

    def period() -> tuple[int, int]:
        gc.collect()
        before, objects = tracemalloc.get_traced_memory()[0], len(gc.get_objects())
        calls(1000)
        gc.collect()
        return tracemalloc.get_traced_memory()[0] - before, len(gc.get_objects()) - objects

    calls(1500)  # NumPy keeps the memory of some hundred shapes, which it gathers slowly; a leak grows in every period
    tracemalloc.start()
    try:
        calls(50)
        grown, more = (min(of) for of in zip(*[period() for _ in range(3)], strict=True))
    finally:
        tracemalloc.stop()
    assert grown < 20_000, f"{grown} bytes more after 2000 calls"
    assert more < 100, f"{more} objects more after 2000 calls"


@pytest.mark.usefixtures("cpu")
def test_no_leak_of_errors() -> None:
    """An error is an object of XLA's; it must die with the exception. Counted by the process's memory."""
    arrays, options = _random(VARLEN), VARLEN.options()
    options["max_seqlen_q"] = 1
    given = _put(arrays)

    def fails(n: int) -> None:
        for _ in range(n):
            with pytest.raises(jax.errors.JaxRuntimeError, match="max_seqlen_q is 1"):
                jax.block_until_ready(fm.flash_attention_varlen(**given, **options))

    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    if not Path("/proc/self/statm").exists():
        pytest.skip("needs /proc")
    fails(100)
    before = resident()
    fails(400)
    assert resident() - before < 4 << 20


def test_threads(device: Any) -> None:
    cases = [SMALL._replace(seqlen_q=5 + i, seqlen_k=30 - i, heads_q=2 * (1 + i % 3)) for i in range(8)]
    wants = [reference.flash_attention(**_random(case, i), **case.options()) for i, case in enumerate(cases)]

    def work(i: int) -> None:
        case, want = cases[i % 8], wants[i % 8]
        with jax.default_device(device):  # the setting belongs to a thread
            for _ in range(10):
                _check(fm.flash_attention(**_put(_random(case, i % 8)), **case.options()), want, case)

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(work, range(16)))


@pytest.mark.usefixtures("cpu")
def test_programs_of_another_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """A program that this process did not build carries its problem with it."""
    case = SMALL._replace(bias="b1qk", bias_dtype="float32", window_size=(3, -1), sinks="float32")
    arrays, options = _random(case), case.options()
    want = reference.flash_attention(**arrays, **options)
    program = jax.jit(lambda a: fm.flash_attention(**a, **options)).lower(_put(arrays)).compile()
    monkeypatch.setattr(_xla, "_known", {})  # as in a process that has never seen it
    _check(program(_put(arrays)), want, case)
    monkeypatch.setattr(_xla, "_known", {})
    monkeypatch.setattr(registered("flash_attention"), "problem", lambda batch: batch)  # as with another set of fields
    # a compiled program called directly raises JAX's INVALID_ARGUMENT as ValueError
    with pytest.raises((jax.errors.JaxRuntimeError, ValueError), match="another version of flashmoe_cupy"):
        jax.block_until_ready(program(_put(arrays)))


_TWO_DEVICES = """
import jax, numpy as np
from flashmoe_cupy import _xla, jax as fm
assert len(jax.devices()) == 2
q = np.random.default_rng(0).standard_normal((2, 8, 2, 16)).astype(np.float32)
spec = jax.sharding.PartitionSpec("x")
mesh = jax.sharding.Mesh(np.array(jax.devices()), ("x",))
spread = jax.device_put(q, jax.sharding.NamedSharding(mesh, spec))
def call(x):
    return fm.flash_attention(x, x, x, window_size=(3, 0))
want = np.asarray(call(jax.numpy.asarray(q)))
near = dict(rtol=0, atol=1e-6)  # a part of the batch is another shape, which NumPy may sum in another order
np.testing.assert_allclose(np.asarray(call(spread)), want, **near)
if hasattr(jax, "shard_map"):
    split = jax.jit(jax.shard_map(call, mesh=mesh, in_specs=spec, out_specs=spec))(spread)
    assert len(split.devices()) == 2
    np.testing.assert_allclose(np.asarray(split), want, **near)
print(list(_xla._known)[0])
"""


@pytest.mark.usefixtures("cpu")
def test_two_devices() -> None:
    """Spread arguments give the right values, also in shard_map; a problem has the same key in all processes."""
    q = jnp.zeros((2, 8, 2, 16), jnp.float32)
    views = {name: fm._view("flash_attention", name, q) for name in "qkv"}
    problem = attention_problem(**views, window_size=(3, 0))
    forms = [(name, q.shape, "float32") for name in ("q", "k", "v", "out")]
    key, _ = _xla.register(registered("flash_attention"), problem, forms[:3], forms[3:])
    env = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=2", "JAX_PLATFORMS": "cpu"}
    env["PYTHONPATH"] = os.pathsep.join(p for p in (str(Path(__file__).parents[1]), env.get("PYTHONPATH", "")) if p)
    done = subprocess.run(
        [sys.executable, "-c", _TWO_DEVICES], env=env, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.stdout == f"{key}\n", done.stderr


# ------------------------------------------------------------------------------------------------------------ on a GPU


@pytest.mark.gpu
@pytest.mark.sm80
def test_gpu_order_and_graphs() -> None:
    """Inside a long program the kernel waits for its inputs and is waited for, also when XLA replays a CUDA graph."""
    device = jax.devices("gpu")[0]
    case = AttentionCase(300, 300, heads_q=4, heads_k=2, dtype="bfloat16", causal=True)
    arrays = _random(case)
    want = reference.flash_attention(**arrays, causal=True)

    def long_program(q: Any, k: Any, v: Any, busy: Any) -> Any:
        for _ in range(20):  # ahead on the same stream: a kernel that does not wait reads q too early
            busy = jnp.tanh(busy @ busy)
        one = 1 + 0 * busy[0, 0]
        first = fm.flash_attention((q * one).astype(q.dtype), k, v, causal=True)
        second = fm.flash_attention(q, k, first[:, :, :2], causal=False)
        third = fm.flash_attention(q, k, jnp.flip(v * one.astype(v.dtype), 1), causal=True)
        return first, second, third + 0 * second

    program = jax.jit(long_program)
    with jax.default_device(device):
        busy = jnp.full((2048, 2048), 1e-4, jnp.float32)
        held, firsts = [], []
        for _ in range(6):  # the first runs, later ones may be recorded and replayed, with other buffers each time
            given = _put(arrays)
            held.append(given)
            firsts.append(program(given["q"], given["k"], given["v"], busy))
        for first, second, third in firsts:
            _check(first, want, case)
            for mine, theirs in ((second, firsts[0][1]), (third, firsts[0][2])):
                np.testing.assert_array_equal(np.asarray(mine, np.float32), np.asarray(theirs, np.float32))
        flipped = reference.flash_attention(arrays["q"], arrays["k"], np.flip(arrays["v"], 1), causal=True)
        _check(firsts[0][2], flipped, case)


@pytest.mark.gpu
@pytest.mark.sm80
def test_gpu_many_buffers() -> None:
    """Outputs that live at the same time are different memory, and dead ones are reused without harm."""
    with jax.default_device(jax.devices("gpu")[0]):
        q = jnp.ones((1, 64, 2, 64), jnp.float16)
        outs = [fm.flash_attention(q, q, jnp.full_like(q, i)) for i in range(200)]
        for i, out in enumerate(outs):
            assert float(out.min()) == float(out.max()) == i
