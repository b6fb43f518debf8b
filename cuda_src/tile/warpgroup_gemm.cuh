// Products of a warpgroup on wgmma. The type of an operand says where it lies and which of its dimensions is
// summed; nobody else counts the bytes of a descriptor.
#pragma once
#include "ptx/shared_memory.cuh"
#include "ptx/tma.cuh"
#include "ptx/warpgroup.cuh"
#include "ptx/wgmma.cuh"
#include "tile/smem.cuh"

namespace fm {

// Tiles whose rows are rows of A, or columns of B: the summed dimension runs along a row (K-major). kTiles of
// them, one below the other, may take turns panel by panel. Eight rows are 64: all groups of eight lie in the
// same place.
template <class Tile, int kTiles = 1>
struct KMajor {
  enum : bool { kTransposed = false };
  static_assert(Tile::kRowBytes == 128, "panels of 64 values with the 128-byte swizzle");
  u64 descriptor;

  FM_DEVICE explicit KMajor(u32 s_tile)
      : descriptor(wgmma_descriptor(s_tile, 0, Tile::kRows == 8 ? 0 : 1024)) {}
  // Where values 16 step .. 16 step + 15 of the summed dimension lie, from row `row` on, a multiple of 8.
  FM_DEVICE u64 at(int step, int row = 0) const {
    return descriptor +
           ((step / 4 * kTiles * Tile::kPanelBytes + row * Tile::kRowBytes + step % 4 * 32) >> 4);
  }
};

// A tile whose columns are rows of A, or columns of B: the summed dimension runs across the rows (MN-major),
// as that of V.
template <class Tile>
struct MNMajor {
  enum : bool { kTransposed = true };
  static_assert(Tile::kRowBytes == 128, "panels of 64 values with the 128-byte swizzle");
  u64 descriptor;

  FM_DEVICE explicit MNMajor(u32 s_tile) : descriptor(wgmma_descriptor(s_tile, Tile::kPanelBytes)) {}
  // The same, from column `column` on, a multiple of 64.
  FM_DEVICE u64 at(int step, int column = 0) const {
    return descriptor + ((column / 64 * Tile::kPanelBytes + step * 16 * Tile::kRowBytes) >> 4);
  }
};

// D (64 kM x 8 kN) += A B, or = where D is fresh, over kDepth values of the summed dimension; A and B in
// shared memory. The products of one group: the caller fences before, commits and waits after.
template <class E, int kDepth, class A, class B, int kM, int kN>
FM_DEVICE void multiply(float (&d)[kM][kN][4], const A& a, const B& b, bool fresh) {
  static_assert(kDepth % 16 == 0, "a step of wgmma sums 16 values");
#pragma unroll
  for (int step = 0; step < kDepth / 16; ++step)
#pragma unroll
    for (int m = 0; m < kM; ++m)
      Wgmma<E, 8 * kN, B::kTransposed>::template ss<A::kTransposed>(d[m], a.at(step, 64 * m), b.at(step),
                                                                    step != 0 || !fresh);
}

// The same with A (64 x 16 kSteps) in registers, as pack_operand makes it. Calls before_last() in front of
// the last kLast steps.
template <class E, int kLast, class B, int kSteps, int kN, class F>
FM_DEVICE void multiply(float (&d)[kN][4], const u32 (&a)[kSteps][4], const B& b, bool fresh,
                        F&& before_last) {
#pragma unroll
  for (int step = 0; step < kSteps; ++step) {
    if (step == kSteps - kLast) before_last();
    Wgmma<E, 8 * kN, B::kTransposed>::rs(d, a[step], b.at(step), step != 0 || !fresh);
  }
}

// An accumulator as A in registers: two neighbouring 16 x 8 tiles are, value for value, one 16 x 16 operand.
template <class E, int kSteps, int kN>
FM_DEVICE void pack_operand(u32 (&a)[kSteps][4], const float (&d)[kN][4]) {
  static_assert(kN == 2 * kSteps);
#pragma unroll
  for (int i = 0; i < kSteps; ++i)
#pragma unroll
    for (int j = 0; j < 4; ++j)
      a[i][j] = pack2<E>(d[2 * i + j / 2][j % 2 * 2], d[2 * i + j / 2][j % 2 * 2 + 1]);
}

// ---- operands that the warpgroup changes where they lie; it meets at named barrier `barrier` ----

// Times `factor`. Only bf16.
template <class E, class Tile>
FM_DEVICE void scale_tile(u32 s_tile, float factor, int barrier) {
  const u32 s_thread = s_tile + threadIdx.x % 128 * 16;
  const u32 scale = pack2<E>(factor, factor);
#pragma unroll
  for (int i = 0; i < Tile::kBytes; i += 128 * 16) {
    u32 r[4];
    ld_shared_v4_b32(r, s_thread + i);
    st_shared_v4_b32(s_thread + i, mul_rn_bf16x2(r[0], scale), mul_rn_bf16x2(r[1], scale),
                     mul_rn_bf16x2(r[2], scale), mul_rn_bf16x2(r[3], scale));
  }
  fence_proxy_async();
  barrier_sync(barrier, 128);
}

// `rows` rows from row `first` on become 0.
template <class Tile>
FM_DEVICE void clear_rows(u32 s_tile, int first, int rows, int barrier) {
  const u32 s_first = s_tile + first * Tile::kRowBytes;
  for (int i = thread_index() % 128; i < rows * Tile::kPanelChunks; i += 128)
#pragma unroll
    for (int panel = 0; panel < Tile::kPanels; ++panel)
      st_shared_v4_b32(s_first + panel * Tile::kPanelBytes + 16 * i, 0, 0, 0, 0);
  fence_proxy_async();
  barrier_sync(barrier, 128);
}

// ---- waiting ----

// Waits until at most kPending groups are under way; all of d belonged to one that is then done.
template <int kPending, int kM, int kN>
FM_DEVICE void wait_for_products(float (&d)[kM][kN][4]) {
  wgmma_wait_group<kPending>(d[0]);
#pragma unroll
  for (int m = 1; m < kM; ++m) wgmma_fence_operand(d[m]);
}

}  // namespace fm
