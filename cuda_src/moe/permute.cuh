// The dispatch: assignments in the order of their experts.
//
//   offsets[e] .. offsets[e + 1]    places of the assignments of expert e
//   sorted_indices[place]           flat index of its assignment, rising within an expert; behind them -1
//   inverse_indices[flat index]     its place, -1 for an assignment that no expert here takes
//
// The counters of the products that follow become 0.
//
// An id is an expert, or with an expert_map the number of one; all other ids are skipped. Overwrites the
// three arrays. Any number of experts. No host is asked and nothing depends on time: a counting sort, every
// warp counting a stretch of consecutive assignments and putting them in their places in order. (A radix sort
// would move each key several times for an order that is known after one count.)
//
// MoePermuteCount counts for each block, MoePermutePlace adds up what the blocks before it have counted. One
// block needs no first kernel. Experts come in windows, as many as counters fit into shared memory. Where a
// warp's lanes hold all assignments, the grouped products find the same order by themselves
// (moe/assignments.cuh), and none of this runs.
#pragma once
#include "math/reduce.cuh"
#include "moe/assignments.cuh"
#include "moe/params.cuh"
#include "ptx/cluster.cuh"

namespace fm {

struct MoePermute {
  static constexpr int kWarps = 16, kThreads = 32 * kWarps;

  // The expert that takes assignment i, or -1.
  FM_DEVICE static int expert_of(const MoePermuteParams& p, int i) {
    return i < p.assignments ? fm::expert_of(p, p.experts, i / p.top_k, i % p.top_k) : -1;
  }

  // The first assignment of a warp.
  FM_DEVICE static i64 first_of(const MoePermuteParams& p, int warp) {
    return (static_cast<i64>(blockIdx.x) * kWarps + warp) * p.per_warp;
  }
};

struct MoePermuteCount : MoePermute {
  static constexpr int kWindow = 4096;  // experts counted at once
  struct Smem {
    static constexpr int kBytes = 4 * kWindow;
  };

  FM_DEVICE static void run(const MoePermuteParams& p) {
    start_after_last_grid();
    extern __shared__ __align__(128) u8 smem[];
    int* s_count = reinterpret_cast<int*>(smem);
    const int thread = static_cast<int>(threadIdx.x);
    const i64 begin = first_of(p, 0), end = min(begin + kWarps * p.per_warp, static_cast<i64>(p.assignments));
    for (int window = 0; window < p.experts; window += kWindow) {
      const int width = min(kWindow, p.experts - window);
      for (int e = thread; e < width; e += kThreads) s_count[e] = 0;
      __syncthreads();
      for (i64 i = begin + thread; i < end; i += kThreads) {
        const int e = expert_of(p, static_cast<int>(i)) - window;
        if (e >= 0 && e < width) atomicAdd(s_count + e, 1);
      }
      __syncthreads();
      for (int e = thread; e < width; e += kThreads)
        p.counts[static_cast<i64>(blockIdx.x) * p.experts + window + e] = s_count[e];
      __syncthreads();
    }
  }
};

struct MoePermutePlace : MoePermute {
  static constexpr int kWindow = 512;  // experts at once: one for each thread
  static_assert(kWindow == kThreads);
  struct Smem {
    static constexpr int kNext = 0, kBefore = kNext + 4 * kWarps * kWindow, kTotal = kBefore + 4 * kWindow;
    static constexpr int kSums = kTotal + 4 * kWindow, kBytes = kSums + 4 * kWarps;
  };

  FM_DEVICE static void run(const MoePermuteParams& p) {
    extern __shared__ __align__(128) u8 smem[];
    // (warps, window): where a warp puts its next assignment of an expert
    int* s_next = reinterpret_cast<int*>(smem + Smem::kNext);
    const int warp = warp_id();
    int* s_mine = s_next + warp * kWindow;
    const Stretch mine{first_of(p, warp), min(first_of(p, warp + 1), static_cast<i64>(p.assignments))};
    clear_counts(s_next);
    start_after_last_grid();
    const Chunk first(p, mine, mine.begin);  // nearly always all that a warp has
    int placed = 0;                          // assignments of all windows before
    for (int window = 0; window < p.experts; window += kWindow) {
      const int width = min(kWindow, p.experts - window);
      if (window > 0) clear_counts(s_next);
      __syncthreads();
      walk(p, mine, first, window, width, [&](i64, int e, bool here, u32 same) {
        if (here && leads(same)) s_mine[e] += __popc(same);
      });
      __syncthreads();
      placed = find_places(p, smem, window, width, placed);
      walk(p, mine, first, window, width, [&](i64 i, int e, bool here, u32 same) {
        const int place = here ? s_mine[e] + __popc(same & ((1u << lane_id()) - 1)) : 0;
        __syncwarp();  // all have read before one moves it on
        if (here && leads(same)) s_mine[e] += __popc(same);
        if (here) p.sorted_indices[place] = static_cast<int>(i), p.inverse_indices[i] = place;
      });
      __syncthreads();
    }
    if (blockIdx.x == 0 && threadIdx.x == 0) p.offsets[p.experts] = placed;
    if (blockIdx.x == 0 && p.counters != nullptr)
      for (int i = static_cast<int>(threadIdx.x); i < 2 + p.experts; i += kThreads) p.counters[i] = 0;
    skip_rest(p, mine, first, placed);
  }

  FM_DEVICE static void clear_counts(int* s_next) {  // and the sums over blocks behind them
    for (int i = static_cast<int>(threadIdx.x); i < (kWarps + 2) * kWindow; i += kThreads) s_next[i] = 0;
  }

  // The assignments of a warp.
  struct Stretch {
    i64 begin, end;
  };
  // The experts of 32 kTogether of them, from i on: loads that are under way together.
  struct Chunk {
    static constexpr int kTogether = 4;
    int expert[kTogether];
    FM_DEVICE Chunk(const MoePermuteParams& p, const Stretch& mine, i64 i) {
#pragma unroll
      for (int j = 0; j < kTogether; ++j) {
        const i64 at = i + 32 * j + lane_id();
        expert[j] = at < mine.end ? expert_of(p, static_cast<int>(at)) : -1;
      }
    }
  };

  // Calls f(first assignment of a row of 32, row of their experts) for all rows of the stretch, in order.
  template <class F>
  FM_DEVICE static void for_each_row(const MoePermuteParams& p, const Stretch& mine, const Chunk& first,
                                     F&& f) {
    for (i64 i = mine.begin; i < mine.end; i += 32 * Chunk::kTogether) {
      const Chunk chunk = i == mine.begin ? first : Chunk(p, mine, i);
#pragma unroll
      for (int j = 0; j < Chunk::kTogether; ++j)
        if (i + 32 * j < mine.end) f(i + 32 * j + lane_id(), chunk.expert[j]);
    }
  }

  // Calls f(assignment, expert in the window, whether it is there, lanes with the same expert), 32 at a time
  // and in order; all lanes call it together.
  template <class F>
  FM_DEVICE static void walk(const MoePermuteParams& p, const Stretch& mine, const Chunk& first, int window,
                             int width, F&& f) {
    for_each_row(p, mine, first, [&](i64 i, int expert) {
      const int e = expert - window;
      const bool here = e >= 0 && e < width;
      f(i, e, here, lanes_with(e, here, width));
      __syncwarp();
    });
  }
  // The lanes that have the same expert; bit by bit, since __match_any_sync takes a microsecond where all
  // differ.
  FM_DEVICE static u32 lanes_with(int expert, bool here, int width) {
    u32 same = __ballot_sync(0xffffffffu, here);
    for (int bit = 1; bit < width; bit *= 2) {
      const u32 set = __ballot_sync(0xffffffffu, (expert & bit) != 0);
      same &= (expert & bit) != 0 ? set : ~set;
    }
    return same;
  }
  FM_DEVICE static bool leads(u32 same) { return __ffs(static_cast<int>(same)) - 1 == lane_id(); }

  // Turns each warp's counts in s_next into places. Returns the number of assignments up to the end of the
  // window.
  FM_DEVICE static int find_places(const MoePermuteParams& p, u8* smem, int window, int width, int placed) {
    int* s_next = reinterpret_cast<int*>(smem + Smem::kNext);
    // (window): assignments of an expert in the blocks before this one
    int* s_before = reinterpret_cast<int*>(smem + Smem::kBefore);
    int* s_total = reinterpret_cast<int*>(smem + Smem::kTotal);    // (window): in all blocks
    int* s_sums = reinterpret_cast<int*>(smem + Smem::kSums);
    const int e = static_cast<int>(threadIdx.x), block = static_cast<int>(blockIdx.x), warp = warp_id();
    add_blocks(p, s_before, s_total, window, width);
    __syncthreads();
    int total = 0;
    if (gridDim.x > 1) total = s_total[e];
    else if (e < width)
      for (int w = 0; w < kWarps; ++w) total += s_next[w * kWindow + e];
    const int up_to_lane = inclusive_sum(total);
    if (lane_id() == 31) s_sums[warp] = up_to_lane;
    __syncthreads();
    int place = placed + up_to_lane - total, all = placed;
    for (int w = 0; w < kWarps; ++w) place += w < warp ? s_sums[w] : 0, all += s_sums[w];
    if (e < width) {
      if (block == 0) p.offsets[window + e] = place;
      place += s_before[e];
      for (int w = 0; w < kWarps; ++w) {
        const int count = s_next[w * kWindow + e];
        s_next[w * kWindow + e] = place;
        place += count;
      }
    }
    __syncthreads();
    return all;
  }

  // Where the window is narrow, several threads share an expert's blocks.
  FM_DEVICE static void add_blocks(const MoePermuteParams& p, int* s_before, int* s_total, int window,
                                   int width) {
    if (gridDim.x == 1) return;
    const int block = static_cast<int>(blockIdx.x), blocks = static_cast<int>(gridDim.x),
              sharers = max(1, kThreads / width);
    const int e = static_cast<int>(threadIdx.x) % width, first = static_cast<int>(threadIdx.x) / width;
    if (first >= sharers) return;
    int before = 0, total = 0;
#pragma unroll 8
    for (int b = first; b < blocks; b += sharers) {
      const int count = p.counts[static_cast<i64>(b) * p.experts + window + e];
      before += b < block ? count : 0, total += count;
    }
    atomicAdd(s_before + e, before), atomicAdd(s_total + e, total);
  }

  // Assignments that nobody takes have no place, and the last places have no assignment.
  FM_DEVICE static void skip_rest(const MoePermuteParams& p, const Stretch& mine, const Chunk& first,
                                  int placed) {
    for_each_row(p, mine, first, [&](i64 i, int expert) {
      if (i >= mine.end) return;
      if (expert < 0) p.inverse_indices[i] = -1;
      if (i >= placed) p.sorted_indices[i] = -1;
    });
  }
};

}  // namespace fm
