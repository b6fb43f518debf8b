"""Attention's backward on the emulated GPU: Params as a launch would make them, and the rule that results keep to."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from emulate import guarded, run, tensor_map
from numpy.typing import NDArray

from flashmoe_cupy import reference
from flashmoe_cupy.arrays import view
from flashmoe_cupy.jit.device import H100
from flashmoe_cupy.plan.attention.backward import backward_steps
from flashmoe_cupy.plan.attention.gradient import AttentionBwdProblem, backward_problem, varlen_backward_problem
from flashmoe_cupy.plan.kernels import of_task, prepared
from flashmoe_cupy.testing import TOLERANCES, Case, VarlenCase, relative_error, row_error

CUDA = Path(__file__).resolve().parent.parent / "cuda_src"
Arrays = dict[str, NDArray[Any]]
ALL = "dq", "dk", "dv"


def inputs(case: Case, seed: int = 0, dlse: bool = True) -> Arrays:
    """The case's arrays, dout and dlse, out and lse of the float64 reference in the dtypes of a forward.

    Rows of out, lse and what arrives at them that do not count are NaN.
    """
    arrays = case.random(seed)
    exact = (np.bool_, np.int32)
    given: dict[str, Any] = {n: a if a.dtype in exact else a.astype(np.float64) for n, a in arrays.items()}
    truth = reference.flash_attention_varlen if isinstance(case, VarlenCase) else reference.flash_attention
    out, lse = truth(given.pop("q"), given.pop("k"), given.pop("v"), **given, **case.options(), return_lse=True)
    random = np.random.default_rng(seed + 99)
    kind = arrays["q"].dtype
    made = {"out": out.astype(kind), "lse": lse.astype(np.float32)}
    made["dout"] = random.standard_normal(out.shape, np.float32).astype(kind)
    if dlse:
        made["dlse"] = random.standard_normal(lse.shape, np.float32)
    for index in idle(case, "q"):
        made["out"][index] = made["dout"][index] = np.nan
        for name in ("lse", "dlse"):
            if name in made:
                made[name].swapaxes(-1, -2)[index] = np.nan
    return arrays | made


def idle(case: Case, which: str) -> list[Any]:
    """Indices of the rows that do not count, along the leading axes of q (or k)."""
    spans = case.spans(which)
    if isinstance(case, VarlenCase):
        lengths, tail = (case.lengths_q, case.tail_q) if which == "q" else (case.lengths_k, case.tail_k)
        rest = np.ones(sum(lengths) + tail, bool)
        for start, stop in spans:
            rest[start:stop] = False
        return [rest]
    return [(b, rows) for b, (start, stop) in enumerate(spans) for rows in (slice(0, start), slice(stop, None))]


def problem_of(case: Case, arrays: Arrays, wanted: Sequence[str]) -> AttentionBwdProblem:
    make: Any = varlen_backward_problem if isinstance(case, VarlenCase) else backward_problem
    views: dict[str, Any] = {n: view(x, n) for n, x in arrays.items() if n not in ("dsinks", "dbias")}
    main = [views.pop(name) for name in ("dout", "q", "k", "v", "out", "lse")]
    need = [name.removeprefix("d") for name in wanted]
    p: AttentionBwdProblem = make(*main, **views, **case.options(), need=need, deterministic=False)
    return p


def backward(
    case: Case, arrays: Arrays, seed: int, wanted: Sequence[str] = ALL, arch: str = "sm_80",
    headers: Mapping[str, str] | None = None, deterministic: bool = True, resident: int = 0, sms: int = 0,
    odd: Sequence[str] = (),
) -> Arrays:  # fmt: skip
    """The gradients as the kernels left them, NaN where they wrote nothing. All arrays lie beside guarded memory.

    Kernels whose blocks take tile after tile have few blocks, of which each takes several. odd: arrays that count as
    not beginning at multiples of 16 bytes.
    """
    sms = sms or resident or 1 + seed % 3
    arrays = {name: in_its_order(x, name, before=seed % 2 == 1) for name, x in arrays.items()}
    for name in wanted:
        like = arrays[name[1:]]
        arrays[name] = guarded(np.full(like.shape, np.nan, like.dtype), name)
    p = problem_of(case, arrays, wanted)._replace(deterministic=deterministic)
    steps, sizes = backward_steps(p)
    steps, more = prepared(steps, arch, p.rows_aligned, H100, odd)
    for name, size in (sizes | more).items():
        arrays[name] = guarded(np.full(-(-size // 4), np.nan, np.float32), name)
    for step in steps:
        kernel = next(one for one in of_task(step.task).values() if not one.why_not(step.problem, arch, p.rows_aligned))
        config = kernel.choose(step.problem, arch, p.rows_aligned)
        at = [
            arrays[name].ctypes.data if (name := step.arguments.get(pointer, "")) in arrays else 0
            for pointer in kernel.params.pointers
        ]
        params = bytearray(kernel.params.size)
        kernel.params.pack_pointers(params, 0, *at)
        behind = kernel.params.maps_at
        params[8 * len(at) : behind] = kernel.params.pack(kernel.values(step.problem, config, p.rows_aligned, sms))
        for i, one in enumerate(kernel.map_arguments(step.problem, config)):
            params[behind + 128 * i : behind + 128 * (i + 1)] = tensor_map(one, at[kernel.params.mapped[i]])
        grid = kernel.grid(step.problem, config, sms)
        here = grid if kernel.at_once(step.problem, config, sms) else resident or 1 + seed % 2
        run(
            kernel.source(config), bytes(params), grid, config.threads, config.smem_bytes, seed, config.cluster,
            resident=here, headers=headers,
        )  # fmt: skip
    return {name: arrays[name] for name in wanted}


def in_its_order(x: NDArray[Any], name: str, before: bool) -> NDArray[Any]:
    """A guarded copy whose axes lie as those of x: the one with the largest stride first."""
    order = sorted(range(x.ndim), key=lambda axis: -x.strides[axis])
    return guarded(x.transpose(order), name, before).transpose(np.argsort(order))


def truth(case: Case, arrays: Arrays) -> dict[str, NDArray[np.float64]]:
    """Gradients of the float64 reference, of the out and lse that are given."""
    exact = (np.bool_, np.int32)
    given: dict[str, Any] = {n: a if a.dtype in exact else a.astype(np.float64) for n, a in arrays.items()}
    dense = not isinstance(case, VarlenCase)
    function: Any = reference.flash_attention_backward if dense else reference.flash_attention_varlen_backward
    main = [given.pop(name) for name in ("dout", "q", "k", "v", "out", "lse")]
    return {name: x for name, x in function(*main, **given, **case.options())._asdict().items() if x is not None}


def faults(case: Case, found: Arrays, want: Mapping[str, NDArray[np.float64]]) -> list[str]:
    """What is wrong with gradients. Rows that do not count must be as they were: NaN."""
    wrong = []
    for name, mine in found.items():
        mine, its = mine.astype(np.float64), want[name].copy()
        if name in ALL:
            for index in idle(case, "q" if name == "dq" else "k"):
                if not np.isnan(mine[index]).all():
                    wrong.append(f"{name}: rows that do not count")
                mine[index], its[index] = 0.0, 0.0
        t, r = TOLERANCES[case.dtype], 3 if case.softcap else 1
        norm = relative_error(mine, its)
        if not norm <= 2 * r * t.norm:
            wrong.append(f"{name}: relative error {norm:.3g}, worst row {row_error(mine, its):.3g}")
    return wrong
