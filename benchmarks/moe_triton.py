"""vLLM's Triton kernel of the mixture of experts, taken out of a wheel that the user gives.

FLASHMOE_VLLM names the wheel, its fused_moe.py, or a folder with that file. Two functions of the file are loaded,
without the package around them; nothing of it is kept. What the kernel needs beside them is written here: the
activation and the sum, which are timed, and the list of blocks, which is made before and is not. The tile is the
fastest of a few that vLLM's tuned tables have for such sizes.
"""

from __future__ import annotations

import ast
import importlib
import importlib.util
import os
import tempfile
import zipfile
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from benchmarks.library import Prepared, Setup, first_reason
from benchmarks.moe_inputs import ALPHA, LIMIT, MoEInputs
from benchmarks.moe_rivals import MoELibrary, concatenated
from benchmarks.timing import fastest

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    import torch

    from benchmarks.moe_cases import MoECase

VARIABLE = "FLASHMOE_VLLM"
INSIDE = "vllm/model_executor/layers/fused_moe/fused_moe.py"
FUNCTIONS = ("write_zeros_to_output", "fused_moe_kernel")
CHOSEN: dict[str, str] = {}  # case -> the tile that was the fastest, for those who want to know


class Tile(NamedTuple):
    """A configuration of the kernel: rows and columns of a block, its depth, blocks in a group, warps, stages."""

    m: int
    n: int
    k: int
    group: int
    warps: int
    stages: int

    def options(self) -> dict[str, int]:
        names = ("BLOCK_SIZE_M", "BLOCK_SIZE_N", "BLOCK_SIZE_K", "GROUP_SIZE_M", "num_warps", "num_stages")
        return dict(zip(names, self, strict=True))


# By the rows that an expert has on average: up to the first number these tiles.
TILES = (
    (
        12.0,
        (
            Tile(16, 64, 64, 1, 4, 5),
            Tile(16, 32, 64, 1, 4, 4),
            Tile(16, 64, 128, 1, 4, 4),
            Tile(16, 128, 128, 1, 4, 5),
            Tile(16, 64, 256, 1, 4, 2),
            Tile(16, 256, 128, 1, 8, 2),
        ),
    ),
    (
        24.0,
        (
            Tile(16, 128, 128, 1, 4, 3),
            Tile(16, 64, 128, 1, 4, 4),
            Tile(16, 256, 128, 1, 8, 2),
            Tile(32, 128, 128, 1, 4, 3),
            Tile(32, 64, 128, 1, 4, 4),
            Tile(32, 256, 128, 1, 8, 2),
        ),
    ),
    (
        96.0,
        (
            Tile(32, 128, 128, 1, 4, 3),
            Tile(32, 256, 128, 1, 8, 2),
            Tile(64, 128, 64, 1, 4, 4),
            Tile(64, 128, 128, 1, 8, 4),
            Tile(64, 256, 64, 1, 4, 4),
            Tile(128, 128, 64, 1, 8, 3),
        ),
    ),
    (
        float("inf"),
        (
            Tile(64, 256, 64, 16, 4, 4),
            Tile(128, 128, 64, 16, 8, 3),
            Tile(128, 256, 64, 16, 8, 3),
            Tile(128, 256, 64, 16, 8, 4),
            Tile(128, 256, 64, 1, 8, 4),
        ),
    ),
)


def tiles(case: MoECase) -> tuple[Tile, ...]:
    """The tiles to try for a case."""
    rows = case.tokens * case.top_k / case.experts
    return next(found for limit, found in TILES if rows <= limit)


class Blocks(NamedTuple):
    """Which rows a block of the kernel computes: `rows` (padded by T * K; None: block i has row i only), int32."""

    rows: torch.Tensor | None
    experts: torch.Tensor
    padded: torch.Tensor  # (1,): number of rows with padding
    length: int  # the same number, on the host


def align(ids: torch.Tensor, experts: int, block: int) -> Blocks:
    """Assignments sorted by expert, each expert's padded to whole blocks; few assignments get a block each instead."""
    import torch

    flat = ids.flatten()
    if 4 * flat.numel() <= experts:
        length = flat.numel() * block
        return Blocks(None, flat.int(), torch.tensor([length], dtype=torch.int32, device=ids.device), length)
    sorted_ids, order = flat.long().sort(stable=True)
    counts = torch.bincount(sorted_ids, minlength=experts)
    blocks = (counts + block - 1) // block
    first, start = counts.cumsum(0) - counts, block * (blocks.cumsum(0) - blocks)
    length = block * int(blocks.sum())
    rows = torch.full((length,), flat.numel(), dtype=torch.int32, device=ids.device)
    place = torch.arange(flat.numel(), device=ids.device)
    rows[start[sorted_ids] + place - first[sorted_ids]] = order.int()
    owners = torch.arange(experts, dtype=torch.int32, device=ids.device).repeat_interleave(blocks)
    return Blocks(rows, owners, torch.tensor([length], dtype=torch.int32, device=ids.device), length)


def source(path: Path) -> str:
    """The text of fused_moe.py at, in or under `path`."""
    if path.suffix == ".whl":
        with zipfile.ZipFile(path) as wheel:
            return wheel.read(INSIDE).decode("utf-8")
    if path.is_dir():
        path = next((p for p in (path / INSIDE, path / Path(INSIDE).name) if p.is_file()), path / INSIDE)
    return path.read_text(encoding="utf-8")


@cache
def load(path: str) -> Any:
    """fused_moe_kernel of the file: a module is made of its two functions, since Triton wants to read their source."""
    text = source(Path(path))
    lines = text.splitlines()
    nodes = {node.name: node for node in ast.parse(text).body if isinstance(node, ast.FunctionDef)}
    lacking = [name for name in FUNCTIONS if name not in nodes]
    if lacking:
        raise ValueError(f"{path} has no function {' and no '.join(lacking)}")
    parts = ["import triton\nimport triton.language as tl"]
    for name in FUNCTIONS:
        node = nodes[name]
        first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
        parts.append("\n".join(lines[first - 1 : node.end_lineno]))
    file = Path(tempfile.mkdtemp(prefix="flashmoe-vllm-")) / "fused_moe_kernel.py"
    file.write_text("\n\n\n".join(parts) + "\n", encoding="utf-8")
    spec = importlib.util.spec_from_file_location("flashmoe_vllm_kernel", file)
    if spec is None or spec.loader is None:
        raise ImportError(f"cannot import {file}")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.fused_moe_kernel


def multiply(
    kernel: Any, tile: Tile, blocks: Blocks, a: torch.Tensor, b: torch.Tensor, bias: torch.Tensor | None,
    c: torch.Tensor, top_k: int, weights: torch.Tensor, weighted: bool,
) -> None:  # fmt: skip
    """Queue c[r] = a[r // top_k] @ b[expert of r].T (+ bias), times weights[r] if `weighted`, for all rows r of c."""
    grid = (-(-blocks.length // tile.m) * -(-b.shape[1] // tile.n),)
    kernel[grid](
        a_ptr=a,
        b_ptr=b,
        c_ptr=c,
        b_bias_ptr=bias,
        a_scale_ptr=None,
        b_scale_ptr=None,
        topk_weights_ptr=weights,
        sorted_token_ids_ptr=blocks.rows,
        expert_ids_ptr=blocks.experts,
        num_tokens_post_padded_ptr=blocks.padded,
        N=b.shape[1],
        K=b.shape[2],
        EM=blocks.length,
        num_valid_tokens=c.shape[0],
        stride_am=a.stride(0),
        stride_ak=a.stride(1),
        stride_be=b.stride(0),
        stride_bk=b.stride(2),
        stride_bn=b.stride(1),
        stride_cm=c.stride(0),
        stride_cn=c.stride(1),
        **dict.fromkeys(("stride_asm", "stride_ask", "stride_bse", "stride_bsk", "stride_bsn"), 0),
        stride_bbe=0 if bias is None else bias.stride(0),
        stride_bbn=0 if bias is None else bias.stride(1),
        group_n=0,
        group_k=0,
        naive_block_assignment=blocks.rows is None,
        SPLIT_K=1,
        MUL_ROUTED_WEIGHT=weighted,
        top_k=top_k,
        compute_type=getattr(importlib.import_module("triton.language"), str(c.dtype).removeprefix("torch.")),
        use_fp8_w8a8=False,
        use_int8_w8a8=False,
        use_int8_w8a16=False,
        per_channel_quant=False,
        HAS_BIAS=bias is not None,
        SWAP_AB=False,
        USE_TD=False,
        **tile.options(),
    )


def activate(case: MoECase, h: torch.Tensor, a: torch.Tensor) -> None:
    """Queue the activation of h (rows, 2n) into a (rows, n)."""
    kernel = importlib.import_module("benchmarks.moe_triton_kernels").gated
    rows, n = a.shape
    kernel[(rows, -(-n // 1024))](h, a, n, ALPHA, LIMIT, case.activation == "swigluoai", 1024, num_warps=4)


class VllmTriton(MoELibrary):
    """fused_moe_kernel twice, with the activation between and the sum over a token's experts behind."""

    name = "vllm_triton"

    def missing(self, setup: Setup) -> str:
        if reason := super().missing(setup):
            return reason
        path = os.environ.get(VARIABLE, "")
        if not path:
            return f"no file given ({VARIABLE}: vLLM's wheel or its fused_moe.py)"
        if importlib.util.find_spec("triton") is None:
            return "Triton is not installed"
        try:
            load(path)
        except Exception as error:  # whatever a foreign file can do
            return f"load failed: {type(error).__name__}: {error}"
        return ""

    def why_not(self, case: MoECase, setup: Setup) -> str:
        return super().why_not(case, setup) or first_reason(
            (case.dtype == "float32", "takes bf16 and fp16"),
            (not case.gated, "only gated activations are adapted here"),
        )

    def prepare(self, case: MoECase, sets: Sequence[MoEInputs], setup: Setup) -> Prepared:
        candidates = tiles(case)
        layouts = [(one, concatenated(case, one.w_gate_up), concatenated(case, one.b_gate_up)) for one in sets]
        runs = [pipeline(case, layouts, tile) for tile in candidates]
        calls = len(sets) * max(1, 8 // len(sets)) if case.graph else 1
        best = fastest(runs, calls, setup.cuda)
        CHOSEN[case.name] = str(candidates[best])
        return Prepared(runs[best], lambda out: out)


def pipeline(case: MoECase, layouts: Sequence[tuple[Any, ...]], tile: Tile) -> Callable[[int], torch.Tensor]:
    """The calls with one tile; a layout is a set of inputs, its w_gate_up and its b_gate_up, both with gates first."""
    kernel = load(os.environ[VARIABLE])
    blocks = [align(one.topk_ids, case.experts, tile.m) for one, *_ in layouts]

    def run(i: int) -> torch.Tensor:
        one, w_gate_up, b_gate_up = layouts[i % len(layouts)]
        here, weights, x = blocks[i % len(layouts)], one.topk_weights.flatten(), one.x
        sizes = (case.up_rows, case.intermediate, case.hidden)
        h, a, y = (x.new_empty(case.tokens * case.top_k, size) for size in sizes)
        multiply(kernel, tile, here, x, w_gate_up, b_gate_up, h, case.top_k, weights, weighted=False)
        activate(case, h, a)
        multiply(kernel, tile, here, a, one.w_down, one.b_down, y, 1, weights, weighted=True)
        return y.view(case.tokens, case.top_k, case.hidden).sum(1)

    return run
