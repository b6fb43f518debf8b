"""How the operations of the mixture of experts are made of launches. No GPU, no CuPy."""

from __future__ import annotations

from flashmoe_cupy.dtypes import FP32, INT32, DType
from flashmoe_cupy.jit.device import H100, DeviceProperties
from flashmoe_cupy.plan.kernel import DEFAULT_SMS
from flashmoe_cupy.plan.moe.few_rows import groups_with_rows, permutes_few
from flashmoe_cupy.plan.moe.problem import GroupedGemmProblem, MoEProblem
from flashmoe_cupy.plan.moe.products import Activation, Bias, Product, Rows, RowWeights, TileCounter, Weights
from flashmoe_cupy.plan.moe.routing import SCORING, PermuteProblem, RouteProblem
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
from flashmoe_cupy.plan.moe.tiles import SELF_SORTED
from flashmoe_cupy.plan.operation import Workspace
from flashmoe_cupy.plan.step import Step, Values, same

_ROUTER_WARPS = 4  # of a block
_STATS_WARPS = 512  # of a router that keeps statistics, at most: each writes a row that MoeRouterStats adds up
_PERMUTE_WARPS = 16  # of a block
_PERMUTE_ONE_BLOCK = 4096  # assignments, up to which one block places all and no kernel has to count before it
_PERMUTE_PER_BLOCK = 2048  # assignments of one of several blocks, as long as there are no more blocks than ...
_PERMUTE_BLOCKS = 256
_COMBINE_FEW = 32 * DEFAULT_SMS  # pieces of 16 bytes, up to which blocks of one warp fetch them: one on each SM
_COMBINE_BLOCKS = 2**16  # at most; then each block goes through several stretches


def route_steps(p: RouteProblem) -> tuple[list[Step], Workspace]:
    """The launches of `moe_route`; arrays: logits, bias, the outputs by their names, and those of the workspace."""
    work = Workspace()
    stats = p.return_stats
    tokens_per_block = _ROUTER_WARPS
    if stats:
        tokens_per_block = max(tokens_per_block, -(-p.tokens // (_STATS_WARPS // _ROUTER_WARPS)))
    blocks = -(-p.tokens // tokens_per_block)
    rows = blocks * _ROUTER_WARPS
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
        "scoring_func": SCORING.index(p.scoring_func),
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
        config = CAPACITY.all_configs[0]
        steps.append(CAPACITY.step(config, -(-assignments // config.threads), arguments, values))
    return steps, work


def permute_steps(p: PermuteProblem, work: Workspace, own: bool = True, counters: bool = False) -> list[Step]:
    """The launches of `moe_permute`. own: the three results lie in the workspace. counters: those become 0."""
    assignments = p.tokens * p.top_k
    if own:
        work.add("offsets", 4 * (p.num_experts + 1))
        work.add("sorted_indices", 4 * assignments)
        work.add("inverse_indices", 4 * assignments)
    blocks = 1 if assignments <= _PERMUTE_ONE_BLOCK else min(-(-assignments // _PERMUTE_PER_BLOCK), _PERMUTE_BLOCKS)
    per_warp = -(-assignments // (blocks * _PERMUTE_WARPS * 32)) * 32
    blocks = -(-assignments // (per_warp * _PERMUTE_WARPS))
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
        config = CLEAR.all_configs[0]
        grid = min(-(-rows * chunks // config.threads), 2 * DEFAULT_SMS)  # two blocks a multiprocessor keep memory busy
        steps.insert(0, CLEAR.step(config, grid, same("out", "offsets", "group_sizes"), values))
    return steps


def _grouped_gemm_step(p: GroupedGemmProblem) -> Step:
    if p.masked:
        (x_row, x_group), (out_row, out_group) = _rows(p, p.x_strides), _rows(p, p.out_strides)
        behind = max(p.num_experts - 1, 0)  # groups; the last one has its p.rows
        x, out = (Rows(behind * group + p.rows, row, group) for row, group in ((x_row, x_group), (out_row, out_group)))
        mean_rows = float(p.rows)
    else:
        x, out = Rows(p.x_rows, p.x_strides[1]), Rows(p.rows, p.out_strides[1])
        mean_rows = p.rows / max(p.num_experts, 1)
    product = Product(
        dtype=p.dtype, groups=p.num_experts, k=p.d, n=p.n, x=x, w=Weights(*p.w_strides), out=out, mean_rows=mean_rows,
        max_rows=p.rows if p.masked else 0, bias=Bias(p.bias_dtype, p.bias_stride, 1), gather=p.gather,
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


def moe_steps(p: MoEProblem, device: DeviceProperties = H100) -> tuple[list[Step], Workspace]:
    """The launches of `fused_moe`: dispatch, two products, the shared expert's two, and the sum.

    The workspace is the same on every device.
    """
    work = Workspace()
    assignments, size = p.tokens * p.top_k, p.dtype.itemsize
    chosen = PermuteProblem(p.topk_ids_dtype, p.tokens, p.top_k, p.topk_ids_stride, p.num_experts, p.num_global)
    work.add("counters", 4 * (2 + p.num_experts))
    steps = permute_steps(chosen, work, counters=True)
    # The products sort a few assignments by themselves: one launch less, which counts for one token.
    few = assignments <= SELF_SORTED and not p.weight_on_input
    self_sorted = chosen if few and not permutes_few(device, weight_bytes(p)) else None
    if self_sorted is not None:
        steps = []
        order = same("topk_ids", *["expert_map"] * (p.num_global >= 0))
    else:
        order = same("offsets", "counters")
    work.add("activation", assignments * p.intermediate * size)
    work.add("y", assignments * p.hidden * size)
    first, second = _expert_products(p, self_sorted)
    arguments = {"x": "x", "w": "w_gate_up", "out": "activation", "bias": "b_gate_up"} | order
    arguments |= {"gather_indices": "sorted_indices"} if self_sorted is None else {"next_w": "w_down"}
    if p.weight_on_input:
        arguments["row_weights"] = "topk_weights"
    steps.append(Step("grouped_gemm", first, arguments))
    steps.append(Step("grouped_gemm", second, {"x": "activation", "w": "w_down", "out": "y", "bias": "b_down"} | order))
    if p.shared:
        work.add("shared_activation", p.tokens * p.shared * size)
        work.add("shared", p.tokens * p.hidden * size)
        first, second = _shared_products(p)
        steps.append(Step("grouped_gemm", first, {"x": "x", "w": "shared_w_gate_up", "out": "shared_activation"}))
        steps.append(Step("grouped_gemm", second, {"x": "shared_activation", "w": "shared_w_down", "out": "shared"}))
    steps.append(_combine_step(p, self_sorted))
    return steps, work


def weight_bytes(p: MoEProblem) -> float:
    """Of the experts that get a token, where assignments go to them at random."""
    halves = 2 if p.gated else 1
    experts = groups_with_rows(p.num_experts, p.tokens * p.top_k)
    return experts * p.hidden * p.intermediate * (halves + 1) * p.dtype.itemsize


def _expert_products(p: MoEProblem, self_sorted: PermuteProblem | None) -> tuple[Product, Product]:
    """Of each assignment the activation of its token, then its result. Only sorted assignments have counters."""
    assignments, n, d = p.tokens * p.top_k, p.intermediate, p.hidden
    expert, row = p.w_gate_up_strides
    column, half = _gate_and_up(p, n)
    counters = TileCounter.FIRST, TileCounter.SECOND
    if self_sorted is not None:
        counters = TileCounter.NONE, TileCounter.NONE
    weights = RowWeights(p.topk_weights_dtype if p.weight_on_input else None, p.topk_weights_stride)
    first = Product(
        dtype=p.dtype, groups=p.num_experts, k=d, n=n, x=Rows(p.tokens, p.x_stride),
        w=Weights(expert, row * column, row * half), out=Rows(assignments, n),
        bias=Bias(p.b_gate_up_dtype, p.b_gate_up_stride, column, half), activation=_activation(p), row_weights=weights,
        gather=True, gather_divisor=p.top_k, mean_rows=assignments / max(p.num_experts, 1),
        batch_invariant=p.batch_invariant, self_sorted=self_sorted, tile_counter=counters[0],
    )  # fmt: skip
    second = Product(
        dtype=p.dtype, groups=p.num_experts, k=n, n=d, x=Rows(assignments, n), w=Weights(*p.w_down_strides),
        out=Rows(assignments, d), bias=Bias(p.b_down_dtype, p.b_down_stride, 1), mean_rows=first.mean_rows,
        batch_invariant=p.batch_invariant, groups_known_early=True, self_sorted=self_sorted, tile_counter=counters[1],
    )  # fmt: skip
    return first, second


def _shared_products(p: MoEProblem) -> tuple[Product, Product]:
    """The shared expert's: one group, which all tokens belong to."""
    tokens, s, d = p.tokens, p.shared, p.hidden
    row = p.shared_w_gate_up_stride
    column, half = _gate_and_up(p, s)
    x, inside, out = (Rows(tokens, stride, group_stride=tokens) for stride in (p.x_stride, s, d))
    first = Product(
        dtype=p.dtype, groups=1, k=d, n=s, x=x, w=Weights(0, row * column, row * half), out=inside,
        mean_rows=float(tokens), max_rows=tokens, activation=_activation(p), batch_invariant=p.batch_invariant,
    )  # fmt: skip
    second = Product(
        dtype=p.dtype, groups=1, k=s, n=d, x=inside, w=Weights(0, p.shared_w_down_stride), out=out,
        mean_rows=float(tokens), max_rows=tokens, batch_invariant=p.batch_invariant, groups_known_early=True,
    )  # fmt: skip
    return first, second


def _activation(p: MoEProblem) -> Activation:
    return Activation(p.activation, p.gated, p.swiglu_alpha, p.swiglu_limit)


def _gate_and_up(p: MoEProblem, n: int) -> tuple[int, int]:
    """Rows of w_gate_up from a column of the activation to the next one, and from its gate to its up.

    A gated w_gate_up has n gate rows, then n up rows, or takes turns.
    """
    if not p.gated:
        return 1, 0
    return (2, 1) if p.interleaved else (1, n)


def _combine_step(p: MoEProblem, self_sorted: PermuteProblem | None) -> Step:
    """The weighted sum of a token's experts."""
    size = p.dtype.itemsize
    chunks = p.tokens * (p.hidden // (16 // size))
    name = p.dtype.cuda + " few" * (chunks <= _COMBINE_FEW)
    config = next(c for c in COMBINE.all_configs if c.name == name)
    grid = min(-(-chunks // config.threads), _COMBINE_BLOCKS)
    arguments = same("y", "out", *["topk_weights"] * (not p.weight_on_input))
    if self_sorted is None:
        arguments |= same("inverse_indices")
    else:
        arguments |= same("topk_ids", *["expert_map"] * (p.num_global >= 0))
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
        "ids_stride": p.topk_ids_stride,
        "experts": p.num_experts,
        "ids": 0 if self_sorted is None else self_sorted.ids,
        "ids_wide": int(p.topk_ids_dtype.itemsize == 8),
    }
    aligned = p.tokens <= 1 or p.out_stride * size % 16 == 0
    return Step(COMBINE.task, SmallProblem(COMBINE.name, config, grid, rows_aligned=aligned), arguments, values)


def _code(dtype: DType | None) -> int:
    return FP32.code if dtype is None else dtype.code
