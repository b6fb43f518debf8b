// The order in which persistent blocks take the tiles of a problem.
#pragma once
#include "prelude.cuh"

namespace fm {

struct TileIndex {
  u32 m_block, group;  // group: everything that is not a tile of rows, heads and batch for example
};

// Sections of `section` groups come one after the other, so that the groups of a section share L2; within
// one, row by row of tiles over all its groups. Under a causal mask the last rows are the longest: the last
// section goes from long to short, the one before it from short to long and so on, so that neighbouring
// rounds of tiles have neighbouring lengths all the way.
FM_DEVICE TileIndex by_sections(u32 index, u32 m_blocks, u32 groups, u32 section) {
  const u32 s = index / (m_blocks * section);
  index -= s * m_blocks * section;
  const u32 width = min(section, groups - s * section), row = index / width;
  const bool longest_first = (((groups - 1) / section - s) & 1) == 0;
  return {longest_first ? m_blocks - 1 - row : row, s * section + index % width};
}

// One group after the other, for groups of few tiles: their keys are read from memory once. The row at which
// a group begins moves on by one each round, so that a block gets long and short tiles in turn.
FM_DEVICE TileIndex group_by_group(u32 index, u32 m_blocks, u32 blocks) {
  const u32 group = index / m_blocks;
  return {m_blocks - 1 - (index % m_blocks + group * m_blocks / blocks) % m_blocks, group};
}

// Tile of block `block` in round `round`: every other round goes backwards, so that a block which got the
// longest tile of one round gets the shortest of the next.
FM_DEVICE u32 snake(u32 round, u32 block, u32 blocks) {
  return round * blocks + ((round & 1) ? blocks - 1 - block : block);
}

}  // namespace fm
