"""A `View` says where an array of any library lies, and how. Which memory views cover; whether two overlap."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from flashmoe_cupy.dtypes import DType, to_numpy
from flashmoe_cupy.errors import UnsupportedProblem


class View(NamedTuple):
    """Where an array is and how it is laid out. Valid as long as the view itself is alive."""

    ptr: int  # address of the first element; an empty array may have 0
    shape: tuple[int, ...]
    strides: tuple[int, ...]  # elements from index to index of each axis; may be negative
    dtype: DType
    device: int  # CUDA ordinal; -1: host memory
    library: str  # whose array it is: "numpy", "cupy", "torch" or "jax"; of others, how it came: "dlpack" or "cai"
    readonly: bool  # the producer forbids writing
    owner: object  # keeps the memory alive


# make(View, fields): a view, without the microsecond of NamedTuple's own __new__.
make: Callable[[type[View], tuple[object, ...]], View] = tuple.__new__


def row_major(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Row-major strides in elements."""
    return tuple(math.prod(shape[i + 1 :]) for i in range(len(shape)))


def type_name(array: object) -> str:
    """The array's type with its module, for errors."""
    return f"{type(array).__module__}.{type(array).__qualname__}"


def refused(array: object, name: str, why: str | list[str], hint: str = "") -> UnsupportedProblem:
    """The error for an array that cannot be read. name: of the argument."""
    return UnsupportedProblem(f"argument {name} ({type_name(array)})", [why] if isinstance(why, str) else why, hint)


# ---- memory ----


class _Interface:
    """Describes memory to NumPy; the array that NumPy makes keeps this object, and so the owner, alive."""

    __slots__ = ("__array_interface__", "owner")

    def __init__(self, v: View) -> None:
        self.owner = v.owner
        size = v.dtype.itemsize
        self.__array_interface__ = {
            "data": (v.ptr, v.readonly), "shape": v.shape, "strides": tuple([t * size for t in v.strides]),
            "typestr": np.dtype(f"u{size}").str, "version": 3,
        }  # fmt: skip


def as_numpy(v: View) -> np.ndarray[Any, np.dtype[Any]]:
    """The same memory as a NumPy array: no copy, strides and read-only flag kept. Raises ValueError for GPU memory."""
    if v.device >= 0:
        raise ValueError("the array is on a GPU; as_numpy reads host memory only")
    if v.library == "numpy":
        return np.asarray(v.owner)
    if 0 in v.shape:  # the pointer may be null
        return np.empty(v.shape, to_numpy(v.dtype))
    return np.asarray(_Interface(v)).view(to_numpy(v.dtype))


def overlap(a: View, b: View) -> bool:
    """Whether two arrays share an element's memory. Exact for what interleaves simply, else True to be safe."""
    if a.device != b.device or 0 in a.shape or 0 in b.shape:
        return False
    low_a, high_a = extent(a)
    low_b, high_b = extent(b)
    if high_a <= low_b or high_b <= low_a:
        return False
    memory_a, memory_b = (np.asarray(_Interface(x._replace(readonly=True))) for x in (a, b))  # addresses only
    try:
        return bool(np.shares_memory(memory_a, memory_b, max_work=10_000))  # type: ignore[arg-type]
    except np.exceptions.TooHardError:
        return True


def extent(x: View) -> tuple[int, int]:
    """First byte of an array and the one behind its last."""
    size = x.dtype.itemsize
    reach = [(n - 1) * t * size for n, t in zip(x.shape, x.strides, strict=True)]
    return x.ptr + sum(r for r in reach if r < 0), x.ptr + sum(r for r in reach if r > 0) + size
