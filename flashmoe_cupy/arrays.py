"""Arrays of any library as a thin `View`, and results back in the caller's library.

NumPy, CuPy and torch are read by their attributes; all others come through DLPack (1.x and legacy, parsed here so that
bfloat16 and float8 arrive) or `__cuda_array_interface__` version 3. Frameworks are found in `sys.modules` when an array
arrives; only strangers on a GPU import CuPy, because their results are CuPy arrays.
"""

from __future__ import annotations

import contextlib
import ctypes
import math
import operator
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterable
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np

from flashmoe_cupy._cupy import load as load_cupy
from flashmoe_cupy.dtypes import ALL, DType, accepted, from_dlpack, to_numpy
from flashmoe_cupy.dtypes import from_numpy as _dtype_of
from flashmoe_cupy.errors import DependencyError, UnsupportedProblem
from flashmoe_cupy.torch_reasons import instead, reasons


class View(NamedTuple):
    """Where an array is and how it is laid out. Valid as long as the view itself is alive."""

    ptr: int  # address of the first element; 0 is possible for empty arrays
    shape: tuple[int, ...]
    strides: tuple[int, ...]  # in elements
    dtype: DType
    device: int  # CUDA ordinal, -1 for host memory
    library: str  # "numpy", "cupy", "torch", "jax", "dlpack" or "cai"
    readonly: bool
    owner: object  # keeps the memory alive


Adapter = Callable[[Any, str], View]
_adapters: dict[type, Adapter] = {}  # one entry per array type that was met
_make: Callable[[type[View], tuple[object, ...]], View] = tuple.__new__  # skips NamedTuple's own __new__


def view(array: Any, name: str) -> View:
    """The view of `array`; nothing is copied. `name` is the argument's name for the error text.

    Raises TypeError for what is no array, UnsupportedProblem for an array that cannot be read as it is.
    GPU arrays that are not torch's or CuPy's are ordered before the current CuPy stream.
    """
    adapter = _adapters.get(type(array))
    return adapter(array, name) if adapter is not None else _find(array, name)(array, name)


def _find(array: Any, name: str) -> Adapter:
    """The adapter for a type met for the first time. Strangers are asked anew each time."""
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
            f"__cuda_array_interface__, but is {'None' if array is None else f'a {_type_name(array)}'}"
        )
    _adapters[type(array)] = adapter
    return adapter


def _type_name(array: object) -> str:
    return f"{type(array).__module__}.{type(array).__qualname__}"


def _refuse(array: object, name: str, why: str | list[str], hint: str = "") -> UnsupportedProblem:
    return UnsupportedProblem(f"argument {name} ({_type_name(array)})", [why] if isinstance(why, str) else why, hint)


# ---- NumPy and CuPy: byte strides, NumPy dtypes ----


def _elements(x: Any, name: str) -> tuple[DType, tuple[int, ...]]:
    """dtype and strides in elements of an array with NumPy's attributes."""
    try:
        dtype = _dtype_of(x.dtype)
    except ValueError as error:
        raise _refuse(x, name, str(error), f"{name} may be {accepted(name)}") from None
    return dtype, _in_elements(x, name, x.strides, dtype.itemsize)


def _in_elements(x: object, name: str, byte_strides: tuple[int, ...], size: int) -> tuple[int, ...]:
    for t in byte_strides:
        if t % size:
            raise _refuse(x, name, f"strides {byte_strides} bytes are not multiples of the item size {size}")
    return tuple([t // size for t in byte_strides])


def _numpy(x: Any, name: str) -> View:
    if isinstance(x, np.ma.MaskedArray):
        raise _refuse(x, name, "masked arrays are not read: the mask would be lost", "pass x.data and a bias")
    dtype, strides = _elements(x, name)
    return _make(View, (x.ctypes.data, x.shape, strides, dtype, -1, "numpy", not x.flags.writeable, x))


def _cupy_array(x: Any, name: str) -> View:
    dtype, strides = _elements(x, name)
    data = x.data
    return _make(View, (data.ptr, x.shape, strides, dtype, data.device_id, "cupy", False, x))


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
        if not plain and (why := reasons(torch, x, wrapper, dtype)):
            raise _refuse(x, name, why, f"{name} may be {accepted(name)}" if dtype is None else instead(x, name))
        return _make(View, (x.data_ptr(), tuple(x.shape), x.stride(), dtype, x.get_device(), "torch", False, x))

    return adapt


# ---- JAX ----


def _jax_tracer(x: Any, name: str) -> View:
    reason = "the array is traced (jit, grad, vmap or another transform), so there is no memory to read"
    raise _refuse(x, name, reason, "inside transforms all arrays of a call must be JAX's")


def _jax(x: Any, name: str) -> View:
    if x.is_deleted():
        raise _refuse(x, name, "the array was deleted or donated")
    devices = x.devices()
    if len(devices) != 1:
        raise _refuse(x, name, f"the array is spread over {len(devices)} devices", "use jax.shard_map")
    device = next(iter(devices))
    if device.platform not in ("cpu", "gpu", "cuda"):
        raise _refuse(x, name, f"platform {device.platform} is neither a GPU nor the CPU")
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
        raise _refuse(x, name, "masked arrays are not read: the mask would be lost")
    try:
        dtype = _dtype_of(np.dtype(info["typestr"]))
    except (TypeError, ValueError):
        hint = "bfloat16 and float8 have no typestr; offer __dlpack__ instead"
        raise _refuse(x, name, f"typestr {info['typestr']!r} has no counterpart here", hint) from None
    shape = tuple([operator.index(n) for n in info["shape"]])
    ptr, readonly = info["data"]
    given = info.get("strides")
    steps = tuple([operator.index(t) for t in given or ()])
    strides = row_major(shape) if given is None else _in_elements(x, name, steps, dtype.itemsize)
    device = _pointer_device(x, name, ptr or 0)
    stream = info.get("stream")
    if stream is not None:
        _wait(int(stream), device)
    return _make(View, (ptr or 0, shape, strides, dtype, device, "cai", bool(readonly), x))


def row_major(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Row-major strides in elements."""
    return tuple(math.prod(shape[i + 1 :]) for i in range(len(shape)))


def _pointer_device(x: object, name: str, ptr: int) -> int:
    """The CUDA ordinal that owns `ptr`; the current device for a null pointer."""
    runtime = _cupy().cuda.runtime
    if not ptr:
        return int(runtime.getDevice())
    attributes = runtime.pointerGetAttributes(ptr)
    if attributes.type not in (2, 3):  # device, managed
        raise _refuse(x, name, "__cuda_array_interface__ points to memory that no GPU owns")
    return int(attributes.device)


def _wait(producer: int, device: int) -> None:
    """Order the current CuPy stream of `device` after all that is queued on the stream `producer`; the host goes on."""
    cupy = _cupy()
    with cupy.cuda.Device(device):
        current = cupy.cuda.get_current_stream().ptr
        if (current or 1) != (producer or 1):  # 0 and 1 are both the legacy default stream
            event = cupy.cuda.Event(disable_timing=True)
            cupy.cuda.runtime.eventRecord(event.ptr, producer)
            cupy.cuda.runtime.streamWaitEvent(current, event.ptr)


_gpu: Any = None  # CuPy, once it was seen to work


def _cupy() -> Any:
    """CuPy on a machine with a driver. Raises DependencyError where one of the two is missing."""
    global _gpu
    if _gpu is None:
        cupy = load_cupy("an array on a GPU")
        try:
            cupy.cuda.runtime.getDeviceCount()
        except RuntimeError as error:  # the base of CuPy's own errors
            raise DependencyError(f"GPU arrays need a working NVIDIA driver ({error}); NumPy arrays do not") from error
        _gpu = cupy
    return _gpu


# ---- DLPack: the structs of DLPack 1.1 ----

_CPU, _CUDA, _CUDA_HOST, _CUDA_MANAGED = 1, 2, 3, 13
_READ_ONLY, _COPIED = 1, 2  # bits of `flags`


class _Tensor(ctypes.Structure):
    _fields_ = (
        ("data", ctypes.c_void_p), ("device_type", ctypes.c_int32), ("device_id", ctypes.c_int32),
        ("ndim", ctypes.c_int32), ("code", ctypes.c_uint8), ("bits", ctypes.c_uint8), ("lanes", ctypes.c_uint16),
        ("shape", ctypes.POINTER(ctypes.c_int64)), ("strides", ctypes.POINTER(ctypes.c_int64)),
        ("byte_offset", ctypes.c_uint64),
    )  # fmt: skip


class _Legacy(ctypes.Structure):
    _fields_ = (("tensor", _Tensor), ("context", ctypes.c_void_p), ("deleter", ctypes.c_void_p))


class _Versioned(ctypes.Structure):
    _fields_ = (
        ("major", ctypes.c_uint32), ("minor", ctypes.c_uint32), ("context", ctypes.c_void_p),
        ("deleter", ctypes.c_void_p), ("flags", ctypes.c_uint64), ("tensor", _Tensor),
    )  # fmt: skip


# PYFUNCTYPE keeps the GIL: producers written in Python touch reference counts in their deleter.
_Deleter = ctypes.PYFUNCTYPE(None, ctypes.c_void_p)
_Query = ctypes.PYFUNCTYPE(ctypes.c_int, ctypes.py_object, ctypes.c_char_p)
_Getter = ctypes.PYFUNCTYPE(ctypes.c_void_p, ctypes.py_object, ctypes.c_char_p)
_capsule_is = _Query(("PyCapsule_IsValid", ctypes.pythonapi))
_capsule_pointer = _Getter(("PyCapsule_GetPointer", ctypes.pythonapi))
_capsule_rename = _Query(("PyCapsule_SetName", ctypes.pythonapi))
# The capsule keeps only the address of its name, so these bytes live as long as the module.
_USED, _USED_VERSIONED = b"used_dltensor", b"used_dltensor_versioned"


class _Managed:
    """Owns one managed tensor: calls its deleter once, when the last view is gone."""

    __slots__ = ("call", "pointer", "source")

    def __init__(self, source: object, pointer: int, deleter: int | None) -> None:
        self.source, self.pointer = source, pointer
        self.call = _Deleter(deleter) if deleter else None  # the standard allows a null deleter

    def __del__(self) -> None:
        call, self.call = self.call, None
        if call is not None:
            call(self.pointer)


def _dlpack(x: Any, name: str, library: str = "dlpack") -> View:
    kind, ordinal = x.__dlpack_device__()
    if kind in (_CPU, _CUDA_HOST):
        return _open_capsule(_export(x, name, None), x, name, library)
    if kind not in (_CUDA, _CUDA_MANAGED):
        raise _refuse(x, name, f"DLPack device type {int(kind)} is neither CUDA nor the CPU")
    cuda = _cupy().cuda
    with cuda.Device(int(ordinal)):
        consumer = cuda.get_current_stream().ptr or 1  # DLPack forbids 0; 1 is the legacy default stream
        return _open_capsule(_export(x, name, consumer), x, name, library)


def _export(x: Any, name: str, stream: int | None) -> Any:
    """A capsule of x, whose values are ready for work on `stream`."""
    try:
        try:
            return x.__dlpack__(stream=stream, max_version=(1, 1))
        except TypeError:  # a producer from before DLPack 1.0
            return x.__dlpack__(stream=stream)
    except BufferError as error:
        raise _refuse(x, name, f"it cannot be exported by DLPack: {error}") from error


def _open_capsule(capsule: Any, x: object, name: str, library: str) -> View:
    """Take over the managed tensor of a fresh capsule. Until all is checked the capsule stays its owner."""
    flags = 0
    managed: _Versioned | _Legacy
    if _capsule_is(capsule, b"dltensor_versioned"):
        pointer = _capsule_pointer(capsule, b"dltensor_versioned")
        managed = _Versioned.from_address(pointer)
        if managed.major != 1:  # the rest of the struct may look different
            raise _refuse(x, name, f"DLPack {managed.major}.{managed.minor} is not supported; 1.x is")
        flags, used = managed.flags, _USED_VERSIONED
    elif _capsule_is(capsule, b"dltensor"):
        pointer = _capsule_pointer(capsule, b"dltensor")
        managed, used = _Legacy.from_address(pointer), _USED
    else:
        raise _refuse(x, name, "__dlpack__ did not return an unused DLPack capsule")
    t = managed.tensor
    if t.device_type not in (_CPU, _CUDA, _CUDA_HOST, _CUDA_MANAGED):
        raise _refuse(x, name, f"DLPack device type {t.device_type} is neither CUDA nor the CPU")
    try:
        if t.lanes != 1:
            raise ValueError(f"DLPack dtype with {t.lanes} lanes is not supported")
        dtype = from_dlpack(t.code, t.bits)
    except ValueError as error:
        raise _refuse(x, name, str(error), f"{name} may be {accepted(name)}") from None
    shape = tuple(t.shape[: t.ndim]) if t.ndim else ()
    strides = tuple(t.strides[: t.ndim]) if t.ndim and t.strides else row_major(shape)
    ptr = (t.data or 0) + t.byte_offset
    device = t.device_id if t.device_type in (_CUDA, _CUDA_MANAGED) else -1
    # Writes to a producer's copy would be lost, so a copy counts as read-only.
    readonly = bool(flags & (_READ_ONLY | _COPIED)) or library == "jax"
    _capsule_rename(capsule, used)  # from here on the deleter is ours to call
    owner = _Managed(x, pointer, managed.deleter)
    return _make(View, (ptr, shape, strides, dtype, device, library, readonly, owner))


# ---- results in the caller's library ----


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
    cupy = _cupy()
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
    with contextlib.nullcontext() if like.device < 0 else _cupy().cuda.Device(like.device):
        array.fill(value)


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
    dtype = _dtype_of(a.dtype)
    if not a.flags.writeable or any(t < 0 for t in a.strides):  # torch takes neither
        a = a.copy()
    foreign = dtype.name.startswith(("bfloat", "float8"))  # torch.from_numpy does not know them
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
    return int(_cupy().cuda.get_current_stream(v.device).ptr)


_pending: deque[tuple[Any, list[object]]] = deque()
_pending_lock = threading.Lock()


def keep_until_done(views: Iterable[View]) -> None:
    """Keep borrowed GPU memory alive until all that is queued on the current stream is done; call after the launch.

    JAX and strangers may free and reuse memory on a stream of their own; torch and CuPy free in stream order.
    """
    borrowed = [v for v in views if v.device >= 0 and v.library in ("jax", "dlpack", "cai")]
    if not borrowed:
        return
    cupy = _cupy()
    with cupy.cuda.Device(borrowed[0].device), _pending_lock:
        while _pending and _pending[0][0].done:
            _pending.popleft()
        current = cupy.cuda.get_current_stream()
        if not current.is_capturing():  # a captured graph's memory is its owner's duty
            _pending.append((current.record(cupy.cuda.Event(disable_timing=True)), [v.owner for v in borrowed]))
