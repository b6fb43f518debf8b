// Loads, stores and atomics of global memory that need more than C++ says: cache hints, and orders between blocks.
#pragma once
#include "prelude.cuh"

namespace fm {

// 16 bytes that nobody writes while the kernel runs, and that are not read again: they do not stay in L1.
FM_DEVICE void ld_global_nc_no_allocate_v4_b32(u32 (&r)[4], const void* g_pointer) {
  asm volatile("ld.global.nc.L1::no_allocate.v4.b32 {%0,%1,%2,%3}, [%4];" : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "l"(g_pointer));
}

FM_DEVICE void st_global_v4_b32(void* g_pointer, u32 x, u32 y, u32 z, u32 w) {
  asm volatile("st.global.v4.b32 [%0], {%1,%2,%3,%4};" ::"l"(g_pointer), "r"(x), "r"(y), "r"(z), "r"(w) : "memory");
}

// What the writer did before its release is seen by who acquires the value, in any block.
FM_DEVICE u32 ld_acquire_gpu_u32(const u32* g_pointer) {
  u32 x;
  asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(x) : "l"(g_pointer) : "memory");
  return x;
}
FM_DEVICE void st_release_gpu_u32(u32* g_pointer, u32 x) {
  asm volatile("st.release.gpu.global.u32 [%0], %1;" ::"l"(g_pointer), "r"(x) : "memory");
}
FM_DEVICE u32 atom_add_acq_rel_gpu_u32(u32* g_pointer, u32 x) {
  u32 before;
  asm volatile("atom.add.acq_rel.gpu.global.u32 %0, [%1], %2;" : "=r"(before) : "l"(g_pointer), "r"(x) : "memory");
  return before;
}
FM_DEVICE void red_add_release_gpu_u32(u32* g_pointer, u32 x) {
  asm volatile("red.add.release.gpu.global.u32 [%0], %1;" ::"l"(g_pointer), "r"(x) : "memory");
}

// Atomics without an order.
FM_DEVICE u32 atom_add_u32(u32* g_pointer, u32 x) {
  u32 before;
  asm volatile("atom.add.relaxed.gpu.global.u32 %0, [%1], %2;" : "=r"(before) : "l"(g_pointer), "r"(x) : "memory");
  return before;
}
FM_DEVICE void red_add_u32(u32* g_pointer, u32 x) {
  asm volatile("red.add.relaxed.gpu.global.u32 [%0], %1;" ::"l"(g_pointer), "r"(x) : "memory");
}
FM_DEVICE void red_add_f32(float* g_pointer, float x) {
  asm volatile("red.add.relaxed.gpu.global.f32 [%0], %1;" ::"l"(g_pointer), "f"(x) : "memory");
}

}  // namespace fm
