// Emulation of cuda_src/ptx/ldmatrix.cuh.
#pragma once
#include "prelude.cuh"

namespace fm {

struct MatrixItem {
  u32 address;
  u32* r;
  const u32* stored;
};

inline void ldmatrix_x4(u32 (&r)[4], u32 address) {
  MatrixItem item{address, r, nullptr};
  emu::together("ldmatrix.x4", emu::kAllLanes, &item, [](void* const* items, u32) {
    for (int row = 0; row < 32; ++row) {
      const u8* values = static_cast<const u8*>(emu::shared_read(static_cast<MatrixItem*>(items[row])->address, 16));
      for (int t = 0; t < 4; ++t) __builtin_memcpy(&static_cast<MatrixItem*>(items[row % 8 * 4 + t])->r[row / 8], values + 4 * t, 4);
    }
  });
}

inline void ldmatrix_x4_trans(u32 (&r)[4], u32 address) {
  MatrixItem item{address, r, nullptr};
  emu::together("ldmatrix.x4.trans", emu::kAllLanes, &item, [](void* const* items, u32) {
    for (int row = 0; row < 32; ++row) {
      const u16* values = static_cast<const u16*>(emu::shared_read(static_cast<MatrixItem*>(items[row])->address, 16));
      for (int column = 0; column < 8; ++column) {
        u32& r = static_cast<MatrixItem*>(items[column * 4 + row % 8 / 2])->r[row / 8];
        r = row & 1 ? (r & 0xffffu) | static_cast<u32>(values[column]) << 16 : (r & 0xffff0000u) | values[column];
      }
    }
  });
}

inline void stmatrix_x4(u32 address, const u32 (&r)[4]) {
  MatrixItem item{address, nullptr, r};
  emu::together("stmatrix.x4", emu::kAllLanes, &item, [](void* const* items, u32) {
    for (int row = 0; row < 32; ++row) {
      u8* values = static_cast<u8*>(emu::shared_write(static_cast<MatrixItem*>(items[row])->address, 16));
      for (int t = 0; t < 4; ++t) __builtin_memcpy(values + 4 * t, &static_cast<MatrixItem*>(items[row % 8 * 4 + t])->stored[row / 8], 4);
    }
  });
}

}  // namespace fm
