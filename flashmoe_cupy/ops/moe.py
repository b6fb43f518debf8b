"""The experts of a mixture of experts in one call: dispatch, two matrix products with the activation, weighted sum.

A call runs in three steps, as in ops/attention.py: arrays become views, the views' shapes and the options find a plan
(validated once, then remembered), and the plan queues kernels on the caller's stream or runs the NumPy back end.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Unpack, overload

import numpy as np

from flashmoe_cupy import arrays
from flashmoe_cupy._types import Activation, Array, Experts
from flashmoe_cupy.arrays import View, view
from flashmoe_cupy.dtypes import to_numpy
from flashmoe_cupy.errors import UnsupportedProblem
from flashmoe_cupy.ops import plans
from flashmoe_cupy.ops.names import no_argument, strict
from flashmoe_cupy.ops.operations import FUSED_MOE
from flashmoe_cupy.ops.unreadable import unreadable
from flashmoe_cupy.plan.moe.problem import MoEProblem, moe_problem
from flashmoe_cupy.plan.options import exact, exact_types

if TYPE_CHECKING:
    from flashmoe_cupy.ops.moe_gpu import Ready
    from flashmoe_cupy.ops.quick import Quick

_OPTIONS = (
    "activation", "interleaved", "swiglu_alpha", "swiglu_limit", "apply_router_weight_on_input", "batch_invariant",
)  # fmt: skip
_EXACT = exact_types(*_OPTIONS)
Views = tuple[View | None, ...]  # in the order of FUSED_MOE.arguments


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
    right = tuple(map(type, options)) in _EXACT  # what is remembered is found by exact types only: 1 == True == 1.0
    if not right:
        read: Any = exact(dict(zip(_OPTIONS, options, strict=True)))
        if read is not None:
            right, options = True, tuple(read.values())
            activation, interleaved, swiglu_alpha, swiglu_limit, apply_router_weight_on_input, batch_invariant = options
    given: tuple[Any, ...] = x, w_gate_up, w_down, topk_weights, topk_ids
    if not right:
        short = found = None
    elif (
        b_gate_up is None and b_down is None and expert_map is None and shared_w_gate_up is None
        and shared_w_down is None and shared_gate is None and out is None
    ):  # fmt: skip
        short, found = plans.seen(_plans, given, options)
    else:
        optional = b_gate_up, b_down, expert_map, shared_w_gate_up, shared_w_down, shared_gate, out
        there = tuple([one is not None for one in optional])
        given += tuple([one for one in optional if one is not None])
        short, found = plans.seen(_plans, given, (*options, there))
    if found is not None:
        return found  # type: ignore[no-any-return]
    other = plans.adapter(x)
    if other is not None:
        return other.fused_moe(  # type: ignore[no-any-return]
            x, w_gate_up, w_down, topk_weights, topk_ids, activation=activation, b_gate_up=b_gate_up, b_down=b_down,
            interleaved=interleaved, swiglu_alpha=swiglu_alpha, swiglu_limit=swiglu_limit, expert_map=expert_map,
            apply_router_weight_on_input=apply_router_weight_on_input, shared_w_gate_up=shared_w_gate_up,
            shared_w_down=shared_w_down, shared_gate=shared_gate, batch_invariant=batch_invariant, out=out,
        )  # fmt: skip
    try:
        vx, v1, v2 = view(x, "x"), view(w_gate_up, "w_gate_up"), view(w_down, "w_down")
        vw, vi = view(topk_weights, "topk_weights"), view(topk_ids, "topk_ids")
        b1 = None if b_gate_up is None else view(b_gate_up, "b_gate_up")
        b2 = None if b_down is None else view(b_down, "b_down")
        vm = None if expert_map is None else view(expert_map, "expert_map")
        s1 = None if shared_w_gate_up is None else view(shared_w_gate_up, "shared_w_gate_up")
        s2 = None if shared_w_down is None else view(shared_w_down, "shared_w_down")
        vg = None if shared_gate is None else view(shared_gate, "shared_gate")
        vo = None if out is None else view(out, "out")
    except (UnsupportedProblem, TypeError) as error:
        raise unreadable("fused_moe", locals(), error) from None
    key = (
        vx[1:6], v1[1:6], v2[1:6], vw[1:6], vi[1:6], options, b1 and b1[1:6], b2 and b2[1:6],
        vm and vm[1:6], s1 and s1[1:6], s2 and s2[1:6], vg and vg[1:6], vo and vo[1:7],
    )  # fmt: skip
    views = (vx, v1, v2, vw, vi, b1, b2, vm, s1, s2, vg)
    plan = _plans.find(key) if right else None
    if plan is None:
        problem = moe_problem(
            vx, v1, v2, vw, vi, activation=activation, b_gate_up=b1, b_down=b2, interleaved=interleaved,
            swiglu_alpha=swiglu_alpha, swiglu_limit=swiglu_limit, expert_map=vm,
            apply_router_weight_on_input=apply_router_weight_on_input, shared_w_gate_up=s1, shared_w_down=s2,
            shared_gate=vg, batch_invariant=batch_invariant, out=vo,
        )  # fmt: skip
        plan = _plans.keep(key, _Plan(problem, views, vo))
    if short is not None and vx.device >= 0:
        _plans.keep(short, plan)
    return plan.run(vx, views, vo, out)  # type: ignore[no-any-return]


class _Plan:
    """What one combination of shapes and options needs; made once, then found by its key."""

    __slots__ = ("overlap", "places", "problem", "ready", "shape", "short", "specs")

    def __init__(self, problem: MoEProblem, views: Views, out: View | None) -> None:
        self.problem = problem
        self.ready: Ready | None = None  # of the last call
        self.short: plans.ShortWay | None = None  # made of it
        self.overlap = plans.Overlap("fused_moe", FUSED_MOE.arguments, views, out)
        self.places = [i for i, v in enumerate((*views, out), 1) if v is not None]  # in the table of addresses
        self.specs: list[plans.Spec] = [*FUSED_MOE.results(problem).values()]
        self.shape = self.specs[0][0]

    def run(self, x: View, views: Views, out_view: View | None, out: Any) -> Any:
        """The call: the output from the caller's library, then the kernels or the NumPy back end."""
        if out_view is not None:
            self.overlap.check(out_view, views)
        if x.device < 0:
            return self._run_on_host(x, views, out_view, out)
        if out_view is None:
            (out,), pointers = plans.allocate(x, self.specs)
        else:
            pointers = (out_view.ptr,)
        if self.problem.tokens:
            self.ready = plans.gpu().run(FUSED_MOE, self.problem, views, pointers)
            plans.queued(views)
        return out

    def short_way(self, quick: Quick, given: tuple[Any, ...]) -> plans.ShortWay | None:
        """`run` for plain arrays on a GPU like these; None: there is none, as far as is known."""
        if self.short is None and self.ready is not None:
            spec = self.shape, (self.problem.hidden, 1), given[0].dtype
            overlap = self.overlap if self.places[-1] > len(FUSED_MOE.arguments) else None  # the last one is out
            self.short = plans.short_way(quick, self.ready, self.places, [spec], overlap)
        return self.short

    def _run_on_host(self, x: View, views: Views, out_view: View | None, out: Any) -> Any:
        from flashmoe_cupy.cpu.moe import fused_moe as run

        p = self.problem
        a, w_gate_up, w_down, topk_weights, topk_ids, *optional = plans.on_host(views)
        plans.check_ids(topk_ids, p.num_experts, p.num_global)
        target = np.empty(self.shape, to_numpy(x.dtype)) if out_view is None else arrays.as_numpy(out_view)
        run(p, a, w_gate_up, w_down, topk_weights, topk_ids, target, *optional)
        return arrays.from_numpy(x, target) if out_view is None else out


_plans: plans.Memory[_Plan] = plans.Memory()
