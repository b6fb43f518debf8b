// The words of CUDA C for g++, included before every emulated translation unit: keywords, built-in variables and intrinsics.
// What needs other threads or time is a call into the runtime (emulator.cpp), declared here.
#pragma once

#define __device__
#define __host__
#define __global__
#define __forceinline__ inline
#define __noinline__ __attribute__((noinline))
#define __restrict__ __restrict
#define __grid_constant__
#define __align__(n) __attribute__((aligned(n)))
#define __launch_bounds__(...)
#define __cluster_dims__(...)
// `extern __shared__ ... smem[]` finds fm::smem of the runtime; without extern this attribute is an error.
#define __shared__ __attribute__((weak))

namespace emu {

using u8 = unsigned char;
using u16 = unsigned short;
using u32 = unsigned int;
using u64 = unsigned long long;
using i64 = long long;
constexpr u32 kAllLanes = 0xffffffffu;

struct Dim {
  u32 x, y, z;
};
extern Dim thread_index, block_index, block_size, grid_size;  // of the fiber that runs

[[noreturn]] void fail(const char* format, ...) __attribute__((format(printf, 1, 2)));
void may_pause();  // a place where another warp may go on first
void poll();       // the thread asks again and again: it pauses until something has changed

// All lanes of `lanes` come together; the last of them calls `all` with what each of them brought, then all go on.
// what, detail: the same for all of them, or it is an error.
void together(const char* what, u32 lanes, void* item, void (*all)(void* const* items, u32 lanes), u64 detail = 0);

// Shared memory by its 32-bit addresses.
u32 shared_address(const void* pointer);
void* shared_read(u32 address, u32 bytes);   // checked: in range and a multiple of `bytes`
void* shared_write(u32 address, u32 bytes);  // the same, and notes that no proxy fence has followed yet

// The functions of cuda_src/ptx under their own names, but for types.
void mbarrier_init(u32 barrier, u32 arrivals);
void mbarrier_arrive(u32 barrier, bool from_cluster = false);
void mbarrier_expect_tx(u32 barrier, u32 bytes);
void mbarrier_wait(u32 barrier, u32 parity);
bool mbarrier_test(u32 barrier, u32 parity);
void fence_mbarrier_init();
void fence_proxy_async();

void barrier(u32 id, u32 threads, bool wait);  // named, by whole warps
void syncthreads();
void syncwarp(u32 lanes);
u32 cluster_rank();
void cluster_arrive();
void cluster_wait();
u32 cluster_address(u32 address, u32 rank);
void store_in_cluster(u32 address, u32 value, u32 barrier);
void copy_in_cluster(u32 target, u32 source, u32 bytes, u32 barrier);

void copy_begin(u32 target, const void* source, bool valid);
void copy_commit();
void copy_wait(u32 pending);
void copy_arrive(u32 barrier);

void tma_load(u32 target, const void* map, u32 barrier, u32 blocks, u32 rank, const int* at);
void tma_store(const void* map, u32 source, u32 rank, const int* at);
void tma_check(const void* map, u32 rank);  // rank 0: any
void bulk_add(float* sums, u32 source, u32 bytes);
void store_commit();
void store_wait(u32 pending, bool read_only);

struct ProductShape {
  u32 n;
  bool half, transposed_a, transposed_b, registers;  // fp16; A, B are MN-major; A comes from registers
};
void product(const ProductShape& shape, float* d, const u32* a_registers, u64 a, u64 b, bool accumulate);
void product_fence();
void product_commit();
void product_wait(u32 pending);

// Products of one warp.
struct MmaItem {
  float* d;
  const u32* a;
  u32 b[2];
};
void mma_16bit(MmaItem& item, bool half);
void mma_tf32(MmaItem& item);

float half_to_float(u16 bits);
u16 float_to_half(float x);
u16 float_to_bfloat(float x);

template <class To, class From>
inline To bits_as(From x) {
  static_assert(sizeof(To) == sizeof(From));
  return __builtin_bit_cast(To, x);
}

}  // namespace emu

#define threadIdx (::emu::thread_index)
#define blockIdx (::emu::block_index)
#define blockDim (::emu::block_size)
#define gridDim (::emu::grid_size)

#include "intrinsics.hpp"
