// Blocks of a cluster: they run at the same time and reach each other's shared memory.
#pragma once
#include "prelude.cuh"

namespace fm {

// The block's number in its cluster.
FM_DEVICE u32 cluster_ctarank() {
  u32 rank;
  asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
}

// Where the block of that rank has what lies at s_address here.
FM_DEVICE u32 mapa(u32 s_address, u32 rank) {
  u32 there;
  asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(there) : "r"(s_address), "r"(rank));
  return there;
}

// Arrives at a barrier of any block of the cluster, named by mapa.
FM_DEVICE void mbarrier_arrive_cluster(u32 s_barrier) {
  asm volatile("mbarrier.arrive.release.cluster.shared::cluster.b64 _, [%0];" ::"r"(s_barrier) : "memory");
}

// All threads of all blocks of the cluster.
FM_DEVICE void barrier_cluster_arrive() { asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory"); }
FM_DEVICE void barrier_cluster_wait() { asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory"); }

}  // namespace fm
