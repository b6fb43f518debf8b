// Attention forward for Hopper (sm_90a): the same function as fwd_sm80.cuh, for bf16 and fp16 rows that start at multiples of 16 bytes.
//
//   S = scores(q k^T), masked to the band that causal, window and sequence ends leave    P = softmax(S)    out = P v
//   lse = log sum exp S (natural logarithm), sinks included
//
// Overwrites the rows of out and lse that exist, touches no others. A row that sees no key gives out 0 and lse -inf. Same bits in
// every run: one warpgroup owns a row from its last key tile to its first, and the order of tiles does not depend on time.
//
// Blocks stay on their SM and take tiles of kBlockM queries one after the other. One warp (the scheduler) finds the tiles, one thread
// (the producer) lets the copy engine fill rings of K and V tiles; each warpgroup but the first (a consumer) owns 64 queries. A
// consumer sees one endless row of steps, a step being one tile of keys: while the tensor cores compute S of the next step and out of
// this one, it does the softmax, also across the end of a tile, so that a short sequence has no ramps. Two or three consumers issue
// their products in turn (FlashAttention-3's ping-pong): one's softmax runs under the other's products. Warpgroups apart for softmax
// and output correction, as on Blackwell, would have to pass scores through shared memory, which the products already keep busy
// (benchmarks/NOTEBOOK.md has what was measured).
//
// Where heads that share keys have few queries, 2^pack_bits of them lie side by side in a tile, each query as so many rows: keys are
// read once for all of them, and tiles are full. The tensor maps of q and out put the rows in that order and back.
#pragma once
#include "attention/epilogue_sm90.cuh"
#include "attention/keys.cuh"
#include "attention/params.cuh"
#include "attention/schedule_sm90.cuh"
#include "attention/variant.cuh"
#include "math/softmax.cuh"
#include "ptx/shared_memory.cuh"
#include "ptx/tma.cuh"
#include "ptx/warpgroup.cuh"
#include "tile/epilogue.cuh"
#include "tile/gemm.cuh"
#include "tile/mask.cuh"
#include "tile/pipeline.cuh"
#include "tile/smem.cuh"
#include "tile/warpgroup_gemm.cuh"

namespace fm {

template <class Element_, int kHeadDim_, int kHeadDimV_, int kBlockM_, int kBlockN_, int kStages_, class Variant_>
struct AttentionFwdSm90 {
  using Element = Element_;
  using Variant = Variant_;
  using Params = AttentionFwdSm90Params;
  static constexpr int kHeadDim = kHeadDim_, kHeadDimV = kHeadDimV_, kBlockM = kBlockM_, kBlockN = kBlockN_, kStages = kStages_;
  static constexpr int kConsumers = kBlockM / 64, kThreads = 128 * (1 + kConsumers);
  static constexpr int kProducerRegisters = kConsumers >= 3 ? 32 : 40, kConsumerRegisters = kConsumers == 4 ? 112 : kConsumers == 3 ? 160 : 232;
  static constexpr bool kBounded = Variant::kBounded;  // masked after exp2, not before
  using Softmax = decltype(pick<kBounded>(BoundedSoftmax(), OnlineSoftmax<1>()));
  static constexpr bool kInTurn = kConsumers == 2 || kConsumers == 3;  // four fill the gaps of each other by themselves

  // Named barriers of the block; 0 is __syncthreads. Of each kind, consumer i waits at number i.
  enum Barrier { kTurn = 1, kQueriesScaled = 4, kTailCleared = 8, kNumbers = 16 };
  static_assert(kTurn + (kInTurn ? kConsumers : 0) <= kQueriesScaled);
  static_assert(kQueriesScaled + kConsumers <= kTailCleared && kTailCleared + kConsumers <= kNumbers);

  using TileQ = SmemTile<Element, 64, div_up(kHeadDim, 64) * 64>;  // of one consumer
  using TileK = SmemTile<Element, kBlockN, div_up(kHeadDim, 64) * 64>;
  using TileV = SmemTile<Element, kBlockN, div_up(kHeadDimV, 64) * 64>;

  using Keys = RowKeys;  // where queries and keys lie (attention/keys.cuh)
  using Schedule = AttentionSchedulerSm90<kBlockM, kBlockN, kStages, Keys>;
  using Epilogue = AttentionEpilogueSm90<Element, kHeadDimV, Keys>;
  using Work = typename Schedule::Work;
  using Steps = typename Schedule::Steps;
  static constexpr int kWorks = Schedule::kWorks;
  struct Smem {
    static constexpr int kOutBytes = 4 * 4096;  // of one consumer: two panels of 16 x 64 for each warp
    static constexpr int kQ = 0, kRest = kStages * (TileK::kBytes + TileV::kBytes) + kConsumers * kOutBytes + 1536;
    static constexpr int kQStages = 2 * kConsumers * TileQ::kBytes + kRest <= 227 * 1024 ? 2 : 1;
    static constexpr int kK = kQ + kQStages * kConsumers * TileQ::kBytes, kV = kK + kStages * TileK::kBytes;
    static constexpr int kOut = kV + kStages * TileV::kBytes, kWork = kOut + kConsumers * kOutBytes;
    static constexpr int kBarriers = kWork + kWorks * static_cast<int>(sizeof(Work));
    static constexpr int kBarriersQ = kBarriers, kBarriersK = kBarriersQ + kConsumers * RingBarriers<kQStages>::kBytes;
    static constexpr int kBarriersV = kBarriersK + RingBarriers<kStages>::kBytes;
    static constexpr int kBarriersWork = kBarriersV + RingBarriers<kStages>::kBytes;
    static constexpr int kBytes = kBarriersWork + RingBarriers<kWorks>::kBytes;
    static_assert(kBytes <= 227 * 1024 && kBytes - kWork <= 1536);
  };
  using RingQ = Ring<Smem::kQStages>;
  using RingKV = Ring<kStages>;
  using RingWork = Ring<kWorks>;

  // The rings of one block, for both sides.
  struct Rings {
    u32 s_q;
    RingBarriers<kStages> k, v;
    RingBarriers<kWorks> work;
    FM_DEVICE RingBarriers<Smem::kQStages> q(int consumer) const { return {s_q + consumer * RingBarriers<Smem::kQStages>::kBytes}; }
    FM_DEVICE explicit Rings(u32 s_base)
        : s_q(s_base + Smem::kBarriersQ), k{s_base + Smem::kBarriersK}, v{s_base + Smem::kBarriersV}, work{s_base + Smem::kBarriersWork} {}
  };

  FM_DEVICE static void run(const Params& p) {
    extern __shared__ __align__(1024) u8 smem[];
    const u32 s_base = smem_address(smem);
    const Rings rings(s_base);
    if (threadIdx.x == 0) {
      prefetch_tensormap(p.q_map), prefetch_tensormap(p.k_map), prefetch_tensormap(p.v_map), prefetch_tensormap(p.out_map);
      constexpr u32 kUsers = 4 * kConsumers;  // one thread per consumer warp reports
      for (int i = 0; i < kConsumers; ++i) rings.q(i).init(1, 4);
      rings.k.init(1, kUsers), rings.v.init(1, kUsers);
      rings.work.init(32, 1 + 128 * kConsumers);  // all who write or read a record
      fence_mbarrier_init();
    }
    __syncthreads();
    const int warp = warp_id();
    if (warp < 4) {
      setmaxnreg_dec<kProducerRegisters>();
      if (warp == 0 && lane_id() == 0) produce(p, smem, rings, s_base);
      if (warp == 1) Schedule::run(p, reinterpret_cast<Work*>(smem + Smem::kWork), rings.work);
      if (warp == 2 && p.clear_rest != kClearNothing) Epilogue::clear_rest(p);
    } else {
      setmaxnreg_inc<kConsumerRegisters>();
      consume(p, smem, rings, s_base, warp / 4 - 1);
    }
  }

  // ---- producer ----

  // One thread.
  FM_DEVICE static void produce(const Params& p, u8* smem, const Rings& rings, u32 s_base) {
    const Work* s_works = reinterpret_cast<const Work*>(smem + Smem::kWork);
    RingQ q;
    RingKV k, v;
    RingWork works;
    auto load_k = [&](const Work& w, int n) { load_keys<TileK>(p, w, p.k_map, rings.k, k, s_base + Smem::kK, 0, n); };
    auto load_v = [&](const Work& w, int n) { load_keys<TileV>(p, w, p.v_map, rings.v, v, s_base + Smem::kV, w.v_block * kHeadDimV, n); };
    int n_before = -1, before = 0;  // V comes one step later than K: it is needed one step later
    rings.work.wait_full(works);
    if (Smem::kQStages == 2 && s_works[works.stage].n_end != 0) load_q(p, s_works[works.stage], rings, s_base, q);
    while (s_works[works.stage].n_end != 0) {
      const int now = works.stage;
      const Work& w = s_works[now];
      // By then the consumers have all they need to finish the tile before, whose queries and record make room for the next ones.
      const int n_look_ahead = max(w.n_end - kStages, w.n_begin);
      for (int n = w.n_end - 1; n >= w.n_begin; --n) {
        load_k(w, n);
        if (n_before >= 0) load_v(s_works[before], n_before);
        if (n_before >= 0 && before != now) mbarrier_arrive(rings.work.empty(before));
        n_before = n, before = now;
        if (Smem::kQStages == 1 && n == w.n_end - 1) load_q(p, w, rings, s_base, q);
        if (n == n_look_ahead) {
          works.advance();
          rings.work.wait_full(works);
          if (Smem::kQStages == 2 && s_works[works.stage].n_end != 0) load_q(p, s_works[works.stage], rings, s_base, q);
        }
      }
    }
    if (n_before >= 0) load_v(s_works[before], n_before);
  }

  FM_DEVICE static void load_q(const Params& p, const Work& w, const Rings& rings, u32 s_base, RingQ& q) {
#pragma unroll 1
    for (int i = 0; i < kConsumers; ++i) {
      const u32 s_full = rings.q(i).full(q.stage), s_tile = s_base + Smem::kQ + (q.stage * kConsumers + i) * TileQ::kBytes;
      rings.q(i).wait_empty(q);
      mbarrier_arrive_expect_tx(s_full, TileQ::kBytes);
      Keys::load_queries<TileQ>(p, w, s_tile, s_full, i * 64);
    }
    q.advance();
  }

  // Tile n of K or V, from column `col` on.
  template <class Tile>
  FM_DEVICE static void load_keys(const Params& p, const Work& w, const TensorMap& map, const RingBarriers<kStages>& ring, RingKV& at, u32 s_tiles,
                                  int col, int n) {
    ring.wait_empty(at);
    mbarrier_arrive_expect_tx(ring.full(at.stage), Tile::kBytes);
    Keys::load_keys<Tile>(p, w, map, s_tiles + at.stage * Tile::kBytes, ring.full(at.stage), col, n);
    at.advance();
  }

  // ---- consumer ----

  FM_DEVICE static void consume(const Params& p, u8* smem, const Rings& rings, u32 s_base, int consumer) {
    const Work* s_works = reinterpret_cast<const Work*>(smem + Smem::kWork);
    const int tile_row = consumer * 64 + (warp_id() & 3) * 16;  // of this warp's rows in the tile of queries
    float r_out[1][kHeadDimV / 8][4], r_s[1][kBlockN / 8][4];
    u32 r_p[kBlockN / 16][4];
    Softmax softmax;
    float correction[2];
    RingQ q;
    RingKV k, v;
    RingWork works, done;
    int now = 0;  // work of the last step

    if (kInTurn && consumer == 0) barrier_arrive(kTurn, 256);  // the first turn is consumer 0's
    rings.work.wait_full(works);
    if (s_works[0].n_end == 0) return;
    Steps steps = steps_of(s_works[0], consumer);
    int n = steps.end - 1;
    works.advance();

    // The first scores, which nothing hides.
    rings.q(consumer).wait_full(q);
    if constexpr (kBounded) scale_queries(p, s_base, consumer, q);
    skip_k(rings, k, consumer, steps.skip_before);
    rings.k.wait_full(k);
    wgmma_fence();
    multiply_qk(r_s, s_base, consumer, q, k);
    skip_v(rings, v, steps.skip_before);
    wgmma_wait_group<0>(r_s[0]);
    release(rings.k.empty(k.stage));
    k.advance();
    if (n == steps.begin) release(rings.q(consumer).empty(q.stage));
    change_scores(p, s_works[0], steps, r_s, tile_row, n);
    if constexpr (!kBounded) softmax.raise_max(r_s, Variant::exponent(p), correction);
    exponentiate(p, softmax, s_works[0], steps, r_s, tile_row, n);
    pack_operand<Element>(r_p, r_s[0]);

    float out_scale[2], lse[2];              // of the tile that is about to be written
    int tail = tail_rows(p, s_works[0], n);  // rows of the next V tile behind the last key
    bool k_here = false;
    bool fresh = true, pending = false;  // out holds nothing of this tile yet; it still holds the tile before

    // S of step n - 1, or of the next tile's first step, then out of step n. False: there is no next tile.
    auto step = [&](auto plain) {
      // A plain step is one of many: inside its tile, no score masked, nothing to be written.
      constexpr bool kPlain = decltype(plain)::value;
      const bool last = !kPlain && n == steps.begin;
      int here = now, skip = 0;
      if (last) {
        skip_k(rings, k, consumer, steps.skip_after);
        rings.work.wait_full(works);
        here = works.stage;
        if (s_works[here].n_end == 0) return false;
        skip = steps.skip_after;
        steps = steps_of(s_works[here], consumer);
        n = steps.end;
        skip_k(rings, k, consumer, steps.skip_before);
        skip += steps.skip_before;
        works.advance();
        q.advance();
        rings.q(consumer).wait_full(q);
        if constexpr (kBounded) scale_queries(p, s_base, consumer, q);
      }
      --n;
      if (!k_here) rings.k.wait_full(k);
      const bool v_here = rings.v.is_full(v);
      if constexpr (kInTurn) barrier_sync(kTurn + consumer, 256);
      wgmma_fence();
      multiply_qk(r_s, s_base, consumer, q, k);
      if (!kPlain && pending) {
        if constexpr (kInTurn) barrier_arrive(kTurn + (consumer + 1) % kConsumers, 256);
        Epilogue::write(Epilogue::output_of(p, s_works[done.stage], tile_row), s_base + Smem::kOut + tile_row / 16 * 4096, r_out[0], out_scale, lse);
        mbarrier_arrive(rings.work.empty(done.stage));
        done.advance();
      }
      if (!v_here) rings.v.wait_full(v);
      if (!kPlain && tail) clear_tail(s_base, consumer, v, tail);
      wgmma_fence();
      multiply_pv(r_out[0], r_p, s_base, v, !kPlain && fresh, [&] {
        if (kInTurn && (kPlain || !pending)) barrier_arrive(kTurn + (consumer + 1) % kConsumers, 256);
      });
      if (last) {
        softmax.finish(Variant::exponent(p), Epilogue::sinks_of(p, s_works[now]).of, out_scale, lse);
        softmax = Softmax();
      }
      wgmma_wait_group<1>(r_s[0]);
      release(rings.k.empty(k.stage));
      k.advance();
      if (n == steps.begin) release(rings.q(consumer).empty(q.stage));

      if (!kPlain || Variant::kScore) change_scores(p, s_works[here], steps, r_s, tile_row, n);
      if constexpr (!kBounded) softmax.raise_max(r_s, Variant::exponent(p), correction);
      // The next step's keys are waited for here: ptxas moves a wait for products up over arithmetic, but not over this branch.
      k_here = n > steps.begin;
      if (k_here) rings.k.wait_full(k);
      wgmma_wait_group<0>(r_out[0]);
      release(rings.v.empty(v.stage));
      v.advance();
      skip_v(rings, v, skip);
      if (!kBounded && !last && any_differs(correction)) scale_rows(r_out, correction);
      exponentiate<kPlain>(p, softmax, s_works[here], steps, r_s, tile_row, n);
      pack_operand<Element>(r_p, r_s[0]);
      tail = last ? tail_rows(p, s_works[here], n) : 0;
      fresh = pending = last;
      now = here;
      return true;
    };
#pragma unroll 1
    while (step(Bool<false>())) {
      if constexpr (Variant::kWide) continue;  // a bias is slow to load and to compile: no second loop for it
#pragma unroll 1
      while (!pending && n > steps.begin && steps.whole(n - 1)) step(Bool<true>());
    }
#pragma unroll 1
    for (bool finished = !pending;; finished = true) {
      if (finished) {
        rings.v.wait_full(v);
        if (tail) clear_tail(s_base, consumer, v, tail);
        wgmma_fence();
        multiply_pv(r_out[0], r_p, s_base, v, fresh, [] {});
        wgmma_wait_group<0>(r_out[0]);
        softmax.finish(Variant::exponent(p), Epilogue::sinks_of(p, s_works[now]).of, out_scale, lse);
      }
      Epilogue::write(Epilogue::output_of(p, s_works[finished ? now : done.stage], tile_row), s_base + Smem::kOut + tile_row / 16 * 4096, r_out[0], out_scale, lse);
      if (finished) break;
    }
    if (lane_id() == 0) bulk_wait_group_read<0>();  // the block's shared memory ends with it
  }

  FM_DEVICE static Steps steps_of(const Work& w, int consumer) {
    const Steps& s = w.steps[consumer];
    return {uniform(s.begin), uniform(s.end), uniform(s.skip_before), uniform(s.skip_after), uniform(s.first_whole), uniform(s.last_whole)};
  }

  FM_DEVICE static void skip_k(const Rings& rings, RingKV& k, int consumer, int count) {
#pragma unroll 1
    for (; count > 0; --count) {
      rings.k.wait_full(k);
      release(rings.k.empty(k.stage));
      k.advance();
      if constexpr (kInTurn) {
        barrier_sync(kTurn + consumer, 256);
        barrier_arrive(kTurn + (consumer + 1) % kConsumers, 256);
      }
    }
  }

  FM_DEVICE static void skip_v(const Rings& rings, RingKV& v, int count) {
#pragma unroll 1
    for (; count > 0; --count) {
      rings.v.wait_full(v);
      release(rings.v.empty(v.stage));
      v.advance();
    }
  }

  // One lane per warp reports that the warp is done with a buffer.
  FM_DEVICE static void release(u32 s_barrier) {
    if (lane_id() == 0) mbarrier_arrive(s_barrier);
  }

  FM_DEVICE static void multiply_qk(float (&r_s)[1][kBlockN / 8][4], u32 s_base, int consumer, const RingQ& q, const RingKV& k) {
    u32 s_q = s_base + Smem::kQ + (q.stage * kConsumers + consumer) * TileQ::kBytes;
    keep_register(s_q);  // or every step of the product gets registers of its own, for the whole loop
    multiply<Element, kHeadDim>(r_s, KMajor<TileQ>(s_q), KMajor<TileK>(s_base + Smem::kK + k.stage * TileK::kBytes), true);
    wgmma_commit_group();
  }

  // pass_turn() comes before the last products: handing over takes about as long as they do.
  template <class F>
  FM_DEVICE static void multiply_pv(float (&r_out)[kHeadDimV / 8][4], const u32 (&r_p)[kBlockN / 16][4], u32 s_base, const RingKV& v, bool fresh,
                                    F&& pass_turn) {
    multiply<Element, 2>(r_out, r_p, MNMajor<TileV>(s_base + Smem::kV + v.stage * TileV::kBytes), fresh, pass_turn);
    wgmma_commit_group();
  }

  FM_DEVICE static int tail_rows(const Params& p, const Work& w, int n) { return p.ragged ? max(0, (n + 1) * kBlockN - w.band.cols) : 0; }

  // What follows the last key of a sequence may be anything, and 0 * NaN is NaN: those rows of V become 0. Every consumer does it for
  // itself before its product; that another one does the same at the same time changes nothing.
  FM_DEVICE static void clear_tail(u32 s_base, int consumer, const RingKV& v, int rows) {
    const u32 s_end = s_base + Smem::kV + v.stage * TileV::kBytes + TileV::kPanelBytes;
    for (int i = thread_index() % 128; i < rows * TileV::kPanelChunks; i += 128)
#pragma unroll
      for (int panel = 0; panel < TileV::kPanels; ++panel)
        st_shared_v4_b32(s_end + panel * TileV::kPanelBytes - 16 * (i + 1), 0, 0, 0, 0);
    fence_proxy_async();
    barrier_sync(kTailCleared + consumer, 128);
  }

  template <int kN>
  FM_DEVICE static void change_scores(const Params& p, const Work& w, const Steps& steps, float (&r_s)[1][kN][4], int tile_row, int n) {
    if constexpr (Variant::kScore) Variant::apply(p, r_s, w.batch, w.head, w.m0 + tile_row, n * kBlockN, w.band);
    if (!kBounded && !steps.whole(n)) mask_scores(r_s[0], w.band, w.m0 + tile_row, n * kBlockN);
  }

  template <bool kPlain = false, int kN>
  FM_DEVICE static void exponentiate(const Params& p, Softmax& softmax, const Work& w, const Steps& steps, float (&r_s)[1][kN][4], int tile_row,
                                     int n) {
    if constexpr (kBounded) {
      const bool masked = !kPlain && !steps.whole(n);
      const int row = w.m0 + tile_row, col = n * kBlockN;
      auto keys_of_row = [&](int i) {
        const int r = row + i * 8 + (lane_id() >> 2);
        return w.band.last(r) - w.band.first(r) + 1;
      };
      softmax.exponentiate(r_s, Variant::exponent(p), !kPlain && !steps.any_whole(), keys_of_row, [&] {
        if (masked) mask_scores(r_s[0], w.band, row, col, 0.f);
      });
    } else {
      softmax.exponentiate(r_s, Variant::exponent(p));
    }
  }

  // By a power of two: exact. The threads of one consumer, on the queries that have just arrived.
  FM_DEVICE static void scale_queries(const Params& p, u32 s_base, int consumer, const RingQ& q) {
    const u32 s_thread = s_base + Smem::kQ + (q.stage * kConsumers + consumer) * TileQ::kBytes + threadIdx.x % 128 * 16;
    const u32 scale = pack2<Element>(p.query_scale, p.query_scale);
#pragma unroll
    for (int i = 0; i < TileQ::kBytes; i += 128 * 16) {
      u32 r[4];
      ld_shared_v4_b32(r, s_thread + i);
      st_shared_v4_b32(s_thread + i, mul_rn_bf16x2(r[0], scale), mul_rn_bf16x2(r[1], scale), mul_rn_bf16x2(r[2], scale), mul_rn_bf16x2(r[3], scale));
    }
    fence_proxy_async();
    barrier_sync(kQueriesScaled + consumer, 128);
  }
};

}  // namespace fm
