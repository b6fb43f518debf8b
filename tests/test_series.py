"""Launches that belong together, with a driver that only writes down what it is given."""

from __future__ import annotations

import ctypes
import gc
import struct
import threading
from collections.abc import Iterator
from functools import partial
from typing import Any

import pytest

from flashmoe_cupy.errors import FlashMoEError
from flashmoe_cupy.jit import graph, launch, series, tensormap
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


# ---------------------------------------------------------------------------------------------------------------------
# graphs


class Function:
    """A function of the driver: argument types can be set, as those of ctypes."""

    def __init__(self, call: Any) -> None:
        self.call = call
        self.argtypes: list[Any] = []

    def __call__(self, *given: Any) -> int:
        assert len(given) == len(self.argtypes)
        return int(self.call(*given) or 0)


class Graphs:
    """The driver's functions for graphs; handles count up. Notes what was set and launched."""

    def __init__(self) -> None:
        self.made: list[str] = []
        self.nodes: list[tuple[Any, ...]] = []
        self.edges: list[tuple[int, ...]] = []
        self.sets: list[tuple[int, bytes]] = []
        self.launches: list[tuple[int, int]] = []
        self.gone: list[int] = []
        self.refuses = ""
        for name in graph._FUNCTIONS:
            setattr(self, name, Function(partial(self.act, name)))

    def act(self, name: str, *given: Any) -> int:
        if name == self.refuses:
            return 801
        if name in ("cuGraphCreate", "cuGraphAddKernelNode_v2", "cuGraphInstantiateWithFlags"):
            self.made.append(name)
            given[0]._obj.value = len(self.made)
        if name == "cuGraphAddKernelNode_v2":
            self.nodes.append(struct.unpack("Q7I4x", given[4].raw[:40]))
        elif name == "cuGraphAddDependencies_v2":
            self.edges.append((given[1]._obj.value, given[2]._obj.value, *given[3].raw))
        elif name == "cuGraphExecKernelNodeSetParams_v2":
            at, extra, kernel, context = struct.unpack("4Q", ctypes.string_at(given[2], 72)[40:])
            assert extra == kernel == context == 0
            (address,) = (ctypes.c_void_p * 1).from_address(at)
            self.sets.append((given[1], ctypes.string_at(address or 0, 24)))
        elif name == "cuGraphLaunch":
            self.launches.append(given)
        elif name.endswith("Destroy"):
            self.gone.append(given[0])
        return 0


@pytest.fixture
def graphs(driver: Driver, monkeypatch: pytest.MonkeyPatch) -> Graphs:
    fake = Graphs()
    monkeypatch.setattr(tensormap, "driver", lambda: fake)
    return fake


def test_brief_work_becomes_a_graph(driver: Driver, graphs: Graphs) -> None:
    both = two(early=False)
    both.launches = (both.launches[0], (both.launches[1][0]._replace(early=True), both.launches[1][1]))
    for i in range(6):
        both.run((0, 0x10, 0x20, 0x30 + i // 4), 9, brief=True)
    assert len(driver.early) == 2 * 2 and graphs.launches == [(4, 9)] * 4
    assert graphs.nodes == [(77, 5, 1, 1, 384, 1, 1, 1000), (78, 1, 1, 1, 64, 1, 1, 0)]
    assert graphs.edges == [(2, 3, 1, 0, 1, 0, 0, 0, 0, 0)]  # the second may start early
    first, second = struct.pack("2Q", 0x30, 0x10), struct.pack("3Q", 0, 0x20, 0x20)
    changed = struct.pack("2Q", 0x31, 0x10)
    want = [(2, first), (3, second), (2, changed), (3, second)]
    assert [(node, params[: len(x)]) for (node, params), (_, x) in zip(graphs.sets, want, strict=True)] == want


def test_a_graph_learns_what_single_launches_changed(driver: Driver, graphs: Graphs) -> None:
    both = two()
    for _ in range(3):
        both.run((0, 1, 2, 3), 9, brief=True)
    both.run((0, 4, 5, 6), 9)  # is being recorded, say
    assert len(graphs.launches) == 1 and len(driver.early) == 6
    both.run((0, 4, 5, 6), 9, brief=True)
    assert len(graphs.launches) == 2 and graphs.sets[-2][1][:16] == struct.pack("2Q", 6, 4)
    assert graphs.edges[0][2:] == (0,) * 8  # the second is not early


def test_another_stream_starts_with_single_launches(driver: Driver, graphs: Graphs) -> None:
    both = two()
    for stream in (9, 9, 9, 8, 9, 8, 8, 8):
        both.run((0, 1, 2, 3), stream, brief=True)
    assert graphs.launches == [(4, 9), (4, 8)] and len(driver.early) == 2 * 6
    assert graphs.made.count("cuGraphCreate") == 1


@pytest.mark.parametrize("refuses", ["cuGraphCreate", "cuGraphAddDependencies_v2", "all"])
def test_without_graphs_launches_stay_single(
    driver: Driver, graphs: Graphs, monkeypatch: pytest.MonkeyPatch, refuses: str
) -> None:
    graphs.refuses = refuses
    if refuses == "all":
        monkeypatch.setattr(graph, "_MOST", graph._alive)
    alive, both = graph._alive, two()
    for _ in range(5):
        both.run((0, 1, 2, 3), 9, brief=True)
    assert len(driver.early) == 10 and not graphs.launches
    assert graph._alive == alive


def test_an_old_driver_has_no_graphs(driver: Driver, graphs: Graphs) -> None:
    del graphs.cuGraphAddDependencies_v2  # type: ignore[attr-defined]
    alive, both = graph._alive, two()
    for _ in range(4):
        both.run((0, 1, 2, 3), 9, brief=True)
    assert len(driver.early) == 8 and graph._alive == alive


def test_a_refused_launch_of_a_graph_is_an_error(graphs: Graphs) -> None:
    both = two()
    for _ in range(3):
        both.run((0, 1, 2, 3), 9, brief=True)
    graphs.refuses = "cuGraphExecKernelNodeSetParams_v2"
    with pytest.raises(FlashMoEError, match="error 801"):
        both.run((0, 1, 2, 4), 9, brief=True)
    graphs.refuses = ""
    both.run((0, 1, 2, 4), 9, brief=True)
    assert graphs.sets[-2][1][:8] == struct.pack("Q", 4) and len(graphs.launches) == 2


def test_a_graph_goes_with_its_launches(graphs: Graphs) -> None:
    alive, both = graph._alive, two()
    for _ in range(3):
        both.run((0, 1, 2, 3), 9, brief=True)
    assert graph._alive == alive + 1
    del both
    gc.collect()
    assert graph._alive == alive and graphs.gone == [4, 1]


def test_a_graph_may_outlive_its_module(graphs: Graphs, monkeypatch: pytest.MonkeyPatch) -> None:
    (one, _), _ = two().launches
    made = graph.Graph([one], [0])
    monkeypatch.setattr(graph, "_alive", None)
    made.__del__()  # as at the end of the process
    monkeypatch.undo()
    del made
