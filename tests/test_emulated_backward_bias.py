"""Attention's backward with a bias on the emulated Hopper GPU: right in every order of events, faults are found."""

from __future__ import annotations

from typing import Any

import emulate
import ml_dtypes
import numpy as np
import pytest
from emulated_backward import ALL, CUDA, Arrays, backward, faults, inputs, problem_of, truth

from flashmoe_cupy.jit.device import H100
from flashmoe_cupy.plan import kernels
from flashmoe_cupy.plan.attention.backward import backward_steps
from flashmoe_cupy.testing import AttentionCase

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(emulate.missing() is not None, reason=str(emulate.missing())),
]

WITH_BIAS = (*ALL, "dbias")
LOWEST = {"bfloat16": float(ml_dtypes.finfo(ml_dtypes.bfloat16).min), "float32": float(np.finfo(np.float32).min)}


class Hiding(AttentionCase):
    """Every third key, and all keys of every fifth query, have a bias that hides them."""

    by = -np.inf

    def random(self, seed: int = 0) -> dict[str, Any]:
        found = super().random(seed)
        found["bias"][..., ::3] = self.by
        if found["bias"].shape[-2] > 1:
            found["bias"][..., ::5, :] = self.by
        return found


class HidingByNumbers(Hiding):
    """The same by the lowest number that there is, as masks of models have it."""

    by = LOWEST["bfloat16"]


class Turned(AttentionCase):
    """Neighbours in memory are queries."""

    def random(self, seed: int = 0) -> dict[str, Any]:
        found = super().random(seed)
        found["bias"] = np.ascontiguousarray(found["bias"].swapaxes(-1, -2)).swapaxes(-1, -2)
        return found


# Each kind of bias and type of value, each compiled head dim and sizes below it, groups of heads, masks, sizes that are
# no multiple of a tile, rows that the copy engine can fetch (multiples of 8 or 4 keys) and such that it cannot.
# The first four have dbias beside dq.
CASES: tuple[AttentionCase, ...] = (
    AttentionCase(150, 136, 2, 4, 2, 40, bias="bhqk"),
    AttentionCase(200, 264, 1, 2, 1, 96, bias="bhqk", bias_dtype="float32"),
    AttentionCase(70, 200, 2, 2, 2, 128, bias="bhqk", dtype="float16", sinks="float32"),
    Hiding(130, 72, 2, 4, 2, 64, bias="bhqk", bias_dtype="float32"),
    AttentionCase(70, 136, 1, 2, 2, 64, bias="bhqk"),
    AttentionCase(150, 200, 2, 4, 2, 64, bias="hqk", causal=True),
    AttentionCase(200, 331, 2, 4, 2, 128, bias="b1qk", dtype="float16", window_size=(40, 7)),
    AttentionCase(200, 264, 1, 2, 1, 128, bias="bhqk", bias_dtype="float32", causal=True),
    AttentionCase(130, 200, 2, 2, 2, 96, 72, bias="qk", bias_dtype="float32", dtype="float16"),
    AttentionCase(70, 330, 2, 4, 2, 64, bias="b11k"),
    AttentionCase(300, 130, 2, 4, 2, 64, bias="bh1k", bias_dtype="float32", causal=True),
    AttentionCase(150, 200, 2, 2, 2, 128, bias="1k", dtype="float16"),
    AttentionCase(130, 203, 2, 2, 2, 80, 96, bias="bhq1"),
    AttentionCase(130, 72, 1, 4, 2, 40, bias="q1", bias_dtype="float32", softmax_scale=-0.1),
    AttentionCase(130, 204, 2, 4, 2, 32, bias="bh11"),
    AttentionCase(300, 33, 1, 2, 2, 64, bias="hqk", causal=True, sinks="float32"),
    AttentionCase(1, 1, 2, 2, 2, 128, bias="bhqk"),
    AttentionCase(1, 300, 2, 2, 2, 64, bias="bhqk", dtype="float16"),
    Hiding(70, 136, 2, 2, 2, 64, bias="b1qk"),
    Hiding(130, 140, 2, 2, 2, 128, bias="bhqk", bias_dtype="float32", causal=True),
    Hiding(70, 136, 2, 2, 2, 64, bias="b11k", sinks="float32"),
    HidingByNumbers(70, 136, 2, 2, 2, 64, bias="b1qk"),
    HidingByNumbers(70, 136, 2, 2, 2, 64, bias="b11k", bias_dtype="float32"),
    Turned(70, 136, 1, 2, 2, 64, bias="bhqk"),
    Turned(150, 203, 1, 2, 2, 128, bias="hqk", bias_dtype="float32"),
)


def kernels_of(case: AttentionCase, arrays: Arrays, wanted: tuple[str, ...]) -> list[str]:
    steps = kernels.prepared(backward_steps(problem_of(case, arrays, wanted))[0], "sm_90a", True, H100, ())[0]
    return [kernels.choose(step.task, step.problem, "sm_90a", True).name for step in steps]


@pytest.mark.parametrize("case", CASES, ids=[str(i) for i in range(len(CASES))])
def test_right_in_every_order(case: AttentionCase) -> None:
    arrays = inputs(case)
    want = truth(case, arrays)
    names = kernels_of(case, arrays, WITH_BIAS)
    assert not any("sm80" in name for name in names) and names.count("attention_bias_rows") <= 1
    first: Arrays = {}
    for sms in (1, 3):
        for seed in range(4):
            found = backward(case, arrays, seed, WITH_BIAS, "sm_90a", sms=sms)
            assert faults(case, found, want) == [], seed
            first = first or found
            assert all(found[name].tobytes() == first[name].tobytes() for name in WITH_BIAS), seed


@pytest.mark.parametrize("wanted", [("dq",), ("dk", "dv"), ("dbias",), ("dq", "dbias"), ("dk", "dbias")])
def test_some_gradients(wanted: tuple[str, ...]) -> None:
    """The first launch that reads the bias finds it in rows that can be fetched, whichever it is."""
    case = AttentionCase(70, 131, 1, 2, 1, 64, bias="bhqk")
    arrays = inputs(case)
    assert faults(case, backward(case, arrays, 4, wanted, "sm_90a"), truth(case, arrays)) == []


@pytest.mark.parametrize("bias", ["bhqk", "b11k"])
def test_a_bias_at_an_odd_address(bias: str) -> None:
    case = AttentionCase(70, 136, 1, 2, 1, 64, bias=bias)
    arrays = inputs(case)
    found = backward(case, arrays, 5, WITH_BIAS, "sm_90a", odd=("bias",))
    assert faults(case, found, truth(case, arrays)) == []


_TILES, _90, _BLOCKS = (f"attention/{name}.cuh" for name in ("bwd_bias_tiles_sm90", "bwd_sm90", "bwd_blocks_sm90"))
_DBIAS = "attention/bwd_bias_sm90.cuh"
# What is taken out of a header, and whose gradient shows it.
FAULTS = {
    "a tile read as it lies": (("dk", "dv"), _TILES, "ldmatrix_x4_trans(r,", "ldmatrix_x4(r,"),
    "the other rows of a swizzle": (("dk", "dv"), _TILES, "((chunk ^ (query & 7)) << 4)", "(chunk << 4)"),
    "the first consumer's keys for all": (
        ("dk", "dv"), _90, " + consumer * Bias::kConsumerBytes", "",
    ),
    "bytes of the bias not waited for": (("dq",), _BLOCKS, "TileColX::kBytes + Bias::kLoaded", "TileColX::kBytes"),
    "the bias of the first head for all that share keys": (
        ("dk", "dv"), _BLOCKS, "kByKey ? w.row0 : col, place.head, w.batch", "kByKey ? w.row0 : col, w.head, w.batch",
    ),
    "the bias masked with the scores": (
        ("dq",), _90, "if (w.band.template cuts<64, kCols>(tile_row, col)) mask_scores(r_s[0], w.band, row, col);\n"
        "        each_score(r_s, [&](float& s, int i, int, int, int j) {\n          const float its",
        "each_score(r_s, [&](float& s, int i, int, int, int j) {\n          const float its",
    ),
    "scores not waited for": (("dbias",), _DBIAS, "wgmma_wait_group<1>(r_s[0]);", ""),
    "a slot given back before its product": (
        ("dbias",), _DBIAS, "    rings.bias.wait_full(bias);\n    wgmma_wait_group<1>(r_s[0]);\n"
        "    rings.slots.release(scores);\n", "    rings.slots.release(scores);\n    rings.bias.wait_full(bias);\n"
        "    wgmma_wait_group<1>(r_s[0]);\n",
    ),
    "dP given back before its product": (
        ("dbias",), _DBIAS, "    wgmma_wait_group<0>(r_dp[0]);\n    rings.slots.release(at.before());\n",
        "    rings.slots.release(at.before());\n    wgmma_wait_group<0>(r_dp[0]);\n",
    ),
    "the bias not waited for": (("dbias",), _DBIAS, "    rings.bias.wait_full(bias);\n", ""),
    "the bias loaded over the one in use": (("dbias",), _DBIAS, "          rings.bias.wait_empty(bias);\n", ""),
    "the bias given back twice": (
        ("dbias",), _DBIAS, "        rings.bias.release(bias);\n",
        "        rings.bias.release(bias), rings.bias.release(bias);\n",
    ),
    "entries left out": (
        ("dbias",), _DBIAS, "int batch = w.batch.begin; batch < w.batch.end;",
        "int batch = w.batch.begin; batch < w.batch.begin + 1;",
    ),
    "delta left out": (("dbias",), _DBIAS, "r_dp[0][n][e] - delta[e / 2]", "r_dp[0][n][e]"),
}  # fmt: skip


@pytest.mark.parametrize("name", FAULTS)
def test_faults_are_found(name: str) -> None:
    wanted, header, old, new = FAULTS[name]
    batch = 2 if wanted == ("dbias",) else 1
    case = AttentionCase(300, 392, batch, 4, 2, 128, bias="hqk", causal=True)
    assert shows(case, wanted, header, old, new), f"{name}: no order of events shows it"


def shows(case: AttentionCase, wanted: tuple[str, ...], header: str, old: str, new: str) -> bool:
    """Whether some order of events tells a header that is changed so from the true one."""
    text = (CUDA / header).read_text(encoding="utf-8")
    assert text.count(old) == 1, f"{header} no longer holds {old!r} once"
    changed = {header: text.replace(old, new)}
    arrays = inputs(case)
    want = truth(case, arrays)
    for seed in range(16):
        try:
            if faults(case, backward(case, arrays, seed, wanted, "sm_90a", headers=changed), want):
                return True
        except emulate.EmulationError:
            return True
    return False


STORE_FAULTS = {
    "dbias stored over what other warps' rows have": (_TILES, "s_tile + row * 128 + panel", "s_tile + panel"),
    "dbias fetched before it is there": (_TILES, "    fence_proxy_async();\n    __syncwarp();\n", ""),
    "a stage given back before dbias is read": (
        _90, "      if (p.dbias != nullptr && lane_id() == 0) bulk_wait_group_read<0>();\n", "      (void)p;\n",
    ),
    "dbias of the first head": (_TILES, "query, head, batch);\n    bulk_commit", "query, 0, batch);\n    bulk_commit"),
}  # fmt: skip


@pytest.mark.parametrize("name", STORE_FAULTS)
@pytest.mark.parametrize("dtype", ["same", "float32"])
def test_faults_of_what_dq_stores_are_found(name: str, dtype: str) -> None:
    case = AttentionCase(200, 392, 1, 2, 2, 64, bias="bhqk", bias_dtype=dtype)
    assert shows(case, ("dq", "dbias"), *STORE_FAULTS[name]), f"{name}: no order of events shows it"


@pytest.mark.parametrize("bias", ["1k", "11"])
def test_sums_of_all_queries_are_met(bias: str) -> None:
    """Sums of warps go through shared memory, where they are read when all are there."""
    case = AttentionCase(150, 200, 1, 2, 2, 64, bias=bias)
    assert shows(case, ("dbias",), _DBIAS, "    barrier_sync(kSumsStored, 128 * kConsumers);\n", "")


def test_sums_are_read_before_the_next_ones_come() -> None:
    case = AttentionCase(100, 600, 1, 1, 1, 64, bias="1k")  # tiles of one step, so that a warp may be one tile ahead
    old = "    barrier_sync(kSumsStored, 128 * kConsumers);  // the next tile's sums may be stored\n"
    assert shows(case, ("dbias",), _DBIAS, old, "")
