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
from flashmoe_cupy.jit import launch, tensormap
from flashmoe_cupy.jit.launch import Launch

_CONFIG = struct.Struct("7I4xQQI4x")  # CUlaunchConfig: grid, block, shared memory, stream, attributes, their number
_ATTRIBUTE = struct.Struct("i4xi60x")  # CUlaunchAttribute
_STREAM = struct.Struct("Q")
_STREAM_AT = 32
_STREAM_SERIALIZATION = 6  # CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
_call: Any = None  # cuLaunchKernelEx


class _Own(NamedTuple):
    """One launch in one thread."""

    pack: Callable[..., None]  # stores the pointers, at the start of Params
    view: memoryview  # Params
    pick: Callable[[Sequence[int]], tuple[int, ...]]  # the pointers out of the table of addresses
    words: memoryview  # Params in words of 8 bytes
    maps: tuple[tuple[int, int], ...]  # (word in a tensor map, place in the table of addresses)
    config: Any
    config_address: int
    function: int
    parameters: int  # address of the pointer to Params
    keep: tuple[Any, ...]


class Series:
    """Launches on one device; the i-th one takes its pointers from the given places of a table of addresses."""

    __slots__ = ("_local", "device", "launches", "plain")

    def __init__(self, launches: Sequence[tuple[Launch, tuple[int, ...]]]) -> None:
        self.launches = tuple(launches)
        self.device = launches[0][0].device
        # What is more than stored addresses, `launch.launch` does: checks, counters, maps that must be encoded.
        self.plain = all(
            not (one.check or one.counter) and isinstance(one.head, BuiltinMethodType) for one, _ in launches
        )
        self._local = threading.local()

    def run(self, table: Sequence[int], stream: int) -> None:
        """Queue all of them; nothing is waited for."""
        if not self.plain:
            for one, places in self.launches:
                launch.launch(one, tuple([table[i] for i in places]), stream)
            return
        if launch.bound() == self.device:
            self._queue(table, stream)
        else:
            with launch.bind(self.device):
                self._queue(table, stream)

    def _queue(self, table: Sequence[int], stream: int) -> None:
        local = self._local
        if not hasattr(local, "own"):
            local.own = [self._make(*one) for one in self.launches]
            local.calls = [(one.config_address, one.function, one.parameters, None) for one in local.own]
            local.stream = local.table = None
        if local.stream != stream:
            for one in local.own:
                _STREAM.pack_into(one.config, _STREAM_AT, stream)
            local.stream = stream
        if local.table != table:
            local.table = None  # until all of it is stored
            for pack, view, pick, words, maps, *_ in local.own:
                pack(view, 0, *pick(table))
                for word, place in maps:
                    words[word] = table[place]
            local.table = list(table)
        call = _call
        for one in local.calls:
            code = call(*one)
            if code:
                raise FlashMoEError(f"the driver refuses a launch (error {code})")

    def _make(self, one: Launch, places: tuple[int, ...]) -> _Own:
        global _call
        if _call is None:
            _call = tensormap.driver().cuLaunchKernelEx
            _call.argtypes = [ctypes.c_void_p] * 4
        pointers = 8 * len(places)
        storage = ctypes.create_string_buffer(pointers + len(one.tail) + 256)
        start = -ctypes.addressof(storage) % 128
        view = memoryview(storage).cast("B")[start : start + -(-(pointers + len(one.tail)) // 8) * 8]
        view[pointers : pointers + len(one.tail)] = one.tail
        array = (ctypes.c_void_p * 1)(ctypes.addressof(storage) + start)
        attribute = ctypes.create_string_buffer(_ATTRIBUTE.pack(_STREAM_SERIALIZATION, 1), _ATTRIBUTE.size)
        config = ctypes.create_string_buffer(_CONFIG.size)
        _CONFIG.pack_into(
            config, 0, one.grid, 1, 1, one.threads, 1, 1, one.smem, 0, ctypes.addressof(attribute), int(one.early)
        )
        maps = tuple([(word, places[index]) for word, index in one.maps])
        # One place alone would come without a tuple around it: a slice of one stands for it.
        pick = itemgetter(*places) if len(places) > 1 else itemgetter(slice(places[0], places[0] + 1))
        return _Own(
            struct.Struct(f"{len(places)}Q").pack_into, view, pick, view.cast("Q"), maps,
            config, ctypes.addressof(config), one.function, ctypes.addressof(array), (storage, array, attribute),
        )  # fmt: skip
