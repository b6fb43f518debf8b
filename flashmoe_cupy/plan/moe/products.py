"""Grouped matrix products as the host sees them: problems, configurations, and how Params are packed. No GPU, no CuPy.

A product is one launch of cuda_src/moe/grouped_gemm_*.cuh: `grouped_gemm` is one, `fused_moe` is two or four.
"""

from __future__ import annotations

from typing import NamedTuple

from flashmoe_cupy.dtypes import DType
from flashmoe_cupy.jit.tensormap import TensorMap
from flashmoe_cupy.plan.archs import ELEMENT_BYTES, MAX_SMEM
from flashmoe_cupy.plan.kernel import DEFAULT_SMS, EMPTY, Kernel, Values
from flashmoe_cupy.plan.moe.routing import PermuteProblem
from flashmoe_cupy.plan.params import Params

_SORTED_BYTES = 128  # the order of few assignments, as a warp has found it
_MOST = 2**31 - 2**16  # tiles: a block counts up to one grid beyond the last
_ACTIVATIONS = (
    "", "swiglu", "geglu", "geglu_tanh", "swigluoai", "gelu", "gelu_tanh", "relu", "relu2",
)  # fmt: skip


class Product(NamedTuple):
    """out[r] = act(x[row(r)] @ w[e].T * weight + bias[e]). Strides count elements; `expected` rows of a group."""

    dtype: DType
    groups: int
    rows: int  # of out, of all groups
    rows_x: int
    max_rows: int  # of a group, where groups lie at even distances
    k: int
    n: int  # columns of out
    activation: str  # "": none
    gated: bool  # w has two rows for each column of out
    gather: bool
    gather_divisor: int
    x_stride: int
    w_strides: tuple[int, int]  # (group, row): from column to column of out
    w_stride_half: int  # from gate to up
    out_stride: int
    bias_dtype: DType | None
    bias_strides: tuple[int, int, int]  # (group, column, half)
    row_weights_dtype: DType | None
    row_weights_stride: int
    alpha: float
    limit: float
    group_stride: int  # rows from group to group, in out
    x_skip: int  # how many more they are in x
    expected: float  # rows of a group, on average
    fixed: bool  # one configuration, whatever the rows
    early: bool = False  # the groups are known before the launch that makes x has ended
    few: PermuteProblem | None = None  # the ids in which the product finds groups and gathered rows by itself
    counters: bool = False  # there are some, that are 0 before the first of two products runs
    announced: int = 0  # how often the first of two products counts a row, if the second waits for that

    @property
    def clamped(self) -> bool:
        """Whether it has a kernel of its own, for swiglu within the limit."""
        return self.activation == "swiglu" and self.limit > 0.0

    @property
    def rows_aligned(self) -> bool:
        """Whether strides keep every row of x, w and out at a multiple of 16 bytes."""
        size, halves = self.dtype.itemsize, 2 if self.gated else 1
        (w_e, w_n), w_half = self.w_strides, self.w_stride_half
        rows = (self.rows_x, self.x_stride), (self.rows, self.out_stride)
        steps = (*rows, (self.groups, w_e), (self.n, w_n), (halves, w_half))
        return not any(n > 1 and stride * size % 16 for n, stride in steps)

    def describe(self) -> str:
        """One line, for example "product bf16 e128 rows131072 n1536 k2048 swiglu gather"."""
        words = ["product", self.dtype.cuda, f"e{self.groups}", f"rows{self.rows}", f"n{self.n}", f"k{self.k}"]
        return " ".join(words + [self.activation] * bool(self.activation) + ["gather"] * self.gather)


class GemmSm80Config(NamedTuple):
    """One specialisation of `GroupedGemmSm80`; the fields are its template arguments, in their order."""

    element: str
    block_m: int
    block_n: int  # rows of w; half as many columns of out when gated
    stages: int
    gated: bool
    clamped: bool = False  # the activation is swiglu with a limit, and no other

    @property
    def name(self) -> str:
        """For people: "bf16 64x128x3 gated"."""
        return f"{self.element} {self.block_m}x{self.block_n}x{self.stages}{_words(self.gated, self.clamped)}"

    @property
    def threads(self) -> int:
        """Threads of a block."""
        return 128

    @property
    def min_blocks(self) -> int:
        """Blocks per SM that the compiler must leave registers for."""
        return 2

    @property
    def cluster(self) -> int:
        """Blocks of a cluster."""
        return 1

    @property
    def smem_bytes(self) -> int:
        """Dynamic shared memory of a block: the same arithmetic as `GroupedGemmSm80::Smem`."""
        columns = self.block_n // 2 if self.gated else self.block_n
        ring = self.stages * 128 * (self.block_m + self.block_n)
        return max(ring, self.block_m * columns * ELEMENT_BYTES[self.element]) + 4 * _SORTED_BYTES

    @property
    def struct(self) -> str:
        """The C++ type inside namespace fm."""
        return f"GroupedGemmSm80<fm::{self.element}, {self.block_m}, {self.block_n}, {self.stages}, {_cpp(self.gated)}>"


class GemmSm90Config(NamedTuple):
    """One specialisation of `GroupedGemmSm90`; the fields are its template arguments, in their order."""

    element: str
    block_m: int
    block_n: int
    block_k: int
    stages: int
    cluster: int
    ping_pong: bool  # the consumer warpgroups take tiles in turn; else they share one, 64 rows each
    gather: bool
    gated: bool
    clamped: bool = False  # the activation is swiglu with a limit, and no other

    @property
    def name(self) -> str:
        """For people: "bf16 128x256x64x4 cluster2 gather gated"."""
        words = [self.element, f"{self.block_m}x{self.block_n}x{self.block_k}x{self.stages}"]
        words += [f"cluster{self.cluster}"] * (self.cluster > 1) + ["pingpong"] * self.ping_pong
        return " ".join(words + ["gather"] * self.gather) + _words(self.gated, self.clamped)

    @property
    def consumers(self) -> int:
        """Warpgroups that multiply."""
        return 2 if self.ping_pong else self.block_m // 64

    @property
    def threads(self) -> int:
        """Threads of a block: the producers' warpgroup and the consumers'."""
        return 128 * (1 + self.consumers)

    @property
    def min_blocks(self) -> int:
        """Blocks per SM: as many as its shared memory holds, two at most; with two consumers one, for its registers."""
        return 2 if self.consumers == 1 and 2 * (self.smem_bytes + 1024) <= 228 * 1024 else 1  # the driver takes 1 KiB

    @property
    def smem_bytes(self) -> int:
        """Dynamic shared memory of a block: the same arithmetic as `GroupedGemmSm90::Smem`."""
        works, work_bytes, barriers, dealt = 4, 32, 16, 32  # tiles ahead, their records, two barriers of each buffer
        ring = self.stages * self.block_k * 2 * (self.block_m + self.block_n)
        ring += self.consumers * 4 * 4096 + works * work_bytes + _SORTED_BYTES
        return ring + barriers * (self.stages + works) + dealt

    @property
    def struct(self) -> str:
        """The C++ type inside namespace fm."""
        sizes = f"{self.block_m}, {self.block_n}, {self.block_k}, {self.stages}, {self.cluster}"
        flags = ", ".join(map(_cpp, (self.ping_pong, self.gather, self.gated)))
        return f"GroupedGemmSm90<fm::{self.element}, {sizes}, {flags}>"


GemmConfig = GemmSm80Config | GemmSm90Config
_KINDS = ((False, False), (True, False), (True, True))  # (gated, clamped)


def _words(gated: bool, clamped: bool) -> str:
    return " gated" * gated + " clamped" * clamped


def _cpp(flag: bool) -> str:
    return "true" if flag else "false"


class GroupedGemm(Kernel[Product, GemmConfig]):
    """What the kernels share."""

    op = "moe"
    task = "grouped_gemm"
    waits = True

    def params_of(self, config: GemmConfig) -> str:
        return f"Clamped<fm::{self.params.name}>" if config.clamped else self.params.name

    def reasons(self, problem: Product, config: GemmConfig) -> list[str]:  # noqa: ARG002
        if problem.fixed:
            why = ["batch_invariant: one configuration for any number of tokens"]
        else:
            experts = f" for each of {problem.groups} experts on average" if problem.groups > 1 else ""
            why = [f"{problem.expected:.4g} rows{experts}"]
        if problem.few is not None:
            why.append("so few assignments that every block finds their order by itself: nothing is permuted before")
        return why

    def tiles(self, p: Product, config: GemmConfig) -> int:
        """At most so many tiles, or pairs of them in a cluster; only the device knows how many."""
        rows, columns = config.block_m * config.cluster, n_blocks(p, config)
        if self.shares_rows(p, config):
            rows, columns = config.block_m, columns // config.cluster
        groups = min(p.groups, p.rows)
        m_blocks = (p.rows - groups) // rows + groups if p.group_stride == 0 else p.groups * -(-p.max_rows // rows)
        return m_blocks * columns

    def shares_rows(self, p: Product, config: GemmConfig) -> bool:  # noqa: ARG002
        """Whether the blocks of a cluster have the same rows, and share them instead of weights."""
        return False

    def announces(self, p: Product, config: GemmConfig) -> int:  # noqa: ARG002
        """How often the kernel counts a row of a group, for the next one to wait for; 0: it cannot."""
        return 0

    def awaits(self, p: Product, config: GemmConfig) -> bool:  # noqa: ARG002
        """Whether the kernel should begin with groups whose rows are counted, while others of x are not yet written."""
        return False

    def grid(self, p: Product, config: GemmConfig, sms: int = DEFAULT_SMS) -> int:
        """Each block takes tile after tile."""
        return config.cluster * max(1, min(sms * config.min_blocks // config.cluster, self.tiles(p, config)))

    def deals(self, p: Product, config: GemmConfig) -> bool:  # noqa: ARG002
        """Whether blocks take the next tile when they are free, instead of every so many-th."""
        return False

    def values(self, p: Product, config: GemmConfig, aligned: bool, sms: int = DEFAULT_SMS) -> Values:  # noqa: ARG002
        across, ids = self.shares_rows(p, config), p.few
        awaited = p.announced if p.early else -1 if p.announced else 0
        dealt = (2 if p.early else 1) if p.counters and self.deals(p, config) else 0
        return {
            "x_stride": p.x_stride,
            **dict(zip(("w_stride_e", "w_stride_n"), p.w_strides, strict=True)),
            "w_stride_half": p.w_stride_half,
            "out_stride": p.out_stride,
            **dict(zip(("bias_stride_e", "bias_stride_n", "bias_stride_half"), p.bias_strides, strict=True)),
            "row_weights_stride_t": p.row_weights_stride,
            "row_weights_stride_k": 1,
            "ids_stride": 0 if ids is None else ids.ids_stride,
            "groups": p.groups,
            "max_rows": p.max_rows,
            "rows_x": p.rows_x,
            "rows": p.rows,
            "k": p.k,
            "n": p.n,
            "n_blocks": n_blocks(p, config),
            "gather_divisor": p.gather_divisor,
            "activation": _ACTIVATIONS.index(p.activation),
            "bias_dtype": _code(p.bias_dtype),
            "row_weights_dtype": _code(p.row_weights_dtype),
            "aligned": int(aligned),
            "alpha": p.alpha,
            "limit": p.limit,
            "section": max(1, 16 * 128 // (config.block_m * (1 if across else config.cluster))),
            "group_stride": p.group_stride,
            "x_skip": p.x_skip,
            "assignments": 0 if ids is None else ids.tokens * ids.top_k,
            "top_k": 1 if ids is None else ids.top_k,
            "ids": 0 if ids is None else ids.ids,
            "ids_wide": 0 if ids is None else int(ids.ids_dtype.itemsize == 8),
            "early": int(p.early),
            "guess": _guess(p, config),
            "across": int(across),
            "awaited": awaited,
            "dealt": dealt,
        }


def _guess(p: Product, config: GemmConfig) -> int:
    """So many elements of a row of weights may be fetched before the kernel knows the groups: if most have one tile."""
    most = config.block_m * config.cluster * 0.75
    if p.early or p.few is not None or config.block_n > 128 or not 1 <= p.expected <= most:
        return 0
    return 256  # 8.6 MB in all; benchmarks/NOTEBOOK.md


def _code(dtype: DType | None) -> int:
    return 0 if dtype is None else dtype.code


def n_blocks(p: Product, config: GemmConfig) -> int:
    """Tiles along the columns of out."""
    return -(-p.n // (config.block_n // 2 if config.gated else config.block_n))


class GroupedGemmSm80(GroupedGemm):
    """cuda_src/moe/grouped_gemm_sm80.cuh, which runs every product."""

    name = "grouped_gemm_sm80"
    header = "moe/grouped_gemm_sm80.cuh"
    summary = "grouped products on cp.async, ldmatrix and mma.sync: every GPU from sm_80 on"
    params = Params(header, "GroupedGemmParams")

    # (block_m, block_n, stages): for many rows of a group to few; not yet measured
    tiles_16 = ((128, 128, 3), (64, 128, 3), (16, 128, 4))
    tiles_fp32 = ((64, 64, 3), (16, 128, 3))

    def configs(self, arch: str) -> list[GemmSm80Config]:  # noqa: ARG002
        return [
            GemmSm80Config(element, *tile, *kind)
            for element in ("bf16", "fp16", "fp32")
            for tile in (self.tiles_fp32 if element == "fp32" else self.tiles_16)
            for kind in _KINDS
        ]

    def why_not(self, product: Product, arch: str, aligned: bool = True) -> list[str]:
        if arch not in MAX_SMEM:
            return [f"{arch} is not supported: this kernel needs compute capability 8.0 or newer"]
        tiles = self.tiles(product, self.choose(product, arch, aligned))
        return [f"{tiles} tiles of work: the kernel counts them in 32 bits"] if tiles >= _MOST else []

    def choose(
        self, product: Product, arch: str, aligned: bool = True, sms: int = DEFAULT_SMS  # noqa: ARG002
    ) -> GemmSm80Config:  # fmt: skip
        element = product.dtype.cuda
        tiles = self.tiles_fp32 if element == "fp32" else self.tiles_16
        rows = 64 if product.fixed else product.expected
        fitting = [tile for tile in tiles if tile[0] <= max(rows * 1.5, 16)]
        return GemmSm80Config(element, *fitting[0], product.gated, product.clamped)


class GroupedGemmSm90(GroupedGemm):
    """cuda_src/moe/grouped_gemm_sm90.cuh: faster, for 16-bit rows that the copy engine can fetch."""

    name = "grouped_gemm_sm90"
    header = "moe/grouped_gemm_sm90.cuh"
    summary = "grouped products on TMA and wgmma with persistent blocks: bf16 and fp16 on Hopper (sm_90a)"
    params = Params(header, "GroupedGemmSm90Params")

    # (block_m, block_n, block_k, stages, cluster, ping_pong), by rows of a group on average: few, whose weights travel
    # once; up to two tiles of 64, which share their weights; one or two of 128, one consumer for each; many.
    slim, pair = (64, 128, 128, 4, 1, False), (64, 128, 128, 4, 2, False)
    turns, wide = (128, 128, 64, 6, 2, True), (128, 256, 64, 4, 2, False)
    slim_rows, pair_rows, turns_rows = 32, 96, 144
    # And where rows lie in order and w has one row for a column: so few tiles that slim ones leave half of the SMs
    # without work; many rows and few steps along k, where consumers in turn hide the output.
    thin, plain = (64, 64, 128, 6, 1, False), (128, 192, 64, 4, 2, True)
    plain_rows, plain_k, across_k, awaited_groups = 384, 1024, 256, 32  # benchmarks/NOTEBOOK.md has what was measured

    def configs(self, arch: str) -> list[GemmSm90Config]:
        if arch != "sm_90a":
            return []
        return [
            GemmSm90Config(element, *tile, gather, *kind)
            for element in ("bf16", "fp16")
            for tile in (self.slim, self.pair, self.turns, self.wide)
            for gather in (False, True)
            for kind in _KINDS
        ] + [GemmSm90Config(e, *tile, False, False) for e in ("bf16", "fp16") for tile in (self.thin, self.plain)]

    def why_not(self, product: Product, arch: str, aligned: bool = True) -> list[str]:
        p = product
        if arch != "sm_90a":
            return ["no Hopper tensor cores: this kernel is for sm_90a"]
        why = []
        if p.dtype.cuda not in ("bf16", "fp16"):
            why.append(f"{p.dtype} has no wgmma that is as exact as this library promises: bf16 and fp16 only")
        if not aligned:
            why.append("rows of x, w or out do not start at multiples of 16 bytes: the copy engine cannot fetch them")
        if 0 in (p.rows, p.rows_x, p.groups, p.k, p.n):
            why.append(EMPTY)
        if why:
            return why
        for name, of in zip(("x", "w", "out"), self.map_arguments(p, self.choose(p, arch)), strict=True):
            if min(of.strides) < 0 or max(of.strides) >= 2**40:
                why.append(f"{name} has a stride that is negative, or 1 TiB or more: the copy engine cannot follow it")
        if not 0 <= p.x_stride < 2**31:
            why.append("rows of x lie more than 4 GiB apart")
        elif p.gather and p.rows_x * p.x_stride // 8 >= 2**32:
            why.append("x reaches over 64 GiB: rows to gather are counted in units of 16 bytes, in 32 bits")
        tiles = self.tiles(p, self.choose(p, arch))
        if tiles >= _MOST:
            why.append(f"{tiles} tiles of work: the kernel counts them in 32 bits")
        return why

    def choose(
        self, product: Product, arch: str, aligned: bool = True, sms: int = DEFAULT_SMS  # noqa: ARG002
    ) -> GemmSm90Config:  # fmt: skip
        p = product
        simple = not p.gather and not p.gated
        if p.fixed or p.expected > self.turns_rows:
            many = not p.fixed and p.expected >= self.plain_rows and p.k <= self.plain_k
            tile = self.plain if many and simple else self.wide
        elif p.expected > self.slim_rows:
            tile = self.pair if p.expected <= self.pair_rows else self.turns
        else:
            few = 2 * self.tiles(p, GemmSm90Config(p.dtype.cuda, *self.slim, p.gather, p.gated)) <= sms
            tile = self.thin if few and simple else self.slim
        return GemmSm90Config(p.dtype.cuda, *tile, p.gather, p.gated, p.clamped)

    def shares_rows(self, p: Product, config: GemmConfig) -> bool:
        """With few steps along k: no tile of rows is left over then, and that is a larger part of the work."""
        plain = config.name == GemmSm90Config(p.dtype.cuda, *self.plain, False, False).name
        return plain and p.k <= self.across_k and n_blocks(p, config) % config.cluster == 0

    def announces(self, p: Product, config: GemmConfig) -> int:
        return n_blocks(p, config)

    def awaits(self, p: Product, config: GemmConfig) -> bool:  # noqa: ARG002
        """Where there are enough groups that most are complete when the first blocks become free."""
        return p.early and p.few is None and p.groups >= self.awaited_groups

    def deals(self, p: Product, config: GemmConfig) -> bool:  # noqa: ARG002
        """Where a block has so many tiles that the last ones would not end together."""
        return config.cluster > 1

    def map_arguments(self, p: Product, config: GemmConfig) -> tuple[TensorMap, ...]:
        size = p.dtype.itemsize

        def stride(n: int, elements: int) -> int:  # of a dimension of 1 any would do
            return elements * size if n > 1 else 16

        w_e, w_n = p.w_strides
        halves = 2 if p.gated else 1
        w = (stride(halves, p.w_stride_half), stride(p.n, w_n), stride(p.groups, w_e))
        out = (16, stride(p.rows, p.out_stride), 16)
        promotion = 128 if config.block_n > 128 else 256  # few rows: weights come from memory, in longer pieces
        box = config.block_m // (config.cluster if self.shares_rows(p, config) else 1)
        return (
            TensorMap(p.dtype, (p.k, p.rows_x), (stride(p.rows_x, p.x_stride),), (64, box)),
            TensorMap(p.dtype, (p.k, halves, p.n, p.groups), w, (64, 1, config.block_n // 2, 1), promotion),
            TensorMap(p.dtype, (p.n, 1, p.rows, 1), out, (64, 1, 16, 1)),
        )
