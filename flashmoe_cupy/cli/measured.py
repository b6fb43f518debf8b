"""What an operation declares so that `demo`, `bench` and `info` run it, and what a run of it gives."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

from flashmoe_cupy.service import Size


class Result(NamedTuple):
    """What one case gave."""

    case: str  # its title
    sizes: str  # for people
    dtype: str
    backend: str  # "cuda" or "numpy"
    error: float  # of the norm, against float64
    allowed: float
    passed: bool
    milliseconds: float  # of a call
    first_ms: float  # of the first call
    compile_ms: float  # in the compiler during the first call
    flops_per_second: float
    op: str  # its name in MEASURED


class BenchSize(NamedTuple):
    """A size that `bench` takes. Operations may share a flag: only `help`, `words` and defaults may then differ."""

    size: Size
    on_gpu: Any  # the default
    on_cpu: Any  # the default without a GPU


class Bench(NamedTuple):
    """How `bench` times an operation: at growing lengths up to the longest."""

    run: Callable[..., Iterator[Result]]  # (gpu, dtype, longest, **sizes); raises ValueError for sizes that do not fit
    sizes: tuple[BenchSize, ...]
    counted: str  # what the longest length counts
    longest: tuple[int, int]  # the default on a GPU and without one
    column: str  # what `case` of the results says
    title: str  # what is timed over what
    text: str  # the same in more words


class Measured(NamedTuple):
    """What `demo`, `bench` and the self-test of `info` run of one operation. gpu: on the GPU, else on NumPy."""

    plural: str  # several of them, in words
    formula: str  # what is computed, in words
    demo: Callable[[bool], Iterable[tuple[str, Callable[[], Result]]]]  # (gpu) -> title and run of each case
    self_test: Callable[[bool], Result]  # (gpu): one small case
    bench: Bench
