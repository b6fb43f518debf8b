// Accumulators to global memory.
#pragma once
#include "ptx/ldmatrix.cuh"
#include "ptx/tma.cuh"
#include "tile/smem.cuh"

namespace fm {

// Where one warp writes its rows of a matrix.
template <class E>
struct RowsOut {
  const TensorMap* map;  // (columns, heads, rows, batch): boxes of 64 columns by 16 rows of tiles
  E* g_rows;             // the warp's first row at the first column; (col, head, row, batch) in the map
  i64 stride_row, stride_head;
  int rows, cols;        // rows and columns that exist from there on
  int col, head, row, batch;
  // 2^pack_bits heads lie side by side: row r of a tile is row r >> pack_bits of head r % 2^pack_bits.
  int pack_bits;

  // Where row r of a tile is in an array with such strides.
  FM_DEVICE i64 offset(int r, i64 row_stride, i64 head_stride) const {
    return (r >> pack_bits) * row_stride + (r & ((1 << pack_bits) - 1)) * head_stride;
  }
};

// Shared memory through which one warp writes: two panels of 16 rows x 64 values of 16 bits.
enum : int { kStagedBytes = 2 * 16 * 64 * 2 };

// One warp writes its 16 x (8 kN) accumulator (or the first kTiles tiles of 8 columns), scaled per row, as
// 16-bit values, two panels of 64 columns at a time, through kStagedBytes of its own at s_panels (a multiple
// of 1024). The copy engine stores whole tiles; the last rows of a sequence, behind which another one may
// begin, and tiles that are no whole panels go by ordinary stores. One fence for two panels: it waits for all
// that the warp has under way.
template <int kTiles = 0, int kN, class E>
FM_DEVICE void store_accumulator_rows(const RowsOut<E>& to, u32 s_panels, const float (&d)[kN][4],
                                      const float (&row_scale)[2]) {
  using Panel = SmemTile<E, 16, 64>;
  static_assert(sizeof(E) == 2);
  constexpr int kUsed = kTiles == 0 ? kN : kTiles, kPanels = div_up(kUsed, 8);
  constexpr bool kWhole = kUsed % 8 == 0;
  const int lane = lane_id();
  const int row = (lane >> 3 & 1) * 8 + (lane & 7), chunk = lane >> 4;
#pragma unroll
  for (int first = 0; first < kPanels; first += 2) {
    if (lane == 0) bulk_wait_group_read<0>();
    __syncwarp();
#pragma unroll
    for (int n = first * 8; n < min_of(kUsed, first * 8 + 16); n += 2) {
      const u32 r[4] = {pack2<E>(d[n][0] * row_scale[0], d[n][1] * row_scale[0]),
                        pack2<E>(d[n][2] * row_scale[1], d[n][3] * row_scale[1]),
                        pack2<E>(d[n + 1][0] * row_scale[0], d[n + 1][1] * row_scale[0]),
                        pack2<E>(d[n + 1][2] * row_scale[1], d[n + 1][3] * row_scale[1])};
      stmatrix_x4(s_panels + (n / 8 & 1) * Panel::kBytes + Panel::offset(row, n % 8 + chunk), r);
    }
    if (kWhole && to.rows >= 16) {
      fence_proxy_async();
      __syncwarp();
      if (lane == 0) {
#pragma unroll
        for (int panel = first; panel < min_of(kPanels, first + 2); ++panel)
          tma_store_4d(*to.map, s_panels + (panel & 1) * Panel::kBytes, to.col + panel * 64, to.head, to.row,
                       to.batch);
        bulk_commit_group();
      }
    } else {
      __syncwarp();
#pragma unroll 1  // or the addresses of all rows need registers
      for (int row = 0; row < (kWhole ? to.rows : min(to.rows, 16)); row += 4)
#pragma unroll
        for (int panel = first; panel < min_of(kPanels, first + 2); ++panel)
          store_rows<Panel, 4, true>(
              [&](int r) { return to.g_rows + to.offset(r, to.stride_row, to.stride_head) + panel * 64; },
              s_panels + (panel & 1) * Panel::kBytes, row, to.rows,
              (kWhole ? to.cols / 8 : min(to.cols / 8, kUsed)) - panel * 8, true);
      __syncwarp();
    }
  }
}

// Four values of each lane of a quad, transposed: lane t gets value t of lanes 0 to 3.
FM_DEVICE void transpose_quad(u32 (&r)[4]) {
  const bool odd = lane_id() & 1, high = lane_id() & 2;
  auto exchange = [](u32& keep, u32& send, bool swap, int lanes) {
    const u32 mine = swap ? keep : send, theirs = __shfl_xor_sync(0xffffffffu, mine, lanes);
    if (swap) keep = theirs;
    else send = theirs;
  };
  exchange(r[0], r[1], odd, 1), exchange(r[2], r[3], odd, 1);
  exchange(r[0], r[2], high, 2), exchange(r[1], r[3], high, 2);
}

// The same without shared memory, for kernels that have no room to spare: a quad trades its values so that
// each lane stores 16 bytes. Nothing else runs beside the trades.
template <int kN, class E>
FM_DEVICE void store_accumulator_directly(const RowsOut<E>& to, const float (&d)[kN][4],
                                          const float (&row_scale)[2]) {
  static_assert(sizeof(E) == 2 && kN % 4 == 0);
  const int t = lane_id() & 3;
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const int row = i * 8 + (lane_id() >> 2);
    E* g_row = to.g_rows + to.offset(row, to.stride_row, to.stride_head);
#pragma unroll
    for (int n = 0; n < kN; n += 4) {
      u32 r[4];
#pragma unroll
      for (int j = 0; j < 4; ++j)
        r[j] = pack2<E>(d[n + j][2 * i] * row_scale[i], d[n + j][2 * i + 1] * row_scale[i]);
      transpose_quad(r);
      if (row < to.rows && (n + t) * 8 < to.cols)
        *reinterpret_cast<uint4*>(g_row + (n + t) * 8) = make_uint4(r[0], r[1], r[2], r[3]);
    }
  }
}

}  // namespace fm
