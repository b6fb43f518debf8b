// Band masks: row i of a matrix of rows x cols sees the columns first(i) .. last(i). Causal, sliding window
// and the end of a sequence are all bands, so one comparison pair per score serves them, and tiles inside the
// band pay nothing. Where heads are packed into tiles, 2^pack_bits rows that lie one behind the other are the
// same query.
#pragma once
#include "prelude.cuh"

namespace fm {

struct BandMask {
  int rows, cols;
  int shift;        // column that belongs to row 0: cols less the queries, the bottom-right alignment
  int left, right;  // -1: unlimited
  int pack_bits;

  FM_DEVICE int first(int row) const { return left < 0 ? 0 : max(0, (row >> pack_bits) + shift - left); }
  FM_DEVICE int last(int row) const {
    return right < 0 ? cols - 1 : min(cols - 1, (row >> pack_bits) + shift + right);
  }

  // Whether some pair of the tile lies outside of the band.
  template <int kRows, int kCols>
  FM_DEVICE bool cuts(int row, int col) const {
    return col + kCols - 1 > last(row) || col < first(row + kRows - 1);
  }
};

// The tiles of kCols columns that the band leaves whole for kRows rows from `row` on: first <= n < last.
struct WholeTiles {
  int first, last;
};
template <int kRows, int kCols>
FM_DEVICE WholeTiles whole_tiles(const BandMask& band, int row) {
  return {div_up(band.first(row + kRows - 1), kCols), max(band.last(row) + 1, 0) / kCols};
}

// Bit n: column c + 8 n lies in first .. last. Whole registers of predicates load from such bits at once.
FM_DEVICE u32 columns_seen(int first, int last, int c) {
  return shift_left(~0u, min(max((first - c + 7) >> 3, 0), 32)) &
         ~shift_left(~0u, min(max((last - c + 8) >> 3, 0), 32));
}

// Bit n of seen[i][e]: whether column 8 n + 2 t + e of row i of a thread counts.
using ColumnsSeen = u32[2][2];

// What the band leaves of them; row, col are those of the warp's 16 x (8 kN) tile.
FM_DEVICE void within_band(ColumnsSeen& seen, const BandMask& band, int row, int col) {
  const int g = lane_id() >> 2, t = lane_id() & 3;
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const int first = band.first(row + i * 8 + g), last = band.last(row + i * 8 + g);
#pragma unroll
    for (int e = 0; e < 2; ++e) seen[i][e] &= columns_seen(first, last, col + 2 * t + e);
  }
}

// Scores that do not count become `outside`.
template <int kN>
FM_DEVICE void mask_scores(float (&r_s)[kN][4], const ColumnsSeen& seen, float outside = -infinity()) {
  static_assert(kN <= 32);
#pragma unroll
  for (int i = 0; i < 2; ++i)
#pragma unroll
    for (int e = 0; e < 2; ++e)
#pragma unroll
      for (int n = 0; n < kN; ++n) r_s[n][2 * i + e] = seen[i][e] & (1u << n) ? r_s[n][2 * i + e] : outside;
}
template <int kN>
FM_DEVICE void mask_scores(float (&r_s)[kN][4], const BandMask& band, int row, int col,
                           float outside = -infinity()) {
  ColumnsSeen seen = {{~0u, ~0u}, {~0u, ~0u}};
  within_band(seen, band, row, col);
  mask_scores(r_s, seen, outside);
}

}  // namespace fm
