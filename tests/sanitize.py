"""Small launches of every kernel configuration, for compute-sanitizer:

    compute-sanitizer --tool memcheck python tests/sanitize.py      (and racecheck, initcheck, synccheck)

Only CuPy arrays, each in an allocation of its own, so that one element too far is seen; odd sizes, so that every edge
is walked. `once` as an argument leaves out launches of no new configuration (racecheck is slow). The last line counts
launches and configurations; the exit code is 1 when a result is not finite or a configuration was left out. Numbers are
judged by the pytest suite, not here.
"""

from __future__ import annotations

import itertools
import sys
from typing import Any

import cupy
import numpy as np

import flashmoe_cupy
from flashmoe_cupy.arrays import view
from flashmoe_cupy.plan.archs import arch_for
from flashmoe_cupy.plan.attention.problem import attention_problem, varlen_problem
from flashmoe_cupy.plan.kernels import of_task, only
from flashmoe_cupy.testing import AttentionCase, VarlenCase

DIMS = ((64, 64), (40, 40), (96, 96), (128, 128), (192, 128), (192, 192), (256, 256), (64, 256), (64, 512), (8, 24))
FEATURES: tuple[dict[str, Any], ...] = (
    {},
    {"causal": True, "sinks": "float32"},
    {"causal": True, "softcap": 15.0},
    {"causal": True, "softcap": 90.0},
    {"window_size": (70, 3), "softcap": 15.0, "alibi": "bh", "sinks": "same"},
    {"bias": "bhqk", "bias_dtype": "float32", "causal": True},
    {"bias": "b1q1", "bias_dtype": "bool", "window_size": (20, 20), "alibi": "h"},
    {"bias": "b1qk", "bias_dtype": "bool"},
    {"bias": "b11k", "alibi": "bh"},
    {"bias": "b11k"},
    {"bias": "b11k", "bias_dtype": "float32"},
)
SEVERAL_TILES = (*FEATURES[:5], *FEATURES[-2:])  # with which the lengths choose among tiles


def cases() -> list[AttentionCase | VarlenCase]:
    """Two tiles of queries and of keys and a bit more, for each dtype, head dimension and mixture of features."""
    found: list[AttentionCase | VarlenCase] = []
    for dtype, (d, dv), features in itertools.product(("bfloat16", "float16", "float32"), DIMS, FEATURES):
        found.append(AttentionCase(133, 147, 1, 2, 1, d, dv, dtype, **features))
    packed = VarlenCase((3, 0, 70), (9, 4, 131), (2, 0, 70), (9, 0, 130), tail_q=2, heads_q=2, heads_k=1)
    for dtype, d in itertools.product(("bfloat16", "float32"), (64, 128)):
        found.append(packed._replace(head_dim=d, dtype=dtype, causal=True))
        found.append(packed._replace(head_dim=d, dtype=dtype, softcap=9.0, alibi="bh"))
    padded = AttentionCase(133, 147, 3, 2, 1, left_q=(0, 130, 5), used_q=(133, 131, 9), left_k=(20, 0, 7), causal=True)
    for dtype, d in itertools.product(("bfloat16", "float32"), (64, 128)):
        found.append(padded._replace(head_dim=d, dtype=dtype))
        found.append(padded._replace(head_dim=d, dtype=dtype, bias="b1qk", used_k=(147, 90, 7)))
    sizes = ((1, 1), (1, 300), (300, 1), (5, 0))
    for dtype, d in itertools.product(("bfloat16", "float16"), (64, 128)):  # tiles that only long sequences get
        for features in SEVERAL_TILES:  # under a window that hides nothing much, few tiles are no reason for small ones
            for rows in (250, 1100):
                wide = features | {"causal": False, "window_size": (rows, -1)}
                found.append(AttentionCase(rows, 147, 1, 2, 1, d, d, dtype, **wide))
        for rows, alibi in itertools.product((70, 250, 1100), ("", "h")):
            masked = AttentionCase(rows, 147, 1, 2, 1, d, d, dtype, bias="b1qk", bias_dtype="bool", alibi=alibi)
            found.append(masked._replace(window_size=(rows, -1)))
    for dtype, d, features in itertools.product(("bfloat16", "float16"), (64, 96, 128), SEVERAL_TILES):
        found += [AttentionCase(rows, 4200, 1, 2, 1, d, d, dtype, **features) for rows in (70, 190)]
        found.append(AttentionCase(250, 147, 1, 2, 1, d, d, dtype, **features))
        found.append(AttentionCase(70, 8400, 1, 1, 1, d, d, dtype, **features))
    return [*found, *(AttentionCase(*s, 1, 2, 1, 64, causal=causal) for s in sizes for causal in (False, True))]


def on_device(a: np.ndarray[Any, Any]) -> Any:
    """A copy on the GPU; a NaN that marks an unused row stays one."""
    return cupy.asarray(a)


def finite(a: Any) -> bool:
    host = np.asarray(a.get(), dtype=np.float64)
    return bool(np.isfinite(host).all())


def unaligned(arrays: dict[str, Any]) -> dict[str, Any]:
    """q, k and v as views that start at an odd element and have odd rows."""
    moved = {}
    for name, a in arrays.items():
        memory = cupy.zeros((*a.shape[:-1], a.shape[-1] + 1), a.dtype)
        cupy.cuda.runtime.memcpy2D(
            memory.data.ptr + a.itemsize, memory.strides[-2], a.data.ptr, a.strides[-2], a.shape[-1] * a.itemsize,
            a.size // a.shape[-1], cupy.cuda.runtime.memcpyDeviceToDevice,
        )  # fmt: skip
        moved[name] = memory[..., 1:]
    return moved


def main() -> int:
    cupy.cuda.set_allocator(None)  # no pool: the sanitizer knows where each array ends
    flashmoe_cupy.warmup()  # on all cores: one by one the compiles would take longer than all launches
    digits = str(cupy.cuda.Device().compute_capability)
    arch = arch_for((int(digits[:-1]), int(digits[-1])))
    wrong: list[str] = []
    used: set[tuple[str, str]] = set()
    launches = 0

    def run(case: AttentionCase | VarlenCase, arrays: dict[str, Any], aligned: bool) -> None:
        """One launch of each kernel that takes the problem."""
        nonlocal launches
        packed = isinstance(case, VarlenCase)
        problem = (varlen_problem if packed else attention_problem)(
            **{n: view(a, n) for n, a in arrays.items()}, **case.options()
        )
        call = flashmoe_cupy.flash_attention_varlen if packed else flashmoe_cupy.flash_attention
        for kernel in of_task("attention_fwd").values():
            if kernel.why_not(problem, arch, aligned):
                continue
            name = (kernel.name, kernel.choose(problem, arch, aligned).name)
            if "once" in sys.argv and name in used:
                continue
            with only(kernel.name):
                out = call(**arrays, **case.options(), return_lse=True)[0]
            used.add(name)
            launches += 1
            if not finite(out):
                wrong.append(f"{kernel.name} {case}: the result is not finite")

    for case in cases():
        arrays = {n: on_device(a) for n, a in case.random().items()}
        run(case, arrays, True)
        if isinstance(case, AttentionCase) and case.causal and not case.bias:
            run(case, arrays | unaligned({n: arrays[n] for n in "qkv"}), False)
    kernels = of_task("attention_fwd")
    every = {(name, config.name) for name, kernel in kernels.items() for config in kernel.configs(arch)}
    wrong += [f"not launched: {' '.join(name)}" for name in sorted(every - used)]
    sys.stdout.write("".join(f"{line}\n" for line in wrong))
    sys.stdout.write(f"{launches} launches, {len(used)} of {len(every)} configurations, {len(wrong)} wrong\n")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
