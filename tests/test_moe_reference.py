"""The experts' float64 reference: against transformers, a dense formulation in PyTorch, and by its own properties."""

from __future__ import annotations

import itertools
from importlib import import_module
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from flashmoe_cupy import reference

Array = Any  # NumPy arrays; Any, so that dicts of arguments may be unpacked
Rng = np.random.Generator

GATED = ("swiglu", "geglu", "geglu_tanh", "swigluoai")
PLAIN = ("gelu", "gelu_tanh", "relu", "relu2")

# name -> (tokens, hidden, intermediate, experts, top_k, options); "arrays" lists the optional arguments
CASES: dict[str, tuple[int, int, int, int, int, dict[str, Any]]] = {
    **{name: (7, 8, 16, 5, 2, {"activation": name}) for name in (*GATED, *PLAIN)},
    **{f"{name}, interleaved": (7, 8, 16, 5, 2, {"activation": name, "interleaved": True}) for name in GATED},
    "biases": (7, 16, 8, 5, 3, {"arrays": ("b_gate_up", "b_down")}),
    "bias in": (7, 16, 8, 5, 3, {"arrays": ("b_gate_up",), "activation": "relu2"}),
    "bias out": (7, 16, 8, 5, 3, {"arrays": ("b_down",), "interleaved": True}),
    "clamped": (7, 8, 16, 5, 2, {"activation": "swigluoai", "swiglu_alpha": 0.9, "swiglu_limit": 0.6}),
    "clamped swiglu": (7, 8, 16, 5, 2, {"swiglu_limit": 0.6}),
    "weight on input": (7, 8, 16, 5, 3, {
        "apply_router_weight_on_input": True, "arrays": ("b_gate_up", "b_down"),
    }),
    "shared": (7, 8, 16, 5, 2, {"arrays": ("shared",)}),
    "shared, gated": (7, 8, 16, 5, 2, {"arrays": ("shared", "shared_gate"), "interleaved": True}),
    "shared, one gate a row": (7, 8, 16, 5, 2, {"arrays": ("shared", "shared_gate_column"), "activation": "gelu"}),
    "shared, weight on input": (7, 8, 16, 5, 2, {"apply_router_weight_on_input": True, "arrays": ("shared",)}),
    "all experts": (5, 8, 8, 6, 6, {}),
    "one expert": (5, 8, 8, 1, 1, {}),
    "one token": (1, 8, 8, 9, 2, {"batch_invariant": True}),
    "no token": (0, 8, 8, 3, 2, {"arrays": ("shared", "shared_gate")}),
    "gpt-oss": (9, 16, 24, 6, 4, {
        "activation": "swigluoai", "interleaved": True, "arrays": ("b_gate_up", "b_down"), "swiglu_limit": 1.0,
    }),
}  # fmt: skip


def make(case: str, rng: Rng) -> tuple[dict[str, Array], dict[str, Any]]:
    """Arrays by argument name, float64, and the other options of a case. Ids are distinct in each row."""
    tokens, d, n, experts, top_k, options = CASES[case]
    rows = 2 * n if options.get("activation", "swiglu") in GATED else n
    optional: dict[str, dict[str, tuple[int, ...]]] = {
        "b_gate_up": {"b_gate_up": (experts, rows)},
        "b_down": {"b_down": (experts, d)},
        "shared": {"shared_w_gate_up": (rows // n * 24, d), "shared_w_down": (d, 24)},
        "shared_gate": {"shared_gate": (tokens,)},
        "shared_gate_column": {"shared_gate": (tokens, 1)},
    }
    shapes: dict[str, tuple[int, ...]] = {"x": (tokens, d), "w_gate_up": (experts, rows, d), "w_down": (experts, d, n)}
    for name in options.get("arrays", ()):
        shapes |= optional[name]
    arrays: dict[str, Array] = {name: rng.standard_normal(shape) for name, shape in shapes.items()}
    arrays["topk_weights"] = rng.random((tokens, top_k)) + 0.1
    arrays["topk_ids"] = np.argsort(rng.random((tokens, experts)), axis=1)[:, :top_k].astype(np.int32)
    return arrays, {name: value for name, value in options.items() if name != "arrays"}


def torch_activation(torch: Any, h: Any, options: dict[str, Any]) -> Any:
    """The activation of h (..., 2n) or (..., n) from torch's own functions."""
    f, name = torch.nn.functional, options.get("activation", "swiglu")
    if name in PLAIN:
        if name.startswith("gelu"):
            return f.gelu(h, approximate="tanh" if name == "gelu_tanh" else "none")
        return f.relu(h) ** (2 if name == "relu2" else 1)
    gate, up = (h[..., 0::2], h[..., 1::2]) if options.get("interleaved") else h.chunk(2, -1)
    if name in ("geglu", "geglu_tanh"):
        return f.gelu(gate, approximate="tanh" if name == "geglu_tanh" else "none") * up
    if limit := options.get("swiglu_limit", 7.0 if name == "swigluoai" else None):
        gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
    if name == "swiglu":
        return f.silu(gate) * up
    return (up + 1) * gate * torch.sigmoid(options.get("swiglu_alpha", 1.702) * gate)


def dense(arrays: dict[str, Array], options: dict[str, Any]) -> Array:
    """Every expert on every token, summed by a matrix (T, E) of weights, in torch. Needs distinct valid ids."""
    torch = pytest.importorskip("torch")
    t = {name: torch.tensor(a) for name, a in arrays.items()}
    experts = len(t["w_down"])
    weights = torch.zeros(len(t["x"]), experts, dtype=torch.float64)
    weights.scatter_(1, t["topk_ids"].long(), t["topk_weights"])
    x = t["x"][:, None].expand(-1, experts, -1)
    if options.get("apply_router_weight_on_input"):
        x, weights = x * weights[..., None], (weights > 0).double()
    h = torch.einsum("ted,eid->tei", x, t["w_gate_up"]) + t.get("b_gate_up", torch.zeros(()))
    a = torch_activation(torch, h, options)
    y = torch.einsum("tei,edi->ted", a, t["w_down"]) + t.get("b_down", torch.zeros(()))
    out = torch.einsum("ted,te->td", y, weights)
    if "shared_w_down" in t:
        shared = torch_activation(torch, t["x"] @ t["shared_w_gate_up"].T, options) @ t["shared_w_down"].T
        out = out + shared * t.get("shared_gate", torch.ones(len(out))).reshape(-1, 1)
    return out.numpy()


def close(a: Array, b: Array, tol: float = 1e-12) -> None:
    np.testing.assert_allclose(np.asarray(a), np.asarray(b), rtol=tol, atol=tol)


# ---------------------------------------------------------------------------------------------- against other libraries


@pytest.mark.parametrize("case", CASES)
def test_equals_the_dense_formulation(case: str, rng: Rng) -> None:
    arrays, options = make(case, rng)
    out = reference.fused_moe(**arrays, **options)
    assert out.dtype == np.float64 and out.shape == arrays["x"].shape
    close(out, dense(arrays, options), 1e-11)


# model -> (class of the whole layer, configuration class and its arguments, options of moe_route)
LAYERS: dict[str, tuple[str, str, dict[str, Any], dict[str, Any]]] = {
    "mixtral": ("MixtralSparseMoeBlock", "MixtralConfig", {"intermediate_size": 24, "num_local_experts": 8}, {
        "renormalize": True,
    }),
    "qwen2_moe": ("Qwen2MoeSparseMoeBlock", "Qwen2MoeConfig", {
        "moe_intermediate_size": 24, "num_experts": 8, "shared_expert_intermediate_size": 40, "norm_topk_prob": False,
    }, {}),
    "qwen3_moe": ("Qwen3MoeSparseMoeBlock", "Qwen3MoeConfig", {
        "moe_intermediate_size": 24, "num_experts": 8, "norm_topk_prob": True,
    }, {"renormalize": True}),
    "olmoe": ("OlmoeSparseMoeBlock", "OlmoeConfig", {
        "intermediate_size": 24, "num_experts": 8, "norm_topk_prob": False,
    }, {}),
    "gpt_oss": ("GptOssMLP", "GptOssConfig", {"intermediate_size": 24, "num_local_experts": 8}, {"renormalize": True}),
    "deepseek_v2": ("DeepseekV2Moe", "DeepseekV2Config", {
        "moe_intermediate_size": 24, "n_routed_experts": 8, "n_group": 4, "topk_group": 2, "n_shared_experts": 2,
        "topk_method": "group_limited_greedy", "routed_scaling_factor": 2.0, "num_attention_heads": 1,
    }, {"num_expert_group": 4, "topk_group": 2, "routed_scaling_factor": 2.0}),
    "deepseek_v3": ("DeepseekV3MoE", "DeepseekV3Config", {
        "moe_intermediate_size": 24, "n_routed_experts": 8, "n_group": 4, "topk_group": 2, "n_shared_experts": 2,
        "routed_scaling_factor": 2.5, "norm_topk_prob": True,
    }, {
        "scoring_func": "sigmoid", "renormalize": True, "num_expert_group": 4, "topk_group": 2,
        "routed_scaling_factor": 2.5,
    }),
}  # fmt: skip


@pytest.mark.parametrize("model", LAYERS)
def test_equals_the_layer_of_transformers(model: str, rng: Rng) -> None:
    """The whole layer, then its experts alone. The routers compute in float32 inside, but for gpt-oss."""
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    layer_class, config_class, arguments, routing = LAYERS[model]
    config = getattr(transformers, config_class)(hidden_size=16, num_experts_per_tok=3, **arguments)
    layer = getattr(import_module(f"transformers.models.{model}.modeling_{model}"), layer_class)(config).double()
    x = rng.standard_normal((40, 16))
    with torch.no_grad():
        for name, value in layer.state_dict().items():
            # the experts' inputs beyond gpt-oss's clamp at 7, and choices that hang on no rounding
            scale = {"experts.gate_up_proj": 0.8}.get(name, 0.25)
            value.copy_(torch.tensor(rng.standard_normal(value.shape) * scale))
        expected = layer(torch.tensor(x)[None])
    w = {name: value.numpy() for name, value in layer.state_dict().items()}
    logits = x @ w["router.weight" if model == "gpt_oss" else "gate.weight"].T + w.get("router.bias", 0.0)
    bias = w.get("gate.e_score_correction_bias")
    weights, ids = reference.moe_route(logits, top_k=3, e_score_correction_bias=bias, **routing)
    gate_up, down = w["experts.gate_up_proj"], w["experts.down_proj"]
    options: dict[str, Any] = {}
    if model == "gpt_oss":  # its weights are (E, d, 2n) and (E, n, d)
        gate_up, down = gate_up.swapaxes(1, 2), down.swapaxes(1, 2)
        options = {"activation": "swigluoai", "interleaved": True}
        options |= {"b_gate_up": w["experts.gate_up_proj_bias"], "b_down": w["experts.down_proj_bias"]}
        assert np.max(np.einsum("td,eid->tei", x, gate_up)) > 7.0
    experts_only = reference.fused_moe(x, gate_up, down, weights, ids, **options)
    with torch.no_grad():
        theirs = layer.experts(torch.tensor(x), torch.tensor(ids).long(), torch.tensor(weights))
    close(experts_only, theirs.numpy(), 1e-11)
    shared = "shared_expert" if model == "qwen2_moe" else "shared_experts"
    if f"{shared}.up_proj.weight" in w:
        options["shared_w_gate_up"] = np.concatenate([w[f"{shared}.{half}_proj.weight"] for half in ("gate", "up")])
        options["shared_w_down"] = w[f"{shared}.down_proj.weight"]
    if model == "qwen2_moe":
        options["shared_gate"] = 1 / (1 + np.exp(-x @ w["shared_expert_gate.weight"].T))
    out = reference.fused_moe(x, gate_up, down, weights, ids, **options)
    if model == "gpt_oss":
        close(out, expected[0][0].numpy(), 1e-11)
    else:
        close(out, expected[0].numpy(), 1e-5)


# --------------------------------------------------------------------------------------------------------- assignments


@st.composite
def assignments(draw: st.DrawFn) -> tuple[Array, int, Array | None]:
    """topk_ids with sentinels, strangers and duplicates, the number of experts, and sometimes an expert map."""
    experts, tokens, top_k = draw(st.integers(1, 6)), draw(st.integers(0, 7)), draw(st.integers(1, 4))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    expert_map = None
    known = experts
    if draw(st.booleans()):
        known = experts + draw(st.integers(0, 5))
        expert_map = np.full(known, -1, np.int32)
        expert_map[rng.permutation(known)[:experts]] = rng.permutation(experts)
    ids = rng.integers(-2, known + 2, (tokens, top_k)).astype(draw(st.sampled_from([np.int32, np.int64])))
    return ids, experts, expert_map


def local(i: int, experts: int, expert_map: Array | None) -> int:
    """The expert that an id means here, -1 for none."""
    if expert_map is not None:
        i = int(expert_map[i]) if 0 <= i < len(expert_map) else -1
    return i if 0 <= i < experts else -1


@given(assignments())
def test_permutation_sorts_by_expert_and_keeps_the_order(problem: tuple[Array, int, Array | None]) -> None:
    ids, experts, expert_map = problem
    flat = [local(int(i), experts, expert_map) for i in ids.ravel()]
    expected = sorted((at for at, e in enumerate(flat) if e >= 0), key=lambda at: flat[at])
    offsets, order, inverse = reference.moe_permute(ids, num_experts=experts, expert_map=expert_map)
    assert offsets.dtype == order.dtype == inverse.dtype == np.int32 and inverse.shape == ids.shape
    assert [*offsets] == [sum(0 <= e < bound for e in flat) for bound in range(experts + 1)]
    assert [*order] == [*expected, *[-1] * (ids.size - len(expected))]
    assert [*inverse.ravel()] == [expected.index(at) if e >= 0 else -1 for at, e in enumerate(flat)]


@given(assignments(), st.sampled_from(["swiglu", "relu2"]), st.booleans())
def test_experts_token_by_token(problem: tuple[Array, int, Array | None], activation: str, on_input: bool) -> None:
    ids, experts, expert_map = problem
    rng = np.random.default_rng(ids.size + experts)
    x, weights = rng.standard_normal((len(ids), 4)), rng.standard_normal(ids.shape)
    w_in = rng.standard_normal((experts, 6 if activation == "swiglu" else 3, 4))
    w_out, b_in, b_out = (rng.standard_normal((experts, *s)) for s in ((4, 3), w_in.shape[1:2], (4,)))
    expected = np.zeros_like(x)
    for t, k in np.ndindex(ids.shape):
        e = local(int(ids[t, k]), experts, expert_map)
        if e < 0:
            continue
        h = w_in[e] @ (weights[t, k] * x[t] if on_input else x[t]) + b_in[e]
        a = h[:3] / (1 + np.exp(-h[:3])) * h[3:] if activation == "swiglu" else np.where(h > 0, h, 0) ** 2
        expected[t] += (1.0 if on_input else weights[t, k]) * (w_out[e] @ a + b_out[e])
    options: dict[str, Any] = {"b_gate_up": b_in, "b_down": b_out, "expert_map": expert_map, "activation": activation}
    close(reference.fused_moe(x, w_in, w_out, weights, ids, **options, apply_router_weight_on_input=on_input), expected)


@pytest.mark.parametrize("ranks", [2, 3])
def test_expert_parallel_parts_add_up(ranks: int, rng: Rng) -> None:
    arrays, options = make("all experts", rng)
    whole = reference.fused_moe(**arrays, **options)
    owner = rng.permutation(6) % ranks
    total = np.zeros_like(whole)
    for rank in range(ranks):
        mine = rng.permutation(np.flatnonzero(owner == rank))  # local order need not be the global one
        expert_map = np.full(6, -1, np.int32)
        expert_map[mine] = np.arange(len(mine))
        part = {**arrays, "w_gate_up": arrays["w_gate_up"][mine], "w_down": arrays["w_down"][mine]}
        total += reference.fused_moe(**part, **options, expert_map=expert_map)
    close(total, whole)


# --------------------------------------------------------------------------------------------------------- grouped_gemm


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("gathered", [False, True])
@pytest.mark.parametrize("ends", [(0, 3, 3, 9), (2, 2, 7, 8), (0, 0, 0, 0), (0, 9, 9, 9), (4, 4, 4, 4)])
def test_grouped_gemm_by_offsets(ends: tuple[int, ...], gathered: bool, biased: bool, rng: Rng) -> None:
    x, w, bias = (rng.standard_normal(s) for s in ((5 if gathered else 9, 8), (3, 16, 8), (3, 16)))
    rows = np.array([4, 0, 0, -1, 3, 5, 2, 1, -9] if gathered else range(9), np.int32)  # -1, 5 and -9 are no rows of x
    options: dict[str, Any] = {"offsets": np.array(ends, np.int32)}
    options |= {"gather_indices": rows} if gathered else {}
    options |= {"bias": bias} if biased else {}
    expected = np.full((9, 16), np.nan)
    for e, (start, stop) in enumerate(itertools.pairwise(ends)):
        for r in range(start, stop):
            source = x[rows[r]] if 0 <= rows[r] < len(x) else np.zeros(8)
            expected[r] = [source @ w[e, i] + (bias[e, i] if biased else 0.0) for i in range(16)]
    out = reference.grouped_gemm(x, w, **options)
    assert out.dtype == np.float64
    close(out, np.nan_to_num(expected, nan=0.0))  # rows of no group are 0
    given_out = np.full((9, 16), np.nan)
    assert reference.grouped_gemm(x, w, **options, out=given_out) is given_out
    close(given_out, expected)  # or untouched


@pytest.mark.parametrize("biased", [False, True])
def test_grouped_gemm_by_group_sizes(biased: bool, rng: Rng) -> None:
    torch = pytest.importorskip("torch")
    x, w, bias = (rng.standard_normal(s) for s in ((4, 5, 8), (4, 16, 8), (4, 16)))
    sizes = np.array([5, 0, 2, 1], np.int32)
    used = np.arange(5) < sizes[:, None]
    x[~used] = np.nan
    expected = torch.bmm(torch.tensor(x), torch.tensor(w).mT).numpy() + (bias[:, None] if biased else 0.0)
    options: dict[str, Any] = {"group_sizes": sizes, "bias": bias if biased else None}
    out = reference.grouped_gemm(x, w, **options)
    close(out, np.where(used[..., None], expected, 0.0))
    given_out = np.full((4, 5, 16), 7.0)
    close(reference.grouped_gemm(x, w, **options, out=given_out), np.where(used[..., None], expected, 7.0))


@pytest.mark.parametrize("case", ["swiglu", "biases", "all experts"])
def test_the_building_blocks_make_the_layer(case: str, rng: Rng) -> None:
    torch = pytest.importorskip("torch")
    arrays, options = make(case, rng)
    arrays["topk_ids"][2, 0], arrays["topk_ids"][4, 1] = -1, len(arrays["w_down"])
    ids, weights = arrays["topk_ids"], arrays["topk_weights"]
    offsets, order, inverse = reference.moe_permute(ids, num_experts=len(arrays["w_down"]))
    rows = np.where(order >= 0, order // ids.shape[1], -1)
    h = reference.grouped_gemm(
        arrays["x"], arrays["w_gate_up"], offsets=offsets, gather_indices=rows, bias=arrays.get("b_gate_up")
    )
    a = torch_activation(torch, torch.tensor(h), options).numpy()
    y = reference.grouped_gemm(a, arrays["w_down"], offsets=offsets, bias=arrays.get("b_down"))
    picked = np.where(inverse[..., None] >= 0, y[inverse], 0.0)
    close(reference.fused_moe(**arrays, **options), np.einsum("tk,tkd->td", weights, picked))


# ----------------------------------------------------------------------------------------------------------- properties


@pytest.mark.parametrize("case", ["swiglu", "gpt-oss", "shared, gated", "weight on input"])
def test_permutations(case: str, rng: Rng) -> None:
    """Tokens may come in any order, choices of a token too, and experts may be renamed."""
    arrays, options = make(case, rng)
    out = reference.fused_moe(**arrays, **options)
    tokens = rng.permutation(len(out))
    per_token = ("x", "topk_weights", "topk_ids", "shared_gate")
    moved = {name: a[tokens] if name in per_token else a for name, a in arrays.items()}
    close(reference.fused_moe(**moved, **options), out[tokens])
    slots = rng.permutation(arrays["topk_ids"].shape[1])
    moved = arrays | {name: arrays[name][:, slots] for name in ("topk_weights", "topk_ids")}
    close(reference.fused_moe(**moved, **options), out)
    names = rng.permutation(len(arrays["w_down"]))
    per_expert = ("w_gate_up", "w_down", "b_gate_up", "b_down")
    moved = {name: a[names] if name in per_expert else a for name, a in arrays.items()}
    moved["topk_ids"] = np.argsort(names)[arrays["topk_ids"]]
    close(reference.fused_moe(**moved, **options), out)


def test_the_same_expert_twice_counts_twice(rng: Rng) -> None:
    arrays, options = make("biases", rng)
    arrays["topk_ids"][:] = arrays["topk_ids"][:, :1]
    once = {**arrays, "topk_ids": arrays["topk_ids"][:, :1]}
    once["topk_weights"] = arrays["topk_weights"].sum(1, keepdims=True)
    close(reference.fused_moe(**arrays, **options), reference.fused_moe(**once, **options))


def test_interleaved_rows_are_the_same_rows(rng: Rng) -> None:
    arrays, options = make("gpt-oss", rng)
    n = arrays["w_down"].shape[2]
    halves = np.concatenate([np.arange(n) * 2, np.arange(n) * 2 + 1])
    apart = arrays | {name: arrays[name][:, halves] for name in ("w_gate_up", "b_gate_up")}
    close(reference.fused_moe(**apart, **{**options, "interleaved": False}), reference.fused_moe(**arrays, **options))


def test_nan_stays_where_it_is_used(rng: Rng) -> None:
    arrays, options = make("biases", rng)
    ids = arrays["topk_ids"]
    ids[:, 0] = np.where(ids[:, 0] == 3, -1, ids[:, 0])
    ids[5] = [-1, 5, -1]
    clean = reference.fused_moe(**arrays, **options)
    assert not clean[5].any()
    for name in ("w_gate_up", "w_down", "b_gate_up", "b_down"):
        broken = {**arrays, name: arrays[name].copy()}
        broken[name][3] = np.nan
        out, hit = reference.fused_moe(**broken, **options), (ids == 3).any(1)
        assert hit.any() and not hit.all()
        np.testing.assert_array_equal(np.isnan(out), np.repeat(hit[:, None], out.shape[1], 1))
        np.testing.assert_array_equal(out[~hit], clean[~hit])
    arrays["x"][5] = np.nan  # all its assignments are skipped
    arrays["topk_weights"][ids == -1] = np.nan
    np.testing.assert_array_equal(reference.fused_moe(**arrays, **options), clean)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_inputs_of_any_dtype_are_computed_in_float64(dtype: str, rng: Rng) -> None:
    arrays, options = make("shared, gated", rng)
    low = {n: a if n == "topk_ids" else a.astype(getattr(ml_dtypes, dtype, dtype)) for n, a in arrays.items()}
    wide = {n: a if n == "topk_ids" else a.astype(np.float64) for n, a in low.items()}
    expected = reference.fused_moe(**wide, **options)
    np.testing.assert_array_equal(reference.fused_moe(**low, **options), expected)
    out = np.full_like(low["x"], np.nan)
    assert reference.fused_moe(**low, **options, out=out) is out
    np.testing.assert_array_equal(out, expected.astype(out.dtype))


def test_large_values_saturate_the_gates_quietly() -> None:
    x, w_out = np.array([[1.0]]), np.ones((1, 1, 1))
    one: Any = (np.ones((1, 1)), np.zeros((1, 1), np.int32))
    top = 21.0 / (1.0 + np.exp(-7.0 * 1.702))
    for activation, high in (("swiglu", 2e4), ("geglu", 2e4), ("geglu_tanh", 2e4), ("swigluoai", top)):
        for gate, expected in ((1e4, high), (-1e4, 0.0)):
            w_in = np.array([[[gate], [2.0]]])
            close(reference.fused_moe(x, w_in, w_out, *one, activation=activation), [[expected]])
    far = reference.fused_moe(x, np.full((1, 1, 1), -12.0), w_out, *one, activation="gelu")
    close(far * 1e30, [[-12.0 * 1.776482112077679e-33 * 1e30]], 1e-12)  # Phi(-12), which 1 + erf would lose


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"activation": "silu"}, "activation"),
        ({"x": np.ones((3, 1, 8))}, "x must be"),
        ({"w_gate_up": np.ones((5, 8, 32))}, "needs"),
        ({"w_gate_up": np.ones((5, 16, 8))}, "needs"),
        ({"w_down": np.ones((5, 16, 8))}, "needs"),
        ({"w_down": np.ones((4, 8, 16))}, "needs"),
        ({"activation": "relu"}, "needs"),
        ({"activation": "relu", "w_gate_up": np.ones((5, 16, 8)), "interleaved": True}, "interleaved"),
        ({"topk_ids": np.zeros((3, 1), np.int32)}, "topk_ids"),
        ({"topk_ids": np.zeros(6, np.int32)}, "topk_ids"),
        ({"topk_ids": np.zeros((4, 2), np.int32), "topk_weights": np.ones((4, 2))}, "topk_ids"),
        ({"expert_map": np.zeros((2, 2), np.int32)}, "expert_map"),
        ({"b_gate_up": np.ones((5, 16))}, "b_gate_up"),
        ({"b_down": np.ones((5, 16))}, "b_down"),
        ({"shared_w_down": np.ones((8, 16))}, "together"),
        ({"shared_gate": np.ones(3)}, "shared_gate"),
        ({"shared_w_gate_up": np.ones((16, 8)), "shared_w_down": np.ones((8, 16))}, "needs"),
        ({"shared_w_gate_up": np.ones((32, 8)), "shared_w_down": np.ones((8, 16)), "shared_gate": np.ones(4)}, "gate"),
        ({"out": np.ones((3, 16))}, "out must be"),
    ],
)
def test_wrong_arguments_are_refused(change: dict[str, Any], word: str) -> None:
    arguments: dict[str, Any] = {"x": np.ones((3, 8)), "w_gate_up": np.ones((5, 32, 8)), "w_down": np.ones((5, 8, 16))}
    arguments |= {"topk_weights": np.ones((3, 2)), "topk_ids": np.zeros((3, 2), np.int32)}
    with pytest.raises(ValueError, match=word):
        reference.fused_moe(**(arguments | change))


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"offsets": None}, "either"),
        ({"group_sizes": np.zeros(2, int)}, "either"),
        ({"w": np.ones((2, 16, 4))}, "do not fit"),
        ({"bias": np.ones((2, 8))}, "bias"),
        ({"offsets": np.array([0, 2])}, "offsets"),
        ({"offsets": np.array([0, 2, 1])}, "offsets"),
        ({"offsets": np.array([0, 2, 7])}, "offsets"),
        ({"offsets": None, "group_sizes": np.array([3, 3])}, "max_rows"),
        ({"offsets": None, "group_sizes": np.array([3, 4]), "x": np.ones((2, 3, 8))}, "group_sizes"),
        ({"offsets": None, "group_sizes": np.array([3, 3]), "gather_indices": np.zeros(3, int)}, "gather_indices"),
        ({"x": np.ones((2, 3, 8))}, "offsets"),
        ({"out": np.ones((6, 8))}, "out must be"),
    ],
)
def test_wrong_groups_are_refused(change: dict[str, Any], word: str) -> None:
    arguments: dict[str, Any] = {"x": np.ones((6, 8)), "w": np.ones((2, 16, 8)), "offsets": np.array([0, 2, 6])}
    with pytest.raises(ValueError, match=word):
        reference.grouped_gemm(**(arguments | change))
