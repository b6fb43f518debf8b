"""Who remembers a choice of kernels, to be told when it changes."""

from __future__ import annotations

from collections.abc import Callable

forget: list[Callable[[], None]] = []


def forget_all() -> None:
    """Everybody makes the choice anew."""
    for call in forget:
        call()
