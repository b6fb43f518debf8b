"""The short way in for plain torch and CuPy arrays on a GPU: key, pointers and outputs, with as few reads as possible.

A view of an array costs a microsecond or two, and a call has three; what is read here is only what tells one validated
call from another. Anything unusual (gradients, subclasses, another library, host arrays) gives None, and the call takes
the long way through `arrays.view`, which explains itself.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any, NamedTuple


class Quick(NamedTuple):
    """How one array type is read."""

    key: Callable[[Any, Any, Any], tuple[Any, ...] | None]  # q, k, v -> what decides the plan, or None
    pointer: Callable[[Any], int]
    empty: Callable[[Any, tuple[int, ...]], Any]  # like q, of a shape -> new array on q's device
    empty_float: Callable[[Any, tuple[int, ...]], Any]  # the same in float32
    device: Callable[[Any], int]
    stream: Callable[[int], int]


_known: dict[type, Quick | None] = {}


def find(kind: type) -> Quick | None:
    """The quick access for an array type; None when it has none."""
    try:
        return _known[kind]
    except KeyError:
        pass
    torch: Any = sys.modules.get("torch")
    cupy: Any = sys.modules.get("cupy")
    quick = None
    if kind is getattr(torch, "Tensor", None) and hasattr(torch._C, "_cuda_getCurrentRawStream"):
        quick = _torch(torch)
    elif kind is getattr(cupy, "ndarray", None):
        quick = _cupy(cupy)
    elif kind.__module__.partition(".")[0] in ("torch", "cupy"):
        return None  # perhaps half imported: ask again next time
    _known[kind] = quick
    return quick


def _torch(torch: Any) -> Quick:
    kind, float32 = torch.Tensor, torch.float32
    level = torch.autograd.forward_ad

    def key(q: Any, k: Any, v: Any) -> tuple[Any, ...] | None:
        if not (
            type(k) is kind
            and type(v) is kind
            and q.is_cuda
            and not (q.requires_grad or k.requires_grad or v.requires_grad)
            and level._current_level < 0
            and not (q.is_neg() or k.is_neg() or v.is_neg())
        ):
            return None
        return (
            q.shape, k.shape, v.shape, q.stride(), k.stride(), v.stride(), q.dtype, k.dtype, v.dtype,
            q.get_device(), k.get_device(), v.get_device(),
        )  # fmt: skip

    def empty(q: Any, shape: tuple[int, ...]) -> Any:
        return q.new_empty(shape)

    def empty_float(q: Any, shape: tuple[int, ...]) -> Any:
        return q.new_empty(shape, dtype=float32)

    return Quick(key, kind.data_ptr, empty, empty_float, kind.get_device, torch._C._cuda_getCurrentRawStream)


def _cupy(cupy: Any) -> Quick:
    kind, float32 = cupy.ndarray, cupy.dtype("float32")
    new, current, get_device = cupy.ndarray, cupy.cuda.get_current_stream, cupy.cuda.runtime.getDevice

    def key(q: Any, k: Any, v: Any) -> tuple[Any, ...] | None:
        if type(k) is not kind or type(v) is not kind:
            return None
        device = q.data.device_id
        if device != get_device() or device != k.data.device_id or device != v.data.device_id:
            return None
        # A dtype hashes slowly; its number does not, and means the same type as long as the process lives.
        return (
            q.shape, k.shape, v.shape, q.strides, k.strides, v.strides, q.dtype.num, k.dtype.num, v.dtype.num, device,
        )  # fmt: skip

    def pointer(x: Any) -> int:
        return int(x.data.ptr)

    def empty(q: Any, shape: tuple[int, ...]) -> Any:
        return new(shape, q.dtype)

    def empty_float(q: Any, shape: tuple[int, ...]) -> Any:  # noqa: ARG001
        return new(shape, float32)

    def device(q: Any) -> int:
        return int(q.data.device_id)

    def stream(device: int) -> int:
        return int(current(device).ptr)

    return Quick(key, pointer, empty, empty_float, device, stream)
