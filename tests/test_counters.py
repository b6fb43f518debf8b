"""Counters of tiles: who shares one, and when there is none. The driver is a fake; the GPU tests use real ones."""

from __future__ import annotations

import ctypes
from typing import Any

import pytest

from flashmoe_cupy.jit import counters
from flashmoe_cupy.jit import driver as cuda


class Runtime:
    def __init__(self) -> None:
        self.capturing: set[int] = set()
        self.calls: list[tuple[Any, ...]] = []

    def streamIsCapturing(self, stream: int) -> bool:
        return stream in self.capturing

    def malloc(self, size: int) -> int:
        self.calls.append(("malloc", size))
        return 0x1000

    def memset(self, address: int, value: int, size: int) -> None:
        self.calls.append(("memset", address, value, size))

    def deviceSynchronize(self) -> None:
        self.calls.append(("deviceSynchronize",))


class Driver:
    """Ids of streams are their handles plus `generation`, which grows when handles are used again."""

    generation = 0
    error = 0

    def cuStreamGetId(self, stream: ctypes.c_void_p, found: Any) -> int:
        found._obj.value = (stream.value or 0) + 1000 * self.generation
        return self.error


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> Driver:
    fake = Driver()
    monkeypatch.setattr(cuda, "library", lambda: fake)
    monkeypatch.setattr(counters, "_pools", {})
    monkeypatch.setattr(counters, "_of_stream", {})
    monkeypatch.setattr(counters, "_COUNTERS", 6)
    return fake


def test_streams_have_their_own(driver: Driver) -> None:
    runtime = Runtime()
    first, second = (counters.counter(runtime, 0, stream) for stream in (0, 7))
    assert {first, second} == {0x1000, 0x1008}
    assert [counters.counter(runtime, 0, stream) for stream in (7, 0, 7)] == [second, first, second]
    assert runtime.calls == [("malloc", 48), ("memset", 0x1000, 0, 48), ("deviceSynchronize",)]
    driver.generation = 1  # the stream is gone, a new one has its handle; the old one's kernels may still run
    assert counters.counter(runtime, 0, 7) not in (first, second)


def test_every_recorded_launch_has_its_own(driver: Driver) -> None:
    runtime = Runtime()
    runtime.capturing = {7}
    assert counters.counter(runtime, 0, 7) == 0 and not runtime.calls, "memory cannot be had while a graph is recorded"
    used = counters.counter(runtime, 0, 5)
    assert len({used, counters.counter(runtime, 0, 7), counters.counter(runtime, 0, 7)}) == 3


def test_none_is_left(driver: Driver) -> None:
    runtime = Runtime()
    assert [counters.counter(runtime, 0, stream) > 0 for stream in range(8)] == [True] * 6 + [False] * 2
    assert counters.counter(runtime, 0, 3) and not counters.counter(runtime, 0, 7)
    driver.error = 1
    assert counters.counter(runtime, 0, 3) == 0, "a stream that cannot be told from others"
