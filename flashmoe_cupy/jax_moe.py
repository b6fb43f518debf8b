"""Mixture of experts for JAX arrays and tracers, as jax.py does it for attention: one target of XLA's for the four.

What a compiled program carries is in the same two attributes: "text", here the operation, its problem and the shapes of
its arrays in JSON, and "key", a hash of that text. The workspace of the kernels is one more result of the call.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from flashmoe_cupy import _xla_ffi, dtypes
from flashmoe_cupy.dtypes import UINT8, DType
from flashmoe_cupy.errors import UnsupportedProblem
from flashmoe_cupy.jax import _array, _check, _filled, _in_use, _install, _types, _view
from flashmoe_cupy.ops import moe_gpu
from flashmoe_cupy.ops.operations import OPERATIONS, Form
from flashmoe_cupy.ops.permute import MoEPermutation
from flashmoe_cupy.ops.route import RouterStats
from flashmoe_cupy.plan.options import exact

__all__ = ["fused_moe", "grouped_gemm", "moe_permute", "moe_route"]

_TARGET = "flashmoe_cupy_moe"


def moe_route(
    logits: Any,
    *,
    top_k: int,
    scoring_func: str = "softmax",
    renormalize: bool = False,
    routed_scaling_factor: float = 1.0,
    e_score_correction_bias: Any = None,
    num_expert_group: int = 1,
    topk_group: int = 1,
    capacity_factor: float | None = None,
    return_stats: bool = False,
) -> Any:
    """`flashmoe_cupy.moe_route` for JAX arrays, also under `jit` and the other transforms.

    The options are Python values: under `jit` make them static. `vmap` runs one call after the other. No gradient yet:
    `jax.grad` raises UnsupportedProblem. Several devices: inside `jax.shard_map`. FLASHMOE_CHECK=1 looks for NaN on the
    CPU only.
    """
    arrays = {"logits": logits, "e_score_correction_bias": e_score_correction_bias}
    options = {
        "top_k": top_k, "scoring_func": scoring_func, "renormalize": renormalize,
        "routed_scaling_factor": routed_scaling_factor, "num_expert_group": num_expert_group, "topk_group": topk_group,
        "capacity_factor": capacity_factor, "return_stats": return_stats,
    }  # fmt: skip
    weights, ids, *stats = _call("moe_route", arrays, options)
    return (weights, ids, RouterStats(*stats)) if stats else (weights, ids)


def moe_permute(topk_ids: Any, *, num_experts: int, expert_map: Any = None) -> MoEPermutation[Any]:
    """`flashmoe_cupy.moe_permute` for JAX arrays, also traced; options and transforms as in `moe_route`."""
    return MoEPermutation(
        *_call("moe_permute", {"topk_ids": topk_ids, "expert_map": expert_map}, {"num_experts": num_experts})
    )


def grouped_gemm(
    x: Any,
    w: Any,
    *,
    offsets: Any = None,
    group_sizes: Any = None,
    gather_indices: Any = None,
    bias: Any = None,
    out: Any = None,
) -> Any:
    """`flashmoe_cupy.grouped_gemm` for JAX arrays, also traced; transforms as in `moe_route`. `out` must be None."""
    arrays = {
        "x": x, "w": w, "offsets": offsets, "group_sizes": group_sizes, "gather_indices": gather_indices, "bias": bias,
    }  # fmt: skip
    return _call("grouped_gemm", arrays, {}, out)[0]


def fused_moe(
    x: Any,
    w_gate_up: Any,
    w_down: Any,
    topk_weights: Any,
    topk_ids: Any,
    *,
    activation: str = "swiglu",
    b_gate_up: Any = None,
    b_down: Any = None,
    interleaved: bool = False,
    swiglu_alpha: float | None = None,
    swiglu_limit: float | None = None,
    expert_map: Any = None,
    apply_router_weight_on_input: bool = False,
    shared_w_gate_up: Any = None,
    shared_w_down: Any = None,
    shared_gate: Any = None,
    batch_invariant: bool = False,
    out: Any = None,
) -> Any:
    """`flashmoe_cupy.fused_moe` for JAX arrays, also traced; options and transforms as in `moe_route`.

    `out` must be None. FLASHMOE_CHECK=1 checks the ids on the CPU only.
    """
    arrays = {
        "x": x, "w_gate_up": w_gate_up, "w_down": w_down, "topk_weights": topk_weights, "topk_ids": topk_ids,
        "b_gate_up": b_gate_up, "b_down": b_down, "expert_map": expert_map, "shared_w_gate_up": shared_w_gate_up,
        "shared_w_down": shared_w_down, "shared_gate": shared_gate,
    }  # fmt: skip
    options = {
        "activation": activation, "interleaved": interleaved, "swiglu_alpha": swiglu_alpha,
        "swiglu_limit": swiglu_limit, "apply_router_weight_on_input": apply_router_weight_on_input,
        "batch_invariant": batch_invariant,
    }  # fmt: skip
    return _call("fused_moe", arrays, options, out)[0]


# ---------------------------------------------------------------------------------------------------------------------
# one call


_functions: dict[tuple[Any, ...], Callable[..., Any]] = {}
_MAX_FUNCTIONS = 4096  # distinct shapes that are remembered


def _call(op: str, arrays: dict[str, Any], options: dict[str, Any], out: Any = None) -> tuple[Any, ...]:
    """Find or build the function of these shapes, dtypes and options, and call it."""
    operation = OPERATIONS[op]
    required = operation.arguments[: operation.required]
    given = {name: x for name, x in arrays.items() if x is not None or name in required}
    read, key, function = exact(options), None, None
    if read is not None:  # options of a wrong type are not looked up: 1 == True == 1.0
        options = read
        with contextlib.suppress(AttributeError, TypeError):  # not an array
            key = (op, tuple([(name, x.shape, x.dtype) for name, x in given.items()]), *options.values())
            function = _functions.get(key) if out is None else None
    if function is None:
        _check(op, given, out)
        problem = operation.make(**{name: _view(op, name, x) for name, x in given.items()}, **options)
        function = _build(op, problem, [(name, x.shape, x.dtype) for name, x in given.items()])
        if key is not None:
            if len(_functions) >= _MAX_FUNCTIONS:
                _functions.clear()
            _functions[key] = function
    elif not all(isinstance(x, jax.Array) for x in given.values()):
        _check(op, given, out)
    return function(*given.values())  # type: ignore[no-any-return]


def _build(op: str, problem: Any, arrays: Sequence[tuple[str, tuple[int, ...], Any]]) -> Callable[..., Any]:
    """A jitted function of the arrays that gives the results as a tuple."""
    names = [name for name, _, _ in arrays]
    order = [names.index(name) for name in OPERATIONS[op].arguments if name in names]
    forms = [(names[i], *arrays[i][1:]) for i in order]
    key, text = _register(op, problem, forms)
    results = [*OPERATIONS[op].results(problem).values()]
    empty = 0 in results[-1][0] or 0 in results[0][0]
    workspace = 0 if empty else moe_gpu.workspace_bytes(OPERATIONS[op], problem)
    wanted: list[Form] = results if empty else [*results, ((max(workspace, 1),), UINT8)]
    zeros = [(shape, dtypes.to_numpy(dtype), 0.0) for shape, dtype in wanted]

    def plain(*given: Any) -> tuple[Any, ...]:
        inputs = [given[i] for i in order]
        if empty:
            return tuple(_filled(zeros, inputs))
        call = jax.ffi.ffi_call(_TARGET, _types(zeros, inputs), vmap_method="sequential")
        return tuple(call(*inputs, key=np.int64(key), text=text)[:-1])

    differentiable = jax.custom_jvp(plain)

    def jvp(_primals: Any, _tangents: Any) -> Any:
        raise UnsupportedProblem(
            f"the gradient of {problem.describe()}",
            ["there is no backward pass for JAX arrays yet"],
            "wrap the arguments in jax.lax.stop_gradient if no gradient is needed through them",
        )

    differentiable.defjvp(jvp)

    def function(*given: Any) -> Any:
        return differentiable(*given)

    function.__name__ = function.__qualname__ = op  # the name in jaxprs and profiles
    return jax.jit(function)  # type: ignore[no-any-return]


# ---------------------------------------------------------------------------------------------------------------------
# problems by key


class _Known(NamedTuple):
    """What a call of XLA's is about. arrays: name, shape and dtype of its inputs, in their order."""

    op: str
    problem: Any
    arrays: tuple[tuple[str, tuple[int, ...], str], ...]


_known: dict[int, _Known] = {}
_in_use.append(_known)


def _register(op: str, problem: Any, arrays: Sequence[tuple[str, tuple[int, ...], Any]]) -> tuple[int, str]:
    """The attributes (key, text) of a call, known to the handler from now on."""
    fields = {name: x.name if isinstance(x, DType) else x for name, x in problem._asdict().items()}
    forms = tuple([(name, tuple(shape), np.dtype(dtype).name) for name, shape, dtype in arrays])
    text = json.dumps({"op": op, "arrays": forms, "problem": fields})
    key = int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little") >> 1
    known = _known.setdefault(key, _Known(op, problem, forms))
    if known != (op, problem, forms):
        raise RuntimeError(f"two problems share the hash {key}: {known.problem} and {problem}")
    return key, text


def _find(call: _xla_ffi.Call) -> _Known:
    found = _known.get(call.key)
    if found is None:  # the program was compiled by another process
        try:
            read = json.loads(call.text())
            fields: dict[str, Any] = {
                name: dtypes.from_name(x) if name.endswith("dtype") and x else tuple(x) if isinstance(x, list) else x
                for name, x in read["problem"].items()
            }
            arrays = [(name, tuple(shape), dtypes.from_name(kind).name) for name, shape, kind in read["arrays"]]
            _register(read["op"], OPERATIONS[read["op"]].problem(**fields), arrays)
            found = _known[call.key]
        except (KeyError, TypeError, ValueError) as error:
            reason = f"this program was compiled with another version of flashmoe_cupy ({error!r}); compile it again"
            raise _xla_ffi.FfiError(_xla_ffi.INVALID_ARGUMENT, reason) from error
    return found


# ---------------------------------------------------------------------------------------------------------------------
# what XLA calls


def _run_cuda(call: _xla_ffi.Call) -> None:
    known, device = _find(call), call.device()
    operation = OPERATIONS[known.op]
    if call.stage == _xla_ffi.LOAD:
        moe_gpu.load(operation, known.problem, device)
        return
    by_name = dict(zip((name for name, _, _ in known.arrays), call.inputs(), strict=True))
    inputs = [by_name.get(name, 0) for name in operation.arguments]
    *outputs, workspace = call.outputs()
    moe_gpu.launch(operation, known.problem, device, call.stream(), inputs, outputs, workspace)


def _run_cpu(call: _xla_ffi.Call) -> None:
    known = _find(call)
    operation, p = OPERATIONS[known.op], known.problem
    given: dict[str, Any] = dict.fromkeys(operation.arguments)
    for (name, shape, dtype), address in zip(known.arrays, call.inputs(), strict=True):
        given[name] = _dense(name, address, shape, dtypes.from_name(dtype))
    made = {
        name: _dense("out", address, *form)
        for (name, form), address in zip(operation.results(p).items(), call.outputs()[:-1], strict=True)
    }
    operation.check(p, given.__getitem__)
    operation.host(p, given, made)


def _dense(name: str, address: int, shape: tuple[int, ...], dtype: DType) -> Any:
    strides = tuple([math.prod(shape[i + 1 :]) for i in range(len(shape))])
    return _array(name, address, shape, strides, dtypes.to_numpy(dtype))


_install(_TARGET, _run_cpu, _run_cuda)
