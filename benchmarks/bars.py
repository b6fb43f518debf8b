"""The bars that suites are held to, judged from rows. Never measures."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple

from benchmarks.backward_cases import AUTOGRAD_SUITES, BACKWARD_SUITES
from benchmarks.cases import (
    OURS,
    OURS_DETERMINISTIC,
    OURS_FLASH_ATTN,
    OURS_PACKED,
    OURS_SDPA,
    OURS_SM80,
    OURS_WITHOUT,
    SUITES,
)
from benchmarks.moe_cases import DRAWN, MOE_SUITES
from benchmarks.numpy_backend import NAME, TORCH
from benchmarks.rows import LABELS, Row, Table, of_device, state, timed
from benchmarks.training_cases import FINE_TUNING

if TYPE_CHECKING:
    from collections.abc import Sequence

    from benchmarks.backward_cases import BackwardCase

DENSE = "share of the dense product"  # our TFLOP/s over those of an 8192³ bf16 matrix product of the same rounds
READ = "share of the read rate"  # GB/s of the weights that are needed over those of a big read of the same rounds
SPEED = "speed over"  # the fastest of some libraries of the same run
MEAN = "geomean of the speed over"  # the same of every case of a group
LEAST = "least speed over"
HOST = "host µs of a call"
TIME = "time over that of"  # some library of the same run
LOSS = "largest difference of a mean loss from eager's"
LOSS_SHARE = "that difference over eager's from SDPA's"
_FIELDS = {DENSE: "share", READ: "read_share", HOST: "host_us", LOSS: "loss_apart", LOSS_SHARE: "loss_apart_ratio"}
_AT_MOST = (HOST, TIME, LOSS, LOSS_SHARE)


class Bar(NamedTuple):
    """One line that has to hold: `kind` of our row of `case` is at least `limit`; for those in _AT_MOST at most.

    MEAN and LEAST are of the rows of all `cases`; `case` says which these are. A case that all rivals say they cannot
    compute takes no part. `ours`: the library of ours whose row it is.
    """

    suite: str
    case: str
    kind: str
    limit: float
    rivals: tuple[str, ...] = ()
    cases: tuple[str, ...] = ()
    ours: str = OURS

    def text(self) -> str:
        text = f"{self.kind} {', '.join(LABELS[name] for name in self.rivals)}" if self.rivals else self.kind
        return text if self.ours == OURS else f"{LABELS[self.ours]}: {text}"


class Verdict(NamedTuple):
    """A bar and what was measured: `value` is NaN when there is none, and `note` says why."""

    bar: Bar
    value: float
    note: str = ""

    @property
    def passed(self) -> bool:
        return self.value <= self.bar.limit if self.bar.kind in _AT_MOST else self.value >= self.bar.limit

    def word(self) -> str:
        if math.isnan(self.value):
            return "not measured"
        return "pass" if self.passed else "FAIL"


def _all(suite: str, cases: Sequence[str], what: str, mean: float, least: float, rivals: tuple[str, ...]) -> list[Bar]:
    """The two bars of a group; mean 0: only the least has to hold."""
    title = f"{len(cases)} {what}"
    both = Bar(suite, title, MEAN, mean, rivals, tuple(cases)), Bar(suite, title, LEAST, least, rivals, tuple(cases))
    return list(both if mean else both[1:])


def _names(suite: str) -> list[str]:
    return [case.name for case in (SUITES | BACKWARD_SUITES)[suite].cases]


def _deterministic() -> list[Bar]:
    """What the same bits in every run may cost, and that they cost FA3 more."""
    suite = "attention_backward"
    long = [c.name for c in BACKWARD_SUITES[suite].cases if c.causal and c.head_dim <= 128 and c.seqlen_q >= 4096]
    beside_ours = _all(suite, long, "long causal rows of d 64 and 128", 0, 0.88, (OURS,))
    beside_fa3 = _all(suite, _names(suite), "rows", 0, 1.0, ("fa3_deterministic",))
    return [bar._replace(ours=OURS_DETERMINISTIC) for bar in (*beside_ours, *beside_fa3)]


def _portable() -> Bar:
    """The portable kernel beside FlashAttention-2."""
    names = _names("attention_backward_portable")
    return Bar(
        "attention_backward_portable", f"{len(names)} rows", MEAN, 1.0, ("torch_flash",), tuple(names), ours=OURS_SM80
    )


def _host_libraries(case: BackwardCase) -> list[str]:
    """Those of ours that serve a call: SDPA's has no packed sequences, flash-attn's no layout bhsd."""
    lacking = {OURS_SDPA: case.varlen, OURS_FLASH_ATTN: case.layout != "bshd"}
    return [name for name in (OURS, OURS_FLASH_ATTN, OURS_SDPA) if not lacking.get(name)]


_VLLM = ("vllm_triton",)
_DECODE = MOE_SUITES["moe_decode"].cases
_GROUPED = ("torch_grouped_mm", "torch_index_add")
_QWEN, _LOOP = "qwen3_30b_a3b", "t4096_d2048_n512_e256_k8"
BARS = (
    *_all("attention_forward", _names("attention_forward"), "rows", 1.01, 0.95, SUITES["attention_forward"].rivals),
    *(
        Bar("attention_bias", name, TIME, 1.0, ("torch_cudnn",))
        for name in _names("attention_bias")
        if not name.endswith("_fp16")
    ),
    Bar("attention_bias", "pair_bf16", TIME, 1.0, ("cuequivariance",)),  # where that is to be had
    *(Bar("attention_mask", name, TIME, 0.6, ("torch_cudnn",)) for name in _names("attention_mask")),
    *_all("attention_padding", _names("attention_padding"), "rows", 0, 0.92, (OURS_PACKED,)),
    *(
        Bar("attention_few_keys", name, SPEED, limit, ("fa3",))
        for name, limit in zip(_names("attention_few_keys"), (1.0, 1.0, 0.97), strict=True)
    ),
    *_all("attention_backward", _names("attention_backward"), "rows", 1.0, 0.92, ("fa3", "torch_cudnn", "fa4")),
    *_deterministic(),
    *_all("attention_backward_features", _names("attention_backward_features"), "rows", 1.0, 0.9, ("fa3",)),
    *(Bar("attention_backward_cost", name, TIME, 1.25, (OURS_WITHOUT,)) for name in _names("attention_backward_cost")),
    *(
        Bar("attention_backward_bias", name, TIME, 0.6, ("torch_efficient",))
        for name in _names("attention_backward_bias")
        if name.endswith("_bf16")
    ),
    _portable(),
    *(
        Bar("attention_backward_host", case.name, HOST, 60.0, ours=library)
        for case in AUTOGRAD_SUITES["attention_backward_host"].cases
        for library in _host_libraries(case)
    ),
    *(
        Bar(suite.name, case.name, kind, limit)
        for suite in FINE_TUNING.values()
        for case in suite.cases
        for kind, limit in ((LOSS, 0.02), (LOSS_SHARE, 2.0))
    ),
    Bar("moe_forward", f"{_QWEN}_t16384", DENSE, 0.71),
    Bar("moe_forward", "olmoe_t16384", DENSE, 0.80),
    Bar("moe_forward", "t24576_d1536_n256_e128_k8", DENSE, 0.56),
    Bar("moe_forward", "t32768_d4096_n1024_e128_k8", DENSE, 0.72),
    Bar("moe_forward", "mixtral_8x7b_t8192", DENSE, 0.80),
    Bar("moe_forward", f"{_QWEN}_t16384", SPEED, 1.8, _GROUPED),
    Bar("moe_forward", _LOOP, SPEED, 5.0, ("torch_loop",)),
    Bar("moe_forward", "deepseek_v3_t4096", SPEED, 4.5, ("torch_loop",)),
    Bar("moe_forward", "deepseek_v3_t4096", READ, 0.80),
    Bar("moe_decode", f"{_QWEN}_t1", READ, 0.70),
    Bar("moe_decode", f"{_QWEN}_t4", READ, 0.85),
    *(Bar("moe_decode", f"{_QWEN}_t{tokens}", READ, 0.94) for tokens in (16, 64, 256)),
    Bar("moe_decode", "mixtral_8x7b_t1", READ, 0.90),
    *_all("moe_decode", [c.name for c in _DECODE if c.source != DRAWN], "rows of models", 1.04, 0.98, _VLLM),
    *_all("moe_decode", [c.name for c in _DECODE if c.source == DRAWN], DRAWN, 1.0, 0.97, _VLLM),
    *(Bar("moe_host", case.name, HOST, 30.0) for case in MOE_SUITES["moe_host"].cases),
    Bar(NAME, "attention_fp32_2k_causal", TIME, 2.0, (TORCH,)),
    Bar(NAME, "attention_bf16_2k_causal", TIME, 2.0, (TORCH,)),
    Bar(NAME, "router_4096_64_k8", TIME, 2.0, (TORCH,)),
    Bar(NAME, "fused_moe_t1024", TIME, 1.3, (TORCH,)),
    Bar(NAME, "attention_8_tokens", HOST, 70.0),
)


def judge(rows: Sequence[Row], suite: str, device: str = "") -> list[Verdict]:
    """Every bar of the suite against the newest run that measured all that it needs."""
    runs: Runs = {}
    for row in of_device(rows, suite, device):
        runs.setdefault(row["case"], {}).setdefault(str(row["run"]), {})[row["library"]] = row
    return [_judge_all(bar, runs) if bar.cases else _newest(bar, runs) for bar in BARS if bar.suite == suite]


Runs = dict[str, dict[str, dict[str, Row]]]  # case -> run -> library -> row


def _newest(bar: Bar, runs: Runs) -> Verdict:
    """A bar against the newest run that has all that it needs."""
    found = [_judge(bar, here) for _, here in sorted(runs.get(bar.case, {}).items(), reverse=True)]
    measured = [verdict for verdict in found if not math.isnan(verdict.value)]
    return (measured or found or [Verdict(bar, math.nan, "no run has this case")])[0]


def _judge_all(bar: Bar, runs: Runs) -> Verdict:
    """A bar of a group: every case against the fastest rival of its own run."""
    held = [case for case in bar.cases if not _impossible(bar, runs.get(case, {}))]
    if not held:
        return Verdict(bar, math.nan, "no rival can compute any of these rows")
    found = [_newest(bar._replace(case=case, kind=SPEED, cases=()), runs) for case in held]
    lacking = [verdict for verdict in found if math.isnan(verdict.value)]
    if lacking:
        first = f"{lacking[0].bar.case}: {lacking[0].note}"
        return Verdict(bar, math.nan, f"{len(lacking)} of {len(found)} rows are missing; {first}")
    here = [library for case in bar.cases for run in runs[case].values() for library in run.items()]
    seen = {name for name, row in here if timed(row, "device_us")}
    notes = [f"without {LABELS[name]}" for name in bar.rivals if name not in seen]
    if len(held) < len(bar.cases):
        notes.append(f"{len(held)} rows that it has" if len(bar.rivals) == 1 else f"{len(held)} rows that they have")
    if bar.kind == MEAN:
        return Verdict(bar, math.exp(math.fsum(math.log(v.value) for v in found) / len(found)), ", ".join(notes))
    least = min(found, key=lambda verdict: verdict.value)
    return Verdict(bar, least.value, ", ".join([f"{least.bar.case}, {least.note}", *notes]))


def _impossible(bar: Bar, by_run: dict[str, dict[str, Row]]) -> bool:
    """Whether every rival of the bar says, in the newest run that asked it, that it cannot compute the case."""
    newest = {name: row for _, here in sorted(by_run.items()) for name, row in here.items()}
    found = [newest[name] for name in bar.rivals if name in newest]
    return len(found) == len(bar.rivals) and all(row["status"] == "unsupported" for row in found)


def _judge(bar: Bar, here: dict[str, Row]) -> Verdict:
    """A bar against the rows of one run of its case."""
    ours = here.get(bar.ours)
    field = _FIELDS.get(bar.kind, "device_us")
    if ours is None or not (timed(ours, field) or (timed(ours, "device_us") and ours.get(field) == 0)):
        return Verdict(bar, math.nan, f"{LABELS[bar.ours]}: {state(ours)}")
    if bar.kind not in (SPEED, TIME):
        return Verdict(bar, float(ours[field]), str(ours.get("weights", "")))
    rivals = [here[name] for name in bar.rivals if timed(here.get(name), "device_us")]
    if not rivals:
        return Verdict(bar, math.nan, f"{LABELS[bar.rivals[0]]}: {state(here.get(bar.rivals[0]))}")
    best = min(rivals, key=lambda row: float(row["device_us"]))
    speed = best["device_us"] / ours["device_us"]
    return Verdict(bar, speed if bar.kind == SPEED else 1 / speed, f"against {LABELS[best['library']]}")


def bars_table(verdicts: Sequence[Verdict], suite: str) -> Table:
    """One line per bar."""
    cells: list[tuple[str, ...]] = []
    for item in verdicts:
        sign = "≤" if item.bar.kind in _AT_MOST else "≥"
        value = "-" if math.isnan(item.value) else f"{item.value:.3f}"
        cells.append((item.bar.case, item.bar.text(), f"{sign} {item.bar.limit:g}", value, item.word(), item.note))
    return Table(f"{suite}: what has to hold", ("case", "what", "bar", "measured", "verdict", "note"), cells)


def bars_summary(verdicts: Sequence[Verdict]) -> str:
    """One line: how many bars hold, and which do not."""

    def names(word: str) -> str:
        return ", ".join(f"{item.bar.case} ({item.bar.text()})" for item in verdicts if item.word() == word)

    text = f"bars: {sum(item.passed for item in verdicts)} of {len(verdicts)} hold"
    text += f"; FAIL: {names('FAIL')}" if names("FAIL") else ""
    return text + (f"; not measured: {names('not measured')}" if names("not measured") else "")
