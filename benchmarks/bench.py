"""The measuring loop: cases on several libraries in one process, every answer checked before it is timed.

Each library first computes a case into a poisoned output and is checked against float64 maths; only right answers are
timed. Then rounds: every round takes one sample of each library, in a drawn order. What is particular to attention is
at the end of this file, what is particular to the mixture of experts in moe_bench.py.
"""

from __future__ import annotations

import contextlib
import gc
import math
import os
import random
import statistics
import time
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, Generic, NamedTuple, Protocol, TypeVar

from benchmarks.attention_inputs import Check, Inputs, check, make_inputs
from benchmarks.cases import Case
from benchmarks.library import Prepared, Setup, poison
from benchmarks.rivals import LIBRARIES
from benchmarks.timing import Clocks, GpuTimer, Reference, Timer, host_microseconds, machine

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    import torch

SHORT_US = 100.0  # calls for which the host side matters
SCHEMA = 2  # 1: when there was no kernel beside the portable one


class Effort(NamedTuple):
    """How much is measured: rounds per case, microseconds of device work per sample and before one, host calls.

    host_seconds is for short calls, and for cases that are there for their host side: they go on at least so long.

    lead_us is for cases with references: a share of what the machine can do means something when the clock is what it
    is under load for both, the library and the reference, and not the higher one of a device that was idle before.
    """

    rounds: int = 15
    sample_us: float = 5000.0
    host_calls: int = 400
    host_seconds: float = 0.6
    lead_us: float = 20000.0

    def launches(self, microseconds: float) -> int:
        """Launches of a sample, one of which takes so long."""
        return max(2, min(200, round(self.sample_us / microseconds)))

    def lead(self, microseconds: float) -> int:
        """Launches before a sample."""
        return max(1, min(400, round(self.lead_us / microseconds)))


QUICK = Effort(rounds=5, sample_us=2000.0, host_calls=100, host_seconds=0.0, lead_us=2000.0)


class Run:
    """What the benches of one process share: where the rows go, the timer, and what is known of the machine."""

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


class AnyCase(Protocol):
    """What every case has."""

    @property
    def name(self) -> str: ...

    @property
    def suite(self) -> str: ...

    def flops(self) -> int: ...

    def shape(self) -> dict[str, Any]: ...


class Timed(NamedTuple):
    """What a sample launches: run(i) makes `calls` calls. again() computes the first set in the way that was timed."""

    run: Callable[[int], Any]
    calls: int
    again: Callable[[], Any]


class Plan(NamedTuple):
    """How samples of a library are taken: the arguments of `sample`."""

    timed: Timed
    launches: int
    hold_us: float
    lead: int


C = TypeVar("C", bound=AnyCase)
I = TypeVar("I")  # noqa: E741 - the inputs of a case


class Bench(Generic[C, I]):
    """Measures cases of one kind and hands rows to the run as they come. Subclasses say what the kind needs."""

    def __init__(self, run: Run) -> None:
        self.common = run
        self.setup, self.timer, self.effort = run.setup, run.timer, run.effort
        self.moved: dict[str, Any] = {}  # work() of the case at hand

    def libraries(self) -> Mapping[str, Any]:
        """Adapters by name."""
        raise NotImplementedError

    def inputs(self, case: C, seed: int) -> list[I]:
        """Sets of inputs that the calls rotate through."""
        raise NotImplementedError

    def check(self, case: C, inputs: I, out: torch.Tensor) -> Check:
        raise NotImplementedError

    def same(self, case: C, one: torch.Tensor, other: torch.Tensor) -> bool:  # noqa: ARG002
        """Whether two answers have the same bits in all that counts."""
        return bool(one.equal(other))

    def poison(self, case: C) -> torch.Tensor:
        """An output full of NaN."""
        raise NotImplementedError

    def work(self, case: C, sets: Sequence[I]) -> dict[str, Any]:
        """Fields of a row that say how much must be moved; `sets` is empty when there are no inputs."""
        raise NotImplementedError

    def timed(self, case: C, prepared: Prepared, rough: float, sets: int) -> Timed:  # noqa: ARG002
        """How a case is timed whose call takes `rough` microseconds."""
        return Timed(prepared.run, 1, lambda: prepared.run(0))

    def measures_host(self, case: C) -> bool:  # noqa: ARG002
        """Whether the case is there for its host side, however long the device takes."""
        return False

    def references(self) -> dict[str, Reference]:
        """What is timed beside the libraries in every round; the rates are fields of the rows."""
        return {}

    def row(self, case: C, library: str, status: str, reason: str = "", **values: object) -> dict[str, Any]:
        head = {"suite": case.suite, "case": case.name, "library": library, "status": status, "reason": reason}
        work = {"flops": case.flops(), **self.moved, "ceiling_tflops": rounded(self.common.ceiling)}
        return {**head, **values, **work, "shape": case.shape(), **self.common.facts}

    def measure(self, case: C, libraries: Sequence[str], seed: int, deadline: float) -> list[dict[str, Any]]:
        """Measure one case on every library; returns its rows, which are written too."""
        self.moved = self.work(case, ())
        try:
            sets = self.inputs(case, seed)
            self.moved = self.work(case, sets)
        except Exception as error:  # out of memory, say: the case is lost, the run goes on
            rows = [self.row(case, name, "error", f"inputs: {short(error)}") for name in libraries]
        else:
            rows = self._measure(case, libraries, sets, deadline)
        for row in rows:
            self.common.write(row)
        return rows

    def _measure(self, case: C, libraries: Sequence[str], sets: Sequence[I], deadline: float) -> list[dict[str, Any]]:
        rows: dict[str, dict[str, Any]] = {}
        ready: dict[str, Prepared] = {}
        answers: dict[str, torch.Tensor] = {}
        for name in libraries:
            with self._guard(case, name, rows, ready):
                self._first(case, name, sets, rows, ready, answers)
        plans: dict[str, Plan] = {}
        references = self.references() if ready else {}
        self.timer.warm(15.0)
        for name in list(ready):
            with self._guard(case, name, rows, ready), ready[name].scope():
                run = ready[name].run
                self.timer.sample(run, 1)
                rough = self.timer.sample(run, 2)
                calls = max(5, min(self.effort.host_calls, int(4 * self.effort.sample_us / rough)))
                wanted = rough < SHORT_US or self.measures_host(case)
                seconds = self.effort.host_seconds if wanted else 0.0
                lowest, host = host_microseconds(self.timer, run, calls, seconds=seconds)
                timed = self.timed(case, ready[name], rough, len(sets))
                hold = 0.0
                if timed.calls > 1:
                    rough = self.timer.sample(timed.run, 1) / timed.calls
                elif isinstance(self.timer, GpuTimer):
                    rough, hold = held(self.timer, run, rough, host)
                launch_us = rough * timed.calls
                lead = self.effort.lead(launch_us) if references and not hold else 1
                plans[name] = Plan(timed, self.effort.launches(launch_us), hold, lead)
                on_gpu = isinstance(self.timer, GpuTimer)
                rows[name]["host_us"] = round(lowest, 3) if on_gpu else None
                rows[name]["host_us_median"] = round(host, 3) if on_gpu else None
        samples: dict[str, list[float]] = {name: [] for name in ready}
        rates: dict[str, list[float]] = {key: [] for key in references}
        known = {} if self.common.dead else {key: self.timer.sample(one.run, 2) for key, one in references.items()}
        clocks: dict[str, int] = {}
        gc.collect()
        gc.disable()
        try:
            for turn in range(self.effort.rounds):
                # Where power sets the clock, a library gets more of it behind one that has taken less.
                order = random.Random(f"{case.name} {turn}").sample(list(ready), len(ready))
                for name in order:
                    timed, launches, hold, lead = plans[name]
                    with self._guard(case, name, rows, ready), ready[name].scope():
                        samples[name].append(self.timer.sample(timed.run, launches, hold, lead) / timed.calls)
                if not self.common.dead:
                    for key, one in references.items():
                        launches, lead = self.effort.launches(known[key]), self.effort.lead(known[key])
                        rates[key].append(one.work / self.timer.sample(one.run, launches, lead=lead))
                if turn == self.effort.rounds // 2:
                    clocks = self.common.clocks.read()
                if turn >= 2 and time.perf_counter() > deadline:
                    break
        finally:
            gc.enable()
        fields = {key: rounded(statistics.median(found)) for key, found in rates.items() if found}
        steady = at_one_pace({name: samples[name] for name in ready})
        for name in list(ready):
            with self._guard(case, name, rows, ready), ready[name].scope():
                timed, launches, _, lead = plans[name]
                rows[name] |= fields
                rows[name] |= self.numbers(rows[name], samples[name], statistics.median(steady[name]))
                rows[name] |= {"launches": launches, "lead": lead, "calls": timed.calls}
                rows[name] |= {"input_sets": len(sets), "clocks": clocks}
                # An error that moves between two calls on the same inputs is a race: check the later answer as well.
                again = ready[name].as_torch(timed.again())
                same = self.same(case, again, answers[name])
                rows[name]["same_bits"] = same
                if not same and not self._checked(case, ready[name], sets[0], again).passed:
                    rows[name] = self.row(case, name, "wrong", "right at first, wrong after the rounds")
        return list(rows.values())

    def numbers(self, row: dict[str, Any], samples: list[float], middle: float) -> dict[str, Any]:
        """What follows from the samples (microseconds of a call), their middle, and what else is in the row."""
        tflops = row["flops"] / middle / 1e6
        ordered = sorted(samples)
        spread = (ordered[-1 - len(ordered) // 10] - ordered[len(ordered) // 10]) / middle
        return {
            "device_us": round(middle, 3),
            "spread": round(spread, 4),  # between the tenth and the ninetieth percentile, over the median
            "rounds": len(samples),
            "tflops": rounded(tflops),
            "share": round(tflops / row["ceiling_tflops"], 4),
        }

    def _first(
        self,
        case: C,
        name: str,
        sets: Sequence[I],
        rows: dict[str, dict[str, Any]],
        ready: dict[str, Prepared],
        answers: dict[str, torch.Tensor],
    ) -> None:
        """First call, poisoned and checked: leaves a row, and in `ready` and `answers` what may be timed."""
        library = self.libraries()[name]
        if self.common.dead:
            rows[name] = self.row(case, name, "error", self.common.dead)
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
        answer = self._checked(case, prepared, sets[0], out)
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
            error=rounded(answer.error),
            error_row=rounded(answer.error_row),
            error_limit=answer.limit,
            poisoned=poisoned,
            **({"note": prepared.note} if prepared.note else {}),
        )
        if answer.passed:
            ready[name], answers[name] = prepared, out

    def _checked(self, case: C, prepared: Prepared, inputs: I, out: torch.Tensor) -> Check:
        return prepared.check(out) if prepared.check else self.check(case, inputs, out)

    def _poisoned(self, case: C, prepared: Prepared) -> tuple[torch.Tensor, bool]:
        """The output of a call that wrote into memory full of NaN, and whether that memory was really the one used."""
        if prepared.into is not None:
            out = self.poison(case)
            prepared.into(0, out)
            return out, True
        # The caching allocator gives a block of the same size out again: leave poison where the output will be.
        blocks = [self.poison(case) for _ in range(2)]
        places = [block.data_ptr() for block in blocks]
        del blocks
        out = prepared.as_torch(prepared.run(0))
        return out, out.data_ptr() in places

    @contextlib.contextmanager
    def _guard(self, case: C, name: str, rows: dict[str, dict[str, Any]], ready: dict[str, Prepared]) -> Any:
        """Turn an exception into a row, and leave that library out of the rest of this case: the run never ends."""
        try:
            yield
        except Exception as error:
            self._still_alive(error)
            reason = self.libraries()[name].unsupported(error)
            status = "unsupported" if reason else "error"
            rows[name] = self.row(case, name, status, reason or short(error))
            ready.pop(name, None)

    def _still_alive(self, cause: Exception) -> None:
        try:
            self.timer.synchronize()
        except Exception as error:  # a broken context answers every call with the same error
            self.common.dead = f"the device was lost: {short(error)} (after {short(cause)})"


def held(timer: GpuTimer, run: Callable[[int], Any], rough: float, host: float) -> tuple[float, float]:
    """(device microseconds of a call, host microseconds for which a waiting kernel must hold the device or 0).

    rough: microseconds of a call when nothing holds the device; they may be the host's, so a short call is timed again.
    """
    if rough < 10.0 * host:
        rough = timer.sample(run, 5, host)
    return rough, host if rough < 2.5 * host else 0.0


def at_one_pace(samples: Mapping[str, Sequence[float]]) -> dict[str, list[float]]:
    """Samples by library, each over the pace of its round: 1.1 where the libraries took a tenth longer than usual.

    Under load a device changes its clock every few rounds, for all libraries alike. The median of each alone may then
    be one of a fast round for one library and of a slow round for the other. The pace of a round is the median, over
    the libraries, of a sample over that library's median.
    """
    usual = {name: statistics.median(found) for name, found in samples.items() if found}
    rounds = min((len(samples[name]) for name in usual), default=0)
    paces = [statistics.median(samples[name][i] / usual[name] for name in usual) for i in range(rounds)]
    return {name: [samples[name][i] / paces[i] for i in range(rounds)] for name in usual}


def rounded(value: float) -> float | None:
    return float(f"{value:.5g}") if math.isfinite(value) else None  # JSON has no infinity


def short(error: object, limit: int = 300) -> str:
    text = error if isinstance(error, str) else f"{type(error).__name__}: {error}"
    return " ".join(text.split())[:limit]


def input_sets(case: Case, timer: Timer, device: str, seed: int) -> list[Inputs]:
    """One set of inputs, or several that together do not fit into the cache when one set does."""
    count = 1
    if case.bytes() <= timer.cache_bytes:
        count = min(32, 1 + -(-2 * timer.cache_bytes // max(1, case.bytes())))
    return [make_inputs(case, device, seed + i) for i in range(count)]


class AttentionBench(Bench[Case, Inputs]):
    """Attention: the cases of cases.py on the libraries of rivals.py."""

    def libraries(self) -> Mapping[str, Any]:
        return LIBRARIES

    def inputs(self, case: Case, seed: int) -> list[Inputs]:
        return input_sets(case, self.timer, self.setup.device, seed)

    def check(self, case: Case, inputs: Inputs, out: torch.Tensor) -> Check:
        return check(case, inputs, out)

    def same(self, case: Case, one: torch.Tensor, other: torch.Tensor) -> bool:
        if case.padding:  # rows that do not count hold 0, or the NaN that was there
            one, other = (out.masked_fill(out.isnan(), 0.0) for out in (one, other))
        return super().same(case, one, other)

    def poison(self, case: Case) -> torch.Tensor:
        return poison(case, self.setup.device)

    def work(self, case: Case, sets: Sequence[Inputs]) -> dict[str, Any]:  # noqa: ARG002
        return {"bytes": case.bytes()}
