"""The log-sum-exp of attention's scores alone: the float64 truth on every library, errors, names."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import flashmoe_cupy
from flashmoe_cupy import UnsupportedProblem, attention_lse, reference
from flashmoe_cupy.dtypes import from_name, to_numpy
from flashmoe_cupy.testing import TOLERANCES, compare_lse

HQ, HK = 4, 2
CASES: tuple[dict[str, Any], ...] = (
    {}, {"causal": True}, {"window_size": (5, 2)}, {"softcap": 8.0, "softmax_scale": 0.3}, {"sinks": True},
    {"alibi_slopes": True, "causal": True}, {"bias": True}, {"layout": "bhsd", "causal": True},
)  # fmt: skip


def arrays(case: dict[str, Any], dtype: str, dim: int = 40, seed: int = 0) -> tuple[dict[str, Any], dict[str, Any]]:
    rng = np.random.default_rng(seed)

    def made(*shape: int) -> Any:
        return rng.standard_normal(shape).astype(np.float32)

    given = {"q": made(2, 37, HQ, dim), "k": made(2, 53, HK, dim)}
    given = {name: x.astype(to_numpy(from_name(dtype))) for name, x in given.items()}
    if case.get("layout") == "bhsd":
        given = {name: np.ascontiguousarray(x.swapaxes(1, 2)) for name, x in given.items()}
    shapes = {"sinks": (HQ,), "alibi_slopes": (HQ,), "bias": (2, 1, 37, 53)}
    given |= {name: np.abs(made(*shapes[name])) for name in case if name in shapes}
    return given, {name: value for name, value in case.items() if name not in shapes}


def check(got: Any, given: dict[str, Any], options: dict[str, Any], dtype: str) -> None:
    truth = {name: np.asarray(x, np.float64) for name, x in given.items()}
    want = reference.attention_lse(**truth, **options)
    verdict = compare_lse(np.asarray(got, np.float64), want, atol=TOLERANCES[dtype].lse)
    assert verdict, verdict.text


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_numpy(case: dict[str, Any], dtype: str) -> None:
    for seed in (0, 1):
        given, options = arrays(case, dtype, seed=seed)
        got = attention_lse(**given, **options)
        assert got.dtype == np.float32 and got.shape == (2, HQ, 37)
        check(got, given, options, dtype)


@pytest.mark.torch
def test_torch() -> None:
    torch = pytest.importorskip("torch")
    for case in CASES:
        given, options = arrays(case, "float32")
        tensors = {name: torch.from_numpy(x) for name, x in given.items()}
        got = attention_lse(**tensors, **options)
        check(got, given, options, "float32")
        compiled = torch.compile(lambda t, o=options: attention_lse(**t, **o), fullgraph=True, backend="aot_eager")
        assert torch.equal(compiled(tensors), got)


@pytest.mark.jax
def test_jax() -> None:
    jax = pytest.importorskip("jax")
    for case in CASES:
        given, options = arrays(case, "float32")
        put = {name: jax.numpy.asarray(x) for name, x in given.items()}
        check(jax.jit(lambda a, o=options: attention_lse(**a, **o))(put), given, options, "float32")
    q, k = (jax.numpy.asarray(arrays({}, "float32", seed=s)[0][n]) for s, n in ((1, "q"), (2, "k")))
    both = jax.vmap(attention_lse, in_axes=(0, None))(jax.numpy.stack([q, 2 * q]), k)
    np.testing.assert_allclose(both[1], attention_lse(2 * q, k), rtol=1e-5)


@pytest.mark.gpu
@pytest.mark.sm80
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("dim", [40, 128, 192, 256])
def test_on_a_gpu(dtype: str, dim: int) -> None:
    torch = pytest.importorskip("torch")
    cupy = pytest.importorskip("cupy")
    for case in CASES:
        given, options = arrays(case, dtype, dim)
        kind = getattr(torch, dtype)
        tensors = {
            name: torch.from_numpy(x.astype(np.float32)).to("cuda", kind if name in "qk" else torch.float32)
            for name, x in given.items()
        }
        got = attention_lse(**tensors, **options)
        check(got.cpu(), given, options, dtype)
        assert torch.equal(attention_lse(**tensors, **options), got)
        if dtype == "float16":
            other = attention_lse(**{name: cupy.asarray(x) for name, x in given.items()}, **options)
            assert np.array_equal(cupy.asnumpy(other), got.cpu().numpy())


def test_rows_that_see_nothing() -> None:
    q, k = np.ones((1, 3, 2, 8), np.float32), np.ones((1, 2, 2, 8), np.float32)
    assert np.isneginf(attention_lse(q, k, causal=True)[0, :, 0]).all()
    assert np.isneginf(attention_lse(q, k[:, :0])).all()
    assert attention_lse(q[:, :0], k).shape == (1, 2, 0)


def test_errors_speak_of_this_call() -> None:
    q, k = np.ones((1, 3, 4, 8), np.float32), np.ones((2, 2, 3, 16), np.float16)
    with pytest.raises(UnsupportedProblem, match=r"cannot run attention_lse\(q=float32\[1, 3") as caught:
        attention_lse(q, k, causal=2)  # type: ignore[call-overload]
    text = str(caught.value)
    assert "batch sizes differ: q has 1, k has 2\n" in text and "causal must be" in text and "dtypes differ" in text
    assert " v " not in text and "head_dim_v" not in text
    wrongs = (q[..., :4], "head_dim is 4"), (q.astype(np.int32), "k has dtype int32"), (q[0], "k must have 4")
    for wrong, reason in wrongs:
        with pytest.raises(UnsupportedProblem, match=reason) as caught:
            attention_lse(wrong, wrong)
        assert not any(one.startswith(("v ", "head_dim_v")) for one in caught.value.reasons)
    with pytest.raises(TypeError, match="it is called softmax_scale here"):
        attention_lse(q, q, scale=1.0)  # type: ignore[call-overload]


def test_it_is_a_name_of_every_room() -> None:
    assert "attention_lse" in flashmoe_cupy.__all__ and flashmoe_cupy.attention_lse is attention_lse
