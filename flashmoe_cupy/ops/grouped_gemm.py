"""One matrix product per group of rows, each with the weights of its expert."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Unpack, overload

from flashmoe_cupy._types import Array, Gemm
from flashmoe_cupy.errors import UnsupportedProblem
from flashmoe_cupy.ops.call import Call, run
from flashmoe_cupy.ops.names import no_argument, strict
from flashmoe_cupy.plan.checks import need_ranks
from flashmoe_cupy.plan.moe import steps
from flashmoe_cupy.plan.moe.problem import GroupedGemmProblem, grouped_gemm_problem
from flashmoe_cupy.plan.operation import Operation, Output, Workspace, register
from flashmoe_cupy.plan.step import Step


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
    return run(  # type: ignore[no-any-return]
        _CALL, (x, w), (), (offsets, group_sizes, gather_indices, bias), out
    )  # fmt: skip


def _shapes(shapes: Mapping[str, Any], options: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:  # noqa: ARG001
    need_ranks("grouped_gemm", {"x": 3 if "group_sizes" in shapes else 2, "w": 3}, shapes)
    gathered = shapes.get("gather_indices")
    rows = shapes["x"][:-1] if gathered is None else gathered[:1]
    return {"out": (*rows, shapes["w"][1])}


def _steps(p: GroupedGemmProblem) -> tuple[list[Step], Workspace]:
    if why := steps.rows_apart(p):
        raise UnsupportedProblem(p.describe(), why, "contiguous x and out")
    return steps.grouped_gemm_steps(p), Workspace()


def _host(p: GroupedGemmProblem, given: Mapping[str, Any], made: Mapping[str, Any]) -> None:
    from flashmoe_cupy.cpu.moe import grouped_gemm

    rest = dict(given)
    if p.new_out:  # rows of no group are 0 in a new out, and left alone in a given one
        made["out"][...] = 0
    grouped_gemm(p, rest.pop("x"), rest.pop("w"), made["out"], **rest)


_CALL = Call(
    register(
        Operation(
            grouped_gemm,
            ("x", "w", "offsets", "group_sizes", "gather_indices", "bias"),
            2,
            {"out": Output()},
            _shapes,
            GroupedGemmProblem,
            grouped_gemm_problem,
            _steps,
            _host,
            rows=("x", "w", "out"),
            empty=lambda p: not p.rows,
        )
    )
)
