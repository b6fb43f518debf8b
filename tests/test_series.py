"""Launches that belong together, with a driver that only writes down what it is given."""

from __future__ import annotations

import ctypes
import struct
import threading
from collections.abc import Iterator
from typing import Any

import pytest

from flashmoe_cupy.errors import FlashMoEError
from flashmoe_cupy.jit import launch, series
from flashmoe_cupy.jit.launch import Launch
from flashmoe_cupy.jit.series import Series


class Driver:
    """cuLaunchKernelEx, and what launch.launch calls. Notes configuration, attribute and parameters."""

    def __init__(self) -> None:
        self.early: list[tuple[Any, ...]] = []
        self.plain: list[tuple[int, ...]] = []
        self.devices: list[int] = []
        self.code = 0

    def launch_ex(self, config: int, function: int, parameters: int, extra: None) -> int:
        assert extra is None
        *sizes, stream, attributes, count = struct.unpack("7I4xQQI4x", ctypes.string_at(config, 56))
        attribute = struct.unpack("i4xi60x", ctypes.string_at(attributes, 72))[: 2 * count]
        (address,) = (ctypes.c_void_p * 1).from_address(parameters)
        assert address is not None and address % 128 == 0
        self.early.append((function, tuple(sizes), stream, attribute, ctypes.string_at(address, 256)))
        return self.code

    def launchKernel(self, *given: int) -> None:
        self.plain.append(given)

    def getDevice(self) -> int:
        return 0

    def setDevice(self, device: int) -> None:
        self.devices.append(device)

    def streamIsCapturing(self, *_: int) -> bool:
        return True


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> Iterator[Driver]:
    fake = Driver()
    for name, value in {"_driver": fake, "_runtime": fake, "_devices": 1, "_local": launch._Local()}.items():
        monkeypatch.setattr(launch, name, value)
    monkeypatch.setattr(series, "_call", fake.launch_ex)
    yield fake


def two(**change: Any) -> Series:
    """A launch of two pointers, one of them also in a map behind 48 bytes, and one of three."""
    first = Launch(0, 77, 5, 384, 1000, struct.Struct("2Q").pack_into, bytes(range(160)), False, ((6, 1),), early=True)
    second = Launch(0, 78, 1, 64, 0, struct.Struct("3Q").pack_into, bytes([7] * 20), False)
    return Series([(first._replace(**change), (3, 1)), (second, (0, 2, 2))])


def test_a_call_stores_addresses(driver: Driver) -> None:
    both = two()
    for table, stream in (((0, 0x10, 0x20, 0x30), 9), ((0, 0x1000, 0x2000, 0x3000), 9), ((0, 1, 2, 3), 0)):
        both.run(table, stream)
        (f, sizes, at, attribute, params), (g, sizes_g, at_g, attribute_g, params_g) = driver.early[-2:]
        assert (f, sizes, at, attribute) == (77, (5, 1, 1, 384, 1, 1, 1000), stream, (6, 1))
        assert (g, sizes_g, at_g, attribute_g) == (78, (1, 1, 1, 64, 1, 1, 0), stream, ())
        want = bytearray(struct.pack("2Q", table[3], table[1]) + bytes(range(160)))
        want[48:56] = struct.pack("Q", table[1])
        assert params[:176] == want
        assert params_g[:44] == struct.pack("3Q", 0, table[2], table[2]) + bytes([7] * 20)
    assert driver.devices == [0, 0] and not driver.plain  # the context is bound once


def test_addresses_are_stored_when_they_change(driver: Driver) -> None:
    both, table = two(), [0, 1, 2, 3]
    both.run(table, 9)
    both._local.own.words[0] = 99  # what nobody stores again
    both.run(list(table), 9)
    assert driver.early[-2][4][:8] == struct.pack("Q", 99)
    table[1] = 4  # the caller's list is not the one that is remembered
    both.run(table, 9)
    assert driver.early[-2][4][:16] == struct.pack("2Q", 99, 4)


def test_threads_have_buffers_of_their_own(driver: Driver) -> None:
    both = two()
    both.run((0, 1, 2, 3), 9)
    mine = both._local.own
    found: list[Any] = []

    def other() -> None:
        both.run((0, 4, 5, 6), 8)
        found.append(both._local.own)

    thread = threading.Thread(target=other)
    thread.start()
    thread.join()
    assert found[0] is not mine and driver.early[-2][2] == 8
    assert mine.words[0] == 3 and found[0].words[0] == 6


def test_the_driver_may_refuse(driver: Driver) -> None:
    driver.code = 700
    with pytest.raises(FlashMoEError, match="error 700"):
        two().run((0, 1, 2, 3), 9)


@pytest.mark.parametrize("change", [{"check": True}, {"counter": 3}, {"head": lambda view, at, *pointers: None}])
def test_what_needs_more_goes_the_long_way(driver: Driver, change: dict[str, Any]) -> None:
    two(**change).run((0, 1, 2, 3), 9)
    assert [given[0] for given in driver.plain] == [77, 78] and not driver.early
