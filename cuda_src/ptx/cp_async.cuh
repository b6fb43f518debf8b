// cp.async: 16 bytes from global to shared memory without passing through registers, in groups that can be
// waited for.
#pragma once
#include "prelude.cuh"

namespace fm {

// Writes zeros instead (and reads nothing) when `valid` is false.
FM_DEVICE void cp_async_cg_16(u32 s_address, const void* g_pointer, bool valid) {
  asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;" ::"r"(s_address), "l"(g_pointer),
               "r"(valid ? 16 : 0)
               : "memory");
}

FM_DEVICE void cp_async_commit_group() { asm volatile("cp.async.commit_group;" ::: "memory"); }

template <int kPending>
FM_DEVICE void cp_async_wait_group() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

// Arrives at an mbarrier, which counts this thread among its arrivals, when all copies that the thread has
// begun are done.
FM_DEVICE void cp_async_mbarrier_arrive_noinc(u32 s_barrier) {
  asm volatile("cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%0];" ::"r"(s_barrier) : "memory");
}

}  // namespace fm
