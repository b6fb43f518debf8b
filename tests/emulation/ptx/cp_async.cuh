// Emulation of cuda_src/ptx/cp_async.cuh.
#pragma once
#include "prelude.cuh"

namespace fm {

inline void cp_async_cg_16(u32 s_address, const void* g_pointer, bool valid) { emu::copy_begin(s_address, g_pointer, valid); }
inline void cp_async_commit_group() { emu::copy_commit(); }
template <int kPending>
inline void cp_async_wait_group() {
  emu::copy_wait(kPending);
}
inline void cp_async_mbarrier_arrive_noinc(u32 s_barrier) { emu::copy_arrive(s_barrier); }

}  // namespace fm
