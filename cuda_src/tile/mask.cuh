// Band masks: row i of a matrix of rows x cols sees the columns first(i) .. last(i). Causal, sliding window and the end of a
// sequence are all bands, so one comparison pair per score serves them, and tiles inside the band pay nothing.
#pragma once
#include "prelude.cuh"

namespace fm {

struct BandMask {
  int rows, cols;
  int shift;        // column that belongs to row 0: cols - rows, the bottom-right alignment
  int left, right;  // -1: unlimited

  FM_DEVICE int first(int row) const { return left < 0 ? 0 : max(0, row + shift - left); }
  FM_DEVICE int last(int row) const { return right < 0 ? cols - 1 : min(cols - 1, row + shift + right); }

  // Whether some pair of the tile lies outside of the band.
  template <int kRows, int kCols>
  FM_DEVICE bool cuts(int row, int col) const {
    return col + kCols - 1 > last(row) || col < first(row + kRows - 1);
  }
};

}  // namespace fm
