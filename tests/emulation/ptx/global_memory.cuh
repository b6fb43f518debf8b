// Emulation of cuda_src/ptx/global_memory.cuh.
#pragma once
#include "prelude.cuh"

namespace fm {

inline const void* aligned_to_16(const void* g_pointer) {
  if (reinterpret_cast<u64>(g_pointer) % 16 != 0) emu::fail("16 bytes of global memory at %p, which is no multiple of 16", g_pointer);
  return g_pointer;
}
inline void ld_global_nc_no_allocate_v4_b32(u32 (&r)[4], const void* g_pointer) { __builtin_memcpy(r, aligned_to_16(g_pointer), 16); }
inline void st_global_v4_b32(void* g_pointer, u32 x, u32 y, u32 z, u32 w) {
  const u32 r[4] = {x, y, z, w};
  aligned_to_16(g_pointer);
  __builtin_memcpy(g_pointer, r, 16);
}

// Whoever asks again and again lets the others go on.
inline u32 ld_acquire_gpu_u32(const u32* g_pointer) {
  emu::poll();
  return *g_pointer;
}
inline void st_release_gpu_u32(u32* g_pointer, u32 x) { *g_pointer = x, emu::may_pause(); }
inline u32 atom_add_acq_rel_gpu_u32(u32* g_pointer, u32 x) { return atomicAdd(g_pointer, x); }
inline void red_add_release_gpu_u32(u32* g_pointer, u32 x) { atomicAdd(g_pointer, x); }

inline u32 atom_add_u32(u32* g_pointer, u32 x) { return atomicAdd(g_pointer, x); }
inline void red_add_u32(u32* g_pointer, u32 x) { atomicAdd(g_pointer, x); }
inline void red_add_f32(float* g_pointer, float x) { atomicAdd(g_pointer, x); }

}  // namespace fm
