"""One adapter per library: what it needs, what it cannot do, and the call that is timed.

Nothing here is part of the package: a library that is not installed is reported as missing with its reason, a case that
a library cannot compute is reported as unsupported with its reason, and the run goes on.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import os
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from benchmarks.attention_inputs import Inputs, out_shape
from benchmarks.cases import OURS, OURS_SM80, Case

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    import torch


class Setup(NamedTuple):
    """Where the run takes place: torch device name, and the folder of FA3 (load_fa3.py beside fa3_C.so.xz), if any."""

    device: str
    peers: str = ""

    @property
    def cuda(self) -> bool:
        return self.device.startswith("cuda")


class Prepared(NamedTuple):
    """A case made ready for one library.

    run(i) computes input set i and returns the library's own output; as_torch gives that output as a torch tensor in
    the case's layout; into(i, out), where the library has an `out` argument, writes into the given torch tensor;
    scope() is entered around every loop of calls (back-end choices), so that its cost is not in a call's time.
    """

    run: Callable[[int], Any]
    as_torch: Callable[[Any], torch.Tensor]
    into: Callable[[int, torch.Tensor], Any] | None = None
    scope: Callable[[], contextlib.AbstractContextManager[Any]] = contextlib.nullcontext


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


def _common(case: Case) -> tuple[tuple[object, str], ...]:
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


class Sdpa(Library):
    """torch.nn.functional.scaled_dot_product_attention: one back end of it, or the one that torch picks."""

    def __init__(self, name: str, backend: str = "") -> None:
        self.name = name
        self.backend = backend

    def missing(self, setup: Setup) -> str:
        return "needs a CUDA device" if self.backend and not setup.cuda else ""

    def why_not(self, case: Case, setup: Setup) -> str:  # noqa: ARG002
        return first_reason(
            *_common(case),
            (case.varlen, "SDPA has no packed sequences"),
            (case.window_size != (-1, -1), "SDPA has no window"),
            (case.softcap, "SDPA has no softcap"),
            (case.sinks, "SDPA has no sinks"),
            (case.alibi, "SDPA has no ALiBi slopes"),
            (case.causal and case.seqlen_q != case.seqlen_k, "SDPA's causal mask is aligned top-left"),
            (case.bias == "float32" and case.dtype != "float32", "SDPA wants the bias in q's dtype"),
        )

    def unsupported(self, error: Exception) -> str:
        return f"the back end refuses this case: {error}" if "No available kernel" in str(error) else ""

    def prepare(self, case: Case, sets: Sequence[Inputs], setup: Setup) -> Prepared:  # noqa: ARG002
        from torch.nn.attention import SDPBackend, sdpa_kernel
        from torch.nn.functional import scaled_dot_product_attention

        options: dict[str, Any] = {}
        if case.causal:
            options["is_causal"] = True
        if case.heads_q != case.heads_k:
            options["enable_gqa"] = True
        calls = [
            (tuple(bhsd(case, t) for t in one[:3]), options | ({} if one.bias is None else {"attn_mask": one.bias}))
            for one in sets
        ]

        def run(i: int) -> Any:
            arrays, keywords = calls[i % len(calls)]
            return scaled_dot_product_attention(*arrays, **keywords)

        @contextlib.contextmanager
        def scope() -> Any:
            with warnings.catch_warnings():  # a back end that refuses warns once per reason, then raises
                warnings.simplefilter("ignore")
                with sdpa_kernel([getattr(SDPBackend, self.backend)]) if self.backend else contextlib.nullcontext():
                    yield

        return Prepared(run, lambda out: bhsd(case, out), scope=scope)


class TorchFA2(Sdpa):
    """FA2 as torch carries it: through SDPA where SDPA can say the case, else through the operator beneath it."""

    def __init__(self) -> None:
        super().__init__("torch_fa2", "FLASH_ATTENTION")

    def why_not(self, case: Case, setup: Setup) -> str:  # noqa: ARG002
        return first_reason(
            *_common(case),
            (case.dtype == "float32", "FA2 takes bf16 and fp16"),
            (case.head_dim != case.head_dim_v, "torch's FA2 wants head_dim_v == head_dim"),
            (case.softcap, "torch's FA2 has no softcap"),
            (case.sinks, "FA2 has no sinks"),
            (case.alibi, "torch's FA2 has no ALiBi slopes"),
            (case.bias, "FA2 has no dense bias"),
        )

    def prepare(self, case: Case, sets: Sequence[Inputs], setup: Setup) -> Prepared:
        plain = not case.varlen and case.window_size == (-1, -1)
        if plain and (not case.causal or case.seqlen_q == case.seqlen_k):
            return super().prepare(case, sets, setup)
        import torch

        operator = torch.ops.aten._flash_attention_forward.default
        left, right = case.band()
        options: dict[str, Any] = {}
        if case.window_size != (-1, -1):
            options = {"window_size_left": left, "window_size_right": right}
        longest_q, longest_k = (max(spans) for spans in zip(*case.spans(), strict=True))
        packed = [one[:3] if case.varlen else tuple(bshd(case, t) for t in one[:3]) for one in sets]
        # The operator takes "causal" only without a window; a window with right = 0 says the same.
        causal = case.causal and not options

        def run(i: int) -> Any:
            q, k, v = packed[i % len(packed)]
            cu = sets[i % len(packed)].cu_seqlens
            return operator(q, k, v, cu, cu, longest_q, longest_k, 0.0, causal, False, **options)[0]

        return Prepared(run, lambda out: out if case.varlen else bshd(case, out))


class Flex(Library):
    """FlexAttention under torch.compile, with a block mask; compiled anew for every case (seconds each)."""

    name = "flex_attention"

    def missing(self, setup: Setup) -> str:
        try:
            importlib.import_module("torch.nn.attention.flex_attention")
        except ImportError as error:
            return str(error)
        return super().missing(setup)

    def why_not(self, case: Case, setup: Setup) -> str:  # noqa: ARG002
        return first_reason(*_common(case), (case.varlen, "packed sequences are not adapted for FlexAttention here"))

    def prepare(self, case: Case, sets: Sequence[Inputs], setup: Setup) -> Prepared:
        import torch
        from torch.nn.attention.flex_attention import AuxRequest, create_block_mask, flex_attention

        torch._dynamo.reset()  # past its recompile limit Dynamo would run the eager version, which makes all scores
        left, right = case.band()
        offset = case.seqlen_k - case.seqlen_q

        def visible(b: Any, h: Any, i: Any, j: Any) -> Any:  # noqa: ARG001 - FlexAttention's signature
            seen = j <= i + offset + right if right >= 0 else j >= 0
            return seen & (j >= i + offset - left) if left >= 0 else seen

        mask = None
        if right >= 0 or left >= 0:
            mask = create_block_mask(visible, None, None, case.seqlen_q, case.seqlen_k, device=setup.device)

        # One compile for all input sets: q, k and v rotate, the small extras are those of the first set.
        slopes, bias, sinks = sets[0].alibi_slopes, sets[0].bias, sets[0].sinks

        def score(s: Any, b: Any, h: Any, i: Any, j: Any) -> Any:
            if case.softcap:
                s = case.softcap * torch.tanh(s / case.softcap)
            if slopes is not None:
                s = s - slopes[h] * torch.abs(i + offset - j)
            if bias is not None:
                s = torch.where(bias[b, h, i, j], s, -float("inf")) if case.bias == "bool" else s + bias[b, h, i, j]
            return s

        plain = not case.softcap and slopes is None and bias is None
        options: dict[str, Any] = {"score_mod": None if plain else score, "block_mask": mask}
        options["enable_gqa"] = case.heads_q != case.heads_k

        def attend(q: Any, k: Any, v: Any) -> Any:
            if sinks is None:
                return flex_attention(q, k, v, **options)
            out, aux = flex_attention(q, k, v, **options, return_aux=AuxRequest(lse=True))
            return out * torch.sigmoid(aux.lse - sinks[None, :, None])[..., None].to(out.dtype)

        compiled = torch.compile(attend, dynamic=False)
        arrays = [tuple(bhsd(case, t) for t in one[:3]) for one in sets]
        return Prepared(lambda i: compiled(*arrays[i % len(arrays)]), lambda out: bhsd(case, out))


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
            *_common(case),
            (case.dtype == "float32", "FA3 takes bf16 and fp16"),
            (case.softcap, "this FA3 build has no softcap"),
            (case.sinks, "this FA3 has no sinks"),
            (case.alibi, "FA3 has no ALiBi slopes"),
            (case.bias, "FA3 has no dense bias"),
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
        options: dict[str, Any] = {"is_causal": case.causal}
        if case.window_size != (-1, -1):  # a window that ends at the diagonal is causal
            left, right = case.band()
            options = {"is_causal": False, "window_size_left": left, "window_size_right": right}
        if case.varlen:
            longest = max(case.seqlens)
            options |= {"max_seqlen_q": longest, "max_seqlen_k": longest}
        packed = [one[:3] if case.varlen else tuple(bshd(case, t) for t in one[:3]) for one in sets]
        offsets = [{"cu_seqlens_q": one.cu_seqlens, "cu_seqlens_k": one.cu_seqlens} for one in sets]
        calls = [(q, options | (cu if case.varlen else {})) for q, cu in zip(packed, offsets, strict=True)]

        def run(i: int) -> Any:
            arrays, keywords = calls[i % len(calls)]
            return operator(*arrays, **keywords)[0]

        return Prepared(run, lambda out: out if case.varlen else bshd(case, out))


def poison(case: Case, device: str) -> torch.Tensor:
    """An output full of NaN in the case's layout."""
    import torch

    dtype = torch.float32 if case.lse else getattr(torch, case.dtype)
    return torch.full(out_shape(case), float("nan"), dtype=dtype, device=device)


LIBRARIES: dict[str, Library] = {
    library.name: library
    for library in (
        Ours(),
        OursForced(OURS_SM80, "attention_fwd_sm80"),
        TorchFA2(),
        Sdpa("torch_cudnn", "CUDNN_ATTENTION"),
        Sdpa("torch_sdpa"),
        Flex(),
        FA3(),
    )
}


def default_peers() -> str:
    """The FA3 folder of the environment, or ""."""
    return os.environ.get("FLASHMOE_PEERS", "")
