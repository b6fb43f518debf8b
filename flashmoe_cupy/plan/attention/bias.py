"""What runs before the Hopper kernel of attention where there is a bias, and where both keep what they share.

A boolean bias becomes words of bits and lists of key tiles (cuda_src/attention/mask_words.cuh). A bias whose rows the
copy engine cannot fetch is written again (bias_rows.cuh). No GPU and no CuPy.
"""

from __future__ import annotations

from typing import NamedTuple

from flashmoe_cupy.dtypes import BOOL
from flashmoe_cupy.jit.device import H100, DeviceProperties
from flashmoe_cupy.plan.attention.bias_layout import (
    mask_batches,
    mask_entries,
    mask_lists,
    mask_words,
    rows_fit,
    with_rows,
)
from flashmoe_cupy.plan.attention.forward import AttentionFwdSm90
from flashmoe_cupy.plan.attention.problem import AttentionProblem
from flashmoe_cupy.plan.attention.tiles import MASKS, TILES_SM90, tiles_sm90
from flashmoe_cupy.plan.kernel import DEFAULT_SMS, Kernel
from flashmoe_cupy.plan.params import Params
from flashmoe_cupy.plan.step import Values

_BLOCKS_PER_SM = 8  # of AttentionBiasRows, which waits for memory


def workspace(p: AttentionProblem) -> dict[str, int]:
    """Bytes of each array that the launches of a problem share, on any device."""
    if p.bias_dtype is None:
        return {}
    if p.bias_dtype is not BOOL:
        return {} if rows_fit(p) else {"bias_rows": with_rows(p)[1]}
    forward = AttentionFwdSm90()
    tiles, entries = mask_entries(p, forward.pack_bits(p))
    return {"mask_words": 4 * mask_words(p, tiles)[0], "mask_tiles": 4 * entries}


class MaskConfig(NamedTuple):
    """One specialisation of `AttentionMaskWords`: the tiles of the kernel that reads what it writes."""

    block_m: int
    block_n: int
    threads: int = 256
    smem_bytes: int = 256
    min_blocks: int = 3
    cluster: int = 1

    @property
    def name(self) -> str:
        """For people: "128x64"."""
        return f"{self.block_m}x{self.block_n}"

    @property
    def struct(self) -> str:
        """The C++ type inside namespace fm."""
        return f"AttentionMaskWords<{self.block_m}, {self.block_n}>"


class AttentionMask(Kernel[AttentionProblem, MaskConfig]):
    """cuda_src/attention/mask_words.cuh: the words and lists of a boolean bias."""

    op, task, name = "attention", "attention_mask", "attention_mask_words"
    header = "attention/mask_words.cuh"
    summary = "a boolean bias as words of bits and lists of key tiles, for attention_fwd_sm90"
    params = Params(header, "AttentionFwdSm90Params")

    def configs(self, arch: str) -> list[MaskConfig]:
        if arch != "sm_90a":
            return []
        tiles = {tile[:2] for dims in TILES_SM90 for variant in MASKS for tile in tiles_sm90(dims, variant)}
        return [MaskConfig(*tile) for tile in sorted(tiles)]

    def why_not(self, problem: AttentionProblem, arch: str, aligned: bool = True) -> list[str]:  # noqa: ARG002
        return [] if arch == "sm_90a" else ["it serves attention_fwd_sm90, which is for sm_90a"]

    def choose(
        self, problem: AttentionProblem, arch: str, aligned: bool = True, device: DeviceProperties = H100
    ) -> MaskConfig:  # fmt: skip
        config = AttentionFwdSm90().choose(problem, arch, aligned, device)
        return MaskConfig(config.block_m, config.block_n)

    def grid(self, problem: AttentionProblem, config: MaskConfig, sms: int = DEFAULT_SMS) -> int:  # noqa: ARG002
        """One block for each list."""
        forward = AttentionFwdSm90()
        reader = forward.choose(problem, "sm_90a")._replace(block_m=config.block_m)
        return mask_batches(problem) * mask_lists(problem) * forward.blocks(problem, reader)[0]

    def values(
        self, problem: AttentionProblem, config: MaskConfig, aligned: bool, sms: int = DEFAULT_SMS
    ) -> Values:  # fmt: skip
        """Those of the kernel that reads the words."""
        forward = AttentionFwdSm90()
        reader = forward.choose(problem, "sm_90a")._replace(block_m=config.block_m, block_n=config.block_n)
        return forward.values(problem, reader, aligned, sms)

    def title(self, config: MaskConfig) -> str:
        return f"{self.name} {config.name}"


class BiasRowsConfig(NamedTuple):
    """One specialisation of `AttentionBiasRows`."""

    value: str  # what the values are copied as: "u16" or "u32"
    threads: int = 256
    smem_bytes: int = 0
    min_blocks: int = 1
    cluster: int = 1

    @property
    def name(self) -> str:
        """For people: "u16"."""
        return self.value

    @property
    def struct(self) -> str:
        """The C++ type inside namespace fm."""
        return f"AttentionBiasRows<fm::{self.value}>"


class AttentionBiasRows(Kernel[AttentionProblem, BiasRowsConfig]):
    """cuda_src/attention/bias_rows.cuh: a bias in rows that the copy engine can fetch."""

    op, task, name = "attention", "attention_bias_rows", "attention_bias_rows"
    header = "attention/bias_rows.cuh"
    summary = "a bias in rows from multiples of 16 bytes on, for the Hopper kernels"
    params = Params(header, "AttentionBiasRowsParams")

    def configs(self, arch: str) -> list[BiasRowsConfig]:
        return [BiasRowsConfig("u16"), BiasRowsConfig("u32")] if arch == "sm_90a" else []

    def why_not(self, problem: AttentionProblem, arch: str, aligned: bool = True) -> list[str]:  # noqa: ARG002
        return [] if arch == "sm_90a" else ["it serves attention_fwd_sm90, which is for sm_90a"]

    def choose(
        self, problem: AttentionProblem, arch: str, aligned: bool = True, device: DeviceProperties = H100  # noqa: ARG002
    ) -> BiasRowsConfig:  # fmt: skip
        assert problem.bias_dtype is not None
        return BiasRowsConfig("u32" if problem.bias_dtype.itemsize == 4 else "u16")

    def grid(self, problem: AttentionProblem, config: BiasRowsConfig, sms: int = DEFAULT_SMS) -> int:
        return max(1, min(-(-with_rows(problem)[1] // (16 * config.threads)), sms * _BLOCKS_PER_SM))

    def values(
        self, problem: AttentionProblem, config: BiasRowsConfig, aligned: bool, sms: int = DEFAULT_SMS  # noqa: ARG002
    ) -> Values:  # fmt: skip
        p = problem
        assert p.bias_dtype is not None
        by_head, by_query, key = p.bias_strides[1:]
        chunks = with_rows(p)[1] // 16
        return {
            **{f"bias_stride_{axis}": n for axis, n in zip("bhqk", p.bias_strides, strict=True)},
            "heads": p.heads_q if by_head else 1,
            "queries": p.seqlen_q if by_query else 1,
            "keys": p.seqlen_k,
            "row_chunks": -(-p.seqlen_k * p.bias_dtype.itemsize // 16),
            "chunks": chunks,
            "along_queries": int(abs(key) > abs(by_query) > 0),
        }

    def title(self, config: BiasRowsConfig) -> str:
        return f"{self.name} {config.name}"

