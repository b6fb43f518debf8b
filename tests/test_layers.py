"""The rules that keep the house in order: who may import what, who may include what, and how long a file gets."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "flashmoe_cupy"
CUDA = ROOT / "cuda_src"

MAX_LINES = 520
MAX_LINES_OF_SOURCES = 450  # of the package and of cuda_src
MAX_KERNEL = {"cuda_src/attention/fwd_sm90.cuh": (400, 110)}  # lines and columns: later work adds to it
SOURCES = (".py", ".cuh", ".cu", ".hpp", ".cpp")

# Which rooms of the package a room may import. The first row that matches a file's path is its row; "*" = any room.
# The package's own `__init__.py` is lazy (see test_package.py).
LAYERS: list[tuple[str, tuple[str, ...]]] = [
    ("errors.py", ()),
    ("_env.py", ()),
    ("_cupy.py", ("_env", "errors")),
    ("_xla_ffi.py", ()),
    ("_late.py", ()),
    ("_xla.py", ("_xla_ffi", "ops", "plan", "arrays", "dtypes", "errors")),
    ("_version.py", ()),
    ("dtypes.py", ()),
    ("torch_reasons.py", ("dtypes",)),
    ("arrays/", ("arrays", "_cupy", "dtypes", "errors", "torch_reasons")),
    ("reference/", ("reference",)),
    ("testing", ("reference", "testing")),
    ("_types.py", ()),
    ("plan/options.py", ()),
    ("plan/hints.py", ("plan.checks", "dtypes")),
    ("plan/checks.py", ("plan.options", "arrays", "dtypes", "errors")),
    ("plan/archs.py", ()),
    ("plan/attention/checks.py", ("plan.checks", "plan.hints", "plan.options", "arrays", "dtypes")),
    (
        "plan/attention/problem.py",
        ("plan.attention.checks", "plan.checks", "plan.hints", "plan.options", "arrays", "dtypes", "errors"),
    ),
    ("plan/attention/tiles.py", ("plan.archs", "plan.attention.softcap")),
    ("plan/moe/layouts.py", ("plan.checks", "arrays", "dtypes")),
    ("plan/moe/routing.py", ("plan.checks", "plan.hints", "plan.options", "arrays", "dtypes", "errors")),
    (
        "plan/moe/problem.py",
        ("plan.checks", "plan.hints", "plan.moe.layouts", "plan.moe.routing", "plan.options", "arrays", "dtypes"),
    ),
    ("plan/", ("plan", "jit", "arrays", "dtypes", "errors", "_env")),
    ("cpu/", ("cpu", "plan.attention.problem", "plan.moe.problem", "plan.moe.routing", "dtypes", "errors", "_env")),
    ("jit/source.py", ("errors",)),
    ("jit/log.py", ()),
    ("jit/compiler.py", ("jit.log", "jit.source", "errors", "_cupy", "_env")),
    ("jit/disk.py", ("_env",)),
    ("jit/cache.py", ("jit.compiler", "jit.disk", "jit.source", "errors", "_env")),
    ("jit/driver.py", ("errors",)),
    ("jit/tensormap.py", ("jit.driver", "dtypes", "errors")),
    ("jit/", ("jit", "dtypes", "errors", "_cupy", "_env")),
    ("ops/", ("ops", "plan", "jit", "cpu", "arrays", "dtypes", "errors", "_env", "_late", "_types")),
    ("layer_arrays.py", ("ops", "plan.checks", "arrays", "dtypes", "errors", "torch_reasons")),
    ("kv_cache.py", ("layer_arrays", "plan.checks", "plan.options", "errors")),
    ("attention_layer.py", ("kv_cache", "layer_arrays", "ops", "plan", "errors", "_types")),
    ("layers.py", ("layer_arrays", "ops", "plan", "arrays", "dtypes", "errors", "_types", "torch_reasons")),
    ("science/", ("science", "ops", "plan", "jit", "cpu", "reference", "arrays", "dtypes", "errors", "_env")),
    ("torch_gradients.py", ("ops.call", "plan.operation", "errors")),
    ("torch_modules.py", ("attention_layer", "kv_cache", "layer_arrays", "plan.checks", "errors")),
    ("torch.py", ("ops", "plan", "errors", "torch_gradients", "torch_modules", "torch_reasons")),
    ("jax.py", ("_xla", "ops", "plan", "arrays", "dtypes", "errors")),
    ("integrations/", ("integrations", "torch", "ops", "plan.operation", "arrays", "dtypes", "errors")),
    ("service/", ("*",)),
    ("cli/", ("*",)),
    ("__main__.py", ("cli",)),
    ("__init__.py", ("*",)),
]

# Frameworks, and the only rooms that may name them in an import statement, at whatever depth.
FRAMEWORKS: dict[str, tuple[str, ...]] = {
    "cupy": ("_cupy.py", "arrays/", "jit/launch.py", "jit/tensormap.py", "service/", "cli/"),
    "cuda": ("jit/launch.py", "jit/tensormap.py", "service/", "cli/"),
    "torch": ("torch.py", "torch_gradients.py", "torch_modules.py", "integrations/", "cli/"),
    "jax": ("jax.py", "_xla.py", "cli/"),
    "transformers": ("integrations/",),
}
ALIASES = {"cupyx": "cupy", "cupy_backends": "cupy", "jaxlib": "jax"}
# Adapters are only imported by people who have the framework, so only they may import it when they are imported; so is
# the tensor class of an integration, by the functions of its neighbour.
AT_IMPORT = {
    "torch": (
        "torch.py", "torch_gradients.py", "torch_modules.py", "integrations/flash_attn.py", "integrations/sdpa.py",
        "integrations/torch_rows.py", "integrations/transformers_masks.py",
    ),
    "jax": ("jax.py", "_xla.py"),
}  # fmt: skip

# A header's folder -> folders and files that it may include. Order: prelude -> ptx, math -> tile -> kernels; the
# prelude itself stands on the instructions that work on registers alone.
INCLUDES: dict[str, tuple[str, ...]] = {
    "": ("ptx/scalar.cuh",),
    "ptx": ("prelude.cuh",),
    "math": ("prelude.cuh", "math/"),
    "tile": ("prelude.cuh", "ptx/", "math/", "tile/"),
}
# What the kernels of one family share; a kernel never includes another one.
SHARED = (
    "activation.cuh", "assignments.cuh", "bias_sm80.cuh", "bias_sm90.cuh", "bwd_bias_tiles_sm90.cuh",
    "bwd_blocks_sm90.cuh", "bwd_fragments_sm90.cuh", "bwd_params.cuh", "bwd_sm80.cuh", "bwd_sums_sm90.cuh",
    "bwd_wide_blocks_sm90.cuh", "epilogue_sm90.cuh", "key_tiles.cuh", "keys.cuh", "next_weights.cuh",
    "outside_sm90.cuh", "params.cuh", "schedule.cuh", "schedule_sm90.cuh", "scores_sm90.cuh", "smem_sm90.cuh",
    "variant.cuh", "walk_sm90.cuh",
)  # fmt: skip


def python_files() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


def headers() -> list[Path]:
    return sorted(CUDA.rglob("*.cuh")) + sorted(CUDA.rglob("*.cu"))


def text_files() -> list[Path]:
    """Every text file that belongs to the project."""
    found = [ROOT / "pyproject.toml", ROOT / "README.md", ROOT / ".ci" / "run", ROOT / ".gitignore"]
    for folder in (PACKAGE, CUDA, ROOT / "tests", ROOT / "benchmarks"):
        found += [p for p in folder.rglob("*") if p.suffix in (*SOURCES, ".md", ".toml", ".json", ".jsonl")]
    return sorted(p for p in found if p.is_file() and "__pycache__" not in p.parts)


@cache
def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), str(path))


def room(path: Path) -> str:
    return path.relative_to(PACKAGE).as_posix()


def imports(path: Path, top_only: bool = False) -> Iterator[tuple[int, str]]:
    """(line, dotted name) of every import; `from a import b` gives both a and a.b. TYPE_CHECKING blocks do not run."""
    for node in _nodes(tree(path), top_only):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                package = ["flashmoe_cupy", *path.relative_to(PACKAGE).parent.parts]
                base = ".".join([*package[: len(package) - node.level + 1], *([base] if base else [])])
            yield node.lineno, base
            for alias in node.names:
                yield node.lineno, f"{base}.{alias.name}"


def _nodes(node: ast.AST, top_only: bool) -> Iterator[ast.AST]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
            for other in child.orelse:
                yield from _nodes(other, top_only)
            continue
        if top_only and isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
            continue
        yield child
        yield from _nodes(child, top_only)


def _modules() -> set[str]:
    """Dotted names of all modules and packages of the library, without its own name."""
    names = set()
    for path in python_files():
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        names.add(".".join(parts[:-1] if parts[-1] == "__init__" else parts))
    return names


def import_faults(path: Path, modules: set[str]) -> list[str]:
    """What `path` imports from the library against LAYERS."""
    name = room(path)
    allowed = next((row for prefix, row in LAYERS if name.startswith(prefix)), ())
    faults = []
    for line, dotted in imports(path):
        if dotted.split(".")[0] != "flashmoe_cupy":
            continue
        inner = dotted.removeprefix("flashmoe_cupy").lstrip(".")
        if inner not in modules or inner == "" or "*" in allowed:
            continue  # a name inside a module, judged by the module's own entry
        inside_row = any(inner == a or inner.startswith(f"{a}.") for a in allowed)
        on_the_way = any(a.startswith(f"{inner}.") for a in allowed)  # `plan` itself, where `plan.problem` is allowed
        if not inside_row and not on_the_way:
            faults.append(f"{name}:{line} imports {dotted}")
    return faults


def framework_faults(path: Path) -> list[str]:
    name = room(path)
    faults = []
    for top_only, table in ((False, FRAMEWORKS), (True, {f: AT_IMPORT.get(f, ()) for f in FRAMEWORKS})):
        for line, dotted in imports(path, top_only):
            framework = ALIASES.get(dotted.split(".")[0], dotted.split(".")[0])
            if framework in table and not name.startswith(table[framework]):
                faults.append(f"{name}:{line} imports {dotted}{' when it is imported' if top_only else ''}")
    return faults


def test_every_room_has_a_row() -> None:
    rows = tuple(prefix for prefix, _ in LAYERS)
    strangers = [room(p) for p in python_files() if not room(p).startswith(rows)]
    assert not strangers, f"not in LAYERS: {strangers}; a new room needs a row that says what it may import"


@pytest.mark.parametrize("path", python_files(), ids=room)
def test_imports_follow_the_layers(path: Path) -> None:
    assert not import_faults(path, _modules())


@pytest.mark.parametrize("path", python_files(), ids=room)
def test_frameworks_stay_in_their_adapters(path: Path) -> None:
    assert not framework_faults(path)


@pytest.mark.parametrize("path", python_files(), ids=room)
def test_no_print_outside_the_command_line(path: Path) -> None:
    lines = [
        node.lineno
        for node in ast.walk(tree(path))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in ("print", "pprint")
    ]
    assert not lines or room(path).startswith("cli/"), f"{room(path)} prints in lines {lines}"


@pytest.mark.parametrize("path", python_files(), ids=room)
def test_annotations_are_lazy(path: Path) -> None:
    annotated = any(isinstance(n, (ast.FunctionDef, ast.AsyncFunctionDef, ast.AnnAssign)) for n in ast.walk(tree(path)))
    lazy = "__future__.annotations" in {name for _, name in imports(path)}
    assert lazy or not annotated, f"{room(path)} lacks `from __future__ import annotations`"


def test_the_walker_sees_faults(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The rules above are worth nothing if the walk misses an import inside a function or a relative one."""
    import sys

    monkeypatch.setattr(sys.modules[__name__], "PACKAGE", tmp_path)
    (tmp_path / "plan").mkdir()
    bad = tmp_path / "plan" / "options.py"
    bad.write_text("def f():\n    import cupy.cuda\n    from ..jit import cache\n    from flashmoe_cupy.ops import x\n")
    good = tmp_path / "dtypes.py"
    good.write_text("from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import torch\nimport numpy\n")
    modules = {"", "plan", "plan.options", "jit", "jit.cache", "ops", "dtypes"}
    assert framework_faults(bad) == ["plan/options.py:2 imports cupy.cuda"]
    assert {f.split(" imports ")[1] for f in import_faults(bad, modules)} == {
        "flashmoe_cupy.jit",
        "flashmoe_cupy.jit.cache",
        "flashmoe_cupy.ops",
    }
    assert not framework_faults(good)


def import_circles(files: dict[str, Path]) -> list[set[str]]:
    """Modules that import each other, inside functions and under TYPE_CHECKING too. files: by dotted name.

    The package's own name is an edge only where something is taken from its `__init__`.
    """
    edges: dict[str, set[str]] = {name: set() for name in files}
    for name, path in files.items():
        for node in ast.walk(tree(path)):
            if isinstance(node, ast.Import):
                edges[name] |= {alias.name for alias in node.names if alias.name in files}
            elif isinstance(node, ast.ImportFrom):
                base = node.module or ""
                if node.level:
                    package = name.split(".") if path.name == "__init__.py" else name.split(".")[:-1]
                    base = ".".join([*package[: len(package) - node.level + 1], *([base] if base else [])])
                for alias in node.names:
                    inner = f"{base}.{alias.name}"
                    edges[name] |= {inner if inner in files else base} & files.keys()

    def reached(start: str) -> set[str]:
        found: set[str] = set()
        pending = [start]
        while pending:
            new = edges[pending.pop()] - found
            found |= new
            pending += new
        return found

    reach = {name: reached(name) for name in files}
    circles = [{other for other in files if other in reach[name] and name in reach[other]} for name in files]
    return [circle for i, circle in enumerate(circles) if circle and circle not in circles[:i]]


def module_files() -> dict[str, Path]:
    names = {}
    for path in python_files():
        parts = (PACKAGE.name, *path.relative_to(PACKAGE).with_suffix("").parts)
        names[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return names


def test_imports_have_no_circle() -> None:
    assert not import_circles(module_files())


def test_the_walk_finds_circles(tmp_path: Path) -> None:
    texts = {
        "p.a": "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from p import b\n",
        "p.b": "def f():\n    from p.c import x\n", "p.c": "from .a import y\n", "p.d": "import p.a\n",
    }  # fmt: skip
    files = {name: tmp_path / f"{name}.py" for name in texts}
    for name, path in files.items():
        path.write_text(texts[name])
    assert import_circles(files) == [{"p.a", "p.b", "p.c"}]


# ------------------------------------------------------------------------------------------------------- device sources


def include_faults(folder: str, file: str, text: str) -> list[str]:
    """What a header of `folder` includes against INCLUDES."""
    allowed = INCLUDES.get(folder, ("prelude.cuh", "ptx/", "math/", "tile/", *(f"{folder}/{name}" for name in SHARED)))
    faults = []
    for number, line in enumerate(text.splitlines(), 1):
        match = re.match(r'\s*#\s*include\s*([<"])([^>"]*)[>"]', line)
        if match and (match[1] == "<" or not match[2].startswith(allowed) or not (CUDA / match[2]).is_file()):
            faults.append(f"{file}:{number} includes {match[2]}")
    return faults


def header_name(path: Path) -> str:
    return path.relative_to(CUDA).as_posix()


@pytest.mark.parametrize("path", headers(), ids=header_name)
def test_includes_point_backwards(path: Path) -> None:
    name = header_name(path)
    folder = name.rpartition("/")[0]
    assert folder.count("/") == 0, f"{name}: families have no sub-folders"
    assert not include_faults(folder, name, path.read_text(encoding="utf-8"))


def test_includes_have_no_circle() -> None:
    edges = {header_name(p): re.findall(r'#\s*include\s*"([^"]+)"', p.read_text(encoding="utf-8")) for p in headers()}

    def visit(name: str, trail: tuple[str, ...]) -> None:
        assert name not in trail, f"circle: {' -> '.join((*trail, name))}"
        for inner in edges.get(name, ()):
            visit(inner, (*trail, name))

    for name in edges:
        visit(name, ())


def test_the_include_check_sees_faults() -> None:
    assert include_faults("ptx", "ptx/x.cuh", '#include "math/softmax.cuh"\n#include <cuda_bf16.h>\n') == [
        "ptx/x.cuh:1 includes math/softmax.cuh",
        "ptx/x.cuh:2 includes cuda_bf16.h",
    ]
    assert include_faults("attention", "attention/y.cuh", '#include "attention/fwd_sm80.cuh"\n')
    assert include_faults("moe", "moe/z.cuh", '#include "attention/params.cuh"\n')


def _code(text: str) -> str:
    """CUDA text without comments."""
    return re.sub(r"//[^\n]*|/\*.*?\*/", "", text, flags=re.DOTALL)


@pytest.mark.parametrize("path", headers(), ids=header_name)
def test_device_headers_hold_no_entry(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    code = _code(text)
    assert "__global__" not in code, f"{header_name(path)}: the generated source owns the entry"
    assert "#pragma once" in code
    assert header_name(path).startswith("ptx/") or not re.search(r"\basm\b", code), "PTX belongs in cuda_src/ptx"
    for word in ("cooperative_groups", "cutlass", "std::", "printf"):
        assert word not in code, f"{header_name(path)} uses {word}"


# ------------------------------------------------------------------------------------------------------------ all files


def test_files_stay_readable() -> None:
    long = {}
    for path in text_files():
        if path.suffix in SOURCES:
            count = len(path.read_text(encoding="utf-8").splitlines())
            name = path.relative_to(ROOT).as_posix()
            if count > (MAX_LINES_OF_SOURCES if name.startswith(("flashmoe_cupy/", "cuda_src/")) else MAX_LINES):
                long[path.relative_to(ROOT).as_posix()] = count
    assert not long, f"over {MAX_LINES_OF_SOURCES} or {MAX_LINES} lines: {long}"
    for name, (lines, columns) in MAX_KERNEL.items():
        text = (ROOT / name).read_text(encoding="utf-8").splitlines()
        assert len(text) <= lines and max(map(len, text)) <= columns, name


def test_no_room_asks_what_kind_of_problem_it_has() -> None:
    """Operations say what differs between problems; nobody has a chain of `isinstance`."""
    found = [
        f"{room(path)}:{number}"
        for path in python_files()
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
        if re.search(r"isinstance\([^)]*\w+Problem\b", line) and "UnsupportedProblem" not in line
    ]
    assert not found


def test_no_machine_paths() -> None:
    # Built from parts, so that this file does not hold what it looks for.
    folders = "|".join(("home", "root", "Users", "work", "farm", "opt", "mnt", "media"))
    pattern = re.compile(rf"(?<![\w.$}}~*)\]/]){re.escape('/')}(?:{folders})/[A-Za-z0-9_.]")
    found = [
        f"{path.relative_to(ROOT).as_posix()}:{number}"
        for path in text_files()
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
        if pattern.search(line)
    ]
    assert not found
    assert pattern.search("see " + "/" + "home/someone/x") and not pattern.search("$HOME/" + "work/x")
