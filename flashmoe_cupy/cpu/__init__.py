"""The NumPy back end: the same operations on arrays in host memory, without CuPy, a driver or a GPU."""

from __future__ import annotations
