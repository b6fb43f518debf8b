"""Time candidates for a tile or a piece of the Hopper attention kernel against what the library takes today.

    python benchmarks/candidates.py --list
    python benchmarks/candidates.py d256 bias_d128 --out candidates.jsonl

A candidate is a tile of its own, or texts of device headers that stand instead of others, or both. All candidates of an
experiment are compiled ahead on all cores, and each one's answer is checked as in run.py. Then every one is recorded as
a CUDA graph of many calls, and the graphs run in turns, in turning order. What is printed and written is the median
time and its ratio to the first one's, which is the library as it is. One JSON line for a case and a candidate.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import statistics
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

ROOT = Path(__file__).resolve().parent.parent
if not __package__:  # run as a file: the repository takes the place of this folder on the path
    sys.path[0] = str(ROOT)

from benchmarks.attention_inputs import check, make_inputs  # noqa: E402
from benchmarks.cases import SUITES  # noqa: E402
from benchmarks.library import Setup  # noqa: E402
from benchmarks.ours import Ours  # noqa: E402

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from benchmarks.cases import Case
    from benchmarks.timing import Timer

    Run = Callable[[int], Any]

_ROUNDS = 9
_SAMPLE_US = 4000.0  # of one graph
_KERNEL = "attention_fwd_sm90"


Change = tuple[str, str, str]  # (header, a text that it holds once, what stands instead)


class Candidate(NamedTuple):
    """What stands instead of the library's choice. tile: block_m, block_n, stages; None: as the library chooses."""

    name: str
    tile: tuple[int, int, int] | None = None
    changes: tuple[Change, ...] = ()


TODAY = Candidate("today")


class Experiment(NamedTuple):
    """Cases by suite and name, and what they are timed with beside the library as it is."""

    suite: str
    cases: tuple[str, ...]
    candidates: tuple[Candidate, ...]


def _tiles(*tiles: tuple[int, int, int]) -> tuple[Candidate, ...]:
    return tuple([Candidate("x".join(map(str, tile)), tile) for tile in tiles])


# Exponentials of a plain step before the wait for the product with V, as FlashAttention-4 has them.
_EARLY = (
    "attention/fwd_sm90.cuh",
    """        wgmma_wait_group<0>(r_out[0]);
        rings.v.release(at.v);
        at.v.advance();
        rings.v.skip(at.v, skip, [] {});
        if (!kBounded && !last && any_differs(correction)) scale_rows(r_out, correction);
        Scores::template exponentiate<!kMasked>(p, softmax, s_works[here], at.steps, r_s, tile_row, at.n);
""",
    """        Scores::template exponentiate<!kMasked>(p, softmax, s_works[here], at.steps, r_s, tile_row, at.n);
        wgmma_wait_group<0>(r_out[0]);
        rings.v.release(at.v);
        at.v.advance();
        rings.v.skip(at.v, skip, [] {});
        if (!kBounded && !last && any_differs(correction)) scale_rows(r_out, correction);
""",
)
_EARLY_EXPONENTIALS = Candidate("exponentials before the wait", None, (_EARLY,))
_NOT_IN_TURN = ("attention/fwd_sm90.cuh", "kConsumers == 2 || kConsumers == 3;", "false;")
# Exponents beside a bias: the maximum that does not lag, careful exponentials for all, none for any (which is wrong
# for biases near the end of the range).
_LAG = "kLag = 8.f;\n  static constexpr float kFar"
_NO_LAG = ("math/softmax.cuh", _LAG, _LAG.replace("8.f", "kWide ? 0.f : 8.f"))
_CAREFUL = ("math/softmax.cuh", "if (!__all_sync(0xffffffffu, near)) {", "if (true) {")
_CARELESS = ("math/softmax.cuh", "if (!__all_sync(0xffffffffu, near)) {", "if (false) {")
_EXPONENTS = (
    Candidate("no lag", None, (_NO_LAG,)), Candidate("careful", None, (_CAREFUL,)),
    Candidate("no lag, careful", None, (_NO_LAG, _CAREFUL)), Candidate("careless", None, (_CARELESS,)),
)  # fmt: skip
_ONE_LOOP = Candidate("one loop", None, (("attention/variant.cuh", "kOneLoop = kBytes == 4;", "kOneLoop = true;"),))
_MASKED_IN_ONE_LOOP = Candidate(
    "hidden scores in the loop of all", None,
    (("attention/fwd_sm90.cuh", "if constexpr (Variant::kScore) break;", "if (true) break;"),),
)  # fmt: skip
_FULL, _CAUSAL = "full", "causal"


def _forward(d: int, *rows: tuple[int, str]) -> tuple[str, ...]:
    return tuple([f"d{d}_s{n}_{mask}" for n, mask in rows])


EXPERIMENTS: dict[str, Experiment] = {
    "d256": Experiment(
        "attention_forward", _forward(256, (1024, _CAUSAL), (4096, _CAUSAL), (8192, _CAUSAL), (8192, _FULL)),
        (*_tiles((128, 80, 2)), Candidate("128x80x2, not in turn", (128, 80, 2), (_NOT_IN_TURN,))),
    ),
    "d128": Experiment(
        "attention_forward", _forward(128, (2048, _CAUSAL), (8192, _CAUSAL), (8192, _FULL), (16384, _FULL)),
        (*_tiles((128, 128, 2), (128, 144, 2), (128, 160, 2), (128, 176, 2)), _EARLY_EXPONENTIALS),
    ),
    "d64": Experiment(
        "attention_forward", _forward(64, (1024, _FULL), (8192, _CAUSAL), (8192, _FULL)),
        (*_tiles((192, 128, 3), (128, 128, 3), (256, 64, 4)), _EARLY_EXPONENTIALS),
    ),
    "few_keys": Experiment(
        "attention_few_keys", ("q448_k1500_b8_d64_full",), _tiles((192, 128, 3), (128, 128, 3), (256, 64, 4)),
    ),
    "key_bias": Experiment(
        "attention_bias", ("padding_bf16", "padding_fp32"), _tiles((192, 128, 3), (256, 64, 4), (128, 128, 3)),
    ),
    "bias_d64": Experiment(
        "attention_bias", ("per_head_bf16", "pair_bf16", "per_head_fp32", "pair_fp32"),
        (*_tiles((256, 64, 2), (128, 96, 2)), *_EXPONENTS, _ONE_LOOP),
    ),
    "bias_d128": Experiment(
        "attention_bias", ("per_batch_bf16", "per_batch_fp32"),
        (*_tiles((128, 64, 2)), *_EXPONENTS, _ONE_LOOP),
    ),
    "mask": Experiment(
        "attention_mask", ("per_head_tiles", "per_head_random", "per_batch_tiles", "per_batch_random", "pair_random"),
        (*_tiles((128, 64, 3), (128, 128, 2), (192, 128, 3)), _MASKED_IN_ONE_LOOP),
    ),
}  # fmt: skip


@contextlib.contextmanager
def changed(kernel: type[Any], name: str, changes: Sequence[Change]) -> Iterator[None]:
    """Within it the kernel's headers hold other texts. name: of the candidate, which sources are marked with.

    For one thread: the setting is global. Raises ValueError, when a kernel is compiled, for a text that its header does
    not hold once.
    """
    from flashmoe_cupy.jit import source

    headers, render = source.headers_for, kernel.source
    mark = f"// candidate: {name}\n"  # a source of its own, which the changed headers belong to

    def headers_for(text: str) -> dict[str, str]:
        found = headers(text)
        for header, old, new in changes if mark in text else ():
            if found[header].count(old) != 1:
                raise ValueError(f"{header} does not hold the text of {name!r} once")
            found[header] = found[header].replace(old, new)
        return found

    patched: Any = kernel
    if changes:
        source.headers_for = headers_for
        patched.source = lambda self, config: mark + render(self, config)
    try:
        yield
    finally:
        source.headers_for, patched.source = headers, render


@contextlib.contextmanager
def taken(one: Candidate) -> Iterator[None]:
    """Within it the Hopper kernel is the candidate's. For one thread: the setting is global."""
    from flashmoe_cupy.plan.attention import choice as where
    from flashmoe_cupy.plan.attention.forward import AttentionFwdSm90
    from flashmoe_cupy.plan.forget import forget_all

    choice: Any = where
    tiles = choice.tiles_sm90
    with changed(AttentionFwdSm90, one.name, one.changes):
        if one.tile is not None:
            choice.tiles_sm90 = lambda dims, variant: (one.tile,)  # noqa: ARG005
        forget_all()
        try:
            yield
        finally:
            choice.tiles_sm90 = tiles
            forget_all()


def named(suite: str, name: str) -> Case:
    """A case of a suite. Raises KeyError with the names that there are."""
    cases = {case.name: case for case in SUITES[suite].cases}
    if name not in cases:
        raise KeyError(f"{suite} has no case {name!r}; it has {', '.join(cases)}")
    return cases[name]


def compile_ahead(suite: str, cases: Sequence[Case], candidates: Sequence[Candidate]) -> None:
    """All kernels of an experiment, on all cores."""
    from flashmoe_cupy.jit import source
    from flashmoe_cupy.plan.kernels import KERNELS
    from flashmoe_cupy.service.attention import problem_of

    jobs: dict[str, tuple[str, dict[str, str]]] = {}
    for one in candidates:
        with taken(one):
            for case in cases:
                bias = case.bias or None
                problem = problem_of(
                    case.batch, case.seqlen_q, case.seqlen_k, case.heads_q, case.heads_k, case.head_dim,
                    case.head_dim_v, case.dtype, case.causal, case.window_size, None, case.softcap, case.alibi, bias,
                    case.sinks, False,
                )  # fmt: skip
                kernel = KERNELS[_KERNEL]
                text = kernel.source(kernel.choose(problem, "sm_90a"))
                jobs[text] = (f"{suite} {one.name}", source.headers_for(text))
    compile_all(jobs)


def compile_all(jobs: Mapping[str, tuple[str, dict[str, str]]]) -> None:
    """Compile translation units for Hopper, on all cores. jobs: by source the name for people, and the headers.

    One that does not compile is left to who uses it.
    """
    from flashmoe_cupy.errors import FlashMoEError
    from flashmoe_cupy.jit import cache

    def compiled(job: tuple[str, tuple[str, dict[str, str]]]) -> None:
        with contextlib.suppress(FlashMoEError):
            cache.get(job[0], job[1][0], "sm_90a", job[1][1])

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(compiled, jobs.items()))


def measure(case: Case, candidates: Sequence[Candidate], timer: Timer, seed: int = 0) -> list[dict[str, Any]]:
    """A row for each candidate that runs and is right; the first is what the others are measured against."""
    import torch

    inputs = make_inputs(case, "cuda", seed)
    prepared = Ours().prepare(case, [inputs], Setup("cuda"))
    graphs: dict[str, tuple[Any, int]] = {}
    rows: dict[str, dict[str, Any]] = {}
    for one in candidates:
        row = rows[one.name] = {"case": case.name, "suite": case.suite, "candidate": one.name}
        try:
            with taken(one):
                out = prepared.run(0)
                torch.cuda.synchronize()
                answer = check(case, inputs, prepared.as_torch(out))
                row |= {"status": "ok" if answer.passed else "wrong", "error": answer.error}
                begin = time.perf_counter()
                prepared.run(0)
                torch.cuda.synchronize()
                calls = max(1, min(200, int(_SAMPLE_US / (1e6 * (time.perf_counter() - begin)))))
                graph = torch.cuda.CUDAGraph()
                with torch.cuda.graph(graph):
                    for _ in range(calls):
                        prepared.run(0)
                if answer.passed:
                    graphs[one.name] = graph, calls
        except Exception as error:  # a candidate that does not compile or fit is a row, too
            row |= {"status": "error", "reason": str(error)[:500]}
    runs = {name: ((lambda _, graph=graph: graph.replay()), calls) for name, (graph, calls) in graphs.items()}
    samples = in_turns(runs, timer)
    add_times(rows, samples, candidates[0].name)
    return list(rows.values())


def in_turns(runs: Mapping[str, tuple[Run, int]], timer: Timer, rounds: int = _ROUNDS) -> dict[str, list[float]]:
    """Microseconds of one call in every round. runs: what makes so many calls at once; each goes once untimed first."""
    samples: dict[str, list[float]] = {name: [] for name in runs}
    order = list(runs)
    for turn in range(rounds):
        for name in order[turn % len(order) :] + order[: turn % len(order)] if order else ():
            run, calls = runs[name]
            samples[name].append(timer.sample(run, 1) / calls)
    return samples


def add_times(rows: Mapping[str, dict[str, Any]], samples: Mapping[str, Sequence[float]], first: str) -> None:
    """Add the median time, and the median of its ratios to the first one's in the same round."""
    for name, found in samples.items():
        rows[name]["device_us"] = round(statistics.median(found), 3)
        base = samples.get(first)
        if base:
            pairs = [mine / theirs for mine, theirs in zip(found, base, strict=True)]
            rows[name]["ratio"] = round(statistics.median(pairs), 4)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", choices=[*EXPERIMENTS, []], help="experiments; none: all")
    parser.add_argument("--list", action="store_true", help="print the experiments")
    parser.add_argument("--out", type=Path, help="append JSON lines here")
    chosen = parser.parse_args()
    wanted = {name: EXPERIMENTS[name] for name in chosen.names or EXPERIMENTS}
    if chosen.list:
        for name, of in wanted.items():
            print(f"{name}: {of.suite} {' '.join(of.cases)}: {', '.join(one.name for one in of.candidates)}")
        return 0
    from benchmarks.timing import GpuTimer

    timer = GpuTimer("cuda")
    for name, of in wanted.items():
        cases, candidates = [named(of.suite, case) for case in of.cases], (TODAY, *of.candidates)
        compile_ahead(of.suite, cases, candidates)
        for case in cases:
            for row in measure(case, candidates, timer):
                print(name, json.dumps(row), flush=True)
                if chosen.out:
                    with chosen.out.open("a", encoding="utf-8") as file:
                        file.write(json.dumps(row | {"experiment": name}) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
