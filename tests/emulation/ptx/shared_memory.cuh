// Emulation of cuda_src/ptx/shared_memory.cuh.
#pragma once
#include "prelude.cuh"

namespace fm {

inline u32 ld_shared_b32(u32 s_address) {
  u32 x;
  __builtin_memcpy(&x, emu::shared_read(s_address, 4), 4);
  return x;
}
inline void ld_shared_v2_f32(float& x, float& y, u32 s_address) {
  float both[2];
  __builtin_memcpy(both, emu::shared_read(s_address, 8), 8);
  x = both[0], y = both[1];
}

inline void ld_shared_v4_b32(u32 (&r)[4], u32 s_address) { __builtin_memcpy(r, emu::shared_read(s_address, 16), 16); }
inline void st_shared_b32(u32 s_address, u32 x) { __builtin_memcpy(emu::shared_write(s_address, 4), &x, 4); }
inline void st_shared_v2_f32(u32 s_address, float x, float y) {
  const float r[2] = {x, y};
  __builtin_memcpy(emu::shared_write(s_address, 8), r, 8);
}
inline void st_shared_v4_b32(u32 s_address, u32 x, u32 y, u32 z, u32 w) {
  const u32 r[4] = {x, y, z, w};
  __builtin_memcpy(emu::shared_write(s_address, 16), r, 16);
}

}  // namespace fm
