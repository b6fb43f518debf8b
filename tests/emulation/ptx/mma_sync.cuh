// Emulation of cuda_src/ptx/mma_sync.cuh.
#pragma once
#include "prelude.cuh"

namespace fm {

inline void mma_sync_m16n8k16_bf16(float (&d)[4], const u32 (&a)[4], u32 b0, u32 b1) {
  emu::MmaItem item{d, a, {b0, b1}};
  emu::mma_16bit(item, false);
}
inline void mma_sync_m16n8k16_fp16(float (&d)[4], const u32 (&a)[4], u32 b0, u32 b1) {
  emu::MmaItem item{d, a, {b0, b1}};
  emu::mma_16bit(item, true);
}
inline void mma_sync_m16n8k8_tf32(float (&d)[4], const u32 (&a)[4], u32 b0, u32 b1) {
  emu::MmaItem item{d, a, {b0, b1}};
  emu::mma_tf32(item);
}
inline u32 cvt_rna_tf32(float x) {
  const u32 bits = __float_as_uint(x);
  return (bits & 0x7f800000u) == 0x7f800000u ? bits : (bits + 0x1000u) & ~0x1fffu;
}

}  // namespace fm
