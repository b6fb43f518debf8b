"""Which kernel and configuration would run: for one problem, and for all of them. Needs no GPU and no CuPy."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from itertools import product
from typing import TYPE_CHECKING, Any, NamedTuple

from flashmoe_cupy import _env
from flashmoe_cupy.errors import UnsupportedProblem
from flashmoe_cupy.service.machine import backend, devices

if TYPE_CHECKING:
    from flashmoe_cupy.arrays import View
    from flashmoe_cupy.dtypes import DType

OPS = ("attention", "moe")
DTYPES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}  # as configurations and problems are printed: name


class Choice(NamedTuple):
    """What one arch would run, and why. kernel and config are empty when nothing runs.

    fields: the configuration's numbers. because: why this one. rejected: (kernel, reason) of the others.
    step: which of an operation's launches this is; "" where there is one.
    """

    arch: str
    kernel: str
    config: str
    fields: dict[str, Any]
    because: tuple[str, ...]
    rejected: tuple[tuple[str, str], ...]
    step: str = ""


class Explanation(NamedTuple):
    """What would run for a problem. flops and bytes count what must be computed once, and each array once.

    here: the back end that this machine would take for GPU and CPU arrays, in words.
    """

    problem: str
    here: str
    flops: int
    bytes: int
    choices: tuple[Choice, ...]

    def blocks(self) -> list[tuple[Choice, tuple[str, ...]]]:
        """Each answer once, step by step: a choice, and the archs that share it."""
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


def explain(op: str = "attention", *, arch: str | Sequence[str] | None = None, **sizes: Any) -> Explanation:
    """Say which kernels and configurations would run a problem, per arch, and why not the others. Needs no GPU.

    arch: one or several of plan.archs.ARCHS; None = FLASHMOE_ARCH, else those of the devices here, else all.
    sizes: of the problem, by name; those not given have the defaults that `explain_attention` and `explain_moe` say.
    "attention": batch, seqlen_q, seqlen_k, heads_q, heads_k, head_dim, head_dim_v, dtype, causal, window_size,
        softmax_scale, softcap, alibi, bias, sinks, varlen.
    "moe": tokens, hidden, intermediate, experts, top_k, dtype, activation, interleaved, swiglu_alpha, swiglu_limit,
        shared, batch_invariant.
    Raises UnsupportedProblem, with the same reasons as the call itself, ValueError for an unknown op or arch, and
    TypeError for a size that the op does not have.
    """
    from flashmoe_cupy.service.moe import explain_moe

    require_known("op", op, OPS)
    return explain_moe(arch, **sizes) if op == "moe" else explain_attention(arch, **sizes)


def explain_attention(
    arch: str | Sequence[str] | None = None,
    *,
    batch: int = 1,
    seqlen_q: int = 4096,
    seqlen_k: int | None = None,
    heads_q: int = 32,
    heads_k: int | None = None,
    head_dim: int = 128,
    head_dim_v: int | None = None,
    dtype: str = "bfloat16",
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softmax_scale: float | None = None,
    softcap: float = 0.0,
    alibi: bool = False,
    bias: str | None = None,
    sinks: bool = False,
    varlen: bool = False,
) -> Explanation:
    """`explain` for attention.

    seqlen_k, heads_k, head_dim_v: None = as seqlen_q, heads_q, head_dim. bias: None, "same" (q's dtype), "float32" or
    "bool", of shape (batch, heads_q, seqlen_q, seqlen_k). varlen: `batch` packed sequences of exactly these lengths.
    """
    problem = _problem(
        batch, seqlen_q, seqlen_k, heads_q, heads_k, head_dim, head_dim_v, dtype, causal, window_size,
        softmax_scale, softcap, alibi, bias, sinks, varlen,
    )  # fmt: skip
    choices = [choice("attention_fwd", problem, name) for name in target_archs(arch)]
    pairs = visible_pairs(problem.seqlen_q, problem.seqlen_k, problem.window_left, problem.window_right)
    size = problem.dtype.itemsize
    rows_q, rows_k = problem.batch * problem.seqlen_q, problem.batch * problem.seqlen_k
    dims = problem.head_dim + problem.head_dim_v
    flops = 2 * problem.batch * problem.heads_q * pairs * dims
    moved = size * dims * (rows_q * problem.heads_q + rows_k * problem.heads_k)
    return Explanation(problem.describe(), backend()[1], flops, moved, tuple(choices))


def choice(task: str, problem: Any, arch: str, sms: int | None = None, step: str = "") -> Choice:
    """What an arch would run for one launch, and why not the other kernels of its task. sms: None = of an H100."""
    from flashmoe_cupy.plan import kernels
    from flashmoe_cupy.plan.kernel import DEFAULT_SMS

    aligned, sms = problem.rows_aligned, sms or DEFAULT_SMS
    chosen: Choice | None = None
    rejected: list[tuple[str, str]] = []
    for kernel in kernels.of_task(task).values():
        why = kernel.why_not(problem, arch, aligned)
        if not why and chosen is None:
            config = kernel.choose(problem, arch, aligned, sms)
            fields = {**kernel.fields(config), "threads": config.threads, "smem_bytes": config.smem_bytes}
            fields["blocks"] = kernel.grid(problem, config, sms)
            because = tuple(kernel.reasons(problem, config))
            chosen = Choice(arch, kernel.name, config.name, fields, because, (), step)
        else:
            why = why or [f"{chosen.kernel} comes first" if chosen else ""]
            rejected += [(kernel.name, reason) for reason in why]
    return (chosen or Choice(arch, "", "", {}, (), (), step))._replace(rejected=tuple(rejected))


def visible_pairs(seqlen_q: int, seqlen_k: int, left: int = -1, right: int = -1) -> int:
    """How many (query, key) pairs the causal rule and the window leave; left, right as in `window_size`, -1 = open."""

    def before(shift: int) -> int:
        """The sum over all queries of the keys before position `query + shift`, query 0 at seqlen_k - seqlen_q."""
        first = seqlen_k - seqlen_q + shift
        low, high = max(first, 1), min(first + seqlen_q - 1, seqlen_k - 1)  # where the count is the position itself
        inside = (low + high) * (high - low + 1) // 2 if high >= low else 0
        return inside + seqlen_k * min(max(first + seqlen_q - max(seqlen_k, first), 0), seqlen_q)

    seen = before(right + 1) if right >= 0 else seqlen_q * seqlen_k
    return seen - (before(-left) if left >= 0 else 0)


def _problem(
    batch: int, seqlen_q: int, seqlen_k: int | None, heads_q: int, heads_k: int | None, head_dim: int,
    head_dim_v: int | None, dtype: str, causal: bool, window_size: tuple[int, int], softmax_scale: float | None,
    softcap: float, alibi: bool, bias: str | None, sinks: bool, varlen: bool,
) -> Any:  # fmt: skip
    """The problem that a call with contiguous arrays of these sizes would make; the arrays do not exist."""
    from flashmoe_cupy import dtypes
    from flashmoe_cupy.plan.attention import problem

    check_sizes(
        {"batch": batch, "seqlen_q": seqlen_q, "seqlen_k": seqlen_k, "heads_q": heads_q, "heads_k": heads_k,
         "head_dim": head_dim, "head_dim_v": head_dim_v},
        {"alibi": alibi, "sinks": sinks, "varlen": varlen}, ("seqlen_k", "heads_k", "head_dim_v"),
    )  # fmt: skip
    seqlen_k = seqlen_q if seqlen_k is None else seqlen_k
    heads_k = heads_q if heads_k is None else heads_k
    dim_v = head_dim if head_dim_v is None else head_dim_v
    kind = named_dtype(dtype)
    array = absent_arrays()
    options: dict[str, Any] = {"causal": causal, "window_size": window_size, "softmax_scale": softmax_scale}
    options["softcap"] = softcap
    options["sinks"] = array(dtypes.FP32, heads_q) if sinks else None
    options["alibi_slopes"] = array(dtypes.FP32, heads_q) if alibi else None
    if varlen:
        if bias is not None:
            raise UnsupportedProblem("flash_attention_varlen", ["bias is not an argument of packed attention"])
        return problem.varlen_problem(
            array(kind, batch * seqlen_q, heads_q, head_dim),
            array(kind, batch * seqlen_k, heads_k, head_dim),
            array(kind, batch * seqlen_k, heads_k, dim_v),
            cu_seqlens_q=array(dtypes.INT32, batch + 1),
            cu_seqlens_k=array(dtypes.INT32, batch + 1),
            max_seqlen_q=seqlen_q,
            max_seqlen_k=seqlen_k,
            **options,
        )
    if bias is not None:
        of = kind if bias == "same" else named_dtype(bias)
        options["bias"] = array(of, batch, heads_q, seqlen_q, seqlen_k)
    return problem.attention_problem(
        array(kind, batch, seqlen_q, heads_q, head_dim),
        array(kind, batch, seqlen_k, heads_k, head_dim),
        array(kind, batch, seqlen_k, heads_k, dim_v),
        **options,
    )


def check_sizes(sizes: dict[str, Any], flags: dict[str, Any], optional: Sequence[str] = ()) -> None:
    """Raise UnsupportedProblem for sizes that are no ints from 0 on, None for some, and flags that are no bools."""
    from flashmoe_cupy.plan.checks import flag, show
    from flashmoe_cupy.plan.options import integer

    why: list[str] = []
    for name, value in sizes.items():
        n = integer(value)
        if (n is None or n < 0) and not (value is None and name in optional):  # too large ones: as in the call itself
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
        return View(next(address), shape, tuple(reversed(strides)), of, 0, "", False, None)  # of whatever library

    return array


def named_dtype(name: str) -> DType:
    """The dtype called `name`, in full or as it is printed in problems and configurations. Raises ValueError."""
    from flashmoe_cupy import dtypes

    try:
        return dtypes.from_name(DTYPES.get(name, name))
    except ValueError:
        known = ", ".join(f"{full} or {short}" for short, full in DTYPES.items())
        raise ValueError(f"unknown dtype {name!r}; known: {known}") from None


# The compute capabilities of GPUs whose names leave no doubt, and the names as one writes them.
_GPUS = {
    "sm_80": ("A100", "A30", "A800"), "sm_86": ("A10", "A40", "A16", "A2", "RTX 3090", "RTX 3080", "RTX A6000"),
    "sm_89": ("L4", "L40", "L40S", "RTX 4090", "RTX 4080"), "sm_90a": ("H100", "H200", "H800", "H20", "GH200"),
    "sm_100": ("B200", "GB200"), "sm_120": ("RTX 5090", "RTX 5080"),
}  # fmt: skip


def _of_gpu(name: str) -> str:
    """What is known of a GPU that was named instead of an arch; "" if nothing is."""
    plain = re.sub(r"nvidia|geforce|rtx|[^a-z0-9]", "", name.lower())
    for arch, names in _GPUS.items():
        for gpu in names:
            if plain == re.sub(r"rtx|[^a-z0-9]", "", gpu.lower()):
                return f"; {gpu} is {arch}"
    return ""


def named_arch(name: str) -> str:
    """The arch that is meant by sm_90a, sm_90, sm90 or 9.0. Raises ValueError for one that is not known."""
    from flashmoe_cupy.plan.archs import ARCHS, MAX_SMEM, arch_for

    known = tuple(dict.fromkeys((*ARCHS, *MAX_SMEM)))
    numbers = re.fullmatch(r"(?:sm_?)?(\d+)\.?(\d)", name.strip().lower())
    meant = arch_for((int(numbers[1]), int(numbers[2]))) if numbers else name.strip().lower()
    if meant not in known:
        raise ValueError(f"unknown arch {name!r}{_of_gpu(name)}; known: {', '.join(known)}")
    return meant


def require_known(what: str, name: str, known: Sequence[str]) -> None:
    if name not in known:
        raise ValueError(f"unknown {what} {name!r}; known: {', '.join(known)}")


def target_archs(arch: str | Sequence[str] | None) -> tuple[str, ...]:
    """The archs that are meant: given, from FLASHMOE_ARCH, of the devices here, else all. Raises ValueError."""
    from flashmoe_cupy.plan.archs import ARCHS

    chosen = arch if arch is not None else _env.get().arch
    if chosen is not None:
        names = tuple(chosen) if isinstance(chosen, (list, tuple, set)) else (str(chosen),)
        return tuple(dict.fromkeys(map(named_arch, names)))
    found = tuple(dict.fromkeys(device.arch for device in devices() if device.arch))
    return found or tuple(ARCHS)


def kernels(
    arch: str | None = None, *, op: str | None = None, dtype: str | None = None, head_dim: int | None = None
) -> dict[str, dict[str, Any]]:
    """Per kernel its summary, header and configurations, each with the archs that have it.

    arch, op, dtype, head_dim: only these; a head_dim means attention. Raises as `specialisations` does, and ValueError
    for an unknown arch or op.
    """
    from flashmoe_cupy.plan.archs import ARCHS

    if op is not None:
        require_known("op", op, OPS)
    names = ARCHS if arch is None else target_archs(arch)
    ops = (op,) if op is not None else OPS if head_dim is None else ("attention",)
    table: dict[str, dict[str, Any]] = {
        kernel.name: {"summary": kernel.summary, "header": kernel.header, "configs": []}
        for each in ops
        for kernel in registry(each).values()
    }
    rows: dict[tuple[str, Any], dict[str, Any]] = {}
    for name, each in product(names, ops):
        for kernel, config in specialisations(name, op=each, dtype=dtype, head_dim=head_dim):
            if (kernel.name, config) not in rows:
                row = {"name": config.name, "archs": [], "threads": config.threads, "smem_bytes": config.smem_bytes}
                table[kernel.name]["configs"].append(rows.setdefault((kernel.name, config), row))
            rows[kernel.name, config]["archs"].append(name)
    return table


def registry(op: str) -> dict[str, Any]:
    """The kernels of an op by name; of those for one task, the first that takes a problem runs it."""
    from flashmoe_cupy.plan import kernels

    return dict(kernels.of_op(op))


def specialisations(
    arch: str,
    *,
    op: str = "attention",
    dtype: str | None = None,
    head_dim: int | None = None,
    head_dim_v: int | None = None,
) -> Iterator[tuple[Any, Any]]:
    """(kernel, config) of every specialisation that a call on `arch` can ask for, or of those that match.

    op: "attention", or "moe" for all operations of mixture of experts.
    dtype, head_dim, head_dim_v (None = as head_dim): only what calls with these can ask for, whatever their masks and
    features. The sets are finite: no length, stride, batch or head count is part of a specialisation.
    Raises UnsupportedProblem for head dimensions that nothing runs, ValueError for head_dim_v without head_dim, for
    head dimensions of "moe" and for a dtype that nothing computes with.
    """
    if op == "moe" and (head_dim, head_dim_v) != (None, None):
        raise ValueError("moe has no head_dim and no head_dim_v")
    if head_dim is None and head_dim_v is not None:
        raise ValueError("head_dim_v needs head_dim beside it")
    names = [dtype] if dtype is not None else ["bfloat16", "float16", "float32"]
    elements = {named_dtype(name).cuda for name in names}
    if not elements <= set(DTYPES):
        require_known("dtype", names[0], (*DTYPES.values(), *DTYPES))
    if op == "moe":
        from flashmoe_cupy.service.moe import element

        for kernel in registry(op).values():
            yield from ((kernel, config) for config in kernel.configs(arch) if element(config) in ("", *elements))
        return
    for kernel in registry(op).values():
        dims = None if head_dim is None else _compiled_dims(kernel, arch, names, head_dim, head_dim_v)
        for config in kernel.configs(arch):
            if config.element in elements and (dims is None or (config.head_dim, config.head_dim_v) in dims):
                yield kernel, config


def _compiled_dims(
    kernel: Any, arch: str, names: Sequence[str], head_dim: int, head_dim_v: int | None
) -> set[tuple[int, int]]:
    """The compiled sizes in which `kernel` runs these head dimensions, asked of the kernel itself."""
    found = set()
    for name in names:
        for length, softcap, bias in product((1, 4096), (0.0, 1.0), (None, "same")):
            problem = _problem(
                1, length, length, 1, 1, head_dim, head_dim_v, name, True, (-1, -1), None, softcap, False, bias, False,
                False,
            )  # fmt: skip
            if not kernel.why_not(problem, arch):
                config = kernel.choose(problem, arch)
                found.add((config.head_dim, config.head_dim_v))
    return found
