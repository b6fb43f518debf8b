"""Launches that always run one after the other: their parameters stay in memory, a call stores addresses that are new.

`jit.launch.launch` writes a kernel's whole Params into one buffer; an operation of five kernels would do that five
times in each call. Here every launch has a buffer of its own in every thread that uses it.
"""

from __future__ import annotations

import ctypes
import struct
import threading
from collections.abc import Callable, Sequence
from operator import itemgetter
from types import BuiltinMethodType
from typing import Any, NamedTuple

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


class _Own(NamedTuple):
    """The launches in one thread."""

    words: Any  # the Params of all, in words of 8 bytes; storing into memory of ctypes is the fastest
    pick: Callable[[Sequence[int]], tuple[int, ...]]  # the addresses that are used, out of the table
    uses: tuple[tuple[int, ...], ...]  # the words where each of them is stored
    configs: tuple[Any, ...]  # CUlaunchConfig of each
    calls: tuple[tuple[int, int, int, None], ...]  # arguments of cuLaunchKernelEx
    nodes: tuple[Any, ...]  # of a graph
    keep: tuple[Any, ...]


class Series:
    """Launches on one device; the i-th one takes its pointers from the given places of a table of addresses."""

    __slots__ = ("_early", "_kernels", "_local", "device", "launches", "plain")

    def __init__(self, launches: Sequence[tuple[Launch, tuple[int, ...]]]) -> None:
        self.launches = tuple(launches)
        self.device = launches[0][0].device
        # What is more than stored addresses, `launch.launch` does: checks, counters, maps that must be encoded.
        self.plain = all(
            not (one.check or one.counter) and isinstance(one.head, BuiltinMethodType) for one, _ in launches
        )
        self._kernels = tuple([one.function for one, _ in launches])
        self._early = tuple([one.early for one, _ in launches])
        self._local = threading.local()

    def run(self, table: Sequence[int], stream: int, recorded: bool = True) -> None:
        """Queue all of them; nothing is waited for.

        recorded: the stream is being recorded, or may be. Otherwise several launches go as one CUDA graph.
        """
        if not self.plain:
            for one, places in self.launches:
                launch.launch(one, tuple([table[i] for i in places]), stream)
            return
        if launch.bound() == self.device:
            self._queue(table, stream, recorded)
        else:
            with launch.bind(self.device):
                self._queue(table, stream, recorded)

    def _queue(self, table: Sequence[int], stream: int, recorded: bool) -> None:
        local = self._local
        if not hasattr(local, "own"):
            local.own = self._make()
            local.stream, local.addresses = 0, (-1,) * len(local.own.uses)  # what is stored
            local.graph = None  # of the same stream, and what it needs to become these launches
        own = local.own
        if local.stream != stream:
            for config in own.configs:
                _STREAM.pack_into(config, _STREAM_AT, stream)
            local.stream, local.graph = stream, None
        addresses, stored = own.pick(table), local.addresses
        if stored != addresses:
            words, local.addresses = own.words, (-1,) * len(addresses)  # nothing, until all of it is stored
            for address, before, uses in zip(addresses, stored, own.uses, strict=True):
                if address != before:
                    for word in uses:
                        words[word] = address
            local.addresses = addresses
        if not recorded and len(own.calls) >= _FEWEST:
            if local.graph is None:
                found = graph.find(stream, self._kernels, own.nodes, self._early)
                local.graph = found and (found, found.settings(own.nodes))
            if local.graph is not None:
                found, settings = local.graph
                found.run(settings, local.addresses, stream)
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
        sizes = [-(-(8 * len(places) + len(one.tail)) // _ALIGNMENT) * _ALIGNMENT for one, places in self.launches]
        storage = ctypes.create_string_buffer(sum(sizes) + _ALIGNMENT)
        start = -ctypes.addressof(storage) % _ALIGNMENT
        view = memoryview(storage).cast("B")[start : start + sum(sizes)]
        words = (ctypes.c_uint64 * (sum(sizes) // 8)).from_buffer(storage, start)
        attribute = ctypes.create_string_buffer(_ATTRIBUTE.pack(_STREAM_SERIALIZATION, 1), _ATTRIBUTE.size)
        # At least two places, or one alone would come without a tuple around it.
        uses: dict[int, list[int]] = {place: [] for place in (0, 1)}
        keep: list[Any] = [storage, attribute]
        configs, calls, nodes, at = [], [], [], 0
        for (one, places), size in zip(self.launches, sizes, strict=True):
            pointers = 8 * len(places)
            view[at + pointers : at + pointers + len(one.tail)] = one.tail
            for word, place in (*enumerate(places), *[(word, places[index]) for word, index in one.maps]):
                uses.setdefault(place, []).append(at // 8 + word)
            array = (ctypes.c_void_p * 1)(ctypes.addressof(storage) + start + at)
            config = ctypes.create_string_buffer(_CONFIG.size)
            _CONFIG.pack_into(
                config, 0, one.grid, 1, 1, one.threads, 1, 1, one.smem, 0, ctypes.addressof(attribute), int(one.early)
            )
            configs.append(config)
            calls.append((ctypes.addressof(config), one.function, ctypes.addressof(array), None))
            nodes.append(graph.node(one, ctypes.addressof(array)))
            keep.append(array)
            at += size
        stored = tuple(map(tuple, uses.values()))
        return _Own(words, itemgetter(*uses), stored, tuple(configs), tuple(calls), tuple(nodes), tuple(keep))
