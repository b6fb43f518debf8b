"""The kernels of the mixture of experts on the emulated machine: the launches of an operation, one after the other."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import ml_dtypes
import numpy as np
from emulate import guarded, run, tensor_map
from numpy.typing import NDArray

from flashmoe_cupy.arrays import view
from flashmoe_cupy.plan import moe
from flashmoe_cupy.plan.kernels import PRODUCTS
from flashmoe_cupy.plan.moe_problem import grouped_gemm_problem, moe_problem, permute_problem, route_problem
from flashmoe_cupy.plan.product import GemmConfig, GroupedGemmSm90, Product

Array = NDArray[Any]
Steps = Sequence[moe.Step | moe.ProductStep]
_POISON = 0xFF  # every byte of memory that nobody has written: NaN as a float, -1 as an index


class Machine:
    """How operations run: the kernel of products, or one of its configurations, and a seed (see emulate.py)."""

    def __init__(self, product: str = "grouped_gemm_sm90", config: GemmConfig | None = None, seed: int = 0) -> None:
        self.product, self.config, self.seed, self.sms = product, config, seed, 3
        self.used: list[str] = []
        self.headers: dict[str, str] = {}  # in place of the files of these names
        self.announced: list[int] = []  # of each product
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
        given = {"logits": arrays["logits"]} | ({} if bias is None else {"bias": bias})
        return self._run(steps, work, given, outputs)

    def permute(self, topk_ids: Array, num_experts: int, expert_map: Array | None = None) -> dict[str, Array]:
        """The outputs of `moe_permute` by name."""
        given = {"topk_ids": topk_ids} | ({} if expert_map is None else {"expert_map": expert_map})
        problem = permute_problem(*[view(x, n) for n, x in given.items()], num_experts=num_experts)
        shapes = {"offsets": (num_experts + 1,), "sorted_indices": (topk_ids.size,), "inverse_indices": topk_ids.shape}
        work = moe.Workspace()
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
        return self._run(steps, moe.Workspace(), arrays, {"out": out}, keep=True)["out"]

    def _run(
        self, steps: Steps, work: moe.Workspace, given: dict[str, Any], outputs: dict[str, Array], keep: bool = False
    ) -> dict[str, Array]:
        """Outputs as the kernels left them. Every array lies against memory that cannot be accessed."""
        arrays = {n: _beside(x, n, self.seed % 2 == 1) for n, x in given.items()}
        made = {n: _beside(x, n, False) if keep else _poisoned(x, n) for n, x in outputs.items()}
        sizes = [*work.offsets.values(), work.bytes]
        for (name, start), end in zip(work.offsets.items(), sizes[1:], strict=True):
            arrays[name] = guarded(np.full(end - start, _POISON, np.uint8), name)
        addresses = {"": 0} | {n: x.ctypes.data for n, x in (arrays | made).items()}
        announced = 0
        for step in steps:
            layout = step.kernel.params if isinstance(step, moe.Step) else PRODUCTS[self.product].params
            pointers = [addresses.get(step.arguments.get(name, ""), 0) for name in layout.pointers]
            if isinstance(step, moe.Step):
                kernel, config = step.kernel, step.config
                params = bytearray(layout.size)
                layout.pack_pointers(params, 0, *pointers)
                params[8 * len(pointers) :] = step.pack(True)
                tu, grid, cluster = kernel.source(config), step.grid, 1
                self.used.append(f"{kernel.name} {config.name}")
                run(tu, bytes(params), grid, config.threads, config.smem_bytes, self.seed, cluster)
            else:
                announced = self._multiply(step.product, pointers, announced, "counters" in step.arguments)
        self.left = {name: arrays[name] for name in work.offsets}
        return made

    def _multiply(self, product: Product, pointers: list[int], announced: int, counters: bool) -> int:
        """How often the kernel says that a row is written; announced: how often the one before did."""
        kernel = PRODUCTS[self.product]
        arch = "sm_90a" if "sm90" in self.product else "sm_80"
        aligned = moe.rows_aligned(product) and not (pointers[0] | pointers[1] | pointers[2]) & 15
        why = kernel.why_not(product, arch, aligned)
        assert not why, why
        config = kernel.choose(product, arch, aligned, self.sms)
        plain_only = self.config is not None and self.config[1:7] in (GroupedGemmSm90.plain, GroupedGemmSm90.thin)
        if self.config is not None and not (plain_only and (product.gather or product.gated)):
            wanted = {n: getattr(config, n) for n in ("gather", "gated", "clamped") if hasattr(config, n)}
            config = self.config._replace(**wanted)
        params, maps_at = bytearray(kernel.params.size), kernel.params.maps_at
        kernel.params.pack_pointers(params, 0, *pointers)
        if counters and not product.early:
            announced = kernel.announces(product, config)  # always, whether it would be chosen or not
        values = kernel.values(product, config, aligned, announced if counters else 0, counters)
        params[8 * len(pointers) : maps_at] = kernel.params.pack(values)
        for i, one in enumerate(kernel.map_arguments(product, config)):
            at = maps_at + 128 * i
            params[at : at + 128] = tensor_map(one, pointers[i])
        grid = kernel.grid(product, config, self.sms)
        self.used.append(f"{kernel.name} {config.name}")
        run(
            kernel.source(config), bytes(params), grid, config.threads, config.smem_bytes, self.seed, config.cluster,
            headers=self.headers,
        )  # fmt: skip
        self.announced.append(kernel.announces(product, config))
        return self.announced[-1]


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
