"""flash-attn's functions: its signatures, its own way of comparing, packed tensors and their gradients."""

from __future__ import annotations

import inspect
import itertools
import random
import threading
from collections.abc import Callable
from typing import Any

import pytest

from flashmoe_cupy import flash_attention, flash_attention_varlen
from flashmoe_cupy.errors import UnsupportedProblem
from flashmoe_cupy.plan.operation import registered

torch = pytest.importorskip("torch")

from flashmoe_cupy.integrations import flash_attn  # noqa: E402

pytestmark = [
    pytest.mark.torch,
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning:torch"),
]
fa: Any = flash_attn  # wrong types, too
DEVICES = ["cpu", pytest.param("cuda", marks=[pytest.mark.gpu, pytest.mark.sm80])]
COMMON = "dropout_p=0.0 softmax_scale=None causal=False window_size=(-1, -1) softcap=0.0 alibi_slopes=None "
COMMON += "deterministic=False return_attn_probs=False"
SIGNATURES = {  # of flash-attn 2.8
    "flash_attn_func": "q k v",
    "flash_attn_kvpacked_func": "q kv",
    "flash_attn_qkvpacked_func": "qkv",
    "flash_attn_varlen_func": "q k v cu_seqlens_q cu_seqlens_k max_seqlen_q max_seqlen_k",
    "flash_attn_varlen_kvpacked_func": "q kv cu_seqlens_q cu_seqlens_k max_seqlen_q max_seqlen_k",
    "flash_attn_varlen_qkvpacked_func": "qkv cu_seqlens max_seqlen",
}


def normal(*shape: int, seed: int = 0, dtype: Any = None) -> Any:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape))).to(dtype or torch.float32)


@pytest.mark.parametrize("name", SIGNATURES)
def test_signatures_are_theirs(name: str) -> None:
    wanted = f"{SIGNATURES[name]} {COMMON}" + (" block_table=None" if name == "flash_attn_varlen_func" else "")
    parameters = inspect.signature(getattr(fa, name)).parameters.values()
    shown = [one.name if one.default is one.empty else f"{one.name}={one.default!r}" for one in parameters]
    assert " ".join(shown) == wanted
    assert {*SIGNATURES, "flash_attn_with_kvcache"} == {*fa.__all__}


# ------------------------------------------------------------------------------------------ as flash-attn's tests do it


def plain(q: Any, k: Any, v: Any, options: dict[str, Any], exact: bool) -> Any:
    """Attention by torch's operations in q's dtype, or in float32, where flash-attn's tests take their reference."""
    dtype = q.dtype
    if exact:
        q, k, v = q.double(), k.double(), v.double()
    group, n, m = q.shape[2] // k.shape[2], q.shape[1], k.shape[1]
    k, v = k.repeat_interleave(group, 2), v.repeat_interleave(group, 2)
    scores = torch.einsum("bthd,bshd->bhts", q * q.shape[-1] ** -0.5, k)
    if cap := options.get("softcap"):
        scores = (scores / cap).tanh() * cap
    left, right = options.get("window_size", (-1, -1))
    right = 0 if options.get("causal") else right
    far = torch.arange(n, device=q.device)[:, None] + m - n - torch.arange(m, device=q.device)  # keys behind a query
    if (slopes := options.get("alibi_slopes")) is not None:
        scores = scores - (slopes.to(scores.dtype)[..., None, None] * far.abs()).to(scores.dtype)
    hidden = ((far > left) & (left >= 0)) | ((-far > right) & (right >= 0))
    scores = scores.masked_fill(hidden, -torch.inf)
    weights = scores.softmax(-1).to(v.dtype).masked_fill(hidden.all(-1, keepdim=True), 0.0)
    return torch.einsum("bhts,bshd->bthd", weights, v).to(torch.float64 if exact else dtype)


def grads(out: Any, leaves: Any, arrived: Any) -> Any:
    return torch.autograd.grad(out, leaves, arrived)


GRID = [  # seqlen_q, seqlen_k, heads, heads_k, head_dim, options
    (97, 97, 4, 4, 32, {}),
    (113, 203, 6, 2, 59, {"causal": True}),
    (128, 217, 4, 1, 64, {"window_size": (40, 7)}),
    (108, 108, 4, 2, 40, {"causal": True, "softcap": 15.0}),
    (203, 113, 2, 2, 111, {"causal": True, "alibi": 2}),
    (64, 128, 3, 3, 16, {"causal": True, "window_size": (31, -1), "alibi": 1}),
]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("case", GRID, ids=str)
def test_errors_are_at_most_twice_those_of_plain_code(case: Any, dtype: str, device: str) -> None:
    n, m, heads, heads_k, dim, given = case
    options = {name: value for name, value in given.items() if name != "alibi"}
    if kind := given.get("alibi"):
        options["alibi_slopes"] = torch.rand((2, heads) if kind == 2 else (heads,), device=device) * 0.3
    of = getattr(torch, dtype)
    shapes = (2, n, heads, dim), (2, m, heads_k, dim), (2, m, heads_k, dim)
    q, k, v = leaves = [normal(*shape, seed=i, dtype=of).to(device).requires_grad_() for i, shape in enumerate(shapes)]
    arrived = normal(2, n, heads, dim, seed=3, dtype=of).to(device)
    exact, same_dtype = plain(q, k, v, options, True), plain(q, k, v, options, False)
    out, lse, masks = fa.flash_attn_func(q, k, v, **options, return_attn_probs=True)
    assert masks is None and lse.shape == (2, heads, n) and lse.dtype == torch.float32 and out.dtype == of
    want = exact, *grads(exact, leaves, arrived.double())
    theirs = same_dtype, *grads(same_dtype, leaves, arrived)
    ours = out, *grads(out, leaves, arrived)
    for mine, other, true in zip(ours, theirs, want, strict=True):
        assert mine.shape == true.shape
        allowed = 2 * (other.double() - true.double()).abs().max() + 1e-5
        assert (mine.double() - true.double()).abs().max() <= allowed


@pytest.mark.parametrize("seed", range(16))
def test_random_options(seed: int) -> None:
    """Packed sequences, and the same ones alone in a batch of one, in float32: results and gradients."""
    r = random.Random(seed)
    fewer, dim = r.choice([1, 2, 3]), r.choice([8, 12, 32, 59])
    heads, batch = fewer * r.choice([1, 2]), r.choice([1, 3])
    lengths = [[r.choice([0, 1, 7, 40, 70]) for _ in range(batch)] for _ in range(2)]
    options: dict[str, Any] = {
        "causal": r.random() < 0.5, "window_size": r.choice([(-1, -1), (5, 0), (0, 9), (33, -1), (-1, 4)]),
        "softcap": r.choice([0.0, 0.0, 7.0]),
    }  # fmt: skip
    if r.random() < 0.5:
        options["alibi_slopes"] = normal(batch, heads, seed=seed).abs() if r.random() < 0.5 else normal(heads).abs()
    total = [sum(x) for x in lengths]
    shapes = (total[0], heads, dim), (total[1], fewer, dim), (total[1], fewer, dim)
    q, k, v = leaves = [normal(*shape, seed=seed + i).requires_grad_() for i, shape in enumerate(shapes)]
    cu_q, cu_k = (torch.tensor([0, *itertools.accumulate(x)], dtype=torch.int32) for x in lengths)
    out = fa.flash_attn_varlen_func(q, k, v, cu_q, cu_k, max(lengths[0]), max(lengths[1]), **options)
    arrived, parts, alone = normal(*out.shape, seed=9), [], []
    slopes = options.get("alibi_slopes")
    for b in range(batch):
        i, j = (slice(int(cu[b]), int(cu[b + 1])) for cu in (cu_q, cu_k))
        one = dict(options)
        if slopes is not None and slopes.ndim > 1:
            one["alibi_slopes"] = slopes[b : b + 1]
        given = q[i][None], k[j][None], v[j][None]
        alone.append(fa.flash_attn_func(*given, **one)[0])
        empty = q[i].double() @ torch.zeros(dim, dim, dtype=torch.float64)
        parts.append(plain(*given, one, True)[0] if lengths[0][b] and lengths[1][b] else empty)
    want = torch.cat(parts)
    for mine in (out, torch.cat(alone)):
        torch.testing.assert_close(mine.double(), want, rtol=0, atol=5e-6)
        got = grads(mine, leaves, arrived)
        true = torch.autograd.grad(want, leaves, arrived.double(), retain_graph=True, materialize_grads=True)
        for x, y in zip(got, true, strict=True):
            torch.testing.assert_close(x, y, rtol=0, atol=2e-5 * max(1.0, float(y.abs().max()) if y.numel() else 1.0))


# ------------------------------------------------------------------------------------------------------ packed tensors

OPTIONS: list[dict[str, Any]] = [
    {}, {"causal": True}, {"window_size": (5, 3), "softcap": 4.0}, {"causal": True, "softmax_scale": 0.3},
    {"alibi_slopes": torch.tensor([0.1, 0.4])}, {"deterministic": True, "causal": True},
]  # fmt: skip
CU = torch.tensor([0, 5, 5, 17], dtype=torch.int32)  # the last two of 19 rows belong to no sequence


def packed_calls(q: Any, kv: Any, qkv: Any, varlen: bool) -> list[tuple[Callable[..., Any], Callable[..., Any], Any]]:
    """(a function on packed tensors, the same on their parts, what is differentiated)."""
    lengths = (CU, CU, 12, 12) if varlen else ()
    three = fa.flash_attn_varlen_func if varlen else fa.flash_attn_func
    of_kv = fa.flash_attn_varlen_kvpacked_func if varlen else fa.flash_attn_kvpacked_func
    of_qkv = fa.flash_attn_varlen_qkvpacked_func if varlen else fa.flash_attn_qkvpacked_func
    return [
        (lambda q, kv, **o: of_kv(q, kv, *lengths, **o), lambda q, kv, **o: three(q, *kv.unbind(-3), *lengths, **o),
         (q, kv)),
        (lambda qkv, **o: of_qkv(qkv, *lengths[::2], **o), lambda qkv, **o: three(*qkv.unbind(-3), *lengths, **o),
         (qkv,)),
    ]  # fmt: skip


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("dim", [16, 12])
@pytest.mark.parametrize("varlen", [False, True], ids=["dense", "varlen"])
def test_packed(varlen: bool, dim: int, options: dict[str, Any]) -> None:
    rows = (19,) if varlen else (3, 11)
    q, kv, qkv = normal(*rows, 2, dim), normal(*rows, 2, 1, dim), normal(*rows, 3, 2, dim)
    for packed, parts, leaves in packed_calls(q, kv, qkv, varlen):
        for x in leaves:
            x.requires_grad_()
        (out, lse, _), (want, want_lse, _) = (f(*leaves, **options, return_attn_probs=True) for f in (packed, parts))
        assert torch.equal(out, want) and torch.equal(lse, want_lse)
        arrived = normal(*out.shape, seed=5)
        got, expected = grads(out, leaves, arrived), grads(want, leaves, arrived)
        assert all(map(torch.equal, got, expected))
        both = [(x * arrived).sum() + log[log.isfinite()].sum() for x, log in
                (f(*leaves, **options, return_attn_probs=True)[:2] for f in (packed, parts))]  # fmt: skip
        got, expected = (torch.autograd.grad(x, leaves) for x in both)
        assert all(map(torch.equal, got, expected))
        assert torch.equal(packed(*leaves, **options), out)
        with torch.no_grad():
            assert torch.equal(packed(*leaves, **options), out)


def test_the_gradient_of_a_packed_tensor_is_written_in_place(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []
    true = fa.flash_attention_backward

    def spy(*a: Any, **given: Any) -> Any:
        seen.append(given)
        return true(*a, **given)

    monkeypatch.setattr(fa, "flash_attention_backward", spy)
    qkv, q = normal(2, 7, 3, 2, 16).requires_grad_(), normal(2, 7, 2, 16)
    (made,) = grads(fa.flash_attn_qkvpacked_func(qkv), [qkv], torch.ones(2, 7, 2, 16))
    assert [seen[0][name].data_ptr() for name in ("dq", "dk", "dv")] == [x.data_ptr() for x in made.unbind(2)]
    kv = normal(2, 7, 2, 2, 16).requires_grad_()
    (made,) = grads(fa.flash_attn_kvpacked_func(q, kv), [kv], torch.ones(2, 7, 2, 16))
    assert seen[1]["need"] == "k v" and seen[1]["dk"].data_ptr() == made.data_ptr()


@pytest.mark.parametrize("varlen", [False, True], ids=["dense", "varlen"])
def test_packed_compiles(varlen: bool) -> None:
    rows = (19,) if varlen else (3, 11)
    q, kv, qkv = (normal(*rows, *heads, 16).requires_grad_() for heads in ((2,), (2, 1), (3, 2)))
    options = {"window_size": (5, 3), "softcap": 4.0, "deterministic": True, "return_attn_probs": True}
    for packed, _, leaves in packed_calls(q, kv, qkv, varlen):
        torch._dynamo.reset()
        compiled = torch.compile(packed, fullgraph=True, backend="aot_eager")
        found = []
        for call in (packed, compiled):
            out, lse, none = call(*leaves, **options)
            assert none is None
            found.append((out, *torch.autograd.grad(out.square().sum() + lse[..., :17].sum(), leaves)))
        for x, y in zip(*found, strict=True):
            torch.testing.assert_close(x, y)


def test_packed_elsewhere() -> None:
    """Frozen parts, autocast, torch.func, torch.compile and second derivatives go the way of separate tensors."""
    q, kv, qkv = normal(2, 7, 2, 16).requires_grad_(), normal(2, 7, 2, 2, 16), normal(2, 7, 3, 2, 16)
    want = grads(fa.flash_attn_func(q, *kv.unbind(2)), [q], torch.ones_like(q))
    assert torch.equal(grads(fa.flash_attn_kvpacked_func(q, kv), [q], torch.ones_like(q))[0], want[0])

    def total(x: Any) -> Any:
        return fa.flash_attn_qkvpacked_func(x, causal=True).square().sum()

    leaf = qkv.clone().requires_grad_()
    (want,) = torch.autograd.grad(total(leaf), leaf)
    torch.testing.assert_close(torch.func.grad(total)(qkv), want)
    compiled = torch.compile(total, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(torch.autograd.grad(compiled(leaf), leaf)[0], want)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert fa.flash_attn_qkvpacked_func(leaf).dtype == torch.bfloat16
    (first,) = torch.autograd.grad(total(leaf), leaf, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiate twice"):
        first.sum().backward()
    slopes = torch.rand(2, requires_grad=True)
    with pytest.raises(UnsupportedProblem, match="alibi_slopes requires grad"):
        fa.flash_attn_qkvpacked_func(leaf, alibi_slopes=slopes)


# ------------------------------------------------------------------------------------------------------------- options


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What `deterministic` each backward gets."""
    found: list[Any] = []
    for name in ("flash_attention_backward", "flash_attention_varlen_backward"):
        operation = registered(name)

        def spy(problem: Any, given: Any, made: Any, true: Any = operation.host) -> None:
            found.append(problem.deterministic)
            true(problem, given, made)

        monkeypatch.setattr(operation, "host", spy)
    return found


def test_deterministic_reaches_the_backward(asked: list[Any]) -> None:
    q, k, v = (normal(2, 7, 2, 16, seed=i).requires_grad_() for i in range(3))
    flat = [x.detach().reshape(14, 2, 16).requires_grad_() for x in (q, k, v)]
    cu = torch.tensor([0, 7, 14], dtype=torch.int32)
    kv, qkv = normal(2, 7, 2, 2, 16).requires_grad_(), normal(2, 7, 3, 2, 16).requires_grad_()
    calls: list[Callable[..., Any]] = [
        lambda **o: fa.flash_attn_func(q, k, v, **o), lambda **o: fa.flash_attn_kvpacked_func(q, kv, **o),
        lambda **o: fa.flash_attn_qkvpacked_func(qkv, **o),
        lambda **o: fa.flash_attn_varlen_func(*flat, cu, cu, 7, 7, **o),
        torch.compile(lambda **o: fa.flash_attn_func(q, k, v, **o), fullgraph=True, backend="aot_eager"),
    ]  # fmt: skip
    for call in calls:
        outs = [call(deterministic=choice, causal=True) for choice in (True, False)]
        assert torch.equal(*outs)
        for out in outs[::-1]:  # what was asked at the forward counts, in any order
            out.sum().backward()
    assert asked == [False, True] * len(calls)
    asked.clear()
    outs = [call(deterministic=choice) for call in calls[:4] for choice in (True, False)]
    torch.use_deterministic_algorithms(True)
    try:
        for out in outs:
            out.sum().backward()
    finally:
        torch.use_deterministic_algorithms(False)
    assert asked == [True] * 8
    assert "deterministic" not in registered("flash_attention").options  # nothing that the forward pass depends on
    with torch.no_grad():
        assert torch.equal(fa.flash_attn_func(q, k, v, deterministic=True), flash_attention(q, k, v))


def test_deterministic_in_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each call has its own choice, whatever other threads do."""
    operation, found = registered("flash_attention_backward"), set()
    true = operation.host

    def spy(problem: Any, given: Any, made: Any) -> None:
        found.add((threading.current_thread().name, problem.deterministic))
        true(problem, given, made)

    def work(choice: bool) -> None:
        x = normal(1, 5, 2, 8).requires_grad_()
        for _ in range(50):
            fa.flash_attn_func(x, x, x, deterministic=choice).sum().backward()

    monkeypatch.setattr(operation, "host", spy)
    threads = [threading.Thread(target=work, args=(choice,), name=str(choice)) for choice in (True, False)]
    for one in threads:
        one.start()
    for one in threads:
        one.join()
    assert found == {("True", True), ("False", False)}


def test_options_mean_what_they_mean_there() -> None:
    q, k, v = normal(2, 5, 4, 16), normal(2, 9, 2, 16), normal(2, 9, 2, 16)
    assert torch.equal(fa.flash_attn_func(q, k, v, 0.0, 0.5, True, (3, 0)),
                       flash_attention(q, k, v, softmax_scale=0.5, causal=True, window_size=(3, 0)))  # fmt: skip
    assert torch.equal(fa.flash_attn_func(q, k, v, softcap=-1.0), flash_attention(q, k, v))
    assert torch.equal(fa.flash_attn_func(q, k, v, window_size=torch.tensor([2, 1])),
                       flash_attention(q, k, v, window_size=(2, 1)))  # fmt: skip
    assert torch.equal(fa.flash_attn_func(q.mT.contiguous().mT, k, v), flash_attention(q, k, v))
    wide = normal(2, 9, 2, 20)
    torch.testing.assert_close(fa.flash_attn_func(q, k, wide), flash_attention(q, k, wide.repeat(1, 1, 1, 2))[..., :20])
    cu_q, cu_k = (torch.tensor([0, n, 2 * n], dtype=torch.int32) for n in (5, 9))
    flat = [x.flatten(0, 1) for x in (q, k, v)]
    out, lse, none = fa.flash_attn_varlen_func(*flat, cu_q, cu_k, 5, 9, causal=True, return_attn_probs=True)
    want = flash_attention_varlen(*flat, cu_seqlens_q=cu_q, cu_seqlens_k=cu_k, max_seqlen_q=5, max_seqlen_k=9,
                                  causal=True, return_lse=True)  # fmt: skip
    assert torch.equal(out, want[0]) and torch.equal(lse, want[1]) and lse.shape == (4, 10) and none is None
    for _, dtype in (("host", torch.float32), ("short", torch.float16)):
        assert fa.flash_attn_func(q.to(dtype), k.to(dtype), v.to(dtype)).dtype == dtype


X, T = normal(2, 5, 4, 16), normal(10, 4, 16)
KV, QKV, LIST = normal(2, 5, 2, 4, 16), normal(2, 5, 3, 4, 16), torch.tensor([0, 5, 10], dtype=torch.int32)
WRONG: list[tuple[Callable[[], Any], str]] = [
    (lambda: fa.flash_attn_func(X, X, X, dropout_p=0.17), r"run flash_attn_func\n.*dropout_p=0.17, but there is no"),
    (lambda: fa.flash_attn_func(X, X, X, 0.1, deterministic=1), "dropout_p=0.1.*\n.*deterministic must be a bool"),
    (lambda: fa.flash_attn_func(X, X, X, return_attn_probs=None), "return_attn_probs must be a bool, but is None"),
    (lambda: fa.flash_attn_func(X, X, X, softcap=float("nan")), "softcap"),
    (lambda: fa.flash_attn_func(X, X, X, softcap="no"), "softcap"),
    (lambda: fa.flash_attn_func(X, X, X, window_size=3), "window_size must be two ints"),
    (lambda: fa.flash_attn_func(X, X, X, causal="yes"), "causal must be a bool"),
    (lambda: fa.flash_attn_func(X[..., :11], X[..., :12], X), "head_dim"),
    (lambda: fa.flash_attn_func(X, X[:, :, :3], X[:, :, :3]), "heads"),
    (lambda: fa.flash_attn_func(X, X, X, alibi_slopes=torch.ones(3)), "alibi_slopes"),
    (lambda: fa.flash_attn_func(X, X, X, alibi_slopes=torch.ones(4).requires_grad_()), "alibi_slopes requires grad"),
    (lambda: fa.flash_attn_func(X.double(), X.double(), X.double()), "float64"),
    (lambda: fa.flash_attn_kvpacked_func(X, QKV), r"kv must have shape \(batch, seqlen_k, 2, heads_k, head_dim\)"),
    (lambda: fa.flash_attn_qkvpacked_func(X), r"qkv must have shape \(batch, .*, but has \(2, 5, 4, 16"),
    (lambda: fa.flash_attn_kvpacked_func(T.clone().requires_grad_(), KV.clone().requires_grad_()), "q must have 4"),
    (lambda: fa.flash_attn_varlen_qkvpacked_func(QKV, LIST, 5), r"qkv must have shape \(total, 3, heads, head_dim\)"),
    (lambda: fa.flash_attn_varlen_func(T, T, T, LIST, LIST, 5, 5, block_table=LIST), "there are no paged caches"),
    (lambda: fa.flash_attn_varlen_func(T, T, T, LIST.long(), LIST, 5, 5), "cu_seqlens_q.*int32"),
    (lambda: fa.flash_attn_varlen_func(T, T, T, LIST, LIST, 5.5, 5), "max_seqlen_q must"),
    (lambda: fa.flash_attn_with_kvcache(X, X, X, cache_seqlens=LIST), r"hint: .*seqused_k=lengths.*KVCache"),
]


@pytest.mark.parametrize(("call", "why"), WRONG, ids=[why for _, why in WRONG])
def test_what_is_refused(call: Callable[[], Any], why: str) -> None:
    with pytest.raises(UnsupportedProblem, match=why):
        call()


def test_what_is_no_tensor() -> None:
    with pytest.raises(TypeError, match=r"flash_attn_func: v must be a torch.Tensor, but is a numpy.ndarray; flashmoe"):
        fa.flash_attn_func(X, X, X.numpy())
    with pytest.raises(TypeError, match=r"cu_seqlens must be a torch.Tensor, but is a builtins.list"):
        fa.flash_attn_varlen_qkvpacked_func(normal(5, 3, 2, 16), [0, 5], 5)
    with pytest.raises(TypeError, match=r"qkv must be a torch.Tensor, but is None"):
        fa.flash_attn_qkvpacked_func(None)
