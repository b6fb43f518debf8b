"""The Hopper kernel of attention's backward for wide head dims as the host sees it. No GPU and no CuPy."""

from __future__ import annotations

from collections.abc import Sequence

from flashmoe_cupy.jit.device import H100, DeviceProperties
from flashmoe_cupy.jit.tensormap import TensorMap
from flashmoe_cupy.plan.attention.backward_sm90 import AttentionBwdSm90
from flashmoe_cupy.plan.attention.backward_tiles import (
    STAGES_PAIR_SM90,
    STAGES_WIDE_SM90,
    BwdPair90Config,
    BwdWide90Config,
    config_wide,
)
from flashmoe_cupy.plan.attention.backward_values import (
    and_convert,
    blocks_of,
    dims_sm90,
    fused,
    grid_of,
    section,
    values_of,
)
from flashmoe_cupy.plan.attention.gradient import GradientProblem
from flashmoe_cupy.plan.kernel import DEFAULT_SMS, Kernel
from flashmoe_cupy.plan.params import Params
from flashmoe_cupy.plan.step import Step, Values

_DQ = AttentionBwdSm90()  # dq of the same head dims


class AttentionBwdWideSm90(Kernel[GradientProblem, BwdWide90Config]):
    """cuda_src/attention/bwd_wide_sm90.cuh: dk and dv of head dims beyond 128."""

    op, task, name = "attention_backward", "attention_bwd", "attention_bwd_wide_sm90"
    header = "attention/bwd_wide_sm90.cuh"
    summary = "attention backward of head dims 129 to 256: bf16 and fp16 on Hopper (sm_90a)"
    params = Params(header, "AttentionBwdSm90Params")

    def configs(self, arch: str) -> list[BwdWide90Config]:
        if arch != "sm_90a":
            return []
        return [config_wide(element, dims, "kv") for element in ("bf16", "fp16") for dims in STAGES_WIDE_SM90]

    def why_not(self, problem: GradientProblem, arch: str, aligned: bool = True) -> list[str]:
        why = _why_not(problem, arch, aligned)
        if not why and problem.part != "kv":
            why.append("it makes dk and dv in one launch, and nothing else")
        return why or _too_many(self.grid(problem, self.choose(problem, arch, aligned)))

    def choose(
        self, problem: GradientProblem, arch: str, aligned: bool = True, device: DeviceProperties = H100  # noqa: ARG002
    ) -> BwdWide90Config:  # fmt: skip
        dims = next((d for d in STAGES_WIDE_SM90 if d == dims_sm90(problem.of)), [*STAGES_WIDE_SM90][-1])
        return config_wide(problem.dtype.cuda, dims, "kv")

    def grid(self, problem: GradientProblem, config: BwdWide90Config, sms: int = DEFAULT_SMS) -> int:  # noqa: ARG002
        return grid_of(problem, config)

    def values(
        self, problem: GradientProblem, config: BwdWide90Config, aligned: bool, sms: int = DEFAULT_SMS
    ) -> Values:  # fmt: skip
        return values_of(problem, config, aligned) | {
            "tiles": self.grid(problem, config),
            "section": section(problem, config, sms),
            "sequences": problem.of.forward.batch,
            "ordered": 0,
            "at_once": 0,
        }

    def map_arguments(self, problem: GradientProblem, config: BwdWide90Config) -> tuple[TensorMap, ...]:
        return _DQ.map_arguments(problem, config.like)


class AttentionBwdWidePairSm90(Kernel[GradientProblem, BwdPair90Config]):
    """cuda_src/attention/bwd_wide_pair_sm90.cuh: all three gradients, by pairs of blocks."""

    op, task, name = "attention_backward", "attention_bwd", "attention_bwd_wide_pair_sm90"
    header = "attention/bwd_wide_pair_sm90.cuh"
    summary = "attention backward of head dims 193 to 256 by pairs of blocks: bf16 and fp16 on Hopper (sm_90a)"
    params = Params(header, "AttentionBwdSm90Params")

    def configs(self, arch: str) -> list[BwdPair90Config]:
        if arch != "sm_90a":
            return []
        return [_pair(element, dims) for element in ("bf16", "fp16") for dims in STAGES_PAIR_SM90]

    def why_not(self, problem: GradientProblem, arch: str, aligned: bool = True) -> list[str]:
        why = _why_not(problem, arch, aligned)
        if not why and problem.part != "qkv":
            why.append("pairs of blocks make dq, dk and dv in one launch")
        if not why and not fused(problem.of):
            why.append("dq, dk and dv are made in one launch for head dims beyond 192 and lengths that do not differ")
        return why or _too_many(self.grid(problem, self.choose(problem, arch, aligned)))

    def choose(
        self, problem: GradientProblem, arch: str, aligned: bool = True, device: DeviceProperties = H100  # noqa: ARG002
    ) -> BwdPair90Config:  # fmt: skip
        return _pair(problem.dtype.cuda, [*STAGES_PAIR_SM90][-1])

    def grid(self, problem: GradientProblem, config: BwdPair90Config, sms: int = DEFAULT_SMS) -> int:  # noqa: ARG002
        p = problem.of.forward
        return p.batch * p.heads_k * self._blocks(problem, config)

    def _blocks(self, problem: GradientProblem, config: BwdPair90Config) -> int:
        """Of a head, in whole pairs."""
        return -(-blocks_of(problem, config.alone) // config.cluster) * config.cluster

    def values(
        self, problem: GradientProblem, config: BwdPair90Config, aligned: bool, sms: int = DEFAULT_SMS
    ) -> Values:  # fmt: skip
        sizes = {"blocks": self._blocks(problem, config), "tiles": self.grid(problem, config)}
        return _WIDE.values(problem, config.alone, aligned, sms) | sizes

    def before(
        self, step: Step, config: BwdPair90Config, odd: Sequence[str]  # noqa: ARG002
    ) -> tuple[list[Step], dict[str, int]]:  # fmt: skip
        """dq comes from its sums afterwards."""
        return and_convert(step), {}

    def map_arguments(self, problem: GradientProblem, config: BwdPair90Config) -> tuple[TensorMap, ...]:
        q, k, v, dout = _WIDE.map_arguments(problem, config.alone)
        if config.shares:
            q, dout = (x._replace(box=(x.box[0], x.box[1] // 2, *x.box[2:])) for x in (q, dout))
        return q, k, v, dout


_WIDE = AttentionBwdWideSm90()


def _pair(element: str, dims: tuple[int, int]) -> BwdPair90Config:
    stages, stages_v, shares = STAGES_PAIR_SM90[dims]
    return BwdPair90Config(element, *dims, stages, stages_v, shares)


def _why_not(problem: GradientProblem, arch: str, aligned: bool) -> list[str]:
    """What both kernels ask for."""
    why = _DQ.why_not(GradientProblem(problem.of, "q"), arch, aligned)  # what all of Hopper's kernels do
    dims = dims_sm90(problem.of)
    if arch == "sm_90a" and dims is not None and dims not in STAGES_WIDE_SM90:
        why.append("narrower head dims have a Hopper kernel of their own")
    return why


def _too_many(blocks: int) -> list[str]:
    return [f"{blocks} blocks of work: too much for one launch (2**31 - 1)"] if blocks >= 2**31 else []
