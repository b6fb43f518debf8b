"""A family declared here, outside of the package, is explained, listed, warmed up, shown, timed and tested."""

from __future__ import annotations

import ast
import inspect
import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
import test_cli
from test_cli import run, run_json

from flashmoe_cupy import service
from flashmoe_cupy.cli import options
from flashmoe_cupy.cli.measure import MEASURED
from flashmoe_cupy.cli.measured import Bench, BenchSize, Measured, Result
from flashmoe_cupy.errors import UnsupportedProblem
from flashmoe_cupy.plan.kernels import KERNELS
from flashmoe_cupy.plan.moe.small import SmallConfig, SmallKernel
from flashmoe_cupy.service import Choice, Explanation, Family, Filter, Size, registry
from flashmoe_cupy.service.family import DTYPE, SIZE_DTYPE, of_dtype

Capture = pytest.CaptureFixture[str]
cache_dir = test_cli.cache_dir  # pytest looks for fixtures among the names of the module
PACKAGE = Path(inspect.getfile(service)).parent.parent


class ToyKernel(SmallKernel):
    op = "toy"


KERNEL = ToyKernel(
    "toy_sum", "moe/combine.cuh", "sums of toys", "MoeCombineParams",
    *[
        SmallConfig(f"{element} blocks{blocks}", f"MoeCombine<fm::{element}>", 256, 0, blocks)
        for element in ("bf16", "fp16")
        for blocks in (1, 2)
    ],
)  # fmt: skip


def explain_toy(
    arch: str | None = None, *, dtype: str = "bfloat16", rows: int = 8, twice: bool = False, seqlen_q: int = 1
) -> Explanation:
    if rows > 100:
        raise UnsupportedProblem("toy", [f"rows is {rows}: more than 100"])
    config = KERNEL.configs("")[int(twice)]
    choice = Choice(str(arch), KERNEL.name, config.name, {"threads": config.threads}, ("it is a toy",), ())
    return Explanation(f"toy {dtype} rows{rows} q{seqlen_q}", "here", rows, 2 * rows, (choice,))


def matching(
    arch: str, kernels: Iterable[Any], *, dtype: str | None = None, blocks: int | None = None
) -> Iterator[tuple[Any, Any]]:
    for kernel, config in of_dtype(arch, kernels, dtype=dtype):
        if blocks in (None, config.min_blocks):
            yield kernel, config


TOY = Family(
    "toy",
    "sums of toys",
    (
        SIZE_DTYPE,
        Size("rows", "--rows", "count", "rows of toys (default 8)"),
        Size("twice", "--twice", "flag", "two blocks"),
        Size("seqlen_q", "--q", "count", "queries of toys (default 1)"),
    ),
    explain_toy,
    (DTYPE, Filter("blocks", "--blocks", "positive", "warm blocks", "list blocks", "blocks {}")),
    matching,
)


def result(gpu: bool, sizes: str, case: str, passed: bool = True) -> Result:
    return Result(case, sizes, "float32", "cuda" if gpu else "numpy", 0.1, 0.2, passed, 1.0, 2.0, 0.0, 1e9, "toy")


def sweep(gpu: bool, dtype: str, longest: int, *, rows: int, heads: int) -> Iterator[Result]:
    if rows > longest:
        raise ValueError(f"--rows {rows} is more than --longest")
    return iter([result(gpu, f"{dtype} rows{rows} h{heads} to {longest}", "wooden")])


TOYS = Measured(
    "toys",
    "the sum of toys",
    lambda gpu: [("one toy", lambda: result(gpu, "r1", "one toy"))],
    lambda gpu: result(gpu, "r1", "self-test", passed=False),
    Bench(
        sweep,
        (
            BenchSize(Size("rows", "--rows", "positive", "rows (default 3)"), 30, 3),
            BenchSize(Size("heads", "--heads", "positive", "heads of toys"), 2, 1),
        ),
        "toys", (99, 9), "material", "toys over rows", "toys over numbers of rows",
    ),
)  # fmt: skip


@pytest.fixture
def toy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(service.FAMILIES, "toy", TOY)
    monkeypatch.setitem(MEASURED, "toy", TOYS)
    monkeypatch.setitem(KERNELS, KERNEL.name, KERNEL)


def squeezed(text: str) -> str:
    return " ".join(text.split())


@pytest.mark.usefixtures("toy")
def test_help_shows_the_family(capsys: Capture) -> None:
    code, out, _ = run(capsys, "explain", "--op", "toy", "--help")
    text = squeezed(out)
    assert code == 0 and "{attention,attention_backward,moe,toy}" in text and "sizes of all: --dtype" in text
    _, group = text.split("sums of toys (--op toy): ")
    assert group.startswith("As above: --q = queries of toys (default 1). --rows N rows of toys (default 8) --twice")
    texts = {name: squeezed(run(capsys, name, "--help")[1]) for name in ("kernels", "warmup", "bench", "demo")}
    assert "--blocks BLOCKS list blocks" in texts["kernels"] and "--blocks BLOCKS warm blocks" in texts["warmup"]
    assert "moe: mixture of experts; toy: sums of toys" in texts["warmup"]
    assert "--rows N toy: rows (default 3)" in texts["bench"] and "with --op toy, toys over numbers" in texts["bench"]
    both = "--heads N attention, attention_backward: query and key heads (default 16); toy: heads of toys"
    assert both in texts["bench"]
    assert "most queries, or tokens, or toys; default: 16384 or 4096 or 99 on a GPU" in texts["bench"]
    assert "a few attentions, gradients of attention, mixtures of experts and toys here" in texts["demo"].lower()


@pytest.mark.usefixtures("toy")
def test_explain(capsys: Capture) -> None:
    data = run_json(capsys, "explain", "--op", "toy", "--rows", "7", "--twice", "--q", "4", "--dtype", "fp16")
    assert data["problem"] == "toy fp16 rows7 q4" and data["choices"][0]["config"] == "bf16 blocks2"
    assert service.explain("toy", rows=3).flops == 3
    for argv, message in (
        (["--op", "toy", "--causal"], "--op toy has no --causal"),
        (["--rows", "3"], "--op attention has no --rows"),
        (["--op", "moe", "--q", "3", "--twice"], "--op moe has no --q, --twice"),
    ):
        code, _, err = run(capsys, "explain", *argv)
        assert code == 2 and message in err
    code, _, err = run(capsys, "explain", "--op", "toy", "--rows", "101")
    assert code == 1 and "more than 100" in err


@pytest.mark.usefixtures("toy")
def test_kernels(capsys: Capture) -> None:
    def names(*argv: str) -> list[str]:
        (kernel,) = run_json(capsys, "kernels", *argv).values()
        return [config["name"] for config in kernel["configs"]]

    assert list(registry("toy")) == [KERNEL.name]
    assert names("--op", "toy") == ["bf16 blocks1", "bf16 blocks2", "fp16 blocks1", "fp16 blocks2"]
    assert names("--op", "toy", "--blocks", "2", "--dtype", "bf16") == ["bf16 blocks2"]
    assert names("--blocks", "1") == ["bf16 blocks1", "fp16 blocks1"], "a filter means the families that have it"
    assert KERNEL.name in run_json(capsys, "kernels")
    code, out, _ = run(capsys, "kernels", "--op", "toy", "--blocks", "5", "--arch", "sm_80", "--dtype", "bf16")
    assert code == 0 and "no configuration for sm_80, bfloat16, blocks 5" in out
    for argv, message in (
        (["kernels", "--op", "moe", "--blocks", "1"], "--op moe has no --head-dim and no --blocks"),
        (["warmup", "--op", "toy", "--head-dim", "64"], "--op toy has no --head-dim and no --head-dim-v"),
        (["warmup", "--all", "--blocks", "1"], "--all does not go with --dtype, --head-dim, --head-dim-v or --blocks"),
        (["kernels", "--blocks", "1", "--head-dim", "64"], "no op has head_dim and blocks"),
    ):
        code, _, err = run(capsys, *argv)
        assert code == 2 and message in err
    with pytest.raises(ValueError, match="moe has no head_dim and no head_dim_v and no blocks"):
        service.warmup("moe", arch="sm_80", blocks=1)
    for call in (service.kernels, service.warmup):
        with pytest.raises(TypeError, match="unknown filter block; known: dtype, head_dim, head_dim_v, blocks"):
            call(arch="sm_80", block=1)


@pytest.mark.compile
@pytest.mark.usefixtures("toy", "cache_dir")
def test_warmup(capsys: Capture) -> None:
    argv = ("warmup", "--op", "toy", "--arch", "sm_80", "--blocks", "2", "--dtype", "bf16")
    for source in ("compiled", "cache"):
        (warmed,) = run_json(capsys, *argv)["kernels"]
        assert (warmed["kernel"], warmed["config"], warmed["source"]) == (KERNEL.name, "bf16 blocks2", source)


@pytest.mark.usefixtures("toy")
def test_demo_bench_and_info(capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    code, out, _ = run(capsys, "demo", "--op", "toy", "--backend", "numpy")
    assert code == 0 and "toy: the sum of toys, its last rows" in out and "one toy" in out and "attention" not in out
    (row,) = run_json(capsys, "bench", "--op", "toy", "--backend", "numpy", "--rows", "4")
    assert row["sizes"] == "float32 rows4 h1 to 9"
    code, out, _ = run(capsys, "bench", "--op", "toy", "--backend", "numpy", "--longest", "5", "--heads", "7")
    assert code == 0 and "material" in out and "rows3 h7 to 5" in out
    for argv, message in (
        (["--op", "toy", "--rows", "10"], "--rows 10 is more than --longest"),
        (["--op", "toy", "--d", "4"], "--op toy has no --d"),
        (["--rows", "4"], "--op attention has no --rows"),
    ):
        code, _, err = run(capsys, "bench", "--backend", "numpy", *argv)
        assert code == 2 and message in err
    for op in service.OPS:
        monkeypatch.setitem(MEASURED, op, MEASURED[op]._replace(self_test=lambda gpu: result(gpu, "", "")))
    code, out, _ = run(capsys, "info", "--json")
    (test,) = (test for test in json.loads(out)["self_test"] if test["name"] == "NumPy sums of toys")
    assert code == 1 and not test["passed"] and "wrong result" in test["detail"]


# ---------------------------------------------------------------------------------------------------- the package's own


@pytest.mark.parametrize("family", service.FAMILIES.values(), ids=[*service.FAMILIES])
def test_declared_sizes_are_those_of_explain(family: Family) -> None:
    """The names, and the defaults that the help tells."""
    taken = inspect.signature(family.explain).parameters
    assert sorted(size.name for size in family.sizes) == sorted(set(taken) - {"arch"})
    told = 0
    for size in family.sizes:
        default = taken[size.name].default
        if (found := re.search(r"\(default ([\w.]+)[:)]", size.help)) and default is not None:
            assert found[1] == str(default), size.name
            told += 1
    assert told >= 5
    assert tuple(service.FAMILIES) == service.OPS and family.name in MEASURED


def test_a_flag_with_two_meanings_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    other = TOY._replace(sizes=(Size("rows", "--q", "count", "not what --q is"),))
    monkeypatch.setitem(service.FAMILIES, "toy", other)
    with pytest.raises(Exception, match="conflicting option string"):
        options.make_parser()


def test_no_code_asks_which_operation_it_is() -> None:
    paths = [path for room in ("service", "cli") for path in sorted((PACKAGE / room).glob("*.py"))]
    assert len(paths) > 10
    found = [
        f"{path.name}:{node.lineno}"
        for path in paths
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Compare)
        and any(isinstance(side, ast.Constant) and side.value in service.OPS for side in (node.left, *node.comparators))
    ]
    assert not found
