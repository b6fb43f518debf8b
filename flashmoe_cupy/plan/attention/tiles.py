"""Configurations of the attention kernels: tile sizes, and what they cost in shared memory. No GPU, no CuPy."""

from __future__ import annotations

from typing import NamedTuple

from flashmoe_cupy.plan.archs import ELEMENT_BYTES, MAX_SMEM, WARP_STORE_BYTES
from flashmoe_cupy.plan.attention import softcap

_RECORDS_BYTES = 1536  # of a Hopper block: records of the next tiles and barriers, at most; `Smem` has the same number


class Sm80Config(NamedTuple):
    """One specialisation of `AttentionFwdSm80`; the fields are its template arguments, in their order."""

    element: str  # "bf16", "fp16" or "fp32"
    head_dim: int  # compiled size of q and k: head dims up to this one run, the rest of a row counts as zero
    head_dim_v: int  # compiled size of v and out; a wider v runs as blocks of this width
    block_m: int  # queries of a tile
    block_n: int  # keys of a step
    warps: int  # of a block
    variant: str  # what happens to the scores: a C++ struct of attention/variant.cuh

    @property
    def name(self) -> str:
        """For people: "bf16 d128 128x64 PlainScores"."""
        return f"{self.element} {_dims(self)} {self.block_m}x{self.block_n} {self.variant}"

    @property
    def threads(self) -> int:
        """Threads of a block."""
        return 32 * self.warps

    @property
    def min_blocks(self) -> int:
        """Blocks per SM that the compiler must leave registers for: as many as fit at 256 registers a thread."""
        return 65536 // (256 * self.threads)  # registers of an SM (CUDA C programming guide, as for MAX_SMEM)

    @property
    def cluster(self) -> int:
        """Blocks of a cluster."""
        return 1

    @property
    def smem_bytes(self) -> int:
        """Dynamic shared memory of a block: the same arithmetic as `AttentionFwdSm80::Smem`."""
        size = ELEMENT_BYTES[self.element]
        tiles = self.block_m * self.head_dim + self.block_n * (self.head_dim + self.head_dim_v)
        return 128 + size * max(tiles, self.block_m * self.head_dim_v)

    @property
    def struct(self) -> str:
        """The C++ type inside namespace fm."""
        sizes = f"{self.head_dim}, {self.head_dim_v}, {self.block_m}, {self.block_n}, {self.warps}"
        return f"AttentionFwdSm80<fm::{self.element}, {sizes}, fm::{self.variant}>"


class Sm90Config(NamedTuple):
    """One specialisation of `AttentionFwdSm90`; the fields are its template arguments, in their order."""

    element: str  # "bf16" or "fp16"
    head_dim: int  # compiled sizes: see Sm80Config
    head_dim_v: int
    block_m: int  # queries of a tile: 64 for each consumer warpgroup
    block_n: int  # keys of a step
    stages: int  # steps in shared memory: tiles of K, and as many of V
    variant: str  # see Sm80Config

    @property
    def name(self) -> str:
        """For people: "bf16 d128 128x160x2 PlainScores"."""
        return f"{self.element} {_dims(self)} {self.block_m}x{self.block_n}x{self.stages} {self.variant}"

    @property
    def threads(self) -> int:
        """Threads of a block: the producer's warpgroup and the consumers'."""
        return 128 * (1 + self.block_m // 64)

    @property
    def min_blocks(self) -> int:
        """Blocks per SM: one, which takes most of its shared memory."""
        return 1

    @property
    def cluster(self) -> int:
        """Blocks of a cluster."""
        return 1

    @property
    def smem_bytes(self) -> int:
        """Dynamic shared memory of a block: the same arithmetic as `AttentionFwdSm90::Smem`."""
        width, width_v = (-(-dim // 64) * 64 * ELEMENT_BYTES[self.element] for dim in (self.head_dim, self.head_dim_v))
        consumers = self.block_m // 64
        queries, keys = self.block_m * width, self.stages * self.block_n * (width + width_v)
        keys += self.stages * self._bias_bytes
        output = consumers * 4 * WARP_STORE_BYTES
        if queries + keys + output + _RECORDS_BYTES > MAX_SMEM["sm_90a"]:
            output = 0  # results are stored from registers
        q_stages = 2 if 2 * queries + keys + output + _RECORDS_BYTES <= MAX_SMEM["sm_90a"] else 1
        works, work_bytes = 4, 72 + 24 * consumers  # records of the next tiles
        buffers, barriers = consumers * q_stages + 2 * self.stages + works, 16  # bytes of the two of each buffer
        return q_stages * queries + keys + output + works * work_bytes + barriers * buffers

    @property
    def _bias_bytes(self) -> int:
        """Shared memory for the bias of a step: of each query and key, or of each key."""
        size = self.block_n * _BIAS_BYTES.get(self.variant, 0)
        return -(-size // 128) * 128 if self.variant in KEY_BIASES else size * self.block_m

    @property
    def struct(self) -> str:
        """The C++ type inside namespace fm."""
        sizes = f"{self.head_dim}, {self.head_dim_v}, {self.block_m}, {self.block_n}, {self.stages}"
        return f"AttentionFwdSm90<fm::{self.element}, {sizes}, fm::{self.variant}>"


Config = Sm80Config | Sm90Config


def _dims(config: Config) -> str:
    return f"d{config.head_dim}" + (f"/{config.head_dim_v}" if config.head_dim_v != config.head_dim else "")


# ---- which tiles there are ------------------------------------------------------------------------------------------

# What happens to the scores: nothing but the scale, the same for rows at any address, softcap or ALiBi, a bias.
VARIANTS = ("PlainScores", "PlainScoresUnaligned", "ModifiedScores<false>", "ModifiedScores<true>")
PLAIN, UNALIGNED, SCORES, BIAS = VARIANTS
# Of the Hopper kernel alone: a bias of 16 or 32 bits whose tiles come beside those of K; one that all queries of a head
# share; a boolean one, beside scores that are only scaled, and beside others.
BIASES = BIAS16, BIAS32 = "BiasScores<2>", "BiasScores<4>"
KEY_BIASES = KEY_BIAS16, KEY_BIAS32 = "KeyBiasScores<2>", "KeyBiasScores<4>"
MASKS = MASK, MASK_SCORES = "MaskScores<fm::PlainScores>", "MaskScores<fm::ModifiedScores<false>>"
_BIAS_BYTES = {BIAS16: 2, BIAS32: 4, KEY_BIAS16: 2, KEY_BIAS32: 4}  # of a value

Tile = tuple[int, int, int]  # (block_m, block_n, warps) on sm_80, (block_m, block_n, stages) on sm_90a

# By compiled head dims and variant. Measured on an H100; benchmarks/NOTEBOOK.md has the candidates.
TILES_SM80: dict[tuple[int, int], dict[str, Tile]] = {
    (64, 64): {PLAIN: (128, 128, 4), SCORES: (128, 64, 4), BIAS: (64, 64, 4)},
    (96, 96): {PLAIN: (128, 64, 4), SCORES: (64, 64, 4), BIAS: (64, 64, 4)},
    (128, 128): {PLAIN: (128, 64, 4), SCORES: (64, 64, 4), BIAS: (64, 64, 4)},
    (192, 128): {PLAIN: (128, 64, 4), SCORES: (64, 64, 4), BIAS: (64, 64, 4)},
    (256, 256): {PLAIN: (64, 64, 4), SCORES: (64, 64, 4), BIAS: (64, 64, 4)},
    (64, 256): {PLAIN: (64, 64, 4), SCORES: (64, 64, 4), BIAS: (64, 64, 4)},
}
# Where another architecture's register allocation would spill with the tile above, under some NVRTC from 12.4 to 13.5.
_SM80_ON: dict[tuple[str, tuple[int, int], str], Tile] = {
    **{(arch, (64, 64), PLAIN): (128, 64, 4) for arch in ("sm_100", "sm_120")},
    ("sm_100", (128, 128), PLAIN): (128, 48, 4),
    ("sm_120", (128, 128), PLAIN): (128, 32, 4),
    **{(arch, (192, 128), PLAIN): (128, 48, 4) for arch in ("sm_100", "sm_120")},
    **{(arch, (64, 256), BIAS): (64, 32, 4) for arch in ("sm_80", "sm_86", "sm_89", "sm_100")},
    **{(arch, (256, 256), BIAS): (64, 32, 4) for arch in ("sm_80", "sm_86", "sm_89", "sm_100")},
}
SIBLINGS = {"sm_87": "sm_80", "sm_103": "sm_100", "sm_110": "sm_100", "sm_121": "sm_120"}  # the same instructions
# fp32 has one variant, which does everything: its speed comes second. Wider values run as blocks of 128.
TILES_FP32 = {
    (64, 64): (64, 32, 4),
    (96, 96): (64, 32, 4),
    (128, 128): (64, 32, 4),
    (192, 128): (64, 32, 4),
    (256, 128): (64, 16, 4),
}

# Of the Hopper kernel, by compiled head dims; where there are several, choice.py takes one by the lengths. Measured on
# an H100; benchmarks/NOTEBOOK.md has the candidates.
TILES_SM90: dict[tuple[int, int], tuple[Tile, ...]] = {
    (64, 64): ((192, 128, 3), (256, 64, 4), (128, 128, 3)),
    (96, 96): ((128, 160, 2), (128, 128, 2)),
    (128, 128): ((128, 160, 2), (128, 128, 2)),
    (192, 128): ((128, 112, 2),),
    (192, 192): ((128, 96, 2),),
    (256, 256): ((128, 64, 2),),
    (64, 256): ((128, 64, 2),),
}
# Changed scores need registers: where the tiles above would spill. The tiles of a bias need shared memory, and words of
# a mask belong to 64 or 128 keys. Those of biases and masks of 64 and 128 columns are measured on an H200.
_SM90_FOR: dict[tuple[tuple[int, int], str], tuple[Tile, ...]] = {
    ((64, 64), SCORES): ((256, 64, 4), (128, 128, 3)),
    ((64, 64), softcap.BOUNDED): ((192, 112, 3), (256, 64, 4), (128, 128, 3)),
    ((96, 96), SCORES): ((128, 128, 2),),
    ((128, 128), SCORES): ((128, 128, 2),),
    **{(dims, BIAS16): ((128, 64, 2),) for dims in TILES_SM90},
    **{(dims, BIAS16): ((128, 128, 2),) for dims in ((96, 96), (128, 128))},
    **{(dims, BIAS32): ((128, 64, 2),) for dims in TILES_SM90},
    **{((64, 64), bias): ((128, 128, 2),) for bias in BIASES},
    **{(dims, BIAS32): ((128, 96, 2),) for dims in ((96, 96), (128, 128))},
    ((256, 256), BIAS32): ((64, 64, 2),),
    **{(dims, mask): ((128, 64, 2),) for dims in TILES_SM90 for mask in MASKS},
    ((64, 64), MASK): ((192, 128, 3), (128, 128, 3)),
    ((64, 64), MASK_SCORES): ((256, 64, 4), (128, 128, 3)),
    **{((96, 96), mask): ((128, 128, 2),) for mask in MASKS},
    **{((128, 128), mask): ((128, 128, 2),) for mask in MASKS},
}


def tile_sm80(arch: str, dims: tuple[int, int], variant: str) -> Tile:
    """The tile of a compiled size in bf16 and fp16."""
    if variant == UNALIGNED:  # key tiles as of the aligned variant make the same bits; fewer queries need no spills
        return 64, tile_sm80(arch, dims, PLAIN)[1], 4
    return _SM80_ON.get((SIBLINGS.get(arch, arch), dims, variant)) or TILES_SM80[dims][variant]


def tiles_sm90(dims: tuple[int, int], variant: str) -> tuple[Tile, ...]:
    """The tiles of a compiled size of the Hopper kernel, one or several."""
    return _SM90_FOR.get((dims, variant)) or TILES_SM90[dims]
