"""What torch.compile traces in place of functions that it cannot. It may trace this file, and never `ops.access`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from flashmoe_cupy import _late


def compiled(instead: Callable[..., Any]) -> Callable[[Callable[..., Any]], Any]:
    """Decorator: torch.compile traces `instead` where the function is called, as it does for its own wrappers.

    Nothing of it is seen in eager code, neither time nor an import of torch.
    """

    def mark(function: Any) -> Any:
        function._torchdynamo_inline = instead
        return function

    return mark


def run_traced(
    call: Any,
    required: tuple[Any, ...],
    options: tuple[Any, ...],
    optional: tuple[Any, ...] | None = None,
    out: Any = None,
) -> Any:
    """In place of `ops.call.run`: what is traced has no memory, and goes to the operators of flashmoe_cupy.torch."""
    return _late.load("torch").run_traced(call, required, options, optional, out)


def unknown(*_: Any) -> None:
    """In place of `ops.call.known`: nothing is remembered."""


def torch_adapter(_: Any) -> Any:
    """In place of `ops.adapters.adapter`."""
    return _late.load("torch")
