"""Named cases of attention's backward: the shapes of the forward suites, their work, and the suites.

FLOP: five products of the visible pairs. The scores again, dk and dq have head_dim, the gradient of the probabilities
and dv have head_dim_v: 2 * heads_q * pairs * (3 * head_dim + 2 * head_dim_v), which is 2.5 times the forward's when
head_dim_v == head_dim. `pairs` is as in cases.py. What a kernel computes twice does not count, nor do the sums of a
bias's gradient. Bytes: q, k, v, out, dout, a bias and the log-sum-exp read once, dq, dk, dv and dbias written once.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from benchmarks.cases import (
    ITEMSIZE,
    OURS,
    OURS_DETERMINISTIC,
    OURS_FLASH_ATTN,
    OURS_SDPA,
    OURS_SM80,
    OURS_WITHOUT,
    SUITES,
    Case,
    Suite,
)

if TYPE_CHECKING:
    from collections.abc import Iterator


class BackwardCase(Case):
    """The gradients of one attention problem with respect to q, k and v, and to the sinks and bias where it has them.

    No case has padding, a boolean bias, or a softcap beside a bias or ALiBi slopes: the check does not know them.
    """

    __slots__ = ()

    def flops(self) -> int:
        """Floating-point operations of the backward pass by this module's conventions."""
        return self.heads_q * (3 * self.head_dim + 2 * self.head_dim_v) * self.twice_pairs()

    def bytes(self) -> int:
        """Fewest bytes through device memory."""
        queries, keys = self.tokens_q * self.heads_q, self.tokens_k * self.heads_k
        moved = 2 * (self.head_dim + self.head_dim_v) * (queries + keys)  # q, dq, out, dout, k, dk, v, dv
        return ITEMSIZE[self.dtype] * moved + ITEMSIZE["float32"] * queries + 2 * self.bias_bytes()

    def without(self) -> BackwardCase:
        """The same shape without softcap, sinks, ALiBi slopes and packing."""
        return self._replace(softcap=0.0, sinks=False, alibi=False, seqlens=())


FEATURES = (
    "gqa_32_4_d128_8k_causal",
    "window1024_d128_16k",
    "varlen_64_d128_causal",
    "d96_8k_causal",
    "sinks_window128_gqa_64_8_d64_8k",
    "softcap_d128_8k_causal",
    "d192_128_8k_causal",
)
BIASES = tuple(case.name for case in SUITES["attention_bias"].cases if case.dtype == "bfloat16")


def _backward(suite: str, forward: str, names: tuple[str, ...] = ()) -> Iterator[BackwardCase]:
    for case in SUITES[forward].cases:
        if not names or case.name in names:
            yield BackwardCase(*case._replace(suite=suite, source=f"{case.source}, forward"))


def _cost() -> Iterator[BackwardCase]:
    """Softcap, ALiBi slopes, sinks and packed sequences of one length, for head dims 64 and 128."""
    name, source = "attention_backward_cost", "what a feature costs"
    named = {case.name: case._replace(source=source) for case in _backward(name, "attention_forward_features")}
    for feature in ("softcap", "alibi"):
        case = named[f"{feature}_d128_8k_causal"]
        yield case
        yield case._replace(name=f"{feature}_d64_8k_causal", head_dim=64, head_dim_v=64)
    yield named["sinks_window128_gqa_64_8_d64_8k"]
    for d in (128, 64):
        shape, lengths = (8, 2048, 2048, 2048 // d, 2048 // d, d, d), 8 * (2048,)
        yield BackwardCase(f"packed_d{d}_8_of_2k_causal", name, source, *shape, causal=True, seqlens=lengths)


_LIBRARIES = (OURS, OURS_DETERMINISTIC, "torch_cudnn", "torch_flash", "fa3", "fa3_deterministic", "fa4")
_RIVALS = ("torch_cudnn", "fa3", "fa4")
_BIAS_RIVALS = ("torch_efficient", "cudnn_frontend")

BACKWARD_SUITES: dict[str, Suite[BackwardCase]] = {
    suite.name: suite
    for suite in (
        Suite(
            "attention_backward",
            "gradients of the 36 rows of attention_forward; each library's own forward is not timed",
            tuple(_backward("attention_backward", "attention_forward")),
            _LIBRARIES,
            _RIVALS,
        ),
        Suite(
            "attention_backward_features",
            "gradients with GQA, windows, packed sequences, softcap, sinks and other head dims",
            tuple(_backward("attention_backward_features", "attention_forward_features", FEATURES)),
            _LIBRARIES,
            _RIVALS,
        ),
        Suite(
            "attention_backward_cost",
            "gradients with a softcap, sinks, ALiBi slopes or packed sequences beside the same shape without it",
            tuple(_cost()),
            (OURS, OURS_WITHOUT),
            (OURS_WITHOUT,),
        ),
        Suite(
            "attention_backward_portable",
            "gradients by the portable kernel on the 24 rows of attention_forward_portable",
            tuple(_backward("attention_backward_portable", "attention_forward_portable")),
            (OURS_SM80, "torch_flash"),
            ("torch_flash",),
            ours=OURS_SM80,
        ),
        Suite(  # a call with a bias has the same kernels with and without `deterministic`
            "attention_backward_bias",
            "gradients of q, k, v and a bias that broadcasts; rivals get a float32 bias in bfloat16, cast before",
            tuple(_backward("attention_backward_bias", "attention_bias", BIASES)),
            (OURS, *_BIAS_RIVALS),
            _BIAS_RIVALS,
        ),
    )
}


def _autograd() -> Iterator[BackwardCase]:
    for case in _backward("attention_backward_host", "attention_host"):
        if case.arrays == "torch":
            yield BackwardCase(*case._replace(source="tiny arrays, forward and backward through torch.autograd"))


AUTOGRAD_SUITES: dict[str, Suite[BackwardCase]] = {
    suite.name: suite
    for suite in (
        Suite(
            "attention_backward_host",
            "host microseconds of forward and backward through torch.autograd on tiny arrays",
            tuple(_autograd()),
            (OURS, OURS_FLASH_ATTN, OURS_SDPA, "torch_sdpa"),
            ("torch_sdpa",),
            "host_us",
        ),
    )
}
