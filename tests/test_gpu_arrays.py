"""What goes in comes out: layouts, strides, libraries, read-only and empty arrays, several devices, huge arrays.

The case functions take the device; test_attention.py runs them on the CPU as well.
"""

from __future__ import annotations

import gc
import math
import re
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
from test_gpu_truth import (
    Arrays,
    Tensor,
    attend,
    attention,
    compile_registered,
    judge,
    register,
    same_bits,
    tensors,
    torch_dtype,
)

from flashmoe_cupy import flash_attention, flash_attention_varlen
from flashmoe_cupy.errors import UnsupportedProblem
from flashmoe_cupy.testing import TOLERANCES, AttentionCase, VarlenCase, relative_error, row_error

torch = pytest.importorskip("torch")
pytestmark = [pytest.mark.gpu, pytest.mark.torch, pytest.mark.usefixtures("kernel")]

HALVES = ("bfloat16", "float16")
BASE = AttentionCase(37, 83, 2, 4, 2, 64, causal=True)
PACKED = VarlenCase((20, 0, 33), (21, 7, 60), heads_q=4, causal=True)

register([BASE._replace(dtype=d) for d in (*HALVES, "float32")])
register([PACKED, BASE._replace(heads_q=6, causal=False), BASE._replace(head_dim=40), BASE._replace(head_dim_v=128)])


@pytest.fixture(scope="module", autouse=True)
def _compiled() -> None:
    compile_registered()


def agree(out: Tensor, want: Tensor) -> bool:
    """To the bit on the GPU. BLAS on the CPU may add in another order when memory is laid out in another way."""
    if out.device.type == "cuda":
        return same_bits(out, want)
    if out.shape != want.shape or out.dtype != want.dtype:
        return False
    ref = want.double()
    hidden = ref == -math.inf
    if not torch.equal(hidden, out == -math.inf):
        return False
    error = relative_error(out.masked_fill(hidden, 0.0), ref.masked_fill(hidden, 0.0))
    return error <= max(2 * float(torch.finfo(out.dtype).eps), 2e-6)


# ---------------------------------------------------------------------------------------------------------------------
# layouts and strides


def layouts(x: Tensor) -> Iterator[tuple[str, Tensor]]:
    """The same (batch, seq, heads, dim) values in other memory, last dimension contiguous and 16-byte aligned."""
    b, s, h, d = x.shape
    pad = torch.full((b + 1, s + 3, h + 2, d + 24), math.nan, dtype=x.dtype, device=x.device)
    inner = pad[1:, 2 : s + 2, 1 : h + 1, 16 : 16 + d]
    inner.copy_(x)
    yield "padded", inner
    yield "heads before rows", x.transpose(1, 2).contiguous().transpose(1, 2)
    yield "rows before batch", x.transpose(0, 1).contiguous().transpose(0, 1)
    fused = torch.full((b, s, 3, h, d), math.nan, dtype=x.dtype, device=x.device)
    fused[:, :, 1] = x
    yield "a slice of fused qkv", fused[:, :, 1]
    every_other = torch.full((b, 2 * s, h, d), math.nan, dtype=x.dtype, device=x.device)
    every_other[:, ::2] = x
    yield "every second row", every_other[:, ::2]


def check_layouts(device: str, dtype: str = "bfloat16") -> None:
    """q, k, v and out in other memory layouts: the same result; nothing around `out` is written."""
    case = BASE._replace(dtype=dtype)
    t = tensors(case, device)
    want, want_lse = attention(case, t)
    assert judge(case, t, want, want_lse) == []
    for name in "qkv":
        for label, view in layouts(t[name]):
            out, lse = attention(case, t | {name: view})
            assert agree(out, want) and agree(lse, want_lse), f"{name}: {label}"
    for label, view in layouts(want):
        whole = view if view._base is None else view._base
        whole.fill_(math.nan)
        out, lse = attention(case, t, out=view)
        assert out is view and agree(out, want) and agree(lse, want_lse), f"out: {label}"
        assert int(whole.isnan().sum()) == whole.numel() - want.numel(), f"out: {label}: wrote around it"


def check_bhsd(device: str, dtype: str = "bfloat16") -> None:
    """layout="bhsd" is the same with two axes swapped; the result comes in that layout, lse does not change."""
    case = BASE._replace(dtype=dtype, head_dim_v=128)
    t = tensors(case, device)
    want, want_lse = attention(case, t)
    for contiguous in (False, True):
        swapped = {n: x.transpose(1, 2).contiguous() if contiguous else x.transpose(1, 2) for n, x in t.items()}
        out, lse = attention(case, swapped, layout="bhsd")
        assert tuple(out.shape) == (2, 4, 37, 128)
        assert agree(out.transpose(1, 2), want) and agree(lse, want_lse)
        mine = torch.full_like(out, math.nan)
        assert attention(case, swapped, layout="bhsd", out=mine)[0] is mine and agree(mine, out)


def check_broadcast(device: str, dtype: str = "bfloat16") -> None:
    """Stride 0: one batch entry or one head of K and V expanded to all, one query to all."""
    case = BASE._replace(dtype=dtype, heads_k=4)
    t = tensors(case, device)
    for axis in (0, 2):
        one = {n: t[n].narrow(axis, 0, 1).expand(t[n].shape) for n in "kv"}
        copies = {n: x.contiguous() for n, x in one.items()}
        assert agree(attention(case, t | one)[0], attention(case, t | copies)[0]), f"k and v along axis {axis}"
    query = t["q"][:, :1].expand(t["q"].shape)
    assert agree(attention(case, t | {"q": query})[0], attention(case, t | {"q": query.contiguous()})[0])


UNALIGNED = [(64, 64), (40, 40), (96, 96), (128, 128), (192, 128), (256, 256), (64, 256), (64, 512)]
register([BASE._replace(head_dim=d, head_dim_v=dv, dtype=t) for d, dv in UNALIGNED for t in HALVES], aligned=False)
register([BASE._replace(head_dim=d, head_dim_v=dv, dtype="float32") for d, dv in UNALIGNED], aligned=False)


def moved_off(x: Tensor, extra: int, at: int) -> tuple[Tensor, Tensor]:
    """(memory, view): x copied into rows that are `extra` longer and start at element `at`; the rest is NaN."""
    memory = torch.full((*x.shape[:-1], x.shape[-1] + extra), math.nan, dtype=x.dtype, device=x.device)
    view = memory[..., at : at + x.shape[-1]]
    view.copy_(x)
    return memory, view


def check_unaligned(device: str, dtype: str = "bfloat16") -> None:
    """Pointers and rows aligned to one element only: right, or an error that says what alignment is needed."""
    for d, dv in UNALIGNED if device == "cuda" else UNALIGNED[:2]:
        case = BASE._replace(dtype=dtype, head_dim=d, head_dim_v=dv)
        t = tensors(case, device)
        for name in "qkv":
            for extra, at in ((16, 1), (7, 0), (1, 1)):
                try:
                    out, lse = attention(case, t | {name: moved_off(t[name], extra, at)[1]})
                except UnsupportedProblem as e:
                    assert re.search(r"\b16\b", str(e)) and re.search(rf"\b{name}\b", str(e)), str(e)
                else:
                    assert judge(case, t, out, lse) == [], f"{case}: {name}, row + {extra}, from element {at}"
        want, _ = attention(case, t)
        memory, view = moved_off(torch.full_like(want, math.nan), 1, 1)
        try:
            out, lse = attention(case, t, out=view)
        except UnsupportedProblem as e:
            assert re.search(r"\b16\b", str(e)) and re.search(r"\bout\b", str(e)), str(e)
            assert bool(memory.isnan().all())
        else:
            assert judge(case, t, out, lse) == [] and bool(memory[..., 0].isnan().all()), f"{case}: out"


def check_packed_layouts(device: str, dtype: str = "bfloat16") -> None:
    """Packed arrays cut out of fused or padded memory, or transposed."""
    case = PACKED._replace(dtype=dtype)
    t = tensors(case, device)
    want, want_lse = attention(case, t)
    for name in "qkv":
        for label, view in layouts(t[name][None]):
            out, lse = attention(case, t | {name: view[0]})
            assert agree(out, want) and agree(lse, want_lse), f"{name}: {label}"


def check_empty(device: str, dtype: str = "bfloat16") -> None:
    """Any size may be 0; the shapes are right, rows without keys are 0 and -inf (or the sink)."""
    for sizes in ((0, 5, 7, 4, 2), (2, 0, 7, 4, 2), (2, 5, 0, 4, 2), (2, 5, 7, 0, 0), (0, 0, 0, 0, 0), (2, 5, 7, 0, 2)):
        b, q, k, hq, hk = sizes
        case = AttentionCase(q, k, b, hq, hk, 64, 32, dtype=dtype)
        features: tuple[dict[str, Any], ...] = ({}, {"causal": True}, {"sinks": "float32"}, {"bias": "bhqk"})
        for more in features:
            c = case._replace(**more)
            t = tensors(c, device)
            out, lse = attention(c, t)
            assert tuple(out.shape) == (b, q, hq, 32) and out.dtype == t["q"].dtype, c
            assert tuple(lse.shape) == (b, hq, q) and lse.dtype == torch.float32, c
            sink = t["sinks"][:, None].expand(lse.shape) if "sinks" in t else torch.full_like(lse, -math.inf)
            assert not bool(out.any()) and torch.equal(lse, sink), c


# ---------------------------------------------------------------------------------------------------------------------
# libraries


def as_torch(x: Any) -> Tensor:
    """Any library's array as a torch tensor on the same device, without a copy where the library allows it."""
    if isinstance(x, torch.Tensor):
        return x
    if isinstance(x, np.ndarray):
        return torch.from_numpy(x.view(f"i{x.itemsize}")).view(torch_dtype(x.dtype.name))
    if type(x).__module__.startswith("jax"):
        x.block_until_ready()
    return torch.from_dlpack(x)


def to_cupy(x: Tensor) -> Any:
    import cupy

    if not x.numel():  # DLPack has no address to give
        return cupy.empty(tuple(x.shape), str(x.dtype).removeprefix("torch."))
    return cupy.from_dlpack(x)


def to_jax(x: Tensor) -> Any:
    import jax

    if not x.numel():
        where = jax.devices("cpu" if x.device.type == "cpu" else "gpu")[0]
        return jax.device_put(np.zeros(tuple(x.shape), str(x.dtype).removeprefix("torch.")), where)
    return jax.dlpack.from_dlpack(x)


def to_numpy(x: Tensor) -> Any:
    import ml_dtypes

    return x.view(torch.int16).numpy().view(ml_dtypes.bfloat16) if x.dtype == torch.bfloat16 else x.numpy()


class Dlpack:
    """A stranger: an array of a library that we have never heard of."""

    def __init__(self, x: Tensor) -> None:
        self.x = x

    def __dlpack__(self, **how: Any) -> Any:
        return self.x.__dlpack__(**how)

    def __dlpack_device__(self) -> Any:
        return self.x.__dlpack_device__()


class Interface:
    """A stranger that speaks `__cuda_array_interface__`, read-only if asked to."""

    def __init__(self, x: Tensor, readonly: bool = False) -> None:
        self.x = x
        self.readonly = readonly

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]:
        raw = dict(self.x.__cuda_array_interface__)
        return raw | {"data": (raw["data"][0], self.readonly)}


FEATURES = AttentionCase(37, 83, 2, 4, 2, 64, causal=True, sinks="float32", alibi="bh", bias="1hqk")
register([FEATURES._replace(dtype=d) for d in (*HALVES, "float32")])


def check_library(device: str, convert: Callable[[Tensor], Any], owner: str, dtype: str = "bfloat16") -> None:
    """The same data from another library: its own type comes out, on the same device, with the bits torch gets."""
    for case in (FEATURES._replace(dtype=dtype), PACKED._replace(dtype=dtype)):
        t = tensors(case, device)
        want, want_lse = attention(case, t)
        out, lse = attention(case, {n: convert(x) for n, x in t.items()})
        for x in (out, lse):
            assert type(x).__module__.partition(".")[0].removesuffix("lib") == owner, type(x)
        assert as_torch(out).device == want.device
        assert same_bits(as_torch(out), want) and same_bits(as_torch(lse), want_lse), case


def check_zero_size_library(convert: Callable[[Tensor], Any], device: str) -> None:
    for sizes in ((0, 3, 5, 4, 4), (2, 0, 5, 4, 4), (2, 3, 0, 4, 4)):
        b, q, k, hq, hk = sizes
        t = tensors(AttentionCase(q, k, b, hq, hk, dtype="float16"), device)
        out, lse = flash_attention(*(convert(x) for x in t.values()), return_lse=True)
        assert tuple(out.shape) == (b, q, hq, 64) and tuple(lse.shape) == (b, hq, q)
        host = out.get() if hasattr(out, "get") else out  # CuPy would compile a kernel for the comparison
        assert not bool((host != 0).any())


CHECKS = (check_layouts, check_bhsd, check_broadcast, check_unaligned, check_packed_layouts, check_empty)


@pytest.mark.parametrize("dtype", [*HALVES, "float32"])
@pytest.mark.parametrize("check", CHECKS, ids=lambda f: f.__name__)
def test_memory(check: Any, dtype: str) -> None:
    check("cuda", dtype)


@pytest.mark.parametrize("dtype", [*HALVES, "float32"])
def test_cupy(dtype: str) -> None:
    check_library("cuda", to_cupy, "cupy", dtype)


@pytest.mark.jax
@pytest.mark.parametrize("dtype", [*HALVES, "float32"])
def test_jax(dtype: str) -> None:
    check_library("cuda", to_jax, "jax", dtype)


@pytest.mark.parametrize("dtype", [*HALVES, "float32"])
def test_dlpack_stranger(dtype: str) -> None:
    check_library("cuda", Dlpack, "cupy", dtype)


@pytest.mark.parametrize("dtype", ["float16", "float32"])
@pytest.mark.parametrize("readonly", [False, True])
def test_cuda_array_interface_stranger(dtype: str, readonly: bool) -> None:
    check_library("cuda", lambda x: Interface(x, readonly), "cupy", dtype)


@pytest.mark.parametrize("convert", [as_torch, to_cupy, pytest.param(to_jax, marks=pytest.mark.jax)])
def test_zero_size(convert: Callable[[Tensor], Any]) -> None:
    check_zero_size_library(convert, "cuda")


def test_cupy_strides_and_out() -> None:
    """CuPy views with odd outer strides, and a CuPy `out` that lies inside a larger array."""
    t = tensors(BASE, "cuda")
    want, _ = attention(BASE, t)
    views = {n: to_cupy(next(v for label, v in layouts(x) if label == "padded")) for n, x in t.items()}
    assert all(not x.flags.c_contiguous for x in views.values())
    memory = torch.full((2, 37, 6, 64), math.nan, dtype=torch.bfloat16, device="cuda")
    mine = to_cupy(memory)[:, :, 1:5]
    assert flash_attention(**views, causal=True, out=mine) is mine
    torch.cuda.synchronize()  # CuPy's current stream need not be torch's
    assert same_bits(memory[:, :, 1:5], want)
    assert bool(memory[:, :, [0, 5]].isnan().all())


@pytest.mark.multi_gpu
def test_second_device() -> None:
    """Arrays on a device that is not the current one: the work and the result are there."""
    t = tensors(BASE, "cuda:1")
    with torch.cuda.device(0):
        out, lse = attention(BASE, t)
        assert torch.cuda.current_device() == 0
    assert out.device == t["q"].device == lse.device
    assert judge(BASE, t, out, lse) == []


# ---------------------------------------------------------------------------------------------------------------------
# more than 2**31 elements


@pytest.fixture
def room() -> Iterator[None]:
    """Tests below need up to 30 GB: skipped on smaller devices, memory of other tests given back before and after."""
    gc.collect()
    torch.cuda.empty_cache()
    if torch.cuda.mem_get_info()[0] < 36 << 30:
        pytest.skip("needs 36 GiB of free device memory")
    yield
    gc.collect()
    torch.cuda.empty_cache()


def big(shape: tuple[int, ...], seed: int) -> Tensor:
    assert math.prod(shape) > 2**31
    g = torch.Generator("cuda").manual_seed(seed)
    return torch.randn(shape, generator=g, device="cuda", dtype=torch.bfloat16)


def spots(shape: tuple[int, ...]) -> list[tuple[int, int, int]]:
    """(batch, row, head) around the 2**31st element, its double in bytes, both ends, and some in between."""
    b, s, h, d = shape
    rng = np.random.default_rng(0)
    flat = [0, 2**30 // d - 1, 2**30 // d, 2**31 // d - 1, 2**31 // d, 2**31 // d + 1, b * s * h - 1]
    flat += [int(x) for x in rng.integers(0, b * s * h, 40)]
    return [(x // (s * h), x // h % s, x % h) for x in flat if x < b * s * h]


def check_spots(t: Arrays, out: Tensor, lse: Tensor, window: int = -1) -> None:
    """Single rows of a causal (window given) or full problem against float64."""
    q, k, v = t["q"], t["k"], t["v"]
    shift, group = k.shape[1] - q.shape[1], q.shape[2] // k.shape[2]
    for b, i, h in spots(out.shape):
        keys = slice(None) if window < 0 else slice(max(0, i + shift - window), i + shift + 1)
        query, kv = (slice(b, b + 1), slice(i, i + 1), slice(h, h + 1)), (slice(b, b + 1), keys, h // group, None)
        ref, ref_lse = attend(q[query], k[kv], v[kv], dtype=torch.float64)
        assert row_error(out[query], ref) <= TOLERANCES["bfloat16"].row, (b, i, h)
        assert abs(float(lse[b, h, i]) - float(ref_lse)) <= 1e-3, (b, i, h)


@pytest.mark.alone
def test_every_array_is_larger_than_32_bits_can_count(room: None) -> None:
    """One sequence of 90,001 tokens, 192 heads: q, k, v, out of 2.2e9 elements each, with a window to make it short."""
    shape = (1, 90001, 192, 128)
    t = {n: big(shape, i) for i, n in enumerate("qkv")}
    out, lse = flash_attention(**t, causal=True, window_size=(200, 0), return_lse=True)
    check_spots(t, out, lse, window=200)


@pytest.mark.alone
def test_many_queries_few_keys(room: None) -> None:
    """Batch, row and head offsets that pass 2**31 together: many queries in layout bhsd."""
    q = big((3, 64, 90001, 128), 3)
    k, v = (torch.randn((3, 64, 100, 128), device="cuda", dtype=torch.bfloat16) for _ in "kv")
    out, lse = flash_attention(q, k, v, layout="bhsd", return_lse=True)
    check_spots({"q": q.transpose(1, 2), "k": k.transpose(1, 2), "v": v.transpose(1, 2)}, out.transpose(1, 2), lse)


@pytest.mark.alone
def test_few_queries_many_keys(room: None) -> None:
    """A cache of 200,001 tokens in 128 heads: the offsets of k and v pass 2**31 inside one sequence."""
    k, v = (big((1, 200001, 128, 128), i) for i in (4, 5))
    q = torch.randn((1, 5, 128, 128), device="cuda", dtype=torch.bfloat16)
    out, lse = flash_attention(q, k, v, return_lse=True)
    check_spots({"q": q, "k": k, "v": v}, out, lse)


@pytest.mark.alone
def test_packed_rows_beyond_32_bits(room: None) -> None:
    """Packed sequences whose last one starts behind element 2**31."""
    lengths = (120000, 12000, 500)
    total = sum(lengths)
    q, k, v = (big((total, 128, 128), i) for i in (6, 7, 8))
    cu = torch.tensor([0, 120000, 132000, total], dtype=torch.int32, device="cuda")
    out, lse = flash_attention_varlen(
        q, k, v, cu_seqlens_q=cu, cu_seqlens_k=cu, max_seqlen_q=120000, max_seqlen_k=120000, causal=True,
        window_size=(100, 0), return_lse=True,
    )  # fmt: skip
    for start, stop in ((120000, 132000), (132000, total)):
        part = slice(start, stop)
        t = {"q": q[None, part], "k": k[None, part], "v": v[None, part]}
        check_spots(t, out[None, part], lse[None, :, part], window=100)


register([AttentionCase(300, 300, head_dim=32, bias="bhqk"), AttentionCase(5, 300, head_dim=128)])


@pytest.mark.alone
def test_bias_larger_than_32_bits(room: None) -> None:
    """A bias of 2.3e9 elements, one per head and pair."""
    n = 12000
    q, k, v = (torch.randn((1, n, 16, 32), device="cuda", dtype=torch.bfloat16) for _ in range(3))
    bias = big((1, 16, n, n), 9)
    out, lse = flash_attention(q, k, v, bias=bias, return_lse=True)
    for i, h in ((0, 0), (n - 1, 15), (n // 2, 14), (77, 15), (2**31 // n % n, 2**31 // n // n)):
        rows, kv = slice(i, i + 1), slice(h, h + 1)
        row = {"q": q[:, rows, kv], "k": k[:, :, kv], "v": v[:, :, kv], "bias": bias[:, kv, rows]}
        ref, ref_lse = attend(**row, dtype=torch.float64)
        assert row_error(out[:, rows, kv], ref) <= TOLERANCES["bfloat16"].row, (i, h)
        assert abs(float(lse[0, h, i]) - float(ref_lse)) <= 1e-3, (i, h)
