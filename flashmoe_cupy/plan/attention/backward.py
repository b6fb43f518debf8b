"""The kernels of attention's backward as the host sees them. No GPU and no CuPy.

One class for each kernel of cuda_src/attention whose name begins with bwd.
"""

from __future__ import annotations

from flashmoe_cupy.jit.device import H100, DeviceProperties
from flashmoe_cupy.jit.tensormap import TensorMap
from flashmoe_cupy.plan.archs import ELEMENT_BYTES, MAX_SMEM
from flashmoe_cupy.plan.attention.backward_tiles import (
    DIMS_FP32,
    PARTS,
    TILES_BWD_SM90,
    Bwd80Config,
    Bwd90Config,
    BwdBias80Config,
    SmallConfig,
    bias_config,
    config_sm80,
    config_sm90,
    together,
)
from flashmoe_cupy.plan.attention.choice import compiled_dims, variant_of, window
from flashmoe_cupy.plan.attention.forward import UNALIGNED_ROWS, array_map
from flashmoe_cupy.plan.attention.gradient import AttentionBwdProblem, GradientProblem
from flashmoe_cupy.plan.attention.tiles import BIAS, PLAIN, TILES_SM80, UNALIGNED, VARIANTS
from flashmoe_cupy.plan.kernel import DEFAULT_SMS, EMPTY, C, Kernel, far_strides
from flashmoe_cupy.plan.params import Params
from flashmoe_cupy.plan.step import Step, Values, same

_DOT_THREADS, _DOT_LANES, _SINKS_THREADS = 256, 16, 512  # of the structs in bwd_dot.cuh and bwd_sinks.cuh
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
        return [_dot(element) for element in ELEMENT_BYTES] if arch in MAX_SMEM else []

    def choose(
        self, problem: GradientProblem, arch: str, aligned: bool = True, device: DeviceProperties = H100  # noqa: ARG002
    ) -> SmallConfig:  # fmt: skip
        return _dot(problem.dtype.cuda)

    def grid(self, problem: GradientProblem, config: SmallConfig, sms: int = DEFAULT_SMS) -> int:  # noqa: ARG002
        p = problem.of.forward
        return -(-p.total_q * p.heads_q // (_DOT_THREADS // _DOT_LANES))

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
        }

    def title(self, config: SmallConfig) -> str:
        return f"{self.name} {config.name}"


def _dot(element: str) -> SmallConfig:
    return SmallConfig(element, f"AttentionBwdDot<fm::{element}>", _DOT_THREADS)


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


class AttentionBwdSm80(_Portable[Bwd80Config]):
    """cuda_src/attention/bwd_sm80.cuh, which runs everything that a problem can describe."""

    task, name = "attention_bwd", "attention_bwd_sm80"
    header = "attention/bwd_sm80.cuh"
    summary = "attention backward on cp.async, ldmatrix and mma.sync: every GPU from sm_80 on"
    params = Params(header, "AttentionBwdParams")

    def configs(self, arch: str) -> list[Bwd80Config]:
        if arch not in MAX_SMEM:
            return []
        found = [
            config_sm80(arch, element, dims, part, variant)
            for element in ("bf16", "fp16")
            for dims in TILES_SM80
            for variant in VARIANTS
            for part in PARTS
            if part != "kv" or together(element, dims, variant)
        ]
        return found + [config_sm80(arch, "fp32", dims, part, BIAS) for dims in DIMS_FP32 for part in ("q", "k", "v")]

    def choose(
        self, problem: GradientProblem, arch: str, aligned: bool = True, device: DeviceProperties = H100  # noqa: ARG002
    ) -> Bwd80Config:  # fmt: skip
        element, dims, variant = specialisation(problem.of)
        if variant == PLAIN and not aligned:
            variant = UNALIGNED
        return config_sm80(arch, element, dims, problem.part, variant)

    def grid(self, problem: GradientProblem, config: Bwd80Config, sms: int = DEFAULT_SMS) -> int:  # noqa: ARG002
        return _grid(problem, config)

    def values(
        self, problem: GradientProblem, config: Bwd80Config, aligned: bool, sms: int = DEFAULT_SMS  # noqa: ARG002
    ) -> Values:  # fmt: skip
        return _values(problem, config, aligned)

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
        batch, heads, queries, keys = problem.of.bias_shape
        return batch * heads * -(-queries // config.rows) * -(-keys // config.cols)

    def values(
        self, problem: GradientProblem, config: BwdBias80Config, aligned: bool, sms: int = DEFAULT_SMS
    ) -> Values:  # fmt: skip
        batch, heads, queries, keys = problem.of.bias_shape
        like = AttentionBwdSm80().values(problem, config.like, aligned, sms)
        strides = (heads * queries * keys, queries * keys, keys, 1)
        return {
            **like,
            **{f"dbias_stride_{axis}": n for axis, n in zip("bhqk", strides, strict=True)},
            "batch": problem.of.forward.batch,
            "bias_batch": batch,
            "bias_heads": heads,
            "bias_queries": queries,
            "bias_keys": keys,
        }

    def slow(self, problem: GradientProblem, aligned: bool) -> str:  # noqa: ARG002
        return "" if aligned else _ALIGNED


class AttentionBwdSm90(Kernel[GradientProblem, Bwd90Config]):
    """cuda_src/attention/bwd_sm90.cuh: faster, for plain scores of even lengths in 16-bit rows."""

    op, task, name = "attention_backward", "attention_bwd", "attention_bwd_sm90"
    header = "attention/bwd_sm90.cuh"
    summary = "attention backward on TMA and wgmma: bf16 and fp16 on Hopper (sm_90a)"
    params = Params(header, "AttentionBwdSm90Params")

    def configs(self, arch: str) -> list[Bwd90Config]:
        if arch != "sm_90a":
            return []
        return [config_sm90(e, dims, part) for e in ("bf16", "fp16") for dims in TILES_BWD_SM90 for part in PARTS]

    def why_not(self, problem: GradientProblem, arch: str, aligned: bool = True) -> list[str]:
        p = problem.of.forward
        if arch != "sm_90a":
            return ["no Hopper tensor cores: this kernel is for sm_90a"]
        why = []
        if p.dtype.cuda not in ("bf16", "fp16"):
            why.append(f"{p.dtype} has no wgmma that is as exact as this library promises: bf16 and fp16 only")
        if not aligned:
            why.append(f"{UNALIGNED_ROWS}: the copy engine cannot fetch them")
        if not p.even:
            why.append("lengths that only the device knows have no Hopper kernel of the backward yet")
        if variant_of(p) != PLAIN:
            why.append("softcap, ALiBi, biases and a scale <= 0 have no Hopper kernel of the backward yet")
        if max(p.head_dim, p.head_dim_v) > [*TILES_BWD_SM90][-1][0]:
            why.append(f"head dims beyond {[*TILES_BWD_SM90][-1][0]} have no Hopper kernel of the backward yet")
        if 0 in (p.batch, p.heads_q, p.heads_k, p.seqlen_q, p.seqlen_k):
            why.append(EMPTY)
        if why:
            return why
        blocks = self.grid(problem, self.choose(problem, arch, aligned))
        if blocks >= 2**31:
            why.append(f"{blocks} blocks of work: too much for one launch (2**31 - 1)")
        maps = self.map_arguments(problem, self.choose(problem, arch, aligned))
        return why + far_strides(("q", "k", "v", "dout"), maps)

    def choose(
        self, problem: GradientProblem, arch: str, aligned: bool = True, device: DeviceProperties = H100  # noqa: ARG002
    ) -> Bwd90Config:  # fmt: skip
        p = problem.of.forward
        dims = next((d for d in TILES_BWD_SM90 if max(p.head_dim, p.head_dim_v) <= d[0]), [*TILES_BWD_SM90][-1])
        return config_sm90(p.dtype.cuda, dims, problem.part)

    def grid(self, problem: GradientProblem, config: Bwd90Config, sms: int = DEFAULT_SMS) -> int:  # noqa: ARG002
        return _grid(problem, config)

    def values(
        self, problem: GradientProblem, config: Bwd90Config, aligned: bool, sms: int = DEFAULT_SMS  # noqa: ARG002
    ) -> Values:  # fmt: skip
        return _values(problem, config, aligned)

    def map_arguments(self, problem: GradientProblem, config: Bwd90Config) -> tuple[TensorMap, ...]:
        of, p = problem.of, problem.of.forward
        queries, keys = (64, config.cols) if problem.part == "q" else (config.cols, 64)

        def rows(dim: int, seqlen: int, heads: int, strides: tuple[int, int, int], box: int) -> TensorMap:
            outer = (seqlen, strides[1]), (heads, strides[2]), (p.batch, strides[0])
            return array_map(p.dtype, dim, outer, (64, box, 1, 1))

        return (
            rows(p.head_dim, p.seqlen_q, p.heads_q, p.q_strides, queries),
            rows(p.head_dim, p.seqlen_k, p.heads_k, p.k_strides, keys),
            rows(p.head_dim_v, p.seqlen_k, p.heads_k, p.v_strides, keys),
            rows(p.head_dim_v, p.seqlen_q, p.heads_q, of.dout_strides, queries),
        )


def _grid(problem: GradientProblem, config: Bwd80Config | Bwd90Config) -> int:
    p = problem.of.forward
    return p.batch * _blocks(problem, config) * (p.heads_q if problem.part == "q" else p.heads_k)


def _values(problem: GradientProblem, config: Bwd80Config | Bwd90Config, aligned: bool) -> Values:
    """What AttentionBwdParams holds behind its pointers."""
    of, p = problem.of, problem.of.forward
    strides = {
        "q": p.q_strides, "k": p.k_strides, "v": p.v_strides, "dout": of.dout_strides, "dq": of.dq_strides,
        "dk": of.dk_strides, "dv": of.dv_strides,
    }  # fmt: skip
    rows = p.total_q if p.varlen else p.seqlen_q
    return {
        **{f"{name}_stride_{axis}": n for name, by in strides.items() for axis, n in zip("bsh", by, strict=True)},
        **{f"bias_stride_{axis}": n for axis, n in zip("bhqk", p.bias_strides, strict=True)},
        "row_stride_b": 0 if p.varlen else p.heads_q * rows,
        "row_stride_h": rows,
        "heads_q": p.heads_q,
        "heads_per_key": p.heads_q // max(p.heads_k, 1),
        "seqlen_q": p.seqlen_q,
        "seqlen_k": p.seqlen_k,
        "head_dim": p.head_dim,
        "head_dim_v": p.head_dim_v,
        "window_left": window(p.window_left, p),
        "window_right": window(p.window_right, p),
        "blocks": _blocks(problem, config),
        "v_blocks": -(-p.head_dim_v // config.head_dim_v),
        "alibi_stride_b": p.alibi_stride_b,
        "bias_dtype": 0 if p.bias_dtype is None else p.bias_dtype.code,
        "aligned": int(aligned),
        "lengths": lengths_code(of),
        "softmax_scale": p.softmax_scale,
        "softcap": p.softcap,
    }


def _blocks(problem: GradientProblem, config: Bwd80Config | Bwd90Config) -> int:
    p = problem.of.forward
    return max(1, -(-(p.seqlen_q if problem.part == "q" else p.seqlen_k) // config.rows))


def specialisation(of: AttentionBwdProblem) -> tuple[str, tuple[int, int], str]:
    """Element, compiled head dims and variant, for rows that are aligned."""
    p = of.forward
    element = p.dtype.cuda
    if element == "fp32":
        dims = next(d for d in DIMS_FP32 if p.head_dim <= d[0] and (p.head_dim_v <= d[1] or d[0] >= 128))
        return element, dims, BIAS
    return element, compiled_dims(p, TILES_SM80), variant_of(p)


def lengths_code(of: AttentionBwdProblem) -> int:
    """Of the enum Lengths in cuda_src/attention/params.cuh."""
    return 0 if of.forward.even else 2 if of.forward.varlen else 1


_ARRAYS = same(
    "q", "k", "v", "dout", "dq", "dk", "dv", "bias", "row_lse", "row_delta", "alibi_slopes", "cu_seqlens_q",
    "cu_seqlens_k", "seqused_q", "seqused_k", "leftpad_q", "leftpad_k",
)


def backward_steps(p: AttentionBwdProblem) -> tuple[list[Step], dict[str, int]]:
    """The launches, and the bytes of each array of the workspace."""
    f = p.forward
    rows = 4 * f.total_q * f.heads_q
    dot = same("out", "dout", "lse", "dlse", "row_lse", "row_delta")
    steps = [Step("attention_bwd_dot", GradientProblem(p, "dot"), dot)] if rows else []
    parts = "".join(name for name in "kv" if f"d{name}" in p.wanted)
    of_keys = [parts] if together(*specialisation(p)) else [*parts]
    sizes = {
        "dq": f.total_q * f.heads_q * f.head_dim, "dk": f.total_k * f.heads_k * f.head_dim,
        "dv": f.total_k * f.heads_k * f.head_dim_v,
    }  # fmt: skip
    for part in [*filter(None, of_keys), *(["q"] if "dq" in p.wanted else [])]:
        if not sizes[f"d{part[0]}"]:
            continue  # no rows
        clears = {f"d{x}": sizes[f"d{x}"] * f.dtype.itemsize for x in part if not f.even and f"d{x}" in p.new}
        steps.append(Step("attention_bwd", GradientProblem(p, part), _ARRAYS, None, clears))
    if "dbias" in p.wanted and 0 not in p.bias_shape:
        steps.append(Step("attention_bwd_bias", GradientProblem(p, "bias"), _ARRAYS | same("dbias")))
    if "dsinks" in p.wanted:
        sinks = same("row_lse", "row_delta", "sinks", "dsinks", "cu_seqlens_q", "seqused_q", "leftpad_q")
        steps.append(Step("attention_bwd_sinks", GradientProblem(p, "sinks"), sinks))
    return steps, {"row_lse": max(rows, 4), "row_delta": max(rows, 4)}
