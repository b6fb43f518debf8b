"""The bars that the mixture of experts and the NumPy back end are held to, judged from rows; tables and plot of the
mixture. Never measures.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple

from benchmarks.cases import OURS
from benchmarks.moe_cases import MOE_SUITES
from benchmarks.numpy_backend import NAME, TORCH
from benchmarks.rows import LABELS, ReportError, Row, Table, facts, newest, of_device, state, timed

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

DENSE = "share of the dense product"  # our TFLOP/s over those of an 8192³ bf16 matrix product of the same rounds
READ = "share of the read rate"  # GB/s of the weights that are needed over those of a big read of the same rounds
SPEED = "speed over"  # the fastest of some libraries of the same run
HOST = "host µs of a call"
TIME = "time over that of"  # some library of the same run
_FIELDS = {DENSE: "share", READ: "read_share", HOST: "host_us"}


class Bar(NamedTuple):
    """One line that has to hold: `kind` of our row of `case` is at least `limit`; for HOST and TIME at most."""

    suite: str
    case: str
    kind: str
    limit: float
    rivals: tuple[str, ...] = ()

    def text(self) -> str:
        return f"{self.kind} {LABELS[self.rivals[0]]}" if self.rivals else self.kind


class Verdict(NamedTuple):
    """A bar and what was measured: `value` is NaN when there is none, and `note` says why."""

    bar: Bar
    value: float
    note: str = ""

    @property
    def passed(self) -> bool:
        return self.value <= self.bar.limit if self.bar.kind in (HOST, TIME) else self.value >= self.bar.limit

    def word(self) -> str:
        if math.isnan(self.value):
            return "not measured"
        return "pass" if self.passed else "FAIL"


_GROUPED = ("torch_grouped_mm", "torch_index_add")
_QWEN, _LOOP = "qwen3_30b_a3b", "t4096_d2048_n512_e256_k8"
BARS = (
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
    *(Bar("moe_decode", f"{_QWEN}_t{tokens}", READ, 0.95) for tokens in (16, 64, 256)),
    Bar("moe_decode", "mixtral_8x7b_t256", READ, 0.90),
    *(Bar("moe_decode", case.name, SPEED, 1.0, ("vllm_triton",)) for case in MOE_SUITES["moe_decode"].cases),
    *(Bar("moe_host", case.name, HOST, 30.0) for case in MOE_SUITES["moe_host"].cases),
    Bar(NAME, "attention_fp32_2k_causal", TIME, 2.0, (TORCH,)),
    Bar(NAME, "attention_bf16_2k_causal", TIME, 2.0, (TORCH,)),
    Bar(NAME, "router_4096_64_k8", TIME, 2.0, (TORCH,)),
    Bar(NAME, "fused_moe_t1024", TIME, 1.3, (TORCH,)),
    Bar(NAME, "attention_8_tokens", HOST, 70.0),
)


def judge(rows: Sequence[Row], suite: str, device: str = "") -> list[Verdict]:
    """Every bar of the suite against the newest run that measured all that it needs."""
    runs: dict[str, dict[str, dict[str, Row]]] = {}
    for row in of_device(rows, suite, device):
        runs.setdefault(row["case"], {}).setdefault(str(row["run"]), {})[row["library"]] = row
    verdicts = []
    for bar in (bar for bar in BARS if bar.suite == suite):
        found = [_judge(bar, here) for _, here in sorted(runs.get(bar.case, {}).items(), reverse=True)]
        measured = [verdict for verdict in found if not math.isnan(verdict.value)]
        verdicts.append((measured or found or [Verdict(bar, math.nan, "no run has this case")])[0])
    return verdicts


def _judge(bar: Bar, here: dict[str, Row]) -> Verdict:
    """A bar against the rows of one run of its case."""
    ours = here.get(OURS)
    field = _FIELDS.get(bar.kind, "device_us")
    if ours is None or not timed(ours, field):
        return Verdict(bar, math.nan, f"{LABELS[OURS]}: {state(ours)}")
    if bar.kind not in (SPEED, TIME):
        return Verdict(bar, float(ours[field]))
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
        sign = "≤" if item.bar.kind in (HOST, TIME) else "≥"
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


def moe_table(rows: Sequence[Row], suite: str, device: str = "") -> Table:
    """One line per case, a column per library and one for each reference of the same rounds.

    Graphs: microseconds, and GB/s of the weights that are needed; else TFLOP/s.
    """
    found = newest(rows, suite, device)
    names = [name for name in LABELS if any(name in here for here in found.values())]
    host = MOE_SUITES[suite].measure == "host_us"
    cells = []
    for case, here in found.items():
        right = [row for row in here.values() if row["status"] == "ok"]
        seen = [f"{right[0][key]:.4g}" if right else "-" for key in ("experts_touched", "ceiling_tflops", "read_gbps")]
        cells.append((case, seen[0], *(_cell(here.get(name), host) for name in names), *seen[1:]))
    graph = all(case.graph for case in MOE_SUITES[suite].cases)
    measure = "µs (GB/s of weights, share of a read)" if graph else "TFLOP/s (µs, share of the dense product)"
    everything = [row for here in found.values() for row in here.values()]
    title = f"{suite}: {'host µs of a call' if host else measure}\n{facts(everything)}"
    head = ("case", "experts", *(LABELS[name] for name in names), "dense TFLOP/s", "read GB/s")
    return Table(title, head, cells)


def _cell(row: Row | None, host: bool) -> str:
    if row is None:
        return "-"
    if row["status"] != "ok":
        return str(row["status"])
    if host:
        return "-" if row.get("host_us") is None else f"{row['host_us']:.1f}"
    if row["shape"]["graph"]:
        return f"{row['device_us']:.1f} ({row['weight_gbps']:.0f}, {100 * row['read_share']:.0f} %)"
    return f"{row['tflops']:.3g} ({row['device_us']:.0f}, {100 * row['share']:.0f} %)"


def plot_curve(rows: Sequence[Row], folder: Path, device: str = "") -> list[Path]:
    """Time of a layer against tokens, beside what reading the weights of the experts in use and the products take."""
    import matplotlib as mpl

    mpl.use("Agg")
    mpl.rcParams["svg.hashsalt"] = "moe_curve"  # the same rows give the same file
    from matplotlib import pyplot

    found = [here[OURS] for here in newest(rows, "moe_curve", device).values() if timed(here.get(OURS), "device_us")]
    if not found:
        raise ReportError("moe_curve has no measured row to plot")
    found.sort(key=lambda row: int(row["shape"]["tokens"]))
    tokens = [row["shape"]["tokens"] for row in found]
    figure, axis = pyplot.subplots(figsize=(7.2, 4.2))
    read = [row["weight_bytes"] / row["read_gbps"] / 1e3 for row in found]
    product = [row["flops"] / row["ceiling_tflops"] / 1e6 for row in found]
    axis.plot(tokens, read, "--", color="#555555", linewidth=1, label="weights at the rate of a big read")
    axis.plot(tokens, product, ":", color="#555555", linewidth=1.4, label="products at the rate of 8192³")
    ours = [row["device_us"] for row in found]
    axis.plot(tokens, ours, "o-", color="#0072b2", linewidth=2.4, ms=4, label=LABELS[OURS])
    axis.set_xscale("log", base=2)
    axis.set_yscale("log")
    axis.set_xticks(tokens, [f"{n // 1024}k" if n >= 1024 else str(n) for n in tokens])
    axis.set_ylim(0.5 * min(read), None)
    axis.set_xlabel("tokens")
    axis.set_ylabel("µs of a layer")
    axis.grid(alpha=0.3)
    axis.legend(frameon=False)
    axis.set_title(f"{found[0]['shape']['source']}, router included, {found[0]['device']}", fontsize=11)
    figure.tight_layout()
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / "moe_curve.png", folder / "moe_curve.svg"]
    figure.savefig(paths[0], dpi=150, metadata={"Software": None})
    figure.savefig(paths[1], metadata={"Date": None})
    pyplot.close(figure)
    return paths
