"""Tiles for few rows: reading weights is all that takes time, so the device's memory decides. No GPU, no CuPy."""

from __future__ import annotations

import math
from typing import NamedTuple

from flashmoe_cupy.jit.device import DeviceProperties
from flashmoe_cupy.plan.archs import RESERVED_SMEM, SM90_SMEM_PER_SM
from flashmoe_cupy.plan.moe.tiles import (
    SELF_SORTED,
    TILE_8X64,
    TILE_8X64_TWICE,
    TILE_8X96,
    TILE_64X64,
    TILE_64X128,
    TILE_64X128_SHORT_STEPS,
    GemmSm90Config,
    TileSm90,
)

# Seconds from asking for weights to having them, while memory is busy: on an H100 64 KB for each of 96 blocks were too
# little (benchmarks/NOTEBOOK.md).
_LATENCY = 2e-6


class FewRows(NamedTuple):
    """The tiles that are taken while a multiprocessor wants no more bytes under way than so many."""

    under_way: float
    tiles: tuple[tuple[float, TileSm90], ...]  # up to how many rows of a group on average each is taken
    few_tiles: TileSm90  # in order and not gated, where these would leave half of the multiprocessors without work
    # Up to how many rows of a group on average tiles of 8 rows are taken: with more, too many groups would have two.
    rows_8: float = 0.0
    # From which time of reading weights on counters are worth a launch that permutes few assignments.
    permuted_seconds: float = float("inf")
    rows_8_of_few: float = 0.0  # the same of at most SELF_SORTED rows in all

    def takes_eight(self, mean_rows: float, groups: int, rows: int) -> bool:
        """Whether tiles of 8 rows are taken, for so many rows in all. Those of a single group are known."""
        most = self.rows_8_of_few if rows <= SELF_SORTED else self.rows_8
        return mean_rows <= (8.0 if groups == 1 and most else most)


class NextWeights(NamedTuple):
    """Weights of the product behind one, which a block asks L2 for: the next_* of `GroupedGemmParams`."""

    stride_e: int = 0
    stride_n: int = 0
    n: int = 0
    rows: int = 0  # 0: none are asked for
    first: int = 0
    k: int = 0


NO_WEIGHTS = NextWeights()
# Bytes of the next product's weights that a block asks for: what memory reads until that product can begin, or more.
NEXT_BYTES = 96 * 1024


# From slow to fast memory: each row is what was fastest on a device that wants so much.
MEASURED = (
    FewRows(60e3, ((32, TILE_64X128),), TILE_64X64),  # an H100 wants 51 KB
    # An H200 wants 74 KB. A ring of as many bytes in shorter steps has more of them under way.
    FewRows(
        float("inf"), ((32, TILE_64X128_SHORT_STEPS),), TILE_64X64, rows_8=3.2, rows_8_of_few=4.0, permuted_seconds=2e-4
    ),
)
# Of 8 rows, in order and not gated.
_IN_ORDER_8 = (TILE_8X64_TWICE, TILE_8X64)
# Tiles whose blocks take the next one from a counter, or the last ones would not end together.
COUNTED = (TILE_64X128_SHORT_STEPS, TILE_8X96, *_IN_ORDER_8)
# Blocks that fill a multiprocessor are taken where each reads at most so large a part of what two smaller ones read.
_ONE_BLOCK = 0.8


def under_way(device: DeviceProperties) -> float:
    """Bytes that each multiprocessor must have asked for, or memory waits: its share of the rate times the latency."""
    return device.memory_rate * _LATENCY / device.multiprocessors


def tiles_for(device: DeviceProperties) -> FewRows:
    """The tiles for few rows on such a device."""
    wanted = under_way(device)
    return next(row for row in MEASURED if wanted <= row.under_way)


def all_tiles() -> tuple[list[TileSm90], list[TileSm90], list[TileSm90]]:
    """All tiles of all devices, each once: for every product, for gathered or gated ones, and for all others."""
    tiles = dict.fromkeys(tile for row in MEASURED for _, tile in row.tiles)
    others = [tile for tile in dict.fromkeys(row.few_tiles for row in MEASURED) if tile not in tiles]
    return list(tiles), [TILE_8X96], [*others, *_IN_ORDER_8]


def groups_with_rows(groups: int, rows: int) -> float:
    """How many of the groups have a row, on average, where rows belong to them at random."""
    return groups * (1.0 - (1.0 - 1.0 / max(groups, 1)) ** rows)


def permutes_few(device: DeviceProperties, weights: float) -> bool:
    """Whether a launch permutes few assignments, so that there are counters. weights: bytes that are read."""
    return weights >= device.memory_rate * tiles_for(device).permuted_seconds


def eight_rows(in_order: bool, rows: int, groups: int, n: int, device: DeviceProperties) -> TileSm90:
    """The tile of 8 rows for `rows` rows of out that belong to `groups` groups at random.

    in_order: not gathered and not gated. n: rows of w of a group.
    """
    if not in_order:
        return TILE_8X96
    tiles = groups_with_rows(groups, rows) * -(-n // TILE_8X64.block_n)
    # Tiles that a multiprocessor has one after the other, or two at a time.
    one, two = math.ceil(tiles / device.multiprocessors), 2 * math.ceil(tiles / (2 * device.multiprocessors))
    return TILE_8X64 if one <= _ONE_BLOCK * two else TILE_8X64_TWICE


def next_weights(
    config: GemmSm90Config, behind: GemmSm90Config, stride_e: int, stride_n: int, n: int, k: int, sms: int
) -> NextWeights:  # fmt: skip
    """What blocks of `config` ask L2 for, of (groups, n, k) weights of the product behind it.

    Where a block of that product fits beside one of this, the first tiles' blocks have asked for theirs by themselves.
    """
    beside = config.smem_bytes + behind.smem_bytes + 2 * RESERVED_SMEM <= SM90_SMEM_PER_SM
    columns = min(k, NEXT_BYTES // (2 * behind.block_n)) // 8 * 8  # whole pieces of 16 bytes
    return NextWeights(stride_e, stride_n, n, behind.block_n, sms if beside else 0, columns)


def ring_bytes(config: GemmSm90Config) -> int:
    """Bytes of weights that a block can have under way."""
    return config.stages * config.block_k * 2 * config.block_n


def reason(config: GemmSm90Config, device: DeviceProperties) -> str:
    """Why a tile for few rows was taken, in a sentence."""
    blocks, ring = config.blocks_per_sm, ring_bytes(config)
    rings = f"{ring / 1e3:.0f} KB" if blocks == 1 else f"{blocks} x {ring / 1e3:.0f} KB"
    return (
        f"weights are read once: {device.memory_rate / 1e12:.3g} TB/s to {device.multiprocessors} multiprocessors want "
        f"{under_way(device) / 1e3:.0f} KB under way on each, its ring holds {rings}"
    )
