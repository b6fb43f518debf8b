// One value from all lanes of `lanes`, which all call it.
#pragma once
#include "prelude.cuh"

namespace fm {

FM_DEVICE u32 redux_sync_max_u32(u32 x, u32 lanes = 0xffffffffu) {
  u32 y;
  asm volatile("redux.sync.max.u32 %0, %1, %2;" : "=r"(y) : "r"(x), "r"(lanes));
  return y;
}
FM_DEVICE u32 redux_sync_min_u32(u32 x, u32 lanes = 0xffffffffu) {
  u32 y;
  asm volatile("redux.sync.min.u32 %0, %1, %2;" : "=r"(y) : "r"(x), "r"(lanes));
  return y;
}
FM_DEVICE u32 redux_sync_add_u32(u32 x, u32 lanes = 0xffffffffu) {
  u32 y;
  asm volatile("redux.sync.add.u32 %0, %1, %2;" : "=r"(y) : "r"(x), "r"(lanes));
  return y;
}

// The lanes that hold the same x.
FM_DEVICE u32 match_any_sync_b32(u32 x, u32 lanes = 0xffffffffu) {
  u32 same;
  asm volatile("match.any.sync.b32 %0, %1, %2;" : "=r"(same) : "r"(x), "r"(lanes));
  return same;
}

}  // namespace fm
