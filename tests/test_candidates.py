"""The benchmark's candidates: each is what runs within its scope, and nothing else is changed by it."""

from __future__ import annotations

from collections.abc import Mapping

import emulate
import pytest
from emulated_attention import SM90, attention, faults

from benchmarks.candidates import EXPERIMENTS, TODAY, Candidate, named, taken
from flashmoe_cupy.jit import source
from flashmoe_cupy.plan.kernels import KERNELS
from flashmoe_cupy.service.attention import problem_of
from flashmoe_cupy.testing import AttentionCase

CHANGED = {one.name: one for of in EXPERIMENTS.values() for one in of.candidates if one.changes}


def drawn(d: int) -> tuple[str, Mapping[str, str]]:
    sizes = 2, 4096, None, 8, None, d, None, "bfloat16"
    problem = problem_of(*sizes, False, (-1, -1), None, 0.0, False, None, False, False)
    kernel = KERNELS[SM90]
    text = kernel.source(kernel.choose(problem, "sm_90a"))
    return text, source.headers_for(text)


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_cases_exist(name: str) -> None:
    of = EXPERIMENTS[name]
    assert [named(of.suite, case).name for case in of.cases] == list(of.cases)
    assert len({one.name for one in (TODAY, *of.candidates)}) == 1 + len(of.candidates)
    with pytest.raises(KeyError, match="it has"):
        named(of.suite, "no such case")


def test_a_scope_changes_what_it_says_and_no_more() -> None:
    before = drawn(256)
    with taken(TODAY):
        assert drawn(256) == before
    with taken(Candidate("tile", (128, 80, 2))):
        text, headers = drawn(256)
        assert "256, 256, 128, 80, 2" in text and headers == before[1]
    with taken(Candidate("text", None, (("tile/mask.cuh", "kN <= 32", "kN <= 33"),))):
        text, headers = drawn(256)
        assert text != before[0] and "kN <= 33" in headers["tile/mask.cuh"]
    lost = Candidate("lost", None, (("tile/mask.cuh", "no such text", ""),))
    with taken(lost), pytest.raises(ValueError, match="lost"):
        drawn(256)
    assert drawn(256) == before


@pytest.mark.slow
@pytest.mark.skipif(emulate.missing() is not None, reason=str(emulate.missing()))
@pytest.mark.parametrize("name", CHANGED)
def test_changed_kernels_are_right(name: str) -> None:
    with taken(CHANGED[name]):
        _, headers = drawn(128)
    headers = {header: headers[header] for header, _, _ in CHANGED[name].changes}
    for case in (AttentionCase(150, 400, 1, 4, 2, 128, causal=True), AttentionCase(131, 400, 2, 2, 1, 128)):
        for seed in range(3):
            assert faults(case, SM90, *attention(case, SM90, seed, headers=headers)) == []
