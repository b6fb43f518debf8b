"""The activations of a mixture of experts on the CPU, in float32."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

F32 = NDArray[np.float32]


def activate(name: str, h: F32, interleaved: bool, alpha: float, limit: float) -> F32:
    """(rows, 2n) of a gated activation, (rows, n) of another, to (rows, n). limit: 0: nothing is clamped."""
    if name in ("relu", "relu2"):
        positive: F32 = np.maximum(h, 0)
        return np.square(positive) if name == "relu2" else positive
    if name in ("gelu", "gelu_tanh"):
        return _gelu(h) if name == "gelu" else _gelu_tanh(h)
    n = h.shape[1] // 2
    g, u = (h[:, 0::2], h[:, 1::2]) if interleaved else (h[:, :n], h[:, n:])
    result: F32
    if name == "geglu":
        result = _gelu(g) * u
    elif name == "geglu_tanh":
        result = _gelu_tanh(g) * u
    else:
        if limit:
            g, u = np.minimum(g, np.float32(limit)), np.clip(u, np.float32(-limit), np.float32(limit))
        if name == "swiglu":
            return np.asarray(g / (np.exp(-g) + 1) * u)
        result = (u + 1) * (g / (np.exp(np.float32(-alpha) * g) + 1))
    return result


def _gelu_tanh(x: F32) -> F32:
    inner = np.float32(math.sqrt(2 / math.pi)) * (x + np.float32(0.044715) * x * x * x)
    result: F32 = np.float32(0.5) * x * (1 + np.tanh(inner))
    return result


# The normal distribution and its density at multiples of 1/64 from -14 to 6. Beyond, x times the distribution is 0 or x
# in float32.
_PER_UNIT, _LOW, _HIGH = 64, -14, 6
_POINTS = [i / _PER_UNIT for i in range(_LOW * _PER_UNIT, _HIGH * _PER_UNIT + 1)]
_NORMAL = np.array([0.5 * math.erfc(-x / math.sqrt(2)) for x in _POINTS], np.float32)
_DENSITY = np.array([math.exp(-x * x / 2) / math.sqrt(2 * math.pi) for x in _POINTS], np.float32)
_NORMAL[0] = _DENSITY[0] = 0.0  # so that every x below -14 gives 0


def _gelu(x: F32) -> F32:
    """x times the normal distribution, by its Taylor series around the nearest point of the table.

    NumPy has no error function. The first term left out is d^4/24 (3 x - x^3) density, d at most 1/128.
    """
    t = np.fmin(np.fmax(x, np.float32(_LOW)), np.float32(_HIGH))  # a NaN becomes _LOW; the product with x restores it
    nearest = np.rint(t * _PER_UNIT)
    index = nearest.astype(np.int32) - _LOW * _PER_UNIT
    point = nearest / np.float32(_PER_UNIT)
    d = t - point
    series = d * (1 - d * point / 2 + d * d * (point * point - 1) / 6)
    result: F32 = x * (_NORMAL[index] + _DENSITY[index] * series)
    return result
