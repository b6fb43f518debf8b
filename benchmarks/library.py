"""What an adapter is: what a library needs, what it cannot do, and the call that is timed.

Nothing here is part of the package: a library that is not installed is reported as missing with its reason, a case that
a library cannot compute is reported as unsupported with its reason, and the run goes on.
"""

from __future__ import annotations

import contextlib
import importlib
import os
from functools import cache
from typing import TYPE_CHECKING, Any, NamedTuple

from benchmarks.attention_inputs import Check, Inputs, out_shape

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    import torch

    from benchmarks.cases import Case


class Setup(NamedTuple):
    """Where the run takes place: torch device name, the folder of FA3 (load_fa3.py beside fa3_C.so.xz) if any, and the
    folder of models.
    """

    device: str
    peers: str = ""
    models: str = ""

    @property
    def cuda(self) -> bool:
        return self.device.startswith("cuda")


class Prepared(NamedTuple):
    """A case made ready for one library.

    run(i) computes input set i and returns the library's own output; as_torch gives that output as a torch tensor in
    the case's layout; into(i, out), where the library has an `out` argument, writes into the given torch tensor;
    scope() is entered around every loop of calls (back-end choices), so that its cost is not in a call's time.
    check(out) is there for what computes another thing than the case says; note says so in the row.
    """

    run: Callable[[int], Any]
    as_torch: Callable[[Any], torch.Tensor]
    into: Callable[[int, torch.Tensor], Any] | None = None
    scope: Callable[[], contextlib.AbstractContextManager[Any]] = contextlib.nullcontext
    check: Callable[[torch.Tensor], Check] | None = None
    note: str = ""


class Library:
    """An adapter. `missing` and `why_not` return "" when all is well, else the reason."""

    name = ""

    def missing(self, setup: Setup) -> str:
        return "" if setup.cuda else "needs a CUDA device"

    def why_not(self, case: Case, setup: Setup) -> str:
        raise NotImplementedError

    def prepare(self, case: Case, sets: Sequence[Inputs], setup: Setup) -> Prepared:
        raise NotImplementedError

    def unsupported(self, error: Exception) -> str:  # noqa: ARG002
        """The reason when `error`, raised by the first call, means "this library cannot", else ""."""
        return ""


def first_reason(*reasons: tuple[object, str]) -> str:
    """The text of the first pair whose condition holds, else ""."""
    return next((text for holds, text in reasons if holds), "")


@cache
def why_not_imported(*modules: str) -> str:
    """Why one of `modules` cannot be imported, or "". Found out once: a failing import can take seconds."""
    try:
        for module in modules:
            importlib.import_module(module)
    except Exception as error:  # any failure to load a foreign package means: not here
        return f"{type(error).__name__}: {error}"
    return ""


def no_rival(case: Case) -> tuple[tuple[object, str], ...]:
    """What no rival can do."""
    return (
        (case.arrays != "torch", f"takes torch tensors, not {case.arrays} arrays"),
        (case.lse, "computes no log-sum-exp without values"),
    )


def bhsd(case: Case, tensor: torch.Tensor) -> torch.Tensor:
    """A view in (batch, heads, seq, dim) order of a tensor in the case's layout."""
    return tensor if case.layout == "bhsd" else tensor.transpose(1, 2)


def bshd(case: Case, tensor: torch.Tensor) -> torch.Tensor:
    """A view in (batch, seq, heads, dim) order of a tensor in the case's layout."""
    return tensor.transpose(1, 2) if case.layout == "bhsd" else tensor


def from_torch(tensor: torch.Tensor, arrays: str) -> Any:
    """The same memory as an array of the library `arrays`; bfloat16 goes as 16-bit integers and gets its type back."""
    if arrays == "torch":
        return tensor
    import torch

    narrow = tensor.dtype == torch.bfloat16
    plain = tensor.view(torch.int16) if narrow else tensor
    array = plain.numpy() if arrays == "numpy" else importlib.import_module("cupy").from_dlpack(plain)
    return array.view(importlib.import_module("ml_dtypes").bfloat16) if narrow else array


def to_torch(array: Any, arrays: str) -> torch.Tensor:
    """The reverse of from_torch."""
    if arrays == "torch":
        return array
    import torch

    narrow = array.dtype.name == "bfloat16"
    tensor = torch.from_dlpack(array.view("int16") if narrow else array)
    return tensor.view(torch.bfloat16) if narrow else tensor


def poison(case: Case, device: str) -> torch.Tensor:
    """An output full of NaN in the case's layout."""
    import torch

    dtype = torch.float32 if case.lse else getattr(torch, case.dtype)
    return torch.full(out_shape(case), float("nan"), dtype=dtype, device=device)


def default_peers() -> str:
    """The FA3 folder of the environment, or ""."""
    return os.environ.get("FLASHMOE_PEERS", "")


def default_models() -> str:
    """The folder of models of the environment, or ""."""
    return os.environ.get("FLASHMOE_MODELS", "")
