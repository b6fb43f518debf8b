// The blocks of attention's backward for wide head dims on Hopper: tiles, shared memory, who brings what, and
// what becomes of the sums.
#pragma once
#include "attention/bwd_fragments_sm90.cuh"
#include "attention/keys.cuh"
#include "math/softmax.cuh"
#include "ptx/cluster.cuh"
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

// kStages, kStagesV: steps of q and of dout in shared memory. kBlocks: of a cluster, 1 or 2. kShares: two
// blocks fetch half of the queries of a step each, for both.
template <class Element_, int kHeadDim_, int kHeadDimV_, int kCols_, int kStages_, int kWanted_,
          int kStagesV_ = kStages_, int kBlocks_ = 1, bool kShares_ = false>
struct AttentionBwdWideBlocksSm90 {
  using Element = Element_;
  using Params = AttentionBwdSm90Params;
  static constexpr int kHeadDim = kHeadDim_, kHeadDimV = kHeadDimV_, kCols = kCols_, kStages = kStages_;
  static constexpr int kStagesV = kStagesV_, kBlocks = kBlocks_;
  static constexpr bool kShares = kShares_;
  static constexpr int kUsers = kShares ? 16 : 8;  // consumer warps that use what a block fetches
  static_assert(kBlocks == 2 || !kShares);
  static constexpr int kRows = 64, kThreads = 3 * 128, kConsumerThreads = 2 * 128;
  static constexpr int kProducerRegisters = 24, kConsumerRegisters = 240;
  static_assert(kProducerRegisters + 2 * kConsumerRegisters <= launch_registers(3));
  static constexpr bool kQueries = kWanted_ & kGradQ;  // dq, too
  static_assert((kWanted_ & (kGradK | kGradV)) == (kGradK | kGradV) && (!kQueries || kCols == 64));
  static_assert(kHeadDim % 64 == 0 && kHeadDimV % 64 == 0);
  static constexpr int kParts = kHeadDim / 64;  // of 64 columns, of dq

  // Named barriers. The first two kinds have one for even steps and one for odd ones: the second warpgroup
  // waits at kWeightsStored, the first at kWeightsUsed, when dS is stored, too.
  enum Barrier { kWeightsStored = 1, kWeightsUsed = 3, kScoresStored = 5, kColumnsCleared = 6 };

  using TileX = SmemTile<Element, kRows, kHeadDim>;  // k
  using TileY = SmemTile<Element, kRows, kHeadDimV>;
  using TileColX = SmemTile<Element, kCols, kHeadDim>;  // q
  using TileColY = SmemTile<Element, kCols, kHeadDimV>;
  using TileScores = SmemTile<Element, kRows, 64>;  // dS of a step, rows are keys
  using TilePeer =
      SmemTile<Element, kRows, 128>;  // the other block's keys, columns that belong to this one's dq
  using Stage = Ring<kStages>;
  using StageV = Ring<kStagesV>;
  using Barriers = RingBarriers<kStages>;
  using BarriersV = RingBarriers<kStagesV>;
  using Peers = RingBarriers<2>;  // of the other block's dS, even steps and odd ones
  struct Smem {
    static constexpr int kWeightBytes = kRows * kCols * 2;
    static constexpr int kRowX = 0, kRowY = kRowX + TileX::kBytes;
    static constexpr int kColX = kRowY + TileY::kBytes;
    static constexpr int kColY = kColX + kStages * TileColX::kBytes;
    static constexpr int kScoresTile = kColY + kStagesV * TileColY::kBytes;
    static constexpr int kPeerScores = kScoresTile + (kQueries ? 2 * TileScores::kBytes : 0);
    static constexpr int kPeerKeys = kPeerScores + (kBlocks == 2 ? 2 * TileScores::kBytes : 0);
    static constexpr int kWeights = kPeerKeys + (kBlocks == 2 ? TilePeer::kBytes : 0);
    static constexpr int kStatistics = kWeights + 2 * kWeightBytes;
    static constexpr int kBarrierX = kStatistics + kStages * Statistics<kCols>::kBytes;
    static constexpr int kBarrierY = kBarrierX + 8;
    static constexpr int kBarriersX = kBarrierY + 8, kBarriersY = kBarriersX + RingBarriers<kStages>::kBytes;
    static constexpr int kBarriersPeer = kBarriersY + RingBarriers<kStagesV>::kBytes;
    static constexpr int kBytes = kBarriersPeer + (kBlocks == 2 ? Peers::kBytes : 0);
    static_assert(kBytes <= kMaxSmemBytes);
  };

  // What a block works on; every thread finds it for itself.
  struct Work {
    BandMask band;            // keys see queries
    int batch, head, head_k;  // head: the first of those that are walked over
    int row0;                 // the block's first key
    int first, steps, walks;  // tiles of queries: the first one, how many; and heads
    int row_base, col_base;   // where key 0 and query 0 lie, and
    int map_batch;            // in which entry, as coordinates of the tensor maps
    bool even;                // behind the last key and query the arrays end
    FM_DEVICE int all_steps() const { return steps * walks; }
    FM_DEVICE int head_of(int step) const { return head + step / steps; }
    FM_DEVICE int col_of(int step) const { return (first + step % steps) * kCols; }
    FM_DEVICE int next(int tile) const { return tile + 1 == first + steps ? first : tile + 1; }
  };
  FM_DEVICE static Work find_work(const Params& p) {
    const int index = static_cast<int>(blockIdx.x);
    const TileOfHead at = tile_of_head(index / kBlocks, p.blocks / kBlocks, p.tiles / p.blocks, p.section);
    Work w;
    w.row0 = (at.tile * kBlocks + index % kBlocks) * kRows;
    w.walks = p.heads_per_key;
    const int heads = p.heads_q / w.walks;
    w.batch = at.head / heads;
    w.head_k = at.head % heads;
    w.head = w.head_k * w.walks;
    const AttentionFwdParams f = forward_params(p);
    w.even = kQueries || RowKeys::even(f);
    const Sequence found = w.even ? RowKeys::each(f) : RowKeys::sequence(f, w.batch);
    w.map_batch = kQueries ? w.batch : RowKeys::map_batch(f, w.batch);
    w.row_base = found.k_row, w.col_base = found.q_row;
    w.band = {found.seqlen_k, found.seqlen_q, found.seqlen_q - found.seqlen_k,
              p.window_right, p.window_left,  0};
    // Of all blocks of a cluster, which take the same steps.
    const int row0 = w.row0 / (kBlocks * kRows) * (kBlocks * kRows);
    w.first = w.band.first(row0) / kCols;
    const int last = div_up(max(w.band.last(min(row0 + kBlocks * kRows, w.band.rows) - 1) + 1, 0), kCols);
    w.steps = max(last - w.first, 0);
    return w;
  }

  // Runs consume(work, smem, s_base, x, y, consumer) in the second and the third warpgroup.
  template <class F>
  FM_DEVICE static void run_with(const Params& p, F&& consume) {
    extern __shared__ __align__(1024) u8 smem[];
    const u32 s_base = smem_address(smem);
    const Barriers x{s_base + Smem::kBarriersX};
    const BarriersV y{s_base + Smem::kBarriersY};
    if (threadIdx.x == 0) {
      prefetch_tensormap(p.q_map), prefetch_tensormap(p.k_map);
      prefetch_tensormap(p.v_map), prefetch_tensormap(p.dout_map);
      mbarrier_init(s_base + Smem::kBarrierX, 1);
      mbarrier_init(s_base + Smem::kBarrierY, 1);
      x.init(1 + 32, kUsers);  // one thread per consumer warp reports
      y.init(1, kUsers);
      if constexpr (kBlocks == 2) Peers{s_base + Smem::kBarriersPeer}.init(1, 8);
      fence_mbarrier_init();
    }
    if constexpr (kBlocks == 2)
      barrier_cluster_arrive(), barrier_cluster_wait();
    else
      __syncthreads();
    const Work w = find_work(p);
    if (kBlocks == 1 && w.row0 >= w.band.rows) return;
    const int warp = warp_id();
    if (warp < 4) {
      setmaxnreg_dec<kProducerRegisters>();
      if (warp == 0 && lane_id() == 0)
        produce<TileX, TileColX, kBlocks == 2>(p.k_map, p.q_map, w, s_base + Smem::kRowX,
                                               s_base + Smem::kColX, s_base + Smem::kBarrierX, x);
      if (warp == 1 && lane_id() == 0)
        produce<TileY, TileColY, false>(p.v_map, p.dout_map, w, s_base + Smem::kRowY, s_base + Smem::kColY,
                                        s_base + Smem::kBarrierY, y);
      if (warp == 2) bring_statistics(p, w, smem, x);
    } else {
      setmaxnreg_inc<kConsumerRegisters>();
      consume(w, smem, s_base, x, y, warp / 4 - 1);
    }
    if constexpr (kBlocks == 2) {  // shared memory stays until the other block is done with it, too
      __syncwarp();
      barrier_cluster_arrive(), barrier_cluster_wait();
    }
  }

  // ---- producer ----

  // One thread: the rows of a block, and their columns step by step.
  template <class TileRow, class TileCol, bool kPeer, int kRing>
  FM_DEVICE static void produce(const TensorMap& rows, const TensorMap& cols, const Work& w, u32 s_rows,
                                u32 s_cols, u32 s_rows_full, const RingBarriers<kRing>& ring) {
    const int steps = w.all_steps();
    if (steps == 0) return;
    mbarrier_arrive_expect_tx(s_rows_full, TileRow::kBytes + (kPeer ? TilePeer::kBytes : 0));
    load<TileRow>(rows, s_rows, s_rows_full, createpolicy_evict_first(), w.row_base + w.row0, w.head_k,
                  w.map_batch);
    if constexpr (kPeer)
      load<TilePeer>(rows, s_rows - Smem::kRowX + Smem::kPeerKeys, s_rows_full, createpolicy_evict_first(),
                     w.row_base + (w.row0 ^ kRows), w.head_k, w.map_batch, cluster_ctarank() * 2);
    Ring<kRing> at;
#pragma unroll 1
    for (int step = 0; step < steps; ++step, at.advance()) {
      ring.wait_empty(at);
      mbarrier_arrive_expect_tx(ring.full(at.stage), TileCol::kBytes);
      const u32 s_tile = s_cols + at.stage * TileCol::kBytes;
      const int row = w.col_base + w.col_of(step), head = w.head_of(step);
      if constexpr (kShares) {
        const int first = cluster_ctarank() * (kCols / 2);
#pragma unroll
        for (int panel = 0; panel < TileCol::kPanels; ++panel)
          tma_load_4d_multicast(s_tile + panel * TileCol::kPanelBytes + first * TileCol::kRowBytes, cols,
                                ring.full(at.stage), 3, createpolicy_evict_last(), panel * 64, row + first,
                                head, w.map_batch);
      } else {
        load<TileCol>(cols, s_tile, ring.full(at.stage), createpolicy_evict_last(), row, head, w.map_batch);
      }
    }
  }

  template <class Tile>
  FM_DEVICE static void load(const TensorMap& map, u32 s_tile, u32 s_full, u64 policy, int row, int head,
                             int batch, int first_panel = 0) {
#pragma unroll
    for (int panel = 0; panel < Tile::kPanels; ++panel)
      tma_load_4d(s_tile + panel * Tile::kPanelBytes, map, s_full, policy, (first_panel + panel) * 64, row,
                  head, batch);
  }

  // One warp. lse in units of log2; queries behind the last one get weights of 0.
  FM_DEVICE static void bring_statistics(const Params& p, const Work& w, u8* smem, const Barriers& x) {
    const int steps = w.all_steps();
    Stage at;
#pragma unroll 1
    for (int step = 0; step < steps; ++step, at.advance()) {
      const int col = w.col_of(step);
      const i64 first = w.batch * p.row_stride_b + w.head_of(step) * p.row_stride_h + w.col_base + col;
      auto& s = statistics(smem, at);
      const StatisticsInRegisters<kCols> r(p, first, w.band.cols - col);
      x.wait_empty(at);
      r.store(s);
      mbarrier_arrive(x.full(at.stage));
    }
  }
  FM_DEVICE static Statistics<kCols>& statistics(u8* smem, const Stage& at) {
    return *reinterpret_cast<Statistics<kCols>*>(smem + Smem::kStatistics +
                                                 at.stage * Statistics<kCols>::kBytes);
  }

  // ---- consumers ----

  FM_DEVICE static u32 col_x(u32 s_base, const Stage& at) {
    return s_base + Smem::kColX + at.stage * TileColX::kBytes;
  }
  FM_DEVICE static u32 col_y(u32 s_base, const StageV& at) {
    return s_base + Smem::kColY + at.stage * TileColY::kBytes;
  }

  // One lane of each warp reports that the warp is done with a stage, to all who write to it.
  template <int kRing>
  FM_DEVICE static void release(const RingBarriers<kRing>& ring, const Ring<kRing>& at) {
    if constexpr (kShares) {
      if (lane_id() < 2) mbarrier_arrive_cluster(mapa(ring.empty(at.stage), lane_id()));
    } else {
      ring.release(at);
    }
  }

  // Waits until what comes through ring `mine` is there. What lies behind the last query of a sequence may be
  // anything, and 0 times anything may be NaN: both consumers clear it. With dq sequences have one length.
  FM_DEVICE static void wait_for_columns(const Work& w, u32 s_base, const Barriers& mine,
                                         const Barriers& other, const Stage& at, int col) {
    mine.wait_full(at);
    if (kQueries || w.even || col + kCols <= w.band.cols) return;
    other.wait_full(at);
    clear_rows<TileColX, kConsumerThreads>(col_x(s_base, at), w.band.cols - col);
    clear_rows<TileColY, kConsumerThreads>(col_y(s_base, at), w.band.cols - col);
    fence_proxy_async();
    barrier_sync(kColumnsCleared, kConsumerThreads);
  }
  // f(value, n, e, j) for each value a thread holds: value e of its n-th four, column j of the tile.
  template <class F>
  FM_DEVICE static void each(float (&r_s)[1][kCols / 8][4], F&& f) {
    const int t = lane_id() & 3;
#pragma unroll
    for (int n = 0; n < kCols / 8; ++n)
#pragma unroll
      for (int e = 0; e < 4; ++e) f(r_s[0][n][e], n, e, n * 8 + 2 * t + e % 2);
  }

  // A warp's 16 rows of a gradient, where they exist.
  template <int kN>
  FM_DEVICE static void store(const Params& p, const Work& w, int row, const float (&r_d)[kN][4],
                              Element* array, i64 stride_b, i64 stride_s, i64 stride_h, int columns,
                              float scale) {
    Element* g_rows =
        array + w.batch * stride_b + (static_cast<i64>(w.row_base) + row) * stride_s + w.head_k * stride_h;
    const RowsOut<Element> to = {nullptr,  g_rows, stride_s, stride_h, w.band.rows - row, columns, 0,
                                 w.head_k, row,    w.batch,  0};
    const float both[2] = {scale, scale};
    store_accumulator_directly(to, r_d, both);
  }

  // Where a thread finds its share of P.
  FM_DEVICE static u32 weights(u32 s_base, int step) {
    return s_base + Smem::kWeights + (step & 1) * Smem::kWeightBytes + threadIdx.x % 128 * 16;
  }

  // S and dP of a step. Descriptors of the rows are found anew in every step: kept, they would take the
  // registers that there are.
  FM_DEVICE static void multiply_keys(float (&r_s)[1][kCols / 8][4], u32 s_base, const Stage& at) {
    multiply_rows<TileX>(r_s, s_base + Smem::kRowX, KMajor<TileColX>(col_x(s_base, at)));
  }
  FM_DEVICE static void multiply_values(float (&r_dp)[1][kCols / 8][4], u32 s_base, const StageV& at) {
    multiply_rows<TileY>(r_dp, s_base + Smem::kRowY, KMajor<TileColY>(col_y(s_base, at)));
  }
  template <class TileRow, class Columns>
  FM_DEVICE static void multiply_rows(float (&r_d)[1][kCols / 8][4], u32 s_rows, const Columns& columns) {
    keep_register(s_rows);
    wgmma_fence();
    multiply<Element, TileRow::kCols>(r_d, KMajor<TileRow>(s_rows), columns, true);
    wgmma_commit_group();
  }
  // Where a thread adds up the first part of dq of 64 queries.
  FM_DEVICE static float* sums(const Params& p, const Work& w, int head, int col) {
    const i64 block = (static_cast<i64>(w.batch) * p.heads_q + head) * p.dq_blocks + col / 64;
    return p.dq_sums + block * (kParts * 4096) + threadIdx.x % 128 * 4;
  }
  FM_DEVICE static void add(float* g_sums, const float (&r_dq)[8][4]) {
#pragma unroll
    for (int n = 0; n < 8; ++n) red_add_v4_f32(g_sums + n * 512, r_dq[n]);
  }
};

}  // namespace fm
