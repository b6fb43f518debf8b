"""How the operations of the mixture of experts are made of launches. No GPU, no CuPy."""

from __future__ import annotations

from flashmoe_cupy.dtypes import FP32, INT32, DType
from flashmoe_cupy.plan.kernel import Step, Values, same
from flashmoe_cupy.plan.moe.problem import GroupedGemmProblem, MoEProblem
from flashmoe_cupy.plan.moe.products import Product
from flashmoe_cupy.plan.moe.routing import PermuteProblem, RouteProblem
from flashmoe_cupy.plan.moe.small import (
    CAPACITY,
    CLEAR,
    COMBINE,
    PER_LANE,
    PERMUTE_COUNT,
    PERMUTE_PLACE,
    ROUTER,
    ROUTER_STATS,
    SmallProblem,
)

_WARPS_ROUTER = 4
_WARPS_PERMUTE = 16
_ONE_BLOCK = 4096  # assignments that one block of the permutation places
FEW = 32  # assignments, one for each lane of a warp, whose order the products find by themselves
_BLOCKS_PERMUTE = 256  # at most, of the permutation
_ROWS_OF_STATS = 512  # warps of a router that keeps statistics, at most
_SCORING = ("softmax", "sigmoid", "sqrtsoftplus")


class Workspace:
    """Arrays that live as long as a call, one behind the other in one allocation."""

    def __init__(self) -> None:
        self.offsets: dict[str, int] = {}
        self.bytes = 0

    def add(self, name: str, size: int) -> None:
        """Room for `size` bytes at a multiple of 256."""
        self.offsets[name] = self.bytes
        self.bytes += -(-size // 256) * 256


def route_steps(p: RouteProblem) -> tuple[list[Step], Workspace]:
    """The launches of `moe_route`; arrays: logits, bias, the outputs by their names, and those of the workspace."""
    work = Workspace()
    stats = p.return_stats
    tokens_per_block = _WARPS_ROUTER
    if stats:
        tokens_per_block = max(tokens_per_block, -(-p.tokens // (_ROWS_OF_STATS // _WARPS_ROUTER)))
    blocks = -(-p.tokens // tokens_per_block)
    rows = blocks * _WARPS_ROUTER
    if stats:
        work.add("partial_probabilities", 4 * rows * p.num_experts)
        work.add("partial_counts", 4 * rows * p.num_experts)
        work.add("partial_z", 4 * rows)
    size = next(i for i, n in enumerate(PER_LANE) if 32 * n >= p.num_experts)
    config = ROUTER.all_configs[size + (len(PER_LANE) if stats else 0)]
    values: Values = {
        "logits_stride": p.logits_stride,
        "tokens": p.tokens,
        "experts": p.num_experts,
        "top_k": p.top_k,
        "tokens_per_block": tokens_per_block,
        "logits_dtype": p.dtype.code,
        "bias_dtype": _code(p.bias_dtype),
        "scoring_func": _SCORING.index(p.scoring_func),
        "renormalize": int(p.renormalize),
        "groups": p.num_expert_group,
        "topk_groups": p.topk_group,
        "scale": p.routed_scaling_factor,
    }
    partial = same("partial_probabilities", "partial_counts", "partial_z") if stats else {}
    chosen = same("topk_weights", "topk_ids")
    read = {"logits": "logits", "bias": "e_score_correction_bias"}
    steps = [ROUTER.step(config, blocks, read | chosen | partial, values)]
    limited = 0 <= p.capacity < p.tokens
    if stats:
        results = same("expert_counts", "dropped", "load_balancing_loss", "z_loss")
        values = {"tokens": p.tokens, "experts": p.num_experts, "rows": rows}
        values["capacity"] = p.capacity if limited else 2**31 - 1
        steps.append(ROUTER_STATS.step(ROUTER_STATS.all_configs[0], 1, partial | results, values))
    if limited:
        steps += permute_steps(PermuteProblem(INT32, p.tokens, p.top_k, p.top_k, p.num_experts, -1), work)
        assignments = p.tokens * p.top_k
        arguments = same("offsets", "inverse_indices") | chosen
        values = {"assignments": assignments, "capacity": p.capacity}
        steps.append(CAPACITY.step(CAPACITY.all_configs[0], -(-assignments // 256), arguments, values))
    return steps, work


def permute_steps(p: PermuteProblem, work: Workspace, own: bool = True, counters: bool = False) -> list[Step]:
    """The launches of `moe_permute`. own: the three results lie in the workspace. counters: those become 0."""
    assignments = p.tokens * p.top_k
    if own:
        work.add("offsets", 4 * (p.num_experts + 1))
        work.add("sorted_indices", 4 * assignments)
        work.add("inverse_indices", 4 * assignments)
    blocks = 1 if assignments <= _ONE_BLOCK else min(-(-assignments // 2048), _BLOCKS_PERMUTE)
    per_warp = -(-assignments // (blocks * _WARPS_PERMUTE * 32)) * 32
    blocks = -(-assignments // (per_warp * _WARPS_PERMUTE))
    if blocks > 1:
        work.add("counts", 4 * blocks * p.num_experts)
    values: Values = {
        "ids_stride": p.ids_stride,
        "assignments": assignments,
        "top_k": p.top_k,
        "experts": p.num_experts,
        "ids": p.ids,
        "per_warp": per_warp,
        "ids_wide": int(p.ids_dtype.itemsize == 8),
    }
    arguments = same("topk_ids", "offsets", "sorted_indices", "inverse_indices")
    arguments |= same(*["expert_map"] * (p.num_global >= 0), *["counts"] * (blocks > 1), *["counters"] * counters)
    steps = [PERMUTE_PLACE.step(PERMUTE_PLACE.all_configs[0], blocks, arguments, values)]
    if blocks > 1:
        steps.insert(0, PERMUTE_COUNT.step(PERMUTE_COUNT.all_configs[0], blocks, arguments, values))
    return steps


def grouped_gemm_steps(p: GroupedGemmProblem) -> list[Step]:
    """The launches of `grouped_gemm`. Groups of a masked problem lie whole rows apart: see `rows_apart`."""
    steps: list[Step] = [_grouped_gemm_step(p)]
    if p.new_out:
        rows = p.rows * (p.num_experts if p.masked else 1)
        chunks = p.n * p.dtype.itemsize // 16
        values: Values = {"row_chunks": chunks, "groups": p.num_experts, "rows": rows, "max_rows": p.rows}
        grid = min(-(-rows * chunks // 256), 264)  # two blocks for each of an H100's multiprocessors
        arguments = same("out", "offsets", "group_sizes")
        steps.insert(0, CLEAR.step(CLEAR.all_configs[0], grid, arguments, values))
    return steps


def _grouped_gemm_step(p: GroupedGemmProblem) -> Step:
    x_row, out_row, x_group, out_group, rows, rows_x = p.x_strides[1], p.out_strides[1], 0, 0, p.rows, p.x_rows
    expected = p.rows / max(p.num_experts, 1)
    if p.masked:
        (x_row, x_group), (out_row, out_group) = _rows(p, p.x_strides), _rows(p, p.out_strides)
        rows, rows_x = (max(p.num_experts - 1, 0) * group + p.rows for group in (out_group, x_group))
        expected = float(p.rows)
    product = Product(
        p.dtype, p.num_experts, rows, rows_x, p.rows if p.masked else 0, p.d, p.n, "", False, p.gather, 1, x_row,
        p.w_strides, 0, out_row, p.bias_dtype, (p.bias_stride, 1, 0), None, 0, 0.0, 0.0, out_group, x_group - out_group,
        expected, False,
    )  # fmt: skip
    return Step("grouped_gemm", product, same("x", "w", "out", "bias", "offsets", "group_sizes", "gather_indices"))


def _rows(p: GroupedGemmProblem, strides: tuple[int, int]) -> tuple[int, int]:
    """(elements from row to row, rows from expert to expert) of a masked array."""
    group, row = strides
    if p.num_experts == 1:
        return row, p.rows
    return (group, 1) if p.rows == 1 else (row, group // row if row else 0)


def rows_apart(p: GroupedGemmProblem) -> list[str]:
    """Why the experts of a masked problem do not lie whole rows apart; empty when they do."""
    if not p.masked or p.num_experts == 1 or p.rows == 1:
        return []
    return [
        f"experts of {name} lie {group} elements apart, which is no multiple of the {row} from row to row"
        for name, (group, row) in (("x", p.x_strides), ("out", p.out_strides))
        if row <= 0 or group % row or group < 0
    ]


def moe_steps(p: MoEProblem) -> tuple[list[Step], Workspace]:
    """The launches of `fused_moe`: dispatch, two products, the shared expert's two, and the sum."""
    work = Workspace()
    assignments, size, n, d = p.tokens * p.top_k, p.dtype.itemsize, p.intermediate, p.hidden
    chosen = PermuteProblem(p.topk_ids_dtype, p.tokens, p.top_k, p.topk_ids_stride, p.num_experts, p.num_global)
    # So few assignments that the products find their groups by themselves: one launch less, which counts for one token.
    few = assignments <= FEW and not p.weight_on_input
    steps: list[Step] = []
    if few:
        work.add("inverse_indices", 4 * assignments)
    else:
        work.add("counters", 4 * (2 + p.num_experts))
        steps += permute_steps(chosen, work, counters=True)
    # How both products find the rows of their groups.
    found = same("topk_ids", *["expert_map"] * (p.num_global >= 0)) if few else same("offsets", "counters")
    work.add("activation", assignments * n * size)
    work.add("y", assignments * d * size)
    # a gated w_gate_up has n gate rows, then n up rows, or takes turns
    row, half = (2, 1) if p.interleaved else (1, n)
    if not p.gated:
        row, half = 1, 0
    expert, stride = p.w_gate_up_strides
    weights_dtype = p.topk_weights_dtype if p.weight_on_input else None
    expected = assignments / max(p.num_experts, 1)
    first = Product(
        p.dtype, p.num_experts, assignments, p.tokens, 0, d, n, p.activation, p.gated, True, p.top_k, p.x_stride,
        (expert, stride * row), stride * half, n, p.b_gate_up_dtype, (p.b_gate_up_stride, row, half), weights_dtype,
        p.topk_weights_stride, p.swiglu_alpha, p.swiglu_limit, 0, 0, expected, p.batch_invariant,
        False, chosen if few else None, not few,
    )  # fmt: skip
    arguments = {"x": "x", "w": "w_gate_up", "out": "activation", "bias": "b_gate_up"} | found
    arguments |= same("inverse_indices") if few else {"gather_indices": "sorted_indices"}
    if p.weight_on_input:
        arguments["row_weights"] = "topk_weights"
    steps.append(Step("grouped_gemm", first, arguments))
    second = Product(
        p.dtype, p.num_experts, assignments, assignments, 0, n, d, "", False, False, 1, n, p.w_down_strides, 0, d,
        p.b_down_dtype, (p.b_down_stride, 1, 0), None, 0, 0.0, 0.0, 0, 0, expected, p.batch_invariant, True,
        chosen if few else None, not few,
    )  # fmt: skip
    steps.append(Step("grouped_gemm", second, {"x": "activation", "w": "w_down", "out": "y", "bias": "b_down"} | found))
    if p.shared:
        s = p.shared
        work.add("shared_activation", p.tokens * s * size)
        work.add("shared", p.tokens * d * size)
        stride, half = p.shared_w_gate_up_stride, (half if half <= 1 else s)
        one = first._replace(
            groups=1, rows=p.tokens, max_rows=p.tokens, n=s, gather=False, gather_divisor=1,
            w_strides=(0, stride * row), w_stride_half=stride * half, out_stride=s, bias_dtype=None,
            bias_strides=(0, 0, 0), row_weights_dtype=None, row_weights_stride=0, group_stride=p.tokens,
            expected=float(p.tokens), few=None, counters=False,
        )  # fmt: skip
        steps.append(Step("grouped_gemm", one, {"x": "x", "w": "shared_w_gate_up", "out": "shared_activation"}))
        two = second._replace(
            groups=1, rows=p.tokens, rows_x=p.tokens, max_rows=p.tokens, k=s, x_stride=s,
            w_strides=(0, p.shared_w_down_stride), bias_dtype=None, bias_strides=(0, 0, 0), group_stride=p.tokens,
            expected=float(p.tokens), few=None, counters=False,
        )  # fmt: skip
        steps.append(Step("grouped_gemm", two, {"x": "shared_activation", "w": "shared_w_down", "out": "shared"}))
    config = next(c for c in COMBINE.all_configs if c.name == p.dtype.cuda)
    chunks = p.tokens * (d // (16 // size))
    grid = min(-(-chunks // 256), 2**16)
    arguments = same("y", "inverse_indices", "out", *["topk_weights"] * (not p.weight_on_input))
    arguments |= same(*["shared"] * bool(p.shared), *["shared_gate"] * (p.shared_gate_dtype is not None))
    values: Values = {
        "weights_stride_t": p.topk_weights_stride,
        "weights_stride_k": 1,
        "shared_gate_stride": p.shared_gate_stride,
        "out_stride": p.out_stride,
        "tokens": p.tokens,
        "top_k": p.top_k,
        "columns": p.hidden,
        "weights_dtype": p.topk_weights_dtype.code,
        "gate_dtype": _code(p.shared_gate_dtype),
    }
    aligned = p.tokens <= 1 or p.out_stride * size % 16 == 0
    steps.append(Step(COMBINE.task, SmallProblem(COMBINE.name, config, grid, rows_aligned=aligned), arguments, values))
    return steps, work


def _code(dtype: DType | None) -> int:
    return FP32.code if dtype is None else dtype.code
