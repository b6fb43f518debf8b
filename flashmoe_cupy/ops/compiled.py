"""What torch.compile traces in place of functions that it cannot. It may trace this file, and never `ops.quick`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


def compiled(instead: Callable[..., Any]) -> Callable[[Callable[..., Any]], Any]:
    """Decorator: torch.compile traces `instead` where the function is called, as it does for its own wrappers.

    Nothing of it is seen in eager code, neither time nor an import of torch.
    """

    def mark(function: Any) -> Any:
        function._torchdynamo_inline = instead
        return function

    return mark


def nothing(*_: Any) -> None:
    """In place of what looks at memory: what is traced has none."""
