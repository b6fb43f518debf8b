"""Our own library as an adapter: the kernel it chooses, one that is forced, without a bias, and on packed rows."""

from __future__ import annotations

import importlib
import importlib.util
from itertools import accumulate
from typing import TYPE_CHECKING, Any

from benchmarks.attention_inputs import Inputs, check
from benchmarks.cases import OURS, OURS_PACKED, OURS_PLAIN, Case
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
        options = case_options(case)
        arguments = 2 if case.lse else 3
        if case.varlen:
            function = package.flash_attention_varlen
        else:
            function = package.attention_lse if case.lse else package.flash_attention
        calls = [(one[:arguments], options | array_options(one)) for one in native]

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


class OursPlain(Ours):
    """flashmoe_cupy without the case's bias: what the bias costs."""

    name = OURS_PLAIN

    def why_not(self, case: Case, setup: Setup) -> str:
        return super().why_not(case, setup) or ("" if case.bias else "the case has no bias")

    def prepare(self, case: Case, sets: Sequence[Inputs], setup: Setup) -> Prepared:
        plain = case._replace(bias="", bias_shape=(), pattern="")
        without = [one._replace(bias=None) for one in sets]
        made = super().prepare(plain, without, setup)
        return made._replace(check=lambda out: check(plain, without[0], out))


class OursPacked(Ours):
    """flash_attention_varlen on the rows of a padded batch that count; they are gathered before and are not timed."""

    name = OURS_PACKED

    def why_not(self, case: Case, setup: Setup) -> str:
        return super().why_not(case, setup) or first_reason(
            (not case.padding, "the case has no padding"),
            (case.layout != "bshd", "packed rows are those of the layout bshd"),
            (case.bias, "packed sequences have no bias"),
        )

    def prepare(self, case: Case, sets: Sequence[Inputs], setup: Setup) -> Prepared:
        import torch

        spans = [(case.seqlen_q * b + case.first_row(b), n) for b, n in enumerate(case.used)]
        rows = torch.cat([torch.arange(first, first + n) for first, n in spans]).to(setup.device)
        ends = torch.tensor([0, *accumulate(case.used)], dtype=torch.int32, device=setup.device)
        packed = case._replace(padding="", used=(), seqlens=case.used)
        gathered = []
        for one in sets:
            q, k, v = (x.flatten(0, 1)[rows] for x in one[:3])
            gathered.append(one._replace(q=q, k=k, v=v, cu_seqlens=ends, seqused=None, leftpad=None))
        made = super().prepare(packed, gathered, setup)

        def padded(out: Any) -> torch.Tensor:
            answer = made.as_torch(out)
            whole = answer.new_zeros(case.batch * case.seqlen_q, *answer.shape[1:])
            whole[rows] = answer
            return whole.unflatten(0, (case.batch, case.seqlen_q))

        return Prepared(made.run, padded, scope=made.scope)


def case_options(case: Case) -> dict[str, Any]:
    """Our arguments that the case alone says."""
    options: dict[str, Any] = {}
    if case.causal:
        options["causal"] = True
    if case.window_size != (-1, -1):
        options["window_size"] = case.window_size
    if case.softcap:
        options["softcap"] = case.softcap
    if case.varlen:
        longest = max(case.seqlens)
        options |= {"max_seqlen_q": longest, "max_seqlen_k": longest}
    elif case.layout != "bshd":
        options["layout"] = case.layout
    return options


def array_options(one: Inputs) -> dict[str, Any]:
    """Our arguments that are arrays, beside q, k and v."""
    named = {"sinks": one.sinks, "alibi_slopes": one.alibi_slopes, "bias": one.bias}
    named |= {"seqused_q": one.seqused, "seqused_k": one.seqused, "leftpad_q": one.leftpad, "leftpad_k": one.leftpad}
    if one.cu_seqlens is not None:
        named |= {"cu_seqlens_q": one.cu_seqlens, "cu_seqlens_k": one.cu_seqlens}
    return {key: value for key, value in named.items() if value is not None}
