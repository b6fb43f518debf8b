"""Which versions of JAX are served, and how the others are refused."""

from __future__ import annotations

import re
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest

import flashmoe_cupy
from flashmoe_cupy import _xla_ffi
from flashmoe_cupy.errors import DependencyError

jax = pytest.importorskip("jax")

from flashmoe_cupy import _xla  # noqa: E402

pytestmark = pytest.mark.jax


def test_jax_that_is_too_old(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is refused at the first call with its arrays, again at the second, and told which versions would do."""
    q = jax.numpy.ones((1, 8, 2, 16))
    monkeypatch.setattr(jax, "__version_info__", (0, 5, 3))
    monkeypatch.setattr(jax, "__version__", "0.5.3")
    for name in ("jax", "_xla"):
        monkeypatch.delitem(sys.modules, f"flashmoe_cupy.{name}", raising=False)
        monkeypatch.delattr(flashmoe_cupy, name, raising=False)
    for _ in range(2):
        with pytest.raises(DependencyError, match=r"JAX 0\.6 and newer .* JAX 0\.5\.3: pip install -U 'jax>=0\.6'"):
            flashmoe_cupy.flash_attention(q, q, q)


def test_jax_that_refuses_a_handler(monkeypatch: pytest.MonkeyPatch) -> None:
    """As one with another version of the interface does."""

    def not_mine(frame: Any) -> bool:
        raise _xla_ffi.FfiError(12, "this XLA has FFI version 1.0")

    monkeypatch.setattr(_xla_ffi, "_answer_metadata", not_mine)
    with pytest.raises(DependencyError, match=rf"(?s)JAX 0\.6 and newer.*{jax.__version__} refuses.*'jax>=0\.6,<="):
        _xla._install("flashmoe_cupy_test")


def test_pyproject_names_the_same_oldest_version() -> None:
    text = (Path(__file__).parents[1] / "pyproject.toml").read_text()
    extras = tomllib.loads(text)["project"]["optional-dependencies"]
    wanted = {(name, line) for name, lines in extras.items() for line in lines if re.match(r"jax\b", line)}
    assert wanted == {(name, f"jax>={_xla.OLDEST_JAX}") for name in ("jax", "test")}
