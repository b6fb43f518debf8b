"""The NumPy back end of mixture of experts against dense float64 computations in torch: all experts on all tokens."""

from __future__ import annotations

import itertools
import tracemalloc
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from flashmoe_cupy import fused_moe, grouped_gemm, moe_permute
from flashmoe_cupy.cpu import activation as activations
from flashmoe_cupy.cpu import moe as module

torch: Any = pytest.importorskip("torch")
F: Any = torch.nn.functional
pytestmark = pytest.mark.torch

Tensors = dict[str, Any]

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
EXACT = 1e-6  # relative Frobenius error that float32 arithmetic may add
ROW = 5e-6  # the same for the worst token
EPS = {"float32": 0.0, "float16": 2.0**-11, "bfloat16": 2.0**-8}  # half a step of the result's own dtype
GATED = ("swiglu", "geglu", "geglu_tanh", "swigluoai")
PLAIN = ("gelu", "gelu_tanh", "relu", "relu2")


# ---------------------------------------------------------------------------------------------------------------------
# the dense computation


def activate(
    name: str, h: Any, interleaved: bool = False, alpha: float | None = None, limit: float | None = None
) -> Any:  # fmt: skip
    if name in PLAIN:
        return {
            "gelu": F.gelu, "gelu_tanh": lambda z: F.gelu(z, approximate="tanh"), "relu": F.relu,
            "relu2": lambda z: F.relu(z) ** 2,
        }[name](h)  # fmt: skip
    gate, up = (h[..., ::2], h[..., 1::2]) if interleaved else h.chunk(2, dim=-1)
    if name == "swigluoai":
        limit = 7.0 if limit is None else limit
    if limit is not None:
        gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
    if name == "swigluoai":
        return (up + 1) * gate * torch.sigmoid((1.702 if alpha is None else alpha) * gate)
    form = {"swiglu": F.silu, "geglu": F.gelu, "geglu_tanh": lambda z: F.gelu(z, approximate="tanh")}
    return form[name](gate) * up


def dense(
    x: Any, w_gate_up: Any, w_down: Any, topk_weights: Any, topk_ids: Any, *, activation: str = "swiglu",
    b_gate_up: Any = None, b_down: Any = None, interleaved: bool = False, swiglu_alpha: float | None = None,
    swiglu_limit: float | None = None, expert_map: Any = None, apply_router_weight_on_input: bool = False,
    shared_w_gate_up: Any = None, shared_w_down: Any = None, shared_gate: Any = None, batch_invariant: bool = False,
) -> Any:  # fmt: skip
    """float64, with the roundings to x's dtype that the operation promises."""
    experts, tokens = len(w_gate_up), len(x)

    def rounded(a: Any) -> Any:
        return a.to(x.dtype).double()

    def every_expert(xs: Any, w1: Any, w2: Any, b1: Any, b2: Any) -> Any:
        h = torch.einsum("td,emd->tem", xs, w1.double())
        h = h if b1 is None else h + b1.double()
        a = rounded(activate(activation, h, interleaved, swiglu_alpha, swiglu_limit))
        y = torch.einsum("ten,edn->ted", a, w2.double())
        return rounded(y if b2 is None else y + b2.double())

    ids, weights = topk_ids.long(), topk_weights.double()
    if expert_map is not None:
        there = (ids >= 0) & (ids < len(expert_map))
        table = torch.cat([expert_map.long(), torch.tensor([-1])])
        ids = table[torch.where(there, ids, len(expert_map))]
    ids = torch.where((ids >= 0) & (ids < experts), ids, experts)  # a column for those who are nowhere
    out = torch.zeros(tokens, x.shape[1], dtype=torch.float64)
    if apply_router_weight_on_input:
        for k in range(ids.shape[1]):
            y = every_expert(x.double() * weights[:, k, None], w_gate_up, w_down, b_gate_up, b_down)
            out += torch.einsum("te,ted->td", F.one_hot(ids[:, k], experts + 1)[:, :-1].double(), y)
    else:
        matrix = torch.zeros(tokens, experts + 1, dtype=torch.float64).scatter_add_(1, ids, weights)
        y = every_expert(x.double(), w_gate_up, w_down, b_gate_up, b_down)
        out += torch.einsum("te,ted->td", matrix[:, :-1], y)
    if shared_w_gate_up is not None:
        y = every_expert(x.double(), shared_w_gate_up[None], shared_w_down[None], None, None)[:, 0]
        out += y if shared_gate is None else y * shared_gate.double().reshape(-1, 1)
    return out


def problem(
    tokens: int, experts: int, k: int, *, d: int = 24, n: int = 16, dtype: str = "float32",
    activation: str = "swiglu", seed: int = 0, ids: str = "distinct",
) -> Tensors:  # fmt: skip
    """Tensors of one call. ids: "distinct" for a token, "any" with repeats and sentinels, or a number: all to it."""
    r = torch.Generator().manual_seed(seed)
    kind = DTYPES[dtype]
    rows = 2 * n if activation in GATED else n
    a = {
        "x": torch.randn(tokens, d, generator=r), "w_gate_up": torch.randn(experts, rows, d, generator=r) * 2 / d**0.5,
        "w_down": torch.randn(experts, d, n, generator=r) / n**0.5,
    }  # fmt: skip
    a = {name: t.to(kind) for name, t in a.items()}
    a["topk_weights"] = torch.rand(tokens, k, generator=r) + 0.1
    if ids == "distinct":
        chosen = torch.rand(tokens, experts, generator=r).argsort(1)[:, :k]
    elif ids == "any":
        chosen = torch.randint(-1, experts + 1, (tokens, k), generator=r)
    else:
        chosen = torch.full((tokens, k), int(ids))
    a["topk_ids"] = chosen.to(torch.int32)
    return a


def check(out: Any, ref: Any, dtype: str) -> None:
    """out is the float64 result rounded to its dtype, up to the error of float32 arithmetic."""
    assert type(out) is torch.Tensor and out.dtype == DTYPES[dtype] and out.shape == ref.shape
    error = out.double() - ref
    assert bool(torch.isfinite(error).all())
    assert error.norm() <= (EXACT + EPS[dtype]) * ref.norm()
    assert bool((error.norm(dim=1) <= (ROW + EPS[dtype]) * ref.norm(dim=1) + 1e-30).all())


def check_call(a: Tensors, **options: Any) -> None:
    check(fused_moe(**a, **options), dense(**a, **options), str(a["x"].dtype).removeprefix("torch."))


# ---------------------------------------------------------------------------------------------------------------------
# experts

COUNTS = [(e, k) for e in (1, 3, 5, 160) for k in sorted({1, min(e, 4), e})]


@pytest.mark.parametrize(("experts", "k"), COUNTS, ids=str)
@pytest.mark.parametrize("tokens", [0, 1, 7, 129])
def test_sizes(tokens: int, experts: int, k: int) -> None:
    dims: Any = {"d": 8, "n": 8} if experts == 160 else {"d": 40, "n": 24}
    check_call(problem(tokens, experts, k, ids="distinct", **dims))
    check_call(problem(tokens, experts, k, ids="any", seed=1, **dims))


@pytest.mark.parametrize("activation", (*GATED, *PLAIN))
@pytest.mark.parametrize("dtype", DTYPES)
def test_activations_and_dtypes(dtype: str, activation: str) -> None:
    a = problem(33, 4, 2, d=64, n=72, dtype=dtype, activation=activation)
    check_call(a, activation=activation)
    r = torch.Generator().manual_seed(5)
    for kind in (torch.float32, DTYPES[dtype]):
        b = {"b_gate_up": torch.randn(a["w_gate_up"].shape[:2], generator=r).to(kind)}
        check_call(a | b, activation=activation)
        b["b_down"] = torch.randn(4, 64, generator=r).to(kind)
        check_call(a | b, activation=activation)
        if activation in GATED:
            check_call(a | b, activation=activation, interleaved=True)


def test_the_clamp_of_swigluoai() -> None:
    a = problem(33, 4, 2, d=64, n=72, activation="swigluoai")
    a["x"] *= 6  # many values beyond the limit, on both sides
    ends = [dense(**a, activation="swigluoai", swiglu_limit=limit) for limit in (0.5, 7.0, 1e9)]
    assert min((p - q).norm() / p.norm() for p, q in itertools.combinations(ends, 2)) > 0.05
    for limit in (0.5, 7.0, 1e9, np.inf):
        check_call(a, activation="swigluoai", swiglu_limit=limit, swiglu_alpha=1.3)


@pytest.mark.parametrize("interleaved", [False, True])
def test_the_clamp_of_swiglu(interleaved: bool) -> None:
    a = problem(33, 4, 2, d=64, n=72)
    a["x"] *= 6
    ends = [dense(**a, swiglu_limit=limit, interleaved=interleaved) for limit in (0.5, 7.0, None)]
    assert min((p - q).norm() / p.norm() for p, q in itertools.combinations(ends, 2)) > 0.02
    for limit in (0.5, 7.0, 1e9, 1e300, np.inf, None):
        check_call(a, swiglu_limit=limit, interleaved=interleaved)


def test_gelu_everywhere() -> None:
    """The table and its series against float64, from where the result is 0 to where it is x."""
    x = np.concatenate([np.linspace(-20, 20, 100_001), [0.0, -0.0, 1e30, -1e30, 14.0, -14.0, 6.0]]).astype(np.float32)
    ref = torch.from_numpy(x).double()
    ref = (ref * 0.5 * torch.special.erfc(-ref / 2**0.5)).numpy()
    value = activations._gelu(x)
    np.testing.assert_allclose(value, ref, rtol=1e-6, atol=1e-9)
    with np.errstate(all="ignore"):
        assert np.isnan(activations._gelu(np.array([np.nan], np.float32))).all()
        assert activations._gelu(np.array([np.inf], np.float32))[0] == np.inf


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("target", ["0", "3"])
def test_all_tokens_to_one_expert(dtype: str, target: str) -> None:
    check_call(problem(130, 4, 2, dtype=dtype, ids=target))


@pytest.mark.parametrize("dtype", DTYPES)
def test_sentinels(dtype: str) -> None:
    """-1 and E contribute nothing; a token with nothing else gets 0."""
    a = problem(40, 5, 3, dtype=dtype, ids="any")
    a["topk_ids"][::4] = -1
    a["topk_ids"][1::4, 0], a["topk_ids"][1::4, 2] = 5, -1
    a["topk_weights"][::4] = float("nan")
    out = fused_moe(**a)
    assert bool((out[::4] == 0).all()) and bool((out[1::4] != 0).any())
    a["topk_weights"][::4] = 1.0
    check(out, dense(**a), dtype)
    a["topk_ids"][:] = -1
    assert bool((fused_moe(**a) == 0).all())


@pytest.mark.parametrize("ids", [torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize("weights", [torch.float32, torch.bfloat16], ids=str)
def test_dtypes_of_ids_and_weights(ids: Any, weights: Any) -> None:
    a = problem(20, 5, 3, dtype="bfloat16", ids="any")
    a["topk_ids"], a["topk_weights"] = a["topk_ids"].to(ids), a["topk_weights"].to(weights)
    check_call(a)


def test_expert_map() -> None:
    """12 global experts of which 5 are here, in another order; ids of nobody and entries of nobody count as absent."""
    table = torch.tensor([-1, 3, -1, 0, 4, -1, 1, -1, 2, -1, 65537, -5], dtype=torch.int32)
    a = problem(60, 5, 4, ids="any")
    a["topk_ids"] = torch.randint(-2, 14, (60, 4), dtype=torch.int64)
    check_call(a, expert_map=table)
    assert bool((fused_moe(**a, expert_map=table[:0]) == 0).all())
    ranks = torch.zeros(60, 24)
    for first, last in ((0, 2), (2, 5)):  # what two machines add up to is what one gives
        own = {name: a[name][first:last] for name in ("w_gate_up", "w_down")}
        here = (table >= first) & (table < last)
        ranks += fused_moe(**a | own, expert_map=torch.where(here, table - first, -1))
    check(ranks, dense(**a, expert_map=table), "float32")


@pytest.mark.parametrize("dtype", DTYPES)
def test_router_weight_on_input(dtype: str) -> None:
    """With biases and K > 1, where it is not the same as a weight behind."""
    a = problem(30, 4, 3, dtype=dtype, ids="any")
    a["b_gate_up"], a["b_down"] = torch.randn(4, 32), torch.randn(4, 24)
    check_call(a, apply_router_weight_on_input=True)
    on_input, behind = fused_moe(**a, apply_router_weight_on_input=True), fused_moe(**a)
    assert (on_input - behind).double().norm() > 0.1 * behind.double().norm()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("gate", ["none", "(T,)", "(T, 1)"])
def test_shared_expert(dtype: str, gate: str) -> None:
    for activation, interleaved in (("swiglu", False), ("geglu", True), ("relu2", False)):
        a = problem(30, 4, 2, dtype=dtype, activation=activation, ids="any")
        rows = 2 * 56 if activation in GATED else 56
        a["shared_w_gate_up"] = (torch.randn(rows, 24) / 3).to(DTYPES[dtype])
        a["shared_w_down"] = (torch.randn(24, 56) / 6).to(DTYPES[dtype])
        if gate != "none":
            g = torch.rand(30) if gate == "(T,)" else torch.rand(30, 1).to(DTYPES[dtype])
            a["shared_gate"] = g
        check_call(a, activation=activation, interleaved=interleaved)
        check_call(a, activation=activation, interleaved=interleaved, apply_router_weight_on_input=True)
    a["topk_ids"][:] = -1
    check_call(a, activation="relu2")


@pytest.mark.parametrize("dtype", DTYPES)
def test_strided_arguments(dtype: str) -> None:
    a = problem(30, 4, 2, dtype=dtype, ids="any")
    kind = DTYPES[dtype]
    wide = {name: torch.full((*t.shape[:-1], t.shape[-1] + 8), 7.0, dtype=t.dtype) for name, t in a.items()}
    for name, t in a.items():
        wide[name][..., : t.shape[-1]] = t
    views = {name: w[..., : a[name].shape[-1]] for name, w in wide.items()}
    views["w_down"] = torch.cat([a["w_down"]] * 2, 1).reshape(4, 2, 24, 16)[:, 1]  # from expert to expert: other steps
    views["b_down"] = torch.randn(1, 24).to(kind).expand(4, 24)
    assert all(not v.is_contiguous() for v in views.values())
    target = torch.full((30, 50), 9.0, dtype=kind)
    out = fused_moe(**views, out=target[:, 8:32])
    assert out.data_ptr() == target[:, 8:32].data_ptr() and bool((target[:, :8] == 9).all())
    assert bool((target[:, 32:] == 9).all())
    check(out, dense(**a, b_down=views["b_down"]), dtype)
    same = {name: v.expand(4, -1, -1) for name, v in (("w_gate_up", a["w_gate_up"][:1]), ("w_down", a["w_down"][:1]))}
    check_call(a | same)


def test_backward_strides_of_numpy() -> None:
    a = {name: t.numpy() for name, t in problem(30, 4, 2).items()}
    turned = {name: np.ascontiguousarray(v[:, ::-1])[:, ::-1] for name, v in a.items() if name.startswith("w_")}
    np.testing.assert_allclose(fused_moe(**a | turned), fused_moe(**a), rtol=1e-5, atol=1e-6)


def test_out_is_overwritten() -> None:
    a = problem(9, 3, 2, dtype="bfloat16", ids="any")
    out = torch.full((9, 24), float("nan"), dtype=torch.bfloat16)
    assert fused_moe(**a, out=out) is out
    check(out, dense(**a), "bfloat16")


def test_weights_of_idle_experts_are_not_read() -> None:
    a = problem(50, 6, 2)
    a["topk_ids"] = a["topk_ids"] % 3 * 2
    for name in ("w_gate_up", "w_down"):
        a[name][1::2] = float("nan")
    assert bool(torch.isfinite(fused_moe(**a)).all())


def test_more_than_2_to_the_31_elements() -> None:
    """Weights of a million experts, all at one place in memory."""
    a = problem(6, 1, 2, d=64, n=32, ids="0")
    wide = {name: a[name].expand(2**20, -1, -1) for name in ("w_gate_up", "w_down")}
    wide["topk_ids"] = torch.tensor([[0, 2**20 - 1], [2**19, 5], [7, 7], [-1, 3], [2**20, 1], [2, 1000]])
    known = wide["topk_ids"] % 2**20 == wide["topk_ids"]
    one = a | {"topk_ids": torch.where(known, 0, -1)}
    check(fused_moe(**a | wide), dense(**one), "float32")


def test_where_values_are_rounded() -> None:
    """Sums that are exact in float32: h stays 257, a is rounded to 256 in bfloat16, y is rounded, the sum is not."""
    x = torch.zeros(1, 8, dtype=torch.bfloat16)
    x[0, :2] = torch.tensor([256.0, 1.0])
    w1, w2 = torch.zeros(2, 8, 8, dtype=torch.bfloat16), torch.zeros(2, 8, 8, dtype=torch.bfloat16)
    w1[:, 0, :2] = 1
    w2[0, 0, 0], w2[1, 0, 0] = 1, 1
    weights, ids = torch.tensor([[1.0, -1.0]]), torch.tensor([[0, 1]])
    bias = torch.tensor([[0.0] * 8, [-256.0] + [0.0] * 7])
    call = {"x": x, "w_gate_up": w1, "w_down": w2, "topk_weights": weights, "topk_ids": ids, "activation": "relu"}
    assert float(fused_moe(**call, b_gate_up=bias)[0, 0]) == 255.0  # round(257) - round(257 - 256): h was not rounded
    down = torch.tensor([[0.0] * 8, [1.0] + [0.0] * 7])
    assert float(fused_moe(**call, b_down=down)[0, 0]) == 0.0  # 256 - round(256 + 1)
    call["topk_weights"] = torch.tensor([[1.0, 2.0**-8]])
    assert float(fused_moe(**call, b_gate_up=bias)[0, 0]) == 256.0
    call["topk_weights"] = torch.tensor([[257.0, -256.0]])
    assert float(fused_moe(**call)[0, 0]) == 256.0  # a weight of 257 is not rounded


# ---------------------------------------------------------------------------------------------------------------------
# blocks, memory, other tokens


@given(
    st.integers(0, 30), st.integers(1, 6), st.integers(1, 5), st.sampled_from([8, 16, 40]), st.sampled_from([8, 24]),
    st.sampled_from(["distinct", "any", "0"]), st.sampled_from(["swiglu", "relu"]), st.booleans(), st.booleans(),
    st.sampled_from([1, 50, 100, 1 << 20]), st.integers(0, 2**16),
)  # fmt: skip
def test_any_mix_in_any_blocks(
    tokens: int, experts: int, k: int, d: int, n: int, ids: str, activation: str, on_input: bool, invariant: bool,
    size: int, seed: int,
) -> None:  # fmt: skip
    k = min(k, experts)
    a = problem(tokens, experts, k, d=d, n=n, ids=ids, activation=activation, seed=seed)
    a["shared_w_gate_up"] = a["w_gate_up"][0, : 8 if activation == "relu" else 16].clone()
    a["shared_w_down"] = a["w_down"][0, :, :8].clone()
    with pytest.MonkeyPatch.context() as patch:  # small blocks, so that small problems cross their edges
        for name in ("_ROWS", "_WEIGHTS", "_RESULTS"):
            patch.setattr(module, name, size)
        check_call(a, activation=activation, apply_router_weight_on_input=on_input, batch_invariant=invariant)


def test_memory_does_not_grow_with_the_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    a = {name: t.numpy() for name, t in problem(3000, 4, 4, d=128, n=64, ids="any").items()}
    out = np.empty((3000, 128), np.float32)
    for name in ("_ROWS", "_WEIGHTS", "_RESULTS"):
        monkeypatch.setattr(module, name, 1 << 14)
    fused_moe(**a, out=out)
    tracemalloc.start()
    try:
        fused_moe(**a, out=out)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 1e6, peak  # the results of all experts would be 6 MB


@pytest.mark.parametrize("activation", ["swiglu", "geglu", "geglu_tanh", "swigluoai", "relu2"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_batch_invariance_is_bitwise(dtype: str, activation: str) -> None:
    """Each token alone, in a part of the batch and in another order gives the same bits."""
    a = problem(129, 5, 2, d=136, n=72, dtype=dtype, activation=activation, ids="any")
    rows = a["w_gate_up"].shape[1]
    fixed: Tensors = {"w_gate_up": a.pop("w_gate_up"), "w_down": a.pop("w_down"), "b_gate_up": torch.randn(5, rows)}
    fixed["shared_w_gate_up"], fixed["shared_w_down"] = fixed["w_gate_up"][0].clone(), fixed["w_down"][0].clone()
    options: Any = {"activation": activation, "batch_invariant": True, "interleaved": activation == "swigluoai"}
    whole = fused_moe(**a, **fixed, **options)
    for part in (*(slice(t, t + 1) for t in range(129)), slice(3, 70), torch.randperm(129)):
        some = fused_moe(**{name: t[part] for name, t in a.items()}, **fixed, **options)
        assert torch.equal(some, whole[part])
    check(whole, dense(**a, **fixed, **options), dtype)


def test_two_runs_give_the_same_bits() -> None:
    a = problem(129, 5, 3, ids="any")
    assert torch.equal(fused_moe(**a), fused_moe(**a))


# ---------------------------------------------------------------------------------------------------------------------
# libraries


def as_numpy(t: Any) -> Any:
    return t.view(torch.int16).numpy().view(ml_dtypes.bfloat16) if t.dtype == torch.bfloat16 else t.numpy()


@pytest.mark.jax
@pytest.mark.parametrize("dtype", DTYPES)
def test_numpy_and_jax_arrays(dtype: str) -> None:
    """The same bits from every library, in an array of that library."""
    jax = pytest.importorskip("jax")
    cpu = jax.devices("cpu")[0]
    a = problem(17, 4, 2, dtype=dtype, ids="any")
    a["shared_w_gate_up"], a["shared_w_down"] = a["w_gate_up"][0].clone(), a["w_down"][0].clone()
    expected = as_numpy(fused_moe(**a))
    of_numpy: Any = {name: as_numpy(t) for name, t in a.items()}
    of_jax: Any = {name: jax.device_put(v, cpu) for name, v in of_numpy.items()}
    out, other = fused_moe(**of_numpy), fused_moe(**of_jax)
    assert type(out) is np.ndarray and isinstance(other, jax.Array)
    assert out.dtype == other.dtype == expected.dtype
    np.testing.assert_array_equal(out, expected)
    np.testing.assert_array_equal(np.asarray(other), expected)
    permuted = moe_permute(of_jax["topk_ids"], num_experts=4)
    assert all(isinstance(p, jax.Array) for p in permuted)
    ends = jax.device_put(np.array([0, 3, 3, 9, 17], np.int32), cpu)
    rows = grouped_gemm(of_jax["x"], of_jax["w_gate_up"], offsets=ends)
    assert isinstance(rows, jax.Array) and rows.dtype == expected.dtype
