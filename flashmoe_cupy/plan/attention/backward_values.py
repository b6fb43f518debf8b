"""What the launches of attention's backward share: grids, values of the parameters, and sums. No GPU and no CuPy."""

from __future__ import annotations

from flashmoe_cupy.plan.attention.backward_tiles import (
    DIMS_FP32,
    STAGES_PAIR_SM90,
    STAGES_WIDE_SM90,
    TILES_BWD_SM90,
    Bwd80Config,
    Bwd90Config,
    BwdAll80Config,
    BwdWide90Config,
)
from flashmoe_cupy.plan.attention.choice import compiled_dims, variant_of, window
from flashmoe_cupy.plan.attention.gradient import AttentionBwdProblem, GradientProblem
from flashmoe_cupy.plan.attention.tiles import BIAS, PLAIN, SCORES, TILES_SM80
from flashmoe_cupy.plan.step import Step, Values, same

_Config = Bwd80Config | BwdAll80Config | Bwd90Config | BwdWide90Config

_CONVERTED = same("dq_sums", "dq", "cu_seqlens_q", "seqused_q", "leftpad_q")


_MAX_SOFTCAP = 2.0**100  # a larger one changes no score that has a weight, and times log2(e) it may overflow
_L2_BYTES = 40 << 20  # what of the 50 MB of an H100's or H200's L2 is counted on


def and_convert(step: Step) -> list[Step]:
    """A launch that adds dq up, and the one that makes dq of its sums."""
    return [step, Step("attention_bwd_convert", GradientProblem(step.problem.of, "convert"), _CONVERTED)]


def grid_of(problem: GradientProblem, config: _Config) -> int:
    p = problem.of.forward
    return p.batch * blocks_of(problem, config) * (p.heads_q if problem.part == "q" else p.heads_k)


def values_of(problem: GradientProblem, config: _Config, aligned: bool) -> Values:
    """What AttentionBwdParams holds behind its pointers."""
    of, p = problem.of, problem.of.forward
    strides = {
        "q": p.q_strides, "k": p.k_strides, "v": p.v_strides, "dout": of.dout_strides, "dq": of.dq_strides,
        "dk": of.dk_strides, "dv": of.dv_strides,
    }  # fmt: skip
    rows = p.total_q if p.varlen else p.seqlen_q
    return {
        **{f"{name}_stride_{axis}": n for name, by in strides.items() for axis, n in zip("bsh", by, strict=True)},
        **{f"bias_stride_{axis}": n for axis, n in zip("bhqk", p.bias_strides, strict=True)},
        "row_stride_b": 0 if p.varlen else p.heads_q * rows,
        "row_stride_h": rows,
        "heads_q": p.heads_q,
        "heads_per_key": p.heads_q // max(p.heads_k, 1),
        "seqlen_q": p.seqlen_q,
        "seqlen_k": p.seqlen_k,
        "head_dim": p.head_dim,
        "head_dim_v": p.head_dim_v,
        "window_left": window(p.window_left, p),
        "window_right": window(p.window_right, p),
        "blocks": blocks_of(problem, config),
        "v_blocks": -(-p.head_dim_v // config.head_dim_v),
        "alibi_stride_b": p.alibi_stride_b,
        "bias_dtype": 0 if p.bias_dtype is None else p.bias_dtype.code,
        "aligned": int(aligned),
        "lengths": lengths_code(of),
        "softmax_scale": p.softmax_scale,
        "softcap": min(p.softcap, _MAX_SOFTCAP),
        "dq_blocks": dq_blocks(of),
    }


def bias_tiles(of: AttentionBwdProblem, rows: int, cols: int) -> int:
    """Tiles of the bias, over all its entries and heads."""
    batch, heads, queries, keys = of.bias_shape
    return batch * heads * -(-queries // rows) * -(-keys // cols)


def bias_values(of: AttentionBwdProblem, rows: int, cols: int) -> Values:
    """What AttentionBwdBiasParams holds beyond that, for such tiles. dbias is row-major."""
    batch, heads, queries, keys = of.bias_shape
    strides = (heads * queries * keys, queries * keys, keys, 1)
    return {
        **{f"dbias_stride_{axis}": n for axis, n in zip("bhqk", strides, strict=True)},
        "batch": of.forward.batch,
        "bias_batch": batch,
        "bias_heads": heads,
        "bias_queries": queries,
        "bias_keys": keys,
        "tiles": bias_tiles(of, rows, cols),
    }


def blocks_of(problem: GradientProblem, config: _Config) -> int:
    p = problem.of.forward
    return max(1, -(-(p.seqlen_q if problem.part == "q" else p.seqlen_k) // config.rows))


def section(problem: GradientProblem, config: _Config, sms: int) -> int:
    """Heads whose tiles are worked on together, so that the last ones leave no block with much more than the others.

    As many as have tiles for every block, a power of 2; a simulation in benchmarks/NOTEBOOK.md. 1: all tiles take as
    long. In order, a tile waits for no other where all blocks work on the same tile of so many heads; the next tile of
    these heads finds their queries and sums in L2, if they are few.
    """
    p = problem.of.forward
    if _short(problem, sms):
        return sms
    if (window(p.window_left, p) < 0) == (window(p.window_right, p) < 0):
        return 1
    heads = p.batch * (p.heads_q if problem.part == "q" else p.heads_k)
    fit = max(min(sms // blocks_of(problem, config), heads), 1)
    tiles = int(1 << fit.bit_length() - 1)
    return 2 * tiles if problem.of.deterministic else tiles  # those that wait for each other lie farther apart


def _short(problem: GradientProblem, sms: int) -> bool:
    """Whether sums come in order, all queries see all keys, and L2 holds as many heads as there are blocks."""
    of, p = problem.of, problem.of.forward
    full = window(p.window_left, p) < 0 and window(p.window_right, p) < 0
    row = 2 * (p.head_dim + p.head_dim_v) + 4 * dq_columns(of)  # bytes of q, dout and the sums of dq
    heads = p.batch * p.heads_k
    fits = row * p.seqlen_q * (p.heads_q // max(p.heads_k, 1)) * sms <= _L2_BYTES
    return problem.part == "qkv" and of.deterministic and not p.varlen and full and fits and heads >= 2 * sms


def specialisation(of: AttentionBwdProblem) -> tuple[str, tuple[int, int], str]:
    """Element, compiled head dims and variant, for rows that are aligned."""
    p = of.forward
    element = p.dtype.cuda
    if element == "fp32":
        dims = next(d for d in DIMS_FP32 if p.head_dim <= d[0] and (p.head_dim_v <= d[1] or d[0] >= 128))
        return element, dims, BIAS
    return element, compiled_dims(p, TILES_SM80), variant_of(p)


def lengths_code(of: AttentionBwdProblem) -> int:
    """Of the enum Lengths in cuda_src/attention/params.cuh."""
    return 0 if of.forward.even else 2 if of.forward.varlen else 1


def dims_sm90(of: AttentionBwdProblem) -> tuple[int, int] | None:
    """Compiled head dims of the Hopper kernels and of all gradients at once; None: they do not take the problem."""
    p = of.forward
    variant = variant_of(p)
    if p.dtype.itemsize != 2 or variant not in (PLAIN, SCORES):
        return None
    known = (*TILES_BWD_SM90, *STAGES_WIDE_SM90) if variant == PLAIN else TILES_BWD_SM90
    return next((d for d in known if p.head_dim <= d[0] and p.head_dim_v <= d[1]), None)


def fused(of: AttentionBwdProblem) -> bool:
    """Whether kernels make dq, dk and dv in one launch: Hopper's, and the portable ones where tiles fit."""
    p = of.forward
    if 0 in (p.batch, p.heads_q, p.heads_k, p.seqlen_q, p.seqlen_k, p.total_q, p.total_k):
        return False
    dims = dims_sm90(of)
    return dims in TILES_BWD_SM90 or (dims in STAGES_PAIR_SM90 and p.even)


def dq_blocks(of: AttentionBwdProblem) -> int:
    """Blocks of 64 queries from head to head of the sums of dq: `first_block_of_sums` in bwd_params.cuh."""
    p = of.forward
    return p.total_q // 64 + p.batch if p.varlen else -(-p.seqlen_q // 64)


def dq_columns(of: AttentionBwdProblem) -> int:
    """Columns of the sums of dq, where there are any: parts of 64."""
    dims = dims_sm90(of)
    return -(-dims[0] // 64) * 64 if dims else 0


def dq_values(of: AttentionBwdProblem) -> int:
    """Of the sums of dq; 0: there are none."""
    p = of.forward
    entries = 1 if p.varlen else p.batch
    return entries * p.heads_q * dq_blocks(of) * 64 * dq_columns(of) if fused(of) else 0


def turns(of: AttentionBwdProblem) -> int:
    """Counters behind the tile counters, of blocks that add to the sums of dq one after the other."""
    ordered = of.deterministic and dims_sm90(of) in TILES_BWD_SM90
    return dq_values(of) // (64 * 64) if ordered else 0
