// Products of groups of rows with a matrix for each group, for every GPU from sm_80 on.
//
//   out[r] = act(x[row(r)] w[e]^T * weight(r) + bias[e])    for the rows r of group e
//
// w[e] has n rows of k values; with kGated twice as many, and act is of pairs (gate, up). Rows of a group lie
// together in out and are gathered from x where gather_indices says so, or lie in x as in out. Which rows a
// group has, only the device knows. k and n are multiples of 8. Overwrites the rows of out that belong to a
// group, touches no others. fp32 accumulation, one rounding at the end, one block from the first to the last
// k: the same bits in every run, and for a row whatever the other rows are.
//
// Blocks stay on their SM and take tiles in turn; a tile's steps along k travel through a ring of buffers
// (cp.async).
#pragma once
#include "moe/activation.cuh"
#include "moe/params.cuh"
#include "moe/schedule.cuh"
#include "ptx/cluster.cuh"
#include "tile/gemm.cuh"
#include "tile/smem.cuh"

namespace fm {

template <class Element_, int kBlockM_, int kBlockN_, int kStages_, bool kGated_>
struct GroupedGemmSm80 {
  using Element = Element_;
  static constexpr int kBlockM = kBlockM_, kBlockN = kBlockN_, kStages = kStages_;
  static constexpr bool kGated = kGated_;
  static constexpr int kBlockK = 128 / static_cast<int>(sizeof(Element));
  static constexpr int kWarpsM = kBlockM >= 64 ? 2 : 1, kWarpsN = 4 / kWarpsM, kThreads = 128;
  // Accumulator tiles of 16 x 8 that a warp has, in each half.
  static constexpr int kM = kBlockM / (16 * kWarpsM), kN = kBlockN / 2 / (8 * kWarpsN);
  static constexpr int kColumns = kGated ? kBlockN / 2 : kBlockN;                        // of out in a tile
  static_assert(kN % 2 == 0, "the products take two tiles of columns at once");
  static constexpr int kRowsAtOnce = kThreads / 8, kPasses = div_up(kBlockM, kRowsAtOnce);

  // The weights of a tile are two halves of rows: gate and up, or the first and the second half of the
  // columns.
  using TileX = SmemTile<Element, kBlockM, kBlockK>;
  using TileW = SmemTile<Element, kBlockN / 2, kBlockK>;
  using TileOut = SmemTile<Element, kBlockM, kColumns>;
  using TileBias = Bias<2 * kN, kGated>;
  struct Smem {
    static constexpr int kStage = TileX::kBytes + 2 * TileW::kBytes;
    static constexpr int kSorted = max_of(kStages * kStage, TileOut::kBytes),
                         kBytes = kSorted + 4 * GroupCursor<kBlockM>::kSortedBytes;
  };
  using Accumulator = float[kM][2 * kN][4];  // the first half of the weight rows, then the second

  template <class Params>  // GroupedGemmParams, or Clamped
  FM_DEVICE static void run(const Params& p) {
    start_after_last_grid();
    extern __shared__ __align__(128) u8 smem[];
    const u32 s_base = smem_address(smem);
    // Each warp finds the tiles by itself.
    int* s_sorted = reinterpret_cast<int*>(smem + Smem::kSorted) + warp_id() * 32;
    GroupCursor<kBlockM> cursor(s_sorted);
    GroupTile tile;
    for (u32 index = blockIdx.x; cursor.find(p, index, tile); index += gridDim.x) {
      __syncwarp();
      const u8* g_rows[kPasses];  // what this thread loads of x
#pragma unroll
      for (int i = 0; i < kPasses; ++i)
        g_rows[i] = row_of_x(p, tile, static_cast<int>(threadIdx.x) / 8 + i * kRowsAtOnce, s_sorted);
      Accumulator r_out = {};
      TileBias bias;
      const int col = tile.n_block * kColumns + warp_id() / kWarpsM * 8 * kN;
      bias.load(p, tile.group, col, col + kBlockN / 2);
      multiply(p, tile, g_rows, s_base, r_out);
      write(p, tile, s_base, bias, r_out);
    }
  }

  // Null: nothing is there.
  FM_DEVICE static const u8* row_of_x(const GroupedGemmParams& p, const GroupTile& tile, int row,
                                      const int* s_sorted) {
    i64 source = tile.row + row + static_cast<i64>(tile.group) * p.x_skip;
    if (p.gathers != 0) source = gathered_row(p, tile, row, s_sorted);
    if (row >= min(tile.rows, kBlockM) || source < 0) return nullptr;
    return reinterpret_cast<const u8*>(static_cast<const Element*>(p.x) + source * p.x_stride);
  }

  FM_DEVICE static void multiply(const GroupedGemmParams& p, const GroupTile& tile,
                                 const u8* const (&g_rows)[kPasses], u32 s_base, Accumulator& r_out) {
    const int steps = div_up(p.k, kBlockK);
    const int warp_m = warp_id() % kWarpsM * 16 * kM, warp_n = warp_id() / kWarpsM * 8 * kN;
#pragma unroll
    for (int s = 0; s < kStages - 1; ++s) load_step(p, tile, g_rows, s_base + s * Smem::kStage, s, steps);
    int stage = 0;
#pragma unroll 1
    for (int s = 0; s < steps; ++s) {
      cp_async_wait_group<kStages - 2>();
      __syncthreads();  // step s is here for all, and nobody reads the buffer of step s - 1 any more
      const int ahead = stage == 0 ? kStages - 1 : stage - 1;
      load_step(p, tile, g_rows, s_base + ahead * Smem::kStage, s + kStages - 1, steps);
      const u32 s_x = s_base + stage * Smem::kStage, s_w = s_x + TileX::kBytes + warp_n * TileW::kRowBytes;
      gemm_ss_nt_step<Element, TileX, TileW, 0, kN>(r_out, s_x, warp_m, s_w);
      gemm_ss_nt_step<Element, TileX, TileW, kN, kN>(r_out, s_x, warp_m, s_w + TileW::kBytes);
      stage = stage == kStages - 1 ? 0 : stage + 1;
    }
    cp_async_wait_group<0>();
    __syncthreads();  // the buffers are free, for the output or the next tile
  }

  // One commit group for each step, also behind the last.
  FM_DEVICE static void load_step(const GroupedGemmParams& p, const GroupTile& tile,
                                  const u8* const (&g_rows)[kPasses], u32 s_stage, int step, int steps) {
    if (step < steps) {
      const int chunks = (p.k - step * kBlockK) / TileX::kPerChunk,
                column = static_cast<int>(threadIdx.x) % 8;
#pragma unroll
      for (int i = 0; i < kPasses; ++i) {
        const int row = static_cast<int>(threadIdx.x) / 8 + i * kRowsAtOnce;
        if (kBlockM % kRowsAtOnce != 0 && row >= kBlockM) break;
        const bool valid = g_rows[i] != nullptr && column < chunks;
        const u8* g_pointer = valid ? g_rows[i] + step * 128 + column * 16 : static_cast<const u8*>(p.x);
        if (p.aligned) cp_async_cg_16(s_stage + TileX::offset(row, column), g_pointer, valid);
        else
          copy_chunk_unaligned(s_stage + TileX::offset(row, column),
                               reinterpret_cast<const Element*>(g_pointer), valid);
      }
      const int col = tile.n_block * kColumns;
      const Element* g_w =
          static_cast<const Element*>(p.w) + tile.group * p.w_stride_e + col * p.w_stride_n + step * kBlockK;
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const i64 skip = kGated ? half * p.w_stride_half : half * (kBlockN / 2) * p.w_stride_n;
        const int rows = p.n - col - (kGated ? 0 : half * (kBlockN / 2));
        load_tile<TileW, kThreads, false>(s_stage + TileX::kBytes + half * TileW::kBytes, g_w + skip,
                                          p.w_stride_n, rows, chunks, p.aligned != 0);
      }
    }
    cp_async_commit_group();
  }

  template <class Params>
  FM_DEVICE static void write(const Params& p, const GroupTile& tile, u32 s_base, const TileBias& bias,
                              Accumulator& r_out) {
    const int warp_m = warp_id() % kWarpsM * 16 * kM, warp_n = warp_id() / kWarpsM * 8 * kN;
    const int col = tile.n_block * kColumns, rows = min(tile.rows, kBlockM);
#pragma unroll
    for (int m = 0; m < kM; ++m) {
      scale_by_row_weights(p, tile.row + warp_m + m * 16, rows - warp_m - m * 16, r_out[m]);
      bias.add_to(p, r_out[m]);
      if constexpr (kGated) activate_gated(p, r_out[m]);
      else activate(p, r_out[m]);
    }
    float one[2 * kM];
#pragma unroll
    for (int i = 0; i < 2 * kM; ++i) one[i] = 1.f;
    store_accumulator<Element, TileOut, 0, kN>(s_base, warp_m, r_out, one, warp_n);
    if constexpr (!kGated)
      store_accumulator<Element, TileOut, kN, kN>(s_base, warp_m, r_out, one, kBlockN / 2 + warp_n);
    __syncthreads();
    constexpr int kShare = kBlockM / 4;  // rows that a warp writes
    Element* g_out = static_cast<Element*>(p.out) + static_cast<i64>(tile.row) * p.out_stride + col;
    store_rows<TileOut, kShare, false>([&](int row) { return g_out + row * p.out_stride; }, s_base,
                                       warp_id() * kShare, rows, (p.n - col) / TileOut::kPerChunk,
                                       p.aligned != 0);
    __syncthreads();  // the next tile loads where the output was
  }
};

}  // namespace fm
