"""The small kernels of the mixture of experts: an operation knows the grid of each. No GPU and no CuPy."""

from __future__ import annotations

from typing import Any, NamedTuple

from flashmoe_cupy.dtypes import FP32, DType
from flashmoe_cupy.jit.device import H100, DeviceProperties
from flashmoe_cupy.plan.kernel import DEFAULT_SMS, Kernel
from flashmoe_cupy.plan.moe.tiles import SELF_SORTED
from flashmoe_cupy.plan.params import Params
from flashmoe_cupy.plan.step import Arguments, Step, Values

PER_LANE = (1, 2, 4, 8, 16, 32)  # compiled sizes of the router: experts that each lane of a warp holds
# Threads and shared memory below are `kThreads` and `Smem::kBytes` of the structs in cuda_src/moe.
_WINDOW = 512  # experts that MoePermutePlace places at once: one for each thread
_COUNT_WINDOW = 4096  # experts that MoePermuteCount counts at once
_COMBINE_SMEM = 4 * SELF_SORTED


class SmallConfig(NamedTuple):
    """One specialisation of a kernel whose template arguments are written out."""

    name: str  # for people, and different from all others of its kernel
    struct: str  # the C++ type inside namespace fm
    threads: int  # of a block
    smem_bytes: int  # of a block; `Smem::kBytes` of the struct
    min_blocks: int = 1  # per SM, that the compiler must leave registers for
    cluster: int = 1  # blocks of a cluster


class SmallProblem(NamedTuple):
    """One launch of a small kernel, whose configuration and grid the operation knows."""

    kernel: str  # its name
    config: SmallConfig
    blocks: int  # of the grid
    dtype: DType = FP32  # the kernel has no faster one for others
    rows_aligned: bool = True  # see plan/kernel.py's Problem

    def describe(self) -> str:
        """The name of the kernel."""
        return self.kernel


class SmallKernel(Kernel[SmallProblem, SmallConfig]):
    """A kernel whose configurations are the same on every architecture; the only one of its task."""

    op = "moe"
    waits = True

    def __init__(self, name: str, header: str, summary: str, params: str, *configs: SmallConfig) -> None:
        self.name = self.task = name
        self.header, self.summary, self.params, self.all_configs = header, summary, Params(header, params), configs

    def configs(self, arch: str) -> tuple[SmallConfig, ...]:  # noqa: ARG002
        return self.all_configs

    def why_not(self, problem: SmallProblem, arch: str, aligned: bool = True) -> list[str]:  # noqa: ARG002
        if int(arch[3:].rstrip("a")) < 80:
            return [f"{arch} is not supported: the kernels need compute capability 8.0 or newer"]
        return []

    def choose(
        self, problem: SmallProblem, arch: str, aligned: bool = True, device: DeviceProperties = H100  # noqa: ARG002
    ) -> SmallConfig:  # fmt: skip
        return problem.config

    def grid(self, problem: SmallProblem, config: SmallConfig, sms: int = DEFAULT_SMS) -> int:  # noqa: ARG002
        return problem.blocks

    def values(
        self, problem: SmallProblem, config: SmallConfig, aligned: bool, sms: int = DEFAULT_SMS  # noqa: ARG002
    ) -> Values:  # fmt: skip
        return {"aligned": int(aligned)} if "aligned" in self.params.fields else {}

    def fields(self, config: SmallConfig) -> dict[str, Any]:  # noqa: ARG002
        return {}

    def title(self, config: SmallConfig) -> str:
        return f"{self.name} {config.name}"

    def step(self, config: SmallConfig, blocks: int, arguments: Arguments, values: Values) -> Step:
        """A launch of it."""
        return Step(self.task, SmallProblem(self.name, config, blocks), arguments, values)


ROUTER = SmallKernel(
    "moe_router", "moe/router.cuh", "top-k experts and their weights", "MoeRouterParams",
    *[
        SmallConfig(f"{32 * n} experts{' stats' * s}", f"MoeRouter<{n}, {'true' if s else 'false'}>", 128, 0)
        for s in (False, True)
        for n in PER_LANE
    ],
)  # fmt: skip
ROUTER_STATS = SmallKernel(
    "moe_router_stats", "moe/router.cuh", "counts and losses of a router", "MoeRouterStatsParams",
    SmallConfig("stats", "MoeRouterStats", 1024, 8 * 1024),
)  # fmt: skip
CAPACITY = SmallKernel(
    "moe_capacity", "moe/router.cuh", "drops what experts cannot hold", "MoeCapacityParams",
    SmallConfig("capacity", "MoeCapacity", 256, 0),
)  # fmt: skip
PERMUTE_COUNT = SmallKernel(
    "moe_permute_count", "moe/permute.cuh", "assignments of each expert, by block", "MoePermuteParams",
    SmallConfig("count", "MoePermuteCount", 512, 4 * _COUNT_WINDOW),
)  # fmt: skip
PERMUTE_PLACE = SmallKernel(
    "moe_permute_place", "moe/permute.cuh", "assignments in the order of experts", "MoePermuteParams",
    SmallConfig("place", "MoePermutePlace", _WINDOW, 4 * (16 + 2) * _WINDOW + 4 * 16),
)  # fmt: skip
COMBINE = SmallKernel(
    "moe_combine", "moe/combine.cuh", "weighted sum over the experts of a token", "MoeCombineParams",
    *[
        SmallConfig(element + words, f"MoeCombine<fm::{element}{arguments}>", threads, _COMBINE_SMEM, blocks)
        for words, arguments, threads, blocks in (("", "", 256, 3), (" few", ", 32", 32, 1))
        for element in ("bf16", "fp16", "fp32")
    ],
)  # fmt: skip
CLEAR = SmallKernel(
    "grouped_clear", "moe/clear.cuh", "zeros for rows of no group", "GroupedClearParams",
    SmallConfig("clear", "GroupedClear", 256, 0),
)  # fmt: skip
SMALL_KERNELS = (ROUTER, ROUTER_STATS, CAPACITY, PERMUTE_COUNT, PERMUTE_PLACE, COMBINE, CLEAR)
