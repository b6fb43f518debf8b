"""Named cases of attention: shapes, where they come from, their work and the suites.

Conventions. FLOP of attention forward: 2 * heads_q * pairs * (head_dim + head_dim_v), which is 4*b*h*sq*sk*d when
head_dim_v == head_dim. `pairs` is sq*sk for full attention, half of it for causal with sq == sk, and the exact count of
visible pairs for a window or for causal with sq != sk. Bytes: q, k, v, out and bias once each. The log-sum-exp alone
has no values: head_dim_v is 0. Making the inputs and checking an answer are in attention_inputs.py.
"""

from __future__ import annotations

import math
import random
from typing import TYPE_CHECKING, Any, Generic, NamedTuple, TypeVar

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Iterator

C = TypeVar("C")

OURS = "flashmoe_cupy"  # with the kernel that the library chooses for the device
OURS_SM80 = "flashmoe_cupy_sm80"  # with the portable kernel, also where the library would choose another
OURS_PLAIN = "flashmoe_cupy_plain"  # the same call without the case's bias: what the bias costs
OURS_PACKED = "flashmoe_cupy_packed"  # the packed call on the rows that count, gathered before
OURS_WITHOUT = "flashmoe_cupy_without"  # the same shape without the feature that a case is about: what that costs
OURS_DETERMINISTIC = "flashmoe_cupy_deterministic"  # the backward that gives the same bits in every run
OURS_FLASH_ATTN = "flashmoe_cupy_flash_attn"  # through integrations.flash_attn
OURS_SDPA = "flashmoe_cupy_sdpa"  # through integrations.sdpa
OUR_LIBRARIES = (
    OURS,
    OURS_SM80,
    OURS_PLAIN,
    OURS_PACKED,
    OURS_WITHOUT,
    OURS_DETERMINISTIC,
    OURS_FLASH_ATTN,
    OURS_SDPA,
)
MASK_TILE = 128  # rows and columns of a tile of the pattern "tiles"
ITEMSIZE = {"bfloat16": 2, "float16": 2, "float32": 4}
# ||out - truth|| / ||truth|| that a right kernel of that dtype stays under; one row may have three times as much.
ERROR_LIMIT = {"bfloat16": 1e-2, "float16": 2e-3, "float32": 1e-5}
LSE_LIMIT = 1e-4  # of a log-sum-exp in place of these, absolute: its size says nothing


class Case(NamedTuple):
    """One attention problem. `seqlens` given: packed sequences of these lengths (batch and seqlen_* follow from them).

    bias: "" none, else its dtype ("same" = the case's, "float32", "bool"). bias_shape: what broadcasts to
    (batch, heads_q, seqlen_q, seqlen_k); () = all of that. pattern: what a bool bias shows: "" two of three pairs at
    random, "lengths" the first keys of each batch entry, "tiles" hidden, visible and mixed tiles of MASK_TILE.
    padding: "" none, "left" or "right": of batch entry b only used[b] rows of q and k count, at the other end.
    head_dim_v: 0 = the log-sum-exp alone, without values.
    arrays: the array library that holds the inputs ("torch", "cupy" or "numpy").
    """

    name: str
    suite: str
    source: str
    batch: int
    seqlen_q: int
    seqlen_k: int
    heads_q: int
    heads_k: int
    head_dim: int
    head_dim_v: int
    dtype: str = "bfloat16"
    causal: bool = False
    window_size: tuple[int, int] = (-1, -1)
    softcap: float = 0.0
    sinks: bool = False
    alibi: bool = False
    bias: str = ""
    bias_shape: tuple[int, ...] = ()
    pattern: str = ""
    padding: str = ""
    used: tuple[int, ...] = ()
    layout: str = "bshd"
    seqlens: tuple[int, ...] = ()
    arrays: str = "torch"

    @property
    def varlen(self) -> bool:
        return bool(self.seqlens)

    @property
    def lse(self) -> bool:
        """Whether the answer is the log-sum-exp alone: (batch, heads_q, seqlen_q), float32."""
        return self.head_dim_v == 0

    @property
    def tokens_q(self) -> int:
        """Rows of q that count."""
        return sum(sq for sq, _ in self.spans())

    @property
    def tokens_k(self) -> int:
        return sum(sk for _, sk in self.spans())

    def spans(self) -> list[tuple[int, int]]:
        """(seqlen_q, seqlen_k) of every sequence of the batch; of padded ones what counts."""
        lengths = self.seqlens or self.used
        return [(n, n) for n in lengths] if lengths else [(self.seqlen_q, self.seqlen_k)] * self.batch

    def first_row(self, b: int) -> int:
        """The first row of batch entry b that counts."""
        return self.seqlen_q - self.used[b] if self.padding == "left" else 0

    def whole_bias(self) -> tuple[int, ...]:
        """The shape of the bias."""
        return self.bias_shape or (self.batch, self.heads_q, self.seqlen_q, self.seqlen_k)

    def band(self) -> tuple[int, int]:
        """(left, right) with causal folded in; -1 = unlimited."""
        left, right = self.window_size
        return left, 0 if self.causal else right

    def flops(self) -> int:
        """Floating-point operations of the forward pass by this module's conventions."""
        return self.heads_q * (self.head_dim + self.head_dim_v) * self.twice_pairs()

    def twice_pairs(self) -> int:
        """Two times the visible pairs of a query and a key, of one head and all sequences."""
        counts: dict[tuple[int, int], int] = {}
        for span in self.spans():
            if span not in counts:
                counts[span] = self._twice_pairs(*span)
        return sum(counts[span] for span in self.spans())

    def _twice_pairs(self, sq: int, sk: int) -> int:
        left, right = self.band()
        if self.window_size == (-1, -1) and (not self.causal or sq == sk):
            return sq * sk if self.causal else 2 * sq * sk
        diagonal = np.arange(sq, dtype=np.int64) + (sk - sq)
        last = np.minimum(sk - 1, diagonal + right) if right >= 0 else np.full(sq, sk - 1, np.int64)
        first = np.maximum(0, diagonal - left) if left >= 0 else np.zeros(sq, np.int64)
        return 2 * int(np.maximum(0, last - first + 1).sum())

    def bytes(self) -> int:
        """Fewest bytes through device memory: every input read once, the output written once."""
        size = ITEMSIZE[self.dtype]
        moved = size * self.tokens_q * self.heads_q * (self.head_dim + self.head_dim_v)
        moved += size * self.tokens_k * self.heads_k * (self.head_dim + self.head_dim_v)
        if self.lse:
            moved += ITEMSIZE["float32"] * self.tokens_q * self.heads_q
        return moved + self.bias_bytes()

    def bias_bytes(self) -> int:
        """The bytes of the bias."""
        if not self.bias:
            return 0
        size = {"same": ITEMSIZE[self.dtype], "float32": 4, "bool": 1}[self.bias]
        return size * math.prod(self.whole_bias())

    def shape(self) -> dict[str, Any]:
        """The fields that say what was computed, for a row of results."""
        skip = ("name", "suite", "seqlens")
        fields = {key: value for key, value in self._asdict().items() if key not in skip}
        if not self.seqlens and not self.used:
            return fields
        return fields | {"sequences": len(self.spans()), "tokens": self.tokens_q}


# A feature that rivals do not have is measured against our own kernel on the same shape without it.
PLAIN_TWIN = {
    "softcap_d128_8k_causal": "d128_8k_causal",
    "alibi_d128_8k_causal": "d128_8k_causal",
    "sinks_window128_gqa_64_8_d64_8k": "window128_gqa_64_8_d64_8k",
}
TWIN_LIMIT = 0.9  # the least share of the twin's speed


class Suite(NamedTuple, Generic[C]):
    """A list of cases, the libraries measured by default, the rivals that a ratio is taken against, and its measure.

    ours: the library of ours that is compared with the rivals.
    """

    name: str
    summary: str
    cases: tuple[C, ...]
    libraries: tuple[str, ...]
    rivals: tuple[str, ...]
    measure: str = "device_us"
    ours: str = OURS


def _dense(suite: str, source: str, seqlens: tuple[int, ...]) -> Iterator[Case]:
    for d in (64, 128, 256):
        for s in seqlens:
            for causal in (False, True):
                heads = 2048 // d
                name = f"d{d}_s{s}_{'causal' if causal else 'full'}"
                yield Case(name, suite, source, 16384 // s, s, s, heads, heads, d, d, causal=causal)


def _square(name: str, suite: str, source: str, b: int, s: int, heads: tuple[int, int], d: int, **options: Any) -> Case:
    dv = options.pop("head_dim_v", d)
    return Case(name, suite, source, b, s, s, *heads, d, dv, **options)


def _lse() -> Iterator[Case]:
    for case in _dense("attention_lse", "attention forward's rows, without values", (8192,)):
        yield case._replace(head_dim_v=0)


def _packed(
    name: str, suite: str, source: str, seqlens: tuple[int, ...], heads: tuple[int, int], d: int, **options: Any
) -> Case:
    longest = max(seqlens)
    return Case(name, suite, source, len(seqlens), longest, longest, *heads, d, d, seqlens=seqlens, **options)


def _features() -> Iterator[Case]:
    def case(name: str, b: int, s: int, heads: tuple[int, int], d: int, **options: Any) -> Case:
        return _square(name, "attention_forward_features", "feature table, one H100", b, s, heads, d, **options)

    yield case("d128_8k_causal", 2, 8192, (16, 16), 128, causal=True)
    yield case("gqa_32_4_d128_8k_causal", 2, 8192, (32, 4), 128, causal=True)
    yield case("gqa_64_8_d128_8k_full", 2, 8192, (64, 8), 128)
    yield case("window1024_d128_16k", 1, 16384, (16, 16), 128, causal=True, window_size=(1023, 0))
    yield case("window128_gqa_64_8_d64_8k", 2, 8192, (64, 8), 64, causal=True, window_size=(127, 0))
    yield case("d96_8k_causal", 2, 8192, (16, 16), 96, causal=True)
    yield case("d192_128_8k_causal", 2, 8192, (16, 16), 192, head_dim_v=128, causal=True)
    yield case("d64_256_8k_causal", 2, 8192, (16, 16), 64, head_dim_v=256, causal=True)
    yield case("fp16_d128_8k_causal", 2, 8192, (16, 16), 128, dtype="float16", causal=True)
    yield case("bhsd_d128_8k_causal", 2, 8192, (16, 16), 128, layout="bhsd", causal=True)
    yield case("odd_s4097_gqa_12_4_d128_causal", 3, 4097, (12, 4), 128, causal=True)
    yield case("odd_s3000_d80_causal", 2, 3000, (16, 16), 80, causal=True)
    draw = random.Random(0)
    lengths = (*(draw.randint(16, 769) for _ in range(63)), 8192)
    source = "feature table, one H100"
    yield _packed("varlen_64_d128_causal", "attention_forward_features", source, lengths, (16, 16), 128, causal=True)
    yield case("softcap_d128_8k_causal", 2, 8192, (16, 16), 128, causal=True, softcap=30.0)
    yield case("alibi_d128_8k_causal", 2, 8192, (16, 16), 128, causal=True, alibi=True)
    yield case("sinks_window128_gqa_64_8_d64_8k", 2, 8192, (64, 8), 64, causal=True, window_size=(127, 0), sinks=True)


def _models() -> Iterator[Case]:
    def case(name: str, source: str, b: int, s: int, heads: tuple[int, int], d: int, **options: Any) -> Case:
        return _square(name, "models", source, b, s, heads, d, causal=True, **options)

    yield case("smollm2_135m_2k", "SmolLM2-135M prefill", 8, 2048, (9, 3), 64)
    yield case("smollm2_1.7b_8k", "SmolLM2-1.7B prefill", 2, 8192, (32, 32), 64)
    yield case("llama3.1_8b_8k", "Llama-3.1-8B prefill", 2, 8192, (32, 8), 128)
    yield Case(
        "llama3.1_8b_chunk", "models", "Llama-3.1-8B chunked prefill", 4, 1024, 8192, 32, 8, 128, 128, causal=True
    )
    lengths = tuple(random.Random(1).randint(64, 1024) for _ in range(32))
    yield _packed("llama3.1_8b_packed", "models", "Llama-3.1-8B, 32 prompts", lengths, (32, 8), 128, causal=True)
    yield case("gpt_oss_full_8k", "gpt-oss full layer", 2, 8192, (64, 8), 64, sinks=True)
    yield case("gpt_oss_window_8k", "gpt-oss sliding layer", 2, 8192, (64, 8), 64, sinks=True, window_size=(127, 0))
    yield case("deepseek_v3_4k", "DeepSeek-V3 prefill", 1, 4096, (128, 128), 192, head_dim_v=128)


def _host() -> Iterator[Case]:
    def case(name: str, heads: tuple[int, int], d: int, **options: Any) -> Case:
        return _square(name, "attention_host", "tiny arrays: the host side is all there is", 1, 16, heads, d, **options)

    for arrays in ("torch", "cupy"):
        yield case(f"{arrays}_bshd_d64", (4, 4), 64, arrays=arrays)
        yield case(f"{arrays}_bhsd_d64_fp16", (4, 4), 64, arrays=arrays, layout="bhsd", dtype="float16")
        yield case(f"{arrays}_gqa_32_8_d128_causal", (32, 8), 128, arrays=arrays, causal=True)
        name, packed = f"{arrays}_varlen_d64_causal", "tiny packed arrays"
        yield _packed(name, "attention_host", packed, (5, 1, 10), (4, 4), 64, arrays=arrays, causal=True)


def _smoke() -> Iterator[Case]:
    def case(name: str, **options: Any) -> Case:
        return _square(name, "smoke", "every feature, tiny", 2, 40, options.pop("heads", (4, 2)), 32, **options)

    yield case("full_fp32", dtype="float32")
    yield case("causal_bf16", causal=True)
    yield case("bhsd_fp16", layout="bhsd", dtype="float16", heads=(3, 3))
    yield Case("causal_wide", "smoke", "every feature, tiny", 1, 7, 33, 4, 4, 32, 32, "float32", causal=True)
    yield case("window", window_size=(5, 3), dtype="float32")
    yield case("softcap", softcap=2.0, dtype="float32")
    yield case("sinks", sinks=True, causal=True, dtype="float32")
    yield case("alibi", alibi=True, dtype="float32")
    yield case("bias", bias="same", dtype="float32")
    yield case("mask", bias="bool", dtype="float32")
    yield case("wide_v", head_dim_v=48, dtype="float32")
    yield case("lse", causal=True, head_dim_v=0)
    yield case("lse_bhsd_fp32", layout="bhsd", sinks=True, head_dim_v=0, dtype="float32")
    yield case("numpy_fp32", arrays="numpy", dtype="float32")
    yield case("numpy_bf16", arrays="numpy")
    yield _packed("varlen", "smoke", "every feature, tiny", (3, 17, 1, 40), (4, 2), 32, dtype="float32", causal=True)


def _small_systems() -> Iterator[Case]:
    for atoms, systems in ((32, 2048), (64, 1024), (128, 512), (512, 64)):
        name, source = f"atoms{atoms}_systems{systems}", "many small systems with a dense bias, one H100"
        yield _square(name, "attention_small_systems", source, systems, atoms, (8, 8), 64, bias="same")


# (batch, seqlen, heads, head_dim) and the shape of what is added to the scores, or hides them.
_BIASED = {
    "padding": ((8, 1024, 12, 64), (8, 1, 1, 1024)),
    "per_head": ((2, 2048, 16, 64), (1, 16, 2048, 2048)),
    "per_batch": ((2, 4096, 32, 128), (2, 1, 4096, 4096)),
    "pair": ((64, 384, 4, 32), (64, 4, 384, 384)),
}


def _biased(suite: str, shape: str, kind: str, **options: Any) -> Case:
    (b, s, heads, d), bias_shape = _BIASED[shape]
    name, source = f"{shape}_{kind}", "bias table, one H200"
    options |= {"bias_shape": bias_shape, "layout": "bhsd"}
    return _square(name, suite, source, b, s, (heads, heads), d, **options)


def _bias() -> Iterator[Case]:
    for shape in _BIASED:
        yield _biased("attention_bias", shape, "bf16", bias="same")
        yield _biased("attention_bias", shape, "fp32", bias="float32")
        yield _biased("attention_bias", shape, "fp16", bias="same", dtype="float16")


def _mask() -> Iterator[Case]:
    yield _biased("attention_mask", "padding", "lengths", bias="bool", pattern="lengths")
    for shape in ("per_head", "per_batch", "pair"):
        yield _biased("attention_mask", shape, "tiles", bias="bool", pattern="tiles")
        yield _biased("attention_mask", shape, "random", bias="bool")


PADDING_SEEDS = (1, 2)  # of the lengths of attention_padding


def _padding() -> Iterator[Case]:
    b, s, suite, source = 8, 4096, "attention_padding", "lengths between a tenth and the whole"
    masks: dict[str, dict[str, Any]] = {"causal": {"causal": True}, "full": {}}
    masks["window512"] = {"causal": True, "window_size": (511, 0)}
    for d in (64, 128):
        for mask, options in masks.items():
            for side in ("left", "right"):
                for seed in PADDING_SEEDS:
                    draw = random.Random(seed)
                    used = tuple(draw.randint(-(-s // 10), s) for _ in range(b))
                    name, heads = f"{side}_d{d}_{mask}_seed{seed}", (2048 // d, 2048 // d)
                    yield _square(name, suite, source, b, s, heads, d, padding=side, used=used, **options)


def _few_keys() -> Iterator[Case]:
    def case(name: str, sq: int, sk: int, heads: tuple[int, int], d: int, **options: Any) -> Case:
        suite, source = "attention_few_keys", "few keys, few queries and odd ratios"
        return Case(name, suite, source, 8, sq, sk, *heads, d, d, **options)

    yield case("q5121_k33_b2_d128_causal", 5121, 33, (8, 8), 128, causal=True)._replace(batch=2)
    yield case("q448_k1500_b8_d64_full", 448, 1500, (20, 20), 64)
    yield case("q33_k5121_b8_gqa_32_8_d128_full", 33, 5121, (32, 8), 128)


_FA2_TABLE, _FA3_TABLE = "FA2 table, one H100", "FA3 and cuDNN table, one H100"
_ALL_RIVALS = ("torch_fa2", "torch_cudnn", "flex_attention", "fa3", "fa4")
_BIAS_RIVALS = ("torch_cudnn", "torch_efficient")

SUITES: dict[str, Suite[Case]] = {
    suite.name: suite
    for suite in (
        Suite(
            "attention_forward_portable",
            "the portable kernel on the 24 rows of the FA2 table: 16,384 tokens, heads 2048/d",
            tuple(_dense("attention_forward_portable", _FA2_TABLE, (512, 2048, 8192, 16384))),
            (OURS_SM80, "torch_fa2"),
            ("torch_fa2",),
            ours=OURS_SM80,
        ),
        Suite(
            "attention_forward",
            "the 36 rows of the FA3 and cuDNN table",
            tuple(_dense("attention_forward", _FA3_TABLE, (512, 1024, 2048, 4096, 8192, 16384))),
            (OURS, "torch_cudnn", "fa3", "fa4"),
            ("torch_cudnn", "fa3", "fa4"),
        ),
        Suite(
            "attention_lse",
            "the log-sum-exp of attention's scores alone, which no rival computes",
            tuple(_lse()),
            (OURS,),
            (),
        ),
        Suite(
            "attention_forward_features",
            "GQA, windows, odd sizes, packed sequences, softcap, ALiBi, sinks",
            tuple(_features()),
            (OURS, "fa3", "fa4"),
            ("fa3", "fa4"),
        ),
        Suite(
            "attention_few_keys",
            "few keys, few queries and odd ratios",
            tuple(_few_keys()),
            (OURS, "fa3", "fa4"),
            ("fa3", "fa4"),
        ),
        Suite(
            "attention_bias",
            "dense biases that broadcast, as the user holds them: a cast that a rival needs is in its time",
            tuple(_bias()),
            (OURS, OURS_PLAIN, *_BIAS_RIVALS, "cuequivariance"),
            (*_BIAS_RIVALS, "cuequivariance"),
        ),
        Suite(
            "attention_mask",
            "the same shapes with boolean masks; all passes over a mask are in the time",
            tuple(_mask()),
            (OURS, OURS_PLAIN, *_BIAS_RIVALS),
            _BIAS_RIVALS,
        ),
        Suite(
            "attention_padding",
            "padded batches with their lengths, against our packed call on rows gathered before",
            tuple(_padding()),
            (OURS, OURS_PACKED),
            (OURS_PACKED,),
        ),
        Suite("models", "shapes of published models", tuple(_models()), (OURS, *_ALL_RIVALS), _ALL_RIVALS),
        Suite(
            "attention_small_systems",
            "many short sequences with a dense additive bias",
            tuple(_small_systems()),
            (OURS, "torch_sdpa", "torch_cudnn"),
            ("torch_sdpa", "torch_cudnn"),
        ),
        Suite(
            "attention_host",
            "host microseconds of one call on tiny arrays",
            tuple(_host()),
            (OURS, "torch_sdpa"),
            ("torch_sdpa",),
            "host_us",
        ),
        Suite("smoke", "every feature, tiny", tuple(_smoke()), (OURS, "torch_sdpa"), ("torch_sdpa",)),
    )
}
