// Which tile of a grouped product comes next. Group by group; in a group, `section` tiles of rows take a
// block of columns after the other, so that its weights travel once while the rows stay in L2.
#pragma once
#include "math/reduce.cuh"
#include "moe/assignments.cuh"
#include "moe/params.cuh"
#include "ptx/cluster.cuh"
#include "ptx/global_memory.cuh"
#include "ptx/mbarrier.cuh"
#include "ptx/shared_memory.cuh"

namespace fm {

// The rows of a group, which only the device knows.
struct GroupRows {
  int group, begin, rows;
};
FM_DEVICE GroupRows rows_of(const GroupedGemmParams& p, int group) {
  if (p.offsets != nullptr) {
    const int begin = max(p.offsets[group], 0);
    return {group, begin, max(min(p.offsets[group + 1], p.rows) - begin, 0)};
  }
  return {group, group * p.group_stride,
          p.group_sizes == nullptr ? p.max_rows : max(min(p.group_sizes[group], p.max_rows), 0)};
}

struct GroupTile {
  int group, row;        // row: of out, the first of the tile
  int rows;              // of the group from there on; 0 or less: there is nothing to do
  int n_block;
  int own_columns;       // 1: the blocks of a cluster have different columns, and so different weights
  int weights_once;      // 1: no other tile of rows uses the same weights
  int group_rows;        // of the whole group
};

// The row of x that is row `row` of a tile, where rows are gathered; -1: there is none, and it counts as
// zeros. s_sorted: what the cursor of a self-sorted product has written.
FM_DEVICE int gathered_row(const GroupedGemmParams& p, const GroupTile& tile, int row, const int* s_sorted) {
  if (row >= tile.rows) return -1;
  const int index = (p.topk_ids == nullptr ? p.gather_indices : s_sorted)[tile.row + row],
            source = index / p.gather_divisor;
  return index >= 0 && source < p.rows_x ? source : -1;
}

// Where a block, or a cluster of them, is in the order of tiles of kRows rows. A lane holds one of 32 groups,
// all lanes look at one tile. The blocks of a cluster take tiles of rows that lie one behind the other; if a
// group ends with a single one, they take two blocks of its columns instead. With p.share_rows they always
// do.
template <int kRows, int kCluster = 1>
struct GroupCursor {
  static constexpr int kSortedBytes = 128;
  int* s_sorted;  // self-sorted: the flat index of the assignment at each place, once the first tile is found
  int next_group = 0;
  u32 tiles_seen = 0;      // of all groups looked at
  u32 begin = 0, end = 0;  // the tiles of the lane's group have the numbers begin .. end - 1
  GroupRows mine = {0, 0, 0};

  FM_DEVICE explicit GroupCursor(int* s_sorted_) : s_sorted(s_sorted_) {}

  // Tiles of rows that a cluster has at once, and blocks of columns, or pairs of them.
  FM_DEVICE static bool shares_rows(const GroupedGemmParams& p) { return kCluster > 1 && p.share_rows != 0; }
  FM_DEVICE static int row_tiles(const GroupedGemmParams& p) { return shares_rows(p) ? 1 : kCluster; }
  FM_DEVICE static int columns(const GroupedGemmParams& p) {
    return shares_rows(p) ? div_up(p.n_blocks, kCluster) : p.n_blocks;
  }

  FM_DEVICE void next_groups(const GroupedGemmParams& p) {
    if (p.topk_ids == nullptr) {
      const int group = next_group + lane_id();
      next_group += 32;
      mine = group < p.groups ? rows_of(p, group) : GroupRows{0, 0, 0};
    } else {
      const SelfSorted sorted(p, p.groups, p.assignments);
      next_group = p.groups;
      mine = {sorted.expert, sorted.place, sorted.count};
      if (sorted.expert >= 0) s_sorted[sorted.place] = lane_id();
    }
    const int m_blocks = div_up(mine.rows, kRows);
    const int tiles =
        m_blocks / row_tiles(p) * columns(p) + m_blocks % row_tiles(p) * div_up(p.n_blocks, kCluster);
    end = tiles_seen + inclusive_sum(tiles), begin = end - tiles;
    tiles_seen = __shfl_sync(0xffffffffu, end, 31);
  }

  // Tile `index` of those that clusters take, for block `rank` of the cluster. It is not asked for a lower
  // index than the last time. False: there is none.
  FM_DEVICE bool find(const GroupedGemmParams& p, u32 index, GroupTile& tile, int rank = 0) {
    while (index >= tiles_seen) {
      if (next_group >= p.groups) return false;
      next_groups(p);
    }
    const int lane = __popc(__ballot_sync(0xffffffffu, index >= end));
    const int first = __shfl_sync(0xffffffffu, mine.begin, lane),
              rows = __shfl_sync(0xffffffffu, mine.rows, lane);
    index -= __shfl_sync(0xffffffffu, begin, lane);
    const u32 n_units = columns(p), m_units = div_up(rows, kRows) / row_tiles(p), whole = m_units * n_units;
    int m_block = m_units * row_tiles(p);
    tile.weights_once = rows <= kRows * row_tiles(p);
    tile.own_columns = kCluster > 1 && (shares_rows(p) || index >= whole);
    if (kCluster > 1 && index >= whole) {
      tile.n_block = (index - whole) * kCluster + rank;
    } else {
      u32 n_unit = index, m_unit = 0;
      if (m_units > 1) {  // or the first of few tiles would wait for two divisions
        const u32 per_section = p.section * n_units, section = index / per_section,
                  width = min(static_cast<u32>(p.section), m_units - section * p.section);
        index -= section * per_section;
        n_unit = index / width, m_unit = section * p.section + index % width;
      }
      tile.n_block = static_cast<int>(shares_rows(p) ? n_unit * kCluster + rank : n_unit);
      m_block = static_cast<int>(shares_rows(p) ? m_unit : m_unit * kCluster + rank);
    }
    tile.group = __shfl_sync(0xffffffffu, mine.group, lane);
    tile.group_rows = rows;
    tile.row = first + m_block * kRows, tile.rows = tile.n_block < p.n_blocks ? rows - m_block * kRows : 0;
    return true;
  }
};

// The numbers of a cluster's tiles: every so many-th, or (p.tile_counter) the next one that nobody has taken.
// Block 0 takes the number after the next from the counter while there is time, and sends it to block 1 when
// that one asks. A block without a cluster takes a number when its loader asks: its tiles are few and long,
// and one that began early would take what others need. By one warp.
template <int kCluster>
struct TileNumbers {
  FM_DEVICE static bool counted(const GroupedGemmParams& p) {
    return p.tile_counter != kNoCounter;
  }
  FM_DEVICE static u32 take(const GroupedGemmParams& p) {
    return atom_add_u32(p.counters + p.tile_counter - kFirstCounter, 1);
  }
  u32 number, clusters = gridDim.x / kCluster, taken = 0, parity = 0;
  bool first = true;

  FM_DEVICE TileNumbers(const GroupedGemmParams& p, int rank) : number(blockIdx.x / kCluster) {
    if (kCluster > 1 && counted(p) && rank == 0 && lane_id() == 0) taken = take(p);
  }
  // s_exchange: two barriers (block 1 has the number; it, or the loader, has asked for one), and the number.
  FM_DEVICE u32 next(const GroupedGemmParams& p, int rank, u32 s_exchange) {
    const u32 s_sent = s_exchange, s_asked = s_exchange + 8, s_number = s_exchange + 16;
    if (first) return first = false, number;
    if (!counted(p)) return number += clusters;
    if constexpr (kCluster == 1) {
      mbarrier_wait_parity(s_asked, parity), parity ^= 1;
      if (lane_id() == 0) taken = take(p);
      return number = clusters + __shfl_sync(0xffffffffu, taken, 0);
    }
    if (rank == 0) {
      number = clusters + __shfl_sync(0xffffffffu, taken, 0);
      if (lane_id() == 0) {
        mbarrier_wait_parity(s_asked, parity);
        st_async_b32(mapa(s_number, 1), number, mapa(s_sent, 1));
        taken = take(p);
      }
    } else {
      if (lane_id() == 0) mbarrier_arrive_expect_tx(s_sent, 4), mbarrier_arrive_cluster(mapa(s_asked, 0));
      __syncwarp();
      mbarrier_wait_parity(s_sent, parity);
      number = ld_shared_b32(s_number);
    }
    parity ^= 1;
    __syncwarp();
    return number;
  }
};

}  // namespace fm
