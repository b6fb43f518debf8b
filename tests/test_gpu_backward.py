"""Attention's backward on the GPU: chosen and random problems against float64, by FlashAttention's rule."""

from __future__ import annotations

import itertools
import math
import random
from typing import Any

import pytest
from compile_kit import compile_all
from hypothesis import given, settings
from hypothesis import strategies as st

from flashmoe_cupy.plan.kernels import only
from flashmoe_cupy.testing import AttentionCase, Case, VarlenCase

torch = pytest.importorskip("torch")
from gpu_backward_kit import QKV, Problem, Tensor  # noqa: E402

pytestmark = [pytest.mark.gpu, pytest.mark.torch]

RAGGED = VarlenCase((70, 0, 1, 130), (33, 5, 90, 201), tail_q=3, tail_k=2)
PADDED = AttentionCase(
    130, 201, 5, used_q=(130, 129, 0, 70, 130), used_k=(201, 9, 150, 61, 201), left_q=(0, 30, 0, 3, 129),
    left_k=(0, 3, 40, 61, 140),
)  # fmt: skip
DIMS = ((64, 64), (40, 72), (96, 96), (128, 128), (192, 128), (256, 256), (64, 256), (32, 512), (8, 24))
FEATURES: tuple[dict[str, Any], ...] = (
    {},
    {"causal": True, "sinks": "float32"},
    {"window_size": (70, 3), "softcap": 15.0, "alibi": "bh", "sinks": "same"},
    {"bias": "bhqk", "bias_dtype": "float32", "causal": True},
    {"bias": "b1q1", "bias_dtype": "bool", "alibi": "h"},
    {"bias": "1h1k", "softcap": 5.0},
)


@pytest.fixture(scope="module", autouse=True)
def _compiled() -> None:
    """All kernels of the backward at once: each of a module's tests needs some."""
    from flashmoe_cupy.jit import launch
    from flashmoe_cupy.plan.archs import arch_for
    from flashmoe_cupy.plan.kernels import KERNELS

    kernels = [kernel for name, kernel in KERNELS.items() if name.startswith("attention_bwd")]
    compile_all(kernels, arch_for(launch.compute_capability(0))[0])


PORTABLE = "attention_bwd_sm80"


def check(*cases: Case) -> None:
    """Each case on the kernel that the library takes, and on the portable one."""
    wrong = []
    for seed, case in enumerate(cases):
        problem = Problem(case, seed=seed)
        wrong += [f"{case}: {line}" for line in problem.faults(problem.run())]
        with only(PORTABLE):
            wrong += [f"{case} {PORTABLE}: {line}" for line in problem.faults(problem.run())]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("dims", DIMS, ids=str)
def test_every_configuration(dims: tuple[int, int], dtype: str) -> None:
    check(*[AttentionCase(133, 147, 2, 4, 2, *dims, dtype, **features) for features in FEATURES])


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_padding_and_packed_sequences(dtype: str) -> None:
    padded = [PADDED._replace(**f) for f in FEATURES]
    packed = [RAGGED._replace(**f) for f in FEATURES[:3]]
    packed += [RAGGED._replace(used_q=(70, 0, 1, 99), used_k=(30, 5, 0, 190), heads_q=8, heads_k=1, causal=True)]
    check(*[case._replace(dtype=dtype) for case in padded], *[case._replace(dtype=dtype) for case in packed])


def test_lengths_at_the_edges_of_tiles() -> None:
    sizes = (1, 2, 63, 64, 65, 127, 128, 129, 257)
    check(*[AttentionCase(m, n, 1, 2, 1, causal=c) for m, n in itertools.product(sizes, sizes) for c in (False, True)])


def test_long_rows() -> None:
    check(AttentionCase(2049, 3001, 1, 4, 2, 128, causal=True), AttentionCase(3001, 1025, 1, 2, 2, 64))


def _problems(pick: random.Random) -> Case:
    def length() -> int:
        return pick.choice((pick.randint(1, 400), pick.choice((64, 65, 128, 129, 256))))

    def window() -> int:
        return pick.choice((-1, 0, 1, 64, pick.randint(0, 450)))

    heads_q, heads_k = pick.choice(((1, 1), (2, 2), (4, 2), (6, 3), (8, 1), (5, 5)))
    more: dict[str, Any] = {
        "heads_q": heads_q, "heads_k": heads_k, "head_dim": 8 * pick.randint(1, pick.choice((8, 16, 32))),
        "head_dim_v": pick.choice((0, 0, 8 * pick.randint(1, 32), 8 * pick.randint(1, 64))),
        "dtype": pick.choice(("bfloat16", "float16", "float32")), "causal": pick.random() < 0.5,
        "window_size": pick.choice(((-1, -1), (window(), window()))), "softcap": pick.choice((0.0, 0.0, 15.0, 2.0)),
        "softmax_scale": pick.choice((None, None, 0.05, -0.1)), "sinks": pick.choice(("", "same", "float32")),
        "alibi": pick.choice(("", "", "h", "bh")),
    }  # fmt: skip
    if pick.random() < 0.3:
        rows_q, rows_k = (tuple(pick.choice((0, length())) for _ in range(3)) for _ in "qk")
        return VarlenCase(rows_q, rows_k, tail_q=pick.choice((0, 9)), tail_k=pick.choice((0, 9)), **more)
    if pick.random() < 0.5:
        letters = "".join(pick.choice((c, "1")) for c in "bhqk")
        more |= {"bias": letters[pick.choice((0, 1, 2)) :], "bias_dtype": pick.choice(("same", "float32", "bool"))}
    case = AttentionCase(length(), length(), pick.randint(1, 3), **more)
    if pick.random() < 0.3:
        ends = [[pick.randint(0, n) for _ in range(case.batch)] for n in (case.seqlen_q, case.seqlen_k)]
        begins = [[pick.randint(0, n) for n in row] for row in ends]
        case = case._replace(used_q=tuple(ends[0]), used_k=tuple(ends[1]), left_q=tuple(begins[0]))
        case = case._replace(left_k=tuple(begins[1]))
    return case


@settings(max_examples=80, derandomize=True, deadline=None, database=None)
@given(st.randoms(use_true_random=True))
def test_random_problems(pick: random.Random) -> None:
    check(_problems(pick))


# ---------------------------------------------------------------------------------------------------------------------
# memory


def around(x: Tensor) -> tuple[Tensor, Tensor]:
    """Memory full of NaN, and a view in it of x's shape whose rows start at multiples of 16 bytes."""
    *before, heads, dim = x.shape
    whole = torch.full((*[n + 2 for n in before], heads + 1, dim + 16), math.nan, dtype=x.dtype, device=x.device)
    return whole, whole[(slice(1, -1),) * len(before) + (slice(0, heads), slice(8, 8 + dim))]


@pytest.mark.parametrize("case", [PADDED._replace(causal=True), RAGGED._replace(dtype="float16")], ids=("pad", "pack"))
def test_given_arrays(case: Case) -> None:
    """Rows that do not count are left alone, and nothing around them is touched."""
    problem = Problem(case)
    new = problem.run()
    memory = {f"d{name}": around(problem.t[name]) for name in QKV}
    found = problem.run(**{name: view for name, (_, view) in memory.items()})
    for name, (whole, view) in memory.items():
        assert found[name] is view
        idle = torch.ones(view.shape[: -2], dtype=torch.bool, device=view.device)
        for b, (start, stop) in enumerate(case.spans("q" if name == "dq" else "k")):
            (idle if isinstance(case, VarlenCase) else idle[b])[start:stop] = False
        assert bool(view[idle].isnan().all()) and bool((new[name][idle] == 0).all())
        assert torch.equal(view[~idle], new[name][~idle])
        view.fill_(math.nan)
        assert bool(whole.isnan().all()), f"wrote around {name}"


def test_strides_of_what_is_read() -> None:
    problem = Problem(AttentionCase(133, 147, 2, 4, 2, 64, causal=True, dtype="float16"))
    plain = problem.run(deterministic=True)
    t = {name: problem.t[name].transpose(1, 2).contiguous().transpose(1, 2) for name in QKV}
    odd = torch.empty(problem.dout.numel() + 1, dtype=problem.dout.dtype, device="cuda")[1:].view(problem.dout.shape)
    turned = problem.lse.transpose(1, 2).contiguous().transpose(1, 2)
    for changed in (t, {"lse": turned}, {"dlse": problem.dlse.mT.contiguous().mT}):
        made = problem.run(**changed, deterministic=True)
        assert all(torch.equal(made[name], x) for name, x in plain.items()), [*changed]
    assert problem.faults(problem.run(dout=odd.copy_(problem.dout), deterministic=True)) == []  # on another kernel
    problem.dout = problem.dout[:, :1, :1].expand(problem.dout.shape)
    packed = problem.run(dout=problem.dout.contiguous(), deterministic=True)
    assert all(torch.equal(x, packed[name]) for name, x in problem.run(deterministic=True).items())


def test_the_other_layout() -> None:
    problem = Problem(AttentionCase(133, 147, 2, 4, 2, 96, bias="1hqk"))
    turned = {name: x.transpose(1, 2) for name, x in problem.arguments().items() if name in (*QKV, "dout", "out")}
    found = problem.run(**turned, layout="bhsd")
    plain = problem.run()
    back = {name: x.transpose(1, 2) if name[1:] in QKV else x for name, x in found.items()}
    assert all(torch.equal(back[name], x) for name, x in plain.items())


@pytest.mark.parametrize("need", ["q", "k", "v", "q v", "k v", "sinks", "bias"])
def test_only_what_is_needed(need: str) -> None:
    problem = Problem(AttentionCase(133, 147, 2, 4, 2, 64, sinks="float32", bias="hqk"))
    everything, found = problem.run(), problem.run(need=need)
    assert set(found) == {f"d{name}" for name in need.split()}
    assert all(torch.equal(x, everything[name]) for name, x in found.items())


def test_queries_and_keys_that_see_nothing() -> None:
    problem = Problem(AttentionCase(300, 40, 1, 2, 1, 64, causal=True))
    found = problem.run()
    assert not found["dq"][:, :260].any() and problem.faults(found) == []
    problem = Problem(AttentionCase(40, 300, 1, 2, 1, 64, window_size=(5, 0)))
    found = problem.run()
    assert not found["dk"][:, :255].any() and not found["dv"][:, :255].any() and problem.faults(found) == []
    one = Problem(AttentionCase(70, 1, 1, 2, 2, 64))
    assert float(one.run(dlse=None)["dq"].abs().max()) < 1e-2


def test_empty_arrays() -> None:
    for case in (AttentionCase(0, 33), AttentionCase(33, 0), AttentionCase(33, 0, sinks="float32")):
        problem = Problem(case)
        assert problem.faults(problem.run()) == [], case


@pytest.mark.parametrize(
    "case",
    [
        AttentionCase(515, 600, 2, 8, 2, 128, causal=True, sinks="float32", bias="1hqk"),
        AttentionCase(515, 600, 2, 8, 2, 128, causal=True),
        AttentionCase(700, 700, 2, 8, 2, 64),
    ],
    ids=["bias", "128", "64"],
)
def test_the_same_bits_beside_another_stream(case: AttentionCase) -> None:
    problem = Problem(case)
    first, side = problem.run(deterministic=True), torch.cuda.Stream()
    busy = torch.randn(2048, 2048, device="cuda")
    for _ in range(1000):
        with torch.cuda.stream(side):
            busy = (busy @ busy).clamp_(-1, 1)
        found = problem.run(deterministic=True)
        assert all(torch.equal(found[name], x) for name, x in first.items())


def test_two_streams_at_once() -> None:
    """Blocks that wait for each other must not take the SMs that the others of their launch need."""
    problems = [Problem(AttentionCase(2048, 2048, 2, 8, 8, d)) for d in (64, 128)]
    first = [problem.run(deterministic=True) for problem in problems]
    streams = [torch.cuda.Stream() for _ in problems]
    torch.cuda.synchronize()
    for _ in range(30):
        for stream, problem in zip(streams, problems, strict=True):
            with torch.cuda.stream(stream):
                last = problem.run(deterministic=True)
    torch.cuda.synchronize()
    assert all(torch.equal(last[name], x) for name, x in first[-1].items())


@pytest.mark.parametrize("causal", [True, False])
def test_in_a_graph(causal: bool) -> None:
    problem = Problem(AttentionCase(133, 147, 2, 4, 2, 64, causal=causal))
    problem.run()  # compiles
    plain, graph = problem.run(deterministic=True), torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        made, fast = problem.run(deterministic=True), problem.run()
    for x in (*made.values(), *fast.values()):
        x.fill_(math.nan)
    graph.replay()
    assert all(torch.equal(made[name], x) for name, x in plain.items())
    assert problem.faults(fast) == []


def test_cupy_arrays() -> None:
    cupy = pytest.importorskip("cupy")
    import flashmoe_cupy

    problem = Problem(AttentionCase(133, 147, 2, 4, 2, 64, dtype="float16", sinks="same"))
    given = {n: cupy.from_dlpack(x) if isinstance(x, torch.Tensor) else x for n, x in problem.arguments().items()}
    made = flashmoe_cupy.flash_attention_backward(**given, deterministic=True)
    assert isinstance(made.dq, cupy.ndarray)
    plain = problem.run(deterministic=True)
    assert all(torch.equal(torch.from_dlpack(getattr(made, name)), x) for name, x in plain.items())
