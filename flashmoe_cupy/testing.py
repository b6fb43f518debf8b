"""Error metrics, a tolerance table and random problems, for our tests and for users' own.

The metrics take arrays of any one library (NumPy, CuPy, PyTorch, JAX) and compute in the reference's dtype where the
arrays are: only the final numbers come to the host. The random problems are NumPy arrays.

Two rules judge a 16-bit result against a reference in higher precision:

* `error_rule`, the rule of FlashAttention's own tests: max|out - ref| may be at most `r` times the error of the same
  maths done naively in the low dtype, plus the size of one rounding step.
* `row_rule`, stricter at long sequences, where outputs are small: the same comparison with each row's error divided by
  that row's norm, so that a single key block missed in a single row is seen.

fp32 results are judged by `relative_error` to a float64 reference, at most 1e-5. Random problems for mixtures of
experts: testing_moe.py.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

__all__ = [
    "TOLERANCES", "AttentionCase", "Case", "Tolerance", "VarlenCase", "Verdict", "compare_lse", "error_rule",
    "max_error", "relative_error", "row_error", "row_rule", "within_tolerance",
]  # fmt: skip


class Tolerance(NamedTuple):
    """What a correct result of one dtype keeps to, against float64 on the same inputs.

    eps: one rounding step of the dtype, relative. norm: `relative_error`. row: `row_error`.
    lse: absolute error of the log-sum-exp, plus 1e-5 of its size.
    """

    eps: float
    norm: float
    row: float
    lse: float


TOLERANCES: dict[str, Tolerance] = {
    "bfloat16": Tolerance(eps=2.0**-8, norm=6e-3, row=2.5e-2, lse=2e-4),
    "float16": Tolerance(eps=2.0**-11, norm=8e-4, row=4e-3, lse=2e-4),
    "float32": Tolerance(eps=2.0**-24, norm=1e-5, row=1e-4, lse=2e-5),
}
"""Tolerances by the dtype of q, k and v, for inputs of unit scale; with a softcap allow three times as much."""


class Verdict(NamedTuple):
    """Outcome of a comparison: true when it passed; `text` says what was measured and what was allowed."""

    passed: bool
    error: float
    allowed: float
    text: str

    def __bool__(self) -> bool:
        return self.passed


# ---------------------------------------------------------------------------------------------------------------------
# metrics, for arrays of any library


def _cast(a: Any, dtype: Any) -> Any:
    return a.to(dtype) if hasattr(a, "to") and not hasattr(a, "astype") else a.astype(dtype)


def _difference(out: Any, ref: Any) -> Any:
    if tuple(out.shape) != tuple(ref.shape):
        raise ValueError(f"shapes differ: {tuple(out.shape)} and {tuple(ref.shape)}")
    return _cast(out, ref.dtype) - ref


def max_error(out: Any, ref: Any) -> float:
    """max|out - ref|, computed in ref's dtype; NaN when either holds a NaN; 0 for empty arrays."""
    return float(abs(_difference(out, ref)).max()) if math.prod(ref.shape) else 0.0


def relative_error(out: Any, ref: Any) -> float:
    """Frobenius norm of out - ref over that of ref, computed in ref's dtype. 0 when both are zero or empty."""
    d = _difference(out, ref)
    top, bottom = math.sqrt(float((d * d).sum())), math.sqrt(float((ref * ref).sum()))
    return top / bottom if bottom else (0.0 if top == 0.0 else math.inf if top == top else math.nan)


def row_error(out: Any, ref: Any) -> float:
    """Worst row's relative error, a row being the last axis; NaN when either array holds a NaN.

    A row that is zero in ref must be exactly zero in out: else the error is inf.
    """
    if not math.prod(ref.shape):
        return 0.0
    d = _difference(out, ref)
    top, bottom = (d * d).sum(-1), (ref * ref).sum(-1)
    empty = bottom == 0
    if bool((empty & (d != 0).any(-1)).any()):  # not `top`: squares of small numbers vanish
        return math.inf
    return math.sqrt(float((top / (bottom + _cast(empty, bottom.dtype))).max()))


def error_rule(out: Any, ref: Any, low: Any, *, softcap: float = 0.0) -> Verdict:
    """FlashAttention's acceptance rule: max|out - ref| <= r * max|low - ref| + a.

    out: the result under test. ref: the same in high precision. low: the same maths done naively in out's dtype. All of
    one shape and library. r is 2, or 3 with a softcap; a = 2 * max|(x + 0.3 - 0.3) - x| with x = ref rounded to low's
    dtype, which is about one rounding step. Source: hopper/test_flash_attn.py of Dao-AILab/flash-attention.
    """
    if not math.prod(ref.shape):
        return Verdict(True, 0.0, 0.0, "empty")
    x = _cast(ref, low.dtype)
    slack = 2.0 * float(abs((x + 0.3 - 0.3) - x).max())
    error, base, r = max_error(out, ref), max_error(low, ref), 3 if softcap else 2
    allowed = r * base + slack
    return Verdict(error <= allowed, error, allowed, f"max error {error:.3g}, allowed {r} x {base:.3g} + {slack:.3g}")


def row_rule(out: Any, ref: Any, low: Any, *, eps: float, softcap: float = 0.0) -> Verdict:
    """As `error_rule`, on `row_error`, with 2 * eps for the constant (eps: `TOLERANCES[dtype].eps`)."""
    error, base, r = row_error(out, ref), row_error(low, ref), 3 if softcap else 2
    allowed = r * base + 2 * eps
    return Verdict(error <= allowed, error, allowed, f"row error {error:.3g}, allowed {r} x {base:.3g} + {2 * eps:.3g}")


def compare_lse(lse: Any, ref: Any, *, atol: float, rtol: float = 1e-5) -> Verdict:
    """Log-sum-exps agree: -inf (a row with no visible key) in the same places, elsewhere within atol + rtol * |ref|."""
    if tuple(lse.shape) != tuple(ref.shape):
        return Verdict(False, math.nan, atol, f"lse has shape {tuple(lse.shape)}, expected {tuple(ref.shape)}")
    if not math.prod(ref.shape):
        return Verdict(True, 0.0, atol, "empty")
    low, mine = ref == -math.inf, _cast(lse, ref.dtype)
    if bool((low != (mine == -math.inf)).any()):
        return Verdict(False, math.inf, atol, "lse is -inf in the wrong rows")
    # the masked entries are replaced before the subtraction, since (-inf) - (-inf) is NaN
    flat, want = mine[~low], ref[~low]
    if not math.prod(want.shape):
        return Verdict(True, 0.0, atol, "every row is masked")
    excess = abs(flat - want) - rtol * abs(want)
    error = float(excess.max())
    return Verdict(error <= atol, error, atol, f"lse error {error:.3g}, allowed {atol:.3g} beyond {rtol:g} of its size")


def within_tolerance(out: Any, ref: Any, dtype: str, *, softcap: float = 0.0) -> Verdict:
    """out against a float64 reference by `TOLERANCES[dtype]`, norm and row both; three times that with a softcap."""
    t, r = TOLERANCES[dtype], 3 if softcap else 1
    norm, row = relative_error(out, ref), row_error(out, ref)
    text = f"relative error {norm:.3g} (allowed {r * t.norm:.3g}), worst row {row:.3g} (allowed {r * t.row:.3g})"
    return Verdict(norm <= r * t.norm and row <= r * t.row, norm, r * t.norm, text)


# ---------------------------------------------------------------------------------------------------------------------
# random problems


class AttentionCase(NamedTuple):
    """One problem for `flash_attention`: sizes, dtype and features. Hashable, and its text reproduces it.

    head_dim_v 0 means head_dim. sinks: "" none, "float32", or "same" for q's dtype. alibi: "" none, "h" one slope per
    head, "bh" per batch and head. bias: its shape as letters of (b)atch, (h)ead, (q)uery, (k)ey and 1, such as "bhqk",
    "h1k", "qk"; bias_dtype: "same", "float32" or "bool". left_q, left_k, used_q, used_k: of entry b rows left[b] ...
    used[b] - 1 count; empty: from the first, or to the last.
    """

    seqlen_q: int
    seqlen_k: int
    batch: int = 2
    heads_q: int = 2
    heads_k: int = 2
    head_dim: int = 64
    head_dim_v: int = 0
    dtype: str = "bfloat16"
    causal: bool = False
    window_size: tuple[int, int] = (-1, -1)
    softmax_scale: float | None = None
    softcap: float = 0.0
    sinks: str = ""
    alibi: str = ""
    bias: str = ""
    bias_dtype: str = "same"
    left_q: tuple[int, ...] = ()
    left_k: tuple[int, ...] = ()
    used_q: tuple[int, ...] = ()
    used_k: tuple[int, ...] = ()

    def __str__(self) -> str:
        return case_text(self)

    @property
    def dim_v(self) -> int:
        """head_dim_v with its default filled in."""
        return self.head_dim_v or self.head_dim

    def options(self) -> dict[str, Any]:
        """Keyword arguments of `flash_attention` that are not arrays."""
        return {
            "causal": self.causal,
            "window_size": self.window_size,
            "softmax_scale": self.softmax_scale,
            "softcap": self.softcap,
        }

    def spans(self, which: str) -> list[tuple[int, int]]:
        """Per batch entry, the rows [start, stop) that count, for which = "q" or "k"."""
        left, used, n = (self.left_q, self.used_q, self.seqlen_q)
        if which == "k":
            left, used, n = (self.left_k, self.used_k, self.seqlen_k)
        return [(left[b] if left else 0, used[b] if used else n) for b in range(self.batch)]

    def indices(self) -> dict[str, Any]:
        """leftpad_q and so on, where given: int32."""
        names = {"seqused_q": self.used_q, "seqused_k": self.used_k, "leftpad_q": self.left_q, "leftpad_k": self.left_k}
        return {name: np.array(n, np.int32) for name, n in names.items() if n}

    def shapes(self) -> Iterator[tuple[str, tuple[int, ...], str]]:
        """(argument, shape in layout bshd, dtype name) of each floating-point or boolean array."""
        b, d = self.batch, self.head_dim
        yield "q", (b, self.seqlen_q, self.heads_q, d), self.dtype
        yield "k", (b, self.seqlen_k, self.heads_k, d), self.dtype
        yield "v", (b, self.seqlen_k, self.heads_k, self.dim_v), self.dtype
        if self.sinks:
            yield "sinks", (self.heads_q,), self.dtype if self.sinks == "same" else self.sinks
        if self.alibi:
            yield "alibi_slopes", (self.heads_q,) if self.alibi == "h" else (b, self.heads_q), "float32"
        if self.bias:
            letter = {"b": b, "h": self.heads_q, "q": self.seqlen_q, "k": self.seqlen_k, "1": 1}
            dtype = self.dtype if self.bias_dtype == "same" else self.bias_dtype
            yield "bias", tuple(letter[c] for c in self.bias), dtype

    def random(self, seed: int = 0) -> dict[str, Any]:
        """Normal q, k, v, bias and sinks, slopes in (0, 1), boolean biases that let three keys in four through.

        With the lengths, where given; rows of q, k and v that do not count are NaN.
        """
        out = {n: _random(n, s, t, np.random.default_rng((seed, i))) for i, (n, s, t) in enumerate(self.shapes())}
        for name in "qkv":
            for one, (start, stop) in zip(out[name], self.spans("q" if name == "q" else "k"), strict=True):
                one[:start], one[stop:] = np.nan, np.nan
        return out | self.indices()


class VarlenCase(NamedTuple):
    """One problem for `flash_attention_varlen`: the lengths of each sequence and the features.

    lengths_q, lengths_k: rows that each sequence owns in the packed arrays. used_q, used_k: how many of them count, or
    empty for all. tail_q, tail_k: rows behind the last sequence that belong to nobody. The rest as in `AttentionCase`.
    """

    lengths_q: tuple[int, ...]
    lengths_k: tuple[int, ...]
    used_q: tuple[int, ...] = ()
    used_k: tuple[int, ...] = ()
    tail_q: int = 0
    tail_k: int = 0
    heads_q: int = 2
    heads_k: int = 2
    head_dim: int = 64
    head_dim_v: int = 0
    dtype: str = "bfloat16"
    causal: bool = False
    window_size: tuple[int, int] = (-1, -1)
    softmax_scale: float | None = None
    softcap: float = 0.0
    sinks: str = ""
    alibi: str = ""

    def __str__(self) -> str:
        return case_text(self)

    @property
    def dim_v(self) -> int:
        """head_dim_v with its default filled in."""
        return self.head_dim_v or self.head_dim

    def options(self) -> dict[str, Any]:
        """Keyword arguments of `flash_attention_varlen` that are not arrays; the maxima are exact."""
        return {
            "max_seqlen_q": max(self.lengths_q, default=0),
            "max_seqlen_k": max(self.lengths_k, default=0),
            "causal": self.causal,
            "window_size": self.window_size,
            "softmax_scale": self.softmax_scale,
            "softcap": self.softcap,
        }

    def spans(self, which: str) -> list[tuple[int, int]]:
        """Per sequence, the rows [start, stop) that count, for which = "q" or "k"."""
        lengths, used = (self.lengths_q, self.used_q) if which == "q" else (self.lengths_k, self.used_k)
        starts = [sum(lengths[:i]) for i in range(len(lengths))]
        return [(s, s + (used[i] if used else lengths[i])) for i, s in enumerate(starts)]

    def indices(self) -> dict[str, Any]:
        """cu_seqlens_q, cu_seqlens_k and, where given, seqused_q and seqused_k: int32."""
        lengths = {"cu_seqlens_q": self.lengths_q, "cu_seqlens_k": self.lengths_k}
        used = {"seqused_q": self.used_q, "seqused_k": self.used_k}
        cu = {name: np.cumsum([0, *n]).astype(np.int32) for name, n in lengths.items()}
        return cu | {name: np.array(n, np.int32) for name, n in used.items() if n}

    def shapes(self) -> Iterator[tuple[str, tuple[int, ...], str]]:
        """(argument, shape, dtype name) of each floating-point array."""
        total_q, total_k = sum(self.lengths_q) + self.tail_q, sum(self.lengths_k) + self.tail_k
        yield "q", (total_q, self.heads_q, self.head_dim), self.dtype
        yield "k", (total_k, self.heads_k, self.head_dim), self.dtype
        yield "v", (total_k, self.heads_k, self.dim_v), self.dtype
        if self.sinks:
            yield "sinks", (self.heads_q,), self.dtype if self.sinks == "same" else self.sinks
        if self.alibi:
            h = (self.heads_q,)
            yield "alibi_slopes", h if self.alibi == "h" else (len(self.lengths_q), *h), "float32"

    def random(self, seed: int = 0) -> dict[str, Any]:
        """As `AttentionCase.random`, with the index arrays; rows of q, k and v that do not count are NaN."""
        out = {n: _random(n, s, t, np.random.default_rng((seed, i))) for i, (n, s, t) in enumerate(self.shapes())}
        for name in "qkv":
            idle = np.ones(len(out[name]), bool)
            for start, stop in self.spans("q" if name == "q" else "k"):
                idle[start:stop] = False
            out[name][idle] = np.nan
        return out | self.indices()


Case = AttentionCase | VarlenCase


def case_text(case: Any) -> str:
    """The call that makes this case, a NamedTuple, with the fields that differ from their defaults."""
    default = case._field_defaults
    fields = [f"{n}={v!r}" for n, v in case._asdict().items() if n not in default or v != default[n]]
    return f"{type(case).__name__}({', '.join(fields)})"


def _random(name: str, shape: tuple[int, ...], dtype: str, rng: np.random.Generator) -> np.ndarray[Any, Any]:
    if dtype == "bool":
        return rng.random(shape) < 0.75
    values = rng.random(shape, np.float32) if name == "alibi_slopes" else rng.standard_normal(shape, np.float32)
    if dtype == "bfloat16":
        import ml_dtypes

        return values.astype(ml_dtypes.bfloat16)
    return values.astype(dtype)
