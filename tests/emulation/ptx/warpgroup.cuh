// Emulation of cuda_src/ptx/warpgroup.cuh. Register quotas change nothing here, but whole warps must ask for them.
#pragma once
#include "prelude.cuh"

namespace fm {

template <int kRegisters>
inline void setmaxnreg_dec() {
  static_assert(kRegisters % 8 == 0 && kRegisters >= 24 && kRegisters <= 256);
  emu::together("setmaxnreg.dec", emu::kAllLanes, nullptr, [](void* const*, u32) {});
}
template <int kRegisters>
inline void setmaxnreg_inc() {
  static_assert(kRegisters % 8 == 0 && kRegisters >= 24 && kRegisters <= 256);
  emu::together("setmaxnreg.inc", emu::kAllLanes, nullptr, [](void* const*, u32) {});
}

inline void barrier_sync(int id, int threads) { emu::barrier(static_cast<u32>(id), static_cast<u32>(threads), true); }
inline void barrier_arrive(int id, int threads) { emu::barrier(static_cast<u32>(id), static_cast<u32>(threads), false); }

}  // namespace fm
