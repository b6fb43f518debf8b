"""Our own library as an adapter: the kernel it chooses, one that is forced, without a bias, and on packed rows."""

from __future__ import annotations

import importlib
import importlib.util
from typing import TYPE_CHECKING, Any

from benchmarks.attention_inputs import Inputs
from benchmarks.cases import OURS, Case
from benchmarks.library import Library, Prepared, Setup, first_reason, from_torch, to_torch

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch


class Ours(Library):
    """flashmoe_cupy, on the case's own array library; the NumPy back end for CPU arrays."""

    name = OURS

    def missing(self, setup: Setup) -> str:
        try:
            package = importlib.import_module("flashmoe_cupy")
            _ = package.flash_attention
        except (ImportError, AttributeError) as error:
            return f"{type(error).__name__}: {error}"
        if setup.cuda and importlib.util.find_spec("cupy") is None:
            return "CuPy is not installed"
        return ""

    def why_not(self, case: Case, setup: Setup) -> str:
        return first_reason(
            (case.arrays == ("numpy" if setup.cuda else "cupy"), f"{case.arrays} arrays do not live on {setup.device}"),
            (importlib.util.find_spec(case.arrays) is None, f"{case.arrays} is not installed"),
        )

    def unsupported(self, error: Exception) -> str:
        return str(error) if type(error).__name__ == "UnsupportedProblem" else ""

    def prepare(self, case: Case, sets: Sequence[Inputs], setup: Setup) -> Prepared:  # noqa: ARG002
        package = importlib.import_module("flashmoe_cupy")
        native = [Inputs(*(None if t is None else from_torch(t, case.arrays) for t in one)) for one in sets]
        options: dict[str, Any] = {}
        if case.causal:
            options["causal"] = True
        if case.window_size != (-1, -1):
            options["window_size"] = case.window_size
        if case.softcap:
            options["softcap"] = case.softcap
        arguments = 2 if case.lse else 3
        if case.varlen:
            function = package.flash_attention_varlen
            longest = max(case.seqlens)
            options |= {"max_seqlen_q": longest, "max_seqlen_k": longest}
        else:
            function = package.attention_lse if case.lse else package.flash_attention
            if case.layout != "bshd":
                options["layout"] = case.layout
        calls = [(one[:arguments], options | _array_options(one)) for one in native]

        def run(i: int) -> Any:
            arrays, keywords = calls[i % len(calls)]
            return function(*arrays, **keywords)

        def into(i: int, out: torch.Tensor) -> Any:
            arrays, keywords = calls[i % len(calls)]
            return function(*arrays, **keywords, out=from_torch(out, case.arrays))

        return Prepared(run, lambda out: to_torch(out, case.arrays), None if case.lse else into)


class OursForced(Ours):
    """flashmoe_cupy with one kernel of its registry, whatever it would choose by itself."""

    def __init__(self, name: str, kernel: str) -> None:
        self.name = name
        self.kernel = kernel

    def missing(self, setup: Setup) -> str:
        if not setup.cuda:
            return "needs a CUDA device"
        if reason := super().missing(setup):
            return reason
        kernels = importlib.import_module("flashmoe_cupy.plan.kernels")
        return first_reason(
            (not hasattr(kernels, "only"), "this flashmoe_cupy cannot force a kernel"),
            (self.kernel not in kernels.of_task("attention_fwd"), f"this flashmoe_cupy has no kernel {self.kernel}"),
        )

    def prepare(self, case: Case, sets: Sequence[Inputs], setup: Setup) -> Prepared:
        kernels = importlib.import_module("flashmoe_cupy.plan.kernels")
        # Around every loop of calls: the choice belongs to a call, not to what was prepared.
        return super().prepare(case, sets, setup)._replace(scope=lambda: kernels.only(self.kernel))


def _array_options(one: Inputs) -> dict[str, Any]:
    named = {"sinks": one.sinks, "alibi_slopes": one.alibi_slopes, "bias": one.bias}
    if one.cu_seqlens is not None:
        named |= {"cu_seqlens_q": one.cu_seqlens, "cu_seqlens_k": one.cu_seqlens}
    return {key: value for key, value in named.items() if value is not None}
