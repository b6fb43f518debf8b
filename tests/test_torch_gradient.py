"""Gradients of attention on torch tensors: against torch's own of a plain float64 formula, and what surrounds them."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from flashmoe_cupy import flash_attention, flash_attention_backward, flash_attention_varlen, moe_route
from flashmoe_cupy.errors import UnsupportedProblem
from flashmoe_cupy.ops import access as accesses
from flashmoe_cupy.plan.operation import registered
from flashmoe_cupy.testing import AttentionCase, Case, VarlenCase

torch = pytest.importorskip("torch")

from torch._dynamo.testing import CompileCounterWithBackend  # noqa: E402
from torch.fx.experimental.proxy_tensor import make_fx  # noqa: E402
from torch.utils.checkpoint import checkpoint  # noqa: E402

pytestmark = [
    pytest.mark.torch,
    # torch's own modules warn about themselves when the compiler is imported
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning:torch"),
]
NAMES = "q", "k", "v", "sinks", "bias"  # what may have a gradient
Tensors = dict[str, Any]


@pytest.fixture(autouse=True)
def _fresh_compiler() -> None:
    torch.compiler.reset()


# ---------------------------------------------------------------------------------------------------------------- truth


def plain(case: Case, t: Tensors) -> tuple[Any, Any]:
    """(out, lse) in float64, by operations that torch differentiates. Layout bshd, or packed rows."""
    packed = isinstance(case, VarlenCase)
    q, k, v = (t[name][None] if packed else t[name] for name in "qkv")
    heads, group = q.shape[2], q.shape[2] // k.shape[2]
    out = torch.zeros(*q.shape[:3], v.shape[3], dtype=torch.float64)
    lse = torch.full((len(q), heads, q.shape[1]), -math.inf, dtype=torch.float64)
    left, right = case.window_size[0], 0 if case.causal else case.window_size[1]
    spans = list(zip(case.spans("q"), case.spans("k"), strict=True))
    for n, (rows, keys) in enumerate(spans):
        b, i, j = 0 if packed else n, slice(*rows), slice(*keys)
        own_k, own_v = (x[b, j].repeat_interleave(group, 1).transpose(0, 1) for x in (k, v))
        s = q[b, i].transpose(0, 1) @ own_k.transpose(1, 2)
        s = s * (q.shape[3] ** -0.5 if case.softmax_scale is None else case.softmax_scale)
        if case.softcap:
            s = case.softcap * torch.tanh(s / case.softcap)
        x = torch.arange(s.shape[1])[:, None] + s.shape[2] - s.shape[1] - torch.arange(s.shape[2])
        seen = (((left < 0) | (x <= left)) & ((right < 0) | (-x <= right))).expand_as(s)
        if "alibi_slopes" in t:
            s = s - t["alibi_slopes"].expand(len(spans), heads)[n, :, None, None] * x.abs()
        if "bias" in t:
            one = t["bias"].expand(len(q), heads, q.shape[1], k.shape[1])[b, :, i, j]
            seen, s = (seen & one, s) if one.dtype == torch.bool else (seen, s + one)
        if "sinks" in t:  # one more key, without a value
            s = torch.cat([s, t["sinks"][:, None, None].expand(-1, s.shape[1], 1)], 2)
            seen = torch.cat([seen, torch.ones_like(seen[:, :, :1])], 2)
            own_v = torch.cat([own_v, torch.zeros_like(own_v[:, :1])], 1)
        if s.shape[2]:
            some = seen.any(2, keepdim=True)
            s = torch.where(some, s.masked_fill(~seen, -math.inf), 0.0)
            out[b, i] = (torch.where(some, s.softmax(2), 0.0) @ own_v).transpose(0, 1)
            lse[b, :, i] = torch.where(some[..., 0], s.logsumexp(2), -math.inf)
    return (out[0], lse[0]) if packed else (out, lse)


def put(arrays: dict[str, Any]) -> Tensors:
    """NumPy arrays as tensors. Rows that do not count are 0: the formula's gradient would keep NaN."""
    half = {name for name, x in arrays.items() if x.dtype.name == "bfloat16"}
    made = {name: torch.from_numpy(x.view(np.int16) if name in half else x) for name, x in arrays.items()}
    made |= {name: made[name].view(torch.bfloat16) for name in half}
    return {name: x.nan_to_num() if name in "qkv" else x for name, x in made.items()}


def floats(t: Tensors) -> list[str]:
    return [name for name in NAMES if name in t and t[name].is_floating_point()]


def random(*shape: int, seed: int = 0) -> Any:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def attend(case: Case, t: Tensors, **more: Any) -> Any:
    if isinstance(case, VarlenCase):
        return flash_attention_varlen(**t, **case.options(), **more)
    return flash_attention(**t, **case.options(), **more)


def expected(case: Case, t: Tensors, dout: Any, dlse: Any) -> Tensors:
    """The true gradients, by name. dlse None: lse has none."""
    exact = {name: x.detach().double() if name in (*NAMES, "alibi_slopes") and x.dtype != torch.bool else x
             for name, x in t.items()}  # fmt: skip
    leaves = [exact[name].requires_grad_() for name in floats(t)]
    arrived = [x.double() for x in (dout, dlse) if x is not None]
    found = torch.autograd.grad(plain(case, exact)[: len(arrived)], leaves, arrived, materialize_grads=True)
    return dict(zip(floats(t), found, strict=True))


def close(got: Any, want: Any, dtype: Any = torch.float32, name: str = "") -> None:
    """dtype: of q, whose rounding the gradients share."""
    allowed = {torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}[dtype] * max(1.0, want.abs().max())
    torch.testing.assert_close(got.double(), want, rtol=0, atol=allowed, msg=lambda text: f"{name}: {text}")


def equal(mine: Any, theirs: Any) -> None:
    assert len(mine) == len(theirs) and all(map(torch.equal, mine, theirs))


SIZES: dict[str, Any] = {"heads_q": 4, "heads_k": 2, "head_dim": 16, "dtype": "float32"}
HALF = SIZES | {"dtype": "bfloat16"}
CASES: list[Case] = [
    AttentionCase(9, 11, **SIZES),
    AttentionCase(11, 7, **SIZES, causal=True, head_dim_v=24),  # queries that see no key
    AttentionCase(17, 33, **SIZES, window_size=(5, 3), softcap=2.0, softmax_scale=0.4),
    AttentionCase(13, 19, **SIZES, causal=True, sinks="float32", alibi="bh"),
    AttentionCase(8, 12, **(SIZES | {"dtype": "float16"}), sinks="same", bias="h1k"),
    AttentionCase(12, 12, **SIZES, bias="bhqk", causal=True),
    AttentionCase(12, 10, **SIZES, bias="1k", bias_dtype="float32"),
    AttentionCase(7, 10, **SIZES, bias="b1q1"),
    AttentionCase(12, 10, **SIZES, bias="b1qk", bias_dtype="bool", window_size=(6, -1)),
    AttentionCase(12, 14, **SIZES, used_q=(12, 9), used_k=(14, 12), left_q=(0, 2), left_k=(3, 0), bias="b11k"),
    AttentionCase(16, 24, **HALF, causal=True, sinks="float32", bias="bhqk", bias_dtype="float32"),
    VarlenCase((5, 0, 13, 7), (9, 3, 0, 21), **SIZES, causal=True, tail_q=3, tail_k=2),
    VarlenCase((6, 9), (8, 9), **SIZES, used_q=(6, 5), used_k=(3, 9), sinks="float32", alibi="bh", window_size=(4, 2)),
    VarlenCase((6, 9), (8, 9), **HALF, sinks="same", softcap=3.0),
]  # fmt: skip


def prepared(case: Case, seed: int = 0) -> tuple[Tensors, Any, Any]:
    """Arrays, dout and dlse. What arrives at rows that do not count is 0, where the plain formula has no rows."""
    arrays: Any = case.random(seed)
    t = put(arrays)
    q, v = t["q"], t["v"]
    shape = q.shape[1::-1] if q.dim() == 3 else (q.shape[0], q.shape[2], q.shape[1])
    return t, random(*q.shape[:-1], v.shape[-1], seed=7).to(q.dtype), random(*shape, seed=8)


@pytest.mark.parametrize("with_lse", [True, False])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_against_torch_in_float64(case: Case, with_lse: bool) -> None:
    t, dout, dlse = prepared(case)
    want = expected(case, t, dout, dlse if with_lse else None)
    leaves = [t[name].requires_grad_() for name in floats(t)]
    made = attend(case, t, return_lse=True) if with_lse else (attend(case, t),)
    assert made[0].grad_fn is made[-1].grad_fn is not None
    found = torch.autograd.grad(made, leaves, (dout, dlse)[: len(made)])
    with torch.no_grad():
        assert torch.equal(attend(case, t), made[0])
    for name, got in zip(floats(t), found, strict=True):
        assert got.dtype == t[name].dtype
        close(got, want[name], t["q"].dtype, name)


@pytest.mark.parametrize("case", [CASES[1], CASES[9]], ids=str)
def test_layout_bhsd(case: AttentionCase) -> None:
    """Turned views of arrays, which are not contiguous, and arrays that are."""
    t, dout, dlse = prepared(case)
    want = expected(case, t, dout, dlse)
    for dense in (True, False):
        turned = {name: x.detach().transpose(1, 2) if name in "qkv" else x.detach() for name, x in t.items()}
        turned = {name: x.contiguous() if dense else x for name, x in turned.items()}
        leaves = [turned[name].requires_grad_() for name in floats(t)]
        made = attend(case, turned, layout="bhsd", return_lse=True)
        found = torch.autograd.grad(made, leaves, (dout.transpose(1, 2), dlse))
        for name, got in zip(floats(t), found, strict=True):
            close(got.transpose(1, 2) if name in "qkv" else got, want[name], name=name)


def small(needs: str = "") -> tuple[Any, Any, Any]:
    """q, k, v; those that are named require a gradient."""
    q, k, v = random(2, 9, 4, 16), random(2, 11, 2, 16, seed=1), random(2, 11, 2, 16, seed=2)
    for name, x in zip("qkv", (q, k, v), strict=True):
        x.requires_grad_(name in needs)
    return q, k, v


def grads(out: Any, of: Any, dout: Any = None) -> tuple[Any, ...]:
    return tuple(torch.autograd.grad(out, of, torch.ones_like(out) if dout is None else dout))


def test_what_arrives_has_any_strides() -> None:
    """The gradient of a sum is one element, expanded; that of a turned result is turned."""
    q, k, v = small("qkv")
    want = grads(flash_attention(q, k, v), (q, k, v))
    equal(torch.autograd.grad(flash_attention(q, k, v).sum(), (q, k, v)), want)
    dout = random(2, 4, 16, 9)
    want = grads(flash_attention(q, k, v), (q, k, v), dout.permute(0, 3, 1, 2).contiguous())
    equal(grads(flash_attention(q, k, v).permute(0, 2, 3, 1), (q, k, v), dout), want)
    wide = random(2, 1, 4, 16).expand(-1, 9, -1, -1)
    want = grads(flash_attention(q, k, v), (q, k, v), wide.contiguous())
    equal(grads(flash_attention(q, k, v), (q, k, v), wide), want)
    _, lse = flash_attention(q, k, v, return_lse=True)  # and nothing arrives at out
    none, one = torch.zeros(2, 9, 4, 16), torch.ones(2, 4, 9)
    true = expected(CASES[0], {"q": q, "k": k, "v": v}, none, one)
    for name, got in zip("qkv", torch.autograd.grad(lse.sum(), (q, k, v)), strict=True):
        close(got, true[name])


def test_only_what_is_needed_is_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    its = registered("flash_attention_backward")
    real = its.host

    def spy(problem: Any, given: Any, made: Any) -> None:
        asked.append(" ".join(made))
        real(problem, given, made)

    monkeypatch.setattr(its, "host", spy)
    q, k, v = small("qkv")
    whole = grads(flash_attention(q, k, v), (q, k, v))
    sinks, bias = random(4).requires_grad_(), random(9, 11).requires_grad_()
    for i, name in enumerate("qkv"):
        given = small(name)
        equal(grads(flash_attention(*given), given[i]), [whole[i]])
    q, k, v = small()
    grads(flash_attention(q, k, v, sinks=sinks, bias=bias), (sinks, bias))
    assert asked == ["dq dk dv", "dq", "dk", "dv", "dsinks dbias"]


# ------------------------------------------------------------------------------------------------- the ways of autograd


def test_gradients_add_up_and_graphs_are_kept() -> None:
    q, k, v = small("qkv")
    want = grads(flash_attention(q, k, v, causal=True), (q, k, v))
    total = flash_attention(q, k, v, causal=True).sum()
    total.backward(retain_graph=True)
    total.backward()
    equal((q.grad, k.grad, v.grad), [2 * once for once in want])
    with pytest.raises(RuntimeError, match="a second time"):
        total.backward()


def test_the_second_derivative_is_refused() -> None:
    q, k, v = small("qk")
    its, _ = operators(CASES[0])
    scalars = {"causal": False, "window_size": (-1, -1), "softcap": 0.0}
    for out in (flash_attention(q, k, v), its(*arguments(its, scalars | {"q": q, "k": k, "v": v}))[0]):
        found = torch.autograd.grad(out.sum(), (q, k), create_graph=True)
        equal(found, grads(flash_attention(q, k, v), (q, k)))
        with pytest.raises(UnsupportedProblem, match="the second derivative of flash_attention"):
            sum(x.sum() for x in found).backward()


def test_what_was_saved_must_not_change() -> None:
    for at in range(4):
        tensors = [x * 1 for x in small("qkv")]
        out = flash_attention(*tensors)
        [*tensors, out][at].mul_(2)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            out.sum().backward()


def test_saved_tensors_have_hooks() -> None:
    q, k, v = small("qkv")
    with torch.autograd.graph.saved_tensors_hooks(lambda x: x.numpy().copy(), torch.from_numpy):
        out = flash_attention(q, k, v)
    equal(grads(out, (q, k, v)), grads(flash_attention(q, k, v), (q, k, v)))


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpoint(reentrant: bool) -> None:
    q, k, v = small("qkv")
    checkpoint(loss, q, k, v, use_reentrant=reentrant).backward()
    equal((q.grad, k.grad, v.grad), torch.autograd.grad(loss(q, k, v), (q, k, v)))


def test_without_grad_mode_nothing_is_recorded() -> None:
    q, k, v = small("qkv")
    want = flash_attention(q.detach(), k.detach(), v.detach())
    out = torch.empty_like(want)
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            one, lse = flash_attention(q, k, v, return_lse=True)
            assert one.grad_fn is lse.grad_fn is None and not one.requires_grad and torch.equal(one, want)
            assert flash_attention(q, k, v, out=out) is out and torch.equal(out, want)
    assert not want.requires_grad


class Marked(torch.Tensor):  # type: ignore[misc, name-defined, unused-ignore]
    pass


def test_parameters_and_subclasses() -> None:
    q, k, v = small("q")
    (want,) = grads(flash_attention(q, k, v), q)
    for x in (torch.nn.Parameter(q.detach()), q.detach().as_subclass(Marked).requires_grad_()):
        flash_attention(x, k, v).sum().backward()
        assert torch.equal(x.grad.as_subclass(torch.Tensor), want)
    q, k, v = small("k")
    equal(grads(flash_attention(q.as_subclass(Marked), k, v), k), grads(flash_attention(q, k, v), k))


def test_a_layer_learns() -> None:
    """Self-attention with learned projections, a sink and a bias: the loss of a small task falls."""
    torch.manual_seed(0)
    width, heads = 32, 2
    project, mix = torch.nn.Linear(width, 3 * width), torch.nn.Linear(width, width)
    sinks, bias = torch.nn.Parameter(torch.zeros(heads)), torch.nn.Parameter(torch.zeros(heads, 12, 12))
    x = torch.randn(4, 12, width)
    want = x.roll(1, 1)
    steps = torch.optim.Adam([*project.parameters(), *mix.parameters(), sinks, bias], lr=1e-2)
    losses = []
    for _ in range(60):
        q, k, v = project(x).unflatten(2, (3, heads, width // heads)).unbind(2)
        loss = (mix(flash_attention(q, k, v, sinks=sinks, bias=bias).flatten(2)) - want).square().mean()
        steps.zero_grad()
        loss.backward()
        steps.step()
        losses.append(loss.item())
    assert losses[-1] < 0.25 * losses[0]
    assert sinks.grad.any() and bias.grad.any()


@pytest.mark.parametrize("grad", [True, False])
def test_autocast(grad: bool) -> None:
    """q, k and v become bfloat16, as for torch's own attention; gradients come back in their own dtypes."""
    q, k, v = small("qk" * grad)
    half = v.bfloat16()

    def theirs(q: Any, k: Any, v: Any) -> Any:
        turned = [x.transpose(1, 2) for x in (q, k, v)]
        return torch.nn.functional.scaled_dot_product_attention(*turned, enable_gqa=True).transpose(1, 2)

    with pytest.raises(UnsupportedProblem, match="dtypes differ"):
        flash_attention(q, k, half)
    exact = flash_attention(q, k, v)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mine, own = flash_attention(q, k, half), theirs(q, k, half)
        assert mine.dtype == own.dtype == torch.bfloat16 and mine.requires_grad == grad
        torch.testing.assert_close(mine, own, atol=2e-2, rtol=2e-2)
        assert torch.equal(flash_attention(q, k, half, sinks=torch.full((4,), -math.inf)), mine)
        if grad:
            torch.testing.assert_close(grads(mine, (q, k)), grads(own, (q, k)), atol=5e-2, rtol=5e-2)
        with torch.autocast("cpu", dtype=torch.float16):
            assert flash_attention(q, k, half).dtype == torch.float16
        with torch.autocast("cpu", enabled=False):
            assert torch.equal(flash_attention(q, k, v), exact)
        with pytest.raises(UnsupportedProblem, match="q has dtype float64"):
            flash_attention(q.double(), k, half)
    assert torch.equal(flash_attention(q, k, v), exact)


def test_torch_func() -> None:
    (q, k, v), whole = small(), small("qkv")
    want = grads(flash_attention(*whole, causal=True), whole)
    found = torch.func.grad(lambda *given: flash_attention(*given, causal=True).sum(), argnums=(0, 1, 2))(q, k, v)
    equal(found, want)
    (out, lse), pull = torch.func.vjp(lambda k: flash_attention(q, k, v, causal=True, return_lse=True), k)
    assert torch.equal(out, flash_attention(q, k, v, causal=True)) and lse.shape == (2, 4, 9)
    assert torch.equal(pull((torch.ones_like(out), torch.zeros_like(lse)))[0], want[1])
    other = torch.func.grad(lambda x: (x * flash_attention(q, k, v)).sum())(torch.ones(()))
    torch.testing.assert_close(other, flash_attention(q, k, v).sum())
    with pytest.raises(UnsupportedProblem, match="the second derivative of flash_attention"):
        torch.func.grad(lambda x: torch.func.grad(lambda q: flash_attention(q, k, v).sum())(x).sum())(q)
    with pytest.raises(UnsupportedProblem, match="logits requires grad"):
        torch.func.grad(lambda x: moe_route(x, top_k=1)[0].sum())(random(3, 8))
    with pytest.raises(UnsupportedProblem, match=r"torch.func transforms \(vmap"):
        torch.vmap(lambda q: flash_attention(q, k, v))(torch.stack((q, q)))


def test_the_short_way_of_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a guard finds earlier calls, it tells those that are differentiated or cast from all others."""
    for name in ("_cuda_getDevice", "_cuda_getCurrentRawStream", "_cuda_isCurrentStreamCapturing"):
        monkeypatch.setattr(torch._C, name, lambda *_: 0, raising=False)
    access = accesses._torch(torch)
    (q, k, v), needy, made = small(), small("k"), {}
    for name, arrays in (("plain", (q, k, v)), ("needy", needy)):
        made[name] = access.guard(arrays)
        with torch.no_grad():
            made[f"{name} no_grad"] = access.guard(arrays)
        with torch.autocast("cpu"):
            made[f"{name} autocast"] = access.guard(arrays)
    assert access.key(needy) is accesses.GRADIENT and access.key((q, k, v)) not in (None, accesses.GRADIENT)
    assert [name for name, guard in made.items() if guard(*needy)] == ["needy"]  # type: ignore[misc]
    assert [name for name, guard in made.items() if guard(q, k, v)] == ["plain", "plain no_grad"]  # type: ignore[misc]
    with torch.no_grad():
        assert access.key(needy) == access.key((q, k, v))
        assert [name for name, guard in made.items() if guard(*needy)] == ["needy no_grad"]  # type: ignore[misc]
    with torch.autocast("cpu"):
        assert access.key((q, k, v))[-1] is accesses.AUTOCAST  # type: ignore[index]
        assert [name for name, guard in made.items() if guard(*needy)] == ["needy autocast"]  # type: ignore[misc]


# ------------------------------------------------------------------------------------------------------------- refusals


def test_what_is_refused() -> None:
    q, k, v = small("qv")
    out = torch.empty(2, 9, 4, 16)
    for target in (out, torch.empty(2, 9, 4, 16, requires_grad=True)):
        with pytest.raises(UnsupportedProblem, match=r"q requires grad .*out is given.*\n.*v requires grad"):
            flash_attention(q, k, v, out=target)
    with pytest.raises(UnsupportedProblem, match="out requires grad and grad mode is on"):
        flash_attention(q.detach(), k, v.detach(), out=torch.empty(2, 9, 4, 16, requires_grad=True))
    slopes = torch.rand(4, requires_grad=True)
    for given in ((q, k, v), small()):
        with pytest.raises(UnsupportedProblem, match=r"alibi_slopes requires grad .*no gradient of it") as caught:
            flash_attention(*given, alibi_slopes=slopes)
        assert ".detach()" in caught.value.hint
    assert flash_attention(q, k, v, alibi_slopes=slopes.detach()).requires_grad
    with pytest.raises(UnsupportedProblem, match=r"q, v .*each requires grad and grad mode is on"):
        flash_attention_backward(out, q, k, v, out, torch.empty(2, 4, 9))
    with pytest.raises(UnsupportedProblem, match=r"q.*requires grad"), torch.autograd.forward_ad.dual_level():
        flash_attention(q, k, v)


def test_errors_are_those_of_the_call() -> None:
    q, k, v = small("q")
    faults: list[Any] = [{"causal": 1}, {"window_size": (1.5, 0)}, {"bias": random(5, 5)}, {"layout": "bsdh"}]
    for wrong in faults:
        with pytest.raises(UnsupportedProblem) as caught:
            flash_attention(q, k, v, **wrong)
        assert next(iter(wrong)) in str(caught.value) and "return_lse" not in caught.value.asked
    with pytest.raises(UnsupportedProblem, match="one library"):
        flash_attention(q, k.numpy(), v)
    with pytest.raises(UnsupportedProblem, match="is a nested tensor"):
        flash_attention(q, torch.nested.nested_tensor([k[0], k[1]]), v)


# ----------------------------------------------------------------------------------------------------------- operators


def arguments(operator: Any, given: Tensors) -> tuple[Any, ...]:
    """All arguments of an operator, in the schema's order."""
    names = [one.name for one in operator.default._schema.arguments]
    return tuple((dict.fromkeys(names) | {"layout": "bshd", "return_lse": True} | given)[name] for name in names)


def operators(case: Case) -> list[Any]:
    """Forward and backward."""
    name = "flash_attention_varlen" if isinstance(case, VarlenCase) else "flash_attention"
    return [getattr(torch.ops.flashmoe_cupy, name + end) for end in ("", "_backward")]


@pytest.mark.parametrize("case", [CASES[3], CASES[5], CASES[12]], ids=str)
def test_operators_have_gradients(case: Case) -> None:
    """Also without return_lse, where lse is computed again."""
    t, dout, dlse = prepared(case)
    leaves, (call, _), given = [t[name].requires_grad_() for name in floats(t)], operators(case), t | case.options()
    want = torch.autograd.grad(attend(case, t, return_lse=True), leaves, (dout, dlse))
    equal(torch.autograd.grad(call(*arguments(call, given)), leaves, (dout, dlse)), want)
    want, less = grads(attend(case, t), leaves, dout), given | {"return_lse": False}
    equal(grads(call(*arguments(call, less))[0], leaves, dout), want)
    with pytest.raises(UnsupportedProblem, match="alibi_slopes requires grad"):
        call(*arguments(call, given | {"alibi_slopes": torch.rand(4, requires_grad=True)}))


@pytest.mark.parametrize("lse", [True, False])
@pytest.mark.parametrize("case", [CASES[3], CASES[12]], ids=["dense", "packed"])
def test_opcheck(case: Case, lse: bool) -> None:
    """torch's own tests: schema, autograd key, fake tensors, dynamic AOT tracing, forward and backward."""
    t, dout, dlse = prepared(case)
    forward, backward = operators(case)
    given = t | case.options() | {"return_lse": lse, "need": "q k v sinks", "deterministic": True}
    out, log = attend(case, t, return_lse=True)
    made = {"dout": dout, "out": out, "lse": log} | ({"dlse": dlse} if lse else {})
    torch.library.opcheck(backward.default, arguments(backward, given | made))
    for name in floats(t):
        t[name].requires_grad_()
    torch.library.opcheck(forward.default, arguments(forward, given))


def loss(q: Any, k: Any, v: Any, sinks: Any = None) -> Any:
    out, lse = flash_attention(q * 2, k, v, sinks=sinks, causal=True, return_lse=True)
    return (out + 1).square().sum() + (lse * 0.5).sum()


def test_compiled_forward_and_backward() -> None:
    """One graph for all lengths."""
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(loss, fullgraph=True, dynamic=True, backend=counter)
    for n in range(3):
        sizes = (3, 9 + n, 4, 16), (3, 11 + 2 * n, 2, 16), (3, 11 + 2 * n, 2, 16), (4,)
        q, k, v, _ = leaves = tuple(random(*shape, seed=n).requires_grad_() for shape in sizes)
        got, want = (torch.autograd.grad(function(*leaves), leaves) for function in (compiled, loss))
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
    assert counter.frame_count == 1
    out = torch.compile(flash_attention, fullgraph=True, backend="aot_eager")(q, k, v)  # lse is saved all the same
    equal(grads(out, (q, k, v)), grads(flash_attention(q, k, v), (q, k, v)))
    t, dout, _ = prepared(CASES[11])
    leaves = tuple([t[name].requires_grad_() for name in floats(t)])
    compiled = torch.compile(flash_attention_varlen, fullgraph=True, backend="aot_eager")
    got = grads(compiled(**t, **CASES[11].options()), leaves, dout)
    equal(got, grads(attend(CASES[11], t), leaves, dout))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = torch.compile(lambda *given: flash_attention(*given), fullgraph=True, backend="aot_eager")(q, k, v)
        assert torch.equal(cast, flash_attention(q, k, v)) and cast.dtype == torch.bfloat16


def test_compiled_with_inductor() -> None:
    q, k, v = small("qkv")
    want = torch.autograd.grad(loss(q, k, v), (q, k, v))
    for function in (loss, lambda *given: checkpoint(loss, *given, use_reentrant=False)):
        got = torch.autograd.grad(torch.compile(function, fullgraph=True)(q, k, v), (q, k, v))
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


def test_traced_with_a_gradient() -> None:
    """A trace holds both operators, and runs on other values."""
    q, k, v = small()
    other = q.flip(0).contiguous()

    def gradient(q: Any) -> Any:
        q = q.detach().requires_grad_()
        return torch.autograd.grad(flash_attention(q, k, v).sum(), q)[0]

    traced = make_fx(gradient, tracing_mode="symbolic", _allow_non_fake_inputs=True)(q)
    assert torch.equal(traced(other), gradient(other))
    nodes = {str(node.target) for node in traced.graph.nodes}
    assert {f"flashmoe_cupy.flash_attention{end}.default" for end in ("", "_backward")} <= nodes
