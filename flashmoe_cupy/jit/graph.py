"""Launches that follow each other as one CUDA graph: queued in less than half of the time that the single ones take.

For work so short that launching is what takes time. Before a launch, nodes get the parameters that have changed; what
is already queued or running keeps its own. A graph cannot overlap with what lies in front of it on the stream, as
single launches do (programmatic dependent launch): work that keeps the device busy is better off without.
"""

from __future__ import annotations

import ctypes
import struct
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
_MOST = 256  # graphs that are alive: each has memory of the driver's
_FUNCTIONS = {
    "cuGraphCreate": 2, "cuGraphAddKernelNode_v2": 5, "cuGraphAddDependencies_v2": 5, "cuGraphInstantiateWithFlags": 3,
    "cuGraphExecKernelNodeSetParams_v2": 3, "cuGraphLaunch": 2, "cuGraphExecDestroy": 1, "cuGraphDestroy": 1,
}  # fmt: skip
_alive = 0


class Graph:
    """One node for each launch, one behind the other. Belongs to one thread."""

    __slots__ = ("_addresses", "_destroy", "_exec", "_graph", "_launch", "_nodes", "_params", "_set")

    def __init__(self, launches: Sequence[Launch], parameters: Sequence[int]) -> None:
        """parameters: for each launch the address of the pointer to its Params. Raises FlashMoEError."""
        global _alive
        _alive += 1  # __del__ runs for what could not be made, too
        self._addresses: object = None
        self._graph, self._exec = ctypes.c_void_p(), ctypes.c_void_p()
        call = _functions()
        self._set, self._launch = call["cuGraphExecKernelNodeSetParams_v2"], call["cuGraphLaunch"]
        self._destroy = call["cuGraphExecDestroy"], call["cuGraphDestroy"]
        _must(call["cuGraphCreate"](ctypes.byref(self._graph), 0))
        self._params, nodes = [], [ctypes.c_void_p() for _ in launches]
        for i, (one, address) in enumerate(zip(launches, parameters, strict=True)):
            sizes = one.grid, 1, 1, one.threads, 1, 1, one.smem
            self._params.append(
                ctypes.create_string_buffer(_NODE.pack(one.function, *sizes, address, 0, 0, 0), _NODE.size)
            )
            _must(call["cuGraphAddKernelNode_v2"](ctypes.byref(nodes[i]), self._graph, None, 0, self._params[i]))
            if i > 0:
                edge = ctypes.create_string_buffer(_EARLY if one.early else _WHOLE, _EDGE.size)
                ends = ctypes.byref(nodes[i - 1]), ctypes.byref(nodes[i])
                _must(call["cuGraphAddDependencies_v2"](self._graph, *ends, edge, 1))
        _must(call["cuGraphInstantiateWithFlags"](ctypes.byref(self._exec), self._graph, 0))
        self._nodes = [
            (self._exec.value, node.value, ctypes.addressof(params))
            for node, params in zip(nodes, self._params, strict=True)
        ]

    def run(self, addresses: object, stream: int) -> None:
        """Queue all. addresses: the same object as long as no Params has changed."""
        if addresses is not self._addresses:
            self._addresses, set_params = None, self._set
            for node in self._nodes:
                _must(set_params(*node))
            self._addresses = addresses
        _must(self._launch(self._exec.value, stream))

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


def make(launches: Sequence[Launch], parameters: Sequence[int]) -> Graph | None:
    """The graph; None when there are many, or the driver does not make it: then the launches go one by one."""
    if _alive >= _MOST:
        return None
    try:
        return Graph(launches, parameters)
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
