"""The attention forward kernels as the host sees them: which problems they run, in which tiles, and what Params hold.

One class for each kernel of cuda_src/attention. No GPU and no CuPy: everything in this file runs anywhere.
"""

from __future__ import annotations

from collections.abc import Sequence

from flashmoe_cupy.dtypes import BOOL, DType
from flashmoe_cupy.jit.device import H100, DeviceProperties
from flashmoe_cupy.jit.tensormap import TensorMap
from flashmoe_cupy.plan.archs import MAX_SMEM
from flashmoe_cupy.plan.attention import order, softcap
from flashmoe_cupy.plan.attention.bias_layout import mask_entries, mask_fields, rows_fit, with_rows
from flashmoe_cupy.plan.attention.choice import (
    compiled_dims,
    key_tiles,
    last_tile,
    mean_rows,
    seeing,
    tile_for,
    variant_of,
    variant_sm90,
    window,
)
from flashmoe_cupy.plan.attention.problem import PADDING, AttentionProblem
from flashmoe_cupy.plan.attention.tiles import (
    BIAS,
    BIASES,
    KEY_BIASES,
    MASKS,
    PLAIN,
    SCORES,
    TILES_FP32,
    TILES_SM80,
    TILES_SM90,
    UNALIGNED,
    VARIANTS,
    Config,
    Sm80Config,
    Sm90Config,
    tile_sm80,
    tiles_sm90,
)
from flashmoe_cupy.plan.kernel import DEFAULT_SMS, EMPTY, MAX_TILES, Kernel, far_strides
from flashmoe_cupy.plan.params import Params
from flashmoe_cupy.plan.step import Step, Values, same

UNALIGNED_ROWS = "rows of the arrays do not start at multiples of 16 bytes, or lie 16 MiB apart"

_MAX_PACK_BITS = 4  # 2**4 heads: the 16 rows of one store of the Hopper kernel
_MAX_PACKED_QUERIES = 2**26  # queries of a head times 2**_MAX_PACK_BITS stay far from 2**31, where the kernel counts
_MAX_LISTED_TILES = 2**24  # kTileBits of cuda_src/attention/key_tiles.cuh
_FILLED_ROWS, _CLEARERS = 16, 2  # kFilledRows and kClearers of cuda_src/attention/epilogue_sm90.cuh
_WORTH_PACKING = 0.9  # heads are packed if that leaves no larger a share of their tiles


class AttentionFwd(Kernel[AttentionProblem, Config]):
    """What the kernels share."""

    op = "attention"
    task = "attention_fwd"

    def reasons(
        self, problem: AttentionProblem, config: Config, device: DeviceProperties = H100  # noqa: ARG002
    ) -> list[str]:  # fmt: skip
        why = [
            f"head dims {problem.head_dim}/{problem.head_dim_v} run in the compiled size "
            f"{config.head_dim}/{config.head_dim_v}, the smallest that holds them"
        ]
        if problem.head_dim_v > config.head_dim_v:
            why.append(f"head_dim_v is cut into blocks of {config.head_dim_v}, each with its own pass over the scores")
        if config.element == "fp32":
            why.append("fp32 runs as three tf32 products with one variant for all features")
        elif config.variant == PLAIN:
            why.append("scores are only scaled and masked, so the scale folds into the exponent")
        elif config.variant == UNALIGNED:
            why.append("rows do not start at multiples of 16 bytes, or lie 16 MiB apart: elements load one by one")
        elif config.variant in softcap.VARIANTS:
            why.append("softcap alone is part of the exponent: a polynomial where its tanh stays small")
        elif config.variant == SCORES:
            why.append("softcap, ALiBi or a scale <= 0 changes the scores")
        elif config.variant in MASKS:
            why.append("a boolean bias comes as words of bits; key tiles that it hides are left out")
        elif config.variant in BIASES:
            why.append("tiles of the bias come beside those of K")
        elif config.variant in KEY_BIASES:
            why.append("a bias that all queries share comes beside K, a value for each key")
        else:
            why.append("a bias is added to the scores")
        return why

    def tiles(self, problem: AttentionProblem, config: Config) -> int:
        """Tiles of work: queries, value columns, heads and batch."""
        m_blocks, v_blocks = self.blocks(problem, config)
        return m_blocks * v_blocks * (problem.heads_q >> self.pack_bits(problem)) * problem.batch

    def blocks(self, p: AttentionProblem, config: Config) -> tuple[int, int]:
        """Tiles of queries, and of value columns, of a head or of heads that are packed."""
        return -(-(p.seqlen_q << self.pack_bits(p)) // config.block_m), -(-p.head_dim_v // config.head_dim_v)

    def pack_bits(self, p: AttentionProblem) -> int:  # noqa: ARG002
        """A tile takes 2**pack_bits heads that share keys; each query is as many rows, side by side. 0: one head."""
        return 0

    def grid(self, problem: AttentionProblem, config: Config, sms: int = DEFAULT_SMS) -> int:  # noqa: ARG002
        return self.tiles(problem, config)

    def values(
        self, p: AttentionProblem, config: Config, aligned: bool, sms: int = DEFAULT_SMS  # noqa: ARG002
    ) -> Values:  # fmt: skip
        m_blocks, v_blocks = self.blocks(p, config)
        strides = {"q": p.q_strides, "k": p.k_strides, "v": p.v_strides, "out": p.out_strides}
        return {
            **{f"{name}_stride_{axis}": n for name, of in strides.items() for axis, n in zip("bsh", of, strict=True)},
            **{f"bias_stride_{axis}": n for axis, n in zip("bhqk", p.bias_strides, strict=True)},
            "lse_stride_b": p.lse_strides[0],
            "lse_stride_h": p.lse_strides[1],
            "heads_q": p.heads_q,
            "heads_per_key": _heads_per_key(p),
            "seqlen_q": p.seqlen_q,
            "seqlen_k": p.seqlen_k,
            "head_dim": p.head_dim,
            "head_dim_v": p.head_dim_v,
            "window_left": window(p.window_left, p),
            "window_right": window(p.window_right, p),
            "m_blocks": m_blocks,
            "v_blocks": v_blocks,
            "alibi_stride_b": p.alibi_stride_b,
            "bias_dtype": _code(p.bias_dtype),
            "sinks_dtype": _code(p.sinks_dtype),
            "aligned": int(aligned),
            "lengths": 0 if p.even else 2 if p.varlen else 1,  # of the enum Lengths
            "softmax_scale": p.softmax_scale,
            "softcap": p.softcap,
        }


class AttentionFwdSm80(AttentionFwd):
    """cuda_src/attention/fwd_sm80.cuh, which runs everything that a problem can describe."""

    name = "attention_fwd_sm80"
    header = "attention/fwd_sm80.cuh"
    summary = "attention forward on cp.async, ldmatrix and mma.sync: every GPU from sm_80 on"
    params = Params(header, "AttentionFwdParams")

    def configs(self, arch: str) -> list[Sm80Config]:
        found = [
            Sm80Config(element, *dims, *tile_sm80(arch, dims, variant), variant)
            for element in ("bf16", "fp16")
            for dims in TILES_SM80
            for variant in VARIANTS
        ]
        found += [Sm80Config("fp32", *dims, *tile, BIAS) for dims, tile in TILES_FP32.items()]
        return found

    def why_not(self, problem: AttentionProblem, arch: str, aligned: bool = True) -> list[str]:
        why = []
        if arch not in MAX_SMEM:
            why.append(f"{arch} is not supported: this kernel needs compute capability 8.0 or newer")
            return why
        config = self.choose(problem, arch, aligned)
        blocks = self.grid(problem, config)
        if blocks >= 2**31:
            why.append(f"{blocks} blocks of work: batch * heads_q * seqlen_q is too large for one launch (2**31 - 1)")
        if config.smem_bytes > MAX_SMEM[arch]:
            why.append(f"{config.name} needs {config.smem_bytes} bytes of shared memory, {arch} has {MAX_SMEM[arch]}")
        return why

    def choose(
        self, problem: AttentionProblem, arch: str, aligned: bool = True, device: DeviceProperties = H100  # noqa: ARG002
    ) -> Sm80Config:  # fmt: skip
        element = problem.dtype.cuda
        if element == "fp32":
            head_dim, head_dim_v = problem.head_dim, min(problem.head_dim_v, 128)
            dims = next((d, v) for d, v in TILES_FP32 if head_dim <= d and head_dim_v <= v)
            return Sm80Config(element, *dims, *TILES_FP32[dims], BIAS)
        dims = compiled_dims(problem, TILES_SM80)
        variant = variant_of(problem)
        if variant == PLAIN and not aligned:
            variant = UNALIGNED
        return Sm80Config(element, *dims, *tile_sm80(arch, dims, variant), variant)

    def slow(self, problem: AttentionProblem, aligned: bool) -> str:  # noqa: ARG002
        return "" if aligned else f"{UNALIGNED_ROWS}, so elements are copied one by one; contiguous arrays are faster"


class AttentionFwdSm90(AttentionFwd):
    """cuda_src/attention/fwd_sm90.cuh: faster, for 16-bit rows that the copy engine can fetch."""

    name = "attention_fwd_sm90"
    header = "attention/fwd_sm90.cuh"
    summary = "attention forward on TMA and wgmma with persistent blocks: bf16 and fp16 on Hopper (sm_90a)"
    params = Params(header, "AttentionFwdSm90Params")
    clears = True

    def configs(self, arch: str) -> list[Sm90Config]:
        if arch != "sm_90a":
            return []
        return [
            Sm90Config(element, *dims, *tile, variant)
            for element in ("bf16", "fp16")
            for dims in TILES_SM90
            for variant in (PLAIN, *softcap.VARIANTS, SCORES, *BIASES, *KEY_BIASES, *MASKS)
            if variant != softcap.BOUNDED or element == "bf16"
            for tile in tiles_sm90(dims, variant)
        ]

    def why_not(self, problem: AttentionProblem, arch: str, aligned: bool = True) -> list[str]:
        p = problem
        if arch != "sm_90a":
            return ["no Hopper tensor cores: this kernel is for sm_90a"]
        why = []
        if p.dtype.cuda not in ("bf16", "fp16"):
            why.append(f"{p.dtype} has no wgmma that is as exact as this library promises: bf16 and fp16 only")
        if not aligned:
            why.append(f"{UNALIGNED_ROWS}: the copy engine cannot fetch them")
        if 0 in (p.batch, p.heads_q, p.heads_k, *_rows(p)) or 0 in (p.seqlen_q, p.seqlen_k):
            why.append(EMPTY)
        if why:
            return why
        config = self.choose(p, arch, aligned)
        why = far_strides(("q", "k", "v", "out"), self.map_arguments(p, config)[:4])  # a bias may be written again
        if config.variant in MASKS:
            tiles, entries = mask_entries(p, self.pack_bits(p))
            if tiles > _MAX_LISTED_TILES or entries >= 2**31:
                why.append(f"lists of a boolean bias: {entries} entries of {tiles} tiles do not fit in 31 and 24 bits")
        tiles = self.tiles(p, config)
        if tiles >= MAX_TILES:
            why.append(f"{tiles} tiles of work: the kernel counts them in 32 bits")
        return why

    def choose(
        self, problem: AttentionProblem, arch: str, aligned: bool = True, device: DeviceProperties = H100  # noqa: ARG002
    ) -> Sm90Config:  # fmt: skip
        dims, variant = compiled_dims(problem, TILES_SM90), variant_sm90(problem)
        tile = tile_for(seeing(problem), dims, variant, self.pack_bits(problem), device.multiprocessors)
        return Sm90Config(problem.dtype.cuda, *dims, *tile, variant)

    def pack_bits(self, p: AttentionProblem) -> int:
        """As many heads as make fewer tiles; one head where a score depends on it."""
        group = _heads_per_key(p)
        bits = min((group & -group).bit_length() - 1, _MAX_PACK_BITS)
        by_head = p.alibi or (p.bias_dtype is BOOL and p.bias_strides[1]) or variant_sm90(p) == SCORES
        if bits <= 0 or by_head or p.seqlen_q >= _MAX_PACKED_QUERIES:
            return 0
        rows = mean_rows(seeing(p).seqlen_q, p.total_q, p)
        # Uneven lengths, which only the device knows, end with half a tile each, on average.
        single, packed = (-(-r // 128) if p.even else r / 128 + 0.5 for r in (rows, rows << bits))
        return bits if packed <= _WORTH_PACKING * single * 2**bits else 0

    def reasons(self, problem: AttentionProblem, config: Config, device: DeviceProperties = H100) -> list[str]:
        why = super().reasons(problem, config, device)
        if bits := self.pack_bits(problem):
            why.append(f"{2**bits} heads that share keys lie side by side, since a head has few queries for a tile")
        tiles = tiles_sm90((config.head_dim, config.head_dim_v), config.variant)
        if len(tiles) > 1:
            others = ", ".join(f"{m}x{n}" for m, n, _ in tiles if (m, n) != (config.block_m, config.block_n))
            why.append(f"tiles of {config.block_m}x{config.block_n} rather than {others}, by the lengths and the mask")
        return why

    def blocks(self, p: AttentionProblem, config: Config) -> tuple[int, int]:
        return super().blocks(seeing(p), config)

    def grid(self, problem: AttentionProblem, config: Config, sms: int = DEFAULT_SMS) -> int:
        """One block per multiprocessor, which takes tile after tile, and clears rows beside them."""
        return min(sms, max(self.tiles(problem, config), _clearing_blocks(problem)))

    def section(self, p: AttentionProblem, config: Config, sms: int = DEFAULT_SMS) -> int:
        """How many heads are worked on together; see order.py. Uneven lengths have an order of their own."""
        if not p.even:
            return 1
        p, alike = seeing(p), max(window(p.window_left, p), window(p.window_right, p)) < 0
        m_blocks, v_blocks = self.blocks(p, config)
        if m_blocks >= 2 * sms:
            return 1  # one head fills two rounds
        bits = self.pack_bits(p)
        costs = [key_tiles(p, config, m, bits) + 1.0 for m in range(m_blocks)]  # to begin a tile takes about a step
        if alike:
            costs[-1] *= last_tile(p.seqlen_q << bits, config.block_m)
            return order.section_alike(costs, self.tiles(p, config) // m_blocks, sms)
        shared = _heads_per_key(p) / 2**bits * v_blocks  # groups of tiles that read the same keys
        per_group = p.seqlen_k * (p.head_dim + p.head_dim_v) * p.dtype.itemsize / shared
        return order.section(costs, self.tiles(p, config) // m_blocks, sms, per_group)

    def values(self, p: AttentionProblem, config: Config, aligned: bool, sms: int = DEFAULT_SMS) -> Values:
        """A step may set clear_rest. Rows of no sequence become 0 in out: 1, -inf in lse: 2, both: 3; 0: they stay."""
        return super().values(p, config, aligned, sms) | {
            "tiles": self.tiles(p, config),
            "batch": p.batch,
            "section": self.section(p, config, sms),
            "tile_counter": 0,  # the launch stores the address of one
            "total_q": p.total_q if p.varlen else 0,
            "clear_rest": 0,
            "may_unsee": int(window(p.window_right, p) >= 0 if not p.even else seeing(p) != p),
            "pack_bits": self.pack_bits(p),
            **self._mask_values(p, config),
            **softcap.fields(config.variant, p.softmax_scale, p.softcap),
        }

    def counter_at(self, p: AttentionProblem) -> int:
        """Uneven lengths want one: only the device knows them, so no order of the host's could be even."""
        return 0 if p.even else self.params.fields["tile_counter"].at

    def map_arguments(self, p: AttentionProblem, config: Config) -> tuple[TensorMap, ...]:
        group, batch, (rows_q, rows_k) = _heads_per_key(p), 1 if p.varlen else p.batch, _rows(p)
        packed = 1 << self.pack_bits(p)
        (q_b, q_s, q_h), (k_b, k_s, k_h), (v_b, v_s, v_h) = p.q_strides, p.k_strides, p.v_strides
        out_b, out_s, out_h = p.out_strides
        queries = (group, q_h), (rows_q, q_s), (p.heads_k, q_h * group), (batch, q_b)
        keys = (rows_k, k_s), (p.heads_k, k_h), (batch, k_b)
        values = (rows_k, v_s), (p.heads_k, v_h), (batch, v_b)
        results = (p.heads_q, out_h), (rows_q, out_s), (batch, out_b)
        return (
            array_map(p.dtype, p.head_dim, queries, (64, packed, 64 // packed, 1, 1)),
            array_map(p.dtype, p.head_dim, keys, (64, config.block_n, 1, 1)),
            array_map(p.dtype, p.head_dim_v, values, (64, config.block_n, 1, 1)),
            array_map(p.dtype, p.head_dim_v, results, (64, packed, 16 // packed, 1)),  # what one warp stores
            *self._bias_map(p, config),
        )

    def _bias_map(self, p: AttentionProblem, config: Config) -> tuple[TensorMap, ...]:
        if config.variant not in (*BIASES, *KEY_BIASES):
            return ()
        assert p.bias_dtype is not None
        group, (by_batch, by_head, by_query, _) = _heads_per_key(p), p.bias_strides
        outer = (group, by_head), (p.seqlen_q, by_query), (p.heads_k, by_head * group), (p.batch, by_batch)
        if config.variant in KEY_BIASES:
            return (array_map(p.bias_dtype, p.seqlen_k, outer, (config.block_n, 1, 1, 1, 1), swizzle=0),)
        packed = 1 << self.pack_bits(p)
        return (array_map(p.bias_dtype, p.seqlen_k, outer, (128 // p.bias_dtype.itemsize, packed, 64 // packed, 1, 1)),)

    def _mask_values(self, p: AttentionProblem, config: Config) -> Values:
        return mask_fields(p, -(-p.seqlen_k // config.block_n), config.variant in MASKS)

    def before(self, step: Step, config: Config, odd: Sequence[str]) -> tuple[list[Step], dict[str, int]]:
        """The words and lists of a boolean bias; another bias in rows that the copy engine can fetch."""
        p: AttentionProblem = step.problem
        if config.variant in MASKS:
            shared = same("mask_words", "mask_tiles")
            read = {name: array for name, array in step.arguments.items() if name in ("bias", *PADDING)}
            words = Step("attention_mask", p, read | shared)
            return [words, Step(step.task, p, step.arguments | shared, step.values, step.clears)], {}
        if config.variant not in (*BIASES, *KEY_BIASES) or (rows_fit(p) and step.arguments["bias"] not in odd):
            return [step], {}
        moved, size = with_rows(p)
        rows = Step("attention_bias_rows", p, {"bias": step.arguments["bias"]} | same("bias_rows"))
        arguments = step.arguments | {"bias": "bias_rows"}
        return [rows, Step(step.task, moved, arguments, step.values, step.clears)], {"bias_rows": size}


def array_map(
    dtype: DType, width: int, outer: Sequence[tuple[int, int]], box: tuple[int, ...], swizzle: int = 128
) -> TensorMap:  # fmt: skip
    """The map of an array of `width` columns, in boxes of so many elements.

    outer: (size, stride in elements) of each dimension but the contiguous one.
    """
    size = dtype.itemsize
    # One row has no next one, so its stride may be anything in the array; the driver wants a multiple of 16 bytes.
    strides = tuple([stride * size if n > 1 else 16 for n, stride in outer])
    return TensorMap(dtype, (width, *[n for n, _ in outer]), strides, box, swizzle=swizzle)


def _rows(p: AttentionProblem) -> tuple[int, int]:
    """Rows of q, and of k and v, that one batch coordinate reaches."""
    return (p.total_q, p.total_k) if p.varlen else (p.seqlen_q, p.seqlen_k)


def _clearing_blocks(p: AttentionProblem) -> int:
    """How many blocks find rows to clear: at most, where only the device knows the lengths."""
    if p.varlen:
        return -(-(p.batch + 1) // _CLEARERS)
    rows = p.seqlen_q - (seeing(p).seqlen_q if p.even else 0)
    parts = p.batch * -(-rows // _FILLED_ROWS)
    return -(-parts // _CLEARERS)


def _heads_per_key(p: AttentionProblem) -> int:
    return p.heads_q // max(p.heads_k, 1)


def _code(dtype: DType | None) -> int:
    return 0 if dtype is None else dtype.code
