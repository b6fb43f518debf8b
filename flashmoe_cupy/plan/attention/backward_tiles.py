"""Configurations of the kernels of attention's backward: tiles, and their shared memory. No GPU, no CuPy."""

from __future__ import annotations

from typing import NamedTuple

from flashmoe_cupy.plan.archs import ELEMENT_BYTES, MAX_SMEM, RESERVED_SMEM
from flashmoe_cupy.plan.attention.tiles import BIAS, PLAIN, SCORES, SIBLINGS, UNALIGNED

PARTS = {"q": 1, "k": 2, "v": 4, "kv": 6, "qkv": 7}  # kWanted of cuda_src/attention/bwd_sm80.cuh


class Bwd80Config(NamedTuple):
    """One specialisation of `AttentionBwdSm80`; the fields are its template arguments, in their order."""

    element: str  # "bf16", "fp16" or "fp32"
    head_dim: int  # compiled size of q and k: head dims up to this one run, the rest of a row counts as zero
    head_dim_v: int  # compiled size of v and out; a wider v runs as blocks of this width
    rows: int  # that a block owns: queries for dq, else keys
    cols: int  # of a step: keys for dq, else queries
    warps: int  # of a block
    stages: int  # steps in shared memory
    part: str  # whose gradients: a key of PARTS
    variant: str  # what happens to the scores: a C++ struct of attention/variant.cuh

    @property
    def name(self) -> str:
        """For people: "bf16 d128 kv 64x64 PlainScores"."""
        dims = f"d{self.head_dim}" + (f"/{self.head_dim_v}" if self.head_dim_v != self.head_dim else "")
        return f"{self.element} {dims} {self.part} {self.rows}x{self.cols} {self.variant}"

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
        """Dynamic shared memory of a block: the same arithmetic as `AttentionBwdSm80::Smem`."""
        size, by_key = ELEMENT_BYTES[self.element], self.part != "q"
        rows = self.rows * size * (self.head_dim + (self.part != "v") * self.head_dim_v) + 8 * self.rows * (not by_key)
        step = self.cols * size * (self.head_dim + self.head_dim_v) + 8 * self.cols * by_key
        return 128 + rows + self.stages * step

    @property
    def struct(self) -> str:
        """The C++ type inside namespace fm."""
        sizes = (self.head_dim, self.head_dim_v, self.rows, self.cols, self.warps, self.stages, PARTS[self.part])
        return f"AttentionBwdSm80<fm::{self.element}, {', '.join(map(str, sizes))}, fm::{self.variant}>"


class BwdAll80Config(NamedTuple):
    """One specialisation of `AttentionBwdAllSm80`; the fields are its template arguments, in their order."""

    element: str  # "bf16" or "fp16"
    head_dim: int  # compiled sizes: see Bwd80Config
    head_dim_v: int
    rows: int  # keys that a block owns
    cols: int  # queries of a step
    warps: int  # of a block
    stages: int  # steps in shared memory
    down_s: int  # warps along the keys of S and dP, ...
    down_d: int  # ... along the keys of dk and dv, ...
    down_q: int  # ... and along the queries of dq
    plan: int  # bits of BwdAllPlan: what is done beside what
    variant: str  # what happens to the scores: PLAIN or SCORES

    @property
    def part(self) -> str:
        """Whose gradients."""
        return "qkv"

    @property
    def like(self) -> Bwd80Config:
        """The configuration for dk and dv whose code it shares."""
        return Bwd80Config(*self[:7], "kv", self.variant)

    @property
    def name(self) -> str:
        """For people: "bf16 d128 qkv 128x64x2 PlainScores"."""
        return self.like.name.replace(" kv ", " qkv ").replace(f" {self.variant}", f"x{self.stages} {self.variant}")

    @property
    def threads(self) -> int:
        """Threads of a block."""
        return self.like.threads

    @property
    def min_blocks(self) -> int:
        """See Bwd80Config."""
        return self.like.min_blocks

    @property
    def cluster(self) -> int:
        """Blocks of a cluster."""
        return 1

    @property
    def smem_bytes(self) -> int:
        """Dynamic shared memory of a block: the same arithmetic as `AttentionBwdAllSm80::Smem`."""
        exchanged = 1 if self.warps == self.down_s == self.down_d else 2  # dS, and P
        a_score = exchanged * ELEMENT_BYTES[self.element] + 4 * (self.plan >> 5 & 1)
        return self.like.smem_bytes - 8 * self.cols * (self.stages - 1) + a_score * self.rows * self.cols + 192

    @property
    def struct(self) -> str:
        """The C++ type inside namespace fm."""
        return f"AttentionBwdAllSm80<fm::{self.element}, {', '.join(map(str, self[1:-1]))}, fm::{self.variant}>"


class BwdBias80Config(NamedTuple):
    """One specialisation of `AttentionBwdBiasSm80`; the fields are its template arguments, in their order."""

    element: str  # see Bwd80Config
    head_dim: int
    head_dim_v: int
    rows: int  # queries of a tile of the bias
    cols: int  # keys of it
    warps: int  # of a block

    @property
    def like(self) -> Bwd80Config:
        """The configuration for dq whose code it shares."""
        return Bwd80Config(*self, 1, "q", BIAS)

    @property
    def name(self) -> str:
        """For people: "bf16 d128 bias 64x32"."""
        return self.like.name.replace(" q ", " bias ").removesuffix(f" {BIAS}")

    @property
    def threads(self) -> int:
        """Threads of a block."""
        return 32 * self.warps

    @property
    def min_blocks(self) -> int:
        """See Bwd80Config."""
        return self.like.min_blocks

    @property
    def cluster(self) -> int:
        """Blocks of a cluster."""
        return 1

    @property
    def smem_bytes(self) -> int:
        """Dynamic shared memory of a block: the same arithmetic as `AttentionBwdBiasSm80::Smem`."""
        return self.like.smem_bytes + 4 * self.warps * self.cols

    @property
    def struct(self) -> str:
        """The C++ type inside namespace fm."""
        return f"AttentionBwdBiasSm80<fm::{self.element}, {', '.join(map(str, self[1:]))}>"


class Bwd90Config(NamedTuple):
    """One specialisation of `AttentionBwdSm90`; the fields are its template arguments, in their order."""

    element: str  # "bf16" or "fp16"
    head_dim: int  # compiled sizes: see Bwd80Config
    head_dim_v: int
    rows: int  # that a block owns: 64 for each consumer warpgroup
    cols: int  # of a step
    stages: int  # steps in shared memory
    part: str  # whose gradients: a key of PARTS
    variant: str = PLAIN  # what happens to the scores: a C++ struct of attention/variant.cuh

    @property
    def name(self) -> str:
        """For people: "bf16 d128 kv 128x64x2"."""
        dims = f"d{self.head_dim}" + (f"/{self.head_dim_v}" if self.head_dim_v != self.head_dim else "")
        changed = "" if self.variant == PLAIN else f" {self.variant}"
        return f"{self.element} {dims} {self.part} {self.rows}x{self.cols}x{self.stages}{changed}"

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
        """Dynamic shared memory of a block: the same arithmetic as `AttentionBwdSm90::Smem`."""
        size, by_key = ELEMENT_BYTES[self.element], self.part != "q"
        width, width_v = (-(-dim // 64) * 64 * size for dim in (self.head_dim, self.head_dim_v))
        rows = self.rows * (width + (self.part != "v") * width_v)
        # The next tile's keys, dS, pieces of dq (one block of 64 x 64 or two), and their barriers.
        pieces = 4 * 64 * 64 * (1 if self.cols * width == 64 * 128 else 2)
        more = (self.part == "qkv") * (self.rows * (width + 2 * self.cols * size) + pieces + 2 * 16 + 16)
        work = 24 * 4 * (2 + (self.part == "qkv")) + 16 * 3 + 8  # tiles, their barriers, and those of the rows
        return rows + more + self.stages * (self.cols * (width + width_v) + (8 * self.cols + 16) * by_key + 32) + work

    @property
    def struct(self) -> str:
        """The C++ type inside namespace fm."""
        sizes = (self.head_dim, self.head_dim_v, self.rows, self.cols, self.stages, PARTS[self.part])
        return f"AttentionBwdSm90<fm::{self.element}, {', '.join(map(str, sizes))}, fm::{self.variant}>"


class BwdWide90Config(NamedTuple):
    """One specialisation of `AttentionBwdWideSm90`; the fields are its template arguments, in their order."""

    element: str  # see Bwd90Config
    head_dim: int
    head_dim_v: int
    cols: int
    stages: int
    part: str

    @property
    def rows(self) -> int:
        """Keys that a block owns."""
        return 64

    @property
    def name(self) -> str:
        """For people: "bf16 d256 kv 64x64x2"."""
        return self.like.name

    @property
    def like(self) -> Bwd90Config:
        """The same sizes, of the kernel for narrower head dims."""
        return Bwd90Config(*self[:3], self.rows, *self[3:])

    @property
    def threads(self) -> int:
        """Threads of a block: the producer's warpgroup and two consumers."""
        return 128 * 3

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
        """Dynamic shared memory of a block: the same arithmetic as `AttentionBwdWideSm90::Smem`."""
        size, width = ELEMENT_BYTES[self.element], self.head_dim + self.head_dim_v
        exchanged = 2 * self.rows * size * (self.cols + 64 * (self.part == "qkv"))
        return self.rows * width * size + exchanged + self.stages * (self.cols * (width * size + 8) + 32) + 16

    @property
    def struct(self) -> str:
        """The C++ type inside namespace fm."""
        sizes = self.head_dim, self.head_dim_v, self.cols, self.stages
        return f"AttentionBwdWideSm90<fm::{self.element}, {', '.join(map(str, sizes))}>"


class BwdPair90Config(NamedTuple):
    """One specialisation of `AttentionBwdWidePairSm90`; the fields are its template arguments, in their order."""

    element: str  # see Bwd90Config
    head_dim: int
    head_dim_v: int
    stages: int  # steps of q in shared memory
    stages_v: int  # and of dout
    shares: bool  # whether each block fetches half of the queries for both

    @property
    def alone(self) -> BwdWide90Config:
        """The same for blocks that are not in pairs."""
        return BwdWide90Config(*self[:3], 64, self.stages, "qkv")

    @property
    def rows(self) -> int:
        """Keys that a block owns."""
        return self.alone.rows

    @property
    def name(self) -> str:
        """For people: "bf16 d256 qkv 64x64x2x1 pairs"."""
        return f"{self.alone.name}x{self.stages_v} pairs" + self.shares * " shared"

    @property
    def threads(self) -> int:
        """Threads of a block."""
        return self.alone.threads

    @property
    def min_blocks(self) -> int:
        """Blocks per SM."""
        return 1

    @property
    def cluster(self) -> int:
        """Blocks of a cluster."""
        return 2

    @property
    def smem_bytes(self) -> int:
        """Dynamic shared memory of a block: the same arithmetic as `AttentionBwdWideBlocksSm90::Smem`."""
        size = ELEMENT_BYTES[self.element]
        one = self.alone.cols * self.head_dim_v * size + 16  # a step of dout, and its barriers
        peer = self.rows * size * (2 * self.alone.cols + 2 * 64)  # dS of two steps, and keys
        return self.alone.smem_bytes + (self.stages_v - self.stages) * one + peer + 32

    @property
    def struct(self) -> str:
        """The C++ type inside namespace fm."""
        return f"AttentionBwdWidePairSm90<fm::{self.element}, {', '.join(str(int(n)) for n in self[1:])}>"


class SmallConfig(NamedTuple):
    """One specialisation of a kernel whose template arguments are written out."""

    name: str  # for people
    struct: str  # the C++ type inside namespace fm
    threads: int  # of a block
    smem_bytes: int = 0  # of a block
    min_blocks: int = 1
    cluster: int = 1


# ---- which tiles there are ------------------------------------------------------------------------------------------

DIMS_FP32 = ((64, 64), (96, 96), (128, 128), (192, 128), (256, 96))
# Where dk and dv together would take more registers than there are, whatever happens to the scores, ...
_APART = ((256, 256),)
_APART_CHANGED = ((192, 128), (64, 256))  # ... or where softcap, ALiBi or a bias changes them.
_WIDE = ((192, 128), (64, 256))  # where dk and dv together leave room for fewer columns


# Columns where another architecture's register allocation would spill with those below.
_COLS_ON: dict[tuple[str, tuple[int, int], str, str], int] = {
    ("sm_100", (128, 128), "kv", PLAIN): 48,
    ("sm_100", (128, 128), "kv", UNALIGNED): 48,
    ("sm_120", (128, 128), "kv", SCORES): 16,
    ("sm_120", (192, 128), "kv", UNALIGNED): 16,
    ("sm_120", (256, 256), "q", BIAS): 16,
}
_FP32_ON = {("sm_120", (192, 128)): (192, 64), ("sm_120", (256, 96)): (256, 32)}  # and narrower tiles of values


def config_sm80(arch: str, element: str, dims: tuple[int, int], part: str, variant: str) -> Bwd80Config:
    """Tiles without spills under NVRTC 12.9; not measured yet."""
    like = SIBLINGS.get(arch, arch)
    if element == "fp32":
        dims = _FP32_ON.get((like, dims), dims)
        return Bwd80Config(element, *dims, 32, 32 if dims[0] <= 128 else 16, 2, 1, part, variant)
    cols = 64 if variant in (PLAIN, UNALIGNED) else 32
    if part == "kv" and dims in _WIDE:
        cols = 32
    cols = _COLS_ON.get((like, dims, part, variant), cols)
    config = Bwd80Config(element, *dims, 64, cols, 4, 1, part, variant)
    return config if config.smem_bytes <= MAX_SMEM[arch] else config._replace(cols=32)


# For dq, dk and dv at once: the first of which shared memory holds as many blocks as registers do, or that it holds.
Grid = tuple[int, int, int, int, int, int, int, int]  # BwdAll80Config from rows to plan
TILES_ALL_SM80: dict[tuple[int, int], tuple[Grid, ...]] = {
    (64, 64): ((128, 64, 4, 1, 4, 4, 4, 1), (128, 64, 8, 2, 4, 4, 4, 0)),
    (96, 96): ((128, 64, 8, 2, 4, 4, 4, 0), (64, 64, 4, 2, 2, 2, 2, 0)),
    (128, 128): ((128, 64, 8, 2, 4, 2, 2, 2), (64, 64, 4, 1, 2, 2, 2, 0)),
    (256, 256): ((64, 64, 8, 2, 2, 2, 1, 0), (64, 64, 8, 1, 2, 2, 2, 0)),
}
# Where another architecture's register allocation would spill with those.
_ALL_ON: dict[tuple[str, tuple[int, int], str], tuple[Grid, ...]] = {
    **{(arch, (128, 128), SCORES): ((64, 64, 8, 1, 2, 2, 2, 0),) for arch in ("sm_80", "sm_86", "sm_89")},
    ("sm_100", (128, 128), SCORES): ((128, 64, 8, 2, 4, 4, 2, 0),),
    ("sm_120", (128, 128), PLAIN): ((64, 64, 4, 1, 2, 2, 4, 0),),
    ("sm_120", (128, 128), SCORES): ((64, 64, 8, 1, 2, 2, 2, 0),),
}


def all_config(arch: str, element: str, dims: tuple[int, int] | None, variant: str) -> BwdAll80Config | None:
    """The configuration that makes all three gradients; None: there is none."""
    if dims not in TILES_ALL_SM80 or (variant != PLAIN and dims not in ((96, 96), (128, 128))):  # 64 would spill
        return None
    grids = _ALL_ON.get((SIBLINGS.get(arch, arch), dims, variant), TILES_ALL_SM80[dims])
    known = [BwdAll80Config(element, *dims, *grid, variant) for grid in grids]
    fit = [config for config in known if config.smem_bytes <= MAX_SMEM[arch]]
    room = MAX_SMEM[arch] + RESERVED_SMEM  # of a multiprocessor
    full = [config for config in fit if config.min_blocks * (config.smem_bytes + RESERVED_SMEM) <= room]
    return next(iter(full or fit), None)


def bias_config(element: str, dims: tuple[int, int]) -> BwdBias80Config:
    """The configuration of a compiled size."""
    if element == "fp32":
        return BwdBias80Config(element, *dims, 32, 32 if dims[0] <= 128 else 16, 2)
    return BwdBias80Config(element, *dims, 64, 32, 4)


# Of the Hopper kernel, by compiled head dims: of dk and dv, and of dq. Measured on an H200; benchmarks/NOTEBOOK.md has
# the candidates.
Tile = tuple[int, int, int]  # rows, columns, stages
TILES_BWD_SM90: dict[tuple[int, int], tuple[Tile, Tile]] = {
    (64, 64): ((128, 96, 3), (192, 64, 3)),
    (96, 96): ((128, 64, 2), (128, 96, 3)),
    (128, 128): ((128, 64, 2), (128, 80, 2)),
}

# The same for wide head dims, where bwd_sm90.cuh makes dq alone and bwd_wide_sm90.cuh the rest. Others: not measured.
TILES_DQ_SM90: dict[tuple[int, int], Tile] = {
    (192, 128): (128, 80, 2),
    (192, 192): (128, 80, 2),
    (256, 256): (128, 48, 2),
}
# Of q and of dout, and BwdPair90Config.shares. With 192 columns dq in a launch of its own takes less time.
STAGES_PAIR_SM90 = {(256, 256): (2, 1, True)}
STAGES_WIDE_SM90 = {(192, 128): 3, (192, 192): 3, (256, 256): 2}


def config_wide(element: str, dims: tuple[int, int], part: str) -> BwdWide90Config:
    """The configuration of a compiled size of the Hopper kernel for wide head dims."""
    return BwdWide90Config(element, *dims, 64, STAGES_WIDE_SM90[dims], part)


def config_sm90(element: str, dims: tuple[int, int], part: str, variant: str = PLAIN) -> Bwd90Config:
    """The configuration of a compiled size."""
    if part == "q" and dims in TILES_DQ_SM90:
        return Bwd90Config(element, *dims, *TILES_DQ_SM90[dims], part, variant)
    if part == "qkv":
        tile = (64, 2) if dims[0] > 64 else (128, 2) if variant == PLAIN else (64, 4)
        return Bwd90Config(element, *dims, 128, *tile, part, variant)
    return Bwd90Config(element, *dims, *TILES_BWD_SM90[dims][part == "q"], part, variant)


def together(element: str, dims: tuple[int, int], variant: str) -> bool:
    """Whether one launch makes dk and dv."""
    apart = dims in _APART or (dims in _APART_CHANGED and variant in (SCORES, BIAS))
    return element != "fp32" and not apart
