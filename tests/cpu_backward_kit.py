"""The gradient on the NumPy back end: calls of it, its truth, and how it is judged."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from flashmoe_cupy import reference
from flashmoe_cupy.arrays import view
from flashmoe_cupy.cpu import attention as forward
from flashmoe_cupy.cpu.attention_backward import attention_backward
from flashmoe_cupy.plan.attention.problem import attention_problem, varlen_problem
from flashmoe_cupy.testing import Case, VarlenCase, error_rule

Array = Any  # NumPy arrays; Any, so that dicts of arguments may be unpacked

SPECIAL = 77.0  # what gradients hold before the call in rows that do not count; the others hold NaN
NAMES = {"dq": "q", "dk": "k", "dv": "v", "dsinks": "sinks", "dbias": "bias"}  # each gradient, and of what it is one


class Call(NamedTuple):
    """The arguments of a call of attention_backward, but for the gradients."""

    problem: Any
    positional: tuple[Array, Array, Array, Array, Array, Array]  # dout, q, k, v, out, lse
    optional: dict[str, Array]
    dlse: Array | None

    def run(self, grads: dict[str, Array]) -> dict[str, Array]:
        function: Any = attention_backward
        function(self.problem, *self.positional, dlse=self.dlse, **grads, **self.optional)
        return grads


def prepared(case: Case, arrays: dict[str, Array], dout: Array | None = None) -> Call:
    """Run the forward. Rows that do not count are NaN in everything but the gradients."""
    rng = np.random.default_rng(7)
    packed = isinstance(case, VarlenCase)
    make: Any = varlen_problem if packed else attention_problem
    problem = make(**{name: view(a, name) for name, a in arrays.items()}, **case.options())
    inputs = dict(arrays)
    q, k, v = (inputs.pop(name) for name in "qkv")
    out: Array = np.full((*q.shape[:-1], v.shape[-1]), np.nan, q.dtype)
    lse: Array = np.full((q.shape[1::-1] if packed else (q.shape[0], q.shape[2], q.shape[1])), np.nan, np.float32)
    forward.attention(problem, q, k, v, out, lse, **inputs)
    if dout is None:
        dout = rng.standard_normal(out.shape).astype(q.dtype)
        dout[~counted(case, "q")] = np.nan
    dlse: Array = rng.standard_normal(lse.shape, np.float32)
    dlse.swapaxes(-1, -2)[~counted(case, "q")] = np.nan
    return Call(problem, (dout, q, k, v, out, lse), inputs, dlse)


def counted(case: Case, which: str) -> Array:
    """Which rows of q, or of k, count: (batch, seqlen) or (total,)."""
    if isinstance(case, VarlenCase):
        lengths, tail = (case.lengths_q, case.tail_q) if which == "q" else (case.lengths_k, case.tail_k)
        rows = np.zeros(sum(lengths) + tail, bool)
        for start, stop in case.spans(which):
            rows[start:stop] = True
        return rows
    rows = np.zeros((case.batch, case.seqlen_q if which == "q" else case.seqlen_k), bool)
    for one, (start, stop) in zip(rows, case.spans(which), strict=True):
        one[start:stop] = True
    return rows


def blank(case: Case, arrays: dict[str, Array]) -> dict[str, Array]:
    """Arrays for all gradients: NaN, and SPECIAL in rows that do not count."""
    grads = {name: np.full_like(arrays[of], np.nan) for name, of in NAMES.items() if of in arrays and
             arrays[of].dtype != np.bool_}  # fmt: skip
    for name in ("dq", "dk", "dv"):
        grads[name][~counted(case, "q" if name == "dq" else "k")] = SPECIAL
    return grads


def truth(case: Case, arrays: dict[str, Array], call: Call, own: bool = False) -> dict[str, Array]:
    """The gradients in float64, with out and lse of its own or, if `own`, with those of the call."""
    function: Any = reference.flash_attention_backward
    if isinstance(case, VarlenCase):
        function = reference.flash_attention_varlen_backward
    dout, _, _, _, out, lse = call.positional
    given = {"out": out, "lse": lse} if own else {}
    grads: dict[str, Array] = function(dout, **arrays, **case.options(), dlse=call.dlse, **given)._asdict()
    return grads


def naive(case: Case, arrays: dict[str, Array], call: Call) -> dict[str, Array]:
    """The gradients by the same formulas with every matrix rounded to the dtype of q, as a plain framework has them."""
    dtype, options = arrays["q"].dtype, case.options()

    def low(x: Array) -> Array:
        return x.astype(dtype).astype(np.float32)

    packed = isinstance(case, VarlenCase)
    given = {n: np.asarray(a, np.float32) for n, a in arrays.items() if n in ("q", "k", "v", "sinks", "alibi_slopes")}
    dout, dlse = call.positional[0].astype(np.float32), call.dlse
    q, k, v, dout = (a[None] if packed else a for a in (given["q"], given["k"], given["v"], dout))
    dlse = dlse[None] if packed and dlse is not None else dlse
    heads, group = q.shape[2], q.shape[2] // k.shape[2]
    full: Array = (q.shape[0], heads, q.shape[1], k.shape[1])
    bias = np.broadcast_to(arrays["bias"], full) if "bias" in arrays else None
    dq, dk, dv, dsinks = np.zeros_like(q), np.zeros_like(k), np.zeros_like(v), np.zeros(heads, np.float32)
    dbias = np.zeros(full if bias is not None else 0, np.float32)
    scale = q.shape[3] ** -0.5 if options["softmax_scale"] is None else options["softmax_scale"]
    left, right = options["window_size"]
    right = 0 if options["causal"] else right
    for n, spans in enumerate(zip(case.spans("q"), case.spans("k"), strict=True)):
        b, rows, keys = 0 if packed else n, slice(*spans[0]), slice(*spans[1])
        x = np.arange(rows.stop - rows.start)[:, None] + (keys.stop - keys.start) - (rows.stop - rows.start)
        x = x - np.arange(keys.stop - keys.start)
        seen = ((right < 0) | (-x <= right)) & ((left < 0) | (x <= left))
        for h in range(heads):
            own_q, own_k, own_v = q[b, rows, h], k[b, keys, h // group], v[b, keys, h // group]
            s, slope, keep = low(low(own_q @ own_k.T) * scale), np.float32(1.0), seen
            if options["softcap"]:
                s = low(np.tanh(low(s / options["softcap"])))
                s, slope = low(options["softcap"] * s), low(1 - low(s * s))
            if "alibi_slopes" in given:
                s = low(s - np.broadcast_to(given["alibi_slopes"], (len(case.spans("q")), heads))[n, h] * np.abs(x))
            if bias is not None:
                one = bias[b, h, rows, keys]
                keep = seen & one if one.dtype == np.bool_ else seen
                s = s if one.dtype == np.bool_ else low(s + one.astype(np.float32))
            s = np.where(keep, s, -np.inf)
            sink = given["sinks"][h] if "sinks" in given else -np.inf
            m = np.maximum(s.max(axis=1, initial=-np.inf), sink)[:, None]
            m = np.where(m == -np.inf, 0.0, m)
            total = np.exp(s - m).sum(axis=1, keepdims=True) + np.exp(sink - m)
            total[total == 0] = 1
            p, p_sink = low(np.exp(s - m) / total), low(np.exp(sink - m) / total)[:, 0]
            own = dout[b, rows, h]
            delta = low((own * low(p @ own_v)).sum(axis=1)) - (0 if dlse is None else dlse[b, h, rows])
            ds = low(p * (low(own @ own_v.T) - delta[:, None]))
            if bias is not None:
                dbias[b, h, rows, keys] = ds
            ds = low(ds * slope)
            dq[b, rows, h] = scale * (ds @ own_k)
            dk[b, keys, h // group] += low(scale * (ds.T @ own_q))
            dv[b, keys, h // group] += low(p.T @ own)
            dsinks[h] -= (p_sink * delta).sum()
    grads = {"dq": dq[0] if packed else dq, "dk": dk[0] if packed else dk, "dv": dv[0] if packed else dv}
    if bias is not None:
        shape = arrays["bias"].shape
        dbias = dbias.sum(axis=tuple(range(4 - len(shape))))
        dbias = dbias.sum(axis=tuple(a for a, n in enumerate(shape) if n == 1), keepdims=True)
    grads |= {"dsinks": dsinks, "dbias": dbias}
    return {name: grads[name].astype(arrays[of].dtype) for name, of in NAMES.items() if of in arrays}


def check(case: Case, arrays: dict[str, Array], call: Call, grads: dict[str, Array]) -> None:
    """float32: rtol 1e-4, and beside the largest value 1e-5, as products cancel. 16 bits: FlashAttention's rule.

    dsinks and dbias may have few elements, so that the naive evaluation comes near by luck. They are held to the truth
    of the out and lse that the call was given, whose rounding then is not theirs.
    """
    ref = truth(case, arrays, call)
    own = truth(case, arrays, call, own=True) if "dsinks" in grads or "dbias" in grads else ref
    rough: dict[str, Array] = {} if case.dtype == "float32" else naive(case, arrays, call)
    for name, grad in grads.items():
        want = ref[name] if name in ("dq", "dk", "dv") else own[name]
        if name in ("dq", "dk", "dv"):
            rows = counted(case, "q" if name == "dq" else "k")
            assert np.all(grad[~rows] == SPECIAL)
            grad, want = grad[rows], want[rows]
            rough = rough | ({name: rough[name][rows]} if rough else {})
        assert grad.shape == want.shape, name
        if grad.dtype == np.float32:
            atol = 1e-5 * max(1.0, np.abs(want).max(initial=0.0))
            np.testing.assert_allclose(grad, want, rtol=1e-4, atol=atol, err_msg=name)
        else:
            verdict = error_rule(grad, want, rough[name], softcap=case.softcap)
            assert verdict, (name, verdict.text)


def check_case(case: Case, seed: int = 0) -> None:
    arrays: dict[str, Array] = case.random(seed)
    call = prepared(case, arrays)
    check(case, arrays, call, call.run(blank(case, arrays)))


def same(a: dict[str, Array], b: dict[str, Array]) -> None:
    for name in a:
        assert a[name].tobytes() == b[name].tobytes(), name
