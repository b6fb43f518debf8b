"""The kernels of attention's backward as the host sees them. No GPU and no CuPy.

One class for each kernel of cuda_src/attention whose name begins with bwd.
"""

from __future__ import annotations

from collections.abc import Sequence

from flashmoe_cupy.jit.device import H100, DeviceProperties
from flashmoe_cupy.plan.archs import ELEMENT_BYTES, MAX_SMEM
from flashmoe_cupy.plan.attention.backward_bias_sm90 import dbias_apart, dbias_with_dq, room_for_rows
from flashmoe_cupy.plan.attention.backward_tiles import (
    DIMS_FP32,
    STAGES_WIDE_SM90,
    TILES_ALL_SM80,
    TILES_BWD_SM90,
    Bwd80Config,
    BwdAll80Config,
    BwdBias80Config,
    SmallConfig,
    all_config,
    bias_config,
    config_sm80,
    together,
)
from flashmoe_cupy.plan.attention.backward_values import (
    and_convert,
    bias_tiles,
    bias_values,
    dims_sm90,
    dq_values,
    fused,
    grid_of,
    lengths_code,
    specialisation,
    turns,
    values_of,
)
from flashmoe_cupy.plan.attention.forward import UNALIGNED_ROWS
from flashmoe_cupy.plan.attention.gradient import AttentionBwdProblem, GradientProblem
from flashmoe_cupy.plan.attention.tiles import BIAS, PLAIN, SCORES, TILES_SM80, UNALIGNED, VARIANTS
from flashmoe_cupy.plan.kernel import DEFAULT_SMS, C, Kernel
from flashmoe_cupy.plan.params import Params
from flashmoe_cupy.plan.step import Step, Values, same

_DOT_THREADS, _DOT_AT_ONCE, _SINKS_THREADS = 256, 2, 512  # of the structs in bwd_dot.cuh and bwd_sinks.cuh
_Config80 = Bwd80Config | BwdAll80Config
_ALIGNED = f"{UNALIGNED_ROWS}, so elements are copied one by one; contiguous arrays are faster"


class _Portable(Kernel[GradientProblem, C]):
    """What the kernels for every GPU from sm_80 on share."""

    op = "attention_backward"

    def why_not(self, problem: GradientProblem, arch: str, aligned: bool = True) -> list[str]:
        if arch not in MAX_SMEM:
            return [f"{arch} is not supported: this kernel needs compute capability 8.0 or newer"]
        blocks = self.grid(problem, self.choose(problem, arch, aligned))
        return [f"{blocks} blocks of work: too much for one launch (2**31 - 1)"] if blocks >= 2**31 else []


class AttentionBwdDot(_Portable[SmallConfig]):
    """cuda_src/attention/bwd_dot.cuh."""

    task, name = "attention_bwd_dot", "attention_bwd_dot"
    header = "attention/bwd_dot.cuh"
    summary = "row sums of dout * out, for the backward of attention"
    params = Params(header, "AttentionBwdDotParams")

    def configs(self, arch: str) -> list[SmallConfig]:
        return [_dot(element, lanes) for element in ELEMENT_BYTES for lanes in (8, 16)] if arch in MAX_SMEM else []

    def choose(
        self, problem: GradientProblem, arch: str, aligned: bool = True, device: DeviceProperties = H100  # noqa: ARG002
    ) -> SmallConfig:  # fmt: skip
        p = problem.of.forward
        return _dot(p.dtype.cuda, 8 if p.head_dim_v * p.dtype.itemsize <= 128 else 16)

    def grid(self, problem: GradientProblem, config: SmallConfig, sms: int = DEFAULT_SMS) -> int:  # noqa: ARG002
        p, lanes = problem.of.forward, int(config.name.split()[1])
        return -(-p.total_q // (_DOT_AT_ONCE * _DOT_THREADS // lanes)) * p.heads_q

    def values(
        self, problem: GradientProblem, config: SmallConfig, aligned: bool, sms: int = DEFAULT_SMS  # noqa: ARG002
    ) -> Values:  # fmt: skip
        of, p = problem.of, problem.of.forward
        return {
            **{f"out_stride_{axis}": n for axis, n in zip("bsh", p.out_strides, strict=True)},
            **{f"dout_stride_{axis}": n for axis, n in zip("bsh", of.dout_strides, strict=True)},
            **{f"lse_stride_{axis}": n for axis, n in zip("bhs", of.lse_strides, strict=True)},
            **{f"dlse_stride_{axis}": n for axis, n in zip("bhs", of.dlse_strides or (0, 0, 0), strict=True)},
            "rows": p.total_q,
            "seqlen": p.total_q if p.varlen else p.seqlen_q,
            "heads": p.heads_q,
            "head_dim_v": p.head_dim_v,
            "aligned": int(aligned),
            "dq_values": dq_values(of),
            "turns": turns(of),
        }

    def title(self, config: SmallConfig) -> str:
        return f"{self.name} {config.name}"


def _dot(element: str, lanes: int) -> SmallConfig:
    return SmallConfig(f"{element} {lanes} lanes", f"AttentionBwdDot<fm::{element}, {lanes}>", _DOT_THREADS)


class AttentionBwdSinks(_Portable[SmallConfig]):
    """cuda_src/attention/bwd_sinks.cuh."""

    task, name = "attention_bwd_sinks", "attention_bwd_sinks"
    header = "attention/bwd_sinks.cuh"
    summary = "the gradient of attention's sinks"
    params = Params(header, "AttentionBwdSinksParams")
    _CONFIG = SmallConfig("sinks", "AttentionBwdSinks", _SINKS_THREADS, 4 * _SINKS_THREADS // 32)

    def configs(self, arch: str) -> list[SmallConfig]:
        return [self._CONFIG] if arch in MAX_SMEM else []

    def choose(
        self, problem: GradientProblem, arch: str, aligned: bool = True, device: DeviceProperties = H100  # noqa: ARG002
    ) -> SmallConfig:  # fmt: skip
        return self._CONFIG

    def grid(self, problem: GradientProblem, config: SmallConfig, sms: int = DEFAULT_SMS) -> int:  # noqa: ARG002
        return problem.of.forward.heads_q

    def values(
        self, problem: GradientProblem, config: SmallConfig, aligned: bool, sms: int = DEFAULT_SMS  # noqa: ARG002
    ) -> Values:  # fmt: skip
        p = problem.of.forward
        return {
            "batch": p.batch,
            "heads_q": p.heads_q,
            "seqlen_q": p.seqlen_q,
            "total_q": p.total_q,
            "lengths": lengths_code(problem.of),
            "sinks_dtype": 0 if p.sinks_dtype is None else p.sinks_dtype.code,
        }

    def title(self, config: SmallConfig) -> str:  # noqa: ARG002
        return self.name


class AttentionBwdSm80(_Portable[_Config80]):
    """cuda_src/attention/bwd_sm80.cuh, which runs everything that a problem can describe, and bwd_all_sm80.cuh.

    The latter makes all three gradients in one launch, where it may add dq up in any order.
    """

    task, name = "attention_bwd", "attention_bwd_sm80"
    header = "attention/bwd_all_sm80.cuh"
    summary = "attention backward on cp.async, ldmatrix and mma.sync: every GPU from sm_80 on"
    params = Params(header, "AttentionBwdParams")

    def configs(self, arch: str) -> list[_Config80]:
        if arch not in MAX_SMEM:
            return []
        found: list[_Config80 | None] = [
            config_sm80(arch, element, dims, part, variant)
            for element in ("bf16", "fp16")
            for dims in TILES_SM80
            for variant in VARIANTS
            for part in ("q", "k", "v", "kv")
            if part != "kv" or together(element, dims, variant)
        ]
        found += [config_sm80(arch, "fp32", dims, part, BIAS) for dims in DIMS_FP32 for part in ("q", "k", "v")]
        found += [
            all_config(arch, element, dims, variant)
            for element in ("bf16", "fp16")
            for dims in TILES_ALL_SM80
            for variant in (PLAIN, SCORES)
        ]
        return [config for config in found if config is not None]

    def choose(
        self, problem: GradientProblem, arch: str, aligned: bool = True, device: DeviceProperties = H100  # noqa: ARG002
    ) -> _Config80:  # fmt: skip
        element, dims, variant = specialisation(problem.of)
        if problem.part == "qkv" and aligned and not problem.of.deterministic:
            found = all_config(arch, element, dims_sm90(problem.of), variant)
            if found is not None:
                return found
        if variant == PLAIN and not aligned:
            variant = UNALIGNED
        return config_sm80(arch, element, dims, "kv" if problem.part == "qkv" else problem.part, variant)

    def grid(self, problem: GradientProblem, config: _Config80, sms: int = DEFAULT_SMS) -> int:  # noqa: ARG002
        return grid_of(problem, config)

    def values(
        self, problem: GradientProblem, config: _Config80, aligned: bool, sms: int = DEFAULT_SMS  # noqa: ARG002
    ) -> Values:  # fmt: skip
        return values_of(problem, config, aligned)

    def before(
        self, step: Step, config: _Config80, odd: Sequence[str]  # noqa: ARG002
    ) -> tuple[list[Step], dict[str, int]]:  # fmt: skip
        """Parts of their own for all that is wanted at once, as far as there is no kernel of them."""
        of, part = step.problem.of, step.problem.part
        if "dbias" in step.arguments:
            return dbias_apart(step), {}
        if config.part == "qkv":
            return and_convert(step), {}
        parts = ["kv"] if together(*specialisation(of)) else ["k", "v"]
        if part not in ("kv", "qkv") or part == parts[0]:
            return [step], {}
        parts += ["q"] if part == "qkv" else []
        found = []
        for part in parts:
            clears = {name: size for name, size in step.clears.items() if name[1] in part}
            found.append(Step(step.task, GradientProblem(of, part), step.arguments, None, clears))
        return found, {}

    def slow(self, problem: GradientProblem, aligned: bool) -> str:  # noqa: ARG002
        return "" if aligned else _ALIGNED


class AttentionBwdBiasSm80(_Portable[BwdBias80Config]):
    """cuda_src/attention/bwd_bias_sm80.cuh."""

    task, name = "attention_bwd_bias", "attention_bwd_bias_sm80"
    header = "attention/bwd_bias_sm80.cuh"
    summary = "the gradient of attention's bias: every GPU from sm_80 on"
    params = Params(header, "AttentionBwdBiasParams")

    def configs(self, arch: str) -> list[BwdBias80Config]:
        if arch not in MAX_SMEM:
            return []
        sizes = [(element, dims) for element in ("bf16", "fp16") for dims in TILES_SM80]
        return [bias_config(*size) for size in (*sizes, *[("fp32", dims) for dims in DIMS_FP32])]

    def choose(
        self, problem: GradientProblem, arch: str, aligned: bool = True, device: DeviceProperties = H100  # noqa: ARG002
    ) -> BwdBias80Config:  # fmt: skip
        return bias_config(*specialisation(problem.of)[:2])

    def grid(self, problem: GradientProblem, config: BwdBias80Config, sms: int = DEFAULT_SMS) -> int:  # noqa: ARG002
        return bias_tiles(problem.of, config.rows, config.cols)

    def values(
        self, problem: GradientProblem, config: BwdBias80Config, aligned: bool, sms: int = DEFAULT_SMS
    ) -> Values:  # fmt: skip
        tile = config.rows, config.cols
        return AttentionBwdSm80().values(problem, config.like, aligned, sms) | bias_values(problem.of, *tile)

    def slow(self, problem: GradientProblem, aligned: bool) -> str:  # noqa: ARG002
        return "" if aligned else _ALIGNED


_ARRAYS = same(
    "q", "k", "v", "dout", "dq", "dk", "dv", "bias", "row_lse", "row_delta", "alibi_slopes", "cu_seqlens_q",
    "cu_seqlens_k", "seqused_q", "seqused_k", "leftpad_q", "leftpad_k", "tile_counters",
)


def backward_steps(p: AttentionBwdProblem) -> tuple[list[Step], dict[str, int]]:
    """The launches, and the bytes of each array of the workspace."""
    f = p.forward
    rows = 4 * f.total_q * f.heads_q
    sizes = {
        "dq": f.total_q * f.heads_q * f.head_dim, "dk": f.total_k * f.heads_k * f.head_dim,
        "dv": f.total_k * f.heads_k * f.head_dim_v,
    }  # fmt: skip
    dot = same("out", "dout", "lse", "dlse", "row_lse", "row_delta", "dq_sums", "tile_counters")
    steps = [Step("attention_bwd_dot", GradientProblem(p, "dot"), dot)] if rows else []
    if fused(p) and (not p.deterministic or dims_sm90(p) in TILES_BWD_SM90) and {"dq", "dk", "dv"} <= {*p.wanted}:
        clears = {f"d{x}": sizes[f"d{x}"] * f.dtype.itemsize for x in "qkv" if not f.even and f"d{x}" in p.new}
        arrays = _ARRAYS | same("dq_sums")
        steps.append(Step("attention_bwd", GradientProblem(p, "qkv"), arrays, None, clears))
    parts = "".join(name for name in "kv" if f"d{name}" in p.wanted)
    of_keys = [parts] if together(*specialisation(p)) or dims_sm90(p) in STAGES_WIDE_SM90 else [*parts]
    at_once = steps[-1:] and steps[-1].problem.part == "qkv"
    both = dbias_with_dq(p)  # dq and dbias, in one launch
    for part in [*filter(None, of_keys), *(["q"] if "dq" in p.wanted else [])] if not at_once else ():
        if not sizes[f"d{part[0]}"]:
            continue  # no rows
        clears = {f"d{x}": sizes[f"d{x}"] * f.dtype.itemsize for x in part if not f.even and f"d{x}" in p.new}
        arrays = _ARRAYS | (same("dbias") if part == "q" and both else {})
        steps.append(Step("attention_bwd", GradientProblem(p, part), arrays, None, clears))
    if "dbias" in p.wanted and 0 not in p.bias_shape and not both:
        steps.append(Step("attention_bwd_bias", GradientProblem(p, "bias"), _ARRAYS | same("dbias")))
    if "dsinks" in p.wanted:
        sinks = same("row_lse", "row_delta", "sinks", "dsinks", "cu_seqlens_q", "seqused_q", "leftpad_q")
        steps.append(Step("attention_bwd_sinks", GradientProblem(p, "sinks"), sinks))
    sums = {"dq_sums": 4 * dq_values(p)} if at_once else {}
    counters = 32 + 4 * turns(p)
    shared = {"row_lse": max(rows, 4), "row_delta": max(rows, 4), "tile_counters": counters}
    return steps, shared | sums | room_for_rows(f)
