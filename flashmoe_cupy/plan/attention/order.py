"""In which order the persistent blocks of the Hopper kernel take tiles whose lengths differ: the host's half.

The kernel's half is cuda_src/tile/scheduler.cuh, which this file repeats in NumPy. Blocks take tiles in rounds, without
talking to each other, so the order decides how even their work is, and which keys L2 holds at a time.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

# Measured on an H100; benchmarks/NOTEBOOK.md.
_ONE_BY_ONE_TILES = 4  # tiles of queries of a group, up to which groups may go one by one: their keys are read once
_L2_BYTES = 36 << 20  # keys and values that the groups of a section may have; an H100 has 50 MiB of L2
_ROUNDS = (2, 1, 3, 4, 5, 6, 8)  # rounds that the tiles of a section may fill, in the order of preference
_GOOD_ENOUGH = 0.01  # share of the whole time that a section may lose against the best one
_WORTH_ONE_READ = 0.03  # share of it that reading keys from memory only once is worth
_MAX_SIMULATED = 1 << 18  # tiles: with more the order hardly matters, and a simulation takes time


def loads(costs: Sequence[float], groups: int, blocks: int, section: int) -> np.ndarray:
    """Work of each block, in steps of keys.

    costs: of each tile of queries of a group, which is one head or several that are packed. section: groups that are
    worked on together, in rounds to and fro (`by_sections`, `snake`); 0: one group after the other (`group_by_group`).
    """
    m_blocks, cost = len(costs), np.asarray(costs)
    rounds = -(-m_blocks * groups // blocks)
    index, block = np.arange(rounds * blocks), np.tile(np.arange(blocks), rounds)
    if section == 0:
        kept = index < m_blocks * groups
        index, block = index[kept], block[kept]
        group = index // m_blocks
        row = m_blocks - 1 - (index % m_blocks + group * m_blocks // blocks) % m_blocks
    else:
        turn = index // blocks
        index = turn * blocks + np.where(turn % 2 == 1, blocks - 1 - block, block)
        kept = index < m_blocks * groups
        index, block = index[kept], block[kept]
        part = index // (m_blocks * section)
        width = np.minimum(section, groups - part * section)
        row = (index - part * m_blocks * section) // width
        longest_first = (-(-groups // section) - 1 - part) % 2 == 0
        row = np.where(longest_first, m_blocks - 1 - row, row)
    return np.bincount(block, weights=cost[row], minlength=blocks)


def section(costs: Sequence[float], groups: int, blocks: int, bytes_per_group: float) -> int:
    """The section with which blocks have even work and L2 holds the keys; the other arguments are those of `loads`.

    bytes_per_group: of keys and values.
    """
    m_blocks = len(costs)
    sizes = [*dict.fromkeys(max(1, min(groups, round(k * blocks / m_blocks))) for k in _ROUNDS)]
    sizes = [size for size in sizes if size * bytes_per_group <= _L2_BYTES] or sizes[:1]
    one_by_one = m_blocks <= _ONE_BY_ONE_TILES
    if m_blocks * groups > _MAX_SIMULATED:
        return 0 if one_by_one else sizes[0]
    uneven = [_uneven(costs, groups, blocks, size) for size in sizes]
    if one_by_one and _uneven(costs, groups, blocks, 0) <= min(uneven) + _WORTH_ONE_READ:
        return 0
    return next(size for size, found in zip(sizes, uneven, strict=True) if found <= min(uneven) + _GOOD_ENOUGH)


def section_alike(costs: Sequence[float], groups: int, blocks: int) -> int:
    """The same where all tiles of a group take as long but the last, which may lack rows: 0, or 1 as if none did."""
    short = costs[-1] < costs[0] and len(costs) <= _ONE_BY_ONE_TILES and len(costs) * groups <= _MAX_SIMULATED
    return 0 if short and _uneven(costs, groups, blocks, 0) < _uneven(costs, groups, blocks, 1) else 1


def _uneven(costs: Sequence[float], groups: int, blocks: int, size: int) -> float:
    """The work of the block that has most, against the mean."""
    work = loads(costs, groups, blocks, size)
    return float(work.max() / work.mean())
