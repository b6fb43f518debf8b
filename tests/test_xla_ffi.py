"""The mirror of XLA's FFI structs: versions, sizes, and what a handler says when it does not know the runtime."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from flashmoe_cupy import _xla_ffi as ffi


class _Runtime:
    """A false XLA: an API table whose errors are Python strings, and call frames to give to a handler."""

    def __init__(self, major: int = 0, minor: int = 3) -> None:
        self.errors: list[tuple[int, str]] = []

        def create(address: int) -> int:
            request = ffi._ErrorCreate.from_address(address)
            self.errors.append((request.code, (request.message or b"").decode()))
            return 0x1234

        self.create = ffi._API_FUNCTION(create)
        self.api = ffi._Api(struct_size=ctypes.sizeof(ffi._Api))
        self.api.api_version = ffi._ApiVersion(24, None, major, minor)
        self.api.error_create = self.api.stream_get = ctypes.cast(self.create, ctypes.c_void_p).value
        self.frame = ffi._CallFrame(struct_size=ffi._FRAME_SIZE, api=ctypes.addressof(self.api), stage=3)
        for part in (self.frame.args, self.frame.rets, self.frame.attrs):
            part.struct_size = type(part).items.offset + 8
        self.metadata = ffi._Metadata(struct_size=ffi._end(ffi._Metadata, "traits"))
        self.extension = ffi._MetadataExtension(
            ffi._Extension(ctypes.sizeof(ffi._MetadataExtension), 1, None), ctypes.pointer(self.metadata)
        )

    def call(self, *, metadata: bool) -> Any:
        self.frame.extension = ctypes.addressof(self.extension) if metadata else None
        return ffi.handler(lambda call: None)(ctypes.addressof(self.frame))

    def close(self) -> None:
        ffi._functions.pop(ctypes.addressof(self.api), None)  # the next false XLA may get the same address


@pytest.fixture
def runtimes() -> Iterator[Callable[..., _Runtime]]:
    made: list[_Runtime] = []

    def make(**version: int) -> _Runtime:
        made.append(_Runtime(**version))
        return made[-1]

    yield make
    for runtime in made:
        runtime.close()


@pytest.mark.parametrize(("theirs", "ours"), [(1, 1), (3, 3), (4, 4), (5, 5), (9, 5)])
def test_ffi_version(theirs: int, ours: int, runtimes: Callable[..., _Runtime]) -> None:
    runtime = runtimes(minor=theirs)
    assert not runtime.call(metadata=True), runtime.errors
    version = runtime.metadata.api_version
    assert (version.major, version.minor, runtime.metadata.traits) == (0, ours, 1)


def test_ffi_metadata_without_a_table(runtimes: Callable[..., _Runtime]) -> None:
    """So XLA asks until jaxlib 0.8.0. No error can be made then: the answer keeps a version that XLA refuses."""
    runtime = runtimes(minor=1)
    runtime.frame.api = None
    assert not runtime.call(metadata=True)
    version = runtime.metadata.api_version
    assert (version.major, version.minor, runtime.metadata.traits) == (0, 1, 1)
    runtime = runtimes(minor=1)
    runtime.frame.api = None
    runtime.frame.attrs.struct_size = 16
    assert not runtime.call(metadata=True)
    assert (runtime.metadata.api_version.major, runtime.metadata.api_version.minor) == (0, 0)


def test_ffi_refuses_what_it_does_not_know(runtimes: Callable[..., _Runtime]) -> None:
    runtime = runtimes(major=1)
    assert runtime.call(metadata=True) == 0x1234
    assert runtime.errors[0][0] == 12 and "version 1.3" in runtime.errors[0][1]
    runtime = runtimes()
    runtime.api.struct_size = 64
    assert runtime.call(metadata=True) == 0x1234 and "64 bytes" in runtime.errors[0][1]
    runtime = runtimes()
    runtime.frame.struct_size -= 8
    assert runtime.call(metadata=False) == 0x1234 and "call frame" in runtime.errors[0][1]
    runtime = runtimes()
    runtime.frame.attrs.struct_size = 16
    assert runtime.call(metadata=True) == 0x1234 and "Attrs" in runtime.errors[0][1]
    runtime = runtimes()
    assert runtime.call(metadata=False) == 0x1234 and "attributes" in runtime.errors[0][1]


@pytest.mark.jax
def test_ffi_table_equals_the_header() -> None:
    """The functions that we call stand where jaxlib's own c_api.h lists them."""
    jax = pytest.importorskip("jax")
    header = Path(jax.ffi.include_dir()) / "xla" / "ffi" / "api" / "c_api.h"
    if not header.exists():
        pytest.skip("this jaxlib ships no headers")
    text = header.read_text()
    table = text[text.index("struct XLA_FFI_Api {") :]
    names = [line.split("(")[1].split(")")[0] for line in table.split("};")[0].splitlines() if "STRUCT_FIELD" in line]
    first = ffi._Api.error_create.offset
    for field, name in (
        ("error_create", "XLA_FFI_Error_Create"),
        ("stream_get", "XLA_FFI_Stream_Get"),
        ("device_ordinal_get", "XLA_FFI_DeviceOrdinal_Get"),
    ):
        assert (getattr(ffi._Api, field).offset - first) // 8 == names.index(name)
