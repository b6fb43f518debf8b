"""Handlers for XLA's foreign function interface, written with ctypes: no C++ and no build step.

XLA calls a registered function with one argument, a call frame: a C struct that holds the buffers, the attributes and a
table of functions (`xla/ffi/api/c_api.h`, shipped inside jaxlib). This module mirrors the few structs that a handler
reads. Every struct there begins with its own size, so each is checked before its fields are trusted, and a runtime with
another major version is refused. Checked against the headers of jaxlib 0.6.0 to 0.8.0 (API 0.1), 0.8.1 to 0.8.3 (0.2),
0.9.2 and 0.10.2 (0.3), 0.11.2 (0.4) and 0.12.0.1 (0.5).
"""

from __future__ import annotations

import ctypes
import struct
import sys
import threading
from collections.abc import Callable
from ctypes import POINTER, Structure, c_char_p, c_int32, c_int64, c_size_t, c_uint32, c_void_p
from typing import Any, NamedTuple

__all__ = ["CALL", "INVALID_ARGUMENT", "LOAD", "Call", "FfiError", "handler"]

# ---------------------------------------------------------------------------------------------------------------------
# the mirror: names and order as in c_api.h, without the prefix XLA_FFI_

_MAJOR = 0
_NEWEST_MINOR = 5  # the newest header this file was compared with
_MINOR_WITHOUT_TABLE = 1  # that of every XLA which asks for metadata without an API table

_METADATA = 1  # extension type
_COMMAND_BUFFER_COMPATIBLE = 1  # handler trait: the same device work each time, so it may be captured and replayed
_ATTR_SCALAR, _ATTR_STRING = 3, 4
_S64 = 5

_STAGE_INITIALIZE = 2
_STAGE_EXECUTE = 3

# error codes, those of absl::Status
INVALID_ARGUMENT = 3
_UNIMPLEMENTED = 12
_INTERNAL = 13


class _Extension(Structure):
    _fields_ = (("struct_size", c_size_t), ("type", c_int32), ("next", c_void_p))


class _ApiVersion(Structure):
    _fields_ = (("struct_size", c_size_t), ("extension", c_void_p), ("major", c_int32), ("minor", c_int32))


class _Metadata(Structure):
    # A state_type_id may follow; we have no state and leave it as it is.
    _fields_ = (("struct_size", c_size_t), ("api_version", _ApiVersion), ("traits", c_uint32))


class _MetadataExtension(Structure):
    _fields_ = (("base", _Extension), ("metadata", POINTER(_Metadata)))


class _Buffer(Structure):
    _fields_ = (
        ("struct_size", c_size_t),
        ("extension", c_void_p),
        ("dtype", c_int32),
        ("data", c_void_p),
        ("rank", c_int64),
        ("dims", POINTER(c_int64)),
    )


class _Buffers(Structure):
    """XLA_FFI_Args and XLA_FFI_Rets, which have one form."""

    _fields_ = (
        ("struct_size", c_size_t),
        ("extension", c_void_p),
        ("size", c_int64),
        ("types", POINTER(c_int32)),
        ("items", POINTER(c_void_p)),
    )


class _Attrs(Structure):
    _fields_ = (
        ("struct_size", c_size_t),
        ("extension", c_void_p),
        ("size", c_int64),
        ("types", POINTER(c_int32)),
        ("names", POINTER(c_void_p)),
        ("items", POINTER(c_void_p)),
    )


class _ByteSpan(Structure):
    _fields_ = (("ptr", c_void_p), ("len", c_size_t))


class _Scalar(Structure):
    _fields_ = (("dtype", c_int32), ("value", c_void_p))


class _CallFrame(Structure):
    _fields_ = (
        ("struct_size", c_size_t),
        ("extension", c_void_p),
        ("api", c_void_p),
        ("ctx", c_void_p),
        ("stage", c_int32),
        ("args", _Buffers),
        ("rets", _Buffers),
        ("attrs", _Attrs),
    )


class _Api(Structure):
    _fields_ = (
        ("struct_size", c_size_t),
        ("extension", c_void_p),
        ("api_version", _ApiVersion),
        ("internal_api", c_void_p),
        ("error_create", c_void_p),
        ("error_get_message", c_void_p),
        ("error_destroy", c_void_p),
        ("handler_register", c_void_p),
        ("stream_get", c_void_p),
        ("type_register", c_void_p),
        ("execution_context_get", c_void_p),
        ("state_set", c_void_p),
        ("state_get", c_void_p),
        ("device_memory_allocate", c_void_p),
        ("device_memory_free", c_void_p),
        ("thread_pool_schedule", c_void_p),
        ("thread_pool_num_threads", c_void_p),
        ("future_create", c_void_p),
        ("future_set_available", c_void_p),
        ("future_set_error", c_void_p),
        ("run_id_get", c_void_p),  # from here on: newer than API 0.1
        ("device_ordinal_get", c_void_p),
    )


class _ErrorCreate(Structure):
    _fields_ = (("struct_size", c_size_t), ("extension", c_void_p), ("message", c_char_p), ("code", c_int32))


class _StreamGet(Structure):
    _fields_ = (("struct_size", c_size_t), ("extension", c_void_p), ("ctx", c_void_p), ("stream", c_void_p))


class _DeviceOrdinalGet(Structure):
    _fields_ = (("struct_size", c_size_t), ("extension", c_void_p), ("ctx", c_void_p), ("ordinal", c_int32))


def _end(kind: type[Structure], field: str) -> int:
    """The size in bytes up to and with `field`: what struct_size must reach for the field to exist."""
    descriptor = getattr(kind, field)
    return int(descriptor.offset + descriptor.size)


_FRAME_SIZE = _end(_CallFrame, "attrs")
_API_SIZE = _end(_Api, "stream_get")
_API_ORDINAL_SIZE = _end(_Api, "device_ordinal_get")
_ERROR_CREATE_SIZE = _end(_ErrorCreate, "code")
_STREAM_GET_SIZE = _end(_StreamGet, "stream")
_ORDINAL_GET_SIZE = _end(_DeviceOrdinalGet, "ordinal")


def _word(*path: tuple[type[Structure], str]) -> int:
    """Where a field stands when its struct is read as 64-bit words; `path` leads through structs in structs."""
    return sum(int(getattr(kind, field).offset) for kind, field in path) // 8


# A frame is read as words in one go: a field of a ctypes struct costs as much as all of them.
_WORDS = c_int64 * (_FRAME_SIZE // 8)
_API, _CTX = _word((_CallFrame, "api")), _word((_CallFrame, "ctx"))
_STAGE, _ATTRS = _word((_CallFrame, "stage")), _word((_CallFrame, "attrs"))
_ARGS, _RETS = _word((_CallFrame, "args")), _word((_CallFrame, "rets"))
_SIZE, _TYPES, _ITEMS = _word((_Attrs, "size")), _word((_Attrs, "types")), _word((_Attrs, "items"))
_BUFFER_ITEMS = _word((_Buffers, "items"))
_DATA = _Buffer.data.offset

# The API's own functions only fill in a struct: keeping the lock of the interpreter is cheaper than giving it back.
_API_FUNCTION = ctypes.PYFUNCTYPE(c_void_p, c_void_p)
_HANDLER = ctypes.CFUNCTYPE(c_void_p, c_void_p)


# ---------------------------------------------------------------------------------------------------------------------
# the API of one XLA runtime (a process can hold several: each device plugin brings its own)


class FfiError(Exception):
    """A failure to report to XLA with a status code of its own."""

    def __init__(self, code: int, message: str) -> None:
        super().__init__(message)
        self.code = code


class _ForeignError(Exception):
    """An error object that XLA made and that goes back to XLA as it is, ownership included."""

    def __init__(self, pointer: int) -> None:
        super().__init__(pointer)
        self.pointer = pointer


class _Functions(NamedTuple):
    minor: int
    error_create: Any
    stream_get: Any
    device_ordinal_get: Any  # None: this runtime is too old to have it


_functions: dict[int, _Functions] = {}


def _api(address: int | None) -> _Functions:
    """The checked functions of the API struct at `address`."""
    found = _functions.get(address or 0)
    if found is not None:
        return found
    if not address:
        raise FfiError(_INTERNAL, "XLA's call frame has no API table")
    api = _Api.from_address(address)
    if api.struct_size < _API_SIZE:
        raise FfiError(_UNIMPLEMENTED, f"XLA's FFI table has {api.struct_size} bytes, not {_API_SIZE}: update jaxlib")
    version = api.api_version
    if version.major != _MAJOR:
        raise FfiError(
            _UNIMPLEMENTED,
            f"this XLA has FFI version {version.major}.{version.minor}, and flashmoe_cupy knows only {_MAJOR}.x: "
            "update flashmoe_cupy, or use an older jaxlib",
        )
    ordinal = api.device_ordinal_get if api.struct_size >= _API_ORDINAL_SIZE else None
    found = _Functions(
        int(version.minor),
        _API_FUNCTION(api.error_create),
        _API_FUNCTION(api.stream_get),
        _API_FUNCTION(ordinal) if ordinal else None,
    )
    _functions[address] = found
    return found


def _make_error(frame: int, code: int, message: str) -> int | None:
    """An XLA_FFI_Error for the handler to return; XLA copies the text and owns the object."""
    text = message.encode(errors="replace").replace(b"\0", b"?")
    request = _ErrorCreate(_ERROR_CREATE_SIZE, None, text, code)
    api = _CallFrame.from_address(frame).api
    if not api:  # only a question for metadata comes without: its answer still says version 0.0, which XLA refuses
        return None
    # Read directly: an unknown version is reported through this function too, which has been first in every version.
    return int(_API_FUNCTION(_Api.from_address(api).error_create)(ctypes.addressof(request)))


# ---------------------------------------------------------------------------------------------------------------------
# one call, as a handler sees it

LOAD, CALL = _STAGE_INITIALIZE, _STAGE_EXECUTE
"""Stages. LOAD comes before any CALL, never under graph capture, and the buffers then hold no data yet."""


class _Requests(threading.local):
    """The structs that ask XLA for a stream and a device, one of each per thread."""

    def __init__(self) -> None:
        self.stream = _StreamGet(_STREAM_GET_SIZE, None, None, None)
        self.stream_address = ctypes.addressof(self.stream)
        self.ordinal = _DeviceOrdinalGet(_ORDINAL_GET_SIZE, None, None, -1)
        self.ordinal_address = ctypes.addressof(self.ordinal)


_requests = _Requests()


class Call(NamedTuple):
    """One call of a handler, valid until the handler returns.

    stage: LOAD or CALL. key: the attribute "key". api, ctx: addresses of XLA's. words: the call frame.
    """

    stage: int
    key: int
    api: int
    ctx: int
    words: list[int]

    def inputs(self) -> list[int]:
        """Addresses of the arguments, dense and row-major; 0 where XLA gives no memory."""
        return self._buffers(_ARGS)

    def outputs(self) -> list[int]:
        """Addresses of the results, as `inputs`."""
        return self._buffers(_RETS)

    def _buffers(self, start: int) -> list[int]:
        count = self.words[start + _SIZE]
        if not count:
            return []
        items = (c_int64 * count).from_address(self.words[start + _BUFFER_ITEMS])
        return [c_int64.from_address(item + _DATA).value for item in items]

    def text(self) -> str:
        """The attribute "text"."""
        items = (c_int64 * 2).from_address(self.words[_ATTRS + _ITEMS])
        span = _ByteSpan.from_address(items[1])
        return ctypes.string_at(span.ptr, span.len).decode()

    def stream(self) -> int:
        """The CUDA stream that the work must be queued on, as an integer."""
        request = _requests.stream
        request.ctx = self.ctx
        error = _api(self.api).stream_get(_requests.stream_address)
        if error:
            raise _ForeignError(error)
        return request.stream or 0

    def device(self) -> int:
        """The ordinal of the device that the call runs on."""
        get = _api(self.api).device_ordinal_get
        if get is None:
            raise FfiError(_UNIMPLEMENTED, "this XLA does not tell a handler its device: update jaxlib and its plugin")
        request = _requests.ordinal
        request.ctx = self.ctx
        error = get(_requests.ordinal_address)
        if error:
            raise _ForeignError(error)
        return int(request.ordinal)


def _answer_metadata(frame: _CallFrame) -> bool:
    """Tell XLA our version and traits when it asks (at registration); checks the layout of the structs on the way."""
    address = frame.extension
    while address:
        extension = _Extension.from_address(address)
        if extension.type == _METADATA:
            break
        address = extension.next
    else:
        return False
    for name, part in (("Args", frame.args), ("Rets", frame.rets), ("Attrs", frame.attrs)):
        if part.struct_size < _end(type(part), "items"):
            raise FfiError(_UNIMPLEMENTED, f"XLA_FFI_{name} has {part.struct_size} bytes: an unknown layout")
    metadata = _MetadataExtension.from_address(address).metadata.contents
    if metadata.struct_size < _end(_Metadata, "traits"):
        raise FfiError(_UNIMPLEMENTED, f"XLA_FFI_Metadata has {metadata.struct_size} bytes: an unknown layout")
    # XLA accepts versions up to its own (until jaxlib 0.8.0 only its own), and later minors only add to the end of
    # structs. Until then it also asked without an API table.
    minor = min(_api(frame.api).minor, _NEWEST_MINOR) if frame.api else _MINOR_WITHOUT_TABLE
    metadata.api_version.major, metadata.api_version.minor = _MAJOR, minor
    metadata.traits = _COMMAND_BUFFER_COMPATIBLE
    return True


# The types of the attributes "key" (scalar) and "text" (string), two 32-bit numbers as one; XLA sorts them by name.
_EXPECTED_TYPES = int.from_bytes(struct.pack("=ii", _ATTR_SCALAR, _ATTR_STRING), sys.byteorder)


def _read(words: list[int]) -> Call:
    if words[_ATTRS + _SIZE] != 2 or c_int64.from_address(words[_ATTRS + _TYPES]).value != _EXPECTED_TYPES:
        raise FfiError(_INTERNAL, f"expected the attributes key and text, got {words[_ATTRS + _SIZE]} attributes")
    scalar = _Scalar.from_address(c_int64.from_address(words[_ATTRS + _ITEMS]).value)
    if scalar.dtype != _S64:
        raise FfiError(_INTERNAL, f'attribute "key" has XLA dtype {scalar.dtype}, expected a 64-bit integer')
    stage = words[_STAGE] & 0xFFFFFFFF  # an int, then padding
    return Call(stage, c_int64.from_address(scalar.value).value, words[_API], words[_CTX], words)


_handlers: list[Any] = []  # XLA forgets none that it was given


def handler(run: Callable[[Call], None]) -> Any:
    """A C function for XLA that calls `run(call)`. It lives as long as the process does.

    An exception in `run` becomes an XLA error with the exception's text; ValueError and its kin count as
    INVALID_ARGUMENT, others as INTERNAL. Nothing escapes into XLA's threads.
    """

    def entry(address: int) -> int | None:
        try:
            words = _WORDS.from_address(address)[:]
            if words[0] < _FRAME_SIZE:
                raise FfiError(_UNIMPLEMENTED, f"XLA's call frame has {words[0]} bytes: unknown layout")
            if words[1] and _answer_metadata(_CallFrame.from_address(address)):
                return None
            run(_read(words))
        except _ForeignError as error:
            return error.pointer
        except FfiError as error:
            return _make_error(address, error.code, str(error))
        except BaseException as error:
            code = INVALID_ARGUMENT if isinstance(error, ValueError) else _INTERNAL
            return _make_error(address, code, f"{type(error).__name__}: {error}")
        return None

    _handlers.append(_HANDLER(entry))
    return _handlers[-1]
