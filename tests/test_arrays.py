"""Views of the arrays of NumPy, CuPy, torch and JAX, and results in the caller's library. Most need no GPU."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
import types
import warnings
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from flashmoe_cupy import dtypes
from flashmoe_cupy.arrays import View, as_numpy, empty, fill, from_numpy, overlap, stream, view
from flashmoe_cupy.dtypes import ALL, BF16, FP8_E4M3, FP16, FP32, DType
from flashmoe_cupy.errors import UnsupportedProblem

NEEDS_TORCH, NEEDS_JAX = pytest.mark.torch, pytest.mark.jax


def refused(array: object, name: str = "q") -> str:
    with pytest.raises(UnsupportedProblem) as caught:
        view(array, name)
    assert f"argument {name} (" in str(caught.value)
    return str(caught.value)


def full(like: View, shape: tuple[int, ...], dtype: DType, value: float) -> Any:
    array = empty(like, shape, dtype)
    fill(like, array, value)
    return array


def numbers(shape: tuple[int, ...], dtype: DType) -> np.ndarray[Any, np.dtype[Any]]:
    """1, 2, 3, ... in `shape`; what small types cannot hold is rounded."""
    values = 1 + np.arange(int(np.prod(shape)))
    return (values % 2 if dtype is dtypes.BOOL else values).reshape(shape).astype(dtypes.to_numpy(dtype))


@st.composite
def cuts(draw: st.DrawFn, steps: tuple[int, ...] = (1, 2, 3, -1, -2)) -> tuple[tuple[slice, ...], tuple[int, ...]]:
    """A random slice of every axis of a (3, 4, 5) array, and a random order of the axes."""
    ends = st.one_of(st.none(), st.integers(-6, 6))
    slices = tuple(slice(draw(ends), draw(ends), draw(st.sampled_from(steps))) for _ in range(3))
    return slices, tuple(draw(st.permutations(range(3))))


# ---------------------------------------------------------------------------------------------------------------------
# NumPy


@pytest.mark.parametrize("dtype", ALL, ids=repr)
def test_numpy_fields(dtype: DType) -> None:
    x = numbers((2, 3, 4), dtype)
    v = view(x.transpose(2, 0, 1), "q")
    assert (v.ptr, v.shape, v.strides) == (x.ctypes.data, (4, 2, 3), (1, 12, 4))
    assert (v.dtype, v.device, v.library, v.readonly) == (dtype, -1, "numpy", False)


@given(cuts())
def test_numpy_round_trip(cut: tuple[tuple[slice, ...], tuple[int, ...]]) -> None:
    """The view describes the same elements: rebuilt from its numbers alone, and through as_numpy."""
    slices, order = cut
    x = numbers((3, 4, 5), FP32)[slices].transpose(order)
    v = view(x, "q")
    assert as_numpy(v) is x
    rebuilt = as_numpy(v._replace(library="dlpack"))
    assert rebuilt.dtype == x.dtype and np.array_equal(rebuilt, x)
    if x.size:
        assert rebuilt.ctypes.data == x.ctypes.data and rebuilt.strides == x.strides


@given(cuts(), cuts())
def test_overlap_is_exact(
    a: tuple[tuple[slice, ...], tuple[int, ...]], b: tuple[tuple[slice, ...], tuple[int, ...]]
) -> None:
    """Against the sets of elements that two cuts of one array hold; other devices never overlap."""
    x = np.arange(60, dtype=np.float32).reshape(3, 4, 5)
    one, two = x[a[0]].transpose(a[1]), x[b[0]].transpose(b[1])
    v, w = view(one, "out"), view(two, "q")
    assert overlap(v, w) is bool(set(one.flat) & set(two.flat))
    assert not overlap(v, w._replace(device=0))


def test_numpy_readonly_zero_size_scalar() -> None:
    x = np.zeros((2, 8), np.float32)
    x.flags.writeable = False
    v = view(x, "q")
    assert v.readonly
    assert not as_numpy(v).flags.writeable
    assert not as_numpy(v._replace(library="dlpack")).flags.writeable
    assert view(np.zeros((0, 4), np.float16), "q").shape == (0, 4)
    assert as_numpy(view(np.zeros((0, 4), np.float16), "q")._replace(library="torch", ptr=0)).shape == (0, 4)
    scalar = view(np.array(1.5, np.float32), "q")
    assert (scalar.shape, scalar.strides) == ((), ())
    assert view(np.broadcast_to(np.float32(1), (3, 4)), "q").strides == (0, 0)


def test_numpy_that_cannot_be_read() -> None:
    assert "byte order" in refused(np.zeros(3, np.dtype(np.float32).newbyteorder("S")), "k")
    assert "complex64" in refused(np.zeros(3, np.complex64))
    assert "object" in refused(np.zeros(3, object))
    assert "mask" in refused(np.ma.masked_array(np.zeros(3, np.float32), [True, False, False]))
    fields = np.zeros(3, np.dtype([("a", np.float32), ("b", np.int8)]))
    assert "not multiples of the item size 4" in refused(fields["a"])


def test_subclass_of_ndarray_is_numpy() -> None:
    class Mine(np.ndarray[Any, np.dtype[Any]]):
        pass

    v = view(np.ones((2, 3), np.float32).view(Mine), "q")
    assert v.library == "numpy"
    assert type(as_numpy(v)) is np.ndarray


@pytest.mark.parametrize("thing", [None, [1.0, 2.0], 3.0, "text", memoryview(b"abc"), np.float32(1)])
def test_no_array(thing: object) -> None:
    with pytest.raises(TypeError, match=r"^sinks must be an array .*, but is (a |None)"):
        view(thing, "sinks")


def test_frameworks_are_not_imported() -> None:
    code = """
import sys
import numpy as np
from flashmoe_cupy import arrays
from flashmoe_cupy.plan.attention import problem
class Stranger:
    def __init__(self, x): self.x = x
    def __dlpack__(self, **how): return self.x.__dlpack__(**how)
    def __dlpack_device__(self): return self.x.__dlpack_device__()
x = np.zeros((2, 3, 4, 8), np.float32)
for array in (x, Stranger(x)):
    v = arrays.view(array, "q")
    arrays.fill(v, arrays.empty(v, (2,), v.dtype), 1.0)
    arrays.as_numpy(v), arrays.stream(v), problem.attention_problem(v, v, v)
assert not {"torch", "jax", "cupy"} & set(sys.modules), "a framework was imported"
"""
    subprocess.run([sys.executable, "-W", "error", "-c", code], check=True, timeout=120)


# ---------------------------------------------------------------------------------------------------------------------
# CuPy: real array objects over an address that nobody reads


def fake_cupy(shape: tuple[int, ...], dtype: DType, device: int = 2) -> Any:
    cupy = pytest.importorskip("cupy")
    memory = cupy.cuda.UnownedMemory(0x7F00_0000_0000, 1 << 20, None, device_id=device)
    return cupy.ndarray(shape, dtypes.to_numpy(dtype), memptr=cupy.cuda.MemoryPointer(memory, 256))


@pytest.mark.parametrize("dtype", [BF16, FP16, FP32, dtypes.INT32, dtypes.BOOL, FP8_E4M3], ids=repr)
def test_cupy_fields(dtype: DType) -> None:
    x = fake_cupy((2, 3, 4), dtype)
    v = view(x, "q")
    assert v[:] == (0x7F00_0000_0100, (2, 3, 4), (12, 4, 1), dtype, 2, "cupy", False, x)
    part = view(x[1:, ::2].transpose(1, 0, 2), "q")
    assert (part.ptr, part.shape, part.strides) == (v.ptr + 12 * dtype.itemsize, (2, 1, 4), (8, 12, 1))
    with pytest.raises(ValueError, match="on a GPU"):
        as_numpy(v)


def test_cupy_complex() -> None:
    cupy = pytest.importorskip("cupy")
    memory = cupy.cuda.UnownedMemory(0x7F00_0000_0000, 1 << 20, None, device_id=0)
    assert "complex64" in refused(cupy.ndarray(3, np.complex64, memptr=cupy.cuda.MemoryPointer(memory, 0)), "bias")


# ---------------------------------------------------------------------------------------------------------------------
# torch


def torch_dtypes() -> list[DType]:
    return [d for d in ALL if d.name != "float8_e8m0fnu"]


@NEEDS_TORCH
@pytest.mark.parametrize("dtype", torch_dtypes(), ids=repr)
def test_torch_fields_and_bits(dtype: DType) -> None:
    import torch

    raw = np.arange(24 * dtype.itemsize, dtype=np.uint8).reshape(2, 3, 4 * dtype.itemsize) % 2
    x = torch.from_numpy(raw).view(getattr(torch, dtype.name)).transpose(0, 1)
    v = view(x, "q")
    assert v[:] == (x.data_ptr(), (3, 2, 4), (4, 12, 1), dtype, -1, "torch", False, x)
    assert type(v.shape) is tuple and type(v.strides) is tuple
    a = as_numpy(v)
    assert a.dtype == dtypes.to_numpy(dtype)
    assert a.ctypes.data == x.data_ptr()
    assert np.ascontiguousarray(a.transpose(1, 0, 2)).tobytes() == raw.tobytes()


@NEEDS_TORCH
@given(cuts(steps=(1, 2, 3)))
def test_torch_round_trip(cut: tuple[tuple[slice, ...], tuple[int, ...]]) -> None:
    import torch

    x = torch.arange(60, dtype=torch.bfloat16).reshape(3, 4, 5)[cut[0]].permute(cut[1])
    a = as_numpy(view(x, "q"))
    assert a.shape == tuple(x.shape)
    assert np.array_equal(a.astype(np.float32), x.float().numpy())


@NEEDS_TORCH
def test_torch_broadcast_empty_scalar_subclass() -> None:
    import torch

    assert view(torch.ones(1, 3).expand(4, 3), "q").strides == (0, 1)
    assert as_numpy(view(torch.ones(1, 3).expand(4, 3), "q")).shape == (4, 3)
    assert view(torch.ones(0, 3), "q").shape == (0, 3)
    assert view(torch.tensor(2.0), "q").shape == ()

    class Plain(torch.Tensor):  # type: ignore[misc, unused-ignore]
        pass

    assert view(torch.ones(3).as_subclass(Plain), "q").library == "torch"
    with torch.inference_mode():
        assert view(torch.ones(3), "q").shape == (3,)


@NEEDS_TORCH
def test_torch_grad_mode() -> None:
    """Never a silent detach."""
    import torch

    leaf = torch.ones(3, requires_grad=True)
    for x in (leaf, leaf * 2, torch.nn.Parameter(torch.ones(3))):
        text = refused(x, "k")
        assert "requires grad" in text and "torch.no_grad()" in text and ".detach()" in text
        with torch.no_grad():
            assert view(x, "k").library == "torch"
        assert view(x.detach(), "k").ptr == x.data_ptr()


@NEEDS_TORCH
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's own, at the first use of a transform
def test_torch_transforms() -> None:
    import torch

    seen = []

    def look(x: Any) -> Any:
        seen.append(refused(x))
        return (x * 2).sum()

    x = torch.ones(2, 3)
    torch.vmap(look)(x)
    torch.func.grad(look)(x)
    torch.func.jvp(look, (x,), (x,))
    torch.func.functionalize(look)(x)
    with torch.no_grad():
        torch.func.grad(look)(x)
    assert len(seen) == 5 and all("torch.func transforms" in text for text in seen)


@NEEDS_TORCH
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_torch_forward_mode() -> None:
    import torch
    import torch.autograd.forward_ad as forward_ad

    x = torch.ones(3)
    with forward_ad.dual_level():
        assert "forward-mode tangent" in refused(forward_ad.make_dual(x, x))
        assert view(x, "q").ptr == x.data_ptr()


@NEEDS_TORCH
def test_torch_that_is_not_plain_memory() -> None:
    import torch
    from torch._subclasses.fake_tensor import FakeTensorMode

    x = torch.ones(2, 3)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # beta and deprecation notices of torch
        assert "torch.sparse_csr" in refused(x.to_sparse_csr())
        assert "dtype torch.qint8" in refused(torch.quantize_per_tensor(x, 1.0, 0, torch.qint8))
    assert "torch.sparse_coo" in refused(x.to_sparse()) and ".to_dense()" in refused(x.to_sparse())
    assert "device meta" in refused(x.to("meta"))
    assert "resolve_neg" in refused(torch.ones(3, dtype=torch.complex64).conj().imag)
    both = refused(torch.ones(3, dtype=torch.complex64).conj())
    assert "dtype torch.complex64" in both and "resolve_conj" in both
    with FakeTensorMode():
        fake = torch.ones(2, 3)
    assert "__torch_dispatch__" in refused(fake, "bias")
    x.untyped_storage().resize_(0)
    assert "no storage" in refused(x)


@NEEDS_TORCH
@pytest.mark.parametrize("name", ["bfloat16", "float16", "float32", "int32", "bool", "float8_e4m3fn"])
def test_torch_results(name: str) -> None:
    import torch

    dtype = dtypes.from_name(name)
    like = view(torch.ones(2), "q")
    x = empty(like, (2, 3), dtype)
    assert isinstance(x, torch.Tensor) and x.dtype == getattr(torch, name) and x.shape == (2, 3) and x.is_contiguous()
    assert bool((full(like, (2, 3), dtype, 1.0).float() == 1.0).all())
    a = numbers((2, 3), dtype)
    for given_array in (a, a.T, a[::-1], np.broadcast_to(a[:1], (4, 3))):
        t = from_numpy(like, given_array)
        assert t.dtype == getattr(torch, name)
        assert np.array_equal(t.float().numpy(), given_array.astype(np.float32))
    assert from_numpy(like, a).data_ptr() == a.ctypes.data
    a.flags.writeable = False
    assert from_numpy(like, a).data_ptr() != a.ctypes.data


@NEEDS_TORCH
def test_torch_full_infinity() -> None:
    import torch

    x = full(view(torch.ones(2), "q"), (0, 4), FP32, float("-inf"))
    assert x.shape == (0, 4)
    assert bool((full(view(torch.ones(2), "q"), (4,), FP32, float("-inf")) == float("-inf")).all())


# ---------------------------------------------------------------------------------------------------------------------
# JAX


@NEEDS_JAX
@pytest.mark.parametrize("name", ["bfloat16", "float16", "float32", "int32", "bool", "float8_e4m3fn", "float8_e5m2"])
def test_jax_fields(name: str) -> None:
    import jax

    dtype = dtypes.from_name(name)
    data = numbers((2, 3, 4), dtype)
    x = jax.device_put(data, jax.devices("cpu")[0])
    v = view(x, "q")
    assert v[:-1] == (x.unsafe_buffer_pointer(), (2, 3, 4), (12, 4, 1), dtype, -1, "jax", True), "no copy"
    a = as_numpy(v)
    assert a.ctypes.data == v.ptr and a.dtype == data.dtype and np.array_equal(a, data)
    assert not a.flags.writeable
    del v, x
    gc.collect()
    assert np.array_equal(a, data), "the array alone keeps the memory"


@NEEDS_JAX
def test_jax_empty_and_scalar() -> None:
    import jax.numpy as jnp

    assert view(jnp.ones((0, 3)), "q").shape == (0, 3)
    assert view(jnp.ones(()), "q").shape == ()


@NEEDS_JAX
def test_jax_tracers() -> None:
    import jax
    import jax.numpy as jnp

    seen = []

    def look(x: Any) -> Any:
        seen.append(refused(x, "k"))
        return (x * 2).sum()

    x = jnp.ones((2, 3))
    for transform in (jax.jit, jax.grad, jax.vmap):
        transform(look)(x)
    assert len(seen) == 3
    assert all("traced" in text and "must be JAX's" in text for text in seen)


@NEEDS_JAX
def test_jax_deleted() -> None:
    import jax.numpy as jnp

    x = jnp.ones(3)
    x.delete()
    assert "deleted or donated" in refused(x)


@NEEDS_JAX
def test_jax_several_devices() -> None:
    code = """
import jax, numpy as np
from flashmoe_cupy.arrays import as_numpy, from_numpy, view
from flashmoe_cupy.errors import UnsupportedProblem
mesh = jax.sharding.Mesh(np.array(jax.devices()), ("x",))
x = jax.device_put(np.ones((4, 2), np.float32), jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("x")))
try:
    view(x, "q")
    raise SystemExit("a sharded array was accepted")
except UnsupportedProblem as error:
    assert "2 devices" in str(error), error
one = jax.device_put(np.ones(3, np.float32), jax.devices()[1])
assert as_numpy(view(one, "q")).sum() == 3
assert from_numpy(view(one, "q"), np.ones(2, np.float32)).devices() == {jax.devices()[1]}
"""
    environment = {"XLA_FLAGS": "--xla_force_host_platform_device_count=2", "JAX_PLATFORMS": "cpu"}
    subprocess.run([sys.executable, "-c", code], check=True, timeout=300, env=os.environ | environment)


@NEEDS_JAX
@pytest.mark.parametrize("name", ["bfloat16", "float32"])
def test_jax_results(name: str) -> None:
    import jax
    import jax.numpy as jnp

    dtype = dtypes.from_name(name)
    like = view(jax.device_put(jnp.ones(2), jax.devices("cpu")[0]), "q")
    buffer = empty(like, (2, 3), dtype)
    assert isinstance(buffer, np.ndarray) and buffer.dtype == dtypes.to_numpy(dtype)
    y = from_numpy(like, numbers((3, 2), dtype).T)
    assert isinstance(y, jax.Array) and np.array_equal(np.asarray(y), numbers((3, 2), dtype).T)


# ---------------------------------------------------------------------------------------------------------------------
# results of NumPy and strangers on the CPU, streams


@pytest.mark.parametrize("dtype", [BF16, FP32, FP8_E4M3, dtypes.BOOL], ids=repr)
def test_numpy_results(dtype: DType) -> None:
    like = view(np.ones(2, np.float32), "q")
    for library in ("numpy", "dlpack"):
        like = like._replace(library=library)
        x = empty(like, (2, 3), dtype)
        assert type(x) is np.ndarray and x.shape == (2, 3) and x.flags.c_contiguous
        assert x.dtype == dtypes.to_numpy(dtype)
        assert (full(like, (2, 3), dtype, 1.0).astype(np.float32) == 1.0).all()
        assert from_numpy(like, x) is x
        assert stream(like) == 0


@NEEDS_TORCH
def test_torch_stream_of_the_arrays_device(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    like = View(1 << 40, (2,), (1,), FP32, 1, "torch", False, None)
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda device: 100 + device, raising=False)
    assert stream(like) == 101
    monkeypatch.delattr(torch._C, "_cuda_getCurrentRawStream")
    streams = types.SimpleNamespace(current_stream=lambda device: types.SimpleNamespace(cuda_stream=200 + device))
    monkeypatch.setattr(torch, "cuda", streams)
    assert stream(like) == 201


# ---------------------------------------------------------------------------------------------------------------------
# a real GPU


@pytest.mark.gpu
def test_gpu_results_and_streams() -> None:
    import cupy

    like = view(cupy.ones(3, cupy.float32), "q")
    with cupy.cuda.Stream(non_blocking=True) as side:
        assert stream(like) == side.ptr
        for dtype in (BF16, FP16, FP32, dtypes.BOOL):
            x = full(like, (2, 3), dtype, 1.0)
            assert x.dtype == dtypes.to_numpy(dtype) and bool((x.astype(cupy.float32) == 1).all())
        assert empty(like, (2, 3), FP8_E4M3).dtype == dtypes.to_numpy(FP8_E4M3)
    assert stream(like) == cupy.cuda.get_current_stream().ptr


@pytest.mark.gpu
@pytest.mark.torch
def test_gpu_torch() -> None:
    import torch

    x = torch.ones(2, 3, device="cuda", dtype=torch.bfloat16)
    v = view(x.t(), "q")
    assert v[:6] == (x.data_ptr(), (3, 2), (1, 3), BF16, x.get_device(), "torch")
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        assert stream(v) == side.cuda_stream
    assert empty(v, (4,), FP32).device == x.device


@pytest.mark.gpu
@pytest.mark.jax
def test_gpu_jax() -> None:
    import cupy
    import jax

    where = jax.devices("gpu")[0]
    x = jax.device_put(np.arange(6, dtype=ml_dtypes.bfloat16).reshape(2, 3), where)
    v = view(x, "q")
    assert v[:7] == (x.unsafe_buffer_pointer(), (2, 3), (3, 1), BF16, 0, "jax", True)
    assert isinstance(full(v, (4,), FP32, 3.0), cupy.ndarray)
    nothing = view(jax.device_put(np.ones((0, 3), np.float32), where), "q")
    assert nothing.shape == (0, 3) and nothing.device == 0
