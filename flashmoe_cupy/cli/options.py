"""The options of every command, and what their values may be. A value that a command prints is one that it takes."""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence
from decimal import Decimal, InvalidOperation
from typing import Any, NoReturn

from flashmoe_cupy._version import __version__
from flashmoe_cupy.plan.archs import ARCHS
from flashmoe_cupy.plan.moe.problem import ACTIVATIONS
from flashmoe_cupy.service import DTYPES, OPS

_NEGATIVE = re.compile(r"-(?:\d|\.\d|inf|nan)", re.IGNORECASE)
_ARCHS = f"{', '.join(ARCHS)}; 9.0 and sm_90 mean sm_90a"
_KINDS = ", ".join(f"{name} or {short}" for short, name in DTYPES.items())


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

    demo = command("demo", "compute, check and time a few attentions and mixtures of experts here")
    demo.add_argument("--op", choices=OPS, help="only this operation; moe: mixture of experts")
    demo.add_argument("--backend", choices=("auto", "numpy", "cuda"), default="auto", help="default: what is here")

    explain = command("explain", "say what would run for a problem, and why; needs no GPU")
    _problem_options(explain)

    kernels = command("kernels", "list the kernels and their configurations")
    kernels.add_argument("--op", choices=OPS, help="only those of this operation")
    kernels.add_argument("--arch", help=f"only this one: {_ARCHS}")
    kernels.add_argument("--dtype", type=_dtype, metavar="DTYPE", help=f"only configurations for it: {_KINDS}")
    kernels.add_argument("--head-dim", type=_positive, help="only configurations for this head dimension")

    warmup = command(
        "warmup",
        "compile, and load on the devices here, everything a call can ask for",
        "Compile, and load on the devices here, every specialisation that the operation can ask for, or those "
        "for the given dtype and head dimension. With --arch, only compile where no device has that arch.",
    )
    warmup.add_argument("--op", choices=OPS, default="attention", help="default: attention; moe: mixture of experts")
    warmup.add_argument("--arch", action="append", help=f"compile for this arch: {_ARCHS}; may be repeated")
    warmup.add_argument("--all", action="store_true", help="everything; the default when no filter is given")
    warmup.add_argument("--dtype", type=_dtype, metavar="DTYPE", help=f"only what calls with it need: {_KINDS}")
    warmup.add_argument("--head-dim", type=_positive, help="only what calls with this head dimension need")
    warmup.add_argument("--head-dim-v", type=_positive, help="head dimension of v; default: as --head-dim")
    warmup.add_argument("--workers", type=_positive, help="threads; default: one per core")

    cache = command("cache", "look at or clean the folder of compiled kernels")
    cache.add_argument(
        "action", nargs="?", choices=("list", "path", "clear", "prune"), default="list", help="default: list"
    )
    cache.add_argument("--max-size", default="500M", help="for prune: keep the newest kernels up to this size")

    bench = command(
        "bench",
        "time attention over sequence lengths, or a mixture of experts over tokens",
        "Time attention over sequence lengths, or, with --op moe, a layer of experts over numbers of tokens. In a "
        "clone of the repository, arguments after -- go to its own benchmark runner: flashmoe-cupy bench -- --help",
    )
    bench.add_argument("--op", choices=OPS, default="attention", help="default: attention; moe: mixture of experts")
    bench.add_argument("--backend", choices=("auto", "numpy", "cuda"), default="auto", help="default: what is here")
    bench.add_argument(
        "--dtype", type=_dtype, metavar="DTYPE", help=f"{_KINDS}; default: bfloat16 on a GPU, float32 without"
    )
    _bench_sizes(bench)
    bench.add_argument("runner", nargs="*", metavar="-- ARGUMENTS", help="for the repository's benchmarks/run.py")
    return parser


def _bench_sizes(parser: argparse.ArgumentParser) -> None:
    """Only those given are set; the defaults are in `commands.bench`."""

    def count(flag: str, text: str) -> None:
        parser.add_argument(flag, type=_positive, default=argparse.SUPPRESS, metavar="N", help=text)

    count("--longest", "most queries, or tokens; default: 16384 or 4096 on a GPU, 1024 or 256 without")
    count("--d", "attention: head dimension (default 128)")
    count("--heads", "attention: query and key heads (default 16)")
    text = "attention: causal mask"
    parser.add_argument("--causal", action="store_true", default=argparse.SUPPRESS, help=text)
    count("--hidden", "moe: hidden size (default 2048 on a GPU, 512 without)")
    count("--intermediate", "moe: intermediate size of an expert (default 768 or 256)")
    count("--experts", "moe: experts (default 64 or 16)")
    count("--top-k", "moe: experts of a token (default 8 or 4)")
    parser.add_argument("--activation", choices=ACTIVATIONS, default=argparse.SUPPRESS, help="moe: default swiglu")


def _problem_options(parser: argparse.ArgumentParser) -> None:
    """The sizes of a problem under the names that `service.explain` has for them; only those given are set.

    flags: how each is typed.
    """
    flags: dict[str, str] = {}
    parser.set_defaults(flags=flags)
    parser.add_argument("--op", default="attention", choices=OPS, help="operation (default attention)")
    parser.add_argument("--arch", action="append", help=f"for this arch: {_ARCHS}; may be repeated")

    def add(flag: str, name: str, text: str, **options: Any) -> None:
        flags[name] = flag
        group.add_argument(flag, dest=name, default=argparse.SUPPRESS, help=text, **options)

    def count(flag: str, name: str, text: str) -> None:
        add(flag, name, text, type=_count, metavar="N")

    group = parser.add_argument_group("sizes of both")
    add("--dtype", "dtype", f"{_KINDS} (default bfloat16)")
    group = parser.add_argument_group("attention")
    count("--batch", "batch", "batch size (default 1)")
    count("--q", "seqlen_q", "query length (default 4096)")
    count("--k", "seqlen_k", "key length (default: as --q)")
    count("--heads", "heads_q", "query heads (default 32)")
    count("--kv-heads", "heads_k", "key and value heads (default: as --heads)")
    count("--d", "head_dim", "head dimension of q and k (default 128)")
    count("--dv", "head_dim_v", "head dimension of v (default: as --d)")
    add("--causal", "causal", "causal mask, aligned bottom-right", action="store_true")
    add("--window", "window_size", "sliding window; -1 = unlimited", type=_window, metavar="LEFT[,RIGHT]")
    add("--scale", "softmax_scale", "softmax scale (default d ** -0.5)", type=float, metavar="X")
    add("--softcap", "softcap", "softcap; 0 = off", type=float, metavar="X")
    add("--alibi", "alibi", "ALiBi slopes", action="store_true")
    text = "additive bias of this dtype: same (default), float32 or fp32, bool, which hides where it is False"
    add("--bias", "bias", text, nargs="?", const="same", metavar="DTYPE")
    add("--sinks", "sinks", "attention sinks", action="store_true")
    add("--varlen", "varlen", "packed sequences (cu_seqlens)", action="store_true")
    group = parser.add_argument_group("mixture of experts (--op moe)")
    count("--tokens", "tokens", "tokens (default 4096)")
    count("--hidden", "hidden", "hidden size (default 2048)")
    count("--intermediate", "intermediate", "intermediate size of an expert (default 768)")
    count("--experts", "experts", "experts (default 128)")
    count("--top-k", "top_k", "experts of a token (default 8)")
    count("--shared", "shared", "intermediate size of a shared expert (default 0: none)")
    add("--activation", "activation", f"{', '.join(ACTIVATIONS)} (default swiglu)")
    add("--interleaved", "interleaved", "gate and up rows in turns", action="store_true")
    add("--swiglu-alpha", "swiglu_alpha", "of swigluoai (default 1.702)", type=float, metavar="X")
    add("--swiglu-limit", "swiglu_limit", "clamp of swiglu (default: none) and swigluoai (7)", type=float, metavar="X")
    add("--batch-invariant", "batch_invariant", "one configuration for any number of tokens", action="store_true")


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
        raise argparse.ArgumentTypeError(f"unknown dtype {text!r}; known: {_KINDS}")
    return name
