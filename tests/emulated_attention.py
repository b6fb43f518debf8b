"""The attention kernels on the emulated GPU: Params as a launch would make them, and the rule that results keep to."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import lru_cache, partial
from typing import Any

import numpy as np
from emulate import EmulationError, guarded, run, tensor_map
from numpy.typing import NDArray

from flashmoe_cupy import reference
from flashmoe_cupy.arrays import view
from flashmoe_cupy.plan.attention.bias import workspace
from flashmoe_cupy.plan.attention.problem import AttentionProblem, attention_problem, varlen_problem
from flashmoe_cupy.plan.attention.tiles import Config
from flashmoe_cupy.plan.kernels import KERNELS, of_task
from flashmoe_cupy.plan.step import Step, same
from flashmoe_cupy.testing import TOLERANCES, Case, VarlenCase, compare_lse, within_tolerance

SM80, SM90 = "attention_fwd_sm80", "attention_fwd_sm90"
Arrays = dict[str, NDArray[Any]]


def problem_of(case: Case, arrays: Arrays) -> AttentionProblem:
    make = varlen_problem if isinstance(case, VarlenCase) else attention_problem
    views = {name: view(array, name) for name, array in arrays.items()}
    return make(views.pop("q"), views.pop("k"), views.pop("v"), **views, **case.options())


def choose(case: Case, kernel: str) -> Config:
    """The configuration that the library takes for a case."""
    problem = problem_of(case, case.random())
    arch = "sm_90a" if kernel == SM90 else "sm_80"
    config: Config = KERNELS[kernel].choose(problem, arch, problem.rows_aligned)
    return config


def attention(
    case: Case,
    kernel: str,
    seed: int,
    config: Config | None = None,
    headers: Mapping[str, str] | None = None,
    sms: int = 3,
    resident: int = 1,
    given: Arrays | None = None,
    lay: Callable[[NDArray[Any], str], NDArray[Any]] | None = None,
) -> tuple[NDArray[Any], NDArray[Any]]:
    """(out, lse) as the kernel left them, NaN where it wrote nothing. Every array lies beside memory without access.

    given: arrays instead of the case's random ones. lay: what puts an argument into such memory, by its name; None:
    row-major.
    """
    spec, config = KERNELS[kernel], config or choose(case, kernel)
    lay = lay or partial(guarded, before=seed % 2 == 1)
    arrays = {name: lay(x, name) for name, x in (given or case.random()).items()}
    p = problem_of(case, arrays)
    shape = (p.total_q, p.heads_q, p.head_dim_v) if p.varlen else (p.batch, p.seqlen_q, p.heads_q, p.head_dim_v)
    rows = (p.heads_q, p.total_q) if p.varlen else (p.batch, p.heads_q, p.seqlen_q)
    arrays["out"] = guarded(np.full(shape, np.nan, arrays["q"].dtype), "out")
    arrays["lse"] = guarded(np.full(rows, np.nan, np.float32), "lse")
    clear = 0 if p.even or not spec.clears else 3
    step = Step("attention_fwd", p, same(*spec.params.pointers), {"clear_rest": clear} if spec.clears else {})
    room = workspace(p)
    odd = ["bias"] if "bias" in arrays and arrays["bias"].ctypes.data % 16 else []
    steps, more = spec.before(step, config, odd)
    for name, size in (room | more).items():
        arrays[name] = guarded(np.full(-(-size // 4), 0x7FC0DEAD, np.int32), name)
    for one in steps:
        launched = spec if one is steps[-1] else next(iter(of_task(one.task).values()))
        its = config if one is steps[-1] else _config_for(launched, one.problem, config)
        _launch(launched, its, one, arrays, seed, sms, resident, headers)
    return arrays["out"], arrays["lse"]


def _config_for(kernel: Any, p: AttentionProblem, config: Config) -> Any:
    """The configuration of a kernel that prepares something for one that runs in `config`."""
    found = kernel.choose(p, "sm_90a", True)
    return found._replace(block_m=config.block_m, block_n=config.block_n) if hasattr(found, "block_m") else found


def _launch(
    kernel: Any, config: Any, step: Step, arrays: Arrays, seed: int, sms: int, resident: int,
    headers: Mapping[str, str] | None,
) -> None:  # fmt: skip
    """One launch of a step, whose counter stays as it was."""
    p = step.problem
    at = [arrays[name].ctypes.data if (name := step.arguments.get(pointer, "")) in arrays else 0
          for pointer in kernel.params.pointers]  # fmt: skip
    params = bytearray(kernel.params.size)
    kernel.params.pack_pointers(params, 0, *at)
    behind = kernel.params.maps_at
    values = kernel.values(p, config, p.rows_aligned, sms) | step.values
    params[8 * len(at) : behind] = kernel.params.pack(values)
    for i, one in enumerate(kernel.map_arguments(p, config)):
        params[behind + 128 * i : behind + 128 * (i + 1)] = tensor_map(one, at[i])
    counter = guarded(np.zeros(2, np.int32), "the counter of tiles")
    if place := kernel.counter_at(p):
        params[place : place + 8] = counter.ctypes.data.to_bytes(8, "little")
    run(
        kernel.source(config), bytes(params), kernel.grid(p, config, sms), config.threads, config.smem_bytes, seed,
        resident=resident, headers=headers,
    )  # fmt: skip
    assert not counter.any(), "the kernel does not leave its counter as it was"


def _reference(case: Case, arrays: Arrays) -> tuple[NDArray[Any], NDArray[Any]]:
    """(out, lse) of the reference."""
    options: dict[str, Any] = dict(case.options())
    exact = (np.bool_, np.int32)
    given: dict[str, Any] = {n: a if a.dtype in exact else a.astype(np.float64) for n, a in arrays.items()}
    dense = not isinstance(case, VarlenCase)
    truth = reference.flash_attention if dense else reference.flash_attention_varlen
    out, lse = truth(given.pop("q"), given.pop("k"), given.pop("v"), **given, **options, return_lse=True)
    return out, lse


@lru_cache(4)
def _truth(case: Case) -> tuple[NDArray[Any], NDArray[Any]]:
    """A test asks for the same one after each seed."""
    both = _reference(case, case.random())
    for x in both:
        x.flags.writeable = False
    return both


def faults(case: Case, kernel: str, out: NDArray[Any], lse: NDArray[Any], arrays: Arrays | None = None) -> list[str]:
    """What is wrong with a result; rows of no sequence must be zeros, or untouched by a kernel that does not clear."""
    want, want_lse = _reference(case, arrays) if arrays else _truth(case)
    mine, mine_lse, found = out.astype(np.float64), lse.astype(np.float64), []
    if isinstance(case, VarlenCase) or case.indices():
        idle = np.ones(out.shape[:-2], bool)
        for b, (start, stop) in enumerate(case.spans("q")):
            (idle if isinstance(case, VarlenCase) else idle[b])[start:stop] = False
        mine_lse, want_lse = mine_lse.swapaxes(-1, -2), want_lse.swapaxes(-1, -2)
        rest, rest_lse = (0.0, -np.inf) if KERNELS[kernel].clears else (np.nan, np.nan)
        if not np.array_equal(mine[idle], np.full_like(mine[idle], rest), equal_nan=True):
            found.append("out of rows of no sequence")
        if not np.array_equal(mine_lse[idle], np.full_like(mine_lse[idle], rest_lse), equal_nan=True):
            found.append("lse of rows of no sequence")
        mine, want, mine_lse, want_lse = mine[~idle], want[~idle], mine_lse[~idle], want_lse[~idle]
    verdicts = (
        within_tolerance(mine, want, case.dtype, softcap=case.softcap),
        compare_lse(mine_lse, want_lse, atol=TOLERANCES[case.dtype].lse),
    )
    return found + [verdict.text for verdict in verdicts if not verdict]


def outcomes(
    case: Case, kernel: str, seeds: Iterable[int], config: Config, headers: Mapping[str, str]
) -> Iterator[tuple[int, str]]:
    """What each seed finds in a kernel that may be wrong: "" nothing, else the report or what is wrong with numbers."""
    for seed in seeds:
        try:
            yield seed, "; ".join(faults(case, kernel, *attention(case, kernel, seed, config, headers)))
        except EmulationError as error:
            yield seed, str(error)
