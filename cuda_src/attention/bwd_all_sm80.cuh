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
#include "tile/lane_gemm.cuh"

namespace fm {

template <class Scores>
struct AlignedRows : Scores {
  static constexpr bool kAligned = true;
};

// Bits of kPlan, which say what is done beside what. They change when, not what is computed.
enum BwdAllPlan : int {
  kWeighBeside = 1,  // the weights are made beside the products of dP
  kAheadS = 2,       // operands of S and dP are loaded one slice ahead, ...
  kAheadD = 4,       // ... those of dk and dv ...
  kAheadQ = 8,       // ... and those of dq
  kStagger = 16,     // the second half of the warps makes dP before S: two warps of a scheduler take turns
  kSplit = 32        // the first half of the warps makes S, the second half dP, of larger tiles
};

// kDownS, kDownD, kDownQ: of the grids for S and dP, for dk and dv, for dq.
template <class Element_, int kHeadDim_, int kHeadDimV_, int kRows_, int kCols_, int kWarps_, int kStages_,
          int kDownS, int kDownD, int kDownQ, int kPlan, class Variant_>
struct AttentionBwdAllSm80 : AttentionBwdSm80<Element_, kHeadDim_, kHeadDimV_, kRows_, kCols_, kWarps_,
                                              kStages_, kGradK | kGradV, AlignedRows<Variant_>> {
  using Base = AttentionBwdSm80<Element_, kHeadDim_, kHeadDimV_, kRows_, kCols_, kWarps_, kStages_,
                                kGradK | kGradV, AlignedRows<Variant_>>;
  using Base::kCols, Base::kHeadDim, Base::kHeadDimV, Base::kRows, Base::kStages, Base::kThreads;
  using Base::kWarps;
  using typename Base::Element, typename Base::Work, typename Base::TileRowX, typename Base::TileRowY;
  using typename Base::TileColX, typename Base::TileColY;
  using TileScores = SmemTile<Element, kRows, kCols>;  // P or dS of a step
  static constexpr bool kApart = kPlan & kSplit;
  using GridS = WarpGrid<kApart ? kWarps / 2 : kWarps, kDownS, kRows, kCols>;
  using GridK = WarpGrid<kWarps, kDownD, kRows, kHeadDim>;
  using GridV = WarpGrid<kWarps, kDownD, kRows, kHeadDimV>;
  using GridQ = WarpGrid<kWarps, kDownQ, kCols, kHeadDim>;
  static constexpr bool kHeld = kDownS == kWarps && kDownD == kWarps;
  static constexpr int kPiece = kHeld ? 32 : GridS::kTileCols;  // queries whose P and dS a warp holds
  using Piece = float[GridS::kM][kPiece / 8][4];
  static constexpr int kSums = div_up(kHeadDim, 64) * 64 * 64;  // of dq_sums, in a step
  static_assert(sizeof(Element) == 2 && !Variant_::kFetchesBias);
  static_assert((kStages & (kStages - 1)) == 0);
  static_assert(kCols == 64, "a step adds to one block of dq_sums for each head");

  // Statistics of the next step may come as soon as dS is made: there is one place for them.
  struct Smem : Base::Smem {
    static constexpr int kStep = Base::Smem::kColStatistics;
    static constexpr int kStatistics = Base::Smem::kColumns + kStages * kStep;
    static constexpr int kDs = kStatistics + Statistics<kCols>::kBytes, kP = kDs + TileScores::kBytes;
    static constexpr int kWeights = kP + (kHeld ? 0 : TileScores::kBytes);
    static constexpr int kPlaces = kWeights + (kApart ? 4 * kRows * kCols : 0), kBytes = kPlaces + 4 * 48;
  };

  // Where a step lies. One thread goes ahead and leaves it in shared memory: registers are taken.
  struct Place {
    const u8 *g_x, *g_y;  // the first query and its dout
    i64 lse;              // place of its statistics
    float* g_sums;        // of dq
    int head, col, rows;  // col: the first query; rows: those from there on
  };
  enum : int { kPlaces = 4 };  // of the step before this one to the one behind the next one
  // First queries of a warp's pieces that the band leaves whole: first <= query <= last.
  struct Whole {
    int first, last;
  };
  // What the block works on, with what follows from it.
  struct Task : Work {
    int end;              // of a head's steps
    Whole whole[kDownS];  // of the warps with the same keys
  };
  static_assert(sizeof(Task) <= Smem::kRowX);

  FM_DEVICE static void run(const AttentionBwdParams& p) {
    extern __shared__ __align__(128) u8 smem[];
    const AttentionFwdParams f = forward_params(p);
    const Task& w = *reinterpret_cast<const Task*>(smem + Smem::kWork);
    {
      Task found;
      if (!Base::find_work(p, f, found)) return;
      complete(found);
      if (threadIdx.x == 0) *reinterpret_cast<Task*>(smem + Smem::kWork) = found;
      __syncthreads();
    }
    const int steps = w.steps * w.walks;
    Base::load_rows(p, w, smem, 0);
    if (steps > 0) {
      const Place at = first_place(p, w);
      const u32 s_step = smem_address(smem) + Smem::kColumns + (steps & (kStages - 1)) * Smem::kStep;
      load_columns(p, source_of(at, true), s_step, threadIdx.x);
      put_statistics(smem, fetch_statistics(p, at));
      if (threadIdx.x == 0) place_of(smem, steps) = at, place_of(smem, steps - 1) = next_place(p, w, at);
    }

    typename GridK::Tile r_dk = {};
    typename GridV::Tile r_dv = {};
#pragma unroll 1
    for (int left = steps; left > 0; --left) {
      const bool more = left > 1;
      cp_async_wait_group<0>();
      __syncthreads();  // this step is here for all, and nobody reads the one before
      u32 s_base = smem_address(smem), thread = threadIdx.x;
      keep_register(s_base), keep_register(thread);  // addresses are made anew: they take too many registers
      const u32 s_x = s_base + Smem::kColumns + (left & (kStages - 1)) * Smem::kStep, s_y = s_x + Smem::kColY;
      const auto& s_cols = *reinterpret_cast<const Statistics<kCols>*>(smem + Smem::kStatistics);
      const Place &at = place_of(smem, left), &next_at = place_of(smem, left - 1);
      // While S is made, so that its operands are not waited for longer. Behind the last step: zeros.
      const Source from = source_of(next_at, more);
      auto load_next = [&](int k) {
        if constexpr (kStages > 1)
          load_columns(p, from, s_base + Smem::kColumns + ((left - 1) & (kStages - 1)) * Smem::kStep, thread,
                       k);
      };
      if constexpr (kHeld) {
#pragma unroll
        for (int first = 0; first < kCols; first += kPiece) {
          Piece r_ds;
          auto load_once = [&](int k) { load_next(first == 0 ? k : -1); };
          make_scores(p, f, w, s_base, s_x, s_y, s_cols, at, thread, first, r_ds, load_once,
                      [&](const Piece& r_p) {
                        lane_gemm<Element, kPiece / 16, (kPlan & kAheadD) != 0>(
                            r_dv, HeldA<Element, GridS::kM, kPiece / 8>{r_p},
                            LaneColsB<TileColY, GridV::kN>(thread, s_y + first * TileColY::kRowBytes, 0));
                      });
          lane_gemm<Element, kPiece / 16, (kPlan & kAheadD) != 0>(
              r_dk, HeldA<Element, GridS::kM, kPiece / 8>{r_ds},
              LaneColsB<TileColX, GridK::kN>(thread, s_x + first * TileColX::kRowBytes, 0));
        }
      } else {
        Piece r_ds;
        const u32 of_half = kApart ? thread & (kThreads / 2 - 1) : thread;
        const int first = GridS::col(of_half);
        auto put = [&](const Piece& r_p) { store_scores(of_half, s_base + Smem::kP, r_p, first); };
        if constexpr (kApart)
          make_apart(p, w, s_base, s_x, s_cols, at, of_half, thread != of_half, first, load_next, put);
        else
          make_scores(p, f, w, s_base, s_x, s_y, s_cols, at, thread, first, r_ds, load_next, put);
      }
      __syncthreads();  // P and dS are here for all
      Row next;
      if (more) next = fetch_statistics(p, next_at);  // its time passes behind the products
      if (threadIdx.x == kThreads - 32) place_of(smem, left - 2) = next_place(p, w, next_at);
      if constexpr (!kHeld) {
        lane_gemm<Element, kCols / 16, (kPlan & kAheadD) != 0>(
            r_dv, LaneRowsA<TileScores>(thread, s_base + Smem::kP, GridV::row(thread)),
            LaneColsB<TileColY, GridV::kN>(thread, s_y, GridV::col(thread) / 8));
        lane_gemm<Element, kCols / 16, (kPlan & kAheadD) != 0>(
            r_dk, LaneRowsA<TileScores>(thread, s_base + Smem::kDs, GridK::row(thread)),
            LaneColsB<TileColX, GridK::kN>(thread, s_x, GridK::col(thread) / 8));
        if (kStages == 1 && more) __syncthreads();  // nobody reads this step any more
      }
      if (kStages == 1 && more) load_columns(p, source_of(next_at, true), s_base + Smem::kColumns, thread);
      add_queries(s_base, at, thread);
      if (more) put_statistics(smem, next);
    }
    const u32 thread = threadIdx.x;
    const int col_v = GridV::col(thread), col_k = GridK::col(thread);
    Base::store(p, w, static_cast<Element*>(p.dv) + col_v, w.head_k, p.dv_stride_b, p.dv_stride_s,
                p.dv_stride_h, p.head_dim_v - col_v, GridV::row(thread), r_dv, 1.f);
    Base::store(p, w, static_cast<Element*>(p.dk) + col_k, w.head_k, p.dk_stride_b, p.dk_stride_s,
                p.dk_stride_h, p.head_dim - col_k, GridK::row(thread), r_dk, p.softmax_scale);
  }

  // `left`: steps from there to the end.
  FM_DEVICE static Place& place_of(u8* smem, int left) {
    static_assert(sizeof(Place) <= 48 && kPlaces == 4);
    return *reinterpret_cast<Place*>(smem + Smem::kPlaces + (left & (kPlaces - 1)) * 48);
  }
  FM_DEVICE static Place first_place(const AttentionBwdParams& p, const Task& w) {
    const int col = w.first * kCols;
    const i64 block = first_block_of_sums(p.lengths, p.cu_seqlens_q, w.batch, p.heads_q, p.dq_blocks) +
                      static_cast<i64>(w.head) * p.dq_blocks + w.first;
    return {reinterpret_cast<const u8*>(Base::g_q(p, w, w.head) + col * p.q_stride_s),
            reinterpret_cast<const u8*>(Base::g_dout(p, w, w.head, 0) + col * p.dout_stride_s),
            w.batch * p.row_stride_b + w.head * p.row_stride_h + w.q_row + col,
            p.dq_sums + block * kSums,
            w.head,
            col,
            w.band.cols - col};
  }
  FM_DEVICE static Place next_place(const AttentionBwdParams& p, const Task& w, const Place& at) {
    Place to = at;
    to.g_x += kCols * 2 * p.q_stride_s, to.g_y += kCols * 2 * p.dout_stride_s;
    to.lse += kCols, to.g_sums += kSums, to.col += kCols, to.rows -= kCols;
    if (to.col < w.end) return to;
    const int back = w.steps * kCols;  // the next head
    to.g_x += (p.q_stride_h - back * p.q_stride_s) * 2;
    to.g_y += (p.dout_stride_h - back * p.dout_stride_s) * 2;
    to.lse += p.row_stride_h - back, to.g_sums += static_cast<i64>(p.dq_blocks - w.steps) * kSums;
    to.col -= back, to.rows += back, ++to.head;
    return to;
  }

  // Queries and dout of a step to a stage, both, or q as part 0 and dout as part 1.
  struct Source {
    const u8 *g_x, *g_y;
    int rows;
  };
  FM_DEVICE static Source source_of(const Place& at, bool wanted) {
    return {at.g_x, at.g_y, wanted ? at.rows : 0};
  }
  FM_DEVICE static void load_columns(const AttentionBwdParams& p, const Source& from, u32 s_step,
                                     u32 thread) {
    load_columns(p, from, s_step, thread, 0), load_columns(p, from, s_step, thread, 1);
  }
  FM_DEVICE static void load_columns(const AttentionBwdParams& p, const Source& from, u32 s_step, u32 thread,
                                     int part) {
    if (part == 0)
      load<TileColX>(thread, s_step, from.g_x, static_cast<u32>(p.q_stride_s), from.rows, p.head_dim);
    if (part != 1) return;
    load<TileColY>(thread, s_step + Smem::kColY, from.g_y, static_cast<u32>(p.dout_stride_s), from.rows,
                   p.head_dim_v);
    cp_async_commit_group();
  }
  template <class Tile>
  FM_DEVICE static void load(u32 thread, u32 s_tile, const u8* g_first, u32 stride_s, int rows, int columns) {
    constexpr int kPass = kThreads / Tile::kPanelChunks;  // rows that all threads fill at once
    static_assert(Tile::kRows % kPass == 0 && kPass % 8 == 0, "passes fill whole tiles and keep the swizzle");
    const u32 row = thread / Tile::kPanelChunks, chunk = thread % Tile::kPanelChunks;
    const u32 s_first = s_tile + Tile::offset(row, chunk);
    const int chunks = columns / Tile::kPerChunk - static_cast<int>(chunk);
#pragma unroll
    for (u32 pass = 0; pass < Tile::kRows; pass += kPass) {
      const u8* g_row = g_first + ((row + pass) * stride_s * 2 + chunk * 16);
#pragma unroll
      for (int panel = 0; panel < Tile::kPanels; ++panel)
        cp_async_cg_16(s_first + pass * Tile::kRowBytes + panel * Tile::kPanelBytes,
                       g_row + panel * Tile::kRowBytes,
                       static_cast<int>(row + pass) < rows && panel * Tile::kPanelChunks < chunks);
    }
  }

  // The statistics of a step come through registers, a query for each of the first threads.
  struct Row {
    float lse, delta;
  };
  FM_DEVICE static Row fetch_statistics(const AttentionBwdParams& p, const Place& at) {
    const int i = static_cast<int>(threadIdx.x);
    if (i >= kCols || i >= at.rows) return {infinity(), 0.f};
    return {p.row_lse[at.lse + i], p.row_delta[at.lse + i]};
  }
  // As the weights need them: in powers of 2, where scores do not change.
  FM_DEVICE static void put_statistics(u8* smem, const Row& row) {
    static_assert(kCols <= kThreads);
    auto& s = *reinterpret_cast<Statistics<kCols>*>(smem + Smem::kStatistics);
    const int i = static_cast<int>(threadIdx.x);
    if (i < kCols) s.lse[i] = Variant_::kScore ? row.lse : row.lse * kLog2e, s.delta[i] = row.delta;
  }

  FM_DEVICE static void complete(Task& w) {
    w.end = (w.first + w.steps) * kCols;
    // Weights of keys behind the end may be infinite, and the zeros in their place are factors of dq.
    const bool inside = w.row0 + kRows <= w.band.rows;
#pragma unroll
    for (int i = 0; i < kDownS; ++i) {
      const int row = w.row0 + i * GridS::kTileRows;
      w.whole[i] = {w.band.first(row + GridS::kTileRows - 1), inside ? w.band.last(row) - (kPiece - 1) : -1};
    }
  }

  // Leaves out scores of a warp's keys, of queries from `col` on: those that the band or the end does not
  // have.
  FM_DEVICE static void mask(const Task& w, Piece& r_s, u32 thread, int col) {
    const Whole whole = w.whole[thread / (32 * GridS::kAcross)];
    if (col < whole.first) mask_side<true>(w, r_s, thread, col);
    if (col > whole.last) mask_side<false>(w, r_s, thread, col);
  }
  template <bool kFirst>
  FM_DEVICE static void mask_side(const Task& w, Piece& r_s, u32 thread, int col) {
    const int left_of = col + 2 * static_cast<int>(thread % 4);
#pragma unroll
    for (int i = 0; i < 2 * GridS::kM; ++i) {
      const int row = w.row0 + GridS::row(thread) + i * 8 + static_cast<int>(thread % 32 / 4);
      const int side = kFirst ? w.band.first(row) : row < w.band.rows ? w.band.last(row) : -1;
#pragma unroll
      for (int n = 0; n < kPiece / 8; ++n)
#pragma unroll
        for (int e = 0; e < 2; ++e)
          if (kFirst ? 8 * n + e < side - left_of : 8 * n + e > side - left_of)
            r_s[i / 2][n][i % 2 * 2 + e] = -infinity();
    }
  }
  // Whether there are any.
  FM_DEVICE static bool cuts(const Task& w, u32 thread, int col) {
    const Whole whole = w.whole[thread / (32 * GridS::kAcross)];
    return col < whole.first || col > whole.last;
  }

  // The same by halves of the warps: `thread` of each makes S, or dP, which `second` has.
  template <class B, class F>
  FM_DEVICE static void make_apart(const AttentionBwdParams& p, const Task& w, u32 s_base, u32 s_x,
                                   const Statistics<kCols>& s_cols, const Place& at, u32 thread, bool second,
                                   int first, B&& beside, F&& use) {
    static_assert(kHeadDim == kHeadDimV && !Variant_::kScore);
    constexpr int kN = kPiece / 8;
    const int col = at.col + first, t = static_cast<int>(thread % 4);
    const float scale = p.softmax_scale * kLog2e;
    const bool cut = cuts(w, thread, col);
    float r_row[kN][2];
#pragma unroll
    for (int n = 0; n < kN; ++n)
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const int j = first + n * 8 + 2 * t + e;
        r_row[n][e] = second ? s_cols.delta[j] : s_cols.lse[j];
      }
    Piece r_s;
    clear_accumulator(r_s);
    lane_gemm<Element, kHeadDim / 16, (kPlan & kAheadS) != 0>(
        r_s, LaneRowsA<TileRowX>(thread, s_base + (second ? Smem::kRowY : Smem::kRowX), GridS::row(thread)),
        LaneRowsB<TileColX>(thread, s_x + (second ? Smem::kColY : 0), first), beside);
    const u32 s_weights = s_base + Smem::kWeights + thread / 32 * (GridS::kM * kN * 512) + thread % 32 * 16;
    if (!second) {
      if (cut) mask(w, r_s, thread, col);
      Base::each(r_s, [&](float& s, int, int n, int e, int, int) {
        s = exp2_approx(fmaf(s, scale, -r_row[n][e % 2]));
      });
      use(r_s);
#pragma unroll
      for (int i = 0; i < GridS::kM * kN; ++i) {
        const float (&x)[4] = r_s[i / kN][i % kN];
        st_shared_v4_b32(s_weights + i * 512, __float_as_uint(x[0]), __float_as_uint(x[1]),
                         __float_as_uint(x[2]), __float_as_uint(x[3]));
      }
    }
    __syncthreads();  // the weights are here for the other half
    if (!second) return;
#pragma unroll
    for (int i = 0; i < GridS::kM * kN; ++i) {
      u32 weight[4];
      ld_shared_v4_b32(weight, s_weights + i * 512);
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        float& ds = r_s[i / kN][i % kN][e];
        ds = __uint_as_float(weight[e]) * (ds - r_row[i % kN][e % 2]);
      }
    }
    store_scores(thread, s_base + Smem::kDs, r_s, first);
  }

  // P and dS of a warp's keys and of queries from `first` of a step on; dS goes to shared memory as well.
  // beside(k): what is done beside slice k of the first product. use(P): what needs P.
  template <class B, class F>
  FM_DEVICE static void make_scores(const AttentionBwdParams& p, const AttentionFwdParams& f, const Task& w,
                                    u32 s_base, u32 s_x, u32 s_y, const Statistics<kCols>& s_cols,
                                    const Place& at, u32 thread, int first, Piece& r_ds, B&& beside,
                                    F&& use) {
    constexpr bool kAhead = kPlan & kAheadS, kBeside = kPlan & kWeighBeside;
    constexpr int kTiles = GridS::kM * (kPiece / 8), kDepth = kHeadDimV / 16;
    // What lies in shared memory is read early.
    const int col = at.col + first, t = static_cast<int>(thread % 4);
    const float scale = p.softmax_scale * kLog2e;
    const bool cut = cuts(w, thread, col);
    float r_lse[kPiece / 8][2];
#pragma unroll
    for (int n = 0; n < kPiece / 8; ++n)
#pragma unroll
      for (int e = 0; e < 2; ++e) r_lse[n][e] = s_cols.lse[first + n * 8 + 2 * t + e];
    Piece r_p, r_slope;
    auto weigh = [&](int tile) {
      const int m = tile % GridS::kM, n = tile / GridS::kM;
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        float& s = r_p[m][n][e];
        const float lse = r_lse[n][e % 2];
        s = exp2_approx(Variant_::kScore ? (s - lse) * kLog2e : fmaf(s, scale, -lse));
      }
    };
    auto make_p = [&](auto&& with, bool weighs) {
      clear_accumulator(r_p);
      lane_gemm<Element, kHeadDim / 16, kAhead>(
          r_p, LaneRowsA<TileRowX>(thread, s_base + Smem::kRowX, GridS::row(thread)),
          LaneRowsB<TileColX>(thread, s_x, first), with);
      Base::change_products(f, w, at.head, r_p, r_slope, w.row0 + GridS::row(thread), col);
      if (cut) mask(w, r_p, thread, col);
      if (!weighs) return;
#pragma unroll
      for (int tile = 0; tile < kTiles; ++tile) weigh(tile);
      use(r_p);
    };
    auto make_dp = [&](auto&& with) {
      clear_accumulator(r_ds);
      lane_gemm<Element, kDepth, kAhead>(
          r_ds, LaneRowsA<TileRowY>(thread, s_base + Smem::kRowY, GridS::row(thread)),
          LaneRowsB<TileColY>(thread, s_y, first), with);
    };
    if ((kPlan & kStagger) && thread >= kThreads / 2) {
      make_dp(beside);
      make_p([](int) {}, true);
    } else {
      make_p(beside, !kBeside);
      make_dp([&](int k) {
        if constexpr (kBeside)
#pragma unroll
          for (int tile = 0; tile < kTiles; ++tile)
            if (tile * kDepth / kTiles == k) weigh(tile);
      });
      if constexpr (kBeside) use(r_p);
    }
    if constexpr (Variant_::kScore)
      Base::each(r_p, [&](float& weight, int m, int n, int e, int, int) { weight *= r_slope[m][n][e]; });
    Base::each(r_ds, [&](float& ds, int m, int n, int e, int, int) {
      const int j = n * 8 + 2 * t + e % 2;
      ds = r_p[m][n][e] * (ds - s_cols.delta[first + j]);
    });
    store_scores(thread, s_base + Smem::kDs, r_ds, first);
  }

  // A warp's rows of P or dS, from a column on.
  FM_DEVICE static void store_scores(u32 thread, u32 s_tile, const Piece& r_s, int col) {
    const int row = GridS::row(thread) + static_cast<int>(thread % 32 / 4);
    const LaneChunks<TileScores, kPiece / 8> to(s_tile + thread % 4 * 4, row, col / 8, 0);
#pragma unroll
    for (int i = 0; i < 2 * GridS::kM; ++i)
#pragma unroll
      for (int n = 0; n < kPiece / 8; ++n)
        st_shared_b32(to.at(n) + i * 8 * TileScores::kRowBytes,
                      pack2<Element>(r_s[i / 2][n][i % 2 * 2], r_s[i / 2][n][i % 2 * 2 + 1]));
  }

  // dq of a step's queries: products of dS and the keys, to the sums.
  FM_DEVICE static void add_queries(u32 s_base, const Place& at, u32 thread) {
    typename GridQ::Tile r_dq = {};
    lane_gemm<Element, kRows / 16, (kPlan & kAheadQ) != 0>(
        r_dq, LaneColsA<TileScores, 2 * GridQ::kM>(thread, s_base + Smem::kDs, GridQ::row(thread) / 8),
        LaneColsB<TileRowX, GridQ::kN>(thread, s_base + Smem::kRowX, GridQ::col(thread) / 8));
    float* g_sums = at.g_sums + (GridQ::col(thread) / 8 * 512 +
                                 (GridQ::row(thread) / 16 * 32 + static_cast<int>(thread % 32)) * 4);
#pragma unroll
    for (int m = 0; m < GridQ::kM; ++m)
#pragma unroll
      for (int n = 0; n < GridQ::kN; ++n) red_add_v4_f32(g_sums + m * 128 + n * 512, r_dq[m][n]);
  }
};

}  // namespace fm
