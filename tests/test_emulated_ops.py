"""The operations from call to result, where the device is the emulated machine.

Arrays say that they lie on a GPU, and the launches of `ops.gpu` run on the CPU. So the whole way of a call is
walked without a GPU: validation, plans, workspaces, addresses, parameters, kernels.
"""

from __future__ import annotations

import ctypes
import logging
import struct
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from emulate import guarded, missing, run, tensor_map

import flashmoe_cupy
from flashmoe_cupy import arrays, reference
from flashmoe_cupy.arrays import View
from flashmoe_cupy.dtypes import to_numpy
from flashmoe_cupy.errors import FlashMoEError, UnsupportedProblem
from flashmoe_cupy.jit import launch as driver
from flashmoe_cupy.jit.device import H100, DeviceProperties
from flashmoe_cupy.jit.launch import Launch, Loaded
from flashmoe_cupy.jit.sequence import LaunchSequence
from flashmoe_cupy.jit.tensormap import TensorMap
from flashmoe_cupy.ops import access, gpu
from flashmoe_cupy.ops.call import _workspaces
from flashmoe_cupy.plan.forget import forget_all
from flashmoe_cupy.plan.kernels import only
from flashmoe_cupy.testing import TOLERANCES, relative_error, row_error
from flashmoe_cupy.testing_moe import MoECase, RouteCase

pytestmark = pytest.mark.skipif(missing() is not None, reason=missing() or "")


class Resident:
    """Host memory that says it lies on device 0."""

    def __init__(self, array: Any, name: str = "") -> None:
        self.array = guarded(array, name) if array.flags.c_contiguous else array

    def data_ptr(self) -> int:
        return int(self.array.ctypes.data)

    def fill_(self, value: float) -> None:
        self.array.fill(value)


class Machine:
    """What `ops.gpu` takes for jit.launch: kernels are known by number, launches run at once."""

    def __init__(self, capability: tuple[int, int]) -> None:
        self.capability, self.kernels, self.launched, self.driver = capability, [""], 0, 12040
        self.maps: dict[int, tuple[int, Sequence[tuple[TensorMap, int]]]] = {}

    def compute_capability(self, *_: int) -> tuple[int, int]:
        return self.capability

    def properties(self, *_: int) -> DeviceProperties:
        return H100._replace(multiprocessors=3)

    def driver_version(self) -> int:
        return self.driver

    def is_capturing(self, *_: int) -> bool:
        return False

    def load_for(self, tu: str, *_: Any) -> Loaded:
        self.kernels.append(tu)
        return Loaded(len(self.kernels) - 1, None)

    def with_maps(self, kernel: Launch, at: int, maps: Sequence[TensorMap], size: int, mapped: Sequence[int]) -> Launch:  # noqa: ARG002
        self.maps[kernel.function] = at, [*zip(maps, mapped, strict=False)]
        return kernel

    def launch(self, kernel: Launch, pointers: tuple[int, ...], stream: int) -> None:
        tu = self.kernels[kernel.function]
        waits = "Attention" not in tu
        assert stream == 5 and kernel.early == (waits and self.capability >= (9, 0) and self.driver >= 12030)
        params = bytearray(4096)
        assert len(pointers) == kernel.pointers
        struct.pack_into(f"{len(pointers)}Q", params, 0, *pointers)
        params[8 * len(pointers) : 8 * len(pointers) + len(kernel.tail)] = kernel.tail
        at, maps = self.maps.get(kernel.function, (0, ()))
        for i, (one, index) in enumerate(maps):
            params[at + 128 * i : at + 128 * (i + 1)] = tensor_map(one, pointers[index])
        cluster = 2 if "__cluster_dims__(2" in tu else 1
        run(tu, bytes(params), kernel.grid, kernel.threads, kernel.smem, 4, cluster)
        self.launched += 1

    @property
    def run(self) -> Any:
        """For LaunchSequence.run."""

        def run(its: LaunchSequence, table: Sequence[int], stream: int, recorded: bool = True) -> None:
            for fill in its.fills:
                words = (ctypes.c_uint32 * (fill.size // 4)).from_address(table[fill.place])
                np.ctypeslib.as_array(words)[:] = fill.word
            for one, places in its.launches:
                self.launch(one, tuple([0 if i < 0 else table[i] + offset for i, offset in places]), stream)

        return run

    def fetch(self, address: int, dtype: Any, shape: tuple[int, ...], strides: tuple[int, ...], *_: int) -> Any:
        size = max(np.dtype(dtype).itemsize, sum((n - 1) * t for n, t in zip(shape, strides, strict=True)) + 8)
        flat = np.ctypeslib.as_array((ctypes.c_uint8 * size).from_address(address))
        return np.lib.stride_tricks.as_strided(flat[: np.dtype(dtype).itemsize].view(dtype), shape, strides).copy()


@contextmanager
def on_machine(fake: Machine, monkeypatch: pytest.MonkeyPatch) -> Iterator[Machine]:
    """Arrays that are `Resident` lie on this machine, and launches run there."""

    def adapt(x: Resident, name: str) -> View:
        seen = arrays.view(x.array, name)
        return seen._replace(device=0, library="torch", owner=x)

    def empty(like: View, shape: tuple[int, ...], dtype: Any) -> Resident:
        made = Resident(np.zeros(shape, to_numpy(dtype)), "a new array")
        made.array.reshape(-1).view(np.uint8)[...] = 0xFF  # NaN, or -1
        return made

    monkeypatch.setitem(arrays.readers._adapters, Resident, adapt)
    monkeypatch.setattr(arrays, "empty", empty)
    monkeypatch.setattr(arrays, "stream", lambda v: 5)
    monkeypatch.setattr(gpu, "driver", fake)
    monkeypatch.setattr(LaunchSequence, "run", fake.run)
    forget_all()
    yield fake
    forget_all()


@pytest.fixture(params=[(9, 0), (8, 0)], ids=["hopper", "ampere"])
def machine(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Machine]:
    with on_machine(Machine(request.param), monkeypatch) as fake:
        yield fake


def resident(given: dict[str, Any]) -> dict[str, Any]:
    return {n: Resident(x, n) for n, x in given.items()}


def judge(got: Any, want: Any, dtype: str) -> None:
    out = got.array.astype(np.float64)
    assert relative_error(out, want) <= TOLERANCES[dtype].norm and row_error(out, want) <= TOLERANCES[dtype].row


CASES = (
    MoECase(33, 72, 136, 5, 3, biases="float32"), MoECase(5, 64, 64, 3, 2, "float16", "relu2", weights_dtype="same"),
    MoECase(300, 136, 72, 4, 2, shared=24, shared_gate="same", interleaved=True, sentinels=0.2),
    MoECase(17, 64, 40, 4, 3, global_experts=9, ids_dtype="int64", weight_on_input=True),
)  # fmt: skip


@pytest.mark.parametrize("case", CASES, ids=str)
def test_fused_moe(machine: Machine, case: MoECase) -> None:
    given = case.random()
    want = reference.fused_moe(**given, **case.options())
    arrays_here = resident(given)
    first = flashmoe_cupy.fused_moe(**arrays_here, **case.options())
    judge(first, want, case.dtype)
    kernels = len(machine.kernels)
    out = Resident(np.zeros((case.tokens, case.hidden), given["x"].dtype), "out")
    again = flashmoe_cupy.fused_moe(**arrays_here, **case.options(), out=out)
    assert again is out and np.array_equal(again.array.view(np.uint8), first.array.view(np.uint8))
    other = MoECase(**{**case._asdict(), "seed": 1}).random()
    moved = flashmoe_cupy.fused_moe(**resident(other), **case.options())
    judge(moved, reference.fused_moe(**other, **case.options()), case.dtype)
    assert len(machine.kernels) < 3 * kernels  # what is ready is found again; `out` counts as another problem


def test_unaligned_rows_take_the_portable_kernel(
    machine: Machine, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Where there is a faster one, that is said, once."""
    monkeypatch.setattr(gpu, "_warned", set())
    monkeypatch.setattr(logging.getLogger("flashmoe_cupy"), "propagate", True)
    case = MoECase(20, 64, 64, 3, 2)
    given = case.random()
    wide = np.zeros((20, 65), ml_dtypes.bfloat16)
    wide[:, :64] = given["x"]
    out = np.zeros((20, 67), ml_dtypes.bfloat16)
    here = resident(given) | {"x": Resident(wide[:, :64]), "out": Resident(out[:, 1:65])}
    judge(flashmoe_cupy.fused_moe(**here, **case.options()), reference.fused_moe(**given, **case.options()), case.dtype)
    assert (out[:, 0] == 0).all() and (out[:, 65:] == 0).all()
    assert not any("GroupedGemmSm90" in tu for tu in machine.kernels[2:3])
    said = [record.message for record in caplog.records if "slower grouped_gemm_sm80" in record.message]
    assert len(said) == (machine.capability == (9, 0)) and all("multiples of 16 bytes" in text for text in said)


def test_route_and_permute(machine: Machine) -> None:
    case = RouteCase(40, 24, 3, "float16", "sigmoid", True, 2.0, "float32", 4, 2, 0.9)
    given = case.random()
    want = reference.moe_route(**given, **case.options(), return_stats=True)
    weights, ids, stats = flashmoe_cupy.moe_route(**resident(given), **case.options(), return_stats=True)
    assert np.array_equal(ids.array, want[1])
    np.testing.assert_allclose(weights.array, want[0], rtol=2e-6)
    for name in ("expert_counts", "dropped"):
        assert np.array_equal(getattr(stats, name).array, getattr(want[2], name))
    for name in ("load_balancing_loss", "z_loss"):
        np.testing.assert_allclose(getattr(stats, name).array, getattr(want[2], name), rtol=1e-5)
    found: Any = flashmoe_cupy.moe_permute(ids, num_experts=24)
    for got, truth in zip(found, reference.moe_permute(want[1], num_experts=24), strict=True):
        assert np.array_equal(got.array, truth)


def test_grouped_gemm(machine: Machine, rng: np.random.Generator) -> None:
    x = rng.standard_normal((40, 72)).astype(np.float16)
    w = rng.standard_normal((3, 136, 72)).astype(np.float16)
    offsets = np.array([3, 10, 10, 33], np.int32)
    out = flashmoe_cupy.grouped_gemm(**resident({"x": x, "w": w, "offsets": offsets}))
    want = np.zeros((40, 136))
    for e in range(3):
        rows = slice(offsets[e], offsets[e + 1])
        want[rows] = x[rows].astype(np.float64) @ w[e].astype(np.float64).T
    assert (out.array[:3] == 0).all() and (out.array[33:] == 0).all()  # rows of no group, in a new array
    judge(out, want, "float16")
    masked = flashmoe_cupy.grouped_gemm(
        **resident({"x": x[:36].reshape(3, 12, 72), "w": w, "group_sizes": np.array([12, 0, 7], np.int32)})
    )
    want = x[:36].reshape(3, 12, 72).astype(np.float64) @ w.astype(np.float64).swapaxes(1, 2)
    want[1], want[2, 7:] = 0, 0
    assert np.array_equal(masked.array == 0, want == 0)
    judge(masked, want, "float16")


@pytest.mark.parametrize("dtype", [ml_dtypes.bfloat16, np.float16])
def test_attention(machine: Machine, rng: np.random.Generator, dtype: Any) -> None:
    q, k, v = (rng.standard_normal((2, n, h, 64)).astype(dtype) for n, h in ((40, 4), (70, 2), (70, 2)))
    given: dict[str, Any] = {"q": q, "k": k, "v": v}
    want = reference.flash_attention(**given, causal=True, return_lse=True)
    for _ in range(2):
        out, lse = flashmoe_cupy.flash_attention(**resident(given), causal=True, return_lse=True)
        judge(out, want[0], np.dtype(dtype).name)
        np.testing.assert_allclose(lse.array, want[1], atol=2e-3)
    found = flashmoe_cupy.attention_lse(**resident({"q": q, "k": k}), causal=True)
    np.testing.assert_allclose(found.array, want[1], atol=2e-3)


def test_rows_of_no_sequence_are_cleared(machine: Machine, rng: np.random.Generator) -> None:
    """By the kernel on Hopper, by a fill in front of it elsewhere; arrays begin with NaN. A given out keeps them."""
    q, k = (rng.standard_normal((n, 2, 64)).astype(np.float16) for n in (30, 40))
    given: dict[str, Any] = {"q": q, "k": k, "v": k, "cu_seqlens_q": np.array([3, 20, 26], np.int32)}
    given["cu_seqlens_k"] = np.array([0, 31, 40], np.int32)
    options: dict[str, Any] = {"max_seqlen_q": 17, "max_seqlen_k": 31, "return_lse": True}
    out, lse = flashmoe_cupy.flash_attention_varlen(**resident(given), **options)
    want, want_lse = reference.flash_attention_varlen(**given, **options)
    judge(out, want, "float16")
    nobody = [0, 1, 2, 26, 27, 28, 29]
    assert (out.array[nobody] == 0).all() and np.isneginf(lse.array[:, nobody]).all()
    np.testing.assert_allclose(lse.array[:, 3:26], want_lse[:, 3:26], atol=2e-3)
    mine = Resident(np.full((30, 2, 64), 7, np.float16), "out")
    _, lse = flashmoe_cupy.flash_attention_varlen(**resident(given), **options, out=mine)
    assert (mine.array[nobody] == 7).all() and np.isneginf(lse.array[:, nobody]).all()
    assert np.array_equal(mine.array[3:26], out.array[3:26])


def test_experts_that_lie_no_whole_rows_apart(machine: Machine) -> None:
    memory = np.zeros(2 * 368, np.float16)
    x = np.lib.stride_tricks.as_strided(memory, (2, 5, 72), (2 * 368, 2 * 72, 2))
    given = {"x": x, "w": np.zeros((2, 8, 72), np.float16), "group_sizes": np.array([1, 2], np.int32)}
    with pytest.raises(UnsupportedProblem, match="experts of x lie 368 elements apart"):
        flashmoe_cupy.grouped_gemm(**resident(given))


def test_ids_are_checked_on_demand(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("flashmoe_cupy._env.get", lambda: SimpleNamespace(check=True, jit=True))
    ids = np.array([[0, 1], [2, -2]], np.int32)
    with pytest.raises(FlashMoEError, match=r"topk_ids\[1, 1\] is -2"):
        flashmoe_cupy.moe_permute(Resident(ids), num_experts=4)


def read_fast(monkeypatch: pytest.MonkeyPatch) -> None:
    """From now on arrays here are plain ones, which calls like earlier ones read without views."""

    def empty(device: int, shape: tuple[int, ...], strides: tuple[int, ...], dtype: Any) -> Resident:
        return Resident(np.full(shape, 7, dtype), "a new array")

    known = access.ArrayAccess(
        key=lambda of: tuple([(x.array.shape, x.array.strides, x.array.dtype.char) for x in of]),
        pointer=Resident.data_ptr, empty=empty,
        dtypes={name: np.dtype(name) for name in ("float32", "int32", "uint8")}, device=lambda x: 0,
        stream=lambda device: 5, maker=lambda *form: lambda: empty(*form), recorder=lambda device: lambda stream: False,
    )  # fmt: skip
    monkeypatch.setitem(access._known, Resident, known)
    monkeypatch.setattr(Resident, "dtype", property(lambda x: x.array.dtype), raising=False)


def test_the_fast_way(machine: Machine, monkeypatch: pytest.MonkeyPatch, rng: np.random.Generator) -> None:
    """Plain arrays whose shapes were seen before go past views and validation, to the same bits; others do not."""
    case = MoECase(40, 64, 72, 5, 3)
    given = case.random()
    logits = rng.standard_normal((40, 5)).astype(np.float32)
    bias = rng.standard_normal(5).astype(np.float32)
    here = resident(given | {"logits": logits, "bias": bias})
    read_fast(monkeypatch)
    experts = {n: here[n] for n in ("x", "w_gate_up", "w_down", "topk_weights", "topk_ids")}
    calls: tuple[Callable[[], list[Any]], ...] = (
        lambda: [flashmoe_cupy.fused_moe(**experts)],
        lambda: [*flashmoe_cupy.moe_route(here["logits"], top_k=3)],
        lambda: [*flashmoe_cupy.moe_route(here["logits"], top_k=3, e_score_correction_bias=here["bias"])],
    )
    for call in calls:
        first = call()
        with monkeypatch.context() as patch:
            patch.setattr(arrays.readers, "_adapters", {})  # no views any more
            patch.setattr(arrays.readers, "_find", lambda *_: pytest.fail("a view was asked for"))
            again = call()
        for one, other in zip(first, again, strict=True):
            assert np.array_equal(one.array.view(np.uint8), other.array.view(np.uint8))
    odd = Resident(np.zeros(40 * 64 + 8, given["x"].dtype))
    odd.array = odd.array[1:-7].reshape(40, 64)
    odd.array[:] = given["x"]
    unaligned = flashmoe_cupy.fused_moe(**(experts | {"x": odd}))
    judge(unaligned, reference.fused_moe(**given, **case.options()), case.dtype)


@pytest.mark.parametrize("kind", ["bool", "float32", "bfloat16"])
@pytest.mark.parametrize("shifts", [(0, 0, 1, 1, 0, -1, 8, -1), (-1, 3, 3, 0, 0, 3)], ids=str)
def test_a_bias_from_any_address_on(
    machine: Machine, monkeypatch: pytest.MonkeyPatch, rng: np.random.Generator, kind: str, shifts: tuple[int, ...]
) -> None:
    """Calls of one shape, whose bias begins so many elements behind a multiple of 16 bytes; -1: with turned axes."""
    read_fast(monkeypatch)
    _workspaces.kept.clear()  # those of other tests belong to other memory
    monkeypatch.setattr(driver, "memory_bytes", lambda device: 1 << 30)
    q, k, v = (rng.standard_normal((2, n, h, 64)).astype(ml_dtypes.bfloat16) for n, h in ((40, 4), (72, 2), (72, 2)))
    normal = rng.standard_normal((2, 4, 40, 72))
    bias: Any = normal < 0.5 if kind == "bool" else normal.astype(kind)
    given: dict[str, Any] = {"q": q, "k": k, "v": v, "seqused_k": np.array([30, 72], np.int32)}
    want, want_lse = reference.flash_attention(**given, bias=bias, causal=True, return_lse=True)
    here = resident(given)
    for shift in shifts:
        if shift < 0:
            given_bias = guarded(bias.swapaxes(2, 3), "bias").swapaxes(2, 3)
        else:
            given_bias = guarded(np.zeros(shift + bias.size, bias.dtype), "bias")[shift:].reshape(bias.shape)
            given_bias[...] = bias
        here["bias"] = Resident(bias)
        here["bias"].array = given_bias
        out, lse = flashmoe_cupy.flash_attention(**here, causal=True, return_lse=True)
        judge(out, want, "bfloat16")
        np.testing.assert_allclose(lse.array, want_lse, atol=2e-3)
        lse = flashmoe_cupy.attention_lse(**{n: x for n, x in here.items() if n != "v"}, causal=True)
        np.testing.assert_allclose(lse.array, want_lse, atol=2e-3)
    _workspaces.kept.clear()


def test_old_drivers_launch_one_after_the_other(machine: Machine) -> None:
    machine.driver = 12020
    case = MoECase(3, 64, 64, 3, 2)
    given = case.random()
    out = flashmoe_cupy.fused_moe(**resident(given), **case.options())
    judge(out, reference.fused_moe(**given, **case.options()), case.dtype)


def test_one_kernel_can_be_chosen(machine: Machine) -> None:
    case = MoECase(20, 64, 64, 3, 2)
    given = case.random()
    with only("grouped_gemm_sm80"):
        out = flashmoe_cupy.fused_moe(**resident(given), **case.options())
    judge(out, reference.fused_moe(**given, **case.options()), case.dtype)
    assert not any("GroupedGemmSm90" in tu for tu in machine.kernels)
