"""Calls like earlier ones: which arrays count as like theirs, what a fast call stores, and its workspaces."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from copy import copy
from functools import partial
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from flashmoe_cupy import flash_attention
from flashmoe_cupy.arrays import View, row_major
from flashmoe_cupy.dtypes import FP32, INT32
from flashmoe_cupy.errors import UnsupportedProblem
from flashmoe_cupy.jit import launch
from flashmoe_cupy.ops import access as accesses
from flashmoe_cupy.ops import call as calls_of
from flashmoe_cupy.ops import workspace
from flashmoe_cupy.ops.access import ArrayAccess
from flashmoe_cupy.ops.call import Call, Plan
from flashmoe_cupy.ops.memory import GuardedPlans
from flashmoe_cupy.ops.overlap import Overlap
from flashmoe_cupy.ops.workspace import Block, Workspaces
from flashmoe_cupy.plan import kernels

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.torch


@pytest.fixture
def access(monkeypatch: pytest.MonkeyPatch) -> ArrayAccess:
    """torch's access as a build with CUDA has it; the arrays stay in host memory."""
    for name in ("_cuda_getDevice", "_cuda_getCurrentRawStream", "_cuda_isCurrentStreamCapturing"):
        monkeypatch.setattr(torch._C, name, lambda *_: 0, raising=False)
    return accesses._torch(torch)


@pytest.fixture
def guarded() -> Iterator[GuardedPlans]:
    yield GuardedPlans()
    kernels.forget.pop()


class Subclass(torch.Tensor):  # type: ignore[misc, name-defined, unused-ignore]
    pass


def test_a_guard_knows_shapes_strides_dtypes_devices_and_kinds(access: ArrayAccess) -> None:
    x, y = torch.rand(6, 8), torch.randint(0, 9, (6,), dtype=torch.int32)
    guard = access.guard((x, y))
    assert guard is not None and guard(x, y) and guard(torch.rand(6, 8), y + 1) and guard(torch.rand(9, 8)[2:8], y)
    frozen = torch.nn.Parameter(torch.rand(6, 8), requires_grad=False)
    others: dict[str, Any] = {
        "shape": torch.rand(7, 8), "stride": torch.rand(8, 6).T, "dimensions": torch.rand(6, 8, 1),
        "dtype": torch.rand(6, 8).double(), "device": torch.rand(6, 8, device="meta"), "nothing": None,
        "subclass": torch.rand(6, 8).as_subclass(Subclass), "parameter": frozen, "library": torch.rand(6, 8).numpy(),
        "gradient": torch.rand(6, 8, requires_grad=True), "sparse": torch.rand(6, 8).to_sparse(),
        "negated": torch.complex(x, x).conj().imag,
    }  # fmt: skip
    second = access.guard((y, x))  # the first one is a tensor: its type was looked at before
    assert second is not None and second(y, x)
    for name, other in others.items():
        assert not second(y, other), name
    with torch.autograd.forward_ad.dual_level():
        assert not guard(x, y) and access.guard((x, y)) is None
    with torch.inference_mode():
        assert access.guard((x, y))(x, y)  # type: ignore[misc]


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_nested_tensors_are_refused_by_name(access: ArrayAccess, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also after a call on plain tensors, whose guard would end the process: these tensors have no strides."""
    monkeypatch.setitem(accesses._known, torch.Tensor, access)
    x = torch.rand(1, 5, 2, 16)
    nested = torch.nested.nested_tensor([x[0], x[0, :3]])
    guard = access.guard((x,))
    assert guard is not None and guard(x) and not guard(nested)
    assert access.key((nested,)) is None
    with pytest.raises(UnsupportedProblem, match="is a nested tensor"):
        flash_attention(nested, nested, nested)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors", "ignore:Sparse")
@pytest.mark.parametrize("at", [0, 1, 2])
def test_tensors_without_strides_have_no_fast_way(access: ArrayAccess, at: int) -> None:
    """At every place: a guard would end the process, and to read their strides is an error of torch."""
    x = torch.rand(6, 8)
    plain = [torch.rand(6, 8) for _ in range(3)]
    guard = access.guard(tuple(plain))
    assert guard is not None and guard(*plain)
    strangers = {
        "nested": torch.nested.nested_tensor([x, x[:3]]), "csr": x.to_sparse_csr(), "bsr": x.to_sparse_bsr((2, 2)),
        "jagged": torch.nested.nested_tensor([x, x[:3]], layout=torch.jagged),
    }  # fmt: skip
    for name, stranger in strangers.items():
        given = [*plain[:at], stranger, *plain[at + 1 :]]
        assert not guard(*given), name
        if at or name != "jagged":  # whose type is looked at before
            assert access.key(tuple(given)) is None, name
    assert not guard(*plain[:at], x.to_sparse(), *plain[at + 1 :])
    assert not guard(*plain[:at], x.numpy(), *plain[at + 1 :])


def test_a_guard_of_tensors_refuses_what_is_none(access: ArrayAccess) -> None:
    """The same options may come with another library's arrays: that is no error, and not the same plan."""
    for arrays in ((torch.rand(6, 8),), (torch.rand(6, 8), torch.rand(3))):
        guard = access.guard(arrays)
        assert guard is not None and guard(*arrays)
        assert guard(*[x.numpy() for x in arrays]) is False


class Touchy(torch.Tensor):  # type: ignore[misc, name-defined, unused-ignore]
    @classmethod
    def __torch_function__(cls, *_: Any, **__: Any) -> Any:
        raise RuntimeError("asked")


def test_a_guard_asks_no_subclass_for_attributes(access: ArrayAccess) -> None:
    guard = access.guard((torch.rand(6, 8),))
    assert guard is not None and not guard(torch.rand(6, 8).as_subclass(Touchy))


def test_arrays_that_are_one_must_be_one_again(access: ArrayAccess) -> None:
    """A guard of torch wants each tensor once, and packed sequences often come with one list of offsets for both."""
    x, y = torch.rand(6, 8), torch.arange(3)
    guard = access.guard((x, y, y))
    assert guard is not None and guard(x, y, y) and not guard(x, y, y.clone())
    guard = access.guard((x, y, y.clone()))
    assert guard is not None and guard(x, y, y.clone()) and not guard(x, y, y)


def test_a_gradient_that_is_not_recorded_is_none(access: ArrayAccess) -> None:
    x = torch.rand(3, requires_grad=True)
    with torch.no_grad():
        guard = access.guard((x,))
        assert guard is not None and guard(x)
    assert not guard(x)


class Known:
    """A plan with this fast call."""

    def __init__(self, fast: Any) -> None:
        self.fast = fast

    def fast_call(self, access: ArrayAccess, given: tuple[Any, ...]) -> Any:  # noqa: ARG002
        return self.fast


def find(guarded: GuardedPlans, given: tuple[Any, ...], options: Any) -> Any:
    return next((plan for guard, plan in guarded.entries.get(options, ()) if guard(*given)), None)


def test_recent_plans_are_found_by_arrays_and_options(access: ArrayAccess, guarded: GuardedPlans) -> None:
    x, y = torch.rand(3, 8), torch.rand(4, 8)
    guarded.note(access, (x,), (1, "a"), Known("first"))
    guarded.note(access, (y,), (1, "a"), Known("second"))
    assert find(guarded, (x,), (1, "a")) == "first" and find(guarded, (torch.rand(4, 8),), (1, "a")) == "second"
    assert find(guarded, (x,), (1, "b")) is None and find(guarded, (torch.rand(5, 8),), (1, "a")) is None
    for call in kernels.forget:
        call()
    assert find(guarded, (x,), (1, "a")) is None


def test_what_always_changes_is_not_guarded_for_ever(access: ArrayAccess, guarded: GuardedPlans) -> None:
    made = []
    counting = copy(access)

    def guard(arrays: tuple[Any, ...]) -> Any:
        made.append(arrays)
        return access.guard(arrays)

    counting.guard = guard
    plan = Known("plan")
    for n in range(50):
        guarded.note(counting, (torch.rand(n + 1),), (1,), plan)
    assert len(made) == GuardedPlans._MOST_GUARDS and len(guarded.entries[(1,)]) == GuardedPlans._MOST


def test_guards_keep_no_array_alive(access: ArrayAccess) -> None:
    import gc
    import weakref

    x, y = torch.rand(3), torch.rand(4)
    guard, alive = access.guard((x, y)), weakref.ref(x)
    del x
    gc.collect()
    assert alive() is None and guard is not None and guard(torch.rand(3), y)


def test_without_torchs_guards_keys_decide(access: ArrayAccess, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch._C._dynamo.guards, "TensorGuards", None)
    x = torch.rand(3)
    without = accesses._torch(torch)
    assert without.guard((x,)) is None and without.key((x,)) == access.key((x,))

    def other_version(*_: Any) -> None:
        raise ValueError("dynamic_dims_sizes")

    monkeypatch.setattr(torch._C._dynamo.guards, "TensorGuards", other_version)
    assert accesses._torch(torch).guard((x,)) is None


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")  # torch's of its own ways
def test_what_is_recorded_has_no_fast_way(access: ArrayAccess, monkeypatch: pytest.MonkeyPatch) -> None:
    """A result from memory would be a constant of the graph. A plan for such arrays is there, and each way looks."""
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.fx.experimental.proxy_tensor import make_fx
    from torch.utils._python_dispatch import TorchDispatchMode

    operation: Any = SimpleNamespace(arguments=("x",), exact_types={(str,): None}, pair=-1)

    class Mode(TorchDispatchMode):  # type: ignore[misc, name-defined, unused-ignore]
        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            return function(*args, **(kwargs or {}))

    x, its, found = torch.rand(3, 8), Call(operation), []
    monkeypatch.setitem(accesses._known, torch.Tensor, access)
    monkeypatch.setattr(calls_of, "_run", lambda *_: None)
    plan: Any = Known(lambda _: "fast")
    its.plans.keep((access.key((x,)), ("a",)), plan)
    guard, run = access.guard((x,)), calls_of.run
    assert guard is not None

    def look(a: Any) -> Any:
        for one in (a, x):  # the traced argument, and a tensor of the code around it
            found.append(run(its, (one,), ("a",)))
            plain = type(one) is torch.Tensor
            found.append((plain and (access.key((one,)) or guard(one))) or None)
        return a.sum()

    def with_mode(mode: Any) -> None:
        with mode:
            look(x)

    ways: dict[str, Any] = {
        "make_fx": lambda: make_fx(look)(x),
        "pre-dispatch": lambda: make_fx(look, pre_dispatch=True)(x),
        "fake": lambda: make_fx(look, tracing_mode="fake", pre_dispatch=True, _allow_non_fake_inputs=True)(x),
        "dispatch mode": lambda: with_mode(Mode()),
        "fake mode": lambda: with_mode(FakeTensorMode(allow_non_fake_inputs=True)),
        "jit.trace": lambda: torch.jit.trace(look, (x,), check_trace=False),
        "vmap": lambda: torch.vmap(look)(torch.stack((x, x))),
        "grad": lambda: torch.func.grad(look)(x),
        "jvp": lambda: torch.func.jvp(look, (x,), (x,)),
        "functionalize": lambda: torch.func.functionalize(look)(x),
    }
    for name, way in ways.items():
        for _ in range(2):
            found.clear()
            way()
            assert found and not any(one is not None for one in found), name
            for _ in range(2):
                assert run(its, (x,), ("a",)) == "fast"  # and plain code keeps it
    kernels.forget[-2:] = []


class CupyArray:
    """What is read of one of CuPy's arrays."""

    _c_contiguous = True

    def __init__(self, shape: tuple[int, ...], dtype: str = "float32", dense: bool = True) -> None:
        self.shape, self.dtype, self._c_contiguous, self.strides = shape, np.dtype(dtype), dense, (7,)
        self.data = SimpleNamespace(ptr=1600, device_id=0)


def test_cupys_guard_knows_shapes_dtypes_kinds_and_whether_rows_lie_dense() -> None:
    class Special(CupyArray):
        pass

    count = [1]
    runtime = SimpleNamespace(getDeviceCount=lambda: count[0], getDevice=lambda: 0, streamIsCapturing=bool)
    cuda = SimpleNamespace(get_current_stream=lambda device: SimpleNamespace(ptr=5), runtime=runtime)
    fake = SimpleNamespace(ndarray=CupyArray, cuda=cuda, dtype=np.dtype)
    access = accesses._cupy(fake)
    x, y = CupyArray((3, 8)), CupyArray((3,), "int32")
    guard = access.guard((x, y))
    assert access.guards and access.pointer(x) == 1600
    assert guard is not None and guard(x, y) and guard(CupyArray((3, 8)), CupyArray((3,), "int32"))
    others: tuple[Any, ...] = (
        CupyArray((4, 8)), CupyArray((3, 8), "float16"), CupyArray((3, 8), dense=False), Special((3, 8)), None,
        torch.rand(3, 8), np.ones((3, 8), np.float32),
    )  # fmt: skip
    assert not any(guard(other, y) for other in others)
    assert access.guard((x, CupyArray((3,), "int32", dense=False))) is None  # its key has the strides
    count[0] = 2
    several = accesses._cupy(fake)
    assert not several.guards and several.guard((x, y)) is None and several.key((x, y)) is not None


def test_workspaces_stay_with_their_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Any] = []

    def empty(device: int, shape: Any, strides: Any, dtype: Any) -> Any:
        made.append(bytearray(min(shape[0], 1000)))
        return made[-1]

    monkeypatch.setattr(launch, "memory_bytes", lambda device: 80 << 30)
    reads: Any = SimpleNamespace(empty=empty, pointer=id, uint8=None, graph_pool=True)
    workspaces = Workspaces()

    def find(device: int, stream: int, size: int, unshared: bool = False) -> Block:
        return workspaces.find(reads, device, stream, size, unshared)

    first = find(0, 5, 100)
    assert find(0, 5, 60) is first and first.size == 100 and first.address == id(made[0])
    assert find(0, 6, 100) is not first and find(1, 5, 100) is not first
    larger = find(0, 5, 200)
    assert larger.size == 200 and find(0, 5, 100) is larger
    alone = [find(0, 5, 100, True) for _ in range(2)]
    assert alone[0] is not alone[1] and larger not in alone and find(0, 5, 100) is larger
    elsewhere: list[Any] = []
    thread = threading.Thread(target=lambda: elsewhere.append(find(0, 5, 100)))
    thread.start()
    thread.join()
    assert elsewhere[0] is not larger and find(0, 5, 100) is larger
    for stream in range(100):
        find(0, stream, 8)
    assert len(workspaces.kept) <= workspace._MOST_STREAMS


def test_workspaces_that_stay_are_a_small_share_of_the_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "memory_bytes", lambda device: (80, 4)[device] << 30)
    reads: Any = SimpleNamespace(empty=lambda *_: object(), pointer=id, uint8=None, graph_pool=True)
    workspaces, may_stay = Workspaces(), workspace.may_stay
    assert may_stay(0, 320 << 20) and not may_stay(0, (320 << 20) + 1)
    assert may_stay(1, 32 << 20) and not may_stay(1, (32 << 20) + 1)
    for stream in range(9):
        workspaces.find(reads, 0, stream, 100 << 20, False)
        assert sum(kept.size for kept in workspaces.kept.values()) <= 320 << 20
    workspaces.find(reads, 0, 8, 120 << 20, False)  # what takes the place of a smaller one needs no more than itself
    assert len(workspaces.kept) == 3


class Calls:
    """Launches that are only noted, and arrays that are their addresses."""

    device = 0

    def __init__(self) -> None:
        self.made: list[tuple[Any, ...]] = []
        self.run_with: list[tuple[tuple[int, ...], int, bool]] = []
        self.recording = False
        self.order: Sequence[int] = ()

    def for_places(self, order: Sequence[int]) -> Calls:
        self.order = order
        return self

    def run(self, *given: Any) -> None:
        self.run_with.append(given)

    def empty(self, *given: Any) -> int:
        self.made.append(given)
        return 1000 * 16 + len(self.made)

    def access(self) -> Any:
        return SimpleNamespace(
            pointer=lambda x: x, empty=self.empty, stream=lambda device: 7 + device, uint8=None, graph_pool=True,
            dtypes={"float32": "f", "int32": "i"}, host=False, reads=True,
            maker=lambda *spec: partial(self.empty, *spec), recorder=lambda device: lambda stream: self.recording,
        )  # fmt: skip


def fast_call(calls: Calls, places: Sequence[int], shapes: Sequence[tuple[int, ...]], loaded: Any, out: Any) -> Any:
    """Of an operation with five arguments. out: tells whether memory is shared, where the last array is an output."""
    plan: Any = object.__new__(Plan)
    plan.operation = SimpleNamespace(arguments=tuple("abcde"), wrap=tuple, gives_one_array=True)
    plan.forms = [calls_of.Form("", shape, (FP32, INT32)[i], row_major(shape), 0.0) for i, shape in enumerate(shapes)]
    plan.places, plan.overlap, plan._nothing, plan._loaded, plan._fast = [*places], out, False, loaded, None
    plan.written = []
    return plan.fast_call(calls.access(), (SimpleNamespace(dtype="f"),))


@pytest.mark.parametrize(
    ("places", "out", "outputs", "want"),
    [
        ((1, 2, 3), False, 1, {1: 16, 2: 32, 3: 48, 6: 16001}),
        ((1, 3, 5), False, 2, {1: 16, 3: 32, 5: 48, 6: 16001, 7: 16002}),
        ((1, 3, 6), True, 1, {1: 16, 3: 32, 6: 48}),
        ((1, 3, 6), True, 2, {1: 16, 3: 32, 6: 48, 7: 16001}),
    ],
)
@pytest.mark.parametrize("workspace", [0, 100])
def test_a_fast_call_fills_the_table(
    monkeypatch: pytest.MonkeyPatch, places: tuple[int, ...], out: bool, outputs: int, want: dict[int, int],
    workspace: int,
) -> None:  # fmt: skip
    """New outputs come behind the arguments, and the workspace last."""
    monkeypatch.setattr(calls_of, "_workspaces", Workspaces())
    calls = Calls()
    shapes = [(3, 4), (3,)][:outputs]
    loaded: Any = SimpleNamespace(sequence=calls, workspace=workspace, rows=(1, 3, 6))
    shared: Any = SimpleNamespace(possible=lambda out, others: out in others) if out else None
    again = fast_call(calls, places, shapes, loaded, shared)
    found = again((16, 32, 48))
    made = (*([48] if out else []), *[want[place] for place in want if want[place] > 16000])
    assert found == (made[0] if outputs == 1 else made)
    specs = [(0, shape, row_major(shape), "fi"[i]) for i, shape in enumerate(shapes)][out:]
    assert calls.made[: len(specs)] == specs
    ((used, stream, recorded),) = calls.run_with
    table = dict(zip(calls.order, used, strict=False))
    assert len(used) == len(want) + (workspace > 0) and stream == 7
    if workspace:
        assert table.pop(6 + outputs) == 16000 + len(calls.made)
    assert table == want
    assert recorded == (workspace == 0)  # what has no workspace does not ask
    calls.recording = True
    again((16, 32, 48))
    assert calls.run_with[-1][2]
    for i in range(3):  # what does not start at a multiple of 16 bytes is refused, if it is one of the rows
        moved = [16, 32, 48]
        moved[i] += 8
        before = len(calls.run_with)
        refused = places[i] in (1, 3, 6)
        assert (again(tuple(moved)) is None) == refused and len(calls.run_with) == before + (not refused)
    before = len(calls.run_with)
    assert (again((16, 48, 48)) is None) == out and len(calls.run_with) == before + (not out)


def test_calls_share_a_workspace_unless_it_is_large_or_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calls_of, "_workspaces", Workspaces())
    monkeypatch.setattr(launch, "memory_bytes", lambda device: 80 << 30)

    def used(workspace: int, recording: bool = False) -> list[int]:
        calls.recording = recording
        loaded: Any = SimpleNamespace(sequence=calls, workspace=workspace, rows=())
        again = fast_call(calls, (1,), [(3,)], loaded, None)
        again((16,)), again((16,))
        return [table[-1] for table, *_ in calls.run_with[-2:]]

    calls = Calls()
    first, second = used(100)
    assert first == second and used(60) == [first] * 2
    for alone in (used(60, recording=True), used((320 << 20) + 1)):
        assert alone[0] != alone[1] and first not in alone
    assert used(100) == [first] * 2
    larger = used(200)
    assert larger[0] == larger[1] != first and used(100) == larger


@pytest.mark.parametrize(("count", "current", "asked"), [(1, 0, False), (2, 1, False), (2, 0, True)])
def test_streams_of_other_devices_are_asked_for(
    access: ArrayAccess, monkeypatch: pytest.MonkeyPatch, count: int, current: int, asked: bool
) -> None:
    """torch answers for the current device, which is the one if there is one."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    monkeypatch.setattr(torch._C, "_cuda_getDevice", lambda: current)
    monkeypatch.setattr(torch._C, "_cuda_isCurrentStreamCapturing", lambda: "torch")
    monkeypatch.setattr(launch, "is_capturing", lambda stream: f"the driver, of {stream}")
    answer: Any = accesses._torch(torch).recorder(count - 1)(5)
    assert answer == ("the driver, of 5" if asked else "torch")


@pytest.mark.parametrize(("count", "current", "quickly"), [(1, 0, True), (2, 1, True), (2, 0, False), (0, 1, False)])
def test_new_arrays_lie_on_the_device(
    access: ArrayAccess, monkeypatch: pytest.MonkeyPatch, count: int, current: int, quickly: bool
) -> None:
    """torch's quick function makes them on the current device. count 0: another version's, which has none."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: max(count, 1))
    monkeypatch.setattr(torch._C, "_cuda_getDevice", lambda: current)
    monkeypatch.setattr(torch, "empty_strided", lambda shape, strides, dtype, device: (shape, strides, dtype, device))
    name, guards = "_empty_strided_cuda", torch._C._dynamo.guards
    monkeypatch.setattr(guards, name, (lambda *given: given) if count else None, raising=False)
    spec = (2, 3), (3, 1), torch.float16
    assert accesses._torch(torch).maker(1, *spec)() == (spec if quickly else (*spec, 1))


def test_memory_that_may_be_shared_is_found_by_addresses() -> None:
    """Of the arguments that are there, with steps that go back, too."""

    def line(address: int, step: int = 1) -> View:
        return View(address, (100,), (step,), INT32, 0, "torch", False, None)

    overlap = Overlap("f", ("x", "y", "z"), (line(1), None, line(1, -2)), line(1))
    assert not overlap.possible(1000, (600, 2196))  # ends where out begins, begins where it ends
    assert overlap.possible(1000, (601, 2196)) and overlap.possible(1000, (600, 2191))
    assert overlap.possible(1000, (1399, 9000)) and not overlap.possible(1000, (1400, 9000))


def test_plans_are_kept_for_accesses_that_read_addresses() -> None:
    torch = pytest.importorskip("torch")
    fast, slow, host = (accesses.find(kind) for kind in (torch.Tensor, torch.nn.Parameter, np.ndarray))
    assert slow is not None and not slow.reads and host is not None and host.host
    assert fast is None or fast.reads or not hasattr(torch._C, "_cuda_getCurrentRawStream")


@pytest.mark.gpu
def test_parameters_in_autocast_with_nothing_to_cast() -> None:
    """They have no fast way, and the plan of the first call must not be taken for one."""
    torch = pytest.importorskip("torch")
    q = torch.nn.Parameter(torch.randn(1, 33, 2, 64, device="cuda", dtype=torch.bfloat16))
    with torch.no_grad(), torch.autocast("cuda", torch.bfloat16):
        want = flash_attention(q.data, q.data, q.data)
        for _ in range(3):
            assert torch.equal(flash_attention(q, q.data, q.data), want)


def test_what_reads_no_addresses_gets_no_fast_call() -> None:
    torch = pytest.importorskip("torch")
    plan = object.__new__(Plan)
    plan._fast, plan._nothing, plan.written = (lambda _: 1), False, []
    slow, host = accesses.find(torch.nn.Parameter), accesses.find(np.ndarray)
    assert slow is not None and plan.fast_call(slow, ()) is None
    assert host is not None and plan.fast_call(host, ()) is plan._fast
