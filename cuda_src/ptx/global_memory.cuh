// Loads and atomics of global memory that need more than C++ says: orders between blocks.
#pragma once
#include "prelude.cuh"

namespace fm {

// What the writer did before its release is seen by who acquires the value, in any block.
FM_DEVICE u32 ld_acquire_gpu_u32(const u32* g_pointer) {
  u32 x;
  asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(x) : "l"(g_pointer) : "memory");
  return x;
}
// What other blocks have written, without any order of what lies around it.
FM_DEVICE u32 ld_relaxed_gpu_u32(const u32* g_pointer) {
  u32 x;
  asm volatile("ld.relaxed.gpu.global.u32 %0, [%1];" : "=r"(x) : "l"(g_pointer) : "memory");
  return x;
}
FM_DEVICE void red_add_release_gpu_u32(u32* g_pointer, u32 x) {
  asm volatile("red.add.release.gpu.global.u32 [%0], %1;" ::"l"(g_pointer), "r"(x) : "memory");
}

// Atomics without an order.
FM_DEVICE void red_add_relaxed_gpu_u32(u32* g_pointer, u32 x) {
  asm volatile("red.add.relaxed.gpu.global.u32 [%0], %1;" ::"l"(g_pointer), "r"(x) : "memory");
}
FM_DEVICE u32 atom_add_u32(u32* g_pointer, u32 x) {
  u32 before;
  asm volatile("atom.add.relaxed.gpu.global.u32 %0, [%1], %2;"
               : "=r"(before)
               : "l"(g_pointer), "r"(x)
               : "memory");
  return before;
}
// Four neighbours at a multiple of 16 bytes, each added by itself.
FM_DEVICE void red_add_v4_f32(float* g_pointer, const float (&x)[4]) {
#if __CUDA_ARCH__ >= 900
  asm volatile("red.relaxed.gpu.global.add.v4.f32 [%0], {%1, %2, %3, %4};" ::"l"(g_pointer), "f"(x[0]), "f"(x[1]),
               "f"(x[2]), "f"(x[3])
               : "memory");
#else
#pragma unroll
  for (int i = 0; i < 4; ++i)
    asm volatile("red.relaxed.gpu.global.add.f32 [%0], %1;" ::"l"(g_pointer + i), "f"(x[i]) : "memory");
#endif
}
// For sums of gradients that several blocks add to; no kernel uses it yet.
FM_DEVICE void red_add_f32(float* g_pointer, float x) {
  asm volatile("red.add.relaxed.gpu.global.f32 [%0], %1;" ::"l"(g_pointer), "f"(x) : "memory");
}

}  // namespace fm
