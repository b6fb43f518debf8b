"""`grouped_gemm` on a GPU, on each kernel that takes a problem, with both layouts, gathers and rows of nobody.

The checks take the device, so that test_moe_checks.py runs some of them on the CPU.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext
from typing import Any

import pytest
from gpu_moe_kit import (
    Arrays,
    Guarded,
    Known,
    Tensor,
    agree,
    judge,
    known_products,
    poison,
    product_tensors,
    products,
    same_bits,
)
from moe_plans import ProductCase, compile_everything, kernel_names, memories, planned_for, register

from flashmoe_cupy import grouped_gemm
from flashmoe_cupy.errors import FlashMoEError
from flashmoe_cupy.plan.kernels import only
from flashmoe_cupy.testing import max_error

torch: Any = pytest.importorskip("torch")
pytestmark = [pytest.mark.gpu, pytest.mark.torch]

HALVES = ("bfloat16", "float16")
DIMS = ((8, 8), (40, 24), (264, 72), (136, 136), (1000, 200), (128, 1032))
SIZES = (
    *((1,), (7,), (0, 0), (129, 0, 127), (5, 0, 3, 1, 0, 0, 9), (70, 1, 65, 64, 63), (100, 130, 0, 90)),
    *((255, 0, 300, 129), (1, 600, 0), (0, 0, 513)),
)  # fmt: skip
MANY = tuple(i % 7 for i in range(200)), tuple(40 + i % 5 for i in range(70))  # more groups than a warp has lanes


@pytest.fixture(scope="module", autouse=True)
def _compiled() -> None:
    compile_everything()


# ---------------------------------------------------------------------------------------------------------------------
# running and judging


def on_kernels(case: ProductCase, device: str) -> Iterator[tuple[str, Any]]:
    for name in kernel_names(case) if device == "cuda" else [""]:
        yield name, only(name) if name else nullcontext()


def run(t: Arrays, known: Known, mine: Tensor) -> list[str]:
    """One call into rows of NaN and one into a new array: what is wrong with them."""
    x = t["x"]
    shape = (*mine.shape, t["w"].shape[1])
    guarded = Guarded.like(shape, x.dtype, str(x.device))
    try:
        out = grouped_gemm(**t, out=guarded.out)
        poison(math.prod(shape) * x.element_size(), str(x.device))
        new = grouped_gemm(**t)
    except FlashMoEError as e:
        return [f"{type(e).__name__}: {e}"]
    wrong = [] if out is guarded.out else ["out= was not handed back"]
    wrong += [] if guarded.intact() else ["wrote outside out"]
    wrong += [] if bool(out[~mine].isnan().all()) else ["wrote rows of out that belong to no group"]
    wrong += [] if not bool((new[~mine] != 0).any()) else ["rows of no group are not 0 in a new array"]
    wrong += [] if same_bits(new[mine], out[mine]) else ["a new array has other values"]
    return wrong + judge(out[mine], known, x.dtype)


def check(case: ProductCase, device: str, seed: int = 0) -> list[str]:
    """What is wrong with one problem, each line naming the case and the kernel."""
    t = product_tensors(case, device, seed)
    known, mine = known_products(t)
    found = []
    for name, chosen in on_kernels(case, device):
        with chosen:
            found += [f"{case} {name}: {line}" for line in run(t, known, mine)]
    return found


def check_all(cases: Iterable[ProductCase], device: str) -> None:
    """Every problem, then one assertion that lists all that failed."""
    wrong = [line for seed, case in enumerate(cases) for line in check(case, device, seed)]
    assert not wrong, f"{len(wrong)} wrong:\n" + "\n".join(wrong)


# ---------------------------------------------------------------------------------------------------------------------
# problems


def packed(dtype: str) -> list[ProductCase]:
    """Groups one behind the other, with and without a gather and rows of nobody on both sides."""
    found, ends = [], ((0, 0), (3, 0), (0, 9), (70, 70))
    for i, (sizes, (n, d), x_rows) in enumerate(itertools.product(SIZES, DIMS[1:4], (0, 50))):
        head, tail = ends[i // 2 % 4]
        bias = ("", "same", "float32")[i % 5 % 3]
        found.append(ProductCase(sizes, n, d, dtype, bias, x_rows, head, tail))
    wide = [ProductCase((150, 0, 20), n, d, dtype, "same", x_rows) for n, d in DIMS for x_rows in (0, 60)]
    many = [ProductCase(sizes, 264, 72, dtype, x_rows=x_rows, tail=5) for sizes in MANY for x_rows in (0, 300)]
    wide += [ProductCase((129, 600, 300), n, 1032, dtype) for n in (200, 1000)]  # many rows and many steps
    return [*found, *wide, *many, ProductCase((0,), dtype=dtype), ProductCase((0, 0), dtype=dtype, tail=4)]


def masked(dtype: str) -> list[ProductCase]:
    kinds = itertools.product(SIZES, DIMS[1:4], (0, 37))
    found = [
        ProductCase(sizes, n, d, dtype, ("", "same", "float32")[i % 5 % 3], max_rows=max(*sizes, 1) + more)
        for i, (sizes, (n, d), more) in enumerate(kinds)
    ]
    return [*found, *(ProductCase(sizes, 264, 72, dtype, max_rows=45) for sizes in MANY)]


GRIDS = (packed, masked)
SINGLES = [case for grid in GRIDS for case in grid("float32")[::2]]
for _grid in GRIDS:
    register([*_grid("bfloat16"), *_grid("float16")])
register(SINGLES)


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("grid", GRIDS, ids=lambda f: f.__name__)
def test_grid(grid: Callable[[str], list[ProductCase]], dtype: str) -> None:
    for every, memory in zip((1, 3), memories(), strict=True):
        with planned_for(memory):
            check_all(grid(dtype)[::every], "cuda")


def test_grids_in_float32() -> None:
    check_all(SINGLES, "cuda")


# ---------------------------------------------------------------------------------------------------------------------
# what other libraries test, with their tolerances beside ours


def difference(a: Tensor, b: Tensor) -> float:
    """1 - 2 <a, b> / (<a, a> + <b, b>), the distance that DeepGEMM's tests use."""
    a, b = a.double(), b.double()
    return float(1 - 2 * (a * b).sum() / (a.square() + b.square()).sum())


def around(count: int, rows: int, seed: int) -> tuple[int, ...]:
    """Sizes of `count` groups, each rows * U(0.7, 1.3)."""
    r = torch.rand(count, generator=torch.Generator().manual_seed(seed))
    return tuple(int(rows * (0.7 + 0.6 * float(v))) for v in r)


def check_peer(case: ProductCase, device: str) -> None:
    """Our rules, DeepGEMM's 1e-5, and QuACK's: at most twice the error of the same product in low precision + 1e-5."""
    t = product_tensors(case, device)
    known, mine = known_products(t)
    for name, chosen in on_kernels(case, device):
        with chosen:
            assert run(t, known, mine) == [], f"{case} {name}"
            out = grouped_gemm(**t)[mine]
            assert difference(out, known.exact) < 1e-5, f"{case} {name}"
            assert max_error(out, known.exact) < 2 * max_error(known.low, known.exact) + 1e-5, f"{case} {name}"


@pytest.mark.parametrize("n", [1504, 2048, 4096])
@pytest.mark.parametrize("d", [736, 1024, 8192])
def test_shapes_of_quack(d: int, n: int) -> None:
    for i, (count, x_rows, bias) in enumerate(itertools.product((3, 5), (0, 700), ("", "same"))):
        check_peer(ProductCase(around(count, 350, i), n, d, bias=bias, x_rows=x_rows), "cuda")


@pytest.mark.parametrize(("count", "rows"), [(4, 8192), (8, 4096)])
@pytest.mark.parametrize(("n", "d"), [(6144, 7168), (7168, 3072), (4096, 4096), (4096, 2048)])
def test_shapes_of_deep_gemm(count: int, rows: int, n: int, d: int) -> None:
    check_peer(ProductCase(around(count, rows, n), n, d), "cuda")


@pytest.mark.parametrize(("count", "rows"), [(32, 192), (6, 1024), (32, 20), (6, 20)])
@pytest.mark.parametrize(("n", "d"), [(4096, 7168), (7168, 2048)])
def test_masked_shapes_of_deep_gemm(count: int, rows: int, n: int, d: int) -> None:
    check_peer(ProductCase(around(count, rows, n), n, d, max_rows=4096), "cuda")


# ---------------------------------------------------------------------------------------------------------------------
# lists that lie


def check_sizes_beyond(device: str, dtype: str = "bfloat16") -> None:
    """On a GPU nobody checks the lists; what they say too much is cut, and nothing outside of out is written."""
    t = product_tensors(ProductCase((20, 0, 45), 40, 24, dtype, max_rows=45), device)
    t["x"].nan_to_num_(1.0)
    want, _ = products(**t | {"group_sizes": torch.tensor([45, 0, 45], device=device)}, dtype=torch.float64)
    t["group_sizes"] = torch.tensor([2**31 - 1, -5, 46], dtype=torch.int32, device=device)
    guarded = Guarded.like((3, 45, 40), t["x"].dtype, device)
    grouped_gemm(**t, out=guarded.out)
    assert guarded.intact() and bool(guarded.out[1].isnan().all())
    assert difference(guarded.out[[0, 2]], want[[0, 2]]) < 1e-5
    t = product_tensors(ProductCase((20, 0, 45), 40, 24, dtype, tail=9), device)
    t["x"].nan_to_num_(1.0)
    t["offsets"][-1] = 2**31 - 1
    guarded = Guarded.like((74, 40), t["x"].dtype, device)
    grouped_gemm(**t, out=guarded.out)
    ends = torch.tensor([0, 20, 20, 74], device=device)
    assert guarded.intact()
    assert difference(guarded.out, products(**t | {"offsets": ends}, dtype=torch.float64)[0]) < 1e-5


@pytest.mark.parametrize("dtype", [*HALVES, "float32"])
@pytest.mark.usefixtures("product_kernel")
def test_sizes_beyond(dtype: str) -> None:
    check_sizes_beyond("cuda", dtype)


def check_rows_alone(device: str, dtype: str = "bfloat16") -> None:
    """A row's values do not depend on the rows beside it, nor on where its group begins, to the bit on a GPU."""
    case = ProductCase((200, 100, 40), 264, 136, dtype, x_rows=340)
    t = product_tensors(case, device)
    t["w"] = t["w"][:1].expand(3, -1, -1)
    want: Tensor = None
    for first, order in ((200, torch.arange(340)), (40, torch.randperm(340)), (333, torch.randperm(340))):
        t["gather_indices"] = order.to(device=device, dtype=torch.int32)
        t["offsets"] = torch.tensor([0, first, first, 340], dtype=torch.int32, device=device)
        out = torch.empty((340, 264), dtype=t["x"].dtype, device=device)
        out[order.to(device)] = grouped_gemm(**t)
        want = out if want is None else want
        assert agree(out, want), first


@pytest.mark.parametrize("dtype", [*HALVES, "float32"])
@pytest.mark.usefixtures("product_kernel")
def test_rows_alone(dtype: str) -> None:
    check_rows_alone("cuda", dtype)
