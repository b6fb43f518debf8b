// The gradient of attention's bias for every GPU from sm_80 on: dS of bwd_sm80.cuh, before softcap's slope,
// summed over the axes along which the bias is spread.
//
// Arrays as in bwd_sm80.cuh, of batch entries, not packed. The bias has 1 or all entries, heads, queries and
// keys; dbias has its shape and type, and is overwritten whole. Sums run in fp32 in one order, and are
// rounded once: the same bits in every run, and no workspace.
//
// One block takes a tile of kRows queries by kCols keys of the bias and computes dS for all entries and heads
// that share it; where the bias is spread along queries or keys, for all tiles of them. Rows and columns
// count from the beginning of the arrays, because that is how a bias lies; of a padded entry only some count.
#pragma once
#include "attention/bwd_sm80.cuh"
#include "math/reduce.cuh"

namespace fm {

template <class Element_, int kHeadDim_, int kHeadDimV_, int kRows_, int kCols_, int kWarps_>
struct AttentionBwdBiasSm80 : AttentionBwdSm80<Element_, kHeadDim_, kHeadDimV_, kRows_, kCols_, kWarps_, 1,
                                               kGradQ, ModifiedScores<true>> {
  using Base = AttentionBwdSm80<Element_, kHeadDim_, kHeadDimV_, kRows_, kCols_, kWarps_, 1, kGradQ,
                                ModifiedScores<true>>;
  using Base::kCols, Base::kHeadDimV, Base::kM, Base::kRows, Base::kWarps;
  using typename Base::Bias, typename Base::Element, typename Base::Scores, typename Base::Work;
  struct Smem : Base::Smem {
    static constexpr int kSums = Base::Smem::kBytes;  // of each warp and column
    static constexpr int kBytes = kSums + 4 * kWarps * kCols;
  };

  // Tiles begin .. end - 1 of `size` rows: one of all that the bias has, or all that it is spread along.
  FM_DEVICE static Rows tiles(int& index, int own, int size, int tile) {
    const int count = div_up(own, tile), mine = index % count;
    index /= count;
    return own == 1 ? Rows{0, div_up(size, tile)} : Rows{mine, mine + 1};
  }

  FM_DEVICE static void run(const AttentionBwdBiasParams& p) {
    extern __shared__ __align__(128) u8 smem[];
    const AttentionFwdParams f = forward_params(p);
    int index = static_cast<int>(blockIdx.x);
    const Rows cols = tiles(index, p.bias_keys, p.seqlen_k, kCols);
    const Rows rows = tiles(index, p.bias_queries, p.seqlen_q, kRows);
    const Rows heads = tiles(index, p.bias_heads, p.heads_q, 1);
    const Rows batch = tiles(index, p.bias_batch, p.batch, 1);

    Scores r_sum = {};
    Work& w = *reinterpret_cast<Work*>(smem + Smem::kWork);
    for (int b = batch.begin; b < batch.end; ++b) {
      const Sequence found = RowKeys::even(f) ? RowKeys::each(f) : RowKeys::sequence(f, b);
      const Rows queries = {found.q_row, found.q_row + found.seqlen_q};
      const Rows keys = {found.k_row, found.k_row + found.seqlen_k};
      const BandMask band = {queries.end, keys.end, keys.end - queries.end, p.window_left, p.window_right, 0};
      for (int head = heads.begin; head < heads.end; ++head)
        for (int m = rows.begin; m < rows.end; ++m)
          for (int n = cols.begin; n < cols.end; ++n) {
            const int row = max(m * kRows, queries.begin), last = min((m + 1) * kRows, queries.end) - 1;
            if (row > last || band.first(row) >= (n + 1) * kCols || band.last(last) < n * kCols) continue;
            __syncthreads();  // nobody reads the work of the step before
            if (threadIdx.x == 0) w = {band, 0, 0, b, head, head / p.heads_per_key, m * kRows, n, 1, 1};
            __syncthreads();
            add_tile(p, f, w, smem, queries, keys, n * kCols, r_sum);
          }
    }
    store(p, smem, r_sum, rows, cols, heads.begin, batch.begin);
  }

  // dS of one tile, which counts `queries` and `keys`.
  FM_DEVICE static void add_tile(const AttentionBwdBiasParams& p, const AttentionFwdParams& f, const Work& w,
                                 u8* smem, const Rows& queries, const Rows& keys, int col, Scores& r_sum) {
    const u32 s_base = smem_address(smem);
    const int warp_row = warp_id() * 16 * kM;
    const auto& s_rows = *reinterpret_cast<const Statistics<kRows>*>(smem + Smem::kRowStatistics);
    for (int v_block = 0; v_block < p.v_blocks; ++v_block) {
      __syncthreads();  // nobody reads the tiles of the walk before
      Base::load_rows(p, w, smem, v_block);
      Base::load_step(p, w, smem, 0, v_block);
      Bias bias;
      bias.fetch(f, Base::bias_of(p, w, w.head), w.row0 + warp_row, col, w.band);
      cp_async_wait_group<0>();
      __syncthreads();
      const u32 s_x = s_base + Smem::kColumns, s_y = s_x + Smem::kColY;
      Scores r_p, r_slope, r_ds;
      gemm_ss_nt<Element, typename Base::TileRowX, typename Base::TileColX>(r_p, s_base + Smem::kRowX,
                                                                            warp_row, s_x);
      Base::change_scores(f, w, w.head, r_p, r_slope, bias, w.row0 + warp_row, col);
      Base::weigh(p, r_p, [&](int i, int) { return s_rows.lse[warp_row + i]; });
      gemm_ss_nt<Element, typename Base::TileRowY, typename Base::TileColY>(r_ds, s_base + Smem::kRowY,
                                                                            warp_row, s_y);
      Base::each(r_ds, [&](float& ds, int m, int n, int e, int i, int j) {
        const int row = w.row0 + warp_row + i, key = col + j;
        const bool counts = row >= queries.begin && row < queries.end && key >= keys.begin && key < keys.end;
        ds = r_p[m][n][e] * (ds - s_rows.delta[warp_row + i]);
        if (counts) r_sum[m][n][e] += ds;  // what rows of padding hold may be NaN
      });
    }
  }

  // The sums of a block's tile, and along the axes that the bias has once.
  FM_DEVICE static void store(const AttentionBwdBiasParams& p, u8* smem, Scores& r_sum, const Rows& rows,
                              const Rows& cols, int head, int batch) {
    const int warp = warp_id(), lane = lane_id();
    const i64 first = (p.bias_batch == 1 ? 0 : batch) * p.dbias_stride_b +
                      (p.bias_heads == 1 ? 0 : head) * p.dbias_stride_h;
    const int row0 = rows.begin * kRows + warp * 16 * kM, col0 = cols.begin * kCols;
    if (p.bias_queries == 1) {
      float* s_sums = reinterpret_cast<float*>(smem + Smem::kSums);
#pragma unroll
      for (int n = 0; n < kCols / 8; ++n)
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          float sum = 0.f;
#pragma unroll
          for (int m = 0; m < kM; ++m) sum += r_sum[m][n][e] + r_sum[m][n][e + 2];
#pragma unroll
          for (int distance = 4; distance < 32; distance *= 2)
            sum += __shfl_xor_sync(0xffffffffu, sum, distance);
          if (lane < 4) s_sums[warp * kCols + n * 8 + 2 * lane + e] = sum;
        }
      __syncthreads();
      const bool one = p.bias_keys == 1;
      for (int col = threadIdx.x; col < (one ? 1 : kCols); col += Base::kThreads) {
        float sum = 0.f;
        for (int i = 0; i < kWarps; ++i)
          for (int j = col; j < (one ? kCols : col + 1); ++j) sum += s_sums[i * kCols + j];
        if (one || col0 + col < p.bias_keys) put(p, first + (one ? 0 : col0 + col) * p.dbias_stride_k, sum);
      }
    } else if (p.bias_keys == 1) {
#pragma unroll
      for (int i = 0; i < 2 * kM; ++i) {
        float sum = 0.f;
#pragma unroll
        for (int n = 0; n < kCols / 8; ++n)
          sum += r_sum[i / 2][n][(i & 1) * 2] + r_sum[i / 2][n][(i & 1) * 2 + 1];
        sum = quad_sum(sum);
        const int row = row0 + i / 2 * 16 + (i & 1) * 8 + (lane >> 2);
        if ((lane & 3) == 0 && row < p.bias_queries) put(p, first + row * p.dbias_stride_q, sum);
      }
    } else {
      for_each_score(r_sum, row0, col0, [&](float& sum, int row, int col) {
        if (row < p.bias_queries && col < p.bias_keys)
          put(p, first + row * p.dbias_stride_q + col * p.dbias_stride_k, sum);
      });
    }
  }

  FM_DEVICE static void put(const AttentionBwdBiasParams& p, i64 at, float x) {
    if (p.bias_dtype == kFP32) {
      static_cast<float*>(p.dbias)[at] = x;
    } else {
      const u32 half = p.bias_dtype == kBF16 ? pack2<bf16>(x, 0.f) : pack2<fp16>(x, 0.f);
      static_cast<u16*>(p.dbias)[at] = static_cast<u16>(half);
    }
  }
};

}  // namespace fm
