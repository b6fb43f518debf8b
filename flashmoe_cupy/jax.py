"""Attention for JAX arrays and tracers: eager, under `jit`, inside `scan` and `shard_map`, on CPU and CUDA.

XLA calls back into Python while a program runs (`_xla_ffi`), with the addresses of the buffers. On CUDA the kernel is
then queued on XLA's own stream; on the CPU the NumPy back end computes at once. Results land in buffers of XLA's.

A compiled program carries its problem as two attributes: "text", the problem in JSON, and "key", a hash of that text.
Both follow from the problem alone, so that all processes of a job build the same program, and a program that another
process compiled (`jax.export`, the persistent compilation cache) finds its problem again.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import hashlib
import json
import math
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from flashmoe_cupy import _xla_ffi, dtypes
from flashmoe_cupy.arrays import View
from flashmoe_cupy.cpu.attention import attention as cpu_attention
from flashmoe_cupy.dtypes import DType
from flashmoe_cupy.errors import DependencyError, UnsupportedProblem
from flashmoe_cupy.plan.attention.problem import AttentionProblem, attention_problem, varlen_problem
from flashmoe_cupy.plan.options import exact

__all__ = ["flash_attention", "flash_attention_varlen"]
_MOE = ("fused_moe", "grouped_gemm", "moe_permute", "moe_route")  # in jax_moe.py, and names of this module too

OLDEST_JAX, NEWEST_JAX = "0.6", "0.12.0.1"  # pyproject.toml has the first; before, XLA tells no handler its device
_TARGET = "flashmoe_cupy_attention"
_OPTIONAL = (
    "bias", "alibi_slopes", "sinks", "cu_seqlens_q", "cu_seqlens_k", "seqused_q", "seqused_k",
)  # fmt: skip
_POINTERS = dict.fromkeys(("q", "k", "v", "out", "lse", *_OPTIONAL), 0)


def flash_attention(
    q: Any,
    k: Any,
    v: Any,
    *,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softmax_scale: float | None = None,
    softcap: float = 0.0,
    sinks: Any = None,
    alibi_slopes: Any = None,
    bias: Any = None,
    layout: str = "bshd",
    return_lse: bool = False,
    out: Any = None,
) -> Any:
    """Attention of JAX arrays; arguments, results and errors as in `flashmoe_cupy.flash_attention`.

    The options are Python values: under `jit` make them static. `out` must be None, for JAX arrays are immutable.
    `vmap` joins the mapped axis to the batch; only mapped sinks run one after the other. No gradient yet: `jax.grad`
    raises UnsupportedProblem. A multi-device program should call this inside `jax.shard_map`: XLA cannot split a call
    of a foreign function and would gather the arguments on each device.
    """
    arrays = {"q": q, "k": k, "v": v, "bias": bias, "alibi_slopes": alibi_slopes, "sinks": sinks}
    options = {
        "causal": causal, "window_size": window_size, "softmax_scale": softmax_scale, "softcap": softcap,
        "layout": layout, "return_lse": return_lse,
    }  # fmt: skip
    return _call(attention_problem, "flash_attention", arrays, options, out)


def flash_attention_varlen(
    q: Any,
    k: Any,
    v: Any,
    *,
    cu_seqlens_q: Any,
    cu_seqlens_k: Any,
    max_seqlen_q: int,
    max_seqlen_k: int,
    seqused_q: Any = None,
    seqused_k: Any = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softmax_scale: float | None = None,
    softcap: float = 0.0,
    sinks: Any = None,
    alibi_slopes: Any = None,
    return_lse: bool = False,
    out: Any = None,
) -> Any:
    """Attention of packed JAX arrays; arguments, results and errors as in `flashmoe_cupy.flash_attention_varlen`.

    max_seqlen_q and max_seqlen_k are Python ints (static under `jit`); the offsets may be traced. Rows that belong to
    no sequence are 0, and their lse -inf. `vmap` runs one call after the other. `out` must be None. No gradient yet.
    """
    arrays = {
        "q": q, "k": k, "v": v, "alibi_slopes": alibi_slopes, "sinks": sinks, "cu_seqlens_q": cu_seqlens_q,
        "cu_seqlens_k": cu_seqlens_k, "seqused_q": seqused_q, "seqused_k": seqused_k,
    }  # fmt: skip
    options = {
        "max_seqlen_q": max_seqlen_q, "max_seqlen_k": max_seqlen_k, "causal": causal, "window_size": window_size,
        "softmax_scale": softmax_scale, "softcap": softcap, "return_lse": return_lse,
    }  # fmt: skip
    return _call(varlen_problem, "flash_attention_varlen", arrays, options, out)


# ---------------------------------------------------------------------------------------------------------------------
# arrays -> problem -> jitted function

_functions: dict[tuple[Any, ...], Callable[..., Any]] = {}
_MAX_FUNCTIONS = 4096  # distinct shapes that are remembered


def _call(
    make_problem: Callable[..., AttentionProblem],
    op: str,
    arrays: dict[str, Any],
    options: dict[str, Any],
    out: Any,
) -> Any:
    """Find or build the function of these shapes, dtypes and options, and call it."""
    given = {name: x for name, x in arrays.items() if x is not None}
    read, key, function = exact(options), None, None
    if read is not None:  # options of a wrong type are not looked up: 1 == True == 1.0
        options = read
        with contextlib.suppress(AttributeError, TypeError):  # not an array
            key = (op, tuple([(name, x.shape, x.dtype) for name, x in given.items()]), *options.values())
            function = _functions.get(key) if out is None else None
    if function is None:
        _check(op, given, out)
        problem = make_problem(**{name: _view(op, name, x) for name, x in given.items()}, **options)
        function = _build(op, problem, tuple(given), options.get("layout", "bshd"), options["return_lse"])
        if key is not None:
            if len(_functions) >= _MAX_FUNCTIONS:
                _functions.clear()
            _functions[key] = function
    elif not all(isinstance(x, jax.Array) for x in given.values()):
        _check(op, given, out)
    return function(*given.values())


def _check(op: str, given: dict[str, Any], out: Any) -> None:
    reasons = [
        f"{name} is a {type(x).__module__}.{type(x).__qualname__}, not a JAX array"
        + (f"; give jnp.asarray({name})" if isinstance(x, (list, tuple, int, float)) else "")
        for name, x in given.items()
        if not isinstance(x, jax.Array)
    ]
    if out is not None:
        reasons.append("out is given, but JAX arrays are immutable, and the result is a new array")
    if reasons:
        hints = ["all arrays of one call belong to one library"] if len(reasons) > (out is not None) else []
        hints += ["leave out=None: JAX arrays are immutable"] if out is not None else []
        raise UnsupportedProblem(f"{op} with JAX arrays", reasons, "; ".join(hints))


def _view(op: str, name: str, x: Any) -> View:
    """The dense row-major array that XLA will hand over, without an address yet."""
    if not all(isinstance(n, int) for n in x.shape):
        raise UnsupportedProblem(op, [f"{name} has the symbolic shape {x.shape}; shapes must be known"])
    try:
        dtype = dtypes.from_numpy(np.dtype(x.dtype))
    except (TypeError, ValueError) as error:
        raise UnsupportedProblem(op, [f"{name} has dtype {x.dtype}: {error}"]) from None
    strides = tuple(math.prod(x.shape[i + 1 :]) for i in range(x.ndim))
    return View(0, tuple(x.shape), strides, dtype, 0, "jax", True, x)


def _build(op: str, problem: AttentionProblem, names: Sequence[str], layout: str, lse: bool) -> Callable[..., Any]:
    """A jitted function of the arrays `names` that gives out, or (out, lse)."""
    key, text = _register(problem)
    p = problem
    if p.varlen:
        shapes = [(p.total_q, p.heads_q, p.head_dim_v), (p.heads_q, p.total_q)]
    elif layout == "bhsd":
        shapes = [(p.batch, p.heads_q, p.seqlen_q, p.head_dim_v), (p.batch, p.heads_q, p.seqlen_q)]
    else:
        shapes = [(p.batch, p.seqlen_q, p.heads_q, p.head_dim_v), (p.batch, p.heads_q, p.seqlen_q)]
    results = list(zip(shapes, (dtypes.to_numpy(p.dtype), np.dtype(np.float32)), (0, -np.inf), strict=True))
    if not lse:
        results.pop()
    order = [names.index(name) for name in ("q", "k", "v", *_inputs(p))]

    def plain(*arrays: Any) -> tuple[Any, ...]:
        if not math.prod(shapes[0]):
            return tuple(_filled(results, arrays))
        inputs, aliases = [arrays[i] for i in order], {}
        if p.varlen:  # rows of no sequence keep what the buffers held before
            aliases = {len(inputs) + i: i for i in range(len(results))}
            inputs += [jnp.full(shape, fill, dtype) for shape, dtype, fill in results]
        types = _types(results, inputs)
        call = jax.ffi.ffi_call(_TARGET, types, input_output_aliases=aliases, vmap_method="sequential")
        return tuple(call(*inputs, key=np.int64(key), text=text))

    batched = jax.custom_batching.custom_vmap(plain)

    def rule(size: int, mapped: Sequence[bool], *arrays: Any) -> tuple[tuple[Any, ...], tuple[bool, ...]]:
        by_name = dict(zip(names, zip(arrays, mapped, strict=True), strict=True))
        if p.varlen or by_name.get("sinks", (None, False))[1]:
            out = _one_by_one(batched, mapped, arrays)
        else:
            out = _joined(p, size, by_name, layout, lse)
        return out, (True,) * len(out)

    batched.def_vmap(rule)
    differentiable = jax.custom_jvp(batched)

    def jvp(_primals: Any, _tangents: Any) -> Any:
        raise UnsupportedProblem(
            f"the gradient of {p.describe()}",
            ["there is no backward pass for JAX arrays yet"],
            "wrap the arguments in jax.lax.stop_gradient if no gradient is needed through them",
        )

    differentiable.defjvp(jvp)

    def function(*arrays: Any) -> Any:
        result = differentiable(*arrays)
        return result if lse else result[0]

    function.__name__ = function.__qualname__ = op  # the name in jaxprs and profiles
    return jax.jit(function)  # type: ignore[no-any-return]


def _filled(forms: Sequence[tuple[Any, Any, float]], arrays: Sequence[Any]) -> list[Any]:
    """Arrays of one value each; forms: shape, dtype and value.

    Inside `shard_map` they vary over each mesh axis over which one of `arrays` does, for a sum over nothing of each is
    in them: JAX derives that by itself, and the names under which it keeps it change too often to be asked for.
    """
    nothing = [jax.lax.slice(x, (0,) * x.ndim, (0,) * x.ndim).sum().astype(np.float32) for x in arrays]
    return [jnp.broadcast_to(sum(nothing, value), shape).astype(dtype) for shape, dtype, value in forms]


def _types(forms: Sequence[tuple[Any, Any, float]], arrays: Sequence[Any]) -> Any:
    """The types of `_filled`, for `ffi_call`; nothing is computed."""
    return jax.eval_shape(lambda *given: _filled(forms, given), *arrays)


def _one_by_one(function: Callable[..., Any], mapped: Sequence[bool], arrays: Sequence[Any]) -> tuple[Any, ...]:
    """vmap as a loop."""

    def step(slices: Sequence[Any]) -> Any:
        left = iter(slices)
        return function(*(next(left) if m else x for x, m in zip(arrays, mapped, strict=True)))

    return tuple(jax.lax.map(step, [x for x, m in zip(arrays, mapped, strict=True) if m]))


def _joined(
    p: AttentionProblem, size: int, by_name: dict[str, tuple[Any, bool]], layout: str, lse: bool
) -> tuple[Any, ...]:
    """vmap as one call whose batch is size * batch."""

    def join(x: Any, mapped: bool, shape: Sequence[int]) -> Any:
        """(size, batch, ...) or (batch, ...) -> (size * batch, ...); `shape` is that of one call, batch first."""
        if mapped:  # the call's own leading axes may be missing: put them behind the mapped one
            x = x.reshape(size, *(1,) * (len(shape) + 1 - x.ndim), *x.shape[1:])
        return jnp.broadcast_to(x, (size, *shape)).reshape(size * p.batch, *shape[1:])

    arrays = {name: join(x, m, x.shape[m:]) for name, (x, m) in by_name.items() if name in ("q", "k", "v")}
    if "sinks" in by_name:
        arrays["sinks"] = by_name["sinks"][0]
    if "alibi_slopes" in by_name:
        x, m = by_name["alibi_slopes"]
        arrays["alibi_slopes"] = join(x, m, (p.batch, p.heads_q)) if m or x.ndim == 2 else x
    if "bias" in by_name:
        x, m = by_name["bias"]
        shape = x.shape[m:]
        shared = not m and (len(shape) < 4 or shape[0] == 1)
        arrays["bias"] = x if shared else join(x, m, (p.batch, *(1,) * (3 - len(shape)), *shape[-3:]))
    result = flash_attention(
        **arrays, causal=p.causal, window_size=(p.window_left, p.window_right), softmax_scale=p.softmax_scale,
        softcap=p.softcap, layout=layout, return_lse=lse,
    )  # fmt: skip
    return tuple(x.reshape(size, p.batch, *x.shape[1:]) for x in (result if lse else (result,)))


# ---------------------------------------------------------------------------------------------------------------------
# problems by key

_problems: dict[int, tuple[AttentionProblem, tuple[str, ...]]] = {}
_in_use: list[dict[int, Any]] = [_problems]  # and those of other operations


def _inputs(p: AttentionProblem) -> tuple[str, ...]:
    """The optional arrays of a problem, in the order in which XLA gets them behind q, k and v."""
    has = (
        p.bias_dtype is not None, bool(p.alibi), p.sinks_dtype is not None, p.varlen, p.varlen,
        p.has_seqused_q, p.has_seqused_k,
    )  # fmt: skip
    return tuple(name for name, there in zip(_OPTIONAL, has, strict=True) if there)


def _register(problem: AttentionProblem) -> tuple[int, str]:
    """The attributes (key, text) of a problem, known to the handler from now on."""
    text = json.dumps({name: x.name if isinstance(x, DType) else x for name, x in problem._asdict().items()})
    key = int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little") >> 1
    known = _problems.setdefault(key, (problem, ("q", "k", "v", *_inputs(problem))))
    if known[0] != problem:
        raise RuntimeError(f"two problems share the hash {key}: {known[0]} and {problem}")
    return key, text


def _find(call: _xla_ffi.Call) -> tuple[AttentionProblem, tuple[str, ...]]:
    found = _problems.get(call.key)
    if found is None:  # the program was compiled by another process
        try:
            fields: dict[str, Any] = {
                name: dtypes.from_name(x) if name.endswith("dtype") and x else tuple(x) if isinstance(x, list) else x
                for name, x in json.loads(call.text()).items()
            }
            _register(AttentionProblem(**fields))
            found = _problems[call.key]
        except (KeyError, TypeError, ValueError) as error:
            reason = f"this program was compiled with another version of flashmoe_cupy ({error!r}); compile it again"
            raise _xla_ffi.FfiError(_xla_ffi.INVALID_ARGUMENT, reason) from error
    return found


# ---------------------------------------------------------------------------------------------------------------------
# what XLA calls


def _addresses(names: tuple[str, ...], call: _xla_ffi.Call) -> dict[str, int]:
    """Addresses by name. The inputs behind `names` are the first contents of the outputs, at the outputs' addresses."""
    inputs, outputs = call.inputs(), call.outputs()
    if len(inputs) < len(names) or not 1 <= len(outputs) <= 2:
        raise _xla_ffi.FfiError(_xla_ffi.INVALID_ARGUMENT, f"{len(inputs)} buffers for {names}")
    return dict(zip((*names, "out", "lse"), (*inputs[: len(names)], *outputs), strict=False))


def _run_cuda(call: _xla_ffi.Call) -> None:
    from flashmoe_cupy.ops import attention as op

    problem, names = _find(call)
    device = call.device()
    if call.stage == _xla_ffi.LOAD:
        op.load_attention(problem, device)
    else:
        op.launch_attention(problem, device, call.stream(), _POINTERS | _addresses(names, call))


def _run_cpu(call: _xla_ffi.Call) -> None:
    p, names = _find(call)
    b, hq, hk, sq, sk = p.batch, p.heads_q, p.heads_k, p.seqlen_q, p.seqlen_k
    rows_q, rows_k = ((p.total_q,), (p.total_k,)) if p.varlen else ((b, sq), (b, sk))
    first = 1 if p.varlen else 0  # packed arrays have no batch axis
    bias_shape = tuple(n if t else min(n, 1) for n, t in zip((b, hq, sq, sk), p.bias_strides, strict=True))
    f32, i32 = np.dtype(np.float32), np.dtype(np.int32)
    dtype = dtypes.to_numpy(p.dtype)
    forms: dict[str, tuple[tuple[int, ...], tuple[int, ...], np.dtype[Any]]] = {
        "q": ((*rows_q, hq, p.head_dim), (*p.q_strides[first:], 1), dtype),
        "k": ((*rows_k, hk, p.head_dim), (*p.k_strides[first:], 1), dtype),
        "v": ((*rows_k, hk, p.head_dim_v), (*p.v_strides[first:], 1), dtype),
        "out": ((*rows_q, hq, p.head_dim_v), (*p.out_strides[first:], 1), dtype),
        "lse": ((hq, p.total_q) if p.varlen else (b, hq, sq), (*p.lse_strides[first:], 1), f32),
        "bias": (bias_shape, p.bias_strides, dtypes.to_numpy(p.bias_dtype or p.dtype)),
        "alibi_slopes": ((b, hq), (p.alibi_stride_b, 1), f32) if p.alibi == 2 else ((hq,), (1,), f32),
        "sinks": ((hq,), (1,), dtypes.to_numpy(p.sinks_dtype or p.dtype)),
        "cu_seqlens_q": ((b + 1,), (1,), i32),
        "cu_seqlens_k": ((b + 1,), (1,), i32),
        "seqused_q": ((b,), (1,), i32),
        "seqused_k": ((b,), (1,), i32),
    }
    arrays = {name: _array(name, address, *forms[name]) for name, address in _addresses(names, call).items()}
    cpu_attention(p, lse=arrays.pop("lse", None), **arrays)


def _array(
    name: str, address: int, shape: tuple[int, ...], strides: tuple[int, ...], dtype: np.dtype[Any]
) -> np.ndarray[Any, Any]:
    """The memory at `address` as a NumPy array; strides count elements and are not negative. Inputs are read-only."""
    if 0 in shape:
        return np.empty(shape, dtype)
    extent = 1 + sum((n - 1) * t for n, t in zip(shape, strides, strict=True))
    memory: Any = (ctypes.c_char * (extent * dtype.itemsize)).from_address(address)
    array: np.ndarray[Any, Any] = np.ndarray(shape, dtype, memory, strides=[t * dtype.itemsize for t in strides])
    array.flags.writeable = name in ("out", "lse")
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


def _install(
    target: str, run_cpu: Callable[[_xla_ffi.Call], None], run_cuda: Callable[[_xla_ffi.Call], None]
) -> None:
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


_install(_TARGET, _run_cpu, _run_cuda)


def _drain() -> None:
    """At exit, wait for the work in flight: a handler that needs the interpreter after its end never returns."""
    if not any(_in_use):
        return  # nothing was traced: do not start a backend now
    for array in jax.live_arrays():
        with contextlib.suppress(Exception):  # its error will never be looked at
            array.block_until_ready()
    idle = 0
    while idle < 20:  # results that nobody holds: their handlers may be running, or about to
        idle = 0 if _running else idle + 1
        time.sleep(0.001)


atexit.register(_drain)


def __getattr__(name: str) -> Any:
    """The operations of mixture of experts, which stand in a file of their own."""
    if name not in _MOE:
        raise AttributeError(f"module 'flashmoe_cupy.jax' has no attribute {name!r}")
    from flashmoe_cupy import jax_moe

    return getattr(jax_moe, name)
