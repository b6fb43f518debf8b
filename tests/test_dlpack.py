"""Strangers: DLPack capsules made by hand, `__cuda_array_interface__`, their streams and lifetimes. No GPU needed."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import struct
import sys
import types
import weakref
from collections.abc import Iterator
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from test_arrays import cuts, numbers, refused

from flashmoe_cupy import _cupy, arrays, dtypes
from flashmoe_cupy.arrays import View, as_numpy, stream, view
from flashmoe_cupy.dtypes import ALL, BF16, FP16, FP32, DType
from flashmoe_cupy.errors import DependencyError

# ---------------------------------------------------------------------------------------------------------------------
# DLPack: capsules made by hand. The structs are packed from the standard's text, not from the library's classes.

_new = ctypes.PYFUNCTYPE(ctypes.py_object, ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p)(
    ("PyCapsule_New", ctypes.pythonapi)
)
_valid = ctypes.PYFUNCTYPE(ctypes.c_int, ctypes.c_void_p, ctypes.c_char_p)(("PyCapsule_IsValid", ctypes.pythonapi))
_get = ctypes.PYFUNCTYPE(ctypes.c_void_p, ctypes.c_void_p, ctypes.c_char_p)(("PyCapsule_GetPointer", ctypes.pythonapi))
_CALLBACK = ctypes.PYFUNCTYPE(None, ctypes.c_void_p)  # takes no GIL: a deleter called without it would crash here
_deleted: list[int] = []
_deleter = _CALLBACK(_deleted.append)
_alive: list[Any] = []  # names and structs that capsules point to
_NAMES = {True: b"dltensor_versioned", False: b"dltensor"}


def _destroy_unused(capsule: int) -> None:
    """What a producer does when nobody consumed its capsule."""
    for name in _NAMES.values():
        if _valid(capsule, name):
            _deleted.append(_get(capsule, name))


_destroy = _CALLBACK(_destroy_unused)


class Producer:
    """A stranger that exports `x` with whatever fields a test wants."""

    def __init__(self, x: np.ndarray[Any, np.dtype[Any]], versioned: bool = True, **fields: Any) -> None:
        self.x = x
        self.versioned = versioned
        dtype = dtypes.from_numpy(x.dtype)
        self.fields: dict[str, Any] = {
            "data": x.ctypes.data, "device": (1, 0), "ndim": x.ndim, "code": dtype.dlpack[0], "bits": dtype.dlpack[1],
            "lanes": 1, "shape": x.shape, "strides": tuple(t // x.itemsize for t in x.strides), "offset": 0,
            "version": (1, 1), "flags": 0, "deleter": ctypes.cast(_deleter, ctypes.c_void_p).value,
        } | fields  # fmt: skip
        self.asked: list[dict[str, Any]] = []

    def __dlpack_device__(self) -> tuple[int, int]:
        device: tuple[int, int] = self.fields["device"]
        return device

    def __dlpack__(self, **how: Any) -> Any:
        if "max_version" in how and not self.versioned:
            raise TypeError("unexpected keyword argument 'max_version'")
        self.asked.append(how)
        f = self.fields
        shape = (ctypes.c_int64 * f["ndim"])(*f["shape"])
        strides = (ctypes.c_int64 * f["ndim"])(*f["strides"]) if f["strides"] is not None else None
        tensor = struct.pack(
            "<QiiiBBHQQQ", f["data"], *f["device"], f["ndim"], f["code"], f["bits"], f["lanes"],
            ctypes.addressof(shape), ctypes.addressof(strides) if strides is not None else 0, f["offset"],
        )  # fmt: skip
        if self.versioned:
            raw = struct.pack("<IIQQQ", *f["version"], 0, f["deleter"] or 0, f["flags"]) + tensor
        else:
            raw = tensor + struct.pack("<QQ", 0, f["deleter"] or 0)
        block = ctypes.create_string_buffer(raw, len(raw))
        name = ctypes.create_string_buffer(_NAMES[self.versioned])
        _alive.extend((block, name, shape, strides))
        self.block = ctypes.addressof(block)
        return _new(self.block, ctypes.cast(name, ctypes.c_char_p), ctypes.cast(_destroy, ctypes.c_void_p))


def deletions(producer: Producer) -> int:
    if producer.block not in _deleted:
        gc.collect()  # an exception's traceback may hold the capsule
    return _deleted.count(producer.block)


@pytest.fixture(autouse=True)
def _clean() -> Iterator[None]:
    yield
    _deleted.clear()
    _alive.clear()


@pytest.mark.parametrize("versioned", [True, False], ids=["versioned", "legacy"])
@pytest.mark.parametrize("dtype", ALL, ids=repr)
def test_capsule_fields(dtype: DType, versioned: bool) -> None:
    x = numbers((2, 3, 4), dtype).transpose(1, 0, 2)
    producer = Producer(x, versioned)
    v = view(producer, "q")
    assert v[:-1] == (x.ctypes.data, (3, 2, 4), (4, 12, 1), dtype, -1, "dlpack", False)
    assert producer.asked == [{"stream": None, "max_version": (1, 1)} if versioned else {"stream": None}]
    a = as_numpy(v)
    assert a.dtype == x.dtype and a.tobytes() == x.tobytes() and np.shares_memory(a, x)


@pytest.mark.parametrize("versioned", [True, False], ids=["versioned", "legacy"])
def test_deleter_runs_once_when_all_is_gone(versioned: bool) -> None:
    producer = Producer(np.ones((2, 3), np.float32), versioned)
    v = view(producer, "q")
    a = as_numpy(v)[1:]
    assert deletions(producer) == 0
    del v
    assert deletions(producer) == 0, "an array still uses the memory"
    assert a.sum() == 3.0
    del a
    assert deletions(producer) == 1


def test_deleter_runs_once_for_each_view() -> None:
    producer = Producer(np.ones((2, 3), np.float32))
    views = [view(producer, "q") for _ in range(20)]
    blocks = len({id(v.owner) for v in views})
    del views
    assert len(_deleted) == len(set(_deleted)) == blocks == 20


def test_consumed_capsule_is_not_read_again() -> None:
    class Once(Producer):
        def __dlpack__(self, **how: Any) -> Any:
            self.capsule = getattr(self, "capsule", None) or super().__dlpack__(**how)
            return self.capsule

    for versioned in (True, False):
        producer = Once(np.ones(3, np.float32), versioned)
        v = view(producer, "q")
        assert repr(producer.capsule).split('"')[1] == "used_" + _NAMES[versioned].decode()
        assert "unused DLPack capsule" in refused(producer)
        del v, producer.capsule
        assert deletions(producer) == 1


def test_producer_lives_as_long_as_the_view() -> None:
    producer = Producer(np.ones(3, np.float32), deleter=None)
    seen = weakref.ref(producer)
    v = view(producer, "q")
    del producer
    gc.collect()
    assert seen() is not None and as_numpy(v).sum() == 3.0
    del v
    gc.collect()
    assert seen() is None


@pytest.mark.parametrize("versioned", [True, False], ids=["versioned", "legacy"])
@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({"code": 2, "bits": 128}, "code 2 with 128 bits"),
        ({"code": 17, "bits": 4}, "code 17 with 4 bits"),
        ({"lanes": 4}, "4 lanes"),
    ],
)
def test_refused_capsule_stays_the_producers(fields: dict[str, Any], text: str, versioned: bool) -> None:
    """Not consumed: the capsule's own destructor gives the memory back, once."""
    producer = Producer(np.ones(4, np.float32), versioned, **fields)
    assert text in refused(producer, "v")
    assert deletions(producer) == 1


def test_other_major_version() -> None:
    producer = Producer(np.ones(4, np.float32), version=(2, 0))
    assert "DLPack 2.0 is not supported" in refused(producer)
    assert deletions(producer) == 1
    assert view(Producer(np.ones(4, np.float32), version=(1, 9)), "q").shape == (4,)


def test_byte_offset_null_strides_and_rank_zero() -> None:
    x = numbers((4, 6), FP16)
    v = view(Producer(x, offset=24, shape=(2, 6), strides=None), "q")
    assert (v.ptr, v.shape, v.strides) == (x.ctypes.data + 24, (2, 6), (6, 1))
    assert np.array_equal(as_numpy(v), x[2:])
    scalar = view(Producer(np.array(2.5, np.float32), strides=None), "q")
    assert (scalar.shape, scalar.strides, float(as_numpy(scalar))) == ((), (), 2.5)
    nothing = view(Producer(np.zeros((0, 3), np.float32), data=0, strides=None), "q")
    assert (nothing.ptr, nothing.shape, nothing.strides) == (0, (0, 3), (3, 1))
    assert as_numpy(nothing).shape == (0, 3)


def test_read_only_and_copied_flags() -> None:
    x = np.ones(3, np.float32)
    assert view(Producer(x, flags=1), "out").readonly
    assert view(Producer(x, flags=2), "out").readonly, "writes to a copy would be lost"
    assert not view(Producer(x, flags=4), "out").readonly
    assert not as_numpy(view(Producer(x, flags=1), "out")).flags.writeable


class FakeCuda:
    """The few names of CuPy that arrays/ uses; remembers what was done."""

    def __init__(self, current: int = 0) -> None:
        self.log: list[tuple[Any, ...]] = []
        self.device = 0
        self.current = current
        self.done: set[int] = set()
        self.capturing = False
        outer = self

        class Event:
            def __init__(self, disable_timing: bool = False) -> None:
                self.ptr = 1000 + sum(entry[0] == "event" for entry in outer.log)
                outer.log.append(("event", disable_timing))

            @property
            def done(self) -> bool:
                return self.ptr in outer.done

        self.Event = Event
        self.cuda = self
        self.runtime = types.SimpleNamespace(
            getDevice=lambda: outer.device,
            eventRecord=lambda event, s: outer.log.append(("record", event, s)),
            streamWaitEvent=lambda s, event: outer.log.append(("wait", s, event)),
            pointerGetAttributes=lambda ptr: types.SimpleNamespace(type=ptr >> 40, device=ptr >> 32 & 255),
        )

    @contextlib.contextmanager
    def Device(self, ordinal: int) -> Iterator[None]:
        before, self.device = self.device, ordinal
        yield
        self.device = before

    def get_current_stream(self, device: int = -1) -> Any:
        self.log.append(("current", self.device if device < 0 else device))
        return types.SimpleNamespace(ptr=self.current, is_capturing=lambda: self.capturing, record=lambda event: event)


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> FakeCuda:
    fake = FakeCuda()
    monkeypatch.setattr(_cupy, "with_driver", lambda: fake)
    return fake


KINDS = {"cpu": (1, -1), "host": (3, -1), "cuda": (2, 5), "managed": (13, 5)}


@pytest.mark.parametrize(("kind", "device"), KINDS.values(), ids=KINDS)
def test_capsule_devices_and_streams(kind: int, device: int, cuda: FakeCuda) -> None:
    """Host memory is exported without a stream, GPU memory for the current stream of its own device."""
    producer = Producer(np.ones(3, np.float32), device=(kind, 5))
    for current, passed in ((0, 1), (2, 2), (0x7F00, 0x7F00)):  # 0 is not allowed in DLPack: 1 is the legacy stream
        cuda.current = current
        assert view(producer, "q").device == device
        assert producer.asked[-1]["stream"] == (passed if device >= 0 else None)
    assert cuda.log == ([("current", 5)] * 3 if device >= 0 else [])


def test_other_devices() -> None:
    for kind in (4, 7, 8, 10, 14):
        assert f"device type {kind}" in refused(Producer(np.ones(3, np.float32), device=(kind, 0)))

    class Liar(Producer):
        def __dlpack_device__(self) -> tuple[int, int]:
            return 1, 0

    producer = Liar(np.ones(3, np.float32), device=(10, 0))
    assert "device type 10" in refused(producer)
    assert deletions(producer) == 1


def test_export_errors() -> None:
    class Broken(Producer):
        def __dlpack__(self, **how: Any) -> Any:
            raise BufferError("in use elsewhere")

    class Wrong(Producer):
        def __dlpack__(self, **how: Any) -> Any:
            return object()

    assert "in use elsewhere" in refused(Broken(np.ones(3, np.float32)))
    assert "unused DLPack capsule" in refused(Wrong(np.ones(3, np.float32)))


def test_gpu_stranger_without_cupy_or_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    producer = Producer(np.ones(3, np.float32), device=(2, 0))
    monkeypatch.setattr(_cupy, "_working", None)
    monkeypatch.setitem(sys.modules, "cupy", None)
    with pytest.raises(DependencyError, match="pip install"):
        view(producer, "q")

    def broken() -> int:
        raise RuntimeError("cudaErrorInsufficientDriver")

    runtime = types.SimpleNamespace(getDeviceCount=broken)
    module = types.SimpleNamespace(cuda=types.SimpleNamespace(runtime=runtime))
    monkeypatch.setitem(sys.modules, "cupy", module)
    with pytest.raises(DependencyError, match=r"driver \(cudaErrorInsufficientDriver\)"):
        view(producer, "q")
    assert producer.asked == []


@given(cuts(steps=(1, 2, 3)))
def test_numpy_own_capsules(cut: tuple[tuple[slice, ...], tuple[int, ...]]) -> None:
    """NumPy is a producer that we did not write."""

    class Stranger:
        def __init__(self, x: Any) -> None:
            self.x = x

        def __dlpack__(self, **how: Any) -> Any:
            return self.x.__dlpack__(**how)

        def __dlpack_device__(self) -> Any:
            return self.x.__dlpack_device__()

    x = numbers((3, 4, 5), FP32)[cut[0]].transpose(cut[1])
    x.flags.writeable = False
    v = view(Stranger(x), "q")
    assert v.readonly and np.array_equal(as_numpy(v), x)
    assert x.size == 0 or v.ptr == x.ctypes.data


# ---------------------------------------------------------------------------------------------------------------------
# __cuda_array_interface__


class Interface:
    def __init__(self, **fields: Any) -> None:
        base: dict[str, Any] = {
            "shape": (2, 3, 4),
            "typestr": "<f4",
            "data": ((2 << 40) + (3 << 32) + 64, False),
            "version": 3,
        }
        self.__cuda_array_interface__: dict[str, Any] = base | fields


def test_interface_fields(cuda: FakeCuda) -> None:
    x = Interface()
    ptr = x.__cuda_array_interface__["data"][0]
    assert view(x, "q")[:] == (ptr, (2, 3, 4), (12, 4, 1), FP32, 3, "cai", False, x)
    assert view(Interface(strides=None), "q").strides == (12, 4, 1)
    assert view(Interface(strides=(16, 32, 4)), "q").strides == (4, 8, 1)
    assert view(Interface(typestr="<f2"), "q").dtype is FP16
    assert view(Interface(typestr="|b1"), "q").dtype is dtypes.BOOL
    assert view(Interface(data=(ptr, True)), "q").readonly
    managed = (3 << 40) + (1 << 32)
    assert view(Interface(data=(managed, False)), "q").device == 1
    cuda.device = 6
    assert view(Interface(shape=(0, 3), data=(0, False)), "q")[:5] == (0, (0, 3), (3, 1), FP32, 6)
    assert cuda.log == []


def test_interface_errors(cuda: FakeCuda) -> None:
    assert cuda.log == []
    assert "mask" in refused(Interface(mask=object()))
    assert "typestr '<V2'" in refused(Interface(typestr="<V2")) and "__dlpack__" in refused(Interface(typestr="<V2"))
    assert "typestr '<c8'" in refused(Interface(typestr="<c8"))
    assert "typestr '>f4'" in refused(Interface(typestr=">f4"))
    assert "not multiples of the item size 4" in refused(Interface(strides=(48, 16, 6)))
    assert "no GPU owns" in refused(Interface(data=((1 << 40) + 64, False)))


def test_interface_stream_is_waited_for(cuda: FakeCuda) -> None:
    cuda.current = 77
    view(Interface(stream=55), "q")
    assert cuda.log == [("current", 3), ("event", True), ("record", 1000, 55), ("wait", 77, 1000)]
    cuda.log.clear()
    view(Interface(stream=77), "q")
    view(Interface(stream=None), "q")
    assert cuda.log == [("current", 3)], "the same stream, or none: nothing to wait for"
    cuda.current = 0
    cuda.log.clear()
    view(Interface(stream=1), "q")
    assert cuda.log == [("current", 3)], "0 and 1 both are the legacy default stream"


def test_dlpack_comes_before_the_interface() -> None:
    """DLPack carries bfloat16 and the device."""

    class Both(Producer, Interface):
        __cuda_array_interface__: Any = None

    assert view(Both(np.ones(3, ml_dtypes.bfloat16)), "q").dtype is BF16


# ---------------------------------------------------------------------------------------------------------------------
# order and lifetime


def gpu_view(library: str, device: int = 1, owner: object = None) -> View:
    return View(1 << 40, (2,), (1,), FP32, device, library, False, owner)


def test_cupy_stream_of_the_arrays_device(cuda: FakeCuda) -> None:
    cuda.current = 4711
    for library in ("cupy", "jax", "dlpack", "cai"):
        assert stream(gpu_view(library)) == 4711
    assert cuda.log == [("current", 1)] * 4


def test_borrowed_memory_lives_until_the_work_is_done(cuda: FakeCuda) -> None:
    class Owner:
        pass

    def call(*libraries: str) -> list[weakref.ref[Owner]]:
        owners = [Owner() for _ in libraries]
        arrays.keep_until_done([gpu_view(name, owner=o) for name, o in zip(libraries, owners, strict=True)])
        return [weakref.ref(o) for o in owners]

    first, second = call("jax", "dlpack", "cai"), call("jax")
    gc.collect()
    assert all(ref() is not None for ref in (*first, *second))
    plain = call("torch", "cupy")
    gc.collect()
    assert all(ref() is None for ref in plain), "these free in stream order by themselves"
    cuda.done = {1000}  # the first call's event
    third = call("jax")
    gc.collect()
    assert all(ref() is None for ref in first)
    assert second[0]() is not None and third[0]() is not None
    cuda.done = {1000, 1001, 1002}
    cuda.capturing = True
    captured = call("jax")
    gc.collect()
    assert all(ref() is None for ref in (*second, *third, *captured))


def test_half_imported_framework(monkeypatch: pytest.MonkeyPatch) -> None:
    """While another thread is inside `import torch`, sys.modules holds a module without the names."""
    for name in ("torch", "cupy", "jax"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    assert view(Producer(np.ones(3, np.float32)), "q").library == "dlpack"
    with pytest.raises(TypeError):
        view(object(), "q")


@pytest.mark.gpu
def test_gpu_strangers() -> None:
    """By DLPack and by interface: the same memory on the same device, ordered after the producer's stream."""
    import cupy

    x = cupy.arange(12, dtype=cupy.float32).reshape(3, 4)[:, ::2]

    class Stranger:
        def __dlpack__(self, **how: Any) -> Any:
            return x.__dlpack__(**how)

        def __dlpack_device__(self) -> Any:
            return x.__dlpack_device__()

    producer = cupy.cuda.Stream(non_blocking=True)
    with cupy.cuda.Stream(non_blocking=True) as side:
        fields = x.__cuda_array_interface__ | {"stream": producer.ptr}
        for v in (view(Stranger(), "q"), view(Interface(**fields), "q")):
            assert v[:5] == (x.data.ptr, (3, 2), (4, 2), FP32, x.data.device_id)
            assert stream(v) == side.ptr
            arrays.keep_until_done([v])
    side.synchronize()
