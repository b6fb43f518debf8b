"""Adapter of cuDNN through its own front end: attention's backward with a bias whose gradient is wanted.

torch's call of cuDNN has no gradient of a bias. The package nvidia-cudnn-frontend has one: a graph of one node.
"""

from __future__ import annotations

import contextlib
import importlib
from typing import TYPE_CHECKING, Any

from benchmarks.backward_inputs import cast_bias, joined, parts
from benchmarks.library import Library, Prepared, Setup, bhsd, first_reason, no_rival, why_not_imported

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch

    from benchmarks.attention_inputs import Inputs


class Refused(Exception):
    """cuDNN has no plan for a graph."""


class CudnnBackward(Library):
    """cuDNN's graph of SDPA's backward with bias and dBias, on what its graph of the forward gave.

    All of a call is one execution: cuDNN sums the bias's gradient over the axes along which it is spread. A call writes
    into gradients that are handed to it.
    """

    name = "cudnn_frontend"

    def missing(self, setup: Setup) -> str:
        return super().missing(setup) or why_not_imported("cudnn")

    def why_not(self, case: Any, setup: Setup) -> str:  # noqa: ARG002
        return first_reason(
            *no_rival(case),
            (case.bias not in ("same", "float32"), "only additive biases are adapted for cuDNN's front end here"),
            (case.dtype == "float32", "cuDNN takes bf16 and fp16"),
            (case.varlen or case.padding, "sequences of lengths of their own are not adapted for it here"),
            (case.causal or case.window_size != (-1, -1), "causal masks and windows are not adapted for it here"),
            (case.softcap or case.sinks or case.alibi, "softcap, sinks and ALiBi slopes are not adapted for it here"),
        )

    def unsupported(self, error: Exception) -> str:
        return f"cuDNN refuses this case: {' '.join(str(error).split())[:300]}" if isinstance(error, Refused) else ""

    def prepare(self, case: Any, sets: Sequence[Inputs], setup: Setup) -> Prepared:
        import torch

        cudnn = importlib.import_module("cudnn")
        handle = cudnn.create_handle()
        given, said = cast_bias(case, sets)
        arrays = [_arrays(case, one) for one in given]
        like, scale = arrays[0], case.head_dim**-0.5
        out_like = like["dO"]
        stats_like = out_like.new_empty((*out_like.shape[:3], 1), dtype=torch.float32)

        forward = _Graph(cudnn, handle, case.dtype)
        read = {name: forward.tensor(name, like[name]) for name in _READ}
        o, stats = forward.graph.sdpa(name="sdpa", **read, generate_stats=True, attn_scale=scale)
        forward.output("o", o, out_like)
        forward.output("stats", stats, stats_like)
        forward.build()

        backward = _Graph(cudnn, handle, case.dtype)
        read = {name: backward.tensor(name, x) for name, x in like.items()}
        read |= {"o": backward.tensor("o", out_like), "stats": backward.tensor("stats", stats_like)}
        dbias = backward.tensor("dBias", like["bias"])
        made = backward.graph.sdpa_backward(name="sdpa_backward", **read, attn_scale=scale, dBias=dbias)
        for name, gradient in zip(("q", "k", "v"), made, strict=True):
            backward.output(f"d{name}", gradient, like[name])
        backward.build()

        @contextlib.contextmanager
        def scope() -> Any:
            """Around the calls: the stream that is timed."""
            if setup.cuda:
                cudnn.set_stream(handle=handle, stream=torch.cuda.current_stream(setup.device).cuda_stream)
            yield

        calls = []
        with scope():
            workspace = forward.workspace(setup.device)
            for one in arrays:
                known = one | {"o": torch.empty_like(out_like), "stats": torch.empty_like(stats_like)}
                forward.execute({name: known[name] for name in (*_READ, "o", "stats")}, workspace)
                calls.append(known)
        del workspace
        room = backward.workspace(setup.device)

        def write(i: int, gradients: Sequence[torch.Tensor]) -> None:
            backward.execute(calls[i % len(calls)] | dict(zip(_GRADIENTS, gradients, strict=True)), room)

        def run(i: int) -> Any:
            known = calls[i % len(calls)]
            gradients = tuple([torch.empty_like(known[name]) for name in _READ])
            write(i, gradients)
            return gradients

        def into(i: int, flat: torch.Tensor) -> Any:
            write(i, _moved(case, parts(case, flat)))

        return Prepared(run, lambda found: joined(case, _moved(case, found)), into, scope, **said)


_READ = "q", "k", "v", "bias"  # by the forward
_GRADIENTS = "dq", "dk", "dv", "dBias"  # of these


class _Graph:
    """A graph, its tensors by name, and calls of it."""

    def __init__(self, cudnn: Any, handle: Any, dtype: str) -> None:
        self.cudnn, self.handle = cudnn, handle
        kinds = cudnn.data_type
        self.types = {"bfloat16": kinds.BFLOAT16, "float16": kinds.HALF, "float32": kinds.FLOAT}
        self.graph = cudnn.pygraph(
            io_data_type=self.types[dtype], intermediate_data_type=kinds.FLOAT, compute_data_type=kinds.FLOAT,
            handle=handle,
        )  # fmt: skip
        self.tensors: dict[str, Any] = {}

    def tensor(self, name: str, like: torch.Tensor) -> Any:
        kind = self.types[str(like.dtype).removeprefix("torch.")]
        made = self.graph.tensor(name=name, dim=list(like.shape), stride=list(like.stride()), data_type=kind)
        self.tensors[name] = made
        return made

    def output(self, name: str, tensor: Any, like: torch.Tensor) -> None:
        kind = self.types[str(like.dtype).removeprefix("torch.")]
        tensor.set_output(True).set_dim(list(like.shape)).set_stride(list(like.stride())).set_data_type(kind)
        self.tensors[name] = tensor

    def build(self) -> None:
        try:
            self.graph.build([self.cudnn.heur_mode.A, self.cudnn.heur_mode.FALLBACK])
        except (self.cudnn.cudnnGraphNotSupportedError, RuntimeError, ValueError, NotImplementedError) as error:
            raise Refused(str(error)) from error

    def workspace(self, device: str) -> torch.Tensor:
        import torch

        return torch.empty(max(1, self.graph.get_workspace_size()), dtype=torch.uint8, device=device)

    def execute(self, arrays: dict[str, torch.Tensor], workspace: torch.Tensor) -> None:
        pack = {self.tensors[name]: x for name, x in arrays.items()}
        self.graph.execute(pack, workspace, handle=self.handle)


def _arrays(case: Any, one: Inputs) -> dict[str, torch.Tensor]:
    """What both graphs read, by the names of their arguments."""
    assert one.bias is not None and one.dout is not None
    q, k, v, dout = (bhsd(case, x) for x in (*one[:3], one.dout))
    return {"q": q, "k": k, "v": v, "dO": dout, "bias": one.bias}


def _moved(case: Any, gradients: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Gradients of q, k and v with their axes moved, and that of the bias."""
    return [*(bhsd(case, x) for x in gradients[:3]), *gradients[3:]]
