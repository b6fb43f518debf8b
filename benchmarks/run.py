"""Measure named cases on several libraries in one process and write one JSON line per case and library.

    python benchmarks/run.py --suite attention_forward_portable --out benchmarks/results/portable.jsonl
    FLASHMOE_VLLM=vllm.whl python benchmarks/run.py --suite moe_forward moe_decode --out benchmarks/results/moe.jsonl
    python benchmarks/run.py --suite numpy_backend --out benchmarks/results/cpu_numpy.jsonl      (on the processor)
    FLASHMOE_VLLM=vllm.whl python benchmarks/run.py --suite h200 --peers FOLDER --out h200.jsonl    (forward, with bars)
    python benchmarks/run.py --suite h200_backward --peers FOLDER --out backward.jsonl    (the gradients, with bars)
    FLASHMOE_MODELS=FOLDER python benchmarks/run.py --suite h200_training --peers FOLDER --out training.jsonl

All libraries get the same random inputs. Each first computes the case into a poisoned output and is checked against
float64 maths on sampled rows; only right answers are timed. Then rounds: every round takes one sample of each library,
in a drawn order. Device microseconds: CUDA events around several launches, per launch; the median of the rounds, each
sample over the pace of its round (`at_one_pace` in bench.py: the clock changes for all libraries alike). Inputs rotate
when they would stay in the L2 cache. Host microseconds: processor time of one call while the queue is short.
A backward reads what the library's own forward gave; that one is made before and is not timed.
A mixture of experts is timed beside a dense matrix product and a big read; before each sample of a library, and of
these two, 20 ms of the same go untimed. With few tokens it is one CUDA graph of many calls, each with other weights.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

ROOT = Path(__file__).resolve().parent.parent
# Threads of earlier CPU work sleep at once: spinning, as is their default, they make host times half as long again.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
os.environ.setdefault("KMP_BLOCKTIME", "0")
if "numpy_backend" in sys.argv:  # before NumPy is loaded: its BLAS has as many threads as torch and the back end
    os.environ.setdefault("OMP_NUM_THREADS", "2")
if not __package__:  # run as a file: the repository takes the place of this folder on the path
    sys.path[0] = str(ROOT)

from benchmarks.autograd_bench import AUTOGRAD_LIBRARIES, AutogradBench  # noqa: E402
from benchmarks.backward_bench import BackwardBench  # noqa: E402
from benchmarks.backward_cases import AUTOGRAD_SUITES, BACKWARD_SUITES  # noqa: E402
from benchmarks.backward_rivals import BACKWARD_LIBRARIES  # noqa: E402
from benchmarks.bench import QUICK, AttentionBench, Effort, Run  # noqa: E402
from benchmarks.cases import OUR_LIBRARIES, OURS, SUITES  # noqa: E402
from benchmarks.library import Setup, default_models, default_peers  # noqa: E402
from benchmarks.llama_training import LAYER_LIBRARIES, LayersBench  # noqa: E402
from benchmarks.moe_bench import MOE_LIBRARIES, MoEBench  # noqa: E402
from benchmarks.moe_cases import ALL_SUITES, MOE_SUITES  # noqa: E402
from benchmarks.numpy_backend import HOST_SUITES, TORCH, HostBench  # noqa: E402
from benchmarks.rivals import LIBRARIES  # noqa: E402
from benchmarks.timing import CpuTimer, GpuTimer, Timer  # noqa: E402
from benchmarks.training import TrainingBench  # noqa: E402
from benchmarks.training_cases import EAGER, FINE_TUNING, LAYER_STACKS, SDPA  # noqa: E402

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence


# Several suites by one name. What needs no peer, or the smallest, comes first: a run that ends early still has that.
GROUPS = {
    "h200": (
        "attention_padding",
        "attention_mask",
        "attention_bias",
        "attention_few_keys",
        "attention_forward",
        "moe_decode",
    ),
    "h200_backward": (
        "attention_backward_bias",
        "attention_backward_cost",
        "attention_backward_features",
        "attention_backward_portable",
        "attention_backward",
    ),
    "h200_training": ("attention_backward_host", "llama_training", "training"),
}
# Who measures which suites, and by which names its libraries go.
BENCHES: tuple[tuple[Mapping[str, Any], Iterable[str], Callable[[Run], Any]], ...] = (
    (SUITES, LIBRARIES, AttentionBench),
    (BACKWARD_SUITES, BACKWARD_LIBRARIES, BackwardBench),
    (AUTOGRAD_SUITES, AUTOGRAD_LIBRARIES, AutogradBench),
    (LAYER_STACKS, LAYER_LIBRARIES, LayersBench),
    (FINE_TUNING, (OURS, EAGER, SDPA), TrainingBench),
    (MOE_SUITES, MOE_LIBRARIES, MoEBench),
    (HOST_SUITES, (OURS, TORCH), HostBench),
)


def line_of(row: dict[str, Any]) -> str:
    """One row as a line for people."""
    head = f"{row['case']:<34} {row['library']:<20} {row['status']:<11}"
    if row["status"] != "ok":
        return f"{head} {row['reason']}"
    host = "" if row["host_us"] is None else f"  host {row['host_us']:6.1f} us"
    speed = f"{row['device_us']:10.1f} us {row['tflops']:7.4g} TFLOP/s {100 * row['share']:5.1f} %"
    if row.get("read_share"):
        speed += f"  weights {row['weight_gbps']:6.4g} GB/s {100 * row['read_share']:5.1f} %"
    if row.get("tokens_per_s"):
        speed += f"  {row['tokens_per_s']:,.0f} tokens/s"
    if row.get("means"):
        ours = f", {row['loss_apart']} from eager" if row.get("loss_apart") is not None else ""
        return f"{head} {speed}  loss {row['means'][0]:.4f} to {row['means'][-1]:.4f}{ours}"
    note = f"  {row['note']}" if row.get("note") else ""
    return f"{head} {speed}  spread {100 * row['spread']:4.1f} %  error {row['error']:.1e}{host}{note}"


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="benchmarks/run.py", description=(__doc__ or "").split("\n\n")[0])
    names = sorted({*ALL_SUITES, *GROUPS})
    parser.add_argument("--suite", nargs="+", default=["attention_forward_portable"], choices=names, metavar="SUITE",
                        help=f"{', '.join(names)} (default: %(default)s)")  # fmt: skip
    parser.add_argument("--out", type=Path, help="JSON lines are appended here")
    names = sorted({name for _, libraries, _ in BENCHES for name in libraries})
    parser.add_argument("--libraries", nargs="+", choices=names, help="default: those of each suite")
    parser.add_argument("--cases", default="", metavar="REGEX", help="only cases whose name it finds")
    parser.add_argument("--device", default="cuda", help="cuda, cuda:1 or cpu (default: %(default)s)")
    parser.add_argument("--budget", type=float, default=float("inf"), metavar="SECONDS", help="stop in time for this")
    parser.add_argument("--peers", default=default_peers(), metavar="FOLDER", help="FA3's folder (or FLASHMOE_PEERS)")
    parser.add_argument("--models", default=default_models(), metavar="FOLDER", help="weights of the suite training "
                        "(or FLASHMOE_MODELS)")  # fmt: skip
    parser.add_argument("--rounds", type=int, help="samples of every library and case")
    parser.add_argument("--quick", action="store_true", help="fewer and shorter samples")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--list", action="store_true", help="show the cases and stop")
    options = parser.parse_args(arguments)
    options.suite = list(dict.fromkeys(one for name in options.suite for one in GROUPS.get(name, (name,))))
    return options


def chosen(options: argparse.Namespace) -> list[tuple[Any, tuple[str, ...]]]:
    """The cases of the command line with the libraries of each."""
    pattern = re.compile(options.cases)
    found = []
    for suite in (ALL_SUITES[name] for name in options.suite):
        known = next(known for suites, known, _ in BENCHES if suite.name in suites)
        libraries = tuple(name for name in options.libraries or suite.libraries if name in known)
        found += [(case, libraries) for case in suite.cases if libraries and pattern.search(case.name)]
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    """Run; 0 when every case of ours was right, 1 when one was wrong or failed, 2 when nothing could be measured."""
    begin = time.perf_counter()
    options = parse(arguments)
    work = chosen(options)
    if options.list or not work:
        for case, libraries in work:
            print(f"{case.suite:<28} {case.name:<34} {case.flops() / 1e9:10.1f} GFLOP  {case.source}  {libraries}")
        if not work:
            print("no case has a name that --cases finds, and a library of --libraries", file=sys.stderr)
        return 0 if work else 2
    try:
        import torch
    except ImportError:
        print("the benchmarks need PyTorch: pip install torch", file=sys.stderr)
        return 2
    if set(options.suite) <= set(HOST_SUITES):
        options.device = "cpu"
    if options.device.startswith("cuda") and not torch.cuda.is_available():
        print("no CUDA device; --device cpu measures the NumPy back end", file=sys.stderr)
        return 2
    effort = QUICK if options.quick else Effort()
    if options.rounds:
        effort = effort._replace(rounds=max(1, options.rounds))
    timer: Timer = GpuTimer(options.device) if options.device.startswith("cuda") else CpuTimer()
    with contextlib.ExitStack() as stack:
        file = None
        if options.out is not None:
            options.out.parent.mkdir(parents=True, exist_ok=True)
            file = stack.enter_context(options.out.open("a", encoding="utf-8"))

        def write(row: dict[str, Any]) -> None:
            if file is not None:
                file.write(json.dumps(row) + "\n")
                file.flush()
            print(line_of(row), flush=True)

        setup = Setup(options.device, options.peers, options.models)
        return _run(Run(setup, timer, effort, write), work, options, begin)


def _run(run: Run, work: Sequence[tuple[Any, tuple[str, ...]]], options: argparse.Namespace, begin: float) -> int:
    facts = run.facts
    benches = [(suites, make(run)) for suites, _, make in BENCHES]
    print(f"{facts['device']}, driver {facts['driver'] or '-'}, {facts['versions']}, commit {facts['commit'][:12]}")
    ready = time.perf_counter() - begin
    print(f"matrix product ceiling {run.ceiling:.4g} TFLOP/s, ready after {ready:.1f} s", flush=True)
    bad, left_out, longest = 0, [], 0.0
    for case, libraries in work:
        start = time.perf_counter()
        if start - begin + longest > options.budget or run.dead:
            left_out.append(case.name)
            continue
        bench = next(bench for suites, bench in benches if case.suite in suites)
        rows = bench.measure(case, libraries, options.seed, begin + options.budget)
        bad += sum(row["library"] in OUR_LIBRARIES and row["status"] in ("wrong", "error") for row in rows)
        longest = max(longest, time.perf_counter() - start) if len(rows) else longest
    print(f"{len(work) - len(left_out)} of {len(work)} cases in {time.perf_counter() - begin:.1f} s", flush=True)
    if options.out is None:
        print("no --out FILE: the rows were shown, not kept", file=sys.stderr)
    if left_out:
        print(f"not run ({run.dead or 'out of budget'}): {', '.join(left_out)}", file=sys.stderr)
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
