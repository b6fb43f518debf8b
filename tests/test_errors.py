"""Bad input and broken machines: each is refused with the argument, the reason and what would run. Nothing is written.

Every refusal of a call is tried on NumPy, torch and JAX arrays (and on the GPU, where there is one), with an `out` full
of a pattern that must survive.
"""

from __future__ import annotations

import math
import os
import re
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import flashmoe_cupy
from flashmoe_cupy import flash_attention, flash_attention_varlen
from flashmoe_cupy.errors import CompileError, DependencyError, UnsupportedProblem

ROOT = Path(__file__).resolve().parent.parent
PATTERN = 7.25

Arrays = dict[str, Any]


def f16(*shape: int) -> np.ndarray[Any, Any]:
    return np.random.default_rng(0).standard_normal(shape, np.float32).astype(np.float16)


def dense() -> Arrays:
    """A problem that runs: batch 2, seqlen_q 5, seqlen_k 7, heads 4/2, head_dim 16, head_dim_v 24."""
    return {"q": f16(2, 5, 4, 16), "k": f16(2, 7, 2, 16), "v": f16(2, 7, 2, 24)}


def packed() -> Arrays:
    """A packed problem that runs: sequences of 2, 0 and 3 queries over 4, 1 and 2 keys."""
    cu = {"cu_seqlens_q": np.array([0, 2, 2, 5], np.int32), "cu_seqlens_k": np.array([0, 4, 5, 7], np.int32)}
    return {"q": f16(5, 4, 16), "k": f16(7, 2, 16), "v": f16(7, 2, 24), **cu, "max_seqlen_q": 3, "max_seqlen_k": 4}


def strided(*shape: int) -> np.ndarray[Any, Any]:
    """Every second element of the last dimension."""
    return f16(*shape[:-1], 2 * shape[-1])[..., ::2]


# label, changes to the good problem, patterns that the message must match: the argument, the reason, what would run
Row = tuple[str, Arrays, tuple[str, ...]]
FLOATS = "bfloat16, float16 or float32"
OFFSET_SHAPE = r"\(batch \+ 1,\)"
NO_OFFSETS = np.zeros(0, np.int32)

DENSE: list[Row] = [
    ("q of rank 3", {"q": f16(2, 5, 16)}, (r"\bq\b.*4 dim", r"\(2, 5, 16\)", r"q is \(batch, seqlen_q, heads_q")),
    ("v of rank 5", {"v": f16(1, 2, 7, 2, 24)}, (r"\bv\b.*4 dimensions", r"\(1, 2, 7, 2, 24\)")),
    ("k of rank 0", {"k": f16()}, (r"\bk\b.*4 dimensions",)),
    ("batch of k", {"k": f16(3, 7, 2, 16)}, ("batch", r"\bk has 3\b", r"\bq has 2\b")),
    ("batch of v", {"v": f16(1, 7, 2, 24)}, ("batch", r"\bv has 1\b")),
    ("length of v", {"v": f16(2, 6, 2, 24)}, ("sequence length", r"\bk has 7\b", r"\bv has 6\b")),
    ("heads of v", {"v": f16(2, 7, 4, 24)}, ("heads", r"\bk has 2\b", r"\bv has 4\b")),
    ("head_dim of k", {"k": f16(2, 7, 2, 24)}, ("head_dim", r"\bq has 16\b", r"\bk has 24\b")),
    ("heads not divisible", {"q": f16(2, 5, 3, 16)}, (r"\bq has 3 heads\b", "multiple", r"\b2 heads of k\b")),
    ("no key heads", {"k": f16(2, 7, 0, 16), "v": f16(2, 7, 0, 24)}, (r"\bq has 4 heads\b", r"\b0 heads\b")),
    ("d = 4", {"q": f16(2, 5, 4, 4), "k": f16(2, 7, 2, 4)}, ("head_dim is 4", "multiple of 8", "256", "to 8 ")),
    ("d = 20", {"q": f16(2, 5, 4, 20), "k": f16(2, 7, 2, 20)}, ("head_dim is 20", "multiple of 8", "to 24 ")),
    ("d = 264", {"q": f16(2, 5, 4, 264), "k": f16(2, 7, 2, 264)}, ("head_dim is 264", "from 8 to 256")),
    ("d = 0", {"q": f16(2, 5, 4, 0), "k": f16(2, 7, 2, 0)}, ("head_dim is 0", "from 8 to 256")),
    ("d_v = 20", {"v": f16(2, 7, 2, 20)}, ("head_dim_v is 20", "multiple of 8")),
    ("d_v = 520", {"v": f16(2, 7, 2, 520)}, ("head_dim_v is 520", "512")),
    ("q of float64", {"q": f16(2, 5, 4, 16).astype(np.float64)}, (r"\bq has dtype float64\b", FLOATS)),
    ("k of int32", {"k": np.ones((2, 7, 2, 16), np.int32)}, (r"\bk has dtype int32\b", FLOATS)),
    ("v of bool", {"v": np.ones((2, 7, 2, 24), bool)}, (r"\bv has dtype bool\b", FLOATS)),
    ("two dtypes", {"k": f16(2, 7, 2, 16).astype(np.float32)}, ("dtypes differ", r"k is float32", r"q is float16")),
    ("q strided", {"q": strided(2, 5, 4, 16)}, (r"last dimension of q\b", "contiguous", r"stride is 2\b")),
    ("k strided", {"k": strided(2, 7, 2, 16)}, (r"last dimension of k\b", "contiguous")),
    ("v backwards", {"v": f16(2, 7, 2, 24)[..., ::-1]}, (r"last dimension of v\b", r"stride is -1\b")),
    ("window -2", {"window_size": (-2, 0)}, ("window_size", r"-1\b", r"-2\b")),
    ("window of one", {"window_size": (3,)}, ("window_size", "two ints")),
    ("window a number", {"window_size": 3}, ("window_size", "two ints")),
    ("window of floats", {"window_size": (1.5, 0)}, ("window_size", "two ints", r"1\.5")),
    ("scale NaN", {"softmax_scale": math.nan}, ("softmax_scale", "finite", "nan")),
    ("scale inf", {"softmax_scale": -math.inf}, ("softmax_scale", "finite", "-inf")),
    ("scale text", {"softmax_scale": "auto"}, ("softmax_scale", "'auto'")),
    ("softcap negative", {"softcap": -1.0}, ("softcap", "positive", r"-1\.0")),
    ("softcap NaN", {"softcap": math.nan}, ("softcap", "positive", "nan")),
    ("softcap inf", {"softcap": math.inf}, ("softcap", "positive", "inf")),
    ("causal text", {"causal": "yes"}, ("causal must be a bool", "'yes'")),
    ("layout", {"layout": "hbsd"}, ("layout", "'hbsd'", "'bshd' or 'bhsd'")),
    ("sinks of other length", {"sinks": np.zeros(2, np.float32)}, ("sinks must have shape", r"\(4,\)", r"\(2,\)")),
    ("sinks of rank 2", {"sinks": np.zeros((1, 4), np.float32)}, ("sinks must have shape", r"\(4,\)")),
    ("sinks of float64", {"sinks": np.zeros(4)}, ("sinks has dtype float64", "float32 or q's dtype")),
    ("slopes of float16", {"alibi_slopes": f16(4)}, ("alibi_slopes has dtype float16", "float32")),
    ("slopes of batch 3", {"alibi_slopes": np.ones((3, 4), np.float32)}, ("alibi_slopes must have shape", r"\(3, 4\)")),
    ("slopes strided", {"alibi_slopes": np.ones(8, np.float32)[::2]}, ("last dimension of alibi_slopes", "contiguous")),
    ("bias of rank 1", {"bias": f16(7)}, ("bias must have 2 to 4 dimensions", r"\(2, 4, 5, 7\)")),
    ("bias of rank 5", {"bias": f16(1, 1, 1, 5, 7)}, ("bias must have 2 to 4 dimensions", r"\(1, 1, 1, 5, 7\)")),
    ("bias of other length", {"bias": f16(5, 8)}, ("bias", "broadcast", r"\(2, 4, 5, 7\)", r"\(5, 8\)")),
    ("bias of key heads", {"bias": f16(2, 2, 5, 7)}, ("bias", "broadcast", r"\(2, 2, 5, 7\)")),
    ("bias of int32", {"bias": np.ones((5, 7), np.int32)}, ("bias has dtype int32", r"\bfloat32\b", r"\bbool\b")),
    ("bias of float64", {"bias": np.ones((5, 7))}, ("bias has dtype float64", r"\bfloat32\b", r"\bbool\b")),
]

PACKED: list[Row] = [
    ("q of rank 4", {"q": f16(1, 5, 4, 16)}, (r"\bq\b.*3 dimensions", r"\(total_q, heads_q, head_dim\)")),
    ("rows of v", {"v": f16(6, 2, 24)}, ("rows", r"\bk has 7\b", r"\bv has 6\b")),
    ("heads not divisible", {"q": f16(5, 3, 16)}, (r"\bq has 3 heads\b", "multiple")),
    ("d = 20", {"q": f16(5, 4, 20), "k": f16(7, 2, 20)}, ("head_dim is 20", "multiple of 8")),
    ("cu_seqlens_q int64", {"cu_seqlens_q": np.array([0, 2, 2, 5])}, ("cu_seqlens_q has dtype int64", "int32", "cast")),
    ("cu_seqlens_k float32", {"cu_seqlens_k": np.zeros(4, np.float32)}, ("cu_seqlens_k has dtype float32", "int32")),
    ("cu_seqlens differ", {"cu_seqlens_k": np.zeros(3, np.int32)}, ("cu_seqlens_q.*cu_seqlens_k", r"\(3,\)")),
    ("cu_seqlens of rank 2", {"cu_seqlens_q": np.zeros((1, 4), np.int32)}, ("cu_seqlens_q", OFFSET_SHAPE, r"\(1, 4\)")),
    ("cu_seqlens empty", {"cu_seqlens_q": NO_OFFSETS, "cu_seqlens_k": NO_OFFSETS}, (OFFSET_SHAPE,)),
    ("cu_seqlens strided", {"cu_seqlens_q": np.zeros(8, np.int32)[::2]}, ("dimension of cu_seqlens_q", "contiguous")),
    ("seqused_q int64", {"seqused_q": np.array([1, 0, 1])}, ("seqused_q has dtype int64", "int32")),
    ("seqused_k length", {"seqused_k": np.zeros(2, np.int32)}, ("seqused_k must have shape", r"\(3,\)", r"\(2,\)")),
    ("max_seqlen_q negative", {"max_seqlen_q": -1}, ("max_seqlen_q", "int", "-1")),
    ("max_seqlen_k float", {"max_seqlen_k": 4.5}, ("max_seqlen_k", "int", r"4\.5")),
    ("slopes of batch 2", {"alibi_slopes": np.ones((2, 4), np.float32)}, ("alibi_slopes", r"\(3, 4\)", r"\(2, 4\)")),
    ("window -2", {"window_size": (0, -2)}, ("window_size", r"-1\b", r"-2\b")),
    ("scale NaN", {"softmax_scale": math.nan}, ("softmax_scale", "finite")),
]

# Only the NumPy back end can look into the offsets without waiting for a device.
OFFSETS: list[Row] = [
    ("falling offsets", {"cu_seqlens_q": np.array([0, 3, 2, 5], np.int32)}, ("cu_seqlens_q", "fall")),
    ("offsets behind the end", {"cu_seqlens_k": np.array([0, 4, 5, 8], np.int32)}, ("cu_seqlens_k", r"\b7\b")),
    ("used more than there is", {"seqused_k": np.array([4, 2, 2], np.int32)}, ("seqused_k", "length")),
    ("maximum too small", {"max_seqlen_k": 3}, ("max_seqlen_k is 3", r"\b4\b")),
]


# ---------------------------------------------------------------------------------------------------------------------
# the same arrays in each library


def to_torch(a: np.ndarray[Any, Any], device: str = "cpu") -> Any:
    import torch

    whole = a if a.base is None or not isinstance(a.base, np.ndarray) else a.base  # keep strides: move what is behind
    if whole is a or a.size == 0 or min(a.strides, default=0) < 0:
        return torch.from_numpy(np.ascontiguousarray(a)).to(device)
    moved = torch.from_numpy(whole).to(device)
    return moved.as_strided(a.shape, [s // a.itemsize for s in a.strides])


def to_cuda(a: np.ndarray[Any, Any]) -> Any:
    return to_torch(a, "cuda")


def to_cupy(a: np.ndarray[Any, Any]) -> Any:
    import cupy

    whole = a if a.base is None or not isinstance(a.base, np.ndarray) else a.base
    if whole is a or a.size == 0:
        return cupy.asarray(a)
    start = a.ctypes.data - whole.ctypes.data
    moved = cupy.asarray(whole)
    return cupy.ndarray(a.shape, a.dtype, moved.data + start, strides=a.strides)


LIBRARIES = [
    pytest.param(np.asarray, id="numpy"),
    pytest.param(to_torch, id="torch", marks=pytest.mark.torch),
    pytest.param(to_cuda, id="cuda", marks=[pytest.mark.torch, pytest.mark.gpu]),
    pytest.param(to_cupy, id="cupy", marks=pytest.mark.gpu),
]


def moved(arguments: Arrays, convert: Callable[[Any], Any]) -> Arrays:
    return {n: convert(a) if isinstance(a, np.ndarray) else a for n, a in arguments.items()}


def fetched(a: Any) -> Any:
    """CuPy arrays as NumPy: comparing them on the device would compile CuPy's own kernels for seconds."""
    return a.get() if hasattr(a, "get") else a


def intact(out: Any) -> bool:
    return bool((fetched(out) == PATTERN).all())


def refused(call: Callable[..., Any], arguments: Arrays, patterns: tuple[str, ...]) -> UnsupportedProblem:
    """The call's error, after a look at its parts: what was asked, why not, what would run."""
    out = arguments.get("out")
    with pytest.raises(UnsupportedProblem) as caught:
        call(**arguments)
    e, text = caught.value, str(caught.value)
    assert e.asked in text and all(reason in text for reason in e.reasons) and e.hint in text
    assert e.hint or "; use " in e.reasons[0]  # what would run; for an array that cannot be read, the reason says it
    missing = [p for p in patterns if not re.search(p, text)]
    assert not missing, f"{missing} not in:\n{text}"
    assert out is None or intact(out), "out was written"
    return e


def with_out(arguments: Arrays) -> Arrays:
    """Adds the `out` that the good problem would get, full of the pattern."""
    shape = (5, 4, 24) if "cu_seqlens_q" in arguments else (2, 5, 4, 24)
    return {"out": np.full(shape, PATTERN, np.float16)} | arguments


def ids(rows: list[Row]) -> list[str]:
    return [row[0] for row in rows]


def test_the_good_problems_run() -> None:
    out = with_out(dense())["out"]
    assert flash_attention(**dense(), out=out) is out and not intact(out)
    out = with_out(packed())["out"]
    assert flash_attention_varlen(**packed(), out=out) is out and not intact(out)


@pytest.mark.parametrize("convert", LIBRARIES)
@pytest.mark.parametrize("row", DENSE, ids=ids(DENSE))
def test_dense(row: Row, convert: Callable[[Any], Any]) -> None:
    _, change, patterns = row
    if row[0] == "v backwards" and convert in (to_torch, to_cuda):
        pytest.skip("torch has no negative strides")
    arguments = moved(with_out(dense()) | change, convert)
    refused(flash_attention, arguments, patterns)
    refused(flash_attention, arguments, patterns)  # nothing about a refused call may be remembered as good


@pytest.mark.parametrize("convert", LIBRARIES)
@pytest.mark.parametrize("row", PACKED, ids=ids(PACKED))
def test_packed(row: Row, convert: Callable[[Any], Any]) -> None:
    _, change, patterns = row
    refused(flash_attention_varlen, moved(with_out(packed()) | change, convert), patterns)


@pytest.mark.parametrize("convert", LIBRARIES[:2])
@pytest.mark.parametrize("row", OFFSETS, ids=ids(OFFSETS))
def test_offsets_in_host_memory_are_checked(row: Row, convert: Callable[[Any], Any]) -> None:
    _, change, patterns = row
    refused(flash_attention_varlen, moved(with_out(packed()) | change, convert), patterns)


@pytest.mark.jax
@pytest.mark.parametrize("row", DENSE, ids=ids(DENSE))
def test_jax(row: Row) -> None:
    """JAX arrays are always contiguous and never float64, and `out` is refused: the rest is as for the others."""
    jax = pytest.importorskip("jax")
    _, change, patterns = row
    arrays = [a for a in change.values() if isinstance(a, np.ndarray)]
    if any(a.dtype == np.float64 or not a.flags.c_contiguous for a in arrays):
        pytest.skip("JAX has no such array")
    cpu = jax.devices("cpu")[0]
    refused(flash_attention, moved(dense() | change, lambda a: jax.device_put(a, cpu)), patterns)


# ---------------------------------------------------------------------------------------------------------------------
# out


def pattern(*shape: int, dtype: str = "float16") -> np.ndarray[Any, Any]:
    return np.full(shape, PATTERN, dtype)


OUT: list[tuple[str, Any, tuple[str, ...]]] = [
    ("shape", pattern(2, 5, 4, 16), ("out must have shape", r"\(2, 5, 4, 24\)", r"\(2, 5, 4, 16\)")),
    ("rank", pattern(5, 4, 24), ("out must have shape", r"\(5, 4, 24\)")),
    ("layout", pattern(2, 4, 5, 24), ("out must have shape", r"\(2, 4, 5, 24\)")),
    ("dtype", pattern(2, 5, 4, 24, dtype="float32"), ("out must have q's dtype float16", "float32")),
    ("strided", pattern(2, 5, 4, 48)[..., ::2], ("last dimension of out", "contiguous")),
    ("overlapping", np.broadcast_to(pattern(1, 5, 4, 24), (2, 5, 4, 24)), (r"\bout\b", "overlap|read-only")),
]


@pytest.mark.parametrize("convert", LIBRARIES)
@pytest.mark.parametrize("row", OUT, ids=[row[0] for row in OUT])
def test_out(row: tuple[str, Any, tuple[str, ...]], convert: Callable[[Any], Any]) -> None:
    refused(flash_attention, moved(dense() | {"out": row[1]}, convert), row[2])


def test_out_read_only() -> None:
    out = with_out(dense())["out"]
    out.flags.writeable = False
    refused(flash_attention, dense() | {"out": out}, (r"\bout is read-only\b",))


@pytest.mark.parametrize("convert", LIBRARIES)
def test_out_is_an_input(convert: Callable[[Any], Any]) -> None:
    """Also when a call of the same shapes and options has run before."""
    a = moved({"q": f16(2, 5, 4, 16), "k": f16(2, 5, 4, 16), "v": f16(2, 5, 4, 16), "out": f16(2, 5, 4, 16)}, convert)
    before = fetched(a["q"]) + 0
    flash_attention(**a)
    for name in "qkv":
        with pytest.raises(UnsupportedProblem, match=rf"\bout\b.*\b{name}\b"):
            flash_attention(**(a | {"out": a[name]}))
    assert bool((fetched(a["q"]) == before).all())


@pytest.mark.jax
def test_out_of_jax() -> None:
    jax = pytest.importorskip("jax")
    arguments = moved(with_out(dense()), lambda a: jax.device_put(a, jax.devices("cpu")[0]))
    refused(flash_attention, arguments, (r"\bout\b", "immutable", "out=None"))


# ---------------------------------------------------------------------------------------------------------------------
# libraries, devices and things that are no arrays


@pytest.mark.torch
def test_mixed_libraries() -> None:
    """The text names each argument with its type."""
    arguments = with_out(dense())
    arguments["k"] = to_torch(arguments["k"])
    arguments["sinks"] = to_torch(np.zeros(4, np.float32))
    patterns = (r"q is numpy\.ndarray", r"k is torch\.Tensor", r"v is numpy\.ndarray", r"sinks is torch\.Tensor")
    refused(flash_attention, arguments, (*patterns, "one library"))
    arguments = with_out(packed())
    arguments["cu_seqlens_k"] = to_torch(arguments["cu_seqlens_k"])
    refused(flash_attention_varlen, arguments, (r"cu_seqlens_k is torch\.Tensor", r"q is numpy", "one library"))
    arguments = moved(dense(), to_torch) | {"out": with_out(dense())["out"]}
    refused(flash_attention, arguments, (r"out is numpy\.ndarray", "one library"))


@pytest.mark.gpu
@pytest.mark.torch
def test_mixed_devices() -> None:
    arguments = moved(with_out(dense()), to_cuda)
    host_k = to_torch(dense()["k"])
    refused(flash_attention, arguments | {"k": host_k}, (r"\bk is torch.*CPU", r"\bq is torch.*cuda:0", "one device"))
    refused(flash_attention, arguments | {"v": to_cupy(dense()["v"])}, (r"\bv is cupy", r"\bq is torch", "one library"))
    refused(flash_attention, arguments | {"out": with_out(dense())["out"]}, (r"\bout is numpy", "one library"))


@pytest.mark.gpu
@pytest.mark.torch
@pytest.mark.parametrize("name", ["cu_seqlens_q", "cu_seqlens_k", "seqused_q", "seqused_k"])
def test_offsets_not_on_the_device(name: str) -> None:
    used = {"seqused_q": np.array([1, 0, 1], np.int32), "seqused_k": np.array([1, 0, 1], np.int32)}
    host = with_out(packed()) | used
    arguments = moved(host, to_cuda) | {name: to_torch(host[name])}
    refused(flash_attention_varlen, arguments, (rf"\b{name} is torch.*CPU", "one device"))


@pytest.mark.parametrize("name", ["q", "k", "v", "out", "sinks", "alibi_slopes", "bias"])
@pytest.mark.parametrize("thing", [[[1.0]], 3.0, "array", object()], ids=["list", "number", "text", "object"])
def test_no_array(name: str, thing: Any) -> None:
    arguments = with_out(dense())
    out = arguments["out"]
    with pytest.raises(TypeError, match=rf"\b{name} must be an array of NumPy, CuPy, torch or JAX"):
        flash_attention(**(arguments | {name: thing}))
    assert intact(out)


@pytest.mark.parametrize("name", ["q", "k", "v"])
def test_none_is_no_array(name: str) -> None:
    with pytest.raises(TypeError, match=rf"\b{name} must be an array.*None"):
        flash_attention(**(dense() | {name: None}))


@pytest.mark.parametrize("name", ["cu_seqlens_q", "cu_seqlens_k"])
def test_offsets_as_a_list(name: str) -> None:
    with pytest.raises(TypeError, match=rf"\b{name} must be an array"):
        flash_attention_varlen(**(packed() | {name: [0, 2, 2, 5]}))


@pytest.mark.torch
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_torch_gradients_are_not_dropped_in_silence(device: str) -> None:
    torch = pytest.importorskip("torch")
    arguments = moved(with_out(dense()), lambda a: to_torch(a, device))
    for name in "qkv":
        refused(
            flash_attention, arguments | {name: arguments[name].clone().requires_grad_()},
            (rf"\b{name}\b", "grad", "no_grad|detach"),
        )  # fmt: skip
    sinks = torch.zeros(4, device=device, requires_grad=True)
    refused(flash_attention, arguments | {"sinks": sinks}, (r"\bsinks\b", "grad", "no_grad|detach"))


def test_every_reason_is_told() -> None:
    change = {"q": f16(2, 5, 3, 20), "k": f16(2, 7, 2, 20), "window_size": (-7, 0), "softmax_scale": math.nan}
    e = refused(flash_attention, dense() | change, ("3 heads", "head_dim is 20", "window_size", "softmax_scale"))
    assert len(e.reasons) == 4


# ---------------------------------------------------------------------------------------------------------------------
# broken machines, each in a process of its own


# An array that says it lies on a GPU, without one: the library has to look for CuPy and the driver.
FAKE_GPU = """
import numpy as np, sys

class Fake:
    def __init__(self, shape, kind="<f2"):
        self.host = np.full(shape, 7.25, kind)
        pointer = self.host.ctypes.data
        self.__cuda_array_interface__ = {"data": (pointer, False), "shape": shape, "typestr": kind, "version": 3}

def call():
    import flashmoe_cupy
    q, k, v, out = (Fake((1, 8, 2, 16)) for _ in range(4))
    try:
        flashmoe_cupy.flash_attention(q, k, v, out=out)
    except Exception as e:
        said = f"{type(e).__module__}.{type(e).__name__}: {e}"
    else:
        said = "no error"
    assert all((x.host == 7.25).all() for x in (q, k, v, out)), "memory was written"
    print(said)
"""
BLOCK_CUPY = "import sys; sys.modules['cupy'] = None; sys.modules['cupy_backends'] = None\n"


def say(code: str, **env: str) -> str:
    """What a fresh process prints."""
    paths = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, timeout=120, check=False,
        env={**os.environ, "PYTHONPATH": paths, **env}, cwd=ROOT,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


def test_no_cupy() -> None:
    said = say(BLOCK_CUPY + FAKE_GPU + "call()")
    assert said.startswith("flashmoe_cupy.errors.DependencyError"), said
    assert "CuPy" in said and "pip install" in said and "cuda1" in said, said


def test_no_cupy_leaves_the_numpy_back_end() -> None:
    code = BLOCK_CUPY + """
import numpy as np, flashmoe_cupy
q = np.ones((1, 8, 2, 16), np.float32)
print(flashmoe_cupy.flash_attention(q, q, q, causal=True).sum())
"""
    assert float(say(code)) == 256.0


def test_no_driver() -> None:
    """CuPy is there, a device is not (CUDA_VISIBLE_DEVICES hides the devices of a machine that has some)."""
    pytest.importorskip("cupy")
    said = say(FAKE_GPU + "call()", CUDA_VISIBLE_DEVICES="")
    assert said.startswith("flashmoe_cupy.errors.DependencyError"), said
    assert "driver" in said and re.search("NumPy|install", said), said


GET = """
from flashmoe_cupy import errors
from flashmoe_cupy.jit import cache
try:
    entry = cache.get("extern \\"C\\" __global__ void fm_entry() {}", "nothing", "sm_80", {})
except Exception as e:
    print(f"{type(e).__name__}: {e}")
else:
    print("compiled" if cache.stats().compiled else "found", entry.path is not None, len(entry.cubin) > 0)
"""


@pytest.mark.compile
def test_nvrtc_older_than_12_4(tmp_path: Path) -> None:
    old = "from cupy.cuda import nvrtc as n\nn.getVersion = lambda: (12, 3)\n"
    said = say(old + GET, FLASHMOE_CACHE_DIR=str(tmp_path))
    assert said.startswith("DependencyError"), said
    assert "12.3" in said and "12.4" in said and "pip install" in said, said
    assert not list(tmp_path.rglob("*.cubin"))


@pytest.mark.compile
def test_unwritable_cache(tmp_path: Path) -> None:
    """One warning that names the folder and the variable; the kernel is compiled and used from memory."""
    blocked = tmp_path / "file"
    blocked.write_text("not a folder")
    said = say(GET, FLASHMOE_CACHE_DIR=str(blocked / "cache"))
    assert "compiled False True" in said, said
    assert said.count("FLASHMOE_CACHE_DIR") == 1 and str(blocked) in said, said
    assert blocked.read_text() == "not a folder"


@pytest.mark.compile
def test_corrupt_cache(tmp_path: Path) -> None:
    """Damaged kernels count as missing: compiled again, repaired on disk. With FLASHMOE_JIT=0 that is an error."""
    env = {"FLASHMOE_CACHE_DIR": str(tmp_path)}
    assert "compiled True True" in say(GET, **env)
    assert "found True True" in say(GET, **env)
    (cubin,) = tmp_path.rglob("*.cubin")
    good = cubin.read_bytes()
    for damaged in (b"", good[:-1] + bytes([good[-1] ^ 1])):
        cubin.write_bytes(damaged)
        if damaged:
            said = say(GET, **env, FLASHMOE_JIT="0")
            assert said.startswith("CompileError") and "FLASHMOE_JIT=0" in said and "warmup" in said, said
            assert str(tmp_path) in said, said
        assert "compiled True True" in say(GET, **env)
        assert cubin.read_bytes() == good


@pytest.mark.gpu
@pytest.mark.torch
def test_a_gpu_call_that_may_not_compile_writes_nothing(tmp_path: Path) -> None:
    code = """
    import torch, flashmoe_cupy
    q = torch.randn(1, 8, 2, 16, device="cuda", dtype=torch.float16)
    out = torch.full_like(q, 7.25)
    try:
        flashmoe_cupy.flash_attention(q, q, q, out=out)
    except flashmoe_cupy.CompileError as e:
        print(e)
    assert (out == 7.25).all()
    """
    said = say(code, FLASHMOE_CACHE_DIR=str(tmp_path), FLASHMOE_JIT="0")
    assert "FLASHMOE_JIT=0" in said and "warmup" in said, said


def test_errors_have_the_types_that_callers_catch() -> None:
    assert issubclass(UnsupportedProblem, ValueError) and issubclass(CompileError, RuntimeError)
    assert issubclass(DependencyError, ImportError)
    for kind in (UnsupportedProblem, CompileError, DependencyError):
        assert issubclass(kind, flashmoe_cupy.FlashMoEError)
