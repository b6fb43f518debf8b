"""What a family declares of itself, so that `explain`, `kernels`, `warmup` and the command line know it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from flashmoe_cupy.service.names import DTYPE_NAMES, DTYPES, named_dtype, require_known

if TYPE_CHECKING:
    from flashmoe_cupy.service.choices import Explanation

# What the command line reads a value as: count: an int from 0 on; positive: an int from 1 on; number: a float; flag:
# True where it is given; window: LEFT[,RIGHT]; word: text, which the problem judges; dtype: one of DTYPES.
Kind = Literal["count", "positive", "number", "flag", "window", "word", "dtype"]


class Size(NamedTuple):
    """A size or feature of a problem. Families may share a flag: only `help` and `words` may then differ."""

    name: str  # of the argument of `explain`
    flag: str  # of the command line
    kind: Kind
    help: str
    metavar: str = ""  # of the value in the help; "": as the kind has it
    const: str | None = None  # what the flag means without a value; None: it needs one
    words: Callable[[], Sequence[str]] | None = None  # the values that there are; None: they are not counted


class Filter(NamedTuple):
    """What picks some of a family's specialisations. Families that share one declare the same Filter."""

    name: str  # of the argument of `kernels` and `warmup`
    flag: str  # of the command line
    kind: Kind
    warmup: str  # the help of `warmup`
    kernels: str = ""  # the help of `kernels`; "": the command has no such option
    shown: str = "{}"  # the value in a sentence
    needs: str = ""  # the name of a filter that must be given too; "": none


SIZE_DTYPE = Size("dtype", "--dtype", "word", f"{DTYPE_NAMES} (default bfloat16)")
DTYPE = Filter(
    "dtype", "--dtype", "dtype", f"only what calls with it need: {DTYPE_NAMES}",
    f"only configurations for it: {DTYPE_NAMES}",
)  # fmt: skip


def of_dtype(arch: str, kernels: Iterable[Any], *, dtype: str | None = None) -> Iterator[tuple[Any, Any]]:
    """(kernel, config) of every specialisation for `arch`, or of those that calls with this dtype can ask for.

    A configuration says its element type in its field `element` or in the first word of its name; one that says none
    serves every dtype. Raises ValueError for a dtype that nothing computes with.
    """
    elements = elements_of(dtype)
    for kernel in kernels:
        yield from ((kernel, config) for config in kernel.configs(arch) if _element(config) in ("", *elements))


def elements_of(dtype: str | None) -> set[str]:
    """The element types, as CUDA names them, of a dtype; None = of all. Raises ValueError as `of_dtype` does."""
    elements = set(DTYPES) if dtype is None else {named_dtype(dtype).cuda}
    if not elements <= set(DTYPES):
        require_known("dtype", str(dtype), (*DTYPES.values(), *DTYPES))
    return elements


def _element(config: Any) -> str:
    """The element type that a configuration is for, as CUDA names it; "" for one that serves all."""
    first = str(getattr(config, "element", config.name.split()[0]))
    return first if first in DTYPES else ""


class Family(NamedTuple):
    """Operations that are explained together and whose kernels are listed and warmed up together."""

    name: str  # what users call it, and `Kernel.op` of its kernels
    title: str  # in words
    sizes: tuple[Size, ...]  # in the order of the help
    explain: Callable[..., Explanation]  # (arch, **sizes)
    filters: tuple[Filter, ...] = (DTYPE,)
    matching: Callable[..., Iterator[tuple[Any, Any]]] = of_dtype  # (arch, kernels, **filters) -> (kernel, config)
