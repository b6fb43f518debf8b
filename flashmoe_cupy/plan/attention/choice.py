"""Which of its configurations an attention kernel takes for a problem: variant, compiled head dims, tile."""

from __future__ import annotations

from collections.abc import Iterable

from flashmoe_cupy.dtypes import BF16, BOOL, FP32
from flashmoe_cupy.plan.attention import softcap
from flashmoe_cupy.plan.attention.problem import AttentionProblem
from flashmoe_cupy.plan.attention.tiles import (
    BIAS,
    BIAS16,
    BIAS32,
    KEY_BIAS16,
    KEY_BIAS32,
    MASK,
    MASK_SCORES,
    PLAIN,
    SCORES,
    Config,
    Tile,
    tiles_sm90,
)

# Which of the tiles in tiles.py is the fastest; measured on an H100, benchmarks/NOTEBOOK.md has the candidates.
_WIDE_KEYS = 4096  # keys that a query sees on average, from which on the wider of two tiles of keys is
_ROW_TIME = {256: 1.0, 192: 1.03, 128: 1.12}  # at head dims of 64: time of one row of a tile, by the tile's rows ...
_ROW_TIME_LONG = _ROW_TIME | {192: 0.93}  # ... and where a query sees so many keys or more:
_ROW_TIME_LONG_KEYS = 1024
_IDLE = 0.5  # share of a tile's time that is saved when hardly any of its rows exist


def last_tile(rows: int, block_m: int) -> float:
    """Time of the last tile of `rows` rows against that of a full one.

    Where a block has three, warpgroups without rows let its keys pass.
    """
    if block_m != 192:
        return 1.0
    warpgroups = -(-((rows - 1) % block_m + 1) // 64)
    return 1.0 - _IDLE * (1.0 - 64 * warpgroups / block_m)


def tile_for(p: AttentionProblem, dims: tuple[int, int], variant: str, pack_bits: int, sms: int) -> Tile:
    """The tile of the Hopper kernel: lengths only choose among the tiles that the table, and so the warm-up, has."""
    tiles, keys = tiles_sm90(dims, variant), mean_keys(p)
    if len({m for m, _, _ in tiles}) == 1:
        return tiles[keys < _WIDE_KEYS] if len(tiles) > 1 else tiles[0]

    rows = mean_rows(p.seqlen_q, p.total_q, p) << pack_bits
    groups = p.batch * (p.heads_q >> pack_bits) * -(-p.head_dim_v // dims[1])
    # Where full tiles take as long, every multiprocessor works until the last round of tiles is done.
    alike = p.even and max(window(p.window_left, p), window(p.window_right, p)) < 0
    row_time = _ROW_TIME_LONG if keys >= _ROW_TIME_LONG_KEYS else _ROW_TIME

    def time(tile: Tile) -> float:
        m = tile[0]
        each, last = -(-rows // m), last_tile(rows, m)
        rounds = (each - 1 + last) * groups / sms
        if alike:
            rounds = max(rounds, -(-each * groups // sms) - 1 + last)
        return rounds * m * row_time[m]

    return min(tiles, key=time)


def seeing(p: AttentionProblem) -> AttentionProblem:
    """The problem without the first queries, where none of them sees a key: the kernel has no tiles for these.

    Where only the device knows the lengths, it leaves them out by itself.
    """
    right = window(p.window_right, p)
    if right < 0 or not p.even or p.seqlen_q <= p.seqlen_k + right:
        return p
    return p._replace(seqlen_q=p.seqlen_k + right)


def mean_rows(seqlen: int, total: int, p: AttentionProblem) -> int:
    """The length of a sequence; of packed ones the mean, because their maximum may be any bound."""
    return -(-total // p.batch) if p.varlen and p.batch else seqlen


def mean_keys(p: AttentionProblem) -> float:
    """About how many keys a query sees."""
    left, right = window(p.window_left, p), window(p.window_right, p)
    keys: float = mean_rows(p.seqlen_k, p.total_k, p)
    keys = keys / 2 if right == 0 else keys
    return min(keys, left + max(right, 0) + 1) if left >= 0 else keys


def key_tiles(p: AttentionProblem, config: Config, m_block: int, pack_bits: int) -> int:
    """Tiles of keys that a tile of queries goes through, as the kernel counts them."""
    left, right = window(p.window_left, p), window(p.window_right, p)
    shift, first_row = p.seqlen_k - p.seqlen_q, m_block * config.block_m >> pack_bits
    last_row = (min((m_block + 1) * config.block_m, p.seqlen_q << pack_bits) - 1) >> pack_bits
    last = p.seqlen_k - 1 if right < 0 else min(p.seqlen_k - 1, last_row + shift + right)
    first = 0 if left < 0 else max(0, first_row + shift - left)
    end = max(1, -(-(last + 1) // config.block_n))
    return end - min(first // config.block_n, end - 1)


def variant_of(problem: AttentionProblem) -> str:
    """What happens to the scores, for rows that are aligned."""
    if problem.bias_dtype is not None:
        return BIAS
    # A scale that is not positive would turn the order of the scores, on which the folded exponent relies.
    return SCORES if problem.softcap or problem.alibi or problem.softmax_scale <= 0 else PLAIN


def variant_sm90(p: AttentionProblem) -> str:
    variant = variant_of(p)
    if variant == SCORES and p.softcap and not p.alibi and p.softmax_scale > 0:
        return softcap.variant(p.softmax_scale, p.softcap, p.dtype is BF16)
    if p.bias_dtype is BOOL:
        return MASK_SCORES if p.softcap or p.alibi or p.softmax_scale <= 0 else MASK
    if variant == BIAS:
        wide = p.bias_dtype is FP32
        _, by_head, by_query, _ = p.bias_strides
        changed = p.softcap or p.alibi
        if by_query or changed or (by_head and p.heads_q != p.heads_k):  # heads that lie side by side share one row
            return BIAS32 if wide else BIAS16
        return KEY_BIAS32 if wide else KEY_BIAS16
    return variant


def compiled_dims(problem: AttentionProblem, table: Iterable[tuple[int, int]]) -> tuple[int, int]:
    """The smallest compiled 16-bit size for a problem; values wider than it run in blocks."""
    head_dim, head_dim_v = problem.head_dim, problem.head_dim_v
    if head_dim <= 64 and head_dim_v > 128:
        return 64, 256
    if 128 < head_dim <= 192 and head_dim_v <= 128:
        return 192, 128
    return next((d, v) for d, v in table if d == v and head_dim <= d and min(head_dim_v, 256) <= v)


def window(size: int, p: AttentionProblem) -> int:
    """A window as the kernels take it: -1, unlimited, if it hides nothing; so row + window stays far from 2**31."""
    return -1 if size >= p.seqlen_q + p.seqlen_k else size
