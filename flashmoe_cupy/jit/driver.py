"""The CUDA driver library, for what CuPy does not wrap."""

from __future__ import annotations

import ctypes
import sys
from typing import Any

from flashmoe_cupy.errors import DependencyError

_library: Any = None


def library() -> Any:
    """libcuda, opened once. Raises DependencyError when there is none."""
    global _library
    if _library is None:
        try:
            _library = ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")
        except OSError as error:
            raise DependencyError(f"the CUDA driver cannot be loaded: {error}") from error
    return _library
