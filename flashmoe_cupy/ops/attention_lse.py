"""The log-sum-exp of attention's scores alone."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Unpack, overload

import numpy as np

from flashmoe_cupy._types import Array, Dense, Layout, Window
from flashmoe_cupy.dtypes import FP32
from flashmoe_cupy.ops.attention import bias_workspace
from flashmoe_cupy.ops.call import Call, run
from flashmoe_cupy.ops.names import no_argument, strict
from flashmoe_cupy.plan.attention.lse import VALUE_COLUMNS, lse_problem
from flashmoe_cupy.plan.attention.problem import PADDING, AttentionProblem
from flashmoe_cupy.plan.checks import need_ranks
from flashmoe_cupy.plan.operation import Operation, Output, Workspace, register
from flashmoe_cupy.plan.step import Step, same

if TYPE_CHECKING:
    from numpy.typing import NDArray


@overload
def attention_lse(q: np.ndarray[Any, Any], k: Any, **options: Unpack[Dense]) -> NDArray[np.float32]: ...
@overload
def attention_lse(q: Array, k: Array, **options: Unpack[Dense]) -> Array: ...
@strict
def attention_lse(
    q: Any,
    k: Any,
    *,
    causal: bool = False,
    window_size: Window = (-1, -1),
    softmax_scale: float | None = None,
    softcap: float = 0,  # an int: torch.compile would make an input of its graph of a default 0.0
    sinks: Any = None,
    alibi_slopes: Any = None,
    bias: Any = None,
    seqused_q: Any = None,
    seqused_k: Any = None,
    leftpad_q: Any = None,
    leftpad_k: Any = None,
    layout: Layout = "bshd",
    **unknown: object,
) -> Any:
    """log(sum_j exp(S_ij)) of attention's scores S, exactly, in O(seqlen) memory: what `flash_attention` calls lse.

    All arguments: as in `flash_attention`. q: (batch, seqlen_q, heads_q, head_dim); k: (batch, seqlen_k, heads_k,
    head_dim); layout="bhsd" swaps axes 1, 2.

    Returns lse (batch, heads_q, seqlen_q), float32, the natural logarithm of the softmax's denominator, sinks included;
    -inf for a query that sees no key, and for one that does not count. The same bits as those of `flash_attention` with
    these arguments are not promised. It runs the kernel of that, with 16 bytes of workspace for each query and head (32
    in float32), beside what a bias needs. Nothing is copied between host and device, and nothing waits.

    Raises UnsupportedProblem (a ValueError) with every reason, DependencyError when CuPy or a driver is missing. There
    is no gradient yet: torch tensors that require one are refused in grad mode, and so is `jax.grad`.

    Algorithm: FlashAttention-2 (Dao 2023, arXiv:2307.08691), algorithm 1, with the first columns of k as values.
    """
    if unknown:
        raise no_argument(attention_lse, unknown)
    options = causal, window_size, softmax_scale, softcap, layout
    others = sinks, alibi_slopes, bias, seqused_q, seqused_k, leftpad_q, leftpad_k
    return run(_CALL, (q, k), options, others)


def _shapes(shapes: Mapping[str, Any], options: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    need_ranks("attention_lse", {"q": 4, "k": 4}, shapes)
    s, h = (2, 1) if options["layout"] == "bhsd" else (1, 2)
    q = shapes["q"]
    return {"lse": (q[0], q[h], q[s])}


def _steps(p: AttentionProblem) -> tuple[list[Step], Workspace]:
    work = bias_workspace(p)
    work.add("out", p.batch * p.seqlen_q * p.heads_q * p.head_dim_v * p.dtype.itemsize)
    arguments = same("q", "k", "out", "lse", *_OPTIONAL) | {"v": "k"}
    clears = {"lse": p.heads_q * p.total_q * FP32.itemsize} if p.clear_rest else {}
    return [Step("attention_fwd", p, arguments, {"clear_rest": p.clear_rest}, clears)], work


def _host(p: AttentionProblem, given: Mapping[str, Any], made: Mapping[str, Any]) -> None:
    from flashmoe_cupy.cpu.attention import attention

    q, k = given["q"], given["k"]
    if p.heads_first:  # the back end's axes are (batch, seq, heads, dim)
        q, k = q.swapaxes(1, 2), k.swapaxes(1, 2)
    out = np.empty((p.batch, p.seqlen_q, p.heads_q, p.head_dim_v), q.dtype)
    lse: Any = made["lse"]
    if p.clear_rest:
        lse[...] = -np.inf
    attention(p, q, k, k[..., :VALUE_COLUMNS], out, lse, **{name: given[name] for name in _OPTIONAL})


_OPTIONAL = "sinks", "alibi_slopes", "bias", *PADDING

_CALL = Call(
    register(
        Operation(
            attention_lse,
            ("q", "k", *_OPTIONAL),
            2,
            {"lse": Output(FP32, fill=-np.inf)},
            _shapes,
            AttentionProblem,
            lse_problem,
            _steps,
            _host,
            rows=("q", "k"),
            tiles=("bias",),
            empty=lambda p: p.empty,
            batched={"q": 4, "k": 4, "alibi_slopes": 2, "bias": 4} | dict.fromkeys(PADDING, 1),
        )
    )
)
