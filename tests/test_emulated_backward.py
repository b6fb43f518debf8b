"""Attention's backward on the emulated GPU: right in every order of events, and faults put into it are found."""

from __future__ import annotations

from typing import Any

import emulate
import numpy as np
import pytest
from emulated_backward import ALL, CUDA, backward, faults, inputs, problem_of, truth
from test_cli_moe import loads

from flashmoe_cupy import reference
from flashmoe_cupy.jit.device import H100
from flashmoe_cupy.ops import gpu, public
from flashmoe_cupy.plan.attention.backward import backward_steps
from flashmoe_cupy.plan.kernels import KERNELS, choose, of_task, prepared
from flashmoe_cupy.plan.operation import registered
from flashmoe_cupy.testing import AttentionCase, Case, VarlenCase

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(emulate.missing() is not None, reason=str(emulate.missing())),
]

RAGGED = VarlenCase((70, 0, 1, 130), (33, 5, 90, 201), tail_q=3, tail_k=2)
PADDED = AttentionCase(
    130, 201, 5, used_q=(130, 129, 0, 70, 130), used_k=(201, 9, 150, 61, 201), left_q=(0, 30, 0, 3, 129),
    left_k=(0, 3, 40, 61, 140),
)  # fmt: skip
CASES: tuple[tuple[Case, tuple[str, ...]], ...] = (
    (AttentionCase(70, 131, 1, 2, 2, 64), ALL),
    (AttentionCase(150, 203, 1, 4, 2, 64, causal=True), ALL),
    (AttentionCase(70, 131, 2, 2, 1, 128, dtype="float16", window_size=(40, 7)), ALL),
    (AttentionCase(33, 65, 1, 2, 2, 40, dtype="float32", softcap=15.0, sinks="float32"), (*ALL, "dsinks")),
    (AttentionCase(65, 70, 1, 2, 2, 64, bias="h1k", bias_dtype="bool", alibi="bh"), ALL),
    (AttentionCase(70, 201, 1, 2, 2, 128, bias="hqk", dtype="float16", causal=True), ("dq", "dv")),
    (AttentionCase(40, 50, 1, 2, 2, 64, 304), ALL),
    (AttentionCase(70, 60, 1, 2, 1, 256, causal=True), ALL),
    (AttentionCase(70, 60, 1, 2, 1, 256, softcap=5.0, softmax_scale=-0.1), ALL),
    (AttentionCase(40, 50, 1, 2, 2, 200, 136, dtype="float32"), ALL),
    (AttentionCase(300, 33, 1, 2, 2, 64, causal=True, sinks="float32"), (*ALL, "dsinks")),
    (AttentionCase(50, 40, 1, 2, 2, 64), ("dk",)),
    (AttentionCase(50, 40, 1, 2, 2, 192, 128), ("dv",)),
    (RAGGED._replace(used_k=(30, 5, 0, 190), causal=True, sinks="same"), (*ALL, "dsinks")),
    (PADDED._replace(causal=True), ALL),
    (PADDED._replace(bias="bhqk", bias_dtype="float32"), ALL),
    (AttentionCase(70, 90, 2, 4, 2, 64, bias="h1k", causal=True), ("dbias",)),
    (AttentionCase(70, 90, 2, 4, 2, 128, bias="bhqk", bias_dtype="float32", softcap=4.0), ("dq", "dbias")),
    (AttentionCase(70, 90, 2, 2, 2, 64, bias="q1", alibi="h", dtype="float16"), ("dbias",)),
    (AttentionCase(70, 90, 2, 2, 2, 40, bias="11", dtype="float32"), ("dbias",)),
    (AttentionCase(33, 40, 1, 2, 2, 256, 304, bias="qk"), ("dbias",)),
    (PADDED._replace(bias="1hqk", causal=True), ("dbias",)),
    (PADDED._replace(bias="b11k", window_size=(70, 9)), ("dbias",)),
)


@pytest.mark.parametrize(("case", "wanted"), CASES, ids=[str(i) for i in range(len(CASES))])
def test_right_in_every_order(case: Case, wanted: tuple[str, ...]) -> None:
    arrays = inputs(case)
    want = truth(case, arrays)
    for seed in range(6):
        assert faults(case, backward(case, arrays, seed, wanted), want) == [], seed


# The portable kernel of all three gradients. Architectures differ in its tiles: warps that exchange P and dS or hold
# them, one step in shared memory or two.
AT_ONCE: tuple[Case, ...] = (
    AttentionCase(70, 131, 1, 2, 2, 128),
    AttentionCase(150, 203, 1, 4, 2, 64, causal=True),
    AttentionCase(200, 331, 2, 2, 1, 120, dtype="float16", window_size=(40, 7)),
    AttentionCase(300, 33, 1, 2, 2, 64, causal=True, sinks="float32"),
    AttentionCase(150, 150, 1, 4, 2, 96, causal=True, softcap=5.0),
    AttentionCase(70, 90, 1, 2, 1, 128, softcap=5.0, alibi="h", dtype="float16"),
    AttentionCase(90, 100, 1, 2, 2, 128, 72),
    AttentionCase(130, 70, 1, 2, 2, 40, window_size=(0, 9)),
    AttentionCase(70, 90, 1, 4, 2, 192, 128),
    AttentionCase(70, 90, 1, 2, 1, 160, dtype="float16", causal=True),
    AttentionCase(150, 90, 1, 2, 1, 256, causal=True),
    AttentionCase(1, 1, 2, 2, 2, 64),
    RAGGED._replace(causal=True),
    VarlenCase((5, 0, 130, 1, 70, 0, 0, 200, 64), (5, 3, 260, 0, 70, 0, 0, 128, 300), heads_k=2, head_dim=128),
    PADDED._replace(causal=True),
    PADDED._replace(head_dim=128, window_size=(30, 5)),
)
PORTABLE = ("sm_80", "sm_86", "sm_100")


@pytest.mark.parametrize("arch", PORTABLE)
@pytest.mark.parametrize("case", AT_ONCE, ids=[str(i) for i in range(len(AT_ONCE))])
def test_all_gradients_at_once(case: Case, arch: str) -> None:
    arrays = inputs(case)
    want = truth(case, arrays)
    for seed in range(4):
        found = backward(case, arrays, seed, ALL, arch, deterministic=False)
        assert faults(case, found, want) == [], seed


@pytest.mark.parametrize("d", [64, 96, 128, 192, 256])
@pytest.mark.parametrize("arch", PORTABLE)
def test_which_kernel_makes_all_gradients(arch: str, d: int) -> None:
    """None of 129 to 192 columns, none of more for 99 KiB of shared memory, and none whose sums have one order."""
    case = AttentionCase(40, 50, 1, 2, 2, d)
    problem = problem_of(case, inputs(case), ALL)
    for deterministic in (False, True):
        steps = backward_steps(problem._replace(deterministic=deterministic))[0]
        steps = prepared(steps, arch, True, H100, ())[0]
        at_once = not deterministic and d != 192 and (arch != "sm_86" or d <= 128)
        parts = [step.problem.part for step in steps if step.task == "attention_bwd"]
        assert parts == (["qkv"] if at_once else ["k", "v", "q"] if d > 128 else ["kv", "q"])
        assert (steps[-1].task == "attention_bwd_convert") == at_once


@pytest.mark.parametrize("d", [64, 96, 128])
@pytest.mark.parametrize("change", [{"softcap": 5.0}, {"alibi": "h"}], ids=["softcap", "ALiBi"])
def test_scores_that_change_take_one_launch(d: int, change: dict[str, Any]) -> None:
    """Of Hopper's kernel in any order of sums, and of the portable ones from 65 columns on."""
    case = AttentionCase(40, 50, 1, 2, 2, d, causal=True)._replace(**change)
    for deterministic in (False, True):
        problem = problem_of(case, inputs(case), ALL)._replace(deterministic=deterministic)
        for arch, at_once in (("sm_90a", True), ("sm_80", d > 64 and not deterministic)):
            steps = prepared(backward_steps(problem)[0], arch, True, H100, ())[0]
            parts = [step.problem.part for step in steps if step.task == "attention_bwd"]
            assert parts == (["qkv"] if at_once else ["kv", "q"])


@pytest.mark.parametrize("arch", ["sm_80", "sm_86", "sm_90a", "sm_120"])
@pytest.mark.parametrize("deterministic", [False, True])
def test_every_launch_of_empty_arrays_has_blocks(arch: str, deterministic: bool) -> None:
    """A driver refuses a launch of none."""
    for case in (AttentionCase(0, 33), AttentionCase(33, 0), AttentionCase(33, 0, head_dim=256), VarlenCase((), ())):
        problem = problem_of(case, inputs(case), ALL)._replace(deterministic=deterministic)
        for step in prepared(backward_steps(problem)[0], arch, True, H100, ())[0]:
            kernel = choose(step.task, step.problem, arch, True)
            assert kernel.grid(step.problem, kernel.choose(step.problem, arch, True, H100)) > 0, (case, step)


def test_small_shared_memory() -> None:
    """Architectures with 99 KiB of it have tiles of their own."""
    case = AttentionCase(70, 90, 1, 2, 1, 256, causal=True)
    arrays = inputs(case)
    assert faults(case, backward(case, arrays, 0, arch="sm_86"), truth(case, arrays)) == []


# The Hopper kernel: ragged tiles, groups of heads, masks on both sides, rows and columns that see nothing, each part.
HOPPER: tuple[tuple[Case, tuple[str, ...]], ...] = (
    (AttentionCase(70, 131, 1, 2, 2, 64), ALL),
    (AttentionCase(150, 403, 1, 4, 2, 64, causal=True), ALL),
    (AttentionCase(200, 331, 2, 2, 1, 128, dtype="float16", window_size=(40, 7)), ALL),
    (AttentionCase(300, 33, 1, 2, 2, 64, causal=True, sinks="float32"), (*ALL, "dsinks")),
    (AttentionCase(33, 300, 1, 2, 2, 128, window_size=(20, 0)), ALL),
    (AttentionCase(150, 150, 1, 4, 1, 128, causal=True), ALL),
    (AttentionCase(50, 240, 1, 2, 2, 96, 72), ("dk",)),
    (AttentionCase(50, 240, 1, 2, 2, 64), ("dv",)),
    (AttentionCase(150, 240, 1, 4, 2, 96, 72), ALL),
    (AttentionCase(150, 240, 1, 2, 2, 80, 96, causal=True, softcap=5.0, dtype="float16"), ALL),
    (AttentionCase(700, 600, 1, 4, 2, 64), ALL),
    (AttentionCase(1, 1, 2, 2, 2, 128), ALL),
    (RAGGED._replace(causal=True), ALL),
    (VarlenCase((5, 0, 130, 1, 70, 0, 0, 200, 64), (5, 3, 260, 0, 70, 0, 0, 128, 300), heads_k=2), ALL),
    (RAGGED._replace(head_dim=128, used_q=(60, 0, 1, 130), used_k=(30, 5, 0, 190), causal=True, dtype="float16"), ALL),
    (PADDED._replace(head_dim=128, causal=True), ALL),
    (PADDED._replace(head_dim=40, window_size=(30, 5)), ALL),
    (AttentionCase(150, 150, 1, 4, 2, 128, causal=True, softcap=5.0), ALL),
    (AttentionCase(130, 200, 2, 2, 2, 64, softcap=20.0, alibi="bh", dtype="float16"), ALL),
    (RAGGED._replace(head_dim=128, causal=True, alibi="h"), ALL),
    (AttentionCase(70, 131, 1, 2, 1, 96, softmax_scale=-0.1), ALL),
    (AttentionCase(150, 403, 1, 4, 2, 64, causal=True, softcap=5.0), ALL),
    (AttentionCase(300, 140, 2, 2, 1, 40, 64, alibi="h", window_size=(60, 7)), ALL),
    (AttentionCase(450, 300, 1, 2, 2, 64, softcap=30.0, softmax_scale=-0.1, dtype="float16"), ALL),
    (AttentionCase(70, 131, 1, 4, 1, 64, softmax_scale=-0.1, alibi="bh", causal=True), ALL),
    (RAGGED._replace(causal=True, softcap=5.0, alibi="h"), ALL),
    (PADDED._replace(window_size=(30, 5), softcap=0.7, dtype="float16"), ALL),
)


@pytest.mark.parametrize(("case", "wanted"), HOPPER, ids=[str(i) for i in range(len(HOPPER))])
@pytest.mark.parametrize("deterministic", [True, False], ids=["deterministic", "fast"])
def test_hopper_in_every_order(case: Case, wanted: tuple[str, ...], deterministic: bool) -> None:
    arrays = inputs(case)
    want = truth(case, arrays)
    problem = problem_of(case, arrays, wanted)._replace(deterministic=deterministic)
    for step in backward_steps(problem)[0]:
        if step.task == "attention_bwd":
            assert not KERNELS["attention_bwd_sm90"].why_not(step.problem, "sm_90a")
    for sms in (1, 3):  # whether all blocks run at once says in which order dq is added
        first: dict[str, Any] = {}
        for seed in range(4):
            found = backward(case, arrays, seed, wanted, "sm_90a", deterministic=deterministic, sms=sms)
            assert faults(case, found, want) == [], seed
            first = first or found
            if deterministic:
                assert all(found[name].tobytes() == first[name].tobytes() for name in wanted), seed


@pytest.mark.parametrize("d", [64, 128])
@pytest.mark.parametrize("deterministic", [True, False], ids=["deterministic", "fast"])
@pytest.mark.parametrize("softcap", [0.0, 300.0])
@pytest.mark.parametrize("arch", ["sm_90a", "sm_80", "sm_100"])
def test_keys_behind_the_end(d: int, deterministic: bool, softcap: float, arch: str) -> None:
    """Where every score is so low that exp(-lse) is infinite, rows that are loaded as zeros must not count."""
    case = AttentionCase(70, 70, 1, 2, 2, d, softcap=softcap)
    arrays = inputs(case)
    arrays["q"][...], arrays["k"][...] = 5.0, -5.0
    q, k, v = (arrays[name].astype(np.float64) for name in "qkv")
    out, lse = reference.flash_attention(q, k, v, softcap=softcap, return_lse=True)
    arrays |= {"out": out.astype(arrays["q"].dtype), "lse": lse.astype(np.float32)}
    found = backward(case, arrays, 0, ALL, arch, deterministic=deterministic)
    assert all(np.isfinite(found[name].astype(np.float32)).all() for name in ALL)


_90, _90_BLOCKS = "attention/bwd_sm90.cuh", "attention/bwd_blocks_sm90.cuh"
# What is taken out of a header, and whether of the kernel that makes dq, dk and dv at once.
HOPPER_FAULTS = {
    "x given back before its product": (
        False, _90, "          if (step > 0) release_x(p, x, at.before());", "          x.release(at);",
    ),
    "scores not waited for": (False, _90, "wgmma_wait_group<kScores ? 1 : 0>(r_s[0]);", ""),
    "y not waited for": (
        False, _90, "        wgmma_commit_group();\n        y.wait_full(at);\n", "        wgmma_commit_group();\n",
    ),
    "rows not waited for": (
        False, _90, "rings.row_x.wait_full(walk.row_x);\n      if constexpr (kScores)", "if constexpr (kScores)",
    ),
    "statistics not reported": (False, _90_BLOCKS, "x.init(kByKey ? 1 + 32 : 1,", "x.init(1,"),
    "barriers not fenced": (False, _90_BLOCKS, "fence_mbarrier_init();", ""),
    "the next head": (False, _90_BLOCKS, "      if (w.heads_inside) {", "      if (false) {"),
    "where the way down begins": (False, _90_BLOCKS, "? w.first + w.steps - 1", "? w.first"),
    "a tile read while the next one is written": (
        False, _90, "        const Work w = s_work;\n        __syncwarp();\n", "        const Work& w = s_work;\n",
    ),
    "the next tile written over this one": (
        False, _90_BLOCKS, "      rings.work.wait_empty(Ring<1>{0, tiles & 1});\n      copy", "      copy",
    ),
    "dS of the other consumer not waited for": (
        True, _90, "barrier_sync(kScoresStored + 2 * (consumer ^ 1) + (count.turn() ^ 1), 256);\n        store",
        "store",
    ),
    "dS not fenced": (True, _90, "r_ds);\n        fence_proxy_async();\n", "r_ds);\n"),
    "dS reported before dq is done": (
        True, _90, "        wgmma_wait_group<1>(r_dv);  // dv and dq\n", "        wgmma_wait_group<2>(r_dv);\n",
    ),
    "the next tile's keys for the last dq of this one": (
        True, _90, "count.owes_dq ? keys_of(s_base, count.tiles - 1) : s_k;", "s_k;",
    ),
    "pieces of dq put down too early": (True, _90, "ring.wait_empty(Counts::template ring<1>(count.steps - 1));", ""),
    "pieces of dq not fenced": (True, _90, "    fence_proxy_async();\n    __syncwarp();\n", "    __syncwarp();\n"),
    "sums not cleared": (
        True, "attention/bwd_dot.cuh", "make_float4(0.f, 0.f, 0.f, 0.f);", "make_float4(1.f, 0.f, 0.f, 0.f);",
    ),
    "tiles not counted from 0": (
        True, "attention/bwd_dot.cuh", "p.tile_counters[threadIdx.x] = 0;", "p.tile_counters[threadIdx.x] = 1;",
    ),
}  # fmt: skip


@pytest.mark.parametrize(
    ("name", "case"),
    [(name, AttentionCase(300, 200, 1, 4, 2, 128, causal=True)) for name in HOPPER_FAULTS]  # a ring of two steps
    + [
        (name, AttentionCase(400, 200, 1, 4, 2, 64, causal=True, softcap=5.0))  # a piece of dq for both consumers
        for name, (fast, *_) in HOPPER_FAULTS.items()
        if fast
    ],
)
def test_hopper_faults_are_found(name: str, case: AttentionCase) -> None:
    fast, header, old, new = HOPPER_FAULTS[name]
    text = (CUDA / header).read_text(encoding="utf-8")
    assert old in text, f"{header} no longer holds {old!r}"
    arrays = inputs(case)
    want = truth(case, arrays)
    wanted = ALL if fast else ("dk", "dv")
    for seed in range(16):
        try:
            changed = {header: text.replace(old, new)}
            found = backward(case, arrays, seed, wanted, "sm_90a", headers=changed, deterministic=not fast)
            if faults(case, found, want):
                return
        except emulate.EmulationError:
            return
    raise AssertionError(f"{name}: no order of events shows it")


@pytest.mark.parametrize(
    "case",
    [
        AttentionCase(256, 900, 1, 2, 2, 64), AttentionCase(700, 600, 1, 4, 2, 96),
        AttentionCase(600, 600, 1, 2, 2, 64, window_size=(150, -1)), AttentionCase(500, 500, 3, 2, 2, 64, causal=True),
        AttentionCase(400, 400, 1, 4, 2, 128, causal=True), AttentionCase(256, 900, 1, 2, 2, 64, softcap=5.0),
        AttentionCase(500, 500, 3, 2, 2, 64, causal=True, softcap=30.0),
    ],
    ids=["all keys", "all keys, groups", "window", "causal", "causal, groups", "softcap", "softcap, causal"],
)  # fmt: skip
def test_the_order_of_sums_is_kept(case: AttentionCase) -> None:
    """Without their turns blocks add in another order in some run, and the last bits of dq tell."""
    arrays = inputs(case)
    header = "attention/bwd_sums_sm90.cuh"
    text = (CUDA / header).read_text(encoding="utf-8")
    old = "while (added != mine) added = ld_relaxed_gpu_u32(turn);"
    assert text.count(old) == 1

    def bits(seed: int, text: str) -> bytes:
        return backward(case, arrays, seed, ALL, "sm_90a", headers={header: text}, resident=3)["dq"].tobytes()

    want = bits(0, text)
    assert all(bits(seed, text) == want for seed in range(1, 8))
    assert any(bits(seed, text.replace(old, "added = mine;")) != want for seed in range(40))


_80 = "attention/bwd_sm80.cuh"
FAULTS = {
    "copies not waited for": (_80, "cp_async_wait_group<0>();\n        __syncthreads();  // this step", "// this step"),
    "a step overwritten too early": (_80, "__syncthreads();  // nobody reads this step any more", ""),
    "delta left out": (_80, "ds - (kByKey ? s_cols.delta[j] : s_rows.delta[warp_row + i])", "ds"),
    "no scale": (_80, "warp_row, r_dx, p.softmax_scale);", "warp_row, r_dx, 1.f);"),
    "heads of a group left out": (_80, "steps = w.steps * w.walks", "steps = w.steps"),
    "queries without keys": ("attention/bwd_dot.cuh", "lse == -infinity() ? infinity() : lse", "lse"),
    "the gradient of lse added": ("attention/bwd_dot.cuh", "sum -= p.dlse", "sum += p.dlse"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_faults_are_found(name: str) -> None:
    header, old, new = FAULTS[name]
    text = (CUDA / header).read_text(encoding="utf-8")
    assert text.count(old) == 1, f"{header} no longer holds {old!r} once"
    case = AttentionCase(150, 90, 1, 4, 2, 64, causal=True)
    arrays = inputs(case)
    want, found = truth(case, arrays), []
    for seed in range(6):
        try:
            found += faults(case, backward(case, arrays, seed, headers={header: text.replace(old, new)}), want)
        except emulate.EmulationError as error:
            found.append(str(error))
    assert found, f"{name}: no order of events shows it"


_ALL = "attention/bwd_all_sm80.cuh"
# The architecture whose tiles show them, and the head dim.
FAULTS_AT_ONCE = {
    "copies not waited for": ("sm_80", 64, "cp_async_wait_group<0>();\n      __syncthreads();", "__syncthreads();"),
    "a step read too late": ("sm_80", 64, "      __syncthreads();  // this step", "      // this step"),
    "P and dS not waited for": ("sm_86", 64, "      __syncthreads();  // P and dS are", "      // P and dS are"),
    "dS of warps that hold P not waited for": (
        "sm_100", 64, "      __syncthreads();  // P and dS are", "      // P and dS are",
    ),
    "a step overwritten too early": ("sm_86", 128, "__syncthreads();  // nobody reads this step any more", ";"),
    "delta left out": ("sm_80", 64, "(ds - s_cols.delta[first + j])", "ds"),
    "no scale": ("sm_80", 64, "r_dk, p.softmax_scale);", "r_dk, 1.f);"),
    "heads of a group left out": ("sm_80", 64, "steps = w.steps * w.walks", "steps = w.steps"),
}  # fmt: skip


@pytest.mark.parametrize("name", FAULTS_AT_ONCE)
def test_faults_at_once_are_found(name: str) -> None:
    arch, d, old, new = FAULTS_AT_ONCE[name]
    text = (CUDA / _ALL).read_text(encoding="utf-8")
    assert text.count(old) == 1, f"{_ALL} no longer holds {old!r} once"
    case = AttentionCase(190, 90, 1, 4, 2, d, causal=True)
    arrays = inputs(case)
    want = truth(case, arrays)
    for seed in range(12):
        try:
            changed = {_ALL: text.replace(old, new)}
            if faults(case, backward(case, arrays, seed, ALL, arch, changed, deterministic=False), want):
                return
        except emulate.EmulationError:
            return
    raise AssertionError(f"{name}: no order of events shows it")


@pytest.mark.parametrize(("lengths_q", "lengths_k"), [((0, 0), (5, 0)), ((5, 0), (0, 0))], ids=["queries", "keys"])
def test_packed_sequences_without(lengths_q: tuple[int, ...], lengths_k: tuple[int, ...]) -> None:
    """Rows of no sequence are there, and something is launched, so that new arrays are cleared in front of it."""
    case = VarlenCase(lengths_q, lengths_k, tail_q=3, tail_k=4)
    arrays = inputs(case)
    assert faults(case, backward(case, arrays, 0), truth(case, arrays)) == []
    steps, sizes = backward_steps(problem_of(case, arrays, ALL))
    assert len(steps) == 3 and all(sizes.values())
    for step in steps:
        kernel = [*of_task(step.task).values()][-1]
        assert kernel.grid(step.problem, kernel.choose(step.problem, "sm_80")) > 0


def test_queries_without_keys_give_zeros() -> None:
    case = AttentionCase(90, 30, 1, 2, 1, 64, causal=True)
    found = backward(case, inputs(case), 0)
    assert not found["dq"][:, :60].astype(np.float32).any()


@pytest.mark.parametrize("given", [False, True], ids=["new", "given"])
def test_the_operation_as_a_whole(given: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a call on a GPU would queue: each launch with the addresses that it finds by name."""
    case = AttentionCase(70, 90, 2, 4, 2, 64, causal=True, sinks="same", bias="h1k")
    arrays = {name: emulate.guarded(x, name) for name, x in inputs(case).items()}
    wanted = (*ALL, "dsinks", "dbias")
    results = {name: emulate.guarded(np.full_like(arrays[name[1:]], np.nan), name) for name in wanted}
    operation = registered(public.flash_attention_backward.__name__)
    its = arrays | ({name: results[name] for name in ALL} if given else {})
    problem = problem_of(case, its, wanted)
    made = wanted[3:] if given else wanted
    table = [0, *[its[name].ctypes.data if name in its else 0 for name in operation.arguments]]
    table += [results[name].ctypes.data for name in made]
    sources = loads(monkeypatch, "sm_80")
    gpu._loaded.clear()
    loaded = gpu.loaded_for(operation, problem, 0, None, table, made)
    gpu._loaded.clear()
    workspace = emulate.guarded(np.full(loaded.workspace // 4, np.nan, np.float32), "the workspace")
    table.append(workspace.ctypes.data)
    for (one, places), (source, _) in zip(loaded.sequence.launches, sources, strict=True):
        addresses = b"".join((table[i] + offset).to_bytes(8, "little") for i, offset in places)
        emulate.run(source, addresses + one.tail, one.grid, one.threads, one.smem)
    assert faults(case, results, truth(case, arrays)) == []
