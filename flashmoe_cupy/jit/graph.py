"""Several launches, one behind the other, as one CUDA graph: it is queued in less than half of their time.

A graph belongs to a thread, a stream and the kernels in it. Before it is launched it gets the grids and parameters of
this call, if they differ from those of the last one. So all shapes that need the same kernels share a graph. What is
already queued or running keeps its own parameters.

A graph waits for the end of what is in front of it on the stream; the first of single launches may start earlier
(programmatic dependent launch). That costs 1 us of the device. A caller to whom it matters records a graph of his own,
in which the launches are single.

The driver is called by ctypes, with structs that are packed here and kept, for CuPy has no such functions. Those of
cuda-bindings would be no faster (both 0.4 to 0.9 us around a driver that does nothing), their import takes 0.13 s, they
differ between its majors, and torch asks for the major of its own CUDA.
"""

from __future__ import annotations

import ctypes
import struct
import threading
from collections.abc import Sequence
from typing import Any

from flashmoe_cupy import _env
from flashmoe_cupy.errors import FlashMoEError
from flashmoe_cupy.jit import driver
from flashmoe_cupy.jit.launch import Launch

# CUDA_KERNEL_NODE_PARAMS_v2: function, grid, block, shared memory, parameters, extra, kernel, context
_NODE = struct.Struct("Q7I4xQQQQ")
_EDGE = struct.Struct("3B5x")  # CUgraphEdgeData: port of the first node, port of the second, type
# The second node starts at the end of the first; or when the first lets it (programmatic dependent launch).
_WHOLE, _EARLY = _EDGE.pack(0, 0, 0), _EDGE.pack(1, 0, 1)
_MOST = 1024  # graphs of the process that exist at one time: each has memory of the driver's
_MOST_OF_A_THREAD = 64  # pairs of stream and kernels that a thread remembers
_CALLS = 3  # with the same kernels on a stream: in the last of these a graph is made
_FUNCTIONS = {
    "cuGraphCreate": 2, "cuGraphAddKernelNode_v2": 5, "cuGraphAddDependencies_v2": 5, "cuGraphInstantiateWithFlags": 3,
    "cuGraphExecKernelNodeSetParams_v2": 3, "cuGraphLaunch": 2, "cuGraphExecDestroy": 1, "cuGraphDestroy": 1,
}  # fmt: skip
_alive = 0

Settings = list[tuple[Any, ...]]  # for each node the arguments of cuGraphExecKernelNodeSetParams


def node(one: Launch, parameters: int) -> Any:
    """The struct of a launch's node, in memory that `Graph` reads. parameters: address of the pointer to Params."""
    sizes = one.grid, 1, 1, one.threads, 1, 1, one.smem
    return ctypes.create_string_buffer(_NODE.pack(one.function, *sizes, parameters, 0, 0, 0), _NODE.size)


class Graph:
    """One node for each launch, one behind the other. Belongs to one thread."""

    __slots__ = ("_addresses", "_destroy", "_exec", "_graph", "_handle", "_launch", "_nodes", "_set")

    def __init__(self, nodes: Sequence[Any], early: Sequence[bool]) -> None:
        """early: for each node whether it may start before the end of the one in front of it. Raises FlashMoEError."""
        global _alive
        _alive += 1  # here, for __del__ also runs for a graph that could not be made
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
        self._handle = self._exec.value  # an attribute of ctypes takes longer to read

    def settings(self, nodes: Sequence[Any]) -> Settings:
        """What `run` takes to give the graph these nodes, whose kernels are those that it was made of."""
        return [
            (self._exec.value, mine.value, ctypes.addressof(other))
            for mine, other in zip(self._nodes, nodes, strict=True)
        ]

    def run(self, settings: Settings, addresses: object, stream: int) -> None:
        """Queue all. addresses: stands for settings and all Params; another object whenever any of them changed."""
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
        # By stream and kernels, in the order of their first calls: the graph; how many calls there were, as long as
        # there is none; None where none can be made.
        self.known: dict[tuple[int, tuple[int, ...]], Graph | int | None] = {}


_local = _Local()


def find(stream: int, kernels: tuple[int, ...], nodes: Sequence[Any], early: Sequence[bool]) -> Graph | None:
    """The thread's graph of these kernels on a stream; None: launch them one by one in this call."""
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
    found = {name: getattr(driver.library(), name) for name in _FUNCTIONS}
    for name, arguments in _FUNCTIONS.items():
        found[name].argtypes = [ctypes.c_void_p] * arguments
    return found


def _must(code: int) -> None:
    if code:
        raise FlashMoEError(f"the driver refuses a graph of launches (error {code})")
