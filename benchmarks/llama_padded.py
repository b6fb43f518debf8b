"""What `llama_prefill.py` measures of a padded batch: its tokens, the attention calls alone, and the bars for both.

The attention calls alone are device time by torch's profiler. Packed calls on the same tokens, gathered before, stand
beside them. Both follow a whole forward pass, since a device that was idle is faster than one at its limit of power.
"""

from __future__ import annotations

import contextlib
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import accumulate
from typing import Any, NamedTuple

from benchmarks.cases import OURS
from benchmarks.timing import GpuTimer, Timer

LENGTHS = (4096, 3000, 1500, 800, 4000, 2500, 300, 2048)
UNPADDED = f"{OURS}_unpadded"  # ours on the same batch without its attention_mask
SDPA = "sdpa"  # on the back end that torch takes by itself
PROFILES = 3
DIFFERENCE_LIMIT = 1e-2  # ||padded - packed|| / ||packed|| of a layer's attention in bfloat16
_MARK = "spin_kernel"  # torch.cuda._sleep's kernel, which stands between two parts of a profile


class Batch(NamedTuple):
    """Token ids and what is read of them.

    ids: (batch, tokens). mask: the same shape, 1 = a token and 0 = padding, or None. keep: transformers'
    `logits_to_keep`; places: (batch,) where each entry's last token is among what is kept. lengths: of the entries.
    """

    ids: Any
    mask: Any
    keep: Any
    places: Any
    lengths: tuple[int, ...]

    def last(self, logits: Any) -> Any:
        """(batch, vocab) float32: the logits of each entry's last token."""
        return logits[range(len(self.lengths)), self.places].float()


def whole(ids: Any) -> Batch:
    """The batch without padding."""
    count, tokens = ids.shape
    return Batch(ids, None, 1, ids.new_zeros(count), (tokens,) * count)


def padded(ids: Any, lengths: Sequence[int], side: str) -> Batch:
    """The batch with padding on `side`, "left" or "right". Raises ValueError for lengths that do not fit."""
    count, tokens = ids.shape
    if len(lengths) != count or not all(1 <= n <= tokens for n in lengths) or side not in ("left", "right"):
        raise ValueError(f"lengths={tuple(lengths)}, side={side!r}: {count} lengths of 1 to {tokens}, left or right")
    mask = ids.new_zeros(ids.shape)
    for row, n in zip(mask, lengths, strict=True):
        row[tokens - n :] = side == "left"
        row[:n] |= side == "right"
    if side == "left":
        return Batch(ids, mask, 1, ids.new_zeros(count), tuple(lengths))
    keep, places = (ids.new_tensor(lengths) - 1).unique(return_inverse=True)
    return Batch(ids, mask, keep, places, tuple(lengths))


# ---------------------------------------------------------------------------------------------------------------------
# the attention calls alone


class Span(NamedTuple):
    """Something that the device did; begin and end in microseconds."""

    name: str
    begin: float
    end: float


Call = Callable[[], Any]


@contextlib.contextmanager
def recorded(name: str) -> Iterator[tuple[list[Any], list[Any]]]:
    """The calls (functools.partial) of the attention registered under `name`, and those of its mask function."""
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    tables = ALL_ATTENTION_FUNCTIONS, ALL_MASK_ATTENTION_FUNCTIONS
    found: tuple[list[Any], list[Any]] = [], []
    for table, calls in zip(tables, found, strict=True):
        table[name] = _spy(table[name], calls)  # in front of what is registered, which stays
    try:
        yield found
    finally:
        for table in tables:
            del table[name]


def _spy(function: Any, calls: list[Any]) -> Any:
    def call(*args: Any, **kwargs: Any) -> Any:
        calls.append(partial(function, *args, **kwargs))
        return calls[-1]()

    return call


def packed_calls(attends: Sequence[Any], batch: Batch) -> tuple[list[Call], Any]:
    """The same calls on the tokens alone, gathered here, and these tokens' rows in (batch * tokens)."""
    from flashmoe_cupy.ops.attention import flash_attention_varlen

    rows = batch.mask.flatten().nonzero()[:, 0]
    ends = rows.new_tensor([0, *accumulate(batch.lengths)]).int()
    options = {"cu_seqlens_q": ends, "cu_seqlens_k": ends, "causal": True}
    options |= {"max_seqlen_q": max(batch.lengths), "max_seqlen_k": max(batch.lengths)}
    calls: list[Call] = []
    for one in attends:
        q, k, v = (x.transpose(1, 2).flatten(0, 1)[rows] for x in one.args[1:4])
        calls.append(partial(flash_attention_varlen, q, k, v, softmax_scale=one.keywords["scaling"], **options))
    return calls, rows


def attention_alone(forward: Call, name: str, batch: Batch, timer: Timer) -> dict[str, Any]:
    """Microseconds of the attention under `name` in one forward pass, and of packed calls; medians of PROFILES.

    attention_us is the sum of our kernels in the forward pass, of what else the attention calls launch, and of all that
    the mask function launches; busy_us are the same kernels of the pass, with time in which two overlap counted once.
    repeated_us: the pass's attention calls and its mask function again, without the rest of the model. On the CPU all
    is wall clock, and the calls of the pass are only repeated.
    """
    with recorded(name) as (attends, masks):
        forward()
    calls, rows = packed_calls(attends, batch)
    ours, theirs = attends[-1]()[0].flatten(0, 1)[rows].double(), calls[-1]().double()
    difference = float((ours - theirs).norm() / theirs.norm())
    del ours, theirs
    parts: dict[str, Call] = {
        "mask": partial(_all, masks),
        "repeated": partial(_all, attends),
        "packed": partial(_all, calls),
    }
    for _ in range(3):  # kernels are compiled at a first call, and joined into a graph at a third
        for part in parts.values():
            part()
    if isinstance(timer, GpuTimer):
        profile([forward], timer)  # the profiler's own start
    samples: list[dict[str, float]] = []
    launches: dict[str, int] = {}
    others: dict[str, float] = {}
    for turn in range(PROFILES):
        order = [("repeated", "packed"), ("packed", "repeated")][turn % 2]
        spans = dict(zip(("forward", "mask", *order), _profiled(forward, parts, order, timer), strict=True))
        kept = {part: [one for one in spans[part] if is_ours(one)] for part in ("forward", "repeated", "packed")}
        launches = {part: len(one) for part, one in kept.items()} | {"mask": len(spans["mask"])}
        others = {}
        for one in spans["repeated"]:
            if not is_ours(one):
                others[one.name[:120]] = others.get(one.name[:120], 0.0) + one.end - one.begin
        sample = {part: total(one) for part, one in spans.items() if part != "forward"}
        sample["forward"] = total(kept["forward"])
        sample["attention"] = sample["forward"] + sample["mask"] + sum(others.values())
        sample["repeated"] += sample["mask"]
        sample |= {"busy": busy(kept["forward"]), "packed_busy": busy(spans["packed"])}
        samples.append(sample)
    middle = {f"{part}_us": round(statistics.median(one[part] for one in samples), 3) for part in samples[0]}
    return middle | {
        "over_packed": round(middle["attention_us"] / middle["packed_us"], 4),
        "repeated_over_packed": round(middle["repeated_us"] / middle["packed_us"], 4),
        "calls": len(calls),
        "launches": launches,
        "others_us": {text: round(us, 3) for text, us in others.items()},
        "difference": difference,
        "samples": len(samples),
    }


def _all(calls: Sequence[Call]) -> None:
    for call in calls:
        call()


def _profiled(forward: Call, parts: dict[str, Call], order: tuple[str, str], timer: Timer) -> list[list[Span]]:
    """Of the forward pass, the mask function and the parts in `order`; each of these behind a whole pass."""
    if isinstance(timer, GpuTimer):
        found = profile([forward, parts["mask"], parts[order[0]], forward, parts[order[1]]], timer)
        return [*found[:3], found[4]]
    return [_clocked(parts[part]) for part in ("repeated", "mask", *order)]


def _clocked(run: Call) -> list[Span]:
    begin = time.perf_counter()
    run()
    return [Span(_entry(), 1e6 * begin, 1e6 * time.perf_counter())]


def profile(runs: Sequence[Call], timer: GpuTimer) -> list[list[Span]]:
    """What the device did in each of `runs`, which are queued one behind the other."""
    import torch
    from torch.autograd import DeviceType
    from torch.profiler import ProfilerActivity

    timer.synchronize()
    with torch.profiler.profile(activities=[ProfilerActivity.CUDA]) as seen:
        for place, run in enumerate(runs):
            if place:
                torch.cuda._sleep(1000)
            run()
        timer.synchronize()
    spans = [
        Span(one.name, one.time_range.start, one.time_range.end)
        for one in seen.events() or ()
        if one.device_type == DeviceType.CUDA
    ]
    return split(spans, len(runs))


def split(spans: Sequence[Span], parts: int) -> list[list[Span]]:
    """Spans by the marks between them, in the order of time. Raises RuntimeError if there are not parts - 1 marks."""
    found: list[list[Span]] = [[]]
    for one in sorted(spans, key=lambda one: one.begin):
        if _MARK in one.name:
            found.append([])
        else:
            found[-1].append(one)
    if len(found) != parts:
        raise RuntimeError(f"the profiler saw {len(found) - 1} marks between {parts} parts")
    return found


def _entry() -> str:
    from flashmoe_cupy.jit.source import ENTRY

    return ENTRY


def is_ours(one: Span) -> bool:
    """Whether it is one of our kernels, which all have the same name."""
    return _entry() in one.name


def total(spans: Sequence[Span]) -> float:
    """Their sum."""
    return sum(one.end - one.begin for one in spans)


def busy(spans: Sequence[Span]) -> float:
    """The time in which at least one of them runs: a kernel may start before the end of the one in front of it."""
    found, last = 0.0, float("-inf")
    for one in sorted(spans, key=lambda one: one.begin):
        found += max(0.0, one.end - max(one.begin, last))
        last = max(last, one.end)
    return found


# ---------------------------------------------------------------------------------------------------------------------
# the bars


class Bar(NamedTuple):
    """value, at most limit; None where it was not measured."""

    text: str
    value: float | None
    limit: float

    def word(self) -> str:
        if self.value is None:
            return "not measured"
        return "pass" if self.value <= self.limit else "FAIL"


def bars(result: dict[str, Any]) -> list[Bar]:
    """The bars of a padded batch, from the figures that are written."""
    rows = {name: row["ms"] for name, row in result["implementations"].items() if row["status"] == "ok"}

    def over(name: str) -> float | None:
        return rows[OURS] / rows[name] if OURS in rows and name in rows else None

    alone = result.get("attention") or {}
    return [
        Bar("padded, time over that of SDPA", over(SDPA), 0.70),
        Bar("padded, time over that without padding", over(UNPADDED), 1.0),
        Bar("attention calls alone, time over that of packed calls", alone.get("over_packed"), 1.12),
    ]


def wrong(alone: dict[str, Any]) -> list[str]:
    """What is not as it must be in the attention calls alone."""
    found = []
    if not alone["difference"] <= DIFFERENCE_LIMIT:
        found.append(f"attention of the last layer, padded to packed: {alone['difference']:.2%} apart")
    seen = alone["launches"]
    if seen["forward"] != seen["repeated"] or not seen["forward"]:
        found.append(f"the profiler saw {seen['forward']} of our kernels in a pass and {seen['repeated']} repeated")
    return found
