"""Forward and backward of one attention call through torch.autograd: what a training step pays on the host.

A call runs the forward on tensors that require a gradient and asks torch.autograd for those of q, k and v. The tensors
lie as the function wants them; nothing is transposed or copied in the time.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from benchmarks.backward_bench import BackwardBench
from benchmarks.backward_inputs import joined
from benchmarks.cases import OURS_FLASH_ATTN, OURS_SDPA
from benchmarks.library import Library, Prepared, Setup, bhsd, first_reason
from benchmarks.ours import Ours, array_options, case_options
from benchmarks.rivals import Sdpa

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    import torch

    from benchmarks.attention_inputs import Inputs
    from benchmarks.backward_cases import BackwardCase


class Call:
    """A function with the tensors and options of one set of inputs."""

    def __init__(
        self, function: Callable[..., Any], arrays: Sequence[Any], dout: Any, options: Mapping[str, Any]
    ) -> None:  # fmt: skip
        self.function, self.dout, self.options = function, dout, dict(options)
        self.leaves = [x.detach().requires_grad_() for x in arrays]

    def gradients(self) -> tuple[torch.Tensor, ...]:
        """One forward and one backward."""
        import torch

        out = self.function(*self.leaves, **self.options)
        made: tuple[torch.Tensor, ...] = torch.autograd.grad(out, self.leaves, self.dout)
        return made


def made_ready(case: Any, calls: Sequence[Call], turned: bool = False, **more: Any) -> Prepared:
    """turned: the tensors are (batch, heads, seq, dim), whatever the case's layout is."""

    def as_torch(made: Any) -> torch.Tensor:
        return joined(case, [bhsd(case, x) for x in made] if turned else made)

    return Prepared(lambda i: calls[i % len(calls)].gradients(), as_torch, **more)


class OursAutograd(Ours):
    """flash_attention and flash_attention_varlen on tensors that require a gradient."""

    def prepare(self, case: Any, sets: Sequence[Inputs], setup: Setup) -> Prepared:  # noqa: ARG002
        package = importlib.import_module("flashmoe_cupy")
        function = package.flash_attention_varlen if case.varlen else package.flash_attention
        options = case_options(case)
        calls = [Call(function, one[:3], one.dout, options | array_options(one)) for one in sets]
        return made_ready(case, calls)


class OursFlashAttn(Ours):
    """integrations.flash_attn, the functions with flash-attn's arguments."""

    name = OURS_FLASH_ATTN

    def why_not(self, case: Any, setup: Setup) -> str:
        return super().why_not(case, setup) or first_reason(
            (case.layout != "bshd" and not case.varlen, "flash-attn's functions take the layout bshd"),
        )

    def prepare(self, case: Any, sets: Sequence[Inputs], setup: Setup) -> Prepared:  # noqa: ARG002
        module = importlib.import_module("flashmoe_cupy.integrations.flash_attn")
        function = module.flash_attn_varlen_func if case.varlen else module.flash_attn_func
        options = case_options(case)
        calls = [Call(function, one[:3], one.dout, options | array_options(one)) for one in sets]
        return made_ready(case, calls)


class SdpaAutograd(Sdpa):
    """torch's scaled_dot_product_attention, or the function of ours with its arguments."""

    def __init__(self, name: str, module: str = "torch.nn.functional") -> None:
        super().__init__(name)
        self.module = module

    def prepare(self, case: Any, sets: Sequence[Inputs], setup: Setup) -> Prepared:  # noqa: ARG002
        function = importlib.import_module(self.module).scaled_dot_product_attention
        options, calls = self.options(case), []
        for one in sets:
            assert one.dout is not None
            q, k, v, dout = (bhsd(case, x) for x in (*one[:3], one.dout))
            calls.append(Call(function, (q, k, v), dout, options))
        return made_ready(case, calls, turned=True, scope=self.scope)


AUTOGRAD_LIBRARIES: dict[str, Library] = {
    library.name: library
    for library in (
        OursAutograd(),
        OursFlashAttn(),
        SdpaAutograd(OURS_SDPA, "flashmoe_cupy.integrations.sdpa"),
        SdpaAutograd("torch_sdpa"),
    )
}


class AutogradBench(BackwardBench):
    """The cases of AUTOGRAD_SUITES. They are there for their host side."""

    def libraries(self) -> Mapping[str, Any]:
        return AUTOGRAD_LIBRARIES

    def measures_host(self, case: BackwardCase) -> bool:  # noqa: ARG002
        return True
