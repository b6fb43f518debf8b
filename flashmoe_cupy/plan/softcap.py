"""Softcaps that are part of the exponent of the softmax: numbers for `SoftcapExponent` and `BoundedSoftcapExponent`.

tanh(u) of small u is a polynomial, u (c[0] + c[1] u^2 + c[2] u^4 + ...), with the smallest relative error over the
range of u. cuda_src/math/softmax.cuh says what it is used for.
"""

from __future__ import annotations

import math

UNBOUNDED = "SoftcapScores"  # the Hopper kernel's variant where a softcap is all that changes the scores
BOUNDED = "BoundedSoftcapScores"  # the same in bf16, for a softcap that leaves no exponent too large
VARIANTS = (UNBOUNDED, BOUNDED)

_FLOAT_MAX = 3.4028234663852886e38
_MOST = 56.0  # softcap of BOUNDED
_TANH = {
    UNBOUNDED: (0.99999946, -0.33326318, 0.13190296, -0.0444022),  # relative error 6e-7 up to u = 0.5
    BOUNDED: (0.99999785, -0.33314044, 0.13057898, -0.0409302),  # 2e-6 up to 0.6
}
_TANH_SHORT = (0.9999738, -0.32807637)  # 3e-5 up to 0.2


def variant(softmax_scale: float, softcap: float, bf16: bool) -> str:
    """The variant for a positive scale and a softcap."""
    scaled = _query_scale(softmax_scale / softcap) if softmax_scale / softcap > 0 else 0.0
    return BOUNDED if bf16 and softcap <= _MOST and 2.0**-24 <= scaled <= 1.0 else UNBOUNDED


def _query_scale(to_tanh: float) -> float:
    """The power of two that brings scores of 1 to an |argument| of tanh in (0.6, 1.2]."""
    return float(2.0 ** min(max(math.ceil(math.log2(to_tanh / 1.2)), -1000), 1000))


def fields(kind: str, softmax_scale: float, softcap: float) -> dict[str, float]:
    """The fields of fm::AttentionFwdSm90Params, in their order; zeros where `kind` is no softcap."""
    to_tanh, query_scale = 0.0, 0.0
    capped, short = [0.0] * 4, [0.0] * 2
    if kind in VARIANTS:
        query_scale = _query_scale(softmax_scale / softcap) if kind == BOUNDED else 1.0
        scale = softmax_scale / query_scale  # of the scores of scaled queries
        to_tanh = float32(scale / softcap)
        capped, short = (
            [float32(c * scale / math.log(2) * to_tanh ** (2 * k)) for k, c in enumerate(tanh)]
            for tanh in (_TANH[kind], _TANH_SHORT)
        )
    return {
        "to_tanh": to_tanh,
        **{f"softcap_exponent_{k}": c for k, c in enumerate(capped)},
        **{f"softcap_short_{k}": c for k, c in enumerate(short)},
        "query_scale": query_scale,
    }


def float32(x: float) -> float:
    """The nearest number that a float32 holds."""
    return max(-_FLOAT_MAX, min(_FLOAT_MAX, x))
