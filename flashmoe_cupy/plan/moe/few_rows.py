"""Tiles for few rows: reading weights is all that takes time, so the device's memory decides. No GPU, no CuPy."""

from __future__ import annotations

from typing import NamedTuple

from flashmoe_cupy.jit.device import DeviceProperties
from flashmoe_cupy.plan.moe.tiles import TILE_64X64, TILE_64X128, TILE_64X128_SHORT_STEPS, GemmSm90Config, TileSm90

# Seconds from asking for weights to having them, while memory is busy: on an H100 64 KB for each of 96 blocks were too
# little (benchmarks/NOTEBOOK.md).
_LATENCY = 2e-6


class FewRows(NamedTuple):
    """The tiles that are taken while a multiprocessor wants no more bytes under way than so many."""

    under_way: float
    tiles: tuple[tuple[float, TileSm90], ...]  # up to how many rows of a group on average each is taken
    few_tiles: TileSm90  # in order and not gated, where these would leave half of the multiprocessors without work


# From slow to fast memory: each row is what was fastest on a device that wants so much.
MEASURED = (
    FewRows(60e3, ((32, TILE_64X128),), TILE_64X64),  # an H100 wants 51 KB
    # An H200 wants 74 KB. A ring of as many bytes in shorter steps has more of them under way.
    FewRows(float("inf"), ((32, TILE_64X128_SHORT_STEPS),), TILE_64X64),
)


def under_way(device: DeviceProperties) -> float:
    """Bytes that each multiprocessor must have asked for, or memory waits: its share of the rate times the latency."""
    return device.memory_rate * _LATENCY / device.multiprocessors


def tiles_for(device: DeviceProperties) -> FewRows:
    """The tiles for few rows on such a device."""
    wanted = under_way(device)
    return next(row for row in MEASURED if wanted <= row.under_way)


def all_tiles() -> tuple[list[TileSm90], list[TileSm90]]:
    """All tiles of all devices, each once: for every product, and for those in order and not gated."""
    tiles = dict.fromkeys(tile for row in MEASURED for _, tile in row.tiles)
    return list(tiles), [tile for tile in dict.fromkeys(row.few_tiles for row in MEASURED) if tile not in tiles]


def ring_bytes(config: GemmSm90Config) -> int:
    """Bytes of weights that a block can have under way."""
    return config.stages * config.block_k * 2 * config.block_n


def reason(config: GemmSm90Config, device: DeviceProperties) -> str:
    """Why a tile for few rows was taken, in a sentence."""
    blocks, ring = config.min_blocks, ring_bytes(config)
    rings = f"{ring / 1e3:.0f} KB" if blocks == 1 else f"{blocks} x {ring / 1e3:.0f} KB"
    return (
        f"weights are read once: {device.memory_rate / 1e12:.3g} TB/s to {device.multiprocessors} multiprocessors want "
        f"{under_way(device) / 1e3:.0f} KB under way on each, its ring holds {rings}"
    )
