"""Grouped matrix products as the host sees them: what a product is, which kernel runs it, what Params hold. No GPU.

A product is one launch of cuda_src/moe/grouped_gemm_*.cuh: `grouped_gemm` is one, `fused_moe` is two or four.
"""

from __future__ import annotations

from enum import IntEnum
from typing import NamedTuple

from flashmoe_cupy.dtypes import DType
from flashmoe_cupy.jit.device import H100, DeviceProperties
from flashmoe_cupy.jit.tensormap import TensorMap
from flashmoe_cupy.plan.archs import MAX_SMEM
from flashmoe_cupy.plan.checks import ACTIVATIONS
from flashmoe_cupy.plan.kernel import DEFAULT_SMS, EMPTY, MAX_TILES, Kernel, far_strides
from flashmoe_cupy.plan.moe.few_rows import (
    COUNTED,
    NO_WEIGHTS,
    NextWeights,
    all_tiles,
    eight_rows,
    next_weights,
    reason,
    tiles_for,
)
from flashmoe_cupy.plan.moe.routing import PermuteProblem
from flashmoe_cupy.plan.moe.tiles import (
    TILE_64X128_PAIR,
    TILE_128X128_PING_PONG,
    TILE_128X192_PING_PONG,
    TILE_128X256,
    TILES_SM80,
    TILES_SM80_FP32,
    GemmConfig,
    GemmSm80Config,
    GemmSm90Config,
    TileSm90,
)
from flashmoe_cupy.plan.params import Params
from flashmoe_cupy.plan.step import Values

_CODES = ("", *ACTIVATIONS)  # in the order of enum Activation of moe/params.cuh
_KINDS = ((False, False), (True, False), (True, True))  # (gated, clamped) of the configurations


class Rows(NamedTuple):
    """x or out, which products read and write by rows. Strides count elements."""

    rows: int  # of all groups
    stride: int  # from row to row
    group_stride: int = 0  # rows from group to group, at even distances; 0: offsets say where each group begins


class Weights(NamedTuple):
    """w: for each column of out one row, or two when gated. Strides count elements."""

    group_stride: int
    column_stride: int  # from a column's row to that of the next column
    half_stride: int = 0  # from a column's gate row to its up row; 0: not gated


class Bias(NamedTuple):
    """What is added before the activation, laid out like rows of w. Strides count elements."""

    dtype: DType | None = None  # None: there is no bias
    group_stride: int = 0
    column_stride: int = 0
    half_stride: int = 0


class RowWeights(NamedTuple):
    """A factor for each row before the bias, found by the row's gather index."""

    dtype: DType | None = None  # None: there are none
    token_stride: int = 0  # elements


class Activation(NamedTuple):
    """What the products' sums go through."""

    name: str = ""  # as in `fused_moe`; "": nothing
    gated: bool = False  # it makes one value of a gate and an up
    alpha: float = 0.0  # of swigluoai; else 0
    limit: float = 0.0  # of swigluoai, and of swiglu where it clamps; else 0


class TileCounter(IntEnum):
    """Which of an operation's two counters the blocks of a product take tiles from. No two products share one."""

    NONE = 0
    FIRST = 1
    SECOND = 2


class Product(NamedTuple):
    """out[r] = act(x[row(r)] @ w[e].T * weight + bias[e]), where row r belongs to group (expert) e."""

    dtype: DType
    groups: int
    k: int  # columns of x and w: what is summed over
    n: int  # columns of out
    x: Rows
    w: Weights
    out: Rows
    mean_rows: float  # rows of a group on average: by these a configuration is chosen
    max_rows: int = 0  # rows that a group has at most, where groups lie at even distances; else 0
    bias: Bias = Bias()
    activation: Activation = Activation()
    row_weights: RowWeights = RowWeights()
    gather: bool = False  # row r of out reads row gather_indices[r] / gather_divisor of x; else row r
    gather_divisor: int = 1
    batch_invariant: bool = False  # one configuration, whatever mean_rows is
    groups_known_early: bool = False  # the launch in front makes x alone; what rows groups have is known before its end
    self_sorted: PermuteProblem | None = None  # ids in which the product finds its groups by itself; None: by offsets
    tile_counter: TileCounter = TileCounter.NONE
    next_weights: NextWeights = NO_WEIGHTS
    counts_rows: bool = False  # it counts, by groups, the rows of out that it has written
    counts_of_x: int = 0  # times that the launch in front counts a row of x; 0: wait for its end instead of the counts

    @property
    def gated(self) -> bool:
        """Whether w has two rows for each column of out."""
        return self.activation.gated

    @property
    def clamped(self) -> bool:
        """Whether it has a kernel of its own, for swiglu within the limit."""
        return self.activation.name == "swiglu" and self.activation.limit > 0.0

    @property
    def rows_aligned(self) -> bool:
        """Whether strides keep every row of x, w and out at a multiple of 16 bytes."""
        size, halves = self.dtype.itemsize, 2 if self.gated else 1
        x, out, w = self.x, self.out, self.w
        strides = (
            (x.rows, x.stride), (out.rows, out.stride), (self.groups, w.group_stride), (self.n, w.column_stride),
            (halves, w.half_stride),
        )  # fmt: skip
        return not any(n > 1 and stride * size % 16 for n, stride in strides)

    def describe(self) -> str:
        """One line, for example "product bf16 e128 rows131072 n1536 k2048 swiglu gather"."""
        words = ["product", self.dtype.cuda, f"e{self.groups}", f"rows{self.out.rows}", f"n{self.n}", f"k{self.k}"]
        return " ".join(words + [self.activation.name] * bool(self.activation.name) + ["gather"] * self.gather)


# How much of the weights one step of the order of tiles keeps in L2: so many rows of out take each tile of w together.
_SECTION_ROWS = 16 * 128
# With so large a share of a tile's rows on average, most groups have one tile, and its weights may be fetched early.
_ONE_TILE = 0.75
_PREFETCH_K = 256  # columns of w that are: 8.6 MB for all blocks; benchmarks/NOTEBOOK.md, measured on an H100


class GroupedGemm(Kernel[Product, GemmConfig]):
    """What the kernels share."""

    op = "moe"
    task = "grouped_gemm"
    waits = True

    def params_of(self, config: GemmConfig) -> str:
        return f"Clamped<fm::{self.params.name}>" if config.clamped else self.params.name

    def reasons(self, problem: Product, config: GemmConfig, device: DeviceProperties = H100) -> list[str]:  # noqa: ARG002
        if problem.batch_invariant:
            why = ["batch_invariant: one configuration for any number of tokens"]
        else:
            experts = f" for each of {problem.groups} experts on average" if problem.groups > 1 else ""
            why = [f"{problem.mean_rows:.4g} rows{experts}"]
        if problem.self_sorted is not None:
            why.append("so few assignments that every block finds their order by itself: nothing is permuted before")
        return why

    def tiles(self, p: Product, config: GemmConfig) -> int:
        """At most so many tiles, or pairs of them in a cluster; only the device knows how many."""
        rows, columns = config.block_m * config.cluster, n_blocks(p, config)
        if self.shares_rows(p, config):
            rows, columns = config.block_m, columns // config.cluster
        if p.out.group_stride:
            return p.groups * -(-p.max_rows // rows) * columns
        groups = min(p.groups, p.out.rows)
        return ((p.out.rows - groups) // rows + groups) * columns

    def shares_rows(self, p: Product, config: GemmConfig) -> bool:  # noqa: ARG002
        """Whether the blocks of a cluster have the same rows, and share them instead of weights."""
        return False

    def counts_per_row(self, p: Product, config: GemmConfig) -> int:  # noqa: ARG002
        """How often the kernel can count a row that it has written, for the launch behind it; 0: it cannot count."""
        return 0

    def waits_for_counts(self, p: Product, config: GemmConfig) -> bool:  # noqa: ARG002
        """Whether the kernel should begin with groups whose rows are counted, while others of x are not yet written."""
        return False

    def next_weights(
        self, p: Product, config: GemmConfig, behind: Product, its_config: GemmConfig, sms: int  # noqa: ARG002
    ) -> NextWeights | None:  # fmt: skip
        """Weights of the product behind it that it should ask L2 for; None: it should not."""
        return None

    def grid(self, p: Product, config: GemmConfig, sms: int = DEFAULT_SMS) -> int:
        """Each block takes tile after tile."""
        return config.cluster * max(1, min(sms * config.blocks_per_sm // config.cluster, self.tiles(p, config)))

    def takes_from_counter(self, p: Product, config: GemmConfig) -> bool:  # noqa: ARG002
        """Whether a block takes its next tile from a counter when it is free; else every so many-th tile is its own."""
        return False

    def values(self, p: Product, config: GemmConfig, aligned: bool, sms: int = DEFAULT_SMS) -> Values:  # noqa: ARG002
        share_rows, ids, counter = self.shares_rows(p, config), p.self_sorted, p.tile_counter
        return {
            "x_stride": p.x.stride,
            "w_stride_e": p.w.group_stride,
            "w_stride_n": p.w.column_stride,
            "w_stride_half": p.w.half_stride,
            "out_stride": p.out.stride,
            "bias_stride_e": p.bias.group_stride,
            "bias_stride_n": p.bias.column_stride,
            "bias_stride_half": p.bias.half_stride,
            "row_weights_stride_t": p.row_weights.token_stride,
            "row_weights_stride_k": 1,
            "ids_stride": 0 if ids is None else ids.ids_stride,
            "groups": p.groups,
            "max_rows": p.max_rows,
            "rows_x": p.x.rows,
            "rows": p.out.rows,
            "k": p.k,
            "n": p.n,
            "n_blocks": n_blocks(p, config),
            "gather_divisor": p.gather_divisor,
            "activation": _CODES.index(p.activation.name),
            "bias_dtype": _code(p.bias.dtype),
            "row_weights_dtype": _code(p.row_weights.dtype),
            "aligned": int(aligned),
            "alpha": p.activation.alpha,
            "limit": p.activation.limit,
            "section": max(1, _SECTION_ROWS // (config.block_m * (1 if share_rows else config.cluster))),
            "group_stride": p.out.group_stride,
            "x_skip": p.x.group_stride - p.out.group_stride,
            "assignments": 0 if ids is None else ids.tokens * ids.top_k,
            "top_k": 1 if ids is None else ids.top_k,
            "ids": 0 if ids is None else ids.ids,
            "ids_wide": 0 if ids is None else int(ids.ids_dtype.itemsize == 8),
            "groups_known_early": int(p.groups_known_early),
            "prefetch_k": _prefetch_k(p, config),
            "share_rows": int(share_rows),
            "gathers": int(p.gather),
            **{f"next_{name}": value for name, value in p.next_weights._asdict().items()},
            "rows_counted": -1 if p.counts_rows else p.counts_of_x,
            "tile_counter": int(counter) if self.takes_from_counter(p, config) else 0,
        }


def _prefetch_k(p: Product, config: GemmConfig) -> int:
    """Columns of w that go to L2 before the kernel knows the groups: where most have one tile, whose weights are known.

    0: none, for the groups are known early, or w comes in longer pieces.
    """
    most = config.block_m * config.cluster * _ONE_TILE
    known = p.groups_known_early or p.self_sorted is not None
    return _PREFETCH_K if not known and config.block_n <= 128 and 1 <= p.mean_rows <= most else 0


def _code(dtype: DType | None) -> int:
    return 0 if dtype is None else dtype.code


def n_blocks(p: Product, config: GemmConfig) -> int:
    """Tiles along the columns of out."""
    return -(-p.n // (config.block_n // 2 if config.gated else config.block_n))


def _too_many(count: int) -> list[str]:
    return [f"{count} tiles of work: the kernel counts them in 32 bits"] if count >= MAX_TILES else []


class GroupedGemmSm80(GroupedGemm):
    """cuda_src/moe/grouped_gemm_sm80.cuh, which runs every product."""

    name = "grouped_gemm_sm80"
    header = "moe/grouped_gemm_sm80.cuh"
    summary = "grouped products on cp.async, ldmatrix and mma.sync: every GPU from sm_80 on"
    params = Params(header, "GroupedGemmParams")

    # A tile may have half as many rows again as a group has on average, but never more: not yet measured.
    fullest = 1.5
    batch_invariant_rows = 64  # mean_rows, where the configuration must not depend on it

    def configs(self, arch: str) -> list[GemmSm80Config]:  # noqa: ARG002
        return [
            GemmSm80Config(element, *tile, *kind)
            for element in ("bf16", "fp16", "fp32")
            for tile in _tiles_sm80(element)
            for kind in _KINDS
        ]

    def why_not(self, product: Product, arch: str, aligned: bool = True) -> list[str]:
        if arch not in MAX_SMEM:
            return [f"{arch} is not supported: this kernel needs compute capability 8.0 or newer"]
        return _too_many(self.tiles(product, self.choose(product, arch, aligned)))

    def choose(
        self, product: Product, arch: str, aligned: bool = True, device: DeviceProperties = H100  # noqa: ARG002
    ) -> GemmSm80Config:  # fmt: skip
        element = product.dtype.cuda
        sizes = _tiles_sm80(element)
        rows = self.batch_invariant_rows if product.batch_invariant else product.mean_rows
        tile = next(tile for tile in sizes if tile[0] <= max(rows * self.fullest, sizes[-1][0]))
        return GemmSm80Config(element, *tile, product.gated, product.clamped)


def _tiles_sm80(element: str) -> tuple[tuple[int, int, int], ...]:
    return TILES_SM80_FP32 if element == "fp32" else TILES_SM80


class GroupedGemmSm90(GroupedGemm):
    """cuda_src/moe/grouped_gemm_sm90.cuh: faster, for 16-bit rows that the copy engine can fetch."""

    name = "grouped_gemm_sm90"
    header = "moe/grouped_gemm_sm90.cuh"
    summary = "grouped products on TMA and wgmma with persistent blocks: bf16 and fp16 on Hopper (sm_90a)"
    params = Params(header, "GroupedGemmSm90Params")

    # Behind the tiles for few rows (few_rows.py), up to how many rows of a group on average each tile is taken; more
    # rows: 128 x 256. Measured on an H100, as all numbers here; benchmarks/NOTEBOOK.md has the tables.
    tile_by_rows = (
        (96, TILE_64X128_PAIR),  # up to two tiles of rows, which share their weights
        (144, TILE_128X128_PING_PONG),  # one tile or two, each with a consumer of its own
    )
    # And where rows lie in order (no gather) and w has one row for a column (not gated):
    ping_pong_rows, ping_pong_k = 384, 1024  # so many rows and so short a k: consumers in turn hide the output
    share_rows_k = 256  # with so short a k the blocks of a cluster share rows of x instead of weights
    waits_from_groups = 32  # groups, from which on most are counted when the first blocks become free

    def configs(self, arch: str) -> list[GemmSm90Config]:
        if arch != "sm_90a":
            return []
        elements = ("bf16", "fp16")
        few, gathered, few_in_order = all_tiles()
        sizes = [*few, *[tile for _, tile in self.tile_by_rows], TILE_128X256]
        in_order = [*few_in_order, TILE_128X192_PING_PONG]
        return [
            GemmSm90Config(element, *tile, gather, *kind)
            for element in elements
            for gather in (False, True)
            for kind in _KINDS
            for tile in (*sizes, *gathered * (gather or kind[0]))
        ] + [GemmSm90Config(element, *tile, False, False) for element in elements for tile in in_order]

    def why_not(self, product: Product, arch: str, aligned: bool = True) -> list[str]:
        p = product
        if arch != "sm_90a":
            return ["no Hopper tensor cores: this kernel is for sm_90a"]
        why = []
        if p.dtype.cuda not in ("bf16", "fp16"):
            why.append(f"{p.dtype} has no wgmma that is as exact as this library promises: bf16 and fp16 only")
        if not aligned:
            why.append("rows of x, w or out do not start at multiples of 16 bytes: the copy engine cannot fetch them")
        if 0 in (p.out.rows, p.x.rows, p.groups, p.k, p.n):
            why.append(EMPTY)
        if why:
            return why
        config = self.choose(p, arch)
        why = far_strides(("x", "w", "out"), self.map_arguments(p, config))
        if not 0 <= p.x.stride < 2**31:
            why.append("rows of x lie more than 4 GiB apart")
        elif p.gather and p.x.rows * p.x.stride // 8 >= 2**32:
            why.append("x reaches over 64 GiB: rows to gather are counted in units of 16 bytes, in 32 bits")
        return why + _too_many(self.tiles(p, config))

    def choose(
        self, product: Product, arch: str, aligned: bool = True, device: DeviceProperties = H100  # noqa: ARG002
    ) -> GemmSm90Config:  # fmt: skip
        p = product
        in_order, few = not p.gather and not p.gated, tiles_for(device)
        by_rows = (*few.tiles, *self.tile_by_rows)
        tile = next((tile for rows, tile in by_rows if p.mean_rows <= rows), TILE_128X256)
        if p.batch_invariant:
            tile = TILE_128X256
        elif few.takes_eight(p.mean_rows, p.groups, p.out.rows):
            tile = eight_rows(in_order, p.out.rows, p.groups, p.n, device)
        elif in_order and p.mean_rows >= self.ping_pong_rows and p.k <= self.ping_pong_k:
            tile = TILE_128X192_PING_PONG
        elif in_order and self._few(p, device) and 2 * self.tiles(p, _config(p, tile)) <= device.multiprocessors:
            tile = few.few_tiles  # wider tiles would leave half of the multiprocessors without work
        return _config(p, tile)

    def _few(self, p: Product, device: DeviceProperties) -> bool:
        """Whether groups have so few rows that reading weights is all that takes time."""
        return not p.batch_invariant and p.mean_rows <= tiles_for(device).tiles[-1][0]

    def reasons(self, problem: Product, config: GemmConfig, device: DeviceProperties = H100) -> list[str]:
        why = super().reasons(problem, config, device)
        if self._few(problem, device) and isinstance(config, GemmSm90Config):
            why.append(reason(config, device))
        return why

    def shares_rows(self, p: Product, config: GemmConfig) -> bool:
        """With few steps along k: no tile of rows is left over then, and that is a larger part of the work."""
        ping_pong = config.name == GemmSm90Config(p.dtype.cuda, *TILE_128X192_PING_PONG, False, False).name
        return ping_pong and p.k <= self.share_rows_k and n_blocks(p, config) % config.cluster == 0

    def counts_per_row(self, p: Product, config: GemmConfig) -> int:
        return n_blocks(p, config)

    def waits_for_counts(self, p: Product, config: GemmConfig) -> bool:
        """Where there are many groups, or a fast memory's tiles of few rows."""
        many = p.groups >= self.waits_from_groups or TileSm90(*config[1:7]) in COUNTED
        return p.groups_known_early and p.self_sorted is None and many

    def next_weights(
        self, p: Product, config: GemmConfig, behind: Product, its_config: GemmConfig, sms: int
    ) -> NextWeights | None:  # fmt: skip
        """Tiles of 8 rows do that no counter deals out: memory would be idle between the products."""
        w = behind.w
        if p.self_sorted is None or not p.gather or config.block_m != 8 or its_config.block_m != 8:
            return None
        assert isinstance(config, GemmSm90Config) and isinstance(its_config, GemmSm90Config)
        return next_weights(config, its_config, w.group_stride, w.column_stride, behind.n, behind.k, sms)

    def takes_from_counter(self, p: Product, config: GemmConfig) -> bool:  # noqa: ARG002
        """Clusters do, and blocks with few rows on fast memory: else the last tiles would not end together."""
        return config.cluster > 1 or TileSm90(*config[1:7]) in COUNTED

    def map_arguments(self, p: Product, config: GemmConfig) -> tuple[TensorMap, ...]:
        size = p.dtype.itemsize
        assert isinstance(config, GemmSm90Config)

        def stride(n: int, elements: int) -> int:  # of a dimension of 1 any would do
            return elements * size if n > 1 else 16

        halves = 2 if p.gated else 1
        w = (stride(halves, p.w.half_stride), stride(p.n, p.w.column_stride), stride(p.groups, p.w.group_stride))
        out = (16, stride(p.out.rows, p.out.stride), 16)
        # Few rows: weights come from memory, in longer pieces where a step holds these.
        promotion = 256 if config.block_n <= 128 and (config.block_k > 64 or config.ping_pong) else 128
        box = config.block_m // (config.cluster if self.shares_rows(p, config) else 1)
        return (
            TensorMap(p.dtype, (p.k, p.x.rows), (stride(p.x.rows, p.x.stride),), (64, box)),
            TensorMap(p.dtype, (p.k, halves, p.n, p.groups), w, (64, 1, config.block_n // 2, 1), promotion),
            TensorMap(p.dtype, (p.n, 1, p.out.rows, 1), out, (64, 1, 16, 1)),
        )


def _config(p: Product, tile: TileSm90) -> GemmSm90Config:
    return GemmSm90Config(p.dtype.cuda, *tile, p.gather, p.gated, p.clamped)
