"""The attention kernels on the emulated machine: problems in NumPy, Params as the launch would make them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
from emulate import guarded, run, tensor_map
from numpy.typing import NDArray

from flashmoe_cupy.arrays import view
from flashmoe_cupy.plan.attention import AttentionFwdSm90, rows_aligned
from flashmoe_cupy.plan.config import Config
from flashmoe_cupy.plan.kernels import KERNELS
from flashmoe_cupy.plan.problem import AttentionProblem, attention_problem, varlen_problem

Array = NDArray[Any]
_POINTERS = ("bias", "alibi_slopes", "sinks", "cu_seqlens_q", "cu_seqlens_k", "seqused_q", "seqused_k")


class Emulated(NamedTuple):
    """A launch that has everything but its outputs."""

    tu: str
    config: Config
    problem: AttentionProblem
    kernel: str


def plan(kernel: str, q: Array, k: Array, v: Array, config: Config | None = None, **options: Any) -> Emulated:
    """The launch of a kernel of the registry for host arrays; options as for flash_attention(_varlen)."""
    spec, views = KERNELS[kernel], {n: view(x, n) for n, x in {"q": q, "k": k, "v": v}.items()}
    given = {n: view(x, n) if isinstance(x, np.ndarray) else x for n, x in options.items()}
    make = varlen_problem if "cu_seqlens_q" in given else attention_problem
    problem = make(*views.values(), **given)
    arch = "sm_90a" if isinstance(spec, AttentionFwdSm90) else "sm_80"
    config = config or spec.choose(problem, arch, rows_aligned(problem))
    return Emulated(spec.source(config), config, problem, kernel)


def attention(
    launch: Emulated,
    q: Array,
    k: Array,
    v: Array,
    seed: int = 0,
    *,
    sms: int = 3,
    resident: int = 1,
    headers: Mapping[str, str] | None = None,
    **options: Any,
) -> tuple[Array, Array]:
    """(out, lse) as the kernel left them. Every array lies against memory that cannot be accessed."""
    spec, p = KERNELS[launch.kernel], launch.problem
    arrays = {n: guarded(x, n, before=seed % 2 == 1) for n, x in {"q": q, "k": k, "v": v}.items()}
    shape = (p.total_q, p.heads_q, p.head_dim_v) if p.varlen else (p.batch, p.seqlen_q, p.heads_q, p.head_dim_v)
    out = guarded(np.full(shape, np.nan, q.dtype), "out")
    lse = guarded(np.full((p.heads_q, p.total_q) if p.varlen else (p.batch, p.heads_q, p.seqlen_q), np.nan, np.float32), "lse")
    arrays |= {"out": out, "lse": lse}
    arrays |= {n: guarded(options[n], n) for n in _POINTERS if isinstance(options.get(n), np.ndarray)}
    pointers = [arrays[n].ctypes.data if n in arrays else 0 for n in ("q", "k", "v", "out", "lse", *_POINTERS)]
    aligned = rows_aligned(p)
    params = bytearray(spec.params_size)
    spec.pack_pointers(params, 0, *pointers)
    tail = spec.pack_tail(p, launch.config, aligned, sms, 3 if p.varlen and spec.clears else 0)
    params[spec.pointer_bytes : spec.pointer_bytes + len(tail)] = tail
    for i, one in enumerate(spec.map_arguments(p, launch.config)):
        at = spec.pointer_bytes + len(tail) + 128 * i
        params[at : at + 128] = tensor_map(one, pointers[i])
    counter = guarded(np.zeros(2, np.int32), "the counter of tiles")
    if spec.counter_at(p):
        at = spec.counter_at(p)
        params[at : at + 8] = counter.ctypes.data.to_bytes(8, "little")
    run(
        launch.tu, bytes(params), spec.grid(p, launch.config, sms), launch.config.threads, launch.config.smem_bytes, seed,
        resident=resident, headers=headers,
    )  # fmt: skip
    assert not counter.any()
    return out, lse
