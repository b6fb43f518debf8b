"""What a call refuses does not depend on the calls before it: `1 == True == 1.0`, but only one of them is right."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from decimal import Decimal
from enum import StrEnum
from typing import Any

import numpy as np
import pytest

import flashmoe_cupy
from flashmoe_cupy import UnsupportedProblem
from flashmoe_cupy.ops import access, attention, moe, route
from flashmoe_cupy.plan import kernels, options
from flashmoe_cupy.plan.attention.problem import PADDING
from flashmoe_cupy.plan.operation import registered

Arrays = dict[str, Any]


def f32(*shape: int) -> np.ndarray[Any, Any]:
    return np.ones(shape, np.float32)


def i32(*values: int) -> np.ndarray[Any, Any]:
    return np.array(values, np.int32)


QKV: Arrays = {"q": f32(2, 6, 1, 8), "k": f32(2, 6, 1, 8), "v": f32(2, 6, 1, 8)}
PACKED: Arrays = {"q": f32(6, 1, 8), "k": f32(6, 1, 8), "v": f32(6, 1, 8), "cu_seqlens_q": i32(0, 1, 2, 3, 4, 5, 6)}
PACKED["cu_seqlens_k"] = PACKED["cu_seqlens_q"]
LENGTHS: Arrays = {"max_seqlen_q": 1, "max_seqlen_k": 1}
EXPERTS: Arrays = {"x": f32(2, 8), "w_gate_up": f32(2, 16, 8), "w_down": f32(2, 8, 8), "topk_weights": f32(2, 1)}
EXPERTS["topk_ids"] = i32(0, 1).reshape(2, 1)
SCORES: Arrays = {"causal": True, "window_size": (1, 0), "softmax_scale": 1.0, "softcap": 1.0, "return_lse": True}

# Per function: the arrays, options that must be given, and for each option a right value that others equal.
CALLS: dict[str, tuple[Arrays, Arrays, Arrays]] = {
    "flash_attention": (QKV, {}, SCORES | {"layout": "bhsd"}),
    "flash_attention_varlen": (PACKED, LENGTHS, SCORES | LENGTHS),
    "moe_route": (
        {"logits": f32(3, 4)}, {"top_k": 1},
        {"top_k": 1, "scoring_func": "sigmoid", "renormalize": True, "routed_scaling_factor": 1.0,
         "num_expert_group": 1, "topk_group": 1, "capacity_factor": 1.0, "return_stats": True},
    ),
    "moe_permute": ({"topk_ids": i32(0, 0).reshape(2, 1)}, {"num_experts": 1}, {"num_experts": 1}),
    "grouped_gemm": ({"x": f32(2, 8), "w": f32(1, 8, 8), "offsets": i32(0, 2)}, {}, {}),
    "fused_moe": (
        EXPERTS, {"activation": "swigluoai"},
        {"activation": "swigluoai", "interleaved": True, "swiglu_alpha": 1.0, "swiglu_limit": 1.0,
         "apply_router_weight_on_input": True, "batch_invariant": True},
    ),
}  # fmt: skip
ROWS = [(name, option) for name, (_, _, right) in CALLS.items() for option in right]


class Name:
    """Equal to a string, and none."""

    def __init__(self, like: str) -> None:
        self.like = like

    def __eq__(self, other: object) -> bool:
        return self.like == other

    def __hash__(self) -> int:
        return hash(self.like)


NONE: list[Any] = [Decimal(1), 1 + 0j]  # which no option takes
WRONG: dict[type, list[Any]] = {
    bool: [1, 1.0, np.int64(1), np.float32(1), *NONE],
    int: [True, np.True_, 1.0, np.float32(1), *NONE],
    float: [True, np.True_, *NONE],
}


def wrong(value: Any) -> list[Any]:
    """Values of wrong types that equal a right one."""
    if isinstance(value, str):
        return [Name(value)]
    if isinstance(value, tuple):
        others = [(other, value[1]) for other in wrong(value[0])]
        return [*others, *[list(pair) for pair in others[:1]], (value[0], False), (value[0], 0.0)]
    found = WRONG[type(value)]
    assert all(other == value and hash(other) == hash(value) for other in found)
    return found


def moved(arrays: Arrays, convert: Callable[[Any], Any]) -> Arrays:
    return {name: convert(x) for name, x in arrays.items()}


def refused(call: Callable[..., Any], arguments: Arrays, option: str, value: Any) -> None:
    with pytest.raises(UnsupportedProblem) as caught:
        call(**arguments | {option: value})
    assert [reason for reason in caught.value.reasons if option in reason], caught.value


def forget() -> None:
    for call in kernels.forget:
        call()


def check(name: str, option: str, convert: Callable[[Any], Any]) -> None:
    call = getattr(flashmoe_cupy, name)
    arrays, needed, right = CALLS[name]
    arguments = moved(arrays, convert) | needed
    forget()
    for before in (True, False):
        for value in wrong(right[option]):
            refused(call, arguments, option, value)
        if before:
            call(**arguments | {option: right[option]})


def test_every_option_is_tried() -> None:
    arrays = {
        "out", "sinks", "alibi_slopes", "bias", *PADDING, "e_score_correction_bias", "expert_map",
        "group_sizes", "gather_indices", "b_gate_up", "b_down", "shared_w_gate_up", "shared_w_down", "shared_gate",
    }  # fmt: skip
    for name, (given, _, right) in CALLS.items():
        known = set(inspect.signature(getattr(flashmoe_cupy, name)).parameters) - arrays - {*given}
        assert known == set(right), name
        assert known == set(registered(name).options)


@pytest.mark.parametrize(("name", "option"), ROWS)
def test_wrong_types_are_refused_before_and_after(name: str, option: str) -> None:
    check(name, option, lambda x: x)


@pytest.mark.jax
@pytest.mark.parametrize(("name", "option"), ROWS)
def test_wrong_types_are_refused_by_jax(name: str, option: str) -> None:
    check(name, option, pytest.importorskip("jax").numpy.asarray)


@pytest.mark.torch
@pytest.mark.parametrize(("name", "option"), [row for row in ROWS if row[0] != "moe_permute"])
def test_wrong_types_do_not_take_the_short_way(name: str, option: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU: each call whose options equal those of the right one would be found by its guard."""
    torch = pytest.importorskip("torch")
    for private in ("_cuda_getDevice", "_cuda_getCurrentRawStream", "_cuda_isCurrentStreamCapturing"):
        monkeypatch.setattr(torch._C, private, lambda *_: 0, raising=False)
    monkeypatch.setattr(access, "_known", {torch.Tensor: access._torch(torch)})
    found: list[Any] = []

    class Finds:
        """Finds every call by its options."""

        def get(self, wanted: Any, _: Any) -> Any:
            found.append(wanted)
            return [(lambda *_: True, lambda _: "found")]

    for each in (attention._DENSE, attention._PACKED, route._CALL, moe._CALL):
        monkeypatch.setattr(each, "guards", Finds())
    call = getattr(flashmoe_cupy, name)
    arrays, needed, right = CALLS[name]
    arguments = moved(arrays, torch.from_numpy) | needed
    if option != "return_stats":
        assert call(**arguments | {option: right[option]}) == "found"
    found.clear()
    for value in wrong(right[option]):
        refused(call, arguments, option, value)
    assert not found


@pytest.mark.parametrize("name", [name for name in CALLS if name.startswith("flash")])
@pytest.mark.parametrize("value", ["no", "yes", "", 0, 1, None, [], np.array(True), 0.0])
def test_return_lse_is_a_bool(name: str, value: Any) -> None:
    arrays, needed, _ = CALLS[name]
    refused(getattr(flashmoe_cupy, name), arrays | needed, "return_lse", value)


class Activation(StrEnum):
    SWIGLUOAI = "swigluoai"


@pytest.mark.parametrize(
    ("name", "option", "value"),
    [
        ("flash_attention", "causal", np.True_),
        ("flash_attention", "return_lse", np.False_),
        ("flash_attention", "softmax_scale", np.float64(0.5)),
        ("flash_attention", "softmax_scale", np.int32(1)),
        ("flash_attention", "softcap", 2),
        ("flash_attention", "layout", np.str_("bhsd")),
        ("flash_attention", "window_size", [3, np.uint8(1)]),
        ("flash_attention", "window_size", np.array([3, 1])),
        ("moe_route", "renormalize", np.True_),
        ("moe_route", "capacity_factor", np.float32(0.25)),
        ("fused_moe", "activation", Activation.SWIGLUOAI),
        ("fused_moe", "swiglu_limit", math.inf),
    ],
)
def test_right_values_of_other_types(name: str, option: str, value: Any) -> None:
    """They give what the plain value gives, and are remembered as that one."""
    call = getattr(flashmoe_cupy, name)
    arrays, needed, _ = CALLS[name]
    plain = registered(name).options[option].read(value)
    assert type(plain) in (bool, int, float, str, tuple)
    one, other = (call(**arrays | needed | {option: v}) for v in (plain, value))
    for a, b in zip(*((x if isinstance(x, tuple) else (x,)) for x in (one, other)), strict=True):
        np.testing.assert_array_equal(a, b)


def test_an_option_that_changes_in_place_is_read_again() -> None:
    length, window = np.array(1), [1, 0]
    arguments = PACKED | {"cu_seqlens_q": i32(0, 6), "cu_seqlens_k": i32(0, 6)}
    refused(flashmoe_cupy.flash_attention_varlen, arguments | LENGTHS, "max_seqlen_q", np.array([6]))
    value = np.random.default_rng(0).random((6, 1, 8), np.float32)

    def run() -> Any:
        return flashmoe_cupy.flash_attention_varlen(
            **arguments | {"v": value, "max_seqlen_q": 6, "max_seqlen_k": length, "window_size": window}
        )  # fmt: skip

    length[...] = 6
    first = run()
    window[0] = 5
    assert not np.array_equal(first, run())


def test_integers_of_every_library_are_an_index() -> None:
    """Also those that another library would take, and nothing that only looks like one."""
    read = options.integer
    assert [read(x) for x in (3, np.int64(3), np.array(3), np.array(3, np.uint8))] == [3] * 4
    none: Any
    for none in (True, np.True_, np.array(True), 3.0, np.float32(3), np.array(3.0), np.array([3]), "3", None, [3], 3j):
        assert read(none) is None, none
    assert options.window(np.array([3, -1])) == options.window([np.array(3), np.int8(-1)]) == (3, -1)
    for none in ((3,), (1, 2, 3), {1, 2}, {1: 0, 2: 0}, "12", b"12", np.ones((2, 2), int), (1, True), 5, None):
        assert options.window(none) is None, none


@pytest.mark.torch
def test_integers_of_torch() -> None:
    torch = pytest.importorskip("torch")
    assert options.integer(torch.tensor(3)) == 3 and options.window(torch.tensor([3, -1])) == (3, -1)
    for none in (torch.tensor(True), torch.tensor([3]), torch.tensor(3.0), torch.tensor(3, device="meta")):
        assert options.integer(none) is None, none
    arrays = moved(PACKED, torch.from_numpy)
    flashmoe_cupy.flash_attention_varlen(**arrays, max_seqlen_q=torch.tensor(1), max_seqlen_k=torch.tensor(1))
    flashmoe_cupy.flash_attention(**moved(QKV, torch.from_numpy), window_size=(torch.tensor(3), torch.tensor(0)))
    flashmoe_cupy.moe_route(torch.rand(3, 4), top_k=torch.tensor(2))


@pytest.mark.jax
def test_integers_of_jax() -> None:
    """Traced ones have no value: the error says what to do."""
    jax = pytest.importorskip("jax")
    jnp = jax.numpy
    assert options.integer(jnp.array(3)) == 3 and options.window(jnp.array([3, -1])) == (3, -1)
    for none in (jnp.array(True), jnp.array([3]), jnp.array(3.0)):
        assert options.integer(none) is None, none
    arrays = moved(PACKED, jnp.asarray)
    flashmoe_cupy.flash_attention_varlen(**arrays | {"max_seqlen_q": jnp.array(1), "max_seqlen_k": np.array(1)})

    def attend(q: Any, left: Any) -> Any:
        return flashmoe_cupy.flash_attention(q, q, q, window_size=(left, 0))

    def route_to(logits: Any, top_k: Any) -> Any:
        return flashmoe_cupy.moe_route(logits, top_k=top_k)

    for call, x, option in ((attend, QKV["q"], "window_size"), (route_to, f32(3, 4), "top_k")):
        with pytest.raises(UnsupportedProblem, match=rf"{option} must be.*traced by JAX.*static_argnames"):
            jax.jit(call)(x, 2)
        jax.jit(call, static_argnums=1)(x, 2)
