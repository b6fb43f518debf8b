"""One matrix product per group of rows, each with the weights of its expert."""

from __future__ import annotations

from typing import Any, Unpack, overload

import numpy as np

from flashmoe_cupy import arrays
from flashmoe_cupy._types import Array, Gemm
from flashmoe_cupy.arrays import View, view
from flashmoe_cupy.dtypes import to_numpy
from flashmoe_cupy.errors import UnsupportedProblem
from flashmoe_cupy.ops import plans
from flashmoe_cupy.ops.names import no_argument, strict
from flashmoe_cupy.ops.operations import GROUPED_GEMM
from flashmoe_cupy.ops.unreadable import unreadable
from flashmoe_cupy.plan.checks import asked
from flashmoe_cupy.plan.moe.problem import GroupedGemmProblem, grouped_gemm_problem

Views = tuple[View, View, View | None, View | None, View | None, View | None]


# Two, for checkers want more than one: they know no **unknown.
@overload
def grouped_gemm(x: Array, w: Any, *, out: None = None, **options: Unpack[Gemm]) -> Array: ...
@overload
def grouped_gemm(x: Array, w: Any, *, out: Array | None, **options: Unpack[Gemm]) -> Array: ...
@strict
def grouped_gemm(
    x: Array,
    w: Any,
    *,
    offsets: Any = None,
    group_sizes: Any = None,
    gather_indices: Any = None,
    bias: Any = None,
    out: Array | None = None,
    **unknown: object,
) -> Array:
    """out[r] = x[r] @ w[e].T (+ bias[e]) for the rows r of each group e, added up in float32.

    Arrays are NumPy, CuPy, torch or JAX (or have `__dlpack__`), all of one library on one device; the result is too.
    Nothing is copied between host and device, and nothing waits.

    x: (rows, d), bfloat16, float16 or float32, last dimension contiguous, like w; d and n are multiples of 8.
        With group_sizes (E, rows, d).
    w: (E, n, d), one matrix per group, of x's dtype. Other strides are free; on a GPU those that are not multiples of 8
        elements are slow or unsupported.
    offsets: (E + 1,) int32, not falling: group e has the rows offsets[e]:offsets[e + 1] of out.
    group_sizes: (E,) int32, instead of offsets: the first group_sizes[e] rows of x[e] count (the masked layout).
    gather_indices: (rows of out,) int32, with offsets: row r of out reads x[gather_indices[r]]; an index outside of
        [0, rows of x) reads zeros.
    bias: (E, n), float32 or x's dtype.
    out: array of x's library for the result; rows of no group are left alone. None = a new one, where they are 0. Not
        for JAX, whose arrays are immutable.

    Returns out (rows, n), with group_sizes (E, rows, n), in x's dtype. The lists are read on the device, so nothing
    waits for them; in host memory they are checked. The same inputs give the same bits in every run.

    Raises UnsupportedProblem (a ValueError) with every reason, DependencyError when CuPy or a driver is missing.
    Nothing is written on error. There is no gradient yet: torch tensors that require one are refused in grad mode, and
    so is `jax.grad`.
    """
    if unknown:
        raise no_argument(grouped_gemm, unknown)
    other = plans.adapter(x)
    if other is not None:
        return other.grouped_gemm(  # type: ignore[no-any-return]
            x, w, offsets=offsets, group_sizes=group_sizes, gather_indices=gather_indices, bias=bias, out=out
        )  # fmt: skip
    try:
        vx, vw = view(x, "x"), view(w, "w")
        vo = None if offsets is None else view(offsets, "offsets")
        vs = None if group_sizes is None else view(group_sizes, "group_sizes")
        vg = None if gather_indices is None else view(gather_indices, "gather_indices")
        vb = None if bias is None else view(bias, "bias")
        vt = None if out is None else view(out, "out")
    except (UnsupportedProblem, TypeError) as error:
        raise unreadable("grouped_gemm", locals(), error) from None
    key = (
        vx[1:6], vw[1:6], vo and vo[1:6], vs and vs[1:6], vg and vg[1:6], vb and vb[1:6], vt and vt[1:7],
    )  # fmt: skip
    views = (vx, vw, vo, vs, vg, vb)
    plan = _plans.find(key)
    if plan is None:
        problem = grouped_gemm_problem(
            vx, vw, offsets=vo, group_sizes=vs, gather_indices=vg, bias=vb, out=vt
        )  # fmt: skip
        plan = _plans.keep(key, _Plan(problem, views, vt))
    try:
        return plan.run(views, vt, out)  # type: ignore[no-any-return]
    except UnsupportedProblem as error:
        if vx.device >= 0:
            raise
        names = (*GROUPED_GEMM.arguments, "out")
        named = [(name, v) for name, v in zip(names, (*views, vt), strict=True) if v is not None]
        raise UnsupportedProblem(asked("grouped_gemm", named, []), error.reasons, error.hint) from None


class _Plan:
    """What one combination of shapes and options needs; made once, then found by its key."""

    __slots__ = ("overlap", "problem", "shape", "specs")

    def __init__(self, problem: GroupedGemmProblem, views: Views, out: View | None) -> None:
        self.problem = problem
        self.overlap = plans.Overlap("grouped_gemm", GROUPED_GEMM.arguments, views, out)
        self.specs: list[plans.Spec] = [*GROUPED_GEMM.results(problem).values()]
        self.shape = self.specs[0][0]

    def run(self, views: Views, out_view: View | None, out: Any) -> Any:
        """The call: the output from the caller's library, then the kernel or the NumPy back end."""
        x = views[0]
        if out_view is not None:
            self.overlap.check(out_view, views)
        if x.device < 0:
            return self._run_on_host(views, out_view, out)
        if out_view is None:
            (out,), pointers = plans.allocate(x, self.specs)
        else:
            pointers = (out_view.ptr,)
        if self.problem.rows:
            plans.gpu().run(GROUPED_GEMM, self.problem, views, pointers)
            plans.queued(views)
        return out

    def _run_on_host(self, views: Views, out_view: View | None, out: Any) -> Any:
        from flashmoe_cupy.cpu.moe import grouped_gemm as run

        x, w, *optional = plans.on_host(views)
        target = np.zeros(self.shape, to_numpy(views[0].dtype)) if out_view is None else arrays.as_numpy(out_view)
        run(self.problem, x, w, target, *optional)
        return arrays.from_numpy(views[0], target) if out_view is None else out


_plans: plans.Memory[_Plan] = plans.Memory()
