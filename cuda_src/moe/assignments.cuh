// Which expert an assignment belongs to, and how one warp sorts assignments of which each lane holds one.
#pragma once
#include "math/reduce.cuh"
#include "moe/params.cuh"

namespace fm {

// The expert that takes choice k of token t, or -1. An id is one of `experts`, or with an expert_map the
// number of one.
template <class Params>
FM_DEVICE int expert_of(const Params& p, int experts, int t, int k) {
  const i64 at = t * p.ids_stride + k;
  const i64 id =
      p.ids_wide ? static_cast<const i64*>(p.topk_ids)[at] : static_cast<const int*>(p.topk_ids)[at];
  if (id < 0 || id >= p.ids) return -1;
  const int e = p.expert_map == nullptr ? static_cast<int>(id) : p.expert_map[id];
  return e >= 0 && e < experts ? e : -1;
}

// The lane's assignment: its expert (-1: none), its place in the order of experts (as moe/permute.cuh has
// it), and `count`: how many assignments its expert has, if it is the first of them; else 0.
struct SelfSorted {
  int expert = -1, place = 0, count = 0;

  template <class Params>
  FM_DEVICE SelfSorted(const Params& p, int experts, int assignments) {
    const int lane = lane_id();
    if (lane < assignments) {
      const u32 token = static_cast<u32>(lane) / static_cast<u32>(p.top_k);
      expert = expert_of(p, experts, token, lane - token * p.top_k);
    }
    const u32 mine = expert;  // -1 is larger than all
    bool first = expert >= 0;
    for (int others = 0; others < assignments; others += 4)
#pragma unroll
      for (int other = others; other < others + 4; ++other) {
        const u32 e = __shfl_sync(0xffffffffu, mine, other);
        place += e < mine + (other < lane);
        count += e == mine;
        first = first && (e != mine || other >= lane);
      }
    if (!first) count = 0;
  }
};

}  // namespace fm
