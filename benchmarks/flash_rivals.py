"""Adapters of FA3 and FA4, which the user brings along."""

from __future__ import annotations

import importlib
import importlib.util
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.library import Library, Prepared, Setup, bshd, first_reason, no_rival, why_not_imported

if TYPE_CHECKING:
    from collections.abc import Sequence

    from benchmarks.attention_inputs import Inputs
    from benchmarks.cases import Case


class FA3(Library):
    """FA3's C++ operators, loaded from a folder given by the user (load_fa3.py beside fa3_C.so.xz).

    Head dims between its compiled ones are rounded up inside. num_splits and pack_gqa stay at the operator's defaults,
    which are its own heuristics.
    """

    name = "fa3"

    def __init__(self) -> None:
        self._loaded = False

    def missing(self, setup: Setup) -> str:
        if not setup.cuda:
            return "needs a CUDA device"
        if not setup.peers:
            return "no folder given (--peers FOLDER or FLASHMOE_PEERS)"
        import torch

        if torch.cuda.get_device_capability(setup.device)[0] != 9:
            return "needs compute capability 9.x"
        if self._loaded:
            return ""
        loader = Path(setup.peers) / "load_fa3.py"
        lacking = [name for name in ("load_fa3.py", "fa3_C.so.xz") if not (loader.parent / name).exists()]
        if lacking:
            return f"{setup.peers} has no {' and no '.join(lacking)}"
        try:
            spec = importlib.util.spec_from_file_location("load_fa3", loader)
            if spec is None or spec.loader is None:
                return f"cannot import {loader}"
            module = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(module)
            module.load()
        except Exception as error:  # any failure to load a foreign binary means: not here
            return f"load failed: {type(error).__name__}: {error}"
        self._loaded = True
        return ""

    def why_not(self, case: Case, setup: Setup) -> str:  # noqa: ARG002
        return first_reason(
            *no_rival(case),
            (case.dtype == "float32", "FA3 takes bf16 and fp16"),
            (case.softcap, "this FA3 build has no softcap"),
            (case.sinks, "this FA3 has no sinks"),
            (case.alibi, "FA3 has no ALiBi slopes"),
            (case.bias, "FA3 has no dense bias"),
            (case.padding, "padded batches are not adapted for FA3 here"),
            (case.head_dim > 256, "FA3 takes head_dim up to 256"),
            (
                case.head_dim_v != case.head_dim
                and not (128 < case.head_dim <= 192 and 96 < case.head_dim_v <= 128)
                and not (case.head_dim <= 64 and case.head_dim_v <= 512),
                "FA3 takes another head_dim_v only with head_dim 129 to 192 and up to 64",
            ),
        )

    def prepare(self, case: Case, sets: Sequence[Inputs], setup: Setup) -> Prepared:  # noqa: ARG002
        import torch

        # One overload, looked up here: no Python of its own stands between the timed call and the operator.
        operator = torch.ops.flash_attn_3.fwd.default
        packed = [one[:3] if case.varlen else tuple(bshd(case, t) for t in one[:3]) for one in sets]
        calls = [(arrays, self.options(case, one)) for arrays, one in zip(packed, sets, strict=True)]

        def run(i: int) -> Any:
            arrays, keywords = calls[i % len(calls)]
            return operator(*arrays, **keywords)[0]

        return Prepared(run, lambda out: out if case.varlen else bshd(case, out))

    def options(self, case: Case, one: Inputs) -> dict[str, Any]:
        """Arguments of the operators beside the main arrays; the backward's have the same names."""
        options: dict[str, Any] = {"is_causal": case.causal}
        if case.window_size != (-1, -1):  # a window that ends at the diagonal is causal
            left, right = case.band()
            options = {"is_causal": False, "window_size_left": left, "window_size_right": right}
        if case.varlen:
            longest = max(case.seqlens)
            options |= {"max_seqlen_q": longest, "max_seqlen_k": longest}
            options |= {"cu_seqlens_q": one.cu_seqlens, "cu_seqlens_k": one.cu_seqlens}
        return options


class FA4(Library):
    """FA4, the package flash-attn-4 in CuTe DSL: the public functions of flash_attn.cute, compiled at the first call.

    Causal is aligned bottom-right, as ours. num_splits stays at its default, which is 1 on Hopper.
    """

    name = "fa4"
    module = "flash_attn.cute.interface"

    def missing(self, setup: Setup) -> str:
        return super().missing(setup) or why_not_imported(self.module)

    def why_not(self, case: Case, setup: Setup) -> str:  # noqa: ARG002
        return first_reason(
            *no_rival(case),
            (case.dtype == "float32", "FA4 takes bf16 and fp16"),
            (case.alibi, "FA4 has no ALiBi slopes"),
            (case.bias, "FA4 has no dense bias"),
            (case.padding, "padded batches are not adapted for FA4 here"),
            (max(case.head_dim, case.head_dim_v) > 256, "FA4 takes head_dim and head_dim_v up to 256"),
        )

    def unsupported(self, error: Exception) -> str:
        return f"it refuses this case: {error}" if isinstance(error, (AssertionError, NotImplementedError)) else ""

    def prepare(self, case: Case, sets: Sequence[Inputs], setup: Setup) -> Prepared:  # noqa: ARG002
        import torch

        function = self.function(case)
        packed = [one[:3] if case.varlen else tuple(bshd(case, t) for t in one[:3]) for one in sets]
        calls = [(arrays, self.options(case, one)) for arrays, one in zip(packed, sets, strict=True)]

        def run(i: int) -> Any:
            arrays, keywords = calls[i % len(calls)]
            return function(*arrays, **keywords)[0]

        return Prepared(run, lambda out: out if case.varlen else bshd(case, out), scope=torch.no_grad)

    def function(self, case: Case) -> Any:
        """Its public function for the case: (q, k, v, **options) -> (out, lse)."""
        package = importlib.import_module(self.module)
        return package.flash_attn_varlen_func if case.varlen else package.flash_attn_func

    def options(self, case: Case, one: Inputs) -> dict[str, Any]:
        """Arguments of that function beside q, k and v."""
        options: dict[str, Any] = {"causal": case.causal}
        if case.window_size != (-1, -1):  # None = unlimited
            options["window_size"] = tuple(None if side < 0 else side for side in case.band())
            options["causal"] = False  # a window that ends at the diagonal says the same
        if case.softcap:
            options["softcap"] = case.softcap
        if case.varlen:
            longest = max(case.seqlens)
            options |= {"max_seqlen_q": longest, "max_seqlen_k": longest}
        named = {"learnable_sink": one.sinks, "cu_seqlens_q": one.cu_seqlens, "cu_seqlens_k": one.cu_seqlens}
        return options | {key: value for key, value in named.items() if value is not None}
