"""In which order the persistent blocks of the Hopper kernel take tiles whose lengths differ: the host's half.

The kernel's half is cuda_src/tile/scheduler.cuh, which this file repeats in NumPy. Blocks take tiles in rounds, without
talking to each other, so the order decides how even their work is, and which keys L2 holds at a time.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

_FEW_TILES = 4  # tiles of queries up to which heads may go one by one, so that their keys are read once
_L2_BYTES = 36 << 20  # keys and values that the heads of a section may have; an H100 has 50 MiB of L2
_ROUNDS = (2, 1, 3, 4, 5, 6, 8)  # rounds that the tiles of a section may fill; the first that is good enough
_GOOD_ENOUGH = 0.01  # of the whole time
_WORTH_ONE_READ = 0.03  # of it, for keys that are read from memory only once
_MOST_TILES = 1 << 18  # beyond, the order hardly matters, and looking at it takes time


def loads(steps: Sequence[float], groups: int, blocks: int, section: int) -> np.ndarray:
    """Work of each block. steps: cost of each tile of queries of a group (a head); section: groups worked on together.

    section 0 is one group after the other (`group_by_group`), else `by_sections` in rounds to and fro (`snake`).
    """
    m_blocks, cost = len(steps), np.asarray(steps)
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


def section(steps: Sequence[float], groups: int, blocks: int, bytes_per_group: float) -> int:
    """The section under which blocks have even work and L2 holds the keys. Arguments as for `loads`."""
    m_blocks = len(steps)
    sizes = [max(1, min(groups, round(k * blocks / m_blocks))) for k in _ROUNDS]
    sizes = [size for size in sizes if size * bytes_per_group <= _L2_BYTES] or sizes[:1]
    few = m_blocks <= _FEW_TILES
    if m_blocks * groups > _MOST_TILES:
        return 0 if few else sizes[0]
    uneven = [_uneven(steps, groups, blocks, size) for size in sizes]
    if few and _uneven(steps, groups, blocks, 0) <= min(uneven) + _WORTH_ONE_READ:
        return 0
    return next(size for size, found in zip(sizes, uneven, strict=True) if found <= min(uneven) + _GOOD_ENOUGH)


def _uneven(steps: Sequence[float], groups: int, blocks: int, size: int) -> float:
    work = loads(steps, groups, blocks, size)
    return float(work.max() / work.mean())
