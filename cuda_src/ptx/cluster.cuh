// Blocks of one cluster, which reach each other's shared memory, and grids that start before the one before
// has ended.
#pragma once
#include "prelude.cuh"

namespace fm {

FM_DEVICE u32 cluster_ctarank() {
  u32 rank;
  asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
}

// All threads of all blocks of the cluster arrive, then wait; what they did before is then seen by all.
FM_DEVICE void barrier_cluster_arrive() {
  asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
}
FM_DEVICE void barrier_cluster_wait() { asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory"); }

// The address of the same place in the shared memory of block `rank`, for mbarrier_arrive_cluster.
FM_DEVICE u32 mapa(u32 s_address, u32 rank) {
  u32 address;
  asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(address) : "r"(s_address), "r"(rank));
  return address;
}

// Arrives at a barrier of any block of the cluster. What this thread has read is ordered before it, by the
// default semantics; a release at cluster scope would order its writes too, with a fence that takes longer
// than a step of a product.
FM_DEVICE void mbarrier_arrive_cluster(u32 cluster_address) {
  asm volatile("mbarrier.arrive.shared::cluster.b64 _, [%0];" ::"r"(cluster_address) : "memory");
}

// A word into the shared memory of any block of the cluster, whose barrier is told of 4 bytes when it is
// there.
FM_DEVICE void st_async_b32(u32 cluster_address, u32 x, u32 cluster_barrier) {
  asm volatile(
      "st.async.shared::cluster.mbarrier::complete_tx::bytes.b32 [%0], %1, [%2];" ::"r"(cluster_address),
      "r"(x), "r"(cluster_barrier)
      : "memory");
}

// Bytes of this block's shared memory, a multiple of 16 as both places are, to any block of the cluster, whose
// barrier is told of them.
FM_DEVICE void bulk_copy_cluster(u32 cluster_target, u32 s_source, u32 bytes, u32 cluster_barrier) {
  asm volatile(
      "cp.async.bulk.shared::cluster.shared::cta.mbarrier::complete_tx::bytes [%0], [%1], %2, "
      "[%3];" ::"r"(cluster_target),
      "r"(s_source), "r"(bytes), "r"(cluster_barrier)
      : "memory");
}

// Until the grids that this one depends on have ended and their writes are seen. At once where there is none,
// and before sm_90.
FM_DEVICE void griddepcontrol_wait() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}
// This block no longer holds up the grids that depend on this one.
FM_DEVICE void griddepcontrol_launch_dependents() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

// The rule of kernels that are launched before the one in front of them has ended: wait, and only then let
// the next one start. Then what a grid two launches back has written may be read without waiting.
FM_DEVICE void start_after_last_grid() {
  griddepcontrol_wait();
  griddepcontrol_launch_dependents();
}

}  // namespace fm
