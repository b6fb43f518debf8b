"""Time candidates for the grouped products of few tokens on Hopper against what the library takes today.

    python benchmarks/moe_candidates.py --list
    python benchmarks/moe_candidates.py --budget 150 --out moe_candidates.jsonl
    python benchmarks/moe_candidates.py one_token some_tokens --out moe_candidates.jsonl

A candidate is a tile of its own for the first product, the second, or both; texts of device headers that stand instead
of others; or another number of the host's. As in run.py, every case is a CUDA graph of many calls, each with other
weights than the call before, so that no weights are found in L2, and every answer is checked in float64. Graphs run in
turns, in turning order, and with them a plain read of 2 GiB. What is printed and written is the median time, its ratio
to the library as it is, and the share of that read's rate. One JSON line for a case and a candidate.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import json
import statistics
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

ROOT = Path(__file__).resolve().parent.parent
if not __package__:  # run as a file: the repository takes the place of this folder on the path
    sys.path[0] = str(ROOT)

from benchmarks.candidates import Change, add_times, changed, compile_all, in_turns  # noqa: E402
from benchmarks.library import Setup  # noqa: E402
from benchmarks.moe_cases import DRAWN, MODELS, MOE_SUITES, MoECase  # noqa: E402
from benchmarks.moe_rivals import OursMoE  # noqa: E402
from flashmoe_cupy.jit.device import H100, DeviceProperties  # noqa: E402
from flashmoe_cupy.plan.moe.tiles import (  # noqa: E402
    TILE_8X64,
    TILE_8X64_TWICE,
    TILE_8X96,
    TILE_64X64,
    TILE_64X128_SHORT_STEPS,
    GemmSm90Config,
    TileSm90,
)

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from benchmarks.timing import Timer
    from flashmoe_cupy.plan.moe.products import Product

_SAMPLE_US = 2500.0  # of one graph
_MAX_CALLS = 96
_READ = "read of 2 GiB"


class Candidate(NamedTuple):
    """What stands instead of the library's choice. None: as the library has it."""

    name: str
    first: TileSm90 | None = None  # of gate and up, whose rows are gathered
    second: TileSm90 | None = None  # of down
    changes: tuple[Change, ...] = ()
    counter: bool = True  # single blocks take tiles from the counter where there is one; False: none does
    permuted: bool = False  # by a launch of its own, though there are few assignments
    next_bytes: int | None = None  # of the second product's weights that a block of the first asks L2 for


TODAY = Candidate("today")


class Experiment(NamedTuple):
    """Cases by name, see `named`, and what they are timed with beside the library as it is."""

    cases: tuple[str, ...]
    candidates: tuple[Candidate, ...]


ROWS_64 = Candidate("64 rows", TILE_64X128_SHORT_STEPS, TILE_64X128_SHORT_STEPS)
ROWS_64_COLUMNS_64 = Candidate("64 rows, second 64 columns", TILE_64X128_SHORT_STEPS, TILE_64X64)
UNCOUNTED = Candidate("no counter", counter=False)


def _eight(columns: int, block_k: int, stages: int) -> TileSm90:
    return TileSm90(8, columns, block_k, stages, 1, False)


# Tiles of 8 rows for the first product and for the second: a block that fills the shared memory, one that leaves room
# for one of the next product, or two of its own.
_FIRST = (TILE_8X96, _eight(96, 64, 16), _eight(128, 64, 13), _eight(128, 64, 6))
_SECOND = (TILE_8X64_TWICE, TILE_8X64, _eight(128, 64, 13))
EIGHT = tuple(
    Candidate(f"8 rows, {first.block_n} x {first.stages} and {second.block_n} x {second.block_k} x {second.stages}",
              first, second)
    for first in _FIRST for second in _SECOND
)  # fmt: skip
ROWS_8 = EIGHT[0]
# Assignments are permuted by a launch of its own even if there are few, so that there are counters.
NEXT = tuple(Candidate(f"{kb} KB of the next weights", next_bytes=kb * 1024) for kb in (0, 48))
PERMUTED = Candidate("permuted", permuted=True)
ROWS_8_PERMUTED = ROWS_8._replace(name="8 rows, permuted", permuted=True)
_DRAWN = tuple(case.name for case in MOE_SUITES["moe_decode"].cases if case.source == DRAWN)

EXPERIMENTS: dict[str, Experiment] = {
    # At most 32 assignments: the products sort them by themselves, and there is no counter.
    "one_token": Experiment(
        ("qwen3_30b_a3b_t1", "t1_d2048_n512_e512_k10", "mixtral_8x7b_t1"),
        (ROWS_64, ROWS_64_COLUMNS_64, *EIGHT, *NEXT, PERMUTED),
    ),
    "few_tokens": Experiment(
        ("qwen3_30b_a3b_t2", "qwen3_30b_a3b_t4", "mixtral_8x7b_t4", "mixtral_8x7b_t16"),
        (ROWS_64, *EIGHT, *NEXT, PERMUTED, ROWS_8_PERMUTED),
    ),
    "some_tokens": Experiment(
        ("t4_d2048_n512_e512_k10", "qwen3_30b_a3b_t16", "qwen3_30b_a3b_t32", "t16_d2048_n512_e512_k10",
         "t64_d2048_n512_e512_k10"),
        (UNCOUNTED, ROWS_64, *EIGHT),
    ),
    "more_rows": Experiment(  # 2 to 6 rows of a group on average
        ("mixtral_8x7b_t8", "mixtral_8x7b_t12", "mixtral_8x7b_t16", "mixtral_8x7b_t24", "qwen3_30b_a3b_t48",
         "qwen3_30b_a3b_t64", "qwen3_30b_a3b_t96", "qwen3_next_80b_a3b_t128", "qwen3_next_80b_a3b_t192", _DRAWN[3],
         _DRAWN[4], _DRAWN[5]),
        (ROWS_64, ROWS_8),
    ),
    "many_tokens": Experiment(
        ("qwen3_30b_a3b_t64", "mixtral_8x7b_t64", "qwen3_30b_a3b_t256", "t256_d2048_n512_e512_k10", *_DRAWN[:4]),
        (UNCOUNTED, ROWS_8),
    ),
}  # fmt: skip


@contextlib.contextmanager
def taken(one: Candidate) -> Iterator[None]:
    """Within it the Hopper kernel is the candidate's. For one thread: the setting is global."""
    from flashmoe_cupy.plan.forget import forget_all
    from flashmoe_cupy.plan.moe import few_rows, steps
    from flashmoe_cupy.plan.moe.products import GroupedGemmSm90

    host: Any = steps
    tiles: Any = few_rows
    kernel: Any = GroupedGemmSm90
    names = ("choose", "next_weights", "takes_from_counter")
    before = {name: getattr(kernel, name) for name in names}
    few, next_bytes = host.SELF_SORTED, tiles.NEXT_BYTES

    def choose(self: Any, product: Product, *where: Any, **options: Any) -> GemmSm90Config:
        tile = one.first if product.gather else one.second
        config: GemmSm90Config = before["choose"](self, product, *where, **options)
        if tile is None:
            return config
        return GemmSm90Config(config.element, *tile, config.gather, config.gated, config.clamped)

    def takes(self: Any, product: Product, config: GemmSm90Config) -> bool:  # noqa: ARG001
        return one.counter or config.cluster > 1

    with changed(GroupedGemmSm90, one.name, one.changes):
        kernel.choose = choose
        if one.first or one.second or not one.counter:
            kernel.takes_from_counter = takes
        if one.next_bytes is not None:
            tiles.NEXT_BYTES = one.next_bytes
        if one.next_bytes == 0:
            kernel.next_weights = lambda *_: None
        if one.permuted:
            host.SELF_SORTED = 0
        forget_all()
        try:
            yield
        finally:
            for name in names:
                setattr(kernel, name, before[name])
            host.SELF_SORTED, tiles.NEXT_BYTES = few, next_bytes
            forget_all()


def named(name: str) -> MoECase:
    """A case of moe_decode, or a model's with so many tokens. Raises KeyError with the names that there are."""
    cases = {case.name: case for case in MOE_SUITES["moe_decode"].cases}
    model, _, tokens = name.rpartition("_t")
    if name not in cases and model in MODELS and tokens.isdecimal():
        return MODELS[model].case("moe_decode", int(tokens), graph=True, routing=False)
    if name not in cases:
        raise KeyError(f"moe_decode has no case {name!r}; it has {', '.join(cases)}")
    return cases[name]


def products_of(case: MoECase) -> list[Product]:
    """The two products of a case, as the library plans them."""
    from flashmoe_cupy import dtypes
    from flashmoe_cupy.plan.moe.problem import moe_problem
    from flashmoe_cupy.plan.moe.steps import moe_steps
    from flashmoe_cupy.service.choices import absent_arrays

    array, kind = absent_arrays(), dtypes.from_name(case.dtype)
    problem = moe_problem(
        array(kind, case.tokens, case.hidden), array(kind, case.experts, case.up_rows, case.hidden),
        array(kind, case.experts, case.hidden, case.intermediate), array(dtypes.FP32, case.tokens, case.top_k),
        array(dtypes.INT32, case.tokens, case.top_k), activation=case.activation,
    )  # fmt: skip
    return [step.problem for step in moe_steps(problem)[0] if step.task == "grouped_gemm"]


def sources(cases: Sequence[MoECase], candidates: Sequence[Candidate]) -> dict[str, tuple[str, dict[str, str]]]:
    """The kernels of an experiment: by source the name for people, and the headers."""
    from flashmoe_cupy.jit import source
    from flashmoe_cupy.plan.kernels import KERNELS

    found: dict[str, tuple[str, dict[str, str]]] = {}
    kernel = KERNELS["grouped_gemm_sm90"]
    for one in candidates:
        with taken(one):
            for product in [product for case in cases for product in products_of(case)]:
                config = kernel.choose(product, "sm_90a")
                text = kernel.source(config)
                found[text] = f"{one.name}: {config.name}", source.headers_for(text)
    return found


def measure(
    case: MoECase, candidates: Sequence[Candidate], timer: Timer, device: str = "cuda", seed: int = 0
) -> list[dict[str, Any]]:  # fmt: skip
    """A row for each candidate that runs and is right; the first is what the others are measured against."""
    from benchmarks import moe_inputs
    from benchmarks.timing import capture
    from flashmoe_cupy.jit import launch

    setup, here = Setup(device), launch.properties(0) if device == "cuda" else H100
    inputs = moe_inputs.input_sets(case, timer, device, seed)
    prepared = OursMoE().prepare(case, inputs, setup)
    weights = sum(moe_inputs.touched(one) for one in inputs) / len(inputs) * case.expert_bytes()
    read = timer.references()["read_gbps"]
    runs: dict[str, Any] = {}
    rows: dict[str, dict[str, Any]] = {}
    calls = 0
    for one in candidates:
        row = rows[one.name] = {"case": case.name, "suite": case.suite, "candidate": one.name}
        try:
            with taken(one):
                row["configs"] = [configuration(product, here) for product in products_of(case)]
                out = prepared.run(0)
                timer.synchronize()
                answer = moe_inputs.check(case, inputs[0], prepared.as_torch(out))
                row |= {"status": "ok" if answer.passed else "wrong", "error": answer.error}
                if not answer.passed:
                    continue
                if not calls:  # short calls take as long as the host needs: a graph says what they really take
                    short = capture(prepared.run, 2 * len(inputs), cuda=setup.cuda)
                    calls = max(len(inputs), round(_SAMPLE_US / timer.sample(short.run, 2) * short.calls))
                    calls = -(-min(_MAX_CALLS, calls) // len(inputs)) * len(inputs)
                runs[one.name] = capture(prepared.run, calls, cuda=setup.cuda)
        except Exception as error:  # a candidate that does not compile or fit is a row, too
            row |= {"status": "error", "reason": str(error)[:500]}
    turns = {name: (replay.run, replay.calls) for name, replay in runs.items()}
    samples = in_turns(turns | {_READ: (read.run, 1)}, timer)
    reads = samples.pop(_READ)
    add_times(rows, samples, candidates[0].name)
    rate = read.work / statistics.median(reads)
    for name in samples:
        share = weights / rows[name]["device_us"] / 1e3 / rate
        rows[name] |= {"read_share": round(share, 4), "read_gbps": round(rate, 1), "calls": calls, "sets": len(inputs)}
    return list(rows.values())


def configuration(product: Product, device: DeviceProperties = H100) -> str:
    """The name of what runs a product on such a device."""
    from flashmoe_cupy.plan.kernels import KERNELS

    return str(KERNELS["grouped_gemm_sm90"].choose(product, "sm_90a", True, device).name)


def line_of(row: dict[str, Any]) -> str:
    """One row for people."""
    head = f"{row['case']:<26} {row['candidate']:<30} {row['status']:<6}"
    if "device_us" not in row:
        return f"{head} {row.get('reason', '')}"
    return f"{head} {row['device_us']:8.1f} us  {row.get('ratio', 0.0):6.3f} of today  {100 * row['read_share']:5.1f} %"


def main(arguments: Sequence[str] | None = None) -> int:
    begin = time.perf_counter()
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("names", nargs="*", choices=[*EXPERIMENTS, []], help="experiments; none: all")
    parser.add_argument("--list", action="store_true", help="print the experiments")
    parser.add_argument("--out", type=Path, help="append JSON lines here")
    parser.add_argument("--budget", type=float, default=float("inf"), metavar="SECONDS", help="stop in time for this")
    chosen = parser.parse_args(arguments)
    wanted = {name: EXPERIMENTS[name] for name in chosen.names or EXPERIMENTS}
    if chosen.list:
        for name, of in wanted.items():
            print(f"{name}: {' '.join(of.cases)}: {', '.join(one.name for one in of.candidates)}")
        return 0
    from benchmarks.timing import GpuTimer

    jobs: dict[str, tuple[str, dict[str, str]]] = {}
    for of in wanted.values():
        jobs |= sources([named(case) for case in of.cases], (TODAY, *of.candidates))
    compile_all(jobs)
    timer = GpuTimer("cuda")
    print(f"{timer.name}: {len(jobs)} kernels compiled after {time.perf_counter() - begin:.1f} s", flush=True)
    longest = 0.0
    for name, of in wanted.items():
        for case in of.cases:
            start = time.perf_counter()
            if start - begin + longest > chosen.budget:
                print(f"{name} {case}: out of budget", flush=True)
                continue
            rows = measure(named(case), (TODAY, *of.candidates), timer)
            gc.collect()  # graphs hold memory, and the next case may need it
            timer.release()
            longest = max(longest, time.perf_counter() - start)
            for row in rows:
                print(line_of(row), flush=True)
                if chosen.out:
                    with chosen.out.open("a", encoding="utf-8") as file:
                        file.write(json.dumps(row | {"experiment": name, "device": timer.name}) + "\n")
    print(f"{time.perf_counter() - begin:.1f} s", flush=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
