"""Which kernels and configurations there are, and which would run a problem. Needs no GPU and no CuPy."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import product
from typing import Any

from flashmoe_cupy.service.attention import explain_attention, problem_of
from flashmoe_cupy.service.choices import Explanation
from flashmoe_cupy.service.moe import explain_moe
from flashmoe_cupy.service.names import DTYPES, OPS, named_dtype, require_known, target_archs


def explain(op: str = "attention", *, arch: str | Sequence[str] | None = None, **sizes: Any) -> Explanation:
    """Say which kernels and configurations would run a problem, per arch, and why not the others. Needs no GPU.

    arch: one or several of plan.archs.ARCHS; None = FLASHMOE_ARCH, else those of the devices here, else all.
    sizes: of the problem, by name; those not given have the defaults that `explain_attention` and `explain_moe` say.
    "attention": batch, seqlen_q, seqlen_k, heads_q, heads_k, head_dim, head_dim_v, dtype, causal, window_size,
        softmax_scale, softcap, alibi, bias, sinks, varlen.
    "moe": tokens, hidden, intermediate, experts, top_k, dtype, activation, interleaved, swiglu_alpha, swiglu_limit,
        shared, batch_invariant.
    Raises UnsupportedProblem, with the same reasons as the call itself, ValueError for an unknown op or arch, and
    TypeError for a size that the op does not have.
    """
    require_known("op", op, OPS)
    return explain_moe(arch, **sizes) if op == "moe" else explain_attention(arch, **sizes)


def kernels(
    arch: str | None = None, *, op: str | None = None, dtype: str | None = None, head_dim: int | None = None
) -> dict[str, dict[str, Any]]:
    """Per kernel its summary, header and configurations, each with the archs that have it.

    arch, op, dtype, head_dim: only these; a head_dim means attention. Raises as `specialisations` does, and ValueError
    for an unknown arch or op.
    """
    from flashmoe_cupy.plan.archs import ARCHS

    if op is not None:
        require_known("op", op, OPS)
    names = ARCHS if arch is None else target_archs(arch)
    ops = (op,) if op is not None else OPS if head_dim is None else ("attention",)
    table: dict[str, dict[str, Any]] = {
        kernel.name: {"summary": kernel.summary, "header": kernel.header, "configs": []}
        for each in ops
        for kernel in registry(each).values()
    }
    rows: dict[tuple[str, Any], dict[str, Any]] = {}
    for name, each in product(names, ops):
        for kernel, config in specialisations(name, op=each, dtype=dtype, head_dim=head_dim):
            if (kernel.name, config) not in rows:
                row = {"name": config.name, "archs": [], "threads": config.threads, "smem_bytes": config.smem_bytes}
                table[kernel.name]["configs"].append(rows.setdefault((kernel.name, config), row))
            rows[kernel.name, config]["archs"].append(name)
    return table


def registry(op: str) -> dict[str, Any]:
    """The kernels of an op by name; of those for one task, the first that takes a problem runs it."""
    from flashmoe_cupy.plan import kernels

    return dict(kernels.of_op(op))


def specialisations(
    arch: str,
    *,
    op: str = "attention",
    dtype: str | None = None,
    head_dim: int | None = None,
    head_dim_v: int | None = None,
) -> Iterator[tuple[Any, Any]]:
    """(kernel, config) of every specialisation that a call on `arch` can ask for, or of those that match.

    op: "attention", or "moe" for all operations of mixture of experts.
    dtype, head_dim, head_dim_v (None = as head_dim): only what calls with these can ask for, whatever their masks and
    features. The sets are finite: no length, stride, batch or head count is part of a specialisation.
    Raises UnsupportedProblem for head dimensions that nothing runs, ValueError for head_dim_v without head_dim, for
    head dimensions of "moe" and for a dtype that nothing computes with.
    """
    if op == "moe" and (head_dim, head_dim_v) != (None, None):
        raise ValueError("moe has no head_dim and no head_dim_v")
    if head_dim is None and head_dim_v is not None:
        raise ValueError("head_dim_v needs head_dim beside it")
    names = [dtype] if dtype is not None else ["bfloat16", "float16", "float32"]
    elements = {named_dtype(name).cuda for name in names}
    if not elements <= set(DTYPES):
        require_known("dtype", names[0], (*DTYPES.values(), *DTYPES))
    if op == "moe":
        for kernel in registry(op).values():
            yield from ((kernel, config) for config in kernel.configs(arch) if _element(config) in ("", *elements))
        return
    for kernel in registry(op).values():
        dims = None if head_dim is None else _compiled_dims(kernel, arch, names, head_dim, head_dim_v)
        for config in kernel.configs(arch):
            if config.element in elements and (dims is None or (config.head_dim, config.head_dim_v) in dims):
                yield kernel, config


def _compiled_dims(
    kernel: Any, arch: str, names: Sequence[str], head_dim: int, head_dim_v: int | None
) -> set[tuple[int, int]]:
    """The compiled sizes in which `kernel` runs these head dimensions, asked of the kernel itself."""
    found = set()
    for name in names:
        for length, softcap, bias in product((1, 4096), (0.0, 1.0), (None, "same")):
            problem = problem_of(
                1, length, length, 1, 1, head_dim, head_dim_v, name, True, (-1, -1), None, softcap, False, bias, False,
                False,
            )  # fmt: skip
            if not kernel.why_not(problem, arch):
                config = kernel.choose(problem, arch)
                found.add((config.head_dim, config.head_dim_v))
    return found


def _element(config: Any) -> str:
    """The element type that a configuration is for, as CUDA names it; "" for one that serves all."""
    first = str(getattr(config, "element", config.name.split()[0]))
    return first if first in ("bf16", "fp16", "fp32") else ""
