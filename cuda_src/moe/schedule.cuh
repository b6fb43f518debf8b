// Which tile of a grouped product comes next. Group by group; in a group, `section` tiles of rows take a block of columns after the
// other, so that its weights travel once while the rows stay in L2.
#pragma once
#include "math/reduce.cuh"
#include "moe/assignments.cuh"
#include "moe/params.cuh"

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
  return {group, group * p.group_stride, p.group_sizes == nullptr ? p.max_rows : max(min(p.group_sizes[group], p.max_rows), 0)};
}

struct GroupTile {
  int group, row, rows;  // row: of out, the tile's first; rows: of the group from there on, 0 or less: there is nothing to do
  int n_block;
  int apart;             // the blocks of a cluster have different columns
  int sole;              // no other tiles of rows use the same weights
  int group_rows;        // of the whole group
};

// Whether rows of x are gathered, and the row of x that a row of the tile then is, -1: zeros. s_sorted: what the cursor has written.
FM_DEVICE bool gathers(const GroupedGemmParams& p) { return p.gather_indices != nullptr || p.inverse_indices != nullptr; }
FM_DEVICE int gathered_row(const GroupedGemmParams& p, const GroupTile& tile, int row, const int* s_sorted) {
  if (row >= tile.rows) return -1;
  const int index = (p.topk_ids == nullptr ? p.gather_indices : s_sorted)[tile.row + row], source = index / p.gather_divisor;
  return index >= 0 && source < p.rows_x ? source : -1;
}

// Where a block, or a cluster of them, is in the order of tiles of kRows rows. A lane holds one of 32 groups, all lanes look at one tile.
// The blocks of a cluster take tiles of rows that lie one behind the other; if a group ends with a single one, they take two blocks
// of its columns instead. With p.across they always do.
template <int kRows, int kCluster = 1>
struct GroupCursor {
  static constexpr int kSortedBytes = 128;
  int* s_sorted;  // of few assignments: the flat index at each place, when the first tile has been found
  int next_group = 0;
  u32 tiles_seen = 0, begin = 0, end = 0;  // tiles of all groups looked at; numbers of the tiles of the lane's group
  GroupRows mine = {0, 0, 0};

  FM_DEVICE explicit GroupCursor(int* s_sorted_) : s_sorted(s_sorted_) {}

  // Tiles of rows that a cluster has at once, and blocks of columns, or pairs of them.
  FM_DEVICE static bool across(const GroupedGemmParams& p) { return kCluster > 1 && p.across != 0; }
  FM_DEVICE static int together(const GroupedGemmParams& p) { return across(p) ? 1 : kCluster; }
  FM_DEVICE static int columns(const GroupedGemmParams& p) { return across(p) ? div_up(p.n_blocks, kCluster) : p.n_blocks; }

  FM_DEVICE void next_groups(const GroupedGemmParams& p) {
    if (p.topk_ids == nullptr) {
      const int group = next_group + lane_id();
      next_group += 32;
      mine = group < p.groups ? rows_of(p, group) : GroupRows{0, 0, 0};
    } else {
      const FewAssignments few(p);
      next_group = p.groups;
      mine = {few.expert, few.place, few.count};
      if (few.expert >= 0) s_sorted[few.place] = lane_id();
      if (p.inverse_indices != nullptr && blockIdx.x == 0 && lane_id() < p.assignments) p.inverse_indices[lane_id()] = few.expert < 0 ? -1 : few.place;
    }
    const int m_blocks = div_up(mine.rows, kRows);
    const int tiles = m_blocks / together(p) * columns(p) + m_blocks % together(p) * div_up(p.n_blocks, kCluster);
    end = tiles_seen + inclusive_sum(tiles), begin = end - tiles;
    tiles_seen = __shfl_sync(0xffffffffu, end, 31);
  }

  // Tile `index` of those that a cluster has at once, which is not before the last one asked for: the part of its block `rank`.
  // False: there is none.
  FM_DEVICE bool find(const GroupedGemmParams& p, u32 index, GroupTile& tile, int rank = 0) {
    while (index >= tiles_seen) {
      if (next_group >= p.groups) return false;
      next_groups(p);
    }
    const int lane = __popc(__ballot_sync(0xffffffffu, index >= end));
    const int first = __shfl_sync(0xffffffffu, mine.begin, lane), rows = __shfl_sync(0xffffffffu, mine.rows, lane);
    index -= __shfl_sync(0xffffffffu, begin, lane);
    const u32 n_units = columns(p), m_units = div_up(rows, kRows) / together(p), whole = m_units * n_units;
    int m_block = m_units * together(p);
    tile.sole = rows <= kRows * together(p);
    tile.apart = kCluster > 1 && (across(p) || index >= whole);
    if (kCluster > 1 && index >= whole) {
      tile.n_block = (index - whole) * kCluster + rank;
    } else {
      u32 n_unit = index, m_unit = 0;
      if (m_units > 1) {  // or the first of few tiles would wait for two divisions
        const u32 per_section = p.section * n_units, section = index / per_section, width = min(static_cast<u32>(p.section), m_units - section * p.section);
        index -= section * per_section;
        n_unit = index / width, m_unit = section * p.section + index % width;
      }
      tile.n_block = static_cast<int>(across(p) ? n_unit * kCluster + rank : n_unit);
      m_block = static_cast<int>(across(p) ? m_unit : m_unit * kCluster + rank);
    }
    tile.group = __shfl_sync(0xffffffffu, mine.group, lane);
    tile.group_rows = rows;
    tile.row = first + m_block * kRows, tile.rows = tile.n_block < p.n_blocks ? rows - m_block * kRows : 0;
    return true;
  }
};

}  // namespace fm
