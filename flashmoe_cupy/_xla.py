"""What XLA calls: one target for all operations, which finds its problem by what a compiled program carries.

A program carries two attributes. "text" is the operation, its problem and the shapes of its arrays in JSON; "key" is a
hash of that text. Both follow from the call alone, so that all processes of a job build the same program, and a program
that another process compiled (`jax.export`, the persistent compilation cache) finds its problem again. On CUDA the
kernels are queued on XLA's own stream; on the CPU the NumPy back end computes at once. Every buffer is XLA's.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import hashlib
import json
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from flashmoe_cupy import _xla_ffi, dtypes
from flashmoe_cupy.arrays import row_major
from flashmoe_cupy.dtypes import DType
from flashmoe_cupy.errors import DependencyError
from flashmoe_cupy.ops import gpu
from flashmoe_cupy.plan.attention.problem import AttentionProblem
from flashmoe_cupy.plan.operation import Operation, registered

OLDEST_JAX, NEWEST_JAX = "0.6", "0.12.0.1"  # pyproject.toml has the first; before, XLA tells no handler its device
TARGET = "flashmoe_cupy"

Form = tuple[str, tuple[int, ...], str]  # name, shape and dtype of an array


class Known(NamedTuple):
    """What a call of XLA's is about: its inputs and its results are in the order of its buffers."""

    operation: str
    problem: Any
    inputs: tuple[Form, ...]
    results: tuple[Form, ...]


_known: dict[int, Known] = {}


def register(operation: Operation, problem: Any, inputs: Sequence[Form], results: Sequence[Form]) -> tuple[int, str]:
    """The attributes (key, text) of a call, known to the handler from now on."""
    fields = _written(problem)
    known = Known(operation.name, problem, tuple(inputs), tuple(results))
    text = json.dumps(known._replace(problem=fields)._asdict())
    key = int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little") >> 1
    before = _known.setdefault(key, known)
    if before != known:
        raise RuntimeError(f"two problems share the hash {key}: {before.problem} and {problem}")
    return key, text


def _written(problem: Any) -> dict[str, Any]:
    """The fields of a problem for JSON, those of a problem in it too."""
    return {
        name: x.name if isinstance(x, DType) else _written(x) if hasattr(x, "_asdict") else x
        for name, x in problem._asdict().items()
    }


def _read(fields: Mapping[str, Any]) -> dict[str, Any]:
    """What `_written` has written. A problem in another one is that of the forward."""
    found: dict[str, Any] = {}
    for name, x in fields.items():
        if isinstance(x, dict):
            found[name] = AttentionProblem(**_read(x))
        elif isinstance(x, list):
            found[name] = tuple(x)
        else:
            found[name] = dtypes.from_name(x) if name.endswith("dtype") and x else x
    return found


def _find(call: _xla_ffi.Call) -> Known:
    found = _known.get(call.key)
    if found is None:  # the program was compiled by another process
        try:
            read = json.loads(call.text())
            operation = registered(read["operation"])
            fields = _read(read["problem"])
            forms = [
                [(name, tuple(shape), dtypes.from_name(kind).name) for name, shape, kind in read[which]]
                for which in ("inputs", "results")
            ]
            register(operation, operation.problem(**fields), *forms)
            found = _known[call.key]
        except (KeyError, TypeError, ValueError) as error:
            reason = f"this program was compiled with another version of flashmoe_cupy ({error!r}); compile it again"
            raise _xla_ffi.FfiError(_xla_ffi.INVALID_ARGUMENT, reason) from error
    return found


def run_cuda(call: _xla_ffi.Call) -> None:
    """A call on a GPU, or the loading in front of it."""
    known, device = _find(call), call.device()
    operation, made = registered(known.operation), tuple([name for name, *_ in known.results])
    if call.stage == _xla_ffi.LOAD:
        gpu.load(operation, known.problem, device, made)
        return
    outputs = call.outputs()
    by_name = dict(zip([name for name, *_ in known.inputs], call.inputs(), strict=True))
    inputs = [by_name.get(name, 0) for name in operation.arguments]
    workspace = outputs[len(made)] if len(outputs) > len(made) else 0
    results = dict(zip(made, outputs, strict=False))
    gpu.launch(operation, known.problem, device, call.stream(), inputs, results, workspace)


def run_cpu(call: _xla_ffi.Call) -> None:
    """A call on the CPU."""
    known = _find(call)
    operation, p = registered(known.operation), known.problem
    given: dict[str, Any] = dict.fromkeys(operation.arguments)
    given |= {form[0]: _array(form, address) for form, address in zip(known.inputs, call.inputs(), strict=True)}
    outputs = call.outputs()[: len(known.results)]
    made = {form[0]: _array(form, address, True) for form, address in zip(known.results, outputs, strict=True)}
    operation.check(p, given.__getitem__)
    operation.host(p, given, made)


def _array(form: Form, address: int, writable: bool = False) -> np.ndarray[Any, Any]:
    """The memory at `address` as a NumPy array; dense, row-major."""
    _, shape, name = form
    dtype = dtypes.to_numpy(dtypes.from_name(name))
    if 0 in shape:
        return np.empty(shape, dtype)
    strides = [t * dtype.itemsize for t in row_major(shape)]
    memory: Any = (ctypes.c_char * (shape[0] * strides[0] if shape else dtype.itemsize)).from_address(address)
    array: np.ndarray[Any, Any] = np.ndarray(shape, dtype, memory, strides=strides)
    array.flags.writeable = writable
    return array


_running = 0  # handler calls that have begun and not ended
_counter = threading.Lock()


def _counted(run: Callable[[_xla_ffi.Call], None]) -> Callable[[_xla_ffi.Call], None]:
    def counted(call: _xla_ffi.Call) -> None:
        global _running
        with _counter:
            _running += 1
        try:
            run(call)
        finally:
            with _counter:
                _running -= 1

    return counted


def _install(target: str) -> None:
    """Make a target known to XLA."""
    served = f"flashmoe_cupy runs with JAX {OLDEST_JAX} and newer (tested up to {NEWEST_JAX})"
    if jax.__version_info__ < tuple(map(int, OLDEST_JAX.split("."))):
        raise DependencyError(f"{served}, this is JAX {jax.__version__}: pip install -U 'jax>={OLDEST_JAX}'")
    cpu, cuda = _xla_ffi.handler(_counted(run_cpu)), _xla_ffi.handler(run_cuda)
    # XLA may record the first call into a CUDA graph, where no module can be loaded: that is done at "initialize".
    stages = {"initialize": jax.ffi.pycapsule(cuda), "execute": jax.ffi.pycapsule(cuda)}
    try:
        jax.ffi.register_ffi_target(target, jax.ffi.pycapsule(cpu), platform="cpu")
        jax.ffi.register_ffi_target(target, stages, platform="CUDA")
    except jax.errors.JaxRuntimeError as error:
        repair = f"pip install 'jax>={OLDEST_JAX},<={NEWEST_JAX}'"
        raise DependencyError(f"{served}; JAX {jax.__version__} refuses its functions ({error}): {repair}") from error


def _drain() -> None:
    """At exit, wait for the work in flight: a handler that needs the interpreter after its end never returns."""
    if not _known:
        return  # nothing was traced: do not start a backend now
    for array in jax.live_arrays():
        with contextlib.suppress(Exception):  # its error will never be looked at
            array.block_until_ready()
    idle = 0
    while idle < 20:  # results that nobody holds: their handlers may be running, or about to
        idle = 0 if _running else idle + 1
        time.sleep(0.001)


_install(TARGET)
atexit.register(_drain)
