"""Order of work in mixtures of experts: streams, threads, graphs with other contents, the same bits under load.

Nothing may wait for the device: a recorded graph would not allow it. The checks that need no stream take the device,
so that test_moe_checks.py runs them on the CPU as well.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from threading import Thread
from typing import Any, NamedTuple

import pytest
from gpu_moe_kit import (
    Arrays,
    Tensor,
    judge,
    known_experts,
    known_products,
    poison,
    product_tensors,
    route,
    same_bits,
    tensors,
)
from moe_plans import Case, ProductCase, compile_everything, register, steps
from test_gpu_arrays import as_torch, to_cupy
from test_gpu_repeats import Disturbance

import flashmoe_cupy
from flashmoe_cupy import _env, fused_moe, grouped_gemm, moe_permute, moe_route
from flashmoe_cupy.errors import FlashMoEError
from flashmoe_cupy.jit import graph
from flashmoe_cupy.ops import call
from flashmoe_cupy.plan import kernels
from flashmoe_cupy.plan.forget import forget_all
from flashmoe_cupy.testing_moe import MoECase, RouteCase

torch: Any = pytest.importorskip("torch")
pytestmark = [pytest.mark.gpu, pytest.mark.torch]

NAP = 100_000_000  # clock cycles: about 0.05 s, far longer than any call's host side
REPEATS = 120


# ---------------------------------------------------------------------------------------------------------------------
# what is run: an operation, its arrays by a seed, and its results


class Work(NamedTuple):
    """case: what is planned. arrays: (device, seed) -> arguments. call: arguments -> results. wrong: what is."""

    case: Case
    arrays: Callable[[str, int], Arrays]
    call: Callable[..., list[Any]]
    wrong: Callable[[Arrays, list[Tensor]], list[str]]


def experts_of(case: MoECase) -> Work:
    def wrong(t: Arrays, out: list[Tensor]) -> list[str]:
        return judge(out[0], known_experts(t, **case.options()), t["x"].dtype)

    def call(**t: Any) -> list[Any]:
        return [fused_moe(**t, **case.options())]

    return Work(case, lambda device, seed: tensors(case._replace(seed=seed), device, seed), call, wrong)


def products_of(case: ProductCase) -> Work:
    def arrays(device: str, seed: int) -> Arrays:
        """Other seeds have other sizes of the groups, too."""
        sizes = case.sizes[seed % len(case.sizes) :] + case.sizes[: seed % len(case.sizes)]
        return product_tensors(case._replace(sizes=sizes), device, seed)

    def wrong(t: Arrays, out: list[Tensor]) -> list[str]:
        known, mine = known_products(t)
        return judge(out[0][mine], known, t["x"].dtype) + ["rows of nobody"] * bool(out[0][~mine].any())

    return Work(case, arrays, lambda **t: [grouped_gemm(**t)], wrong)


def router(tokens: int, experts: int) -> Work:
    """Router, permutation of its choice, with capacity and statistics."""
    case = RouteCase(tokens, experts, 8, "bfloat16", renormalize=True, capacity_factor=1.0)

    def call(logits: Any) -> list[Any]:
        weights, ids, stats = moe_route(logits, **case.options(), return_stats=True)
        return [weights, ids, *stats, *moe_permute(ids, num_experts=experts)]

    def arrays(device: str, seed: int) -> Arrays:
        g = torch.Generator(device).manual_seed(seed)
        return {"logits": torch.randn((tokens, experts), generator=g, device=device).to(torch.bfloat16)}

    def wrong(t: Arrays, out: list[Tensor]) -> list[str]:
        want = route(t["logits"], top_k=8, renormalize=True).ids
        kept = out[1] >= 0
        sums = int(kept.sum()) == int(out[2].sum()) == int(out[6][-1])
        return [] if sums and torch.equal(out[1][kept].long(), want[kept]) else ["other experts"]

    return Work(case, arrays, call, wrong)


def layer(tokens: int) -> Work:
    """A whole layer: the router's choice goes straight into the experts."""
    case = MoECase(tokens, 264, 136, 16, 4, biases="same", shared=64, shared_gate="float32")

    def arrays(device: str, seed: int) -> Arrays:
        some = tensors(case._replace(routing="uniform", tokens=max(tokens, 400)), device)  # all experts are in use
        t = {n: x for n, x in some.items() if n not in ("topk_ids", "topk_weights")}
        g = torch.Generator(device).manual_seed(seed)
        t["x"] = torch.randn((tokens, 264), generator=g, device=device).to(torch.bfloat16)
        t["shared_gate"] = t["shared_gate"][:tokens]
        return t | {"logits": torch.randn((tokens, 16), generator=g, device=device)}

    def call(logits: Any, **t: Any) -> list[Any]:
        weights, ids = moe_route(logits, top_k=4, renormalize=True)
        return [fused_moe(**t, topk_weights=weights, topk_ids=ids, **case.options())]

    def wrong(t: Arrays, out: list[Tensor]) -> list[str]:
        routed = route(t["logits"], top_k=4, renormalize=True)
        rest = {n: x for n, x in t.items() if n != "logits"}
        known = known_experts(rest | {"topk_weights": routed.weights.float(), "topk_ids": routed.ids}, **case.options())
        return judge(out[0], known, t["x"].dtype)

    return Work(case, arrays, call, wrong)


WORKS: dict[str, Work] = {
    "few tokens": experts_of(MoECase(5, 264, 136, 16, 4)),
    "more tokens": experts_of(MoECase(300, 264, 136, 5, 2, "float16", biases="same", interleaved=True, sentinels=0.1)),
    "many tokens": experts_of(MoECase(1000, 520, 264, 4, 2, routing="zipf", global_experts=7)),
    "many experts": experts_of(MoECase(130, 264, 200, 160, 8, activation="gelu", shared=72)),
    "awaited groups": experts_of(MoECase(96, 264, 392, 96, 8)),  # the second product starts within the first
    "one height": experts_of(MoECase(300, 264, 136, 5, 2, weight_on_input=True, batch_invariant=True)),
    "float32": experts_of(MoECase(150, 136, 72, 5, 2, "float32", biases="same")),
    "packed": products_of(ProductCase((200, 0, 77, 300), 264, 136, bias="same", tail=9)),
    "gathered": products_of(ProductCase((90, 100, 1, 70), 264, 136, "float16", x_rows=77)),
    "masked": products_of(ProductCase((40, 60, 0, 63), 264, 136, max_rows=64)),
    "router": router(300, 64),
    "large router": router(9000, 384),
    "layer": layer(37),
    "large layer": layer(700),
}
register(work.case for work in WORKS.values())


@pytest.fixture(scope="module", autouse=True)
def _compiled() -> None:
    compile_everything()


@pytest.fixture(scope="module")
def disturbance() -> Disturbance:
    return Disturbance()


@pytest.fixture(params=WORKS)
def work(request: pytest.FixtureRequest) -> Work:
    return WORKS[request.param]


def warm(work: Work, seed: int = 0) -> tuple[Arrays, list[Tensor]]:
    """Arguments and results, which are right; from here on all kernels are loaded, and calls are graphs."""
    t = work.arrays("cuda", seed)
    for _ in range(4):
        out = work.call(**t)
    assert work.wrong(t, out) == []
    torch.cuda.synchronize()
    return t, out


def equal(found: list[Tensor], want: list[Tensor]) -> bool:
    return all(same_bits(a, b) for a, b in zip(found, want, strict=True))


# ---------------------------------------------------------------------------------------------------------------------
# streams and threads


@pytest.mark.usefixtures("product_kernel")
def test_torch_stream(work: Work) -> None:
    """Inputs arrive late on a side stream: the kernels wait for them there, and the host waits for nothing."""
    t, want = warm(work)
    late = {n: torch.zeros_like(x) for n, x in t.items()}
    torch.cuda.synchronize()
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        for _ in range(3):
            work.call(**late)
        torch.cuda._sleep(NAP)
        for name, x in t.items():
            late[name].copy_(x)
        out = work.call(**late)
        waited = side.query()
        after = [x.clone() for x in out]
    side.synchronize()
    assert not waited, "the call waited for the device"
    assert equal(after, want)


def test_cupy_stream(work: Work) -> None:
    """The same for CuPy's current stream, while torch's current stream is another one."""
    import cupy

    t, want = warm(work)
    late = {n: torch.zeros_like(x) for n, x in t.items()}
    arrays, source = ({n: to_cupy(x) for n, x in some.items()} for some in (late, t))
    torch.cuda.synchronize()
    side = cupy.cuda.Stream(non_blocking=True)
    with side:
        work.call(**arrays)
        side.synchronize()
        with torch.cuda.stream(torch.cuda.ExternalStream(side.ptr)):
            torch.cuda._sleep(NAP)
        for name, x in arrays.items():
            cupy.cuda.runtime.memcpyAsync(x.data.ptr, source[name].data.ptr, x.nbytes, 3, side.ptr)
        out = work.call(**arrays)
        waited = side.done
    side.synchronize()
    assert not waited, "the call waited for the device"
    assert equal([as_torch(x) for x in out], want)


@pytest.mark.usefixtures("product_kernel")
def test_threads() -> None:
    """Every operation in a thread and on a stream of its own, all at once: no arguments reach another's kernel."""
    ready = {name: warm(work) for name, work in WORKS.items()}
    torch.cuda.synchronize()
    good: dict[str, list[bool]] = {name: [] for name in WORKS}

    def run(name: str) -> None:
        t, want = ready[name]
        with torch.cuda.stream(torch.cuda.Stream()):
            for _ in range(20):
                good[name].append(equal(WORKS[name].call(**t), want))

    threads = [Thread(target=run, args=(name,)) for name in WORKS]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert good == {name: [True] * 20 for name in WORKS}


# ---------------------------------------------------------------------------------------------------------------------
# the same bits


@pytest.mark.usefixtures("product_kernel")
def test_same_bits_beside_other_work(work: Work, disturbance: Disturbance) -> None:
    """Many runs into poisoned memory while a second stream keeps the device busy, compared on the device."""
    t, want = warm(work)
    wrong = torch.zeros((), dtype=torch.int64, device="cuda")
    size = max(steps(work.case, True)[1].bytes, sum(x.numel() * x.element_size() for x in want))
    torch.cuda.synchronize()  # the other products must not begin before the arrays are there to be compared
    for i in range(REPEATS):
        disturbance(i)
        poison(size, "cuda")
        for kept in [block.array for block in call._workspaces.kept.values()]:
            as_torch(kept).fill_(255)
        for out, ref in zip(work.call(**t), want, strict=True):
            wrong += (out.view(-1).view(torch.uint8) != ref.view(-1).view(torch.uint8)).any()
    assert int(wrong) == 0, f"{int(wrong)} of {REPEATS} runs differ"


def test_calls_right_behind_each_other(work: Work, disturbance: Disturbance) -> None:
    """Two sets of arrays take turns: what a kernel reads too early is the other set's."""
    sets = [work.arrays("cuda", seed) for seed in (0, 1)]
    wants = [work.call(**t) for t in sets]
    torch.cuda.synchronize()
    for turn in range(2):
        disturbance(turn)
        outs = [work.call(**sets[i % 2]) for i in range(40)]
        assert all(equal(out, wants[i % 2]) for i, out in enumerate(outs))


@pytest.mark.parametrize("name", ["few tokens", "more tokens", "many tokens", "many experts", "awaited groups"])
def test_calls_become_graphs(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """From the third on: with any arrays, on any stream, and at once where another shape has used the kernels."""
    work = WORKS[name]
    launched: list[graph.Graph] = []
    run = graph.Graph.run

    def noted(mine: graph.Graph, *given: Any) -> None:
        launched.append(mine)
        run(mine, *given)

    monkeypatch.setattr(graph.Graph, "run", noted)
    forget_all()
    graph._local.known.clear()
    sets = [work.arrays("cuda", seed) for seed in range(4)]
    wants = [work.call(**t) for t in sets]
    assert [work.wrong(t, want) for t, want in zip(sets, wants, strict=True)] == [[]] * 4
    assert len(launched) == 1  # the first call learns what such arrays need, two are single launches
    for stream in (torch.cuda.current_stream(), torch.cuda.Stream()):
        torch.cuda.synchronize()
        with torch.cuda.stream(stream):
            assert all(equal(work.call(**sets[turn % 4]), wants[turn % 4]) for turn in range(12))
    torch.cuda.synchronize()
    assert len(launched) == 1 + 12 + 10 and launched == [launched[0]] * 13 + [launched[-1]] * 10
    assert launched[0] is not launched[-1]
    assert isinstance(work.case, MoECase)
    fewer = experts_of(work.case._replace(tokens=work.case.tokens - 1))
    t = fewer.arrays("cuda", 0)
    want = fewer.call(**t)
    assert fewer.wrong(t, want) == []
    assert all(equal(fewer.call(**t), want) and equal(work.call(**sets[0]), wants[0]) for _ in range(3))
    assert launched[23:] == [launched[0]] * 6


def test_device_memory_does_not_leak(work: Work) -> None:
    t, _ = warm(work)
    before = torch.cuda.memory_allocated()
    for _ in range(50):
        work.call(**t)
    torch.cuda.synchronize()
    assert torch.cuda.memory_allocated() <= before  # what earlier tests left may be freed meanwhile


# ---------------------------------------------------------------------------------------------------------------------
# graphs


@pytest.mark.usefixtures("product_kernel")
def test_torch_graph(work: Work, disturbance: Disturbance) -> None:
    """Recorded once; each replay gives what a call gives on the numbers, experts and sizes of groups that are there."""
    t, _ = warm(work)
    recorded = torch.cuda.CUDAGraph()
    with torch.cuda.graph(recorded):
        out = work.call(**t)
    for seed in (1, 2, 3):
        for name, x in work.arrays("cuda", seed).items():
            t[name].copy_(x)
        for x in out:
            x.view(torch.uint8 if x.ndim else x.dtype).fill_(255)
        torch.cuda.synchronize()
        disturbance(seed)
        recorded.replay()
        torch.cuda.synchronize()
        replayed = [x.clone() for x in out]
        assert work.wrong(t, replayed) == [] and equal(replayed, work.call(**t)), seed
        assert all(bool(x.isfinite().all()) for x in replayed)


def test_cupy_graph(work: Work) -> None:
    """The same in CuPy. Its pool gives memory away again: what a graph works in must not be among that."""
    import cupy

    t, _ = warm(work)
    arrays, stream = {n: to_cupy(x) for n, x in t.items()}, cupy.cuda.Stream(non_blocking=True)
    with stream:
        work.call(**arrays)
        stream.begin_capture()
        out = work.call(**arrays)
        graph = stream.end_capture()
        others = [cupy.ndarray((size,), cupy.uint8) for size in sizes_around(steps(work.case, True)[1].bytes)]
        for other in others:
            other.data.memset_async(90, other.nbytes, stream)
        stream.synchronize()
        for seed in (1, 2):
            for name, x in work.arrays("cuda", seed).items():
                t[name].copy_(x)
            torch.cuda.synchronize()
            graph.launch(stream)
            stream.synchronize()
            replayed = [as_torch(x) for x in out]
            assert work.wrong(t, replayed) == [] and equal(replayed, work.call(**t)), seed
    torch.cuda.synchronize()
    changed = [other.nbytes for other in others if bool((as_torch(other) != 90).any())]
    assert changed == [], f"a replay wrote into arrays of {changed} bytes that are not its own"


def sizes_around(size: int) -> list[int]:
    """Sizes of which a pool may hand out memory that had this size."""
    return [max(size // part, 512) for part in (1, 1, 1, 2, 2, 4, 4, 8, 8, 16, 16)]


def test_recording_with_nothing_loaded(work: Work, monkeypatch: pytest.MonkeyPatch) -> None:
    """A kernel that is not loaded yet: an error that says what to do; afterwards all is well."""
    import cupy

    from flashmoe_cupy.jit import launch

    t, want = warm(work)
    arrays, stream = {n: to_cupy(x) for n, x in t.items()}, cupy.cuda.Stream(non_blocking=True)
    torch.cuda.synchronize()
    monkeypatch.setattr(launch, "_by_source", {})
    for forget in kernels.forget:
        forget()
    with stream:
        stream.begin_capture()
        with pytest.raises(FlashMoEError, match=r"call the operation once before"):
            work.call(**arrays)
        stream.end_capture()
        out = work.call(**arrays)
    stream.synchronize()
    assert equal([as_torch(x) for x in out], want)


def test_layer_object_in_a_graph() -> None:
    """FlashMoELayer, its router's product included."""
    t = tensors(MoECase(400, 264, 136, 16, 4, "float16"), "cuda")
    router_weight = torch.randn((16, 264), device="cuda") / 16
    weights: Arrays = {name: t[name] for name in ("w_gate_up", "w_down")}
    moe = flashmoe_cupy.FlashMoELayer(264, 16, 4, 136, router_weight=router_weight, renormalize=True, **weights)
    x, graph = t["x"][:60].clone().view(3, 20, 264), torch.cuda.CUDAGraph()
    moe(x)
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        out = moe(x)
    x.normal_()
    graph.replay()
    torch.cuda.synchronize()
    assert out.shape == x.shape and same_bits(out, moe(x))
    routed = route(x.view(60, 264).float() @ router_weight.T, top_k=4, renormalize=True)
    some = weights | {"x": x.view(60, 264), "topk_weights": routed.weights.float(), "topk_ids": routed.ids}
    assert judge(out.view(60, 264), known_experts(some), out.dtype) == []


# ---------------------------------------------------------------------------------------------------------------------
# ids that name nothing


@pytest.fixture
def checked(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("FLASHMOE_CHECK", "1")
    _env.reload()
    for forget in kernels.forget:
        forget()
    yield
    monkeypatch.undo()
    _env.reload()
    for forget in kernels.forget:
        forget()


def check_wrong_ids(device: str) -> None:
    """Under FLASHMOE_CHECK=1 the first id that is neither an expert nor a mark of an empty place is named."""
    for known, kind in ((0, "int32"), (0, "int64"), (20, "int32")):
        case = MoECase(30, 72, 40, 6, 3, global_experts=known, ids_dtype=kind, sentinels=0.2)
        t, last = tensors(case, device), case.known_experts
        good = fused_moe(**t)
        assert judge(good, known_experts(t), good.dtype) == []
        for value in (-2, last + 1, 2**31 - 1, -(2**31)):
            ids = t["topk_ids"].clone()
            ids[7, 1], ids[7, 2], ids[20, 0] = value, -77, 10**6
            out = torch.full_like(good, math.nan)
            with pytest.raises(FlashMoEError, match=rf"\[7, 1\] is {value}"):
                fused_moe(**t | {"topk_ids": ids}, out=out)
            with pytest.raises(FlashMoEError, match=rf"\[7, 1\] is {value}"):
                moe_permute(ids, num_experts=6, expert_map=t.get("expert_map"))
            assert bool(out.isnan().all()), "something was written"


def test_wrong_ids(checked: None) -> None:
    check_wrong_ids("cuda")


def check_nan_logits(device: str) -> None:
    """Under FLASHMOE_CHECK=1 the row of the first NaN is named, in every dtype and with strides of their own."""
    for kind in (torch.float32, torch.float16, torch.bfloat16):
        logits = torch.zeros((9, 40), device=device, dtype=kind)[:, :24]
        moe_route(logits, top_k=3)
        logits[4, 17] = logits[7, 0] = math.nan
        for scoring in ("softmax", "sigmoid", "sqrtsoftplus"):
            with pytest.raises(FlashMoEError, match=r"logits\[4, 17\] is NaN, one of 2 rows of 9"):
                moe_route(logits, top_k=3, scoring_func=scoring)
        bias = torch.zeros(24, device=device, dtype=kind)
        bias[3] = math.nan
        with pytest.raises(FlashMoEError, match=r"e_score_correction_bias\[3\] is NaN"):
            moe_route(logits[:4], top_k=3, e_score_correction_bias=bias)


def test_nan_logits(checked: None) -> None:
    check_nan_logits("cuda")


def test_every_operation_with_checks(checked: None, work: Work) -> None:
    warm(work)


def check_wild_ids(device: str, dtype: str = "bfloat16") -> None:
    """Without checks any number may be there: it counts for nothing, and nothing is read or written far away."""
    case = MoECase(200, 72, 40, 6, 3, dtype)
    t = tensors(case, device)
    for kind in (torch.int32, torch.int64):
        bits = torch.iinfo(kind)
        wild = torch.randint(bits.min, bits.max, (200, 3), device=device, dtype=kind)
        wild[::3] = torch.tensor([bits.min, bits.max, -1], device=device, dtype=kind)
        wild[::7] = torch.tensor([2**31 - 1, 6, 7], device=device, dtype=kind)
        if kind == torch.int64:
            wild[1::7] = torch.tensor([2**32, 2**32 + 1, 5 - 2**32], device=device)  # 0, 1 and 5 in 32 bits
        wild = torch.where((wild >= 0) & (wild < 6), -1, wild)
        assert not bool(fused_moe(**t | {"topk_ids": wild}).any())
        half = torch.where(torch.rand((200, 3), device=device) < 0.5, wild, t["topk_ids"].to(kind))
        some = t | {"topk_ids": half}
        out = fused_moe(**some)
        assert judge(out, known_experts(some), out.dtype) == []
    table = torch.tensor([2**31 - 1, -(2**31), 6, 5, -1, 0], dtype=torch.int32, device=device)
    some = t | {"expert_map": table}
    out = fused_moe(**some)
    assert judge(out, known_experts(some), out.dtype) == []


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_wild_ids(dtype: str) -> None:
    check_wild_ids("cuda", dtype)
