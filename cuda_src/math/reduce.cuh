// Reductions inside a quad, the four lanes that share the rows of an mma accumulator, and over a warp; sums
// along a warp.
#pragma once
#include "prelude.cuh"

namespace fm {

FM_DEVICE float quad_max(float x) {
  x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, 1));
  return fmaxf(x, __shfl_xor_sync(0xffffffffu, x, 2));
}

FM_DEVICE float quad_sum(float x) {
  x += __shfl_xor_sync(0xffffffffu, x, 1);
  return x + __shfl_xor_sync(0xffffffffu, x, 2);
}

// The sum of a lane's x and those of all lanes before it.
FM_DEVICE int inclusive_sum(int x) {
#pragma unroll
  for (int distance = 1; distance < 32; distance *= 2) {
    const int before = __shfl_up_sync(0xffffffffu, x, distance);
    if (lane_id() >= distance) x += before;
  }
  return x;
}

FM_DEVICE float warp_sum(float x) {
#pragma unroll
  for (int distance = 16; distance > 0; distance /= 2) x += __shfl_xor_sync(0xffffffffu, x, distance);
  return x;
}

// Floats as integers of the same order, 1 the least; -0 counts as 0. Two floats that are equal give equal
// integers.
FM_DEVICE u32 to_ordered(float x) {
  const u32 bits = __float_as_uint(x + 0.f);
  return max(bits & 0x80000000u ? ~bits : bits | 0x80000000u, 1u);
}
FM_DEVICE float from_ordered(u32 x) { return __uint_as_float(x & 0x80000000u ? x & 0x7fffffffu : ~x); }

FM_DEVICE float warp_max(float x) { return from_ordered(__reduce_max_sync(0xffffffffu, to_ordered(x))); }

}  // namespace fm
