"""The operations for torch tensors, eager and under `torch.compile`, as the operators of `torch.ops.flashmoe_cupy`.

Eager calls go straight to `flashmoe_cupy.ops`, on torch's current stream. Compiled and traced code sees one
operator with a schema and a shape rule, which the compiler neither looks into nor splits. The functions of
`flashmoe_cupy` itself come here while torch compiles or traces, so either may be called. The operators have no in-place
form: while torch compiles, `out` is refused. What is no tensor runs uncompiled: torch.compile's translation of NumPy
code loses what is written to `out=`.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch._dynamo import trace_rules

from flashmoe_cupy.errors import UnsupportedProblem
from flashmoe_cupy.ops import plans
from flashmoe_cupy.ops.permute import MoEPermutation
from flashmoe_cupy.ops.route import RouterStats
from flashmoe_cupy.plan.checks import show
from flashmoe_cupy.plan.options import READ
from flashmoe_cupy.torch_reasons import instead, no_strides

# Where a call cannot be traced, as with `out`, torch.compile goes on with the functions inside. These read memory that
# it does not see and write what its translation of NumPy loses: they run as they are.
for _module in ("cpu", "arrays", "jit", "ops.quick"):
    trace_rules.add(f"flashmoe_cupy.{_module}")

__all__ = ["flash_attention", "flash_attention_varlen", "fused_moe", "grouped_gemm", "moe_permute", "moe_route"]

# Arguments in order, without defaults: the functions below always give all of them.
_QKV = (("Tensor", "q"), ("Tensor", "k"), ("Tensor", "v"))
_DENSE = (
    *_QKV, ("bool", "causal"), ("SymInt[]", "window_size"), ("float?", "softmax_scale"), ("float", "softcap"),
    ("Tensor?", "sinks"), ("Tensor?", "alibi_slopes"), ("Tensor?", "bias"), ("str", "layout"), ("bool", "return_lse"),
)  # fmt: skip
_VARLEN = (
    *_QKV,
    ("Tensor", "cu_seqlens_q"), ("Tensor", "cu_seqlens_k"), ("SymInt", "max_seqlen_q"), ("SymInt", "max_seqlen_k"),
    ("Tensor?", "seqused_q"), ("Tensor?", "seqused_k"), ("bool", "causal"), ("SymInt[]", "window_size"),
    ("float?", "softmax_scale"), ("float", "softcap"), ("Tensor?", "sinks"), ("Tensor?", "alibi_slopes"),
    ("bool", "return_lse"),
)  # fmt: skip
_ROUTE = (
    ("Tensor", "logits"), ("SymInt", "top_k"), ("str", "scoring_func"), ("bool", "renormalize"),
    ("float", "routed_scaling_factor"), ("Tensor?", "e_score_correction_bias"), ("SymInt", "num_expert_group"),
    ("SymInt", "topk_group"), ("float?", "capacity_factor"), ("bool", "return_stats"),
)  # fmt: skip
_PERMUTE = (("Tensor", "topk_ids"), ("SymInt", "num_experts"), ("Tensor?", "expert_map"))
_GEMM = (
    ("Tensor", "x"), ("Tensor", "w"), ("Tensor?", "offsets"), ("Tensor?", "group_sizes"), ("Tensor?", "gather_indices"),
    ("Tensor?", "bias"),
)  # fmt: skip
_MOE = (
    ("Tensor", "x"), ("Tensor", "w_gate_up"), ("Tensor", "w_down"), ("Tensor", "topk_weights"), ("Tensor", "topk_ids"),
    ("str", "activation"), ("Tensor?", "b_gate_up"), ("Tensor?", "b_down"), ("bool", "interleaved"),
    ("float?", "swiglu_alpha"), ("float?", "swiglu_limit"), ("Tensor?", "expert_map"),
    ("bool", "apply_router_weight_on_input"), ("Tensor?", "shared_w_gate_up"), ("Tensor?", "shared_w_down"),
    ("Tensor?", "shared_gate"), ("bool", "batch_invariant"),
)  # fmt: skip
_Options = tuple[tuple[str, str], ...]  # type and name of each argument
_Pair = tuple[torch.Tensor, torch.Tensor]  # out, lse
# The compiler keeps the strides that the tensors had in eager code: no hidden copies, and the same kernel.
_TAGS = (torch.Tag.pt2_compliant_tag, torch.Tag.needs_fixed_stride_order)


def flash_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softmax_scale: float | None = None,
    softcap: float = 0,  # an int: Dynamo would make a graph input of a default 0.0
    sinks: torch.Tensor | None = None,
    alibi_slopes: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    layout: str = "bshd",
    return_lse: bool = False,
    out: torch.Tensor | None = None,
) -> Any:
    """`flashmoe_cupy.flash_attention` for torch tensors, in eager, compiled and exported code (`fullgraph=True`).

    Arguments, results and errors are the same. Shapes may be dynamic. Raises UnsupportedProblem for tensors that
    require a gradient while grad mode is on; the compiler reports it when it traces.
    """
    if not _traced(q):
        from flashmoe_cupy.ops import attention as op

        return _eager(op.flash_attention)(
            q, k, v, causal=causal, window_size=window_size, softmax_scale=softmax_scale, softcap=softcap, sinks=sinks,
            alibi_slopes=alibi_slopes, bias=bias, layout=layout, return_lse=return_lse, out=out,
        )  # fmt: skip
    given = q, k, v, causal, window_size, softmax_scale, softcap, sinks, alibi_slopes, bias, layout, return_lse
    result = torch.ops.flashmoe_cupy.flash_attention(*_read("flash_attention", _DENSE, given, out))
    return result if return_lse else result[0]


def flash_attention_varlen(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    seqused_q: torch.Tensor | None = None,
    seqused_k: torch.Tensor | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softmax_scale: float | None = None,
    softcap: float = 0,  # an int: Dynamo would make a graph input of a default 0.0
    sinks: torch.Tensor | None = None,
    alibi_slopes: torch.Tensor | None = None,
    return_lse: bool = False,
    out: torch.Tensor | None = None,
) -> Any:
    """`flashmoe_cupy.flash_attention_varlen` for torch tensors, also inside `torch.compile` and `torch.export`.

    Arguments, results and errors are the same; gradients as in `flash_attention` of this module.
    """
    if not _traced(q):
        from flashmoe_cupy.ops import attention as op

        return _eager(op.flash_attention_varlen)(
            q, k, v, cu_seqlens_q=cu_seqlens_q, cu_seqlens_k=cu_seqlens_k, max_seqlen_q=max_seqlen_q,
            max_seqlen_k=max_seqlen_k, seqused_q=seqused_q, seqused_k=seqused_k, causal=causal, window_size=window_size,
            softmax_scale=softmax_scale, softcap=softcap, sinks=sinks, alibi_slopes=alibi_slopes, return_lse=return_lse,
            out=out,
        )  # fmt: skip
    given = (
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, seqused_q, seqused_k, causal, window_size,
        softmax_scale, softcap, sinks, alibi_slopes, return_lse,
    )  # fmt: skip
    result = torch.ops.flashmoe_cupy.flash_attention_varlen(*_read("flash_attention_varlen", _VARLEN, given, out))
    return result if return_lse else result[0]


def moe_route(
    logits: torch.Tensor,
    *,
    top_k: int,
    scoring_func: str = "softmax",
    renormalize: bool = False,
    routed_scaling_factor: float = 1,  # an int: Dynamo would make a graph input of a default 1.0
    e_score_correction_bias: torch.Tensor | None = None,
    num_expert_group: int = 1,
    topk_group: int = 1,
    capacity_factor: float | None = None,
    return_stats: bool = False,
) -> Any:
    """`flashmoe_cupy.moe_route` for torch tensors, also inside `torch.compile` and `torch.export`.

    Arguments, results and errors are the same; the number of tokens may be dynamic. Gradients as in `flash_attention`.
    """
    if not _traced(logits):
        from flashmoe_cupy.ops import route as op

        return _eager(op.moe_route)(
            logits, top_k=top_k, scoring_func=scoring_func, renormalize=renormalize,
            routed_scaling_factor=routed_scaling_factor, e_score_correction_bias=e_score_correction_bias,
            num_expert_group=num_expert_group, topk_group=topk_group, capacity_factor=capacity_factor,
            return_stats=return_stats,
        )  # fmt: skip
    given = (
        logits, top_k, scoring_func, renormalize, routed_scaling_factor, e_score_correction_bias, num_expert_group,
        topk_group, capacity_factor, return_stats,
    )  # fmt: skip
    weights, ids, *stats = torch.ops.flashmoe_cupy.moe_route(*_read("moe_route", _ROUTE, given))
    return (weights, ids, RouterStats(*stats)) if return_stats else (weights, ids)


def moe_permute(
    topk_ids: torch.Tensor, *, num_experts: int, expert_map: torch.Tensor | None = None
) -> MoEPermutation[torch.Tensor]:  # fmt: skip
    """`flashmoe_cupy.moe_permute` for torch tensors, also inside `torch.compile` and `torch.export`."""
    if not _traced(topk_ids):
        from flashmoe_cupy.ops import permute as op

        found: MoEPermutation[Any] = _eager(op.moe_permute)(topk_ids, num_experts=num_experts, expert_map=expert_map)
        return found
    given = _read("moe_permute", _PERMUTE, (topk_ids, num_experts, expert_map))
    return MoEPermutation(*torch.ops.flashmoe_cupy.moe_permute(*given))


def grouped_gemm(
    x: torch.Tensor,
    w: torch.Tensor,
    *,
    offsets: torch.Tensor | None = None,
    group_sizes: torch.Tensor | None = None,
    gather_indices: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
) -> Any:
    """`flashmoe_cupy.grouped_gemm` for torch tensors, also inside `torch.compile` and `torch.export`.

    Arguments, results and errors are the same; the numbers of rows may be dynamic. Gradients as in `flash_attention`.
    """
    if not _traced(x):
        from flashmoe_cupy.ops import grouped_gemm as op

        return _eager(op.grouped_gemm)(
            x, w, offsets=offsets, group_sizes=group_sizes, gather_indices=gather_indices, bias=bias, out=out
        )  # fmt: skip
    given = _read("grouped_gemm", _GEMM, (x, w, offsets, group_sizes, gather_indices, bias), out)
    return torch.ops.flashmoe_cupy.grouped_gemm(*given)


def fused_moe(
    x: torch.Tensor,
    w_gate_up: torch.Tensor,
    w_down: torch.Tensor,
    topk_weights: torch.Tensor,
    topk_ids: torch.Tensor,
    *,
    activation: str = "swiglu",
    b_gate_up: torch.Tensor | None = None,
    b_down: torch.Tensor | None = None,
    interleaved: bool = False,
    swiglu_alpha: float | None = None,
    swiglu_limit: float | None = None,
    expert_map: torch.Tensor | None = None,
    apply_router_weight_on_input: bool = False,
    shared_w_gate_up: torch.Tensor | None = None,
    shared_w_down: torch.Tensor | None = None,
    shared_gate: torch.Tensor | None = None,
    batch_invariant: bool = False,
    out: torch.Tensor | None = None,
) -> Any:
    """`flashmoe_cupy.fused_moe` for torch tensors, also inside `torch.compile` and `torch.export`.

    Arguments, results and errors are the same; the number of tokens may be dynamic. Gradients as in `flash_attention`.
    """
    if not _traced(x):
        from flashmoe_cupy.ops import moe as op

        return _eager(op.fused_moe)(
            x, w_gate_up, w_down, topk_weights, topk_ids, activation=activation, b_gate_up=b_gate_up, b_down=b_down,
            interleaved=interleaved, swiglu_alpha=swiglu_alpha, swiglu_limit=swiglu_limit, expert_map=expert_map,
            apply_router_weight_on_input=apply_router_weight_on_input, shared_w_gate_up=shared_w_gate_up,
            shared_w_down=shared_w_down, shared_gate=shared_gate, batch_invariant=batch_invariant, out=out,
        )  # fmt: skip
    given = (
        x, w_gate_up, w_down, topk_weights, topk_ids, activation, b_gate_up, b_down, interleaved, swiglu_alpha,
        swiglu_limit, expert_map, apply_router_weight_on_input, shared_w_gate_up, shared_w_down, shared_gate,
        batch_invariant,
    )  # fmt: skip
    return torch.ops.flashmoe_cupy.fused_moe(*_read("fused_moe", _MOE, given, out))


def __getattr__(name: str) -> Any:
    text = f"module {__name__!r} has no attribute {name!r}"
    if name == "FlashMoE":
        text += "; this nn.Module comes with training, and flashmoe_cupy.FlashMoELayer serves inference"
    raise AttributeError(text)


def _traced(q: Any) -> bool:
    """True where the operator must be called: while torch compiles or traces, and for what is not plain memory."""
    if torch.compiler.is_compiling():
        return isinstance(q, torch.Tensor)
    return isinstance(q, torch.Tensor) and plans.adapter(q) is not None


def _eager(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function itself; while torch compiles, in a form that it does not look into."""
    return partial(_uncompiled, function) if torch.compiler.is_compiling() else function


@torch.compiler.disable  # type: ignore[untyped-decorator]
def _uncompiled(function: Callable[..., Any], *arrays: Any, **options: Any) -> Any:
    return function(*arrays, **options)


def _read(op: str, options: _Options, values: tuple[Any, ...], out: Any = None) -> list[Any]:
    """The operator's arguments. Refuses what it does not take, and what its schema would turn into another type.

    All else is checked when the operator runs.
    """
    why, found, hint, traced = [], [], "", " while torch compiles or traces"
    for (kind, name), value in zip(options, values, strict=True):
        one = value
        if kind[:6] == "Tensor":
            if not (isinstance(value, torch.Tensor) or (value is None and kind == "Tensor?")):
                why.append(f"{name} is no tensor; all arrays of a call must be of one library")
                hint = "tensors for all arrays of a call"
            elif value is not None and (scattered := no_strides(torch, value)):
                why.append(f"{name}: {scattered}")
                hint, traced = instead(value, name) or hint, ""  # refused everywhere
        elif not (value is None and kind == "float?") and not _is_symbolic(value):
            one = READ[name](value)
            if one is None:
                why.append(f"{name} must be {_WORDS[kind]}, but is {show(value)}")
        found.append(one)
    if out is not None:
        why.append("out is given, but the operators that torch compiles and traces have no in-place form")
        hint = "out=None: torch plans the memory of compiled code itself"
    if not why:
        return found
    asked = op + traced
    if torch.compiler.is_dynamo_compiling():  # which cannot trace the making of our own type
        raise ValueError(f"cannot run {asked}: {'; '.join(why)}" + (f"; hint: {hint}" if hint else ""))
    raise UnsupportedProblem(asked, why, hint)


def _is_symbolic(value: Any) -> bool:
    """Whether this is a number that torch traces, or has one."""
    return any(isinstance(one, _SYMBOLS) for one in (value if isinstance(value, tuple) else (value,)))


_SYMBOLS = (torch.SymInt, torch.SymFloat, torch.SymBool)
_WORDS = {
    "bool": "a bool", "SymInt": "an int", "float": "a number", "float?": "a number or None", "str": "a string",
    "SymInt[]": "two ints (left, right)",
}  # fmt: skip


# ---------------------------------------------------------------------------------------------------------------------
# the operators: schema, body, shape rule, gradient


def _named(options: _Options, values: tuple[Any, ...]) -> dict[str, Any]:
    return dict(zip((option for _, option in options), values, strict=True))


def _attention(name: str, options: _Options) -> Callable[..., _Pair]:
    """The operator itself, for real tensors of any device."""

    def body(*values: Any) -> _Pair:
        from flashmoe_cupy.ops import attention as op

        given = _named(options, values)
        given["window_size"] = tuple(given["window_size"])
        result = getattr(op, name)(**given)
        return result if given["return_lse"] else (result, _no_lse(given["q"]))

    return body


def _route(*values: Any) -> tuple[torch.Tensor, ...]:
    from flashmoe_cupy.ops import route as op

    weights, ids, *stats = op.moe_route(**_named(_ROUTE, values))
    return (weights, ids, *(stats[0] if stats else _no_stats(weights)))


def _permute(*values: Any) -> tuple[torch.Tensor, ...]:
    from flashmoe_cupy.ops import permute as op

    return tuple(op.moe_permute(**_named(_PERMUTE, values)))


def _gemm(*values: Any) -> Any:
    from flashmoe_cupy.ops import grouped_gemm as op

    return op.grouped_gemm(**_named(_GEMM, values))


def _moe(*values: Any) -> Any:
    from flashmoe_cupy.ops import moe as op

    return op.fused_moe(**_named(_MOE, values))


def _no_lse(q: torch.Tensor) -> torch.Tensor:
    """What stands in the operator's second result when the log-sum-exp was not asked for."""
    return q.new_empty((0,), dtype=torch.float32)


def _no_stats(like: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """What stands in the router's other results when no statistics were asked for."""
    kinds = (torch.int32, torch.int32, torch.float32, torch.float32)
    return tuple([like.new_empty((0,), dtype=kind) for kind in kinds])


def _dense_shapes(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *values: Any) -> _Pair:
    layout, return_lse = values[-2:]
    _check_ranks("flash_attention", 4, q=q, k=k, v=v)
    s, h = (2, 1) if layout == "bhsd" else (1, 2)
    lse = q.new_empty((q.shape[0], q.shape[h], q.shape[s]), dtype=torch.float32) if return_lse else _no_lse(q)
    return q.new_empty((*q.shape[:3], v.shape[3])), lse


def _varlen_shapes(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *values: Any) -> _Pair:
    _check_ranks("flash_attention_varlen", 3, q=q, k=k, v=v)
    lse = q.new_empty((q.shape[1], q.shape[0]), dtype=torch.float32) if values[-1] else _no_lse(q)
    return q.new_empty((*q.shape[:2], v.shape[2])), lse


def _route_shapes(logits: torch.Tensor, top_k: int, *values: Any) -> tuple[torch.Tensor, ...]:
    _check_ranks("moe_route", 2, logits=logits)
    tokens, experts = logits.shape
    kinds = (((experts,), torch.int32), ((experts,), torch.int32), ((), torch.float32), ((), torch.float32))
    stats = [logits.new_empty(shape, dtype=kind) for shape, kind in kinds] if values[-1] else _no_stats(logits)
    weights = logits.new_empty((tokens, top_k), dtype=torch.float32)
    return (weights, logits.new_empty((tokens, top_k), dtype=torch.int32), *stats)


def _permute_shapes(topk_ids: torch.Tensor, num_experts: int, *_: Any) -> tuple[torch.Tensor, ...]:
    _check_ranks("moe_permute", 2, topk_ids=topk_ids)
    tokens, k = topk_ids.shape
    shapes: tuple[tuple[int, ...], ...] = ((num_experts + 1,), (tokens * k,), (tokens, k))
    return tuple([topk_ids.new_empty(shape, dtype=torch.int32) for shape in shapes])


def _gemm_shapes(x: torch.Tensor, w: torch.Tensor, *lists: Any) -> torch.Tensor:
    group_sizes, gather_indices = lists[1:3]
    _check_ranks("grouped_gemm", 3, w=w)
    _check_ranks("grouped_gemm", 2 if group_sizes is None else 3, x=x)
    rows = x.shape[:-1] if gather_indices is None else gather_indices.shape[:1]
    return x.new_empty((*rows, w.shape[1]))


def _moe_shapes(x: torch.Tensor, *_: Any) -> torch.Tensor:
    _check_ranks("fused_moe", 2, x=x)
    return x.new_empty(x.shape)


def _check_ranks(op: str, rank: int, **tensors: torch.Tensor) -> None:
    """The one thing that the shape rules rely on; all else is checked when the operator runs."""
    named = tensors.items()
    reasons = [f"{name} must have {rank} dimensions, but has {x.dim()}" for name, x in named if x.dim() != rank]
    if reasons:
        raise UnsupportedProblem(op, reasons)


def _no_gradient(name: str, options: _Options) -> Callable[..., None]:
    """What runs when an input requires a gradient and grad mode is on, also on the compiler's fake tensors."""

    def refuse(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        del ctx, output
        named = _named(options, inputs).items()
        names = [option for option, x in named if isinstance(x, torch.Tensor) and x.requires_grad]
        raise UnsupportedProblem(
            f"the gradient of {name}",
            [f"{option} requires grad and grad mode is on, but there is no backward yet" for option in names],
            "use torch.no_grad() or .detach() where gradients are not needed",
        )

    return refuse


def _backward(ctx: Any, *gradients: Any) -> None:
    raise NotImplementedError("flashmoe_cupy has no backward for torch tensors yet")  # the forward has refused before


def _no_vmap(name: str) -> Callable[..., Any]:
    """The batching rule. Without one torch calls the operator in a loop."""

    def refuse(*_: Any) -> Any:
        reason = "torch.func.vmap is not supported"
        raise UnsupportedProblem(f"{name} under vmap", [reason], "give the mapped axis as part of batch or tokens")

    return refuse


def _define(name: str, options: _Options, results: int, body: Callable[..., Any], shapes: Callable[..., Any]) -> None:
    arguments = ", ".join(f"{kind} {option}" for kind, option in options)
    returns = "Tensor" if results == 1 else f"({', '.join(['Tensor'] * results)})"
    _library.define(f"{name}({arguments}) -> {returns}", tags=_TAGS)
    _library.impl(name, body, "CompositeExplicitAutograd")
    qualified = f"flashmoe_cupy::{name}"
    torch.library.register_fake(qualified, shapes, lib=_library)
    torch.library.register_vmap(qualified, _no_vmap(name), lib=_library)
    torch.library.register_autograd(qualified, _backward, setup_context=_no_gradient(name, options), lib=_library)


_library = torch.library.Library("flashmoe_cupy", "FRAGMENT")
_define("flash_attention", _DENSE, 2, _attention("flash_attention", _DENSE), _dense_shapes)
_define("flash_attention_varlen", _VARLEN, 2, _attention("flash_attention_varlen", _VARLEN), _varlen_shapes)
_define("moe_route", _ROUTE, 6, _route, _route_shapes)
_define("moe_permute", _PERMUTE, 3, _permute, _permute_shapes)
_define("grouped_gemm", _GEMM, 1, _gemm, _gemm_shapes)
_define("fused_moe", _MOE, 1, _moe, _moe_shapes)
