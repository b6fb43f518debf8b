// Rows of a tile of keys that are none of the sequence's: up to kKeyStep - 1 before its first key, where
// tiles begin at a multiple of kKeyStep rows, and those behind its last.
#pragma once
#include "attention/params.cuh"
#include "tile/warpgroup_gemm.cuh"

namespace fm {

template <class Keys, class TileV, int kKeyStep>
struct OutsideRows {
  using Params = AttentionFwdSm90Params;
  int head, tail;  // how many

  // In tile n of work w.
  template <class Work>
  FM_DEVICE static int before(const Params& p, const Work& w, int n) {
    if (kKeyStep == 1 || Keys::even(p) || n > 0) return 0;
    return Keys::sequence(p, w.batch).k_row - w.k_row;
  }
  template <class Work>
  FM_DEVICE static int behind(const Params& p, const Work& w, int n) {
    return !Keys::even(p) ? max(0, (n + 1) * TileV::kRows - w.band.cols) : 0;
  }

  // They may be anything, and 0 * NaN is NaN: these rows of V become 0. Every consumer does it for itself
  // before its product; that others do so at the same time changes nothing.
  FM_DEVICE void clear(u32 s_tile, int barrier) const {
    if (head) clear_rows<TileV>(s_tile, 0, head, barrier);
    if (tail) clear_rows<TileV>(s_tile, TileV::kRows - tail, tail, barrier);
  }
};

}  // namespace fm
