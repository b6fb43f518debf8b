// Instructions on registers, for which C++ has no words. The prelude stands on this file, so that it has no
// header of its own below it.
#pragma once

namespace fm {

// Shifts by 32 and more give 0.
__device__ __forceinline__ unsigned shl_b32(unsigned x, int n) {
  unsigned y;
  asm("shl.b32 %0, %1, %2;" : "=r"(y) : "r"(x), "r"(n));
  return y;
}

// threadIdx.x, read anew at every use.
__device__ __forceinline__ unsigned mov_tid_x() {
  unsigned index;
  asm volatile("mov.u32 %0, %%tid.x;" : "=r"(index));
  return index;
}

// No instruction: the compiler forgets how x came about, and keeps the one register.
__device__ __forceinline__ void keep_register(unsigned& x) { asm volatile("" : "+r"(x)); }
__device__ __forceinline__ void keep_register(const unsigned char*& x) { asm volatile("" : "+l"(x)); }
// No instruction: what memory holds is read again, not kept in registers.
__device__ __forceinline__ void keep_memory() { asm volatile("" ::: "memory"); }

// Two floats to two 16-bit values in a register, to nearest even.
__device__ __forceinline__ unsigned cvt_rn_bf16x2_f32(float high, float low) {
  unsigned packed;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
  return packed;
}
__device__ __forceinline__ unsigned cvt_rn_f16x2_f32(float high, float low) {
  unsigned packed;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
  return packed;
}
__device__ __forceinline__ float cvt_f32_f16(unsigned short bits) {
  float y;
  asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(bits));
  return y;
}

// From sm_90 on.
__device__ __forceinline__ unsigned mul_rn_bf16x2(unsigned a, unsigned b) {
  unsigned y;
  asm("mul.rn.bf16x2 %0, %1, %2;" : "=r"(y) : "r"(a), "r"(b));
  return y;
}
__device__ __forceinline__ float ex2_approx_ftz_f32(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
__device__ __forceinline__ float lg2_approx_ftz_f32(float x) {
  float y;
  asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
__device__ __forceinline__ float rcp_approx_ftz_f32(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

}  // namespace fm
