// The blocks of the Hopper kernel of attention's backward (bwd_sm90.cuh): tiles, shared memory, and all warps
// but those that compute.
//
// A block stays on its SM. A tile is kRows rows, keys for dk and dv or queries for dq, and the columns that
// belong to them, of one head or of all heads that share the keys. Of the first warpgroup one thread (the
// scheduler) takes the next tile that is free when the tile before is nearly loaded. One (the producer) lets
// the copy engine fetch the rows once and the columns through two rings: x, that is q or k, and the bias, and
// y, that is dout or v. One warp brings lse and delta of a step's queries, one thread has dq's sums added up.
#pragma once
#include "attention/bwd_bias_tiles_sm90.cuh"
#include "attention/bwd_fragments_sm90.cuh"
#include "attention/bwd_sums_sm90.cuh"
#include "attention/keys.cuh"
#include "attention/variant.cuh"
#include "math/softmax.cuh"
#include "ptx/global_memory.cuh"
#include "ptx/ldmatrix.cuh"
#include "ptx/tma.cuh"
#include "ptx/warpgroup.cuh"
#include "tile/epilogue.cuh"
#include "tile/mask.cuh"
#include "tile/pipeline.cuh"
#include "tile/smem.cuh"
#include "tile/warpgroup_gemm.cuh"

namespace fm {

template <class Element_, int kHeadDim_, int kHeadDimV_, int kRows_, int kCols_, int kStages_, int kWanted_,
          class Variant_>
struct AttentionBwdBlocksSm90 {
  using Element = Element_;
  using Variant = Variant_;
  static constexpr int kHeadDim = kHeadDim_, kHeadDimV = kHeadDimV_, kRows = kRows_, kCols = kCols_;
  static constexpr int kStages = kStages_, kWanted = kWanted_;
  static constexpr int kConsumers = kRows / 64, kThreads = 128 * (1 + kConsumers);
  static constexpr bool kQueries = kWanted == (kGradQ | kGradK | kGradV);
  static constexpr int kProducerRegisters = kConsumers >= 3 ? 32 : 24;
  static constexpr int kConsumerRegisters = kConsumers == 3 ? 160 : 240;
  static_assert(kProducerRegisters + kConsumers * kConsumerRegisters <= launch_registers(1 + kConsumers));
  static constexpr bool kByKey = kWanted != kGradQ;   // rows are keys
  static constexpr bool kScores = kWanted != kGradV;  // dS is wanted, for dq or dk
  static constexpr bool kValues = kWanted & kGradV;
  using Bias = BwdBiasOf<Element, Variant, kRows, kCols, kByKey>;
  using Params = typename Bias::Params;
  // dq, too: products of dS, which both consumers see in shared memory, with the keys, added up in dq_sums by
  // all blocks. A piece of it is 64 queries by up to 64 columns; each consumer takes one of a step. Steps of
  // 64 queries and 64 columns have one piece: each consumer takes half of its columns.
  static constexpr int kPieces = div_up(kHeadDim, 64);  // along a row of dq
  static constexpr bool kHalves = kQueries && kCols * kPieces == 64;
  static constexpr int kPieceColumns = kHalves ? 32 : 64;
  // Columns of the last one. Beside scores that change there are no registers for two versions of the loop.
  static constexpr int kLastPiece =
      kHalves || Variant::kScore ? kPieceColumns : kHeadDim - 64 * (kPieces - 1);
  static constexpr int kPieceBytes = 64 * kPieceColumns * 4;
  static_assert(!kQueries || (kConsumers == 2 && (kHalves || kCols * kPieces == 128)));
  // Named barriers of the block. A consumer reports its dS of a step at kScoresStored + 2 * consumer + step
  // % 2.
  enum Barrier { kScoresStored = 1, kColumnsCleared = 5 };

  // Where registers do not do for weights in fp32 beside the two sums, dS has those that dv has.
  static constexpr bool kRounded =
      kValues && (kHeadDim + kHeadDimV > 192 || kCols > (Variant::kScore ? 64 : 96));

  // Tiles of the rows of one consumer, and of the columns of a step.
  using TileRowX = SmemTile<Element, 64, div_up(kHeadDim, 64) * 64>;
  using TileRowY = SmemTile<Element, 64, div_up(kHeadDimV, 64) * 64>;
  using TileColX = SmemTile<Element, kCols, div_up(kHeadDim, 64) * 64>;
  using TileColY = SmemTile<Element, kCols, div_up(kHeadDimV, 64) * 64>;
  using TileScores = SmemTile<Element, kRows, kQueries ? kCols : 64>;  // dS of a step, rows are keys
  using Stage = Ring<kStages>;                                         // a step of columns
  static constexpr int kWantedAhead = 2;  // steps that are still to load when the next tile is wanted
  // Tiles of rows x at once. Where they are used to the end of a tile, the next one's come before that.
  static constexpr int kRowStages = kQueries ? 2 : 1;

  // A tile, as above.
  struct alignas(16) Work {
    BandMask band;            // rows see columns
    int batch, head, head_k;  // head: the first of those that are walked over
    int row0;                 // the tile's first row; -1: there is no tile any more
    int first, steps, walks;  // tiles of columns: the first one, how many; and heads
    int begin;                // with which of the tiles of columns it begins
    int direction;            // 1: upwards from there; -1: downwards
    int heads_inside;         // all heads have a tile of columns before the next tile comes
    int around;               // tiles of rows of a head, if each begins with other columns; else 0
    int row_base, col_base;   // where row 0 and column 0 lie, and
    int map_batch;            // in which entry, as coordinates of the tensor maps
    int sums, sum_blocks;     // its first head's first block in dq_sums; blocks of its queries
    int even;                 // behind the last row and column the arrays end
    FM_DEVICE int all_steps() const { return steps * walks; }
  };
  // The columns of a step.
  struct Place {
    int tile, head;
    FM_DEVICE explicit Place(const Work& w) : tile(w.begin), head(w.head) {}
    FM_DEVICE int col() const { return tile * kCols; }
    FM_DEVICE void advance(const Work& w) {
      if (w.heads_inside) {
        if (++head < w.head + w.walks) return;
        head = w.head;
      }
      tile += w.direction;
      if (tile == w.first + w.steps) tile = w.first;
      if (!w.heads_inside && tile == w.begin) ++head;
    }
  };
  // Where a consumer is.
  struct Walk {
    Ring<kRowStages> row_x;
    Ring<1> row_y;
    Stage at;  // the step at hand; x of the one before is still in use
  };
  // What comes with the columns of a step, if they are queries.
  struct alignas(16) Queries {
    Statistics<kCols> of;
    int col, head;  // the first column, and whose
  };
  struct Smem {
    static constexpr int kRowX = 0, kRowY = kRowX + kRowStages * kConsumers * TileRowX::kBytes;
    static constexpr int kColX = kRowY + (kScores ? kConsumers * TileRowY::kBytes : 0);
    static constexpr int kColY = kColX + kStages * TileColX::kBytes;
    static constexpr int kScoresTile = kColY + kStages * TileColY::kBytes;
    static constexpr int kSums = kScoresTile + (kQueries ? 2 * TileScores::kBytes : 0);  // pieces of dq
    static constexpr int kBias = kSums + (kQueries ? kConsumers * kPieceBytes : 0);
    static constexpr int kStatistics = kBias + kStages * Bias::kBytes;
    static constexpr int kWork = kStatistics + (kByKey ? kStages * static_cast<int>(sizeof(Queries)) : 0);
    static constexpr int kNextWork = kWork + static_cast<int>(sizeof(Work));      // the scheduler's
    static constexpr int kSumsWork = kNextWork + static_cast<int>(sizeof(Work));  // of add_sums
    static constexpr int kBarriersWork = kSumsWork + (kQueries ? static_cast<int>(sizeof(Work)) : 0);
    static constexpr int kBarrierWanted = kBarriersWork + RingBarriers<1>::kBytes;
    static constexpr int kBarriersRowX = kBarrierWanted + 8;
    static constexpr int kBarriersRowY = kBarriersRowX + RingBarriers<kRowStages>::kBytes;
    static constexpr int kBarriersX = kBarriersRowY + RingBarriers<1>::kBytes;
    static constexpr int kBarriersY = kBarriersX + RingBarriers<kStages>::kBytes;
    static constexpr int kBarriersSums = kBarriersY + RingBarriers<kStages>::kBytes;
    static constexpr int kBytes = kBarriersSums + (kQueries ? kConsumers * RingBarriers<1>::kBytes : 0);
    static_assert(kBytes <= kMaxSmemBytes);
  };
  struct Rings {
    RingBarriers<1> work;
    u32 wanted;  // the tile at hand is nearly loaded
    RingBarriers<kRowStages> row_x;
    RingBarriers<1> row_y;
    RingBarriers<kStages> x, y;
    u32 s_sums;
    FM_DEVICE RingBarriers<1> sums(int i) const { return {s_sums + i * RingBarriers<1>::kBytes}; }
    FM_DEVICE explicit Rings(u32 s_base)
        : work{s_base + Smem::kBarriersWork},
          wanted(s_base + Smem::kBarrierWanted),
          row_x{s_base + Smem::kBarriersRowX},
          row_y{s_base + Smem::kBarriersRowY},
          x{s_base + Smem::kBarriersX},
          y{s_base + Smem::kBarriersY},
          s_sums(s_base + Smem::kBarriersSums) {}
    FM_DEVICE void init() const {
      // All who read a tile: the producer, the warps of the statistics and of the sums, the consumers.
      work.init(1, 1 + (kByKey ? 1 : 0) + (kQueries ? 1 : 0) + 4 * kConsumers);
      mbarrier_init(wanted, 1);
      row_x.init(1, 4 * kConsumers);
      row_y.init(1, 4 * kConsumers);
      x.init(kByKey ? 1 + 32 : 1, 4 * kConsumers);  // one thread of each consumer warp reports
      y.init(1, 4 * kConsumers);
      for (int i = 0; kQueries && i < kConsumers; ++i) sums(i).init(4, 1);
      fence_mbarrier_init();
    }
  };

  // Runs consume(smem, s_base, rings, consumer) in each warpgroup but the first.
  template <class F>
  FM_DEVICE static void run_with(const Params& p, F&& consume) {
    extern __shared__ __align__(1024) u8 smem[];
    const u32 s_base = smem_address(smem);
    const Rings rings(s_base);
    if (threadIdx.x == 0) {
      prefetch_tensormap(p.q_map), prefetch_tensormap(p.k_map);
      prefetch_tensormap(p.v_map), prefetch_tensormap(p.dout_map);
      rings.init();
    }
    __syncthreads();
    const int warp = warp_id();
    if (warp < 4) {
      setmaxnreg_dec<kProducerRegisters>();
      if (warp == 0 && lane_id() == 0) produce(p, smem, s_base, rings);
      if (kByKey && warp == 1) bring_statistics(p, smem, rings);
      if (warp == 2 && lane_id() == 0) schedule(p, smem, rings);
      if constexpr (kQueries)
        if (warp == 3 && lane_id() == 0)
          AttentionBwdSumsSm90<AttentionBwdBlocksSm90>::add_sums(p, smem, s_base, rings);
    } else {
      setmaxnreg_inc<kConsumerRegisters>();
      consume(smem, s_base, rings, warp / 4 - 1);
    }
  }

  // ---- scheduler ----

  // One thread. Blocks stay on their SM and take the next tile that is free. The last tile has row0 -1.
  FM_DEVICE static void schedule(const Params& p, u8* smem, const Rings& rings) {
    Work& s_work = *reinterpret_cast<Work*>(smem + Smem::kWork);
    Work& next = *reinterpret_cast<Work*>(smem + Smem::kNextWork);
    u32 tiles = 0;
    do {
      // Taking a tile and finding what belongs to it takes as long as a step.
      if (tiles > 0) mbarrier_wait_parity(rings.wanted, (tiles - 1) & 1);
      // A tile that waits for later ones has to be done before this block takes one of them.
      if (p.at_once) rings.work.wait_empty(Ring<1>{0, tiles & 1});
      int index;
      do {
        index = atomicAdd(p.tile_counters + kWanted, 1);
      } while (index < p.tiles && !find_work(p, index, next));
      if (index >= p.tiles) next.row0 = -1;
      rings.work.wait_empty(Ring<1>{0, tiles & 1});
      copy(s_work, next);
      mbarrier_arrive(rings.work.full(0));
      ++tiles;
    } while (next.row0 >= 0);
  }
  FM_DEVICE static void copy(Work& to, const Work& from) {
#pragma unroll 1
    for (int i = 0; i < static_cast<int>(sizeof(Work) / 16); ++i)
      reinterpret_cast<uint4*>(&to)[i] = reinterpret_cast<const uint4*>(&from)[i];
  }
  // Whether there is one more tile, s_work. Each warp that reads it gives it back.
  FM_DEVICE static bool more(const Work& s_work, const RingBarriers<1>& ring, const Ring<1>& at) {
    ring.wait_full(at);
    return s_work.row0 >= 0;
  }
  // Tile `index`. False: it is behind the end of its sequence.
  FM_DEVICE static bool find_work(const Params& p, int index, Work& w) {
    // Under a causal mask late queries see the most keys, and early keys are seen by the most queries.
    // Where dq is added in order, a tile of keys comes behind those that it waits for, unless all are in
    // work.
    const TileOfHead at = tile_of_head(index, p.blocks, p.tiles / p.blocks, p.section);
    find_direction(p, at.head / p.section, w);
    const bool ascending = kByKey && (!p.ordered || p.window_right < 0 || p.at_once || w.direction < 0);
    const int heads = kByKey ? p.heads_q / p.heads_per_key : p.heads_q;
    w.walks = kByKey ? p.heads_per_key : 1;
    w.head = at.head % heads * w.walks;
    w.head_k = w.head / p.heads_per_key;
    int tile = at.tile, tiles = p.blocks;  // of the sequence
    if (p.lengths == kPackedLengths) {
      const int* cu_seqlens = kByKey ? p.cu_seqlens_k : p.cu_seqlens_q;
      w.batch = sequence_of_tile<kRows>(cu_seqlens, p.sequences, tile);
      tile -= first_tile<kRows>(cu_seqlens, w.batch);
      tiles = first_tile<kRows>(cu_seqlens, w.batch + 1) - first_tile<kRows>(cu_seqlens, w.batch);
    } else {
      w.batch = at.head / heads;
    }
    w.row0 = (ascending ? tile : tiles - 1 - tile) * kRows;
    const AttentionFwdParams f = forward_params(p);
    w.even = RowKeys::even(f);
    const Sequence found = w.even ? RowKeys::each(f) : RowKeys::sequence(f, w.batch);
    w.map_batch = RowKeys::map_batch(f, w.batch);
    if constexpr (kQueries) {
      w.sums = first_block_of_sums(p.lengths, p.cu_seqlens_q, w.batch, p.heads_q, p.dq_blocks);
      w.sum_blocks = div_up(found.seqlen_q, 64);
    }
    w.row_base = kByKey ? found.k_row : found.q_row, w.col_base = kByKey ? found.q_row : found.k_row;
    const int shift = found.seqlen_k - found.seqlen_q;
    w.band = kByKey ? BandMask{found.seqlen_k, found.seqlen_q, -shift, p.window_right, p.window_left, 0}
                    : BandMask{found.seqlen_q, found.seqlen_k, shift, p.window_left, p.window_right, 0};
    keep_memory();  // registers are few here
    w.first = w.band.first(w.row0) / kCols;
    const int last = div_up(max(w.band.last(min(w.row0 + kRows, w.band.rows) - 1) + 1, 0), kCols);
    w.steps = max(last - w.first, 0);
    find_turns(p, w);
    return w.row0 < w.band.rows;
  }

  // Which way a tile walks under a causal mask.
  //
  // Heads that share keys: all heads take the same queries one after the other. Tiles of the first section
  // begin at once: from the last queries on, which all of them see, they read the same ones at the same time.
  // Those of the next one begin one after the other, later the later their first query is: from there upwards
  // they read the same ones, too. Head after head would read more than L2 holds.
  // In order, tiles come shortest first and dq from the last keys to the first, as the last keys have the
  // shortest way to each query. Longest first, from the last queries down, costs a wait from tile to tile in
  // the beginning. It pays for heads that share keys, whose tiles are long, and in the last section, or few
  // blocks would be left with the longest tiles in the end.
  FM_DEVICE static void find_direction(const Params& p, int section, Work& w) {
    const bool causal = kByKey && p.window_right >= 0 && p.window_left < 0;
    const bool last = section == (p.tiles / p.blocks - 1) / p.section;
    w.heads_inside = causal && p.heads_per_key > 1;
    w.direction =
        causal && (p.ordered ? last || w.heads_inside : w.heads_inside && section % 2 == 0) ? -1 : 1;
  }
  // With which columns a tile begins.
  FM_DEVICE static void find_turns(const Params& p, Work& w) {
    const bool around = kQueries && p.at_once && p.window_left < 0 && p.window_right < 0;
    w.around = around ? div_up(w.band.rows, kRows) : 0;
    w.begin = w.around > 0      ? w.row0 / kRows * w.steps / w.around
              : w.direction < 0 ? w.first + w.steps - 1
                                : w.first;
  }

  // ---- producer ----

  // One thread.
  FM_DEVICE static void produce(const Params& p, const u8* smem, u32 s_base, const Rings& rings) {
    const Work& s_work = *reinterpret_cast<const Work*>(smem + Smem::kWork);
    Ring<1> works;
    Ring<kRowStages> row_x;
    Ring<1> row_y;
    Stage at;
#pragma unroll 1
    for (; more(s_work, rings.work, works); works.advance()) {
      const Work& w = s_work;
      const int steps = w.all_steps();
      Place place(w);
#pragma unroll 1
      for (int step = 0; step < steps; ++step, at.advance(), place.advance(w)) {
        if (step == max(steps - kWantedAhead, 0)) mbarrier_arrive(rings.wanted);
        const int head = kByKey ? place.head : w.head_k, col = w.col_base + place.col();
        if (step == 0)
          load_rows<TileRowX>(kByKey ? p.k_map : p.q_map, w, s_base + Smem::kRowX, rings.row_x, row_x);
        rings.x.wait_empty(at);
        mbarrier_arrive_expect_tx(rings.x.full(at.stage), TileColX::kBytes + Bias::kLoaded);
        load<TileColX>(kByKey ? p.q_map : p.k_map, s_base + Smem::kColX + at.stage * TileColX::kBytes,
                       rings.x.full(at.stage), col, head, w.map_batch);
        Bias::load(p, s_base + Smem::kBias + at.stage * Bias::kBytes, rings.x.full(at.stage),
                   kByKey ? col : w.row0, kByKey ? w.row0 : col, place.head, w.batch);
        rings.y.wait_empty(at);
        mbarrier_arrive_expect_tx(rings.y.full(at.stage), TileColY::kBytes);
        load<TileColY>(kByKey ? p.dout_map : p.v_map, s_base + Smem::kColY + at.stage * TileColY::kBytes,
                       rings.y.full(at.stage), col, head, w.map_batch);
        if (kScores && step == 0)
          load_rows<TileRowY>(kByKey ? p.v_map : p.dout_map, w, s_base + Smem::kRowY, rings.row_y, row_y);
      }
      if (steps == 0) mbarrier_arrive(rings.wanted);
      mbarrier_arrive(rings.work.empty(0));
    }
  }

  template <class Tile, int kAtOnce>
  FM_DEVICE static void load_rows(const TensorMap& map, const Work& w, u32 s_tiles,
                                  const RingBarriers<kAtOnce>& ring, Ring<kAtOnce>& at) {
    ring.wait_empty(at);
    mbarrier_arrive_expect_tx(ring.full(at.stage), kConsumers * Tile::kBytes);
#pragma unroll 1
    for (int i = 0; i < kConsumers; ++i)
      load<Tile>(map, s_tiles + (at.stage * kConsumers + i) * Tile::kBytes, ring.full(at.stage),
                 w.row_base + w.row0 + 64 * i, kByKey ? w.head_k : w.head, w.map_batch);
    at.advance();
  }

  template <class Tile>
  FM_DEVICE static void load(const TensorMap& map, u32 s_tile, u32 s_full, int row, int head, int batch) {
    const u64 policy = createpolicy_evict_normal();
#pragma unroll
    for (int panel = 0; panel < Tile::kPanels; ++panel)
      tma_load_4d(s_tile + panel * Tile::kPanelBytes, map, s_full, policy, panel * 64, row, head, batch);
  }

  // One warp. lse in units of log2; queries behind the last one get weights of 0. The consumers learn here
  // which columns they have.
  FM_DEVICE static void bring_statistics(const Params& p, u8* smem, const Rings& rings) {
    const Work& s_work = *reinterpret_cast<const Work*>(smem + Smem::kWork);
    Ring<1> works;
    Stage at;
#pragma unroll 1
    for (; more(s_work, rings.work, works); works.advance()) {
      const Work& w = s_work;
      Place place(w);
#pragma unroll 1
      for (int step = 0; step < w.all_steps(); ++step, at.advance(), place.advance(w))
        bring_step(p, w, smem, rings, at, place);
      __syncwarp();
      rings.work.release(works);
    }
  }
  FM_DEVICE static void bring_step(const Params& p, const Work& w, u8* smem, const Rings& rings,
                                   const Stage& at, const Place& place) {
    const int col = place.col();
    const i64 first = w.batch * p.row_stride_b + place.head * p.row_stride_h + w.col_base + col;
    Queries& s = reinterpret_cast<Queries*>(smem + Smem::kStatistics)[at.stage];
    const StatisticsInRegisters<kCols> r(p, first, w.band.cols - col, lse_unit<Bias>());
    rings.x.wait_empty(at);
    r.store(s.of);
    if (lane_id() == 0) s.col = col, s.head = place.head;
    mbarrier_arrive(rings.x.full(at.stage));
  }
};

}  // namespace fm
