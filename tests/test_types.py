"""Users of mypy --strict see the types of results, pairs where they ask for them, and misspelt options as errors."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
HEAD = """
from typing import Any
import numpy as np
from numpy.typing import NDArray
import flashmoe_cupy as fm

class Tensor: ...  # an array of another library

t: Tensor
a: NDArray[np.float16]
i: NDArray[np.int32]
w: Any
either: bool
layer: fm.FlashMoELayer
attention: fm.FlashAttentionLayer
"""
PACKED = "cu_seqlens_q=w, cu_seqlens_k=w, max_seqlen_q=3"

# Calls of a user, with t a tensor, a and i NumPy arrays of float16 and int32, and what they give.
RESULTS = [
    ("fm.flash_attention(t, t, t, causal=True)", "Tensor"),
    ("fm.flash_attention(t, t, t, return_lse=True)", "tuple[Tensor, Tensor]"),
    ("fm.flash_attention(t, t, t, return_lse=either)", "Tensor | tuple[Tensor, Any]"),
    ("fm.flash_attention(a, a, a, window_size=(i[0], 3), out=a)", "Array[float16]"),
    ("fm.flash_attention(a, a, a, layout='bhsd', return_lse=True)", "tuple[Array[float16], Array[float32]]"),
    (f"fm.flash_attention_varlen(t, t, t, {PACKED}, max_seqlen_k=3, return_lse=True)", "tuple[Tensor, Tensor]"),
    (f"fm.flash_attention_varlen(a, a, a, {PACKED}, max_seqlen_k=i[0])", "Array[float16]"),
    ("fm.moe_route(t, top_k=2)", "tuple[Tensor, Tensor]"),
    ("fm.moe_route(t, top_k=2, return_stats=True)", "tuple[Tensor, Tensor, RouterStats[Tensor]]"),
    ("fm.moe_route(a, top_k=2, scoring_func='sigmoid')", "tuple[Array[float32], Array[int32]]"),
    ("fm.moe_permute(t, num_experts=2)", "MoEPermutation[Tensor]"),
    ("fm.moe_permute(i, num_experts=i[0]).offsets", "Array[int32]"),
    ("fm.grouped_gemm(t, t, offsets=t)", "Tensor"),
    ("fm.fused_moe(a, w, w, a, i, activation='geglu')", "Array[float16]"),
    ("fm.fused_moe(t, w, w, t, t, out=t)", "Tensor"),
    ("layer(t)", "Tensor"),
    ("layer(t, return_stats=True)", "tuple[Tensor, RouterStats[Tensor]]"),
    ("attention(t, cache=attention.new_cache(2, 9))", "Tensor"),
]
ERRORS = [
    "fm.flash_attention(t, t, t, layout='sbhd')",
    "fm.flash_attention(t, t, t, return_lse='no')",
    "fm.flash_attention(t, t, t, dropout=0.1)",
    f"fm.flash_attention_varlen(t, t, t, {PACKED})",
    "fm.moe_route(t, top_k=2, scoring_func='relu')",
    "fm.moe_route(t, top_k=2.0)",
    "fm.fused_moe(t, t, t, t, t, activation='silu')",
    "fm.fused_moe(t, t, t, t, t, inplace=w)",
    "fm.grouped_gemm(t, t, offs=w)",
    "fm.FlashMoELayer(8, 2, 1, 8, w_gate_up=w, w_down=w, norm_topk_prob=True)",
    "fm.FlashMoELayer(8, 2, 1, 8, w_gate_up=w, w_down=w, activation='silu')",
    "fm.FlashAttentionLayer(8, 2, w_q=w, w_k=w, w_v=w)",
    "attention(t, causal=True)",
    "[*fm.flash_attention(t, t, t)]",
]


def plain(shown: str) -> str:
    """mypy's words for a type without modules and shapes."""
    for long, short in (("floating.{0,60}_16Bit", "float16"), ("floating.{0,60}_32Bit", "float32"),
                        ("signedinteger.{0,60}_32Bit", "int32")):  # fmt: skip
        shown = re.sub(rf"numpy\.{long}\]", short, shown)
    shown = re.sub(r"(?:\w+\.)+(\w+)", r"\1", shown)
    shown = re.sub(r"ndarray\[tuple\[Any, \.\.\.\], dtype\[(\w+)\]\]", r"Array[\1]", shown)
    return re.sub(r"tuple\[[^][]*, fallback=(\w+\[\w+\])\]", r"\1", shown)  # a named tuple


@pytest.fixture(scope="module")
def said(tmp_path_factory: pytest.TempPathFactory) -> list[tuple[str, str]]:
    """Kind and text of mypy's first word on each of the calls, in one run."""
    pytest.importorskip("mypy")
    folder = tmp_path_factory.mktemp("user")
    calls = [f"reveal_type({call})" for call, _ in RESULTS] + ERRORS
    lines = [*HEAD.splitlines(), *calls]
    (folder / "user.py").write_text("\n".join(lines) + "\n")
    cache = ROOT / ".mypy_cache"  # what developers have checked before, if they have
    command = [sys.executable, "-m", "mypy", "--strict", "--follow-imports=silent", "--python-version=3.11"]
    command += ["--cache-dir", str(cache if cache.is_dir() else folder / "cache"), "user.py"]
    done = subprocess.run(
        command, capture_output=True, text=True, cwd=folder, timeout=600, check=False,
        env=os.environ | {"MYPYPATH": str(ROOT)},
    )  # fmt: skip
    found: dict[int, tuple[str, str]] = {}
    for line in done.stdout.splitlines():
        match = re.match(r"user\.py:(\d+): (note|error): (.*)", line)
        if match is not None:
            found.setdefault(int(match[1]), (match[2], match[3]))
    first = len(lines) - len(calls) + 1
    assert found and min(found) >= first, done.stdout + done.stderr
    return [found.get(n, ("nothing", "")) for n in range(first, len(lines) + 1)]


@pytest.mark.parametrize("number", range(len(RESULTS)), ids=[call for call, _ in RESULTS])
def test_results_have_types(said: list[tuple[str, str]], number: int) -> None:
    kind, text = said[number]
    shown = re.fullmatch(r'Revealed type is "(.*)"', text)
    assert kind == "note" and shown is not None, (kind, text)
    assert plain(shown[1]) == RESULTS[number][1], text


@pytest.mark.parametrize("number", range(len(ERRORS)), ids=ERRORS)
def test_wrong_options_are_errors(said: list[tuple[str, str]], number: int) -> None:
    assert said[len(RESULTS) + number][0] == "error"
