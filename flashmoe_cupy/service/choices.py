"""An answer of `explain`: for each launch and arch the kernel that would run, and why not the others."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from flashmoe_cupy.errors import UnsupportedProblem

if TYPE_CHECKING:
    from flashmoe_cupy.arrays import View
    from flashmoe_cupy.dtypes import DType
    from flashmoe_cupy.jit.device import DeviceProperties
    from flashmoe_cupy.plan.step import Step


class Choice(NamedTuple):
    """What one arch would run for one launch, and why."""

    arch: str
    kernel: str  # its name; "": nothing runs
    config: str  # the configuration's name; "": nothing runs
    fields: dict[str, Any]  # the configuration's numbers
    because: tuple[str, ...]  # why this configuration, in sentences
    rejected: tuple[tuple[str, str], ...]  # (name, reason) of the other kernels
    step: str = ""  # which launch of the operation it is; "": there is one


class Explanation(NamedTuple):
    """What would run for a problem."""

    problem: str  # in one line
    here: str  # the back end that this machine would take for GPU and CPU arrays, in words
    flops: int  # of what must be computed, each result once
    bytes: int  # of the arrays, each once
    choices: tuple[Choice, ...]  # by arch, then by launch

    def blocks(self) -> list[tuple[Choice, tuple[str, ...]]]:
        """Every different choice, in the order of launches, with the archs that share it."""
        archs: dict[str, list[str]] = {}
        first: dict[str, Choice] = {}
        for choice in self.choices:
            key = repr(choice._replace(arch=""))
            archs.setdefault(key, []).append(choice.arch)
            first.setdefault(key, choice)
        steps = list(dict.fromkeys(choice.step for choice in self.choices))
        keys = sorted(first, key=lambda key: steps.index(first[key].step))
        return [(first[key], tuple(archs[key])) for key in keys]

    def __str__(self) -> str:
        lines = [self.problem, f"work: {self.flops / 1e9:.3g} GFLOP, {self.bytes / 1e6:.3g} MB", f"here: {self.here}"]
        for choice, archs in self.blocks():
            title = f"{' '.join(archs)} {choice.step}".rstrip()
            if choice.config:
                lines.append(f"{title}: {choice.kernel}, {choice.config}")
                lines += [f"  {reason}" for reason in choice.because]
            else:
                lines.append(f"{title}: nothing runs")
            lines += [f"  not {kernel}: {reason}" for kernel, reason in choice.rejected]
        return "\n".join(lines)


def choice(task: str, problem: Any, arch: str, device: DeviceProperties | None = None, step: str = "") -> Choice:
    """What an arch would run for one launch, and why not the other kernels of its task. device: None = an H100."""
    from flashmoe_cupy.jit.device import H100
    from flashmoe_cupy.plan import kernels

    aligned, device = problem.rows_aligned, device or H100
    chosen: Choice | None = None
    rejected: list[tuple[str, str]] = []
    for kernel in kernels.of_task(task).values():
        why = kernel.why_not(problem, arch, aligned)
        if not why and chosen is None:
            config = kernel.choose(problem, arch, aligned, device)
            fields = {**kernel.fields(config), "threads": config.threads, "smem_bytes": config.smem_bytes}
            fields["blocks"] = kernel.grid(problem, config, device.multiprocessors)
            because = tuple(kernel.reasons(problem, config, device))
            chosen = Choice(arch, kernel.name, config.name, fields, because, (), step)
        else:
            why = why or [f"{chosen.kernel} comes first" if chosen else ""]
            rejected += [(kernel.name, reason) for reason in why]
    return (chosen or Choice(arch, "", "", {}, (), (), step))._replace(rejected=tuple(rejected))


def prepared_choices(step: Step, arch: str) -> list[Choice]:
    """The choice for a step, behind those for what its kernel wants to run before it."""
    from flashmoe_cupy.jit.device import H100
    from flashmoe_cupy.plan import kernels

    aligned = step.problem.rows_aligned
    try:
        steps = kernels.prepared([step], arch, aligned, H100, ())[0]
    except UnsupportedProblem:
        steps = [step]
    last = "" if len(steps) == 1 else step.task
    return [choice(one.task, one.problem, arch, step=one.task if one.task != step.task else last) for one in steps]


def check_sizes(sizes: dict[str, Any], flags: dict[str, Any], optional: Sequence[str] = ()) -> None:
    """Raise UnsupportedProblem for sizes that are no ints from 0 on, None for some, and flags that are no bools."""
    from flashmoe_cupy.plan.checks import flag, show
    from flashmoe_cupy.plan.options import integer

    why: list[str] = []
    for name, value in sizes.items():
        n = integer(value)
        if (n is None or n < 0) and not (value is None and name in optional):  # the call itself refuses too large ones
            why.append(f"{name} must be an int from 0 on, but is {show(value)}")
    for name, value in flags.items():
        flag(why, name, value)
    if why:
        raise UnsupportedProblem("explain", why, "sizes are ints, flags are True or False")


def absent_arrays() -> Callable[..., View]:
    """A function that makes views of contiguous arrays on a device, by dtype and shape; the arrays do not exist."""
    from flashmoe_cupy.arrays import View

    address = iter(range(1 << 40, 1 << 50, 1 << 40))  # far apart, so that no two arrays seem to overlap

    def array(of: DType, *shape: int) -> View:
        strides = [1]
        for n in reversed(shape[1:]):
            strides.append(strides[-1] * n)
        return View(next(address), shape, tuple(reversed(strides)), of, 0, "", False, None)  # "": of no library

    return array
