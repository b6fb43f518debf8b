// What every other header stands on: integer names, the three element types, limits of the hardware, small
// constexpr helpers. No toolkit header.
#pragma once
#include "ptx/scalar.cuh"

#define FM_DEVICE __device__ __forceinline__

namespace fm {

using u8 = unsigned char;
using u16 = unsigned short;
using u32 = unsigned int;
using u64 = unsigned long long;
using i64 = long long;

struct bf16 {
  u16 bits;
};
struct fp16 {
  u16 bits;
};
using fp32 = float;

// CUtensorMap: what the host tells the copy engine about a tensor. Nothing here looks inside.
struct alignas(128) TensorMap {
  u64 opaque[16];
};

// What a Hopper SM gives to one block (CUDA C programming guide, table of the compute capabilities). An enum,
// as most constants that are new here: constexpr variables stand in every cubin.
enum HopperLimits : int {
  kMaxSmemBytes = 227 * 1024,
  kNamedBarriers = 16  // 0 is __syncthreads
};
// Registers that a launch has for one thread of each of its warpgroups, all together. A thread gets them in
// eights; who asks for more by setmaxnreg waits for ever.
constexpr int launch_registers(int warpgroups) { return 65536 / (128 * warpgroups) / 8 * 8 * warpgroups; }

template <class A, class B>
constexpr bool is_same = false;
template <class A>
constexpr bool is_same<A, A> = true;

// A bool as a type, for generic lambdas.
template <bool k>
struct Bool {
  static constexpr bool value = k;
};

// The first or the second argument, which may differ in type.
template <bool kFirst, class A, class B>
constexpr auto pick(A a, B b) {
  if constexpr (kFirst) return a;
  else return b;
}

constexpr int max_of(int a, int b) { return a > b ? a : b; }
constexpr int min_of(int a, int b) { return a < b ? a : b; }
constexpr int div_up(int a, int b) { return (a + b - 1) / b; }

// x << n for n from 0 on; 32 and more give 0 (in C++ they would be undefined).
FM_DEVICE u32 shift_left(u32 x, int n) { return shl_b32(x, n); }

FM_DEVICE float infinity() { return __int_as_float(0x7f800000); }

// threadIdx.x, read anew at every use: what follows from it is then computed where it is needed instead of
// kept in registers.
FM_DEVICE int thread_index() { return static_cast<int>(mov_tid_x() & 1023); }
FM_DEVICE int lane_id() { return static_cast<int>(threadIdx.x) & 31; }
// Tells the compiler that a value is the same in the whole warp.
FM_DEVICE int uniform(int x) { return __shfl_sync(0xffffffffu, x, 0); }
FM_DEVICE int warp_id() { return uniform(static_cast<int>(threadIdx.x) >> 5); }

// Shared memory is addressed by 32-bit offsets, as ldmatrix, cp.async and mbarrier want it.
FM_DEVICE u32 smem_address(const void* pointer) {
  return static_cast<u32>(__cvta_generic_to_shared(pointer));
}

// Two floats to one register of two 16-bit values, first argument in the low half; rounds to nearest even.
template <class E>
FM_DEVICE u32 pack2(float low, float high) {
  if constexpr (is_same<E, bf16>) return cvt_rn_bf16x2_f32(high, low);
  else return cvt_rn_f16x2_f32(high, low);
}

FM_DEVICE float to_float(bf16 x) { return __int_as_float(static_cast<int>(x.bits) << 16); }
FM_DEVICE float to_float(fp16 x) { return cvt_f32_f16(x.bits); }
FM_DEVICE float to_float(fp32 x) { return x; }

// The two 16-bit values of a register.
template <class E>
FM_DEVICE float low_of(u32 x) {
  if constexpr (is_same<E, bf16>) return __int_as_float(static_cast<int>(x << 16));
  else return cvt_f32_f16(static_cast<u16>(x));
}
template <class E>
FM_DEVICE float high_of(u32 x) {
  if constexpr (is_same<E, bf16>) return __int_as_float(static_cast<int>(x & 0xffff0000u));
  else return cvt_f32_f16(static_cast<u16>(x >> 16));
}

}  // namespace fm
