"""Small launches of every configuration of the mixture of experts, for compute-sanitizer:

    compute-sanitizer --tool memcheck python tests/sanitize_moe.py      (and racecheck, initcheck, synccheck)

As in sanitize.py: only CuPy arrays, each in an allocation of its own, and odd sizes; `once` as an argument leaves out
cases that use no new configuration (racecheck is slow). The last line counts launches and configurations; the exit code
is 1 when a result is not finite or a configuration was left out. What the cases choose is planned without a GPU, and
test_moe_checks.py sees that they choose everything.
"""

from __future__ import annotations

import itertools
import sys
from typing import Any

import numpy as np
from moe_plans import (
    Case,
    ProductCase,
    arch_here,
    compile_everything,
    configurations,
    every_configuration,
    memories,
    planned_for,
    product_problems,
    takes,
)

import flashmoe_cupy
from flashmoe_cupy.jit.device import DeviceProperties
from flashmoe_cupy.plan.kernels import of_task, only
from flashmoe_cupy.testing_moe import MoECase, RouteCase

Arrays = dict[str, Any]
DTYPES = ("bfloat16", "float16", "float32")
FEATURES: tuple[dict[str, Any], ...] = (
    {"activation": "swiglu", "biases": "same", "sentinels": 0.2},
    {"activation": "geglu", "interleaved": True, "shared": 40, "shared_gate": "same"},
    {"activation": "swigluoai", "interleaved": True, "biases": "float32", "routing": "zipf", "global_experts": 9},
    {"activation": "gelu", "shared": 24, "weight_on_input": True, "weights_dtype": "same"},
    {"activation": "relu2", "batch_invariant": True, "ids_dtype": "int64", "routing": "one"},
    {"swiglu_limit": 0.5, "shared": 24},
)


def cases() -> list[Case]:
    """Few, some and many rows of an expert, and many tiles of few rows; few experts with many rows."""
    found: list[Case] = []
    for dtype, tokens, features in itertools.product(DTYPES, (2, 5, 20, 77, 120, 150, 480), FEATURES):
        found.append(MoECase(tokens, 72, 136, 3, 2, dtype, **features))
    for dtype, activation in itertools.product(DTYPES[:2], ("geglu_tanh", "relu")):
        found.append(MoECase(300, 16, 24, 290, 1, dtype, activation))
        found.append(MoECase(1300, 24, 40, 3, 1, dtype, activation))
        found += [MoECase(tokens, 72, 136, 60, 3, dtype, activation) for tokens in (5, 40)]  # less than two rows
        found.append(MoECase(37, 8, 8, 2, 1, dtype, activation, shared=34000))
    sizes = ((130, 0, 77), (5, 1, 0, 3), (1,) * 290, (250, 0, 201))
    for dtype, rows, (x_rows, max_rows) in itertools.product(DTYPES, sizes, ((0, 0), (60, 0), (0, 1))):
        case = ProductCase(rows, 40, 72, dtype, "float32", x_rows, max_rows=max_rows * (max(rows) + 3))
        found.append(case if max_rows else case._replace(head=2, tail=7))
    found += [ProductCase((250, 201), 72, 1032, dtype) for dtype in DTYPES]  # many steps along k
    for i, e in enumerate((7, 33, 100, 256, 300, 1000)):
        some: dict[str, Any] = {"bias": "float32", "scoring_func": "sigmoid", "renormalize": True} if e < 256 else {}
        found.append(RouteCase(67, e, 5, DTYPES[i % 3], **some))
    found.append(RouteCase(131, 96, 6, capacity_factor=0.8, num_expert_group=4, topk_group=2))
    found += [(1, 1, 1), (33, 3, 7), (700, 8, 600), (5000, 2, 5000), (9000, 1, 3)]
    return found


def arrays_of(case: Case, rng: np.random.Generator) -> Arrays:
    """Arguments in host memory."""
    if isinstance(case, (MoECase, RouteCase)):
        return case.random()
    if not isinstance(case, ProductCase):
        return {"topk_ids": rng.integers(-1, case[2] + 1, case[:2]).astype(np.int32)}
    made = ProductCase(**case._asdict())
    numbers = (rng.standard_normal(shape, np.float32).astype(dtype) for _, shape, dtype in made.shapes())
    t = {name: a for (name, _, _), a in zip(made.shapes(), numbers, strict=True)}
    if case.max_rows:
        t["group_sizes"] = np.array(case.sizes, np.int32)
    else:
        t["offsets"] = (case.head + np.cumsum([0, *case.sizes])).astype(np.int32)
    if case.x_rows and not case.max_rows:
        t["gather_indices"] = rng.integers(-1, case.x_rows + 1, case.rows).astype(np.int32)
    return t


def call(case: Case, t: Arrays) -> list[Any]:
    """The operation, and what it gives."""
    if isinstance(case, MoECase):
        return [flashmoe_cupy.fused_moe(**t, **case.options())]
    if isinstance(case, ProductCase):
        return [flashmoe_cupy.grouped_gemm(**t)]
    if isinstance(case, RouteCase):
        first = flashmoe_cupy.moe_route(**t, **case.options())
        weights, ids, stats = flashmoe_cupy.moe_route(**t, **case.options(), return_stats=True)
        return [*first, weights, ids, *stats]
    return list(flashmoe_cupy.moe_permute(**t, num_experts=case[2]))


def main() -> int:
    import cupy
    from sanitize import finite, on_device, unaligned

    cupy.cuda.set_allocator(None)  # no pool: the sanitizer knows where each array ends
    compile_everything()
    arch, rng = arch_here(), np.random.default_rng(0)
    wrong: list[str] = []
    once = "once" in sys.argv
    used: set[tuple[str, str]] = set()
    launches = 0

    def run(case: Case, t: Arrays, aligned: bool, device: DeviceProperties) -> None:
        """One call on each kernel that takes the problem, as it is planned for a device."""
        nonlocal launches
        if once and configurations(case, arch, aligned, device) <= used:
            return
        problems = product_problems(case)
        for kernel in of_task("grouped_gemm").values():
            if takes(kernel, problems, arch, aligned):
                with planned_for(device), only(kernel.name):
                    good = all(map(finite, call(case, t)))
                launches += 1
                wrong.extend([] if good else [f"{kernel.name} {case}: the result is not finite"])
        used.update(configurations(case, arch, aligned, device))

    for case, memory in itertools.product(cases(), memories()):
        t = {n: on_device(a) for n, a in arrays_of(case, rng).items()}
        run(case, t, True, memory)
        if isinstance(case, (MoECase, ProductCase)):
            rows = [n for n in t if n in ("x", "w", "w_gate_up", "w_down", "topk_weights", "topk_ids")]
            run(case, t | unaligned({n: t[n] for n in rows}), False, memory)
    every = every_configuration(arch)
    wrong += [f"not launched: {' '.join(name)}" for name in sorted(every - used)]
    sys.stdout.write("".join(f"{line}\n" for line in wrong))
    sys.stdout.write(f"{launches} calls, {len(used)} of {len(every)} configurations, {len(wrong)} wrong\n")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
