"""Attention's backward: which kernels and configurations would run it, what calls can ask for. Needs no GPU."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import product
from typing import Any

from flashmoe_cupy.service.attention import HEAD_DIM, HEAD_DIM_V, SIZES, problem_of, visible_pairs
from flashmoe_cupy.service.choices import Explanation, choice
from flashmoe_cupy.service.family import DTYPE, Family, elements_of, of_dtype
from flashmoe_cupy.service.machine import backend
from flashmoe_cupy.service.names import DTYPES, target_archs


def explain_attention_backward(
    arch: str | Sequence[str] | None = None,
    *,
    batch: int = 1,
    seqlen_q: int = 4096,
    seqlen_k: int | None = None,
    heads_q: int = 32,
    heads_k: int | None = None,
    head_dim: int = 128,
    head_dim_v: int | None = None,
    dtype: str = "bfloat16",
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softmax_scale: float | None = None,
    softcap: float = 0.0,
    alibi: bool = False,
    bias: str | None = None,
    sinks: bool = False,
    varlen: bool = False,
    padded: bool = False,
) -> Explanation:
    """`explain` for the gradients of everything that has one. Sizes: as those of `explain_attention`.

    flops: those of five products, as papers count them, whichever kernels run.
    """
    from flashmoe_cupy.plan.attention.backward import backward_steps

    problem = problem_of(
        batch, seqlen_q, seqlen_k, heads_q, heads_k, head_dim, head_dim_v, dtype, causal, window_size,
        softmax_scale, softcap, alibi, bias, sinks, varlen, padded,
    )  # fmt: skip
    of = _gradients(problem)
    steps = backward_steps(of)[0]
    choices = [
        choice(step.task, step.problem, name, step=f"{step.task} {step.problem.part}")
        for name in target_archs(arch)
        for step in steps
    ]
    pairs = visible_pairs(problem.seqlen_q, problem.seqlen_k, problem.window_left, problem.window_right)
    size = problem.dtype.itemsize
    rows_q, rows_k = problem.batch * problem.seqlen_q, problem.batch * problem.seqlen_k
    dims, dim_v = problem.head_dim, problem.head_dim_v
    flops = 2 * problem.batch * problem.heads_q * pairs * (3 * dims + 2 * dim_v)
    moved = size * (rows_q * problem.heads_q * 2 * (dims + dim_v) + rows_k * problem.heads_k * 2 * (dims + dim_v))
    return Explanation(of.describe(), backend()[1], flops, moved, tuple(choices))


def _gradients(p: Any) -> Any:
    """The problem of all gradients of contiguous arrays."""
    from flashmoe_cupy.dtypes import BOOL
    from flashmoe_cupy.plan.attention.gradient import AttentionBwdProblem

    lse = (0, p.total_q, 1) if p.varlen else (p.heads_q * p.seqlen_q, p.seqlen_q, 1)
    has_bias = p.bias_dtype is not None and p.bias_dtype is not BOOL
    wanted = ("dq", "dk", "dv", *(["dsinks"] if p.sinks_dtype else []), *(["dbias"] if has_bias else []))
    shape = () if p.bias_dtype is None else (p.batch, p.heads_q, p.seqlen_q, p.seqlen_k)
    return AttentionBwdProblem(
        p._replace(clear_rest=0), p.out_strides, p.q_strides, p.k_strides, p.v_strides, lse, None, wanted,
        ("dq", "dk", "dv"), bias_shape=shape,
    )  # fmt: skip


def _matching(
    arch: str,
    kernels: Iterable[Any],
    *,
    dtype: str | None = None,
    head_dim: int | None = None,
    head_dim_v: int | None = None,
) -> Iterator[tuple[Any, Any]]:
    """(kernel, config) of what calls with these can ask for, whatever their masks and features."""
    elements_of(dtype)
    for kernel in kernels:
        dims = None if head_dim is None else _compiled_dims(kernel, arch, dtype, head_dim, head_dim_v)
        for _, config in of_dtype(arch, [kernel], dtype=dtype):
            if dims is None or not hasattr(config, "head_dim") or (config.head_dim, config.head_dim_v) in dims:
                yield kernel, config


def _compiled_dims(
    kernel: Any, arch: str, dtype: str | None, head_dim: int, head_dim_v: int | None
) -> set[tuple[int, int]]:
    """The compiled sizes in which `kernel` runs these head dimensions, asked of the kernel itself."""
    from flashmoe_cupy.plan.attention.backward import backward_steps

    found = set()
    for name, bias in product(DTYPES.values() if dtype is None else (dtype,), (None, "same")):
        problem = problem_of(
            1, 64, 64, 1, 1, head_dim, head_dim_v, name, True, (-1, -1), None, 0.0, False, bias, False, False
        )
        for step in backward_steps(_gradients(problem))[0]:
            if step.task == kernel.task and not kernel.why_not(step.problem, arch):
                config = kernel.choose(step.problem, arch)
                if hasattr(config, "head_dim"):
                    found.add((config.head_dim, config.head_dim_v))
    return found


ATTENTION_BACKWARD = Family(
    "attention_backward", "attention's backward", SIZES, explain_attention_backward, (DTYPE, HEAD_DIM, HEAD_DIM_V),
    _matching,
)  # fmt: skip
