"""The Hopper kernels of attention's backward with a bias, as the host sees them. No GPU and no CuPy."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from flashmoe_cupy.dtypes import BOOL, FP32
from flashmoe_cupy.jit.device import H100, DeviceProperties
from flashmoe_cupy.jit.tensormap import TensorMap
from flashmoe_cupy.plan.archs import ELEMENT_BYTES
from flashmoe_cupy.plan.attention.backward_sm90 import AttentionBwdSm90
from flashmoe_cupy.plan.attention.backward_tiles import Bwd90Config, Tile
from flashmoe_cupy.plan.attention.backward_values import bias_tiles, bias_values, values_of
from flashmoe_cupy.plan.attention.bias_layout import rows_fit, with_rows
from flashmoe_cupy.plan.attention.choice import window
from flashmoe_cupy.plan.attention.forward import UNALIGNED_ROWS, array_map
from flashmoe_cupy.plan.attention.gradient import AttentionBwdProblem, GradientProblem
from flashmoe_cupy.plan.attention.problem import AttentionProblem
from flashmoe_cupy.plan.attention.tiles import BIAS16, BIAS32, BIASES, KEY_BIAS16, KEY_BIAS32, KEY_BIASES
from flashmoe_cupy.plan.kernel import DEFAULT_SMS, EMPTY, MAX_TILES, Kernel, far_strides
from flashmoe_cupy.plan.params import Params
from flashmoe_cupy.plan.step import Step, Values, same

_STORED_QUERIES = 16  # of a box of dbias: a warp's
VARIANTS = (*BIASES, *KEY_BIASES)
# By compiled head dims and variant: of dk and dv, and of dq. Others are at most 4 % faster (benchmarks/NOTEBOOK.md).
TILES: dict[tuple[int, int], dict[str, tuple[Tile, Tile]]] = {
    (64, 64): {
        BIAS16: ((128, 64, 4), (192, 64, 3)),
        BIAS32: ((128, 64, 3), (192, 64, 2)),
        KEY_BIAS16: ((128, 96, 3), (192, 64, 3)),
        KEY_BIAS32: ((128, 96, 3), (192, 64, 3)),
    },
    **{
        dims: {
            BIAS16: ((128, 64, 2), (128, 64, 2)),
            BIAS32: ((128, 64, 2), (128, 64, 2)),
            KEY_BIAS16: ((128, 64, 2), (128, 80, 2)),
            KEY_BIAS32: ((128, 64, 2), (128, 80, 2)),
        }
        for dims in ((96, 96), (128, 128))
    },
}  # fmt: skip


# Of the gradient of the bias: queries and keys of a tile, slots of the ring, tiles of the bias at once.
BiasTile = tuple[int, int, int, int]
TILES_DBIAS: dict[tuple[int, int], dict[str, BiasTile]] = {
    (64, 64): {
        BIAS16: (128, 128, 4, 2),
        BIAS32: (128, 128, 3, 2),
        **dict.fromkeys(KEY_BIASES, (128, 64, 6, 2)),
    },
    **{
        dims: {
            BIAS16: (128, 128, 3, 1),
            BIAS32: (128, 96, 3, 1),
            **dict.fromkeys(KEY_BIASES, (128, 64, 4, 2)),
        }
        for dims in ((96, 96), (128, 128))
    },
}  # fmt: skip


class BwdBias90Config(NamedTuple):
    """One specialisation of `AttentionBwdBiasSm90`; the fields are its template arguments, in their order."""

    element: str  # "bf16" or "fp16"
    head_dim: int  # compiled sizes: head dims up to these run, the rest of a row counts as zero
    head_dim_v: int
    rows: int  # queries of a tile of the bias: 64 for each consumer warpgroup
    cols: int  # keys of it
    slots: int  # of the ring: operands of a product
    biases: int  # tiles of the bias in shared memory
    variant: str  # what happens to the scores: a C++ struct of attention/variant.cuh

    @property
    def name(self) -> str:
        """For people: "bf16 d128 bias 128x128x3x1 BiasScores<2>"."""
        return f"{self.element} d{self.head_dim} bias {self.rows}x{self.cols}x{self.slots}x{self.biases} {self.variant}"

    @property
    def threads(self) -> int:
        """Threads of a block: the producer's warpgroup and the consumers'."""
        return 128 * (1 + self.rows // 64)

    @property
    def min_blocks(self) -> int:
        """Blocks per SM."""
        return 1

    @property
    def cluster(self) -> int:
        """Blocks of a cluster."""
        return 1

    @property
    def smem_bytes(self) -> int:
        """Dynamic shared memory of a block: the same arithmetic as `AttentionBwdBiasSm90::Smem`."""
        width = -(-max(self.head_dim, self.head_dim_v) // 64) * 64 * ELEMENT_BYTES[self.element]
        sums = 4 * self.rows // 16 * self.cols if self.variant in KEY_BIASES else 0
        bias = bias_bytes(self.variant, self.rows, self.cols, by_key=False)
        return self.slots * ((self.rows + self.cols) * width + 16) + self.biases * (bias + 16) + sums

    @property
    def struct(self) -> str:
        """The C++ type inside namespace fm."""
        return f"AttentionBwdBiasSm90<fm::{self.element}, {', '.join(map(str, self[1:-1]))}, fm::{self.variant}>"


class BwdBiased90Config(Bwd90Config):
    """A specialisation of `AttentionBwdSm90` with a bias."""

    __slots__ = ()

    @property
    def smem_bytes(self) -> int:
        """Dynamic shared memory of a block, with the bias of each step: a value for each pair, or for each key."""
        return super().smem_bytes + self.stages * bias_bytes(self.variant, self.rows, self.cols, self.part != "q")


def bias_bytes(variant: str, rows: int, cols: int, by_key: bool) -> int:
    """Of the traits in cuda_src/attention/bwd_bias_tiles_sm90.cuh."""
    size = 4 if variant in (BIAS32, KEY_BIAS32) else 2
    return -(-(rows if by_key else cols) * size // 128) * 128 if variant in KEY_BIASES else rows * cols * size


def variant_of_bias(p: AttentionProblem) -> str:
    """What a problem with a bias other than a boolean one takes: all queries have the same row, or each its own."""
    wide, by_query = p.bias_dtype is FP32, p.bias_strides[2] != 0
    return (BIAS32 if wide else BIAS16) if by_query else (KEY_BIAS32 if wide else KEY_BIAS16)


def dims_of(p: AttentionProblem) -> tuple[int, int] | None:
    """The smallest compiled head dims that hold those of a problem; None: there are none."""
    return next((d for d in TILES if p.head_dim <= d[0] and p.head_dim_v <= d[1]), None)


def why_not_biased(p: AttentionProblem, arch: str, aligned: bool) -> list[str]:
    """Why the Hopper kernels do not take a problem with a bias, as far as they have the same reasons."""
    if arch != "sm_90a":
        return ["no Hopper tensor cores: this kernel is for sm_90a"]
    why = []
    if p.bias_dtype is None:
        why.append("scores without a bias have a Hopper kernel of their own")
    if p.dtype.cuda not in ("bf16", "fp16"):
        why.append(f"{p.dtype} has no wgmma that is as exact as this library promises: bf16 and fp16 only")
    if not aligned:
        why.append(f"{UNALIGNED_ROWS}: the copy engine cannot fetch them")
    if p.bias_dtype is BOOL:
        why.append("boolean biases have no Hopper kernel of the backward")
    if p.softcap or p.alibi:
        why.append("softcap or ALiBi beside a bias has no Hopper kernel of the backward")
    if not p.even:
        why.append("sequences of different lengths have no Hopper kernel of the backward with a bias")
    if dims_of(p) is None:
        why.append(f"head dims beyond {[*TILES][-1][0]} have no Hopper kernel of the backward with a bias")
    if 0 in (p.batch, p.heads_q, p.heads_k, p.seqlen_q, p.seqlen_k):
        why.append(EMPTY)
    return why


def room_for_rows(p: AttentionProblem) -> dict[str, int]:
    """What these kernels add to the workspace whatever the address of the bias, the same on every device."""
    if p.bias_dtype is None or why_not_biased(p, "sm_90a", aligned=True) or rows_fit(p):
        return {}
    return {"bias_rows": with_rows(p)[1]}


def dbias_with_dq(of: AttentionBwdProblem) -> bool:
    """Whether the Hopper kernel of dq writes dbias, too: each score has a value of its own, and no mask hides any."""
    p = of.forward
    if not {"dq", "dbias"} <= {*of.wanted} or why_not_biased(p, "sm_90a", aligned=True):
        return False
    assert p.bias_dtype is not None
    own = of.bias_shape == (p.batch, p.heads_q, p.seqlen_q, p.seqlen_k) and variant_of_bias(p) in BIASES
    full = window(p.window_left, p) < 0 and window(p.window_right, p) < 0
    return own and full and p.seqlen_k * p.bias_dtype.itemsize % 16 == 0


def dbias_apart(step: Step) -> list[Step]:
    """A launch of dq without dbias, and the one that makes dbias."""
    alone = {name: array for name, array in step.arguments.items() if name != "dbias"}
    bias = Step("attention_bwd_bias", GradientProblem(step.problem.of, "bias"), step.arguments)
    return [Step(step.task, step.problem, alone, step.values, step.clears), bias]


def bias_map(p: AttentionProblem, variant: str, queries: int, keys: int) -> TensorMap:
    """Boxes of 128 bytes of keys and so many queries, or of so many keys of the row that all queries share."""
    assert p.bias_dtype is not None
    by_batch, by_head, by_query, _ = p.bias_strides
    outer = (p.seqlen_q, by_query), (p.heads_q, by_head), (p.batch, by_batch)
    if variant in KEY_BIASES:
        return array_map(p.bias_dtype, p.seqlen_k, outer, (keys, 1, 1, 1), swizzle=0)
    return array_map(p.bias_dtype, p.seqlen_k, outer, (128 // p.bias_dtype.itemsize, queries, 1, 1))


def with_bias_rows(step: Step, odd: Sequence[str]) -> tuple[list[Step], dict[str, int]]:
    """The step, behind one that writes the bias in rows that the copy engine can fetch, where it cannot."""
    of: AttentionBwdProblem = step.problem.of
    if rows_fit(of.forward) and step.arguments["bias"] not in odd:
        return [step], {}
    moved, size = with_rows(of.forward)
    rows = Step("attention_bias_rows", of.forward, {"bias": step.arguments["bias"]} | same("bias_rows"))
    problem = GradientProblem(of._replace(forward=moved), step.problem.part)
    arguments = step.arguments | {"bias": "bias_rows"}
    return [rows, Step(step.task, problem, arguments, step.values, step.clears)], {"bias_rows": size}


class AttentionBwdBiasedSm90(AttentionBwdSm90):
    """cuda_src/attention/bwd_sm90.cuh with a bias (bwd_bias_tiles_sm90.cuh): dk and dv, or dq."""

    name = "attention_bwd_biased_sm90"
    summary = "attention backward with a bias on TMA and wgmma: bf16 and fp16 on Hopper (sm_90a)"
    params = Params(AttentionBwdSm90.header, "AttentionBwdBiasedSm90Params")

    def configs(self, arch: str) -> list[Bwd90Config]:
        if arch != "sm_90a":
            return []
        return [
            _config(element, dims, part, variant)
            for element in ("bf16", "fp16")
            for variant in VARIANTS
            for dims in TILES
            for part in ("kv", "q")
        ]

    def why_not(self, problem: GradientProblem, arch: str, aligned: bool = True) -> list[str]:
        why = why_not_biased(problem.of.forward, arch, aligned)
        if not why and problem.part not in ("kv", "q"):
            why.append("beside a bias the Hopper kernels make dk and dv together only")
        if why:
            return why
        config = self.choose(problem, arch, aligned)
        tiles = self._tiles(problem, config)
        if tiles >= 2**31:
            why.append(f"{tiles} blocks of work: too much for one launch (2**31 - 1)")
        return why + far_strides(("q", "k", "v", "dout"), self.map_arguments(problem, config)[:4])

    def choose(
        self, problem: GradientProblem, arch: str, aligned: bool = True, device: DeviceProperties = H100  # noqa: ARG002
    ) -> Bwd90Config:  # fmt: skip
        p = problem.of.forward
        dims = dims_of(p)
        assert dims is not None
        return _config(problem.dtype.cuda, dims, problem.part, variant_of_bias(p))

    def before(self, step: Step, config: Bwd90Config, odd: Sequence[str]) -> tuple[list[Step], dict[str, int]]:  # noqa: ARG002
        return with_bias_rows(step, odd)

    def map_arguments(self, problem: GradientProblem, config: Bwd90Config) -> tuple[TensorMap, ...]:
        of, p = problem.of, problem.of.forward
        queries, keys = (64, config.cols) if problem.part == "q" else (config.cols, config.rows)
        maps = *super().map_arguments(problem, config), bias_map(p, config.variant, queries, keys)
        if problem.part != "q" or not dbias_with_dq(of):
            return maps
        steps = p.heads_q * p.seqlen_q * p.seqlen_k, p.seqlen_q * p.seqlen_k, p.seqlen_k, 1  # dbias is row-major
        return *maps, bias_map(p._replace(bias_strides=steps), config.variant, _STORED_QUERIES, keys)


def _config(element: str, dims: tuple[int, int], part: str, variant: str) -> BwdBiased90Config:
    return BwdBiased90Config(element, *dims, *TILES[dims][variant][part == "q"], part, variant)


class AttentionBwdBiasSm90(Kernel[GradientProblem, BwdBias90Config]):
    """cuda_src/attention/bwd_bias_sm90.cuh."""

    op, task, name = "attention_backward", "attention_bwd_bias", "attention_bwd_bias_sm90"
    header = "attention/bwd_bias_sm90.cuh"
    summary = "the gradient of attention's bias on TMA and wgmma: bf16 and fp16 on Hopper (sm_90a)"
    params = Params(header, "AttentionBwdBiasSm90Params")

    def configs(self, arch: str) -> list[BwdBias90Config]:
        if arch != "sm_90a":
            return []
        elements = "bf16", "fp16"
        return [_dbias(element, dims, variant) for element in elements for variant in VARIANTS for dims in TILES_DBIAS]

    def why_not(self, problem: GradientProblem, arch: str, aligned: bool = True) -> list[str]:
        why = why_not_biased(problem.of.forward, arch, aligned)
        if why:
            return why
        config = self.choose(problem, arch, aligned)
        tiles = bias_tiles(problem.of, config.rows, config.cols)
        if tiles >= MAX_TILES:
            why.append(f"{tiles} tiles of work: the kernel counts them in 32 bits")
        return why + far_strides(("q", "k", "v", "dout"), self.map_arguments(problem, config)[:4])

    def choose(
        self, problem: GradientProblem, arch: str, aligned: bool = True, device: DeviceProperties = H100  # noqa: ARG002
    ) -> BwdBias90Config:  # fmt: skip
        p = problem.of.forward
        dims = dims_of(p)
        assert dims is not None
        return _dbias(problem.dtype.cuda, dims, variant_of_bias(p))

    def grid(self, problem: GradientProblem, config: BwdBias90Config, sms: int = DEFAULT_SMS) -> int:
        return min(bias_tiles(problem.of, config.rows, config.cols), sms)

    def values(
        self, problem: GradientProblem, config: BwdBias90Config, aligned: bool, sms: int = DEFAULT_SMS  # noqa: ARG002
    ) -> Values:  # fmt: skip
        return values_of(problem, _like(config), aligned) | bias_values(problem.of, config.rows, config.cols)

    def before(
        self, step: Step, config: BwdBias90Config, odd: Sequence[str]  # noqa: ARG002
    ) -> tuple[list[Step], dict[str, int]]:  # fmt: skip
        return with_bias_rows(step, odd)

    def map_arguments(self, problem: GradientProblem, config: BwdBias90Config) -> tuple[TensorMap, ...]:
        queries = GradientProblem(problem.of, "q")  # their rows lie as those of dq
        return _BIASED.map_arguments(queries, _like(config))[: len(self.params.maps)]


_BIASED = AttentionBwdBiasedSm90()


def _dbias(element: str, dims: tuple[int, int], variant: str) -> BwdBias90Config:
    return BwdBias90Config(element, *dims, *TILES_DBIAS[dims][variant], variant)


def _like(config: BwdBias90Config) -> BwdBiased90Config:
    """The configuration for dq that has the same tiles."""
    return BwdBiased90Config(*config[:5], 1, "q", config.variant)
