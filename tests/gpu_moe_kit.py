"""The truth of the GPU tests for mixtures of experts: every operation written plainly in PyTorch, where the arrays are.

`experts`, `products`, `route` and `permutation` are fused_moe, grouped_gemm, moe_route and moe_permute;
test_gpu_moe_kit.py checks them against the float64 NumPy reference on small problems. `tensors` draws a problem's
arrays on a device, and `Guarded` is memory around a result that nobody may write.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import pytest
from moe_plans import ProductCase

from flashmoe_cupy.testing import (
    TOLERANCES,
    Verdict,
    error_rule,
    relative_error,
    row_error,
    row_rule,
)
from flashmoe_cupy.testing_moe import MoECase

torch: Any = pytest.importorskip("torch")
F: Any = torch.nn.functional

Tensor = Any  # torch.Tensor; mypy does not follow torch
Arrays = dict[str, Any]
HIGHEST = 3.4028234663852886e38  # of float32, to which the router clamps
MARGIN = 2e-6  # relative distance of two choices from which on float32 must see which one is larger


def torch_dtype(name: str) -> Any:
    return getattr(torch, name)


# ---------------------------------------------------------------------------------------------------------------------
# the experts


def activate(h: Tensor, name: str, interleaved: bool, alpha: float | None, limit: float | None) -> Tensor:
    """a (rows, n) of h (rows, 2n), or of h (rows, n) without a gate, in h's dtype."""
    if name == "gelu":
        return F.gelu(h)
    if name == "gelu_tanh":
        return F.gelu(h, approximate="tanh")
    if name in ("relu", "relu2"):
        return F.relu(h) if name == "relu" else F.relu(h).square()
    g, u = (h[:, 0::2], h[:, 1::2]) if interleaved else h.chunk(2, 1)
    if name in ("geglu", "geglu_tanh"):
        return F.gelu(g, approximate="tanh" if name == "geglu_tanh" else "none") * u
    if name == "swigluoai":
        limit = 7.0 if limit is None else limit
    if limit is not None:
        g, u = g.clamp(max=limit), u.clamp(-limit, limit)
    return F.silu(g) * u if name == "swiglu" else (u + 1) * g * torch.sigmoid((1.702 if alpha is None else alpha) * g)


def local_ids(topk_ids: Tensor, num_experts: int, expert_map: Tensor | None = None) -> Tensor:
    """(T, K) int64: the expert of each assignment, num_experts where it is skipped."""
    ids = topk_ids.long()
    if expert_map is not None:
        table = torch.cat([expert_map.long(), torch.full((1,), -1, device=ids.device)])
        ids = table[torch.where((ids >= 0) & (ids < len(expert_map)), ids, len(expert_map))]
    return torch.where((ids >= 0) & (ids < num_experts), ids, num_experts)


def experts(
    x: Tensor, w_gate_up: Tensor, w_down: Tensor, topk_weights: Tensor, topk_ids: Tensor, *, dtype: Any,
    rounded: bool = False, activation: str = "swiglu", b_gate_up: Tensor | None = None, b_down: Tensor | None = None,
    interleaved: bool = False, swiglu_alpha: float | None = None, swiglu_limit: float | None = None,
    expert_map: Tensor | None = None, apply_router_weight_on_input: bool = False,
    shared_w_gate_up: Tensor | None = None, shared_w_down: Tensor | None = None, shared_gate: Tensor | None = None,
    batch_invariant: bool = False,
) -> Tensor:  # fmt: skip
    """`fused_moe`, one expert after the other, all in `dtype`; out (T, d) in `dtype`.

    rounded: the activation and an expert's result are rounded to x's dtype, as the operation promises.
    """
    keep = x.dtype if rounded else dtype

    def expert(xs: Tensor, w1: Tensor, w2: Tensor, b1: Tensor | None, b2: Tensor | None) -> Tensor:
        h = xs @ w1.to(dtype).T
        h = h if b1 is None else h + b1.to(dtype)
        a = activate(h, activation, interleaved, swiglu_alpha, swiglu_limit).to(keep).to(dtype)
        y = a @ w2.to(dtype).T
        return (y if b2 is None else y + b2.to(dtype)).to(keep).to(dtype)

    (tokens, d), (_, top_k) = x.shape, topk_ids.shape
    ids = local_ids(topk_ids, len(w_gate_up), expert_map)
    order = ids.flatten().argsort(stable=True)
    ends = torch.bincount(ids.flatten(), minlength=len(w_gate_up) + 1).cumsum(0).tolist()
    weights, y = topk_weights.to(dtype), torch.zeros((tokens * top_k, d), dtype=dtype, device=x.device)
    for e, stop in enumerate(ends[:-1]):
        rows = order[ends[e - 1] if e else 0 : stop]
        if len(rows):
            xs = x[rows // top_k].to(dtype)
            xs = xs * weights.flatten()[rows, None] if apply_router_weight_on_input else xs
            b1, b2 = (None if b is None else b[e] for b in (b_gate_up, b_down))
            y[rows] = expert(xs, w_gate_up[e], w_down[e], b1, b2)
    factor = torch.ones_like(weights) if apply_router_weight_on_input else weights
    factor = torch.where(ids < len(w_gate_up), factor, 0)  # a skipped weight may be NaN
    out = (y.view(tokens, top_k, d) * factor[..., None]).sum(1)
    if shared_w_gate_up is not None and shared_w_down is not None:
        z = expert(x.to(dtype), shared_w_gate_up, shared_w_down, None, None)
        out = out + (z if shared_gate is None else z * shared_gate.to(dtype).view(-1, 1))
    return out


class Known(NamedTuple):
    """What a result should be: exact; with the roundings that are promised; and as good as the low dtype gives it."""

    exact: Tensor
    rounded: Tensor | None
    low: Tensor | None


def known_experts(t: Arrays, **options: Any) -> Known:
    """Of `fused_moe` on these arrays: float32 is exact for 16-bit numbers, float64 for float32."""
    dtype = t["x"].dtype
    if dtype == torch.float32:
        return Known(experts(**t, **options, dtype=torch.float64), None, None)
    exact, rounded = (experts(**t, **options, dtype=torch.float32, rounded=r) for r in (False, True))
    return Known(exact, rounded, experts(**t, **options, dtype=dtype))


def verdicts(out: Tensor, known: Known) -> list[Verdict]:
    name = str(out.dtype).removeprefix("torch.")
    allow = TOLERANCES[name]
    if known.low is None or known.rounded is None:
        limits = [(relative_error, known.exact, allow.norm), (row_error, known.exact, allow.row)]
    else:  # a value at the edge of two numbers of its dtype may become the other one: a row may be off by two steps
        limits = [(relative_error, known.rounded, allow.eps), (row_error, known.rounded, 2 * allow.eps)]
    found = []
    for metric, ref, limit in limits:
        error = metric(out, ref)
        found.append(Verdict(error <= limit, error, limit, f"{metric.__name__} {error:.3g}, allowed {limit:.3g}"))
    if known.low is not None:
        found.append(error_rule(out, known.exact, known.low))
        found.append(row_rule(out, known.exact, known.low, eps=allow.eps))
    return found


def judge(out: Tensor, known: Known, dtype: Any) -> list[str]:
    """What is wrong with a result."""
    if out.dtype != dtype or out.shape != known.exact.shape:
        return [f"{out.dtype} {tuple(out.shape)} instead of {dtype} {tuple(known.exact.shape)}"]
    return [v.text for v in verdicts(out, known) if not v]


# ---------------------------------------------------------------------------------------------------------------------
# grouped products


def product_tensors(case: ProductCase, device: str, seed: int = 0) -> Arrays:
    """Arrays of a product; rows of x that no row of out needs are NaN."""
    g, t = torch.Generator(device).manual_seed(seed), {}
    for name, shape, dtype in case.shapes():
        if dtype in ("bfloat16", "float16", "float32"):
            scale = {"x": 1.0, "w": case.d**-0.5, "bias": 0.5}[name]
            t[name] = torch.randn(shape, generator=g, device=device, dtype=torch_dtype(dtype)).mul_(scale)
    sizes = torch.tensor(case.sizes, dtype=torch.int32, device=device)
    if case.max_rows:
        t["group_sizes"] = sizes
        t["x"][torch.arange(case.max_rows, device=device)[None] >= sizes[:, None]] = math.nan
        return t
    ends = [case.head + sum(case.sizes[:i]) for i in range(len(case.sizes) + 1)]
    t["offsets"] = torch.tensor(ends, dtype=torch.int32, device=device)
    if not case.x_rows:
        t["x"][: case.head] = math.nan
        t["x"][ends[-1] :] = math.nan
        return t
    indices = torch.randint(0, case.x_rows, (case.rows,), generator=g, device=device, dtype=torch.int32)
    for i, nobody in enumerate((-1, case.x_rows, -(2**31), 2**31 - 1)):
        indices[8 * i + 3 :: 32] = nobody
    t["gather_indices"] = indices
    return t


def products(
    x: Tensor, w: Tensor, *, dtype: Any, offsets: Tensor | None = None, group_sizes: Tensor | None = None,
    gather_indices: Tensor | None = None, bias: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """`grouped_gemm` in `dtype`: out, 0 in rows of no group, and which rows (its leading dimensions) belong to one."""
    lead = x.shape[:-1] if gather_indices is None else gather_indices.shape
    out = torch.zeros((*lead, w.shape[1]), dtype=dtype, device=x.device)
    mine = torch.zeros(lead, dtype=torch.bool, device=x.device)
    bounds = (group_sizes if offsets is None else offsets).tolist()  # type: ignore[union-attr]
    for e in range(len(w)):
        at: Any = (e, slice(0, bounds[e])) if offsets is None else slice(bounds[e], bounds[e + 1])
        if gather_indices is None:
            xs = x[at].to(dtype)
        else:
            rows = gather_indices[at].long()
            there = (rows >= 0) & (rows < len(x))
            xs = torch.where(there[:, None], x[torch.where(there, rows, 0)].to(dtype), 0)
        y = xs @ w[e].to(dtype).T
        out[at] = y if bias is None else y + bias[e].to(dtype)
        mine[at] = True
    return out, mine


def known_products(t: Arrays) -> tuple[Known, Tensor]:
    """Of `grouped_gemm`: the rows that belong to a group, and which these are."""
    dtype = t["x"].dtype
    exact, mine = products(**t, dtype=torch.float64 if dtype == torch.float32 else torch.float32)
    if dtype == torch.float32:
        return Known(exact[mine], None, None), mine
    # what is promised is one rounding, of which `exact` itself is the middle
    return Known(exact[mine], exact[mine], products(**t, dtype=dtype)[0][mine]), mine


# ---------------------------------------------------------------------------------------------------------------------
# router and permutation


class Routing(NamedTuple):
    """What a router should say of each token, in float64, before drops, and the scores that it follows from."""

    weights: Tensor
    ids: Tensor
    clear: Tensor  # (T,) bool: no rounding of scores changes the choice
    p: Tensor  # (T, E)
    choice: Tensor  # (T, E), -inf for an expert outside of the best groups
    lse: Tensor  # (T,)


def scores(x: Tensor, name: str) -> Tensor:
    """(T, E) float64."""
    if name == "softmax":
        return torch.softmax(x, 1)
    if name == "sigmoid":
        return torch.sigmoid(x)
    return torch.sqrt(x.clamp(min=0) + torch.log1p(torch.exp(-x.abs())))


def _far(values: Tensor, terms: Tensor, margin: float) -> Tensor:
    """(T,) of values (T, n), falling: neighbours are equal, or further apart than the rounding of their terms."""
    gap, allowed = values[:, :-1] - values[:, 1:], margin * torch.maximum(terms[:, :-1], terms[:, 1:])
    return ((gap == 0) | (gap >= allowed) | gap.isnan()).all(1)


def route(
    logits: Tensor, *, top_k: int, scoring_func: str = "softmax", renormalize: bool = False,
    routed_scaling_factor: float = 1.0, e_score_correction_bias: Tensor | None = None, num_expert_group: int = 1,
    topk_group: int = 1, margin: float = MARGIN,
) -> Routing:  # fmt: skip
    """`moe_route` without capacity."""
    x = torch.where(logits.isnan(), -HIGHEST, logits.double()).clamp(-HIGHEST, HIGHEST)
    (tokens, count), bias = x.shape, e_score_correction_bias
    p = scores(x, scoring_func)
    choice = x if bias is None else p + bias.double()
    terms = p.abs() + (0.0 if bias is None else bias.double().abs())
    clear = torch.ones(tokens, dtype=torch.bool, device=x.device)
    if num_expert_group > 1:
        size = count // num_expert_group
        inside = choice.view(tokens, num_expert_group, size)
        best = inside.topk(1 if bias is None else min(2, size), dim=2).values.sum(2)
        order = best.argsort(dim=1, descending=True, stable=True)
        if bias is not None and topk_group < num_expert_group:
            some = order[:, topk_group - 1 : topk_group + 1]
            most = 2 * terms.view(inside.shape).amax(2)
            clear &= _far(best.gather(1, some), most.gather(1, some), margin)
        kept = torch.zeros_like(best, dtype=torch.bool).scatter_(1, order[:, :topk_group], True)
        choice = torch.where(kept.repeat_interleave(size, 1), choice, -math.inf)
    order = choice.argsort(dim=1, descending=True, stable=True)
    ids = order[:, :top_k]
    if bias is not None:
        some = order[:, : top_k + 1]
        clear &= _far(choice.gather(1, some), terms.gather(1, some), margin)
    weights = p.gather(1, ids)
    if renormalize and scoring_func == "softmax":
        weights = torch.softmax(x.gather(1, ids), 1)
    elif renormalize:
        weights = weights / (weights.sum(1, keepdim=True) + 1e-20)
    return Routing(weights * routed_scaling_factor, ids, clear, p, choice, torch.logsumexp(x, 1))


def load_balancing(p: Tensor, ids: Tensor, experts: int) -> Tensor:
    """The auxiliary loss of ids before drops and scores p, which add up to 1 here."""
    tokens = max(len(p), 1)
    share = p / (p.sum(1, keepdim=True) + 1e-20)
    routed = torch.bincount(ids.flatten().long(), minlength=experts).double() / tokens
    return experts * (routed * share.sum(0) / tokens).sum()


class Sorted(NamedTuple):
    """offsets (E + 1,), sorted_indices (T * K,), inverse_indices (T, K), int32."""

    offsets: Tensor
    sorted_indices: Tensor
    inverse_indices: Tensor


def permutation(topk_ids: Tensor, *, num_experts: int, expert_map: Tensor | None = None) -> Sorted:
    """`moe_permute`."""
    ids = local_ids(topk_ids, num_experts, expert_map).flatten()
    order = ids.argsort(stable=True)
    counts = torch.bincount(ids, minlength=num_experts + 1)[:num_experts]
    offsets = torch.cat([torch.zeros_like(counts[:1]), counts.cumsum(0)])
    inverse = torch.full_like(ids, -1)
    places = torch.arange(len(ids), device=ids.device)
    kept = places < offsets[-1]
    inverse[order[kept]] = places[kept]
    found = (offsets, torch.where(kept, order, -1), inverse.view(topk_ids.shape))
    return Sorted(*(a.to(torch.int32) for a in found))


# ---------------------------------------------------------------------------------------------------------------------
# problems and memory


def tensors(case: MoECase, device: str, seed: int = 0) -> Arrays:
    """Arrays of a call of `fused_moe`, drawn on `device`. What takes part in no sum is NaN.

    That are weights of experts that nobody goes to, weights of assignments that are skipped, and tokens without any.
    """
    g, t = torch.Generator(device).manual_seed(seed), {}
    for name, shape, dtype in case.shapes():
        if name in ("topk_weights", "shared_gate"):
            t[name] = torch.rand(shape, generator=g, device=device)
        else:
            t[name] = torch.randn(shape, generator=g, device=device, dtype=torch_dtype(dtype)).mul_(case.scale(name))
    power = 1 if case.routing == "one" else 2  # what different experts give adds like random numbers
    w = t["topk_weights"] + 0.5
    w = w / w.pow(power).sum(1, keepdim=True) ** (1 / power)
    squared = case.weight_on_input and (case.gated or case.activation == "relu2")
    t["topk_weights"] = w.sqrt() if squared else w
    for name, _, dtype in case.shapes():
        t[name] = t[name].to(torch_dtype(dtype))
    if case.routing == "uniform" and not case.sentinels and case.tokens * case.known_experts > 1 << 20:
        dice = torch.rand((case.tokens, case.known_experts), generator=g, device=device)
        t["topk_ids"] = dice.topk(case.top_k).indices.to(torch_dtype(case.ids_dtype))
        case = case._replace(tokens=1)
    t |= {n: torch.from_numpy(a).to(device) for n, a in case.indices().items() if n not in t}
    ids = local_ids(t["topk_ids"], case.experts, t.get("expert_map"))
    idle = torch.bincount(ids.flatten(), minlength=case.experts + 1)[: case.experts] == 0
    if bool(idle.any()):
        for name in ("w_gate_up", "w_down", "b_gate_up", "b_down"):
            if name in t:
                t[name][idle] = math.nan
    t["topk_weights"][ids == case.experts] = math.nan
    if not case.shared:
        t["x"][(ids == case.experts).all(1)] = math.nan
    return t


class Guarded(NamedTuple):
    """A buffer full of one NaN whose middle is handed out as `out`; the rest must stay as it is."""

    whole: Tensor
    out: Tensor

    @classmethod
    def like(cls, shape: Sequence[int], dtype: Any, device: str) -> Guarded:
        whole = torch.full((shape[0] + 2, *shape[1:]), math.nan, dtype=dtype, device=device)
        return cls(whole, whole[1:-1])

    def intact(self) -> bool:
        return bool(self.whole[0].isnan().all() and self.whole[-1].isnan().all())


def poison(size: int, device: str) -> None:
    """Fill `size` bytes with ones and free them: the library is likely to be given this memory, all NaN and -1."""
    torch.full((max(size, 1),), 255, dtype=torch.uint8, device=device)


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Equal shape, dtype and bits (NaN equals the same NaN)."""
    words = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[a.element_size()]
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    return bool(torch.equal(a.contiguous().view(words), b.contiguous().view(words)))


def agree(out: Tensor, want: Tensor) -> bool:
    """To the bit on the GPU. BLAS on the CPU may add in another order when memory is laid out in another way."""
    if out.device.type == "cuda":
        return same_bits(out, want)
    if out.shape != want.shape or out.dtype != want.dtype:
        return False
    return relative_error(out, want.double()) <= max(2 * float(torch.finfo(out.dtype).eps), 2e-6)
