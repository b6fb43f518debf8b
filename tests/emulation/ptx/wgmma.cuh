// Emulation of cuda_src/ptx/wgmma.cuh.
#pragma once
#include "prelude.cuh"

namespace fm {

// The machine's addresses have the rank of a block in its cluster above bit 23. The emulated ones do not, so a
// descriptor adds it, unless without_rank says that the kernel has left it out.
enum : u32 { kWithoutRank = 1u << 31 };
inline u32 without_rank(u32 s_address) { return s_address | kWithoutRank; }
inline u64 wgmma_descriptor(u32 s_address, int panel_bytes, int eight_rows = 1024) {
  constexpr u64 kSwizzle128 = 1;
  s_address = s_address & kWithoutRank ? s_address & ~kWithoutRank : s_address | emu::cluster_rank() << 24;
  return kSwizzle128 << 62 | static_cast<u64>(eight_rows >> 4) << 32 |
         static_cast<u64>(panel_bytes >> 4) << 16 | (s_address >> 4);
}

inline void wgmma_fence() { emu::product_fence(); }
inline void wgmma_commit_group() { emu::product_commit(); }
template <int kN>
inline void wgmma_fence_operand(float (&)[kN][4]) {}
template <int kPending, int kN>
inline void wgmma_wait_group(float (&)[kN][4]) {
  emu::product_wait(kPending);
}

template <class E, int kN, bool kTransB>
struct Wgmma {
  static_assert(kN % 8 == 0 && kN >= 8 && kN <= 256);
  static constexpr bool kHalf = is_same<E, fp16>;
  template <bool kTransA = false>
  static void ss(float (&d)[kN / 8][4], u64 a, u64 b, int accumulate) {
    emu::product({kN, kHalf, kTransA, kTransB, false}, d[0], nullptr, a, b, accumulate != 0);
  }
  static void rs(float (&d)[kN / 8][4], const u32 (&a)[4], u64 b, int accumulate) {
    emu::product({kN, kHalf, false, kTransB, true}, d[0], a, 0, b, accumulate != 0);
  }
};

}  // namespace fm
