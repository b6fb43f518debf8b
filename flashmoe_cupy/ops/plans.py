"""What the operations of mixture of experts share: plans found by a key, outputs, and the check of a given `out`."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import numpy as np

from flashmoe_cupy import _env, arrays
from flashmoe_cupy.arrays import View
from flashmoe_cupy.dtypes import DType
from flashmoe_cupy.errors import UnsupportedProblem
from flashmoe_cupy.ops.compiled import compiled
from flashmoe_cupy.ops.quick import Recent, find, is_traced
from flashmoe_cupy.plan import kernels
from flashmoe_cupy.plan.checks import asked

if TYPE_CHECKING:
    from flashmoe_cupy.ops.moe_gpu import Ready
    from flashmoe_cupy.ops.quick import Quick, Shape

_MAX_PLANS = 4096  # distinct calls that an operation remembers
_BORROWED = ("jax", "dlpack", "cai")  # libraries that may reuse memory before the kernel has read it
_gpu: Any = None  # the module that launches, once an array on a device came
Plan = TypeVar("Plan")
Spec = tuple[tuple[int, ...], DType]  # shape and dtype of an output


class Memory(Generic[Plan]):
    """The plans of one operation by the shapes, strides, dtypes and options of the calls that they serve."""

    __slots__ = ("_lock", "_plans", "recent")

    def __init__(self) -> None:
        self.recent = Recent()
        self._plans: dict[Any, Plan] = {}
        self._lock = threading.Lock()
        kernels.forget.append(self._plans.clear)

    def find(self, key: Any) -> Plan | None:
        try:
            return self._plans.get(key)
        except TypeError:  # an option that cannot be hashed: validation names it
            return None

    def keep(self, key: Any, plan: Plan) -> Plan:
        with self._lock:
            if len(self._plans) >= _MAX_PLANS:
                self._plans.clear()
            with suppress(TypeError):  # an unhashable option that validation let through
                self._plans[key] = plan
        return plan


def seen(memory: Memory[Any], given: tuple[Any, ...], options: tuple[Any, ...]) -> tuple[Any, Any]:
    """The short key of a call on plain arrays of torch or CuPy, and its result if such a call was made before.

    options: in their exact types (`plan.options`). None for both where there is no short way.
    """
    quick = find(type(given[0]))
    if quick is None:
        return None, None
    wanted = len(given), options
    if quick.guards:
        again = memory.recent.find(given, wanted)
        if again is not None:
            return None, again(given)
    known = quick.keys(given)
    if known is None:
        return None, None
    short = known, wanted
    plan = memory.find(short)
    if plan is None:
        return short, None
    again = plan.short_way(quick, given)
    if again is None:
        return short, None
    memory.recent.note(quick, given, wanted, again)
    return short, again(given)


Kept = tuple[int, int, Any]  # bytes, address, array


class Scratch(threading.local):
    """Workspaces that stay: the calls of a thread on one stream use the same one, one after the other.

    Together they have at most 1/256 of the device's memory, or 32 MiB where that is more.
    """

    _MOST_STREAMS, _SMALL = 16, 32 << 20

    def __init__(self) -> None:
        self.kept: dict[tuple[int, int], Kept] = {}  # by device and stream

    def find(self, quick: Quick, device: int, stream: int, size: int, alone: bool) -> Kept:
        """At least `size` bytes for the next launches on the stream. alone: memory that no later call gets."""
        if alone:
            return self._new(quick, device, stream, size, alone)
        kept = self.kept.get((device, stream))
        if kept is None or kept[0] < size:
            others = sum(other[0] for at, other in self.kept.items() if at != (device, stream))
            if len(self.kept) >= self._MOST_STREAMS or not self.stays(device, others + size):
                self.kept.clear()
            kept = self.kept[device, stream] = self._new(quick, device, stream, size, alone)
        return kept

    def stays(self, device: int, size: int) -> bool:
        """Whether so many bytes may stay."""
        if size <= self._SMALL:
            return True
        from flashmoe_cupy.jit.launch import memory_bytes

        return size <= memory_bytes(device) >> 8

    def _new(self, quick: Quick, device: int, stream: int, size: int, alone: bool) -> Kept:
        made = quick.empty(device, (size,), (1,), quick.uint8)
        if alone and not quick.graph_pool:
            gpu().keep_if_recorded(made, stream)
        return size, quick.pointer(made), made


_scratch = Scratch()


ShortWay = Callable[[tuple[Any, ...]], Any]  # given arrays -> the output or outputs; None: the long way, this time


def short_way(
    quick: Quick,
    ready: Ready,
    places: Sequence[int],
    specs: Sequence[tuple[Shape, Shape, Any]],
    overlap: Overlap | None = None,
) -> ShortWay:
    """Makes calls on plain arrays of torch or CuPy that are like those of a call before, which has made `ready`.

    places: of the given arrays in the table of addresses.
    specs: shape, row-major strides and dtype of the outputs, which are new ones.
    overlap: the last of the given arrays is the output, and this tells where it may be.
    """
    pointer, current_stream = quick.pointer, quick.stream
    device, size = ready.series.device, ready.workspace
    first, *others = [quick.maker(device, *spec) for spec in specs]
    capturing = quick.recorder(device)
    behind = range(ready.outputs, ready.outputs + len(specs) + 1)  # outputs and workspace
    run = ready.series.arranged((*places[: len(places) - (overlap is not None)], *behind)).run
    aligned = [i for i, place in enumerate(places) if place in ready.rows]
    large = not _scratch.stays(device, size)

    def again(given: tuple[Any, ...]) -> Any:
        addresses = [*map(pointer, given)]
        bits = 0
        for i in aligned:
            bits |= addresses[i]
        if bits & 15 or (overlap is not None and overlap.possible(addresses[-1], addresses[:-1])):
            return None
        stream = current_stream(device)
        if overlap is not None:
            result = given[-1]
        else:
            result = first()
            addresses.append(pointer(result))
            if others:
                result = (result, *[other() for other in others])
                addresses += map(pointer, result[1:])
        recorded = True
        if size:
            recorded = capturing(stream)
            kept = None if recorded or large else _scratch.kept.get((device, stream))
            if kept is None or kept[0] < size:  # a look of our own, because a call of find takes longer
                kept = _scratch.find(quick, device, stream, size, recorded or large)
            addresses.append(kept[1])  # and nobody else gets it until all is queued
        run(tuple(addresses), stream, recorded)
        return result

    return again


_libraries: dict[type, str] = {np.ndarray: ""}  # "jax", "torch", "torch subclass" or "", by array type


def _compiled_adapter(_: Any) -> Any:
    from flashmoe_cupy import torch

    return torch


@compiled(_compiled_adapter)
def adapter(x: Any) -> Any:
    """The module whose function of the same name takes a call on x, or None: its memory may be read here and now.

    It is `flashmoe_cupy.jax` for arrays and tracers of JAX, and `flashmoe_cupy.torch`, which has operators, for tensors
    while torch compiles or traces and for those that are not plain memory, such as fake ones. Imports neither library.
    """
    kind = type(x)
    known = _libraries.get(kind)
    if known is None:
        known = _libraries[kind] = _library(x)
    if known == "jax":
        from flashmoe_cupy import jax

        return jax
    if known == "torch subclass" or (known and is_traced()):
        return _compiled_adapter(x)
    return None


def _library(x: Any) -> str:
    jax: Any = sys.modules.get("jax")
    torch: Any = sys.modules.get("torch")
    if hasattr(jax, "Array") and isinstance(x, jax.Array):
        return "jax"
    if hasattr(torch, "Tensor") and isinstance(x, torch.Tensor):
        return "torch" if type(x).__torch_dispatch__ is torch.Tensor.__torch_dispatch__ else "torch subclass"
    return ""


def gpu() -> Any:
    """The module `ops.moe_gpu`, loaded at the first call with arrays on a device."""
    global _gpu
    if _gpu is None:
        from flashmoe_cupy.ops import moe_gpu

        _gpu = moe_gpu
    return _gpu


def allocate(like: View, specs: Sequence[Spec]) -> tuple[list[Any], tuple[int, ...]]:
    """New arrays in like's library on like's device, and their addresses; like lies on a device."""
    made = [arrays.empty(like, shape, dtype) for shape, dtype in specs]
    if like.library == "torch":
        return made, tuple([array.data_ptr() for array in made])
    return made, tuple([array.data.ptr for array in made])  # CuPy's, for all others


def queued(views: Sequence[View | None]) -> None:
    """After a launch: arguments that their library might reuse stay alive until the kernels have read them."""
    if views[0] is not None and views[0].library in _BORROWED:
        arrays.keep_until_done([v for v in views if v is not None])


def on_host(views: Sequence[View | None]) -> list[Any]:
    """The arguments as NumPy arrays on the same memory."""
    return [None if v is None else arrays.as_numpy(v) for v in views]


def check_ids(ids: Any, num_experts: int, num_global: int) -> None:
    """Under FLASHMOE_CHECK=1 raises FlashMoEError for ids in host memory that name no expert and no empty place."""
    if _env.get().check:
        from flashmoe_cupy.cpu.moe import check_ids as check

        check(ids, num_experts if num_global < 0 else num_global)


def check_no_nan(logits: Any, bias: Any) -> None:
    """Under FLASHMOE_CHECK=1 raises FlashMoEError for the first NaN in the router's arrays, in host memory."""
    if _env.get().check:
        from flashmoe_cupy.cpu.moe import check_no_nan as check

        for name, values in (("logits", logits), ("e_score_correction_bias", bias)):
            if values is not None:
                check(name, values)


class Overlap:
    """Whether a given `out` shares memory with an argument. How far each one reaches is computed once per plan."""

    __slots__ = ("_names", "_op", "_out", "_reach", "_there")

    def __init__(self, op: str, names: Sequence[str], views: Sequence[View | None], out: View | None) -> None:
        self._op, self._names = op, names
        self._out = (0, 0) if out is None else _reach(out)
        self._reach = [(0, 0) if v is None else _reach(v) for v in views]
        self._there = [reach for v, reach in zip(views, self._reach, strict=True) if v is not None]

    def check(self, out: View, views: Sequence[View | None]) -> None:
        """Raises UnsupportedProblem: blocks of a kernel would read what others have overwritten."""
        low, high = out.ptr + self._out[0], out.ptr + self._out[1]
        why = [
            f"out shares memory with {name}"
            for name, v, (first, last) in zip(self._names, views, self._reach, strict=True)
            if v is not None and v.ptr + first < high and low < v.ptr + last and arrays.overlap(out, v)
        ]
        if why:
            given = [(name, v) for name, v in zip(self._names, views, strict=True) if v is not None]
            call = asked(self._op, [*given, ("out", out)], [])
            raise UnsupportedProblem(call, why, "an array of its own for out, or out=None")

    def possible(self, out: int, addresses: Sequence[int]) -> bool:
        """Whether an argument may share memory with out, by the addresses of those arguments that are given."""
        low, high = out + self._out[0], out + self._out[1]
        for address, (first, last) in zip(addresses, self._there, strict=True):
            if address + first < high and low < address + last:
                return True
        return False


def check_overlap(out: View, named: Iterable[tuple[str, View | None]]) -> None:
    """Refuse an `out` of attention that shares memory with an input: blocks would read what others have overwritten."""
    given = [(name, x) for name, x in named if x is not None]
    why = [f"out shares memory with {name}" for name, x in given if arrays.overlap(out, x)]
    if why:
        call = asked("flash_attention_varlen" if len(out.shape) == 3 else "flash_attention", [*given, ("out", out)], ())
        raise UnsupportedProblem(call, why, "an array of its own for out, or out=None")


def _reach(v: View) -> tuple[int, int]:
    """First byte and the one behind the last, from the first element on."""
    low, high = arrays.extent(v)
    return low - v.ptr, high - v.ptr
