"""Cubins on a device: loading, and the launch with one Params struct by value. The only file that talks to the driver.

CuPy loads modules in the device's primary context, which torch and JAX share. A launch goes through CuPy's driver
binding with the address of a per-thread buffer: the driver copies the bytes before it returns, so that the buffer is
free again at once.
"""

from __future__ import annotations

import ctypes
import functools
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

from flashmoe_cupy import _cupy
from flashmoe_cupy.errors import DependencyError, FlashMoEError
from flashmoe_cupy.jit import cache, counters, tensormap
from flashmoe_cupy.jit.cache import Entry
from flashmoe_cupy.jit.source import ENTRY
from flashmoe_cupy.jit.tensormap import TensorMap

_PARAMS_BYTES = 4096  # the driver's limit for kernel parameters
_MAX_DYNAMIC_SHARED = 8  # CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES


class Loaded(NamedTuple):
    """A kernel that a device can run: CUfunction as an integer, and the module that keeps it alive."""

    function: int
    module: object


_loaded: dict[tuple[str, int], Loaded] = {}
_by_source: dict[tuple[str, int], Loaded] = {}
_lock = threading.Lock()
_driver: Any = None
_runtime: Any = None
_devices = 0


def devices() -> int:
    """CUDA devices of this machine. Raises DependencyError when CuPy is missing or there is no working driver."""
    global _driver, _runtime, _devices
    if _devices == 0:
        cupy = _cupy.load("running on a GPU")
        from cupy_backends.cuda.api import driver

        try:
            count = int(cupy.cuda.runtime.getDeviceCount())
        except cupy.cuda.runtime.CUDARuntimeError as error:
            raise DependencyError(
                f"the CUDA driver does not work ({error}); repair: install an NVIDIA driver for CUDA "
                f"{cupy.cuda.runtime.runtimeGetVersion() // 1000} or newer; NumPy arrays run without one"
            ) from error
        _driver, _runtime, _devices = driver, cupy.cuda.runtime, count
    return _devices


def compute_capability(device: int) -> tuple[int, int]:
    """(major, minor) of a CUDA device."""
    devices()
    major = _runtime.deviceGetAttribute(75, device)
    return int(major), int(_runtime.deviceGetAttribute(76, device))


def multiprocessors(device: int) -> int:
    """SMs of a CUDA device."""
    devices()
    return int(_runtime.deviceGetAttribute(16, device))


@functools.cache
def memory_bytes(device: int) -> int:
    """How much memory a CUDA device has."""
    devices()
    return int(_runtime.getDeviceProperties(device)["totalGlobalMem"])


def driver_version() -> int:
    """The CUDA version of the driver, 12030 for 12.3."""
    devices()
    return int(_runtime.driverGetVersion())


def load(entry: Entry, device: int, smem_bytes: int = 0) -> Loaded:
    """The kernel on a device, loaded once. smem_bytes: the most dynamic shared memory that a launch will ask for."""
    loaded = _loaded.get((entry.key, device))
    if loaded is not None:
        return loaded
    devices()
    import cupy

    with _lock, cupy.cuda.Device(device):
        loaded = _loaded.get((entry.key, device))
        if loaded is None:
            module = cupy.cuda.Module()
            module.load(entry.cubin)
            function = module.get_function(ENTRY)
            if smem_bytes > 48 * 1024:
                _driver.funcSetAttribute(function.ptr, _MAX_DYNAMIC_SHARED, smem_bytes)
            loaded = _loaded[entry.key, device] = Loaded(int(function.ptr), (module, function))
    return loaded


def load_for(tu: str, name: str, arch: str, device: int, smem_bytes: int, stream: int | None) -> Loaded:
    """The kernel of a translation unit on a device: found, or compiled and loaded.

    Raises FlashMoEError when that would be needed while a graph is recorded on `stream`: neither compiling nor loading
    belongs into a capture.
    """
    loaded = _by_source.get((tu, device))
    if loaded is None:
        if stream is not None and is_capturing(stream):
            raise FlashMoEError(
                f"{name} is used for the first time while a CUDA graph is recorded; call the operation once before "
                f"the capture, or run flashmoe_cupy.warmup() or warmup('moe')"
            )
        loaded = _by_source[tu, device] = load(cache.get(tu, name, arch), device, smem_bytes)
    return loaded


def is_loaded(key: str, device: int) -> bool:
    """Whether `load` has run for this kernel and device."""
    return (key, device) in _loaded


def is_capturing(stream: int) -> bool:
    """Whether a CUDA graph is being recorded on the stream."""
    devices()
    return bool(_runtime.streamIsCapturing(stream))


class Launch(NamedTuple):
    """A loaded kernel and all of its launch that stays the same from call to call.

    head packs the pointers at the start of Params; tail is the rest of it. check: synchronise after each launch.
    maps: (8-byte word of Params, pointer that is stored there), for the addresses inside of tensor maps.
    counter: 8-byte word of Params for the address of a counter (`jit.counters`); 0: the kernel wants none.
    clears: the kernel itself writes the rows of no sequence. early: it may start before the launch in front of it has
    ended (programmatic dependent launch); it waits by itself where it must. Only `jit.series` makes use of it.
    """

    device: int
    function: int
    grid: int
    threads: int
    smem: int
    head: Callable[..., None]
    tail: bytes
    check: bool
    maps: tuple[tuple[int, int], ...] = ()
    counter: int = 0
    clears: bool = False
    early: bool = False


_MAX_ENCODED = 64  # sets of encoded maps that one launch remembers, where addresses cannot be stored


def with_maps(kernel: Launch, at: int, maps: Sequence[TensorMap]) -> Launch:
    """The launch with tensor maps from byte `at` of Params on, the i-th over the array of the i-th pointer."""
    if not maps:
        return kernel
    with _current(kernel.device):
        templates = [tensormap.template(one) for one in maps]
    known = [found for found in templates if found is not None]
    if len(known) < len(maps):
        return kernel._replace(head=_encoding_head(kernel, at, maps))
    words = tuple(((at + i * tensormap.BYTES) // 8, i) for i in range(len(maps)))
    return kernel._replace(tail=kernel.tail + b"".join(known), maps=words)


def _encoding_head(kernel: Launch, at: int, maps: Sequence[TensorMap]) -> Callable[..., None]:
    """A `head` that also encodes the maps, for a driver whose maps hold the address in an unknown way."""
    encoded: dict[tuple[int, ...], bytes] = {}

    def head(view: memoryview, offset: int, *pointers: int) -> None:
        kernel.head(view, offset, *pointers)
        addresses = pointers[: len(maps)]
        found = encoded.get(addresses)
        if found is None:
            if len(encoded) >= _MAX_ENCODED:
                encoded.clear()
            with _current(kernel.device):
                found = encoded[addresses] = b"".join(map(tensormap.encode, maps, addresses))
        view[at : at + len(found)] = found

    return head


@contextmanager
def _current(device: int) -> Iterator[None]:
    """The device's context is the thread's, made if need be; legal while a graph is recorded."""
    devices()
    before = _runtime.getDevice()
    _runtime.setDevice(device)
    try:
        yield
    finally:
        _runtime.setDevice(before)


class _Buffer:
    """Aligned bytes for one Params struct, and the pointer array that the driver wants."""

    __slots__ = ("_pointers", "address", "bound", "storage", "tail", "view", "words")

    def __init__(self) -> None:
        self.storage = ctypes.create_string_buffer(_PARAMS_BYTES + 128)
        start = -ctypes.addressof(self.storage) % 128
        self.view = memoryview(self.storage).cast("B")[start : start + _PARAMS_BYTES]
        self.words = self.view.cast("Q")
        self._pointers = (ctypes.c_void_p * 1)(ctypes.addressof(self.storage) + start)
        self.address = ctypes.addressof(self._pointers)
        self.tail: bytes = b""  # what lies behind the pointers now
        self.bound = -1  # the only device of this machine, once the thread has its context


class _Local(threading.local):
    """The calling thread's buffer: launches of two threads must not mix."""

    def __init__(self) -> None:
        self.buffer = _Buffer()


_local = _Local()


def launch(kernel: Launch, pointers: tuple[int, ...], stream: int) -> None:
    """Queue one kernel; nothing is waited for. The driver copies the parameters before it returns."""
    device, function, grid, threads, smem, head, tail, synchronise, maps, counter, _, _ = kernel
    buffer = _local.buffer
    view = buffer.view
    head(view, 0, *pointers)
    if buffer.tail is not tail:
        start = 8 * len(pointers)
        view[start : start + len(tail)] = tail
        buffer.tail = tail
    if maps:
        words = buffer.words
        for word, index in maps:
            words[word] = pointers[index]
    if buffer.bound == device:
        if counter:
            buffer.words[counter] = counters.counter(_runtime, device, stream)
        _driver.launchKernel(function, grid, 1, 1, threads, 1, 1, smem, stream, buffer.address, 0)
    else:
        _launch_on(kernel, stream, buffer)
    if synchronise:
        check(device, stream)


def _launch_on(kernel: Launch, stream: int, buffer: _Buffer) -> None:
    """The launch when the thread may have no context yet, or another device's."""
    before = _runtime.getDevice()
    _runtime.setDevice(kernel.device)
    try:
        if kernel.counter:
            buffer.words[kernel.counter] = counters.counter(_runtime, kernel.device, stream)
        _driver.launchKernel(
            kernel.function, kernel.grid, 1, 1, kernel.threads, 1, 1, kernel.smem, stream, buffer.address, 0
        )
    finally:
        _runtime.setDevice(before)
    if _devices == 1:
        buffer.bound = kernel.device


def bound() -> int:
    """The device whose context the calling thread has for good; -1: it may change."""
    return _local.buffer.bound


@contextmanager
def bind(device: int) -> Iterator[None]:
    """The device's context is the thread's for a while; on a machine with one device, from now on."""
    with _current(device):
        yield
    if _devices == 1:
        _local.buffer.bound = device


def fetch(address: int, like: Any, shape: tuple[int, ...], strides: tuple[int, ...], device: int) -> Any:
    """A copy of a device array in host memory, as a NumPy array; waits for the device. For checks.

    like: a NumPy dtype; strides count bytes.
    """
    import cupy

    with _current(device):
        _runtime.deviceSynchronize()
        memory = cupy.cuda.UnownedMemory(address, 0, None, device)
        return cupy.ndarray(shape, like, cupy.cuda.MemoryPointer(memory, 0), strides=strides).get()


def check(device: int, stream: int) -> None:
    """Wait for the stream and raise what the kernel did wrong (FLASHMOE_CHECK=1); nothing while a graph is recorded."""
    if is_capturing(stream):
        return
    try:
        _runtime.streamSynchronize(stream)
    except _runtime.CUDARuntimeError as error:
        raise FlashMoEError(f"the kernel failed on device {device}: {error}") from error
