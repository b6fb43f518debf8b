// The tensor memory accelerator: one thread asks for a box of a tensor, the copy engine brings it and reports
// to an mbarrier. What lies outside of the tensor arrives as zeros. Coordinates are in elements, innermost
// dimension first.
#pragma once
#include "prelude.cuh"

namespace fm {

// How long a line should stay in L2.
FM_DEVICE u64 createpolicy_evict_first() {
  u64 policy;
  asm("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
  return policy;
}
FM_DEVICE u64 createpolicy_evict_normal() {
  u64 policy;
  asm("createpolicy.fractional.L2::evict_normal.b64 %0, 1.0;" : "=l"(policy));
  return policy;
}
FM_DEVICE u64 createpolicy_evict_last() {
  u64 policy;
  asm("createpolicy.fractional.L2::evict_last.b64 %0, 1.0;" : "=l"(policy));
  return policy;
}

FM_DEVICE void prefetch_tensormap(const TensorMap& map) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(&map) : "memory");
}

FM_DEVICE void tma_load_2d(u32 s_target, const TensorMap& map, u32 s_barrier, u64 policy, int c0, int c1) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [%0], [%1, "
      "{%4, %5}], [%2], %3;" ::"r"(s_target),
      "l"(&map), "r"(s_barrier), "l"(policy), "r"(c0), "r"(c1)
      : "memory");
}

FM_DEVICE void tma_load_4d(u32 s_target, const TensorMap& map, u32 s_barrier, u64 policy, int c0, int c1,
                           int c2, int c3) {
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [%0], [%1, "
      "{%4, %5, %6, %7}], [%2], %3;" ::"r"(s_target),
      "l"(&map), "r"(s_barrier), "l"(policy), "r"(c0), "r"(c1), "r"(c2), "r"(c3)
      : "memory");
}

FM_DEVICE void tma_load_5d(u32 s_target, const TensorMap& map, u32 s_barrier, u64 policy, int c0, int c1,
                           int c2, int c3, int c4) {
  asm volatile(
      "cp.async.bulk.tensor.5d.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [%0], [%1, "
      "{%4, %5, %6, %7, %8}], [%2], %3;" ::"r"(s_target),
      "l"(&map), "r"(s_barrier), "l"(policy), "r"(c0), "r"(c1), "r"(c2), "r"(c3), "r"(c4)
      : "memory");
}

// The box into L2 only: a hint.
FM_DEVICE void tma_prefetch_4d(const TensorMap& map, int c0, int c1, int c2, int c3) {
  asm volatile("cp.async.bulk.prefetch.tensor.4d.L2.global [%0, {%1, %2, %3, %4}];" ::"l"(&map), "r"(c0),
               "r"(c1), "r"(c2), "r"(c3)
               : "memory");
}

// So many bytes, a multiple of 16 as the address is, into L2 only: a hint.
FM_DEVICE void bulk_prefetch_l2(const void* g_bytes, u32 bytes) {
  asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" ::"l"(g_bytes), "r"(bytes) : "memory");
}

// The same box to the same place in every block of the cluster whose bit is set, each of whose barriers is
// told of all its bytes.
FM_DEVICE void tma_load_2d_multicast(u32 s_target, const TensorMap& map, u32 s_barrier, u16 blocks,
                                     u64 policy, int c0, int c1) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster.L2::"
      "cache_hint [%0], [%1, {%5, %6}], "
      "[%2], %3, %4;" ::"r"(s_target),
      "l"(&map), "r"(s_barrier), "h"(blocks), "l"(policy), "r"(c0), "r"(c1)
      : "memory");
}

FM_DEVICE void tma_load_4d_multicast(u32 s_target, const TensorMap& map, u32 s_barrier, u16 blocks,
                                     u64 policy, int c0, int c1, int c2, int c3) {
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster.L2::"
      "cache_hint [%0], [%1, {%5, %6, %7, %8}], "
      "[%2], %3, %4;" ::"r"(s_target),
      "l"(&map), "r"(s_barrier), "h"(blocks), "l"(policy), "r"(c0), "r"(c1), "r"(c2), "r"(c3)
      : "memory");
}

// A box from shared memory to the tensor; what lies outside of it is not written. Stores belong to the
// thread's current bulk group.
FM_DEVICE void tma_store_2d(const TensorMap& map, u32 s_source, int c0, int c1) {
  asm volatile("cp.async.bulk.tensor.2d.global.shared::cta.bulk_group [%0, {%2, %3}], [%1];" ::"l"(&map),
               "r"(s_source), "r"(c0), "r"(c1)
               : "memory");
}
FM_DEVICE void tma_store_4d(const TensorMap& map, u32 s_source, int c0, int c1, int c2, int c3) {
  asm volatile(
      "cp.async.bulk.tensor.4d.global.shared::cta.bulk_group [%0, {%2, %3, %4, %5}], [%1];" ::"l"(&map),
      "r"(s_source), "r"(c0), "r"(c1), "r"(c2), "r"(c3)
      : "memory");
}
// Adds `bytes` of floats, a multiple of 16 as both addresses are, to those at g_sums. In the current bulk group.
FM_DEVICE void bulk_reduce_add_f32(float* g_sums, u32 s_source, u32 bytes) {
  asm volatile("cp.reduce.async.bulk.global.shared::cta.bulk_group.add.f32 [%0], [%1], %2;" ::"l"(g_sums),
               "r"(s_source), "r"(bytes)
               : "memory");
}
FM_DEVICE void bulk_commit_group() { asm volatile("cp.async.bulk.commit_group;" ::: "memory"); }
// Until at most kPending groups of this thread still read shared memory.
template <int kPending>
FM_DEVICE void bulk_wait_group_read() {
  asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(kPending) : "memory");
}
// Until all but kPending of them are done, what they write included.
template <int kPending>
FM_DEVICE void bulk_wait_group() {
  asm volatile("cp.async.bulk.wait_group %0;" ::"n"(kPending) : "memory");
}

// Ordinary writes of this thread to shared memory come before what the copy engine and the tensor cores do
// next.
FM_DEVICE void fence_proxy_async() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }
// The same of global memory.
FM_DEVICE void fence_proxy_async_global() { asm volatile("fence.proxy.async.global;" ::: "memory"); }

}  // namespace fm
