// Sums of dq in the Hopper kernel of attention's backward (bwd_sm90.cuh): one thread of a block has the copy
// engine add what the consumers put down to dq_sums, in any order or in turns (p.ordered).
#pragma once
#include "attention/bwd_params.cuh"
#include "ptx/global_memory.cuh"
#include "ptx/tma.cuh"
#include "tile/pipeline.cuh"

namespace fm {

template <class Blocks>
struct AttentionBwdSumsSm90 {
  using Params = typename Blocks::Params;
  using Work = typename Blocks::Work;
  using Place = typename Blocks::Place;
  using Rings = typename Blocks::Rings;
  using Smem = typename Blocks::Smem;
  static constexpr int kRows = Blocks::kRows, kCols = Blocks::kCols, kConsumers = Blocks::kConsumers;
  static constexpr int kPieces = Blocks::kPieces, kPieceBytes = Blocks::kPieceBytes;

  // One thread. Lets the copy engine add what the consumers put down, a piece of 64 x 64 (or half of its
  // columns) in the order of their registers, to the sums in memory.
  FM_DEVICE static void add_sums(const Params& p, u8* smem, u32 s_base, const Rings& rings) {
    const Work& s_work = *reinterpret_cast<const Work*>(smem + Smem::kWork);
    Work& w = *reinterpret_cast<Work*>(smem + Smem::kSumsWork);
    Ring<1> works, at;
    bool before = false;  // the other consumer's piece is still being read
#pragma unroll 1
    for (; Blocks::more(s_work, rings.work, works); works.advance()) {
      Blocks::copy(w, s_work);
      // The next tile is wanted before the sums of this one are made, unless this one may wait for it.
      if (!p.at_once) mbarrier_arrive(rings.work.empty(0));
      if (p.ordered)
        add_in_turns(p, w, s_base, rings, at);
      else
        add_in_any_order(p, w, s_base, rings, at, before);
      if (p.at_once) mbarrier_arrive(rings.work.empty(0));
    }
    bulk_wait_group<0>();
  }
  FM_DEVICE static void add_in_any_order(const Params& p, const Work& w, u32 s_base, const Rings& rings,
                                         Ring<1>& at, bool& before) {
    Place place(w);
#pragma unroll 1
    for (int steps = w.all_steps(); steps > 0; --steps, at.advance(), place.advance(w)) {
      const int piece = piece_of(p, w, place);
#pragma unroll 1
      for (int i = 0; i < kConsumers; ++i) {
        rings.sums(i).wait_full(at);
        if (exists(w, place, i)) add_piece(p, s_base, piece, i);
        bulk_commit_group();
        if (before) {
          bulk_wait_group_read<1>();
          mbarrier_arrive(rings.sums(i ^ 1).empty(0));
        }
        before = true;
      }
    }
  }
  // The blocks of keys add to the queries of a step one after the other. Nobody reads the sums here, and L2
  // makes each addition; so that this thread knows that its own are made is all the order there has to be.
  FM_DEVICE static void add_in_turns(const Params& p, const Work& w, u32 s_base, const Rings& rings,
                                     Ring<1>& at) {
    Place place(w);
    int piece = piece_of(p, w, place);
    u32 added = 0;  // blocks that have added to this step, when it was last looked at
#pragma unroll 1
    for (int steps = w.all_steps(); steps > 0; --steps, at.advance()) {
      const u32 mine = turn_of(p, w, place);
#pragma unroll
      for (int i = 0; i < kConsumers; ++i) rings.sums(i).wait_full(at);
      u32* turn = turns_of(p) + piece;
      while (added != mine) added = ld_relaxed_gpu_u32(turn);
#pragma unroll
      for (int i = 0; i < kConsumers; ++i)
        if (exists(w, place, i)) add_piece(p, s_base, piece, i);
      bulk_commit_group();
      place.advance(w);
      if (steps > 1) {
        piece = piece_of(p, w, place);
        added = ld_relaxed_gpu_u32(turns_of(p) + piece);
      }
      bulk_wait_group_read<0>();
#pragma unroll
      for (int i = 0; i < kConsumers; ++i) mbarrier_arrive(rings.sums(i).empty(0));
      bulk_wait_group<0>();
      red_add_relaxed_gpu_u32(turn, 1);
    }
  }
  // Of the first consumer.
  FM_DEVICE static int piece_of(const Params& p, const Work& w, const Place& place) {
    return (w.sums + place.head * p.dq_blocks + place.col() / 64) * kPieces;
  }
  FM_DEVICE static bool exists(const Work& w, const Place& place, int consumer) {
    return kCols == 64 || place.col() / 64 + consumer < w.sum_blocks;
  }
  FM_DEVICE static void add_piece(const Params& p, u32 s_base, int piece, int i) {
    const int bytes = i + 1 < kPieces ? kPieceBytes : 64 * Blocks::kLastPiece * 4;
    const i64 block = Blocks::kHalves ? piece : piece + i;
    float* sums = p.dq_sums + block * (64 * 64) + (Blocks::kHalves ? i * (kPieceBytes / 4) : 0);
    bulk_reduce_add_f32(sums, s_base + Smem::kSums + i * kPieceBytes, bytes);
  }

  // How many blocks of keys add to the queries of a step before this one. Under a causal mask the last keys
  // come first where blocks walk upwards: theirs is the shortest way to each query.
  FM_DEVICE static int turn_of(const Params& p, const Work& w, const Place& place) {
    const int block = w.row0 / kRows, col = place.col();
    if (w.around > 0) {
      // Blocks that begin with this tile or one before it; the last of them has just begun.
      const int begun = min(div_up((place.tile + 1) * w.around, w.steps), w.around);
      return begun - 1 - block + (place.tile < w.begin ? w.around : 0);
    }
    if (p.window_right < 0 || w.direction < 0) {
      // Keys behind these see the columns from col on.
      const int row = w.band.right < 0 ? 0 : col - w.band.shift - w.band.right;
      return block - max(row, 0) / kRows;
    }
    const int row = w.band.left < 0 ? w.band.rows - 1
                                    : min(col + kCols - 1 - w.band.shift + w.band.left, w.band.rows - 1);
    return row / kRows - block;
  }
};

}  // namespace fm
