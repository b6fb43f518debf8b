"""Cubins on a device: loading them, and what a launch is made of. `jit.sequence` queues launches.

CuPy loads modules in the device's primary context, which torch and JAX share.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from copy import copy
from typing import Any

from flashmoe_cupy import _cupy
from flashmoe_cupy.errors import DependencyError, FlashMoEError
from flashmoe_cupy.jit import cache, tensormap
from flashmoe_cupy.jit.cache import Entry
from flashmoe_cupy.jit.device import H100, DeviceProperties
from flashmoe_cupy.jit.source import ENTRY
from flashmoe_cupy.jit.tensormap import TensorMap

_MAX_DYNAMIC_SHARED = 8  # CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES


class Loaded:
    """A kernel that a device can run: CUfunction as an integer, and the module that keeps it alive."""

    __slots__ = ("function", "module")

    def __init__(self, function: int, module: object) -> None:
        self.function, self.module = function, module


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
def properties(device: int) -> DeviceProperties:
    """What plans depend on of a CUDA device. Where the driver does not say its memory's clock or width, an H100's rate.

    Both are of one clock edge and there are two, as `nvidia-smi -q` counts them.
    """
    kilohertz, bits = (int(_attribute(which, device)) for which in (36, 37))
    rate = 2 * 1000 * kilohertz * bits // 8
    return DeviceProperties(multiprocessors(device), rate or H100.memory_rate)


def _attribute(which: int, device: int) -> int:
    """An attribute of a CUDA device; 0 where this runtime no longer has it."""
    devices()
    try:
        return int(_runtime.deviceGetAttribute(which, device))
    except _runtime.CUDARuntimeError:
        return 0


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


class Launch:
    """A loaded kernel and all of its launch that stays the same from call to call.

    pointers: addresses that Params begins with, each a word of 8 bytes. tail: the bytes of Params behind them.
    check: wait for the stream after the launch and raise what went wrong.
    maps: (word of Params, index of the pointer whose address it holds): the addresses inside of tensor maps.
    encoded: (byte of Params, map, index of the pointer): maps that the driver must encode for each address.
    counter: the word for the address of a counter (`jit.counters`); 0: the kernel wants none.
    early: it may start before the launch in front of it has ended (programmatic dependent launch); the kernel waits by
    itself where it must.
    at_once: its blocks wait for each other, so all of them run at once or none does (cooperative launch).
    """

    __slots__ = (
        "at_once", "check", "counter", "device", "early", "encoded", "function", "grid", "maps", "pointers", "smem",
        "tail", "threads",
    )  # fmt: skip

    def __init__(
        self, device: int, function: int, grid: int, threads: int, smem: int, pointers: int, tail: bytes,
        check: bool = False, maps: tuple[tuple[int, int], ...] = (),
        encoded: tuple[tuple[int, TensorMap, int], ...] = (), counter: int = 0, early: bool = False,
        at_once: bool = False,
    ) -> None:  # fmt: skip
        self.device, self.function, self.grid, self.threads, self.smem = device, function, grid, threads, smem
        self.pointers, self.tail, self.check, self.maps, self.encoded = pointers, tail, check, maps, encoded
        self.counter, self.early, self.at_once = counter, early, at_once


def with_maps(kernel: Launch, at: int, maps: Sequence[TensorMap], size: int, mapped: Sequence[int]) -> Launch:
    """The launch with tensor maps from byte `at` of Params on, the i-th over the array of pointer mapped[i].

    mapped: of all maps that the kernel has. size: of Params. Zeros are in the place of those that a configuration does
    not use.
    """
    if at == size:
        return kernel
    with current(kernel.device):
        templates = [tensormap.template(one) for one in maps]
    places = [at + i * tensormap.BYTES for i in range(len(maps))]
    known = [found for found in templates if found is not None]
    made = copy(kernel)
    if len(known) < len(maps):
        room = bytes(tensormap.BYTES * len(maps))
        made.tail += room
        made.encoded = tuple([(place, one, i) for place, one, i in zip(places, maps, mapped, strict=False)])
    else:
        made.tail += b"".join(known)
        made.maps = tuple([(place // 8, i) for place, i in zip(places, mapped, strict=False)])
    made.tail += bytes(size - at - tensormap.BYTES * len(maps))
    return made


@contextmanager
def current(device: int) -> Iterator[None]:
    """The device's context is the thread's, made if need be; legal while a graph is recorded."""
    devices()
    before = _runtime.getDevice()
    _runtime.setDevice(device)
    try:
        yield
    finally:
        _runtime.setDevice(before)


class _Local(threading.local):
    def __init__(self) -> None:
        self.bound = -1


_local = _Local()


def bound() -> int:
    """The device whose context the calling thread has for good; -1: it may change."""
    return _local.bound


@contextmanager
def bind(device: int) -> Iterator[None]:
    """The device's context is the thread's for a while; on a machine with one device, from now on."""
    with current(device):
        yield
    if _devices == 1:
        _local.bound = device


def counters() -> Callable[[int, int], int]:
    """The function that gives the counter of a device, which is the current one, and a stream: `jit.counters`."""
    from flashmoe_cupy.jit import counters  # which only uneven lengths want

    return functools.partial(counters.counter, _runtime)


def fetch(address: int, like: Any, shape: tuple[int, ...], strides: tuple[int, ...], device: int) -> Any:
    """A copy of a device array in host memory, as a NumPy array; waits for the device. For checks.

    like: a NumPy dtype; strides count bytes.
    """
    import cupy

    with current(device):
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
