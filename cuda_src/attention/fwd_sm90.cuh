// Attention forward for Hopper (sm_90a): the same function as fwd_sm80.cuh, for bf16 and fp16 rows that start at multiples of 16 bytes.
//
//   S = scores(q k^T), masked to the band that causal, window and sequence ends leave    P = softmax(S)    out = P v
//   lse = log sum exp S (natural logarithm), sinks included
//
// Overwrites the rows of out and lse that exist, touches no others. A row that sees no key gives out 0 and lse -inf. Same bits in
// every run: one warpgroup owns a row from its last key tile to its first, and the order of tiles does not depend on time.
//
// Blocks stay on their SM and take tiles of kBlockM queries in a fixed order. One warp (the producer) lets the copy engine fill
// rings of K and V tiles; each other warpgroup (a consumer) owns 64 queries. A consumer sees one endless row of steps, a step being
// one tile of keys: while the tensor cores compute S of the next step and out of this one, it does the softmax, also across the
// end of a tile, so that a short sequence has no ramps. Consumers issue their products in turn (FlashAttention-3's ping-pong):
// one's softmax runs under the other's products. Warpgroups apart for softmax and output correction, as on Blackwell, would have to
// pass scores through shared memory, which the products already keep busy (benchmarks/NOTEBOOK.md has what was measured).
#pragma once
#include "attention/params.cuh"
#include "attention/variant.cuh"
#include "math/reduce.cuh"
#include "math/softmax.cuh"
#include "ptx/tma.cuh"
#include "ptx/warpgroup.cuh"
#include "ptx/wgmma.cuh"
#include "tile/epilogue.cuh"
#include "tile/gemm.cuh"
#include "tile/mask.cuh"
#include "tile/pipeline.cuh"
#include "tile/scheduler.cuh"
#include "tile/smem.cuh"

namespace fm {

template <class Element_, int kHeadDim_, int kHeadDimV_, int kBlockM_, int kBlockN_, int kStages_, class Variant_>
struct AttentionFwdSm90 {
  using Element = Element_;
  using Variant = Variant_;
  using Params = AttentionFwdSm90Params;
  static constexpr int kHeadDim = kHeadDim_, kHeadDimV = kHeadDimV_, kBlockM = kBlockM_, kBlockN = kBlockN_, kStages = kStages_;
  static constexpr int kConsumers = kBlockM / 64, kThreads = 128 * (1 + kConsumers);
  static constexpr int kProducerRegisters = kConsumers >= 3 ? 32 : 40, kConsumerRegisters = kConsumers == 4 ? 112 : kConsumers == 3 ? 160 : 232;
  static constexpr bool kInTurn = kConsumers == 2 || kConsumers == 3;  // four fill the gaps of each other by themselves
  static constexpr int kWorks = 4;  // tiles that the scheduler may be ahead, and those that a consumer still needs

  using TileQ = SmemTile<Element, 64, div_up(kHeadDim, 64) * 64>;  // of one consumer
  using TileK = SmemTile<Element, kBlockN, div_up(kHeadDim, 64) * 64>;
  using TileV = SmemTile<Element, kBlockN, div_up(kHeadDimV, 64) * 64>;

  // A consumer's part of a tile: the steps begin <= n < end. The others of the tile, where all its rows are masked, it lets pass, so
  // many before and after its own; in steps first_whole <= n < last_whole no score of its rows is masked.
  struct Steps {
    int begin, end, skip_before, skip_after, first_whole, last_whole;
    FM_DEVICE bool whole(int n) const { return first_whole <= n && n < last_whole; }
  };
  // One tile of queries. Written by the scheduler, read by all.
  struct Work {
    BandMask band;
    int batch, head, head_k, m0, v_block;
    int q_row, k_row;    // rows of the arrays where the tile's first query and the sequence's first key lie
    int n_begin, n_end;  // key tiles; n_end 0: there is no more work
    Steps steps[kConsumers];
  };
  struct Smem {
    static constexpr int kOutBytes = 4 * 4096;  // of one consumer: two panels of 16 x 64 for each warp
    static constexpr int kQ = 0, kRest = kStages * (TileK::kBytes + TileV::kBytes) + kConsumers * kOutBytes + 1536;
    static constexpr int kQStages = 2 * kConsumers * TileQ::kBytes + kRest <= 227 * 1024 ? 2 : 1;
    static constexpr int kK = kQ + kQStages * kConsumers * TileQ::kBytes, kV = kK + kStages * TileK::kBytes;
    static constexpr int kOut = kV + kStages * TileV::kBytes, kWork = kOut + kConsumers * kOutBytes;
    static constexpr int kBarriers = kWork + kWorks * static_cast<int>(sizeof(Work));
    static constexpr int kBarriersQ = kBarriers, kBarriersK = kBarriersQ + RingBarriers<kQStages>::kBytes;
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
    RingBarriers<Smem::kQStages> q;
    RingBarriers<kStages> k, v;
    RingBarriers<kWorks> work;
    FM_DEVICE explicit Rings(u32 s_base)
        : q{s_base + Smem::kBarriersQ}, k{s_base + Smem::kBarriersK}, v{s_base + Smem::kBarriersV}, work{s_base + Smem::kBarriersWork} {}
  };

  FM_DEVICE static void run(const Params& p) {
    extern __shared__ __align__(1024) u8 smem[];
    const u32 s_base = smem_address(smem);
    const Rings rings(s_base);
    if (threadIdx.x == 0) {
      prefetch_tensormap(p.q_map), prefetch_tensormap(p.k_map), prefetch_tensormap(p.v_map), prefetch_tensormap(p.out_map);
      constexpr u32 kUsers = 4 * kConsumers;  // one thread per consumer warp reports
      rings.q.init(1, kUsers), rings.k.init(1, kUsers), rings.v.init(1, kUsers), rings.work.init(1, kUsers);
      fence_mbarrier_init();
    }
    __syncthreads();
    const int warp = warp_id();
    if (warp < 4) {
      setmaxnreg_dec<kProducerRegisters>();
      if (warp == 0 && lane_id() == 0) produce(p, smem, rings, s_base);
      if (warp == 1) schedule(p, smem, rings);
      if (warp == 2 && p.clear_rest != 0) clear_rest(p);
    } else {
      setmaxnreg_inc<kConsumerRegisters>();
      consume(p, smem, rings, s_base, warp / 4 - 1);
    }
  }

  // ---- scheduler ----

  // Where a block is in the order of tiles. Packed sequences: a lane holds one of 32 sequences, all lanes look at one tile.
  struct Cursor {
    int round = 0;
    int next_batch = 0, tiles_seen = 0;  // sequences looked at so far, and the tiles of them all
    int q_row = 0, k_row = 0, seqlen_q, seqlen_k, begin = 0, end = 0;  // the lane's sequence, and the numbers of its tiles

    FM_DEVICE explicit Cursor(const Params& p) : seqlen_q(p.seqlen_q), seqlen_k(p.seqlen_k) {}
    FM_DEVICE void next_sequences(const Params& p) {
      const int batch = next_batch + lane_id();
      next_batch += 32;
      seqlen_q = seqlen_k = 0;
      if (batch < p.batch) {
        q_row = p.cu_seqlens_q[batch], k_row = p.cu_seqlens_k[batch];
        seqlen_q = p.cu_seqlens_q[batch + 1] - q_row, seqlen_k = p.cu_seqlens_k[batch + 1] - k_row;
        if (p.seqused_q != nullptr) seqlen_q = min(seqlen_q, p.seqused_q[batch]);
        if (p.seqused_k != nullptr) seqlen_k = min(seqlen_k, p.seqused_k[batch]);
      }
      const int tiles = div_up(seqlen_q, kBlockM) * p.v_blocks * p.heads_q;
      end = tiles_seen + inclusive_sum(tiles), begin = end - tiles;
      tiles_seen = __shfl_sync(0xffffffffu, end, 31);
    }
  };

  // One warp. It runs ahead of the producer, so that nobody waits for the arithmetic.
  FM_DEVICE static void schedule(const Params& p, u8* smem, const Rings& rings) {
    Work* s_works = reinterpret_cast<Work*>(smem + Smem::kWork);
    RingWork works;
    Cursor at(p);
    const int consumer = lane_id();  // the one whose steps this lane works out
    int skipped = 0;                 // by it after the tile before
    for (bool found = true; found; works.advance()) {
      rings.work.wait_empty(works);
      Work& w = s_works[works.stage];
      found = find_work(p, at, w);
      if (consumer < kConsumers) {
        w.steps[consumer] = steps_in(w, consumer, skipped);
        skipped = w.steps[consumer].skip_after;
      }
      __syncwarp();
      if (lane_id() == 0) mbarrier_arrive(rings.work.full(works.stage));
    }
    finish_counting(p);
  }

  // The number of the block's next tile. Lengths that only the device knows give no even order: blocks then take the next that is free.
  FM_DEVICE static u32 next_index(const Params& p, int round) {
    const u32 blocks = gridDim.x, block = blockIdx.x;
    if (p.tile_counter == nullptr) return p.section == 0 ? round * blocks + block : snake(round, block, blocks);
    if (round == 0) return block;
    return blocks + __shfl_sync(0xffffffffu, lane_id() == 0 ? atomicAdd(p.tile_counter, 1) : 0, 0);
  }

  // The last block that has taken all its numbers leaves the counter as it was.
  FM_DEVICE static void finish_counting(const Params& p) {
    if (p.tile_counter == nullptr || lane_id() != 0 || atomicAdd(p.tile_counter + 1, 1) != static_cast<int>(gridDim.x) - 1) return;
    p.tile_counter[0] = p.tile_counter[1] = 0;
  }

  // The block's next tile; all lanes write the same. False, and n_end 0: there is none.
  FM_DEVICE static bool find_work(const Params& p, Cursor& at, Work& w) {
    const u32 blocks = gridDim.x, heads = p.v_blocks * p.heads_q;
    const u32 index = next_index(p, at.round++);
    w.n_end = 0;
    u32 group;  // v_block and head
    if (p.cu_seqlens_q == nullptr) {
      if (index >= p.tiles) return false;
      const TileIndex place = p.section == 0 ? group_by_group(index, p.m_blocks, blocks) : by_sections(index, p.m_blocks, heads * p.batch, p.section);
      w.batch = place.group / heads, group = place.group % heads;
      w.m0 = place.m_block * kBlockM, w.q_row = w.m0, w.k_row = 0;
      w.band.rows = p.seqlen_q, w.band.cols = p.seqlen_k;
    } else {
      // Sequence by sequence, in each the last rows first and all heads of a row together.
      while (index >= at.tiles_seen) {
        if (at.next_batch >= p.batch) return false;
        at.next_sequences(p);
      }
      const int lane = __popc(__ballot_sync(0xffffffffu, index >= at.end));
      auto of_lane = [&](int x) { return __shfl_sync(0xffffffffu, x, lane); };
      w.batch = at.next_batch - 32 + lane, group = (index - of_lane(at.begin)) % heads;
      w.m0 = (of_lane(at.end) - 1 - index) / heads * kBlockM, w.q_row = w.m0 + of_lane(at.q_row), w.k_row = of_lane(at.k_row);
      w.band.rows = of_lane(at.seqlen_q), w.band.cols = of_lane(at.seqlen_k);
    }
    w.v_block = group % p.v_blocks, w.head = group / p.v_blocks;
    w.head_k = w.head / p.heads_per_key;
    w.band.shift = w.band.cols - w.band.rows, w.band.left = p.window_left, w.band.right = p.window_right;
    // A tile that sees no key still takes one step, whose scores are all masked.
    w.n_end = max(1, div_up(w.band.last(min(w.m0 + kBlockM, w.band.rows) - 1) + 1, kBlockN));
    w.n_begin = min(w.band.first(w.m0) / kBlockN, w.n_end - 1);
    return true;
  }

  // The steps of one consumer. skipped: those it lets pass after the tile before.
  FM_DEVICE static Steps steps_in(const Work& w, int consumer, int skipped) {
    // What is let pass between two products with V holds buffers: one has to stay free.
    const int row = w.m0 + consumer * 64, seen = div_up(max(w.band.last(row + 63) + 1, 0), kBlockN);
    const int before = max(0, min(min(w.n_end - seen, w.n_end - 1 - w.n_begin), kStages - 1 - skipped));
    const int after = min(max(0, min(w.n_end - before - 1, w.band.first(row) / kBlockN) - w.n_begin), kStages - 1);
    const WholeTiles whole = whole_tiles<64, kBlockN>(w.band, row);
    return {w.n_begin + after, w.n_end - before, before, after, whole.first, whole.last};
  }

  // One warp. Rows of no sequence: before and between the used parts of sequences, and behind the last one.
  FM_DEVICE static void clear_rest(const Params& p) {
    for (int gap = blockIdx.x; gap <= p.batch; gap += gridDim.x) {
      int row = 0;
      if (gap > 0) {
        const int begin = p.cu_seqlens_q[gap - 1], rows = p.cu_seqlens_q[gap] - begin;
        row = begin + (p.seqused_q == nullptr ? rows : min(rows, p.seqused_q[gap - 1]));
      }
      const int end = gap < p.batch ? p.cu_seqlens_q[gap] : p.total_q;
      for (; row < end; ++row)
        for (int head = 0; head < p.heads_q; ++head) {
          uint4* g_row = reinterpret_cast<uint4*>(static_cast<Element*>(p.out) + row * p.out_stride_s + head * p.out_stride_h);
          if (p.clear_rest & 1)
            for (int chunk = lane_id(); chunk < p.head_dim_v / 8; chunk += 32) g_row[chunk] = make_uint4(0, 0, 0, 0);
          if ((p.clear_rest & 2) && lane_id() == 0) p.lse[head * p.lse_stride_h + row] = -infinity();
        }
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
      // With two buffers the queries of the next tile come as soon as those of the tile before are done with: when its last keys are.
      const int n_look_ahead = Smem::kQStages == 2 ? max(w.n_end - kStages, w.n_begin) : w.n_end - 1;
      for (int n = w.n_end - 1; n >= w.n_begin; --n) {
        load_k(w, n);
        if (n_before >= 0) load_v(s_works[before], n_before);
        n_before = n, before = now;
        if (n == n_look_ahead) {
          if (Smem::kQStages == 1) load_q(p, w, rings, s_base, q);
          works.advance();
          rings.work.wait_full(works);
          const Work& next = s_works[works.stage];
          if (next.n_end != 0) Smem::kQStages == 2 ? load_q(p, next, rings, s_base, q) : prefetch_q(p, next);
        }
      }
    }
    if (n_before >= 0) load_v(s_works[before], n_before);
  }

  // Brings a tile's queries as far as L2.
  FM_DEVICE static void prefetch_q(const Params& p, const Work& w) {
#pragma unroll
    for (int part = 0; part < kConsumers * TileQ::kPanels; ++part)
      tma_prefetch_5d(p.q_map, part % TileQ::kPanels * 64, w.head % p.heads_per_key, w.q_row + part / TileQ::kPanels * 64, w.head_k, batch_coordinate(p, w));
  }

  FM_DEVICE static int batch_coordinate(const Params& p, const Work& w) { return p.cu_seqlens_q == nullptr ? w.batch : 0; }

  FM_DEVICE static void load_q(const Params& p, const Work& w, const Rings& rings, u32 s_base, RingQ& q) {
    rings.q.wait_empty(q);
    mbarrier_arrive_expect_tx(rings.q.full(q.stage), kConsumers * TileQ::kBytes);
#pragma unroll
    for (int part = 0; part < kConsumers * TileQ::kPanels; ++part)
      tma_load_5d(s_base + Smem::kQ + q.stage * kConsumers * TileQ::kBytes + part * TileQ::kPanelBytes, p.q_map, rings.q.full(q.stage),
                  createpolicy_evict_first(), part % TileQ::kPanels * 64, w.head % p.heads_per_key, w.q_row + part / TileQ::kPanels * 64,
                  w.head_k, batch_coordinate(p, w));
    q.advance();
  }

  // Tile n of K or V, from column `col` on.
  template <class Tile>
  FM_DEVICE static void load_keys(const Params& p, const Work& w, const TensorMap& map, const RingBarriers<kStages>& ring, RingKV& at, u32 s_tiles,
                                  int col, int n) {
    ring.wait_empty(at);
    mbarrier_arrive_expect_tx(ring.full(at.stage), Tile::kBytes);
#pragma unroll
    for (int panel = 0; panel < Tile::kPanels; ++panel)
      tma_load_4d(s_tiles + at.stage * Tile::kBytes + panel * Tile::kPanelBytes, map, ring.full(at.stage), createpolicy_evict_last(),
                  col + panel * 64, w.k_row + n * kBlockN, w.head_k, batch_coordinate(p, w));
    at.advance();
  }

  // ---- consumer ----

  FM_DEVICE static void consume(const Params& p, u8* smem, const Rings& rings, u32 s_base, int consumer) {
    const Work* s_works = reinterpret_cast<const Work*>(smem + Smem::kWork);
    const int tile_row = consumer * 64 + (warp_id() & 3) * 16;  // of this warp's rows in the tile of queries
    float r_out[1][kHeadDimV / 8][4], r_s[1][kBlockN / 8][4];
    u32 r_p[kBlockN / 16][4];
    OnlineSoftmax<1> softmax;
    float correction[2];
    RingQ q;
    RingKV k, v;
    RingWork works, done;
    int now = 0;  // work of the last step

    if (kInTurn && consumer == 0) barrier_arrive(1, 256);  // the first turn is consumer 0's
    rings.work.wait_full(works);
    if (s_works[0].n_end == 0) return;
    Steps steps = steps_of(s_works[0], consumer);
    int n = steps.end - 1;
    works.advance();

    // The first scores, which nothing hides.
    rings.q.wait_full(q);
    skip_k(rings, k, consumer, steps.skip_before);
    rings.k.wait_full(k);
    wgmma_fence();
    multiply_qk(r_s[0], s_base, consumer, q, k);
    skip_v(rings, v, steps.skip_before);
    wgmma_wait_group<0>(r_s[0]);
    release(rings.k.empty(k.stage));
    k.advance();
    if (n == steps.begin) release(rings.q.empty(q.stage));
    change_scores(p, s_works[0], steps, r_s, tile_row, n);
    softmax.template raise_max<Variant::kWide>(r_s, Variant::scale(p), correction);
    softmax.template exponentiate<Variant::kWide>(r_s, Variant::scale(p));
    pack_scores(r_p, r_s[0]);

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
        rings.q.wait_full(q);
      }
      --n;
      if (!k_here) rings.k.wait_full(k);
      const bool v_here = rings.v.is_full(v);
      if constexpr (kInTurn) barrier_sync(1 + consumer, 256);
      wgmma_fence();
      multiply_qk(r_s[0], s_base, consumer, q, k);
      if (!kPlain && pending) {
        if constexpr (kInTurn) barrier_arrive(1 + (consumer + 1) % kConsumers, 256);
        write_output(p, s_works[done.stage], s_base, tile_row, r_out[0], out_scale, lse);
        release(rings.work.empty(done.stage));
        done.advance();
      }
      if (!v_here) rings.v.wait_full(v);
      if (!kPlain && tail) clear_tail(s_base, consumer, v, tail);
      wgmma_fence();
      multiply_pv(r_out[0], r_p, s_base, v, !kPlain && fresh, [&] {
        if (kInTurn && (kPlain || !pending)) barrier_arrive(1 + (consumer + 1) % kConsumers, 256);
      });
      wgmma_wait_group<1>(r_s[0]);
      release(rings.k.empty(k.stage));
      k.advance();
      if (n == steps.begin) release(rings.q.empty(q.stage));

      if (last) {
        softmax.finish(Variant::scale(p), sink_of(p, s_works[now]), out_scale, lse);
        softmax = OnlineSoftmax<1>();
      }
      if (!kPlain || Variant::kScore) change_scores(p, s_works[here], steps, r_s, tile_row, n);
      softmax.template raise_max<Variant::kWide>(r_s, Variant::scale(p), correction);
      // The next step's keys are waited for here: ptxas moves a wait for products up over arithmetic, but not over this branch.
      k_here = n > steps.begin;
      if (k_here) rings.k.wait_full(k);
      wgmma_wait_group<0>(r_out[0]);
      release(rings.v.empty(v.stage));
      v.advance();
      skip_v(rings, v, skip);
      if (!last && any_differs(correction)) scale_rows(r_out, correction);
      softmax.template exponentiate<Variant::kWide>(r_s, Variant::scale(p));
      pack_scores(r_p, r_s[0]);
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
        softmax.finish(Variant::scale(p), sink_of(p, s_works[now]), out_scale, lse);
      }
      write_output(p, s_works[finished ? now : done.stage], s_base, tile_row, r_out[0], out_scale, lse);
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
        barrier_sync(1 + consumer, 256);
        barrier_arrive(1 + (consumer + 1) % kConsumers, 256);
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

  FM_DEVICE static void multiply_qk(float (&r_s)[kBlockN / 8][4], u32 s_base, int consumer, const RingQ& q, const RingKV& k) {
    u32 s_q = s_base + Smem::kQ + (q.stage * kConsumers + consumer) * TileQ::kBytes;
    asm volatile("" : "+r"(s_q));  // or every step of the product gets registers of its own, for the whole loop
    const u64 a = wgmma_descriptor(s_q, 0);
    const u64 b = wgmma_descriptor(s_base + Smem::kK + k.stage * TileK::kBytes, 0);
#pragma unroll
    for (int i = 0; i < kHeadDim / 16; ++i)
      Wgmma<Element, kBlockN, false>::ss(r_s, a + ((i / 4 * TileQ::kPanelBytes + i % 4 * 32) >> 4), b + ((i / 4 * TileK::kPanelBytes + i % 4 * 32) >> 4), i != 0);
    wgmma_commit_group();
  }

  // pass_turn() comes before the last products: handing over takes about as long as they do.
  template <class F>
  FM_DEVICE static void multiply_pv(float (&r_out)[kHeadDimV / 8][4], const u32 (&r_p)[kBlockN / 16][4], u32 s_base, const RingKV& v, bool fresh,
                                    F&& pass_turn) {
    const u64 b = wgmma_descriptor(s_base + Smem::kV + v.stage * TileV::kBytes, TileV::kPanelBytes);
#pragma unroll
    for (int i = 0; i < kBlockN / 16; ++i) {
      if (i == kBlockN / 16 - 2) pass_turn();
      Wgmma<Element, kHeadDimV, true>::rs(r_out, r_p[i], b + (i * 16 * TileV::kRowBytes >> 4), i != 0 || !fresh);
    }
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
        asm volatile("st.shared.v4.b32 [%0], {%1, %1, %1, %1};" ::"r"(s_end + panel * TileV::kPanelBytes - 16 * (i + 1)), "r"(0) : "memory");
    fence_proxy_async();
    barrier_sync(8 + consumer, 128);
  }

  // Two neighbouring 16 x 8 accumulator tiles are, value for value, one 16 x 16 A operand.
  FM_DEVICE static void pack_scores(u32 (&r_p)[kBlockN / 16][4], const float (&r_s)[kBlockN / 8][4]) {
#pragma unroll
    for (int i = 0; i < kBlockN / 16; ++i)
#pragma unroll
      for (int j = 0; j < 4; ++j) r_p[i][j] = pack2<Element>(r_s[2 * i + j / 2][j % 2 * 2], r_s[2 * i + j / 2][j % 2 * 2 + 1]);
  }

  template <int kN>
  FM_DEVICE static void change_scores(const Params& p, const Work& w, const Steps& steps, float (&r_s)[1][kN][4], int tile_row, int n) {
    if constexpr (Variant::kScore) Variant::apply(p, r_s, w.batch, w.head, w.m0 + tile_row, n * kBlockN, w.band);
    if (!steps.whole(n)) mask_scores(r_s[0], w.band, w.m0 + tile_row, n * kBlockN);
  }

  FM_DEVICE static float sink_of(const Params& p, const Work& w) {
    return p.sinks == nullptr ? -infinity() : load_float(p.sinks, w.head, p.sinks_dtype);
  }

  FM_DEVICE static void write_output(const Params& p, const Work& w, u32 s_base, int tile_row, const float (&r_out)[kHeadDimV / 8][4],
                                     const float (&out_scale)[2], const float (&lse)[2]) {
    const int q_row = w.q_row + tile_row, rows = w.band.rows - w.m0 - tile_row;
    const i64 base = w.batch * p.out_stride_b + q_row * p.out_stride_s + w.head * p.out_stride_h + w.v_block * kHeadDimV;
    const RowsOut<Element> to{&p.out_map, static_cast<Element*>(p.out) + base, p.out_stride_s, rows, p.head_dim_v - w.v_block * kHeadDimV,
                              w.v_block * kHeadDimV, q_row, w.head, batch_coordinate(p, w)};
    store_accumulator_rows(to, s_base + Smem::kOut + tile_row / 16 * 4096, r_out, out_scale);
    if (p.lse != nullptr && w.v_block == 0 && (lane_id() & 3) == 0) {
      float* g_lse = p.lse + w.batch * p.lse_stride_b + w.head * p.lse_stride_h + q_row;
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int row = i * 8 + (lane_id() >> 2);
        if (row < rows) g_lse[row] = lse[i];
      }
    }
  }
};

}  // namespace fm
