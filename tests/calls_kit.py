"""What a test sees of calls that code under test makes."""

from __future__ import annotations

from typing import Any

import pytest


def options_of_calls(monkeypatch: pytest.MonkeyPatch, module: Any, name: str) -> list[dict[str, Any]]:
    """The keyword arguments of each call of a function from now on, which still does its work."""
    seen: list[dict[str, Any]] = []
    real = getattr(module, name)

    def counted(*arrays: Any, **options: Any) -> Any:
        seen.append(options)
        return real(*arrays, **options)

    monkeypatch.setattr(module, name, counted)
    return seen
