"""Results in the caller's library, on its stream, and the memory of arguments until the GPU has read them."""

from __future__ import annotations

import contextlib
import sys
import threading
from collections import deque
from collections.abc import Iterable
from typing import Any

import numpy as np

from flashmoe_cupy import _cupy
from flashmoe_cupy.arrays.views import View
from flashmoe_cupy.dtypes import DType, to_numpy
from flashmoe_cupy.dtypes import from_numpy as dtype_of


def empty(like: View, shape: tuple[int, ...], dtype: DType) -> Any:
    """A new, row-major array for results: like's library, device and allocator, on the current stream.

    JAX arrays cannot be written: there it is a NumPy or CuPy array.
    """
    if like.library == "torch":
        torch = sys.modules["torch"]
        owner: Any = like.owner
        return torch.empty(shape, dtype=getattr(torch, dtype.name), device=owner.device)
    if like.device < 0:
        return np.empty(shape, to_numpy(dtype))
    cupy = _cupy.with_driver()
    storage = np.dtype(np.uint8) if dtype.name.startswith("float8") else to_numpy(dtype)  # CuPy creates no float8
    here = cupy.cuda.runtime.getDevice() == like.device
    with contextlib.nullcontext() if here else cupy.cuda.Device(like.device):
        array = cupy.ndarray(shape, storage)
    return array if storage == to_numpy(dtype) else array.view(to_numpy(dtype))


def fill(like: View, array: Any, value: float) -> None:
    """Write `value` everywhere into an array that `empty` made, on the current stream."""
    if like.library == "torch":
        array.fill_(value)
        return
    with contextlib.nullcontext() if like.device < 0 else _cupy.with_driver().cuda.Device(like.device):
        array.fill(value)


def from_numpy(like: View, a: np.ndarray[Any, np.dtype[Any]]) -> Any:
    """`a` in like's library: torch and JAX on like's device, NumPy for all others.

    The result may share a's memory: do not write to `a` afterwards. What torch cannot wrap is copied.
    """
    if like.library == "torch":
        return _to_torch(like, a)
    if like.library == "jax":
        source: Any = getattr(like.owner, "source", None)
        return sys.modules["jax"].device_put(a, next(iter(source.devices())))
    return a


def _to_torch(like: View, a: np.ndarray[Any, np.dtype[Any]]) -> Any:
    torch = sys.modules["torch"]
    dtype = dtype_of(a.dtype)
    if not a.flags.writeable or any(t < 0 for t in a.strides):  # torch takes neither
        a = a.copy()
    foreign = dtype.name.startswith(("bfloat", "float8"))  # dtypes that torch.from_numpy refuses
    tensor = torch.from_numpy(a.view(f"u{a.itemsize}") if foreign else a)
    owner: Any = like.owner
    return (tensor.view(getattr(torch, dtype.name)) if foreign else tensor).to(owner.device)


# ---- streams ----


def stream(v: View) -> int:
    """The current CUDA stream of v's device, as a pointer: torch's for torch, else CuPy's; 0 on the host. No wait."""
    if v.device < 0:
        return 0
    if v.library == "torch":
        torch = sys.modules["torch"]
        raw = getattr(torch._C, "_cuda_getCurrentRawStream", None)
        return int(raw(v.device) if raw is not None else torch.cuda.current_stream(v.device).cuda_stream)
    return int(_cupy.with_driver().cuda.get_current_stream(v.device).ptr)


_pending: deque[tuple[Any, list[object]]] = deque()
_pending_lock = threading.Lock()


def keep_until_done(views: Iterable[View]) -> None:
    """Keep borrowed GPU memory alive until all that is queued on the current stream is done; call after the launch.

    JAX and strangers may free and reuse memory on a stream of their own; torch and CuPy free in stream order.
    """
    borrowed = [v for v in views if v.device >= 0 and v.library in ("jax", "dlpack", "cai")]
    if not borrowed:
        return
    cupy = _cupy.with_driver()
    with cupy.cuda.Device(borrowed[0].device), _pending_lock:
        while _pending and _pending[0][0].done:
            _pending.popleft()
        current = cupy.cuda.get_current_stream()
        if not current.is_capturing():  # who replays a captured graph must keep its arguments alive
            _pending.append((current.record(cupy.cuda.Event(disable_timing=True)), [v.owner for v in borrowed]))
