// Values whose type only a run-time branch knows.
#pragma once
#include "prelude.cuh"

namespace fm {

// The same numbers as flashmoe_cupy/dtypes.py.
enum DTypeCode : int { kBF16 = 0, kFP16 = 1, kFP32 = 2, kBool = 4 };

FM_DEVICE float load_float(const void* g_pointer, i64 index, int dtype) {
  if (dtype == kFP32) return static_cast<const float*>(g_pointer)[index];
  if (dtype == kBF16) return to_float(static_cast<const bf16*>(g_pointer)[index]);
  return to_float(static_cast<const fp16*>(g_pointer)[index]);
}

}  // namespace fm
