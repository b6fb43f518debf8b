"""What each command does: asks `service` or a measured operation for data, then shows it."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from flashmoe_cupy import service
from flashmoe_cupy.cli import clocks, show
from flashmoe_cupy.cli.measure import MEASURED
from flashmoe_cupy.cli.options import Misuse, filters_of, listed
from flashmoe_cupy.cli.self_test import self_test
from flashmoe_cupy.errors import UnsupportedProblem
from flashmoe_cupy.service.families import DEFAULT_OP, misfit


def info(args: argparse.Namespace) -> int:
    data = service.show_config()
    gpu = data["backend"]["name"] == "cuda"
    tests = [] if args.no_test else self_test(gpu)
    data["cache"] = service.show_config()["cache"]  # asked after the self-test, which may have added to it
    failed = any(not test["passed"] for test in tests)
    if args.json:
        show.emit_json({**data, "self_test": tests})
        return int(failed)
    out = show.Output()
    mine, system = data["flashmoe_cupy"], data["system"]
    out.facts(
        f"flashmoe-cupy {mine['version']}",
        {
            "runs": data["backend"]["why"],
            "python": f"{system['python']} on {system['platform']}, {system['cpus']} CPUs",
            "device sources": mine["device_sources"] or mine.get("error"),
        },
    )
    driver, compiler = data["driver"], data["compiler"]
    found = f"{driver['release']} (runs CUDA up to {driver['cuda']})" if driver["cuda"] else ""
    facts = {"driver": "; ".join(filter(None, (found.strip(), driver["error"])))}
    for device in data["devices"]:
        major, minor = device["compute_capability"]
        rate = f" at {device['memory_rate'] / 1e12:.2f} TB/s" if device["memory_rate"] else ""
        facts[f"device {device['ordinal']}"] = (
            f"{device['name']}, {major}.{minor} ({device['arch'] or 'too old'}), {device['multiprocessors']} SMs, "
            f"{show.size(device['memory'])}{rate}, {device['shared_memory']} B shared memory per block"
        )
    facts["CuPy"] = ", ".join(f"{name} {number}" for name, number in compiler["cupy"].items()) or "not installed"
    facts["NVRTC"] = "; ".join(filter(None, (compiler["nvrtc"], compiler["error"])))
    out.facts("GPU", facts)
    out.title("Kernels, the first that takes a problem runs it")
    for name, kernel in data["kernels"].items():
        here = " ".join(f"cuda:{ordinal}" for ordinal in kernel["devices"]) or "no device here"
        out.line(f"  {name}  {kernel['summary']}; {here}")
    out.facts("Packages", {name: number or "not installed" for name, number in data["packages"].items()})
    cache = data["cache"]
    state = "writable" if cache["writable"] else f"not writable, kernels stay in memory: {cache['error']}"
    out.facts(
        "Cache",
        {
            "path": f"{cache['path'] or '-'} ({state})",
            "content": f"{cache['entries']} configurations, {show.size(cache['bytes'])}",
        },
    )
    given = {name: value for name, value in data["environment"].items() if value is not None}
    out.facts("Environment", given or {"(none of ours)": ""})
    if tests:
        out.title("Self-test")
        for test in tests:
            out.line(f"  {'ok    ' if test['passed'] else 'FAILED'}  {test['name']}: {test['detail']}")
    return int(failed)


def demo(args: argparse.Namespace) -> int:
    start = time.perf_counter()
    gpu, why = _backend(args.backend)
    chosen = {op: measured for op, measured in MEASURED.items() if args.op in (None, op)}
    out = show.Output()
    if not args.json:
        out.title(why)
        for op, measured in chosen.items():
            out.line(f"{op}: {measured.formula}, its last rows against the same in float64")
    results = []
    for measured in chosen.values():
        for title, run in measured.demo(gpu):
            out.progress(f"{title} ...")
            results.append(run())
    ceiling, by = clocks.matmul_ceiling() if gpu else (0.0, "")
    out.progress_done()
    passed = all(result.passed for result in results)
    seconds = time.perf_counter() - start
    if args.json:
        data: dict[str, Any] = {"backend": "cuda" if gpu else "numpy", "why": why, "passed": passed}
        data["results"] = [result._asdict() for result in results]
        if gpu:
            data["ceiling"] = {"flops_per_second": ceiling, "by": by}
        show.emit_json({**data, "seconds": seconds})
        return int(not passed)
    unit, scale = ("TFLOP/s", 1e12) if gpu else ("GFLOP/s", 1e9)
    columns = ["op", "case", "problem", "dtype", "error", "allowed", "ok", "ms", unit]
    if gpu:
        columns += ["of ceiling", "compile ms"]
    rows = []
    for r in results:
        row: list[Any] = [r.op, r.case, r.sizes, r.dtype, f"{r.error:.1e}", f"{r.allowed:.1e}", r.passed]
        row += [f"{r.milliseconds:.3g}", f"{r.flops_per_second / scale:.3g}"]
        if gpu:
            row += [f"{r.flops_per_second / ceiling:.0%}" if ceiling else None, f"{r.compile_ms:.0f}"]
        rows.append(row)
    out.table(columns, rows)
    if gpu:
        out.line(f"ceiling: {ceiling / 1e12:.0f} TFLOP/s, {by}" if ceiling else f"ceiling: {by}")
        out.line("compile ms is 0 where an earlier run or row has compiled the kernel")
    out.line(f"{'all exact within tolerance' if passed else 'WRONG RESULTS, please report'}; {seconds:.1f} s in all")
    return int(not passed)


def explain(args: argparse.Namespace) -> int:
    own = {size.name for size in service.FAMILIES[args.op].sizes}
    sizes = {name: getattr(args, name) for name in args.flags if hasattr(args, name)}
    if foreign := sorted(args.flags[name] for name in set(sizes) - own):
        raise Misuse(f"--op {args.op} has no {', '.join(foreign)}")
    try:
        answer = service.explain(args.op, arch=args.arch, **sizes)
    except UnsupportedProblem:
        raise
    except ValueError as error:
        raise Misuse(str(error)) from None
    missing = {choice.arch for choice in answer.choices if not choice.config}
    runs = not answer.choices or any(choice.arch not in missing for choice in answer.choices)
    if args.json:
        show.emit_json({**answer._asdict(), "choices": [choice._asdict() for choice in answer.choices]})
        return int(not runs)
    out = show.Output()
    intensity = answer.flops / answer.bytes if answer.bytes else 0.0
    out.title(answer.problem)
    work = f"{answer.flops / 1e9:.3g} GFLOP over {show.size(answer.bytes)} of arrays, {intensity:.3g} FLOP per byte"
    out.line(f"work: {work}")
    out.line(f"here: {answer.here}")
    for choice, archs in answer.blocks():
        out.line()
        title = f"{' '.join(archs)}{f', {choice.step}' if choice.step else ''}"
        out.title(f"{title}: {f'{choice.kernel}, {choice.config}' if choice.config else 'no kernel runs this'}")
        if choice.fields:
            out.line("  " + ", ".join(f"{name} {value}" for name, value in choice.fields.items()))
        for reason in choice.because:
            out.line(f"  because {reason}")
        for name, reason in choice.rejected:
            out.line(f"  not {name}: {reason}")
    return int(not runs)


def kernels(args: argparse.Namespace) -> int:
    filters = _filters(args)
    try:
        rows = service.kernels(args.arch, op=args.op, **filters)
    except UnsupportedProblem:
        raise
    except ValueError as error:
        raise Misuse(str(error)) from None
    if args.json:
        show.emit_json(rows)
        return 0
    out = show.Output()
    for name, group in rows.items():
        out.line(f"{name}: {group['summary']}", "bold")
        out.line(f"cuda_src/{group['header']}")
        columns = ("config", "threads", "shared memory", "archs")
        listed = [(c["name"], c["threads"], c["smem_bytes"], " ".join(c["archs"])) for c in group["configs"]]
        if listed:
            out.table(columns, listed)
        else:
            declared = filters_of(args.command)
            given = [declared[name].shown.format(value) for name, value in filters.items()]
            out.line(f"no configuration for {', '.join([*([args.arch] if args.arch else ()), *given])}")
        out.line()
    return 0


def _filters(args: argparse.Namespace) -> dict[str, Any]:
    """The filters given to `kernels` or `warmup`. Raises Misuse for those that do not fit the op or each other."""
    declared = filters_of(args.command)
    filters = {name: getattr(args, name) for name in declared if getattr(args, name) is not None}
    flags = {name: each.flag for name, each in declared.items()}
    if getattr(args, "all", False) and filters:
        raise Misuse(f"--all does not go with {listed([*flags.values()], 'or')}")
    if args.op is not None and (why := misfit(service.FAMILIES[args.op], filters, flags, f"--op {args.op}")):
        raise Misuse(why)
    return filters


def warmup(args: argparse.Namespace) -> int:
    filters = _filters(args)
    out = show.Output()
    start = time.perf_counter()
    count = 0

    def progress(warmed: service.Warmed) -> None:
        nonlocal count
        count += 1
        if not args.json:
            out.progress(f"{count}: {warmed.kernel} {warmed.config} {warmed.arch} {warmed.milliseconds:.0f} ms")

    try:
        done = service.warmup(args.op, arch=args.arch, workers=args.workers, progress=progress, **filters)
    except UnsupportedProblem:
        raise
    except ValueError as error:
        raise Misuse(str(error)) from None
    out.progress_done()
    seconds = time.perf_counter() - start
    if args.json:
        show.emit_json({"kernels": [warmed._asdict() for warmed in done], "seconds": seconds})
        return 0
    columns = ("kernel", "config", "arch", "from", "ms", "registers", "spilled", "loaded on")
    rows = []
    for w in done:
        devices = " ".join(f"cuda:{d}" for d in w.devices)
        rows.append((w.kernel, w.config, w.arch, w.source, round(w.milliseconds), w.registers, w.spills, devices))
    out.table(columns, rows)
    compiled = sum(w.source == "compiled" for w in done)
    out.line(f"{len(done)} configurations ready, {compiled} compiled now, {seconds:.1f} s")
    return 0


def cache(args: argparse.Namespace) -> int:
    from flashmoe_cupy.jit import cache as kernels_cache
    from flashmoe_cupy.jit import disk

    out = show.Output()
    folder = disk.cache_dir()
    if args.action == "path":
        if args.json:
            show.emit_json({"path": folder})
        else:
            out.line(str(folder) if folder is not None else "(memory only)")
        return 0
    if args.action == "list":
        stored = disk.entries()
        if args.json:
            show.emit_json([vars(entry) for entry in stored])
            return 0
        rows = []
        for entry in stored:
            made = time.strftime("%Y-%m-%d %H:%M", time.localtime(entry.written))
            info = entry.info
            spilled = int(info.get("spill_stores", 0)) + int(info.get("spill_loads", 0))
            compiled = round(float(info.get("milliseconds", 0)))
            rows.append((entry.name, entry.arch, info.get("registers"), spilled, compiled, show.size(entry.size), made))
        if rows:
            out.table(("config", "arch", "registers", "spilled", "compile ms", "size", "made"), rows)
        total = show.size(sum(entry.size for entry in stored))
        out.line(f"{len(stored)} configurations, {total}, in {folder or '(memory only)'}")
        return 0
    if args.action == "clear":
        removed = kernels_cache.clear()
    else:
        try:
            removed = kernels_cache.prune(show.parse_size(args.max_size))
        except ValueError:
            raise Misuse(f"--max-size {args.max_size!r} is not a size, for example 200M or 1GB") from None
    if args.json:
        show.emit_json({"removed": removed, "path": folder})
    else:
        out.line(f"removed {removed} configurations from {folder or '(memory only)'}")
    return 0


def bench(args: argparse.Namespace) -> int:
    timed = MEASURED[args.op].bench
    sizes = {name: getattr(args, name) for name in args.flags if hasattr(args, name)}
    longest = getattr(args, "longest", None)
    given = sizes or longest or args.json or args.dtype or args.op != DEFAULT_OP or args.backend != "auto"
    if args.runner and given:
        raise Misuse("arguments after -- go to the repository's benchmarks/run.py, which takes no others")
    if foreign := sorted(args.flags[name] for name in set(sizes) - {each.size.name for each in timed.sizes}):
        raise Misuse(f"--op {args.op} has no {', '.join(foreign)}")
    if args.runner:
        import subprocess

        root = Path(__file__).resolve().parents[2]
        if not (root / "benchmarks" / "run.py").is_file():
            raise Misuse("there is no benchmarks/run.py beside the package; arguments after -- need a clone")
        return subprocess.run([sys.executable, "-m", "benchmarks.run", *args.runner], cwd=root, check=False).returncode
    gpu, why = _backend(args.backend)
    dtype = args.dtype or ("bfloat16" if gpu else "float32")
    sizes = {each.size.name: each.on_gpu if gpu else each.on_cpu for each in timed.sizes} | sizes
    try:
        runs = timed.run(gpu, dtype, longest or timed.longest[not gpu], **sizes)
    except UnsupportedProblem:
        raise
    except ValueError as error:
        raise Misuse(str(error)) from None
    out = show.Output()
    if not args.json:
        out.title(why)
    results = list(runs)
    passed = all(result.passed for result in results)
    if args.json:
        show.emit_json([result._asdict() for result in results])
        return int(not passed)
    unit, scale = ("TFLOP/s", 1e12) if gpu else ("GFLOP/s", 1e9)
    rows = [(r.sizes, r.dtype, r.case, r.milliseconds, r.flops_per_second / scale, f"{r.error:.1e}") for r in results]
    out.table(("problem", "dtype", timed.column, "ms", unit, "error"), rows)
    if not passed:
        out.line("WRONG RESULTS, please report")
    return int(not passed)


def _backend(wanted: str) -> tuple[bool, str]:
    """(runs on the GPU, in words). Raises UnsupportedProblem when a GPU is asked for and there is none."""
    name, why = service.backend()
    if wanted == "numpy":
        return False, "NumPy back end, as asked"
    if wanted == "cuda" and name != "cuda":
        raise UnsupportedProblem("--backend cuda", [why], "leave --backend out to use what is here")
    return name == "cuda", why


COMMANDS: dict[str, Callable[[argparse.Namespace], int]] = {
    "info": info,
    "demo": demo,
    "explain": explain,
    "kernels": kernels,
    "warmup": warmup,
    "cache": cache,
    "bench": bench,
}
