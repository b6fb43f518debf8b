// Attention forward for Hopper (sm_90a): the same function as fwd_sm80.cuh, for bf16 and fp16 rows that start
// at multiples of 16 bytes.
//
//   S = scores(q k^T), masked to the band that causal, window and sequence ends leave
//   P = softmax(S)    out = P v    lse = log sum exp S (natural logarithm), sinks included
//
// Overwrites the rows of out and lse that exist, touches no others. A row that sees no key gives out 0 and
// lse -inf. Same bits in every run: one warpgroup owns a row from its last key tile to its first, and the
// order of tiles does not depend on time.
//
// Blocks stay on their SM and take tiles of kBlockM queries one after the other. One warp (the scheduler)
// finds the tiles, one thread (the producer) lets the copy engine fill rings of K and V tiles; each warpgroup
// but the first (a consumer) owns 64 queries. A consumer sees one endless row of steps, a step being one tile
// of keys: while the tensor cores compute S of the next step and out of this one, it does the softmax, also
// across the end of a tile, so that a short sequence has no ramps. Two or three consumers issue their
// products in turn (FlashAttention-3's ping-pong): one's softmax runs under the other's products. Warpgroups
// apart for softmax and output correction, as on Blackwell, would have to pass scores through shared memory,
// which the products already keep busy (benchmarks/NOTEBOOK.md has what was measured).
//
// Where heads that share keys have few queries, 2^pack_bits of them lie side by side in a tile, each query as
// so many rows: keys are read once for all of them, and tiles are full. The tensor maps of q and out put the
// rows in that order and back.
#pragma once
#include "attention/bias_sm90.cuh"
#include "attention/epilogue_sm90.cuh"
#include "attention/keys.cuh"
#include "attention/outside_sm90.cuh"
#include "attention/params.cuh"
#include "attention/schedule_sm90.cuh"
#include "attention/scores_sm90.cuh"
#include "attention/smem_sm90.cuh"
#include "attention/variant.cuh"
#include "attention/walk_sm90.cuh"
#include "ptx/tma.cuh"
#include "ptx/warpgroup.cuh"
#include "tile/gemm.cuh"
#include "tile/warpgroup_gemm.cuh"

namespace fm {

template <class Element_, int kHeadDim_, int kHeadDimV_, int kBlockM_, int kBlockN_, int kStages_,
          class Variant_>
struct AttentionFwdSm90 {
  using Element = Element_;
  using Variant = Variant_;
  using Keys = RowKeys;  // where queries and keys lie (attention/keys.cuh)
  static_assert(AttentionKeys<Keys>);
  using Params = AttentionFwdSm90Params;
  static constexpr int kHeadDim = kHeadDim_, kHeadDimV = kHeadDimV_, kBlockM = kBlockM_, kBlockN = kBlockN_;
  static constexpr int kStages = kStages_;
  static constexpr int kConsumers = kBlockM / 64, kThreads = 128 * (1 + kConsumers);
  // Registers of a thread: producers keep the least with which they do not spill, consumers get the rest.
  static constexpr int kProducerRegisters = kConsumers >= 3 ? 32 : 40;
  static constexpr int kConsumerRegisters = kConsumers == 4 ? 112 : kConsumers == 3 ? 160 : 232;
  static_assert(kProducerRegisters + kConsumers * kConsumerRegisters <= launch_registers(1 + kConsumers));
  static constexpr bool kBounded = Variant::kBounded;
  // Four consumers fill the gaps of each other by themselves.
  static constexpr bool kInTurn = kConsumers == 2 || kConsumers == 3;

  // Named barriers of the block; 0 is __syncthreads. Of each kind, consumer i waits at number i.
  enum Barrier { kTurn = 1, kQueriesScaled = 4, kOutsideCleared = 8 };
  static_assert(kTurn + (kInTurn ? kConsumers : 0) <= kQueriesScaled);
  static_assert(kQueriesScaled + kConsumers <= kOutsideCleared);
  static_assert(kOutsideCleared + kConsumers <= kNamedBarriers);

  using Bias = AttentionBiasOf<Element, Variant, kBlockM, kBlockN>;
  using Scheduler = AttentionSchedulerSm90<kBlockM, kBlockN, kStages, Keys, Variant::kMask, Bias::kKeyStep>;
  using KeyTiles = KeyTilesOf<Variant::kMask>;  // which tile of keys a step is
  using Scores = AttentionScoresSm90<Variant, kBlockN>;
  using Softmax = typename Scores::Softmax;
  using Epilogue = AttentionEpilogueSm90<Element, kHeadDimV, Keys>;
  using Work = typename Scheduler::Work;
  using Steps = typename Scheduler::Steps;
  static constexpr int kWorks = Scheduler::kWorks;
  static constexpr bool kPasses = Scheduler::kPasses;

  // What the block keeps in shared memory, and the rings between both sides (attention/smem_sm90.cuh).
  using Smem =
      AttentionSmemSm90<Element, kHeadDim, kHeadDimV, kBlockM, kBlockN, kStages, Bias::kBytes, Work, kWorks>;
  using TileQ = typename Smem::TileQ;
  using TileK = typename Smem::TileK;
  using TileV = typename Smem::TileV;
  using Outside = OutsideRows<Keys, TileV, Bias::kKeyStep>;
  using RingQ = typename Smem::RingQ;
  using RingKV = typename Smem::RingKV;
  using RingWork = typename Smem::RingWork;
  using Rings = typename Smem::Rings;
  using Walk = AttentionWalkSm90<Params, Smem, Steps, KeyTiles>;
  using Held = AttentionHeldSm90<RingWork, Outside>;

  FM_DEVICE static void run(const Params& p) {
    extern __shared__ __align__(1024) u8 smem[];
    const u32 s_base = smem_address(smem);
    const Rings rings(s_base);
    if (threadIdx.x == 0) {
      prefetch_tensormap(p.q_map), prefetch_tensormap(p.k_map);
      prefetch_tensormap(p.v_map), prefetch_tensormap(p.out_map);
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
      if (warp == 1) Scheduler::run(p, reinterpret_cast<Work*>(smem + Smem::kWork), rings.work);
      if (warp >= 2 && (p.clear_rest != kClearNothing || p.may_unsee)) Epilogue::clear_rest(p, warp - 2);
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
    auto load_k = [&](const Work& w, int n) {
      load_keys<TileK, Bias>(p, w, p.k_map, rings.k, k, s_base + Smem::kK, 0, KeyTiles::tile(p, n));
    };
    auto load_v = [&](const Work& w, int n) {
      load_keys<TileV, NoBias>(p, w, p.v_map, rings.v, v, s_base + Smem::kV, w.v_block * kHeadDimV,
                               KeyTiles::tile(p, n));
    };
    // V comes one step later than K, since it is needed one step later: step n_before of record `before`; -1:
    // none yet.
    int n_before = -1, before = 0;
    rings.work.wait_full(works);
    if (Smem::kQStages == 2 && s_works[works.stage].n_end != 0)
      load_q(p, s_works[works.stage], rings, s_base, q);
    while (s_works[works.stage].n_end != 0) {
      const int now = works.stage;
      const Work& w = s_works[now];
      // By then the consumers have all they need to finish the tile before, whose queries and record make
      // room.
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
          const bool more = s_works[works.stage].n_end != 0;
          if (Smem::kQStages == 2 && more) load_q(p, s_works[works.stage], rings, s_base, q);
        }
      }
    }
    if (n_before >= 0) load_v(s_works[before], n_before);
  }

  FM_DEVICE static void load_q(const Params& p, const Work& w, const Rings& rings, u32 s_base, RingQ& q) {
#pragma unroll 1
    for (int i = 0; i < kConsumers; ++i) {
      const u32 s_full = rings.q(i).full(q.stage);
      const u32 s_tile = Smem::query_tile(s_base, i, q);
      rings.q(i).wait_empty(q);
      mbarrier_arrive_expect_tx(s_full, TileQ::kBytes);
      Keys::template load_queries<TileQ>(p, w, s_tile, s_full, i * 64);
    }
    q.advance();
  }

  // Tile n of K or V, from column `col` on, and the bias's beside K.
  template <class Tile, class With>
  FM_DEVICE static void load_keys(const Params& p, const Work& w, const TensorMap& map,
                                  const RingBarriers<kStages>& ring, RingKV& at, u32 s_tiles, int col,
                                  int n) {
    ring.wait_empty(at);
    mbarrier_arrive_expect_tx(ring.full(at.stage), Tile::kBytes + With::kLoaded);
    const u32 s_tile = s_tiles + at.stage * Tile::kBytes;
    Keys::template load_keys<Tile>(p, w, map, s_tile, ring.full(at.stage), col, n);
    With::load(p, w, s_tiles - Smem::kK + Smem::kBias + at.stage * With::kBytes, ring.full(at.stage), n);
    at.advance();
  }

  // ---- consumer ----

  FM_DEVICE static void consume(const Params& p, u8* smem, const Rings& rings, u32 s_base, int consumer) {
    const Work* s_works = reinterpret_cast<const Work*>(smem + Smem::kWork);
    Walk at;
    Held held;
    if (consumer == 0) pass_turn(kConsumers - 1);  // the first turn is consumer 0's
    const int tile_row = consumer * 64 + (warp_id() & 3) * 16;  // of this warp's rows in the tile of queries
    float r_out[1][kHeadDimV / 8][4], r_s[1][kBlockN / 8][4];
    u32 r_p[kBlockN / 16][4];
#pragma unroll 1
    while (find_rows<kPasses>(s_works, rings, consumer, at, held,
                              [&] { take_turn(consumer), pass_turn(consumer); })) {
      Softmax softmax;
      float correction[2];

      // The first scores, which nothing hides.
      rings.q(consumer).wait_full(at.q);
      if constexpr (kBounded) scale_queries(p, s_base, consumer, at.q);
      rings.k.skip(at.k, at.steps.skip_high, [&] { take_turn(consumer), pass_turn(consumer); });
      rings.k.wait_full(at.k);
      if constexpr (kPasses) take_turn(consumer);  // others may be in the middle
      wgmma_fence();
      multiply<Element, kHeadDim>(r_s, Smem::queries(s_base, consumer, at.q), Smem::keys(s_base, at.k), true);
      wgmma_commit_group();
      if constexpr (kPasses) pass_turn(consumer);
      rings.v.skip(at.v, at.steps.skip_high, [] {});
      wgmma_wait_group<0>(r_s[0]);
      add_bias(p, s_works[at.now], s_base, consumer, at, r_s, tile_row);
      rings.k.release(at.k);
      at.k.advance();
      if (at.n == at.steps.begin) rings.q(consumer).release(at.q);
      Scores::change(p, s_works[at.now], r_s, tile_row, at.tile(p), at.whole(p, at.n, consumer),
                     at.in_band(p, at.n), Scores::words_of(p, s_works[at.now], tile_row, at.tile(p)));
      if constexpr (!kBounded) softmax.raise_max(r_s, Variant::exponent(p), correction);
      Scores::exponentiate(p, softmax, s_works[at.now], at.steps, r_s, tile_row, at.n);
      pack_operand<Element>(r_p, r_s[0]);

      float out_scale[2], lse[2];  // of the tile that is about to be written
      bool k_here = false;         // the keys of the next step have been waited for
      held.outside.head = Outside::before(p, s_works[at.now], at.tile(p));
      held.outside.tail = Outside::behind(p, s_works[at.now], at.tile(p));

      // S of step n - 1, or of the next tile's first step, then out of step n. False: the run ends.
      auto step = [&](auto kind) {
        constexpr bool kInside = decltype(kind)::kInside, kMasked = decltype(kind)::kMasked;
        const bool last = !kInside && at.n == at.steps.begin;
        int here = at.now, skip = 0;
        if (last) {
          rings.k.skip(at.k, at.steps.skip_low, [&] { take_turn(consumer), pass_turn(consumer); });
          rings.work.wait_full(at.works);
          here = at.works.stage;
          if (kPasses ? s_works[here].steps[consumer].none() : s_works[here].n_end == 0) return false;
          skip = at.steps.skip_low;
          at.steps = s_works[here].steps_of(consumer);
          at.n = at.steps.end;
          rings.k.skip(at.k, at.steps.skip_high, [&] { take_turn(consumer), pass_turn(consumer); });
          skip += at.steps.skip_high;
          at.works.advance();
          at.q.advance();
          rings.q(consumer).wait_full(at.q);
          if constexpr (kBounded) scale_queries(p, s_base, consumer, at.q);
        }
        --at.n;
        typename Scores::Words words{};  // read while the products run
        if (kMasked) words = Scores::words_of(p, s_works[here], tile_row, at.tile(p));
        if (!k_here) rings.k.wait_full(at.k);
        const bool v_here = rings.v.is_full(at.v);
        take_turn(consumer);
        wgmma_fence();
        multiply<Element, kHeadDim>(r_s, Smem::queries(s_base, consumer, at.q), Smem::keys(s_base, at.k),
                                    true);
        wgmma_commit_group();
        if (!kInside && held.pending) {
          pass_turn(consumer);
          const auto to = Epilogue::output_of(p, s_works[held.done.stage], tile_row);
          write(to, s_base, tile_row, r_out[0], out_scale, lse);
          mbarrier_arrive(rings.work.empty(held.done.stage));
          held.done.advance();
        }
        if (!v_here) rings.v.wait_full(at.v);
        if (!kInside) clear_outside(s_base, consumer, at.v, held);
        wgmma_fence();
        // The turn is passed before the last two products: handing over takes about as long as they do.
        multiply<Element, 2>(r_out[0], r_p, Smem::values(s_base, at.v), !kInside && held.fresh, [&] {
          if (kInside || !held.pending) pass_turn(consumer);
        });
        wgmma_commit_group();
        if (last) {
          softmax.finish(Variant::exponent(p), Epilogue::sinks_of(p, s_works[at.now]).of, out_scale, lse);
          softmax = Softmax();
        }
        wgmma_wait_group<1>(r_s[0]);
        add_bias(p, s_works[here], s_base, consumer, at, r_s, tile_row);
        rings.k.release(at.k);
        at.k.advance();
        if (at.n == at.steps.begin) rings.q(consumer).release(at.q);

        if (kMasked || Variant::kScore)
          Scores::change(p, s_works[here], r_s, tile_row, at.tile(p),
                         !kMasked || (!kInside && at.whole(p, at.n, consumer)),
                         kInside || at.in_band(p, at.n), words);
        if constexpr (!kBounded) softmax.raise_max(r_s, Variant::exponent(p), correction);
        // The next step's keys are waited for here: ptxas moves a wait for products up over arithmetic, but
        // not over this branch.
        k_here = at.n > at.steps.begin;
        if (k_here) rings.k.wait_full(at.k);
        wgmma_wait_group<0>(r_out[0]);
        rings.v.release(at.v);
        at.v.advance();
        rings.v.skip(at.v, skip, [] {});
        if (!kBounded && !last && any_differs(correction)) scale_rows(r_out, correction);
        Scores::template exponentiate<!kMasked>(p, softmax, s_works[here], at.steps, r_s, tile_row, at.n);
        pack_operand<Element>(r_p, r_s[0]);
        held.outside.head = Outside::before(p, s_works[here], at.tile(p));
        held.outside.tail = last ? Outside::behind(p, s_works[here], at.tile(p)) : 0;
        held.fresh = held.pending = last;
        at.now = here;
        return true;
      };
#pragma unroll 1
      while (step(StepKind<false, true>())) {
        if constexpr (Variant::kOneLoop) continue;
#pragma unroll 1
        while (!held.pending && at.n > at.steps.begin && at.in_band(p, at.n - 1)) {
          if (KeyTiles::whole(p, at.n - 1, consumer)) step(StepKind<true, false>());
          else if constexpr (Variant::kScore) break;  // registers would not do
          else step(StepKind<true, true>());
        }
      }
      // What is left: the tile before, if it is pending, then out of the last step.
#pragma unroll 1
      for (bool finished = !held.pending;; finished = true) {
        if (finished) {
          rings.v.wait_full(at.v);
          clear_outside(s_base, consumer, at.v, held);
          wgmma_fence();
          multiply<Element, 2>(r_out[0], r_p, Smem::values(s_base, at.v), held.fresh, [] {});
          wgmma_commit_group();
          wgmma_wait_group<0>(r_out[0]);
          if constexpr (kPasses) {
            rings.v.release(at.v);
            at.v.advance();
            rings.v.skip(at.v, at.steps.skip_low, [] {});
          }
          softmax.finish(Variant::exponent(p), Epilogue::sinks_of(p, s_works[at.now]).of, out_scale, lse);
        }
        const int record = kPasses || !finished ? held.done.stage : at.now;
        const auto to = Epilogue::output_of(p, s_works[record], tile_row);
        write(to, s_base, tile_row, r_out[0], out_scale, lse);
        if constexpr (kPasses) {
          mbarrier_arrive(rings.work.empty(held.done.stage));
          held.done.advance();
        }
        if (finished) break;
      }
      if constexpr (!kPasses) break;
      at.q.advance();
    }
    if (Smem::kStaged && lane_id() == 0) bulk_wait_group_read<0>();  // the block's shared memory ends with it
  }

  // The scores are at hand, and the stage of the ring not yet given back.
  template <int kN>
  FM_DEVICE static void add_bias(const Params& p, const Work& w, u32 s_base, int consumer, const Walk& at,
                                 float (&r_s)[1][kN][4], int tile_row) {
    if constexpr (Bias::kUsed) {
      const u32 s_bias = s_base + Smem::kBias + at.k.stage * Bias::kBytes + consumer * Bias::kConsumerBytes;
      Scores::template add_bias<Bias>(p, w, r_s, tile_row, at.tile(p), s_bias);
      if (const int before = Outside::before(p, w, at.tile(p))) hide_keys(r_s[0], before);
    }
  }

  FM_DEVICE static void write(const typename Epilogue::Output& to, u32 s_base, int tile_row,
                              const float (&r_out)[kHeadDimV / 8][4], const float (&out_scale)[2],
                              const float (&lse)[2]) {
    const u32 s_panels = s_base + Smem::kOut + tile_row / 16 * kStagedBytes;
    Epilogue::template write<Smem::kStaged>(to, s_panels, r_out, out_scale, lse);
  }

  // Consumers issue their products in turn, two or three of them.
  FM_DEVICE static void take_turn(int consumer) {
    if constexpr (kInTurn) barrier_sync(kTurn + consumer, 256);
  }
  FM_DEVICE static void pass_turn(int consumer) {
    if constexpr (kInTurn) barrier_arrive(kTurn + (consumer + 1) % kConsumers, 256);
  }

  // By a power of two: exact. On the queries that have just arrived.
  FM_DEVICE static void scale_queries(const Params& p, u32 s_base, int consumer, const RingQ& q) {
    const u32 s_tile = Smem::query_tile(s_base, consumer, q);
    scale_tile<Element, TileQ>(s_tile, p.query_scale, kQueriesScaled + consumer);
  }
  FM_DEVICE static void clear_outside(u32 s_base, int consumer, const RingKV& v, const Held& held) {
    held.outside.clear(s_base + Smem::kV + v.stage * TileV::kBytes, kOutsideCleared + consumer);
  }
};

}  // namespace fm
