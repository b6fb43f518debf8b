"""What measuring a mixture of experts needs beside the loop of bench.py: its libraries, graphs, and two references."""

from __future__ import annotations

import gc
from typing import TYPE_CHECKING, Any

from benchmarks import moe_inputs
from benchmarks.attention_inputs import Check
from benchmarks.bench import Bench, Timed, rounded
from benchmarks.cases import OURS
from benchmarks.moe_cases import MoECase
from benchmarks.moe_inputs import MoEInputs
from benchmarks.moe_rivals import GroupedMM, Liger, MoELibrary, OursMoE, SonicMoE, TorchLoop
from benchmarks.moe_triton import VllmTriton

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    import torch

    from benchmarks.library import Prepared
    from benchmarks.timing import Reference

GRAPH_US = 1500.0  # the least microseconds of a graph: launching it must not show
GRAPH_CALLS = 128

MOE_LIBRARIES: dict[str, MoELibrary] = {
    library.name: library
    for library in (
        OursMoE(),
        GroupedMM("torch_grouped_mm", "gather_sum"),
        GroupedMM("torch_index_add", "index_add"),
        TorchLoop(),
        Liger(),
        VllmTriton(),
        SonicMoE(),
    )
}


class MoEBench(Bench[MoECase, MoEInputs]):
    """Mixture of experts: the cases of moe_cases.py on the libraries of moe_rivals.py and moe_triton.py.

    A dense matrix product and the reading of a big array are timed in every round, so a row's `ceiling_tflops` and
    `read_gbps` are of the same minute and of the same temperature as its time.
    """

    def libraries(self) -> Mapping[str, Any]:
        return MOE_LIBRARIES

    def inputs(self, case: MoECase, seed: int) -> list[MoEInputs]:
        return moe_inputs.input_sets(case, self.timer, self.setup.device, seed)

    def check(self, case: MoECase, inputs: MoEInputs, out: torch.Tensor) -> Check:
        return moe_inputs.check(case, inputs, out)

    def poison(self, case: MoECase) -> torch.Tensor:
        return moe_inputs.poison(case, self.setup.device)

    def work(self, case: MoECase, sets: Sequence[MoEInputs]) -> dict[str, Any]:
        """Experts that get a token, and their bytes, on average over the sets."""
        if not sets:
            return {"bytes": None, "weight_bytes": None, "experts_touched": None}
        touched = sum(moe_inputs.touched(one) for one in sets) / len(sets)
        weights = round(touched * case.expert_bytes())
        return {"bytes": weights + case.bytes(0), "weight_bytes": weights, "experts_touched": round(touched, 2)}

    def row(self, case: MoECase, library: str, status: str, reason: str = "", **values: object) -> dict[str, Any]:
        routing = "timed" if library == OURS and case.routing else "given"
        return super().row(case, library, status, reason, **values, routing=routing)

    def timed(self, case: MoECase, prepared: Prepared, rough: float, sets: int) -> Timed:
        """A call, or a graph whose last call has the first set of inputs."""
        if not case.graph:
            return super().timed(case, prepared, rough, sets)
        # Called one by one, short calls take as long as the host needs: the first graph says what they really take.
        calls = 2 * sets
        short = self.timer.capture(prepared.run, calls)
        calls = max(calls, min(GRAPH_CALLS, round(GRAPH_US * calls / self.timer.sample(short.run, 2))))
        replay = self.timer.capture(prepared.run, -(-calls // sets) * sets)

        def again() -> Any:
            out = prepared.as_torch(replay.output())
            out.fill_(float("nan"))
            replay.run(0)
            return replay.output()

        return Timed(replay.run, replay.calls, again)

    def measures_host(self, case: MoECase) -> bool:
        return case.for_host

    def references(self) -> dict[str, Reference]:
        return self.timer.references()

    def numbers(self, row: dict[str, Any], samples: list[float], middle: float) -> dict[str, Any]:
        """Beside the speed, GB/s of the weights of the experts that get a token, and their share of a big read's."""
        made = super().numbers(row, samples, middle)
        speed = row["weight_bytes"] / made["device_us"] / 1e3
        return made | {"weight_gbps": rounded(speed), "read_share": round(speed / row["read_gbps"], 4)}

    def measure(self, case: MoECase, libraries: Sequence[str], seed: int, deadline: float) -> list[dict[str, Any]]:
        rows = super().measure(case, libraries, seed, deadline)
        gc.collect()
        self.timer.release()
        return rows
