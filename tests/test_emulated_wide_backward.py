"""Attention's backward for wide head dims on the emulated GPU: as test_emulated_backward.py does."""

from __future__ import annotations

import emulate
import numpy as np
import pytest
from emulated_backward import ALL, CUDA, backward, faults, inputs, problem_of, truth
from test_emulated_backward import PADDED, RAGGED

from flashmoe_cupy import reference
from flashmoe_cupy.plan.attention.backward_tiles import STAGES_PAIR_SM90
from flashmoe_cupy.plan.attention.backward_values import fused
from flashmoe_cupy.plan.attention.gradient import GradientProblem
from flashmoe_cupy.plan.kernels import KERNELS, only
from flashmoe_cupy.testing import AttentionCase, Case

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(emulate.missing() is not None, reason=str(emulate.missing())),
]

# The Hopper kernels of wide head dims: the same, and lengths that differ, values wider than keys, several blocks.
WIDE: tuple[tuple[Case, tuple[str, ...]], ...] = (
    (AttentionCase(70, 131, 1, 2, 2, 192), ALL),
    (AttentionCase(150, 203, 1, 4, 2, 256, causal=True), ALL),
    (AttentionCase(200, 170, 2, 2, 1, 192, 128, dtype="float16", window_size=(40, 7)), ALL),
    (AttentionCase(200, 33, 1, 2, 2, 200, causal=True, sinks="float32"), (*ALL, "dsinks")),
    (AttentionCase(33, 200, 1, 2, 2, 256, dtype="float16", window_size=(20, 0)), ALL),
    (AttentionCase(260, 64, 1, 4, 1, 136, 72), ALL),
    (AttentionCase(90, 90, 1, 2, 2, 40, 256, causal=True), ALL),
    (AttentionCase(1, 1, 2, 2, 2, 256), ALL),
    (AttentionCase(300, 70, 1, 2, 2, 256), ("dk", "dv")),
    (AttentionCase(70, 150, 1, 2, 1, 192, 128, window_size=(0, 30)), ("dq",)),
    (RAGGED._replace(head_dim=256, used_k=(30, 5, 0, 190), causal=True), ALL),
    (PADDED._replace(head_dim=192, head_dim_v=128), ALL),
)


@pytest.mark.parametrize("deterministic", [False, True], ids=["fused", "deterministic"])
@pytest.mark.parametrize(("case", "wanted"), WIDE, ids=[str(i) for i in range(len(WIDE))])
def test_wide_in_every_order(case: Case, wanted: tuple[str, ...], deterministic: bool) -> None:
    arrays = inputs(case)
    want = truth(case, arrays)
    if not deterministic and not fused(problem_of(case, arrays, wanted)):
        pytest.skip("such head dims and lengths have the deterministic kernels alone")
    for part in ("qkv",) if wanted == ALL and not deterministic else ("q", "kv"):
        names = {"q": "attention_bwd_sm90", "kv": "attention_bwd_wide_sm90", "qkv": "attention_bwd_wide_pair_sm90"}
        kernel = names[part]
        assert not KERNELS[kernel].why_not(GradientProblem(problem_of(case, arrays, wanted), part), "sm_90a")
    for seed in range(8):
        found = backward(case, arrays, seed, wanted, "sm_90a", deterministic=deterministic)
        assert faults(case, found, want) == [], seed


_BLOCKS = "attention/bwd_wide_blocks_sm90.cuh"
_WIDE = "attention/bwd_wide_sm90.cuh", _BLOCKS
WIDE_FAULTS = {
    "weights not waited for": ("barrier_sync(kWeightsStored + (step & 1), kConsumerThreads);", ""),
    "weights overwritten": ("if (step >= 2) barrier_sync(kWeightsUsed + (step & 1), kConsumerThreads);", ""),
    "q given back before its product": ("wgmma_wait_group<1>(r_dk);\n", "\n"),
    "dout given back before its product": ("wgmma_wait_group<1>(r_dv);\n", "\n"),
    "rows not waited for": ("mbarrier_wait_parity(s_base + Smem::kBarrierY, 0);", ""),
    "columns not waited for": ("mine.wait_full(at);\n    if", "if"),
    "the next head": ("return head + step / steps;", "return head;"),
}  # fmt: skip


def test_wide_keys_behind_the_end() -> None:
    """Where every score is so low that exp(-lse) is infinite, rows that are loaded as zeros must not count."""
    case = AttentionCase(70, 70, 1, 2, 2, 256)
    arrays = inputs(case)
    arrays["q"][...], arrays["k"][...] = 3.0, -3.0
    q, k, v = (arrays[name].astype(np.float64) for name in ("q", "k", "v"))
    out, lse = reference.flash_attention(q, k, v, return_lse=True)
    arrays |= {"out": out.astype(arrays["q"].dtype), "lse": lse.astype(np.float32)}
    found = backward(case, arrays, 0, ALL, "sm_90a", deterministic=False)
    assert all(np.isfinite(found[name].astype(np.float32)).all() for name in ALL)


def find_in_wide(
    name: str, headers: tuple[str, ...], old: str, new: str, wanted: tuple[str, ...] = ALL, head_dim: int = 256
) -> None:
    texts = {header: (CUDA / header).read_text(encoding="utf-8") for header in headers}
    assert sum(text.count(old) for text in texts.values()) == 1, f"{headers} no longer hold {old!r} once"
    texts = {header: text.replace(old, new) for header, text in texts.items()}
    case = AttentionCase(300, 100, 1, 4, 2, head_dim, causal=True)
    arrays = inputs(case)
    want = truth(case, arrays)
    for seed in range(16):
        try:
            if faults(case, backward(case, arrays, seed, wanted, "sm_90a", texts, deterministic=False), want):
                return
        except emulate.EmulationError:
            return
    raise AssertionError(f"{name}: no order of events shows it")


@pytest.mark.parametrize("name", WIDE_FAULTS)
def test_wide_faults_are_found(name: str) -> None:
    with only("attention_bwd_wide_sm90"):
        find_in_wide(name, _WIDE, *WIDE_FAULTS[name], wanted=("dk", "dv"), head_dim=192)


# By pairs of blocks: the last pair is half a one, or both blocks of it see other queries; many steps.
PAIRS = (
    AttentionCase(70, 131, 1, 2, 2, 256),
    AttentionCase(150, 203, 1, 4, 2, 256, causal=True),
    AttentionCase(200, 33, 1, 2, 2, 200, causal=True),
    AttentionCase(33, 260, 1, 2, 2, 256, dtype="float16", window_size=(20, 0)),
    AttentionCase(400, 170, 2, 2, 1, 256, 200, window_size=(40, 7)),
    AttentionCase(400, 131, 1, 2, 1, 200, 72, window_size=(40, 7)),
    AttentionCase(1, 1, 2, 2, 2, 256),
)
_PAIR = "attention/bwd_wide_pair_sm90.cuh", _BLOCKS
PAIR_FAULTS = {
    "scores of the other block not waited for": ("if (step >= 0) peers(s_base).wait_full(of_step(step));", ""),
    "its buffer not waited for": ("peers(s_base).wait_empty(of_step(step));", ""),
    "sent to its own place": ("const u32 s_full = peers(s_base).full(step & 1), other = cluster_ctarank() ^ 1;",
                              "const u32 s_full = peers(s_base).full(step & 1), other = cluster_ctarank();"),
    "sent before it is stored": ("barrier_sync(kScoresStored, 128);", ""),
    "keys of the other half": ("cluster_ctarank() * 2);", "0);"),
    "q given back to its own block alone": (
        "if (lane_id() < 2) mbarrier_arrive_cluster(mapa(ring.empty(at.stage), lane_id()));",
        "ring.release(at), ring.release(at);",
    ),
    "blocks that end alone": ("__syncwarp();\n      barrier_cluster_arrive(), barrier_cluster_wait();", ""),
    "steps of one block": ("w.row0 / (kBlocks * kRows) * (kBlocks * kRows)", "w.row0"),
    "dout given back before its product": ("wgmma_wait_group<1>(r_dv);\n", "\n"),
    "the rank of a block in dout": ("without_rank(col_y(s_base, at_v))", "col_y(s_base, at_v)"),
    "the rank of a block in q": ("without_rank(col_x(s_base, at))", "col_x(s_base, at)"),
    "dS given back before its product": ("wgmma_wait_group<0>(r_dq[0]);\n        if", "if"),
}  # fmt: skip


@pytest.mark.parametrize("shares", [False, True], ids=["alone", "shared"])
@pytest.mark.parametrize("case", PAIRS, ids=[str(i) for i in range(len(PAIRS))])
def test_pairs_in_every_order(case: Case, shares: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    arrays = inputs(case)
    want = truth(case, arrays)
    for dims, (stages, stages_v, _) in STAGES_PAIR_SM90.items():
        monkeypatch.setitem(STAGES_PAIR_SM90, dims, (stages, stages_v, shares))
    with only("attention_bwd_wide_pair_sm90"):
        for seed in range(8):
            found = backward(case, arrays, seed, ALL, "sm_90a", deterministic=False)
            assert faults(case, found, want) == [], seed


@pytest.mark.parametrize("name", PAIR_FAULTS)
def test_pair_faults_are_found(name: str) -> None:
    with only("attention_bwd_wide_pair_sm90"):
        find_in_wide(name, _PAIR, *PAIR_FAULTS[name])
