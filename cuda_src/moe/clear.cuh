// Zeros for the rows of a grouped product that belong to no group: before the first and behind the last, or
// behind each group's last where groups lie at even distances. Touches no others.
#pragma once
#include "moe/params.cuh"
#include "ptx/cluster.cuh"

namespace fm {

struct GroupedClear {
  static constexpr int kThreads = 256;

  FM_DEVICE static void run(const GroupedClearParams& p) {
    start_after_last_grid();
    if (p.offsets != nullptr) {
      clear(p, 0, min(p.offsets[0], p.rows));
      clear(p, max(p.offsets[p.groups], 0), p.rows);
    } else {
      for (int group = 0; group < p.groups; ++group)
        clear(p, group * p.max_rows + max(min(p.group_sizes[group], p.max_rows), 0),
              (group + 1) * p.max_rows);
    }
  }

  FM_DEVICE static void clear(const GroupedClearParams& p, int begin, int end) {
    const i64 last = end * p.row_chunks;
    for (i64 i = begin * p.row_chunks + static_cast<i64>(blockIdx.x) * kThreads + threadIdx.x; i < last;
         i += static_cast<i64>(gridDim.x) * kThreads)
      static_cast<uint4*>(p.out)[i] = make_uint4(0, 0, 0, 0);
  }
};

}  // namespace fm
