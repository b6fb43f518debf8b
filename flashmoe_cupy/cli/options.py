"""The options of every command, and what their values may be. A value that a command prints is one that it takes."""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterable, Sequence
from decimal import Decimal, InvalidOperation
from typing import Any, NoReturn

from flashmoe_cupy._version import __version__
from flashmoe_cupy.cli.measure import MEASURED
from flashmoe_cupy.plan.archs import ARCHS
from flashmoe_cupy.service import DTYPES, FAMILIES, Filter, Size
from flashmoe_cupy.service.families import DEFAULT_OP, all_filters
from flashmoe_cupy.service.names import DTYPE_NAMES

_NEGATIVE = re.compile(r"-(?:\d|\.\d|inf|nan)", re.IGNORECASE)
_DEFAULT = f"default: {DEFAULT_OP}"  # of --op
_ARCHS = f"{', '.join(ARCHS)}; 9.0 and sm_90 mean sm_90a"


class Misuse(Exception):
    """Wrong use of the command line. usage: how to use it, or ""."""

    def __init__(self, message: str, usage: str = "") -> None:
        super().__init__(message)
        self.usage = usage


class Parser(argparse.ArgumentParser):
    """argparse, whose errors are exceptions, so that they can also be told as JSON."""

    def error(self, message: str) -> NoReturn:
        raise Misuse(message, self.format_usage())


def joined(words: Sequence[str]) -> list[str]:
    """The command line with `--option -1,0` as `--option=-1,0`: argparse would take the value for an option."""
    found: list[str] = []
    for i, word in enumerate(words):
        if word == "--":  # the rest goes to another program
            return [*found, *words[i:]]
        if _NEGATIVE.match(word) and found and found[-1].startswith("--") and "=" not in found[-1]:
            found[-1] += f"={word}"
        else:
            found.append(word)
    return found


def make_parser() -> argparse.ArgumentParser:
    """All commands and their options."""
    parser = Parser(
        prog="flashmoe-cupy",
        description="Exact attention and mixtures of experts on NVIDIA GPUs for NumPy, CuPy, PyTorch and JAX arrays.",
    )
    parser.add_argument("--version", action="version", version=f"flashmoe-cupy {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", title="commands")

    def command(name: str, text: str, description: str = "") -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=text, description=description or f"{text[0].upper()}{text[1:]}.")
        sub.add_argument("--json", action="store_true", help="print JSON for programs")
        return sub

    info = command("info", "report on this installation, to paste into a bug report")
    info.add_argument("--no-test", action="store_true", help="leave the self-test out")

    several = listed([each.plural for each in MEASURED.values()], "and")
    demo = command("demo", f"compute, check and time a few {several} here")
    demo.add_argument("--op", choices=[*MEASURED], help=_op_help("only this operation", MEASURED))
    demo.add_argument("--backend", choices=("auto", "numpy", "cuda"), default="auto", help="default: what is here")

    explain = command("explain", "say what would run for a problem, and why; needs no GPU")
    _problem_options(explain)

    kernels = command("kernels", "list the kernels and their configurations")
    kernels.add_argument("--op", choices=[*FAMILIES], help="only those of this operation")
    kernels.add_argument("--arch", help=f"only this one: {_ARCHS}")
    for each in filters_of("kernels").values():
        _add_filter(kernels, each, each.kernels)

    warmup = command(
        "warmup",
        "compile, and load on the devices here, everything a call can ask for",
        "Compile, and load on the devices here, every specialisation that the operation can ask for, or those "
        "for the given dtype and head dimension. With --arch, only compile where no device has that arch.",
    )
    warmup.add_argument("--op", choices=[*FAMILIES], default=DEFAULT_OP, help=_op_help(_DEFAULT, FAMILIES))
    warmup.add_argument("--arch", action="append", help=f"compile for this arch: {_ARCHS}; may be repeated")
    warmup.add_argument("--all", action="store_true", help="everything; the default when no filter is given")
    for each in filters_of("warmup").values():
        _add_filter(warmup, each, each.warmup)
    warmup.add_argument("--workers", type=_positive, help="threads; default: one per core")

    cache = command("cache", "look at or clean the folder of compiled kernels")
    cache.add_argument(
        "action", nargs="?", choices=("list", "path", "clear", "prune"), default="list", help="default: list"
    )
    cache.add_argument("--max-size", default="500M", help="for prune: keep the newest kernels up to this size")

    texts = [f"{'' if op == DEFAULT_OP else f'with --op {op}, '}{each.bench.text}" for op, each in MEASURED.items()]
    bench = command(
        "bench",
        f"time {', or '.join(each.bench.title for each in MEASURED.values())}",
        f"Time {', or, '.join(texts)}. In a clone of the repository, arguments after -- go to its own benchmark "
        "runner: flashmoe-cupy bench -- --help",
    )
    bench.add_argument("--op", choices=[*MEASURED], default=DEFAULT_OP, help=_op_help(_DEFAULT, MEASURED))
    bench.add_argument("--backend", choices=("auto", "numpy", "cuda"), default="auto", help="default: what is here")
    bench.add_argument(
        "--dtype", type=_dtype, metavar="DTYPE", help=f"{DTYPE_NAMES}; default: bfloat16 on a GPU, float32 without"
    )
    _bench_sizes(bench)
    bench.add_argument("runner", nargs="*", metavar="-- ARGUMENTS", help="for the repository's benchmarks/run.py")
    return parser


def listed(words: Sequence[str], last: str) -> str:
    """Words in a sentence, `last` in front of the last one: "a, b or c"."""
    return f" {last} ".join(filter(None, (", ".join(words[:-1]), *words[-1:])))


def filters_of(command: str) -> dict[str, Filter]:
    """The filters that `kernels` or `warmup` takes, by name."""
    return {name: each for name, each in all_filters().items() if command == "warmup" or each.kernels}


def _op_help(text: str, ops: Iterable[str]) -> str:
    """The help of --op: it ends with what the names that are no words mean."""
    return "; ".join([text, *(f"{op}: {FAMILIES[op].title}" for op in ops if FAMILIES[op].title != op)])


def _add_filter(parser: argparse.ArgumentParser, each: Filter, text: str) -> None:
    """An option that is None where it is not given."""
    metavar = {} if each.kind == "flag" else {"metavar": each.name.upper()}
    parser.add_argument(each.flag, dest=each.name, default=None, help=text, **{**_KINDS[each.kind], **metavar})


def _add_size(parser: argparse._ActionsContainer, size: Size, text: str, **more: Any) -> None:
    """An option that is only set where it is given."""
    how = {**_KINDS[size.kind], **more}
    if size.metavar:
        how["metavar"] = size.metavar
    if size.const is not None:
        how |= {"nargs": "?", "const": size.const}
    parser.add_argument(size.flag, dest=size.name, default=argparse.SUPPRESS, help=text, **how)


def _option(size: Size) -> Size:
    """What is the same for all that share an option: everything but what it says."""
    return size._replace(help="", words=None)


def _bench_sizes(parser: argparse.ArgumentParser) -> None:
    """--longest, then the sizes of each operation; the defaults are in its `Bench`. flags: how each size is typed."""
    benches = {op: each.bench for op, each in MEASURED.items()}
    told = dict.fromkeys((each.counted, each.longest) for each in benches.values())  # some say the same
    counted = ", or ".join(what for what, _ in told)
    on_gpu, on_cpu = (" or ".join(str(longest[i]) for _, longest in told) for i in (0, 1))
    text = f"most {counted}; default: {on_gpu} on a GPU, {on_cpu} without"
    _add_size(parser, Size("longest", "--longest", "positive", text), text)
    ops: dict[Size, dict[str, list[str]]] = {}  # by option, then by what it says
    words: dict[Size, list[str]] = {}
    for op, bench in benches.items():
        for size, _, _ in bench.sizes:
            ops.setdefault(_option(size), {}).setdefault(size.help, []).append(op)
            words.setdefault(_option(size), []).extend(size.words() if size.words is not None else ())
    for size, texts in ops.items():
        more = {"choices": list(dict.fromkeys(words[size]))} if words[size] else {}
        _add_size(parser, size, "; ".join(f"{', '.join(names)}: {text}" for text, names in texts.items()), **more)
    parser.set_defaults(flags={size.name: size.flag for size in ops})


def _problem_options(parser: argparse.ArgumentParser) -> None:
    """The sizes of a problem, a group for each family. flags: how each size is typed.

    What all families have stands first; what some have stands with the first of them, and by name with the others.
    """
    parser.add_argument("--op", default=DEFAULT_OP, choices=[*FAMILIES], help=f"operation (default {DEFAULT_OP})")
    parser.add_argument("--arch", action="append", help=f"for this arch: {_ARCHS}; may be repeated")
    stands: dict[Size, str] = {}  # what is said of an option that is there

    def group(title: str, sizes: Sequence[Size]) -> None:
        again = [size for size in sizes if _option(size) in stands]
        said = [size.flag if size.help == stands[_option(size)] else f"{size.flag} = {size.help}" for size in again]
        place = parser.add_argument_group(title, f"As above: {', '.join(said)}." if said else None)
        for size in sizes:
            if size not in again:
                stands[_option(size)] = size.help
                words = "" if size.words is None else f"{', '.join(size.words())} "
                _add_size(place, size, f"{words}{size.help}")

    everyone = set.intersection(*(set(family.sizes) for family in FAMILIES.values()))
    title = f"sizes of {'both' if len(FAMILIES) == 2 else 'all'}"
    group(title, [size for size in FAMILIES[DEFAULT_OP].sizes if size in everyone])
    for name, family in FAMILIES.items():
        title = family.title if name == DEFAULT_OP else f"{family.title} (--op {name})"
        group(title, [size for size in family.sizes if size not in everyone])
    parser.set_defaults(flags={size.name: size.flag for size in stands})


def whole(text: str) -> int:
    """A whole number, also as 1e6 or 4_096. Raises argparse.ArgumentTypeError."""
    try:
        value = Decimal(text.strip())
    except InvalidOperation:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number, for example 4096 or 1e6") from None
    if not value.is_finite() or value.adjusted() > 18 or abs(value) >= 2**63 or value != value.to_integral_value():
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at most 63 bits")
    return int(value)


def _positive(text: str) -> int:
    value = whole(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not at least 1")
    return value


def _count(text: str) -> int:
    value = whole(text)
    if value < 0:
        raise argparse.ArgumentTypeError(f"{text} is negative")
    return value


def _window(text: str) -> tuple[int, int]:
    left, comma, right = text.strip("()").partition(",")  # explain prints window(512,0)
    try:
        return whole(left), whole(right) if comma else -1
    except argparse.ArgumentTypeError:
        raise argparse.ArgumentTypeError(f"{text!r} is not LEFT or LEFT,RIGHT, for example 1024 or -1,0") from None


def _dtype(text: str) -> str:
    name = DTYPES.get(text, text)
    if name not in DTYPES.values():
        raise argparse.ArgumentTypeError(f"unknown dtype {text!r}; known: {DTYPE_NAMES}")
    return name


_KINDS: dict[str, dict[str, Any]] = {  # of a family's sizes and filters: what argparse makes of a value
    "count": {"type": _count, "metavar": "N"},
    "positive": {"type": _positive, "metavar": "N"},
    "number": {"type": float, "metavar": "X"},
    "flag": {"action": "store_true"},
    "window": {"type": _window, "metavar": "LEFT[,RIGHT]"},
    "word": {},
    "dtype": {"type": _dtype, "metavar": "DTYPE"},
}
