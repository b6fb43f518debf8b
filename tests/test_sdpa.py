"""The stand-in for torch's scaled_dot_product_attention, against torch's own in float64, with gradients."""

from __future__ import annotations

import inspect
from typing import Any

import pytest

from flashmoe_cupy.errors import UnsupportedProblem

torch = pytest.importorskip("torch")

from flashmoe_cupy.integrations import sdpa  # noqa: E402

pytestmark = [
    pytest.mark.torch,
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning:torch"),
]
attend: Any = sdpa.scaled_dot_product_attention
theirs = torch.nn.functional.scaled_dot_product_attention


def normal(*shape: int, dtype: Any = None) -> Any:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape) + len(shape)), dtype=dtype)


def compare(query: Any, key: Any, value: Any, mask: Any = None, **options: Any) -> Any:
    """Ours in float32 against theirs in float64: result and gradients. Returns ours."""
    given = [x.detach().requires_grad_() for x in (query, key, value)]
    if mask is not None and mask.is_floating_point():
        given.append(mask.detach().requires_grad_())
    exact = [x.detach().double().requires_grad_() for x in given]
    masks = (None, None) if mask is None else (given[3], exact[3]) if len(given) > 3 else (mask, mask)
    ours, want = attend(*given[:3], masks[0], **options), theirs(*exact[:3], masks[1], **options)
    arrived = normal(*want.shape)
    pairs = zip(torch.autograd.grad(ours, given, arrived), torch.autograd.grad(want, exact, arrived.double()),
                strict=True)  # fmt: skip
    for mine, other in ((ours, want), *pairs):
        assert mine.shape == other.shape
        torch.testing.assert_close(mine.double(), other.nan_to_num(), rtol=0, atol=2e-5)
    return ours


def test_the_signature_is_torchs() -> None:
    shown = str(inspect.signature(attend)).replace("'", "").replace("torch.", "")
    names = "query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, dropout_p: float = 0.0, "
    names += "is_causal: bool = False, scale: float | None = None, enable_gqa: bool = False"
    assert shown == f"({names}) -> Tensor"


@pytest.mark.parametrize("lengths", [(5, 5), (3, 9), (9, 3), (1, 7), (7, 1), (130, 70), (70, 130)], ids=str)
@pytest.mark.parametrize("lead", [(), (3,), (2, 3), (2, 2, 3)], ids=str)
def test_all_shapes(lead: tuple[int, ...], lengths: tuple[int, int]) -> None:
    """Head dims that are no multiple of 8, too; causal is aligned at the top left, whichever length is greater."""
    n, m = lengths
    for e, ev in ((8, 8), (12, 20), (16, 8)) if n < 70 else ((16, 16),):
        q, k, v = normal(*lead, n, e), normal(*lead, m, e), normal(*lead, m, ev)
        compare(q, k, v)
        compare(q, k, v, is_causal=True)
        compare(q, k, v, scale=0.3, is_causal=True)


@pytest.mark.parametrize("lead", [(), (3,), (2, 3), (2, 2, 3)], ids=str)
def test_masks(lead: tuple[int, ...]) -> None:
    """Boolean and added ones of all shapes that broadcast; the gradient of an added one has its own shape."""
    q, k, v = normal(*lead, 5, 8), normal(*lead, 9, 8), normal(*lead, 9, 8)
    shapes: list[tuple[int, ...]] = [(5, 9), (1, 9), (5, 1)]
    shapes += [(*lead, 5, 9), (lead[-1], 1, 9)] if lead else []
    shapes += [(*lead[:-1], 1, 1, 9), (*(1 for _ in lead), 5, 9)] if len(lead) > 1 else []
    for shape in shapes:
        compare(q, k, v, normal(*shape))
        compare(q, k, v, normal(*shape) > -0.3)
        hidden = normal(*shape) > 0.5
        compare(q, k, v, torch.zeros(shape).masked_fill(hidden & (torch.arange(shape[-1]) > 0), -torch.inf))


def test_a_query_that_sees_no_key_is_0() -> None:
    q, k, v = normal(1, 2, 4, 8), normal(1, 2, 6, 8), normal(1, 2, 6, 8)
    mask = torch.ones(4, 6, dtype=torch.bool)
    mask[1] = False
    for one in (mask, torch.zeros(4, 6).masked_fill(~mask, -torch.inf)):
        out = attend(q, k, v, one)
        assert not out[:, :, 1].any() and out[:, :, 0].any()
    compare(q, k, v, mask)
    assert not attend(q, k[:, :, :0], v[:, :, :0]).any()


def test_leading_axes_broadcast() -> None:
    q = normal(2, 4, 5, 8)
    compare(q, normal(1, 4, 6, 8), normal(2, 1, 6, 8))
    compare(q, normal(2, 1, 6, 8), normal(1, 1, 6, 16))
    compare(normal(2, 1, 5, 8), normal(2, 3, 6, 8), normal(3, 6, 8))
    compare(normal(2, 3, 4, 5, 8).transpose(0, 1), normal(3, 1, 4, 6, 8), normal(3, 2, 4, 6, 8), normal(1, 2, 1, 5, 6))
    compare(normal(2, 4, 8, 5).mT, normal(2, 4, 6, 8), normal(2, 4, 6, 8))  # the last axis is not contiguous


@pytest.mark.parametrize("causal", [False, True])
def test_fewer_heads(causal: bool) -> None:
    compare(normal(2, 4, 5, 8), normal(2, 2, 6, 8), normal(2, 2, 6, 8), enable_gqa=True, is_causal=causal)
    compare(normal(4, 5, 8), normal(1, 6, 8), normal(1, 6, 8), enable_gqa=True, is_causal=causal)
    compare(normal(2, 1, 6, 5, 8), normal(2, 1, 3, 6, 8), normal(2, 1, 3, 6, 8), enable_gqa=True, is_causal=causal)
    mask = normal(2, 4, 5, 6) > 0
    compare(normal(2, 4, 5, 8), normal(2, 2, 6, 8), normal(2, 2, 6, 8), mask, enable_gqa=True)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=[pytest.mark.gpu, pytest.mark.sm80])])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_short_floats(dtype: str, device: str) -> None:
    q, k, v = (normal(2, 3, 40, 16).to(device, getattr(torch, dtype)) for _ in range(3))
    out = attend(q, k, v, is_causal=True)
    want = theirs(q.double(), k.double(), v.double(), is_causal=True)
    worst = (theirs(q, k, v, is_causal=True).double() - want).abs().max()
    assert out.dtype == q.dtype and (out.double() - want).abs().max() <= 2 * worst + 1e-5
    mask = normal(40, 40).to(device, q.dtype)  # in query's dtype, as torch wants it, and in float32
    torch.testing.assert_close(attend(q, k, v, mask), attend(q, k, v, mask.float()))
    for n, m in ((40, 23), (23, 40)):  # aligned at the top left
        some = q[:, :, :n], k[:, :, :m], v[:, :, :m]
        want = theirs(*(x.double() for x in some), is_causal=True)
        torch.testing.assert_close(attend(*some, is_causal=True).double(), want, rtol=0, atol=0.03)


@pytest.mark.parametrize("options", [{}, {"is_causal": True}, {"attn_mask": torch.ones(5, 7) > 0}], ids=str)
def test_compiled(options: Any) -> None:
    q, k, v = (normal(2, 3, n, 12).requires_grad_() for n in (5, 7, 7))
    compiled = torch.compile(attend, fullgraph=True, backend="aot_eager")
    got, want = compiled(q, k, v, **options), attend(q, k, v, **options)
    assert torch.equal(got, want)
    for mine, other in zip(*(torch.autograd.grad(x.sum(), (q, k, v)) for x in (got, want)), strict=True):
        torch.testing.assert_close(mine, other)


def test_it_takes_the_place_of_torchs(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    block = torch.nn.TransformerEncoderLayer(32, 4, 64, dropout=0.0, batch_first=True)
    x = normal(2, 9, 32)
    want = block(x, is_causal=True, src_mask=torch.nn.Transformer.generate_square_subsequent_mask(9))
    seen: list[Any] = []

    def counted(*given: Any, **options: Any) -> Any:
        seen.append(options)
        return attend(*given, **options)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", counted)
    got = block(x, is_causal=True, src_mask=torch.nn.Transformer.generate_square_subsequent_mask(9))
    assert seen
    torch.testing.assert_close(got, want)


Q = normal(2, 4, 5, 8)
WRONG: list[tuple[tuple[Any, ...], dict[str, Any], str]] = [
    ((Q, Q, Q), {"dropout_p": 0.1}, r"dropout_p=0.1, but there is no dropout\n.*hint: dropout_p=0.0"),
    ((Q, Q, Q), {"dropout_p": None}, "dropout_p=None"),
    ((Q, Q, Q), {"is_causal": True, "attn_mask": torch.ones(5, 5, dtype=torch.bool)}, "is_causal is True beside an"),
    ((Q, Q, Q), {"is_causal": 1, "enable_gqa": "yes"}, "is_causal must be a bool, but is 1\n.*enable_gqa must be"),
    ((Q, Q[:, :2], Q[:, :2]), {}, "do not broadcast.*\n.*enable_gqa=True for fewer heads"),
    ((Q, Q[:, :3], Q[:, :3]), {"enable_gqa": True}, "heads"),
    ((Q, Q[:, :2], Q[:, :1]), {"enable_gqa": True}, "heads"),
    ((Q[0, 0], Q[0, 0], Q[0, 0]), {"enable_gqa": True}, "query must have at least 3 dimensions, but has 2"),
    ((Q[0, 0, 0], Q, Q), {}, "query must have at least 2 dimensions, but has 1"),
    ((Q, Q, Q[:, :, :3]), {"is_causal": True}, "key and value differ in length: key has 5 rows, value has 3"),
    ((Q, Q[..., :4], Q), {}, "head_dim"),
    ((Q.double(), Q.double(), Q.double()), {}, "float64"),
    ((Q, Q.half(), Q), {}, "dtypes differ"),
    ((Q, Q, Q), {"attn_mask": torch.ones(3, 5)}, r"attn_mask must broadcast to \(2, 4, 5, 5\).* has \(3, 5\)"),
    ((Q, Q, Q), {"attn_mask": torch.ones(1, 1, 1, 5, 5)}, r"has \(1, 1, 1, 5, 5\)"),
    ((Q, Q, Q), {"attn_mask": torch.ones(5, 5, dtype=torch.int32)}, "bias has dtype int32"),
    ((Q, Q, Q), {"scale": "1"}, "softmax_scale must be"),
]


@pytest.mark.parametrize(("arrays", "options", "why"), WRONG, ids=[why for *_, why in WRONG])
def test_what_is_refused(arrays: Any, options: dict[str, Any], why: str) -> None:
    with pytest.raises(UnsupportedProblem, match=why):
        attend(*arrays, **options)


def test_what_is_no_tensor() -> None:
    with pytest.raises(UnsupportedProblem, match="query is a nested tensor"):
        attend(torch.nested.nested_tensor([Q[0], Q[1]], layout=torch.jagged), Q, Q)
    with pytest.raises(TypeError, match=r"key must be a torch.Tensor, but is a numpy.ndarray; flashmoe_cupy.flash_att"):
        attend(Q, Q.numpy(), Q)
    with pytest.raises(TypeError, match=r"attn_mask must be a torch.Tensor, but is a builtins.list"):
        attend(Q, Q, Q, [[True]])
    with pytest.raises((ValueError, torch._dynamo.exc.Unsupported), match="there is no dropout"):
        torch.compile(lambda: attend(Q, Q, Q, dropout_p=0.5), backend="eager", fullgraph=True)()
