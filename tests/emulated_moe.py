"""The kernels of the mixture of experts on the emulated machine: the launches of an operation, one after the other."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import ml_dtypes
import numpy as np
from emulate import guarded, run, tensor_map
from numpy.typing import NDArray

from flashmoe_cupy.arrays import view
from flashmoe_cupy.jit.device import H100
from flashmoe_cupy.plan.kernels import KERNELS
from flashmoe_cupy.plan.moe import steps as moe
from flashmoe_cupy.plan.moe.problem import grouped_gemm_problem, moe_problem
from flashmoe_cupy.plan.moe.products import Product, TileCounter
from flashmoe_cupy.plan.moe.routing import permute_problem, route_problem
from flashmoe_cupy.plan.moe.tiles import (
    TILE_8X64,
    TILE_8X64_TWICE,
    TILE_64X64,
    TILE_128X192_PING_PONG,
    GemmConfig,
    GemmSm90Config,
)
from flashmoe_cupy.plan.operation import Workspace
from flashmoe_cupy.plan.step import Step

Array = NDArray[Any]
Steps = Sequence[Step]
_POISON = 0xFF  # every byte of memory that nobody has written: NaN as a float, -1 as an index


class Machine:
    """How operations run: the kernel of products, or one of its configurations, and a seed (see emulate.py)."""

    def __init__(self, product: str = "grouped_gemm_sm90", config: GemmConfig | None = None, seed: int = 0) -> None:
        self.product, self.config, self.seed, self.sms = product, config, seed, 3
        self.used: list[str] = []
        self.headers: dict[str, str] = {}  # in place of the files of these names
        self.counts: list[int] = []  # of each product: how often it counts a row that it has written
        self.left: dict[str, Array] = {}  # the workspace of the last operation

    def fused_moe(self, arrays: dict[str, Any], **options: Any) -> Array:
        """out (T, d)."""
        out = np.empty(arrays["x"].shape, arrays["x"].dtype)
        views: dict[str, Any] = {n: view(x, n) for n, x in arrays.items()}
        first = [views.pop(n) for n in ("x", "w_gate_up", "w_down", "topk_weights", "topk_ids")]
        problem = moe_problem(*first, **views, **options)  # type: ignore[misc]  # mypy does not see what is popped
        steps, work = moe.moe_steps(problem)
        return self._run(steps, work, arrays, {"out": out})["out"]

    def route(self, arrays: dict[str, Any], **options: Any) -> dict[str, Array]:
        """The outputs of `moe_route` by name."""
        bias = arrays.get("e_score_correction_bias")
        problem = route_problem(view(arrays["logits"], "logits"), None if bias is None else view(bias, "b"), **options)
        shape, experts = (problem.tokens, problem.top_k), problem.num_experts
        outputs: dict[str, Array] = {"topk_weights": np.empty(shape, np.float32), "topk_ids": np.empty(shape, np.int32)}
        if problem.return_stats:
            outputs |= {"expert_counts": np.empty(experts, np.int32), "dropped": np.empty(experts, np.int32)}
            outputs |= {n: np.empty((), np.float32) for n in ("load_balancing_loss", "z_loss")}
        steps, work = moe.route_steps(problem)
        given = {"logits": arrays["logits"]} | ({} if bias is None else {"e_score_correction_bias": bias})
        return self._run(steps, work, given, outputs)

    def permute(self, topk_ids: Array, num_experts: int, expert_map: Array | None = None) -> dict[str, Array]:
        """The outputs of `moe_permute` by name."""
        given = {"topk_ids": topk_ids} | ({} if expert_map is None else {"expert_map": expert_map})
        problem = permute_problem(*[view(x, n) for n, x in given.items()], num_experts=num_experts)
        shapes = {"offsets": (num_experts + 1,), "sorted_indices": (topk_ids.size,), "inverse_indices": topk_ids.shape}
        work = Workspace()
        steps = moe.permute_steps(problem, work, own=False)
        return self._run(steps, work, given, {n: np.empty(shape, np.int32) for n, shape in shapes.items()})

    def grouped_gemm(self, arrays: dict[str, Any], out: Array) -> Array:
        """What `out` becomes."""
        views = {n: view(x, n) for n, x in arrays.items()}
        problem = grouped_gemm_problem(
            views["x"], views["w"], offsets=views.get("offsets"), group_sizes=views.get("group_sizes"),
            gather_indices=views.get("gather_indices"), bias=views.get("bias"), out=view(out, "out"),
        )  # fmt: skip
        steps = moe.grouped_gemm_steps(problem)
        return self._run(steps, Workspace(), arrays, {"out": out}, keep=True)["out"]

    def _with_next_weights(
        self, kernel: Any, problem: Any, config: Any, steps: Steps, arrays: dict[str, Array]
    ) -> Any:  # fmt: skip
        """A first product that asks L2 for weights of the second, whichever tile that has."""
        behind = [step.problem for step in steps if step.task == "grouped_gemm" and step.problem is not problem]
        if "sm90" not in kernel.name or not problem.gather or not behind or arrays["w_down"].ctypes.data % 16:
            return problem
        tile = GemmSm90Config(config.element, *(TILE_8X64 if self.seed % 2 else TILE_8X64_TWICE), False, False)
        weights = kernel.next_weights(problem, config, behind[0], tile, self.sms)
        return problem if weights is None else problem._replace(next_weights=weights)

    def _run(
        self, steps: Steps, work: Workspace, given: dict[str, Any], outputs: dict[str, Array], keep: bool = False
    ) -> dict[str, Array]:
        """Outputs as the kernels left them. Every array lies against memory that cannot be accessed."""
        arrays = {n: _beside(x, n, self.seed % 2 == 1) for n, x in given.items()}
        made = {n: _beside(x, n, False) if keep else _poisoned(x, n) for n, x in outputs.items()}
        sizes = [*work.offsets.values(), work.bytes]
        for (name, start), end in zip(work.offsets.items(), sizes[1:], strict=True):
            arrays[name] = guarded(np.full(end - start, _POISON, np.uint8), name)
        addresses = {"": 0} | {n: x.ctypes.data for n, x in (arrays | made).items()}
        counts = 0
        for step in steps:
            product = step.task == "grouped_gemm"
            kernel: Any = KERNELS[self.product if product else step.task]
            pointers = [addresses.get(step.arguments.get(name, ""), 0) for name in kernel.params.pointers]
            arch = "sm_90a" if "sm90" in kernel.name else "sm_80"
            starts = 0
            for pointer in pointers[:3] if product else ():
                starts |= pointer
            problem, aligned = step.problem, step.problem.rows_aligned and not starts & 15
            why = kernel.why_not(problem, arch, aligned)
            assert not why, why
            config = kernel.choose(problem, arch, aligned, H100._replace(multiprocessors=self.sms))
            if product:
                config = self._config(config, problem)
                # The second waits for the rows of the first, whether that would be chosen or not.
                if problem.tile_counter is TileCounter.FIRST:
                    counts = kernel.counts_per_row(problem, config)
                    problem = problem._replace(counts_rows=counts > 0)
                elif problem.tile_counter is TileCounter.SECOND:
                    problem = problem._replace(counts_of_x=counts)
                self.counts.append(kernel.counts_per_row(problem, config))
                problem = self._with_next_weights(kernel, problem, config, steps, arrays)
            params, maps_at = bytearray(kernel.params.size), kernel.params.maps_at
            kernel.params.pack_pointers(params, 0, *pointers)
            values = kernel.values(problem, config, aligned, self.sms) | step.values
            params[8 * len(pointers) : maps_at] = kernel.params.pack(values)
            for i, one in enumerate(kernel.map_arguments(problem, config)):
                params[maps_at + 128 * i : maps_at + 128 * (i + 1)] = tensor_map(one, pointers[i])
            self.used.append(f"{kernel.name} {config.name}")
            run(
                kernel.source(config), bytes(params), kernel.grid(problem, config, self.sms), config.threads,
                config.smem_bytes, self.seed, config.cluster, headers=self.headers if product else {},
            )  # fmt: skip
        self.left = {name: arrays[name] for name in work.offsets}
        return made

    def _config(self, chosen: GemmConfig, product: Product) -> GemmConfig:
        """The configuration that was asked for, where it can run the product."""
        plain_only = self.config is not None and self.config[1:7] in (TILE_128X192_PING_PONG, TILE_64X64)
        if self.config is None or (plain_only and (product.gather or product.gated)):
            return chosen
        wanted = {n: getattr(chosen, n) for n in ("gather", "gated", "clamped") if hasattr(chosen, n)}
        return self.config._replace(**wanted)


def _beside(x: Array, name: str, before: bool) -> Array:
    """A copy against a guard page with the strides that x has."""
    if x.flags.c_contiguous:
        return guarded(x, name, before=before)
    base = x.base if isinstance(x.base, np.ndarray) else x
    copy = guarded(np.ascontiguousarray(base), name, before=before)
    offset = x.ctypes.data - base.ctypes.data
    flat = copy.reshape(-1).view(np.uint8)[offset:]
    return np.lib.stride_tricks.as_strided(flat[: x.itemsize].view(x.dtype)[:1].reshape(()), x.shape, x.strides)


def _poisoned(x: Array, name: str) -> Array:
    copy = guarded(np.zeros(x.shape, x.dtype), name)
    copy.reshape(-1).view(np.uint8)[...] = _POISON
    return copy


def bf16(x: Array) -> Array:
    """x as bfloat16."""
    return x.astype(ml_dtypes.bfloat16)
