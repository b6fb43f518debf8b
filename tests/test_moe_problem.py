"""Problems of mixture of experts: what a call means, which axes weights came with, and what the GPU hook is given."""

from __future__ import annotations

import math
import pickle
import sys
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
from test_problem import array

import flashmoe_cupy
from flashmoe_cupy import arrays, ops
from flashmoe_cupy.arrays import View
from flashmoe_cupy.dtypes import BF16, FP16, FP32, FP64, INT32, INT64
from flashmoe_cupy.errors import UnsupportedProblem
from flashmoe_cupy.ops import memory
from flashmoe_cupy.plan.kernels import KERNELS
from flashmoe_cupy.plan.moe.problem import GroupedGemmProblem, MoEProblem, grouped_gemm_problem, moe_problem
from flashmoe_cupy.plan.moe.routing import PermuteProblem, RouteProblem, permute_problem, route_problem
from flashmoe_cupy.plan.moe.steps import moe_steps
from flashmoe_cupy.plan.operation import Operation, registered

T, D, N, E, K = 5, 64, 48, 6, 2


def route(**change: Any) -> RouteProblem:
    given: dict[str, Any] = {"logits": array(T, E), "top_k": K} | change
    return route_problem(**given)


def gemm(**change: Any) -> GroupedGemmProblem:
    given: dict[str, Any] = {"x": array(T, D), "w": array(E, N, D), "offsets": array(E + 1, dtype=INT32)} | change
    return grouped_gemm_problem(**given)


def experts(**change: Any) -> MoEProblem:
    given: dict[str, Any] = {
        "x": array(T, D), "w_gate_up": array(E, 2 * N, D), "w_down": array(E, D, N),
        "topk_weights": array(T, K, dtype=FP32), "topk_ids": array(T, K, dtype=INT32),
    } | change  # fmt: skip
    return moe_problem(**given)


def refused(call: Callable[..., Any], **change: Any) -> UnsupportedProblem:
    with pytest.raises(UnsupportedProblem) as caught:
        call(**change)
    return caught.value


# ---------------------------------------------------------------------------------------------------------------------
# what a problem holds


def test_route_fields() -> None:
    p = route()
    assert (p.dtype, p.tokens, p.num_experts, p.top_k, p.logits_stride) == (BF16, T, E, K, E)
    assert (p.scoring_func, p.renormalize, p.routed_scaling_factor, p.bias_dtype) == ("softmax", False, 1.0, None)
    assert (p.num_expert_group, p.topk_group, p.capacity, p.return_stats) == (1, 1, -1, False)
    assert p.describe() == "route bf16 t5 e6 k2 softmax"
    p = route(
        logits=array(T, E, dtype=FP32, strides=(100, 1)), e_score_correction_bias=array(E, dtype=FP32),
        scoring_func="sigmoid",
        renormalize=np.True_, routed_scaling_factor=np.float32(2.5), num_expert_group=np.int64(3), topk_group=2,
        capacity_factor=1, return_stats=True,
    )  # fmt: skip
    assert (p.logits_stride, p.routed_scaling_factor, p.renormalize, p.bias_dtype) == (100, 2.5, True, FP32)
    assert type(p.num_expert_group) is int and p.renormalize is True
    assert p.describe() == "route fp32 t5 e6 k2 sigmoid bias groups2/3 renormalize capacity2 stats"


@pytest.mark.parametrize("factor", [0.0, 0.1, 1.0, 1.1, 1.25, 2, 1e300, np.float32(0.7)])
def test_capacity(factor: Any) -> None:
    for tokens, k, e in ((0, 1, 1), (5, 2, 6), (10, 1, 10), (100, 8, 256)):
        p = route(logits=array(tokens, e), top_k=k, capacity_factor=factor)
        assert p.capacity == min(math.ceil(float(factor) * tokens * k / e), 2**31 - 1)


def test_permute_fields() -> None:
    p = permute_problem(array(T, K, dtype=INT64, strides=(7, 1)), num_experts=np.int32(9))
    assert p == PermuteProblem(INT64, T, K, 7, 9, -1)
    assert p.describe() == "permute int64 t5 k2 e9"
    p = permute_problem(array(0, K, dtype=INT32), array(0, dtype=INT32), num_experts=1)
    assert (p.tokens, p.num_global) == (0, 0)
    assert p.describe() == "permute int32 t0 k2 e1 map0"


def test_gemm_fields() -> None:
    p = gemm()
    assert (p.dtype, p.num_experts, p.rows, p.x_rows, p.n, p.d) == (BF16, E, T, T, N, D)
    assert (p.masked, p.gather, p.new_out, p.bias_dtype, p.bias_stride) == (False, False, True, None, 0)
    assert (p.x_strides, p.w_strides, p.out_strides) == ((0, D), (N * D, D), (0, N))
    out = array(70, N, strides=(50, 1))
    p = gemm(gather_indices=array(70, dtype=INT32), bias=array(E, N, strides=(90, 1)), out=out)
    assert (p.rows, p.x_rows, p.gather, p.new_out, p.out_strides, p.bias_stride) == (70, T, True, False, (0, 50), 90)
    assert p.describe() == "grouped gemm bf16 e6 rows70 n48 d64 gather bias"


def test_masked_gemm_fields() -> None:
    p = gemm(x=array(E, 9, D), offsets=None, group_sizes=array(E, dtype=INT32), w=array(E, N, D, strides=(5000, 72, 1)))
    assert (p.masked, p.rows, p.x_rows, p.x_strides, p.out_strides) == (True, 9, 9, (9 * D, D), (9 * N, N))
    assert p.w_strides == (5000, 72)
    assert p.describe() == "grouped gemm bf16 e6 rows9 n48 d64 masked"


def test_moe_fields() -> None:
    p = experts()
    assert (p.dtype, p.tokens, p.hidden, p.intermediate, p.num_experts, p.top_k) == (BF16, T, D, N, E, K)
    assert (p.x_stride, p.w_gate_up_strides, p.w_down_strides, p.out_stride) == (D, (2 * N * D, D), (D * N, N), D)
    assert (p.topk_weights_dtype, p.topk_weights_stride, p.topk_ids_dtype, p.topk_ids_stride) == (FP32, K, INT32, K)
    assert (p.activation, p.gated, p.interleaved, p.swiglu_alpha, p.swiglu_limit) == ("swiglu", True, False, 0.0, 0.0)
    assert (p.b_gate_up_dtype, p.b_down_dtype, p.num_global, p.weight_on_input) == (None, None, -1, False)
    assert (p.shared, p.shared_gate_dtype, p.batch_invariant) == (0, None, False)
    assert p.describe() == "moe bf16 t5 d64 n48 e6 k2 swiglu"


def test_moe_options() -> None:
    p = experts(
        activation="swigluoai", interleaved=True, b_gate_up=array(E, 2 * N, dtype=FP32), b_down=array(E, D),
        expert_map=array(40, dtype=INT32), apply_router_weight_on_input=True, shared_w_gate_up=array(16, D),
        shared_w_down=array(D, 8, strides=(24, 1)), shared_gate=array(T, 1, strides=(3, 1)), batch_invariant=True,
        out=array(T, D, strides=(200, 1)), swiglu_alpha=2, swiglu_limit=math.inf,
    )  # fmt: skip
    assert (p.swiglu_alpha, p.swiglu_limit, p.b_gate_up_dtype, p.b_gate_up_stride) == (2.0, math.inf, FP32, 2 * N)
    assert (p.b_down_dtype, p.b_down_stride, p.num_global, p.out_stride) == (BF16, D, 40, 200)
    assert (p.shared, p.shared_w_gate_up_stride, p.shared_w_down_stride, p.shared_gate_stride) == (8, D, 24, 3)
    assert p.describe() == (
        "moe bf16 t5 d64 n48 e6 k2 swigluoai interleaved b_gate_up b_down map40 weight-on-input shared8 shared_gate "
        "batch-invariant"
    )
    p = experts(w_gate_up=array(E, N, D), activation="relu2")
    assert (p.intermediate, p.gated, p.swiglu_alpha, p.swiglu_limit) == (N, False, 0.0, 0.0)


def test_alpha_and_limit() -> None:
    """None is each activation's own default. What float32 does not hold clamps nothing, like inf."""
    for options, want in (
        ({}, (0.0, 0.0)), ({"activation": "swigluoai"}, (1.702, 7.0)), ({"swiglu_limit": 10}, (0.0, 10.0)),
        ({"swiglu_limit": math.inf}, (0.0, 0.0)), ({"swiglu_limit": 1e300}, (0.0, 0.0)),
        ({"activation": "swigluoai", "swiglu_limit": 1e300, "swiglu_alpha": 1}, (1.0, math.inf)),
    ):  # fmt: skip
        p = experts(**options)
        assert (p.swiglu_alpha, p.swiglu_limit) == want, options
    assert experts(swiglu_limit=10).describe() == "moe bf16 t5 d64 n48 e6 k2 swiglu limit10"


@pytest.mark.parametrize("activation", ["swiglu", "geglu", "geglu_tanh", "gelu", "gelu_tanh", "relu", "relu2"])
def test_options_that_an_activation_does_not_have(activation: str) -> None:
    """Also at the values that swigluoai has by default."""
    w = {} if activation.startswith(("swi", "geg")) else {"w_gate_up": array(E, N, D)}
    e = refused(experts, activation=activation, swiglu_alpha=1.702, **w)
    assert e.reasons == (f"swiglu_alpha is for activation='swigluoai'; {activation!r} has no use for it",)
    if activation != "swiglu":
        e = refused(experts, activation=activation, swiglu_limit=7.0, **w)
        assert len(e.reasons) == 1 and f"'swiglu' and 'swigluoai'; {activation!r} has no use" in e.reasons[0]


def test_products_of_a_clamped_swiglu() -> None:
    """A configuration of its own for the experts and the shared one; limits do not enter it."""
    shared = {"shared_w_gate_up": array(16, D), "shared_w_down": array(D, 8)}
    for limit, clamped in ((None, False), (math.inf, False), (7.0, True), (0.25, True)):
        steps, _ = moe_steps(experts(swiglu_limit=limit, **shared))
        first, _, one, _ = [step.problem for step in steps if step.task == "grouped_gemm"]
        for kernel, arch in ((KERNELS["grouped_gemm_sm90"], "sm_90a"), (KERNELS["grouped_gemm_sm80"], "sm_80")):
            for product in (first, one):
                config = kernel.choose(product, arch)
                assert config.clamped is clamped and config in kernel.configs(arch)
                assert ("Clamped<fm::GroupedGemm" in kernel.source(config)) is clamped
                assert str(limit) not in kernel.source(config)


def test_rows_of_out_are_aligned_by_address_and_stride() -> None:
    p = experts()

    def aligned(p: MoEProblem) -> bool:
        last: bool = moe_steps(p)[0][-1].problem.rows_aligned
        return last

    for stride, want in ((p.hidden, True), (p.hidden + 8, True), (p.hidden + 1, False), (p.hidden + 4, False)):
        assert aligned(p._replace(out_stride=stride)) is want
    assert aligned(p._replace(out_stride=3, tokens=1))
    assert aligned(p._replace(out_stride=p.hidden + 4, dtype=FP32))
    combine = KERNELS["moe_combine"]
    one = moe_steps(p)[0][-1].problem
    assert [combine.values(one, one.config, on) for on in (True, False)] == [{"aligned": 1}, {"aligned": 0}]


def test_sizes_beyond_32_bits() -> None:
    """Elements may be more than 2**31 in any array; tokens times top_k may not."""
    p = experts(
        x=array(2**20, 7168), w_gate_up=array(384, 4096, 7168), w_down=array(384, 7168, 2048),
        topk_weights=array(2**20, 8, dtype=FP32), topk_ids=array(2**20, 8, dtype=INT32),
    )  # fmt: skip
    assert p.w_gate_up_strides == (4096 * 7168, 7168)
    ids = array(2**29, 4, dtype=INT32)
    assert "2**31" in str(refused(permute_problem, topk_ids=ids, num_experts=4))
    assert "2**31" in str(refused(route, logits=array(2**29, 8), top_k=4))


@pytest.mark.parametrize("call", [route, gemm, experts])
def test_equal_calls_are_equal_problems(call: Callable[..., Any]) -> None:
    a, b = call(), call()
    assert a == b and hash(a) == hash(b) and len({a, b}) == 1
    assert pickle.loads(pickle.dumps(a)) == a
    assert call(**({"logits": array(T, E, dtype=FP16)} if call is route else {"x": array(T, D, strides=(80, 1))})) != a


# ---------------------------------------------------------------------------------------------------------------------
# the axes of weights

LAYOUTS = [
    ((E, D, 2 * N), (E, N, D), "E, hidden, 2n", "E, n, hidden", "0, 2, 1"),
    ((2 * N, D, E), (D, N, E), "2n, hidden, E", "hidden, n, E", "2, 0, 1"),
    ((2 * N, D, E), (N, D, E), "2n, hidden, E", "n, hidden, E", "2, 0, 1"),
    ((D, 2 * N, E), (N, D, E), "hidden, 2n, E", "n, hidden, E", "2, 1, 0"),
    ((E, D, 2 * N), (E, D, N), "E, hidden, 2n", None, "0, 2, 1"),
    ((E, 2 * N, D), (E, N, D), None, "E, n, hidden", "0, 2, 1"),
]


@pytest.mark.parametrize(("gate_up", "down", "first", "second", "axes"), LAYOUTS, ids=str)
@pytest.mark.parametrize("library", ["torch", "numpy", "jax", "cupy"])
def test_layouts_are_named(library: str, gate_up: Any, down: Any, first: Any, second: Any, axes: str) -> None:
    words = {"torch": "permute({}).contiguous()", "numpy": "np.", "jax": "jnp.", "cupy": "cupy."}[library]
    given = {n: array(*s, library=library) for n, s in (("w_gate_up", gate_up), ("w_down", down))}
    ids = array(T, K, dtype=INT32, library=library)
    others = {"x": array(T, D, library=library), "topk_ids": ids, "topk_weights": array(T, K, library=library)}
    reasons = refused(experts, **given, **others).reasons
    expected = [(n, s) for n, s in (("w_gate_up", first), ("w_down", second)) if s is not None]
    assert len(reasons) == len(expected)
    for reason, (name, seen) in zip(reasons, expected, strict=True):
        assert reason.startswith(f"{name} must be (E, ") and f"looks like ({seen}): transpose with" in reason
        assert words.split("{")[0] in reason
    assert f"({axes})" in reasons[0]


def test_the_advice_is_right() -> None:
    """Done as told, the call runs."""
    rng = np.random.default_rng(1)
    x, ids = rng.standard_normal((T, D), np.float32), np.zeros((T, 1), np.int32)
    for gate_up, down, *_ in LAYOUTS:
        w: dict[str, Any] = {"w_gate_up": rng.standard_normal(gate_up), "w_down": rng.standard_normal(down)}
        w = {name: a.astype(np.float32) for name, a in w.items()}
        with pytest.raises(UnsupportedProblem) as caught:
            flashmoe_cupy.fused_moe(x, **w, topk_weights=np.ones((T, 1), np.float32), topk_ids=ids)
        for reason in caught.value.reasons:
            name, repair = reason.split()[0], reason.rpartition("transpose with ")[2]
            w[name] = eval(repair, {"np": np, **w})
        flashmoe_cupy.fused_moe(x, **w, topk_weights=np.ones((T, 1), np.float32), topk_ids=ids)


def test_other_layouts() -> None:
    s = {"shared_w_gate_up": array(16, D), "shared_w_down": array(D, 8)}
    assert "looks like (hidden, 2s)" in str(refused(experts, **s | {"shared_w_gate_up": array(D, 16)}))
    assert "looks like (s, hidden)" in str(refused(experts, **s | {"shared_w_down": array(8, D)}))
    assert "looks like (E, d, n)" in str(refused(gemm, w=array(E, D, N)))
    assert "looks like (n, d, E)" in str(refused(gemm, w=array(N, D, E)))
    assert "differ in d: x has 64" in str(refused(gemm, w=array(E, N, 72)))


def test_squares_are_taken_at_their_word() -> None:
    """Where the sizes are equal no shape can be wrong, and nothing is guessed."""
    assert experts(x=array(T, 48), w_gate_up=array(E, 96, 48), w_down=array(E, 48, 48)).intermediate == 48
    assert gemm(w=array(E, D, D)).n == D


def test_gated_or_not() -> None:
    (reason,) = refused(experts, w_gate_up=array(E, N, D)).reasons
    assert reason.startswith("activation 'swiglu' is gated and needs 2n = 96 rows in w_gate_up, which has 48; 'gelu'")
    assert "'relu' is not gated and needs n = 48" in str(refused(experts, activation="relu"))
    assert "95 rows" in str(refused(experts, w_gate_up=array(E, 95, D)))


def test_every_reason_is_told() -> None:
    change = {"x": array(T, D, dtype=FP64), "activation": "silu", "topk_ids": array(T, K, dtype=FP32)}
    e = refused(experts, **change, swiglu_limit=-1.0, batch_invariant=1, b_down=array(E, D, dtype=INT32))
    assert len(e.reasons) == 6
    e = refused(route, top_k=0, scoring_func="tanh", capacity_factor=math.nan, num_expert_group=4)
    assert len(e.reasons) == 4


# ---------------------------------------------------------------------------------------------------------------------
# plans and the GPU hook, without a GPU: arrays that say they lie on one


class OnDevice:
    """An array on a GPU that does not exist."""

    made = 1 << 20

    def __init__(self, shape: tuple[int, ...], dtype: Any = FP16) -> None:
        OnDevice.made += 1 << 30
        self.view = array(*shape, dtype=dtype, library="torch", ptr=OnDevice.made)

    def data_ptr(self) -> int:
        return self.view.ptr


class Recorder:
    """Stands for ops.gpu."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, Any, Any, Any]] = []
        self.filled: list[tuple[Any, float]] = []  # what arrays.fill was told meanwhile

    def run(self, operation: Operation, problem: Any, views: Any, outputs: Any) -> None:
        self.calls.append((operation.name, problem, views, tuple(outputs.values())))

    def address(self, _: Any, made: Any) -> int:
        return made.data_ptr()  # type: ignore[no-any-return]


@pytest.fixture
def recorder(monkeypatch: pytest.MonkeyPatch) -> Iterator[Recorder]:
    monkeypatch.setitem(arrays.readers._adapters, OnDevice, lambda x, name: x.view)
    monkeypatch.setattr(arrays, "empty", lambda like, shape, dtype: OnDevice(shape, dtype))
    found = Recorder()
    monkeypatch.setattr(arrays, "fill", lambda like, a, value: found.filled.append((a, value)))
    monkeypatch.setattr(ops, "gpu", found, raising=False)
    monkeypatch.setitem(sys.modules, "flashmoe_cupy.ops.gpu", found)
    yield found


def on_device(**shapes: Any) -> dict[str, Any]:
    return {n: OnDevice(*s) if isinstance(s[0], tuple) else OnDevice(s) for n, s in shapes.items()}


def test_the_hook_of_fused_moe(recorder: Recorder) -> None:
    a = on_device(
        x=(T, D), w_gate_up=(E, 2 * N, D), w_down=(E, D, N), topk_weights=((T, K), FP32), topk_ids=((T, K), INT32),
        b_gate_up=(E, 2 * N), b_down=(E, D), expert_map=((9,), INT32), shared_w_gate_up=(16, D), shared_w_down=(D, 8),
        shared_gate=(T,),
    )  # fmt: skip
    assert tuple(a) == registered("fused_moe").arguments
    first = flashmoe_cupy.fused_moe(**a)
    second = flashmoe_cupy.fused_moe(**a)
    optional = ("b_gate_up", "expert_map", "shared_gate")
    flashmoe_cupy.fused_moe(**{n: x for n, x in a.items() if n not in optional}, out=first)
    assert [call[0] for call in recorder.calls] == ["fused_moe"] * 3
    _, problem, views, outputs = recorder.calls[0]
    assert views == tuple(x.view for x in a.values()) and outputs == (first.data_ptr(),)
    assert isinstance(problem, MoEProblem) and problem is recorder.calls[1][1]  # remembered, not validated again
    assert recorder.calls[1][3] == (second.data_ptr(),)
    assert recorder.calls[2][3] == (first.data_ptr(),)
    assert [n for n, v in zip(a, recorder.calls[2][2], strict=True) if v is None] == list(optional)


def test_the_hooks_of_the_other_operations(recorder: Recorder) -> None:
    logits, bias = OnDevice((T, E)), OnDevice((E,), FP32)
    weights, ids, stats = flashmoe_cupy.moe_route(logits, top_k=K, e_score_correction_bias=bias, return_stats=True)
    results = (weights, ids, *stats)
    assert recorder.calls[-1][2:] == ((logits.view, bias.view), tuple(r.data_ptr() for r in results))
    assert [r.view.shape for r in results] == [(T, K), (T, K), (E,), (E,), (), ()]
    assert [r.view.dtype for r in results] == [FP32, INT32, INT32, INT32, FP32, FP32]
    weights, ids = flashmoe_cupy.moe_route(logits, top_k=K)
    assert recorder.calls[-1][2:] == ((logits.view, None), (weights.data_ptr(), ids.data_ptr()))
    given = OnDevice((T, K), INT64)
    permuted = flashmoe_cupy.moe_permute(given, num_experts=E)
    assert recorder.calls[-1][2:] == ((given.view, None), tuple(r.data_ptr() for r in permuted))
    assert [r.view.shape for r in permuted] == [(E + 1,), (T * K,), (T, K)]
    a = on_device(x=(T, D), w=(E, N, D), offsets=((E + 1,), INT32), gather_indices=((9,), INT32), bias=(E, N))
    out = flashmoe_cupy.grouped_gemm(**a)
    v = [a[n].view if n in a else None for n in ("x", "w", "offsets", "group_sizes", "gather_indices", "bias")]
    assert recorder.calls[-1][2:] == (tuple(v), (out.data_ptr(),)) and out.view.shape == (9, N)
    assert [call[0] for call in recorder.calls] == ["moe_route", "moe_route", "moe_permute", "grouped_gemm"]


def test_empty_calls_launch_nothing(recorder: Recorder) -> None:
    _, _, stats = flashmoe_cupy.moe_route(OnDevice((0, E)), top_k=K, return_stats=True)
    assert recorder.filled == [(s, 0) for s in stats]
    permuted = flashmoe_cupy.moe_permute(OnDevice((0, K), INT32), num_experts=E)
    assert recorder.filled[-1] == (permuted.offsets, 0)
    flashmoe_cupy.grouped_gemm(**on_device(x=(0, D), w=(E, N, D), offsets=((E + 1,), INT32)))
    a = on_device(x=(0, D), w_gate_up=(E, 2 * N, D), w_down=(E, D, N), topk_weights=(0, K), topk_ids=((0, K), INT32))
    assert flashmoe_cupy.fused_moe(**a).view.shape == (0, D)
    assert not recorder.calls


def test_out_may_not_be_an_argument_on_a_device(recorder: Recorder) -> None:
    """Found by the addresses of each call, though the plan is one that ran before."""
    a = on_device(x=(T, D), w_gate_up=(E, 2 * N, D), w_down=(E, D, N), topk_weights=(T, K), topk_ids=((T, K), INT32))
    flashmoe_cupy.fused_moe(**a, out=OnDevice((T, D)))
    inside = OnDevice((T, D))
    for name, offset in (("x", 0), ("x", 2 * D), ("w_gate_up", 0), ("w_down", 4 * D * N)):
        inside.view = inside.view._replace(ptr=a[name].view.ptr + offset)
        with pytest.raises(UnsupportedProblem, match=rf"out shares memory with {name}\b"):
            flashmoe_cupy.fused_moe(**a, out=inside)
    assert len(recorder.calls) == 1


def test_plans_are_forgotten_when_they_are_many(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "_MAX_PLANS", 3)
    plans: memory.PlanMemory[str] = memory.PlanMemory()
    for i in range(5):
        assert plans.find(i) is None
        plans.keep(i, str(i))
    assert [plans.find(i) for i in range(5)] == [None, None, None, "3", "4"]
    assert plans.keep([1], "x") == "x" and len(plans) == 2


def test_views_stay_tuples() -> None:
    """The keys are made of slices of views; the fields must not move."""
    assert View._fields[:6] == ("ptr", "shape", "strides", "dtype", "device", "library")
