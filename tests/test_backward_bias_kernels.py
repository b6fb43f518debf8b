"""Which kernels make the gradients of attention with a bias, and what they share; no GPU."""

from __future__ import annotations

from typing import Any

import pytest

from flashmoe_cupy.arrays.views import View, row_major
from flashmoe_cupy.dtypes import BF16, BOOL, FP16, FP32, INT32, DType
from flashmoe_cupy.jit.device import H100
from flashmoe_cupy.plan import kernels
from flashmoe_cupy.plan.attention.backward import backward_steps
from flashmoe_cupy.plan.attention.gradient import AttentionBwdProblem, backward_problem
from flashmoe_cupy.plan.kernels import KERNELS
from flashmoe_cupy.plan.step import Step

BIASED, OF_BIAS = "attention_bwd_biased_sm90", "attention_bwd_bias_sm90"
PORTABLE, OF_BIAS_PORTABLE = "attention_bwd_sm80", "attention_bwd_bias_sm80"


def array(dtype: DType, *shape: int, strides: tuple[int, ...] | None = None) -> View:
    return View(4096, shape, strides or row_major(shape), dtype, 0, "torch", False, None)


def problem(
    bias: View, heads: int = 4, heads_k: int = 2, q: int = 300, k: int = 400, d: int = 64, dtype: DType = BF16,
    need: str = "q k v bias", **options: Any,
) -> AttentionBwdProblem:  # fmt: skip
    rows, keys = array(dtype, 2, heads, q, d), array(dtype, 2, heads_k, k, d)
    lse = array(FP32, 2, heads, q)
    given = {"bias": bias, "layout": "bhsd", "need": need, "deterministic": False} | options
    return backward_problem(rows, rows, keys, keys, rows, lse, **given)


def launches(p: AttentionBwdProblem, arch: str = "sm_90a", odd: tuple[str, ...] = ()) -> list[tuple[Step, str]]:
    steps = kernels.prepared(backward_steps(p)[0], arch, p.rows_aligned, H100, odd)[0]
    return [(step, kernels.choose(step.task, step.problem, arch, p.rows_aligned).name) for step in steps]


def names(p: AttentionBwdProblem, **where: Any) -> list[str]:
    return [name for step, name in launches(p, **where) if step.task != "attention_bwd_dot"]


@pytest.mark.parametrize(
    ("bias", "variant"),
    [
        (array(BF16, 2, 4, 300, 400), "BiasScores<2>"), (array(BF16, 300, 400), "BiasScores<2>"),
        (array(FP32, 1, 4, 300, 400), "BiasScores<4>"), (array(BF16, 2, 1, 1, 400), "KeyBiasScores<2>"),
        (array(FP32, 2, 4, 1, 400), "KeyBiasScores<4>"), (array(BF16, 1, 1), "KeyBiasScores<2>"),
        (array(BF16, 300, 1), "BiasScores<2>"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("deterministic", [False, True])
def test_hopper_kernels_take_a_bias(bias: View, variant: str, deterministic: bool) -> None:
    found = launches(problem(bias, causal=True, deterministic=deterministic))
    made = [(step.problem.part, name) for step, name in found if name.startswith("attention_bwd_bias")]
    assert made == [("kv", BIASED), ("q", BIASED), ("bias", OF_BIAS)]
    for step, name in found:
        if name in (BIASED, OF_BIAS):
            assert KERNELS[name].choose(step.problem, "sm_90a").variant == variant


@pytest.mark.parametrize("d", [32, 64, 80, 96, 128])
def test_the_smallest_compiled_head_dims(d: int) -> None:
    p = problem(array(BF16, 300, 400), d=d)
    for step, name in launches(p):
        if name in (BIASED, OF_BIAS):
            assert KERNELS[name].choose(step.problem, "sm_90a").head_dim == next(n for n in (64, 96, 128) if d <= n)


WHOLE = array(BF16, 300, 400)
LEFT_TO_OTHERS: dict[str, tuple[AttentionBwdProblem, str]] = {
    "softcap": (problem(WHOLE, softcap=5.0), "softcap or ALiBi beside a bias has no Hopper kernel of the backward"),
    "alibi": (problem(WHOLE, alibi_slopes=array(FP32, 4)), "softcap or ALiBi beside a bias has no Hopper kernel"),
    "lengths": (problem(WHOLE, seqused_k=array(INT32, 2)), "sequences of different lengths have no Hopper kernel"),
    "wide": (problem(WHOLE, d=136), "head dims beyond 128 have no Hopper kernel of the backward with a bias"),
    "bool": (problem(array(BOOL, 300, 400), need="q k v"), "boolean biases have no Hopper kernel of the backward"),
}


@pytest.mark.parametrize("name", LEFT_TO_OTHERS)
def test_what_portable_kernels_still_do(name: str) -> None:
    p, why = LEFT_TO_OTHERS[name]
    for step, kernel in launches(p):
        if step.task in ("attention_bwd", "attention_bwd_bias"):
            assert kernel == (PORTABLE if step.task == "attention_bwd" else OF_BIAS_PORTABLE)
            assert any(why in one for one in kernels.passed_over(KERNELS[kernel], step.problem, "sm_90a", True))
    assert "bias_rows" not in backward_steps(p)[1]


def test_dk_alone_is_not_worth_a_kernel() -> None:
    assert names(problem(WHOLE, need="k bias")) == [PORTABLE, OF_BIAS]
    assert names(problem(WHOLE, need="q bias")) == [BIASED, OF_BIAS]


def test_other_architectures_and_types() -> None:
    portable = [PORTABLE, PORTABLE, OF_BIAS_PORTABLE]
    assert names(problem(WHOLE), arch="sm_80") == portable
    assert set(names(problem(array(FP32, 300, 400), dtype=FP32))) == {PORTABLE, OF_BIAS_PORTABLE}
    assert names(problem(array(FP16, 300, 400), dtype=FP16)) == [BIASED, BIASED, OF_BIAS]


@pytest.mark.parametrize("need", ["q k v bias", "q", "bias", "k v", "k bias"])
def test_a_bias_is_written_again_once(need: str) -> None:
    """In front of the first launch that wants it; all of them read it then, and dbias lies as the bias does."""
    p = problem(array(BF16, 2, 4, 300, 401), k=401, need=need)
    found = launches(p)
    tasks = [name for _, name in found]
    assert tasks.count("attention_bias_rows") == 1
    at = tasks.index("attention_bias_rows")
    for i, (step, name) in enumerate(found):
        if name in (BIASED, OF_BIAS):
            assert i > at and step.arguments["bias"] == "bias_rows" and step.problem.of.forward.bias_strides[2] == 408
        elif name == PORTABLE:
            assert step.arguments["bias"] == "bias" and step.problem.of.forward.bias_strides[2] == 401
    assert backward_steps(p)[1]["bias_rows"] == 2 * 2 * 4 * 300 * 408


def test_when_a_bias_is_written_again() -> None:
    first = "attention_bias_rows"
    assert names(problem(WHOLE))[0] != first and "bias_rows" not in backward_steps(problem(WHOLE))[1]
    assert names(problem(WHOLE), odd=("bias",))[0] == first
    assert names(problem(WHOLE), odd=("bias",), arch="sm_80")[0] == PORTABLE
    turned = problem(array(BF16, 300, 400, strides=(1, 300)))
    assert names(turned)[0] == first
    assert names(problem(array(BF16, 300, 1)))[0] == first  # a value for each query
    assert names(problem(array(BF16, 2, 1, 1, 400)))[0] != first


OWN = array(BF16, 2, 4, 300, 400)
APART: dict[str, AttentionBwdProblem] = {
    "a mask": problem(OWN, causal=True),
    "a window": problem(OWN, window_size=(100, 100)),
    "entries share it": problem(array(BF16, 1, 4, 300, 400)),
    "heads share it": problem(array(BF16, 2, 1, 300, 400)),
    "queries share it": problem(array(BF16, 2, 4, 1, 400)),
    "queries share memory": problem(array(BF16, 2, 4, 300, 400, strides=(1600, 400, 0, 1))),
    "keys share it": problem(array(BF16, 2, 4, 300, 1)),
    "rows of dbias at odd places": problem(array(BF16, 2, 4, 300, 401), k=401),
    "dq is not wanted": problem(OWN, need="k v bias"),
}


@pytest.mark.parametrize("name", APART)
def test_when_dbias_has_a_launch_of_its_own(name: str) -> None:
    assert names(APART[name])[-1] == OF_BIAS


def test_dbias_with_dq() -> None:
    """Where each score has a value of its own, and on Hopper alone."""
    assert names(problem(OWN)) == [BIASED, BIASED] and names(problem(OWN, need="q bias")) == [BIASED]
    turned = array(BF16, 2, 4, 300, 400, strides=(480000, 120000, 1, 300))
    assert names(problem(turned)) == ["attention_bias_rows", BIASED, BIASED]
    assert names(problem(OWN), arch="sm_80") == [PORTABLE, PORTABLE, OF_BIAS_PORTABLE]
    softcap = problem(OWN, softcap=5.0)
    assert names(softcap) == [PORTABLE, PORTABLE, OF_BIAS_PORTABLE]
    for p, arch in ((problem(OWN), "sm_90a"), (problem(OWN), "sm_80"), (softcap, "sm_90a")):
        given = ["dbias" in step.arguments for step, name in launches(p, arch=arch) if name != "attention_bwd_dot"]
        assert given == ([False, True] if (arch, p) == ("sm_90a", problem(OWN)) else [False, False, True])
