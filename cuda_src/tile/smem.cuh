// A tile of rows in shared memory, made of 16-byte chunks: how it is laid out, filled from global memory and
// written back. Columns are cut into panels of 128 (or 64) bytes; inside a panel the chunk index is XORed
// with the row, so that the eight rows that ldmatrix or a store touches at once lie in eight different groups
// of banks.
#pragma once
#include "ptx/cp_async.cuh"
#include "ptx/shared_memory.cuh"

namespace fm {

template <class E, int kRows_, int kCols_>
struct SmemTile {
  static constexpr int kRows = kRows_, kCols = kCols_;
  static constexpr int kPerChunk = 16 / static_cast<int>(sizeof(E));
  static constexpr int kChunks = kCols / kPerChunk;
  static constexpr int kPanelChunks = kChunks % 8 == 0 ? 8 : 4;
  static constexpr int kPanels = kChunks / kPanelChunks;
  static constexpr int kRowBytes = kPanelChunks * 16;
  static constexpr int kPanelBytes = kRows * kRowBytes;
  static constexpr int kBytes = kPanels * kPanelBytes;
  static_assert(kChunks % 4 == 0 && kRows % 8 == 0, "a tile is whole panels and whole swizzle periods");

  FM_DEVICE static int swizzle(int row) { return kPanelChunks == 8 ? row & 7 : (row >> 1) & 3; }

  FM_DEVICE static u32 offset(int row, int chunk) {
    const int panel = chunk / kPanelChunks, in_panel = chunk % kPanelChunks;
    return static_cast<u32>(panel * kPanelBytes + row * kRowBytes + ((in_panel ^ swizzle(row)) << 4));
  }
};

// One chunk by single elements, for rows that do not start at a multiple of 16 bytes.
template <class E>
FM_DEVICE void copy_chunk_unaligned(u32 s_address, const E* g_pointer, bool valid) {
  u32 word[4] = {0, 0, 0, 0};
  if (valid) {
    if constexpr (sizeof(E) == 4) {
#pragma unroll
      for (int i = 0; i < 4; ++i) word[i] = reinterpret_cast<const u32*>(g_pointer)[i];
    } else {
      const u16* half = reinterpret_cast<const u16*>(g_pointer);
#pragma unroll
      for (int i = 0; i < 4; ++i) word[i] = half[2 * i] | static_cast<u32>(half[2 * i + 1]) << 16;
    }
  }
  st_shared_v4_b32(s_address, word[0], word[1], word[2], word[3]);
}

// Starts the copy of `rows` rows of `chunks` chunks; what lies outside becomes zero. kAligned promises rows
// at multiples of 16 bytes and tiles that span less than 4 GiB, so that a thread keeps 32-bit offsets from a
// base that the whole block shares.
template <class Tile, int kThreads, bool kAligned, class E>
FM_DEVICE void load_tile(u32 s_base, const E* g_base, i64 row_stride, int rows, int chunks, bool aligned) {
  using Offset = decltype(pick<kAligned>(u32{}, i64{}));
  constexpr int kPass = kThreads / Tile::kPanelChunks;  // rows that all threads fill at once
  static_assert(Tile::kRows % kPass == 0 || kPass > Tile::kRows, "passes fill whole tiles");
  const int thread = thread_index();
  const int column = thread % Tile::kPanelChunks, first_row = thread / Tile::kPanelChunks;
  if (kPass > Tile::kRows && first_row >= Tile::kRows) return;
  const Offset stride = static_cast<Offset>(row_stride) * static_cast<int>(sizeof(E));
  Offset offset = first_row * stride + column * 16;
  const u32 s_thread = s_base + Tile::offset(first_row, column);
#pragma unroll
  for (int pass = 0; pass < div_up(Tile::kRows, kPass); ++pass, offset += kPass * stride) {
    const bool row_ok = first_row + pass * kPass < rows;
#pragma unroll
    for (int panel = 0; panel < Tile::kPanels; ++panel) {
      const bool valid = row_ok && panel * Tile::kPanelChunks + column < chunks;
      // kPass is a multiple of the swizzle period, so a pass moves the address by whole rows.
      const u32 s_address = s_thread + pass * kPass * Tile::kRowBytes + panel * Tile::kPanelBytes;
      // Not read where it is not valid.
      const u8* g_pointer = reinterpret_cast<const u8*>(g_base) + offset + panel * Tile::kRowBytes;
      if (kAligned || aligned) {
        cp_async_cg_16(s_address, g_pointer, valid);
      } else {
        copy_chunk_unaligned(s_address, reinterpret_cast<const E*>(g_pointer), valid);
      }
    }
  }
  static_assert(kPass % 8 == 0, "a pass must keep the swizzle");
}

// One warp writes kRows rows, from `first_row` of the tile on, to global memory, where g_row(row) is; only
// `rows` rows of `chunks` chunks exist there.
template <class Tile, int kRows, bool kAligned, class F>
FM_DEVICE void store_rows(F&& g_row, u32 s_base, int first_row, int rows, int chunks, bool aligned) {
  constexpr int kPass = 32 / Tile::kPanelChunks;
  const int column = lane_id() % Tile::kPanelChunks;
#pragma unroll
  for (int pass = 0; pass < kRows / kPass; ++pass) {
    const int row = first_row + pass * kPass + lane_id() / Tile::kPanelChunks;
#pragma unroll
    for (int panel = 0; panel < Tile::kPanels; ++panel) {
      const int chunk = panel * Tile::kPanelChunks + column;
      u32 word[4];
      ld_shared_v4_b32(word, s_base + Tile::offset(row, chunk));
      if (row >= rows || chunk >= chunks) continue;
      auto* g_pointer = g_row(row) + chunk * Tile::kPerChunk;
      if (kAligned || aligned) {
        *reinterpret_cast<uint4*>(g_pointer) = make_uint4(word[0], word[1], word[2], word[3]);
      } else if constexpr (sizeof(*g_pointer) == 4) {
#pragma unroll
        for (int i = 0; i < 4; ++i) reinterpret_cast<u32*>(g_pointer)[i] = word[i];
      } else {
#pragma unroll
        for (int i = 0; i < 8; ++i)
          reinterpret_cast<u16*>(g_pointer)[i] = static_cast<u16>(word[i / 2] >> (i % 2 * 16));
      }
    }
  }
}

}  // namespace fm
