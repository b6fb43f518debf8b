"""NVRTC: source + headers + arch -> cubin and what ptxas said (`jit.log`). No device, no driver, no disk.

NVRTC is reached through `cupy.cuda.nvrtc` (importable, not documented: wrapped here and nowhere else).
"""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping, Sequence
from types import ModuleType
from typing import TYPE_CHECKING, cast

from flashmoe_cupy import _cupy
from flashmoe_cupy.errors import CompileError, DependencyError

if TYPE_CHECKING:
    from flashmoe_cupy.jit.log import Compiled

# All that NVRTC would otherwise choose by itself is stated, so that a new version cannot change it in silence.
OPTIONS: tuple[str, ...] = (
    "-std=c++20",
    "-default-device",  # no __device__ needed on every function
    "-ftz=false",  # keep denormals: tiny probabilities and the log-sum-exp depend on them
    "-fmad=true",
    "-prec-div=true",
    "-prec-sqrt=true",
    "--ptxas-options=-v",  # registers, spills and shared memory into the log
    "--minimal",  # no texture and runtime-API declarations: 4 ms less, the same bytes (NVRTC 12.4 to 13.5)
    "--no-source-include",  # a header must be in memory: never one that lies in the working directory
)

MINIMUM = (12, 4)  # older versions do not assemble fp8 mma.sync
_FILE = "fm_entry.cu"  # of every program: the name stands in the cubin, which must not depend on it

_lock = threading.Lock()
_FIRST_WITH_CACHE = (12, 9)  # the first NVRTC with a cache of its own
_nvrtc_module: ModuleType | None = None
_version: tuple[int, int] | None = None


def nvrtc_version() -> tuple[int, int]:
    """(major, minor) of the NVRTC that CuPy loads. Raises DependencyError when there is none."""
    global _version
    if _version is None:
        nvrtc = _nvrtc()
        try:
            major, minor = nvrtc.getVersion()
        except Exception as error:  # CuPy raises RuntimeError, OSError or its own type, by version
            raise DependencyError(f"CuPy cannot load the NVRTC library ({error}); repair: {_cupy.repair()}") from error
        _version = (int(major), int(minor))
    return _version


def compile_cubin(
    tu: str, headers: Mapping[str, str], arch: str, options: Sequence[str] = OPTIONS, name: str = "kernel"
) -> Compiled:
    """Compile one TU for one real arch ("sm_80", "sm_90a", ...).

    headers: include name -> text, the transitive closure (see source.headers_for); nothing is read from disk.
    name: for messages only. Same arguments and same NVRTC give the same bytes.
    Raises CompileError with the log, whose places read `cuda_src/<header>:<line>`, and DependencyError when
    CuPy or NVRTC is missing or too old.
    """
    version = nvrtc_version()
    if version < MINIMUM:
        raise DependencyError(
            f"NVRTC {version[0]}.{version[1]} is too old, {MINIMUM[0]}.{MINIMUM[1]} or newer is needed; "
            f"repair: {_cupy.repair()}"
        )
    from flashmoe_cupy.jit.log import blames_ptx, map_places, parse_log, quote_ptx  # a kernel on the disk has no log

    start = time.perf_counter()
    try:
        log, cubin, ptx = _run(tu, headers, (f"-arch={arch}", *options))
    except CompileError as error:
        log = map_places(error.log, headers)
        if blames_ptx(log):
            log = quote_ptx(log, _ptx(tu, headers, arch, options))
        asked = f"{name} does not compile for {arch} with NVRTC {version[0]}.{version[1]}"
        raise CompileError(asked, log or error.message) from None
    milliseconds = (time.perf_counter() - start) * 1e3
    return parse_log(map_places(log, headers), cubin, milliseconds, ptx)


def _run(tu: str, headers: Mapping[str, str], options: tuple[str, ...]) -> tuple[str, bytes, str]:
    """One NVRTC program -> (log, cubin, PTX); the cubin is empty for a virtual arch. CompileError has the raw log."""
    nvrtc = _nvrtc()
    names = sorted(headers)
    program = nvrtc.createProgram(tu, _FILE, [headers[n].encode() for n in names], [n.encode() for n in names])
    try:
        try:
            # What comes from NVRTC's own cache, kept where there is a driver, has no log: no registers, no spills.
            own = ("--no-cache",) if nvrtc_version() >= _FIRST_WITH_CACHE else ()
            nvrtc.compileProgram(program, (*options, *own))
        except nvrtc.NVRTCError as error:
            raise CompileError(str(error), nvrtc.getProgramLog(program).rstrip("\0 \n")) from None
        cubin = b"" if options[0].startswith("-arch=compute_") else bytes(nvrtc.getCUBIN(program))
        ptx = nvrtc.getPTX(program)
        log = nvrtc.getProgramLog(program).rstrip("\0 \n")
    finally:
        nvrtc.destroyProgram(program)
    return log, cubin, (ptx if isinstance(ptx, str) else ptx.decode()).rstrip("\0")


def _ptx(tu: str, headers: Mapping[str, str], arch: str, options: Sequence[str]) -> str:
    """The PTX of what ptxas does not take; "" where there is none either."""
    virtual = [o for o in options if not o.startswith("--ptxas-options")]
    try:
        return _run(tu, headers, (f"-arch={arch.replace('sm_', 'compute_')}", *virtual))[2]
    except CompileError:
        return ""


def _nvrtc() -> ModuleType:
    """CuPy's NVRTC module, imported at the first compile. Raises DependencyError."""
    global _nvrtc_module
    with _lock:
        if _nvrtc_module is None:
            _nvrtc_module = _import_nvrtc()
        return _nvrtc_module


def _import_nvrtc() -> ModuleType:
    cupy = _cupy.load("compiling kernels")
    return cast(ModuleType, cupy.cuda.nvrtc)
