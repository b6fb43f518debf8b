"""The Hopper kernels of attention's backward as the host sees them. No GPU and no CuPy."""

from __future__ import annotations

from collections.abc import Sequence

from flashmoe_cupy.jit.device import H100, DeviceProperties
from flashmoe_cupy.jit.tensormap import TensorMap
from flashmoe_cupy.plan.attention.backward_tiles import PARTS, TILES_BWD_SM90, Bwd90Config, SmallConfig, config_sm90
from flashmoe_cupy.plan.attention.backward_values import dq_values, fused, grid_of, values_of
from flashmoe_cupy.plan.attention.choice import variant_of
from flashmoe_cupy.plan.attention.forward import UNALIGNED_ROWS, array_map
from flashmoe_cupy.plan.attention.gradient import GradientProblem
from flashmoe_cupy.plan.attention.tiles import PLAIN
from flashmoe_cupy.plan.kernel import DEFAULT_SMS, EMPTY, Kernel, far_strides
from flashmoe_cupy.plan.params import Params
from flashmoe_cupy.plan.step import Step, Values, same

_FUSED = ((64, 64), (128, 128))  # compiled head dims of the Hopper kernel of dq, dk and dv at once


class AttentionBwdSm90(Kernel[GradientProblem, Bwd90Config]):
    """cuda_src/attention/bwd_sm90.cuh: faster, for plain scores in 16-bit rows."""

    op, task, name = "attention_backward", "attention_bwd", "attention_bwd_sm90"
    header = "attention/bwd_sm90.cuh"
    summary = "attention backward on TMA and wgmma: bf16 and fp16 on Hopper (sm_90a)"
    params = Params(header, "AttentionBwdSm90Params")

    def configs(self, arch: str) -> list[Bwd90Config]:
        if arch != "sm_90a":
            return []
        return [
            config_sm90(element, dims, part)
            for element in ("bf16", "fp16")
            for dims in TILES_BWD_SM90
            for part in PARTS
            if part != "qkv" or dims in _FUSED
        ]

    def why_not(self, problem: GradientProblem, arch: str, aligned: bool = True) -> list[str]:
        p = problem.of.forward
        if arch != "sm_90a":
            return ["no Hopper tensor cores: this kernel is for sm_90a"]
        why = []
        if p.dtype.cuda not in ("bf16", "fp16"):
            why.append(f"{p.dtype} has no wgmma that is as exact as this library promises: bf16 and fp16 only")
        if not aligned:
            why.append(f"{UNALIGNED_ROWS}: the copy engine cannot fetch them")
        if variant_of(p) != PLAIN:
            why.append("softcap, ALiBi, biases and a scale <= 0 have no Hopper kernel of the backward yet")
        if max(p.head_dim, p.head_dim_v) > [*TILES_BWD_SM90][-1][0]:
            why.append(f"head dims beyond {[*TILES_BWD_SM90][-1][0]} have no Hopper kernel of the backward yet")
        if 0 in (p.batch, p.heads_q, p.heads_k, p.seqlen_q, p.seqlen_k, p.total_q, p.total_k):
            why.append(EMPTY)
        if problem.part == "qkv" and not fused(problem.of):
            why.append("dq, dk and dv are made in one launch for head dims of 64 and 128 alone")
        if why:
            return why
        tiles = grid_of(problem, self.choose(problem, arch, aligned))
        if tiles >= 2**31:
            why.append(f"{tiles} blocks of work: too much for one launch (2**31 - 1)")
        maps = self.map_arguments(problem, self.choose(problem, arch, aligned))
        return why + far_strides(("q", "k", "v", "dout"), maps)

    def choose(
        self, problem: GradientProblem, arch: str, aligned: bool = True, device: DeviceProperties = H100  # noqa: ARG002
    ) -> Bwd90Config:  # fmt: skip
        p = problem.of.forward
        dims = next((d for d in TILES_BWD_SM90 if max(p.head_dim, p.head_dim_v) <= d[0]), [*TILES_BWD_SM90][-1])
        return config_sm90(p.dtype.cuda, dims, problem.part)

    def grid(self, problem: GradientProblem, config: Bwd90Config, sms: int = DEFAULT_SMS) -> int:
        return min(grid_of(problem, config), sms)

    def values(
        self, problem: GradientProblem, config: Bwd90Config, aligned: bool, sms: int = DEFAULT_SMS  # noqa: ARG002
    ) -> Values:  # fmt: skip
        return values_of(problem, config, aligned) | {
            "dq_blocks": -(-problem.of.forward.seqlen_q // 64),
            "tiles": grid_of(problem, config),
        }

    def before(
        self, step: Step, config: Bwd90Config, odd: Sequence[str]  # noqa: ARG002
    ) -> tuple[list[Step], dict[str, int]]:  # fmt: skip
        """dq comes from its sums afterwards."""
        if config.part != "qkv":
            return [step], {}
        convert = Step("attention_bwd_convert", GradientProblem(step.problem.of, "convert"), same("dq_sums", "dq"))
        return [step, convert], {}

    def map_arguments(self, problem: GradientProblem, config: Bwd90Config) -> tuple[TensorMap, ...]:
        of, p = problem.of, problem.of.forward
        queries, keys = (64, config.cols) if problem.part == "q" else (config.cols, 64)

        batch, rows_q, rows_k = (1, p.total_q, p.total_k) if p.varlen else (p.batch, p.seqlen_q, p.seqlen_k)

        def rows(dim: int, seqlen: int, heads: int, strides: tuple[int, int, int], box: int) -> TensorMap:
            outer = (seqlen, strides[1]), (heads, strides[2]), (batch, strides[0])
            return array_map(p.dtype, dim, outer, (64, box, 1, 1))

        return (
            rows(p.head_dim, rows_q, p.heads_q, p.q_strides, queries),
            rows(p.head_dim, rows_k, p.heads_k, p.k_strides, keys),
            rows(p.head_dim_v, rows_k, p.heads_k, p.v_strides, keys),
            rows(p.head_dim_v, rows_q, p.heads_q, of.dout_strides, queries),
        )


class AttentionBwdConvert(Kernel[GradientProblem, SmallConfig]):
    """cuda_src/attention/bwd_convert.cuh."""

    op, task, name = "attention_backward", "attention_bwd_convert", "attention_bwd_convert"
    header = "attention/bwd_convert.cuh"
    summary = "dq from the sums of attention_bwd_sm90"
    params = Params(header, "AttentionBwdConvertParams")

    def configs(self, arch: str) -> list[SmallConfig]:
        return [_convert(element) for element in ("bf16", "fp16")] if arch == "sm_90a" else []

    def why_not(self, problem: GradientProblem, arch: str, aligned: bool = True) -> list[str]:  # noqa: ARG002
        return [] if arch == "sm_90a" else ["it serves attention_bwd_sm90, which is for sm_90a"]

    def choose(
        self, problem: GradientProblem, arch: str, aligned: bool = True, device: DeviceProperties = H100  # noqa: ARG002
    ) -> SmallConfig:  # fmt: skip
        return _convert(problem.dtype.cuda)

    def grid(self, problem: GradientProblem, config: SmallConfig, sms: int = DEFAULT_SMS) -> int:  # noqa: ARG002
        return dq_values(problem.of) // (64 * 64)

    def values(
        self, problem: GradientProblem, config: SmallConfig, aligned: bool, sms: int = DEFAULT_SMS  # noqa: ARG002
    ) -> Values:  # fmt: skip
        p = problem.of.forward
        return {
            **{f"dq_stride_{axis}": n for axis, n in zip("bsh", problem.of.dq_strides, strict=True)},
            "blocks": -(-p.seqlen_q // 64),
            "parts": 1 if max(p.head_dim, p.head_dim_v) <= 64 else 2,
            "heads": p.heads_q,
            "seqlen_q": p.seqlen_q,
            "head_dim": p.head_dim,
            "softmax_scale": p.softmax_scale,
        }

    def title(self, config: SmallConfig) -> str:
        return f"{self.name} {config.name}"


def _convert(element: str) -> SmallConfig:
    return SmallConfig(element, f"AttentionBwdConvert<fm::{element}>", 128)
