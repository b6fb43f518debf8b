"""Launches that belong together, with a driver that only writes down what it is given."""

from __future__ import annotations

import ctypes
import struct
import threading
from collections.abc import Iterator
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest

from flashmoe_cupy.errors import FlashMoEError
from flashmoe_cupy.jit import counters, graph, launch, sequence
from flashmoe_cupy.jit import driver as cuda
from flashmoe_cupy.jit.launch import Launch
from flashmoe_cupy.jit.sequence import NULL, Fill, LaunchSequence


class Driver:
    """The driver's functions for launches and fills. Notes configuration, attribute and parameters."""

    def __init__(self) -> None:
        self.early: list[tuple[Any, ...]] = []
        self.fills: list[tuple[int, ...]] = []
        self.waited: list[int] = []
        self.capturing = True
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

    def fill(self, *given: int) -> int:
        self.fills.append((*given, len(self.early)))
        return self.code

    def streamSynchronize(self, stream: int) -> None:
        self.waited.append(stream)

    def getDevice(self) -> int:
        return 0

    def setDevice(self, device: int) -> None:
        self.devices.append(device)

    def streamIsCapturing(self, *_: int) -> bool:
        return self.capturing


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> Iterator[Driver]:
    fake = Driver()
    for name, value in {"_driver": fake, "_runtime": fake, "_devices": 1, "_local": launch._Local()}.items():
        monkeypatch.setattr(launch, name, value)
    calls = SimpleNamespace(cuLaunchKernelEx=fake.launch_ex, cuMemsetD32Async=fake.fill)
    monkeypatch.setattr(sequence, "_calls", calls)
    yield fake


def two(**change: Any) -> LaunchSequence:
    """A launch of two pointers, one of them also in a map behind 48 bytes, and one of three, of which one is moved."""
    given: dict[str, Any] = {"grid": 5, "maps": ((6, 1),), "early": True} | change
    first = Launch(0, 77, threads=384, smem=1000, pointers=2, tail=bytes(range(160)), **given)
    second = Launch(0, 78, 1, 64, 0, 3, bytes([7] * 20))
    return LaunchSequence([(first, ((2, 0), (1, 0))), (second, (NULL, (3, 0), (3, 256)))])


def test_a_call_stores_addresses(driver: Driver) -> None:
    both = two()
    for table, stream in (((0, 0x10, 0x20, 0x30), 9), ((0, 0x1000, 0x2000, 0x3000), 9), ((0, 1, 2, 3), 0)):
        both.run(table, stream)
        (f, sizes, at, attribute, params), (g, sizes_g, at_g, attribute_g, params_g) = driver.early[-2:]
        assert (f, sizes, at, attribute) == (77, (5, 1, 1, 384, 1, 1, 1000), stream, (6, 1))
        assert (g, sizes_g, at_g, attribute_g) == (78, (1, 1, 1, 64, 1, 1, 0), stream, ())
        want = bytearray(struct.pack("2Q", table[2], table[1]) + bytes(range(160)))
        want[48:56] = struct.pack("Q", table[1])
        assert params[:176] == want
        assert params_g[:44] == struct.pack("3Q", 0, table[3], table[3] + 256) + bytes([7] * 20)
    assert driver.devices == [0, 0]  # the context is bound once


def test_addresses_are_stored_when_they_change(driver: Driver) -> None:
    """That of the workspace only when it is another one."""
    both = two()
    both.run((0, 1, 2, 3), 9)
    words = both._local.own.words
    words[0] = words[33] = 99  # of address 2 and of the last one
    both.run((0, 1, 2, 3), 9)
    assert driver.early[-2][4][:16] == struct.pack("2Q", 99, 1) and driver.early[-1][4][8:16] == struct.pack("Q", 99)
    both.run((0, 4, 2, 3), 9)
    assert driver.early[-2][4][:16] == struct.pack("2Q", 2, 4) and driver.early[-1][4][8:16] == struct.pack("Q", 99)
    both.run((0, 4, 2, 5), 9)
    assert driver.early[-1][4][:24] == struct.pack("3Q", 0, 5, 261)


def test_a_table_may_have_another_order(driver: Driver) -> None:
    """What it has not is null, also in a map; what nobody asks for may be in it."""
    two().for_places((9, 1, 3)).run((0x90, 0x10, 0x30), 9)
    first = driver.early[0][4]
    assert first[:16] == struct.pack("2Q", 0, 0x10) and first[48:56] == struct.pack("Q", 0x10)
    assert driver.early[1][4][:24] == struct.pack("3Q", 0, 0x30, 0x130)
    two().for_places((2, 3)).run((0x20, 0x30), 9)
    first = driver.early[2][4]
    assert first[:16] == struct.pack("2Q", 0x20, 0) and first[48:56] == bytes(8)


def test_only_the_last_address_has_offsets() -> None:
    ((one, _), _) = two().launches
    with pytest.raises(ValueError, match="an offset to another address"):
        LaunchSequence([(one, ((1, 8), (2, 0)))])


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
    assert mine.words[0] == 2 and found[0].words[0] == 5


def test_the_driver_may_refuse(driver: Driver) -> None:
    driver.code = 700
    with pytest.raises(FlashMoEError, match="error 700"):
        two().run((0, 1, 2, 3), 9)


def test_every_call_is_waited_for_under_the_check(driver: Driver) -> None:
    """But not while a graph is recorded."""
    both = two(check=True)
    both.run((5, 1, 2, 3), 9)
    assert not driver.waited
    driver.capturing = False
    both.run((5, 1, 2, 3), 8)
    assert driver.waited == [8] and len(driver.early) == 4


def test_every_launch_gets_its_counter(driver: Driver, monkeypatch: pytest.MonkeyPatch) -> None:
    taken = iter((0x111, 0x222, 0x333))
    monkeypatch.setattr(counters, "counter", lambda runtime, device, stream: next(taken))
    both = two(counter=3)
    for want in (0x111, 0x222, 0x333):
        both.run((0, 1, 2, 3), 9)
        assert driver.early[-2][4][24:32] == struct.pack("Q", want) and driver.early[-1][4][24:32] == bytes([7] * 8)


def test_the_counter_of_the_default_stream_stays(driver: Driver, monkeypatch: pytest.MonkeyPatch) -> None:
    """Until another stream comes: a handle may be that of a new stream by then."""
    taken = iter(range(1, 9))
    monkeypatch.setattr(counters, "counter", lambda runtime, device, stream: next(taken))
    both, found = two(counter=3), []
    for stream in (0, 0, 5, 5, 0, 0):
        both.run((0, 1, 2, 3), stream)
        found.append(struct.unpack("Q", driver.early[-2][4][24:32])[0])
    assert found == [1, 1, 2, 3, 4, 4]


def test_fills_come_before_the_launches(driver: Driver) -> None:
    both = LaunchSequence(two().launches, [Fill(2, 64, 0), Fill(1, 12, 0xFF80_0000)])
    both.run((0, 16, 32, 48), 9)
    assert driver.fills == [(32, 0, 16, 9, 0), (16, 0xFF80_0000, 3, 9, 0)] and len(driver.early) == 2
    both.for_places((1, 2, 3)).run((16, 32, 48), 8)
    assert driver.fills[2:] == [(32, 0, 16, 8, 2), (16, 0xFF80_0000, 3, 8, 2)]
    driver.code = 700
    with pytest.raises(FlashMoEError, match=r"a fill \(error 700"):
        both.run((0, 16, 32, 48), 9)


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
        self.grids: list[int] = []
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
            params = ctypes.string_at(given[2], 72)
            at, extra, kernel, context = struct.unpack("4Q", params[40:])
            self.grids.append(struct.unpack_from("I", params, 8)[0])
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
    monkeypatch.setattr(cuda, "library", lambda: fake)
    monkeypatch.setattr(graph, "_local", graph._Local())
    return fake


def three(tail: int = 7, grid: int = 5, early: bool = True) -> LaunchSequence:
    """The two launches and one more of a pointer."""
    (first, a), (second, b) = two(grid=grid).launches
    third = Launch(0, 79, 2, 32, 0, 1, bytes([tail] * 8), early=early)
    return LaunchSequence([(first, a), (second, b), (third, ((3, 0),))])


def run(some: LaunchSequence, *table: int, stream: int = 9, calls: int = 1, recorded: bool = False) -> None:
    for _ in range(calls):
        some.run((0, *table), stream, recorded)


def test_the_third_call_is_a_graph(driver: Driver, graphs: Graphs) -> None:
    some = three()
    for i in range(6):
        run(some, 0x10, 0x20, 0x30 + i // 4)
    assert len(driver.early) == 2 * 3 and graphs.launches == [(5, 9)] * 4
    assert graphs.nodes == [
        (77, 5, 1, 1, 384, 1, 1, 1000), (78, 1, 1, 1, 64, 1, 1, 0), (79, 2, 1, 1, 32, 1, 1, 0)
    ]  # fmt: skip
    assert graphs.edges == [(2, 3, *[0] * 8), (3, 4, 1, 0, 1, *[0] * 5)]  # the third may start early
    want = [
        (node, struct.pack(f"{len(params)}Q", *params))
        for last in (0x30, 0x31)
        for node, *params in ((2, 0x20, 0x10), (3, 0, last, last + 0x100), (4, last))
    ]
    assert [(node, params[: len(x)]) for (node, params), (_, x) in zip(graphs.sets, want, strict=True)] == want


def test_two_launches_stay_single(driver: Driver, graphs: Graphs) -> None:
    run(two(), 1, 2, 3, calls=5)
    assert len(driver.early) == 10 and not graphs.made


def test_what_is_recorded_stays_single(driver: Driver, graphs: Graphs) -> None:
    """And the graph learns what such launches changed."""
    some = three()
    run(some, 1, 2, 3, calls=3)
    run(some, 4, 5, 6, recorded=True)
    assert len(graphs.launches) == 1 and len(driver.early) == 9
    run(some, 4, 5, 6)
    assert len(graphs.launches) == 2 and graphs.sets[-3][1][:16] == struct.pack("2Q", 5, 4)


def test_shapes_share_a_graph(driver: Driver, graphs: Graphs) -> None:
    """The same kernels with other grids and numbers: no call of a new shape is single, and each has its own."""
    some, other = three(tail=1), three(tail=2, grid=8)
    run(some, 1, 2, 3, calls=3)
    for turn in range(4):
        run((other, some)[turn % 2], 1, 2, 3)
        assert graphs.sets[-1][1][8:16] == bytes([2 - turn % 2] * 8)
    assert graphs.made.count("cuGraphCreate") == 1 and len(driver.early) == 2 * 3
    assert graphs.grids[-3:] == [5, 1, 2] and graphs.grids[-6:-3] == [8, 1, 2]
    before = len(graphs.sets)
    run(some, 1, 2, 3)
    assert len(graphs.sets) == before  # nothing has changed


def test_streams_have_graphs_of_their_own(driver: Driver, graphs: Graphs) -> None:
    """Launches of one graph come one after the other, whatever their streams are."""
    some = three()
    for stream in (9, 9, 8, 9, 8, 8, 9):
        run(some, 1, 2, 3, stream=stream)
    assert graphs.launches == [(5, 9), (10, 8), (5, 9)] and len(driver.early) == 3 * 4


def test_threads_have_graphs_of_their_own(driver: Driver, graphs: Graphs) -> None:
    some = three()
    run(some, 1, 2, 3, calls=3)
    thread = threading.Thread(target=run, args=(some, 4, 5, 6), kwargs={"calls": 3})
    thread.start()
    thread.join()
    assert graphs.launches == [(5, 9), (10, 9)]
    assert graphs.sets[0][1][:8] == struct.pack("Q", 2) and graphs.sets[3][1][:8] == struct.pack("Q", 5)


def test_graphs_are_few(driver: Driver, graphs: Graphs, monkeypatch: pytest.MonkeyPatch) -> None:
    """The oldest goes for a new one, as soon as no launches use it any more."""
    monkeypatch.setattr(graph, "_MOST_OF_A_THREAD", 2)
    some, alive = three(), graph._alive
    for stream in (1, 2, 3):
        run(some, 1, 2, 3, stream=stream, calls=3)
    assert graphs.gone == [5, 1] and graph._alive == alive + 2
    run(some, 1, 2, 3, stream=1, calls=3)
    assert graphs.gone == [5, 1, 10, 6] and graph._alive == alive + 2


@pytest.mark.parametrize("refuses", ["cuGraphCreate", "cuGraphAddDependencies_v2", "all"])
def test_without_graphs_launches_stay_single(
    driver: Driver, graphs: Graphs, monkeypatch: pytest.MonkeyPatch, refuses: str
) -> None:
    graphs.refuses = refuses
    if refuses == "all":
        monkeypatch.setattr(graph, "_MOST", graph._alive)
    alive = graph._alive
    run(three(), 1, 2, 3, calls=5)
    assert len(driver.early) == 15 and not graphs.launches
    assert graph._alive == alive and graphs.made.count("cuGraphCreate") <= 1  # it is tried once


def test_an_old_driver_has_no_graphs(driver: Driver, graphs: Graphs) -> None:
    del graphs.cuGraphAddDependencies_v2  # type: ignore[attr-defined]
    alive = graph._alive
    run(three(), 1, 2, 3, calls=4)
    assert len(driver.early) == 12 and graph._alive == alive


def test_a_refused_launch_of_a_graph_is_an_error(graphs: Graphs) -> None:
    some = three()
    run(some, 1, 2, 3, calls=3)
    graphs.refuses = "cuGraphExecKernelNodeSetParams_v2"
    with pytest.raises(FlashMoEError, match="error 801"):
        run(some, 1, 2, 4)
    graphs.refuses = ""
    run(some, 1, 2, 4)
    assert graphs.sets[-1][1][:8] == struct.pack("Q", 4) and len(graphs.launches) == 2


def test_a_graph_may_outlive_its_module(graphs: Graphs, monkeypatch: pytest.MonkeyPatch) -> None:
    ((one, _),) = two().launches[:1]
    pointer = ctypes.c_void_p()
    made = graph.Graph([graph.node(one, ctypes.addressof(pointer))], [False])
    monkeypatch.setattr(graph, "_alive", None)
    made.__del__()  # as at the end of the process
    monkeypatch.undo()
    del made
