"""Small launches of every configuration of attention's backward, for compute-sanitizer:

    compute-sanitizer --tool memcheck python tests/sanitize_backward.py      (and racecheck, initcheck, synccheck)

As sanitize.py does for the forward: CuPy arrays in allocations of their own, odd sizes, and an exit code of 1 when a
gradient is not finite or a configuration was left out. `once` leaves out calls that launch no new configuration.
"""

from __future__ import annotations

import itertools
import sys
from typing import Any

import cupy
import numpy as np
from compile_kit import compile_all
from sanitize import DIMS, finite, unaligned

import flashmoe_cupy
from flashmoe_cupy.arrays import view
from flashmoe_cupy.jit.device import H100
from flashmoe_cupy.plan.archs import arch_for
from flashmoe_cupy.plan.attention.backward import backward_steps
from flashmoe_cupy.plan.attention.gradient import backward_problem, varlen_backward_problem
from flashmoe_cupy.plan.kernels import KERNELS, of_task, only, prepared
from flashmoe_cupy.testing import AttentionCase, Case, VarlenCase

NEEDS = ("q k v", "q", "k", "v", "k v")
FEATURES: tuple[dict[str, Any], ...] = (
    {"causal": True, "sinks": "float32"},
    {"window_size": (70, 3), "softcap": 15.0, "alibi": "bh"},
    {"bias": "1hqk", "causal": True},
)


def cases() -> list[Case]:
    """Two tiles of queries and of keys and a bit more, for each dtype, head dimension and mixture of features."""
    found: list[Case] = []
    for dtype, (d, dv), features in itertools.product(("bfloat16", "float16", "float32"), DIMS, FEATURES):
        found.append(AttentionCase(69, 83, 1, 2, 1, d, dv, dtype, **features))
    for dtype in ("bfloat16", "float32"):
        found.append(VarlenCase((3, 0, 70), (9, 4, 91), (2, 0, 70), (9, 0, 90), tail_q=2, dtype=dtype, causal=True))
        padded = AttentionCase(69, 83, 3, 2, 1, left_q=(0, 60, 5), used_q=(69, 65, 9), left_k=(20, 0, 7), dtype=dtype)
        found += [padded, padded._replace(bias="b1qk"), padded._replace(bias="11")]
    return found


def arguments(case: Case, need: str, odd: bool) -> dict[str, Any]:
    """Of a call, with what a forward gives on the host. odd: rows of q, k and v start at odd elements."""
    arrays = case.random()
    packed = isinstance(case, VarlenCase)
    forward: Any = flashmoe_cupy.flash_attention_varlen if packed else flashmoe_cupy.flash_attention
    out, lse = forward(**arrays, **case.options(), return_lse=True)
    arrays |= {"out": out, "lse": lse, "dout": out, "dlse": np.ones_like(lse)}
    more = " sinks" * bool(case.sinks) + " bias" * ("bias" in arrays)
    given = {name: cupy.asarray(x) for name, x in arrays.items()}
    if odd:
        given |= unaligned({name: given[name] for name in "qkv"})
    return {**given, **case.options(), "need": need + (more if need == NEEDS[0] else "")}


def launched(case: Case, given: dict[str, Any], arch: str, aligned: bool) -> set[tuple[str, str]] | None:
    """(kernel, configuration) of each launch of a call; None where the kernels do not take it."""
    make: Any = varlen_backward_problem if isinstance(case, VarlenCase) else backward_problem
    views = {name: view(x, name) if isinstance(x, cupy.ndarray) else x for name, x in given.items()}
    steps = backward_steps(make(**views, deterministic=False))[0]
    for step in steps:
        (kernel,) = of_task(step.task).values()
        if kernel.why_not(step.problem, arch, aligned):
            return None
    found = set()
    for step in prepared(steps, arch, aligned, H100, ())[0]:
        (kernel,) = of_task(step.task).values()
        found.add((kernel.name, kernel.choose(step.problem, arch, aligned).name))
    return found


def main() -> int:
    cupy.cuda.set_allocator(None)  # no pool: the sanitizer knows where each array ends
    digits = str(cupy.cuda.Device().compute_capability)
    arch = arch_for((int(digits[:-1]), int(digits[-1])))
    kernels = {name: kernel for name, kernel in KERNELS.items() if name.startswith("attention_bwd")}
    compile_all(kernels.values(), arch)  # on all cores: one by one the compiles would take longer than all launches
    wrong: list[str] = []
    used: set[tuple[str, str]] = set()
    calls = 0
    names = [name for name, kernel in kernels.items() if kernel.task == "attention_bwd"]
    for case, need, odd, name in itertools.product(cases(), NEEDS, (False, True), names):
        if odd and case.sinks == "":
            continue
        given = arguments(case, need, odd)
        call: Any = flashmoe_cupy.flash_attention_backward
        if isinstance(case, VarlenCase):
            call = flashmoe_cupy.flash_attention_varlen_backward
        with only(name):
            new = launched(case, given, arch, not odd)
            if new is None or ("once" in sys.argv and not new - used):
                continue
            made = call(**given)
        used |= new
        calls += 1
        if not all(finite(x) for x in made if x is not None):
            wrong.append(f"{case} need={given['need']!r}: a gradient is not finite")
    every = {(name, config.name) for name, kernel in kernels.items() for config in kernel.configs(arch)}
    wrong += [f"not launched: {' '.join(name)}" for name in sorted(every - used)]
    sys.stdout.write("".join(f"{line}\n" for line in wrong))
    sys.stdout.write(f"{calls} calls, {len(used)} of {len(every)} configurations, {len(wrong)} wrong\n")
    return 1 if wrong else 0


if __name__ == "__main__":
    np.seterr(all="ignore")
    sys.exit(main())
