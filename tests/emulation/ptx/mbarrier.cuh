// Emulation of cuda_src/ptx/mbarrier.cuh.
#pragma once
#include "prelude.cuh"

namespace fm {

inline void mbarrier_init(u32 s_barrier, u32 arrivals) { emu::mbarrier_init(s_barrier, arrivals); }
inline void fence_mbarrier_init() { emu::fence_mbarrier_init(); }
inline void mbarrier_arrive(u32 s_barrier) { emu::mbarrier_arrive(s_barrier); }
inline void mbarrier_arrive_expect_tx(u32 s_barrier, u32 bytes) { emu::mbarrier_expect_tx(s_barrier, bytes), emu::mbarrier_arrive(s_barrier); }
inline void mbarrier_wait_parity(u32 s_barrier, u32 parity) { emu::mbarrier_wait(s_barrier, parity); }
inline bool mbarrier_test_wait_parity(u32 s_barrier, u32 parity) { return emu::mbarrier_test(s_barrier, parity); }

}  // namespace fm
