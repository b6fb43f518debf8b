"""Tables, ratios and plots from the JSON lines that run.py wrote. Never measures.

python benchmarks/report.py                                     tables of the newest results
python benchmarks/report.py --ratio attention_forward_portable  last line: geomean X.XXX min Y.YYY rows N
python benchmarks/report.py --ratio attention_forward_features  and, above it, our features over our plain kernel
python benchmarks/report.py --plot --readme                     plots, and the block of README.md made from them
"""

from __future__ import annotations

import argparse
import json
import math
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

ROOT = Path(__file__).resolve().parent.parent
if not __package__:  # run as a file: the repository takes the place of this folder on the path
    sys.path[0] = str(ROOT)

from benchmarks.cases import OUR_LIBRARIES, OURS, OURS_SM80, PLAIN_TWIN, SUITES, TWIN_LIMIT, Suite  # noqa: E402

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

RESULTS = ROOT / "benchmarks" / "results"
LABELS = {
    OURS: "flashmoe_cupy",
    OURS_SM80: "flashmoe_cupy (sm_80 kernel)",
    "torch_fa2": "torch FA2",
    "torch_cudnn": "torch cuDNN",
    "torch_sdpa": "torch SDPA",
    "flex_attention": "FlexAttention",
    "fa3": "FA3",
}
COLOURS = {
    OURS: "#0072b2",
    OURS_SM80: "#0072b2",
    "torch_fa2": "#d55e00",
    "torch_cudnn": "#009e73",
    "torch_sdpa": "#e69f00",
    "flex_attention": "#cc79a7",
    "fa3": "#56b4e9",
}
_FAILED = ("error", "wrong", "missing")
MEASURES = {"device_us": "µs", "host_us": "host µs"}

Row = dict[str, Any]


class ReportError(Exception):
    """The rows at hand do not allow what was asked for."""


class Comparison(NamedTuple):
    """One case: our row, the best right rival's row (None: every rival says it cannot), ours over theirs in speed."""

    case: str
    ours: Row
    rival: Row | None
    ratio: float


def load(paths: Iterable[Path]) -> list[Row]:
    """All rows of the files; ReportError names the file and line that is not a row."""
    rows: list[Row] = []
    for path in paths:
        for number, text in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            if not text.strip():
                continue
            try:
                row = json.loads(text)
            except json.JSONDecodeError as error:
                raise ReportError(f"{path}:{number}: not JSON: {error}") from None
            lacking = [key for key in ("suite", "case", "library", "status", "run", "device") if key not in row]
            if lacking:
                raise ReportError(f"{path}:{number}: a row without {', '.join(lacking)}")
            if row.get("schema") == 1 and row["suite"] == "attention_forward_portable" and row["library"] == OURS:
                row["library"] = OURS_SM80  # rows of that schema are from when there was no other kernel
            rows.append(row)
    return rows


def newest(rows: Sequence[Row], suite: str, device: str = "") -> dict[str, dict[str, Row]]:
    """{case: {library: row}} of one suite on one device (`device`, a regular expression; default: the newest run's).

    All rows of a case come from one run, since only rows of one process compare: the newest run that has ours beside
    another library, else the newest that has the case.
    """
    runs: dict[str, dict[str, dict[str, Row]]] = {}
    for row in _of_device(rows, suite, device):
        runs.setdefault(row["case"], {}).setdefault(row["run"], {})[row["library"]] = row
    order = {case.name: place for place, case in enumerate(SUITES[suite].cases)} if suite in SUITES else {}
    mine = SUITES[suite].ours if suite in SUITES else OURS
    return {
        case: max(by_run.items(), key=lambda item: (mine in item[1] and len(item[1]) > 1, item[0]))[1]
        for case, by_run in sorted(runs.items(), key=lambda item: (order.get(item[0], len(order)), item[0]))
    }


def _of_device(rows: Sequence[Row], suite: str, device: str) -> list[Row]:
    """The suite's rows of the device that the newest run is of."""
    found = [row for row in rows if row["suite"] == suite and re.search(device, row["device"])]
    on = max(found, key=lambda row: str(row["run"]))["device"] if found else ""
    return [row for row in found if row["device"] == on]


def _timed(row: Row | None, measure: str) -> bool:
    return row is not None and row["status"] == "ok" and bool(row.get(measure))


def compare(rows: Sequence[Row], suite: Suite, device: str = "") -> list[Comparison]:
    """Ours against the best rival, for every case of the suite.

    A case that every rival declares unsupported has rival None and takes no part in the ratio. Anything else that is
    lacking, of ours or of all rivals, raises ReportError with the whole list.
    """
    found = newest(rows, suite.name, device)
    made, lacking = [], []
    for case in suite.cases:
        here = found.get(case.name, {})
        ours = here.get(suite.ours)
        if ours is None or not _timed(ours, suite.measure):
            lacking.append(f"{case.name}: {suite.ours} {_state(ours)}")
            continue
        rivals = [here[name] for name in suite.rivals if name in here]
        right = [row for row in rivals if _timed(row, suite.measure)]
        if right:
            best = min(right, key=lambda row: float(row[suite.measure]))
            made.append(Comparison(case.name, ours, best, best[suite.measure] / ours[suite.measure]))
        elif rivals and all(row["status"] == "unsupported" for row in rivals) and len(rivals) == len(suite.rivals):
            made.append(Comparison(case.name, ours, None, math.nan))
        else:
            states = ", ".join(f"{name} {_state(here.get(name))}" for name in suite.rivals)
            lacking.append(f"{case.name}: no rival to compare with ({states})")
    if lacking:
        count = f"{len(lacking)} of {len(suite.cases)} rows of {suite.name} are missing"
        raise ReportError("\n  ".join([count, *lacking]))
    if not any(item.rival for item in made):
        raise ReportError(f"no row of {suite.name} has a rival")
    return made


def twins(rows: Sequence[Row], suite: Suite, device: str = "") -> list[Comparison]:
    """Our own features against our own plain kernel: `rival` is our row of the case's plain twin in the same run.

    ReportError when a run that timed both is lacking.
    """
    runs: dict[str, dict[str, Row]] = {}
    for row in _of_device(rows, suite.name, device):
        if row["library"] == suite.ours and _timed(row, suite.measure):
            runs.setdefault(str(row["run"]), {})[row["case"]] = row
    made, lacking = [], []
    for name in (case.name for case in suite.cases if case.name in PLAIN_TWIN):
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


def _state(row: Row | None) -> str:
    if row is None:
        return "not measured"
    return f"{row['status']}: {row['reason']}" if row.get("reason") else f"{row['status']} without a time"


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


def absent(rows: Sequence[Row], suite: Suite, device: str = "") -> list[str]:
    """Rivals of the suite that gave no time in any case, with the reason of the first."""
    found = newest(rows, suite.name, device)
    lines = []
    for name in suite.rivals:
        here = [case[name] for case in found.values() if name in case]
        if not any(row["status"] == "ok" for row in here):
            lines.append(f"{LABELS.get(name, name)}: {_state(here[0] if here else None)}")
    return lines


def gaps(comparisons: Sequence[Comparison], rows: Sequence[Row], suite: Suite, device: str = "") -> list[str]:
    """Cases in which a rival that should have a time has none, so that the ratio is against the others only."""
    found = newest(rows, suite.name, device)
    lines = []
    for name in suite.rivals:
        states = {item.case: found[item.case].get(name) for item in comparisons}
        if any(row is not None and row["status"] == "ok" for row in states.values()):
            lost = {case: row for case, row in states.items() if row is None or row["status"] in _FAILED}
            lines += [f"{LABELS.get(name, name)} in {case}: {_state(row)}" for case, row in lost.items()]
    return lines


class Table(NamedTuple):
    """Plain text cells; the first column is left-aligned, the others right."""

    title: str
    head: tuple[str, ...]
    cells: list[tuple[str, ...]]

    def markdown(self) -> str:
        lines = [self.head, (":--", *("--:" for _ in self.head[1:])), *self.cells]
        return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def show(table: Table, markdown: bool) -> None:
    """Print a table: Markdown, or rich (which is plain text when not on a terminal)."""
    if markdown:
        print(f"**{table.title}**\n\n{table.markdown()}\n")
        return
    from rich import box
    from rich.console import Console
    from rich.table import Table as RichTable

    console = Console(highlight=False)
    if not console.is_terminal:
        console = Console(highlight=False, width=200)
    rich = RichTable(box=box.HEAVY_HEAD if console.is_terminal else box.ASCII2)
    for place, name in enumerate(table.head):
        rich.add_column(name, justify="left" if place == 0 else "right", no_wrap=True)
    for line in table.cells:
        rich.add_row(*line)
    console.print(table.title, markup=False, soft_wrap=True)
    console.print(rich)


def facts(rows: Iterable[Row]) -> str:
    """Device, driver, versions and commit of the rows, in one line."""
    row = max(rows, key=lambda row: str(row["run"]))
    versions = ", ".join(f"{name} {version}" for name, version in row.get("versions", {}).items() if version)
    commit = str(row.get("commit", "unknown"))[:12] + (" with changes" if row.get("dirty") else "")
    driver = f"driver {row['driver']}, " if row.get("driver") else ""
    return f"{row['device']}, {driver}{versions}; commit {commit}; {str(row['run'])[:10]}"


def suite_table(rows: Sequence[Row], suite: str, device: str = "") -> Table:
    """One line per case, one column per library: speed and share of the ceiling, or why there is none."""
    found = newest(rows, suite, device)
    names = [name for name in LABELS if any(name in case for case in found.values())]
    host = suite in SUITES and SUITES[suite].measure == "host_us"
    cells = [(case, *(_cell(here.get(name), host) for name in names)) for case, here in found.items()]
    everything = [row for here in found.values() for row in here.values()]
    measure = "host µs of a call" if host else "TFLOP/s (µs, share of the matrix product ceiling)"
    return Table(f"{suite}: {measure}\n{facts(everything)}", ("case", *(LABELS[name] for name in names)), cells)


def _cell(row: Row | None, host: bool) -> str:
    if row is None:
        return "-"
    if row["status"] != "ok":
        return str(row["status"])
    if host:
        return "-" if row.get("host_us") is None else f"{row['host_us']:.1f}"
    return f"{row['tflops']:.3g} ({row['device_us']:.0f}, {100 * row['share']:.0f} %)"


def ratio_table(comparisons: Sequence[Comparison], suite: Suite) -> Table:
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


def twin_table(comparisons: Sequence[Comparison], suite: Suite) -> Table:
    """One line per feature that rivals lack: ours with it, ours without it, the ratio."""
    unit = MEASURES[suite.measure]
    head = ("case", f"ours {unit}", "plain twin", f"twin {unit}", "ratio", "limit", "error")
    cells: list[tuple[str, ...]] = []
    for item in comparisons:
        mine, twin = f"{item.ours[suite.measure]:.1f}", f"{(item.rival or {})[suite.measure]:.1f}"
        error = f"{item.ours.get('error', math.nan):.1e}"
        cells.append((item.case, mine, PLAIN_TWIN[item.case], twin, f"{item.ratio:.3f}", f"{TWIN_LIMIT:.3f}", error))
    return Table(f"{suite.name}: against our own plain kernel", head, cells)


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


def readme_block(rows: Sequence[Row], suite: Suite, image: str, device: str = "") -> str:
    """The text between the markers: one table (a line per head dim and mask, a column per length) and the plot."""
    comparisons = compare(rows, suite, device)
    lengths = sorted({case.seqlen_q for case in suite.cases})
    shapes = {case.name: (case.head_dim, case.causal, case.seqlen_q) for case in suite.cases}
    at = {shapes[item.case]: item for item in comparisons}
    left_out = absent(rows, suite, device)
    rivals = [LABELS[name] for name in suite.rivals if not any(line.startswith(LABELS[name]) for line in left_out)]
    others = rivals[0] if len(rivals) == 1 else f"the best of {' and '.join(rivals)}"
    cells = []
    for dim in sorted({key[0] for key in at}):
        for causal in (False, True):
            line = [at.get((dim, causal, length)) for length in lengths]
            text = ("-" if c is None else f"{c.ours['tflops']:.0f} ({c.ratio:.2f})" for c in line)
            cells.append((f"{dim}, {'causal' if causal else 'full'}", *text))
    table = Table("", ("head dim, mask", *(f"{length:,}" for length in lengths)), cells)
    return "\n\n".join(
        (
            "Attention forward in TFLOP/s by sequence length; in brackets the speed over "
            f"{others} in the same process ({summary(comparisons)}).",
            table.markdown(),
            f"![throughput against sequence length]({image})",
            f"{facts(item.ours for item in comparisons)}. Made by `python benchmarks/report.py --readme`.",
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
    parser.add_argument("--suite", nargs="+", choices=sorted(SUITES), help="default: every suite with rows")
    parser.add_argument("--ratio", choices=sorted(SUITES), metavar="SUITE", help="ours over the best rival, per row")
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
        suite = SUITES[options.ratio]
        comparisons = compare(rows, suite, options.device)
        features = twins(rows, suite, options.device)
        alone = {item.case for item in features} & {item.case for item in comparisons if item.rival is None}
        show(ratio_table([item for item in comparisons if item.case not in alone], suite), options.markdown)
        if features:
            show(twin_table(features, suite), options.markdown)
            print(twin_summary(features))
        for line in (*absent(rows, suite, options.device), *gaps(comparisons, rows, suite, options.device)):
            print(f"not compared: {line}")
        print(summary(comparisons))
        return 0
    names = [name for name in SUITES if any(row["suite"] == name for row in rows)]
    names = options.suite or names
    if options.plot or options.readme:
        dense = [name for name in names if name in ("attention_forward", "attention_forward_portable")]
        if not dense:
            raise ReportError("plots are made of attention_forward or attention_forward_portable: no rows of either")
        images = {name: plot(rows, name, options.results, options.device)[1] for name in dense}
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
        show(suite_table(rows, name, options.device), options.markdown)
    return 0


if __name__ == "__main__":
    sys.exit(main())
