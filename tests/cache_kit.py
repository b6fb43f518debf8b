"""What the tests of the kernel cache share: a toy kernel, a stand-in compiler, an empty cache folder."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import pytest

from flashmoe_cupy import _env
from flashmoe_cupy.errors import CompileError
from flashmoe_cupy.jit import cache, compiler, disk, source
from flashmoe_cupy.jit.log import Compiled

HEADERS = {
    "toy/kernel.cuh": '#pragma once\n#include "toy/params.cuh"\nnamespace fm { template <int N> struct Toy {\n'
    "  static void run(const Params& p) { p.out[threadIdx.x] = p.scale * N; }\n}; }\n",
    "toy/params.cuh": "#pragma once\nnamespace fm { struct Params { float* out; float scale; int n; }; }\n",
}


def toy(n: int = 64) -> str:
    return source.render("toy/kernel.cuh", f"Toy<{n}>", "Params", 16, 64, 1)


TU = toy()


class Fake:
    """Stands in for NVRTC: counts, can be slow, and its cubin depends on all that it is given."""

    def __init__(self) -> None:
        self.count = 0
        self.seconds = 0.0
        self.log = ""

    def __call__(
        self, tu: str, headers: Mapping[str, str], arch: str, options: Sequence[str], name: str = "kernel"
    ) -> Compiled:
        self.count += 1
        time.sleep(self.seconds)
        if self.log:
            raise CompileError(f"{name} does not compile", self.log)
        body = repr((tu, sorted(headers.items()), arch, tuple(options))).encode()
        return Compiled(b"\x7fELF" + body * 20, "the log", 32, 0, 0, 0, 256, 1.5, (), "the ptx")


def fresh() -> None:
    """As a new process would start: nothing remembered, counters at zero, variables parsed again."""
    cache._forget()
    cache._stats = cache.Stats()
    disk._warned = False
    _env.reload()


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty cache folder that does not exist yet."""
    for name in _env.VARIABLES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("FLASHMOE_CACHE_DIR", str(tmp_path / "cache"))
    fresh()
    yield tmp_path / "cache"
    monkeypatch.undo()
    fresh()


@pytest.fixture
def fake(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Fake:
    """The cache of `folder` in front of a stand-in compiler."""
    del folder
    fake = Fake()
    monkeypatch.setattr(compiler, "compile_cubin", fake)
    monkeypatch.setattr(compiler, "nvrtc_version", lambda: (12, 9))
    return fake


def get(tu: str = TU, arch: str = "sm_80", name: str = "toy") -> cache.Entry:
    return cache.get(tu, name, arch, HEADERS)


def counts() -> tuple[int, int, int]:
    found = cache.stats()
    return found.hits_memory, found.hits_disk, found.compiled


def key(
    tu: str = TU,
    headers: Mapping[str, str] = HEADERS,
    arch: str = "sm_80",
    options: Sequence[str] = compiler.OPTIONS,
    nvrtc: tuple[int, int] = (12, 9),
) -> str:
    return cache.cache_key(tu, headers, arch, options, nvrtc)


def child_env(folder: Path) -> dict[str, str]:
    root = str(Path(__file__).resolve().parent.parent)
    return {
        **{name: value for name, value in os.environ.items() if name not in _env.VARIABLES},
        "FLASHMOE_CACHE_DIR": str(folder),
        "PYTHONPATH": os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH", "")])),
    }
