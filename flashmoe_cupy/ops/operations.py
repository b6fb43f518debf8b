"""The operations of mixtures of experts, each declared once: arrays by name, problem, launches, the code for the host.

Here alone stands the order of an operation's arrays. `ops`, `jax_moe.py` and tests find by name what they need.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from flashmoe_cupy.dtypes import FP32, INT32, DType
from flashmoe_cupy.errors import UnsupportedProblem
from flashmoe_cupy.ops import plans
from flashmoe_cupy.plan.kernel import Step
from flashmoe_cupy.plan.moe import problem as moe_problem
from flashmoe_cupy.plan.moe import routing
from flashmoe_cupy.plan.moe import steps as moe
from flashmoe_cupy.plan.moe.problem import GroupedGemmProblem, MoEProblem
from flashmoe_cupy.plan.moe.routing import PermuteProblem, RouteProblem
from flashmoe_cupy.plan.moe.steps import Workspace

Form = tuple[tuple[int, ...], DType]  # shape and dtype of an array
Named = dict[str, Any]  # arrays by name


class Operation(NamedTuple):
    """What the host knows of an operation.

    arguments: its arrays in the order in which launches find their addresses; the first `required` are always there.
    rows: those of its arrays that kernels read or write by 16 bytes if they start at such addresses.
    make: views by name, and options -> the validated problem. results: problem -> the outputs by name, in their order.
    steps: problem -> the launches, and the workspace between them. host(problem, arguments, outputs): the same on NumPy
    arrays; None where an argument is absent. check(problem, fetch): under FLASHMOE_CHECK=1, raises for wrong values;
    fetch(name) is an argument in host memory, or None.
    """

    name: str
    problem: type[Any]
    arguments: tuple[str, ...]
    required: int
    rows: tuple[str, ...]
    make: Callable[..., Any]
    results: Callable[[Any], dict[str, Form]]
    steps: Callable[[Any], tuple[list[Step], Workspace]]
    host: Callable[[Any, Named, Named], None]
    check: Callable[[Any, Callable[[str], Any]], None]

    def places(self, problem: Any) -> dict[str, int]:
        """Where the table of addresses of a call has each argument and output; 0 is no array's."""
        return {name: i for i, name in enumerate((*self.arguments, *self.results(problem)), 1)}


def _check_logits(p: RouteProblem, fetch: Callable[[str], Any]) -> None:  # noqa: ARG001
    plans.check_no_nan(fetch("logits"), fetch("e_score_correction_bias"))


def _check_ids(p: PermuteProblem | MoEProblem, fetch: Callable[[str], Any]) -> None:
    ids = fetch("topk_ids")
    if ids is not None:
        plans.check_ids(ids, p.num_experts, p.num_global)


def _check_nothing(p: Any, fetch: Callable[[str], Any]) -> None:
    """Nothing can be wrong, or the NumPy back end looks by itself."""


def _make_route(logits: Any, e_score_correction_bias: Any = None, **options: Any) -> RouteProblem:
    return routing.route_problem(logits, e_score_correction_bias, **options)


def _route_results(p: RouteProblem) -> dict[str, Form]:
    found: dict[str, Form] = {"topk_weights": ((p.tokens, p.top_k), FP32), "topk_ids": ((p.tokens, p.top_k), INT32)}
    if p.return_stats:
        found |= {"expert_counts": ((p.num_experts,), INT32), "dropped": ((p.num_experts,), INT32)}
        found |= {"load_balancing_loss": ((), FP32), "z_loss": ((), FP32)}
    return found


def _route_host(p: RouteProblem, given: Named, made: Named) -> None:
    from flashmoe_cupy.cpu import moe as cpu

    logits, bias, (weights, ids, *stats) = given["logits"], given["e_score_correction_bias"], made.values()
    for target, value in zip(stats, cpu.route(p, logits, bias, weights, ids) or (), strict=True):
        target[...] = value


def _make_permute(topk_ids: Any, expert_map: Any = None, **options: Any) -> PermuteProblem:
    return routing.permute_problem(topk_ids, expert_map, **options)


def _permute_results(p: PermuteProblem) -> dict[str, Form]:
    shapes = {
        "offsets": (p.num_experts + 1,), "sorted_indices": (p.tokens * p.top_k,),
        "inverse_indices": (p.tokens, p.top_k),
    }  # fmt: skip
    return {name: (shape, INT32) for name, shape in shapes.items()}


def _permute_steps(p: PermuteProblem) -> tuple[list[Step], Workspace]:
    work = Workspace()
    return moe.permute_steps(p, work, own=False), work


def _permute_host(p: PermuteProblem, given: Named, made: Named) -> None:
    from flashmoe_cupy.cpu import moe as cpu

    found = cpu.permute(given["topk_ids"], p.num_experts, given["expert_map"])
    for target, value in zip(made.values(), found, strict=True):
        target[...] = value


def _grouped_gemm_results(p: GroupedGemmProblem) -> dict[str, Form]:
    return {"out": ((p.num_experts, p.rows, p.n) if p.masked else (p.rows, p.n), p.dtype)}


def _grouped_gemm_steps(p: GroupedGemmProblem) -> tuple[list[Step], Workspace]:
    if why := moe.rows_apart(p):
        raise UnsupportedProblem(p.describe(), why, "contiguous x and out")
    return moe.grouped_gemm_steps(p), Workspace()


def _grouped_gemm_host(p: GroupedGemmProblem, given: Named, made: Named) -> None:
    from flashmoe_cupy.cpu import moe as cpu

    rest = dict(given)
    made["out"][...] = 0
    cpu.grouped_gemm(p, rest.pop("x"), rest.pop("w"), made["out"], **rest)


def _fused_moe_host(p: MoEProblem, given: Named, made: Named) -> None:
    from flashmoe_cupy.cpu import moe as cpu

    cpu.fused_moe(p, out=made["out"], **given)


ROUTE = Operation(
    "moe_route", RouteProblem, ("logits", "e_score_correction_bias"), 1, (),
    _make_route, _route_results, moe.route_steps, _route_host, _check_logits,
)  # fmt: skip
PERMUTE = Operation(
    "moe_permute", PermuteProblem, ("topk_ids", "expert_map"), 1, (),
    _make_permute, _permute_results, _permute_steps, _permute_host, _check_ids,
)  # fmt: skip
GROUPED_GEMM = Operation(
    "grouped_gemm", GroupedGemmProblem, ("x", "w", "offsets", "group_sizes", "gather_indices", "bias"), 2,
    ("x", "w", "out"),
    moe_problem.grouped_gemm_problem, _grouped_gemm_results, _grouped_gemm_steps, _grouped_gemm_host, _check_nothing,
)  # fmt: skip
FUSED_MOE = Operation(
    "fused_moe", MoEProblem,
    ("x", "w_gate_up", "w_down", "topk_weights", "topk_ids", "b_gate_up", "b_down", "expert_map",
     "shared_w_gate_up", "shared_w_down", "shared_gate"), 5,
    ("x", "w_gate_up", "w_down", "shared_w_gate_up", "shared_w_down", "out"),
    moe_problem.moe_problem, lambda p: {"out": ((p.tokens, p.hidden), p.dtype)}, moe.moe_steps, _fused_moe_host,
    _check_ids,
)  # fmt: skip
OPERATIONS = {operation.name: operation for operation in (ROUTE, PERMUTE, GROUPED_GEMM, FUSED_MOE)}
