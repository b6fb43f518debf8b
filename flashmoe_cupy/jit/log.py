"""What a compile has said: registers, spills and remarks of a kernel, and the places of errors."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import NamedTuple

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


def blames_ptx(log: str) -> bool:
    """Whether errors name lines of the PTX."""
    return _PTX_LINE.search(log) is not None


def quote_ptx(log: str, ptx: str) -> str:
    """Put the PTX text under each ptxas error: ptxas names only line numbers of a text that nobody has seen.

    ptx: "" where it is not known.
    """
    text = ptx.split("\n") if ptx else []
    lines = []
    for line in log.splitlines():
        lines.append(line)
        at = _PTX_LINE.search(line)
        if at and 0 < int(at[1]) <= len(text):
            lines.append(f"    error in PTX: {text[int(at[1]) - 1].strip()}")
    return "\n".join(lines)
