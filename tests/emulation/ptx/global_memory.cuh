// Emulation of cuda_src/ptx/global_memory.cuh.
#pragma once
#include "prelude.cuh"

namespace fm {

// Whoever asks again and again lets the others go on.
inline u32 ld_acquire_gpu_u32(const u32* g_pointer) {
  emu::poll();
  return *g_pointer;
}
inline u32 ld_relaxed_gpu_u32(const u32* g_pointer) {
  emu::poll();
  return *g_pointer;
}
inline void red_add_release_gpu_u32(u32* g_pointer, u32 x) { atomicAdd(g_pointer, x); }

inline void red_add_relaxed_gpu_u32(u32* g_pointer, u32 x) { atomicAdd(g_pointer, x); }
inline u32 atom_add_u32(u32* g_pointer, u32 x) { return atomicAdd(g_pointer, x); }
inline void red_add_v4_f32(float* g_pointer, const float (&x)[4]) {
  if (reinterpret_cast<u64>(g_pointer) % 16 != 0) emu::fail("a red of 16 bytes at %p", static_cast<void*>(g_pointer));
  for (int i = 0; i < 4; ++i) atomicAdd(g_pointer + i, x[i]);
}
inline void red_add_f32(float* g_pointer, float x) { atomicAdd(g_pointer, x); }

}  // namespace fm
