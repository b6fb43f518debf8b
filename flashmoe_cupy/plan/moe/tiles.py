"""Configurations of the grouped products: tile sizes, and what they cost in shared memory. No GPU, no CuPy."""

from __future__ import annotations

from typing import NamedTuple

from flashmoe_cupy.plan.archs import ELEMENT_BYTES, RESERVED_SMEM, SM90_SMEM_PER_SM, WARP_STORE_BYTES

SELF_SORTED = 32  # assignments that a warp sorts by itself, one for each lane (cuda_src/moe/assignments.cuh)
_SORTED_BYTES = 4 * SELF_SORTED  # their order


class GemmSm80Config(NamedTuple):
    """One specialisation of `GroupedGemmSm80`; the fields are its template arguments, in their order."""

    element: str  # "bf16", "fp16" or "fp32"
    block_m: int  # rows of out in a tile
    block_n: int  # rows of w in a tile; half as many columns of out when gated
    stages: int  # steps along k in shared memory
    gated: bool  # w has two rows for each column of out
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
    def blocks_per_sm(self) -> int:
        """Blocks of the grid for each SM."""
        return self.min_blocks

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


# (block_m, block_n, stages), from many rows of a group to a few; not yet measured.
TILES_SM80 = ((128, 128, 3), (64, 128, 3), (16, 128, 4))
TILES_SM80_FP32 = ((64, 64, 3), (16, 128, 3))


class TileSm90(NamedTuple):
    """The sizes of a Hopper configuration."""

    block_m: int  # rows of out in a tile: 8, or a multiple of 64
    block_n: int  # rows of w in a tile; half as many columns of out when gated
    block_k: int  # columns of x and w in a step
    stages: int  # steps in shared memory
    cluster: int  # blocks that take tiles together
    ping_pong: bool  # the two consumer warpgroups take tiles in turn; else they share each tile, 64 rows to one


# Measured on an H100, benchmarks/NOTEBOOK.md; products.py says for how many rows.
TILE_64X128 = TileSm90(64, 128, 128, 4, 1, False)
TILE_64X128_PAIR = TileSm90(64, 128, 128, 4, 2, False)
TILE_128X128_PING_PONG = TileSm90(128, 128, 64, 6, 2, True)
TILE_128X256 = TileSm90(128, 256, 64, 4, 2, False)
TILE_64X64 = TileSm90(64, 64, 128, 6, 1, False)
TILE_128X192_PING_PONG = TileSm90(128, 192, 64, 4, 2, True)
# Measured on an H200.
TILE_64X128_SHORT_STEPS = TileSm90(64, 128, 64, 8, 1, False)
TILE_8X96 = TileSm90(8, 96, 64, 10, 1, False)  # leaves room for a block of the next product
TILE_8X64_TWICE = TileSm90(8, 64, 64, 8, 1, False)  # two blocks on a multiprocessor, or one beside the product before
TILE_8X64 = TileSm90(8, 64, 128, 12, 1, False)  # fills the shared memory


class GemmSm90Config(NamedTuple):
    """One specialisation of `GroupedGemmSm90`; the fields are its template arguments, in their order."""

    element: str  # "bf16" or "fp16"
    block_m: int  # these six: see TileSm90
    block_n: int
    block_k: int
    stages: int
    cluster: int
    ping_pong: bool
    gather: bool  # each row of out names its row of x
    gated: bool  # w has two rows for each column of out
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
        return 2 if self.ping_pong else -(-self.block_m // 64)

    @property
    def writers(self) -> int:
        """Consumers' warps that have rows of a tile, and stage results."""
        return 1 if self.block_m == 8 else 4 * self.consumers

    @property
    def threads(self) -> int:
        """Threads of a block: the producers' warpgroup and the consumers'."""
        return 128 * (1 + self.consumers)

    @property
    def min_blocks(self) -> int:
        """Blocks per SM that registers are left for: beside one of 8 rows may be one of the next product."""
        return 2 if self.block_m == 8 else self.blocks_per_sm

    @property
    def blocks_per_sm(self) -> int:
        """Blocks of the grid for each SM: as many as its shared memory holds; two at most, with two consumers one."""
        return 2 if self.consumers == 1 and 2 * (self.smem_bytes + RESERVED_SMEM) <= SM90_SMEM_PER_SM else 1

    @property
    def smem_bytes(self) -> int:
        """Dynamic shared memory of a block: the same arithmetic as `GroupedGemmSm90::Smem`."""
        works, work_bytes = (4 if self.cluster > 1 else 3), 32  # records of the next tiles
        barriers, tile_numbers = 16, 32  # two barriers of each buffer; what passes numbers of tiles on in a cluster
        ring = self.stages * self.block_k * 2 * (self.block_m + self.block_n)
        ring += self.writers * WARP_STORE_BYTES + works * work_bytes + _SORTED_BYTES
        return ring + barriers * (self.stages + works) + tile_numbers

    @property
    def struct(self) -> str:
        """The C++ type inside namespace fm."""
        sizes = f"{self.block_m}, {self.block_n}, {self.block_k}, {self.stages}, {self.cluster}"
        flags = ", ".join(map(_cpp, (self.ping_pong, self.gather, self.gated)))
        return f"GroupedGemmSm90<fm::{self.element}, {sizes}, {flags}>"


GemmConfig = GemmSm80Config | GemmSm90Config


def _words(gated: bool, clamped: bool) -> str:
    return " gated" * gated + " clamped" * clamped


def _cpp(flag: bool) -> str:
    return "true" if flag else "false"
