"""How plain arrays are read with as few reads as possible: their key, addresses and new ones like them.

A view of an array costs a microsecond or two, and a call has three; what is read here is only what tells one validated
call from another. Anything unusual (subclasses, another library) gives None, and the call goes through `arrays.view`,
which explains itself. What torch differentiates or casts has keys of its own; an operation that has no plan for them
goes the same way.
"""

from __future__ import annotations

import operator
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np

Key = tuple[Any, ...]
Shape = tuple[int, ...]

# Keys of calls that torch changes: of arrays of which some require a gradient, whatever their shapes, ...
GRADIENT: Key = ("gradient",)
AUTOCAST = "autocast"  # ... and the end of those inside of torch.autocast


class ArrayAccess:
    """How the arrays of one type are read."""

    def __init__(
        self,
        key: Callable[[tuple[Any, ...]], Key | None],  # what decides the plan of a call on these arrays, or None
        pointer: Callable[[Any], int],
        empty: Callable[[int, Shape, Shape, Any], Any],  # device, shape, row-major strides, dtype -> new array
        dtypes: dict[str, Any],  # the library's float32, int32 and uint8
        device: Callable[[Any], int],
        stream: Callable[[int], int],  # the current one of a device
        # Asked once for many calls on a device, which then ask less:
        maker: Callable[[int, Shape, Shape, Any], Callable[[], Any]],  # `empty` with these arguments
        recorder: Callable[[int], Callable[[int], bool]],  # whether a graph is recorded on a stream of a device
        graph_pool: bool = True,  # what is allocated while a graph is recorded stays the graph's
        # A function that tells whether other arrays are like these, where one can be made. Arrays that are one object
        # here must be one there.
        guard: Callable[[tuple[Any, ...]], Callable[..., bool] | None] = lambda _: None,
        guards: bool = False,  # whether it may ever give one
        host: bool = False,  # arrays in host memory: only `key` serves
    ) -> None:
        self.key, self.pointer, self.empty, self.dtypes, self.device = key, pointer, empty, dtypes, device
        self.stream, self.maker, self.recorder, self.graph_pool = stream, maker, recorder, graph_pool
        self.guard, self.guards, self.host = guard, guards, host
        self.reads = pointer is not _none  # addresses; else `key` alone serves

    @property
    def uint8(self) -> Any:
        """The library's dtype of bytes."""
        return self.dtypes["uint8"]


_known: dict[type, ArrayAccess | None] = {}


def find(kind: type) -> ArrayAccess | None:
    """The access for an array type; None when it has none."""
    try:
        return _known[kind]
    except KeyError:
        pass
    torch: Any = sys.modules.get("torch")
    cupy: Any = sys.modules.get("cupy")
    access = None
    if kind is np.ndarray:
        access = _numpy()
    elif hasattr(torch, "Tensor") and issubclass(kind, torch.Tensor):
        if kind is torch.Tensor and hasattr(torch._C, "_cuda_getCurrentRawStream"):
            access = _torch(torch)
        else:
            access = _torch_slow(torch, kind)
    elif kind is getattr(cupy, "ndarray", None):
        access = _cupy(cupy)
    elif kind.__module__.partition(".")[0] in ("torch", "cupy"):
        return None  # perhaps half imported: ask again next time
    _known[kind] = access
    return access



def _numpy() -> ArrayAccess:
    kind = np.ndarray

    def key(arrays: tuple[Any, ...]) -> Key | None:
        found: list[Any] = []
        for x in arrays:
            if type(x) is not kind:
                return None
            found += (x.shape, x.strides, x.dtype)
        return tuple(found)

    return ArrayAccess(key, _none, _none, {}, _none, _none, _none, _none, host=True)


def _torch_key(torch: Any) -> Callable[[tuple[Any, ...]], Key | None]:
    kind, bfloat16 = torch.Tensor, torch.bfloat16
    device_of, forward_ad = kind.get_device, torch.autograd.forward_ad
    # Under dispatch modes (make_fx, fake tensors), jit.trace and torch.func a result has to come from an operator.
    modes, tracing = torch._C._len_torch_dispatch_stack, torch._C._get_tracing_state
    transforms = torch._C._functorch.peek_interpreter_stack
    # The modes of torch.export's and make_fx's pre_dispatch=True are on no such stack.
    included = torch._C._dispatch_tls_is_dispatch_key_included
    pre_dispatch = torch._C._dispatch_key_parse("PreDispatch")

    grad_enabled, parameter, plain = torch.is_grad_enabled, torch.nn.Parameter, (bfloat16, torch.int32, torch.int64)
    autocast, autocast_dtype = torch._C._is_any_autocast_enabled, torch.get_autocast_dtype

    def key(arrays: tuple[Any, ...]) -> Key | None:
        if (
            forward_ad._current_level >= 0
            or modes()
            or included(pre_dispatch)
            or tracing() is not None
            or transforms() is not None
        ):
            return None
        refuse = grad_enabled()
        found: list[Any] = []
        for x in arrays:
            of = type(x)
            if (of is not kind and of is not parameter) or (refuse and x.requires_grad):
                wanted = refuse and any(isinstance(y, kind) and y.requires_grad for y in arrays)
                return GRADIENT if wanted else None
            dtype = x.dtype
            if dtype not in plain and x.is_neg():
                return None
            try:
                found += (x.shape, x.stride(), dtype, device_of(x))
            except RuntimeError:  # nested and compressed tensors have no strides
                return None
        if autocast():
            found += (autocast_dtype("cuda" if arrays[0].is_cuda else "cpu"), AUTOCAST)
        return tuple(found)

    return key


def _none(*_: Any) -> Any:
    return None


def _torch_slow(torch: Any, kind: Any) -> ArrayAccess | None:
    """Of tensors that have no fast way. None: they have a dispatch of their own, and come to the operators."""
    if kind.__torch_dispatch__ is not torch.Tensor.__torch_dispatch__:
        return None
    key = _torch_key(torch)

    def changed(arrays: tuple[Any, ...]) -> Key | None:
        found = key(arrays)
        return found if found is GRADIENT or (found is not None and found[-1] is AUTOCAST) else None

    return ArrayAccess(changed, _none, _none, {}, _none, _none, _none, _none)


def _torch(torch: Any) -> ArrayAccess:
    kind, forward_ad, key = torch.Tensor, torch.autograd.forward_ad, _torch_key(torch)
    device_of, grad_enabled, modes = kind.get_device, torch.is_grad_enabled, torch._C._len_torch_dispatch_stack
    autocast, autocast_dtype = torch._C._is_any_autocast_enabled, torch.get_autocast_dtype
    current = torch._C._cuda_getDevice
    guards = getattr(getattr(torch._C, "_dynamo", None), "guards", None)
    fast = getattr(guards, "_empty_strided_cuda", None)  # what the code that torch.compile writes uses

    def empty(device: int, shape: Shape, strides: Shape, dtype: Any) -> Any:
        if fast is not None and current() == device:
            return fast(shape, strides, dtype)
        return torch.empty_strided(shape, strides, dtype=dtype, device=device)

    guards_of = getattr(guards, "TensorGuards", None)  # what torch.compile asks whether its code fits the arguments

    def guard(arrays: tuple[Any, ...]) -> Callable[..., bool] | None:
        if guards_of is None or forward_ad._current_level >= 0:
            return None
        first = [next(j for j, y in enumerate(arrays) if y is x) for x in arrays]  # the first place of each array
        alone = [i for i, j in enumerate(first) if i == j]
        try:
            same = guards_of(*[arrays[i] for i in alone], dynamic_dims_sizes=None, dynamic_dims_strides=None).check
        except (TypeError, ValueError):  # another version's
            return None

        # What else traces changes the dispatch keys, which the guard compares. It compares who wants a gradient, but
        # not whether that counts, and ends the process at nested tensors, which have no strides. Written out for speed.
        names = [f"x{i}" for i in range(len(arrays))]
        # A subclass may do anything when it is asked for an attribute.
        refused = ["type(x0) is not kind", *[f"{names[i]} is not {names[j]}" for i, j in enumerate(first) if i != j]]
        refused += ["forward_ad._current_level >= 0", "modes()", *[f"{names[i]}.is_nested" for i in alone]]
        if any(x.requires_grad for x in arrays):
            refused.append("not grad_enabled()" if grad_enabled() else "grad_enabled()")
        if autocast():  # which it tells from none, whatever its dtype
            refused.append("autocast_dtype('cuda') is not cast_to")
        found: dict[str, Any] = {
            "same": same, "kind": kind, "forward_ad": forward_ad, "modes": modes, "grad_enabled": grad_enabled,
            "autocast_dtype": autocast_dtype, "cast_to": autocast_dtype("cuda"),
        }  # fmt: skip
        exec(
            f"def check({', '.join(names)}):\n"
            f"    try: return not ({' or '.join(refused)}) and same({', '.join([names[i] for i in alone])})\n"
            "    except AttributeError: return False  # no tensor\n", found
        )  # fmt: skip
        return found["check"]  # type: ignore[no-any-return]

    here = torch._C._cuda_isCurrentStreamCapturing

    def maker(device: int, shape: Shape, strides: Shape, dtype: Any) -> Callable[[], Any]:
        if fast is not None and torch.cuda.device_count() == 1:  # which is the current one
            return partial(fast, shape, strides, dtype)
        return partial(empty, device, shape, strides, dtype)

    def recorder(device: int) -> Callable[[int], bool]:
        if torch.cuda.device_count() == 1:
            return lambda _: here()
        from flashmoe_cupy.jit.launch import is_capturing

        return lambda stream: here() if current() == device else is_capturing(stream)

    stream = torch._C._cuda_getCurrentRawStream
    names = {name: getattr(torch, name) for name in ("float32", "int32", "uint8")}
    return ArrayAccess(
        key, kind.data_ptr, empty, names, device_of, stream, maker, recorder, guard=guard, guards=True
    )  # fmt: skip


def _cupy(cupy: Any) -> ArrayAccess:
    kind, current = cupy.ndarray, cupy.cuda.get_current_stream
    runtime = cupy.cuda.runtime
    single = runtime.getDeviceCount() == 1
    # An attribute of C; strides that need not be told are a tuple less to make, hash and compare.
    is_dense = "_c_contiguous" if hasattr(kind, "_c_contiguous") else "flags.c_contiguous"
    contiguous = operator.attrgetter(is_dense)

    def key(arrays: tuple[Any, ...]) -> Key | None:
        device = 0 if single else runtime.getDevice()
        found: list[Any] = [device]
        for x in arrays:
            if type(x) is not kind or not (single or x.data.device_id == device):
                return None
            # A dtype hashes slowly; its number does not, and means the same type as long as the process lives.
            found += (x.shape, contiguous(x) or x.strides, x.dtype.num)
        return tuple(found)

    def guard(arrays: tuple[Any, ...]) -> Callable[..., bool] | None:
        if not (single and all(map(contiguous, arrays))):
            return None
        # Written out, which takes two thirds of a loop's time. Two equal dtypes are mostly one object.
        wanted: dict[str, Any] = {"kind": kind}
        for i, x in enumerate(arrays):
            wanted |= {f"shape{i}": x.shape, f"dtype{i}": x.dtype}
        names = [f"x{i}" for i in range(len(arrays))]
        tests = [
            f"type(x{i}) is kind and x{i}.dtype is dtype{i} and x{i}.{is_dense} and x{i}.shape == shape{i}"
            for i in range(len(arrays))
        ]
        return eval(f"lambda {', '.join(names)}: {' and '.join(tests)}", wanted)  # type: ignore[no-any-return]

    def empty(device: int, shape: Shape, strides: Shape, dtype: Any) -> Any:  # noqa: ARG001
        return kind(shape, dtype)

    def maker(device: int, shape: Shape, strides: Shape, dtype: Any) -> Callable[[], Any]:  # noqa: ARG001
        return partial(kind, shape, dtype)

    def device(q: Any) -> int:
        return 0 if single else q.data.device_id

    def stream(device: int) -> int:
        return current(device).ptr  # type: ignore[no-any-return]

    def recorder(device: int) -> Callable[[int], bool]:  # noqa: ARG001
        return runtime.streamIsCapturing  # type: ignore[no-any-return]

    names = {name: cupy.dtype(name) for name in ("float32", "int32", "uint8")}
    return ArrayAccess(
        key, operator.attrgetter("data.ptr"), empty, names, device, stream, maker, recorder,
        graph_pool=False, guard=guard, guards=single,
    )  # fmt: skip


def is_traced() -> bool:
    """Whether something records what happens to plain tensors: a dispatch mode, make_fx, torch.jit.trace, torch.func.

    Where torch runs an operator for it, that is off, so the operator itself may read them. Of the transforms of
    torch.func only grad and vjp count.
    """
    torch: Any = sys.modules["torch"]
    if not _recorders:
        _recorders.extend(map(torch._C._dispatch_key_parse, ("Python", "Tracer", "PreDispatch")))
    if any(map(torch._C._dispatch_tls_is_dispatch_key_included, _recorders)):
        return True
    transform = torch._C._functorch.peek_interpreter_stack()
    return transform is not None and transform.key() == torch._C._functorch.TransformType.Grad


_recorders: list[Any] = []  # dispatch keys of torch
