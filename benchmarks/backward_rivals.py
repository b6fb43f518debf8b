"""Adapters for attention's backward. Each library's own forward gives what its backward reads, outside of the time.

A call gives a tuple: dq, dk, dv and, of a case that has them, dsinks and dbias, in the library's order of axes.
Gradients are made anew by every call, as a training step has them.
"""

from __future__ import annotations

import importlib
from operator import itemgetter
from typing import TYPE_CHECKING, Any

from benchmarks.attention_inputs import Inputs
from benchmarks.backward_inputs import cast_bias, check, joined, parts
from benchmarks.cases import OURS, OURS_DETERMINISTIC, OURS_SM80, OURS_WITHOUT
from benchmarks.cudnn_rival import CudnnBackward
from benchmarks.flash_rivals import FA3, FA4
from benchmarks.library import Library, Prepared, Setup, bhsd, bshd, first_reason, from_torch, to_torch
from benchmarks.ours import Ours, array_options, case_options
from benchmarks.rivals import Sdpa

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    import torch

    from benchmarks.backward_cases import BackwardCase

    Move = Callable[[BackwardCase, torch.Tensor], torch.Tensor]


def _moved(case: Any, move: Move, gradients: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Gradients of q, k and v with their axes moved, what is behind them as it is; packed ones stay."""
    return [x if case.varlen or place > 2 else move(case, x) for place, x in enumerate(gradients)]


class OursBackward(Ours):
    """flash_attention_backward and flash_attention_varlen_backward; of sinks and of a bias the gradient too."""

    def __init__(self, name: str, deterministic: bool = False) -> None:
        self.name = name
        self.deterministic = deterministic

    def missing(self, setup: Setup) -> str:
        if reason := super().missing(setup):
            return reason
        package = importlib.import_module("flashmoe_cupy")
        return "" if hasattr(package, "flash_attention_backward") else "this flashmoe_cupy has no backward"

    def prepare(self, case: Any, sets: Sequence[Inputs], setup: Setup) -> Prepared:  # noqa: ARG002
        package = importlib.import_module("flashmoe_cupy")
        forward = package.flash_attention_varlen if case.varlen else package.flash_attention
        backward = package.flash_attention_varlen_backward if case.varlen else package.flash_attention_backward
        more: dict[str, Any] = {"deterministic": True} if self.deterministic else {}
        extra = [(place, name) for place, name in ((3, "sinks"), (4, "bias")) if getattr(case, name)]
        if extra:
            more["need"] = ("q", "k", "v", *[name for _, name in extra])
        wanted = itemgetter(0, 1, 2, *[place for place, _ in extra])
        calls = []
        for one in sets:
            native = Inputs(*(None if t is None else from_torch(t, case.arrays) for t in one))
            options = case_options(case) | array_options(native)
            out, lse = forward(*native[:3], **options, return_lse=True)
            calls.append(((native.dout, *native[:3], out, lse), options | more))

        def run(i: int) -> Any:
            arrays, keywords = calls[i % len(calls)]
            return wanted(backward(*arrays, **keywords))

        def into(i: int, flat: torch.Tensor) -> Any:
            arrays, keywords = calls[i % len(calls)]
            dq, dk, dv, *rest = parts(case, flat)
            given = {name: from_torch(x, case.arrays) for name, x in (("dq", dq), ("dk", dk), ("dv", dv))}
            places = _left_behind(sets[i % len(sets)].bias)
            made = backward(*arrays, **keywords, **given)
            found = [to_torch(made[place], case.arrays) for place, _ in extra]  # there is no argument for these
            for part, gradient in zip(rest, found, strict=True):
                part.copy_(gradient)
            return not places or found[-1].data_ptr() in places

        return Prepared(run, lambda made: joined(case, [to_torch(x, case.arrays) for x in made]), into)


def _left_behind(like: torch.Tensor | None) -> set[int]:
    """Where memory full of NaN was just freed, of this size and dtype: torch gives it out again to the next array."""
    import torch

    blocks = [] if like is None else [torch.full_like(like, float("nan")) for _ in range(2)]
    return {block.data_ptr() for block in blocks}


class OursBackwardForced(OursBackward):
    """flashmoe_cupy's backward with one kernel of its registry, whatever it would choose by itself."""

    def __init__(self, name: str, kernel: str) -> None:
        super().__init__(name)
        self.kernel = kernel

    def missing(self, setup: Setup) -> str:
        if not setup.cuda:
            return "needs a CUDA device"
        if reason := super().missing(setup):
            return reason
        kernels = importlib.import_module("flashmoe_cupy.plan.kernels")
        known = self.kernel in kernels.of_task("attention_bwd")
        return "" if known else f"this flashmoe_cupy has no kernel {self.kernel}"

    def prepare(self, case: Any, sets: Sequence[Inputs], setup: Setup) -> Prepared:
        kernels = importlib.import_module("flashmoe_cupy.plan.kernels")
        return super().prepare(case, sets, setup)._replace(scope=lambda: kernels.only(self.kernel))


class OursBackwardWithout(OursBackward):
    """flashmoe_cupy's backward on the same arrays without the case's feature; packed sequences become a batch.

    It has a forward of its own, and its answer is checked as that of the shape without the feature.
    """

    def why_not(self, case: Any, setup: Setup) -> str:
        return super().why_not(case, setup) or first_reason(
            (case == case.without(), "the case has no feature to leave out"),
            (len(set(case.seqlens)) > 1, "sequences of several lengths are no batch"),
        )

    def prepare(self, case: Any, sets: Sequence[Inputs], setup: Setup) -> Prepared:
        plain = case.without()

        def batch(x: torch.Tensor | None) -> Any:
            return x.unflatten(0, (case.batch, case.seqlen_q)) if case.varlen and x is not None else x

        bare = [one._replace(sinks=None, alibi_slopes=None, cu_seqlens=None) for one in sets]
        without = [one._replace(q=batch(one.q), k=batch(one.k), v=batch(one.v), dout=batch(one.dout)) for one in bare]
        made = super().prepare(plain, without, setup)
        # Without `into`: what is handed to it has the size of the case's gradients, those of sinks among them.
        return made._replace(into=None, check=lambda out: check(plain, without[0], out))


def _leaves(arrays: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """The same memory as tensors whose gradients are wanted."""
    return [x.detach().requires_grad_() for x in arrays]


class SdpaBackward(Sdpa):
    """The gradient that torch.autograd takes of scaled_dot_product_attention with one back end of it.

    A bias is spread by a view, in q's dtype; its gradient is that of the bias as the case has it, so that the sum over
    the axes along which it is spread is part of the call.
    """

    def why_not(self, case: Any, setup: Setup) -> str:
        flash, cudnn = self.backend == "FLASH_ATTENTION", self.backend == "CUDNN_ATTENTION"
        return super().why_not(case, setup) or first_reason(
            (flash and case.head_dim != case.head_dim_v, "torch's FA2 wants head_dim_v == head_dim"),
            (flash and case.bias, "FA2 has no dense bias"),
            (cudnn and case.bias, "torch has no gradient of a bias by cuDNN"),
        )

    def prepare(self, case: Any, sets: Sequence[Inputs], setup: Setup) -> Prepared:  # noqa: ARG002
        import torch
        from torch.nn.functional import scaled_dot_product_attention

        calls = []
        given, said = cast_bias(case, sets)
        with self.scope():
            for one in given:
                leaves = _leaves([*(bhsd(case, t) for t in one[:3]), *([] if one.bias is None else [one.bias])])
                options = self.options(case)
                if one.bias is not None:
                    options["attn_mask"] = leaves[3].expand(case.batch, case.heads_q, case.seqlen_q, case.seqlen_k)
                out = scaled_dot_product_attention(*leaves[:3], **options)
                assert one.dout is not None
                calls.append((out, leaves, bhsd(case, one.dout)))

        def run(i: int) -> Any:
            out, leaves, dout = calls[i % len(calls)]
            return torch.autograd.grad(out, leaves, dout, retain_graph=True)

        return Prepared(run, lambda made: joined(case, _moved(case, bhsd, made)), scope=self.scope, **said)


class FA3Backward(FA3):
    """FA3's backward operator on what its forward operator gave. It writes into gradients that are handed to it."""

    def __init__(self, name: str, deterministic: bool = False) -> None:
        super().__init__()
        self.name = name
        self.deterministic = deterministic

    def why_not(self, case: Any, setup: Setup) -> str:
        wide = max(case.head_dim, case.head_dim_v) > 192  # rounded up to 256
        return super().why_not(case, setup) or first_reason(
            (self.deterministic and wide, "FA3 has no deterministic backward for head_dim 256"),
        )

    def unsupported(self, error: Exception) -> str:
        refused = isinstance(error, RuntimeError) and ("not support" in str(error) or "must have shape" in str(error))
        return f"it refuses this case: {str(error).splitlines()[0]}" if refused else ""

    def prepare(self, case: Any, sets: Sequence[Inputs], setup: Setup) -> Prepared:  # noqa: ARG002
        import torch

        forward, backward = torch.ops.flash_attn_3.fwd.default, torch.ops.flash_attn_3.bwd.default
        calls = []
        for one in sets:
            assert one.dout is not None
            q, k, v, dout = [*_moved(case, bshd, one[:3]), one.dout if case.varlen else bshd(case, one.dout)]
            options = self.options(case, one)
            out, lse = forward(q, k, v, **options)[:2]
            calls.append(((dout, q, k, v, out, lse), options | {"deterministic": self.deterministic}))

        def run(i: int) -> Any:
            arrays, keywords = calls[i % len(calls)]
            made = tuple(torch.empty_like(x) for x in arrays[1:4])
            backward(*arrays, *made, **keywords)
            return made

        def into(i: int, flat: torch.Tensor) -> Any:
            arrays, keywords = calls[i % len(calls)]
            backward(*arrays, *_moved(case, bshd, parts(case, flat)), **keywords)

        return Prepared(run, lambda made: joined(case, _moved(case, bshd, made)), into)


class FA4Backward(FA4):
    """The gradient that torch.autograd takes of FA4's public functions; with sinks their gradient too."""

    def prepare(self, case: Any, sets: Sequence[Inputs], setup: Setup) -> Prepared:  # noqa: ARG002
        import torch

        function = self.function(case)
        calls = []
        for one in sets:
            assert one.dout is not None
            leaves = _leaves(_moved(case, bshd, one[:3]) + ([] if one.sinks is None else [one.sinks]))
            options = self.options(case, one)
            if case.sinks:
                options["learnable_sink"] = leaves[3]
            out = function(*leaves[:3], **options)[0]
            calls.append((out, leaves, one.dout if case.varlen else bshd(case, one.dout)))

        def run(i: int) -> Any:
            out, leaves, dout = calls[i % len(calls)]
            return torch.autograd.grad(out, leaves, dout, retain_graph=True, allow_unused=True)

        def as_torch(made: Any) -> torch.Tensor:
            if any(x is None for x in made):
                raise NotImplementedError("it gives no gradient of the sinks")
            return joined(case, _moved(case, bshd, made))

        return Prepared(run, as_torch)


BACKWARD_LIBRARIES: dict[str, Library] = {
    library.name: library
    for library in (
        OursBackward(OURS),
        OursBackward(OURS_DETERMINISTIC, deterministic=True),
        OursBackwardWithout(OURS_WITHOUT),
        OursBackwardForced(OURS_SM80, "attention_bwd_sm80"),
        SdpaBackward("torch_cudnn", "CUDNN_ATTENTION"),
        SdpaBackward("torch_flash", "FLASH_ATTENTION"),
        SdpaBackward("torch_efficient", "EFFICIENT_ATTENTION"),
        SdpaBackward("torch_sdpa"),
        CudnnBackward(),
        FA3Backward("fa3"),
        FA3Backward("fa3_deterministic", deterministic=True),
        FA4Backward(),
    )
}
