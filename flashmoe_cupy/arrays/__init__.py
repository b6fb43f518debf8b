"""Arrays of any library as a thin `View`, and results back in the caller's library."""

from __future__ import annotations

from flashmoe_cupy.arrays.readers import view
from flashmoe_cupy.arrays.results import empty, fill, from_numpy, keep_until_done, stream
from flashmoe_cupy.arrays.views import View, as_numpy, extent, overlap, row_major

__all__ = [
    "View", "as_numpy", "empty", "extent", "fill", "from_numpy", "keep_until_done", "overlap", "row_major", "stream",
    "view",
]  # fmt: skip
