"""From an array of any library to its view.

NumPy, CuPy and torch are read by their attributes; all others come through DLPack or `__cuda_array_interface__`
version 3. Frameworks are found in `sys.modules` when an array arrives; only strangers on a GPU import CuPy, because
their results are CuPy arrays.
"""

from __future__ import annotations

import operator
import sys
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np

from flashmoe_cupy import _cupy
from flashmoe_cupy.arrays.views import View, make, refused, row_major, type_name
from flashmoe_cupy.dtypes import ALL, DType, accepted, from_numpy

Adapter = Callable[[Any, str], View]
_adapters: dict[type, Adapter] = {}  # by array type; filled when the first array of a type arrives


def view(array: Any, name: str) -> View:
    """The view of `array`; nothing is copied. `name` is the argument's name for the error text.

    Raises TypeError for what is no array, UnsupportedProblem for an array that cannot be read as it is.
    GPU arrays that are not torch's or CuPy's are ordered before the current CuPy stream.
    """
    adapter = _adapters.get(type(array))
    return adapter(array, name) if adapter is not None else _find(array, name)(array, name)


def _find(array: Any, name: str) -> Adapter:
    """The adapter for an array type that has none yet. Types of no known library get none: each array is asked."""
    torch: Any = sys.modules.get("torch")
    cupy: Any = sys.modules.get("cupy")
    jax: Any = sys.modules.get("jax")
    adapter: Adapter
    if isinstance(array, np.ndarray):
        adapter = _numpy
    elif hasattr(torch, "Tensor") and isinstance(array, torch.Tensor):  # a half-imported module lacks the name
        adapter = _torch_adapter(torch, type(array))
    elif hasattr(cupy, "ndarray") and isinstance(array, cupy.ndarray):
        adapter = _cupy_array
    elif hasattr(jax, "Array") and isinstance(array, jax.Array):
        adapter = _jax_tracer if isinstance(array, jax.core.Tracer) else _jax
    elif hasattr(array, "__dlpack__") and hasattr(array, "__dlpack_device__"):
        return _dlpack
    elif hasattr(array, "__cuda_array_interface__"):
        return _cai
    else:
        raise TypeError(
            f"{name} must be an array of NumPy, CuPy, torch or JAX, or an object with __dlpack__ or "
            f"__cuda_array_interface__, but is {'None' if array is None else f'a {type_name(array)}'}"
        )
    _adapters[type(array)] = adapter
    return adapter


# ---- NumPy and CuPy: byte strides, NumPy dtypes ----


def elements(x: Any, name: str) -> tuple[DType, tuple[int, ...]]:
    """dtype and strides in elements of an array with NumPy's attributes."""
    try:
        dtype = from_numpy(x.dtype)
    except ValueError as error:
        raise refused(x, name, str(error), f"{name} may be {accepted(name)}") from None
    return dtype, in_elements(x, name, x.strides, dtype.itemsize)


def in_elements(x: object, name: str, byte_strides: tuple[int, ...], size: int) -> tuple[int, ...]:
    for t in byte_strides:
        if t % size:
            raise refused(x, name, f"strides {byte_strides} bytes are not multiples of the item size {size}")
    return tuple([t // size for t in byte_strides])


def _numpy(x: Any, name: str) -> View:
    if isinstance(x, np.ma.MaskedArray):
        raise refused(x, name, "masked arrays are not read: the mask would be lost", "pass x.data and a bias")
    dtype, strides = elements(x, name)
    return make(View, (x.ctypes.data, x.shape, strides, dtype, -1, "numpy", not x.flags.writeable, x))


def _cupy_array(x: Any, name: str) -> View:
    dtype, strides = elements(x, name)
    data = x.data
    return make(View, (data.ptr, x.shape, strides, dtype, data.device_id, "cupy", False, x))


# ---- torch ----


def _torch_adapter(torch: Any, kind: type) -> Adapter:
    dtypes = {getattr(torch, d.name): d for d in ALL if hasattr(torch, d.name)}  # old versions lack some
    grad_enabled = torch.is_grad_enabled
    forward_ad = sys.modules.get("torch.autograd.forward_ad")
    # Subclasses with their own dispatch (fake, distributed, functional tensors) are not one block of memory.
    wrapper = getattr(kind, "__torch_dispatch__", None) is not getattr(torch.Tensor, "__torch_dispatch__", None)

    def adapt(x: Any, name: str) -> View:
        dtype = dtypes.get(x.dtype)
        try:
            plain = not (
                wrapper
                or dtype is None
                or (x.requires_grad and grad_enabled())
                or getattr(forward_ad, "_current_level", -1) >= 0
                or x.is_neg()
                or x.is_nested
                or not (x.is_cuda or x.is_cpu)
            ) and (x.data_ptr() or x.numel() == 0)
        except RuntimeError:  # no storage: sparse, or inside vmap, grad and their kin
            plain = False
        if not plain:
            from flashmoe_cupy.torch_reasons import instead, reasons  # words of errors alone

            if why := reasons(torch, x, wrapper, dtype):
                raise refused(x, name, why, f"{name} may be {accepted(name)}" if dtype is None else instead(x, name))
        return make(View, (x.data_ptr(), tuple(x.shape), x.stride(), dtype, x.get_device(), "torch", False, x))

    return adapt


# ---- JAX ----


def _dlpack(x: Any, name: str, library: str = "dlpack") -> View:
    from flashmoe_cupy.arrays.dlpack import read  # whose structs take as long to make as all readers

    return read(x, name, library)


def _jax_tracer(x: Any, name: str) -> View:
    reason = "the array is traced (jit, grad, vmap or another transform), so there is no memory to read"
    raise refused(x, name, reason, "inside transforms all arrays of a call must be JAX's")


def _jax(x: Any, name: str) -> View:
    if x.is_deleted():
        raise refused(x, name, "the array was deleted or donated")
    devices = x.devices()
    if len(devices) != 1:
        raise refused(x, name, f"the array is spread over {len(devices)} devices", "use jax.shard_map")
    device = next(iter(devices))
    if device.platform not in ("cpu", "gpu", "cuda"):
        raise refused(x, name, f"platform {device.platform} is neither a GPU nor the CPU")
    ordinal = -1 if device.platform == "cpu" else int(device.local_hardware_id)
    if ordinal >= 0 and x.size:
        return _dlpack(x, name, "jax")
    host = np.asarray(x)  # no copy; waits for the value. Empty GPU arrays have no address to export
    owner = SimpleNamespace(source=x, keep=host)
    return _numpy(host, name)._replace(device=ordinal, library="jax", readonly=True, owner=owner)


# ---- __cuda_array_interface__ ----


def _cai(x: Any, name: str) -> View:
    info = x.__cuda_array_interface__
    if info.get("mask") is not None:
        raise refused(x, name, "masked arrays are not read: the mask would be lost")
    try:
        dtype = from_numpy(np.dtype(info["typestr"]))
    except (TypeError, ValueError):
        hint = "bfloat16 and float8 have no typestr; offer __dlpack__ instead"
        raise refused(x, name, f"typestr {info['typestr']!r} has no counterpart here", hint) from None
    shape = tuple([operator.index(n) for n in info["shape"]])
    ptr, readonly = info["data"]
    given = info.get("strides")
    byte_strides = tuple([operator.index(t) for t in given or ()])
    strides = row_major(shape) if given is None else in_elements(x, name, byte_strides, dtype.itemsize)
    device = _pointer_device(x, name, ptr or 0)
    stream = info.get("stream")
    if stream is not None:
        _wait(int(stream), device)
    return make(View, (ptr or 0, shape, strides, dtype, device, "cai", bool(readonly), x))


def _pointer_device(x: object, name: str, ptr: int) -> int:
    """The CUDA ordinal that owns `ptr`; the current device for a null pointer."""
    runtime = _cupy.with_driver().cuda.runtime
    if not ptr:
        return int(runtime.getDevice())
    attributes = runtime.pointerGetAttributes(ptr)
    if attributes.type not in (2, 3):  # device, managed
        raise refused(x, name, "__cuda_array_interface__ points to memory that no GPU owns")
    return int(attributes.device)


def _wait(producer: int, device: int) -> None:
    """Order the current CuPy stream of `device` after all that is queued on the stream `producer`; the host goes on."""
    cupy = _cupy.with_driver()
    with cupy.cuda.Device(device):
        current = cupy.cuda.get_current_stream().ptr
        if (current or 1) != (producer or 1):  # 0 and 1 are both the legacy default stream
            event = cupy.cuda.Event(disable_timing=True)
            cupy.cuda.runtime.eventRecord(event.ptr, producer)
            cupy.cuda.runtime.streamWaitEvent(current, event.ptr)
