"""The experts of a mixture of experts in one call: dispatch, two matrix products with the activation, weighted sum."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Unpack, overload

from flashmoe_cupy._types import Activation, Array, Experts
from flashmoe_cupy.ops.call import Call, run
from flashmoe_cupy.ops.names import no_argument, strict
from flashmoe_cupy.ops.permute import check_ids
from flashmoe_cupy.plan.checks import need_ranks
from flashmoe_cupy.plan.moe.problem import MoEProblem, moe_problem
from flashmoe_cupy.plan.moe.steps import moe_steps
from flashmoe_cupy.plan.operation import Operation, Output, register


# Two, for checkers want more than one: they know no **unknown.
@overload
def fused_moe(
    x: Array, w_gate_up: Any, w_down: Any, topk_weights: Any, topk_ids: Any, *, out: None = None,
    **options: Unpack[Experts],
) -> Array: ...  # fmt: skip
@overload
def fused_moe(
    x: Array, w_gate_up: Any, w_down: Any, topk_weights: Any, topk_ids: Any, *, out: Array | None,
    **options: Unpack[Experts],
) -> Array: ...  # fmt: skip
@strict
def fused_moe(
    x: Array,
    w_gate_up: Any,
    w_down: Any,
    topk_weights: Any,
    topk_ids: Any,
    *,
    activation: Activation = "swiglu",
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
    out: Array | None = None,
    **unknown: object,
) -> Array:
    """out[t] = sum_k topk_weights[t, k] * expert topk_ids[t, k] of x[t], without padding and without dropping.

    An expert e computes h = x @ w_gate_up[e].T + b_gate_up[e], a = activation(h), y = a @ w_down[e].T + b_down[e].
    Arrays are NumPy, CuPy, torch or JAX (or have `__dlpack__`), all of one library on one device; the result is too.
    GPU arrays run CUDA kernels on the library's current stream, host arrays run the NumPy back end. Nothing is copied
    between host and device, and nothing waits.

    x: (T, d), bfloat16, float16 or float32; T from 0. All weights have its dtype. d, n and s are multiples of 8.
    w_gate_up: (E, 2n, d), rows 0...n-1 the gate and n...2n-1 up, for the gated activations; (E, n, d) for the others.
    w_down: (E, d, n). Of x and all weights the last dimension is contiguous, other strides are free; on a GPU those
        that are not multiples of 8 elements are slow or unsupported.
    topk_weights: (T, K), float32 or x's dtype.
    topk_ids: (T, K), int32 or int64. Ids outside of [0, E), such as -1 and E, contribute nothing; an expert may come
        twice in a row. Last dimension contiguous, like that of topk_weights.
    activation: of gate g and up u "swiglu": silu(g) * u; "geglu": gelu(g) * u; "geglu_tanh", its tanh form;
        "swigluoai": (u + 1) * g * sigmoid(swiglu_alpha * g). Not gated: "gelu" (by erf), "gelu_tanh", "relu", "relu2"
        (its square).
    swiglu_alpha: of "swigluoai"; None = 1.702. Refused with any other activation.
    swiglu_limit: of "swiglu" and "swigluoai": g is at most swiglu_limit and u within +-swiglu_limit before all else;
        a NaN stays NaN. None = 7 for "swigluoai", no clamp (inf) for "swiglu". Refused with any other activation.
    b_gate_up: (E, 2n) in the order of w_gate_up's rows, or (E, n); b_down: (E, d). float32 or x's dtype.
    interleaved: the rows of w_gate_up (shared_w_gate_up too) and b_gate_up are g0, u0, g1, u1, ...
    expert_map: (num_global,) int32: topk_ids are global ids, and this is the local id of each, -1 = not here.
    apply_router_weight_on_input: x is multiplied by the weight in front of the expert, and the sum has weights 1.
    shared_w_gate_up, shared_w_down: (2s, d) or (s, d), and (d, s): one more expert that every token passes, with the
        same activation and order of rows and without biases.
    shared_gate: (T,) or (T, 1), float32 or x's dtype: the shared expert's weight, after any sigmoid; None = 1.
    batch_invariant: a token's result does not depend on the other tokens of the call, to the bit.
    out: array of x's library for the result, overwritten; None = a new one. Not for JAX, whose arrays are immutable.

    Returns out (T, d) in x's dtype. h is float32; a, y and the result are rounded to x's dtype, and the sum is float32
    in the order of k, with the shared expert last. The same inputs give the same bits in every run on GPUs; on the CPU,
    as often as NumPy's BLAS does.

    Raises UnsupportedProblem (a ValueError) with every reason, DependencyError when CuPy or a driver is missing; with
    FLASHMOE_CHECK=1 FlashMoEError for the first id below -1 or above the number of (global) experts. Nothing is written
    on error. There is no gradient yet: torch tensors that require one are refused in grad mode, and so is `jax.grad`.

    Names elsewhere: hidden_states is x; w1 and w13 are w_gate_up; w2 is w_down; there is no inplace.

    Sources: Shazeer et al. (arXiv:1701.06538); gated activations as in Shazeer (arXiv:2002.05202); swigluoai as in
    gpt-oss; swiglu with a limit as in DeepSeek-V4 and GLM-5; the shared expert as in DeepSeek-MoE (arXiv:2401.06066).
    """
    if unknown:
        raise no_argument(fused_moe, unknown)
    options = activation, interleaved, swiglu_alpha, swiglu_limit, apply_router_weight_on_input, batch_invariant
    arrays = x, w_gate_up, w_down, topk_weights, topk_ids
    if (
        b_gate_up is None and b_down is None and expert_map is None and shared_w_gate_up is None
        and shared_w_down is None and shared_gate is None and out is None
    ):  # fmt: skip
        return run(_CALL, arrays, options)  # type: ignore[no-any-return]
    optional = b_gate_up, b_down, expert_map, shared_w_gate_up, shared_w_down, shared_gate
    return run(_CALL, arrays, options, optional, out)  # type: ignore[no-any-return]


def _shapes(shapes: Mapping[str, Any], options: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:  # noqa: ARG001
    need_ranks("fused_moe", {"x": 2}, shapes)
    return {"out": tuple(shapes["x"])}


def _host(p: MoEProblem, given: Mapping[str, Any], made: Mapping[str, Any]) -> None:
    from flashmoe_cupy.cpu.moe import fused_moe

    fused_moe(p, out=made["out"], **given)


_CALL = Call(
    register(
        Operation(
            fused_moe,
            (
                "x", "w_gate_up", "w_down", "topk_weights", "topk_ids", "b_gate_up", "b_down", "expert_map",
                "shared_w_gate_up", "shared_w_down", "shared_gate",
            ),
            5,
            {"out": Output()},
            _shapes,
            MoEProblem,
            moe_problem,
            moe_steps,
            _host,
            rows=("x", "w_gate_up", "w_down", "shared_w_gate_up", "shared_w_down", "out"),
            empty=lambda p: not p.tokens,
            check=check_ids,
            steps_on=moe_steps,
        )
    )
)  # fmt: skip
