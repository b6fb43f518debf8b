// Emulation of cuda_src/ptx/cluster.cuh. Grids run one after the other.
#pragma once
#include "prelude.cuh"

namespace fm {

inline u32 cluster_ctarank() { return emu::cluster_rank(); }
inline void barrier_cluster_arrive() { emu::cluster_arrive(); }
inline void barrier_cluster_wait() { emu::cluster_wait(); }
inline u32 mapa(u32 s_address, u32 rank) { return emu::cluster_address(s_address, rank); }
inline void mbarrier_arrive_cluster(u32 cluster_address) { emu::mbarrier_arrive(cluster_address, true); }
inline void st_async_b32(u32 cluster_address, u32 x, u32 cluster_barrier) { emu::store_in_cluster(cluster_address, x, cluster_barrier); }
inline void bulk_copy_cluster(u32 cluster_target, u32 s_source, u32 bytes, u32 cluster_barrier) {
  emu::copy_in_cluster(cluster_target, s_source, bytes, cluster_barrier);
}
inline void griddepcontrol_wait() { emu::may_pause(); }
inline void griddepcontrol_launch_dependents() {}
inline void start_after_last_grid() { griddepcontrol_wait(); }

}  // namespace fm
