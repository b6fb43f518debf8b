"""Modules that are loaded when they are needed, by rooms that may not import them; `__init__` says how."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

_loaders: dict[str, Callable[[], Any]] = {}


def register(name: str, loader: Callable[[], Any]) -> None:
    """loader() gives the module. "jax", "torch": whose `call` runs an operation on arrays of that framework, which it
    may import. "operations": which has imported every operation.
    """
    _loaders[name] = loader


def load(name: str) -> Any:
    """The module that was registered."""
    return _loaders[name]()
