"""NaN where nothing counts: in rows of no sequence, behind seqused, in other sequences, batches and heads.

It never reaches a result, as the docstrings promise, on every back end. A hidden key between visible ones is another
matter: the GPU kernels multiply it by 0.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import emulate
import numpy as np
import pytest
from emulated_attention import SM80, SM90, Arrays, attention

import flashmoe_cupy
from flashmoe_cupy import reference
from flashmoe_cupy.testing import AttentionCase, Case, VarlenCase

CUDA = Path(__file__).resolve().parent.parent / "cuda_src"
_EMULATED = [
    pytest.mark.slow,
    pytest.mark.skipif(emulate.missing() is not None, reason=str(emulate.missing())),
]
KERNELS = [pytest.param(name, marks=_EMULATED) for name in (SM80, SM90)]
HOST = ["reference", "numpy"]
BACKENDS = [*HOST, pytest.param("cuda", marks=[pytest.mark.gpu, pytest.mark.sm80, pytest.mark.torch]), *KERNELS]

# Tiles of keys reach from each sequence into the next one, and from the last one into rows of none.
_LENGTHS: tuple[tuple[int, ...], tuple[int, ...]] = (70, 30, 130), (90, 33, 201)
PACKED = (
    VarlenCase(*_LENGTHS, tail_q=5, tail_k=130, causal=True),
    VarlenCase(*_LENGTHS, (60, 17, 99), (37, 20, 190), tail_k=70, dtype="float16", window_size=(50, 9)),
    VarlenCase(*_LENGTHS, tail_k=130, softcap=30.0, heads_q=1, heads_k=1),
    VarlenCase(*_LENGTHS, tail_q=3, tail_k=130, heads_q=8, heads_k=1, head_dim=72, causal=True, sinks="float32"),
)  # fmt: skip


def run(backend: str, case: Case, arrays: Arrays, headers: Mapping[str, str] | None = None) -> Any:
    """(out, lse); what an emulated kernel does not write is NaN."""
    if backend in (SM80, SM90):
        return attention(case, backend, 1, headers=headers, given=arrays)
    name = "flash_attention_varlen" if isinstance(case, VarlenCase) else "flash_attention"
    call = getattr(reference if backend == "reference" else flashmoe_cupy, name)
    if backend in HOST:
        return call(**arrays, **case.options(), return_lse=True)
    torch_truth = pytest.importorskip("test_gpu_truth")
    given = {name: torch_truth.from_numpy(x).to(backend) for name, x in arrays.items()}
    out, lse = call(**given, **case.options(), return_lse=True)
    return out.float().cpu().numpy(), lse.cpu().numpy()


def same(mine: Any, want: Any, rows: Any, exact: bool) -> bool:
    """The same bits, or numbers a rounding apart, in these rows of out (rows, heads, d) and of lse (heads, rows)."""
    for a, b, step in ((mine[0][rows], want[0][rows], 2.0**-11), (mine[1].T[rows], want[1].T[rows], 2.0**-19)):
        x, y = a.astype(np.float64), b.astype(np.float64)
        if a.tobytes() != b.tobytes() if exact else not np.linalg.norm(x - y) <= step * np.linalg.norm(y):
            return False
    return True


def owned(case: VarlenCase, which: str, sequences: Any) -> Any:
    """The rows of these sequences that count."""
    spans = case.spans(which)
    return np.concatenate([np.arange(*spans[s]) for s in sequences])


def without_strays(case: VarlenCase) -> Arrays:
    """The arrays of a case with ones where nothing counts; there it draws NaN."""
    arrays: Arrays = case.random()
    for name in "qkv":
        arrays[name][np.isnan(arrays[name])] = 1
    return arrays


def strays(case: VarlenCase, backend: str, headers: Mapping[str, str] | None = None) -> list[str]:
    """Where a NaN of others is seen."""
    arrays, found = without_strays(case), []
    want = run(backend, case, arrays, headers)
    everyone = range(len(case.lengths_q))
    # Hopper's kernel takes the longer of two polynomials for scores of a warp of which one is large, hidden ones too.
    exact = not case.softcap or backend not in ("cuda", SM90)
    counts = owned(case, "q", everyone)
    assert np.isfinite(want[0][counts].astype(np.float32)).all()
    for value in (np.nan, np.inf):
        bad = {name: arrays[name].copy() for name in "qkv"}
        for name, x in bad.items():
            idle = np.ones(len(x), bool)
            idle[owned(case, "q" if name == "q" else "k", everyone)] = False
            assert idle.any() or name == "q"
            x[idle] = value
        got = run(backend, case, arrays | bad, headers)
        if not same(got, want, counts, exact):
            found.append(f"{value} in rows of no sequence")
        if backend not in (SM80, SM90):
            rest = np.setdiff1d(np.arange(len(got[0])), counts)
            assert not got[0][rest].any() and np.isneginf(got[1][:, rest]).all()
    for spoiled in ((1,), (0, 2)):
        bad = {name: arrays[name].copy() for name in "qkv"}
        for name, x in bad.items():
            x[owned(case, "q" if name == "q" else "k", spoiled)] = np.nan
        got = run(backend, case, arrays | bad, headers)
        assert np.isnan(got[0][owned(case, "q", spoiled)].astype(np.float32)).any()
        others = [s for s in everyone if s not in spoiled]
        if not same(got, want, owned(case, "q", others), exact):
            found.append(f"NaN in sequences {spoiled}")
    return found


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", PACKED, ids=str)
def test_rows_of_no_sequence_and_of_others_never_count(case: VarlenCase, backend: str) -> None:
    assert strays(case, backend) == []


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("softcap", [0.0, 30.0])
def test_other_batches_and_heads_never_count(softcap: float, backend: str) -> None:
    case = AttentionCase(70, 90, 3, 4, 2, 64, causal=True, softcap=softcap)
    arrays: Arrays = case.random()
    out, lse = run(backend, case, arrays)
    for axis in (0, 2):  # the batch or the key head in the middle or at the end, two query heads each
        bad = {name: arrays[name].copy() for name in "qkv"}
        for name, x in bad.items():
            where = (1,) if axis == 0 else (slice(None), slice(None), slice(2, 4) if name == "q" else 1)
            x[where] = np.nan
        got, got_lse = run(backend, case, bad)
        hit = np.zeros((3, 4), bool)
        hit[(1,) if axis == 0 else (slice(None), slice(2, 4))] = True
        assert np.isnan(got.swapaxes(1, 2)[hit].astype(np.float32)).all()
        assert got.swapaxes(1, 2)[~hit].tobytes() == out.swapaxes(1, 2)[~hit].tobytes()
        assert got_lse[~hit].tobytes() == lse[~hit].tobytes()


# ------------------------------------------------------------------------------------------------------- hidden keys


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_hidden_value_counts_on_gpus_only(backend: str) -> None:
    """What the docstrings except. Where this fails on a GPU, they may promise more."""
    case = AttentionCase(64, 64, 1, 1, 1, 64, causal=True)
    arrays: Arrays = case.random()
    want, want_lse = run(backend, case, arrays)
    arrays["v"] = arrays["v"].copy()
    arrays["v"][:, 40] = np.nan  # the queries in front of 40 do not see it
    out, lse = run(backend, case, arrays)
    assert np.isnan(out[:, 40:].astype(np.float32)).all() and np.isfinite(lse).all()
    if backend in HOST:  # NumPy takes another way through small problems that hold a NaN
        assert same((out[0], lse[0]), (want[0], want_lse[0]), slice(40), exact=backend == "reference")
    else:
        assert lse.tobytes() == want_lse.tobytes()
        assert np.isnan(out[:, :40].astype(np.float32)).all()


def test_docstrings_say_what_counts() -> None:
    def words(text: str | None) -> str:
        return " ".join((text or "").split())

    from flashmoe_cupy.reference import attention_head

    dense = words(inspect.getdoc(flashmoe_cupy.flash_attention))
    packed = words(inspect.getdoc(flashmoe_cupy.flash_attention_varlen))
    assert "k and v of a key that causal, window_size or bias hides from a query must be finite" in dense
    assert "beyond the arrays, in padding or in another head or batch entry never counts, NaN included" in dense
    assert "All others: as in `flash_attention`" in packed
    assert "What rows of no sequence hold in q, k and v never counts, NaN included" in packed
    truth = words(attention_head.__doc__)
    assert "hidden keys among visible ones must be finite" in truth


# ----------------------------------------------------------------------------------- these tests notice what is missing

_80, _90, _TILE = "attention/fwd_sm80.cuh", "attention/outside_sm90.cuh", "tile/warpgroup_gemm.cuh"
FAULTS = {
    "the end of a sequence is not cleared": (_90, "max(0, (n + 1) * TileV::kRows - w.band.cols) : 0", "0 : 0"),
    "a row too few is cleared": (_TILE, "s_tile + first * Tile::kRowBytes", "s_tile + (first + 1) * Tile::kRowBytes"),
    "values behind the end are loaded": (_80, "p.v_stride_s, w.band.cols - n0,", "p.v_stride_s, kBlockN,"),
}


@pytest.mark.slow
@pytest.mark.skipif(emulate.missing() is not None, reason=str(emulate.missing()))
@pytest.mark.parametrize("name", FAULTS)
def test_what_is_not_cleared_is_found(name: str) -> None:
    header, old, new = FAULTS[name]
    text = (CUDA / header).read_text(encoding="utf-8")
    assert text.count(old) == 1, f"{header} no longer holds {old!r} once"
    found = strays(PACKED[0], SM80 if header == _80 else SM90, {header: text.replace(old, new)})
    nobody, others = "in rows of no sequence", "NaN in sequences"
    assert found == [f"nan {nobody}", f"inf {nobody}", f"{others} (1,)", f"{others} (0, 2)"]
