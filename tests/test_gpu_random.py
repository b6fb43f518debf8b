"""Random problems on the GPU: sizes, heads, features and memory layouts that nobody chose, on each kernel they run on.

hypothesis draws them, the same ones in every run; float64 judges. The check takes the device, so that test_attention.py
runs some of them on the CPU.
"""

from __future__ import annotations

import contextlib
import math
import random
import zlib
from typing import Any, NamedTuple

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_gpu_truth import (
    Arrays,
    Tensor,
    compile_registered,
    judge,
    kernel_names,
    register,
    same_bits,
    tensors,
    truth,
)

from flashmoe_cupy import flash_attention, flash_attention_varlen
from flashmoe_cupy.plan.kernels import only
from flashmoe_cupy.testing import AttentionCase, Case, VarlenCase

torch = pytest.importorskip("torch")
pytestmark = [pytest.mark.gpu, pytest.mark.torch]

HALVES = ("bfloat16", "float16")
HEADS = ((1, 1), (2, 2), (3, 3), (5, 5), (4, 2), (6, 2), (6, 3), (8, 2), (3, 1), (8, 1))
EDGES = (1, 2, 63, 64, 65, 127, 128, 129, 160, 161, 191, 192, 193, 255, 256, 257, 384, 385, 513, 640)
LONGEST = 700


def _every_kernel() -> list[AttentionCase]:
    """One problem for each configuration that a drawn one may take."""
    dims = ((64, 64), (96, 96), (128, 128), (192, 128), (192, 192), (256, 256), (64, 256))
    features: tuple[dict[str, Any], ...] = ({}, {"softcap": 15.0}, {"bias": "11"})
    sizes = ((64, 64), (LONGEST, 2600))
    return [
        AttentionCase(*size, head_dim=d, head_dim_v=dv, dtype=dtype, **f)
        for size in sizes
        for d, dv in dims
        for f in features
        for dtype in HALVES
    ]


register(_every_kernel())


@pytest.fixture(scope="module", autouse=True)
def _compiled() -> None:
    compile_registered()


# ---------------------------------------------------------------------------------------------------------------------
# what is drawn


class Drawn(NamedTuple):
    """A problem and how its arrays lie in memory; `lay` and `bias_view` know the words."""

    case: Case
    q: str = "plain"
    k: str = "plain"
    v: str = "plain"
    out: str = "plain"
    bias: str = "plain"
    layout: str = "bshd"
    slack: tuple[int, int] = (0, 0)  # by which max_seqlen_q and max_seqlen_k are larger than the longest sequence


KEPT = ("plain", "padded", "turned", "second")  # memory that holds all values
SHARED = (*KEPT, "one head", "one batch")  # stride 0: heads, or the batch, share the values of the first


# hypothesis draws only the seed of a generator: its own choices, made to be shrunk, are too much alike in few examples.
# A failure prints the whole problem.
Pick = random.Random


def length(pick: Pick) -> int:
    return pick.choice((pick.randint(1, LONGEST), pick.randint(1, LONGEST), pick.choice(EDGES)))


def width(pick: Pick, largest: int) -> int:
    return 8 * pick.randint(1, largest // 8)


def window(pick: Pick) -> int:
    return pick.choice((-1, pick.choice((0, 1, 64, 127)), pick.randint(0, LONGEST + 50)))


def options(pick: Pick, kind: str) -> dict[str, Any]:
    """What both sorts of problems have. kind: "plain", "scores" or "bias", each a compiled variant of its own."""
    heads_q, heads_k = pick.choice(HEADS)
    found: dict[str, Any] = {
        "heads_q": heads_q,
        "heads_k": heads_k,
        "head_dim": width(pick, pick.choice((64, 128, 128, 256))),
        "head_dim_v": pick.choice((0, 0, width(pick, 256), width(pick, 512))),
        "dtype": pick.choice(HALVES),
        "causal": pick.random() < 0.5,
        "window_size": pick.choice(((-1, -1), (window(pick), window(pick)))),
        "softmax_scale": pick.choice((None, None, 0.05)),
        "sinks": pick.choice(("", "", "same", "float32")),
    }
    if kind != "plain":
        found["softcap"] = pick.choice((0.0, 15.0, 2.0))
        found["alibi"] = pick.choice(("", "h", "bh"))
        found["softmax_scale"] = pick.choice((None, None, 0.05, 0.0, -0.1))
    if kind == "bias":
        letters = "".join(pick.choice((c, "1")) for c in "bhqk")
        found["bias"] = letters[pick.choice((0, 1, 2)) :]
        found["bias_dtype"] = pick.choice(("same", "float32", "bool"))
    return found


def memory(pick: Pick, kinds: tuple[str, ...]) -> dict[str, Any]:
    return {name: pick.choice(kinds) for name in "qkv"} | {"out": pick.choice(KEPT)}


@st.composite
def dense_problems(draw: st.DrawFn) -> Drawn:
    pick = draw(st.randoms(use_true_random=True))
    more = options(pick, pick.choice(("plain", "scores", "bias")))
    case = AttentionCase(length(pick), length(pick), batch=pick.randint(1, 3), **more)
    layout, bias = pick.choice(("bshd", "bhsd")), pick.choice(("plain", "padded", "expanded"))
    return Drawn(case, **memory(pick, SHARED), layout=layout, bias=bias)


@st.composite
def long_problems(draw: st.DrawFn) -> Drawn:
    """So many keys, at middle head dims, that wider tiles of them pay."""
    pick = draw(st.randoms(use_true_random=True))
    more = options(pick, "plain") | {"head_dim": 8 * pick.randint(7, 16), "head_dim_v": width(pick, 128)}
    more |= {"window_size": pick.choice(((-1, -1), (-1, 30), (2100, 10)))}
    enough = 4096 if more["causal"] else 2048
    case = AttentionCase(pick.randint(1, 300), pick.randint(enough, enough + 400), batch=1, **more)
    return Drawn(case, **memory(pick, SHARED))


@st.composite
def packed_problems(draw: st.DrawFn) -> Drawn:
    pick = draw(st.randoms(use_true_random=True))
    batch = range(pick.randint(1, 5))
    rows_q, rows_k = [
        tuple(pick.choice((0, pick.randint(0, 40), length(pick), length(pick))) for _ in batch) for _ in "qk"
    ]
    case = VarlenCase(rows_q, rows_k, **options(pick, pick.choice(("plain", "scores"))))
    case = case._replace(tail_q=pick.choice((0, 0, 17, 200)), tail_k=pick.choice((0, 0, 5, 200)))
    if pick.random() < 0.5:
        case = case._replace(used_q=tuple(pick.randint(0, n) for n in rows_q))
    if pick.random() < 0.5:
        case = case._replace(used_k=tuple(pick.randint(0, n) for n in rows_k))
    slack = pick.choice((0, 0, 1, 300)), pick.choice((0, 0, 1, 5000))
    return Drawn(case, **memory(pick, SHARED[:-1]), slack=slack)


# ---------------------------------------------------------------------------------------------------------------------
# how it lies, runs and is judged


def lay(x: Tensor, kind: str) -> Tensor:
    """(..., rows, heads, dim) in other memory that is NaN all around; rows still start at multiples of 16 bytes."""
    if kind == "plain":
        return x
    if kind == "turned":
        return x.transpose(-3, -2).contiguous().transpose(-3, -2)
    if kind in ("one head", "one batch"):
        return (x[..., :1, :] if kind == "one head" else x[:1]).expand(x.shape)
    *before, rows, heads, dim = x.shape
    if kind == "second":
        whole = torch.full((*before, 2 * rows, heads, dim), math.nan, dtype=x.dtype, device=x.device)
        view = whole[..., ::2, :, :]
    else:
        outer = [n + 1 for n in before]
        whole = torch.full((*outer, rows + 3, heads + 2, dim + 24), math.nan, dtype=x.dtype, device=x.device)
        view = whole[(slice(1, None),) * len(before) + (slice(2, rows + 2), slice(1, heads + 1), slice(16, 16 + dim))]
    return view.copy_(x)


def bias_view(x: Tensor, kind: str, full: tuple[int, ...]) -> Tensor:
    if kind == "expanded":
        return x.expand(full[-x.ndim :])
    if kind == "plain":
        return x
    whole = torch.zeros([n + 3 for n in x.shape], dtype=x.dtype, device=x.device)
    return whole[tuple(slice(1, n + 1) for n in x.shape)].copy_(x)  # not aligned to anything


def out_memory(shape: tuple[int, ...], like: Tensor, kind: str) -> tuple[Tensor, Tensor]:
    """(memory, view): everything is NaN, and there is something around the view."""
    if kind == "plain":
        whole = torch.full((shape[0] + 2, *shape[1:]), math.nan, dtype=like.dtype, device=like.device)
        return whole, whole[1:-1]
    view = lay(torch.full(shape, math.nan, dtype=like.dtype, device=like.device), kind)
    return view if view._base is None else view._base, view


def call(drawn: Drawn, t: Arrays, **more: Any) -> Any:
    if isinstance(drawn.case, VarlenCase):
        how = drawn.case.options()
        for name, slack in zip(("max_seqlen_q", "max_seqlen_k"), drawn.slack, strict=True):
            how[name] += slack
        return flash_attention_varlen(**t, **how, **more)
    if drawn.layout == "bshd":
        return flash_attention(**t, **drawn.case.options(), **more)
    t = t | {n: t[n].transpose(1, 2) for n in "qkv"}
    if "out" in more:
        more["out"] = more["out"].transpose(1, 2)
    found = flash_attention(**t, **drawn.case.options(), **more, layout="bhsd")
    return (found[0].transpose(1, 2), found[1]) if isinstance(found, tuple) else found.transpose(1, 2)


def agree(a: Tensor, b: Tensor) -> bool:
    """To the bit, but on the CPU, where BLAS may add in another order when memory is laid out in another way."""
    return same_bits(a, b) if a.is_cuda else bool(torch.allclose(a.float(), b.float(), rtol=2e-2, atol=2e-2))


def wrong(drawn: Drawn, device: str) -> list[str]:
    """What is wrong with one problem, on all kernels that run it."""
    case = drawn.case
    t = tensors(case, device, zlib.crc32(str(case).encode()))
    for name in "qkv":
        t[name] = lay(t[name], getattr(drawn, name))
    if isinstance(case, AttentionCase) and case.bias:
        t["bias"] = bias_view(t["bias"], drawn.bias, (case.batch, case.heads_q, case.seqlen_q, case.seqlen_k))
    known, shape, found = truth(case, t, torch.float64), (*t["q"].shape[:-1], case.dim_v), []
    for kernel in kernel_names(case) if device == "cuda" else ("",):
        whole, view = out_memory(shape, t["q"], drawn.out)
        # freed at once: the library's own lse is then likely to be given this memory, so that an unwritten entry shows
        torch.full((math.prod(shape[:-1]),), math.nan, device=device)
        with only(kernel) if kernel else contextlib.nullcontext():
            _, lse = call(drawn, t, out=view, return_lse=True)
            alone = call(drawn, t)
        lines = judge(case, t, view, lse, known)
        rows = slice(None) if known.counts is None else known.counts
        mine, lse = (view, lse) if known.counts is None else (view[rows], lse[:, rows])
        hidden = known.lse == -math.inf
        if bool(mine.transpose(-3, -2)[hidden].any()) or bool((lse[hidden] != -math.inf).any()):
            lines.append("a query that sees no key has an output")
        if not agree(alone[rows], mine):
            lines.append("the result without lse and out differs")
        if known.counts is not None and bool(alone[~known.counts].any()):
            lines.append("rows of nobody are not 0 in a new out")
        view.fill_(math.nan)
        if not bool(whole.isnan().all()):
            lines.append("wrote around out")
        found += [f"{kernel}: {line}" for line in lines]
    return found


@settings(max_examples=60, derandomize=True, deadline=None, database=None)
@given(dense_problems())
def test_random_problems(drawn: Drawn) -> None:
    assert wrong(drawn, "cuda") == []


@settings(max_examples=16, derandomize=True, deadline=None, database=None)
@given(long_problems())
def test_random_problems_with_many_keys(drawn: Drawn) -> None:
    assert wrong(drawn, "cuda") == []


@settings(max_examples=44, derandomize=True, deadline=None, database=None)
@given(packed_problems())
def test_random_packed_problems(drawn: Drawn) -> None:
    assert wrong(drawn, "cuda") == []
