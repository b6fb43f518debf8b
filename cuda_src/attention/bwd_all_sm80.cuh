// Attention backward for every GPU from sm_80 on: gradients of q, k and v in one launch.
//
// Arrays, strides, masks, row_lse and row_delta as in bwd_sm80.cuh, for rows of 16 bits at multiples of 16
// bytes and values up to kHeadDimV wide. Overwrites the rows of dk and dv that count. Blocks add dq / scale
// up in dq_sums, in any order: bwd_dot.cuh clears the sums before, bwd_convert.cuh makes dq of them. So S and
// dP are made once, five products instead of seven, but the last bits of dq differ from run to run.
//
// One block takes kRows keys and walks over the queries that see them, kCols a step. Warps lie in another
// grid for each product, so that they read as little of their operands twice as they can: shared memory, not
// the tensor cores, bounds the kernel. P and dS go from grid to grid through shared memory, in 16 bits. Where
// each warp has keys of its own (kHeld), dk and dv take them from registers, and dS alone is exchanged.
#pragma once
#include "attention/bwd_sm80.cuh"
#include "ptx/global_memory.cuh"

namespace fm {

// Warps in a grid over a matrix of kRows x kCols, kDown of them from its first row to its last one.
template <int kWarps, int kDown, int kRows, int kCols>
struct WarpGrid {
  static constexpr int kAcross = kWarps / kDown, kTileRows = kRows / kDown, kTileCols = kCols / kAcross;
  static constexpr int kM = kTileRows / 16, kN = kTileCols / 8;
  using Tile = float[kM][kN][4];  // accumulators of a warp
  static_assert(kDown * kAcross == kWarps && kDown * kM * 16 == kRows && kAcross * kN * 8 == kCols);
  static_assert(kN % 2 == 0, "products make pairs of 8 columns");

  FM_DEVICE static int row() { return warp_id() / kAcross * kTileRows; }
  FM_DEVICE static int col() { return warp_id() % kAcross * kTileCols; }
};

template <class Scores>
struct AlignedRows : Scores {
  static constexpr bool kAligned = true;
};

// kDownS, kDownD, kDownQ: of the grids for S and dP, for dk and dv, for dq.
template <class Element_, int kHeadDim_, int kHeadDimV_, int kRows_, int kCols_, int kWarps_, int kStages_,
          int kDownS, int kDownD, int kDownQ, class Variant_>
struct AttentionBwdAllSm80 : AttentionBwdSm80<Element_, kHeadDim_, kHeadDimV_, kRows_, kCols_, kWarps_,
                                              kStages_, kGradK | kGradV, AlignedRows<Variant_>> {
  using Base = AttentionBwdSm80<Element_, kHeadDim_, kHeadDimV_, kRows_, kCols_, kWarps_, kStages_,
                                kGradK | kGradV, AlignedRows<Variant_>>;
  using Base::kCols, Base::kHeadDim, Base::kHeadDimV, Base::kRows, Base::kStages, Base::kWarps;
  using typename Base::Element, typename Base::Work, typename Base::TileRowX, typename Base::TileRowY;
  using typename Base::TileColX, typename Base::TileColY;
  using TileScores = SmemTile<Element, kRows, kCols>;  // P or dS of a step
  using GridS = WarpGrid<kWarps, kDownS, kRows, kCols>;
  using GridK = WarpGrid<kWarps, kDownD, kRows, kHeadDim>;
  using GridV = WarpGrid<kWarps, kDownD, kRows, kHeadDimV>;
  using GridQ = WarpGrid<kWarps, kDownQ, kCols, kHeadDim>;
  static constexpr bool kHeld = kDownS == kWarps && kDownD == kWarps;
  static constexpr int kPiece = 32;  // queries whose P and dS a warp holds
  static_assert(sizeof(Element) == 2 && !Variant_::kFetchesBias);
  static_assert(kCols == 64, "a step adds to one block of dq_sums for each head");

  struct Smem : Base::Smem {
    static constexpr int kDs = Base::Smem::kBytes, kP = kDs + TileScores::kBytes;
    static constexpr int kBytes = kP + (kHeld ? 0 : TileScores::kBytes);
  };

  FM_DEVICE static void run(const AttentionBwdParams& p) {
    extern __shared__ __align__(128) u8 smem[];
    const AttentionFwdParams f = forward_params(p);
    const Work& w = *reinterpret_cast<const Work*>(smem + Smem::kWork);
    {
      Work found;
      if (!Base::find_work(p, f, found)) return;
      if (threadIdx.x == 0) *reinterpret_cast<Work*>(smem + Smem::kWork) = found;
      __syncthreads();
    }
    const int steps = w.steps * w.walks;
    Base::load_rows(p, w, smem, 0);
    if (steps > 0) {
      load_columns(p, w, smem, 0);
      put_statistics(smem, 0, fetch_statistics(p, w, 0));
    }

    typename GridK::Tile r_dk = {};
    typename GridV::Tile r_dv = {};
#pragma unroll 1
    for (int step = 0; step < steps; ++step) {
      const bool more = step + 1 < steps;
      cp_async_wait_group<0>();
      __syncthreads();  // this step is here for all, and nobody reads the one before
      if (kStages > 1 && more) load_columns(p, w, smem, step + 1);
      u32 s_base = smem_address(smem);
      keep_register(s_base);  // addresses are made anew: kept, they would take too many registers
      const u8* stage = smem + Smem::kColumns + step % kStages * Smem::kStage;
      const u32 s_x = s_base + Smem::kColumns + step % kStages * Smem::kStage, s_y = s_x + Smem::kColY;
      const auto& s_cols = *reinterpret_cast<const Statistics<kCols>*>(stage + Smem::kColStatistics);
      const int head = w.head + step / w.steps, col = (w.first + step % w.steps) * kCols;
      if constexpr (kHeld)
        add_keys(p, f, w, s_base, s_x, s_y, s_cols, head, col, r_dk, r_dv);
      else
        make_scores(p, f, w, s_base, s_x, s_y, s_cols, head, col);
      __syncthreads();  // P and dS are here for all
      Row next;
      if (more) next = fetch_statistics(p, w, step + 1);  // its time passes behind the products
      if constexpr (!kHeld) {
        gemm_ss_nn<Element, TileScores, TileColY>(r_dv, s_base + Smem::kP, GridV::row(), s_y,
                                                  GridV::col() / 8);
        gemm_ss_nn<Element, TileScores, TileColX>(r_dk, s_base + Smem::kDs, GridK::row(), s_x,
                                                  GridK::col() / 8);
        if (kStages == 1 && more) __syncthreads();  // nobody reads this step any more
      }
      if (kStages == 1 && more) load_columns(p, w, smem, step + 1);
      add_queries(p, w, s_base, step);
      if (more) put_statistics(smem, step + 1, next);
    }
    const int col_v = GridV::col(), col_k = GridK::col();
    Base::store(p, w, static_cast<Element*>(p.dv) + col_v, w.head_k, p.dv_stride_b, p.dv_stride_s,
                p.dv_stride_h, p.head_dim_v - col_v, GridV::row(), r_dv, 1.f);
    Base::store(p, w, static_cast<Element*>(p.dk) + col_k, w.head_k, p.dk_stride_b, p.dk_stride_s,
                p.dk_stride_h, p.head_dim - col_k, GridK::row(), r_dk, p.softmax_scale);
  }

  // Queries and dout of step `step` of a walk over all heads, to its stage.
  FM_DEVICE static void load_columns(const AttentionBwdParams& p, const Work& w, u8* smem, int step) {
    const int head = w.head + step / w.steps, col = (w.first + step % w.steps) * kCols;
    const u32 s_stage = smem_address(smem) + Smem::kColumns + step % kStages * Smem::kStage;
    Base::template load<TileColX>(p, s_stage, Base::g_q(p, w, head), p.q_stride_s, col, w.band.cols,
                                  p.head_dim);
    Base::template load<TileColY>(p, s_stage + Smem::kColY, Base::g_dout(p, w, head, 0), p.dout_stride_s, col,
                                  w.band.cols, p.head_dim_v);
    cp_async_commit_group();
  }

  // The statistics of a step come through registers, a query for each of the first threads.
  struct Row {
    float lse, delta;
  };
  FM_DEVICE static Row fetch_statistics(const AttentionBwdParams& p, const Work& w, int step) {
    const int head = w.head + step / w.steps, i = thread_index();
    const int row = (w.first + step % w.steps) * kCols + i;
    if (i >= kCols || row >= w.band.cols) return {infinity(), 0.f};
    const i64 at = w.batch * p.row_stride_b + head * p.row_stride_h + w.q_row + row;
    return {p.row_lse[at], p.row_delta[at]};
  }
  FM_DEVICE static void put_statistics(u8* smem, int step, const Row& row) {
    static_assert(kCols <= Base::kThreads);
    u8* s_at = smem + Smem::kColumns + step % kStages * Smem::kStage + Smem::kColStatistics;
    auto& s = *reinterpret_cast<Statistics<kCols>*>(s_at);
    const int i = thread_index();
    if (i < kCols) s.lse[i] = row.lse, s.delta[i] = row.delta;
  }

  // P and dS of a step, of the queries that a warp has, to shared memory.
  FM_DEVICE static void make_scores(const AttentionBwdParams& p, const AttentionFwdParams& f, const Work& w,
                                    u32 s_base, u32 s_x, u32 s_y, const Statistics<kCols>& s_cols, int head,
                                    int col) {
    typename GridS::Tile r_p, r_ds;
    make_weights(p, f, w, s_base, s_x, s_cols, head, col, GridS::col(), r_p,
                 [&] { store_scores(s_base + Smem::kP, r_p, GridS::col()); });
    make_ds(w, s_base, s_y, s_cols, GridS::col(), r_p, r_ds);
  }

  // The products of a step's P and dS, of which a warp holds whole rows; dS goes to shared memory as well.
  FM_DEVICE static void add_keys(const AttentionBwdParams& p, const AttentionFwdParams& f, const Work& w,
                                 u32 s_base, u32 s_x, u32 s_y, const Statistics<kCols>& s_cols, int head,
                                 int col, typename GridK::Tile& r_dk, typename GridV::Tile& r_dv) {
#pragma unroll
    for (int first = 0; first < kCols; first += kPiece) {
      float r_p[GridS::kM][kPiece / 8][4], r_ds[GridS::kM][kPiece / 8][4];
      make_weights(p, f, w, s_base, s_x, s_cols, head, col, first, r_p,
                   [&] { gemm_rs_nn<Element, TileColY>(r_dv, r_p, s_y + first * TileColY::kRowBytes); });
      make_ds(w, s_base, s_y, s_cols, first, r_p, r_ds);
      gemm_rs_nn<Element, TileColX>(r_dk, r_ds, s_x + first * TileColX::kRowBytes);
    }
  }

  // P of a warp's keys and of queries from `first` of a step on. use(): what needs P alone. Afterwards r_p
  // holds the factors of dP.
  template <int kN, class F>
  FM_DEVICE static void make_weights(const AttentionBwdParams& p, const AttentionFwdParams& f, const Work& w,
                                     u32 s_base, u32 s_x, const Statistics<kCols>& s_cols, int head, int col,
                                     int first, float (&r_p)[GridS::kM][kN][4], F&& use) {
    float r_slope[GridS::kM][kN][4];
    gemm_ss_nt<Element, TileRowX, TileColX>(r_p, s_base + Smem::kRowX, GridS::row(),
                                            s_x + first * TileColX::kRowBytes);
    Base::change_scores(f, w, head, r_p, r_slope, {}, w.row0 + GridS::row(), col + first);
    Base::weigh(p, r_p, [&](int, int j) { return s_cols.lse[first + j]; });
    use();
    if constexpr (Variant_::kScore)
      Base::each(r_p, [&](float& weight, int m, int n, int e, int, int) { weight *= r_slope[m][n][e]; });
  }

  // dS of the same, which goes to shared memory as well.
  template <int kN>
  FM_DEVICE static void make_ds(const Work& w, u32 s_base, u32 s_y, const Statistics<kCols>& s_cols,
                                int first, const float (&r_p)[GridS::kM][kN][4],
                                float (&r_ds)[GridS::kM][kN][4]) {
    gemm_ss_nt<Element, TileRowY, TileColY>(r_ds, s_base + Smem::kRowY, GridS::row(),
                                            s_y + first * TileColY::kRowBytes);
    Base::each(r_ds, [&](float& ds, int m, int n, int e, int, int j) {
      ds = r_p[m][n][e] * (ds - s_cols.delta[first + j]);
    });
    // Weights of keys behind the end may be infinite, and the zeros in their place are factors of dq.
    if (w.row0 + kRows > w.band.rows)
      Base::each(r_ds, [&](float& ds, int, int, int, int i, int) {
        if (w.row0 + GridS::row() + i >= w.band.rows) ds = 0.f;
      });
    store_scores(s_base + Smem::kDs, r_ds, first);
  }

  // A warp's rows of P or dS, from a column on.
  template <int kN>
  FM_DEVICE static void store_scores(u32 s_tile, const float (&r_s)[GridS::kM][kN][4], int col) {
    float one[2 * GridS::kM];
#pragma unroll
    for (float& x : one) x = 1.f;
    store_accumulator<Element, TileScores>(s_tile, GridS::row(), r_s, one, col);
  }

  // dq of a step's queries: products of dS and the keys, to the sums.
  FM_DEVICE static void add_queries(const AttentionBwdParams& p, const Work& w, u32 s_base, int step) {
    const int head = w.head + step / w.steps, col = (w.first + step % w.steps) * kCols;
    typename GridQ::Tile r_dq = {};
    gemm_ss_tn<Element, TileScores, TileRowX>(r_dq, s_base + Smem::kDs, GridQ::row() / 8,
                                              s_base + Smem::kRowX, GridQ::col() / 8);
    const i64 first =
        first_block_of_sums(p.lengths, p.cu_seqlens_q, w.batch, p.heads_q, p.dq_blocks) + head * p.dq_blocks;
#pragma unroll
    for (int m = 0; m < GridQ::kM; ++m) {
      const int row = col + GridQ::row() + 16 * m;
      float* g_sums = p.dq_sums + (first + row / 64) * (div_up(kHeadDim, 64) * 64 * 64) +
                      GridQ::col() / 8 * 512 + (row % 64 / 16 * 32 + lane_id()) * 4;
#pragma unroll
      for (int n = 0; n < GridQ::kN; ++n) red_add_v4_f32(g_sums + n * 512, r_dq[m][n]);
    }
  }
};

}  // namespace fm
