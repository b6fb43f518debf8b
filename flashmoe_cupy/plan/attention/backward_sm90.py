"""The Hopper kernels of attention's backward as the host sees them. No GPU and no CuPy."""

from __future__ import annotations

from collections.abc import Sequence

from flashmoe_cupy.jit.device import H100, DeviceProperties
from flashmoe_cupy.jit.tensormap import TensorMap
from flashmoe_cupy.plan.archs import MAX_SMEM
from flashmoe_cupy.plan.attention.backward_tiles import (
    PARTS,
    TILES_BWD_SM90,
    TILES_DQ_SM90,
    Bwd90Config,
    SmallConfig,
    config_sm90,
)
from flashmoe_cupy.plan.attention.backward_values import (
    and_convert,
    blocks_of,
    dims_sm90,
    dq_blocks,
    dq_columns,
    lengths_code,
    section,
    values_of,
)
from flashmoe_cupy.plan.attention.choice import variant_of, window
from flashmoe_cupy.plan.attention.forward import UNALIGNED_ROWS, array_map
from flashmoe_cupy.plan.attention.gradient import GradientProblem
from flashmoe_cupy.plan.attention.tiles import PLAIN, SCORES
from flashmoe_cupy.plan.kernel import DEFAULT_SMS, EMPTY, Kernel, far_strides
from flashmoe_cupy.plan.params import Params
from flashmoe_cupy.plan.step import Step, Values


class AttentionBwdSm90(Kernel[GradientProblem, Bwd90Config]):
    """cuda_src/attention/bwd_sm90.cuh: faster, for 16-bit rows without a bias.

    Beyond head dims of 128 dq of plain scores alone.
    """

    op, task, name = "attention_backward", "attention_bwd", "attention_bwd_sm90"
    header = "attention/bwd_sm90.cuh"
    summary = "attention backward on TMA and wgmma: bf16 and fp16 on Hopper (sm_90a)"
    params = Params(header, "AttentionBwdSm90Params")

    def configs(self, arch: str) -> list[Bwd90Config]:
        if arch != "sm_90a":
            return []
        return [
            config_sm90(element, dims, part, variant)
            for element in ("bf16", "fp16")
            for variant in (PLAIN, SCORES)
            for dims in (*TILES_BWD_SM90, *(TILES_DQ_SM90 if variant == PLAIN else ()))
            for part in PARTS
            if part == "q" or dims in TILES_BWD_SM90
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
        if variant_of(p) not in (PLAIN, SCORES):
            why.append("a bias has Hopper kernels of its own")
        widest = [*(TILES_DQ_SM90 if problem.part == "q" and variant_of(p) == PLAIN else TILES_BWD_SM90)][-1][0]
        if max(p.head_dim, p.head_dim_v) > widest:
            why.append(f"head dims beyond {widest} have no such Hopper kernel of the backward")
        if 0 in (p.batch, p.heads_q, p.heads_k, p.seqlen_q, p.seqlen_k, p.total_q, p.total_k):
            why.append(EMPTY)
        if why:
            return why
        tiles = self._tiles(problem, self.choose(problem, arch, aligned))
        if tiles >= 2**31:
            why.append(f"{tiles} blocks of work: too much for one launch (2**31 - 1)")
        maps = self.map_arguments(problem, self.choose(problem, arch, aligned))
        return why + far_strides(("q", "k", "v", "dout"), maps)

    def choose(
        self, problem: GradientProblem, arch: str, aligned: bool = True, device: DeviceProperties = H100  # noqa: ARG002
    ) -> Bwd90Config:  # fmt: skip
        known = [*TILES_BWD_SM90, *(TILES_DQ_SM90 if problem.part == "q" else ())]
        dims = next((d for d in known if d == dims_sm90(problem.of)), known[-1])
        return config_sm90(problem.dtype.cuda, dims, problem.part, variant_of(problem.of.forward))

    def grid(self, problem: GradientProblem, config: Bwd90Config, sms: int = DEFAULT_SMS) -> int:
        return min(self._tiles(problem, config), sms)

    def _blocks(self, problem: GradientProblem, config: Bwd90Config) -> int:
        """Tiles of rows of a head: of an entry, or of all packed sequences, up to one too many for each."""
        p = problem.of.forward
        if not p.varlen:
            return blocks_of(problem, config)
        return (p.total_q if problem.part == "q" else p.total_k) // config.rows + p.batch

    def _tiles(self, problem: GradientProblem, config: Bwd90Config) -> int:
        p = problem.of.forward
        heads = p.heads_q if problem.part == "q" else p.heads_k
        return (1 if p.varlen else p.batch) * heads * self._blocks(problem, config)

    def values(
        self, problem: GradientProblem, config: Bwd90Config, aligned: bool, sms: int = DEFAULT_SMS
    ) -> Values:  # fmt: skip
        return values_of(problem, config, aligned) | {
            "blocks": self._blocks(problem, config),
            "tiles": self._tiles(problem, config),
            "sequences": problem.of.forward.batch,
            "section": section(problem, config, sms),
            "ordered": int(config.part == "qkv" and problem.of.deterministic),
            "at_once": int(self.at_once(problem, config, sms)),
        }

    def at_once(self, problem: GradientProblem, config: Bwd90Config, sms: int = DEFAULT_SMS) -> bool:
        """In order, dq is added faster where tiles may wait for later ones: all of a section's have to run."""
        p = problem.of.forward
        full = window(p.window_left, p) < 0 and window(p.window_right, p) < 0
        in_order = config.part == "qkv" and problem.of.deterministic and full
        return in_order and blocks_of(problem, config) * section(problem, config, sms) <= sms

    def before(
        self, step: Step, config: Bwd90Config, odd: Sequence[str]  # noqa: ARG002
    ) -> tuple[list[Step], dict[str, int]]:  # fmt: skip
        """dq comes from its sums afterwards."""
        if config.part != "qkv":
            return [step], {}
        return and_convert(step), {}

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
    summary = "dq from its sums, of the kernels that make all gradients at once"
    params = Params(header, "AttentionBwdConvertParams")

    def configs(self, arch: str) -> list[SmallConfig]:
        return [_convert(element) for element in ("bf16", "fp16")] if arch in MAX_SMEM else []

    def why_not(self, problem: GradientProblem, arch: str, aligned: bool = True) -> list[str]:  # noqa: ARG002
        return [] if arch in MAX_SMEM else [f"{arch} is not supported: compute capability 8.0 or newer is needed"]

    def choose(
        self, problem: GradientProblem, arch: str, aligned: bool = True, device: DeviceProperties = H100  # noqa: ARG002
    ) -> SmallConfig:  # fmt: skip
        return _convert(problem.dtype.cuda)

    def grid(self, problem: GradientProblem, config: SmallConfig, sms: int = DEFAULT_SMS) -> int:  # noqa: ARG002
        p = problem.of.forward
        return p.batch * p.heads_q * -(-p.seqlen_q // 64) * (dq_columns(problem.of) // 64)

    def values(
        self, problem: GradientProblem, config: SmallConfig, aligned: bool, sms: int = DEFAULT_SMS  # noqa: ARG002
    ) -> Values:  # fmt: skip
        p = problem.of.forward
        return {
            **{f"dq_stride_{axis}": n for axis, n in zip("bsh", problem.of.dq_strides, strict=True)},
            "blocks": -(-p.seqlen_q // 64),
            "parts": dq_columns(problem.of) // 64,
            "dq_blocks": dq_blocks(problem.of),
            "lengths": lengths_code(problem.of),
            "heads": p.heads_q,
            "seqlen_q": p.seqlen_q,
            "head_dim": p.head_dim,
            "softmax_scale": p.softmax_scale,
        }

    def title(self, config: SmallConfig) -> str:
        return f"{self.name} {config.name}"


def _convert(element: str) -> SmallConfig:
    return SmallConfig(element, f"AttentionBwdConvert<fm::{element}>", 128)
