"""The float64 reference where scores are huge, and where a log-sum-exp is given to its backward."""

from __future__ import annotations

import numpy as np
import pytest

from flashmoe_cupy import reference

Rng = np.random.Generator


def test_large_scores_do_not_overflow() -> None:
    q, k = np.full((1, 2, 1, 8), 100.0), np.full((1, 3, 1, 8), 100.0)
    k[:, 1] = 101.0
    v = np.eye(3, 8)[None, :, None]
    for sign in (1.0, -1.0):
        out, lse = reference.flash_attention(sign * q, k, v, softmax_scale=1.0, return_lse=True)
        weights = np.array([0.0, 1.0, 0.0] if sign > 0 else [0.5, 0.0, 0.5])
        np.testing.assert_allclose(out[0, :, 0, :3], np.tile(weights, (2, 1)), rtol=1e-12, atol=1e-12)
        np.testing.assert_allclose(lse, np.full_like(lse, 80800.0 if sign > 0 else -80000.0 + np.log(2)), rtol=1e-12)


@pytest.mark.parametrize("size", [1e14, 1e15, 1e18, 3.4e38, 1e300])
@pytest.mark.parametrize("sign", [-1, 1])
def test_huge_equal_scores_give_the_mean(size: float, sign: int) -> None:
    """Beside such scores float64 has no room for the logarithm of their number."""
    q, k, v = np.zeros((1, 3, 1, 8)), np.zeros((1, 150, 1, 8)), np.arange(1200.0).reshape(1, 150, 1, 8)
    bias = np.full((1, 1, 1, 150), sign * size)
    mean = np.broadcast_to(v.mean(1, keepdims=True), (1, 3, 1, 8))
    out, lse = reference.flash_attention(q, k, v, bias=bias, return_lse=True)
    np.testing.assert_allclose(out, mean, rtol=1e-13)
    np.testing.assert_allclose(lse, sign * size + np.log(150.0))
    half = reference.flash_attention(q, k[:, :1], v[:, :1] + 1, bias=bias[..., :1], sinks=np.array([sign * size]))
    np.testing.assert_allclose(half, np.broadcast_to((v[:, :1] + 1) / 2, half.shape))  # the sink takes the other half
    grad = reference.flash_attention_backward(np.ones_like(mean), q, k, v, bias=bias)
    np.testing.assert_allclose(grad.dv, np.full_like(v, 3 / 150))


def test_backward_uses_the_lse_that_is_given(rng: Rng) -> None:
    """Attention over a part of the keys has the gradients of the whole when it gets the whole's out and lse."""
    q, k, v, dout = (rng.standard_normal((1, n, 2, 8)) for n in (5, 9, 9, 5))
    out, lse = reference.flash_attention(q, k, v, return_lse=True)
    whole = reference.flash_attention_backward(dout, q, k, v)
    parts = [reference.flash_attention_backward(dout, q, k[:, i], v[:, i], out, lse) for i in (slice(4), slice(4, 9))]
    np.testing.assert_allclose(sum(part.dq for part in parts), whole.dq, rtol=1e-10, atol=1e-12)
    np.testing.assert_allclose(np.concatenate([part.dv for part in parts], 1), whole.dv, rtol=1e-10, atol=1e-12)
