"""The attention kernels on the emulated GPU: right in every order of events, and faults put into them are found."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import emulate
import ml_dtypes
import numpy as np
import pytest
from emulated_attention import SM80, SM90, attention, choose, faults, outcomes

from flashmoe_cupy.plan.attention.tiles import Config, Sm80Config, Sm90Config
from flashmoe_cupy.testing import AttentionCase, Case, VarlenCase

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(emulate.missing() is not None, reason=str(emulate.missing())),
]

CUDA = Path(__file__).resolve().parent.parent / "cuda_src"
SEEDS = range(10)
RAGGED = VarlenCase((70, 0, 1, 130), (33, 5, 90, 201), tail_q=3, tail_k=2)
# Batch entries with padding: in front, behind, on both sides, all of it, on either side.
PADDED = AttentionCase(
    130, 201, 5, used_q=(130, 129, 0, 70, 130), used_k=(201, 9, 150, 61, 201), left_q=(0, 30, 0, 3, 129),
    left_k=(0, 3, 40, 61, 140),
)  # fmt: skip

CASES: tuple[tuple[str, Case], ...] = (
    (SM80, AttentionCase(150, 203, 1, 4, 2, 64, causal=True)),
    (SM80, AttentionCase(70, 131, 2, 2, 1, 128, dtype="float16", window_size=(40, 7))),
    (SM80, AttentionCase(33, 65, 1, 2, 2, 40, dtype="float32", softcap=15.0, sinks="float32")),
    (SM80, AttentionCase(65, 70, 1, 2, 2, 64, bias="h1k", bias_dtype="bool", alibi="bh")),
    (SM80, RAGGED._replace(used_k=(30, 5, 0, 190), causal=True)),
    (SM80, PADDED._replace(causal=True)),
    (SM80, PADDED._replace(bias="b11k", used_q=(), left_q=(), window_size=(70, 3), dtype="float16")),
    # Biases of each type by pairs and one by one, and those of sequences that begin anywhere.
    (SM80, AttentionCase(70, 200, 1, 2, 2, 64, bias="bhqk")),
    (SM80, AttentionCase(70, 201, 1, 2, 2, 128, bias="hqk", dtype="float16", causal=True)),
    (SM80, AttentionCase(70, 200, 1, 2, 2, 64, bias="1hqk", bias_dtype="float32", alibi="h")),
    (SM80, AttentionCase(70, 200, 1, 2, 2, 64, bias="qk", bias_dtype="bool", softcap=9.0)),
    (SM80, AttentionCase(70, 130, 2, 2, 2, 64, bias="b1q1", dtype="float32")),
    (SM80, PADDED._replace(bias="bhqk", bias_dtype="float32")),
    (SM90, AttentionCase(150, 203, 1, 4, 2, 64, causal=True)),
    (SM90, AttentionCase(400, 300, 1, 2, 1, 128, causal=True)),
    (SM90, AttentionCase(131, 259, 2, 2, 1, 128, dtype="float16", window_size=(100, 7))),
    (SM90, AttentionCase(190, 130, 1, 2, 2, 64, softcap=15.0)),
    (SM90, AttentionCase(131, 300, 1, 2, 2, 128, softcap=50.0, softmax_scale=0.3, sinks="float32")),
    (SM90, AttentionCase(140, 200, 1, 2, 2, 64, softcap=50.0, softmax_scale=3.0, window_size=(60, 0))),
    (SM90, AttentionCase(131, 200, 1, 2, 2, 64, softcap=90.0, causal=True)),
    (SM90, AttentionCase(131, 200, 1, 2, 2, 64, softcap=30.0, dtype="float16")),
    (SM90, AttentionCase(130, 130, 1, 2, 2, 192, 128, sinks="same")),
    (SM90, AttentionCase(130, 100, 1, 2, 2, 64, 512, bias="qk")),
    (SM90, RAGGED._replace(head_dim=128, causal=True, heads_k=1)),
    # Heads packed into tiles: 2, 4 or 8 of a group; part of a 16-row store; a head each for sinks and lse.
    (SM90, AttentionCase(37, 203, 2, 6, 1, 64, causal=True, sinks="float32")),
    (SM90, AttentionCase(19, 150, 1, 24, 2, 128, dtype="float16", window_size=(30, 4))),
    (SM90, AttentionCase(1, 300, 2, 16, 2, 128, sinks="same")),
    (SM90, AttentionCase(9, 140, 1, 16, 1, 64, 512, softcap=20.0, causal=True)),
    (SM90, RAGGED._replace(heads_q=8, heads_k=1, head_dim=64, causal=True, sinks="float32")),
    (SM90, RAGGED._replace(heads_q=32, heads_k=1, used_q=(70, 0, 1, 99), used_k=(30, 5, 0, 190), head_dim=72)),
    (SM90, RAGGED._replace(used_q=(70, 0, 1, 99), used_k=(30, 5, 0, 190), head_dim=72, dtype="float16")),
    (SM90, PADDED._replace(causal=True, head_dim=128, sinks="float32")),
    (SM90, PADDED._replace(left_q=(), left_k=(), heads_q=8, alibi="bh")),
    (SM90, PADDED._replace(used_q=(), used_k=(), window_size=(60, 9), head_dim=72, dtype="float16")),
    (SM90, PADDED._replace(left_q=(), used_q=(), bias="bhqk", bias_dtype="bool")),
    # Keys that begin where the copy engine cannot read a bias from.
    (SM90, PADDED._replace(bias="b1qk", causal=True)),
    (SM90, PADDED._replace(bias="hqk", bias_dtype="float32", head_dim=128, heads_q=4, dtype="float16")),
    (SM90, PADDED._replace(bias="b11k", used_q=(), left_q=(), seqlen_q=1, heads_q=8, window_size=(40, 3))),
    (SM90, PADDED._replace(seqlen_q=9, heads_q=16, heads_k=1, causal=True, used_q=(), left_q=(3, 0, 9, 8, 1))),
    # The first queries see no key, and have no tiles: with sinks, biases, padding and packed sequences.
    (SM90, AttentionCase(700, 33, 2, 2, 2, 64, causal=True)),
    (SM90, AttentionCase(700, 33, 2, 4, 1, 128, causal=True, sinks="float32")),
    (SM90, AttentionCase(300, 150, 1, 2, 2, 64, causal=True, bias="bhqk")),
    (SM90, AttentionCase(300, 150, 1, 2, 2, 64, window_size=(30, 5), bias="bhqk", bias_dtype="bool")),
    (SM90, PADDED._replace(used_k=(33, 9, 150, 61, 150), heads_q=4, causal=True, sinks="float32", bias="b11k")),
    (SM90, VarlenCase((300, 0, 70), (33, 10, 80), (290, 0, 70), tail_q=4, causal=True, sinks="float32", heads_q=4)),
    (SM90, VarlenCase((300, 0, 70, 5), (33, 10, 80, 0), tail_q=4, window_size=(9, 3))),
    # Four consumers that scale queries and clear the ends of sequences: a named barrier for each.
    (SM90, VarlenCase((60, 256, 256, 250), (70, 201, 9, 250), (), (), 0, 2, 1, 1, 64, causal=True, softcap=30.0)),
)

# Rows that see one to eight keys, which a rounded weight would show in. A window's keys may lie in two tiles.
FEW_KEYS: tuple[Case, ...] = (
    VarlenCase((511,), (1,), heads_q=1, heads_k=1, head_dim_v=256, softcap=15.0),
    AttentionCase(150, 150, 1, 2, 2, 64, softcap=15.0, window_size=(0, 0)),
    AttentionCase(150, 150, 1, 2, 2, 64, softcap=50.0, window_size=(4, 3), softmax_scale=2.0),
    AttentionCase(8, 8, 2, 2, 2, 64, softcap=50.0, causal=True, softmax_scale=1.0),
    AttentionCase(3, 5, 2, 16, 2, 64, softcap=30.0, causal=True),
    AttentionCase(150, 150, 1, 2, 2, 64, dtype="float16", softcap=30.0, window_size=(0, 0)),
    AttentionCase(150, 150, 1, 2, 2, 64, window_size=(1, 0)),
)

# Tiles of keys beside which there is no room to stage results: quads store from registers.
UNSTAGED: tuple[tuple[Case, Config], ...] = (
    (AttentionCase(150, 203, 1, 4, 2, 256, causal=True), Sm90Config("bf16", 256, 256, 128, 80, 2, "PlainScores")),
    (
        AttentionCase(37, 203, 2, 6, 1, 232, causal=True, sinks="float32"),
        Sm90Config("bf16", 256, 256, 128, 80, 2, "PlainScores"),
    ),
    (
        AttentionCase(9, 140, 1, 16, 1, 256, 512, dtype="float16"),
        Sm90Config("fp16", 256, 256, 128, 80, 2, "PlainScores"),
    ),
    (RAGGED._replace(head_dim=256, causal=True), Sm90Config("bf16", 256, 256, 128, 80, 2, "PlainScores")),
    (AttentionCase(150, 300, 1, 2, 2, 192, 128), Sm90Config("bf16", 192, 128, 128, 128, 2, "PlainScores")),
    (AttentionCase(150, 300, 1, 2, 2, 128, 72), Sm90Config("bf16", 128, 128, 128, 144, 2, "PlainScores")),
)

# Tiles of 192 rows that lack some: warpgroups without rows let them pass, in the middle, at both ends, one after the
# other, and where rows of keys are skipped as well.
_192 = Sm90Config("bf16", 64, 64, 192, 128, 3, "PlainScores")
PASSED: tuple[tuple[Case, Config], ...] = (
    (AttentionCase(448, 500, 1, 5, 5, 64), _192),
    (AttentionCase(60, 700, 1, 7, 7, 64, sinks="float32"), _192),
    (AttentionCase(325, 700, 2, 2, 2, 64, causal=True), _192),
    (AttentionCase(250, 700, 1, 4, 4, 64, window_size=(40, 7)), _192),
    (AttentionCase(70, 300, 2, 8, 2, 48, causal=True), _192),
    (RAGGED._replace(head_dim=64, causal=True), _192),
    (VarlenCase((3, 192, 60, 200, 100, 400), (70, 201, 9, 250, 500, 3), (), (), 0, 2, 2, 2, 64), _192),
    (PADDED._replace(causal=True, seqlen_q=140), _192),
)
PASSED_FAULTS = (
    ("rings.k.skip(at.k, 1, take_turn);", "rings.k.skip(at.k, 1, [] {});"),
    ("      rings.v.skip(at.v, 1, [] {});\n", ""),
    ("    mbarrier_arrive(rings.work.empty(at.works.stage));\n", ""),
    ("held.done.advance()", "held.pending = false"),
)

# A problem whose tiles are small, so that every buffer is used several times.
SMALL = AttentionCase(150, 300, 1, 2, 2, 64)
TILES: dict[str, Config] = {
    SM80: Sm80Config("bf16", 64, 64, 64, 64, 4, "PlainScores"),
    SM90: Sm90Config("bf16", 64, 64, 128, 64, 2, "PlainScores"),
}
_80, _90, _OUT = "attention/fwd_sm80.cuh", "attention/fwd_sm90.cuh", "tile/epilogue.cuh"
_KEYS = "attention/keys.cuh"
_WRONG = r"^(relative error|lse error)"


class Fault(NamedTuple):
    """A text of a header and what stands there instead; what some seed then has to say."""

    header: str
    old: str
    new: str
    found: str = _WRONG

    @property
    def kernel(self) -> str:
        return SM80 if self.header in (_80, "tile/smem.cuh") else SM90

    def headers(self) -> Mapping[str, str]:
        text = (CUDA / self.header).read_text(encoding="utf-8")
        assert text.count(self.old) == 1, f"{self.header} no longer holds {self.old!r} once"
        return {self.header: text.replace(self.old, self.new)}


FAULTS = {
    "copies not waited for": Fault(
        _80, "cp_async_wait_group<0>();\n      __syncthreads();  // K(n)", "__syncthreads();  //",
    ),
    "K overwritten too early": Fault(_80, "__syncthreads();  // V(n)", "//"),
    "V overwritten too early": Fault(_80, "__syncthreads();  // K(n)", "//"),
    "a row too many read": Fault(
        "tile/smem.cuh", "first_row + pass * kPass < rows", "first_row + pass * kPass <= rows",
        r"a read from .* behind the end of [qkv]",
    ),
    "a row too many written": Fault(
        "tile/smem.cuh", "if (row >= rows || chunk", "if (row > rows || chunk",
        r"a write to .*0 bytes behind the end of out",
    ),
    "K given back before its product": Fault(
        _90, "wgmma_wait_group<1>(r_s[0]);\n        add_bias(p, s_works[here], s_base, consumer, at, r_s, tile_row);\n"
        "        rings.k.release(at.k);",
        "rings.k.release(at.k);\n        wgmma_wait_group<1>(r_s[0]);",
    ),
    "V given back before its product": Fault(
        _90, "wgmma_wait_group<0>(r_out[0]);\n        rings.v.release(at.v);",
        "rings.v.release(at.v);\n        wgmma_wait_group<0>(r_out[0]);",
    ),
    "V not waited for": Fault(_90, "if (!v_here) rings.v.wait_full(at.v);", "", "more than 1 arrivals|relative error"),
    "a product not waited for": Fault(_90, "wgmma_wait_group<0>(r_out[0]);\n        rings", "rings"),
    "the wrong parity": Fault("tile/pipeline.cuh", "at.parity ^ 1", "at.parity", r"deadlock(.|\n)*warp 1: mbarrier"),
    "too few arrivals": Fault(_90, "kUsers = 4 * kConsumers;", "kUsers = 4 * kConsumers - 1;"),
    "too few bytes": Fault(
        _90, "(at.stage), Tile::kBytes + With", "(at.stage), Tile::kBytes - 128 + With", "128 bytes more than announced"
    ),
    "too many bytes": Fault(
        _90, "(at.stage), Tile::kBytes + With", "(at.stage), Tile::kBytes + 128 + With", r"deadlock(.|\n)*and 128 bytes"
    ),
    "the wrong panel": Fault(
        _KEYS, "Tile::kPanelBytes, p.q_map", "Tile::kPanelBytes + 64, p.q_map", "no multiple of 128"
    ),
    "no turn to begin with": Fault(
        _90, "if (consumer == 0) pass_turn(kConsumers - 1);", "",
        r"deadlock(.|\n)*barrier 1, where 128 of 256",
    ),
    "barriers not fenced": Fault(_90, "fence_mbarrier_init();", "", "without fence.mbarrier_init"),
    "output not fenced": Fault(_OUT, "fence_proxy_async();", "", "without a fence.proxy.async"),
    "output stored before all have written": Fault(
        _OUT, "fence_proxy_async();\n      __syncwarp();", "fence_proxy_async();", "without a fence.proxy.async"
    ),
    "output overwritten before it is read": Fault(_OUT, "if (lane == 0) bulk_wait_group_read<0>();", ""),
    "output unread at the end": Fault(
        _90, "if (Smem::kStaged && lane_id() == 0) bulk_wait_group_read<0>();", "",
        "before a bulk store of thread .* has read",
    ),
    "a record announced before all have written": Fault(
        _90, "rings.work.init(32, 1 + 128", "rings.work.init(1, 1 + 128",
        "issue different products|relative error|deadlock",
    ),
}  # fmt: skip


# A bias of each kind: by the copy engine or written again for it, one row for all queries, packed heads; a mask as
# words and lists, of tiles of 64 and of 128 keys.
BIASES: tuple[Case, ...] = (
    AttentionCase(130, 200, 1, 2, 2, 64, bias="bhqk"),
    AttentionCase(130, 201, 1, 2, 2, 64, bias="bhqk"),
    AttentionCase(150, 136, 2, 2, 1, 64, bias="hqk", bias_dtype="float32", causal=True),
    AttentionCase(20, 300, 2, 16, 2, 128, dtype="float16", bias="bhqk"),
    AttentionCase(20, 300, 2, 16, 2, 128, bias="h1k", bias_dtype="float32"),
    AttentionCase(140, 140, 1, 2, 2, 256, bias="qk", softcap=5.0, sinks="float32"),
    AttentionCase(140, 140, 1, 2, 2, 192, 128, bias="h11", alibi="h"),
    AttentionCase(140, 140, 1, 2, 2, 192, bias="qk", bias_dtype="float32", window_size=(100, 20)),
    AttentionCase(130, 200, 1, 2, 2, 64, bias="bhqk", bias_dtype="bool"),
    AttentionCase(150, 300, 2, 4, 2, 64, bias="b11k", bias_dtype="bool", causal=True),
    AttentionCase(150, 300, 2, 4, 1, 128, bias="1hqk", bias_dtype="bool", softcap=9.0, alibi="bh"),
    AttentionCase(20, 300, 2, 16, 2, 128, bias="b1qk", bias_dtype="bool"),
    AttentionCase(300, 300, 1, 2, 2, 256, bias="qk", bias_dtype="bool", window_size=(100, 20)),
    AttentionCase(140, 137, 1, 2, 2, 64, 512, bias="q1", bias_dtype="bool"),
    AttentionCase(190, 300, 1, 2, 1, 64, bias="1hqk", bias_dtype="bool", causal=True),
    AttentionCase(400, 450, 1, 2, 1, 64, bias="b1qk", bias_dtype="bool", causal=True, dtype="float16"),
    PADDED._replace(bias="bhqk"),
    PADDED._replace(bias="b1qk", bias_dtype="float32", heads_q=4, head_dim=128, causal=True),
    PADDED._replace(bias="11qk", bias_dtype="bool", causal=True, heads_q=4),
    PADDED._replace(bias="bhqk", bias_dtype="bool", head_dim=72),
    # A value for each key alone.
    AttentionCase(300, 330, 2, 4, 2, 64, bias="b11k", causal=True),
    AttentionCase(150, 201, 1, 2, 2, 128, dtype="float16", bias="h1k", bias_dtype="float32", sinks="float32"),
    PADDED._replace(bias="b11k", heads_q=4, causal=True),
    PADDED._replace(bias="1h1k", bias_dtype="float32", head_dim=128, heads_k=2, window_size=(70, 9)),
    AttentionCase(19, 300, 2, 16, 2, 64, bias="1k", bias_dtype="float32", causal=True),
)
# Faults in what a bias needs, and the case that shows each.
BIAS_FAULTS: dict[str, tuple[int, Fault]] = {
    "bytes of the bias not announced": (
        0, Fault(_90, "Tile::kBytes + With::kLoaded", "Tile::kBytes", "bytes more than announced")
    ),
    "the bias given back before it is read": (
        3,
        Fault(
            _90, "add_bias(p, s_works[here], s_base, consumer, at, r_s, tile_row);\n        rings.k.release(at.k);",
            "const auto before = at;\n        rings.k.release(at.k);\n"
            "        add_bias(p, s_works[here], s_base, consumer, before, r_s, tile_row);",
        ),
    ),
    "the wrong swizzle": (0, Fault("attention/bias_sm90.cuh", "^ (lane >> 4)", "")),
    "the wrong swizzle of 32 bits": (2, Fault("attention/bias_sm90.cuh", "(lane >> 1 & 1)", "(lane & 1)")),
    "the wrong pair of a bias for each key": (
        20, Fault("attention/bias_sm90.cuh", "bias[e % 2]", "bias[e / 2]")
    ),
    "padding before the first key of such a bias": (22, Fault(_90, "hide_keys(r_s[0], before)", "")),
    "rows without their padding": (1, Fault("attention/bias_rows.cuh", "row * p.row_chunks + chunk", "row + chunk")),
    "the wrong half of a word": (
        8, Fault("attention/scores_sm90.cuh", "words.of[i] >> 16;", "words.of[i] >> 15;")
    ),
    "the wrong pair of a word": (8, Fault("attention/mask_words.cuh", "0x7362", "0x7263")),
    "the list of another tile": (
        15, Fault("attention/key_tiles.cuh", "* p.m_blocks + m_block)", "* p.m_blocks + 0)", "relative|memory|deadlock")
    ),
    "the mask of rows that do not count": (
        18, Fault("attention/mask_words.cuh", "found.q_row * p.bias_stride_q +", "0 +")
    ),
}  # fmt: skip


@pytest.mark.parametrize(("case", "config"), UNSTAGED, ids=str)
def test_results_from_registers(case: Case, config: Config) -> None:
    found = {seed: faults(case, SM90, *attention(case, SM90, seed, config)) for seed in range(4)}
    assert not any(found.values()), found


@pytest.mark.parametrize(("case", "config"), PASSED, ids=str)
def test_tiles_without_rows_for_a_warpgroup(case: Case, config: Config) -> None:
    for resident in (1, 2):
        found = {seed: faults(case, SM90, *attention(case, SM90, seed, config, resident=resident)) for seed in range(6)}
        assert not any(found.values()), found


@pytest.mark.parametrize(("old", "new"), PASSED_FAULTS)
def test_faults_of_passing_are_found(old: str, new: str) -> None:
    case, config = PASSED[0]
    headers = Fault("attention/walk_sm90.cuh", old, new).headers()
    assert any(found for _, found in outcomes(case, SM90, range(8), config, headers))


@pytest.mark.parametrize("case", BIASES, ids=str)
def test_biases_in_every_order(case: Case) -> None:
    found = {seed: faults(case, SM90, *attention(case, SM90, seed, resident=1 + seed % 2)) for seed in range(6)}
    assert not any(found.values()), found


@pytest.mark.parametrize("name", BIAS_FAULTS)
def test_faults_of_a_bias_are_found(name: str) -> None:
    index, fault = BIAS_FAULTS[name]
    case, others = BIASES[index], []
    for seed, found in outcomes(case, SM90, range(16), choose(case, SM90), fault.headers()):
        if re.search(fault.found, found):
            return
        others.append((seed, found))
    pytest.fail(f"nobody noticed: {others}")


@pytest.mark.parametrize("kind", ["same", "float32"])
@pytest.mark.parametrize("bias", ["1hqk", "b11k"])
def test_biases_near_the_end_of_the_range(bias: str, kind: str) -> None:
    """As transformers' additive masks are: keys, rows and whole tiles of the lowest number, beside others."""
    case = AttentionCase(150, 330, 2, 2, 2, 64, bias=bias, bias_dtype=kind)
    arrays = case.random()
    lowest = float(ml_dtypes.finfo(arrays["bias"].dtype).min)
    arrays["bias"][..., 100:] = lowest
    arrays["bias"][..., 300] = 2.0
    arrays["bias"][-1] = lowest if bias == "b11k" else arrays["bias"][-1]
    arrays["bias"][..., -1, :] = lowest if bias == "1hqk" else arrays["bias"][..., -1, :]
    assert faults(case, SM90, *attention(case, SM90, 1, given=arrays), arrays) == []
    wrong = Fault("math/softmax.cuh", "near &= fabsf(top(i)) < Exponent::kFar", "")
    assert faults(case, SM90, *attention(case, SM90, 1, headers=wrong.headers(), given=arrays), arrays) != []


def test_a_query_that_sees_one_key_is_not_left_out() -> None:
    case = AttentionCase(300, 150, 1, 2, 2, 64, causal=True)
    fault = Fault(_KEYS, "s.seqlen_k - p.window_right, 0)", "s.seqlen_k - p.window_right + 1, 0)")
    assert all(found for _, found in outcomes(case, SM90, range(2), choose(case, SM90), fault.headers()))


def test_a_mask_of_hidden_and_whole_tiles() -> None:
    """Tiles that the mask hides are not read: NaN there never counts. Rows that see nothing are 0."""
    case = AttentionCase(300, 700, 1, 2, 2, 64, bias="11qk", bias_dtype="bool")
    arrays = case.random()
    mask = np.zeros((300, 700), bool)
    mask[:128, 128:256], mask[:128, 520:600], mask[200:, 384:512] = True, True, True
    mask[70, 200] = False  # the tile is whole for the first consumer, not for the second
    arrays["bias"] = mask[None, None]
    arrays["k"][:, :128], arrays["v"][:, 256:384] = np.nan, np.nan
    clean = {name: np.nan_to_num(x) if name in "qkv" else x for name, x in arrays.items()}
    for seed in range(4):
        out, lse = attention(case, SM90, seed, given=arrays)
        assert faults(case, SM90, out, lse, clean) == []
        assert (out[0, 128:200] == 0).all() and np.isneginf(lse[0, :, 128:200]).all()
    wrong = Fault("attention/key_tiles.cuh", ">> (kTileBits + consumer)", ">> (kTileBits + 1 - consumer)")
    assert faults(case, SM90, *attention(case, SM90, 1, headers=wrong.headers(), given=arrays), clean) != []


@pytest.mark.parametrize(("kernel", "case"), CASES, ids=str)
def test_right_in_every_order(kernel: str, case: Case) -> None:
    found = {seed: faults(case, kernel, *attention(case, kernel, seed, resident=1 + seed % 2)) for seed in SEEDS}
    assert not any(found.values()), found


@pytest.mark.parametrize("case", FEW_KEYS, ids=str)
def test_few_keys_keep_the_rule(case: Case) -> None:
    """A row that sees one key has that key's value, to the bit; with more, FlashAttention's rule holds."""
    torch_truth = pytest.importorskip("test_gpu_truth")
    out, lse = attention(case, SM90, 1)
    arrays = {name: torch_truth.from_numpy(x) for name, x in case.random().items()}
    known = torch_truth.truth(case, arrays)
    out, lse = torch_truth.from_numpy(out), torch_truth.from_numpy(lse)
    if torch_truth.one_key(case):
        assert torch_truth.same_bits(out, known.out.to(out.dtype))
    assert [v.text for v in torch_truth.verdicts(case, out, known.out, known.low, lse, known.lse) if not v] == []


@pytest.mark.parametrize("sink", [-70.0, -200.0, 3.0, 30.0])
@pytest.mark.parametrize("softcap", [15.0, 50.0])
def test_a_sink_alone_is_the_lse_of_a_row_without_keys(softcap: float, sink: float) -> None:
    case = AttentionCase(40, 9, 1, 2, 2, 64, softcap=softcap, causal=True, sinks="float32")
    arrays = case.random() | {"sinks": np.array([sink, -np.inf], np.float32)}
    out, lse = attention(case, SM90, 1, given=arrays)
    assert faults(case, SM90, out, lse, arrays) == []
    assert (lse[0, 0, :31] == np.float32(sink)).all() and np.isneginf(lse[0, 1, :31]).all()


# Another answer to 'where do the keys lie?': in pages of one tile, which the array holds in reversed order.
PAGES = """
  struct ReversedPages : RowKeys {
    template <class Tile, class Work>
    FM_DEVICE static void load_keys(const AttentionFwdSm90Params& p, const Work& w, const TensorMap& map, u32 s_tile,
                                    u32 s_full, int col, int n) {
      RowKeys::load_keys<Tile>(p, w, map, s_tile, s_full, col, w.band.cols / Tile::kRows - 1 - n);
    }
  };
  using Keys = ReversedPages;"""


def test_keys_in_pages_need_a_type_and_no_change_of_the_kernel() -> None:
    config = TILES[SM90]
    case = AttentionCase(150, 4 * config.block_n, 1, 2, 2, 64, causal=True)
    text = (CUDA / _90).read_text(encoding="utf-8")
    assert text.count("  using Keys = RowKeys;") == 1
    headers = {_90: text.replace("  using Keys = RowKeys;", PAGES)}
    arrays = case.random()
    pages = {name: arrays[name].reshape(1, 4, config.block_n, 2, 64)[:, ::-1].reshape(1, -1, 2, 64) for name in "kv"}
    for seed in range(3):
        out, lse = attention(case, SM90, seed, config, headers, given=arrays | pages)
        assert faults(case, SM90, out, lse, arrays) == []
        assert faults(case, SM90, *attention(case, SM90, seed, config, given=arrays | pages), arrays) != []


@pytest.mark.parametrize("kernel", TILES)
def test_nothing_is_found_in_the_kernels_themselves(kernel: str) -> None:
    assert not any(found for _, found in outcomes(SMALL, kernel, range(40), TILES[kernel], {}))


@pytest.mark.parametrize("name", FAULTS)
def test_faults_are_found(name: str) -> None:
    """By one of the first sixteen seeds; the others are not asked any more."""
    fault, others = FAULTS[name], []
    for seed, found in outcomes(SMALL, fault.kernel, range(16), TILES[fault.kernel], fault.headers()):
        if re.search(fault.found, found):
            return
        others.append((seed, found))
    pytest.fail(f"nobody noticed: {others}")
