"""Launches that always run one after the other: their parameters stay in memory, a call stores addresses that are new.

`jit.launch.launch` writes a kernel's whole Params into one buffer; an operation of five kernels would do that five
times in each call. Here every launch has a buffer of its own in every thread that uses it.
"""

from __future__ import annotations

import ctypes
import struct
import threading
from collections.abc import Sequence
from types import BuiltinMethodType
from typing import Any

from flashmoe_cupy.errors import FlashMoEError
from flashmoe_cupy.jit import graph, launch, tensormap
from flashmoe_cupy.jit.launch import Launch

_CONFIG = struct.Struct("7I4xQQI4x")  # CUlaunchConfig: grid, block, shared memory, stream, attributes, their number
_ATTRIBUTE = struct.Struct("i4xi60x")  # CUlaunchAttribute
_STREAM = struct.Struct("Q")
_STREAM_AT = 32
_ALIGNMENT = 128  # of Params
_FEWEST = 3  # launches that a graph queues sooner than one by one
_STREAM_SERIALIZATION = 6  # CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
_call: Any = None  # cuLaunchKernelEx

Place = tuple[int, int]  # (which address of a call's table, bytes from there on)
NULL: Place = (-1, 0)


def pointers(places: Sequence[Place], table: Sequence[int]) -> tuple[int, ...]:
    """What a launch is given."""
    return tuple([0 if i < 0 else table[i] + offset for i, offset in places])


class _Own:
    """The launches in one thread."""

    __slots__ = (
        "bound", "calls", "configs", "graph", "keep", "last", "nodes", "others", "settings", "stream", "table", "words",
    )  # fmt: skip

    def __init__(self) -> None:
        self.words: Any = None  # the Params of all, in words of 8 bytes; storing into memory of ctypes is the fastest
        self.others: list[tuple[int, int]] = []  # word, and which address is stored there
        self.last: list[tuple[int, int]] = []  # word, and how many bytes behind the table's last address
        self.configs: list[Any] = []  # CUlaunchConfig of each
        self.calls: list[tuple[int, int, int, None]] = []  # arguments of cuLaunchKernelEx
        self.nodes: list[Any] = []  # of a graph
        self.keep: list[Any] = []
        self.bound = False  # the device's context is the thread's for good
        self.stream = 0  # what is stored
        self.table: tuple[int, ...] = ()  # what is stored; () = nothing, or not all of it
        self.graph: graph.Graph | None = None  # of this stream
        self.settings: graph.Settings = []  # what it needs to become these launches


class Series:
    """Launches on one device; the i-th one takes its pointers from the given places.

    Only the last address, that of a workspace, may be used with an offset.
    """

    __slots__ = ("_early", "_kernels", "_last", "_local", "device", "launches", "plain")

    def __init__(self, launches: Sequence[tuple[Launch, tuple[Place, ...]]]) -> None:
        self.launches = tuple(launches)
        self.device = launches[0][0].device
        self._last = max(i for _, places in launches for i, _ in places)
        if any(offset and i != self._last for _, places in launches for i, offset in places):
            raise ValueError("an offset to another address than the last one")
        # What is more than stored addresses, `launch.launch` does: checks, counters, maps that must be encoded.
        self.plain = all(
            not (one.check or one.counter) and isinstance(one.head, BuiltinMethodType) for one, _ in launches
        )
        self._kernels = tuple([one.function for one, _ in launches])
        self._early = [one.early for one, _ in launches]
        self._local = threading.local()

    def arranged(self, order: Sequence[int]) -> Series:
        """The same launches for tables that have the addresses of these places, in this order; all others are 0."""
        at = {place: i for i, place in enumerate(order)}
        return Series(
            [(one, tuple([(at[i], offset) if i in at else NULL for i, offset in of])) for one, of in self.launches]
        )

    def run(self, table: tuple[int, ...], stream: int, recorded: bool = True) -> None:
        """Queue all of them; nothing is waited for. table: addresses, always as many.

        recorded: the stream is being recorded, or may be. Otherwise several launches go as one CUDA graph.
        """
        if not self.plain:
            for one, places in self.launches:
                launch.launch(one, pointers(places, table), stream)
            return
        try:
            own = self._local.own
        except AttributeError:
            own = self._local.own = self._make()
            own.bound = launch.bound() == self.device
        if own.bound:
            self._queue(own, table, stream, recorded)
        else:
            with launch.bind(self.device):
                self._queue(own, table, stream, recorded)
            own.bound = launch.bound() == self.device

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
        if not recorded and len(own.calls) >= _FEWEST:
            if own.graph is None:
                own.graph = graph.find(stream, self._kernels, own.nodes, self._early)
                own.settings = own.graph.settings(own.nodes) if own.graph else []
            if own.graph is not None:
                own.graph.run(own.settings, own.table, stream)
                return
        call = _call
        for one in own.calls:
            code = call(*one)
            if code:
                raise FlashMoEError(f"the driver refuses a launch (error {code})")

    def _make(self) -> _Own:
        global _call
        if _call is None:
            _call = tensormap.driver().cuLaunchKernelEx
            _call.argtypes = [ctypes.c_void_p] * 4
        own = _Own()
        sizes = [-(-(8 * len(places) + len(one.tail)) // _ALIGNMENT) * _ALIGNMENT for one, places in self.launches]
        storage = ctypes.create_string_buffer(sum(sizes) + _ALIGNMENT)
        start = -ctypes.addressof(storage) % _ALIGNMENT
        view = memoryview(storage).cast("B")[start : start + sum(sizes)]
        own.words = (ctypes.c_uint64 * (sum(sizes) // 8)).from_buffer(storage, start)
        attribute = ctypes.create_string_buffer(_ATTRIBUTE.pack(_STREAM_SERIALIZATION, 1), _ATTRIBUTE.size)
        own.keep += [storage, attribute]
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
            array = (ctypes.c_void_p * 1)(ctypes.addressof(storage) + start + at)
            config = ctypes.create_string_buffer(_CONFIG.size)
            _CONFIG.pack_into(
                config, 0, one.grid, 1, 1, one.threads, 1, 1, one.smem, 0, ctypes.addressof(attribute), int(one.early)
            )
            own.configs.append(config)
            own.calls.append((ctypes.addressof(config), one.function, ctypes.addressof(array), None))
            own.nodes.append(graph.node(one, ctypes.addressof(array)))
            own.keep.append(array)
            at += size
        return own
