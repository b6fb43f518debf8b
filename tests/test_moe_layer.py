"""FlashMoELayer: a router, experts and a shared expert as one object, on arrays of several libraries."""

from __future__ import annotations

import re
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from flashmoe_cupy import FlashMoELayer, RouterStats, fused_moe, moe_route
from flashmoe_cupy.errors import UnsupportedProblem

D, N, E, K, S = 32, 24, 6, 2, 16
KINDS = {"float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}
LIBRARIES = ["numpy", pytest.param("torch", marks=pytest.mark.torch), pytest.param("jax", marks=pytest.mark.jax)]


def weights(dtype: str = "float32", seed: int = 0) -> dict[str, Any]:
    r = np.random.default_rng(seed)
    shapes = {
        "router_weight": (E, D), "router_bias": (E,), "w_gate_up": (E, 2 * N, D), "w_down": (E, D, N),
        "shared_w_gate_up": (2 * S, D), "shared_w_down": (D, S), "shared_gate_weight": (D,),
    }  # fmt: skip
    return {name: (r.standard_normal(shape) / 4).astype(KINDS[dtype]) for name, shape in shapes.items()}


def layer(arrays: dict[str, Any], **options: Any) -> FlashMoELayer:
    return FlashMoELayer(D, E, K, N, **arrays, **options)


def in_library(library: str, a: Any) -> Any:
    if library == "torch":
        torch = pytest.importorskip("torch")
        if a.dtype == ml_dtypes.bfloat16:
            return torch.from_numpy(a.astype(np.float32)).to(torch.bfloat16)
        return torch.from_numpy(a)
    if library == "jax":
        jax = pytest.importorskip("jax")
        return jax.device_put(a, jax.devices("cpu")[0])
    return a


def by_hand(x: Any, w: dict[str, Any], scale: float = 1.0) -> Any:
    """Softmax over the two best, SwiGLU, and the shared expert behind its gate; float64, a token at a time."""
    w = {name: a.astype(np.float64) for name, a in w.items()}
    out = np.zeros(x.shape)

    def swiglu(h: Any) -> Any:
        g, u = np.split(h, 2)
        return g / (1 + np.exp(-g)) * u

    for at in np.ndindex(x.shape[:-1]):
        v = x[at].astype(np.float64)
        logits = w["router_weight"] @ v + w["router_bias"]
        best = np.argsort(-logits)[:K]
        p = np.exp(logits[best] - logits[best].max())
        for e, weight in zip(best, scale * p / p.sum(), strict=True):
            out[at] += weight * (w["w_down"][e] @ swiglu(w["w_gate_up"][e] @ v))
        gate = 1 / (1 + np.exp(-(w["shared_gate_weight"] @ v)))
        out[at] += gate * (w["shared_w_down"] @ swiglu(w["shared_w_gate_up"] @ v))
    return out


@pytest.mark.parametrize("library", LIBRARIES)
@pytest.mark.parametrize("dtype", KINDS)
def test_the_whole_layer(dtype: str, library: str) -> None:
    w = weights(dtype)
    x = np.random.default_rng(1).standard_normal((3, 5, D)).astype(KINDS[dtype])
    held = {name: in_library(library, a) for name, a in w.items()}
    given = in_library(library, x)
    out = layer(held, renormalize=True, routed_scaling_factor=1.5)(given)
    assert type(out) is type(given) and out.dtype == given.dtype and out.shape == given.shape
    value = np.asarray(out.float() if library == "torch" else out).astype(np.float64)
    ref = by_hand(x, w, 1.5)
    step = {"float32": 1e-6, "float16": 2.0**-10, "bfloat16": 2.0**-7}[dtype]  # a few roundings of half a step each
    assert np.linalg.norm(value - ref) <= step * np.linalg.norm(ref)


@pytest.mark.parametrize("shape", [(D,), (0, D), (7, D), (2, 0, D), (2, 3, 4, D)], ids=str)
def test_leading_axes(shape: tuple[int, ...]) -> None:
    w = weights()
    x = np.random.default_rng(1).standard_normal(shape).astype(np.float32)
    out = layer(w, renormalize=True)(x)
    assert out.shape == shape
    np.testing.assert_allclose(out, by_hand(x, w), rtol=1e-4, atol=1e-6)


def test_options_reach_the_operations() -> None:
    r = np.random.default_rng(2)
    w = {n: a for n, a in weights().items() if n in ("router_weight", "w_gate_up", "w_down")}
    x = r.standard_normal((40, D)).astype(np.float32)
    bias = (r.standard_normal(E) / 8).astype(np.float32)
    route: dict[str, Any] = {
        "scoring_func": "sigmoid", "renormalize": True, "routed_scaling_factor": 2.5, "e_score_correction_bias": bias,
        "num_expert_group": 3, "topk_group": 2, "capacity_factor": 0.8,
    }  # fmt: skip
    experts: dict[str, Any] = {
        "activation": "swigluoai", "b_gate_up": r.standard_normal((E, 2 * N)).astype(np.float32),
        "b_down": r.standard_normal((E, D)).astype(np.float32), "interleaved": True, "swiglu_alpha": 1.1,
        "swiglu_limit": 0.5, "apply_router_weight_on_input": True, "batch_invariant": True,
        "expert_map": np.array([5, 4, 3, -1, 1, 0], np.int32),
    }  # fmt: skip
    topk_weights, ids, expected = moe_route(x @ w["router_weight"].T, top_k=K, **route, return_stats=True)
    want = fused_moe(x, w["w_gate_up"], w["w_down"], topk_weights, ids, **experts)
    out, stats = layer(w, **route, **experts)(x, return_stats=True)
    np.testing.assert_array_equal(out, want)
    assert type(stats) is RouterStats
    for a, b in zip(stats, expected, strict=True):
        np.testing.assert_array_equal(a, b)
    for name in (*route, *experts):  # each one matters
        gone = (name, {"num_expert_group": "topk_group", "activation": "swiglu_alpha"}.get(name))
        left = {n: v for n, v in (route | experts).items() if n not in gone}
        changed = layer(w, **left)(x)
        assert name == "batch_invariant" or not np.array_equal(changed, want), name


def test_logits_from_elsewhere() -> None:
    w = weights()
    x = np.random.default_rng(1).standard_normal((2, 5, D)).astype(np.float32)
    logits = (x.reshape(10, D) @ w["router_weight"].T + w["router_bias"]).reshape(2, 5, E)
    expected = layer(w)(x)
    without = {n: a for n, a in w.items() if not n.startswith("router")}
    np.testing.assert_array_equal(layer(without)(x, router_logits=logits), expected)
    assert not np.array_equal(layer(w)(x, router_logits=-logits), expected)
    with pytest.raises(UnsupportedProblem, match=r"no router_weight.*\n.*router_logits"):
        layer(without)(x)


def test_the_router_computes_in_float32() -> None:
    """bfloat16 logits of 256 and 257 would tie, and the lower expert would win."""
    w = weights("bfloat16")
    w["router_weight"][:] = 0
    w["router_weight"][:, 0] = [0, 1, 1, 0, 0, 0]
    w["router_weight"][2, 1] = 1
    x = np.zeros((1, D), ml_dtypes.bfloat16)
    x[0, :2] = 256, 1
    w["router_bias"][:] = 0
    _, stats = FlashMoELayer(D, E, 1, N, **w)(x, return_stats=True)
    assert stats.expert_counts.tolist() == [0, 0, 1, 0, 0, 0]


def test_experts_of_one_of_several_machines() -> None:
    w = weights()
    whole = {n: a for n, a in w.items() if not n.startswith("shared")}
    x = np.random.default_rng(1).standard_normal((9, D)).astype(np.float32)
    total = np.zeros((9, D))
    for first, last in ((0, 4), (4, 6)):
        own = whole | {n: whole[n][first:last] for n in ("w_gate_up", "w_down")}
        table = np.full(E, -1, np.int32)
        table[first:last] = np.arange(last - first)
        total += layer(own, expert_map=table)(x)
    np.testing.assert_allclose(total, layer(whole)(x), rtol=1e-4, atol=1e-6)


def test_shapes_are_checked_when_it_is_made() -> None:
    w = weights()
    wrong: dict[str, Any] = {
        "router_weight": w["router_weight"].T, "router_bias": w["router_bias"][1:], "w_down": w["w_down"][:, :, 8:],
        "w_gate_up": w["w_gate_up"][:, :N], "shared_gate_weight": w["shared_gate_weight"][None],
    }  # fmt: skip
    for name, array in wrong.items():
        with pytest.raises(UnsupportedProblem, match=rf"{name} must have shape \(.*, but has \(") as caught:
            layer(w | {name: array})
        assert len(caught.value.reasons) == 1
    with pytest.raises(UnsupportedProblem) as caught:
        layer(w | wrong)
    assert len(caught.value.reasons) == 5
    with pytest.raises(UnsupportedProblem, match="router_weight is missing"):
        layer(w | {"router_weight": None})
    with pytest.raises(UnsupportedProblem, match="shared_w_gate_up is missing"):
        layer(w | {"shared_w_gate_up": None, "shared_w_down": None})
    with pytest.raises(UnsupportedProblem, match=r"expert_map must have shape \(6,\)"):
        layer(w, expert_map=np.zeros(5, np.int32))
    with pytest.raises(TypeError, match="w_down must be an array"):
        layer(w | {"w_down": [1.0]})
    with pytest.raises(UnsupportedProblem, match="activation is 'silu'; known are swiglu") as caught:
        layer(w, activation="silu")
    assert len(caught.value.reasons) == 1


def told(*sizes: Any, **given: Any) -> UnsupportedProblem:
    with pytest.raises(UnsupportedProblem) as caught:
        FlashMoELayer(*sizes, **given)
    return caught.value


def test_every_reason_is_in_one_error() -> None:
    w = weights()
    wrong: dict[str, Any] = {
        "router_weight": w["router_weight"].T, "w_down": w["w_down"][:, :, 8:], "shared_w_down": w["shared_w_down"].T,
        "router_bias": w["router_bias"].astype(int), "b_gate_up": np.zeros((E, 5), np.float32),
        "b_down": np.zeros((E, D)), "e_score_correction_bias": np.zeros(5, np.float32),
        "expert_map": np.zeros(E, np.int64),
    }  # fmt: skip
    options: dict[str, Any] = {
        "scoring_func": "tanh", "renormalize": 1, "num_expert_group": 4, "topk_group": 5, "capacity_factor": -1.0,
        "interleaved": "no", "swiglu_alpha": 1.0, "batch_invariant": 0,
    }  # fmt: skip
    error = told(D, E, 7, N, **w | wrong | options)
    parts = [
        r"router_weight must have shape \(6, 32\), but has \(32, 6\)",
        r"w_down must have shape \(6, 32, 24\), but has \(6, 32, 16\)", r"shared_w_down must be \(hidden, s\)",
        "router_bias has dtype int64", r"b_gate_up must have shape \(6, 48\)", "b_down has dtype float64",
        r"e_score_correction_bias must have shape \(6,\)", "expert_map has dtype int64",
        "top_k is 7, but there are only 6 experts", "scoring_func is 'tanh'", "renormalize must be a bool",
        "6 experts do not divide", "topk_group is 5, but there are only 4", "capacity_factor must be",
        "interleaved must be a bool", "swiglu_alpha is for", "batch_invariant must be a bool",
        "the last dimension of shared_w_down must be contiguous",
    ]  # fmt: skip
    for part in parts:
        assert sum(bool(re.match(part, reason)) for reason in error.reasons) == 1, (part, error)
    assert len(error.reasons) == len(parts), error
    assert "scoring_func='tanh'" in error.asked and "w_down=float32[6, 32, 16]" in error.asked
    assert "capacity_factor=None drops nothing" in error.hint and "topk_ids" not in error.hint


@pytest.mark.parametrize("size", range(4))
def test_a_wrong_size_hides_nothing_and_adds_nothing(size: int) -> None:
    sizes: list[Any] = [D, E, K, N]
    sizes[size] = str(sizes[size])
    assert len(told(*sizes, **weights()).reasons) == 1
    error = told(*sizes, **weights(), activation="silu", scoring_func="tanh", interleaved=1)
    assert [reason.split()[0] for reason in error.reasons] == [
        ["hidden_size", "num_experts", "top_k", "intermediate_size"][size], "scoring_func", "activation", "interleaved"
    ]  # fmt: skip


def test_the_hint_is_about_the_reasons() -> None:
    w = weights()
    error = told(D, E, K, N, **w | {"w_down": w["w_down"].astype(np.float16)})
    assert len(error.reasons) == 1 and error.hint == "x and all weights share one dtype: bfloat16, float16 or float32"
    torch = pytest.importorskip("torch")
    error = told(D, E, K, N, **w | {"w_down": torch.from_numpy(w["w_down"])})
    assert len(error.reasons) == 1
    assert error.hint == "all arrays of a call belong to one library and lie on one device"
    error = told(D, E, K, N, **w | {"w_down": torch.from_numpy(w["w_down"]).to_sparse()}, scoring_func="tanh")
    assert [reason.split()[0] for reason in error.reasons] == ["w_down:", "scoring_func"]
    with pytest.raises(TypeError, match=r"router_bias must be an array.*; w_down must be an array"):
        layer(w | {"w_down": [1.0], "router_bias": [2.0]})


def test_help_says_what_a_nan_does() -> None:
    assert "NaN" in str(FlashMoELayer.__doc__) and "FLASHMOE_CHECK=1" in str(FlashMoELayer.__doc__)
    w = weights() | {"router_bias": np.array([0, 0, np.nan, 0, 0, 0], np.float32)}
    x = np.random.default_rng(1).standard_normal((50, D)).astype(np.float32)
    out, stats = layer(w)(x, return_stats=True)
    assert np.isfinite(out).all() and stats.expert_counts[2] == 0 and stats.expert_counts.sum() == 50 * K


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"scoring_func": "tanh"}, "scoring_func is 'tanh'; known are"),
        ({"renormalize": 1}, "renormalize must be a bool, but is 1"),
        ({"routed_scaling_factor": "2"}, "routed_scaling_factor must be a number"),
        ({"num_expert_group": 4}, "6 experts do not divide into num_expert_group=4"),
        ({"topk_group": 2}, "topk_group is 2, but there are only 1 groups"),
        ({"capacity_factor": -1.0}, "capacity_factor must be None"),
        ({"e_score_correction_bias": np.zeros(5, np.float32)}, r"e_score_correction_bias must have shape \(6,\)"),
        ({"interleaved": "no"}, "interleaved must be a bool"),
        ({"batch_invariant": 0}, "batch_invariant must be a bool"),
        ({"b_down": np.zeros((E, D))}, "b_down has dtype float64, which must be float32"),
        ({"b_gate_up": np.zeros((E, N), np.float32)}, r"b_gate_up must have shape \(6, 48\)"),
        ({"expert_map": np.zeros(E)}, "expert_map has dtype float64, which must be int32"),
        ({"activation": "relu", "interleaved": True}, "w_gate_up must have shape"),
        ({"shared_w_down": None}, "shared_w_gate_up and shared_w_down go together"),
        ({"w_down": np.zeros((E, D, N), np.float16)}, "dtypes differ: w_gate_up is float32, w_down is float16"),
        ({"w_down": np.zeros((E, N, D), np.float32).swapaxes(1, 2)}, "last dimension of w_down must be contiguous"),
        ({"router_weight": np.zeros((E, D), np.int32)}, "router_weight has dtype int32, which must be a floating one"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)  # fmt: skip
def test_options_are_checked_when_it_is_made(options: dict[str, Any], reason: str) -> None:
    with pytest.raises(UnsupportedProblem, match=reason):
        layer(weights() | options)


@pytest.mark.parametrize(
    ("sizes", "reason"),
    [
        ((float(D), E, K, N), "hidden_size must be an int from 1 on, but is 32.0"),
        ((D, True, K, N), "num_experts must be an int from 1 on, but is True"),
        ((D, E, 0, N), "top_k must be an int from 1 on, but is 0"),
        ((D, E, K, "24"), "intermediate_size must be an int from 1 on, but is '24'"),
        ((D, E, E + 1, N), "top_k is 7, but there are only 6 experts"),
    ],
)
def test_sizes_are_checked_when_it_is_made(sizes: tuple[Any, ...], reason: str) -> None:
    with pytest.raises(UnsupportedProblem, match=reason) as caught:
        FlashMoELayer(*sizes, **weights())
    assert len(caught.value.reasons) == 1
    w: dict[str, Any] = {"w_gate_up": np.zeros((E, 24, 20), np.float32), "w_down": np.zeros((E, 20, 12), np.float32)}
    with pytest.raises(UnsupportedProblem, match=r"d is 20; it must be a multiple of 8[^$]*n is 12"):
        FlashMoELayer(20, E, K, 12, **w)


@pytest.mark.parametrize("library", LIBRARIES)
def test_calls_are_checked(library: str) -> None:
    made = layer({name: in_library(library, a) for name, a in weights().items()})

    def array(*shape: int) -> Any:
        return in_library(library, np.ones(shape, np.float32))

    shapes: list[tuple[int, ...]] = [(5, 2 * D), (5, D // 2), (2, 3, D + 8), (), (D, 5)]
    for shape in shapes:  # some of which regroup into rows of D
        with pytest.raises(UnsupportedProblem, match=r"x must have shape \(..., hidden_size\) = \(..., 32\), but has"):
            made(array(*shape))
    for shape in ((E, 4), (4, E + 2), (2, 2, E), (4 * E,), (5, E)):
        with pytest.raises(UnsupportedProblem, match=r"router_logits must have shape .* = \(4, 6\) beside x"):
            made(array(4, D), router_logits=array(*shape))
    strangers: list[Any] = [[1.0] * D, [[1.0, 2.0], [3.0, 4.0]], None, "x"]
    for wrong in strangers:
        have = "None" if wrong is None else f"a {type(wrong).__name__}"
        with pytest.raises(TypeError, match=rf"x must be an array, a {library}.* like the layer's .*, but is {have}$"):
            made(wrong)
    with pytest.raises(TypeError, match="router_logits must be a"):
        made(array(4, D), router_logits=[1.0])
    with pytest.raises(UnsupportedProblem, match="return_stats must be a bool"):
        made(array(4, D), return_stats="no")  # type: ignore[call-overload]
    assert made(array(4, D), router_logits=array(4, E)).shape == (4, D)


@pytest.mark.torch
def test_torch_and_numpy_do_not_mix() -> None:
    torch = pytest.importorskip("torch")
    x = np.ones((3, D), np.float32)
    held = layer({name: torch.from_numpy(a) for name, a in weights().items()})
    with pytest.raises(UnsupportedProblem, match=r"x is a numpy.ndarray, but the layer's weights are a torch.Tensor"):
        held(x)
    with pytest.raises(UnsupportedProblem, match=r"router_logits is a numpy.ndarray"):
        held(torch.from_numpy(x), router_logits=np.ones((3, E), np.float32))
    with pytest.raises(UnsupportedProblem, match="arguments must be of one library"):
        layer(weights() | {"w_down": held.w_down})


@pytest.mark.torch
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors", "ignore:Sparse")
def test_tensors_without_strides_are_refused_by_name() -> None:
    torch = pytest.importorskip("torch")
    made = layer({name: torch.from_numpy(a) for name, a in weights().items()})
    x, logits = torch.ones(5, D), torch.ones(5, E)
    nested = [torch.nested.nested_tensor([x, x[:3]], layout=kind) for kind in (torch.jagged, torch.strided)]
    for stranger in (*nested, x.to_sparse(), x.to_sparse_csr()):
        for given, more in ((stranger, {}), (x, {"router_logits": stranger}), (stranger, {"router_logits": logits})):
            with pytest.raises(UnsupportedProblem, match=r"it is a nested tensor|is not strided"):
                made(given, **more)
        with pytest.raises(UnsupportedProblem, match=r"w_down: (it is a nested tensor|layout .* is not strided)"):
            layer({name: torch.from_numpy(a) for name, a in weights().items()} | {"w_down": stranger})
    assert made(x, router_logits=logits).shape == x.shape


@pytest.mark.torch
def test_what_it_is_to_torch() -> None:
    pytest.importorskip("torch")
    made = layer(weights())
    with pytest.raises(AttributeError, match=r"'parameters'; it is no nn.Module .*FlashMoE.* comes with training"):
        made.parameters()
    with pytest.raises(AttributeError, match=r"no attribute 'nonsense'$"):
        _ = made.nonsense
    assert not hasattr(made, "__cuda_array_interface__")


@pytest.mark.jax
def test_it_is_a_pytree_of_jax() -> None:
    jax = pytest.importorskip("jax")
    bias = np.linspace(-1, 1, E, dtype=np.float32)
    arrays = weights() | {"e_score_correction_bias": bias, "b_down": np.ones((E, D), np.float32)}
    made = layer({name: in_library("jax", a) for name, a in arrays.items()}, renormalize=True)
    x = in_library("jax", np.random.default_rng(1).standard_normal((5, D)).astype(np.float32))
    want = np.asarray(made(x))
    assert len(jax.tree.leaves(made)) == len(arrays)
    traces = []

    @jax.jit  # type: ignore[untyped-decorator]
    def run(moe: FlashMoELayer, x: Any) -> Any:
        traces.append(moe)
        return moe(x)

    np.testing.assert_allclose(run(made, x), want, rtol=1e-5, atol=1e-6)
    doubled = jax.tree.map(lambda a: 2 * a, made)
    assert type(doubled) is FlashMoELayer and repr(doubled) == repr(made)
    np.testing.assert_array_equal(doubled.w_down, 2 * made.w_down)
    np.testing.assert_allclose(run(doubled, x), doubled(x), rtol=1e-4, atol=1e-5)
    assert len(traces) == 1  # the arrays are arguments, not constants
    other = layer({name: in_library("jax", a) for name, a in arrays.items()})
    np.testing.assert_allclose(run(other, x), other(x), rtol=1e-5, atol=1e-6)
    assert len(traces) == 2


@pytest.mark.torch
def test_gradients_are_not_dropped_in_silence() -> None:
    torch = pytest.importorskip("torch")
    held = {name: torch.from_numpy(a) for name, a in weights().items()}
    held["router_weight"] = torch.nn.Parameter(held["router_weight"])
    x = torch.ones(3, D)
    with torch.no_grad():
        made = layer(held)
        assert made(x).shape == x.shape
    with pytest.raises(UnsupportedProblem, match="no_grad"):
        made(x)


def test_repr() -> None:
    assert repr(layer(weights())) == "FlashMoELayer(32, 6, 2, 24, activation='swiglu')"
