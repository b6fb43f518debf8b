"""The emulated GPU itself: its instructions against NumPy, and that it reports what a kernel must not do."""

from __future__ import annotations

import re
import struct
from pathlib import Path
from typing import Any

import emulate
import ml_dtypes
import numpy as np
import pytest
from emulate import BuildError, EmulationError, guarded, tensor_map
from numpy.typing import NDArray

from flashmoe_cupy.dtypes import BF16
from flashmoe_cupy.jit.tensormap import TensorMap

pytestmark = pytest.mark.skipif(emulate.missing() is not None, reason=str(emulate.missing()))

ROOT = Path(__file__).resolve().parent.parent
PTX = sorted(path.name for path in (ROOT / "cuda_src" / "ptx").glob("*.cuh"))
SEEDS = range(8)
Array = NDArray[Any]


def unit(body: str, *headers: str) -> str:
    """A translation unit whose kernel has two tensor maps, four pointers and a number, and `smem`."""
    includes = "".join(f'#include "{name}"\n' for name in ("prelude.cuh", *headers))
    return f"""{includes}
namespace fm {{
struct Params {{
  TensorMap maps[2];
  void* at[4];
  int which;
}};
// The accumulator of a warpgroup to a row-major matrix.
template <int kN>
FM_DEVICE void put(void* to, const float (&d)[kN][4]) {{
  for (int i = 0; i < 4 * kN; ++i) {{
    const int row = thread_index() / 32 * 16 + lane_id() / 4 + i % 4 / 2 * 8;
    static_cast<float*>(to)[row * 8 * kN + i / 4 * 8 + lane_id() % 4 * 2 + i % 2] = d[i / 4][i % 4];
  }}
}}
FM_DEVICE void run(const Params& p) {{
  extern __shared__ __align__(1024) u8 smem[];
  const int thread = threadIdx.x, lane = lane_id(), block = blockIdx.x;
  const u32 s_base = smem_address(smem);
  {body}
}}
}}  // namespace fm
extern "C" __global__ void __launch_bounds__(128, 1) fm_entry(const __grid_constant__ fm::Params p) {{ fm::run(p); }}
"""


def launch(
    tu: str, *arrays: Array, maps: tuple[bytes, ...] = (), which: int = 0, grid: int = 1, threads: int = 128,
    smem: int = 65536, seed: int = 0, **options: Any,
) -> None:  # fmt: skip
    pointers = [array.ctypes.data for array in arrays] + [0] * (4 - len(arrays))
    params = b"".join(maps).ljust(256, b"\0") + struct.pack("4Qi", *pointers, which)
    emulate.run(tu, params.ljust(384, b"\0"), grid, threads, smem, seed, **options)


def random_bf16(rng: np.random.Generator, *shape: int) -> Array:
    return guarded(rng.standard_normal(shape).astype(ml_dtypes.bfloat16))


# ---------------------------------------------------------------------------------------------------------------------
# instructions

WARP = unit(
    """
  const u32* in = static_cast<const u32*>(p.at[0]);
  u32* out = static_cast<u32*>(p.at[1]) + thread * 12;
  const u32 x = in[thread];
  out[0] = __reduce_max_sync(0xffffffffu, x), out[1] = __reduce_min_sync(0xffffffffu, x);
  out[2] = __reduce_add_sync(0xffffffffu, x), out[3] = __match_any_sync(0xffffffffu, x & 3);
  out[4] = __ballot_sync(0xffffffffu, x & 1), out[5] = __shfl_sync(0xffffffffu, x, 7);
  out[6] = __shfl_xor_sync(0xffffffffu, x, 5);
  out[7] = __shfl_up_sync(0xffffffffu, x, 3), out[8] = __shfl_down_sync(0xffffffffu, x, 3, 16);
  out[9] = __any_sync(0xffffffffu, x == in[0]), out[10] = __reduce_or_sync(0xffffffffu, x);
  out[11] = lane < 16 ? __reduce_add_sync(0x0000ffffu, x) : __reduce_max_sync(0xffff0000u, x);
"""
)


@pytest.mark.parametrize("seed", range(3))
def test_warp_instructions(seed: int, rng: np.random.Generator) -> None:
    x = rng.integers(0, 2**32, 128, dtype=np.uint32)
    out = guarded(np.zeros((128, 12), np.uint32))
    launch(WARP, guarded(x), out, seed=seed)
    lane = np.arange(32)
    for warp, v in enumerate(x.reshape(4, 32)):
        whole = [v.max(), v.min(), v.sum(dtype=np.uint32)]
        bits = np.uint32(1) << lane.astype(np.uint32)
        same = [bits[(v & 3) == (one & 3)].sum(dtype=np.uint32) for one in v]
        halves = [v[:16].sum(dtype=np.uint32)] * 16 + [v[16:].max()] * 16
        rest = [
            same, [bits[v & 1 == 1].sum(dtype=np.uint32)] * 32, [v[7]] * 32, v[lane ^ 5],
            np.where(lane < 3, v, v[lane - 3]), np.where(lane % 16 > 12, v, v[(lane + 3) % 32]),
            [np.any(v == x[0])] * 32, [np.bitwise_or.reduce(v)] * 32, halves,
        ]  # fmt: skip
        want = np.array([[one] * 32 for one in whole] + rest, np.uint32).T
        assert np.array_equal(out[32 * warp : 32 * warp + 32], want)


PRODUCTS = unit(
    """
  // A tile of x (64 x 64) and one of c (64 x 128) in both layouts: as rows of an operand, or as its columns.
  using TileA = SmemTile<bf16, 64, 64>;
  using TileB = SmemTile<bf16, 128, 64>;
  using TileC = SmemTile<bf16, 64, 128>;
  const u32 s_a = s_base, s_b = s_a + TileA::kBytes, s_c = s_b + TileB::kBytes, s_full = s_c + TileC::kBytes;
  if (thread == 0) mbarrier_init(s_full, 1), fence_mbarrier_init();
  __syncthreads();
  if (thread == 0) {
    mbarrier_arrive_expect_tx(s_full, TileA::kBytes + TileB::kBytes + TileC::kBytes);
    tma_load_2d(s_a, p.maps[0], s_full, 0, p.which, -2);
    for (int i = 0; i < 2; ++i) tma_load_2d(s_b + i * 8192, p.maps[0], s_full, 0, 0, 64 * i);
    for (int i = 0; i < 2; ++i) tma_load_2d(s_c + i * 8192, p.maps[1], s_full, 0, 64 * i, 0);
  }
  mbarrier_wait_parity(s_full, 0);
  float d[4][1][16][4];
  u32 r[4][4];
  for (int k = 0; k < 4; ++k)
    ldmatrix_x4(r[k], s_a + (thread / 32 * 16 + lane % 16) * 128 + (((k * 2 + lane / 16) ^ (lane & 7)) << 4));
  int calls = 0;
  wgmma_fence();
  multiply<bf16, 64>(d[0], KMajor<TileA>(s_a), KMajor<TileB>(s_b), true);
  wgmma_commit_group();
  multiply<bf16, 1>(d[1][0], r, MNMajor<TileC>(s_c), true, [&] { ++calls; });
  wgmma_commit_group();
  multiply<bf16, 64>(d[2], MNMajor<TileA>(s_a), KMajor<TileB>(s_b), true);
  wgmma_commit_group();
  multiply<bf16, 64>(d[3], MNMajor<TileA>(s_a), MNMajor<TileC>(s_c), true);
  multiply<bf16, 64>(d[3], MNMajor<TileA>(s_a), MNMajor<TileC>(s_c), calls != 1);
  wgmma_commit_group();
  wait_for_products<3>(d[0]);
  for (int i = 1; i < 4; ++i) wait_for_products<0>(d[i]);
  for (int i = 0; i < 4; ++i) put(p.at[i], d[i][0]);
""",
    "ptx/tma.cuh", "ptx/mbarrier.cuh", "ptx/ldmatrix.cuh", "tile/warpgroup_gemm.cuh",
)  # fmt: skip


@pytest.mark.parametrize("seed", range(5))
def test_products_and_bulk_loads(seed: int, rng: np.random.Generator) -> None:
    """Both layouts of A and B, A from both places; boxes that begin before the tensor and end behind it; strides."""
    x, c = random_bf16(rng, 120, 72)[:, :64], random_bf16(rng, 60, 128)
    maps = (TensorMap(BF16, (64, 120), (144,), (64, 64)), TensorMap(BF16, (128, 60), (256,), (64, 64)))
    d = [guarded(np.zeros((64, 128), np.float32)) for _ in range(4)]
    encoded = (tensor_map(maps[0], x.ctypes.data), tensor_map(maps[1], c.ctypes.data))
    launch(PRODUCTS, *d, maps=encoded, which=8, seed=seed)
    whole, rows = x.astype(np.float64), np.zeros((64, 128))
    a = np.zeros((64, 64))
    a[2:, :56] = whole[:62, 8:]
    b = np.vstack([whole, np.zeros((8, 64))])
    rows[:60] = c.astype(np.float64)
    for got, want in zip(d, (a @ b.T, a @ rows, a.T @ b.T, 2 * (a.T @ rows)), strict=True):
        assert np.allclose(got, want, rtol=1e-5, atol=1e-4)


GATHER = unit(
    """
  // Rows gathered by cp.async, whose arrivals count at a barrier; the consumers' fence makes them a product's operand.
  const u32 s_a = s_base, s_b = s_base + 8192, s_full = s_base + 16384;
  if (thread == 0) mbarrier_init(s_full, 128);
  __syncthreads();
  const int* rows = static_cast<const int*>(p.at[1]);
  for (int i = thread; i < 128 * 8; i += 128) {
    const int row = rows[i / 8], chunk = i % 8 ^ (i / 8 & 7);
    cp_async_cg_16(s_a + i / 8 * 128 + chunk * 16, static_cast<u8*>(p.at[0]) + row * 128 + i % 8 * 16, row >= 0);
  }
  cp_async_mbarrier_arrive_noinc(s_full);
  mbarrier_wait_parity(s_full, 0);
  if (p.which == 0) fence_proxy_async();
  auto operand = [](u32 s_address) { return wgmma_descriptor(s_address, 8192); };  // panels 8 KiB apart
  float d[8][4];
  wgmma_fence();
  for (int k = 0; k < 4; ++k) Wgmma<bf16, 64, false>::ss(d, operand(s_a + k * 32), operand(s_b + k * 32), k != 0);
  wgmma_commit_group();
  wgmma_wait_group<0>(d);
  put(p.at[2], d);
""",
    "ptx/cp_async.cuh", "ptx/mbarrier.cuh", "ptx/tma.cuh", "ptx/wgmma.cuh",
)  # fmt: skip


@pytest.mark.parametrize("seed", range(5))
def test_gathered_operand(seed: int, rng: np.random.Generator) -> None:
    x, rows = random_bf16(rng, 90, 64), guarded(rng.integers(-1, 90, 128, dtype=np.int32))
    d = guarded(np.zeros((64, 64), np.float32))
    launch(GATHER, x, rows, d, seed=seed)
    taken = np.where(rows[:, None] < 0, 0, x.astype(np.float64)[rows])
    assert np.allclose(d, taken[:64] @ taken[64:].T, rtol=1e-5, atol=1e-4)
    with pytest.raises(EmulationError, match=r"wgmma reads shared \+0x.*without a fence\.proxy\.async"):
        launch(GATHER, x, rows, d, which=1, seed=seed)


CLUSTER = unit(
    """
  // Block 0 loads for both; each block gives its buffer back to block 0 before the next load. which: faults.
  const u32 rank = cluster_ctarank(), s_full = s_base + 1024, s_empty = s_full + 8;
  if (thread == 0) mbarrier_init(s_full, 1), mbarrier_init(s_empty, 2), fence_mbarrier_init();
  barrier_cluster_arrive();
  barrier_cluster_wait();
  for (int round = 0; round < 6; ++round) {
    if (rank == 0 && thread == 0) {
      mbarrier_wait_parity(s_empty, round + 1 & 1);
      if (p.which == 1) barrier_cluster_wait();
    }
    if (thread == 0) mbarrier_arrive_expect_tx(s_full, 1024);
    if (rank == 0 && thread == 0) tma_load_2d_multicast(s_base, p.maps[0], s_full, 3, 0, 0, round * 8);
    mbarrier_wait_parity(s_full, round & 1);
    const u32 x = ld_shared_b32(s_base + thread * 8);
    static_cast<u32*>(p.at[0])[(round * 4 + block) * 128 + thread] = x;
    __syncthreads();
    if (thread == 0 && p.which != 2) mbarrier_arrive_cluster(mapa(s_empty, 0));
  }
  if (p.which == 3 && rank == 1) return;
  barrier_cluster_arrive();
  barrier_cluster_wait();
""",
    "ptx/cluster.cuh", "ptx/mbarrier.cuh", "ptx/tma.cuh", "ptx/shared_memory.cuh",
)  # fmt: skip


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("resident", [1, 2])
def test_clusters(seed: int, resident: int, rng: np.random.Generator) -> None:
    x = guarded(rng.integers(0, 2**15, (48, 64), dtype=np.uint16))
    of = tensor_map(TensorMap(BF16, (64, 48), (128,), (64, 8)), x.ctypes.data)
    out = guarded(np.zeros((6, 4, 128), np.uint32))
    launch(CLUSTER, out, maps=(of,), grid=4, smem=2048, cluster=2, resident=resident, seed=seed)
    row, chunk = np.divmod(np.arange(128), 16)
    column = (chunk // 2 ^ row) * 8 + chunk % 2 * 4
    for i, box in enumerate(x.reshape(6, 8, 64).astype(np.uint32)):
        want = box[row, column] | box[row, column + 1] << 16
        assert all(np.array_equal(out[i, block], want) for block in range(4))
    for fault, words in ((1, "without an arrival"), (2, r"deadlock(.|\n)*\+0x408, parity 0: its phase 0 lacks 2 of 2")):
        with pytest.raises(EmulationError, match=words):
            launch(CLUSTER, out, maps=(of,), which=fault, grid=4, smem=2048, cluster=2, seed=seed)
    launch(CLUSTER, out, maps=(of,), which=3, grid=4, smem=2048, cluster=2, seed=seed)


TURNS = unit(
    """
  // Blocks take turns through global memory.
  u32* turn = static_cast<u32*>(p.at[0]);
  if (thread == 0) {
    while (ld_acquire_gpu_u32(turn) != gridDim.x - 1 - block) {}
    static_cast<u32*>(p.at[1])[block] = atom_add_u32(turn + 1, 10);
    red_add_release_gpu_u32(turn, 1);
  }
""",
    "ptx/global_memory.cuh",
)


@pytest.mark.parametrize("seed", SEEDS)
def test_blocks_that_wait_for_each_other(seed: int) -> None:
    turn, out = guarded(np.zeros(2, np.uint32)), guarded(np.zeros(4, np.uint32))
    launch(TURNS, turn, out, grid=4, threads=32, smem=0, resident=4, seed=seed)
    assert out.tolist() == [30, 20, 10, 0]
    turn[:] = 7
    with pytest.raises(EmulationError, match=r"nothing changes.*\n.*block"):
        launch(TURNS, turn, out, grid=4, threads=32, smem=0, resident=4, seed=seed)


# ---------------------------------------------------------------------------------------------------------------------
# what is reported

# What a kernel does, and what the report says of it. load: a box of 1024 bytes; product: 64 x 64 from descriptors.
MISTAKES = (
    ("st_shared_v4_b32(s_base + 4, 0, 0, 0, 0);", r"a store: shared \+0x4 is no multiple of 16"),
    ("ld_shared_b32(s_base + 65536);", r"a load: 4 bytes at shared \+0x10000, of 0x10000"),
    ("*reinterpret_cast<volatile u32*>(smem + 65544) = 1;", r"shared memory \+0x10008, behind its end"),
    ("smem_address(static_cast<u8*>(p.at[0]));", "in shared memory, where it does not lie"),
    ("reinterpret_cast<volatile uint4*>(static_cast<u8*>(p.at[0]) + 4)->x = 1;", "a misaligned access"),
    ("float x[4] = {}; x[p.which] = 1; static_cast<float*>(p.at[0])[0] = x[1];", "an index beyond a local array"),
    (
        "if (thread < 17) static_cast<float*>(p.at[0])[thread] = 1;",
        r"thread 16 .*a write to .* \(0 bytes behind the end of the victim\)",
    ),
    (
        "if (thread == 9) d[0][0] = static_cast<volatile float*>(p.at[1])[-4];",
        r"thread 9 .* \(16 bytes before the start of the other",
    ),
    ("static_cast<volatile int*>(p.at[0])[0] = thread / (p.which - p.which);", "divided by zero"),
    ("for (volatile int i = 0; i >= 0;) {}", "out of time, in a thread that neither waits nor ends"),
    ("for (;;) __syncwarp();", "out of time"),
    ("static_cast<volatile u8*>(__builtin_alloca(1 << 19))[0] = 1;", "a local array is too large for the stack"),
    ("if (thread == 77) __trap();", r"thread 77 \(warp 2, lane 13\): __trap"),
    (
        "if (lane != 0) __syncwarp(); else __syncthreads();",
        r"warp 0 .* 3 .*__syncwarp, which lanes 00000001 have not reached",
    ),
    ("if (lane < 4) __syncwarp(); else __ballot_sync(~0u, 1);", "lanes 0000000f of the warp are in __syncwarp"),
    ("if (lane < 31) __syncwarp();", "the thread ends while lanes 7fffffff"),
    ("if (lane < 4) break; __syncwarp();", r"of which 0000000f have exited|ends while lanes"),
    ("if (lane < 16) __shfl_sync(0xffffu, lane, 16);", "which is not in the mask 0000ffff"),
    ("if (lane < 16) __syncwarp(0xffff0000u);", "to which this lane does not belong"),
    ("if (thread < 64) __syncthreads(); else barrier_sync(1, 128);", "__syncthreads, where 64 of 128 threads"),
    ("barrier_sync(1, thread < 64 ? 64 : 96);", "barrier 1 is waited for with 64 threads and with 96"),
    (
        "if (thread < 64) barrier_sync(1, 64); __syncthreads(); if (thread >= 64) barrier_sync(1, 64);",
        r"barrier 1 has two owners: warps 3 have waited at it, now warp [23] does",
    ),
    ("mbarrier_arrive(s_base + 64);", r"no mbarrier was initialised at shared \+0x40"),
    (
        "init(s_base, 1); smem[2] = 1; __syncthreads(); mbarrier_arrive(s_base);",
        r"mbarrier at shared \+0x0 has been overwritten",
    ),
    ("init(s_base, 1); if (thread == 9) mbarrier_init(s_base, 1);", "is initialised twice"),
    ("init(s_base, 1); mbarrier_arrive_expect_tx(s_base, 64);", "more than 1 arrivals in a phase"),
    (
        "init(s_base, 3); mbarrier_wait_parity(s_base, 0);",
        r"\+0x0, parity 0: its phase 0 lacks 3 of 3 arrivals and 0 bytes",
    ),
    ("init(s_base, 1); while (!mbarrier_test_wait_parity(s_base, 0)) {}", "asks again and again"),
    ("product(s_base);", r"wgmma without wgmma.fence"),
    ("wgmma_fence(); product(s_base); wgmma_commit_group();", r"ends while wgmma products .* are under way"),
    ("wgmma_fence(); product(s_base + thread / 96 * 1024); __syncthreads();", "issue different products"),
    (
        "wgmma_fence(); product(s_base + 61440); wgmma_commit_group(); wgmma_wait_group<0>(d);",
        r"wgmma: 16 bytes at shared \+0x10000",
    ),
    ("prefetch_tensormap(p.maps[1]);", "these 128 bytes are no tensor map"),
    ("tma_store_4d(p.maps[0], s_base, 0, 0, 0, 0);", "a copy of 4 dimensions with a tensor map of 2"),
    ("tma_store_2d(p.maps[0], s_base + 64, 0, 0);", r"a bulk store: shared \+0x40 is no multiple of 128"),
    (
        "init(s_full, 1); if (thread == 0) tma_load_2d(s_base, p.maps[0], s_full, 0, 4, 0);",
        "from element 4 of rows of 2-byte elements: no multiple of 16 bytes",
    ),
    ("if (thread == 0) tma_store_2d(p.maps[0], s_base, 12, 0);", "from element 12 of rows"),
    ("init(s_full, 1); if (thread == 0) load(1024);", "ends while a bulk copy of thread 0 into its shared memory"),
    (
        "init(s_full, 1); if (thread == 0) load(1000); mbarrier_wait_parity(s_full, 0);",
        "24 bytes more than announced landed",
    ),
    (
        "init(s_full, 1); if (thread == 0) load(1040); mbarrier_wait_parity(s_full, 0);",
        "lacks 0 of 1 arrivals and 16 bytes",
    ),
    (
        "if (thread == 0) mbarrier_init(s_full, 1), load(1024);",
        r"was initialised by thread 0 without fence.mbarrier_init",
    ),
    ("if (thread == 3) tma_store_2d(p.maps[0], s_base, 0, 0);", "before a bulk store of thread 3 has read"),
    ("cp_async_cg_16(s_base, static_cast<u8*>(p.at[0]) + 8, true);", r"cp.async reads from .* no multiple of 16"),
)  # fmt: skip
FAULTY = unit(
    """
  const u32 s_full = s_base + 32768;
  float d[8][4] = {};
  auto init = [&](u32 s_barrier, u32 arrivals) {
    if (thread == 0) mbarrier_init(s_barrier, arrivals), fence_mbarrier_init();
    __syncthreads();
  };
  auto load = [&](u32 bytes) {
    mbarrier_arrive_expect_tx(s_full, bytes);
    tma_load_2d(s_base, p.maps[0], s_full, 0, 0, 0);
  };
  auto operand = [](u32 s_address) { return wgmma_descriptor(s_address, 8192); };  // panels 8 KiB apart
  auto product = [&](u32 s_a) { Wgmma<bf16, 64, false>::ss(d, operand(s_a), operand(s_base), 0); };
  switch (p.which) {
"""
    + "".join(f"case {i}: {{ {code} break; }}\n" for i, (code, _) in enumerate(MISTAKES))
    + "}",
    *[f"ptx/{name}.cuh" for name in ("cp_async", "mbarrier", "shared_memory", "tma", "warpgroup", "wgmma")],
)


@pytest.mark.parametrize("which", range(len(MISTAKES)), ids=[code for code, _ in MISTAKES])
def test_mistakes_are_reported(which: int) -> None:
    victim = guarded(np.zeros(16, np.float32), "the victim")
    other = guarded(np.zeros(4, np.float32), "the other", before=True)
    x = guarded(np.zeros((8, 64), np.uint16))
    of = tensor_map(TensorMap(BF16, (64, 8), (128,), (64, 8)), x.ctypes.data)
    with pytest.raises(EmulationError, match=MISTAKES[which][1]) as caught:
        launch(FAULTY, victim, other, maps=(of,), which=which, seed=1, limit_s=0.3)
    assert "(seed 1)" in str(caught.value)


def test_nothing_to_report() -> None:
    """The same kernel, asked for nothing; and after so many errors the machine still works."""
    launch(FAULTY, which=-1, grid=3, seed=5)


def test_what_does_not_compile() -> None:
    with pytest.raises(BuildError, match=r"weak declaration of .*counts"):
        emulate.build(unit("__shared__ int counts[32]; counts[lane] = 1;"))
    with pytest.raises(BuildError, match=r"entry\.cu"):
        emulate.build(unit("return 1;"))


# ---------------------------------------------------------------------------------------------------------------------
# around it

WRAPPER = re.compile(r"^(?:FM_DEVICE|inline|__device__ __forceinline__) (\w+) (\w+)\((.*?)\) \{", re.MULTILINE)
NAME = re.compile(r" *=.*|(?<=[\w&*] )\w+$|(?<=\(&)\w+")  # of a parameter, and its default


def signatures(text: str) -> dict[str, list[tuple[str, ...]]]:
    """Name -> for each function of that name its result and the types of its parameters."""
    found: dict[str, list[tuple[str, ...]]] = {}
    for result, name, parameters in WRAPPER.findall(text):
        types = [NAME.sub("", one).strip() for one in parameters.split(", ") if one]
        found.setdefault(name, []).append((result, *types))
    return found


@pytest.mark.parametrize("name", PTX)
def test_every_wrapper_has_its_twin(name: str) -> None:
    want = signatures((ROOT / "cuda_src" / "ptx" / name).read_text(encoding="utf-8"))
    mine = signatures((ROOT / "tests" / "emulation" / "ptx" / name).read_text(encoding="utf-8"))
    assert want and {wrapper: mine.get(wrapper) for wrapper in want} == want


def test_guarded_arrays_are_copies() -> None:
    x = np.arange(15, dtype=np.float64).reshape(3, 5)
    for before in (False, True):
        found = guarded(x, before=before)
        assert np.array_equal(found, x) and found.dtype == x.dtype and found.ctypes.data % 16 == 0
        edge = found.ctypes.data if before else found.ctypes.data + 128
        assert edge % 4096 == 0
    assert guarded(np.zeros((0, 4), np.int32)).shape == (0, 4)


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"strides": (136,)}, "strides"),
        ({"box": (64, 300)}, "box"),
        ({"box": (32, 8)}, "swizzle"),
        ({"dims": (64, 0)}, "dimensions"),
        ({"strides": ()}, "rank"),
    ],
)
def test_tensor_maps_that_the_driver_would_refuse(change: dict[str, Any], word: str) -> None:
    good = TensorMap(BF16, (64, 8), (128,), (64, 8))
    assert len(tensor_map(good, 4096)) == 128
    with pytest.raises(ValueError, match=word):
        tensor_map(good._replace(**change), 4096)
    with pytest.raises(ValueError, match="address"):
        tensor_map(good, 4100)
