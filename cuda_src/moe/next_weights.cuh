// Weights of the product behind a self-sorted one, into L2 while memory would be idle: the next product
// cannot begin before this one has ended, but a block of this one has nothing to ask for any more.
#pragma once
#include "moe/assignments.cuh"
#include "moe/params.cuh"
#include "ptx/tma.cuh"

namespace fm {

// By one warp of each block: of tile next_first + the block's number. It is a hint, so a group counts as one
// tile of rows.
template <class Element>
FM_DEVICE void prefetch_next_weights(const GroupedGemmParams& p) {
  const SelfSorted sorted(p, p.groups, p.assignments);
  u32 firsts = __ballot_sync(0xffffffffu, sorted.count > 0);  // a lane for each group that has rows
  const int tiles = div_up(p.next_n, p.next_rows), tile = p.next_first + blockIdx.x;
  for (int before = tile / tiles; before > 0; --before) firsts &= firsts - 1;
  if (firsts == 0) return;
  const i64 group = __shfl_sync(0xffffffffu, sorted.expert, __ffs(firsts) - 1);
  const int begin = tile % tiles * p.next_rows, end = min(begin + p.next_rows, p.next_n);
  const Element* g_group = static_cast<const Element*>(p.next_w) + group * p.next_stride_e;
  for (int row = begin + lane_id(); row < end; row += 32)
    bulk_prefetch_l2(g_group + row * p.next_stride_n, p.next_k * static_cast<int>(sizeof(Element)));
}

}  // namespace fm
