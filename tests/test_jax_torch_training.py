"""A small language model in JAX and in torch on our attention: the same weights give the same loss and gradients."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

import flashmoe_cupy
from flashmoe_cupy.testing import relative_error

torch = pytest.importorskip("torch")
jax = pytest.importorskip("jax")
jnp = jax.numpy

pytestmark = [pytest.mark.torch, pytest.mark.jax]
VOCAB, HIDDEN, HEADS, HEADS_K, DIM, MLP, LAYERS = 61, 64, 4, 2, 16, 96, 2
# Relative errors of a loss and of a gradient. In bfloat16 every array is rounded to 8 bits, some dozen times in a row.
ALLOWED = {"float32": (2e-6, 2e-5), "bfloat16": (2e-3, 2.5e-2)}
OPTIONS: dict[str, dict[str, Any]] = {"causal": {}, "window": {"window_size": (9, 0), "softcap": 3.0}}


def weights_of(rng: np.random.Generator) -> dict[str, np.ndarray]:
    """float32; matrices are (in, out)."""
    sizes = {"q": (HIDDEN, HEADS * DIM), "k": (HIDDEN, HEADS_K * DIM), "v": (HIDDEN, HEADS_K * DIM)}
    sizes |= {"o": (HEADS * DIM, HIDDEN), "gate": (HIDDEN, MLP), "up": (HIDDEN, MLP), "down": (MLP, HIDDEN)}
    made = {"embedding": rng.standard_normal((VOCAB, HIDDEN), np.float32)}
    for layer in range(LAYERS):
        for name, size in sizes.items():
            made[f"{name}{layer}"] = rng.standard_normal(size, np.float32) * size[0] ** -0.5
        made |= {f"{name}{layer}": rng.uniform(0.5, 1.5, HIDDEN).astype(np.float32) for name in ("norm", "mlp_norm")}
    return made


def loss_of(lib: Any, weights: dict[str, Any], ids: Any, targets: Any, options: dict[str, Any]) -> Any:
    """Mean cross entropy of a decoder. lib: the functions of a library; all else both libraries write alike."""

    def norm(x: Any, weight: Any) -> Any:
        wide = lib.wide(x)
        return lib.like(wide / lib.sqrt((wide * wide).mean(-1)[..., None] + 1e-5), x) * weight

    x = weights["embedding"][ids]
    for layer in range(LAYERS):
        w = {name: weights[f"{name}{layer}"] for name in ("q", "k", "v", "o", "gate", "up", "down", "norm", "mlp_norm")}
        h = norm(x, w["norm"])
        q, k, v = ((h @ w[name]).reshape(*ids.shape, -1, DIM) for name in ("q", "k", "v"))
        attended = flashmoe_cupy.flash_attention(q, k, v, causal=True, **options)
        x = x + attended.reshape(*ids.shape, HEADS * DIM) @ w["o"]
        h = norm(x, w["mlp_norm"])
        x = x + (lib.silu(h @ w["gate"]) * (h @ w["up"])) @ w["down"]
    logits = lib.wide(x @ weights["embedding"].T) / HIDDEN**0.5
    return (lib.logsumexp(logits, -1) - lib.pick(logits, targets)).mean()


TORCH = SimpleNamespace(
    wide=lambda x: x.float(), like=lambda x, other: x.to(other.dtype), sqrt=torch.sqrt, logsumexp=torch.logsumexp,
    silu=torch.nn.functional.silu, pick=lambda x, ids: x.gather(-1, ids[..., None])[..., 0],
)  # fmt: skip
JAX = SimpleNamespace(
    wide=lambda x: x.astype(np.float32), like=lambda x, other: x.astype(other.dtype), sqrt=jnp.sqrt,
    logsumexp=jax.nn.logsumexp, silu=jax.nn.silu,
    pick=lambda x, ids: jnp.take_along_axis(x, ids[..., None], -1)[..., 0],
)  # fmt: skip


def in_torch(device: str, dtype: str, arrays: dict[str, np.ndarray], ids: Any, options: dict[str, Any]) -> Any:
    weights = {
        name: torch.from_numpy(x).to(device, getattr(torch, dtype)).requires_grad_() for name, x in arrays.items()
    }
    tokens = torch.from_numpy(ids).to(device)
    loss = loss_of(TORCH, weights, tokens[:, :-1], tokens[:, 1:], options)
    loss.backward()
    return loss.item(), {name: x.grad.float().cpu().numpy() for name, x in weights.items()}


def in_jax(device: Any, dtype: str, arrays: dict[str, np.ndarray], ids: Any, options: dict[str, Any]) -> Any:
    weights = {name: jax.device_put(jnp.asarray(x, dtype), device) for name, x in arrays.items()}
    tokens = jax.device_put(ids.astype(np.int32), device)

    def loss(weights: Any) -> Any:
        return loss_of(JAX, weights, tokens[:, :-1], tokens[:, 1:], options)

    made, gradients = jax.jit(jax.value_and_grad(loss))(weights)
    return float(made), {name: np.asarray(x, np.float32) for name, x in gradients.items()}


@pytest.mark.parametrize("kind", OPTIONS)
@pytest.mark.parametrize("dtype", ALLOWED)
@pytest.mark.parametrize("device", ["cpu", pytest.param("gpu", marks=[pytest.mark.gpu, pytest.mark.sm80])])
def test_both_libraries_train_alike(device: str, dtype: str, kind: str) -> None:
    rng = np.random.default_rng(5)
    arrays, ids, options = weights_of(rng), rng.integers(0, VOCAB, (2, 41)), OPTIONS[kind]
    with jax.default_matmul_precision("highest"):
        loss, gradients = in_jax(jax.devices(device)[0], dtype, arrays, ids, options)
    want, wanted = in_torch("cuda" if device == "gpu" else "cpu", dtype, arrays, ids, options)
    truth, true_gradients = in_torch("cpu", "float32", arrays, ids, options)
    of_loss, of_gradient = ALLOWED[dtype]
    assert loss == pytest.approx(want, rel=of_loss) and loss == pytest.approx(truth, rel=4 * of_loss)
    assert set(gradients) == set(wanted) and len(gradients) == 1 + 9 * LAYERS
    for name, mine in gradients.items():
        assert relative_error(mine, wanted[name]) <= of_gradient, name
        assert relative_error(mine, true_gradients[name]) <= 2 * of_gradient, name
        assert np.abs(mine).max() > 0
