"""Memory between the launches of an operation: one allocation for each stream, which later calls use again."""

from __future__ import annotations

import threading

from flashmoe_cupy.ops.access import ArrayAccess

_MOST_STREAMS = 16
_SMALL = 32 << 20  # bytes that may always stay
_SHARE = 256  # of the device's memory, of which one such part may stay where that is more


class Block:
    """Memory of a device. size: in bytes. array: what keeps it."""

    __slots__ = ("address", "array", "size")

    def __init__(self, size: int, address: int, array: object) -> None:
        self.size, self.address, self.array = size, address, array


class Workspaces(threading.local):
    """Those of a thread: the calls on one stream use the same one, one after the other."""

    def __init__(self) -> None:
        self.kept: dict[tuple[int, int], Block] = {}  # by device and stream

    def find(self, access: ArrayAccess, device: int, stream: int, size: int, unshared: bool) -> Block:
        """At least `size` bytes for the next launches on the stream. unshared: memory that no later call gets."""
        if unshared:
            return _new(access, device, stream, size, unshared)
        kept = self.kept.get((device, stream))
        if kept is None or kept.size < size:
            others = sum(other.size for at, other in self.kept.items() if at != (device, stream))
            if len(self.kept) >= _MOST_STREAMS or not may_stay(device, others + size):
                self.kept.clear()
            kept = self.kept[device, stream] = _new(access, device, stream, size, unshared)
        return kept


def may_stay(device: int, size: int) -> bool:
    """Whether workspaces of so many bytes may stay on a device."""
    if size <= _SMALL:
        return True
    from flashmoe_cupy.jit import launch

    return size <= launch.memory_bytes(device) // _SHARE


def _new(access: ArrayAccess, device: int, stream: int, size: int, unshared: bool) -> Block:
    made = access.empty(device, (size,), (1,), access.uint8)
    if unshared and not access.graph_pool:
        keep_if_recorded(made, stream)
    return Block(size, access.pointer(made), made)


_recorded: list[object] = []  # workspaces whose addresses a graph has; nobody tells when it is gone


def keep_if_recorded(workspace: object, stream: int) -> None:
    """Keep a workspace out of its pool for ever, if the launches that use it are being recorded into a graph."""
    from flashmoe_cupy.jit import launch

    if launch.is_capturing(stream):
        _recorded.append(workspace)
