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
from benchmarks.moe_cases import DRAWN, MOE_SUITES, MoECase  # noqa: E402
from benchmarks.moe_rivals import OursMoE  # noqa: E402
from flashmoe_cupy.jit.device import H100, DeviceProperties  # noqa: E402
from flashmoe_cupy.plan.archs import WARP_STORE_BYTES  # noqa: E402
from flashmoe_cupy.plan.moe.tiles import (  # noqa: E402
    TILE_64X128,
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
_KERNEL, _SCHEDULE = "moe/grouped_gemm_sm90.cuh", "moe/schedule.cuh"


class NarrowConfig(GemmSm90Config):
    """A tile of fewer than 64 rows, which only the changed kernel of `_NARROW` runs."""

    __slots__ = ()

    @property
    def consumers(self) -> int:
        return 1

    @property
    def smem_bytes(self) -> int:
        """As in GemmSm90Config, but only warps that have rows stage results."""
        idle = 4 - -(-self.block_m // 16)
        return super().smem_bytes - idle * WARP_STORE_BYTES


class BesideConfig(NarrowConfig):
    """One that leaves registers for a block of the other product on its multiprocessor."""

    __slots__ = ()

    @property
    def min_blocks(self) -> int:
        return 2


class Candidate(NamedTuple):
    """What stands instead of the library's choice. None: as the library has it."""

    name: str
    first: TileSm90 | None = None  # of gate and up, whose rows are gathered
    second: TileSm90 | None = None  # of down
    changes: tuple[Change, ...] = ()
    counter: bool = False  # single blocks take tiles from the counter, too, where there is one
    promotion: int | None = None  # bytes that L2 fetches at once for w
    beside: bool = False  # a block of each product fits on a multiprocessor, so that the second's begin early
    permuted: bool = False  # by a launch of its own, though there are few assignments
    waits: bool = False  # the second product awaits the rows of a group, however few groups there are


TODAY = Candidate("today")


class Experiment(NamedTuple):
    """Cases of moe_decode by name, and what they are timed with beside the library as it is."""

    cases: tuple[str, ...]
    candidates: tuple[Candidate, ...]


# Tiles of 16 or 32 rows. The warps that have rows read them into registers, the others multiply zeros; shared memory
# holds the rows that exist and no others, so that the ring has more steps.
_NARROW: tuple[Change, ...] = (
    (_KERNEL, "kConsumers = kPingPong ? 2 : kBlockM / 64,", "kConsumers = kPingPong ? 2 : div_up(kBlockM, 64),"),
    (_KERNEL, "kParts = kBlockM / (64 * kSharers);", "kParts = div_up(kBlockM, 64 * kSharers);"),
    (_KERNEL, "kOut + kConsumers * 4 * kStagedBytes,", "kOut + kBlockM / 16 * kStagedBytes,"),
    (_KERNEL, '#include "ptx/global_memory.cuh"\n', '#include "ptx/global_memory.cuh"\n#include "ptx/ldmatrix.cuh"\n'),
    (
        _KERNEL,
        "          write(p, tile, s_panels, first_row + part * 64 + warp_row, bias, r_out[part]);",
        "          if (warp_row < kBlockM) write(p, tile, s_panels, warp_row, bias, r_out[part]);",
    ),
    (
        _KERNEL,
        "      if constexpr (kGather) fence_proxy_async();  // what cp.async has written, for the tensor cores\n",
        """      const int row = (warp_id() & 3) * 16;
      u32 r_x[kBlockK / 16][4];
#pragma unroll
      for (int i = 0; i < kBlockK / 16; ++i)
        if (row < kBlockM)
          ldmatrix_x4(r_x[i], s_base + Smem::kX + at.stage * TileX::kBytes +
                                  TileX::offset(row + lane_id() % 16, 2 * i + lane_id() / 16));
        else r_x[i][0] = r_x[i][1] = r_x[i][2] = r_x[i][3] = 0;
""",
    ),
    (
        _KERNEL,
        "      const KMajor<TileX> x(s_base + Smem::kX + at.stage * TileX::kBytes + first_row * TileX::kRowBytes);\n",
        "",
    ),
    (
        _KERNEL,
        "      fm::multiply<Element, kBlockK>(r_out, x, w, step == 0);\n",
        "      fm::multiply<Element, 0>(r_out[0], r_x, w, step == 0, [] {});\n",
    ),
    (
        _KERNEL,
        """      if (step != 0) {
        wait_for_products<1>(r_out);
        release(rings, before);
      }
      before = at.stage;
      at.advance();
    }
    wait_for_products<0>(r_out);
    release(rings, before);
""",
        """      wait_for_products<0>(r_out);
      release(rings, at.stage);
      at.advance();
    }
""",
    ),
    (
        _KERNEL,
        """    const int first_row = kPingPong ? 0 : consumer * 64;
    int before = 0;
""",
        "",
    ),
)
_COUNTED: tuple[Change, ...] = (
    (_SCHEDULE, "return kCluster > 1 && p.tile_counter != kNoCounter;", "return p.tile_counter != kNoCounter;"),
    (
        _SCHEDULE,
        "    if (!counted(p)) return number += clusters;\n",
        """    if (!counted(p)) return number += clusters;
    if constexpr (kCluster == 1) {
      number = clusters + __shfl_sync(0xffffffffu, taken, 0);
      if (lane_id() == 0) taken = take(p);
      return number;
    }
""",
    ),
)
# Single blocks take their next tile when they need it: when the last weights of the one before are asked for.
_LATE: tuple[Change, ...] = (
    (_SCHEDULE, "return kCluster > 1 && p.tile_counter != kNoCounter;", "return p.tile_counter != kNoCounter;"),
    (_SCHEDULE, "if (counted(p) && rank == 0 &&", "if (kCluster > 1 && counted(p) && rank == 0 &&"),
    (
        _SCHEDULE,
        "    if (!counted(p)) return number += clusters;\n",
        """    if (!counted(p)) return number += clusters;
    if constexpr (kCluster == 1) {
      mbarrier_wait_parity(s_asked, parity), parity ^= 1;
      if (lane_id() == 0) taken = take(p);
      return number = clusters + __shfl_sync(0xffffffffu, taken, 0);
    }
""",
    ),
    (_KERNEL, "kWorks = 4; ", "kWorks = 3; "),  # what is written is reported when a record is used again
    (
        _KERNEL,
        "mbarrier_init(s_base + Smem::kDealt, 1), mbarrier_init(s_base + Smem::kAsked, 1);\n",
        """mbarrier_init(s_base + Smem::kDealt, 1), mbarrier_init(s_base + Smem::kAsked, 1);
      else mbarrier_init(s_base + Smem::kAsked, 1);
""",
    ),
    (
        _KERNEL,
        "        if constexpr (!kGather) load_x(p, tile, rings, s_base, rank, at.stage, step);\n",
        """        if constexpr (!kGather) load_x(p, tile, rings, s_base, rank, at.stage, step);
        if (kCluster == 1 && TileNumbers<kCluster>::counted(p) && step == max(steps - kStages, 0))
          mbarrier_arrive(s_base + Smem::kAsked);
""",
    ),
)
# Tiles of 8 rows. The descriptor says that all eight groups of eight rows lie in the same place, so that the tensor
# cores multiply the eight rows eight times; the first warp writes them.
_ROWS_8: tuple[Change, ...] = (
    (_KERNEL, "kConsumers = kPingPong ? 2 : kBlockM / 64,", "kConsumers = kPingPong ? 2 : div_up(kBlockM, 64),"),
    (_KERNEL, "kParts = kBlockM / (64 * kSharers);", "kParts = div_up(kBlockM, 64 * kSharers);"),
    (_KERNEL, "kOut + kConsumers * 4 * kStagedBytes,", "kOut + (kBlockM < 64 ? 1 : 4 * kConsumers) * kStagedBytes,"),
    (
        _KERNEL,
        "          write(p, tile, s_panels, first_row + part * 64 + warp_row, bias, r_out[part]);",
        """          if (warp_row < kBlockM)
            write(p, tile, s_panels, first_row + part * 64 + warp_row, bias, r_out[part]);""",
    ),
    (_KERNEL, "rows = tile.rows - warp_row;", "rows = min(tile.rows, kBlockM < 64 ? kBlockM : tile.rows) - warp_row;"),
    (
        "tile/warpgroup_gemm.cuh",
        "KMajor(u32 s_tile) : descriptor(wgmma_descriptor(s_tile, 0)) {}",
        "KMajor(u32 s_tile) : descriptor(wgmma_descriptor(s_tile, 0) & ~(Tile::kRows == 8 ? 0x3fffull << 32 : 0)) {}",
    ),
)
# As many steps as shared memory holds, on one or two blocks of a multiprocessor, or on a block of each product.
_EIGHT = TileSm90(64, 128, 64, 8, 1, False)
_8, _8_TWICE = TileSm90(8, 128, 64, 13, 1, False), TileSm90(8, 128, 64, 6, 1, False)
_8_FIRST, _8_SECOND = TileSm90(8, 128, 64, 8, 1, False), TileSm90(8, 128, 64, 4, 1, False)
_8X64, _8X64_SECOND = TileSm90(8, 64, 128, 12, 1, False), TileSm90(8, 64, 64, 9, 1, False)
_192, _8X192 = TileSm90(64, 192, 64, 6, 1, False), TileSm90(8, 192, 64, 8, 1, False)
_16, _16X64 = TileSm90(16, 128, 64, 12, 1, False), TileSm90(16, 64, 128, 11, 1, False)

BEFORE = Candidate("four steps of 128, 256 bytes from L2", TILE_64X128, TILE_64X128, promotion=256)
# All others fetch 128 bytes from L2 at once, as the library does since the second run.
EIGHT = Candidate("eight steps of 64", _EIGHT, _EIGHT, promotion=128)
EARLY = Candidate("eight, counter", _EIGHT, _EIGHT, _COUNTED, counter=True, promotion=128)
LATE = Candidate("eight, late counter", _EIGHT, _EIGHT, _LATE, counter=True, promotion=128)
ROWS_16_COLUMNS_64 = Candidate("16 rows, second 64 columns", _16, _16X64, _NARROW, promotion=128)
# One token of Qwen3-30B: 8 experts of 768 columns are 128 tiles of 48, 96 of 64, for 132 multiprocessors.
COLUMNS_48 = Candidate("first 48 columns", TileSm90(64, 96, 64, 10, 1, False), _EIGHT, promotion=128)
ROWS_8_COLUMNS_48 = Candidate(
    "8 rows, first 48 columns, 10 and 5 steps", TileSm90(8, 96, 64, 10, 1, False), _8_SECOND._replace(stages=5),
    _ROWS_8, promotion=128, beside=True,
)  # fmt: skip
COLUMNS_192 = Candidate("second 192 columns", _EIGHT, _192, promotion=128)
ROWS_8 = Candidate("8 rows", _8, _8, _ROWS_8, promotion=128)
ROWS_8_TWICE = Candidate("8 rows, two blocks", _8_TWICE, _8_TWICE, _ROWS_8, promotion=128)
ROWS_8_BESIDE = Candidate("8 rows, 8 and 4 steps", _8_FIRST, _8_SECOND, _ROWS_8, promotion=128, beside=True)
ROWS_8_BESIDE_5 = Candidate(
    "8 rows, 7 and 5 steps", _8_FIRST._replace(stages=7), _8_SECOND._replace(stages=5), _ROWS_8, promotion=128,
    beside=True,
)  # fmt: skip
ROWS_8_COLUMNS_64 = Candidate("8 rows, second 64 columns", _8, _8X64, _ROWS_8, promotion=128)
ROWS_8_COLUMNS_64_BESIDE = Candidate(
    "8 rows, second 64 columns, 8 and 9 steps", _8_FIRST, _8X64_SECOND, _ROWS_8, promotion=128, beside=True
)
ROWS_8_COLUMNS_192 = Candidate("8 rows, second 192 columns", _8, _8X192, _ROWS_8, promotion=128)
SECOND_64 = Candidate("eight, second 8 x 64", _EIGHT, _8X64, _ROWS_8, promotion=128)
ROWS_8_LATE = Candidate("8 rows, late counter", _8, _8, (*_ROWS_8, *_LATE), counter=True, promotion=128)
ROWS_8_TWICE_LATE = Candidate(
    "8 rows, two blocks, late counter", _8_TWICE, _8_TWICE, (*_ROWS_8, *_LATE), counter=True, promotion=128
)
# Assignments are permuted by a launch of its own even if there are few, so that there are counters.
PERMUTED = EIGHT._replace(name="eight, permuted", permuted=True)
PERMUTED_LATE = LATE._replace(name="eight, permuted, late counter", permuted=True)
PERMUTED_WAITS = PERMUTED_LATE._replace(name="eight, permuted, late counter, rows awaited", waits=True)
PERMUTED_COLUMNS_64 = Candidate(
    "8 rows, second 64 columns, permuted, late counter, rows awaited", _8, _8X64, (*_ROWS_8, *_LATE), counter=True,
    promotion=128, permuted=True, waits=True,
)  # fmt: skip
_DRAWN = tuple(case.name for case in MOE_SUITES["moe_decode"].cases if case.source == DRAWN)

EXPERIMENTS: dict[str, Experiment] = {
    # At most 32 assignments: the products sort them by themselves, and there is no counter.
    "one_token": Experiment(
        ("qwen3_30b_a3b_t1", "t1_d2048_n512_e512_k10", "mixtral_8x7b_t1"),
        (BEFORE, EIGHT, COLUMNS_48, ROWS_8_COLUMNS_48, ROWS_16_COLUMNS_64, ROWS_8, ROWS_8_TWICE, ROWS_8_BESIDE,
         ROWS_8_BESIDE_5,
         ROWS_8_COLUMNS_64, ROWS_8_COLUMNS_64_BESIDE, SECOND_64, PERMUTED_LATE, PERMUTED_WAITS, PERMUTED_COLUMNS_64),
    ),
    "few_tokens": Experiment(
        ("qwen3_30b_a3b_t4", "mixtral_8x7b_t4", "mixtral_8x7b_t16"),
        (BEFORE, COLUMNS_48, ROWS_8_COLUMNS_48, COLUMNS_192, ROWS_8, ROWS_8_TWICE, ROWS_8_BESIDE, ROWS_8_COLUMNS_64,
         ROWS_8_COLUMNS_192, SECOND_64, PERMUTED, PERMUTED_LATE, PERMUTED_WAITS, PERMUTED_COLUMNS_64),
    ),
    "some_tokens": Experiment(
        ("t4_d2048_n512_e512_k10", "qwen3_30b_a3b_t16", "qwen3_30b_a3b_t64", "t16_d2048_n512_e512_k10",
         "t64_d2048_n512_e512_k10", "mixtral_8x7b_t64"),
        (BEFORE, EARLY, LATE, COLUMNS_192, ROWS_8_TWICE, ROWS_8_LATE, ROWS_8_TWICE_LATE),
    ),
    "many_tokens": Experiment(
        ("qwen3_30b_a3b_t256", "t256_d2048_n512_e512_k10", *_DRAWN[:4]), (BEFORE, EARLY, LATE),
    ),
}  # fmt: skip


@contextlib.contextmanager
def taken(one: Candidate) -> Iterator[None]:
    """Within it the Hopper kernel is the candidate's. For one thread: the setting is global."""
    from flashmoe_cupy.plan.forget import forget_all
    from flashmoe_cupy.plan.moe import steps
    from flashmoe_cupy.plan.moe.products import GroupedGemmSm90

    host: Any = steps
    kernel: Any = GroupedGemmSm90
    names = ("choose", "takes_from_counter", "map_arguments", "waits_from_groups")
    before, few = {name: getattr(kernel, name) for name in names}, host.SELF_SORTED

    def choose(self: Any, product: Product, *where: Any, **options: Any) -> GemmSm90Config:
        tile = one.first if product.gather else one.second
        config: GemmSm90Config = before["choose"](self, product, *where, **options)
        if tile is None:
            return config
        made = GemmSm90Config if tile.block_m >= 64 else BesideConfig if one.beside else NarrowConfig
        return made(config.element, *tile, config.gather, config.gated, config.clamped)

    def map_arguments(self: Any, product: Product, config: GemmSm90Config) -> Any:
        x, w, out = before["map_arguments"](self, product, config)
        return x, w._replace(promotion=one.promotion), out

    with changed(GroupedGemmSm90, one.name, one.changes):
        kernel.choose = choose
        if one.counter:
            kernel.takes_from_counter = lambda self, product, config: True  # noqa: ARG005
        if one.promotion is not None:
            kernel.map_arguments = map_arguments
        if one.waits:
            kernel.waits_from_groups = 0
        if one.permuted:
            host.SELF_SORTED = 0
        forget_all()
        try:
            yield
        finally:
            for name in names:
                setattr(kernel, name, before[name])
            host.SELF_SORTED = few
            forget_all()


def named(name: str) -> MoECase:
    """A case of moe_decode. Raises KeyError with the names that there are."""
    cases = {case.name: case for case in MOE_SUITES["moe_decode"].cases}
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
