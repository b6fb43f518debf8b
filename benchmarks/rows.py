"""Rows of results: reading them, choosing the newest of one device, and tables for people."""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING, Any, NamedTuple

from benchmarks.cases import (
    OURS,
    OURS_DETERMINISTIC,
    OURS_FLASH_ATTN,
    OURS_PACKED,
    OURS_PLAIN,
    OURS_SDPA,
    OURS_SM80,
    OURS_WITHOUT,
)
from benchmarks.moe_cases import ALL_SUITES

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from pathlib import Path

LABELS = {
    OURS: "flashmoe_cupy",
    OURS_SM80: "flashmoe_cupy (sm_80 kernel)",
    OURS_PLAIN: "flashmoe_cupy without the bias",
    OURS_PACKED: "flashmoe_cupy, packed rows",
    OURS_WITHOUT: "flashmoe_cupy without the feature",
    OURS_DETERMINISTIC: "flashmoe_cupy, deterministic",
    OURS_FLASH_ATTN: "flashmoe_cupy as flash-attn",
    OURS_SDPA: "flashmoe_cupy as SDPA",
    "torch_fa2": "torch FA2",
    "torch_cudnn": "torch cuDNN",
    "torch_flash": "torch flash",
    "torch_efficient": "torch efficient",
    "cudnn_frontend": "cuDNN's own front end",
    "torch_sdpa": "torch SDPA",
    "torch_cpu": "torch on the CPU",
    "eager": "transformers eager",
    "sdpa": "transformers SDPA",
    "flex_attention": "FlexAttention",
    "fa3": "FA3",
    "fa3_deterministic": "FA3, deterministic",
    "fa4": "FA4",
    "cuequivariance": "cuEquivariance",
    "torch_grouped_mm": "torch grouped_mm",
    "torch_index_add": "torch grouped_mm, index_add",
    "torch_loop": "torch loop over experts",
    "liger": "Liger",
    "vllm_triton": "vLLM's Triton kernel",
    "sonicmoe": "SonicMoE",
}
Row = dict[str, Any]


class ReportError(Exception):
    """The rows at hand do not allow what was asked for."""


def load(paths: Iterable[Path]) -> list[Row]:
    """All rows of the files; ReportError names the file and line that is not a row."""
    rows: list[Row] = []
    for path in paths:
        for number, text in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            if not text.strip():
                continue
            try:
                row = json.loads(text)
            except json.JSONDecodeError as error:
                raise ReportError(f"{path}:{number}: not JSON: {error}") from None
            lacking = [key for key in ("suite", "case", "library", "status", "run", "device") if key not in row]
            if lacking:
                raise ReportError(f"{path}:{number}: a row without {', '.join(lacking)}")
            if row.get("schema") == 1 and row["suite"] == "attention_forward_portable" and row["library"] == OURS:
                row["library"] = OURS_SM80  # rows of that schema are from when there was no other kernel
            rows.append(row)
    return rows


def newest(rows: Sequence[Row], suite: str, device: str = "") -> dict[str, dict[str, Row]]:
    """{case: {library: row}} of one suite on one device (`device`, a regular expression; default: the newest run's).

    All rows of a case come from one run, since only rows of one process compare: the newest run that has ours beside
    another library, else the newest that has the case.
    """
    runs: dict[str, dict[str, dict[str, Row]]] = {}
    for row in of_device(rows, suite, device):
        runs.setdefault(row["case"], {}).setdefault(row["run"], {})[row["library"]] = row
    order = {case.name: place for place, case in enumerate(ALL_SUITES[suite].cases)} if suite in ALL_SUITES else {}
    mine = ALL_SUITES[suite].ours if suite in ALL_SUITES else OURS
    return {
        case: max(by_run.items(), key=lambda item: (mine in item[1] and len(item[1]) > 1, item[0]))[1]
        for case, by_run in sorted(runs.items(), key=lambda item: (order.get(item[0], len(order)), item[0]))
    }


def of_device(rows: Sequence[Row], suite: str, device: str) -> list[Row]:
    """The suite's rows of the device that the newest run is of."""
    found = [row for row in rows if row["suite"] == suite and re.search(device, row["device"])]
    on = max(found, key=lambda row: str(row["run"]))["device"] if found else ""
    return [row for row in found if row["device"] == on]


def timed(row: Row | None, measure: str) -> bool:
    """Whether the row is right and has that figure."""
    return row is not None and row["status"] == "ok" and bool(row.get(measure))


def state(row: Row | None) -> str:
    """Why there is no time, in a few words."""
    if row is None:
        return "not measured"
    return f"{row['status']}: {row['reason']}" if row.get("reason") else f"{row['status']} without a time"


class Table(NamedTuple):
    """Plain text cells; the first column is left-aligned, the others right."""

    title: str
    head: tuple[str, ...]
    cells: list[tuple[str, ...]]

    def markdown(self) -> str:
        lines = [self.head, (":--", *("--:" for _ in self.head[1:])), *self.cells]
        return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def show(table: Table, markdown: bool) -> None:
    """Print a table: Markdown, or rich (which is plain text when not on a terminal)."""
    if markdown:
        print(f"**{table.title}**\n\n{table.markdown()}\n")
        return
    from rich import box
    from rich.console import Console
    from rich.table import Table as RichTable

    console = Console(highlight=False)
    if not console.is_terminal:
        console = Console(highlight=False, width=200)
    rich = RichTable(box=box.HEAVY_HEAD if console.is_terminal else box.ASCII2)
    for place, name in enumerate(table.head):
        rich.add_column(name, justify="left" if place == 0 else "right", no_wrap=True)
    for line in table.cells:
        rich.add_row(*line)
    console.print(table.title, markup=False, soft_wrap=True)
    console.print(rich)


def facts(rows: Iterable[Row]) -> str:
    """Device, driver, versions and commit of the rows, in one line."""
    row = max(rows, key=lambda row: str(row["run"]))
    versions = ", ".join(f"{name} {version}" for name, version in row.get("versions", {}).items() if version)
    commit = str(row.get("commit", "unknown"))[:12] + (" with changes" if row.get("dirty") else "")
    driver = f"driver {row['driver']}, " if row.get("driver") else ""
    return f"{row['device']}, {driver}{versions}; commit {commit}; {str(row['run'])[:10]}"
