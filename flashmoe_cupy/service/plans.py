"""Which kernels and configurations there are, and which would run a problem. Needs no GPU and no CuPy."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import product
from typing import Any

from flashmoe_cupy.service.choices import Explanation
from flashmoe_cupy.service.families import DEFAULT_OP, FAMILIES, all_filters, family_of, given, misfit
from flashmoe_cupy.service.names import target_archs


def explain(op: str = DEFAULT_OP, *, arch: str | Sequence[str] | None = None, **sizes: Any) -> Explanation:
    """Say which kernels and configurations would run a problem, per arch, and why not the others. Needs no GPU.

    arch: one or several of plan.archs.ARCHS; None = FLASHMOE_ARCH, else those of the devices here, else all.
    sizes: of the problem, by name; those not given have the defaults that `explain_attention` and `explain_moe` say.
    "attention": batch, seqlen_q, seqlen_k, heads_q, heads_k, head_dim, head_dim_v, dtype, causal, window_size,
        softmax_scale, softcap, alibi, bias, sinks, varlen. "attention_backward" has the same.
    "moe": tokens, hidden, intermediate, experts, top_k, dtype, activation, interleaved, swiglu_alpha, swiglu_limit,
        shared, batch_invariant.
    Raises UnsupportedProblem, with the same reasons as the call itself, ValueError for an unknown op or arch, and
    TypeError for a size that the op does not have.
    """
    return family_of(op).explain(arch, **sizes)


def kernels(arch: str | None = None, *, op: str | None = None, **filters: Any) -> dict[str, dict[str, Any]]:
    """Per kernel its summary, header and configurations, each with the archs that have it.

    arch, op, filters: only these; filters are those of `specialisations`. op None: of every op that has the filters
    given, so a head_dim means attention. Raises as `specialisations` does, and ValueError for an unknown arch.
    """
    from flashmoe_cupy.plan.archs import ARCHS

    wanted = given(filters)
    if op is None:
        ops = [name for name, family in FAMILIES.items() if set(wanted) <= {each.name for each in family.filters}]
        if not ops:
            raise ValueError(f"no op has {' and '.join(wanted)}")
    else:
        ops = [family_of(op).name]
    names = ARCHS if arch is None else target_archs(arch)
    table: dict[str, dict[str, Any]] = {
        kernel.name: {"summary": kernel.summary, "header": kernel.header, "configs": []}
        for each in ops
        for kernel in registry(each).values()
    }
    rows: dict[tuple[str, Any], dict[str, Any]] = {}
    for name, each in product(names, ops):
        for kernel, config in specialisations(name, op=each, **wanted):
            if (kernel.name, config) not in rows:
                row = {"name": config.name, "archs": [], "threads": config.threads, "smem_bytes": config.smem_bytes}
                table[kernel.name]["configs"].append(rows.setdefault((kernel.name, config), row))
            rows[kernel.name, config]["archs"].append(name)
    return table


def registry(op: str) -> dict[str, Any]:
    """The kernels of an op by name; of those for one task, the first that takes a problem runs it."""
    from flashmoe_cupy.plan import kernels

    return dict(kernels.of_op(op))


def specialisations(arch: str, *, op: str = DEFAULT_OP, **filters: Any) -> Iterator[tuple[Any, Any]]:
    """(kernel, config) of every specialisation that a call on `arch` can ask for, or of those that match.

    op: "attention", "attention_backward", or "moe" for all operations of mixture of experts.
    filters: only what calls with these can ask for, whatever their masks and features; None = not given. "attention"
    and "attention_backward" have dtype, head_dim and head_dim_v (not given: as head_dim), "moe" has dtype. The sets are
    finite: no length, stride, batch or head count is part of a specialisation.
    Raises UnsupportedProblem for head dimensions that nothing runs, ValueError for an unknown op, for a filter that the
    op lacks, for head_dim_v without head_dim and for a dtype that nothing computes with, TypeError for a filter that
    no op has.
    """
    family, wanted = family_of(op), given(filters)
    if why := misfit(family, wanted, {name: name for name in all_filters()}, op):
        raise ValueError(why)
    yield from family.matching(arch, registry(op).values(), **wanted)
