"""What the tests of the mixture-of-experts benchmarks share: small cases, and the layer as one dense formula."""

from __future__ import annotations

from typing import Any

import numpy as np

from benchmarks.moe_cases import MOE_SUITES, MoECase

SMOKE = [case for case in MOE_SUITES["moe_smoke"].cases if case.arrays == "torch"]
TINY = MoECase("tiny", "moe_smoke", "", 11, 16, 24, 6, 2)


def case_of(suite: str, name: str) -> MoECase:
    return next(case for case in MOE_SUITES[suite].cases if case.name == name)


def named(case: MoECase) -> str:
    return case.name


def _sigmoid(x: Any) -> Any:
    return 1 / (1 + np.exp(-x))


def dense(case: MoECase, inputs: Any) -> Any:
    """Every expert on every token, weighted by a (T, E) matrix that is mostly zeros; float64 inside, a torch tensor."""
    import torch

    def wide(tensor: Any) -> Any:
        return np.float64(0) if tensor is None else tensor.double().numpy()

    combine = np.zeros((case.tokens, case.experts))
    np.put_along_axis(combine, inputs.topk_ids.long().numpy(), wide(inputs.topk_weights), 1)
    h = np.einsum("td,end->ten", wide(inputs.x), wide(inputs.w_gate_up)) + wide(inputs.b_gate_up)
    gate, up = (h[..., ::2], h[..., 1::2]) if case.interleaved else np.split(h, 2, -1)
    if case.activation == "swigluoai":
        gate, up = np.minimum(gate, 7.0), np.clip(up, -7.0, 7.0)
        a = (up + 1) * gate * _sigmoid(1.702 * gate)
    else:
        a = np.maximum(h, 0.0) ** 2 if case.activation == "relu2" else gate * _sigmoid(gate) * up
    y = np.einsum("ten,edn->ted", a, wide(inputs.w_down)) + wide(inputs.b_down)
    return torch.from_numpy(np.einsum("te,ted->td", combine, y)).to(getattr(torch, case.dtype))
