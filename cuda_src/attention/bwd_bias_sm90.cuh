// The gradient of attention's bias for Hopper (sm_90a): the same sums as bwd_bias_sm80.cuh, for bf16 and fp16
// rows that start at multiples of 16 bytes and sequences of even lengths, without softcap and ALiBi.
//
//   S = scale q k^T + bias   P = exp(S - lse)   dP = dout v^T   dbias = sum of P (dP - delta)
//
// The bias has 1 or all entries, heads, queries and keys; dbias has its shape and type, and is overwritten
// whole. Sums run in fp32 in one order, and are rounded once: the same bits in every run, and no workspace.
//
// Blocks stay on their SM. One takes a tile of kRows queries by kCols keys of the bias, and for all entries
// and heads that share it, where the bias is spread along queries or keys for all tiles of them, too, goes
// through steps. One thread (the producer) lets the copy engine fill a ring of slots: q and k of a step in
// one, dout and v in the next. The bias's tile, which is the same in all steps, comes once. Each warpgroup
// but the first (a consumer) owns 64 queries, and keeps their sums in registers.
#pragma once
#include "attention/bwd_bias_tiles_sm90.cuh"
#include "attention/keys.cuh"
#include "attention/variant.cuh"
#include "math/reduce.cuh"
#include "math/softmax.cuh"
#include "ptx/shared_memory.cuh"
#include "ptx/tma.cuh"
#include "ptx/warpgroup.cuh"
#include "tile/mask.cuh"
#include "tile/pipeline.cuh"
#include "tile/smem.cuh"
#include "tile/warpgroup_gemm.cuh"

namespace fm {

// kSlots: of the ring; kBiases: tiles of the bias at once, of this tile and the next one.
template <class Element_, int kHeadDim_, int kHeadDimV_, int kRows_, int kCols_, int kSlots_, int kBiases_,
          class Variant_>
struct AttentionBwdBiasSm90 {
  using Element = Element_;
  using Variant = Variant_;
  using Params = AttentionBwdBiasSm90Params;
  static constexpr int kHeadDim = kHeadDim_, kHeadDimV = kHeadDimV_, kRows = kRows_, kCols = kCols_;
  static constexpr int kSlots = kSlots_, kBiases = kBiases_;
  static constexpr int kConsumers = kRows / 64, kThreads = 128 * (1 + kConsumers);
  static constexpr int kProducerRegisters = 24, kConsumerRegisters = 240;
  static_assert(kProducerRegisters + kConsumers * kConsumerRegisters <= launch_registers(1 + kConsumers));
  enum Barrier { kSumsStored = 1 };  // a named barrier of the consumers

  using Bias = BwdBiasOf<Element, Variant, kRows, kCols, false>;
  static constexpr int kWidth = div_up(max_of(kHeadDim, kHeadDimV), 64) * 64;
  using TileRow = SmemTile<Element, 64, kWidth>;  // of one consumer: q or dout
  using TileCol = SmemTile<Element, kCols, kWidth>;
  using Slot = Ring<kSlots>;
  using Scores = float[1][kCols / 8][4];

  struct Smem {
    static constexpr int kSlotCol = kConsumers * TileRow::kBytes;  // within a slot
    static constexpr int kSlot = kSlotCol + TileCol::kBytes;
    static constexpr int kBias = kSlots * kSlot;
    static constexpr int kSums = kBias + kBiases * Bias::kBytes;  // of each warp and key
    static constexpr int kBarriersSlots = kSums + (Variant::kKeyBias ? 4 * kConsumers * kCols * 4 : 0);
    static constexpr int kBarriersBias = kBarriersSlots + RingBarriers<kSlots>::kBytes;
    static constexpr int kBytes = kBarriersBias + RingBarriers<kBiases>::kBytes;
    static_assert(kBytes <= kMaxSmemBytes);
  };
  struct Rings {
    RingBarriers<kSlots> slots;
    RingBarriers<kBiases> bias;
    FM_DEVICE explicit Rings(u32 s_base)
        : slots{s_base + Smem::kBarriersSlots}, bias{s_base + Smem::kBarriersBias} {}
  };

  // A tile of the bias: entries, heads, and tiles of queries and keys whose dS it sums up.
  struct Work {
    Rows batch, heads, rows, cols;
  };
  struct Step {
    int batch, head, row0, col0;  // the first query and key
  };

  FM_DEVICE static void run(const Params& p) {
    extern __shared__ __align__(1024) u8 smem[];
    const u32 s_base = smem_address(smem);
    const Rings rings(s_base);
    if (threadIdx.x == 0) {
      prefetch_tensormap(p.q_map), prefetch_tensormap(p.k_map), prefetch_tensormap(p.v_map);
      prefetch_tensormap(p.dout_map), prefetch_tensormap(p.bias_map);
      rings.slots.init(1, 4 * kConsumers);  // one thread of each consumer warp reports
      rings.bias.init(1, 4 * kConsumers);
      fence_mbarrier_init();
    }
    __syncthreads();
    const int warp = warp_id();
    if (warp < 4) {
      setmaxnreg_dec<kProducerRegisters>();
      if (warp == 0 && lane_id() == 0) produce(p, s_base, rings);
    } else {
      setmaxnreg_inc<kConsumerRegisters>();
      consume(p, smem, s_base, rings, warp / 4 - 1);
    }
  }

  // ---- which steps there are ----

  // f(work) for each tile of this block. Neighbours in keys are worked on at the same time.
  template <class F>
  FM_DEVICE static void each_tile(const Params& p, F&& f) {
#pragma unroll 1
    for (int tile = static_cast<int>(blockIdx.x); tile < p.tiles; tile += static_cast<int>(gridDim.x)) {
      int index = tile;
      const Rows cols = along(index, p.bias_keys, p.seqlen_k, kCols);
      const Rows rows = along(index, p.bias_queries, p.seqlen_q, kRows);
      const Rows heads = along(index, p.bias_heads, p.heads_q, 1);
      const Rows batch = along(index, p.bias_batch, p.batch, 1);
      f(Work{batch, heads, rows, cols});
    }
  }
  // One tile of all that the bias has along an axis, or all that it is spread along. Takes it out of index.
  FM_DEVICE static Rows along(int& index, int own, int size, int tile) {
    const int count = div_up(own, tile), mine = index % count;
    index /= count;
    return own == 1 ? Rows{0, div_up(size, tile)} : Rows{mine, mine + 1};
  }
  FM_DEVICE static BandMask band_of(const Params& p) {
    return {p.seqlen_q, p.seqlen_k, p.seqlen_k - p.seqlen_q, p.window_left, p.window_right, 0};
  }
  // f(step) for each step of a tile in which some query sees some key. True: there was one.
  template <class F>
  FM_DEVICE static bool each_step(const Params& p, const Work& w, F&& f) {
    const BandMask band = band_of(p);
    bool any = false;
#pragma unroll 1
    for (int batch = w.batch.begin; batch < w.batch.end; ++batch)
#pragma unroll 1
      for (int head = w.heads.begin; head < w.heads.end; ++head)
#pragma unroll 1
        for (int m = w.rows.begin; m < w.rows.end; ++m)
#pragma unroll 1
          for (int n = w.cols.begin; n < w.cols.end; ++n) {
            const int row0 = m * kRows, col0 = n * kCols, last = min(row0 + kRows, band.rows) - 1;
            if (band.first(row0) >= col0 + kCols || band.last(last) < col0) continue;
            f(Step{batch, head, row0, col0});
            any = true;
          }
    return any;
  }

  // ---- producer ----

  // One thread.
  FM_DEVICE static void produce(const Params& p, u32 s_base, const Rings& rings) {
    Slot at;
    Ring<kBiases> bias;
    each_tile(p, [&](const Work& w) {
      bool fresh = true;  // the tile's bias is still to come
      each_step(p, w, [&](const Step& step) {
        const int head_k = step.head / p.heads_per_key;
        load(p.q_map, p.k_map, step, head_k, s_base, rings, at, kHeadDim);
        if (fresh) {
          // What the step has of a bias that is spread along queries or keys is what every step has.
          rings.bias.wait_empty(bias);
          mbarrier_arrive_expect_tx(rings.bias.full(bias.stage), Bias::kLoaded);
          Bias::load(p, s_base + Smem::kBias + bias.stage * Bias::kBytes, rings.bias.full(bias.stage),
                     step.row0, step.col0, step.head, step.batch);
          bias.advance();
          fresh = false;
        }
        load(p.dout_map, p.v_map, step, head_k, s_base, rings, at, kHeadDimV);
      });
    });
  }
  // The rows and columns of a product, to the next slot.
  FM_DEVICE static void load(const TensorMap& rows, const TensorMap& cols, const Step& step, int head_k,
                             u32 s_base, const Rings& rings, Slot& at, int width) {
    const u64 policy = createpolicy_evict_normal();
    const u32 s_slot = s_base + at.stage * Smem::kSlot, s_full = rings.slots.full(at.stage);
    const int panels = div_up(width, 64);
    rings.slots.wait_empty(at);
    mbarrier_arrive_expect_tx(s_full, panels * (kConsumers * TileRow::kPanelBytes + TileCol::kPanelBytes));
#pragma unroll 1
    for (int panel = 0; panel < panels; ++panel) {
#pragma unroll
      for (int i = 0; i < kConsumers; ++i)
        tma_load_4d(s_slot + i * TileRow::kBytes + panel * TileRow::kPanelBytes, rows, s_full, policy,
                    panel * 64, step.row0 + 64 * i, step.head, step.batch);
      tma_load_4d(s_slot + Smem::kSlotCol + panel * TileCol::kPanelBytes, cols, s_full, policy, panel * 64,
                  step.col0, head_k, step.batch);
    }
    at.advance();
  }

  // ---- consumer ----

  FM_DEVICE static void consume(const Params& p, u8* smem, u32 s_base, const Rings& rings, int consumer) {
    Slot at;
    Ring<kBiases> bias;
    each_tile(p, [&](const Work& w) {
      Scores r_sum = {};
      const u32 s_bias = s_base + Smem::kBias + bias.stage * Bias::kBytes + consumer * Bias::kConsumerBytes;
      const bool any = each_step(p, w, [&](const Step& step) {
        add_step(p, step, s_base, rings, at, bias, s_bias, consumer, r_sum);
      });
      if (any) {
        __syncwarp();  // all lanes have read the bias
        rings.bias.release(bias);
        bias.advance();
      }
      store(p, w, smem, consumer, r_sum);
    });
  }

  // dS of a step, added to the sums.
  FM_DEVICE static void add_step(const Params& p, const Step& step, u32 s_base, const Rings& rings, Slot& at,
                                 const Ring<kBiases>& bias, u32 s_bias, int consumer, Scores& r_sum) {
    const BandMask band = band_of(p);
    const int tile_row = step.row0 + consumer * 64, row = tile_row + (warp_id() & 3) * 16;
    float lse[2], delta[2];  // of the thread's rows; behind the last one weights are 0
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int query = row + i * 8 + (lane_id() >> 2);
      const i64 place = step.batch * p.row_stride_b + step.head * p.row_stride_h + query;
      lse[i] = query < band.rows ? p.row_lse[place] : infinity();
      delta[i] = query < band.rows ? p.row_delta[place] : 0.f;
    }
    Scores r_s, r_dp;
    const Slot scores = at;
    multiply_slot<kHeadDim>(r_s, s_base, rings, at, consumer);
    multiply_slot<kHeadDimV>(r_dp, s_base, rings, at, consumer);
    rings.bias.wait_full(bias);
    wgmma_wait_group<1>(r_s[0]);
    rings.slots.release(scores);
    Bias::add(r_s[0], p.softmax_scale, s_bias, row - tile_row);
    if (band.template cuts<64, kCols>(tile_row, step.col0)) mask_scores(r_s[0], band, row, step.col0);
#pragma unroll
    for (int n = 0; n < kCols / 8; ++n)
#pragma unroll
      for (int e = 0; e < 4; ++e) r_s[0][n][e] = exp2_approx((r_s[0][n][e] - lse[e / 2]) * kLog2e);
    wgmma_wait_group<0>(r_dp[0]);
    rings.slots.release(at.before());
#pragma unroll
    for (int n = 0; n < kCols / 8; ++n)
#pragma unroll
      for (int e = 0; e < 4; ++e)
        r_sum[0][n][e] = fmaf(r_s[0][n][e], r_dp[0][n][e] - delta[e / 2], r_sum[0][n][e]);
  }
  // The product of a consumer's rows and the columns in the next slot.
  template <int kDepth>
  FM_DEVICE static void multiply_slot(Scores& r, u32 s_base, const Rings& rings, Slot& at, int consumer) {
    const u32 s_slot = s_base + at.stage * Smem::kSlot;
    rings.slots.wait_full(at);
    wgmma_fence();
    multiply<Element, kDepth>(r, KMajor<TileRow>(s_slot + consumer * TileRow::kBytes),
                              KMajor<TileCol>(s_slot + Smem::kSlotCol), true);
    wgmma_commit_group();
    at.advance();
  }

  // ---- results ----

  // The sums of a tile, and along the axes that the bias has once.
  FM_DEVICE static void store(const Params& p, const Work& w, u8* smem, int consumer, Scores& r_sum) {
    const int lane = lane_id(), warp = consumer * 4 + (warp_id() & 3);
    const i64 first = (p.bias_batch == 1 ? 0 : w.batch.begin) * p.dbias_stride_b +
                      (p.bias_heads == 1 ? 0 : w.heads.begin) * p.dbias_stride_h;
    const int row0 = w.rows.begin * kRows + warp * 16 + (lane >> 2), col0 = w.cols.begin * kCols;
    if constexpr (Variant::kKeyBias) {
      store_keys(p, reinterpret_cast<float*>(smem + Smem::kSums), first, col0, warp, r_sum);
    } else {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int row = row0 + i * 8;
        const i64 of_row = first + row * p.dbias_stride_q;
        if (p.bias_keys == 1) {
          float sum = 0.f;
#pragma unroll
          for (int n = 0; n < kCols / 8; ++n) sum += r_sum[0][n][2 * i] + r_sum[0][n][2 * i + 1];
          sum = quad_sum(sum);
          if ((lane & 3) == 0 && row < p.bias_queries) put(p, of_row, sum);
        } else if (row < p.bias_queries) {
#pragma unroll
          for (int n = 0; n < kCols / 8; ++n)
            put_pair(p, of_row, col0 + n * 8 + 2 * (lane & 3), r_sum[0][n][2 * i], r_sum[0][n][2 * i + 1]);
        }
      }
    }
  }
  // Sums over all queries: of a warp's by shuffles, of all warps through shared memory.
  FM_DEVICE static void store_keys(const Params& p, float* s_sums, i64 first, int col0, int warp,
                                   Scores& r_sum) {
#pragma unroll
    for (int n = 0; n < kCols / 8; ++n)
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        float sum = r_sum[0][n][e] + r_sum[0][n][e + 2];
#pragma unroll
        for (int distance = 4; distance < 32; distance *= 2)
          sum += __shfl_xor_sync(0xffffffffu, sum, distance);
        if (lane_id() < 4) s_sums[warp * kCols + n * 8 + 2 * lane_id() + e] = sum;
      }
    barrier_sync(kSumsStored, 128 * kConsumers);
    const int thread = static_cast<int>(threadIdx.x) - 128;
    const bool one = p.bias_keys == 1;
    if (thread < (one ? 1 : kCols)) {
      float sum = 0.f;
#pragma unroll 1
      for (int i = 0; i < 4 * kConsumers; ++i)
#pragma unroll 1
        for (int j = thread; j < (one ? kCols : thread + 1); ++j) sum += s_sums[i * kCols + j];
      if (one || col0 + thread < p.bias_keys) put(p, first + (one ? 0 : col0 + thread), sum);
    }
    barrier_sync(kSumsStored, 128 * kConsumers);  // the next tile's sums may be stored
  }

  // Neighbours of a row, whose keys lie side by side in dbias.
  FM_DEVICE static void put_pair(const Params& p, i64 of_row, int col, float low, float high) {
    const i64 at = of_row + col;
    if (col + 1 < p.bias_keys && at % 2 == 0) {
      if constexpr (Variant::kBiasBytes == 4)
        static_cast<float2*>(p.dbias)[at / 2] = make_float2(low, high);
      else
        static_cast<u32*>(p.dbias)[at / 2] = pack2<Element>(low, high);
    } else {
      if (col < p.bias_keys) put(p, at, low);
      if (col + 1 < p.bias_keys) put(p, at + 1, high);
    }
  }
  FM_DEVICE static void put(const Params& p, i64 at, float x) {
    if constexpr (Variant::kBiasBytes == 4)
      static_cast<float*>(p.dbias)[at] = x;
    else
      static_cast<u16*>(p.dbias)[at] = static_cast<u16>(pack2<Element>(x, 0.f));
  }
};

}  // namespace fm
