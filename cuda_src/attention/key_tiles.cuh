// Which tile of keys a step of the Hopper kernel is: all tiles in turn, or under a boolean mask those of a
// list that mask_words.cuh has made.
#pragma once
#include "attention/params.cuh"

namespace fm {

// An entry of a list: the tile of keys in the low bits; bit kTileBits + i is set where the mask hides none of
// its scores from the rows of consumer i.
enum ListEntry : int { kTileBits = 24, kTileMask = (1 << kTileBits) - 1 };

// Where the list of a tile of queries begins in mask_tiles: the number of its entries, then these, tiles in
// rising order. head: the first of those packed.
FM_DEVICE int list_of_tiles(const AttentionFwdSm90Params& p, int batch, int head, int m_block) {
  const int of_batch = p.mask_batches > 1 ? batch * p.mask_lists : 0;
  const int list = of_batch + (p.mask_lists > 1 ? head >> p.pack_bits : 0);
  return (list * p.m_blocks + m_block) * p.mask_list;
}

// tile(p, step): the tile of keys of a step. whole(p, step, consumer): the mask hides none of its scores.
struct EveryTile {
  FM_DEVICE static int tile(const AttentionFwdSm90Params&, int step) { return step; }
  FM_DEVICE static bool whole(const AttentionFwdSm90Params&, int, int) { return true; }
};
// A step is the number of an entry among all of mask_tiles.
struct ListedTiles {
  FM_DEVICE static int tile(const AttentionFwdSm90Params& p, int step) { return entry(p, step) & kTileMask; }
  FM_DEVICE static bool whole(const AttentionFwdSm90Params& p, int step, int consumer) {
    return (entry(p, step) >> (kTileBits + consumer) & 1) != 0;
  }

 private:
  FM_DEVICE static int entry(const AttentionFwdSm90Params& p, int step) { return __ldg(p.mask_tiles + step); }
};

template <bool kMask>
using KeyTilesOf = decltype(pick<kMask>(ListedTiles(), EveryTile()));

}  // namespace fm
