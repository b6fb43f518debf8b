"""Bad input to the operations of mixture of experts: refused with the argument, the reason and what would run.

As in test_errors.py, every refusal is tried on NumPy and torch arrays (and on the GPU, where there is one), with an
`out` full of a pattern that must survive where the operation takes one.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
from test_errors import LIBRARIES, PATTERN, Arrays, Row, f16, ids, intact, moved, pattern, refused, strided, to_torch

import flashmoe_cupy
from flashmoe_cupy import _env, fused_moe, grouped_gemm, moe_permute, moe_route
from flashmoe_cupy.errors import FlashMoEError, UnsupportedProblem

FLOATS = "bfloat16, float16 or float32"
F32, I32 = np.float32, np.int32


def i32(*values: int) -> np.ndarray[Any, Any]:
    return np.array(values, I32)


def routed() -> Arrays:
    """A router that runs: 5 tokens, 8 experts."""
    return {"logits": f16(5, 8), "top_k": 2}


def permuted() -> Arrays:
    return {"topk_ids": i32(0, 3, 1, -1, 2, 2).reshape(3, 2), "num_experts": 4}


def gemm() -> Arrays:
    """A product that runs: 3 groups of 2, 0 and 3 rows, n 24, d 16."""
    return {"x": f16(6, 16), "w": f16(3, 24, 16), "offsets": i32(0, 2, 2, 5)}


def masked() -> Arrays:
    return {"x": f16(3, 4, 16), "w": f16(3, 24, 16), "group_sizes": i32(4, 0, 3)}


def experts() -> Arrays:
    """A call that runs: 5 tokens, d 16, n 24, 3 experts, K 2."""
    return {
        "x": f16(5, 16), "w_gate_up": f16(3, 48, 16), "w_down": f16(3, 16, 24),
        "topk_weights": np.full((5, 2), 0.5, F32), "topk_ids": (np.arange(10, dtype=I32) % 3).reshape(5, 2),
    }  # fmt: skip


ROUTE: list[Row] = [
    ("rank 1", {"logits": f16(8)}, ("logits must have 2 dimensions", r"\(8,\)")),
    ("rank 3", {"logits": f16(1, 5, 8)}, ("logits must have 2 dimensions", r"\(1, 5, 8\)")),
    ("float64", {"logits": f16(5, 8).astype(np.float64)}, ("logits has dtype float64", FLOATS, "cast with logits")),
    ("int32", {"logits": np.ones((5, 8), I32)}, ("logits has dtype int32", FLOATS)),
    ("strided", {"logits": strided(5, 8)}, ("last dimension of logits", "contiguous", r"stride is 2\b")),
    ("no experts", {"logits": f16(5, 0)}, ("logits has 0 experts", "1 to 1024")),
    ("1025 experts", {"logits": f16(5, 1025)}, ("logits has 1025 experts", "1 to 1024")),
    ("K > E", {"top_k": 9}, ("top_k is 9", "only 8 experts")),
    ("K > 32", {"logits": f16(5, 64), "top_k": 33}, ("top_k is 33", "at most 32")),
    ("K = 0", {"top_k": 0}, ("top_k must be an int from 1 on", r"\b0\b")),
    ("K a float", {"top_k": 2.0}, ("top_k must be an int", r"2\.0")),
    ("K a bool", {"top_k": False}, ("top_k must be an int", "False")),
    ("scoring", {"scoring_func": "relu"}, ("'relu'", "known are softmax, sigmoid, sqrtsoftplus")),
    ("scoring None", {"scoring_func": None}, ("scoring_func is None", "softmax")),
    ("groups", {"num_expert_group": 3}, ("8 experts do not divide", "num_expert_group=3")),
    ("groups 0", {"num_expert_group": 0}, ("num_expert_group must be an int from 1 on",)),
    ("more kept", {"num_expert_group": 4, "topk_group": 5}, ("topk_group is 5", "only 4 groups")),
    ("kept 0", {"num_expert_group": 4, "topk_group": 0}, ("topk_group must be an int from 1 on",)),
    ("kept too few", {"num_expert_group": 8, "topk_group": 1}, ("top_k is 2", "topk_group=1 groups of 1 ", "fewer")),
    ("capacity NaN", {"capacity_factor": math.nan}, ("capacity_factor", "from 0 on", "nan")),
    ("capacity negative", {"capacity_factor": -0.5}, ("capacity_factor", "from 0 on", r"-0\.5")),
    ("capacity infinite", {"capacity_factor": math.inf}, ("capacity_factor", "None", "inf")),
    ("capacity text", {"capacity_factor": "1"}, ("capacity_factor", "'1'")),
    ("scale NaN", {"routed_scaling_factor": math.nan}, ("routed_scaling_factor", "finite", "nan")),
    ("scale None", {"routed_scaling_factor": None}, ("routed_scaling_factor", "number", "None")),
    ("renormalize", {"renormalize": "yes"}, ("renormalize must be a bool", "'yes'")),
    ("stats", {"return_stats": 2}, ("return_stats must be a bool",)),
    ("bias length", {"e_score_correction_bias": np.zeros(7, F32)}, ("e_score_correction_bias.*shape", r"\(8,\)")),
    ("bias rank", {"e_score_correction_bias": np.zeros((1, 8), F32)}, ("e_score_correction_bias", r"\(1, 8\)")),
    ("bias float64", {"e_score_correction_bias": np.zeros(8)}, ("bias has dtype float64", "float32 or logits's")),
    ("bias strided", {"e_score_correction_bias": np.zeros(16, F32)[::2]}, ("e_score_correction_bias", "contiguous")),
]  # fmt: skip

PERMUTE: list[Row] = [
    ("rank", {"topk_ids": i32(0, 1)}, ("topk_ids must have 2 dimensions",)),
    ("float32", {"topk_ids": np.zeros((3, 2), F32)}, ("topk_ids has dtype float32", "int32 or int64", "cast")),
    ("int16", {"topk_ids": np.zeros((3, 2), np.int16)}, ("topk_ids has dtype int16", "int32 or int64")),
    ("no column", {"topk_ids": np.zeros((3, 0), I32)}, ("topk_ids has no column",)),
    ("strided", {"topk_ids": np.zeros((3, 4), I32)[:, ::2]}, ("last dimension of topk_ids", "contiguous")),
    ("no experts", {"num_experts": 0}, ("num_experts must be an int from 1 on",)),
    ("experts a float", {"num_experts": 4.0}, ("num_experts must be an int", r"4\.0")),
    ("map of int64", {"expert_map": np.zeros(9, np.int64)}, ("expert_map has dtype int64", "int32", "cast")),
    ("map of rank 2", {"expert_map": np.zeros((9, 1), I32)}, ("expert_map must have 1 dimensions",)),
    ("map strided", {"expert_map": np.zeros(9, I32)[::2]}, ("last dimension of expert_map", "contiguous")),
]

GEMM: list[Row] = [
    ("x of rank 3", {"x": f16(3, 6, 16)}, (r"\bx must have 2 dimensions", r"\(3, 6, 16\)")),
    ("w of rank 2", {"w": f16(24, 16)}, (r"\bw must have 3 dimensions",)),
    ("(E, d, n)", {"w": f16(3, 16, 24)}, (r"\bw must be \(E, n, d\)", r"looks like \(E, d, n\)", "transpose with")),
    ("(n, d, E)", {"w": f16(24, 16, 3)}, (r"looks like \(n, d, E\)", "transpose with")),
    ("d differs", {"w": f16(3, 24, 40)}, ("differ in d", "x has 16", "has 40")),
    ("no experts", {"w": f16(0, 24, 16), "offsets": i32(0)}, ("w holds no expert",)),
    ("offsets of other length", {"offsets": i32(0, 2, 5)}, ("offsets must have shape", r"\(4,\)", r"\(3,\)")),
    ("offsets of int64", {"offsets": np.array([0, 2, 2, 5])}, ("offsets has dtype int64", "int32", "cast")),
    ("offsets of rank 2", {"offsets": i32(0, 2, 2, 5)[None]}, ("offsets must have 1 dim",)),
    ("offsets strided", {"offsets": np.zeros(8, I32)[::2]}, ("last dimension of offsets", "contiguous")),
    ("neither", {"offsets": None}, ("either offsets or group_sizes", "neither")),
    ("both", {"x": f16(3, 4, 16), "group_sizes": i32(1, 1, 1)}, ("either offsets or group_sizes", "both")),
    ("indices of int64", {"gather_indices": np.zeros(6, np.int64)}, ("gather_indices has dtype int64", "int32")),
    ("indices of rank 2", {"gather_indices": np.zeros((6, 1), I32)}, ("gather_indices must have 1 dim",)),
    ("n = 20", {"w": f16(3, 20, 16)}, ("n is 20", "multiple of 8", "to 24")),
    ("d = 12", {"x": f16(6, 12), "w": f16(3, 24, 12)}, ("d is 12", "multiple of 8", "to 16")),
    ("d = 0", {"x": f16(6, 0), "w": f16(3, 24, 0)}, ("d is 0", "multiple of 8")),
    ("bias shape", {"bias": f16(24)}, ("bias must have shape", r"\(3, 24\)", r"\(24,\)")),
    ("bias dtype", {"bias": np.zeros((3, 24))}, ("bias has dtype float64", "float32 or x's dtype")),
    ("two dtypes", {"w": f16(3, 24, 16).astype(F32)}, ("dtypes differ", "x is float16", "w is float32")),
    ("x of int32", {"x": np.ones((6, 16), I32)}, ("x has dtype int32", FLOATS)),
    ("x strided", {"x": strided(6, 16)}, (r"last dimension of x\b", "contiguous")),
    ("w strided", {"w": strided(3, 24, 16)}, (r"last dimension of w\b", "contiguous")),
]

MASKED: list[Row] = [
    ("x of rank 2", {"x": f16(12, 16)}, (r"\bx must have 3 dimensions", r"\(12, 16\)")),
    ("x of other experts", {"x": f16(4, 4, 16)}, ("rows for 4 experts", "w has 3")),
    ("sizes of other length", {"group_sizes": i32(1, 2)}, ("group_sizes must have shape", r"\(3,\)", r"\(2,\)")),
    ("sizes of float32", {"group_sizes": np.zeros(3, F32)}, ("group_sizes has dtype float32", "int32")),
    ("with indices", {"gather_indices": i32(0, 1)}, ("gather_indices goes with offsets",)),
]

# Only the NumPy back end can look into the lists without waiting for a device.
LISTS: list[tuple[str, Callable[[], Arrays], Arrays, tuple[str, ...]]] = [
    ("falling", gemm, {"offsets": i32(0, 3, 2, 5)}, ("offsets must not fall",)),
    ("negative", gemm, {"offsets": i32(-1, 2, 2, 5)}, ("offsets", "between 0 and 6")),
    ("behind the end", gemm, {"offsets": i32(0, 2, 2, 7)}, ("offsets", "between 0 and 6")),
    ("behind the indices", gemm, {"gather_indices": i32(0, 1, 2, 3)}, ("offsets", "between 0 and 4")),
    ("sizes negative", masked, {"group_sizes": i32(1, -1, 0)}, ("group_sizes", "between 0 and 4")),
    ("sizes too large", masked, {"group_sizes": i32(1, 5, 0)}, ("group_sizes", "between 0 and 4")),
]

SHARED = {"shared_w_gate_up": f16(32, 16), "shared_w_down": f16(16, 16)[:, :16]}
MOE: list[Row] = [
    ("x of rank 3", {"x": f16(1, 5, 16)}, (r"\bx must have 2 dimensions", r"\(1, 5, 16\)")),
    ("w_down of rank 2", {"w_down": f16(16, 24)}, ("w_down must have 3 dimensions",)),
    ("(E, d, 2n)", {"w_gate_up": f16(3, 16, 48)}, (r"w_gate_up must be \(E, 2n, hidden\)", r"\(E, hidden, 2n\)")),
    ("(E, n, d)", {"w_down": f16(3, 24, 16)}, (r"w_down must be \(E, hidden, n\)", r"\(E, n, hidden\)", "transpose")),
    ("(2n, d, E)", {"w_gate_up": f16(48, 16, 3)}, (r"looks like \(2n, hidden, E\)", "transpose with")),
    ("transposed view", {"w_gate_up": f16(3, 16, 48).swapaxes(1, 2)}, ("last dimension of w_gate_up", "contiguous")),
    ("d differs", {"x": f16(5, 32)}, ("w_gate_up must have shape", "x of width 32")),
    ("n differs", {"w_down": f16(3, 16, 32)}, ("w_down must have shape", r"\(3, 16, 24\)", r"\(3, 16, 32\)")),
    ("E differs", {"w_down": f16(4, 16, 24)}, ("w_down must have shape", r"\(3, 16, 24\)", r"\(4, 16, 24\)")),
    ("no experts", {"w_gate_up": f16(0, 48, 16), "w_down": f16(0, 16, 24)}, ("holds no expert",)),
    ("not gated weights", {"w_gate_up": f16(3, 24, 16)}, ("'swiglu' is gated", "2n = 48", "'gelu'")),
    ("gated weights", {"activation": "relu2"}, ("'relu2' is not gated", "n = 24", "has 48")),
    ("odd 2n", {"w_gate_up": f16(3, 47, 16)}, ("47 rows per expert", "even")),
    ("n = 20", {"w_gate_up": f16(3, 40, 16), "w_down": f16(3, 16, 20)}, (r"\bn is 20", "multiple of 8", "to 24")),
    ("d = 12", {"x": f16(5, 12), "w_gate_up": f16(3, 48, 12), "w_down": f16(3, 12, 24)}, ("d is 12", "pad x", "to 16")),
    ("activation", {"activation": "silu"}, ("activation is 'silu'", "known are swiglu, geglu", "relu2")),
    ("interleaved", {"activation": "gelu", "interleaved": True, "w_gate_up": f16(3, 24, 16)}, ("interleaved", "gated")),
    ("interleaved int", {"interleaved": 1}, ("interleaved must be a bool",)),
    ("x of float64", {"x": f16(5, 16).astype(np.float64)}, ("x has dtype float64", FLOATS)),
    ("two dtypes", {"w_down": f16(3, 16, 24).astype(F32)}, ("dtypes differ", "w_down is float32", "x is float16")),
    ("shared dtype", {**SHARED, "shared_w_down": f16(16, 16).astype(F32)}, ("differ", "shared_w_down is float32")),
    ("x strided", {"x": strided(5, 16)}, (r"last dimension of x\b", "contiguous")),
    ("w_down strided", {"w_down": strided(3, 16, 24)}, ("last dimension of w_down", "contiguous")),
    ("weights strided", {"topk_weights": np.ones((5, 4), F32)[:, ::2]}, ("last dimension of topk_weights", "contig")),
    ("ids strided", {"topk_ids": np.ones((5, 4), I32)[:, ::2]}, ("last dimension of topk_ids", "contiguous")),
    ("ids of int16", {"topk_ids": np.zeros((5, 2), np.int16)}, ("topk_ids has dtype int16", "int32 or int64", "cast")),
    ("ids of float32", {"topk_ids": np.zeros((5, 2), F32)}, ("topk_ids has dtype float32", "int32 or int64")),
    ("ids of rank 1", {"topk_ids": np.zeros(5, I32)}, ("topk_ids must have 2 dimensions",)),
    ("T of ids", {"topk_ids": np.zeros((4, 2), I32), "topk_weights": np.ones((4, 2), F32)}, ("x has 5", "has 4")),
    ("T of weights", {"topk_weights": np.ones((4, 2), F32)}, (r"topk_weights has shape \(4, 2\)", r"\(5, 2\)")),
    ("K of weights", {"topk_weights": np.ones((5, 3), F32)}, (r"topk_weights has shape \(5, 3\)", r"\(5, 2\)")),
    ("K = 0", {"topk_weights": np.ones((5, 0), F32), "topk_ids": np.ones((5, 0), I32)}, ("no column",)),
    ("weights of float64", {"topk_weights": np.ones((5, 2))}, ("topk_weights has dtype float64", "float32 or x's")),
    ("b_gate_up shape", {"b_gate_up": f16(3, 24)}, ("b_gate_up must have shape", r"\(3, 48\)", r"\(3, 24\)")),
    ("b_down shape", {"b_down": f16(16)}, ("b_down must have shape", r"\(3, 16\)", r"\(16,\)")),
    ("b_down dtype", {"b_down": np.zeros((3, 16))}, ("b_down has dtype float64", "float32 or x's")),
    ("b_down strided", {"b_down": strided(3, 16)}, ("last dimension of b_down", "contiguous")),
    ("map of int64", {"expert_map": np.zeros(9, np.int64)}, ("expert_map has dtype int64", "int32")),
    ("alpha", {"swiglu_alpha": math.nan}, ("swiglu_alpha", "finite", "nan")),
    ("limit", {"swiglu_limit": 0.0}, ("swiglu_limit", "positive")),
    ("limit NaN", {"swiglu_limit": math.nan}, ("swiglu_limit", "positive", "nan")),
    ("alpha of swiglu", {"swiglu_alpha": 1.0}, ("swiglu_alpha is for activation='swigluoai'", "'swiglu' has no use")),
    ("limit of geglu", {"activation": "geglu", "swiglu_limit": 7.0}, ("swiglu_limit is for", "'geglu' has no use")),
    ("weight on input", {"apply_router_weight_on_input": None}, ("apply_router_weight_on_input must be a bool",)),
    ("invariant", {"batch_invariant": "yes"}, ("batch_invariant must be a bool",)),
    ("half a shared expert", {"shared_w_gate_up": f16(32, 16)}, ("go together", "missing")),
    ("gate of nothing", {"shared_gate": np.ones(5, F32)}, ("shared_gate", "missing")),
    ("shared rank", {**SHARED, "shared_w_down": f16(1, 16, 16)}, ("shared_w_down must have 2 dimensions",)),
    ("shared (d, 2s)", {**SHARED, "shared_w_gate_up": f16(16, 32)}, (r"looks like \(hidden, 2s\)", "transpose")),
    ("shared (s, d)", {**SHARED, "shared_w_down": f16(24, 16)}, (r"looks like \(s, hidden\)", "transpose")),
    ("shared 2s", {**SHARED, "shared_w_gate_up": f16(48, 16)}, ("shared_w_gate_up has 48 rows", "s = 16", "32 rows")),
    ("s = 12", {"shared_w_gate_up": f16(24, 16), "shared_w_down": f16(16, 12)}, ("s is 12", "multiple of 8")),
    ("gate shape", {**SHARED, "shared_gate": np.ones((5, 2), F32)}, ("shared_gate must have shape", r"\(5, 2\)")),
    ("gate dtype", {**SHARED, "shared_gate": np.ones(5)}, ("shared_gate has dtype float64", "float32 or x's")),
]  # fmt: skip


def with_out(arguments: Arrays, *shape: int) -> Arrays:
    return {"out": np.full(shape, PATTERN, np.float16)} | arguments


@pytest.mark.parametrize("convert", LIBRARIES[:2])
def test_the_good_calls_run(convert: Callable[[Any], Any]) -> None:
    moe_route(**moved(routed(), convert))
    moe_permute(**moved(permuted(), convert))
    for call, arguments in ((grouped_gemm, with_out(gemm(), 6, 24)), (grouped_gemm, with_out(masked(), 3, 4, 24))):
        given = moved(arguments, convert)
        assert call(**given) is given["out"] and not intact(given["out"])
    for extra in ({}, SHARED):
        given = moved(with_out(experts(), 5, 16) | extra, convert)
        assert fused_moe(**given) is given["out"] and not intact(given["out"])


@pytest.mark.parametrize("convert", LIBRARIES)
@pytest.mark.parametrize("row", ROUTE, ids=ids(ROUTE))
def test_route(row: Row, convert: Callable[[Any], Any]) -> None:
    refused(moe_route, moved(routed() | row[1], convert), row[2])
    refused(moe_route, moved(routed() | row[1], convert), row[2])  # a refused call is not remembered as good


@pytest.mark.parametrize("convert", LIBRARIES)
@pytest.mark.parametrize("row", PERMUTE, ids=ids(PERMUTE))
def test_permute(row: Row, convert: Callable[[Any], Any]) -> None:
    refused(moe_permute, moved(permuted() | row[1], convert), row[2])


@pytest.mark.parametrize("convert", LIBRARIES)
@pytest.mark.parametrize("row", GEMM, ids=ids(GEMM))
def test_gemm(row: Row, convert: Callable[[Any], Any]) -> None:
    refused(grouped_gemm, moved(with_out(gemm(), 6, 24) | row[1], convert), row[2])


@pytest.mark.parametrize("convert", LIBRARIES)
@pytest.mark.parametrize("row", MASKED, ids=ids(MASKED))
def test_masked_gemm(row: Row, convert: Callable[[Any], Any]) -> None:
    refused(grouped_gemm, moved(with_out(masked(), 3, 4, 24) | row[1], convert), row[2])


@pytest.mark.parametrize("convert", LIBRARIES[:2])
@pytest.mark.parametrize("row", LISTS, ids=[row[0] for row in LISTS])
def test_lists_in_host_memory_are_checked(row: Any, convert: Callable[[Any], Any]) -> None:
    _, good, change, patterns = row
    shape = (3, 4, 24) if good is masked else (len(change.get("gather_indices", range(6))), 24)
    refused(grouped_gemm, moved(with_out(good(), *shape) | change, convert), patterns)


@pytest.mark.parametrize("convert", LIBRARIES)
@pytest.mark.parametrize("row", MOE, ids=ids(MOE))
def test_experts(row: Row, convert: Callable[[Any], Any]) -> None:
    if row[0] == "transposed view" and convert is not np.asarray:
        pytest.skip("the other libraries get a copy in row-major order here")
    arguments = moved(with_out(experts(), 5, 16) | row[1], convert)
    refused(fused_moe, arguments, row[2])
    refused(fused_moe, arguments, row[2])


# ---------------------------------------------------------------------------------------------------------------------
# out

OUT: list[tuple[str, Any, tuple[str, ...]]] = [
    ("shape", pattern(5, 24), ("out must have shape", r"\(5, 16\)", r"\(5, 24\)")),
    ("rank", pattern(1, 5, 16), ("out must have shape", r"\(1, 5, 16\)")),
    ("dtype", pattern(5, 16, dtype="float32"), ("out must have x's dtype float16", "float32")),
    ("strided", pattern(5, 32)[:, ::2], ("last dimension of out", "contiguous")),
    ("overlapping", np.broadcast_to(pattern(1, 16), (5, 16)), (r"\bout\b", "overlap|read-only")),
]


@pytest.mark.parametrize("convert", LIBRARIES)
@pytest.mark.parametrize("row", OUT, ids=[row[0] for row in OUT])
def test_out(row: tuple[str, Any, tuple[str, ...]], convert: Callable[[Any], Any]) -> None:
    refused(fused_moe, moved(experts() | {"out": row[1]}, convert), row[2])
    same = {"x": f16(5, 16), "w": f16(3, 16, 16), "offsets": i32(0, 2, 2, 5)}
    refused(grouped_gemm, moved(same | {"out": row[1]}, convert), row[2])


def test_out_read_only() -> None:
    out = pattern(5, 16)
    out.flags.writeable = False
    refused(fused_moe, experts() | {"out": out}, (r"\bout is read-only\b",))


@pytest.mark.parametrize("convert", LIBRARIES)
def test_out_is_an_argument(convert: Callable[[Any], Any]) -> None:
    """Whole or in part; also when a call of the same shapes and options has run before."""
    whole = moved({"x": f16(9, 16), "shared_w_gate_up": f16(32, 16), "shared_w_down": f16(16, 16)}, convert)
    a = moved(experts(), convert) | whole | {"x": whole["x"][:5]}
    before = convert(f16(9, 16))
    if a["x"].__class__ is np.ndarray or not getattr(a["x"], "is_cuda", True):
        fused_moe(**a, out=whole["x"][4:] + 0)
    for name, out in (("x", a["x"]), ("x", whole["x"][4:]), ("shared_w_gate_up", whole["shared_w_gate_up"][20:25])):
        with pytest.raises(UnsupportedProblem, match=rf"\bout\b.*\b{name}\b"):
            fused_moe(**a, out=out)
    assert bool((whole["x"] == before).all())
    rows = moved({"x": f16(5, 16), "w": f16(1, 16, 16), "offsets": i32(0, 5)}, convert)
    for name, out in (("x", rows["x"]), ("w", rows["w"][0, 3:8])):
        with pytest.raises(UnsupportedProblem, match=rf"\bout\b.*\b{name}\b"):
            grouped_gemm(**rows, out=out)


@pytest.mark.jax
def test_jax() -> None:
    jax = pytest.importorskip("jax")
    cpu = jax.devices("cpu")[0]

    def convert(a: Any) -> Any:
        return jax.device_put(a, cpu)

    refused(fused_moe, moved(with_out(experts(), 5, 16), convert), (r"\bout\b", "immutable", "out=None"))
    refused(fused_moe, moved(experts() | {"w_down": f16(3, 24, 16)}, convert), (r"jnp\.ascontiguousarray\(w_down",))
    arguments = moved(experts(), convert)
    names = ("x", "w_gate_up", "w_down", "topk_weights", "topk_ids")
    some = tuple(arguments[n] for n in names[1:])
    with pytest.raises(UnsupportedProblem, match=r"w_gate_up.*\n.*traced") as caught:
        jax.jit(lambda *traced: fused_moe(experts()["x"], *traced))(*some)
    assert "must be JAX's" in caught.value.hint
    with pytest.raises(UnsupportedProblem, match=r"topk_ids is a numpy\.ndarray, not a JAX array"):
        fused_moe(**(arguments | {"topk_ids": experts()["topk_ids"]}))


# ---------------------------------------------------------------------------------------------------------------------
# libraries, things that are no arrays, gradients


@pytest.mark.torch
def test_mixed_libraries() -> None:
    arguments = with_out(experts(), 5, 16)
    arguments["topk_ids"] = to_torch(arguments["topk_ids"])
    refused(fused_moe, arguments, (r"topk_ids is torch\.Tensor", r"x is numpy\.ndarray", "one library"))
    arguments = moved(experts(), to_torch) | {"out": pattern(5, 16)}
    refused(fused_moe, arguments, (r"out is numpy\.ndarray", "one library"))
    refused(grouped_gemm, gemm() | {"offsets": to_torch(i32(0, 2, 2, 5))}, (r"offsets is torch", "one library"))
    bias = to_torch(np.zeros(8, F32))
    refused(moe_route, routed() | {"e_score_correction_bias": bias}, (r"e_score_correction_bias is torch", "one lib"))
    refused(moe_permute, permuted() | {"expert_map": to_torch(i32(0, 1))}, (r"expert_map is torch", "one library"))


@pytest.mark.gpu
@pytest.mark.torch
def test_mixed_devices() -> None:
    arguments = moved(experts(), lambda a: to_torch(a, "cuda"))
    refused(fused_moe, arguments | {"topk_ids": to_torch(experts()["topk_ids"])}, ("topk_ids is torch.*CPU", "device"))


@pytest.mark.parametrize(("call", "good"), [
    (moe_route, routed), (moe_permute, permuted), (grouped_gemm, gemm), (fused_moe, experts)
], ids=["route", "permute", "gemm", "moe"])  # fmt: skip
def test_no_array(call: Any, good: Callable[[], Arrays]) -> None:
    optional = {
        moe_route: ["e_score_correction_bias"], moe_permute: ["expert_map"],
        grouped_gemm: ["group_sizes", "gather_indices", "bias", "out"],
        fused_moe: ["b_gate_up", "b_down", "expert_map", "shared_w_gate_up", "shared_w_down", "shared_gate", "out"],
    }[call]  # fmt: skip
    names = [n for n, a in good().items() if isinstance(a, np.ndarray)]
    for name in [*names, *optional]:
        with pytest.raises(TypeError, match=rf"\b{name} must be an array of NumPy, CuPy, torch or JAX"):
            call(**(good() | {name: [[1.0]]}))


@pytest.mark.torch
def test_torch_gradients_are_not_dropped_in_silence() -> None:
    torch = pytest.importorskip("torch")
    arguments = moved(with_out(experts(), 5, 16), to_torch)
    for name in ("x", "w_gate_up", "w_down", "topk_weights"):
        needs = arguments | {name: arguments[name].clone().requires_grad_()}
        refused(fused_moe, needs, (rf"\b{name}\b", "grad", "no_grad|detach"))
        with torch.no_grad():
            fused_moe(**needs | {"out": None})
    refused(moe_route, {"logits": torch.ones(5, 8, requires_grad=True), "top_k": 2}, ("logits", "no_grad|detach"))


# ---------------------------------------------------------------------------------------------------------------------
# FLASHMOE_CHECK


@pytest.fixture
def checked(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("FLASHMOE_CHECK", "1")
    _env.reload()
    yield
    monkeypatch.undo()
    _env.reload()


WRONG = [((0, 0), -2), ((2, 1), 4), ((4, 0), 2**31 - 1), ((1, 1), -(2**31))]


@pytest.mark.parametrize("convert", LIBRARIES[:2])
@pytest.mark.parametrize(("place", "value"), WRONG, ids=str)
def test_wrong_ids_are_named(checked: None, place: Any, value: int, convert: Callable[[Any], Any]) -> None:
    """The first one in the order of the array, though there is a worse one behind it; nothing is written."""
    for dtype in (np.int32, np.int64):
        arguments = with_out(experts(), 5, 16)
        topk_ids = arguments["topk_ids"] = arguments["topk_ids"].astype(dtype)
        topk_ids[0, 1], topk_ids[1, 0], topk_ids[4, 1] = -1, 3, -99
        topk_ids[place] = value
        given = moved(arguments, convert)
        text = re.escape(f"topk_ids[{place[0]}, {place[1]}] is {value}")
        with pytest.raises(FlashMoEError, match=text):
            fused_moe(**given)
        assert intact(given["out"])
        with pytest.raises(FlashMoEError, match=text):
            moe_permute(given["topk_ids"], num_experts=3)


def test_the_marks_of_empty_places_are_not_wrong(checked: None) -> None:
    arguments = experts()
    arguments["topk_ids"][:, 0] = (-1, 3, -1, 3, 0)
    assert np.isfinite(fused_moe(**arguments)).all()
    expert_map = np.array([-1, 0, 1, 2, -1, -1, -1], I32)
    arguments["topk_ids"][:, 1] = (6, 7, -1, 4, 3)
    fused_moe(**arguments, expert_map=expert_map)
    arguments["topk_ids"][3, 1] = 8
    with pytest.raises(FlashMoEError, match=r"topk_ids\[3, 1\] is 8: ids go from 0 to 6"):
        fused_moe(**arguments, expert_map=expert_map)


@pytest.mark.parametrize(("place", "value"), WRONG, ids=str)
def test_without_the_check_wrong_ids_contribute_nothing(place: Any, value: int) -> None:
    arguments = experts()
    arguments["topk_ids"][place] = value
    out = fused_moe(**arguments)
    arguments["topk_ids"][place] = -1
    np.testing.assert_array_equal(out, fused_moe(**arguments))


def test_public_names() -> None:
    for name in ("moe_route", "moe_permute", "grouped_gemm", "fused_moe", "RouterStats", "MoEPermutation"):
        assert callable(getattr(flashmoe_cupy, name)) and name in dir(flashmoe_cupy), name
