"""What measuring attention's backward needs beside the loop of bench.py: its libraries, dout, and answers of parts."""

from __future__ import annotations

import gc
from typing import TYPE_CHECKING, Any

from benchmarks import backward_inputs
from benchmarks.attention_inputs import Check, Inputs
from benchmarks.backward_cases import BackwardCase
from benchmarks.backward_inputs import parts, with_dout
from benchmarks.backward_rivals import BACKWARD_LIBRARIES
from benchmarks.bench import Bench, input_sets

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    import torch

    from benchmarks.library import Prepared


class BackwardBench(Bench[BackwardCase, Inputs]):
    """Attention's backward: the cases of backward_cases.py on the libraries of backward_rivals.py."""

    def libraries(self) -> Mapping[str, Any]:
        return BACKWARD_LIBRARIES

    def inputs(self, case: BackwardCase, seed: int) -> list[Inputs]:
        sets = input_sets(case, self.timer, self.setup.device, seed)
        return [with_dout(case, one, seed + i) for i, one in enumerate(sets)]

    def check(self, case: BackwardCase, inputs: Inputs, out: torch.Tensor) -> Check:
        return backward_inputs.check(case, inputs, out)

    def poison(self, case: BackwardCase) -> torch.Tensor:
        return backward_inputs.poison(case, self.setup.device)

    def work(self, case: BackwardCase, sets: Sequence[Inputs]) -> dict[str, Any]:  # noqa: ARG002
        return {"bytes": case.bytes()}

    def measure(self, case: BackwardCase, libraries: Sequence[str], seed: int, deadline: float) -> list[dict[str, Any]]:
        rows = super().measure(case, libraries, seed, deadline)
        gc.collect()  # graphs of torch.autograd hold inputs and outputs
        self.timer.release()
        return rows

    def _poisoned(self, case: BackwardCase, prepared: Prepared) -> tuple[torch.Tensor, bool]:
        """As in bench.py; without a place to write into, poison is left where each gradient will be.

        into() gives False where it made a gradient that it has no argument for, and not in memory full of NaN.
        """
        if prepared.into is not None:
            out = self.poison(case)
            return out, prepared.into(0, out) is not False
        blocks = [part.clone() for _ in range(2) for part in parts(case, self.poison(case))]
        places = [block.data_ptr() for block in blocks]
        del blocks
        made = prepared.run(0)
        return prepared.as_torch(made), all(x is not None and x.data_ptr() in places for x in made)
