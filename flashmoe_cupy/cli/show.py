"""Output of the command line: rich tables on a terminal, plain aligned text elsewhere, JSON where asked."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import Any


def size(count: float) -> str:
    """Bytes for people: "1.5 MB"."""
    for unit in ("B", "kB", "MB", "GB"):
        if abs(count) < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} TB"


def parse_size(text: str) -> int:
    """The other way: "200M", "1.5 GB", "4096" -> bytes. Raises ValueError."""
    word = text.strip().lower().removesuffix("b")
    factor = {"k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12}.get(word[-1:], 1)
    count = float(word[:-1] if factor > 1 else word) * factor
    if not 0 <= count < 10**18:
        raise ValueError(text)
    return int(count)


class Output:
    """Where a command writes. `rich` is imported only for a terminal."""

    def __init__(self) -> None:
        self._console: Any = None
        if sys.stdout.isatty():
            from rich.console import Console

            self._console = Console(highlight=False)

    def line(self, text: str = "", style: str = "") -> None:
        """One line; `style` is rich's, for example "bold" or "red"."""
        if self._console is None:
            print(text)
        else:
            self._console.print(text, style=style or None, markup=False, soft_wrap=True)

    def title(self, text: str) -> None:
        self.line(text, "bold")

    def facts(self, title: str, facts: Mapping[str, Any]) -> None:
        """A title and `name: value` lines; values that are None show as a dash."""
        self.title(title)
        width = max(map(len, facts), default=0)
        for name, value in facts.items():
            self.line(f"  {name:<{width}}  {'-' if value is None or value == '' else value}")

    def table(self, columns: Sequence[str], rows: Iterable[Sequence[Any]], title: str = "") -> None:
        """Columns whose values are all numbers line up on the right."""
        texts = [[_cell(value) for value in row] for row in rows]
        right = [all(_is_number(row[i]) for row in texts) and bool(texts) for i in range(len(columns))]
        if self._console is not None:
            from rich.box import SIMPLE_HEAD
            from rich.table import Table
            from rich.text import Text

            table = Table(title=title or None, title_justify="left", box=SIMPLE_HEAD, pad_edge=False)
            for name, to_right in zip(columns, right, strict=True):
                # In a narrow window texts fold and the numbers stay whole.
                table.add_column(name, justify="right" if to_right else "left", no_wrap=to_right, overflow="fold")
            for row in texts:
                table.add_row(*(Text(cell) for cell in row))
            self._console.print(table)
            return
        if title:
            self.line(title)
        widths = [max(map(len, column)) for column in zip(columns, *texts, strict=True)]
        for row in ([*columns], *texts):
            cells = [c.rjust(w) if r else c.ljust(w) for c, w, r in zip(row, widths, right, strict=True)]
            self.line("  ".join(cells).rstrip())

    def progress(self, text: str) -> None:
        """A line that the next one replaces, on a terminal; nothing elsewhere."""
        if self._console is not None:
            self._console.print(text[: self._console.width - 1], end="\r", markup=False, no_wrap=True, style="dim")

    def progress_done(self) -> None:
        if self._console is not None:
            self._console.print(" " * (self._console.width - 1), end="\r")


def emit_json(data: Any) -> None:
    """One JSON document on standard output."""
    print(json.dumps(data, indent=2, default=_plain))


def fail(error: Exception, as_json: bool) -> None:
    """An error: in words on standard error, and as a document on standard output where JSON is asked for."""
    usage = getattr(error, "usage", None)  # a Misuse has it, perhaps as an empty string
    print(f"{usage or ''}flashmoe-cupy: {error}", file=sys.stderr)
    if as_json:
        kind = "usage" if usage is not None else type(error).__name__
        parts = {name: getattr(error, name) for name in ("asked", "reasons", "hint", "log") if hasattr(error, name)}
        emit_json({"error": kind, "message": str(error), **parts})


def _plain(value: Any) -> Any:
    if hasattr(value, "item"):
        return value.item()
    return str(value)


def _cell(value: Any) -> str:
    if value is None or value == "":
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def _is_number(text: str) -> bool:
    if text == "-":
        return True
    try:
        float(text.rstrip("%"))
    except ValueError:
        return False
    return True
