"""Arrays by DLPack, 1.x and legacy: capsules are parsed here, so that bfloat16 and float8 arrive."""

from __future__ import annotations

import ctypes
from typing import Any

from flashmoe_cupy import _cupy
from flashmoe_cupy.arrays.views import View, make, refused, row_major
from flashmoe_cupy.dtypes import accepted, from_dlpack

# ---- the structs of DLPack 1.1 ----

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


def read(x: Any, name: str, library: str = "dlpack") -> View:
    """The view of x. On a GPU its values are ready for work on the current CuPy stream of its device."""
    kind, ordinal = x.__dlpack_device__()
    if kind in (_CPU, _CUDA_HOST):
        return _open_capsule(_export(x, name, None), x, name, library)
    if kind not in (_CUDA, _CUDA_MANAGED):
        raise refused(x, name, f"DLPack device type {int(kind)} is neither CUDA nor the CPU")
    cuda = _cupy.with_driver().cuda
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
        raise refused(x, name, f"it cannot be exported by DLPack: {error}") from error


def _open_capsule(capsule: Any, x: object, name: str, library: str) -> View:
    """The view of a new capsule's tensor, which it then owns. If a check fails the capsule still owns it."""
    flags = 0
    managed: _Versioned | _Legacy
    if _capsule_is(capsule, b"dltensor_versioned"):
        pointer = _capsule_pointer(capsule, b"dltensor_versioned")
        managed = _Versioned.from_address(pointer)
        if managed.major != 1:  # of another major version the struct may be another
            raise refused(x, name, f"DLPack {managed.major}.{managed.minor} is not supported; 1.x is")
        flags, used = managed.flags, _USED_VERSIONED
    elif _capsule_is(capsule, b"dltensor"):
        pointer = _capsule_pointer(capsule, b"dltensor")
        managed, used = _Legacy.from_address(pointer), _USED
    else:
        raise refused(x, name, "__dlpack__ did not return an unused DLPack capsule")
    t = managed.tensor
    if t.device_type not in (_CPU, _CUDA, _CUDA_HOST, _CUDA_MANAGED):
        raise refused(x, name, f"DLPack device type {t.device_type} is neither CUDA nor the CPU")
    try:
        if t.lanes != 1:
            raise ValueError(f"DLPack dtype with {t.lanes} lanes is not supported")
        dtype = from_dlpack(t.code, t.bits)
    except ValueError as error:
        raise refused(x, name, str(error), f"{name} may be {accepted(name)}") from None
    shape = tuple(t.shape[: t.ndim]) if t.ndim else ()
    strides = tuple(t.strides[: t.ndim]) if t.ndim and t.strides else row_major(shape)
    ptr = (t.data or 0) + t.byte_offset
    device = t.device_id if t.device_type in (_CUDA, _CUDA_MANAGED) else -1
    # Writes to a producer's copy would be lost, so a copy counts as read-only.
    readonly = bool(flags & (_READ_ONLY | _COPIED)) or library == "jax"
    _capsule_rename(capsule, used)  # the view must call the deleter from now on, not the capsule
    owner = _Managed(x, pointer, managed.deleter)
    return make(View, (ptr, shape, strides, dtype, device, library, readonly, owner))
