// Reductions inside a quad, the four lanes that share the rows of an mma accumulator, and sums along a warp.
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

}  // namespace fm
