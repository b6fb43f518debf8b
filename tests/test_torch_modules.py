"""FlashMoEScienceAttention, the nn.Module: against plain float64 code with gradients, transformers' own, and in use."""

from __future__ import annotations

from typing import Any

import pytest

from flashmoe_cupy import FlashAttentionLayer
from flashmoe_cupy.errors import UnsupportedProblem

torch = pytest.importorskip("torch")

from flashmoe_cupy.torch import FlashMoEScienceAttention  # noqa: E402

pytestmark = [
    pytest.mark.torch,
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning:torch"),
]
X = torch.randn(2, 9, 32, generator=torch.Generator().manual_seed(0))


def made(*sizes: Any, **options: Any) -> Any:
    torch.manual_seed(0)
    return FlashMoEScienceAttention(*(sizes or (32, 4, 2)), **options)


def plain(module: Any, x: Any, w: dict[str, Any]) -> Any:
    """The same by torch's operations in float64. w: the parameters."""
    its, n = module.options, x.shape[1]

    def side(name: str, heads: int) -> Any:
        rows = torch.nn.functional.linear(x, w[f"{name}_proj.weight"], w.get(f"{name}_proj.bias"))
        rows = rows.unflatten(-1, (heads, its.head_dim)).transpose(1, 2)
        if f"{name}_norm.weight" in w:
            rows = torch.nn.functional.rms_norm(rows, (its.head_dim,), w[f"{name}_norm.weight"], its.norm_eps)
        if name == "v" or its.rope_theta is None:
            return rows
        frequency = its.rope_theta ** (-torch.arange(0, its.head_dim, 2, dtype=torch.float64) / its.head_dim)
        angle = torch.arange(n, dtype=torch.float64)[:, None] * frequency
        cos, sin = angle.cos().repeat(1, 2), angle.sin().repeat(1, 2)
        first, second = rows.chunk(2, -1)
        return rows * cos + torch.cat([-second, first], -1) * sin

    q, k, v = side("q", its.n_heads), side("k", its.n_kv_heads), side("v", its.n_kv_heads)
    k, v = (one.repeat_interleave(its.n_heads // its.n_kv_heads, 1) for one in (k, v))
    s = q @ k.mT * (its.head_dim**-0.5 if its.softmax_scale is None else its.softmax_scale)
    s = its.softcap * torch.tanh(s / its.softcap) if its.softcap else s
    far = torch.arange(n)[:, None] - torch.arange(n)
    left, right = its.window_size[0], 0 if its.causal else its.window_size[1]
    hidden = ((far > left) & (left >= 0)) | ((-far > right) & (right >= 0))
    out = (s.masked_fill(hidden, -torch.inf).softmax(-1) @ v).transpose(1, 2).flatten(2)
    return torch.nn.functional.linear(out, w["o_proj.weight"], w.get("o_proj.bias"))


GRID: list[tuple[tuple[Any, ...], dict[str, Any]]] = [
    ((32, 4), {}), ((32, 4, 1), {"bias": True, "causal": False}), ((32, 4, 2), {"head_dim": 24, "qk_norm": True}),
    ((32, 2), {"window_size": (3, 2), "causal": False, "out_bias": True}),
    ((32, 4, 2), {"softcap": 3.0, "softmax_scale": 0.4, "rope_theta": 100.0, "bias": True, "out_bias": False}),
    ((32, 4, 4), {"rope_theta": None, "window_size": (4, 0), "qk_norm": True, "norm_eps": 0.1}),
]  # fmt: skip


@pytest.mark.parametrize(("sizes", "options"), GRID, ids=str)
def test_results_and_gradients(sizes: Any, options: dict[str, Any]) -> None:
    module, x = made(*sizes, **options), X.clone().requires_grad_()
    if module.q_norm is not None:
        torch.nn.init.uniform_(module.q_norm.weight)
    leaves = {name: one.detach().double().requires_grad_() for name, one in module.named_parameters()}
    exact = x.detach().double().requires_grad_()
    out, want = module(x), plain(module, exact, leaves)
    assert out.shape == x.shape
    torch.testing.assert_close(out.double(), want, rtol=0, atol=2e-6)
    arrived = torch.randn(out.shape, generator=torch.Generator().manual_seed(1))
    got = torch.autograd.grad(out, (x, *module.parameters()), arrived)
    true = torch.autograd.grad(want, (exact, *leaves.values()), arrived.double())
    for mine, other in zip(got, true, strict=True):
        torch.testing.assert_close(mine.double(), other, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ["Llama", "Qwen3"])
def test_state_dicts_of_transformers(name: str) -> None:
    """Their weights by their names give their results."""
    transformers = pytest.importorskip("transformers")
    from importlib import import_module

    models = import_module(f"transformers.models.{name.lower()}.modeling_{name.lower()}")
    config = getattr(transformers, f"{name}Config")(
        hidden_size=32, num_attention_heads=4, num_key_value_heads=2, head_dim=8, attn_implementation="eager",
        rms_norm_eps=1e-6,
    )  # fmt: skip
    torch.manual_seed(1)
    theirs, turn = getattr(models, f"{name}Attention")(config, 0), getattr(models, f"{name}RotaryEmbedding")(config)
    module = made(32, 4, 2, head_dim=8, qk_norm=name == "Qwen3", rope_theta=config.rope_parameters["rope_theta"])
    module.load_state_dict(theirs.state_dict())
    mask = torch.full((9, 9), -torch.inf).triu(1)[None, None]
    for start in (0, 1000):
        ids = torch.arange(start, start + 9)[None]
        want = theirs(X, turn(X, ids), mask)[0]
        torch.testing.assert_close(module(X, position_ids=ids[0]), want, rtol=0, atol=3e-6)


def test_step_by_step() -> None:
    """Generation gives what one call gives, for entries of different lengths, too; and it trains on."""
    module = made(bias=True, window_size=(5, 0))
    whole, cache = module(X).detach(), module.new_cache(2, 9)
    with torch.no_grad():
        steps = [module(X[:, a:b], cache=cache) for a, b in ((0, 3), (3, 4), (4, 9))]
        torch.testing.assert_close(torch.cat(steps, 1), whole, rtol=0, atol=1e-6)
        cache.reset()
        module(X[:, :6], cache=cache, lengths=torch.tensor([2, 6], dtype=torch.int32))
        step = module(torch.stack([X[0, 2:3], X[1, 6:7]]), cache=cache)
        torch.testing.assert_close(step[:, 0], torch.stack([whole[0, 2], whole[1, 6]]), rtol=0, atol=1e-6)
    with pytest.raises(UnsupportedProblem, match=r"keys require grad, but a cache has no gradient; use torch.no_grad"):
        module(X[:, :1], cache=cache)
    assert cache.lengths.tolist() == [3, 7] and not cache.keys.requires_grad


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=[pytest.mark.gpu, pytest.mark.sm80])])
def test_short_floats(device: str) -> None:
    """Training and generation in bfloat16."""
    module, x = made(64, 4, 2, device=device, dtype=torch.bfloat16), torch.randn(2, 70, 64).to(device, torch.bfloat16)
    leaves = {name: one.detach().double().cpu().requires_grad_() for name, one in module.named_parameters()}
    out, want = module(x), plain(module, x.double().cpu(), leaves)
    torch.testing.assert_close(out.double().cpu(), want, rtol=0, atol=0.02)
    got = torch.autograd.grad(out.square().sum(), tuple(module.parameters()))
    for mine, true in zip(got, torch.autograd.grad(want.square().sum(), tuple(leaves.values())), strict=True):
        assert (mine.double().cpu() - true).norm() <= 0.05 * true.norm()
    with torch.no_grad():
        cache = module.new_cache(2, 80)
        steps = [module(x[:, a:b], cache=cache) for a, b in ((0, 64), (64, 65), (65, 70))]
        torch.testing.assert_close(torch.cat(steps, 1), out.detach(), rtol=0, atol=0.02)


def test_packed_padded_and_compiled() -> None:
    module, cu = made(), torch.tensor([0, 4, 18], dtype=torch.int32)
    flat, n = X.reshape(18, 32), torch.tensor([4, 9], dtype=torch.int32)
    packed = module(flat, cu_seqlens=cu, max_seqlen=14)
    for a, b in ((0, 4), (4, 18)):
        torch.testing.assert_close(packed[a:b], module(flat[None, a:b])[0], rtol=0, atol=1e-6)
    padded = module(X, lengths=n)
    torch.testing.assert_close(padded[0, :4], packed[:4], rtol=0, atol=1e-6)
    assert not padded[0, 4:].any()
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    for x, options in ((X, {}), (X, {"lengths": n}), (flat, {"cu_seqlens": cu, "max_seqlen": 14})):
        got, want = compiled(x, **options), module(x, **options)
        torch.testing.assert_close(got, want, rtol=0, atol=1e-6)
        grads = [torch.autograd.grad(one.square().sum(), tuple(module.parameters())) for one in (got, want)]
        for mine, other in zip(*grads, strict=True):
            torch.testing.assert_close(mine, other, rtol=0, atol=1e-5)


def test_the_same_layer_for_arrays() -> None:
    module = made(bias=True, qk_norm=True, softcap=5.0)
    short = {"q": module.q_proj, "k": module.k_proj, "v": module.v_proj, "out": module.o_proj}
    held = {f"w_{name}": side.weight.detach() for name, side in short.items()}
    held |= {f"b_{name}": side.bias.detach() for name, side in short.items()}
    held |= {"q_norm": module.q_norm.weight.detach(), "k_norm": module.k_norm.weight.detach()}
    torch.testing.assert_close(FlashAttentionLayer(32, 4, 2, softcap=5.0, **held)(X), module(X), rtol=0, atol=1e-6)
    made_numpy = FlashAttentionLayer(32, 4, 2, softcap=5.0, **{name: x.numpy() for name, x in held.items()})
    torch.testing.assert_close(torch.from_numpy(made_numpy(X.numpy())), module(X).detach(), rtol=0, atol=1e-6)


def test_modules_as_torch_has_them() -> None:
    module = made(32, 4, 2, bias=True, qk_norm=True, dtype=torch.bfloat16)
    out = module(X.bfloat16())
    assert out.dtype == torch.bfloat16 and module.new_cache(1, 4).keys.dtype == torch.bfloat16
    assert {*module.state_dict()} == {
        *[f"{side}_proj.{what}" for side in "qkvo" for what in ("weight", "bias")], "q_norm.weight", "k_norm.weight",
    }  # fmt: skip
    assert module.extra_repr() == "32, 4, n_kv_heads=2" and "(q_proj): Linear" in repr(module)
    assert {one.device.type for one in made(device="meta").parameters()} == {"meta"}
    module = made(qk_norm=True)
    with torch.autocast("cpu", dtype=torch.bfloat16), torch.no_grad():
        cache = module.new_cache(2, 9, torch.bfloat16)
        out = module(X, cache=cache)
        assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.float(), module(X).detach(), rtol=0, atol=0.02)
    module.load_state_dict(made(qk_norm=True).state_dict())


def test_it_learns() -> None:
    """To give the token before each: a few steps, with a loss that falls by half."""
    module = made()
    optimiser = torch.optim.Adam(module.parameters(), 1e-2)
    want, losses = torch.roll(X, 1, 1), []
    for _ in range(40):
        loss = (module(X) - want)[:, 1:].square().mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] / 2


def test_what_is_refused() -> None:
    wrong: list[tuple[Any, dict[str, Any], str]] = [
        ((32, 5), {}, "dim 32 is no multiple of n_heads 5"), ((32, 4, 3), {}, "n_heads 4 is no multiple of n_kv_heads"),
        ((32, 8), {}, "head_dim is 4; it must be a multiple of 8"), ((32, 4), {"bias": 1}, "bias must be a bool"),
        ((32, 4), {"qk_norm": "yes"}, "qk_norm must be a bool"), ((32, 4), {"rope_theta": -1}, "rope_theta must be"),
    ]  # fmt: skip
    for sizes, options, why in wrong:
        with pytest.raises(UnsupportedProblem, match=why):
            made(*sizes, **options)
    module = made()
    calls: list[tuple[Any, dict[str, Any], str]] = [
        (X[0], {}, r"cannot run FlashMoEScienceAttention\(32, 4, n_kv_heads=2\)\n.*x must have shape \(batch"),
        (X, {"cache": 3}, "cache must be a KVCache"), (X, {"lengths": [4, 9]}, "lengths must be a torch.Tensor like x"),
        (X.reshape(18, 32), {"cu_seqlens": torch.tensor([0, 18])}, "cu_seqlens need max_seqlen"),
    ]  # fmt: skip
    for x, options, why in calls:
        with pytest.raises(UnsupportedProblem, match=why):
            module(x, **options)
    with pytest.raises(TypeError, match=r"x must be a torch.Tensor, but is a numpy.ndarray"):
        module(X.numpy())
    with pytest.raises(UnsupportedProblem, match="float64"):
        made(dtype=torch.float64)(X.double())
