// Attention backward for Hopper (sm_90a): the same gradients as bwd_sm80.cuh, for bf16 and fp16 rows that
// start at multiples of 16 bytes. With a bias sequences have even lengths.
//
//   S = scale q k^T   P = exp(S - lse)   dP = dout v^T   dS = P (dP - delta)
//   dv = P^T dout     dk = scale dS^T q  dq = scale dS k      (FlashAttention-2, algorithm 2)
//
// Overwrites the rows of dq, dk and dv, touches nothing else. There are two ways. One kernel makes dk and dv
// and one makes dq: nothing is added up in memory, and every run gives the same bits. Or one kernel makes
// all, with five products instead of seven: its blocks add dq / scale up in dq_sums, which bwd_dot.cuh clears
// before and bwd_convert.cuh turns into dq; in any order, or one after the other (p.ordered), which gives the
// same bits in every run, too.
//
// Each warpgroup but the first (a consumer) owns 64 rows of a tile (bwd_blocks_sm90.cuh). Rows times columns
// come from shared memory; P and dS go from registers into the products that follow. Without dq in memory
// consumers never meet: the exponentials of one run under products of the others.
#pragma once
#include "attention/bwd_blocks_sm90.cuh"

namespace fm {

template <class Element_, int kHeadDim_, int kHeadDimV_, int kRows_, int kCols_, int kStages_, int kWanted_,
          class Variant_>
struct AttentionBwdSm90
    : AttentionBwdBlocksSm90<Element_, kHeadDim_, kHeadDimV_, kRows_, kCols_, kStages_, kWanted_, Variant_> {
  using Blocks =
      AttentionBwdBlocksSm90<Element_, kHeadDim_, kHeadDimV_, kRows_, kCols_, kStages_, kWanted_, Variant_>;
  using Variant = Variant_;
  using Params = typename Blocks::Params;
  using Element = Element_;
  using Bias = typename Blocks::Bias;
  using Work = typename Blocks::Work;
  using Queries = typename Blocks::Queries;
  using Rings = typename Blocks::Rings;
  using Smem = typename Blocks::Smem;
  using Stage = typename Blocks::Stage;
  using Walk = typename Blocks::Walk;
  using TileRowX = typename Blocks::TileRowX;
  using TileRowY = typename Blocks::TileRowY;
  using TileColX = typename Blocks::TileColX;
  using TileColY = typename Blocks::TileColY;
  using TileScores = typename Blocks::TileScores;
  using Blocks::kHeadDim, Blocks::kHeadDimV, Blocks::kRows, Blocks::kCols, Blocks::kStages,
      Blocks::kConsumers, Blocks::kByKey, Blocks::kScores, Blocks::kValues, Blocks::kQueries, Blocks::kPieces,
      Blocks::kPieceColumns, Blocks::kLastPiece, Blocks::kHalves, Blocks::kRounded, Blocks::kScoresStored,
      Blocks::kColumnsCleared;
  // Where there are registers for it, weights are multiplied by the slopes of a softcap while dP is made.
  static constexpr bool kSlopesLate = !kQueries || kRounded;
  using Slopes = ScoreSlopes<Element, kCols, kSlopesLate>;

  // Whether the last dq of a tile waits for the next tile. Beside two versions of the loop that would spill.
  static constexpr bool kCarries = kQueries && kLastPiece == kPieceColumns;
  static constexpr int kCarrySteps = 4;  // of a tile, at least

  FM_DEVICE static void run(const Params& p) {
    Blocks::run_with(p, [&](u8* smem, u32 s_base, const Rings& rings, int consumer) {
      const Work& s_work = *reinterpret_cast<const Work*>(smem + Smem::kWork);
      Ring<1> works;
      Walk walk;
      Counts count;
#pragma unroll 1
      for (; Blocks::more(s_work, rings.work, works); works.advance()) {
        const Work w = s_work;
        __syncwarp();
        rings.work.release(works);
        if constexpr (kQueries && kLastPiece < kPieceColumns) {
          if (consumer == 0)
            consume_all<kPieceColumns>(p, w, smem, s_base, rings, count, 0);
          else
            consume_all<kLastPiece>(p, w, smem, s_base, rings, count, 1);
        } else if constexpr (kQueries) {
          consume_all<kPieceColumns>(p, w, smem, s_base, rings, count, consumer);
        } else {
          consume(p, w, smem, s_base, rings, walk, consumer);
        }
      }
      if constexpr (kCarries)
        if (count.owes_dq) finish_dq<kPieceColumns>(s_base, rings, count, consumer, [] {});
    });
  }

  // Walk as counts, which take fewer registers.
  struct Counts {
    u32 steps = 0, tiles = 0;  // tiles: those with steps
    u32 ends = 0;              // tiles that had their last dq before the next one began
    bool owes_dq = false;      // dq of the step before is not multiplied yet
    template <int kAtOnce>
    FM_DEVICE static Ring<kAtOnce> ring(u32 count) {
      return {static_cast<int>(count % kAtOnce), count / kAtOnce & 1};
    }
    FM_DEVICE Stage at() const { return ring<kStages>(steps); }
    FM_DEVICE Ring<Blocks::kRowStages> row_x() const { return ring<Blocks::kRowStages>(tiles); }
    FM_DEVICE Ring<Blocks::kRowStages> row_x_before() const { return ring<Blocks::kRowStages>(tiles - 1); }
    FM_DEVICE Ring<1> row_y() const { return ring<1>(tiles); }
    FM_DEVICE u32 turn() const { return (steps + ends) & 1; }  // whose buffer of dS is next
  };

  // ---- consumer ----

  FM_DEVICE static void consume(const Params& p, const Work& w, u8* smem, u32 s_base, const Rings& rings,
                                Walk& walk, int consumer) {
    const RingBarriers<kStages>&x = rings.x, &y = rings.y;
    Stage& at = walk.at;
    const int steps = w.all_steps(), tile_row = w.row0 + consumer * 64;
    const int row = tile_row + (warp_id() & 3) * 16;  // of this warp
    float r_dx[kScores ? kHeadDim / 8 : 1][4] = {}, r_dv[kValues ? kHeadDimV / 8 : 1][4] = {};
    if (steps > 0) {
      const KMajor<TileRowX> row_x(s_base + Smem::kRowX + consumer * TileRowX::kBytes);
      const KMajor<TileRowY> row_y(s_base + Smem::kRowY + (kScores ? consumer * TileRowY::kBytes : 0));
      const float scale = score_unit<Variant>(p) * kLog2e;
      float lse[2], delta[2];  // of the thread's rows, where rows are queries
      if constexpr (!kByKey) {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          const int query = row + i * 8 + (lane_id() >> 2);
          const i64 at = w.batch * p.row_stride_b + w.head * p.row_stride_h + w.row_base + query;
          lse[i] = query < w.band.rows ? p.row_lse[at] * lse_unit<Bias>() : infinity();
          delta[i] = query < w.band.rows ? p.row_delta[at] : 0.f;
        }
      }
      float r_s[1][kCols / 8][4], r_dp[1][kCols / 8][4];
      u32 r_p[kCols / 16][4], r_ds[kCols / 16][4];
      rings.row_x.wait_full(walk.row_x);
      if constexpr (kScores) rings.row_y.wait_full(walk.row_y);
      typename Blocks::Place place(w);
#pragma unroll 1
      for (int step = 0; step < steps; ++step) {
        const Queries& s_queries =
            reinterpret_cast<const Queries*>(smem + Smem::kStatistics)[kByKey ? at.stage : 0];
        const Statistics<kCols>& s_of = s_queries.of;
        const u32 s_x = s_base + Smem::kColX + at.stage * TileColX::kBytes;
        const u32 s_y = s_base + Smem::kColY + at.stage * TileColY::kBytes;
        x.wait_full(at);
        const int col = kByKey ? s_queries.col : place.col(), head = kByKey ? s_queries.head : place.head;
        place.advance(w);
        if (!w.even && col + kCols > w.band.cols) {
          y.wait_full(at);
          clear_columns(s_x, s_y, w.band.cols - col);
        }
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
        if (step == steps - 1) rings.row_x.release(walk.row_x), walk.row_x.advance();
        if constexpr (kScores) {
          wgmma_fence_operand(r_dx);
          __syncwarp();  // all lanes have read what comes with x
          if (step > 0) release_x(p, x, at.before());
        }
        Slopes slopes;
        change_scores(p, w, r_s, slopes, alibi_slope_of<Variant>(p, w.batch, head), row, col);
        const u32 s_bias = s_base + Smem::kBias + at.stage * Bias::kBytes + consumer * Bias::kConsumerBytes;
        if constexpr (Bias::kUsed) Bias::add(r_s[0], p.softmax_scale, s_bias, row - tile_row);
        if (w.band.template cuts<64, kCols>(tile_row, col)) mask_scores(r_s[0], w.band, row, col);
        each_score(r_s, [&](float& s, int i, int, int, int j) {
          const float its = kByKey ? s_of.lse[j] : lse[i];
          s = exp2_approx(Bias::kUsed ? (s - its) * kLog2e : fmaf(s, scale, -its));
        });
        if constexpr (!kScores) {
          __syncwarp();  // all lanes have read lse, which comes with x
          x.release(at);
        }
        if constexpr (kValues) {
          pack_operand<Element>(r_p, r_s[0]);
          wgmma_fence();
          multiply<Element, 1>(r_dv, r_p, MNMajor<TileColY>(s_y), false, [] {});
          wgmma_commit_group();
        }
        if constexpr (kScores) {
          wgmma_wait_group<kValues ? 1 : 0>(r_dp[0]);
          if (step == steps - 1) rings.row_y.release(walk.row_y), walk.row_y.advance();
          if constexpr (!kValues) y.release(at);
          differentiate(p, r_dp, r_s, r_p, slopes,
                        [&](int i, int j) { return kByKey ? s_of.delta[j] : delta[i]; });
          pack_operand<Element>(r_ds, r_dp[0]);
          if constexpr (Bias::kGradient)
            if (p.dbias != nullptr)
              Bias::store_gradient(p, r_dp[0], r_ds, s_bias, row - tile_row, row, col, head, w.batch);
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
      if constexpr (kScores) {
        wgmma_wait_group<0>(r_dx);
        __syncwarp();
        release_x(p, x, at.before());
      }
    }
    if constexpr (kValues)
      store(p, w, row, r_dv, static_cast<Element*>(p.dv), p.dv_stride_b, p.dv_stride_s, p.dv_stride_h,
            p.head_dim_v, 1.f);
    if constexpr (kScores)
      store(p, w, row, r_dx, static_cast<Element*>(kByKey ? p.dk : p.dq),
            kByKey ? p.dk_stride_b : p.dq_stride_b, kByKey ? p.dk_stride_s : p.dq_stride_s,
            kByKey ? p.dk_stride_h : p.dq_stride_h, p.head_dim, p.softmax_scale);
  }

  // Also what comes with x, when it has been stored as dbias.
  FM_DEVICE static void release_x(const Params& p, const RingBarriers<kStages>& x, int stage) {
    if constexpr (Bias::kGradient)
      if (p.dbias != nullptr && lane_id() == 0) bulk_wait_group_read<0>();
    x.release(stage);
  }

  // ---- consumer of dq, dk and dv at once ----

  // While exponentials are computed, dP runs; while dS is, dv runs; dk runs while a piece of dq is put down.
  // dq of a step is multiplied in the next one: dS of the other consumer has long been stored by then. So
  // that of a tile's last step is multiplied in the next tile, whose keys have a place of their own.
  template <int kDqColumns>
  FM_DEVICE static void consume_all(const Params& p, const Work& w, u8* smem, u32 s_base, const Rings& rings,
                                    Counts& count, int consumer) {
    const RingBarriers<kStages>&x = rings.x, &y = rings.y;
    const int steps = w.all_steps(), tile_row = w.row0 + consumer * 64;
    const int row = tile_row + (warp_id() & 3) * 16;  // of this warp
    float r_dk[kHeadDim / 8][4] = {}, r_dv[kHeadDimV / 8][4] = {};
    if (steps > 0) {
      const u32 s_k = keys_of(s_base, count.tiles);
      const KMajor<TileRowX> k(s_k + consumer * TileRowX::kBytes);
      const KMajor<TileRowY> v(s_base + Smem::kRowY + consumer * TileRowY::kBytes);
      const float scale = score_unit<Variant>(p) * kLog2e;
      if (!count.owes_dq) barrier_arrive(kScoresStored + 2 * consumer + (count.turn() ^ 1), 256);
      u32 s_k_before = count.owes_dq ? keys_of(s_base, count.tiles - 1) : s_k;  // of the step before
      rings.row_x.wait_full(count.row_x());
      rings.row_y.wait_full(count.row_y());
      if (!w.even && w.row0 + kRows > w.band.rows) clear_keys(s_base, s_k, w.band.rows - w.row0);
      u32 r_ds[kCols / 16][4];  // the last product with it runs to the end
#pragma unroll 1
      for (int step = 0; step < steps; ++step) {
        const Stage at = count.at();
        const Queries& s_queries = reinterpret_cast<const Queries*>(smem + Smem::kStatistics)[at.stage];
        const Statistics<kCols>& s_of = s_queries.of;
        const u32 s_q = s_base + Smem::kColX + at.stage * TileColX::kBytes;
        const u32 s_dout = s_base + Smem::kColY + at.stage * TileColY::kBytes;
        float r_dq[1][kDqColumns / 8][4], r_s[1][kCols / 8][4], r_dp[1][kCols / 8][4];
        x.wait_full(at);
        const int col = s_queries.col;
        const float alibi = alibi_slope_of<Variant>(p, w.batch, s_queries.head);  // long before it is used
        if (!w.even && col + kCols > w.band.cols) {
          y.wait_full(at);
          clear_columns(s_q, s_dout, w.band.cols - col);
        }
        wgmma_fence();
        multiply<Element, kHeadDim>(r_s, k, KMajor<TileColX>(s_q), true);
        wgmma_commit_group();
        wgmma_wait_group<1>(r_dk);  // of the step before
        __syncwarp();               // all lanes have read what comes with q
        if (step > 0) x.release(at.before());
        y.wait_full(at);
        wgmma_fence();
        multiply<Element, kHeadDimV>(r_dp, v, KMajor<TileColY>(s_dout), true);
        wgmma_commit_group();
        wgmma_wait_group<1>(r_s[0]);
        Slopes slopes;
        change_scores(p, w, r_s, slopes, alibi, row, col);
        if (w.band.template cuts<64, kCols>(tile_row, col) || tile_row + 64 > w.band.rows)
          mask_keys(r_s[0], w.band, row, col);
        each_score(r_s,
                   [&](float& s, int, int, int, int j) { s = exp2_approx(fmaf(s, scale, -s_of.lse[j])); });
        u32 r_p[kCols / 16][4];
        pack_operand<Element>(r_p, r_s[0]);
        wgmma_fence();
        multiply<Element, 1>(r_dv, r_p, MNMajor<TileColY>(s_dout), false, [] {});
        wgmma_commit_group();
        if constexpr (Variant::kScore && !kSlopesLate)  // beside the products
          if (p.softcap > 0.f)
            each_score(r_s, [&](float& s, int, int n, int e, int) { s *= slopes.at(n, e); });
        wgmma_wait_group<1>(r_dp[0]);
        if (step == steps - 1) rings.row_y.release(count.row_y());
        differentiate(p, r_dp, r_s, r_p, slopes, [&](int, int j) { return s_of.delta[j]; });
        pack_operand<Element>(r_ds, r_dp[0]);
        // The other consumer has stored its dS of the step before, and its dq of the one before that is done.
        barrier_sync(kScoresStored + 2 * (consumer ^ 1) + (count.turn() ^ 1), 256);
        store_scores<TileScores>(s_base + Smem::kScoresTile + count.turn() * TileScores::kBytes,
                                 consumer * 64 + (warp_id() & 3) * 16, r_ds);
        fence_proxy_async();
        // If nothing is owed nobody reads what comes out: behind a branch this product would cost all others
        // their order.
        wgmma_fence();
        multiply_keys(r_dq, s_base, s_k_before, count.turn() ^ 1, consumer);
        wgmma_commit_group();
        wgmma_fence();
        multiply<Element, 1>(r_dk, r_ds, MNMajor<TileColX>(s_q), false, [] {});
        wgmma_commit_group();
        wgmma_wait_group<1>(r_dv);  // dv and dq
        wgmma_fence_operand(r_dq[0]);
        y.release(at);
        barrier_arrive(kScoresStored + 2 * consumer + count.turn(), 256);
        if (step == 0 && count.owes_dq) rings.row_x.release(count.row_x_before());
        if (count.owes_dq) put_down(s_base, rings.sums(consumer), count, consumer, r_dq[0]);
        count.owes_dq = true;
        s_k_before = s_k;
        ++count.steps;
      }
      store(p, w, row, r_dv, static_cast<Element*>(p.dv), p.dv_stride_b, p.dv_stride_s, p.dv_stride_h,
            p.head_dim_v, 1.f);
      wgmma_wait_group<0>(r_dk);
      __syncwarp();
      x.release(count.at().before());
      ++count.tiles;
    } else {
      store(p, w, row, r_dv, static_cast<Element*>(p.dv), p.dv_stride_b, p.dv_stride_s, p.dv_stride_h,
            p.head_dim_v, 1.f);
    }
    // Another block may wait for all that this tile adds, or the producer for the place of the keys. Without
    // a step nobody would go on.
    const auto store_keys = [&] {
      store(p, w, row, r_dk, static_cast<Element*>(p.dk), p.dk_stride_b, p.dk_stride_s, p.dk_stride_h,
            p.head_dim, p.softmax_scale);
    };
    if (count.owes_dq && (!kCarries || p.at_once || steps < kCarrySteps)) {
      finish_dq<kDqColumns>(s_base, rings, count, consumer, store_keys);
      rings.row_x.release(count.row_x_before());
      ++count.ends;
      count.owes_dq = false;
    } else {
      store_keys();
    }
  }

  // dq of the step before.
  template <int kDqColumns, class F>
  FM_DEVICE static void finish_dq(u32 s_base, const Rings& rings, const Counts& count, int consumer,
                                  F&& meanwhile) {
    float r_dq[1][kDqColumns / 8][4];
    barrier_sync(kScoresStored + 2 * (consumer ^ 1) + (count.turn() ^ 1), 256);
    wgmma_fence();
    multiply_keys(r_dq, s_base, keys_of(s_base, count.tiles - 1), count.turn() ^ 1, consumer);
    wgmma_commit_group();
    meanwhile();
    wgmma_wait_group<0>(r_dq[0]);
    put_down(s_base, rings.sums(consumer), count, consumer, r_dq[0]);
  }
  // Where the keys of a tile are.
  FM_DEVICE static u32 keys_of(u32 s_base, u32 tile) {
    return s_base + Smem::kRowX +
           Counts::template ring<Blocks::kRowStages>(tile).stage * 2 * TileRowX::kBytes;
  }
  // A consumer's piece of dq: dS of buffer `buffer`, all keys of the block.
  template <int kTiles>
  FM_DEVICE static void multiply_keys(float (&r_dq)[1][kTiles][4], u32 s_base, u32 s_k, int buffer,
                                      int consumer) {
    const u32 s_ds = s_base + Smem::kScoresTile + buffer * TileScores::kBytes +
                     (kCols == 128 ? consumer * TileScores::kPanelBytes : 0);
    // The swizzle moves the chunks of 16 bytes by their address, so that half a panel begins within one.
    const u32 s_keys = s_k + (kPieces == 2 ? consumer * TileRowX::kPanelBytes
                              : kHalves    ? consumer * 2 * kPieceColumns
                                           : 0);
#pragma unroll
    for (int i = 0; i < kConsumers; ++i)
      multiply<Element, 64>(r_dq, MNMajor<TileScores>(s_ds + i * 64 * TileScores::kRowBytes),
                            MNMajor<TileRowX>(s_keys + i * TileRowX::kBytes), i == 0);
  }
  // A piece of dq, to where the copy engine takes it from.
  template <int kTiles>
  FM_DEVICE static void put_down(u32 s_base, const RingBarriers<1>& ring, const Counts& count, int consumer,
                                 const float (&r_dq)[kTiles][4]) {
    const u32 s_piece = s_base + Smem::kSums + consumer * Blocks::kPieceBytes + threadIdx.x % 128 * 16;
    ring.wait_empty(Counts::template ring<1>(count.steps - 1));
#pragma unroll
    for (int n = 0; n < kTiles; ++n)
      st_shared_v4_b32(s_piece + n * 2048, __float_as_uint(r_dq[n][0]), __float_as_uint(r_dq[n][1]),
                       __float_as_uint(r_dq[n][2]), __float_as_uint(r_dq[n][3]));
    fence_proxy_async();
    __syncwarp();
    if (lane_id() == 0) mbarrier_arrive(ring.full(0));
  }

  // The same of keys, from row `first` of the tile on.
  FM_DEVICE static void clear_keys(u32 s_base, u32 s_k, int first) {
#pragma unroll 1
    for (int i = 0; i < kConsumers; ++i) {
      const int from = max(first - 64 * i, 0);
      if (from >= 64) continue;
      clear_rows<TileRowX, 128 * kConsumers>(s_k + i * TileRowX::kBytes, from);
      clear_rows<TileRowY, 128 * kConsumers>(s_base + Smem::kRowY + i * TileRowY::kBytes, from);
    }
    fence_proxy_async();
    barrier_sync(kColumnsCleared, 128 * kConsumers);
  }

  // What lies behind the last column of a sequence may be anything, and 0 times anything may be NaN. By all
  // consumers, from column `first` of a step on.
  FM_DEVICE static void clear_columns(u32 s_x, u32 s_y, int first) {
    clear_rows<TileColX, 128 * kConsumers>(s_x, first);
    clear_rows<TileColY, 128 * kConsumers>(s_y, first);
    fence_proxy_async();
    barrier_sync(kColumnsCleared, 128 * kConsumers);
  }

  // ---- scores that change ----

  // slopes: only with a softcap. alibi: of ALiBi, if there is one.
  FM_DEVICE static void change_scores(const Params& p, const Work& w, float (&r_s)[1][kCols / 8][4],
                                      Slopes& slopes, float alibi, int row, int col) {
    if constexpr (Variant::kScore) {
      if (p.softcap > 0.f)
        cap_scores(r_s[0], p.softmax_scale / p.softcap, slopes);
      else if (!(p.softmax_scale > 0.f))
        each_score(r_s, [&](float& s, int, int, int, int) { s *= p.softmax_scale; });
      if (p.alibi_slopes != nullptr)
        Variant::add_alibi(alibi / score_unit<Variant>(p), r_s, row, col, w.band);
    }
  }
  // dS from dP and weights. delta(i, j): of row i of the thread, or of column j.
  template <class F>
  FM_DEVICE static void differentiate(const Params& p, float (&r_dp)[1][kCols / 8][4],
                                      const float (&r_s)[1][kCols / 8][4], const u32 (&r_p)[kCols / 16][4],
                                      const Slopes& slopes, F&& delta) {
    auto weight = [&](int n, int e) { return kRounded ? value_of<Element>(r_p, n, e) : r_s[0][n][e]; };
    if (Variant::kScore && kSlopesLate && p.softcap > 0.f)
      each_score(r_dp, [&](float& ds, int i, int n, int e, int j) {
        ds = weight(n, e) * slopes.at(n, e) * (ds - delta(i, j));
      });
    else
      each_score(r_dp,
                 [&](float& ds, int i, int n, int e, int j) { ds = weight(n, e) * (ds - delta(i, j)); });
  }

  // A warp's 16 rows of a gradient, where they exist.
  template <int kN>
  FM_DEVICE static void store(const Params& p, const Work& w, int row, const float (&r_d)[kN][4],
                              Element* array, i64 stride_b, i64 stride_s, i64 stride_h, int columns,
                              float scale) {
    const int head = kByKey ? w.head_k : w.head;
    Element* g_rows =
        array + w.batch * stride_b + (static_cast<i64>(w.row_base) + row) * stride_s + head * stride_h;
    const RowsOut<Element> to = {nullptr, g_rows, stride_s, stride_h, w.band.rows - row, columns, 0,
                                 head,    row,    w.batch,  0};
    const float both[2] = {scale, scale};
    store_accumulator_directly(to, r_d, both);
  }
};

}  // namespace fm
