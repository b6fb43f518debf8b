"""JAX: gradients of attention against those of a plain implementation, under transforms; costs and refusals."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import numpy as np
import pytest

import flashmoe_cupy
from flashmoe_cupy.errors import UnsupportedProblem
from flashmoe_cupy.plan.operation import registered
from flashmoe_cupy.testing import AttentionCase, VarlenCase, relative_error

jax = pytest.importorskip("jax")
jnp = jax.numpy

from flashmoe_cupy import _xla  # noqa: E402
from flashmoe_cupy import jax as fm  # noqa: E402

pytestmark = pytest.mark.jax
spec = jax.sharding.PartitionSpec
TOLD = hasattr(jax, "shard_map")  # JAX 0.6.0 does not tell which gradients are asked for
ALLOWED = {"float32": 2e-5, "float16": 2e-3, "bfloat16": 1.5e-2}  # relative errors, of outputs and gradients
SMALL = AttentionCase(9, 11, heads_q=4, heads_k=2, head_dim=16, head_dim_v=8, dtype="float32", causal=True)
CASES = [
    AttentionCase(33, 40, heads_q=4, heads_k=2, head_dim=32, head_dim_v=16, dtype="bfloat16", causal=True),
    AttentionCase(40, 24, dtype="float16", window_size=(7, 3), sinks="same", alibi="bh"),
    AttentionCase(24, 40, dtype="float32", softcap=5.0, softmax_scale=0.3, bias="h1k", alibi="h", sinks="float32"),
    AttentionCase(17, 19, dtype="bfloat16", bias="b1qk", bias_dtype="bool"),
    AttentionCase(17, 19, dtype="float16", bias="qk", bias_dtype="float32", heads_q=6),
    AttentionCase(17, 19, dtype="bfloat16", bias="bhqk", sinks="float32", causal=True),
    AttentionCase(33, 40, used_q=(33, 9), used_k=(40, 12), left_q=(5, 0), left_k=(2, 10), causal=True, heads_q=4),
    AttentionCase(17, 19, dtype="float32", used_k=(3, 19), bias="b11k"),
]
VARLEN = VarlenCase(
    (5, 0, 13, 7), (9, 3, 0, 21), used_q=(4, 0, 13, 7), used_k=(9, 2, 0, 17), tail_q=3, tail_k=2, heads_q=4,
    head_dim=32, dtype="float32", causal=True, sinks="float32", alibi="bh",
)  # fmt: skip


@pytest.fixture(params=["cpu", pytest.param("gpu", marks=[pytest.mark.gpu, pytest.mark.sm80])], autouse=True)
def device(request: pytest.FixtureRequest) -> Iterator[Any]:
    """JAX's default device for the test: the CPU, and on a machine with a GPU that too."""
    found = jax.devices(request.param)[0]
    jax.config.update("jax_disable_most_optimizations", request.param == "cpu")  # compiles in half the time
    with jax.default_device(found), jax.default_matmul_precision("highest"):
        yield found
    jax.config.update("jax_disable_most_optimizations", False)


# ----------------------------------------------------------------------------------------------- a plain implementation


def plain(
    q: Any, k: Any, v: Any, *, causal: bool = False, window_size: tuple[int, int] = (-1, -1), softcap: float = 0.0,
    softmax_scale: float | None = None, sinks: Any = None, alibi_slopes: Any = None, bias: Any = None,
    seqused_q: Any = None, seqused_k: Any = None, leftpad_q: Any = None, leftpad_k: Any = None, layout: str = "bshd",
    return_lse: bool = False,
) -> Any:  # fmt: skip
    """`flash_attention` in float32, with one matrix of scores for each head, which JAX differentiates."""
    dtype = q.dtype
    q, k, v = (x if layout == "bhsd" else x.swapaxes(1, 2) for x in (q, k, v))
    group, rows, keys = q.shape[1] // k.shape[1], q.shape[2], k.shape[2]

    def counted(n: int, left: Any, used: Any) -> tuple[Any, Any]:
        """(which rows count, how many there are up to the last one that does), of each batch entry."""
        stop = jnp.full((len(q), 1), n) if used is None else used[:, None]
        return (jnp.arange(n) < stop) & (jnp.arange(n) >= (0 if left is None else left[:, None])), stop

    (own_q, end_q), (own_k, end_k) = counted(rows, leftpad_q, seqused_q), counted(keys, leftpad_k, seqused_k)
    q, k, v = (
        jnp.where(own[:, None, :, None], x.astype(np.float32), 0) for x, own in ((q, own_q), (k, own_k), (v, own_k))
    )
    k, v = jnp.repeat(k, group, 1), jnp.repeat(v, group, 1)
    s = jnp.einsum("bhqd,bhkd->bhqk", q, k) * (q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale)
    s = softcap * jnp.tanh(s / softcap) if softcap else s
    back = ((jnp.arange(rows) + end_k - end_q)[..., None] - jnp.arange(keys))[:, None]
    seen = own_q[:, None, :, None] & own_k[:, None, None]
    if alibi_slopes is not None:
        s = s - jnp.broadcast_to(alibi_slopes, s.shape[:2])[..., None, None] * abs(back)
    if bias is not None and bias.dtype == bool:
        seen = seen & bias
    elif bias is not None:
        s = s + bias.astype(np.float32)
    seen = seen & (back >= 0) if causal else seen
    seen = seen & (back <= window_size[0]) if window_size[0] >= 0 else seen
    seen = seen & (back >= -window_size[1]) if window_size[1] >= 0 else seen
    sink = -jnp.inf if sinks is None else sinks.astype(np.float32)[:, None, None]
    top = jnp.maximum(jnp.where(seen, s, -jnp.inf).max(-1, keepdims=True, initial=-jnp.inf), sink)
    top = jax.lax.stop_gradient(jnp.where(jnp.isfinite(top), top, 0))
    p = jnp.where(seen, jnp.exp(jnp.where(seen, s, 0) - top), 0)
    total = p.sum(-1, keepdims=True) + (0 if sinks is None else jnp.exp(sink - top))
    total = jnp.where(own_q[:, None, :, None], total, 0)
    some = total > 0
    total = jnp.where(some, total, 1)
    out = jnp.einsum("bhqk,bhkd->bhqd", p / total, v).astype(dtype)
    lse = jnp.where(some, top + jnp.log(total), -jnp.inf)[..., 0]
    out = out if layout == "bhsd" else out.swapaxes(1, 2)
    return (out, lse) if return_lse else out


def plain_varlen(case: VarlenCase, q: Any, k: Any, v: Any, alibi_slopes: Any = None, **rest: Any) -> Any:
    """`flash_attention_varlen` with lse, one sequence after the other. Its lengths are those of the case."""
    options = {name: x for name, x in case.options().items() if "seqlen" not in name} | {"return_lse": True}
    rest = {name: x for name, x in rest.items() if name == "sinks"}
    out = jnp.zeros((*q.shape[:2], v.shape[2]), q.dtype)
    lse = jnp.full(q.shape[1::-1], -jnp.inf)
    for n, spans in enumerate(zip(case.spans("q"), case.spans("k"), strict=True)):
        i, j = slice(*spans[0]), slice(*spans[1])
        slopes = None if alibi_slopes is None else alibi_slopes[n]
        own = plain(q[None, i], k[None, j], v[None, j], alibi_slopes=slopes, **rest, **options)
        out, lse = out.at[i].set(own[0][0]), lse.at[:, i].set(own[1][0])
    return out, lse


def put(arrays: dict[str, Any]) -> dict[str, Any]:
    return {name: jnp.asarray(x) for name, x in arrays.items()}


def loss(made: Any) -> Any:
    """A number that depends on every element of out and, where it is there, of lse, on each in another way."""
    out, *lse = made if isinstance(made, tuple) else (made,)
    total = jnp.vdot(out.astype(np.float32), np.cos(np.arange(out.size, dtype=np.float32)).reshape(out.shape))
    for x in lse:
        weight = np.sin(np.arange(x.size, dtype=np.float32)).reshape(x.shape)
        total += jnp.vdot(jnp.where(jnp.isfinite(x), x, 0), weight)
    return total


def near(mine: Any, theirs: Any, dtype: str = "float32") -> None:
    """Equal trees of arrays, but for rounding."""
    assert jax.tree.structure(mine) == jax.tree.structure(theirs)
    for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(mine), jax.tree.leaves(theirs), strict=True):
        assert isinstance(a, jax.Array) and a.dtype == b.dtype and a.shape == b.shape, path
        error = relative_error(np.asarray(a).astype(np.float64), np.asarray(b).astype(np.float64))
        assert error < ALLOWED[dtype], (path, error)


def split(arrays: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """(arrays that have a gradient, the others)"""
    names = [n for n, x in arrays.items() if n != "alibi_slopes" and jnp.issubdtype(x.dtype, jnp.inexact)]
    return {n: arrays[n] for n in names}, {n: x for n, x in arrays.items() if n not in names}


def gradients(function: Callable[..., Any], arrays: dict[str, Any]) -> dict[str, Any]:
    """Of the loss of all that function(**arrays) gives, by every array that has one."""
    own, rest = split(arrays)
    found: dict[str, Any] = jax.grad(lambda own: loss(function(**own, **rest)))(own)
    return found


@pytest.fixture
def pulls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, ...]]:
    """The gradients that each run of a backward on the CPU has computed."""
    seen: list[tuple[str, ...]] = []
    for name in ("flash_attention_backward", "flash_attention_varlen_backward"):
        operation = registered(name)

        def host(p: Any, given: Any, made: Any, before: Any = operation.host) -> None:
            seen.append(tuple(made))
            before(p, given, made)

        monkeypatch.setattr(operation, "host", host)
    return seen


# -------------------------------------------------------------------------------------------------------------- results


@pytest.mark.parametrize(("n", "case"), [*enumerate(CASES)], ids=str)
def test_dense(n: int, case: AttentionCase) -> None:
    arrays: dict[str, Any] = put(dict(case.random()))
    options = case.options() | {"layout": "bhsd" if n % 2 else "bshd", "return_lse": True}
    if n % 2:
        arrays |= {name: arrays[name].swapaxes(1, 2) for name in "qkv"}
    mine = partial(gradients, partial(fm.flash_attention, **options))
    want = jax.jit(partial(gradients, partial(plain, **options)))(arrays)
    near(mine(arrays), want, case.dtype)
    inside = jax.jit(lambda a: jax.tree.map(lambda x: x * 1, mine(a | {"q": a["q"] * 1})))
    near(inside(arrays), want, case.dtype)  # XLA decides on all buffers


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_varlen(dtype: str) -> None:
    case = VARLEN._replace(dtype=dtype)
    arrays: dict[str, Any] = put(dict(case.random()))
    mine = partial(gradients, partial(fm.flash_attention_varlen, **case.options(), return_lse=True))
    want = jax.jit(partial(gradients, partial(plain_varlen, case)))(arrays)
    near((mine if dtype == "float32" else jax.jit(mine))(arrays), want, dtype)
    assert not np.asarray(want["q"])[-3:].any()  # rows of no sequence, which hold NaN


@pytest.mark.parametrize(("batch", "seqlen_q", "seqlen_k"), [(0, 4, 4), (2, 0, 4), (2, 4, 0)])
def test_empty(batch: int, seqlen_q: int, seqlen_k: int) -> None:
    case = SMALL._replace(batch=batch, seqlen_q=seqlen_q, seqlen_k=seqlen_k, sinks="float32")
    arrays: dict[str, Any] = put(dict(case.random()))
    near(*[jax.jit(partial(gradients, partial(f, return_lse=True)))(arrays) for f in (plain, fm.flash_attention)])


def test_public_function_and_value() -> None:
    q, k, v = (jnp.asarray(x) for x in SMALL.random().values())
    mine, theirs = (lambda q, f=f: loss(f(q, k, v)) for f in (flashmoe_cupy.flash_attention, plain))
    near(jax.value_and_grad(mine)(q), jax.jit(jax.value_and_grad(theirs))(q))


# -------------------------------------------------------------------------------------------------------- what is asked


def test_only_what_is_asked_for(device: Any, pulls: list[tuple[str, ...]]) -> None:
    """A frozen argument costs nothing: by argnums, in a pytree, behind stop_gradient."""
    if device.platform != "cpu" or not TOLD:
        pytest.skip("the CPU can be looked at, and JAX from 0.6.1 on tells")
    case = SMALL._replace(bias="11qk", sinks="float32")
    arrays = put(dict(case.random()))
    names = tuple(arrays)

    def mine(*given: Any) -> Any:
        return loss(fm.flash_attention(**dict(zip(names, given, strict=True)), causal=True))

    def theirs(*given: Any) -> Any:
        return loss(plain(**dict(zip(names, given, strict=True)), causal=True))

    want = jax.jit(jax.grad(theirs, tuple(range(len(names)))))(*arrays.values())
    ways: list[Callable[..., Any]] = [lambda f: f, jax.jit, jax.checkpoint]
    for n, asked in enumerate((["q"], ["k"], ["v"], ["k", "v"], ["sinks"], ["bias"], ["q", "sinks", "bias"], names)):
        numbers = tuple(names.index(name) for name in asked)
        pulls.clear()
        near(jax.grad(ways[n % 3](mine), numbers)(*arrays.values()), tuple(want[i] for i in numbers))
        assert [set(one) for one in pulls] == [{f"d{name}" for name in asked}]
    pulls.clear()
    frozen = jax.grad(lambda q: mine(jax.lax.stop_gradient(q), *list(arrays.values())[1:]) + q.sum())(arrays["q"])
    assert not pulls and np.all(np.asarray(frozen) == 1)


def test_one_traced_call_in_several_ways() -> None:
    """JAX traces a call once and may differentiate it by other arguments before it pulls the first ones back."""
    q, k, v = (jnp.asarray(x) for x in SMALL.random().values())
    shared = jax.jit(fm.flash_attention)
    pull_q = jax.vjp(lambda q: shared(q, k, v), q)[1]
    pull_kv = jax.vjp(lambda k, v: shared(q, k, v), k, v)[1]
    pull_all = jax.vjp(shared, q, k, v)[1]
    pull_v = jax.vjp(lambda v: shared(q, k, v), v)[1]
    ones = jnp.ones((2, 9, 4, 8))
    want = jax.jit(lambda *given: jax.vjp(plain, *given)[1](ones))(q, k, v)
    near(pull_q(ones), want[:1])
    near(pull_kv(ones), want[1:])
    near(pull_v(ones), want[2:])
    near(pull_all(ones), want)

    def twice(attention: Any, a: Any, b: Any) -> Any:
        """The same call by its queries, by its keys and by both."""
        return loss(attention(a, k, v) + attention(q, b, v) ** 2 + attention(a * b.sum(), b, v))

    want = jax.jit(jax.grad(partial(twice, plain), (0, 1)))(q, k)
    near(jax.grad(partial(twice, shared), (0, 1))(q, k), want)


def test_a_call_that_nobody_differentiates_makes_no_lse() -> None:
    arrays = put(dict(SMALL.random()))
    text = str(jax.make_jaxpr(partial(fm.flash_attention, causal=True))(*arrays.values()))
    assert "name=flash_attention\n" in text and "f32[2,9,4,8]" in text
    assert "f32[2,4,9]" not in text and "backward" not in text
    lowered = jax.jit(fm.flash_attention).lower(*arrays.values()).as_text()
    assert "tensor<2x9x4x8xf32>" in lowered and "tensor<2x4x9xf32>" not in lowered
    both = str(jax.make_jaxpr(jax.grad(lambda q, k, v: fm.flash_attention(q, k, v).sum()))(*arrays.values()))
    assert "f32[2,4,9]" in both and "name=flash_attention_backward" in both


def test_out_and_lse_alone() -> None:
    """What arrives at only one of the outputs; nothing is made of the other's absence."""
    arrays = put(dict(SMALL.random()))
    for which in range(2):

        def one(attention: Any, *given: Any, which: int = which) -> Any:
            return loss(attention(*given, causal=True, return_lse=True)[which])

        by = (0, 1, 2) if which == 0 else (0, 1)
        near(*[jax.jit(jax.grad(partial(one, f), by))(*arrays.values()) for f in (plain, fm.flash_attention)])
    text = str(jax.make_jaxpr(jax.grad(partial(one, fm.flash_attention, which=0)))(*arrays.values()))
    assert '"dlse_strides": null' in text or not TOLD


# ----------------------------------------------------------------------------------------------------------- transforms


def layers(attention: Callable[..., Any], scan: bool, wrap: Callable[..., Any], params: Any, x: Any) -> Any:
    """Some layers of attention with projections, in a scan or one after the other."""

    def layer(x: Any, p: Any) -> tuple[Any, None]:
        q, k, v = (x.reshape(2, 7, 4, 8) @ p[name] for name in "qkv")
        out, lse = attention(q, k[:, :, ::2], v[:, :, ::2], causal=True, sinks=p["sinks"], return_lse=True)
        return x + out.reshape(x.shape) + 0.1 * lse.mean(), None

    if scan:
        return jax.lax.scan(wrap(layer), x, params)[0]
    for i in range(len(params["q"])):
        x = wrap(layer)(x, jax.tree.map(lambda p, i=i: p[i], params))[0]
    return x


@pytest.mark.parametrize(
    ("wrap", "scan"),
    [("plain", True), ("jit", False), ("remat", True), ("dots", False), ("cond", True)],
)
def test_layers(wrap: str, scan: bool, rng: np.random.Generator) -> None:
    shapes = {"q": (3, 8, 8), "k": (3, 8, 8), "v": (3, 8, 8), "sinks": (3, 4)}
    params = {name: jnp.asarray(rng.standard_normal(shape, np.float32) * 0.5) for name, shape in shapes.items()}
    x = jnp.asarray(rng.standard_normal((2, 7, 32), np.float32))
    wraps: dict[str, Callable[..., Any]] = {
        "plain": lambda f: f, "jit": jax.jit, "remat": jax.checkpoint,
        "dots": partial(jax.checkpoint, policy=jax.checkpoint_policies.dots_saveable),
        "cond": lambda f: lambda x, p: jax.lax.cond(x.sum() < 1e9, f, lambda x, p: (x, None), x, p),
    }  # fmt: skip

    def value(attention: Any, wrap: Any, params: Any, x: Any) -> Any:
        return (layers(attention, scan, wrap, params, x) ** 2).mean()

    own = jax.jit(jax.value_and_grad(partial(value, fm.flash_attention, wraps[wrap]), (0, 1)))(params, x)
    near(own, jax.jit(jax.value_and_grad(partial(value, plain, wraps["plain"]), (0, 1)))(params, x))


def test_scan_whose_carry_becomes_differentiable() -> None:
    """Only the keys are perturbed in the first step, from the second one on the queries are too."""
    q, k, v = (jnp.asarray(x) for x in SMALL._replace(head_dim_v=16).random().values())

    def value(attention: Any, k: Any) -> Any:
        return loss(jax.lax.scan(lambda x, _: (x + attention(x, k, v, causal=True), None), q, length=4)[0])

    near(*[jax.jit(jax.grad(partial(value, f)))(k) for f in (plain, fm.flash_attention)])


@pytest.mark.parametrize(
    ("extra", "axes", "calls"),
    [
        ({}, {}, 1),
        ({"layout": "bhsd"}, {"k": None, "v": None, "q": 2}, 1),
        ({"bias": (3, 2, 4, 9, 11)}, {}, 1),
        ({"layout": "bhsd", "bias": (2, 4, 9, 11)}, {"bias": None, "q": None}, 1),
        ({"bias": (9, 3, 11)}, {"bias": 1}, 3),  # without a batch axis of its own its gradient is a sum
        ({"bias": (1, 1, 9, 11)}, {"bias": None}, 3),
        ({"frozen_bias": (1, 1, 9, 11)}, {"frozen_bias": None}, 1),
        ({"sinks": (3, 4)}, {}, 3),
        ({"sinks": (4,)}, {"sinks": None}, 3),
        ({"frozen_sinks": (4,), "frozen_alibi_slopes": (3, 2, 4)}, {"frozen_sinks": None}, 1),
    ],
)
def test_vmap(
    extra: dict[str, Any], axes: dict[str, int | None], calls: int, device: Any, rng: np.random.Generator,
    pulls: list[tuple[str, ...]],
) -> None:  # fmt: skip
    """vmap of grad and grad of vmap; one run of the backward where the mapped axis can join the batch."""
    shapes = {name: x.shape for name, x in SMALL.random().items()}
    extra = dict(extra)
    layout = extra.pop("layout", "bshd")
    if layout == "bhsd":
        shapes = {name: (s[0], s[2], s[1], s[3]) for name, s in shapes.items()}
    of: dict[str, Any] = {name: axes.get(name, 0) for name in (*shapes, *extra)}
    for name in shapes:
        if (axis := of[name]) is not None:
            shapes[name] = (*shapes[name][:axis], 3, *shapes[name][axis:])
    arrays = {name: jnp.asarray(rng.standard_normal(s, np.float32)) for name, s in (shapes | extra).items()}
    own = {name: x for name, x in arrays.items() if not name.startswith("frozen_")}
    rest = {name: x for name, x in arrays.items() if name not in own}
    in_axes = {name: of[name] for name in own}, {name: of[name] for name in rest}

    def single(attention: Any, own: Any, rest: Any) -> Any:
        named = own | {name.removeprefix("frozen_"): x for name, x in rest.items()}
        return loss(attention(**named, causal=True, layout=layout, return_lse=True))

    def both(attention: Any) -> Any:
        f = partial(single, attention)
        inner = jax.vmap(jax.grad(f), in_axes=in_axes)
        outer = jax.grad(lambda own, rest: (jax.vmap(f, in_axes=in_axes)(own, rest) * jnp.arange(1.0, 4)).sum())
        return jax.jit(lambda own, rest: (inner(own, rest), outer(own, rest)))(own, rest)

    found = both(fm.flash_attention)
    near(found, both(plain))
    if device.platform == "cpu" and TOLD:
        assert len(pulls) == 2 * calls


def test_vmap_of_varlen() -> None:
    arrays = put(dict(VARLEN.random()))
    own, rest = split(arrays)
    own["q"] = jnp.stack([jnp.nan_to_num(own["q"]), -jnp.nan_to_num(own["q"])])
    axes = {name: 0 if name == "q" else None for name in own}
    mine = partial(fm.flash_attention_varlen, **VARLEN.options(), return_lse=True)

    def each(f: Any) -> Any:
        return jax.jit(jax.vmap(jax.grad(lambda own: loss(f(**own, **rest))), in_axes=(axes,)))(own)

    near(each(mine), each(partial(plain_varlen, VARLEN)))


def test_vmap_of_vmap(rng: np.random.Generator) -> None:
    """With a batch of 1 every bias may join."""
    q, k, v = (jnp.asarray(x) for x in SMALL._replace(batch=1).random().values())
    bias = jnp.asarray(rng.standard_normal((3, 9, 11), np.float32))

    def each(f: Any) -> Any:
        one = jax.grad(lambda bias, q: loss(f(q, k, v, bias=bias)), (0, 1))
        return jax.jit(jax.vmap(jax.vmap(one, (0, None)), (None, 0)))(bias, jnp.stack([q, 2 * q]))

    near(each(fm.flash_attention), each(plain))


# ------------------------------------------------------------------------------------------------------ several devices


def shard_map(f: Callable[..., Any], in_specs: Any, out_specs: Any, check: bool) -> Any:
    """Over a mesh ("x", "y") of four devices of the CPU. Before JAX 0.6.1 it stands elsewhere."""
    mesh = jax.sharding.Mesh(np.array(jax.devices("cpu")[:4]).reshape(2, 2), ("x", "y"))
    if hasattr(jax, "shard_map"):
        return jax.shard_map(f, mesh=mesh, in_specs=in_specs, out_specs=out_specs, check_vma=check)
    from jax.experimental.shard_map import shard_map as older

    return older(f, mesh=mesh, in_specs=in_specs, out_specs=out_specs, check_rep=check)


SHARDED = SMALL._replace(batch=4, head_dim_v=0, causal=False, sinks="float32", bias="b1qk")


@pytest.mark.parametrize("check", [True, False], ids=["checked", "unchecked"])
@pytest.mark.parametrize("device", ["cpu"], indirect=True)
def test_grad_of_shard_map(check: bool) -> None:
    """Entries over one axis of the mesh, heads over the other; all devices have the same sinks of an entry."""
    arrays = put(dict(SHARDED.random()))
    rows = spec("x", None, "y")
    specs = {"q": rows, "k": rows, "v": rows, "sinks": spec("y"), "bias": spec("x")}

    def call(attention: Any, a: Any) -> Any:
        return attention(**a, window_size=(4, 2), return_lse=True)

    split = shard_map(partial(call, fm.flash_attention), (specs,), (rows, spec("x", "y")), check)
    want = jax.jit(jax.grad(lambda a: loss(call(plain, a))))(arrays)
    near(jax.jit(jax.grad(lambda a: loss((jax.checkpoint(split) if check else split)(a))))(arrays), want)


@pytest.mark.parametrize("device", ["cpu"], indirect=True)
def test_grad_inside_shard_map() -> None:
    """Each gradient is summed over the axes over which its argument does not vary, as JAX sums its own."""
    if not TOLD:
        pytest.skip("JAX 0.6.0 refuses this for its own operations too")
    arrays = put(dict(SHARDED._replace(sinks="", bias="").random()))
    q, k, v = arrays["q"][:2], arrays["k"][:2], arrays["v"][:1]

    def inner(attention: Any, q: Any, k: Any, v: Any) -> Any:
        return jax.grad(lambda a: jnp.sin(attention(*a)).sum())((q, k, v))

    specs = spec("x"), spec("y"), spec()
    near(*[jax.jit(shard_map(partial(inner, f), specs, specs, True))(q, k, v) for f in (plain, fm.flash_attention)])


# ------------------------------------------------------------------------------------------------------------- refusals


def test_arguments_without_a_gradient() -> None:
    """Integers and booleans have one of type float0; that of slopes is refused, if it is asked for."""
    arrays = put(dict(VARLEN.random()))
    mine = partial(fm.flash_attention_varlen, **VARLEN.options())
    slopes = arrays.pop("alibi_slopes")
    out, pull = jax.vjp(lambda a: mine(**a, alibi_slopes=slopes), arrays)
    (found,) = pull(jnp.ones_like(out))
    for name, x in found.items():
        assert x.dtype == (arrays[name].dtype if name in ("q", "k", "v", "sinks") else jax.dtypes.float0)
    case = CASES[3]
    masked = jax.grad(lambda a: fm.flash_attention(**a).astype(np.float32).sum(), allow_int=True)(put(case.random()))
    assert masked["bias"].dtype == jax.dtypes.float0 and masked["q"].dtype == jnp.bfloat16
    for transform in (lambda f: f, jax.jit):
        with pytest.raises(UnsupportedProblem, match=r"(?s)gradient of attention .*alibi_slopes has no grad") as info:
            jax.grad(transform(lambda slopes: mine(**arrays, alibi_slopes=slopes).sum()))(slopes)
        assert "stop_gradient" in info.value.hint


def test_second_derivatives_and_forward_mode() -> None:
    q, k, v = (jnp.asarray(x) for x in SMALL.random().values())

    def value(q: Any) -> Any:
        return fm.flash_attention(q, k, v).sum()

    for transform in (lambda f: f, jax.jit):
        with pytest.raises(UnsupportedProblem, match=r"(?s)gradient of attention backward .*flash_attention_backward"):
            jax.grad(transform(lambda q: jax.grad(value)(q).sum()))(q)
        own = transform(value)
        for attempt in (lambda q, own=own: jax.jvp(own, (q,), (q,)), jax.jacfwd(own), jax.hessian(own)):
            with pytest.raises(TypeError, match=r"forward-mode autodiff \(jvp\)"):
                attempt(q)
    # a gradient that an outer one does not pass through
    near(jax.grad(lambda s: s * jax.grad(value)(q).sum())(2.0), jax.grad(value)(q).sum())


# ----------------------------------------------------------------------------------------------------------- many calls


def test_many_calls() -> None:
    """Nothing is built anew for shapes that were seen, and no tracer stays behind."""
    q, k, v = (jnp.asarray(x) for x in SMALL.random().values())
    with jax.checking_leaks():
        jax.grad(lambda q: fm.flash_attention(q, k, v).sum())(q)
        jax.jit(jax.grad(lambda q: fm.flash_attention(q, k, v).sum()))(q)
    known = len(fm._functions), len(_xla._known)
    want = jax.grad(lambda q: fm.flash_attention(q, k, v).sum())(q)
    for _ in range(20):
        np.testing.assert_array_equal(jax.grad(lambda q: fm.flash_attention(q, k, v).sum())(q), want)
    assert (len(fm._functions), len(_xla._known)) == known


def test_program_of_another_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """A program that this process did not build carries the problem of its backward with it."""
    arrays = put(dict(SMALL._replace(bias="b1qk", bias_dtype="float32", sinks="float32").random()))
    function = partial(gradients, partial(fm.flash_attention, causal=True))
    program = jax.jit(function).lower(arrays).compile()
    want = function(arrays)
    monkeypatch.setattr(_xla, "_known", {})
    near(program(arrays), want)
    assert {one.operation for one in _xla._known.values()} == {"flash_attention", "flash_attention_backward"}
