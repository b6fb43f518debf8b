// Loads and stores of shared memory by its 32-bit addresses.
#pragma once
#include "prelude.cuh"

namespace fm {

FM_DEVICE u32 ld_shared_b32(u32 s_address) {
  u32 x;
  asm volatile("ld.shared.b32 %0, [%1];" : "=r"(x) : "r"(s_address) : "memory");
  return x;
}

FM_DEVICE void ld_shared_v2_f32(float& x, float& y, u32 s_address) {
  asm volatile("ld.shared.v2.f32 {%0,%1}, [%2];" : "=f"(x), "=f"(y) : "r"(s_address) : "memory");
}

FM_DEVICE void ld_shared_v4_b32(u32 (&r)[4], u32 s_address) {
  asm volatile("ld.shared.v4.b32 {%0,%1,%2,%3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(s_address)
               : "memory");
}

FM_DEVICE void st_shared_b32(u32 s_address, u32 x) {
  asm volatile("st.shared.b32 [%0], %1;" ::"r"(s_address), "r"(x) : "memory");
}

FM_DEVICE void st_shared_v2_f32(u32 s_address, float x, float y) {
  asm volatile("st.shared.v2.f32 [%0], {%1,%2};" ::"r"(s_address), "f"(x), "f"(y) : "memory");
}

FM_DEVICE void st_shared_v4_b32(u32 s_address, u32 x, u32 y, u32 z, u32 w) {
  asm volatile("st.shared.v4.b32 [%0], {%1,%2,%3,%4};" ::"r"(s_address), "r"(x), "r"(y), "r"(z), "r"(w)
               : "memory");
}

}  // namespace fm
