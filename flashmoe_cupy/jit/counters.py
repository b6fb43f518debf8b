"""Counters in device memory, from which the blocks of a launch take the number of their next piece of work.

A counter is two zeros, and a kernel that used it leaves two zeros. Launches of a stream run one after the other and
share one. A launch that is recorded into a graph gets one for itself: the graph may run beside anything.
"""

from __future__ import annotations

import ctypes
import threading
from typing import Any

from flashmoe_cupy.jit import driver

_COUNTERS = 16384  # of a device: 128 KB; more streams and recorded launches than that get none
_BYTES = 8  # of one


class _Pool:
    """The counters of one device. taken: how many are handed out."""

    __slots__ = ("address", "taken")

    def __init__(self, address: int) -> None:
        self.address, self.taken = address, 0


_pools: dict[int, _Pool] = {}  # by device
_of_stream: dict[tuple[int, int], int] = {}  # by device and the driver's id of a stream: the address
_lock = threading.Lock()


def counter(runtime: Any, device: int, stream: int) -> int:
    """The address of the counter for one launch on a stream of a device, which is the current one.

    0: there is none, because all are handed out or the device has no pool yet and a graph is being recorded.
    """
    if runtime.streamIsCapturing(stream):
        return _take(_pools.get(device))
    # Two streams can have the same handle, one after the other, or as default streams of two threads; never this id.
    unique = ctypes.c_ulonglong()
    if driver.library().cuStreamGetId(ctypes.c_void_p(stream), ctypes.byref(unique)):
        return 0
    key = device, unique.value
    found = _of_stream.get(key)
    if found is None:
        with _lock:
            if device not in _pools:
                _pools[device] = _make(runtime)
        found = _of_stream.setdefault(key, _take(_pools[device]))
    return found


def _make(runtime: Any) -> _Pool:
    address = int(runtime.malloc(_COUNTERS * _BYTES))  # never given back: graphs keep addresses
    runtime.memset(address, 0, _COUNTERS * _BYTES)
    runtime.deviceSynchronize()
    return _Pool(address)


def _take(pool: _Pool | None) -> int:
    if pool is None:
        return 0
    with _lock:
        if pool.taken == _COUNTERS:
            return 0
        pool.taken += 1
        return pool.address + (pool.taken - 1) * _BYTES

