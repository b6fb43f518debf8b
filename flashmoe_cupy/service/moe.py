"""A mixture of experts: its sizes, and which kernels and configurations would run each of its launches. No GPU."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from flashmoe_cupy.service.choices import Explanation, absent_arrays, check_sizes, choice
from flashmoe_cupy.service.family import SIZE_DTYPE, Family, Size
from flashmoe_cupy.service.machine import backend, devices, properties
from flashmoe_cupy.service.names import named_dtype, target_archs


def activations() -> tuple[str, ...]:
    """What `activation` may be."""
    from flashmoe_cupy.plan.checks import ACTIVATIONS

    return ACTIVATIONS


SIZES = (
    SIZE_DTYPE,
    Size("tokens", "--tokens", "count", "tokens (default 4096)"),
    Size("hidden", "--hidden", "count", "hidden size (default 2048)"),
    Size("intermediate", "--intermediate", "count", "intermediate size of an expert (default 768)"),
    Size("experts", "--experts", "count", "experts (default 128)"),
    Size("top_k", "--top-k", "count", "experts of a token (default 8)"),
    Size("shared", "--shared", "count", "intermediate size of a shared expert (default 0: none)"),
    Size("activation", "--activation", "word", "(default swiglu)", words=activations),
    Size("interleaved", "--interleaved", "flag", "gate and up rows in turns"),
    Size("swiglu_alpha", "--swiglu-alpha", "number", "of swigluoai (default 1.702)"),
    Size("swiglu_limit", "--swiglu-limit", "number", "clamp of swiglu (default: none) and swigluoai (7)"),
    Size("batch_invariant", "--batch-invariant", "flag", "one configuration for any number of tokens"),
)

_TITLES = {  # of a launch, by the array that a product writes, else by the task
    "activation": "gate and up", "y": "down", "shared_activation": "shared gate and up", "shared": "shared down",
    "moe_router": "route", "moe_permute_count": "count", "moe_permute_place": "permute", "moe_combine": "sum",
}  # fmt: skip


def explain_moe(
    arch: str | Sequence[str] | None = None,
    *,
    tokens: int = 4096,
    hidden: int = 2048,
    intermediate: int = 768,
    experts: int = 128,
    top_k: int = 8,
    dtype: str = "bfloat16",
    activation: str = "swiglu",
    interleaved: bool = False,
    swiglu_alpha: float | None = None,
    swiglu_limit: float | None = None,
    shared: int = 0,
    batch_invariant: bool = False,
) -> Explanation:
    """`explain` for a layer: `moe_route` of float32 logits, then `fused_moe`; the defaults are those of Qwen3-30B-A3B.

    The products depend on how many rows each expert gets, for which their average is taken. shared: intermediate size
    of a shared expert, 0 for none. bytes: weights of no more experts than there are assignments.
    """
    from flashmoe_cupy import dtypes
    from flashmoe_cupy.jit.device import H100
    from flashmoe_cupy.plan.checks import ACTIVATIONS, GATED
    from flashmoe_cupy.plan.moe import steps as moe
    from flashmoe_cupy.plan.moe.problem import moe_problem
    from flashmoe_cupy.plan.moe.routing import route_problem

    check_sizes({"tokens": tokens, "hidden": hidden, "intermediate": intermediate, "experts": experts, "top_k": top_k,
                 "shared": shared}, {})  # fmt: skip
    array, kind = absent_arrays(), named_dtype(dtype)
    rows = 1 if activation in ACTIVATIONS and activation not in GATED else 2
    optional: dict[str, Any] = {}
    if shared:
        optional["shared_w_gate_up"] = array(kind, rows * shared, hidden)
        optional["shared_w_down"] = array(kind, hidden, shared)
    problem = moe_problem(
        array(kind, tokens, hidden), array(kind, experts, rows * intermediate, hidden),
        array(kind, experts, hidden, intermediate), array(dtypes.FP32, tokens, top_k),
        array(dtypes.INT32, tokens, top_k), activation=activation, interleaved=interleaved,
        swiglu_alpha=swiglu_alpha, swiglu_limit=swiglu_limit, batch_invariant=batch_invariant, **optional,
    )  # fmt: skip
    routed = route_problem(array(dtypes.FP32, tokens, experts), None, top_k=top_k, renormalize=True)
    choices = []
    for name in target_archs(arch) if tokens else ():
        device = next((properties(device) for device in devices() if device.arch == name), None)
        for step in (*moe.route_steps(routed)[0], *moe.moe_steps(problem, device or H100)[0]):
            title = _TITLES[step.arguments["out"] if step.task == "grouped_gemm" else step.task]
            choices.append(choice(step.task, step.problem, name, device, title))
    assignments, size = tokens * top_k, kind.itemsize
    one, all_shared = (rows + 1) * intermediate * hidden, (rows + 1) * shared * hidden  # weights
    flops = 2 * (assignments * one + tokens * all_shared)
    moved = size * (min(experts, assignments) * one + (all_shared if tokens else 0) + 2 * tokens * hidden)
    return Explanation(problem.describe(), backend()[1], flops, moved + 8 * assignments, tuple(choices))


MOE = Family("moe", "mixture of experts", SIZES, explain_moe)
