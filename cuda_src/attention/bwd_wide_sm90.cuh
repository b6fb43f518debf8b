// Attention backward for Hopper (sm_90a), head dims beyond 128: dk and dv, for bf16 and fp16 rows that start
// at multiples of 16 bytes and scores that are only scaled and masked. dq: bwd_sm90.cuh, or with dk and dv
// bwd_wide_pair_sm90.cuh.
//
//   S^T = k q^T scale   P^T = exp(S^T - lse)   dP^T = v dout^T   dS^T = P^T (dP^T - delta)
//   dv = P^T dout       dk = scale dS^T q
//
// Overwrites the rows of dk and dv, the same bits in every run.
//
// A block owns 64 keys, too few for a warpgroup to have dk and dv, so two share the work by products. The
// first makes S, P and dv, the second dP, dS and dk. P goes from the first to the second through shared
// memory as packed operands. The first is up to a step ahead. In the remaining warpgroup one warp has the
// copy engine fetch q, one dout, and one brings lse and delta.
#pragma once
#include "attention/bwd_wide_blocks_sm90.cuh"

namespace fm {

template <class Element_, int kHeadDim_, int kHeadDimV_, int kCols_, int kStages_>
struct AttentionBwdWideSm90
    : AttentionBwdWideBlocksSm90<Element_, kHeadDim_, kHeadDimV_, kCols_, kStages_, kGradK | kGradV> {
  using Blocks =
      AttentionBwdWideBlocksSm90<Element_, kHeadDim_, kHeadDimV_, kCols_, kStages_, kGradK | kGradV>;
  using Blocks::kConsumerThreads, Blocks::kWeightsStored, Blocks::kWeightsUsed;
  using Blocks::kHeadDim, Blocks::kHeadDimV, Blocks::kCols, Blocks::kRows;
  using Blocks::statistics, Blocks::col_x, Blocks::col_y, Blocks::wait_for_columns, Blocks::each;
  using Blocks::store;
  using Blocks::weights, Blocks::multiply_keys, Blocks::multiply_values;
  using typename Blocks::Element, typename Blocks::Params, typename Blocks::Work, typename Blocks::Stage;
  using typename Blocks::Smem, typename Blocks::TileX, typename Blocks::TileY, typename Blocks::TileColX;
  using typename Blocks::TileColY, typename Blocks::TileScores, typename Blocks::Barriers;

  FM_DEVICE static void run(const Params& p) {
    Blocks::run_with(
        p, [&](const Work& w, u8* smem, u32 s_base, const Barriers& x, const Barriers& y, int consumer) {
          if (consumer == 0)
            make_weights(p, w, smem, s_base, x, y);
          else
            make_scores(p, w, smem, s_base, x, y);
        });
  }

  // ---- the first consumer: P and dv ----

  FM_DEVICE static void make_weights(const Params& p, const Work& w, u8* smem, u32 s_base, const Barriers& x,
                                     const Barriers& y) {
    const int steps = w.all_steps(), row = w.row0 + (warp_id() & 3) * 16;
    float r_dv[kHeadDimV / 8][4] = {};
    if (steps > 0) {
      const float scale = p.softmax_scale * kLog2e;
      float r_s[1][kCols / 8][4];
      u32 r_p[kCols / 16][4];
      Stage at;
      mbarrier_wait_parity(s_base + Smem::kBarrierX, 0);
      wait_for_columns(w, s_base, x, y, at, w.first * kCols);
      multiply_keys(r_s, s_base, at);
#pragma unroll 1
      for (int step = 0, tile = w.first; step < steps; ++step) {
        const int col = tile * kCols;
        tile = w.next(tile);
        wgmma_wait_group<0>(r_s[0]);
        if (w.band.template cuts<kRows, kCols>(w.row0, col) || w.row0 + kRows > w.band.rows)
          mask_keys(r_s[0], w.band, row, col);
        const auto& s_of = statistics(smem, at);
        each(r_s, [&](float& s, int, int, int j) { s = exp2_approx(fmaf(s, scale, -s_of.lse[j])); });
        x.release(at);
        pack_operand<Element>(r_p, r_s[0]);
        if (step >= 2) barrier_sync(kWeightsUsed + (step & 1), kConsumerThreads);
        const u32 s_weights = weights(s_base, step);
#pragma unroll
        for (int i = 0; i < kCols / 16; ++i)
          st_shared_v4_b32(s_weights + i * 2048, r_p[i][0], r_p[i][1], r_p[i][2], r_p[i][3]);
        barrier_arrive(kWeightsStored + (step & 1), kConsumerThreads);
        y.wait_full(at);
        wgmma_fence();
        multiply<Element, 1>(r_dv, r_p, MNMajor<TileColY>(col_y(s_base, at)), false, [] {});
        wgmma_commit_group();
        Stage next = at;
        next.advance();
        if (step + 1 < steps) wait_for_columns(w, s_base, x, y, next, tile * kCols);
        multiply_keys(r_s, s_base, next);
        wgmma_wait_group<1>(r_dv);
        y.release(at);
        at = next;
      }
      wgmma_wait_group<0>(r_s[0]);
    }
    store(p, w, row, r_dv, static_cast<Element*>(p.dv), p.dv_stride_b, p.dv_stride_s, p.dv_stride_h,
          p.head_dim_v, 1.f);
  }

  // ---- the second: dS and dk ----

  FM_DEVICE static void make_scores(const Params& p, const Work& w, u8* smem, u32 s_base, const Barriers& x,
                                    const Barriers& y) {
    const int steps = w.all_steps(), warp_row = (warp_id() & 3) * 16;
    float r_dk[kHeadDim / 8][4] = {};
    if (steps > 0) {
      float r_dp[1][kCols / 8][4];
      u32 r_ds[kCols / 16][4];
      Stage at, before;  // the step at hand, and the one whose q is still in use
      mbarrier_wait_parity(s_base + Smem::kBarrierY, 0);
#pragma unroll 1
      for (int step = 0, tile = w.first; step < steps; ++step) {
        const int col = tile * kCols;
        tile = w.next(tile);
        wait_for_columns(w, s_base, y, x, at, col);
        multiply_values(r_dp, s_base, at);
        wgmma_wait_group<1>(r_dk);
        if (step > 0) x.release(before), before.advance();
        wgmma_wait_group<0>(r_dp[0]);
        y.release(at);
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
        if (step + 2 < steps) barrier_arrive(kWeightsUsed + (step & 1), kConsumerThreads);
        wgmma_fence();
        multiply<Element, 1>(r_dk, r_ds, MNMajor<TileColX>(col_x(s_base, at)), false, [] {});
        wgmma_commit_group();
        at.advance();
      }
      wgmma_wait_group<0>(r_dk);
    }
    store(p, w, w.row0 + warp_row, r_dk, static_cast<Element*>(p.dk), p.dk_stride_b, p.dk_stride_s,
          p.dk_stride_h, p.head_dim, p.softmax_scale);
  }
};

}  // namespace fm
