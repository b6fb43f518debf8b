"""What this machine has: driver, devices, compiler, cache, packages. Asked without making a CUDA context."""

from __future__ import annotations

import ctypes
import os
import platform
import sys
from importlib.metadata import PackageNotFoundError, version
from typing import Any, NamedTuple

from flashmoe_cupy import _cupy, _env
from flashmoe_cupy._version import __version__
from flashmoe_cupy.errors import DependencyError, FlashMoEError
from flashmoe_cupy.jit.device import H100, DeviceProperties

_PACKAGES = ("numpy", "ml_dtypes", "torch", "jax", "jaxlib", "transformers", "cuda-bindings", "cuda-pathfinder")
# CUdevice_attribute: COMPUTE_CAPABILITY_MAJOR, _MINOR, MULTIPROCESSOR_COUNT, MAX_SHARED_MEMORY_PER_BLOCK_OPTIN,
# MEMORY_CLOCK_RATE (kHz), GLOBAL_MEMORY_BUS_WIDTH (bits)
_CAPABILITY_MAJOR, _CAPABILITY_MINOR, _MULTIPROCESSORS, _SHARED_MEMORY_OPTIN = 75, 76, 16, 97
_MEMORY_CLOCK, _MEMORY_WIDTH = 36, 37
_FOREIGN_VARIABLES = ("CUDA_VISIBLE_DEVICES", "CUDA_PATH", "CUPY_CACHE_DIR", "XDG_CACHE_HOME", "OMP_NUM_THREADS")


class Device(NamedTuple):
    """One GPU as the driver shows it."""

    ordinal: int
    name: str
    compute_capability: tuple[int, int]
    arch: str  # what kernels are compiled for; "": the device is older than sm_80
    multiprocessors: int
    memory: int  # bytes
    shared_memory: int  # bytes that one block may use
    memory_rate: int  # bytes a second, by the memory's clock and width; 0: the driver does not say


class Driver(NamedTuple):
    """The driver of this machine."""

    version: str  # the newest CUDA that it runs; "": there is no driver
    devices: tuple[Device, ...]
    error: str  # why there is no driver or no device; "": there is one


_driver: Driver | None = None


def driver() -> Driver:
    """The driver and its devices, asked once per process through libcuda; needs no CuPy and makes no context."""
    global _driver
    if _driver is None:
        _driver = _ask_driver()
    return _driver


def devices() -> tuple[Device, ...]:
    """The CUDA devices that this process may see; empty without a driver."""
    return driver().devices


def properties(device: Device) -> DeviceProperties:
    """What plans depend on of it, as `jit.launch.properties` has it."""
    return DeviceProperties(device.multiprocessors, device.memory_rate or H100.memory_rate)


def _ask_driver() -> Driver:
    from flashmoe_cupy.plan.archs import arch_for

    try:
        cuda = ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")
    except OSError:
        return Driver("", (), "no NVIDIA driver (libcuda is not on this machine)")
    number = ctypes.c_int()
    cuda.cuDriverGetVersion(ctypes.byref(number))
    newest = f"{number.value // 1000}.{number.value % 1000 // 10}"
    code = cuda.cuInit(0)
    if code:
        text = ctypes.c_char_p()
        cuda.cuGetErrorName(code, ctypes.byref(text))
        return Driver(newest, (), f"the driver does not start: {(text.value or b'error').decode()} ({code})")
    cuda.cuDeviceGetCount(ctypes.byref(number))
    found = []
    for ordinal in range(number.value):
        handle, memory, name = ctypes.c_int(), ctypes.c_size_t(), ctypes.create_string_buffer(256)
        cuda.cuDeviceGet(ctypes.byref(handle), ordinal)
        cuda.cuDeviceGetName(name, 256, handle)
        cuda.cuDeviceTotalMem_v2(ctypes.byref(memory), handle)

        def attribute(which: int, handle: ctypes.c_int = handle) -> int:
            value = ctypes.c_int()
            cuda.cuDeviceGetAttribute(ctypes.byref(value), which, handle)
            return value.value

        capability = attribute(_CAPABILITY_MAJOR), attribute(_CAPABILITY_MINOR)
        arch = arch_for(capability) if capability >= (8, 0) else ""
        shape = attribute(_MULTIPROCESSORS), memory.value, attribute(_SHARED_MEMORY_OPTIN)
        rate = 2 * 1000 * attribute(_MEMORY_CLOCK) * attribute(_MEMORY_WIDTH) // 8
        found.append(Device(ordinal, name.value.decode(errors="replace"), capability, arch, *shape, rate))
    return Driver(newest, tuple(found), "" if found else "the driver shows no device (see CUDA_VISIBLE_DEVICES)")


def backend() -> tuple[str, str]:
    """("cuda", in words) when GPU arrays can run here, else ("numpy", why not). Does not import CuPy."""
    machine = driver()
    if not machine.devices:
        return "numpy", f"NumPy back end: {machine.error}"
    wheels = _cupy.installed()
    major = "13" if machine.version.startswith("13") else "12"
    if not wheels:
        return "numpy", f"NumPy back end: a GPU, but no CuPy; repair: {_cupy.repair(major)}"
    usable = [device for device in machine.devices if device.arch]
    if not usable:
        return "numpy", f"NumPy back end: {machine.devices[0].name} is older than sm_80 (Ampere)"
    names = ", ".join(dict.fromkeys(f"{device.name} ({device.arch})" for device in usable))
    return "cuda", f"CUDA back end for GPU arrays on {names}; NumPy back end for CPU arrays"


def show_config() -> dict[str, Any]:
    """Everything about this installation that a bug report needs, as plain data. Imports CuPy when it is installed."""
    # Read first, for the import of CuPy may set a variable.
    environment = {name: os.environ.get(name) for name in (*_env.VARIABLES, *_FOREIGN_VARIABLES)}
    machine = driver()
    return {
        "flashmoe_cupy": {"version": __version__, **_sources()},
        "system": {"python": platform.python_version(), "platform": platform.platform(), "cpus": os.cpu_count()},
        "backend": dict(zip(("name", "why"), backend(), strict=True)),
        "driver": {"cuda": machine.version, "release": _driver_release(), "error": machine.error},
        "devices": [device._asdict() for device in machine.devices],
        "kernels": _kernels(machine.devices),
        "compiler": _compiler(),
        "cache": _cache(),
        "packages": {name: _version(name) for name in _PACKAGES},
        "environment": environment,
    }


def _sources() -> dict[str, Any]:
    from flashmoe_cupy.jit import source

    try:
        return {"device_sources": str(source.source_root())}
    except FlashMoEError as error:
        return {"device_sources": None, "error": str(error)}


def _driver_release() -> str:
    """The driver package's own version, such as 580.95.05; "" where the system does not tell."""
    try:
        with open("/proc/driver/nvidia/version", encoding="utf-8") as file:
            words = file.readline().split()
    except OSError:
        return ""
    return next((word for word in words if word[:1].isdigit() and "." in word), "")


def _kernels(here: tuple[Device, ...]) -> dict[str, Any]:
    """Each kernel in the order of preference, and the devices for which it has a configuration."""
    from flashmoe_cupy.plan.kernels import KERNELS

    return {
        name: {
            "summary": kernel.summary,
            "devices": [device.ordinal for device in here if device.arch and kernel.configs(device.arch)],
        }
        for name, kernel in KERNELS.items()
    }


def _compiler() -> dict[str, Any]:
    from flashmoe_cupy.jit import compiler

    wheels = _cupy.installed()
    found: dict[str, Any] = {"cupy": {name: _version(name) for name in wheels}, "nvrtc": None, "error": ""}
    try:
        found["nvrtc"] = ".".join(map(str, compiler.nvrtc_version()))
        if compiler.nvrtc_version() < compiler.MINIMUM:
            found["error"] = f"NVRTC {'.'.join(map(str, compiler.MINIMUM))} or newer is needed"
    except DependencyError as error:
        found["error"] = str(error)
    return found


def _cache() -> dict[str, Any]:
    from flashmoe_cupy.jit import cache, disk

    folder, stored, error = disk.cache_dir(), disk.entries(), disk.why_not_writable()
    return {
        "path": None if folder is None else str(folder),
        "writable": not error,
        "error": error,
        "entries": len(stored),
        "bytes": sum(entry.size for entry in stored),
        "process": vars(cache.stats()),
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
