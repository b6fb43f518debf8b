// Who works on what in the Hopper kernels: one warp of every block finds the block's tiles of queries, and
// how each consumer warpgroup goes through their keys. It runs ahead of the others, so that nobody waits for
// the arithmetic.
#pragma once
#include "attention/key_tiles.cuh"
#include "attention/keys.cuh"
#include "math/reduce.cuh"
#include "tile/mask.cuh"
#include "tile/pipeline.cuh"
#include "tile/scheduler.cuh"

namespace fm {

template <int kBlockM, int kBlockN, int kStages>
struct AttentionScheduleSm90 {
  using Params = AttentionFwdSm90Params;
  static constexpr int kConsumers = kBlockM / 64;
  static constexpr int kWorks = 4;  // records: of tiles ahead, and of those that a consumer still needs

  // A consumer's part of a tile, a step being one tile of keys (key_tiles.cuh). It walks down from step
  // end - 1 to step begin; end 0: it lets the tile pass. Where all its rows are masked, it lets steps pass:
  // skip_high of them above its own, and so before them, and skip_low below. In key tiles first_whole ..
  // last_whole - 1 the band masks no score of its rows.
  struct Steps {
    int begin, end, skip_high, skip_low, first_whole, last_whole;
    FM_DEVICE bool none() const { return end == 0; }
    FM_DEVICE bool whole(int n) const { return first_whole <= n && n < last_whole; }
    FM_DEVICE bool any_whole() const { return first_whole < last_whole; }
  };
  // One tile of queries. Written by this warp, read by all.
  struct Work {
    BandMask band;
    int batch, head, head_k;  // head: the first of those packed
    int m0, v_block;     // the tile's first row, counted as the band counts rows; block along head_dim_v
    int q_row, k_row;    // rows of the arrays where the tile's first query and the first tile of keys lie
    int n_begin, n_end;  // steps; n_end 0: there is no more work
    i64 lse_offset;      // elements of lse before the tile's first
    Steps steps[kConsumers];

    // By a whole warp.
    FM_DEVICE Steps steps_of(int consumer) const {
      const Steps& s = steps[consumer];
      return {uniform(s.begin),    uniform(s.end),         uniform(s.skip_high),
              uniform(s.skip_low), uniform(s.first_whole), uniform(s.last_whole)};
    }
  };
};

// The warp of a block that finds its tiles. Of padded sequences tiles of keys begin at a multiple of kKeyStep
// rows.
template <int kBlockM, int kBlockN, int kStages, class Keys, bool kMask, int kKeyStep>
struct AttentionSchedulerSm90 : AttentionScheduleSm90<kBlockM, kBlockN, kStages> {
  using Schedule = AttentionScheduleSm90<kBlockM, kBlockN, kStages>;
  using typename Schedule::Params, typename Schedule::Steps, typename Schedule::Work;
  using Schedule::kConsumers, Schedule::kWorks;
  // Whether a consumer lets a tile pass that has no rows for it, so that the others take less time. Of two
  // the other gains too little by it, and four have no registers for it.
  static constexpr bool kPasses = kConsumers == 3;

  // Where a block is in the order of tiles. Packed sequences: a lane holds one of 32 sequences, all lanes
  // look at one tile.
  struct Cursor {
    int round = 0;
    int next_batch = 0, tiles_seen = 0;  // sequences looked at so far, and the tiles of them all
    Sequence mine;                       // the lane's, whose tiles have the numbers begin .. end - 1
    int begin = 0, end = 0;

    FM_DEVICE explicit Cursor(const Params& p) : mine(Keys::each(p)) {}
    FM_DEVICE void next_sequences(const Params& p) {
      const int batch = next_batch + lane_id();
      next_batch += 32;
      mine.seqlen_q = mine.seqlen_k = 0;
      if (batch < p.batch) mine = from_step<kKeyStep>(without_unseeing(p, Keys::sequence(p, batch)));
      const int tiles =
          div_up(mine.seqlen_q << p.pack_bits, kBlockM) * p.v_blocks * (p.heads_q >> p.pack_bits);
      end = tiles_seen + inclusive_sum(tiles), begin = end - tiles;
      tiles_seen = __shfl_sync(0xffffffffu, end, 31);
    }
  };

  // One warp. It runs ahead of the producer, so that nobody waits for the arithmetic.
  FM_DEVICE static void run(const Params& p, Work* s_works, const RingBarriers<kWorks>& ring) {
    Ring<kWorks> works;
    Cursor at(p);
    const int consumer = lane_id();  // the one whose steps this lane works out
    int skipped = 0;                 // by it after the tile before
    for (bool found = true; found; works.advance()) {
      ring.wait_empty(works);
      Work& w = s_works[works.stage];
      found = find_work(p, at, w);
      __syncwarp();
      if (consumer < kConsumers) {
        if (!kPasses || (found && w.m0 + consumer * 64 < w.band.rows)) {
          w.steps[consumer] = steps_in(w, consumer, skipped);
          skipped = w.steps[consumer].skip_low;
        } else {
          w.steps[consumer].end = skipped = 0;
        }
      }
      mbarrier_arrive(ring.full(works.stage));
    }
    finish_counting(p);
  }

  // The number of the block's next tile. Where only the device knows the lengths, no order made before is
  // even: blocks then take the next tile that is free.
  FM_DEVICE static u32 next_index(const Params& p, int round) {
    const u32 blocks = gridDim.x, block = blockIdx.x;
    if (p.tile_counter == nullptr)
      return p.section == kHeadByHead ? round * blocks + block : snake(round, block, blocks);
    if (round == 0) return block;
    return blocks + __shfl_sync(0xffffffffu, lane_id() == 0 ? atomicAdd(p.tile_counter, 1) : 0, 0);
  }

  // The last block that has taken all its numbers leaves the counter as it was.
  FM_DEVICE static void finish_counting(const Params& p) {
    if (p.tile_counter == nullptr || lane_id() != 0 ||
        atomicAdd(p.tile_counter + 1, 1) != static_cast<int>(gridDim.x) - 1)
      return;
    p.tile_counter[0] = p.tile_counter[1] = 0;
  }

  // The block's next tile; all lanes write the same. False, and n_end 0: there is none.
  FM_DEVICE static bool find_work(const Params& p, Cursor& at, Work& w) {
    const u32 blocks = gridDim.x, heads = p.v_blocks * (p.heads_q >> p.pack_bits);
    const u32 index = next_index(p, at.round++);
    u32 group;  // v_block and head
    int seqlen_q;
    if (Keys::even(p)) {
      if (index >= p.tiles) return w.n_end = 0, false;
      const TileIndex place = p.section == kHeadByHead ? group_by_group(index, p.m_blocks, blocks)
                                             : by_sections(index, p.m_blocks, heads * p.batch, p.section);
      w.batch = place.group / heads, group = place.group % heads;
      const Sequence found = without_unseeing(p, Keys::each(p));
      w.m0 = place.m_block * kBlockM, w.q_row = (w.m0 >> p.pack_bits) + found.q_row, w.k_row = found.k_row;
      w.band.cols = found.seqlen_k, seqlen_q = found.seqlen_q;
    } else {
      // Sequence by sequence, in each the last rows first and all heads of a row together.
      while (index >= at.tiles_seen) {
        if (at.next_batch >= p.batch) return w.n_end = 0, false;
        at.next_sequences(p);
      }
      const int lane = __popc(__ballot_sync(0xffffffffu, index >= at.end));
      auto of_lane = [&](int x) { return __shfl_sync(0xffffffffu, x, lane); };
      w.batch = at.next_batch - 32 + lane, group = (index - of_lane(at.begin)) % heads;
      w.m0 = (of_lane(at.end) - 1 - index) / heads * kBlockM;
      w.q_row = (w.m0 >> p.pack_bits) + of_lane(at.mine.q_row), w.k_row = of_lane(at.mine.k_row);
      w.band.cols = of_lane(at.mine.seqlen_k), seqlen_q = of_lane(at.mine.seqlen_q);
    }
    w.v_block = group % p.v_blocks, w.head = group / p.v_blocks << p.pack_bits;
    w.head_k = w.head / p.heads_per_key;
    w.band.rows = seqlen_q << p.pack_bits, w.band.pack_bits = p.pack_bits;
    w.band.shift = w.band.cols - seqlen_q, w.band.left = p.window_left, w.band.right = p.window_right;
    __syncwarp();  // lanes read what others have written
    if constexpr (kMask) {
      const int list = list_of_tiles(p, w.batch, w.head, w.m0 / kBlockM);
      w.n_begin = list + 1, w.n_end = list + 1 + p.mask_tiles[list];
    } else {
      // A tile that sees no key still takes one step, whose scores are all masked.
      w.n_end = max(1, div_up(w.band.last(min(w.m0 + kBlockM, w.band.rows) - 1) + 1, kBlockN));
      w.n_begin = min(w.band.first(w.m0) / kBlockN, w.n_end - 1);
    }
    w.lse_offset = w.batch * p.lse_stride_b + w.head * p.lse_stride_h + w.q_row;
    return true;
  }

  // The steps of one consumer. skipped: those it lets pass after the tile before.
  FM_DEVICE static Steps steps_in(const Work& w, int consumer, int skipped) {
    // What is let pass between two products with V holds buffers: one has to stay free.
    const int row = w.m0 + consumer * 64, seen = div_up(max(w.band.last(row + 63) + 1, 0), kBlockN);
    const int high = max(0, min(min(w.n_end - seen, w.n_end - 1 - w.n_begin), kStages - 1 - skipped));
    const int low =
        min(max(0, min(w.n_end - high - 1, w.band.first(row) / kBlockN) - w.n_begin), kStages - 1);
    const WholeTiles whole = whole_tiles<64, kBlockN>(w.band, row);
    if constexpr (kMask) return {w.n_begin, w.n_end, 0, 0, whole.first, whole.last};
    return {w.n_begin + low, w.n_end - high, high, low, whole.first, whole.last};
  }
};

}  // namespace fm
