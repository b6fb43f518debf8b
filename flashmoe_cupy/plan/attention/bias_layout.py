"""How a bias lies in memory where it is made ready for the Hopper kernel (plan/attention/bias.py)."""

from __future__ import annotations

from flashmoe_cupy.jit.tensormap import MAX_STRIDE
from flashmoe_cupy.plan.attention.problem import AttentionProblem
from flashmoe_cupy.plan.step import Values

_FEWEST_KEYS = _FEWEST_ROWS = 64  # of a tile of the kernels that read words


def rows_fit(p: AttentionProblem) -> bool:
    """Whether the copy engine can fetch rows of the bias, if it starts at a multiple of 16 bytes."""
    assert p.bias_dtype is not None
    sizes, size = (p.batch, p.heads_q, p.seqlen_q), p.bias_dtype.itemsize
    outer = [stride * size for n, stride in zip(sizes, p.bias_strides[:3], strict=True) if n > 1]
    near = all(stride % 16 == 0 and 0 <= stride < MAX_STRIDE for stride in outer)
    return near and (p.bias_strides[3] == 1 or p.seqlen_k == 1)


def with_rows(p: AttentionProblem) -> tuple[AttentionProblem, int]:
    """The problem with a bias in rows that start at multiples of 16 bytes, and how many bytes these take."""
    assert p.bias_dtype is not None
    size = p.bias_dtype.itemsize
    step = -(-p.seqlen_k * size // 16) * 16 // size
    strides = [1]
    for n, stride in zip((p.seqlen_q, p.heads_q, p.batch), p.bias_strides[2::-1], strict=True):
        strides.insert(0, step if stride else 0)
        step *= n if stride else 1
    by_batch, by_head, by_query, key = strides
    return p._replace(bias_strides=(by_batch, by_head, by_query, key)), step * size


def mask_batches(p: AttentionProblem) -> int:
    """How many batch entries have words and lists of a boolean bias of their own: one where all are the same.

    Where entries have padding, words and lists are those of what counts, and so each entry's own.
    """
    return p.batch if p.bias_strides[0] or not p.even else 1


def mask_lists(p: AttentionProblem) -> int:
    """Lists of key tiles of a boolean bias, for each of these batch entries and each tile of queries."""
    return p.heads_q if p.bias_strides[1] else 1


def mask_entries(p: AttentionProblem, pack_bits: int) -> tuple[int, int]:
    """The most tiles of keys that a list may name, and the most elements of all lists, in tiles of any kernel."""
    tiles = -(-p.seqlen_k // _FEWEST_KEYS)
    return tiles, mask_batches(p) * mask_lists(p) * -(-(p.seqlen_q << pack_bits) // _FEWEST_ROWS) * (1 + tiles)


def mask_words(p: AttentionProblem, tiles: int) -> tuple[int, int, int, int]:
    """How many words a boolean bias makes for so many tiles of keys; their strides by batch entry, head and query."""
    _, by_head, by_query, _ = p.bias_strides
    query = 4 * tiles if by_query else 0
    head = 4 * tiles * (p.seqlen_q if by_query else 1)
    batch = head * (p.heads_q if by_head else 1)
    entries = mask_batches(p)
    return batch * entries, batch if entries > 1 else 0, head if by_head else 0, query


def mask_fields(p: AttentionProblem, tiles: int, used: bool) -> Values:
    """What Params say of the words and lists, of so many tiles of keys. used: there is a boolean bias."""
    by_batch, by_head, by_query = mask_words(p, tiles)[1:] if used else (0, 0, 0)
    return {
        "mask_batches": mask_batches(p),
        "mask_lists": mask_lists(p),
        "mask_list": 1 + tiles,
        "mask_stride_b": by_batch,
        "mask_stride_h": by_head,
        "mask_stride_q": by_query,
    }
