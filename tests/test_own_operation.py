"""An operation that the package does not know: two kernels, a workspace, an optional array and an optional output.

Its header lies in a temporary folder, it is declared here, and NumPy, CuPy, torch and JAX run it: nothing in the
package knows its name. What this file does is what an operation of the package does, in the places that README lists.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest

from flashmoe_cupy.arrays import View
from flashmoe_cupy.dtypes import FP32, DType
from flashmoe_cupy.errors import UnsupportedProblem
from flashmoe_cupy.jit import source
from flashmoe_cupy.ops import public
from flashmoe_cupy.ops.call import Call, run
from flashmoe_cupy.ops.names import no_argument, strict
from flashmoe_cupy.plan import kernels, operation
from flashmoe_cupy.plan.checks import asked, check_dtypes, check_last, check_out, check_places, flag, need_ranks, show
from flashmoe_cupy.plan.moe.small import SmallConfig, SmallKernel
from flashmoe_cupy.plan.operation import Operation, Output, Workspace
from flashmoe_cupy.plan.options import real
from flashmoe_cupy.plan.step import Step, Values, same

# ------------------------------------------------------------------------------------------------------ the kernels

HEADER = """// Rows without their mean: two kernels that share a workspace.
//
//   partial[r] = sum_c x[r, c]    mean[r] = partial[r] / columns    out[r, c] = scale * (x[r, c] - mean[r]) + shift[c]
//
// Overwrites out, and mean where it is wanted.
#pragma once
#include "prelude.cuh"
#include "ptx/cluster.cuh"

namespace fm {

struct CentreRowsParams {
  const float *x, *shift;  // (rows, columns), (columns); shift: null = none
  float *out, *mean;       // (rows, columns), (rows); mean: null = not wanted
  float* partial;          // (rows), the workspace
  i64 x_stride;            // elements from row to row of x
  int rows, columns;
  float scale;
};

// One thread for each row.
struct CentreRowsSum {
  FM_DEVICE static void run(const CentreRowsParams& p) {
    start_after_last_grid();
    const int row = blockIdx.x * 32 + threadIdx.x;
    if (row >= p.rows) return;
    float sum = 0.f;
    for (int i = 0; i < p.columns; ++i) sum += p.x[row * p.x_stride + i];
    p.partial[row] = sum;
  }
};

// One block for each row.
struct CentreRowsMove {
  FM_DEVICE static void run(const CentreRowsParams& p) {
    start_after_last_grid();
    const int row = blockIdx.x;
    const float mean = p.partial[row] / p.columns;
    if (threadIdx.x == 0 && p.mean != nullptr) p.mean[row] = mean;
    for (int i = threadIdx.x; i < p.columns; i += 32) {
      const float shift = p.shift != nullptr ? p.shift[i] : 0.f;
      p.out[static_cast<i64>(row) * p.columns + i] = p.scale * (p.x[row * p.x_stride + i] - mean) + shift;
    }
  }
};

}  // namespace fm
"""


def small(name: str, struct: str) -> SmallKernel:
    config = SmallConfig(name, struct, 32, 0)
    return SmallKernel(f"centre_rows_{name}", "centre_rows.cuh", "rows without their mean", "CentreRowsParams", config)


SUM, MOVE = small("sum", "CentreRowsSum"), small("move", "CentreRowsMove")

# --------------------------------------------------------------------------------------- problem, launches, back end


class CentreProblem(NamedTuple):
    """Everything but the pointers of `centre_rows`."""

    dtype: DType
    rows: int
    columns: int
    x_stride: int  # elements from row to row
    scale: float
    has_shift: bool
    return_mean: bool

    def describe(self) -> str:
        return f"centre_rows {self.rows}x{self.columns}"


def centre_problem(
    x: View, shift: View | None = None, *, scale: object, return_mean: object, out: View | None = None
) -> CentreProblem:  # fmt: skip
    why: list[str] = []
    named = [("x", x)] if shift is None else [("x", x), ("shift", shift)]
    check_dtypes(why, named)
    check_places(why, named)
    for name, of in named:
        check_last(why, name, of)
    if len(x.shape) != 2:
        why.append(f"x must have 2 dimensions, but has {len(x.shape)}")
    elif shift is not None and shift.shape != x.shape[1:]:
        why.append(f"shift must have shape {x.shape[1:]}, but has {shift.shape}")
    if out is not None:
        check_out(why, out, "x", x.dtype, x.shape)
    if x.dtype is not FP32:
        why.append(f"x has dtype {x.dtype}, which must be float32")
    factor, wanted = real(scale), flag(why, "return_mean", return_mean)
    if factor is None:
        why.append(f"scale must be a number, but is {show(scale)}")
    if why or factor is None:
        raise UnsupportedProblem(asked("centre_rows", named, [("scale", scale, 1)]), why)
    rows, columns = x.shape
    return CentreProblem(x.dtype, rows, columns, x.strides[0], factor, shift is not None, wanted)


def centre_steps(p: CentreProblem) -> tuple[list[Step], Workspace]:
    work = Workspace()
    work.add("partial", 4 * p.rows)
    arguments = same("x", "shift", "out", "mean", "partial")
    values: Values = {"x_stride": p.x_stride, "rows": p.rows, "columns": p.columns, "scale": p.scale}
    steps = [
        kernel.step(kernel.all_configs[0], blocks, arguments, values)
        for kernel, blocks in ((SUM, -(-p.rows // 32)), (MOVE, p.rows))
    ]
    return steps, work


def centre_host(p: CentreProblem, given: Mapping[str, Any], made: Mapping[str, Any]) -> None:
    mean = given["x"].mean(1, keepdims=True)
    made["out"][...] = p.scale * (given["x"] - mean) + (0 if given["shift"] is None else given["shift"])
    if "mean" in made:
        made["mean"][...] = mean[:, 0]


def centre_shapes(shapes: Mapping[str, Any], options: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    need_ranks("centre_rows", {"x": 2}, shapes)
    x = shapes["x"]
    return {"out": tuple(x)} | ({"mean": (x[0],)} if options["return_mean"] else {})


# ------------------------------------------------------------------------------------------------------ the function


@strict
def centre_rows(
    x: Any, *, shift: Any = None, scale: float = 1, return_mean: bool = False, out: Any = None, **unknown: object
) -> Any:
    """scale * (x - mean of its row) + shift; with return_mean also the means."""
    if unknown:
        raise no_argument(centre_rows, unknown)
    if shift is None and out is None:
        return run(CALL, (x,), (scale, return_mean))
    return run(CALL, (x,), (scale, return_mean), (shift,), out)


OPERATION = Operation(
    centre_rows, ("x", "shift"), 1, {"out": Output(), "mean": Output(FP32)}, centre_shapes, CentreProblem,
    centre_problem, centre_steps, centre_host, wanted=lambda options: ("out", "mean")[: 1 + options["return_mean"]],
    empty=lambda p: 0 in (p.rows, p.columns),
)  # fmt: skip
CALL = Call(OPERATION)


@pytest.fixture(autouse=True, scope="module")
def declared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    folder = tmp_path_factory.mktemp("elsewhere")
    (folder / "centre_rows.cuh").write_text(HEADER)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(source, "_folders", [])
        patch.setattr(kernels, "_known", dict(kernels.KERNELS))
        patch.setattr(operation, "_operations", dict(operation._operations))
        source.add_folder(folder)
        for kernel in (SUM, MOVE):
            kernels.register(kernel)
        operation.register(OPERATION)
        yield


@pytest.mark.parametrize("name", [*public.__all__, "centre_rows"])
def test_a_function_hands_over_what_is_declared(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the order of its operation: each argument carries its own name here."""
    its, seen = operation.registered(name), []

    def note(call: Call, required: Any, options: Any, optional: Any = None, out: Any = None) -> Any:
        seen.append((call.operation, required, options, optional, out))
        return ()

    monkeypatch.setitem(its.function.__globals__, "run", note)
    its.function(**{parameter: parameter for parameter in inspect.signature(its.function).parameters})
    ((called, required, options, optional, out),) = seen
    assert called is its and (*required, *(optional or ())) == its.arguments and len(required) == its.required
    assert options == tuple(its.options) and out == ("out" if its.has_out else None)


def test_the_package_does_not_know_it() -> None:
    package = Path(source.__file__).parents[1]
    texts = [*package.rglob("*.py"), *(package.parent / "cuda_src").rglob("*.cuh")]
    assert len(texts) > 50 and not any("centre_rows" in path.read_text() for path in texts)


# --------------------------------------------------------------------------------------------------------- the calls

SETS: tuple[dict[str, Any], ...] = ({}, {"scale": 2.5}, {"return_mean": True}, {"shift": True, "scale": -1})


def arrays(seed: int = 0) -> tuple[Any, Any]:
    rng = np.random.default_rng(seed)
    return rng.standard_normal((37, 50)).astype(np.float32), rng.standard_normal(50).astype(np.float32)


def truth(x: Any, shift: Any, scale: float = 1, return_mean: bool = False) -> list[Any]:
    mean = x.astype(np.float64).mean(1)
    out = scale * (x - mean[:, None]) + (0 if shift is None else shift)
    return [out, mean] if return_mean else [out]


def check(convert: Any, call: Any = centre_rows, back: Any = np.asarray) -> None:
    """Every set of options twice, with other values the second time: the second call takes the fast way."""
    for options in SETS:
        for seed in (0, 1, 2):
            x, shift = arrays(seed)
            rest = {name: value for name, value in options.items() if name != "shift"}
            given = {"shift": convert(shift)} if "shift" in options else {}
            made = call(convert(x), **given, **rest)
            want = truth(x, shift if given else None, **rest)
            for one, other in zip(made if isinstance(made, tuple) else (made,), want, strict=True):
                np.testing.assert_allclose(back(one), other, rtol=1e-5, atol=1e-5)


def test_numpy() -> None:
    check(np.asarray)
    x, _ = arrays()
    out = np.empty_like(x)
    assert centre_rows(x, out=out) is out
    np.testing.assert_allclose(out, truth(x, None)[0], rtol=1e-5, atol=1e-5)
    assert centre_rows(np.empty((0, 5), np.float32), return_mean=True)[1].shape == (0,)
    with pytest.raises(UnsupportedProblem, match="out shares memory with x"):
        centre_rows(x, out=x)


def test_errors() -> None:
    """They name the call and every reason, as those of the package's own functions."""
    x, shift = arrays()
    with pytest.raises(UnsupportedProblem, match=r"centre_rows\(x=float64.*\n.*float32") as caught:
        centre_rows(x.astype(np.float64), shift=shift[:3])
    assert len(caught.value.reasons) == 3
    for wrong in ({"scale": "1"}, {"return_mean": 1}):
        with pytest.raises(UnsupportedProblem, match=f"{next(iter(wrong))} must be"):
            centre_rows(x, **wrong)
    with pytest.raises(TypeError, match="no argument 'shft': did you mean shift"):
        centre_rows(x, shft=shift)
    with pytest.raises(TypeError, match="x must be an array"):
        centre_rows(None)


@pytest.mark.torch
def test_torch() -> None:
    torch = pytest.importorskip("torch")
    import flashmoe_cupy.torch

    assert flashmoe_cupy.torch.centre_rows is centre_rows
    check(torch.from_numpy)
    for options in SETS:
        x, shift = map(torch.from_numpy, arrays())
        given = options | ({"shift": shift} if "shift" in options else {})
        compiled = torch.compile(
            lambda a, given=given: centre_rows(a * 2, **given), fullgraph=True, backend="aot_eager"
        )
        for one, other in zip(flat(compiled(x)), flat(centre_rows(x * 2, **given)), strict=True):
            assert torch.equal(one, other)
    values = {"x": x, "shift": None, "scale": 2.0, "return_mean": False}
    torch.library.opcheck(torch.ops.flashmoe_cupy.centre_rows.default, tuple(values.values()))
    with pytest.raises(UnsupportedProblem, match="x requires grad"):
        torch.ops.flashmoe_cupy.centre_rows(*(values | {"x": x.clone().requires_grad_()}).values())


def flat(made: Any) -> tuple[Any, ...]:
    return made if isinstance(made, tuple) else (made,)


@pytest.mark.jax
@pytest.mark.parametrize("device", ["cpu", pytest.param("gpu", marks=[pytest.mark.gpu, pytest.mark.sm80])])
def test_jax(device: str) -> None:
    jax = pytest.importorskip("jax")
    import flashmoe_cupy.jax

    try:
        here = jax.devices(device)[0]
    except RuntimeError:
        pytest.skip("JAX has no GPU")
    with jax.default_device(here):
        check(jax.numpy.asarray)
        static = ("scale", "return_mean")
        check(jax.numpy.asarray, jax.jit(centre_rows, static_argnames=static))
        check(jax.numpy.asarray, flashmoe_cupy.jax.centre_rows)  # type: ignore[attr-defined]
        x, _ = arrays()
        mapped = jax.vmap(centre_rows)(jax.numpy.stack([x, 2 * x]))
        np.testing.assert_allclose(mapped[1], 2 * truth(x, None)[0], rtol=1e-5, atol=1e-5)
        with pytest.raises(UnsupportedProblem, match="gradient of centre_rows"):
            jax.grad(lambda x: centre_rows(x).sum())(x)


@pytest.mark.gpu
@pytest.mark.sm80
@pytest.mark.parametrize("library", ["cupy", "torch"])
def test_on_a_gpu(library: str) -> None:
    cupy = pytest.importorskip("cupy")
    if library == "cupy":
        check(cupy.asarray, back=cupy.asnumpy)
        return
    torch = pytest.importorskip("torch")
    check(lambda x: torch.from_numpy(x).cuda(), back=lambda x: x.cpu().numpy())
    x = torch.from_numpy(arrays()[0]).cuda()
    out = torch.full((37, 50), float("nan"), device="cuda")
    assert centre_rows(x, out=out) is out and torch.equal(out, centre_rows(x))


def test_emulated(monkeypatch: pytest.MonkeyPatch) -> None:
    """The way to the kernels and the kernels themselves, on a CPU."""
    emulate = pytest.importorskip("emulate")
    if emulate.missing():
        pytest.skip(emulate.missing())
    from test_emulated_ops import Machine, Resident, on_machine

    with on_machine(Machine((9, 0)), monkeypatch):
        check(Resident, back=lambda x: x.array)


def test_explained_by_its_name() -> None:
    """Its kernels are listed, and warmed up, as all others are."""
    from flashmoe_cupy import service

    listed = service.kernels("sm_80", op="moe")
    assert {"centre_rows_sum", "centre_rows_move"} <= set(listed)
    json.dumps(listed["centre_rows_sum"]["header"])
