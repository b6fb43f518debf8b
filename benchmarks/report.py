"""Tables, ratios and plots from the JSON lines that run.py wrote. Never measures.

python benchmarks/report.py                                     tables of the newest results
python benchmarks/report.py --ratio attention_forward_portable  last line: geomean X.XXX min Y.YYY rows N
python benchmarks/report.py --ratio attention_forward_features  and, above it, our features over our plain kernel
python benchmarks/report.py --ratio moe_forward                 and, above it, the bars that the suite is held to
python benchmarks/report.py --plot --readme                     plots, and the block of README.md made from them
"""

from __future__ import annotations

import argparse
import math
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

ROOT = Path(__file__).resolve().parent.parent
if not __package__:  # run as a file: the repository takes the place of this folder on the path
    sys.path[0] = str(ROOT)

from benchmarks import bars, moe_report  # noqa: E402
from benchmarks.cases import (  # noqa: E402
    OUR_LIBRARIES,
    OURS,
    OURS_PLAIN,
    OURS_SM80,
    PLAIN_TWIN,
    SUITES,
    TWIN_LIMIT,
    Suite,
)
from benchmarks.moe_cases import ALL_SUITES, MOE_SUITES  # noqa: E402
from benchmarks.rows import (  # noqa: E402
    LABELS,
    ReportError,
    Row,
    Table,
    facts,
    load,
    newest,
    of_device,
    show,
    state,
    timed,
)

if TYPE_CHECKING:
    from collections.abc import Sequence

RESULTS = ROOT / "benchmarks" / "results"
COLOURS = {
    OURS: "#0072b2",
    OURS_SM80: "#0072b2",
    "torch_fa2": "#d55e00",
    "torch_cudnn": "#009e73",
    "torch_sdpa": "#e69f00",
    "flex_attention": "#cc79a7",
    "fa3": "#56b4e9",
    "fa4": "#000000",
}
_FAILED = ("error", "wrong", "missing")
MEASURES = {"device_us": "µs", "host_us": "host µs"}


class Comparison(NamedTuple):
    """One case: our row, the best right rival's row (None: every rival says it cannot), ours over theirs in speed."""

    case: str
    ours: Row
    rival: Row | None
    ratio: float


def compare(rows: Sequence[Row], suite: Suite[Any], device: str = "") -> list[Comparison]:
    """Ours against the best rival, for every case of the suite.

    A case that every rival of these rows declares unsupported has rival None and takes no part in the ratio. Anything
    else that is lacking, of ours or of all rivals, raises ReportError with the whole list.
    """
    found = newest(rows, suite.name, device)
    known = [name for name in suite.rivals if any(name in here for here in found.values())]
    made, lacking = [], []
    for case in suite.cases:
        here = found.get(case.name, {})
        ours = here.get(suite.ours)
        if ours is None or not timed(ours, suite.measure):
            lacking.append(f"{case.name}: {suite.ours} {state(ours)}")
            continue
        rivals = [here[name] for name in suite.rivals if name in here]
        right = [row for row in rivals if timed(row, suite.measure)]
        if right:
            best = min(right, key=lambda row: float(row[suite.measure]))
            made.append(Comparison(case.name, ours, best, best[suite.measure] / ours[suite.measure]))
        elif rivals and all(row["status"] == "unsupported" for row in rivals) and len(rivals) == len(known):
            made.append(Comparison(case.name, ours, None, math.nan))
        else:
            states = ", ".join(f"{name} {state(here.get(name))}" for name in suite.rivals)
            lacking.append(f"{case.name}: no rival to compare with ({states})")
    if lacking:
        count = f"{len(lacking)} of {len(suite.cases)} rows of {suite.name} are missing"
        raise ReportError("\n  ".join([count, *lacking]))
    if not any(item.rival for item in made):
        raise ReportError(f"no row of {suite.name} has a rival")
    return made


def twins(rows: Sequence[Row], suite: Suite[Any], device: str = "") -> list[Comparison]:
    """Our own features against our own plain kernel: `rival` is our row of the case's plain twin in the same run.

    Only of a suite that has the twins. ReportError when a run that timed both is lacking.
    """
    runs: dict[str, dict[str, Row]] = {}
    for row in of_device(rows, suite.name, device):
        if row["library"] == suite.ours and timed(row, suite.measure):
            runs.setdefault(str(row["run"]), {})[row["case"]] = row
    made, lacking = [], []
    names = {case.name for case in suite.cases}
    for name in (case.name for case in suite.cases if PLAIN_TWIN.get(case.name) in names):
        twin = PLAIN_TWIN[name]
        both = [run for run, cases in runs.items() if name in cases and twin in cases]
        if not both:
            lacking.append(f"{name}: no run timed it and {twin}")
            continue
        ours, plain = runs[max(both)][name], runs[max(both)][twin]
        made.append(Comparison(name, ours, plain, plain[suite.measure] / ours[suite.measure]))
    if lacking:
        raise ReportError("\n  ".join([f"features of {suite.name} without their plain twin", *lacking]))
    return made


def beside_plain(rows: Sequence[Row], suite: Suite[Any], device: str = "") -> list[Comparison]:
    """Ours with a bias against ours without it, in turns in one run: `rival` is the row without it."""
    made = []
    for case, here in newest(rows, suite.name, device).items():
        ours, plain = here.get(suite.ours), here.get(OURS_PLAIN)
        if ours and plain and timed(ours, suite.measure) and timed(plain, suite.measure):
            made.append(Comparison(case, ours, plain, plain[suite.measure] / ours[suite.measure]))
    return made


def summary(comparisons: Sequence[Comparison]) -> str:
    """The last line of --ratio."""
    ratios = [item.ratio for item in comparisons if item.rival is not None]
    geomean = math.exp(math.fsum(math.log(ratio) for ratio in ratios) / len(ratios))
    return f"geomean {geomean:.3f} min {min(ratios):.3f} rows {len(ratios)}"


def twin_summary(comparisons: Sequence[Comparison]) -> str:
    """One line: the slowest feature, and which are below the limit."""
    below = [item.case for item in comparisons if item.ratio < TWIN_LIMIT]
    state = f"below {TWIN_LIMIT}: {', '.join(below)}" if below else f"none below {TWIN_LIMIT}"
    return f"against our own plain kernel: {summary(comparisons)}, {state}"


def absent(rows: Sequence[Row], suite: Suite[Any], device: str = "") -> list[str]:
    """Rivals of the suite that gave no time in any case, with the reason of the first."""
    found = newest(rows, suite.name, device)
    lines = []
    for name in suite.rivals:
        here = [case[name] for case in found.values() if name in case]
        if not any(row["status"] == "ok" for row in here):
            lines.append(f"{LABELS.get(name, name)}: {state(here[0] if here else None)}")
    return lines


def gaps(comparisons: Sequence[Comparison], rows: Sequence[Row], suite: Suite[Any], device: str = "") -> list[str]:
    """Cases in which a rival that should have a time has none, so that the ratio is against the others only."""
    found = newest(rows, suite.name, device)
    lines = []
    for name in suite.rivals:
        states = {item.case: found[item.case].get(name) for item in comparisons}
        if any(row is not None and row["status"] == "ok" for row in states.values()):
            lost = {case: row for case, row in states.items() if row is None or row["status"] in _FAILED}
            lines += [f"{LABELS.get(name, name)} in {case}: {state(row)}" for case, row in lost.items()]
    return lines


def notes(comparisons: Sequence[Comparison], rows: Sequence[Row], suite: Suite[Any], device: str = "") -> list[str]:
    """What rows of the suite say of what they measured, and of which cases."""
    found = newest(rows, suite.name, device)
    cases: dict[tuple[str, str], list[str]] = {}
    for item in comparisons:
        for name, row in found[item.case].items():
            if row["status"] == "ok" and row.get("note"):
                cases.setdefault((LABELS.get(name, name), row["note"]), []).append(item.case)
    return [f"{label} in {', '.join(names)}: {note}" for (label, note), names in cases.items()]


def suite_table(rows: Sequence[Row], suite: str, device: str = "") -> Table:
    """One line per case, one column per library: speed and share of the ceiling, or why there is none."""
    found = newest(rows, suite, device)
    names = [name for name in LABELS if any(name in case for case in found.values())]
    host = ALL_SUITES[suite].measure == "host_us"
    cells = [(case, *(_cell(here.get(name), host) for name in names)) for case, here in found.items()]
    everything = [row for here in found.values() for row in here.values()]
    rate = "tokens/s" if any(row.get("tokens_per_s") for row in everything) else "TFLOP/s"
    measure = "host µs of a call" if host else f"{rate} (µs, share of the matrix product ceiling)"
    return Table(f"{suite}: {measure}\n{facts(everything)}", ("case", *(LABELS[name] for name in names)), cells)


def _cell(row: Row | None, host: bool) -> str:
    if row is None:
        return "-"
    if row["status"] != "ok":
        return str(row["status"])
    if host:
        return "-" if row.get("host_us") is None else f"{row['host_us']:.1f}"
    speed = f"{row['tokens_per_s']:,.0f}" if row.get("tokens_per_s") else f"{row['tflops']:.3g}"
    return f"{speed} ({row['device_us']:.0f}, {100 * row['share']:.0f} %)"


def ratio_table(comparisons: Sequence[Comparison], suite: Suite[Any]) -> Table:
    """One line per case: ours, the best rival, the ratio."""
    unit = MEASURES[suite.measure]
    head = ("case", f"ours {unit}", "best rival", f"rival {unit}", "ratio", "error", "rival's error")
    cells: list[tuple[str, ...]] = []
    for item in comparisons:
        mine, theirs = f"{item.ours[suite.measure]:.1f}", ("none", "-", "-", "-")
        if item.rival is not None:
            name, error = LABELS[item.rival["library"]], f"{item.rival.get('error', math.nan):.1e}"
            theirs = name, f"{item.rival[suite.measure]:.1f}", f"{item.ratio:.3f}", error
        cells.append((item.case, mine, *theirs[:3], f"{item.ours.get('error', math.nan):.1e}", theirs[3]))
    return Table(f"{suite.name}\n{facts(item.ours for item in comparisons)}", head, cells)


def twin_table(comparisons: Sequence[Comparison], suite: Suite[Any]) -> Table:
    """One line per feature that rivals lack: ours with it, ours without it, the ratio."""
    unit = MEASURES[suite.measure]
    head = ("case", f"ours {unit}", "plain twin", f"twin {unit}", "ratio", "limit", "error")
    cells: list[tuple[str, ...]] = []
    for item in comparisons:
        mine, twin = f"{item.ours[suite.measure]:.1f}", f"{(item.rival or {})[suite.measure]:.1f}"
        error = f"{item.ours.get('error', math.nan):.1e}"
        cells.append((item.case, mine, PLAIN_TWIN[item.case], twin, f"{item.ratio:.3f}", f"{TWIN_LIMIT:.3f}", error))
    return Table(f"{suite.name}: against our own plain kernel", head, cells)


def plain_table(comparisons: Sequence[Comparison], suite: Suite[Any]) -> Table:
    """One line per case with a bias: ours with it, ours without it, the ratio."""
    unit = MEASURES[suite.measure]
    cells: list[tuple[str, ...]] = []
    for item in comparisons:
        mine, plain = f"{item.ours[suite.measure]:.1f}", f"{(item.rival or {})[suite.measure]:.1f}"
        cells.append((item.case, mine, plain, f"{item.ratio:.3f}"))
    title = f"{suite.name}: against our own kernel without the bias"
    return Table(title, ("case", f"ours {unit}", f"without the bias {unit}", "ratio"), cells)


def plot(rows: Sequence[Row], suite: str, folder: Path, device: str = "") -> list[Path]:
    """Throughput against length, a column of panels per head dim, causal and full; the measured ceiling drawn in."""
    import matplotlib as mpl

    mpl.use("Agg")
    mpl.rcParams["svg.hashsalt"] = suite  # the same rows give the same file
    from matplotlib import pyplot

    found = newest(rows, suite, device)
    right = [row for here in found.values() for row in here.values() if row["status"] == "ok"]
    if not right:
        raise ReportError(f"{suite} has no measured row to plot")
    dims = sorted({row["shape"]["head_dim"] for row in right})
    ceiling = max(row["ceiling_tflops"] for row in right)
    figure, axes = pyplot.subplots(
        2, len(dims), figsize=(3.4 * len(dims), 5.4), sharex=True, sharey=True, squeeze=False
    )
    for line, causal in enumerate((False, True)):
        for column, dim in enumerate(dims):
            axis = axes[line][column]
            panel = [row for row in right if row["shape"]["head_dim"] == dim and row["shape"]["causal"] == causal]
            for name in LABELS:
                points = sorted((row["shape"]["seqlen_q"], row["tflops"]) for row in panel if row["library"] == name)
                if points:
                    style = {"linewidth": 2.4, "zorder": 3} if name in OUR_LIBRARIES else {"linewidth": 1.4}
                    axis.plot(*zip(*points, strict=True), "o-", color=COLOURS[name], label=LABELS[name], ms=4, **style)
            axis.axhline(ceiling, color="#555555", linestyle="--", linewidth=1, label="8192³ matrix product")
            axis.set_xscale("log", base=2)
            lengths = sorted({row["shape"]["seqlen_q"] for row in right})
            axis.set_xticks(lengths, [f"{n // 1024}k" if n >= 1024 else str(n) for n in lengths])
            axis.set_title(f"head dim {dim}, {'causal' if causal else 'full'}", fontsize=10)
            axis.grid(alpha=0.3)
            axis.set_ylim(0, None)
    for axis in axes[-1]:
        axis.set_xlabel("sequence length")
    for line_axes in axes:
        line_axes[0].set_ylabel("TFLOP/s")
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="lower center", ncol=len(labels), frameon=False, fontsize=9)
    one = max(right, key=lambda row: str(row["run"]))
    title = f"Attention forward, {one['shape']['dtype']}, {one['shape']['batch'] * one['shape']['seqlen_q']:,} tokens"
    figure.suptitle(f"{title}, {one['device']}", fontsize=11)
    figure.tight_layout(rect=(0, 0.05, 1, 1))
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{suite}.png", folder / f"{suite}.svg"]
    figure.savefig(paths[0], dpi=150, metadata={"Software": None})
    figure.savefig(paths[1], metadata={"Date": None})
    pyplot.close(figure)
    return paths


def readme_block(rows: Sequence[Row], suite: Suite[Any], image: str, device: str = "") -> str:
    """The text between the markers: the plot, and a folded table (a line per head dim and mask, a column a length)."""
    comparisons = compare(rows, suite, device)
    lengths = sorted({case.seqlen_q for case in suite.cases})
    shapes = {case.name: (case.head_dim, case.causal, case.seqlen_q) for case in suite.cases}
    at = {shapes[item.case]: item for item in comparisons}
    left_out = absent(rows, suite, device)
    rivals = [LABELS[name] for name in suite.rivals if not any(line.startswith(LABELS[name]) for line in left_out)]
    others = rivals[0] if len(rivals) == 1 else f"the best of {', '.join(rivals[:-1])} and {rivals[-1]}"
    cells = []
    for dim in sorted({key[0] for key in at}):
        for causal in (False, True):
            line = [at.get((dim, causal, length)) for length in lengths]
            text = ("-" if c is None else f"{c.ours['tflops']:.0f} ({c.ratio:.2f})" for c in line)
            cells.append((f"{dim}, {'causal' if causal else 'full'}", *text))
    table = Table("", ("head dim, mask", *(f"{length:,}" for length in lengths)), cells)
    return "\n\n".join(
        (
            f"![throughput against sequence length]({image})",
            "<details><summary>These figures as a table, and what they were measured with</summary>",
            "Attention forward in TFLOP/s by sequence length; in brackets the speed over "
            f"{others} in the same process ({summary(comparisons)}).",
            table.markdown(),
            f"{facts(item.ours for item in comparisons)}. Made by `python benchmarks/report.py --readme`.",
            "</details>",
        )
    )


def rewrite(path: Path, block: str) -> None:
    """Put `block` between the result markers of a file; ReportError when it has no such pair."""
    text = path.read_text(encoding="utf-8")
    begin, end = "<!-- results -->", "<!-- /results -->"
    first, last = text.find(begin), text.find(end)
    if not 0 <= first < last:
        raise ReportError(f"{path} has no {begin} … {end} block")
    path.write_text(f"{text[: first + len(begin)]}\n{block}\n{text[last:]}", encoding="utf-8")


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="benchmarks/report.py", description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("files", nargs="*", type=Path, help="JSON lines (default: benchmarks/results/*.jsonl)")
    parser.add_argument("--suite", nargs="+", choices=sorted(ALL_SUITES), help="default: every suite with rows")
    parser.add_argument(
        "--ratio", choices=sorted(ALL_SUITES), metavar="SUITE", help="ours over the best rival, per row"
    )
    parser.add_argument("--markdown", action="store_true", help="tables as Markdown")
    parser.add_argument("--plot", action="store_true", help="PNG and SVG beside the results")
    parser.add_argument(
        "--readme", nargs="?", const=ROOT / "README.md", type=Path, metavar="FILE", help="rewrite its block"
    )
    parser.add_argument("--device", default="", metavar="REGEX", help="only rows of this device")
    parser.add_argument("--results", default=RESULTS, type=Path, metavar="FOLDER", help="default: %(default)s")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Report; 1 with a message on standard error when rows are missing or wrong."""
    options = parse(arguments)
    try:
        return _main(options)
    except (ReportError, OSError) as error:
        print(f"report: {error}", file=sys.stderr)
        return 1


def _main(options: argparse.Namespace) -> int:
    files = options.files or sorted(options.results.glob("*.jsonl"))
    if not files:
        raise ReportError(f"no results: {options.results} has no .jsonl file; benchmarks/run.py --out makes one")
    rows = load(files)
    if options.ratio:
        suite = ALL_SUITES[options.ratio]
        verdicts = bars.judge(rows, suite.name, options.device)
        if verdicts:  # before the ratios, which want a row of every case
            show(bars.bars_table(verdicts, suite.name), options.markdown)
            print(bars.bars_summary(verdicts))
        comparisons = compare(rows, suite, options.device)
        features = twins(rows, suite, options.device)
        alone = {item.case for item in features} & {item.case for item in comparisons if item.rival is None}
        show(ratio_table([item for item in comparisons if item.case not in alone], suite), options.markdown)
        if features:
            show(twin_table(features, suite), options.markdown)
            print(twin_summary(features))
        if plain := beside_plain(rows, suite, options.device):
            show(plain_table(plain, suite), options.markdown)
            print(f"against our own kernel without the bias: {summary(plain)}")
        for line in (*absent(rows, suite, options.device), *gaps(comparisons, rows, suite, options.device)):
            print(f"not compared: {line}")
        for line in notes(comparisons, rows, suite, options.device):
            print(f"note: {line}")
        print(summary(comparisons))
        return 0
    names = [name for name in ALL_SUITES if any(row["suite"] == name for row in rows)]
    names = options.suite or names
    if options.plot or options.readme:
        dense = [name for name in names if name in ("attention_forward", "attention_forward_portable")]
        curve = ["moe_curve"] if "moe_curve" in names else []
        if not dense and (options.readme or not curve):
            raise ReportError("plots are made of attention_forward or attention_forward_portable: no rows of either")
        images = {name: plot(rows, name, options.results, options.device)[1] for name in dense}
        images |= {name: moe_report.plot_curve(rows, options.results, options.device)[1] for name in curve}
        for image in images.values():
            print(f"wrote {image.with_suffix('.png')} and {image.name}")
        if options.readme:
            name = "attention_forward" if "attention_forward" in dense else dense[0]
            image = images[name].resolve()
            folder = options.readme.resolve().parent
            link = image.relative_to(folder) if image.is_relative_to(folder) else image
            rewrite(options.readme, readme_block(rows, SUITES[name], link.as_posix(), options.device))
            print(f"rewrote {options.readme}")
        return 0
    for name in names:
        if not newest(rows, name, options.device):
            raise ReportError(f"no rows of {name}")
        table = moe_report.moe_table if name in MOE_SUITES else suite_table
        show(table(rows, name, options.device), options.markdown)
    return 0


if __name__ == "__main__":
    sys.exit(main())
