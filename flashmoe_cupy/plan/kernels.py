"""The registry of kernels: for each its header, its Params packer, its closed set of configurations and who may use it.

A contributor adds a kernel here. No GPU and no CuPy: everything in this file runs anywhere.
"""

from __future__ import annotations

import struct

from flashmoe_cupy.dtypes import DType
from flashmoe_cupy.jit import source
from flashmoe_cupy.plan.config import ELEMENT_BYTES, MAX_SMEM, AttentionConfig
from flashmoe_cupy.plan.problem import AttentionProblem

# Every kernel compiles for these without a spill; the test suite checks it.
ARCHS = ("sm_80", "sm_86", "sm_89", "sm_90a", "sm_100", "sm_120")

_VARIANTS = ("PlainScores", "PlainScoresUnaligned", "ModifiedScores<false>", "ModifiedScores<true>")
_PLAIN, _UNALIGNED, _SCORES, _BIAS = _VARIANTS


def arch_for(compute_capability: tuple[int, int]) -> str:
    """The compilation target of a device. Only 9.0 has an `a` target here: its own kernels use wgmma."""
    major, minor = compute_capability
    return "sm_90a" if (major, minor) == (9, 0) else f"sm_{major}{minor}"


# (block_m, block_n, warps) by compiled head dims. Measured on an H100; benchmarks/NOTEBOOK.md has the candidates.
_TILES: dict[tuple[int, int], dict[str, tuple[int, int, int]]] = {
    (64, 64): {_PLAIN: (128, 128, 4), _SCORES: (128, 64, 4), _BIAS: (64, 64, 4)},
    (96, 96): {_PLAIN: (128, 64, 4), _SCORES: (64, 64, 4), _BIAS: (64, 64, 4)},
    (128, 128): {_PLAIN: (128, 64, 4), _SCORES: (64, 64, 4), _BIAS: (64, 64, 4)},
    (192, 128): {_PLAIN: (128, 64, 4), _SCORES: (64, 64, 4), _BIAS: (64, 64, 4)},
    (256, 256): {_PLAIN: (64, 64, 4), _SCORES: (64, 64, 4), _BIAS: (64, 64, 4)},
    (64, 256): {_PLAIN: (64, 64, 4), _SCORES: (64, 64, 4), _BIAS: (64, 64, 4)},
}
# Where another architecture's register allocation would spill with the tile above, under some NVRTC from 12.4 to 13.5.
_TILES_ON: dict[tuple[str, tuple[int, int], str], tuple[int, int, int]] = {
    **{(arch, (64, 64), _PLAIN): (128, 64, 4) for arch in ("sm_100", "sm_120")},
    **{(arch, (128, 128), _PLAIN): (128, 48, 4) for arch in ("sm_100", "sm_120")},
    **{(arch, (192, 128), _PLAIN): (128, 48, 4) for arch in ("sm_100", "sm_120")},
    **{(arch, (64, 256), _BIAS): (64, 32, 4) for arch in ("sm_80", "sm_86", "sm_89", "sm_100")},
    **{(arch, (256, 256), _BIAS): (64, 32, 4) for arch in ("sm_80", "sm_86", "sm_89", "sm_100")},
}
_SIBLINGS = {"sm_87": "sm_80", "sm_103": "sm_100", "sm_110": "sm_100", "sm_121": "sm_120"}  # the same instructions
# fp32 has one variant, which does everything: its speed comes second. Wider values run as blocks of 128.
_TILES_FP32 = {
    (64, 64): (64, 32, 4),
    (96, 96): (64, 32, 4),
    (128, 128): (64, 32, 4),
    (192, 128): (64, 32, 4),
    (256, 128): (64, 16, 4),
}

_POINTERS = (
    "q", "k", "v", "out", "lse", "bias", "alibi_slopes", "sinks",
    "cu_seqlens_q", "cu_seqlens_k", "seqused_q", "seqused_k",
)  # fmt: skip
# The rest of fm::AttentionFwdParams, in its order; pack_tail finds the values by these names.
_TAIL_FIELDS = (
    *(f"{name}_stride_{axis}" for name in ("q", "k", "v", "out") for axis in "bsh"),
    *(f"bias_stride_{axis}" for axis in "bhqk"),
    "lse_stride_b", "lse_stride_h",
    "heads_q", "heads_per_key", "seqlen_q", "seqlen_k", "head_dim", "head_dim_v", "window_left", "window_right",
    "m_blocks", "v_blocks", "alibi_stride_b", "bias_dtype", "sinks_dtype", "aligned",
    "softmax_scale", "softcap",
)  # fmt: skip
_HEAD = struct.Struct(f"{len(_POINTERS)}Q")
_TAIL = struct.Struct("18q14i2f")


class Kernel:
    """One kernel family: which problems it runs, in which configuration, and how its Params are packed."""

    name = "attention_fwd_sm80"
    header = "attention/fwd_sm80.cuh"
    params = "AttentionFwdParams"
    summary = "attention forward on cp.async, ldmatrix and mma.sync: every GPU from sm_80 on"
    params_size = _HEAD.size + _TAIL.size
    fields = _POINTERS + _TAIL_FIELDS
    pack_pointers = _HEAD.pack_into
    pointer_bytes = _HEAD.size

    def configs(self, arch: str) -> list[AttentionConfig]:
        """The closed set for one architecture: warming these up leaves nothing to compile."""
        found = [
            AttentionConfig(element, *dims, *_tile(arch, dims, variant), variant)
            for element in ("bf16", "fp16")
            for dims in _TILES
            for variant in _VARIANTS
        ]
        found += [AttentionConfig("fp32", *dims, *tile, _BIAS) for dims, tile in _TILES_FP32.items()]
        return found

    def why_not(self, problem: AttentionProblem, arch: str) -> list[str]:
        """Every reason why the problem cannot run on `arch`; empty = it runs."""
        why = []
        if arch not in MAX_SMEM:
            why.append(f"{arch} is not supported: this kernel needs compute capability 8.0 or newer")
            return why
        config = self.choose(problem, arch)
        blocks = self.grid(problem, config)
        if blocks >= 2**31:
            why.append(f"{blocks} blocks of work: batch * heads_q * seqlen_q is too large for one launch (2**31 - 1)")
        if config.smem_bytes > MAX_SMEM[arch]:
            why.append(f"{config.name} needs {config.smem_bytes} bytes of shared memory, {arch} has {MAX_SMEM[arch]}")
        return why

    def choose(self, problem: AttentionProblem, arch: str, aligned: bool = True) -> AttentionConfig:
        """The configuration for a problem. `aligned`: every row of q, k, v and out starts at a multiple of 16 bytes."""
        element = problem.dtype.cuda
        dims = _compiled_dims(problem.head_dim, problem.head_dim_v, element)
        if element == "fp32":
            return AttentionConfig(element, *dims, *_TILES_FP32[dims], _BIAS)
        variant = _PLAIN if aligned else _UNALIGNED
        # A scale that is not positive would turn the order of the scores, on which the folded exponent relies.
        if problem.softcap or problem.alibi or problem.softmax_scale <= 0:
            variant = _SCORES
        if problem.bias_dtype is not None:
            variant = _BIAS
        return AttentionConfig(element, *dims, *_tile(arch, dims, variant), variant)

    def reasons(self, problem: AttentionProblem, config: AttentionConfig) -> list[str]:
        """Why `choose` took this configuration, in sentences."""
        why = [
            f"head dims {problem.head_dim}/{problem.head_dim_v} run in the compiled size "
            f"{config.head_dim}/{config.head_dim_v}, the smallest that holds them"
        ]
        if problem.head_dim_v > config.head_dim_v:
            why.append(f"head_dim_v is cut into blocks of {config.head_dim_v}, each with its own pass over the scores")
        if config.element == "fp32":
            why.append("fp32 runs as three tf32 products with one variant for all features")
        elif config.variant == _PLAIN:
            why.append("scores are only scaled and masked, so the scale folds into the exponent")
        elif config.variant == _UNALIGNED:
            why.append("rows do not start at multiples of 16 bytes, or lie 16 MiB apart: elements load one by one")
        elif config.variant == _SCORES:
            why.append("softcap, ALiBi or a scale <= 0 changes the scores")
        else:
            why.append("a bias is added to the scores")
        return why

    def source(self, config: AttentionConfig) -> str:
        """The translation unit of one configuration."""
        return source.render(
            self.header, config.struct, self.params, self.params_size, config.threads, config.min_blocks
        )

    def grid(self, problem: AttentionProblem, config: AttentionConfig) -> int:
        """Blocks of a launch."""
        m_blocks, v_blocks = _blocks(problem, config)
        return m_blocks * v_blocks * problem.heads_q * problem.batch

    def pack_tail(self, p: AttentionProblem, config: AttentionConfig, aligned: bool) -> bytes:
        """The bytes of Params behind the pointers: the same for every call with this problem."""
        m_blocks, v_blocks = _blocks(p, config)
        strides = {"q": p.q_strides, "k": p.k_strides, "v": p.v_strides, "out": p.out_strides}
        values: dict[str, float] = {
            **{f"{name}_stride_{axis}": n for name, of in strides.items() for axis, n in zip("bsh", of, strict=True)},
            **{f"bias_stride_{axis}": n for axis, n in zip("bhqk", p.bias_strides, strict=True)},
            "lse_stride_b": p.lse_strides[0],
            "lse_stride_h": p.lse_strides[1],
            "heads_q": p.heads_q,
            "heads_per_key": p.heads_q // max(p.heads_k, 1),
            "seqlen_q": p.seqlen_q,
            "seqlen_k": p.seqlen_k,
            "head_dim": p.head_dim,
            "head_dim_v": p.head_dim_v,
            "window_left": _window(p.window_left, p),
            "window_right": _window(p.window_right, p),
            "m_blocks": m_blocks,
            "v_blocks": v_blocks,
            "alibi_stride_b": p.alibi_stride_b,
            "bias_dtype": _code(p.bias_dtype),
            "sinks_dtype": _code(p.sinks_dtype),
            "aligned": int(aligned),
            "softmax_scale": p.softmax_scale,
            "softcap": p.softcap,
        }
        return _TAIL.pack(*[values[name] for name in _TAIL_FIELDS])


def rows_aligned(p: AttentionProblem) -> bool:
    """Whether strides keep every row of q, k, v, out at a multiple of 16 bytes, and tiles within 4 GiB."""
    size = ELEMENT_BYTES[p.dtype.cuda]
    queries, keys = (p.batch, p.total_q or p.seqlen_q, p.heads_q), (p.batch, p.total_k or p.seqlen_k, p.heads_k)
    for shape, strides in ((queries, p.q_strides), (keys, p.k_strides), (keys, p.v_strides), (queries, p.out_strides)):
        if any(n > 1 and stride * size % 16 for n, stride in zip(shape, strides, strict=True)):
            return False
        if shape[1] > 1 and not 0 <= strides[1] * size * 256 < 2**32:
            return False
    return True


def _tile(arch: str, dims: tuple[int, int], variant: str) -> tuple[int, int, int]:
    if variant == _UNALIGNED:  # the same key tiles as the aligned one, which makes the same bits; fewer registers
        return 64, _tile(arch, dims, _PLAIN)[1], 4
    return _TILES_ON.get((_SIBLINGS.get(arch, arch), dims, variant)) or _TILES[dims][variant]


def _compiled_dims(head_dim: int, head_dim_v: int, element: str) -> tuple[int, int]:
    """The smallest compiled size for a problem; values wider than it run in blocks."""
    if element == "fp32":
        return next((d, v) for d, v in _TILES_FP32 if head_dim <= d and min(head_dim_v, 128) <= v)
    if head_dim <= 64 and head_dim_v > 128:
        return 64, 256
    if 128 < head_dim <= 192 and head_dim_v <= 128:
        return 192, 128
    return next((d, v) for d, v in _TILES if d == v and head_dim <= d and min(head_dim_v, 256) <= v)


def _blocks(p: AttentionProblem, config: AttentionConfig) -> tuple[int, int]:
    """Tiles of queries, and of value columns."""
    return -(-p.seqlen_q // config.block_m), -(-p.head_dim_v // config.head_dim_v)


def _window(size: int, p: AttentionProblem) -> int:
    """A window that hides nothing is unlimited: row + window then stays far from 2**31."""
    return -1 if size >= p.seqlen_q + p.seqlen_k else size


def _code(dtype: DType | None) -> int:
    return 0 if dtype is None else dtype.code


KERNELS: dict[str, Kernel] = {kernel.name: kernel for kernel in (Kernel(),)}
