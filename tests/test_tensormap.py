"""Tensor maps and how a launch stores their addresses, with a driver that only writes down what it is given."""

from __future__ import annotations

import ctypes
import struct
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
from test_problem import array, dense

from flashmoe_cupy.dtypes import BF16, FP16
from flashmoe_cupy.errors import FlashMoEError
from flashmoe_cupy.jit import driver as cuda
from flashmoe_cupy.jit import launch, sequence, tensormap
from flashmoe_cupy.jit.sequence import LaunchSequence
from flashmoe_cupy.jit.tensormap import TensorMap
from flashmoe_cupy.ops import gpu, public
from flashmoe_cupy.plan.attention.forward import AttentionFwdSm90
from flashmoe_cupy.plan.attention.problem import AttentionProblem
from flashmoe_cupy.plan.kernels import only
from flashmoe_cupy.plan.operation import registered

MAP = TensorMap(BF16, (64, 400, 2, 3), (256, 128, 102400), (64, 96, 1, 1))


class Library:
    """libcuda with one function. layout: what the map of an address looks like."""

    def __init__(self, layout: Any = None, code: int = 0) -> None:
        self.layout = layout or (lambda address, dims: struct.pack("<Q", address) + bytes([dims[0] % 256] * 120))
        self.code = code
        self.calls: list[tuple[Any, ...]] = []

    def cuTensorMapEncodeTiled(
        self, out: Any, dtype: int, rank: int, address: Any, dims: Any, strides: Any, box: Any, steps: Any, *modes: int
    ) -> int:
        assert out.value % 128 == 0 and len(dims) == len(box) == len(steps) == rank == len(strides) + 1
        self.calls.append((dtype, address.value, tuple(dims), tuple(strides), tuple(box), tuple(steps), modes))
        made = self.layout(address.value, tuple(dims))
        ctypes.memmove(out.value, made, len(made))
        return self.code


@pytest.fixture
def library(monkeypatch: pytest.MonkeyPatch) -> Library:
    fake = Library()
    monkeypatch.setattr(cuda, "_library", fake)
    return fake


def test_encode_hands_over_everything(library: Library) -> None:
    made = tensormap.encode(MAP, 0xABC0)
    assert len(made) == 128 and made[:8] == (0xABC0).to_bytes(8, "little")
    dims, box = (64, 400, 2, 3), (64, 96, 1, 1)
    # no interleave, 128-byte swizzle, 128-byte promotion in L2, zeros outside
    assert library.calls == [(9, 0xABC0, dims, (256, 128, 102400), box, (1, 1, 1, 1), (0, 3, 2, 0))]
    tensormap.encode(MAP._replace(dtype=FP16), 16)
    assert library.calls[1][0] == 6


def test_encode_says_what_the_driver_refused(library: Library) -> None:
    library.code = 1
    with pytest.raises(FlashMoEError, match=r"error 1.*0x30.*102400"):
        tensormap.encode(MAP, 0x30)
    assert tensormap.template(MAP) is None


def test_template_is_a_map_whose_first_words_are_the_address(library: Library) -> None:
    made = tensormap.template(MAP)
    assert made is not None and made[8:] == tensormap.encode(MAP, 0x77770)[8:]


@pytest.mark.parametrize(
    "layout",
    [
        lambda address, dims: bytes(8) + struct.pack("<Q", address) + bytes(112),
        lambda address, dims: struct.pack("<Q", address) + bytes(112) + struct.pack("<Q", address >> 12),
        lambda address, dims: struct.pack("<Q", address >> 4) + bytes(120),
        lambda address, dims: bytes(128),
    ],
)
def test_no_template_where_the_address_lies_elsewhere(library: Library, layout: Any) -> None:
    library.layout = layout
    assert tensormap.template(MAP) is None


# ---------------------------------------------------------------------------------------------------------------------
# the launch


class Driver:
    """Notes each launch with the bytes that its parameters had at that moment."""

    def __init__(self) -> None:
        self.launched: list[tuple[tuple[int, ...], bytes]] = []

    def launch(self, config: int, function: int, parameters: int, extra: None) -> int:
        assert extra is None
        *sizes, stream, _, _ = struct.unpack("7I4xQQI4x", ctypes.string_at(config, 56))
        (address,) = (ctypes.c_void_p * 1).from_address(parameters)
        assert address is not None and address % 128 == 0
        self.launched.append(((function, *sizes, stream), ctypes.string_at(address, 1024)))
        return 0


class Runtime:
    """One H100, which is current."""

    current = 0
    seen: tuple[int, ...] = ()

    def getDevice(self) -> int:
        return self.current

    def setDevice(self, device: int) -> None:
        self.seen = (*self.seen, device)

    def deviceGetAttribute(self, which: int, *_: int) -> int:
        return {75: 9, 76: 0, 16: 132, 36: 2_619_000, 37: 5120}[which]  # compute capability, multiprocessors, memory


@pytest.fixture
def driver(library: Library, monkeypatch: pytest.MonkeyPatch) -> Iterator[Driver]:
    fake = Driver()
    for name, value in {"_driver": fake, "_runtime": Runtime(), "_devices": 1, "_local": launch._Local()}.items():
        monkeypatch.setattr(launch, name, value)
    monkeypatch.setattr(sequence, "_calls", SimpleNamespace(cuLaunchKernelEx=fake.launch))
    yield fake


def prepared(maps: int, tail: bytes = bytes(range(112))) -> launch.Launch:
    """Two pointers, a tail up to byte 128, then maps."""
    plain = launch.Launch(0, 77, 5, 384, 1000, 2, tail)
    at = 16 + len(tail)
    made = [MAP._replace(dims=(64 + i, 1, 1, 1)) for i in range(maps)]
    return launch.with_maps(plain, at, made, at + 128 * maps, range(maps))


def queue(kernel: launch.Launch, pointers: tuple[int, int]) -> None:
    LaunchSequence([(kernel, ((1, 0), (2, 0)))]).run((0, *pointers), 9)


def test_a_launch_stores_addresses_only(driver: Driver, library: Library) -> None:
    kernel = prepared(2)
    assert kernel.maps == ((16, 0), (32, 1)) and len(kernel.tail) == 112 + 256
    encoded = len(library.calls)
    for pointers in ((0x1000, 0x2000), (0x5550, 0x7FFF_0000_0010)):
        queue(kernel, pointers)
        shape, params = driver.launched[-1]
        assert shape == (77, 5, 1, 1, 384, 1, 1, 1000, 9)
        assert struct.unpack("2Q", params[:16]) == pointers and params[16:128] == bytes(range(112))
        for i, address in enumerate(pointers):
            assert params[128 + 128 * i :][:128] == struct.pack("<Q", address) + bytes([64 + i] * 120)
    assert len(library.calls) == encoded


def test_maps_are_encoded_for_each_address_where_there_is_no_template(driver: Driver, library: Library) -> None:
    library.layout = lambda address, dims: bytes([dims[0]] * 64) + struct.pack("<Q", address) + bytes(56)
    kernel = prepared(2)
    assert kernel.maps == () and len(kernel.tail) == 112 + 256
    library.calls.clear()
    run = LaunchSequence([(kernel, ((1, 0), (2, 0)))]).run
    addresses = [(16 * i, 32 * i) for i in range(1, 100)]
    for pointers in (*addresses, addresses[-1]):
        run((0, *pointers), 9)
        params = driver.launched[-1][1]
        assert struct.unpack("2Q", params[:16]) == pointers and params[16:128] == bytes(range(112))
        for i, address in enumerate(pointers):
            assert params[128 + 128 * i :][:128] == library.layout(address, (64 + i,))
    assert len(library.calls) == 2 * 99, "the last pair was remembered"


# ---------------------------------------------------------------------------------------------------------------------
# from the operation to the driver


@pytest.fixture
def loaded(driver: Driver, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """The sources that were loaded, in order; no plan of another test, none left behind."""
    sources: list[str] = []

    def load_for(tu: str, *_: Any) -> launch.Loaded:
        sources.append(tu)
        return launch.Loaded(len(sources), None)

    monkeypatch.setattr(launch, "load_for", load_for)
    gpu._loaded.clear()
    yield sources
    gpu._loaded.clear()


def call(p: AttentionProblem, **pointers: int) -> None:
    operation = registered(public.flash_attention.__name__)
    given = {"q": 0x1000, "k": 0x2000, "v": 0x3000, "out": 0x4000} | pointers
    gpu.launch(operation, p, 0, 9, [given.get(name, 0) for name in operation.arguments], {"out": given["out"]}, 0)


def test_the_operation_launches_the_hopper_kernel(driver: Driver, loaded: list[str], library: Library) -> None:
    p = dense(q=array(2, 3000, 4, 64), k=array(2, 700, 2, 64), v=array(2, 700, 2, 64), causal=True)
    kernel = AttentionFwdSm90()
    config = kernel.choose(p, "sm_90a")
    for q in (0x1000, 0x7000):
        call(p, q=q)
        shape, params = driver.launched[-1]
        assert shape == (1, kernel.grid(p, config, 132), 1, 1, config.threads, 1, 1, config.smem_bytes, 9)
        maps_at = kernel.params.maps_at
        numbers = kernel.params.pack(kernel.values(p, config, True, 132))
        assert params[8 * len(kernel.params.pointers) : maps_at] == numbers
        for i, address in enumerate((q, 0x2000, 0x3000, 0x4000)):
            assert params[8 * i : 8 * i + 8] == params[maps_at + 128 * i :][:8] == struct.pack("<Q", address)
    assert len(loaded) == 1 and "AttentionFwdSm90<" in loaded[0]
    encoded = [(given[2], given[4]) for given in library.calls[::2]]
    assert encoded == [(of.dims, of.box) for of in kernel.map_arguments(p, config)]


def test_the_operation_changes_kernels_with_the_pointers(driver: Driver, loaded: list[str]) -> None:
    """Rows at odd addresses go to the general kernel; so does everything while `only` asks for it."""
    p = dense()
    for pointers in ({}, {"v": 0x3002}, {"out": 0x4008}, {}):
        call(p, **pointers)
    assert [driver.launched[i][0][0] for i in range(4)] == [1, 2, 2, 1]
    assert "AttentionFwdSm90<" in loaded[0] and "AttentionFwdSm80<" in loaded[1] and len(loaded) == 2
    with only("attention_fwd_sm80"):
        call(p)
        assert "AttentionFwdSm80<" in loaded[2]
    call(p)
    assert "AttentionFwdSm90<" in loaded[3]
