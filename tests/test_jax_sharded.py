"""JAX: `shard_map` over several devices gives each shard's own numbers, whatever stands around a call inside it.

On the CPU over the devices that conftest.py asks XLA for; on GPUs over two of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import numpy as np
import pytest

from flashmoe_cupy.testing import AttentionCase
from flashmoe_cupy.testing_moe import MoECase

jax = pytest.importorskip("jax")
jnp = jax.numpy

import flashmoe_cupy as fm  # noqa: E402

pytestmark = pytest.mark.jax
spec = jax.sharding.PartitionSpec

# ------------------------------------------------------------------------------------------- functions of one shard
# Each takes what is split over the mesh (a tree, first axis) and what every device has, and gives one array per shard.

ATTENTION = AttentionCase(7, 11, batch=4, heads_q=4, heads_k=2, head_dim=16, dtype="float32")
MOE = MoECase(12, 16, 8, 4, 2, "float32", shared=8)


def attention(q: Any, kv: Any) -> Any:
    return fm.flash_attention(q, kv["k"], kv["v"], causal=True)


def packed(q: Any, kv: Any) -> Any:
    """Offsets that are the same on all shards, rows of no sequence, and lse."""
    cu = jnp.asarray([0, 3, 3, 5], jnp.int32)
    k, v = (jnp.repeat(x.reshape(-1, *x.shape[2:]), 2, 1) for x in (kv["k"], kv["v"]))
    out, lse = fm.flash_attention_varlen(
        q[0], k, v, cu_seqlens_q=cu, cu_seqlens_k=cu, max_seqlen_q=3, max_seqlen_k=3, causal=True, return_lse=True
    )
    return (out + jnp.where(jnp.isinf(lse), 7, lse).T[..., None])[None]


def moe(q: Any, weights: Any) -> Any:
    """Router, permutation, grouped product and the whole layer."""
    x = q.reshape(-1, MOE.hidden)
    gates, ids = fm.moe_route(x[:, :4], top_k=2, renormalize=True)
    arrays = {name: array for name, array in weights.items() if name not in ("k", "v")}
    out = fm.fused_moe(x, topk_weights=gates, topk_ids=ids, **arrays)
    order = fm.moe_permute(ids, num_experts=4)
    part = fm.grouped_gemm(x, weights["w_down"].swapaxes(1, 2), offsets=order.offsets // 2)
    return (out + part.sum(1, keepdims=True) + order.offsets.sum()).reshape(q.shape) / 100


def nothing(q: Any, kv: Any) -> Any:
    """Calls without any row: their results stay typed as the shards are."""
    empty = q[:, :0]
    out, lse = fm.flash_attention(empty, kv["k"], kv["v"], return_lse=True)
    weights, ids, stats = fm.moe_route(empty.reshape(0, 16), top_k=2, return_stats=True)
    return q + out.sum() + lse.sum() + weights.sum() + ids.sum() + stats.z_loss


def around(f: Callable[..., Any], q: Any, same: Any) -> dict[str, Any]:
    """What stands around a call in a program: control flow, transforms, nothing."""
    return {
        "plain": f(q, same),
        "jit": jax.jit(f)(q, same),
        "scan": jax.lax.scan(lambda x, _: (f(x, same), None), q, length=3)[0],
        "fori_loop": jax.lax.fori_loop(0, 3, lambda _, x: f(x, same), q),
        "while_loop": jax.lax.while_loop(lambda c: c[0] < 3, lambda c: (c[0] + 1, f(c[1], same)), (0, q))[1],
        "cond": jax.lax.cond(q[0, 0, 0, 0] > 0, lambda x: f(x, same), lambda x: 2 * x, q),
        "vmap": jax.vmap(lambda x: f(x, same))(jnp.stack([q, 2 * q])).sum(0),
        "checkpoint": jax.checkpoint(lambda x: f(x, same))(q),
    }


# ----------------------------------------------------------------------------------------------------------- the tests


@pytest.fixture(params=["cpu", pytest.param("gpu", marks=[pytest.mark.gpu, pytest.mark.sm80, pytest.mark.multi_gpu])])
def devices(request: pytest.FixtureRequest) -> Iterator[list[Any]]:
    found = jax.devices(request.param)[: 4 if request.param == "cpu" else 2]
    assert len(found) > 1, "XLA_FLAGS was read before conftest.py could set it"
    with jax.default_device(found[0]):
        yield found


@pytest.fixture
def arrays() -> tuple[Any, dict[str, Any]]:
    """(what is split, what every device has)"""
    split, same = ATTENTION.random(), MOE.random()
    for name in ("x", "topk_weights", "topk_ids"):
        del same[name]
    same |= {name: split[name][:1] for name in "kv"}
    return jnp.asarray(split["q"]), {name: jnp.asarray(x) for name, x in same.items()}


def shard_map(f: Callable[..., Any], devices: list[Any], in_specs: Any, out_specs: Any, check: bool) -> Any:
    """Over a mesh ("x", "y"). Before JAX 0.6.1 it stands elsewhere, and the check has another name."""
    mesh = jax.sharding.Mesh(np.array(devices).reshape(2, -1), ("x", "y"))
    if hasattr(jax, "shard_map"):
        return jax.shard_map(f, mesh=mesh, in_specs=in_specs, out_specs=out_specs, check_vma=check)
    from jax.experimental.shard_map import shard_map as older

    return older(f, mesh=mesh, in_specs=in_specs, out_specs=out_specs, check_rep=check)


def equal(mine: Any, theirs: list[Any], exact: bool = True) -> None:
    """A result against those of its shards. Products that are XLA's own depend on the program that they are in."""
    want = np.concatenate([np.asarray(x) for x in theirs])
    np.testing.assert_allclose(np.asarray(mine), want, rtol=0 if exact else 1e-5, atol=0 if exact else 1e-5)


@pytest.mark.parametrize("check", [True, False], ids=["checked", "unchecked"])
@pytest.mark.parametrize("f", [attention, packed, moe, nothing])
def test_control_flow_inside(f: Callable[..., Any], check: bool, devices: list[Any], arrays: Any) -> None:
    q, same = arrays
    q = q[: len(devices)]
    alone = jax.jit(partial(around, f))
    want = [alone(q[i : i + 1], same) for i in range(len(devices))]
    split = spec(("x", "y"))
    result = jax.jit(shard_map(partial(around, f), devices, (split, spec()), split, check))(q, same)
    for name, x in result.items():
        assert len(x.devices()) == len(devices)
        equal(x, [w[name] for w in want], exact=f is not moe)


def test_without_jit(devices: list[Any], arrays: Any) -> None:
    q, same = arrays
    q = q[: len(devices)]
    split = spec(("x", "y"))
    result = shard_map(attention, devices, (split, spec()), split, True)(q, same)
    equal(result, [attention(q[i : i + 1], same) for i in range(len(devices))])


@pytest.mark.parametrize("check", [True, False], ids=["checked", "unchecked"])
def test_arrays_that_vary_over_different_axes(check: bool, devices: list[Any], arrays: Any) -> None:
    """Queries over x, keys over y: the result varies over both. The sinks are the same on all devices."""
    q, rows = arrays[0][:2], len(devices) // 2
    k, v = (jnp.concatenate([x, -x])[:rows] for x in (arrays[1]["k"], arrays[1]["v"]))
    sinks = jnp.ones(4, jnp.float32)

    def call(q: Any, k: Any, v: Any, sinks: Any) -> Any:
        return fm.flash_attention(q, k, v, sinks=sinks, window_size=(3, 3))

    specs = (spec("x"), spec("y"), spec("y"), spec())
    result = jax.jit(shard_map(call, devices, specs, spec(("x", "y")), check))(q, k, v, sinks)
    equal(result, [call(q[i : i + 1], k[j : j + 1], v[j : j + 1], sinks) for i in range(2) for j in range(rows)])
