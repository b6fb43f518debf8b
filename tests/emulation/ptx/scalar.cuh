// Emulation of cuda_src/ptx/scalar.cuh.
#pragma once

namespace fm {

inline unsigned shl_b32(unsigned x, int n) { return static_cast<unsigned>(n) > 31 ? 0 : x << n; }
inline unsigned mov_tid_x() { return threadIdx.x; }
inline void keep_register(unsigned&) {}
inline void keep_register(const unsigned char*&) {}
inline void keep_memory() {}

inline unsigned cvt_rn_bf16x2_f32(float high, float low) {
  return static_cast<unsigned>(emu::float_to_bfloat(high)) << 16 | emu::float_to_bfloat(low);
}
inline unsigned cvt_rn_f16x2_f32(float high, float low) {
  return static_cast<unsigned>(emu::float_to_half(high)) << 16 | emu::float_to_half(low);
}
inline float cvt_f32_f16(unsigned short bits) { return emu::half_to_float(bits); }

inline unsigned mul_rn_bf16x2(unsigned a, unsigned b) {
  const auto one = [](unsigned x, unsigned y) { return emu::float_to_bfloat(__uint_as_float(x << 16) * __uint_as_float(y << 16)); };
  return static_cast<unsigned>(one(a >> 16, b >> 16)) << 16 | one(a, b);
}

// .ftz: denormals count as zeros, on both sides.
inline float flush(float x) { return fabsf(x) < 1.17549435e-38f ? copysignf(0.f, x) : x; }
inline float ex2_approx_ftz_f32(float x) { return flush(exp2f(flush(x))); }
inline float lg2_approx_ftz_f32(float x) { return flush(log2f(flush(x))); }
inline float rcp_approx_ftz_f32(float x) { return flush(1.f / flush(x)); }

}  // namespace fm
