"""Runs a kernel of cuda_src on the CPU, thread by thread, to find wrong index maps, deadlocks and missing waits.

The generated translation unit is compiled by g++ as it is; tests/emulation holds what stands for CUDA's keywords, for
cuda_src/ptx and for the machine. A seed chooses the order in which warps run and when asynchronous work takes effect:

    0  everything at once, warps in order      1  everything as late as somebody waits for it
    2  loads at once, products and stores late 3  loads late, the rest at once      4 ...  drawn at random

A run either ends as a correct kernel does, or raises EmulationError: a deadlock (with what each warp waits for), lanes
that disagree, an access beyond shared or guarded global memory, a missing fence, and so on. Wrong numbers are for the
caller to find. Nothing is timed.
"""

from __future__ import annotations

import ctypes
import hashlib
import mmap
import os
import platform
import shutil
import subprocess
import tempfile
import threading
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from filelock import FileLock
from numpy.typing import NDArray

from flashmoe_cupy.jit import source
from flashmoe_cupy.jit.tensormap import BYTES as MAP_BYTES
from flashmoe_cupy.jit.tensormap import TensorMap

_HERE = Path(__file__).resolve().parent / "emulation"
_RUNTIME = ("emulator.cpp", "schedule.cpp", "barriers.cpp", "copies.cpp", "products.cpp")
_OPTIONS = (
    "-std=c++20", "-fPIC", "-fvisibility=hidden", "-fno-gnu-unique", "-fno-strict-aliasing", "-ffp-contract=off",
    "-Wno-attributes",
)  # fmt: skip
# A kernel's own mistakes become faults: local arrays have bounds, and 16-byte accesses start at multiples of 16.
_KERNEL_OPTIONS = (
    "-O1", "-fsanitize=alignment,bounds", "-fsanitize-undefined-trap-on-error", "-fstack-clash-protection",
)  # fmt: skip
_PAGE = mmap.PAGESIZE


class EmulationError(Exception):
    """What went wrong in an emulated grid."""


class BuildError(Exception):
    """The compiler's words, where a kernel could not be compiled."""


def missing() -> str | None:
    """Why nothing can be emulated on this machine; None: it can."""
    if platform.system() != "Linux" or platform.machine() != "x86_64":
        return f"kernels are emulated on Linux x86_64 only, this is {platform.system()} {platform.machine()}"
    if shutil.which("g++") is None:
        return "emulating kernels needs g++"
    return None


def run(
    tu: str,
    params: bytes,
    grid: int,
    threads: int,
    smem_bytes: int,
    seed: int = 0,
    cluster: int = 1,
    *,
    resident: int = 1,
    headers: Mapping[str, str] | None = None,
    limit_s: float = 60.0,
) -> None:
    """Run the kernel of a translation unit (`jit.source.render`) and return when all its blocks have ended.

    params: the bytes of its Params, with addresses of host memory and maps from `tensor_map`. grid: blocks along x.
    smem_bytes: dynamic shared memory of a block. cluster: blocks of a cluster, as in `render`. resident: clusters that
    run at the same time; the others follow in an order that the seed chooses. headers: include name -> text, instead of
    the file of that name. limit_s: CPU seconds. Raises EmulationError, or BuildError before it runs.
    """
    if threads % 32 or not 0 < threads <= 1024 or not 0 <= smem_bytes <= 227 * 1024 or grid % cluster:
        raise ValueError(f"{grid} blocks in clusters of {cluster}, {threads} threads, {smem_bytes} bytes")
    library = _load(build(tu, headers or {}))
    storage = ctypes.create_string_buffer(len(params) + 128)
    address = ctypes.addressof(storage) + -ctypes.addressof(storage) % 128
    ctypes.memmove(address, params, len(params))
    report = ctypes.create_string_buffer(1 << 16)
    with _lock:
        code = library.fm_run(
            ctypes.c_void_p(address), grid, threads, smem_bytes, cluster, resident, ctypes.c_uint64(seed),
            ctypes.c_double(limit_s), report, ctypes.c_size_t(len(report)),
        )  # fmt: skip
    if code:
        raise EmulationError(_with_names(report.value.decode(errors="replace")) + f"\n(seed {seed})")


# ---------------------------------------------------------------------------------------------------------------------
# compiling

_lock = threading.Lock()  # signal handlers and the emulated machine are there once


def build(tu: str, headers: Mapping[str, str] | None = None) -> Path:
    """The shared library of a translation unit: compiled, or found in the folder of earlier ones by its content."""
    texts = source.headers_for(tu)
    for name in texts:
        if name.startswith("ptx/"):
            twin = _HERE / name
            if not twin.is_file():
                raise BuildError(f"tests/emulation/{name} is missing: the emulated twin of cuda_src/{name}")
            texts[name] = twin.read_text(encoding="utf-8")
    texts |= headers or {}
    key = _digest(tu, *[f"{name}\0{text}" for name, text in sorted(texts.items())], _toolchain())
    target = _folder() / f"{key}.so"
    if target.exists():
        return target
    runtime = _runtime_objects()
    with FileLock(f"{target}.lock"), tempfile.TemporaryDirectory(dir=_folder()) as name:  # other processes wait for it
        if target.exists():
            return target
        work = Path(name)
        for file, text in {"entry.cu": tu, **{f"cuda_src/{header}": text for header, text in texts.items()}}.items():
            place = work / file
            place.parent.mkdir(parents=True, exist_ok=True)
            place.write_text(text, encoding="utf-8")
        made = work / "kernel.so"
        _call(
            "g++", *_options(), *_KERNEL_OPTIONS, f"-iquote{work / 'cuda_src'}", "-include", str(_HERE / "cuda.hpp"),
            f'-DEMU_TU="{work / "entry.cu"}"', "-shared", "-Wl,-Bsymbolic", str(_HERE / "entry.cpp"), *runtime,
            "-o", str(made), hide=f"{work}/",
        )  # fmt: skip
        os.replace(made, target)
    return target


@cache
def _folder() -> Path:
    """Where libraries stay from run to run; their names are what they were made of."""
    folder = Path(tempfile.gettempdir()) / f"flashmoe-emulation-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    if folder.stat().st_uid != os.getuid():
        raise BuildError(f"{folder} belongs to somebody else")
    return folder


@cache
def _options() -> tuple[str, ...]:
    """Compiler options, with the vector instructions that this machine has."""
    try:
        flags = Path("/proc/cpuinfo").read_text(encoding="utf-8").split()
    except OSError:
        flags = []
    return (*_OPTIONS, *[f"-m{name}" for name in ("avx2", "fma", "f16c") if name in flags])


@cache
def _toolchain() -> str:
    texts = [f"{p.name}\0{p.read_text(encoding='utf-8')}" for p in sorted(_HERE.rglob("*.[hc]*pp"))]
    return _digest(_call("g++", "-dumpfullversion", "-dumpmachine"), *_options(), *_KERNEL_OPTIONS, *texts)


@cache
def _runtime_objects() -> list[str]:
    """The machine itself, compiled once for all kernels."""
    made = {name: _folder() / f"{_toolchain()}-{Path(name).stem}.o" for name in _RUNTIME}

    def compile_one(name: str) -> None:
        with FileLock(f"{made[name]}.lock"):
            if not made[name].exists():
                unfinished = made[name].with_suffix(f".{os.getpid()}")
                _call("g++", *_options(), "-O3", "-c", str(_HERE / name), "-o", str(unfinished))
                os.replace(unfinished, made[name])

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(compile_one, made))
    return [str(path) for path in made.values()]


def _call(*command: str, hide: str = "") -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        text = done.stderr.replace(hide, "") if hide else done.stderr
        raise BuildError(f"{command[0]} fails:\n{text[:8000]}")
    return done.stdout


def _digest(*parts: str) -> str:
    return hashlib.sha256("\1".join(parts).encode()).hexdigest()[:32]


@cache
def _load(path: Path) -> Any:
    return ctypes.CDLL(str(path))


# ---------------------------------------------------------------------------------------------------------------------
# memory


def tensor_map(of: TensorMap, address: int) -> bytes:
    """What `jit.tensormap.encode` is for the driver: the 128 bytes that the emulated copy engine reads.

    Raises ValueError where the driver would refuse.
    """
    rank, swizzle = len(of.dims), getattr(of, "swizzle", 128)
    inner = of.box[0] * of.dtype.itemsize
    faults = [
        name
        for name, wrong in {
            "rank": not 1 <= rank <= 5 or len(of.strides) != rank - 1 or len(of.box) != rank,
            "address": address % 16,
            "dimensions": min(of.dims) < 1 or max(of.dims) > 2**32,
            "strides": any(stride % 16 or not 0 <= stride < 2**40 for stride in of.strides),
            "box": min(of.box) < 1 or max(of.box) > 256 or inner % 16,
            "swizzle": swizzle not in (0, 32, 64, 128) or (swizzle and inner != swizzle),
        }.items()
        if wrong
    ]
    if faults:
        raise ValueError(f"no tensor map has such {' and '.join(faults)}: {of} at {address:#x}")
    made = _Map(
        address, rank, of.dtype.itemsize, swizzle, 0xE7, (ctypes.c_uint32 * 5)(*[min(n, 2**32 - 1) for n in of.dims]),
        (ctypes.c_uint64 * 4)(*of.strides), (ctypes.c_uint16 * 5)(*of.box),
    )  # fmt: skip
    return bytes(made).ljust(MAP_BYTES, b"\0")


class _Map(ctypes.Structure):
    """emu::Map of tests/emulation/runtime.hpp."""

    _fields_ = [
        ("address", ctypes.c_uint64),
        ("rank", ctypes.c_uint8),
        ("element", ctypes.c_uint8),
        ("swizzle", ctypes.c_uint8),
        ("magic", ctypes.c_uint8),
        ("dims", ctypes.c_uint32 * 5),
        ("strides", ctypes.c_uint64 * 4),
        ("box", ctypes.c_uint16 * 5),
    ]  # fmt: skip


class _Region(NamedTuple):
    name: str
    begin: int
    end: int


_regions: dict[int, _Region] = {}  # of guarded arrays, by the address of their mapping


class _Memory(mmap.mmap):
    """A mapping that leaves the list of regions when its last array is gone."""

    key = 0

    def __del__(self) -> None:
        _regions.pop(self.key, None)


def guarded(array: NDArray[Any], name: str = "", before: bool = False) -> NDArray[Any]:
    """A row-major copy of an array that ends (before: begins) where a page begins that nobody can access.

    The first element lies at a multiple of 16 bytes, so that up to 15 bytes behind an odd size are not watched.
    name: for reports.
    """
    pages = -(-max(array.nbytes, 1) // _PAGE)
    memory = _Memory(-1, (pages + 2) * _PAGE)
    address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    libc = ctypes.CDLL(None, use_errno=True)
    for edge in (address, address + (pages + 1) * _PAGE):
        if libc.mprotect(ctypes.c_void_p(edge), ctypes.c_size_t(_PAGE), 0):
            raise OSError(ctypes.get_errno(), "mprotect")
    offset = _PAGE if before else (pages + 1) * _PAGE - -(-array.nbytes // 16) * 16
    memory.key = address
    _regions[address] = _Region(name or "an array", address + offset, address + offset + array.nbytes)
    found = np.frombuffer(memory, np.uint8, array.nbytes, offset).view(array.dtype).reshape(array.shape)
    found[...] = array
    return found


def _with_names(report: str) -> str:
    """Says of an address where it lies beside a guarded array."""
    words = report.split("address 0x")
    if len(words) < 2:
        return report
    address = int(words[1].split(",")[0], 16)
    for region in list(_regions.values()):
        if region.begin <= address < region.end:
            return f"{report} (inside of {region.name})"
        if region.end <= address < region.end + 2 * _PAGE:
            return f"{report} ({address - region.end} bytes behind the end of {region.name})"
        if region.begin - 2 * _PAGE <= address < region.begin:
            return f"{report} ({region.begin - address} bytes before the start of {region.name})"
    return report
