"""Tensor maps: what Hopper's copy engine (TMA) needs to know of an array, encoded by the driver into 128 opaque bytes.

From call to call only the address of a map changes. It is the map's first 8 bytes, so a launch stores it there, which
takes 0.1 us from Python. The driver's interface does not promise that: `template` tries it, and where it fails each new
address is encoded. (cuTensorMapReplaceAddress promises it, but a call of the driver takes 0.4 us for each map.)
"""

from __future__ import annotations

import ctypes
import sys
from typing import NamedTuple

from flashmoe_cupy.dtypes import BF16, FP16, FP32, DType
from flashmoe_cupy.errors import FlashMoEError
from flashmoe_cupy.jit import driver

BYTES = 128  # of a map; in Params its address is a multiple of as many
MAX_STRIDE = 2**40  # bytes; every stride is less (CUDA driver API, cuTensorMapEncodeTiled)

_CODES = {FP16: 6, FP32: 7, BF16: 9}  # CUtensorMapDataType
_SWIZZLE = {0: 0, 128: 3}  # CUtensorMapSwizzle
_PROMOTION = {128: 2, 256: 3}  # CUtensorMapL2promotion
_PROBES = (0x1000, 0x7F5A_A5F0_1230)  # addresses to try: multiples of 16 that differ in many bits


class TensorMap(NamedTuple):
    """The arguments of one map but its address. The first dimension is the contiguous one."""

    dtype: DType
    dims: tuple[int, ...]  # elements
    strides: tuple[int, ...]  # bytes, of all dimensions but the first
    box: tuple[int, ...]  # elements that one copy moves; what lies outside of the array arrives as zero
    promotion: int = 128  # bytes that L2 fetches at least: 128 or 256
    swizzle: int = 128  # bytes of a row of a box within which 16-byte chunks change places; 0: none do


def encode(of: TensorMap, address: int) -> bytes:
    """The map of an array at `address`. A context of its device must be current. Raises FlashMoEError."""
    rank = len(of.dims)
    storage = ctypes.create_string_buffer(2 * BYTES)
    start = -ctypes.addressof(storage) % BYTES
    code = driver.library().cuTensorMapEncodeTiled(
        ctypes.c_void_p(ctypes.addressof(storage) + start), _CODES[of.dtype], rank, ctypes.c_void_p(address),
        (ctypes.c_uint64 * rank)(*of.dims), (ctypes.c_uint64 * (rank - 1))(*of.strides),
        (ctypes.c_uint32 * rank)(*of.box), (ctypes.c_uint32 * rank)(*[1] * rank), 0, _SWIZZLE[of.swizzle],
        _PROMOTION[of.promotion], 0,
    )  # fmt: skip
    if code:
        raise FlashMoEError(f"the driver does not encode a tensor map (error {code}) at {address:#x}: {of}")
    return storage.raw[start : start + BYTES]


def template(of: TensorMap) -> bytes | None:
    """A map into whose first 8 bytes an address may be stored; None where the driver's maps are made in another way."""
    try:
        one, other = (encode(of, address) for address in _PROBES)
    except FlashMoEError:  # perhaps it refuses these addresses alone: the map of a real one will raise, or not
        return None
    for found, address in zip((one, other), _PROBES, strict=True):
        if found[:8] != address.to_bytes(8, sys.byteorder) or found[8:] != one[8:]:
            return None
    return one
