"""Modules that are loaded when they are needed, by rooms that may not import them; `__init__` says how.

"jax", "torch": whose `call` runs an operation on arrays of that framework, which it may import. "operations": which has
imported every operation.
"""

from __future__ import annotations

import sys
from typing import Any


def load(name: str) -> Any:
    """The module of that name."""
    return getattr(sys.modules["flashmoe_cupy"], f"_load_{name}")()
