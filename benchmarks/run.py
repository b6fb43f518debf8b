"""Measure named cases on several libraries in one process and write one JSON line per case and library.

    python benchmarks/run.py --suite attention_forward_portable --out benchmarks/results/portable.jsonl

All libraries get the same random inputs. Each first computes the case into a poisoned output and is checked against
float64 maths on sampled rows; only right answers are timed. Then rounds: every round takes one sample of each library,
in turning order. Device microseconds: CUDA events around several launches, per launch, median of the rounds; inputs
rotate when they would stay in the L2 cache. Host microseconds: processor time of one call while the queue is short.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import json
import math
import os
import re
import statistics
import sys
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

ROOT = Path(__file__).resolve().parent.parent
if not __package__:  # run as a file: the repository takes the place of this folder on the path
    sys.path[0] = str(ROOT)

from benchmarks.cases import OUR_LIBRARIES, SUITES, Case, Inputs, check, make_inputs  # noqa: E402
from benchmarks.rivals import LIBRARIES, Prepared, Setup, default_peers, poison  # noqa: E402
from benchmarks.timing import Clocks, CpuTimer, GpuTimer, Timer, host_microseconds, machine  # noqa: E402

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    import torch

SCHEMA = 2  # 1: when there was no kernel beside the portable one


class Effort(NamedTuple):
    """How much is measured: rounds per case, microseconds of device work per sample, host calls."""

    rounds: int = 15
    sample_us: float = 5000.0
    host_calls: int = 400


QUICK = Effort(rounds=5, sample_us=2000.0, host_calls=100)


def input_sets(case: Case, timer: Timer, device: str, seed: int) -> list[Inputs]:
    """One set of inputs, or several that together do not fit into the cache when one set does."""
    count = 1
    if case.bytes() <= timer.cache_bytes:
        count = min(32, 1 + -(-2 * timer.cache_bytes // max(1, case.bytes())))
    return [make_inputs(case, device, seed + i) for i in range(count)]


class Bench:
    """One run: measures cases and hands rows to `write` as they come."""

    def __init__(self, setup: Setup, timer: Timer, effort: Effort, write: Callable[[dict[str, Any]], None]) -> None:
        self.setup = setup
        self.timer = timer
        self.effort = effort
        self.write = write
        self.clocks = Clocks(timer)
        now = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
        self.facts: dict[str, Any] = {"schema": SCHEMA, "run": f"{now}-{os.getpid()}", "time": now, **machine(timer)}
        self.ceiling = timer.ceiling()
        self.dead = ""  # the reason why the device can no longer be used

    def row(self, case: Case, library: str, status: str, reason: str = "", **values: object) -> dict[str, Any]:
        work = {"flops": case.flops(), "bytes": case.bytes(), "ceiling_tflops": _rounded(self.ceiling)}
        head = {"suite": case.suite, "case": case.name, "library": library, "status": status, "reason": reason}
        return {**head, **values, **work, "shape": case.shape(), **self.facts}

    def measure(self, case: Case, libraries: Sequence[str], seed: int, deadline: float) -> list[dict[str, Any]]:
        """Measure one case on every library; returns its rows, which are written too."""
        try:
            sets = input_sets(case, self.timer, self.setup.device, seed)
        except Exception as error:  # out of memory, say: the case is lost, the run goes on
            rows = [self.row(case, name, "error", f"inputs: {_short(error)}") for name in libraries]
        else:
            rows = self._measure(case, libraries, sets, deadline)
        for row in rows:
            self.write(row)
        return rows

    def _measure(
        self, case: Case, libraries: Sequence[str], sets: Sequence[Inputs], deadline: float
    ) -> list[dict[str, Any]]:
        rows: dict[str, dict[str, Any]] = {}
        ready: dict[str, Prepared] = {}
        answers: dict[str, torch.Tensor] = {}
        for name in libraries:
            with self._guard(case, name, rows, ready):
                self._first(case, name, sets, rows, ready, answers)
        plans: dict[str, tuple[int, float]] = {}
        self.timer.warm(15.0)
        for name in list(ready):
            with self._guard(case, name, rows, ready), ready[name].scope():
                run = ready[name].run
                self.timer.sample(run, 1)
                rough = self.timer.sample(run, 2)
                calls = max(5, min(self.effort.host_calls, int(4 * self.effort.sample_us / rough)))
                host = host_microseconds(self.timer, run, calls)
                launches = max(2, min(200, round(self.effort.sample_us / rough)))
                hold = host if isinstance(self.timer, GpuTimer) and rough < 2.5 * host else 0.0
                plans[name] = launches, hold
                rows[name]["host_us"] = round(host, 3) if isinstance(self.timer, GpuTimer) else None
        samples: dict[str, list[float]] = {name: [] for name in ready}
        clocks: dict[str, int] = {}
        gc.collect()
        gc.disable()
        try:
            for turn in range(self.effort.rounds):
                order = list(ready)
                for name in order[turn % max(1, len(order)) :] + order[: turn % max(1, len(order))]:
                    with self._guard(case, name, rows, ready), ready[name].scope():
                        samples[name].append(self.timer.sample(ready[name].run, *plans[name]))
                if turn == self.effort.rounds // 2:
                    clocks = self.clocks.read()
                if turn >= 2 and time.perf_counter() > deadline:
                    break
        finally:
            gc.enable()
        for name in list(ready):
            with self._guard(case, name, rows, ready), ready[name].scope():
                rows[name] |= self._numbers(case, samples[name], plans[name][0], clocks, len(sets))
                # An error that moves between two calls on the same inputs is a race: check the later answer as well.
                again = ready[name].as_torch(ready[name].run(0))
                same = bool(again.equal(answers[name]))
                rows[name]["same_bits"] = same
                if not same and not check(case, sets[0], again).passed:
                    rows[name] = self.row(case, name, "wrong", "right at first, wrong after the rounds")
        return list(rows.values())

    def _numbers(
        self, case: Case, samples: list[float], launches: int, clocks: dict[str, int], sets: int
    ) -> dict[str, Any]:
        middle = statistics.median(samples)
        tflops = case.flops() / middle / 1e6
        ordered = sorted(samples)
        spread = (ordered[-1 - len(ordered) // 10] - ordered[len(ordered) // 10]) / middle
        return {
            "device_us": round(middle, 3),
            "spread": round(spread, 4),  # between the tenth and the ninetieth percentile, over the median
            "rounds": len(samples),
            "launches": launches,
            "input_sets": sets,
            "tflops": _rounded(tflops),
            "share": round(tflops / self.ceiling, 4),
            "clocks": clocks,
        }

    def _first(
        self,
        case: Case,
        name: str,
        sets: Sequence[Inputs],
        rows: dict[str, dict[str, Any]],
        ready: dict[str, Prepared],
        answers: dict[str, torch.Tensor],
    ) -> None:
        """First call, poisoned and checked: leaves a row, and in `ready` and `answers` what may be timed."""
        library = LIBRARIES[name]
        if self.dead:
            rows[name] = self.row(case, name, "error", self.dead)
        elif reason := library.missing(self.setup):
            rows[name] = self.row(case, name, "missing", reason)
        elif reason := library.why_not(case, self.setup):
            rows[name] = self.row(case, name, "unsupported", reason)
        if name in rows:
            return
        prepared = library.prepare(case, sets, self.setup)
        with prepared.scope():
            self.timer.synchronize()
            start = time.perf_counter()
            prepared.run(0)
            self.timer.synchronize()
            first_ms = 1000 * (time.perf_counter() - start)
            out, poisoned = self._poisoned(case, prepared)
        answer = check(case, sets[0], out)
        status, reason = "ok", ""
        if not answer.passed:
            status, reason = (
                "wrong",
                "the error is above its limit" if answer.finite else "NaN or infinity in the output",
            )
        rows[name] = self.row(
            case,
            name,
            status,
            reason,
            first_ms=round(first_ms, 2),  # compilation and loading included
            error=_rounded(answer.error),
            error_row=_rounded(answer.error_row),
            error_limit=answer.limit,
            poisoned=poisoned,
        )
        if answer.passed:
            ready[name], answers[name] = prepared, out

    def _poisoned(self, case: Case, prepared: Prepared) -> tuple[torch.Tensor, bool]:
        """The output of a call that wrote into memory full of NaN, and whether that memory was really the one used."""
        if prepared.into is not None:
            out = poison(case, self.setup.device)
            prepared.into(0, out)
            return out, True
        # The caching allocator gives a block of the same size out again: leave poison where the output will be.
        blocks = [poison(case, self.setup.device) for _ in range(2)]
        places = [block.data_ptr() for block in blocks]
        del blocks
        out = prepared.as_torch(prepared.run(0))
        return out, out.data_ptr() in places

    @contextlib.contextmanager
    def _guard(self, case: Case, name: str, rows: dict[str, dict[str, Any]], ready: dict[str, Prepared]) -> Any:
        """Turn an exception into a row, and leave that library out of the rest of this case: the run never ends."""
        try:
            yield
        except Exception as error:
            self._still_alive(error)
            reason = LIBRARIES[name].unsupported(error)
            rows[name] = self.row(case, name, "unsupported" if reason else "error", reason or _short(error))
            ready.pop(name, None)

    def _still_alive(self, cause: Exception) -> None:
        try:
            self.timer.synchronize()
        except Exception as error:  # a broken context answers every call with the same error
            self.dead = f"the device was lost: {_short(error)} (after {_short(cause)})"


def _rounded(value: float) -> float | None:
    return float(f"{value:.5g}") if math.isfinite(value) else None  # JSON has no infinity


def _short(error: object, limit: int = 300) -> str:
    text = error if isinstance(error, str) else f"{type(error).__name__}: {error}"
    return " ".join(text.split())[:limit]


def line_of(row: dict[str, Any]) -> str:
    """One row as a line for people."""
    head = f"{row['case']:<34} {row['library']:<18} {row['status']:<11}"
    if row["status"] != "ok":
        return f"{head} {row['reason']}"
    host = "" if row["host_us"] is None else f"  host {row['host_us']:6.1f} us"
    speed = f"{row['device_us']:10.1f} us {row['tflops']:7.4g} TFLOP/s {100 * row['share']:5.1f} %"
    return f"{head} {speed}  spread {100 * row['spread']:4.1f} %  error {row['error']:.1e}{host}"


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="benchmarks/run.py", description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--suite", nargs="+", default=["attention_forward_portable"], choices=sorted(SUITES))
    parser.add_argument("--out", type=Path, help="JSON lines are appended here")
    parser.add_argument("--libraries", nargs="+", choices=sorted(LIBRARIES), help="default: those of each suite")
    parser.add_argument("--cases", default="", metavar="REGEX", help="only cases whose name it finds")
    parser.add_argument("--device", default="cuda", help="cuda, cuda:1 or cpu (default: %(default)s)")
    parser.add_argument("--budget", type=float, default=float("inf"), metavar="SECONDS", help="stop in time for this")
    parser.add_argument("--peers", default=default_peers(), metavar="FOLDER", help="FA3's folder (or FLASHMOE_PEERS)")
    parser.add_argument("--rounds", type=int, help="samples of every library and case")
    parser.add_argument("--quick", action="store_true", help="fewer and shorter samples")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--list", action="store_true", help="show the cases and stop")
    return parser.parse_args(arguments)


def chosen(options: argparse.Namespace) -> list[tuple[Case, tuple[str, ...]]]:
    """The cases of the command line with the libraries of each."""
    pattern = re.compile(options.cases)
    found = []
    for suite in (SUITES[name] for name in options.suite):
        libraries = tuple(options.libraries or suite.libraries)
        found += [(case, libraries) for case in suite.cases if pattern.search(case.name)]
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    """Run; 0 when every case of ours was right, 1 when one was wrong or failed, 2 when nothing could be measured."""
    begin = time.perf_counter()
    options = parse(arguments)
    work = chosen(options)
    if options.list or not work:
        for case, libraries in work:
            print(f"{case.suite:<28} {case.name:<34} {case.flops() / 1e9:10.1f} GFLOP  {case.source}  {libraries}")
        if not work:
            print("no case has a name that --cases finds", file=sys.stderr)
        return 0 if work else 2
    try:
        import torch
    except ImportError:
        print("the benchmarks need PyTorch: pip install torch", file=sys.stderr)
        return 2
    if options.device.startswith("cuda") and not torch.cuda.is_available():
        print("no CUDA device; --device cpu measures the NumPy back end", file=sys.stderr)
        return 2
    effort = QUICK if options.quick else Effort()
    if options.rounds:
        effort = effort._replace(rounds=max(1, options.rounds))
    timer: Timer = GpuTimer(options.device) if options.device.startswith("cuda") else CpuTimer()
    with contextlib.ExitStack() as stack:
        file = None
        if options.out is not None:
            options.out.parent.mkdir(parents=True, exist_ok=True)
            file = stack.enter_context(options.out.open("a", encoding="utf-8"))

        def write(row: dict[str, Any]) -> None:
            if file is not None:
                file.write(json.dumps(row) + "\n")
                file.flush()
            print(line_of(row), flush=True)

        return _run(Bench(Setup(options.device, options.peers), timer, effort, write), work, options, begin)


def _run(bench: Bench, work: Sequence[tuple[Case, tuple[str, ...]]], options: argparse.Namespace, begin: float) -> int:
    facts = bench.facts
    print(f"{facts['device']}, driver {facts['driver'] or '-'}, {facts['versions']}, commit {facts['commit'][:12]}")
    ready = time.perf_counter() - begin
    print(f"matrix product ceiling {bench.ceiling:.4g} TFLOP/s, ready after {ready:.1f} s", flush=True)
    bad, left_out, longest = 0, [], 0.0
    for case, libraries in work:
        start = time.perf_counter()
        if start - begin + longest > options.budget or bench.dead:
            left_out.append(case.name)
            continue
        rows = bench.measure(case, libraries, options.seed, begin + options.budget)
        bad += sum(row["library"] in OUR_LIBRARIES and row["status"] in ("wrong", "error") for row in rows)
        longest = max(longest, time.perf_counter() - start) if len(rows) else longest
    print(f"{len(work) - len(left_out)} of {len(work)} cases in {time.perf_counter() - begin:.1f} s", flush=True)
    if options.out is None:
        print("no --out FILE: the rows were shown, not kept", file=sys.stderr)
    if left_out:
        print(f"not run ({bench.dead or 'out of budget'}): {', '.join(left_out)}", file=sys.stderr)
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
