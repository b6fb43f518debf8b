// Emulation of cuda_src/ptx/warp.cuh.
#pragma once
#include "prelude.cuh"

namespace fm {

inline u32 redux_sync_max_u32(u32 x, u32 lanes = 0xffffffffu) { return emu::fold("redux.sync.max", lanes, x, emu::Max{}); }
inline u32 redux_sync_min_u32(u32 x, u32 lanes = 0xffffffffu) { return emu::fold("redux.sync.min", lanes, x, emu::Min{}); }
inline u32 redux_sync_add_u32(u32 x, u32 lanes = 0xffffffffu) { return emu::fold("redux.sync.add", lanes, x, emu::Add{}); }
inline u32 match_any_sync_b32(u32 x, u32 lanes = 0xffffffffu) { return emu::match_any(lanes, x); }

}  // namespace fm
