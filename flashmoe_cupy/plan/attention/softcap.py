"""Softcaps that are part of the exponent of the softmax: numbers for `SoftcapExponent` and `BoundedSoftcapExponent`.

tanh(u) of small u is a polynomial, u (c[0] + c[1] u^2 + c[2] u^4 + ...), with the smallest relative error over the
range of u. cuda_src/math/softmax.cuh says what it is used for.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from flashmoe_cupy.plan.checks import FLOAT_MAX

UNBOUNDED = "SoftcapScores"  # the Hopper kernel's variant where a softcap is all that changes the scores
BOUNDED = "BoundedSoftcapScores"  # the same in bf16, for a softcap so small that no maximum has to be subtracted
VARIANTS = (UNBOUNDED, BOUNDED)

_MAX_BOUNDED = 56.0  # softcap of BOUNDED, at most: its least weight, exp(-1.5 softcap), is then normal in float32
_TANH = {
    UNBOUNDED: (0.99999946, -0.33326318, 0.13190296, -0.0444022),  # relative error 6e-7 up to u = 0.5
    BOUNDED: (0.99999785, -0.33314044, 0.13057898, -0.0409302),  # 2e-6 up to 0.6
}
_MIN_QUERY_SCALE = 2.0**-24  # of BOUNDED, so that queries from 2**-102 on stay normal: their scaling is exact
_MAX_SHORT = 0.3  # |argument| of tanh up to which BOUNDED may take two coefficients ...
_SHORT_ERROR = 8e-4  # ... if they change no exponent by more; a weight is rounded to bf16 by up to 4e-3


def variant(softmax_scale: float, softcap: float, bf16: bool) -> str:
    """The variant for a positive scale and a softcap."""
    scaled = _query_scale(softmax_scale / softcap, softcap) if softmax_scale / softcap > 0 else 0.0
    return BOUNDED if bf16 and softcap <= _MAX_BOUNDED and _MIN_QUERY_SCALE <= scaled <= 1.0 else UNBOUNDED


def _query_scale(to_tanh: float, softcap: float) -> float:
    """The power of two that brings scores of 2 to the largest |argument| of tanh that two coefficients serve.

    They leave u^5 / 60 of tanh(u) at the end of their range (2 u^5 / 15, of which a best line in u^2 leaves an eighth).
    """
    most = min(_MAX_SHORT, (_SHORT_ERROR * 60 * math.log(2) / softcap) ** 0.2)
    return float(2.0 ** min(max(math.ceil(math.log2(2 * to_tanh / most)), -1000), 1000))


def _tanh_short(end: float) -> tuple[float, float]:
    """tanh(u) / u up to u = end as a line in u^2: parallel to the chord, halfway to what lies farthest below it."""
    first, last, middle = 1.0, math.tanh(end) / end, math.tanh(end * 0.5**0.5) / (end * 0.5**0.5)
    sag = ((first + last) / 2 - middle) / 2
    return first - sag, (last - first) / end**2


def fields(kind: str, softmax_scale: float, softcap: float) -> dict[str, float | Sequence[float]]:
    """The members of fm::AttentionFwdSm90Params; zeros where `kind` is no softcap."""
    to_tanh, query_scale = 0.0, 0.0
    capped, short = [0.0] * 4, [0.0] * 2
    if kind in VARIANTS:
        query_scale = _query_scale(softmax_scale / softcap, softcap) if kind == BOUNDED else 1.0
        scale = softmax_scale / query_scale  # of the scores of scaled queries
        to_tanh = float32(scale / softcap)
        capped, short = (
            [float32(c * scale / math.log(2) * to_tanh ** (2 * k)) for k, c in enumerate(tanh)]
            for tanh in (_TANH[kind], _tanh_short(2 * to_tanh) if kind == BOUNDED else (0.0, 0.0))
        )
    return {
        "to_tanh": to_tanh,
        "softcap_exponent": capped,
        "softcap_short": short,
        "query_scale": query_scale,
    }


def float32(x: float) -> float:
    """x, or the end of float32's range that it lies beyond."""
    return max(-FLOAT_MAX, min(FLOAT_MAX, x))
