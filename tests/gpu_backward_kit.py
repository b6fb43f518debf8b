"""The truth of the GPU tests of attention's backward, written plainly in PyTorch, and how gradients are judged."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from test_gpu_truth import tensors, torch_dtype

import flashmoe_cupy
from flashmoe_cupy.testing import TOLERANCES, AttentionCase, Case, VarlenCase, error_rule, relative_error

Tensor = Any  # torch.Tensor; mypy does not follow torch
Arrays = dict[str, Any]
QKV = "q", "k", "v"


def gradients(
    t: Arrays, dout: Tensor, dlse: Tensor, dtype: Any, *, causal: bool = False,
    window_size: tuple[int, int] = (-1, -1), softmax_scale: float | None = None, softcap: float = 0.0,
) -> Arrays:  # fmt: skip
    """Gradients of sum(dout * out) + sum(dlse * lse), all products in `dtype`, the rest in at least float32.

    t: q, k, v of (batch, seq, heads, dim), sinks, alibi_slopes (batch, heads), bias (batch, heads, seq, seq). dout like
    out; dlse (batch, heads, seq). Gives out, lse, dq, dk, dv, dsinks and dbias of the whole bias.
    """
    wide = dtype if dtype == torch.float64 else torch.float32
    q, k, v = (t[name].to(dtype).transpose(1, 2) for name in QKV)
    dout = dout.to(dtype).transpose(1, 2)
    group, (sq, d), sk = q.shape[1] // max(k.shape[1], 1), q.shape[2:], k.shape[2]
    scale = d**-0.5 if softmax_scale is None else softmax_scale
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    s = (q @ k.mT).to(wide) * scale
    slope = torch.ones_like(s)
    if softcap:
        s = softcap * torch.tanh(s / softcap)
        slope = 1 - (s / softcap) ** 2
    at = torch.arange(sq, device=q.device)[:, None] + (sk - sq)
    keys = torch.arange(sk, device=q.device)
    if "alibi_slopes" in t:
        s = s - t["alibi_slopes"].to(wide)[:, :, None, None] * (at - keys).abs().to(wide)
    if "bias" in t:
        bias = t["bias"]
        s = s.masked_fill(~bias, -math.inf) if bias.dtype == torch.bool else s + bias.to(wide)
    left, right = window_size[0], 0 if causal else window_size[1]
    if right >= 0:
        s = s.masked_fill(keys > at + right, -math.inf)
    if left >= 0:
        s = s.masked_fill(keys < at - left, -math.inf)
    lse = torch.logsumexp(s, -1) if sk else torch.full(s.shape[:3], -math.inf, dtype=wide, device=q.device)
    sinks = t.get("sinks")
    if sinks is not None:
        lse = torch.logaddexp(lse, sinks.to(wide)[None, :, None].expand(lse.shape))
    p = torch.exp(s - lse.masked_fill(lse == -math.inf, 0.0)[..., None])
    low = p.to(dtype)
    out = low @ v
    delta = (dout.to(wide) * out.to(wide)).sum(-1) - dlse.to(wide)
    ds = p * ((dout @ v.mT).to(wide) - delta[..., None])
    found = {"out": out.transpose(1, 2), "lse": lse, "dbias": ds}
    ds = (ds * slope).to(dtype)
    found["dq"] = (ds @ k).to(wide) * scale
    of_keys = {"dk": (ds.mT @ q).to(wide) * scale, "dv": (low.mT @ dout).to(wide)}
    found |= {name: x.unflatten(1, (-1, group)).sum(2) for name, x in of_keys.items()}
    if sinks is not None:
        weight = torch.exp(sinks.to(wide)[None, :, None] - lse)
        found["dsinks"] = -(weight * delta).sum((0, 2))
        # What one rounding of every value of out may change it by, as roundings are random.
        found["dsinks_step"] = (weight * dout.to(wide).norm(dim=-1) * out.to(wide).norm(dim=-1)).square().sum((0, 2))
    return found | {name: found[name].transpose(1, 2) for name in ("dq", "dk", "dv")}


def entries(case: Case, t: Arrays) -> list[tuple[Any, Any, Arrays]]:
    """For each entry or sequence: indices of its rows of q and of k along the leading axes, and its arrays."""
    found = []
    packed = isinstance(case, VarlenCase)
    slopes = t.get("alibi_slopes")
    for b, ((q0, q1), (k0, k1)) in enumerate(zip(case.spans("q"), case.spans("k"), strict=True)):
        at_q, at_k = (slice(q0, q1), slice(k0, k1)) if packed else ((b, slice(q0, q1)), (b, slice(k0, k1)))
        one = {name: t[name][at_q if name == "q" else at_k][None] for name in QKV}
        if slopes is not None:
            one["alibi_slopes"] = slopes[b : b + 1] if slopes.ndim == 2 else slopes[None]
        if "sinks" in t:
            one["sinks"] = t["sinks"]
        if "bias" in t:
            assert isinstance(case, AttentionCase)
            full = t["bias"].expand(case.batch, case.heads_q, case.seqlen_q, case.seqlen_k)
            one["bias"] = full[b : b + 1, :, q0:q1, k0:k1]
        found.append((at_q, at_k, one))
    return found


class Problem:
    """A case with its arrays, out and lse, what arrives at them, the truth, and what the low dtype can give of it."""

    def __init__(self, case: Case, device: str = "cuda", seed: int = 0) -> None:
        self.case, self.t = case, tensors(case, device, seed)
        q, v = self.t["q"], self.t["v"]
        packed = isinstance(case, VarlenCase)
        generator = torch.Generator(device).manual_seed(seed + 1)
        shape = (*q.shape[:-1], v.shape[-1])
        rows = (q.shape[1], q.shape[0]) if packed else (q.shape[0], q.shape[2], q.shape[1])
        self.dout = torch.randn(shape, generator=generator, device=device, dtype=q.dtype)
        self.dlse = torch.randn(rows, generator=generator, device=device)
        self.out = torch.full(shape, math.nan, dtype=q.dtype, device=device)
        self.lse = torch.full(rows, math.nan, device=device)
        exact, low = torch.float64, q.dtype
        self.wanted = ["dq", "dk", "dv"] + ["dsinks"] * bool(case.sinks)
        bias = self.t.get("bias")
        if bias is not None and bias.dtype != torch.bool:
            self.wanted.append("dbias")
        self.truth, self.low = self._empty(exact), self._empty(torch.float32)
        options = {name: x for name, x in case.options().items() if not name.startswith("max_")}
        for at_q, at_k, one in entries(case, self.t):
            b, rows_q = (slice(None), at_q) if packed else at_q
            dout, dlse = self.dout[at_q][None], self.dlse[b, rows_q] if packed else self.dlse[b, :, rows_q]
            for into, dtype in ((self.truth, exact), (self.low, low)):
                made = gradients(one, dout, dlse[None], dtype, **options)
                if dtype == exact:
                    self.out[at_q] = made["out"][0].to(low)
                    if packed:
                        self.lse[:, rows_q] = made["lse"][0].float()
                    else:
                        self.lse[b, :, rows_q] = made["lse"][0].float()
                into["dq"][at_q] = made["dq"][0].to(into["dq"].dtype)
                for name in ("dk", "dv"):
                    into[name][at_k] = made[name][0].to(into[name].dtype)
                if "dsinks" in into:
                    into["dsinks"] += made["dsinks"]
                    into["dsinks_step"] += made["dsinks_step"]
                if "dbias" in into:
                    into["dbias"][b, :, rows_q, at_k[1]] = made["dbias"][0].to(into["dbias"].dtype)
        for into in (self.truth, self.low):
            if bias is not None and "dbias" in into:
                into["dbias"] = summed(into["dbias"], bias.shape)

    def _empty(self, dtype: Any) -> Arrays:
        found = {f"d{name}": torch.zeros(self.t[name].shape, dtype=dtype, device=self.dout.device) for name in QKV}
        if "dsinks" in self.wanted:
            for name in ("dsinks", "dsinks_step"):
                found[name] = torch.zeros(self.t["sinks"].shape, dtype=dtype, device=self.dout.device)
        if "dbias" in self.wanted:
            case: Any = self.case
            full = (case.batch, case.heads_q, case.seqlen_q, case.seqlen_k)
            found["dbias"] = torch.zeros(full, dtype=dtype, device=self.dout.device)
        return found

    def arguments(self, **changed: Any) -> Arrays:
        """Of a call of the backward, in the layout bshd; need is all that has a gradient."""
        return {
            **self.t, **self.case.options(), "dout": self.dout, "out": self.out, "lse": self.lse, "dlse": self.dlse,
            "need": tuple(name.removeprefix("d") for name in self.wanted), **changed,
        }  # fmt: skip

    def run(self, **changed: Any) -> Arrays:
        """The library's gradients, by name."""
        packed = isinstance(self.case, VarlenCase)
        function: Any = flashmoe_cupy.flash_attention_varlen_backward if packed else (
            flashmoe_cupy.flash_attention_backward
        )  # fmt: skip
        made = function(**self.arguments(**changed))
        return {name: x for name, x in made._asdict().items() if x is not None}

    def faults(self, found: Arrays, names: Sequence[str] = ()) -> list[str]:
        """What is wrong with gradients in new arrays; rows that do not count must be 0."""
        wrong = [] if names or set(found) == set(self.wanted) else [f"made {sorted(found)}"]
        for name in names or found:
            mine, want = found[name], self.truth[name]
            if mine.dtype != (self.t[name[1:]].dtype):
                wrong.append(f"{name} has dtype {mine.dtype}")
            if not bool(mine.isfinite().all()):
                wrong.append(f"{name} is not finite")
            elif self.case.dtype == "float32":
                error, limit = relative_error(mine.double(), want), 2e-5 * (3 if self.case.softcap else 1)
                if not error <= limit:
                    wrong.append(f"{name}: relative error {error:.3g}, allowed {limit:.3g}")
            elif name == "dsinks":
                step = TOLERANCES[self.case.dtype].eps * self.truth["dsinks_step"].sqrt().max()
                error, base = (float((x.double() - want).abs().max()) for x in (mine, self.low[name]))
                if not error <= 2 * base + step + TOLERANCES[self.case.dtype].eps * float(want.abs().max()):
                    wrong.append(f"{name}: max error {error:.3g}, allowed 2 x {base:.3g} + {float(step):.3g}")
            else:
                low = self.low[name].to(torch_dtype(self.case.dtype)).double()
                verdict = error_rule(mine.double(), want, low, softcap=self.case.softcap)
                norm, base = relative_error(mine.double(), want), relative_error(low, want)
                if not verdict:
                    wrong.append(f"{name}: {verdict.text}")
                if not norm <= 2 * base + 2.0**-8:
                    wrong.append(f"{name}: relative error {norm:.3g}, that of the low dtype {base:.3g}")
        return wrong


def summed(x: Tensor, shape: Sequence[int]) -> Tensor:
    """The gradient of broadcasting to x's shape."""
    x = x.sum(tuple(range(x.ndim - len(shape)))) if x.ndim > len(shape) else x
    for axis, n in enumerate(shape):
        if n == 1 and x.shape[axis] != 1:
            x = x.sum(axis, keepdim=True)
    return x
