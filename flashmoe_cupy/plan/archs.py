"""The architectures of GPUs: compilation targets, and how much shared memory each has."""

from __future__ import annotations

# Every kernel compiles for these, or has no configuration there, without a spill; the test suite checks it.
ARCHS = ("sm_80", "sm_86", "sm_89", "sm_90a", "sm_100", "sm_120")
# Shared memory that one block may use, in bytes (CUDA C programming guide, specifications per compute capability).
MAX_SMEM = {
    "sm_80": 163 * 1024,
    "sm_86": 99 * 1024,
    "sm_87": 163 * 1024,
    "sm_89": 99 * 1024,
    "sm_90a": 227 * 1024,
    "sm_100": 227 * 1024,
    "sm_103": 227 * 1024,
    "sm_110": 227 * 1024,
    "sm_120": 99 * 1024,
    "sm_121": 99 * 1024,
}
SM90_SMEM_PER_SM = 228 * 1024  # bytes that the blocks of a multiprocessor share on sm_90a (the same table) ...
RESERVED_SMEM = 1024  # ... of which the driver takes so many for each block
ELEMENT_BYTES = {"bf16": 2, "fp16": 2, "fp32": 4}
# What one warp of a Hopper kernel stages of its output: two panels of 16 x 64 values of 16 bits (tile/epilogue.cuh).
WARP_STORE_BYTES = 2 * 16 * 64 * 2


def arch_for(compute_capability: tuple[int, int]) -> str:
    """The compilation target of a device. Only 9.0 has an `a` target here: its own kernels use wgmma."""
    major, minor = compute_capability
    return "sm_90a" if (major, minor) == (9, 0) else f"sm_{major}{minor}"
