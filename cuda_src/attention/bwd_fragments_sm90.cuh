// What the Hopper kernels of attention's backward do alike with a step: statistics of its queries, keys that
// count, rows that are cleared, and dS on its way to shared memory. Rows of a tile are keys.
#pragma once
#include "attention/bwd_params.cuh"
#include "math/softmax.cuh"
#include "ptx/ldmatrix.cuh"
#include "ptx/shared_memory.cuh"
#include "tile/mask.cuh"

namespace fm {

// A warp's share of lse, by default in units of log2, and delta of kCols queries; those behind the last one
// get weights of 0.
template <int kCols>
struct StatisticsInRegisters {
  float lse[kCols / 32], delta[kCols / 32];
  // first: place of the first query in row_lse; there: how many exist from it on.
  FM_DEVICE StatisticsInRegisters(const AttentionBwdParams& p, i64 first, int there, float unit = kLog2e) {
#pragma unroll
    for (int i = 0; i < kCols / 32; ++i) {
      const int query = i * 32 + lane_id();
      lse[i] = query < there ? p.row_lse[first + query] * unit : infinity();
      delta[i] = query < there ? p.row_delta[first + query] : 0.f;
    }
  }
  FM_DEVICE void store(Statistics<kCols>& s) const {
#pragma unroll
    for (int i = 0; i < kCols / 32; ++i)
      s.lse[i * 32 + lane_id()] = lse[i], s.delta[i * 32 + lane_id()] = delta[i];
  }
};

// The band's mask. Keys behind the last one get no weights, which may be infinite: their scores are 0
// whatever lse is, and infinity times the zeros that are loaded as such keys would not be 0 in dq.
template <int kN>
FM_DEVICE void mask_keys(float (&r_s)[kN][4], const BandMask& band, int row, int col) {
  ColumnsSeen seen = {{~0u, ~0u}, {~0u, ~0u}};
  within_band(seen, band, row, col);
#pragma unroll
  for (int i = 0; i < 2; ++i)
    if (row + i * 8 + (lane_id() >> 2) >= band.rows) seen[i][0] = seen[i][1] = 0;
  mask_scores(r_s, seen);
}

// Rows of a tile from `first` on become 0, by kThreads threads behind the first warpgroup.
template <class Tile, int kThreads>
FM_DEVICE void clear_rows(u32 s_tile, int first) {
  const u32 s_first = s_tile + first * Tile::kRowBytes;
  for (int i = threadIdx.x - 128; i < (Tile::kRows - first) * Tile::kPanelChunks; i += kThreads)
#pragma unroll
    for (int panel = 0; panel < Tile::kPanels; ++panel)
      st_shared_v4_b32(s_first + panel * Tile::kPanelBytes + 16 * i, 0, 0, 0, 0);
}

// A warp's 16 rows of dS, packed as an operand, to rows `row` .. of a tile.
template <class Tile, int kSteps>
FM_DEVICE void store_scores(u32 s_tile, int row, const u32 (&r_ds)[kSteps][4]) {
  const int lane = lane_id();
#pragma unroll
  for (int i = 0; i < kSteps; ++i)
    stmatrix_x4(s_tile + Tile::offset(row + (lane >> 3 & 1) * 8 + (lane & 7), 2 * i + (lane >> 4)), r_ds[i]);
}

// Value e of column pair n of a packed operand.
template <class E, int kSteps>
FM_DEVICE float value_of(const u32 (&r)[kSteps][4], int n, int e) {
  const u32 both = r[n / 2][n % 2 * 2 + e / 2];
  return e % 2 == 0 ? low_of<E>(both) : high_of<E>(both);
}

// How fast scores grow with their scaled products, under a softcap: as they are, or rounded in pairs.
template <class E, int kCols, bool kRounded>
struct ScoreSlopes {
  float r[kCols / 8][4];
  FM_DEVICE void put(int n, int e, float low, float high) { r[n][e] = low, r[n][e + 1] = high; }
  FM_DEVICE float at(int n, int e) const { return r[n][e]; }
};
template <class E, int kCols>
struct ScoreSlopes<E, kCols, true> {
  u32 r[kCols / 16][4];
  FM_DEVICE void put(int n, int e, float low, float high) {
    r[n / 2][n % 2 * 2 + e / 2] = pack2<E>(low, high);
  }
  FM_DEVICE float at(int n, int e) const { return value_of<E>(r, n, e); }
};

// f(value, i, n, e, j) for each value a thread holds: its row i, column j of the tile.
template <int kN, class F>
FM_DEVICE void each_score(float (&r_s)[1][kN][4], F&& f) {
  const int t = lane_id() & 3;
#pragma unroll
  for (int n = 0; n < kN; ++n)
#pragma unroll
    for (int e = 0; e < 4; ++e) f(r_s[0][n][e], e / 2, n, e, n * 8 + 2 * t + e % 2);
}

// What scores are multiplied by to be in natural units, after change_scores.
template <class Variant>
FM_DEVICE float score_unit(const AttentionBwdParams& p) {
  if constexpr (!Variant::kScore) return p.softmax_scale;
  return p.softcap > 0.f ? p.softcap : p.softmax_scale > 0.f ? p.softmax_scale : 1.f;
}
// Of a head; 0: there is none.
template <class Variant>
FM_DEVICE float alibi_slope_of(const AttentionBwdParams& p, int batch, int head) {
  if constexpr (Variant::kScore)
    if (p.alibi_slopes != nullptr) return Variant::alibi_slope(forward_params(p), batch, head);
  return 0.f;
}

// Products become the tanh of `to_tanh` times each, by polynomials where a warp's are all small.
template <class Slopes, int kN>
FM_DEVICE void cap_scores(float (&r_s)[kN][4], float to_tanh, Slopes& slopes) {
  u32 bits[2] = {0, 0};  // of all: two chains, or they would wait for themselves
#pragma unroll
  for (int n = 0; n < kN; ++n)
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      r_s[n][e] *= 4.f * to_tanh;
      bits[e / 2] |= __float_as_uint(r_s[n][e]);
    }
  constexpr u32 kTwoOrMore = 0x40000000;  // the highest bit of the exponent
  if (__all_sync(0xffffffffu, ((bits[0] | bits[1]) & kTwoOrMore) == 0)) {
#pragma unroll
    for (int n = 0; n < kN; ++n)
#pragma unroll
      for (int e = 0; e < 4; ++e) r_s[n][e] = tanh_of_fourth(r_s[n][e]);
  } else {
#pragma unroll
    for (int n = 0; n < kN; ++n)
#pragma unroll
      for (int e = 0; e < 4; ++e) r_s[n][e] = tanh_exp2(0.25f * r_s[n][e]);
  }
#pragma unroll
  for (int n = 0; n < kN; ++n)
#pragma unroll
    for (int e = 0; e < 4; e += 2)
      slopes.put(n, e, fmaf(-r_s[n][e], r_s[n][e], 1.f), fmaf(-r_s[n][e + 1], r_s[n][e + 1], 1.f));
}

}  // namespace fm
