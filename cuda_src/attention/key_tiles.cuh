// Which tile of keys a step of the Hopper kernel is: all tiles in turn, or under a boolean mask those of a
// list that mask_words.cuh has made.
#pragma once
#include "attention/params.cuh"

namespace fm {

// An entry of a list: the tile of keys in the low bits; bit kTileBits + i is set where the mask hides none of
// its scores from the rows of consumer i.
enum ListEntry : int { kTileBits = 24, kTileMask = (1 << kTileBits) - 1 };

// The list of a tile of queries: the number of its entries, then these, tiles in rising order. head: the
// first of those packed.
FM_DEVICE int* list_of_tiles(const AttentionFwdSm90Params& p, int batch, int head, int m_block) {
  const i64 group = static_cast<i64>(batch) * p.mask_lists + (p.mask_lists > 1 ? head >> p.pack_bits : 0);
  return p.mask_tiles + (group * p.m_blocks + m_block) * p.mask_list;
}

// tile(step): the tile of keys of a step. whole(step): the mask hides none of its scores.
struct EveryTile {
  template <class Work>
  FM_DEVICE static EveryTile of(const AttentionFwdSm90Params&, const Work&, int, int) {
    return {};
  }
  FM_DEVICE static int tile(int step) { return step; }
  FM_DEVICE static bool whole(int) { return true; }
};

struct ListedTiles {
  const int* g_entries;
  int whole_bit;

  template <class Work>
  FM_DEVICE static ListedTiles of(const AttentionFwdSm90Params& p, const Work& w, int block_m, int consumer) {
    return {list_of_tiles(p, w.batch, w.head, w.m0 / block_m) + 1, 1 << (kTileBits + consumer)};
  }
  FM_DEVICE int tile(int step) const { return g_entries[step] & kTileMask; }
  FM_DEVICE bool whole(int step) const { return (g_entries[step] & whole_bit) != 0; }
};

template <bool kMask>
using KeyTilesOf = decltype(pick<kMask>(ListedTiles(), EveryTile()));

}  // namespace fm
