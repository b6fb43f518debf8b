"""The dtypes of the library: one object each, with its NumPy, DLPack and CUDA spelling.

DLPack codes are those of DLPack 1.1: int 0, uint 1, float 2, bfloat 4, bool 6, float8_e4m3fn 10, float8_e5m2 12,
float8_e8m0fnu 14.
"""

from __future__ import annotations

from typing import Any, NoReturn

import ml_dtypes
import numpy as np


class DType:
    """One element type. There is exactly one object per type, so `is` and `==` agree and hashing is free.

    Attributes: name ("bfloat16"), itemsize (bytes), dlpack ((code, bits)), cuda (alias in the C++ namespace `fm`),
    code (the number that stands for the type in kernel parameters).
    """

    __slots__ = ("code", "cuda", "dlpack", "itemsize", "name")

    name: str
    itemsize: int
    dlpack: tuple[int, int]
    cuda: str
    code: int

    def __init__(self, name: str, dlpack: tuple[int, int], cuda: str, code: int) -> None:
        fields = {"name": name, "itemsize": dlpack[1] // 8, "dlpack": dlpack, "cuda": cuda, "code": code}
        for key, value in fields.items():
            object.__setattr__(self, key, value)

    def __setattr__(self, key: str, value: object) -> NoReturn:
        raise AttributeError(f"DType is immutable; cannot set {key!r} to {value!r}")

    def __delattr__(self, key: str) -> NoReturn:
        raise AttributeError(f"DType is immutable; cannot delete {key!r}")

    def __repr__(self) -> str:
        return self.name

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return from_name, (self.name,)  # copies and pickles give back the same object


BF16 = DType("bfloat16", (4, 16), "bf16", 0)
FP16 = DType("float16", (2, 16), "fp16", 1)
FP32 = DType("float32", (2, 32), "fp32", 2)
FP64 = DType("float64", (2, 64), "fp64", 3)
BOOL = DType("bool", (6, 8), "bool", 4)
INT32 = DType("int32", (0, 32), "i32", 5)
INT64 = DType("int64", (0, 64), "i64", 6)
FP8_E4M3 = DType("float8_e4m3fn", (10, 8), "e4m3", 7)
FP8_E5M2 = DType("float8_e5m2", (12, 8), "e5m2", 8)
UINT8 = DType("uint8", (1, 8), "u8", 9)
INT8 = DType("int8", (0, 8), "i8", 10)
INT16 = DType("int16", (0, 16), "i16", 11)
UINT16 = DType("uint16", (1, 16), "u16", 12)
UINT32 = DType("uint32", (1, 32), "u32", 13)
UINT64 = DType("uint64", (1, 64), "u64", 14)
FP8_E8M0 = DType("float8_e8m0fnu", (14, 8), "e8m0", 15)

ALL: tuple[DType, ...] = (
    BF16, FP16, FP32, FP64, BOOL, INT32, INT64, FP8_E4M3,
    FP8_E5M2, UINT8, INT8, INT16, UINT16, UINT32, UINT64, FP8_E8M0,
)  # fmt: skip

FLOATS = "bfloat16, float16 or float32"  # what is computed with
_ML_DTYPES = ("bfloat16", "float8_e4m3fn", "float8_e5m2", "float8_e8m0fnu")  # types that NumPy itself lacks

_BY_NAME: dict[str, DType] = {d.name: d for d in ALL}
_BY_DLPACK: dict[tuple[int, int], DType] = {d.dlpack: d for d in ALL}
_TO_NUMPY: dict[DType, np.dtype[Any]] = {
    d: np.dtype(getattr(ml_dtypes, d.name) if d.name in _ML_DTYPES else d.name) for d in ALL
}
_BY_NUMPY: dict[np.dtype[Any], DType] = {n: d for d, n in _TO_NUMPY.items()}


def accepted(argument: str) -> str:
    """The dtypes that an array argument of the public functions may have, in words."""
    if argument == "topk_ids":
        return "int32 or int64"
    if argument.startswith(("cu_seqlens", "seqused")) or argument in _LISTS:
        return "int32"
    if argument == "alibi_slopes":
        return "float32"
    return FLOATS + (", as a mask also bool" if argument == "bias" else "")


_LISTS = ("offsets", "group_sizes", "gather_indices", "expert_map")


def from_name(name: str) -> DType:
    """The dtype called `name`, as in NumPy and torch ("bfloat16"). Raises ValueError for a name it does not know."""
    try:
        return _BY_NAME[name]
    except KeyError:
        raise ValueError(f"unknown dtype {name!r}; known: {', '.join(_BY_NAME)}") from None


def from_numpy(dtype: np.dtype[Any]) -> DType:
    """The dtype that equals a NumPy one (ml_dtypes included). Raises ValueError for others and for swapped bytes."""
    try:
        return _BY_NUMPY[dtype]
    except KeyError:
        if not dtype.isnative:
            native = dtype.newbyteorder("=").name
            raise ValueError(f"dtype {dtype.str} has non-native byte order; cast it to {native}") from None
        raise ValueError(f"NumPy dtype {dtype} is not supported") from None


def from_dlpack(code: int, bits: int) -> DType:
    """The dtype of a DLPack (code, bits) pair with one lane. Raises ValueError for a pair it does not know."""
    try:
        return _BY_DLPACK[code, bits]
    except KeyError:
        raise ValueError(f"DLPack dtype code {code} with {bits} bits is not supported") from None


def to_numpy(dtype: DType) -> np.dtype[Any]:
    """The NumPy dtype; bfloat16 and float8 come from ml_dtypes."""
    return _TO_NUMPY[dtype]
