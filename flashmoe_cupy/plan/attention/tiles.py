"""Configurations of the attention kernels: tile sizes, and what they cost in shared memory. No GPU, no CuPy."""

from __future__ import annotations

from typing import NamedTuple

from flashmoe_cupy.plan.archs import ELEMENT_BYTES, MAX_SMEM


class Sm80Config(NamedTuple):
    """One specialisation of `AttentionFwdSm80`; the fields are its template arguments, in their order."""

    element: str  # "bf16", "fp16" or "fp32"
    head_dim: int  # compiled sizes: head dims up to these run, the rest of a row is zero
    head_dim_v: int
    block_m: int
    block_n: int
    warps: int
    variant: str  # the C++ struct of attention/variant.cuh

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
        return 65536 // (256 * self.threads)

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
    head_dim: int  # compiled sizes, as above
    head_dim_v: int
    block_m: int  # 64 for each consumer warpgroup
    block_n: int
    stages: int  # tiles of K, and of V, in shared memory
    variant: str

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
        queries, keys = self.block_m * width, self.stages * self.block_n * (width + width_v)
        keys += self.block_m // 64 * 4 * 4096  # and what each consumer warp stages of its output
        q_stages = 2 if 2 * queries + keys + 1536 <= MAX_SMEM["sm_90a"] else 1
        works, work_bytes = 4, 72 + 24 * (self.block_m // 64)  # tiles ahead, and their records
        barriers = 16  # the two of each buffer
        rings = self.block_m // 64 * q_stages + 2 * self.stages + works
        return q_stages * queries + keys + works * work_bytes + barriers * rings

    @property
    def struct(self) -> str:
        """The C++ type inside namespace fm."""
        sizes = f"{self.head_dim}, {self.head_dim_v}, {self.block_m}, {self.block_n}, {self.stages}"
        return f"AttentionFwdSm90<fm::{self.element}, {sizes}, fm::{self.variant}>"


Config = Sm80Config | Sm90Config


def _dims(config: Config) -> str:
    return f"d{config.head_dim}" + (f"/{config.head_dim_v}" if config.head_dim_v != config.head_dim else "")
