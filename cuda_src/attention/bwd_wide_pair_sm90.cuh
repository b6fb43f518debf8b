// The kernel of bwd_wide_sm90.cuh for dq, dk and dv at once with pairs of blocks: half the additions to
// dq_sums.
//
// Two blocks of a cluster own 128 keys and take the same steps. Each makes dq of all these keys for half of
// the columns: it sends its dS to the other one, and has the other's keys, those columns of them, beside its
// own. A consumer makes 64 columns. What the other block sends takes its time, so both consumers make dq of a
// step in the next one: the first behind dv, the second beside the arithmetic of the next dS. With kShares
// each block fetches half of the queries of a step, for both.
#pragma once
#include "attention/bwd_wide_blocks_sm90.cuh"

namespace fm {

template <class Element_, int kHeadDim_, int kHeadDimV_, int kStages_, int kStagesV_, bool kShares_>
struct AttentionBwdWidePairSm90
    : AttentionBwdWideBlocksSm90<Element_, kHeadDim_, kHeadDimV_, 64, kStages_, kGradQ | kGradK | kGradV,
                                 kStagesV_, 2, kShares_> {
  using Blocks = AttentionBwdWideBlocksSm90<Element_, kHeadDim_, kHeadDimV_, 64, kStages_,
                                            kGradQ | kGradK | kGradV, kStagesV_, 2, kShares_>;
  using Blocks::kConsumerThreads, Blocks::kWeightsStored, Blocks::kWeightsUsed, Blocks::kScoresStored;
  using Blocks::kHeadDim, Blocks::kHeadDimV, Blocks::kCols, Blocks::kRows;
  using Blocks::statistics, Blocks::col_x, Blocks::col_y, Blocks::each, Blocks::add;
  using Blocks::store;
  using Blocks::weights, Blocks::multiply_keys, Blocks::multiply_values, Blocks::sums;
  using typename Blocks::Barriers, typename Blocks::BarriersV, typename Blocks::Peers, typename Blocks::Smem;
  using typename Blocks::Element, typename Blocks::Params, typename Blocks::Work;
  using typename Blocks::Stage, typename Blocks::StageV;
  using typename Blocks::TileScores, typename Blocks::TilePeer;
  using typename Blocks::TileX, typename Blocks::TileColX, typename Blocks::TileColY;
  static_assert(Blocks::kParts == 4, "each consumer of both blocks makes one part of dq");

  FM_DEVICE static void run(const Params& p) {
    Blocks::run_with(
        p, [&](const Work& w, u8* smem, u32 s_base, const Barriers& x, const BarriersV& y, int consumer) {
          if (consumer == 0)
            make_weights(p, w, smem, s_base, x, y);
          else
            make_scores(p, w, smem, s_base, x, y);
        });
  }

  // ---- the first consumer: P and dv ----

  FM_DEVICE static void make_weights(const Params& p, const Work& w, u8* smem, u32 s_base, const Barriers& x,
                                     const BarriersV& y) {
    const int steps = w.all_steps(), row = w.row0 + (warp_id() & 3) * 16;
    float r_dv[kHeadDimV / 8][4] = {};
    if (steps > 0) {
      const float scale = p.softmax_scale * kLog2e;
      float r_s[1][kCols / 8][4], r_dq[1][8][4];
      u32 r_p[kCols / 16][4];
      Stage at;
      StageV at_v;
      float* g_before = nullptr;  // dq of the step before
      int head = w.head;
      mbarrier_wait_parity(s_base + Smem::kBarrierX, 0);
      x.wait_full(at);
      multiply_keys(r_s, s_base, at);
#pragma unroll 1
      for (int step = 0, tile = w.first; step < steps; ++step) {
        const int col = tile * kCols, its_head = head;
        tile = w.next(tile);
        if (tile == w.first) ++head;
        wgmma_wait_group<0>(r_s[0]);
        if (w.band.template cuts<kRows, kCols>(w.row0, col) || w.row0 + kRows > w.band.rows)
          mask_keys(r_s[0], w.band, row, col);
        const auto& s_of = statistics(smem, at);
        each(r_s, [&](float& s, int, int, int j) { s = exp2_approx(fmaf(s, scale, -s_of.lse[j])); });
        Blocks::release(x, at);
        pack_operand<Element>(r_p, r_s[0]);
        const u32 s_weights = weights(s_base, step);
#pragma unroll
        for (int i = 0; i < kCols / 16; ++i)
          st_shared_v4_b32(s_weights + i * 2048, r_p[i][0], r_p[i][1], r_p[i][2], r_p[i][3]);
        barrier_arrive(kWeightsStored + (step & 1), kConsumerThreads);
        y.wait_full(at_v);
        wgmma_fence();
        multiply<Element, 1>(r_dv, r_p, MNMajor<TileColY>(without_rank(col_y(s_base, at_v))), false, [] {});
        wgmma_commit_group();
        barrier_sync(kWeightsUsed + ((step + 1) & 1), kConsumerThreads);
        multiply_queries(r_dq, s_base, step - 1, 0);
        wgmma_wait_group<1>(r_dv);
        Blocks::release(y, at_v);
        at.advance(), at_v.advance();
        if (step + 1 < steps) x.wait_full(at);
        multiply_keys(r_s, s_base, at);
        wgmma_wait_group<1>(r_dq[0]);
        if (step > 0) {
          give_back(s_base, step - 1);
          add(g_before, r_dq[0]);
        }
        g_before = part_of_sums(p, w, its_head, col, 0);
      }
      wgmma_wait_group<0>(r_s[0]);
      barrier_sync(kWeightsUsed + ((steps + 1) & 1), kConsumerThreads);
      multiply_queries(r_dq, s_base, steps - 1, 0);
      wgmma_wait_group<0>(r_dq[0]);
      give_back(s_base, steps - 1);
      add(g_before, r_dq[0]);
    }
    store(p, w, row, r_dv, static_cast<Element*>(p.dv), p.dv_stride_b, p.dv_stride_s, p.dv_stride_h,
          p.head_dim_v, 1.f);
  }

  // ---- the second: dS and dk ----

  FM_DEVICE static void make_scores(const Params& p, const Work& w, u8* smem, u32 s_base, const Barriers& x,
                                    const BarriersV& y) {
    const int steps = w.all_steps(), warp_row = (warp_id() & 3) * 16;
    float r_dk[kHeadDim / 8][4] = {};
    if (steps > 0) {
      float r_dp[1][kCols / 8][4], r_dq[1][8][4];
      u32 r_ds[kCols / 16][4];
      Stage at, before;  // the step at hand, and the one whose q is still in use
      StageV at_v;
      float* g_before = nullptr;
      int head = w.head;
      barrier_arrive(kWeightsUsed + 1, kConsumerThreads);  // before the first step
      mbarrier_wait_parity(s_base + Smem::kBarrierY, 0);
      mbarrier_wait_parity(s_base + Smem::kBarrierX, 0);
#pragma unroll 1
      for (int step = 0, tile = w.first; step < steps; ++step) {
        const int col = tile * kCols, its_head = head;
        tile = w.next(tile);
        if (tile == w.first) ++head;
        y.wait_full(at_v);
        multiply_values(r_dp, s_base, at_v);
        wgmma_wait_group<1>(r_dk);
        if (step > 0) Blocks::release(x, before), before.advance();
        multiply_queries(r_dq, s_base, step - 1, 1);
        wgmma_wait_group<1>(r_dp[0]);
        Blocks::release(y, at_v);
        x.wait_full(at);
        const auto& s_of = statistics(smem, at);
        barrier_sync(kWeightsStored + (step & 1), kConsumerThreads);
        const u32 s_weights = weights(s_base, step);
#pragma unroll
        for (int i = 0; i < kCols / 16; ++i) ld_shared_v4_b32(r_ds[i], s_weights + i * 2048);
        each(r_dp, [&](float& ds, int n, int e, int j) {
          ds = value_of<Element>(r_ds, n, e) * (ds - s_of.delta[j]);
        });
        pack_operand<Element>(r_ds, r_dp[0]);
        wgmma_wait_group<0>(r_dq[0]);
        if (step > 0) give_back(s_base, step - 1);
        peers(s_base).wait_empty(of_step(step));  // the other block has used what was sent from here
        store_scores<TileScores>(s_scores(s_base, step), warp_row, r_ds);
        fence_proxy_async();
        barrier_arrive(kWeightsUsed + (step & 1), kConsumerThreads);
        barrier_sync(kScoresStored, 128);
        if (threadIdx.x % 128 == 0) send_scores(s_base, step);
        wgmma_fence();
        multiply<Element, 1>(r_dk, r_ds, MNMajor<TileColX>(without_rank(col_x(s_base, at))), false, [] {});
        wgmma_commit_group();
        at.advance(), at_v.advance();
        if (step > 0) add(g_before, r_dq[0]);
        g_before = part_of_sums(p, w, its_head, col, 1);
      }
      multiply_queries(r_dq, s_base, steps - 1, 1);
      wgmma_wait_group<0>(r_dq[0]);
      wgmma_fence_operand(r_dk);
      give_back(s_base, steps - 1);
      add(g_before, r_dq[0]);
    }
    store(p, w, w.row0 + warp_row, r_dk, static_cast<Element*>(p.dk), p.dk_stride_b, p.dk_stride_s,
          p.dk_stride_h, p.head_dim, p.softmax_scale);
  }

  // ---- dq ----

  FM_DEVICE static Peers peers(u32 s_base) { return Peers{s_base + Smem::kBarriersPeer}; }
  FM_DEVICE static Ring<2> of_step(int step) { return {step & 1, static_cast<u32>(step >> 1 & 1)}; }
  FM_DEVICE static u32 s_scores(u32 s_base, int step) {
    return s_base + Smem::kScoresTile + (step & 1) * TileScores::kBytes;
  }
  FM_DEVICE static u32 s_peer_scores(u32 s_base, int step) {
    return s_base + Smem::kPeerScores + (step & 1) * TileScores::kBytes;
  }

  // One thread: dS of a step to the other block, whose own arrives here at the barrier of the same place.
  FM_DEVICE static void send_scores(u32 s_base, int step) {
    const u32 s_full = peers(s_base).full(step & 1), other = cluster_ctarank() ^ 1;
    mbarrier_arrive_expect_tx(s_full, TileScores::kBytes);
    bulk_copy_cluster(mapa(s_peer_scores(s_base, step), other), s_scores(s_base, step), TileScores::kBytes,
                      mapa(s_full, other));
  }

  // Products of a step's dS with the keys, a consumer's columns. Of step -1 nobody reads what comes out.
  FM_DEVICE static void multiply_queries(float (&r_dq)[1][8][4], u32 s_base, int step, int consumer) {
    if (step >= 0) peers(s_base).wait_full(of_step(step));
    const u32 part = cluster_ctarank() * 2 + consumer;
    u32 s_own = without_rank(s_base);
    keep_register(s_own);  // as in multiply_keys
    const MNMajor<TileX> keys(s_own + Smem::kRowX + part * TileX::kPanelBytes);
    const MNMajor<TilePeer> peer_keys(s_own + Smem::kPeerKeys + consumer * TilePeer::kPanelBytes);
    wgmma_fence();
    multiply<Element, kRows>(r_dq, MNMajor<TileScores>(s_scores(s_own, step)), keys, true);
    multiply<Element, kRows>(r_dq, MNMajor<TileScores>(s_peer_scores(s_own, step)), peer_keys, false);
    wgmma_commit_group();
  }
  // Where a thread adds up a consumer's part of 64 queries.
  FM_DEVICE static float* part_of_sums(const Params& p, const Work& w, int head, int col, int consumer) {
    return sums(p, w, head, col) + (cluster_ctarank() * 2 + consumer) * 4096;
  }
  // The other block may send to where its dS of that step is.
  FM_DEVICE static void give_back(u32 s_base, int step) {
    if (lane_id() == 0) mbarrier_arrive_cluster(mapa(peers(s_base).empty(step & 1), cluster_ctarank() ^ 1));
  }
};

}  // namespace fm
