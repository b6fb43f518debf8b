// Attention backward for every GPU from sm_80 on: gradients of q, of k, of v, or of k and v.
//
//   S = scores(q k^T)   P = exp(S - lse)   dP = dout v^T   dS = P (dP - delta)
//   dv = P^T dout       dk = scale dS^T q  dq = scale dS k      (FlashAttention-2, algorithm 2)
//
// Arrays, strides, masks and head dims as in fwd_sm80.cuh; dout lies like out. row_lse and row_delta are
// those of bwd_dot.cuh. Overwrites the rows of dq, dk and dv that count, touches no others. A query that sees
// no key and a key that no query sees get 0. Nothing is added up in memory, so there is no workspace and the
// bits are the same in every run: a block owns its rows from the first step to the last.
//
// One block takes kRows queries, for dq, and walks over the keys that they see; or kRows keys and walks over
// the queries that see them, head after head of those that share the keys. Both are the same loop: what a
// block owns are `rows`, what it walks over are `cols`, and of a transposed band a key's row sees the queries
// that see the key. Each step multiplies rows by columns twice (S and dP) and their products by the columns
// again. Values wider than kHeadDimV go in tiles of columns: dS is linear in dP - delta, so that each tile
// has its own walk and dq and dk add all of them up.
#pragma once
#include "attention/bias_sm80.cuh"
#include "attention/bwd_params.cuh"
#include "attention/keys.cuh"
#include "attention/variant.cuh"
#include "math/softmax.cuh"
#include "tile/gemm.cuh"
#include "tile/mask.cuh"
#include "tile/smem.cuh"

namespace fm {

template <class Element_, int kHeadDim_, int kHeadDimV_, int kRows_, int kCols_, int kWarps_, int kStages_,
          int kWanted_, class Variant_>
struct AttentionBwdSm80 {
  using Element = Element_;
  using Variant = Variant_;
  using Keys = RowKeys;  // where queries and keys lie (attention/keys.cuh)
  static constexpr int kHeadDim = kHeadDim_, kHeadDimV = kHeadDimV_, kRows = kRows_, kCols = kCols_;
  static constexpr int kWarps = kWarps_, kThreads = 32 * kWarps, kStages = kStages_, kWanted = kWanted_;
  static constexpr bool kByKey = kWanted != kGradQ;   // rows are keys
  static constexpr bool kScores = kWanted != kGradV;  // dS is wanted, for dq or dk
  static constexpr bool kValues = kWanted & kGradV;
  static constexpr bool kAligned = Variant::kAligned;
  static constexpr int kM = div_up(kRows, 16 * kWarps);  // accumulator tiles of 16 rows that a warp owns
  static_assert(kWanted == kGradQ || (kWanted & kGradQ) == 0, "dq has a walk of its own");

  // Of the rows, x and y; of the columns the same: (q, dout) or (k, v).
  using TileRowX = SmemTile<Element, kRows, kHeadDim>;
  using TileRowY = SmemTile<Element, kRows, kHeadDimV>;
  using TileColX = SmemTile<Element, kCols, kHeadDim>;
  using TileColY = SmemTile<Element, kCols, kHeadDimV>;
  using Bias = decltype(pick<Variant::kFetchesBias>(BiasInRegisters<kM, kCols / 8>(), NoBiasInRegisters()));
  using Scores = float[kM][kCols / 8][4];
  // What a block works on. It stays in shared memory: in the loop every register is taken.
  struct Work {
    BandMask band;     // rows see columns
    i64 q_row, k_row;  // rows of the arrays where the sequence begins
    int batch, head, head_k;
    int row0;          // the block's first row
    int first, steps;  // tiles of columns: the first one, and how many
    int walks;         // heads whose queries are walked over
  };
  struct Smem {
    static constexpr int kWork = 0, kRowX = 128, kRowY = kRowX + TileRowX::kBytes;
    static constexpr int kRowStatistics = kRowY + (kScores ? TileRowY::kBytes : 0);
    static constexpr int kColumns = kRowStatistics + (kByKey ? 0 : Statistics<kRows>::kBytes);
    static constexpr int kColY = TileColX::kBytes, kColStatistics = kColY + TileColY::kBytes;  // of a stage
    static constexpr int kStage = kColStatistics + (kByKey ? Statistics<kCols>::kBytes : 0);
    static constexpr int kBytes = kColumns + kStages * kStage;
    static_assert(sizeof(Work) <= kRowX);
  };

  FM_DEVICE static bool find_work(const AttentionBwdParams& p, const AttentionFwdParams& f, Work& w) {
    int index = static_cast<int>(blockIdx.x);
    // Under a causal mask late queries see the most keys, and early keys are seen by the most queries.
    const int block = kByKey ? index % p.blocks : p.blocks - 1 - index % p.blocks;
    index /= p.blocks;
    const int heads = kByKey ? p.heads_q / p.heads_per_key : p.heads_q;
    w.batch = index / heads;
    w.walks = kByKey ? p.heads_per_key : 1;
    w.head = index % heads * w.walks;
    w.head_k = w.head / p.heads_per_key;
    w.row0 = block * kRows;
    const SequenceOf<i64> found = Keys::sequence_from(f, w.batch, 0);
    w.q_row = found.q_row, w.k_row = found.k_row;
    const int shift = found.seqlen_k - found.seqlen_q;
    w.band = kByKey ? BandMask{found.seqlen_k, found.seqlen_q, -shift, p.window_right, p.window_left, 0}
                    : BandMask{found.seqlen_q, found.seqlen_k, shift, p.window_left, p.window_right, 0};
    if (w.row0 >= w.band.rows) return false;
    w.first = w.band.first(w.row0) / kCols;
    const int last = div_up(max(w.band.last(min(w.row0 + kRows, w.band.rows) - 1) + 1, 0), kCols);
    w.steps = max(last - w.first, 0);
    return true;
  }

  // Where row 0 of the sequence lies in q or dout (of a head), in k or v.
  FM_DEVICE static const Element* g_query(const void* array, const Work& w, int head, i64 stride_b,
                                          i64 stride_s, i64 stride_h) {
    return static_cast<const Element*>(array) + w.batch * stride_b + w.q_row * stride_s + head * stride_h;
  }
  FM_DEVICE static const Element* g_key(const void* array, const Work& w, i64 stride_b, i64 stride_s,
                                        i64 stride_h) {
    return static_cast<const Element*>(array) + w.batch * stride_b + w.k_row * stride_s + w.head_k * stride_h;
  }
  FM_DEVICE static const Element* g_q(const AttentionBwdParams& p, const Work& w, int head) {
    return g_query(p.q, w, head, p.q_stride_b, p.q_stride_s, p.q_stride_h);
  }
  FM_DEVICE static const Element* g_dout(const AttentionBwdParams& p, const Work& w, int head, int v_block) {
    return g_query(p.dout, w, head, p.dout_stride_b, p.dout_stride_s, p.dout_stride_h) + v_block * kHeadDimV;
  }
  FM_DEVICE static const Element* g_k(const AttentionBwdParams& p, const Work& w) {
    return g_key(p.k, w, p.k_stride_b, p.k_stride_s, p.k_stride_h);
  }
  FM_DEVICE static const Element* g_v(const AttentionBwdParams& p, const Work& w, int v_block) {
    return g_key(p.v, w, p.v_stride_b, p.v_stride_s, p.v_stride_h) + v_block * kHeadDimV;
  }
  template <class Tile>
  FM_DEVICE static void load(const AttentionBwdParams& p, u32 s_tile, const Element* g_first, i64 stride_s,
                             int row, int rows, int columns) {
    load_tile<Tile, kThreads, kAligned>(s_tile, g_first + row * stride_s, stride_s, rows - row,
                                        columns / Tile::kPerChunk, p.aligned != 0);
  }

  FM_DEVICE static void load_rows(const AttentionBwdParams& p, const Work& w, u8* smem, int v_block) {
    const u32 s_base = smem_address(smem);
    if constexpr (!kByKey)
      load_statistics(p, w, *reinterpret_cast<Statistics<kRows>*>(smem + Smem::kRowStatistics), w.head,
                      w.row0, w.band.rows, v_block);
    const int columns_v = p.head_dim_v - v_block * kHeadDimV;
    if (v_block == 0)
      load<TileRowX>(p, s_base + Smem::kRowX, kByKey ? g_k(p, w) : g_q(p, w, w.head),
                     kByKey ? p.k_stride_s : p.q_stride_s, w.row0, w.band.rows, p.head_dim);
    if constexpr (kScores)
      load<TileRowY>(p, s_base + Smem::kRowY, kByKey ? g_v(p, w, v_block) : g_dout(p, w, w.head, v_block),
                     kByKey ? p.v_stride_s : p.dout_stride_s, w.row0, w.band.rows, columns_v);
  }

  // Step `step` of a walk over all heads, to its stage.
  FM_DEVICE static void load_step(const AttentionBwdParams& p, const Work& w, u8* smem, int step,
                                  int v_block) {
    const int head = w.head + step / w.steps, col = (w.first + step % w.steps) * kCols;
    const int columns_v = p.head_dim_v - v_block * kHeadDimV;
    u8* stage = smem + Smem::kColumns + step % kStages * Smem::kStage;
    const u32 s_stage = smem_address(stage);
    load<TileColX>(p, s_stage, kByKey ? g_q(p, w, head) : g_k(p, w), kByKey ? p.q_stride_s : p.k_stride_s,
                   col, w.band.cols, p.head_dim);
    load<TileColY>(p, s_stage + Smem::kColY, kByKey ? g_dout(p, w, head, v_block) : g_v(p, w, v_block),
                   kByKey ? p.dout_stride_s : p.v_stride_s, col, w.band.cols, columns_v);
    cp_async_commit_group();
    if constexpr (kByKey)
      load_statistics(p, w, *reinterpret_cast<Statistics<kCols>*>(stage + Smem::kColStatistics), head, col,
                      w.band.cols, v_block);
  }

  // From query `first` of a sequence on.
  template <int kQueries>
  FM_DEVICE static void load_statistics(const AttentionBwdParams& p, const Work& w, Statistics<kQueries>& s,
                                        int head, int first, int queries, int v_block) {
    static_assert(kQueries <= kThreads);
    const int i = static_cast<int>(threadIdx.x);
    if (i >= kQueries) return;
    const bool there = first + i < queries;
    const i64 at = w.batch * p.row_stride_b + head * p.row_stride_h + w.q_row + first + i;
    s.lse[i] = there ? p.row_lse[at] : infinity();
    s.delta[i] = there && v_block == 0 ? p.row_delta[at] : 0.f;  // dS counts it once
  }

  FM_DEVICE static void run(const AttentionBwdParams& p) {
    static_assert(kM * 16 * kWarps == kRows, "warps own whole tiles of 16 rows");
    extern __shared__ __align__(128) u8 smem[];
    const u32 s_base = smem_address(smem);
    AttentionFwdParams f = forward_params(p);
    const Work& w = *reinterpret_cast<const Work*>(smem + Smem::kWork);
    {
      Work found;
      if (!find_work(p, f, found)) return;
      if (threadIdx.x == 0) *reinterpret_cast<Work*>(smem + Smem::kWork) = found;
      __syncthreads();
    }
    if constexpr (kByKey) {  // rows of the bias are keys here
      f.bias_stride_q = p.bias_stride_k, f.bias_stride_k = p.bias_stride_q;
    }
    const int warp_row = warp_id() * 16 * kM, steps = w.steps * w.walks;

    float r_dx[kScores ? kM : 1][kScores ? kHeadDim / 8 : 1][4] = {};  // of q or k
    for (int v_block = 0; v_block < p.v_blocks; ++v_block) {
      float r_dv[kValues ? kM : 1][kValues ? kHeadDimV / 8 : 1][4] = {};
      __syncthreads();  // nobody reads the rows and stages of the walk before
      load_rows(p, w, smem, v_block);
      if (steps > 0) load_step(p, w, smem, 0, v_block);
#pragma unroll 1
      for (int step = 0; step < steps; ++step) {
        cp_async_wait_group<0>();
        __syncthreads();  // this step is here for all, and nobody reads the one before
        if (kStages > 1 && step + 1 < steps) load_step(p, w, smem, step + 1, v_block);

        const u8* stage = smem + Smem::kColumns + step % kStages * Smem::kStage;
        const u32 s_x = smem_address(stage), s_y = s_x + Smem::kColY;
        const auto& s_rows = *reinterpret_cast<const Statistics<kRows>*>(smem + Smem::kRowStatistics);
        const auto& s_cols = *reinterpret_cast<const Statistics<kCols>*>(stage + Smem::kColStatistics);
        const int head = w.head + step / w.steps, col = (w.first + step % w.steps) * kCols;
        Bias bias;
        if constexpr (Variant::kFetchesBias)
          bias.fetch(f, bias_of(p, w, head), w.row0 + warp_row, col, w.band);
        Scores r_p, r_slope;
        gemm_ss_nt<Element, TileRowX, TileColX>(r_p, s_base + Smem::kRowX, warp_row, s_x);
        change_scores(f, w, head, r_p, r_slope, bias, w.row0 + warp_row, col);
        weigh(p, r_p, [&](int i, int j) { return kByKey ? s_cols.lse[j] : s_rows.lse[warp_row + i]; });
        if constexpr (kValues) gemm_rs_nn<Element, TileColY>(r_dv, r_p, s_y);
        if constexpr (kScores) {
          if constexpr (Variant::kScore)
            each(r_p, [&](float& weight, int m, int n, int e, int, int) { weight *= r_slope[m][n][e]; });
          Scores r_ds;
          gemm_ss_nt<Element, TileRowY, TileColY>(r_ds, s_base + Smem::kRowY, warp_row, s_y);
          each(r_ds, [&](float& ds, int m, int n, int e, int i, int j) {
            ds = r_p[m][n][e] * (ds - (kByKey ? s_cols.delta[j] : s_rows.delta[warp_row + i]));
          });
          gemm_rs_nn<Element, TileColX>(r_dx, r_ds, s_x);
        }
        if (kStages == 1 && step + 1 < steps) {
          __syncthreads();  // nobody reads this step any more
          load_step(p, w, smem, step + 1, v_block);
        }
      }
      cp_async_wait_group<0>();
      if constexpr (kValues)
        store(p, w, static_cast<Element*>(p.dv) + v_block * kHeadDimV, w.head_k, p.dv_stride_b, p.dv_stride_s,
              p.dv_stride_h, p.head_dim_v - v_block * kHeadDimV, warp_row, r_dv, 1.f);
    }
    if constexpr (kScores)
      store(p, w, static_cast<Element*>(kByKey ? p.dk : p.dq), kByKey ? w.head_k : w.head,
            kByKey ? p.dk_stride_b : p.dq_stride_b, kByKey ? p.dk_stride_s : p.dq_stride_s,
            kByKey ? p.dk_stride_h : p.dq_stride_h, p.head_dim, warp_row, r_dx, p.softmax_scale);
  }

  // The bias of the sequence's first query and key, for a head; null: none.
  FM_DEVICE static const void* bias_of(const AttentionBwdParams& p, const Work& w, int head) {
    if (p.bias == nullptr) return nullptr;
    const i64 first = w.batch * p.bias_stride_b + head * p.bias_stride_h + w.q_row * p.bias_stride_q +
                      w.k_row * p.bias_stride_k;
    const int bytes = p.bias_dtype == kFP32 ? 4 : p.bias_dtype == kBool ? 1 : 2;
    return static_cast<const u8*>(p.bias) + first * bytes;
  }

  // f(value, m, n, e, i, j) for each value a thread holds: row i of its warp's, column j of the tile.
  template <int kTilesM, int kTilesN, class F>
  FM_DEVICE static void each(float (&r_s)[kTilesM][kTilesN][4], F&& f) {
    const int g = lane_id() >> 2, t = lane_id() & 3;
#pragma unroll
    for (int m = 0; m < kTilesM; ++m)
#pragma unroll
      for (int n = 0; n < kTilesN; ++n)
#pragma unroll
        for (int e = 0; e < 4; ++e) f(r_s[m][n][e], m, n, e, m * 16 + e / 2 * 8 + g, n * 8 + 2 * t + e % 2);
  }

  // From products to scores. Of scores that change (kScore) they are in natural units afterwards, and r_slope
  // says how fast each grows with its scaled product.
  template <int kTilesM, int kTilesN>
  FM_DEVICE static void change_scores(const AttentionFwdParams& f, const Work& w, int head,
                                      float (&r_s)[kTilesM][kTilesN][4],
                                      float (&r_slope)[kTilesM][kTilesN][4], const Bias& bias, int row,
                                      int col) {
    change_products(f, w, head, r_s, r_slope, row, col);
    bias.add(f, r_s);
    const BandMask band = w.band;
    if (!band.template cuts<16 * kTilesM, 8 * kTilesN>(row, col)) return;
    for_each_score(r_s, row, col, [&](float& s, int i, int j) {
      if (j < band.first(i) || j > band.last(i)) s = -infinity();
    });
  }
  // The same without bias and mask.
  template <int kTilesM, int kTilesN>
  FM_DEVICE static void change_products(const AttentionFwdParams& f, const Work& w, int head,
                                        float (&r_s)[kTilesM][kTilesN][4],
                                        float (&r_slope)[kTilesM][kTilesN][4], int row, int col) {
    if constexpr (Variant::kScore) {
      const BandMask band = w.band;
      each(r_s, [&](float& s, int m, int n, int e, int, int) {
        s *= f.softmax_scale;
        r_slope[m][n][e] = 1.f;
      });
      if (f.softcap > 0.f) {
        const float inverse = 1.f / f.softcap;
        each(r_s, [&](float& s, int m, int n, int e, int, int) {
          const float t = tanh_exp2(s * inverse);
          s = f.softcap * t;
          r_slope[m][n][e] = fmaf(-t, t, 1.f);
        });
      }
      Variant::add_alibi(f, r_s, w.batch, head, row, col, band, 1.f);
    }
  }

  // Scores to weights. lse(i, j): of row i of the warp's, or of column j.
  template <int kTilesM, int kTilesN, class F>
  FM_DEVICE static void weigh(const AttentionBwdParams& p, float (&r_s)[kTilesM][kTilesN][4], F&& lse) {
    const float scale = p.softmax_scale * kLog2e;
    each(r_s, [&](float& s, int, int, int, int i, int j) {
      if constexpr (Variant::kScore)
        s = exp2_approx((s - lse(i, j)) * kLog2e);
      else
        s = exp2_approx(fmaf(s, scale, -lse(i, j) * kLog2e));
    });
  }

  // The gradient of the rows that exist, in pairs of columns.
  template <int kTilesM, int kTilesN>
  FM_DEVICE static void store(const AttentionBwdParams& p, const Work& w, Element* array, int head,
                              i64 stride_b, i64 stride_s, i64 stride_h, int columns, int warp_row,
                              const float (&r_d)[kTilesM][kTilesN][4], float scale) {
    const int g = lane_id() >> 2, t = lane_id() & 3;
    const i64 first = kByKey ? w.k_row : w.q_row;
#pragma unroll
    for (int i = 0; i < 2 * kTilesM; ++i) {
      const int row = w.row0 + warp_row + i / 2 * 16 + (i & 1) * 8 + g;
      if (row >= w.band.rows) continue;
      Element* g_row = array + w.batch * stride_b + (first + row) * stride_s + head * stride_h;
#pragma unroll
      for (int n = 0; n < kTilesN; ++n) {
        const int col = n * 8 + 2 * t;
        if (col >= columns) continue;
        const float x = r_d[i / 2][n][(i & 1) * 2] * scale, y = r_d[i / 2][n][(i & 1) * 2 + 1] * scale;
        if constexpr (sizeof(Element) == 4) {
          g_row[col] = x, g_row[col + 1] = y;
        } else if (kAligned || p.aligned) {
          *reinterpret_cast<u32*>(g_row + col) = pack2<Element>(x, y);
        } else {
          const u32 both = pack2<Element>(x, y);
          g_row[col] = Element{static_cast<u16>(both)},
          g_row[col + 1] = Element{static_cast<u16>(both >> 16)};
        }
      }
    }
  }
};

}  // namespace fm
