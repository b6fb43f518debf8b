// mbarrier: a counter in shared memory that threads and bulk copies arrive at. It flips its phase when all
// arrivals of the phase are in and all announced bytes have landed; a waiter names the parity of the phase it
// waits for.
#pragma once
#include "prelude.cuh"

namespace fm {

FM_DEVICE void mbarrier_init(u32 s_barrier, u32 arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(s_barrier), "r"(arrivals) : "memory");
}

// Makes initialised barriers visible to the copy engine; a __syncthreads() for the other threads follows.
FM_DEVICE void fence_mbarrier_init() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }

FM_DEVICE void mbarrier_arrive(u32 s_barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(s_barrier) : "memory");
}

// Arrives, and announces bytes that copies will bring in this phase.
FM_DEVICE void mbarrier_arrive_expect_tx(u32 s_barrier, u32 bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(s_barrier), "r"(bytes)
               : "memory");
}

// Returns when the phase of that parity is over. A fresh barrier counts as if a phase of parity 1 had just
// ended.
FM_DEVICE void mbarrier_wait_parity(u32 s_barrier, u32 parity) {
  asm volatile(
      "{\n"
      ".reg .pred done;\n"
      "again:\n"
      "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
      "@!done bra again;\n"
      "}\n" ::"r"(s_barrier),
      "r"(parity)
      : "memory");
}

// Whether that phase is over, without waiting. Asked early, the answer is there when it is needed.
FM_DEVICE bool mbarrier_test_wait_parity(u32 s_barrier, u32 parity) {
  u32 done;
  asm volatile(
      "{\n"
      ".reg .pred done;\n"
      "mbarrier.test_wait.parity.shared::cta.b64 done, [%1], %2;\n"
      "selp.u32 %0, 1, 0, done;\n"
      "}\n"
      : "=r"(done)
      : "r"(s_barrier), "r"(parity)
      : "memory");
  return done != 0;
}

}  // namespace fm
