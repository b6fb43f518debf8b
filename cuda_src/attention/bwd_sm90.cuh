// Attention backward for Hopper (sm_90a): the same gradients as bwd_sm80.cuh, for bf16 and fp16 rows that
// start at multiples of 16 bytes, scores that are only scaled and masked, and sequences of one length.
//
//   S = scale q k^T   P = exp(S - lse)   dP = dout v^T   dS = P (dP - delta)
//   dv = P^T dout     dk = scale dS^T q  dq = scale dS k      (FlashAttention-2, algorithm 2)
//
// Overwrites the rows of dq, dk and dv, touches nothing else. Nothing is added up in memory: no workspace,
// and the same bits in every run.
//
// As in bwd_sm80.cuh a block owns rows, keys for dk and dv or queries for dq, and walks over the columns that
// belong to them, head after head. One thread (the producer) lets the copy engine fetch the rows once and the
// columns through two rings: x, that is q or k, and y, that is dout or v. Another warp brings lse and delta
// of the queries of a step. Each warpgroup but the first (a consumer) owns 64 rows and never meets another:
// its exponentials run under its own next products and under those of the others. Rows times columns come
// from shared memory; P and dS go from registers into the products that follow.
#pragma once
#include "attention/bwd_params.cuh"
#include "attention/keys.cuh"
#include "math/softmax.cuh"
#include "ptx/tma.cuh"
#include "ptx/warpgroup.cuh"
#include "tile/epilogue.cuh"
#include "tile/mask.cuh"
#include "tile/pipeline.cuh"
#include "tile/smem.cuh"
#include "tile/warpgroup_gemm.cuh"

namespace fm {

template <class Element_, int kHeadDim_, int kHeadDimV_, int kRows_, int kCols_, int kStages_, int kWanted_>
struct AttentionBwdSm90 {
  using Element = Element_;
  using Params = AttentionBwdSm90Params;
  static constexpr int kHeadDim = kHeadDim_, kHeadDimV = kHeadDimV_, kRows = kRows_, kCols = kCols_;
  static constexpr int kStages = kStages_, kWanted = kWanted_;
  static constexpr int kConsumers = kRows / 64, kThreads = 128 * (1 + kConsumers);
  static constexpr int kProducerRegisters = kConsumers >= 3 ? 32 : 24;
  static constexpr int kConsumerRegisters = kConsumers == 3 ? 160 : 240;
  static_assert(kProducerRegisters + kConsumers * kConsumerRegisters <= kWarpgroupRegisters);
  static constexpr bool kByKey = kWanted != kGradQ;   // rows are keys
  static constexpr bool kScores = kWanted != kGradV;  // dS is wanted, for dq or dk
  static constexpr bool kValues = kWanted & kGradV;

  // Where registers do not do for weights in fp32 beside the two sums, dS has those that dv has.
  static constexpr bool kRounded = kValues && kHeadDim + kHeadDimV > 192;

  // Tiles of the rows of one consumer, and of the columns of a step.
  using TileRowX = SmemTile<Element, 64, div_up(kHeadDim, 64) * 64>;
  using TileRowY = SmemTile<Element, 64, div_up(kHeadDimV, 64) * 64>;
  using TileColX = SmemTile<Element, kCols, div_up(kHeadDim, 64) * 64>;
  using TileColY = SmemTile<Element, kCols, div_up(kHeadDimV, 64) * 64>;
  using Stage = Ring<kStages>;
  struct Smem {
    static constexpr int kRowX = 0, kRowY = kRowX + kConsumers * TileRowX::kBytes;
    static constexpr int kColX = kRowY + (kScores ? kConsumers * TileRowY::kBytes : 0);
    static constexpr int kColY = kColX + kStages * TileColX::kBytes;
    static constexpr int kStatistics = kColY + kStages * TileColY::kBytes;
    static constexpr int kBarrierRows = kStatistics + (kByKey ? kStages * Statistics<kCols>::kBytes : 0);
    static constexpr int kBarriersX = kBarrierRows + 8,
                         kBarriersY = kBarriersX + RingBarriers<kStages>::kBytes;
    static constexpr int kBytes = kBarriersY + RingBarriers<kStages>::kBytes;
    static_assert(kBytes <= kMaxSmemBytes);
  };

  // What a block works on; every thread finds it for itself.
  struct Work {
    BandMask band;            // rows see columns
    int batch, head, head_k;  // head: the first of those that are walked over
    int row0;                 // the block's first row
    int first, steps, walks;  // tiles of columns: the first one, how many; and heads
    FM_DEVICE int all_steps() const { return steps * walks; }
    FM_DEVICE int head_of(int step) const { return head + step / steps; }
    FM_DEVICE int col_of(int step) const { return (first + step % steps) * kCols; }
  };
  FM_DEVICE static Work find_work(const Params& p) {
    int index = static_cast<int>(blockIdx.x);
    Work w;
    // Under a causal mask late queries see the most keys, and early keys are seen by the most queries.
    const int block = kByKey ? index % p.blocks : p.blocks - 1 - index % p.blocks;
    index /= p.blocks;
    const int heads = kByKey ? p.heads_q / p.heads_per_key : p.heads_q;
    w.batch = index / heads;
    w.walks = kByKey ? p.heads_per_key : 1;
    w.head = index % heads * w.walks;
    w.head_k = w.head / p.heads_per_key;
    w.row0 = block * kRows;
    const int shift = p.seqlen_k - p.seqlen_q;
    w.band = kByKey ? BandMask{p.seqlen_k, p.seqlen_q, -shift, p.window_right, p.window_left, 0}
                    : BandMask{p.seqlen_q, p.seqlen_k, shift, p.window_left, p.window_right, 0};
    w.first = w.band.first(w.row0) / kCols;
    const int last = div_up(max(w.band.last(min(w.row0 + kRows, w.band.rows) - 1) + 1, 0), kCols);
    w.steps = max(last - w.first, 0);
    return w;
  }

  FM_DEVICE static void run(const Params& p) {
    extern __shared__ __align__(1024) u8 smem[];
    const u32 s_base = smem_address(smem);
    const RingBarriers<kStages> x{s_base + Smem::kBarriersX}, y{s_base + Smem::kBarriersY};
    if (threadIdx.x == 0) {
      prefetch_tensormap(p.q_map), prefetch_tensormap(p.k_map);
      prefetch_tensormap(p.v_map), prefetch_tensormap(p.dout_map);
      mbarrier_init(s_base + Smem::kBarrierRows, 1);
      x.init(kByKey ? 1 + 32 : 1, 4 * kConsumers);  // one thread per consumer warp reports
      y.init(1, 4 * kConsumers);
      fence_mbarrier_init();
    }
    __syncthreads();
    const Work w = find_work(p);
    const int warp = warp_id();
    if (warp < 4) {
      setmaxnreg_dec<kProducerRegisters>();
      if (warp == 0 && lane_id() == 0) produce(p, w, s_base, x, y);
      if (kByKey && warp == 1) bring_statistics(p, w, smem, x);
    } else {
      setmaxnreg_inc<kConsumerRegisters>();
      consume(p, w, smem, s_base, x, y, warp / 4 - 1);
    }
  }

  // ---- producer ----

  // One thread.
  FM_DEVICE static void produce(const Params& p, const Work& w, u32 s_base, const RingBarriers<kStages>& x,
                                const RingBarriers<kStages>& y) {
    const int steps = w.all_steps();
    if (steps == 0) return;
    const u32 s_rows = s_base + Smem::kBarrierRows;
    mbarrier_arrive_expect_tx(s_rows, kConsumers * (TileRowX::kBytes + (kScores ? TileRowY::kBytes : 0)));
#pragma unroll 1
    for (int i = 0; i < kConsumers; ++i) {
      const int row = w.row0 + 64 * i, head = kByKey ? w.head_k : w.head;
      load<TileRowX>(kByKey ? p.k_map : p.q_map, s_base + Smem::kRowX + i * TileRowX::kBytes, s_rows,
                     createpolicy_evict_first(), row, head, w.batch);
      if constexpr (kScores)
        load<TileRowY>(kByKey ? p.v_map : p.dout_map, s_base + Smem::kRowY + i * TileRowY::kBytes, s_rows,
                       createpolicy_evict_first(), row, head, w.batch);
    }
    Stage at;
#pragma unroll 1
    for (int step = 0; step < steps; ++step, at.advance()) {
      const int head = kByKey ? w.head_of(step) : w.head_k, col = w.col_of(step);
      x.wait_empty(at);
      mbarrier_arrive_expect_tx(x.full(at.stage), TileColX::kBytes);
      load<TileColX>(kByKey ? p.q_map : p.k_map, s_base + Smem::kColX + at.stage * TileColX::kBytes,
                     x.full(at.stage), createpolicy_evict_last(), col, head, w.batch);
      y.wait_empty(at);
      mbarrier_arrive_expect_tx(y.full(at.stage), TileColY::kBytes);
      load<TileColY>(kByKey ? p.dout_map : p.v_map, s_base + Smem::kColY + at.stage * TileColY::kBytes,
                     y.full(at.stage), createpolicy_evict_last(), col, head, w.batch);
    }
  }

  template <class Tile>
  FM_DEVICE static void load(const TensorMap& map, u32 s_tile, u32 s_full, u64 policy, int row, int head,
                             int batch) {
#pragma unroll
    for (int panel = 0; panel < Tile::kPanels; ++panel)
      tma_load_4d(s_tile + panel * Tile::kPanelBytes, map, s_full, policy, panel * 64, row, head, batch);
  }

  // One warp. lse in units of log2; queries behind the last one get weights of 0.
  FM_DEVICE static void bring_statistics(const Params& p, const Work& w, u8* smem,
                                         const RingBarriers<kStages>& x) {
    const int steps = w.all_steps();
    Stage at;
#pragma unroll 1
    for (int step = 0; step < steps; ++step, at.advance()) {
      const int col = w.col_of(step);
      const i64 first = w.batch * p.row_stride_b + w.head_of(step) * p.row_stride_h + col;
      auto& s = *reinterpret_cast<Statistics<kCols>*>(smem + Smem::kStatistics +
                                                      at.stage * Statistics<kCols>::kBytes);
      float lse[kCols / 32], delta[kCols / 32];
#pragma unroll
      for (int i = 0; i < kCols / 32; ++i) {
        const int query = i * 32 + lane_id();
        const bool there = col + query < w.band.cols;
        lse[i] = there ? p.row_lse[first + query] * kLog2e : infinity();
        delta[i] = there ? p.row_delta[first + query] : 0.f;
      }
      x.wait_empty(at);
#pragma unroll
      for (int i = 0; i < kCols / 32; ++i)
        s.lse[i * 32 + lane_id()] = lse[i], s.delta[i * 32 + lane_id()] = delta[i];
      mbarrier_arrive(x.full(at.stage));
    }
  }

  // ---- consumer ----

  FM_DEVICE static void consume(const Params& p, const Work& w, u8* smem, u32 s_base,
                                const RingBarriers<kStages>& x, const RingBarriers<kStages>& y,
                                int consumer) {
    const int steps = w.all_steps(), tile_row = w.row0 + consumer * 64;
    const int row = tile_row + (warp_id() & 3) * 16;  // of this warp
    float r_dx[kScores ? kHeadDim / 8 : 1][4] = {}, r_dv[kValues ? kHeadDimV / 8 : 1][4] = {};
    if (steps > 0) {
      const KMajor<TileRowX> row_x(s_base + Smem::kRowX + consumer * TileRowX::kBytes);
      const KMajor<TileRowY> row_y(s_base + Smem::kRowY + (kScores ? consumer * TileRowY::kBytes : 0));
      const float scale = p.softmax_scale * kLog2e;
      float lse[2], delta[2];  // of the thread's rows, where rows are queries
      if constexpr (!kByKey) {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          const int query = row + i * 8 + (lane_id() >> 2);
          const i64 at = w.batch * p.row_stride_b + w.head * p.row_stride_h + query;
          lse[i] = query < w.band.rows ? p.row_lse[at] * kLog2e : infinity();
          delta[i] = query < w.band.rows ? p.row_delta[at] : 0.f;
        }
      }
      float r_s[1][kCols / 8][4], r_dp[1][kCols / 8][4];
      u32 r_p[kCols / 16][4], r_ds[kCols / 16][4];
      Stage at, before;  // the step at hand, and the one whose x is still in use
      mbarrier_wait_parity(s_base + Smem::kBarrierRows, 0);
#pragma unroll 1
      for (int step = 0, tile = w.first; step < steps; ++step) {
        const int col = tile * kCols;
        if (++tile == w.first + w.steps) tile = w.first;  // of the next head
        const auto& s_of = *reinterpret_cast<const Statistics<kCols>*>(
            smem + Smem::kStatistics + (kByKey ? at.stage * Statistics<kCols>::kBytes : 0));
        const u32 s_x = s_base + Smem::kColX + at.stage * TileColX::kBytes;
        const u32 s_y = s_base + Smem::kColY + at.stage * TileColY::kBytes;
        x.wait_full(at);
        wgmma_fence();
        multiply<Element, kHeadDim>(r_s, row_x, KMajor<TileColX>(s_x), true);
        wgmma_commit_group();
        y.wait_full(at);
        if constexpr (kScores) {
          wgmma_fence();
          multiply<Element, kHeadDimV>(r_dp, row_y, KMajor<TileColY>(s_y), true);
          wgmma_commit_group();
        }
        // S is here, and so is what the step before has added.
        wgmma_wait_group<kScores ? 1 : 0>(r_s[0]);
        if constexpr (kScores) {
          wgmma_fence_operand(r_dx);
          if (step > 0) x.release(before), before.advance();
        } else {
          x.release(at);
        }
        if (w.band.template cuts<64, kCols>(tile_row, col)) mask_scores(r_s[0], w.band, row, col);
        each(r_s, [&](float& s, int i, int, int, int j) {
          s = exp2_approx(fmaf(s, scale, -(kByKey ? s_of.lse[j] : lse[i])));
        });
        if constexpr (kValues) {
          pack_operand<Element>(r_p, r_s[0]);
          wgmma_fence();
          multiply<Element, 1>(r_dv, r_p, MNMajor<TileColY>(s_y), false, [] {});
          wgmma_commit_group();
        }
        if constexpr (kScores) {
          wgmma_wait_group<kValues ? 1 : 0>(r_dp[0]);
          if constexpr (!kValues) y.release(at);
          each(r_dp, [&](float& ds, int i, int n, int e, int j) {
            float weight = r_s[0][n][e];
            if constexpr (kRounded) {
              const u32 both = r_p[n / 2][n % 2 * 2 + e / 2];
              weight = e % 2 == 0 ? low_of<Element>(both) : high_of<Element>(both);
            }
            ds = weight * (ds - (kByKey ? s_of.delta[j] : delta[i]));
          });
          pack_operand<Element>(r_ds, r_dp[0]);
          wgmma_fence();
          multiply<Element, 1>(r_dx, r_ds, MNMajor<TileColX>(s_x), false, [] {});
          wgmma_commit_group();
        }
        if constexpr (kValues) {
          wgmma_wait_group<kScores ? 1 : 0>(r_dv);
          y.release(at);
        }
        at.advance();
      }
      if constexpr (kScores) wgmma_wait_group<0>(r_dx);
    }
    if constexpr (kValues)
      store(p, w, row, r_dv, static_cast<Element*>(p.dv), p.dv_stride_b, p.dv_stride_s, p.dv_stride_h,
            p.head_dim_v, 1.f);
    if constexpr (kScores)
      store(p, w, row, r_dx, static_cast<Element*>(kByKey ? p.dk : p.dq),
            kByKey ? p.dk_stride_b : p.dq_stride_b, kByKey ? p.dk_stride_s : p.dq_stride_s,
            kByKey ? p.dk_stride_h : p.dq_stride_h, p.head_dim, p.softmax_scale);
  }

  // f(value, i, n, e, j) for each value a thread holds: its row i, column j of the tile.
  template <class F>
  FM_DEVICE static void each(float (&r_s)[1][kCols / 8][4], F&& f) {
    const int t = lane_id() & 3;
#pragma unroll
    for (int n = 0; n < kCols / 8; ++n)
#pragma unroll
      for (int e = 0; e < 4; ++e) f(r_s[0][n][e], e / 2, n, e, n * 8 + 2 * t + e % 2);
  }

  // A warp's 16 rows of a gradient, where they exist.
  template <int kN>
  FM_DEVICE static void store(const Params& p, const Work& w, int row, const float (&r_d)[kN][4],
                              Element* array, i64 stride_b, i64 stride_s, i64 stride_h, int columns,
                              float scale) {
    const int head = kByKey ? w.head_k : w.head;
    Element* g_rows = array + w.batch * stride_b + row * stride_s + head * stride_h;
    const RowsOut<Element> to = {nullptr, g_rows, stride_s, stride_h, w.band.rows - row, columns, 0,
                                 head,    row,    w.batch,  0};
    const float both[2] = {scale, scale};
    store_accumulator_directly(to, r_d, both);
  }
};

}  // namespace fm
