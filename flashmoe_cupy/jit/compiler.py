"""NVRTC: source + headers + arch -> cubin and what ptxas said. No device, no driver, no disk.

NVRTC is reached through `cupy.cuda.nvrtc` (importable, not documented: wrapped here and nowhere else).
"""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Mapping, Sequence
from types import ModuleType
from typing import NamedTuple, cast

from flashmoe_cupy import _cupy
from flashmoe_cupy.errors import CompileError, DependencyError

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

_REGISTERS = re.compile(r"Used (\d+) registers")
_SMEM = re.compile(r"(\d+) bytes smem")
_FRAME = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")
_STACK = re.compile(r"(\d+) bytes cumulative stack size")
_REMARK = re.compile(r"\(C75\d\d\)")
_PLACE = re.compile(r"^([^\s(:][^\s(]*)\((\d+)\): (?=error|warning|remark|catastrophic)", re.MULTILINE)
_INSIDE = re.compile(r"\bat line (\d+) of (\S+)")
_PTX_LINE = re.compile(r"ptx input, line (\d+);")


class Compiled(NamedTuple):
    """One cubin and what ptxas reported about its entry."""

    cubin: bytes
    log: str
    registers: int  # of a thread
    spill_stores: int  # bytes, like the next three
    spill_loads: int
    stack: int
    static_smem: int
    milliseconds: float  # of the whole NVRTC call
    remarks: tuple[str, ...]  # lines with a C75xx code: ptxas serialised wgmma or added waits
    ptx: str = ""


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
    start = time.perf_counter()
    try:
        log, cubin, ptx = _run(tu, headers, (f"-arch={arch}", *options))
    except CompileError as error:
        log = map_places(error.log, headers)
        if _PTX_LINE.search(log):
            log = _quote_ptx(log, tu, headers, arch, options)
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


def _quote_ptx(log: str, tu: str, headers: Mapping[str, str], arch: str, options: Sequence[str]) -> str:
    """Put the PTX text under each ptxas error: ptxas names only line numbers of a text that nobody has seen."""
    virtual = [o for o in options if not o.startswith("--ptxas-options")]
    try:
        ptx = _run(tu, headers, (f"-arch={arch.replace('sm_', 'compute_')}", *virtual))[2].split("\n")
    except CompileError:
        return log
    lines = []
    for line in log.splitlines():
        lines.append(line)
        at = _PTX_LINE.search(line)
        if at and 0 < int(at[1]) <= len(ptx):
            lines.append(f"    error in PTX: {ptx[int(at[1]) - 1].strip()}")
    return "\n".join(lines)


def parse_log(log: str, cubin: bytes = b"", milliseconds: float = 0.0, ptx: str = "") -> Compiled:
    """Read registers, spills, stack, static shared memory and wgmma remarks from the log of a successful compile."""
    frames = [tuple(map(int, m.groups())) for m in _FRAME.finditer(log)]
    stacks = [f[0] for f in frames] + [int(s) for s in _STACK.findall(log)]
    return Compiled(
        cubin=cubin,
        log=log,
        registers=max(map(int, _REGISTERS.findall(log)), default=0),
        spill_stores=sum(f[1] for f in frames),
        spill_loads=sum(f[2] for f in frames),
        stack=max(stacks, default=0),
        static_smem=max(map(int, _SMEM.findall(log)), default=0),
        milliseconds=milliseconds,
        remarks=tuple(line.strip() for line in log.splitlines() if _REMARK.search(line)),
        ptx=ptx,
    )


def map_places(log: str, headers: Mapping[str, str]) -> str:
    """Rewrite `ptx/x.cuh(12): error` to `cuda_src/ptx/x.cuh:12: error`, the place where a reader can edit it."""

    def place(file: str, line: str) -> str:
        return f"cuda_src/{file}:{line}" if file in headers else f"{file}:{line}"

    log = _PLACE.sub(lambda m: f"{place(m[1], m[2])}: ", log)
    return _INSIDE.sub(lambda m: f"at {place(m[2], m[1])}", log)


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
