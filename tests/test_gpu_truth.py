"""The truth of the GPU tests, attention written plainly in PyTorch, with the tests of that truth itself.

The GPU tests need a truth that is fast enough for thousands of problems, so it runs where the arrays are: `attend` in
float32 (float64 for fp32 problems), and once more in the low dtype as the measure of what that dtype can give. Here it
is checked against the float64 NumPy reference on small problems. Everything else in this file is shared by
test_gpu_*.py: `tensors` draws a problem's arrays, `check` runs and judges one, `compile_registered` compiles all
kernels that they need at once.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import math
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
import pytest
from compile_kit import compile_sources

import flashmoe_cupy
from flashmoe_cupy.plan.archs import arch_for
from flashmoe_cupy.plan.kernels import of_task, only
from flashmoe_cupy.testing import (
    TOLERANCES,
    AttentionCase,
    Case,
    VarlenCase,
    Verdict,
    compare_lse,
    error_rule,
    relative_error,
    row_error,
    row_rule,
)

torch = pytest.importorskip("torch")

Tensor = Any  # torch.Tensor; mypy does not follow torch
Arrays = dict[str, Any]
CHUNK = 1 << 28  # scores held at once by the truth


def torch_dtype(name: str) -> Any:
    return getattr(torch, name)


# ---------------------------------------------------------------------------------------------------------------------
# the truth


def attend(
    q: Tensor, k: Tensor, v: Tensor, *, dtype: Any, causal: bool = False, window_size: tuple[int, int] = (-1, -1),
    softmax_scale: float | None = None, softcap: float = 0.0, sinks: Tensor | None = None,
    alibi_slopes: Tensor | None = None, bias: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Attention of (batch, seq, heads, dim) tensors, both products in `dtype`; scores and softmax in at least float32.

    Returns out (batch, seqlen_q, heads_q, head_dim_v) in `dtype` and lse (batch, heads_q, seqlen_q). With a 16-bit
    `dtype` the scores and the probabilities are rounded to it, as a straightforward implementation would.
    """
    (b, sq, hq, d), (sk, hk), dv = q.shape, k.shape[1:3], v.shape[3]
    wide = dtype if dtype in (torch.float32, torch.float64) else torch.float32
    scale = d**-0.5 if softmax_scale is None else softmax_scale
    out = torch.zeros((b, sq, hq, dv), dtype=dtype, device=q.device)
    lse = torch.full((b, hq, sq), -math.inf, dtype=wide, device=q.device)
    if sinks is not None:
        lse[:] = sinks.to(wide)[:, None]
    if not (out.numel() and sk):
        return out, lse
    group, left = hq // hk, window_size[0]
    right = 0 if causal else window_size[1]
    if bias is not None:
        bias = bias.expand(b, hq, sq, sk)
    keys = torch.arange(sk, device=q.device)
    rows = max(1, min(sq, CHUNK // (group * sk)))
    heads = max(1, min(hk, CHUNK // (rows * group * sk)))
    batches = max(1, min(b, CHUNK // (rows * heads * group * sk)))
    for b0, h0, i0 in itertools.product(range(0, b, batches), range(0, hk, heads), range(0, sq, rows)):
        bs, rs = slice(b0, b0 + batches), slice(i0, i0 + rows)
        hs, ks = slice(h0 * group, (h0 + heads) * group), slice(h0, h0 + heads)
        qc = q[bs, rs, hs].to(dtype).permute(0, 2, 1, 3)
        kc = k[bs, :, ks].to(dtype).permute(0, 2, 3, 1)
        vc = v[bs, :, ks].to(dtype).permute(0, 2, 1, 3)
        nb, nh, nq = qc.shape[:3]
        s = (qc * scale).reshape(nb, nh // group, group * nq, d) @ kc
        s = s.view(nb, nh, nq, sk).to(wide)
        if softcap:
            s = softcap * torch.tanh(s / softcap)
        at = torch.arange(i0, i0 + nq, device=q.device)[:, None] + (sk - sq)
        if alibi_slopes is not None:
            slopes = alibi_slopes.expand(b, hq)[bs, hs].to(wide)
            s = s - slopes[:, :, None, None] * (at - keys).abs().to(wide)
        if bias is not None:
            part = bias[bs, hs, rs]
            s = s.masked_fill(~part, -math.inf) if part.dtype == torch.bool else s + part.to(wide)
        if right >= 0:
            s.masked_fill_(keys > at + right, -math.inf)
        if left >= 0:
            s.masked_fill_(keys < at - left, -math.inf)
        total = torch.logsumexp(s, -1)
        if sinks is not None:
            total = torch.logaddexp(total, sinks[hs].to(wide)[:, None].expand(total.shape))
        lse[bs, hs, rs] = total
        p = torch.exp(s - total[..., None]).masked_fill_((total == -math.inf)[..., None], 0.0).to(dtype)
        o = p.view(nb, nh // group, group * nq, sk) @ vc
        out[bs, rs, hs] = o.view(nb, nh, nq, dv).permute(0, 2, 1, 3)
    return out, lse


def attend_varlen(case: VarlenCase, t: Arrays, dtype: Any) -> tuple[Tensor, Tensor, Tensor]:
    """`attend` on each sequence of a packed problem: out, lse (heads_q, total_q) and which rows of out count."""
    q, k, v = t["q"], t["k"], t["v"]
    wide = dtype if dtype in (torch.float32, torch.float64) else torch.float32
    out = torch.zeros((*q.shape[:2], v.shape[2]), dtype=dtype, device=q.device)
    lse = torch.full((q.shape[1], q.shape[0]), -math.inf, dtype=wide, device=q.device)
    counts = torch.zeros(q.shape[0], dtype=torch.bool, device=q.device)
    options = {n: o for n, o in case.options().items() if not n.startswith("max_")}
    for i, ((q0, q1), (k0, k1)) in enumerate(zip(case.spans("q"), case.spans("k"), strict=True)):
        slopes = t.get("alibi_slopes")
        slopes = slopes[i] if slopes is not None and slopes.ndim == 2 else slopes
        parts = q[None, q0:q1], k[None, k0:k1], v[None, k0:k1]
        o, part = attend(*parts, dtype=dtype, sinks=t.get("sinks"), alibi_slopes=slopes, **options)
        out[q0:q1], lse[:, q0:q1], counts[q0:q1] = o[0], part[0], True
    return out, lse, counts


def attend_padded(case: AttentionCase, t: Arrays, dtype: Any) -> tuple[Tensor, Tensor, Tensor]:
    """`attend` on what counts of each batch entry: out, lse (batch, seqlen_q, heads_q) and which rows of out count."""
    q, v, bias = t["q"], t["v"], t.get("bias")
    wide = dtype if dtype in (torch.float32, torch.float64) else torch.float32
    out = torch.zeros((*q.shape[:3], v.shape[3]), dtype=dtype, device=q.device)
    lse = torch.full(q.shape[:3], -math.inf, dtype=wide, device=q.device)
    counts = torch.zeros(q.shape[:2], dtype=torch.bool, device=q.device)
    if bias is not None:
        bias = bias.expand(case.batch, case.heads_q, case.seqlen_q, case.seqlen_k)
    for i, ((q0, q1), (k0, k1)) in enumerate(zip(case.spans("q"), case.spans("k"), strict=True)):
        own, slopes = slice(i, i + 1), t.get("alibi_slopes")
        more: dict[str, Any] = {
            "sinks": t.get("sinks"), "bias": None if bias is None else bias[own, :, q0:q1, k0:k1],
            "alibi_slopes": slopes[own] if slopes is not None and slopes.ndim == 2 else slopes,
        }  # fmt: skip
        more |= case.options()
        o, part = attend(q[own, q0:q1], t["k"][own, k0:k1], v[own, k0:k1], dtype=dtype, **more)
        out[i, q0:q1], lse[i, q0:q1], counts[i, q0:q1] = o[0], part[0].T, True
    return out, lse, counts


# ---------------------------------------------------------------------------------------------------------------------
# drawing, running and judging problems


def tensors(case: Case, device: str, seed: int = 0) -> Arrays:
    """The arrays of a problem on `device`, drawn there; rows that do not count are NaN, index arrays included."""
    g, out = torch.Generator(device).manual_seed(seed), {}
    for name, shape, dtype in case.shapes():
        if dtype == "bool" or name == "alibi_slopes":
            x = torch.rand(shape, generator=g, device=device)
            out[name] = x < 0.75 if dtype == "bool" else x
        else:
            out[name] = torch.randn(shape, generator=g, device=device, dtype=torch_dtype(dtype))
    if isinstance(case, VarlenCase):
        for name in "qkv":
            idle = torch.ones(len(out[name]), dtype=torch.bool)
            for start, stop in case.spans("q" if name == "q" else "k"):
                idle[start:stop] = False
            out[name][idle.to(device)] = math.nan
    else:
        for name in "qkv":
            for one, (start, stop) in zip(out[name], case.spans("q" if name == "q" else "k"), strict=True):
                one[:start], one[stop:] = math.nan, math.nan
    return out | {n: torch.from_numpy(x).to(device) for n, x in case.indices().items()}


def one_key(case: Case) -> bool:
    """Whether every row that counts sees one key, and no sink: its output is then that key's value, to the bit."""
    keys = case.lengths_k if isinstance(case, VarlenCase) else (case.seqlen_k,)
    return not case.sinks and (case.window_size == (0, 0) or set(keys) == {1})


def from_numpy(a: np.ndarray[Any, Any]) -> Tensor:
    """A CPU tensor of the same bits; NumPy's bfloat16 is not torch's."""
    if a.dtype.name == "bfloat16":
        return torch.from_numpy(np.ascontiguousarray(a).view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(np.ascontiguousarray(a))


class Guarded(NamedTuple):
    """A buffer full of NaN whose middle is handed out as `out`; the rest must stay as it is."""

    whole: Tensor
    out: Tensor

    @classmethod
    def like(cls, shape: Sequence[int], dtype: Any, device: str) -> Guarded:
        whole = torch.full((shape[0] + 2, *shape[1:]), math.nan, dtype=dtype, device=device)
        return cls(whole, whole[1:-1])

    def intact(self) -> bool:
        return bool(self.whole[0].isnan().all() and self.whole[-1].isnan().all())


def attention(case: Case, t: Arrays, **more: Any) -> tuple[Tensor, Tensor]:
    """The library under test on a problem's arrays: out and lse."""
    if isinstance(case, VarlenCase):
        return flashmoe_cupy.flash_attention_varlen(**t, **case.options(), return_lse=True, **more)
    return flashmoe_cupy.flash_attention(**t, **case.options(), return_lse=True, **more)


def check(case: Case, device: str, seed: int = 0) -> list[str]:
    """Run one problem on each kernel that takes it and judge it: what is wrong, each line naming the case."""
    t = tensors(case, device, seed)
    known, found = truth(case, t), []
    for name in kernel_names(case) if device == "cuda" else ("",):
        with only(name) if name else contextlib.nullcontext():
            found += [f"{case} {name}: {line}" for line in check_once(case, t, known)]
    return found


def check_once(case: Case, t: Arrays, known: Truth) -> list[str]:
    device = str(t["q"].device)
    shape = (*t["q"].shape[:-1], case.dim_v)
    guarded = Guarded.like(shape, t["q"].dtype, device)
    # freed at once: the library's own lse is then likely to be given this memory, so that an unwritten entry shows
    torch.full((math.prod(shape[:-1]),), math.nan, device=device)
    try:
        out, lse = attention(case, t, out=guarded.out)
    except flashmoe_cupy.errors.FlashMoEError as e:
        return [f"{type(e).__name__}: {e}"]
    wrong = [] if out is guarded.out else ["out= was not handed back"]
    wrong += [] if guarded.intact() else ["wrote outside out"]
    return wrong + judge(case, t, out, lse, known)


class Truth(NamedTuple):
    """What a problem's result is, what the low dtype can give of it, and which rows of a packed or padded one count."""

    out: Tensor
    lse: Tensor
    low: Tensor | None
    counts: Tensor | None


def truth(case: Case, t: Arrays, exact: Any = None) -> Truth:
    """`exact`: the dtype to compute in, instead of one that is exact enough for the case's."""
    low = None if case.dtype == "float32" else t["q"].dtype
    exact = exact or (torch.float64 if low is None else torch.float32)
    if isinstance(case, VarlenCase):
        ref, lse, counts = attend_varlen(case, t, exact)
        naive = None if low is None else attend_varlen(case, t, low)[0][counts]
        return Truth(ref[counts], lse[:, counts], naive, counts)
    if case.indices():
        ref, lse, counts = attend_padded(case, t, exact)
        naive = None if low is None else attend_padded(case, t, low)[0][counts]
        return Truth(ref[counts], lse[counts], naive, counts)
    naive = None if low is None else attend(**t, **case.options(), dtype=low)[0]
    return Truth(*attend(**t, **case.options(), dtype=exact), naive, None)


def judge(case: Case, t: Arrays, out: Tensor, lse: Tensor, known: Truth | None = None) -> list[str]:
    """What is wrong with a result, against the truth. Rows of out that do not count must still be NaN."""
    ref, ref_lse, low, counts = known or truth(case, t)
    wrong = []
    if counts is not None:
        if not bool(out[~counts].isnan().all()):
            wrong.append("wrote rows of out that belong to no query")
        rows = lse.transpose(-1, -2)
        if not bool((rows[~counts] == -math.inf).all()):
            wrong.append("lse of rows that belong to no query is not -inf")
        out, lse = out[counts], lse[:, counts] if isinstance(case, VarlenCase) else rows[counts]
    return wrong + [v.text for v in verdicts(case, out, ref, low, lse, ref_lse) if not v]


def verdicts(case: Any, out: Tensor, ref: Tensor, low: Tensor | None, lse: Tensor, ref_lse: Tensor) -> list[Verdict]:
    allow = TOLERANCES[case.dtype]
    found = [compare_lse(lse, ref_lse, atol=allow.lse)]
    if lse.dtype != torch.float32:
        found.append(Verdict(False, math.nan, 0.0, f"lse has dtype {lse.dtype}"))
    if low is not None:
        found.append(error_rule(out, ref, low, softcap=case.softcap))
        return [*found, row_rule(out, ref, low, eps=allow.eps, softcap=case.softcap)]
    for metric, limit in ((relative_error, allow.norm), (row_error, allow.row)):
        error = metric(out, ref)
        found.append(Verdict(error <= limit, error, limit, f"{metric.__name__} {error:.3g}, allowed {limit:.3g}"))
    return found


def check_all(cases: Iterable[Case], device: str) -> None:
    """Every problem, then one assertion that lists all that failed."""
    wrong = [line for seed, case in enumerate(cases) for line in check(case, device, seed)]
    assert not wrong, f"{len(wrong)} wrong:\n" + "\n".join(wrong)


# ---------------------------------------------------------------------------------------------------------------------
# compiling ahead

_registered: dict[tuple[Case, bool], None] = {}


def register(cases: Iterable[Case], aligned: bool = True) -> None:
    """Note problems that a module will run, so that the kernels of all modules are compiled together."""
    _registered.update(dict.fromkeys((case, aligned) for case in cases))


def registered() -> list[tuple[Case, bool]]:
    return list(_registered)


def problem(case: Case) -> Any:
    """The library's own problem for contiguous GPU arrays of this case, which need not exist."""
    from flashmoe_cupy import dtypes
    from flashmoe_cupy.arrays import View
    from flashmoe_cupy.plan.attention.problem import attention_problem, varlen_problem

    address = iter(range(1 << 40, 1 << 50, 1 << 40))  # far apart, so that no two arrays seem to overlap

    def view(shape: tuple[int, ...], dtype: str) -> View:
        strides = tuple(math.prod(shape[i + 1 :]) for i in range(len(shape)))
        return View(next(address), shape, strides, dtypes.from_name(dtype), 0, "torch", False, None)

    views = {name: view(shape, dtype) for name, shape, dtype in case.shapes()}
    if isinstance(case, VarlenCase):
        views |= {name: view(x.shape, "int32") for name, x in case.indices().items()}
        return varlen_problem(**views, **case.options())
    views |= {name: view(x.shape, "int32") for name, x in case.indices().items()}
    return attention_problem(**views, **case.options())


def specialisations(cases: Iterable[tuple[Case, bool]], arch: str) -> dict[str, str]:
    """Source -> name of each kernel that takes these problems, in 16-byte aligned memory or not, on `arch`."""
    found = {}
    for case, aligned in cases:
        p = problem(case)
        for kernel in of_task("attention_fwd").values():
            if not kernel.why_not(p, arch, aligned):
                config = kernel.choose(p, arch, aligned)
                found[kernel.source(config)] = f"{kernel.name} {config.name}"
    return found


@functools.cache
def arch_here() -> str:
    import cupy

    digits = str(cupy.cuda.Device().compute_capability)
    return arch_for((int(digits[:-1]), int(digits[-1])))


def kernel_names(case: Case) -> list[str]:
    """The kernels that take a problem, in aligned memory, on the device here; the library would choose the first."""
    p = problem(case)
    return [name for name, kernel in of_task("attention_fwd").items() if not kernel.why_not(p, arch_here())]


@functools.cache
def compile_registered() -> int:
    """Compile the kernels of all registered problems, on all cores, for the device here; how many there are."""
    return compile_sources(specialisations(_registered, arch_here()), arch_here())


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Equal shape, dtype and bits (NaN equals the same NaN)."""
    words = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[a.element_size()]
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    return bool(torch.equal(a.contiguous().view(words), b.contiguous().view(words)))


# ---------------------------------------------------------------------------------------------------------------------
# tests of the truth and of the rules, on the CPU

TRUTH_CASES = [
    AttentionCase(5, 7, heads_q=4),
    AttentionCase(9, 4, heads_q=6, heads_k=2, causal=True, sinks="float32"),
    AttentionCase(6, 11, window_size=(3, 1), softcap=2.0, alibi="h"),
    AttentionCase(6, 3, window_size=(0, 0), alibi="bh", softmax_scale=-0.3),
    AttentionCase(4, 6, head_dim=16, head_dim_v=40, bias="bhqk", bias_dtype="float32"),
    AttentionCase(4, 6, bias="h1k", bias_dtype="bool", sinks="same"),
    AttentionCase(3, 0, sinks="float32"),
    AttentionCase(0, 3),
]


def as_float64(t: Tensor) -> np.ndarray[Any, Any]:
    kept: np.ndarray[Any, Any] = (t if t.dtype == torch.bool else t.double()).numpy()
    return kept


@pytest.mark.parametrize("case", TRUTH_CASES, ids=str)
@pytest.mark.parametrize("chunk", [1, 1 << 28])
def test_truth_equals_the_numpy_reference(case: AttentionCase, chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("test_gpu_truth.CHUNK", chunk)
    case = case._replace(dtype="float32")
    t = tensors(case, "cpu")
    out, lse = attend(**t, **case.options(), dtype=torch.float64)
    arrays: Arrays = {n: as_float64(x) for n, x in t.items()}
    ref, ref_lse = flashmoe_cupy.reference.flash_attention(**arrays, **case.options(), return_lse=True)
    np.testing.assert_allclose(out.numpy(), ref, rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(lse.numpy(), ref_lse, rtol=1e-12, atol=1e-12)


def test_varlen_truth_equals_the_numpy_reference() -> None:
    case = VarlenCase((3, 0, 5), (4, 2, 5), (2, 0, 5), (4, 0, 3), 2, 1, heads_q=4, dtype="float32")
    case = case._replace(causal=True, alibi="bh")
    t = tensors(case, "cpu")
    out, lse, counts = attend_varlen(case, t, torch.float64)
    index = {n: x.numpy() for n, x in t.items() if x.dtype == torch.int32}
    arrays: Arrays = {n: as_float64(x) for n, x in t.items() if n not in index}
    ref, ref_lse = flashmoe_cupy.reference.flash_attention_varlen(**arrays, **index, **case.options(), return_lse=True)
    assert counts.tolist() == [True, True, False, *[True] * 5, False, False]
    np.testing.assert_allclose(out.numpy()[counts], ref[counts], rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(lse.numpy()[:, counts], ref_lse[:, counts], rtol=1e-12, atol=1e-12)


def test_rules_reject_one_wrong_row_of_a_long_sequence() -> None:
    case = AttentionCase(64, 4096, batch=1, causal=False)
    t = tensors(case, "cpu")
    ref, ref_lse = attend(**t, dtype=torch.float32)
    low, _ = attend(**t, dtype=torch.bfloat16)
    out = ref.to(torch.bfloat16)
    assert all(verdicts(case, out, ref, low, ref_lse, ref_lse))
    part, part_lse = attend(t["q"], t["k"][:, :-64], t["v"][:, :-64], dtype=torch.float32)
    out[0, 7, 1] = part[0, 7, 1].to(torch.bfloat16)  # one row did not see the last 64 keys
    assert not row_rule(out, ref, low, eps=2.0**-8)
    assert not compare_lse(part_lse, ref_lse, atol=2e-4)


def test_rules_see_nan_zero_rows_and_shapes() -> None:
    ref = torch.tensor([[1.0, 2.0], [0.0, 0.0]])
    assert not error_rule(ref + torch.nan, ref, ref.half())
    assert not row_rule(ref + torch.tensor([[0.0], [1e-30]]), ref, ref, eps=1.0)
    assert row_error(ref.half(), ref) == 0.0
    assert math.isnan(relative_error(ref + torch.nan, ref))
    with pytest.raises(ValueError, match="shapes differ"):
        relative_error(ref[:1], ref)
    lse = torch.tensor([0.0, -math.inf])
    assert compare_lse(lse, lse, atol=0.0)
    assert not compare_lse(torch.zeros(2), lse, atol=1e9)
    assert not compare_lse(lse + torch.nan, torch.zeros(2), atol=1e9)
