"""The operations that `demo`, `bench` and the self-test of `info` run, by the names that `service` has for them."""

from __future__ import annotations

from flashmoe_cupy.cli.measure_attention import ATTENTION
from flashmoe_cupy.cli.measure_attention_backward import ATTENTION_BACKWARD
from flashmoe_cupy.cli.measure_moe import MOE
from flashmoe_cupy.cli.measured import Measured

MEASURED: dict[str, Measured] = {"attention": ATTENTION, "attention_backward": ATTENTION_BACKWARD, "moe": MOE}
