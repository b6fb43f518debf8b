// What four warps (a warpgroup) or a few of them share: register quotas and named barriers.
#pragma once
#include "prelude.cuh"

namespace fm {

// Gives registers back, or waits until it has them. Every warp of the warpgroup calls it; the count is a
// multiple of 8.
template <int kRegisters>
FM_DEVICE void setmaxnreg_dec() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
}
template <int kRegisters>
FM_DEVICE void setmaxnreg_inc() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

// Named barriers 1 .. 15 (0 is __syncthreads). `threads` counts those that wait and those that only arrive.
FM_DEVICE void barrier_sync(int id, int threads) {
  asm volatile("barrier.sync.aligned %0, %1;" ::"r"(id), "r"(threads) : "memory");
}
FM_DEVICE void barrier_arrive(int id, int threads) {
  asm volatile("barrier.arrive.aligned %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

}  // namespace fm
