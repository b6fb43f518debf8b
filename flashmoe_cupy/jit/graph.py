"""Launches that follow each other as one CUDA graph: queued in less than half of the time that the single ones take.

A graph belongs to a thread, a stream and the kernels in it. Grids and parameters are set anew before it is launched
where they are others than the last time, so every shape that needs the same kernels shares it; what is already queued
or running keeps its own.

A graph does not overlap with what lies in front of it on the stream, as the first of single launches does (programmatic
dependent launch): 1 us of the device. Where that counts a caller records a graph, and gets single launches in it.
"""

from __future__ import annotations

import ctypes
import struct
import threading
from collections.abc import Sequence
from typing import Any

from flashmoe_cupy import _env
from flashmoe_cupy.errors import FlashMoEError
from flashmoe_cupy.jit import tensormap
from flashmoe_cupy.jit.launch import Launch

# CUDA_KERNEL_NODE_PARAMS_v2: function, grid, block, shared memory, parameters, extra, kernel, context
_NODE = struct.Struct("Q7I4xQQQQ")
_EDGE = struct.Struct("3B5x")  # CUgraphEdgeData: port of the first, port of the second, type
_WHOLE, _EARLY = _EDGE.pack(0, 0, 0), _EDGE.pack(1, 0, 1)  # the second may start when the first one lets it
_MOST = 1024  # graphs that are alive: each has memory of the driver's
_MOST_OF_A_THREAD = 64
_CALLS = 3  # of the same kernels on a stream, until a graph is worth making
_FUNCTIONS = {
    "cuGraphCreate": 2, "cuGraphAddKernelNode_v2": 5, "cuGraphAddDependencies_v2": 5, "cuGraphInstantiateWithFlags": 3,
    "cuGraphExecKernelNodeSetParams_v2": 3, "cuGraphLaunch": 2, "cuGraphExecDestroy": 1, "cuGraphDestroy": 1,
}  # fmt: skip
_alive = 0

Settings = list[tuple[Any, ...]]  # arguments of the driver that give the nodes of a graph their parameters


def node(one: Launch, parameters: int) -> Any:
    """What a launch's node is: memory that `Graph` reads. parameters: the address of the pointer to its Params."""
    sizes = one.grid, 1, 1, one.threads, 1, 1, one.smem
    return ctypes.create_string_buffer(_NODE.pack(one.function, *sizes, parameters, 0, 0, 0), _NODE.size)


class Graph:
    """One node for each launch, one behind the other. Belongs to one thread."""

    __slots__ = ("_addresses", "_destroy", "_exec", "_graph", "_handle", "_launch", "_nodes", "_set")

    def __init__(self, nodes: Sequence[Any], early: Sequence[bool]) -> None:
        """early: whether a node may start within the one in front of it. Raises FlashMoEError."""
        global _alive
        _alive += 1  # __del__ runs for what could not be made, too
        self._addresses: object = None
        self._graph, self._exec = ctypes.c_void_p(), ctypes.c_void_p()
        call = _functions()
        self._set, self._launch = call["cuGraphExecKernelNodeSetParams_v2"], call["cuGraphLaunch"]
        self._destroy = call["cuGraphExecDestroy"], call["cuGraphDestroy"]
        _must(call["cuGraphCreate"](ctypes.byref(self._graph), 0))
        self._nodes = [ctypes.c_void_p() for _ in nodes]
        for i, made in enumerate(self._nodes):
            _must(call["cuGraphAddKernelNode_v2"](ctypes.byref(made), self._graph, None, 0, nodes[i]))
            if i > 0:
                edge = ctypes.create_string_buffer(_EARLY if early[i] else _WHOLE, _EDGE.size)
                ends = ctypes.byref(self._nodes[i - 1]), ctypes.byref(made)
                _must(call["cuGraphAddDependencies_v2"](self._graph, *ends, edge, 1))
        _must(call["cuGraphInstantiateWithFlags"](ctypes.byref(self._exec), self._graph, 0))
        self._handle = self._exec.value  # quicker to read

    def settings(self, nodes: Sequence[Any]) -> Settings:
        """What `run` takes to give the graph these nodes, whose kernels are those that it was made of."""
        return [
            (self._exec.value, mine.value, ctypes.addressof(other))
            for mine, other in zip(self._nodes, nodes, strict=True)
        ]

    def run(self, settings: Settings, addresses: object, stream: int) -> None:
        """Queue all. addresses: the same object as the last time only if settings and all Params are the same."""
        if addresses is not self._addresses:
            self._addresses, set_params = None, self._set
            for one in settings:
                if code := set_params(*one):
                    _must(code)
            self._addresses = addresses
        if code := self._launch(self._handle, stream):
            _must(code)

    def __del__(self) -> None:
        global _alive
        try:
            _alive -= 1
            if self._exec.value:
                self._destroy[0](self._exec.value)
            if self._graph.value:
                self._destroy[1](self._graph.value)
        except Exception:  # at the end of the process this module or the driver may be gone
            pass


class _Local(threading.local):
    def __init__(self) -> None:
        # By stream and kernels, the latest last: the graph, or how many calls there were; None where none can be made.
        self.known: dict[tuple[int, tuple[int, ...]], Graph | int | None] = {}


_local = _Local()


def find(stream: int, kernels: tuple[int, ...], nodes: Sequence[Any], early: Sequence[bool]) -> Graph | None:
    """The thread's graph of these kernels on a stream. None: launch them one by one, at least this time."""
    known, key = _local.known, (stream, kernels)
    found = known.get(key, 0)
    if isinstance(found, int):
        found = found + 1 if found + 1 < _CALLS else _make(nodes, early)
        if key not in known and len(known) >= _MOST_OF_A_THREAD:
            del known[next(iter(known))]
        known[key] = found
    return found if isinstance(found, Graph) else None


def _make(nodes: Sequence[Any], early: Sequence[bool]) -> Graph | None:
    if _alive >= _MOST:
        return None
    try:
        return Graph(nodes, early)
    except (FlashMoEError, AttributeError) as error:  # an older driver has no such function
        _env.log.debug("launches stay single: %s", error)
        return None


def _functions() -> dict[str, Any]:
    driver = tensormap.driver()
    found = {name: getattr(driver, name) for name in _FUNCTIONS}
    for name, arguments in _FUNCTIONS.items():
        found[name].argtypes = [ctypes.c_void_p] * arguments
    return found


def _must(code: int) -> None:
    if code:
        raise FlashMoEError(f"the driver refuses a graph of launches (error {code})")
