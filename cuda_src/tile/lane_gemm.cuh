// Products of one warp on mma.sync as in gemm.cuh, for 16-bit values, with fewer instructions for addresses:
// a lane keeps where its row begins, and what it needs of a panel lies one XOR away.
#pragma once
#include "tile/gemm.cuh"

namespace fm {

// Warps in a grid over a matrix of kRows x kCols, kDown of them from its first row to its last one.
template <int kWarps, int kDown, int kRows, int kCols>
struct WarpGrid {
  static constexpr int kAcross = kWarps / kDown, kTileRows = kRows / kDown, kTileCols = kCols / kAcross;
  static constexpr int kM = kTileRows / 16, kN = kTileCols / 8;
  using Tile = float[kM][kN][4];  // accumulators of a warp
  static_assert(kDown * kAcross == kWarps && kDown * kM * 16 == kRows && kAcross * kN * 8 == kCols);
  static_assert(kN % 2 == 0, "products make pairs of 8 columns");

  // Of a thread's warp: no shuffle, which would take longer.
  FM_DEVICE static int row(u32 thread) { return static_cast<int>(thread / (32 * kAcross) * kTileRows); }
  FM_DEVICE static int col(u32 thread) { return static_cast<int>(thread / 32 % kAcross * kTileCols); }
};

// What a lane gives to ldmatrix: the chunk of its own, in its row of a tile at a multiple of 128 bytes, and
// those kWidth chunks that follow, of which the warp's first one is a multiple of kWidth.
template <class T, int kWidth>
struct LaneChunks {
  static constexpr int kPanel = T::kPanelChunks;
  static constexpr bool kXor = kPanel % kWidth == 0 || kWidth % kPanel == 0;
  u32 s_tile, s_first;
  int row, chunk;

  FM_DEVICE LaneChunks(u32 s_tile_, int row_, int first, int half)
      : s_tile(s_tile_), row(row_), chunk(first + half) {
    s_first = s_tile + T::offset(row, chunk);
  }
  // `ahead`: an even number, known when compiled.
  FM_DEVICE u32 at(int ahead) const {
    if constexpr (kXor)
      return (s_first ^ (ahead % kPanel << 4)) + ahead / kPanel * T::kPanelBytes;
    else
      return s_tile + T::offset(row, chunk + ahead);
  }
};

// An operand whose rows hold the summed dimension along them; A rows, or columns of the product.
template <class T>
struct LaneRowsA {
  LaneChunks<T, T::kChunks> lane;
  FM_DEVICE LaneRowsA(u32 thread, u32 s_tile, int row)
      : lane(s_tile, row + (static_cast<int>(thread & 15)), 0, thread >> 4 & 1) {}
  FM_DEVICE void load(u32 (&r)[4], int m, int k) const {
    ldmatrix_x4(r, lane.at(2 * k) + m * 16 * T::kRowBytes);
  }
};
template <class T>
struct LaneRowsB {
  LaneChunks<T, T::kChunks> lane;
  FM_DEVICE LaneRowsB(u32 thread, u32 s_tile, int row)
      : lane(s_tile, row + (static_cast<int>(thread & 7)) + ((thread >> 4 & 1) << 3), 0, thread >> 3 & 1) {}
  FM_DEVICE void load(u32 (&r)[4], int n, int k) const {
    ldmatrix_x4(r, lane.at(2 * k) + n * 8 * T::kRowBytes);
  }
};
// The same where it lies across the rows, for kWidth chunks from a multiple of kWidth on.
template <class T, int kWidth>
struct LaneColsA {
  LaneChunks<T, kWidth> lane;
  FM_DEVICE LaneColsA(u32 thread, u32 s_tile, int chunk)
      : lane(s_tile, (static_cast<int>(thread & 7)) + ((thread >> 4 & 1) << 3), chunk, thread >> 3 & 1) {}
  FM_DEVICE void load(u32 (&r)[4], int m, int k) const {
    ldmatrix_x4_trans(r, lane.at(2 * m) + k * 16 * T::kRowBytes);
  }
};
template <class T, int kWidth>
struct LaneColsB {
  LaneChunks<T, kWidth> lane;
  FM_DEVICE LaneColsB(u32 thread, u32 s_tile, int chunk)
      : lane(s_tile, thread & 15, chunk, thread >> 4 & 1) {}
  FM_DEVICE void load(u32 (&r)[4], int n, int k) const {
    ldmatrix_x4_trans(r, lane.at(n) + k * 16 * T::kRowBytes);
  }
};

// An A operand that is an accumulator of an earlier product: a pair of neighbouring 16x8 tiles is, value for
// value, one 16x16 operand.
template <class E, int kM, int kN>
struct HeldA {
  const float (&p)[kM][kN][4];
  FM_DEVICE void load(u32 (&r)[4], int m, int k) const {
#pragma unroll
    for (int i = 0; i < 4; ++i)
      r[i] = pack2<E>(p[m][2 * k + i / 2][i % 2 * 2], p[m][2 * k + i / 2][i % 2 * 2 + 1]);
  }
};

// D += A B over kDepth slices of 16. kAhead: the operands of a slice are loaded before the products of the
// one in front. beside(k): what may be done beside the products of slice k.
template <class E, int kDepth, bool kAhead, int kM, int kN, class A, class B, class F>
FM_DEVICE void lane_gemm(float (&d)[kM][kN][4], const A& a, const B& b, F&& beside) {
  static_assert(sizeof(E) == 2 && kN % 2 == 0);
  constexpr int kBuffers = kAhead ? 2 : 1;
  u32 r_a[kBuffers][kM][4], r_b[kBuffers][kN / 2][4];
  auto load = [&](int k) {
#pragma unroll
    for (int m = 0; m < kM; ++m) a.load(r_a[k % kBuffers][m], m, k);
#pragma unroll
    for (int n = 0; n < kN; n += 2) b.load(r_b[k % kBuffers][n / 2], n, k);
  };
  if constexpr (kAhead) load(0);
#pragma unroll
  for (int k = 0; k < kDepth; ++k) {
    if (!kAhead)
      load(k);
    else if (k + 1 < kDepth)
      load(k + 1);
#pragma unroll
    for (int n = 0; n < kN; ++n)
#pragma unroll
      for (int m = 0; m < kM; ++m) {
        typename Step<E>::A one;
        one.set(r_a[k % kBuffers][m]);
        const u32(&pair)[4] = r_b[k % kBuffers][n / 2];
        Step<E>::mma(d[m][n], one, pair[n % 2 * 2], pair[n % 2 * 2 + 1]);
      }
    beside(k);
  }
}
template <class E, int kDepth, bool kAhead, int kM, int kN, class A, class B>
FM_DEVICE void lane_gemm(float (&d)[kM][kN][4], const A& a, const B& b) {
  lane_gemm<E, kDepth, kAhead>(d, a, b, [](int) {});
}

template <int kM, int kN>
FM_DEVICE void clear_accumulator(float (&d)[kM][kN][4]) {
#pragma unroll
  for (int m = 0; m < kM; ++m)
#pragma unroll
    for (int n = 0; n < kN; ++n)
#pragma unroll
      for (int i = 0; i < 4; ++i) d[m][n][i] = 0.f;
}

}  // namespace fm
