"""Launches that always run one after the other: their parameters stay in memory, a call stores addresses that are new.

Every launch has memory of its own for Params in every thread that uses it. The driver copies it before a launch
returns, so it is free again at once.
"""

from __future__ import annotations

import ctypes
import struct
import threading
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from flashmoe_cupy.errors import FlashMoEError
from flashmoe_cupy.jit import driver, launch, tensormap
from flashmoe_cupy.jit.launch import Launch

if TYPE_CHECKING:
    from flashmoe_cupy.jit import graph

_CONFIG = struct.Struct("7I4xQQI4x")  # CUlaunchConfig: grid, block, shared memory, stream, attributes, their number
_ATTRIBUTE = struct.Struct("i4xi60x")  # CUlaunchAttribute
_STREAM = struct.Struct("Q")
_STREAM_AT = 32
_ALIGNMENT = 128  # of Params, in bytes
_LEGACY_STREAM = 0  # the handle of the default stream that all threads share
_FEWEST = 3  # launches that a graph queues sooner than one by one
_STREAM_SERIALIZATION = 6  # CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
_COOPERATIVE = 2  # CU_LAUNCH_ATTRIBUTE_COOPERATIVE
_MOST_ENCODED = 64  # sets of encoded maps that a thread remembers for a sequence
_calls: Any = None  # the driver's cuLaunchKernelEx and cuMemsetD32Async

Place = tuple[int, int]  # (which address of a call's table, bytes from there on)
NULL: Place = (-1, 0)


class Fill:
    """An array that gets the same 4 bytes everywhere before the launches.

    place: of its address in the table. size: in bytes, a multiple of 4. word: the 4 bytes, as an unsigned number.
    """

    __slots__ = ("place", "size", "word")

    def __init__(self, place: int, size: int, word: int) -> None:
        self.place, self.size, self.word = place, size, word


class _Own:
    """The launches in one thread."""

    __slots__ = (
        "bound", "calls", "configs", "counted", "counters", "encoded", "find_counter", "find_graph", "graph", "keep",
        "known", "last", "nodes", "others", "settings", "stream", "table", "view", "words",
    )  # fmt: skip

    def __init__(self) -> None:
        self.words: Any = None  # the Params of all, in words of 8 bytes; storing into memory of ctypes is the fastest
        self.view: Any = None  # the same, in bytes
        self.others: list[tuple[int, int]] = []  # word, and which address is stored there
        self.last: list[tuple[int, int]] = []  # word, and how many bytes behind the table's last address
        self.counters: list[int] = []  # words that hold the address of a counter
        self.find_counter: Callable[[int, int], int] | None = None  # launch.counters(), if there are such words
        self.counted = -1  # the stream whose counter is stored for good; -1: none
        self.encoded: list[tuple[int, tensormap.TensorMap, Place]] = []  # byte, map, and its address's place
        self.known: dict[tuple[int, ...], list[bytes]] = {}  # encoded maps by their addresses
        self.configs: list[Any] = []  # CUlaunchConfig of each
        self.calls: list[tuple[int, int, int, None]] = []  # arguments of cuLaunchKernelEx
        self.nodes: list[Any] = []  # of a graph, if they may become one
        self.find_graph: Callable[..., graph.Graph | None] | None = None  # graph.find; None: they never become one
        self.keep: list[Any] = []
        self.bound = False  # the device's context is the thread's for good
        self.stream = 0  # what is stored
        self.table: tuple[int, ...] = ()  # what is stored; () = nothing, or not all of it
        self.graph: graph.Graph | None = None  # of this stream
        self.settings: graph.Settings = []  # what it needs to become these launches


class LaunchSequence:
    """Launches on one device; the i-th one takes its pointers from the given places.

    Only the last address, that of a workspace, may be used with an offset. fills: what is written before the launches.
    """

    __slots__ = ("_check", "_early", "_kernels", "_last", "_local", "_plain", "_single", "device", "fills", "launches")

    def __init__(
        self, launches: Sequence[tuple[Launch, tuple[Place, ...]]], fills: Sequence[Fill] = ()
    ) -> None:  # fmt: skip
        self.launches, self.fills = tuple(launches), tuple(fills)
        self.device = launches[0][0].device
        self._last = max(i for _, places in launches for i, _ in places)
        if any(offset and i != self._last for _, places in launches for i, offset in places):
            raise ValueError("an offset to another address than the last one")
        self._check = any(one.check for one, _ in launches)
        # A call only stores addresses.
        self._plain = not (fills or self._check or any(one.counter or one.encoded for one, _ in launches))
        self._single = self._plain and len(launches) == 1
        self._kernels = tuple([one.function for one, _ in launches])
        self._early = [one.early for one, _ in launches]
        self._local = threading.local()

    def for_places(self, order: Sequence[int]) -> LaunchSequence:
        """The same launches for tables that have the addresses of these places, in this order; all others are 0."""
        at = {place: i for i, place in enumerate(order)}
        return LaunchSequence(
            [(one, tuple([(at[i], offset) if i in at else NULL for i, offset in of])) for one, of in self.launches],
            [Fill(at[fill.place], fill.size, fill.word) for fill in self.fills],
        )

    def run(self, table: tuple[int, ...], stream: int, recorded: bool = True) -> None:
        """Queue all of them; nothing is waited for. table: addresses, always as many.

        recorded: the stream is being recorded, or may be. Otherwise several launches go as one CUDA graph.
        """
        try:
            own = self._local.own
        except AttributeError:
            own = self._local.own = self._make()
            own.bound = launch.bound() == self.device
        if own.bound:
            if own.stream == stream and own.table == table and self._single:  # nothing to store
                code = _calls.cuLaunchKernelEx(*own.calls[0])
                if code:
                    _must(code, "a launch")
                return
            self._queue(own, table, stream, recorded)
        else:
            with launch.bind(self.device):
                self._queue(own, table, stream, recorded)
            own.bound = launch.bound() == self.device
        if self._check:
            launch.check(self.device, stream)

    def _prepare(self, own: _Own, table: tuple[int, ...], stream: int) -> None:
        """What some launches need in each call beside addresses."""
        if own.encoded:
            self._encode(own, table)
        if own.counters and own.counted != stream:
            assert own.find_counter is not None
            for word in own.counters:
                own.words[word] = own.find_counter(self.device, stream)
            # This stream is the same one for good, and no graph records it. Another's handle may be a new stream's.
            own.counted = _LEGACY_STREAM if stream == _LEGACY_STREAM else -1
        for fill in self.fills:
            _must(_calls.cuMemsetD32Async(table[fill.place], fill.word, fill.size // 4, stream), "a fill")

    def _queue(self, own: _Own, table: tuple[int, ...], stream: int, recorded: bool) -> None:
        if own.stream != stream:
            for config in own.configs:
                _STREAM.pack_into(config, _STREAM_AT, stream)
            own.stream, own.graph = stream, None
        if own.table != table:
            words, before, own.table = own.words, own.table, ()
            address = table[self._last]
            if not before or before[self._last] != address:
                for word, offset in own.last:
                    words[word] = address + offset
            for word, i in own.others:  # looking which ones have changed takes longer
                words[word] = table[i]
            own.table = table
        if not self._plain:
            self._prepare(own, table, stream)
        if not recorded and own.find_graph is not None and not own.counters:
            if own.graph is None:
                own.graph = own.find_graph(stream, self._kernels, own.nodes, self._early)
                own.settings = own.graph.settings(own.nodes) if own.graph else []
            if own.graph is not None:
                own.graph.run(own.settings, own.table, stream)
                return
        call = _calls.cuLaunchKernelEx
        for one in own.calls:
            code = call(*one)
            if code:
                _must(code, "a launch")

    def _encode(self, own: _Own, table: tuple[int, ...]) -> None:
        addresses = tuple([table[i] + offset for _, _, (i, offset) in own.encoded])
        found = own.known.get(addresses)
        if found is None:
            if len(own.known) >= _MOST_ENCODED:
                own.known.clear()
            found = [tensormap.encode(of, at) for (_, of, _), at in zip(own.encoded, addresses, strict=True)]
            own.known[addresses] = found
        for (byte, _, _), encoded in zip(own.encoded, found, strict=True):
            own.view[byte : byte + tensormap.BYTES] = encoded

    def _make(self) -> _Own:
        global _calls
        if _calls is None:
            _calls = _Calls(driver.library())
        own = _Own()
        sizes = [-(-(8 * len(places) + len(one.tail)) // _ALIGNMENT) * _ALIGNMENT for one, places in self.launches]
        storage = ctypes.create_string_buffer(sum(sizes) + _ALIGNMENT)
        start = -ctypes.addressof(storage) % _ALIGNMENT
        view = own.view = memoryview(storage).cast("B")[start : start + sum(sizes)]
        own.words = (ctypes.c_uint64 * (sum(sizes) // 8)).from_buffer(storage, start)
        both = _ATTRIBUTE.pack(_STREAM_SERIALIZATION, 1) + _ATTRIBUTE.pack(_COOPERATIVE, 1)
        attributes = ctypes.create_string_buffer(both, len(both))
        own.keep += [storage, attributes]
        at = 0
        for (one, places), size in zip(self.launches, sizes, strict=True):
            behind = at + 8 * len(places)
            view[behind : behind + len(one.tail)] = one.tail
            for word, (i, offset) in (*enumerate(places), *[(word, places[index]) for word, index in one.maps]):
                if i == self._last:
                    own.last.append((at // 8 + word, offset))
                elif i >= 0:
                    own.others.append((at // 8 + word, i))
                else:
                    own.words[at // 8 + word] = 0
            own.encoded += [(at + byte, of, places[index]) for byte, of, index in one.encoded]
            if one.counter:
                own.counters.append(at // 8 + one.counter)
                own.find_counter = launch.counters()
            array = (ctypes.c_void_p * 1)(ctypes.addressof(storage) + start + at)
            config = ctypes.create_string_buffer(_CONFIG.size)
            first = ctypes.addressof(attributes) + (0 if one.early else _ATTRIBUTE.size)
            _CONFIG.pack_into(
                config, 0, one.grid, 1, 1, one.threads, 1, 1, one.smem, 0, first, one.early + one.at_once
            )
            own.configs.append(config)
            own.calls.append((ctypes.addressof(config), one.function, ctypes.addressof(array), None))
            own.keep.append(array)
            at += size
        if len(self.launches) >= _FEWEST and not any(one.at_once for one, _ in self.launches):
            from flashmoe_cupy.jit import graph  # which a single launch does without

            own.nodes = [graph.node(one, its[2]) for (one, _), its in zip(self.launches, own.calls, strict=True)]
            own.find_graph = graph.find
        return own


class _Calls:
    """Functions of the driver, whose arguments are all addresses and numbers of 8 bytes but one."""

    def __init__(self, driver: Any) -> None:
        self.cuLaunchKernelEx = driver.cuLaunchKernelEx
        self.cuLaunchKernelEx.argtypes = [ctypes.c_void_p] * 4
        self.cuMemsetD32Async = driver.cuMemsetD32Async
        self.cuMemsetD32Async.argtypes = [ctypes.c_void_p, ctypes.c_uint, ctypes.c_size_t, ctypes.c_void_p]


def _must(code: int, what: str) -> None:
    if code:
        raise FlashMoEError(f"the driver refuses {what} (error {code})")
