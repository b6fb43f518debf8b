// Emulation of cuda_src/ptx/tma.cuh.
#pragma once
#include "prelude.cuh"

namespace fm {

inline u64 createpolicy_evict_first() { return 1; }
inline u64 createpolicy_evict_normal() { return 0; }
inline u64 createpolicy_evict_last() { return 2; }
inline void prefetch_tensormap(const TensorMap& map) { emu::tma_check(&map, 0); }

// blocks: those of the cluster that get the box, as bits; 0: this one.
template <class... C>
inline void tma_load(u32 s_target, const TensorMap& map, u32 s_barrier, u32 blocks, C... c) {
  const int at[] = {c...};
  emu::tma_load(s_target, &map, s_barrier, blocks, sizeof...(C), at);
}
template <class... C>
inline void tma_store(const TensorMap& map, u32 s_source, C... c) {
  const int at[] = {c...};
  emu::tma_store(&map, s_source, sizeof...(C), at);
}

inline void tma_load_2d(u32 s_target, const TensorMap& map, u32 s_barrier, u64, int c0, int c1) { tma_load(s_target, map, s_barrier, 0, c0, c1); }
inline void tma_load_4d(u32 s_target, const TensorMap& map, u32 s_barrier, u64, int c0, int c1, int c2, int c3) {
  tma_load(s_target, map, s_barrier, 0, c0, c1, c2, c3);
}
inline void tma_load_5d(u32 s_target, const TensorMap& map, u32 s_barrier, u64, int c0, int c1, int c2, int c3, int c4) {
  tma_load(s_target, map, s_barrier, 0, c0, c1, c2, c3, c4);
}
inline void tma_prefetch_4d(const TensorMap& map, int, int, int, int) { emu::tma_check(&map, 0); }
inline void bulk_prefetch_l2(const void* g_bytes, u32 bytes) {
  if (reinterpret_cast<u64>(g_bytes) % 16 != 0 || bytes % 16 != 0) emu::fail("prefetch of %u bytes from %p", bytes, g_bytes);
  u8 sum = 0;  // who asks for bytes that are not there is found by reading them
  for (u32 i = 0; i < bytes; ++i) sum += static_cast<const volatile u8*>(g_bytes)[i];
  static_cast<void>(sum);
}
inline void tma_load_2d_multicast(u32 s_target, const TensorMap& map, u32 s_barrier, u16 blocks, u64, int c0, int c1) {
  tma_load(s_target, map, s_barrier, blocks, c0, c1);
}
inline void tma_load_4d_multicast(u32 s_target, const TensorMap& map, u32 s_barrier, u16 blocks, u64, int c0, int c1, int c2, int c3) {
  tma_load(s_target, map, s_barrier, blocks, c0, c1, c2, c3);
}

inline void tma_store_2d(const TensorMap& map, u32 s_source, int c0, int c1) { tma_store(map, s_source, c0, c1); }
inline void tma_store_4d(const TensorMap& map, u32 s_source, int c0, int c1, int c2, int c3) { tma_store(map, s_source, c0, c1, c2, c3); }
inline void bulk_reduce_add_f32(float* g_sums, u32 s_source, u32 bytes) { emu::bulk_add(g_sums, s_source, bytes); }
inline void bulk_commit_group() { emu::store_commit(); }
template <int kPending>
inline void bulk_wait_group_read() {
  emu::store_wait(kPending, true);
}
template <int kPending>
inline void bulk_wait_group() {
  emu::store_wait(kPending, false);
}
inline void fence_proxy_async() { emu::fence_proxy_async(); }
inline void fence_proxy_async_global() {}

}  // namespace fm
