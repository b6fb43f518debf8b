// Which expert an assignment belongs to, and what a warp finds out about so few assignments that each lane holds one.
#pragma once
#include "math/reduce.cuh"
#include "moe/params.cuh"

namespace fm {

// The expert that takes choice k of token t, or -1. An id is one of `experts`, or with an expert_map the number of one.
template <class Params>
FM_DEVICE int expert_of(const Params& p, int experts, int t, int k) {
  const i64 at = t * p.ids_stride + k;
  const i64 id = p.ids_wide ? static_cast<const i64*>(p.topk_ids)[at] : static_cast<const int*>(p.topk_ids)[at];
  if (id < 0 || id >= p.ids) return -1;
  const int e = p.expert_map == nullptr ? static_cast<int>(id) : p.expert_map[id];
  return e >= 0 && e < experts ? e : -1;
}

// The lane's assignment: its expert (-1: none) and its place in the order of experts (as moe/permute.cuh has it), and where it is the
// first of its expert, how many that has; else 0.
struct FewAssignments {
  int expert = -1, place = 0, count = 0;

  FM_DEVICE explicit FewAssignments(const GroupedGemmParams& p) {
    const int lane = lane_id();
    if (lane < p.assignments) expert = expert_of(p, p.groups, lane / p.top_k, lane % p.top_k);
    bool first = true;
#pragma unroll 4
    for (int other = 0; other < p.assignments; ++other) {
      const int e = __shfl_sync(0xffffffffu, expert, other);
      place += e >= 0 && (e < expert || (e == expert && other < lane));
      count += e == expert;
      first &= e != expert || other >= lane;
    }
    if (!first || expert < 0) count = 0;
  }
};

}  // namespace fm
