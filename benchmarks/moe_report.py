"""Tables and plot of the mixture of experts, made from rows. Never measures."""

from __future__ import annotations

from typing import TYPE_CHECKING

from benchmarks.cases import OURS
from benchmarks.moe_cases import MOE_SUITES
from benchmarks.rows import LABELS, ReportError, Row, Table, facts, newest, timed

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path


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
